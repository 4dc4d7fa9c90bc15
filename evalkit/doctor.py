"""`evalkit doctor`: is this model folder what its numbers will be said to come from? No weights are loaded.

    ok    rope      theta 100000, as known for smollm2-135m-instruct
    FAIL  template  two turns differ at token 1: format chatml writes 'user', the tokenizer's template 'system'

Each check is a function `Facts -> Finding`; each catches a way in which a model was once run wrongly unnoticed.
"""

from __future__ import annotations

import ast
import importlib.util
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evalkit import formats, models
from evalkit.errors import EvalkitError
from evalkit.tokens import Tokenizer
from evalkit.types import Message
from evalkit.weights import Tensor, read_json, tensors

# Defaults of generation_config.json that change even a greedy answer, with the value that does nothing.
_CHANGES = {"repetition_penalty": 1.0, "encoder_repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "min_length": 0,
            "min_new_tokens": 0, "num_beams": 1, "length_penalty": 1.0, "penalty_alpha": 0, "suppress_tokens": [],
            "begin_suppress_tokens": [], "bad_words_ids": [], "forced_bos_token_id": None,
            "forced_eos_token_id": None, "sequence_bias": {}, "exponential_decay_length_penalty": None}
_SAMPLING = ("do_sample", "temperature", "top_p", "top_k", "min_p", "typical_p")
_EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight")
_CHAT = (Message("user", "Name a planet."), Message("assistant", "Mars."), Message("user", "Another?"))


@dataclass(frozen=True, slots=True)
class Finding:
    name: str
    ok: bool
    text: str


@dataclass(frozen=True, slots=True)
class Facts:
    """What the folder says: config.json, generation_config.json, tensors by name, tokenizer, its added tokens."""

    model: models.Model
    folder: Path
    config: Mapping[str, Any]
    generation: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    tokenizer: Tokenizer
    added: Mapping[str, int]
    n_tokens: int  # one more than the largest token id


def check(model: models.Model) -> list[Finding]:
    """Every finding on a model (fetched if it is a hub id); `ok` false means that its numbers would be wrong.

    A folder that can't be used at all gives the one finding that says why. Reads headers and small files alone.
    """
    try:
        model = models.fetch(model)
        folder = Path(model.path)
        models.check_folder(folder)
        added, n_tokens = _vocabulary(folder)
        generation = folder / "generation_config.json"
        facts = Facts(model, folder, read_json(folder / "config.json"),
                      read_json(generation) if generation.is_file() else {}, tensors(folder),
                      Tokenizer(str(folder)), added, n_tokens)
    except EvalkitError as e:
        return [Finding("folder", False, str(e))]
    whole = f"{len(facts.tensors)} tensors in {len({t.file for t in facts.tensors.values()})} files, no weight diff"
    return [Finding("folder", True, whole), *(one(facts) for one in CHECKS)]


def _vocabulary(folder: Path) -> tuple[dict[str, int], int]:
    """The added tokens with their ids and the number of ids, from the tokenizer's files."""
    named = read_json(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").is_file() else {}
    added = {entry["content"]: int(i) for i, entry in named.get("added_tokens_decoder", {}).items()}
    if (folder / "added_tokens.json").is_file():
        added |= read_json(folder / "added_tokens.json")
    if (folder / "tokenizer.json").is_file():
        whole = read_json(folder / "tokenizer.json")
        added |= {entry["content"]: entry["id"] for entry in whole.get("added_tokens", ())}
        vocab = whole["model"]["vocab"]
        words = set(vocab) if isinstance(vocab, dict) else {entry[0] for entry in vocab}
        size = max(vocab.values()) + 1 if isinstance(vocab, dict) else len(vocab)
    elif (folder / "tokenizer.model").is_file():
        from sentencepiece import SentencePieceProcessor

        pieces = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
        size = pieces.get_piece_size()
        words = {pieces.id_to_piece(i) for i in range(size)}
        added |= {pieces.id_to_piece(i): i for i in range(size) if pieces.is_control(i)}
    else:
        words = set(read_json(folder / "vocab.json"))
        size = len(words)
    size = max([size, *(i + 1 for i in added.values())])
    tokens = [named.get(f"{kind}_token") for kind in ("bos", "eos", "unk", "pad")]
    texts = {t["content"] if isinstance(t, dict) else t for t in tokens if t}
    return added, size + len(texts - words - set(added))  # a named token without an id gets the next one


def _architecture(facts: Facts) -> Finding:
    known = _vllm_architectures()
    names = facts.config.get("architectures") or []
    if not names:
        return Finding("architecture", False, "config.json names no architecture")
    if known is None:
        return Finding("architecture", True, f"{names[0]}; not compared, no vLLM is installed")
    ok = bool(known & set(names))
    return Finding("architecture", ok, f"{names[0]} is {'known' if ok else 'unknown'} to the installed vLLM")


def _vllm_architectures() -> set[str] | None:
    """The generative architectures of the installed vLLM, read from its table: importing it takes 10 s."""
    spec = importlib.util.find_spec("vllm")
    table = Path(spec.origin).parent / "model_executor/models/registry.py" if spec and spec.origin else None
    if table is None or not table.is_file():
        return None
    wanted = ("_TEXT_GENERATION_MODELS", "_MULTIMODAL_MODELS", "_TRANSFORMERS_SUPPORTED_MODELS")
    found: set[str] = set()
    for node in ast.parse(table.read_text("utf-8")).body:
        target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
        value = getattr(node, "value", None)
        if isinstance(target, ast.Name) and target.id in wanted and isinstance(value, ast.Dict):
            found |= {str(key.value) for key in value.keys if isinstance(key, ast.Constant)}
    return found or None


def _rope(facts: Facts) -> Finding:
    """CodeLlama's theta is 1e6; a loader that does not read it takes 1e4 and answers worse, without an error."""
    config = facts.config
    scaling = config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta = float(config.get("rope_theta") or scaling.get("rope_theta") or 1e4)
    said = "" if "rope_theta" in config or "rope_theta" in scaling else " (not in config.json: the default)"
    name, checks = facts.model.name, facts.model.checks
    if "rope_theta" not in checks:  # a copy under another name: its config may still say what it is
        origin, known = config.get("_name_or_path"), models.registry()
        name = next((n for n, table in known.items() if origin and origin in (n, table.get("hub"))), "")
        checks = known.get(name, {}).get("checks", {})
    wanted = checks.get("rope_theta")
    if wanted is not None:
        return Finding("rope", theta == wanted, f"theta {theta:g}{said}, as known for {name}" if theta == wanted else
                       f"theta {theta:g}{said}, but {name} has {wanted:g}: set rope_theta in config.json")
    context = config.get("max_position_embeddings") or 0
    scaled = scaling.get("rope_type", scaling.get("type", "default")) != "default"
    if config.get("model_type") == "llama" and context > 4096 and theta <= 1e4 and not scaled:
        return Finding("rope", False, f"theta {theta:g}{said} with a context of {context} and no scaling: a Llama "
                       "that long was trained with a larger theta (CodeLlama 1e6)")
    return Finding("rope", True, f"theta {theta:g}{said}")


def _context(facts: Facts) -> Finding:
    has, wanted = facts.config.get("max_position_embeddings"), facts.model.context
    if has is None:
        return Finding("context", wanted is not None, f"config.json gives none; registry: {wanted}")
    if wanted is not None and has != wanted:
        return Finding("context", False, f"{has} tokens by config.json, {wanted} by the registry")
    named = facts.folder / "tokenizer_config.json"
    limit = read_json(named).get("model_max_length") if named.is_file() else None
    note = f"; the tokenizer says {limit}" if isinstance(limit, int) and limit < 1e9 and limit != has else ""
    return Finding("context", True, f"{has} tokens{note}")


def _vocab(facts: Facts) -> Finding:
    rows = next((t.shape[0] for name, t in facts.tensors.items() if name.endswith(_EMBEDDINGS)), None)
    if rows is None:
        return Finding("vocabulary", False, "the weights hold no token embedding")
    said, head = facts.config.get("vocab_size"), facts.tensors.get("lm_head.weight")
    text = f"{facts.n_tokens} token ids, {rows} embedding rows"
    if said is not None and said != rows:
        return Finding("vocabulary", False, f"{text}, but vocab_size in config.json is {said}")
    if head is not None and head.shape[0] != rows:
        return Finding("vocabulary", False, f"{text}, but {head.shape[0]} output rows")
    if facts.n_tokens > rows:
        return Finding("vocabulary", False, f"{text}: the last {facts.n_tokens - rows} tokens have no embedding")
    return Finding("vocabulary", True, text)


def _format(facts: Facts) -> formats.Format:
    return formats.load(facts.model.format or "auto", facts.tokenizer.chat_template)


def _added(facts: Facts) -> Finding:
    """A chat token that is not added, or is split, reaches the model as plain text it was never trained on."""
    try:
        special = _format(facts).special
    except EvalkitError:
        special = ()
    for token in special:
        ids = facts.tokenizer.encode(token)
        if token not in facts.added or len(ids) != 1:
            pieces = " ".join(facts.tokenizer.pieces(ids))
            return Finding("added tokens", False, f"{token} is no added token of this tokenizer (it reads {pieces})")
    ends = facts.generation.get("eos_token_id", facts.config.get("eos_token_id"))
    if facts.tokenizer.eos is None or ends is None:
        return Finding("added tokens", False, "no end-of-sequence token in the config or the tokenizer")
    if facts.tokenizer.eos not in (ends if isinstance(ends, list) else [ends]):
        text = f"the tokenizer's end of sequence is id {facts.tokenizer.eos}, the config's {ends}"
        return Finding("added tokens", False, text)
    return Finding("added tokens", True, f"{len(facts.added)} added tokens, "
                   + (f"among them {' '.join(special)}" if special else "the format needs none"))


def _template(facts: Facts) -> Finding:
    own = facts.tokenizer.chat_template
    try:
        fmt = _format(facts)
        mine = _tokens(facts, fmt)
        if not own or fmt.source == "tokenizer" or not fmt.chat:
            which = "the tokenizer's own" if fmt.source == "tokenizer" else f"format {fmt.name}"
            return Finding("template", True, which + ("" if own else "; the tokenizer has none to compare"))
        theirs = _tokens(facts, formats.load("auto", own))
    except EvalkitError as e:
        return Finding("template", False, str(e))
    if mine == theirs:
        return Finding("template", True, f"format {fmt.name} and the tokenizer's template agree")
    at = next((i for i, (a, b) in enumerate(zip(mine, theirs, strict=False)) if a != b), min(len(mine), len(theirs)))
    mine_there, theirs_there = (" ".join(map(repr, side[at:at + 4])) or "nothing" for side in (mine, theirs))
    return Finding("template", False, f"two turns differ at token {at}: format {fmt.name} writes {mine_there}, "
                   f"the tokenizer's template {theirs_there}")


def _tokens(facts: Facts, fmt: formats.Format) -> list[str]:
    """Two turns as token pieces, without BOS: that is the recipe's to add."""
    tokens = {"bos_token": "", "eos_token": facts.tokenizer.token("eos")}
    return facts.tokenizer.pieces(facts.tokenizer.encode(formats.render(fmt, _CHAT, tokens=tokens)))


def _generation(facts: Facts) -> Finding:
    found = facts.generation or facts.config  # older folders keep them in config.json
    wrong = {k: found[k] for k, off in _CHANGES.items() if k in found and found[k] not in (off, None)}
    if wrong:
        return Finding("generation", False, "defaults change every answer: "
                       + ", ".join(f"{k} = {v}" for k, v in wrong.items()) + "; take them out")
    noted = [f"{k} = {found[k]}" for k in _SAMPLING if found.get(k) is not None]
    return Finding("generation", True, f"{', '.join(noted)}: the recipe's decoding is used instead" if noted else
                   "no default changes the decoding")


def _memory(facts: Facts) -> Finding:
    size = sum(t.nbytes for t in facts.tensors.values())
    numbers = sum(t.nbytes // max(1, t.itemsize) for t in facts.tensors.values())
    said = str(facts.config.get("dtype") or facts.config.get("torch_dtype") or "float32")
    loaded = size if "quantization_config" in facts.config else numbers * (4 if said == "float32" else 2)
    stored = "/".join(sorted({t.dtype for t in facts.tensors.values()}))
    where, room = _room()
    text = f"{numbers / 1e9:.2f} billion weights, {stored}, {size / 2**30:.2f} GiB; as {said} {loaded / 2**30:.2f} GiB"
    if loaded > room:
        return Finding("memory", False, f"{text}, more than the {room / 2**30:.1f} GiB of {where}: more GPUs "
                       "(tensor_parallel_size), a smaller dtype or a quantisation")
    return Finding("memory", True, f"{text} of the {room / 2**30:.1f} GiB of {where}")


def _room() -> tuple[str, int]:
    """The memory that weights can go to, in bytes: all visible GPUs, else this machine's."""
    if importlib.util.find_spec("torch") is not None:
        import torch

        if torch.cuda.is_available():
            n = torch.cuda.device_count()
            return f"{n} GPU(s)", sum(torch.cuda.get_device_properties(i).total_memory for i in range(n))
    return "this machine", os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


CHECKS: tuple[Callable[[Facts], Finding], ...] = (
    _architecture, _rope, _context, _vocab, _added, _template, _generation, _memory)
