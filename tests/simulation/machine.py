"""pgha.machine.Machine over the model: one node's processes, programs, sessions, guard and peers in virtual time. Level (b).

What is modelled are processes and programs from outside (a signal, an exit, a line of SQL, a program's arguments and
output); files are small real ones (disk.py). What a program or a server does goes on while the agent is frozen, and
programs that die with the agent do.

An unknown line of SQL or program is an AssertionError: who teaches pgha to ask something new teaches it here, too.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import signal
from collections.abc import AsyncIterator, Callable, Generator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

import msgspec
import trio

from pgha.errors import GuardError, PostgresTimeout, PostgresUnreachable, QueryFailed
from pgha.lock.protocol import MAX_BYTES, Answer, encode_answer, parse_request
from pgha.lock.recipe import Proc, Report
from pgha.model.wal import format_lsn, parse_lsn
from pgha.postgres import probe
from pgha.postgres.controldata import ControlData
from pgha.postgres.gucs import FILES_SQL, SETTINGS_SQL
from pgha.postgres.programs import Completed
from pgha.postgres.wal_files import ShutdownPositions
from pgha.rest.wire import Request
from tests.simulation.disk import FileDir, content_of, control_text, fresh, history_text, there
from tests.simulation.postgres import BLOCK, START_LSN, DataDir, Instance, Server
from tests.simulation.virtual import Dead, Process, pause

SIGNALS = {signal.SIGHUP: "HUP", signal.SIGINT: "INT", signal.SIGQUIT: "QUIT", signal.SIGTERM: "TERM"}
#: From a server's pid to that of its sessions, and of its walsenders.
SESSION, WALSENDER = 100_000, 500_000
#: What a full disk refuses.
WRITES = frozenset({"create_standby_signal", "write_running", "write_stopped", "write_passfile", "block_timeline", "claim_timeline", "unclaim", "note_bootstrap", "_private_files", "write",
                    "bootstrap_hba", "_close_gaps", "make_standby", "save"})
_CONF = re.compile(r"^(primary_conninfo|primary_slot_name|restore_command|synchronous_standby_names) = '((?:[^']|'')*)'$", re.MULTILINE)


def address(name: str) -> str:
    """n3 → 10.0.0.3."""
    return f"10.0.0.{name[1:]}"


def name_of(host: str) -> str:
    return f"n{host.rpartition('.')[2]}"


class Upstream(str):
    """A node's name, with the connection string that led there."""

    __slots__ = ("conninfo",)
    conninfo: str


class SimPostmaster:
    """pgha.postgres.processes.Postmaster."""

    def __init__(self, machine: SimMachine, server: Server) -> None:
        self._machine, self._server = machine, server
        self.pid, self.start_ticks = server.pid, server.start_ticks
        self.data_dir = machine.data_dir
        self.exit_code: int | None = None
        self._exited = trio.Event()
        if server.postmaster_alive:
            server.exit_listeners.append(self._exited.set)
        else:
            self._exited.set()

    def alive(self) -> bool:
        return self._server.postmaster_alive

    async def wait_exit(self) -> None:
        await self._exited.wait()

    def status(self) -> str:
        instance = self._machine.instance
        return instance.status() if instance.server is self._server else ""

    def signal(self, number: signal.Signals) -> bool:
        self._machine.process.check()
        instance = self._machine.instance
        if instance.server is not self._server or not self._server.postmaster_alive:
            return False
        if number == signal.SIGUSR1:
            self._machine.asked_to_promote(self._server)
            return True
        return instance.signal(SIGNALS[number])

    def close(self) -> None:
        if self._exited.set in self._server.exit_listeners:
            self._server.exit_listeners.remove(self._exited.set)


class Processes:
    """pgha.lock.processes.Processes."""

    def __init__(self, machine: SimMachine) -> None:
        self._machine = machine

    def processes(self) -> list[Proc]:
        self._machine.process.check()
        instance = self._machine.instance
        if instance.single_user:
            return [Proc(9, 9, 1, "S", "postgres")]
        server = instance.server
        if server is None:
            return []
        child = Proc(server.pid + SESSION, server.start_ticks, server.pid if server.postmaster_alive else 1, "S", "postgres")
        return [Proc(server.pid, server.start_ticks, 1, "S", "postgres"), child] if server.postmaster_alive else [child]

    def kill_all(self) -> Report:
        killed = tuple(self.processes())
        self._machine.instance.kill_all()
        return Report(killed, 0.002, ())

    def kill_orphans(self, *, seen_ticks: int, keep: frozenset[int] = frozenset()) -> Report:
        server = self._machine.instance.server
        self._machine.process.check()
        return self.kill_all() if server is not None and not server.postmaster_alive else Report((), 0.0, ())

    def signal_postmaster(self, signum: signal.Signals) -> tuple[int, ...]:
        self._machine.process.check()
        server = self._machine.instance.postmaster
        if server is None:
            return ()
        self._machine.instance.signal(SIGNALS[signum])
        return (server.pid,)

    def refresh(self) -> bool:
        return True


class Session:
    """pgha.postgres.connection.Connection: of `machine`'s agent to `instance`."""

    server_version = 150000

    def __init__(self, machine: SimMachine, instance: Instance, server: Server) -> None:
        self._machine, self._instance, self._server = machine, instance, server
        self.backend_pid = server.pid + SESSION
        self.closed = False

    async def query(self, sql: str, *parameters: Any, deadline_s: float) -> list[tuple[Any, ...]]:
        if self.closed:
            raise PostgresUnreachable("connection is closed")
        whole = False
        try:
            await self._answered(deadline_s)
            whole = True
        finally:
            if not whole:
                self.close()
        return self._machine.sql(self._instance, self._server, sql, parameters)

    async def _answered(self, deadline_s: float) -> None:
        instance, server, scheduler = self._instance, self._server, self._machine.scheduler
        network = self._machine.network
        until_ns = scheduler.now_ns + round(max(0.0, deadline_s) * 1e9)
        await pause(scheduler, 0.0005)
        while True:
            self._machine.process.check()
            if instance.host_up and (instance.server is not server or not server.children_alive or (server.phase == "stopping" and not server.clients)):
                raise PostgresUnreachable("the connection broke")
            if instance.host_up and not server.all_frozen and not server.hung and network.both_ways(self._machine.name, instance.name):
                return
            left_s = (until_ns - scheduler.now_ns) / 1e9
            if left_s <= 0:
                raise PostgresTimeout(f"no answer within {deadline_s:g} s")
            await pause(scheduler, min(0.1, left_s))

    def encrypt_password(self, password: str, user: str) -> str:
        return f"SCRAM of {user}"

    def close(self) -> None:
        self.closed = True


class GuardLine:
    """pgha.lock.guard_client.GuardStream: to the guard that runs now."""

    def __init__(self, machine: SimMachine) -> None:
        self._machine = machine
        self._guard = machine.host.guard
        self.listener: int = self._guard.pid
        self._received = b""
        self._news = trio.Event()
        self._ended = False
        self._guard.exit_listeners.append(self._broke)

    def _broke(self) -> None:
        self._ended = True
        self._news.set()

    async def send_all(self, data: bytes) -> None:
        self._machine.process.check()
        await trio.lowlevel.checkpoint()
        if self._ended:
            raise trio.BrokenResourceError("the guard is gone")
        self._guard.ask(parse_request(data), self._answered)

    def _answered(self, answer: Answer) -> None:
        self._received += encode_answer(answer)
        self._news.set()

    async def receive_some(self, max_bytes: int = MAX_BYTES) -> bytes:
        while not self._received and not self._ended:
            self._news = trio.Event()
            await self._news.wait()
        received, self._received = self._received, b""
        return received

    def close(self) -> None:
        if self._broke in self._guard.exit_listeners:
            self._guard.exit_listeners.remove(self._broke)


class Http:
    """pgha.machine.HttpClient."""

    def __init__(self, machine: SimMachine) -> None:
        self._machine = machine

    async def request(self, method: str, url: str, *, body: bytes = b"", largest_bytes: int) -> tuple[int, bytes]:
        machine, parts = self._machine, urlsplit(url)
        machine.process.check()
        target = machine.world.machines.get(name_of(parts.hostname or ""))
        headers = {"content-length": str(len(body))} if body else {}       # as every client says it: without, it is no body
        request = Request(method=method, path=unquote(parts.path), query=dict(parse_qsl(parts.query)), headers=headers, body=body, peer=address(machine.name))
        event, answers = trio.Event(), list[Any]()

        def answered(answer: Any) -> None:
            answers.append(answer)
            event.set()

        if target is not None:
            machine.network.send(machine.name, target.name, target.arrived, machine.name, request, answered)
        await event.wait()      # whoever asks has the deadline
        if isinstance(answers[0], Exception):
            raise answers[0]
        return answers[0].status, answers[0].body


class _Thread:
    """Work on the disk. Whoever waits for it may give up; it goes on for as long as the process lives."""

    def __init__(self, machine: SimMachine, work: Callable[[], Any]) -> None:
        self._machine, self._work = machine, work
        self.ended = trio.Event()
        self.result: Any = None
        self.error: BaseException | None = None
        machine.scheduler.after(0.0003 + 0.0007 * machine.chance.random(), self._do)

    def _do(self) -> None:
        machine = self._machine
        if not machine.process.alive:
            self.error = Dead()
            self.ended.set()
            return
        if machine.process.frozen or machine.instance.disk_hung:
            machine.scheduler.after(0.05, self._do)
            return
        try:
            self.result = machine.do_on_disk(self._work)
        except Exception as error:  # noqa: BLE001  (it is the waiter's)
            self.error = error
        self.ended.set()


Steps = Generator[float, None, Completed]


class Program:
    """A program of PostgreSQL's: each step of it an event of the world. It goes on while its agent is frozen."""

    def __init__(self, machine: SimMachine, steps: Steps) -> None:
        self._machine, self._steps = machine, steps
        self.ended = trio.Event()
        self.result: Completed | None = None
        self._alive = True
        machine.programs.append(self)
        machine.scheduler.after(0.001, self._step)

    def _step(self) -> None:
        if not self._alive:
            return
        try:
            self._machine.scheduler.after(next(self._steps), self._step)
        except StopIteration as end:
            self._end(end.value)

    def _end(self, result: Completed | None) -> None:
        self._alive = False
        self.result = result
        self._machine.programs.remove(self)
        self.ended.set()

    def kill(self) -> None:
        if self._alive:
            self._steps.close()
            self._end(None)


def failed(text: str) -> Completed:
    return Completed(exit_code=1, stdout="", stderr=text)


DONE = Completed(exit_code=0, stdout="", stderr="")


class NodeDisk:
    """The files of one host. They outlive agents, servers and boots."""

    def __init__(self, host: Any, root: Path) -> None:
        self._host = host
        self.instance: Instance = host.instance
        self._in_place: DataDir = self.instance.dir
        self.truth = host.world.truth
        self.data_dir, self.state_dir, self.runtime_dir = root / "data", root / "state", root / "run"
        for path in (root, self.state_dir, self.runtime_dir):
            path.mkdir(mode=0o700)
        (self.state_dir / "node_id").write_text(host.node_id + "\n", encoding="ascii")
        self.dirs: dict[int, FileDir] = {}      # every data directory, by its pg_control
        self._conf_seen: tuple[int, int] | None = None
        self.instance.on_change.append(self._changed)

    def _changed(self, what: str) -> None:
        """postmaster.pid, as the server writes it."""
        server, data = self.instance.server, self.instance.dir
        if server is None or not isinstance(data, FileDir) or not server.postmaster_alive:
            return
        if what == "started":
            for name in ("backup_label", "promote"):
                Path(f"{data.path}/{name}").unlink(missing_ok=True)
        with open(f"{data.path}/postmaster.pid", "w", encoding="ascii") as f:
            f.write(f"{server.pid}\n{data.path}\n{int(server.started_s)}\n5432\n\n{address(self.instance.name)}\n0\n{self.instance.status()}\n")

    def made(self, path: str, model: DataDir) -> FileDir:
        new = FileDir(path, model)
        self.dirs[new.inode] = new
        return new

    def look(self) -> None:
        """After file work: which directory is in place, what does its configuration say."""
        instance, path = self.instance, str(self.data_dir)
        inode = there(path)
        if inode != getattr(instance.dir, "inode", None) or (inode in self.dirs and instance.dir is not self.dirs[inode]):
            for known in self.dirs.values():
                known.find()
            instance.dir = self.dirs[inode] if inode in self.dirs else DataDir(content=content_of(path))  # type: ignore[arg-type]
            instance.aside = [known for known in self.dirs.values() if known is not instance.dir]
            self._conf_seen = None
            self._in_place = instance.dir
            instance._changed("files")
        elif inode is None:
            instance.dir.content = content_of(path)  # type: ignore[assignment]
        if len(self.dirs) > 1:
            for number, known in list(self.dirs.items()):
                if known.gone():
                    del self.dirs[number]
                    known.close()
                    instance.aside = [known for known in self.dirs.values() if known is not instance.dir]
                    self.truth.removed(instance, known)
        if inode is not None:
            self.read_configuration()

    def read_configuration(self) -> None:
        try:
            stat = os.stat(f"{self.data_dir}/postgresql.conf")
        except FileNotFoundError:
            return
        seen = (stat.st_ino, stat.st_mtime_ns)
        if seen == self._conf_seen:
            return
        self._conf_seen = seen
        with open(f"{self.data_dir}/postgresql.conf", encoding="utf-8") as f:
            said = {name: value.replace("''", "'") for name, value in _CONF.findall(f.read())}
        instance = self.instance
        conninfo = said.get("primary_conninfo", "")
        host = re.search(r"\bhost=(\S+)", conninfo)
        instance.conf_upstream = None
        if host:
            instance.conf_upstream = upstream = Upstream(name_of(host[1]))
            upstream.conninfo = conninfo
        instance.conf_slot = said.get("primary_slot_name", "")
        instance.conf_restore_command = said.get("restore_command", "")
        instance.conf_synchronous = said.get("synchronous_standby_names", "")

    def follow_the_model(self) -> None:
        """Somebody has replaced the data, or the whole disk, while nothing ran here: so it is in the files."""
        model, host = self.instance.dir, self._host
        if model is not self._in_place:
            for known in self.dirs.values():
                known.close()
            self.dirs.clear()
            for path in self.data_dir.parent.glob("data*"):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            if model.content == "valid":
                self.made(str(self.data_dir), model)
            self._conf_seen = None
        if host.node_id.endswith("+"):
            for path in self.state_dir.iterdir():
                path.unlink()
            host.node_id = hashlib.md5(host.node_id.encode(), usedforsecurity=False).hexdigest()
            (self.state_dir / "node_id").write_text(host.node_id + "\n", encoding="ascii")
        self.look()

    def close(self) -> None:
        for known in self.dirs.values():
            known.close()


class SimMachine:
    """One agent process's machine. `host`: the node it runs on; `world`: has `machines`, name → the one whose agent runs."""

    def __init__(self, world: Any, host: Any, process: Process) -> None:
        self.world, self.host, self.process = world, host, process
        self.name: str = host.name
        self.instance: Instance = host.instance
        self.scheduler = world.scheduler
        self.network = world.network
        self.data_dir = host.disk.data_dir
        self.directory = Processes(self)
        self.programs: list[Program] = []
        self.chance = self.scheduler.stream(f"machine/{self.name}")
        self._requests: list[tuple[Request, Callable[[Any], None], str]] = []
        self._request_news = trio.Event()
        self._serving = False
        self._signals: list[int] = []
        self._signal_news = trio.Event()
        self.disk: NodeDisk = host.disk

    def killed(self) -> None:
        """The agent is gone, and with it what dies with it."""
        for program in list(self.programs):
            program.kill()
        if self.instance.single_user:
            self.instance.single_user = False
            self.instance._changed("exited")
        for number, watch in list(self.world.store._watches.items()):
            if watch.client == self.name:
                self.world.store.close_watch(number)
        for _, answered, source in self._requests:
            self.network.send(self.name, source, answered, ConnectionResetError("connection reset"))

    # --- files ---

    async def in_thread(self, work: Callable[[], Any], *, abandon_on_cancel: bool = False) -> Any:
        self.process.check()
        thread = _Thread(self, work)
        with trio.CancelScope(shield=not abandon_on_cancel):
            await thread.ended.wait()
        if thread.error is not None:
            raise thread.error
        return thread.result

    def do_on_disk(self, work: Callable[[], Any]) -> Any:
        """File work, and what the world sees of it."""
        if self.instance.disk_full:
            function = work.func if isinstance(work, partial) else work
            if getattr(function, "__name__", "") in WRITES:
                raise OSError(28, "No space left on device", str(self.data_dir))
        before = self.instance.dir
        signal_before = before.standby_signal
        try:
            return work()
        finally:
            self.disk.look()
            if self.instance.dir is before and before.standby_signal != signal_before:
                self.instance._changed("signal_removed" if signal_before else "files")

    def boot_id(self) -> str:
        return f"boot-{self.host.clock.boots}"

    # --- processes ----------------------------------------------------------------------------------------------------------

    def adopt(self) -> Any:
        self.process.check()
        server = self.instance.postmaster
        return SimPostmaster(self, server) if server is not None else None

    def read_proc(self, pid: int) -> Proc | None:
        server, guard = self.instance.server, self.host.guard
        if guard is not None and guard.pid == pid and guard.process.alive:
            return Proc(pid, 1, 1, "S", "python3")
        if pid >= WALSENDER:
            return Proc(pid, 1, 1, "S", "postgres")
        if server is None:
            return None
        if pid == server.pid + SESSION:
            return Proc(pid, server.start_ticks, server.pid if server.postmaster_alive else 1, "S", "postgres")
        return Proc(pid, server.start_ticks, 1, "S", "postgres") if pid == server.pid and server.postmaster_alive else None

    def send(self, proc: Proc, number: signal.Signals) -> bool:
        self.process.check()
        if proc.pid >= WALSENDER:
            self.instance.end_walsender(f"n{proc.pid - WALSENDER}")
        elif self.host.guard is not None and proc.pid == self.host.guard.pid and number == signal.SIGKILL:
            self.host.kill_guard()
        return True

    def ticks_now(self) -> int:
        return 1 << 60

    async def exited(self, proc: Proc) -> None:
        await trio.lowlevel.checkpoint()

    async def wait_exit(self, pid: int) -> None:
        guard = self.host.guard
        if guard is None or guard.pid != pid or not guard.process.alive:
            await pause(self.scheduler, 0.2)
            return
        event = trio.Event()
        guard.exit_listeners.append(event.set)
        try:
            await event.wait()
        finally:
            if event.set in guard.exit_listeners:
                guard.exit_listeners.remove(event.set)

    def kill_copies(self, target: Path) -> list[int]:
        return []

    def asked_to_promote(self, server: Server) -> None:
        path = self.data_dir / "promote"
        if self.instance.server is not server or not server.postmaster_alive or not path.exists():
            return
        if server.postmaster_frozen or server.all_frozen:
            self.scheduler.after(0.05, self.asked_to_promote, server)
            return
        path.unlink()
        self.instance.request_promotion()

    # --- PostgreSQL -----------------------------------------------------------------------------------------------------------

    async def launch(self, argv: Sequence[str], *, data_dir: Path, log_path: Path) -> Any:
        self.process.check()
        with trio.CancelScope(shield=True):     # a thread that is not abandoned
            await pause(self.scheduler, 0.003 + 0.005 * self.chance.random())
        self.process.check()
        self.disk.read_configuration()
        server = self.instance.start()
        if server is None:
            return 1
        if "--listen_addresses=" in argv:
            server.clients = False      # a bootstrap's first start
        return SimPostmaster(self, server)

    async def connect(self, conninfo: Mapping[str, str | int], *, deadline_s: float) -> Any:
        self.process.check()
        scheduler = self.scheduler
        host = str(conninfo.get("hostaddr") or conninfo["host"])
        instance = self.instance if host.startswith("/") else self.world.instances.get(name_of(host))
        if instance is None:
            raise PostgresUnreachable(f"{host}: no such host")
        until_ns = scheduler.now_ns + round(max(0.0, deadline_s) * 1e9)
        await pause(scheduler, 0.001)
        while True:
            self.process.check()
            if instance.host_up and self.network.both_ways(self.name, instance.name):
                server = instance.server
                if server is None or not server.postmaster_alive:
                    raise PostgresUnreachable(f"{host}: connection refused")
                if instance.refuses() and server.phase != "ready":
                    raise PostgresUnreachable(f"{host}: the database system is {server.phase}", sqlstate="57P03")
                if instance.answers():
                    return Session(self, instance, server)
            left_s = (until_ns - scheduler.now_ns) / 1e9
            if left_s <= 0:
                raise PostgresTimeout(f"no connection within {deadline_s:g} s to {host}")
            await pause(scheduler, min(0.1, left_s))

    async def answers_startup(self, host: str, port: int, *, deadline_s: float) -> bool:
        self.process.check()
        until_ns = self.scheduler.now_ns + round(max(0.0, deadline_s) * 1e9)
        await pause(self.scheduler, 0.001)
        while True:
            instance = self.instance if host.startswith("/") else self.world.instances.get(name_of(host))
            if instance is None or instance.postmaster is None:
                return False
            if instance.refuses() and self.network.both_ways(self.name, instance.name):
                return True
            left_s = (until_ns - self.scheduler.now_ns) / 1e9
            if left_s <= 0:
                return False
            await pause(self.scheduler, min(0.1, left_s))

    async def shutdown_positions(self, said: ControlData, *, deadline_s: float) -> ShutdownPositions:
        await self._disk(0.01, deadline_s)
        return ShutdownPositions(timeline=said.timeline, checkpoint_lsn=said.checkpoint_lsn, end_lsn=self.instance.dir.lsn, published_lsn=said.checkpoint_lsn)

    async def end_of_wal(self, said: ControlData, *, timeline: int, from_lsn: int, deadline_s: float) -> int:
        await self._disk(0.02, deadline_s)
        return self.instance.dir.lsn

    async def _disk(self, seconds: float, deadline_s: float) -> None:
        self.process.check()
        with trio.move_on_after(max(0.0, deadline_s)):
            await pause(self.scheduler, seconds)
            while self.instance.disk_hung:
                await pause(self.scheduler, 0.05)
            self.process.check()
            return
        raise PostgresTimeout("the disk does not answer")

    # SQL

    def sql(self, instance: Instance, server: Server, sql: str, parameters: tuple[Any, ...]) -> list[tuple[Any, ...]]:
        data = instance.dir
        recovering = "f" if server.primary else "t"
        if sql == probe._SQL:
            return [_probe(instance, server)]
        if sql in (SETTINGS_SQL, FILES_SQL):
            return []
        if sql == "SELECT pg_is_in_recovery()":
            return [(recovering,)]
        if sql == "SHOW synchronous_standby_names":
            return [(server.synchronous_standby_names,)]
        if sql in ("SET synchronous_commit = local", "SELECT pg_current_xact_id()"):
            return [("1",)]
        if sql == "CHECKPOINT":
            instance.checkpoint()
            return []
        if sql.startswith("SELECT ('x' || substr(pg_walfile_name"):
            return [(str(data.timeline), str(data.lsn))]
        if sql == "SELECT pg_current_wal_flush_lsn()":
            return [(format_lsn(data.lsn),)]
        if sql.startswith("SELECT pid, application_name FROM pg_stat_replication WHERE (flush_lsn >= $1"):
            wanted = parse_lsn(parameters[0])
            return [(str(WALSENDER + int(n[1:])), n) for n, s in server.downstream.items() if s.open and s.downstream.dir.lsn < wanted]
        if sql.startswith("SELECT pg_is_in_recovery(), CASE WHEN"):
            return [(recovering, "0" if not server.primary else str(data.timeline), str(data.control_timeline))]
        if sql.startswith("SELECT pg_is_in_recovery(), (SELECT timeline_id"):
            return [(recovering, str(data.control_timeline))]
        if sql == "IDENTIFY_SYSTEM":
            return [(data.system_identifier, str(data.timeline), format_lsn(data.lsn), None)]
        if sql.startswith("TIMELINE_HISTORY "):
            number = int(sql.split()[1])
            if number not in data.histories:
                raise QueryFailed("could not open file: history", sqlstate="58P01")
            return [(f"{number:08X}.history", history_text(data.histories[number]))]
        if sql.startswith("SELECT sum(pg_database_size"):
            return [(str(10 << 20),)]
        if sql.startswith("SELECT FROM pg_database"):
            return [()]
        if sql.startswith("SELECT pg_create_physical_replication_slot"):
            if parameters[0] in instance.slots:
                raise QueryFailed("exists", sqlstate="42710")
            instance.make_slot(parameters[0])
            return [("",)]
        if sql.startswith("SELECT pg_drop_replication_slot"):
            if parameters[0] not in instance.slots:
                raise QueryFailed("does not exist", sqlstate="42704")
            instance.drop_slot(parameters[0])
            return [("",)]
        if sql.startswith("SELECT end_lsn FROM pg_replication_slot_advance"):
            if parameters[0] not in instance.slots:
                raise QueryFailed("does not exist", sqlstate="42704")
            return [(format_lsn(instance.advance_slot(parameters[0], parse_lsn(parameters[1]))),)]
        if sql.startswith(("SELECT FROM pg_roles", "BEGIN; SET LOCAL", "CREATE ROLE", "ALTER ROLE", "COMMIT", "ROLLBACK", "GRANT EXECUTE", "CREATE DATABASE")):
            return []
        raise AssertionError(f"the model's PostgreSQL does not know this: {sql}")

    # programs

    async def run(self, argv: Sequence[str | Path], *, deadline_s: float, env: Any = None, cwd: Path | None = None, on_output: Any = None,
                  on_error_output: Any = None, dies_with_us: bool = False, spare_background: bool = False) -> Completed:
        self.process.check()
        words = [str(a) for a in argv]
        name = words[0].rpartition("/")[2]
        options = dict(w.removeprefix("--").partition("=")[::2] for w in words[1:] if w.startswith("--"))
        if name == "pg_controldata":
            steps = self._pg_controldata(words[2])
        elif name == "initdb":
            steps = self._initdb(words[2])
        elif name == "pg_basebackup":
            steps = self._pg_basebackup(options["pgdata"], options["dbname"], on_error_output)
        elif name == "pg_rewind":
            steps = self._pg_rewind(options["target-pgdata"], options["source-server"])
        elif name == "postgres" and "--single" in words:
            steps = self._single_user()
        elif name == "postgres" and "-C" in words:
            steps = self._understood()
        else:
            raise AssertionError(f"the model does not know this program: {words}")
        program = Program(self, steps)
        try:
            with trio.move_on_after(max(0.0, deadline_s)):
                await program.ended.wait()
                self.process.check()
                self.disk.look()
                return program.result or Completed(exit_code=-9, stdout="", stderr="killed")
        finally:
            if self.process.alive:
                program.kill()
        raise PostgresTimeout(f"{name} had not ended after {deadline_s:g} s")

    def _pg_controldata(self, path: str) -> Steps:
        yield 0.004
        while self.instance.disk_hung:
            yield 0.1
        inode = there(path)
        if inode not in self.disk.dirs:
            return failed("could not open file")
        return Completed(exit_code=0, stdout=control_text(self.disk.dirs[inode]), stderr="")

    def _understood(self) -> Steps:
        """PostgreSQL's program takes every setting of the simulated configurations."""
        yield 0.01
        return Completed(exit_code=0, stdout="", stderr="")

    def _initdb(self, path: str) -> Steps:
        if self.instance.disk_full:
            return failed("No space left on device")
        self.instance.single_user = True
        os.makedirs(path, exist_ok=True)
        Path(f"{path}/base").mkdir(exist_ok=True)
        try:
            yield 1.0 + self.chance.random()
        finally:
            self.instance.single_user = False
        self.world.systems += 1
        self.disk.made(path, fresh(str(7_300_000_000_000_000_000 + self.world.systems), START_LSN))
        self.instance._changed("files")
        return DONE

    def _source(self, conninfo: str) -> Instance:
        found = re.search(r"\bhost=(\S+)", conninfo)
        assert found is not None, conninfo
        instance: Instance = self.world.instances[name_of(found[1])]
        return instance

    def _pg_basebackup(self, path: str, conninfo: str, on_progress: Any) -> Steps:
        theirs = self._source(conninfo)
        server = theirs.server
        os.makedirs(f"{path}/base", exist_ok=True)
        left_s = 1.0 + 5.0 * self.chance.random() + self.instance.work_s
        while left_s > 0:
            yield min(1.0, left_s)
            left_s -= 1.0
            if on_progress is not None and self.process.runs:
                on_progress(f"{int(1000 - left_s)}/1000 kB (50%)\r".encode())
            if theirs.server is None or theirs.server is not server or not theirs.answers() or not self.network.both_ways(self.name, theirs.name):
                return failed("server closed the connection unexpectedly")
            if self.instance.fail_programs or self.instance.disk_full:
                return failed("could not write")
        copy = theirs.dir.copy()
        copy.state = "in production"
        copy.min_recovery_lsn, copy.min_recovery_timeline = copy.lsn, copy.timeline
        copy.histories = {n: rows for n, rows in theirs.dir.histories.items() if rows == BLOCK or n == copy.timeline}
        self.disk.made(path, copy)
        return DONE

    def _pg_rewind(self, path: str, conninfo: str) -> Steps:
        instance, theirs = self.instance, self._source(conninfo)
        yield 0.1 + 0.3 * self.chance.random()
        data = instance.dir
        if not (self.network.both_ways(self.name, theirs.name) and theirs.answers() and theirs.server is not None):
            return failed("pg_rewind: error: connection to server failed")
        if theirs.dir.control_timeline == data.control_timeline:
            return Completed(exit_code=0, stdout="no rewind required\n", stderr="")
        yield 0.5 + 3.0 * self.chance.random() + instance.work_s
        reached = self.network.both_ways(self.name, theirs.name) and theirs.answers() and theirs.server is not None and theirs.server.primary
        if not reached or instance.fail_programs or instance.disk_full:
            return failed("need to copy 100 MB\npg_rewind: error: in the middle")
        source = theirs.dir
        assert isinstance(data, FileDir)
        data.branch, data.lsn, data.mixed = source.branch, source.lsn, source.mixed
        for number in list(data.histories):
            del data.histories[number]
        for number, rows in source.histories.items():
            data.histories[number] = rows
        data.standby_signal = source.standby_signal
        Path(f"{path}/backup_label").touch()
        data.state, data.control_timeline, data.checkpoint_lsn = "in archive recovery", source.control_timeline, source.checkpoint_lsn
        data.min_recovery_lsn, data.min_recovery_timeline = source.lsn, source.timeline
        data.written += 1
        data.slots.clear()
        return Completed(exit_code=0, stdout="Done!\n", stderr="")

    def _single_user(self) -> Steps:
        instance = self.instance
        instance.single_user = True
        try:
            yield 0.3 + 2.0 * self.chance.random()
            if not instance.single_user:
                return Completed(exit_code=-9, stdout="", stderr="killed")
        finally:
            instance.single_user = False
        if instance.disk_full:
            return failed("PANIC: no space left on device")
        data = instance.dir
        if data.state not in ("shut down", "shut down in recovery"):
            instance._append(240, serves=False)
        data.state, data.control_timeline, data.checkpoint_lsn = "shut down", data.timeline, data.lsn - 120
        data.min_recovery_lsn = data.min_recovery_timeline = 0
        data.written += 1
        instance._changed("exited")
        return DONE

    # --- guard, device ------------------------------------------------------------------------------------------------------

    async def open_guard(self, path: str) -> GuardLine:
        self.process.check()
        await trio.lowlevel.checkpoint()
        guard = self.host.guard
        if guard is None or not guard.process.alive:
            raise ConnectionRefusedError(111, "connection refused")
        return GuardLine(self)

    async def spawn(self, argv: Sequence[str], *, log: str = "/dev/null") -> None:
        self.process.check()
        await pause(self.scheduler, 0.02 + 0.05 * self.chance.random())
        self.process.check()
        if self.host.start_guard() is None:
            raise GuardError("the guard could not be started")

    def device(self, path: str) -> Any:
        return self.host.device

    # --- peers, people ----------------------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def http(self, verify: Any) -> AsyncIterator[Http]:
        yield Http(self)

    def arrived(self, source: str, request: Request, answered: Callable[[Any], None]) -> None:
        """A request reaches this host (whichever agent runs here now)."""
        machine = self.world.machines.get(self.name)
        if machine is None or not machine.process.alive or not machine._serving:
            if self.host.up:
                self.network.send(self.name, source, answered, ConnectionRefusedError(111, "connection refused"))
            return
        machine._requests.append((request, answered, source))
        machine._request_news.set()

    def asked(self, kind: str, options: Mapping[str, Any]) -> None:
        """By an operator, at this node's own REST API."""
        method, path = ("DELETE", "/restart") if kind == "cancel_restart" else ("POST", f"/{kind}")
        self.arrived(self.name, Request(method=method, path=path, body=msgspec.json.encode(options), peer="127.0.0.1"), lambda _: None)

    async def serve(self, listen: Any, app: Any, *, task_status: Any = trio.TASK_STATUS_IGNORED) -> None:
        self._serving = True
        task_status.started([])

        async def answer(request: Request, answered: Callable[[Any], None], source: str) -> None:
            response = await app.handle(request)
            self.process.check()
            self.network.send(self.name, source, answered, response)

        async with trio.open_nursery() as nursery:
            while True:
                self._request_news = trio.Event()
                requests, self._requests = self._requests, []
                for each in requests:
                    nursery.start_soon(answer, *each)
                await self._request_news.wait()

    @contextmanager
    def signals(self, *numbers: signal.Signals) -> Iterator[AsyncIterator[int]]:
        async def received() -> AsyncIterator[int]:
            while True:
                while self._signals:
                    yield self._signals.pop(0)
                self._signal_news = trio.Event()
                await self._signal_news.wait()

        yield received()

    def signalled(self, number: signal.Signals) -> None:
        self._signals.append(number)
        self._signal_news.set()

    def notify(self, state: str) -> None: ...

    def token(self) -> str:
        return f"{self.chance.getrandbits(64):016x}"

    def give_memory_back(self) -> None: ...


def _probe(instance: Instance, server: Server) -> tuple[str | None, ...]:
    """The answer to probe._SQL, as the server would send it."""
    data, primary = instance.dir, server.primary
    stream = server.stream
    receiver = replication = slots = None
    if stream is not None:
        receiver = msgspec.json.encode({"status": "streaming", "sender_host": address(stream.upstream.name), "sender_port": 5432, "slot_name": server.slot_name,
                                        "timeline": data.timeline, "latest_end_lsn": data.lsn}).decode()
    rows = [{"pid": WALSENDER + int(name[1:]), "usename": "replicator", "application_name": name, "client_addr": address(name), "state": "streaming",
             "sync_state": instance.sync_state(server, name), "sync_priority": 0, "sent_lsn": data.lsn, "write_lsn": s.downstream.dir.lsn,
             "flush_lsn": s.downstream.dir.lsn, "replay_lsn": s.downstream.dir.lsn} for name, s in server.downstream.items() if s.open]
    if rows:
        replication = msgspec.json.encode(rows).decode()
    if instance.slots:
        slots = msgspec.json.encode([{"name": n, "type": "physical", "active": n in server.downstream, "restart_lsn": lsn, "wal_status": "reserved", "plugin": None,
                                      "database": None, "temporary": False} for n, lsn in instance.slots.items()]).decode()
    conninfo = server.upstream.conninfo if isinstance(server.upstream, Upstream) else ""
    return ("f" if primary else "t", str(data.timeline), str(data.lsn) if primary else None, None if primary else str(max(server.received, 0)),
            None if primary else str(server.replayed), None, "f", str(server.started_s), "2026-01-01 00:00:00+00", str(server.started_s), "150000", data.system_identifier,
            server.synchronous_standby_names, "t", "t" if primary or server.replayed >= data.lsn else "f", conninfo, server.slot_name, server.restore_command, None, receiver, replication, slots)


__all__ = ["NodeDisk", "SimMachine", "address", "name_of"]
