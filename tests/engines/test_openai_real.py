"""The openai engine against vLLM's own server with the embedded model, one start."""

from __future__ import annotations

import importlib.util
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from evalkit.engines import EngineSpec, answers, create
from evalkit.engines.vllm_start import CPU_ENV
from evalkit.types import Ask, Choose, Completion, Generate, Request

pytestmark = [pytest.mark.real, pytest.mark.filterwarnings("default")]
PROMPT = "<|im_start|>user\nName three colours, one a line.<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture(scope="module")
def model() -> str:
    from evalkit.models import resolve

    return str(resolve("smollm2-135m-instruct").path)


@pytest.fixture(scope="module")
def engine(model: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("vLLM is not installed")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("server") / "server.log"
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model, "--served-model-name",
               "embedded", "--host", "127.0.0.1", "--port", str(port), "--max-model-len", "512", "--enforce-eager"]
    # TORCH_COMPILE_DISABLE does for the server what vllm_start.load() does in process
    environment = {**os.environ, **CPU_ENV, "VLLM_CPU_KVCACHE_SPACE": "1", "TORCH_COMPILE_DISABLE": "1"}
    with log.open("w") as noise, subprocess.Popen(command, env=environment, stdout=noise, stderr=noise) as server:
        try:
            _wait(server, f"http://127.0.0.1:{port}/v1/models", log)
            yield create("openai", EngineSpec(model, max_model_len=512, eos=("<|im_end|>",), args={
                "base_url": f"http://127.0.0.1:{port}/v1", "concurrency": "4"}))
        finally:
            server.terminate()


def _wait(server: subprocess.Popen[bytes], url: str, log: Path) -> None:
    for _ in range(600):
        assert server.poll() is None, log.read_text()[-3000:]
        try:
            with urllib.request.urlopen(url, timeout=1):
                return
        except OSError:
            time.sleep(0.5)
    raise AssertionError("the server did not start: " + log.read_text()[-3000:])


@pytest.fixture(scope="module")
def tokenizer(model: str) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model)


def ask(engine: Any, tokens: list[int], *asks: Ask) -> list[Completion]:
    done = {c.key: c for c in engine.complete(Request(str(i), "c", "s", 0, tokens, what)
                                              for i, what in enumerate(asks))}
    return [done[str(i)] for i in range(len(asks))]


def test_against_vllms_own_server(engine: Any, tokenizer: Any, model: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    assert {key: engine.settings[key] for key in ("model", "prompt", "answer", "choose")} == {
        "model": "embedded", "prompt": "token ids", "answer": "token ids", "choose": "exact"}
    tokens = tokenizer.encode(PROMPT, add_special_tokens=False)
    options = [tuple(tokenizer.encode(text, add_special_tokens=False)) for text in (" Red", "1", " A", "Sure, here")]
    choice, whole = ask(engine, tokens, Choose(tuple(options)), Generate(40))

    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    with torch.inference_mode():
        for option, logprob in zip(options, choice.logprobs, strict=True):
            scores = network(torch.tensor([[*tokens, *option]])).logits[0].log_softmax(-1)
            full = sum(float(scores[len(tokens) + at - 1, token]) for at, token in enumerate(option))
            assert abs(full - logprob) <= 0.2 * len(option)

    ids = tokenizer.encode(whole.text, add_special_tokens=False)
    assert whole.finish in ("max_tokens", "eos") and len(ids) > 8
    pair, text = tuple(ids[3:5]), whole.text[6:9]
    at = next(i for i in range(len(ids)) if tuple(ids[i:i + 2]) == pair)
    (sequence,) = ask(engine, tokens, Generate(40, stop_tokens=(pair,)))
    assert (sequence.text, sequence.finish) == (answers.decode(tokenizer, tokens, ids[:at]), "stop")
    (cut,) = ask(engine, tokens, Generate(40, stop=(text,)))
    assert (cut.text, cut.finish, cut.stop) == (whole.text[:whole.text.index(text)], "stop", text)
    sample = Generate(16, temperature=0.8, top_p=0.95, seed=5)
    first, other = ask(engine, tokens, sample, Generate(16, temperature=0.8, top_p=0.95, seed=6))
    assert ask(engine, tokens, sample)[0].text == first.text != other.text

    engine._ids_in = engine._ids_out = False  # as with a server that knows only text
    plain, short = ask(engine, tokens, Generate(40, stop=(text,)), Generate(5))
    assert (plain.text, plain.finish, plain.stop) == (cut.text, "stop", text)
    assert (short.text, short.n_generated) == (answers.decode(tokenizer, tokens, ids[:5]), 5)
    assert short.finish == "max_tokens"
