"""PostgreSQL may accept writes: is this node's licence provably valid, and for long enough? (safety model 3, 8, 10)

This is the orderly one of three independent paths; lock/fence.py and the guard act at the deadline whatever happens here.
"""

from __future__ import annotations

from msgspec.structs import replace

from pgha.clock import Instant, holder_age_s, remaining_s
from pgha.decide import failsafe, paused, restart
from pgha.decide.common import fence_in_s, may_write, reason
from pgha.decide.standing import Whose, adopts_predecessor, because, left_s, licensed, standing
from pgha.model.action import Action, Demote, ReadCluster
from pgha.model.decision import Decision, Memory, Reason
from pgha.model.lock import demote_at
from pgha.model.node import PostgresFacts
from pgha.model.observation import Observation

#: The next pass is no sooner, so that it finds what it waited for on whichever side of the moment it wakes.
MOMENT_S = 0.01


def decide(o: Observation, memory: Memory) -> Decision | None:
    if not may_write(o):
        return None
    if licensed(o):
        return _while_licensed(o, memory)
    now = standing(o)
    if paused.without_record(o, now) or adopts_predecessor(o, now):
        return paused.take_as_primary(o, memory, now)
    reasons = (because(now), licence_is_valid(o))
    if now.whose in (Whose.UNKNOWN, Whose.SETTLING):
        # The guard ends this at the deadline that it knows; until then the store may still answer.
        return Decision(situation="lease", summary="a primary runs, waiting to learn whose the lock is", reasons=reasons, memory=memory, wake_in_s=0.1)
    if now.whose is Whose.OWN_FORMER:
        return _readopt(o, memory, reasons)
    demote = Demote(mode="kill" if now.whose is Whose.LIVE else "fast", release=False, checkpoint=False, why=f"no licence to accept writes: {now.because}", timeout_s=2.0)
    return Decision(situation="lease", summary=f"demoting: {now.because}", reasons=reasons, actions=(demote,), memory=memory)


def _while_licensed(o: Observation, memory: Memory) -> Decision | None:
    if o.licence.endless:
        return None     # pause: neither a silent store nor a server that hangs ends it
    reasons = (licence_lasts(o), server_answers(o))
    if all(r.holds for r in reasons):
        return None
    if not reasons[1].holds:
        demote = Demote(mode="kill", release=True, checkpoint=False, why=reasons[1].because, timeout_s=0.0)
        return Decision(situation="lease", summary=f"PostgreSQL hangs, handing over: {reasons[1].because}", reasons=reasons, actions=(demote,), memory=memory)
    # The lock is not released, since the store does not answer: whoever reaches it takes the lock over when it expires.
    demote = Demote(mode="fast", release=False, checkpoint=False, why=reasons[0].because, timeout_s=max(0.1, fence_in_s(o) - 0.2))
    return Decision(situation="lease", summary=f"demoting: {reasons[0].because}", reasons=reasons, actions=(demote,),
                    memory=replace(memory, demoted_sequence=o.licence.sequence))


def _readopt(o: Observation, memory: Memory, reasons: tuple[Reason, ...]) -> Decision:
    if o.postgres.row is None:
        # The guard still counts down what the former incarnation was licensed for; until then the server may answer.
        return Decision(situation="lease", summary="a primary runs under this node's former record: waiting for its position", reasons=reasons, memory=memory,
                        wake_in_s=0.05)
    conditions = restart.readoption_conditions(o)
    if not all(c.holds for c in conditions):
        demote = Demote(mode="fast", release=False, checkpoint=False, why="this node's former record cannot be adopted", timeout_s=2.0)
        return Decision(situation="lease", summary="demoting: " + next(c.because for c in conditions if not c.holds),
                        reasons=(*reasons, *conditions), actions=(demote,), memory=memory)
    actions: tuple[Action, ...] = (restart.readopt(o),) if restart.read_in_this_pass(o).holds else (ReadCluster(),)
    return Decision(situation="lease", summary="a primary runs under this node's former record: adopting it", reasons=(*reasons, *conditions),
                    actions=actions, memory=memory, wake_in_s=0.1)


def judged_again_in_s(o: Observation) -> float:
    """When the clock alone will change this judgement: no news would wake the loop for that. Infinity: it will not."""
    licence, postgres = o.licence, o.postgres
    if not licensed(o) or licence.endless or not may_write(o):
        return float("inf")
    since = postgres.answered_at or postgres.since
    hangs_in_s = o.settings.primary_hang_timeout_s - holder_age_s(since, o.now) if since else float("inf")
    left_s = min((s for s in (_demotion_in_s(o), hangs_in_s) if s > 0), default=float("inf"))
    return max(MOMENT_S, left_s)


def _demotion_in_s(o: Observation) -> float:
    licence = o.licence
    assert licence.valid_until is not None
    assert licence.since is not None
    # A write that shortens the licence has just been sent: it is to have its time to be answered, too, or every smaller
    # ttl would end the primary.
    begin = demote_at(licence.valid_until, licence.ttl_s, since=licence.shortened_at or licence.since, loop_wait_s=o.settings.loop_wait_s)
    return remaining_s(begin, o.now)


def licence_is_valid(o: Observation) -> Reason:
    return reason("lease.licence_is_valid", licensed(o), f"licence {o.licence.state}, {left_s(o):.1f} s left")


def licence_lasts(o: Observation) -> Reason:
    """Demotion begins early enough for a fast shutdown before the fence, not before an election may have ended well."""
    licence, to_go_s = o.licence, _demotion_in_s(o)
    failing = f", renewals have failed for {holder_age_s(licence.failing_since, o.now):.1f} s ({licence.failing_why})" if licence.failing_since else ""
    failing += failsafe.agreement(o)
    due = f"demotion in {to_go_s:.1f} s" if to_go_s > 0 else "demotion is due" if to_go_s > -0.1 else f"demotion was due {-to_go_s:.1f} s ago"
    return reason("lease.licence_lasts", to_go_s > 0, f"{left_s(o):.1f} s of the licence left, {due}{failing}")


def server_answers(o: Observation) -> Reason:
    """A primary that gives no sign of life for too long is handed over: nobody can write to it, and it might thaw later."""
    postgres, limit_s = o.postgres, o.settings.primary_hang_timeout_s
    for_s = silent_s(postgres, o.now)
    return reason("lease.server_answers", for_s < limit_s, f"last sign of life {for_s:.1f} s ago, limit {limit_s:g} s"
                  + (f" ({postgres.why})" if postgres.why and for_s > 1 else ""))


def silent_s(postgres: PostgresFacts, now: Instant) -> float:
    """Since the server's last sign of life, or its start."""
    since = postgres.answered_at or postgres.since
    return holder_age_s(since, now) if since else 0.0


