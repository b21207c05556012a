"""The agent was told to stop: PostgreSQL stops cleanly, and a leader hands its lock over."""

from __future__ import annotations

from msgspec.structs import replace

from pgha.decide import paused, synchronous
from pgha.decide.common import may_write, reason, stop_timeout_s
from pgha.decide.standing import licensed
from pgha.model.action import Demote, ReleaseLock, StandDown, Stop, Sweep
from pgha.model.decision import Decision, Memory
from pgha.model.observation import Observation


def decide(o: Observation, memory: Memory) -> Decision | None:
    if not o.shutting_down:
        return None
    because = (reason("stopping.asked", True, "the agent was told to stop"),)
    if paused.leaves_running(o):
        return Decision(situation="stopping", summary="leaving PostgreSQL and the lock as they are: pause", reasons=because,
                        memory=replace(memory, shutdown_done=True, left_running=True), wake_in_s=0.1)
    if o.postgres.alive:
        writes = may_write(o) or licensed(o)
        let_go = synchronous.is_to_be_let_go(o, memory)
        if not writes and not let_go.holds:
            memory = memory if memory.leaving_since else replace(memory, leaving_since=o.now)
            return Decision(situation="stopping", summary=f"stopping: {let_go.because}", reasons=(*because, let_go), memory=memory, wake_in_s=0.1)
        action: Demote | Stop = (
            Demote(mode="fast", release=True, checkpoint=True, why="agent stops", timeout_s=stop_timeout_s(o), before_stop_s=o.settings.before_stop_s) if writes
            else Stop(why="agent stops", timeout_s=stop_timeout_s(o), before_stop_s=o.settings.before_stop_s)
        )
        return Decision(situation="stopping", summary="stopping PostgreSQL", reasons=because, actions=(action,), memory=memory)
    if o.postgres.orphans:
        return Decision(situation="stopping", summary="killing what is left of a dead server", reasons=because, actions=(Sweep(),), memory=memory)
    if licensed(o):
        lsn, timeline = (o.directory.control.checkpoint_lsn, o.directory.control.timeline) if o.directory.control else (0, 0)
        release: ReleaseLock | StandDown = ReleaseLock(lsn=lsn, timeline=timeline, why="agent stops")
        if o.licence.endless:
            release = paused.give_back(o, lsn=lsn, timeline=timeline, why="agent stops")
        return Decision(situation="stopping", summary="giving the lock back", reasons=because, actions=(release,),
                        memory=replace(memory, shutdown_done=True), wake_in_s=0.2)
    return Decision(situation="stopping", summary="stopped", reasons=because, memory=replace(memory, shutdown_done=True), wake_in_s=0.1)
