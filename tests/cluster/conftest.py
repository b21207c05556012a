"""Real clusters for the scenarios: started once, used by one test after another while they are whole.

Agents, etcd and PostgreSQL run as user postgres, from a copy of dist/pgha.pyz and with the system's Python.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from installed import USER, install

from pgha.demo.bed import Bed, BedTimeout
from pgha.demo.node import FAST
from pgha.demo.processes import Reaper
from pgha.demo.programs import Program, find_etcd, find_postgres

_LOG_LINES = 30  # of each agent, that a failure prints


@pytest.fixture(scope="session")
def bench() -> Iterator[Path]:
    """A directory on tmpfs that postgres can enter, with everything that the clusters of this session write."""
    directory = Path(tempfile.mkdtemp(prefix="pgha-tests-", dir="/dev/shm"))
    directory.chmod(0o755)
    yield directory
    shutil.rmtree(directory / "program", ignore_errors=True)
    if any(directory.iterdir()):
        print(f"\nkept for looking at: {directory}")
    else:
        directory.rmdir()


@pytest.fixture(scope="session")
def program(bench: Path, request: pytest.FixtureRequest) -> Program:
    return install(bench / "program", sources=request.config.getoption("--sources"))


class Beds:
    """At most one cluster at a time, kept for the next test that wants one of the same kind and finds it whole."""

    def __init__(self, program: Program, bench: Path) -> None:
        self._program = program
        self._bench = bench
        self._number = 0
        self._bed: Bed | None = None
        self._kind: Any = None

    def fresh(self, **kind: Any) -> Bed:
        """A bed of which nothing has been started; the former one ends."""
        self.end()
        self._number += 1
        self._bed = Bed(self._bench / f"bed{self._number}", self._program, etcd_program=find_etcd(), bin_dir=find_postgres(),
                        user=USER, **{"profile": FAST, **kind})
        return self._bed

    def whole(self, **kind: Any) -> Bed:
        """A healthy cluster of three nodes."""
        if self._bed is not None and self._kind == kind:
            for node in self._bed.nodes:
                if node.agent_process is None:
                    node.start_agent()
            try:
                self._bed.wait_healthy(20)
            except BedTimeout as why:
                print(f"the former test's cluster is not whole any more, a new one is made: {why}")
            else:
                return self._bed
        bed = self.fresh(**kind)
        bed.start()
        bed.wait_healthy(90)
        self._kind = kind
        return bed

    def end(self, *, failed: bool = False) -> None:
        """End it; after a failure its files stay, and the ends of the logs are printed."""
        bed, self._bed, self._kind = self._bed, None, None
        if bed is None:
            return
        if failed:
            for node in bed.nodes:
                print(f"\n--- the end of {node.log_path}\n{node.log_tail(_LOG_LINES)}")
            print(f"\n--- everything is in {bed.directory}\n{bed.describe()}")
        bed.close(remove=not failed)


@pytest.fixture(scope="session")
def all_beds(program: Program, bench: Path) -> Iterator[Beds]:
    if os.getuid() != 0:
        pytest.skip("clusters are started as user postgres, which takes root")
    with Reaper():
        beds = Beds(program, bench)
        try:
            yield beds
        finally:
            beds.end()


@pytest.fixture
def beds(all_beds: Beds, request: pytest.FixtureRequest) -> Iterator[Beds]:
    yield all_beds
    if getattr(request.node, "has_failed", False):
        all_beds.end(failed=True)


@pytest.fixture
def cluster(beds: Beds) -> Bed:
    """Three nodes, one etcd member, ttl 5."""
    return beds.whole()


@pytest.fixture
def cluster3(beds: Beds) -> Bed:
    """Three nodes, three etcd members, ttl 5."""
    return beds.whole(etcd_members=3)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    outcome: Any = yield
    if outcome.get_result().failed:
        item.has_failed = True  # type: ignore[attr-defined]
