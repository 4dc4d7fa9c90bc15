"""GSM CoT against lm-eval's generation: the same prompts, stops and engine settings.

    python benchmarks/gsm_vs_lmeval.py --data DIR [--limit 16]

lm-eval tokenises the text itself, outside the clock it is checked to get the same ids. Counted in CPU-seconds: its
`generate_until` with that tokenising, and evalkit's pool with its journal.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import common
from mmlu_vs_lmeval import lm_eval_model

from evalkit.types import Generate, RunSpec

LEAST = 0.95  # "not slower", less the noise of a shared machine


def spec(args: argparse.Namespace) -> RunSpec:
    return RunSpec(model=args.model, tasks="gsm_cot", data=args.data, limit=args.limit)


def write(work: common.Planned, file: Path) -> None:
    lines, texts = [], work.texts()
    for request in work.requests():
        assert isinstance(request.ask, Generate)
        if request.ask.stop_tokens:
            raise SystemExit("stops that are tokens cannot be given to lm-eval")
        lines.append({"key": request.key, "tokens": list(request.tokens), "text": texts[request.key],
                      "stop": request.ask.stop, "max_tokens": request.ask.max_tokens})
    settings = {"length": work.todo.length, "model": work.plan.model.path, "seed": work.plan.recipe.seed}
    file.write_text(json.dumps({**settings, "requests": lines}))


def theirs(folder: str) -> dict[str, Any]:
    given = json.loads((Path(folder) / "requests.json").read_text())
    model = lm_eval_model(given)
    from lm_eval.api.instance import Instance

    def instance(i: int, text: str, stop: list[str], size: int) -> Any:
        how = {"until": stop, "max_gen_toks": size, "do_sample": False, "temperature": 0.0}
        return Instance(request_type="generate_until", doc={}, arguments=(text, how), idx=i)

    rows = given["requests"]
    for row in rows:
        if model.tok_encode(row["text"]) != row["tokens"]:
            raise SystemExit(f"lm-eval tokenises request {row['key']} otherwise")
    model.generate_until([instance(0, "One, two,", ["\n"], 4)], disable_tqdm=True)
    asked = [instance(i, row["text"], row["stop"], row["max_tokens"]) for i, row in enumerate(rows)]
    with common.measured() as cost:
        found = model.generate_until(asked, disable_tqdm=True)
    return {"cpu": cost.cpu, "wall": cost.wall, "answers": dict(zip((row["key"] for row in rows), found, strict=True))}


def main() -> int:
    parser = common.parser(__doc__)
    parser.add_argument("--limit", type=int, default=16, help="questions (default 16)")
    args = parser.parse_args()
    if args.side == "theirs":
        common.answer(args.work, args.side, theirs(args.work))
        return 0
    if args.side:
        with tempfile.TemporaryDirectory() as scratch:
            common.answer(args.work, args.side, common.ask(common.planned(spec(args), Path(scratch))))
        return 0
    return compare(args)


def compare(args: argparse.Namespace) -> int:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write(common.planned(spec(args), folder), folder / "requests.json")
        found = common.pairs(lambda: common.side("ours", folder), lambda: common.side("theirs", folder), args.pairs)
    ours, theirs = found[-1]
    answers = ours["answers"]
    equal = sum(answers[key]["text"] == text for key, text in theirs["answers"].items())
    tokens = sum(a["generated"] for a in answers.values())
    result = common.ratios(found, LEAST)
    return common.report("gsm_vs_lmeval", [
        ["side", "questions", "CPU s", "ratio"],
        ["lm-eval", len(answers), result["cpu"][1], ""],
        ["evalkit", len(answers), result["cpu"][0], result["ratio"]],
    ], {**result, "equal_texts": equal, "generated": tokens, "met": result["ratio"] >= LEAST})


if __name__ == "__main__":
    sys.exit(main())
