"""Stop accepting writes: in order or at once, and in any case so that it is proved. Write downtime counts here."""

from __future__ import annotations

from typing import Any

import trio

from pgha.act.context import Context, Progress, log
from pgha.act.hooks import before_stop
from pgha.act.steps import (
    SQL_DEADLINE_S,
    Timeline,
    be_standby_at_rest,
    checkpoint,
    closing,
    connect,
    kill_everything,
    last_position,
    stop_fast,
)
from pgha.errors import DcsError, DcsUnreachable, OperationFailed, PghaError, PostgresError
from pgha.lock.recipe import Proc
from pgha.model.action import Demote
from pgha.model.wal import Position

#: The server goes on serving while it checkpoints; a shutdown that has more to write is better than no shutdown.
CHECKPOINT_DEADLINE_S = 10.0
#: The second checkpoint, right after a long first one, so that the shutdown's own finds little to write.
SHORT_CHECKPOINT_S = 2.0
RELEASE_DEADLINE_S = 3.0
#: A standby that is well confirms within milliseconds.
CONFIRM_S = 0.5


async def demote(ctx: Context, action: Demote, progress: Progress) -> dict[str, Any]:
    """Facts: lsn, timeline, clean, released, and what each step took.

    The release comes as soon as nothing of the data directory lives and its end is known; the guard and the disk are
    told afterwards.
    """
    times = Timeline()
    ran = bool(ctx.directory.processes())
    if action.mode == "fast":
        await _stop_in_order(ctx, action, progress, times)
    progress("making sure that nothing lives")
    killed = await kill_everything(ctx, action.why)
    if ran:
        ctx.told.stopped()
    times.mark("sweep")
    position, state = await last_position(ctx)
    times.mark("position")
    released, why_not = False, ""
    if action.release:
        progress("releasing the lock")
        released, why_not = await _release(ctx, position)
        times.mark("release")
    await be_standby_at_rest(ctx)
    await ctx.fence.standby()
    times.mark("standby")
    log.info("demoted", mode=action.mode, why=action.why, state=state, killed=killed, position=str(position), released=released,
             took_s=times.total_s, **times.took)
    if why_not:
        raise DcsUnreachable(f"demoted, but the lock was not released: {why_not}")
    return {"lsn": position.lsn, "timeline": position.timeline, "clean": state == "shut down", "killed": killed, "released": released, **times.took}


async def _stop_in_order(ctx: Context, action: Demote, progress: Progress, times: Timeline) -> None:
    server = ctx.machine.adopt()
    if server is None:
        return
    laggards: tuple[Proc, ...] = ()
    try:
        if action.checkpoint:
            progress("checkpoint before the shutdown")
            began_s = trio.current_time()
            done = await checkpoint(ctx, deadline_s=CHECKPOINT_DEADLINE_S)
            if done and trio.current_time() - began_s > SHORT_CHECKPOINT_S / 2:
                await checkpoint(ctx, deadline_s=SHORT_CHECKPOINT_S)
            times.mark("checkpoint")
        if action.before_stop_s:
            await before_stop(ctx, action.before_stop_s, progress)
            times.mark("before_stop")
        if action.checkpoint:
            laggards = await _laggards(ctx)
            times.mark("laggards")
        progress("stopping PostgreSQL")
        await stop_fast(ctx, server, timeout_s=action.timeout_s, laggards=laggards)
        times.mark("stop")
    finally:
        server.close()


async def _laggards(ctx: Context) -> tuple[Proc, ...]:
    """Walsenders whose standby does not confirm, within a moment, what is flushed now. Writes go on meanwhile."""
    try:
        with closing(await connect(ctx)) as conn:
            lsn = (await conn.query("SELECT pg_current_wal_flush_lsn()", deadline_s=SQL_DEADLINE_S))[0][0]
            sql = "SELECT pid, application_name FROM pg_stat_replication WHERE (flush_lsn >= $1::pg_lsn) IS NOT TRUE"
            ends_at = trio.current_time() + CONFIRM_S
            while (rows := await conn.query(sql, lsn, deadline_s=SQL_DEADLINE_S)) and trio.current_time() < ends_at:  # noqa: ASYNC110  (the server tells nobody)
                await trio.sleep(0.02)
    except (PostgresError, OperationFailed) as error:
        log.warning("walsenders could not be asked for", why=str(error))
        return ()
    if rows:
        log.warning("standbys do not confirm: the shutdown will not wait for them", standbys=[name for _, name in rows])
    found = (ctx.machine.read_proc(int(pid or 0)) for pid, _ in rows)
    return tuple(proc for proc in found if proc is not None)


async def _release(ctx: Context, position: Position) -> tuple[bool, str]:
    try:
        await ctx.renewer.release(lsn=position.lsn, timeline=position.timeline, deadline_s=RELEASE_DEADLINE_S)
    except trio.TooSlowError:
        return False, f"no answer within {RELEASE_DEADLINE_S:g} s"
    except (DcsError, PghaError) as error:
        return False, str(error)
    return True, ""
