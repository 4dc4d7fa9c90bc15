"""An engine without a model: answers from a function or a queue, or made up from the request's key.

    Mock(lambda request: "So the answer is 7.")     Mock(["first", "second", Completion("", finish="context")])

As `--engine mock` it tries a whole run without a model; args `delay` (seconds an answer), `fail` (share that fails).
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import islice
from typing import Any

from evalkit.engines import EngineSpec
from evalkit.errors import InputError, UnknownName
from evalkit.types import Choose, Completion, Request

Answer = Completion | str | tuple[float, ...]  # a text, the options' log-probabilities, or all of it


class Mock:
    """`answers`: request -> answer, or answers in the order of the requests. `window` requests are pulled at a
    time and answered last first, so that nobody comes to rely on the order."""

    name = "mock"

    def __init__(
        self, answers: Callable[[Request], Answer] | Iterable[Answer] | None = None, delay: float = 0.0,
        window: int = 1,
    ) -> None:
        self._answers = invented if answers is None else answers if callable(answers) else _queue(answers)
        self._delay, self._window = delay, window
        self.settings: Mapping[str, Any] = {"device": "none", "delay": delay, "window": window}
        self.closed = False

    def complete(self, requests: Iterable[Request]) -> Iterator[Completion]:
        waiting = iter(requests)
        while held := list(islice(waiting, self._window)):
            for request, answer in reversed([(request, self._answers(request)) for request in held]):
                if self._delay:
                    time.sleep(self._delay)
                yield _completion(request, answer)

    def close(self) -> None:
        self.closed = True


def from_spec(spec: EngineSpec) -> Mock:
    known = {"delay": 0.0, "fail": 0.0, "window": 8.0}
    for name, text in spec.args.items():
        if name not in known:
            raise UnknownName("engine option of mock", name, known)
        try:
            known[name] = float(text)
        except ValueError:
            raise InputError(f"--engine-args {name}={text}: a number is needed") from None
    share = known["fail"]

    def answer(request: Request) -> Answer:
        if zlib.crc32(b"fail" + request.key.encode()) / 2**32 < share:
            return Completion(request.key, finish="error", error="the mock engine fails here, as asked for")
        return invented(request)

    return Mock(answer, known["delay"], max(1, int(known["window"])))


def invented(request: Request) -> Answer:
    """The same answer for the same key: a sentence that every rule of extraction can read, or log-probabilities."""
    number = zlib.crc32(request.key.encode())
    if isinstance(request.ask, Choose):
        return tuple(-1.0 - ((number >> 3 * at) & 7) for at in range(len(request.ask.options)))
    return f" So the answer is {number % 100}."


def _queue(answers: Iterable[Answer]) -> Callable[[Request], Answer]:
    left = iter(answers)

    def following(request: Request) -> Answer:
        if (answer := next(left, None)) is None:
            raise InputError(f"the mock engine has no answer left for {request.column} {request.sample}")
        return answer

    return following


def _completion(request: Request, answer: Answer) -> Completion:
    if isinstance(answer, Completion):
        return replace(answer, key=request.key)
    if isinstance(answer, str):
        return Completion(request.key, answer, n_prompt=len(request.tokens), n_generated=len(answer.split()))
    return Completion(request.key, logprobs=answer, finish="choice", n_prompt=len(request.tokens), n_generated=1)
