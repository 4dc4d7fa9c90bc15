"""Programs are prompt and completion; pass@k comes from all verdicts of a problem or not at all."""

import pytest

from evalkit.sandbox import Verdict
from evalkit.scoring import code
from evalkit.types import Completion, Sample

SAMPLE = Sample("HumanEval/3", {"prompt": "def f(x):\n", "test": "def check(f): ...", "entry_point": "f"})


def verdicts(*words):
    return {f"HumanEval/3#{i}": Verdict(f"HumanEval/3#{i}", word, "", 0.1) for i, word in enumerate(words)}


def answers(n, **last):
    return [Completion("k", "    return x\n")] * (n - bool(last)) + ([Completion("k", **last)] if last else [])


def test_a_program_is_prompt_and_completion_and_an_error_has_none():
    made = code.programs(SAMPLE, [Completion("k", finish="error"), *answers(1)], {})
    assert [(p.id, p.code, p.test, p.entry_point) for p in made] == [
        ("HumanEval/3#1", "def f(x):\n    return x\n", "def check(f): ...", "f")
    ]


def test_pass_at_k_from_the_verdicts():
    words = ("passed", "failed", "timed_out", "crashed")
    score = code.score(SAMPLE, answers(4), verdicts(*words), {"k": 2, "samples": 4})
    assert (score.status, score.answer, score.verdicts) == ("scored", "1/4", words)
    assert score.value == pytest.approx(0.5, abs=1e-15)
    assert code.score(SAMPLE, answers(4), verdicts(*["unfinished"] * 4), {"k": 1, "samples": 4}).value == 0.0


@pytest.mark.parametrize(("done", "words", "k"), [
    (answers(2, finish="error", error="gone"), ("passed", "passed"), 1),
    (answers(1), ("passed",), 1),  # of two samples one is missing
    (answers(2), ("passed",), 1),  # one has no verdict
    (answers(2), ("passed", "broken"), 1),  # the sandbox could not run one
    (answers(2), ("passed", "passed"), 3),  # k over n
])  # fmt: skip
def test_a_gap_is_a_failure_and_never_a_zero(done, words, k):
    score = code.score(SAMPLE, done, verdicts(*words), {"k": k, "samples": 2})
    assert (score.status, score.value) == ("failed", None)
