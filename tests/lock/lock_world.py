"""A renewer on a store in memory, in virtual time, with a link between them that fails as a real one does."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any

import msgspec
import trio
from trio.testing import MockClock

from pgha.clock import Deadline, Instant
from pgha.dcs import ABSENT, Capacity, Change, Compare, Delete, Generation, Outcome, Put, Snapshot
from pgha.dcs.keys import EPOCH, LOCK, Keys, encode, parse_lock
from pgha.dcs.memory import MemoryStore, MemoryWorld
from pgha.errors import DcsRefused, DcsUnreachable, GuardError
from pgha.lock.renewer import Renewer, Timing
from pgha.model.action import AcquireLock
from pgha.model.decision import Mandate
from pgha.model.lock import Epoch, Identity, LockRecord

KEYS = Keys("service", "demo")


class TrioClock:
    """Both clocks are trio's; the wall can be set."""

    def __init__(self) -> None:
        self.wall_offset_s = 1_000_000.0

    def now(self) -> Instant:
        ns = round(trio.current_time() * 1e9)
        return Instant(ns, ns)

    def wall_s(self) -> float:
        return trio.current_time() + self.wall_offset_s


def run(main: Callable[[], Awaitable[None]]) -> None:
    trio.run(main, clock=MockClock(autojump_threshold=0))


def identity(name: str, run_of: str = "1") -> Identity:
    return Identity(name=name, node_id=f"id-{name}", incarnation=f"run-{name}-{run_of}")


class FaultyStore:
    """A `Store` that passes everything on to another, and fails where it is told to.

    `lose_requests`, `lose_answers`: so many of the next transactions do not arrive, or do without being answered.
    `refuse`: every transaction that writes is refused with it. `delay_s`: before a transaction arrives.
    """

    def __init__(self, store: MemoryStore) -> None:
        self._store = store
        self.lose_requests = 0
        self.lose_answers = 0
        self.refuse: DcsRefused | None = None
        self.delay_s = 0.0
        self.before_write: Callable[[], Awaitable[None]] | None = None
        self.writes: list[tuple[float, LockRecord]] = []     # the records that were sent, and when

    @property
    def generation(self) -> Generation:
        return self._store.generation

    async def transact(self, *, compares: Sequence[Compare], puts: Sequence[Put | Delete], read: Sequence[str] = (), deadline_s: float,
                       attempt_s: float | None = None) -> Outcome:
        for put in puts:
            if isinstance(put, Put) and put.key == KEYS.path(LOCK):
                self.writes.append((trio.current_time(), parse_lock(put.value)))
        if puts and self.before_write is not None:
            await self.before_write()
        if self.delay_s:
            await trio.sleep(self.delay_s)
        if self.lose_requests:
            self.lose_requests -= 1
            await trio.sleep(deadline_s)
            raise DcsUnreachable("the request did not arrive")
        if puts and self.refuse is not None:
            raise self.refuse
        outcome = await self._store.transact(compares=compares, puts=puts, read=read, deadline_s=deadline_s, attempt_s=attempt_s)
        if self.lose_answers:
            self.lose_answers -= 1
            await trio.sleep(deadline_s)
            raise DcsUnreachable("the answer was lost")
        return outcome

    def link(self, *, up: bool) -> None:
        self._store.link(requests_pass=up, answers_pass=up)

    async def read(self, prefix: str, *, deadline_s: float) -> Snapshot:
        return await self._store.read(prefix, deadline_s=deadline_s)

    def watch(self, prefix: str, *, after_revision: int) -> AbstractAsyncContextManager[AsyncIterator[Change | None]]:
        return self._store.watch(prefix, after_revision=after_revision)

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


class Guard:
    """A guard's confirmations (renewer.Narrower): notes what it was asked, and what had been sent by then."""

    def __init__(self, store: FaultyStore) -> None:
        self._store = store
        self.asked: list[tuple[Deadline, float, int]] = []
        self.sent_before: list[int] = []
        self.deaf = False
        self.takes_s = 0.0

    async def narrow(self, valid_until: Deadline, ttl_s: float, *, sequence: int) -> None:
        await trio.sleep(self.takes_s)
        self.asked.append((valid_until, ttl_s, sequence))
        self.sent_before.append(len(self._store.writes))
        if self.deaf:
            raise GuardError("the guard does not answer")


class Node:
    """One agent's renewer, with its own link to the common store."""

    def __init__(self, world: MemoryWorld, name: str = "a", *, run_of: str = "1", ttl_s: float = 30.0, loop_wait_s: float = 10.0) -> None:
        self.world = world
        self.clock = TrioClock()
        self.store = FaultyStore(MemoryStore(world))
        self.timing = Timing(ttl_s=ttl_s, loop_wait_s=loop_wait_s)
        self.history: list[tuple[float, Any]] = []      # every licence that was announced
        self.renewer = Renewer(store=self.store, keys=KEYS, me=identity(name, run_of), clock=self.clock, timing=lambda: self.timing, changed=self._changed)
        self.guard = Guard(self.store)
        self.renewer.narrower = self.guard
        self.number = 0

    def _changed(self) -> None:
        self.history.append((trio.current_time(), self.renewer.licence))

    @property
    def licence(self) -> Any:
        return self.renewer.licence

    def mandate(self, for_s: float = 1e6) -> None:
        self.number += 1
        self.renewer.give_mandate(Mandate(kind="running", until=self.clock.now().plus_s(for_s)), number=self.number)

    def take(self, *, readopt: bool = False) -> AcquireLock:
        """What a decision would be about the record that stands."""
        lock, epoch = self.entry(LOCK), self.entry(EPOCH)
        return AcquireLock(lock_revision=lock.revision if lock else ABSENT, lock_value=lock.value if lock else b"", epoch_revision=epoch.revision if epoch else ABSENT,
                           epoch_number=epoch_of(self.world).number, readopt=readopt, claim_timeline=2, lsn=100, timeline=1)

    def entry(self, key: str) -> Any:
        return self.world.read(KEYS.path(key)).entries.get(KEYS.path(key))

    @property
    def record(self) -> LockRecord | None:
        entry = self.entry(LOCK)
        return parse_lock(entry.value) if entry else None


def epoch_of(world: MemoryWorld) -> Epoch:
    entry = world.read(KEYS.path(EPOCH)).entries.get(KEYS.path(EPOCH))
    return msgspec.json.decode(entry.value, type=Epoch) if entry else Epoch(number=0, holder="", incarnation="")


def write(world: MemoryWorld, key: str, value: Any) -> None:
    world.transact([], [Put(key=KEYS.path(key), value=value if isinstance(value, bytes) else encode(value))])


def delete(world: MemoryWorld, key: str) -> None:
    world.transact([], [Delete(key=KEYS.path(key))])


def others_record(name: str = "z") -> LockRecord:
    return LockRecord(holder=name, node_id=f"id-{name}", incarnation=f"run-{name}", sequence=1, ttl_s=30.0)
