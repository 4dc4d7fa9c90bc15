"""How fast an engine is, from a few of a plan's own requests: what `--dry-run` reckons a run's time by.

    Speed(prompt=1012.0, new=231.0, source="a probe of vllm")     # tokens a second

Rounds of twice as many requests are asked until one takes SECONDS; the last one counts. Nothing is kept.
"""

from __future__ import annotations

import tempfile
import time
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from evalkit import engines
from evalkit.engines import Engine
from evalkit.errors import EngineError, EvalkitError
from evalkit.plan import Plan
from evalkit.progress import say
from evalkit.types import Completion, Generate, Request
from evalkit.weights import files as weight_files

SECONDS = 2.0  # that a round must take to be believed
FEW = 8  # requests a column that are kept for the probe
TAIL, NEW = 16, 32  # decoding is timed on prompts of TAIL tokens and answers of up to NEW


@dataclass(frozen=True, slots=True)
class Speed:
    """Tokens a second: of prompts computed (not served from the cache), and generated with a full window."""

    prompt: float
    new: float
    source: str

    def seconds(self, computed: float, generated: float) -> float:
        return computed / self.prompt + generated / self.new


def at_hand(planned: Plan) -> str:
    """Why no engine can be asked here and now; empty where one can."""
    name = planned.spec.engine or "vllm"
    if name in ("mock", "replay"):
        return f"engine {name} computes nothing"
    if name != "openai" and not (Path(planned.model.path).is_dir() and weight_files(Path(planned.model.path))):
        return "the weights are not on this machine"
    return ""


def measure(planned: Plan, samples: Sequence[Request]) -> Speed | str:
    """The speed of the plan's engine on `samples`, or why there is none. Starts the engine and closes it."""
    if (why := at_hand(planned)) or not samples:
        return why or "nothing to ask"
    try:
        name = engines.resolve(planned.spec.engine)
        longest = max(len(request.tokens) for request in samples) + NEW
        say(f"probe: {name} loads {planned.model.name} and answers for a few seconds (--no-probe leaves it out)")
        with tempfile.TemporaryDirectory(prefix="evalkit-") as folder:
            engine = engines.create(name, planned.engine_spec(longest, Path(folder) / "engine.log"))
            try:
                return _measure(engine, samples)
            finally:
                engine.close()
    except EvalkitError as error:
        return str(error)


def _measure(engine: Engine, samples: Sequence[Request]) -> Speed:
    window = int(engine.settings.get("max_num_seqs") or engine.settings.get("concurrency") or 16)
    _timed(engine, [_tail(samples[0], 0, 2)])  # the first request pays for what is made once
    start, many, prompt = 0, 1, 0.0
    while start < len(samples):
        batch = [replace(request, ask=replace(request.ask, max_tokens=1) if isinstance(request.ask, Generate)
                         else request.ask) for request in samples[start:start + many]]
        seconds, answers = _timed(engine, batch)
        prompt = sum(answer.n_prompt - answer.n_cached for answer in answers) / seconds
        start, many = start + many, 2 * many
        if seconds >= SECONDS:
            break
    seconds, answers = _timed(engine, [_tail(samples[i % len(samples)], i, NEW) for i in range(window)])
    return Speed(max(prompt, 1e-3), max(sum(answer.n_generated for answer in answers) / seconds, 1e-3),
                 f"a probe of {engine.name}")


def _tail(request: Request, number: int, new: int) -> Request:
    """A short prompt, its answer not to be stopped by any text."""
    return Request(f"probe{number}", "", "", 0, array("i", request.tokens[-TAIL:]), Generate(new))


def _timed(engine: Engine, requests: Iterable[Request]) -> tuple[float, list[Completion]]:
    began = time.monotonic()
    answers = list(engine.complete(iter(requests)))
    good = [answer for answer in answers if not answer.error]
    if not good:
        raise EngineError(f"the probe's requests fail: {answers[0].error}" if answers else "the engine gave no answer")
    return max(time.monotonic() - began, 1e-6), good
