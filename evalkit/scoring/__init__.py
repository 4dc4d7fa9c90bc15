"""Completions -> Score, one module for each kind of task. Pure: no model, no file, no process.

    score_sample("exact", sample, [Completion("k", "So the answer is 6.")], {"benchmark": "gsm", "rule": "strict"})
      ->  Score("gsm8k/main/test/0", "scored", 1.0, answer="6")

`code` and `pairwise` need verdicts made elsewhere and are called by themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from evalkit.scoring import choice, exact, f1
from evalkit.types import Completion, Sample, Score, Switches

Scorer = Callable[[Sample, Completion, Switches], Score]
SCORERS: dict[str, Scorer] = {"choice": choice.score, "exact": exact.score, "f1": f1.score}


def score_sample(kind: str, sample: Sample, completions: Sequence[Completion], switches: Switches) -> Score:
    """The verdict on one sample from its one completion, by `kind`: choice, exact or f1.

    `switches` read: `benchmark` and `rule` (exact, f1), `probs` (choice). An error, or no completion, is `failed`.
    """
    if not completions or completions[0].finish == "error":
        return failed(sample, completions[0].error if completions else "no answer")
    return SCORERS[kind](sample, completions[0], switches)


def failed(sample: Sample, why: str) -> Score:
    """No value: the answer could not be had, which is never a zero."""
    return Score(sample.id, "failed", None, group=sample.group, verdicts=(why,))
