"""What may happen to a run: signals, a dead engine, a bad request, a full disk, damaged lines, a jumping clock.

Each with the mock engine; whatever is lost is asked for again, and the end is that of an unbroken run.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path

import pytest

from evalkit import environment, store
from evalkit.cli import main
from evalkit.engines.mock import Mock, invented
from evalkit.errors import EngineError

TASKS = "mmlu_5shot,gsm_cot,alpaca_farm"


@pytest.fixture
def base(tiny_model, tmp_path) -> list[str]:
    return ["run", "--model", str(tiny_model), "--format", "tulu", "--tasks", TASKS, "--data", "sample", "--limit", "5",
            "--engine", "mock", "--out", str(tmp_path / "out")]


@pytest.fixture
def home(tiny_model, tmp_path) -> Path:
    return tmp_path / "out" / tiny_model.name


@pytest.fixture
def whole(base, home) -> dict[str, object]:
    assert main([*base, "--name", "whole"]) == 0
    return results(home / "whole")


def results(folder: Path) -> dict[str, object]:
    scores = {file.name: sorted(file.read_bytes().splitlines()) for file in sorted(folder.glob("*.scores.jsonl"))}
    return {**scores, **{name: (folder / name).read_bytes() for name in ("metrics.json", "table.md")}}


def without_table(found: dict[str, object]) -> dict[str, object]:
    return {name: value for name, value in found.items() if name != "table.md"}  # it tells the engine's delay


def answered(folder: Path) -> list[str]:
    """Keys of all answers, errors left out, as often as they stand there."""
    lines = [line for file in folder.glob("*.completions.jsonl") for line in file.read_bytes().splitlines()]
    return [record["key"] for record in map(json.loads, lines) if record.get("finish") != "error"]


def status(folder: Path) -> str:
    return json.loads((folder / "run.json").read_text())["status"]


def shell(argv: list[str], **more) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-m", "evalkit.cli", *argv], text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, start_new_session=True, **more)


def until(condition, process: subprocess.Popen, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None and time.monotonic() < end, process.communicate()
        time.sleep(0.01)


def gone(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return True
    return False


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_cleanly_and_a_second_one_is_harmless(base, home, whole, number, code):
    process = shell([*base, "--name", "x", "--engine-args", "delay=0.1"])
    journal = home / "x" / "gsm_cot.completions.jsonl"
    until(lambda: journal.is_file() and journal.read_bytes().count(b"\n") >= 2, process)
    for _ in range(3):
        process.send_signal(number)
        time.sleep(0.02)
    _, err = process.communicate(timeout=60)
    assert process.returncode == code and "Traceback" not in err, err
    assert f"to go on with this run: evalkit run --resume {home / 'x'}" in err.splitlines()
    assert status(home / "x") == "interrupted" and gone(process.pid)
    before = answered(home / "x")
    assert 2 <= len(before) < 15
    assert main(["run", "--resume", str(home / "x")]) == 0
    assert without_table(results(home / "x")) == without_table(whole)
    assert len(answered(home / "x")) == len(set(answered(home / "x"))) and set(before) <= set(answered(home / "x"))


def test_the_engine_dies(base, home, whole, monkeypatch, capsys):
    complete, closed = Mock.complete, []

    def dying(self, requests):
        for count, completion in enumerate(complete(self, requests)):
            if count == 7:
                raise EngineError("vLLM died while it worked: out of luck")
            yield completion

    with monkeypatch.context() as patch:
        patch.setattr(Mock, "complete", dying)
        patch.setattr(Mock, "close", lambda self: closed.append(1))
        assert main([*base, "--name", "x"]) == 1
    err = capsys.readouterr().err.splitlines()
    assert err[-2:] == [f"to go on with this run: evalkit run --resume {home / 'x'}",
                        "evalkit: vLLM died while it worked: out of luck"]
    assert status(home / "x") == "stopped" and closed and len(answered(home / "x")) == 7
    assert main(["run", "--resume", str(home / "x")]) == 0
    assert results(home / "x") == whole


def failing(monkeypatch, fault, times: int, sample: str = "") -> list[str]:
    """The mock engine raises or returns `fault` the first `times` times that it is asked about `sample`."""
    asked: list[str] = []

    def answer(request):
        if request.sample == sample or not sample:
            asked.append(request.sample)
            if len(asked) <= times:
                if isinstance(fault, Exception):
                    raise fault
                return fault
        return invented(request)

    monkeypatch.setattr("evalkit.engines.mock.from_spec", lambda spec: Mock(answer, window=4))
    return asked


def gsm_ids(folder: Path) -> list[str]:
    return [json.loads(line)["sample"] for line in (folder / "gsm_cot.requests.jsonl").read_text().splitlines()]


def broken(text: str):
    from evalkit.types import Completion

    return Completion("", finish="error", error=text)


@pytest.mark.parametrize("fault", [ValueError("no such token"), broken("no such token")], ids=["raises", "error"])
def test_one_bad_request_fails_alone(base, home, whole, monkeypatch, capsys, fault):
    bad = gsm_ids(home / "whole")[2]
    with monkeypatch.context() as patch:
        asked = failing(patch, fault, 99, bad)
        assert main([*base, "--name", "x"]) == 1
    assert 3 <= len(asked) <= 4  # once and two tries more; one that raises has been in the batch before
    metrics = json.loads((home / "x" / "metrics.json").read_text())["columns"]
    assert metrics["gsm_cot"]["value"] is None and metrics["gsm_cot"]["health"]["failed"] == 1
    assert metrics["gsm_cot"]["health"]["empty"] == 0
    assert bad in metrics["gsm_cot"]["reason"] and "no such token" in metrics["gsm_cot"]["reason"]
    assert metrics["mmlu_5shot"]["value"] is not None and status(home / "x") == "failed"
    before = answered(home / "x")
    assert main(["run", "--resume", str(home / "x")]) == 0
    assert results(home / "x") == whole and len(answered(home / "x")) == len(before) + 1


@pytest.mark.parametrize("fault", [ValueError("busy"), broken("busy")], ids=["raises", "error"])
def test_a_request_that_fails_twice_is_answered_at_last(base, home, whole, monkeypatch, fault):
    failing(monkeypatch, fault, 2, gsm_ids(home / "whole")[2])
    assert main([*base, "--name", "x"]) == 0
    assert results(home / "x") == whole


def test_an_engine_that_always_raises_is_dead(base, home, monkeypatch, capsys):
    failing(monkeypatch, MemoryError("no room"), 10**6)
    assert main([*base, "--name", "x"]) == 1
    assert "evalkit: the engine fails on every request: MemoryError: no room" in capsys.readouterr().err
    assert status(home / "x") == "stopped" and answered(home / "x") == []


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount a small disk")
def test_the_disk_is_full(base, home, whole, tmp_path):
    """A disk that is filled while the run works on it; once there is room again the run goes on."""
    if subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode:
        pytest.skip("no mount namespace may be made here")
    shutil.rmtree(home)
    evalkit, run, journal = f"{sys.executable} -m evalkit.cli", home / "x", home / "x" / "alpaca_farm.completions.jsonl"
    script = f"""mount -t tmpfs -o size=16m none {home.parent} || exit 9
        {evalkit} {' '.join(base)} --name x --engine-args delay=0.3 & process=$!
        while ! [ -s {journal} ]; do kill -0 $process || exit 8; sleep 0.05; done
        cat /dev/zero > {home.parent}/filler 2>/dev/null; wait $process; echo code $? >&2; cp -r {run} {tmp_path}/full
        rm {home.parent}/filler; {evalkit} run --resume {run} && cp -r {run} {tmp_path}/kept"""
    done = subprocess.run(["unshare", "--mount", "sh", "-c", script], capture_output=True, text=True)
    err = done.stderr.splitlines()
    at = err.index("code 1")
    assert "Traceback" not in done.stderr
    assert re.fullmatch(rf"evalkit: {run}/\w+.completions.jsonl: cannot be written: No space left on device",
                        err[at - 1])
    assert err[at - 2] == f"to go on with this run: evalkit run --resume {run}"
    kept = answered(tmp_path / "full")
    assert done.returncode == 0 and sorted(set(answered(tmp_path / "kept"))) == sorted(answered(tmp_path / "kept"))
    assert 1 <= len(kept) < 15 and set(kept) < set(answered(tmp_path / "kept"))
    assert without_table(results(tmp_path / "kept")) == without_table(whole)


def test_no_room_for_the_plan(base, home, whole, tmp_path):
    """No file may be larger than run.json was: the requests do not fit. Then all is well and the run goes on."""
    room = (home / "whole" / "run.json").stat().st_size // 1024 + 4
    command = f"ulimit -f {room}; {sys.executable} -m evalkit.cli {' '.join(base)} --name x"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    again, why = done.stderr.splitlines()[-2:]
    assert again == f"to go on with this run: evalkit run --resume {home / 'x'}"
    assert why.startswith(f"evalkit: {home / 'x'}") and why.endswith(": File too large")
    assert status(home / "x") in ("running", "stopped") and not list((home / "x").glob("*.tmp"))
    assert main(["run", "--resume", str(home / "x")]) == 0 and results(home / "x") == whole


def test_a_refused_append_leaves_whole_lines(tmp_path):
    """A write that the disk takes in part is taken back."""
    script = (
        "import resource, sys\n"
        "from evalkit import store\n"
        "from evalkit.errors import RunError\n"
        "from evalkit.types import Completion\n"
        "folder = store.create(sys.argv[1], 'model', 'run')\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "with folder:\n"
        "    for i in range(99):\n"
        "        try:\n"
        "            folder.append('gsm', Completion(f'{i:032d}', 'x' * 80))\n"
        "        except RunError as error:\n"
        "            print(i, error)\n"
        "            break\n")
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True)
    count, _, said = done.stdout.strip().partition(" ")
    path = tmp_path / "model" / "run" / "gsm.completions.jsonl"
    assert said == f"{path}: cannot be written: File too large"
    assert path.read_bytes().endswith(b"\n") and len(store.Completions(path)) == int(count) > 3


def test_damaged_lines_are_asked_for_again(base, home, whole, capsys):
    shutil.copytree(home / "whole", home / "x")
    path = home / "x" / "gsm_cot.completions.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    at = random.Random(3).randrange(10, len(lines[1]) - 20)
    flipped = lines[1][:at] + bytes([lines[1][at] ^ 4]) + lines[1][at + 1:]
    path.write_bytes(lines[0] + lines[0] + flipped + lines[2] + b"\0" * 700 + b"\n" + lines[3] + lines[4][:-20])
    capsys.readouterr()
    assert main(["run", "--resume", str(home / "x")]) == 0
    assert f"{path}: 3 damaged lines dropped; those answers are asked for again" in capsys.readouterr().err
    assert results(home / "x") == whole


@pytest.mark.parametrize("body", [b'{"key":"\xff\xfe"', b'{"key":"a","text":"b"}', b'{"key":7', b'{"text":"a"', b"[1",
                                  b'{"key":"a","n_prompt":"9"', b'{"key":"a","logprobs":4', b'{"key":"a","text":null',
                                  b'{"key":"a","text":' + b"[" * 100_000])
def test_a_line_with_the_right_sum_and_the_wrong_content_is_dropped(tmp_path, body):
    folder = store.create(str(tmp_path), "model", "run")
    folder.file("gsm", "completions").write_bytes(body + b',"sum":"%08x"}\n' % zlib.crc32(body))
    said = []
    assert dict(folder.completions("gsm", said.append)) == {} and len(said) == 1


def test_two_runs_at_once(base, home, whole, capsys):
    capsys.readouterr()
    with store.open_run(str(home / "whole")):
        assert main(["run", "--resume", str(home / "whole")]) == 2
    err = capsys.readouterr().err.splitlines()
    assert err == [f"evalkit: {home / 'whole'}: another process is writing to this run; wait for it or end it"]


def test_a_child_that_outlives_a_killed_run_does_not_hold_the_lock(tmp_path):
    script = (
        "import os, signal, sys\n"
        "from evalkit import store\n"
        "read, write = os.pipe()\n"
        "with store.create(sys.argv[1], 'model', 'run'):\n"
        "    if os.fork() == 0:\n"
        "        os.write(write, b'x')\n"
        "        sys.stdin.read()\n"
        "        os._exit(0)\n"
        "    os.read(read, 1)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n")
    process = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdin=subprocess.PIPE,
                               start_new_session=True)
    assert process.wait() == -signal.SIGKILL and not gone(process.pid)
    with store.RunFolder(tmp_path / "model" / "run"):
        pass
    process.stdin.close()
    end = time.monotonic() + 30
    while not gone(process.pid) and time.monotonic() < end:
        time.sleep(0.02)
    assert gone(process.pid)


@pytest.mark.parametrize("command", ["new", "resume"])
def test_a_read_only_results_folder(base, home, whole, command):
    argv = [*base, "--name", "x"] if command == "new" else ["run", "--resume", str(home / "whole")]
    call = [sys.executable, "-m", "evalkit.cli", *argv]
    if os.geteuid() == 0:
        if subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode:
            pytest.skip("root may write anywhere, and may not mount here")
        script = f"mount --bind {home} {home} && mount -o remount,ro,bind {home} && {' '.join(call)}"
        done = subprocess.run(["unshare", "--mount", "sh", "-c", script], capture_output=True, text=True)
    else:
        for folder in (home, home / "whole"):
            folder.chmod(0o555)
        done = subprocess.run(call, capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("evalkit: ") and str(home) in last
    assert ("Read-only" if command == "new" and os.geteuid() == 0 else "") in last


def test_the_clock_jumps(base, home, whole, monkeypatch):
    clock = iter(range(10**9, 0, -10**5))  # each look at the wall clock finds it a day earlier
    monkeypatch.setattr(environment.time, "time", lambda: float(next(clock)))
    assert main([*base, "--name", "x"]) == 0
    assert results(home / "x") == whole
    session, = json.loads((home / "x" / "run.json").read_text())["time"]["sessions"]
    assert all(0 <= session[f"{phase}_s"] < 100 for phase in ("plan", "load", "ask", "score"))
