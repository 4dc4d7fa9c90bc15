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

from evalkit.sandbox.launch import home, is_below, view


@dataclass(frozen=True, slots=True)
class Layer:
    """`proof` is the attempt that failed when `active`, else what could be done, or why it was not tried."""

    name: str
    active: bool
    proof: str


_TEST = "def check(candidate):\n    assert candidate() is True, 'it was possible'\n"
_RAISES = "    try:\n        {}\n    except {}:\n        return True\n    return False\n"
_LIBC = "    import ctypes\n    libc = ctypes.CDLL(None, use_errno=True)\n"
# name: (the attempt in words, the body of held(), the namespace it needs)
_ATTEMPTS: dict[str, tuple[str, str, str]] = {
    "user": ("being another user than nobody", "    return os.getuid() == 65534\n", "user"),
    "mount": ("seeing the harness's temporary files", "    return not os.path.lexists({marker!r})\n", "mnt"),
    "pid": ("finding the harness's process", _RAISES.format("os.getpgid({pid})", "ProcessLookupError"), "pid"),
    "network": (
        "connecting to an open port of 127.0.0.1",
        "    import socket\n" + _RAISES.format("socket.create_connection(('127.0.0.1', {port}), 1)", "OSError"),
        "net",
    ),
    "ipc": ("making a shared-memory segment", _LIBC + "    return libc.shmget(0, 4096, 0o600) == -1\n", "ipc"),
    "filter": (
        "being traced or making a user namespace",
        _LIBC + "    refused = libc.ptrace(0, 0, 0, 0) == libc.unshare(1 << 28) == -1\n"
        "    return refused and libc.prctl(21, 0, 0, 0, 0) == 2\n",
        "",
    ),
    "privileges": (
        "holding or gaining a capability",
        _LIBC + "    import struct\n    held = ctypes.create_string_buffer(24)\n"
        "    libc.capget(struct.pack('=Ii', 0x20080522, 0), held)\n"
        "    return held.raw == bytes(24) and libc.prctl(39, 0, 0, 0, 0) == 1\n",
        "",
    ),
    "home": ("seeing what is in the user's home", "    return not any(map(os.path.lexists, {home!r}))\n", ""),
    "tests": ("seeing packages that carry tests", "    return not any(map(os.listdir, {hidden!r}))\n", ""),
    "writes": (
        "making a (nameless) file outside the scratch",
        "    for folder in {folders!r}:\n        try:\n            os.open(folder, os.O_TMPFILE | os.O_WRONLY)\n"
        "        except OSError:\n            continue\n        return False\n    return True\n",
        "",
    ),
    "scratch": ("finding what the program before had written", "    return os.listdir('.') == []\n", ""),
    "time": ("running on after the limit", "    while True: pass\n", ""),
    "memory": ("taking 100 GB of memory", _RAISES.format("bytearray(100 << 30)", "MemoryError"), ""),
    "processes": (
        "starting a process",
        _LIBC + "    child = libc.fork()\n    if child == 0:\n        os._exit(0)\n    return child == -1\n",
        "",
    ),
    "files": (
        "writing a file over its limit",
        "    return open('big', 'wb', 0).write(bytes({file_bytes})) < {file_bytes}\n",
        "",
    ),
}
NAMES = tuple(_ATTEMPTS)
PROCESS = ("scratch", "time")  # what can be had without the kernel's help, on a Mac too

Runner = Callable[[str, str, str, float], Mapping[str, Any]]  # code, test, entry point, seconds -> verdict


def prove(namespaces: list[str], file_mb: int, run: Runner) -> list[Layer]:
    """Every attempt, each by `run` on one worker; `namespaces` are those that the worker has of its own."""
    found = []
    with _bait(file_mb) as facts:
        for name, (what, body, namespace) in _ATTEMPTS.items():
            if name == "scratch":
                run("def held():\n    return open('left', 'w').write('x') == 1\n", _TEST, "held", 3.0)
            code = "import os\n\ndef held():\n" + body.format(**facts)
            verdict = run(code, _TEST, "held", 0.1 if name == "time" else 3.0)
            held = verdict["status"] == ("timed_out" if name == "time" else "passed")
            proof = f"{what} failed" if held else f"{what}: {verdict['detail'] or verdict['status']}"
            if namespace and namespace not in namespaces:
                held, proof = False, f"the {namespace} namespace is the harness's own"
            found.append(Layer(name, held, proof))
    return found


@contextmanager
def _bait(file_mb: int) -> Iterator[dict[str, Any]]:
    """Things that a program must not reach: a listening port, a file, folders to write in."""
    seen, at_home, scratch = view(), home(), "/tmp"
    entries = [str(p) for p in at_home.iterdir()] if os.access(at_home, os.R_OK) else []
    with socket.socket() as listening, tempfile.TemporaryDirectory(prefix="evalkit-bait-") as folder:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        marker = Path(folder, "marker")
        marker.touch()
        yield {
            "marker": str(marker),
            "pid": os.getpid(),
            "port": listening.getsockname()[1],
            # Folders on the way to the interpreter exist inside, empty but for that.
            "home": [p for p in entries if not any(is_below(s, p) or is_below(p, s) for s in seen["show"])][:200],
            "hidden": seen["hide"],
            "folders": sorted(
                {folder, str(Path.cwd()), str(at_home), "/", "/usr", "/dev/shm", *seen["show"]} - {scratch}
            ),
            "file_bytes": (file_mb << 20) + 1,
        }
