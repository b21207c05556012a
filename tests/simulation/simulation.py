"""One run: a cluster is born, lives through a program of faults, is healed, and has to come back. Both levels.

`run(options)` → `Outcome`. Level (a) makes its agents here; level (b) hands in its own `make_agent` and its own `drive`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from random import Random
from typing import Any, TextIO

from msgspec import Struct

from pgha.dcs import Snapshot
from pgha.dcs.keys import LOCK, Keys, parse, parse_lock
from pgha.model.lock import LockRecord
from tests.simulation import checkers, faults, kernel
from tests.simulation.checkers import Violation
from tests.simulation.faults import KINDS, Step
from tests.simulation.reader import SLOT, Reader
from tests.simulation.scheduler import SECOND
from tests.simulation.world import World
from tests.simulation.writers import Writers

KEYS = Keys("service", "sim")
#: The cluster is to be whole this long after its birth; faults begin then.
BORN_WITHIN_S = 120.0
#: After the last fault has ended: time for records to expire, absence to be believed, clones to be made.
CALM_S = 60.0
#: How much is drawn for a world. Kept programs say under which number they were found; those of before say nothing.
DRAWS = 5


#: What no cluster with Patroni members has here.
WITHOUT_PATRONI = ("synchronous_mode", "synchronous_mode_strict", "synchronous_node_count", "maximum_lag_on_syncnode", "failsafe_mode")


class Options(Struct, frozen=True, kw_only=True):
    """What a run is made of. Everything else follows from it. `program` None: drawn from the seed."""

    seed: int
    level: str = "a"
    nodes: int = 0              # 0: drawn, 2 to 7
    ttl: int = 0                # 0: drawn, of 3, 5, 20, 30
    faults: int = 20
    for_s: float = 1500.0
    program: tuple[Step, ...] | None = None
    draws: int = 1              # 2: also settings and tags that few clusters have; 3: also reinitialize, and what is scheduled; 4: Patroni members; 5: a permanent slot and its reader
    patronis: int = 0           # so many of the nodes are Patroni's (level (a))


class Outcome(Struct, kw_only=True):
    options: Options
    violations: list[Violation] = []
    exposures: list[Violation] = []
    virtual_s: float = 0.0
    passes: int = 0
    faults: int = 0
    role_changes: int = 0
    events: int = 0
    acknowledged: int = 0
    losses: int = 0
    settled_s: float = 0.0
    digest: str = ""
    last_lines: list[str] = []
    coverage: dict[tuple[str, str], int] = {}
    program: tuple[Step, ...] = ()


class Simulation(World):
    """A world with writers, checkers and a program."""

    def __init__(self, options: Options, *, out: TextIO | None = None, make_agent: Callable[..., Any] | None = None) -> None:
        super().__init__(options.seed, out=out)
        self.options = options
        random = Random(f"{options.seed}/options")
        self.count = options.nodes or random.choice((2, 3, 3, 3, 3, 4, 5, 5, 6, 7))
        self.ttl = options.ttl or random.choice((3, 5, 5, 20, 30, 30))
        loop_wait, retry = {3: (1, 1), 5: (1, 2), 20: (5, 5), 30: (10, 10)}.get(self.ttl, (max(1, self.ttl // 3), max(1, self.ttl // 3)))
        self.config: dict[str, Any] = {
            "ttl": self.ttl, "loop_wait": loop_wait, "retry_timeout": retry, "maximum_lag_on_failover": random.choice((1048576, 1048576, 100000)),
            "check_timeline": random.random() < 0.3,
            "postgresql": {"use_pg_rewind": random.random() < 0.8, "remove_data_directory_on_diverged_timelines": True,
                           "remove_data_directory_on_rewind_failure": True}}
        if random.random() < 0.5:
            self.config |= {"synchronous_mode": random.choice((True, True, "quorum")), "synchronous_mode_strict": random.random() < 0.3,
                            "synchronous_node_count": random.choice((1, 1, 2))}
        if random.random() < 0.4:
            self.config["failsafe_mode"] = True
        self.patronis = min(options.patronis or _draw_patronis(options), self.count - 1)
        if self.patronis:
            # Neither synchronous modes nor failsafe mode: the model of a Patroni member has none. What it raises ttl to counts.
            self.ttl = max(20, self.ttl)
            self.config = {k: v for k, v in self.config.items() if k not in WITHOUT_PATRONI} | {"ttl": self.ttl, "loop_wait": 5, "retry_timeout": 5}
        if options.draws >= 5 and not self.patronis and Random(f"{options.seed}/slots").random() < 0.5:
            self.config["slots"] = {SLOT: {"type": "physical"}}
        self.longest_ttl_s = float(self.ttl)
        make = make_agent or _level_a
        self.make_agent = lambda host, incarnation: make(host, incarnation=incarnation)
        devices = random.random() < 0.3
        for number in range(self.count):
            name = f"n{number + 1}"
            host = self.add_host(name)
            host.first_config = self.config
            host.patroni = number >= self.count - self.patronis
            host.device.present = devices
            tags: dict[str, Any] = {}
            if random.random() < 0.08 and number:
                tags["nofailover"] = True
            elif random.random() < 0.1:
                tags["failover_priority"] = random.choice((1, 2, 5))
            if random.random() < 0.05:
                tags["clonefrom"] = True
            host.tags = tags
        if options.draws >= 2:
            self._draw_more(Random(f"{options.seed}/more"))
        self.writers = Writers(self)
        self.reader = Reader(self) if "slots" in self.config else None
        self.checkers = {c.__name__: c(self) for c in checkers.ALL}
        self.truth.checkers = list(self.checkers.values())
        self.edges = 0
        self.faults_done = 0
        self._publications: list[tuple[str, int, float]] = []   # (node_id, lsn, when), the last of each holder in a row
        self._lock_revision = 0
        self._store_config: tuple[Any, dict[str, Any]] | None = None
        self._tampered_ns: int | None = None
        self._replaced = self._was_paused = False
        self._manual_ns: int | None = None
        self._edge_ns = 0                       # when a fault last began or ended
        self._leader_tampered_ns: int | None = None     # when the key `leader`, or a lease, was last taken from under its holder
        self._on_again_ns: int | None = None    # when the synchronous mode was last switched on
        after_change = self.store._after_change

        def noticed() -> None:
            after_change()
            self._notice_publication()
        self.store._after_change = noticed      # type: ignore[method-assign]
        if options.program is not None:
            program = options.program
        else:
            early = faults.draw_early(options.seed, self.names) if options.draws >= 2 else []
            program = (*early, *faults.draw(options.seed, self.names, ttl_s=float(self.ttl), from_s=BORN_WITHIN_S, for_s=options.for_s, faults=options.faults - len(early), draws=options.draws))
        self.program = program
        self.ends_s = max([BORN_WITHIN_S, *(s.at_s + s.for_s for s in program)])
        for step in program:
            self.scheduler.at(round(step.at_s * 1e9), self._begin, step)
        for host in self.hosts.values():
            self.scheduler.after(0.1 + random.random(), host.start_agent)

    def _draw_more(self, random: Random) -> None:
        """What few clusters have."""
        postgresql = self.config["postgresql"]
        if random.random() < 0.15:
            postgresql["remove_data_directory_on_diverged_timelines"] = False
            postgresql["use_pg_rewind"] = random.random() < 0.5
        if random.random() < 0.15:
            postgresql["remove_data_directory_on_rewind_failure"] = False
        self.hints = random.random() < 0.85
        if random.random() < 0.2:
            self.config["maximum_lag_on_syncnode"] = random.choice((0, 100000, 1048576))
        if random.random() < 0.2:
            self.config["primary_stop_timeout"] = random.choice((1, 10))
        required = random.random() < 0.3
        sections = random.random() < 0.85
        for number, host in enumerate(self.hosts.values()):
            if required and host.device.present:
                host.watchdog_mode = "required"
            host.bootstraps = sections or number == 0
            if random.random() < 0.06:
                host.tags["nosync"] = True
            if random.random() < 0.06 and number:
                host.tags["replicatefrom"] = f"n{1 + int(random.random() * self.count)}"

    def equip(self, host: Any) -> None:
        """Its local configuration is written, or written anew. (Level (a) reads it when an agent starts.)"""
        host.local = None

    def join(self, name: str) -> None:
        """A node that was not there before, under a new name."""
        host = self.add_host(name)
        host.first_config = {k: v for k, v in self.config.items() if k != "pause"}      # of a moment, not of a file
        host.device.present = next(iter(self.hosts.values())).device.present
        self.count += 1
        self.equip(host)
        host.start_agent()

    def leave(self, host: Any) -> None:
        """It is gone for good: nobody waits for it any more."""
        host.power_off()
        host.gone = True
        self.names.remove(host.name)
        self.count -= 1

    # --- the program -------------------------------------------------------------------------------------------------------

    def _begin(self, step: Step) -> None:
        kind = KINDS[step.fault]
        with_ = dict(step.with_)
        if "node" in with_:
            with_["at"] = (self.leader() or self.names[0]) if with_["node"] == "leader" else with_["node"]
            if with_["at"] not in self.names:
                return
        self.trace("fault", step.fault, **{k: v for k, v in with_.items() if isinstance(v, str | int | float)}, for_s=step.for_s)
        self.edges += 1
        self._edge_ns = self.scheduler.now_ns
        if step.fault in ("lease lost", "key deleted", "key written", "store restored"):
            self._leader_tampered_ns = self.scheduler.now_ns
        self.faults_done += 1
        self.writers.hurry()
        kind.begin(self, with_)
        if kind.end is not None:
            self.scheduler.after(step.for_s, self._end, kind, step, with_)

    def _end(self, kind: faults.Kind, step: Step, with_: dict[str, Any]) -> None:
        self.trace("fault", f"end of {step.fault}", **{k: v for k, v in with_.items() if k == "at"})
        self.edges += 1
        self._edge_ns = self.scheduler.now_ns
        self.writers.hurry()
        assert kind.end is not None
        kind.end(self, with_)

    def heal(self) -> None:
        """Whatever is still wrong ends."""
        self.trace("fault", "everything is healed")
        self.edges += 1
        self.network.heal()
        self.store.heal()
        self.change_config({"pause": False})        # also in a store that was restored to a time of pause
        if self._was_paused and KEYS.path("config") not in self.store.world._entries:
            self.store.put(KEYS.path("config"), json.dumps(self.config).encode())      # lost in pause: who resumes writes it anew
        if self.options.draws >= 2:
            # People look, and let what diverged be replaced.
            self.change_config({"postgresql": {**self.config["postgresql"], "remove_data_directory_on_diverged_timelines": True,
                                               "remove_data_directory_on_rewind_failure": True}})
        for host in self.hosts.values():
            if host.gone:
                continue
            instance = host.instance
            instance.slow_start_s = instance.slow_stop_s = instance.work_s = 0.0
            host.device.broken = False
            instance.disk_full = instance.disk_hung = instance.fail_programs = instance.no_room = False
            if instance.server is not None:
                instance.server.hung = False
            host.wanted = True
            host.resume()
            instance.thaw()
            for process in (host.guard, host.agent):
                if process is not None:
                    process.process.thaw()
            host.power_on()
            host.start_agent()
        self.writers.hurry()

    def resume(self) -> None:
        """The store may have been rebuilt empty in a time of pause, and a leader that was cut off then brings its cached
        configuration with it later: whoever resumes says it again, and what else people decided when all was healed."""
        config = self.store_config()
        kept = self.options.draws >= 2 and any((config.get("postgresql") or {}).get(k) != self.config["postgresql"].get(k) for k in (
            "remove_data_directory_on_diverged_timelines", "remove_data_directory_on_rewind_failure"))
        if config.get("pause") or kept:
            self.trace("fault", "resumed once more")
            self.edges += 1
            self.change_config({"pause": False})

    # --- what faults and checkers ask ----------------------------------------------------------------------------------------

    def path(self, key: str) -> str:
        return KEYS.path(key)

    def leader(self) -> str | None:
        accepting = self.checkers["OnePrimary"].accepting_now
        return next(iter(accepting), None)

    def view(self) -> Any:
        return parse(Snapshot(revision=self.store.world.revision, entries=dict(sorted(self.store.world._entries.items())), generation=self.store.world.generation()), KEYS)

    def lock_record(self) -> LockRecord | None:
        entry = self.store.world._entries.get(KEYS.path(LOCK))
        return parse_lock(entry.value) if entry else None

    def _notice_publication(self) -> None:
        entry = self.store.world._entries.get(KEYS.path(LOCK))
        if entry is None or entry.revision == self._lock_revision:
            return
        self._lock_revision = entry.revision
        record = parse_lock(entry.value)
        if self._publications and self._publications[-1][0] == record.node_id:
            self._publications.pop()
        self._publications.append((record.node_id, record.lsn, self.scheduler.now_s))
        self.longest_ttl_s = max(self.longest_ttl_s, record.ttl_s)

    def published_before(self, instance: Any) -> tuple[int, float]:
        """The last position that another holder published, and when; of its own if there was no other."""
        mine = self.hosts[instance.name].node_id
        for node_id, lsn, at_s in reversed(self._publications):
            if node_id != mine:
                return lsn, at_s
        return 0, 0.0

    def publication_is_old_by_s(self) -> float:
        """A record's position is that of the last pass, which is a probe's."""
        return self.longest_ttl_s + 5.0

    def may_go_on_without_store(self) -> bool:
        """In failsafe mode, and in pause, a leader writes on while nothing can be published."""
        return bool(self.config.get("failsafe_mode")) or self.store_config().get("failsafe_mode") is True or self._was_paused

    def maximum_lag(self) -> int:
        return int(self.config["maximum_lag_on_failover"])

    def loss_is_permitted(self) -> bool:
        manual = self._manual_ns is not None and self.scheduler.now_ns - self._manual_ns < 90 * SECOND
        return manual or self.store_was_tampered(150.0) or self._replaced

    def promise_is_void(self) -> bool:
        """An operator has forced a failover, or the store has lost who the synchronous standbys were, or the mode was switched
        off: that lets anybody lead (pgha.decide.eligible), also before a leader has emptied `/sync`."""
        manual = self._manual_ns is not None and self.scheduler.now_ns - self._manual_ns < 90 * SECOND
        off = not self.store_config().get("synchronous_mode") or (self._on_again_ns is not None and self.scheduler.now_ns - self._on_again_ns < 5 * SECOND)
        return manual or off or self._replaced

    def store_tampered(self) -> None:
        self._tampered_ns = self.scheduler.now_ns

    def store_replaced(self) -> None:
        self.store_tampered()
        self._replaced = True

    def store_was_tampered(self, within_s: float) -> bool:
        return self._tampered_ns is not None and self.scheduler.now_ns - self._tampered_ns < within_s * SECOND

    # members of another make

    def leader_was_tampered(self) -> bool:
        """Not by anybody whose key it is: nobody can know before it is seen to be gone (safety model 14)."""
        return self._leader_tampered_ns is not None and self.scheduler.now_ns - self._leader_tampered_ns < (self.longest_ttl_s * 1.1 + 5) * SECOND

    def could_be_asked(self, asking: str, name: str) -> bool:
        """Would this Patroni member's agent or PostgreSQL have told that it accepts writes, just now and a moment ago?"""
        if self._was_paused or self.scheduler.now_ns - self._edge_ns < 5 * SECOND:
            return False
        agent = self.hosts[name].agent
        tells = self.instances[name].answers() or (agent is not None and agent.process.alive and not agent.process.frozen)
        return tells and self.network.both_ways(asking, name)

    def store_was_replaced(self) -> bool:
        return self._replaced

    def promises(self, instance: Any) -> bool:
        """Is an acknowledgement of this primary a promise that every later primary has the commit?"""
        if not self.store_config().get("synchronous_mode"):
            return False
        entry = self.store.world._entries.get(KEYS.path("sync"))
        try:
            value = json.loads(entry.value) if entry else None
        except ValueError:
            value = None
        return isinstance(value, dict) and value.get("leader") == instance.name

    def store_config(self) -> dict[str, Any]:
        entry = self.store.world._entries.get(KEYS.path("config"))
        if entry is None:
            return self.config
        if self._store_config is None or self._store_config[0] is not entry:
            try:
                value = json.loads(entry.value)
            except ValueError:
                value = self.config
            self._store_config = (entry, value)
        found: dict[str, Any] = self._store_config[1]
        return found

    # operators

    def operator_asks_failover(self, value: bytes, *, manual: bool) -> None:
        if manual:
            self._manual_ns = self.scheduler.now_ns
        self.store.put(KEYS.path("failover"), value)

    def change_config(self, change: dict[str, Any]) -> None:
        if self.patronis:
            change = {k: v for k, v in change.items() if k not in WITHOUT_PATRONI}
        if change.get("synchronous_mode") and not self.config.get("synchronous_mode"):
            self._on_again_ns = self.scheduler.now_ns
        self.config = {**self.config, **change}
        self._was_paused = self._was_paused or bool(change.get("pause"))
        self.longest_ttl_s = max(self.longest_ttl_s, float(self.config["ttl"]))
        if not change:
            return
        if KEYS.path("config") in self.store.world._entries and not all(self.store.down.values()):
            self.store.put(KEYS.path("config"), json.dumps(self.config).encode())

    # --- at the end ------------------------------------------------------------------------------------------------------------

    def why_not_settled(self) -> str:
        accepting = list(self.checkers["OnePrimary"].accepting_now)
        if len(accepting) != 1:
            return f"primaries: {', '.join(accepting) or 'none'}"
        primary = self.instances[accepting[0]]
        missing = []
        for name, instance in self.instances.items():
            if name == primary.name or self.hosts[name].gone:
                continue
            server = instance.server
            if server is None or server.stream is None or not self._leads_to(instance, primary):
                agent = self.agents.get(name)
                said = agent.decision.summary if agent is not None and agent.process.alive and agent.decision is not None else "has no agent"
                missing.append(f"{name} does not stream ({said})")
        return "; ".join(missing)

    def _leads_to(self, instance: Any, primary: Any) -> bool:
        for _ in range(len(self.hosts)):
            server = instance.server
            if instance is primary:
                return True
            if server is None or server.stream is None:
                return False
            instance = server.stream.upstream
        return False

    def settle_within_s(self) -> float:
        """An absent record is believed after 30 s or the longest ttl, a changed store as long; then clones, one after the other."""
        return 60.0 + 4.0 * max(30.0, self.longest_ttl_s)

    def outcome(self) -> Outcome:
        flapping: Any = self.checkers["NoFlapping"]
        loss: Any = self.checkers["LossIsBounded"]
        return Outcome(
            options=self.options, violations=self.violations, exposures=self.exposures, virtual_s=self.scheduler.now_s, passes=self.passes,
            faults=self.faults_done, role_changes=flapping.changes, events=self.scheduler.events, acknowledged=self.writers.acknowledged, losses=loss.losses,
            digest=self.trace.digest(), last_lines=list(self.trace.last), coverage=self.coverage, program=self.program)

    def judge_settled(self) -> None:
        """Whole again: what the books say, and what calm costs."""
        primary = self.instances[next(iter(self.checkers["OnePrimary"].accepting_now))]
        self.checkers["TimelinesAreTold"].settled(primary)


def _draw_patronis(options: Options) -> int:
    """One cluster in seven has members of another make."""
    random = Random(f"{options.seed}/patronis")
    return random.choice((1, 1, 2)) if options.draws >= 4 and options.level == "a" and random.random() < 0.15 else 0


def _level_a(host: Any, *, incarnation: int) -> Any:
    from tests.simulation.node import AgentProcess, local_config
    from tests.simulation.patroni import PatroniProcess

    if host.patroni:
        return PatroniProcess(host, incarnation=incarnation)

    if host.local is None:
        host.local = local_config(host.name, host.tags, watchdog=host.watchdog_mode, bootstraps=host.bootstraps)
    return AgentProcess(host, incarnation=incarnation)


def run(options: Options, *, out: TextIO | None = None) -> Outcome:
    """Level (a): the scheduler runs by itself. Ends at the first violation."""
    sim = Simulation(options, out=out)
    scheduler = sim.scheduler

    def until(seconds: float) -> bool:
        """Whether all is well so far."""
        if not sim.violations:
            scheduler.run_due(round(seconds * 1e9), sim.violations)
        return not sim.violations

    try:
        return drive(sim, until)
    finally:
        kernel.throw_away(_processes(sim))


def drive(sim: Simulation, until: Callable[[float], bool]) -> Outcome:
    """The story, with `until(seconds)` to let time pass."""
    settled_s = 0.0
    if until(sim.ends_s):
        sim.heal()
        healed_s = sim.scheduler.now_s
        limit_s = healed_s + sim.settle_within_s()
        good = 0
        while sim.scheduler.now_s < limit_s and good < 5:
            if not until(sim.scheduler.now_s + 1.0):
                break
            sim.resume()
            good = good + 1 if not sim.why_not_settled() else 0
        settled_s = sim.scheduler.now_s - healed_s
        if not sim.violations:
            sim.checkers["ComesBack"].judge(sim.why_not_settled(), sim.settle_within_s())
        if not sim.violations and until(sim.scheduler.now_s + 2 * sim.longest_ttl_s + 10):
            before = sim.store.requests
            if until(sim.scheduler.now_s + CALM_S):
                sim.checkers["ComesBack"].judge(sim.why_not_settled(), sim.settle_within_s() + CALM_S)
                if not sim.violations:
                    sim.checkers["TrafficIsBounded"].judge(sim.store.requests - before, CALM_S, sim.count, float(sim.config["ttl"]), float(sim.config["loop_wait"]))
                    sim.judge_settled()
        sim.checkers["NoFlapping"].judge(sim.edges)
    outcome = sim.outcome()
    outcome.settled_s = settled_s
    return outcome


def _processes(sim: Simulation) -> list[Any]:
    found = []
    for host in sim.hosts.values():
        found += [a.process for a in host.all_agents]
    return found
