"""There is data, but no server: start it, rewind it, copy it anew, or hand over?"""

from __future__ import annotations

from msgspec.structs import replace

from pgha.clock import candidate_age_s, remaining_s
from pgha.decide import eligible, rejoin, restart, synchronous
from pgha.decide.common import (
    ask_others,
    backed_off,
    by_name,
    fresh_peers,
    leader_member,
    own_history,
    reason,
    source_of,
    view_of,
)
from pgha.decide.slots import own_slot_name
from pgha.decide.standing import Standing, Whose, because, licensed, standing
from pgha.model.action import (
    Action,
    Clone,
    Demote,
    InspectEndOfWal,
    InspectUpstream,
    LongAction,
    ReadCluster,
    Rewind,
    StartPrimary,
    StartStandby,
    Sweep,
)
from pgha.model.cluster import Member
from pgha.model.decision import Decision, Memory, Reason
from pgha.model.observation import Observation
from pgha.model.wal import Position, format_lsn

#: A hand-over that was refused, since it would lose something, is looked at again after this long.
JUDGE_AGAIN_S = 15.0


def decide(o: Observation, memory: Memory) -> Decision | None:
    if o.postgres.alive:
        return None
    if o.postgres.orphans:
        # Orphaned backends go on acknowledging commits from their input buffers (measured): nothing else comes first.
        return _one("killing what is left of a dead server", (reason("broken.no_orphans", False, "server processes live without a postmaster"),), Sweep(), memory)
    if licensed(o):
        return _as_leader(o, memory if memory.crash_seen_at else replace(memory, crash_seen_at=o.now))
    now = standing(o)
    if now.whose is Whose.SETTLING:
        return Decision(situation="broken", summary=now.because, reasons=(because(now),), memory=memory, wake_in_s=0.1)
    if now.whose is Whose.OWN_FORMER:
        return _own_former(o, memory, now)
    if now.whose is Whose.LIVE:
        return _rejoin(o, memory, now)
    return _start_standby(o, memory, (because(now), reason("broken.no_leader", True, "nobody to follow: starting to take part in an election")), None)


def _one(summary: str, reasons: tuple[Reason, ...], action: LongAction, memory: Memory) -> Decision:
    return Decision(situation="broken", summary=summary, reasons=reasons, actions=(action,), memory=memory)


# --- this node holds the lock ------------------------------------------------------------------------------------------

def _as_leader(o: Observation, memory: Memory) -> Decision:
    """PostgreSQL died under a leader: start it in place at once, no new timeline; hand over only where that loses nothing."""
    held = restart.lock_seen_held(o)
    if not held.holds:
        return Decision(situation="broken", summary=held.because, reasons=(held,), memory=memory, wake_in_s=0.0)
    ending = licence_was_renewed_since(o, memory)
    if not ending.holds:
        return Decision(situation="broken", summary=f"waiting for a renewal before starting again: {ending.because}", reasons=(ending,), memory=memory,
                        wake_in_s=0.2, state="stopped")
    conditions = restart.may_start_as_primary(o)
    handover = handover_conditions(o, memory)
    late = start_is_overdue(o, memory)
    if not late.holds:
        release = Demote(mode="kill", release=True, checkpoint=False, why=late.because, timeout_s=0.0)
        return _one(f"giving the lock to those who can use it: {late.because}", (*conditions, *handover, late), release, memory)
    judged = memory.handover_judged_at
    if handover[0].holds and (judged is None or candidate_age_s(judged, o.now) >= JUDGE_AGAIN_S):
        return _hand_over(o, memory, (*conditions, *handover))
    if not conditions[0].holds:
        # A standby's data: the lock was taken, and the server ended before its promotion.
        return _start_standby(o, memory, conditions, None)
    obstacle = next((c for c in conditions[1:] if not c.holds), None)
    if obstacle is not None:
        release = Demote(mode="kill", release=True, checkpoint=False, why=obstacle.because, timeout_s=0.0)
        return _one(f"giving the lock back: {obstacle.because}", conditions, release, memory)
    wait_s = min(5.0, backed_off(o, failures=memory.start_failures, last=memory.last_start_failed_at))
    if wait_s > 0:
        return Decision(situation="broken", summary=f"start failed {memory.start_failures} times, next try in {wait_s:.1f} s",
                        reasons=(*conditions, *handover), memory=memory, ask_peers=ask_others(o), wake_in_s=min(wait_s, 0.3), state="start failed")
    known, write, memory = synchronous.may_start(o, memory)
    if not known.holds:
        return Decision(situation="broken", summary=known.because, reasons=(*conditions, *handover, known), actions=write, memory=memory, wake_in_s=0.1, state="stopped")
    first = o.postgres.ever_started is False
    start = StartPrimary(timeout_s=o.settings.primary_start_timeout_s or 300.0, first_start=first, synchronous_names=synchronous.primary_names(o, memory))
    return Decision(situation="broken", summary="starting primary" if first else "starting primary after failure", reasons=(*conditions, *handover),
                    actions=(start,), memory=memory, ask_peers=ask_others(o), state="starting", role="primary")


def licence_was_renewed_since(o: Observation, memory: Memory) -> Reason:
    """After an orderly demotion for want of renewals, a start under the same sequence would only accept writes that the
    successor does not have."""
    demoted = memory.demoted_sequence
    return reason("broken.licence_was_renewed_since", not demoted or o.licence.sequence > demoted, f"demoted under sequence {demoted}, now {o.licence.sequence}")


def start_is_overdue(o: Observation, memory: Memory) -> Reason:
    """`primary_start_timeout` is over, and somebody eligible answers: no primary at all is worse than the async bound."""
    rule, limit_s = "broken.start_is_overdue", o.settings.primary_start_timeout_s
    age_s = candidate_age_s(memory.crash_seen_at, o.now) if memory.crash_seen_at else 0.0
    able = sorted(p.name for p in fresh_peers(o).values() if p.in_recovery and p.running and p.candidate and not p.tags.nofailover)
    if eligible.is_active(o):
        able = eligible.able_to_take_over(o, fresh_peers(o).values())
    if memory.restart_overdue:
        return reason(rule, not able, f"not back within the time that its restart was given, able to take over: {', '.join(able) or 'nobody'}")
    overdue = limit_s > 0 and age_s >= limit_s and bool(able)
    return reason(rule, not overdue, f"no primary for {age_s:.0f} s, primary_start_timeout {limit_s:g} s, able to take over: {', '.join(able) or 'nobody'}")


def handover_conditions(o: Observation, memory: Memory) -> tuple[Reason, ...]:
    """The first says whether handing over is due at all, the second to whom it would lose nothing."""
    crash_age_s = candidate_age_s(memory.crash_seen_at, o.now) if memory.crash_seen_at else 0.0
    settings = o.settings
    limit_s = 0.0 if settings.primary_start_timeout_s == 0 else settings.crash_handover_after_s
    due = bool(memory.crash_seen_at) and crash_age_s >= limit_s
    own_end, timeline = o.directory.end_of_wal, o.directory.end_of_wal_timeline
    if eligible.is_active(o):
        able = eligible.able_to_take_over(o, fresh_peers(o).values())
        return (
            reason("broken.handover_is_due", due, f"writes away for {crash_age_s:.1f} s, handed over after {limit_s:g} s"),
            reason("broken.handover_loses_nothing", bool(able), f"{', '.join(able) or 'nobody who answers'} may lead by /sync, which asks for {view_of(o).sync.quorum} votes"),
        )
    able = sorted(
        p.name for p in fresh_peers(o).values()
        if p.in_recovery and p.running and p.candidate and not p.tags.nofailover and not p.watchdog_failed
        and p.timeline == timeline and own_end and p.lsn >= own_end
    )
    return (
        reason("broken.handover_is_due", due, f"writes away for {crash_age_s:.1f} s, handed over after {limit_s:g} s"),
        reason("broken.handover_loses_nothing", bool(able), f"{', '.join(able)} have everything up to {format_lsn(own_end)}" if able
               else f"no eligible peer is known to have everything up to {format_lsn(own_end) if own_end else 'the end of WAL, not read yet'}"),
    )


def _hand_over(o: Observation, memory: Memory, reasons: tuple[Reason, ...]) -> Decision:
    if not o.directory.end_of_wal and not eligible.is_active(o):
        if o.ended is not None and o.ended.kind == "InspectEndOfWal" and not o.ended.ok:
            return Decision(situation="broken", summary="the end of WAL cannot be read: not handing over", reasons=reasons,
                            memory=replace(memory, handover_judged_at=o.now), ask_peers=ask_others(o), wake_in_s=0.0)
        return replace(_one("looking for the end of WAL before handing over", reasons, InspectEndOfWal(), memory), ask_peers=ask_others(o))
    if reasons[-1].holds:
        release = Demote(mode="kill", release=True, checkpoint=False, why=reasons[-1].because, timeout_s=0.0)
        return _one(f"handing over after a crash: {reasons[-1].because}", reasons, release, memory)
    return Decision(situation="broken", summary=f"not handing over, starting in place: {reasons[-1].because}", reasons=reasons,
                    memory=replace(memory, handover_judged_at=o.now), ask_peers=ask_others(o), wake_in_s=0.0)


def _own_former(o: Observation, memory: Memory, now: Standing) -> Decision:
    """The record is this node's own: go on as leader without an election, if the data bears it."""
    reaches = restart.own_wal_reaches_record(o)
    conditions = (*restart.readoption_conditions(o), *restart.may_start_as_primary(o)[1:], reaches)
    looked = o.ended is not None and o.ended.kind == "InspectEndOfWal" and not o.ended.ok
    if all(c.holds for c in conditions[:-1]) and not reaches.holds and not o.directory.end_of_wal and not looked:
        return _one("looking for the end of own WAL before adopting the lock record", (because(now), *conditions), InspectEndOfWal(), memory)
    if not all(c.holds for c in conditions):
        return _start_standby(o, memory, (because(now), *conditions), None)
    actions: tuple[Action, ...] = (restart.readopt(o),) if restart.read_in_this_pass(o).holds else (ReadCluster(),)
    return Decision(situation="broken", summary="adopting this node's own lock record", reasons=(because(now), *conditions), actions=actions,
                    memory=memory, wake_in_s=0.2)


# --- somebody else holds it --------------------------------------------------------------------------------------------

def _rejoin(o: Observation, memory: Memory, now: Standing) -> Decision:
    if now.record is not None and now.record.node_id == o.me.node_id:
        # It was not renewed in time, and nobody knows whether another has it by now: this node asks itself for nothing.
        over = reason("broken.record_is_anothers", False, f"this node's own licence is over, and its record is {now.because}")
        return Decision(situation="broken", summary=f"waiting for the store: {over.because}", reasons=(over,), memory=memory, wake_in_s=0.3, state="stopped")
    leader = leader_member(o, now.holder)
    upstream = o.upstream
    if leader is None or not leader.host:
        return _wait_for_upstream(memory, now, (because(now), reason("broken.leader_is_known", False, f"{now.holder} has no member key yet")))
    asked = memory.upstream_asked_at
    fresh = upstream is not None and upstream.name == leader.name and asked is not None and candidate_age_s(upstream.asked_at, o.now) < 10.0
    if not fresh or upstream is None or not upstream.ok or upstream.in_recovery:
        why = "not asked yet" if upstream is None or not fresh else upstream.why or "still in recovery"
        return _ask_upstream(o, memory, now, leader, reason("broken.leader_is_primary", False, f"{leader.name}: {why}"))
    control = o.directory.control
    if control is None:
        return Decision(situation="broken", summary="pg_control cannot be read", reasons=(reason("broken.control_is_readable", False, o.directory.why),),
                        memory=memory, wake_in_s=1.0)
    if upstream.system_identifier and upstream.system_identifier != control.system_identifier:
        differs = reason("broken.same_system", False, f"own {control.system_identifier}, {leader.name}'s {upstream.system_identifier}")
        return Decision(situation="broken", summary="the leader's system identifier differs", reasons=(differs,), memory=memory, wake_in_s=2.0)
    end_known = bool(o.directory.end_of_wal)
    own = _own_end(o)
    stopped_at = o.postgres.since
    asked_later = stopped_at is not None and asked is not None and remaining_s(asked, stopped_at) >= 0
    if own.timeline == upstream.timeline and own.lsn > upstream.lsn > 0 and not asked_later:
        # It was asked while this server still received: what it had then proves nothing.
        return _ask_upstream(o, memory, now, leader, reason("broken.upstream_was_asked_later", False, f"{leader.name} was asked before this server ended"))
    judged = (rejoin.interrupted() if o.directory.rewind_interrupted
              else rejoin.judge(own, own_history(o, own.timeline) or (), upstream, end_is_known=end_known, asked_later=asked_later))
    if judged.verdict is rejoin.Verdict.UNKNOWN:
        return _one("looking for the end of own WAL", (judged.because,), InspectEndOfWal(), memory)
    if judged.verdict is rejoin.Verdict.FOLLOW:
        return _start_standby(o, memory, (because(now), judged.because), leader)
    return _diverged(o, memory, leader, judged)


def _own_end(o: Observation) -> Position:
    """The furthest that this stopped server's WAL is known to go."""
    control = o.directory.control
    assert control is not None
    if o.directory.end_of_wal:
        return Position(timeline=o.directory.end_of_wal_timeline or control.timeline, lsn=o.directory.end_of_wal)
    if control.min_recovery_lsn and control.min_recovery_timeline >= control.timeline:
        return Position(timeline=control.min_recovery_timeline, lsn=max(control.min_recovery_lsn, control.redo_lsn))
    return Position(timeline=control.timeline, lsn=control.checkpoint_lsn)


def _diverged(o: Observation, memory: Memory, leader: Member, judged: rejoin.Judgement) -> Decision:
    conditions = rejoin.rewind_conditions(o, memory)
    permission = rejoin.clone_permission(o, memory)
    reasons = (judged.because, *conditions, permission)
    if judged.verdict is rejoin.Verdict.REWIND and all(c.holds for c in conditions):
        wait_s = backed_off(o, failures=memory.rewind_failures, last=memory.last_rewind_failed_at)
        if wait_s > 0:
            return Decision(situation="broken", summary=f"pg_rewind failed {memory.rewind_failures} times, next try in {wait_s:.1f} s", reasons=reasons,
                            memory=memory, wake_in_s=min(1.0, wait_s), state="stopped")
        return replace(_one(f"rewinding from {leader.name} with pg_rewind", reasons, Rewind(source=source_of(leader), why=judged.because.because), memory), state="stopped")
    if permission.holds:
        wait_s = backed_off(o, failures=memory.clone_failures, last=memory.last_clone_failed_at)
        identifier = view_of(o).initialize or ""
        if wait_s <= 0 and identifier:
            methods, by = eligible.copy_methods(o)
            clone = Clone(source=source_of(leader), system_identifier=identifier, replace="remove_first", why=judged.because.because, methods=methods)
            return replace(_one(f"copying anew from {leader.name} with {by_name(methods)}: {judged.because.because}", (*reasons, *by), clone, memory), state="creating replica")
        return Decision(situation="broken", summary=f"copying anew failed, next try in {wait_s:.1f} s", reasons=reasons, memory=memory, wake_in_s=max(0.2, wait_s))
    return Decision(situation="broken", summary=f"stays down: {judged.because.because}; {permission.because}", reasons=reasons, memory=memory,
                    wake_in_s=o.settings.loop_wait_s, state="stopped")


def _ask_upstream(o: Observation, memory: Memory, now: Standing, leader: Member, why: Reason) -> Decision:
    asked = memory.upstream_asked_at
    age_s = candidate_age_s(asked, o.now) if asked else 1e9
    if age_s >= 0.25 and leader.role == "primary":
        ask = InspectUpstream(source=source_of(leader))
        return Decision(situation="broken", summary=f"asking {leader.name} for its timeline", reasons=(why,), actions=(ask,),
                        memory=replace(memory, upstream_asked_at=o.now), wake_in_s=0.3)
    return _wait_for_upstream(memory, now, (because(now), why))


def _wait_for_upstream(memory: Memory, now: Standing, reasons: tuple[Reason, ...]) -> Decision:
    return Decision(situation="broken", summary=f"waiting for the leader to be a primary before joining it: {now.because}", reasons=reasons, memory=memory, wake_in_s=0.3,
                    state="stopped")


def _start_standby(o: Observation, memory: Memory, reasons: tuple[Reason, ...], leader: Member | None) -> Decision:
    if o.directory.rewind_interrupted:
        half = reason("broken.is_whole", False, "a rewind of this data was begun and not ended: it waits for a leader to be rewound from")
        return Decision(situation="broken", summary=half.because, reasons=(*reasons, half), memory=memory, wake_in_s=1.0, state="stopped")
    wait_s = backed_off(o, failures=memory.start_failures, last=memory.last_start_failed_at)
    if wait_s > 0:
        return Decision(situation="broken", summary=f"start failed {memory.start_failures} times, next try in {wait_s:.1f} s", reasons=reasons,
                        memory=memory, wake_in_s=min(1.0, wait_s), state="start failed")
    start = StartStandby(upstream=source_of(leader) if leader else None, slot_name=own_slot_name(o) if leader else "")
    summary = f"starting as a secondary of {leader.name}" if leader else "starting as a secondary of nobody"
    return replace(_one(summary, reasons, start, memory), state="starting", role="replica")
