"""Scoring a file of answers, and a column's answers under several rules; bad files are named to the field."""

import gzip
import json

import pytest

from evalkit.errors import InputError, UnknownName
from evalkit.rescore import rule_names, score_answers, score_file
from evalkit.types import Column, Completion, Sample


@pytest.fixture
def scored(tmp_path):
    """score(task, rule, *rows) -> results; a row is an object or a line as it is."""

    def score(task, rule, *rows, **options):
        path = tmp_path / "answers.jsonl"
        path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows), encoding="utf-8")
        return list(score_file(task, rule, path, **options))

    return score


def test_a_result_for_each_line_and_a_summary(scored):
    *results, summary = scored(
        "gsm_cot", "strict",
        {"id": "a", "output": "It is 1,250.", "target": "1250", "group": "x"},
        "",
        {"raw_output": "none", "target": 7, "meta": {"group": "x"}},
        {"output": "3", "target": ["2", "3"], "group": "y"},
        {"output": "3", "target": 2.5, "group": "y"},
    )  # fmt: skip
    assert results == [
        {"id": "a", "status": "scored", "answer": "1250", "value": 1.0},
        {"id": "3", "status": "unparsed", "answer": "none", "value": 0.0},
        {"id": "4", "status": "scored", "answer": "3", "value": 1.0},
        {"id": "5", "status": "scored", "answer": "3", "value": 0.0},
    ]
    assert summary == {"summary": True, "task": "gsm", "rule": "strict", "n": 4, "scored": 3, "unparsed": 1,
                       "value": 0.5, "group_mean": 0.5}


def test_the_mean_of_groups_is_not_the_mean_of_all(scored):
    rows = [{"output": o, "target": "1", "group": g} for o, g in (("1", "x"), ("1", "x"), ("1", "x"), ("2", "y"))]
    summary = scored("gsm", "strict", *rows)[-1]
    assert (summary["value"], summary["group_mean"]) == (0.75, 0.5)


def test_a_zipped_file_is_read(tmp_path):
    path = tmp_path / "answers.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"output": "the Fort", "target": "fort"}\n'))
    first, _ = score_file("tydiqa", "strict", path)
    assert first == {"id": "1", "status": "scored", "answer": "the Fort", "value": 1.0, "exact_match": 1.0}


def test_mmlu_takes_logits_by_letter_or_as_recorded(scored):
    rows = [
        {"output": {"A": 1, "B": 3.5, "C": 2, "D": 0}, "target": "B"},
        {"output": {"logits_ABCD": [0, 1, 2, 3.5], "largest_other_logit": 130.0, "dtype": "float32"}, "target": 0},
        {"output": {"x": 1.0, "y": 2.0}, "target": "y", "options": ["x", "y"]},
    ]
    by_options = scored("mmlu", "tulu-2023-06", *rows)
    assert [(r["answer"], r["value"]) for r in by_options[:-1]] == [("B", 1.0), ("D", 0.0), ("y", 1.0)]
    assert [r["answer"] for r in scored("mmlu_5shot", "tulu-2023-11", *rows)[:-1]] == ["B", "A", "y"]  # all underflow


def test_mmlu_takes_text_under_strict_and_fasteval(scored):
    row = {"output": "So it is (B), I think.", "target": 1, "options": ["an ant", "a bee"], "question": "Which?"}
    assert scored("mmlu", "strict", row)[0]["answer"] == "B"
    assert scored("mmlu", "fasteval", {**row, "output": "?"})[0]["value"] == 0.5
    with pytest.raises(InputError, match=r"line 1: field 'output' is text: unknown rule 'tulu-2023-06'"):
        scored("mmlu", "tulu-2023-06", row)


def test_stops_cut_first_and_without_a_target_that_is_all(scored):
    rows = [
        {"output": " 5\nQuestion: 8", "stop": ["\n"]},
        {"output": " 5", "stop": ["\n"], "target": None},
        {"output": " 5\nQuestion: 8", "stop": None},
        {"output": " 5\nQuestion: 8", "stop": ["\n"], "target": "5"},
    ]
    *results, summary = scored("gsm", "tulu-2023-06", *rows)
    assert [(r["status"], r["answer"], r["value"]) for r in results] == [
        ("stopped", " 5", None), ("whole", " 5", None), ("whole", " 5\nQuestion: 8", None), ("scored", "5", 1.0),
    ]  # fmt: skip
    assert results[0]["stop"] == "\n"
    assert (summary["n"], summary["value"]) == (4, 1.0)


def test_token_stops_need_a_tokenizer(scored, shared):
    row = {"output": "    x = 1\nclassify(x)\n\ndefault = 2", "stop_id_sequences": [[13, 1990], [13, 1753]]}
    tokenizer = str(shared / "data/tokenizers/tulu")
    assert scored("codex", "tulu-2023-06", row, tokenizer=tokenizer)[0]["answer"] == "    x = 1"
    with pytest.raises(InputError, match=r"line 1: field 'stop_id_sequences' needs .* --tokenizer FOLDER"):
        scored("codex", "tulu-2023-06", row)


def test_pass_at_k(scored):
    *results, summary = scored("codex", "strict", {"n": 4, "c": 1, "k": 2}, {"n": [2, 2], "c": [0, 2], "k": 1})
    assert [r["value"] for r in results] == pytest.approx([0.5, 0.5], abs=1e-15)
    assert [r["answer"] for r in results] == ["1/4", "[0, 2]/[2, 2]"]
    assert summary["n"] == 2


def test_preferences_give_the_win_rate(scored):
    rows = [{"preference": p} for p in (2, 2.0, 1, 1.5, None)]
    *results, summary = scored("alpaca_farm", "strict", *rows)
    assert [r["answer"] for r in results] == ["model", "model", "baseline", "draw", "unparsed"]
    assert (summary["n"], summary["value"], summary["unparsed"]) == (5, 0.625, 1)
    assert summary["standard_error"] == pytest.approx(0.239356776939085, rel=1e-12)


@pytest.mark.parametrize(("task", "row", "message"), [
    ("gsm", "{", r"answers.jsonl, line 1: not valid JSON"),
    ("gsm", "[1]", r"answers.jsonl, line 1: not a JSON object"),
    ("gsm", {"target": "1"}, r"answers.jsonl, line 1: no field 'output'; it must be text"),
    ("gsm", {"output": "1"}, r"answers.jsonl, line 1: no field 'target'"),
    ("gsm", {"output": None, "target": "1"}, r"line 1: field 'output' is null; it must be text"),
    ("gsm", {"raw_output": 5, "target": "1"}, r"line 1: field 'raw_output' is 5; it must be text"),
    ("gsm", {"output": "1", "target": []}, r"line 1: field 'target' is an empty list"),
    ("gsm", {"output": "1", "target": True}, r"line 1: field 'target' is true"),
    ("gsm", {"output": "1", "stop": "\n"}, r"line 1: field 'stop' is \"\\n\"; it must be a list of texts or null"),
    ("mmlu", {"output": {"A": 1, "B": 2}, "target": "A"}, r"line 1: field 'output' needs a finite"),
    ("mmlu", {"output": {"A": 1, "B": 2, "C": 3, "D": "x"}, "target": "A"}, r"line 1: field 'output' needs a finite"),
    ("mmlu", {"output": "A", "target": 4}, r"line 1: field 'target' is 4; there are 4 options"),
    ("mmlu", {"output": {"logits_ABCD": [1, 2, 3, 4], "dtype": "int8"}, "target": "A"}, r"line 1: field 'dtype' is"),
    ("mmlu", {"output": {"logits_ABCD": [1, 2, 3, 7e4], "dtype": "float16"}, "target": "A"}, r"1: .*beyond float16"),
    ("codex", {"output": "x", "target": "HumanEval/900"}, r"unknown HumanEval task 'HumanEval/900'.*line 1"),
    ("codex", {"n": 1, "c": 2, "k": 1}, r"line 1: fields 'n', 'c' and 'k': pass@k needs"),
    ("alpaca_farm", {"output": "model"}, r"line 1: field 'output' is \"model\"; it must be 1, 2, 0, 1.5 or null"),
])  # fmt: skip
def test_a_bad_line_is_named_before_any_result(scored, task, row, message):
    with pytest.raises(InputError, match=message):
        scored(task, "strict", row)


def test_bad_names_and_files(scored, tmp_path):
    with pytest.raises(UnknownName, match="unknown task 'gsm_cto'; did you mean 'gsm_cot'"):
        scored("gsm_cto", "strict")
    with pytest.raises(UnknownName, match="unknown rule 'fasteval'"):
        scored("tydiqa", "fasteval")
    with pytest.raises(UnknownName, match="unknown rule 'strictly'; did you mean 'strict'"):
        scored("codex", "strictly")
    with pytest.raises(InputError, match="line 1: field 'target' is 'six'; rule fasteval needs a number"):
        scored("gsm", "fasteval", {"output": "6", "target": "six"})
    with pytest.raises(InputError, match=r"none.jsonl: cannot be read"):
        score_file("gsm", "strict", tmp_path / "none.jsonl")
    (tmp_path / "latin.jsonl").write_bytes(b'{"output": "\xe9"}\n')
    with pytest.raises(InputError, match=r"latin.jsonl: cannot be read"):
        score_file("gsm", "strict", tmp_path / "latin.jsonl")


# ---- a run's answers under several rules

COLUMN = Column("gsm_cot", "gsm", "GSM CoT", "gsm", {"benchmark": "gsm", "rule": "tulu-2023-06"})
SAMPLES = [Sample("0", {}, ("5",)), Sample("1", {}, ("18",)), Sample("2", {}, ("7",)), Sample("3", {}, ("7",))]
ANSWERS = {"0": [Completion("k", "-5")], "1": [Completion("k", "18.0")], "2": [Completion("k", "it is 7")]}


def test_rules_stand_side_by_side_and_changed_verdicts_are_listed():
    found = score_answers("exact", COLUMN, SAMPLES, ANSWERS)
    assert list(found.scores) == ["tulu-2023-06", "tulu-2023-11", "strict", "fasteval"]
    assert [s.value for s in found.scores["tulu-2023-06"]] == [1.0, 0.0, 1.0, None]
    assert [s.value for s in found.scores["strict"]] == [0.0, 1.0, 1.0, None]
    assert [(row[0].sample, [s.answer for s in row]) for row in found.changed] == [
        ("0", ["5", "5", "-5", "5"]), ("1", ["18.0", "18.0", "18", "18.0"]),
    ]  # fmt: skip
    assert score_answers("exact", COLUMN, SAMPLES, ANSWERS, ["strict"]).changed == []
    with pytest.raises(UnknownName, match=r"unknown rule 'stric'; did you mean 'strict'.*column gsm_cot"):
        score_answers("exact", COLUMN, SAMPLES, ANSWERS, ["stric"])


def test_a_choice_column_is_scored_over_options_and_over_the_vocabulary():
    column = Column("mmlu_0shot", "mmlu", "MMLU", "mmlu", {"benchmark": "mmlu", "rule": "strict", "probs": "options"})
    answers = {"0": [Completion("k", logprobs=(-200.0, -199.0), finish="choice")]}
    found = score_answers("choice", column, [Sample("0", {}, ("y",), ("x", "y"))], answers)
    assert {rule: scores[0].answer for rule, scores in found.scores.items()} == {
        "tulu-2023-06": "y", "tulu-2023-11": "x", "strict": "y",
    }  # fmt: skip
    assert len(found.changed) == 1


def test_code_and_verdicts_have_no_rules():
    assert rule_names("code", "codex") == rule_names("pairwise", "alpaca_farm") == ()
    column = Column("codex_p1", "codex", "Codex", "codex", {})
    assert score_answers("code", column, SAMPLES, ANSWERS).changed == []


def test_newline_ids_need_no_tokenizer_and_others_do(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [{"output": " 1\n2", "stop_id_sequences": [[13]]}, {"output": "a\n\nb", "stop_id_sequences": [[[13, 13]]]},
            {"output": "a\n\nb", "stop_id_sequences": [[13, 13]]}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = list(score_file("gsm", "tulu-2023-06", path))[:-1]
    assert [r["answer"] for r in found] == [" 1", "a\n\nb", "a"]
    path.write_text(json.dumps({"output": "x", "stop_id_sequences": [[13, 1990]]}))
    with pytest.raises(InputError, match="needs the model's tokenizer"):
        list(score_file("codex", "tulu-2023-06", path))
