"""Models: from what stands after `--model` to a folder or hub id with its format, context and checks.

    tulu-65b=/models/t65  ->  Model("tulu-65b", path="/models/t65", format="tulu", context=2048, ...)

Known models stand in `models.toml` and in the user's own. A name matches exactly or not at all: FastChat gave
every path with "oasst" in it an older template, wrong for both OASST models here.
"""

from __future__ import annotations

import hashlib
import os
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from evalkit.errors import InputError, ModelError, UnknownName, nearest
from evalkit.weights import INDEXES, header, read, read_json
from evalkit.weights import files as weight_files

KEYS = ("hub", "path", "package", "file", "sha256", "format", "context", "revision", "systems", "checks", "published")
CHECKS = ("weight_diff", "rope_theta")
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model", "tekken.json", "vocab.txt")
RECOVER = ("recover it first: `evalkit recover --raw BASE --diff DIFF --out DIR` adds the LLaMA-1 weights of the "
           "same size to the difference, then `--model {}=DIR` uses the result")
MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Model:
    """`path` is what is loaded: a folder if `local`, else a hub id. `format` "": the tokenizer's own template."""

    name: str
    path: str
    format: str = ""
    context: int | None = None
    revision: str = ""
    systems: Mapping[str, str] = field(default_factory=dict)
    checks: Mapping[str, Any] = field(default_factory=dict)
    published: str = ""
    local: bool = True


def user_config() -> Path:
    """The folder of the user's models.toml: $EVALKIT_CONFIG, else evalkit/ in $XDG_CONFIG_HOME or ~/.config."""
    base = os.environ.get("XDG_CONFIG_HOME") or "~/.config"
    return Path(os.environ.get("EVALKIT_CONFIG") or f"{base}/evalkit").expanduser()


def registry() -> dict[str, dict[str, Any]]:
    """Every known model's table by name, `systems` as texts; the user's keys go over the shipped ones."""
    models: dict[str, dict[str, Any]] = {}
    systems: dict[str, str] = {}
    for path in (Path(__file__).with_name("models.toml"), user_config() / "models.toml"):
        if not path.is_file():
            continue
        try:
            tables = tomllib.loads(path.read_text("utf-8"))
        except (OSError, ValueError) as e:
            raise InputError(f"{path}: not readable as TOML: {e}") from e
        systems |= tables.pop("systems", {})
        for name, table in tables.items():
            if not isinstance(table, dict):
                raise InputError(f"{path}: {name!r} is no table; a model is written as [{name}]")
            for what, used, known in (("key", table, KEYS), ("check", table.get("checks", {}), CHECKS),
                                      ("system message", table.get("systems", ()), tuple(systems))):
                if unknown := sorted(set(used) - set(known)):
                    raise InputError(f"{path}: [{name}]: unknown {what} {unknown[0]!r}{nearest(unknown[0], known)}")
            models[name] = models.get(name, {}) | table
    for table in models.values():
        table["systems"] = {key: systems[key] for key in table.get("systems", ())}
    return models


def resolve(spec: str, fmt: str = "", ready: bool = True) -> Model:
    """What `--model` names: a known NAME, NAME=DIR, a folder, or a hub id. `fmt` goes over the known format.

    With `ready` a weight-diff release is refused and the embedded model prepared if it is not there yet; without,
    only names are looked at. Nothing is downloaded from a hub (see `fetch`). Raises UnknownName, ModelError.
    """
    known = registry()
    name, pair, folder = spec.partition("=")
    here = Path(spec).expanduser()
    if spec in known:
        name, path, local = spec, *_place(spec, known[spec], ready)
    elif here.is_dir():
        name, path, local = _name_of(spec, here, known), str(here), True
    elif pair and name in known:
        path, local = _folder(folder), True
    elif pair:
        raise UnknownName("model", name, known, "NAME=DIR takes a known name; DIR alone works as well")
    elif re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", spec):
        name, path, local = next((n for n, t in known.items() if t.get("hub") == spec), spec), spec, False
    elif "/" in spec or spec.startswith(("~", ".")):
        raise ModelError(f"--model {spec}: no such folder")
    else:
        raise UnknownName("model", spec, known, "or give a folder, or a hub id as owner/name")
    table = known.get(name, {})
    if ready and not local and table.get("checks", {}).get("weight_diff"):
        raise ModelError(f"{path} is a weight diff and no model; {RECOVER.format(name)}")
    return Model(
        name=name if table else folder_name(spec), path=path, format=fmt or table.get("format", ""),
        context=table.get("context"), revision=table.get("revision", ""), systems=table.get("systems", {}),
        checks=table.get("checks", {}), published=table.get("published", ""), local=local,
    )


def _place(name: str, table: Mapping[str, Any], ready: bool) -> tuple[str, bool]:
    """Where a known model is: the user's folder, the cache of the embedded one, or its hub id (not local)."""
    from evalkit import prepare

    if "path" in table:
        return _folder(table["path"]), True
    if "package" in table:
        return str(prepare.prepare(name, table) if ready else prepare.folder(name)), True
    if "hub" not in table:
        raise ModelError(f"model {name!r}: models.toml gives no hub, path or package; use --model {name}=DIR")
    return table["hub"], False


def _folder(text: str) -> str:
    if not text or not Path(text).expanduser().is_dir():
        raise ModelError(f"{text or '(nothing after =)'}: no such folder")
    return str(Path(text).expanduser())


def _name_of(spec: str, here: Path, known: Mapping[str, Mapping[str, Any]]) -> str:
    """The known name of a folder that is called exactly so, or by its hub id (as such, or in the hub's cache)."""
    cached = [part[8:].replace("--", "/") for part in here.absolute().parts if part.startswith("models--")]
    ids = {spec, *cached}
    return next((n for n, t in known.items() if n == here.absolute().name or t.get("hub") in ids), spec)


def folder_name(spec: str) -> str:
    """The name of a model's results: the last part of a path, a known name, or a hub id with `--` for slashes."""
    name, _, folder = spec.partition("=")
    here = Path(folder or name).expanduser()
    if here.is_dir() or str(folder or name).startswith(("/", ".", "~")):
        return here.name if here.name not in ("", "..") else here.resolve().name
    return spec.replace("/", "--")


def check_folder(path: Path, tokenizer: bool = True, weights: bool = True) -> None:
    """Refuse a folder that can't be used: no config, no tokenizer, no weights, or a weight diff (ModelError)."""
    if not (path / "config.json").is_file():
        raise ModelError(f"{path}: no config.json, so no model folder in Hugging Face form")
    if tokenizer and not any((path / name).is_file() for name in TOKENIZERS):
        raise ModelError(f"{path}: no tokenizer ({' or '.join(TOKENIZERS[:3])}); copy it there or give --tokenizer")
    if weights and is_weight_diff(path):
        raise ModelError(f"{path}: a weight diff and no model (its final norm is near 0); {RECOVER.format('NAME')}")


def is_weight_diff(path: Path) -> bool:
    """Whether the weights are a difference: the final RMSNorm of a Llama model is near 0.

    Neither name nor README can tell (a recovered folder may keep both); the weights can. A trained Llama's final
    norm is 1 or more in the mean and a fresh one exactly 1; between base and fine-tune it moves by some 0.01.
    """
    found = weight_files(path)
    if read_json(path / "config.json").get("model_type") != "llama":
        return False
    index = next((path / name for name in INDEXES if (path / name).is_file()), None)
    if index is not None:
        place = read_json(index)["weight_map"].get("model.norm.weight")
        found = [file for file in found if file.name == place]
    norm = next((t for file in found if (t := header(file).get("model.norm.weight"))), None)
    return norm is not None and float(read(norm).float().abs().mean()) < 0.2


def fetch(model: Model) -> Model:
    """The same model as a local folder, from the hub or its cache; `revision` becomes the commit.

    Weights come as safetensors, as .bin only where there are none. Raises ModelError when the hub can't be reached.
    """
    if model.local:
        return model
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    patterns = ["*.json", "*.model", "*.jinja", "*.txt", "*.tiktoken"]
    folder = Path()
    try:
        for kind in ("*.safetensors", "*.bin"):
            folder = Path(huggingface_hub.snapshot_download(
                model.path, revision=model.revision or None, allow_patterns=[*patterns, kind]))
            if any(folder.glob(kind)):
                break
    except (HfHubHTTPError, HFValidationError, OSError) as e:
        first = str(e).strip().partition("\n")[0]
        raise ModelError(f"{model.path}: no such folder, and the hub does not give it ({first}); use a folder, or "
                         "set HF_HOME to a cache that holds it") from e
    return replace(model, path=str(folder), revision=folder.name, local=True)


def fingerprint(path: Path) -> str:
    """sha256 over config.json and the weight files: name, size and content of each.

    Of a file of 256 MiB or more the first and last MiB and 64 evenly spaced blocks of 64 KiB: seconds for 130 GB.
    It tells models apart; it is no proof that every byte is right.
    """
    total = hashlib.sha256((path / "config.json").read_bytes())
    for file in weight_files(path):
        size = file.stat().st_size
        total.update(f"\0{file.name}\0{size}\0".encode())
        spans = [(0, size)]
        if size >= 256 * MIB:
            spans = [(0, MIB), (size - MIB, MIB), *((size * i // 64, MIB // 16) for i in range(64))]
        with file.open("rb") as f:
            for start, length in spans:
                f.seek(start)
                while length > 0 and (block := f.read(min(length, MIB))):
                    total.update(block)
                    length -= len(block)
    return total.hexdigest()
