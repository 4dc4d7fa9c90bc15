"""Real vLLM on the embedded model, ended at random moments by SIGKILL and once by SIGTERM, and gone on with."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.real
MODEL = "smollm2-135m-instruct"
LONG = bool(os.environ.get("EVALKIT_LONG"))
KILLS, TASKS, WAIT = (30, "gsm,bbh,mmlu_0shot", 0.3) if LONG else (3, "gsm_direct,mmlu_0shot", 1.5)


def journals(folder: Path) -> dict[str, bytes]:
    found = {file.name: file.read_bytes() for file in sorted(folder.glob("*.completions.jsonl"))}
    return {name: data[:data.rfind(b"\n") + 1] for name, data in found.items()}


def count(folder: Path) -> int:
    return sum(data.count(b"\n") for data in journals(folder).values())


def session(argv: list[str], folder: Path, number: int | None, wait: float = 0.0) -> tuple[int, str]:
    """Exit code and stderr of a session which is sent signal `number` `wait` seconds after its next answer."""
    before = count(folder)
    process = subprocess.Popen([sys.executable, "-m", "evalkit.cli", "run", *argv], stdout=subprocess.DEVNULL,
                               stderr=subprocess.PIPE, text=True, start_new_session=True)
    if number is not None:
        while count(folder) == before and process.poll() is None:
            time.sleep(0.02)
        time.sleep(wait)
        process.send_signal(number)
    _, err = process.communicate()
    with pytest.raises(ProcessLookupError):  # no child is left
        os.killpg(process.pid, 0)
    return process.returncode, err


def test_what_was_answered_stays_answered(tmp_path):
    pytest.importorskip("vllm", reason="vLLM is not installed")
    folder, draw = tmp_path / MODEL / "x", random.Random(11)
    argv = ["--model", MODEL, "--tasks", TASKS, "--data", "sample", "--set", "gsm.max_tokens=24", "--set",
            "bbh.max_tokens=24", "--engine-args", "max_num_seqs=2", "--out", str(tmp_path), "--name", "x"]
    again = ["--resume", str(folder)]
    before: dict[str, bytes] = {}
    for number in [*[signal.SIGKILL] * KILLS, signal.SIGTERM]:
        code, err = session(again if before else argv, folder, number, draw.uniform(0, WAIT))
        assert code == (143 if number == signal.SIGTERM else -signal.SIGKILL), err
        now = journals(folder)
        assert all(now[name].startswith(lines) for name, lines in before.items()) and now != before
        before = now
    assert err.splitlines()[-2:] == [f"to go on with this run: evalkit run --resume {folder}", "evalkit: terminated"]
    assert "Traceback" not in err
    assert json.loads((folder / "run.json").read_text())["status"] == "interrupted"
    code, err = session(again, folder, None)
    assert code == 0, err
    asked = {json.loads(line)["key"] for file in folder.glob("*.requests.jsonl")
             for line in file.read_text().splitlines()}
    now = journals(folder)
    answered = [json.loads(line)["key"] for lines in now.values() for line in lines.splitlines()]
    assert sorted(answered) == sorted(asked)
    assert all(now[name].startswith(lines) for name, lines in before.items())


def test_the_engines_own_process_dies_and_outlives_no_run(tmp_path):
    """vLLM with its engine in a process of its own, as on GPUs: killed, and left behind by a killed run."""
    pytest.importorskip("vllm", reason="vLLM is not installed")
    folder = tmp_path / MODEL / "x"
    argv = ["--model", MODEL, "--tasks", "gsm_direct", "--data", "sample", "--limit", "20", "--set",
            "gsm.max_tokens=64",
            "--engine-args", "max_num_seqs=1", "--out", str(tmp_path), "--name", "x"]
    for command, victim, code in ((argv, "engine", 1), (["--resume", str(folder)], "run", -signal.SIGKILL)):
        before = count(folder)
        process = subprocess.Popen([sys.executable, "-m", "evalkit.cli", "run", *command], stdout=subprocess.DEVNULL,
                                   stderr=subprocess.PIPE, text=True, start_new_session=True,
                                   env={**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"})
        while count(folder) == before and process.poll() is None:
            time.sleep(0.02)
        assert process.poll() is None, process.communicate()
        os.kill(process.pid if victim == "run" else engine_process(process.pid), signal.SIGKILL)
        _, err = process.communicate(timeout=60)
        assert process.returncode == code and "Traceback" not in err, err
        if victim == "engine":
            again, why = err.splitlines()[-2:]
            assert again == f"to go on with this run: evalkit run --resume {folder}"
            assert why.startswith("evalkit: vLLM died while it worked: ") and str(folder / "engine.log") in why
        end = time.monotonic() + 60
        while living(process.pid) and time.monotonic() < end:
            time.sleep(0.2)
        assert living(process.pid) == []


def living(group: int) -> list[str]:
    """Command lines of the processes of a group, those that are dead and not yet collected left out."""
    shown = subprocess.run(["ps", "-e", "-o", "pgid=,stat=,pid=,args="], capture_output=True, text=True).stdout
    rows = [line.split(None, 3) for line in shown.splitlines()]
    return [f"{row[2]} {row[3]}" for row in rows if row[0] == str(group) and not row[1].startswith("Z")]


def engine_process(group: int) -> int:
    return next(int(line.split()[0]) for line in living(group) if "EngineCore" in line)
