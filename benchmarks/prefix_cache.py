"""Prompt tokens served from the prefix cache against the ideal, and whether a cold burst shares blocks.

    python benchmarks/prefix_cache.py --data DIR [--questions 40]

The ideal is computed from the token ids and the engine's block size: a block (with all that stands before it) is
computed once and served ever after; the last token of a prompt is always computed. `one first` asks one request of
each subject and waits, then the rest; `burst` sends all at once into a cold cache, as the pool does.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import common
import mmlu

LEAST = 0.95


def ideal(prompts: Iterable[Sequence[int]], block: int) -> int:
    """Tokens that can come from the cache, whatever the order: of each prompt the full blocks before its last token,
    less those that are new."""
    known: set[int] = set()
    tokens = 0
    for prompt in prompts:
        chain = 0
        for at in range(0, len(prompt) - block + 1, block):
            chain = hash((chain, *prompt[at:at + block]))
            if at + block < len(prompt):  # else the last token would not be computed
                tokens += block * (chain in known)
            known.add(chain)
    return tokens


def burst(args: argparse.Namespace, scratch: str) -> dict[str, Any]:
    work = common.planned(mmlu.spec(args.data, args.model, args.questions), Path(scratch))
    requests, (numbers,) = work.requests(), work.batches
    first: list[int] = []
    if args.side == "one-first":
        subjects = [request.sample.split("/")[0] for request in requests]
        first = [numbers[subjects.index(subject)] for subject in dict.fromkeys(subjects)]
    session = common.start(work)
    served = 0
    with common.measured() as cost:
        for batch in (first, [n for n in numbers if n not in first]):
            served += sum(completion.n_cached for completion in session.complete(work.todo.requests.read(batch)))
    block = session.settings["block_size"]
    session.close()
    return {"cpu": cost.cpu, "wall": cost.wall, "block": block, "requests": len(requests), "served": served,
            "ideal": ideal([r.tokens for r in requests], block), "prompt": sum(len(r.tokens) for r in requests)}


def main() -> int:
    parser = common.parser(__doc__)
    parser.add_argument("--questions", type=int, default=40, help="questions a subject (default 40)")
    args = parser.parse_args()
    if args.side:
        with tempfile.TemporaryDirectory() as scratch:
            common.answer(args.work, args.side, burst(args, scratch))
        return 0
    with tempfile.TemporaryDirectory() as scratch:
        sides = {name: common.side(name, Path(scratch)) for name in ("burst", "one-first")}
    share = sides["burst"]["served"] / sides["burst"]["ideal"]
    rows: list[list[object]] = [["order", "requests", "prompt tokens", "ideal", "served", "share", "CPU s"]]
    rows += [[name, s["requests"], s["prompt"], s["ideal"], s["served"], s["served"] / s["ideal"], s["cpu"]]
             for name, s in sides.items()]
    return common.report("prefix_cache", rows, {"share": share, "target": LEAST, "block": sides["burst"]["block"],
                                                "sides": sides, "pairs": 1, "met": share >= LEAST})


if __name__ == "__main__":
    sys.exit(main())
