"""The agent of one node: the nursery and the loop. The only file that knows all steps.

    observation = assemble(cells) → decision = decide(observation, memory) → carry out → wait for news

Everything that enters from the side (a change in the store, a request, a signal, PostgreSQL's death, an operation's
end) only wakes the loop, and is a fact of the next observation. The loop does no I/O of its own but the quick writes
that a decision asks for, each with a deadline; renewer, fence, REST and watchdog are tasks beside it.
"""

from __future__ import annotations

import faulthandler
import os
import re
import signal
import sys
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import msgspec
import trio
from msgspec.structs import replace

from pgha import __version__
from pgha import log as logging
from pgha.act import Actor
from pgha.act.callbacks import EVENTS, Callbacks
from pgha.act.context import Context
from pgha.act.wanted import STARTED_WITH, Wanted
from pgha.announce import Announcer, member_value
from pgha.as_started import as_started
from pgha.chronicle import Chronicle
from pgha.clock import Clock, Deadline, Instant, SystemClock, candidate_age_s, remaining_s
from pgha.config.check import programs_not_there
from pgha.config.cluster import normalised
from pgha.config.directories import agent_lock, data_directory_lock, pgpass, prepare_runtime_dir, prepare_state_dir
from pgha.config.load import Effective, Loaded, effective, load, needs_new_agent
from pgha.config.local import LocalConfig
from pgha.config.state import node_id
from pgha.dcs import Store
from pgha.dcs.keys import Keys, encode
from pgha.dcs.outage import Outage
from pgha.decide import decide
from pgha.decide.common import others
from pgha.decide.foreign import member_is_ours
from pgha.decide.lease import silent_s
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
from pgha.events import EventLog
from pgha.inbox import Inbox
from pgha.lock import watchdog
from pgha.lock.failsafe import HttpAsker, Rounds
from pgha.lock.fence import Fence
from pgha.lock.guard_client import GuardClient, GuardStatus, agent_flock, ensure_running
from pgha.lock.promise import Promises, Receiver
from pgha.lock.recipe import Proc
from pgha.lock.renewer import OUT_OF_SPACE, Renewer, Timing
from pgha.lock.watchdog import Watchdog
from pgha.machine import LocalMachine, Machine
from pgha.model.action import (
    AbandonDirectory,
    AcquireLock,
    Action,
    AnswerRequest,
    ApplyConfiguration,
    Bootstrap,
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
    StartStandby,
    Stop,
)
from pgha.model.decision import Decision, Memory
from pgha.model.failsafe import FailsafeFacts, Ping
from pgha.model.lock import Identity, LicenceState
from pgha.model.node import DataDirectoryFacts, PostgresFacts, WatchdogFacts
from pgha.model.observation import DcsFacts, Observation, Operation, Peer, Settings, Upstream, WrittenNames
from pgha.model.wal import HistoryRow, Position
from pgha.observe.cluster import ClusterObserver
from pgha.observe.data_directory import DataDirectoryReader
from pgha.observe.peers import PeersObserver
from pgha.observe.postgres import PostgresObserver, look_every_s, not_looked_since
from pgha.postgres.files import read_dynamic_cache, write_dynamic_cache
from pgha.postgres.server import Server
from pgha.provenance import Provenance
from pgha.reread import Reread
from pgha.rest.access import Access
from pgha.rest.published import Board, nothing_yet, publish_pass, store_gauges
from pgha.rest.requests import Answer
from pgha.rest.routes import App
from pgha.rest.stream import Readers
from pgha.surface import Surface
from pgha.systemd import status, watchdog_every_s

log = logging.Log("pgha")

#: A quick action's whole time, unless retry_timeout is shorter.
QUICK_S = 3.0
#: After a quick action failed, the next pass comes this much later at least: a store that refuses is not hammered.
PAUSE_AFTER_FAILURE_S = 0.1
#: Its death is noticed at once; whether it still answers is asked this often.
GUARD_ASKED_EVERY_S = 10.0
#: One that was killed is gone by then, unless the kernel holds it.
GUARD_EXIT_S = 1.0
#: What was changed and could not be written, or PostgreSQL not be told of, is tried again after this long.
APPLY_AGAIN_S = 5.0
#: A guard that is a service of its own is waited for so long at the start.
GUARD_SERVICE_S = 30.0
#: Whether a watchdog device has appeared is looked for this often.
WATCHDOG_LOOK_S = 10.0
#: Once the agent has settled, what starting it has used up goes back to the system.
SETTLED_AFTER_S = 20.0
#: systemd hears no more that the agent lives when its loop has not decided for so long (or three times loop_wait).
LOOP_STUCK_S = 60.0
#: A long operation says how far it is this often.
PROGRESS_EVERY_S = 10.0
#: What operations and quick actions may end with; anything else is our own mistake, and ends the agent loudly.
OPERATING_ERRORS = (OperationFailed, PostgresError, DcsError, GuardError, Refused, ConfigError, OSError, trio.TooSlowError)


class Agent:
    """One node's parts, and the loop over them."""

    def __init__(self, loaded: Loaded, *, path: str, environ: dict[str, str], clock: Clock, store: Callable[[LocalConfig], Store] | None = None,
                 machine: Machine | None = None, read_files: Callable[[], Loaded] | None = None) -> None:
        local = loaded.local
        self.read_files = read_files or (lambda: load(path, environ))
        self.path, self.environ, self.clock, self.local = path, environ, clock, local
        self.state_dir = prepare_state_dir(local, environ)
        self.runtime_dir = prepare_runtime_dir(local, environ)
        data_dir = Path(local.postgresql.data_dir)
        bin_dir = local.postgresql.bin_dir
        self.machine = machine = machine or LocalMachine(data_dir, bin_dir)
        self.me = Identity(name=local.name, node_id=node_id(self.state_dir), incarnation=machine.token())
        self.keys = Keys(local.namespace, local.scope)
        self.surface = Surface(local, in_thread=machine.in_thread)
        make_store = store or self.surface.open_store
        self.store, renewer_store = make_store(local), make_store(local)
        cached = _cached_config(data_dir)
        self.dynamic: dict[str, Any] | None = cached
        self.effective: Effective = effective(local, cached if cached is not None else normalised(dict(local.bootstrap.dcs)))
        self._config_revision = -2      # twice the revision, and 1 if the cluster is mixed
        self._news = trio.Event()

        self.outage = Outage(clock)
        self.renewer = Renewer(store=renewer_store, keys=self.keys, me=self.me, clock=clock,
                               timing=self._timing, changed=self._licence_changed, outage=self.outage)
        self.guard = GuardClient(self.runtime_dir, incarnation=self.me.incarnation, started_ns=clock.now().boot_ns, data_dir=data_dir,
                                 open_stream=machine.open_guard)
        self.fence = Fence(renewer=self.renewer, guard=self.guard, directory=machine.directory, clock=clock, wake=self.wake)
        self.renewer.narrower = self
        self.cluster = ClusterObserver(
            store=self.store, keys=self.keys, clock=clock, state_dir=self.state_dir, wake=self.wake, me=self.me.name, in_thread=machine.in_thread,
            settings=lambda: (self.settings.ttl_s, self.settings.loop_wait_s, self.settings.retry_timeout_s, self.settings.member_slots_ttl_s),
            outage=self.outage)
        self.wanted = Wanted(effective=lambda: self.effective, passfile=pgpass(local, environ), started_file=self.state_dir / STARTED_WITH)
        self.postgres = PostgresObserver(
            data_dir=data_dir, machine=machine, conninfo=self.wanted.local_conninfo, clock=clock,
            interval_s=lambda: look_every_s(self.settings), wake=self._postgres_changed,
            wanted=self.wanted.settings)
        self.reader = DataDirectoryReader(data_dir, bin_dir, in_thread=machine.in_thread, run=machine.run)
        self.peers = PeersObserver(clock=clock, wake=self.wake, http=self.surface.peers(machine))
        self.watchdog = Watchdog(machine.device(local.watchdog.device), mode=local.watchdog.mode, safety_margin_s=local.watchdog.safety_margin_s, clock=clock)
        self.announcer = Announcer(store=self.store, keys=self.keys, name=self.me.name, clock=clock, ttl_s=lambda: self.settings.ttl_s,
                                   loop_wait_s=lambda: self.settings.loop_wait_s, outage=self.outage)
        self.inbox = Inbox(store=self.store, keys=self.keys, clock=clock, view=lambda: self.cluster.facts.view, wake=self.wake,
                           look=self.postgres.position_asked)
        # One may have been given before this boot; while a server of this boot runs, the guard has watched over it since.
        unknown_ttl_s = self._longest_ttl_s() if self.settings.failsafe_mode and not machine.directory.processes() else 0.0
        self.promises = self.renewer.promises = Promises(self.runtime_dir, clock, boot_id=machine.boot_id(), unknown_ttl_s=unknown_ttl_s)
        self.failsafe = Rounds(renewer=self.renewer, clock=clock, timing=self._timing, wake=self.wake, conn_url=self._conn_url, api_url=self._api_url,
                               asker=HttpAsker(self.surface.peers(machine), authorization=self.surface.authorization))
        self.inbox.accept = self._accept_failsafe
        self.inbox.ask_others = self._ask_others
        self.reread = Reread(self._read_again)
        self.inbox.reread = self.reread.outcome
        self.events = EventLog(run=self.me.incarnation, node=self.me.name, scope=local.scope)
        self.chronicle = Chronicle(self.events)
        self.board = Board(nothing_yet(name=self.me.name, scope=local.scope, at=clock.now(), wall_s=clock.wall_s()))
        self.callbacks = Callbacks(
            run=machine.run, scope=local.scope, limit_s=lambda: self.local.pgha.callback_timeout_s,
            commands=lambda: {event: getattr(self.effective.postgresql.callbacks, event) for event in EVENTS})
        context = Context(
            clock=clock, me=self.me, store=self.store, keys=self.keys, renewer=self.renewer, fence=self.fence,
            server=Server(data_dir, bin_dir, config_file=Path(local.postgresql.config_dir) / "postgresql.conf" if local.postgresql.config_dir else None,
                          run=machine.run, launch=machine.launch),
            machine=machine, wanted=self.wanted, hurry=self.postgres.hurry, configuration_changed=self.postgres.configuration_changed,
            last_position=self._last_position, bootstrap_config=self._bootstrap_config, private_dir=self.runtime_dir,
            beside=self.callbacks.beside, told=self.callbacks, silent_s=lambda: silent_s(self.postgres.facts, clock.now()))
        self.actor = Actor(context)
        self.inbox.judge = self.actor.judge_configuration
        self.provenance = Provenance(member=self.me.name, effective=lambda: self.effective, sources=loaded.sources, left_out=lambda: self.wanted.left_out,
                                     facts=self.actor.gucs, wall_s=clock.wall_s)
        self.inbox.why = self.provenance.answer

        self.memory = Memory()
        self.number = 0
        self.shutting_down = False
        self.finished = False
        self._operation: Operation | None = None
        self._operation_scope: trio.CancelScope | None = None
        self._operation_number = 0
        self._ended: Operation | None = None
        self._directory_stale = True
        self._directory_news = trio.Event()
        self._checkpoint_pending = False
        self._applied: Any = None
        self._apply_again_at: Instant | None = None     # writing the configuration has failed
        self._owes_reload = False       # PostgreSQL is to read its files again in any case: others than ours may have changed, as certificates
        self._before_limit: tuple[PostgresFacts, float] | None = None   # what was known, and the limit, when the hang timeout changed
        self._said: tuple[str, ...] = ()
        self._summary = ""          # what was said last
        self._passed_at = clock.now()
        self._refusal = ""
        self._upstream: Upstream | None = None
        self._cloned = True         # a former agent may have left a replaced directory: only what the swap has marked is deleted
        self._held: tuple[object, ...] = ()
        self._looking_at_directory = trio.Lock()
        self._doubted_revision = 0
        self._failing: set[str] = set()
        self._progress_said_at: Instant | None = None
        self._watchdog_news = trio.Event()
        self._app: App | None = None
        self._nursery: trio.Nursery | None = None

    @property
    def settings(self) -> Settings:
        return self.effective.settings

    # --- news ----------------------------------------------------------------------------------------------------------

    def wake(self) -> None:
        """Let the loop run its next pass now."""
        self._news.set()

    def _licence_changed(self) -> None:
        if self.renewer.licence.failing_why.startswith(OUT_OF_SPACE):
            self.cluster.out_of_space()
        self.fence.changed()
        self.failsafe.changed()
        self._look_at_protection()
        self.wake()

    def _look_at_protection(self) -> None:
        """Whether a primary runs, or is about to, is news for the watchdog."""
        now = (self._protects(), self.renewer.licence.state)
        if now != self._held:
            self._held = now
            self._watchdog_news.set()

    def _protects(self) -> bool:
        about_to = self._operation is not None and self._operation.kind in ("Promote", "StartPrimary", "Restart") and self._licensed()
        return (self.fence.mode == "armed" or about_to) and not self.renewer.licence.endless

    def _licensed(self) -> bool:
        licence = self.renewer.licence
        return licence.state is LicenceState.HELD and licence.valid_until is not None and remaining_s(licence.valid_until, self.clock.now()) > 0

    async def narrow(self, valid_until: Deadline, ttl_s: float, *, sequence: int) -> None:
        """Before a shorter licence is sent (renewer.Narrower): the device first, which may take a while to fire, then the guard."""
        if self._protects() and self.watchdog.facts.active:
            self.watchdog.step(watchdog.Wanted(protecting=True, ttl_s=ttl_s, valid_until=valid_until))
        await self.fence.narrow(valid_until, ttl_s, sequence=sequence)

    def _accept_failsafe(self, ping: Ping) -> tuple[Answer, int]:
        """A leader without the store asks this node not to take over. One step: whoever adds an await here breaks a promise."""
        view, row, licence = self.cluster.facts.view, self.postgres.facts.row, self.renewer.licence
        verdict = self.promises.accept(ping, Receiver(
            name=self.me.name, failsafe_mode=self.settings.failsafe_mode, leads=self.postgres.facts.is_primary or self.fence.mode == "armed", licence=licence,
            epoch=max(licence.epoch, view.epoch.number if view else 0), epoch_holder=view.epoch.holder if view and view.epoch.number >= licence.epoch else "",
            ttl_s=self._longest_ttl_s()))
        if verdict.promise is not None:
            self.wake()
        return Answer(status=verdict.status, text=verdict.text), row.position if row is not None else 0

    async def _ask_others(self) -> dict[str, Peer]:
        """For a dry run: what is asked of the others while a decision needs it."""
        seen = self.board.current().observation
        return await self.peers.ask_once(others(seen)) if seen is not None and seen.dcs.view is not None else {}

    def _timing(self) -> Timing:
        return Timing(ttl_s=self.settings.ttl_s, loop_wait_s=self.settings.loop_wait_s, paused=self.settings.pause, mixed=self.settings.mixed)

    def _longest_ttl_s(self) -> float:
        """Of all that anybody may have meant who did not say."""
        return max(self.settings.ttl_s, self.cluster.facts.remembered_ttl_s, 30.0)

    def _postgres_changed(self) -> None:
        """PostgreSQL's processes have changed: what the data directory says may be old."""
        if self.postgres.facts.process in ("absent", "running"):
            self._directory_stale = self._directory_stale or self.postgres.facts.process == "absent"
            self._directory_news.set()
        self.wake()

    # --- the nursery ---------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Until the agent has been told to stop, and has. Raises what a task cannot go on from."""
        async with self.callbacks.running():        # they outlive the rest, for a bounded time
            await self._run()

    async def _run(self) -> None:
        await self._meet_guard()
        await self._rest_as_standby()
        listen = await self.surface.listen()
        app = self._app = App(self.board, self.inbox, clock=self.clock, access=self.surface.access, headers=listen.headers,
                              readers=Readers(self.events, clock=self.clock, at_most=lambda: self.local.pgha.event_readers))
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            await nursery.start(self.reread.run)
            await nursery.start(self._take_signals)
            await nursery.start(self.machine.serve, listen, app)
            await nursery.start(self.fence.run)
            await nursery.start(self.renewer.run)
            await nursery.start(self.failsafe.run)
            await nursery.start(self.postgres.run)
            await nursery.start(self.cluster.run)
            await nursery.start(self.peers.run)
            await nursery.start(self.announcer.run)
            nursery.start_soon(self._pet_watchdog)
            nursery.start_soon(self.surface.keep_members, self.board.current, self.board.wait_changed, self._take_access)
            nursery.start_soon(self._keep_directory_facts)
            nursery.start_soon(self._keep_guard)
            nursery.start_soon(self._give_memory_back)
            if (every_s := watchdog_every_s(self.environ)) is not None:
                nursery.start_soon(self._show_life, every_s)
            nursery.start_soon(self.cluster.keep_capacity, lambda: self.renewer.licence.state is LicenceState.HELD, lambda: self.settings.store_quota_bytes)
            await self._loop()
            nursery.cancel_scope.cancel()
        await self._part()

    async def _meet_guard(self) -> None:
        """Before anything else: no primary runs without a guard, and a restarted agent asks it how long it may."""
        await self._end_guard_stuck_before()
        status = await self._guard_there()
        primary = status.state in ("armed", "paused", "latched") and bool(self.machine.directory.processes())
        self.fence.adopt(status, primary=primary)
        log.info("guard", state=status.state, pid=status.pid, why=status.why)

    async def _rest_as_standby(self) -> None:
        """A former agent may have been killed between taking standby.signal away and starting the primary."""
        if not self.machine.directory.processes():
            try:
                await self.actor.be_standby_at_rest()
            except OPERATING_ERRORS as error:
                log.warning("standby.signal could not be written", why=str(error))

    async def _guard_there(self) -> GuardStatus:
        """The guard's status; one that systemd starts is waited for, any other is started. GuardError if there is none."""
        if self.local.pgha.guard == "agent":
            return await ensure_running(self.guard, self._guard_command(), log=str(self.runtime_dir / "guard.log"), spawn=self.machine.spawn)
        self.machine.notify(status("waiting for the guard's service"))
        with trio.move_on_after(GUARD_SERVICE_S):
            while True:
                try:
                    return await self.guard.status()
                except GuardError:
                    await trio.sleep(0.1)
        raise GuardError(f'no guard answers in {self.runtime_dir} within {GUARD_SERVICE_S:g} s: is its service running? (pgha.guard is "service")')

    def _guard_command(self) -> list[str]:
        return [sys.executable, *_own_program(), "guard", str(Path(self.path).absolute()), "--data-dir", self.local.postgresql.data_dir,
                "--runtime-dir", str(self.runtime_dir), "--agent-lock", str(agent_lock(self.local, self.environ))]

    async def _keep_guard(self) -> None:
        """Notice the guard's death, or that it is stuck, and start another: it resumes from its file."""
        answered: Proc | None = None
        while True:
            if self.fence.facts.reachable and (answered is None or answered.pid != self.fence.facts.pid):
                answered = self.machine.read_proc(self.fence.facts.pid)
            with trio.move_on_after(GUARD_ASKED_EVERY_S):
                await self._guard_ends_or_is_silent()
            try:
                self.fence.note(await self.guard.status())
            except GuardError as error:
                if self.finished:
                    return
                self.fence.unanswered(str(error))
                log.warning("guard does not answer", why=str(error))
                if isinstance(error, GuardSilent) and answered is not None:
                    await self._end_stuck_guard(answered)
                try:
                    self.fence.note(await self._guard_there())
                    self.fence.changed()
                except GuardError as again:
                    log.warning("there is no guard", why=str(again))
                    await trio.sleep(0.5)

    async def _guard_ends_or_is_silent(self) -> None:
        async with trio.open_nursery() as nursery:
            async def ends() -> None:
                await self.machine.wait_exit(self.fence.facts.pid)
                nursery.cancel_scope.cancel()

            nursery.start_soon(ends)
            await self.fence.silent.wait()
            nursery.cancel_scope.cancel()

    async def _end_guard_stuck_before(self) -> None:
        """One that is stuck since before this agent began, maybe beside a primary whose deadline passes now: it has told this
        agent nothing, but the socket tells who listens."""
        try:
            await self.guard.status()
        except GuardSilent:
            guard = self.machine.read_proc(self.guard.listener) if self.guard.listener else None
            if guard is not None:
                await self._end_stuck_guard(guard)
        except GuardError:
            return      # nobody listens

    async def _end_stuck_guard(self, guard: Proc) -> None:
        """It protects nobody, and another cannot start beside it. Before its deadline, so that the next one, which goes
        on from its file, is told the licence in time: left alone, it would kill a licensed primary when it thaws."""
        if self.machine.send(guard, signal.SIGKILL):
            log.warning("stuck guard ended", pid=guard.pid)
            with trio.move_on_after(GUARD_EXIT_S):
                await self.machine.exited(guard)

    async def _take_signals(self, *, task_status: Any = trio.TASK_STATUS_IGNORED) -> None:
        with self.machine.signals(signal.SIGTERM, signal.SIGINT, signal.SIGHUP) as received:
            task_status.started()
            async for number in received:
                if number == signal.SIGHUP:
                    self.reread.ask()
                else:
                    log.info("told to stop", signal=signal.Signals(number).name)
                    self.shutting_down = True
                self.wake()

    async def _pet_watchdog(self) -> None:
        """Only while a primary runs, or is about to, under this node's licence."""
        while True:
            self._watchdog_news = trio.Event()
            licence = self.renewer.licence
            protects = self._protects()
            if not protects and not self.watchdog.facts.active:
                self.watchdog.check(self.settings.ttl_s)
            next_s = self.watchdog.step(watchdog.Wanted(protecting=protects, ttl_s=licence.ttl_s or self.settings.ttl_s,
                                                        valid_until=licence.valid_until if licence.state is LicenceState.HELD else None))
            # Without a device that counts there is nothing to be in time for; the lock's coming and going wakes this.
            with trio.move_on_after(next_s if self.watchdog.facts.active else max(next_s, WATCHDOG_LOOK_S)):
                await self._watchdog_news.wait()

    async def _keep_directory_facts(self) -> None:
        """The data directory is looked at when something has changed, and now and then; a disk that hangs hangs only this."""
        while True:
            self._directory_news = trio.Event()
            await self._look_at_directory()
            with trio.move_on_after(10.0 if self.postgres.facts.alive else 1.0):
                await self._directory_news.wait()

    async def _look_at_directory(self) -> None:
        async with self._looking_at_directory:      # a look that began before an operation's end says nothing of it
            before = self.reader.facts
            facts = self.postgres.facts
            after = await self.reader.read_facts(running=facts.alive, timeline=facts.row.timeline if facts.row else 0, fresh=facts.row is not None and facts.row.replay_paused)
            if self._directory_stale or before != after:
                self._directory_stale = False
                self.wake()

    async def _give_memory_back(self) -> None:
        """Imports and the first passes leave a heap full of holes; an agent lives for months beside a database."""
        await trio.sleep(SETTLED_AFTER_S)
        self.machine.give_memory_back()

    # --- the loop ------------------------------------------------------------------------------------------------------

    async def _loop(self) -> None:
        while not self.finished:
            self._news = trio.Event()
            self._take_configuration()
            seen = self._assemble()
            self._passed_at = seen.now
            self._doubt(seen)
            self._look_at_protection()
            remembered = self.memory
            decision = decide(seen, remembered)
            self.memory = decision.memory
            if self.memory.said != remembered.said:
                log.info("asked by an operator", said=self.memory.said)
            self.renewer.give_mandate(decision.mandate, number=self.number)
            self.renewer.position = self._position_to_record(seen)
            self.failsafe.give(decision.failsafe)
            self.peers.ask(decision.ask_peers)
            if decision.ask_peers.names:
                self.postgres.position_asked()      # theirs are compared with this node's own
            self._publish(seen, decision, remembered)
            self._tell_systemd()
            self._tell_callbacks(seen)
            self._discard_replaced(seen)
            failed = await self._carry_out(decision)
            if self._done(decision):
                break
            with trio.move_on_after(PAUSE_AFTER_FAILURE_S if failed else decision.wake_in_s):
                if failed:
                    await trio.sleep(PAUSE_AFTER_FAILURE_S)
                await self._news.wait()

    def _assemble(self) -> Observation:
        self.number += 1
        self.promises.settle(self.cluster.facts.lock_seen.record)
        directory = self.reader.facts
        row = self.postgres.facts.row
        if row is not None and directory.history_of not in (0, row.timeline):
            self._directory_news.set()      # it has gone over to another timeline since
        if self._directory_stale:
            directory = DataDirectoryFacts(state="unknown", why="being looked at")
        return Observation(
            now=self.clock.now(), wall_s=self.clock.wall_s(), number=self.number, me=self.me, settings=self._settings_now(), dcs=self._dcs(), licence=self.renewer.licence,
            postgres=self.postgres.facts, directory=directory, guard=self.fence.facts, watchdog=self._watchdog_facts(), peers=dict(self.peers.facts),
            failsafe=FailsafeFacts(promise=self.promises.promise, missing=self.failsafe.missing),
            upstream=self._upstream, configured_upstream=self.wanted.upstream.name if self.wanted.upstream else "",
            written_names=WrittenNames(told=self.wanted.names_told, names=self.wanted.names), operation=self._operation, ended=self._ended, requests=self.inbox.requests, shutting_down=self.shutting_down)

    def _doubt(self, seen: Observation) -> None:
        """Another's record in the view while this node holds: the renewer, which knows better, is asked to make sure."""
        view = seen.dcs.view
        if view is not None:
            self.renewer.saw(view)
        if (view is not None and view.lock is not None and view.lock.incarnation != self.me.incarnation and seen.licence.state is LicenceState.HELD
                and view.lock_revision != self._doubted_revision):
            self._doubted_revision = view.lock_revision
            self.renewer.confirm()

    def _dcs(self) -> DcsFacts:
        """The store as observed; an answer to the renewer is a sign of life, too."""
        facts = self.cluster.facts
        heard = self.renewer.heard_at
        return replace(facts, heard_at=heard) if heard is not None and (facts.heard_at is None or heard > facts.heard_at) else facts

    def _settings_now(self) -> Settings:
        settings = not_looked_since(self.settings, self._before_limit, self.postgres.facts)
        again = self._apply_again_at is not None and remaining_s(self._apply_again_at, self.clock.now()) <= 0
        return replace(settings, configuration_changed=self._applied is not None and (again or self._applied != self._to_apply()),
                       dynamic_config=encode(self.dynamic) if self.dynamic else b"")

    def _bootstrap_config(self) -> bytes:
        return encode(normalised(dict(self.local.bootstrap.dcs)))

    def _to_apply(self) -> Any:
        wanted = self.effective.postgresql
        return (wanted.parameters, wanted.pg_hba, wanted.pg_ident, wanted.recovery_conf, wanted.custom_conf)

    def _watchdog_facts(self) -> WatchdogFacts:
        return self.watchdog.facts

    def _discard_replaced(self, seen: Observation) -> None:
        """A clone's predecessor is deleted once the clone streams."""
        row = seen.postgres.row
        if self._cloned and row is not None and row.receiver is not None and row.receiver.status == "streaming" and self._nursery is not None:
            self._cloned = False
            self._nursery.start_soon(self._discard)

    async def _discard(self) -> None:
        try:
            for path in await self.actor.discard_old():
                log.info("deleted the data directory that a clone has replaced", path=path)
        except OPERATING_ERRORS as error:
            log.warning("replaced data directory could not be deleted", why=str(error))

    def _position_to_record(self, seen: Observation) -> tuple[int, int]:
        row = seen.postgres.row
        return (row.position, row.timeline) if row is not None else self.renewer.position

    def _last_position(self) -> Position:
        lsn, timeline = self.renewer.position
        return Position(timeline=timeline, lsn=lsn)

    def _publish(self, seen: Observation, decision: Decision, remembered: Memory) -> None:
        if decision.summary.startswith("refused to hand over"):
            self._refusal = decision.summary.partition(": ")[2]
        problems = (*self.effective.problems, *(f"PostgreSQL setting left out: {name}: {why}" for name, why in self.wanted.left_out.items()))
        published = publish_pass(seen, decision, scope=self.local.scope, memory=remembered, failover_refusal=self._refusal, problems=problems,
                                 gauges={**store_gauges(seen), "configuration_problems": float(len(problems))})
        self.board.publish(published)
        said = _what_is_said(decision)
        news = said != self._said and (decision.situation != "busy" or bool(decision.actions))
        self.chronicle.tell(seen, decision, published, news=news)
        if news:
            self._said = said
            self._summary = f"PAUSE: {decision.summary}" if decision.paused else decision.summary
            log.info(self._summary, situation=decision.situation, **({"pass": self.number}))
        view = seen.dcs.view
        if view is not None and self.me.name not in view.members:
            self.announcer.gone()
        if view is not None and member_is_ours(seen).holds:
            self._announce(seen, decision)

    def _tell_systemd(self) -> None:
        """Ready from the first pass on, whether or not the store or PostgreSQL answers: nobody is to end an agent that waits."""
        operation = self._operation
        progress = f" ({operation.progress})" if operation is not None and operation.progress else ""
        self.machine.notify(f"{'STOPPING' if self.shutting_down else 'READY'}=1\n{status(self._summary + progress)}")

    def _tell_callbacks(self, seen: Observation) -> None:
        """Operations tell what they do; what is so without one is seen here: at the agent's start, or by somebody's hand."""
        row = seen.postgres.row
        if row is not None and seen.postgres.alive and self._operation is None:
            self.callbacks.seen("replica" if row.in_recovery else "primary")

    async def _show_life(self, every_s: float) -> None:
        """WatchdogSec=. An agent that is frozen, or whose loop no longer decides, endangers nobody: mandate, fence and guard
        see to that. But its node would stay out of the cluster until somebody looks; killed and started again, it comes back."""
        while True:
            if candidate_age_s(self._passed_at, self.clock.now()) < max(LOOP_STUCK_S, 3 * self.settings.loop_wait_s):
                self.machine.notify("WATCHDOG=1")
            await trio.sleep(every_s)

    def _announce(self, seen: Observation, decision: Decision) -> None:
        proxy = self.local.postgresql.proxy_address
        self.announcer.announce(member_value(
            seen, decision, api_url=self._api_url(), checkpoint_pending=self._checkpoint_pending, conn_url=self._conn_url(),
            proxy_url=f"postgres://{proxy}/{self.effective.postgresql.database}" if proxy else ""))

    def _api_url(self) -> str:
        return f"{self.local.restapi.base_url}/patroni"

    def _conn_url(self) -> str:
        return f"postgres://{self.local.postgresql.connect_address}/{self.effective.postgresql.database}"

    def _done(self, decision: Decision) -> bool:
        memory = decision.memory
        if self.shutting_down and memory.shutdown_done and self._operation is None and (memory.left_running or not self.postgres.facts.alive):
            self.finished = True
        return self.finished

    # --- carrying out --------------------------------------------------------------------------------------------------

    async def _carry_out(self, decision: Decision) -> bool:
        """In order; the first failure ends the pass. Whether anything failed."""
        for action in decision.actions:
            if isinstance(action, LongAction):
                self._begin(action)
                return False
            try:
                with trio.fail_after(max(QUICK_S, self.settings.retry_timeout_s) + 1.0):
                    await self._quick(action)
            except OPERATING_ERRORS as error:
                # Said when it begins and when it ends, not at every pass of a long outage.
                name = type(action).__name__
                quiet = name in self._failing or (self.outage.on and isinstance(error, DcsError | trio.TooSlowError))
                say = log.debug if quiet else log.warning
                say("action failed", action=name, why=str(error) or type(error).__name__)
                if not quiet:
                    self._failing.add(name)
                return True
            if type(action).__name__ in self._failing:
                self._failing.discard(type(action).__name__)
                log.info("action succeeds again", action=type(action).__name__)
        return False

    async def _quick(self, action: Action) -> None:
        deadline_s = min(QUICK_S, self.settings.retry_timeout_s)
        if isinstance(action, ReadCluster):
            await self.cluster.read()
            self.wake()
        elif isinstance(action, CancelOperation):
            self._cancel(action)
        elif isinstance(action, AnswerRequest):
            self.inbox.answer(action.id, action.status, action.text)
        elif isinstance(action, AcquireLock):
            config = self._bootstrap_config() if action.initialize_revision is not None else None
            await self.renewer.acquire(action, deadline_s=deadline_s, config=config)
            await self.cluster.read()       # what was written is seen by the next pass, which may then promote
            self.wake()
        else:
            assert not isinstance(action, LongAction), action
            if isinstance(action, ApplyConfiguration):
                self._owes_reload = self._owes_reload or self._applied == ()
                action = replace(action, force=self._owes_reload)
                self._applied, self._apply_again_at = self._to_apply(), self.clock.now().plus_s(APPLY_AGAIN_S)
            await self.actor.quick(action, deadline_s)
            if isinstance(action, ApplyConfiguration):
                self._apply_again_at, self._owes_reload = None, False

    def _begin(self, action: LongAction) -> None:
        assert self._operation is None, (self._operation, action)
        assert self._nursery is not None
        self._operation_number += 1
        kind = type(action).__name__
        if isinstance(action, Restart) and action.request_id:
            self.inbox.taken(action.request_id)
        self._watchdog_news.set()
        self._operation = Operation(kind=kind, id=self._operation_number, started_at=self.clock.now(), detail=getattr(action, "why", ""))
        self._nursery.start_soon(self._operate, action, self._operation)
        self.wake()

    def _cancel(self, action: CancelOperation) -> None:
        if self._operation is not None and self._operation.id == action.id and self._operation_scope is not None and action.while_in in ("", self._operation.progress):
            log.info("ending operation", kind=self._operation.kind, why=action.why)
            self._operation = replace(self._operation, cancelling=True)
            self._operation_scope.cancel()

    async def _operate(self, action: LongAction, operation: Operation) -> None:
        """Run one long operation beside the loop; its end is a fact."""
        facts: dict[str, Any] = {}
        ok, why = False, "it was ended"
        with trio.CancelScope() as self._operation_scope:
            try:
                facts = await self.actor.operate(action, self._progress)
                ok, why = True, ""
            except OPERATING_ERRORS as error:
                why = str(error) or type(error).__name__
                facts = {"final": bool(getattr(error, "final", False)), "unreached": is_unreached(error), "overdue": bool(getattr(error, "overdue", False))}
                log.warning("operation failed", kind=operation.kind, why=why)
        self._operation_scope = None
        self._note_operation(action, facts, ok=ok, why=why)
        if isinstance(action, InspectEndOfWal) and ok:
            await self.reader.note_end_of_wal(lsn=int(facts["end_of_wal"]), timeline=int(facts["end_of_wal_timeline"]))
        if ok:
            await self._wait_until_seen(action)
        self._directory_stale = True
        await self._look_at_directory()
        self._ended = replace(operation, ended_at=self.clock.now(), ok=ok, why=why, facts=facts)
        self._operation = None
        self.wake()

    async def _wait_until_seen(self, action: LongAction) -> None:
        """The end of an operation is a fact only once the observer has seen its effect: the next pass must not begin it again."""
        self.postgres.hurry(2.0)
        with trio.move_on_after(2.0):
            while not _effect_is_seen(action, self.postgres.facts):  # noqa: ASYNC110  (the observer wakes the loop, not us)
                await trio.sleep(0.005)

    def _progress(self, text: str) -> None:
        if self._operation is not None and self._operation.progress != text:
            self._operation = replace(self._operation, progress=text)
            now = self.clock.now()
            began = self._progress_said_at or self._operation.started_at
            if candidate_age_s(max(began, self._operation.started_at), now) >= PROGRESS_EVERY_S:
                self._progress_said_at = now
                log.info("operation goes on", operation=self._operation.kind, progress=text)
            self.wake()

    def _note_operation(self, action: LongAction, facts: dict[str, Any], *, ok: bool, why: str) -> None:
        if facts.get("checkpoint_pending") and self._nursery is not None:
            self._checkpoint_pending = True
            self._nursery.start_soon(self._checkpoint)
        if isinstance(action, Demote):
            self._checkpoint_pending = False
        if isinstance(action, InspectUpstream):
            self._upstream = _upstream_from(action, facts, why, self.clock.now())
        if isinstance(action, Clone | Rewind) and ok:
            self._upstream = None
            self._cloned = self._cloned or isinstance(action, Clone)
            if self.dynamic is not None and self._nursery is not None:
                self._nursery.start_soon(self._cache_configuration, encode(self.dynamic))       # a copy holds what its source knew, which may be nothing
        if isinstance(action, Restart) and action.request_id:
            self.inbox.answer(action.request_id, 200 if ok else 503, "restarted successfully" if ok else f"restart failed: {why}")

    async def _checkpoint(self) -> None:
        """After a promotion: pg_rewind of the others needs the new timeline in pg_control."""
        await self.actor.checkpoint()
        self._checkpoint_pending = False
        self.wake()

    # --- configuration -------------------------------------------------------------------------------------------------

    def _take_configuration(self) -> None:
        """A change of `/config` counts from the next pass on."""
        view = self.cluster.facts.view
        if self._applied is None and self.postgres.facts.alive:
            self._applied = self._to_apply()
            if self._nursery is not None:
                self._nursery.start_soon(self.actor.vet_configuration)
        if view is None or view.config is None:
            return
        mixed = view.is_mixed or self.renewer.licence.mixed
        mark = view.revision_of("config") * 2 + mixed
        if mark == self._config_revision:
            return
        self._config_revision = mark
        self._before_limit = (self.postgres.facts, self.settings.primary_hang_timeout_s)
        self.postgres.kick()        # how often it is looked at may have changed, too
        self.dynamic = view.config
        self.provenance.note(view.config, view.revision_of("config"), mixed=mixed)
        self.effective = effective(self.local, view.config, patroni_member_present=mixed)
        for problem in self.effective.problems:
            log.warning("configuration in the store", problem=problem)
        self.fence.changed()
        if self._nursery is not None:
            self._nursery.start_soon(self._cache_configuration, encode(view.config))

    async def _cache_configuration(self, text: bytes) -> None:
        data_dir = Path(self.local.postgresql.data_dir)

        def write() -> None:
            if (data_dir / "PG_VERSION").exists():
                write_dynamic_cache(data_dir, text)

        try:
            await self.machine.in_thread(write, abandon_on_cancel=True)
        except OSError as error:
            log.warning("configuration could not be cached", why=f"{error.filename}: {error.strerror}")

    async def _read_again(self) -> tuple[str, ...]:
        """See Reread. In a thread, since the disk may hang."""
        if not self.shutting_down:
            self.machine.notify("RELOADING=1")      # until the next pass says READY=1 again
        try:
            loaded = await self.machine.in_thread(self.read_files, abandon_on_cancel=True)
        except ConfigError as error:
            return self._not_reloaded(error.problems)
        fixed = needs_new_agent(self.local, loaded.local)
        if fixed:
            return self._not_reloaded([f"these keys need another start of the agent: {', '.join(fixed)}"])
        self.local, kept = as_started(self.local, loaded.local)
        self.provenance.sources = loaded.sources
        _set_up_log(self.local)
        for problem in kept:
            log.error("reload", problem=problem)
        for warning in loaded.warnings:
            log.warning("configuration", problem=warning)
        self.effective = effective(self.local, self.dynamic if self.dynamic is not None else normalised(dict(self.local.bootstrap.dcs)),
                                   patroni_member_present=self._config_revision % 2 == 1)
        self._applied = ()      # differs from anything: written and reloaded in the next pass that can
        self.wake()
        if self._nursery is not None:
            self._nursery.start_soon(self._warn_of_programs, self.local)
        await self.surface.reload(self.local, self._take_access)
        log.info("configuration reloaded")
        return ()

    def _not_reloaded(self, problems: Iterable[str]) -> tuple[str, ...]:
        for problem in problems:
            log.error("configuration not reloaded", problem=problem)
        self.wake()
        return tuple(problems)

    def _take_access(self, access: Access) -> None:
        """Who may change something, from the next request on."""
        if self._app is not None:
            self._app.access = access

    async def _warn_of_programs(self, local: LocalConfig) -> None:
        """A task of its own: where they lie may hang."""
        for warning in await self.machine.in_thread(lambda: list(programs_not_there(local)), abandon_on_cancel=True):
            log.warning("configuration", problem=warning)

    # --- the end -------------------------------------------------------------------------------------------------------

    async def _part(self) -> None:
        """PostgreSQL is stopped and the lock given back: say so in the member key, let the guard go.

        In pause both go on without the agent, and the guard stays with them.
        """
        if not self.memory.left_running:
            await self._say_stopped()
        with trio.move_on_after(1.0):
            await self.guard.aclose()
            await self.store.aclose()
        log.info("stopped" if not self.memory.left_running else "stopped; PostgreSQL runs on: pause")

    async def _say_stopped(self) -> None:
        with trio.move_on_after(1.0):
            try:
                seen = self._assemble()
                self._checkpoint_pending = False
                self._announce(seen, Decision(situation="stopping", summary="", state="stopped", role="replica"))
                await self.announcer.settle()
            except DcsError as error:
                log.warning("member key could not be written", why=str(error))
        if self.local.pgha.guard == "agent":
            try:
                await self.guard.bye()
            except GuardError as error:
                log.warning("guard did not take its leave", why=str(error))


def _cached_config(data_dir: Path) -> dict[str, Any] | None:
    try:
        text = read_dynamic_cache(data_dir)
        value = msgspec.json.decode(text) if text else None
    except (OSError, ValueError, RecursionError) as error:     # whatever stands there: the store will tell
        log.warning("cached configuration could not be read", why=str(error))
        return None
    return value if isinstance(value, dict) else None


#: Lengths of time, sizes, positions. What belongs to a name is none: to follow n2 instead of n1 is a change.
_NUMBER = re.compile(r"(?<![\w-])(?:[0-9A-F]+/[0-9A-F]+|-?[0-9]+(?:\.[0-9]+)?)(?!\w)")


def _what_is_said(decision: Decision) -> tuple[str, ...]:
    """A decision is logged when it changes, not when only its numbers do."""
    return ("PAUSE" if decision.paused else "", decision.situation, _NUMBER.sub("#", decision.summary), *(type(a).__name__ for a in decision.actions if isinstance(a, LongAction)))


def _effect_is_seen(action: LongAction, facts: PostgresFacts) -> bool:
    if isinstance(action, StartPrimary | Promote) or (isinstance(action, Restart) and action.as_primary):
        return facts.row is not None and not facts.row.in_recovery
    if isinstance(action, StartStandby | Restart):
        return facts.alive
    if isinstance(action, Demote | Stop | Rewind | Clone | Bootstrap | AbandonDirectory):
        return not facts.alive
    return True


def _upstream_from(action: InspectUpstream, facts: dict[str, Any], why: str, now: Instant) -> Upstream:
    if "timeline" not in facts:
        return Upstream(name=action.source.name, asked_at=now, ok=False, why=why, unreached=facts.get("unreached") is True)
    return Upstream(name=action.source.name, asked_at=now, ok=True, system_identifier=facts["system_identifier"], timeline=facts["timeline"], lsn=facts["lsn"],
                    in_recovery=facts["in_recovery"], history=msgspec.convert(facts["history"], tuple[HistoryRow, ...]))


def _own_program() -> list[str]:
    """How this very program is run: an archive, or the package from its directory."""
    script = Path(sys.argv[0])
    if zipfile.is_zipfile(script):
        return ["-IS", str(script.absolute())]      # the guard needs the standard library only
    return ["-m", "pgha"]


def _set_up_log(local: LocalConfig) -> None:
    logging.set_up(level=local.log.level, form=local.log.type, loggers=local.log.loggers, static=dict(local.log.static_fields), max_lines=local.log.max_queue_size)


def main(path: str) -> int:
    """`pgha run CONFIG`: exit code 0 after a clean stop; 1 if it could not go on; ConfigError before anything was begun."""
    environ = dict(os.environ)
    faulthandler.enable()       # systemd's watchdog ends us by SIGABRT: where we were belongs into the log
    loaded = load(path, environ)
    for name in loaded.consumed_env:
        os.environ.pop(name, None)
    _set_up_log(loaded.local)
    local = loaded.local
    for warning in (*loaded.warnings, *programs_not_there(local)):
        log.warning("configuration", problem=warning)
    prepare_state_dir(local, environ)
    prepare_runtime_dir(local, environ)
    with agent_flock(agent_lock(local, environ)) as ours, agent_flock(data_directory_lock(local, environ)) as alone:
        if not (ours and alone):
            raise OperationFailed(f"another agent runs on {local.postgresql.data_dir} (it holds {agent_lock(local, environ)})")
        log.info("starting", version=__version__, name=local.name, scope=local.scope, pid=os.getpid())
        agent = Agent(loaded, path=path, environ=environ, clock=SystemClock())
        code = 0
        try:
            trio.run(agent.run)
        except* PghaError as group:
            for error in _leaves(group):
                log.error("cannot go on", why=str(error), kind=type(error).__name__)
            code = 1
    return code


def _leaves(group: BaseExceptionGroup[Any]) -> list[BaseException]:
    return [leaf for e in group.exceptions for leaf in (_leaves(e) if isinstance(e, BaseExceptionGroup) else [e])]
