"""Everything evalkit raises on purpose. One line each: the file or option, the value, the remedy.

EvalkitError
├── InputError          bad input, found before any engine work            (exit 2)
│   ├── UnknownName     no such model, task, format, recipe, id, switch ... with the nearest known name
│   ├── DataError       a data set, split or column is missing or unreadable
│   └── ModelError      a model folder that cannot be used as it is
├── EngineError         the engine could not be built or died              (exit 1; before the first answer: 2)
└── RunError            the run ended, but something in it failed          (exit 1)
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class EvalkitError(Exception):
    """Base of all; `exit_code` is what the command line returns."""

    exit_code = 1


class InputError(EvalkitError):
    """Bad input: nothing was run and nothing was written."""

    exit_code = 2


class UnknownName(InputError):
    """A name that nothing answers to; the message gives the nearest known ones."""

    def __init__(self, kind: str, name: str, known: Iterable[str], remedy: str = "") -> None:
        super().__init__(f"unknown {kind} {name!r}{nearest(name, known)}{'; ' + remedy if remedy else ''}")


class DataError(InputError):
    """A data set, split or column that is missing or cannot be read."""


class ModelError(InputError):
    """A model folder or hub id that cannot be used as it is."""


class EngineError(EvalkitError):
    """The engine could not be built, or died while it worked."""


class RunError(EvalkitError):
    """The run reached its end, but something in it failed."""


def nearest(name: str, known: Iterable[str]) -> str:
    """`; did you mean 'gsm_cot'?`, or the known names when none is near (at most 12 of them)."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=2, cutoff=0.6)
    if close:
        return "; did you mean " + " or ".join(repr(c) for c in close) + "?"
    shown = ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")
    return f"; known: {shown}" if names else ""
