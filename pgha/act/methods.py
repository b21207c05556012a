"""Make a copy, or a new cluster's data, with one of the operator's programs (compatibility spec 17).

Where it can be told where to write, it fills a fresh directory, which is swapped in when it is whole. One that cannot be
told (`no_params`), or that works on what is there (`keep_data`), writes to the data directory itself: from before its first
byte a mark beside it says that what is there is half a copy, which nobody starts, and which the next copy goes on from or
clears away.

Rules of this file:
* Nothing that was there before is deleted here: without keep_data it is moved to `.old`, and comes back if the program
  fails, or the agent, with the mark that it had. What the program itself has overwritten is its own.
* Half a copy is deleted by the operation that made it. Whoever finds one later cannot know whose it is: it is set aside.
* Whatever it leaves running is killed: its processes are known by a variable of their environment, also to the next agent.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

import trio

from pgha.act.context import Context, Progress, log
from pgha.act.scripts import command_of, run_script
from pgha.act.steps import CONTROL_DEADLINE_S, while_offline
from pgha.config.addresses import bracketed
from pgha.config.programs import BootstrapMethod, ReplicaMethod
from pgha.errors import OperationFailed
from pgha.model.action import Source
from pgha.postgres import basebackup, directories, files
from pgha.postgres.controldata import read_control

#: Restoring a backup may take days; one that takes longer hangs.
METHOD_DEADLINE_S = 7 * 86400.0
#: What a failed program has left is cleared away within this time, or by the next copy.
CLEAR_S = 60.0


def replica_arguments(method: ReplicaMethod, *, scope: str, data_dir: Path, connection: str) -> list[str]:
    """The whole command line."""
    own = [] if method.no_params else [f"--scope={scope}", "--role=replica", f"--datadir={data_dir}", f"--connstring={connection}"]
    return [*command_of(method.command), *(f"--{name}={value}" for name, value in method.arguments), *own]


def bootstrap_arguments(method: BootstrapMethod, *, scope: str, data_dir: Path) -> list[str]:
    own = [] if method.no_params else [f"--scope={scope}", f"--datadir={data_dir}"]
    return [*command_of(method.command), *own, *(f"--{name}={value}" for name, value in method.arguments)]


def connection_url(ctx: Context, source: Source | None) -> str:
    """To the source, as the replication user, whose password is in the passfile; "" if there is none. No secret is in it."""
    if source is None:
        return ""
    user, _ = ctx.wanted.user("replication")
    options = "&".join(f"{name}={quote(value, safe='/')}" for name, value in ctx.wanted.keywords("replication").items())
    return (f"postgres://{quote(user, safe='')}@{bracketed(source.host)}:{source.port}/{quote(ctx.wanted.effective().postgresql.database, safe='')}"
            f"{'?' if options else ''}{options}")


async def run_method(ctx: Context, name: str, argv: Sequence[str], target: Path) -> None:
    """Returns when it has ended well, and nothing of it runs. OperationFailed with its last words."""
    env = {
        "PGPASSFILE": str(ctx.wanted.passfile), basebackup.COPIES_INTO: str(target),
        "PGAPPNAME": f"pgha_copy_{ctx.me.name}",     # a WAL stream of its own confirms: under no member's name
    }
    log.info("method begins", method=name, target=target)
    try:
        ended = await run_script(name, argv, run=ctx.machine.run, limit_s=METHOD_DEADLINE_S, env=env, dies_with_us=True)
    finally:
        with trio.move_on_after(CLEAR_S, shield=True):
            await kill_left(ctx, target)
    log.info("method has ended", method=name, how=str(ended), took_s=ended.took_s)
    if not ended.ok:
        raise OperationFailed(f"{name}: {ended}")


async def kill_left(ctx: Context, target: Path) -> None:
    """Processes that an earlier program, maybe of an earlier agent, has left at work on `target`."""
    if killed := await ctx.on_disk(ctx.machine.kill_copies, target):
        log.info("killed what an earlier copy left", pids=killed)


async def give_back(ctx: Context, *, ours: bool) -> bool:
    """Bring back what a copy in place was to replace; False if there is no such thing. `ours`: see directories.bring_back."""
    if not await ctx.on_disk(directories.replaced_by_copy, ctx.data_dir):
        return False
    await kill_left(ctx, ctx.data_dir)
    half = await ctx.on_disk(directories.bring_back, ctx.data_dir, ours=ours)
    log.warning("a copy in place has not ended: what it was to replace is back", half_a_copy=half or "")
    if half is not None and ours:
        await directories.delete_tree(half, in_thread=ctx.machine.in_thread)      # or later: it carries its mark
    return True


async def clear_half_a_copy(ctx: Context, *, ours: bool) -> None:
    """What a method in place has left, made of nothing. `ours`: within this operation, so that it is nobody else's."""
    data_dir = ctx.data_dir
    if await ctx.on_disk(directories.bootstrapping, data_dir) != "copying":
        return
    await kill_left(ctx, data_dir)
    half: Path | None = None
    if await ctx.on_disk(directories.content, data_dir) not in ("missing", "empty"):
        if not ours:
            aside = await ctx.on_disk(directories.move_to_failed, data_dir)
            log.warning("a copy was cut off here; what is there was put aside", kept_as=aside)
        elif data_dir.is_mount() or data_dir.is_symlink():
            await directories.empty_out(data_dir, in_thread=ctx.machine.in_thread)
        else:
            half = await ctx.on_disk(directories.move_to_removing, data_dir, "half a copy")
            await ctx.on_disk(_make_directory, data_dir)
    await ctx.on_disk(directories.end_bootstrap, data_dir)
    if half is not None:
        await directories.delete_tree(half, in_thread=ctx.machine.in_thread)


async def copy_in_place(ctx: Context, name: str, method: ReplicaMethod, *, source: Source | None, system_identifier: str, ours: bool, progress: Progress) -> Path | None:
    """Have the program write to the data directory; where what was there before is now (None: nowhere else).

    OperationFailed, PostgresError: then the directory is as it was, or (keep_data) marked as half a copy. `ours`: if half a
    copy is there, this operation has made it.
    """
    data_dir = ctx.data_dir
    await kill_left(ctx, data_dir)
    if not method.keep_data:
        await clear_half_a_copy(ctx, ours=ours)
    present = await ctx.on_disk(directories.content, data_dir)
    from_nothing = present in ("missing", "empty") or await ctx.on_disk(directories.bootstrapping, data_dir) == "copying"
    old: Path | None = None
    if from_nothing or method.keep_data:
        await ctx.on_disk(directories.note_bootstrap, data_dir, "copying" if from_nothing else "copying over")
    else:
        old = await ctx.on_disk(directories.move_to_old, data_dir, f"replaced by a copy that {name} makes")
    try:
        await ctx.on_disk(_make_directory, data_dir)
        progress(f"{name} runs")
        await while_offline(ctx, lambda: run_method(ctx, name, replica_arguments(
            method, scope=ctx.wanted.effective().local.scope, data_dir=data_dir, connection=connection_url(ctx, source)), data_dir))
        progress("verifying the copy")
        await verify(ctx, data_dir, name, system_identifier)
        await ctx.on_disk(make_standby, data_dir)
        progress("syncing the copy")
        await directories.sync_tree(data_dir, in_thread=ctx.machine.in_thread)
    except BaseException:   # also trio.Cancelled
        if not method.keep_data:
            with trio.move_on_after(CLEAR_S, shield=True):
                if not await give_back(ctx, ours=True):
                    await clear_half_a_copy(ctx, ours=True)
        raise
    return old


async def verify(ctx: Context, copy: Path, name: str, system_identifier: str) -> None:
    """Whole, and of this cluster."""
    if (found := await ctx.on_disk(directories.content, copy)) != "valid":
        raise OperationFailed(f"{name} has left a data directory that is {found}")
    said = await read_control(copy, ctx.server.bin_dir, deadline_s=CONTROL_DEADLINE_S, run=ctx.machine.run)
    if said.system_identifier != system_identifier:
        raise OperationFailed(f"the copy by {name} has system identifier {said.system_identifier}, expected {system_identifier}")


def make_standby(copy: Path) -> None:
    """What the source was is not what the copy is, whatever the program has set up."""
    files.create_standby_signal(copy)
    files.clean_auto_conf(copy)
    files.remove_file(copy / directories.REPLACED)
    if copy.stat().st_mode & 0o027:      # PostgreSQL does not start where others may look
        copy.chmod(0o700)


def _make_directory(path: Path) -> None:
    path.mkdir(mode=0o700, exist_ok=True)
