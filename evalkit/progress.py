"""What a person sees while it works: a bar on a terminal, a plain line now and then elsewhere. All on stderr.

    generate: 120/376 requests, 214 tokens/s, 1:43 left
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from evalkit.types import Completion

T = TypeVar("T")
EVERY = 15.0  # seconds between plain lines


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


@contextmanager
def stages() -> Iterator[Callable[[str, int, int], None]]:
    """A function (what, done, total) that shows work of several stages, counted in bytes."""
    bars: dict[str, Any] = {}
    last = [0.0]

    def tell(what: str, done: int, total: int) -> None:
        if sys.stderr.isatty():
            from tqdm import tqdm

            if what not in bars:
                bars[what] = tqdm(total=total, desc=what, unit="B", unit_scale=True)
            bars[what].update(done - bars[what].n)
        elif time.monotonic() - last[0] >= EVERY or done == total:
            last[0] = time.monotonic()
            say(f"{what}: {done / 2**20:.0f} of {total / 2**20:.0f} MiB")

    try:
        yield tell
    finally:
        for shown in bars.values():
            shown.close()


def bar(items: Iterable[T], total: int, what: str, unit: str = "requests") -> Iterator[T]:
    """Pass `items` on and show how many of `total` came, tokens a second for Completions, and the time left."""
    if sys.stderr.isatty():
        from tqdm import tqdm

        with tqdm(total=total, desc=what, unit=f" {unit}", smoothing=0.1) as shown:
            tokens, start = 0, time.monotonic()
            for item in items:
                tokens += item.n_generated if isinstance(item, Completion) else 0
                if tokens:
                    shown.set_postfix_str(f"{tokens / (time.monotonic() - start):.0f} tokens/s", refresh=False)
                shown.update()
                yield item
        return
    start = last = time.monotonic()
    tokens = 0
    for done, item in enumerate(items, 1):
        tokens += item.n_generated if isinstance(item, Completion) else 0
        now = time.monotonic()
        if now - last >= EVERY or done == total:
            last, passed = now, now - start
            left = passed / done * (total - done)
            rate = f", {tokens / passed:.0f} tokens/s" if tokens and passed else ""
            say(f"{what}: {done}/{total} {unit}{rate}, {int(left) // 60}:{int(left) % 60:02d} left")
        yield item
