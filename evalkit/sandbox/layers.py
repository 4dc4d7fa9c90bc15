"""What each layer of the sandbox forbids, and the program that tries it: `held()` is True when it could not.

    network   connects to a port that the harness has open on 127.0.0.1      -> refused: the layer is active

The attempts run as any program runs, so a layer is called active only because an attempt failed under it.
"""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evalkit.sandbox.launch import is_below, view


@dataclass(frozen=True, slots=True)
class Layer:
    """`proof` is the attempt that failed when `active`, else what could be done, or why it was not tried."""

    name: str
    active: bool
    proof: str


@dataclass(frozen=True, slots=True)
class _Attempt:
    what: str  # in words: "<what> failed" or "<what> was possible"
    code: str  # body of held()
    namespace: str = ""  # that the worker must not share with the harness
    seconds: float = 3.0
    status: str = "passed"  # the verdict that proves it


_TEST = "def check(candidate):\n    assert candidate() is True, 'it was possible'\n"
_REFUSED = "    try:\n        {}\n    except {}:\n        return True\n    return False\n"
_LIBC = "    import ctypes\n    libc = ctypes.CDLL(None, use_errno=True)\n"

_ATTEMPTS: dict[str, _Attempt] = {
    "user": _Attempt("being another user than nobody", "    return os.getuid() == 65534\n", "user"),
    "mount": _Attempt(
        "seeing a file in the harness's folder for temporary files",
        "    return not os.path.lexists({marker!r})\n",
        "mnt",
    ),
    "pid": _Attempt(
        "finding the harness's process", _REFUSED.format("os.getpgid({pid})", "ProcessLookupError"), "pid"
    ),
    "network": _Attempt(
        "connecting to an open port of 127.0.0.1",
        _REFUSED.format("__import__('socket').create_connection(('127.0.0.1', {port}), 1)", "OSError"),
        "net",
    ),
    "ipc": _Attempt("making a shared-memory segment", _LIBC + "    return libc.shmget(0, 4096, 0o600) == -1\n", "ipc"),
    "filter": _Attempt(
        "being traced or making a user namespace",
        _LIBC + "    return libc.prctl(21, 0, 0, 0, 0) == 2 and libc.ptrace(0, 0, 0, 0) == libc.unshare(1 << 28) == -1\n",
    ),
    "privileges": _Attempt(
        "holding or gaining a capability",
        _LIBC + "    import struct\n    held = ctypes.create_string_buffer(24)\n"
        "    libc.capget(struct.pack('=Ii', 0x20080522, 0), held)\n"
        "    return held.raw == bytes(24) and libc.prctl(39, 0, 0, 0, 0) == 1\n",
    ),
    "home": _Attempt(
        "seeing what is in the user's home", "    return not any(os.path.lexists(p) for p in {home!r})\n"
    ),
    "tests": _Attempt(
        "seeing packages that carry tests", "    return not any(os.listdir(p) for p in {hidden!r})\n"
    ),
    "writes": _Attempt(
        "writing outside the scratch",
        "    for folder in {folders!r}:\n        try:\n            open(folder + '/{name}', 'w').close()\n"
        "        except OSError:\n            continue\n        return False\n    return True\n",
    ),
    "scratch": _Attempt("finding what the program before had written", "    return os.listdir('.') == []\n"),
    "time": _Attempt("running on after the limit", "    while True: pass\n", seconds=0.1, status="timed_out"),
    "memory": _Attempt("taking 100 GB of memory", _REFUSED.format("bytearray(100 << 30)", "MemoryError")),
    "processes": _Attempt(
        "starting a process",
        _LIBC + "    child = libc.fork()\n    if child == 0:\n        os._exit(0)\n    return child == -1\n",
    ),
    "files": _Attempt(
        "writing a file over its limit",
        "    return open('big', 'wb', 0).write(bytes({file_bytes})) < {file_bytes}\n",
    ),
}
NAMES = tuple(_ATTEMPTS)
# `--sandbox process`: what can be had without the kernel's help, on a Mac too.
PROCESS = ("scratch", "time")

Runner = Callable[[str, str, str, float], Mapping[str, Any]]  # code, test, entry point, seconds -> verdict


def prove(namespaces: list[str], file_mb: int, run: Runner) -> list[Layer]:
    """Every attempt, each by `run` on one worker; `namespaces` are those that the worker has of its own."""
    found = []
    with _bait(file_mb) as facts:
        for name, attempt in _ATTEMPTS.items():
            if name == "scratch":
                run("def held():\n    return open('left', 'w').write('x') == 1\n", _TEST, "held", 3.0)
            code = "import os\n\ndef held():\n" + attempt.code.format(**facts)
            verdict = run(code, _TEST, "held", attempt.seconds)
            held = verdict["status"] == attempt.status
            shared = bool(attempt.namespace) and attempt.namespace not in namespaces
            proof = f"{attempt.what} failed" if held else f"{attempt.what}: {verdict['detail'] or verdict['status']}"
            if shared:
                proof = f"the {attempt.namespace} namespace is the harness's own"
            found.append(Layer(name, held and not shared, proof))
    return found


@contextmanager
def _bait(file_mb: int) -> Iterator[dict[str, Any]]:
    """Things that a program must not reach: a listening port, a file, folders to write in."""
    seen = view()
    home = str(Path.home())
    entries = [str(p) for p in Path(home).iterdir()] if os.access(home, os.R_OK) else []
    with socket.socket() as listening, tempfile.TemporaryDirectory(prefix="evalkit-bait-") as folder:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        marker = Path(folder, "marker")
        marker.touch()
        folders = [folder, os.getcwd(), home, "/", "/usr", "/var/tmp", "/dev/shm", *seen["show"][-2:]]
        name = f"evalkit-{os.getpid()}-{os.urandom(4).hex()}"
        try:
            yield {
                "marker": str(marker),
                "pid": os.getpid(),
                "port": listening.getsockname()[1],
                # Folders on the way to the interpreter exist inside, empty but for that.
                "home": [p for p in entries if not any(is_below(s, p) or is_below(p, s) for s in seen["show"])],
                "hidden": seen["hide"],
                "folders": folders,
                "name": name,
                "file_bytes": (file_mb << 20) + 1,
            }
        finally:
            for at in folders:
                Path(at, name).unlink(missing_ok=True)
