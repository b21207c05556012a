"""Which processes belong to this bed, and how are they started, signalled and reaped?

Rules of this file: a process is signalled only after its start time was checked through an open pidfd, so that a
reused pid is never hit; a zombie counts as dead; everything that is started is registered, so that the reaper never
takes an exit status that somebody waits for.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

#: Nothing of the caller's environment reaches what is started, except what is named.
CLEAN_ENVIRONMENT = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C.UTF-8", "TZ": "UTC"}

#: What a bed starts, directly or through its agents.
_PROGRAMS = {"etcd", "postgres", "initdb", "pg_ctl", "pg_basebackup", "pg_rewind", "pg_controldata", "pg_waldump"}

_PR_SET_CHILD_SUBREAPER = 36
_REAP_INTERVAL_S = 0.02

#: Held while a process is started and registered; the reaper looks only in between.
_starting = threading.Lock()
_awaited: set[int] = set()


class Process(NamedTuple):
    """A process that cannot be mistaken for another: start time in clock ticks since boot."""

    pid: int
    start_ticks: int

    @property
    def alive(self) -> bool:
        """A zombie is dead: it will never run another instruction."""
        stat = _stat(self.pid)
        return stat is not None and stat.start_ticks == self.start_ticks and stat.state not in "ZX"

    @property
    def stopped(self) -> bool:
        """Stopped by a signal (state T)."""
        stat = _stat(self.pid)
        return stat is not None and stat.start_ticks == self.start_ticks and stat.state in "Tt"

    def send(self, number: signal.Signals) -> bool:
        """False if the process is gone (that is what most signals are sent for)."""
        try:
            fd = os.pidfd_open(self.pid)
        except ProcessLookupError:
            return False
        try:
            if not self.alive:
                return False
            signal.pidfd_send_signal(fd, number)
        except ProcessLookupError:
            return False
        finally:
            os.close(fd)
        return True


class _Stat(NamedTuple):
    name: str
    state: str
    parent: int
    start_ticks: int


def _stat(pid: int) -> _Stat | None:
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    head, _, tail = text.rpartition(")")
    fields = tail.split()
    return _Stat(head.partition("(")[2], fields[0], int(fields[1]), int(fields[19]))


def identify(pid: int) -> Process | None:
    """The living process with this pid, if there is one."""
    stat = _stat(pid)
    return None if stat is None or stat.state in "ZX" else Process(pid, stat.start_ticks)


def _living() -> Iterator[tuple[Process, _Stat]]:
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            stat = _stat(int(entry.name))
            if stat is not None and stat.state not in "ZX":
                yield Process(int(entry.name), stat.start_ticks), stat


def postgres_of(data_dir: Path) -> list[Process]:
    """Every living process of PostgreSQL's that works in this data directory, orphans included."""
    found = []
    for process, stat in _living():
        if stat.name == "postgres":
            try:
                where = Path(f"/proc/{process.pid}/cwd").readlink()
            except OSError:
                continue
            if where == data_dir:
                found.append(process)
    return found


def pgha_of(subcommand: str, config: Path) -> list[Process]:
    """Living processes `pgha SUBCOMMAND … CONFIG …`."""
    return [p for p, words in _command_lines() if subcommand in words and str(config) in words]


def belonging_to(*places: Path) -> list[Process]:
    """Living processes of the kinds that a bed starts and that work on files below one of these directories.

    Somebody's shell, editor or `tail -f` there is none of them.
    """
    inside = tuple(f"{place}/" for place in places)
    found = []
    for process, words in _command_lines():
        name = Path(words[0]).name
        ours = name in _PROGRAMS or (name.startswith("python") and ("run" in words or "guard" in words))
        if ours and any(word.partition("=")[2].startswith(inside) or word.startswith(inside) for word in words[1:]):
            found.append(process)
    for process, stat in _living():
        if stat.name == "postgres":
            try:
                where = os.readlink(f"/proc/{process.pid}/cwd")  # noqa: PTH115  (compared as text)
            except OSError:
                continue
            if where.startswith(inside):
                found.append(process)
    return sorted(set(found))


def _command_lines() -> Iterator[tuple[Process, list[str]]]:
    for process, _ in _living():
        try:
            words = Path(f"/proc/{process.pid}/cmdline").read_bytes().decode(errors="replace").rstrip("\0").split("\0")
        except OSError:
            continue
        if words[0]:
            yield process, words


def signal_all(processes: Sequence[Process], number: signal.Signals) -> int:
    """How many were still there to get it."""
    return sum(process.send(number) for process in processes)


def as_user(user: str | None) -> dict[str, Any]:
    """Arguments for subprocess that make it run as `user`; none when nobody else is asked for."""
    return {} if user is None else {"user": user, "group": user, "extra_groups": []}


def spawn(
    argv: Sequence[str], *, log: Path, directory: Path, user: str | None = None, environment: Mapping[str, str] | None = None
) -> subprocess.Popen[bytes]:
    """Start a process in a session of its own, output appended to `log`. The caller waits for it."""
    with _starting, log.open("ab") as output:
        child = subprocess.Popen(
            argv, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, cwd=directory, start_new_session=True,
            env={**CLEAN_ENVIRONMENT, **(environment or {})}, **as_user(user),
        )
        _awaited.add(child.pid)
    return child


def run(
    argv: Sequence[str], *, timeout_s: float, user: str | None = None, environment: Mapping[str, str] | None = None,
    directory: Path = Path("/"),
) -> subprocess.CompletedProcess[str]:
    """Run to the end and return output and exit code; TimeoutExpired (after killing it) if it takes longer."""
    with _starting:
        child = subprocess.Popen(
            argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=directory,
            env={**CLEAN_ENVIRONMENT, **(environment or {})}, **as_user(user),
        )
        _awaited.add(child.pid)
    try:
        output, errors = child.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        child.kill()
        child.communicate()
        raise
    finally:
        _awaited.discard(child.pid)
    return subprocess.CompletedProcess(list(argv), child.returncode, output, errors)


def process_of(child: subprocess.Popen[bytes]) -> Process | None:
    """The living process behind a Popen."""
    return identify(child.pid) if child.poll() is None else None


class Reaper:
    """Collects orphans of what we started, as an init system would.

    PID 1 of many containers does so late or never, and a killed postmaster would be a zombie for ever. Only children
    that nobody here registered are touched, and only when they were seen dead in two rounds: a `subprocess.run` of
    somebody else's waits for its child at once.
    """

    def __init__(self) -> None:
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._work, name="reaper", daemon=True)

    def __enter__(self) -> Self:
        if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
            raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()

    def _work(self) -> None:
        dead_before: set[int] = set()
        while not self._end.wait(_REAP_INTERVAL_S):
            with _starting:
                dead = {pid for pid in _own_children() if pid not in _awaited and _is_zombie(pid)}
                for pid in dead & dead_before:
                    try:
                        os.waitpid(pid, os.WNOHANG)
                    except ChildProcessError:
                        pass  # somebody else's wait was quicker
            dead_before = dead


def _own_children() -> set[int]:
    found: set[int] = set()
    for task in Path("/proc/self/task").iterdir():
        try:
            found.update(map(int, (task / "children").read_text().split()))
        except OSError:
            continue  # that thread has just ended
    return found


def _is_zombie(pid: int) -> bool:
    stat = _stat(pid)
    return stat is not None and stat.state == "Z"
