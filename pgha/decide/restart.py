"""May this node go on under its own former record, and may its data start as primary without a new timeline?"""

from __future__ import annotations

from pgha.clock import holder_age_s
from pgha.decide import failsafe
from pgha.decide.common import reason, view_of
from pgha.model.action import AcquireLock
from pgha.model.decision import Reason
from pgha.model.node import Control
from pgha.model.observation import Observation
from pgha.model.wal import format_lsn

#: A linearizable read counts as "in this pass" if it was begun within this time.
THIS_PASS_S = 0.5


def read_in_this_pass(o: Observation) -> Reason:
    """What is taken must have been read linearizably just now."""
    age_s = holder_age_s(o.dcs.read_at, o.now) if o.dcs.read_at else 1e9
    return reason("restart.read_in_this_pass", age_s <= THIS_PASS_S,
                  "never read" if o.dcs.read_at is None else f"last read {age_s:.2f} s ago, limit {THIS_PASS_S} s")


def readoption_conditions(o: Observation) -> tuple[Reason, ...]:
    """Asked of a node whose own earlier incarnation wrote the record that stands."""
    return (data_is_not_behind_record(o), guard_answers(o), failsafe.nothing_is_promised(o))


def data_is_not_behind_record(o: Observation) -> Reason:
    """A data directory restored from a backup must not go on as if it were the primary that wrote the record."""
    rule = "restart.data_is_not_behind_record"
    record = view_of(o).lock
    if record is None:
        return reason(rule, False, "there is no record")
    row, control = o.postgres.row, o.directory.control
    if row is not None and o.postgres.alive:
        timeline, lsn = row.timeline, row.position
    elif control is not None:
        # Not the end of its WAL, which crash recovery finds; the last checkpoint at least must not contradict.
        timeline, lsn = newest_timeline(control), max(control.checkpoint_lsn, o.directory.end_of_wal)
    else:
        return reason(rule, False, "the data directory has no readable pg_control")
    if record.timeline and timeline < record.timeline:
        return reason(rule, False, f"data on timeline {timeline}, the record says {record.timeline}")
    if o.postgres.alive and row is not None and not row.in_recovery and lsn < record.lsn:
        return reason(rule, False, f"data at {format_lsn(lsn)}, the record says {format_lsn(record.lsn)}")
    return reason(rule, True, f"timeline {timeline}, record's {record.timeline}")


def own_wal_reaches_record(o: Observation) -> Reason:
    """What the record says was flushed here: a stopped server whose WAL ends before it has got other data since, from a
    backup. Started in place it would write the same timeline once more, where its standbys have the first."""
    rule, record, control = "restart.own_wal_reaches_record", view_of(o).lock, o.directory.control
    if record is None or control is None or o.postgres.alive or not record.lsn or newest_timeline(control) != record.timeline:
        return reason(rule, True, "nothing to compare")
    end = max(control.checkpoint_lsn, o.directory.end_of_wal if o.directory.end_of_wal_timeline == record.timeline else 0)
    known = "" if o.directory.end_of_wal else " at least"
    return reason(rule, end >= record.lsn, f"own WAL goes{known} to {format_lsn(end)}, the record says {format_lsn(record.lsn)}")


def guard_answers(o: Observation) -> Reason:
    """Without the guard no primary runs."""
    return reason("restart.guard_answers", o.guard.reachable, f"guard is {o.guard.state}" if o.guard.reachable else f"guard does not answer: {o.guard.why}")


def readopt(o: Observation) -> AcquireLock:
    """The CAS by which a new incarnation goes on with its node's record: no takeover, the epoch stays, and nor is the
    position that was published taken back before a server answers: others judge their lag against it."""
    view = view_of(o)
    row, directory = o.postgres.row, o.directory
    known = [(view.lock.lsn, view.lock.timeline)] if view.lock is not None else []
    known += [(directory.end_of_wal, directory.end_of_wal_timeline)] if directory.end_of_wal else []
    known += [(0, directory.control.timeline)] if directory.control is not None else []
    lsn, timeline = (row.position, row.timeline) if row else max(known, default=(0, 0))
    mixed = view.lock is not None and view.lock.mixed
    return AcquireLock(
        lock_revision=view.lock_revision, lock_value=view.lock_value, epoch_revision=view.revision_of("pgha/epoch"),
        epoch_number=view.epoch.number, readopt=True, mixed=mixed, also_unchanged={"leader": view.revision_of("leader")} if mixed else {},
        paused=view.lock is not None and view.lock.mode == "paused", claim_timeline=view.epoch.timeline, claims=view.epoch.claims, lsn=lsn, timeline=timeline,
    )


def newest_timeline(control: Control) -> int:
    """After a promotion pg_control's checkpoint is of the former timeline until the next one is done; its minimum recovery
    point knows the new one from the start (measured on PostgreSQL 15)."""
    return max(control.timeline, control.min_recovery_timeline)


def may_start_as_primary(o: Observation) -> tuple[Reason, ...]:
    """Start in place: only data that was a primary's, on the newest timeline that anybody knows of."""
    return (was_primary(o), timeline_is_current(o), is_whole(o))


def lock_seen_held(o: Observation) -> Reason:
    """Whatever begins a primary is decided in a later pass than the one that acquired the lock."""
    acquired = o.licence.acquired_pass
    return reason("restart.lock_seen_held", acquired < o.number, f"acquired in pass {acquired}, this is pass {o.number}")


def is_whole(o: Observation) -> Reason:
    half = o.directory.rewind_interrupted
    return reason("restart.is_whole", not half, "a rewind of this data was begun and not ended" if half else "no rewind was interrupted")


def was_primary(o: Observation) -> Reason:
    control = o.directory.control
    state = control.state if control else "unknown"
    return reason("restart.was_primary", control is not None and "recovery" not in state.replace("in crash recovery", ""),
                  f"pg_control says: {state}")


def timeline_is_current(o: Observation) -> Reason:
    view, control = view_of(o), o.directory.control
    own = newest_timeline(control) if control else 0
    # A promotion of this epoch that died half way leaves pg_control behind the claim: then it is a standby's start.
    return reason("restart.timeline_is_current", own >= view.timeline, f"own timeline {own}, the cluster's {view.timeline}")
