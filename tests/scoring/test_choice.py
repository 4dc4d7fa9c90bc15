"""Options: softmax in the originals' number types, ties, underflow, and what is not an answer."""

import math

import pytest

from evalkit.scoring import choice, score_sample
from evalkit.types import Completion, Sample

SAMPLE = Sample("anatomy/test/1", {}, ("B",), ("A", "B", "C", "D"), "anatomy")
OPTIONS, VOCABULARY = {"probs": "options"}, {"probs": "vocabulary"}


def asked(*logprobs, finish="choice"):
    return [Completion("k", logprobs=logprobs, finish=finish)]


def test_the_most_probable_option_is_the_answer():
    score = score_sample("choice", SAMPLE, asked(-3.0, -0.5, -2.0, -9.0), OPTIONS)
    assert (score.status, score.value, score.answer, score.group) == ("scored", 1.0, "B", "anatomy")
    assert score_sample("choice", SAMPLE, asked(-0.4, -0.5, -2.0, -9.0), OPTIONS).value == 0.0


@pytest.mark.parametrize("switches", [OPTIONS, VOCABULARY])
def test_a_tie_goes_to_the_first_option(switches):
    assert score_sample("choice", SAMPLE, asked(-2.0, -1.0, -1.0, -1.0), switches).answer == "B"
    # a difference below float32's grain is a tie
    assert score_sample("choice", SAMPLE, asked(-1.0, -1.0 + 1e-9, -3.0, -3.0), switches).answer == "A"


def test_underflow_says_the_first_only_over_the_vocabulary():
    far = asked(-104.0, -103.99, -200.0, -104.0)
    assert score_sample("choice", SAMPLE, far, OPTIONS).answer == "B"
    assert score_sample("choice", SAMPLE, far, VOCABULARY).answer == "A"
    assert score_sample("choice", SAMPLE, asked(-99.0, -98.0, -99.0, -99.0), VOCABULARY).answer == "B"  # subnormal


@pytest.mark.parametrize("logprobs", [(), (-1.0, -2.0), (math.nan, -1.0, -1.0, -1.0), (-math.inf,) * 4])
def test_no_usable_log_probability_is_a_failure(logprobs):
    score = score_sample("choice", SAMPLE, asked(*logprobs), OPTIONS)
    assert (score.status, score.value) == ("failed", None)
    assert "A B C D" in score.verdicts[0]


def test_an_option_of_no_probability_is_not_chosen():
    assert score_sample("choice", SAMPLE, asked(-math.inf, -300.0, -math.inf, -math.inf), OPTIONS).answer == "B"


def test_a_prompt_over_the_context_is_an_empty_answer():
    score = score_sample("choice", SAMPLE, asked(finish="context"), VOCABULARY)
    assert (score.status, score.value, score.answer) == ("unparsed", 0.0, "")


def test_an_error_or_no_completion_has_no_value():
    for kind in ("choice", "exact", "f1"):
        broken = score_sample(kind, SAMPLE, [Completion("k", finish="error", error="out of memory")], {})
        assert (broken.status, broken.value, broken.verdicts) == ("failed", None, ("out of memory",))
        assert score_sample(kind, SAMPLE, [], {}).verdicts == ("no answer",)


@pytest.mark.parametrize(("dtype", "near", "far"), [
    ("float32", 1e-7, 1e-5), ("float16", 1e-3, 1e-2), ("bfloat16", 1e-2, 1e-1),
])  # fmt: skip
def test_each_number_type_has_its_own_grain(dtype, near, far):
    first, second = choice.softmax([8.0, 8.0 + near], dtype)
    assert first == second
    first, second = choice.softmax([8.0, 8.0 + far], dtype)
    assert first < second


def test_rounding_to_bfloat16_is_to_the_nearest_even():
    values = {1.0: 1.0, 1.00390625: 1.0, 1.01171875: 1.015625, -3.14159: -3.140625}
    assert {x: choice.ROUND["bfloat16"](x) for x in values} == values


def test_softmax_adds_up():
    assert math.fsum(choice.softmax([3.0, 1.0, 0.2, -4.0])) == pytest.approx(1.0, abs=1e-7)
    assert choice.softmax([1e4, 1e4 + 1]) == pytest.approx([1 / (1 + math.e), math.e / (1 + math.e)], rel=1e-7)
