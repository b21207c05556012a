"""Stop a standby; restart in place; sweep up what a dead postmaster left."""

from __future__ import annotations

from typing import Any

from pgha.act.context import Context, Progress, log
from pgha.act.hooks import before_stop
from pgha.act.start import start_prepared_primary, start_prepared_standby
from pgha.act.steps import (
    Timeline,
    be_standby_at_rest,
    checkpoint,
    kill_everything,
    ready_to_start,
    shut_down,
    stop_fast,
)
from pgha.errors import OperationFailed
from pgha.model.action import Restart, Stop, Sweep

#: Before a restart, so that the shutdown itself is short; sessions go on meanwhile.
CHECKPOINT_DEADLINE_S = 60.0


async def stop(ctx: Context, action: Stop, progress: Progress) -> dict[str, Any]:
    """Fast, then by the recipe; afterwards nothing lives and the guard knows a standby at rest."""
    times = Timeline()
    ran = bool(ctx.directory.processes())
    if ran:
        await before_stop(ctx, action.before_stop_s, progress)
    killed = await _down(ctx, action.timeout_s, action.why, progress)
    if ran:
        ctx.told.stopped()
    await be_standby_at_rest(ctx)
    await ctx.fence.standby()
    times.mark("stop")
    log.info("stopped PostgreSQL", why=action.why, killed=killed, took_s=times.total_s)
    return {"killed": killed, **times.took}


async def restart(ctx: Context, action: Restart, progress: Progress) -> dict[str, Any]:
    """Stop and start in the same role. As primary the lock is kept, and a shutdown that does not end in time is no
    reason to kill: it fails, and the next pass decides."""
    times = Timeline()
    ctx.wanted.try_configured()
    if action.as_primary:
        progress("checkpoint before the restart")
        await checkpoint(ctx, deadline_s=CHECKPOINT_DEADLINE_S)
        times.mark("checkpoint")
        server = ctx.machine.adopt()
        if server is not None:
            try:
                if not await before_stop(ctx, action.before_stop_s, progress):
                    raise OperationFailed("PostgreSQL gives no sign of life: it is not restarted, but handed over")
                progress("stopping PostgreSQL")
                if not await stop_fast(ctx, server, timeout_s=action.timeout_s) and not await shut_down(ctx):
                    raise OperationFailed(f"PostgreSQL had not stopped after {action.timeout_s:g} s", overdue=True)
            finally:
                server.close()
        times.mark("stop")
        await kill_everything(ctx, "restart")
        await ready_to_start(ctx)
        await start_prepared_primary(ctx, progress, times, timeout_s=action.timeout_s, synchronous_names=action.synchronous_names)
    else:
        await before_stop(ctx, action.before_stop_s, progress)
        await _down(ctx, action.timeout_s, "restart", progress)
        times.mark("stop")
        await be_standby_at_rest(ctx)
        await ready_to_start(ctx)
        await start_prepared_standby(ctx, action.upstream, action.slot_name, progress, times)
    ctx.told.restarted("primary" if action.as_primary else "replica")
    log.info("restarted PostgreSQL", as_primary=action.as_primary, took_s=times.total_s, **times.took)
    return times.took


async def sweep(ctx: Context, action: Sweep, progress: Progress) -> dict[str, Any]:
    """Orphans of a dead postmaster. A living postmaster is none of a sweep's business."""
    del action
    server = ctx.machine.adopt()
    if server is not None:
        server.close()
        raise OperationFailed(f"postmaster {server.pid} lives: there is nothing to sweep up")
    progress("killing what is left")
    return {"killed": await kill_everything(ctx, "sweep")}


async def _down(ctx: Context, timeout_s: float, why: str, progress: Progress) -> int:
    """Nothing of the data directory lives any more; how many had to be killed."""
    server = ctx.machine.adopt()
    if server is not None:
        progress("stopping PostgreSQL")
        try:
            await stop_fast(ctx, server, timeout_s=timeout_s)
        finally:
            server.close()
    return await kill_everything(ctx, why)
