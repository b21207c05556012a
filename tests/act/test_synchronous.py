"""synchronous_standby_names on real servers: set, kept, there before the first commit, and never less on the way down."""

from __future__ import annotations

import os
import signal
from contextlib import asynccontextmanager

import pytest
import trio
from act_bed import as_source

from pgha.act.wanted import Wanted
from pgha.config.load import effective
from pgha.errors import OperationFailed, PostgresError, PostgresTimeout
from pgha.model import action as a
from pgha.postgres.connection import Connection

NOBODY = "__patroni_strict_sync_replica_placeholder__"


@asynccontextmanager
async def client(node):
    conn = await Connection.connect({"host": str(node.directory), "port": node.port, "user": "postgres", "dbname": "postgres"}, deadline_s=5)
    try:
        yield conn
    finally:
        conn.close()


async def waits(node, sql, *, for_s=0.5):
    """A commit that is not acknowledged within that time. (The client goes away; the backend waits on.)"""
    async with client(node) as conn:
        try:
            await conn.query(sql, deadline_s=for_s)
        except PostgresTimeout:
            return True
    return False


def seen(node, names, *states):
    row = node.observer.facts.row
    return row is not None and row.synchronous_standby_names == names and tuple(line["sync_state"] for line in row.replication) == states


async def standby_called_b(bed_node, one):
    await bed_node.standby_of(one)
    await one.until(lambda: one.observer.facts.row is not None and [line["application_name"] for line in one.observer.facts.row.replication] == ["b"])


def test_the_setting_is_seen_kept_by_other_writes_and_taken_back(bed):
    async def main():
        async with bed.node("a") as one, bed.node("b") as two:
            await one.primary()
            await standby_called_b(two, one)
            await one.quick(a.SetSynchronousNames(names="b"))
            await one.until(lambda: seen(one, "b", "sync"))
            (line,) = one.observer.facts.row.replication
            assert line["sync_priority"] == 1 and line["flush_lsn"] > 0
            await one.until(lambda: one.observer.facts.row.checkpointer_rests)
            await one.quick(a.ApplyConfiguration(force=True))
            await one.quick(a.SetSynchronousNames(names="ANY 1 (b)"))
            await one.until(lambda: seen(one, "ANY 1 (b)", "quorum"))
            await one.sql("CREATE TABLE t AS SELECT 1 n")
            # a restarted agent's configuration, not told yet, keeps what stands in the file
            other = Wanted(effective=lambda: effective(one.local, one.dynamic), passfile=one.directory / "pgpass")
            assert (other.names, other.names_told) == ("ANY 1 (b)", False)
            other.write_running()
            assert "synchronous_standby_names = 'ANY 1 (b)'" in (one.data_dir / "postgresql.conf").read_text()
            await one.quick(a.SetSynchronousNames(names=None))
            await one.until(lambda: seen(one, "", "async"))
            assert "synchronous_standby_names" not in (one.data_dir / "postgresql.conf").read_text()
            assert Wanted(effective=lambda: effective(one.local, one.dynamic), passfile=one.directory / "pgpass").names_told
    trio.run(main)


def test_what_alter_system_says_does_not_stand_in_the_way(bed):
    async def main():
        async with bed.node("a") as one, bed.node("b") as two:
            await one.primary()
            await one.sql("ALTER SYSTEM SET synchronous_standby_names = 'nobody'")
            await standby_called_b(two, one)
            for node in (one, two):
                assert node.wanted.names_are_overridden() is False, "the modes are off"
                await node.quick(a.SetSynchronousNames(names="b"))
                await node.until(lambda node=node: node.observer.facts.row.synchronous_standby_names == "b")
            await one.sql("ALTER SYSTEM SET synchronous_standby_names = 'nobody'")
            await one.operate(a.Restart(as_primary=True, timeout_s=30, synchronous_names="b"))
            await one.until(lambda: one.observer.facts.row is not None and one.observer.facts.row.synchronous_standby_names == "b")
    trio.run(main)


def test_the_operators_own_parameter_counts_while_the_modes_are_off(bed):
    async def main():
        async with bed.node("a", parameters={"synchronous_standby_names": "ANY 1 (x, y)", "synchronous_commit": "local"}) as node:
            await node.primary()
            await node.until(lambda: seen(node, "ANY 1 (x, y)"))
            assert (node.wanted.names, node.wanted.names_told) == (None, True)
            await node.quick(a.SetSynchronousNames(names=""))
            await node.until(lambda: seen(node, ""))
            await node.quick(a.SetSynchronousNames(names=None))
            await node.until(lambda: seen(node, "ANY 1 (x, y)"))
    trio.run(main)


def test_a_commit_that_waits_for_one_that_hangs_is_released_when_another_takes_its_place(bed):
    async def main():
        async with bed.node("a") as one, bed.node("b") as two, bed.node("c") as three:
            await one.primary()
            await two.standby_of(one)
            await three.standby_of(one)
            await one.sql("CREATE TABLE t (n int)")
            await one.quick(a.SetSynchronousNames(names="b"))
            await one.until(lambda: one.observer.facts.row.synchronous_standby_names == "b" and one.observer.facts.row.checkpointer_rests)
            hung = two.living()
            for proc in hung:
                os.kill(proc.pid, signal.SIGSTOP)
            try:
                async with client(one) as conn, trio.open_nursery() as nursery:
                    answered = []

                    async def insert():
                        await conn.query("INSERT INTO t VALUES (1)", deadline_s=20)
                        answered.append(trio.current_time())

                    nursery.start_soon(insert)
                    await trio.sleep(0.5)       # that it waits is the subject
                    assert not answered
                    began_s = trio.current_time()
                    await one.quick(a.SetSynchronousNames(names="c"))
                    with trio.fail_after(5):
                        while not answered:
                            await trio.sleep(0.01)
                    print(f"released {answered[0] - began_s:.3f} s after the setting")
                    assert answered[0] - began_s < 2, "well before wal_receiver_status_interval, 10 s"
            finally:
                for proc in hung:
                    os.kill(proc.pid, signal.SIGCONT)
    trio.run(main)


def test_the_first_commit_after_a_start_or_a_restart_as_primary_waits(bed):
    async def main():
        async with bed.node("a") as node:
            made = await node.operate(a.Bootstrap())
            await node.take_lock(initialize_revision=made["initialize_revision"], initialize_value=made["system_identifier"])
            await node.operate(a.StartPrimary(timeout_s=30, first_start=True, synchronous_names=NOBODY))
            assert await waits(node, "CREATE TABLE t (n int)")
            await node.operate(a.Restart(as_primary=True, timeout_s=30, synchronous_names="x"))
            await node.until(lambda: seen(node, "x"))
            assert await waits(node, "CREATE TABLE u (n int)")
            await node.operate(a.Restart(as_primary=True, timeout_s=30, synchronous_names=""))
            await node.sql("INSERT INTO t VALUES (1)")
    trio.run(main)


def test_a_promotion_needs_the_setting_and_its_first_commit_waits(bed):
    async def main():
        async with bed.node("a") as one, bed.node("b") as two:
            await one.primary()
            await one.sql("CREATE TABLE t (n int)")
            await two.standby_of(one)
            facts = await one.operate(a.Demote(mode="fast", release=True, checkpoint=True, why="test", timeout_s=30))
            await two.quick(a.Freeze(epoch=1))
            await two.take_lock(claim=2)
            assert facts["released"]
            with pytest.raises(OperationFailed, match="synchronous_standby_names is '' and not 'a': not promoted"):
                await two.operate(a.Promote(timeline=2, leaving=1, block=(), epoch=2, synchronous_names="a"))
            assert two.living(), "it goes on as a standby"
            await two.quick(a.SetSynchronousNames(names="a"))
            await two.until(lambda: two.observer.facts.row.synchronous_standby_names == "a" and two.observer.facts.row.checkpointer_rests)
            await two.operate(a.Promote(timeline=2, leaving=1, block=(), epoch=2, synchronous_names="a"))
            assert await waits(two, "INSERT INTO t VALUES (1)")
            # the old primary comes back as the standby that is waited for
            await one.operate(a.StartStandby(upstream=as_source(two)))
            assert "synchronous_standby_names" not in (one.data_dir / "postgresql.conf").read_text(), "of a standby nothing is left of it"
            await two.sql("INSERT INTO t VALUES (2)")
            assert [r[0] for r in await one.sql("SELECT n FROM t ORDER BY n")] == ["1", "2"]
    trio.run(main)


@pytest.mark.parametrize("mode", ["fast", "kill"])
def test_a_commit_that_waits_is_not_acknowledged_by_a_demotion(bed, mode):
    async def main():
        async with bed.node("a") as node:
            await node.primary()
            await node.sql("CREATE TABLE t (n int)")
            await node.quick(a.SetSynchronousNames(names=NOBODY))
            await node.until(lambda: seen(node, NOBODY) and node.observer.facts.row.checkpointer_rests)
            outcome = []
            async with client(node) as conn, trio.open_nursery() as nursery:
                async def insert():
                    try:
                        await conn.query("INSERT INTO t VALUES (1)", deadline_s=30)
                        outcome.append("acknowledged")
                    except PostgresError as error:
                        outcome.append(str(error))

                nursery.start_soon(insert)
                await trio.sleep(0.5)
                assert not outcome
                await node.operate(a.Demote(mode=mode, release=True, checkpoint=mode == "fast", why="test", timeout_s=30))
            print(outcome)
            assert outcome and outcome != ["acknowledged"]
            assert "synchronous_standby_names" in (node.data_dir / "postgresql.conf").read_text(), "nothing was taken back on the way down"
    trio.run(main)
