"""Run one of PostgreSQL's programs: never past its deadline, never leaving a child behind, never showing a secret.

Rules of this file:
* A program runs in its own session, so that a signal reaches its children too (pg_rewind starts `postgres --single`,
  pg_basebackup forks a WAL receiver), and so that a terminal's Ctrl-C does not.
* Deadline and cancellation end alike: SIGTERM to the whole group, `GRACE_S` to comply, then SIGKILL, and it is reaped.
* What changes a data directory dies with us (`dies_with_us`), however we die: a pg_rewind that nobody knows of must not
  work beside the next agent. The kernel does it (PR_SET_PDEATHSIG), when the *thread* that forked has ended: therefore
  a thread of its own starts the program and stays until its end. A wrapper asks for it, not `preexec_fn`, which may
  hang in a process with threads.
* What a program has left in the background ends with it, unless its caller spares that (`spare_background`).
* Output is streamed to `on_output` if asked; of each stream only the last `TAIL_BYTES` are kept.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Protocol

import trio
from msgspec import Struct

from pgha.errors import CommandFailed, PostgresTimeout, PostgresUnreachable

#: What a program has between SIGTERM and SIGKILL.
GRACE_S = 1.0
#: Whoever has its output from it, and is left, may hold that open for ever: it is read for so long after its end.
LAST_WORDS_S = 0.5
#: Where the kernel does not tell of a program's end, it is looked for this often.
LOOK_S = 0.1
#: How much of each output stream is kept: enough for an error and its context.
TAIL_BYTES = 64 * 1024

#: Environment through which libpq would be told things behind our back. Listed, not matched by prefix: backup tools
#: called by archive_command have variables that begin with PG, too.
_LIBPQ_VARIABLE = re.compile(
    "PG(HOST|HOSTADDR|PORT|DATABASE|USER|PASSWORD|PASSFILE|REQUIREAUTH|CHANNELBINDING|SERVICE|SERVICEFILE|OPTIONS|APPNAME"
    "|SSL[A-Z]+|REQUIRESSL|REQUIREPEER|GSS[A-Z]+|KRBSRVNAME|CONNECT_TIMEOUT|CLIENTENCODING|TARGETSESSIONATTRS"
    "|LOADBALANCEHOSTS|M(IN|AX)PROTOCOLVERSION|SYSCONFDIR|LOCALEDIR|OAUTH[A-Z]+)")


_OF_SYSTEMD = frozenset({"NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID", "JOURNAL_STREAM", "MAINPID", "CREDENTIALS_DIRECTORY"})


def clean_environment(extra: Mapping[str, str] | None = None, *, messages_in_english: bool = False) -> dict[str, str]:
    """Our environment without what is the agent's own or libpq's, plus `extra`.

    PostgreSQL must not see what systemd gave the agent alone (it would speak in the agent's name) nor any secret of ours.
    `messages_in_english` is for programs whose output is parsed.
    """
    env = {
        name: value for name, value in os.environ.items()
        if not name.startswith(("PGHA_", "PATRONI_")) and name not in _OF_SYSTEMD and not _LIBPQ_VARIABLE.fullmatch(name)
    }
    if messages_in_english:
        env.pop("LANGUAGE", None)
        env |= {"LC_ALL": "C", "LANG": "C"}
    return env | dict(extra or {})


#: argv: our process id, the program, its arguments. Python ignores SIGPIPE, which an exec would hand on.
_DIE_WITH = """\
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)
if os.getppid() != int(sys.argv[1]):
    sys.exit(1)
for number in (signal.SIGPIPE, signal.SIGXFSZ):
    signal.signal(number, signal.SIG_DFL)
os.execv(sys.argv[2], sys.argv[3:])
"""


class Completed(Struct, frozen=True, kw_only=True):
    """A program that ended. `stdout` and `stderr` are the tails of the two streams."""

    exit_code: int
    stdout: str
    stderr: str


class _Tail:
    """The last bytes of a stream, passed on as they come."""

    def __init__(self, on_output: Callable[[bytes], None] | None) -> None:
        self._kept = bytearray()
        self._on_output = on_output

    async def fill(self, stream: trio.abc.ReceiveStream) -> None:
        async with stream:
            async for chunk in stream:
                self._kept += chunk
                if len(self._kept) > 2 * TAIL_BYTES:
                    del self._kept[:-TAIL_BYTES]
                if self._on_output is not None:
                    self._on_output(bytes(chunk))

    def text(self) -> str:
        return bytes(self._kept[-TAIL_BYTES:]).decode(errors="replace")


async def _exited(pid: int) -> None:
    """Wait for the child's end without reaping it: while it is a zombie, its group's number cannot be another's."""
    try:
        pidfd = os.pidfd_open(pid)
    except OSError:     # no descriptor is left: it must be waited for all the same
        while os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:  # noqa: ASYNC110, ASYNC222  (it returns at once)
            await trio.sleep(LOOK_S)
        return
    try:
        await trio.lowlevel.wait_readable(pidfd)
    finally:
        os.close(pidfd)


class _Child(Struct, frozen=True, kw_only=True):
    """A program that was started, and how to let the thread go that holds it."""

    process: subprocess.Popen[bytes]
    stdout: trio.abc.ReceiveStream
    stderr: trio.abc.ReceiveStream
    ended: threading.Event


async def _start(argv: Sequence[str], *, env: Mapping[str, str], cwd: Path | None, dies_with_us: bool) -> _Child:
    """OSError if it cannot be started. Not left half-way when cancelled."""
    if dies_with_us:
        program = shutil.which(argv[0], path=env.get("PATH"))
        if program is None:
            raise FileNotFoundError(2, os.strerror(2), argv[0])
        argv = [sys.executable, "-I", "-S", "-c", _DIE_WITH, str(os.getpid()), program, *argv]
    begun: Future[subprocess.Popen[bytes]] = Future()
    ended = threading.Event()

    def hold() -> None:
        try:
            process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                       bufsize=0, env=env, cwd=cwd, start_new_session=True)
        except BaseException as error:  # noqa: BLE001  (whoever waits for it is to hear of it, whatever it is)
            begun.set_exception(error)
            return
        begun.set_result(process)
        ended.wait()

    def begin() -> subprocess.Popen[bytes]:
        threading.Thread(target=hold, name=f"holds {Path(argv[0]).name}", daemon=True).start()
        return begun.result()

    process = await trio.to_thread.run_sync(begin)   # exec reads from disk; cancelled before it: nothing is begun
    assert process.stdout is not None
    assert process.stderr is not None
    pipes, copies = (process.stdout, process.stderr), list[int]()
    try:
        copies += [os.dup(pipes[0].fileno())]
        copies += [os.dup(pipes[1].fileno())]
    except OSError:     # no descriptor is left
        for copy in copies:
            os.close(copy)
        _signal_group(process.pid, signal.SIGKILL)
        with trio.CancelScope(shield=True):
            await _exited(process.pid)
        process.wait()
        ended.set()
        raise
    finally:
        for pipe in pipes:
            pipe.close()
    streams = [trio.lowlevel.FdStream(copy) for copy in copies]
    return _Child(process=process, stdout=streams[0], stderr=streams[1], ended=ended)


async def _end(child: _Child, *, spare: bool) -> None:
    """SIGTERM to the group, a grace, SIGKILL, reap. Shielded; bounded by the grace and the kernel's kill.

    `spare`: it ended by itself, and what it started may go on.
    """
    pid = child.process.pid
    with trio.CancelScope(shield=True):
        if not spare:
            _signal_group(pid, signal.SIGTERM)
            with trio.move_on_after(GRACE_S):
                await _exited(pid)
            # Also when it ended by itself: nothing that it started may outlive it.
            _signal_group(pid, signal.SIGKILL)
            await _exited(pid)
        child.process.wait()
        child.ended.set()


def _signal_group(pid: int, number: signal.Signals) -> None:
    try:
        os.killpg(pid, number)
    except ProcessLookupError:
        pass  # the whole group is gone already


class Run(Protocol):
    """Run a program to its end: see `run`."""

    async def __call__(
        self, argv: Sequence[str | Path], *, deadline_s: float, env: Mapping[str, str] | None = None, cwd: Path | None = None,
        on_output: Callable[[bytes], None] | None = None, on_error_output: Callable[[bytes], None] | None = None,
        dies_with_us: bool = False, spare_background: bool = False,
    ) -> Completed: ...


async def run(
    argv: Sequence[str | Path], *, deadline_s: float, env: Mapping[str, str] | None = None, cwd: Path | None = None,
    on_output: Callable[[bytes], None] | None = None, on_error_output: Callable[[bytes], None] | None = None,
    dies_with_us: bool = False, spare_background: bool = False,
) -> Completed:
    """Run `argv` with stdin closed. `env` is complete, or None for `clean_environment(messages_in_english=True)`.

    PostgresTimeout at the deadline, PostgresUnreachable if the program cannot be started. A non-zero exit code is
    an answer, not an error: see `run_checked`.
    """
    name = Path(argv[0]).name
    out, err = _Tail(on_output), _Tail(on_error_output)
    with trio.move_on_after(max(0.0, deadline_s)):
        try:
            child = await _start([str(a) for a in argv], cwd=cwd, dies_with_us=dies_with_us,
                                 env=dict(env) if env is not None else clean_environment(messages_in_english=True))
        except OSError as e:
            raise PostgresUnreachable(f"cannot start {argv[0]}: {e.strerror}") from e
        reading = trio.CancelScope(shield=True)     # until its end: a last word to a closed pipe would kill it while it clears up

        async def read() -> None:
            with reading:
                async with trio.open_nursery() as streams:
                    streams.start_soon(out.fill, child.stdout)
                    streams.start_soon(err.fill, child.stderr)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(read)
            by_itself = False
            try:
                await _exited(child.process.pid)
                by_itself = True
            finally:
                await _end(child, spare=by_itself and spare_background)
                reading.deadline = trio.current_time() + LAST_WORDS_S
        return Completed(exit_code=child.process.returncode, stdout=out.text(), stderr=err.text())
    raise PostgresTimeout(f"{name} had not ended after {deadline_s:g} s: {err.text().strip()[-500:]}")


async def run_checked(
    argv: Sequence[str | Path], *, deadline_s: float, env: Mapping[str, str] | None = None, cwd: Path | None = None,
    dies_with_us: bool = False, run: Run = run,
) -> Completed:
    """`run`, with CommandFailed for a non-zero exit code."""
    done = await run(argv, deadline_s=deadline_s, env=env, cwd=cwd, dies_with_us=dies_with_us)
    if done.exit_code != 0:
        raise CommandFailed(Path(argv[0]).name, done.exit_code, done.stderr or done.stdout)
    return done


def binary(bin_dir: Path | str, name: str) -> str:
    """Path of one of PostgreSQL's programs; an empty `bin_dir` means the search path."""
    return str(Path(bin_dir) / name) if str(bin_dir) not in ("", ".") else name


async def major_version(bin_dir: Path | str, *, deadline_s: float) -> int:
    """Which PostgreSQL the programs are of: 15. CommandFailed, PostgresUnreachable, PostgresTimeout."""
    done = await run_checked([binary(bin_dir, "postgres"), "--version"], deadline_s=deadline_s)
    match = re.search(r"\) (\d+)", done.stdout)  # "postgres (PostgreSQL) 15.20 (Debian …)", "… 19devel"
    if match is None:
        raise CommandFailed("postgres", 0, f"not a version: {done.stdout}")
    return int(match[1])
