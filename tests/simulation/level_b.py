"""Level (b): whole clusters of the agent as it ships, in one process: pgha.agent.Agent over `machine` and trio in virtual time.

Everything of pgha that an agent runs is imported as usual and runs as it is: loop, renewer, fence, guard client, observers,
announcer, inbox, REST routes, operations, files. `virtual` makes trio deterministic; world, faults and checkers are those
of level (a).
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any, TextIO

from pgha.agent import Agent
from pgha.config.load import Loaded
from pgha.config.local import LocalConfig
from pgha.config.rules import finish
from pgha.config.schema import Report, read
from pgha.errors import PghaError
from pgha.model.action import (
    AcquireLock,
    Freeze,
    LongAction,
    ReleaseLock,
    RestoreStandbySignal,
    SetSynchronousNames,
    StandDown,
    WriteInitialize,
    WriteKey,
)
from pgha.model.decision import Decision, Memory
from pgha.model.observation import Observation
from tests.simulation import virtual
from tests.simulation.machine import NodeDisk, SimMachine, address
from tests.simulation.simulation import BORN_WITHIN_S, Options, Outcome, Simulation, drive
from tests.simulation.store import SimStore
from tests.simulation.virtual import PROCESS, Dead, Process

#: systemd starts an agent that has ended again.
RESTART_S = 1.0
#: The share of operations in which something is killed or frozen.
INTERRUPTED = 0.2
#: … and of the single steps that order depends on.
STEPS = (AcquireLock, Freeze, ReleaseLock, RestoreStandbySignal, SetSynchronousNames, StandDown, WriteInitialize, WriteKey)
STEP_INTERRUPTED = 0.06


class Told(Agent):
    """The agent; the world is told of its passes and licences, as the checkers want to know."""

    owner: AgentProcess

    def _publish(self, seen: Observation, decision: Decision, remembered: Memory) -> None:
        super()._publish(seen, decision, remembered)
        self.owner.decision = decision
        self.owner.world.passed(self.owner, seen, decision)

    def _begin(self, action: LongAction) -> None:
        super()._begin(action)
        self.owner.world.operation_begins(self.owner.host, type(action).__name__)

    def _licence_changed(self) -> None:
        super()._licence_changed()
        self.owner.world.licence_changed(self)

    @property
    def host(self) -> Any:
        return self.owner.host


class AgentProcess:
    """One run of the agent on a host."""

    def __init__(self, world: ShippedWorld, host: Any, incarnation: int) -> None:
        self.world, self.host = world, host
        self.process = Process(host.name)
        self.decision: Decision | None = None
        self._incarnation = incarnation
        host.disk.follow_the_model()
        self.machine = SimMachine(world, host, self.process)
        world.machines[host.name] = self.machine
        self._agent: Told | None = None
        world.trace(host.name, "agent starts", incarnation=incarnation)
        world.run.spawn(self.process, self._main)

    async def _main(self) -> None:
        host, world = self.host, self.world
        try:
            count = iter(range(self._incarnation, self._incarnation + 9))
            loaded = Loaded(local=host.local, warnings=(), consumed_env=frozenset())
            self._agent = agent = Told.__new__(Told)
            agent.owner = self
            agent.__init__(loaded, path="/sim/pgha.toml", environ={}, clock=host.clock, machine=self.machine, read_files=lambda: loaded,  # type: ignore[misc]
                           store=lambda _: SimStore(world.store, host.name, first=next(count)))
            await agent.run()
        except BaseException as error:  # noqa: BLE001  (whatever ends it is judged here)
            self._failed(error)
            return
        world.trace(host.name, "agent has stopped")
        self._ended()
        host.kill_guard()
        if host.wanted:
            host.agent_ended(RESTART_S)     # it was to start again while it was still stopping: systemd has waited

    def _failed(self, error: BaseException) -> None:
        if not self.process.alive:
            return      # killed: what its remains say is nobody's business
        leaves = _leaves(error)
        ours = [e for e in leaves if not isinstance(e, PghaError)]
        for each in leaves:
            self.world.trace(self.host.name, "agent cannot go on", kind=type(each).__name__, why=self.world.without_root(str(each)))
        self._ended()
        if ours:
            text = "".join(traceback.format_exception(ours[0]))
            self.world.violation("NoTaskFails", f"{self.host.name}: {type(ours[0]).__name__}: {ours[0]}\n{text}")
        else:
            self.host.agent_ended(RESTART_S)

    def _ended(self) -> None:
        self.process.alive = False
        self.machine.killed()
        self.host.device.owner_gone()
        self.host.valid_until = None
        self.host.note_bare()

    def kill(self) -> None:
        if self.process.alive:
            self.process.kill()
            self.machine.killed()
            self.host.device.owner_gone()

    def stop(self) -> None:
        """SIGTERM."""
        self.machine.signalled(signal.SIGTERM)

    def request(self, kind: str, **options: Any) -> None:
        """An operator's, over REST."""
        self.machine.asked(kind, options)


class ShippedWorld(Simulation):
    """`root`: where the nodes' files lie."""

    def __init__(self, options: Options, root: Path, *, out: TextIO | None = None) -> None:
        self.root = root
        self.machines: dict[str, SimMachine] = {}
        self._traps = Random(f"{options.seed}/traps")
        super().__init__(options, out=out, make_agent=self._make)
        self.run = virtual.Run(self.scheduler)
        for host in self.hosts.values():
            self.equip(host)

    def equip(self, host: Any) -> None:
        if not hasattr(host, "disk"):
            host.node_id = f"{int(host.name[1:]):032x}"
            host.disk = NodeDisk(host, self.root / host.name)
        host.local = local_config(host)

    def _make(self, host: Any, *, incarnation: int) -> AgentProcess:
        return AgentProcess(self, host, incarnation)

    def operation_begins(self, host: Any, kind: str) -> None:
        """Many a fault falls in the middle of an operation, where order matters most: between one await and the next."""
        self._trap(host, kind, INTERRUPTED)

    def passed(self, agent: Any, seen: Observation, decision: Decision) -> None:
        super().passed(agent, seen, decision)
        for action in decision.actions:
            if isinstance(action, STEPS) and not (isinstance(action, WriteKey) and action.key == "status"):
                self._trap(agent.host, type(action).__name__, STEP_INTERRUPTED)

    def _trap(self, host: Any, kind: str, share: float) -> None:
        chance = self._traps
        if not BORN_WITHIN_S <= self.scheduler.now_s < self.ends_s or chance.random() >= share:
            return
        what = chance.choice(("kill agent", "kill agent", "kill agent", "freeze agent", "freeze agent", "kill guard", "kill postgres", "kill all", "power"))
        after_s = 0.0002 * 10.0 ** (4.0 * chance.random())
        self.scheduler.after(after_s, self._interrupt, host, what, kind, chance.choice((0.2, 1.0, 5.0)), chance.choice((0.5, 3.0, 12.0, 45.0)))

    def _interrupt(self, host: Any, what: str, kind: str, again_s: float, for_s: float) -> None:
        agent = host.agent
        if not host.up or host.suspended or agent is None or not agent.process.runs:
            return
        self.trace("fault", f"{what} in the middle", at=host.name, of=kind)
        self.edges += 1
        self.faults_done += 1
        self.writers.hurry()
        match what:
            case "kill agent":
                host.kill_agent(restart_after_s=again_s)
            case "freeze agent":
                agent.process.freeze()
                self.scheduler.after(for_s, self._thaw, host, agent)
            case "kill guard":
                host.kill_guard()
            case "kill postgres":
                host.instance.kill_all()
            case "kill all":
                host.kill_agent(restart_after_s=again_s)
                host.kill_guard()
            case "power":
                host.power_off()
                self.scheduler.after(for_s, host.power_on)
        host.note_bare()

    def _thaw(self, host: Any, agent: AgentProcess) -> None:
        self.edges += 1
        if not host.suspended:
            agent.process.thaw()
        host.note_bare()

    def without_root(self, text: str) -> str:
        return text.replace(str(self.root), "")

    def close(self) -> None:
        self.run.end()
        for host in self.hosts.values():
            host.disk.close()


def local_config(host: Any) -> LocalConfig:
    disk: NodeDisk = host.disk
    raw: dict[str, Any] = {
        "scope": "sim", "namespace": "service", "name": host.name, "etcd3": {"host": "10.0.0.100:2379"},
        "restapi": {"listen": f"{address(host.name)}:8008"}, "tags": host.tags,
        "postgresql": {
            "listen": f"{address(host.name)}:5432", "data_dir": str(disk.data_dir), "pgpass": str(disk.state_dir / "pgpass"),
            "authentication": {"superuser": {"username": "postgres", "password": "s"}, "replication": {"username": "replicator", "password": "r"},
                               "rewind": {"username": "rewinder", "password": "w"}},
        },
        "pgha": {"state_dir": str(disk.state_dir), "runtime_dir": str(disk.runtime_dir)},
        "watchdog": {"mode": host.watchdog_mode},
    }
    if host.bootstraps:
        raw["bootstrap"] = {"dcs": host.first_config, "initdb": [{"encoding": "UTF8"}]}
    report = Report("simulation")
    local = finish(read(LocalConfig, raw, (), report), report)
    assert not report.problems, report.problems
    return local


class ToTrace(logging.Handler):
    """What agents log, under their names."""

    def __init__(self, world: ShippedWorld) -> None:
        super().__init__()
        self._world = world

    def emit(self, record: logging.LogRecord) -> None:
        process = PROCESS.get(None)
        if process is not None and process.alive:
            facts = {k: round(v, 3) if isinstance(v, float) else self._world.without_root(str(v)).replace(" ", "_") for k, v in getattr(record, "facts", {}).items()}
            self._world.trace(process.name, self._world.without_root(record.getMessage()), **facts)


@contextmanager
def root_of_a_run() -> Iterator[Path]:
    """Where the nodes' files lie."""
    root = Path(f"/dev/shm/pgha-simulation-{os.geteuid()}-{os.getpid()}")
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(mode=0o700)
    try:
        yield root
    finally:
        shutil.rmtree(root, ignore_errors=True)


@contextmanager
def logging_to(world: ShippedWorld) -> Iterator[None]:
    """What agents log is in the world's trace."""
    logger = logging.getLogger("pgha")
    before = (logger.level, logger.propagate, list(logger.handlers))
    logger.handlers[:] = [ToTrace(world)]
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield
    finally:
        logger.setLevel(before[0])
        logger.propagate, logger.handlers[:] = before[1], before[2]


def run(options: Options, *, out: TextIO | None = None) -> Outcome:
    """One run. Ends at the first violation."""
    with root_of_a_run() as root:
        world = ShippedWorld(options, root, out=out)
        with logging_to(world):
            try:
                return drive(world, lambda seconds: world.run.until(seconds, lambda: world.violations))
            finally:
                world.close()


def _leaves(error: BaseException) -> list[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        return [leaf for e in error.exceptions for leaf in _leaves(e)]
    return [error]


__all__ = ["Dead", "run"]
