"""One forecast against what then really happens: a random world of tests/simulation, at a random instant, asked what if X;
then X is done to that very world, and time goes on.

`tell(seed)` → `Story`. Everything follows from the seed: the world, what it has gone through, the instant, the hypothesis.
The forecast sees what the agents' observations say, and nothing of the world; the world does not see the forecast.
"""

from __future__ import annotations

import time
from pathlib import Path
from random import Random
from typing import Any, TextIO

import msgspec
from msgspec import Struct

from pgha.clock import candidate_age_s
from pgha.foresee.forecast import Forecast, foresee
from pgha.foresee.hypothesis import Hypothesis
from pgha.foresee.world import Seen
from tests.simulation import faults, kernel, level_b
from tests.simulation.level_b import ShippedWorld
from tests.simulation.simulation import BORN_WITHIN_S, Options, Simulation
from tests.simulation.store import MEMBERS

#: Settings in which a cluster is asked, seconds after everything that was wrong has ended. 0: in the midst of coming back.
CALM_S = (0.0, 0.5, 2.0, 5.0, 15.0, 60.0)
#: An agent is asked, and passes anew.
ASKED_S = 0.05
#: How much sooner or later than foretold things may happen: probes, messages and promotions take their time.
SOONER_S, LATER_S = 0.3, 4.0


class Story(Struct, kw_only=True):
    """What was asked, foretold, and happened. `leaders`: who accepted writes from when on (seconds since; "" nobody)."""

    seed: int
    nodes: int
    ttl_s: float
    hypotheses: tuple[Hypothesis, ...]
    forecast: Forecast
    leaders: list[tuple[float, str]]
    sync: tuple[str, ...] = ()
    sync_leader: str = ""
    disturbed: bool = False
    level: str = "a"
    violations: list[Any] = []
    mistakes: list[str] = []

    @property
    def winner(self) -> str:
        """Who leads in the end; "" nobody."""
        return self.leaders[-1][1]

    @property
    def interrupted_s(self) -> float | None:
        """When writes stopped; None: they did not, or were not possible before either."""
        if not self.forecast.writes_now:
            return None
        return next((at_s for at_s, name in self.leaders if name != self.forecast.leader), None)

    @property
    def back_s(self) -> float | None:
        return next((at_s for at_s, name in self.leaders if name and at_s > 0), None)


class Asked:
    """Of a simulation: it can be asked, and has no program after that."""

    # What Simulation has.
    hosts: dict[str, Any]
    instances: dict[str, Any]
    names: list[str]
    scheduler: Any
    store: Any
    ttl: int
    ends_s: float
    store_config: Any
    heal: Any
    leader: Any
    _begin: Any

    def prepare(self, seed: int) -> None:
        random = self.random = Random(f"{seed}/foretold")
        self.disturbed = random.random() < 0.6
        if self.disturbed:
            for step in faults.draw(seed, self.names, ttl_s=float(self.ttl), from_s=BORN_WITHIN_S, for_s=random.choice((60.0, 200.0)), faults=random.choice((2, 4, 8))):
                self.scheduler.at(round(step.at_s * 1e9), self._begin, step)
                self.ends_s = max(self.ends_s, step.at_s + step.for_s)

    def until(self, seconds: float) -> None:
        self.scheduler.run_due(round(seconds * 1e9))

    def step(self, end_s: float) -> None:
        """One moment further."""
        due = self.scheduler.next_due()
        self.scheduler.run_due(due if due is not None else round(end_s * 1e9))

    def for_s(self, seconds: float) -> None:
        self.until(self.scheduler.now_s + seconds)

    def live(self) -> None:
        """Up to the instant at which it is asked."""
        self.until(self.ends_s)
        if self.disturbed:
            self.heal()
        self.for_s(self.random.choice(CALM_S) + self.random.random())
        for _ in range(100):
            if all(host.gone or getattr(host, "patroni", False) or self.tells(host) is not None for host in self.hosts.values()):
                break
            self.for_s(0.1)

    def tells(self, host: Any) -> Any:
        """The host's agent, if it runs and has decided something."""
        return host.agent if host.agent is not None and host.agent.process.alive and host.agent.seen is not None else None

    def ask(self, agent: Any) -> None:
        agent.postgres.position_asked()
        agent.wake()

    def told(self, agent: Any) -> tuple[Any, Any]:
        """Its last pass, and what it remembers."""
        return agent.seen, agent.memory

    def observe(self) -> dict[str, Seen]:
        """GET /pgha/observation?fresh of everybody: each looks at its PostgreSQL and passes anew."""
        for host in self.hosts.values():
            if (agent := self.tells(host)) is not None:
                self.ask(agent)
        self.for_s(ASKED_S)
        seen = {}
        for name, host in self.hosts.items():
            if (agent := self.tells(host)) is not None:
                observation, memory = self.told(agent)
                seen[name] = Seen(observation=observation, memory=memory, age_s=candidate_age_s(observation.now, host.clock.now()))
        return seen

    def draw(self) -> tuple[Hypothesis, ...]:
        """What is asked."""
        random, leader = self.random, self.leader()
        names = sorted(n for n in self.names)
        others = [n for n in names if n != leader]
        led = Hypothesis(what="down", node=leader or random.choice(names))
        kind = random.choice(("leader", "leader", "leader", "leader", "replica", "store", "store", "two", "lag"))
        if kind == "store":
            return (Hypothesis(what="down"),)
        if kind == "replica" and others:
            return (Hypothesis(what="down", node=random.choice(others)),)
        if kind == "two" and others:
            return (led, Hypothesis(what="down", node=random.choice(others)))
        if kind == "lag" and others and leader is not None:
            return (led, Hypothesis(what="lag", node=random.choice(others), lag_bytes=random.choice((20_000, 300_000, 20 << 20))))
        return (led,)

    def lag(self, hypotheses: tuple[Hypothesis, ...]) -> None:
        """From now on they receive nothing, and so much is written, and published."""
        lags = {h.node: h.lag_bytes for h in hypotheses if h.what == "lag"}
        leader = self.leader()
        if not lags or leader is None:
            return
        for name in lags:
            stream = self.instances[name].server.stream if self.instances[name].server is not None else None
            if stream is not None:
                stream.under_way = True
        end = self.instances[leader].dir.lsn
        more = max(lag - (end - self.instances[name].dir.lsn) for name, lag in lags.items())
        if more > 0:
            self.instances[leader].commit(more, lambda _outcome: None)

    def happen(self, hypothesis: Hypothesis) -> None:
        if hypothesis.what == "down" and not hypothesis.node:
            for member in MEMBERS:
                self.store.set_down(member, True)
        elif hypothesis.what == "down":
            host = self.hosts[hypothesis.node]
            host.wanted = False
            host.power_off()


class World(Asked, Simulation):
    """Level a."""

    def __init__(self, seed: int, *, patronis: int = 0, out: TextIO | None = None) -> None:
        super().__init__(Options(seed=seed, program=(), draws=2, patronis=patronis), out=out)
        self.prepare(seed)


class Shipped(Asked, ShippedWorld):
    """Level b: what the shipped agents publish is asked for the way REST asks, and told as REST tells it."""

    def __init__(self, seed: int, root: Path, *, out: TextIO | None = None) -> None:
        super().__init__(Options(seed=seed, program=(), draws=2, level="b"), root, out=out)
        self.prepare(seed)

    def until(self, seconds: float) -> None:
        self.run.until(seconds, lambda: self.violations)

    def step(self, end_s: float) -> None:
        self.until(min(end_s, self.scheduler.now_s + 0.05))

    def tells(self, host: Any) -> Any:
        agent = host.agent._agent if host.agent is not None and host.agent.process.alive else None
        return agent if agent is not None and agent.board.current().observation is not None else None

    def ask(self, agent: Any) -> None:
        agent.inbox.wake("observation asked", -1)

    def told(self, agent: Any) -> tuple[Any, Any]:
        """As it travels."""
        published = agent.board.current()
        told = msgspec.json.decode(msgspec.json.encode(Seen(observation=published.observation, memory=published.memory)), type=Seen)
        return told.observation, told.memory


def tell(seed: int, *, level: str = "a", patronis: int = 0, out: TextIO | None = None) -> Story:
    """The whole story of a seed."""
    if level == "b":
        with level_b.root_of_a_run() as root:
            shipped = Shipped(seed, root, out=out)
            with level_b.logging_to(shipped):
                try:
                    return _tell(shipped, seed)
                finally:
                    shipped.close()
    world = World(seed, patronis=patronis, out=out)
    try:
        return _tell(world, seed)
    finally:
        kernel.throw_away([agent.process for host in world.hosts.values() for agent in host.all_agents])


def _tell(world: Any, seed: int) -> Story:
    world.live()
    hypotheses = world.draw()
    lags = any(h.what == "lag" for h in hypotheses)
    if lags:
        world.lag(hypotheses)
        world.for_s(2.5 * max(float(world.store_config().get("loop_wait", 10)), 1.0))       # the position is published
    seen = world.observe()
    forecast = foresee(seen, [h for h in hypotheses if h.what == "down"] if lags else hypotheses)
    began_s = world.scheduler.now_s
    for hypothesis in hypotheses:
        world.happen(hypothesis)
    leaders = [(0.0, world.leader() or "")]
    end_s = began_s + 2.1 * max(world.longest_ttl_s, 30.0) + 40.0
    while world.scheduler.now_s < end_s and not world.violations:
        world.step(end_s)
        now = world.leader() or ""
        if now != leaders[-1][1]:
            leaders.append((world.scheduler.now_s - began_s, now))
    sync = world.view().sync
    story = Story(seed=seed, nodes=world.count, ttl_s=float(world.store_config().get("ttl", 30)), hypotheses=hypotheses, forecast=forecast, leaders=leaders,
                  sync=sync.members, sync_leader=sync.leader, disturbed=world.disturbed, level=world.options.level, violations=list(world.violations))
    story.mistakes = mistakes(story)
    return story


def mistakes(story: Story) -> list[str]:
    """Wherein the forecast was wrong."""
    said, forecast = [], story.forecast
    if story.winner and story.winner not in forecast.winners:
        said.append(f"{story.winner} leads, foretold were {', '.join(forecast.winners) or 'nobody'}")
    if not story.winner and not forecast.nobody_possible:
        said.append(f"nobody leads, foretold were {', '.join(forecast.winners)}")
    lost_s = story.interrupted_s
    if lost_s is not None and not forecast.writes_stop:
        said.append(f"writes stop after {lost_s:.2f} s, foretold was that they go on")
    if lost_s is None and forecast.writes_stop and forecast.writes_now:
        said.append("writes go on, foretold was that they stop")
    bounds = forecast.demotes.get(forecast.leader)
    if bounds is not None and lost_s is not None and not bounds[0] - SOONER_S <= lost_s <= bounds[1] + LATER_S:
        said.append(f"{forecast.leader} stopped accepting writes after {lost_s:.2f} s, foretold was {bounds[0]} to {bounds[1]} s")
    back = forecast.writes_back_s
    if back is not None and story.back_s is not None and not back[0] - SOONER_S <= story.back_s <= back[1] + LATER_S:
        said.append(f"writes are back after {story.back_s:.2f} s, foretold was {back[0]} to {back[1]} s")
    return said


class Tally:
    """How good forecasts were, over many stories."""

    def __init__(self) -> None:
        self.stories = self.certain = self.likely = self.interrupted = 0
        self.wrong: list[Story] = []

    def add(self, story: Story) -> None:
        self.stories += 1
        self.certain += story.forecast.certain
        self.interrupted += story.forecast.writes_stop
        self.likely += story.forecast.likely == story.winner
        if story.mistakes or story.violations:
            self.wrong.append(story)

    def report(self) -> str:
        number = max(1, self.stories)
        return (f"{self.stories} forecasts, of which {self.interrupted} of an interruption: {self.stories - len(self.wrong)} came true; in {self.certain} ({100 * self.certain / number:.0f} %) "
                f"the foretold outcome was a single one, in {self.likely} ({100 * self.likely / number:.0f} %) the likeliest was the real one")


def failure(story: Story) -> str:
    what = "; ".join([*story.mistakes, *(f"{v.checker}: {v.text.splitlines()[0]}" for v in story.violations)])
    forecast = story.forecast
    return (f"seed {story.seed}: {story.nodes} nodes, ttl {story.ttl_s:g}, if {' and '.join(map(str, story.hypotheses))}: {what}\n"
            f"  foretold: {forecast.leader or 'nobody'} leads, then {', '.join(forecast.winners) or 'nobody'}, likeliest {forecast.likely or 'nobody'}; "
            f"writes back {forecast.writes_back_s}, demotions {forecast.demotes} {forecast.failsafe}\n"
            f"  happened: {', '.join(f'{at_s:.2f} s {name or chr(45)}' for at_s, name in story.leaders)}\n"
            f"  replay: build/simulate --explain --seed {story.seed}{' --level b' if story.level == 'b' else ''} --trace")


def main(seeds: Any, *, seconds: float | None, level: str = "a", trace: TextIO | None = None) -> int:
    """For build/simulate --explain. Exit code 1 if a forecast was wrong."""
    tally, began_s = Tally(), time.monotonic()
    for seed in seeds:
        if seconds is not None and time.monotonic() - began_s >= seconds:
            break
        story = tell(seed, level=level, out=trace)
        tally.add(story)
        if story.mistakes or story.violations:
            print(failure(story), flush=True)
    print(tally.report())
    return int(bool(tally.wrong))
