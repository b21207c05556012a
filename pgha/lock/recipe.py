# ruff: noqa: PTH100, PTH110, PTH116, PTH208  (os.* only: the guard keeps its imports small, and these must be exactly the calls named)
"""Which processes can write into this data directory, and how are they stopped for certain?

A process belongs to a data directory if its current directory is that directory (device and inode, so that renaming
the directory or a bind mount hides nobody) and its `comm` is PostgreSQL's: backends inherit both and keep them after
their postmaster's death, the DBA's shell standing there has another name, another cluster another directory.

Rules of this file (safety model 8):
- Only `/proc/PID/stat`, `/proc/PID/task/PID/children` and the `cwd` link are read: `cmdline` and `maps` of a stuck
  process can block. Nothing below the data directory is touched, except by `DataDirectory.refresh`, which is never
  called on the way to a kill.
- Every signal goes through a pidfd, sent only if the start time is still the one that was judged: pids are recycled.
- Fenced means: signals sent. No user instruction runs after SIGKILL, also if the process is stuck in the kernel;
  only a restart or a rewind needs `wait_gone`.
- A zombie is dead. (PID 1 may reap late, feasibility 11.)

What it cannot see: a process of another PID namespace, and a `cwd` link that this user may not read (another user's
process, or one that made itself undumpable). Such a process is killed if its parent is killed here; otherwise it is
reported as `unreadable` if it runs under our own user, and left alone: it may be another cluster's.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import time
from enum import Enum, auto
from typing import NamedTuple

#: `comm` of the server's processes: the executable's name (RHEL's packages start it through the link `postmaster`).
COMMS = frozenset({"postgres", "postmaster"})
#: How long a postmaster may take to show that SIGSTOP arrived before its children are killed anyhow.
STOP_WAIT_S = 0.005
#: Rounds of search and kill before the caller gets its answer; what then still appears is for its next call.
MAX_ROUNDS = 64

_DEAD = frozenset("ZXx")
_STOPPED = frozenset("Tt")
TICKS_PER_S: int = os.sysconf("SC_CLK_TCK")


class Proc(NamedTuple):
    """One process as `/proc/PID/stat` has it. pid and start_ticks (since boot) together name it for ever."""

    pid: int
    start_ticks: int
    ppid: int
    state: str
    comm: str

    @property
    def key(self) -> tuple[int, int]:
        return (self.pid, self.start_ticks)


#: Device (major, minor) and inode of a directory.
Identity = tuple[int, int, int]


class Report(NamedTuple):
    """What a kill did. `left`: signalled, and at the end neither gone nor a zombie (they run no instruction)."""

    killed: tuple[Proc, ...]
    took_s: float
    left: tuple[Proc, ...]
    denied: tuple[Proc, ...] = ()      # the kernel refused the signal: not fenced
    unreadable: tuple[Proc, ...] = ()  # PostgreSQL processes of our user whose directory cannot be told


class Belongs(Enum):
    """Does a process stand in the data directory?"""

    YES = auto()
    NO = auto()
    UNREADABLE = auto()


# --- one process -----------------------------------------------------------------------------------------------


def _read(path: str) -> bytes | None:
    """A small file of /proc, or None if its process is gone."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return None
    try:
        out = b""
        while chunk := os.read(fd, 65536):
            out += chunk
        return out
    except ProcessLookupError:
        return None
    finally:
        os.close(fd)


def read_proc(pid: int) -> Proc | None:
    """The process as it is now, zombies included; None if there is none."""
    stat = _read(f"/proc/{pid}/stat")
    if not stat:
        return None
    comm_end = stat.rindex(b")")  # comm itself may hold brackets and blanks
    fields = stat[comm_end + 2:].split()
    comm = stat[stat.index(b"(") + 1:comm_end].decode("ascii", "replace")
    return Proc(pid, int(fields[19]), int(fields[1]), fields[0].decode("ascii"), comm)


def alive(proc: Proc) -> bool:
    """Whether this very process (not a later one of its pid) exists and is no zombie."""
    now = read_proc(proc.pid)
    return now is not None and now.start_ticks == proc.start_ticks and now.state not in _DEAD


def open_pidfd(proc: Proc) -> int | None:
    """A pidfd of this very process (the caller closes it), or None if it is gone or a zombie.

    Raises OSError where the kernel has no pidfd or no descriptor to give.
    """
    try:
        fd = os.pidfd_open(proc.pid)
    except ProcessLookupError:
        return None
    if alive(proc):
        return fd
    os.close(fd)
    return None


def send(proc: Proc, signum: signal.Signals) -> bool:
    """Signal this very process; True also if it is gone already, False if the kernel refused (EPERM)."""
    try:
        fd = open_pidfd(proc)
    except OSError:  # out of descriptors, or a seccomp filter: by pid then, checked immediately before
        try:
            if alive(proc):
                os.kill(proc.pid, signum)
        except ProcessLookupError:
            return True
        except PermissionError:
            return False
        return True
    if fd is None:
        return True
    try:
        signal.pidfd_send_signal(fd, signum)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    finally:
        os.close(fd)
    return True


def children_of(pid: int) -> list[Proc]:
    """Its living children. Complete for a stopped process; for a running one a later re-read may show more."""
    listed = _read(f"/proc/{pid}/task/{pid}/children")
    if listed is None:
        # Gone, or a kernel without CONFIG_PROC_CHILDREN: then every process is asked for its parent.
        pids = _all_pids() if os.path.exists(f"/proc/{pid}") else []
    else:
        pids = [int(word) for word in listed.split()]
    found = (read_proc(child) for child in pids)
    return [p for p in found if p is not None and p.ppid == pid and p.state not in _DEAD]


def ticks_now() -> int:
    """The present in the unit of `start_ticks`."""
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME) * TICKS_PER_S // 1_000_000_000


def _all_pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


# --- the data directory ----------------------------------------------------------------------------------------

_libc = ctypes.CDLL(None, use_errno=True)
_AT_FDCWD = -100
_AT_STATX_DONT_SYNC = 0x4000  # answer from the cache: a hung network file system of somebody else must not stop us
_AT_NO_AUTOMOUNT = 0x800
_STATX_INO = 0x100


def identity_of(path: str) -> Identity:
    """(device major, minor, inode) of what `path` leads to, without asking a file server. Raises OSError."""
    statx = getattr(_libc, "statx", None)
    if statx is not None:
        buffer = ctypes.create_string_buffer(256)
        if statx(_AT_FDCWD, os.fsencode(path), _AT_STATX_DONT_SYNC | _AT_NO_AUTOMOUNT, _STATX_INO, buffer) == 0:
            raw = buffer.raw  # struct statx: stx_ino at byte 32, stx_dev_major and _minor at 136 and 140
            return (int.from_bytes(raw[136:140], "little"), int.from_bytes(raw[140:144], "little"),
                    int.from_bytes(raw[32:40], "little"))
        code = ctypes.get_errno()
        if code not in (1, 38):  # EPERM, ENOSYS: a seccomp filter older than statx; everything else is the answer
            raise OSError(code, os.strerror(code), path)
    stat = os.stat(path)
    return os.major(stat.st_dev), os.minor(stat.st_dev), stat.st_ino


class DataDirectory:
    """What a process's current directory is compared with.

    A clone is swapped in by renaming, so the same path can become another directory while processes of the former
    one still live: a former identity is kept for as long as one of its processes does.
    """

    def __init__(self, path: str | os.PathLike[str], identities: tuple[Identity, ...] | None = None) -> None:
        """`identities`: what is known already; without it the path is looked at, which may block."""
        self.path = os.path.abspath(path)
        self._identities: tuple[Identity, ...] = identities or ()
        if identities is None:
            self.refresh()

    def refresh(self) -> bool:
        """Look at the path again; whether the directory exists now. Touches the file system, so it may block."""
        try:
            current = identity_of(self.path)
        except OSError:
            return False  # gone or unreachable: what was known stays what is looked for
        self.learn(current)
        return True

    def learn(self, current: Identity) -> None:
        """`current` is what the path leads to now."""
        former = [i for i in self._identities if i != current]
        if former and current not in self._identities:
            former = [i for i in former if any(_stands_in(p.pid, (i,)) is Belongs.YES for p in _servers())]
        self._identities = (current, *former)

    def holds(self, pid: int) -> Belongs:
        """Whether the process stands in it."""
        return _stands_in(pid, self._identities)

    def processes(self) -> list[Proc]:
        """See processes_of."""
        return processes_of(self)

    def kill_all(self) -> Report:
        """See kill_all below."""
        return kill_all(self)

    def kill_orphans(self, *, seen_ticks: int, keep: frozenset[int] = frozenset()) -> Report:
        """See kill_orphans below."""
        return kill_orphans(self, seen_ticks=seen_ticks, keep=keep)

    def signal_postmaster(self, signum: signal.Signals) -> tuple[int, ...]:
        """See signal_postmaster below."""
        return signal_postmaster(self, signum)

    @property
    def identities(self) -> tuple[Identity, ...]:
        """The current one first; empty while the directory was never seen."""
        return self._identities


#: Functions take the path too; who asks often, or must not touch the disk, keeps a DataDirectory.
Where = DataDirectory | str | os.PathLike[str]


def _directory(where: Where) -> DataDirectory:
    return where if isinstance(where, DataDirectory) else DataDirectory(where)


def _stands_in(pid: int, identities: tuple[Identity, ...]) -> Belongs:
    try:
        return Belongs.YES if identity_of(f"/proc/{pid}/cwd") in identities else Belongs.NO
    except PermissionError:
        return Belongs.UNREADABLE
    except OSError:
        return Belongs.NO  # gone, or a zombie (it has no directory)


def _servers() -> list[Proc]:
    """Every living process on this machine that has PostgreSQL's name."""
    found = (read_proc(pid) for pid in _all_pids())
    return [p for p in found if p is not None and p.comm in COMMS and p.state not in _DEAD]


def survey(where: Where) -> tuple[list[Proc], list[Proc]]:
    """(living processes of the directory, those of our user whose directory cannot be read)."""
    directory = _directory(where)
    ours: list[Proc] = []
    unreadable: list[Proc] = []
    for proc in _servers():
        match directory.holds(proc.pid):
            case Belongs.YES:
                ours.append(proc)
            case Belongs.UNREADABLE if _uid_of(proc.pid) == os.geteuid():
                unreadable.append(proc)
    return ours, unreadable


def _uid_of(pid: int) -> int:
    """The real user of a process, -1 if unknown. (/proc/PID itself belongs to root when the process is undumpable.)"""
    status = _read(f"/proc/{pid}/status")
    for line in (status or b"").splitlines():
        if line.startswith(b"Uid:"):
            return int(line.split()[1])
    return -1


def processes_of(where: Where) -> list[Proc]:
    """The living processes of the data directory (postmasters, their children, orphans, single-user); no zombies."""
    return survey(where)[0]


def postmasters_of(processes: list[Proc]) -> list[Proc]:
    """Those among `processes` whose parent is not among them: postmasters, single-user servers, and orphans."""
    pids = {p.pid for p in processes}
    return [p for p in processes if p.ppid not in pids]


def signal_postmaster(where: Where, signum: signal.Signals) -> tuple[int, ...]:
    """Send e.g. SIGINT (fast shutdown) to every postmaster of the directory; the pids that it was sent to."""
    return tuple(p.pid for p in postmasters_of(processes_of(where)) if send(p, signum))


# --- killing ---------------------------------------------------------------------------------------------------


class _Kill:
    """One run of the recipe: what was signalled so far, and what could not be."""

    def __init__(self) -> None:
        self.started_s = time.monotonic()
        self.signalled: dict[tuple[int, int], Proc] = {}
        self.denied: dict[tuple[int, int], Proc] = {}

    def known(self, proc: Proc) -> bool:
        return proc.key in self.signalled or proc.key in self.denied

    def kill(self, proc: Proc) -> None:
        (self.signalled if send(proc, signal.SIGKILL) else self.denied)[proc.key] = proc

    def trees(self, roots: list[Proc]) -> None:
        """Stop the roots so that they fork and reap no more, kill their children until no new one shows, kill them."""
        for root in roots:
            send(root, signal.SIGSTOP)
            for child in children_of(root.pid):     # those that are there need not wait for the postmaster to have stopped
                self.kill(child)
        _wait_stopped(roots)
        for root in roots:
            for _ in range(MAX_ROUNDS):
                fresh = [c for c in children_of(root.pid) if not self.known(c)]
                if not fresh:
                    break
                for child in fresh:
                    self.kill(child)
        for root in roots:
            self.kill(root)

    def report(self, unreadable: list[Proc]) -> Report:
        killed = tuple(self.signalled.values())
        left = tuple(p for p in killed if alive(p))
        return Report(killed, time.monotonic() - self.started_s, left, tuple(self.denied.values()), tuple(unreadable))


def _wait_stopped(roots: list[Proc]) -> None:
    until_s = time.monotonic() + STOP_WAIT_S
    for root in roots:
        while (now := read_proc(root.pid)) and now.start_ticks == root.start_ticks \
                and now.state not in _STOPPED and now.state not in _DEAD and time.monotonic() < until_s:
            time.sleep(0.0002)


def kill_all(where: Where, *, known: tuple[Proc, ...] = (), cgroup: str | None = None) -> Report:
    """Kill every process of the data directory; returns when a new search finds none that was not signalled.

    `known`: postmasters found earlier; they and their children go first, without a search through /proc.
    `cgroup`: path of a delegated cgroup v2 that holds nothing but this PostgreSQL; killed as a whole before all else.
    Microseconds per process; in the worst case 5 ms more for postmasters that do not stop.
    """
    run = _Kill()
    directory = _directory(where)
    if cgroup is not None:
        kill_cgroup(cgroup)
    first = [p for p in known if alive(p)]
    if first:
        run.trees(first)
    unreadable: list[Proc] = []
    for _ in range(MAX_ROUNDS):
        ours, unreadable = survey(directory)
        fresh = [p for p in ours if not run.known(p)]
        if not fresh:
            break
        run.trees(postmasters_of(fresh))
        for proc in fresh:
            if not run.known(proc):
                run.kill(proc)
    return run.report(unreadable)


def kill_orphans(where: Where, *, seen_ticks: int, keep: frozenset[int] = frozenset()) -> Report:
    """A postmaster of this directory has died: kill the backends that it left, but no postmaster started since.

    Orphans go on acknowledging commits for as long as their input lasts: 68,983 in 10 s (safety model 8).
    Spared are: processes started after `seen_ticks` (when the death was seen), pids in `keep` (what postmaster.pid
    names now), and whatever has children of its own, with those children. Backends have none, postmasters soon do.
    """
    run = _Kill()
    directory = _directory(where)
    unreadable: list[Proc] = []
    for _ in range(MAX_ROUNDS):
        ours, unreadable = survey(directory)
        parents = {p.ppid for p in ours} | keep
        fresh = [p for p in postmasters_of(ours)
                 if p.pid not in parents and p.start_ticks <= seen_ticks and not run.known(p)]
        if not fresh:
            break
        for proc in fresh:
            run.kill(proc)
    return run.report(unreadable)


def kill_cgroup(path: str) -> bool:
    """Kill everything in a cgroup v2 at once (Linux 5.14); False if it cannot, or if this process is in it."""
    own = _read("/proc/self/cgroup") or b""
    for line in own.splitlines():
        if line.startswith(b"0::"):
            parts = os.fsdecode(line[3:]).strip("/").split("/")
            ancestors = ["/" + "/".join(parts[:n]) for n in range(1, len(parts) + 1) if parts[0]]
            if any(path.rstrip("/").endswith(ancestor) for ancestor in ancestors):
                return False
    try:
        fd = os.open(path + "/cgroup.kill", os.O_WRONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        os.write(fd, b"1")
    except OSError:
        return False
    finally:
        os.close(fd)
    return True


def wait_gone(report: Report, deadline_s: float) -> tuple[Proc, ...]:
    """Wait up to `deadline_s` seconds for everything that was killed to be gone (or a zombie); returns who is not.

    Blocks the caller: for the guard and for tests. In trio, wait on `open_pidfd` of each.
    """
    until_s = time.monotonic() + deadline_s
    left = tuple(p for p in report.killed if alive(p))
    while left and (rest_s := until_s - time.monotonic()) > 0:
        fd = open_pidfd(left[0])
        if fd is not None:
            try:
                poll = select.poll()
                poll.register(fd, select.POLLIN)
                poll.poll(max(1, round(rest_s * 1000)))
            finally:
                os.close(fd)
        left = tuple(p for p in left if alive(p))
    return left
