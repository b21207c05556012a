"""Bring a diverged data directory back to a source's history with pg_rewind.

Measured on PostgreSQL 15: the crash recovery that pg_rewind starts by itself ends with a checkpoint that recycles the
very WAL segments which pg_rewind then looks for; it also fails when standby.signal is there. So it is never let do that
(--no-ensure-shutdown): the caller recovers first (`Server.single_user_recovery`, which keeps the WAL). A target that was
shut down cleanly is rewound with or without standby.signal; the file itself is then removed or taken from the source.

Rules of this file:
* What was ours in the data directory (configuration, cached cluster configuration) is put back afterwards.
* From the moment when files may change until success, a marker stands beside the data directory: a server must not be
  started on a directory that was half rewound. It says in which boot of the machine, from which source and timeline.
* A rewind that was cut off is begun again only from that source on that timeline: pages that came from another would
  stay. If pg_rewind had reached its last step, the sync of all files (it writes pg_control before, measured), we sync
  and it is done; but not if the machine itself has gone down since, when nobody knows which files reached the disk.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from msgspec import Struct
from msgspec.structs import replace

from pgha.clock import boot_id
from pgha.errors import PostgresError
from pgha.postgres.basebackup import Progress, progress_reader
from pgha.postgres.controldata import ControlData
from pgha.postgres.directories import sync_tree
from pgha.postgres.files import BASE_CONF, DYNAMIC_CACHE, conninfo_text, remove_file, write_file, write_if_changed
from pgha.postgres.initdb import Options, option_arguments
from pgha.postgres.processes import living_processes
from pgha.postgres.programs import Run, binary, clean_environment, run
from pgha.postgres.threads import InThread, in_thread

#: Ours to give, or meaningless here.
FORBIDDEN = ("target-pgdata", "source-pgdata", "source-server", "write-recovery-conf", "dry-run", "restore-target-wal",
             "config-file", "no-ensure-shutdown", "version", "help", "progress", "no-sync")
_OURS = ("postgresql.conf", BASE_CONF, "postgresql.auto.conf", "pg_hba.conf", "pg_ident.conf", DYNAMIC_CACHE,
         *(f"{name}.backup" for name in ("postgresql.conf", BASE_CONF, "pg_hba.conf", "pg_ident.conf")))
_NOT_REACHED = re.compile(r"connection to server|could not connect|server closed the connection|could not translate host name")
_MISSING_WAL = re.compile(r'could not open file "[^"]*/pg_wal/([0-9A-F]{24})"')


Outcome = Literal["rewound", "not_needed", "missing_wal", "failed", "hopeless"]


class Rewound(Struct, frozen=True, kw_only=True):
    """What became of it.

    "rewound": follow the source now. "not_needed": same history already. "missing_wal": the target lacks
    `missing_segment`, nothing was changed. "failed": see `output`; if `target_changed`, it can only be cloned (or
    rewound again from the beginning). "hopeless": cut off earlier, and not to be rewound again; it can only be cloned.
    """

    outcome: Outcome
    target_changed: bool = False
    missing_segment: str = ""
    output: str = ""


def marker(data_dir: Path) -> Path:
    """Exists while a rewind is under way, or since one was interrupted."""
    return data_dir.with_name(data_dir.name + ".rewinding")


def interrupted(data_dir: Path) -> bool:
    """Was a rewind of this directory begun and not ended? It must not be started, whatever pg_control says."""
    return marker(data_dir).exists()


def _source_text(source: dict[str, str | int], timeline: int) -> str:
    return f"{source.get('host', '')}:{source.get('port', '')} timeline {timeline}"


class _CutOff(Struct, frozen=True, kw_only=True):
    """What the marker of a rewind says that was cut off."""

    this_boot: bool
    source: str


def _cut_off(data_dir: Path, this_boot: str) -> _CutOff | None:
    try:
        lines = marker(data_dir).read_text(errors="replace").splitlines()
    except FileNotFoundError:
        return None
    return _CutOff(this_boot=lines[:1] == [this_boot], source=lines[1] if len(lines) > 1 else "")


def _only_sync_is_missing(data_dir: Path, control: ControlData) -> bool:
    """pg_rewind begins on a cleanly stopped server only; this state is what it writes itself, at the end."""
    return control.state == "in archive recovery" and (data_dir / "backup_label").exists()


async def _begin_again(data_dir: Path, control: ControlData, before: _CutOff, source_text: str, in_thread: InThread) -> Rewound | None:
    """After a rewind that was cut off: what there is to say of it at once, or None: do it again."""
    known = before.this_boot and before.source == source_text
    if known and _only_sync_is_missing(data_dir, control):
        if living := living_processes(data_dir):
            raise PostgresError(f"processes {living} of the data directory live")
        await sync_tree(data_dir, in_thread=in_thread)
        remove_file(marker(data_dir))
        return Rewound(outcome="rewound", target_changed=True, output="an earlier rewind lacked only its last step")
    if known and control.clean:
        return None
    return Rewound(outcome="hopeless", target_changed=True, output=(
        f"a rewind from {before.source or 'an unknown source'} was cut off{'' if before.this_boot else ', the machine went down'}, "
        f"and the directory ({control.state!r}) cannot be rewound from {source_text} after it"))


def obstacles(control: ControlData, data_dir: Path, bin_dir: Path | str, *, again: bool = False) -> list[str]:
    """Why pg_rewind cannot work here, every reason; empty if it can. `again`: after one that was cut off."""
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
    if (data_dir / "backup_label").exists() and not again:  # else it may be pg_rewind's own
        reasons.append("backup_label is present: the directory is a backup that was never started")
    return reasons


async def rewind(
    data_dir: Path, bin_dir: Path | str, source: dict[str, str | int], control: ControlData, *, source_timeline: int, deadline_s: float,
    options: Options = (), restore_target_wal: bool = False, config_file: Path | None = None,
    on_progress: Callable[[Progress], None] | None = None, run: Run = run, in_thread: InThread = in_thread, boot: Callable[[], str] = boot_id,
) -> Rewound:
    """Rewind `data_dir` to the server of conninfo `source` (passfile= for its password), a primary on `source_timeline`.

    PostgresError with every obstacle before anything is touched; PostgresTimeout (and a cancel) leave the marker.
    """
    this_boot = boot()
    before = _cut_off(data_dir, this_boot)
    source_text = _source_text(source, source_timeline)
    if before is not None and (known := await _begin_again(data_dir, control, before, source_text, in_thread)) is not None:
        return known
    if reasons := obstacles(control, data_dir, bin_dir, again=before is not None):
        raise PostgresError("cannot rewind: " + "; ".join(reasons))
    arguments = option_arguments(options, forbidden=FORBIDDEN, where="postgresql.rewind")
    if restore_target_wal:
        arguments.append("--restore-target-wal")
    if config_file is not None:  # PostgreSQL 15 and later
        arguments.append(f"--config-file={config_file}")
    kept = {name: (data_dir / name).read_bytes() for name in _OURS if (data_dir / name).is_file()}
    write_file(marker(data_dir), f"{this_boot}\n{source_text}\n", mode=0o600)
    done = await run(
        [binary(bin_dir, "pg_rewind"), f"--target-pgdata={data_dir}", f"--source-server={conninfo_text(source)}",
         "--progress", "--no-ensure-shutdown", *arguments],
        deadline_s=deadline_s, dies_with_us=True, env=clean_environment(messages_in_english=True),
        on_output=progress_reader(on_progress) if on_progress else None,
        on_error_output=progress_reader(on_progress) if on_progress else None)
    result = _read(done.exit_code, done.stdout + "\n" + done.stderr)
    for name, content in kept.items():
        write_if_changed(data_dir / name, content)
    if before is not None and result.outcome != "rewound":
        # Changed by the first attempt, in any case. Only that the source was not reached says nothing about the directory.
        outcome: Outcome = "failed" if not result.target_changed and _NOT_REACHED.search(result.output) else "hopeless"
        return replace(result, outcome=outcome, target_changed=True)
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
