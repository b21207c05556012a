"""How long to go on: a fixed number of inputs in the normal run, fifty times as many, from another seed, with --long."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
for folder in ("decide", "rest", "config", "observe", "lock"):
    if str(TESTS / folder) not in sys.path:
        sys.path.append(str(TESTS / folder))      # their worlds are used here, too


@pytest.fixture(params=[pytest.param(1, id="fixed"), pytest.param(50, id="long", marks=pytest.mark.long)])
def times(request: pytest.FixtureRequest) -> Iterator[int]:
    """Multiply the number of inputs by this; it is part of the seed."""
    yield request.param
