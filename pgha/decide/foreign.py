"""Does this data, or this name, belong to somebody else? Then touch nothing, and say so."""

from __future__ import annotations

from pgha.decide import paused
from pgha.decide.common import may_write, reason
from pgha.decide.standing import Whose, licensed, standing
from pgha.model.action import Demote, Stop
from pgha.model.decision import Decision, Memory, Reason
from pgha.model.observation import Observation


def decide(o: Observation, memory: Memory) -> Decision | None:
    reasons = (name_is_ours(o), system_identifier_matches(o))
    if all(r.holds for r in reasons):
        return None
    actions: tuple[Demote | Stop, ...] = ()
    if paused.in_force(o) and reasons[0].holds and (licensed(o) or not may_write(o)):
        pass        # a wrong identifier is told, and left to the operator
    elif o.postgres.alive and may_write(o):
        actions = (Demote(mode="kill", release=licensed(o), checkpoint=False, why="foreign data or name", timeout_s=0.0),)
    elif o.postgres.alive:
        actions = (Stop(why="foreign data or name", timeout_s=60.0),)
    obstacle = next(r for r in reasons if not r.holds)
    return Decision(situation="foreign", summary=f"not taking part: {obstacle.because}", reasons=reasons, actions=actions, memory=memory,
                    wake_in_s=o.settings.loop_wait_s)


def name_is_ours(o: Observation) -> Reason:
    """A live record of another node under this node's name: two machines have the same `name` (safety model 3)."""
    now = standing(o)
    return reason("foreign.name_is_ours", now.whose is not Whose.IMPOSTOR,
                  f"{now.because}: give each node its own `name`" if now.whose is Whose.IMPOSTOR else f"{o.me.name} is this node's alone")


def system_identifier_matches(o: Observation) -> Reason:
    """Data of another cluster must neither follow nor lead this one."""
    rule = "foreign.system_identifier_matches"
    view, control = o.dcs.view, o.directory.control
    if view is None or control is None or not view.initialized:
        return reason(rule, True, "one of both identifiers is not known")
    own, cluster = control.system_identifier, view.initialize
    if own == cluster:
        return reason(rule, True, f"both {own}")
    return reason(rule, False, f"the data directory's system identifier is {own}, the cluster's is {cluster}: "
                  "move the data directory away, or correct scope and namespace")
