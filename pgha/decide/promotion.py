"""May this node become primary? Every condition is asked, so every obstacle is reported.

An election is: the lock is free by a read in this pass; this node stops streaming, so that its position is final and
can be a vote; the others' votes are heard, or waited for as long as they might matter; the best takes the lock.
"""

from __future__ import annotations

from pgha.clock import candidate_age_s, remaining_s
from pgha.decide import eligible, failsafe, paused, restart
from pgha.decide.common import fresh_peers, mib, others, reason, view_of
from pgha.model.decision import Election, Memory, Reason
from pgha.model.observation import Observation, Peer
from pgha.model.wal import Position, format_lsn, is_ancestor

#: All members that answer do so within this time; whoever is silent for longer is silent.
ANSWERS_S = 0.3
#: A silent member that was last known to be ahead is waited for so long.
SILENT_AHEAD_S = 2.0
#: The candidate of a switchover is left the field so long.
CANDIDATE_S = 5.0


def own_position(o: Observation) -> Position:
    """The end of what this standby has."""
    row = o.postgres.row
    return Position(timeline=row.timeline if row else 0, lsn=row.position if row else 0)


def conditions(o: Observation, memory: Memory) -> tuple[Reason, ...]:
    """Every condition but those about peers."""
    return (
        in_recovery(o), not_nofailover(o), caught_up(o), timeline_is_known(o), system_is_ours(o), guard_answers(o), watchdog_is_usable(o),
        has_not_just_failed(o, memory), is_not_vetoed(o, memory), is_not_asked_to_leave(o, memory), paused.may_stand(o), eligible.is_synchronous(o, chosen=manually_chosen(o)),
        failsafe.nothing_is_promised(o), failsafe.is_listed(o),
    )


def in_recovery(o: Observation) -> Reason:
    row = o.postgres.row
    holds = row is not None and row.in_recovery and o.postgres.answer == "sql"
    return reason("promotion.in_recovery", holds, "a standby, answering" if holds else f"PostgreSQL is {o.postgres.process}, answers: {o.postgres.answer}")


def not_nofailover(o: Observation) -> Reason:
    tags = o.settings.tags
    return reason("promotion.not_nofailover", not tags.nofailover,
                  f"tag {'nofailover is set' if tags.nofailover else f'failover_priority is {tags.failover_priority}'}")


def caught_up(o: Observation) -> Reason:
    """Not further behind the last published position of the old primary than the operator allows."""
    lag = max(0, view_of(o).published_position.lsn - own_position(o).lsn)
    limit = o.settings.maximum_lag_on_failover_bytes
    manual = manually_chosen(o)
    holds = lag <= limit or manual
    return reason("promotion.caught_up", holds, f"lag {mib(lag)}, limit {mib(limit)}" + (", chosen by an operator" if manual else ""))


def manually_chosen(o: Observation) -> bool:
    """An operator asked for a failover to this very node."""
    key = view_of(o).failover
    return key.candidate == o.me.name and not key.leader and not key.scheduled_at


def is_named(o: Observation) -> bool:
    """An operator asked for this very node, by a switchover or a failover, to begin now."""
    key = view_of(o).failover
    return key.candidate == o.me.name and not key.scheduled_at


def timeline_is_known(o: Observation) -> Reason:
    """With check_timeline, a node must have followed to the cluster's newest timeline."""
    own, cluster = own_position(o).timeline, view_of(o).timeline
    holds = own > 0 and (own >= cluster or not o.settings.check_timeline)
    return reason("promotion.timeline_is_known", holds, f"own timeline {own}, the cluster's {cluster}" + ("" if o.settings.check_timeline else ", check_timeline off"))


def system_is_ours(o: Observation) -> Reason:
    """This data is the cluster's. A store that was rebuilt empty does not say whose it is: then what this node remembers
    counts, unless an operator chose it; others may still have the cluster's own data."""
    row, view = o.postgres.row, view_of(o)
    own = row.system_identifier if row else ""
    known, whence = (view.initialize, "the cluster's") if view.initialized else (o.dcs.remembered_identifier, "the cluster's, as far as this node remembers,")
    if not view.initialized and manually_chosen(o):
        known = ""
    return reason("promotion.system_is_ours", not known or not own or own == known, f"own {own or 'unknown'}, {whence} {known or 'not known'}")


def guard_answers(o: Observation) -> Reason:
    return restart.guard_answers(o)


def watchdog_is_usable(o: Observation) -> Reason:
    return reason("promotion.watchdog_is_usable", not o.watchdog.failed, o.watchdog.why or f"watchdog mode {o.watchdog.mode}")


def has_not_just_failed(o: Observation, memory: Memory) -> Reason:
    """After a hand-over or a failed promotion others go first; if nobody can, this node may again."""
    rule = "promotion.has_not_just_failed"
    until = memory.stand_back_until
    left = remaining_s(until, o.now) if until else 0.0
    if left <= 0:
        return reason(rule, True, "nothing to stand back for")
    able = sorted(p.name for p in fresh_peers(o).values() if p.in_recovery and p.running and p.candidate and not p.tags.nofailover)
    asked = all(n in o.peers for n in others(o))
    if not able and asked:
        return reason(rule, True, f"{memory.stand_back_why}, but no other member could take over")
    return reason(rule, False, f"{memory.stand_back_why}: standing back for another {left:.1f} s in favour of {', '.join(able) or 'others'}")


def is_not_vetoed(o: Observation, memory: Memory) -> Reason:
    """The operator's pre_promote has said no: for a ttl that stands, also if nobody else could lead."""
    left = remaining_s(memory.vetoed_until, o.now) if memory.vetoed_until else 0.0
    return reason("promotion.is_not_vetoed", left <= 0, f"{memory.veto_why}: out of the race for another {left:.1f} s" if left > 0 else "no pre_promote has refused")


def is_not_asked_to_leave(o: Observation, memory: Memory) -> Reason:
    """A switchover names another candidate, or this node as the one to leave: it goes first while it can."""
    rule = "promotion.is_not_asked_to_leave"
    key = view_of(o).failover
    if key.empty or key.scheduled_at or key.candidate in ("", o.me.name):
        return reason(rule, True, "no other candidate was asked for")
    election = memory.election
    waited_s = candidate_age_s(election.began_at, o.now) if election else 0.0
    peer = fresh_peers(o).get(key.candidate)
    able = peer is not None and peer.in_recovery is True and peer.candidate and not peer.tags.nofailover
    if waited_s < CANDIDATE_S and (able or waited_s < ANSWERS_S):
        return reason(rule, False, f"an operator asked for {key.candidate}, which has had {waited_s:.1f} s of {CANDIDATE_S:g} s")
    return reason(rule, True, f"an operator asked for {key.candidate}, which " + ("has not taken the lock in time" if able else "does not answer as a standby"))


# --- peers -------------------------------------------------------------------------------------------------------------

def peer_conditions(o: Observation, election: Election) -> tuple[Reason, ...]:
    """What the others' positions say. Asked only once this node's own position is final."""
    quorum = eligible.quorum_is_reached(o, election, own_position(o), chosen=manually_chosen(o))
    return (no_primary_is_alive(o), no_peer_is_ahead(o, election), peers_were_waited_for(o, election), quorum)


def no_primary_is_alive(o: Observation) -> Reason:
    """A peer that answers as primary is fenced or demoted soon; nobody takes over beside it."""
    alive = sorted(p.name for p in fresh_peers(o).values() if p.in_recovery is False)
    return reason("promotion.no_primary_is_alive", not alive, f"{', '.join(alive)} still a primary" if alive else "no peer answers as primary")


def no_peer_is_ahead(o: Observation, election: Election) -> Reason:
    """Order: timeline ancestry, then LSN, then failover_priority, then name. Peers that may not lead, or say that they
    would not now, do not count: waiting for them would only be an outage (their surplus is within the async bound)."""
    own, rule = own_position(o), "promotion.no_peer_is_ahead"
    ahead = []
    for peer in sorted(fresh_peers(o).values(), key=lambda p: p.name):
        if peer.tags.nofailover or peer.watchdog_failed or not peer.in_recovery or not peer.candidate:
            continue
        if manually_chosen(o) or (eligible.is_active(o) and not eligible.may_lead(o, peer.name)):
            continue
        if _precedes(o, peer, own, election):
            ahead.append(f"{peer.name} at {format_lsn(peer.lsn)} on timeline {peer.timeline}, priority {peer.tags.failover_priority}")
    return reason(rule, not ahead, f"own {own}, priority {o.settings.tags.failover_priority}; " + ("; ".join(ahead) + " goes first" if ahead else "nobody is ahead"))


def _precedes(o: Observation, peer: Peer, own: Position, election: Election) -> bool:
    theirs = Position(timeline=peer.timeline, lsn=peer.lsn)
    if peer.timeline and own.timeline and peer.timeline != own.timeline:
        if peer.timeline > own.timeline:
            # A newer timeline goes first if ours ends in it; if not, there were two branches, and the newer one won the lock.
            return not peer.history or is_ancestor(own, timeline=peer.timeline, history=peer.history) or peer.lsn >= own.lsn
        return False
    if theirs.lsn != own.lsn:
        return theirs.lsn > own.lsn
    if peer.frozen_epoch != election.epoch and peer.is_pgha:
        return False        # still moving: `peers_were_waited_for` waits for its vote
    if peer.tags.failover_priority != o.settings.tags.failover_priority:
        return peer.tags.failover_priority > o.settings.tags.failover_priority
    return peer.is_pgha and peer.name < o.me.name       # those of another make know no order of names: whoever is first has it


def peers_were_waited_for(o: Observation, election: Election) -> Reason:
    """All members gave their vote, or the silent ones cannot matter, or they had their time."""
    rule = "promotion.peers_were_waited_for"
    names = others(o)
    voted_at = election.voted_at
    waited_s = candidate_age_s(voted_at, o.now) if voted_at else 0.0
    answered = fresh_peers(o)
    own = own_position(o)
    pending = [n for n in sorted(names) if not _is_final(answered.get(n), election)]
    if not pending:
        return reason(rule, True, f"all {len(names)} other members gave their position")
    if eligible.is_active(o):
        # Whoever /sync names, and has the votes that it asks for, has every acknowledged commit: nobody can add to that.
        return reason(rule, True, f"{', '.join(pending)} not waited for: a synchronous mode is active")
    if manually_chosen(o) or _released_to(o):
        return reason(rule, True, f"{', '.join(pending)} not waited for: this node was chosen")
    # Silence counts from when a member was first asked in vain: probing begins before the record expires.
    silent_s = min((_silent_s(o, n) for n in pending), default=0.0)
    waited_s = max(waited_s, silent_s) if voted_at else 0.0
    ahead = [n for n in pending if _last_known(o, n) > own.lsn]
    if ahead:
        return reason(rule, waited_s >= SILENT_AHEAD_S, f"{', '.join(ahead)} last known ahead of {format_lsn(own.lsn)}, "
                      f"waited {waited_s:.2f} s of {SILENT_AHEAD_S} s")
    return reason(rule, waited_s >= ANSWERS_S, f"{', '.join(pending)} without a final position, none known ahead, waited {waited_s:.2f} s of {ANSWERS_S} s")


def _silent_s(o: Observation, name: str) -> float:
    peer = o.peers.get(name)
    return candidate_age_s(peer.silent_since, o.now) if peer is not None and peer.silent_since is not None else 0.0


def _released_to(o: Observation) -> bool:
    """The lock was released with a final position, an operator named this node, and it has everything."""
    view = view_of(o)
    lock = view.lock
    if lock is None or lock.mode != "released" or view.failover.candidate != o.me.name:
        return False
    return bool(lock.lsn) and own_position(o).lsn >= lock.lsn and own_position(o).timeline >= lock.timeline




def _is_final(peer: Peer | None, election: Election) -> bool:
    """A vote for this epoch, or a member that cannot be a candidate. Peers of another make cannot freeze: they move."""
    if peer is None:
        return False
    return peer.frozen_epoch == election.epoch or (peer.tags.nofailover and peer.in_recovery is not False)


def _last_known(o: Observation, name: str) -> int:
    """However long ago: a member that told its position and froze is as far as it was."""
    peer = o.peers.get(name)
    published = o.dcs.last_positions.get(name)
    member = view_of(o).members.get(name)
    return max(peer.lsn if peer else 0, published.lsn if published else 0, member.lsn if member else 0)


