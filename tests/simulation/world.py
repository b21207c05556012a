"""The world of a simulation: hosts, their clocks, PostgreSQL and guard; the store; the network; the trace.

    scheduler   virtual time and chance          clocks     what time it is on each host
    network     who reaches whom                 store      the DCS: a MemoryWorld behind members that fail; `SimStore` is a driver
    postgres    data directories, servers, WAL   guard      the guard process, by pgha's own rules
    trace       what happened                    checkers   what may not happen

Both levels share all of this. Level (a) runs pgha's sources over `kernel` (see `stepped`), level (b) under trio.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TextIO

from tests.simulation.checkers import Truth
from tests.simulation.clocks import HostClock
from tests.simulation.guard import GuardFile, GuardProcess
from tests.simulation.network import Network
from tests.simulation.postgres import Instance
from tests.simulation.scheduler import Scheduler
from tests.simulation.store import StoreWorld
from tests.simulation.trace import Trace


class Host:
    """One machine: what survives what. `state` is its state directory, `guard_file` its tmpfs."""

    def __init__(self, world: World, name: str) -> None:
        self.world = world
        self.name = name
        chance = world.scheduler.stream(f"host/{name}")
        ppm = round((chance.random() * 2 - 1) * 9000)
        self.clock = HostClock(world.scheduler, boot_ppm=ppm, raw_ppm=ppm + round((chance.random() * 2 - 1) * 500))
        self.instance = Instance(name, world.scheduler, world.network, world.trace, world.instances, world.truth)
        world.instances[name] = self.instance
        self.guard_file = GuardFile()
        self.guard: GuardProcess | None = None
        self.node_id = f"id-{name}"
        self.up = True
        self.guards = 0

    def start_guard(self) -> GuardProcess | None:
        """None if the host is down. Harmless if one runs."""
        if not self.up:
            return None
        if self.guard is None or not self.guard.process.alive:
            self.guards += 1
            self.guard = GuardProcess(self.name, self.world.scheduler, self.clock, self.instance, self.guard_file, self.world.trace, 100 + self.guards)
        return self.guard

    def kill_guard(self) -> None:
        if self.guard is not None and self.guard.process.alive:
            self.world.trace(self.guard.name, "killed")
            self.guard.kill()


class World:
    """`out`: where the trace goes while it happens."""

    def __init__(self, seed: int | str, *, out: TextIO | None = None) -> None:
        self.scheduler = Scheduler(seed)
        self.trace = Trace(self.scheduler, out)
        self.network = Network(self.scheduler)
        self.store = StoreWorld(self.scheduler, self.network, self.trace)
        self.truth = Truth()
        self.instances: dict[str, Instance] = {}
        self.hosts: dict[str, Host] = {}
        self.at_end: list[Callable[[], None]] = []

    def add_host(self, name: str) -> Host:
        host = self.hosts[name] = Host(self, name)
        return host
