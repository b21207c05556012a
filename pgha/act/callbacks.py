"""Tell the operator's callbacks what has become of PostgreSQL: which one, with which role, and when (compatibility spec 20).

Rules of this file:
* To tell is to put into a queue: nothing that acts on PostgreSQL, or on the lock, ever waits for a script.
* One at a time, in order, none ended by the next; each has `pgha.callback_timeout`.
* When events come faster than scripts end, what is no news any more is left out, and the log says so: a role that has
  changed again since, an older reload. The newest role change is never left out.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Literal

import trio
from msgspec import Struct

from pgha.act.context import Role, Told
from pgha.act.scripts import command_of, log, run_script
from pgha.postgres.programs import Run

Event = Literal["on_start", "on_stop", "on_restart", "on_reload", "on_role_change"]
EVENTS: tuple[Event, ...] = ("on_start", "on_stop", "on_restart", "on_reload", "on_role_change")

#: More than so many wait for none.
MOST_WAITING = 8
#: When the agent ends, what runs and waits has so much in all, at most: less than systemd's WatchdogSec= in pgha.service.
FAREWELL_S = 45.0
#: Of which two events only the newer one is worth a run.
ONLY_NEWEST: tuple[Event, ...] = ("on_role_change", "on_reload")


class Call(Struct, frozen=True, kw_only=True):
    event: Event
    role: Role


def queued(waiting: tuple[Call, ...], new: Call) -> tuple[tuple[Call, ...], tuple[tuple[Call, str], ...]]:
    """The queue with `new` in it, and what is left out of it, with why."""
    left_out = [(call, "a newer one has come") for call in waiting if call.event == new.event and new.event in ONLY_NEWEST]
    kept = [call for call in waiting if not (call.event == new.event and new.event in ONLY_NEWEST)]
    if len(kept) >= MOST_WAITING:
        oldest = next(call for call in kept if call.event != "on_role_change")
        kept.remove(oldest)
        left_out.append((oldest, f"{MOST_WAITING} are waiting already"))
    return (*kept, new), tuple(left_out)


class Callbacks(Told):
    """The queue, the task that runs what is in it, and the role that was told last.

    `commands()`: event → command, as configured now.
    """

    def __init__(self, *, run: Run, commands: Callable[[], Mapping[str, str]], limit_s: Callable[[], float], scope: str) -> None:
        self._run, self._commands, self._limit_s, self._scope = run, commands, limit_s, scope
        self._waiting: tuple[Call, ...] = ()
        self._running: Call | None = None
        self._news = trio.Event()
        self._idle = trio.Event()
        self._nursery: trio.Nursery | None = None
        self.role: Role | None = None     # None: nothing was told yet

    # --- what has happened ---------------------------------------------------------------------------------------------

    def promoted(self) -> None:
        """The promotion was asked for; writes are accepted in a moment."""
        self._role_is("primary")
        self._tell("on_role_change", "primary")

    def started(self, role: Role) -> None:
        """What ran as another role before has changed its role by this; else it has just started."""
        changed = self.role not in (None, role)
        self._role_is(role)
        self._tell("on_role_change" if changed else "on_start", role)

    def restarted(self, role: Role) -> None:
        self._role_is(role)
        self._tell("on_restart", role)

    def stopped(self) -> None:
        """In order or not; with the role that it had."""
        self._tell("on_stop", self.role or "replica")

    def reloaded(self) -> None:
        self._tell("on_reload", self.role or "replica")

    def seen(self, role: Role) -> None:
        """It runs so, by nobody's doing here: this agent has only just begun, or somebody has promoted it by hand."""
        if self.role != role:
            self.started(role)

    def _role_is(self, role: Role) -> None:
        self.role = role

    def _tell(self, event: Event, role: Role) -> None:
        if not self._commands().get(event):
            return
        self._waiting, left_out = queued(self._waiting, Call(event=event, role=role))
        for call, why in left_out:
            log.warning("callback left out", callback=call.event, role=call.role, why=why, running=self._running.event if self._running else "")
        self._news.set()

    def beside(self, work: Callable[[], Awaitable[None]]) -> None:
        """Run it under the same roof: it outlives whoever began it, and ends with the agent."""
        assert self._nursery is not None, "scripts are run within `running`"
        self._nursery.start_soon(work)

    # --- the task ------------------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def running(self) -> AsyncGenerator[None, None]:
        """Scripts run during the block; at its end what is left has FAREWELL_S."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._keep_running)
            self._nursery = nursery
            yield
            await self._finish()
            nursery.cancel_scope.cancel()

    async def _keep_running(self) -> None:
        while True:
            self._news = trio.Event()
            while self._waiting:
                self._running, *rest = self._waiting
                self._waiting = tuple(rest)
                await self._call(self._running)
            self._running = None
            self._idle.set()
            await self._news.wait()
            self._idle = trio.Event()

    async def _call(self, call: Call) -> None:
        command = self._commands().get(call.event, "")
        if not command:
            return      # the configuration has changed since
        log.info("callback begins", callback=call.event, role=call.role)
        ended = await run_script(call.event, [*command_of(command), call.event, call.role, self._scope], run=self._run, limit_s=self._limit_s(), spare_background=True)
        say = log.info if ended.ok else log.warning
        say("callback has ended", callback=call.event, role=call.role, how=str(ended), took_s=ended.took_s)

    async def _finish(self) -> None:
        limit_s = min(FAREWELL_S, self._limit_s())
        with trio.move_on_after(limit_s) as scope:
            while self._waiting or self._running:
                await self._idle.wait()
                await trio.lowlevel.checkpoint()
        if scope.cancelled_caught:
            log.warning("the agent ends before its callbacks have", waited_s=limit_s, running=self._running.event if self._running else "",
                        waiting=[call.event for call in self._waiting])
