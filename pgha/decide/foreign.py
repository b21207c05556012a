"""Does this data, or this name, belong to somebody else? Then touch nothing, and say so."""

from __future__ import annotations

from pgha.decide import paused
from pgha.decide.common import may_write, reason
from pgha.decide.standing import Whose, licensed, standing
from pgha.model.action import Demote, Stop
from pgha.model.decision import Decision, Memory, Reason
from pgha.model.observation import Observation


def decide(o: Observation, memory: Memory) -> Decision | None:
    member = member_is_ours(o)
    if not member.holds:
        return Decision(situation="foreign", summary=f"not taking part: {member.because}", reasons=(member,), memory=memory, wake_in_s=o.settings.loop_wait_s)
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


def member_is_ours(o: Observation) -> Reason:
    """A Patroni member of this name, somewhere else. Its key goes with its lease if it does not live any more; until then
    this node neither acts nor overwrites the key (agent.py): both would believe that they hold what either holds."""
    rule, view, settings = "foreign.member_is_ours", o.dcs.view, o.settings
    own = view.members.get(o.me.name) if view is not None else None
    if own is None or own.is_pgha or not own.version or not own.host or licensed(o) or not settings.postgres_host:
        return reason(rule, True, "no Patroni member has this name")
    here = (own.host.lower(), own.port) == (settings.postgres_host.strip("[]").lower(), settings.postgres_port)
    at = f"a Patroni member is {o.me.name} at {own.host}:{own.port}"
    return reason(rule, here, f"{at}, which is this node" if here else f"{at}, this node is at {settings.postgres_host}:{settings.postgres_port}: stop it, or give each node its own `name`")


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
