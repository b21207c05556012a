"""What every decision carries, whatever the situation: the renewer's mandate, and PostgreSQL's state for others to see."""

from __future__ import annotations

from msgspec.structs import replace

from pgha.clock import NEVER, Deadline, earlier
from pgha.decide import asked, capacity, failsafe, lease, paused, slots
from pgha.decide.common import may_write, stop_timeout_s
from pgha.decide.standing import licensed
from pgha.model.action import Bootstrap, Clone, Demote, Restart, Rewind, StartPrimary, StartStandby, Stop
from pgha.model.decision import Decision, Mandate
from pgha.model.observation import BEFORE_STOP, Observation

#: What begins or ends PostgreSQL by this node's own doing.
LIFE = (Bootstrap, Clone, StartStandby, StartPrimary, Demote, Stop, Restart, Rewind)
#: A long operation under the lock that is neither a start nor a stop of PostgreSQL.
OPERATION_S = 60.0


def finish(o: Observation, decision: Decision) -> Decision:
    """The decision, completed."""
    memory, pause = failsafe.remember(o, decision.memory), paused.in_force(o)
    if any(isinstance(action, LIFE) for action in decision.actions) and not memory.ours_to_start:
        memory = replace(memory, ours_to_start=True)
    if (restart := next((action for action in decision.actions if isinstance(action, Restart)), None)) is not None:
        memory = replace(memory, restart_within_s=restart.timeout_s if restart.as_primary else 0.0)
    if memory.paused != pause:
        memory = replace(memory, paused=pause)
    room = capacity.store_has_room(o)
    if not room.holds and room not in decision.reasons:
        decision = replace(decision, reasons=(*decision.reasons, room))     # it may be why nobody leads
    return replace(decision, mandate=mandate(o), failsafe=failsafe.order(o, memory, slots.published_slots(o) if o.settings.failsafe_mode else {}), state=decision.state or state(o),
                   role=decision.role or role(o), paused=pause, memory=memory, leaves_sync=memory.leaving_since is not None,
                   wake_in_s=min(decision.wake_in_s, lease.judged_again_in_s(o), asked.due_in_s(o, memory)))


def mandate(o: Observation) -> Mandate:
    """Typed, each kind with its bound; never longer than a loop that has stopped deciding may be trusted (safety model 10)."""
    if not licensed(o):
        return Mandate()
    if paused.in_force(o):
        return Mandate(kind="paused", until=NEVER, why="pause")
    loop_until = o.now.plus_s(min(o.settings.ttl_s, 3 * o.settings.loop_wait_s))
    start_s = o.settings.primary_start_timeout_s or 300.0
    operation, postgres = o.operation, o.postgres
    if operation is not None and operation.progress == BEFORE_STOP and may_write(o):
        operation = None        # it still serves, and is to answer
    until: Deadline
    if operation is not None and operation.kind in ("StartPrimary", "Restart", "Promote"):
        return Mandate(kind="starting", until=earlier(loop_until, operation.started_at.plus_s(start_s + stop_timeout_s(o) + o.settings.before_stop_s)), why=operation.kind)
    if operation is not None and operation.kind in ("Demote", "Stop"):
        return Mandate(kind="stopping", until=earlier(loop_until, operation.started_at.plus_s(stop_timeout_s(o) + o.settings.before_stop_s + 5.0)), why=operation.detail)
    if operation is not None and operation.kind == "PrePromote":
        return Mandate(kind="operation", until=earlier(loop_until, operation.started_at.plus_s(o.settings.pre_promote_s + OPERATION_S)), why=operation.kind)
    if operation is not None:
        return Mandate(kind="operation", until=earlier(loop_until, operation.started_at.plus_s(OPERATION_S)), why=operation.kind)
    if may_write(o):
        answered = postgres.answered_at or postgres.since or o.now
        # A little beyond the bound at which decide.lease hands over, so that it is the loop that does it if it can.
        until = answered.plus_s(o.settings.primary_hang_timeout_s + 1.0)
        return Mandate(kind="running", until=earlier(loop_until, until), why="PostgreSQL answers")
    return Mandate(kind="starting", until=loop_until, why=f"PostgreSQL is {postgres.process}")


_OPERATION_STATES = {"Bootstrap": "initializing new cluster", "Clone": "creating replica", "StartPrimary": "starting", "StartStandby": "starting",
                     "Restart": "restarting", "Stop": "stopping", "Demote": "stopping"}


def state(o: Observation) -> str:
    """One of the texts of the compatibility spec 1.10."""
    if o.operation is not None and o.operation.kind in _OPERATION_STATES:
        return _OPERATION_STATES[o.operation.kind]
    process = o.postgres.process
    if process == "absent":
        return "crashed" if o.postgres.ever_started and not o.shutting_down and licensed(o) else "stopped"
    if process == "stopping":
        return "stopping"
    if o.postgres.row is not None:
        return "running"
    return "starting"


def role(o: Observation) -> str:
    """One of the texts of the compatibility spec 1.11."""
    row = o.postgres.row
    if o.directory.state in ("missing", "empty"):
        return "uninitialized"
    if o.operation is not None and o.operation.kind == "Demote":
        return "demoted"
    if row is not None and o.postgres.alive:
        return "replica" if row.in_recovery else "primary"
    return "replica"
