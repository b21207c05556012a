"""Make it so: from an action to a sequence of steps, each sequence in a file of its own.

    context.py   what every operation has at hand        wanted.py   how PostgreSQL is to be configured
    steps.py     what several operations are made of
    keys.py follow.py                  quick: writes to the store; changes of a running server
    bootstrap.py clone.py start.py promote.py demote.py stop.py rewind.py inspect.py     operations
    scripts.py hooks.py callbacks.py   the operator's own programs: asked, waited for, told

Rules: the first failure ends an operation, nothing is tried twice (the next pass sees the truth); an operation can be
cancelled at any await and leaves PostgreSQL safe.
"""

from __future__ import annotations

from typing import Any

import trio

from pgha.act import (
    abandon,
    bootstrap,
    clone,
    demote,
    follow,
    hooks,
    inspect,
    keys,
    promote,
    rewind,
    start,
    steps,
    stop,
    vet,
)
from pgha.act.context import Context, Fence, Progress, Renewer, log
from pgha.act.wanted import Wanted
from pgha.config.judgement import Judgement
from pgha.errors import OperationFailed, PghaError
from pgha.model import action as a
from pgha.model.gucs import GucFacts

__all__ = ["Actor", "Context", "Fence", "Progress", "Renewer", "Wanted"]

#: The checkpoint after a promotion writes everything that the standby had not yet written.
CHECKPOINT_DEADLINE_S = 3600.0


class Actor:
    """Does what a decision asks for, except what is the agent's own: ReadCluster, AnswerRequest, CancelOperation."""

    def __init__(self, ctx: Context) -> None:
        self.ctx = ctx

    async def quick(self, action: a.QuickAction, deadline_s: float) -> None:
        """Within the pass. Raises Refused, OperationFailed, DcsError, PostgresError, GuardError."""
        ctx = self.ctx
        try:
            with trio.fail_after(deadline_s):
                match action:
                    case a.AcquireLock():
                        config = ctx.bootstrap_config() if action.initialize_revision is not None else None
                        await ctx.renewer.acquire(action, deadline_s=deadline_s, config=config)
                    case a.ReleaseLock():
                        await keys.release_lock(ctx, action, deadline_s=deadline_s)
                    case a.StandDown():
                        await keys.stand_down(ctx, action, deadline_s=deadline_s)
                    case a.WriteKey():
                        await keys.write_key(ctx, action, deadline_s=deadline_s)
                    case a.WriteInitialize():
                        await keys.write_initialize(ctx, action, deadline_s=deadline_s)
                    case a.CompactStore():
                        await ctx.store.compact(action.revision, deadline_s=deadline_s)
                        log.info("compacted the store", before_revision=action.revision)
                    case a.Freeze():
                        await follow.freeze(ctx, action)
                    case a.Follow():
                        await follow.follow(ctx, action)
                    case a.ApplyConfiguration():
                        await follow.apply_configuration(ctx, action)
                    case a.SetSynchronousNames():
                        await follow.set_synchronous_names(ctx, action)
                    case a.RestoreStandbySignal():
                        await follow.restore_standby_signal(ctx)
                    case a.MaintainSlots():
                        await follow.maintain_slots(ctx, action, deadline_s=deadline_s)
                    case a.ReadCluster() | a.AnswerRequest() | a.CancelOperation():
                        raise AssertionError(f"{type(action).__name__} is the agent's own")
        except trio.TooSlowError as error:
            raise OperationFailed(f"{type(action).__name__} had not ended after {deadline_s:g} s") from error
        except OSError as error:
            raise OperationFailed(f"{type(action).__name__}: {error}") from error

    async def operate(self, action: a.LongAction, progress: Progress) -> dict[str, Any]:
        """Beside the loop. Returns the facts of the operation; raises as `quick` does."""
        name = type(action).__name__
        began_s = trio.current_time()
        log.info("operation begins", operation=name)
        ended = "cancelled"
        try:
            facts = await self._operate(action, progress)
            ended = "done"
        except PghaError:
            ended = "failed"
            raise
        except trio.TooSlowError as error:
            ended = "failed"
            raise OperationFailed(f"{name}: a step took too long") from error
        except OSError as error:
            ended = "failed"
            raise OperationFailed(f"{name}: {error}") from error
        finally:
            log.info("operation has ended", operation=name, ended=ended, took_s=trio.current_time() - began_s)
        return facts

    async def _operate(self, action: a.LongAction, progress: Progress) -> dict[str, Any]:
        ctx = self.ctx
        match action:
            case a.Bootstrap():
                return await bootstrap.bootstrap(ctx, action, progress)
            case a.Clone():
                return await clone.clone(ctx, action, progress)
            case a.StartStandby():
                return await start.start_standby(ctx, action, progress)
            case a.StartPrimary():
                return await start.start_primary(ctx, action, progress)
            case a.PrePromote():
                return await hooks.pre_promote(ctx, action, progress)
            case a.Promote():
                return await promote.promote(ctx, action, progress)
            case a.Demote():
                return await demote.demote(ctx, action, progress)
            case a.Stop():
                return await stop.stop(ctx, action, progress)
            case a.Restart():
                return await stop.restart(ctx, action, progress)
            case a.Rewind():
                return await rewind.rewind(ctx, action, progress)
            case a.InspectUpstream():
                return await inspect.inspect_upstream(ctx, action, progress)
            case a.InspectEndOfWal():
                return await inspect.inspect_end_of_wal(ctx, action, progress)
            case a.Sweep():
                return await stop.sweep(ctx, action, progress)
            case a.AbandonDirectory():
                return await abandon.abandon(ctx, action, progress)

    async def checkpoint(self) -> bool:
        """The checkpoint after a promotion, in the agent's own time: rewinds of others wait for it. True if it is done."""
        return await steps.checkpoint(self.ctx, deadline_s=CHECKPOINT_DEADLINE_S)

    async def be_standby_at_rest(self) -> bool:
        """standby.signal is there if a whole data directory is at rest; True if it was missing. A few `stat` calls, and
        /proc. OSError, OperationFailed."""
        return await steps.rest_as_found(self.ctx)

    async def judge_configuration(self, old: dict[str, Any] | None, new: Any) -> Judgement:
        """What is wrong with replacing the shared configuration `old` by `new`, and what it would do here. Changes nothing."""
        return await vet.judge(self.ctx, old, new)

    async def vet_configuration(self) -> None:
        """Beside a server that has been found running, nothing is written: what is to be left out is known all the same."""
        if self.ctx.wanted.to_vet() != self.ctx.wanted.vetted:
            await vet.vet(self.ctx)
            self.ctx.configuration_changed()

    async def gucs(self) -> GucFacts:
        """What PostgreSQL says of its parameters now. PostgresError, OSError."""
        return (await vet.facts(self.ctx))[0]

    async def discard_old(self) -> list[str]:
        """Delete the data directories that clones have replaced and marked: once the new one streams, also by a later agent."""
        return await clone.discard_old(self.ctx)
