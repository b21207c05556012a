"""The guard as a process of its own: what pgha.lock.guard does, over the model's data directory. The rules are the real ones.

It can be frozen, killed and started again; what it holds survives in `GuardFile` (tmpfs: gone with a reboot). Requests
arrive and are answered a moment later, or never. Notices (a server appears, standby.signal goes, a postmaster dies)
reach it as inotify and pidfd would bring them.
"""

from __future__ import annotations

from collections.abc import Callable

from pgha.clock import Instant, remaining_s
from pgha.lock.guard_state import Facts, Held, Look, Role, after_look, answer, judge, lapse, latched, unarmed
from pgha.lock.protocol import Answer, Op, Request, State
from tests.simulation.clocks import HostClock
from tests.simulation.kernel import Process
from tests.simulation.postgres import Instance
from tests.simulation.scheduler import Event, Scheduler
from tests.simulation.trace import Trace

SIGINT_BEFORE_S = 0.5
SIGQUIT_BEFORE_S = 0.1
NOTICE_S = 0.001
TICK_S = 1.0


class GuardFile:
    """The file in the runtime directory."""

    def __init__(self) -> None:
        self.held: Held | None = None


class GuardProcess:
    """One run of the guard."""

    def __init__(self, name: str, scheduler: Scheduler, clock: HostClock, instance: Instance, file: GuardFile, trace: Trace, pid: int) -> None:
        self.name = f"{name}/guard"
        self.pid = pid
        self.process = Process(scheduler, self.name)
        self._scheduler = scheduler
        self._clock = clock
        self._instance = instance
        self._file = file
        self._trace = trace
        self._chance = scheduler.stream(self.name)
        self._timer: Event | None = None
        self._tick: Event | None = None
        self._warned: tuple[Instant | None, int] = (None, 0)
        self.exit_listeners: list[Callable[[], None]] = []
        now = clock.now()
        unknown = file.held is None
        self.held: Held = file.held if file.held is not None else unarmed(Held(), now, "no file of this boot")
        instance.on_change.append(self._noticed)
        self._due()
        if unknown:
            if not instance.lives:
                self.held = Held(why="no server runs")
            elif instance.postmaster is not None and judge(self.look()) is not Role.PRIMARY:
                self.held = Held(State.STANDBY, why="a server in recovery was found running")
        else:
            self._look_again()
        if self.held.state is State.LATCHED and instance.lives:
            self._kill("latched")
        self._save()
        trace(self.name, "runs", state=str(self.held.state), why=self.held.why.replace(" ", "_"))
        self._schedule()

    # --- time --------------------------------------------------------------------------------------------------------------

    def _schedule(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        held, now = self.held, self._clock.now()
        if held.until is not None:
            left_s = remaining_s(held.until, now)
        elif held.fence_at is not None:
            sent = self._warned[1] if self._warned[0] == held.fence_at else 0
            left_s = remaining_s(held.fence_at, now) - (SIGINT_BEFORE_S, SIGQUIT_BEFORE_S, 0.0)[sent]
        else:
            return
        # poll() rounds up to its millisecond.
        self._timer = self.process.after(max(0.0, self._clock.true_ns_of(left_s) / 1e9) + 0.001, self._woken)

    def _woken(self) -> None:
        self._due()
        self._schedule()

    def _due(self) -> None:
        now = self._clock.now()
        after = lapse(self.held, now)
        if after is not self.held:
            self._fence(after)
        elif after.fence_at is not None:
            left_s = remaining_s(after.fence_at, now)
            due = 2 if left_s <= SIGQUIT_BEFORE_S else 1 if left_s <= SIGINT_BEFORE_S else 0
            sent = self._warned[1] if self._warned[0] == after.fence_at else 0
            if due > sent:
                self._warned = (after.fence_at, due)
                if self._instance.postmaster is not None:
                    self._trace(self.name, "licence is ending", signal="SIGINT" if due == 1 else "SIGQUIT")
                    self._instance.signal("INT" if due == 1 else "QUIT")

    def _fence(self, after: Held) -> None:
        self._set(after)
        if self._instance.lives:
            self._kill(after.why)

    def _kill(self, why: str) -> None:
        self._trace(self.name, "fenced", why=why.replace(" ", "_"))
        self._instance.kill_all()

    # --- the data directory --------------------------------------------------------------------------------------------------

    def look(self) -> Look:
        data, instance = self._instance.dir, self._instance
        there = data.content != "missing"
        status = instance.status()
        state = {"shut down": 1, "shut down in recovery": 2, "shutting down": 3, "in crash recovery": 4, "in archive recovery": 5, "in production": 6,
                 "starting up": 0}.get(data.state, -1)
        server = instance.postmaster
        return Look(exists=there, identity=(0, 0, 1) if there else None, postmaster_pid=server.pid if server else 0, status_before=status, control_state=state,
                    status_after=status, standby_signal=data.standby_signal, watched=True)

    def _noticed(self, what: str) -> None:
        if self.process.alive and what in ("started", "exited", "signal_removed", "role", "files", "thawed"):
            self.process.after(NOTICE_S, self._notice, what)

    def _notice(self, what: str) -> None:
        instance = self._instance
        self._due()
        if what == "exited" and instance.postmaster is None and instance.lives and not instance.single_user and self.held.state is not State.OFFLINE:
            self._kill("orphans")
            return
        if self.held.state is State.LATCHED and instance.lives and not instance.single_user:
            self._kill("latched")
            return
        if self.held.state is State.STANDBY and what == "signal_removed" and instance.postmaster is not None:
            self._fence(latched(self.held, "standby.signal was removed under a running server"))
            return
        self._look_again()
        self._schedule()

    def _look_again(self) -> None:
        after = after_look(self.held, self.look(), server=self._instance.postmaster is not None, now=self._clock.now())
        if after is self.held:
            return
        if after.state is State.LATCHED:
            self._fence(after)
        else:
            self._set(after)

    def _set(self, held: Held) -> None:
        if (held.state, held.why) != (self.held.state, self.held.why):
            self._trace(self.name, "state", state=str(held.state), why=held.why.replace(" ", "_"))
        self.held = held
        self._save()

    def _save(self) -> None:
        self._file.held = self.held

    # --- requests -------------------------------------------------------------------------------------------------------------

    def ask(self, request: Request, answered: Callable[[Answer], None]) -> None:
        """`answered` once it has been dealt with, unless the guard is dead or frozen."""
        self.process.after(0.0001 + 0.0004 * self._chance.random(), self._serve, request, answered)

    def _serve(self, request: Request, answered: Callable[[Answer], None]) -> None:
        self._due()
        facts = Facts()
        if request.op in (Op.STANDBY, Op.OFFLINE, Op.BYE):
            facts = Facts(0 if not self._instance.lives else 1, None if self._instance.disk_hung else self.look())
        verdict = answer(self.held, request, facts, self._clock.now())
        if not verdict.error:
            if verdict.fence:
                self._fence(verdict.held)
            elif verdict.held != self.held:
                self._set(verdict.held)
        self._schedule()
        held = self.held
        reply = Answer(not verdict.error, held.state, held.fence_at, held.until, held.agent, held.sequence, verdict.error,
                       {"pid": self.pid, "why": held.why, "postmaster": 0})
        self._scheduler.after(0.0001, answered, reply)

    # --- its own life -----------------------------------------------------------------------------------------------------------

    def kill(self) -> None:
        self.process.kill()
        if self._noticed in self._instance.on_change:
            self._instance.on_change.remove(self._noticed)
        listeners, self.exit_listeners = self.exit_listeners, []
        for listener in listeners:
            listener()
