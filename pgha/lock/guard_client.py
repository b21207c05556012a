"""The agent's line to its guard: ask, and be acknowledged in time, or raise GuardError.

Rules of this file:
- Whoever gets no acknowledgement may not use what it asked for; the guard may have granted it all the same, which is
  why every request can be repeated (protocol.py).
- A connection that missed its deadline is closed: a late answer must not be taken for the next one's.
- The guard is started here, and outlives us: double-forked, in its own session, with nothing of ours open.
"""

from __future__ import annotations

import fcntl
import os
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import trio

from pgha.clock import Deadline
from pgha.errors import GuardError, GuardSilent
from pgha.lock.protocol import (
    MAX_BYTES,
    NOBODY,
    SOCKET_NAME,
    Agent,
    Answer,
    Op,
    ProtocolError,
    Request,
    encode_request,
    parse_answer,
)

#: How long an acknowledgement may take. `standby`, `offline` and `bye` look at the disk, at most 0.2 s of it.
DEADLINE_S = 0.3
#: How long a guard may take from its start to its first answer.
START_DEADLINE_S = 5.0
#: The guard asks for the agent's lock with a shared lock of microseconds; a second agent keeps it for good.
FLOCK_WAIT_S = 0.5


class GuardStatus(NamedTuple):
    """What the guard said holds now."""

    state: str                      # protocol.State: idle, standby, armed, paused, offline, latched
    fence_at: Deadline | None       # while armed
    until: Deadline | None          # while offline
    incarnation: str                # of the agent in charge, "" before any has spoken
    started_ns: int
    sequence: int
    pid: int                        # the guard's
    data_dir: str
    postmaster: int                 # the server that it watches, 0: none
    why: str                        # what led to this state
    last_fence: str                 # what its last fence did, "" if none fell
    facts: dict[str, Any]           # the rest: watched, locked_in_memory, realtime, spared_by_oom, agent_alive


class GuardStream(Protocol):
    """A connection to a guard: an open stream socket."""

    listener: int       # pid of who listens there, 0 if that is not known

    async def send_all(self, data: bytes) -> None: ...
    async def receive_some(self, max_bytes: int) -> bytes: ...
    def close(self) -> None:
        """At once, without waiting: also when the task is being cancelled."""
        ...


class UnixStream:
    """A guard's socket."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self._socket = stream.socket
        self.listener: int = struct.unpack("iII", stream.socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0]
        self.send_all = stream.send_all
        self.receive_some = stream.receive_some

    def close(self) -> None:
        self._socket.close()


async def open_guard(path: str) -> GuardStream:
    """OSError if nobody listens there."""
    return UnixStream(await trio.open_unix_socket(path))


class GuardClient:
    """One connection to the guard of `runtime_dir`, opened when it is needed; several tasks may share it.

    `incarnation` and `started_ns` (CLOCK_BOOTTIME at this agent's start) say who asks; without them only `status` can
    be asked. With `data_dir`, an answer from another directory's guard is an error.
    """

    def __init__(self, runtime_dir: str | os.PathLike[str], *, incarnation: str = "", started_ns: int = 0,
                 data_dir: str | os.PathLike[str] | None = None, open_stream: Callable[[str], Awaitable[GuardStream]] = open_guard) -> None:
        self._path = os.path.join(runtime_dir, SOCKET_NAME)  # noqa: PTH118  (a relative path must stay as short as it is)
        self._agent = Agent(started_ns, incarnation) if incarnation else NOBODY
        self._data_dir = None if data_dir is None else str(Path(data_dir).absolute())
        self._lock = trio.Lock()
        self._open_stream = open_stream
        self._stream: GuardStream | None = None
        self.listener = 0       # pid of the guard that was reached last, also if it said nothing

    async def arm(self, *, sequence: int, fence_at: Deadline, deadline_s: float = DEADLINE_S) -> GuardStatus:
        """A licence is committed: anything may run until `fence_at`. Only for sequences known to be committed."""
        return await self._ask(Request(Op.ARM, self._agent, sequence, fence_at), deadline_s)

    async def pause(self, *, sequence: int, deadline_s: float = DEADLINE_S) -> GuardStatus:
        """A record in mode `paused` is committed: anything may run until a newer word. Only for committed sequences."""
        return await self._ask(Request(Op.PAUSE, self._agent, sequence), deadline_s)

    async def narrow(self, fence_at: Deadline, *, sequence: int = 0, deadline_s: float = DEADLINE_S) -> GuardStatus:
        """Before a write that may shorten the licence. `sequence`: the highest one sent under the longer licence."""
        return await self._ask(Request(Op.NARROW, self._agent, sequence, fence_at), deadline_s)

    async def standby(self, *, deadline_s: float = DEADLINE_S) -> GuardStatus:
        """Only a server in recovery from now on. Every process has exited (or is a standby), standby.signal is there."""
        return await self._ask(Request(Op.STANDBY, self._agent), deadline_s)

    async def offline(self, until: Deadline, *, deadline_s: float = DEADLINE_S) -> GuardStatus:
        """Our own programs work on the directory until then, at most protocol.MAX_OFFLINE_S ahead; repeat to go on."""
        return await self._ask(Request(Op.OFFLINE, self._agent, deadline=until), deadline_s)

    async def fence_now(self, *, deadline_s: float = DEADLINE_S) -> GuardStatus:
        """Everything has been signalled when this returns; the guard stays latched."""
        return await self._ask(Request(Op.FENCE_NOW, self._agent), deadline_s)

    async def bye(self, *, deadline_s: float = DEADLINE_S) -> GuardStatus:
        """After a clean stop: the guard ends."""
        return await self._ask(Request(Op.BYE, self._agent), deadline_s)

    async def status(self, *, deadline_s: float = DEADLINE_S) -> GuardStatus:
        """What holds now, whoever asked for it."""
        return await self._ask(Request(Op.STATUS), deadline_s)

    async def aclose(self) -> None:
        """Close the connection; the next request opens one."""
        stream, self._stream = self._stream, None
        if stream is not None:
            stream.close()

    async def _ask(self, request: Request, deadline_s: float) -> GuardStatus:
        if request.op is not Op.STATUS and self._agent is NOBODY:
            raise GuardError(f"{request.op}: this client has no incarnation")
        try:
            with trio.fail_after(deadline_s):
                async with self._lock:
                    answer = await self._exchange(encode_request(request))
        except trio.TooSlowError:
            raise GuardSilent(f"{request.op}: no acknowledgement within {deadline_s} s") from None
        except (OSError, trio.BrokenResourceError, ProtocolError) as exc:
            raise GuardError(f"{request.op}: {exc or type(exc).__name__} ({self._path})") from exc
        if not answer.ok:
            raise GuardError(f"{request.op} refused: {answer.error}")
        status = _status_of(answer)
        if self._data_dir is not None and status.data_dir not in (self._data_dir, ""):
            raise GuardError(f"the guard in {self._path} is that of {status.data_dir}, not of {self._data_dir}")
        return status

    async def _exchange(self, line: bytes) -> Answer:
        """One line there, one line back. A former connection that broke (the guard was restarted) is replaced once."""
        fresh = self._stream is None
        try:
            return await self._on_connection(line)
        except (OSError, trio.BrokenResourceError):
            if fresh:
                raise
        return await self._on_connection(line)

    async def _on_connection(self, line: bytes) -> Answer:
        answered = False
        try:
            if self._stream is None:
                self._stream = await self._open_stream(self._path)
                self.listener = self._stream.listener
            await self._stream.send_all(line)
            received = b""
            while not received.endswith(b"\n"):
                chunk = await self._stream.receive_some(MAX_BYTES)
                if not chunk:
                    raise trio.BrokenResourceError("the guard closed the connection")
                received += chunk
                if len(received) > MAX_BYTES:
                    raise ProtocolError("the guard's answer is too long")
            answer = parse_answer(received)
            answered = True
            return answer
        finally:
            if not answered and self._stream is not None:  # also when cancelled: a late answer must find nobody
                self._stream.close()
                self._stream = None


def _status_of(answer: Answer) -> GuardStatus:
    facts = dict(answer.facts)

    def number(key: str) -> int:
        value = facts.pop(key, 0)
        return value if isinstance(value, int) else 0

    def text(key: str) -> str:
        return str(facts.pop(key, ""))

    return GuardStatus(answer.state.value, answer.fence_at, answer.until, answer.agent.incarnation,
                       answer.agent.started_ns, answer.sequence, number("pid"), text("data_dir"), number("postmaster"),
                       text("why"), text("last_fence"), facts)


#: Runs argv[2:] in a session and process tree of its own, with standard error to argv[1].
_DETACH = """
import os, sys
log, argv = sys.argv[1], sys.argv[2:]
os.setsid()
if os.fork():
    os._exit(0)
os.chdir("/")
os.umask(0o077)
fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOCTTY, 0o600)
os.dup2(fd, 2)
if fd > 2:
    os.close(fd)
os.execvp(argv[0], argv)
"""


async def spawn(argv: Sequence[str], *, log: str = "/dev/null") -> None:
    """Start `argv` double-forked in its own session; standard streams closed but for standard error, which goes to `log`.

    Returns when the process in between has exited; whether the guard came up is for `ensure_running` to ask. Raises
    GuardError if it could not be started.
    """
    command = [sys.executable, "-I", "-S", "-c", _DETACH, log, *argv]
    try:
        done = await trio.run_process(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                                      stderr=subprocess.DEVNULL, check=False)
    except OSError as exc:
        raise GuardError(f"the guard could not be started: {exc}") from exc
    if done.returncode != 0:
        raise GuardError(f"the guard could not be started: exit code {done.returncode}")


class Spawn(Protocol):
    """See `spawn`."""

    async def __call__(self, argv: Sequence[str], *, log: str = "/dev/null") -> None: ...


async def ensure_running(client: GuardClient, argv: Sequence[str], *, log: str = "/dev/null",
                         deadline_s: float = START_DEADLINE_S, spawn: Spawn = spawn) -> GuardStatus:
    """The guard's status; if none answers, `argv` is started first. Raises GuardError if none answers in time.

    Harmless if another one is there but slow: the new one finds the lock taken, and ends.
    """
    try:
        return await client.status()
    except GuardError as exc:
        last = exc
    with trio.CancelScope(deadline=trio.current_time() + deadline_s):
        await spawn(argv, log=log)
        while True:
            try:
                return await client.status()
            except GuardError as exc:
                last = exc
            await trio.sleep(0.02)
    raise GuardError(f"no guard within {deadline_s} s: {last}")


@contextmanager
def agent_flock(path: str | os.PathLike[str]) -> Iterator[bool]:
    """One agent a data directory: whether this process has the lock, until the block ends. Blocks FLOCK_WAIT_S at most.

    The guard reads from this lock whether an agent lives, so it is held by nobody else and for the agent's whole life.
    """
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        yield _lock_within(fd, FLOCK_WAIT_S)
    finally:
        os.close(fd)


def _lock_within(fd: int, wait_s: float) -> bool:
    until_s = time.monotonic() + wait_s
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() >= until_s:
                return False
        time.sleep(0.01)
