"""An operator asked for another leader: may this leader hand over, and to whom?"""

from __future__ import annotations

from pgha.clock import candidate_age_s
from pgha.decide import eligible
from pgha.decide.common import fresh_peers, mib, others, reason, view_of
from pgha.decide.schedule import Due, When, when
from pgha.model.decision import Memory, Reason
from pgha.model.observation import Observation, Peer

#: How a demotion for it is told from others.
WHY = "switchover to "
#: Peers' answers are waited for so long before a request is refused for want of them.
PATIENCE_S = 2.0


def requested(o: Observation) -> bool:
    """Is there a request in the failover key that this leader is to carry out now?"""
    key = view_of(o).failover
    return not key.empty and not key.scheduled_at


def is_in_time(o: Observation) -> tuple[Reason, When]:
    """A switchover that was scheduled: its time is still to come, or has just come."""
    at = when(o, view_of(o).failover.scheduled_at)
    return reason("switchover.is_in_time", at.due in (Due.LATER, Due.NOW), at.because), at


def conditions(o: Observation) -> tuple[Reason, ...]:
    """Every condition of handing over on request."""
    return (names_this_leader(o), names_another_candidate(o), names_somebody_in_pause(o), has_good_candidate(o))


def is_still_asked_for(o: Observation, memory: Memory) -> Reason:
    """While before_stop runs, nothing has been done yet: the request may be taken back, and the candidate may cease to be one."""
    rule, key = "switchover.is_still_asked_for", view_of(o).failover
    if key.empty or view_of(o).revision_of("failover") != memory.switchover_revision:
        return reason(rule, False, "the request was taken back" if key.empty else "another request has come")
    if not all(_is_judged(o, name) for name in ([key.candidate] if key.candidate else others(o))):
        return reason(rule, True, "asking the others")      # one answer that is late ends nothing
    against = [r for r in conditions(o) if not r.holds]
    return reason(rule, not against, against[0].because if against else "nothing has changed since it was asked for")


def _is_judged(o: Observation, name: str) -> bool:
    """Has it just answered, or not for long enough to say that it does not?"""
    last = o.peers.get(name)
    if name in fresh_peers(o):
        return True
    return last is not None and not last.answered and last.silent_since is not None and candidate_age_s(last.silent_since, o.now) >= PATIENCE_S


def still_patient(o: Observation, memory: Memory) -> bool:
    """May an answer that would help still come?"""
    since = memory.switchover_asked_at
    return since is None or candidate_age_s(since, o.now) < PATIENCE_S


def is_done_with(o: Observation) -> Reason:
    """The request names this leader as the candidate, or another as the one to leave: nothing is left to be done."""
    key = view_of(o).failover
    said = f"{o.me.name}, which was asked for, leads" if key.candidate == o.me.name else f"it asks {key.leader} to hand over, and {o.me.name} leads"
    return reason("switchover.is_done_with", True, said)


def was_not_tried(o: Observation) -> Reason:
    """Asked where this leader has handed over for this very request, and leads again."""
    return reason("switchover.was_not_tried", False, f"the lock was given back for it, and {view_of(o).failover.candidate or 'nobody'} has not become the leader")


def names_this_leader(o: Observation) -> Reason:
    key = view_of(o).failover
    return reason("switchover.names_this_leader", key.leader in ("", o.me.name), f"asked from {key.leader or 'anybody'}, the leader is {o.me.name}")


def names_another_candidate(o: Observation) -> Reason:
    key = view_of(o).failover
    return reason("switchover.names_another_candidate", key.candidate != o.me.name, f"candidate {key.candidate or 'any'}, the leader is {o.me.name}")


def names_somebody_in_pause(o: Observation) -> Reason:
    """In pause nobody is elected: a request says who is to lead."""
    named = view_of(o).failover.candidate
    return reason("switchover.names_somebody_in_pause", bool(named) or not o.settings.pause,
                  f"candidate {named or 'any'}" + (", which is not possible in pause" if o.settings.pause and not named else ""))


def has_good_candidate(o: Observation) -> Reason:
    """At least one of those who may take over answers, is a standby that streams close behind, and may lead."""
    rule = "switchover.has_good_candidate"
    wanted = view_of(o).failover.candidate
    names = [wanted] if wanted else sorted(others(o))
    verdicts = {name: obstacles(o, name) for name in names}
    good = [name for name, found in verdicts.items() if not found]
    if good:
        return reason(rule, True, f"{', '.join(good)} can take over")
    if not names:
        return reason(rule, False, "there is no other member")
    return reason(rule, False, "; ".join(f"{name}: {', '.join(found)}" for name, found in verdicts.items()))


def obstacles(o: Observation, name: str) -> list[str]:
    """Why this member cannot take over from a healthy leader; empty if it can. Each with its numbers."""
    peer: Peer | None = fresh_peers(o).get(name)
    if name not in others(o):
        return ["is no member"]
    if peer is None:
        last = o.peers.get(name)
        return [f"does not answer ({last.why})" if last and last.why else "does not answer"]
    row = o.postgres.row
    found = []
    lag = max(0, (row.lsn if row else 0) - peer.lsn)
    limit = o.settings.maximum_lag_on_failover_bytes
    if peer.in_recovery is not True:
        found.append("is no standby")
    if peer.tags.nofailover:
        found.append("tag nofailover is set")
    if peer.watchdog_failed:
        found.append("its watchdog is required and not usable")
    if not peer.candidate and peer.in_recovery:
        found.append("would not take the lock now")
    if lag > limit:
        found.append(f"lag {mib(lag)}, limit {mib(limit)}")
    if row is not None and peer.timeline and peer.timeline != row.timeline:
        found.append(f"timeline {peer.timeline}, the leader's is {row.timeline}")
    forbidden = eligible.switchover_obstacle(o, name)
    if forbidden:
        found.append(forbidden)
    return found
