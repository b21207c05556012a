"""What the tests of the lock share. The world itself is guard_world.py."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from guard_world import AS_POSTGRES, STAND_IN, GuardProcess, Node, own, postgres_bin, reap


@pytest.fixture(autouse=True, scope="session")
def _subreaper() -> None:
    """Orphans come to us: PID 1 of such machines may reap late."""
    ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)


@pytest.fixture(scope="session")
def template() -> Iterator[Path]:
    base = Path(tempfile.mkdtemp(prefix="pgha-lock-", dir="/dev/shm"))
    own(base)
    data = base / "template"
    subprocess.run([postgres_bin() / "initdb", "-D", data, "-A", "trust", "-U", "postgres", "--no-sync"],
                   check=True, stdout=subprocess.DEVNULL, cwd="/", **AS_POSTGRES)
    with (data / "postgresql.conf").open("a") as f:
        f.write("listen_addresses = ''\nfsync = off\nrestart_after_crash = off\nshared_buffers = 16MB\n"
                "wal_retrieve_retry_interval = 100ms\nlogging_collector = off\n")
    yield data
    shutil.rmtree(base, ignore_errors=True)


@pytest.fixture
def base(template: Path) -> Iterator[Path]:
    """A short path on tmpfs, of user postgres."""
    path = Path(tempfile.mkdtemp(dir=template.parent))
    own(path)
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture
def node(template: Path, base: Path) -> Iterator[Node]:
    it = Node(template, base)
    yield it
    it.stop()
    reap()


@pytest.fixture
def guard(node: Node) -> Iterator[GuardProcess]:
    it = GuardProcess(node.data, node.base)
    yield it
    it.kill()
    if sys.exc_info()[0] is None and it.log.exists():
        print(it.log.read_text())  # shown when the test failed


@pytest.fixture
def stand_in() -> Iterator:
    """Starts a process with this `comm` in this directory."""
    started: list[subprocess.Popen[bytes]] = []

    def start(comm: str, cwd: Path, *, undumpable: bool = False) -> subprocess.Popen[bytes]:
        process = subprocess.Popen([sys.executable, "-IS", "-c", STAND_IN, comm, cwd, "undumpable" if undumpable else ""],
                                   stdout=subprocess.PIPE, cwd="/", **AS_POSTGRES)
        assert process.stdout.readline() == b"x\n"
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()
