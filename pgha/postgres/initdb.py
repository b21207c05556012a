"""Make a new data directory with initdb."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from pgha.errors import CommandFailed, ConfigError
from pgha.postgres.programs import Run, binary, clean_environment, run

#: Options that would take from us what we must know or be sure of.
FORBIDDEN = ("pgdata", "nosync", "no-sync", "pwfile", "sync-only", "version", "username", "pwprompt", "help")

Options = Sequence[str | Mapping[str, object]]


def option_arguments(options: Options, *, forbidden: Sequence[str], where: str) -> list[str]:
    """["data-checksums", {"encoding": "UTF8"}] → ["--data-checksums", "--encoding=UTF8"].

    A mapping may hold several options; true and false as value switch a flag on and off. ConfigError with every
    option that is forbidden or malformed.
    """
    arguments: list[str] = []
    problems: list[str] = []
    for item in options:
        pairs = {item: True} if isinstance(item, str) else dict(item)
        for name, value in pairs.items():
            bare = name.removeprefix("--")
            if bare in forbidden:
                problems.append(f"{where}: option {bare!r} is not allowed here")
            elif not bare.replace("-", "").isalnum() or bare.startswith("-"):
                problems.append(f"{where}: {name!r} is not a long option's name")
            elif value is True:
                arguments.append(f"--{bare}")
            elif value is not False and value is not None:
                arguments.append(f"--{bare}={value}")
    if problems:
        raise ConfigError(*problems)
    return arguments


async def initdb(data_dir: Path, bin_dir: Path | str, options: Options, *, superuser: str, password: str | None,
                 deadline_s: float, run: Run = run) -> None:
    """Fill `data_dir`. CommandFailed with initdb's words (it removes what it made), PostgresTimeout, ConfigError.

    The environment's locale applies, as with initdb by hand.
    """
    arguments = option_arguments(options, forbidden=FORBIDDEN, where="bootstrap.initdb")
    argv: list[str | Path] = [binary(bin_dir, "initdb"), "-D", data_dir, f"--username={superuser}", *arguments]
    passwords: str | None = None
    try:
        if password is not None:
            fd, passwords = tempfile.mkstemp(prefix=".pgha-initdb-", dir=data_dir.parent)  # 0600
            with os.fdopen(fd, "w", encoding="utf-8") as f:
                f.write(password + "\n")
            argv.append(f"--pwfile={passwords}")
        done = await run(argv, deadline_s=deadline_s, env=clean_environment(), dies_with_us=True)
    finally:
        if passwords is not None:
            Path(passwords).unlink(missing_ok=True)
    if done.exit_code != 0:
        raise CommandFailed("initdb", done.exit_code, done.stderr or done.stdout)
