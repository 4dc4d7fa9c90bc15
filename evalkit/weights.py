"""Weight files of a model folder, read without loading the model: names and shapes from the headers, and one
tensor at a time from disk, so that memory stays near the largest tensor.

    tensors(folder)["model.norm.weight"]  ->  Tensor("model.norm.weight", "BF16", (576,), file, offset)
"""

from __future__ import annotations

import json
import math
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evalkit.errors import ModelError

INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64",
          "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool"}
_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2}


@dataclass(frozen=True, slots=True)
class Tensor:
    """`dtype` as safetensors writes it; `offset` is its first byte in a safetensors file, -1 in a .bin."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int = -1

    @property
    def itemsize(self) -> int:
        return _BYTES.get(self.dtype, 1)

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.itemsize


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; ModelError when there is none."""
    try:
        value = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as e:
        raise ModelError(f"{path}: cannot be read as JSON: {e}") from e
    if not isinstance(value, dict):
        raise ModelError(f"{path}: not a JSON object")
    return value


def files(folder: Path) -> list[Path]:
    """The weight files that a loader reads: safetensors before .bin, an index before a single file.

    Raises ModelError when there is none, or when an index names a file that is not there.
    """
    for single, index in zip(("model.safetensors", "pytorch_model.bin"), INDEXES, strict=True):
        if (folder / index).is_file():
            names = sorted(set(read_json(folder / index).get("weight_map", {}).values()))
            missing = [name for name in names if not (folder / name).is_file()]
            if missing:
                raise ModelError(f"{folder}: {len(missing)} of {len(names)} weight files are missing "
                                 f"({missing[0]}); finish the download")
            return [folder / name for name in names]
        if (folder / single).is_file():
            return [folder / single]
    raise ModelError(f"{folder}: no weights (model.safetensors, pytorch_model.bin, or the index of either)")


def tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of the folder by name, in the order of the files; only headers are read (.bin needs torch)."""
    return {name: tensor for file in files(folder) for name, tensor in header(file).items()}


def header(file: Path) -> dict[str, Tensor]:
    """The tensors of one weight file by name. Raises ModelError for a torn file."""
    if file.suffix != ".safetensors":
        names = {f"torch.{value}": key for key, value in DTYPES.items()}
        return {name: Tensor(name, names.get(str(value.dtype), str(value.dtype)), tuple(value.shape), file)
                for name, value in _load(file).items()}
    size = file.stat().st_size
    try:
        with file.open("rb") as f:
            start = 8 + int.from_bytes(f.read(8), "little")
            if start > size:
                raise ValueError("the header is longer than the file")
            table = json.loads(f.read(start - 8))
        table.pop("__metadata__", None)
        found = [Tensor(name, entry["dtype"], tuple(entry["shape"]), file, start + entry["data_offsets"][0])
                 for name, entry in table.items()]
        if any(t.offset + t.nbytes > size for t in found):
            raise ValueError("the file is shorter than its header says")
    except (ValueError, KeyError, AttributeError, TypeError) as e:
        raise ModelError(f"{file}: not a whole safetensors file ({e}); download it again") from e
    return {t.name: t for t in sorted(found, key=lambda t: t.offset)}


def _load(file: Path) -> dict[str, Any]:
    """The tensors of a .bin, mapped and not read (the form before torch 1.6 can't be mapped: read whole)."""
    import pickle

    try:
        import torch
    except ImportError as e:
        raise ModelError(f"{file}: reading .bin files needs torch: pip install 'evalkit[hf]'") from e
    try:
        loaded = torch.load(file, map_location="cpu", mmap=zipfile.is_zipfile(file), weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, OSError) as e:
        first = str(e).strip().partition("\n")[0]
        raise ModelError(f"{file}: torch cannot read it ({first}); download it again") from e
    return {name: value for name, value in loaded.items() if isinstance(value, torch.Tensor)}


def read(tensor: Tensor, start: int = 0, stop: int | None = None) -> Any:
    """The tensor's values, or its rows from `start` up to `stop`: a torch tensor of its own, no file stays mapped."""
    import torch

    if tensor.offset < 0:
        whole = _load(tensor.file)[tensor.name]
        return whole[start:stop].clone() if whole.dim() else whole.clone()
    dtype = getattr(torch, DTYPES[tensor.dtype])
    row = math.prod(tensor.shape[1:]) * tensor.itemsize
    n = len(range(*slice(start, stop).indices(tensor.shape[0]))) if tensor.shape else 1
    shape = (n, *tensor.shape[1:]) if tensor.shape else ()
    data = bytearray(n * row)
    with tensor.file.open("rb") as f:
        f.seek(tensor.offset + start * row)
        if f.readinto(data) != len(data):
            raise ModelError(f"{tensor.file}: ends inside {tensor.name}; download it again")
    return torch.frombuffer(data, dtype=dtype).reshape(shape) if data else torch.empty(shape, dtype=dtype)
