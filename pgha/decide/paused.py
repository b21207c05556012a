"""Pause: an operator has the cluster in hand. What is left alone, and what goes on? (safety model 11, compatibility spec 18)

PostgreSQL's state changes only when somebody asks: a restart, a switchover or failover to a named member. A server that
was stopped stays stopped, a lost store ends nothing, nobody is elected. Books, member keys, lock and configuration go on.

Rules of this file:
* for the holder pause is in force once its lock record says so; until then it is a leader like any other;
* a lock is given back in pause only after the guard was told that this is a standby again;
* pgha never makes a second primary: another's record ends this node's primary in pause, too, and a standby that somebody
  promotes by hand is ended by its guard. Who is to lead is said by `failover --candidate`, which takes the lock first.
"""

from __future__ import annotations

from pgha.decide import failsafe, restart
from pgha.decide.common import leader_member, may_write, reason, source_of, view_of
from pgha.decide.slots import own_slot_name
from pgha.decide.standing import (
    Standing,
    Whose,
    adopts_predecessor,
    because,
    licensed,
    standing,
)
from pgha.model.action import (
    AcquireLock,
    Action,
    ApplyConfiguration,
    ReadCluster,
    ReleaseLock,
    Restart,
    StandDown,
)
from pgha.model.decision import Decision, Memory, Reason
from pgha.model.observation import Observation

#: While nobody leads, and while a record is absent, the store is asked this often by who might act on it.
READ_EVERY_S = 1.0


def wanted(o: Observation) -> bool:
    """Does the configuration ask for pause? A cluster that is still being made cannot be paused."""
    view = o.dcs.view
    return o.settings.pause and (view is None or view.initialized or view.config is not None)


def in_force(o: Observation) -> bool:
    """Wanted, and for the holder of the lock also committed: a pause in memory only is none."""
    return wanted(o) and (not licensed(o) or o.licence.endless)


def decide(o: Observation, memory: Memory) -> Decision | None:
    if not in_force(o):
        return None
    if not o.postgres.alive:
        return None if o.postgres.orphans or memory.ours_to_start else _server_is_down(o, memory)
    if licensed(o):
        return _holder(o, memory)
    now = standing(o) if o.dcs.view is not None else None
    if now is None:
        return None
    if now.whose is Whose.OWN_FORMER and now.record is not None and now.record.mode == "paused":
        return _readopt(o, memory, now, to="give it back, since PostgreSQL is in recovery")
    if now.whose is not Whose.FREE or may_stand(o).holds:
        return None
    return Decision(situation="paused", summary=f"nobody leads: {now.because}; in pause a member takes over only when it is named (failover --candidate)",
                    reasons=(because(now), may_stand(o)), actions=(*outlived(o, now), *_requests(o)), memory=memory, wake_in_s=o.settings.loop_wait_s)


# --- judgements ----------------------------------------------------------------------------------------------------------

def may_stand(o: Observation) -> Reason:
    """Replicas never promote by themselves in pause: the one that an operator named does, and the one that led last, once
    somebody has started its PostgreSQL again (data at rest is a standby here: it comes up in recovery)."""
    rule, view = "paused.may_stand", o.dcs.view
    if not wanted(o) or view is None:
        return reason(rule, True, "not paused")
    key, lock = view.failover, view.lock
    if key.candidate == o.me.name and not key.scheduled_at:
        return reason(rule, True, "paused, but an operator named this node")
    if lock is not None and lock.node_id == o.me.node_id and lock.mode != "paused":
        return reason(rule, True, "paused, but this node led last and its PostgreSQL was started again")
    return reason(rule, False, f"paused, and {'an operator named ' + key.candidate if key.candidate else 'nobody was named'}")


def leaves_running(o: Observation) -> bool:
    """Does PostgreSQL go on when the agent is told to stop? A primary only under a committed pause, which does not expire:
    this process's own, or its predecessor's, of which the guard was told, unless the store shows that it is over."""
    if not o.postgres.alive or not in_force(o):
        return False
    former = o.guard.state == "paused" and standing(o).whose in (Whose.UNKNOWN, Whose.OWN_FORMER, Whose.ABSENT)
    return licensed(o) or former or not may_write(o)


def without_record(o: Observation, now: Standing) -> bool:
    """A primary runs on under the guard's pause, and its record has vanished while no agent looked after it."""
    return o.guard.state == "paused" and wanted(o) and now.record is None and now.whose in (Whose.ABSENT, Whose.FREE)


def outlived(o: Observation, now: Standing) -> tuple[Action, ...]:
    """The guard still lets anything run here, under a pause of this node's that ended while no agent told it, and another
    has had the lock since: it is told that this is a standby, before somebody promotes that by hand."""
    another = now.record is not None and now.record.node_id != o.me.node_id and now.whose in (Whose.LIVE, Whose.FREE)
    if o.guard.state != "paused" or licensed(o) or not another or may_write(o) or o.directory.state != "valid":
        return ()
    return (StandDown(lsn=0, timeline=0, why=now.because),)


def take_as_primary(o: Observation, memory: Memory, now: Standing) -> Decision:
    """A running primary, and no record, in pause: it goes on, and takes the lock once absence counts; the first one wins.
    Or another agent of this node has left it with the leased key `leader`: that is as good as a record of its own."""
    view, row = view_of(o), o.postgres.row
    adopts = adopts_predecessor(o, now)
    actions: tuple[Action, ...] = (ReadCluster(),)
    if (adopts or now.whose is Whose.FREE) and restart.read_in_this_pass(o).holds and row is not None:
        actions = (AcquireLock(
            lock_revision=view.lock_revision, lock_value=view.lock_value, epoch_revision=view.revision_of("pgha/epoch"), epoch_number=view.epoch.number,
            paused=not adopts, mixed=o.settings.mixed, also_unchanged={key: view.revision_of(key) for key in ("sync", "failsafe", "config", "leader")},
            claim_timeline=row.timeline, claims=view.epoch.claims, lsn=row.position, timeline=row.timeline),)
    summary = f"adopting the primary that another agent has left: {now.because}" if adopts else f"continue to run as primary without lock: {now.because}"
    return Decision(situation="paused", summary=summary, reasons=(because(now), restart.guard_answers(o)),
                    actions=actions if restart.guard_answers(o).holds else (), memory=memory, wake_in_s=0.05 if adopts else READ_EVERY_S)


# --- what is done --------------------------------------------------------------------------------------------------------

def _holder(o: Observation, memory: Memory) -> Decision | None:
    row, view = o.postgres.row, o.dcs.view
    if row is None:
        return Decision(situation="paused", summary=f"holding the lock, PostgreSQL is {o.postgres.process} ({o.postgres.answer})", memory=memory, wake_in_s=0.5,
                        reasons=(reason("paused.server_answers", False, o.postgres.why or "no SQL answer yet"),))
    if not row.in_recovery:
        return None
    unread = view is None or view.revision < o.licence.revision
    if unread or (view is not None and view.epoch.number == o.licence.epoch and view.epoch.timeline > row.timeline):
        return None     # it took the lock because an operator named it, and is about to be promoted
    return _stand_down(o, memory, "postgres is not running as primary", wake_in_s=0.2)


def _server_is_down(o: Observation, memory: Memory) -> Decision:
    restarts = [r for r in o.requests if r.kind == "restart"]
    if restarts and o.directory.state == "valid":
        return Decision(situation="paused", summary="starting PostgreSQL as an operator asks", reasons=(_stays_down(o),), actions=_requests(o), memory=memory,
                        state="starting")
    if licensed(o):
        return _stand_down(o, memory, "postgres is not running", wake_in_s=0.5)
    now = standing(o)
    if now.whose is Whose.OWN_FORMER and now.record is not None and now.record.mode == "paused" and o.directory.state != "unknown":
        return _readopt(o, memory, now, to="give it back, since PostgreSQL is stopped")
    empty = o.directory.state in ("missing", "empty")
    return Decision(situation="paused", summary="running with empty data directory" if empty else f"postgres is not running: {_stays_down(o).because}",
                    reasons=(because(now), _stays_down(o)), actions=(*outlived(o, now), *_requests(o)), memory=memory, wake_in_s=o.settings.loop_wait_s, state="" if empty else "stopped")


def _stays_down(o: Observation) -> Reason:
    if o.guard.state == "latched":
        return reason("paused.stays_down", True, "the guard ended a server that no lock covers; in pause, too, members are promoted by failover --candidate, "
                      "never by hand; restart MEMBER or resume starts it as a standby")
    return reason("paused.stays_down", True, "a server that was stopped stays so in pause; restart MEMBER or resume starts it")


def _stand_down(o: Observation, memory: Memory, why: str, *, wake_in_s: float) -> Decision:
    """The lock without a primary is of use to nobody: give it back, so that a member that is named may take it at once."""
    lock, control, row = (o.dcs.view.lock if o.dcs.view else None), o.directory.control, o.postgres.row
    known = [(row.position, row.timeline)] if row is not None and o.postgres.alive else []
    known += [(lock.lsn, lock.timeline)] if lock is not None and lock.node_id == o.me.node_id else []
    known += [(control.checkpoint_lsn, control.timeline)] if control is not None else []
    lsn, timeline = max(known, default=(0, 0))
    asked = _requests(o)
    down = () if any(isinstance(action, Restart) for action in asked) else (give_back(o, lsn=lsn, timeline=timeline, why=why),)    # a restart comes last, and alone
    return Decision(situation="paused", summary=f"removed leader lock because {why}", reasons=(reason("paused.leads", False, why),), memory=memory,
                    actions=(*asked, *down), wake_in_s=wake_in_s, state="" if o.postgres.alive else "stopped")


def give_back(o: Observation, *, lsn: int, timeline: int, why: str) -> StandDown | ReleaseLock:
    """Data that is at rest as a standby, which the guard is told first; where there is none, or no disk that answers, the
    guard is latched by the release itself."""
    if o.directory.state in ("missing", "empty", "partial", "unreadable") and not o.postgres.alive:
        return ReleaseLock(lsn=lsn, timeline=timeline, why=why)
    return StandDown(lsn=lsn, timeline=timeline, why=why)


def _readopt(o: Observation, memory: Memory, now: Standing, *, to: str) -> Decision:
    conditions = (because(now), restart.guard_answers(o), failsafe.nothing_is_promised(o))
    go = restart.read_in_this_pass(o).holds and conditions[1].holds and conditions[2].holds
    return Decision(situation="paused", summary=f"adopting this node's own paused lock record, to {to}", reasons=conditions, memory=memory,
                    actions=(restart.readopt(o),) if go else (ReadCluster(),), wake_in_s=0.5)


def _requests(o: Observation) -> tuple[Action, ...]:
    """What operators and the configuration ask of a node that does not lead: a restart is in recovery."""
    actions: list[Action] = [ApplyConfiguration()] if o.settings.configuration_changed and o.postgres.alive else []
    leader = leader_member(o, view_of(o).leader) if o.dcs.view is not None else None
    upstream = source_of(leader) if leader is not None and leader.host and leader.name != o.me.name else None
    for request in o.requests:
        if request.kind == "restart" and o.directory.state == "valid":
            timeout_s = float(request.options.get("timeout_s") or o.settings.primary_start_timeout_s or 300.0)
            actions.append(Restart(as_primary=False, timeout_s=timeout_s, before_stop_s=o.settings.before_stop_s, request_id=request.id, upstream=upstream, slot_name=own_slot_name(o) if upstream else ""))
            break
    return tuple(actions)
