"""Programs from completions, and pass@k from their verdicts; what runs them is `evalkit.sandbox`.

    programs(sample, completions, switches)         ->  Program("HumanEval/3#0", "def f(x): ...", test, "f"), ...
    score(sample, completions, verdicts, switches)  ->  Score("HumanEval/3", "scored", 0.6, answer="12/20")
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from evalkit.sandbox import Program, Verdict
from evalkit.stats import pass_at_k
from evalkit.types import Completion, Sample, Score, Switches


def programs(sample: Sample, completions: Sequence[Completion], switches: Switches) -> list[Program]:
    """One program for each completion that is not an error: the prompt and what the model wrote after it.

    `sample.fields`: `prompt`, `test` (defines `check`) and `entry_point`, as in HumanEval.
    """
    fields = sample.fields
    return [Program(f"{sample.id}#{i}", fields["prompt"] + done.text, fields["test"], fields["entry_point"])
            for i, done in enumerate(completions) if done.finish != "error"]


def score(
    sample: Sample, completions: Sequence[Completion], verdicts: Mapping[str, Verdict], switches: Switches
) -> Score:
    """pass@k for `switches["k"]` from all completions; `verdicts` is keyed by program id.

    `failed` where a completion is an error or missing, or a program has no verdict of its own (`broken`).
    """
    words = [_word(done, verdicts.get(f"{sample.id}#{i}")) for i, done in enumerate(completions)]
    words += ["missing"] * (int(switches.get("samples", 1)) - len(words))
    passed, k = words.count("passed"), int(switches["k"])
    answer = f"{passed}/{len(words)}"
    if {"error", "missing", "broken"} & set(words) or k > len(words):
        return Score(sample.id, "failed", None, answer, sample.group, tuple(words))
    return Score(sample.id, "scored", pass_at_k(len(words), passed, k), answer, sample.group, tuple(words))


def _word(completion: Completion, verdict: Verdict | None) -> str:
    if completion.finish == "error":
        return "error"
    return verdict.status if verdict is not None else "missing"
