"""What does PostgreSQL itself say of its parameters? Asked of the running server, or of its program; never a copied table.

* `SETTINGS_SQL` and `FILES_SQL`: rows of pg_settings, and what the configuration files say, which a restart would apply.
* `described`: `postgres --describe-config`, without a server. It lists what belongs into a file, without units and choices.
* `refused`: the program reads a file of our making (`postgres -C` ends before it touches a data directory): its own check
  of names, units, ranges, choices and everything else that it would say at a start, in its own words. 10 ms.
"""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Awaitable, Callable, Iterable, Mapping
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import trio
from msgspec import Struct

from pgha.errors import CommandFailed, PostgresTimeout
from pgha.model.gucs import Guc, GucFacts
from pgha.postgres.files import quote_setting, write_file
from pgha.postgres.programs import Run, binary, major_version, run, run_checked

#: $1: the names asked for, in lower case; an empty array: all
SETTINGS_SQL = """SELECT name, setting, unit, vartype, context, pending_restart, current_setting(name, true), min_val, max_val,
  array_to_string(enumvals, chr(10)), source, sourcefile, sourceline, boot_val
FROM pg_settings WHERE pending_restart OR lower(name) = ANY ($1::text[]) OR $1::text[] = '{}'"""

#: The entry of each parameter that is read last, and so wins. For superusers only.
FILES_SQL = """SELECT DISTINCT ON (lower(name)) lower(name), setting, sourcefile, sourceline FROM pg_file_settings
WHERE name IS NOT NULL ORDER BY lower(name), seqno DESC"""

#: Each round finds at least one more: unknown names are told before any value is looked at.
_ROUNDS = 8
HERE_DEADLINE_S = 5.0
#: What changes where and how the program tells of the others' faults is read last.
_TELLING = ("log_line_prefix", "log_error_verbosity", "lc_messages", "log_destination", "log_min_messages")
_NAMED = re.compile(r'parameter "([^"]+)"')
_MESSAGE = re.compile(r"(LOG|WARNING|ERROR|FATAL|HINT|DETAIL):  (.*)$")
_TYPES = {"BOOLEAN": "bool", "INTEGER": "integer", "REAL": "real", "STRING": "string", "ENUM": "enum"}

#: Of each check of this process, so that two at a time have a directory each.
_number = count()

InThread = Callable[[Callable[[], Any]], Awaitable[Any]]


def settings_argument(names: Iterable[str]) -> str:
    """The parameter of SETTINGS_SQL: a text array."""
    return "{" + ",".join('"' + n.lower().replace("\\", "\\\\").replace('"', '\\"') + '"' for n in names) + "}"


def running_settings(rows: Iterable[tuple[str | None, ...]]) -> dict[str, Guc]:
    """Rows of SETTINGS_SQL, by name in lower case."""
    settings = {}
    for name, value, unit, vartype, context, pending, shown, least, most, choices, source, file, line, default in rows:
        assert name is not None
        settings[name.lower()] = Guc(
            name=name, value=value or "", unit=unit or "", vartype=vartype or "string", context=context or "", pending=pending == "t",
            shown=shown or "", minimum=least or "", maximum=most or "", choices=tuple((choices or "").split("\n")) if choices else (),
            source=source or "", file=file or "", line=int(line or 0), default=default or "")
    return settings


class FileEntry(Struct, frozen=True, kw_only=True):
    """What the configuration files say of a parameter, and where."""

    value: str
    file: str
    line: int = 0

    @property
    def by_alter_system(self) -> bool:
        return self.file.endswith("/postgresql.auto.conf")


def file_entries(rows: Iterable[tuple[str | None, ...]]) -> dict[str, FileEntry]:
    """Rows of FILES_SQL, by name in lower case."""
    return {name: FileEntry(value=value or "", file=file or "", line=int(line or 0)) for name, value, file, line in rows if name}


# --- the program -----------------------------------------------------------------------------------------------------

def parse_described(text: str) -> dict[str, Guc]:
    """The lines of --describe-config: name, context, group, type, a default that is none, least, most, descriptions."""
    gucs = {}
    for line in text.splitlines():
        words = line.split("\t")
        if len(words) >= 7 and words[3] in _TYPES:
            name, context, _, vartype, _, least, most = words[:7]
            gucs[name.lower()] = Guc(name=name, context=context, vartype=_TYPES[vartype], minimum=least, maximum=most)
    return gucs


async def described(bin_dir: Path | str, *, deadline_s: float, run: Run = run) -> dict[str, Guc]:
    """What the program knows, by name in lower case. CommandFailed, PostgresUnreachable, PostgresTimeout."""
    whole = bytearray()
    await run_checked([binary(bin_dir, "postgres"), "--describe-config"], deadline_s=deadline_s, run=partial(run, on_output=whole.extend))
    return parse_described(whole.decode(errors="replace"))


async def refused(settings: Mapping[str, str], *, bin_dir: Path | str, scratch: Path, in_thread: InThread, deadline_s: float,
                  run: Run = run) -> dict[str, str]:
    """Which of `settings` the program would not start with, and why, in its words; by name as given.

    CommandFailed if it refuses and does not say what; PostgresUnreachable, PostgresTimeout.
    """
    left = dict(settings)
    found: dict[str, str] = {}
    directory = scratch / f"check-{next(_number)}"
    try:
        with trio.move_on_after(deadline_s) as time:
            for _ in range(_ROUNDS):
                await in_thread(partial(_write_checked, directory, left))
                done = await run([binary(bin_dir, "postgres"), "-C", "data_directory", "-D", directory], deadline_s=deadline_s, cwd=directory)
                if done.exit_code == 0:
                    return found
                new = told(done.stderr, left)
                if not new:
                    raise CommandFailed("postgres -C", done.exit_code, done.stderr)
                found |= new
                left = {name: value for name, value in left.items() if name not in new}
        if time.cancelled_caught:
            raise PostgresTimeout(f"postgres -C had not ended after {deadline_s:g} s")
        raise CommandFailed("postgres -C", done.exit_code, done.stderr)
    finally:
        with trio.CancelScope(shield=True):
            await in_thread(partial(_forget_checked, directory))


def refused_here(bin_dir: Path | str, settings: Mapping[str, str]) -> tuple[dict[str, str], GucFacts]:
    """The same, for a command: which of `settings` the program on this machine refuses, and what it knows. PostgresError."""
    async def ask() -> tuple[dict[str, str], GucFacts]:
        with tempfile.TemporaryDirectory(prefix="pgha-check-") as scratch:
            found = await refused(settings, bin_dir=bin_dir, scratch=Path(scratch), in_thread=trio.to_thread.run_sync, deadline_s=HERE_DEADLINE_S)
        known = await described(bin_dir, deadline_s=HERE_DEADLINE_S)
        return found, GucFacts(of=known, version=await major_version(bin_dir, deadline_s=HERE_DEADLINE_S))

    return trio.run(ask)


def _write_checked(directory: Path, settings: Mapping[str, str]) -> None:
    directory.mkdir(mode=0o700, exist_ok=True)
    order = sorted(settings, key=lambda name: (_TELLING.index(name.lower()) if name.lower() in _TELLING else -1, name))
    lines = [f"{name} = {quote_setting(settings[name])}\n" for name in order]
    write_file(directory / "postgresql.conf", "".join(lines), mode=0o600)


def _forget_checked(directory: Path) -> None:
    shutil.rmtree(directory, ignore_errors=True)


def told(stderr: str, settings: Mapping[str, str]) -> dict[str, str]:
    """Which parameters messages name, and what they say of them: HINT and DETAIL belong to the line before."""
    names = {name.lower(): name for name in settings}
    found: dict[str, str] = {}
    about = ""
    for line in stderr.splitlines():
        match = _MESSAGE.search(line)
        if match is None:
            continue
        level, text = match[1], match[2]
        if level in ("HINT", "DETAIL"):
            if about:
                found[about] += f" ({text.rstrip('.')})"
            continue
        named = _NAMED.search(text)
        about = names.get(named[1].lower(), "") if named is not None and level != "WARNING" else ""
        if about:
            found.setdefault(about, re.sub(r' in file ".*$', "", text))
    return found
