"""Pairwise judging: is the model's text better than the baseline's? One interface, two judges.

    {"sample": "alpaca_farm_evaluation/eval/0", "a": "baseline", "label": "B", "verdict": "model", ...}

`self` asks the evaluated model for one label by `Choose`, so that each pair has a verdict; the cell is then marked
"self-judged". `openai:MODEL@URL` asks a chat endpoint (key: OPENAI_API_KEY). Which text is (A) is a hash of the id.
Replies are journaled as they come, so that a run gone on with pays for none twice.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import takewhile
from typing import Any, Protocol, TypeVar

from evalkit.data import Source
from evalkit.endpoint import Endpoint, Refused, at_once
from evalkit.engines import Engine
from evalkit.errors import DataError, EngineError, InputError
from evalkit.plan import ColumnPlan, Plan
from evalkit.progress import bar
from evalkit.prompts import Writer, request_key
from evalkit.store import RunFolder
from evalkit.types import Choose, Completion, Loader, Message, Prompt, Request

LABELS = ("A", "B")
TEMPLATE = (
    "Two assistants were given the same instruction. Compare their outputs and say which one is better: more "
    "helpful, more correct, and closer to what was asked.\n\n"
    "[Instruction]\n{instruction}\n\n[Output A]\n{a}\n\n[Output B]\n{b}\n\n"
    "Which output is better, A or B? Answer with the letter only."
)
PREFILL = "The better output is:"
AT_ONCE = 8  # requests to an endpoint at a time
REPLY = 8  # tokens of its reply at most

Asked = TypeVar("Asked")


@dataclass(frozen=True, slots=True)
class Pair:
    """One comparison and, once judged, its label and verdict (`model`, `baseline`, `draw`; `unparsed` has none)."""

    sample: str
    instruction: str
    model: str
    baseline: str
    a: str  # whose text stands as (A): model or baseline
    cut: bool = False  # the texts were cut to fit the judge's context
    label: str = ""
    verdict: str = ""

    def prompt(self) -> str:
        a, b = (self.model, self.baseline) if self.a == "model" else (self.baseline, self.model)
        return TEMPLATE.format(instruction=self.instruction, a=a, b=b)

    def judged(self, label: str) -> Pair:
        other = {"model": "baseline", "baseline": "model"}[self.a]
        return replace(self, label=label, verdict={"A": self.a, "B": other}.get(label, "unparsed"))


class Judge(Protocol):
    name: str
    mark: str  # what the cell is marked with

    def judge(self, pairs: Sequence[Pair]) -> Iterator[Pair]: ...


def pairs(column: ColumnPlan, load: Loader, answers: Mapping[str, Sequence[Completion]]) -> list[Pair]:
    """The comparisons of a column's answers, error answers left out. DataError for an item without a baseline."""
    find = column.writer.task.references
    if find is None:
        raise DataError(f"task {column.column.task}: kind pairwise needs `references`")
    references, found = find(load), []
    for sample in column.samples:
        instruction = sample.fields["instruction"]
        baseline = references.get(instruction.strip())
        if baseline is None:
            raise DataError(f"{sample.id}: no baseline output has its instruction; the references are of another set")
        for answer in answers.get(sample.id, ()):
            if answer.finish != "error":
                first = "model" if hashlib.sha256(sample.id.encode()).digest()[0] % 2 else "baseline"
                pair = Pair(sample.id, instruction, answer.text, baseline, first)
                found.append(replace(pair, verdict="draw") if answer.text == baseline else pair)
    return found


class SelfJudge:
    """The evaluated model as judge: prompts in its own chat format through the run's engine."""

    name, mark = "self", "self-judged"

    def __init__(self, writer: Writer, identity: str, limit: int, engine: Engine, folder: RunFolder) -> None:
        assert writer.tokenizer is not None
        self._writer, self._identity, self._limit, self._engine = writer, identity, limit, engine
        self._tokenizer, self._folder, self._column = writer.tokenizer, folder, journal(writer.column.name)
        options = self._tokenizer.option_ids(LABELS, "after-blank")[0]
        self._ask = Choose(options)

    def judge(self, pairs: Sequence[Pair]) -> Iterator[Pair]:
        waiting: dict[str, list[Pair]] = {}
        requests = {}
        for pair in pairs:
            fitted, tokens = self._fit(pair)
            key = request_key(self._identity, tokens, self._ask, 0)
            requests[key] = Request(key, self._column, pair.sample, 0, tokens, self._ask)
            waiting.setdefault(key, []).append(fitted)
        for completion in _kept(self._folder, self._column, requests, self._engine.complete):
            best = max(range(len(completion.logprobs)), key=lambda i: (completion.logprobs[i], -i), default=None)
            label = "" if best is None else LABELS[best]
            yield from (pair.judged(label) for pair in waiting[completion.key])

    def _fit(self, pair: Pair) -> tuple[Pair, Any]:
        """The pair and its tokens, each text cut to an equal share of the context where they are too long."""
        tokens = self._tokens(pair)
        if len(tokens) < self._limit:
            return pair, tokens
        frame = len(self._tokens(replace(pair, instruction="", model="", baseline="")))
        share = max(1, (self._limit - frame - 32) // 3)
        texts = {name: self._tokenizer.cut(getattr(pair, name), share, bos=False)
                 for name in ("instruction", "model", "baseline")}
        cut = replace(pair, cut=True, **texts)
        return cut, self._tokens(cut)

    def _tokens(self, pair: Pair) -> Any:
        text = self._writer.text(Prompt((Message("user", pair.prompt()),), PREFILL))
        return self._tokenizer.encode(text, bos=self._writer.column.switches["bos"] == "tokenizer")


class EndpointJudge:
    """An OpenAI-compatible chat endpoint, asked greedily. EngineError when it can't be asked; what it said is kept."""

    mark = ""

    def __init__(self, model: str, url: str, column: str, folder: RunFolder) -> None:
        self.name = f"openai:{model}@{url}"
        self._model, self._column, self._folder = model, journal(column), folder
        self._server = Endpoint(url, timeout=120.0)

    def judge(self, pairs: Sequence[Pair]) -> Iterator[Pair]:
        waiting: dict[str, list[Pair]] = {}
        bodies: dict[str, tuple[str, dict[str, Any]]] = {}
        for pair in pairs:
            body = {"model": self._model, "messages": [{"role": "user", "content": pair.prompt()}], "temperature": 0,
                    "max_tokens": REPLY}
            key = hashlib.sha256(json.dumps([self.name, body]).encode()).hexdigest()
            bodies[key] = (key, body)
            waiting.setdefault(key, []).append(pair)
        try:
            for reply in _kept(self._folder, self._column, bodies, self._complete):
                yield from (pair.judged(label_of(reply.text)) for pair in waiting[reply.key])
        finally:
            self._server.close()

    def _complete(self, bodies: Iterable[tuple[str, dict[str, Any]]]) -> Iterator[Completion]:
        """The replies. Once one is refused no more is asked, but those on their way are waited for: they are paid."""
        refused: list[str] = []
        for reply in at_once(takewhile(lambda _: not refused, bodies), self._reply, AT_ONCE):
            if not reply.error:
                yield reply
            else:
                refused.append(reply.error)
                self._server.close()
        if refused:
            raise EngineError(f"--judge {self.name}: {refused[0]}")

    def _reply(self, keyed: tuple[str, dict[str, Any]]) -> Completion:
        key, body = keyed
        try:
            text = self._server.ask("/chat/completions", body)["choices"][0]["message"]["content"]
        except Refused as fault:
            return Completion(key, finish="error", error=str(fault))
        except (LookupError, TypeError):
            text = None
        if not isinstance(text, str):
            return Completion(key, finish="error", error="its answer has no choice with a message")
        return Completion(key, text)


def label_of(reply: str) -> str:
    """`A`, `(B).` or `B) it is clearer` -> the letter; empty where the reply names none."""
    said = reply.strip().strip("()[].\"'").upper()
    return said[:1] if said in LABELS or said[:2] in ("A)", "B)", "A.", "B.") else ""


def journal(column: str) -> str:
    """The name under which the replies about a column's answers are kept."""
    return f"{column}.judge"


def _kept(folder: RunFolder, column: str, asked: Mapping[str, Asked],
          ask: Callable[[Iterable[Asked]], Iterator[Completion]]) -> Iterator[Completion]:
    """The answers to what is asked, by key: those in the journal, then the others, journaled as they come."""
    known = folder.completions(column)
    have = [key for key in asked if known.has(key)]
    yield from (known[key] for key in have)
    answers: Any = ask([item for key, item in asked.items() if not known.has(key)])
    with contextlib.closing(answers) as fresh:
        for completion in fresh:
            folder.append(column, completion)
            yield completion


def create(plan: Plan, engine: Engine | None, folder: RunFolder, length: int) -> Judge:
    """The judge that `plan.spec.judge` names; `self` asks `engine`, whose length is `length` tokens."""
    model, url = parse(plan.spec.judge)
    column = next(c for c in plan.columns if c.writer.task.kind == "pairwise")
    if url:
        return EndpointJudge(model, url, column.column.name, folder)
    assert engine is not None
    return SelfJudge(column.writer, ":".join(plan.parts.values()), length, engine, folder)


def compare(judge: Judge, column: ColumnPlan, source: Source, answers: Mapping[str, Sequence[Completion]],
            folder: RunFolder) -> dict[str, Pair]:
    """Every pair of a column, judged, by sample; written to <column>.pairs.jsonl as well."""
    found = pairs(column, partial(source.rows, task=column.column.task), answers)
    done = {pair.sample: pair for pair in found if pair.verdict}
    todo = [pair for pair in found if not pair.verdict]
    for pair in bar(judge.judge(todo), len(todo), "judge", "pairs"):
        done[pair.sample] = pair
    folder.write_lines(column.column.name, "pairs", (asdict(done[s.id]) for s in column.samples if s.id in done))
    return done


def parse(spec: str) -> tuple[str, str]:
    """`self` -> ("", ""); `openai:MODEL@URL` -> (MODEL, URL). InputError for another form."""
    if spec == "self":
        return "", ""
    kind, _, rest = spec.partition(":")
    model, _, url = rest.partition("@")
    if kind != "openai" or not model or not url.startswith(("http://", "https://")):
        raise InputError(f"--judge {spec!r}: the forms are self and openai:MODEL@URL")
    return model, url

