"""The requests on disk, and asking again what failed."""

from array import array
from collections import Counter

import pytest

from evalkit import pool
from evalkit.engines.mock import Mock, invented
from evalkit.errors import EngineError
from evalkit.types import Choose, Completion, Generate, Request


def requests(n: int) -> list[Request]:
    return [Request(f"{i:032x}", "gsm", f"g/{i}", 0, array("i", [1, i]), Generate(9)) for i in range(n)]


def test_requests_come_back_from_the_disk_in_any_order(tmp_path):
    kept = pool.Requests(tmp_path)
    made = [*requests(5), Request("c" * 32, "mmlu", "m/1", 0, array("i", [7]), Choose(((3,), (4, 5))))]
    for request in made:
        kept.append(request)
    assert list(kept.read([5, 0, 3, 3])) == [made[5], made[0], made[3], made[3]]
    assert list(kept.cost) == [9] * 5 + [0] and not list(tmp_path.iterdir())


@pytest.mark.parametrize("window", [1, 8, 500])
def test_every_request_that_fails_twice_is_answered_in_the_third_try(window):
    tries: Counter[str] = Counter()

    def answer(request):
        tries[request.key] += 1
        return Completion("", finish="error", error="busy") if tries[request.key] < 3 else invented(request)

    made = requests(300)
    found = list(pool._answers(Mock(answer, window=window), iter(made)))
    assert Counter(c.key for c in found) == Counter(r.key for r in made)
    assert all(c.finish != "error" for c in found) and set(tries.values()) == {3}


def test_those_that_always_fail_are_asked_three_times_and_stand_as_failed():
    tries: Counter[str] = Counter()

    def answer(request):
        tries[request.key] += 1
        return Completion("", finish="error", error="bad") if int(request.key, 16) % 2 else invented(request)

    found = {c.key: c for c in pool._answers(Mock(answer, window=4), iter(requests(200)))}
    assert len(found) == 200 and sum(c.finish == "error" for c in found.values()) == 100
    assert Counter(tries.values()) == {1: 100, 3: 100}


def test_a_request_without_an_answer_is_a_failed_one():
    class Silent(Mock):
        def complete(self, asked):
            for request in asked:
                if request.sample != "g/3":
                    yield from super().complete([request])

    found = {c.key: c for c in pool._answers(Silent(), iter(requests(5)))}
    assert len(found) == 5 and found[f"{3:032x}"].error == "the engine gave no answer"


def test_an_engine_that_raises_at_once_is_dead():
    class Broken(Mock):
        def complete(self, asked):
            raise TypeError("what?")
            yield

    with pytest.raises(EngineError, match="the engine fails on every request: TypeError: what\\?"):
        list(pool._answers(Broken(), iter(requests(5))))
