"""Make a new cluster: nobody else's, nobody else's to see before it is whole.

`initialize` = "" is won first, create-only, under a short lease: a bootstrap that was abandoned frees itself. It keeps
two nodes from doing the work twice; what makes a second cluster impossible is the last write, one transaction, which
the next pass decides (AcquireLock with `initialize_revision`).

From before initdb on a marker beside the data directory says that what is there is nobody's: were the agent killed, a
half-made cluster would look like a whole one. It says "made" at the end, and goes at the first start.
"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any
from urllib.parse import quote

import trio

from pgha.act.clone import forget_markers, set_aside_unfinished
from pgha.act.context import Context, Progress, log
from pgha.act.methods import METHOD_DEADLINE_S, bootstrap_arguments, kill_left, run_method
from pgha.act.steps import (
    CLEAN_UP_S,
    SQL_DEADLINE_S,
    Timeline,
    be_standby_at_rest,
    closing,
    control,
    kill_everything,
    nothing_lives,
    stop_fast,
    while_keeping,
    while_offline,
)
from pgha.act.vet import vet
from pgha.act.wanted import Conninfo, options_of
from pgha.config.local import INITDB
from pgha.config.programs import BootstrapMethod
from pgha.dcs import ABSENT, Compare, Delete, Put
from pgha.errors import DcsError, DcsUnreachable, OperationFailed, PghaError, Refused
from pgha.model.action import Bootstrap
from pgha.postgres import directories, files, roles
from pgha.postgres.connection import Connection
from pgha.postgres.initdb import initdb
from pgha.postgres.programs import clean_environment, run_checked

#: `initialize` outlives an agent that died in the middle by this much.
LEASE_S = 30.0
STORE_DEADLINE_S = 5.0
INITDB_DEADLINE_S = 600.0
START_DEADLINE_S = 60.0
STOP_DEADLINE_S = 60.0
#: A restored cluster ends its recovery as a primary, and serves nobody before: whatever limits it was written under.
AT_THE_TARGET = {"hot_standby": "off", "recovery_target_action": "promote"}
#: The operator's script may load a schema, not a data warehouse.
SCRIPT_DEADLINE_S = 1800.0


async def bootstrap(ctx: Context, action: Bootstrap, progress: Progress) -> dict[str, Any]:
    """Facts: system_identifier, initialize_revision. The data directory is left stopped, a standby at rest.

    Refused if another node has `initialize`. On failure the key is freed if it is still ours, and the data directory
    put aside under a numbered name, never removed.
    """
    del action
    await set_aside_unfinished(ctx)
    found = await ctx.on_disk(directories.content, ctx.data_dir)
    if found not in ("missing", "empty"):
        raise OperationFailed(f"{ctx.data_dir} is not empty ({found}): no bootstrap into it")
    nothing_lives(ctx)
    times = Timeline()
    progress("asking for initialize")
    lease = await ctx.store.grant(LEASE_S, deadline_s=STORE_DEADLINE_S)
    revision = await _win_initialize(ctx, lease)
    times.mark("initialize")
    log.info("bootstrapping a new cluster", data_dir=ctx.data_dir)

    async def keep_lease() -> None:
        while True:
            await trio.sleep(LEASE_S / 4)
            try:
                await ctx.store.renew(lease, deadline_s=LEASE_S / 4)
            except DcsUnreachable as error:     # unknown is not lost: the next renewal, or LeaseLost, will tell
                log.warning("the lease of initialize was not renewed", why=str(error))

    try:
        identifier = await while_keeping(keep_lease, lambda: while_offline(ctx, lambda: _make(ctx, progress, times)))
        await ctx.fence.standby()
        await ctx.store.renew(lease, deadline_s=STORE_DEADLINE_S)   # until the next pass has written it for good
    except BaseException:   # also trio.Cancelled: half a cluster is nobody's
        await _give_up(ctx, revision, lease)
        raise
    log.info("bootstrapped", system_identifier=identifier, took_s=times.total_s, **times.took)
    return {"system_identifier": identifier, "initialize_revision": revision, **times.took}


async def _win_initialize(ctx: Context, lease: int) -> int:
    path = ctx.keys.path("initialize")
    outcome = await ctx.store.transact(
        compares=[Compare(key=path, revision=ABSENT)], puts=[Put(key=path, value=b"", lease=lease)], read=[path],
        deadline_s=STORE_DEADLINE_S)
    if outcome.succeeded:
        return outcome.revision
    found = outcome.found.get(path)
    if found is not None and found.value == b"" and found.lease == lease:   # an attempt whose answer was lost
        return found.revision
    raise Refused("initialize is another node's: it bootstraps the cluster, or has")


async def _give_up(ctx: Context, revision: int, lease: int) -> None:
    """Free the key if it is ours, kill, put the directory aside. Each step whether or not the others worked."""
    with trio.move_on_after(2 * CLEAN_UP_S, shield=True):
        try:
            await kill_everything(ctx, "the bootstrap failed")
            if await ctx.on_disk(directories.content, ctx.data_dir) not in ("missing", "empty"):
                aside = await ctx.on_disk(directories.move_to_failed, ctx.data_dir)
                log.error("bootstrap failed; its data directory was put aside", kept_as=aside)
            await ctx.on_disk(forget_markers, ctx.data_dir)
        except (PghaError, OSError) as error:
            log.error("bootstrap failed, and its data directory could not be put aside", why=str(error))
        path = ctx.keys.path("initialize")
        try:
            await ctx.store.transact(compares=[Compare(key=path, revision=revision, value=b"")], puts=[Delete(key=path)],
                                     deadline_s=STORE_DEADLINE_S)
            await ctx.store.revoke(lease, deadline_s=STORE_DEADLINE_S)
        except DcsError as error:
            log.warning("initialize could not be freed; its lease ends by itself", why=str(error), within_s=LEASE_S)


async def _make(ctx: Context, progress: Progress, times: Timeline) -> str:
    """initdb, or the operator's program; users, script, stop. Returns the system identifier."""
    local = ctx.wanted.effective().local
    name, password = ctx.wanted.user("superuser")
    await ctx.on_disk(directories.note_bootstrap, ctx.data_dir, "making")
    method = local.bootstrap.methods.get(local.bootstrap.method) if local.bootstrap.method != INITDB else None
    if method is None:
        progress("initdb")
        await initdb(ctx.data_dir, ctx.server.bin_dir, options_of(local.bootstrap.initdb), superuser=name, password=password,
                     deadline_s=INITDB_DEADLINE_S, run=ctx.machine.run)
    else:
        progress(f"{local.bootstrap.method} runs")
        await _restore(ctx, local.bootstrap.method, method)
    ctx.directory.refresh()
    times.mark("initdb" if method is None else "method")
    await ctx.on_disk(ctx.wanted.bootstrap_hba)
    said = await control(ctx)
    await vet(ctx)
    left = b"" if method is None else await ctx.on_disk(_auto_conf, ctx)
    await ctx.on_disk(ctx.wanted.write_stopped, said, standby=False)
    recovers = method is not None and await ctx.on_disk(prepare_recovery, ctx.data_dir, method, left)
    private = await ctx.on_disk(_private_files, ctx)
    progress("first start, for nobody else to connect")
    alone = {"listen_addresses": "", "unix_socket_directories": str(ctx.private_dir), "unix_socket_permissions": "0700",
             "hba_file": str(private), "synchronous_standby_names": "", **(AT_THE_TARGET if recovers else {})}
    server = await ctx.server.start({**ctx.wanted.command_line(said, standby=False), **alone})
    try:
        if recovers:
            progress("waiting for end of recovery after bootstrap")
        await ctx.server.wait_ready(server, deadline_s=START_DEADLINE_S if method is None else METHOD_DEADLINE_S)
        times.mark("start" if not recovers else "recovery")
        where: Conninfo = {"host": str(ctx.private_dir), "port": local.postgresql.listen.port, "user": name,
                           "dbname": ctx.wanted.effective().postgresql.database}
        if method is not None:
            await _is_primary_with_our_superuser(ctx, where, password)
        await _ensure_database(ctx, where)
        await _script(ctx, where, local.bootstrap.post_bootstrap or local.bootstrap.post_init, progress)
        progress("creating users")
        with closing(await ctx.machine.connect(where, deadline_s=SQL_DEADLINE_S)) as conn:
            await _users(ctx, conn)
            await conn.query("CHECKPOINT", deadline_s=STOP_DEADLINE_S)
        times.mark("users")
        await stop_fast(ctx, server, timeout_s=STOP_DEADLINE_S)
    finally:
        server.close()
    await ctx.on_disk(private.unlink, missing_ok=True)
    await kill_everything(ctx, "the archive did not answer")
    said = await control(ctx)
    if said.state != "shut down":
        raise OperationFailed(f"after the bootstrap PostgreSQL is {said.state!r}, not shut down")
    await be_standby_at_rest(ctx)
    await ctx.on_disk(directories.note_bootstrap, ctx.data_dir, "made")
    times.mark("stop")
    return said.system_identifier


# --- by the operator's program ---------------------------------------------------------------------------------------

async def _restore(ctx: Context, name: str, method: BootstrapMethod) -> None:
    """Fill the data directory. OperationFailed with the program's last words."""
    await ctx.on_disk(ctx.wanted.write_passfile)
    await kill_left(ctx, ctx.data_dir)
    await run_method(ctx, name, bootstrap_arguments(method, scope=ctx.wanted.effective().local.scope, data_dir=ctx.data_dir), ctx.data_dir)
    if (found := await ctx.on_disk(directories.content, ctx.data_dir)) != "valid":
        raise OperationFailed(f"{name} has left a data directory that is {found}")
    await ctx.on_disk(_configuration_is_there, ctx)


def _configuration_is_there(ctx: Context) -> None:
    """Where configuration lies elsewhere (config_dir), a backup has none: an empty file of the operator's to include."""
    files.restore_configuration(ctx.wanted.config_dir, ctx.data_dir)
    if not any((ctx.wanted.config_dir / name).exists() for name in ("postgresql.conf", files.BASE_CONF)):
        files.write_file(ctx.wanted.config_dir / "postgresql.conf", "")


def _auto_conf(ctx: Context) -> bytes:
    path = ctx.data_dir / "postgresql.auto.conf"
    return path.read_bytes() if path.exists() else b""


def prepare_recovery(data_dir: Path, method: BootstrapMethod, auto_conf: bytes) -> bool:
    """Set the restored directory up for its first start: recovered as the configuration says, or as the program has left it
    (`auto_conf`, from before our own settings were written), or simply opened. Is it to be recovered?

    Recovery settings go where they are read last, and are taken away from by the next start (`Wanted.write_stopped`).
    Not into arguments: commands may hold credentials.
    """
    if data_dir.stat().st_mode & 0o027:
        data_dir.chmod(0o700)
    files.remove_file(data_dir / files.STANDBY_SIGNAL)      # nobody is followed yet
    signal, path = data_dir / files.RECOVERY_SIGNAL, data_dir / "postgresql.auto.conf"
    if method.keep_existing_recovery_conf:
        files.write_file(path, auto_conf)
        return signal.exists()
    files.remove_file(signal)
    if not method.recovery_conf:
        return False
    settings = "".join(f"{name} = {files.quote_setting(value)}\n" for name, value in method.recovery_conf.items())
    files.write_file(path, (path.read_bytes() if path.exists() else b"") + settings.encode())
    files.write_file(signal, "")
    return True


async def _is_primary_with_our_superuser(ctx: Context, where: Conninfo, password: str | None) -> None:
    """What was restored is open for writes, and its superuser has the password of the configuration."""
    with closing(await ctx.machine.connect({**where, "dbname": "template1"}, deadline_s=SQL_DEADLINE_S)) as conn:
        if (await conn.query("SELECT pg_is_in_recovery()", deadline_s=SQL_DEADLINE_S))[0][0] != "f":
            raise OperationFailed("PostgreSQL is still in recovery after the bootstrap: it has not ended at its target")
        await roles.set_superuser(conn, str(where["user"]), password, deadline_s=SQL_DEADLINE_S)


def _private_files(ctx: Context) -> Any:
    """Who reaches the socket is our own user: its directory lets nobody else in."""
    ctx.private_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    ctx.private_dir.chmod(0o700)
    path = ctx.private_dir / "bootstrap_hba.conf"
    files.write_file(path, "local all all trust\n", mode=0o600)
    return path


async def _ensure_database(ctx: Context, where: Conninfo) -> None:
    """The database that pgha connects to, if it is another than initdb's own."""
    name = str(where["dbname"])
    with closing(await ctx.machine.connect({**where, "dbname": "template1"}, deadline_s=SQL_DEADLINE_S)) as conn:
        if not await conn.query("SELECT FROM pg_database WHERE datname = $1", name, deadline_s=SQL_DEADLINE_S):
            await conn.query(f"CREATE DATABASE {roles.quote_identifier(name)}", deadline_s=START_DEADLINE_S)


async def _script(ctx: Context, where: Conninfo, command: str, progress: Progress) -> None:
    """post_bootstrap: called with a connection URL, as the reference does."""
    if not command:
        return
    progress("post_bootstrap script")
    await ctx.on_disk(ctx.wanted.write_passfile)
    url = (f"postgres://{quote(str(where['user']), safe='')}@/{quote(str(where['dbname']), safe='')}"
           f"?host={quote(str(where['host']), safe='')}&port={where['port']}")
    env = clean_environment({"PGPASSFILE": str(ctx.wanted.passfile)})
    done = await run_checked([*shlex.split(command), url], deadline_s=SCRIPT_DEADLINE_S, env=env, dies_with_us=True, run=ctx.machine.run)
    log.info("post_bootstrap script has ended", exit_code=done.exit_code)


async def _users(ctx: Context, conn: Connection) -> None:
    superuser, _ = ctx.wanted.user("superuser")
    name, password = ctx.wanted.user("replication")
    if name != superuser:
        await roles.set_replication_user(conn, name, password, deadline_s=SQL_DEADLINE_S)
    name, password = ctx.wanted.user("rewind")
    if name != superuser:
        await roles.set_rewind_user(conn, name, password, deadline_s=SQL_DEADLINE_S)
