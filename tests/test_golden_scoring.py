"""Every golden scoring row, exactly, through `score_file`: what the original code read from an answer and scored.

Also that each of these tests can fail: one changed byte of a group's rows is reported.
"""

import json
from pathlib import Path

import pytest

from evalkit.rescore import score_file

RULES = {"P1": "tulu-2023-06", "P2": "tulu-2023-11"}
GROUPS = [
    *((column, protocol, "score") for column in ("gsm", "bbh", "tydiqa", "mmlu") for protocol in RULES),
    *((column, protocol, "stop") for column in ("gsm", "bbh", "tydiqa", "codex_eval") for protocol in RULES),
    ("codex_eval", "P1", "score"),
    ("codex_eval", "P1", "pass_at_k"),
]


@pytest.fixture(scope="module")
def rows(shared: Path) -> dict:
    found: dict = {}
    for line in (shared / "golden/scoring.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        found.setdefault((row["column"], row["protocol"], row["stage"]), []).append(row)
    return found


def differences(rows: list[dict], results: list[dict]) -> list[str]:
    """What does not equal the original, row by row; the golden F1 and exact match are in percent."""
    found = []
    for row, result in zip(rows, results, strict=True):
        if row["stage"] == "pass_at_k":
            same = abs(result["value"] - row["expected"]) <= 1e-12
        elif row["stage"] == "stop":
            same = result["answer"] == row["parsed"] and result["value"] is None
        elif row["column"] == "tydiqa":
            scores = {"f1": 100 * result["value"], "exact_match": 100 * result["exact_match"]}
            same = result["answer"] == row["parsed"] and scores == row["score"]
        elif row["column"] == "codex_eval":
            same = result["value"] == row["score"]
        else:
            same = result["answer"] == row["parsed"] and result["value"] == row["score"]
        if not same:
            found.append(f"{row}\n  -> {result}")
    return found


def score(group: tuple[str, str, str], rows: list[dict], tmp_path: Path, shared: Path) -> list[dict]:
    path = tmp_path / "answers.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    *results, summary = score_file(group[0], RULES[group[1]], path, str(shared / "data/tokenizers/tulu"))
    assert summary["summary"] and summary["n"] == len(rows)
    return results


@pytest.mark.parametrize("group", GROUPS, ids="-".join)
def test_equals_the_original(group, rows, tmp_path, shared):
    assert differences(rows[group], score(group, rows[group], tmp_path, shared)) == []


def test_every_row_is_in_a_group(rows):
    assert sorted(rows) == sorted(GROUPS)
    assert sum(map(len, rows.values())) == 361


def test_probabilities_equal_the_originals_to_float32s_grain(rows, tmp_path, shared):
    for protocol in RULES:
        group = ("mmlu", protocol, "score")
        for row, result in zip(rows[group], score(group, rows[group], tmp_path, shared), strict=True):
            assert result["probs"] == pytest.approx(row["meta"]["probs"], rel=4e-7, abs=0)


def changed(row: dict) -> dict:
    """`row` with one byte of its answer (a logit, the count of right ones) changed, so that its verdict must change."""
    if row["stage"] == "pass_at_k":
        return {**row, "c": row["c"] + 1}
    output = row["raw_output"]
    if row["column"] == "mmlu":
        first, *others = output["logits_ABCD"]  # 10.004 becomes 90.004
        return {**row, "raw_output": {**output, "logits_ABCD": [first + 80, *others]}}
    if row["column"] == "codex_eval" and row["stage"] == "score":
        return {**row, "raw_output": output.replace("return", "retorn", 1)}
    at = output.rindex(row["parsed"]) if row["parsed"] else 0
    return {**row, "raw_output": f"{output[:at]}{chr(ord(output[at]) + 1)}{output[at + 1 :]}"}


@pytest.mark.parametrize("group", GROUPS, ids="-".join)
def test_a_changed_byte_is_seen(group, rows, tmp_path, shared):
    row = rows[group][1 if group[2] == "pass_at_k" else 0]
    assert len(differences([row], score(group, [changed(row)], tmp_path, shared))) == 1
