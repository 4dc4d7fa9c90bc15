"""What is asked and in which order, all columns pooled; and asking it, each answer journaled as it comes.

    todo = requests(plan, folder)       # writes <column>.requests.jsonl
    ask(session, plan, folder, todo, see)

Memory holds keys and places; the requests wait on disk, and the engine pulls a bounded number at a time.
"""

from __future__ import annotations

import os
import pickle
import tempfile
import time
import weakref
from array import array
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field, replace
from io import FileIO
from itertools import chain
from pathlib import Path
from typing import Any

from evalkit import engines, store
from evalkit import judge as judging
from evalkit.engines import Engine
from evalkit.errors import EngineError, EvalkitError, RunError
from evalkit.lint import Finding, Linter, allowed, refuse
from evalkit.plan import ColumnPlan, Plan
from evalkit.progress import bar, say
from evalkit.store import Completions, RunFolder
from evalkit.types import Completion, Generate, Request

RETRIES = 2  # times that a failed request is asked again within a run
HELD = 64  # failed requests that wait for their next try at most


class Requests:
    """Requests by number, in a file without a name beside the run's own: it goes with the process."""

    def __init__(self, home: Path) -> None:
        self._file: FileIO = tempfile.TemporaryFile(dir=home, buffering=0)  # noqa: SIM115 (closed with this)
        self._at = array("Q", [0])
        self.cost = array("i")  # new tokens at most; 0 for a choice
        weakref.finalize(self, self._file.close)

    def append(self, request: Request) -> None:
        """OSError where the disk is full."""
        data = pickle.dumps(request, pickle.HIGHEST_PROTOCOL)
        store.write_whole(self._file, data)
        self._at.append(self._at[-1] + len(data))
        self.cost.append(request.ask.max_tokens if isinstance(request.ask, Generate) else 0)

    def read(self, numbers: Iterable[int]) -> Iterator[Request]:
        for number in numbers:
            at, end = self._at[number:number + 2]
            request: Request = pickle.loads(os.pread(self._file.fileno(), end - at, at))
            yield request


@dataclass(slots=True)
class Work:
    """All that a run asks. Equal keys are asked once, whichever samples and columns want them."""

    requests: Requests
    wanted: dict[str, tuple[str, ...]] = field(default_factory=dict)  # key, as numbered -> columns that want its answer
    parts: list[range] = field(default_factory=list)  # the numbers that each column was the first to want
    settled: dict[str, Completion] = field(default_factory=dict)  # key -> answer known without asking
    keys: dict[str, dict[str, list[str]]] = field(default_factory=dict)  # column -> sample id -> keys by index
    max_tokens: Mapping[str, int] = field(default_factory=dict)  # column -> what the recipe allows
    length: int = 1  # the longest prompt with its answer, in tokens
    lint: list[Finding] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)  # requests answered and their tokens, in this session


def requests(planned: Plan, folder: RunFolder) -> Work:
    """Plan every request, write them down, and settle those that the recipe keeps from the engine.

    InputError where the lint finds what makes numbers wrong and --allow does not name it.
    """
    linter = Linter(planned.context)
    try:
        todo = Work(Requests(folder.path),
                    max_tokens={c.column.name: c.column.switches["max_tokens"] for c in planned.columns})
        for column in planned.columns:
            first = len(todo.wanted)
            folder.write_lines(column.column.name, "requests", _column(planned, column, todo, linter))
            todo.parts.append(range(first, len(todo.wanted)))
    except OSError as error:
        raise RunError(f"{folder.path}: the requests cannot be kept there: {error.strerror}") from None
    todo.lint = linter.findings(allowed(planned.spec.options))
    refuse(todo.lint)
    return todo


def _column(planned: Plan, column: ColumnPlan, todo: Work, linter: Linter) -> Iterator[dict[str, object]]:
    name, over, context = column.column.name, column.column.switches["over_context"], planned.context
    keys = todo.keys[name] = {sample.id: [] for sample in column.samples}
    wanting: dict[tuple[str, ...], tuple[str, ...]] = {(): (name,)}
    for item, request in planned.requests(column):
        keys[request.sample].append(request.key)
        yield store.request_record(request, item)
        if request.index == 0:
            linter.see(column.writer, item)
        before = todo.wanted.get(request.key, ())
        if name not in before:
            todo.wanted[request.key] = wanting.setdefault(before, (*before, name))
        new = request.ask.max_tokens if isinstance(request.ask, Generate) else 1
        room = context - len(request.tokens)
        if new > room and over == "extend":
            pass  # the engine is made long enough
        elif room < 1:
            error = f"the prompt has {len(request.tokens)} tokens, the model's context {context}"
            todo.settled[request.key] = (Completion(request.key, finish="error", error=error) if over == "fail"
                                         else Completion(request.key, finish="context"))
        elif new > room and isinstance(request.ask, Generate):
            request, new = replace(request, ask=replace(request.ask, max_tokens=room)), room
        if not before:
            todo.requests.append(request)
            if request.key not in todo.settled:
                todo.length = max(todo.length, len(request.tokens) + new)


def unanswered(planned: Plan, todo: Work, folder: RunFolder) -> list[array[int]]:
    """The numbers of the requests without an answer, in batches that are asked one after the other.

    One batch: long generations first and multiple choice last to fill the tail; else in the order of the plan, which
    puts equal prefixes side by side. With --sequential a batch a column, as planned. What `--reuse` has is copied.
    """
    done = {name: folder.completions(name, say) for name in todo.keys}
    others = _reused(planned, folder)
    open_numbers, taken = array("Q"), 0
    for number, (key, names) in enumerate(todo.wanted.items()):
        lacking = [name for name in names if not done[name].has(key)]
        if not lacking:
            continue
        places = (*(done[name] for name in names), *others)
        found = todo.settled.get(key) or next((place[key] for place in places if place.has(key)), None)
        if found is None:
            open_numbers.append(number)
        elif found.finish != "error" or any(key not in done[name] for name in lacking):
            taken += key not in todo.settled
            _journal(found, lacking, folder, todo)
    if any(done.values()):
        say(f"resume: {len(todo.wanted) - len(open_numbers) - taken} of {len(todo.wanted)} answers are there")
    if others:
        say(f"reuse: {taken} of {len(todo.wanted)} answers taken over from {planned.spec.options['reuse']}")
    if "sequential" in planned.spec.options:
        still = set(open_numbers)
        return [array("Q", (number for number in part if number in still)) for part in todo.parts]
    return [array("Q", sorted(open_numbers, key=lambda number: -todo.requests.cost[number]))]


def _reused(planned: Plan, folder: RunFolder) -> list[Completions]:
    """The journals of the run that --reuse names; the judge's answers there are copied whole, each by its key."""
    path = planned.spec.options.get("reuse", "")
    if not path or not Path(path).is_dir():  # gone when the run is resumed: it has been copied by then
        return []
    for column in planned.columns:
        name = judging.journal(column.column.name)
        have, there = folder.completions(name), RunFolder(Path(path)).completions(name)
        for key in there:
            if there.has(key) and not have.has(key):
                folder.append(name, there[key])
    return [Completions(file) for file in sorted(Path(path).glob("*.completions.jsonl"))]


class Session:
    """The run's one engine, started when the first request comes. Itself an engine, which asks again what failed."""

    def __init__(self, planned: Plan, folder: RunFolder, todo: Work) -> None:
        """The engine is long enough for the longest request and, where it judges itself, for its context."""
        self.name = engines.resolve(planned.spec.engine)
        self.settings: Mapping[str, Any] = {}  # empty while none was started
        self.load_s = 0.0
        self.length = max(todo.length, planned.context if planned.self_judged else 1)
        self._spec = planned.engine_spec(self.length, folder.path / "engine.log")
        self._said = f"{planned.model.name}; chat format {planned.format.name}, length {self.length} tokens"
        self._engine: Engine | None = None

    def complete(self, requests: Iterable[Request]) -> Iterator[Completion]:
        waiting = iter(requests)
        if (first := next(waiting, None)) is None:
            return
        yield from _answers(self.start(), chain([first], waiting))

    def start(self) -> Engine:
        if self._engine is None:
            say(f"engine: {self.name} loads {self._said}")
            began = time.monotonic()
            self._engine = engines.create(self.name, self._spec)
            self.load_s = round(time.monotonic() - began, 3)
            self.settings = self._engine.settings
        return self._engine

    def close(self) -> None:
        if self._engine is not None:
            self._engine.close()
            self._engine = None


def _answers(engine: Engine, fresh: Iterator[Request]) -> Iterator[Completion]:
    """The engine's answers; a request that fails is asked again RETRIES times at most, then stands as failed.

    The one boundary where any exception is caught: where the engine raises, those in flight are asked one by one, so
    that a bad request fails alone. EngineError: the engine is dead, by its own word or because it raises every time.
    """
    again: deque[tuple[Request, int]] = deque()
    flying: dict[str, tuple[Request, int]] = {}

    def feed() -> Iterator[Request]:
        while True:
            request, tries = (None, 0) if len(again) >= HELD else (next(fresh, None), 0)
            if request is None:
                if not again:
                    return
                request, tries = again.popleft()
            flying[request.key] = (request, tries)
            yield request

    while True:
        fault = ""
        try:
            answers: Any = engine.complete(feed())
            with closing(answers):
                for completion in answers:
                    request, tries = flying.pop(completion.key)
                    if completion.finish == "error" and tries < RETRIES:
                        again.append((request, tries + 1))
                    else:
                        yield completion
        except EvalkitError:
            raise
        except Exception as error:
            fault = f"{type(error).__name__}: {error}"
        alone = [_alone(engine, request) for request, _ in flying.values()]
        if fault and len(alone) != 1 and all(answer.finish == "error" for answer in alone):
            raise EngineError(f"the engine fails on every request: {fault}")
        yield from alone
        flying.clear()
        if not fault and not again:
            return


def _alone(engine: Engine, request: Request) -> Completion:
    """A request's answer, asked by itself; after 1 + RETRIES faults the last one, as an error."""
    answer = Completion(request.key, finish="error", n_prompt=len(request.tokens), error="the engine gave no answer")
    for _ in range(1 + RETRIES):
        try:
            answer = next(iter(engine.complete([request])), answer)
        except EvalkitError:
            raise
        except Exception as error:
            answer = replace(answer, error=f"{type(error).__name__}: {error}")
        if answer.finish != "error":
            break
    return answer


def ask(session: Session, planned: Plan, folder: RunFolder, todo: Work, see: Callable[[Completion], None]) -> None:
    """Ask all that has no answer yet, journal each answer as it comes, and let `see` have it."""
    batches = unanswered(planned, todo, folder)
    if any(batches):
        session.start()
    asked = (answer for batch in batches for answer in session.complete(todo.requests.read(batch)))
    with closing(asked):  # what is in flight when this ends early is dropped before the engine closes
        for completion in bar(asked, sum(map(len, batches)), "generate"):
            _journal(completion, todo.wanted[completion.key], folder, todo)
            see(completion)
            todo.counts.update(requests=1, prompt_tokens=completion.n_prompt, cached_tokens=completion.n_cached,
                               generated_tokens=completion.n_generated)
    todo.wanted.clear()  # a tenth of a GB a million


def _journal(completion: Completion, columns: Iterable[str], folder: RunFolder, todo: Work) -> None:
    for name in columns:
        short = completion.finish == "max_tokens" and completion.n_generated < todo.max_tokens[name]
        # an answer that filled a room shortened by the context was ended by the context
        folder.append(name, replace(completion, finish="context") if short else completion)
