"""`pgha config check FILE`: every mistake in one run, and what is doubtful.

Besides what `load` says, it looks at this machine: programs, certificates, directories. Those are warnings, because a
file may be checked elsewhere than where it is used.
"""

from __future__ import annotations

import os
import shlex
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pgha.config import gucs
from pgha.config.cluster import Callbacks
from pgha.config.judgement import in_our_words
from pgha.config.load import load
from pgha.config.local import LocalConfig
from pgha.config.schema import fields
from pgha.errors import ConfigError, PostgresError
from pgha.model.gucs import GucFacts, setting_text

#: exit codes of design.md 4
GOOD, WRONG = 0, 2
PROGRAMS = ("postgres", "pg_ctl", "initdb", "pg_basebackup", "pg_controldata", "pg_rewind")


#: (bin_dir, settings) → what PostgreSQL's program here refuses, and what it knows
AskPostgres = Callable[[str, dict[str, str]], tuple[dict[str, str], GucFacts]]


def check(where: str | os.PathLike[str], environ: Mapping[str, str], *, ask: AskPostgres | None = None) -> tuple[int, str]:
    """Exit code (0, or 2 if anything is wrong) and what to print. What PostgreSQL refuses is a warning: it will be left out."""
    try:
        loaded = load(where, environ)
    except ConfigError as error:
        count = len(error.problems)
        return WRONG, "\n".join((*error.problems, f"{count} mistake{'s' if count != 1 else ''} found"))
    refused = _refused(loaded.local, ask) if ask is not None else []
    warnings = [*loaded.warnings, *(f"{os.fspath(where)}: {line}" for line in (*_on_this_machine(loaded.local), *refused))]
    verdict = f"{os.fspath(where)}: good" + (f", {len(warnings)} warning{'s' if len(warnings) != 1 else ''}" if warnings else "")
    return GOOD, "\n".join((*(f"warning: {line}" for line in warnings), verdict))


def _refused(local: LocalConfig, ask: AskPostgres) -> list[str]:
    """PostgreSQL's settings that this machine's PostgreSQL does not take."""
    postgres = local.postgresql
    given: dict[tuple[str, ...], Any] = {("postgresql", *where): value for where, value in _settings(postgres.parameters, postgres.recovery_conf)}
    dcs = local.bootstrap.dcs.get("postgresql")
    if isinstance(dcs, dict):
        given |= {("bootstrap", "dcs", "postgresql", *where): value for where, value in _settings(dcs.get("parameters"), dcs.get("recovery_conf"))}
    given = {path: value for path, value in given.items() if path[-1].lower() not in gucs.FORCED}
    lines = []
    for own in (True, False):       # the node's and the cluster's may say different things under one name
        asked = {path: value for path, value in given.items() if (path[0] == "postgresql") is own}
        try:
            found, facts = ask(postgres.bin_dir, {path[-1].lower(): setting_text(value) for path, value in asked.items()}) if asked else ({}, GucFacts(of={}))
        except PostgresError as error:
            return [f"postgresql.parameters: PostgreSQL could not be asked: {error}"]
        lines += [f"{'.'.join(path)}: {in_our_words(found[path[-1].lower()], path[-1], facts)}; it would be left out" for path in asked if path[-1].lower() in found]
    return lines


def _settings(parameters: Any, recovery: Any) -> Iterator[tuple[tuple[str, str], Any]]:
    for section, table in (("parameters", parameters), ("recovery_conf", recovery)):
        for name, value in (table.items() if isinstance(table, dict) else ()):
            yield (section, name), value


def programs_not_there(local: LocalConfig) -> Iterator[str]:
    """Programs of the operator's that this user cannot run here: a callback would be missed, a pre_promote would refuse."""
    postgres, bootstrap = local.postgresql, local.bootstrap
    given = {
        **{f"postgresql.callbacks.{field.name}": getattr(postgres.callbacks, field.attribute) for field in fields(Callbacks)},
        "postgresql.pre_promote": postgres.pre_promote, "postgresql.before_stop": postgres.before_stop,
        **{f"postgresql.{name}.command": method.command for name, method in postgres.methods.items()},
        **{f"bootstrap.{name}.command": method.command for name, method in bootstrap.methods.items()},
        "bootstrap.post_bootstrap": bootstrap.post_bootstrap, "bootstrap.post_init": bootstrap.post_init,
    }
    for key, line in given.items():
        if line and shutil.which(program := shlex.split(line)[0]) is None:
            yield f"{key}: {program} cannot be run by this user on this machine"


def _on_this_machine(local: LocalConfig) -> Iterator[str]:
    """What this machine lacks."""
    postgres = local.postgresql
    for name in PROGRAMS:
        if not (os.access(Path(postgres.bin_dir) / name, os.X_OK) if postgres.bin_dir else shutil.which(name)):
            yield f"postgresql.bin_dir: no {name} {'in ' + postgres.bin_dir if postgres.bin_dir else 'on the PATH'} on this machine"
    if postgres.data_dir and not Path(postgres.data_dir).parent.is_dir():
        yield f"postgresql.data_dir: {Path(postgres.data_dir).parent} does not exist on this machine"
    yield from programs_not_there(local)
    for section, keys in (("restapi", ("certfile", "keyfile", "cafile")), ("etcd3", ("cacert", "cert", "key")), ("ctl", ("certfile", "keyfile", "cacert"))):
        for key in keys:
            file = getattr(getattr(local, section), key)
            if file and not os.access(file, os.R_OK):
                yield f"{section}.{key}: {file} cannot be read by this user on this machine"
    users = postgres.authentication
    for name, user in (("superuser", users.superuser), ("replication", users.replication), *((("rewind", users.rewind),) if users.rewind is not users.superuser else ())):
        for key in ("sslkey", "sslcert", "sslrootcert", "sslcrl", "sslcrldir"):
            file = getattr(user, key)
            if file and file != "system" and not os.access(file, os.R_OK):
                yield f"postgresql.authentication.{name}.{key}: {file} cannot be read by this user on this machine"
            elif key == "sslkey" and file and (mode := _too_open(Path(file))):
                yield f"postgresql.authentication.{name}.sslkey: {file} has mode {mode:04o}, with which libpq does not use it; allowed: 0600, or 0640 of root's"


def _too_open(file: Path) -> int:
    """The mode of a key that libpq refuses for it (chapter 34.19.2); 0 if it does not."""
    found = file.stat()
    mode = stat.S_IMODE(found.st_mode)
    return mode if mode & (0o037 if found.st_uid == 0 else 0o077) else 0
