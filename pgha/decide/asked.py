"""What do operators ask of this node: is it taken on, refused, or kept for its time? Before any situation is looked at.

A restart that may be is left in the observation, where the situation that can carries it out; so is, with the number 0,
one whose scheduled time has come. A request to reinitialize is kept in the memory, and carried out by decide/reinit.py.
Everything else is answered here. What is asked here is asked of values, so that a dry run can ask it as well.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from msgspec import Struct
from msgspec.structs import replace

from pgha.decide import reinit
from pgha.decide.common import reason
from pgha.decide.schedule import Due, When, when
from pgha.decide.standing import licensed
from pgha.model.action import AnswerRequest, CancelOperation, QuickAction
from pgha.model.decision import Memory, Reason
from pgha.model.observation import Observation
from pgha.model.overview import is_standby_cluster
from pgha.model.request import Reinitialisation, Request, ScheduledRestart, server_version

#: Operations that an operator would not want to be begun behind, in the words that they are told. What is not here is over in a moment.
IN_PROGRESS = {"Bootstrap": "bootstrap", "Clone": "copy of the data", "PrePromote": "promote", "Promote": "promote", "Demote": "demote", "Restart": "restart", "Rewind": "rewind"}
#: Of these, what `force` ends: what can be begun again. Nothing that makes or ends a primary.
FORCED_TO_END = ("Clone", "Rewind")
#: The conditions of a restart, as POST /restart names them.
CONDITIONS = ("restart_pending", "role", "postgres_version")


class Asked(Struct, frozen=True, kw_only=True):
    """The observation with the requests that a situation is to carry out, and what is done at once."""

    seen: Observation
    memory: Memory
    actions: tuple[QuickAction, ...] = ()
    reasons: tuple[Reason, ...] = ()


def take(o: Observation, memory: Memory) -> Asked:
    """What becomes of each request, and of what was scheduled."""
    left: list[Request] = []
    actions: list[QuickAction] = []
    reasons: tuple[Reason, ...] = ()
    for request in o.requests:
        match request.kind:
            case "restart" if "schedule" in request.options:
                answer, memory = _schedule(o, memory, request)
                actions.append(answer)
            case "restart":
                refused, reasons = _refused(o, memory, request)
                if refused is None:
                    left.append(request)
                else:
                    actions.append(refused)
            case "cancel_restart":
                answer, memory = _cancel(memory, request)
                actions.append(answer)
            case "reinitialize":
                answers, memory, reasons = _reinitialize(o, memory, request)
                actions += answers
                if not answers:
                    left.append(request)        # the directory is being looked at: the next pass knows
            case _:
                left.append(request)
    due, memory, more = _scheduled(o, memory)
    return Asked(seen=replace(o, requests=(*left, *due)), memory=memory, actions=tuple(actions), reasons=(*reasons, *more))


# --- restart -------------------------------------------------------------------------------------------------------------

def restart_conditions(o: Observation, asked: Mapping[str, Any]) -> tuple[Reason, ...]:
    """The conditions that came with a request for a restart: what is not asked for holds."""
    return (restart_is_pending(o, asked), has_role(o, asked), version_is_lower(o, asked))


def restart_is_pending(o: Observation, asked: Mapping[str, Any]) -> Reason:
    pending = sorted(o.postgres.row.pending_restart) if o.postgres.row is not None else []
    holds = "restart_pending" not in asked or bool(pending)
    return reason("asked.restart_is_pending", holds, f"{', '.join(pending)} wait for a restart" if pending else "nothing waits for a restart")


def has_role(o: Observation, asked: Mapping[str, Any]) -> Reason:
    rule, wanted, row = "asked.has_role", asked.get("role"), o.postgres.row
    if wanted is None:
        return reason(rule, True, "of any role")
    role = "unknown" if row is None else "primary" if not row.in_recovery else "replica"
    if role == "replica" and licensed(o) and o.dcs.view is not None and is_standby_cluster(o.dcs.view.config or {}):
        role = "standby_leader"
    return reason(rule, role == wanted, f"asked of a {wanted}, this is a {role}")


def version_is_lower(o: Observation, asked: Mapping[str, Any]) -> Reason:
    rule, wanted, row = "asked.version_is_lower", asked.get("postgres_version"), o.postgres.row
    if wanted is None:
        return reason(rule, True, "of any version")
    try:
        limit = server_version(str(wanted))
    except ValueError as error:
        return reason(rule, False, f"{str(wanted)[:20]!r} {error}")
    running = row.server_version if row is not None else 0
    return reason(rule, 0 < running < limit, f"PostgreSQL is {running}, asked for below {limit}")


def is_the_one_meant(o: Observation, scheduled: ScheduledRestart) -> Reason:
    """A server that was restarted since has what a restart was scheduled for."""
    rule, row = "asked.is_the_one_meant", o.postgres.row
    if row is None or not row.started_at or not scheduled.postmaster_start_time:
        return reason(rule, True, "when PostgreSQL was started is not known")
    return reason(rule, row.started_at == scheduled.postmaster_start_time, f"PostgreSQL was started at {row.started_at}, the restart is for the one of {scheduled.postmaster_start_time}")


def is_in_time(o: Observation, scheduled: ScheduledRestart, at: When) -> Reason:
    """Once begun it takes its time (a synchronous standby waits to be let go); but what a pause has held up is not made up for."""
    return reason("asked.is_in_time", at.due in (Due.LATER, Due.NOW) or (scheduled.begun and not o.settings.pause), at.because)


def _refused(o: Observation, memory: Memory, request: Request) -> tuple[AnswerRequest | None, tuple[Reason, ...]]:
    def answer(text: str) -> AnswerRequest:
        return AnswerRequest(id=request.id, status=503, text=text)

    if (busy := in_progress(o, memory)) is not None:
        return answer(f"{busy} already in progress"), ()
    if o.postgres.alive and o.postgres.answer == "starting":
        return answer("postgres is still starting"), ()
    conditions = restart_conditions(o, request.options)
    return (None if all(c.holds for c in conditions) else answer("restart conditions are not satisfied")), conditions


def in_progress(o: Observation, memory: Memory) -> str | None:
    """What runs, that a request would have to wait for; None if nothing does."""
    if memory.reinit is not None:
        return "reinitialize"
    return IN_PROGRESS.get(o.operation.kind) if o.operation is not None else None


def _schedule(o: Observation, memory: Memory, request: Request) -> tuple[AnswerRequest, Memory]:
    if memory.scheduled_restart is not None:
        return AnswerRequest(id=request.id, status=409, text="Another restart is already scheduled"), memory
    if o.settings.pause:
        return AnswerRequest(id=request.id, status=500, text="Can't schedule restart in the paused state"), memory
    row = o.postgres.row
    kept = {k: v for k, v in request.options.items() if k in (*CONDITIONS, "timeout")}
    scheduled = ScheduledRestart(schedule=str(request.options["schedule"]), postmaster_start_time=row.started_at if row else "", conditions=kept)
    return AnswerRequest(id=request.id, status=202, text="Restart scheduled"), replace(memory, scheduled_restart=scheduled, said=f"restart scheduled at {scheduled.schedule}")


def _cancel(memory: Memory, request: Request) -> tuple[AnswerRequest, Memory]:
    if memory.scheduled_restart is None:
        return AnswerRequest(id=request.id, status=404, text="no restarts are scheduled"), memory
    return (AnswerRequest(id=request.id, status=200, text="scheduled restart deleted"),
            replace(memory, scheduled_restart=None, said=f"restart scheduled at {memory.scheduled_restart.schedule}: deleted by an operator"))


def _scheduled(o: Observation, memory: Memory) -> tuple[tuple[Request, ...], Memory, tuple[Reason, ...]]:
    """The restart whose time has come, as a request that nobody waits for; or it is dropped, and why."""
    scheduled = memory.scheduled_restart
    if scheduled is None:
        return (), memory, ()
    if scheduled.begun and _restarts(o, memory):    # not when it is decided: an action before it in that pass may fail
        return (), replace(memory, scheduled_restart=None, said=f"restart scheduled at {scheduled.schedule}: begun"), ()
    at = when(o, scheduled.schedule)
    meant, timely = is_the_one_meant(o, scheduled), is_in_time(o, scheduled, at)
    obstacles = [r for r in (meant, timely) if not r.holds]
    now = scheduled.begun or at.due is Due.NOW
    if now and not o.settings.pause and o.postgres.row is not None and o.operation is None:
        obstacles += [r for r in restart_conditions(o, scheduled.conditions) if not r.holds]
        if not obstacles:
            timeout = scheduled.conditions.get("timeout")
            request = Request(id=0, kind="restart", at=o.now, options={} if timeout is None else {"timeout_s": timeout})
            return (request,), replace(memory, scheduled_restart=replace(scheduled, begun=True)), ()
    if not obstacles:
        return (), memory, ()
    said = f"restart scheduled at {scheduled.schedule}: dropped: {obstacles[0].because}"
    return (), replace(memory, scheduled_restart=None, said=said), tuple(obstacles)


def due_in_s(o: Observation, memory: Memory) -> float:
    """Until the scheduled restart's time; infinity if there is none to wait for."""
    scheduled = memory.scheduled_restart
    at: When | None = when(o, scheduled.schedule) if scheduled is not None else None
    return at.in_s if at is not None and at.due is Due.LATER else float("inf")


def _restarts(o: Observation, memory: Memory) -> bool:
    """A restart runs, or has ended since the last pass, which may be all that is seen of it."""
    ended = o.ended if o.ended is not None and o.ended.id != memory.last_ended_id else None
    return any(operation is not None and operation.kind == "Restart" for operation in (o.operation, ended))


# --- reinitialize ----------------------------------------------------------------------------------------------------------

def _reinitialize(o: Observation, memory: Memory, request: Request) -> tuple[tuple[QuickAction, ...], Memory, tuple[Reason, ...]]:
    if o.directory.state == "unknown" and o.operation is None:
        return (), memory, ()
    force = bool(request.options.get("force"))
    conditions = reinit.conditions(o)
    if (text := reinit.refusal(conditions)) is not None:
        return (AnswerRequest(id=request.id, status=503, text=text),), memory, conditions
    busy, operation = in_progress(o, memory), o.operation
    if busy is not None and not (force and (operation is None or operation.kind in FORCED_TO_END or operation.kind not in IN_PROGRESS)):
        return (AnswerRequest(id=request.id, status=503, text=f"{busy} already in progress"),), memory, conditions
    ends: tuple[QuickAction, ...] = ()
    if operation is not None and operation.kind in FORCED_TO_END and not operation.cancelling:
        ends = (CancelOperation(id=operation.id, why="an operator asks to reinitialize"),)
    wanted = Reinitialisation(request=request.id, asked_at=o.now, from_leader=bool(request.options.get("from_leader")))
    memory = replace(memory, reinit=wanted, said=f"reinitialize asked for{' (from the leader)' if wanted.from_leader else ''}")
    return (*ends, AnswerRequest(id=request.id, status=200, text="reinitialize started")), memory, conditions
