"""RunSpec -> Plan: every name resolved, every row read, every check made, before anything is written or loaded.

    plan = make(RunSpec(model="smollm2-135m-instruct", tasks="gsm", data="sample", limit=6))
    [item.text for item in rendered(plan.columns[0])]
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from random import Random

from evalkit import data, draws, formats, models, recipes, tasks
from evalkit.engines import EngineSpec
from evalkit.errors import DataError, InputError, UnknownName
from evalkit.formats import Format
from evalkit.prompts import Rendered, Writer, requests
from evalkit.tokens import Tokenizer
from evalkit.types import Column, DataRef, Recipe, Request, Row, RunSpec, Sample, Shots, Task


@dataclass(frozen=True)
class ColumnPlan:
    """One column's samples in the order they are asked, and the shots of each group."""

    writer: Writer
    samples: tuple[Sample, ...]
    shots: Shots
    n_draw: int  # samples of the recipe's draw
    n_groups: int  # groups of the recipe's draw

    @property
    def column(self) -> Column:
        return self.writer.column

    @property
    def partial(self) -> bool:
        return len(self.samples) < self.n_draw


@dataclass(frozen=True)
class Plan:
    spec: RunSpec
    recipe: Recipe
    columns: tuple[ColumnPlan, ...]
    model: models.Model
    tokenizer: Tokenizer | None
    format: Format
    source: data.Source
    notes: tuple[str, ...]
    task_files: Mapping[str, Path]

    @cached_property
    def parts(self) -> dict[str, str]:
        """The hashes that stand in every key: weights, tokenizer, template."""
        folder = Path(self.model.path)
        hub = hashlib.sha256(f"{self.model.path}@{self.model.revision}".encode()).hexdigest()
        return {
            "weights": models.fingerprint(folder) if folder.is_dir() else hub,
            "tokenizer": self.tokenizer.fingerprint if self.tokenizer else "",
            "template": hashlib.sha256(repr((self.format.template, self.spec.system)).encode()).hexdigest(),
        }

    @property
    def folder_name(self) -> str:
        return models.folder_name(self.spec.model)

    @property
    def self_judged(self) -> bool:
        return self.spec.judge == "self" and any(c.writer.task.kind == "pairwise" and c.samples for c in self.columns)

    @cached_property
    def context(self) -> int:
        """Tokens of prompt and answer together: --engine-args max_model_len, else the registry's, else the config's."""
        own = self.spec.engine_args.get("max_model_len", "")
        if own and not own.isdigit():
            raise InputError(f"--engine-args max_model_len={own}: must be a number of tokens")
        return int(own) if own else self.model.context or _config_context(self.model)

    def engine_spec(self, length: int, log: Path) -> EngineSpec:
        """What an engine of `length` tokens (prompt and answer together) is built from."""
        args = {k: v for k, v in self.spec.engine_args.items() if k != "max_model_len"}
        return EngineSpec(self.model.path, self.model.revision, length, args, log, self.recipe.seed,
                          self.spec.tokenizer or self.model.path)

    def requests(self, column: ColumnPlan) -> Iterator[tuple[Rendered, Request]]:
        return requests(column.writer, rendered(column), ":".join(self.parts.values()))


def rendered(column: ColumnPlan) -> Iterator[Rendered]:
    """The prompts of a column, one after the other."""
    common = column.shots.get("", ())
    for sample in column.samples:
        yield column.writer.render(sample, column.shots.get(sample.group, common))


def make(spec: RunSpec, weights: bool = True) -> Plan:
    """The plan of `spec`. Raises InputError and its kin for all that is wrong with it; writes nothing.

    Without `weights` (`evalkit prompts`) the model's tokenizer is enough, or its name where --tokenizer is given.
    """
    folders, own = all_tasks(spec.tasks_dir)
    recipe = recipes.with_sets(recipes.with_tasks(recipes.load(spec.recipe), own), spec.sets)
    columns = recipes.select(recipe, spec.tasks)
    model = models.resolve(spec.model, spec.format, ready=weights or not spec.tokenizer)
    if weights:
        model = models.fetch(model)
        models.check_folder(Path(model.path), tokenizer=not spec.tokenizer)
    tokenizer = None if spec.tokenizer == "none" else Tokenizer(spec.tokenizer or model.path, model.revision)
    chat_format = formats.load(model.format or "auto", tokenizer.chat_template if tokenizer else None)
    loaded = {name: tasks.load(folders[name]) for name in _task_names(columns, folders)}
    source = data.open_source(spec.data, recipe.revisions, folders)
    source.prefetch(data_refs(columns, folders))
    system = model.systems.get(spec.system, spec.system)
    cache: dict[tuple[object, ...], _Pool] = {}
    planned = []
    for column in columns:
        writer = Writer(loaded[column.task], column, chat_format, tokenizer, system)
        pool = _pool(writer.task, column, source, recipe.seed, cache)
        planned.append(_column_plan(writer, pool, spec, recipe.seed))
    _check_ids(spec.ids, planned)
    notes = _notes(spec, recipe, planned, chat_format, model.published)
    files = {name: folders[name] / "task.py" for name in loaded}
    return Plan(spec, recipe, tuple(planned), model, tokenizer, chat_format, source, notes, files)


def _config_context(model: models.Model) -> int:
    path = Path(model.path) / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    length = config.get("max_position_embeddings") or config.get("text_config", {}).get("max_position_embeddings")
    if not length:
        raise InputError(f"{path}: no max_position_embeddings; give the context as --engine-args max_model_len=N")
    return int(length)


def all_tasks(tasks_dir: str) -> tuple[dict[str, Path], list[Task]]:
    """Shipped task folders and a user's, by name, and the user's tasks, loaded."""
    folders = tasks.find()
    if not tasks_dir:
        return folders, []
    own = tasks.find(Path(tasks_dir))
    loaded = [tasks.load(folder) for folder in own.values()]
    clash = {task.name for task in loaded} & set(folders)
    if clash:
        raise InputError(f"--tasks-dir {tasks_dir}: task {min(clash)!r} is a shipped task's name; give it another")
    return {**folders, **dict(zip((t.name for t in loaded), own.values(), strict=True))}, loaded


def data_refs(columns: Sequence[Column], folders: Mapping[str, Path]) -> list[DataRef]:
    """Every split that `columns` read: rows, shots and references."""
    found: dict[DataRef, None] = {}

    def note(ref: DataRef) -> list[Row]:
        found[ref] = None
        return []

    for column in columns:
        task = tasks.load(folders[column.task])
        own = [ref for ref in task.refs if column.switches["config"] in ("", ref.config)]
        found |= dict.fromkeys(own)
        if task.shots is not None and column.switches["shots"]:
            task.shots(note, column.switches, [ref.config for ref in own])
        if task.references is not None:
            task.references(note)
    return list(found)


def _task_names(columns: Sequence[Column], folders: Mapping[str, Path]) -> set[str]:
    for column in columns:
        if column.task not in folders:
            raise UnknownName("task folder", column.task, folders, f"column {column.name}")
    return {column.task for column in columns}


@dataclass(frozen=True)
class _Pool:
    """All samples of a benchmark's rows by group, the recipe's draw, and the shots."""

    samples: Mapping[str, Sequence[Sample]]
    drawn: Mapping[str, Sequence[int]]
    shots: Shots


def _pool(task: Task, column: Column, source: data.Source, seed: int, cache: dict[tuple[object, ...], _Pool]) -> _Pool:
    s = column.switches
    key = (task.name, s["config"], s["draw"], s["shots"], s["exemplar"])
    if key in cache:
        return cache[key]
    load = partial(source.rows, task=task.name)
    samples: dict[str, list[Sample]] = {}
    for ref in task.refs:
        if s["config"] in ("", ref.config):
            for i, row in enumerate(load(ref)):
                try:
                    item = task.sample(row, ref, i)
                except (KeyError, IndexError, TypeError, AttributeError) as error:
                    where = f"{ref.repo} {ref.config} {ref.split}".replace("  ", " ")
                    raise DataError(f"{where}, row {i}: {type(error).__name__}: {error}: not the columns that task "
                                    f"{task.name} reads; got {', '.join(row)}") from None
                samples.setdefault(item.group, []).append(item)
    if not samples:
        raise DataError(f"{source.name}: no rows for task {task.name}"
                        + (f", configuration {s['config']}" if s["config"] else ""))
    rng = Random(seed)
    drawn = draws.rows({group: len(own) for group, own in samples.items()}, s["draw"], rng)
    shots: dict[str, tuple[Sample, ...]] = {}
    if s["shots"] and task.shots is not None:
        found = task.shots(load, s, sorted(samples))
        if s["exemplar"] == "drawn":
            picked = draws.exemplars({group: len(own) for group, own in found.items()}, s["shots"], rng)
            shots = {group: tuple(found[group][i] for i in own) for group, own in picked.items()}
        else:
            shots = {group: tuple(own[: s["shots"]]) for group, own in found.items()}
    cache[key] = _Pool(samples, drawn, shots)
    return cache[key]


def _column_plan(writer: Writer, pool: _Pool, spec: RunSpec, seed: int) -> ColumnPlan:
    drawn = pool.drawn
    n_draw, n_groups = sum(map(len, drawn.values())), len(drawn)
    if spec.ids:
        wanted = set(spec.ids)
        chosen = tuple(item for own in pool.samples.values() for item in own if item.id in wanted)
    else:
        kept = draws.limited(drawn, spec.limit, seed) if spec.limit is not None else drawn
        chosen = tuple(pool.samples[group][i] for group in kept for i in kept[group])
    return ColumnPlan(writer, chosen, pool.shots, n_draw, n_groups)


def _check_ids(ids: Sequence[str], planned: Sequence[ColumnPlan]) -> None:
    found = {sample.id for column in planned for sample in column.samples}
    missing = [name for name in ids if name not in found]
    if missing:
        more = f" ({len(missing)} such ids)" if len(missing) > 1 else ""
        columns = ", ".join(dict.fromkeys(c.column.benchmark for c in planned))
        raise InputError(f"--ids: no sample {missing[0]!r} in {columns}{more}; "
                         "ids look like anatomy/test/12, gsm8k/main/test/228, bbh/snarks/44, HumanEval/38")


def _notes(spec: RunSpec, recipe: Recipe, planned: Sequence[ColumnPlan], fmt: Format,
           published: str) -> tuple[str, ...]:
    """What a reader of the table has to know, one line each."""
    benchmarks = {c.column.benchmark for c in planned}
    about = {**dict.fromkeys(recipe.benchmarks, False), **dict.fromkeys(benchmarks, True), "published": bool(published)}
    notes = [note for note in recipe.notes if about.get(note.partition(":")[0], True)]
    notes.append(f"chat format: {fmt.name}" + (", the tokenizer's own" if fmt.name == "auto" else ""))
    if spec.system:
        notes.append(f"system message: {spec.system}")
    if spec.engine_args:
        notes.append("engine arguments: " + " ".join(f"{k}={v}" for k, v in spec.engine_args.items()))
    for column in planned:
        if column.writer.task.kind == "choice" and column.writer.tokenizer and column.samples:
            how = column.column.switches["option_ids"]
            text = column.writer.tokenizer.option_ids(column.samples[0].options, how)[1]
            if text and text not in notes:
                notes.append(text)
    return tuple(notes)
