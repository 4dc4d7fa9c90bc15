"""Win rate against a baseline: each sample's value is the judge's verdict as a share of a win.

    "model" -> 1.0     "draw" -> 0.5     "baseline" -> 0.0     "unparsed" -> no value: dropped from the count
"""

from __future__ import annotations

from typing import Any

from evalkit.types import Completion, Sample, Score

VALUES = {"baseline": 0.0, "draw": 0.5, "model": 1.0}


def score(sample: Sample, completion: Completion, verdict: str) -> Score:
    """`verdict`: a key of VALUES, or `unparsed` (the judge's reply said nothing: shown, and dropped from the mean
    as alpaca_eval drops it). An error answer, or no verdict at all (""), is `failed`.
    """
    if completion.finish == "error" or not verdict:
        return Score(sample.id, "failed", None, group=sample.group, verdicts=(completion.error or "not judged",))
    status = "scored" if verdict in VALUES else "unparsed"
    return Score(sample.id, status, VALUES.get(verdict), verdict, sample.group)


def from_preference(preference: Any) -> str:
    """alpaca_eval's coding as a verdict: 1 the baseline, 2 the model, 0 or 1.5 a draw, anything else `unparsed`."""
    return {1: "baseline", 2: "model", 0: "draw", 1.5: "draw"}.get(preference, "unparsed")
