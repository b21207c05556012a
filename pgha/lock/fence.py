"""This agent's side of the fence: it tells the guard how long writes are licensed, and acts itself at the deadline.

`mode` mirrors what the guard was last told about the data directory: armed (a primary may run until `fence_at`, or
while a committed pause lasts),
standby (only a server in recovery may run), offline (our own programs work on it). The guard enforces the same from
outside; both act on their own, neither waits for the other (safety model 8).

Rules of this file:
* nothing here waits for SQL, disk or the store;
* a licence is passed on only once it is known to be committed; a shorter one before it is sent.
"""

from __future__ import annotations

import signal
from collections.abc import Callable
from typing import Any, Literal

import trio

from pgha.clock import NEVER, Clock, Deadline, Instant, earlier, remaining_s
from pgha.errors import DcsError, GuardError
from pgha.lock.guard_client import GuardClient, GuardStatus
from pgha.lock.processes import Processes
from pgha.lock.renewer import Renewer
from pgha.log import Log
from pgha.model.lock import LicenceState, fence_at
from pgha.model.node import GuardFacts

log = Log("pgha.fence")

#: How long before the fence the last orderly means are used: ending clients first, then all at once.
SIGINT_BEFORE_S = 0.5
SIGQUIT_BEFORE_S = 0.1
#: A promotion or a start as primary is not begun with less of the licence left before the fence than this.
MINIMUM_TO_ARM_S = 0.5
GUARD_DEADLINE_S = 0.5


class Fence:
    """Owner of the guard's knowledge, and the agent's own hand at the deadline."""

    def __init__(self, *, renewer: Renewer, guard: GuardClient, directory: Processes, clock: Clock, wake: Callable[[], None]) -> None:
        self._renewer = renewer
        self._guard = guard
        self._directory = directory
        self._clock = clock
        self._wake_loop = wake
        self._news = trio.Event()
        self._speaking = trio.Lock()               # what the guard is told and what `mode` says change together
        self._told: Deadline | None = None         # the fence_at that the guard acknowledged last
        self._adopted: Deadline | None = None      # a former agent's, of a primary that was found running
        self._signalled: set[int] = set()
        self._lapsing = False
        self._to_tell = trio.Event()
        self.mode: Literal["unknown", "armed", "standby", "offline"] = "unknown"
        self.facts = GuardFacts()
        self.silent = trio.Event()      # set while the guard does not answer

    # --- ports for operations ------------------------------------------------------------------------------------------

    async def armed(self) -> None:
        """The guard knows the current licence, and enough of it is left to begin a primary. GuardError if not."""
        async with self._speaking:
            deadline = self._licensed_until()
            if deadline is None:
                raise GuardError(f"no licence to accept writes: {self._renewer.licence.state}")
            if self._lapsing:
                raise GuardError("the mandate has lapsed: writes are being ended")
            left_s = remaining_s(deadline, self._clock.now())
            if left_s < MINIMUM_TO_ARM_S:
                raise GuardError(f"the licence ends too soon: {left_s:.2f} s to the fence, {MINIMUM_TO_ARM_S} s wanted")
            await self._tell(deadline)
            self.mode = "armed"
            self._adopted = None
            self._signalled.clear()
        self.changed()

    async def narrow(self, valid_until: Deadline, ttl_s: float, *, sequence: int) -> None:
        """A write that shortens the licence is about to be sent (renewer.Narrower).

        A guard that a former agent has told of a pause knows of no end, also where this one has armed nothing.
        """
        async with self._speaking:      # an `armed` on its way must not be overtaken
            if self.mode == "armed" or self.facts.state == "paused":
                until = fence_at(valid_until, ttl_s)
                self._told = None       # unless it answers, nobody knows what it knows: it is told again what is licensed
                self.note(await self._guard.narrow(until, sequence=sequence, deadline_s=GUARD_DEADLINE_S))
                self._told = until

    async def standby(self) -> None:
        """Every process of the directory has exited; from here on only a server in recovery may run."""
        async with self._speaking:
            self.note(await self._guard.standby(deadline_s=GUARD_DEADLINE_S))
            self._settle("standby")

    async def offline(self, for_s: float) -> None:
        """Our own programs will work on the directory for at most `for_s` from now; ask again to go on."""
        async with self._speaking:
            self.note(await self._guard.offline(self._clock.now().plus_s(for_s), deadline_s=GUARD_DEADLINE_S))
            self._settle("offline")

    def adopt(self, status: GuardStatus, *, primary: bool) -> None:
        """At the agent's start: go on where the former agent and the guard stand. Grants nothing."""
        self.note(status)
        self.mode = "armed" if primary else "standby" if status.state == "standby" else "unknown"
        until = NEVER if status.state == "paused" else status.fence_at      # a pause of the former agent goes on
        self._adopted = until if primary else None
        self._told = status.fence_at

    @property
    def adopted_until(self) -> Deadline | None:
        """The fence of a primary that a former agent left running; None once this agent has its own licence."""
        return self._adopted if self.mode == "armed" and self._licensed_until() is None else None

    # --- the task ------------------------------------------------------------------------------------------------------

    def changed(self) -> None:
        """The licence or the mandate has changed."""
        self._news.set()
        self._to_tell.set()

    async def run(self, *, task_status: Any = trio.TASK_STATUS_IGNORED) -> None:
        """Fence at the deadline, whatever the guard does; beside it, pass every committed licence on to the guard."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._keep_telling)
            task_status.started()
            while True:
                self._news = trio.Event()
                if self.mode == "armed":
                    await self._act()
                with trio.move_on_after(self._next_in_s()):
                    await self._news.wait()

    async def _keep_telling(self) -> None:
        """A task of its own: a guard that does not answer must not delay our own hand at the deadline."""
        while True:
            self._to_tell = trio.Event()
            if self.mode == "armed":
                await self._pass_on()
            behind = self.mode == "armed" and self._told != self._licensed_until()
            with trio.move_on_after(0.3 if behind else 60.0):
                await self._to_tell.wait()

    def _next_in_s(self) -> float:
        if self.mode != "armed":
            return 60.0
        deadline = self._deadline()
        if deadline is None:
            return 0.05
        if deadline == NEVER:
            return 60.0
        left_s = remaining_s(deadline, self._clock.now())
        points = [left_s - SIGINT_BEFORE_S, left_s - SIGQUIT_BEFORE_S, left_s]
        points += [remaining_s(at, self._clock.now()) for at in (self._renewer.mandate.until, self._renewer.confirm_by) if at is not None]
        waits = [p for p in points if p > 0]
        return min(waits) if waits else 0.02

    def _licensed_until(self) -> Deadline | None:
        licence = self._renewer.licence
        if licence.state is not LicenceState.HELD or licence.valid_until is None:
            return None
        return fence_at(licence.valid_until, licence.ttl_s)

    def _deadline(self) -> Deadline | None:
        """When writes must have ended. None: now."""
        own = self._licensed_until()
        if own is None:
            return self._adopted if self._renewer.licence.state in (LicenceState.NONE, LicenceState.ACQUIRING) else None
        if own == NEVER:
            return own
        if self._renewer.confirm_failed():
            return None
        return own

    async def _pass_on(self) -> None:
        deadline = self._licensed_until()
        if deadline is None or deadline == self._told or remaining_s(deadline, self._clock.now()) <= 0:
            return
        try:
            async with self._speaking:
                # An `arm` that came after `standby` would have the guard fence a healthy standby at that moment. And read
                # again what is licensed: told under a newer sequence, an older deadline would stay until the next renewal.
                deadline = self._licensed_until()
                if self.mode == "armed" and deadline is not None and remaining_s(deadline, self._clock.now()) > 0:
                    await self._tell(deadline)
        except GuardError as error:
            self.unanswered(str(error))

    async def _tell(self, deadline: Deadline) -> None:
        licence = self._renewer.licence
        if deadline == NEVER:
            self.note(await self._guard.pause(sequence=licence.sequence, deadline_s=GUARD_DEADLINE_S))
        else:
            self.note(await self._guard.arm(sequence=licence.sequence, fence_at=deadline, deadline_s=GUARD_DEADLINE_S))
        self._told = deadline

    async def _act(self) -> None:
        now = self._clock.now()
        deadline = self._deadline()
        if deadline == NEVER:
            return      # in pause neither a silent store nor a stuck loop ends writes
        if deadline is None or remaining_s(deadline, now) <= 0:
            self._kill("the licence to accept writes has ended" if deadline is not None else "there is no licence to accept writes")
            return
        if self._mandate_lapsed(now) and self._licensed_until() is not None:
            await self._lapse()
            return
        left_s = remaining_s(deadline, now)
        if left_s <= SIGQUIT_BEFORE_S:
            self._signal(signal.SIGQUIT)
        elif left_s <= SIGINT_BEFORE_S:
            self._signal(signal.SIGINT)

    def _mandate_lapsed(self, now: Instant) -> bool:
        until = self._renewer.mandate.until
        return until is not None and remaining_s(until, now) <= 0

    async def _lapse(self) -> None:
        """The loop has given no mandate for too long: end writes in order, then give the lock back (safety model 10)."""
        if not self._directory.processes():
            return
        log.error("the mandate has lapsed: ending writes", kind=self._renewer.mandate.kind, given_for=self._renewer.mandate.why)
        self._lapsing = True
        try:
            await self._end_writes_and_release()
        finally:
            self._lapsing = False
        self._wake_loop()

    async def _end_writes_and_release(self) -> None:
        self._signal(signal.SIGINT)
        limit = self._clock.now().plus_s(2.0)
        deadline = self._deadline()
        if deadline is not None:
            limit = earlier(limit, deadline)
        while self._directory.processes() and remaining_s(limit, self._clock.now()) > 0:  # noqa: ASYNC110  (processes send no events)
            await trio.sleep(0.02)
        if self.mode != "armed":
            return
        while self._directory.processes():
            report = self._directory.kill_all()
            if report.killed:
                log.error("fenced", why="the mandate has lapsed", killed=len(report.killed), took_s=report.took_s)
            if deadline is not None and remaining_s(deadline, self._clock.now()) <= 0:
                return      # what cannot be ended in time keeps the lock from being released; the guard goes on
            await trio.sleep(0.02)
        try:
            async with self._speaking:
                # Whatever an operation still starts is killed by the guard; only then may the lock go.
                self.note(await self._guard.fence_now(deadline_s=GUARD_DEADLINE_S))
                self._settle("unknown")
            lsn, timeline = self._renewer.position
            await self._renewer.release(lsn=lsn, timeline=timeline, deadline_s=2.0)
        except (DcsError, GuardError, trio.TooSlowError) as error:
            log.warning("lock could not be released after the mandate lapsed; it expires", why=str(error))

    def _signal(self, number: signal.Signals) -> None:
        if number in self._signalled:
            return
        self._signalled.add(number)
        sent_to = self._directory.signal_postmaster(number)
        if sent_to:
            log.error("the licence is about to end: stopping PostgreSQL", signal=number.name, pid=sent_to)
        self._wake_loop()

    def _kill(self, why: str) -> None:
        report = self._directory.kill_all()
        if report.killed:
            log.error("fenced", why=why, killed=len(report.killed), took_s=report.took_s)
            self._wake_loop()
        if not report.killed and not self._directory.processes():
            # Everything is dead: nothing is left to enforce here until somebody arms again; the guard stays latched.
            self._settle("unknown")
            if self._renewer.licence.state is LicenceState.HELD:
                self._renewer.forget_expired()
            self._wake_loop()

    def _settle(self, mode: Literal["unknown", "standby", "offline"]) -> None:
        self.mode = mode
        self._adopted = None
        self._told = None
        self._signalled.clear()

    def unanswered(self, why: str) -> None:
        """The guard does not answer: it, or the next one from its file, fences at the last deadline that it was told."""
        if self.facts.reachable:
            log.error("guard does not answer; it fences at the last deadline that it knows", why=why)
            self._wake_loop()
        self._told = None
        self.silent.set()
        self.facts = GuardFacts(reachable=False, state=self.facts.state, fence_at=self.facts.fence_at, pid=self.facts.pid, why=why)

    def note(self, status: GuardStatus) -> None:
        """What the guard said last."""
        if self.silent.is_set():
            self.silent = trio.Event()
        self.facts = GuardFacts(reachable=True, state=status.state, fence_at=status.fence_at, pid=status.pid)
