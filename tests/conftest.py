"""Fixtures. `shared` is the folder of real data and golden rows beside a checkout; a user's machine has none.

With EVALKIT_REQUIRE=all a skipped test fails: CI has everything, so nothing may be passed over there.
"""

from __future__ import annotations

import json
import os
from collections.abc import Generator, Iterable, Iterator
from pathlib import Path

import pytest

from evalkit.engines.mock import Mock
from evalkit.types import Completion, Request

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # read when torch loads; waiting threads must not take the cores
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared() -> Path:
    folder = Path(os.environ.get("EVALKIT_SHARED", ROOT.parent / "shared"))
    if not folder.is_dir():
        pytest.skip("the folder of real data and golden rows (EVALKIT_SHARED) is not on this machine")
    return folder


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.CallInfo[None], None]:
    outcome = yield
    report = outcome.get_result()  # type: ignore[attr-defined]
    if report.skipped and os.environ.get("EVALKIT_REQUIRE") == "all" and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"skipped although EVALKIT_REQUIRE=all: {report.longrepr}"


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder small enough for unit tests: a byte-level tokenizer, a config, and a few bytes as weights."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("tiny-model")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<s>", "</s>"]
    vocabulary = {piece: i for i, piece in enumerate([*special, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2", "max_position_embeddings": 16384}))
    (folder / "model.safetensors").write_bytes(b"\x02\x00\x00\x00\x00\x00\x00\x00{}")
    return folder


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Request]:
    """The requests that reach the mock engine from now on."""
    seen: list[Request] = []
    complete = Mock.complete

    def watched(self: Mock, requests: Iterable[Request]) -> Iterator[Completion]:
        for request in requests:
            seen.append(request)
            yield from complete(self, [request])

    monkeypatch.setattr(Mock, "complete", watched)
    return seen
