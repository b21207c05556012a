"""The store as a service: a MemoryWorld behind several members, each of which can lag, hang, answer late or not at all.

Requests and answers travel by the network. A member answers only while it and a majority of its fellows reach each
other; during an election nobody does. What a member has accepted takes effect even if nobody hears of it. `SimStore` is
one client's driver (a pgha.dcs.Store); written for trio, and loaded against `kernel` for level (a).
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import trio

from pgha.dcs import Capacity, Change, Compare, Delete, Generation, Outcome, Put, Snapshot
from pgha.dcs.memory import MemoryWorld, SavedWorld
from pgha.errors import Compacted, DcsRefused, DcsUnreachable, LeaseLost
from tests.simulation.clocks import TrueClock
from tests.simulation.network import Network
from tests.simulation.scheduler import Event, Scheduler
from tests.simulation.trace import Trace

MEMBERS = ("s1", "s2", "s3")
#: History beyond so many revisions is forgotten, as an etcd that compacts itself does.
KEEP_REVISIONS = 2000
#: One attempt at one member, where the caller does not say.
ATTEMPT_S = 1.0


class _Service(MemoryWorld):
    """With a quota it is out of space at once: counting bytes would cost more than all the rest."""

    def used_bytes(self) -> int:
        return self.quota_bytes + 1 if self.quota_bytes else 0


class Watch:
    """A stream of changes to one client, from one member."""

    def __init__(self, client: str, member: str, prefix: str, after: int, deliver: Callable[[Any], None]) -> None:
        self.client, self.member, self.prefix, self.after, self.deliver = client, member, prefix, after, deliver
        self.open = True
        self.silent = False
        self.replaced = False       # the store behind it is another one: nothing comes any more
        self.last_ns = 0


class StoreWorld:
    """The cluster of the store, and its faults."""

    def __init__(self, scheduler: Scheduler, network: Network, trace: Trace) -> None:
        self._scheduler = scheduler
        self._network = network
        self._trace = trace
        self._chance = scheduler.stream("store")
        self.world = _Service(TrueClock(scheduler), cluster_id="c1")
        self.down: dict[str, bool] = dict.fromkeys(MEMBERS, False)
        self.hung: dict[str, bool] = dict.fromkeys(MEMBERS, False)
        self.slow_s = 0.0                 # how much longer answers take
        self.lose_answers = 0.0           # share of requests that take effect and are never answered
        self.lose_requests = 0.0
        self.leader = "s1"
        self._election_until_ns = 0
        self._watches: dict[int, Watch] = {}
        self._watch_number = 0
        self._pushed = self.world.revision
        self._expiry: Event | None = None
        self._generation_number = 1
        self.backups: list[SavedWorld] = []
        self.requests = 0                 # all of them, for the traffic budget
        self.requests_of: dict[str, int] = {}
        network.on_change.append(self._links_changed)

    # --- requests --------------------------------------------------------------------------------------------------------

    def submit(self, client: str, member: str, request: Callable[[MemoryWorld], Any], answered: Callable[[Any, Exception | None], None]) -> None:
        """`answered(result, error)` if an answer ever arrives. A refused connection is an answer, too: DcsUnreachable."""
        self.requests += 1
        self.requests_of[client] = self.requests_of.get(client, 0) + 1
        if self.down[member]:
            if self._network.both_ways(client, member):
                self._scheduler.after(0.001, answered, None, DcsUnreachable(f"{member}: connection refused"))
            return
        if self.lose_requests and self._chance.random() < self.lose_requests:
            return
        self._network.send(client, member, self._arrived, client, member, request, answered)

    def _arrived(self, client: str, member: str, request: Callable[[MemoryWorld], Any], answered: Callable[[Any, Exception | None], None]) -> None:
        if self.down[member] or self.hung[member]:
            return
        if self._scheduler.now_ns < self._election_until_ns:
            # It waits for the new leader, and takes effect then, whoever still waits for it.
            self._scheduler.at(self._election_until_ns + 1, self._arrived, client, member, request, answered)
            return
        if not self._has_quorum(member):
            return
        result: Any = None
        error: Exception | None = None
        try:
            result = request(self.world)
        except (DcsRefused, LeaseLost, Compacted) as refused:
            error = refused
        self._after_change()
        if self.lose_answers and self._chance.random() < self.lose_answers:
            return
        if self.slow_s:
            self._scheduler.after(self.slow_s * self._chance.random(), self._answer, member, client, answered, result, error)
        else:
            self._answer(member, client, answered, result, error)

    def _answer(self, member: str, client: str, answered: Callable[[Any, Exception | None], None], result: Any, error: Exception | None) -> None:
        self._network.send(member, client, answered, result, error)

    def _has_quorum(self, member: str) -> bool:
        alive = [m for m in MEMBERS if m == member or (not self.down[m] and not self.hung[m] and self._network.both_ways(member, m))]
        return len(alive) * 2 > len(MEMBERS)

    # --- watches ---------------------------------------------------------------------------------------------------------

    def open_watch(self, watch: Watch) -> int:
        self._watch_number += 1
        self._watches[self._watch_number] = watch
        return self._watch_number

    def close_watch(self, number: int) -> None:
        watch = self._watches.pop(number, None)
        if watch is not None:
            watch.open = False

    def _after_change(self) -> None:
        world = self.world
        if world.revision != self._pushed:
            self._pushed = world.revision
            told: dict[tuple[str, int], list[Change]] = {}
            serving = {member: self._serves_watches(member) for member in MEMBERS}
            for watch in list(self._watches.values()):
                if serving[watch.member]:
                    self._push_from(watch, told)
            if world.revision > KEEP_REVISIONS and world.revision % 500 == 0:
                world.compact(world.revision - KEEP_REVISIONS // 2)
        self._schedule_expiry()

    def _serves_watches(self, member: str) -> bool:
        return not self.down[member] and not self.hung[member] and self._has_quorum(member)

    def _push(self, watch: Watch) -> None:
        if self._serves_watches(watch.member):
            self._push_from(watch, {})

    def _push_from(self, watch: Watch, told: dict[tuple[str, int], list[Change]]) -> None:
        """`told`: what was said at this moment to others who want the same."""
        if watch.silent or watch.replaced:
            return
        changes = told.get((watch.prefix, watch.after))
        if changes is None:
            try:
                changes = self.world.changes(watch.prefix, watch.after)
            except Compacted as compacted:
                self._send_watch(watch, compacted)
                return
            told[watch.prefix, watch.after] = changes
        for change in changes:
            if not self._send_watch(watch, change):
                return
            watch.after = change.revision

    def _send_watch(self, watch: Watch, what: Any) -> bool:
        """In order, as a stream is; what does not arrive now is sent again when the links change."""
        delay = self._network.delay_ns(watch.member, watch.client)
        if delay is None or not self._network.passes(watch.client, watch.member):
            return False
        watch.last_ns = max(watch.last_ns, self._scheduler.now_ns + delay)
        self._scheduler.at(watch.last_ns, self._deliver, watch, what)
        return True

    def _deliver(self, watch: Watch, what: Any) -> None:
        if watch.open:
            watch.deliver(what)

    def _links_changed(self) -> None:
        for watch in list(self._watches.values()):
            self._push(watch)

    def _schedule_expiry(self) -> None:
        expiry_s = self.world.next_expiry_s()
        if expiry_s is None:
            return
        at_ns = self._scheduler.now_ns + round(expiry_s * 1e9) + 1
        if self._expiry is None or self._expiry.callback is None or self._expiry.at_ns > at_ns:
            if self._expiry is not None:
                self._expiry.cancel()
            self._expiry = self._scheduler.at(at_ns, self._expire)

    def _expire(self) -> None:
        self._expiry = None
        if self._scheduler.now_ns < self._election_until_ns or all(self.down.values()):
            # No leader, no expiry: an election prolongs leases.
            self._expiry = self._scheduler.after(0.5, self._expire)
            return
        self.world.next_expiry_s()
        self.world.read("\x00")            # whoever asks lets what is over end
        self._after_change()

    # --- faults ----------------------------------------------------------------------------------------------------------

    def elect(self, seconds: float) -> None:
        """A new leader: nothing is answered for a while, and every lease begins anew."""
        others = [m for m in MEMBERS if m != self.leader and not self.down[m]] or [self.leader]
        self.leader = others[int(self._chance.random() * len(others))]
        self._election_until_ns = max(self._election_until_ns, self._scheduler.now_ns + round(seconds * 1e9))
        self._trace("store", "election", leader=self.leader, for_s=seconds)
        for lease in list(self.world._leases):  # noqa: SLF001  (what an etcd leader change does)
            try:
                self.world.renew(lease)
            except LeaseLost:       # it was over already
                continue

    def set_down(self, member: str, down: bool) -> None:
        self.down[member] = down
        if down:
            for watch in [w for w in self._watches.values() if w.member == member]:
                self._break(watch)
            if member == self.leader and not all(self.down.values()):
                self.elect(1.0 + 2.0 * self._chance.random())
        else:
            self._links_changed()

    def set_hung(self, member: str, hung: bool) -> None:
        self.hung[member] = hung
        if hung and member == self.leader:
            self.elect(1.0 + 2.0 * self._chance.random())
        if not hung:
            self._links_changed()

    def _break(self, watch: Watch) -> None:
        if watch.open and self._network.both_ways(watch.member, watch.client):
            self._scheduler.after(0.001, self._deliver, watch, DcsUnreachable("watch: the stream ended"))

    def silence_watches(self, client: str, *, silent: bool) -> None:
        for watch in list(self._watches.values()):
            if watch.client == client:
                watch.silent = silent
                if not silent:
                    self._push(watch)

    def lose_lease(self, index: float) -> None:
        """A lease is deleted although its renewals were acknowledged (etcd #15247)."""
        leases = list(self.world._leases)  # noqa: SLF001
        if leases:
            lease = leases[int(index * len(leases))]
            self._trace("store", "lease lost", lease=lease)
            self.world.revoke(lease)
            self._after_change()

    def delete(self, key: str) -> None:
        """Somebody deletes a key by hand."""
        self.world.transact([], [Delete(key=key)])
        self._after_change()

    def put(self, key: str, value: bytes) -> int:
        """Somebody writes a key by hand; its revision."""
        try:
            outcome = self.world.transact([], [Put(key=key, value=value)])
        except DcsRefused:          # out of space: who asked is told
            return 0
        self._after_change()
        return outcome.revision

    def backup(self) -> None:
        self.backups.append(self.world.save())

    def restore(self, saved: SavedWorld | None, *, new_id: bool) -> None:
        if new_id:
            self._generation_number += 1
        self.world.restore(saved, cluster_id=f"c{self._generation_number}")
        self._pushed = self.world.revision
        self._trace("store", "restored" if saved is not None else "rebuilt empty", revision=self.world.revision, cluster_id=self.world.cluster_id)
        for watch in list(self._watches.values()):
            watch.replaced = True
            self._break(watch)
        self._schedule_expiry()

    def heal(self) -> None:
        """Everything answers again."""
        for member in MEMBERS:
            self.down[member] = self.hung[member] = False
        self.slow_s = self.lose_answers = self.lose_requests = 0.0
        self.world.quota_bytes = 0
        for watch in self._watches.values():
            watch.silent = False
        self._links_changed()


class _Pending:
    """One attempt's answer."""

    def __init__(self) -> None:
        self.event = trio.Event()
        self.result: Any = None
        self.error: Exception | None = None

    def __call__(self, result: Any, error: Exception | None) -> None:
        self.result, self.error = result, error
        self.event.set()


class SimStore:
    """A driver. `client`: the node that it runs on; `first`: the index of the member to begin with."""

    def __init__(self, service: StoreWorld, client: str, *, first: int = 0) -> None:
        self._service = service
        self._client = client
        self._at = first % len(MEMBERS)
        self._known = Generation()
        self.regressions = 0

    @property
    def generation(self) -> Generation:
        return self._known

    async def _call(self, request: Callable[[MemoryWorld], Any], deadline_s: float, attempt_s: float | None = None) -> Any:
        deadline = trio.current_time() + deadline_s
        why = ""
        while (left_s := deadline - trio.current_time()) > 0.0005:
            member = MEMBERS[self._at]
            pending = _Pending()
            self._service.submit(self._client, member, request, pending)
            answered = False
            with trio.move_on_after(min(left_s, attempt_s or ATTEMPT_S)):
                await pending.event.wait()
                answered = True
            if answered and not isinstance(pending.error, DcsUnreachable):
                if pending.error is not None:
                    raise pending.error
                return pending.result
            why = str(pending.error) if answered else f"{member}: no answer"
            self._at = (self._at + 1) % len(MEMBERS)
            if answered:
                await trio.sleep(min(0.05, max(0.0, deadline - trio.current_time())))
        raise DcsUnreachable(f"no answer within {deadline_s:g} s: {why}")

    def _learn(self, cluster_id: str, revision: int, before: Generation) -> None:
        """`before`: what was known when the request began; later answers may have overtaken this one."""
        if before.cluster_id and (cluster_id != before.cluster_id or revision < before.revision):
            self.regressions += 1
        elif cluster_id == self._known.cluster_id and revision < self._known.revision:
            return
        self._known = Generation(cluster_id=cluster_id, revision=revision)

    async def read(self, prefix: str, *, deadline_s: float) -> Snapshot:
        before = self._known
        snapshot: Snapshot = await self._call(lambda world: world.read(prefix), deadline_s)
        self._learn(snapshot.generation.cluster_id, snapshot.revision, before)
        return snapshot

    async def transact(self, *, compares: Sequence[Compare], puts: Sequence[Put | Delete], read: Sequence[str] = (), deadline_s: float,
                       attempt_s: float | None = None) -> Outcome:
        before = self._known
        outcome, cluster_id = await self._call(lambda world: (world.transact(compares, puts, read), world.cluster_id), deadline_s, attempt_s)
        self._learn(cluster_id, outcome.revision, before)
        found: Outcome = outcome
        return found

    @asynccontextmanager
    async def watch(self, prefix: str, *, after_revision: int) -> AsyncIterator[AsyncIterator[Change | None]]:
        await self._call(lambda world: world.changes(prefix, after_revision), 1.0)
        stream = _Stream()
        watch = Watch(self._client, MEMBERS[self._at], prefix, after_revision, stream.arrived)
        number = self._service.open_watch(watch)
        self._service._push(watch)  # noqa: SLF001  (what happened since)
        try:
            yield stream
        finally:
            self._service.close_watch(number)

    async def grant(self, ttl_s: float, *, deadline_s: float) -> int:
        return int(await self._call(lambda world: world.grant(float(max(1, -int(-ttl_s // 1)))), deadline_s))

    async def renew(self, lease: int, *, deadline_s: float) -> float:
        return float(await self._call(lambda world: world.renew(lease), deadline_s))

    async def revoke(self, lease: int, *, deadline_s: float) -> None:
        await self._call(lambda world: world.revoke(lease), deadline_s)

    async def capacity(self, *, deadline_s: float) -> Capacity:
        found: Capacity = await self._call(lambda world: world.capacity(), deadline_s)
        return found

    async def compact(self, revision: int, *, deadline_s: float) -> None:
        await self._call(lambda world: world.compact(revision), deadline_s)

    async def aclose(self) -> None:
        await trio.lowlevel.checkpoint()


class _Stream:
    """The client's end of a watch."""

    def __init__(self) -> None:
        self._arrived: list[Any] = []
        self._news = trio.Event()

    def arrived(self, what: Any) -> None:
        self._arrived.append(what)
        self._news.set()

    def __aiter__(self) -> _Stream:
        return self

    async def __anext__(self) -> Change | None:
        while not self._arrived:
            self._news = trio.Event()
            await self._news.wait()
        what = self._arrived.pop(0)
        if isinstance(what, Exception):
            raise what
        change: Change = what
        return change
