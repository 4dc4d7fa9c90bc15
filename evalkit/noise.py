"""How much two engines differ, and one engine from itself in another order: below that, a gain is noise.

    column    compared                  n  same text  first difference  logprob  letters
    gsm_cot   vllm, other order         4    4 of 4
    mmlu_0shot vllm against hf          4                                 0.031   0 of 4

Greedy, on the first prompts of each column; the first difference is the earliest token at which two texts part.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from evalkit import engines, plan
from evalkit.plan import Plan
from evalkit.progress import bar, say
from evalkit.types import Choose, Completion, Generate, Request, RunSpec

Answers = Mapping[str, Completion]


@dataclass(frozen=True, slots=True)
class Difference:
    """`same` texts of `texts`; `first` token at which two differ (None: none does); `logprob` largest difference of
    an option's natural log-probability; `flipped` letters of `letters`; `failed` answers that are errors."""

    column: str
    compared: str
    texts: int
    same: int
    first: int | None
    letters: int
    flipped: int
    logprob: float | None
    failed: int


def greedy(planned: Plan, max_tokens: int) -> list[Request]:
    """One greedy request a prompt and column, of at most `max_tokens` new tokens."""
    found = []
    for column in planned.columns:
        for _, request in planned.requests(column):
            if request.index == 0:
                ask = request.ask
                if isinstance(ask, Generate):
                    length = min(max_tokens, ask.max_tokens)
                    ask = replace(ask, max_tokens=length, temperature=0.0, top_p=1.0, seed=None)
                found.append(replace(request, key=f"{request.column}/{request.key}", ask=ask))
    return found


def answers(planned: Plan, engine: str, orders: Sequence[Sequence[Request]]) -> Iterator[Answers]:
    """The answers of one session of `engine` to each order of the requests."""
    longest = max(len(r.tokens) + (r.ask.max_tokens if isinstance(r.ask, Generate) else 1) for r in orders[0])
    log = Path(tempfile.mkdtemp(prefix="evalkit-")) / f"{engine}.log"
    say(f"engine: {engine} loads {planned.model.name} (its log: {log})")
    session = engines.create(engine, planned.engine_spec(longest, log))
    try:
        for order in orders:
            yield {c.key: c for c in bar(session.complete(iter(order)), len(order), engine)}
    finally:
        session.close()


def compare(planned: Plan, requests: Iterable[Request], what: str, a: Answers, b: Answers) -> list[Difference]:
    rows: dict[str, list[tuple[Request, Completion, Completion]]] = {}
    for request in requests:
        rows.setdefault(request.column, []).append((request, a[request.key], b[request.key]))
    return [_difference(planned, column, what, own) for column, own in rows.items()]


def _difference(
    planned: Plan, column: str, what: str, rows: list[tuple[Request, Completion, Completion]]
) -> Difference:
    assert planned.tokenizer is not None
    good = [row for row in rows if "error" not in (row[1].finish, row[2].finish)]
    texts = [(x.text, y.text) for request, x, y in good if isinstance(request.ask, Generate)]
    choices = [(x.logprobs, y.logprobs) for request, x, y in good if isinstance(request.ask, Choose)]
    firsts = []
    for one, two in texts:
        ids = [planned.tokenizer.encode(one), planned.tokenizer.encode(two)]
        if one != two:
            firsts.append(next((i for i, (p, q) in enumerate(zip(*ids, strict=False)) if p != q), min(map(len, ids))))
    best = [(x.index(max(x)), y.index(max(y))) for x, y in choices]
    gaps = [abs(p - q) for x, y in choices for p, q in zip(x, y, strict=True)]
    return Difference(column, what, len(texts), sum(p == q for p, q in texts), min(firsts, default=None), len(best),
                      sum(p != q for p, q in best), max(gaps, default=None), len(rows) - len(good))


def check(spec: RunSpec, against: str, max_tokens: int) -> list[Difference]:
    """The differences of the engine from itself in reversed order, and from the engine `against`."""
    engine = engines.prepare(spec.engine)
    engines.resolve(against)
    planned = plan.make(spec)
    asked = greedy(planned, max_tokens)
    one, other_order = answers(planned, engine, [asked, asked[::-1]])
    (two,) = answers(planned, against, [asked])
    return [*compare(planned, asked, f"{engine}, other order", one, other_order),
            *compare(planned, asked, f"{engine} against {against}", one, two)]
