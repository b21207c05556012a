"""What is read from a data directory while no server runs on it."""

from __future__ import annotations

import shutil
from pathlib import Path

import trio

from pgha.observe.data_directory import DataDirectoryReader

CONTROL = """pg_control version number:            1300
Catalog version number:               202209061
Database system identifier:           7711161683783831200
Database cluster state:               shut down
pg_control last modified:             Wed Nov 25 22:00:00 2026
Latest checkpoint location:           0/3000028
Latest checkpoint's REDO location:    0/3000028
Latest checkpoint's TimeLineID:       3
Latest checkpoint's PrevTimeLineID:   2
Minimum recovery ending location:     0/0
Min recovery ending loc's timeline:   0
Backup start location:                0/0
End-of-backup record required:        no
wal_level setting:                    replica
wal_log_hints setting:                on
max_connections setting:              100
max_worker_processes setting:         8
max_wal_senders setting:              10
max_prepared_xacts setting:           0
max_locks_per_xact setting:           64
track_commit_timestamp setting:       off
WAL block size:                       8192
Bytes per WAL segment:                16777216
Data page checksum version:           0
"""


def directory(path: Path, switch: str) -> Path:
    for name in ("global", "pg_wal"):
        (path / name).mkdir(parents=True)
    (path / "PG_VERSION").write_text("15\n")
    (path / "global" / "pg_control").write_bytes(b"x" * 300)
    (path / "pg_wal" / "00000003.history").write_text(f"1\t{switch}\tno recovery target specified\n")
    return path


def test_data_that_was_replaced_by_another_branch_of_the_same_number_has_that_branchs_history(tmp_path: Path) -> None:
    """Else it is judged by the history of what is gone, and copied anew for ever."""
    program = tmp_path / "bin" / "pg_controldata"
    program.parent.mkdir()
    (tmp_path / "says").write_text(CONTROL)
    program.write_text(f"#!/bin/sh\ncat {tmp_path}/says\n")
    program.chmod(0o755)
    data_dir = directory(tmp_path / "data", "0/14DA5C0")

    async def main() -> None:
        reader = DataDirectoryReader(data_dir, program.parent)
        before = await reader.read_facts(running=False)
        assert (before.state, [r.switch_lsn for r in before.history]) == ("valid", [0x14DA5C0]), before
        shutil.rmtree(data_dir)
        directory(data_dir, "0/1378B24")
        after = await reader.read_facts(running=False)
        assert [r.switch_lsn for r in after.history] == [0x1378B24]

    trio.run(main)
