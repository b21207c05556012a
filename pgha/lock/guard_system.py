# ruff: noqa: PTH103, PTH104, PTH123  (os.* only: the guard keeps its imports small)
"""What the guard asks of the machine: its runtime directory, its file, its privileges, its timer, its log.

Everything here works, more weakly, without privileges; `Privileges` says what was granted, so that it can be seen.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import queue
import resource
import stat
import struct
import threading
import time
from typing import NamedTuple

from pgha.clock import Deadline, boot_id
from pgha.lock.guard_state import Held
from pgha.lock.protocol import FILE_NAME, LOCK_NAME, SOCKET_NAME, Agent, ProtocolError, State, instant_of
from pgha.lock.recipe import Identity
from pgha.systemd import journal_listens, with_priority

_libc = ctypes.CDLL(None, use_errno=True)
_TMPFS, _RAMFS = 0x01021994, 0x858458F6
#: sun_path holds 108 bytes with its final zero.
MAX_SOCKET_PATH_BYTES = 107
_LARGEST_FILE_BYTES = 64 * 1024


class RuntimeDirectoryError(Exception):
    """The runtime directory cannot be used; the text says why and what to do."""


def check_runtime_dir(path: str) -> None:
    """Make it if it is missing (0700); raises RuntimeDirectoryError unless it is ours alone, no symlink, and tmpfs.

    tmpfs, because the guard writes its file before each acknowledgement, and a hung disk must not stop it.
    """
    if len(os.fsencode(f"{path}/{SOCKET_NAME}")) > MAX_SOCKET_PATH_BYTES:
        raise RuntimeDirectoryError(f"{path}: too long, the socket's path may have {MAX_SOCKET_PATH_BYTES} bytes")
    try:
        os.makedirs(path, mode=0o700, exist_ok=True)
        found = os.lstat(path)
    except OSError as exc:
        raise RuntimeDirectoryError(f"{path}: {exc.strerror}") from exc
    if not stat.S_ISDIR(found.st_mode):
        raise RuntimeDirectoryError(f"{path}: must be a directory, not a link or a file")
    if found.st_uid != os.geteuid():
        raise RuntimeDirectoryError(f"{path}: belongs to user {found.st_uid}, must belong to {os.geteuid()}")
    if found.st_mode & 0o077:
        raise RuntimeDirectoryError(f"{path}: mode {found.st_mode & 0o777:o}, must be 700")
    buffer = ctypes.create_string_buffer(256)  # struct statfs begins with f_type, a long
    if _libc.statfs(os.fsencode(path), buffer) != 0 \
            or struct.unpack_from("@l", buffer.raw)[0] & 0xFFFFFFFF not in (_TMPFS, _RAMFS):
        raise RuntimeDirectoryError(f"{path}: must be on tmpfs, for example below /run or /dev/shm")


def lock_alone(runtime_dir: str) -> int | None:
    """One guard a runtime directory: the descriptor that holds the lock until it is closed, None if another has it."""
    fd = os.open(f"{runtime_dir}/{LOCK_NAME}", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        return None
    return fd


class Memory:
    """The guard's file: what it held when it last spoke, valid for this boot and this data directory only."""

    def __init__(self, runtime_dir: str, data_dir: str) -> None:
        self._path = f"{runtime_dir}/{FILE_NAME}"
        self._data_dir = data_dir
        self._boot_id = boot_id()

    def write(self, held: Held, identities: tuple[Identity, ...]) -> None:
        """Replace the file as a whole. Raises OSError. No fsync: it is memory, and ends with the boot."""
        out = {"boot_id": self._boot_id, "data_dir": self._data_dir, "identities": identities,
               "state": held.state.value, "started_ns": held.agent.started_ns, "incarnation": held.agent.incarnation,
               "sequence": held.sequence, "fence_at": held.fence_at, "until": held.until, "why": held.why}
        fd = os.open(self._path + ".new", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            os.write(fd, json.dumps(out).encode())
        finally:
            os.close(fd)
        os.rename(self._path + ".new", self._path)

    def read(self) -> tuple[Held, tuple[Identity, ...]] | None:
        """What a former guard of this boot held; None if there was none, or if its file cannot be understood."""
        try:
            with open(self._path, "rb") as f:
                was = json.loads(f.read(_LARGEST_FILE_BYTES))
            if was["boot_id"] != self._boot_id or was["data_dir"] != self._data_dir:
                return None
            identities = tuple((int(major), int(minor), int(inode)) for major, minor, inode in was["identities"])
            held = Held(State(was["state"]), Agent(_number(was["started_ns"]), _incarnation(was["incarnation"])),
                        _number(was["sequence"]), _deadline(was["fence_at"]), _deadline(was["until"]), str(was["why"])[:1000])
        except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
            return None
        if (held.state is State.ARMED) != (held.fence_at is not None) \
                or (held.state is State.OFFLINE) != (held.until is not None):
            return None
        return held, identities


def former_data_dir(runtime_dir: str) -> str | None:
    """The data directory of the last guard of this boot; None if there was none, or if its file cannot be understood."""
    try:
        if os.lstat(runtime_dir).st_uid != os.geteuid():
            return None
        with open(f"{runtime_dir}/{FILE_NAME}", "rb") as f:
            was = json.loads(f.read(_LARGEST_FILE_BYTES))
        return str(was["data_dir"]) if was["boot_id"] == boot_id() else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _number(value: object) -> int:
    """As a message may have it: it goes into answers and comparisons, for as long as this guard lives."""
    if type(value) is not int or not 0 <= value < 1 << 63:
        raise ValueError("a number")
    return value


def _incarnation(value: object) -> str:
    if not isinstance(value, str) or len(value) > 128 or not value.isascii():
        raise ValueError("incarnation")
    return value


def _deadline(value: object) -> Deadline | None:
    try:
        return None if value is None else instant_of(value)
    except ProtocolError as exc:
        raise ValueError from exc


class Privileges(NamedTuple):
    """What the machine granted."""

    locked_in_memory: bool
    realtime: bool
    spared_by_oom: bool


_MCL_CURRENT, _MCL_FUTURE, _MCL_ONFAULT = 1, 2, 4
_CAP_IPC_LOCK = 14
_PR_SET_CHILD_SUBREAPER = 36


def take_privileges() -> Privileges:
    """Ask for all of it for the calling thread, and be a subreaper; whatever is refused stays as it was."""
    _libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    realtime = True
    try:
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(10))
    except OSError:
        realtime = False
    spared = True
    try:
        with open("/proc/self/oom_score_adj", "w", encoding="ascii") as f:
            f.write("-1000")
    except OSError:
        spared = False
    _libc.malloc_trim(0)  # what imports and their compilation needed once
    locked = _may_lock_all() and _libc.mlockall(_MCL_CURRENT | _MCL_FUTURE | _MCL_ONFAULT) == 0
    return Privileges(locked, realtime, spared)


def _may_lock_all() -> bool:
    """With a finite limit, MCL_FUTURE makes a later allocation fail instead of not being locked: then rather not."""
    _, most = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if most == resource.RLIM_INFINITY:
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (most, most))
        return True
    with open("/proc/self/status", encoding="ascii", errors="replace") as f:
        for line in f:
            if line.startswith("CapEff:"):
                return bool(int(line.split()[1], 16) >> _CAP_IPC_LOCK & 1)
    return False


class BootTimer:
    """Readable (`fd`) once CLOCK_BOOTTIME has passed a moment, at once after a suspend that swallowed it.

    A sleep measured by CLOCK_MONOTONIC would go on for its rest after the machine has been resumed.
    """

    def __init__(self) -> None:
        self.fd: int = _libc.timerfd_create(time.CLOCK_BOOTTIME, os.O_NONBLOCK | os.O_CLOEXEC)
        if self.fd < 0:
            raise OSError(ctypes.get_errno(), "timerfd_create")

    def set_s(self, seconds: float) -> None:
        """Ring `seconds` from now."""
        at_ns = time.clock_gettime_ns(time.CLOCK_BOOTTIME) + max(1, round(seconds * 1e9))
        spec = struct.pack("@qqqq", 0, 0, at_ns // 1_000_000_000, at_ns % 1_000_000_000)
        _libc.timerfd_settime(self.fd, 1, spec, None)  # 1: TFD_TIMER_ABSTIME

    def clear(self) -> None:
        """Take the ringing away."""
        try:
            os.read(self.fd, 8)
        except BlockingIOError:
            pass


class Log:
    """pgha.log's plain lines on standard error, written by a thread: a full pipe or a hung disk loses lines, no time."""

    QUEUE_LINES = 256

    def __init__(self) -> None:
        self._lines: queue.Queue[str] = queue.Queue(self.QUEUE_LINES)
        self._dropped = 0
        self._journal = journal_listens(os.environ)
        threading.Thread(target=self._run, name="log", daemon=True).start()

    def __call__(self, level: str, event: str, /, **facts: object) -> None:
        now_s = time.time()
        tail = "".join(f" {key}={_value(value)}" for key, value in facts.items())
        stamp = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(now_s))
        lost, self._dropped = self._dropped, 0
        line = f"{level} {event}{tail}{f' lines_lost_before={lost}' if lost else ''}"
        line = with_priority(line, level) if self._journal else f"{stamp}.{int(now_s % 1 * 1000):03d} {line}"
        try:
            self._lines.put_nowait(line + "\n")
        except queue.Full:
            self._dropped = lost + 1

    def flush(self, wait_s: float) -> None:
        """Give the thread this long to write what is queued."""
        until_s = time.monotonic() + wait_s
        while self._lines.unfinished_tasks and time.monotonic() < until_s:
            time.sleep(0.002)

    def _run(self) -> None:
        while True:
            line = self._lines.get()
            try:
                os.write(2, line.encode("utf-8", "replace"))
            except OSError:
                pass  # nobody reads it, or no space: the guard has more important things to do
            self._lines.task_done()


def _value(value: object) -> str:
    text = f"{value:.3f}" if isinstance(value, float) else str(value)
    return json.dumps(text) if not text or any(c.isspace() or c in '"=' for c in text) else text
