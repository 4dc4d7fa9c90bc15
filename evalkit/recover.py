"""`evalkit recover`: a weight-diff release plus its base weights gives the model (open-instruct's weight_diff.py).

    recover(raw=llama-65b, diff=tulu-65b as downloaded, out=...)  ->  out/model-00001-of-00053.safetensors, ...

As the original, in float32: every tensor of the diff += the base's; a base that is one row short (<pad>) gets the
mean of its rows. Unlike it, some rows at a time (the original needs 520 GB for 65B), resumable by shard, and checked.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evalkit import models
from evalkit.errors import ModelError
from evalkit.weights import Tensor, files, read, read_json, tensors

SHARD = 5 << 30  # bytes of an output file
CHUNK = 64 << 20  # bytes of float32 added at once
RECORD = "recovery.json"
OUTPUT = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_KEEP = ("*.json", "*.model", "*.jinja", "*.txt")  # tokenizer and configs, taken from the diff's folder
_GROWN = ("model.embed_tokens.weight", "lm_head.weight")
Progress = Callable[[str, int, int], None]  # what is done ("hash" or "add"), bytes done, bytes in all


@dataclass(frozen=True, slots=True)
class Pair:
    """One tensor of the diff with the base's (None: left out of the result), and its place in the output."""

    diff: Tensor
    raw: Tensor
    shard: str


def recover(raw: Path, diff: Path, out: Path, dtype: str = "float32", progress: Progress | None = None) -> Path:
    """Write the recovered model to `out` and return it. `dtype`: float32 (as the original), float16 or bfloat16.

    Called again after a stop it goes on with the next shard. `out/recovery.json` holds the sha256 of every input
    and output file. Raises ModelError, before anything is written, for names or shapes that do not match, a base
    that the diff was not made from, too little disk, or an `out` that holds something else.
    """
    tell = progress or (lambda what, done, total: None)
    if dtype not in OUTPUT:
        raise ModelError(f"--dtype {dtype!r}: one of {', '.join(OUTPUT)}")
    pairs = _plan(raw, diff, OUTPUT[dtype])
    verdict = _check_base(pairs)
    about = {"raw": models.fingerprint(raw), "diff": models.fingerprint(diff), "dtype": dtype}
    record = _record(out, about)
    shards: dict[str, list[Pair]] = {}
    for pair in pairs:
        shards.setdefault(pair.shard, []).append(pair)
    total = sum(_nbytes(p, dtype) for p in pairs)
    left = [name for name in shards if not _is_done(out / name, record)]
    need = sum(_nbytes(p, dtype) for name in left for p in shards[name])
    parent = next(p for p in (out, *out.absolute().parents) if p.exists())
    if (free := shutil.disk_usage(parent).free) < need:
        raise ModelError(f"{out}: {need / 2**30:.1f} GiB are needed, {free / 2**30:.1f} GiB are free")
    out.mkdir(parents=True, exist_ok=True)
    record |= about | {"base_check": verdict}
    if "inputs" not in record:
        record["inputs"] = _hash_inputs((raw, diff), tell)
        _write_json(out / RECORD, record)
    done = total - need
    for name in left:
        digest = hashlib.sha256()
        with (out / f"{name}.part").open("wb") as f:
            for block in _shard(shards[name], dtype):
                f.write(block)
                digest.update(block)
                done += len(block)
                tell("add", min(done, total), total)
        (out / f"{name}.part").rename(out / name)
        record["outputs"] = {**record.get("outputs", {}), name: digest.hexdigest()}
        _write_json(out / RECORD, record)
    _finish(diff, out, pairs, dtype)
    return out


def _nbytes(pair: Pair, dtype: str) -> int:
    return math.prod(pair.diff.shape) * (4 if dtype == "float32" else 2)


def _plan(raw: Path, diff: Path, dtype: str) -> list[Pair]:
    """Every tensor of the result, grouped into shards in the diff's order; ModelError when names or shapes differ."""
    for folder in (raw, diff):
        models.check_folder(folder, tokenizer=folder == diff, weights=False)
    if models.is_weight_diff(raw):
        raise ModelError(f"--raw {raw} holds a difference, no base weights; are --raw and --diff swapped?")
    base, deltas = tensors(raw), tensors(diff)
    # Buffers that old transformers versions saved; a loader computes them from the config.
    deltas = {n: t for n, t in deltas.items() if n in base or not n.endswith("rotary_emb.inv_freq")}
    if missing := [name for name in deltas if name not in base]:
        raise ModelError(f"--raw {raw}: {len(missing)} tensors of the diff are not there, first {missing[0]}: "
                         "another base, or one not converted to Hugging Face form")
    for name, delta in deltas.items():
        short = (delta.shape[0] - 1, *delta.shape[1:]) if name in _GROWN else delta.shape
        if base[name].shape not in (delta.shape, short):
            raise ModelError(f"--raw {raw}: {name} is {_by(base[name].shape)}, in the diff {_by(delta.shape)}: "
                             "a base of another size")
        for tensor in (delta, base[name]):
            if tensor.dtype not in ("F64", "F32", "F16", "BF16"):
                raise ModelError(f"{tensor.file}: {name} is {tensor.dtype}, no floating-point weights; cannot be added")
    numbers, n, filled = [], 1, 0
    for delta in deltas.values():
        size = math.prod(delta.shape) * (4 if dtype == "F32" else 2)
        if filled and filled + size > SHARD:
            n, filled = n + 1, 0
        numbers.append(n)
        filled += size
    return [Pair(delta, base[delta.name], f"model-{number:05}-of-{n:05}.safetensors")
            for delta, number in zip(deltas.values(), numbers, strict=True)]


def _by(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))


def _check_base(pairs: Sequence[Pair]) -> str:
    """`confirmed` or `undecided`; ModelError when the diff was made from other base weights of the same shape.

    A diff is fl32(tuned - base). Where it is at most half the base's size the subtraction is exact (Sterbenz), so
    base + diff is the tuned weight, which fits into float32, or into 16 bits where the tuned model was saved so.
    With another base the lowest bits do not meet, and the sum needs more bits than that in a quarter of the
    weights. A diff that is no such difference (rounded to 16 bits, or noise) decides nothing.
    """
    import torch

    matrices = [p for p in pairs if len(p.diff.shape) == 2 and p.diff.name not in _GROWN and p.diff.dtype == "F32"]
    sums, lows, deltas = [], [], []
    for pair in matrices[:: max(1, len(matrices) // 4)][:5]:
        rows = max(1, (1 << 18) // pair.diff.shape[1])
        delta, base = (read(t, 0, rows).flatten().double() for t in (pair.diff, pair.raw))
        use = (delta != 0) & (delta.abs() <= base.abs() / 2)
        sums.append((base + delta)[use])
        deltas.append(delta[delta != 0])
        lows.append(_bits(delta[use])[1] - torch.frexp(base[use])[1])
    if not sums or (n := sum(len(s) for s in sums)) < 1000:
        return "undecided"
    total, delta, low = torch.cat(sums), torch.cat(deltas), torch.cat(lows)
    width = _bits(total)[0]
    # Of float32 noise half has an odd last bit, of a difference fewer; a constant has few values.
    is_difference = (_bits(delta)[0] == 24).double().mean() < 0.45 and len(set(delta[:4096].tolist())) > 16
    allowed = 11 if low.double().median() > -18 else 24  # both models had 16 bits: the tuned one has 8 or 11
    wrong = float((width > allowed).double().mean())
    if not is_difference:
        return "undecided"
    if wrong > 0.02:
        raise ModelError(f"--raw {pairs[0].raw.file.parent}: not the weights that the diff was made from ({wrong:.0%} "
                         f"of {n} sums do not fit); take the original base of this size, unrounded")
    return "confirmed"


def _bits(value: Any) -> tuple[Any, Any]:
    """Of float64 values the number of significant bits, and the exponent of the lowest one."""
    import torch

    mantissa, exponent = torch.frexp(value)
    whole = (mantissa.abs() * 2**53).long()
    trailing = torch.frexp((whole & -whole).double())[1] - 1
    return torch.where(whole == 0, 0, 53 - trailing), exponent - 53 + trailing


def _record(out: Path, about: Mapping[str, str]) -> dict[str, Any]:
    """The record of an earlier, interrupted recovery of the same inputs into `out`, else an empty one."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return {}
    if not (out / RECORD).is_file():
        raise ModelError(f"--out {out}: exists and holds no recovery to go on with; give a new folder")
    record = read_json(out / RECORD)
    for key, value in about.items():
        if record.get(key) != value:
            raise ModelError(f"--out {out}: holds a recovery with another {key}; give a new folder")
    return record


def _is_done(file: Path, record: Mapping[str, Any]) -> bool:
    return file.is_file() and file.name in record.get("outputs", {})


def _hash_inputs(folders: Sequence[Path], tell: Progress) -> dict[str, str]:
    """sha256 of every weight file of both folders, by path."""
    todo = [file for folder in folders for file in files(folder)]
    total, done, hashes = sum(file.stat().st_size for file in todo), 0, {}
    for file in todo:
        digest = hashlib.sha256()
        with file.open("rb") as f:
            while block := f.read(16 << 20):
                digest.update(block)
                done += len(block)
                tell("hash", done, total)
        hashes[str(file)] = digest.hexdigest()
    return hashes


def _shard(pairs: Sequence[Pair], dtype: str) -> Iterator[bytes | memoryview]:
    """The bytes of one safetensors file: header, then one tensor after the other."""
    head: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for p in pairs:
        size = _nbytes(p, dtype)
        place = [offset, offset + size]
        head[p.diff.name] = {"dtype": OUTPUT[dtype], "shape": list(p.diff.shape), "data_offsets": place}
        offset += size
    text = json.dumps(head).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for p in pairs:
        yield from _sums(p, dtype)


def _sums(pair: Pair, dtype: str) -> Iterator[memoryview]:
    """One tensor's bytes, some rows at a time."""
    import torch

    n, *rest = pair.diff.shape
    step = max(1, CHUNK // (4 * math.prod(rest)))
    total = torch.zeros(rest, dtype=torch.float64)
    for start in range(0, n, step):
        value = read(pair.diff, start, start + step).float()
        base = read(pair.raw, start, start + step)
        value[: len(base)] += base
        if pair.raw.shape != pair.diff.shape:
            total += base.sum(dim=0, dtype=torch.float64)
            if start + step >= n:  # the row of <pad>: the original gives the base the mean of its rows first
                value[-1] += (total / (n - 1)).float()
        yield memoryview(value.to(getattr(torch, dtype)).flatten().view(torch.uint8).numpy())


def _finish(diff: Path, out: Path, pairs: Sequence[Pair], dtype: str) -> None:
    """Index, tokenizer and configs; config.json last, so that a folder without it is an unfinished one."""
    _write_json(out / "model.safetensors.index.json", {
        "metadata": {"total_size": sum(_nbytes(p, dtype) for p in pairs)},
        "weight_map": {p.diff.name: p.shard for p in pairs}})
    for pattern in _KEEP:
        for file in sorted(diff.glob(pattern)):
            if not file.name.endswith(".index.json") and file.name not in ("config.json", RECORD):
                shutil.copyfile(file, out / file.name)
    config = {k: v for k, v in read_json(diff / "config.json").items() if k not in ("dtype", "torch_dtype")}
    _write_json(out / "config.json", config | {"torch_dtype": dtype})


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    part = path.with_suffix(".tmp")
    part.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", "utf-8")
    part.rename(path)
