"""The lock renewer: takes, renews and gives back the record, in its own task, on its own connections.

It touches neither SQL nor disk. Renewals go out every min(loop_wait, ttl/3), in attempts of a fraction of a second to
one endpoint after the other, as long as the loop's mandate stands; what may be believed of the answers is
`licence.LicenceBook`'s business. Every change of the licence is announced to the fence, which tells the guard.

Rules of this file:
* the clock is read before the first byte is sent, never after;
* whether a take-over is promised away is asked in the same step in which it becomes "under way" (safety model 12);
* nothing here waits for the guard, except before a write that shortens the licence, which the guard confirms first;
* in a mixed cluster the key `leader` is part of every write, and is never left out of a compare (`leader_key`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import trio
from msgspec import Struct
from msgspec.structs import replace

from pgha.clock import Clock, Deadline, Instant, holder_age_s, remaining_s
from pgha.dcs import ABSENT, Compare, Delete, Entry, Outcome, Put, Store
from pgha.dcs.keys import EPOCH, LOCK, Keys, encode, parse_epoch, parse_lock
from pgha.dcs.outage import Outage
from pgha.errors import DcsError, DcsRefused, DcsUnreachable, GuardError, Refused
from pgha.lock.leader_key import LeaderKey
from pgha.lock.licence import LicenceBook, Sent
from pgha.lock.promise import Promises
from pgha.log import Log
from pgha.model.action import AcquireLock
from pgha.model.cluster import ClusterView
from pgha.model.decision import Mandate
from pgha.model.lock import MIXED_TTL_S, Epoch, Identity, Licence, LicenceState, LockMode, LockRecord
from pgha.model.wal import format_lsn

log = Log("pgha.lock")

#: One attempt at one endpoint. A stopped etcd member costs this much, an election some of them (feasibility 2).
ATTEMPT_S = 0.35
#: A take-over whose answer was lost, and which is not in the store after this long, is given up.
GIVE_UP_S = 1.5
#: A shorter licence (smaller ttl, end of a pause) that the guard did not confirm is tried again after this long.
NARROW_AGAIN_S = 1.0
#: A wall clock that moves against the boot clock by more than this asks for a confirming renewal (safety model 15).
WALL_JUMP_S = 1.0


#: What `failing_why` begins with when the store refuses writes for want of space.
OUT_OF_SPACE = "store is out of space"


class Timing(Struct, frozen=True, kw_only=True):
    """What of the shared configuration the renewer needs, as it is now."""

    ttl_s: float
    loop_wait_s: float
    paused: bool = False
    mixed: bool = False     # members of another make take part


class Round(Struct, frozen=True, kw_only=True):
    """A failsafe round that has begun: what it gives, should all accept."""

    began: Instant
    sequence: int
    epoch: int
    ttl_s: float


class Narrower(Protocol):
    """The guard's confirmation that a shorter licence is known to it."""

    async def narrow(self, valid_until: Deadline, ttl_s: float, *, sequence: int) -> None:
        """`sequence`: the highest that was sent under the longer licence. Raises GuardError if it was not confirmed."""
        ...


class Renewer:
    """Owner of the lock record of this process."""

    def __init__(self, *, store: Store, keys: Keys, me: Identity, clock: Clock, timing: Callable[[], Timing],
                 changed: Callable[[], None], outage: Outage | None = None) -> None:
        self._store = store
        self._keys = keys
        self._clock = clock
        self._timing = timing
        self._changed = changed
        self._outage = outage or Outage(clock)
        self._told = False               # that renewals fail, for another reason than silence
        self._book = LicenceBook(me)
        self._leader = LeaderKey(store, path=keys.path("leader"), name=me.name)
        self._busy = trio.Lock()
        self._news = trio.Event()
        self._renewing: trio.CancelScope | None = None
        self._wall_offset = clock.wall_s() - clock.now().boot_ns / 1e9
        self._confirm_by: Deadline | None = None
        self._jumped_at: Instant | None = None
        self._epoch = Epoch(number=0, holder="", incarnation="")
        self._epoch_missing = False      # the last renewal found none: the next one writes it again
        self._leader_missing = False     # the same of `leader` in a pure cluster
        self._pass = 0
        self._renew_now = False
        self._acquiring_since: Instant | None = None
        self._narrow_refused_at: Instant | None = None
        self._doubted_leader = 0
        self.me = me
        self.mandate = Mandate()
        self.narrower: Narrower | None = None
        self.promises: Promises | None = None
        self.position = (0, 0)           # (lsn, timeline) to write into the record: the loop keeps it fresh
        self.heard_at: Instant | None = None

    @property
    def licence(self) -> Licence:
        return self._book.licence

    def give_mandate(self, mandate: Mandate, *, number: int) -> None:
        """The loop's word, once a pass: until when to go on. `number` is the pass."""
        self._pass = number
        if mandate != self.mandate:
            self.mandate = mandate
            self._wake()

    # --- taking --------------------------------------------------------------------------------------------------------

    async def acquire(self, action: AcquireLock, *, deadline_s: float, config: bytes | None = None) -> None:
        """Send a take-over or re-adoption. Returns once it is known to be committed.

        Raises Refused if a compare failed (somebody else was faster, or what eligibility was judged on has changed),
        DcsUnreachable if the outcome is unknown: then the licence stays ACQUIRING and is settled by `run`.
        """
        async with self._busy:
            if self._holds():
                raise Refused("the lock is held by this incarnation already")
            timing = self._timing()
            self._refuse_promised(action)       # no await between this and `acquiring`: a promise refuses, or is refused
            self._book.acquiring()
            self.position = (action.lsn, action.timeline)       # what the next renewals say, too, until a server answers
            # Paused only where the guard knows of a pause already; a licence that is new begins with an end.
            sent = self._book.compose(
                self._clock.now(), ttl_s=max(timing.ttl_s, MIXED_TTL_S) if action.mixed else timing.ttl_s, mode="paused" if action.paused else "held",
                lsn=action.lsn, timeline=action.timeline, onto_revision=action.lock_revision, mixed=action.mixed,
            )
            value = encode(sent.record)
            epoch = Epoch(number=action.epoch_number if action.readopt else action.epoch_number + 1, holder=self.me.name,
                          incarnation=self.me.incarnation, timeline=action.claim_timeline, claims=action.claims)
            self._epoch = epoch
            self._acquiring_since = sent.at
            self._announce()        # should its answer be lost, `run` settles it
            lease = await self._lease_to_take_over(sent, deadline_s) if _is_leased(sent.record) else 0
            compares, puts = self._take_over(action, value, epoch, config, lease)
            outcome = await self._store.transact(
                compares=compares, puts=puts, read=[self._keys.path(LOCK), self._keys.path(EPOCH), self._leader.path], deadline_s=deadline_s,
                attempt_s=ATTEMPT_S,
            )
            self.heard_at = self._clock.now()
            if outcome.succeeded:
                if any(put.key == self._leader.path for put in puts):
                    self._leader.written(lease, outcome.revision)
                else:
                    self._leader.forget()
                self._won(sent, outcome.revision, value, epoch.number,
                          action.epoch_revision if action.readopt else outcome.revision)
                return
            self._settle_take_over(outcome)
            if not self._holds():
                raise Refused("the lock, or what eligibility was judged on, has changed meanwhile")

    async def _lease_to_take_over(self, sent: Sent, deadline_s: float) -> int:
        """The record's validity counts from before this."""
        try:
            return await self._leader.lease(sent.record.ttl_s, deadline_s=deadline_s)
        except DcsError:
            self._book.never_acquired()     # nothing was sent
            self._announce()
            raise

    def _refuse_promised(self, action: AcquireLock) -> None:
        """Whoever promised not to take over does not, whatever has been decided meanwhile. Where no cluster ever was, nobody
        can have asked before this boot; but a leader that did ask has a cluster, whatever the store says."""
        record = parse_lock(action.lock_value) if action.lock_revision else None
        promise = self.promises.binding(record) if self.promises is not None else None
        if promise is not None and (promise.name or action.initialize_revision is None):
            raise Refused(f"promised to {promise.name or 'nobody known'} not to take over for another {promise.left_s(self._clock.now()):.1f} s (failsafe)")

    def _holds(self) -> bool:
        licence = self.licence
        return (licence.state is LicenceState.HELD and licence.valid_until is not None
                and remaining_s(licence.valid_until, self._clock.now()) > 0)

    def _take_over(self, action: AcquireLock, value: bytes, epoch: Epoch, config: bytes | None, lease: int) -> tuple[list[Compare], list[Put | Delete]]:
        path = self._keys.path
        compares = [
            Compare(key=path(LOCK), revision=action.lock_revision, value=action.lock_value if action.lock_revision else None),
            Compare(key=path(EPOCH), revision=action.epoch_revision),
            *(Compare(key=path(key), revision=revision) for key, revision in sorted(action.also_unchanged.items())),
        ]
        puts: list[Put | Delete] = [Put(key=path(LOCK), value=value)]
        if not action.readopt:
            puts.append(Put(key=path(EPOCH), value=encode(epoch)))
        if not action.readopt or action.mixed:
            puts.append(self._leader.put(lease))
        if action.initialize_revision is not None:
            compares.append(Compare(key=path("initialize"), revision=action.initialize_revision))
            puts.append(Put(key=path("initialize"), value=action.initialize_value.encode()))
            if config is not None:
                puts.append(Put(key=path("config"), value=config))
        return compares, puts

    def _won(self, sent: Sent, revision: int, value: bytes, epoch: int, epoch_revision: int) -> None:
        self._book.committed(sent, revision=revision, value=value, epoch=epoch, epoch_revision=epoch_revision, acquired_pass=self._pass,
                             leader_revision=self._leader.revision or 0)
        self._confirm_by = None
        log.info("lock acquired", sequence=sent.record.sequence, epoch=epoch, ttl_s=sent.record.ttl_s,
                 took_s=remaining_s(self._clock.now(), sent.at))
        self._announce()

    def _settle_take_over(self, outcome: Outcome) -> None:
        """A take-over's compare failed: is that because an earlier attempt of the same had committed?"""
        entry = outcome.found.get(self._keys.path(LOCK))
        record = parse_lock(entry.value) if entry else None
        mine = self._book.recognise(record)
        if mine is not None and entry is not None:
            epoch_entry = outcome.found.get(self._keys.path(EPOCH))
            self._note_leader(mine, outcome, entry.revision)
            self._won(mine, entry.revision, entry.value, _epoch_number(epoch_entry), epoch_entry.revision if epoch_entry else ABSENT)
        else:
            self._book.never_acquired()
            self._announce()

    # --- giving back ---------------------------------------------------------------------------------------------------

    async def release(self, *, lsn: int, timeline: int, deadline_s: float) -> None:
        """Write the record in mode `released`. The caller has made sure that nothing of the data directory can write.

        From the call on this record is never renewed again, whatever comes back. DcsError: the outcome is unknown,
        or it was refused; the record then expires by itself.
        """
        if self.licence.state is not LicenceState.HELD:
            return
        endless = self.licence.endless
        self._book.releasing()
        self._changed()
        if self._renewing is not None:
            self._renewing.cancel()
        with trio.fail_after(deadline_s):
            async with self._busy:
                await self._send_release(lsn, timeline, deadline_s, endless=endless)

    async def _send_release(self, lsn: int, timeline: int, deadline_s: float, *, endless: bool) -> None:
        for _ in range(2):          # the second time only if the first found a later renewal of ours in the store
            onto = self.licence.revision
            sent = self._book.compose(self._clock.now(), ttl_s=self.licence.ttl_s, mode="released", lsn=lsn, timeline=timeline, onto_revision=onto, mixed=self.licence.mixed)
            end = self._book.shortened(sent)
            if end is not None:
                if endless and self.narrower is not None:
                    # A guard that was told of a pause knows no deadline: it must know that this is over.
                    await self.narrower.narrow(end, self.licence.ttl_s, sequence=sent.record.sequence - 1)
                self._book.shorten(sent, end)
            value = encode(sent.record)
            compares = [Compare(key=self._keys.path(LOCK), revision=onto, value=self._book.value)]
            puts: list[Put | Delete] = [Put(key=self._keys.path(LOCK), value=value)]
            if self.licence.mixed and self._leader.revision != ABSENT:
                # Members of another make see that nobody leads any more. One that has the key already keeps it.
                compares.append(self._leader.compare())
                puts.append(self._leader.delete())
            outcome = await self._store.transact(
                compares=compares, puts=puts, read=[self._keys.path(LOCK), self._leader.path], deadline_s=deadline_s, attempt_s=ATTEMPT_S,
            )
            leader = outcome.found.get(self._leader.path)
            if leader is not None and self._leader.is_ours(leader):
                self._leader.written(leader.lease, leader.revision)
            else:
                self._leader.gone()
            entry = outcome.found.get(self._keys.path(LOCK))
            mine = sent if outcome.succeeded else self._book.recognise(parse_lock(entry.value) if entry else None)
            if mine is None or (entry is None and not outcome.succeeded):
                break
            revision = outcome.revision if outcome.succeeded or entry is None else entry.revision
            stored = value if outcome.succeeded or entry is None else entry.value
            self._book.committed(mine, revision=revision, value=stored, epoch=self.licence.epoch,
                                 epoch_revision=self.licence.epoch_revision, acquired_pass=self.licence.acquired_pass,
                                 leader_revision=self._leader.revision or 0)
            if mine.record.mode == "released":
                log.info("lock released", sequence=mine.record.sequence, lsn=format_lsn(lsn), timeline=timeline)
                self._announce()
                return
        self._book.lost(parse_lock(entry.value) if entry else _NOBODY)
        self._announce()

    # --- renewing ------------------------------------------------------------------------------------------------------

    async def run(self, *, task_status: Any = trio.TASK_STATUS_IGNORED) -> None:
        """Renew for as long as there is a licence and a mandate; settle what is unsettled. Never returns."""
        task_status.started()
        while True:
            wait_s = self._next_in_s()
            if wait_s > 0:
                self._outage.answered("lock")       # or it is not asked for anything now
                self._news = trio.Event()
                # A holder looks at the wall clock every second: nothing tells when it is set.
                with trio.move_on_after(min(wait_s, 1.0) if self.licence.state is LicenceState.HELD else wait_s):
                    await self._news.wait()
                self._notice_wall_jump()
                continue
            state = self.licence.state
            try:
                if state is LicenceState.HELD:
                    await self._renew_once()
                elif state is LicenceState.ACQUIRING:
                    await self._settle_once()
            except DcsRefused as error:
                self._failed((f"{OUT_OF_SPACE}: " if error.no_space else "") + str(error))
                await trio.sleep(0.25)
            except (DcsError, GuardError) as error:
                self._failed(str(error), silent=isinstance(error, DcsUnreachable))
                # A refused connection answers at once: do not spin, and least of all for as long as failsafe may carry on.
                await trio.sleep(0.25 if self.licence.by_failsafe else 0.05)

    def _next_in_s(self) -> float:
        """Seconds until there is something to send; 0 = now."""
        licence, now = self.licence, self._clock.now()
        if licence.state is LicenceState.ACQUIRING:
            return 0.1 if self._busy.locked() else 0.0
        if licence.state is not LicenceState.HELD or licence.since is None or licence.valid_until is None:
            return 60.0
        if remaining_s(licence.valid_until, now) <= 0:
            return 1.0                      # ended: the fence's business; the record is not ours to renew any more
        if self.mandate.until is None or remaining_s(self.mandate.until, now) <= 0:
            return 0.2                      # no mandate: not renewed; a new one wakes us
        timing = self._timing()
        refused = self._narrow_refused_at
        changed = ((timing.ttl_s != licence.ttl_s or timing.paused != (licence.mode == "paused") or self._is_to_be_mixed(timing) != licence.mixed)
                   and (refused is None or holder_age_s(refused, now) >= NARROW_AGAIN_S))
        if changed or self._renew_now or licence.failing_since is not None or self._confirm_by is not None or licence.by_failsafe:
            return 0.0
        return max(0.0, remaining_s(licence.since.plus_s(min(timing.loop_wait_s, timing.ttl_s / 3)), now))

    async def _renew_once(self) -> None:
        async with self._busy:
            licence = self.licence
            if licence.state is not LicenceState.HELD or licence.valid_until is None:
                return
            self._renew_now = False
            timing = self._timing()
            sent = self._compose_renewal(timing.ttl_s, "paused" if timing.paused else "held", mixed=self._is_to_be_mixed(timing))
            end = self._book.shortened(sent)
            if end is not None and not await self._confirmed(sent, end):
                # Without the guard's word the licence must not be shortened: it is renewed as long as it was.
                sent, end = self._compose_renewal(licence.ttl_s, licence.mode, mixed=licence.mixed), None
            if self.licence.state is not LicenceState.HELD:
                return                  # released, or forgotten by the fence, while the guard was asked
            if end is not None:
                self._book.shorten(sent, end)
                self._announce()
            valid_until = self.licence.valid_until
            assert valid_until is not None
            left_s = remaining_s(valid_until, self._clock.now())
            if left_s <= 0:
                return
            with trio.CancelScope() as self._renewing:
                await self._send_renewal(sent, min(left_s, 4 * ATTEMPT_S))
            self._renewing = None

    def _compose_renewal(self, ttl_s: float, mode: LockMode, *, mixed: bool) -> Sent:
        return self._book.compose(self._clock.now(), ttl_s=ttl_s, mode=mode, lsn=self.position[0], timeline=self.position[1],
                                  onto_revision=self.licence.revision, mixed=mixed)

    def _is_to_be_mixed(self, timing: Timing) -> bool:
        """From pure to mixed: first a record with a ttl that both sides count on is committed, then the lease is attached."""
        return timing.mixed and (self.licence.mixed or self.licence.ttl_s >= MIXED_TTL_S)

    async def _confirmed(self, sent: Sent, end: Deadline) -> bool:
        """Does the guard know the shorter end?"""
        if self.narrower is None:
            return True
        try:
            await self.narrower.narrow(end, sent.record.ttl_s, sequence=sent.record.sequence - 1)
        except GuardError as error:
            if self._narrow_refused_at is None:
                log.warning("the guard has not confirmed a shorter licence: ttl and mode stay as they were", ttl_s=self.licence.ttl_s, mode=self.licence.mode, why=str(error))
            self._narrow_refused_at = self._clock.now()
            return False
        self._narrow_refused_at = None
        return True

    async def _send_renewal(self, sent: Sent, deadline_s: float) -> None:
        path, licence = self._keys.path, self.licence
        value = encode(sent.record)
        compares = [Compare(key=path(LOCK), revision=licence.revision, value=self._book.value)]
        puts: list[Put | Delete] = [Put(key=path(LOCK), value=value)]
        limit = self._clock.now().plus_s(deadline_s)
        lease = await self._leader.lease(sent.record.ttl_s, deadline_s=deadline_s / 2) if _is_leased(sent.record) else 0
        if sent.record.mixed or licence.mixed:
            compares.append(self._leader.compare())
            if not self._leader.stands_under(lease):
                puts.append(self._leader.put(lease))
            deadline_s = remaining_s(limit, self._clock.now())
            if deadline_s <= 0:
                raise DcsUnreachable("the lease of leader took all the time that there was")
        restores, self._epoch_missing = self._epoch_missing, False
        if restores:
            # Somebody has deleted it: without it every leader's write is refused, and the next take-over would count from 1.
            epoch = replace(self._epoch, number=licence.epoch, holder=self.me.name, incarnation=self.me.incarnation)
            compares.append(Compare(key=path(EPOCH), revision=ABSENT))
            puts.append(Put(key=path(EPOCH), value=encode(epoch)))
        pure = not (sent.record.mixed or licence.mixed)
        names_leader, self._leader_missing = pure and self._leader_missing, False
        if names_leader:
            # Tools would show no leader until the next take-over, and a member of another make that joins would find the key free.
            compares.append(Compare(key=self._leader.path, revision=ABSENT))
            puts.append(self._leader.put(0))
        read = [path(LOCK), path(EPOCH), self._leader.path]
        outcome = await self._store.transact(compares=compares, puts=puts, read=read, deadline_s=deadline_s, attempt_s=ATTEMPT_S)
        self.heard_at = self._clock.now()
        if outcome.succeeded:
            if any(put.key == self._leader.path for put in puts):
                self._leader.written(lease, outcome.revision)
            if names_leader:
                log.warning("the key leader was absent, written again", name=self.me.name)
            self._renewed(sent, outcome.revision, value, epoch_revision=outcome.revision if restores else None)
            self._epoch_missing = path(EPOCH) not in outcome.found and licence.epoch_revision != ABSENT
            self._leader_missing = pure and self._leader.path not in outcome.found
            return
        entry = outcome.found.get(path(LOCK))
        record = parse_lock(entry.value) if entry else None
        mine = self._book.recognise(record)
        if mine is not None and entry is not None:
            if entry.revision == licence.revision and (sent.record.mixed or licence.mixed):
                self._leader_has_changed(outcome.found.get(self._leader.path))
                return
            if entry.revision < licence.revision:
                raise DcsRefused(f"the store shows this node's record at revision {entry.revision}, before {licence.revision}: it was restored")
            # An attempt whose answer was lost had committed; if it created the record again, the epoch came with it.
            epoch_entry = outcome.found.get(path(EPOCH))
            together = epoch_entry is not None and epoch_entry.revision == entry.revision
            self._note_leader(mine, outcome, entry.revision)
            self._renewed(mine, entry.revision, entry.value, epoch_revision=entry.revision if together else None)
        elif record is None:
            await self._recreate(sent, value, deadline_s)
        elif self._book.is_own_past(record):
            raise DcsRefused(f"the store shows this node's record of sequence {record.sequence}, after {licence.sequence}: it was restored")
        else:
            self._lost(record)

    def _note_leader(self, mine: Sent, outcome: Outcome, revision: int) -> None:
        """An attempt whose answer was lost had committed, at `revision`: what of `leader` is this process's?"""
        entry = outcome.found.get(self._leader.path)
        if not mine.record.mixed:
            self._leader.forget()
        elif entry is not None and self._leader.is_ours(entry):
            self._leader.written(entry.lease, entry.revision)
        elif self._leader.revision is None or revision > self._leader.revision:
            self._leader.written(0, revision)       # it stood then, and does no more: the next compare fails, and says so

    def _leader_has_changed(self, entry: Entry | None) -> None:
        """The record stands, and `leader` is not as it was: deleted, or put by another. Whoever may take it over then does not
        know of the record, so the licence ends here (safety model 14)."""
        licence = self.licence
        if entry is None and (licence.by_failsafe or not licence.mixed):
            # Its lease ended while all others had promised not to take over; or it never was what the others go by.
            self._leader.gone()
            raise DcsRefused("the key leader is absent: it is created again")
        if entry is not None and self._leader.is_ours(entry):
            self._leader.written(entry.lease, entry.revision)
            raise DcsRefused("the key leader was written under this node's name: it is taken again")
        self.leader_lost(entry.value.decode(errors="replace")[:100] if entry is not None else "")

    def saw(self, view: ClusterView) -> None:
        """What the store shows beside a licence of this process: is somebody else leading? What is certain counts at once; where
        the renewer may know better than the view, a renewal tells."""
        licence = self.licence
        if licence.state is not LicenceState.HELD or view.revision < max(licence.revision, licence.leader_revision):
            return
        if view.leader_lease and view.leader != self.me.name:
            self.leader_lost(view.leader)
        elif licence.leader_revision and not view.leader and not licence.by_failsafe:
            self.leader_lost("")
        elif licence.leader_revision not in (0, view.revision_of("leader"), self._doubted_leader):
            self._doubted_leader = licence.leader_revision
            self.confirm()

    def leader_lost(self, to: str) -> None:
        """The key `leader` was deleted, or `to` has it: all at once, also where the record still stands."""
        self._leader.forget()
        self._lost(LockRecord(holder=to or "nobody: the key leader was deleted", node_id="", incarnation="", sequence=self.licence.sequence, ttl_s=self.licence.ttl_s or MIXED_TTL_S))

    async def _recreate(self, sent: Sent, value: bytes, deadline_s: float) -> None:
        """The record is absent though this licence is valid: create it again, never over another's (safety model 3)."""
        path, licence = self._keys.path, self.licence
        log.warning("lock record is absent, creating it again", sequence=sent.record.sequence)
        snapshot = await self._store.read(path(EPOCH), deadline_s=deadline_s)
        entry = snapshot.entries.get(path(EPOCH))
        if _epoch_number(entry) > licence.epoch:
            raise DcsRefused(f"the lock record is absent, and the epoch is {_epoch_number(entry)}, after this holder's {licence.epoch}: not created again")
        epoch = replace(self._epoch, number=licence.epoch, holder=self.me.name, incarnation=self.me.incarnation)
        puts: list[Put | Delete] = [Put(key=path(LOCK), value=value)]
        compares = [Compare(key=path(LOCK), revision=ABSENT), Compare(key=path(EPOCH), revision=entry.revision if entry else ABSENT)]
        if sent.record.mixed or licence.mixed:
            compares.append(self._leader.compare())     # it stands, under the lease that was just renewed, or others may have it
        else:
            puts.append(self._leader.put(0))
        if restores := entry is None or entry.revision != licence.epoch_revision:
            puts.append(Put(key=path(EPOCH), value=encode(epoch)))
        outcome = await self._store.transact(compares=compares, puts=puts, read=[path(LOCK), self._leader.path], deadline_s=deadline_s, attempt_s=ATTEMPT_S)
        if outcome.succeeded:
            if restores:
                self._renewed(sent, outcome.revision, value, epoch_revision=outcome.revision)
            else:
                self._renewed(sent, outcome.revision, value)
            return
        found = outcome.found.get(path(LOCK))
        record = parse_lock(found.value) if found else None
        mine = self._book.recognise(record)
        if mine is not None and found is not None:
            raise DcsUnreachable("the lock record was created again by an attempt whose answer was lost")    # the next renewal sees it
        if record is not None:
            self._lost(record)
        elif licence.mixed and not self._leader.is_ours(outcome.found.get(self._leader.path)):
            self._leader_has_changed(outcome.found.get(self._leader.path))
        else:
            raise DcsRefused("the epoch, or leader, changed while the lock record was created again")

    def _renewed(self, sent: Sent, revision: int, value: bytes, *, epoch_revision: int | None = None) -> None:
        licence = self.licence
        if licence.state not in (LicenceState.HELD, LicenceState.RELEASING):
            return      # the fence has killed and forgotten meanwhile: the record is this node's without a licence, as after a restart
        if licence.failing_since is not None and self._told:
            log.info("lock renewed again", after_s=remaining_s(self._clock.now(), licence.failing_since), sequence=sent.record.sequence)
        self._told = False
        self._book.committed(sent, revision=revision, value=value, epoch=licence.epoch,
                             epoch_revision=licence.epoch_revision if epoch_revision is None else epoch_revision,
                             acquired_pass=licence.acquired_pass, leader_revision=self._leader.revision or 0)
        self._confirm_by = None
        if self.licence.mode != licence.mode:
            log.info("pause is in force: the lock record says so" if self.licence.mode == "paused" else "pause is over: the lock record says so", sequence=sent.record.sequence)
        self._announce()

    def _lost(self, record: LockRecord) -> None:
        log.error("lock lost", to=record.holder or "unknown", sequence=record.sequence)
        self._book.lost(record)
        self._announce()

    async def _settle_once(self) -> None:
        """An acquire's outcome is unknown: read until the record shows whether it happened."""
        async with self._busy:
            if self.licence.state is not LicenceState.ACQUIRING:
                return
            paths = [self._keys.path(LOCK), self._keys.path(EPOCH)]
            outcome = await self._store.transact(compares=[], puts=[], read=paths, deadline_s=4 * ATTEMPT_S, attempt_s=ATTEMPT_S)
            entry = outcome.found.get(paths[0])
            record = parse_lock(entry.value) if entry else None
            if self._book.recognise(record) is not None or not self._book.may_still_commit(entry.revision if entry else ABSENT):
                self._settle_take_over(outcome)
                return
            since = self._acquiring_since
            if since is None or holder_age_s(since, self._clock.now()) >= GIVE_UP_S:
                # It has not arrived. Should it do so yet, the record is this node's without a licence: re-adopted, or let expire.
                log.warning("take-over has not arrived, giving it up")
                self._book.never_acquired()
                self._announce()
                return
        await trio.sleep(0.1)

    # --- failsafe ------------------------------------------------------------------------------------------------------

    def begin_round(self) -> Round | None:
        """Call before the first POST of a failsafe round. None: there is no licence to extend."""
        licence = self.licence
        if not self._holds():
            return None
        return Round(began=self._clock.now(), sequence=self._book.round_begins(), epoch=licence.epoch, ttl_s=licence.ttl_s)

    def extend(self, begun: Round) -> bool:
        """All members that may race have accepted. Whether that has widened the licence."""
        if not self._book.extend(begun.began, self._clock.now(), sequence=begun.sequence, epoch=begun.epoch, ttl_s=begun.ttl_s):
            return False
        if self._jumped_at is not None and remaining_s(begun.began, self._jumped_at) >= 0:
            self._confirm_by = None         # nobody has taken over: that is what a renewal was to confirm
        self._announce()
        return True

    # --- odds and ends -------------------------------------------------------------------------------------------------

    def forget_expired(self) -> None:
        """The licence has ended and everything is dead: stop claiming it (the fence calls this)."""
        self._book.expired()
        if self._renewing is not None:
            self._renewing.cancel()     # its answer would be about a licence that is no more
        self._announce()

    def confirm(self) -> None:
        """Something suggests that the record may not be ours any more: renew now, which shows it."""
        self._renew_now = True
        self._wake()

    @property
    def confirm_by(self) -> Deadline | None:
        """Until when a renewal must have confirmed the lock after a clock jump; None if none is owed."""
        return self._confirm_by

    def confirm_failed(self) -> bool:
        """Was a confirming renewal due after a clock jump, and is it overdue?"""
        return self._confirm_by is not None and remaining_s(self._confirm_by, self._clock.now()) <= 0

    def _notice_wall_jump(self) -> None:
        offset = self._clock.wall_s() - self._clock.now().boot_ns / 1e9
        jump_s, self._wall_offset = offset - self._wall_offset, offset
        if abs(jump_s) > WALL_JUMP_S and self.licence.valid_until is not None and not self.licence.endless:
            now = self._jumped_at = self._clock.now()
            self._confirm_by = now.plus_s(min(1.0, max(0.0, remaining_s(self.licence.valid_until, now))))
            log.warning("wall clock jumped, confirming the lock", jump_s=jump_s)
            self._changed()

    def _failed(self, why: str, *, silent: bool = False) -> None:
        if self.licence.state is not LicenceState.NONE and silent:
            self._outage.failing("lock", why)
        elif self.licence.state is not LicenceState.NONE and not self._told:
            self._told = True
            log.warning("lock is not renewed", why=why, state=str(self.licence.state))
        self._book.failing(self._clock.now(), why)
        self._changed()

    def _announce(self) -> None:
        self._changed()
        self._wake()

    def _wake(self) -> None:
        self._news.set()


def _is_leased(record: LockRecord) -> bool:
    """Does `leader` stand under a lease while this record is the holder's?"""
    return record.mixed and record.mode == "held"


_NOBODY = LockRecord(holder="nobody", node_id="", incarnation="", sequence=0, ttl_s=30.0)


def _epoch_number(entry: Entry | None) -> int:
    epoch = parse_epoch(entry.value) if entry is not None else None
    return epoch.number if epoch is not None else 0
