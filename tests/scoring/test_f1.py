"""SQuAD v1.1's token F1 and exact match; strict's punctuation of the nine languages."""

import pytest

from evalkit.scoring import f1, score_sample
from evalkit.types import Completion, Sample


def value(rule, text, *target):
    done = [Completion("k", text)]
    return score_sample("f1", Sample("s", {}, target), done, {"benchmark": "tydiqa", "rule": rule}).value


@pytest.mark.parametrize(("text", "target", "share"), [
    ("the Red  Fort", ("red fort",), 1.0),
    ("Red Fort, Delhi", ("red fort",), 0.8),
    ("red red", ("red",), 2 / 3),
    ("blue", ("red", "blue sky", "sky"), 2 / 3),
    ("the", ("an",), 0.0),  # nothing left on either side: F1 0 though the texts are equal
    ("won't", ("wont",), 1.0),
    ("re-do", ("re do",), 0.0),
])  # fmt: skip
def test_f1(text, target, share):
    assert value("tulu-2023-06", text, *target) == pytest.approx(share, abs=1e-15)
    assert value("tulu-2023-11", text, *target) == value("tulu-2023-06", text, *target)


# danda, double danda, Arabic comma, semicolon and question mark, guillemets, curly and low quotes, en dash, corner
# brackets, CJK full stop, Telugu siddham, ellipsis
MARKS = (
    "\u0964\u0965\u060c\u061b\u061f\u00ab\u00bb\u201c"
    "\u201d\u2018\u2019\u201e\u2013\u300c\u300d\u3002\u0c77\u2026"
)


@pytest.mark.parametrize("mark", MARKS)
def test_strict_drops_every_scripts_punctuation(mark):
    for text in (f"alma ata{mark}", f"{mark}alma ata", f"al{mark}ma ata"):
        assert value("strict", text, "alma ata") == 1.0
        assert value("tulu-2023-06", text, "alma ata") == 0.5


def test_strict_keeps_letters_marks_and_digits_of_every_script():
    telugu = "\u0c15\u0c43\u0c37\u0c4d\u0c23\u0c3e"
    for word in (telugu, "\u09a2\u09be\u0995\u09be", "\uc11c\uc6b8", "\u0661\u0669", "5\u00b0"):
        assert f1.tokens(word, every_script=True) == [word]


def test_exact_match_is_equality_of_what_is_left():
    assert f1.exact("The Red-Fort!", ["x", "redfort"]) == 1.0
    assert f1.exact("a", ["an"]) == 1.0
    assert f1.exact("red", ["red fort"]) == 0.0


def test_an_empty_answer_is_unparsed():
    switches = {"benchmark": "tydiqa", "rule": "strict"}
    score = score_sample("f1", Sample("s", {}, ("x",)), [Completion("k", " \n")], switches)
    assert (score.status, score.value, score.answer) == ("unparsed", 0.0, "")
