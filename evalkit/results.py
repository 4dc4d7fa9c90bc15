"""Completions -> Scores -> Metrics -> table: all that follows from a run folder's answers, again and again.

    StoredAnswers -> run_programs -> score_column -> measure -> write      (the runner calls them in this order)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from evalkit import judge as judging
from evalkit import report, rescore, scoring
from evalkit.plan import ColumnPlan, Plan
from evalkit.progress import bar
from evalkit.sandbox import Program, Sandbox, Verdict
from evalkit.scoring import code, pairwise
from evalkit.store import RunFolder
from evalkit.types import Column, Completion, Metric, Sample, Score

Answers = Mapping[str, Sequence[Completion]]  # sample id -> its completions by index


class StoredAnswers(Mapping[str, list[Completion]]):
    """A column's answers by sample, from the disk when asked for; one that is missing stands as an error, never as an
    empty answer."""

    def __init__(self, folder: RunFolder, column: str, keys: Mapping[str, Sequence[str]]) -> None:
        self._found, self._keys = folder.completions(column), keys

    def __getitem__(self, sample: str) -> list[Completion]:
        return [self._found.get(key) or Completion(key, finish="error", error="no answer in the run folder")
                for key in self._keys[sample]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)


def run_programs(plan: Plan, answers: Mapping[str, Answers]) -> tuple[dict[str, dict[str, Verdict]], str]:
    """Column -> program id -> verdict, the code of all columns in one sandbox; and a note on how it was held."""
    programs: list[Program] = []
    owner: dict[str, tuple[str, str]] = {}
    for column in plan.columns:
        name = column.column.name
        for sample in column.samples if column.writer.task.kind == "code" else ():
            for program in code.programs(sample, answers[name][sample.id], column.column.switches):
                owner[f"{name}/{program.id}"] = (name, program.id)
                programs.append(replace(program, id=f"{name}/{program.id}"))
    verdicts: dict[str, dict[str, Verdict]] = {}
    if not programs:
        return verdicts, ""
    with Sandbox(plan.spec.sandbox) as sandbox:
        for verdict in bar(sandbox.run(programs), len(programs), "run code", "programs"):
            name, program_id = owner[verdict.id]
            verdicts.setdefault(name, {})[program_id] = replace(verdict, id=program_id)
        return verdicts, f"code ran in: {', '.join(sandbox.layers)}"


def score_column(column: ColumnPlan, answers: Answers, verdicts: Mapping[str, Verdict],
                 pairs: Mapping[str, judging.Pair]) -> list[Score]:
    switches, kind = column.column.switches, column.writer.task.kind
    if kind == "code":
        return [code.score(s, answers[s.id], verdicts, switches) for s in column.samples]
    if kind == "pairwise":
        return [pairwise.score(s, answers[s.id][0], pairs[s.id].verdict if s.id in pairs else "")
                for s in column.samples]
    return [scoring.score_sample(kind, s, answers[s.id], switches) for s in column.samples]


def measure(column: ColumnPlan, scores: Sequence[Score], answers: Answers, marks: tuple[str, ...]) -> Metric:
    """The column's cell, marked when it holds only a part of the recipe's samples."""
    by_group = column.column.switches["average"] == "groups"
    groups = len({s.group for s in column.samples}) if by_group else 0
    part = report.partial_mark(len(column.samples), column.n_draw, groups, column.n_groups if by_group else 0)
    completions = (c for own in answers.values() for c in own)
    return report.metric(column.column, scores, completions, len(column.samples), (*((part,) if part else ()), *marks))


def compare_rules(
    folder: RunFolder, rules: Sequence[str]
) -> Iterator[tuple[str, dict[str, float | None], dict[str, Any]]]:
    """(column, rule -> value, sample -> rule -> verdict where they differ) of a run's stored answers, without its
    data or model; columns whose answers are not read by a rule (code, pairwise) are left out."""
    for known in folder.read_json("run.json")["recipe"]["columns"]:
        column = Column(known["name"], known["benchmark"], known["header"], known["task"], known["switches"])
        names = rescore.rule_names(known["kind"], column.benchmark)
        if not names:
            continue
        found, samples, answers = folder.completions(column.name), [], {}
        for line in folder.lines(column.name, "requests"):
            samples.append(Sample(line["sample"], line["fields"], tuple(line["target"]), tuple(line["options"]),
                                  line["group"]))
            missing = Completion(line["key"], finish="error", error="no answer in the run folder")
            answers[line["sample"]] = [found.get(line["key"], missing)]
        own = [name for name in rules or names if name in names]
        compared = rescore.score_answers(known["kind"], column, samples, answers, own)
        values = {rule: report.metric(column, scores, [], len(samples)).value
                  for rule, scores in compared.scores.items()}
        changed = {row[0].sample: {rule: {"value": s.value, "answer": s.answer}
                                   for rule, s in zip(own, row, strict=True)} for row in compared.changed}
        yield column.name, values, changed


def write(plan: Plan, folder: RunFolder, metrics: Mapping[str, Metric], run: dict[str, Any]) -> str:
    """metrics.json and table.md of a scored run; returns the table as printed at its end."""
    average = report.average(metrics, plan.recipe.columns, plan.recipe.benchmarks)
    folder.write_json("metrics.json", report.metrics_to_json(metrics, average))
    whole = {**run, "metrics": report.metrics_to_json(metrics, average)}
    folder.write("table.md", [report.render(report.table_from_runs([whole]), "md")])
    return report.render_run(whole)

