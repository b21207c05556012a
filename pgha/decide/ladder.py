"""The order of the situations, and one pass through them."""

from __future__ import annotations

from msgspec.structs import replace

from pgha.decide import (
    asked,
    blind,
    broken,
    busy,
    empty,
    finish,
    following,
    foreign,
    leaderless,
    leading,
    lease,
    paused,
    reinit,
    stopping,
)
from pgha.decide.ended import note_ended
from pgha.model.decision import Decision, Memory
from pgha.model.observation import Observation

#: First match wins; the order is the policy.
LADDER = (
    busy.decide,        # a long operation is in flight: let it, or end it
    stopping.decide,    # the agent was told to stop: PostgreSQL stops cleanly, the lock is handed over
    foreign.decide,     # this data, or this name, belongs elsewhere: touch nothing
    lease.decide,       # PostgreSQL may write, and the licence is missing, doubtful or ending
    reinit.decide,      # an operator asked to replace this node's data by a fresh copy
    paused.decide,      # pause is in force: a server that is down stays down, and nobody is elected unless named
    blind.decide,       # the store has not been read yet
    empty.decide,       # no data: bootstrap or clone
    broken.decide,      # data, but no server: start, rewind, hand over
    leading.decide,     # this node holds the lock
    leaderless.decide,  # nobody does: election
    following.decide,   # somebody else does
)


def decide(observation: Observation, memory: Memory) -> Decision:
    """One pass. Never raises for any observation."""
    wanted = asked.take(observation, memory)
    noted = note_ended(wanted.seen, wanted.memory)
    for situation in LADDER:
        decision = situation(wanted.seen, noted)
        if decision is not None:
            return finish.finish(wanted.seen, _with(decision, wanted))
    raise AssertionError("the last rung of the ladder matches everything")


def _with(decision: Decision, wanted: asked.Asked) -> Decision:
    """What operators are answered comes first: a later action may end the pass."""
    if not wanted.actions and not wanted.reasons:
        return decision
    return replace(decision, actions=(*wanted.actions, *decision.actions), reasons=(*decision.reasons, *wanted.reasons))
