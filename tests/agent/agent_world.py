"""Virtual time, a store in memory that counts what is written to it, and a node's configuration from its parts."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import trio
from trio.testing import MockClock

from pgha.clock import Instant
from pgha.config.load import load
from pgha.config.local import LocalConfig
from pgha.dcs import Compare, Delete, Outcome, Put
from pgha.dcs.keys import Keys
from pgha.dcs.memory import MemoryStore, MemoryWorld

KEYS = Keys("service", "demo")

FILE = """
scope = "s"
name = "n1"
[restapi]
listen = "127.0.0.1:8008"
{restapi}
[etcd3]
{etcd3}
[postgresql]
{postgresql}
data_dir = "{data_dir}"
[postgresql.authentication.replication]
username = "r"
{more}
"""
ETCD3, POSTGRESQL = 'hosts = ["10.0.0.1", "10.0.0.2"]', 'listen = "127.0.0.1:5432"'


def text(*, restapi: str = "", etcd3: str = ETCD3, postgresql: str = POSTGRESQL, more: str = "", data_dir: str = "/d") -> str:
    """The least file that starts a node, with more lines in its sections."""
    return FILE.format(restapi=restapi, etcd3=etcd3, postgresql=postgresql, more=more, data_dir=data_dir)


def local(written: str) -> LocalConfig:
    return load("", {"PGHA_CONFIGURATION": written}).local


class TrioClock:
    """Both clocks are trio's."""

    def now(self) -> Instant:
        ns = round(trio.current_time() * 1e9)
        return Instant(ns, ns)

    def wall_s(self) -> float:
        return trio.current_time() + 1_000_000.0


def run(main: Callable[[], Awaitable[None]]) -> None:
    trio.run(main, clock=MockClock(autojump_threshold=0))


class CountingStore(MemoryStore):
    """Notes (when, what) of each call that changes something; loses the answers of so many of the next transactions."""

    def __init__(self, world: MemoryWorld) -> None:
        super().__init__(world)
        self.calls: list[tuple[float, str]] = []
        self.lose_answers = 0
        self.before_write: Callable[[], None] = lambda: None

    async def transact(self, *, compares: Sequence[Compare], puts: Sequence[Put | Delete], read: Sequence[str] = (), deadline_s: float,
                       attempt_s: float | None = None) -> Outcome:
        self.calls.append((trio.current_time(), "write"))
        self.before_write()
        outcome = await super().transact(compares=compares, puts=puts, read=read, deadline_s=deadline_s, attempt_s=attempt_s)
        if self.lose_answers:                                    # the driver sends it again: contract of `transact`
            self.lose_answers -= 1
            return await super().transact(compares=compares, puts=puts, read=read, deadline_s=deadline_s, attempt_s=attempt_s)
        return outcome

    async def grant(self, ttl_s: float, *, deadline_s: float) -> int:
        self.calls.append((trio.current_time(), "grant"))
        return await super().grant(ttl_s, deadline_s=deadline_s)

    async def renew(self, lease: int, *, deadline_s: float) -> float:
        self.calls.append((trio.current_time(), "renew"))
        return await super().renew(lease, deadline_s=deadline_s)

    def times(self, what: str) -> list[float]:
        return [round(at, 3) for at, call in self.calls if call == what]


async def until(holds: Callable[[], Any], within_s: float) -> None:
    """Wait for a fact in virtual time."""
    with trio.fail_after(within_s):
        while not holds():
            await trio.sleep(0.01)


