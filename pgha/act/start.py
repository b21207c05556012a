"""Start PostgreSQL: as a standby, which the guard lets live; or as primary, which needs the licence and an armed guard."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import trio

from pgha.act.context import Context, Progress, log
from pgha.act.steps import (
    HURRY_S,
    Timeline,
    be_standby_at_rest,
    control,
    make_safe,
    ready_to_start,
    wait_primary,
)
from pgha.act.vet import vet
from pgha.errors import CommandFailed, OperationFailed, PostgresTimeout
from pgha.model.action import Source, StartPrimary, StartStandby
from pgha.postgres import files, histories

#: A standby that needs longer until it accepts sessions is recovering: the observer tells the rest.
STANDBY_READY_S = 2.0


async def start_standby(ctx: Context, action: StartStandby, progress: Progress) -> dict[str, Any]:
    """Returns once it accepts sessions, or answers that it is starting."""
    times = Timeline()
    await ready_to_start(ctx)
    await be_standby_at_rest(ctx)
    await start_prepared_standby(ctx, action.upstream, action.slot_name, progress, times)
    ctx.told.started("replica")
    return times.took


async def start_prepared_standby(ctx: Context, upstream: Source | None, slot_name: str, progress: Progress, times: Timeline) -> None:
    """Configuration, guard, start. standby.signal is there."""
    ctx.wanted.follow(upstream, slot_name)
    ctx.wanted.set_names(None)      # nothing of the directory lives: no commit waits any more; a promotion sets it anew
    said = await control(ctx)
    await vet(ctx)
    await ctx.on_disk(ctx.wanted.write_stopped, said)
    await forget_blocked_timelines(ctx)
    times.mark("configuration")
    await ctx.fence.standby()
    times.mark("guard")
    progress(f"starting as a standby of {upstream.name if upstream else 'nobody'}")
    with _on_trial(ctx):
        server = await ctx.server.start(ctx.wanted.command_line(said))
    ctx.hurry(HURRY_S)
    try:
        try:
            with _on_trial(ctx):
                await ctx.server.wait_ready(server, deadline_s=STANDBY_READY_S)
        except PostgresTimeout:
            await _wait_answers(ctx)
        await _note_started(ctx)
        times.mark("start")
        log.info("started as a standby", pid=server.pid, upstream=upstream.name if upstream else "", status=server.status(),
                 took_s=times.total_s)
    finally:
        server.close()


async def _note_started(ctx: Context) -> None:
    if ctx.wanted.started_is_news():
        await ctx.on_disk(ctx.wanted.note_started)


@contextmanager
def _on_trial(ctx: Context) -> Iterator[None]:
    """A postmaster that ends instead of starting: its settings may be why."""
    try:
        yield
    except CommandFailed as error:
        ctx.wanted.did_not_start(str(error))
        raise


async def forget_blocked_timelines(ctx: Context) -> None:
    """A block that a killed promotion has left would hide the real history of that timeline: a walreceiver does not
    fetch a file that is there, and the standby stays behind for ever (measured)."""
    if numbers := await ctx.on_disk(histories.unblock_all, ctx.data_dir):
        log.info("removed blocks of timelines", numbers=numbers)


async def _wait_answers(ctx: Context) -> None:
    """It recovers. That it does is seen from its refusals."""
    where = ctx.wanted.local_conninfo()
    limit_s = ctx.wanted.effective().postgresql.pg_ctl_timeout_s      # no answer at all in this time: something is wrong with it
    if not await ctx.machine.answers_startup(str(where["host"]), int(where["port"]), deadline_s=limit_s):
        raise OperationFailed(f"PostgreSQL runs, but has not answered within {limit_s:g} s (pg_ctl_timeout): {ctx.server.log_tail()[-500:]}")


async def start_primary(ctx: Context, action: StartPrimary, progress: Progress) -> dict[str, Any]:
    """In place, without a new timeline. Returns once it accepts writes."""
    times = Timeline()
    await ready_to_start(ctx)
    await start_prepared_primary(ctx, progress, times, timeout_s=action.timeout_s, synchronous_names=action.synchronous_names)
    ctx.told.started("primary")
    return times.took


async def start_prepared_primary(ctx: Context, progress: Progress, times: Timeline, *, timeout_s: float, synchronous_names: str | None) -> None:
    """Configuration (with synchronous_standby_names: the first commit waits already; safety model 13), guard, removal of standby.signal, guard again, start, standby.signal back (safety model 7).

    Whatever goes wrong, and a cancellation as well, ends with everything killed and standby.signal back.
    """
    ctx.wanted.no_longer_frozen()
    ctx.wanted.set_names(synchronous_names)
    said = await control(ctx)
    await vet(ctx)
    await ctx.on_disk(ctx.wanted.write_stopped, said, standby=False)
    times.mark("configuration")
    await ctx.fence.armed()
    try:
        await ctx.on_disk(files.remove_standby_signal, ctx.data_dir)
        await ctx.fence.armed()      # the disk may have taken its time
        times.mark("armed")
        progress("starting as primary")
        with _on_trial(ctx):
            server = await ctx.server.start(ctx.wanted.command_line(said, standby=False))
        ctx.hurry(HURRY_S)
        began_s = trio.current_time()
        try:
            with _on_trial(ctx), trio.fail_after(timeout_s + 1.0):
                await wait_primary(ctx, server, deadline_s=timeout_s)
        except (PostgresTimeout, trio.TooSlowError) as error:
            overdue = trio.current_time() - began_s >= timeout_s
            raise OperationFailed(f"started as primary, it does not accept writes: {error or type(error).__name__}", overdue=overdue) from error
        finally:
            server.close()
        times.mark("start")
        await be_standby_at_rest(ctx)
        times.mark("standby_signal")
        await _note_started(ctx)
    except BaseException:   # also trio.Cancelled: a primary that nobody waits for must not stay
        await make_safe(ctx, "the start as primary was not completed")
        raise
    log.info("started as primary", pid=server.pid, took_s=times.total_s, **times.took)
