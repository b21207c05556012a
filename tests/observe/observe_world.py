"""An observer of a store in memory, in virtual time, and a link to it that answers late or whose watch is mute."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import trio
from trio.testing import MockClock

from pgha.clock import Instant
from pgha.dcs import Capacity, Change, Compare, Delete, Generation, Outcome, Put, Snapshot
from pgha.dcs.keys import LOCK, Keys, encode
from pgha.dcs.memory import MemoryStore, MemoryWorld
from pgha.model.lock import LockRecord
from pgha.observe.cluster import ClusterObserver

KEYS = Keys("service", "demo")
#: What pg_controldata says of a server that was shut down on timeline 3.
CONTROL = """pg_control version number:            1300
Catalog version number:               202209061
Database system identifier:           7711161683783831200
Database cluster state:               shut down
pg_control last modified:             Wed Nov 25 22:00:00 2026
Latest checkpoint location:           0/3000028
Latest checkpoint's REDO location:    0/3000028
Latest checkpoint's TimeLineID:       3
Latest checkpoint's PrevTimeLineID:   2
Minimum recovery ending location:     0/0
Min recovery ending loc's timeline:   0
Backup start location:                0/0
End-of-backup record required:        no
wal_level setting:                    replica
wal_log_hints setting:                on
max_connections setting:              100
max_worker_processes setting:         8
max_wal_senders setting:              10
max_prepared_xacts setting:           0
max_locks_per_xact setting:           64
track_commit_timestamp setting:       off
WAL block size:                       8192
Bytes per WAL segment:                16777216
Data page checksum version:           0
"""


class TrioClock:
    """Both clocks are trio's."""

    def now(self) -> Instant:
        ns = round(trio.current_time() * 1e9)
        return Instant(ns, ns)

    def wall_s(self) -> float:
        return trio.current_time() + 1_000_000.0


def run(main: Callable[[], Awaitable[None]], *, threads: bool = False) -> None:
    """In virtual time. `threads`: time stands still while a thread works, as long as it needs less than 20 ms."""
    trio.run(main, clock=MockClock(autojump_threshold=0.02 if threads else 0))


class Link:
    """A `Store` that passes everything on to another; answers of `read` come `late_s` later, watches may be `mute`.

    `noticed`: so many more times has the driver found the store to be another or an older one.
    """

    def __init__(self, store: MemoryStore) -> None:
        self._store = store
        self.late_s = 0.0
        self.mute = False
        self.noticed = 0
        self.reads = 0
        self.watches = 0

    @property
    def generation(self) -> Generation:
        return self._store.generation

    @property
    def regressions(self) -> int:
        return self._store.regressions + self.noticed

    async def read(self, prefix: str, *, deadline_s: float) -> Snapshot:
        self.reads += 1
        snapshot = await self._store.read(prefix, deadline_s=deadline_s)
        await trio.sleep(self.late_s)
        return snapshot

    async def transact(self, *, compares: Sequence[Compare], puts: Sequence[Put | Delete], read: Sequence[str] = (), deadline_s: float,
                       attempt_s: float | None = None) -> Outcome:
        return await self._store.transact(compares=compares, puts=puts, read=read, deadline_s=deadline_s, attempt_s=attempt_s)

    @asynccontextmanager
    async def watch(self, prefix: str, *, after_revision: int) -> AsyncIterator[AsyncIterator[Change | None]]:
        self.watches += 1
        async with self._store.watch(prefix, after_revision=after_revision) as changes:
            yield self._perhaps_mute(changes)

    async def _perhaps_mute(self, changes: AsyncIterator[Change | None]) -> AsyncIterator[Change | None]:
        async for change in changes:
            if self.mute:
                await trio.sleep_forever()
            yield change

    async def grant(self, ttl_s: float, *, deadline_s: float) -> int:
        return await self._store.grant(ttl_s, deadline_s=deadline_s)

    async def renew(self, lease: int, *, deadline_s: float) -> float:
        return await self._store.renew(lease, deadline_s=deadline_s)

    async def revoke(self, lease: int, *, deadline_s: float) -> None:
        await self._store.revoke(lease, deadline_s=deadline_s)

    async def capacity(self, *, deadline_s: float) -> Capacity:
        return await self._store.capacity(deadline_s=deadline_s)

    async def compact(self, revision: int, *, deadline_s: float) -> None:
        await self._store.compact(revision, deadline_s=deadline_s)

    async def aclose(self) -> None:
        await self._store.aclose()


class Scene:
    """A store, and one observer of it. `ttl_s` and so on as the configuration says."""

    def __init__(self, state_dir: Path, *, world: MemoryWorld | None = None) -> None:
        self.clock = TrioClock()
        self.world = world or MemoryWorld(self.clock)
        self.client = MemoryStore(self.world)
        self.link = Link(self.client)
        self.ttl_s, self.loop_wait_s, self.retry_timeout_s, self.slots_ttl_s = 20.0, 2.0, 3.0, 1800.0
        self.wakes = 0
        self.observer = ClusterObserver(
            store=self.link, keys=KEYS, clock=self.clock, state_dir=state_dir, wake=self._wake, me="a",
            settings=lambda: (self.ttl_s, self.loop_wait_s, self.retry_timeout_s, self.slots_ttl_s))

    def _wake(self) -> None:
        self.wakes += 1

    @property
    def facts(self) -> Any:
        return self.observer.facts

    def put(self, key: str, value: Any) -> int:
        """Written by somebody else; the revision."""
        return self.world.transact([], [Put(key=KEYS.path(key), value=value if isinstance(value, bytes) else encode(value))]).revision

    def delete(self, key: str) -> None:
        self.world.transact([], [Delete(key=KEYS.path(key))])

    def renew(self, sequence: int = 1, *, holder: str = "b", **changed: Any) -> int:
        return self.put(LOCK, record(sequence, holder=holder, **changed))

    async def seen(self) -> None:
        """The observer has seen what was written just now."""
        with trio.fail_after(0.5):
            while self.facts.view is None or self.facts.view.revision != self.world.revision:
                await trio.sleep(0.001)


def record(sequence: int = 1, *, holder: str = "b", **changed: Any) -> LockRecord:
    fields: dict[str, Any] = {"node_id": f"id-{holder}", "incarnation": f"run-{holder}", "ttl_s": 20.0, **changed}
    return LockRecord(holder=holder, sequence=sequence, **fields)


async def until(holds: Callable[[], Any], within_s: float, *, every_s: float = 0.01) -> None:
    """Wait for a fact in virtual time."""
    with trio.fail_after(within_s):
        while not holds():
            await trio.sleep(every_s)


def member(name: str, **fields: Any) -> dict[str, Any]:
    return {"conn_url": f"postgres://{name}:5432/postgres", "api_url": f"http://{name}:8008/patroni", "state": "running", "role": "replica",
            "version": "4.1.4", "xlog_location": 100, "timeline": 2, **fields}
