"""Whose is the lock, as far as this node may believe? (safety model 3 and 4)"""

from __future__ import annotations

from enum import StrEnum

from msgspec import Struct

from pgha.clock import candidate_age_s, remaining_s
from pgha.model.cluster import PausedHolder
from pgha.model.decision import Reason
from pgha.model.failsafe import Promise
from pgha.model.lock import LicenceState, LockRecord, wait_s
from pgha.model.observation import Observation

#: An absent record is not free before this long a time of absence, whatever the ttl (safety model 4).
ABSENCE_S = 30.0


class Whose(StrEnum):
    """Every way that the lock can stand."""

    UNKNOWN = "unknown"            # the store was not read yet
    SETTLING = "settling"          # a take-over of ours was sent, its outcome is not known yet
    MINE = "mine"                  # a valid licence of this incarnation
    OWN_FORMER = "own_former"      # this node's record, of an earlier incarnation (or released by nobody): to be re-adopted
    IMPOSTOR = "impostor"          # another node's, under this node's name
    LIVE = "live"                  # somebody's, not expired on this node's clock
    FREE = "free"                  # released or expired: may be taken by a CAS on exactly this record
    ABSENT = "absent"              # no record, and not long enough
    NEVER = "never"                # no record, and the cluster was never initialised


class Standing(Struct, frozen=True, kw_only=True):
    """`left_s`: until a live record expires or an absent one counts as free, on this node's clock; 0 where it does not apply."""

    whose: Whose
    because: str
    record: LockRecord | None = None
    left_s: float = 0.0

    @property
    def holder(self) -> str:
        return self.record.holder if self.record else ""


def standing(o: Observation) -> Standing:
    """How the lock stands now."""
    licence = o.licence
    if licensed(o):
        return Standing(whose=Whose.MINE, because=licence_left(o), record=o.dcs.view.lock if o.dcs.view else None)
    if o.dcs.view is None:
        return Standing(whose=Whose.UNKNOWN, because="the store has not been read yet")
    if licence.state is LicenceState.ACQUIRING:
        return Standing(whose=Whose.SETTLING, because="a take-over was sent, its outcome is not known yet")
    seen = o.dcs.lock_seen
    untrusted_s = 0.0 if o.dcs.trusted_from is None else max(0.0, remaining_s(o.dcs.trusted_from, o.now))
    record = seen.record
    given = o.failsafe.promise
    if given is not None and given.name and given.binds(record, o.now) and (record is None or record.node_id != o.me.node_id):
        return _promised(o, given)
    return _beside_leader_key(o, _by_record(o, record, untrusted_s), trusted=untrusted_s <= 0)


def _by_record(o: Observation, record: LockRecord | None, untrusted_s: float) -> Standing:
    """As the lock record alone has it."""
    licence, seen = o.licence, o.dcs.lock_seen
    if record is None:
        return _absent(o, untrusted_s)
    age_s = candidate_age_s(seen.since, o.now) if seen.since else 0.0
    live = record.mode == "paused" or (record.mode == "held" and age_s < _expiry_s(o, record))
    if record.holder == o.me.name and record.node_id not in ("", o.me.node_id) and live:
        return Standing(whose=Whose.IMPOSTOR, because=f"another node (id {record.node_id}) holds the lock under the name {record.holder}", record=record)
    if untrusted_s > 0:
        return Standing(whose=Whose.LIVE, record=record, left_s=untrusted_s,
                        because=f"{o.dcs.generation_changed}: no record is believed for another {untrusted_s:.1f} s")
    if record.mode != "paused" and (paused := _another_may_be_paused(o)) is not None:
        return Standing(whose=Whose.LIVE, record=record, left_s=1e9,
                        because=f"the store was restored, and {paused.name} held the lock in pause before: it does not expire")
    if record.mode == "released":
        return Standing(whose=Whose.FREE, because=f"released by {record.holder}", record=record)
    if record.node_id == o.me.node_id and (record.incarnation != o.me.incarnation or licence.state is LicenceState.NONE
                                           or record.mode == "paused"):
        # Of an earlier process, of this one whose licence ran out before anybody took over, or a paused one, which would
        # stand for ever: its release got lost, or the store was restored to it after the licence was over (an exact
        # compare lets only one of two writes happen).
        return Standing(whose=Whose.OWN_FORMER, because="this node's own record, without a valid licence", record=record)
    left = _expiry_s(o, record) - age_s
    if record.mode == "paused":
        return _paused(o, record, left)
    if left <= 0:
        return Standing(whose=Whose.FREE, record=record,
                        because=f"{record.holder or 'unknown'}'s record was seen unchanged for {age_s:.2f} s, ttl {record.ttl_s:g} s")
    return Standing(whose=Whose.LIVE, because=f"held by {record.holder or 'unknown'}, expires in {left:.1f} s unless renewed", record=record, left_s=left)


def _beside_leader_key(o: Observation, now: Standing, *, trusted: bool) -> Standing:
    """A leased key `leader` is a lock of its own: both must be free (safety model 14)."""
    view, record = o.dcs.view, now.record
    assert view is not None
    if view.leader_lease and view.leader != o.me.name:
        holds = now.whose is Whose.LIVE and record is not None and record.holder == view.leader
        if holds or now.whose is Whose.IMPOSTOR:
            return now
        return Standing(whose=Whose.LIVE, because=f"{view.leader} holds the key leader under a lease", record=_outsider(o, view.leader), left_s=1e9)
    own = record is not None and record.node_id == o.me.node_id
    if view.leader_lease and not (own and record is not None and record.mixed):
        return Standing(whose=Whose.LIVE, because="this node's name stands in the key leader, under a lease of another agent's", record=_outsider(o, o.me.name), left_s=1e9)
    if now.whose is Whose.OWN_FORMER and record is not None and record.mixed and view.leader != o.me.name:
        return Standing(whose=Whose.FREE, because="this node's own record stands, but its key leader is gone: another may have led since", record=record)
    outsider = o.dcs.outsider
    left = outsider is not None and record is not None and outsider.name == record.holder and record.mode == "paused" and not own
    if left and trusted and not view.leader and record is not None and now.whose is Whose.LIVE:
        # Its node was handed over in pause, as on the way back to Patroni: there is no holder of ours that might write.
        return Standing(whose=Whose.FREE, because=f"{record.holder}'s node was left to an agent of another make in pause, which led last, and has the key no more", record=record)
    return now


def _outsider(o: Observation, name: str) -> LockRecord:
    return LockRecord(holder=name, node_id="", incarnation="", sequence=0, ttl_s=o.settings.ttl_s)


def adopts_predecessor(o: Observation, now: Standing) -> bool:
    """Does a primary run here under a leased `leader` of this name, that another agent of this node has left, and no pgha
    node's record in the way? Then both are adopted together: the transaction compares that very key (safety model 14)."""
    view, seen = o.dcs.view, o.dcs.lock_seen
    if view is None or not view.leader_lease or view.leader != o.me.name or now.whose is not Whose.LIVE:
        return False
    if o.dcs.trusted_from is not None and remaining_s(o.dcs.trusted_from, o.now) > 0:
        return False
    by_record = _by_record(o, seen.record, 0.0)
    return by_record.whose is Whose.FREE or (seen.record is None and view.epoch.number == 0)


def _promised(o: Observation, given: Promise) -> Standing:
    """A leader without the store asked us not to take over: it leads, whatever the store says, until that has passed."""
    asking = LockRecord(holder=given.name, node_id="", incarnation=given.incarnation, sequence=given.sequence, ttl_s=given.ttl_s)
    left = given.left_s(o.now)
    return Standing(whose=Whose.LIVE, record=asking, left_s=left, because=f"{given.name} leads by failsafe mode: promised not to take over for another {left:.1f} s")


def _expiry_s(o: Observation, record: LockRecord) -> float:
    """How long a record must be seen unchanged. One that does not parse may have any ttl: the longest that is known."""
    unreadable = not record.holder and not record.node_id
    return wait_s(max(record.ttl_s, o.dcs.remembered_ttl_s, o.settings.ttl_s, ABSENCE_S) if unreadable else record.ttl_s)


def _another_may_be_paused(o: Observation) -> PausedHolder | None:
    """Another node held the lock in pause when the record could last be believed: it may be writing, whatever stands in its
    place now, until an operator states to this node that it is down."""
    view, paused = o.dcs.view, o.dcs.remembered_pause
    if view is None or paused is None or paused.node_id == o.me.node_id:
        return None
    said_down = view.failover.candidate == o.me.name and view.failover.down_incarnation == paused.incarnation
    return None if said_down else paused


def _paused(o: Observation, record: LockRecord, left: float) -> Standing:
    """Does not expire. An operator may state that its holder is down, of exactly this record, to the member named: it then
    counts as any other that is not renewed. A holder that lives renews it, and the statement is void."""
    view = o.dcs.view
    assert view is not None
    key = view.failover
    if key.candidate != o.me.name or not key.down_incarnation:
        return Standing(whose=Whose.LIVE, because=f"held by {record.holder} in pause: does not expire", record=record, left_s=1e9)
    if (key.down_incarnation, key.down_sequence) != (record.incarnation, record.sequence):
        return Standing(whose=Whose.LIVE, record=record, left_s=1e9,
                        because=f"held by {record.holder} in pause, which was said to be down, but has renewed the lock since (sequence {record.sequence}, then {key.down_sequence})")
    if still_sends(o, record.holder):
        return Standing(whose=Whose.LIVE, because=f"held by {record.holder} in pause, said to be down, but its PostgreSQL still sends WAL to this node", record=record, left_s=1e9)
    if left > 0:
        return Standing(whose=Whose.LIVE, record=record, left_s=left,
                        because=f"held by {record.holder} in pause, said to be down: counts as expired in {left:.1f} s unless renewed")
    return Standing(whose=Whose.FREE, because=f"held by {record.holder} in pause, said to be down by an operator", record=record)


def still_sends(o: Observation, holder: str) -> bool:
    """Does this standby stream from `holder`'s server? In pause that may go on without an agent: what does not answer and
    does not renew need not be down."""
    row, view = o.postgres.row, o.dcs.view
    if row is None or view is None or not o.postgres.alive or row.receiver is None or row.receiver.status != "streaming":
        return False
    sender = (row.receiver.sender_host, row.receiver.sender_port)
    return sender not in {(m.host, m.port) for m in view.members.values() if m.name not in (holder, o.me.name)}


def _absent(o: Observation, untrusted_s: float) -> Standing:
    view = o.dcs.view
    assert view is not None
    # Only a node without data may believe that there never was a cluster: data is somebody's, and may be being served.
    no_data = o.directory.state in ("missing", "empty")
    never = no_data and view.initialize is None and not o.dcs.remembered_ttl_s and view.epoch.number == 0 and untrusted_s <= 0
    if never and not any(p.answered and p.system_identifier for p in o.peers.values()):
        return Standing(whose=Whose.NEVER, because="the cluster was never initialised")
    needed_s = wait_s(max(o.dcs.remembered_ttl_s, o.settings.ttl_s, ABSENCE_S))
    outsider = o.dcs.outsider
    if outsider is not None and outsider.alone and not view.leader and untrusted_s <= 0 and _another_may_be_paused(o) is None:
        return Standing(whose=Whose.FREE, because=f"{outsider.name}, of another make, led by the key leader alone, and has it no more")
    since = o.dcs.lock_seen.absent_since
    age_s = candidate_age_s(since, o.now) if since else 0.0
    left = max(needed_s - age_s, untrusted_s)
    if (paused := _another_may_be_paused(o)) is not None:
        return Standing(whose=Whose.ABSENT, because=f"no record, and {paused.name} held the last one in pause: absence does not end that", left_s=1e9)
    if left <= 0:
        return Standing(whose=Whose.FREE, because=f"no record for {age_s:.1f} s, {needed_s:.1f} s needed")
    return Standing(whose=Whose.ABSENT, because=f"no record for {age_s:.1f} s, {needed_s:.1f} s needed", left_s=left)


def licensed(o: Observation) -> bool:
    """Is there a committed record of this incarnation whose validity has not passed?"""
    licence = o.licence
    return licence.state is LicenceState.HELD and licence.valid_until is not None and remaining_s(licence.valid_until, o.now) > 0


def left_s(o: Observation) -> float:
    """Seconds of the licence left; 0 without one."""
    until = o.licence.valid_until
    return 0.0 if until is None else max(0.0, remaining_s(until, o.now))


def licence_left(o: Observation) -> str:
    """How long the licence lasts, in words."""
    return "licence without an end: pause" if o.licence.endless else f"licence valid for {left_s(o):.1f} s"


def because(standing_now: Standing) -> Reason:
    """The standing as a reason."""
    return Reason(rule=f"standing.{standing_now.whose}", holds=True, because=standing_now.because)
