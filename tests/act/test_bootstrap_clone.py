"""Making and copying data directories: what is left behind when it works, fails, or is cancelled."""

from __future__ import annotations

import os

import pytest
import trio
from act_bed import as_source

from pgha.dcs import Delete, Put
from pgha.errors import CommandFailed, OperationFailed, Refused
from pgha.model import action as a
from pgha.postgres import directories


async def cancelled_at(node, action, word):
    """Run the operation and cancel it when its progress says `word`."""
    seen = []
    with trio.CancelScope() as scope:
        def progress(text):
            seen.append(text)
            if word in text:
                scope.cancel()
        await node.actor.operate(action, progress)
    assert scope.cancelled_caught, seen


def test_bootstrap_leaves_a_stopped_standby_and_the_users(bed):
    script = "/bin/sh -c 'psql -qXAt -c \"CREATE TABLE made_by_script (u text); INSERT INTO made_by_script SELECT current_user\" \"$0\"'"

    async def main():
        async with bed.node("a", bootstrap={"post_bootstrap": script}) as node:
            identifier = await node.primary()
            assert (await node.control()).system_identifier == identifier
            assert await node.sql("SELECT u FROM made_by_script") == [("postgres",)]
            rows = await node.sql("SELECT rolname, rolsuper, rolreplication, rolcanlogin FROM pg_roles WHERE rolname IN ('postgres', 'rep', 'rew') ORDER BY 1")
            assert rows == [("postgres", "t", "t", "t"), ("rep", "f", "t", "t"), ("rew", "f", "f", "t")]
            # passwords work over TCP, where pg_hba.conf asks for them
            assert await node.sql("SELECT current_user", host="127.0.0.1", user="rew", password="re\\w") == [("rew",)]
            assert await node.sql("SELECT 1", host="127.0.0.1", password="sup's er") == [("1",)]
    trio.run(main)


def test_bootstrap_is_refused_while_initialize_is_anothers(bed):
    async def main():
        async with bed.node("a") as node:
            bed.world.transact([], [Put(key=node.keys.path("initialize"), value=b"")])
            with pytest.raises(Refused):
                await node.operate(a.Bootstrap())
            assert not node.data_dir.exists()
    trio.run(main)


@pytest.mark.parametrize("how", ["script fails", "cancelled in initdb", "cancelled while it runs"])
def test_failed_bootstrap_frees_initialize_and_sets_the_directory_aside(bed, how):
    async def main():
        async with bed.node("a", bootstrap={"post_bootstrap": "/bin/false"} if how == "script fails" else {}) as node:
            if how == "script fails":
                with pytest.raises(CommandFailed):
                    await node.operate(a.Bootstrap())
            else:
                await cancelled_at(node, a.Bootstrap(), "initdb" if "initdb" in how else "creating users")
            assert not node.living()
            assert (await node.view()).initialize is None
            assert not node.data_dir.exists()
            assert (node.directory / "data.failed").exists() == ("initdb" not in how)
            # and the next try works
            if how != "script fails":
                await node.operate(a.Bootstrap())
                assert node.standby_signal and (await node.view()).initialize == ""
    trio.run(main)


def test_bootstrap_does_not_touch_a_directory_with_something_in_it(bed):
    async def main():
        async with bed.node("a") as node:
            node.data_dir.mkdir()
            (node.data_dir / "precious").write_text("x")
            with pytest.raises(OperationFailed, match="not empty"):
                await node.operate(a.Bootstrap())
            assert (node.data_dir / "precious").read_text() == "x"
            assert (await node.view()).initialize is None
    trio.run(main)


def test_clone_replaces_only_when_asked_and_keeps_the_old_one(bed):
    async def main():
        async with bed.node("a") as one, bed.node("b") as two:
            await one.primary()
            with pytest.raises(OperationFailed, match="expected 123"):
                await two.operate(a.Clone(source=as_source(one), system_identifier="1234567890"))
            assert not two.data_dir.exists() and not directories.clone_directory(two.data_dir).exists()
            (two.data_dir.with_name("data.clone")).mkdir()
            (two.data_dir.with_name("data.clone") / "leftover").write_text("of an earlier try")
            (two.data_dir.with_name("data.failed")).mkdir()
            await two.standby_of(one)
            assert not (two.data_dir / "leftover").exists()
            await two.operate(a.Stop(why="test", timeout_s=10))
            with pytest.raises(OperationFailed, match="only if"):
                await two.clone_of(one)
            (two.data_dir / "old_marker").write_text("")
            facts = await two.clone_of(one, replace="keep_old_until_streaming")
            assert facts["old"] == str(two.data_dir) + ".old" and os.path.exists(facts["old"] + "/old_marker")
            assert two.standby_signal and await two.guard_state() == "standby"
            await two.operate(a.StartStandby(upstream=as_source(one)))
            await two.until(two.streaming)
            by_hand = two.data_dir.with_name("data.old.1")
            by_hand.mkdir()
            (by_hand / "precious").write_text("x")
            two.data_dir.with_name("data.old.2").mkdir()
            assert await two.actor.discard_old() == [facts["old"]]
            assert (by_hand / "precious").exists() and two.data_dir.with_name("data.old.2").exists()
            assert not os.path.exists(facts["old"]) and two.data_dir.with_name("data.failed").exists()
    trio.run(main)


def test_a_copy_confirms_under_no_members_name(bed):
    """pg_basebackup's own WAL stream would pass for a synchronous standby, and its data is none yet (safety model 13)."""
    async def main():
        async with bed.node("a") as node:
            for which in ("replication", "rewind"):
                name = node.wanted.program_conninfo(as_source(node), which)["application_name"]
                assert name != node.name and node.name in name
    trio.run(main)


def test_clone_without_room_is_refused_with_both_numbers(bed):
    async def main():
        async with bed.node("a") as one, bed.node("b") as two:
            await one.primary()
            (database,) = (await one.sql("SELECT oid FROM pg_database WHERE datname = 'postgres'"))[0]
            # PostgreSQL counts what a file pretends to have
            sparse = one.data_dir / "base" / database / "999999"
            with sparse.open("wb") as f:
                f.truncate(1 << 44)
            with pytest.raises(OperationFailed, match=r"not enough space: the clone needs 16\.8 TiB, [0-9.]+ .iB are free"):
                await two.clone_of(one)
            assert not two.data_dir.exists()
            sparse.unlink()
    trio.run(main)


def test_removal_before_the_clone_goes_by_another_name(bed, monkeypatch):
    from pgha.act import clone

    async def main():
        async with bed.node("a") as one, bed.node("b") as two:
            await one.primary()
            await two.clone_of(one)
            (two.data_dir / "of_the_old").write_text("")
            left = two.data_dir.with_name("data.removing")
            two.data_dir.rename(left)
            (left / directories.REPLACED).write_text("data.removing\n")     # a deletion that was cut off
            await two.clone_of(one)
            assert not left.exists()
            # room for one copy only, counted without what is deleted already
            (two.data_dir / "of_the_old").write_text("")
            free = [0, 0]
            monkeypatch.setattr(directories, "free_bytes", lambda _: free.pop())
            monkeypatch.setattr(clone, "SPACE_EXTRA_BYTES", 0)
            assert (await two.clone_of(one, replace="remove_first"))["old"] == ""
            assert free == [0] and not (two.data_dir / "of_the_old").exists() and not left.exists()
            await two.operate(a.StartStandby(upstream=as_source(one)))
            await two.until(two.streaming)
    trio.run(main)


@pytest.mark.parametrize("when", ["partial", "runs", "whole"])
def test_bootstrap_that_was_killed_is_nobodys(bed, when):
    """The files as kill -9 leaves them at these points."""
    async def main():
        async with bed.node("a") as one, bed.node("b") as two:
            await one.primary()
            assert not directories.bootstrap_marker(one.data_dir).exists()
            await two.clone_of(one)
            if when == "partial":
                (two.data_dir / "global" / "pg_control").unlink()
            elif when == "runs":
                await two.operate(a.StartStandby(upstream=as_source(one)))
            directories.note_bootstrap(two.data_dir, "making")
            facts = await two.reader.read_facts(running=when == "runs")
            assert facts.abandoned_bootstrap and (when == "runs" or facts.state == "partial")
            if when == "whole":
                with pytest.raises(OperationFailed, match="cut off"):
                    await two.operate(a.StartStandby(upstream=as_source(one)))
            await two.standby_of(one)
            assert two.data_dir.with_name("data.failed").exists()
            assert not (await two.reader.read_facts(running=True)).abandoned_bootstrap
        async with bed.node("c") as three:
            three.bed.world.transact([], [Delete(key=three.keys.path("initialize"))])
            three.data_dir.mkdir(mode=0o700)
            (three.data_dir / "PG_VERSION").write_text("15\n")
            directories.note_bootstrap(three.data_dir, "making")
            await three.operate(a.Bootstrap())
            assert three.data_dir.with_name("data.failed").exists()
            facts = await three.reader.read_facts(running=False)
            assert facts.state == "valid" and facts.bootstrap_unregistered and not facts.abandoned_bootstrap
    trio.run(main)


def test_cancelled_clone_leaves_nothing_and_the_old_directory_as_it_was(bed):
    async def main():
        async with bed.node("a") as one, bed.node("b") as two:
            await one.primary()
            await two.clone_of(one)
            before = sorted(os.listdir(two.data_dir))
            clone = a.Clone(source=as_source(one), system_identifier=(await one.control()).system_identifier, replace="keep_old_until_streaming")
            for word in ("iB of", "verifying"):
                await cancelled_at(two, clone, word)
                assert not directories.clone_directory(two.data_dir).exists()
                assert sorted(os.listdir(two.data_dir)) == before
    trio.run(main)


def test_abandoned_directory_is_kept_under_a_numbered_name(bed):
    async def main():
        async with bed.node("a") as node:
            await node.operate(a.Bootstrap())
            node.data_dir.with_name("data.failed").mkdir()
            facts = await node.operate(a.AbandonDirectory(why="test"))
            assert facts["kept_as"] == str(node.data_dir) + ".failed.1" and not node.data_dir.exists()
    trio.run(main)


def test_swap_that_ended_between_its_renames_is_finished_without_a_copy(bed):
    async def main():
        async with bed.node("a") as one, bed.node("b") as two:
            await one.primary()
            await two.clone_of(one)
            (two.data_dir / "marker").write_text("")
            target = two.data_dir.with_name("data.clone")
            two.data_dir.rename(target)
            (target / "standby.signal").touch()     # comes with the copy of a standby: no word on whether that is whole
            two.data_dir.with_name("data.old").mkdir()
            await two.clone_of(one)
            assert not (two.data_dir / "marker").exists()
            (two.data_dir / "marker").write_text("")
            two.data_dir.rename(target)
            await directories.complete_clone(two.data_dir, (await one.control()).system_identifier)
            await two.clone_of(one)
            assert not directories.whole_marker(two.data_dir).exists()
            assert (two.data_dir / "marker").exists() and two.standby_signal
            await two.operate(a.StartStandby(upstream=as_source(one)))
            await two.until(two.streaming)
    trio.run(main)
