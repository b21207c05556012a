"""A real etcd, real REST servers in a thread where agents are needed, and a real PostgreSQL."""

from __future__ import annotations

import os
import shutil
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trio

# what these tests share with those of the store and of REST
sys.path[1:1] = [str(Path(__file__).parents[1] / "dcs"), str(Path(__file__).parents[1] / "rest")]

from ctl_world import World  # noqa: E402  (after the path)
from etcd_server import EtcdCluster  # noqa: E402  (after the path)

from pgha.rest.server import Listen, serve  # noqa: E402  (after the path)
from pgha.rest.tls import Tls  # noqa: E402  (as above)


@pytest.fixture(scope="session")
def etcd() -> Iterator[EtcdCluster]:
    with EtcdCluster() as cluster:
        yield cluster


@pytest.fixture
def world(etcd: EtcdCluster, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> World:
    for name in ("PGHA_SCOPE", "PGHACTL_CONFIG_FILE", "PGHA_CONFIGURATION"):
        monkeypatch.delenv(name, raising=False)
    return World(etcd, tmp_path, capsys)


@pytest.fixture(scope="session")
def postgres() -> Iterator[tuple[str, int]]:
    """The address of a PostgreSQL that asks user postgres for the password "geheim"."""
    bin_dir = Path(os.environ.get("PGHA_TEST_PG_BIN", "/usr/lib/postgresql/15/bin"))
    directory = Path(tempfile.mkdtemp(prefix="pgha-ctl-", dir="/dev/shm"))
    as_postgres: dict[str, Any] = {"cwd": directory, "env": {"PATH": os.environ["PATH"], "LC_ALL": "C"}}
    if os.getuid() == 0:
        shutil.chown(directory, "postgres", "postgres")
        as_postgres |= {"user": "postgres", "group": "postgres", "extra_groups": []}
    (directory / "password").write_text("geheim\n")
    (directory / "password").chmod(0o644)
    data = directory / "data"
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    try:
        subprocess.run([bin_dir / "initdb", "-D", data, "-U", "postgres", "-A", "scram-sha-256", "--pwfile", directory / "password", "--no-sync", "-E", "UTF8", "--locale", "C"],
                       check=True, capture_output=True, timeout=60, **as_postgres)
        subprocess.run([bin_dir / "pg_ctl", "start", "-w", "-D", data, "-l", directory / "log", "-o", f"-p {port} -h 127.0.0.1 -k {directory} -F -c max_connections=20"],
                       check=True, timeout=60, stdout=subprocess.DEVNULL, **as_postgres)
        yield "127.0.0.1", port
    finally:
        subprocess.run([bin_dir / "pg_ctl", "stop", "-m", "immediate", "-D", data], check=False, capture_output=True, timeout=60, **as_postgres)
        shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture
def start_agent() -> Iterator[Callable[..., tuple[str, int]]]:
    """Start a real REST server for an application, in a thread of its own; its address."""
    ends: list[Callable[[], None]] = []

    def start(app: Any, *, ssl_context: ssl.SSLContext | None = None) -> tuple[str, int]:
        ready = threading.Event()
        found: dict[str, Any] = {}

        async def main() -> None:
            async with trio.open_nursery() as nursery:
                found["address"] = (await nursery.start(serve, Listen(addresses=[("127.0.0.1", 0)], tls=Tls(ssl_context) if ssl_context else None), app))[0]
                found["token"], found["scope"] = trio.lowlevel.current_trio_token(), nursery.cancel_scope
                ready.set()
                await trio.sleep_forever()

        thread = threading.Thread(target=trio.run, args=(main,), daemon=True)
        thread.start()
        assert ready.wait(10)

        def end() -> None:
            trio.from_thread.run_sync(found["scope"].cancel, trio_token=found["token"])
            thread.join(10)

        ends.append(end)
        return found["address"]

    yield start
    for end in ends:
        end()
