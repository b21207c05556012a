"""`pytest tests/scenarios --update-transcripts` writes the transcripts anew."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-transcripts", action="store_true", help="write the transcripts of tests/scenarios anew instead of comparing them")
