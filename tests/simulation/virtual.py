"""trio in virtual time, in an order that follows from a seed: the clock that carries the world along, and the gate at
which the tasks of frozen and dead processes wait.

`Run` uses what trio keeps for itself (deterministic scheduling, the run queue, the loop as a generator):
test_simulation_virtual fails when that goes away. There is no pump task: whenever every task waits, the clock goes to the next deadline or to the
world's next event, whichever is first, and lets the event happen.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from typing import Any

import trio
import trio._core._run as core

from tests.simulation.scheduler import Scheduler

#: To whom a task belongs; inherited by the tasks that it starts.
PROCESS: ContextVar[Process] = ContextVar("process")


class Dead(BaseException):
    """This process was killed: nothing that it still does reaches the world."""


class Process:
    """One operating system process that runs as trio tasks. Frozen: none of them runs. Dead: none ever does again."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.alive = True
        self.frozen = False
        self.parked: list[Any] = []

    @property
    def runs(self) -> bool:
        return self.alive and not self.frozen

    def check(self) -> None:
        """At every way to the world."""
        if not self.alive:
            raise Dead

    def freeze(self) -> None:
        self.frozen = True
        self._take()

    def thaw(self) -> None:
        if self.frozen:
            self.frozen = False
            if self.alive:
                self.release()

    def kill(self) -> None:
        self.alive = False
        self.frozen = False
        self._take()

    def _take(self) -> None:
        """What was about to run does not, either."""
        queue = core.GLOBAL_RUN_CONTEXT.runner.runq
        mine = [t for t in queue if t.context.get(PROCESS) is self]
        for task in mine:
            queue.remove(task)
        self.parked += mine

    def release(self) -> None:
        parked, self.parked = self.parked, []
        core.GLOBAL_RUN_CONTEXT.runner.runq.extend(parked)


class Gate(trio.abc.Instrument):
    """Keeps tasks of processes that do not run out of the run queue."""

    def __init__(self) -> None:
        self.open = False

    def task_scheduled(self, task: Any) -> None:
        process = task.context.get(PROCESS)
        if process is not None and not process.runs and not self.open:
            last = core.GLOBAL_RUN_CONTEXT.runner.runq.pop()
            assert last is task, (last, task)
            process.parked.append(task)


class VirtualClock(trio.abc.Clock):
    """The scheduler's time is trio's time. It does not go beyond `limit_ns`: then `reached` says so."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._now_s = 0.0
        self.limit_ns = 0
        self.reached = False

    def start_clock(self) -> None: ...

    def current_time(self) -> float:
        return self._now_s

    def deadline_to_sleep_time(self, deadline: float) -> float:
        return 0.0 if deadline <= self._now_s else 999999999.0

    def jump(self) -> None:
        """Every task waits: to what happens next."""
        scheduler, limit_ns = self._scheduler, self.limit_ns
        runner = core.GLOBAL_RUN_CONTEXT.runner
        queue, deadlines = runner.runq, runner.deadlines
        while not queue:
            deadline_ns = deadlines.next_deadline() * 1e9
            due_ns = scheduler.next_due()
            if due_ns is not None and due_ns <= deadline_ns:
                if due_ns > limit_ns:
                    break
                self._now_s = max(self._now_s, due_ns / 1e9)
                scheduler.run_due(due_ns)
            elif deadline_ns > limit_ns:
                break
            else:
                self._now_s = max(self._now_s, deadlines.next_deadline())
                scheduler.now_ns = max(scheduler.now_ns, math.ceil(deadline_ns))
                return      # the loop's next round finds it expired
        if not queue:
            self._now_s = max(self._now_s, limit_ns / 1e9)
            scheduler.run_due(limit_ns)
            self.reached = True


class Run:
    """trio's loop, turned by hand: nothing here waits for a descriptor, so that nothing asks the kernel."""

    def __init__(self, scheduler: Scheduler) -> None:
        core._ALLOW_DETERMINISTIC_SCHEDULING = True
        core._r.seed(f"trio/{scheduler.seed}")
        self._scheduler = scheduler
        self._gate = Gate()
        self._clock = VirtualClock(scheduler)
        self._runner = core.setup_runner(self._clock, [self._gate], False, None)
        self._over = trio.Event()
        self._started = False
        self._loop = core.unrolled_run(self._runner, self._main, ())
        self.nursery: trio.Nursery | None = None
        self.processes: list[Process] = []
        self._next: Any = None
        while self.nursery is None:
            self._turn()

    async def _main(self) -> None:
        async with trio.open_nursery() as self.nursery:
            await self._over.wait()
            self.nursery.cancel_scope.cancel()

    def _turn(self) -> bool:
        """Once around; False at the end."""
        try:
            idle_s = self._loop.send(self._next)
        except StopIteration:
            return False
        self._next = []
        if idle_s > 0:
            self._clock.jump()
        return True

    def until(self, seconds: float, stop: Callable[[], Any]) -> bool:
        """Let time pass; False as soon as `stop()`."""
        clock = self._clock
        clock.limit_ns, clock.reached = round(seconds * 1e9), False
        while not clock.reached:
            if stop():
                return False
            if not self._turn():
                raise AssertionError("trio has ended") from getattr(self._runner.main_task_outcome, "error", None)
        return not stop()

    def spawn(self, process: Process, main: Callable[[], Awaitable[None]]) -> None:
        """A task that stands for a process of the operating system."""
        async def begin() -> None:
            PROCESS.set(process)
            await main()

        assert self.nursery is not None
        if self._gate.open:
            return
        self.processes.append(process)
        self.nursery.start_soon(begin)

    def end(self) -> None:
        """The world is over: every task runs to its end, refused by everything."""
        self._gate.open = True
        for process in self.processes:
            process.alive = False
            process.release()
        self._over.set()
        self._clock.limit_ns = self._scheduler.now_ns + 10 ** 12
        try:
            self._turn_to_the_end()
        finally:
            core.GLOBAL_RUN_CONTEXT.__dict__.clear()
        self._runner.main_task_outcome.unwrap()

    def _turn_to_the_end(self) -> None:
        turns = 0
        while self._turn():
            turns += 1
            self._next = self._runner.io_manager.get_events(0)      # what trio tells itself (generators that are left)
            if turns > 100_000:
                left = list(self._runner.tasks)
                raise AssertionError(f"tasks do not end: {[(t, t.coro.cr_frame) for t in left[:5]]}")


async def pause(scheduler: Scheduler, seconds: float) -> None:
    """trio.sleep, cheaper: an event of the scheduler instead of a cancel scope."""
    task = trio.lowlevel.current_task()
    event = scheduler.after(seconds, trio.lowlevel.reschedule, task)

    def abort(_: Any) -> trio.lowlevel.Abort:
        event.cancel()
        return trio.lowlevel.Abort.SUCCEEDED

    await trio.lowlevel.wait_task_rescheduled(abort)
