"""What crosses arrives equal and of the same kind; what must not cross arrives as nothing that is equal to anything."""

from __future__ import annotations

import collections
import decimal
import enum
import fractions
import json
import math
import os
from typing import Any

import pytest

from evalkit.sandbox import wire

Point = collections.namedtuple("Point", "x y")


class Text(str):
    def __eq__(self, other: object) -> bool:
        return True

    __hash__ = str.__hash__


class Colour(enum.IntEnum):
    RED = 3


def across(value: Any) -> Any:
    return wire.unpack(json.loads(wire.dumps(wire.pack(value))))


@pytest.mark.parametrize(
    "value",
    [
        *(None, True, False, 0, -1, 2**63, -(2**63), 10**100, 0.1, -0.0, 1e308, math.inf, "", "a\n", "\ud800", "é"),
        *([], [1, [2.0, "3"]], (), (1, (2,)), {}, {1: "a", (2, 3): [4]}, {None: {"t": [1]}}, set(), {1, 2}),
        *(frozenset({"x"}), b"\xff\x00", bytearray(b"z"), 1 + 2j, range(1, 10, 3), range(2**70)),
        *(collections.deque([1, 2]), decimal.Decimal("1.10"), fractions.Fraction(-1, 3), {"i": "0x1"}, {"o": "x"}),
    ],
)
def test_plain_data_arrives_equal_and_of_its_kind(value: Any) -> None:
    arrived = across(value)
    assert arrived == value
    assert type(arrived) is type(value)
    assert repr(arrived) == repr(value)


def test_an_integer_of_more_digits_than_python_prints() -> None:
    assert across(-(10**5000)) == -(10**5000)


def test_not_a_number() -> None:
    assert math.isnan(across(math.nan))


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (Point(1, 2), (1, 2)),
        (Colour.RED, 3),
        (collections.OrderedDict(a=1), {"a": 1}),
        (collections.Counter("aab"), {"a": 2, "b": 1}),
        (Text("mine"), "mine"),
    ],
)
def test_subclasses_arrive_as_the_built_in_kind(value: Any, expected: Any) -> None:
    arrived = across(value)
    assert arrived == expected
    assert type(arrived) is type(expected)
    assert arrived != "another"


@pytest.mark.parametrize(
    "value", [(x for x in [1, 2]), map(int, "12"), iter([1, 2]), {1: 0, 2: 0}.keys(), zip([1], [2], strict=True)]
)
def test_iterators_arrive_as_iterators(value: Any) -> None:
    items = [(1, 2)] if isinstance(value, zip) else [1, 2]
    arrived = across(value)
    assert arrived != items
    assert list(arrived) == items


@pytest.mark.parametrize("value", [object(), print, type, lambda: 0, os, ...])
def test_anything_else_is_equal_to_nothing(value: Any) -> None:
    arrived = across(value)
    assert isinstance(arrived, wire.Opaque)
    assert arrived != value
    assert arrived != across(value)


def test_numpy_scalars_and_arrays_keep_their_kind() -> None:
    numpy = pytest.importorskip("numpy")
    truth = across(numpy.bool_(True))
    assert type(truth) is numpy.bool_
    array = across(numpy.array([[1, 2], [3, 4]], dtype="int16"))
    assert array.tolist() == [[1, 2], [3, 4]]
    assert array.dtype == "int16"
    assert type(across(numpy.float64(0.5))) is float


@pytest.mark.parametrize(
    "said",
    ['{"zz": 1}', "{}", '{"t": 5}', '{"i": 3}', '{"n": ["O", [1], "00"]}', '{"d": [[[1], 2]]}', '{"t": [1], "s": []}'],
)
def test_what_pack_did_not_write_is_refused(said: str) -> None:
    with pytest.raises((ValueError, TypeError, LookupError, ArithmeticError)):
        wire.unpack(json.loads(said))


def test_frames() -> None:
    reading, writing = os.pipe()
    try:
        wire.write(writing, b"one")
        wire.write(writing, b"")
        assert (wire.read(reading), wire.read(reading)) == (b"one", b"")
        wire.write(writing, b"x" * 2000)
        with pytest.raises(ValueError, match="more than 1 KiB"):
            wire.read(reading, 1024)
        os.close(writing)
        writing = -1
        os.read(reading, 4096)
        with pytest.raises(EOFError):
            wire.read(reading)
    finally:
        os.close(reading)
        if writing >= 0:
            os.close(writing)
