"""The run folder: plain JSON lines, appended as answers come; everything else in it can be made again.

    results/<model>/<run>/  run.json · engine.log · metrics.json · table.md
      <column>.requests.jsonl   {"key": "5f0c...", "sample": "anatomy/test/12", "index": 0, "text": "<|user|>...", ...}
      <column>.completions.jsonl {"key": "5f0c...", "text": " 18", "finish": "stop", ..., "sum": "9a1b2c3d"}
      <column>.scores.jsonl     {"sample": "anatomy/test/12", "status": "scored", "value": 1.0, "answer": "C", ...}

A completion's line ends in its own CRC-32; a torn, flipped or doubled line is dropped on reading, with a notice.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import IO, Any

from evalkit.errors import InputError
from evalkit.prompts import Rendered
from evalkit.types import Choose, Completion, Request, Score

_FIELDS = {f.name for f in fields(Completion)}


class RunFolder:
    """One run's folder. `create` makes it; `open_run` finds it again. Use `with folder.locked():` to write."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._journals: dict[str, IO[bytes]] = {}
        self._lock: int | None = None

    def __enter__(self) -> RunFolder:
        self._lock = os.open(self.path, os.O_RDONLY)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._lock)
            self._lock = None
            raise InputError(f"{self.path}: another process is writing to this run; wait for it or end it") from None
        return self

    def __exit__(self, *_: object) -> None:
        for journal in self._journals.values():
            journal.close()
        self._journals.clear()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def file(self, column: str, kind: str) -> Path:
        return self.path / f"{column}.{kind}.jsonl"

    def append(self, column: str, completion: Completion) -> None:
        """Append one answer and hand it to the operating system at once: a killed process loses none."""
        if column not in self._journals:
            path = self.file(column, "completions")
            torn = path.is_file() and path.stat().st_size > 0 and not _ends_line(path)
            self._journals[column] = path.open("ab", buffering=0)
            if torn:
                self._journals[column].write(b"\n")
        self._journals[column].write(_seal({k: v for k, v in asdict(completion).items() if v not in ("", (), 0)
                                            or k == "text"}))

    def completions(self, column: str, notice: Callable[[str], None] = lambda _: None) -> dict[str, Completion]:
        """Answers by key, the first of each that is no error; `notice` gets one line when lines had to be dropped."""
        path = self.file(column, "completions")
        found: dict[str, Completion] = {}
        bad = 0
        if not path.is_file():
            return found
        with path.open("rb") as lines:
            for line in lines:
                record = _unseal(line)
                if record is None or "key" not in record:
                    bad += line.strip() != b""
                    continue
                known: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v
                                         for k, v in record.items() if k in _FIELDS}
                if record["key"] not in found or found[record["key"]].finish == "error":
                    found[record["key"]] = Completion(**known)
        if bad:
            notice(f"{path}: {bad} damaged line{'s' * (bad > 1)} dropped; those answers are asked for again")
        return found

    def write_lines(self, column: str, kind: str, records: Iterable[Mapping[str, Any]]) -> None:
        """Write a file of JSON lines whole: beside it first, then in its place."""
        path = self.file(column, kind)
        beside = path.with_suffix(".tmp")
        with beside.open("w", encoding="utf-8") as out:
            for record in records:
                out.write(json.dumps(record, ensure_ascii=False) + "\n")
        beside.replace(path)

    def lines(self, column: str, kind: str) -> Iterator[dict[str, Any]]:
        path = self.file(column, kind)
        if not path.is_file():
            raise InputError(f"{path} does not exist; is {self.path} a run folder, and has it this column?")
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                try:
                    yield json.loads(line)
                except ValueError:
                    raise InputError(f"{path}:{number}: not a JSON line") from None

    def write_json(self, name: str, value: Mapping[str, Any]) -> None:
        beside = self.path / f"{name}.tmp"
        beside.write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
        beside.replace(self.path / name)

    def read_json(self, name: str) -> dict[str, Any]:
        path = self.path / name
        try:
            value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise InputError(f"{path} does not exist; a run folder is results/<model>/<run>") from None
        except ValueError as error:
            raise InputError(f"{path}: not valid JSON: {error}") from None
        return value


def create(out: str, model: str, name: str) -> RunFolder:
    """Make `out`/`model`/`name`. InputError when it exists, has an odd name or can't be written."""
    if not re.fullmatch(r"[\w.+=-]+", name) or name.startswith("."):
        raise InputError(f"--name {name!r}: letters, digits and . _ + = - only")
    path = Path(out) / model / name
    try:
        path.mkdir(parents=True)
    except FileExistsError:
        raise InputError(f"{path} exists; choose another --name, or go on with it: evalkit run --resume {path}") from None
    except OSError as error:
        raise InputError(f"--out {out}: cannot make {path}: {error.strerror}") from None
    return RunFolder(path)


def open_run(path: str) -> RunFolder:
    """The run in folder `path`. InputError when there is none."""
    if not (Path(path) / "run.json").is_file():
        raise InputError(f"{path}: not a run folder (no run.json); a run folder is results/<model>/<run>")
    return RunFolder(Path(path))


def request_record(request: Request, item: Rendered) -> dict[str, Any]:
    """What `<column>.requests.jsonl` has for one request: how it was asked, the text as sent, the gold answers."""
    ask = request.ask
    how: dict[str, Any] = {"choose": ask.options} if isinstance(ask, Choose) else {
        k: v for k, v in asdict(ask).items() if v not in ((), None)}
    record = {"key": request.key, "sample": request.sample, "index": request.index, "n_tokens": len(request.tokens),
              "n_shots": item.n_shots, "shots_dropped": item.dropped, "ask": how, "text": item.text}
    if request.index == 0:  # what scoring needs, so that a run can be scored again without the data
        fields = {k: v for k, v in item.sample.fields.items() if k in ("question", "input", "choices")}
        record |= {"group": item.sample.group, "target": item.sample.target, "options": item.sample.options,
                   "fields": fields}
    return record


def score_record(score: Score) -> dict[str, Any]:
    return asdict(score)


def _seal(record: Mapping[str, Any]) -> bytes:
    body = json.dumps(record, ensure_ascii=False, separators=(",", ":"))[:-1].encode("utf-8", "surrogatepass")
    return body + b',"sum":"%08x"}\n' % zlib.crc32(body)


def _unseal(line: bytes) -> dict[str, Any] | None:
    body, mark, end = line.rstrip(b"\n").rpartition(b',"sum":"')
    if not mark or end != b'%08x"}' % zlib.crc32(body):
        return None
    record: dict[str, Any] = json.loads(line.decode("utf-8", "surrogatepass"))
    return record


def _ends_line(path: Path) -> bool:
    with path.open("rb") as stream:
        stream.seek(-1, os.SEEK_END)
        return stream.read(1) == b"\n"
