"""The steps that several operations are made of.

Rules of this file:
* whatever is left behind is safe: either nothing of the data directory lives and standby.signal is there, or the server
  runs in the role that the guard knows of;
* a file is synced in a thread, since the disk may take its time and the renewer shares our loop;
* a clean-up is shielded from cancellation, and bounded by CLEAN_UP_S.
"""

from __future__ import annotations

import signal
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import trio

from pgha.act.context import Context, log
from pgha.errors import OperationFailed, PghaError, PostgresError, PostgresTimeout
from pgha.lock.recipe import Proc
from pgha.model.wal import Position
from pgha.postgres import directories, files, pg_rewind
from pgha.postgres.connection import Connection, resolve
from pgha.postgres.controldata import ControlData, read_control
from pgha.postgres.processes import Postmaster, read_postmaster_pid, remove_dead_pid_file

T = TypeVar("T")

#: What a shielded clean-up may take.
CLEAN_UP_S = 10.0
#: From SIGKILL to the exit: longer only if the kernel is stuck in I/O for the process.
EXIT_DEADLINE_S = 5.0
CONTROL_DEADLINE_S = 2.0
#: Reading the last WAL records of a stopped server.
END_OF_WAL_DEADLINE_S = 2.0
SQL_DEADLINE_S = 2.0
#: How long the observer looks closely after something was begun; a death it sees at once in any case.
HURRY_S = 5.0
#: What walsenders and the archiver get when all else of a shutdown is done, and how often that is looked for.
DRAIN_S = 2.0
LOOK_S = 0.25
#: A standby that did not confirm in time before the shutdown gets this much of it.
LAGGARDS_S = 0.5
#: The guard is told again after a third of this that our programs still work on the directory.
OFFLINE_FOR_S = 30.0


class Timeline:
    """How long each step took: for the log line at the end, and to see where a switchover's time goes."""

    def __init__(self) -> None:
        self._started_s = self._last_s = trio.current_time()
        self.took: dict[str, float] = {}

    def mark(self, step: str) -> None:
        now_s = trio.current_time()
        self.took[f"{step}_s"] = round(now_s - self._last_s, 4)
        self._last_s = now_s

    @property
    def total_s(self) -> float:
        return trio.current_time() - self._started_s


# --- files -----------------------------------------------------------------------------------------------------------

async def be_standby_at_rest(ctx: Context) -> bool:
    """standby.signal is there, on disk (safety model 7). True if it was missing."""
    return await ctx.on_disk(files.create_standby_signal, ctx.data_dir)


async def rest_as_found(ctx: Context) -> bool:
    """`be_standby_at_rest`, if nothing of the data directory lives and there is a whole one. True if it was missing.

    A kill of the agent between the removal and the start as primary leaves none: whatever starts PostgreSQL next, a
    person's pg_ctl for one, would start a primary.
    """
    if ctx.directory.processes() or await ctx.on_disk(directories.bootstrapping, ctx.data_dir) not in ("", "made"):
        return False
    if await ctx.on_disk(directories.content, ctx.data_dir) != "valid":
        return False
    new = await be_standby_at_rest(ctx)
    if new:
        log.warning("standby.signal was missing at rest: an earlier start as primary was cut off", data_dir=ctx.data_dir)
    return new


# --- processes -------------------------------------------------------------------------------------------------------

@contextmanager
def postmaster(ctx: Context) -> Iterator[Postmaster]:
    """A handle on the running postmaster. OperationFailed if there is none."""
    found = ctx.machine.adopt()
    if found is None:
        raise OperationFailed("PostgreSQL does not run")
    try:
        yield found
    finally:
        found.close()


def nothing_lives(ctx: Context) -> None:
    """OperationFailed while a process of the data directory lives."""
    if left := ctx.directory.processes():
        raise OperationFailed(f"processes of {ctx.data_dir} live: {', '.join(str(p.pid) for p in left[:8])}")


async def kill_everything(ctx: Context, why: str) -> int:
    """The recipe; returns how many were killed, once all of them have exited. OperationFailed if some have not."""
    report = ctx.directory.kill_all()
    if report.denied:
        raise OperationFailed(f"the kernel refused to kill {[p.pid for p in report.denied]}")
    if report.killed:
        log.info("killed what was left of PostgreSQL", why=why, count=len(report.killed), took_s=report.took_s)
        with trio.move_on_after(EXIT_DEADLINE_S):
            for proc in report.left:
                await ctx.machine.exited(proc)
    nothing_lives(ctx)
    return len(report.killed)


async def make_safe(ctx: Context, why: str) -> None:
    """After a failure or a cancel half-way to a primary: kill all, standby.signal back. Shielded, bounded, never raises."""
    with trio.move_on_after(CLEAN_UP_S, shield=True) as scope:
        try:
            await kill_everything(ctx, why)
            await be_standby_at_rest(ctx)
        except (PghaError, OSError) as error:
            log.error("could not leave PostgreSQL safe; the fence will kill it", why=str(error))
    if scope.cancelled_caught:
        log.error("could not leave PostgreSQL safe in time; the fence will kill it", after_s=CLEAN_UP_S)


async def stop_fast(ctx: Context, server: Postmaster, *, timeout_s: float, laggards: tuple[Proc, ...] = ()) -> bool:
    """Fast shutdown: clients ended, checkpoint, walsenders drained. True if it exited in time.

    Two things would hold it up for no good. A walsender whose standby does not read keeps the shutdown checkpoint from
    being written until wal_sender_timeout (measured): `laggards` are ended after a moment. And once pg_control says
    "shut down" nothing is written any more; what is left to do is the standbys' and the archiver's, who get DRAIN_S
    (what was not archived is archived after the next start).
    """
    ctx.server.stop(server, "fast")
    ctx.hurry(HURRY_S)
    with trio.move_on_after(timeout_s):
        if await _exits_within(server, LAGGARDS_S if laggards else DRAIN_S):
            return True
        shut_down_s: float | None = None
        while shut_down_s is None or trio.current_time() - shut_down_s < DRAIN_S:
            for walsender in laggards:      # more than once: the first may find it blocked in its farewell
                ctx.machine.send(walsender, signal.SIGTERM)
            if await _exits_within(server, LOOK_S):
                return True
            if shut_down_s is None and await shut_down(ctx):
                shut_down_s = trio.current_time()
        log.warning("PostgreSQL is shut down, but does not exit: its standbys or its archive do not answer", waited_s=DRAIN_S)
        return False
    log.warning("PostgreSQL did not stop in time", timeout_s=timeout_s)
    return False


async def _exits_within(server: Postmaster, seconds: float) -> bool:
    with trio.move_on_after(seconds):
        await server.wait_exit()
        return True
    return False


async def shut_down(ctx: Context) -> bool:
    """Does pg_control say that everything was written and closed?"""
    try:
        return (await control(ctx)).clean
    except PostgresError:   # it is being written, or the disk is slow: the caller asks again
        return False


async def ready_to_start(ctx: Context) -> None:
    """Nothing lives, no pid file of a dead postmaster is in the way, and the directory is whole."""
    nothing_lives(ctx)
    if await ctx.on_disk(pg_rewind.interrupted, ctx.data_dir):
        raise OperationFailed(f"a rewind of {ctx.data_dir} was interrupted: it is not started before it was rewound again, or cloned")
    mark = await ctx.on_disk(directories.bootstrapping, ctx.data_dir)
    if mark.startswith("copying"):
        raise OperationFailed(f"a copy into {ctx.data_dir} was cut off: it is not started before another has ended")
    if mark == "making":
        raise OperationFailed(f"the bootstrap of {ctx.data_dir} was cut off: it is not started, but set aside")
    await ctx.on_disk(directories.end_bootstrap, ctx.data_dir)     # who starts has the lock, or follows who has
    await ctx.on_disk(files.remove_file, ctx.data_dir / directories.REPLACED)  # a swap that did not happen
    if await ctx.on_disk(remove_dead_pid_file, ctx.data_dir):
        log.info("removed the pid file of a dead postmaster")


# --- questions -------------------------------------------------------------------------------------------------------

async def reachable(conninfo: dict[str, str | int], *, deadline_s: float) -> dict[str, str | int]:
    """`conninfo` with an address for libpq beside the name (which certificates and passfiles still go by)."""
    host = str(conninfo.get("host", ""))
    address = (await resolve(host, deadline_s=deadline_s))[0]
    return conninfo if address == host else {**conninfo, "hostaddr": address}


async def connect(ctx: Context, *, deadline_s: float = SQL_DEADLINE_S) -> Connection:
    """To the local server as superuser; the caller closes it. OperationFailed if another server answers in its place."""
    where = await reachable(ctx.wanted.local_conninfo(), deadline_s=deadline_s)
    conn = await ctx.machine.connect(where, deadline_s=deadline_s)
    running, backend = read_postmaster_pid(ctx.data_dir), ctx.machine.read_proc(conn.backend_pid)
    if running is None or backend is None or backend.ppid != running.pid:
        conn.close()
        raise OperationFailed(f"another server than that of {ctx.data_dir} answers at {where['host']}:{where['port']}")
    return conn


@contextmanager
def closing(conn: Connection) -> Iterator[Connection]:
    """Close it at the end of the block."""
    try:
        yield conn
    finally:
        conn.close()


async def control(ctx: Context) -> ControlData:
    return await read_control(ctx.data_dir, ctx.server.bin_dir, deadline_s=CONTROL_DEADLINE_S, run=ctx.machine.run)


async def end_position(ctx: Context, said: ControlData, *, deadline_s: float = END_OF_WAL_DEADLINE_S) -> Position:
    """Where the WAL of the stopped server ends.

    Of a primary that was shut down it is the published position (compatibility spec 1.4); of a standby that was shut
    down, what it had replayed is the least, and pg_waldump tells the rest. PostgresError if it cannot be read in time.
    """
    if said.state == "shut down":
        at = await ctx.machine.shutdown_positions(said, deadline_s=deadline_s)
        return Position(timeline=at.timeline, lsn=at.published_lsn)
    timeline, from_lsn = said.timeline, said.redo_lsn
    if said.min_recovery_timeline > timeline:   # promoted or followed, and no checkpoint since
        timeline, from_lsn = said.min_recovery_timeline, said.min_recovery_end_lsn
    with trio.fail_after(deadline_s):
        lsn = await ctx.machine.end_of_wal(said, timeline=timeline, from_lsn=from_lsn, deadline_s=deadline_s)
    return Position(timeline=timeline, lsn=max(lsn, said.min_recovery_end_lsn if timeline == said.min_recovery_timeline else 0))


async def last_position(ctx: Context) -> tuple[Position, str]:
    """The end of WAL of the stopped server and pg_control's state; what was seen last if it cannot be read."""
    state = "unknown"
    try:
        said = await control(ctx)
        state = said.state
        return await end_position(ctx, said), state
    except (PostgresError, trio.TooSlowError) as error:
        known = ctx.last_position()
        log.warning("the end of WAL cannot be read; the last position seen is used", why=str(error), position=str(known))
        return known, state


async def wait_primary(ctx: Context, server: Postmaster, *, deadline_s: float) -> None:
    """Return when it accepts writes. PostgresError if it ended or is not ready in time, OperationFailed if in recovery."""
    ends_at = trio.current_time() + deadline_s
    await ctx.server.wait_ready(server, deadline_s=deadline_s)
    left_s = max(0.1, ends_at - trio.current_time())
    with closing(await connect(ctx, deadline_s=min(left_s, SQL_DEADLINE_S))) as conn:
        if (await conn.query("SELECT pg_is_in_recovery()", deadline_s=SQL_DEADLINE_S))[0][0] != "f":
            raise OperationFailed("PostgreSQL is in recovery although it was started as primary")


async def checkpoint(ctx: Context, *, deadline_s: float) -> bool:
    """CHECKPOINT; False if it did not end in time (it goes on by itself) or could not be asked for."""
    try:
        with closing(await connect(ctx)) as conn:
            await conn.query("CHECKPOINT", deadline_s=deadline_s)
    except PostgresTimeout:
        return False
    except PostgresError as error:
        log.warning("checkpoint failed", why=str(error))
        return False
    return True


# --- working while something has to be kept alive -----------------------------------------------------------------------

async def while_keeping(keep: Callable[[], Awaitable[None]], work: Callable[[], Awaitable[T]]) -> T:
    """Run `work` beside `keep`, which never returns; a failure of `keep` cancels `work` and is raised."""
    failure: PghaError | OSError | trio.TooSlowError | None = None
    result: list[T] = []

    async def keeping() -> None:
        nonlocal failure
        try:
            await keep()
        except PghaError as error:
            failure = failure or error
            nursery.cancel_scope.cancel()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(keeping)
        try:
            result.append(await work())
        except (PghaError, OSError, trio.TooSlowError) as error:
            failure = error
        nursery.cancel_scope.cancel()
    if failure is not None:
        raise failure
    return result[0]


async def while_offline(ctx: Context, work: Callable[[], Awaitable[T]]) -> T:
    """Run `work` while the guard leaves the data directory to our programs. The caller asks for `standby` afterwards."""
    await ctx.fence.offline(OFFLINE_FOR_S)

    async def keep() -> None:
        while True:
            await trio.sleep(OFFLINE_FOR_S / 3)
            await ctx.fence.offline(OFFLINE_FOR_S)

    return await while_keeping(keep, work)
