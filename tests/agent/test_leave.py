"""`pgha leave`: what a real guard and a real lock make of it."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pgha.clock import SystemClock
from pgha.config.directories import AGENT_LOCK
from pgha.errors import Refused
from pgha.leave import leave
from pgha.lock.guard_client import GuardClient
from pgha.lock.protocol import FILE_NAME

CONFIG = """
scope = "demo"
name = "n1"
[restapi]
listen = "127.0.0.1:1"
connect_address = "127.0.0.1:1"
[etcd3]
hosts = ["127.0.0.1:1"]
[postgresql]
listen = "127.0.0.1:2"
connect_address = "127.0.0.1:2"
data_dir = "{where}/data"
[postgresql.authentication.superuser]
username = "postgres"
[postgresql.authentication.replication]
username = "replicator"
[pgha]
runtime_dir = "{runtime}"
state_dir = "{where}/state"
{more}
"""


class Place:
    """A node's directories, with or without a guard."""

    def __init__(self, where: Path, runtime: Path) -> None:
        self.where, self.runtime = where, runtime
        self.config = where / "pgha.toml"
        self.write()
        (where / "data").mkdir(mode=0o700)
        self.guard: subprocess.Popen[bytes] | None = None

    def write(self, more: str = "") -> None:
        self.config.write_text(CONFIG.format(where=self.where, runtime=self.runtime, more=more))
        self.config.chmod(0o600)

    def start_guard(self) -> None:
        self.guard = subprocess.Popen([sys.executable, "-m", "pgha.lock.guard", "--data-dir", str(self.where / "data"), "--runtime-dir", str(self.runtime),
                                       "--agent-lock", str(self.runtime / AGENT_LOCK), "--alone-s", "infinity"], cwd=Path(__file__).parents[2])
        deadline = time.monotonic() + 10
        while not (self.runtime / "guard.sock").exists():
            assert time.monotonic() < deadline
            assert self.guard.poll() is None
            time.sleep(0.01)

    def leave(self) -> str:
        return leave(str(self.config), dict(os.environ))


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    runtime = Path(f"/dev/shm/pgha-leave-{os.getpid()}")        # noqa: S108  (tmpfs, and a short path)
    runtime.mkdir(mode=0o700)
    found = Place(tmp_path, runtime)
    yield found
    if found.guard is not None:
        found.guard.kill()
        found.guard.wait()
    for path in runtime.iterdir():
        path.unlink()
    runtime.rmdir()


def test_an_idle_guard_ends_and_what_it_knew_is_forgotten(place: Place) -> None:
    place.start_guard()
    (place.runtime / FILE_NAME).touch()
    assert "has ended (idle); what it knew is forgotten; another agent may be started" in place.leave()
    assert place.guard is not None
    assert place.guard.wait(5) != 0
    assert not (place.runtime / FILE_NAME).exists()


def test_what_a_guard_has_left_is_forgotten(place: Place) -> None:
    (place.runtime / FILE_NAME).touch()
    assert "there was no guard; what it knew is forgotten" in place.leave()
    assert "nothing was known" in place.leave()


def test_refused_while_an_agent_runs(place: Place) -> None:
    place.leave()
    with (place.runtime / AGENT_LOCK).open("w") as agent:
        fcntl.flock(agent, fcntl.LOCK_EX)
        (place.runtime / FILE_NAME).touch()
        with pytest.raises(Refused, match="an agent of pgha runs"):
            place.leave()
    assert (place.runtime / FILE_NAME).exists()


def test_refused_where_the_guard_is_a_service(place: Place) -> None:
    place.start_guard()
    place.write('guard = "service"')
    with pytest.raises(Refused, match="systemctl stop pgha-guard"):
        place.leave()
    assert place.guard is not None
    assert place.guard.poll() is None


def test_refused_while_it_watches_over_a_licence_that_ends(place: Place) -> None:
    import trio

    place.start_guard()

    async def arm() -> None:
        clock = SystemClock()
        client = GuardClient(place.runtime, incarnation="x", started_ns=clock.now().boot_ns)
        await client.arm(sequence=1, fence_at=clock.now().plus_s(60))
        await client.aclose()

    trio.run(arm)
    with pytest.raises(Refused, match="the guard is armed"):
        place.leave()
