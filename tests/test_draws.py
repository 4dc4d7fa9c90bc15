"""The draws of the original code, and their properties under --limit."""

import json
import random
from pathlib import Path
from random import Random

import pytest

from evalkit import draws


@pytest.fixture
def sampling(shared: Path) -> dict:
    return json.loads((shared / "golden" / "sampling.json").read_text(encoding="utf-8"))


def test_gsm_draw_is_the_originals(sampling):
    assert draws.rows({"": 1319}, 200, Random(42))[""] == sampling["gsm_test_200"]


def test_bbh_draw_in_alphabetical_order(sampling):
    golden = sampling["bbh_test_40_per_task_alphabetical"]
    sizes = dict.fromkeys(golden, 250) | {"causal_judgement": 187, "snarks": 178, "penguins_in_a_table": 146}
    assert draws.rows(sizes, 40, Random(42)) == golden


def test_tydiqa_rows_and_exemplars(sampling, shared):
    import pyarrow.parquet as pq

    folder = shared / "data/hub/google-research-datasets/tydiqa/secondary_task"
    ids = pq.read_table(folder / "validation-00000-of-00001.parquet", columns=["id"])["id"].to_pylist()
    by_language: dict[str, list[str]] = {}
    for name in ids:
        by_language.setdefault(name.partition("-")[0], []).append(name)
    rng = Random(42)
    drawn = draws.rows({k: len(v) for k, v in by_language.items()}, 100, rng)
    golden = sampling["tydiqa_dev_100_per_language_P2"]
    assert {k: [by_language[k][i] for i in v] for k, v in drawn.items()} == golden
    shots = draws.exemplars(sampling["tydiqa_train_sizes"], 1, rng)
    assert {k: v[0] for k, v in shots.items()} == sampling["tydiqa_exemplar_index_in_train_P2"]


@pytest.mark.parametrize("seed", [7, 2023])
def test_another_seed_equals_the_standard_librarys_own_calls(seed):
    random.seed(seed)
    expected = {"a": random.sample(list(range(60)), 11), "b": random.sample(list(range(30)), 11)}
    shot = {"a": random.sample(list(range(5)), 2), "b": random.sample(list(range(9)), 2)}
    rng = Random(seed)
    assert draws.rows({"b": 30, "a": 60}, 11, rng) == expected
    assert draws.exemplars({"a": 5, "b": 9}, 2, rng) == shot


def test_limit_is_spread_nested_and_inside_the_draw():
    drawn = draws.rows({"a": 50, "b": 50, "c": 50}, 10, Random(1))
    small, large = draws.limited(drawn, 4, 42), draws.limited(drawn, 9, 42)
    assert sorted(map(len, small.values())) == [1, 1, 2] and sorted(map(len, large.values())) == [3, 3, 3]
    for group, own in small.items():
        assert set(own) <= set(large[group]) <= set(drawn[group])
    assert draws.limited(drawn, 1000, 42) == drawn
    assert len(draws.limited(drawn, 2, 42)) == 2
