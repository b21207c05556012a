"""What does pg_control say?  Read through pg_controldata, whose labels differ a little between versions 13 and 18."""

from __future__ import annotations

import re
from pathlib import Path

from msgspec import Struct

from pgha.errors import PostgresError
from pgha.model.wal import parse_lsn
from pgha.postgres.programs import Run, binary, run, run_checked

#: States in which a server was left by a clean end.
CLEAN_STATES = frozenset({"shut down", "shut down in recovery"})


class ControlData(Struct, frozen=True, kw_only=True):
    """pg_control. `state` as printed: "in production", "shut down", "shut down in recovery", "shutting down",
    "in crash recovery", "in archive recovery", "starting up". LSNs are integers, 0 means unset.
    """

    state: str
    system_identifier: str
    control_version: int
    catalog_version: int
    timeline: int                 # of the latest checkpoint
    prev_timeline: int            # before that checkpoint; differs only in the first one of a new timeline
    checkpoint_lsn: int
    redo_lsn: int
    min_recovery_end_lsn: int
    min_recovery_timeline: int
    backup_start_lsn: int
    end_of_backup_required: bool
    wal_level: str
    wal_log_hints: bool
    checksums: bool
    wal_segment_bytes: int
    wal_block_bytes: int
    max_connections: int
    max_worker_processes: int
    max_wal_senders: int
    max_prepared_transactions: int
    max_locks_per_transaction: int
    track_commit_timestamp: bool

    @property
    def clean(self) -> bool:
        """Was the server shut down in an orderly way?"""
        return self.state in CLEAN_STATES

    @property
    def was_standby(self) -> bool:
        """Was it in recovery when it last wrote pg_control?"""
        return self.state in ("shut down in recovery", "in archive recovery")

    @property
    def latest_timeline(self) -> int:
        """The newest timeline that pg_control knows of: soon after a promotion the last checkpoint's is the old one."""
        return max(self.timeline, self.min_recovery_timeline)


#: field → label. Both spellings where versions differ.
_LABELS: dict[str, tuple[str, ...]] = {
    "state": ("Database cluster state",),
    "system_identifier": ("Database system identifier",),
    "control_version": ("pg_control version number",),
    "catalog_version": ("Catalog version number",),
    "timeline": ("Latest checkpoint's TimeLineID",),
    "prev_timeline": ("Latest checkpoint's PrevTimeLineID",),
    "checkpoint_lsn": ("Latest checkpoint location",),
    "redo_lsn": ("Latest checkpoint's REDO location",),
    "min_recovery_end_lsn": ("Minimum recovery ending location",),
    "min_recovery_timeline": ("Min recovery ending loc's timeline",),
    "backup_start_lsn": ("Backup start location",),
    "end_of_backup_required": ("End-of-backup record required",),
    "wal_level": ("wal_level setting",),
    "wal_log_hints": ("wal_log_hints setting",),
    "checksums": ("Data page checksum version",),
    "wal_segment_bytes": ("Bytes per WAL segment",),
    "wal_block_bytes": ("WAL block size",),
    "max_connections": ("max_connections setting",),
    "max_worker_processes": ("max_worker_processes setting",),
    "max_wal_senders": ("max_wal_senders setting",),
    "max_prepared_transactions": ("max_prepared_xacts setting", "max_prepared_transactions setting"),
    "max_locks_per_transaction": ("max_locks_per_xact setting", "max_locks_per_transaction setting"),
    "track_commit_timestamp": ("track_commit_timestamp setting",),
}
_TEXT = ("state", "system_identifier", "wal_level")
_FLAGS = {"on": True, "yes": True, "off": False, "no": False}
_FLAG_FIELDS = ("end_of_backup_required", "wal_log_hints", "track_commit_timestamp")
#: Positions are computed with these: PostgreSQL takes powers of two in these bounds, and nothing else.
_SIZES = {"wal_segment_bytes": (1 << 20, 1 << 30), "wal_block_bytes": (1 << 10, 1 << 16)}


def _value(field: str, text: str) -> str | int | bool:
    """ValueError if it is none of the field's kind."""
    if field in _TEXT:
        if len(text) > 64:
            raise ValueError(text[:64])
        return text
    if field.endswith("_lsn"):
        return parse_lsn(text)
    if field in _FLAG_FIELDS:
        if text not in _FLAGS:
            raise ValueError(text)
        return _FLAGS[text]
    if not re.fullmatch(r"[0-9]{1,10}", text, re.ASCII):
        raise ValueError(text[:64])
    number = int(text)
    least, most = _SIZES.get(field, (0, (1 << 32) - 1))
    if not least <= number <= most or (field in _SIZES and number & (number - 1)):
        raise ValueError(text)
    return number != 0 if field == "checksums" else number


def parse_control(output: str) -> ControlData:
    """The text of pg_controldata in English → ControlData. PostgresError names the first line that is missing or odd."""
    said = {label.strip(): value.strip() for label, _, value in (line.partition(":") for line in output.splitlines())}
    fields: dict[str, str | int | bool] = {}
    for field, labels in _LABELS.items():
        text = next((said[label] for label in labels if label in said), None)
        if text is None:
            raise PostgresError(f"pg_controldata does not say {labels[0]!r}")
        try:
            fields[field] = _value(field, text)
        except ValueError:
            raise PostgresError(f"pg_controldata: {labels[0]} is {text[:80]!r}") from None
    return ControlData(**fields)  # type: ignore[arg-type]  # each value was converted by its own rule above


async def read_control(data_dir: Path, bin_dir: Path | str, *, deadline_s: float, run: Run = run) -> ControlData:
    """pg_control of `data_dir`, of a running server or a stopped one.

    CommandFailed if there is none or it is unreadable, PostgresError if its checksum is wrong or it is unfinished.
    """
    done = await run_checked([binary(bin_dir, "pg_controldata"), "-D", data_dir], deadline_s=deadline_s, run=run)
    # It prints nonsense with exit code 0 when the CRC does not match.
    if re.search(r"^WARNING: .*(CRC|checksum|corrupt)", done.stdout + done.stderr, re.MULTILINE):
        raise PostgresError(f"pg_control of {data_dir} is damaged")
    return parse_control(done.stdout)
