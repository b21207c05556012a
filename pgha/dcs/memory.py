"""A store inside this process, with the semantics of a real one: for simulation and tests.

`MemoryWorld` is the store itself: plain calls that take effect at once, no I/O, no trio; what it does follows from its
calls and its clock alone. `MemoryStore` is one client's handle to it (a `Store`), whose link can be cut in either
direction. Leases end by the clock given to the world; whoever asks first after that sees it, and a waiting watch wakes
up for it by trio's clock, so under a MockClock the world's clock must follow trio's.

Everything is kept in dicts and lists in the order of events: the same calls give the same answers in every run.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import trio
from msgspec import Struct

from pgha.clock import Clock, Instant, SystemClock, remaining_s
from pgha.dcs import Capacity, Change, Compare, Delete, Entry, Generation, Outcome, Put, Snapshot
from pgha.errors import Compacted, DcsRefused, DcsUnreachable, LeaseLost


class _Lease(Struct, kw_only=True):
    ttl_s: float
    until: Instant
    keys: dict[str, None] = {}


class SavedWorld(Struct, frozen=True, kw_only=True):
    """What a backup of a store holds: keys and the length of each lease, no history."""

    revision: int
    entries: dict[str, Entry]
    lease_ttl_s: dict[int, float]


class MemoryWorld:
    """The store. Its calls raise DcsRefused, LeaseLost, Compacted as a real one would, never DcsUnreachable."""

    def __init__(self, clock: Clock | None = None, *, cluster_id: str = "memory", quota_bytes: int = 0) -> None:
        """`quota_bytes`: when keys and history hold more than that, every write is refused until `compact` (0: never)."""
        self._clock = clock or SystemClock()
        self.cluster_id = cluster_id
        self.revision = 1  # as a fresh etcd
        self.quota_bytes = quota_bytes
        self._entries: dict[str, Entry] = {}
        self._leases: dict[int, _Lease] = {}
        self._last_lease = 0
        self._history: list[Change] = []
        self._compacted = 0
        self._waiting: dict[int, trio.Event] = {}
        self._watches = 0
        self._replaced_at_watch = 0  # watches up to this number belonged to a former store

    # reading and writing

    def read(self, prefix: str) -> Snapshot:
        self._expire()
        found = {key: entry for key, entry in sorted(self._entries.items()) if key.startswith(prefix)}
        return Snapshot(revision=self.revision, entries=found, generation=self.generation())

    def transact(self, compares: Sequence[Compare], puts: Sequence[Put | Delete], read: Sequence[str] = ()) -> Outcome:
        assert len({put.key for put in puts}) == len(puts), [put.key for put in puts]
        self._expire()
        succeeded = all(map(self._holds, compares))
        if succeeded:
            for put in puts:
                if isinstance(put, Put) and put.lease and put.lease not in self._leases:
                    raise LeaseLost(f"lease {put.lease:x} is not known to the store")
            if self.quota_bytes and any(isinstance(put, Put) for put in puts) and self.used_bytes() > self.quota_bytes:
                raise DcsRefused("database space exceeded", code=8, no_space=True)
            self._apply(puts)
        found = {key: self._entries[key] for key in read if key in self._entries}
        return Outcome(succeeded=succeeded, revision=self.revision, found=found)

    def changes(self, prefix: str, after_revision: int) -> list[Change]:
        """What happened under `prefix` after that revision, so far; raises Compacted."""
        self._expire()
        if after_revision + 1 < self._compacted:
            raise Compacted(self._compacted)
        later = self._history[bisect_right(self._history, after_revision, key=lambda change: change.revision):]
        cut = [(change.revision, {k: e for k, e in change.entries.items() if k.startswith(prefix)}) for change in later]
        return [Change(revision=revision, entries=entries) for revision, entries in cut if entries]

    def _holds(self, compare: Compare) -> bool:
        entry = self._entries.get(compare.key)
        if compare.revision is not None and compare.revision != (entry.revision if entry else 0):
            return False
        return compare.value is None or (entry is not None and entry.value == compare.value)

    def _apply(self, puts: Sequence[Put | Delete]) -> None:
        """One revision, unless nothing changes (a delete of what is absent)."""
        revision = self.revision + 1
        changed: dict[str, Entry | None] = {}
        for put in puts:
            former = self._entries.pop(put.key, None)
            if former is not None and former.lease in self._leases:
                self._leases[former.lease].keys.pop(put.key, None)
            if isinstance(put, Put):
                changed[put.key] = entry = Entry(key=put.key, value=put.value, revision=revision, lease=put.lease)
                self._entries[put.key] = entry
                if put.lease:
                    self._leases[put.lease].keys[put.key] = None
            elif former is not None:
                changed[put.key] = None
        if changed:
            self.revision = revision
            self._history.append(Change(revision=revision, entries=changed))
            self.wake()

    # leases

    def grant(self, ttl_s: float) -> int:
        self._expire()
        self._last_lease += 1
        self._leases[self._last_lease] = _Lease(ttl_s=ttl_s, until=self._clock.now().plus_s(ttl_s))
        return self._last_lease

    def renew(self, lease: int) -> float:
        self._expire()
        if lease not in self._leases:
            raise LeaseLost(f"lease {lease:x} is not known to the store")
        held = self._leases[lease]
        held.until = self._clock.now().plus_s(held.ttl_s)
        return held.ttl_s

    def revoke(self, lease: int) -> None:
        self._expire()
        if lease in self._leases:
            self._end(lease)

    def next_expiry_s(self) -> float | None:
        """Seconds until the first lease ends; None if there is no lease."""
        now = self._clock.now()
        return min((max(0.0, remaining_s(lease.until, now)) for lease in self._leases.values()), default=None)

    def _expire(self) -> None:
        if self._leases:
            now = self._clock.now()
            over = [(held.until, lease) for lease, held in self._leases.items() if held.until[0] <= now[0] or held.until[1] <= now[1]]
            for _, lease in sorted(over):
                self._end(lease)

    def _end(self, lease: int) -> None:
        keys = sorted(self._leases[lease].keys)
        self._apply([Delete(key=key) for key in keys])
        del self._leases[lease]

    # capacity, faults of the store as a whole

    def used_bytes(self) -> int:
        """Keys, values and history, roughly as a real store counts them."""
        live = sum(len(entry.key) + len(entry.value) for entry in self._entries.values())
        past = sum(len(k) + (len(e.value) if e else 0) for change in self._history for k, e in change.entries.items())
        return live + past

    def capacity(self) -> Capacity:
        used = self.used_bytes()
        full = bool(self.quota_bytes) and used > self.quota_bytes
        return Capacity(used_bytes=used, quota_bytes=self.quota_bytes, alarms=("NOSPACE",) if full else (),
                        compact_revision=self._compacted)

    def compact(self, revision: int) -> None:
        if revision > self.revision:
            raise DcsRefused(f"revision {revision} is still to come", code=11)
        if revision > self._compacted:
            self._compacted = revision
            del self._history[:bisect_right(self._history, revision - 1, key=lambda change: change.revision)]

    def generation(self) -> Generation:
        return Generation(cluster_id=self.cluster_id, revision=self.revision)

    def save(self) -> SavedWorld:
        return SavedWorld(revision=self.revision, entries=dict(self._entries),
                          lease_ttl_s={lease: held.ttl_s for lease, held in self._leases.items()})

    def restore(self, saved: SavedWorld | None = None, *, cluster_id: str | None = None) -> None:
        """The operator puts a backup in place (None: an empty store). History is gone, leases begin anew with their
        full time, open watches end. `cluster_id` None: the same as before, as it can happen with etcd."""
        saved = saved or SavedWorld(revision=1, entries={}, lease_ttl_s={})
        now = self._clock.now()
        self.cluster_id = cluster_id or self.cluster_id
        self.revision = saved.revision
        self._entries = dict(saved.entries)
        self._leases = {lease: _Lease(ttl_s=ttl_s, until=now.plus_s(ttl_s)) for lease, ttl_s in saved.lease_ttl_s.items()}
        for entry in self._entries.values():
            if entry.lease:
                self._leases[entry.lease].keys[entry.key] = None
        self._history = []
        self._compacted = self.revision + 1 if self.revision > 1 else 0
        self._replaced_at_watch = self._watches
        self.wake()

    # waiting for changes

    def open_watch(self) -> int:
        """A number for `event` and `ended`."""
        self._watches += 1
        return self._watches

    def ended(self, watch: int) -> bool:
        """Was the store replaced since this watch was opened?"""
        return watch <= self._replaced_at_watch

    def event(self, watch: int) -> trio.Event:
        """Set at the next change of anything."""
        return self._waiting.setdefault(watch, trio.Event())

    def close_watch(self, watch: int) -> None:
        self._waiting.pop(watch, None)

    def wake(self) -> None:
        """Let every watch look again."""
        waiting, self._waiting = self._waiting, {}
        for event in waiting.values():
            event.set()


class MemoryStore:
    """One client's link to a world. While `requests_pass` is false nothing arrives there; while `answers_pass` is false
    it is done, and nobody hears of it: both use up the caller's deadline. Set them through `link`."""

    def __init__(self, world: MemoryWorld) -> None:
        self._world = world
        self._generation = Generation()
        self.regressions = 0
        self.requests_pass = True
        self.answers_pass = True

    def link(self, *, requests_pass: bool = True, answers_pass: bool = True) -> None:
        """Cut or mend. An open watch is silent while either direction is cut, and goes on afterwards."""
        self.requests_pass, self.answers_pass = requests_pass, answers_pass
        self._world.wake()

    @property
    def generation(self) -> Generation:
        return self._generation

    async def read(self, prefix: str, *, deadline_s: float) -> Snapshot:
        await self._request(deadline_s)
        snapshot = self._world.read(prefix)
        await self._answer(deadline_s)
        self._learn(snapshot.generation)
        return snapshot

    async def transact(
        self,
        *,
        compares: Sequence[Compare],
        puts: Sequence[Put | Delete],
        read: Sequence[str] = (),
        deadline_s: float,
        attempt_s: float | None = None,  # noqa: ARG002  (there is but one endpoint)
    ) -> Outcome:
        await self._request(deadline_s)
        outcome = self._world.transact(compares, puts, read)
        cluster_id = self._world.cluster_id
        await self._answer(deadline_s)
        self._learn(Generation(cluster_id=cluster_id, revision=outcome.revision))
        return outcome

    @asynccontextmanager
    async def watch(self, prefix: str, *, after_revision: int) -> AsyncIterator[AsyncIterator[Change | None]]:
        await self._request(1.0)
        watch = _MemoryWatch(self, self._world, prefix, after_revision)
        try:
            yield watch
        finally:
            watch.close()

    async def grant(self, ttl_s: float, *, deadline_s: float) -> int:
        await self._request(deadline_s)
        lease = self._world.grant(ttl_s)
        await self._answer(deadline_s)
        return lease

    async def renew(self, lease: int, *, deadline_s: float) -> float:
        await self._request(deadline_s)
        ttl_s = self._world.renew(lease)
        await self._answer(deadline_s)
        return ttl_s

    async def revoke(self, lease: int, *, deadline_s: float) -> None:
        await self._request(deadline_s)
        self._world.revoke(lease)
        await self._answer(deadline_s)

    async def capacity(self, *, deadline_s: float) -> Capacity:
        await self._request(deadline_s)
        await self._answer(deadline_s)
        return self._world.capacity()

    async def compact(self, revision: int, *, deadline_s: float) -> None:
        await self._request(deadline_s)
        self._world.compact(revision)
        await self._answer(deadline_s)

    async def aclose(self) -> None:
        await trio.lowlevel.checkpoint()

    async def _request(self, deadline_s: float) -> None:
        await trio.lowlevel.checkpoint()
        if not self.requests_pass or deadline_s <= 0:
            await self._unreachable(deadline_s)

    async def _answer(self, deadline_s: float) -> None:
        if not self.answers_pass:
            await self._unreachable(deadline_s)

    async def _unreachable(self, deadline_s: float) -> None:
        await trio.sleep(max(0.0, deadline_s))
        raise DcsUnreachable(f"no answer within {deadline_s:g} s: the link is cut")

    def _learn(self, said: Generation) -> None:
        """Answers come in the order of the requests here, so every step back is the store's."""
        known = self._generation
        if known.cluster_id and (said.cluster_id != known.cluster_id or said.revision < known.revision):
            self.regressions += 1
        self._generation = said


class _MemoryWatch:
    def __init__(self, store: MemoryStore, world: MemoryWorld, prefix: str, after_revision: int) -> None:
        self._store = store
        self._world = world
        self._number = world.open_watch()
        self._prefix = prefix
        self._after = after_revision

    def __aiter__(self) -> _MemoryWatch:
        return self

    async def __anext__(self) -> Change | None:
        await trio.lowlevel.checkpoint()
        while True:
            if self._store.requests_pass and self._store.answers_pass:
                if self._world.ended(self._number):
                    raise DcsUnreachable("watch: the store was replaced")
                if changes := self._world.changes(self._prefix, self._after):
                    self._after = changes[0].revision
                    return changes[0]
                expiry_s = self._world.next_expiry_s()
            else:
                expiry_s = None  # the world goes on without us
            # a little more than that: the two clocks may round differently
            with trio.move_on_after(math.inf if expiry_s is None else expiry_s + 0.001):
                await self._world.event(self._number).wait()

    def close(self) -> None:
        self._world.close_watch(self._number)
