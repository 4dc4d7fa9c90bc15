"""Answers recorded by an earlier run: `--engine replay --engine-args answers=results/tulu-65b/RUN`.

    {"key": "9f..", "text": "So the answer is 7.", "finish": "eos", ...}   a line of <column>.completions.jsonl

Found by key; else by column, sample and index, which the line or <column>.requests.jsonl beside it tells.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from evalkit.engines import EngineSpec
from evalkit.errors import InputError
from evalkit.progress import say
from evalkit.types import Completion, Request

ANSWERS, REQUESTS = ".completions.jsonl", ".requests.jsonl"
FIELDS = {item.name for item in fields(Completion)} - {"key"}


class Replay:
    """A missing answer is a Completion with `finish == "error"`, never an invented one."""

    name = "replay"

    def __init__(self, spec: EngineSpec) -> None:
        if "answers" not in spec.args:
            raise InputError("--engine replay needs --engine-args answers=FILE or RUN, the recorded completions")
        self._source = Path(spec.args["answers"])
        files = sorted(self._source.glob("*" + ANSWERS)) if self._source.is_dir() else [self._source]
        self._keys: dict[str, Mapping[str, Any]] = {}
        self._places: dict[tuple[str, str, int], Mapping[str, Any]] = {}
        for file in files:
            self._read(file)
        if not self._keys and not self._places:
            raise InputError(f"--engine-args answers={self._source}: no completions there (*{ANSWERS})")
        self.settings: Mapping[str, Any] = {"device": "none", "answers": str(self._source), "n": len(self._keys)}

    def _read(self, file: Path) -> None:
        column = file.name.removesuffix(ANSWERS)
        asked = file.with_name(column + REQUESTS)
        places = {row["key"]: row for row in _rows(asked)} if file.name.endswith(ANSWERS) and asked.is_file() else {}
        for row in _rows(file, journal=file.name.endswith(ANSWERS)):
            if "key" in row:
                self._keys[row["key"]] = row
            place = {"column": column, **places.get(row.get("key"), {}), **row}
            if "sample" in place:
                self._places[place["column"], place["sample"], place.get("index", 0)] = row

    def complete(self, requests: Iterable[Request]) -> Iterator[Completion]:
        for request in requests:
            row = self._keys.get(request.key) or self._places.get((request.column, request.sample, request.index))
            if row is None:
                yield Completion(request.key, finish="error", n_prompt=len(request.tokens), error=(
                    f"{self._source} has no answer for {request.column} {request.sample} {request.index}"))
                continue
            kept = {name: value for name, value in row.items() if name in FIELDS}
            yield Completion(request.key, **{**kept, "logprobs": tuple(kept.get("logprobs", ()))})

    def close(self) -> None:
        self._keys, self._places = {}, {}


def _rows(file: Path, journal: bool = False) -> Iterator[dict[str, Any]]:
    """The objects of a file; in a run's journal a line torn by a kill is dropped, with a notice."""
    try:
        with file.open(encoding="utf-8", errors="replace" if journal else "strict") as lines:
            for number, line in enumerate(lines, start=1):
                try:
                    row = json.loads(line)
                except ValueError:
                    if journal:
                        say(f"{file}, line {number}: damaged, dropped")
                        continue
                    raise InputError(f"{file}, line {number}: not JSON") from None
                if not isinstance(row, dict):
                    raise InputError(f"{file}, line {number}: not a JSON object")
                yield row
    except OSError as fault:
        raise InputError(f"{file} cannot be read: {fault.strerror}") from fault
