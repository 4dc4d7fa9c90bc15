"""The one seam to a model: requests go in, answers come out as each is finished, in any order.

    engine = create("vllm", EngineSpec(model="models/tulu-65b", max_model_len=2048))
    for completion in engine.complete(requests): ...

An engine is a module here and a line in ENGINES. Which one runs is asked for or said, never changed silently.
"""

from __future__ import annotations

import gc
import importlib
import importlib.util
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from evalkit.errors import EngineError, InputError, UnknownName
from evalkit.types import Completion, Request

ENGINES = {
    "vllm": "evalkit.engines.vllm:Vllm",
    "hf": "evalkit.engines.hf:HuggingFace",
    "openai": "evalkit.engines.openai:OpenAI",
    "mock": "evalkit.engines.mock:from_spec",
    "replay": "evalkit.engines.replay:Replay",
}
NEEDS = {  # engine -> module it cannot do without, and how to install it
    "vllm": ("vllm", "vLLM", "pip install 'evalkit[vllm]' (GPU) or 'evalkit[cpu]', "
             "or use --engine hf ('evalkit[hf]')"),
    "hf": ("torch", "torch", "pip install 'evalkit[hf]'"),
}


@dataclass(frozen=True, slots=True)
class EngineSpec:
    """What an engine is built from. `args` are the engine's own options as written: {"dtype": "bfloat16"}."""

    model: str  # local folder or hub id
    revision: str = ""
    max_model_len: int = 2048  # tokens, prompt and answer together
    args: Mapping[str, str] = field(default_factory=dict)
    log: Path | None = None  # what the engine's libraries print goes here, not to the terminal
    seed: int = 0
    tokenizer: str = ""  # folder or hub id; empty: the model's
    eos: tuple[str, ...] = ()  # the chat format's end-of-turn texts, besides the model's own end tokens


class Engine(Protocol):
    """`settings` is all that stands in run.json: versions, device, dtype, memory."""

    name: str
    settings: Mapping[str, Any]

    def complete(self, requests: Iterable[Request]) -> Iterator[Completion]:
        """One Completion a Request, in any order. Pulls lazily: only a bounded number is held at a time.

        What is wrong with one request is its Completion's `error`; EngineError means that the engine is dead.
        """

    def close(self) -> None:
        """Frees memory and processes; the engine cannot be used again."""


class StartError(EngineError):
    """The engine could not be built: nothing was asked yet."""

    exit_code = 2


def resolve(name: str) -> str:
    """The engine's name, `vllm` for the empty one. InputError if it is unknown or its package is missing."""
    name = name or "vllm"
    if name not in ENGINES:
        raise UnknownName("engine", name, ENGINES)
    module, title, remedy = NEEDS.get(name, ("", "", ""))
    if module and importlib.util.find_spec(module) is None:
        raise InputError(f"engine {name}: {title} is not installed: {remedy}")
    return name


def prepare(name: str) -> str:
    """`resolve`, and what must stand in the environment before torch is loaded, which a tokenizer may do already."""
    name = resolve(name)
    if name == "vllm":
        importlib.import_module("evalkit.engines.vllm_start").set_environment()
    elif name == "hf" and not Path("/dev/nvidiactl").exists():
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # 10 times faster where cores are shared
    return name


def create(name: str, spec: EngineSpec) -> Engine:
    """The engine, started. InputError: it is not installed; StartError: it does not start (no memory)."""
    module, _, attribute = ENGINES[resolve(name)].partition(":")
    collecting = gc.isenabled()
    gc.disable()  # loading makes millions of objects that stay; to search them for garbage took a tenth of it
    try:
        engine: Engine = getattr(importlib.import_module(module), attribute)(spec)
    finally:
        if collecting:
            gc.enable()
    return engine
