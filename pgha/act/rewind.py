"""Bring the own data directory back to the leader's history."""

from __future__ import annotations

from typing import Any

import trio

from pgha.act.clone import in_words
from pgha.act.context import Context, Progress, log
from pgha.act.steps import (
    CLEAN_UP_S,
    Timeline,
    be_standby_at_rest,
    closing,
    control,
    nothing_lives,
    reachable,
    while_offline,
)
from pgha.errors import OperationFailed, PghaError, QueryFailed
from pgha.model.action import Rewind
from pgha.postgres import files
from pgha.postgres.basebackup import Progress as Copied
from pgha.postgres.connection import Connection
from pgha.postgres.controldata import ControlData
from pgha.postgres.pg_rewind import Rewound, interrupted
from pgha.postgres.pg_rewind import rewind as run_rewind
from pgha.postgres.processes import remove_dead_pid_file

ASK_DEADLINE_S = 5.0
#: The source's checkpoint after its promotion: pg_rewind reads the timeline from its pg_control.
CHECKPOINT_DEADLINE_S = 120.0
RECOVERY_DEADLINE_S = 3600.0
REWIND_DEADLINE_S = 86400.0
_INSUFFICIENT_PRIVILEGE = "42501"


async def rewind(ctx: Context, action: Rewind, progress: Progress) -> dict[str, Any]:
    """Facts: outcome ("rewound", "not_needed"), timeline before. OperationFailed says whether the directory was changed.

    It is `final` if rewinding again cannot help, as the directory is half rewound or lacks WAL that nobody has.
    The guard is told that our programs have the directory, and standby.signal is away only for as long.
    """
    times = Timeline()
    nothing_lives(ctx)
    again = await ctx.on_disk(interrupted, ctx.data_dir)
    await ctx.on_disk(remove_dead_pid_file, ctx.data_dir)
    await ctx.on_disk(ctx.wanted.write_passfile)
    progress(f"asking {action.source.name}")
    timeline = await _source_is_ready(ctx, action, progress)
    times.mark("source")
    try:
        before, result = await while_offline(ctx, lambda: _rewind(ctx, action, timeline, progress, times))
    finally:
        await _back_to_rest(ctx)
    log.info("rewind has ended", source=action.source.name, why=action.why, outcome=result.outcome, took_s=times.total_s, **times.took)
    if result.outcome in ("missing_wal", "failed", "hopeless"):
        what = f"WAL segment {result.missing_segment} is missing here" if result.missing_segment else result.output[-1000:]
        final = result.outcome != "failed" or (result.target_changed and not again)
        raise OperationFailed(f"pg_rewind: {what}" + ("; the data directory was changed" if result.target_changed else ""), final=final)
    return {"outcome": result.outcome, "from_timeline": before.timeline, **times.took}


async def _source_is_ready(ctx: Context, action: Rewind, progress: Progress) -> int:
    """It is a primary, and its pg_control shows its own timeline, which is returned."""
    where = await reachable(ctx.wanted.source_conninfo(action.source, "rewind"), deadline_s=ASK_DEADLINE_S)
    with closing(await ctx.machine.connect(where, deadline_s=ASK_DEADLINE_S)) as conn:
        timeline, checkpointed = await _timelines(conn, action.source.name)
        if timeline == checkpointed:
            return timeline
        progress(f"waiting for the checkpoint of {action.source.name} after its promotion")
        try:
            await conn.query("CHECKPOINT", deadline_s=CHECKPOINT_DEADLINE_S)
        except QueryFailed as error:
            if error.sqlstate != _INSUFFICIENT_PRIVILEGE:
                raise
        ends_at = trio.current_time() + CHECKPOINT_DEADLINE_S    # its own agent checkpoints after a promotion, too
        while timeline != checkpointed:
            if trio.current_time() > ends_at:
                raise OperationFailed(f"{action.source.name} has not checkpointed since its promotion")
            await trio.sleep(0.25)
            timeline, checkpointed = await _timelines(conn, action.source.name)
        return timeline


async def _timelines(conn: Connection, name: str) -> tuple[int, int]:
    """The primary's own, and that of its last checkpoint."""
    sql = ("SELECT pg_is_in_recovery(), CASE WHEN pg_is_in_recovery() THEN 0 ELSE "
           "('x' || substr(pg_walfile_name(pg_current_wal_insert_lsn()), 1, 8))::bit(32)::int END, "
           "(SELECT timeline_id FROM pg_control_checkpoint())")
    in_recovery, timeline, checkpoint_timeline = (await conn.query(sql, deadline_s=ASK_DEADLINE_S))[0]
    if in_recovery == "t":
        raise OperationFailed(f"{name} is in recovery: it is no source for a rewind")
    return int(timeline or 0), int(checkpoint_timeline or 0)


async def _rewind(ctx: Context, action: Rewind, timeline: int, progress: Progress, times: Timeline) -> tuple[ControlData, Rewound]:
    said = await control(ctx)
    if not (said.checksums or said.wal_log_hints):
        raise OperationFailed("neither data checksums nor wal_log_hints is on: it cannot be rewound", final=True)
    await ctx.on_disk(files.remove_standby_signal, ctx.data_dir)
    # A directory that was half rewound must not be recovered: its WAL may be the source's, its pages are a mixture.
    if not said.clean and not await ctx.on_disk(interrupted, ctx.data_dir):
        progress("crash recovery in single-user mode")
        await ctx.server.single_user_recovery(ctx.wanted.command_line(said), deadline_s=RECOVERY_DEADLINE_S)
        said = await control(ctx)
        times.mark("recovery")

    def on_progress(at: Copied) -> None:
        progress(f"{in_words(at.done_bytes)} of {in_words(at.total_bytes)}")

    progress(f"rewinding from {action.source.name}")
    effective = ctx.wanted.effective().postgresql
    result = await run_rewind(
        ctx.data_dir, ctx.server.bin_dir, ctx.wanted.program_conninfo(action.source, "rewind"), said,
        source_timeline=timeline, deadline_s=REWIND_DEADLINE_S,
        restore_target_wal=bool(effective.recovery_conf.get("restore_command")),
        config_file=ctx.server.config_file, on_progress=on_progress, run=ctx.machine.run, in_thread=ctx.machine.in_thread,
        boot=ctx.machine.boot_id)
    times.mark("rewind")
    return said, result


async def _back_to_rest(ctx: Context) -> None:
    """standby.signal back, then the guard: also after a failure or a cancel."""
    with trio.move_on_after(CLEAN_UP_S, shield=True):
        try:
            await be_standby_at_rest(ctx)
            await ctx.fence.standby()
        except (PghaError, OSError) as error:
            log.error("the data directory is not at rest after the rewind", why=str(error))



