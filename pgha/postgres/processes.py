"""Which processes belong to a data directory, and is its postmaster alive?

postmaster.pid is only a claim: the file outlives a killed postmaster, and its number may be anybody's by now. A
postmaster is a process that is called postgres, stands in the data directory, is nobody's backend there, and whose pid
the file names. Once found it is held by a pidfd, which no reuse of the number can confuse.

Rules of this file:
* A zombie is dead: it runs no instruction, and PID 1 may take seconds to reap it.
* Of /proc only `stat` and the `cwd` link are read: `cmdline` of a stuck process can block.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path

import trio
from msgspec import Struct

from pgha.errors import PostgresError, PostgresTimeout
from pgha.postgres.files import read_beginning

#: The program's name; "postmaster" is the old symbolic link to it.
NAMES = frozenset({"postgres", "postmaster"})
#: Eight lines, two of them paths.
PID_FILE_BYTES = 16 << 10
#: pid_t; a system call takes no larger number.
LARGEST_PID = (1 << 31) - 1
#: Postmasters that this process started and that nobody has reaped yet, by pid.
_children: dict[int, subprocess.Popen[bytes]] = {}


class PostmasterFile(Struct, frozen=True, kw_only=True):
    """What postmaster.pid says; later lines are absent while the server has only begun to start."""

    pid: int
    data_dir: str
    start_epoch_s: int
    port: int = 0
    socket_dir: str = ""
    listen_address: str = ""
    status: str = ""            # "starting", "stopping", "ready" (accepts connections), "standby" (runs, accepts none)
    single_user: bool = False   # `postgres --single` has the directory


class ProcessStat(Struct, frozen=True, kw_only=True):
    """Four fields of /proc/PID/stat. `start_ticks`: since boot, so pid and start together name one process for good."""

    name: str
    state: str
    parent: int
    start_ticks: int


def read_postmaster_pid(data_dir: Path) -> PostmasterFile | None:
    """The file's content, whether or not that postmaster lives; None if there is no file or it is still being written."""
    try:
        lines = read_beginning(data_dir / "postmaster.pid", PID_FILE_BYTES).decode(errors="replace").splitlines()
    except FileNotFoundError:
        return None
    lines += [""] * (8 - len(lines))
    try:
        pid = int(lines[0])
        if not 0 < abs(pid) <= LARGEST_PID:
            return None
        return PostmasterFile(
            pid=abs(pid), single_user=pid < 0, data_dir=lines[1], start_epoch_s=int(lines[2] or 0),
            port=int(lines[3] or 0), socket_dir=lines[4], listen_address=lines[5], status=lines[7].strip())
    except ValueError:
        return None


def read_stat(pid: int) -> ProcessStat | None:
    """None if there is no such process."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The name stands in parentheses and may itself contain any of ") (".
    name, _, rest = text.partition("(")[2].rpartition(") ")
    fields = rest.split()
    return ProcessStat(name=name, state=fields[0], parent=int(fields[1]), start_ticks=int(fields[19]))


def _stands_in(pid: int, real_dir: str) -> bool:
    try:
        return os.readlink(f"/proc/{pid}/cwd") == real_dir  # noqa: PTH115  (thousands of calls; no Path wanted)
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return False  # gone, or another user's


def _is_of(pid: int, real_dir: str) -> ProcessStat | None:
    stat = read_stat(pid)
    if stat is not None and stat.name in NAMES and stat.state not in "ZX" and _stands_in(pid, real_dir):
        return stat
    return None


def living_processes(data_dir: Path) -> list[int]:
    """Pids of every PostgreSQL process of this data directory: postmaster, children, orphans, single-user backends."""
    real_dir = os.path.realpath(data_dir)
    return [pid for pid in _all_pids() if _is_of(pid, real_dir)]


def _all_pids() -> Iterator[int]:
    return (int(name) for name in os.listdir("/proc") if name.isdigit())  # noqa: PTH208  (names are all that is needed)


class Postmaster:
    """A postmaster that was alive when the handle was made. The handle owns a descriptor: `close` it.

    `start_ticks` together with `pid` names the process for the whole boot.
    """

    def __init__(self, pid: int, start_ticks: int, pidfd: int, data_dir: Path) -> None:
        self.pid = pid
        self.start_ticks = start_ticks
        self.data_dir = data_dir
        self._pidfd = pidfd
        #: Known only of a child of this process, once it has ended; negative: the signal that ended it.
        self.exit_code: int | None = None

    def __repr__(self) -> str:
        return f"Postmaster(pid={self.pid}, start_ticks={self.start_ticks})"

    def alive(self) -> bool:
        """False once it has exited, reaped or not."""
        poll = select.poll()
        poll.register(self._pidfd, select.POLLIN)
        if poll.poll(0):
            self._reap()
            return False
        return True

    async def wait_exit(self) -> None:
        """Return when it has exited. No deadline: the caller's scope is the deadline."""
        await trio.lowlevel.wait_readable(self._pidfd)
        self._reap()

    def _reap(self) -> None:
        exit_code = reap(self.pid)
        self.exit_code = exit_code if self.exit_code is None else self.exit_code

    def signal(self, number: signal.Signals) -> bool:
        """Send it, to this process and no other; False if it has exited."""
        try:
            signal.pidfd_send_signal(self._pidfd, number)
        except ProcessLookupError:
            return False
        return True

    def status(self) -> str:
        """The status line of postmaster.pid, if the file is this postmaster's; "" otherwise."""
        file = read_postmaster_pid(self.data_dir)
        return file.status if file is not None and file.pid == self.pid else ""

    def close(self) -> None:
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1


def reap(pid: int) -> int | None:
    """Collect a dead child of ours, so that it does not stay as a zombie; its exit code if it was one."""
    child = _children.get(pid)
    if child is None:
        return None
    if child.poll() is not None:
        del _children[pid]
    return child.returncode


def handle_of_child(child: subprocess.Popen[bytes], data_dir: Path) -> Postmaster | int:
    """A handle on the postmaster that we have just started; its exit code if it has ended.

    Neither name nor working directory is asked for: Popen returns when exec closes the child's descriptors, and Linux
    gives the process its new name, and lets others read its links in /proc, only after that (fs/exec.c, begin_new_exec).
    A child that nobody has reaped keeps its number, so that the handle is on no other process.
    """
    _children[child.pid] = child  # whoever sees its end through a handle reaps it
    pidfd, stat = os.pidfd_open(child.pid), read_stat(child.pid)
    assert stat is not None, "a child that is not reaped has its entry"
    started = Postmaster(child.pid, stat.start_ticks, pidfd, data_dir)
    if not started.alive():
        started.close()
        assert started.exit_code is not None, "it has ended, and it was ours to reap"
        return started.exit_code
    return started


def handle_of(pid: int, data_dir: Path) -> Postmaster | None:
    """A handle on `pid` if that is a living PostgreSQL process of `data_dir` whose parent is not one."""
    real_dir = os.path.realpath(data_dir)
    try:
        pidfd = os.pidfd_open(pid)
    except OSError:
        return None  # no such process (ESRCH), or not a process (EINVAL)
    # Looked at after the pidfd was opened: if the number changes hands now, the pidfd stays with the one looked at.
    stat = _is_of(pid, real_dir)
    if stat is None or _is_of(stat.parent, real_dir) is not None:
        os.close(pidfd)
        return None
    found = Postmaster(pid, stat.start_ticks, pidfd, data_dir)
    if not found.alive():
        found.close()
        return None
    return found


def adopt(data_dir: Path) -> Postmaster | None:
    """The living postmaster of `data_dir`, whoever started it; None if there is none (also if only orphans are left)."""
    for pid in tuple(_children):
        reap(pid)  # one whose handle was dropped before its end
    file = read_postmaster_pid(data_dir)
    if file is None or file.single_user:
        return None
    return handle_of(file.pid, data_dir)


def remove_dead_pid_file(data_dir: Path, *, socket_dirs: Iterable[Path] = ()) -> bool:
    """Remove a postmaster.pid whose process is dead, or is not PostgreSQL's of this directory. True if there was one.

    PostgreSQL itself refuses to start while *any* process of our user has that number, a zombie included; the lock files
    of its sockets work alike and go with it (`socket_dirs`: those that postmaster.pid does not name, it has only the
    first). PostgresError while any process of the directory lives: then the file, which names the shared memory, is what
    protects the data.
    """
    file, path = read_postmaster_pid(data_dir), data_dir / "postmaster.pid"
    if file is None and not path.exists():
        return False
    if living := living_processes(data_dir):
        raise PostgresError(f"postmaster.pid stays: processes {living} of {data_dir} live")
    if file is None:
        # Killed between creating the file and writing it; PostgreSQL refuses to start over an empty one. It changes into
        # the directory before it creates the file, so whoever is writing it now would have been found living.
        path.unlink(missing_ok=True)
        return True
    named = [Path(file.socket_dir)] if file.socket_dir else []
    for directory in {*named, *socket_dirs}:
        lock = directory / f".s.PGSQL.{file.port}.lock"
        try:
            pid, owner = read_beginning(lock, PID_FILE_BYTES).decode(errors="replace").splitlines()[:2]
        except (OSError, ValueError):
            continue  # none, not of a server of ours, or no name that a file can have: the directory is what the file said
        if pid.strip() == str(file.pid) and owner == file.data_dir:
            lock.unlink(missing_ok=True)
    path.unlink(missing_ok=True)
    return True


async def wait_no_process(data_dir: Path, *, deadline_s: float, poll_s: float = 0.01) -> None:
    """Return when no PostgreSQL process of `data_dir` lives. PostgresTimeout names those that are left."""
    with trio.move_on_after(max(0.0, deadline_s)):
        while living_processes(data_dir):  # noqa: ASYNC110  (other people's processes: nothing to be told by)
            await trio.sleep(poll_s)
        return
    raise PostgresTimeout(f"processes {living_processes(data_dir)} of {data_dir} live after {deadline_s:g} s")
