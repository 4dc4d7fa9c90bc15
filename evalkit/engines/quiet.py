"""Sends what an engine's libraries print into a log file, also what their C code writes to fd 1 and 2."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Iterator
from typing import IO


@contextlib.contextmanager
def quiet(log: IO[str] | None) -> Iterator[None]:
    """Within it fd 1 and 2 are the log file; processes started in it keep that. None: changes nothing."""
    if log is None:
        yield
        return
    _flush()
    kept = os.dup(1), os.dup(2)
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    try:
        yield
    finally:
        _flush()
        for number, copy in enumerate(kept, start=1):
            os.dup2(copy, number)
            os.close(copy)


def point_loggers(name: str, stream: IO[str]) -> None:
    """The library's handlers hold the stream they were made with, which need not be fd 1 (pytest)."""
    for handler in logging.getLogger(name).handlers:
        if type(handler) is logging.StreamHandler:  # none of its children: a pytest handler reads its own stream
            handler.setStream(stream)


def _flush() -> None:
    sys.stdout.flush()
    sys.stderr.flush()
