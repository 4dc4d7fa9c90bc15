"""The run folder: plain JSON lines, appended as answers come; everything else in it can be made again.

    results/<model>/<run>/  run.json · engine.log · metrics.json · table.md
      <column>.requests.jsonl   {"key": "5f0c...", "sample": "anatomy/test/12", "index": 0, "text": "<|user|>...", ...}
      <column>.completions.jsonl {"key": "5f0c...", "text": " 18", "finish": "stop", ..., "sum": "9a1b2c3d"}
      <column>.scores.jsonl     {"sample": "anatomy/test/12", "status": "scored", "value": 1.0, "answer": "C", ...}

A completion's line ends in its own CRC-32: a torn or flipped line is dropped on reading, with a notice, and of two
lines with one key the first stands.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shlex
import time
import weakref
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, fields
from io import FileIO
from pathlib import Path
from typing import Any

from evalkit.errors import InputError, RunError
from evalkit.prompts import Rendered
from evalkit.types import Choose, Completion, Request, Score

_DEFAULTS = {f.name: f.default for f in fields(Completion) if f.name not in ("key", "text")}
_TYPES = {f.name: {"str": str, "int": int}.get(str(f.type), list) for f in fields(Completion)}
_ENCODE = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
SYNC = 1.0  # seconds after which written answers are forced to the disk


class RunFolder:
    """One run's folder. `create` makes it; `open_run` finds it again; `with folder:` locks it for writing.

    RunError where the disk refuses (full, gone): what stood in the folder still stands.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._journals: dict[str, FileIO] = {}
        self._lock: int | None = None
        self._synced = 0.0

    def __enter__(self) -> RunFolder:
        if not os.access(self.path, os.W_OK):
            raise InputError(f"{self.path}: may not be written to (read-only?); copy it elsewhere, or change its mode")
        lock = os.open(self.path, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            raise InputError(f"{self.path}: another process is writing to this run; wait for it or end it") from None
        self._lock, self._synced = lock, time.monotonic()
        os.register_at_fork(after_in_child=self._forget_lock)  # else a child that outlives a killed run holds it
        return self

    def __exit__(self, *_: object) -> None:
        for journal in self._journals.values():
            with contextlib.suppress(OSError):
                os.fsync(journal.fileno())
            journal.close()
        self._journals.clear()
        if self._lock is not None:
            fcntl.flock(self._lock, fcntl.LOCK_UN)
        self._forget_lock()

    def _forget_lock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def file(self, column: str, kind: str) -> Path:
        return self.path / f"{column}.{kind}.jsonl"

    def append(self, column: str, completion: Completion) -> None:
        """Append one answer: handed to the operating system at once, so that a killed process loses none, and
        forced to the disk every second."""
        path = self.file(column, "completions")
        try:
            if column not in self._journals:
                self._journals[column] = _open_journal(path)
            write_whole(self._journals[column], _seal(completion))
            if time.monotonic() - self._synced > SYNC:
                for journal in self._journals.values():
                    os.fsync(journal.fileno())
                self._synced = time.monotonic()
        except OSError as error:
            raise _refused(path, error) from None

    def completions(self, column: str, notice: Callable[[str], None] = lambda _: None) -> Completions:
        """Answers by key, the first of each that is no error; `notice` gets one line when lines had to be dropped."""
        path = self.file(column, "completions")
        found = Completions(path)
        if found.bad:
            lines = "line" if found.bad == 1 else "lines"
            notice(f"{path}: {found.bad} damaged {lines} dropped; those answers are asked for again")
        return found

    def write_lines(self, column: str, kind: str, records: Iterable[Mapping[str, Any]]) -> None:
        """Write a file of JSON lines whole."""
        self.write(self.file(column, kind).name, (json.dumps(record, ensure_ascii=False) + "\n" for record in records))

    def write_json(self, name: str, value: Mapping[str, Any]) -> None:
        self.write(name, [json.dumps(value, ensure_ascii=False, indent=1) + "\n"], sync=True)

    def write(self, name: str, parts: Iterable[str], sync: bool = False) -> None:
        """Write a text file whole: beside it first, then in its place."""
        path, beside = self.path / name, self.path / f"{name}.tmp"
        try:
            # backslashreplace writes a lone surrogate as JSON does: \ud800
            with beside.open("w", encoding="utf-8", errors="backslashreplace") as out:
                out.writelines(parts)
                if sync:
                    out.flush()
                    os.fsync(out.fileno())
            beside.replace(path)
        except OSError as error:
            raise _refused(path, error) from None
        finally:
            with contextlib.suppress(OSError):
                beside.unlink(missing_ok=True)

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

    def read_json(self, name: str) -> dict[str, Any]:
        path = self.path / name
        try:
            value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise InputError(f"{path} does not exist; a run folder is results/<model>/<run>") from None
        except ValueError as error:
            raise InputError(f"{path}: not valid JSON: {error}") from None
        return value


class Completions(Mapping[str, Completion]):
    """The answers of one journal by key, in memory only where each stands; read from the file when asked for."""

    def __init__(self, path: Path) -> None:
        self._at: dict[str, int] = {}  # key -> offset * 2^32 + length of its line: an int is the smallest
        self.errors: set[str] = set()  # keys of which nothing but errors is known
        self.bad = at = 0  # damaged lines
        if not path.is_file():
            return
        with path.open("rb") as lines:
            for line in lines:
                found = _unseal(line)
                if found is None:
                    self.bad += line.strip() != b""
                elif (key := found["key"]) not in self._at or key in self.errors:
                    self._at[key] = at << 32 | len(line)
                    (self.errors.add if found.get("finish") == "error" else self.errors.discard)(key)
                at += len(line)
            self._file = os.dup(lines.fileno())
        weakref.finalize(self, os.close, self._file)

    def __getitem__(self, key: str) -> Completion:
        place = self._at[key]
        line = os.pread(self._file, place & 0xFFFFFFFF, place >> 32)  # journals only grow: it was checked before
        record: dict[str, Any] = json.loads(str(line, "utf-8"))
        known = {name: record[name] for name in record if name in _TYPES}
        if "logprobs" in known:
            known["logprobs"] = tuple(known["logprobs"])
        return Completion(**known)

    def has(self, key: str) -> bool:
        """Whether there is an answer that is no error."""
        return key in self._at and key not in self.errors

    def __contains__(self, key: object) -> bool:
        return key in self._at

    def __iter__(self) -> Iterator[str]:
        return iter(self._at)

    def __len__(self) -> int:
        return len(self._at)


def create(out: str, model: str, name: str) -> RunFolder:
    """Make `out`/`model`/`name`. InputError when it exists, has an odd name or can't be written."""
    if not re.fullmatch(r"[\w.+=-]+", name) or name.startswith("."):
        raise InputError(f"--name {name!r}: letters, digits and . _ + = - only")
    path = Path(out) / model / name
    try:
        if path.is_dir() and all(file.suffix == ".tmp" for file in path.iterdir()):  # killed before run.json stood
            return RunFolder(path)
        path.mkdir(parents=True)
    except FileExistsError:
        raise InputError(f"{path} exists; choose another --name, or go on with it: {resume_command(path)}") from None
    except OSError as error:
        raise InputError(f"--out {out}: cannot make {path}: {error.strerror}") from None
    return RunFolder(path)


def open_run(path: str) -> RunFolder:
    """The run in folder `path`. InputError when there is none."""
    if not (Path(path) / "run.json").is_file():
        raise InputError(f"{path}: not a run folder (no run.json); a run folder is results/<model>/<run>")
    return RunFolder(Path(path))


def resume_command(path: Path) -> str:
    return f"evalkit run --resume {shlex.quote(str(path))}"


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


def _seal(completion: Completion) -> bytes:
    record = {"key": completion.key, "text": completion.text}
    for name, default in _DEFAULTS.items():
        if (value := getattr(completion, name)) != default:
            record[name] = value
    body = _ENCODE(record)[:-1].encode("utf-8", "backslashreplace")
    return body + b',"sum":"%08x"}\n' % zlib.crc32(body)


def _unseal(line: bytes) -> dict[str, Any] | None:
    """The fields of an answer's line; None if it is damaged: another sum, no JSON or UTF-8, a value of a wrong type."""
    body, mark, end = line.rstrip(b"\n").rpartition(b',"sum":"')
    if not mark or end != b'%08x"}' % zlib.crc32(body):
        return None
    try:
        record: dict[str, Any] = json.loads(str(line, "utf-8"))
    except (ValueError, RecursionError):
        return None
    for name, value in record.items():
        if type(value) is not _TYPES.get(name, type(value)):
            return None
    return record if "key" in record else None


def _open_journal(path: Path) -> FileIO:
    journal = FileIO(path, "a+")
    size = os.fstat(journal.fileno()).st_size
    if size and os.pread(journal.fileno(), 1, size - 1) != b"\n":  # a torn tail stays a line of its own
        journal.write(b"\n")
    return journal


def write_whole(journal: FileIO, line: bytes) -> None:
    """All of the line at the file's end or, where the disk is full, none of it (OSError)."""
    left = line
    try:
        while left:
            left = left[journal.write(left):]
    except OSError:
        with contextlib.suppress(OSError):
            os.ftruncate(journal.fileno(), os.fstat(journal.fileno()).st_size - (len(line) - len(left)))
        raise


def _refused(path: Path, error: OSError) -> RunError:
    return RunError(f"{path}: cannot be written: {error.strerror}")
