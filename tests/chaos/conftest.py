"""A cluster of hosts for the short scenarios; build/chaos has everything else."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "cluster"))

from chaos_bed import ChaosBed, chaos_bed, why_not  # noqa: E402

from pgha.demo.processes import Reaper  # noqa: E402


def _bed(request: pytest.FixtureRequest, **kind: Any) -> Iterator[ChaosBed]:
    if why := why_not():
        pytest.skip(why)
    with Reaper(), chaos_bed(f"test-{os.getpid()}", sources=request.config.getoption("--sources"), **kind) as bed:
        bed.start()
        bed.wait_healthy(90)
        yield bed


@pytest.fixture
def hosts(request: pytest.FixtureRequest) -> Iterator[ChaosBed]:
    """Three hosts without a watchdog, ttl 5."""
    yield from _bed(request)


@pytest.fixture
def hosts_with_watchdog(request: pytest.FixtureRequest) -> Iterator[ChaosBed]:
    """Three hosts whose (simulated) watchdog device is required, ttl 5."""
    yield from _bed(request, watchdog=True)
