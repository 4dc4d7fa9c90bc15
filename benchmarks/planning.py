"""Planning: all 14,042 MMLU prompts at 5 shots rendered and tokenised; and the time a real run spends outside vLLM.

    python benchmarks/planning.py --data DIR [--tokenizer FOLDER --format tulu] [--part prompts,outside] [--limit 16]

prompts: CPU-seconds of a process of its own, split at the moment when rows are read and the tokenizer is loaded; then
every prompt is tokenised whole and compared. outside: wall time of `evalkit run` of MMLU, GSM and BBH after the engine
is loaded, less the wall time within the engine's steps.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import common

LEAST = {"prompts": 12.0, "outside": 0.03}


def prompts(args: argparse.Namespace) -> dict[str, Any]:
    """Counts from the start of the interpreter. With side `whole` it goes on to tokenise each prompt whole."""
    from evalkit import plan
    from evalkit.types import RunSpec

    spec = RunSpec(args.model, "mmlu_5shot", data=args.data, format=args.format, tokenizer=args.tokenizer)
    planned = plan.make(spec, weights=False)
    made, found, tokens = common.cpu_seconds(), [], 0
    for item in plan.rendered(planned.columns[0]):
        tokens += len(item.tokens or ())
        if args.side == "whole":
            found.append(item)
    cpu = common.cpu_seconds()
    other = 0
    tokenizer = planned.tokenizer
    assert tokenizer is not None
    for item in found:
        # the tokenizer itself, without the look-up of lines that Tokenizer.encode puts before it
        ids = tokenizer._backend.encode(item.text)
        other += ids != list(item.tokens or ())
    return {"cpu": cpu, "made": made, "rendered": cpu - made, "prompts": len(planned.columns[0].samples),
            "tokens": tokens, "other_ids": other, "compared": len(found), "whole_cpu": common.cpu_seconds() - cpu}


def outside(args: argparse.Namespace, scratch: str) -> dict[str, Any]:
    from evalkit import runner
    from evalkit.engines.vllm import Vllm
    from evalkit.types import RunSpec

    marks: dict[str, float] = {"steps": 0.0, "count": 0}
    step, start, close = Vllm._step, Vllm.__init__, Vllm.close

    def timed_step(self: Any) -> Any:
        began = time.perf_counter()
        try:
            return step(self)
        finally:
            marks["steps"] += time.perf_counter() - began
            marks["count"] += 1

    def timed_start(self: Any, spec: Any) -> None:
        start(self, spec)
        marks["loaded"] = time.perf_counter()

    def timed_close(self: Any) -> None:
        began = time.perf_counter()
        close(self)
        marks["close"] = time.perf_counter() - began

    Vllm._step, Vllm.__init__, Vllm.close = timed_step, timed_start, timed_close  # type: ignore[method-assign]
    runner.run(RunSpec(args.model, "mmlu,gsm,bbh", data=args.data, limit=args.limit, out=scratch, name="run"))
    wall = time.perf_counter() - marks["loaded"]
    return {"wall": wall, "steps": marks["steps"], "n_steps": marks["count"], "share": 1 - marks["steps"] / wall,
            "close": marks["close"]}


def main() -> int:
    parser = common.parser(__doc__)
    parser.add_argument("--tokenizer", default="", metavar="FOLDER", help="another tokenizer for the prompts")
    parser.add_argument("--format", default="", help="and its chat format")
    parser.add_argument("--part", default=",".join(LEAST), help="prompts, outside (default both)")
    parser.add_argument("--limit", type=int, default=16, help="samples a column of the real run (default 16)")
    args = parser.parse_args()
    if args.side == "outside":
        with tempfile.TemporaryDirectory() as scratch:
            common.answer(args.work, args.side, outside(args, scratch))
        return 0
    if args.side:
        common.answer(args.work, args.side, prompts(args))
        return 0
    rows: list[list[object]] = [["part", "figure", "target"]]
    result: dict[str, Any] = {"met": True}
    with tempfile.TemporaryDirectory() as scratch:
        if "prompts" in args.part:
            runs = [common.side("prompts", Path(scratch)) for _ in range(args.pairs)]
            run = sorted(runs, key=lambda run: run["rendered"])[len(runs) // 2]
            whole = common.side("whole", Path(scratch))
            rows += [[f"{run['prompts']} prompts rendered and tokenised, CPU s", run["rendered"], LEAST["prompts"]],
                     ["before that: imports, tokenizer and data", run["made"], ""],
                     ["whole-string tokenising alone, CPU s", whole["whole_cpu"], ""],
                     [f"other token ids than whole-string, of {whole['compared']}", whole["other_ids"], 0]]
            result |= {"prompts": run, "cpu": [r["cpu"] for r in runs], "whole_cpu": whole["whole_cpu"],
                       "other_ids": whole["other_ids"], "compared": whole["compared"]}
            result["met"] = run["rendered"] <= LEAST["prompts"] and whole["other_ids"] == 0
        if "outside" in args.part:
            run = common.side("outside", Path(scratch))
            rows += [[f"outside the engine's {run['n_steps']} steps, % of {run['wall']:.0f} s", 100 * run["share"],
                      100 * LEAST["outside"]],
                     ["  of which the engine's end, s", run["close"], ""]]
            result |= {"outside": run, "met": result["met"] and run["share"] < LEAST["outside"]}
    return common.report("planning", rows, result)


if __name__ == "__main__":
    sys.exit(main())
