"""Take note of how the last operation ended: what the next passes must remember of it."""

from __future__ import annotations

from msgspec.structs import replace

from pgha.clock import remaining_s
from pgha.decide import cramped, reinit
from pgha.decide.common import may_write
from pgha.decide.standing import licensed
from pgha.model.decision import Memory
from pgha.model.observation import Observation, Operation

#: After a failed promotion, or a hand-over, this node leaves the field to others for so long.
STAND_BACK_S = 10.0


def note_ended(o: Observation, memory: Memory) -> Memory:
    """The memory with the end of `o.ended` noted, once."""
    memory = _note_life(o, memory)
    ended = o.ended
    if ended is None or ended.id == memory.last_ended_id or ended.ended_at is None:
        return memory
    memory = replace(memory, last_ended_id=ended.id)
    note = _NOTES.get(ended.kind)
    return memory if note is None else note(o, memory, ended)


def _note_life(o: Observation, memory: Memory) -> Memory:
    """What PostgreSQL's state, and the licence's, say by themselves."""
    if memory.holding_since is not None and not licensed(o):
        memory = replace(memory, holding_since=None)
    if o.postgres.process == "running" and o.postgres.answer == "sql" and (memory.crash_seen_at or memory.start_failures):
        memory = replace(memory, crash_seen_at=None, handover_judged_at=None, start_failures=0, last_start_failed_at=None)
    asked_to_stop = memory.reinit is not None or any(r.kind == "restart" for r in o.requests) or not cramped.has_room(o).holds
    if memory.leaving_since is not None and not o.shutting_down and o.operation is None and not asked_to_stop:
        memory = replace(memory, leaving_since=None)
    if memory.restart_overdue and o.postgres.process == "running" and o.postgres.answer == "sql":
        memory = replace(memory, restart_overdue=False)
    if memory.ours_to_start and o.postgres.alive and o.operation is None:
        memory = replace(memory, ours_to_start=False)
    if memory.paused and not o.settings.pause:
        # Resumed: what was found out about rewinding before may have been mended by the operator.
        memory = replace(memory, rewind_failed="", rewind_failed_for="", rewind_failures=0, last_rewind_failed_at=None, upstream_asked_at=None)
    row = o.postgres.row
    streaming = row is not None and row.receiver is not None and row.receiver.status == "streaming"
    if row is None or not row.in_recovery or not o.postgres.alive or streaming:
        return replace(memory, not_streaming_since=None) if memory.not_streaming_since else memory
    return memory if memory.not_streaming_since else replace(memory, not_streaming_since=o.now)


def rewind_target(o: Observation) -> str:
    """What a rewind is for: another leader, or another timeline, is another try."""
    return f"{o.upstream.name}/{o.upstream.timeline}" if o.upstream is not None else ""


def _bootstrap(_: Observation, memory: Memory, ended: Operation) -> Memory:
    if not ended.ok:
        return replace(memory, clone_failures=memory.clone_failures + 1, last_clone_failed_at=ended.ended_at)
    return replace(memory, bootstrap_identifier=str(ended.facts.get("system_identifier", "")),
                   bootstrap_revision=int(ended.facts.get("initialize_revision", 0)), clone_failures=0)


def _clone(_: Observation, memory: Memory, ended: Operation) -> Memory:
    wanted = memory.reinit
    if wanted is not None and remaining_s(ended.started_at, wanted.asked_at) >= 0:
        memory = reinit.ended(memory, ok=ended.ok, why=ended.why)
        if not ended.ok:
            return memory       # what is there goes on as before
    if ended.ok:
        return replace(memory, clone_failures=0, last_clone_failed_at=None, rewind_failed="", start_failures=0)
    return replace(memory, clone_failures=memory.clone_failures + 1, last_clone_failed_at=ended.ended_at)


def _start(_: Observation, memory: Memory, ended: Operation) -> Memory:
    if ended.ok:
        return replace(memory, start_failures=0, last_start_failed_at=None)
    return replace(memory, start_failures=memory.start_failures + 1, last_start_failed_at=ended.ended_at)


def _restart(o: Observation, memory: Memory, ended: Operation) -> Memory:
    """A primary that has not stopped, or not started, within the time that its restart was given for each (what before_stop
    took is not held against it): somebody else is to be one (compatibility spec 3.5)."""
    overdue = not ended.ok and memory.restart_within_s > 0.0 and bool(ended.facts.get("overdue"))
    return _start(o, replace(memory, restart_within_s=0.0, restart_overdue=overdue), ended)


def _stop(_: Observation, memory: Memory, ended: Operation) -> Memory:
    return memory if ended.ok else reinit.ended(memory, ok=False, why=ended.why)


def _pre_promote(o: Observation, memory: Memory, ended: Operation) -> Memory:
    """A script that was ended for another reason than its time has said nothing: it is asked again."""
    memory = replace(memory, holding_since=None)        # it was not this node's idleness that took the time
    if not ended.ok:
        return memory
    if ended.facts.get("agrees"):
        return replace(memory, pre_promoted_epoch=int(ended.facts["epoch"]), vetoed_until=None, veto_why="")
    return replace(memory, vetoed_until=o.now.plus_s(o.settings.ttl_s), veto_why=f"pre_promote refused ({ended.facts.get('said', '')})")


def _promote(o: Observation, memory: Memory, ended: Operation) -> Memory:
    if ended.ok:
        return replace(memory, election=None, promotion_failed_at=None)
    return replace(memory, promotion_failed_at=ended.ended_at, stand_back_until=o.now.plus_s(STAND_BACK_S),
                   stand_back_why=f"its promotion failed: {ended.why}")


def _demote(o: Observation, memory: Memory, ended: Operation) -> Memory:
    if not ended.ok and may_write(o):       # ended while before_stop ran: nothing has been tried
        memory = replace(memory, handed_over_revision=-1)
    if ended.facts.get("released"):
        return replace(memory, election=None, crash_seen_at=None, handover_judged_at=None, promotion_failed_at=None, holding_since=None, stand_back_until=o.now.plus_s(STAND_BACK_S),
                       stand_back_why="it has just handed the lock over")
    return replace(memory, election=None, promotion_failed_at=None, holding_since=None)


def _rewind(o: Observation, memory: Memory, ended: Operation) -> Memory:
    """Only a failure that leaves nothing to rewind is final; a connection that was refused is tried again."""
    if ended.ok:
        return replace(memory, rewind_failed="", rewind_failed_for="", rewind_failures=0, last_rewind_failed_at=None, upstream_asked_at=None)
    memory = replace(memory, rewind_failures=memory.rewind_failures + 1, last_rewind_failed_at=ended.ended_at, upstream_asked_at=None)
    if not ended.facts.get("final"):
        return memory
    return replace(memory, rewind_failed=ended.why or "unknown", rewind_failed_for=rewind_target(o))


_NOTES = {
    "Bootstrap": _bootstrap,
    "Clone": _clone,
    "StartStandby": _start,
    "StartPrimary": _start,
    "Restart": _restart,
    "Stop": _stop,
    "PrePromote": _pre_promote,
    "Promote": _promote,
    "Demote": _demote,
    "Rewind": _rewind,
}
