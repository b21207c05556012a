"""Fill an empty directory from a running server with pg_basebackup, telling how far it is."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable
from pathlib import Path

from msgspec import Struct

from pgha.errors import CommandFailed, ConfigError, PostgresError
from pgha.postgres.files import conninfo_text
from pgha.postgres.initdb import Options, option_arguments
from pgha.postgres.programs import Run, binary, clean_environment, run

#: Options that we give ourselves, or that would leave no data directory behind.
FORBIDDEN = ("pgdata", "format", "wal-method", "xlog-method", "gzip", "version", "dbname", "host", "port", "username",
             "password", "no-password", "progress", "no-sync", "nosync", "write-recovery-conf", "no-clean", "help")
#: In the environment of the operator's programs, and of what they start: into which directory they copy.
COPIES_INTO = "COPIES_INTO_OF_PGHA"
#: "123456/789012 kB (15%), 0/1 tablespace"
_PROGRESS = re.compile(rb"(\d+)/(\d+) kB")


class Progress(Struct, frozen=True, kw_only=True):
    """Bytes copied, and bytes expected as the source estimated them at the start (0: not known)."""

    done_bytes: int
    total_bytes: int


def backup_arguments(options: Options) -> list[str]:
    """pg_basebackup's arguments for the operator's options. ConfigError names every one that is not allowed."""
    arguments = option_arguments(options, forbidden=FORBIDDEN, where="postgresql.basebackup")
    for argument in arguments:
        name, _, value = argument.removeprefix("--").partition("=")
        if name == "compress" and not value.startswith("server-"):
            raise ConfigError("postgresql.basebackup: compress is allowed only as server-… (the target is a directory)")
    return arguments


def progress_reader(on_progress: Callable[[Progress], None]) -> Callable[[bytes], None]:
    """What makes of --progress output, in whatever pieces it comes, calls of `on_progress`."""
    rest = b""
    last: tuple[int, int] | None = None

    def read(chunk: bytes) -> None:
        nonlocal rest, last
        data = rest + chunk
        end = max(data.rfind(b"\r"), data.rfind(b"\n"))
        found = _PROGRESS.findall(data[:end + 1])
        rest = data[end + 1:][-1024:]
        if found and (now := (int(found[-1][0]) * 1024, int(found[-1][1]) * 1024)) != last:
            last = now
            on_progress(Progress(done_bytes=now[0], total_bytes=now[1]))

    return read


def kill_leftovers(target_dir: Path) -> list[int]:
    """SIGKILL what an earlier pg_basebackup, or another program that copies, into `target_dir` left; their process ids.

    Its WAL receiver is a fork with the same arguments, which outlives a killed parent until it has a segment to tell it
    of (measured: for 20 s and more on an idle source), and would write into the next copy.
    """
    killed = []
    mark = os.fsencode(f"{COPIES_INTO}={target_dir}")
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            fd = os.pidfd_open(int(entry.name))     # before the look: what is killed is what was looked at
        except OSError:
            continue
        try:
            argv = (entry / "cmdline").read_bytes().split(b"\0")
            ours = Path(os.fsdecode(argv[0])).name == "pg_basebackup" and os.fsencode(f"--pgdata={target_dir}") in argv
            if ours or mark in (entry / "environ").read_bytes().split(b"\0"):
                signal.pidfd_send_signal(fd, signal.SIGKILL)
                killed.append(int(entry.name))
        except (ProcessLookupError, FileNotFoundError, PermissionError):
            pass    # gone, or another user's
        finally:
            os.close(fd)
    return killed


async def base_backup(
    target_dir: Path, bin_dir: Path | str, conninfo: dict[str, str | int], options: Options, *, deadline_s: float,
    on_progress: Callable[[Progress], None] | None = None, run: Run = run,
) -> None:
    """Copy the server of `conninfo` (passfile= for the password, never password=) into `target_dir`, fsynced.

    `target_dir` is missing or empty. CommandFailed with the last words; PostgresTimeout. Cancelled or failed, it leaves
    a partial directory, which is the caller's to delete.
    """
    arguments = backup_arguments(options)
    if target_dir.exists() and any(target_dir.iterdir()):
        raise PostgresError(f"{target_dir} is not empty")
    done = await run(
        [binary(bin_dir, "pg_basebackup"), f"--pgdata={target_dir}", "--wal-method=stream", "--progress", "--no-password",
         f"--dbname={conninfo_text(conninfo)}", *arguments],
        deadline_s=deadline_s, dies_with_us=True, env=clean_environment(messages_in_english=True),
        on_error_output=progress_reader(on_progress) if on_progress else None)
    if done.exit_code != 0:
        raise CommandFailed("pg_basebackup", done.exit_code, _without_progress(done.stderr))


def _without_progress(text: str) -> str:
    lines = re.split(r"[\r\n]+", text)
    return "\n".join(line for line in lines if line.strip() and not _PROGRESS.search(line.encode()))
