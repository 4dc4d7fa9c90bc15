"""The spine: Row -> Sample -> Prompt -> Request -> Completion -> Score -> Metric -> Table. Nothing else knows it.

    outcome = run(RunSpec(model="smollm2-135m-instruct", tasks="gsm", data="sample", limit=6))
    outcome.folder, outcome.table, outcome.failed
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from evalkit import engines, environment, lint, plan, pool, results, store
from evalkit import judge as judging
from evalkit.errors import EngineError, InputError, RunError
from evalkit.plan import Plan
from evalkit.progress import say
from evalkit.store import RunFolder
from evalkit.types import RunSpec


@dataclass(frozen=True, slots=True)
class Outcome:
    folder: str
    table: str
    failed: int  # completions or samples without a value
    unhealthy: int  # cells with a mark of ill health


def run(spec: RunSpec) -> Outcome:
    """Plan, ask, score, report. InputError: nothing was asked and no folder made."""
    return start(make(spec))


def run_all(specs: Sequence[RunSpec]) -> Iterator[Outcome]:
    """Several models one after the other, each with its own engine and folder. What is wrong with any is found before
    the first is asked; an engine that dies is told and does not keep the others from their turn."""
    plans = [make(spec) for spec in specs]
    places = [planned.folder_name for planned in plans]
    if specs[0].name and (twice := [place for place in places if places.count(place) > 1]):
        raise InputError(f"--name {specs[0].name}: two of the models have their results in {twice[0]}; run them apart")
    while plans:
        model = plans[0].spec.model
        try:
            yield start(plans.pop(0))
        except EngineError as error:
            if len(specs) == 1:
                raise
            say(f"evalkit: {model}: {error}")


def make(spec: RunSpec, new: bool = True) -> Plan:
    """The plan of `spec`, with all checks made that need no engine."""
    judging.parse(spec.judge)
    engines.prepare(spec.engine)
    planned = plan.make(spec)
    if new and "reuse" in spec.options:
        environment.check_reuse(spec.options["reuse"], planned)
    return planned


def start(planned: Plan) -> Outcome:
    """Work through `planned` in a new folder."""
    spec = planned.spec
    for path in environment.unfinished(Path(spec.out) / planned.folder_name, spec):
        say(f"an equal run stands unfinished; to go on with it instead: {store.resume_command(path)}")
    run_json = environment.describe(planned)
    folder = store.create(spec.out, planned.folder_name, spec.name or environment.run_name(spec))
    with folder, _ended_early(folder, run_json, new=True):
        return work(planned, folder, run_json)


def resume(path: str) -> Outcome:
    """Go on with the run in `path`, asking only what has no answer yet."""
    folder = store.open_run(path)
    return go_on(make(environment.spec_of(folder.read_json("run.json"), path), new=False), folder)


def go_on(planned: Plan, folder: RunFolder) -> Outcome:
    with folder:
        before = folder.read_json("run.json")
        environment.compare(before, planned, say)
        run_json = environment.describe(planned) | {"time": before["time"], "engine": before.get("engine", {})}
        with _ended_early(folder, run_json):
            return work(planned, folder, run_json)


def work(planned: Plan, folder: RunFolder, run_json: dict[str, Any]) -> Outcome:
    """Ask what is open, judge, run code, score, write."""
    watch = environment.Stopwatch()
    run_json["time"].setdefault("sessions", []).append(watch.session)
    folder.write_json("run.json", run_json)
    todo = pool.requests(planned, folder)
    pairwise = [c for c in planned.columns if c.writer.task.kind == "pairwise" and c.samples]
    watch.lap("plan")
    with contextlib.closing(results.Programs(planned, todo.keys)) as programs:
        with contextlib.closing(pool.Session(planned, folder, todo)) as session:
            pool.ask(session, planned, folder, todo, programs.see)
            answers = {name: results.StoredAnswers(folder, name, keys) for name, keys in todo.keys.items()}
            judge = judging.create(planned, session, folder, session.length) if pairwise else None
            pairs = {c.column.name: judging.compare(judge, c, planned.source, answers[c.column.name], folder)
                     for c in pairwise if judge is not None}
        watch.lap("ask")
        watch.session |= {"load_s": session.load_s, **todo.counts}
        verdicts = programs.verdicts(answers)
    metrics = {}
    for column in planned.columns:
        name = column.column.name
        scores = results.score_column(column, answers[name], verdicts.get(name, {}), pairs.get(name, {}))
        marks = (judge.mark,) if judge is not None and judge.mark and name in pairs else ()
        metrics[name] = results.measure(column, scores, answers[name], marks)
        folder.write_lines(name, "scores", map(store.score_record, scores))
    watch.lap("score")
    failed = sum(m.health.failed for m in metrics.values())
    run_json |= {
        "status": "failed" if failed else "done",
        "engine": dict(session.settings) or run_json.get("engine", {}),
        "data": environment.data_record(planned),
        "lint": [asdict(finding) for finding in todo.lint],
        "notes": [*planned.notes, *lint.notes(todo.lint), *filter(None, [programs.note])],
    }
    folder.write_json("run.json", run_json)
    table = results.write(planned, folder, metrics, run_json)
    unhealthy = sum(any("unhealthy" in mark for mark in m.marks) for m in metrics.values())
    return Outcome(str(folder.path), table, failed, unhealthy)


@contextlib.contextmanager
def _ended_early(folder: RunFolder, run_json: dict[str, Any], new: bool = False) -> Iterator[None]:
    """Whatever ends a run early stands in run.json, and how to go on is said; a new run refused leaves no folder."""
    try:
        yield
    except BaseException as error:
        refused = getattr(error, "exit_code", 1) == 2 and not any(folder.path.glob("*.completions.jsonl"))
        if new and (refused or not (folder.path / "run.json").is_file()):
            environment.discard(folder.path, error)
            raise
        run_json |= {"status": "stopped" if isinstance(error, Exception) else "interrupted", "error": str(error)}
        with contextlib.suppress(RunError):
            folder.write_json("run.json", run_json)
        say(f"to go on with this run: {store.resume_command(folder.path)}")
        raise
