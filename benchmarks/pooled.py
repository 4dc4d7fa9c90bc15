"""What pooling all columns in one engine session saves.

    python benchmarks/pooled.py --data DIR [--part engine,process,columns] [--limit 8]

engine: a mixed pool (MMLU, GSM, BBH) against the same columns one after the other in one engine, which is what
`--sequential` does; loading not counted. process: one `evalkit run` of the three benchmarks against one run each, from
start to end. columns: one run of all eleven columns (4 samples each, 1 HumanEval problem, AlpacaFarm answers of 256
tokens) against a run a column, from start to end.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import common

from evalkit import runner
from evalkit.types import RunSpec

LEAST = {"engine": 1.6, "process": 2.5, "columns": 3.0}
MIXED = ("mmlu", "gsm", "bbh")
SET = "alpaca_farm.max_tokens=256"


def mixed(args: argparse.Namespace) -> RunSpec:
    return RunSpec(model=args.model, tasks=",".join(MIXED), data=args.data, limit=args.limit)


def engine_side(args: argparse.Namespace, scratch: str) -> dict[str, Any]:
    options = {"sequential": "yes"} if args.side == "one-by-one" else {}
    return common.ask(common.planned(replace(mixed(args), options=options), Path(scratch)))


def engine_part(args: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as scratch:
        pooled, apart = (partial(common.side, name, Path(scratch)) for name in ("pooled", "one-by-one"))
        found = common.pairs(pooled, apart, args.pairs)
    answers = [side["answers"] for side in found[-1]]
    texts = [key for key, answer in answers[0].items() if not answer["logprobs"]]
    equal = sum(answers[0][key]["text"] == answers[1][key]["text"] for key in texts)
    return {"pairs": found, "what": f"{len(answers[0])} requests in one engine",
            "equal_texts": f"{equal} of {len(texts)}",
            "generated": [sum(answer["generated"] for answer in side.values()) for side in answers]}


def run(args: argparse.Namespace, scratch: str, *more: str) -> common.Cost:
    return common.command("run", "--model", args.model, "--data", args.data, "--out", scratch, *more)


def together_or_apart(args: argparse.Namespace, together: list[str], apart: list[list[str]]) -> dict[str, Any]:
    def one(*commands: list[str]) -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as scratch:
            costs = [run(args, scratch, *arguments, "--name", str(i)) for i, arguments in enumerate(commands)]
        return {"cpu": sum(cost.cpu for cost in costs), "wall": sum(cost.wall for cost in costs)}

    found = common.pairs(lambda: one(together), lambda: one(*apart), args.pairs)
    return {"pairs": found, "what": f"one process against {len(apart)}"}


def process_part(args: argparse.Namespace) -> dict[str, Any]:
    limit = ["--limit", str(args.limit)]
    return together_or_apart(args, ["--tasks", ",".join(MIXED), *limit], [["--tasks", name, *limit] for name in MIXED])


def columns_part(args: argparse.Namespace) -> dict[str, Any]:
    planned = runner.make(RunSpec(model=args.model, data=args.data, limit=4))
    ids = {c.column.name: [s.id for s in c.samples[:1 if c.writer.task.kind == "code" else 4]] for c in planned.columns}
    every = dict.fromkeys(sample for own in ids.values() for sample in own)
    pairwise = {c.column.name for c in planned.columns if c.writer.task.kind == "pairwise"}
    apart = [["--tasks", name, "--ids", ",".join(own), *(["--set", SET] if name in pairwise else [])]
             for name, own in ids.items()]
    return together_or_apart(args, ["--ids", ",".join(every), "--set", SET], apart)


def main() -> int:
    parser = common.parser(__doc__)
    parser.add_argument("--part", default=",".join(LEAST), help="engine, process, columns (default all)")
    parser.add_argument("--limit", type=int, default=8, help="samples a column of the mixed pool (default 8)")
    args = parser.parse_args()
    if args.side:
        with tempfile.TemporaryDirectory() as scratch:
            common.answer(args.work, args.side, engine_side(args, scratch))
        return 0
    parts = {"engine": engine_part, "process": process_part, "columns": columns_part}
    rows: list[list[object]] = [["part", "apart, CPU s", "pooled, CPU s", "ratio", "target", "pairs"]]
    results = {}
    for name in args.part.split(","):
        found = parts[name](args)
        result = results[name] = found | common.ratios(found["pairs"], LEAST[name])
        rows.append([f"{name}: {found['what']}", *result["cpu"][::-1], result["ratio"], LEAST[name], result["pairs"]])
        common.note(str(result))
    met = all(result["ratio"] >= result["target"] for result in results.values())
    return common.report("pooled", rows, {"parts": results, "met": met})


if __name__ == "__main__":
    sys.exit(main())
