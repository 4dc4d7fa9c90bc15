"""MMLU, 5 shots, against a padded batch of 8 in transformers, as open-instruct reads it; the same token ids.

    python benchmarks/mmlu_vs_padded.py --data DIR [--questions 5]

Subject by subject, left padding, one forward pass over the whole batch, logits of the last position, softmax over the
option ids, argmax: get_next_word_predictions of open-instruct. Both sides run bfloat16; loading is not counted.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from itertools import groupby
from pathlib import Path
from typing import Any

import common
import mmlu

LEAST = 8.0
BATCH = 8


def theirs(folder: str) -> dict[str, Any]:
    from evalkit import engines

    engines.prepare("hf")
    import torch
    from transformers import AutoModelForCausalLM

    given = json.loads((Path(folder) / "requests.json").read_text())
    model: Any = AutoModelForCausalLM.from_pretrained(given["model"], dtype=torch.bfloat16)
    model.eval()
    pad = model.config.pad_token_id or model.config.eos_token_id or 0
    answers = {}

    @torch.no_grad()
    def predict(rows: list[dict[str, Any]]) -> Any:
        width = max(len(row["tokens"]) for row in rows)
        ids = torch.tensor([[pad] * (width - len(row["tokens"])) + row["tokens"] for row in rows])
        mask = torch.tensor([[0] * (width - len(row["tokens"])) + [1] * len(row["tokens"]) for row in rows])
        logits = model(input_ids=ids, attention_mask=mask).logits[:, -1, :]
        return torch.softmax(logits[:, [option[0] for option in rows[0]["options"]]], dim=-1)

    predict([{"tokens": list(common.WARM), "options": [[5], [6]]}])
    padded = 0
    with common.measured() as cost:
        for _, own in groupby(given["requests"], lambda row: row["subject"]):
            rows = list(own)
            for at in range(0, len(rows), BATCH):
                batch = rows[at:at + BATCH]
                padded += len(batch) * max(len(row["tokens"]) for row in batch)
                for row, shares in zip(batch, predict(batch).float().tolist(), strict=True):
                    answers[row["key"]] = [math.log(max(share, 1e-30)) for share in shares]
    return {"cpu": cost.cpu, "wall": cost.wall, "answers": answers, "tokens": padded}


def main() -> int:
    parser = common.parser(__doc__)
    parser.add_argument("--questions", type=int, default=5, help="questions a subject (default 5)")
    args = parser.parse_args()
    if args.side == "theirs":
        common.answer(args.work, args.side, theirs(args.work))
        return 0
    if args.side:
        common.answer(args.work, args.side, mmlu.ours(args.work, args.data, args.model, args.questions))
        return 0
    return compare(args)


def compare(args: argparse.Namespace) -> int:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        mmlu.write(common.planned(mmlu.spec(args.data, args.model, args.questions), folder), folder / "requests.json")
        found = common.pairs(lambda: common.side("ours", folder), lambda: common.side("theirs", folder), args.pairs)
    ours, theirs = found[-1]
    agree = mmlu.letters({key: mmlu.relative(a["logprobs"]) for key, a in ours["answers"].items()},
                         {key: mmlu.relative(row) for key, row in theirs["answers"].items()})
    computed = sum(a["prompt"] - a["cached"] for a in ours["answers"].values())
    result = common.ratios(found, LEAST)
    n = args.questions * len(mmlu.SIZES)
    return common.report("mmlu_vs_padded", [
        ["side", "questions", "tokens", "computed", "CPU s", "ratio"],
        ["padded batch of 8", n, ours["tokens"], theirs["tokens"], result["cpu"][1], ""],
        ["evalkit", n, ours["tokens"], computed, result["cpu"][0], result["ratio"]],
    ], {**result, "letters": agree, "met": result["ratio"] >= LEAST and not agree["differ"]})


if __name__ == "__main__":
    sys.exit(main())
