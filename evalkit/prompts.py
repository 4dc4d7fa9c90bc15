"""Sample -> Prompt -> text -> Request: shots, fit to length, chat format, token ids, key.

    Rendered(sample=..., text="<|user|>\nThe following are ...", tokens=array("i", [529, 29989, ...]), n_shots=5)

Nothing is cut in silence: shots dropped by `fit` are counted in each Rendered.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache

from evalkit import formats
from evalkit.errors import InputError
from evalkit.formats import Format
from evalkit.tokens import Tokenizer
from evalkit.types import Ask, Choose, Column, Generate, Message, Prompt, Request, Sample, Setting, Task

MARGIN = 16  # tokens by which a wrapped prompt may be shorter than the bare one where their texts meet


@dataclass(frozen=True, slots=True)
class Rendered:
    """One prompt as it is sent. `tokens` is None without a tokenizer; `dropped` shots did not fit."""

    sample: Sample
    text: str
    tokens: array[int] | None
    n_shots: int
    dropped: int = 0


@dataclass(frozen=True)
class Writer:
    """Writes the prompts of one column: its task, the chat format, the tokenizer (None: text only)."""

    task: Task
    column: Column
    chat_format: Format
    tokenizer: Tokenizer | None
    system: str = ""

    @cached_property
    def format(self) -> Format:
        """The format used: the model's, or `none` where the column has no chat form."""
        return self.chat_format if self.column.switches["chat"] else formats.load("none")

    @cached_property
    def setting(self) -> Setting:
        switches, tokenizer = self.column.switches, self.tokenizer

        @lru_cache(maxsize=64)  # an exemplar's passage comes again in each prompt of its language
        def cut(text: str) -> str:
            if tokenizer is None or not switches["context_tokens"]:
                return text
            return tokenizer.cut(text, switches["context_tokens"], bos=switches["context_bos"])

        return Setting(switches, self.format.chat, cut)

    @cached_property
    def _specials(self) -> dict[str, str]:
        """BOS is never written by a template where the tokenizer or the recipe decides about it."""
        if self.tokenizer is None:
            return {}
        wanted = self.column.switches["bos"] == "tokenizer" and not self.tokenizer.adds_bos
        return {"bos_token": self.tokenizer.token("bos") if wanted else "", "eos_token": self.tokenizer.token("eos")}

    def text(self, prompt: Prompt) -> str:
        system = (Message("system", self.system),) if self.system and self.format.chat else ()
        return formats.render(self.format, (*system, *prompt.messages), prompt.prefill, self._specials)

    def render(self, sample: Sample, shots: Sequence[Sample]) -> Rendered:
        """The prompt with as many of `shots` as the recipe's `fit` allows, dropped from the end."""
        fit, limit = self.column.switches["fit"], self.column.switches["fit_tokens"]
        bos = self.column.switches["bos"] == "tokenizer"
        for k in range(len(shots), -1, -1):
            prompt = self.task.prompt(sample, shots[:k], self.setting)
            text = self.text(prompt)
            if self.tokenizer is None:
                return Rendered(sample, text, None, prompt.n_shots)
            tokens = self.tokenizer.encode(text, bos=bos)
            size = len(tokens) - (bos and self.tokenizer.adds_bos)
            if fit == "bare" and size > limit - MARGIN:
                size = len(self.tokenizer.encode(prompt.messages[-1].content))
            if fit == "none" or size <= limit or k == 0:
                return Rendered(sample, text, tokens, prompt.n_shots, len(shots) - k)
        raise AssertionError("unreachable: k reaches 0")


def stops(writer: Writer) -> tuple[tuple[str, ...], tuple[tuple[int, ...], ...]]:
    """Stop strings and stop token sequences of a column, the format's end of turn among them."""
    switches, tokenizer = writer.column.switches, writer.tokenizer
    texts: list[str] = list(switches["stop"])
    if switches["stop_when"] == "no-chat" and writer.format.chat:
        texts = []
    sequences: list[tuple[int, ...]] = []
    if switches["stop_level"] == "token" and tokenizer is not None:
        sequences, texts = list(tokenizer.stop_sequences(texts)), []
    if writer.format.chat:
        texts += writer.format.guard if switches["guard"] else ()
        for text in writer.format.stop:
            ids = list(tokenizer.encode(text)) if tokenizer is not None else []
            if len(ids) != 1:
                texts.append(text)
            elif tokenizer is not None and ids[0] != tokenizer.eos:
                sequences.append((ids[0],))
    return tuple(texts), tuple(sequences)


def asks(writer: Writer, sample: Sample) -> list[Ask]:
    """What is asked about one sample: its options, or one text, or `samples` texts seeded one after the other."""
    switches, tokenizer = writer.column.switches, writer.tokenizer
    if tokenizer is None:
        raise InputError("--tokenizer none is for `evalkit prompts`; a run needs the model's tokenizer")
    if writer.task.kind == "choice":
        return [Choose(tokenizer.option_ids(sample.options, switches["option_ids"])[0])]
    texts, sequences = stops(writer)
    base = zlib.crc32(sample.id.encode()) % 2**30 * 2  # the same in both columns of a benchmark
    return [Generate(switches["max_tokens"], texts, sequences, switches["temperature"], switches["top_p"],
                     base + i if switches["temperature"] else None) for i in range(switches["samples"])]


def request_key(identity: str, tokens: Sequence[int], ask: Ask, index: int) -> str:
    """sha256 (32 hex digits) of all that decides an answer; `identity` stands for weights, tokenizer and template."""
    body = json.dumps([identity, type(ask).__name__, asdict(ask), index], ensure_ascii=True)
    return hashlib.sha256(body.encode() + array("i", tokens).tobytes()).hexdigest()[:32]


def requests(writer: Writer, rendered: Iterable[Rendered], identity: str) -> Iterator[tuple[Rendered, Request]]:
    """One request an answer; those of one sample share their token ids."""
    for item in rendered:
        for index, ask in enumerate(asks(writer, item.sample)):
            assert item.tokens is not None
            key = request_key(identity, item.tokens, ask, index)
            yield item, Request(key, writer.column.name, item.sample.id, index, item.tokens, ask)
