"""Where a story is played: the simulated world of tests/simulation, with nothing in it left to chance.

Every delay that the simulation would draw is its mean, every clock is right, and n1 leads at the beginning: what a
transcript shows follows from the story alone. The cluster is born before the curtain rises, so that 0 s is a healthy
cluster; a client commits every 0.1 s wherever commits are accepted.

All promises of tests/simulation/checkers.py are checked here, too: a story that breaks one fails, whatever its transcript says.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from random import Random
from typing import Any

from tests.scenarios.transcript import Transcript
from tests.simulation import kernel
from tests.simulation.faults import soon
from tests.simulation.postgres import DataDir
from tests.simulation.scheduler import Scheduler
from tests.simulation.simulation import Options, Simulation
from tests.simulation.store import MEMBERS
from tests.simulation.trace import Trace

#: When the curtain rises: born, copied, and calm.
BORN_S = 60.0
COMMIT_EVERY_S = 0.1


class Steady(Random):
    """Chance that always draws the middle of what is possible, and the first of a list."""

    def random(self) -> float:
        return 0.5

    def choice(self, seq: Any) -> Any:
        return seq[0]


class SteadyScheduler(Scheduler):
    def stream(self, name: str) -> Random:
        found = self._streams.get(name)
        if found is None:
            found = self._streams[name] = Steady(name)
        return found


class StageTrace(Trace):
    """Tells the transcript, too."""

    transcript: Transcript | None = None

    def __call__(self, where: str, what: str, **facts: Any) -> None:
        super().__call__(where, what, **facts)
        if self.transcript is not None:
            self.transcript.traced(where, what, facts)


class Stage(Simulation):
    """`config`: what differs from the defaults (ttl 30, loop_wait 10); `tags`: of nodes, by name."""

    scheduler_of = SteadyScheduler
    trace_of = StageTrace

    def __init__(self, *, nodes: int = 3, config: dict[str, Any] | None = None, tags: dict[str, dict[str, Any]] | None = None) -> None:
        super().__init__(Options(seed=1, nodes=nodes, ttl=30, program=()))
        self.writers._next.cancel()
        self.config.clear()     # the very object that every host has for a new cluster
        self.config.update({"ttl": 30, "loop_wait": 10, "retry_timeout": 10, "maximum_lag_on_failover": 1048576, "postgresql": {"use_pg_rewind": True}})
        self._merge(config or {})
        self.longest_ttl_s = float(self.config["ttl"])
        for name, host in self.hosts.items():
            host.tags = (tags or {}).get(name, {})      # type: ignore[attr-defined]
            host.device.present = False
            host.watchdog_mode = "off"
            host.wanted = False
        self.clients = Clients(self)
        for number, name in enumerate(self.names):
            self.scheduler.after(2.0 + number, self._join, name)
        self._run_until_ns(BORN_S)
        assert not self.violations, self.violations
        assert not self.why_not_settled(), self.why_not_settled()
        self.transcript = Transcript(self, BORN_S)
        assert isinstance(self.trace, StageTrace)
        self.trace.transcript = self.transcript
        self.truth.checkers.append(self.transcript)
        self.transcript.scene()

    def _join(self, name: str) -> None:
        self.hosts[name].wanted = True
        self.hosts[name].start_agent()

    def _merge(self, change: dict[str, Any]) -> None:
        for key, value in change.items():
            if isinstance(value, dict):
                self.config[key] = {**self.config.get(key, {}), **value}
            else:
                self.config[key] = value

    def _run_until_ns(self, seconds: float) -> None:
        end_ns = round(seconds * 1e9)
        while not self.violations:
            due = self.scheduler.next_due()
            if due is None or due > end_ns:
                break
            self.scheduler.run_due(due)
        self.scheduler.run_due(end_ns) if not self.violations else None

    # --- what a story is told with ---------------------------------------------------------------------------------------

    def until(self, seconds: float) -> None:
        """Let time pass, up to this moment of the story."""
        self._run_until_ns(BORN_S + seconds)

    def happens(self, what: str, event: Callable[..., Any] | None = None, *arguments: Any) -> None:
        """Something happens now."""
        self.transcript.happens(what)
        if event is not None:
            event(*arguments)

    def passed(self, agent: Any, seen: Any, decision: Any) -> None:
        super().passed(agent, seen, decision)
        if self.scheduler.now_s > BORN_S:
            self.transcript.decided(agent.host.name, seen, decision)

    def end(self) -> str:
        """The transcript."""
        self.transcript.end()
        kernel.throw_away([a.process for host in self.hosts.values() for a in host.all_agents])
        return self.transcript.text()

    # events

    def asks(self, leader: str, candidate: str) -> None:
        """`ctl switchover`, or `ctl failover` without a leader."""
        value = {"leader": leader, "member": candidate} if leader else {"member": candidate}
        self.operator_asks_failover(json.dumps(value).encode(), manual=not leader)

    def schedules(self, leader: str, candidate: str, *, in_s: float = 0.0, at: str = "") -> None:
        """A switchover for later, as `ctl` and patronictl write it."""
        value = {"leader": leader, "member": candidate, "scheduled_at": at or soon(self, in_s)}
        self.operator_asks_failover(json.dumps(value).encode(), manual=False)

    def reinitializes(self, name: str) -> None:
        """`ctl reinit NAME`."""
        self.hosts[name].agent.request("reinitialize", force=False, from_leader=False)

    def stall(self, *names: str) -> None:
        """Nothing is streamed to these any more, though their connections stand."""
        for name in names:
            stream = self.instances[name].server.stream     # type: ignore[union-attr]
            assert stream is not None
            stream.under_way = True

    def go_on(self, *names: str) -> None:
        for name in names:
            stream = self.instances[name].server.stream     # type: ignore[union-attr]
            if stream is not None:
                stream.under_way = False
                stream.upstream._flow(stream)

    def delete(self, key: str) -> None:
        self.store_tampered()
        self.store.delete(self.path(key))

    def restore(self) -> None:
        self.store_replaced()
        self.store.restore(self.store.backups[-1], new_id=True)

    def all_hosts(self, method: str) -> None:
        for host in self.hosts.values():
            getattr(host, method)()

    def replaced_volume(self, name: str) -> None:
        data = self.instances[name].dir
        self.instances[name].dir = dataclasses.replace(data, system_identifier="7311111111111111111", written=data.written + 1)
        self.hosts[name].power_on()

    def move_away(self, name: str) -> None:
        instance = self.instances[name]
        instance.aside.append(instance.dir)
        instance.dir = DataDir()
        instance._changed("files")

    def store_is(self, *, down: bool) -> None:
        for member in MEMBERS:
            self.store.set_down(member, down)

    def isolate(self, name: str, *from_whom: str) -> None:
        others = list(from_whom)
        self.network.cut([name], others)
        self.network.cut(others, [name])

    def reconnect(self, name: str, *to_whom: str) -> None:
        others = list(to_whom)
        self.network.mend([name], others)
        self.network.mend(others, [name])

    def configure(self, **change: Any) -> None:
        """`ctl edit-config`."""
        before = self.config
        self.config = dict(before)
        self._merge(change)
        merged, self.config = self.config, before
        self.change_config(merged)

    def freeze(self, name: str, *, guard: bool = False) -> None:
        host = self.hosts[name]
        for process in (host.agent, host.guard) if guard else (host.agent,):
            process.process.freeze()
        host.note_bare()

    def thaw(self, name: str) -> None:
        host = self.hosts[name]
        for process in (host.guard, host.agent):
            process.process.thaw()
        host.note_bare()


class Clients:
    """An application that commits every 0.1 s on whoever accepts commits, 50 ms away from round times."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        stage.scheduler.after(COMMIT_EVERY_S / 2, self._round)
        self.bytes = 1000

    def _round(self) -> None:
        stage = self._stage
        for name in stage.names:
            instance = stage.instances[name]
            if instance.accepting:
                instance.commit(self.bytes, Commit(stage, instance))
        stage.scheduler.after(COMMIT_EVERY_S, self._round)


class Commit:
    """One on its way. `lsn` is set by the model once it is written."""

    def __init__(self, stage: Stage, instance: Any) -> None:
        self._stage, self._instance = stage, instance
        self.lsn = 0
        self._at_s = stage.scheduler.now_s

    def __call__(self, outcome: str) -> None:
        if outcome == "acked":
            self._stage.writers.told(self._instance, self._instance.dir.branch, self.lsn)
        transcript = getattr(self._stage, "transcript", None)
        if transcript is not None:
            transcript.answered(self._instance.name, outcome, self._at_s)
