"""A real etcd, and real REST servers in a thread where agents are needed."""

from __future__ import annotations

import ssl
import sys
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


@pytest.fixture(scope="session")
def etcd() -> Iterator[EtcdCluster]:
    with EtcdCluster() as cluster:
        yield cluster


@pytest.fixture
def world(etcd: EtcdCluster, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> World:
    for name in ("PGHA_SCOPE", "PGHACTL_CONFIG_FILE", "PGHA_CONFIGURATION"):
        monkeypatch.delenv(name, raising=False)
    return World(etcd, tmp_path, capsys)


@pytest.fixture
def start_agent() -> Iterator[Callable[..., tuple[str, int]]]:
    """Start a real REST server for an application, in a thread of its own; its address."""
    ends: list[Callable[[], None]] = []

    def start(app: Any, *, ssl_context: ssl.SSLContext | None = None) -> tuple[str, int]:
        ready = threading.Event()
        found: dict[str, Any] = {}

        async def main() -> None:
            async with trio.open_nursery() as nursery:
                found["address"] = (await nursery.start(serve, Listen(addresses=[("127.0.0.1", 0)], ssl_context=ssl_context), app))[0]
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
