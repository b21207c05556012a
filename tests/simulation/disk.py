"""A node's data directories as small real files on /dev/shm: for level (b), where pgha's own file work is what runs.

What the model knows of a data directory and what pgha reads and writes there is one thing: `FileDir` is the model's
DataDir whose facts lie in files. A directory is known by its pg_control (the inode), so that renames are followed.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, MutableMapping
from pathlib import Path
from typing import Any

from pgha.model.wal import HistoryRow, claim_line, format_lsn, parse_history_file
from tests.simulation.postgres import Branch, DataDir

_HISTORY = re.compile(r"([0-9A-F]{8})\.history")


def history_text(rows: tuple[HistoryRow, ...]) -> str:
    """A history file's content."""
    return "".join(f"{claim_line(r.claim) if r.claim else ''}{r.timeline}\t{format_lsn(r.switch_lsn)}\t{r.reason}\n" for r in rows)


class Claims:
    """The comments at the ends of pg_wal/*.history, which a promotion takes along."""

    def __init__(self, histories: Histories) -> None:
        self._histories = histories

    def get(self, number: int, otherwise: str) -> str:
        try:
            with open(self._histories.path(number), encoding="ascii") as f:
                rows = parse_history_file(f.read() + "1\t0/0\tas PostgreSQL appends it\n")
        except FileNotFoundError:
            return otherwise
        return rows[-1].claim


class Histories(MutableMapping[int, tuple[HistoryRow, ...]]):
    """pg_wal/*.history; a file without rows is a block, ()."""

    def __init__(self, owner: FileDir) -> None:
        self._owner = owner

    def path(self, number: int) -> str:
        return f"{self._owner.path}/pg_wal/{number:08X}.history"

    def __contains__(self, number: object) -> bool:
        return isinstance(number, int) and os.path.exists(self.path(number))

    def __getitem__(self, number: int) -> tuple[HistoryRow, ...]:
        try:
            with open(self.path(number), encoding="ascii") as f:
                return parse_history_file(f.read())
        except FileNotFoundError:
            raise KeyError(number) from None

    def __setitem__(self, number: int, rows: tuple[HistoryRow, ...]) -> None:
        with open(self.path(number), "w", encoding="ascii") as f:
            f.write(history_text(rows) or "# pgha: number taken: copied\n")

    def __delitem__(self, number: int) -> None:
        os.unlink(self.path(number))

    def __iter__(self) -> Iterator[int]:
        found = (_HISTORY.fullmatch(name) for name in os.listdir(f"{self._owner.path}/pg_wal"))
        return iter(sorted(int(m[1], 16) for m in found if m))

    def __len__(self) -> int:
        return len(list(iter(self)))


class FileDir(DataDir):
    """A whole data directory at `path`. The model's facts without a file of their own stay attributes."""

    def __init__(self, path: str, model: DataDir) -> None:
        for name in ("", "/global", "/pg_wal"):
            os.makedirs(path + name, mode=0o700, exist_ok=True)
        for name, text in (("PG_VERSION", "15\n"), ("postgresql.conf", ""), ("pg_hba.conf", ""), ("pg_ident.conf", ""), ("postgresql.auto.conf", "")):
            with open(f"{path}/{name}", "w", encoding="ascii") as f:
                f.write(text)
        self._fd = os.open(f"{path}/global/pg_control", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self.inode = os.fstat(self._fd).st_ino
        self.slots, self.slots_begin = {}, {}
        self.path = path
        self._written = 0
        self.branch, self.lsn = model.branch, model.lsn
        self.system_identifier, self.state = model.system_identifier, model.state
        self.control_timeline, self.checkpoint_lsn = model.control_timeline, model.checkpoint_lsn
        self.min_recovery_lsn, self.min_recovery_timeline = model.min_recovery_lsn, model.min_recovery_timeline
        self.wal_log_hints, self.mixed = model.wal_log_hints, model.mixed
        for number, rows in model.histories.items():
            self.histories[number] = rows
        self.standby_signal = model.standby_signal
        self.written = 1

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def gone(self) -> bool:
        return os.fstat(self._fd).st_nlink == 0

    def find(self) -> str:
        """Where it is now."""
        self.path = os.path.dirname(os.path.dirname(os.readlink(f"/proc/self/fd/{self._fd}")))
        return self.path

    def _flag(self, name: str, on: bool) -> None:
        path = f"{self.path}/{name}"
        if on:
            with open(path, "a", encoding="ascii"):
                pass
        else:
            try:
                os.unlink(path)
            except FileNotFoundError:
                pass

    # Assigning to these in a subclass of a dataclass: properties shadow the fields' defaults.

    @property
    def content(self) -> Any:
        return "valid"

    @property
    def standby_signal(self) -> bool:
        return os.path.exists(f"{self.path}/standby.signal")

    @standby_signal.setter
    def standby_signal(self, on: bool) -> None:
        self._flag("standby.signal", on)

    @property
    def pid_file(self) -> bool:
        return os.path.exists(f"{self.path}/postmaster.pid")

    @pid_file.setter
    def pid_file(self, on: bool) -> None:
        if not on:
            self._flag("postmaster.pid", False)     # written by the machine, with what it says

    @property
    def histories(self) -> Any:
        return Histories(self)

    @property
    def claims(self) -> Any:
        return Claims(Histories(self))

    @property
    def rewind_marker(self) -> str:
        return "marked" if os.path.exists(f"{self.path}.rewinding") else ""

    @property
    def bootstrap_mark(self) -> str:
        try:
            with open(f"{self.path}.bootstrapping", encoding="ascii") as f:
                return f.read().strip()
        except FileNotFoundError:
            return ""

    @property
    def written(self) -> int:
        return self._written

    @written.setter
    def written(self, number: int) -> None:
        self._written = number
        os.utime(self._fd, ns=(number * 1000, number * 1000))


def control_text(data: DataDir) -> str:
    """What pg_controldata prints."""
    lines = {
        "pg_control version number": 1300, "Catalog version number": 202209061, "Database system identifier": data.system_identifier,
        "Database cluster state": data.state, "Latest checkpoint location": format_lsn(data.checkpoint_lsn),
        "Latest checkpoint's REDO location": format_lsn(data.checkpoint_lsn), "Latest checkpoint's TimeLineID": data.control_timeline,
        "Latest checkpoint's PrevTimeLineID": data.control_timeline, "Minimum recovery ending location": format_lsn(data.min_recovery_lsn),
        "Min recovery ending loc's timeline": data.min_recovery_timeline, "Backup start location": "0/0", "End-of-backup record required": "no",
        "wal_level setting": "replica", "wal_log_hints setting": "on" if data.wal_log_hints else "off", "max_connections setting": 100,
        "max_worker_processes setting": 8, "max_wal_senders setting": 10, "max_prepared_xacts setting": 0, "max_locks_per_xact setting": 64,
        "track_commit_timestamp setting": "off", "Data page checksum version": 0, "Bytes per WAL segment": 16 << 20, "WAL block size": 8192,
    }
    return "".join(f"{label}: {value}\n" for label, value in lines.items())


def fresh(system_identifier: str, lsn: int) -> DataDir:
    """As initdb leaves it."""
    return DataDir(system_identifier=system_identifier, branch=Branch(1, None, lsn), lsn=lsn, control_timeline=1, checkpoint_lsn=lsn)


def content_of(path: str) -> str:
    """Of a directory that is no FileDir."""
    try:
        return "partial" if os.listdir(path) else "empty"
    except FileNotFoundError:
        return "missing"


def there(path: str | Path) -> int | None:
    """The inode of the pg_control below `path`."""
    try:
        return os.stat(f"{path}/global/pg_control").st_ino
    except OSError:
        return None
