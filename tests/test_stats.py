"""Statistics against golden rows, tables of the literature and sums done by hand."""

from __future__ import annotations

import gzip
import itertools
import json
import math
import random
from pathlib import Path

import pytest

from evalkit.stats import mean_interval, paired, pass_at_k, t_quantile, wilson, win_rate


def test_pass_at_k_golden(shared: Path) -> None:
    rows = map(json.loads, (shared / "golden/scoring.jsonl").read_text(encoding="utf-8").splitlines())
    rows = [row for row in rows if row["stage"] == "pass_at_k"]
    assert len(rows) >= 20
    for row in rows:
        pairs = zip(row["n"], row["c"], strict=True) if isinstance(row["n"], list) else [(row["n"], row["c"])]
        found = [pass_at_k(n, c, row["k"]) for n, c in pairs]
        assert math.fsum(found) / len(found) == pytest.approx(row["expected"], rel=0, abs=1e-12), row


def test_pass_at_k_is_the_share_of_draws_with_a_correct_one() -> None:
    for n, c, k in [(6, 2, 3), (6, 0, 3), (6, 6, 1), (7, 1, 7), (5, 3, 2)]:
        draws = list(itertools.combinations([True] * c + [False] * (n - c), k))
        assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, draws)) / len(draws), abs=1e-15)


@pytest.mark.parametrize(("n", "c", "k"), [(5, 0, 10), (5, 6, 1), (5, -1, 1), (5, 1, 0)])
def test_pass_at_k_refuses_what_has_no_answer(n: int, c: int, k: int) -> None:
    with pytest.raises(ValueError, match="pass@k needs"):
        pass_at_k(n, c, k)


@pytest.mark.parametrize(
    ("df", "t"), [(1, 12.7062047), (2, 4.3026527), (7, 2.3646243), (29, 2.0452296), (1000, 1.9623391)]
)
def test_t_quantile_as_printed_tables(df: float, t: float) -> None:
    assert t_quantile(df) == pytest.approx(t, abs=1e-6)
    assert t_quantile(20_000) == pytest.approx(1.959964, abs=1e-6)


def test_wilson_as_in_the_literature() -> None:
    low, high = wilson(81 / 263, 263)  # Newcombe 1998, table I, method 3
    assert (round(low, 4), round(high, 4)) == (0.2553, 0.3662)
    assert [round(x, 4) for x in wilson(0.0, 20)] == [0.0, 0.1611]
    assert [round(x, 4) for x in wilson(1 / 29, 29)] == [0.0061, 0.1718]


def test_wilson_covers_what_it_promises() -> None:
    n = 40
    for p in (0.1, 0.3, 0.5, 0.9):
        weights = [math.comb(n, c) * p**c * (1 - p) ** (n - c) for c in range(n + 1)]
        covered = math.fsum(w for c, w in enumerate(weights) if (i := wilson(c / n, n))[0] <= p <= i[1])
        assert 0.93 < covered < 0.98, p


def test_plain_mean_of_shares_is_students_interval() -> None:
    values = [0.25, 0.75, 0.5, 0.5]
    mean, low, high, n_groups = mean_interval(values, ["a", "a", "b", "b"], by_group=False)
    half = 3.18244631 * math.sqrt((0.0625 + 0.0625) / 3 / 4)
    assert (mean, n_groups) == (0.5, 2)
    assert low == pytest.approx(0.5 - half, abs=1e-8) and high == pytest.approx(0.5 + half, abs=1e-8)


def test_zero_one_values_get_wilson_and_a_single_item_says_nothing() -> None:
    assert mean_interval([1.0] * 3 + [0.0] * 7, ["x"] * 10, False)[1:3] == wilson(0.3, 10)
    assert mean_interval([1.0] * 3 + [0.0] * 7, ["x"] * 10, True)[1:3] == wilson(0.3, 10)
    assert mean_interval([1.0], ["x"], False) == (1.0, 0.0, 1.0, 1)
    assert mean_interval([0.4], ["x"], True) == (0.4, 0.0, 1.0, 1)


def test_mean_of_groups_weighs_groups_alike_and_has_a_stratified_error() -> None:
    values, groups = [1.0, 0.0, 0.0, 0.0, 1.0, 1.0, 0.0], list("aaaabbb")
    mean, low, high, n_groups = mean_interval(values, groups, by_group=True)
    va, vb = 0.25 / 4, (1 / 3) / 3  # s^2 / n of each
    df = (va + vb) ** 2 / (va**2 / 3 + vb**2 / 2)
    half = t_quantile(df) * math.sqrt(va + vb) / 2
    assert (mean, n_groups) == (pytest.approx((0.25 + 2 / 3) / 2), 2)
    assert low == pytest.approx(max(0, mean - half)) and high == pytest.approx(min(1, mean + half))
    assert mean_interval(values, groups, by_group=False)[0] == pytest.approx(3 / 7)


def test_a_difference_between_groups_is_no_error_of_a_mean_of_groups() -> None:
    rng = random.Random(3)
    values = [float(rng.random() < p) for p in (0.05, 0.95) for _ in range(100)]
    groups = ["hard"] * 100 + ["easy"] * 100
    _, low, high, _ = mean_interval(values, groups, True)
    _, plain_low, plain_high, _ = mean_interval(values, groups, False)
    assert high - low < 0.6 * (plain_high - plain_low)


def test_small_groups_still_have_an_error() -> None:
    one_each = mean_interval([1.0, 0.0, 0.0, 1.0], list("abcd"), True)
    assert one_each == (0.5, *wilson(0.5, 4), 4)
    # one single-item group: it takes the other's variance 0.5, with its one degree of freedom
    mean, low, high, _ = mean_interval([0.2, 0.4, 0.5], ["a", "a", "b"], True)
    variance = (0.02 / 2 + 0.02) / 4
    df = 0.03**2 / (0.01**2 + 0.02**2)
    assert high - mean == pytest.approx(t_quantile(df) * math.sqrt(variance)) and low == 0.0


@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("by_group", [True, False])
def test_equal_values_do_not_make_certainty(value: float, by_group: bool) -> None:
    mean, low, high, _ = mean_interval([value] * 8, list("aabbccdd"), by_group)
    assert mean == value and high - low > 0.3 and (low, high) == wilson(value, 8)


def test_result_does_not_depend_on_the_order() -> None:
    rng = random.Random(0)
    items = [(rng.random(), rng.choice("abc")) for _ in range(300)]
    shuffled = rng.sample(items, len(items))
    for by_group in (True, False):
        one, two = (mean_interval(*map(list, zip(*x, strict=True)), by_group) for x in (items, shuffled))
        assert one == two


@pytest.mark.parametrize(
    ("values", "groups"), [([], []), ([0.5], []), ([59.2], ["a"]), ([math.nan], ["a"]), ([-0.1], ["a"])]
)
def test_not_shares(values: list[float], groups: list[str]) -> None:
    with pytest.raises(ValueError, match="values for"):
        mean_interval(values, groups, False)


def test_paired_zero_one_is_exact_mcnemar() -> None:
    a = {str(i): float(i < 59) for i in range(100)}
    b = {str(i): float(i < 50 or i == 99) for i in range(100)}  # a alone 9, b alone 1
    found = paired(a, b)
    assert found.p == pytest.approx(2 * (1 + 10) / 2**10, abs=1e-15)
    assert (found.difference, found.n, found.a_better, found.b_better) == (pytest.approx(0.08), 100, 9, 1)
    half = t_quantile(99) * math.sqrt((10 - 100 * 0.08**2) / 99 / 100)
    assert found.low == pytest.approx(0.08 - half) and found.high == pytest.approx(0.08 + half)
    back = paired(b, a)
    assert (back.difference, back.low, back.high, back.p) == (
        -found.difference,
        -found.high,
        -found.low,
        found.p,
    )


def test_paired_enumerates_all_signs_when_few() -> None:
    a, b = {"x": 0.5, "y": 0.3, "z": 0.2, "only": 1.0}, {"x": 0.0, "y": 0.0, "z": 0.1}
    found = paired(a, b)  # 0.5 + 0.3 + 0.1: only +++ and --- are as far from 0
    assert (found.p, found.n) == (2 / 8, 3)


def test_paired_draws_are_seeded_and_agree_with_the_normal_limit() -> None:
    rng = random.Random(5)
    a = {str(i): rng.random() for i in range(200)}
    b = {k: min(1.0, max(0.0, v + rng.gauss(0.015, 0.1))) for k, v in a.items()}
    first, again, other = paired(a, b), paired(a, b), paired(a, b, seed=1)
    assert first == again and first.p != other.p
    diffs = [a[k] - b[k] for k in a]
    z = abs(math.fsum(diffs)) / math.sqrt(math.fsum(d * d for d in diffs))
    normal = math.erfc(z / math.sqrt(2))
    assert 0.001 < normal < 0.5
    assert first.p == pytest.approx(normal, abs=4 * math.sqrt(normal / 4096) + 0.002)


def test_paired_by_group_and_equal_runs() -> None:
    a, b = {"1": 1.0, "2": 1.0, "3": 0.0, "4": 1.0}, {"1": 0.0, "2": 1.0, "3": 0.0, "4": 0.0}
    assert paired(a, b).difference == 0.5
    assert paired(a, b, {"1": "x", "2": "x", "3": "x", "4": "y"}).difference == pytest.approx((1 / 3 + 1) / 2)
    same = paired(a, a)
    assert (same.difference, same.p) == (0.0, 1.0) and same.high == -same.low == wilson(0.0, 4)[1]
    assert (paired({"1": 1.0}, {"1": 0.0}).low, paired({"1": 1.0}, {"1": 0.0}).high) == (-1.0, 1.0)
    with pytest.raises(ValueError, match="in common"):
        paired({"a": 1.0}, {"b": 1.0})


@pytest.mark.parametrize("model", ["alpaca-7b", "wizardlm-13b", "gpt4_0314"])
def test_win_rate_as_the_leaderboard(shared: Path, model: str) -> None:
    folder = shared / "oracle/alpaca_eval"
    with gzip.open(folder / f"{model}.jsonl.gz", "rt", encoding="utf-8") as lines:
        found = [json.loads(line)["preference"] for line in lines]
    values = [0.5 if p in (0, 1.5) else p - 1 for p in found if p is not None]
    board = json.loads((folder / "leaderboard.json").read_text(encoding="utf-8"))["models"][model]
    mean, error = win_rate(values)
    assert mean * 100 == pytest.approx(board["win_rate"], rel=0, abs=1e-9)
    assert error * 100 == pytest.approx(board["standard_error"], rel=0, abs=1e-9)
    assert math.isnan(win_rate([1.0])[1])
