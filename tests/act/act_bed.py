"""Operations on real PostgreSQL, under a real guard, with the real renewer and fence over a store in memory.

`shared` is tests/postgres/conftest.py: how a test becomes user postgres, and where PostgreSQL's programs are.
"""

from __future__ import annotations

import importlib.util
import os
import signal
import sys
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import trio

from pgha.act import Actor
from pgha.act.context import Context
from pgha.act.context import Told as ContextTold
from pgha.act.wanted import Wanted
from pgha.clock import SystemClock
from pgha.config.load import effective
from pgha.config.local import LocalConfig
from pgha.config.rules import finish
from pgha.config.schema import Report, read
from pgha.dcs.keys import EPOCH, Keys, encode, parse
from pgha.dcs.memory import MemoryStore, MemoryWorld
from pgha.lock import recipe
from pgha.lock.fence import Fence
from pgha.lock.guard_client import GuardClient, agent_flock, ensure_running
from pgha.lock.renewer import Renewer, Timing
from pgha.machine import LocalMachine
from pgha.model import action as a
from pgha.model.decision import Mandate
from pgha.model.lock import Identity
from pgha.model.wal import Position
from pgha.observe.data_directory import DataDirectoryReader
from pgha.observe.postgres import PostgresObserver
from pgha.postgres.connection import Connection
from pgha.postgres.server import Server

ROOT = Path(__file__).parents[2]

_spec = importlib.util.spec_from_file_location("postgres_conftest", ROOT / "tests" / "postgres" / "conftest.py")
shared = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(shared)


class Told(ContextTold):
    """Notes what callbacks would be told."""

    def __init__(self):
        self.events = []

    def promoted(self):
        self.events.append("promoted")

    def started(self, role):
        self.events.append(f"started {role}")

    def restarted(self, role):
        self.events.append(f"restarted {role}")

    def stopped(self):
        self.events.append("stopped")

    def reloaded(self):
        self.events.append("reloaded")


def as_source(node) -> a.Source:
    return a.Source(name=node.name, host="127.0.0.1", port=node.port)


@dataclass
class Node:
    """One agent's parts, without the loop."""

    bed: Bed
    name: str
    directory: Path
    port: int
    options: dict = field(default_factory=dict)
    wakes: int = 0

    def __post_init__(self):
        self.data_dir = self.directory / "data"
        self.directory.mkdir(mode=0o700)
        self.runtime = self.directory / "run"
        self.runtime.mkdir(mode=0o700)
        raw = {
            "scope": "bed", "name": self.name, "etcd3": {"host": "127.0.0.1:1"},
            "restapi": {"listen": "127.0.0.1:1"},
            "bootstrap": {"initdb": ["no-instructions", {"auth": "trust"}, {"encoding": "UTF8"}, {"locale": "C"}], **self.options.get("bootstrap", {})},
            "postgresql": {
                "listen": f"127.0.0.1:{self.port}", "data_dir": str(self.data_dir), "bin_dir": str(shared.BIN),
                "pg_hba": ["local all all trust", "host all all 127.0.0.1/32 scram-sha-256", "host replication all 127.0.0.1/32 scram-sha-256"],
                "authentication": {"superuser": {"username": "postgres", "password": "sup's er"}, "replication": {"username": "rep", "password": "re:p"},
                                   "rewind": {"username": "rew", "password": "re\\w"}},
                "parameters": {"fsync": "off", "shared_buffers": "8MB", "unix_socket_directories": str(self.directory), "max_wal_size": "64MB",
                               **self.options.get("parameters", {})},
                **self.options.get("postgresql", {}),
            },
        }
        report = Report("test")
        self.local = finish(read(LocalConfig, raw, (), report), report)
        assert not report.problems, report.problems
        self.dynamic = {"ttl": 30, "loop_wait": 10, "retry_timeout": 10, "postgresql": {"use_pg_rewind": True}}
        self.clock = SystemClock()
        self.me = Identity(name=self.name, node_id=self.name + "-id", incarnation=self.name + "-1")
        self.store = MemoryStore(self.bed.world)
        self.keys = Keys("service", "bed")
        self.renewer = Renewer(store=MemoryStore(self.bed.world), keys=self.keys, me=self.me, clock=self.clock,
                               timing=lambda: Timing(ttl_s=30.0, loop_wait_s=10.0), changed=lambda: self.fence.changed())
        self.guard = GuardClient(self.runtime, incarnation=self.me.incarnation, started_ns=self.clock.now().boot_ns, data_dir=self.data_dir)
        self.procs = recipe.DataDirectory(str(self.data_dir))
        self.machine = LocalMachine(self.data_dir, shared.BIN, directory=self.procs)
        self.fence = Fence(renewer=self.renewer, guard=self.guard, directory=self.procs, clock=self.clock, wake=self.wake)
        self.renewer.narrower = self.fence
        self.wanted = Wanted(effective=lambda: effective(self.local, self.dynamic), passfile=self.directory / "pgpass")
        self.observer = PostgresObserver(
            data_dir=self.data_dir, machine=self.machine, conninfo=self.wanted.local_conninfo, clock=self.clock, interval_s=lambda: 0.5,
            wake=self.wake, wanted=self.wanted.settings)
        self.reader = DataDirectoryReader(self.data_dir, shared.BIN)
        self.server = Server(self.data_dir, shared.BIN, config_file=self.data_dir / "postgresql.conf")
        self.told, self.scripts = Told(), None
        self.ctx = Context(
            clock=self.clock, me=self.me, store=self.store, keys=self.keys, renewer=self.renewer, fence=self.fence, server=self.server,
            machine=self.machine, wanted=self.wanted, hurry=self.observer.hurry, configuration_changed=self.observer.configuration_changed,
            last_position=lambda: Position(timeline=0, lsn=0), bootstrap_config=lambda: encode(self.dynamic), private_dir=self.runtime,
            beside=lambda work: self.scripts.start_soon(work), told=self.told)
        self.actor = Actor(self.ctx)
        self.progress = []

    def wake(self):
        self.wakes += 1

    async def quick(self, action):
        await self.actor.quick(action, 5.0)

    async def operate(self, action):
        return await self.actor.operate(action, self.progress.append)

    async def view(self):
        return parse(await self.store.read(self.keys.root, deadline_s=1), self.keys)

    async def take_lock(self, *, claim=1, **more):
        view = await self.view()
        await self.quick(a.AcquireLock(
            lock_revision=view.lock_revision, lock_value=view.lock_value, epoch_revision=view.revision_of(EPOCH), epoch_number=view.epoch.number,
            claim_timeline=claim, **more))
        self.renewer.give_mandate(Mandate(kind="running", until=self.clock.now().plus_s(600)), number=1)

    async def primary(self):
        """From nothing to a primary that accepts writes."""
        made = await self.operate(a.Bootstrap())
        await self.take_lock(initialize_revision=made["initialize_revision"], initialize_value=made["system_identifier"])
        await self.operate(a.StartPrimary(timeout_s=30, first_start=True))
        return made["system_identifier"]

    async def clone_of(self, other, *, replace="nothing_there"):
        identifier = (await other.control()).system_identifier
        return await self.operate(a.Clone(source=as_source(other), system_identifier=identifier, replace=replace, why="test"))

    async def standby_of(self, other):
        await self.clone_of(other)
        await self.operate(a.StartStandby(upstream=as_source(other)))
        await self.until(self.streaming)

    def streaming(self):
        row = self.observer.facts.row
        return row is not None and row.receiver is not None and row.receiver.status == "streaming"

    async def until(self, holds, *, within_s=10.0):
        """Wait for the observer to see it."""
        with trio.move_on_after(within_s):
            while not holds():
                self.observer.hurry(1.0)
                await trio.sleep(0.01)
            return
        raise AssertionError(f"not seen within {within_s} s: {self.observer.facts}")

    async def control(self):
        return (await self.reader.read_facts(running=False, fresh=True)).control

    async def sql(self, text, **more):
        conn = await Connection.connect({"host": str(self.directory), "port": self.port, "user": "postgres", "dbname": "postgres", **more}, deadline_s=5)
        try:
            return await conn.query(text, deadline_s=10)
        finally:
            conn.close()

    def living(self):
        return recipe.processes_of(self.procs)

    @property
    def standby_signal(self):
        return (self.data_dir / "standby.signal").exists()

    async def guard_state(self):
        return (await self.guard.status()).state


@dataclass
class Bed:
    """Where nodes lie, and the store they share."""

    path: Path
    world: MemoryWorld

    @asynccontextmanager
    async def node(self, name, **options):
        node = Node(self, name, self.path / name, shared.free_port(), options)
        lock_path = node.runtime / "agent.lock"
        code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from pgha.lock.guard import main; sys.exit(main(sys.argv[1:]))"
        argv = [sys.executable, "-c", code, "--data-dir", str(node.data_dir), "--runtime-dir", str(node.runtime), "--agent-lock", str(lock_path)]
        with agent_flock(lock_path) as locked:
            assert locked
            status = await ensure_running(node.guard, argv, log=str(node.directory / "guard.log"))
            try:
                async with trio.open_nursery() as nursery:
                    node.scripts = nursery
                    await nursery.start(node.renewer.run)
                    await nursery.start(node.fence.run)
                    await nursery.start(node.observer.run)
                    yield node
                    nursery.cancel_scope.cancel()
            finally:
                with trio.CancelScope(shield=True):
                    os.kill(status.pid, signal.SIGKILL)
                    shared._end_servers(node.directory)     # before its shared memory has nobody to remove it
                    await node.guard.aclose()
