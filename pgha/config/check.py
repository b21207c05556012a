"""`pgha config check FILE`: every mistake in one run, and what is doubtful.

Besides what `load` says, it looks at this machine: programs, certificates, directories. Those are warnings, because a
file may be checked elsewhere than where it is used.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from pgha.config.load import load
from pgha.config.local import LocalConfig
from pgha.errors import ConfigError

#: exit codes of design.md 4
GOOD, WRONG = 0, 2
PROGRAMS = ("postgres", "pg_ctl", "initdb", "pg_basebackup", "pg_controldata", "pg_rewind")


def check(where: str | os.PathLike[str], environ: Mapping[str, str]) -> tuple[int, str]:
    """Exit code (0, or 2 if anything is wrong) and what to print."""
    try:
        loaded = load(where, environ)
    except ConfigError as error:
        count = len(error.problems)
        return WRONG, "\n".join((*error.problems, f"{count} mistake{'s' if count != 1 else ''} found"))
    warnings = [*loaded.warnings, *(f"{os.fspath(where)}: {line}" for line in _on_this_machine(loaded.local))]
    verdict = f"{os.fspath(where)}: good" + (f", {len(warnings)} warning{'s' if len(warnings) != 1 else ''}" if warnings else "")
    return GOOD, "\n".join((*(f"warning: {line}" for line in warnings), verdict))


def _on_this_machine(local: LocalConfig) -> Iterator[str]:
    """What this machine lacks."""
    postgres = local.postgresql
    for name in PROGRAMS:
        if not (os.access(Path(postgres.bin_dir) / name, os.X_OK) if postgres.bin_dir else shutil.which(name)):
            yield f"postgresql.bin_dir: no {name} {'in ' + postgres.bin_dir if postgres.bin_dir else 'on the PATH'} on this machine"
    if postgres.data_dir and not Path(postgres.data_dir).parent.is_dir():
        yield f"postgresql.data_dir: {Path(postgres.data_dir).parent} does not exist on this machine"
    for section, keys in (("restapi", ("certfile", "keyfile", "cafile")), ("etcd3", ("cacert", "cert", "key")), ("ctl", ("certfile", "keyfile", "cacert"))):
        for key in keys:
            file = getattr(getattr(local, section), key)
            if file and not os.access(file, os.R_OK):
                yield f"{section}.{key}: {file} cannot be read by this user on this machine"
