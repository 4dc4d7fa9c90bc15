"""What crosses between a program and its checker: plain data as tagged JSON, read without running anything.

    (1, {"a": 2.5})  ->  {"t": [1, {"d": [["a", 2.5]]}]}

Lists and scalars stand for themselves, every other kind has a tag. An object of the program's own class arrives
as an `Opaque`, equal to nothing, so an overridden `__eq__` never meets an assertion. Subclasses of the built-in
kinds arrive as the built-in value, iterators as iterators over at most a million items read beforehand.
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
from collections.abc import Callable, Iterable
from typing import Any

MOST_ITEMS = 1_000_000
_WORD = 1 << 63  # larger integers cross as hexadecimal: decimal text has a length limit and a quadratic cost
_LAZY = (type(x for x in ()), map, filter, zip, enumerate, reversed, itertools.chain, itertools.islice,
         *(type(iter(x)) for x in ([], (), "", {}, set(), range(0))))  # fmt: skip


class Opaque:
    """Something that cannot cross, known by the name of its class only."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __repr__(self) -> str:
        return f"<{self.name}: not plain data>"


def pack(value: Any) -> Any:
    """Plain data as JSON values."""
    kind = type(value)
    if value is None or kind is bool or kind is str or kind is float:
        return value
    if kind is int:
        return value if -_WORD < value < _WORD else {"i": hex(value)}
    if kind is list:
        return [pack(x) for x in value]
    if kind is dict:
        return {"d": [[pack(k), pack(x)] for k, x in value.items()]}
    for tag, base, plain in _KINDS:
        if isinstance(value, base):
            return {tag: plain(value)} if tag else plain(value)
    if kind.__module__ == "numpy" and hasattr(value, "dtype") and not value.dtype.hasobject:
        return {"n": [value.dtype.str, list(value.shape), value.tobytes().hex()]}
    if isinstance(value, numbers.Integral):  # other libraries' numbers, such as sympy's
        return pack(int(value))
    return float(value) if isinstance(value, numbers.Real) else {"o": kind.__name__[:80]}


def _packed(values: Iterable[Any]) -> list[Any]:
    return [pack(x) for x in itertools.islice(values, MOST_ITEMS)]


_Plain = Callable[[Any], Any]
_KINDS: tuple[tuple[str, type | tuple[type, ...], _Plain], ...] = (
    ("t", tuple, lambda v: [pack(x) for x in tuple.__iter__(v)]),
    ("", str, str.__str__),
    ("", int, lambda v: pack(int.__index__(v))),
    ("", float, float.__float__),
    ("", list, lambda v: [pack(x) for x in list.__iter__(v)]),
    ("", dict, lambda v: {"d": [[pack(k), pack(x)] for k, x in dict.items(v)]}),
    ("s", set, lambda v: [pack(x) for x in set.__iter__(v)]),
    ("f", frozenset, lambda v: [pack(x) for x in frozenset.__iter__(v)]),
    ("b", bytes, bytes.hex),
    ("a", bytearray, bytearray.hex),
    ("c", complex, lambda v: [v.real, v.imag]),
    ("r", range, lambda v: [v.start, v.stop, v.step]),
    ("q", collections.deque, lambda v: [_packed(v), v.maxlen]),
    ("D", decimal.Decimal, str),
    ("F", fractions.Fraction, lambda v: [pack(v.numerator), pack(v.denominator)]),
    ("k", type({}.keys()), _packed),
    ("v", type({}.values()), _packed),
    ("e", type({}.items()), _packed),
    ("I", _LAZY, _packed),
)


def unpack(value: Any) -> Any:
    """The inverse; ValueError, TypeError, LookupError or ArithmeticError on anything that `pack` did not write."""
    if type(value) is list:
        return [unpack(x) for x in value]
    if type(value) is not dict:
        return value
    ((tag, inner),) = value.items()
    return _READ[tag](inner)


def _items(inner: Any) -> list[Any]:
    return [unpack(x) for x in inner]


def _array(inner: Any) -> Any:
    import numpy

    dtype, shape, data = inner
    array = numpy.frombuffer(bytes.fromhex(data), dtype).reshape(shape).copy()
    return array if shape else array[()]


_READ: dict[str, _Plain] = {
    "i": lambda v: int(v, 16),
    "d": lambda v: {unpack(k): unpack(x) for k, x in v},
    "t": lambda v: tuple(_items(v)),
    "s": lambda v: set(_items(v)),
    "f": lambda v: frozenset(_items(v)),
    "b": bytes.fromhex,
    "a": bytearray.fromhex,
    "c": lambda v: complex(*v),
    "r": lambda v: range(*v),
    "q": lambda v: collections.deque(_items(v[0]), v[1]),
    "D": decimal.Decimal,
    "F": lambda v: fractions.Fraction(*_items(v)),
    "k": lambda v: dict.fromkeys(_items(v)).keys(),
    "v": lambda v: dict(enumerate(_items(v))).values(),
    "e": lambda v: dict(_items(v)).items(),
    "I": lambda v: iter(_items(v)),
    "n": _array,
    "o": lambda v: Opaque(str(v)),
}


def write(fd: int, data: bytes) -> None:
    """One frame: four bytes of length, then the data."""
    rest = memoryview(struct.pack(">I", len(data)) + data)
    while rest:
        rest = rest[os.write(fd, rest) :]


def read_exact(fd: int, size: int) -> bytes:
    """`size` bytes; EOFError when the other end is gone before."""
    parts = []
    while size:
        part = os.read(fd, min(size, 1 << 20))
        if not part:
            raise EOFError
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def read(fd: int, most: int = 1 << 30) -> bytes:
    """One frame; EOFError as above, ValueError when it says to be longer than `most` bytes."""
    (size,) = struct.unpack(">I", read_exact(fd, 4))
    if size > most:
        raise ValueError(f"more than {most >> 10} KiB in one answer")
    return read_exact(fd, size)


def dumps(value: Any) -> bytes:
    return json.dumps(value, check_circular=False).encode("ascii")
