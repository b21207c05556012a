"""This machine, as the agent uses it: the one seam between the agent and the world.

Whatever acts on processes, programs, other machines, the guard, the watchdog device, or waits for them, comes from here;
agent.py hands it to those who need it. Time is pgha.clock's, the store dcs.Store's. Files are the file system's for
everybody, but work on them is run where `in_thread` says.

`LocalMachine` is the real one, and only delegates. The simulation has another, in one process and in virtual time, so
that what is tested there is the agent as it ships.
"""

from __future__ import annotations

import ctypes
import gc
import os
import secrets
import signal
import ssl
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AbstractContextManager, asynccontextmanager
from pathlib import Path
from typing import Protocol, TypeVar

import httpx
import trio

from pgha.clock import boot_id
from pgha.lock import guard_client, recipe
from pgha.lock.guard_client import GuardStream
from pgha.lock.processes import Processes
from pgha.lock.recipe import Proc
from pgha.lock.watchdog import Device, LinuxDevice
from pgha.log import Log
from pgha.postgres import basebackup, connection, processes, programs, server, threads, wal_files
from pgha.postgres.connection import Connection
from pgha.postgres.controldata import ControlData
from pgha.postgres.processes import Postmaster
from pgha.postgres.programs import Completed
from pgha.postgres.wal_files import ShutdownPositions
from pgha.rest.server import Application, Listen, serve
from pgha.systemd import Notifier

log = Log("pgha")

T = TypeVar("T")


class HttpClient(Protocol):
    """Requests to other members. Whoever asks has the deadline."""

    async def request(self, method: str, url: str, *, body: bytes = b"", authorization: str = "", largest_bytes: int) -> tuple[int, bytes]:
        """Status and body. ConnectionError if there was no answer, ValueError for a longer one or a URL that is none."""
        ...


class Machine(Protocol):
    """Of one data directory. Nothing here has a policy, and nothing waits but what is `async`."""

    # --- the data directory's processes ---

    @property
    def directory(self) -> Processes:
        """All of them: found and killed."""
        ...

    def adopt(self) -> Postmaster | None:
        """A handle on the living postmaster, whoever started it."""
        ...

    def read_proc(self, pid: int) -> Proc | None:
        """Any process; None if there is none."""
        ...

    def send(self, proc: Proc, number: signal.Signals) -> bool:
        """Signal this very process; False if the kernel refused."""
        ...

    def ticks_now(self) -> int:
        """The present in the unit of `Proc.start_ticks`."""
        ...

    async def exited(self, proc: Proc) -> None:
        """Return when it has exited."""
        ...

    async def wait_exit(self, pid: int) -> None:
        """Until the process has ended; one that is not there has."""
        ...

    def kill_copies(self, target: Path) -> list[int]:
        """Kill what a dead pg_basebackup into `target` has left; their pids. (Reads all of /proc: file work.)"""
        ...

    # --- PostgreSQL ---

    async def run(
        self, argv: Sequence[str | Path], *, deadline_s: float, env: Mapping[str, str] | None = None, cwd: Path | None = None,
        on_output: Callable[[bytes], None] | None = None, on_error_output: Callable[[bytes], None] | None = None,
        dies_with_us: bool = False, spare_background: bool = False,
    ) -> Completed:
        """See programs.run."""
        ...

    async def launch(self, argv: Sequence[str], *, data_dir: Path, log_path: Path) -> Postmaster | int:
        """See server.launch."""
        ...

    async def connect(self, conninfo: Mapping[str, str | int], *, deadline_s: float) -> Connection:
        """See Connection.connect."""
        ...

    async def answers_startup(self, host: str, port: int, *, deadline_s: float) -> bool:
        """See startup.answers_startup."""
        ...

    async def shutdown_positions(self, said: ControlData, *, deadline_s: float) -> ShutdownPositions:
        """See wal_files."""
        ...

    async def end_of_wal(self, said: ControlData, *, timeline: int, from_lsn: int, deadline_s: float) -> int:
        """See wal_files."""
        ...

    # --- files ---

    def boot_id(self) -> str:
        """This boot: what was not synced before another one may be lost."""
        ...

    async def in_thread(self, work: Callable[[], T], *, abandon_on_cancel: bool = False) -> T:
        """See threads.in_thread."""
        ...

    # --- the guard and the device ---

    async def open_guard(self, path: str) -> GuardStream:
        """A connection to the guard that listens there. OSError."""
        ...

    async def spawn(self, argv: Sequence[str], *, log: str = "/dev/null") -> None:
        """Start a guard that outlives us. GuardError."""
        ...

    def device(self, path: str) -> Device:
        """The watchdog device."""
        ...

    # --- other machines and people ---

    def http(self, verify: ssl.SSLContext | bool) -> AbstractAsyncContextManager[HttpClient]:  # noqa: FBT001  (httpx's own word)
        """A client for as long as it is wanted."""
        ...

    async def serve(self, listen: Listen, app: Application, *, task_status: trio.TaskStatus[list[tuple[str, int]]] = trio.TASK_STATUS_IGNORED) -> None:
        """See rest.server.serve."""
        ...

    def signals(self, *numbers: signal.Signals) -> AbstractContextManager[AsyncIterator[int]]:
        """What we are sent, from the beginning of the block on."""
        ...

    def notify(self, state: str) -> None:
        """Tell the service manager. Never blocks."""
        ...

    def token(self) -> str:
        """16 hexadecimal digits that nobody else has."""
        ...

    def give_memory_back(self) -> None:
        """What starting has used up, to the system."""
        ...


class _Httpx:
    def __init__(self, client: httpx.AsyncClient) -> None:
        self._client = client

    async def request(self, method: str, url: str, *, body: bytes = b"", authorization: str = "", largest_bytes: int) -> tuple[int, bytes]:
        content = body or None
        # As it is, not unpacked: a kilobyte of gzip may hold a megabyte of nothing.
        headers = {"Accept-Encoding": "identity", **({"Content-Type": "application/json"} if body else {}),
                   **({"Authorization": authorization} if authorization else {})}
        received = bytearray()
        try:
            async with self._client.stream(method, url, content=content, headers=headers) as response:
                # httpx reads through generators within generators, which only an exception at the innermost one winds up in
                # order: so let one wait be cancelled.
                with trio.CancelScope() as scope:
                    async for chunk in response.aiter_raw():
                        received += chunk
                        if len(received) > largest_bytes:
                            scope.cancel()
                if len(received) > largest_bytes:
                    raise ValueError(f"longer than {largest_bytes / 1048576:g} MiB")
        except httpx.InvalidURL as error:
            raise ValueError(str(error)) from error
        except httpx.HTTPError as error:
            raise ConnectionError(str(error) or type(error).__name__) from error
        return response.status_code, bytes(received)


@asynccontextmanager
async def http(verify: ssl.SSLContext | bool) -> AsyncGenerator[HttpClient, None]:  # noqa: FBT001  (httpx's own word)
    """See Machine.http."""
    limits = httpx.Limits(max_connections=32, max_keepalive_connections=16)
    async with httpx.AsyncClient(trust_env=False, verify=verify, timeout=None, limits=limits) as client:  # noqa: S113  (every request has a trio deadline)
        yield _Httpx(client)


class LocalMachine:
    """The machine that this process runs on."""

    def __init__(self, data_dir: Path, bin_dir: Path | str, *, directory: recipe.DataDirectory | None = None) -> None:
        self._data_dir = data_dir
        self._bin_dir = bin_dir
        self._notifier = Notifier(os.environ)
        self.directory: Processes = recipe.DataDirectory(data_dir) if directory is None else directory

    def adopt(self) -> Postmaster | None:
        return processes.adopt(self._data_dir)

    def read_proc(self, pid: int) -> Proc | None:
        return recipe.read_proc(pid)

    def send(self, proc: Proc, number: signal.Signals) -> bool:
        return recipe.send(proc, number)

    def ticks_now(self) -> int:
        return recipe.ticks_now()

    async def exited(self, proc: Proc) -> None:
        fd = recipe.open_pidfd(proc)
        if fd is not None:
            await _readable(fd)

    async def wait_exit(self, pid: int) -> None:
        try:
            fd = os.pidfd_open(pid)
        except OSError:
            await trio.sleep(0.2)
            return
        await _readable(fd)

    def kill_copies(self, target: Path) -> list[int]:
        return basebackup.kill_leftovers(target)

    async def run(
        self, argv: Sequence[str | Path], *, deadline_s: float, env: Mapping[str, str] | None = None, cwd: Path | None = None,
        on_output: Callable[[bytes], None] | None = None, on_error_output: Callable[[bytes], None] | None = None,
        dies_with_us: bool = False, spare_background: bool = False,
    ) -> Completed:
        return await programs.run(argv, deadline_s=deadline_s, env=env, cwd=cwd, on_output=on_output, on_error_output=on_error_output, dies_with_us=dies_with_us,
                                  spare_background=spare_background)

    async def launch(self, argv: Sequence[str], *, data_dir: Path, log_path: Path) -> Postmaster | int:
        return await server.launch(argv, data_dir=data_dir, log_path=log_path)

    async def connect(self, conninfo: Mapping[str, str | int], *, deadline_s: float) -> Connection:
        return await Connection.connect(conninfo, deadline_s=deadline_s)

    async def answers_startup(self, host: str, port: int, *, deadline_s: float) -> bool:
        return await connection.answers_startup(host, port, deadline_s=deadline_s)

    async def shutdown_positions(self, said: ControlData, *, deadline_s: float) -> ShutdownPositions:
        return await wal_files.shutdown_positions(said, self._data_dir, self._bin_dir, deadline_s=deadline_s)

    async def end_of_wal(self, said: ControlData, *, timeline: int, from_lsn: int, deadline_s: float) -> int:
        return await wal_files.end_of_wal(said, self._data_dir, self._bin_dir, timeline=timeline, from_lsn=from_lsn, deadline_s=deadline_s)

    def boot_id(self) -> str:
        return boot_id()

    async def in_thread(self, work: Callable[[], T], *, abandon_on_cancel: bool = False) -> T:
        return await threads.in_thread(work, abandon_on_cancel=abandon_on_cancel)

    async def open_guard(self, path: str) -> GuardStream:
        return await guard_client.open_guard(path)

    async def spawn(self, argv: Sequence[str], *, log: str = "/dev/null") -> None:
        await guard_client.spawn(argv, log=log)

    def device(self, path: str) -> Device:
        return LinuxDevice(path)

    def http(self, verify: ssl.SSLContext | bool) -> AbstractAsyncContextManager[HttpClient]:  # noqa: FBT001  (httpx's own word)
        return http(verify)

    async def serve(self, listen: Listen, app: Application, *, task_status: trio.TaskStatus[list[tuple[str, int]]] = trio.TASK_STATUS_IGNORED) -> None:
        await serve(listen, app, task_status=task_status)

    def signals(self, *numbers: signal.Signals) -> AbstractContextManager[AsyncIterator[int]]:
        return trio.open_signal_receiver(*numbers)

    def notify(self, state: str) -> None:
        self._notifier.say(state)

    def token(self) -> str:
        return secrets.token_hex(8)

    def give_memory_back(self) -> None:
        gc.collect()
        gc.freeze()
        try:
            ctypes.CDLL(None).malloc_trim(0)
        except AttributeError:      # another C library than glibc
            log.debug("memory is not given back: the C library has no malloc_trim")


async def _readable(fd: int) -> None:
    """Wait for it, and close it."""
    try:
        await trio.lowlevel.wait_readable(fd)
    finally:
        os.close(fd)
