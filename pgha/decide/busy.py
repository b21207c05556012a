"""A long operation is in flight: let it go on, or end it?"""

from __future__ import annotations

from pgha.clock import candidate_age_s
from pgha.decide import eligible, mixed, switchover
from pgha.decide.common import ask_others, fence_in_s, fresh_peers, reason
from pgha.decide.standing import Whose, licensed, standing
from pgha.model.action import CancelOperation
from pgha.model.decision import Decision, Memory, PeerQuestion, Reason
from pgha.model.observation import BEFORE_STOP, Observation, Operation

#: Operations that bring up a server that accepts writes, or keep one: they end when the licence does.
NEEDS_LICENCE = ("PrePromote", "Promote", "StartPrimary")


def decide(o: Observation, memory: Memory) -> Decision | None:
    operation = o.operation
    if operation is None:
        return None
    reasons = [
        reason("busy.in_flight", True, f"{operation.kind} for {candidate_age_s(operation.started_at, o.now):.1f} s {operation.progress}".strip()),
        licence_suffices(o, operation),
        still_wanted(o, memory, operation),
        crash_is_not_handed_over(o, memory, operation),
    ]
    drains = hands_over_later(o, operation)
    if drains:
        reasons.append(switchover.is_still_asked_for(o, memory))
    obstacles = [r for r in reasons if not r.holds]
    # What has begun to stop is stopped: too late to end it.
    only_while = BEFORE_STOP if drains else ""
    cancel = () if not obstacles or operation.cancelling else (CancelOperation(id=operation.id, why=obstacles[0].because, while_in=only_while),)
    # Whoever looks for the end of WAL compares it with the others' positions in the next pass: what they said must not be forgotten.
    ask = ask_others(o) if (operation.detail.startswith(switchover.WHY) or operation.kind in ("StartPrimary", "InspectEndOfWal")) and o.dcs.view is not None else PeerQuestion()
    return Decision(
        situation="busy", summary=f"{operation.kind.lower()} in progress" + (": ending it" if obstacles else ""),
        reasons=tuple(reasons), actions=cancel, memory=memory, ask_peers=ask, wake_in_s=min(0.25 if drains else 1.0, o.settings.loop_wait_s, _free_in_s(o, operation)),
    )


def hands_over_later(o: Observation, operation: Operation) -> bool:
    """Does the leader's server still serve before a switchover, while before_stop runs?"""
    return operation.kind == "Demote" and operation.progress == BEFORE_STOP and operation.detail.startswith(switchover.WHY) and o.dcs.view is not None


def _free_in_s(o: Observation, operation: Operation) -> float:
    """When the clock alone would end a question to the leader's server. Infinity: it will not."""
    left_s = standing(o).left_s if operation.kind == "InspectUpstream" and o.dcs.view is not None else 0.0
    return max(0.02, left_s) if left_s > 0 else float("inf")


def licence_suffices(o: Observation, operation: Operation) -> Reason:
    """Whatever makes a primary ends with the licence."""
    needed = operation.kind in NEEDS_LICENCE
    holds = not needed or (licensed(o) and fence_in_s(o) > 0)
    return reason("busy.licence_suffices", holds, f"{fence_in_s(o):.1f} s to the fence" if needed else "needs no licence")


def still_wanted(o: Observation, memory: Memory, operation: Operation) -> Reason:
    """A stop of the agent ends what can be begun again later; a clone or rewind ends when its leader is gone, a copy that replaces
    good data when nobody leads: the cluster may have to go on with what it would replace. So does the question to a leader's
    server as soon as its lock is free: a host that is gone may leave it without an answer for seconds, in which this member
    could neither vote nor lead."""
    if o.shutting_down and operation.kind in ("Bootstrap", "Clone", "PrePromote", "InspectUpstream", "InspectEndOfWal"):
        return reason("busy.still_wanted", False, "the agent is stopping")
    if operation.kind in ("Clone", "Rewind") and o.dcs.view is not None and standing(o).whose is Whose.MINE:
        return reason("busy.still_wanted", False, "this node holds the lock itself")
    if operation.kind == "Clone" and memory.reinit is not None and o.dcs.view is not None and standing(o).whose is Whose.FREE:
        return reason("busy.still_wanted", False, f"nobody leads: {standing(o).because}")
    if operation.detail == mixed.QUESTION:
        return reason("busy.still_wanted", True, "what is asked of a member of another make that led last, within a second")
    if operation.kind == "InspectUpstream" and o.dcs.view is not None and (now := standing(o)).whose is Whose.FREE:
        return reason("busy.still_wanted", False, f"whoever was asked does not lead any more: {now.because}")
    return reason("busy.still_wanted", True, "nothing speaks against it")


def crash_is_not_handed_over(o: Observation, memory: Memory, operation: Operation) -> Reason:
    """A start in place that takes long is ended if a peer seems to have everything (safety model 10)."""
    rule = "busy.crash_is_not_handed_over"
    if operation.kind != "StartPrimary" or memory.crash_seen_at is None or memory.handover_judged_at is not None or o.dcs.view is None:
        return reason(rule, True, "no start in place after a crash")
    age_s, limit_s = candidate_age_s(memory.crash_seen_at, o.now), o.settings.crash_handover_after_s
    if age_s < limit_s:
        return reason(rule, True, f"writes away for {age_s:.1f} s, handed over after {limit_s:g} s")
    lock = o.dcs.view.lock
    known = max(o.dcs.view.status.optime, lock.lsn if lock else 0)
    able = [p.name for p in fresh_peers(o).values() if p.in_recovery and not p.tags.nofailover and p.lsn >= known > 0]
    if eligible.is_active(o):
        able = eligible.able_to_take_over(o, fresh_peers(o).values())
    if not able:
        return reason(rule, True, f"writes away for {age_s:.1f} s, but no peer has what was published")
    return reason(rule, False, f"writes away for {age_s:.1f} s (limit {limit_s:g} s), and {', '.join(sorted(able))} may take over")
