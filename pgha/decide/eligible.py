"""Who may lead by `/sync`? What the synchronous modes ask of a candidate, a hand-over and a switchover.

`/sync` speaks for itself, whatever mode is configured just now: its leader has every acknowledged commit, and of any
quorum + 1 of its voters one has. So a voter needs the votes of `quorum` others whose final position is not ahead of its
own; in priority mode the quorum is 0, and it needs none. (safety model 6.4; compatibility spec 8)

A store that went back brings an old `/sync` with it, whose voters may lack what was acknowledged since. Whether what it
shows was written before or after it went back, nobody can tell; so until it is written again, what was last seen before
counts, too, and only who may lead by both may lead (`words`).
"""

from __future__ import annotations

from collections.abc import Iterable

from pgha.decide.common import fresh_peers, reason, view_of
from pgha.decide.sync_book import is_on, voters_of
from pgha.model.cluster import Sync
from pgha.model.decision import Election, Reason
from pgha.model.observation import Observation, Peer
from pgha.model.wal import Position

BASEBACKUP = "basebackup"


def words(o: Observation) -> tuple[Sync, ...]:
    """`/sync`, and what it said before the store went back: one of them is true, so both must be borne out."""
    return tuple(sync for sync in (view_of(o).sync, o.dcs.remembered_sync) if sync is not None and sync.leader)


def is_active(o: Observation) -> bool:
    """The mode is on, and there is a promise to keep. (An operator who switches it off lets anybody lead.)"""
    return is_on(o) and bool(words(o))


def may_lead(o: Observation, name: str) -> bool:
    """Is it a voter, or the leader of `/sync`?"""
    return all(_names(sync, name) for sync in words(o))


def is_named(o: Observation, name: str) -> bool:
    """May it have confirmed what it is counted on for?"""
    return any(_names(sync, name) for sync in words(o))


def _names(sync: Sync, name: str) -> bool:
    return name.lower() in voters_of(sync) or name.lower() == sync.leader.lower()


def _said(o: Observation) -> str:
    def named(sync: Sync) -> str:
        return f"{sync.leader} and {', '.join(sync.members) or 'nobody else'}" if sync.leader else "nobody"

    former = o.dcs.remembered_sync
    return f"/sync names {named(view_of(o).sync)}" + (f" (before the store went back: {named(former)})" if former is not None else "")


def copy_methods(o: Observation, *, spare_data: bool = False) -> tuple[tuple[str, ...], tuple[Reason, ...]]:
    """How this node may be copied anew. `spare_data`: what is there stays as it is until the copy is whole. Whom /sync names may lead as soon as it runs: made from a backup, its data may lack
    what its name has confirmed, so then it is copied from the running leader, whatever is configured."""
    rule, configured = "empty.copy_method", o.settings.replica_methods
    if spare_data:
        configured = tuple(name for name in configured if name not in o.settings.overwriting_methods) or (BASEBACKUP,)
    if configured == (BASEBACKUP,):
        return configured, ()
    if is_active(o) and is_named(o, o.me.name):
        return (BASEBACKUP,), (reason(rule, True, f"by {BASEBACKUP} alone, since {_said(o)}: a backup may lack what {o.me.name} has confirmed"),)
    return configured, (reason(rule, True, f"by {', then '.join(configured)}"),)


def is_synchronous(o: Observation, *, chosen: bool) -> Reason:
    """`chosen`: an operator asked for a failover to this very node, and accepts what is lost."""
    rule = "promotion.is_synchronous"
    if not is_active(o):
        return reason(rule, True, "no synchronous mode is active")
    named = _said(o)
    if may_lead(o, o.me.name):
        return reason(rule, True, named)
    if chosen:
        return reason(rule, True, f"{named}, but an operator asked for this node")
    if o.settings.synchronous_mode == "quorum":
        return reason(rule, True, f"{named}: without being named, one vote more is needed")
    return reason(rule, False, f"{named}, not {o.me.name}")


def quorum_is_reached(o: Observation, election: Election, own: Position, *, chosen: bool) -> Reason:
    """Enough voters gave a final position that is not ahead of this node's."""
    if not is_active(o):
        return reason("promotion.quorum_is_reached", True, "no synchronous mode is active")
    verdicts = [_quorum(o, sync, election, own, chosen=chosen) for sync in words(o)]
    return next((verdict for verdict in verdicts if not verdict.holds), verdicts[0])


def _quorum(o: Observation, sync: Sync, election: Election, own: Position, *, chosen: bool) -> Reason:
    rule = "promotion.quorum_is_reached"
    if o.me.name.lower() == sync.leader.lower():
        return reason(rule, True, "this node was the last leader: it has everything")
    needed = sync.quorum + (0 if _names(sync, o.me.name) else 1)
    votes = sorted(p.name for p in fresh_peers(o).values() if p.name.lower() in voters_of(sync) and _votes(p, election, own))
    enough = len(votes) >= needed or chosen
    return reason(rule, enough, f"{len(votes)} votes ({', '.join(votes) or 'nobody'}), {needed} needed" + (", but an operator asked for this node" if chosen and len(votes) < needed else ""))


def _votes(peer: Peer, election: Election, own: Position) -> bool:
    """A member of another make cannot freeze; the lock is free, so whatever was acknowledged with its help it has already."""
    final = peer.frozen_epoch == election.epoch or (not peer.is_pgha and peer.in_recovery is True)
    return final and _not_ahead(peer, own)


def _not_ahead(peer: Peer, own: Position) -> bool:
    if not peer.timeline or not own.timeline:
        return False
    return peer.timeline < own.timeline or (peer.timeline == own.timeline and peer.lsn <= own.lsn)


def able_to_take_over(o: Observation, peers: Iterable[Peer]) -> list[str]:
    """Of these answers, who could lead without losing an acknowledged commit: with the votes of the others."""
    answers = list(peers)
    able = [_able_by(sync, answers) for sync in words(o)]
    return sorted(set[str]().union(*able).intersection(*able))


def _able_by(sync: Sync, peers: Iterable[Peer]) -> set[str]:
    voters = [p for p in peers if p.name.lower() in voters_of(sync) and p.in_recovery and p.running]
    able = [p for p in voters if p.candidate and not p.tags.nofailover and not p.watchdog_failed]
    return {p.name for p in able
            if sum(1 for v in voters if v is not p and _not_ahead(v, Position(timeline=p.timeline, lsn=p.lsn))) >= sync.quorum}


def switchover_obstacle(o: Observation, name: str) -> str:
    """Why `/sync` forbids a switchover to this member; '' if it does not. A failover (without a leader in the key) may go
    to anybody: its operator accepts the loss."""
    view = view_of(o)
    if not is_active(o) or not view.failover.leader:
        return ""
    return next(filter(None, (_switchover_obstacle(o, sync, name) for sync in words(o))), "")


def _switchover_obstacle(o: Observation, sync: Sync, name: str) -> str:
    if name.lower() not in voters_of(sync) and o.settings.synchronous_mode != "quorum":
        return f"is not among the synchronous standbys ({', '.join(sync.members) or 'nobody'})"
    needed = sync.quorum + (0 if name.lower() in voters_of(sync) else 1)
    others = [p.name for p in fresh_peers(o).values() if p.name.lower() in voters_of(sync) and p.name != name and p.in_recovery]
    return "" if len(others) >= needed else f"{len(others)} other voters answer, {needed} needed"
