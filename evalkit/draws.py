"""Which rows are evaluated: the recipe's draw, then --limit or --ids. Pure functions of seed, sizes and order.

    rows({"": 1319}, 200, Random(42))[""][:3] == [1309, 228, 51]      # GSM's 200 of the paper

The originals call random.seed(42) once and then random.sample for one group after the other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from random import Random


def rows(sizes: Mapping[str, int], n: int, rng: Random) -> dict[str, list[int]]:
    """For each group in sorted order, `n` row numbers in drawing order; all rows where n is 0 or not below the size."""
    return {group: rng.sample(range(sizes[group]), n) if 0 < n < sizes[group] else list(range(sizes[group]))
            for group in sorted(sizes)}


def exemplars(sizes: Mapping[str, int], k: int, rng: Random) -> dict[str, list[int]]:
    """For each group in sorted order, `k` row numbers of its shots' rows, drawn with what `rows` left of `rng`."""
    return {group: rng.sample(range(sizes[group]), min(k, sizes[group])) for group in sorted(sizes)}


def limited(drawn: Mapping[str, Sequence[int]], limit: int, seed: int) -> dict[str, list[int]]:
    """`limit` rows of a draw, spread evenly over its groups: one a group in a seeded order, round after round.

    A smaller limit's rows are among a larger one's. Rows keep the draw's order within their group.
    """
    rng = Random(seed)
    order = sorted(drawn)
    rng.shuffle(order)
    mixed = {group: rng.sample(list(drawn[group]), len(drawn[group])) for group in sorted(drawn)}
    rounds = ((group, mixed[group][i]) for i in range(max(map(len, drawn.values()), default=0))
              for group in order if i < len(mixed[group]))
    kept = {pair for pair, _ in zip(rounds, range(limit), strict=False)}
    return {group: own for group in sorted(drawn) if (own := [i for i in drawn[group] if (group, i) in kept])}
