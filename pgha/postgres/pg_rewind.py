"""Bring a diverged data directory back to a source's history with pg_rewind.

Measured on PostgreSQL 15: the crash recovery that pg_rewind starts by itself ends with a checkpoint that recycles the
very WAL segments which pg_rewind then looks for; it also fails when standby.signal is there. So it is never let do that
(--no-ensure-shutdown): the caller recovers first (`Server.single_user_recovery`, which keeps the WAL). A target that was
shut down cleanly is rewound with or without standby.signal; the file itself is then removed or taken from the source.

Rules of this file:
* What was ours in the data directory (configuration, cached cluster configuration) is put back afterwards.
* From the moment when files may change until success, a marker stands beside the data directory: a server must not be
  started on a directory that was half rewound.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from msgspec import Struct

from pgha.errors import PostgresError
from pgha.postgres.basebackup import Progress, progress_reader
from pgha.postgres.controldata import ControlData
from pgha.postgres.files import BASE_CONF, DYNAMIC_CACHE, conninfo_text, remove_file, write_file, write_if_changed
from pgha.postgres.initdb import Options, option_arguments
from pgha.postgres.processes import living_processes
from pgha.postgres.programs import binary, clean_environment, run

#: Ours to give, or meaningless here.
FORBIDDEN = ("target-pgdata", "source-pgdata", "source-server", "write-recovery-conf", "dry-run", "restore-target-wal",
             "config-file", "no-ensure-shutdown", "version", "help", "progress", "no-sync")
_OURS = ("postgresql.conf", BASE_CONF, "postgresql.auto.conf", "pg_hba.conf", "pg_ident.conf", DYNAMIC_CACHE,
         *(f"{name}.backup" for name in ("postgresql.conf", BASE_CONF, "pg_hba.conf", "pg_ident.conf")))
_MISSING_WAL = re.compile(r'could not open file "[^"]*/pg_wal/([0-9A-F]{24})"')


class Rewound(Struct, frozen=True, kw_only=True):
    """What became of it.

    "rewound": follow the source now. "not_needed": same history already. "missing_wal": the target lacks
    `missing_segment`, nothing was changed. "failed": see `output`; if `target_changed`, it can only be cloned (or
    rewound again from the beginning).
    """

    outcome: Literal["rewound", "not_needed", "missing_wal", "failed"]
    target_changed: bool = False
    missing_segment: str = ""
    output: str = ""


def marker(data_dir: Path) -> Path:
    """Exists while a rewind is under way, or since one was interrupted."""
    return data_dir.with_name(data_dir.name + ".rewinding")


def interrupted(data_dir: Path) -> bool:
    """Was a rewind of this directory begun and not ended? It must not be started, whatever pg_control says."""
    return marker(data_dir).exists()


def obstacles(control: ControlData, data_dir: Path, bin_dir: Path | str) -> list[str]:
    """Why pg_rewind cannot work here, every reason; empty if it can."""
    reasons = []
    program = binary(bin_dir, "pg_rewind")
    if os.sep in program and not os.access(program, os.X_OK):
        reasons.append(f"{program} cannot be executed")
    if not (control.checksums or control.wal_log_hints):
        reasons.append("neither data checksums nor wal_log_hints is on")
    if not control.clean:
        reasons.append(f"the server was not shut down cleanly: {control.state!r}")
    if living := living_processes(data_dir):
        reasons.append(f"processes {living} of the data directory live")
    if (data_dir / "backup_label").exists():
        reasons.append("backup_label is present: the directory is a backup that was never started")
    return reasons


async def rewind(
    data_dir: Path, bin_dir: Path | str, source: dict[str, str | int], control: ControlData, *, deadline_s: float,
    options: Options = (), restore_target_wal: bool = False, config_file: Path | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> Rewound:
    """Rewind `data_dir` to the server of conninfo `source` (passfile= for its password).

    PostgresError with every obstacle before anything is touched; PostgresTimeout (and a cancel) leave the marker.
    """
    if reasons := obstacles(control, data_dir, bin_dir):
        raise PostgresError("cannot rewind: " + "; ".join(reasons))
    arguments = option_arguments(options, forbidden=FORBIDDEN, where="postgresql.rewind")
    if restore_target_wal:
        arguments.append("--restore-target-wal")
    if config_file is not None:  # PostgreSQL 15 and later
        arguments.append(f"--config-file={config_file}")
    kept = {name: (data_dir / name).read_bytes() for name in _OURS if (data_dir / name).is_file()}
    write_file(marker(data_dir), f"{control.system_identifier} from timeline {control.timeline}\n", mode=0o600)
    done = await run(
        [binary(bin_dir, "pg_rewind"), f"--target-pgdata={data_dir}", f"--source-server={conninfo_text(source)}",
         "--progress", "--no-ensure-shutdown", *arguments],
        deadline_s=deadline_s, env=clean_environment(messages_in_english=True),
        on_output=progress_reader(on_progress) if on_progress else None,
        on_error_output=progress_reader(on_progress) if on_progress else None)
    result = _read(done.exit_code, done.stdout + "\n" + done.stderr)
    for name, content in kept.items():
        write_if_changed(data_dir / name, content)
    if result.outcome == "rewound" or not result.target_changed:
        remove_file(marker(data_dir))
    return result


def _read(exit_code: int, output: str) -> Rewound:
    text = "\n".join(line for line in re.split(r"[\r\n]+", output) if line.strip() and not re.search(r"\d+/\d+ kB", line))
    if exit_code == 0:
        return Rewound(outcome="not_needed" if "no rewind required" in text else "rewound",
                       target_changed="no rewind required" not in text, output=text)
    # Said after all reading and planning, before the first change.
    changed = "need to copy" in text
    missing = _MISSING_WAL.search(text)
    if missing and not changed:
        return Rewound(outcome="missing_wal", missing_segment=missing[1], output=text)
    return Rewound(outcome="failed", target_changed=changed, output=text)
