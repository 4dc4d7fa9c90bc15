"""`evalkit tasks check DIR`: a task on its own sample rows, every target fed back as the answer, must score 100.

    riddles  24 samples, 3 groups, prompts of 1 column rendered, targets fed back: 100.0
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from evalkit import plan, recipes, scoring, tasks
from evalkit.plan import ColumnPlan
from evalkit.sandbox import Sandbox
from evalkit.scoring import code
from evalkit.types import Completion, RunSpec, Sample, Score


def perfect(sample: Sample, kind: str, n: int = 1) -> list[Completion]:
    """The answers that a model which knows the target would give."""
    if kind == "choice":
        logprobs = tuple(-0.1 if label in sample.target else -5.0 for label in sample.options)
        return [Completion("", logprobs=logprobs, finish="choice")]
    return [Completion("", f" {sample.target[0]}" if kind != "code" else sample.target[0], finish="stop")] * n


def score_targets(column: ColumnPlan) -> list[Score]:
    """The scores of a column's samples when each is answered with its own target."""
    kind, switches = column.writer.task.kind, column.column.switches
    answers = {s.id: perfect(s, kind, switches["samples"]) for s in column.samples}
    if kind != "code":
        return [scoring.score_sample(kind, s, answers[s.id], switches) for s in column.samples]
    programs = [p for s in column.samples for p in code.programs(s, answers[s.id], switches)]
    with Sandbox("process") as sandbox:
        verdicts = {verdict.id: verdict for verdict in sandbox.run(programs)}
    return [code.score(s, answers[s.id], verdicts, switches) for s in column.samples]


def check_tasks(folder: Path) -> int:
    """Check every task in `folder` and print a line each; 1 when one does not hold, 0 else."""
    shipped = folder.resolve() == tasks.home().resolve()
    names = tasks.find(folder)
    spec = RunSpec(model="tulu-7b", format="tulu", tokenizer="none", data="sample",
                   tasks_dir="" if shipped else str(folder))
    code = 0
    recipe = recipes.with_tasks(recipes.load(spec.recipe), plan.all_tasks(spec.tasks_dir)[1])
    for name, where in names.items():
        own = tasks.load(where).name
        columns = [c.name for c in recipe.columns if c.task == own]
        planned = plan.make(replace(spec, tasks=",".join(columns)), weights=False)
        problems = _problems(planned.columns)
        n = len(planned.columns[0].samples)
        groups = len({s.group for s in planned.columns[0].samples})
        told = "; ".join(problems) or "every target, fed back as the answer, scores 100"
        print(f"{name}: {n} samples in {groups} groups, {len(columns)} columns: {told}")
        code = max(code, bool(problems))
    return code


def _problems(columns: Sequence[ColumnPlan]) -> list[str]:
    found = []
    for column in columns:
        ids = [s.id for s in column.samples]
        if len(set(ids)) < len(ids):
            found.append(f"{column.column.name}: ids are not unique: {next(i for i in ids if ids.count(i) > 1)}")
        texts = [item.text for item in plan.rendered(column)]
        if not all(texts):
            found.append(f"{column.column.name}: an empty prompt: {ids[texts.index('')]}")
        if column.writer.task.kind == "pairwise":
            continue
        for score in score_targets(column):
            if score.value != 1.0:
                found.append(f"{column.column.name}: {score.sample}: its target scores {score.value}, read as "
                             f"{score.answer!r} {' '.join(score.verdicts)}".rstrip())
                break
    return found
