"""Recipes: which columns there are and every switch each is run with. Data in TOML, nothing else.

    [gsm]                        # a benchmark: task folder and switches of all its columns
    draw = 200
    [gsm.columns.gsm_cot]        # a column: its own switches
    style = "cot"

Nearest wins: column, benchmark, `[defaults]`, the default in SWITCHES below, which also says what each means.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

from evalkit.errors import InputError, UnknownName
from evalkit.types import Column, Recipe, Task

DEFAULT = "tulu-2023-06"


@dataclass(frozen=True, slots=True)
class Switch:
    default: Any
    doc: str
    choices: tuple[Any, ...] = ()


SWITCHES: Mapping[str, Switch] = {
    "shots": Switch(0, "exemplars before the question"),
    "exemplar": Switch("first", "which exemplars: the first rows, or drawn after the rows' draw", ("first", "drawn")),
    "draw": Switch(0, "rows drawn from each group (GSM has one group); 0 takes all"),
    "config": Switch("", "evaluate only this configuration of the task's data sets; empty takes all"),
    "style": Switch("cot", "exemplars with their reasoning (cot) or the answer alone (direct)", ("cot", "direct")),
    "chat": Switch(True, "wrap the prompt in the model's chat format", (True, False)),
    "bos": Switch("tokenizer", "begin-of-sequence token: as the tokenizer adds it, or none", ("tokenizer", "none")),
    "fit": Switch("none", "drop exemplars until the prompt has at most `fit_tokens`: measured before (bare) or after "
                  "(wrapped) the chat format", ("none", "bare", "wrapped")),
    "fit_tokens": Switch(2048, "the limit of `fit`, in tokens, BOS not counted"),
    "over_context": Switch("fail", "a prompt plus answer over the model's context: extend the engine's length as the "
                           "original ran past it, empty answer, or fail", ("extend", "empty", "fail")),
    "max_tokens": Switch(512, "new tokens at most"),
    "temperature": Switch(0.0, "sampling temperature; 0 is greedy"),
    "top_p": Switch(1.0, "nucleus sampling"),
    "samples": Switch(1, "answers asked for each sample"),
    "k": Switch(1, "k of pass@k"),
    "stop": Switch([], "texts that end the answer and are cut off"),
    "stop_when": Switch("always", "stop always, or only without a chat format", ("always", "no-chat")),
    "stop_level": Switch("text", "find stops in the text, or as token sequences as the 2023-06 code did: each encoded "
                         "after a blank, its first token dropped", ("text", "token")),
    "guard": Switch(False, "also stop where the format's user header appears in the answer", (True, False)),
    "rule": Switch("strict", "extraction and matching rule (`evalkit score --rules all` runs every one)"),
    "average": Switch("samples", "a column's value: mean over samples, or over the groups' means",
                      ("samples", "groups")),
    "allow_missing": Switch(False, "show a number though samples failed or are missing", (True, False)),
    "subject_blanks": Switch(1, "MMLU: blanks before the subject; the original has two"),
    "answer_prefix": Switch("", "MMLU: how the model's turn begins"),
    "none_cell": Switch("text", "MMLU: an option text `None` as it is, or `nan` as pandas 2 reads it",
                        ("text", "nan")),
    "option_ids": Switch("after-blank", "MMLU: token read for a letter: the last id of ' A', or the first id of 'A' "
                         "where both agree and else the last of ' A'", ("after-blank", "plain-if-same")),
    "probs": Switch("options", "MMLU: softmax over the options, or over the vocabulary and then the options",
                    ("options", "vocabulary")),
    "paragraph_cut": Switch(False, "BBH: read only what stands before the answer's first blank line", (True, False)),
    "misspelling": Switch(False, "GSM direct: `Quesion:` in the exemplars, as in the original", (True, False)),
    "passage": Switch(True, "TydiQA: with the gold passage or closed-book", (True, False)),
    "context_tokens": Switch(0, "TydiQA: cut each passage to this many tokens; 0 does not"),
    "context_bos": Switch(False, "TydiQA: a cut passage begins with the written BOS that the original's decoding left",
                          (True, False)),
    "strip_content": Switch(False, "TydiQA: strip the user turn before the chat format", (True, False)),
    "health_unparsed": Switch(0.20, "a cell is unhealthy above this share of unparsed answers"),
    "health_truncated": Switch(0.10, "... above this share of answers ended by max_tokens"),
    "health_empty": Switch(0.05, "... above this share of empty answers"),
    "health_option_mass": Switch(0.5, "... below this mean probability on the options"),
    "health_failed": Switch(0, "... above this number of failed answers"),
}
META = {"title", "seed", "benchmarks", "notes", "revisions", "defaults", "name"}


def names() -> list[str]:
    """The shipped recipes, the default first."""
    found = sorted(p.name[:-5] for p in resources.files("evalkit").joinpath("recipes").iterdir()
                   if p.name.endswith(".toml"))
    return sorted(found, key=lambda name: name != DEFAULT)


def load(name: str) -> Recipe:
    """The recipe called `name`, or the one in the file `name` (`.toml`). InputError names file, switch and value."""
    path = Path(name)
    if name.endswith(".toml"):
        if not path.is_file():
            raise InputError(f"recipe file {name} does not exist")
        text, where, name = path.read_text(encoding="utf-8"), name, path.stem
    elif name in names():
        text = resources.files("evalkit").joinpath("recipes", f"{name}.toml").read_text(encoding="utf-8")
        where = f"recipe {name}"
    else:
        raise UnknownName("recipe", name, names(), "`evalkit recipes` lists them; a file ends in .toml")
    try:
        return _build(name, tomllib.loads(text), where)
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{where}: not valid TOML: {error}") from None


def _build(name: str, data: dict[str, Any], where: str) -> Recipe:
    defaults = data.get("defaults", {})
    columns = []
    for benchmark, table in data.items():
        if benchmark in META:
            continue
        if not isinstance(table, dict) or not isinstance(table.get("columns"), dict):
            raise UnknownName("key", benchmark, META, f"{where}: a benchmark is a table with [NAME.columns.COLUMN]")
        shared = {k: v for k, v in table.items() if k not in ("columns", "task")}
        for column, own in table["columns"].items():
            chosen = {**defaults, **shared, **{k: v for k, v in own.items() if k != "header"}}
            switches = switch_values(chosen, f"{where}, {column}") | {"benchmark": benchmark}
            columns.append(Column(column, benchmark, own.get("header", column), table.get("task", benchmark), switches))
    if not columns:
        raise InputError(f"{where}: no columns; a benchmark is a table with [NAME.columns.COLUMN]")
    listed = data.get("benchmarks", list(dict.fromkeys(c.benchmark for c in columns)))
    for benchmark in listed:
        if benchmark not in {c.benchmark for c in columns}:
            raise UnknownName("benchmark", benchmark, {c.benchmark for c in columns}, f"{where}: benchmarks")
    return Recipe(name, data.get("title", name), tuple(columns), tuple(listed), int(data.get("seed", 42)),
                  tuple(data.get("notes", ())), data.get("revisions", {}))


def switch_values(chosen: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Every switch with its value: `chosen` over the defaults, each checked for name, type and choice."""
    values = {key: switch.default for key, switch in SWITCHES.items()}
    for key, value in chosen.items():
        if key not in SWITCHES:
            raise UnknownName("switch", key, SWITCHES, where)
        values[key] = _checked(key, value, where)
    return values


def _checked(key: str, value: Any, where: str) -> Any:
    switch = SWITCHES[key]
    if isinstance(switch.default, float) and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if switch.choices and value not in switch.choices:
        raise InputError(f"{where}: {key} = {value!r}: must be one of {', '.join(map(str, switch.choices))}")
    if type(value) is not type(switch.default):
        raise InputError(f"{where}: {key} = {value!r}: must be a {type(switch.default).__name__}")
    if isinstance(value, (int, float)) and value < 0:
        raise InputError(f"{where}: {key} = {value!r}: must not be negative")
    return value


def with_sets(recipe: Recipe, sets: Sequence[str]) -> Recipe:
    """`recipe` with `COLUMN_OR_BENCHMARK.SWITCH=VALUE` overrides; `changed` keeps them as given."""
    columns = {column.name: column for column in recipe.columns}
    for item in sets:
        target, _, rest = item.partition(".")
        key, equals, raw = rest.partition("=")
        if not equals:
            raise InputError(f"--set {item}: the form is COLUMN_OR_BENCHMARK.SWITCH=VALUE")
        hit = [c for c in columns.values() if target in (c.name, c.benchmark, "all")]
        if not hit:
            raise UnknownName("column or benchmark", target, {*columns, *(c.benchmark for c in columns.values())})
        if key not in SWITCHES:
            raise UnknownName("switch", key, SWITCHES, f"--set {item}")
        for column in hit:
            value = _checked(key, _parse(raw, SWITCHES[key].default), f"--set {item}")
            columns[column.name] = replace(column, switches={**column.switches, key: value})
    return replace(recipe, columns=tuple(columns.values()), changed=(*recipe.changed, *sets))


def _parse(raw: str, default: Any) -> Any:
    if isinstance(default, str):
        return raw
    try:
        return tomllib.loads(f"value = {raw}")["value"]
    except tomllib.TOMLDecodeError:
        return raw


def with_tasks(recipe: Recipe, tasks: Sequence[Task]) -> Recipe:
    """`recipe` with a column for each of a user's tasks, after its own; they are not in Average."""
    columns = list(recipe.columns)
    base = {k: v for k, v in columns[0].switches.items() if k in ("bos", "over_context")}
    for task in tasks:
        if task.name in {name for c in columns for name in (c.name, c.benchmark)}:
            raise InputError(f"task {task.name!r}: recipe {recipe.name} has a column or benchmark of that name")
        switches = switch_values({**base, **task.switches}, f"task {task.name}") | {"benchmark": task.name}
        columns.append(Column(task.name, task.name, task.header or task.name, task.name, switches))
    return replace(recipe, columns=tuple(columns))


def select(recipe: Recipe, wanted: str) -> tuple[Column, ...]:
    """The columns named by `wanted`: `all`, columns and benchmarks, separated by commas; in the recipe's order."""
    known = {name for c in recipe.columns for name in (c.name, c.benchmark)}
    asked = [part.strip() for part in wanted.split(",") if part.strip()]
    for name in asked:
        if name != "all" and name not in known:
            raise UnknownName("task", name, known, "`evalkit tasks` lists columns and benchmarks")
    if not asked:
        raise InputError("--tasks is empty; `evalkit tasks` lists columns and benchmarks")
    return tuple(c for c in recipe.columns if "all" in asked or c.name in asked or c.benchmark in asked)


def flat(recipe: Recipe) -> dict[str, Any]:
    """`column.switch` -> value, for `recipes show` and `recipes diff`."""
    return {f"{c.name}.{key}": value for c in recipe.columns for key, value in c.switches.items()
            if key != "benchmark"}
