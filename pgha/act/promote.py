"""Leave recovery on exactly the timeline that was claimed, or not at all (safety model 7).

Which claim it was is written into the history beforehand (postgres/histories.py): an agent that dies right after the
promotion leaves data that tells whose it is.

Blocked numbers stay blocked after a promotion. Measured on PostgreSQL 15: a standby asks its upstream for the history
file of *every* number between its own timeline and the upstream's, and cannot stream while one is missing; and it looks
for the newest timeline number by number, stopping at the first gap. The comment-only files travel to the standbys that
way. They are removed if the promotion is given up, and by whoever begins to follow somebody (start.py): what it needs
is fetched anew, and no block may hide a real history of its upstream.
"""

from __future__ import annotations

from typing import Any

import trio

from pgha.act.context import Context, Progress, log
from pgha.act.steps import (
    CLEAN_UP_S,
    SQL_DEADLINE_S,
    Timeline,
    be_standby_at_rest,
    closing,
    connect,
    make_safe,
    postmaster,
)
from pgha.errors import OperationFailed, PostgresError
from pgha.model.action import Promote
from pgha.model.wal import claim_of
from pgha.postgres import histories
from pgha.postgres.connection import Connection

#: A fast promotion takes 50 ms; longer only if replay is behind, which the mandate bounds as well.
PROMOTION_DEADLINE_S = 300.0

_TIMELINE_AND_LSN = (
    "SELECT ('x' || substr(pg_walfile_name(pg_current_wal_insert_lsn()), 1, 8))::bit(32)::int, "
    "pg_current_wal_flush_lsn() - '0/0'")


async def promote(ctx: Context, action: Promote, progress: Progress) -> dict[str, Any]:
    """Block the numbers of others, promote, verify the timeline. Killed by the recipe if anything goes wrong after the
    request: a server that is out of recovery without anybody watching must not stay."""
    times = Timeline()
    requested = completed = False
    blocked: list[int] = []
    claim, claimed = _claim(ctx, action), list[tuple[int, bytes | None]]()
    with postmaster(ctx) as server:
        try:
            with closing(await connect(ctx)) as conn:
                if (await conn.query("SELECT pg_is_in_recovery()", deadline_s=SQL_DEADLINE_S))[0][0] != "t":
                    raise OperationFailed("PostgreSQL is not in recovery: there is nothing to promote")
                progress(f"blocking timelines {action.block}" if action.block else "asking the guard")
                await _names_are_set(conn, action)
                await _block(ctx, action, blocked)
                await ctx.on_disk(histories.claim_timeline, ctx.data_dir, action.leaving, action.timeline, claim, claimed)
                times.mark("block")
                await ctx.fence.armed()
                times.mark("armed")
                progress(f"promoting to timeline {action.timeline}")
                requested = True
                ctx.told.promoted()
                await ctx.server.promote(server, conn, deadline_s=PROMOTION_DEADLINE_S)
                timeline, lsn = (int(v or 0) for v in (await conn.query(_TIMELINE_AND_LSN, deadline_s=SQL_DEADLINE_S))[0])
                times.mark("promotion")
            if timeline != action.timeline:
                raise OperationFailed(f"promoted to timeline {timeline}, but {action.timeline} was claimed")
            requested, completed = False, True
        except BaseException:   # also trio.Cancelled: nobody would watch what becomes of the request
            if requested:
                await make_safe(ctx, "the promotion was not completed")
            raise
        finally:
            if not completed:
                await _unblock(ctx, blocked, claimed)
    log.info("promoted", timeline=timeline, took_s=times.total_s, **times.took)
    ctx.wanted.no_longer_frozen()
    ctx.hurry(1.0)
    try:
        await be_standby_at_rest(ctx)
        await ctx.on_disk(histories.unclaim, ctx.data_dir, claimed)
        await ctx.on_disk(_close_gaps, ctx, timeline)
        history = await ctx.on_disk(histories.read_history, ctx.data_dir, timeline)
        if history is not None and claim_of(history.rows) != claim:     # an archive's copy was taken, by restore_command
            log.warning("the timeline's history does not say whose promotion it was", timeline=timeline, claim=claim, found=claim_of(history.rows))
    except (OSError, PostgresError) as error:   # the next pass sees that the signal is missing, and writes it
        log.warning("files could not be written after the promotion", why=str(error))
    return {"timeline": timeline, "lsn": lsn, "checkpoint_pending": True, **times.took}


async def _names_are_set(conn: Connection, action: Promote) -> None:
    """The first commit after the promotion must wait for whom `/sync` says (safety model 13): asked of the server itself."""
    if action.synchronous_names is None:
        return
    running = (await conn.query("SHOW synchronous_standby_names", deadline_s=SQL_DEADLINE_S))[0][0]
    if running != action.synchronous_names:
        raise OperationFailed(f"synchronous_standby_names is {running!r} and not {action.synchronous_names!r}: not promoted")


async def _block(ctx: Context, action: Promote, blocked: list[int]) -> None:
    """`blocked` gets the numbers that were not taken before: only those may be freed again."""
    comment = f"epoch {action.epoch}, for the promotion of {ctx.me.name} to {action.timeline}"
    if action.timeline > 1 and await ctx.on_disk(histories.read_history, ctx.data_dir, action.timeline) is not None:
        raise OperationFailed(f"timeline {action.timeline} exists already: its history file is in pg_wal")
    for number in action.block:
        if await ctx.on_disk(histories.block_timeline, ctx.data_dir, number, comment):
            blocked.append(number)  # noqa: PERF401  (a cancel must find those that were made)


def _claim(ctx: Context, action: Promote) -> str:
    """No two promotions have the same: the sequence counts what one incarnation has written."""
    return f"timeline {action.timeline}, epoch {action.epoch}, {ctx.me.incarnation}/{ctx.renewer.licence.sequence} by {ctx.me.name}"


async def _unblock(ctx: Context, blocked: list[int], claimed: list[tuple[int, bytes | None]]) -> None:
    with trio.move_on_after(CLEAN_UP_S, shield=True):
        for number in blocked:
            try:
                await ctx.on_disk(histories.unblock_timeline, ctx.data_dir, number)
            except OSError as error:
                log.warning("a block could not be removed", timeline=number, why=str(error))
        try:
            await ctx.on_disk(histories.unclaim, ctx.data_dir, claimed)
        except OSError as error:
            log.warning("a claim could not be taken back", why=str(error))


def _close_gaps(ctx: Context, timeline: int) -> None:
    """A node that was cloned has no history files of the timelines before its first: standbys would ask for them."""
    for number in range(2, timeline):
        histories.block_timeline(ctx.data_dir, number, "history not known here")
