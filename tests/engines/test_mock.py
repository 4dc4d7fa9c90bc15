from __future__ import annotations

import math
from collections.abc import Iterator

import pytest

from evalkit.engines import EngineSpec, create
from evalkit.engines.mock import Mock
from evalkit.errors import InputError, UnknownName
from evalkit.types import Choose, Completion, Generate, Request


def asked(n: int, choose: bool = False) -> list[Request]:
    ask = Choose(((1,), (2,), (3,), (4,))) if choose else Generate(8)
    return [Request(f"key-{i}", "gsm_cot", f"gsm8k/main/test/{i}", 0, [1, 2, 3], ask) for i in range(n)]


def test_a_function_answers_each_request() -> None:
    done = list(Mock(lambda request: request.sample.upper()).complete(asked(2)))
    assert [(c.key, c.text, c.finish, c.n_prompt) for c in done] == [
        ("key-0", "GSM8K/MAIN/TEST/0", "eos", 3), ("key-1", "GSM8K/MAIN/TEST/1", "eos", 3)]


def test_a_queue_answers_in_order_and_says_when_it_is_empty() -> None:
    done = Mock(["one", Completion("", finish="context"), (-1.0, -2.0)]).complete(asked(4))
    assert [(c.key, c.text, c.finish, c.logprobs) for c in (next(done), next(done), next(done))] == [
        ("key-0", "one", "eos", ()), ("key-1", "", "context", ()), ("key-2", "", "choice", (-1.0, -2.0))]
    with pytest.raises(InputError, match="no answer left for gsm_cot gsm8k/main/test/3"):
        next(done)


def test_as_an_engine_it_is_deterministic_and_out_of_order() -> None:
    engine = create("mock", EngineSpec("none", args={"window": "4"}))
    first, again = list(engine.complete(asked(6))), list(engine.complete(asked(6)))
    assert first == again
    assert [c.key for c in first] == ["key-3", "key-2", "key-1", "key-0", "key-5", "key-4"]
    assert len({c.text for c in first}) > 1
    for completion in engine.complete(asked(3, choose=True)):
        assert len(completion.logprobs) == 4 and sum(map(math.exp, completion.logprobs)) <= 4 * math.exp(-1)


def test_it_pulls_no_further_than_its_window() -> None:
    pulled: list[str] = []

    def requests() -> Iterator[Request]:
        for request in asked(100):
            pulled.append(request.key)
            yield request

    answers = create("mock", EngineSpec("none")).complete(requests())
    next(answers)
    assert len(pulled) == 8


def test_fail_is_the_share_that_fails() -> None:
    done = list(create("mock", EngineSpec("none", args={"fail": "0.3"})).complete(asked(1000)))
    failed = [c for c in done if c.finish == "error"]
    assert 250 < len(failed) < 350 and all(c.error and not c.text for c in failed)


def test_wrong_options() -> None:
    with pytest.raises(UnknownName, match="unknown engine option of mock 'dely'; did you mean 'delay'"):
        create("mock", EngineSpec("none", args={"dely": "1"}))
    with pytest.raises(InputError, match="delay=fast: a number is needed"):
        create("mock", EngineSpec("none", args={"delay": "fast"}))
