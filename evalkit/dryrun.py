"""`evalkit run --dry-run`: what a run would ask and what that costs, before an engine starts. Writes nothing.

    column      requests  prompt tokens  cacheable  output tokens  KV memory  judge calls  time
    mmlu_5shot  14042     9821377        92.1 %     14042          2.10 GiB   0            0:41:10

Output tokens and time are by the model's last finished run under --out; else the recipe's maximum, and a dash.
"""

from __future__ import annotations

import heapq
import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from evalkit import plan, prompts, store
from evalkit.errors import InputError
from evalkit.plan import ColumnPlan, Plan
from evalkit.types import Generate, RunSpec

BLOCK, WINDOW = 16, 64  # vLLM's tokens a block on GPUs; requests at once that evalkit asks of it on CPUs


def estimate(spec: RunSpec) -> tuple[list[dict[str, str]], list[str]]:
    """Rows of the table, the last of them the total, and notes. InputError as for the run itself."""
    planned = plan.make(spec, weights=False)
    last, engine = _last_run(Path(spec.out) / planned.folder_name)
    block = int(spec.engine_args.get("block_size") or engine.get("block_size") or BLOCK)
    window = int(spec.engine_args.get("max_num_seqs") or engine.get("max_num_seqs") or WINDOW)
    rate, keys, blocks = last.get("rate", 0.0), set[str](), set[int]()
    rows, total = [], Counter[str]()
    for column in planned.columns:
        found = _column(column, keys, blocks, block, last.get(column.column.name))
        found["kv"] = sum(heapq.nlargest(window, found.pop("sizes"))) * _kv_bytes(planned)
        rows.append(_row(column.column.name, found, rate))
        total.update(found)
        total["kv"] = max(total["kv"] - found["kv"], found["kv"])  # the window is shared
    notes = [f"cacheable: whole blocks of {block} tokens with which an earlier prompt begins; "
             f"KV memory: the {window} longest requests at once, in 16 bits, nothing shared",
             f"output tokens and time: by {engine['run']}, {rate:.0f} tokens computed a second" if rate else
             "output tokens: the recipe's maximum; no finished run of this model under --out tells more"]
    judge = [f"judge: {spec.judge}" + ", at the endpoint's price" * (spec.judge != "self")] if total["judge"] else []
    return [*rows, _row("total", total, rate)], notes + judge


def _column(column: ColumnPlan, keys: set[str], blocks: set[int], block: int, mean: float | None) -> dict[str, Any]:
    """Counts of a column's requests, but for those that a column before it asks too; `sizes` are their lengths."""
    found: dict[str, Any] = dict.fromkeys(("requests", "tokens", "cached", "new"), 0) | {"sizes": []}
    for _, request in prompts.requests(column.writer, plan.rendered(column), ""):
        if request.key not in keys:
            keys.add(request.key)
            most = request.ask.max_tokens if isinstance(request.ask, Generate) else 1
            found["requests"], found["tokens"] = found["requests"] + 1, found["tokens"] + len(request.tokens)
            found["cached"] += _cacheable(request.tokens, block, blocks)
            found["new"] += most if mean is None else min(mean, most)
            found["sizes"].append(len(request.tokens) + most)
    return found | {"judge": len(column.samples) if column.writer.task.kind == "pairwise" else 0}


def _cacheable(tokens: Any, block: int, seen: set[int]) -> int:
    """Tokens of the leading blocks that an earlier prompt had; the last token is computed in any case."""
    chain = found = 0
    for at in range(0, len(tokens) - block + 1, block):
        chain = hash((chain, tokens[at:at + block].tobytes()))
        if chain in seen and found == at and at + block < len(tokens):
            found += block
        seen.add(chain)
    return found


def _row(name: str, found: Mapping[str, Any], rate: float) -> dict[str, str]:
    s = round((found["tokens"] - found["cached"] + found["new"]) / rate) if rate else 0
    return {"column": name, "requests": f"{found['requests']}", "prompt tokens": f"{found['tokens']}",
            "cacheable": f"{100 * found['cached'] / max(1, found['tokens']):.1f} %",
            "output tokens": f"{found['new']:.0f}",
            "KV memory": f"{found['kv'] / 2**30:.2f} GiB" if found["kv"] else "-", "judge calls": f"{found['judge']}",
            "time": f"{s // 3600}:{s // 60 % 60:02d}:{s % 60:02d}" if rate else "-"}


def _kv_bytes(planned: Plan) -> int:
    """Bytes of keys and values a token, 16 bits each; 0 where the model's config is not at hand."""
    path = Path(planned.model.path) / "config.json"
    whole = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    config = whole.get("text_config", whole)
    heads, width, layers = (config.get(k, 0) for k in ("num_attention_heads", "hidden_size", "num_hidden_layers"))
    each = config.get("head_dim") or width // max(1, heads)
    return int(2 * 2 * layers * (config.get("num_key_value_heads") or heads) * each)


def _last_run(home: Path) -> tuple[dict[str, float], dict[str, Any]]:
    """Of the newest finished run in `home` that asked something: mean new tokens by column and `rate`, the tokens
    computed a second; its engine's settings and its folder as `run`. Both empty where there is none."""
    best: tuple[float, dict[str, float], dict[str, Any]] = (0.0, {}, {})
    for path in sorted(home.glob("*/run.json")):
        try:
            run = store.RunFolder(path.parent).read_json("run.json")
        except InputError:
            continue
        asked = [s for s in run.get("time", {}).get("sessions", ()) if s.get("requests")]
        if run["status"] == "done" and asked and run["time"]["started"] > best[0]:
            computed = sum(s["prompt_tokens"] - s["cached_tokens"] + s["generated_tokens"] for s in asked)
            rate = computed / max(1e-3, sum(s["ask_s"] - s["load_s"] for s in asked))
            best = (run["time"]["started"], {"rate": rate}, {**run["engine"], "run": path.parent})
    for file in best[2]["run"].glob("*.completions.jsonl") if best[1] else ():
        counts = [answer.n_generated for answer in store.Completions(file).values()] or [0]
        best[1][file.name.removesuffix(".completions.jsonl")] = sum(counts) / len(counts)
    return best[1:]
