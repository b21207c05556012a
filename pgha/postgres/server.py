"""Start, stop, reload, promote: what is done to a whole server. Never when, never why.

The postmaster is our child in a session of its own: it outlives the agent, whatever kills that, and no signal meant
for the agent's terminal or group reaches it. Its working directory is the data directory from its first instruction on,
so that a sweep by working directory finds it at any moment (safety model 8).

What makes a start a primary's or a standby's is standby.signal, which the caller has written or removed (files.py).
"""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, Protocol

import trio

from pgha.errors import CommandFailed, PostgresError, PostgresTimeout, PostgresUnreachable
from pgha.postgres.connection import Connection
from pgha.postgres.processes import Postmaster, handle_of_child
from pgha.postgres.programs import Run, binary, clean_environment, run

StopMode = Literal["smart", "fast", "immediate"]
_STOP_SIGNALS: dict[StopMode, signal.Signals] = {
    "smart": signal.SIGTERM, "fast": signal.SIGINT, "immediate": signal.SIGQUIT}

#: After the crash of one backend the postmaster must end instead of starting again by itself, because standby.signal
#: exists "at rest" and it would come back in recovery (safety model 7, measured).
FORCED = {"restart_after_crash": "off"}

#: How often a starting or promoting server is looked at.
POLL_S = 0.01
_LOG_TAIL_BYTES = 4096


class Launch(Protocol):
    """See `launch`."""

    async def __call__(self, argv: Sequence[str], *, data_dir: Path, log_path: Path) -> Postmaster | int: ...


async def launch(argv: Sequence[str], *, data_dir: Path, log_path: Path) -> Postmaster | int:
    """Start a postmaster, in a session of its own, standing in its data directory. Its exit code if it ended at once.

    PostgresUnreachable if it could not be executed.
    """
    group_readable = bool(data_dir.stat().st_mode & 0o040)
    log_fd = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o640 if group_readable else 0o600)
    env = clean_environment()

    def spawn() -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            argv, cwd=data_dir, stdin=subprocess.DEVNULL, stdout=log_fd, stderr=log_fd, env=env,
            start_new_session=True, umask=0o027 if group_readable else 0o077)

    try:
        # In a thread, because exec reads from disk; not abandoned when cancelled, so that no child goes unseen.
        child = await trio.to_thread.run_sync(spawn)
    except OSError as e:
        raise PostgresUnreachable(f"cannot start {argv[0]}: {e.strerror}") from e
    finally:
        os.close(log_fd)
    return handle_of_child(child, data_dir)


class Server:
    """A data directory and the programs that run it. Holds no state: processes are found, never remembered.

    `config_file`: where postgresql.conf is, if not in the data directory. `log_path`: where the server writes until its
    own logging takes over; by default "postmaster.log" beside the data directory. `run` and `launch`: how programs, and
    the postmaster, are started.
    """

    def __init__(self, data_dir: Path, bin_dir: Path | str, *, config_file: Path | None = None,
                 log_path: Path | None = None, run: Run = run, launch: Launch = launch) -> None:
        self.data_dir = data_dir
        self.bin_dir = bin_dir
        self.config_file = config_file
        self._run, self._launch = run, launch
        self.log_path = log_path or data_dir.parent / "postmaster.log"

    def command_line(self, parameters: Mapping[str, str], *, single_user: bool = False) -> list[str]:
        """The server's arguments. A setting given here can be overridden by nothing else."""
        argv = [binary(self.bin_dir, "postgres"), *(["--single"] if single_user else []), "-D", str(self.data_dir)]
        if self.config_file is not None:
            argv.append(f"--config_file={self.config_file}")
        return argv + [f"--{name}={value}" for name, value in ({**parameters, **FORCED}).items()]

    async def start(self, parameters: Mapping[str, str]) -> Postmaster:
        """Start the postmaster and return at once, with a handle on it; `wait_ready` says what became of it.

        CommandFailed if it ended immediately, PostgresUnreachable if it could not be executed. The caller has made
        sure that no other process of the directory lives.
        """
        started = await self._launch(self.command_line(parameters), data_dir=self.data_dir, log_path=self.log_path)
        if isinstance(started, int):
            raise CommandFailed("postgres", started, self.log_tail())
        return started

    async def wait_ready(self, postmaster: Postmaster, *, deadline_s: float, hot: bool = True) -> None:
        """Return when it accepts connections (with `hot` false, as a standby without hot_standby: when it runs).

        CommandFailed with the last log lines if it ends, PostgresTimeout if it is still on its way at the deadline.
        """
        wanted = ("ready",) if hot else ("ready", "standby")
        with trio.move_on_after(max(0.0, deadline_s)):
            while postmaster.status() not in wanted:
                with trio.move_on_after(POLL_S):
                    await postmaster.wait_exit()
                    raise CommandFailed("postgres", postmaster.exit_code or 0, self.log_tail())
            return
        raise PostgresTimeout(f"PostgreSQL is {postmaster.status() or 'silent'!r} after {deadline_s:g} s")

    def stop(self, postmaster: Postmaster, mode: StopMode) -> bool:
        """Ask it to end, by signal; False if it has. Wait with `postmaster.wait_exit()`. A stopped (SIGSTOP) one ignores it."""
        return postmaster.signal(_STOP_SIGNALS[mode])

    def reload(self, postmaster: Postmaster) -> bool:
        """Have the configuration files read again; False if it has ended. The effect comes a little later."""
        return postmaster.signal(signal.SIGHUP)

    def request_promotion(self, postmaster: Postmaster) -> None:
        """Have a standby leave recovery. The same request that pg_promote() makes, but it needs no free connection.

        PostgreSQL removes a left-over request when it starts.
        """
        fd = os.open(self.data_dir / "promote", os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        os.close(fd)
        if not postmaster.signal(signal.SIGUSR1):
            (self.data_dir / "promote").unlink(missing_ok=True)
            raise PostgresUnreachable("the postmaster has ended")

    async def promote(self, postmaster: Postmaster, conn: Connection, *, deadline_s: float) -> None:
        """`request_promotion`, then wait until writes are accepted. PostgresTimeout: it may still happen."""
        self.request_promotion(postmaster)
        await self.wait_promoted(postmaster, conn, deadline_s=deadline_s)

    async def wait_promoted(self, postmaster: Postmaster, conn: Connection, *, deadline_s: float) -> None:
        """Return when the server is out of recovery. PostgresUnreachable if it ended, PostgresTimeout."""
        until = trio.current_time() + deadline_s
        while (left_s := until - trio.current_time()) > 0:
            if (await conn.query("SELECT pg_is_in_recovery()", deadline_s=left_s))[0][0] == "f":
                return
            with trio.move_on_after(POLL_S / 2):
                await postmaster.wait_exit()
                raise PostgresUnreachable(f"PostgreSQL ended during promotion: {self.log_tail()[-500:]}")
        raise PostgresTimeout(f"still in recovery {deadline_s:g} s after the promotion was requested")

    async def single_user_recovery(self, parameters: Mapping[str, str], *, deadline_s: float) -> None:
        """Replay a crashed server's WAL and shut it down cleanly, without it ever listening.

        standby.signal must be absent (PostgreSQL refuses otherwise: checked here, with a better text). WAL that pg_rewind
        may need is kept: with an archiver that never succeeds no segment is recycled. CommandFailed, PostgresTimeout.
        """
        for name in ("standby.signal", "recovery.signal"):
            if (self.data_dir / name).exists():
                raise PostgresError(f"{name} must be absent for recovery in single-user mode")
        keep_wal = {"archive_mode": "on", "archive_command": "false"}
        argv = [*self.command_line({**parameters, **keep_wal}, single_user=True), "template1"]
        done = await self._run(argv, deadline_s=deadline_s, dies_with_us=True, cwd=self.data_dir, env=clean_environment(messages_in_english=True))
        if done.exit_code != 0:
            raise CommandFailed("postgres --single", done.exit_code, done.stderr)

    async def configuration_errors(self, parameters: Mapping[str, str], *, deadline_s: float) -> str:
        """What PostgreSQL would say against starting (or reloading) with the files as they are; "" if nothing.

        Reads the files as the server would, without starting it, whether or not it runs.
        """
        argv = [*self.command_line(parameters), "-C", "data_directory"]
        done = await self._run(argv, deadline_s=deadline_s, cwd=self.data_dir, env=clean_environment(messages_in_english=True))
        return "" if done.exit_code == 0 else done.stderr.strip() or f"exit code {done.exit_code}"

    def log_tail(self) -> str:
        """The last lines that the server wrote before (or instead of) its own logging. "" if unreadable."""
        try:
            with self.log_path.open("rb") as f:
                f.seek(0, os.SEEK_END)
                f.seek(max(0, f.tell() - _LOG_TAIL_BYTES))
                return f.read().decode(errors="replace")
        except OSError:
            return ""
