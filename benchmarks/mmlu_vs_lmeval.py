"""MMLU, 5 shots, against lm-eval's vLLM backend in the same engine settings, both given the same token ids.

    python benchmarks/mmlu_vs_lmeval.py --data DIR [--questions 5] [--many 40]

Four subjects with long shots, 5 questions each. Counted is the evaluation phase alone, in CPU-seconds: for lm-eval
its `_loglikelihood_tokens` (its prompt building and tokenising are not counted), for evalkit the pool with its journal.
Then evalkit with 40 questions a subject, and what lm-eval would need for those by the tokens it has to compute.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

import common
import mmlu

LEAST = 15.0


def lm_eval_model(given: dict[str, Any]) -> Any:
    """lm-eval's vLLM model with the engine options evalkit would give. It asks for a distribution called `vllm`."""
    from evalkit import engines
    from evalkit.engines import EngineSpec, vllm_start

    engines.prepare("vllm")
    vllm, cpu = vllm_start.load()
    name, real = vllm_start.distribution()[0], metadata.version
    metadata.version = lambda distribution_name: real(name if distribution_name == "vllm" else distribution_name)
    from lm_eval.models.vllm_causallms import VLLM

    spec = EngineSpec(given["model"], max_model_len=given["length"], seed=given["seed"])
    options = vllm_start.options(spec, vllm, cpu)
    return VLLM(pretrained=options.pop("model"), **options)


def theirs(folder: str) -> dict[str, Any]:
    given = json.loads((Path(folder) / "requests.json").read_text())
    model = lm_eval_model(given)
    rows = [(("", str(i)), list(row["tokens"]), list(option)) for row in given["requests"]
            for i, option in enumerate(row["options"])]
    warm = list(common.WARM)
    model._loglikelihood_tokens([(("", ""), warm, [5])], disable_tqdm=True)
    with common.measured() as cost:
        found = [value for value, _ in model._loglikelihood_tokens(rows, disable_tqdm=True)]
    n = len(given["requests"][0]["options"])
    answers = {row["key"]: found[i * n:(i + 1) * n] for i, row in enumerate(given["requests"])}
    return {"cpu": cost.cpu, "wall": cost.wall, "answers": answers,
            "tokens": sum(len(row[1]) + len(row[2]) for row in rows)}


def main() -> int:
    parser = common.parser(__doc__)
    parser.add_argument("--questions", type=int, default=5, help="questions a subject (default 5)")
    parser.add_argument("--many", type=int, default=40, help="questions a subject for the growth; 0: none (default 40)")
    args = parser.parse_args()
    if args.side == "theirs":
        common.answer(args.work, args.side, theirs(args.work))
        return 0
    if args.side:
        questions = args.questions if args.side == "ours" else args.many
        common.answer(args.work, args.side, mmlu.ours(args.work, args.data, args.model, questions))
        return 0
    return compare(args)


def compare(args: argparse.Namespace) -> int:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        mmlu.write(common.planned(mmlu.spec(args.data, args.model, args.questions), folder), folder / "requests.json")
        found = common.pairs(lambda: common.side("ours", folder), lambda: common.side("theirs", folder), args.pairs)
        ours, theirs = found[-1]
        agree = mmlu.letters({k: a["logprobs"] for k, a in ours["answers"].items()}, theirs["answers"])
        result = common.ratios(found, LEAST)
        rows: list[list[object]] = [["side", "questions", "prompt tokens", "computed", "CPU s", "ratio"]]
        computed = sum(a["prompt"] - a["cached"] for a in ours["answers"].values())
        n = args.questions * len(mmlu.SIZES)
        own, other = result["cpu"]
        rows += [["lm-eval", n, theirs["tokens"], theirs["tokens"], other, ""],
                 ["evalkit", n, ours["tokens"], computed, own, result["ratio"]]]
        result |= {"letters": agree, "met": result["ratio"] >= LEAST and not agree["differ"]}
        if args.many:
            many = common.side("many", folder)
            expected = other / theirs["tokens"] * (4 * many["tokens"] + 4 * len(many["answers"]))
            computed = sum(a["prompt"] - a["cached"] for a in many["answers"].values())
            rows += [["lm-eval, computed", len(many["answers"]), 4 * many["tokens"], 4 * many["tokens"], expected, ""],
                     ["evalkit", len(many["answers"]), many["tokens"], computed, many["cpu"], expected / many["cpu"]]]
            result |= {"many": args.many, "many_cpu": many["cpu"], "many_ratio": expected / many["cpu"]}
    return common.report("mmlu_vs_lmeval", rows, result)


if __name__ == "__main__":
    sys.exit(main())
