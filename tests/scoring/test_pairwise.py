"""Verdicts of a judge as shares of a win."""

import pytest

from evalkit.scoring import pairwise
from evalkit.types import Completion, Sample

SAMPLE = Sample("s", {}, group="g")


@pytest.mark.parametrize(("verdict", "value"), [("baseline", 0.0), ("draw", 0.5), ("model", 1.0)])
def test_a_verdict_has_a_value(verdict, value):
    score = pairwise.score(SAMPLE, Completion("k", "x"), verdict)
    assert (score.status, score.value, score.answer, score.group) == ("scored", value, verdict, "g")


def test_a_reply_without_verdict_is_dropped_from_the_count():
    score = pairwise.score(SAMPLE, Completion("k", "x"), "unparsed")
    assert (score.status, score.value) == ("unparsed", None)


def test_no_answer_or_no_verdict_is_a_failure():
    assert pairwise.score(SAMPLE, Completion("k", finish="error", error="gone"), "model").verdicts == ("gone",)
    assert pairwise.score(SAMPLE, Completion("k", "x"), "").status == "failed"


def test_alpaca_evals_coding():
    found = [pairwise.from_preference(p) for p in (1, 1.0, 2, 2.0, 0, 1.5, None, 3, "1")]
    assert found == ["baseline", "baseline", "model", "model", "draw", "draw", "unparsed", "unparsed", "unparsed"]
