"""Exact match under each rule, through score_sample."""

import pytest

from evalkit.errors import UnknownName
from evalkit.scoring import score_sample
from evalkit.types import Completion, Sample


def scored(benchmark, rule, text, *target, finish="eos", **fields):
    sample = Sample("s", fields, target, group="g")
    return score_sample("exact", sample, [Completion("k", text, finish=finish)], {"benchmark": benchmark, "rule": rule})


@pytest.mark.parametrize(("text", "gold", "original", "strict"), [
    ("18.00", "18", 0, 1),  # 1800 for the original
    ("-5", "5", 1, 0),
    ("1.5", "15", 1, 0),
    ("1 234", "1234", 0, 1),
    ("\u0664\u0662", "42", 0, 1),
    ("the answer is 6, for 2 days", "6", 0, 1),
    ("6", "7", 0, 0),
])  # fmt: skip
def test_gsm(text, gold, original, strict):
    assert scored("gsm", "tulu-2023-06", text, gold).value == original
    assert scored("gsm", "tulu-2023-11", text, gold).value == original
    assert scored("gsm", "strict", text, gold).value == strict


@pytest.mark.parametrize(("text", "gold", "original", "strict"), [
    ("So the answer is (b).", "(B)", 1, 1),
    ("So the answer is (B)", "(B)", 0, 1),  # no period
    ("So the answer is ) ).", "] ]", 1, 0),  # every bracket is punctuation
    ("", "]", 1, 0),
    ("9", "-9", 1, 0),
    ("ant  bee", "ant bee", 0, 1),
    ("So the answer is No\uff0c I think.", "No", 0, 1),
])  # fmt: skip
def test_bbh(text, gold, original, strict):
    assert scored("bbh", "tulu-2023-06", text, gold).value == original
    assert scored("bbh", "strict", text, gold).value == strict


def test_an_unparsed_answer_keeps_the_originals_value():
    score = scored("bbh", "tulu-2023-06", " ", "]", finish="context")
    assert (score.status, score.value, score.answer, score.group) == ("unparsed", 1.0, "", "g")
    assert scored("gsm", "tulu-2023-06", "none", "7").status == "unparsed"
    assert scored("gsm", "strict", "seven", "seven").value == 0.0  # nothing was read


def test_any_gold_answer_will_do():
    assert scored("my_task", "tulu-2023-06", " Blue! ", "red", "blue").value == 1.0
    assert scored("my_task", "strict", "Blue.", "red", "blue").value == 1.0
    assert scored("my_task", "strict", "bl-ue", "blue").value == 0.0
    assert scored("my_task", "gsm/strict", "That is 2.50", "2.5").value == 1.0


def test_fasteval_compares_floats_and_gives_chance_credit():
    assert scored("gsm", "fasteval", "7.000000001", "so it is\n#### 7").value == 1.0
    assert scored("gsm", "fasteval", "7.0000001", "7").value == 0.0
    assert scored("gsm", "fasteval", "-7", "-7").value == 0.0  # reads no sign
    assert scored("gsm", "fasteval", "1,000", "1000").value == 1.0
    none = scored("gsm", "fasteval", "none", "7")
    assert (none.status, none.value) == ("unparsed", 0.0)
    menu = "Which?\n(A) ant\n(B) bee\n(C) cow"
    assert scored("bbh", "fasteval", "so (B)", "(B)", input=menu).value == 1.0
    assert scored("bbh", "fasteval", "so (A)", "(B)", input=menu).value == 0.0
    lost = scored("bbh", "fasteval", "?", "(B)", input=menu)
    assert (lost.status, lost.value) == ("unparsed", 1 / 3)
    assert scored("mmlu", "fasteval", "a bee", "B", question="Which?", choices=("ant", "bee")).value == 1.0
    assert scored("bbh", "fasteval", "yes", "Yes", input="Is it?").value == 0.0  # no options: nothing to read


def test_an_unknown_rule_is_named():
    with pytest.raises(UnknownName, match="unknown rule 'strcit'; did you mean 'strict'"):
        scored("gsm", "strcit", "6", "6")
