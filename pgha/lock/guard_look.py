# ruff: noqa: PTH110  (os.* only: the guard keeps its imports small)
"""What does the data directory show? Asked by the guard, answered by a thread, since a hung disk must not stop the guard.

The thread is the only part of the guard that touches the data directory or the agent's lock file. If the disk hangs,
it hangs, and the guard goes on without: it arms, fences and kills by /proc alone; only `standby` is refused then.

An inotify watch on the directory makes the answer prompt (its descriptor is read by the guard's loop, which never
blocks); where the system has no watch to give, `Look.watched` is false and the guard asks more often.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import select
import struct
import threading
import time
from queue import SimpleQueue
from typing import NamedTuple

from pgha.lock.guard_state import Look
from pgha.lock.recipe import identity_of

_IN_MODIFY, _IN_MOVED_FROM, _IN_MOVED_TO = 0x02, 0x40, 0x80
_IN_CREATE, _IN_DELETE, _IN_DELETE_SELF, _IN_MOVE_SELF = 0x100, 0x200, 0x400, 0x800
_IN_Q_OVERFLOW, _IN_IGNORED, _IN_ONLYDIR = 0x4000, 0x8000, 0x01000000
_IN_WATCHED = (_IN_MODIFY | _IN_MOVED_FROM | _IN_MOVED_TO | _IN_CREATE | _IN_DELETE | _IN_DELETE_SELF
               | _IN_MOVE_SELF | _IN_ONLYDIR)

#: pid_t; nothing larger has a directory in /proc, or a path that the kernel would take.
_LARGEST_PID = (1 << 31) - 1

_libc = ctypes.CDLL(None, use_errno=True)


class News(NamedTuple):
    """What inotify told since it was asked last."""

    pid_written: bool = False        # postmaster.pid has contents now, or was moved here
    pid_touched: bool = False        # it changed in any way
    signal_removed: bool = False     # standby.signal was removed or renamed away
    signal_touched: bool = False     # standby.signal changed in any way
    promotion_asked: bool = False    # the file `promote` was made: pg_ctl promote and pg_promote() both begin so
    other: bool = False              # the directory itself moved or went, or events were lost


class Looker:
    """The thread, its queue of one, and the pipe by which it wakes the guard's loop (`fd`)."""

    def __init__(self, data_dir: str, agent_lock: str | None) -> None:
        self.epoch = 0  # the guard counts its states here; each look says in which one it began
        self._data_dir = data_dir
        self._agent_lock = agent_lock
        self._asked = 0
        self._with_agent = False
        self._wanted: SimpleQueue[int] = SimpleQueue()
        self._latest = Look()
        self.fd, self._done_fd = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self.inotify_fd: int = _libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)  # -1: the user has too many already
        self._watch = -1
        threading.Thread(target=self._run, name="look", daemon=True).start()

    # --- called by the guard's loop; none of these blocks ---

    def ask(self, *, agent: bool = False) -> int:
        """Have another look (with `agent`, also at the agent's lock); `take` will have one of at least this number."""
        self._with_agent |= agent
        if self._wanted.empty():  # one that waits has not begun: it will see all that this one would
            self._asked += 1
            self._wanted.put(self._asked)
        return self._asked

    def take(self) -> Look:
        """The latest look; call when `fd` is readable."""
        try:
            os.read(self.fd, 4096)
        except BlockingIOError:
            pass
        return self._latest

    def now(self, wait_s: float) -> Look | None:
        """A look begun after this call, or None if the directory does not answer within `wait_s`."""
        number = self.ask()
        until_s = time.monotonic() + wait_s
        while (look := self.take()).number < number:
            rest_s = until_s - time.monotonic()
            if rest_s <= 0:
                return None
            select.select([self.fd], [], [], rest_s)
        return look

    def news(self) -> News:
        """What inotify has for us."""
        if self.inotify_fd < 0:
            return News()
        try:
            events = os.read(self.inotify_fd, 65536)
        except BlockingIOError:
            return News()
        flags = dict.fromkeys(News._fields, False)
        offset = 0
        while offset < len(events):
            _, mask, _, length = struct.unpack_from("iIII", events, offset)
            name = events[offset + 16:offset + 16 + length].rstrip(b"\0")
            offset += 16 + length
            if mask & (_IN_Q_OVERFLOW | _IN_IGNORED | _IN_DELETE_SELF | _IN_MOVE_SELF):
                flags["other"] = True
            elif name == b"postmaster.pid":
                flags["pid_touched"] = True
                flags["pid_written"] |= bool(mask & (_IN_MODIFY | _IN_MOVED_TO))
            elif name == b"standby.signal":
                flags["signal_touched"] = True
                flags["signal_removed"] |= bool(mask & (_IN_DELETE | _IN_MOVED_FROM))
            elif name == b"promote":
                flags["promotion_asked"] |= bool(mask & (_IN_CREATE | _IN_MOVED_TO))
        return News(**flags)

    # --- the thread ---

    def _run(self) -> None:
        while True:
            number = self._wanted.get()
            epoch = self.epoch
            with_agent, self._with_agent = self._with_agent, False
            self._latest = self._look(number, agent=with_agent)._replace(epoch=epoch)
            try:
                os.write(self._done_fd, b".")
            except BlockingIOError:
                pass  # the pipe holds news already

    def _look(self, number: int, *, agent: bool) -> Look:
        base = self._data_dir
        try:
            identity = identity_of(base)
        except OSError:
            identity = None
        watched = self._add_watch() if identity is not None else False
        pid, before = _postmaster_pid(base)
        control = _control_state(base)
        _, after = _postmaster_pid(base)
        return Look(number, identity is not None, identity, pid, before, control, after,
                    os.path.exists(base + "/standby.signal"), watched,
                    flock_held(self._agent_lock) if agent and self._agent_lock else None)

    def _add_watch(self) -> bool:
        """Watch what the path leads to now. Adding a watch that exists gives the same number again."""
        if self.inotify_fd < 0:
            return False
        watch: int = _libc.inotify_add_watch(self.inotify_fd, os.fsencode(self._data_dir), _IN_WATCHED)
        if self._watch not in (-1, watch):
            _libc.inotify_rm_watch(self.inotify_fd, self._watch)  # of the directory that was here before
        self._watch = watch
        return watch >= 0


def _first_bytes(path: str, size: int) -> bytes:
    """Up to `size` bytes of a file, b"" if it cannot be read."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return b""
    try:
        return os.read(fd, size)
    except OSError:
        return b""
    finally:
        os.close(fd)


def _postmaster_pid(base: str) -> tuple[int, str]:
    """(pid, status) of postmaster.pid: its first and its eighth line."""
    lines = _first_bytes(base + "/postmaster.pid", 4096).decode("ascii", "replace").split("\n")
    try:
        pid = abs(int(lines[0]))
    except ValueError:
        return 0, ""
    if pid > _LARGEST_PID:
        return 0, ""
    return pid, lines[7].strip() if len(lines) > 7 else ""


def _control_state(base: str) -> int:
    """DBState: an int after system identifier (8 bytes), pg_control version (4) and catalog version (4)."""
    head = _first_bytes(base + "/global/pg_control", 20)
    return struct.unpack_from("=I", head, 16)[0] if len(head) == 20 else -1


def flock_held(path: str) -> bool:
    """Whether somebody holds an exclusive flock on `path`; a file that cannot be opened is held by nobody.

    Asking takes a shared lock for microseconds when nobody holds it; `guard_client.agent_flock` tries long enough.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
