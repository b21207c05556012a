"""Changes of a running server that need no restart: whom it follows, its configuration, its slots."""

from __future__ import annotations

import trio

from pgha.act.context import Context, log
from pgha.act.start import forget_blocked_timelines
from pgha.act.steps import SQL_DEADLINE_S, be_standby_at_rest, closing, connect, postmaster
from pgha.act.vet import QUICK_VET_DEADLINE_S, vet
from pgha.errors import OperationFailed, PostgresError, QueryFailed
from pgha.model.action import ApplyConfiguration, Follow, Freeze, MaintainSlots, SetSynchronousNames
from pgha.postgres import slots

#: While the observer waits for the walreceiver to end or to come.
WATCH_S = 5.0
#: A reload reaches a new session within this time, or its effect is seen later.
SEEN_S = 0.3
_DUPLICATE, _UNDEFINED, _IN_USE = "42710", "42704", "55006"
#: A slot that is where it should be already (22023), or that never kept any WAL (55000).
_NOT_MOVABLE = ("22023", "55000")


async def freeze(ctx: Context, action: Freeze) -> None:
    """Neither stream nor restore. It is done when no walreceiver lives, which the observer sees."""
    with postmaster(ctx) as server:
        ctx.wanted.freeze()
        await ctx.on_disk(ctx.wanted.write_running)
        ctx.server.reload(server)
    log.info("frozen for the election", epoch=action.epoch)
    ctx.hurry(WATCH_S)


async def follow(ctx: Context, action: Follow) -> None:
    """By reload. The signal is sent in any case: it also ends the startup process's wait before its next try (measured
    on PostgreSQL 15: SIGHUP sets the latch of that wait)."""
    with postmaster(ctx) as server:
        before = ctx.wanted.upstream
        ctx.wanted.follow(action.upstream, action.slot_name)
        changed = await ctx.on_disk(ctx.wanted.write_running)
        if changed:     # not on every nudge: blocks fetched from the upstream bridge the numbers up to its timeline
            await forget_blocked_timelines(ctx)
        ctx.server.reload(server)
    if changed:
        log.info("following", upstream=action.upstream.name if action.upstream else "", before=before.name if before else "",
                 slot=action.slot_name)
    ctx.hurry(WATCH_S)


async def apply_configuration(ctx: Context, action: ApplyConfiguration) -> None:
    """Write what has changed, reload if anything has (or `force`)."""
    await vet(ctx, deadline_s=QUICK_VET_DEADLINE_S)
    with postmaster(ctx) as server:
        changed = await ctx.on_disk(ctx.wanted.write_running)
        if changed or action.force:
            ctx.server.reload(server)
            log.info("configuration written and reloaded", changed=changed)
            ctx.told.reloaded()
        ctx.configuration_changed()     # a standby may wait for a restart whose files say what they said, for its primary's sake


async def set_synchronous_names(ctx: Context, action: SetSynchronousNames) -> None:
    """By reload, which is sent in any case: a former one may have been lost between the file and the signal.

    Commits that wait are looked at again when a standby that counts now reports, which an idle one does every
    wal_receiver_status_interval: a small transaction of our own makes those that stream report at once.
    """
    with postmaster(ctx) as server:
        before = ctx.wanted.names
        ctx.wanted.set_names(action.names)
        changed = await ctx.on_disk(ctx.wanted.write_running)
        try:
            if await ctx.on_disk(ctx.wanted.names_are_overridden):
                with closing(await connect(ctx)) as conn:      # under the server's own lock for that file; allowed in recovery, too
                    await conn.query("ALTER SYSTEM RESET synchronous_standby_names", deadline_s=SQL_DEADLINE_S)
                log.warning("took synchronous_standby_names out of postgresql.auto.conf: in a synchronous mode it is pgha's to set")
        finally:    # refused (allow_alter_system), the file's other settings are to hold all the same
            ctx.server.reload(server)
    log.info("synchronous_standby_names set", names=action.names, before=before, changed=changed)
    ctx.configuration_changed()
    ctx.hurry(WATCH_S)
    if action.names:
        await _make_standbys_report(ctx, action.names)


async def _make_standbys_report(ctx: Context, names: str) -> None:
    try:
        with closing(await connect(ctx)) as conn:
            await conn.query("SET synchronous_commit = local", deadline_s=SQL_DEADLINE_S)
            if (await conn.query("SELECT pg_is_in_recovery()", deadline_s=SQL_DEADLINE_S))[0][0] == "t":
                return
            with trio.move_on_after(SEEN_S):
                while (await conn.query("SHOW synchronous_standby_names", deadline_s=SQL_DEADLINE_S))[0][0] != names:  # noqa: ASYNC110  (the server tells nobody)
                    await trio.sleep(0.01)
            await conn.query("SELECT pg_current_xact_id()", deadline_s=SQL_DEADLINE_S)
    except (PostgresError, OperationFailed) as error:   # then the next report comes by itself
        log.info("standbys were not made to report", why=str(error))


async def restore_standby_signal(ctx: Context) -> None:
    """At rest every data directory is a standby."""
    if await be_standby_at_rest(ctx):
        log.info("wrote standby.signal again")


async def maintain_slots(ctx: Context, action: MaintainSlots, *, deadline_s: float) -> None:
    """Each slot on its own; those that failed are named together at the end, unless they are as wanted already. First what is
    dropped: it may be made anew."""
    failed: list[str] = []
    with closing(await connect(ctx, deadline_s=min(SQL_DEADLINE_S, deadline_s))) as conn:
        for name in action.drop:
            try:
                await slots.drop(conn, name, deadline_s=SQL_DEADLINE_S)
                log.info("slot dropped", slot=name, to_be_made_anew=name in action.create)
            except QueryFailed as error:
                if error.sqlstate == _IN_USE:
                    log.warning("slot is in use and is not dropped", slot=name)
                elif error.sqlstate != _UNDEFINED:
                    failed.append(f"drop {name}: {error}")
        for name in action.create:
            try:
                await slots.create_physical(conn, name, deadline_s=SQL_DEADLINE_S)
                log.info("slot created", slot=name)
            except QueryFailed as error:
                if error.sqlstate != _DUPLICATE:
                    failed.append(f"create {name}: {error}")
        for name, lsn in action.advance:
            try:
                await slots.advance(conn, name, lsn, deadline_s=SQL_DEADLINE_S)
            except QueryFailed as error:
                if error.sqlstate not in (*_NOT_MOVABLE, _IN_USE, _UNDEFINED):
                    failed.append(f"advance {name}: {error}")
    if failed:
        raise OperationFailed("; ".join(failed))
