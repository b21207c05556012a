"""One node of level (a): pgha's agent over the model, without trio.

The agent's loop, its observers of PostgreSQL, directory and peers, and its line to the guard are written anew here, after
`agent.py` and `observe/` and in the same order of steps; everything that decides, renews, fences and operates is pgha's
own source (`stepped`): decide/, lock/renewer.py, lock/fence.py, lock/watchdog.py, observe/cluster.py, announce.py, act/.
"""

from __future__ import annotations

import traceback
from typing import Any

import msgspec
from msgspec.structs import replace

from pgha.announce import member_value
from pgha.clock import Deadline, Instant, candidate_age_s, remaining_s
from pgha.config.cluster import normalised
from pgha.config.load import effective
from pgha.config.local import LocalConfig
from pgha.config.rules import finish
from pgha.config.schema import Report, read
from pgha.config.state import Remembered
from pgha.dcs.keys import Keys, encode
from pgha.decide import decide
from pgha.decide.foreign import member_is_ours
from pgha.errors import (
    ConfigError,
    DcsError,
    GuardError,
    GuardSilent,
    OperationFailed,
    PghaError,
    PostgresError,
    Refused,
    is_unreached,
)
from pgha.foresee.world import vote_as_told
from pgha.lock import watchdog
from pgha.lock.guard_client import GuardStatus
from pgha.lock.protocol import Agent, Answer, Op, Request
from pgha.lock.renewer import OUT_OF_SPACE
from pgha.model.action import (
    AcquireLock,
    Action,
    AnswerRequest,
    ApplyConfiguration,
    CancelOperation,
    Clone,
    Demote,
    InspectEndOfWal,
    InspectUpstream,
    LongAction,
    Promote,
    ReadCluster,
    Restart,
    Rewind,
    StartPrimary,
)
from pgha.model.decision import Decision, Memory, PeerQuestion
from pgha.model.failsafe import FailsafeFacts
from pgha.model.lock import Identity, LicenceState
from pgha.model.node import Control, DataDirectoryFacts, PostgresFacts
from pgha.model.observation import Observation, Operation, Peer, Settings, Upstream, WrittenNames
from pgha.model.request import Request as OperatorRequest
from pgha.model.wal import HistoryRow, Position
from pgha.observe.postgres import (
    HURRY_S,
    MAX_HURRY_S,
    POSITION_AGE_S,
    PROBE_DEADLINE_S,
    UNSETTLED_S,
    _as_it_should_be,
    _what_matters,
    look_every_s,
    not_looked_since,
)
from pgha.rest.requests import _ping
from tests.simulation import hands, kernel, stepped
from tests.simulation.kernel import Process
from tests.simulation.postgres import Instance, Server
from tests.simulation.world import Host

QUICK_S = 3.0
PAUSE_AFTER_FAILURE_S = 0.1
GUARD_ASKED_EVERY_S = 10.0
OPERATING_ERRORS = (OperationFailed, PostgresError, DcsError, GuardError, Refused, ConfigError, OSError, kernel.TooSlowError)
KEYS = Keys("service", "sim")
#: How long a peer's answer is waited for, and may be held back (observe/peers.py).
ANSWER_S, WAIT_S = 0.6, 0.25

_EFFECTIVE: dict[tuple[str, bytes, bool], Any] = {}


def local_config(name: str, tags: dict[str, Any] | None = None, *, watchdog: str = "automatic", bootstraps: bool = True) -> LocalConfig:
    raw: dict[str, Any] = {
        "scope": "sim", "name": name, "etcd3": {"host": "127.0.0.1:1"}, "restapi": {"listen": "127.0.0.1:8008", "connect_address": f"{name}:8008"},
        "tags": tags or {}, "watchdog": {"mode": watchdog},
        "postgresql": {"listen": "127.0.0.1:5432", "connect_address": f"{name}:5432", "data_dir": f"/sim/{name}", "bin_dir": "/sim/bin",
                       "authentication": {"superuser": {"username": "postgres"}, "replication": {"username": "postgres"}, "rewind": {"username": "postgres"}}},
    }
    if bootstraps:
        raw["bootstrap"] = {"initdb": ["no-instructions"]}
    report = Report("simulation")
    local = finish(read(LocalConfig, raw, (), report), report)
    assert not report.problems, report.problems
    return local


def effective_of(name: str, local: LocalConfig, config: dict[str, Any], *, mixed: bool = False) -> Any:
    """`effective`, once for each configuration: it is a pure function."""
    text = encode(config)
    found = _EFFECTIVE.get((name, text, mixed))
    if found is None or found.local is not local:
        found = _EFFECTIVE[name, text, mixed] = effective(local, config, patroni_member_present=mixed)
        if len(_EFFECTIVE) > 500:
            _EFFECTIVE.clear()
    return found


class SimGuardClient:
    """pgha.lock.guard_client.GuardClient."""

    def __init__(self, host: Host, me: Identity, started_ns: int) -> None:
        self._host = host
        self._agent = Agent(started_ns, me.incarnation)

    async def arm(self, *, sequence: int, fence_at: Deadline, deadline_s: float = 0.3) -> GuardStatus:
        return await self._ask(Request(Op.ARM, self._agent, sequence, fence_at), deadline_s)

    async def pause(self, *, sequence: int, deadline_s: float = 0.3) -> GuardStatus:
        return await self._ask(Request(Op.PAUSE, self._agent, sequence), deadline_s)

    async def narrow(self, fence_at: Deadline, *, sequence: int = 0, deadline_s: float = 0.3) -> GuardStatus:
        return await self._ask(Request(Op.NARROW, self._agent, sequence, fence_at), deadline_s)

    async def standby(self, *, deadline_s: float = 0.3) -> GuardStatus:
        return await self._ask(Request(Op.STANDBY, self._agent), deadline_s)

    async def offline(self, until: Deadline, *, deadline_s: float = 0.3) -> GuardStatus:
        return await self._ask(Request(Op.OFFLINE, self._agent, deadline=until), deadline_s)

    async def fence_now(self, *, deadline_s: float = 0.3) -> GuardStatus:
        return await self._ask(Request(Op.FENCE_NOW, self._agent), deadline_s)

    async def bye(self, *, deadline_s: float = 0.3) -> GuardStatus:
        return await self._ask(Request(Op.BYE, self._agent), deadline_s)

    async def status(self, *, deadline_s: float = 0.3) -> GuardStatus:
        return await self._ask(Request(Op.STATUS), deadline_s)

    async def aclose(self) -> None: ...

    async def _ask(self, request: Request, deadline_s: float) -> GuardStatus:
        guard = self._host.guard
        if guard is None or not guard.process.alive:
            await kernel.checkpoint()
            raise GuardError(f"{request.op}: nobody listens")
        answers: list[Answer] = []
        event = kernel.Event()

        def answered(answer: Answer) -> None:
            answers.append(answer)
            event.set()

        guard.ask(request, answered)
        with kernel.move_on_after(deadline_s):
            await event.wait()
        if not answers:
            raise GuardSilent(f"{request.op}: no acknowledgement within {deadline_s} s")
        answer = answers[0]
        if not answer.ok:
            raise GuardError(f"{request.op} refused: {answer.error}")
        return GuardStatus(answer.state.value, answer.fence_at, answer.until, answer.agent.incarnation, answer.agent.started_ns, answer.sequence,
                           int(answer.facts["pid"]), "", 0, str(answer.facts["why"]), "", {})


class SimPostgresObserver:
    """pgha.observe.postgres.PostgresObserver, told by the model instead of looking every few milliseconds."""

    def __init__(self, process: Process, host: Host, interval_s: Any, wake: Any) -> None:
        self._process, self._host, self._instance = process, host, host.instance
        self._interval_s, self._wake = interval_s, wake
        self._kick = kernel.Event()
        self._server: Server | None = None
        self._session = False
        self._hurry_until: Instant | None = None
        self._position_asked = False
        self.facts = PostgresFacts()
        host.instance.on_change.append(self._noticed)

    def stop(self) -> None:
        if self._noticed in self._instance.on_change:
            self._instance.on_change.remove(self._noticed)

    def kick(self) -> None:
        self._kick.set()

    def hurry(self, for_s: float) -> None:
        until = self._host.clock.now().plus_s(min(for_s, MAX_HURRY_S))
        if self._hurry_until is None or remaining_s(until, self._hurry_until) > 0:
            self._hurry_until = until
        self._kick.set()

    def configuration_changed(self) -> None:
        self.hurry(0.6)

    def position_asked(self) -> None:
        row_at = self.facts.row_at
        if self._position_asked or row_at is None or remaining_s(row_at.plus_s(POSITION_AGE_S), self._host.clock.now()) > 0:
            return
        self._position_asked = True
        self._kick.set()

    def _hurries(self) -> bool:
        return self._hurry_until is not None and remaining_s(self._hurry_until, self._host.clock.now()) > 0

    def _noticed(self, what: str) -> None:
        if not self._process.alive:
            return
        if what == "exited":
            self._process.after(0.0002, self._kick.set)
        elif self.facts.process in ("starting", "stopping") or self._hurries():
            self._process.after(HURRY_S, self._kick.set)

    async def run(self) -> None:
        while True:
            self._kick = kernel.Event()
            await self._once()
            with kernel.move_on_after(self._next_in_s()):
                await self._kick.wait()

    def _next_in_s(self) -> float:
        facts = self.facts
        wait_s = float(self._interval_s())
        if facts.process in ("starting", "stopping"):
            return 0.5
        if facts.process == "running" and (facts.answer != "sql" or not _as_it_should_be(facts.row)):
            wait_s = min(wait_s, UNSETTLED_S)
        if facts.process == "absent":
            wait_s = min(wait_s, 1.0)
        return min(wait_s, 0.2) if self._hurries() else wait_s

    async def _once(self) -> None:
        now, instance = self._host.clock.now(), self._instance
        if self._server is not None and not self._server.postmaster_alive:
            # First kill what it left, then tell.
            if instance.server is self._server:
                instance.kill_all()
            self._server, self._session = None, False
            self._set(PostgresFacts(since=now, ever_started=True, why="the postmaster has ended"))
        if self._server is None:
            server = instance.postmaster
            if server is None:
                if instance.server is not None:
                    instance.kill_all()     # orphans
                if self.facts.process != "absent":
                    self._set(PostgresFacts(since=now, ever_started=self.facts.ever_started))
                return
            self._server, self._session = server, False
            self._set(PostgresFacts(process=self._status(), pid=server.pid, since=now, ever_started=True))
        await self._look(self._server)

    def _status(self) -> Any:
        return {"starting": "starting", "stopping": "stopping", "ready": "running"}.get(self._instance.status(), "starting")

    async def _look(self, server: Server) -> None:
        process = self._status()
        if process != self.facts.process:
            self._set(replace(self.facts, process=process, since=self._host.clock.now()))
        asked_at = self._host.clock.now()
        if process != "running":
            await kernel.sleep(0.002)
            if self._instance.refuses():
                self._set(replace(self.facts, answer="starting", answered_at=self._host.clock.now(), why=""))
            else:
                await kernel.sleep(PROBE_DEADLINE_S)
                self._set(replace(self.facts, answer="silent", why="no answer to a startup packet"))
            return
        await kernel.sleep(0.002)
        ok = self._instance.answers() or (self._session and not server.all_frozen and not server.hung)
        if ok and self._instance.server is server and server.postmaster_alive and server.phase == "ready":
            self._session = True
            self._set(replace(self.facts, answer="sql", answered_at=asked_at, row=self._instance.row(), row_at=asked_at, why=""))
            return
        if self._instance.server is server and server.phase == "ready":
            await kernel.sleep(PROBE_DEADLINE_S)
            self._session = False
            alive = self._instance.refuses()
            self._set(replace(self.facts, answer="silent", answered_at=self._host.clock.now() if alive else self.facts.answered_at,
                              why=f"no answer to SQL within {PROBE_DEADLINE_S:g} s"))

    def _set(self, facts: PostgresFacts) -> None:
        if self._server is None and facts.process != "absent":
            return
        before, self.facts = self.facts, facts
        told = self._position_asked and facts.row_at != before.row_at
        if told or facts.row_at is None:
            self._position_asked = False
        if told or _what_matters(before) != _what_matters(facts):
            self._wake()


class SimReader:
    """pgha.observe.data_directory.DataDirectoryReader."""

    def __init__(self, instance: Instance) -> None:
        self._instance = instance
        self._control: Control | None = None
        self._seen: tuple[int, int] | None = None
        self._end: tuple[tuple[int, int], int, int] | None = None
        self.facts = DataDirectoryFacts()

    def _stamp(self) -> tuple[int, int]:
        return id(self._instance.dir), self._instance.dir.written

    async def note_end_of_wal(self, *, lsn: int, timeline: int) -> None:
        self._end = (self._stamp(), lsn, timeline)

    async def read_facts(self, *, running: bool, timeline: int = 0) -> DataDirectoryFacts:
        await kernel.sleep(0.002)
        if self._instance.disk_hung:
            await kernel.sleep(4.0)
            self.facts = DataDirectoryFacts(state="unreadable", why="no answer from the disk")
            return self.facts
        self.facts = self._read(running, timeline)
        return self.facts

    def _read(self, running: bool, timeline: int) -> DataDirectoryFacts:
        data = self._instance.dir
        if data.content in ("missing", "empty"):
            return DataDirectoryFacts(state=data.content, why="nothing there")
        facts = DataDirectoryFacts(
            state="partial", standby_signal=data.standby_signal, major_version=15, rewind_interrupted=bool(data.rewind_marker),
            abandoned_bootstrap=data.bootstrap_mark == "making", bootstrap_unregistered=data.bootstrap_mark == "made")
        if (data.bootstrap_mark == "making" and not running) or data.content == "partial":
            return facts
        stamp = self._stamp()
        if self._control is None or (stamp != self._seen and not running):
            said = hands.control_data(data)
            self._control = Control(
                state=said.state, system_identifier=said.system_identifier, timeline=said.timeline, checkpoint_lsn=said.checkpoint_lsn, redo_lsn=said.redo_lsn,
                min_recovery_lsn=said.min_recovery_end_lsn, min_recovery_timeline=said.min_recovery_timeline, checksums=said.checksums,
                wal_log_hints=said.wal_log_hints)
            self._seen = stamp
        end = self._end if self._end is not None and self._end[0] == stamp and not running else None
        number = timeline or max(self._control.timeline, self._control.min_recovery_timeline)
        return replace(facts, state="valid", control=self._control, end_of_wal=end[1] if end else 0, end_of_wal_timeline=end[2] if end else 0,
                       history=data.histories.get(number, ()) if number > 1 else (), history_of=number)


class SimPeers:
    """pgha.observe.peers.PeersObserver: the same questions, by the model's network."""

    def __init__(self, agent: AgentProcess) -> None:
        self._agent = agent
        self._question = PeerQuestion()
        self._number = 0
        self.facts: dict[str, Peer] = {}

    def ask(self, question: PeerQuestion) -> None:
        if question != self._question:
            self._question = question
            self._number += 1
            self.facts = {n: p for n, p in self.facts.items() if n in question.names}
            for name in question.names:
                self._begin(name, self._number)

    def _begin(self, name: str, number: int) -> None:
        if number != self._number:
            return
        agent = self._agent
        asked_at = agent.host.clock.now()
        state = {"done": False}
        agent.process.after(ANSWER_S, self._silent, name, number, asked_at, state)
        agent.world.network.send(agent.host.name, name, self._arrived, name, number, asked_at, state, self._question.epoch)

    def _arrived(self, name: str, number: int, asked_at: Instant, state: dict[str, bool], epoch: int) -> None:
        peer = self._agent.world.agents.get(name)
        if peer is None or not peer.process.alive:
            if self._agent.world.hosts[name].up:
                self._agent.world.network.send(name, self._agent.host.name, self._refused, name, number, asked_at, state)
            return
        peer.process.call(peer.vote_asked, epoch, self._answer_of, (name, number, asked_at, state), WAIT_S if epoch >= 0 else 0.0)

    def _answer_of(self, context: tuple[str, int, Instant, dict[str, bool]], answer: Peer) -> None:
        name = context[0]
        self._agent.world.network.send(name, self._agent.host.name, self._answered, context, answer)

    def _answered(self, context: tuple[str, int, Instant, dict[str, bool]], answer: Peer) -> None:
        name, number, asked_at, state = context
        self._agent.process.call(self._note, name, number, state, replace(answer, name=name, asked_at=asked_at))

    def _refused(self, name: str, number: int, asked_at: Instant, state: dict[str, bool]) -> None:
        self._agent.process.call(self._note, name, number, state, Peer(name=name, asked_at=asked_at, why="connection refused"))

    def _silent(self, name: str, number: int, asked_at: Instant, state: dict[str, bool]) -> None:
        self._note(name, number, state, Peer(name=name, asked_at=asked_at, why=f"no answer within {ANSWER_S} s"))

    def _note(self, name: str, number: int, state: dict[str, bool], peer: Peer) -> None:
        if state["done"] or number != self._number:
            return
        state["done"] = True
        before = self.facts.get(name)
        if not peer.answered:
            peer = replace(peer, silent_since=before.silent_since if before is not None and before.silent_since is not None else peer.asked_at)
        self.facts[name] = peer
        if before is None or _shape(before) != _shape(peer):
            self._agent.wake()
        now = self._agent.host.clock.now()
        self._agent.process.after(max(0.01, self._question.every_s - candidate_age_s(peer.asked_at, now)), self._begin, name, number)


def _shape(peer: Peer) -> tuple[object, ...]:
    return (peer.answered, peer.in_recovery, peer.timeline, peer.lsn, peer.frozen_epoch, peer.running, peer.candidate, peer.watchdog_failed)


class SimAsker:
    """pgha.lock.failsafe.Asker: POST /failsafe, by the model's network."""

    def __init__(self, agent: AgentProcess) -> None:
        self._agent = agent

    async def ask(self, api_url: str, body: bytes) -> str:
        agent, name = self._agent, api_url.removeprefix("http://").partition(":")[0]
        answers: list[str] = []
        event = kernel.Event()

        def answered(text: str) -> None:
            answers.append(text)
            event.set()

        def arrived() -> None:
            peer = agent.world.agents.get(name)
            if peer is None or not peer.process.alive:
                agent.world.network.send(name, agent.host.name, answered, "connection refused")
            else:
                peer.process.call(peer.failsafe_asked, body, lambda text: agent.world.network.send(name, agent.host.name, answered, text))

        agent.world.network.send(agent.host.name, name, arrived)
        await event.wait()
        return answers[0]


class AgentProcess:
    """One run of the agent on a host."""

    def __init__(self, host: Host, *, incarnation: int) -> None:
        src = stepped.sources()
        world = host.world
        self.host, self.world, self.instance = host, world, host.instance
        self.process = Process(world.scheduler, host.name, failed=self._task_failed)
        self.process.host = host                        # type: ignore[attr-defined]  (the stand-ins look it up)
        self.process.trace = world.trace                # type: ignore[attr-defined]
        self.process.disk_wait = self._disk             # type: ignore[attr-defined]
        self.clock = host.clock
        self.me = Identity(name=host.name, node_id=host.node_id, incarnation=f"{host.name}.{incarnation}")
        self.local = host.local
        self.effective = effective_of(host.name, self.local, normalised(host.cached_config or host.first_config))
        self.dynamic = host.cached_config
        self._config_revision = -1
        self._before_limit: tuple[PostgresFacts, float] | None = None
        self._news = kernel.Event()
        self.store = src.simulation_store.SimStore(world.store, host.name, first=incarnation + len(host.name))
        renewer_store = src.simulation_store.SimStore(world.store, host.name, first=incarnation + 1)
        self.outage = src.dcs_outage.Outage(self.clock)
        self.renewer = src.lock_renewer.Renewer(
            store=renewer_store, keys=KEYS, me=self.me, clock=self.clock,
            timing=self._timing, changed=self._licence_changed, outage=self.outage)
        self.guard = SimGuardClient(host, self.me, self.clock.now().boot_ns)
        self.machine = hands.SimMachine(host)
        self.fence = src.lock_fence.Fence(renewer=self.renewer, guard=self.guard, directory=self.machine.directory, clock=self.clock, wake=self.wake)
        self.renewer.narrower = self
        self.cluster = src.observe_cluster.ClusterObserver(
            store=self.store, keys=KEYS, clock=self.clock, state_dir=host, wake=self.wake, me=self.me.name, in_thread=self.machine.in_thread,
            settings=lambda: (self.settings.ttl_s, self.settings.loop_wait_s, self.settings.retry_timeout_s, self.settings.member_slots_ttl_s),
            outage=self.outage)
        self.wanted = hands.ModelWanted(host.instance, lambda: self.effective)
        self.postgres = SimPostgresObserver(self.process, host, lambda: look_every_s(self.settings), self._postgres_changed)
        self.reader = SimReader(host.instance)
        self.peers = SimPeers(self)
        self.watchdog = src.lock_watchdog.Watchdog(host.device, mode=host.watchdog_mode, safety_margin_s=5, clock=self.clock)
        self.announcer = src.pgha_announce.Announcer(store=self.store, keys=KEYS, name=self.me.name, clock=self.clock, ttl_s=lambda: self.settings.ttl_s,
                                                     loop_wait_s=lambda: self.settings.loop_wait_s, outage=self.outage)
        context = src.act_context.Context(
            clock=self.clock, me=self.me, store=self.store, keys=KEYS, renewer=self.renewer, fence=self.fence, server=hands.ModelServer(host.instance),
            machine=self.machine, wanted=self.wanted, hurry=self.postgres.hurry, configuration_changed=self.postgres.configuration_changed,
            last_position=self._last_position, bootstrap_config=lambda: encode(normalised(host.first_config)),
            private_dir=hands.ModelDir(host.instance, "private"))
        self.actor = src.pgha_act.Actor(context)
        unknown_ttl_s = self._longest_ttl_s() if self.settings.failsafe_mode and not self.machine.directory.processes() else 0.0
        self.promises = self.renewer.promises = _promises(src, host, self.clock, self.machine.boot_id(), unknown_ttl_s)
        self.failsafe = src.lock_failsafe.Rounds(
            renewer=self.renewer, clock=self.clock, timing=self._timing, wake=self.wake, asker=SimAsker(self),
            conn_url=lambda: f"postgres://{host.name}:5432/postgres", api_url=lambda: f"http://{host.name}:8008/patroni")
        self.memory = Memory()
        self.number = 0
        self.shutting_down = self.finished = False
        self.requests: dict[int, OperatorRequest] = {}
        self._request_number = 0
        self._reload_asked = False
        self._operation: Operation | None = None
        self._operation_scope: kernel.CancelScope | None = None
        self._operation_number = 0
        self._ended: Operation | None = None
        self._directory_stale = True
        self._directory_news = kernel.Event()
        self._checkpoint_pending = False
        self._upstream: Upstream | None = None
        self._cloned = True
        self._held: tuple[object, ...] = ()
        self._looking = kernel.Lock()
        self._doubted_revision = 0
        self._watchdog_news = kernel.Event()
        self._said: tuple[Any, ...] = ()
        self.seen: Observation | None = None
        self.decision: Decision | None = None
        self._voters: list[tuple[int, Any, Any, Any]] = []
        world.trace(host.name, "agent starts", incarnation=self.me.incarnation)
        self.process.spawn(self._run)

    # --- life ------------------------------------------------------------------------------------------------------------

    def _task_failed(self, process: Process, error: BaseException) -> None:
        leaves = _leaves(error)
        ours = [e for e in leaves if not isinstance(e, PghaError)]
        if ours:
            text = "".join(traceback.format_exception(ours[0]))
            self.world.violation("NoTaskFails", f"{self.host.name}: {type(ours[0]).__name__}: {ours[0]}\n{text}")
        self.world.trace(self.host.name, "agent cannot go on", why=str(leaves[0]).replace(" ", "_"))
        self.kill()
        self.host.agent_ended(3.0)

    def kill(self) -> None:
        self.process.kill()
        self.postgres.stop()
        self.host.device.owner_gone()

    async def _disk(self) -> None:
        await kernel.sleep(0.0005)
        while self.instance.disk_hung:
            await kernel.sleep(0.1)

    @property
    def settings(self) -> Settings:
        found: Settings = self.effective.settings
        return found

    def wake(self) -> None:
        self._news.set()

    def _timing(self) -> Any:
        return stepped.sources().lock_renewer.Timing(ttl_s=self.settings.ttl_s, loop_wait_s=self.settings.loop_wait_s, paused=self.settings.pause,
                                                      mixed=self.settings.mixed)

    def _longest_ttl_s(self) -> float:
        return max(self.settings.ttl_s, self.cluster.facts.remembered_ttl_s, 30.0)

    def failsafe_asked(self, body: bytes, answered: Any) -> None:
        """POST /failsafe, as rest/requests.py and the agent answer it: one step."""
        if self.seen is None:
            return
        view, licence = self.cluster.facts.view, self.renewer.licence
        verdict = self.promises.accept(_ping(msgspec.json.decode(body)), stepped.sources().lock_promise.Receiver(
            name=self.me.name, failsafe_mode=self.settings.failsafe_mode, leads=self.postgres.facts.is_primary or self.fence.mode == "armed", licence=licence,
            epoch=max(licence.epoch, view.epoch.number if view else 0), epoch_holder=view.epoch.holder if view and view.epoch.number >= licence.epoch else "",
            ttl_s=self._longest_ttl_s()))
        if verdict.promise is not None:
            self.wake()
        answered("" if verdict.status == 200 and verdict.text.strip() == "Accepted" else f"{verdict.status} {verdict.text}")

    def _licence_changed(self) -> None:
        if self.renewer.licence.failing_why.startswith(OUT_OF_SPACE):
            self.cluster.out_of_space()
        self.fence.changed()
        if hasattr(self, "failsafe"):
            self.failsafe.changed()
        self._look_at_protection()
        self.wake()
        self.world.licence_changed(self)

    def _look_at_protection(self) -> None:
        now = (self._protects(), self.renewer.licence.state)
        if now != self._held:
            self._held = now
            self._watchdog_news.set()

    def _protects(self) -> bool:
        about_to = self._operation is not None and self._operation.kind in ("Promote", "StartPrimary", "Restart") and self.licensed()
        return (self.fence.mode == "armed" or about_to) and not self.renewer.licence.endless

    def licensed(self) -> bool:
        licence = self.renewer.licence
        return licence.state is LicenceState.HELD and licence.valid_until is not None and remaining_s(licence.valid_until, self.clock.now()) > 0

    async def narrow(self, valid_until: Deadline, ttl_s: float, *, sequence: int) -> None:
        if self._protects():
            self.watchdog.step(watchdog.Wanted(protecting=True, ttl_s=ttl_s, valid_until=valid_until))
        await self.fence.narrow(valid_until, ttl_s, sequence=sequence)

    def _postgres_changed(self) -> None:
        if self.postgres.facts.process in ("absent", "running"):
            self._directory_stale = self._directory_stale or self.postgres.facts.process == "absent"
            self._directory_news.set()
        self.wake()

    async def _run(self) -> None:
        await self._end_guard_stuck_before()
        status = await self._guard_there()
        primary = status.state in ("armed", "paused", "latched") and bool(self.machine.directory.processes())
        self.fence.adopt(status, primary=primary)
        if not self.machine.directory.processes():
            try:
                await self.actor.be_standby_at_rest()
            except OPERATING_ERRORS:
                pass
        async with kernel.open_nursery() as nursery:
            self._nursery = nursery
            for work in (self.fence.run, self.renewer.run, self.failsafe.run, self.postgres.run, self.cluster.run, self.announcer.run, self._pet_watchdog,
                         self._keep_directory_facts, self._keep_guard):
                nursery.start_soon(work)
            nursery.start_soon(self.cluster.keep_capacity, lambda: self.renewer.licence.state is LicenceState.HELD)
            await self._loop()
            nursery.cancel_scope.cancel()
        await self._part()

    async def _end_guard_stuck_before(self) -> None:
        guard = self.host.guard
        try:
            await self.guard.status()
        except GuardSilent:
            if guard is not None and guard is self.host.guard:
                self.world.trace(self.host.name, "stuck guard ended")
                self.host.kill_guard()
                await kernel.checkpoint()
        except GuardError:
            return

    async def _guard_there(self) -> GuardStatus:
        try:
            return await self.guard.status()
        except GuardError as error:
            last = error
        ends_at = kernel.current_time() + 5.0
        await kernel.sleep(0.08)
        self.host.start_guard()
        while kernel.current_time() < ends_at:
            try:
                return await self.guard.status()
            except GuardError as error:
                last = error
            await kernel.sleep(0.05)
        raise GuardError(f"no guard within 5 s: {last}")

    async def _keep_guard(self) -> None:
        answered: Any = None
        while True:
            if self.fence.facts.reachable:
                answered = self.host.guard
            with kernel.move_on_after(GUARD_ASKED_EVERY_S):
                await self._guard_ends_or_is_silent()
            try:
                self.fence.note(await self.guard.status())
            except GuardError as error:
                if self.finished:
                    return
                self.fence.unanswered(str(error))
                if isinstance(error, GuardSilent) and answered is not None and answered is self.host.guard:
                    self.world.trace(self.host.name, "stuck guard ended")
                    self.host.kill_guard()
                    await kernel.checkpoint()
                try:
                    self.fence.note(await self._guard_there())
                    self.fence.changed()
                except GuardError:
                    await kernel.sleep(0.5)

    async def _guard_ends_or_is_silent(self) -> None:
        async with kernel.open_nursery() as nursery:
            async def ends() -> None:
                await self._guard_exit()
                nursery.cancel_scope.cancel()

            nursery.start_soon(ends)
            await self.fence.silent.wait()
            nursery.cancel_scope.cancel()

    async def _guard_exit(self) -> None:
        guard = self.host.guard
        if guard is None or not guard.process.alive:
            await kernel.sleep(0.2)
            return
        event = kernel.Event()
        guard.exit_listeners.append(event.set)
        await event.wait()

    async def _pet_watchdog(self) -> None:
        while True:
            self._watchdog_news = kernel.Event()
            licence = self.renewer.licence
            protects = self._protects()
            if not protects and not self.watchdog.facts.active:
                self.watchdog.check(self.settings.ttl_s)
            next_s = self.watchdog.step(watchdog.Wanted(protecting=protects, ttl_s=licence.ttl_s or self.settings.ttl_s,
                                                        valid_until=licence.valid_until if licence.state is LicenceState.HELD else None))
            with kernel.move_on_after(next_s if self.watchdog.facts.active else max(next_s, 10.0)):
                await self._watchdog_news.wait()

    async def _keep_directory_facts(self) -> None:
        while True:
            self._directory_news = kernel.Event()
            await self._look_at_directory()
            with kernel.move_on_after(10.0 if self.postgres.facts.alive else 1.0):
                await self._directory_news.wait()

    async def _look_at_directory(self) -> None:
        async with self._looking:
            before, facts = self.reader.facts, self.postgres.facts
            after = await self.reader.read_facts(running=facts.alive, timeline=facts.row.timeline if facts.row else 0)
            if self._directory_stale or before != after:
                self._directory_stale = False
                self.wake()

    # --- the loop ----------------------------------------------------------------------------------------------------------

    async def _loop(self) -> None:
        while not self.finished:
            self._news = kernel.Event()
            self._take_configuration()
            seen = self._assemble()
            self._doubt(seen)
            self._look_at_protection()
            remembered = self.memory
            decision = decide(seen, remembered)
            self.seen, self.decision = seen, decision
            self.world.passed(self, seen, decision)
            self.memory = decision.memory
            self.renewer.give_mandate(decision.mandate, number=self.number)
            self.renewer.position = self._position_to_record(seen)
            self.peers.ask(decision.ask_peers)
            self.failsafe.give(decision.failsafe)
            if decision.ask_peers.names:
                self.postgres.position_asked()
            self._publish(seen, decision)
            self._discard_replaced(seen)
            failed = await self._carry_out(decision)
            if self._done(decision):
                break
            with kernel.move_on_after(PAUSE_AFTER_FAILURE_S if failed else decision.wake_in_s):
                if failed:
                    await kernel.sleep(PAUSE_AFTER_FAILURE_S)
                await self._news.wait()

    def _assemble(self) -> Observation:
        self.number += 1
        directory = self.reader.facts
        row = self.postgres.facts.row
        if row is not None and directory.history_of not in (0, row.timeline):
            self._directory_news.set()      # it has gone over to another timeline since
        if self._directory_stale:
            directory = DataDirectoryFacts(state="unknown", why="being looked at")
        facts = self.cluster.facts
        self.promises.settle(facts.lock_seen.record)
        heard = self.renewer.heard_at
        if heard is not None and (facts.heard_at is None or heard > facts.heard_at):
            facts = replace(facts, heard_at=heard)
        return Observation(
            now=self.clock.now(), wall_s=self.clock.wall_s(), number=self.number, me=self.me, settings=self._settings_now(), dcs=facts,
            licence=self.renewer.licence, postgres=self.postgres.facts, directory=directory, guard=self.fence.facts, watchdog=self.watchdog.facts,
            peers=dict(self.peers.facts), failsafe=FailsafeFacts(promise=self.promises.promise, missing=self.failsafe.missing), upstream=self._upstream, configured_upstream=self.wanted.upstream.name if self.wanted.upstream else "",
            written_names=WrittenNames(told=self.wanted.names_told, names=self.wanted.names), operation=self._operation, ended=self._ended, requests=tuple(self.requests.values()), shutting_down=self.shutting_down)

    def _settings_now(self) -> Settings:
        settings = not_looked_since(self._settings_cached(), self._before_limit, self.postgres.facts)
        return replace(settings, configuration_changed=True) if self._reload_asked else settings

    def _settings_cached(self) -> Settings:
        if self.dynamic is None:
            return self.settings
        key = id(self.effective)
        if getattr(self, "_settings_of", None) != key:
            self._settings_of = key
            self._settings_cache = replace(self.settings, dynamic_config=encode(self.dynamic))
        return self._settings_cache

    def _doubt(self, seen: Observation) -> None:
        view = seen.dcs.view
        if view is not None:
            self.renewer.saw(view)
        if (view is not None and view.lock is not None and view.lock.incarnation != self.me.incarnation and seen.licence.state is LicenceState.HELD
                and view.lock_revision != self._doubted_revision):
            self._doubted_revision = view.lock_revision
            self.renewer.confirm()

    def _discard_replaced(self, seen: Observation) -> None:
        row = seen.postgres.row
        if self._cloned and row is not None and row.receiver is not None and row.receiver.status == "streaming":
            self._cloned = False
            self._nursery.start_soon(self._discard)

    async def _discard(self) -> None:
        try:
            await self.actor.discard_old()
        except OPERATING_ERRORS:
            pass

    def _position_to_record(self, seen: Observation) -> tuple[int, int]:
        row = seen.postgres.row
        found: tuple[int, int] = (row.position, row.timeline) if row is not None else self.renewer.position
        return found

    def _last_position(self) -> Position:
        lsn, timeline = self.renewer.position
        return Position(timeline=timeline, lsn=lsn)

    def _publish(self, seen: Observation, decision: Decision) -> None:
        said = (decision.situation, *(type(a).__name__ for a in decision.actions), *(r.rule for r in decision.reasons if not r.holds))
        if said != self._said and (decision.situation != "busy" or decision.actions):
            self._said = said
            self.world.trace(self.host.name, f"[{decision.situation}] {decision.summary}", n=self.number)
        view = seen.dcs.view
        if view is not None and self.me.name not in view.members:
            self.announcer.gone()
        if view is not None and member_is_ours(seen).holds:
            self._announce(seen, decision)
        if self._voters:
            waiting, self._voters = self._voters, []
            for epoch, answered, context, timer in waiting:
                if decision.vote.epoch >= epoch:
                    timer.cancel()
                    answered(context, self._vote())
                else:
                    self._voters.append((epoch, answered, context, timer))

    def _announce(self, seen: Observation, decision: Decision) -> None:
        self.announcer.announce(member_value(seen, decision, api_url=f"http://{self.host.name}:8008/patroni", checkpoint_pending=self._checkpoint_pending,
                                             conn_url=f"postgres://{self.host.name}:5432/postgres"))

    def vote_asked(self, epoch: int, answered: Any, context: Any, wait_s: float) -> None:
        """GET /pgha/vote, as rest/routes.py answers it."""
        if self.decision is None or self.seen is None:
            answered(context, Peer(name=self.host.name, asked_at=self.clock.now(), answered=True, is_pgha=True))
            return
        if epoch < 0:
            self.postgres.position_asked()
        elif self.decision.vote.epoch < epoch:
            view = self.cluster.facts.view
            if view is not None and epoch >= view.epoch.number:
                self.wake()
            if wait_s > 0:
                entry: list[Any] = []
                timer = self.process.after(wait_s, self._vote_waited, entry)
                entry.append((epoch, answered, context, timer))
                self._voters.append(entry[0])
                return
        answered(context, self._vote())

    def _vote_waited(self, entry: list[Any]) -> None:
        if entry[0] in self._voters:
            self._voters.remove(entry[0])
            entry[0][1](entry[0][2], self._vote())

    def _vote(self) -> Peer:
        seen, decision = self.seen, self.decision
        assert seen is not None
        assert decision is not None
        return vote_as_told(self.host.name, seen.now, seen, decision)

    def _done(self, decision: Decision) -> bool:
        memory = decision.memory
        if self.shutting_down and memory.shutdown_done and self._operation is None and (memory.left_running or not self.postgres.facts.alive):
            self.finished = True
        return self.finished

    # --- carrying out ------------------------------------------------------------------------------------------------------

    async def _carry_out(self, decision: Decision) -> bool:
        for action in decision.actions:
            if isinstance(action, LongAction):
                self._begin(action)
                return False
            try:
                with kernel.fail_after(max(QUICK_S, self.settings.retry_timeout_s) + 1.0):
                    await self._quick(action)
            except OPERATING_ERRORS as error:
                if not (self.outage.on and isinstance(error, DcsError | kernel.TooSlowError)):
                    self.world.trace(self.host.name, "action failed", action=type(action).__name__, why=(str(error) or type(error).__name__).replace(" ", "_"))
                return True
        return False

    async def _quick(self, action: Action) -> None:
        deadline_s = min(QUICK_S, self.settings.retry_timeout_s)
        if isinstance(action, ReadCluster):
            await self.cluster.read()
            self.wake()
        elif isinstance(action, CancelOperation):
            if self._operation is not None and self._operation.id == action.id and self._operation_scope is not None and action.while_in in ("", self._operation.progress):
                self.world.trace(self.host.name, "ending operation", kind=self._operation.kind)
                self._operation = replace(self._operation, cancelling=True)
                self._operation_scope.cancel()
        elif isinstance(action, AnswerRequest):
            self.requests.pop(action.id, None)
        elif isinstance(action, AcquireLock):
            config = encode(normalised(self.host.first_config)) if action.initialize_revision is not None else None
            await self.renewer.acquire(action, deadline_s=deadline_s, config=config)
            await self.cluster.read()
            self.wake()
        else:
            assert not isinstance(action, LongAction), action
            if isinstance(action, ApplyConfiguration):
                action, self._reload_asked = replace(action, force=self._reload_asked), False
            await self.actor.quick(action, deadline_s)
            if isinstance(action, ApplyConfiguration):
                self.wanted.write_running()

    def _begin(self, action: LongAction) -> None:
        assert self._operation is None, (self._operation, action)
        self._operation_number += 1
        if isinstance(action, Restart) and action.request_id:
            self.requests.pop(action.request_id, None)
        self._watchdog_news.set()
        self._operation = Operation(kind=type(action).__name__, id=self._operation_number, started_at=self.clock.now(), detail=getattr(action, "why", ""))
        self._nursery.start_soon(self._operate, action, self._operation)
        self.wake()

    async def _operate(self, action: LongAction, operation: Operation) -> None:
        facts: dict[str, Any] = {}
        ok, why = False, "it was ended"
        with kernel.CancelScope() as self._operation_scope:
            try:
                facts = await self.actor.operate(action, self._progress)
                ok, why = True, ""
            except OPERATING_ERRORS as error:
                why = str(error) or type(error).__name__
                facts = {"final": bool(getattr(error, "final", False)), "unreached": is_unreached(error), "overdue": bool(getattr(error, "overdue", False))}
                self.world.trace(self.host.name, "operation failed", kind=operation.kind, why=why.replace(" ", "_"))
        self._operation_scope = None
        self._note_operation(action, facts, ok=ok, why=why)
        if isinstance(action, InspectEndOfWal) and ok:
            await self.reader.note_end_of_wal(lsn=int(facts["end_of_wal"]), timeline=int(facts["end_of_wal_timeline"]))
        if ok:
            self.postgres.hurry(2.0)
            with kernel.move_on_after(2.0):
                while not _effect_is_seen(action, self.postgres.facts):
                    await kernel.sleep(0.02)
        self._directory_stale = True
        await self._look_at_directory()
        self._ended = replace(operation, ended_at=self.clock.now(), ok=ok, why=why, facts=facts)
        self._operation = None
        self.wake()

    def _progress(self, text: str) -> None:
        if self._operation is not None and self._operation.progress != text:
            self._operation = replace(self._operation, progress=text)
            self.wake()

    def _note_operation(self, action: LongAction, facts: dict[str, Any], *, ok: bool, why: str) -> None:
        if facts.get("checkpoint_pending"):
            self._checkpoint_pending = True
            self._nursery.start_soon(self._checkpoint)
        if isinstance(action, Demote):
            self._checkpoint_pending = False
        if isinstance(action, InspectUpstream):
            now = self.clock.now()
            if "timeline" not in facts:
                self._upstream = Upstream(name=action.source.name, asked_at=now, ok=False, why=why, unreached=facts.get("unreached") is True)
            else:
                self._upstream = Upstream(name=action.source.name, asked_at=now, ok=True, system_identifier=facts["system_identifier"],
                                          timeline=facts["timeline"], lsn=facts["lsn"], in_recovery=facts["in_recovery"],
                                          history=msgspec.convert(facts["history"], tuple[HistoryRow, ...]))
        if isinstance(action, Clone | Rewind) and ok:
            self._upstream = None
            self._cloned = self._cloned or isinstance(action, Clone)

    async def _checkpoint(self) -> None:
        await self.actor.checkpoint()
        self._checkpoint_pending = False
        self.wake()

    def _take_configuration(self) -> None:
        view = self.cluster.facts.view
        if view is None or view.config is None:
            return
        mixed = view.is_mixed or self.renewer.licence.mixed
        mark = view.revision_of("config") * 2 + mixed
        if mark == self._config_revision:
            return
        self._config_revision = mark
        self._before_limit = (self.postgres.facts, self.settings.primary_hang_timeout_s)
        self.postgres.kick()
        self.dynamic = view.config
        self.effective = effective_of(self.host.name, self.local, view.config, mixed=mixed)
        self.fence.changed()
        if self.instance.dir.content == "valid" and not self.instance.disk_full:
            self.host.cached_config = view.config

    async def _part(self) -> None:
        if not self.memory.left_running:
            await self._say_stopped()
        self.world.trace(self.host.name, "agent has stopped")
        self.kill()

    async def _say_stopped(self) -> None:
        with kernel.move_on_after(1.0):
            try:
                seen = self._assemble()
                self._checkpoint_pending = False
                self._announce(seen, Decision(situation="stopping", summary="", state="stopped", role="replica"))
                await self.announcer.settle()
            except DcsError:
                pass
        try:
            await self.guard.bye()
            self.host.kill_guard()
        except GuardError:
            pass

    # --- operators -----------------------------------------------------------------------------------------------------------

    def request(self, kind: Any, **options: Any) -> None:
        if kind == "reload":
            self._reload_asked = True
            self.wake()
        elif len(self.requests) < 16 and not (kind == "restart" and any(r.kind == "restart" for r in self.requests.values())):
            self._request_number += 1
            self.requests[self._request_number] = OperatorRequest(id=self._request_number, kind=kind, at=self.clock.now(), options=options)
            self.wake()

    def stop(self) -> None:
        """SIGTERM."""
        self.shutting_down = True
        self.wake()


class _PromiseFile:
    """The promise's file on tmpfs, as far as it is read."""

    def __init__(self, host: Host) -> None:
        self._host = host

    def __truediv__(self, name: str) -> _PromiseFile:
        return self

    def read_bytes(self) -> bytes:
        if self._host.promise_file is None:
            raise FileNotFoundError(2, "No such file or directory", "promise.json")
        return self._host.promise_file


def _promises(src: Any, host: Host, clock: Any, boot_id: str, unknown_ttl_s: float) -> Any:
    module = src.lock_promise

    class SimPromises(module.Promises):      # type: ignore[misc, name-defined]  (loaded at run time)
        def _write(self, promise: Any) -> None:
            host.promise_file = msgspec.json.encode(module._Written(boot_id=boot_id, promise=promise))

    return SimPromises(_PromiseFile(host), clock, boot_id=boot_id, unknown_ttl_s=unknown_ttl_s)


def _effect_is_seen(action: LongAction, facts: PostgresFacts) -> bool:
    kind = type(action).__name__
    if isinstance(action, StartPrimary | Promote) or (isinstance(action, Restart) and action.as_primary):
        return facts.row is not None and not facts.row.in_recovery
    if kind in ("StartStandby", "Restart"):
        return facts.alive
    if kind in ("Demote", "Stop", "Rewind", "Clone", "Bootstrap", "AbandonDirectory"):
        return not facts.alive
    return True


def _leaves(error: BaseException) -> list[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        return [leaf for e in error.exceptions for leaf in _leaves(e)]
    return [error]


def load_remembered(host: Host) -> tuple[Remembered, str]:
    return host.remembered or Remembered(), ""


def save_remembered(host: Host, facts: Remembered) -> None:
    if host.instance.disk_full:
        raise OSError(28, "No space left on device", "memory.json")
    host.remembered = facts
