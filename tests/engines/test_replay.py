from __future__ import annotations

import json
from pathlib import Path

import pytest

from evalkit.engines import EngineSpec, create
from evalkit.errors import InputError
from evalkit.types import Completion, Generate, Request


def write(path: Path, *rows: dict[str, object]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def replay(source: Path, *requests: Request) -> list[Completion]:
    engine = create("replay", EngineSpec("none", args={"answers": str(source)}))
    return list(engine.complete(requests))


def request(key: str, column: str = "gsm_cot", sample: str = "s/1", index: int = 0) -> Request:
    return Request(key, column, sample, index, [1, 2], Generate(5))


def test_by_key(tmp_path: Path) -> None:
    file = write(tmp_path / "gsm_cot.completions.jsonl",
                 {"key": "a", "text": " 18", "finish": "stop", "stop": "\n", "n_prompt": 7, "sum": "9a1b"},
                 {"key": "b", "text": "", "logprobs": [-1.0, -2.5], "finish": "choice"})
    assert replay(file, request("b"), request("a")) == [
        Completion("b", logprobs=(-1.0, -2.5), finish="choice"),
        Completion("a", " 18", finish="stop", stop="\n", n_prompt=7)]


def test_by_sample_and_index_when_the_keys_are_others(tmp_path: Path) -> None:
    write(tmp_path / "codex_p1.requests.jsonl", {"key": "old", "sample": "HumanEval/3", "index": 4})
    write(tmp_path / "codex_p1.completions.jsonl", {"key": "old", "text": "    return 1"})
    write(tmp_path / "gsm_cot.completions.jsonl", {"sample": "s/1", "text": "seven"})
    done = replay(tmp_path, request("new", "codex_p1", "HumanEval/3", 4), request("x"))
    assert [(c.key, c.text) for c in done] == [("new", "    return 1"), ("x", "seven")]


def test_a_missing_answer_is_an_error_not_an_empty_answer(tmp_path: Path) -> None:
    file = write(tmp_path / "gsm_cot.completions.jsonl", {"sample": "s/1", "text": "seven"})
    (done,) = replay(file, request("x", index=1))
    assert done.finish == "error" and "no answer for gsm_cot s/1 1" in done.error


def test_what_cannot_be_read_is_said(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="needs --engine-args answers="):
        create("replay", EngineSpec("none"))
    with pytest.raises(InputError, match=r"absent\.jsonl cannot be read: No such file"):
        replay(tmp_path / "absent.jsonl")
    with pytest.raises(InputError, match="no completions there"):
        replay(tmp_path)
    (tmp_path / "x.jsonl").write_text('{"key": "a"}\n{"key"\n')
    with pytest.raises(InputError, match=r"x.jsonl, line 2: not JSON"):
        replay(tmp_path / "x.jsonl")


def test_a_torn_line_of_a_journal_is_dropped_and_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.completions.jsonl").write_text('{"key": "a"}\n{"key"\n')
    assert create("replay", EngineSpec("none", args={"answers": str(tmp_path)})).settings["n"] == 1
    assert "x.completions.jsonl, line 2: damaged, dropped" in capsys.readouterr().err
