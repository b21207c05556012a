"""What does the store say? A watch keeps the view fresh, linearizable reads make it certain.

Rules of this file:
* a record's age counts from when this very revision was first seen here, on the RAW clock (safety model 4);
* absence counts only by linearizable reads, from the answer to the first of an unbroken row: while it was on its way
  the record may still have been renewed;
* a silent stream is not believed: it is compared with a read, and opened again;
* what must outlive this process (largest ttl, generation, members) is written at most every ten seconds, in a thread.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import trio
from msgspec.structs import replace

from pgha.clock import Clock, Instant, candidate_age_s, remaining_s
from pgha.config.state import RememberedMember, StoreGeneration, load_remembered, save_remembered
from pgha.dcs import Capacity, Change, Entry, Generation, Snapshot, Store
from pgha.dcs.keys import UNREADABLE_LOCK, Keys, parse
from pgha.dcs.outage import Outage
from pgha.errors import Compacted, DcsError
from pgha.log import Log
from pgha.model.cluster import (
    ClusterView,
    LockSeen,
    Member,
    Outsider,
    PausedHolder,
    Sync,
    slot_name,
)
from pgha.model.lock import wait_s
from pgha.model.observation import DcsFacts, StoreCapacity
from pgha.model.overview import synchronous
from pgha.model.wal import Position
from pgha.postgres.threads import InThread, in_thread

log = Log("pgha.dcs")

SAVE_EVERY_S = 10.0
#: An absent or changed store is untrusted for at least so long (safety model 4).
UNTRUSTED_S = 30.0
READ_S = 1.5
#: Between reads of a store that does not answer, and the longest between those that stand in for a watch that fails.
READ_AGAIN_S = 0.3
READ_INSTEAD_EVERY_S = 2.0
#: How often a leader asks how full the store is (while there is an alarm; at most, when a write was refused), and which
#: steps are worth a line in the log.
CAPACITY_EVERY_S = 300.0
CAPACITY_ALARMED_S = 20.0
CAPACITY_AT_MOST_S = 5.0
CAPACITY_STEPS = (0.95, 0.9, 0.75, 0.5)
#: etcd's own default quota (--quota-backend-bytes), where it does not tell.
DEFAULT_QUOTA_BYTES = 2 << 30
DAY_S = 86400.0


class ClusterObserver:
    """Owner of the view. `settings()` → (ttl_s, loop_wait_s, retry_timeout_s, member_slots_ttl_s)."""

    def __init__(self, *, store: Store, keys: Keys, clock: Clock, state_dir: Path, settings: Callable[[], tuple[float, float, float, float]],
                 wake: Callable[[], None], me: str, in_thread: InThread = in_thread, outage: Outage | None = None) -> None:
        self._store = store
        self._keys = keys
        self._clock = clock
        self._state_dir = state_dir
        self._settings = settings
        self._wake = wake
        self._me = me
        self._in_thread = in_thread
        self._outage = outage or Outage(clock)
        self._entries: dict[str, Entry] = {}
        self._revision = 0
        self._generation = Generation()
        self._regressions = store.regressions
        self._reading = trio.Lock()
        self._remembered, problem = load_remembered(state_dir)
        self._saved = self._remembered
        self._known = self._remembered.generation
        self._saved_at: Instant | None = None
        self._saving = False
        self._watch_failures = 0      # in a row, without a change in between
        self._watch_silences = 0
        self._revisions: list[tuple[Instant, int]] = []      # hourly, for what is a day old
        self._warned = 0.0
        self._went_back = False                              # the next view is the first of a store that went back
        self._untrusted_lock = b""                           # what a store that was restored shows as the record
        self._out_of_space = trio.Event()
        if problem:
            log.warning("remembered facts could not be read", why=problem)
        self.facts = DcsFacts(
            unreachable_since=clock.now(), outsider=self._remembered.outsider, remembered_ttl_s=self._remembered.ttl_s, remembered_pause=self._remembered.paused,
            remembered_identifier=self._remembered.system_identifier, remembered_members=self._known_members(), remembered_slots=self._known_slots(),
            last_positions={n: Position(timeline=m.timeline, lsn=m.lsn) for n, m in self._remembered.members.items()},
        )

    # --- reading -------------------------------------------------------------------------------------------------------

    async def read(self) -> None:
        """A linearizable read; its result is in `facts` when it returns. DcsError if there was none."""
        async with self._reading:
            began, known = self._clock.now(), self._known       # a revision below what was known *before* the read went back
            try:
                snapshot = await self._store.read(self._keys.root, deadline_s=min(READ_S, self._settings()[2]))
            except DcsError as error:
                self._unreachable(str(error))
                raise
            self._heard(self._clock.now())
            self._note_generation(snapshot.generation, known)
            if snapshot.revision >= self._revision:
                kept = (self._keys.worth_keeping(entry) for entry in snapshot.entries.values() if entry.key.startswith(self._keys.root))
                self._entries, self._revision = {entry.key: entry for entry in kept if entry is not None}, snapshot.revision
                self._renew_view(snapshot, began)
            else:
                # The watch has told of more meanwhile: the view is newer than this read, which therefore proves nothing of it.
                self._renew_view(None, began)

    def _renew_view(self, snapshot: Snapshot | None, began: Instant) -> None:
        """Parse all entries again. `snapshot` None: the news came by the watch."""
        view = parse(Snapshot(revision=self._revision, entries=self._entries, generation=self._generation), self._keys)
        before = self.facts
        lock_seen = self._look_at_lock(view, linearizable=snapshot is not None)
        for problem in view.problems:
            if before.view is None or problem not in before.view.problems:
                log.warning("store holds what cannot be read", key=problem)
        self._remember(view)
        outsider = _outsider(view, before)
        self._remembered = replace(self._remembered, outsider=replace(outsider, alone=False) if outsider is not None else None)
        self.facts = replace(
            before, view=view, lock_seen=lock_seen, outsider=outsider, read_at=began if snapshot is not None else before.read_at,
            remembered_ttl_s=self._remembered.ttl_s, remembered_pause=self._remembered.paused,
            remembered_identifier=self._remembered.system_identifier, remembered_members=self._known_members(), remembered_slots=self._known_slots(), last_positions=self._positions(view, before),
            remembered_sync=self._former_sync(view),
        )
        if snapshot is not None or before.view is None or _matters(before.view, view, self._me):
            self._wake()

    def _look_at_lock(self, view: ClusterView, *, linearizable: bool) -> LockSeen:
        seen = self.facts.lock_seen
        if view.lock is None:
            return LockSeen(absent_since=seen.absent_since or (self._clock.now() if linearizable else None))
        if view.lock_revision == seen.revision and view.lock_value == seen.value and seen.record is not None:
            return seen
        return LockSeen(record=view.lock, revision=view.lock_revision, value=view.lock_value, since=self._clock.now())

    # --- generation and memory -----------------------------------------------------------------------------------------

    def _note_generation(self, generation: Generation, known: StoreGeneration) -> None:
        """A store that changed its identity, or whose revision went back, was rebuilt or restored."""
        now = self._clock.now()
        changed = ""
        if self._store.regressions != self._regressions:
            changed = "the store was found to be another or an older one"
        self._regressions = self._store.regressions
        if known.cluster_id and generation.cluster_id and generation.cluster_id != known.cluster_id:
            changed = f"the store is another one (cluster id {generation.cluster_id}, before {known.cluster_id})"
        elif generation.revision and known.revision > generation.revision:
            changed = f"the store's revision went back from {known.revision} to {generation.revision}"
        self._generation = generation
        revision = generation.revision if changed else max(self._known.revision, generation.revision)
        self._known = StoreGeneration(cluster_id=generation.cluster_id, revision=revision)
        if changed:
            untrusted_s = wait_s(max(self._remembered.ttl_s, self._settings()[0], UNTRUSTED_S))
            log.error("the store was restored or rebuilt: no record in it is believed for a while", why=changed, for_s=untrusted_s)
            self._went_back = True
            self._revision = 0
            self._revisions = []    # of the former store: the new one may be far from them
            self.facts = replace(self.facts, trusted_from=now.plus_s(untrusted_s), generation_changed=changed)
        self._remember_generation()

    def _remember_generation(self) -> None:
        """What is written down stays the former store until the new one is trusted: an agent that is restarted in between
        finds the change again, and waits as long. Distrust ends by the clock, whether the news comes by a read or by the
        watch: while that delivers, nobody reads."""
        trusted_from = self.facts.trusted_from
        if trusted_from is not None and remaining_s(trusted_from, self._clock.now()) <= 0:
            self.facts = replace(self.facts, trusted_from=None, generation_changed="")
        if self.facts.trusted_from is None:
            self._remembered = replace(self._remembered, generation=self._known)

    def _remember(self, view: ClusterView) -> None:
        now_s, kept_s = self._clock.wall_s(), self._settings()[3]
        members = {n: m for n, m in self._remembered.members.items() if now_s - m.seen_at_wall_s < kept_s}
        for member in view.members.values():
            if member.api_url:
                members[member.name] = _remembered(member, members.get(member.name), now_s, kept_s)
        ttl_s = self._remembered.ttl_s
        if view.lock is not None and view.lock is not UNREADABLE_LOCK:
            ttl_s = view.lock.ttl_s     # the one that a candidate would have to wait for
        self._remember_sync(view)
        self._remembered = replace(self._remembered, ttl_s=ttl_s, paused=self._paused_holder(view), members=members, slots=self._retained(view, members, now_s), system_identifier=view.initialize if view.initialized and view.initialize else
                                   self._remembered.system_identifier)

    def _remember_sync(self, view: ClusterView) -> None:
        """What a store that went back shows is not believed alone until the key has been written again, which only a
        leader does, who could lead by both. Nor is a key that cannot be read, or that is gone while the mode is on: leaders
        delete it when the mode is off."""
        revision = view.revision_of("sync")
        tampered = view.sync.unreadable or (not revision and bool(self._remembered.sync.leader) and synchronous(view.config or {}))
        if self._went_back or tampered:
            self._went_back = False
            self._remembered = replace(self._remembered, sync_restored=revision)
        if self._remembered.sync_restored != revision:
            self._remembered = replace(self._remembered, sync=replace(view.sync, raw={}), sync_restored=None)

    def _former_sync(self, view: ClusterView) -> Sync | None:
        """What /sync said before, if the store went back, shows something else, and nobody has written the key since."""
        former, doubted = self._remembered.sync, self._remembered.sync_restored is not None
        return former if doubted and former.leader and _sync_shape(former) != _sync_shape(view.sync) else None

    def _paused_holder(self, view: ClusterView) -> PausedHolder | None:
        """A pause ends by a record that says so and was written since, not by one that is missing or was restored: the
        holder of the paused one may be writing, cut off from the store."""
        lock = view.lock
        if lock is None or lock is UNREADABLE_LOCK:
            return self._remembered.paused
        if lock.mode == "paused":
            return PausedHolder(name=lock.holder, node_id=lock.node_id, incarnation=lock.incarnation)
        if self.facts.trusted_from is not None:
            self._untrusted_lock = view.lock_value
        return self._remembered.paused if view.lock_value == self._untrusted_lock else None

    def _known_members(self) -> dict[str, str]:
        return {n: m.api_url for n, m in self._remembered.members.items() if m.api_url}

    def _retained(self, view: ClusterView, members: dict[str, RememberedMember], now_s: float) -> dict[str, float]:
        """Since when the slots that status names are without a member, as far as this node can know: one that came later
        has never seen the member, and is not to let go of its slot at once when it leads. Who is past the time stays in the
        list for as long as status goes on naming it, or it would begin anew."""
        seen = {slot_name(name): member.seen_at_wall_s for name, member in members.items()}
        before = self._remembered.slots
        return {name: max(seen[name], before.get(name, 0.0)) if name in seen else before.get(name, now_s) for name in view.status.retain_slots}

    def _known_slots(self) -> tuple[str, ...]:
        now_s, kept_s = self._clock.wall_s(), self._settings()[3]
        return tuple(sorted(name for name, since_s in self._remembered.slots.items() if now_s - since_s < kept_s))

    def _positions(self, view: ClusterView, before: DcsFacts) -> dict[str, Position]:
        if before.view is not None and before.view.members == view.members:
            return before.last_positions
        positions = dict(before.last_positions)
        for member in view.members.values():
            if member.lsn:
                positions[member.name] = Position(timeline=member.timeline, lsn=member.lsn)
        return positions

    async def _save(self) -> None:
        """In a thread, so that a hung disk delays nothing; one at a time."""
        now = self._clock.now()
        if self._saving or self._remembered == self._saved:
            return
        if self._saved_at is not None and candidate_age_s(self._saved_at, now) < SAVE_EVERY_S:
            return
        self._saving, self._saved_at = True, now
        facts = self._remembered

        def save() -> None:
            try:
                save_remembered(self._state_dir, facts)
            finally:
                self._saving = False

        try:
            with trio.move_on_after(2.0):
                await self._in_thread(save, abandon_on_cancel=True)
                self._saved = facts
        except OSError as error:
            log.warning("remembered facts could not be written", why=f"{error.filename}: {error.strerror}")

    # --- the tasks -----------------------------------------------------------------------------------------------------

    async def run(self, *, task_status: Any = trio.TASK_STATUS_IGNORED) -> None:
        """Keep the view fresh. Never returns, never raises for the store's faults."""
        task_status.started()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._keep_saving)
            while True:
                try:
                    await self.read()
                except DcsError as error:
                    self._unreachable(str(error))
                    await trio.sleep(READ_AGAIN_S)
                    continue
                try:
                    await self._follow()
                    continue
                except Compacted as error:
                    why = f"history from revision {self._revision + 1} on is gone, the oldest is {error.revision}"
                except DcsError as error:
                    why = str(error)
                await self._without_watch(why)

    async def _without_watch(self, why: str) -> None:
        """A watch that ended says nothing of the store: the next read does, at once. One that ends again and again is said
        once, and reading goes on in its place."""
        # Absence is continuous only by what was seen without a gap.
        self.facts = replace(self.facts, lock_seen=replace(self.facts.lock_seen, absent_since=None))
        self._watch_failures += 1
        if self._watch_failures == 2:
            log.warning("watch of the store ends again and again, reading instead", why=why)
        elif self._watch_failures < 2:
            log.info("watch of the store ended, reading again", why=why)
        await trio.sleep(0.0 if self._watch_failures == 1 else min(READ_AGAIN_S * self._watch_failures, READ_INSTEAD_EVERY_S))

    def _watch_delivers(self) -> None:
        if self._watch_failures > 1:
            log.info("watch of the store works again")
        self._watch_failures = 0

    async def _keep_saving(self) -> None:
        while True:
            await trio.sleep(2.0)
            await self._save()

    async def keep_capacity(self, leads: Callable[[], bool], quota_bytes: Callable[[], int] = lambda: 0) -> None:
        """The leader asks how full the store is, long before it hurts (safety model 16); one that could not renew for want
        of space goes on asking until the alarm is over. `quota_bytes()`: the operator's word, 0: none. Never returns."""
        while True:
            self._out_of_space = trio.Event()
            alarmed = self.facts.capacity is not None and bool(self.facts.capacity.alarms)
            if leads() or alarmed:
                try:
                    self._note_capacity(await self._store.capacity(deadline_s=2.0), quota_bytes())
                except DcsError as error:
                    say = log.debug if self._outage.on else log.info
                    say("the store does not say how full it is", why=str(error))
            elif self.facts.capacity is not None:
                self.facts = replace(self.facts, capacity=None)     # another leads, and watches
            await trio.sleep(CAPACITY_AT_MOST_S)
            if self.facts.capacity is not None:
                with trio.move_on_after((CAPACITY_ALARMED_S if self.facts.capacity.alarms else CAPACITY_EVERY_S) - CAPACITY_AT_MOST_S):
                    await self._out_of_space.wait()

    def out_of_space(self) -> None:
        """A write was refused for want of space: ask now."""
        self._out_of_space.set()

    def _note_capacity(self, said: Capacity, quota_bytes: int) -> None:
        now, before = self._clock.now(), self.facts.capacity
        watched_since = before.watched_since if before is not None else now
        if not self._revisions or candidate_age_s(self._revisions[-1][0], now) >= 3600:
            self._revisions = [*self._revisions[-48:], (now, max(self._generation.revision, self._revision))]
        old = [revision for at, revision in self._revisions if candidate_age_s(at, now) >= DAY_S]
        compacted_at = before.compacted_at if before else None
        if before is not None and said.compact_revision > before.compact_revision:
            compacted_at = now
        quota = quota_bytes or said.quota_bytes or DEFAULT_QUOTA_BYTES
        self.facts = replace(self.facts, capacity=StoreCapacity(
            asked_at=now, watched_since=watched_since, used_bytes=said.used_bytes, quota_bytes=quota, alarms=said.alarms,
            compact_revision=said.compact_revision, compacted_at=compacted_at, day_old_revision=old[-1] if old else 0))
        step = next((s for s in CAPACITY_STEPS if said.used_bytes >= s * quota), 0.0)
        if step > self._warned:
            log.warning("the store fills up: let it compact itself (etcd: --auto-compaction-retention=1h) and defragment it",
                        used_bytes=said.used_bytes, quota_bytes=quota, percent=round(100 * said.used_bytes / quota))
        self._warned = step
        if said.alarms and (before is None or before.alarms != said.alarms):
            log.error("the store has raised an alarm", alarms=", ".join(said.alarms))
        elif before is not None and before.alarms and not said.alarms:
            log.info("the store's alarm is over", alarms=", ".join(before.alarms))
        if before is None or before.alarms != said.alarms:
            self._wake()

    async def _follow(self) -> None:
        """Apply the watch's changes until it ends, or is silent for too long while the store has moved on."""
        async with self._store.watch(self._keys.root, after_revision=self._revision) as changes:
            iterator = changes.__aiter__()
            while True:
                change: Change | None = None
                silent = True
                with trio.move_on_after(self._silence_s()):
                    change = await iterator.__anext__()
                    silent = False
                if silent:
                    revision = self._revision
                    await self.read()
                    if self._revision != revision:
                        self._watch_silences += 1
                        say = log.warning if self._watch_silences == 1 else log.debug
                        say("watch was silent while the store changed, opening it again")
                    return
                self._heard(self._clock.now())
                if change is not None:
                    self._watch_silences = 0
                    self._watch_delivers()
                    self._apply(change)

    def _silence_s(self) -> float:
        """The holder's renewals are the stream's heartbeat."""
        ttl_s, loop_wait_s, _, _ = self._settings()
        return 2.5 * min(loop_wait_s, ttl_s / 3) + 1.0

    def _apply(self, change: Change) -> None:
        if change.revision <= self._revision:
            return
        for key, entry in change.entries.items():
            kept = self._keys.worth_keeping(entry) if entry is not None and key.startswith(self._keys.root) else None
            if kept is None:
                self._entries.pop(key, None)
            else:
                self._entries[key] = kept
        self._revision = change.revision
        self._known = replace(self._known, revision=max(self._known.revision, change.revision))
        self._remember_generation()
        self._renew_view(None, self._clock.now())

    def _heard(self, at: Instant) -> None:
        self._outage.answered("watch")
        self.facts = replace(self.facts, heard_at=at, unreachable_since=None, why="")

    def _unreachable(self, why: str) -> None:
        if self.facts.unreachable_since is None:
            self._outage.failing("watch", why)
            # Absence is continuous only by reads that were answered.
            seen = replace(self.facts.lock_seen, absent_since=None)
            self.facts = replace(self.facts, unreachable_since=self._clock.now(), why=why, lock_seen=seen)
            self._wake()
        elif why != self.facts.why:
            self.facts = replace(self.facts, why=why)


def _outsider(view: ClusterView, before: DcsFacts) -> Outsider | None:
    """Who of another make leads, or has led since one of ours did."""
    known, leader = before.outsider, view.members.get(view.leader)
    if view.leader_lease and leader is not None:
        return None if leader.is_pgha else Outsider(name=leader.name, host=leader.host, port=leader.port, alone=view.lock is None)
    if known is None or (view.leader_lease and view.leader != known.name):
        return None
    if view.lock is not None and view.lock.mode != "released" and (before.view is None or view.lock_revision != before.view.lock_revision):
        return None         # one of ours has taken over
    return replace(known, alone=known.alone and view.lock is None)


def _remembered(member: Member, before: RememberedMember | None, now_s: float, kept_s: float) -> RememberedMember:
    """Positions and times are refreshed coarsely, so that an idle cluster writes nothing."""
    if before is not None and before.api_url == member.api_url and now_s - before.seen_at_wall_s < min(60, kept_s / 10) and before.lsn == member.lsn:
        return before
    if not member.lsn and before is not None:       # stopped: what it had stays what it has (safety model 6.4)
        return RememberedMember(api_url=member.api_url, seen_at_wall_s=now_s, timeline=before.timeline, lsn=before.lsn)
    return RememberedMember(api_url=member.api_url, seen_at_wall_s=now_s, timeline=member.timeline, lsn=member.lsn)


def _matters(before: ClusterView, after: ClusterView, me: str) -> bool:
    """Does this change ask for a pass at once? Renewals and positions do not."""
    return (
        _lock_shape(before) != _lock_shape(after)
        or any(before.revisions.get(k) != after.revisions.get(k) for k in ("initialize", "config", "failover", "sync", "history", "failsafe", "pgha/epoch", "leader"))
        or (before.members != after.members
            and {n: _member_shape(m) for n, m in before.members.items() if n != me} != {n: _member_shape(m) for n, m in after.members.items() if n != me})
    )


def _lock_shape(view: ClusterView) -> tuple[object, ...]:
    lock = view.lock
    return () if lock is None else (lock.holder, lock.node_id, lock.incarnation, lock.mode, lock.ttl_s)


def _sync_shape(sync: Sync) -> tuple[object, ...]:
    return (sync.leader.lower(), sync.quorum, frozenset(name.lower() for name in sync.members))


def _member_shape(member: Member) -> tuple[object, ...]:
    return (member.state, member.role, member.conn_url, member.api_url, member.timeline, member.replication_state, member.tags.raw, member.pause)
