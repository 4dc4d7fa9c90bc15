"""Every golden prompt, made by running the original code, equal to the byte through `evalkit prompts`.

A row's column, protocol, chat, id, tokenizer and nan_cell say which command asks for it; nothing else is read.
"""

import json
from collections import defaultdict
from pathlib import Path

import pytest

from evalkit.cli import main

RECIPES = {"P1": "tulu-2023-06", "P2": "tulu-2023-11"}
COLUMNS = {"codex_eval": "codex_p1"}


def golden(shared: Path) -> list[dict]:
    lines = (shared / "golden" / "prompts.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def command(shared: Path, key: tuple) -> list[str]:
    column, protocol, chat, tokenizer, nan_cell = key
    name = COLUMNS.get(column, column)
    sets = ["tydiqa.exemplar=first"]
    if nan_cell:
        sets.append("mmlu.none_cell=nan")
    if column == "codex_eval" and chat == "tulu":
        sets.append("codex.chat=true")
    if column == "alpaca_farm" and chat == "none":
        sets.append("alpaca_farm.chat=false")
    own = str(shared / "data/tokenizers/tulu")
    model = ["--model", "smollm2-135m-instruct"] if tokenizer else ["--model", "tulu-7b", "--tokenizer", own]
    return ["prompts", *model, "--format", chat, "--recipe", RECIPES[protocol], "--tasks", name, "--json",
            "--data", str(shared / "data/hub"), *(part for item in sets for part in ("--set", item))]


def key_of(row: dict) -> tuple:
    meta = row["meta"]
    other = meta.get("tokenizer") not in (None, "llama")
    return row["column"], row["protocol"], row["chat"], other, bool(meta.get("nan_cell"))


def rendered(shared: Path, rows: list[dict], capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    ids = ",".join(row["example_id"] for row in rows)
    code = main([*command(shared, key_of(rows[0])), "--ids", ids])
    shown = capsys.readouterr()
    assert code == 0, shown.err
    return {record["id"]: record["text"] for record in map(json.loads, shown.out.splitlines())}


def test_every_golden_prompt_to_the_byte(shared, capsys):
    groups = defaultdict(list)
    for row in golden(shared):
        groups[key_of(row)].append(row)
    differing, compared = [], 0
    for key, rows in groups.items():
        texts = rendered(shared, rows, capsys)
        for row in rows:
            compared += 1
            if texts.get(row["example_id"]) != row["prompt"]:
                differing.append((*key[:3], row["example_id"]))
    assert differing == []
    assert compared == len(golden(shared)) >= 356


def test_one_changed_byte_is_seen(shared, capsys):
    row = next(row for row in golden(shared) if row["column"] == "gsm_direct")
    text = rendered(shared, [row], capsys)[row["example_id"]]
    assert text == row["prompt"] != row["prompt"].replace("Quesion", "Question", 1)
