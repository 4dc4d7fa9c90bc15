"""A worker: one process that takes jobs from a pipe; a checker serves them all, each program has its own fork.

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
import socket
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
_COMMON = (
    "bisect cmath collections copy datetime decimal fractions functools hashlib heapq itertools math operator random "
    "re statistics string textwrap typing"
)
_LAG = 10.0  # seconds for the two processes to start
_STRETCH, _STRETCH_ALONE = 3, 10  # the most wall time, in limits, when other work takes the core away
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
    for name in _COMMON.split():
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
        self._filter = b""
        self._own_pids = -1  # descriptor of this process's pid namespace, to come back to
        self._untouched = 0  # free inodes of an empty scratch
        self._started: list[int] = []  # to be ended with the job
        self._spare: tuple[int, int, int] | None = None
        self._checker: tuple[int, socket.socket] | None = None
        if sys.platform == "linux":
            from evalkit.sandbox import linux

            self._linux = linux
            if config.level == "process":
                linux.adopt_orphans()
            else:
                self._enclose()
            with suppress(OSError):  # the first to go when memory runs out: the children inherit it
                _proc("self/oom_score_adj", config.proc, b"1000")
        self._parent = os.getppid()
        gc.collect()
        gc.freeze()

    def _enclose(self) -> None:
        linux, config = self._linux, self._config
        self._filter = linux.filter_program()
        if config.level == "kernel":
            linux.enter(config.view, config.scratch, int(config.limits["scratch_mb"]))
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

    def serve(self) -> NoReturn:
        jobs, results, proc = self._config.jobs, self._config.results, self._config.proc
        outer = self._config.namespaces.items()
        own = [name for name, link in outer if os.readlink(f"self/ns/{name}", dir_fd=proc) != link]
        wire.write(results, wire.dumps({"namespaces": own}))
        null = os.open("/dev/null", os.O_RDWR)
        for fd in (0, 1, 2):
            os.dup2(null, fd)
        while True:
            self._wait(jobs, None)
            try:
                size, milliseconds, alone = HEAD.unpack(wire.read_exact(jobs, HEAD.size))
            except EOFError:
                self._leave()
            wire.write(results, wire.dumps(self._one(size, milliseconds / 1000, bool(alone))))

    # ---- one job -----------------------------------------------------------------------------------------

    def _one(self, size: int, limit: float, alone: bool) -> dict[str, Any]:
        """Run one job to its end and remove what is left of it: the verdict."""
        checking, line = self._checker or self._new_checker()
        running, orders, answers = self._spare or self._new_spare()
        self._started, self._spare = [running], None
        socket.send_fds(line, [wire.SIZE.pack(size)], [orders, answers])
        os.close(orders)
        os.close(answers)
        self._new_spare()  # for the next job, while this one runs
        verdict = self._watch(line, limit, alone)
        if verdict["status"] in ("timed_out", "suspect", "broken", "lost"):  # the checker waits, or has died
            self._started.append(checking)
            self._checker = None
            line.close()
        ended = self._end()
        self._clean()
        if verdict["status"] == "lost":
            return {"status": "crashed", "detail": f"{_ending(ended[checking])} of the checker"}
        if verdict["status"] == "gone":
            verdict["status"] = "unfinished" if os.WIFEXITED(ended[running]) else "crashed"
            verdict["detail"] = f"{_ending(ended[running])} before the checks were done"
        return verdict

    def _new_spare(self) -> tuple[int, int, int]:
        """A process for one program, confined and waiting: its pid, where to write orders, where to read answers."""
        orders, answers, scratch = os.pipe(), os.pipe(), self._config.scratch
        if self._own_pids >= 0:
            self._linux.new_pid_namespace()
        pid = self._fork((orders[0], answers[1]), lambda: program.serve(orders[0], answers[1], scratch), answers[1])
        if self._own_pids >= 0:
            self._linux.back_to(self._own_pids)
        os.close(orders[0])
        os.close(answers[1])
        self._spare = pid, orders[1], answers[0]
        return self._spare

    def _new_checker(self) -> tuple[int, socket.socket]:
        """A process that serves many jobs, for it runs no code of a program; replaced when one left it waiting."""
        line, far = socket.socketpair()
        jobs, most = self._config.jobs, int(self._config.limits["output_kb"]) << 10
        pid = self._fork((jobs, far.fileno()), lambda: checker.serve(far, jobs, most))
        far.close()
        self._checker = pid, line
        return self._checker

    def _fork(self, keep: tuple[int, ...], body: Callable[[], None], tell: int = -1) -> int:
        """A confined child that runs `body`; first it writes `ready` to `tell`, or why it is not."""
        pid = os.fork()
        if pid:
            return pid
        try:
            said = b"ready"
            try:
                self._confine(keep)
            except (OSError, ValueError) as error:
                said = str(error).encode()
            if tell >= 0:
                wire.write(tell, said)
            if said == b"ready":
                body()
        finally:
            os._exit(1)

    def _confine(self, keep: tuple[int, ...]) -> None:
        low = 3
        for fd in (*sorted(keep), _MOST_FDS):
            os.closerange(low, fd)
            low = fd + 1
        os.setsid()
        if self._linux:
            self._linux.die_with_parent()
        limits = {name: int(most) for name, most in self._config.limits.items()}
        for kind, most in (
            (resource.RLIMIT_AS, limits["memory_mb"] << 20),
            (resource.RLIMIT_FSIZE, limits["file_mb"] << 20),
            (resource.RLIMIT_NOFILE, limits["open_files"]),
            (resource.RLIMIT_CORE, 0),
        ):
            with suppress(ValueError, OSError):  # a Mac refuses some; `check` tells which hold
                resource.setrlimit(kind, (most, most))
        if self._filter:
            self._linux.confine(self._filter, limits["processes"])

    def _watch(self, line: socket.socket, limit: float, alone: bool) -> dict[str, Any]:
        """The checker's verdict, `timed_out`, `suspect` (loaded machine), or `lost` when the checker died.

        The clock counts wall time less the time in which the two processes were ready to run and had no core.
        """
        start, before, deadline = 0.0, None, time.monotonic() + _LAG
        while True:
            if self._wait(line.fileno(), deadline - time.monotonic()):
                try:
                    said = json.loads(wire.read(line.fileno()))
                except (EOFError, ConnectionError):
                    return {"status": "lost"}
                if said != "started":
                    return dict(said)
                start, before = time.monotonic(), self._waited()
                deadline = start + limit
                continue
            if not start:
                return {"status": "broken", "detail": f"its processes did not start in {_LAG:.0f} s"}
            spent, after = time.monotonic() - start, self._waited()
            timed_out = {"status": "timed_out", "detail": f"over {limit:g} s", "seconds": spent}
            if before is None or after is None:  # no such account on this system: by the load of the machine
                loaded = os.getloadavg()[0] > (os.cpu_count() or 1)
                return timed_out | ({"status": "suspect"} if loaded and not alone else {})
            left = limit - spent + after - before
            if left <= 0 or spent >= limit * _STRETCH_ALONE:
                return timed_out
            if spent >= limit * _STRETCH and not alone:
                return timed_out | {"status": "suspect"}
            deadline = time.monotonic() + max(left, 0.005)

    def _waited(self) -> float | None:
        """Seconds that checker and program have waited for a core so far; None where the kernel does not tell."""
        try:
            return sum(int(_proc(f"{pid}/schedstat", self._config.proc).split()[1]) for pid in self._children()) / 1e9
        except OSError:
            return None

    def _children(self) -> list[int]:
        """As the harness's /proc numbers them; at the level `process` that is as this process does."""
        return [int(pid) for pid in _proc("thread-self/children", self._config.proc).split()]

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
        """Kill what was started for the job and all it left; wait status by pid."""
        ended = {}
        process = self._config.level == "process"
        for pid in self._started:
            if process:
                with suppress(ProcessLookupError, PermissionError):  # before its session begins; on a Mac, when dead
                    os.killpg(pid, signal.SIGKILL)
            os.kill(pid, signal.SIGKILL)  # the first of a pid namespace: the kernel ends the rest of it
            ended[pid] = os.waitpid(pid, 0)[1]
        self._started = []
        kept = {held[0] for held in (self._checker, self._spare) if held}
        with suppress(OSError):  # a kernel that does not list children
            # Orphans have come to this process; at the other levels the filter lets none be made.
            while process and self._linux and (orphans := set(self._children()) - kept):
                for pid in orphans:
                    os.kill(pid, signal.SIGKILL)
                    os.waitpid(pid, 0)
        return ended

    def _clean(self) -> None:
        scratch = Path(self._config.scratch)
        if self._own_pids < 0:
            empty(scratch)
        elif os.statvfs(scratch).f_ffree != self._untouched:
            self._untouched = self._linux.fresh_scratch(str(scratch), int(self._config.limits["scratch_mb"]))

    def _leave(self) -> NoReturn:
        """End with all below: the kernel's doing when this is the first process of its pid namespace."""
        if self._config.level == "process":
            self._started += [held[0] for held in (self._checker, self._spare) if held]
            self._end()
            shutil.rmtree(self._config.scratch, ignore_errors=True)
        os._exit(0)


def empty(folder: Path) -> None:
    """Remove what is in `folder`, whatever permissions a program gave it."""
    for path in folder.iterdir():
        if path.is_symlink() or not path.is_dir():
            path.unlink()
            continue
        path.chmod(0o700)
        empty(path)
        path.rmdir()


def _proc(name: str, proc: int, text: bytes = b"") -> str:
    """Read, or write, a file of the harness's /proc."""
    fd = os.open(name, os.O_WRONLY if text else os.O_RDONLY, dir_fd=proc)
    try:
        return str(os.write(fd, text)) if text else os.read(fd, 1 << 16).decode()
    finally:
        os.close(fd)


def _ending(status: int) -> str:
    if os.WIFEXITED(status):
        return f"exit {os.WEXITSTATUS(status)}"
    return signal.Signals(os.WTERMSIG(status)).name if os.WTERMSIG(status) < 32 else f"signal {os.WTERMSIG(status)}"
