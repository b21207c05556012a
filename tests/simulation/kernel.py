"""A light stand-in for trio over the scheduler: tasks, events, locks, cancel scopes, nurseries, deadlines. For level (a).

The sources of pgha that wait (renewer, fence, operations, …) are loaded against it (`stepped.py`) and run as they are;
only who wakes them differs. What trio promises and pgha relies on holds here: a cancelled wait raises Cancelled at its
await, a scope absorbs its own, shielded scopes keep others' out, a nursery waits for its children. Every await of a
primitive gives way. Tasks of one moment run in the order in which they were woken.

A task belongs to a `Process`, which can be frozen (nothing of it runs, what happens to it meanwhile is seen when it
thaws) and killed (nothing of it ever runs again; no clean-up either, as after SIGKILL).
"""

from __future__ import annotations

import types
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import trio

from tests.simulation.scheduler import Event as Timer
from tests.simulation.scheduler import Scheduler

INFINITY = float("inf")
TASK_STATUS_IGNORED = trio.TASK_STATUS_IGNORED
TooSlowError = trio.TooSlowError
BrokenResourceError = trio.BrokenResourceError


class Cancelled(BaseException):
    """A scope around this wait was cancelled."""


class Over(BaseException):
    """The world has ended: coroutines are being thrown away."""


@types.coroutine
def _park() -> Any:
    return (yield)


_running: Task | None = None
_over = False


def running() -> Task:
    assert _running is not None, "outside of every task"
    return _running


class Process:
    """One operating system process of a host."""

    def __init__(self, scheduler: Scheduler, name: str, failed: Callable[[Process, BaseException], None] | None = None) -> None:
        self.scheduler = scheduler
        self.name = name
        self.alive = True
        self.frozen = False
        self.tasks: dict[Task, None] = {}
        self.dead: list[Task] = []              # never collected while the world runs: their clean-up must not happen
        self._deferred: list[tuple[Callable[..., None], tuple[Any, ...]]] = []
        self._failed = failed

    def call(self, callback: Callable[..., None], *arguments: Any) -> None:
        """Something happens to this process: now, or when it thaws, or never."""
        if not self.alive:
            return
        if self.frozen:
            self._deferred.append((callback, arguments))
        else:
            callback(*arguments)

    def after(self, seconds: float, callback: Callable[..., None], *arguments: Any) -> Timer:
        return self.scheduler.after(seconds, self.call, callback, *arguments)

    def soon(self, callback: Callable[..., None], *arguments: Any) -> Timer:
        return self.scheduler.at_once(self.call, callback, *arguments)

    def freeze(self) -> None:
        self.frozen = True

    def thaw(self) -> None:
        if not self.frozen:
            return
        self.frozen = False
        deferred, self._deferred = self._deferred, []
        for callback, arguments in deferred:
            self.scheduler.at(self.scheduler.now_ns, self.call, callback, *arguments)

    def kill(self) -> None:
        self.alive = False
        self.frozen = False
        self._deferred.clear()
        self.dead = list(self.tasks)
        self.tasks.clear()

    def spawn(self, work: Callable[..., Coroutine[Any, Any, Any]], *arguments: Any) -> Task:
        """A task of its own, under no nursery. What it raises is the process's failure."""
        task = Task(self, work(*arguments), None, self._task_failed)
        self.soon(task.step, None, None)
        return task

    def _task_failed(self, task: Task, error: BaseException | None) -> None:
        if error is not None and not isinstance(error, Cancelled):
            if self._failed is None:
                raise error
            self._failed(self, error)


class Task:
    __slots__ = ("process", "coroutine", "scope", "parked", "abort", "done", "_ended", "wake_timer")

    def __init__(self, process: Process, coroutine: Coroutine[Any, Any, Any], scope: CancelScope | None, ended: Callable[[Task, BaseException | None], None]) -> None:
        self.process = process
        self.coroutine = coroutine
        self.scope = scope
        self.parked = False             # waits for `wake`
        self.abort: Callable[[], None] | None = None
        self.done = False
        self._ended = ended
        process.tasks[self] = None

    def step(self, value: Any, error: BaseException | None) -> None:
        global _running
        if self.done or not self.process.alive:
            return
        before, _running = _running, self
        try:
            if error is not None:
                self.coroutine.throw(error)
            else:
                self.coroutine.send(value)
        except StopIteration:
            self._finish(None)
        except Over:
            raise
        except BaseException as raised:     # noqa: BLE001  (whoever started the task decides)
            self._finish(raised)
        finally:
            _running = before

    def _finish(self, error: BaseException | None) -> None:
        self.done = True
        self.process.tasks.pop(self, None)
        self._ended(self, error)

    def wake(self, value: Any = None) -> None:
        """Its wait is over."""
        if self.parked:
            self.parked, self.abort = False, None
            process = self.process
            process.scheduler.at_once(process.call, self.step, value, None)

    def deliver_cancel(self) -> None:
        """If it waits, and a scope around it is cancelled, the wait ends."""
        if self.parked and cancelled_by(self.scope) is not None:
            self.parked = False
            abort, self.abort = self.abort, None
            if abort is not None:
                abort()
            self.process.soon(self.step, None, Cancelled())


def cancelled_by(scope: CancelScope | None) -> CancelScope | None:
    """The innermost scope by which a wait within `scope` is cancelled."""
    while scope is not None:
        if scope.cancel_called:
            return scope
        if scope.shield:
            return None
        scope = scope.parent
    return None


async def wait(abort: Callable[[], None] | None) -> Any:
    """Until somebody calls the task's `wake`. `abort` forgets the waiter if the wait is cancelled."""
    if _over:
        raise Over
    task = _running
    assert task is not None, "outside of every task"
    if task.scope is not None and cancelled_by(task.scope) is not None:
        if abort is not None:
            abort()
        raise Cancelled
    task.parked, task.abort = True, abort
    return await _park()


async def checkpoint() -> None:
    if _over:
        raise Over
    task = running()
    if cancelled_by(task.scope) is not None:
        raise Cancelled
    task.parked = True
    task.wake()
    await _park()


class CancelScope:
    __slots__ = ("deadline", "shield", "cancel_called", "cancelled_caught", "parent", "holds_nursery", "_task", "_timer")

    def __init__(self, *, deadline: float = INFINITY, shield: bool = False) -> None:
        self.deadline = deadline
        self.shield = shield
        self.cancel_called = False
        self.cancelled_caught = False
        self.parent: CancelScope | None = None
        self.holds_nursery = False          # a nursery was opened within: it may hold other tasks than the one that opened it
        self._task: Task | None = None
        self._timer: Timer | None = None

    def __enter__(self) -> CancelScope:
        task = running()
        self._task, self.parent, task.scope = task, task.scope, self
        if self.deadline != INFINITY:
            scheduler = task.process.scheduler
            at_ns = round(self.deadline * 1e9)
            if at_ns <= scheduler.now_ns:
                self.cancel_called = True
            else:
                self._timer = scheduler.at(at_ns, task.process.call, self.cancel)
        return self

    def __exit__(self, kind: Any, error: BaseException | None, _trace: Any) -> bool:
        task = self._task
        assert task is not None
        if self._timer is not None:
            self._timer.cancel()
        task.scope = self.parent
        self._task = None
        if self.cancel_called and isinstance(error, Cancelled) and (self.shield or cancelled_by(self.parent) is None):
            self.cancelled_caught = True
            return True
        return False

    def cancel(self) -> None:
        if self.cancel_called:
            return
        self.cancel_called = True
        if self._task is not None and not self.holds_nursery:
            self._task.deliver_cancel()
        elif self._task is not None:
            for task in list(self._task.process.tasks):
                if task.parked:
                    task.deliver_cancel()


class _FailAfter:
    def __init__(self, seconds: float) -> None:
        self._scope = move_on_after(seconds)

    def __enter__(self) -> CancelScope:
        return self._scope.__enter__()

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> bool:
        if self._scope.__exit__(kind, error, trace):
            raise TooSlowError from None
        return False


def current_time() -> float:
    return running().process.scheduler.now_ns / 1e9


def move_on_after(seconds: float, *, shield: bool = False) -> CancelScope:
    task = _running
    assert task is not None, "outside of every task"
    return CancelScope(deadline=task.process.scheduler.now_ns / 1e9 + seconds, shield=shield)


def move_on_at(deadline: float) -> CancelScope:
    return CancelScope(deadline=deadline)


def fail_after(seconds: float) -> _FailAfter:
    return _FailAfter(seconds)


async def sleep(seconds: float) -> None:
    if seconds <= 0:
        await checkpoint()
        return
    if seconds == INFINITY:
        await wait(None)
        return
    task = running()
    timer = task.process.scheduler.after(seconds, _wake_task, task)
    await wait(timer.cancel)


def _wake_task(task: Task) -> None:
    task.wake()


async def sleep_forever() -> None:
    await wait(None)


class Event:
    __slots__ = ("_set", "_waiting")

    def __init__(self) -> None:
        self._set = False
        self._waiting: dict[Task, None] = {}

    def is_set(self) -> bool:
        return self._set

    def set(self) -> None:
        if not self._set:
            self._set = True
            waiting, self._waiting = self._waiting, {}
            for task in waiting:
                task.wake()

    async def wait(self) -> None:
        if self._set:
            await checkpoint()
            return
        task = running()
        self._waiting[task] = None
        await wait(lambda: self._waiting.pop(task, None))


class Lock:
    def __init__(self) -> None:
        self._owner: Task | None = None
        self._waiting: dict[Task, None] = {}

    def locked(self) -> bool:
        return self._owner is not None

    async def acquire(self) -> None:
        task = running()
        if self._owner is None:
            self._owner = task
            try:
                await checkpoint()
            except Cancelled:
                self.release()
                raise
            return
        self._waiting[task] = None
        await wait(lambda: self._waiting.pop(task, None))

    def release(self) -> None:
        self._owner = None
        for task in self._waiting:
            del self._waiting[task]
            self._owner = task
            task.wake()
            break

    async def __aenter__(self) -> None:
        await self.acquire()

    async def __aexit__(self, *_: Any) -> None:
        self.release()


class Nursery:
    def __init__(self) -> None:
        self.cancel_scope = CancelScope()
        self._children: dict[Task, None] = {}
        self._errors: list[BaseException] = []
        self._parent: Task | None = None
        self._empty = Event()

    def start_soon(self, work: Callable[..., Coroutine[Any, Any, Any]], *arguments: Any, name: Any = None) -> None:
        process = running().process if _running is not None else self._parent.process      # type: ignore[union-attr]
        task = Task(process, work(*arguments), self.cancel_scope, self._ended)
        self._children[task] = None
        process.soon(task.step, None, None)

    async def start(self, work: Callable[..., Coroutine[Any, Any, Any]], *arguments: Any) -> None:
        self.start_soon(work, *arguments)
        await checkpoint()

    def _ended(self, task: Task, error: BaseException | None) -> None:
        self._children.pop(task, None)
        if error is not None:
            self._errors.append(error)
            self.cancel_scope.cancel()
        if not self._children:
            self._empty.set()

    async def __aenter__(self) -> Nursery:
        self._parent = running()
        self.cancel_scope.__enter__()
        scope: CancelScope | None = self.cancel_scope
        while scope is not None:
            scope.holds_nursery = True
            scope = scope.parent
        return self

    async def __aexit__(self, kind: Any, error: BaseException | None, trace: Any) -> bool:
        if isinstance(error, Over | GeneratorExit):
            return False
        if error is not None:
            self._errors.append(error)
            self.cancel_scope.cancel()
        while self._children:
            self._empty = Event()
            try:
                await self._empty.wait()
            except Cancelled as cancelled:
                self._errors.append(cancelled)
                self.cancel_scope.cancel()
                await _without_cancel(self._empty, self._children)
        scope = self.cancel_scope
        real = [e for e in self._errors if not isinstance(e, Cancelled)]
        cancelled = [e for e in self._errors if isinstance(e, Cancelled)]
        absorbed = scope.__exit__(Cancelled if cancelled else None, cancelled[0] if cancelled else None, None)
        if real:
            raise BaseExceptionGroup("nursery", real) if any(not isinstance(e, Exception) for e in real) else ExceptionGroup("nursery", real)
        if cancelled and not absorbed:
            raise cancelled[0]
        return True


async def _without_cancel(event: Event, children: dict[Task, None]) -> None:
    with CancelScope(shield=True):
        while children:
            await event.wait()
            if children:
                break


def open_nursery() -> Nursery:
    return Nursery()


class _ToThread:
    """Work on the disk: done at once, and answered a moment later; a disk that hangs answers when it goes on."""

    @staticmethod
    async def run_sync(work: Callable[..., Any], *arguments: Any, abandon_on_cancel: bool = False) -> Any:
        result = work(*arguments)
        disk: Awaitable[None] | None = getattr(running().process, "disk_wait", None)
        if disk is not None:
            await disk()        # type: ignore[operator]
        else:
            await sleep(0.0005)
        return result


class _LowLevel:
    checkpoint = staticmethod(checkpoint)

    @staticmethod
    async def wait_readable(handle: Any) -> None:
        """`handle` is what the model gave for a pidfd: an object with an event for the exit."""
        await handle.exited.wait()


to_thread = _ToThread()
lowlevel = _LowLevel()


def throw_away(processes: list[Process]) -> None:
    """The world has ended: close every coroutine without letting it do anything."""
    global _over
    _over = True
    try:
        for process in processes:
            for task in [*process.dead, *process.tasks]:
                if not task.done:
                    try:
                        task.coroutine.close()
                    except BaseException:   # noqa: BLE001, S110  (whatever a thrown-away coroutine says)
                        pass
    finally:
        _over = False
