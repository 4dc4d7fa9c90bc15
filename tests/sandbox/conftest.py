"""A sandbox with every layer, or a skip that says which one this machine cannot have."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from evalkit.errors import InputError
from evalkit.sandbox import Sandbox


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    try:
        opened = Sandbox(workers=2)
    except InputError as error:
        pytest.skip(str(error))
    with opened:
        yield opened
