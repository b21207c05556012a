"""Where are pgha, etcd and PostgreSQL on this machine, and what is missing?"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from pgha.demo.processes import run
from pgha.errors import Refused

SUPPORTED_POSTGRES = range(13, 19)
_POSTGRES_PROGRAMS = ("postgres", "initdb", "pg_ctl", "pg_basebackup", "pg_rewind", "pg_controldata")
_POSTGRES_PLACES = ("/usr/lib/postgresql/*/bin", "/usr/pgsql-*/bin", "/usr/local/pgsql/bin")


class Missing(Refused):
    """Something that this machine lacks; the text says what to do."""


class Program(NamedTuple):
    """How to start pgha: the words before the subcommand, and what the environment needs."""

    argv: tuple[str, ...]
    environment: Mapping[str, str]


def own_program() -> Program:
    """The pgha that is running now: the archive if it was started from one, else this package's sources."""
    started = os.path.abspath(sys.argv[0])  # noqa: PTH100  (resolve() would follow a link out of the named place)
    if zipfile.is_zipfile(started):
        cache = os.environ.get("PGHA_CACHE")
        return Program((sys.executable, "-IS", started), {"PGHA_CACHE": cache} if cache else {})
    sources = Path(__file__).resolve().parents[2]
    return Program((sys.executable, "-m", "pgha"), {"PYTHONPATH": str(sources)})


def for_user(program: Program, user: str, directory: Path) -> Program:
    """The same program, so that `user` can run it: the archive copied to `directory`, an interpreter that it may run.

    Our cache directory is of no use to another user, who makes one in its usual place.
    """
    argv = list(program.argv)
    environment = {name: value for name, value in program.environment.items() if name != "PGHA_CACHE"}
    if zipfile.is_zipfile(argv[-1]):
        argv[-1] = shutil.copy(argv[-1], str(directory / "pgha.pyz"))
        os.chmod(argv[-1], 0o644)  # noqa: PTH101
    for interpreter in dict.fromkeys((argv[0], "/usr/bin/python3", "/usr/local/bin/python3")):
        candidate = Program((interpreter, *argv[1:]), environment)
        try:
            answer = run([*candidate.argv, "--version"], timeout_s=30, user=user, environment=environment)
        except (OSError, subprocess.TimeoutExpired):
            continue
        if answer.returncode == 0:
            return candidate
    raise Missing(f"user {user} can run neither {argv[0]} nor /usr/bin/python3 with pgha: install python3 (3.11 or newer)")


def find_etcd() -> str:
    """The etcd server program. Raises Missing."""
    found = shutil.which("etcd", path=os.environ.get("PATH", "") + ":/usr/bin:/usr/local/bin:/usr/sbin")
    if found is None:
        raise Missing("etcd is not installed: apt-get install etcd-server (Debian 11: etcd)")
    return found


def find_postgres(bin_dir: Path | None = None) -> Path:
    """PostgreSQL's program directory: the given one, else that of the newest supported version. Raises Missing."""
    if bin_dir is not None:
        absent = [name for name in _POSTGRES_PROGRAMS if not os.access(bin_dir / name, os.X_OK)]
        if absent:
            raise Missing(f"--bin-dir {bin_dir} lacks {', '.join(absent)} (or they cannot be executed)")
        return bin_dir
    found = {}
    for pattern in _POSTGRES_PLACES:
        for place in Path("/").glob(pattern.lstrip("/")):
            version = _major(place)
            if version in SUPPORTED_POSTGRES and all(os.access(place / name, os.X_OK) for name in _POSTGRES_PROGRAMS):
                found[version] = place
    if not found:
        raise Missing("PostgreSQL 13 to 18 is not installed: apt-get install postgresql "
                      "(its own cluster is not touched), or name its programs with --bin-dir")
    return found[max(found)]


def _major(bin_dir: Path) -> int:
    try:
        text = run([str(bin_dir / "postgres"), "--version"], timeout_s=10).stdout
    except (OSError, subprocess.TimeoutExpired):
        return 0
    number = re.search(r"(\d+)", text)
    return int(number[1]) if number else 0
