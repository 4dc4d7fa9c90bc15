"""What crosses between a program and its checker: plain data as tagged JSON, read without running anything.

    (1, {"a": 2.5})  ->  {"t": [1, {"d": [["a", 2.5]]}]}

Lists and scalars stand for themselves, other kinds have a tag, subclasses arrive as the built-in kind, iterators as
iterators over at most a million items. Anything else is an `Opaque`, equal to nothing, so that an `__eq__` of the
program's own never meets an assertion.
"""

from __future__ import annotations

import collections
import decimal
import fractions
import itertools
import json
import numbers
import os
import struct
import types
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

SIZE = struct.Struct(">I")
_MOST_ITEMS = 1_000_000
_WORD = 1 << 63  # larger integers cross as hexadecimal: decimal text has a length limit and a quadratic cost
_SAMPLES: tuple[Any, ...] = ([], (), "", {}, set(), range(0), {}.keys(), {}.values(), {}.items(), reversed([]))
_LAZY: tuple[type, ...] = (
    types.GeneratorType,
    map,
    filter,
    zip,
    enumerate,
    reversed,
    itertools.chain,
    itertools.islice,
)
_LAZY += tuple(type(iter(x)) for x in _SAMPLES) + tuple(type(x) for x in _SAMPLES[6:])


@dataclass(frozen=True, slots=True, eq=False)
class Opaque:
    """Something that is not plain data, by the name of its class."""

    name: str


def pack(value: Any) -> Any:
    """Plain data as JSON values."""
    kind = type(value)
    if value is None or kind is bool or kind is str or kind is float:
        return value
    if kind is int:
        return value if -_WORD < value < _WORD else {"i": hex(value)}
    if kind is list:
        return _packed(value)
    if kind is dict:
        return {"d": [[pack(k), pack(x)] for k, x in value.items()]}
    for tag, base, write_kind, _ in _KINDS:
        if isinstance(value, base):
            return {tag: write_kind(value)}
    for base, plain in _BASES:
        if isinstance(value, base):
            return pack(plain(value))
    if kind.__module__ == "numpy" and hasattr(value, "dtype") and not value.dtype.hasobject:
        return {"n": [value.dtype.str, list(value.shape), value.tobytes().hex()]}
    if isinstance(value, numbers.Real):  # other libraries' numbers, such as sympy's
        return pack(int(value) if isinstance(value, numbers.Integral) else float(value))
    return {"o": kind.__name__[:80]}


def unpack(value: Any) -> Any:
    """The inverse; ValueError, TypeError, LookupError or ArithmeticError on anything that `pack` did not write."""
    if type(value) is list:
        return [unpack(x) for x in value]
    if type(value) is not dict:
        return value
    ((tag, inner),) = value.items()
    return _READ[tag](inner)


def _packed(values: Iterable[Any]) -> list[Any]:
    return [pack(x) for x in values]


def _array(inner: Any) -> Any:
    import numpy

    dtype, shape, data = inner
    array = numpy.frombuffer(bytes.fromhex(data), dtype).reshape(shape).copy()
    return array if shape else array[()]


_Turn = Callable[[Any], Any]
_BASES: tuple[tuple[type, _Turn], ...] = ((int, int), (float, float), (str, str.__str__), (list, list), (dict, dict))
_KINDS: tuple[tuple[str, type | tuple[type, ...], _Turn, _Turn], ...] = (
    ("t", tuple, _packed, lambda v: tuple(unpack(v))),
    ("s", set, _packed, lambda v: set(unpack(v))),
    ("f", frozenset, _packed, lambda v: frozenset(unpack(v))),
    ("b", bytes, bytes.hex, bytes.fromhex),
    ("a", bytearray, bytearray.hex, bytearray.fromhex),
    ("c", complex, lambda v: [v.real, v.imag], lambda v: complex(*v)),
    ("r", range, lambda v: _packed([v.start, v.stop, v.step]), lambda v: range(*unpack(v))),
    ("q", collections.deque, _packed, lambda v: collections.deque(unpack(v))),
    ("D", decimal.Decimal, str, decimal.Decimal),
    (
        "F",
        fractions.Fraction,
        lambda v: _packed([v.numerator, v.denominator]),
        lambda v: fractions.Fraction(*unpack(v)),
    ),
    ("I", _LAZY, lambda v: _packed(itertools.islice(v, _MOST_ITEMS)), lambda v: iter(unpack(v))),
)
_READ: dict[str, _Turn] = {
    **{tag: read_kind for tag, _, _, read_kind in _KINDS},
    "i": lambda v: int(v, 16),
    "d": lambda v: {unpack(k): unpack(x) for k, x in v},
    "n": _array,
    "o": lambda v: Opaque(str(v)),
}


def dumps(value: Any) -> bytes:
    return json.dumps(value, check_circular=False).encode("ascii")


def write(fd: int, data: bytes) -> None:
    """One frame: four bytes of length, then the data."""
    rest = memoryview(SIZE.pack(len(data)) + data)
    while rest:
        rest = rest[os.write(fd, rest) :]


def read(fd: int, most: int = 1 << 30) -> bytes:
    """One frame; EOFError when the other end is gone, ValueError when it says to be longer than `most` bytes."""
    (size,) = SIZE.unpack(read_exact(fd, SIZE.size))
    if size > most:
        raise ValueError(f"more than {most >> 10} KiB in one answer")
    return read_exact(fd, size)


def read_exact(fd: int, size: int) -> bytes:
    parts = []
    while size:
        parts.append(os.read(fd, min(size, 1 << 20)))
        size -= len(parts[-1])
        if not parts[-1]:
            raise EOFError
    return b"".join(parts)
