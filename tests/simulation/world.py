"""The world of a simulation: hosts, their clocks, PostgreSQL and guard; the store; the network; the trace.

    scheduler   virtual time and chance          clocks     what time it is on each host
    network     who reaches whom                 store      the DCS: a MemoryWorld behind members that fail; `SimStore` is a driver
    postgres    data directories, servers, WAL   guard      the guard process, by pgha's own rules
    trace       what happened                    checkers   what may not happen

Both levels share all of this. Level (a) runs pgha's sources over `kernel` (see `stepped`), level (b) under trio.

What the model leaves out:

* the store: one kind, etcd's (linearizable reads, revisions, leases, a watch); serializable reads of followers that lag are
  not asked for by pgha, and not modelled. Consul, ZooKeeper, and the bytes of etcd's gateway are the drivers' contract
  (tests/dcs) and the fuzz corpus. A quota is full or not at all; defragmentation and slow growth are not there.
* Patroni members: what `patroni` says of them; level (b) has none.
* PostgreSQL: WAL is positions and branches, not records; no archive (restore_command, nostream), no logical
  slots, no tablespaces, no pg_hba; WAL is never missing (no slot is invalidated, no segment recycled under a standby);
  max_connections and the like never stop a standby; every backend dies when SIGKILL says so (no uninterruptible sleep).
* the network: messages, not bytes; a stream is in order and a connection is cut or slow, never half open for minutes
  except as a WAL connection. TLS, DNS and REST over the wire are tests/rest, tests/cluster and tests/chaos.
* the host: processes freeze and die, disks are full or hang as a whole; no CPU starvation by degrees, no memory pressure,
  no clock that runs more than 0.9 % wrong. Without systemd: who ends is started again after a moment.
* operators: no `pg_ctl promote` by hand, no local configuration that changes by SIGHUP (tags change with a restart of the
  agent). Data is wiped or replaced by hand only where another
  member has it all, and in no synchronous mode: what people must decide is not judged.
* level (a) besides: loop, observers and REST answers are written anew (see `node`); level (b) runs the shipped ones.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TextIO

from pgha.lock.watchdog import Limits
from tests.simulation.checkers import Truth, Violation
from tests.simulation.clocks import HostClock
from tests.simulation.guard import GuardFile, GuardProcess
from tests.simulation.network import Network
from tests.simulation.postgres import Instance
from tests.simulation.scheduler import Event, Scheduler
from tests.simulation.store import StoreWorld
from tests.simulation.trace import Trace


class Device:
    """/dev/watchdog of one host (pgha.lock.watchdog.Device). It fires: the host is reset."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self.present = False
        self.broken = False             # it cannot be opened; who has it open goes on
        self._open = False
        self._timeout_s = 60
        self._timer: Event | None = None

    def accessible(self) -> str:
        return "it cannot be opened" if self.broken else "" if self.present else "there is no device"

    def limits(self) -> Limits:
        return Limits(1, 60)

    def nowayout(self) -> bool:
        return False

    def _count(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._host.world.scheduler.after(self._timeout_s, self._fire)

    def open(self) -> None:
        if not self.present or self.broken:
            raise OSError(2, "No such file or directory", "/dev/watchdog")
        self._open = True
        self._count()

    def set_timeout(self, timeout_s: int) -> int:
        self._timeout_s = timeout_s
        self._count()
        return timeout_s

    def keepalive(self) -> None:
        self._count()

    def close(self, *, stop: bool) -> None:
        self._open = False
        if self._timer is not None and stop:
            self._timer.cancel()

    def owner_gone(self) -> None:
        """Its process died without the magic close: it goes on counting."""
        self._open = False

    def _fire(self) -> None:
        if self._host.up:
            self._host.world.trace(self._host.name, "watchdog fires")
            self._host.reset()


class Host:
    """One machine: what survives what. `guard_file` is on tmpfs, `remembered` and `cached_config` are on disk.

    `world.make_agent(host, incarnation)` makes its agent: an object with `process` (freeze, thaw, alive), `kill()`, `stop()`
    and `request(kind, **options)`.
    """

    def __init__(self, world: World, name: str) -> None:
        self.world = world
        self.name = name
        chance = self._chance = world.scheduler.stream(f"host/{name}")
        ppm = round((chance.random() * 2 - 1) * 9000)
        self.clock = HostClock(world.scheduler, boot_ppm=ppm, raw_ppm=ppm + round((chance.random() * 2 - 1) * 500))
        self.instance = Instance(name, world.scheduler, world.network, world.trace, world.instances, world.truth)
        world.instances[name] = self.instance
        self.guard_file = GuardFile()
        self.promise_file: bytes | None = None      # on tmpfs, too
        self.guard: GuardProcess | None = None
        self.agent: Any = None
        self.all_agents: list[Any] = []
        self.device = Device(self)
        self.patroni = False                # a member of another make: its agent is `patroni.PatroniProcess`, and it has no guard
        self.watchdog_mode: Any = "automatic"
        self.node_id = f"id-{name}"
        self.up = True
        self.suspended = False
        self.wanted = True                  # systemd is to have an agent here
        self.local: Any = None              # LocalConfig
        self.tags: dict[str, Any] = {}
        self.bootstraps = True              # its configuration has a [bootstrap] section
        self.gone = False                   # it has left for good
        self.first_config: dict[str, Any] = {}
        self.cached_config: dict[str, Any] | None = None
        self.remembered: Any = None
        self.guards = self.agents = 0
        self.bare = True                    # agent and guard are both out of action …
        self.bare_since_ns = 0              # … and when that last began or ended
        self.valid_until: Any = None        # of the last licence that this host's agent had

    # --- guard -----------------------------------------------------------------------------------------------------------

    def start_guard(self) -> GuardProcess | None:
        """None if the host is down. Harmless if one runs."""
        if not self.up or self.patroni:
            return None
        if self.guard is None or not self.guard.process.alive:
            self.guards += 1
            self.guard = GuardProcess(self.name, self.world.scheduler, self.clock, self.instance, self.guard_file, self.world.trace, 100 + self.guards)
            self.note_bare()
        return self.guard

    def kill_guard(self) -> None:
        if self.guard is not None and self.guard.process.alive:
            self.world.trace(self.guard.name, "ends")
            self.guard.kill()
            self.note_bare()

    # --- agent -----------------------------------------------------------------------------------------------------------

    def start_agent(self) -> None:
        if self.up and self.wanted and not self.suspended and (self.agent is None or not self.agent.process.alive):
            self.agents += 1
            self.agent = self.world.make_agent(self, self.agents)
            self.all_agents.append(self.agent)
            self.world.agents[self.name] = self.agent
            self.note_bare()

    def kill_agent(self, *, restart_after_s: float | None = 1.0) -> None:
        """SIGKILL; systemd starts another."""
        if self.agent is not None and self.agent.process.alive:
            self.world.trace(self.name, "agent killed")
            self.agent.kill()
            if self.instance.single_user:
                self.instance.kill_all()        # our programs die with us
            self.note_bare()
        if restart_after_s is not None:
            self.agent_ended(restart_after_s)

    def agent_ended(self, restart_after_s: float) -> None:
        self.world.scheduler.after(restart_after_s, self.start_agent)

    @property
    def protected(self) -> bool:
        """Agent or guard is there and runs."""
        return any(p is not None and p.process.alive and not p.process.frozen for p in (self.agent, self.guard)) and not self.suspended

    def note_bare(self) -> None:
        """To be called when agent or guard has come or gone."""
        bare = not self.protected
        if bare or self.bare:
            self.bare_since_ns = self.world.scheduler.now_ns
        self.bare = bare

    # --- the machine -----------------------------------------------------------------------------------------------------

    def power_off(self) -> None:
        if not self.up:
            return
        self.world.trace(self.name, "host down")
        self.up = False
        if self.agent is not None:
            self.agent.kill()
        if self.guard is not None and self.guard.process.alive:
            self.guard.kill()
        self.guard_file.held = None
        self.promise_file = None
        self.device.close(stop=True)
        self.instance.power_off()

    def power_on(self) -> None:
        if self.up or self.gone:
            return
        self.world.trace(self.name, "host up")
        self.up = True
        self.suspended = False
        self.clock.reboot()
        self.instance.power_on()
        self.agent_ended(1.0 + self._chance.random())

    def reset(self) -> None:
        self.power_off()
        self.world.scheduler.after(5.0 + 5.0 * self._chance.random(), self.power_on)

    def suspend(self, *, clocks: bool) -> None:
        """The whole guest stands still. `clocks`: its raw clock, too (suspend to RAM); else time goes on without it."""
        if not self.up or self.suspended:
            return
        self.world.trace(self.name, "host suspended")
        self.suspended = True
        if clocks:
            self.clock.suspend()
        for process in (self.agent, self.guard):
            if process is not None:
                process.process.freeze()
        self.instance.freeze(everything=True)
        self.note_bare()

    def resume(self) -> None:
        if not self.suspended:
            return
        self.world.trace(self.name, "host resumes")
        self.suspended = False
        self.clock.resume()
        for process in (self.guard, self.agent):
            if process is not None:
                process.process.thaw()
        self.note_bare()
        self.instance.thaw()
        if self.agent is None or not self.agent.process.alive:
            self.agent_ended(1.0)


class World:
    """`out`: where the trace goes while it happens."""

    #: How time, chance and trace are made: tests/scenarios have chance that is always the same, and a trace for people.
    scheduler_of: Callable[[int | str], Scheduler] = Scheduler
    trace_of: Callable[[Scheduler, TextIO | None], Trace] = Trace

    def __init__(self, seed: int | str, *, out: TextIO | None = None) -> None:
        self.scheduler = type(self).scheduler_of(seed)
        self.trace = type(self).trace_of(self.scheduler, out)
        self.network = Network(self.scheduler)
        self.store = StoreWorld(self.scheduler, self.network, self.trace)
        self.truth = Truth()
        self.instances: dict[str, Instance] = {}
        self.hosts: dict[str, Host] = {}
        self.agents: dict[str, Any] = {}
        self.names: list[str] = []
        self.systems = 0                    # how many clusters were made by initdb
        self.hints = True                   # they have wal_log_hints
        self.patronis = 0                   # how many members are of another make
        self.violations: list[Violation] = []
        self.exposures: list[Violation] = []    # what is stated, not promised (safety 1)
        self.passes = 0
        self.coverage: dict[tuple[str, str], int] = {}
        self.make_agent: Callable[[Host, int], Any] = _nobody

    def add_host(self, name: str) -> Host:
        self.names.append(name)
        host = self.hosts[name] = Host(self, name)
        return host

    def is_patroni(self, name: str) -> bool:
        return self.hosts[name].patroni

    def violation(self, checker: str, text: str) -> None:
        self.trace("checker", "VIOLATION", checker=checker, text=text.split("\n", maxsplit=1)[0])
        self.violations.append(Violation(checker, self.scheduler.now_s, text))

    def exposure(self, checker: str, text: str) -> None:
        self.trace("checker", "exposure", checker=checker, text=text)
        self.exposures.append(Violation(checker, self.scheduler.now_s, text))

    # what agents tell: for coverage and the checkers

    def passed(self, agent: Any, seen: Any, decision: Any) -> None:
        self.passes += 1
        coverage = self.coverage
        for reason in decision.reasons:
            key = (reason.rule, "holds" if reason.holds else "refuses")
            coverage[key] = coverage.get(key, 0) + 1
        key = ("situation", decision.situation)
        coverage[key] = coverage.get(key, 0) + 1
        for action in decision.actions:
            key = ("action", type(action).__name__)
            coverage[key] = coverage.get(key, 0) + 1

    def licence_changed(self, agent: Any) -> None:
        licence = agent.renewer.licence
        agent.host.valid_until = licence.valid_until if str(licence.state) == "held" else None


def _nobody(host: Host, incarnation: int) -> Any:
    raise AssertionError("no level has said what an agent is")
