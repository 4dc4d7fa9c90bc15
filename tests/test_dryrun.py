"""What `--dry-run` tells: counts equal to the run's own, the judge's price, time by a finished run or by a probe."""

from __future__ import annotations

from array import array
from pathlib import Path
from typing import Any

import pytest
from records import lines

from evalkit import probe
from evalkit.cli import main
from evalkit.dryrun import _cacheable
from evalkit.engines.mock import Mock
from evalkit.probe import Speed
from evalkit.types import Choose, Completion, Generate, Request

COLUMNS = ("mmlu_5shot", "gsm_cot", "alpaca_farm")


@pytest.fixture
def argv(tiny_model: Path, tmp_path: Path) -> list[str]:
    return ["run", "--model", str(tiny_model), "--format", "tulu", "--tasks", ",".join(COLUMNS), "--data", "sample",
            "--limit", "4", "--engine", "mock", "--out", str(tmp_path / "out")]


def told(argv: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[dict[str, dict[str, str]], list[str]]:
    """Rows by column, and the notes below them."""
    capsys.readouterr()
    assert main([*argv, "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    heads = ["column", "requests", "prompt", "cacheable", "%", "output", "kv", "judge", "price", "time"]
    cells = [line.replace(" GiB", "").split() for line in lines[2:]]
    rows = {row[0]: dict(zip(heads, row, strict=True)) for row in cells if row[0] in (*COLUMNS, "total")}
    return rows, lines[2 + len(rows):]


def test_counts_are_the_runs_and_nothing_is_written(
        argv: list[str], tmp_path: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str],
        asked: list[Request]) -> None:
    rows, notes = told(argv, capsys)
    assert asked == [] and not (tmp_path / "out").exists()
    assert main([*argv, "--name", "x"]) == 0
    run = tmp_path / "out" / tiny_model.name / "x"
    for column in COLUMNS:
        requests = lines(run / f"{column}.requests.jsonl")
        assert [rows[column][k] for k in ("requests", "prompt")] == [
            str(len(requests)), str(sum(r["n_tokens"] for r in requests))]
    assert rows["gsm_cot"]["output"] == str(4 * 512) and rows["alpaca_farm"]["judge"] == "4"
    assert rows["total"]["time"] == rows["total"]["price"] == "-"
    assert "time: not known (engine mock computes nothing)" in notes
    again, notes = told(argv, capsys)
    assert again["gsm_cot"]["output"] == str(sum(c["n_generated"] for c in lines(run / "gsm_cot.completions.jsonl")))
    assert again["total"]["time"].count(":") == 2
    assert any(note.startswith(f"output tokens and time: by {run}") for note in notes)


def test_the_judges_price(argv: list[str], capsys: pytest.CaptureFixture[str], tiny_model: Path) -> None:
    small = [*argv, "--set", "alpaca_farm.max_tokens=16"]
    url = "@http://localhost:1/v1"
    dear, notes = told([*argv, "--judge", f"openai:gpt-4-0314{url}"], capsys)
    said = f"judge: openai:gpt-4-0314{url} at 30 and 60 USD per million tokens of prompt and reply (gpt-4, 2026-04)"
    assert said in notes
    price = float(dear["total"]["price"].removeprefix("$"))
    assert dear["alpaca_farm"]["price"] == dear["total"]["price"] and dear["gsm_cot"]["price"] == "-"
    # the model's tokens are bytes here: 4 prompts of at least the recipe's longest answer, and 4 replies of 8 tokens
    assert 4 * (2048 * 30 + 8 * 60) / 1e6 < price < 4 * (8192 * 30 + 8 * 60) / 1e6
    less = told([*small, "--judge", f"openai:gpt-4-0314{url}"], capsys)[0]
    assert price - float(less["total"]["price"][1:]) == pytest.approx(4 * (2048 - 16) * 30 / 1e6, abs=0.011)
    mine = told([*argv, "--judge", f"openai:mine{url}", "--option", "judge-price=60,120"], capsys)[0]
    assert float(mine["total"]["price"][1:]) == pytest.approx(2 * price, abs=0.011)
    none, notes = told([*argv, "--judge", f"openai:mine{url}"], capsys)
    assert none["total"]["price"] == "-" and any("price not known; give it as" in note for note in notes)


@pytest.mark.parametrize("price", ["cheap", "1", "1,2,3", "1,x"])
def test_a_price_that_is_none(argv: list[str], capsys: pytest.CaptureFixture[str], price: str) -> None:
    assert main([*argv, "--dry-run", "--judge-price", price]) == 2
    assert f"judge-price={price}: the form is PROMPT,REPLY" in capsys.readouterr().err


class Slow(Mock):
    """A mock whose clock it sets itself: a second a 1,000 prompt tokens computed, a second a 100 new ones."""

    now = 0.0
    closed = 0

    def __init__(self) -> None:
        super().__init__()
        self.settings = {"max_num_seqs": 4}

    def complete(self, requests: Any) -> Any:
        for request in requests:
            choice = isinstance(request.ask, Choose)
            new = 1 if choice else request.ask.max_tokens
            Slow.now += len(request.tokens) / 1000 + (0 if new == 1 else new / 100)
            yield Completion(request.key, "x", n_prompt=len(request.tokens), n_generated=new)

    def close(self) -> None:
        Slow.closed += 1


def test_time_by_a_probe(argv: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "at_hand", lambda planned: "")
    monkeypatch.setattr(probe.engines, "create", lambda name, spec: Slow())
    monkeypatch.setattr(probe.time, "monotonic", lambda: Slow.now)
    rows, notes = told(argv, capsys)
    assert Slow.closed == 1
    said = next(note for note in notes if note.startswith("time: by a probe of mock: 1000 prompt tokens"))
    new = probe.NEW / (probe.TAIL / 1000 + probe.NEW / 100)  # its prompts are read in the same time
    assert f"{new:.0f} tokens generated" in said
    row = rows["gsm_cot"]
    tokens = int(row["prompt"])
    seconds = Speed(1000, new, "").seconds(tokens * (1 - float(row["cacheable"]) / 100), int(row["output"]))
    hours, minutes, rest = map(int, row["time"].split(":"))
    assert abs(3600 * hours + 60 * minutes + rest - seconds) < 1 + tokens * 0.0005 / 1000
    assert "time: not known (--no-probe)" in told([*argv, "--no-probe"], capsys)[1]


def test_a_probe_without_answers_has_no_speed(
        argv: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    broken = Mock(lambda request: Completion("", finish="error", error="busy"))
    monkeypatch.setattr(probe, "at_hand", lambda planned: "")
    monkeypatch.setattr(probe.engines, "create", lambda name, spec: broken)
    rows, notes = told(argv, capsys)
    assert rows["total"]["time"] == "-" and "time: not known (the probe's requests fail: busy)" in notes


def test_an_engine_that_does_not_start_is_said(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    more = ["--engine", "openai", "--base-url", "http://127.0.0.1:1/v1", "--engine-args", "retries=0"]
    rows, notes = told([*argv, *more], capsys)
    assert rows["total"]["time"] == "-"
    assert any(note.startswith("time: not known (--engine openai: http://127.0.0.1:1/v1: no usable") for note in notes)


def test_cacheable_tokens_are_those_of_whole_blocks_of_an_earlier_prompt() -> None:
    seen: set[int] = set()
    first = array("i", range(10))
    assert _cacheable(first, 4, seen) == 0
    assert _cacheable(first, 4, seen) == 8
    assert _cacheable(first[:8], 4, seen) == 4  # the last token is computed
    assert _cacheable(first[:9], 4, seen) == 8
    assert _cacheable(array("i", [*range(4), 9, 9, 9, 9, 8, 9, 10, 11, 0]), 4, seen) == 4
    assert _cacheable(array("i", [7, *range(4, 10)]), 4, seen) == 0
    assert _cacheable(first, 0, seen) == 0  # an engine that shares nothing


@pytest.mark.parametrize(("more", "block"), [
    (["--engine-args", "block_size=64"], "blocks of 64 tokens"), (["--engine", "hf"], "nothing, by this engine")])
def test_what_is_shared(argv: list[str], capsys: pytest.CaptureFixture[str], more: list[str], block: str) -> None:
    rows, notes = told([*argv, "--no-probe", *more], capsys)
    assert notes[0].startswith(f"cacheable: {block}")
    assert (rows["mmlu_5shot"]["cacheable"] == "0.0") == ("hf" in more)


def test_rounds_grow_until_one_is_long_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []

    class Counting(Slow):
        def complete(self, requests: Any) -> Any:
            every = list(requests)
            sizes.append(len(every))
            yield from super().complete(every)

    monkeypatch.setattr(probe.time, "monotonic", lambda: Slow.now)
    asked = [Request(str(i), "", "", 0, array("i", range(510)), Generate(99)) for i in range(40)]
    assert probe._measure(Counting(), asked).prompt == pytest.approx(1000, rel=0.01)
    assert sizes == [1, 1, 2, 4, 4]  # one to begin with; 0.51, 1.02 and 2.04 s; a full window
