"""Completions -> Scores -> Metrics -> table: all that follows from a run folder's answers, again and again.

    StoredAnswers, Programs -> score_column -> measure -> write      (the runner calls them in this order)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from evalkit import judge as judging
from evalkit import report, rescore, scoring
from evalkit.plan import ColumnPlan, Plan
from evalkit.progress import bar
from evalkit.sandbox import Sandbox, Verdict
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


class Programs:
    """Runs the code of answers as they come, while the engine goes on; verdicts by column and program id.

    Made before the engine, so that a machine whose sandbox lacks a layer is refused before anything is asked; its
    workers start with the first program, after the engine has forked what it forks.
    """

    def __init__(self, plan: Plan, keys: Mapping[str, Mapping[str, Sequence[str]]]) -> None:
        self._columns = {c.column.name: c for c in plan.columns if c.writer.task.kind == "code" and c.samples}
        self._level, self.note = plan.spec.sandbox, ""
        self._open: dict[str, tuple[str, str]] = {}  # program id in the sandbox -> column, program id
        self._done: set[str] = set()
        self._sandbox: Sandbox | None = None
        self._wanted: dict[str, list[tuple[str, Sample, int]]] = {}  # key -> column, sample, index
        for name, column in self._columns.items():
            for sample in column.samples:
                for index, key in enumerate(keys[name][sample.id]):
                    self._wanted.setdefault(key, []).append((name, sample, index))
        if self._columns:
            with Sandbox(self._level, workers=1) as probe:
                self.note = f"code ran in: {', '.join(probe.layers)}"

    def see(self, completion: Completion) -> None:
        """Submit the program of an answer, if it is one of a code column."""
        for name, sample, index in self._wanted.get(completion.key, ()):
            for program in code.programs(sample, [completion], self._columns[name].column.switches):
                own = f"{sample.id}#{index}"
                if self._sandbox is None:
                    self._sandbox = Sandbox(self._level)
                self._open[f"{name}/{own}"] = (name, own)
                self._sandbox.submit(replace(program, id=f"{name}/{own}"))
                self._done.add(completion.key)

    def verdicts(self, answers: Mapping[str, Answers]) -> dict[str, dict[str, Verdict]]:
        """All verdicts, once those of answers that stood in the journal before are there too."""
        for name, column in self._columns.items():
            for sample in column.samples:
                for completion in answers[name][sample.id]:
                    if completion.key not in self._done and completion.finish != "error":
                        self.see(completion)
        found: dict[str, dict[str, Verdict]] = {}
        if self._sandbox is not None:
            for verdict in bar(self._sandbox.results(wait=True), len(self._open), "run code", "programs"):
                name, own = self._open[verdict.id]
                found.setdefault(name, {})[own] = replace(verdict, id=own)
        return found

    def close(self) -> None:
        if self._sandbox is not None:
            self._sandbox.close()


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

