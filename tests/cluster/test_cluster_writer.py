"""The clients, on a plain PostgreSQL without any agent: what they note is what happened, also around a `kill -9`."""

import json
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import history
import psycopg
import pytest
import traffic

from pgha.demo.processes import Reaper, postgres_of, run, signal_all, spawn
from pgha.demo.programs import find_postgres

pytestmark = pytest.mark.postgres


class Plain:
    """One PostgreSQL on a unix socket."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.data = directory / "data"
        self.bin = find_postgres()
        self.child = None
        self.dsn = f"host={directory} port=5432 user=postgres dbname=postgres"
        run([self.bin / "initdb", "-D", self.data, "-A", "trust", "-U", "postgres", "-N"], timeout_s=60, user="postgres").check_returncode()

    def start(self) -> None:
        self.reap()
        self.child = spawn([self.bin / "postgres", "-D", self.data, "-k", str(self.directory), "-c", "listen_addresses=", "-c", "restart_after_crash=off"],
              log=self.directory / "log", directory=self.directory, user="postgres")
        until(self.answers, "PostgreSQL answers")

    def reap(self) -> None:
        if self.child is not None:
            self.child.wait(10)

    def answers(self) -> bool:
        try:
            psycopg.connect(self.dsn, connect_timeout=2).close()
        except psycopg.OperationalError:
            return False
        return True

    def ids(self) -> set[int]:
        with psycopg.connect(self.dsn) as connection:
            return {row[0] for row in connection.execute("SELECT id FROM traffic")}


def until(condition, what, timeout_s=20):
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.02)


@pytest.fixture
def plain():
    directory = Path(tempfile.mkdtemp(prefix="pgha-plain-", dir="/dev/shm"))
    shutil.chown(directory, "postgres", "postgres")
    with Reaper():
        server = Plain(directory)
        try:
            server.start()
            with psycopg.connect(server.dsn, autocommit=True) as connection:
                connection.execute(traffic.TABLE)
            yield server
        finally:
            until(lambda: not signal_all(postgres_of(server.data), signal.SIGKILL), "PostgreSQL ends")
            server.reap()
            shutil.rmtree(directory)


@pytest.mark.parametrize("kind", ["plain", "pipeline", "procedure"])
def test_a_writer_survives_a_crash_and_every_row_that_it_notes_is_there(plain, kind):
    out = plain.directory / "acks"
    out.touch()
    spec = json.dumps({"dsn": plain.dsn, "node": "n1", "number": 3, "rate": traffic.RATE})
    child = spawn([sys.executable, str(Path(traffic.__file__).with_name("writer.py")), kind, str(out), spec],
                  log=plain.directory / "writer.log", directory=plain.directory)
    try:
        until(lambda: len(history.read(out)) > 100, "it writes")
        signal_all(postgres_of(plain.data), signal.SIGKILL)
        until(lambda: not postgres_of(plain.data), "PostgreSQL is gone")
        before = len(history.read(out))
        plain.start()
        until(lambda: len(history.read(out)) > before + 100, "it writes again")
    finally:
        child.terminate()
        child.wait(10)
    verdict = history.judge(history.read(out), plain.ids())
    assert not verdict.violations and not verdict.lost, str(verdict)
    assert len(verdict.reigns) == 2, "one reign for each life of the postmaster"
    assert all(reign.acks > 50 for reign in verdict.reigns)
    if kind == "plain":
        seconds = sum(r.last_ack_wall_us - r.first_ack_wall_us for r in verdict.reigns) / 1e6
        assert verdict.acks / seconds > 100, f"{verdict.acks} rows in {seconds} s: not the rate that the scenarios promise"


def test_the_pipelining_client_shows_that_orphans_go_on_without_their_postmaster(plain):
    """What the sweep exists for (safety model 8): a backend whose input buffer is full outlives its postmaster."""
    out = plain.directory / "acks"
    out.touch()
    spec = json.dumps({"dsn": plain.dsn, "node": "n1", "number": 3, "rate": traffic.RATE})
    child = spawn([sys.executable, str(Path(traffic.__file__).with_name("writer.py")), "pipeline", str(out), spec],
                  log=plain.directory / "writer.log", directory=plain.directory)
    try:
        until(lambda: len(history.read(out)) > 1000, "it writes")
        postmaster = int((plain.data / "postmaster.pid").read_text().splitlines()[0])
        signal_all([p for p in postgres_of(plain.data) if p.pid == postmaster], signal.SIGKILL)
        killed_us = time.time_ns() // 1000
        until(lambda: not postgres_of(plain.data) or any(a.stamp_us > killed_us + 300_000 for a in history.read(out)), "orphans end or write on")
    finally:
        child.terminate()
        child.wait(10)
    assert any(a.stamp_us > killed_us + 300_000 for a in history.read(out)), "no orphan wrote for 0.3 s: the client does not press enough"
