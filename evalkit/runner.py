"""The spine: Row -> Sample -> Prompt -> Request -> Completion -> Score -> Metric -> Table. Nothing else knows it.

    outcome = run(RunSpec(model="smollm2-135m-instruct", tasks="gsm", data="sample", limit=6))
    outcome.folder, outcome.table, outcome.failed
"""

from __future__ import annotations

import shutil
import time
from dataclasses import asdict, dataclass
from typing import Any

from evalkit import engines, environment, lint, plan, pool, results, store
from evalkit import judge as judging
from evalkit.errors import EngineError, InputError
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
    judging.parse(spec.judge)
    engines.prepare(spec.engine)
    planned = plan.make(spec)
    folder = store.create(spec.out, planned.folder_name, spec.name or environment.run_name(spec))
    with folder:
        try:
            return work(planned, folder, environment.describe(planned))
        except (InputError, EngineError) as error:
            if error.exit_code == 2 and not any(folder.path.glob("*.completions.jsonl")):
                shutil.rmtree(folder.path)
            raise


def resume(path: str) -> Outcome:
    """Go on with the run in `path`, asking only what has no answer yet."""
    folder = store.open_run(path)
    before = folder.read_json("run.json")
    spec = environment.spec_of(before, path)
    engines.prepare(spec.engine)
    planned = plan.make(spec)
    with folder:
        environment.compare(before, planned, say)
        return work(planned, folder, {**environment.describe(planned), "resumed_from": before["time"]})


def work(planned: Plan, folder: RunFolder, run_json: dict[str, Any]) -> Outcome:
    """Ask what is open, judge, run code, score, write."""
    folder.write_json("run.json", run_json)
    todo = pool.requests(planned, folder)
    open_requests = pool.unanswered(todo, folder)
    pairwise = [c for c in planned.columns if c.writer.task.kind == "pairwise" and c.samples]
    engine = pool.start(planned, folder, todo) if open_requests or (pairwise and planned.self_judged) else None
    loaded = time.time()
    try:
        if engine is not None:
            pool.ask(engine, open_requests, folder, todo)
        answers = {c.column.name: results.read_answers(folder, c, todo.keys[c.column.name]) for c in planned.columns}
        judge = judging.create(planned, engine, folder, todo.length) if pairwise else None
        pairs = {c.column.name: judging.compare(judge, c, planned.source, answers[c.column.name], folder)
                 for c in pairwise if judge is not None}
    finally:
        if engine is not None:
            engine.close()
    asked = time.time()
    verdicts, note = results.run_programs(planned, answers)
    metrics = {}
    for column in planned.columns:
        name = column.column.name
        scores = results.score_column(column, answers[name], verdicts.get(name, {}), pairs.get(name, {}))
        marks = (judge.mark,) if judge is not None and judge.mark and name in pairs else ()
        metrics[name] = results.measure(column, scores, answers[name], marks)
        folder.write_lines(name, "scores", map(store.score_record, scores))
    failed = sum(m.health.failed for m in metrics.values())
    run_json |= {
        "status": "failed" if failed else "done",
        "engine": dict(engine.settings) if engine is not None else run_json.get("engine", {}),
        "data": environment.data_record(planned),
        "lint": [asdict(finding) for finding in todo.lint],
        "notes": [*planned.notes, *lint.notes(todo.lint), *([note] if note else [])],
        "time": {**run_json["time"], "loaded": loaded, "asked": asked, "ended": time.time()},
    }
    folder.write_json("run.json", run_json)
    table = results.write(planned, folder, metrics, run_json)
    return Outcome(str(folder.path), table, failed, sum(any("unhealthy" in x for x in m.marks) for m in metrics.values()))
