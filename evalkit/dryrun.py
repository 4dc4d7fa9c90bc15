"""`evalkit run --dry-run`: what a run would ask and what that costs. Writes nothing.

    column      requests  prompt tokens  cacheable  output tokens  KV memory  judge calls  price  time
    mmlu_5shot  14042     9821377        92.1 %     14042          2.10 GiB   0            -      0:41:10

Output tokens and time are by the model's last finished run under --out; where there is none, the recipe's maximum and
a short probe of the engine.
"""

from __future__ import annotations

import heapq
import json
import tomllib
from collections import Counter
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from evalkit import engines, plan, probe, prompts, store
from evalkit import judge as judging
from evalkit.engines.vllm_start import cpu_build
from evalkit.errors import InputError
from evalkit.plan import ColumnPlan, Plan
from evalkit.probe import Speed
from evalkit.types import Completion, Generate, Request, RunSpec

BLOCK, CPU_BLOCK = 16, 128  # tokens a block of vLLM's
WINDOW = 64  # requests at once that evalkit asks of it on CPUs


def estimate(spec: RunSpec) -> tuple[list[dict[str, str]], list[str]]:
    """Rows of the table, the last of them the total, and notes. InputError as for the run itself."""
    price = _price(spec)
    engines.prepare(spec.engine)
    planned = plan.make(spec, weights=False)
    last, engine = _last_run(Path(spec.out) / planned.folder_name)
    block = _block(spec, engine)
    window = int(spec.engine_args.get("max_num_seqs") or engine.get("max_num_seqs") or WINDOW)
    keys, blocks, few = set[str](), set[int](), list[Request]()
    found, total = {}, Counter[str]()
    for column in planned.columns:
        own = found[column.column.name] = _column(column, keys, blocks, block, last.get(column.column.name), few)
        own["kv"] = sum(heapq.nlargest(window, own.pop("sizes"))) * _kv_bytes(planned)
        own |= _judging(planned, column, own["new"] / max(1, own["requests"]), price)
        total.update(own)
        total["kv"] = max(total["kv"] - own["kv"], own["kv"])  # the window is shared
    speed: Speed | str = "--no-probe"
    if last:
        speed = Speed(last["rate"], last["rate"], str(engine["run"]))
    elif "no-probe" not in spec.options:
        speed = probe.measure(planned, few)
    shared = f"blocks of {block} tokens with which an earlier prompt begins" if block else "nothing, by this engine"
    notes = [f"cacheable: {shared}; KV memory: the {window} longest requests at once, in 16 bits, nothing shared",
             *_said(speed, bool(last))]
    judge = [f"judge: {spec.judge}{price[2]}"] if total["judge"] else []
    return [_row(name, own, speed) for name, own in (*found.items(), ("total", total))], notes + judge


def _block(spec: RunSpec, engine: Mapping[str, Any]) -> int:
    """Tokens that the engine shares as a whole: a block of vLLM's; 0 where it shares none."""
    name = spec.engine or "vllm"
    if name == "hf":
        return 0
    own = spec.engine_args.get("block_size") or engine.get("block_size")
    return int(own) if own else CPU_BLOCK if name == "vllm" and cpu_build() else BLOCK


def _said(speed: Speed | str, by_run: bool) -> list[str]:
    if by_run and isinstance(speed, Speed):
        return [f"output tokens and time: by {speed.source}, {speed.new:.0f} tokens computed a second"]
    first = "output tokens: the recipe's maximum; no finished run of this model under --out tells more"
    if isinstance(speed, str):
        return [first, f"time: not known ({speed})"]
    return [first, f"time: by {speed.source}: {speed.prompt:.0f} prompt tokens computed and {speed.new:.0f} tokens "
                   "generated a second in a full window, which a run of few samples does not fill"]


def _column(column: ColumnPlan, keys: set[str], blocks: set[int], block: int, mean: float | None,
            few: list[Request]) -> dict[str, Any]:
    """Counts of a column's requests, but for those that a column before it asks too; `sizes` are their lengths. The
    first of them go to `few`, for the probe."""
    found: dict[str, Any] = dict.fromkeys(("requests", "tokens", "cached", "new"), 0) | {"sizes": []}
    for _, request in prompts.requests(column.writer, plan.rendered(column), ""):
        if request.key not in keys:
            keys.add(request.key)
            most = request.ask.max_tokens if isinstance(request.ask, Generate) else 1
            found["requests"], found["tokens"] = found["requests"] + 1, found["tokens"] + len(request.tokens)
            found["cached"] += _cacheable(request.tokens, block, blocks)
            found["new"] += most if mean is None else min(mean, most)
            found["sizes"].append(len(request.tokens) + most)
            if len(found["sizes"]) <= probe.FEW:
                few.append(request)
    return found


def _judging(planned: Plan, column: ColumnPlan, new: float, price: tuple[float, float, str]) -> dict[str, Any]:
    """Judge calls of a column, the tokens that its own engine reads for them, and their price in USD: both by the
    model's own tokenizer, and by the answers' expected length `new`."""
    if column.writer.task.kind != "pairwise":
        return {"judge": 0, "own": 0, "usd": 0.0}
    assert planned.tokenizer is not None  # else no request could be counted
    unasked = {sample.id: [Completion("")] for sample in column.samples}
    pairs = judging.pairs(column, partial(planned.source.rows, task=column.column.task), unasked)
    tokens = sum(len(planned.tokenizer.encode(pair.prompt())) + new for pair in pairs)
    usd = (tokens * price[0] + len(pairs) * judging.REPLY * price[1]) / 1e6
    return {"judge": len(pairs), "own": tokens if planned.self_judged else 0, "usd": usd}


def _price(spec: RunSpec) -> tuple[float, float, str]:
    """USD per million tokens of the judge's prompts and replies, and what is to be said of it. InputError."""
    model, _ = judging.parse(spec.judge)
    if own := spec.options.get("judge-price", ""):
        try:
            prompt, reply = (float(part) for part in own.split(","))
        except ValueError:
            raise InputError(f"--option judge-price={own}: the form is PROMPT,REPLY in USD per million tokens, "
                             "for example 2.5,10") from None
        return prompt, reply, f" at {prompt:g} and {reply:g} USD per million tokens of prompt and reply"
    if not model:
        return 0.0, 0.0, ", by the run's own engine"
    known = tomllib.loads((Path(__file__).parent / "judges.toml").read_text(encoding="utf-8"))
    name = max((name for name in known["price"] if model.startswith(name)), key=len, default="")
    if not name:
        return 0.0, 0.0, ": price not known; give it as --option judge-price=PROMPT,REPLY (USD per million tokens)"
    prompt, reply = known["price"][name]
    return prompt, reply, (f" at {prompt:g} and {reply:g} USD per million tokens of prompt and reply "
                           f"({name}, {known['seen']})")


def _cacheable(tokens: Any, block: int, seen: set[int]) -> int:
    """Tokens of the leading blocks that an earlier prompt had; the last token is computed in any case."""
    if not block:
        return 0
    chain = found = 0
    for at in range(0, len(tokens) - block + 1, block):
        chain = hash((chain, tokens[at:at + block].tobytes()))
        if chain in seen and found == at and at + block < len(tokens):
            found += block
        seen.add(chain)
    return found


def _row(name: str, found: Mapping[str, Any], speed: Speed | str) -> dict[str, str]:
    time = "-"
    if isinstance(speed, Speed):
        s = round(speed.seconds(found["tokens"] - found["cached"] + found["own"], found["new"]))
        time = f"{s // 3600}:{s // 60 % 60:02d}:{s % 60:02d}"
    return {"column": name, "requests": f"{found['requests']}", "prompt tokens": f"{found['tokens']}",
            "cacheable": f"{100 * found['cached'] / max(1, found['tokens']):.1f} %",
            "output tokens": f"{found['new']:.0f}",
            "KV memory": f"{found['kv'] / 2**30:.2f} GiB" if found["kv"] else "-", "judge calls": f"{found['judge']}",
            "price": f"${found['usd']:.2f}" if found["usd"] else "-", "time": time}


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
