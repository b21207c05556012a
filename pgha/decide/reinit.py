"""An operator asks to replace this node's data by a fresh copy: may it go, and what comes next?

Rules of this file:
* never on a leader, never without a leader whose PostgreSQL answers as the primary of this very cluster, just before;
* never data that is another cluster's, or of which nobody can tell whose it is: to move that away is for people;
* the data is kept until the copy streams, and so whoever fails on the way goes on with what it had;
* commits do not wait for the copy: in the strict mode a leader that has nobody else keeps its only standby, and so do we;
* nobody leads any more: then this data may be what the cluster goes on with, and the copy is given up.
"""

from __future__ import annotations

from msgspec.structs import replace

from pgha.clock import Instant, candidate_age_s, remaining_s
from pgha.decide import eligible, synchronous
from pgha.decide.common import by_name, leader_member, may_write, reason, source_of, view_of
from pgha.decide.empty import clone_source
from pgha.decide.standing import Whose, licensed, standing
from pgha.model.action import Clone, InspectUpstream, Stop
from pgha.model.decision import Decision, Memory, Reason
from pgha.model.observation import Observation
from pgha.model.request import ReinitialisationEnd

#: What the leader said of itself counts as said just before for so long.
INSPECTED_WITHIN_S = 10.0
STOP_WITHIN_S = 60.0

NO_LEADER = "Cluster has no leader, can not reinitialize"
LEADER = "I am the leader, can not reinitialize"


def decide(o: Observation, memory: Memory) -> Decision | None:
    wanted = memory.reinit
    if wanted is None or o.postgres.orphans:
        return None
    if o.directory.state == "unknown":
        return Decision(situation="reinitializing", summary="reinitialize: looking at the data directory", memory=memory, wake_in_s=0.1)
    reasons = conditions(o)
    if not all(r.holds for r in reasons):
        return _given_up(memory, reasons)
    source, why = clone_source(o, leader_only=wanted.from_leader)
    identifier = view_of(o).initialize
    leader = leader_member(o, standing(o).holder)
    assert source is not None, "reinit.has_leader"
    assert leader is not None, "reinit.has_leader"
    assert identifier is not None, "reinit.has_leader"
    answers = leader_answers(o, leader.name, identifier, since=wanted.asked_at)
    if not answers.holds and not wanted.inspected:
        ask = InspectUpstream(source=source_of(leader))
        return Decision(situation="reinitializing", summary=f"reinitialize: asking {leader.name} who it is", reasons=(*reasons, answers), actions=(ask,),
                        memory=replace(memory, reinit=replace(wanted, inspected=True), upstream_asked_at=o.now), wake_in_s=0.2)
    reasons = (*reasons, answers)
    if not answers.holds:
        return _given_up(memory, reasons)
    if o.postgres.alive:
        let_go = synchronous.is_to_be_let_go(o, memory)
        if not let_go.holds:
            # By the time that it is let go the leader's answer may be too old: then it is asked anew.
            memory = replace(memory, leaving_since=memory.leaving_since or o.now, reinit=replace(wanted, inspected=False))
            return Decision(situation="reinitializing", summary=f"reinitialize: {let_go.because}", reasons=(*reasons, let_go), memory=memory, wake_in_s=0.1)
        spared = can_be_spared(o)
        if not spared.holds:
            return _given_up(memory, (*reasons, spared))
        stop = Stop(why="reinitialize", timeout_s=STOP_WITHIN_S, before_stop_s=o.settings.before_stop_s)
        return Decision(situation="reinitializing", summary="reinitialize: stopping PostgreSQL", reasons=reasons, actions=(stop,),
                        memory=replace(memory, reinit=replace(wanted, inspected=False)))
    # Not by what overwrites the data (keep_data): if the leader dies meanwhile, the cluster may have to go on with this.
    methods, by = eligible.copy_methods(o, spare_data=True) if not wanted.from_leader else ((eligible.BASEBACKUP,), ())
    clone = Clone(source=source_of(source), system_identifier=identifier, replace="keep_old_until_streaming", why="an operator asked to reinitialize", methods=methods)
    return Decision(situation="reinitializing", summary=f"reinitialize: copying from {source.name} with {by_name(methods)}", reasons=(*reasons, why, *by), actions=(clone,), memory=memory,
                    state="creating replica")


def _given_up(memory: Memory, reasons: tuple[Reason, ...]) -> Decision:
    obstacle = next(r for r in reasons if not r.holds)
    return Decision(situation="reinitializing", summary=f"not reinitializing, the data is kept: {obstacle.because}", reasons=reasons, memory=ended(memory, ok=False, why=obstacle.because),
                    wake_in_s=0.0)


def ended(memory: Memory, *, ok: bool, why: str = "") -> Memory:
    """The request is done with."""
    wanted = memory.reinit
    if wanted is None:
        return memory
    said = "reinitialize: the copy is in place" if ok else f"reinitialize failed, the data is as before: {why}"
    return replace(memory, reinit=None, leaving_since=None, reinit_ended=ReinitialisationEnd(request=wanted.request, ok=ok, why=why), said=said)


# --- judgements ------------------------------------------------------------------------------------------------------------

def conditions(o: Observation) -> tuple[Reason, ...]:
    """May this node's data be replaced?"""
    return (is_not_leader(o), has_leader(o), store_is_believed(o), data_is_this_clusters(o))


def refusal(reasons: tuple[Reason, ...]) -> str | None:
    """What an operator is told; None: nothing speaks against it. The first two texts are the reference's."""
    obstacle = next((r for r in reasons if not r.holds), None)
    if obstacle is None:
        return None
    return {"reinit.is_not_leader": LEADER, "reinit.has_leader": NO_LEADER}.get(obstacle.rule, f"can not reinitialize: {obstacle.because}")


def is_not_leader(o: Observation) -> Reason:
    """Neither by the store, nor by what runs here: a primary is never replaced, whoever has the lock."""
    rule = "reinit.is_not_leader"
    if licensed(o):
        return reason(rule, False, f"{o.me.name} holds the lock")
    if may_write(o):
        return reason(rule, False, "PostgreSQL runs here, and may accept writes")
    now = standing(o) if o.dcs.view is not None else None
    ours = now is not None and (now.whose in (Whose.OWN_FORMER, Whose.SETTLING) or now.holder == o.me.name)
    return reason(rule, not ours, now.because if now is not None else "the store has not been read yet")


def has_leader(o: Observation) -> Reason:
    """Somebody whose lock is alive, and whose PostgreSQL runs as primary."""
    rule = "reinit.has_leader"
    if o.dcs.view is None or o.dcs.unreachable_since is not None:
        return reason(rule, False, f"the store does not answer: {o.dcs.why or 'not read yet'}")
    source, why = clone_source(o, leader_only=True)
    return reason(rule, source is not None and view_of(o).initialized, why.because if view_of(o).initialized else "the cluster is not initialised")


def store_is_believed(o: Observation) -> Reason:
    """A store that was restored may name a leader that lacks what this node has."""
    rule = "reinit.store_is_believed"
    if o.dcs.trusted_from is not None and remaining_s(o.dcs.trusted_from, o.now) > 0:
        return reason(rule, False, f"{o.dcs.generation_changed}: who leads is not certain yet")
    before = o.dcs.remembered_sync
    return reason(rule, before is None, "the store was restored to another /sync, and has not been written since" if before is not None else "the store has not gone back")


def can_be_spared(o: Observation) -> Reason:
    """It has waited to be let go. A leader that goes on to count on it in the strict mode would wait for it until the copy streams."""
    strict = o.settings.synchronous_mode_strict and synchronous.is_counted_on(o)
    return reason("reinit.can_be_spared", not strict, "synchronous_mode_strict: the leader does not let this standby go, and no commit would end before the copy is made; "
                  "allowed: with another standby that can take its place, or with synchronous_mode_strict off meanwhile" if strict else "no commit waits for this node alone")


def data_is_this_clusters(o: Observation) -> Reason:
    """Nothing there, or a data directory of this cluster. Anything else is nobody's to delete."""
    rule, directory = "reinit.data_is_this_clusters", o.directory
    if directory.state in ("missing", "empty", "unknown"):
        return reason(rule, True, f"the data directory is {directory.state}")
    if directory.state != "valid":
        return reason(rule, False, f"the data directory is {directory.state}{': ' + directory.why if directory.why else ''}; move it away, and a copy is made")
    control, view = directory.control, o.dcs.view
    if control is None:
        return reason(rule, False, "pg_control cannot be read, so whose data this is cannot be known; move the data directory away, and a copy is made")
    own, cluster = control.system_identifier, view.initialize if view is not None else None
    return reason(rule, own == cluster, f"own system identifier {own}, the cluster's {cluster}")


def leader_answers(o: Observation, leader: str, identifier: str, *, since: Instant) -> Reason:
    """Its PostgreSQL said, when this was asked for, that it is a primary of this cluster: so this is not the only copy, and a copy
    can be had."""
    rule, upstream = "reinit.leader_answers", o.upstream
    if upstream is None or upstream.name != leader or remaining_s(upstream.asked_at, since) < 0 or candidate_age_s(upstream.asked_at, o.now) > INSPECTED_WITHIN_S:
        return reason(rule, False, f"{leader} was not asked just before")
    if not upstream.ok:
        return reason(rule, False, f"{leader} does not answer: {upstream.why}")
    if upstream.in_recovery:
        return reason(rule, False, f"{leader} is in recovery")
    return reason(rule, upstream.system_identifier == identifier, f"{leader} is a primary of system {upstream.system_identifier}, the cluster is {identifier}")
