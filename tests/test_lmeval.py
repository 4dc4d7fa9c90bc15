"""The exemplars read from lm-eval against the golden prompts, and what is said when they are not there."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from evalkit import lmeval
from evalkit.errors import InputError, UnknownName


def golden(shared: Path, column: str) -> list[dict[str, str]]:
    lines = (shared / "golden/prompts.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [row for row in map(json.loads, lines) if row["column"] == column]
    assert rows
    return rows


@pytest.fixture
def release(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An importable copy of the files that are read; returns its `tasks` folder."""
    found = importlib.util.find_spec("lm_eval")
    assert found and found.submodule_search_locations
    source, copy = Path(found.submodule_search_locations[0]), tmp_path / "lm_eval"
    for file in (lmeval.GSM_FILE, lmeval.BBH_FILE.format("snarks")):
        (copy / "tasks" / file).parent.mkdir(parents=True)
        shutil.copyfile(source / "tasks" / file, copy / "tasks" / file)
    (copy / "__init__.py").write_text("raise RuntimeError('imported')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    return copy / "tasks"


def test_every_golden_bbh_prompt_opens_with_the_text(shared: Path) -> None:
    for row in golden(shared, "bbh_cot"):
        text = lmeval.bbh_cot_text(row["example_id"].split("/")[1])
        assert row["prompt"].removeprefix("<|user|>\n").startswith(f"{text}\n\nQ: "), row["example_id"]


def test_every_golden_gsm_prompt_has_the_shots(shared: Path) -> None:
    shots = lmeval.gsm_cot_shots()
    cot = "".join(f"Question: {s['question']}\nAnswer: {s['reasoning']}\n\n" for s in shots)
    direct = "".join(f"Quesion: {s['question']}\nAnswer: {s['answer']}\n\n" for s in shots)
    for column, text in ("gsm_cot", cot), ("gsm_direct", direct):
        for row in golden(shared, column):
            head = "Answer the following questions.\n\n"
            assert row["prompt"].removeprefix("<|user|>\n").startswith(f"{head}{text}Question: "), column


def test_all_27_texts_have_three_shots_and_sports_alone_goes_on_in_the_line() -> None:
    assert len(lmeval.BBH_HASH) == 27
    in_line = []
    for subtask, pin in lmeval.BBH_HASH.items():
        text = lmeval.bbh_cot_text(subtask)
        assert hashlib.sha256(text.encode()).hexdigest().startswith(pin)
        assert text == text.strip()
        assert text.count("\n\nQ: ") == 3
        assert text.count("\nA: Let's think step by step.") == 3
        if "step by step. " in text:
            in_line.append(subtask)
    assert in_line == ["sports_understanding"]


def test_gsm_shots() -> None:
    shots = lmeval.gsm_cot_shots()
    assert [shot["answer"] for shot in shots] == ["6", "5", "39", "8", "9", "29", "33", "8"]
    assert all(set(shot) == {"question", "reasoning", "answer"} for shot in shots)
    for shot in shots:
        assert shot["reasoning"].endswith(f". So the answer is {shot['answer']}.")


def test_lm_eval_is_not_imported(release: Path) -> None:
    assert len(lmeval.gsm_cot_shots()) == 8  # its __init__ raises here
    script = "import sys; from evalkit import lmeval; lmeval.gsm_cot_shots(); print('lm_eval' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_a_release_that_only_lays_the_file_out_anew_passes(release: Path) -> None:
    import yaml

    path = release / lmeval.GSM_FILE
    before = lmeval.gsm_cot_shots()
    content = yaml.safe_load(path.read_text())
    content["description"] = "unused"
    path.write_text("process: !function utils.process\n" + yaml.safe_dump(content, width=1000))
    assert lmeval.gsm_cot_shots() == before


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("There are 15 trees in", "There are 16 trees in"),
        ("The answer is 6.", "The answer is 7."),
        ("The answer is", "The result is"),
        ("samples:", "items:"),
        ("samples:", "samples: [\n"),
    ],
)
def test_a_release_that_changes_a_shot_is_refused(release: Path, old: str, new: str) -> None:
    path = release / lmeval.GSM_FILE
    path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(InputError, match=r"gsm8k/gsm8k-cot\.yaml .*pip install lm-eval==0\.4\.13$"):
        lmeval.gsm_cot_shots()


def test_one_changed_byte_of_bbh_is_refused_and_a_missing_file_too(release: Path) -> None:
    path = release / lmeval.BBH_FILE.format("snarks")
    assert lmeval.bbh_cot_text("snarks")
    path.write_text(path.read_text().replace("sarcastic.", "sarcastic!", 1))
    with pytest.raises(InputError, match=r"snarks\.yaml"):
        lmeval.bbh_cot_text("snarks")
    with pytest.raises(InputError, match=r"word_sorting\.yaml"):
        lmeval.bbh_cot_text("word_sorting")


def test_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install lm-eval"):
        lmeval.gsm_cot_shots()


def test_unknown_subtask() -> None:
    with pytest.raises(UnknownName, match="did you mean 'snarks'"):
        lmeval.bbh_cot_text("snark")
