"""What is asked besides where members of another make take part, who promise less than ours do? (safety model 14)

An agent of ours that ends, or is frozen, has its primary ended by its guard; one of another make may leave it running when
its key `leader` goes. So before this node takes over from it, its PostgreSQL itself is asked.
"""

from __future__ import annotations

from pgha.clock import candidate_age_s, remaining_s
from pgha.decide.common import fresh_peers, reason
from pgha.model.action import InspectUpstream, Source
from pgha.model.decision import Election, Reason
from pgha.model.observation import Observation, Upstream

#: Why it is asked (model.observation.Operation.detail), and how long its answer is waited for: meanwhile this node has no other vote.
QUESTION = "has the former primary ended?"
ASKED_WITHIN_S = 1.0
#: What its PostgreSQL said counts for so long: that it has ended, that it accepts writes, and that it says neither.
ENDED_FOR_S = 2.0
WRITES_FOR_S = 10.0
SAYS_NEITHER_FOR_S = 0.5
RULE = "mixed.former_primary_has_ended"


def former_primary_has_ended(o: Observation, election: Election, *, chosen: bool) -> Reason | None:
    """Of the member of another make that led last: does it still accept writes? None: nobody such. `chosen`: an operator asked
    for a failover to this very node."""
    outsider = o.dcs.outsider
    if outsider is None or not outsider.host or outsider.name == o.me.name:
        return None
    peer = fresh_peers(o).get(outsider.name)
    if peer is not None and peer.in_recovery is not None:
        return reason(RULE, peer.in_recovery, f"{outsider.name} answers as {'a standby' if peer.in_recovery else 'a primary'}")
    if chosen:
        return reason(RULE, True, f"{outsider.name} led last, but an operator asked for this node")
    said = _said(o, election)
    if said is None:
        return reason(RULE, False, f"{outsider.name} led last, its agent does not answer, and its PostgreSQL has not been asked yet")
    if said.ok:
        return reason(RULE, said.in_recovery, f"PostgreSQL of {outsider.name} {'is in recovery' if said.in_recovery else 'accepts writes without an agent: end it, or say failover --candidate'}")
    return reason(RULE, said.unreached, f"PostgreSQL of {outsider.name} {'is not reached' if said.unreached else 'has not said what it is'} ({said.why})")


def question(o: Observation, election: Election, judged: Reason | None) -> InspectUpstream | None:
    """What would settle it."""
    outsider = o.dcs.outsider
    if judged is None or judged.holds or outsider is None or _said(o, election) is not None:
        return None
    peer = fresh_peers(o).get(outsider.name)
    return None if peer is not None and peer.in_recovery is not None else InspectUpstream(source=Source(name=outsider.name, host=outsider.host, port=outsider.port), deadline_s=ASKED_WITHIN_S, why=QUESTION)


def _said(o: Observation, election: Election) -> Upstream | None:
    """Its answer to a question of this election: while it led it said that it did."""
    said = o.upstream
    if said is None or o.dcs.outsider is None or said.name != o.dcs.outsider.name or remaining_s(said.asked_at, election.began_at) < 0:
        return None
    counts_s = WRITES_FOR_S if said.ok and not said.in_recovery else ENDED_FOR_S if said.ok or said.unreached else SAYS_NEITHER_FOR_S
    return said if candidate_age_s(said.asked_at, o.now) < counts_s else None
