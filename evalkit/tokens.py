"""Text to token ids and back, once: engines get ids, never strings that are tokenised again.

A LLaMA folder is read with sentencepiece on its own tokenizer.model, as the original's slow tokenizer did.
transformers 5 rebuilds such a tokenizer from the pieces and merges differently: of 356 golden prompts 152 came
out with other ids ("about  anatomy": two blanks). All else goes through transformers' AutoTokenizer.
"""

from __future__ import annotations

import hashlib
import json
import re
from array import array
from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

from evalkit.errors import InputError, ModelError

FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
         "vocab.json", "merges.txt")
LINES = 100_000  # encoded lines kept at most
HEAD, TEXTS = 16, 64  # by so many characters a text finds the last one of its kind; of so many kinds
LLAMA = {"LlamaTokenizer", "LlamaTokenizerFast"}


class _Backend(Protocol):
    @property
    def bos(self) -> int | None: ...
    @property
    def eos(self) -> int | None: ...
    @property
    def adds_bos(self) -> bool: ...
    @property
    def added(self) -> Sequence[str]: ...  # texts read as one token wherever they stand
    def encode(self, text: str) -> list[int]: ...  # no special token added; those written in the text are read
    def encode_rest(self, text: str) -> list[int]: ...  # the same for a text that begins in the middle of a string
    def decode(self, ids: Sequence[int]) -> str: ...  # special tokens written out
    def pieces(self, ids: Sequence[int]) -> list[str]: ...


class Tokenizer:
    """The tokenizer of a model folder (or hub id). `fingerprint` is the sha256 of its files."""

    def __init__(self, source: str, revision: str = "") -> None:
        self.source = source
        folder = Path(source)
        config = _json(folder / "tokenizer_config.json")
        self._backend: _Backend
        if (folder / "tokenizer.model").is_file() and config.get("tokenizer_class") in LLAMA:
            self._backend = _SentencePiece(folder, config)
        else:
            self._backend = _Transformers(source, revision)
        self.bos, self.eos, self.adds_bos = self._backend.bos, self._backend.eos, self._backend.adds_bos
        self.chat_template = _template(folder, config) if folder.is_dir() else getattr(
            self._backend, "chat_template", None)
        self.fingerprint = _fingerprint(folder, source, revision)
        self._lines: dict[str, array[int]] = {}
        # beginning -> text, ids, (characters, ids) at its cuts
        self._last: dict[str, tuple[str, array[int], list[tuple[int, int]]]] = {}
        self._cut = _safe_cut(self._backend)

    def encode(self, text: str, bos: bool = False) -> array[int]:
        """Token ids of `text`; with `bos` the begin-of-sequence token if this tokenizer adds one by itself.

        Equal to encoding the whole string, but what was seen before (exemplars) is looked up: see `_safe_cut`.
        """
        ids = array("i", [self.bos] if bos and self.adds_bos and self.bos is not None else [])
        ids.extend(self._backend.encode(text) if self._cut is None else self._in_parts(text, self._cut))
        return ids

    def _in_parts(self, text: str, cut: re.Pattern[str]) -> array[int]:
        """Ids of what `text` shares with the last one that began alike, up to a cut, then line by line."""
        last, known, cuts = self._last.get(text[:HEAD], ("", array("i"), [(0, 0)]))
        shared = _shared(last, text)
        while len(cuts) > 1 and cuts[-1][0] >= shared:  # a cut depends on the character behind it too
            cuts.pop()
        at, size = cuts[-1]
        ids = known[:size]
        for begin, end in pairwise([at, *(found.start() for found in cut.finditer(text, at + 1)), len(text)]):
            ids.extend(self._line(text[begin:end]) if begin else self._backend.encode(text[:end]))
            cuts.append((end, len(ids)))
        if len(self._last) >= TEXTS:
            self._last.clear()
        self._last[text[:HEAD]] = text, ids, cuts
        return ids

    def _line(self, part: str) -> array[int]:
        if (known := self._lines.get(part)) is None:
            if len(self._lines) >= LINES:
                self._lines.clear()
            known = self._lines[part] = array("i", self._backend.encode_rest(part))
        return known

    def decode(self, ids: Sequence[int]) -> str:
        return self._backend.decode(ids)

    def pieces(self, ids: Sequence[int]) -> list[str]:
        return self._backend.pieces(ids)

    def token(self, which: str) -> str:
        """The text of the `bos` or `eos` token, empty if there is none."""
        number = self.bos if which == "bos" else self.eos
        return "" if number is None else self._backend.pieces([number])[0]

    def cut(self, text: str, limit: int, bos: bool) -> str:
        """`text` cut to `limit` ids. With `bos` as the original: encoded with BOS, which counts and, in a text that
        was cut, stays written at its front; else the text's own ids are counted."""
        ids = self.encode(text, bos=bos)
        return text if len(ids) <= limit else self.decode(ids[:limit])

    def option_ids(self, letters: Sequence[str], how: str) -> tuple[tuple[tuple[int, ...], ...], str]:
        """The ids read for each option letter, and a note where `plain-if-same` had to leave the plain ones.

        `after-blank`: last id of encode(" A"). `plain-if-same`: first id of encode("A") where both agree, as for
        LLaMA, else the last of encode(" A"): after `:` the other is not the token a model would write.
        """
        plain = tuple((self._backend.encode(letter)[0],) for letter in letters)
        blank = tuple((self._backend.encode(f" {letter}")[-1],) for letter in letters)
        if how == "plain-if-same" and plain != blank:
            return blank, "option letters: 'A' and ' A' are different tokens here; the answers read are those of ' A'"
        return blank, ""

    def stop_sequences(self, stops: Sequence[str]) -> tuple[tuple[int, ...], ...]:
        """Each stop as the 2023-06 code made it: encoded after a blank, the first token dropped."""
        found = tuple(tuple(self._backend.encode(f" {stop}")[1:]) for stop in stops)
        if not all(found):
            raise InputError(f"stop {stops[found.index(())]!r} has no token of its own here; use stop_level = text")
        return found


class _SentencePiece:
    def __init__(self, folder: Path, config: dict[str, Any]) -> None:
        from sentencepiece import SentencePieceProcessor

        self._model = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
        added = {entry["content"]: int(number) for number, entry in config.get("added_tokens_decoder", {}).items()}
        added |= _json(folder / "added_tokens.json")
        size = self._model.get_piece_size()
        for key in ("bos_token", "eos_token", "unk_token", "pad_token"):
            entry = config.get(key)
            text = entry.get("content") if isinstance(entry, dict) else entry
            if text and text not in added:  # a token past the model's own takes the next id, as when it was added
                known = self._model.piece_to_id(text)
                added[text] = known if self._model.id_to_piece(known) == text else max([size - 1, *added.values()]) + 1
        self._added, self.added = added, list(added)
        self._names = {number: text for text, number in added.items()}
        longest = sorted(added, key=len, reverse=True)
        self._split = re.compile("(" + "|".join(map(re.escape, longest)) + ")") if added else None
        self.bos: int = self._model.bos_id()
        self.eos: int = self._model.eos_id()
        self.adds_bos = bool(config.get("add_bos_token", True))

    def encode(self, text: str) -> list[int]:
        ids: list[int] = []
        for part in self._split.split(text) if self._split else [text]:
            if part in self._added:
                ids.append(self._added[part])
            elif part:
                ids += self._model.encode(part)
        return ids

    def encode_rest(self, text: str) -> list[int]:
        return self.encode(text)[1:]  # without the blank that sentencepiece puts before a string

    def decode(self, ids: Sequence[int]) -> str:
        out: list[str] = []
        run: list[int] = []
        for number in [*ids, -1]:
            if number in self._names or number < 0:
                out.append(self._model.decode(run) if run else "")
                out.append(self._names.get(number, ""))
                run = []
            else:
                run.append(number)
        return "".join(out)

    def pieces(self, ids: Sequence[int]) -> list[str]:
        return [self._names.get(i) or self._model.id_to_piece(i) for i in ids]


class _Transformers:
    def __init__(self, source: str, revision: str) -> None:
        from transformers import AutoTokenizer

        try:
            self._tokenizer = AutoTokenizer.from_pretrained(source, revision=revision or None)
        except (OSError, ValueError) as error:
            raise ModelError(f"no tokenizer could be read from {source}: {str(error).splitlines()[0]}") from None
        self.bos: int | None = self._tokenizer.bos_token_id
        self.eos: int | None = self._tokenizer.eos_token_id
        self.chat_template = self._tokenizer.chat_template
        self.added = list(self._tokenizer.get_added_vocab())
        self._fast = self._tokenizer.backend_tokenizer if self._tokenizer.is_fast else None
        self.adds_bos = self.bos is not None and self._tokenizer("a")["input_ids"][:1] == [self.bos]

    def encode(self, text: str) -> list[int]:
        ids: list[int] = (self._fast.encode(text, add_special_tokens=False).ids if self._fast is not None
                          else self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        return ids

    def encode_rest(self, text: str) -> list[int]:
        return self.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def pieces(self, ids: Sequence[int]) -> list[str]:
        return [str(piece) for piece in self._tokenizer.convert_ids_to_tokens(list(ids))]


def _safe_cut(backend: _Backend) -> re.Pattern[str] | None:
    """Where a string may be cut so that its parts' ids make up the whole's: before or after a line's newline, or
    (None) nowhere. Asked of the tokenizer itself: both sides of a cut are tried in every mixture of what a
    pre-tokenizer tells apart, two characters deep; no pre-tokenizer in use looks further back than its own match.
    """
    kinds = ["a", "7", ".", "'", " ", "\n", "\t", "字", *backend.added[:2]]
    sides = [a + b for a in kinds for b in kinds]
    encode, encode_rest = cache(backend.encode), cache(backend.encode_rest)
    no_added = "".join(f"(?<!{re.escape(text)})" for text in backend.added)  # what follows one begins anew
    for cut in (re.compile(rf"(?=\n)(?<=\S){no_added}"), re.compile(r"(?<=\n)(?=\S)")):
        for text in (f"x{left}\n{right}x" for left in sides for right in sides):
            first, *rest = cut.split(text)
            parts = encode(first) + [i for part in rest for i in encode_rest(part)]
            if parts != backend.encode(text):
                break
        else:
            return cut
    return None


def _shared(one: str, other: str) -> int:
    """How many characters two texts have in common from their beginning."""
    low, high = 0, min(len(one), len(other))
    while low < high:  # the first `low` are common, the first `high + 1` are not or too many
        middle = (low + high + 1) // 2
        low, high = (middle, high) if one[low:middle] == other[low:middle] else (low, middle - 1)
    return low


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{path}: not valid JSON: {error}") from None
    return data if isinstance(data, dict) else {}


def _template(folder: Path, config: dict[str, Any]) -> str | None:
    own = folder / "chat_template.jinja"
    if own.is_file():
        return own.read_text(encoding="utf-8")
    found = config.get("chat_template")
    if isinstance(found, list):  # several, by name
        found = {entry["name"]: entry["template"] for entry in found}.get("default")
    return found


def _fingerprint(folder: Path, source: str, revision: str) -> str:
    digest = hashlib.sha256()
    if not folder.is_dir():
        digest.update(f"{source}@{revision}".encode())
    for name in FILES:
        if (folder / name).is_file():
            digest.update(name.encode() + b"\0" + hashlib.sha256((folder / name).read_bytes()).digest())
    return digest.hexdigest()
