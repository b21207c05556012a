"""Copy another server's data directory, and swap it in only when it is whole. The old one stays until the new one
streams, unless there is no room and its removal was asked for.

The methods of `create_replica_methods` are tried in order: pg_basebackup here, the operator's programs by methods.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import trio

from pgha.act.context import Context, Progress, log
from pgha.act.methods import (
    clear_half_a_copy,
    connection_url,
    copy_in_place,
    give_back,
    kill_left,
    make_standby,
    replica_arguments,
    run_method,
    verify,
)
from pgha.act.steps import (
    SQL_DEADLINE_S,
    Timeline,
    closing,
    kill_everything,
    nothing_lives,
    reachable,
    while_keeping,
    while_offline,
)
from pgha.act.wanted import options_of
from pgha.config.cluster import BASEBACKUP
from pgha.config.programs import ReplicaMethod
from pgha.errors import OperationFailed, PghaError, PostgresError
from pgha.model.action import Clone, Source
from pgha.postgres import basebackup, directories, files, pg_rewind
from pgha.postgres.connection import identify_system
from pgha.postgres.controldata import read_control

CLONE_DEADLINE_S = 7 * 86400.0
#: pg_basebackup may wait for a checkpoint of its source, and for WAL at its end; a copy that stands still for longer hangs.
STALL_S = 900.0
#: Beyond the databases themselves: WAL written during the copy, rounding, the file system's own needs.
SPACE_FACTOR = 1.05
SPACE_EXTRA_BYTES = 128 * 1024 * 1024
CONTROL_DEADLINE_S = 5.0


def in_words(size_bytes: float) -> str:
    """12345678 → "11.8 MiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size_bytes < 1024:
            return f"{size_bytes:.1f} {unit}" if unit != "B" else f"{size_bytes:.0f} B"
        size_bytes /= 1024
    return f"{size_bytes:.1f} TiB"


async def clone(ctx: Context, action: Clone, progress: Progress) -> dict[str, Any]:
    """Facts: old (path of the data directory that was replaced, "" if there was none), size_bytes, method, times."""
    times = Timeline()
    await set_aside_unfinished(ctx)
    nothing_lives(ctx)
    target = directories.clone_directory(ctx.data_dir)
    present = await ctx.on_disk(directories.content, ctx.data_dir)
    half = await ctx.on_disk(directories.bootstrapping, ctx.data_dir)       # by a method in place, which has not ended
    if action.replace == "nothing_there" and present not in ("missing", "empty") and not half.startswith("copying"):
        raise OperationFailed(f"{ctx.data_dir} is {present}: it is replaced only if that was asked for")
    await ctx.on_disk(ctx.wanted.write_passfile)
    size_bytes = await _source(ctx, action.source, action.system_identifier) if action.source is not None else 0
    await _finish_removals(ctx)
    old: Path | None = None
    name = action.methods[0]
    if not await _left_between_renames(ctx, action, target):
        log.info("cloning", source=action.source.name if action.source else "", methods=action.methods, size_bytes=size_bytes, why=action.why)
        name, old, whole = await _by_the_first_that_can(ctx, action, target, size_bytes, progress, from_nothing=present in ("missing", "empty"))
        times.mark("copy")
    else:
        whole = False
    if not whole:
        progress("syncing and swapping in")
        nothing_lives(ctx)
        old = await while_offline(ctx, lambda: _swap_in(ctx))
    else:
        await ctx.on_disk(forget_markers, ctx.data_dir)
    ctx.directory.refresh()
    await ctx.fence.standby()
    times.mark("swap")
    log.info("cloned", source=action.source.name if action.source else "", method=name, old_kept_as=old or "", took_s=times.total_s, **times.took)
    return {"old": str(old) if old else "", "size_bytes": size_bytes, "method": name, **times.took}


async def _by_the_first_that_can(
    ctx: Context, action: Clone, target: Path, size_bytes: int, progress: Progress, *, from_nothing: bool,
) -> tuple[str, Path | None, bool]:
    """(its name, where the old data is, is the new in place already). OperationFailed: what each of them said.

    `from_nothing`: there was no data; half a copy made of nothing, which one leaves to the next, is then our own.
    """
    failures: list[str] = []
    for name in action.methods:
        method = None if name == BASEBACKUP else ctx.wanted.effective().postgresql.methods.get(name)
        if (method is None and name != BASEBACKUP) or (action.source is None and not (method is not None and method.no_leader)):
            continue
        if method is not None and method.keep_data and action.replace == "keep_old_until_streaming" and await ctx.on_disk(directories.content, ctx.data_dir) == "valid":
            failures.append(f"{name} works on the data that is to be kept (keep_data)")
            continue
        try:
            await give_back(ctx, ours=True)     # if the one before could not
            if method is not None and method.in_place:
                return name, await copy_in_place(ctx, name, method, source=action.source, system_identifier=action.system_identifier, ours=from_nothing, progress=progress), True
            await clear_half_a_copy(ctx, ours=from_nothing)
            await _remove_leftover(ctx, target)
            await _make_room(ctx, action, await ctx.on_disk(directories.content, ctx.data_dir), size_bytes)
            await _copy_whole(ctx, action, target, progress, name=name, method=method)
            return name, None, False
        except (PghaError, OSError) as error:
            if len(action.methods) == 1:
                raise
            log.warning("method failed", method=name, why=str(error))
            failures.append(str(error))
    raise OperationFailed("; ".join(failures) or f"none of {', '.join(action.methods)} can make a copy" + ("" if action.source else " without a source"))


async def _copy_whole(ctx: Context, action: Clone, target: Path, progress: Progress, *, name: str, method: ReplicaMethod | None) -> None:
    """Fill `target`, verified, a standby, on disk; on any failure, or a cancel, there is no `target`."""
    try:
        if method is None:
            assert action.source is not None, name
            await _copy(ctx, action.source, target, progress)
        else:
            progress(f"{name} runs")
            await run_method(ctx, name, replica_arguments(method, scope=ctx.wanted.effective().local.scope, data_dir=target, connection=connection_url(ctx, action.source)), target)
        progress("verifying the copy")
        await verify(ctx, target, name, action.system_identifier)
        await ctx.on_disk(make_standby, target)
        progress("syncing the copy")
        await directories.complete_clone(ctx.data_dir, action.system_identifier, in_thread=ctx.machine.in_thread)
    except BaseException:   # also trio.Cancelled: half a copy is of no use to anybody
        with trio.move_on_after(60.0, shield=True):
            await directories.delete_clone(ctx.data_dir, in_thread=ctx.machine.in_thread)
        raise


async def _left_between_renames(ctx: Context, action: Clone, target: Path) -> bool:
    """Did an earlier clone end when it was whole, with nothing in place? Then it only has to be put there."""
    if not await ctx.on_disk(directories.unfinished_swap, ctx.data_dir):
        return False
    try:
        said = await read_control(target, ctx.server.bin_dir, deadline_s=CONTROL_DEADLINE_S, run=ctx.machine.run)
    except PostgresError:
        return False
    whole = said.system_identifier == action.system_identifier
    if whole:
        log.info("finishing the swap of an earlier clone", path=target)
    return whole


async def _swap_in(ctx: Context) -> Path | None:
    old = await ctx.on_disk(directories.swap_in_clone, ctx.data_dir)
    await ctx.on_disk(forget_markers, ctx.data_dir)
    return old


def forget_markers(data_dir: Path) -> None:
    """What is beside the data directory and spoke of the one that is not there any more."""
    files.remove_file(pg_rewind.marker(data_dir))
    directories.end_bootstrap(data_dir)


async def set_aside_unfinished(ctx: Context) -> None:
    """A bootstrap that was cut off leaves what is nobody's: out of the way with it, under a numbered `.failed`.

    OperationFailed if what a copy was to replace has come back: what was decided without knowing of it is decided anew.
    """
    mark = await ctx.on_disk(directories.bootstrapping, ctx.data_dir)
    if mark == "copying" and await give_back(ctx, ours=False):
        raise OperationFailed(f"what an earlier copy was to replace has been brought back to {ctx.data_dir}")
    if mark != "making":
        return
    await kill_everything(ctx, "its bootstrap was cut off")
    if await ctx.on_disk(directories.content, ctx.data_dir) not in ("missing", "empty"):
        aside = await ctx.on_disk(directories.move_to_failed, ctx.data_dir)
        log.warning("a bootstrap was cut off here; its data directory was put aside", kept_as=aside)
    await ctx.on_disk(forget_markers, ctx.data_dir)


async def discard_old(ctx: Context) -> list[str]:
    """Delete what clones have replaced: to be called once the new data directory streams, at any later time as well.

    Only what the swap itself has marked: neither `.failed` nor what people moved to `.old` is ever touched.
    """
    return await _discard(ctx, "old", "removing")


async def _finish_removals(ctx: Context) -> None:
    """Deletions that were cut off: their space is needed now."""
    await _discard(ctx, "removing")


async def _discard(ctx: Context, *suffixes: Literal["old", "removing"]) -> list[str]:
    gone = []
    for old in await ctx.on_disk(directories.replaced_directories, ctx.data_dir, *suffixes):
        if elsewhere := await ctx.on_disk(directories.linked_directories, old):
            log.warning("the replaced data directory has parts elsewhere, which are kept", old=old, parts=[str(p) for p in elsewhere])
        await directories.delete_tree(old, in_thread=ctx.machine.in_thread)
        log.info("deleted a replaced data directory", old=old)
        gone.append(str(old))
    return gone


async def _remove_leftover(ctx: Context, target: Path) -> None:
    await kill_left(ctx, target)
    if await ctx.on_disk(directories.content, target) != "missing":
        log.info("removing what an earlier clone left", path=target)
    await directories.delete_clone(ctx.data_dir, in_thread=ctx.machine.in_thread)


async def _source(ctx: Context, source: Source, system_identifier: str) -> int:
    """Verify who the source is before a byte is copied; its databases' size in bytes (0: it would not say)."""
    where = await reachable(ctx.wanted.source_conninfo(source, "replication"), deadline_s=SQL_DEADLINE_S)
    with closing(await ctx.machine.connect(where, deadline_s=SQL_DEADLINE_S)) as conn:
        system = await identify_system(conn, deadline_s=SQL_DEADLINE_S)
    if system.system_identifier != system_identifier:
        raise OperationFailed(f"{source.name} has system identifier {system.system_identifier}, expected {system_identifier}")
    try:
        where = await reachable(ctx.wanted.source_conninfo(source, "superuser"), deadline_s=SQL_DEADLINE_S)
        with closing(await ctx.machine.connect(where, deadline_s=SQL_DEADLINE_S)) as conn:
            rows = await conn.query("SELECT sum(pg_database_size(oid)) FROM pg_database", deadline_s=30.0)
            return int(rows[0][0] or 0)
    except PostgresError as error:
        log.warning("the source does not tell its size; free space is not checked", source=source.name, why=str(error))
        return 0


async def _make_room(ctx: Context, action: Clone, present: str, size_bytes: int) -> None:
    """Enough free space for a second copy; else the old one goes first if that was asked for, or nothing is done."""
    needed_bytes = int(size_bytes * SPACE_FACTOR) + SPACE_EXTRA_BYTES if size_bytes else 0
    free_bytes = await ctx.on_disk(directories.free_bytes, ctx.data_dir.parent)
    if free_bytes >= needed_bytes:
        return
    numbers = f"the clone needs {in_words(needed_bytes)}, {in_words(free_bytes)} are free"
    if action.replace != "remove_first" or present in ("missing", "empty"):
        raise OperationFailed(f"not enough space: {numbers}")
    freed_bytes = await directories.size_bytes(ctx.data_dir, linked=False, in_thread=ctx.machine.in_thread)    # parts elsewhere are not removed
    if free_bytes + freed_bytes < needed_bytes:
        raise OperationFailed(f"not enough space even without the old data directory ({in_words(freed_bytes)}): {numbers}")
    log.warning("removing the old data directory before the clone", path=ctx.data_dir, why=f"{action.why}; {numbers}")
    await kill_everything(ctx, "its data directory is removed")

    async def remove() -> None:
        # Half a directory looks like a whole one, or like one that nobody may touch: first the name, then the files.
        await ctx.on_disk(directories.move_to_removing, ctx.data_dir, f"no room for a second copy; {action.why}")
        await ctx.on_disk(forget_markers, ctx.data_dir)
        await _discard(ctx, "removing")

    await while_offline(ctx, remove)


async def _copy(ctx: Context, source: Source, target: Path, progress: Progress) -> None:
    last_s = trio.current_time()

    def on_progress(at: basebackup.Progress) -> None:
        nonlocal last_s
        last_s = trio.current_time()
        progress(f"{in_words(at.done_bytes)} of {in_words(at.total_bytes)}" if at.total_bytes else in_words(at.done_bytes))

    async def watch() -> None:
        while True:
            await trio.sleep(STALL_S / 30)
            if trio.current_time() - last_s > STALL_S:
                raise OperationFailed(f"the copy has stood still for {STALL_S:g} s")

    options = ctx.wanted.effective().postgresql.basebackup
    if not any(name == "checkpoint" for name, _ in options):
        options = (*options, ("checkpoint", "fast"))    # a spread one may take minutes before the first byte
    conninfo = ctx.wanted.program_conninfo(source, "replication")
    await while_keeping(watch, lambda: basebackup.base_backup(
        target, ctx.server.bin_dir, conninfo, options_of(options), deadline_s=CLONE_DEADLINE_S, on_progress=on_progress, run=ctx.machine.run))
