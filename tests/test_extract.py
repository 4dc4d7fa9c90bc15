"""Stop rules and extraction rules on invented answers; the originals' own cases are in test_golden_scoring."""

import pytest

from evalkit import extract
from evalkit.errors import UnknownName
from evalkit.extract import RULES, Answer, cut_text, cut_tokens, find_rule, first_paragraph, kind_of, options_of
from evalkit.types import Sample

NONE = Sample("s", {})
MENU = Sample("s", {"input": "Which fruit?\nOptions:\n(A) pear\n(B) fig\n(C) ripe fig"}, ("(B)",), group="snarks")


def bbh(gold: str, question: str = "") -> Sample:
    return Sample("s", {"input": question}, (gold,))


# ---- stops


def test_text_is_cut_at_the_earliest_stop_and_the_first_listed_names_it():
    assert cut_text("a\ndef b\nclass c", ["\nclass", "\ndef"]) == ("a", "\ndef")
    assert cut_text("a\n\nb", ["\n\n", "\n"]) == ("a", "\n\n")
    assert cut_text("a\n\nb", ["\n", "\n\n"]) == ("a", "\n")
    assert cut_text("\nrest", ["\n"]) == ("", "\n")
    assert cut_text("abc", ["x", ""]) == ("abc", "")
    assert cut_text("abc", []) == ("abc", "")


def test_tokens_are_cut_where_a_whole_sequence_stands():
    assert cut_tokens([5, 13, 1753, 6], [[13, 1990], [13, 1753]]) == ([5], 1)
    assert cut_tokens([5, 13, 99, 13], [[13, 1753]]) == ([5, 13, 99, 13], None)
    assert cut_tokens([13, 1753], [[13], [13, 1753]]) == ([], 0)
    assert cut_tokens([13, 13, 4], [[[13, 13]]]) == ([13, 13, 4], None)  # one list too deep, as the original's for BBH
    assert cut_tokens([1, 2], []) == ([1, 2], None)


# ---- which rules there are


def test_rules_are_found_by_name_and_family():
    assert find_rule("gsm", "strict") == ("strict", RULES["gsm"]["strict"])
    assert find_rule("my_task", "strict")[1] is RULES["text"]["strict"]
    assert find_rule("my_task", "gsm/strict") == ("strict", RULES["gsm"]["strict"])
    with pytest.raises(UnknownName, match=r"'tulu-2023-6'.*did you mean 'tulu-2023-06'"):
        find_rule("gsm", "tulu-2023-6")
    with pytest.raises(UnknownName, match="unknown rule 'fasteval'"):
        find_rule("tydiqa", "fasteval")
    with pytest.raises(UnknownName, match=r"unknown benchmark 'gms'.*'gsm'"):
        find_rule("my_task", "gms/strict")


@pytest.mark.parametrize("benchmark", ["gsm", "bbh", "tydiqa"])
def test_every_recipe_has_its_rule(benchmark):
    assert {"tulu-2023-06", "tulu-2023-11", "strict"} <= RULES[benchmark].keys()


def test_nothing_left_is_not_parsed():
    for benchmark in ("bbh", "tydiqa", "text"):
        for rule in ("tulu-2023-06", "tulu-2023-11", "strict"):
            assert RULES[benchmark][rule]("  \n ", NONE) == Answer("", False), (benchmark, rule)
    assert RULES["gsm"]["tulu-2023-06"]("none at all", NONE) == Answer("none at all", False)
    assert RULES["gsm"]["strict"](" none at all ", NONE) == Answer("none at all", False)


def test_the_two_tulu_rules_of_bbh_differ():
    text = "Well.\n\nThen the answer is (B)."
    assert RULES["bbh"]["tulu-2023-06"](first_paragraph(text), NONE).text == "Well."
    assert RULES["bbh"]["tulu-2023-06"](text, NONE).text == "Well.\n\nThen the answer is (B)."
    assert RULES["bbh"]["tulu-2023-11"](text, NONE).text == "(B)"
    assert RULES["bbh"]["tulu-2023-11"]("|he answer is x.", NONE).text == "x"


# ---- strict: numbers

NUMBERS = {
    # sign
    "-5": "-5", "it fell to -3 degrees": "-3", "\u22127": "-7", "-$142": "-142", "$-142": "-142", "+8": "8",
    "7-3": "3", "7 -3": "3", "9 - 4": "4", "(9)-4": "4", "pages 5\u201310": "10", "a loss of (-6)": "-6", "-0": "0",
    "20%-30%": "30",
    # decimals
    "18.0": "18", "18.50": "18.5", ".5": "0.5", "-.25": "-0.25", "7.": "7", "9.0.": "9", "3,5": "3.5",
    "3.14159": "3.14159",
    # separators
    "1,234,567": "1234567", "1,234.50": "1234.5", "1.234.567": "1234567", "1.234,56": "1234.56", "1 234": "1234",
    "1\u00a0234\u202f567": "1234567", "250 000,75": "250000.75", "1'250": "1250", "12,34,567": "1234567",
    "8,000,": "8000", "$1{,}234$": "1234", "1,2,3": "3", "31, 8": "8", "31,,8": "8", "2024 100": "100", "0012": "12",
    # units and markup
    "$18": "18", "18 dollars": "18", "45%": "45", "25 cm^2": "25", "25 m^{2}": "25", "60 km/h": "60", "€9": "9",
    "**42**": "42", "`42`": "42", "\\$42": "42", "2 million": "2000000", "1.5 billion people": "1500000000",
    "3 thousand-dollar bills": "3", "11:45": "45", "3*4": "4", "5 plums</s>": "5",
    # fractions and powers
    "\u00be": "0.75", "2\u00bd": "2.5", "3/4": "0.75", "1/3": "1/3", "2 1/2": "2.5", "-1 1/4": "-1.25", "5^3": "125",
    "2**3": "8", "10/12/2020": "10", "5/0": "5",
    # other scripts
    "\u0665\u0668": "58", "\u0667\u066c\u0660\u0660\u0661": "7001", "\u0663\u066b\u0665": "3.5", "\uff11\uff15": "15",
    "\u09e7\u09e6": "10", "\u0c68\u0c6b": "25",
}  # fmt: skip
FIRST = {  # of several numbers a statement gives its first, a bare line its last
    "7-3": "7", "7 -3": "7", "9 - 4": "9", "(9)-4": "9", "pages 5\u201310": "5", "20%-30%": "20", "1,2,3": "1",
    "31, 8": "31", "31,,8": "31", "2024 100": "2024", "11:45": "11", "3*4": "3",
}  # fmt: skip


@pytest.mark.parametrize(("text", "number"), NUMBERS.items())
def test_strict_reads_a_number(text, number):
    assert RULES["gsm"]["strict"](text, NONE) == Answer(number, True)
    assert RULES["gsm"]["strict"](f"The answer is {text}", NONE).text == FIRST.get(text, number)


STATED = {
    "So the answer is 4 hours and 20 minutes.": "4",
    "The answer is 3 + 4 = 7.": "7",
    "The answer is that 2 more cows give 25 litres.": "2",
    "The answer is 6.\n\nQuestion: Who has 11 hens?\nAnswer: 11": "6",
    "#### 1,200": "1200",
    "Thus \\boxed{-17} and not 18": "-17",
    "**Final Answer:** $70 for 3": "70",
    "The answer is 5. Wait, the answer is 8. It took 2 days.": "8",
    "The answer to the question is:\n\n12 boxes of 4": "12",
    "We put the answers of 10 people together: 3 agree": "3",
    "The answer is clear. We get 4 + 5 = 9": "9",
}


@pytest.mark.parametrize(("text", "number"), STATED.items())
def test_strict_reads_the_last_stated_number(text, number):
    assert RULES["gsm"]["strict"](text, NONE) == Answer(number, True)


def test_a_number_without_end_is_kept_as_it_is():
    assert RULES["gsm"]["strict"]("7" * 6000, NONE) == Answer("7" * 6000, True)
    assert RULES["gsm"]["strict"]("9^99", NONE).text == str(9**99)


# ---- strict: BBH by the kind of the gold answer


def test_the_kind_is_that_of_the_gold_answer():
    golds = {"(C)": "letter", "B": "letter", "Yes": "yes/no", "False": "true/false", "invalid": "valid/invalid",
             "-13": "number", "] ) >": "brackets", "ant bee cow": "words", "rock, paper & co": "words"}
    assert {gold: kind_of(bbh(gold)) for gold in golds} == golds
    assert kind_of(NONE) == "letter"


BBH = [
    ("(B)", "So the answer is (b).", "B"),
    ("(B)", "B", "B"),
    ("(B)", " b.", "B"),
    ("(B)", "The answer is (A). No: the answer is (B), not a pear.", "B"),
    ("(B)", "The answer is B) figs, as (A) is a pear.", "B"),
    ("(B)", "Option (B) is the one.", "B"),
    ("(B)", "**Answer:** B", "B"),
    ("(B)", "A pear is wrong, I think, so B", "B"),
    ("(B)", "B.\n\nQ: Which one floats?\nA: (C).", "B"),
    ("(B)", "The answer is (A) and (B).", "A B"),
    ("(B)", "Both (B) or (A) would do", "A B"),
    ("Yes", "So the answer is: Yes\nNo more.", "yes"),
    ("No", "So the answer is \uff2e\uff4f\u3002", "no"),
    ("No", " - No", "no"),
    ("Yes", "There is no doubt: yes", "yes"),
    ("False", "not ( True ) is False. So the answer is FALSE.", "false"),
    ("invalid", "The argument is deductively invalid", "invalid"),
    ("invalid", "The argument is not deductively valid.", "invalid"),
    ("24", "The answer is 2.4", "2.4"),
    ("-9", "= 4 - 13 = -9. So the answer is -9.", "-9"),
    ("] ) }", "So the answer is ] ) }.", "])}"),
    ("]", "The stack is [ ( ) and so on\n ]", "]"),
    ("ant bee cow", "So the answer is Ant, bee, cow.", "ant bee cow"),
    ("ant bee cow", "Sorted:\n1. ant\n2. bee\n3. cow", "ant bee cow"),
    ("ant bee cow", "Sorted words: ant bee cow", "ant bee cow"),
    ("ant o'clock re-do", "\"ant\" \"o'clock\" re-do", "ant o'clock re-do"),
]


@pytest.mark.parametrize(("gold", "text", "read"), BBH)
def test_strict_reads_bbh(gold, text, read):
    assert RULES["bbh"]["strict"](text, bbh(gold)) == Answer(read, True)


@pytest.mark.parametrize(("gold", "text"), [
    ("(B)", "I cannot say."), ("Yes", "Perhaps."), ("7", "seven"), ("]", "closed"), ("ant bee", "?!"), ("(B)", "(K)"),
])
def test_strict_does_not_guess(gold, text):
    sample = bbh(gold, "Which?\n(A) pear\n(B) fig")
    assert RULES["bbh"]["strict"](text, sample) == Answer(text, False)


def test_an_option_text_counts_when_it_is_all_there_is():
    assert RULES["bbh"]["strict"]("The answer is ripe fig.", MENU) == Answer("C", True)
    assert not RULES["bbh"]["strict"]("I like a ripe fig best.", MENU).parsed


# ---- fasteval


def test_fasteval_options_are_lines_of_the_question_and_choices():
    assert options_of(MENU) == [("A", "pear"), ("B", "fig"), ("C", "ripe fig")]
    row = Sample("s", {"question": "Which?\n(1) one\n(A)", "choices": ("x\ny", "", "z")})
    assert options_of(row) == [("A", "x"), ("C", "z")]


@pytest.mark.parametrize(("text", "letter"), [
    ("(A) or (C)", "C"), ("so A) it is", "A"), ("it is B", "B"), ("take B, please", "B"), ("=C", "C"), ("<C>", "C"),
    ("(A)\nit is B!", "B"),  # the last line first
    ("(A) and C)", "A"),  # the strictest form first
    ("(K)\n(A)", "A"),  # no option of the question
    ("a ripe fig", "B"),  # an option's text, the right-most; `fig` begins further right than `ripe fig`
    ("Fig (b)", None),
])  # fmt: skip
def test_fasteval_reads_a_letter(text, letter):
    assert RULES["bbh"]["fasteval"](text, MENU) == Answer(letter or text, letter is not None)


def test_fasteval_reads_the_last_number_of_the_last_line_with_one():
    read = RULES["gsm"]["fasteval"]
    assert read("1\n-2,000.5 and 7\nnone", NONE) == Answer("7", True)
    assert read("it is -2,000.5!", NONE) == Answer("2000.5", True)
    assert read("none", NONE) == Answer("none", False)


def test_rules_do_not_depend_on_each_other_or_on_earlier_calls():
    texts = [*NUMBERS, *STATED, *(text for _, text, _ in BBH)]
    first = {(b, name, t): rule(t, MENU) for b, rules in RULES.items() for name, rule in rules.items() for t in texts}
    again = {key: RULES[key[0]][key[1]](key[2], MENU) for key in reversed(first)}
    assert again == first
    assert extract.RULES is RULES
