"""A worker: one process that takes jobs from a pipe, and for each forks a checker and the program's own process.

    harness -> worker   length (4 bytes), milliseconds allowed (4), alone (1); then the job, read by the checker
    worker -> harness   a frame of JSON: status, detail, seconds, nonce

The worker never reads a job: the program's process is its fork and must not find a test in its memory.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import resource
import select
import shutil
import signal
import struct
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from evalkit.sandbox import checker, program, wire

HEAD = struct.Struct(">IIB")
# Loaded once, so that a program finds them at no cost: what HumanEval's prompts, tests and answers import.
_COMMON = """bisect cmath collections copy datetime decimal fractions functools hashlib heapq itertools math operator
random re statistics string textwrap typing""".split()
_LAG = 10.0  # seconds for the two processes to start
_STRETCH, _STRETCH_ALONE = 2, 10  # the most wall time, in limits, when other work takes the core away
_MOST_FDS = 256


@dataclass(frozen=True, slots=True)
class Config:
    """What the harness tells a worker, as JSON in its arguments; a descriptor is -1 where there is none."""

    level: str
    jobs: int
    results: int
    proc: int  # the harness's /proc: there is none inside
    host: int  # pidfd of the harness
    scratch: str
    limits: dict[str, float]
    view: dict[str, list[str]]
    namespaces: dict[str, str]  # the harness's own, as /proc/self/ns tells them


def main(text: str) -> None:
    config = Config(**json.loads(text))
    os.umask(0o022)
    sys.dont_write_bytecode = True
    for name in _COMMON:
        importlib.import_module(name)
    try:
        worker = Worker(config)
    except OSError as error:
        wire.write(config.results, wire.dumps({"error": str(error)}))
        return
    worker.serve()


class Worker:
    def __init__(self, config: Config) -> None:
        self._config = config
        self._linux: Any = None  # the module; other systems must do without
        self._filter: Any = None
        self._own_pids = -1  # descriptor of this process's pid namespace, to come back to
        self._untouched = 0  # free inodes of an empty scratch
        self._started: tuple[int, ...] = ()  # the job's two processes
        if sys.platform == "linux":
            from evalkit.sandbox import linux

            self._linux = linux
        if config.level != "process":
            self._enclose()
        elif self._linux:
            self._linux.adopt_orphans()
        self._parent = os.getppid()
        gc.collect()
        gc.freeze()

    def _enclose(self) -> None:
        linux, config = self._linux, self._config
        self._filter = linux.filter_program()
        if config.level == "kernel":
            linux.enter(config.view, int(config.limits["scratch_mb"]))
        linux.settle()
        if config.level == "kernel":
            child = os.fork()
            if child:
                os.closerange(3, _MOST_FDS)
                os.waitpid(child, 0)
                os._exit(0)
            linux.die_with_parent()
            self._own_pids = os.open("self/ns/pid", os.O_RDONLY, dir_fd=config.proc)
            self._untouched = os.statvfs(config.scratch).f_ffree

    def _namespaces(self) -> list[str]:
        """Those that this process does not share with the harness."""
        found = []
        for name, outer in self._config.namespaces.items():
            with suppress(OSError):
                if os.readlink(f"self/ns/{name}", dir_fd=self._config.proc) != outer:
                    found.append(name)
        return found

    def serve(self) -> NoReturn:
        jobs, results = self._config.jobs, self._config.results
        wire.write(results, wire.dumps({"namespaces": self._namespaces()}))
        null = os.open("/dev/null", os.O_RDWR)
        for fd in (0, 1, 2):
            os.dup2(null, fd)
        os.close(null)
        while True:
            self._wait(jobs, None)
            try:
                size, milliseconds, alone = HEAD.unpack(wire.read_exact(jobs, HEAD.size))
            except EOFError:
                self._leave()
            wire.write(results, wire.dumps(self._one(size, milliseconds / 1000, bool(alone))))

    # ---- one job -----------------------------------------------------------------------------------------

    def _one(self, size: int, limit: float, alone: bool) -> dict[str, Any]:
        """Both processes forked, watched and ended, the scratch emptied: the verdict."""
        orders, answers, report = os.pipe(), os.pipe(), os.pipe()
        jobs, most = self._config.jobs, int(self._config.limits["output_kb"]) << 10

        def judge() -> None:
            checker.judge(wire.read_exact(jobs, size), orders[1], answers[0], report[1], most)

        judging = self._fork((jobs, orders[1], answers[0], report[1]), judge)
        if self._own_pids >= 0:
            self._linux.new_pid_namespace()
        running = self._fork((orders[0], answers[1]), lambda: program.serve(orders[0], answers[1]), answers[1])
        if self._own_pids >= 0:
            self._linux.back_to(self._own_pids)
        self._started = running, judging
        for fd in (*orders, *answers, report[1]):
            os.close(fd)
        verdict = self._watch(report[0], limit, alone)
        os.close(report[0])
        ended = self._end()
        self._clean()
        if verdict is None:
            return {"status": "crashed", "detail": f"while it was compiled: {_ending(ended[judging])}"}
        if verdict["status"] == "gone":
            verdict["status"] = "unfinished" if os.WIFEXITED(ended[running]) else "crashed"
            verdict["detail"] = f"{_ending(ended[running])} before the checks were done"
        return verdict

    def _fork(self, keep: tuple[int, ...], body: Callable[[], None], tell: int = -1) -> int:
        """A confined child that runs `body`; first it writes `ready` to `tell`, or why it is not."""
        pid = os.fork()
        if pid:
            return pid
        said = b"ready"
        try:
            self._confine(keep)
        except (OSError, ValueError) as error:
            said = str(error).encode()
        try:
            if tell >= 0:
                wire.write(tell, said)
            if said == b"ready":
                body()
        finally:
            os._exit(1)

    def _confine(self, keep: tuple[int, ...]) -> None:
        config, limits = self._config, self._config.limits
        with suppress(OSError):  # the first to go when memory runs out
            os.write(os.open("self/oom_score_adj", os.O_WRONLY, dir_fd=config.proc), b"1000")
        low = 3
        for fd in (*sorted(keep), _MOST_FDS):
            os.closerange(low, fd)
            low = fd + 1
        os.setsid()
        os.chdir(config.scratch)
        for kind, most in (
            (resource.RLIMIT_AS, int(limits["memory_mb"]) << 20),
            (resource.RLIMIT_FSIZE, int(limits["file_mb"]) << 20),
            (resource.RLIMIT_NOFILE, int(limits["open_files"])),
            (resource.RLIMIT_CORE, 0),
            (resource.RLIMIT_CPU, int(limits["seconds"] * _STRETCH_ALONE) + 1),  # should it outlive its worker
        ):
            with suppress(ValueError, OSError):  # a Mac refuses some; `check` tells which hold
                resource.setrlimit(kind, (most, most))
        if self._filter:
            self._linux.confine(self._filter, int(limits["processes"]))

    def _watch(self, report: int, limit: float, alone: bool) -> dict[str, Any] | None:
        """The checker's verdict, `timed_out`, or `suspect`; None when the checker died.

        The clock counts wall time less the time in which the two processes were ready to run and had no core.
        """
        heard, start, deadline = b"", 0.0, time.monotonic() + _LAG
        while True:
            if self._wait(report, deadline - time.monotonic()):
                part = os.read(report, 1 << 16)
                if not part:
                    return json.loads(heard[1:]) if len(heard) > 1 else None
                if not heard:
                    start = time.monotonic()
                    deadline = start + limit
                heard += part
                continue
            if not heard:
                return {"status": "broken", "detail": f"its processes did not start in {_LAG:.0f} s"}
            spent, lost = time.monotonic() - start, self._lost()
            timed_out = {"status": "timed_out", "detail": f"over {limit:g} s", "seconds": spent}
            if lost is None:  # no such account on this system: by the load of the machine
                loaded = os.getloadavg()[0] > (os.cpu_count() or 1)
                return timed_out | ({"status": "suspect"} if loaded and not alone else {})
            if spent - lost >= limit or spent >= limit * _STRETCH_ALONE:
                return timed_out
            if spent >= limit * _STRETCH and not alone:
                return timed_out | {"status": "suspect"}
            deadline = time.monotonic() + max(limit - spent + lost, 0.005)

    def _lost(self) -> float | None:
        """Seconds that the job's processes have waited for a core; None where the kernel does not tell."""
        try:
            children = _proc("thread-self/children", self._config.proc).split()
            return sum(int(_proc(f"{pid}/schedstat", self._config.proc).split()[1]) for pid in children) / 1e9
        except OSError:
            return None

    def _wait(self, fd: int, seconds: float | None) -> bool:
        """True when `fd` can be read, False after `seconds`; ends the worker when the harness is gone."""
        jobs, host = self._config.jobs, self._config.host
        end = None if seconds is None else time.monotonic() + seconds
        poll = select.poll()
        poll.register(jobs, 0)  # tells of a closed end only
        poll.register(fd, select.POLLIN)
        if host >= 0:
            poll.register(host, select.POLLIN)
        while True:
            left = 1.0 if end is None else min(1.0, max(0.0, end - time.monotonic()))
            ready = dict(poll.poll(left * 1000))
            if host in ready or (fd != jobs and jobs in ready) or os.getppid() != self._parent:
                self._leave()
            if fd in ready:
                return True
            if end is not None and time.monotonic() >= end:
                return False

    # ---- afterwards --------------------------------------------------------------------------------------

    def _end(self) -> dict[int, int]:
        """Kill the job's processes and all they left; wait status by pid."""
        ended: dict[int, int] = {}
        for pid in self._started:
            os.kill(pid, signal.SIGKILL)  # the first of a pid namespace: the kernel ends the rest of it
            if self._config.level == "process":
                with suppress(ProcessLookupError, PermissionError):
                    os.killpg(pid, signal.SIGKILL)
        if self._config.level == "bwrap":
            with suppress(ProcessLookupError):
                os.kill(-1, signal.SIGKILL)  # all but this process, which is the first of the namespace
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG if self._config.level == "process" else 0)
            except ChildProcessError:
                self._started = ()
                return ended
            if pid:
                ended[pid] = status
                continue
            if self._linux:  # orphans come to this process, until none is left
                for child in _proc("thread-self/children", self._config.proc).split():
                    os.kill(int(child), signal.SIGKILL)
            time.sleep(0.001)

    def _clean(self) -> None:
        scratch = self._config.scratch
        if self._own_pids >= 0:
            if os.statvfs(scratch).f_ffree != self._untouched:
                self._untouched = self._linux.fresh_scratch(int(self._config.limits["scratch_mb"]))
        elif os.listdir(scratch):
            empty(Path(scratch))

    def _leave(self) -> NoReturn:
        """End with all below: the kernel's doing when this is the first process of its pid namespace."""
        if self._config.level == "process":
            self._end()
            shutil.rmtree(self._config.scratch, ignore_errors=True)
        os._exit(0)


def empty(folder: Path) -> None:
    """Remove what is in `folder`, whatever permissions a program gave it."""
    for at, folders, _ in os.walk(folder):
        for name in folders:
            if not (Path(at) / name).is_symlink():
                (Path(at) / name).chmod(0o700)
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _proc(name: str, proc: int) -> str:
    fd = os.open(name, os.O_RDONLY, dir_fd=proc)
    try:
        return os.read(fd, 1 << 16).decode()
    finally:
        os.close(fd)


def _ending(status: int) -> str:
    if os.WIFEXITED(status):
        return f"exit {os.WEXITSTATUS(status)}"
    return signal.Signals(os.WTERMSIG(status)).name if os.WTERMSIG(status) < 32 else f"signal {os.WTERMSIG(status)}"
