"""What all tests share: the sources on the path, and the choice of the scenarios that take minutes each."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="run the scenarios that take minutes each, and only those")
    parser.addoption("--sources", action="store_true", help="start agents from the sources instead of dist/pgha.pyz")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "long: takes minutes of waiting; runs with --long only")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    wanted = config.getoption("--long")
    items[:], left_out = (
        [item for item in items if (item.get_closest_marker("long") is not None) == wanted],
        [item for item in items if (item.get_closest_marker("long") is not None) != wanted],
    )
    if left_out:
        config.hook.pytest_deselected(items=left_out)
