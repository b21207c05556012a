"""What every operation has at hand: this node, its server, its lock. Built once by the agent.

`Fence` and `Renewer` are ports: pgha.lock.fence.Fence and pgha.lock.renewer.Renewer fit them, and so do the small ones
of the tests. Operations never speak to the guard themselves, so that what it was told last is known in one place.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, ParamSpec, Protocol, TypeVar

from pgha.act.wanted import Wanted
from pgha.clock import Clock
from pgha.dcs import Store
from pgha.dcs.keys import Keys
from pgha.lock.processes import Processes
from pgha.log import Log
from pgha.machine import Machine
from pgha.model.action import AcquireLock
from pgha.model.lock import Identity, Licence
from pgha.model.wal import Position
from pgha.postgres.server import Server

P = ParamSpec("P")
T = TypeVar("T")

Progress = Callable[[str], None]
Role = Literal["primary", "replica", "standby_leader"]

log = Log("pgha.act")


class Fence(Protocol):
    """What the guard must know before something is done. Each raises GuardError if it did not acknowledge."""

    async def armed(self) -> None:
        """The guard knows the current licence, and enough of it is left to begin a primary."""
        ...

    async def standby(self) -> None:
        """Everything of the directory has exited, standby.signal is there: only a server in recovery may run."""
        ...

    async def offline(self, for_s: float) -> None:
        """Our own programs work on the directory, for at most `for_s` seconds from now."""
        ...


class Renewer(Protocol):
    """The lock's owner."""

    @property
    def licence(self) -> Licence:
        """As the renewer knows it now."""
        ...

    async def acquire(self, action: AcquireLock, *, deadline_s: float, config: bytes | None = None) -> None:
        """Returns once it is committed. Refused, DcsError."""
        ...

    async def release(self, *, lsn: int, timeline: int, deadline_s: float) -> None:
        """Returns once it is committed. DcsError or trio.TooSlowError: unknown; the record expires."""
        ...


class Told:
    """Who wants to know what has become of PostgreSQL: callbacks.Callbacks; this one, nobody. Nothing here waits, or fails."""

    def promoted(self) -> None:
        """The promotion has been asked for, under licence and guard: writes are accepted in a moment."""

    def started(self, role: Role) -> None:
        """It has started, and accepts what its role accepts, or will."""

    def restarted(self, role: Role) -> None:
        """It was stopped and started, on request."""

    def stopped(self) -> None:
        """It ran, and was stopped, in order or not."""

    def reloaded(self) -> None:
        """It was told to read its configuration again."""


@dataclass(frozen=True, kw_only=True)
class Context:
    """`machine` is where all of it happens, `server` runs PostgreSQL there, `wanted` knows how it is to be configured.

    `hurry(for_s)`: the observer looks every few milliseconds for a while. `configuration_changed()`: it reads the
    settings again. `last_position()`: the furthest position that this node is known to have reached.
    `bootstrap_config()`: the JSON that becomes `/config` in the same transaction as a new cluster's first lock.
    `private_dir`: where only this agent's user may look (socket of a server that nobody else may reach).
    `beside(work)`: begin it, not waited for, ended with the agent at the latest (None: nobody would own it).
    `told`: hears of starts, stops and promotions. `silent_s()`: since the server's last sign of life.
    """

    clock: Clock
    me: Identity
    store: Store
    keys: Keys
    renewer: Renewer
    fence: Fence
    server: Server
    machine: Machine
    wanted: Wanted
    hurry: Callable[[float], None]
    configuration_changed: Callable[[], None]
    last_position: Callable[[], Position]
    bootstrap_config: Callable[[], bytes]
    private_dir: Path
    beside: Callable[[Callable[[], Awaitable[None]]], None] | None = None
    told: Told = Told()     # noqa: RUF009  (it holds nothing)
    silent_s: Callable[[], float] = lambda: 0.0

    @property
    def data_dir(self) -> Path:
        return self.server.data_dir

    @property
    def directory(self) -> Processes:
        """The server's processes."""
        return self.machine.directory

    async def on_disk(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run file work in a thread. It is not left behind when cancelled: what comes after it may undo it."""
        return await self.machine.in_thread(partial(work, *args, **kwargs))
