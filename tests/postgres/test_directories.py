from __future__ import annotations

import os

import pytest
import trio

from pgha.errors import PostgresError
from pgha.postgres import directories
from pgha.postgres.histories import read_histories

pytestmark = pytest.mark.postgres


def test_content(make_node, base):
    a = make_node()
    assert directories.content(base / "none") == "missing"
    (base / "empty").mkdir()
    assert directories.content(base / "empty") == "empty"
    (base / "empty/lost+found").mkdir()
    assert directories.content(base / "empty") == "empty"
    assert directories.content(a.data_dir) == "valid"
    assert directories.major_version(a.data_dir) == 15
    assert directories.major_version(base) == 0
    (a.data_dir / "global/pg_control").unlink()
    assert directories.content(a.data_dir) == "partial"
    a.data_dir.chmod(0)
    with pytest.raises(PermissionError):
        directories.content(a.data_dir)
    a.data_dir.chmod(0o700)


def test_failed_directories_are_numbered_and_kept(make_node, base):
    async def main():
        names = []
        for _ in range(3):
            a = make_node()
            names.append(directories.move_to_failed(a.data_dir).name)
        assert names == ["a.failed", "a.failed.1", "a.failed.2"]
        a = make_node()
        await a.start()
        with pytest.raises(PostgresError, match="in use"):
            directories.move_to_failed(a.data_dir)
        with pytest.raises(PostgresError, match="in use"):
            await directories.delete_tree(a.data_dir)
    trio.run(main)


def test_clone_is_swapped_in_and_the_old_one_stays(make_node, base):
    async def main():
        a = make_node()
        (a.data_dir / "mark").write_text("old")
        clone = directories.clone_directory(a.data_dir)
        with pytest.raises(PostgresError, match="missing"):
            await directories.complete_clone(a.data_dir, "7")
        make_node("a.clone")
        assert clone.is_dir()
        with pytest.raises(PostgresError, match="not a whole"):     # nobody said that it is whole
            directories.swap_in_clone(a.data_dir)
        await directories.complete_clone(a.data_dir, "7")
        # Interrupted between the renames, then finished.
        a.data_dir.rename(base / "a.old")
        assert directories.unfinished_swap(a.data_dir)
        assert directories.completed_clone(a.data_dir) == "7"
        assert directories.swap_in_clone(a.data_dir) is None
        assert not directories.unfinished_swap(a.data_dir) and not directories.whole_marker(a.data_dir).exists()
        make_node("a.clone")
        await directories.complete_clone(a.data_dir, "7")
        assert directories.swap_in_clone(a.data_dir).name == "a.old.1"
        # a.old was moved there by hand: it is not ours
        assert [p.name for p in directories.replaced_directories(a.data_dir, "old")] == ["a.old.1"]
        assert (base / "a.old/mark").read_text() == "old"
        (base / "a.old.1").rename(base / "a.old.2")                 # as is what was renamed since
        assert directories.replaced_directories(a.data_dir, "old", "removing") == []
        await a.start()
    trio.run(main)


def test_removal_that_was_cut_off_can_be_finished(make_node, base):
    async def main():
        a = make_node()
        aside = directories.move_to_removing(a.data_dir, "test")
        assert directories.content(a.data_dir) == "missing" and aside.name == "a.removing"
        (aside / "global/pg_control").unlink()
        (aside / "keeps").mkdir()
        (aside / "keeps").chmod(0)                                  # the deletion ends in the middle
        with pytest.raises(PermissionError):
            await directories.delete_tree(aside)
        (aside / "keeps").chmod(0o700)
        assert directories.replaced_directories(a.data_dir, "removing") == [aside]
        await directories.delete_tree(aside)
        assert not aside.exists()
        # a link's target is not ours
        b = make_node("b")
        b.data_dir.rename(base / "elsewhere")
        b.data_dir.symlink_to(base / "elsewhere")
        with pytest.raises(PostgresError, match="symbolic link"):
            directories.move_to_removing(b.data_dir, "test")
    trio.run(main)


def test_deletion_does_not_leave_the_tree(make_node, base):
    async def main():
        a = make_node()
        outside, wal, space = base / "outside", base / "wal", base / "space"
        outside.mkdir()
        space.mkdir()
        (outside / "precious").write_text("x")
        (space / "relation").write_text("x")
        (a.data_dir / "link").symlink_to(outside)
        (a.data_dir / "pg_wal").rename(wal)
        (a.data_dir / "pg_wal").symlink_to(wal)
        (a.data_dir / "pg_tblspc/16400").symlink_to(space)
        assert directories.linked_directories(a.data_dir) == [wal, space]
        size = await directories.size_bytes(a.data_dir)
        assert size > 16 * 2**20
        assert read_histories(a.data_dir) == {}
        await directories.sync_tree(a.data_dir)
        await directories.delete_tree(a.data_dir, also=[wal])
        assert not a.data_dir.exists()
        assert list(wal.iterdir()) == []
        assert (outside / "precious").exists()
        assert (space / "relation").exists()
        (base / "l").symlink_to(outside)
        with pytest.raises(PostgresError, match="symbolic link"):
            await directories.delete_tree(base / "l")
        await directories.delete_tree(base / "never there")
    trio.run(main)


def test_long_work_can_be_cancelled(base):
    async def main():
        top = base / "many"
        for i in range(40):
            (top / str(i)).mkdir(parents=True)
            for j in range(100):
                (top / str(i) / str(j)).touch()
        with trio.CancelScope() as scope:
            scope.cancel()
            await directories.delete_tree(top)
        assert scope.cancelled_caught
        assert len(os.listdir(top)) > 0
        await directories.delete_tree(top)
        assert not top.exists()
        assert directories.free_bytes(top) > 0
    trio.run(main)
