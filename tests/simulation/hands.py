"""What pgha's operations touch, over the model: processes, files, SQL, PostgreSQL's programs. For level (a).

Each stand-in has the names and the contract of the module that it stands for; whatever is a plain value or a pure function
is the real one. A path is a `ModelDir`.
"""

from __future__ import annotations

import importlib
import signal
from types import SimpleNamespace
from typing import Any

from pgha.dcs.keys import parse as real_parse
from pgha.errors import CommandFailed, PostgresError, PostgresTimeout, PostgresUnreachable, QueryFailed
from pgha.lock.recipe import Proc, Report
from pgha.model.wal import HistoryRow, format_lsn, parse_lsn
from pgha.postgres.connection import System
from pgha.postgres.controldata import ControlData
from pgha.postgres.histories import HistoryFile
from pgha.postgres.pg_rewind import Rewound
from pgha.postgres.wal_files import ShutdownPositions
from tests.simulation import kernel
from tests.simulation.kernel import running
from tests.simulation.postgres import BLOCK, START_LSN, Branch, DataDir, Instance, Server

SIGNALS = {signal.SIGHUP: "HUP", signal.SIGINT: "INT", signal.SIGQUIT: "QUIT", signal.SIGTERM: "TERM"}


class ModelDir:
    """A path: the data directory of an instance (`kind` "data"), its clone, something put aside, or something beside them."""

    def __init__(self, instance: Instance, kind: str = "data", target: DataDir | None = None) -> None:
        self.instance = instance
        self.kind = kind
        self.target = target

    @property
    def data(self) -> DataDir:
        if self.kind == "clone":
            return self.instance.clone if self.instance.clone is not None else DataDir()
        return self.target if self.target is not None else self.instance.dir

    @property
    def parent(self) -> ModelDir:
        return ModelDir(self.instance, "parent")

    def __truediv__(self, name: str) -> ModelDir:
        return ModelDir(self.instance, f"file:{name}")

    def __str__(self) -> str:
        return f"{self.instance.name}:{self.kind}"

    def stat(self) -> Any:
        return SimpleNamespace(st_mode=0o700)

    def mkdir(self, **_: Any) -> None: ...
    def chmod(self, _: int) -> None: ...
    def unlink(self, **_: Any) -> None: ...


class Exit:
    """Stands for a pidfd."""

    def __init__(self, server: Server) -> None:
        self.exited = kernel.Event()
        if server.postmaster_alive:
            server.exit_listeners.append(self.exited.set)
        else:
            self.exited.set()


class Postmaster:
    """pgha.postgres.processes.Postmaster."""

    def __init__(self, instance: Instance, server: Server) -> None:
        self._instance, self._server = instance, server
        self.pid = server.pid
        self.start_ticks = server.start_ticks
        self.exit_code: int | None = None
        self._exit = Exit(server)

    def alive(self) -> bool:
        return self._server.postmaster_alive

    async def wait_exit(self) -> None:
        await self._exit.exited.wait()

    def signal(self, number: signal.Signals) -> bool:
        return self._instance.server is self._server and self._instance.signal(SIGNALS[number])

    def status(self) -> str:
        return self._instance.status() if self._instance.server is self._server else ""

    def close(self) -> None: ...


# --- processes -----------------------------------------------------------------------------------------------------------

def read_postmaster_pid(data_dir: ModelDir) -> Any:
    server = data_dir.instance.server
    return SimpleNamespace(pid=server.pid, status=data_dir.instance.status(), single_user=False, socket_dir="") if server is not None else None


def _remove_dead_pid_file(data_dir: ModelDir, **_: Any) -> bool:
    if data_dir.instance.lives:
        raise PostgresError("postmaster.pid stays: processes live")
    was, data_dir.data.pid_file = data_dir.data.pid_file, False
    return was


class Directory:
    """pgha.lock.processes.Processes."""

    def __init__(self, instance: Instance) -> None:
        self._instance = instance

    def refresh(self) -> bool:
        return False

    def processes(self) -> list[Proc]:
        instance = self._instance
        if instance.single_user:
            return [Proc(9, 9, 1, "S", "postgres")]
        server = instance.server
        if server is None:
            return []
        found = [Proc(server.pid + BACKEND, server.start_ticks, server.pid, "S", "postgres")]
        return [Proc(server.pid, server.start_ticks, 1, "S", "postgres"), *found] if server.postmaster_alive else found

    def kill_all(self) -> Report:
        killed = tuple(self.processes())
        self._instance.kill_all()
        return Report(killed, 0.002, ())

    def kill_orphans(self, *, seen_ticks: int, keep: frozenset[int] = frozenset()) -> Report:
        server = self._instance.server
        return self.kill_all() if server is not None and not server.postmaster_alive else Report((), 0.0, ())

    def signal_postmaster(self, signum: signal.Signals) -> tuple[int, ...]:
        server = self._instance.postmaster
        if server is None:
            return ()
        self._instance.signal(SIGNALS[signum])
        return (server.pid,)


#: A session's backend has its postmaster's number and this; a walsender has a number that says whose.
BACKEND, WALSENDER = 100_000, 500_000


class SimMachine:
    """pgha.machine.Machine, as far as operations and observers use it."""

    def __init__(self, host: Any) -> None:
        self._host = host
        self._instance: Instance = host.instance
        self.directory = Directory(host.instance)

    def adopt(self) -> Postmaster | None:
        server = self._instance.postmaster
        return Postmaster(self._instance, server) if server is not None else None

    def read_proc(self, pid: int) -> Proc | None:
        return Proc(pid, 1, pid - BACKEND if BACKEND <= pid < WALSENDER else 1, "S", "postgres")

    def send(self, proc: Proc, number: signal.Signals) -> bool:
        names = list(self._host.world.hosts)
        first, second = divmod(proc.pid - WALSENDER, 100)
        if proc.pid < WALSENDER or first >= len(names) or second >= len(names):
            return False
        self._host.world.instances[names[first]].end_walsender(names[second])
        return True

    def ticks_now(self) -> int:
        return 0

    async def exited(self, proc: Proc) -> None:
        await kernel.checkpoint()       # what the model kills is gone

    def kill_copies(self, target: ModelDir) -> list[int]:
        return []

    async def run(self, *_: Any, **__: Any) -> Any:
        raise AssertionError("the model has a stand-in for each program")

    async def connect(self, where: dict[str, Any], *, deadline_s: float) -> Connection:
        return await Connection.connect(where, deadline_s=deadline_s)

    async def answers_startup(self, host: str, port: int, *, deadline_s: float) -> bool:
        await kernel.sleep(0.001)
        instance = self._host.world.instances.get(host)
        return instance is not None and instance.refuses()

    async def shutdown_positions(self, said: ControlData, *, deadline_s: float) -> ShutdownPositions:
        await kernel.sleep(0.01)
        return ShutdownPositions(timeline=said.timeline, checkpoint_lsn=said.checkpoint_lsn, end_lsn=self._instance.dir.lsn, published_lsn=said.checkpoint_lsn)

    async def end_of_wal(self, said: ControlData, *, timeline: int, from_lsn: int, deadline_s: float) -> int:
        await kernel.sleep(0.01)
        return self._instance.dir.lsn

    def boot_id(self) -> str:
        return f"boot {self._host.clock.boots}"

    async def in_thread(self, work: Any, *, abandon_on_cancel: bool = False) -> Any:
        return await kernel.to_thread.run_sync(work, abandon_on_cancel=abandon_on_cancel)


def _walsender_pid(instance: Instance, name: str) -> int:
    names: list[str] = list(running().process.host.world.hosts)      # type: ignore[attr-defined]
    return WALSENDER + 100 * names.index(instance.name) + names.index(name)


# --- files ---------------------------------------------------------------------------------------------------------------

def _writable(path: ModelDir) -> None:
    if path.instance.disk_full:
        raise OSError(28, "No space left on device", str(path))


def create_standby_signal(path: ModelDir) -> bool:
    data = path.data
    if data.content == "missing":
        raise FileNotFoundError(2, "No such file or directory", str(path))
    if data.standby_signal:
        return False
    _writable(path)
    data.standby_signal = True
    path.instance._changed("files")
    return True


def remove_standby_signal(path: ModelDir) -> bool:
    data = path.data
    was, data.standby_signal = data.standby_signal, False
    if was:
        path.instance._changed("signal_removed" if path.kind == "data" else "files")
    return was


def remove_file(path: ModelDir) -> bool:
    if path.kind == "file:rewind_marker":
        was, path.instance.dir.rewind_marker = path.instance.dir.rewind_marker, ""
        return bool(was)
    return False


def clean_auto_conf(*_: Any) -> list[str]:
    return []


def write_file(*_: Any, **__: Any) -> None: ...


# directories

def content(path: ModelDir) -> str:
    if path.instance.disk_hung:
        raise OSError(5, "Input/output error", str(path))
    return path.data.content


def note_bootstrap(path: ModelDir, stage: str) -> None:
    path.data.bootstrap_mark = stage


def bootstrapping(path: ModelDir) -> str:
    return path.instance.dir.bootstrap_mark


def end_bootstrap(path: ModelDir) -> None:
    path.instance.dir.bootstrap_mark = ""


def move_to_failed(path: ModelDir) -> ModelDir:
    return _put_aside(path)


def _put_aside(path: ModelDir) -> ModelDir:
    instance = path.instance
    if instance.lives:
        raise PostgresError("in use by processes")
    old = instance.dir
    instance.aside.append(old)
    mark = old.bootstrap_mark
    instance.dir = DataDir(bootstrap_mark=mark, rewind_marker=old.rewind_marker)     # both lie beside the directory
    instance._changed("files")
    return ModelDir(instance, "aside", old)


async def complete_clone(path: ModelDir, identity: str, **_: Any) -> None:
    await kernel.sleep(0.1)
    path.instance.clone_whole = True


async def delete_clone(path: ModelDir, **_: Any) -> None:
    path.instance.clone_whole = False
    path.instance.clone = None
    await kernel.sleep(0.01)


def unfinished_swap(path: ModelDir) -> bool:
    return path.instance.dir.content == "missing" and path.instance.clone_whole


def swap_in_clone(path: ModelDir) -> ModelDir | None:
    instance = path.instance
    if not instance.clone_whole or instance.clone is None:
        raise PostgresError("the clone is not a whole data directory")
    old = None
    if instance.dir.content in ("valid", "partial"):
        old = _put_aside(path)
    marks = instance.dir
    instance.dir, instance.clone, instance.clone_whole = instance.clone, None, False
    instance.dir.bootstrap_mark, instance.dir.rewind_marker = marks.bootstrap_mark, marks.rewind_marker
    if old is not None:
        instance.replaced.append(old.data)
    instance._changed("files")
    return old


def replaced_directories(path: ModelDir, *suffixes: str) -> list[ModelDir]:
    found = [*(path.instance.replaced if "old" in suffixes else []), *(path.instance.removing if "removing" in suffixes else [])]
    return [ModelDir(path.instance, "aside", data) for data in found]


def move_to_removing(path: ModelDir, why: str) -> ModelDir:
    aside = _put_aside(path)
    path.instance.removing.append(aside.data)
    return aside


async def delete_tree(path: ModelDir, **_: Any) -> None:
    instance, data = path.instance, path.data
    await kernel.sleep(0.05)
    for where in (instance.replaced, instance.removing, instance.aside):
        if data in where:
            where.remove(data)
    instance._truth.removed(instance, data)


def free_bytes(path: ModelDir) -> int:
    return 0 if path.instance.no_room else 1 << 40


async def size_bytes(*_: Any, **__: Any) -> int:
    return 1 << 36


# histories

def read_history(path: ModelDir, timeline: int) -> HistoryFile | None:
    rows = path.data.histories.get(timeline)
    return HistoryFile(timeline=timeline, rows=rows, modified_s=0.0) if rows else None


def block_timeline(path: ModelDir, timeline: int, comment: str) -> bool:
    _writable(path)
    if timeline in path.data.histories:
        return False
    path.data.histories[timeline] = BLOCK
    return True


def claim_timeline(path: ModelDir, leaving: int, timeline: int, claim: str, before: list[tuple[int, bytes | None]]) -> None:
    """The model's promotion copies the history of the timeline that its data is on."""
    _writable(path)
    before.append((leaving, b"" if leaving in path.data.histories else None))
    path.data.claims[leaving] = claim
    path.data.histories.setdefault(leaving, BLOCK)


def unclaim(path: ModelDir, before: list[tuple[int, bytes | None]]) -> None:
    for number, content in before:
        path.data.claims.pop(number, None)
        if content is None:
            path.data.histories.pop(number, None)


def unblock_timeline(path: ModelDir, timeline: int) -> bool:
    if path.data.histories.get(timeline) != BLOCK:
        return False
    del path.data.histories[timeline]
    path.data.claims.pop(timeline, None)
    return True


def unblock_all(path: ModelDir) -> list[int]:
    numbers = sorted(n for n, rows in path.data.histories.items() if rows == BLOCK)
    for number in numbers:
        del path.data.histories[number]
        path.data.claims.pop(number, None)
    return numbers


# pg_control, end of WAL

def control_data(data: DataDir) -> ControlData:
    return ControlData(
        state=data.state, system_identifier=data.system_identifier, control_version=1300, catalog_version=1, timeline=data.control_timeline,
        prev_timeline=data.control_timeline, checkpoint_lsn=data.checkpoint_lsn, redo_lsn=data.checkpoint_lsn, min_recovery_end_lsn=data.min_recovery_lsn,
        min_recovery_timeline=data.min_recovery_timeline, backup_start_lsn=0, end_of_backup_required=False, wal_level="replica", wal_log_hints=data.wal_log_hints,
        checksums=False, wal_segment_bytes=16 << 20, wal_block_bytes=8192, max_connections=100, max_worker_processes=8, max_wal_senders=10,
        max_prepared_transactions=0, max_locks_per_transaction=64, track_commit_timestamp=False)


async def read_control(path: ModelDir, bin_dir: Any, *, deadline_s: float, **_: Any) -> ControlData:
    await kernel.sleep(0.004)
    if path.instance.disk_hung:
        await kernel.sleep(deadline_s)
        raise PostgresTimeout("pg_controldata does not end")
    if path.data.content != "valid":
        raise CommandFailed("pg_controldata", 1, "no such file")
    return control_data(path.data)


# --- SQL -----------------------------------------------------------------------------------------------------------------

class Connection:
    """pgha.postgres.connection.Connection, to an instance."""

    def __init__(self, client: str, instance: Instance, server: Server) -> None:
        self._client, self._instance, self._server = client, instance, server
        self.backend_pid = server.pid + BACKEND
        self.closed = False

    @classmethod
    async def connect(cls, where: dict[str, Any], *, deadline_s: float) -> Connection:
        client = running().process.host.name        # type: ignore[attr-defined]
        world = running().process.host.world        # type: ignore[attr-defined]
        host = str(where["host"])
        instance: Instance | None = running().process.host.instance if "private" in host else world.instances.get(host)   # type: ignore[attr-defined]
        if instance is None:
            raise PostgresUnreachable(f"{host}: no such host")
        await kernel.sleep(0.001)
        until = kernel.current_time() + deadline_s
        while kernel.current_time() < until:
            if world.network.both_ways(client, instance.name) and instance.host_up:
                server = instance.server
                if server is None or not server.postmaster_alive:
                    raise PostgresUnreachable(f"{host}: connection refused")
                if instance.refuses() and server.phase != "ready":
                    raise PostgresUnreachable(f"{host}: the database system is {server.phase}", sqlstate="57P03")
                if instance.answers():
                    return cls(client, instance, server)
            await kernel.sleep(min(0.1, max(0.001, until - kernel.current_time())))
        raise PostgresTimeout(f"{host}: no connection within {deadline_s:g} s")

    async def query(self, sql: str, *parameters: Any, deadline_s: float) -> list[tuple[Any, ...]]:
        await self._answered(deadline_s)
        return _sql(self._instance, self._server, sql, parameters)

    async def _answered(self, deadline_s: float) -> None:
        network = self._instance._network
        await kernel.sleep(0.0005)
        until = kernel.current_time() + deadline_s
        while True:
            server = self._server
            if self._instance.server is not server or not server.children_alive or (server.phase == "stopping" and not server.clients):
                raise PostgresUnreachable("the connection broke")
            if not server.all_frozen and not server.hung and network.both_ways(self._client, self._instance.name):
                return
            left_s = until - kernel.current_time()
            if left_s <= 0:
                self.closed = True
                raise PostgresTimeout(f"no answer within {deadline_s:g} s")
            await kernel.sleep(min(0.1, left_s))

    def close(self) -> None:
        self.closed = True


def _sql(instance: Instance, server: Server, sql: str, parameters: tuple[Any, ...]) -> list[tuple[Any, ...]]:
    data = instance.dir
    recovering = "f" if server.primary else "t"
    if sql == "SELECT pg_is_in_recovery()":
        return [(recovering,)]
    if sql == "SHOW synchronous_standby_names":
        return [(server.synchronous_standby_names,)]
    if sql in ("SET synchronous_commit = local", "SELECT pg_current_xact_id()"):
        return []
    if sql == "CHECKPOINT":
        instance.checkpoint()
        return []
    if sql.startswith("SELECT ('x' || substr(pg_walfile_name"):
        return [(str(data.timeline), str(data.lsn))]
    if sql == "SELECT pg_current_wal_flush_lsn()":
        return [(format_lsn(data.lsn),)]
    if sql.startswith("SELECT pid, application_name FROM pg_stat_replication WHERE (flush_lsn >= $1"):
        wanted = parse_lsn(parameters[0])
        return [(str(_walsender_pid(instance, n)), n) for n, s in server.downstream.items() if s.open and s.downstream.dir.lsn < wanted]
    if sql.startswith("SELECT pg_is_in_recovery(), CASE WHEN"):
        return [(recovering, "0" if not server.primary else str(data.timeline), str(data.control_timeline))]
    if sql.startswith("SELECT pg_is_in_recovery(), (SELECT timeline_id"):
        return [(recovering, str(data.control_timeline))]
    if sql.startswith("SELECT sum(pg_database_size"):
        return [(str(10 << 20),)]
    if sql.startswith("SELECT FROM pg_database"):
        return [()]
    raise AssertionError(f"the model's PostgreSQL does not know this: {sql}")


async def identify_system(conn: Connection, *, deadline_s: float) -> System:
    await conn._answered(deadline_s)
    data = conn._instance.dir
    return System(system_identifier=data.system_identifier, timeline=data.timeline, lsn=data.lsn)


async def timeline_history(conn: Connection, timeline: int, *, deadline_s: float) -> tuple[HistoryRow, ...]:
    await conn._answered(deadline_s)
    rows = conn._instance.dir.histories.get(timeline, ())
    if timeline > 1 and timeline not in conn._instance.dir.histories:
        raise QueryFailed("could not open file: history", sqlstate="58P01")
    return rows


async def resolve(host: str, *, deadline_s: float) -> list[str]:
    return [host]


async def _create_slot(conn: Connection, name: str, *, deadline_s: float) -> None:
    await conn._answered(deadline_s)
    if name in conn._instance.slots:
        raise QueryFailed("exists", sqlstate="42710")
    conn._instance.make_slot(name)


async def _drop_slot(conn: Connection, name: str, *, deadline_s: float) -> None:
    await conn._answered(deadline_s)
    if name not in conn._instance.slots:
        raise QueryFailed("does not exist", sqlstate="42704")
    conn._instance.drop_slot(name)


async def _advance_slot(conn: Connection, name: str, lsn: int, *, deadline_s: float) -> int:
    await conn._answered(deadline_s)
    if name not in conn._instance.slots:
        raise QueryFailed("does not exist", sqlstate="42704")
    return conn._instance.advance_slot(name, lsn)


# --- programs --------------------------------------------------------------------------------------------------------------

class ModelServer:
    """pgha.postgres.server.Server."""

    config_file = None

    def __init__(self, instance: Instance) -> None:
        self._instance = instance
        self.data_dir = ModelDir(instance)
        self.bin_dir = ""

    async def start(self, parameters: Any) -> Postmaster:
        await kernel.sleep(0.005)
        server = self._instance.start()
        if server is None:
            await kernel.sleep(0.02)
            raise CommandFailed("postgres", 1, "could not start")
        if isinstance(parameters, dict) and parameters.get("listen_addresses") == "":
            server.clients = False      # a bootstrap's first start: nobody else connects
        return Postmaster(self._instance, server)

    async def wait_ready(self, postmaster: Postmaster, *, deadline_s: float, hot: bool = True) -> None:
        until = kernel.current_time() + deadline_s
        while kernel.current_time() < until:
            if postmaster.status() == "ready":
                return
            with kernel.move_on_after(0.03):
                await postmaster.wait_exit()
                raise CommandFailed("postgres", 1, "it ended")
        raise PostgresTimeout(f"PostgreSQL is {postmaster.status()!r} after {deadline_s:g} s")

    def stop(self, postmaster: Postmaster, mode: str) -> bool:
        return postmaster.signal({"fast": signal.SIGINT, "immediate": signal.SIGQUIT, "smart": signal.SIGTERM}[mode])

    def reload(self, postmaster: Postmaster) -> bool:
        return postmaster.signal(signal.SIGHUP)

    async def promote(self, postmaster: Postmaster, conn: Connection, *, deadline_s: float) -> None:
        if self._instance.server is not postmaster._server:
            raise PostgresUnreachable("the postmaster has ended")
        self._instance.request_promotion()
        until = kernel.current_time() + deadline_s
        while (left_s := until - kernel.current_time()) > 0:
            if (await conn.query("SELECT pg_is_in_recovery()", deadline_s=left_s))[0][0] == "f":
                return
            with kernel.move_on_after(0.01):
                await postmaster.wait_exit()
                raise PostgresUnreachable("PostgreSQL ended during promotion")
        raise PostgresTimeout("still in recovery")

    async def single_user_recovery(self, parameters: Any, *, deadline_s: float) -> None:
        instance = self._instance
        if instance.dir.standby_signal:
            raise PostgresError("standby.signal must be absent for recovery in single-user mode")
        instance.single_user = True
        await kernel.sleep(0.3 + 2.0 * instance._chance.random())
        if not instance.single_user:
            raise CommandFailed("postgres --single", -9, "killed")
        instance.single_user = False
        if instance.disk_full:
            raise CommandFailed("postgres --single", 1, "PANIC: no space left on device")
        data = instance.dir
        assert data.branch is not None
        if data.state not in ("shut down", "shut down in recovery"):
            instance._append(240, serves=False)
        data.state, data.control_timeline, data.checkpoint_lsn = "shut down", data.timeline, data.lsn - 120
        data.min_recovery_lsn = data.min_recovery_timeline = 0
        data.written += 1
        instance._changed("exited")

    def log_tail(self) -> str:
        return ""


async def run_rewind(path: ModelDir, bin_dir: Any, source: dict[str, Any], control: ControlData, *, source_timeline: int, deadline_s: float,
                     on_progress: Any = None, **_: Any) -> Rewound:
    instance, data = path.instance, path.data
    world = running().process.host.world        # type: ignore[attr-defined]
    theirs: Instance = world.instances[source["host"]]
    said = f"{source['host']} timeline {source_timeline} boot {running().process.host.clock.boots}"       # type: ignore[attr-defined]
    before = data.rewind_marker
    if before and before != said:
        return Rewound(outcome="hopeless", target_changed=True, output=f"a rewind from {before} was cut off")
    if control.state not in ("shut down", "shut down in recovery"):
        if before:
            return Rewound(outcome="hopeless", target_changed=True, output="not shut down cleanly")
        raise PostgresError("cannot rewind: the server was not shut down cleanly")
    if instance.lives:
        raise PostgresError("cannot rewind: processes live")
    data.rewind_marker = said
    await kernel.sleep(0.1 + 0.3 * instance._chance.random())
    if source_timeline == control.timeline:
        data.rewind_marker = ""
        return Rewound(outcome="not_needed", output="no rewind required")
    reached = world.network.both_ways(instance.name, theirs.name) and theirs.answers()
    if not reached:
        data.rewind_marker = before
        return Rewound(outcome="failed", target_changed=bool(before), output="connection to server failed")
    await kernel.sleep(0.5 + 3.0 * instance._chance.random() + instance.work_s)
    reached = world.network.both_ways(instance.name, theirs.name) and theirs.answers() and theirs.server is not None and theirs.server.primary
    if not reached or instance.fail_programs or instance.disk_full:
        return Rewound(outcome="hopeless" if before else "failed", target_changed=True, output="pg_rewind: error in the middle")
    from_dir = theirs.dir
    assert from_dir.branch is not None
    data.branch, data.lsn, data.mixed = from_dir.branch, from_dir.lsn, from_dir.mixed
    data.histories, data.claims = dict(from_dir.histories), dict(from_dir.claims)
    data.standby_signal = from_dir.standby_signal
    data.state, data.control_timeline, data.checkpoint_lsn = "in archive recovery", from_dir.control_timeline, from_dir.checkpoint_lsn
    data.min_recovery_lsn, data.min_recovery_timeline = from_dir.lsn, from_dir.timeline
    data.written += 1
    data.rewind_marker = ""
    data.slots.clear()
    instance._changed("files")
    return Rewound(outcome="rewound", target_changed=True)


async def base_backup(target: ModelDir, bin_dir: Any, conninfo: dict[str, Any], options: Any, *, deadline_s: float, on_progress: Any = None, **_: Any) -> None:
    instance = target.instance
    world = running().process.host.world        # type: ignore[attr-defined]
    theirs: Instance = world.instances[conninfo["host"]]
    _writable(target)
    instance.clone = DataDir(content="partial")
    server = theirs.server
    left_s = 1.0 + 5.0 * instance._chance.random() + instance.work_s
    while left_s > 0:
        await kernel.sleep(min(1.0, left_s))
        left_s -= 1.0
        if on_progress is not None:
            on_progress(SimpleNamespace(done_bytes=1, total_bytes=10))
        if theirs.server is not server or not theirs.answers() or not world.network.both_ways(instance.name, theirs.name):
            raise CommandFailed("pg_basebackup", 1, "server closed the connection unexpectedly")
        if instance.fail_programs or instance.disk_full:
            raise CommandFailed("pg_basebackup", 1, "could not write")
    copy = theirs.dir.copy()
    copy.state = "in production"
    copy.min_recovery_lsn, copy.min_recovery_timeline = copy.lsn, copy.timeline
    copy.histories = {n: rows for n, rows in copy.histories.items() if rows == BLOCK or n == copy.timeline}
    if on_progress is not None:
        on_progress(SimpleNamespace(done_bytes=10, total_bytes=10))
    instance.clone = copy


async def initdb(path: ModelDir, *_: Any, **__: Any) -> None:
    _writable(path)
    instance = path.instance
    world = running().process.host.world        # type: ignore[attr-defined]
    instance.dir.content = "partial"
    instance.single_user = True
    await kernel.sleep(1.0 + 1.0 * instance._chance.random())
    instance.single_user = False
    mark = instance.dir.bootstrap_mark
    world.systems += 1
    branch = Branch(1, None, START_LSN)
    instance.dir = DataDir(content="valid", wal_log_hints=world.hints, system_identifier=str(7_300_000_000_000_000_000 + world.systems), branch=branch, lsn=START_LSN, control_timeline=1,
                           checkpoint_lsn=START_LSN, bootstrap_mark=mark)
    instance._changed("files")


class ModelWanted:
    """pgha.act.wanted.Wanted: how PostgreSQL is to be configured, and postgresql.conf on disk."""

    def __init__(self, instance: Instance, effective: Any) -> None:
        self._instance = instance
        self._effective = effective
        self._upstream: Any = None
        self._slot_name = ""
        self._frozen = self._told = False
        self.passfile = ""
        found = instance.conf_synchronous
        self.names: str | None = found or None
        self.names_told = not found
        self.vetted: dict[str, str] = {}

    def to_vet(self) -> dict[str, str]:
        return {}       # nobody changes a parameter here: level b has the question and its answer

    def started_is_news(self) -> bool:
        return False

    def note_started(self) -> None: ...
    def did_not_start(self, why: str) -> None: ...
    def try_configured(self) -> None: ...

    def follow(self, upstream: Any, slot_name: str) -> None:
        self._upstream, self._slot_name, self._frozen, self._told = upstream, slot_name, False, True

    def freeze(self) -> None:
        self._frozen = True

    def no_longer_frozen(self) -> None:
        self._upstream, self._slot_name, self._frozen, self._told = None, "", False, True

    def set_names(self, names: str | None) -> None:
        self.names, self.names_told = names, True

    def names_are_overridden(self) -> bool:
        return False

    @property
    def upstream(self) -> Any:
        return self._upstream

    @property
    def frozen(self) -> bool:
        return self._frozen

    def effective(self) -> Any:
        return self._effective()

    def local_conninfo(self) -> dict[str, Any]:
        return {"host": self._instance.name, "port": 5432}

    def source_conninfo(self, source: Any, which: str) -> dict[str, Any]:
        return {"host": source.host, "port": source.port}

    program_conninfo = source_conninfo

    def user(self, which: str) -> tuple[str, str | None]:
        return "postgres", None

    def command_line(self, said: ControlData, *, standby: bool = True) -> dict[str, str]:
        return {}

    def write_passfile(self) -> bool:
        return False

    def bootstrap_hba(self) -> None: ...

    def write_running(self) -> bool:
        instance = self._instance
        before = (instance.conf_upstream, instance.conf_slot, instance.conf_synchronous)
        if self._frozen:
            wanted: tuple[str | None, str] = (None, "")
        elif not self._told:
            wanted = (instance.conf_upstream, instance.conf_slot)
        else:
            wanted = (self._upstream.host if self._upstream is not None else None, self._slot_name if self._upstream is not None else "")
        if (*wanted, self.names or "") != before:
            _writable(ModelDir(instance))
        instance.conf_upstream, instance.conf_slot = wanted
        instance.conf_synchronous = self.names or ""
        return (instance.conf_upstream, instance.conf_slot, instance.conf_synchronous) != before

    def write_stopped(self, said: ControlData, *, standby: bool = True) -> None:
        self.write_running()


def _module(name: str, **ours: Any) -> SimpleNamespace:
    """The real module's names, with ours over them."""
    real = importlib.import_module(name)
    return SimpleNamespace(**{**{k: v for k, v in vars(real).items() if not k.startswith("__")}, **ours})


class StepLog:
    """pgha.log.Log: into the trace, under the process's name."""

    def __init__(self, name: str) -> None:
        self._name = name

    def _say(self, event: str, facts: dict[str, Any]) -> None:
        task = kernel._running
        trace = getattr(task.process, "trace", None) if task is not None else None
        if trace is not None:
            trace(task.process.name, event, **facts)

    def debug(self, event: str, /, **facts: Any) -> None: ...

    def info(self, event: str, /, **facts: Any) -> None:
        self._say(event, facts)

    warning = error = exception = info


_parsed: dict[tuple[int, ...], tuple[Any, Any]] = {}


def parse(snapshot: Any, keys: Any) -> Any:
    """pgha.dcs.keys.parse, once for all nodes that see the very same entries: it is a pure function, and half of the time."""
    entries = list(snapshot.entries.values())
    key = (snapshot.revision, *sorted(map(id, entries)))
    found = _parsed.get(key)
    if found is None:
        if len(_parsed) > 200:
            _parsed.clear()
        found = _parsed[key] = (real_parse(snapshot, keys), entries)     # the entries are kept: their ids stay theirs
    return found[0]


def stand_ins() -> dict[str, Any]:
    from tests.simulation import node

    return {
        "pgha.dcs.keys": _module("pgha.dcs.keys", parse=parse),
        "pgha.config.state": _module("pgha.config.state", load_remembered=node.load_remembered, save_remembered=node.save_remembered),
        "pgha.log": SimpleNamespace(Log=StepLog),
        "pgha.postgres.processes": _module("pgha.postgres.processes", read_postmaster_pid=read_postmaster_pid, remove_dead_pid_file=_remove_dead_pid_file),
        "pgha.postgres.files": _module("pgha.postgres.files", create_standby_signal=create_standby_signal, remove_standby_signal=remove_standby_signal,
                                       remove_file=remove_file, clean_auto_conf=clean_auto_conf, write_file=write_file),
        "pgha.postgres.directories": _module(
            "pgha.postgres.directories", content=content, note_bootstrap=note_bootstrap, bootstrapping=bootstrapping, end_bootstrap=end_bootstrap,
            move_to_failed=move_to_failed, complete_clone=complete_clone, delete_clone=delete_clone, unfinished_swap=unfinished_swap, swap_in_clone=swap_in_clone,
            replaced_directories=replaced_directories, move_to_removing=move_to_removing, delete_tree=delete_tree, free_bytes=free_bytes, size_bytes=size_bytes,
            linked_directories=lambda path: [], replaced_by_copy=lambda path: "", clone_directory=lambda path: ModelDir(path.instance, "clone")),
        "pgha.postgres.histories": _module("pgha.postgres.histories", read_history=read_history, block_timeline=block_timeline, claim_timeline=claim_timeline, unclaim=unclaim, unblock_timeline=unblock_timeline,
                                           unblock_all=unblock_all),
        "pgha.postgres.controldata": _module("pgha.postgres.controldata", read_control=read_control),
        "pgha.postgres.connection": _module("pgha.postgres.connection", Connection=Connection, identify_system=identify_system, timeline_history=timeline_history,
                                            resolve=resolve),
        "pgha.postgres.slots": SimpleNamespace(create_physical=_create_slot, drop=_drop_slot, advance=_advance_slot),
        "pgha.postgres.pg_rewind": _module("pgha.postgres.pg_rewind", rewind=run_rewind, interrupted=lambda path: bool(path.instance.dir.rewind_marker),
                                           marker=lambda path: ModelDir(path.instance, "file:rewind_marker")),
        "pgha.postgres.basebackup": _module("pgha.postgres.basebackup", base_backup=base_backup, kill_leftovers=lambda target: []),
        "pgha.postgres.initdb": _module("pgha.postgres.initdb", initdb=initdb),
        "pgha.postgres.server": SimpleNamespace(Server=ModelServer),
    }


__all__ = ["Directory", "ModelDir", "SimMachine", "ModelServer", "ModelWanted", "stand_ins"]
