"""Each test runs in a child that has become user postgres; what PostgreSQL processes it leaves are killed at its end."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import pytest
from act_bed import Bed, shared

from pgha.clock import SystemClock
from pgha.dcs.memory import MemoryWorld


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item, nextitem):
    if Path(__file__).parent not in Path(item.fspath).parents:
        return None
    shared.workspace(item.config)
    if os.getuid() != 0:
        return None
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    for report in shared._in_child(item):
        item.ihook.pytest_runtest_logreport(report=report)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    return True


@pytest.fixture
def bed(request):
    path = Path(tempfile.mkdtemp(dir=shared.workspace(request.config)))
    yield Bed(path, MemoryWorld(SystemClock()))
    for node in path.iterdir():
        shared._end_servers(node)
    shutil.rmtree(path)
