"""An endpoint as judge, against a stub: its replies decide, are kept as they come, and are asked for once."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from records import lines

from evalkit.cli import main
from evalkit.judge import label_of


class Judge(ThreadingHTTPServer):
    """Says `says`, after `refused` replies of HTTP 503 and until `enough` replies were given (then HTTP 400)."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.says, self.refused, self.enough, self.lock = "A", 0, 1000, threading.Lock()
        self.given: list[dict[str, Any]] = []
        self.keys: set[str | None] = set()
        self.name = f"openai:fair@http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    server: Judge

    def do_POST(self) -> None:
        assert self.path == "/v1/chat/completions"
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.keys.add(self.headers["Authorization"])
            if self.server.refused:
                self.server.refused -= 1
                return self.send(503, {"error": "busy"})
            if len(self.server.given) >= self.server.enough:
                return self.send(400, {"error": "quota used up"})
            self.server.given.append(body)
        return self.send(200, {"choices": [{"message": {"content": self.server.says}}]})

    def send(self, status: int, answer: dict[str, Any]) -> None:
        data = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def judge(monkeypatch: pytest.MonkeyPatch) -> Iterator[Judge]:
    monkeypatch.setenv("OPENAI_API_KEY", "secret-of-the-test")
    server = Judge()
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def argv(tiny_model: Path, tmp_path: Path, judge: Judge) -> list[str]:
    return ["run", "--model", str(tiny_model), "--format", "tulu", "--tasks", "alpaca_farm", "--data", "sample",
            "--limit", "8", "--engine", "mock", "--judge", judge.name, "--out", str(tmp_path), "--name", "x"]


@pytest.fixture
def run(tiny_model: Path, tmp_path: Path) -> Path:
    return tmp_path / tiny_model.name / "x"


def test_its_letter_decides_and_no_key_is_written(argv: list[str], run: Path, judge: Judge) -> None:
    judge.says = "(B)."
    assert main(argv) == 0
    pairs = lines(run / "alpaca_farm.pairs.jsonl")
    assert len(pairs) == 8 and {pair["a"] for pair in pairs} == {"model", "baseline"}
    assert all(pair["label"] == "B" and pair["verdict"] != pair["a"] for pair in pairs)
    metric = json.loads((run / "metrics.json").read_text())["columns"]["alpaca_farm"]
    assert metric["value"] == sum(pair["a"] == "baseline" for pair in pairs) / 8
    assert "self-judged" not in metric["marks"]
    assert {body["model"] for body in judge.given} == {"fair"} and {body["temperature"] for body in judge.given} == {0}
    assert judge.keys == {"Bearer secret-of-the-test"}
    assert not [path for path in run.iterdir() if "secret-of-the-test" in path.read_text(encoding="utf-8")]


def test_a_reply_without_a_letter_is_unparsed(argv: list[str], run: Path, judge: Judge) -> None:
    judge.says = "Both are fine."
    main(argv)
    assert {pair["verdict"] for pair in lines(run / "alpaca_farm.pairs.jsonl")} == {"unparsed"}
    assert json.loads((run / "metrics.json").read_text())["columns"]["alpaca_farm"]["health"]["unparsed"] == 8
    assert "no sample has a verdict" in (run / "metrics.json").read_text()


def test_what_was_judged_before_it_refused_is_not_asked_again(
        argv: list[str], run: Path, judge: Judge, capsys: pytest.CaptureFixture[str]) -> None:
    judge.enough = 2
    assert main(argv) == 1
    said = capsys.readouterr().err
    assert f"--judge {judge.name}: HTTP 400" in said and "quota used up" in said
    assert f"evalkit run --resume {run}" in said and "Traceback" not in said
    kept = lines(run / "alpaca_farm.judge.completions.jsonl")
    first = [body["messages"][0]["content"] for body in judge.given]
    assert len(kept) == 2 == len(first)
    judge.enough = 1000
    assert main(["run", "--resume", str(run)]) == 0
    every = [body["messages"][0]["content"] for body in judge.given]
    assert len(every) == 8 and len(set(every)) == 8
    assert len(lines(run / "alpaca_farm.judge.completions.jsonl")) == 8


def test_a_busy_endpoint_is_asked_again(argv: list[str], run: Path, judge: Judge) -> None:
    judge.refused = 3
    assert main(argv) == 0
    assert len(judge.given) == 8


@pytest.mark.parametrize(("reply", "label"), [("A", "A"), (" b\n", "B"), ("(A)", "A"), ("B) it is clearer", "B"),
                                              ("Assistant A", ""), ("", ""), ("Bad", ""), ("C", "")])
def test_label(reply: str, label: str) -> None:
    assert label_of(reply) == label
