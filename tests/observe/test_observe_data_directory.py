"""What is read from a data directory while no server runs on it."""

from __future__ import annotations

import shutil
from pathlib import Path

import trio
from observe_world import CONTROL

from pgha.observe.data_directory import DataDirectoryReader


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
