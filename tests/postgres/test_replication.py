"""Probe, slots, clone and rewind, on pairs of real servers."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from datetime import datetime
from pathlib import Path

import pytest
import trio

from pgha.errors import CommandFailed, ConfigError, PostgresError, PostgresTimeout, QueryFailed
from pgha.model.cluster import slot_name
from pgha.postgres import files, histories, pg_rewind, probe, slots
from pgha.postgres.basebackup import backup_arguments, base_backup, kill_leftovers
from pgha.postgres.controldata import read_control
from pgha.postgres.directories import clone_directory, complete_clone, content, swap_in_clone
from pgha.postgres.processes import adopt, read_stat, wait_no_process

pytestmark = pytest.mark.postgres


def source_of(node, **more):
    return {"host": str(node.socket_dir), "port": node.port, "user": "postgres", "dbname": "postgres"} | more


async def follow(standby, primary, slot=""):
    """Write what makes `standby` follow `primary`, and start it."""
    files.clean_auto_conf(standby.data_dir)
    recovery = {"primary_conninfo": files.conninfo_text(files.primary_conninfo(
        host=str(primary.socket_dir), port=primary.port, user="postgres", application_name=standby.name, passfile=None)),
        "wal_retrieve_retry_interval": "100ms", "primary_slot_name": slot}
    files.write_postgresql_conf(standby.data_dir, {}, recovery)
    files.create_standby_signal(standby.data_dir)
    return await standby.start()


async def caught_up(standby, primary):
    conn, other = await standby.connect(), await primary.connect()
    with trio.fail_after(10):
        while (await probe.read_row(conn, deadline_s=5)).replayed_lsn < (await probe.read_row(other, deadline_s=5)).lsn:  # noqa: ASYNC110
            await trio.sleep(0.01)
    other.close()
    return conn


async def pair(make_node):
    a = make_node("a")
    postmaster = await a.start()
    b = make_node("b", copy=False)
    await base_backup(b.data_dir, b.server.bin_dir, source_of(a), ["no-verify-checksums", {"checkpoint": "fast"}], deadline_s=30)
    await follow(b, a)
    return a, postmaster, b


def test_probe_of_primary_and_standby(make_node):
    async def main():
        a, _, b = await pair(make_node)
        conn = await a.connect(options=probe.OPTIONS)
        await slots.create_physical(conn, "b", deadline_s=5)
        standby = await caught_up(b, a)
        with trio.fail_after(10):
            while not (row := await probe.read_row(conn, deadline_s=5)).replication:  # noqa: ASYNC110
                await trio.sleep(0.01)
        assert not row.in_recovery
        assert row.timeline == 1
        assert row.lsn > 0
        assert row.received_lsn == row.replayed_lsn == 0
        assert row.receiver is None
        assert row.server_version // 10000 == conn.server_version // 10000
        assert row.started_at_s > 1e9
        fashionable = await a.connect(options=f"{probe.OPTIONS} -c datestyle=German -c timezone=Asia/Kathmandu")
        assert (await probe.read_row(fashionable, deadline_s=5)).started_at == row.started_at
        fashionable.close()
        assert row.started_at.endswith("+00:00")
        assert datetime.fromisoformat(row.started_at).timestamp() == pytest.approx(row.started_at_s, abs=1e-3)
        assert [s.name for s in row.slots] == ["b"]
        assert row.slots[0].restart_lsn > 0
        assert row.replication[0]["application_name"] == "b"
        assert {"usename", "client_addr", "state", "sync_state", "sync_priority", "flush_lsn", "pid"} <= row.replication[0].keys()
        seen = await probe.read_row(standby, deadline_s=5)
        assert seen.in_recovery
        assert (seen.timeline, seen.lsn) == (1, 0)
        assert seen.received_lsn >= seen.replayed_lsn > 0
        assert seen.receiver.status == "streaming"
        assert seen.receiver.sender_port == a.port
        assert f"port={a.port}" in seen.primary_conninfo
        assert seen.system_identifier == row.system_identifier
        assert f"port={a.port}" in await probe.receiver_conninfo(standby, deadline_s=5)
        assert await probe.receiver_conninfo(conn, deadline_s=5) is None
        await standby.query("select pg_wal_replay_pause()", deadline_s=5)
        assert (await probe.read_row(standby, deadline_s=5)).replay_paused
        position = await probe.own_position(a.conninfo, deadline_s=5)
        assert (position.timeline, position.lsn >= row.lsn) == (1, True)
        # As cheap as promised: the median of many, with what this machine adds.
        took = []
        for _ in range(50):
            began = time.perf_counter()
            await probe.read_row(conn, deadline_s=5)
            took.append(time.perf_counter() - began)
        assert sorted(took)[25] < 0.02, sorted(took)[25]
        conn.close()
        standby.close()
    trio.run(main)


def test_probe_across_a_promotion_tells_the_new_timeline(make_node):
    async def main():
        a, postmaster, b = await pair(make_node)
        conn = await caught_up(b, a)
        postmaster.signal(signal.SIGKILL)
        b_postmaster = adopt(b.data_dir)
        b.server.request_promotion(b_postmaster)
        rows = []
        with trio.fail_after(10):
            while not rows or rows[-1].in_recovery:
                rows.append(await probe.read_row(conn, deadline_s=5))
        assert {r.timeline for r in rows if r.in_recovery} <= {1, 2}
        assert rows[-1].timeline == 2
        conn.close()
    trio.run(main)


def test_a_claim_goes_wherever_the_history_goes(make_node):
    """To who streams, to who is copied, and into the histories of later timelines; one that was given up stands nowhere."""
    async def promote(node, leaving, claim):
        before = []
        histories.claim_timeline(node.data_dir, leaving, leaving + 1, f"{claim} given up", before)
        histories.claim_timeline(node.data_dir, leaving, leaving + 1, claim, [])
        conn = await node.connect()
        await node.server.promote(adopt(node.data_dir), conn, deadline_s=10)
        await conn.query("checkpoint", deadline_s=5)
        conn.close()
        histories.unclaim(node.data_dir, before)

    async def main():
        a, postmaster, b = await pair(make_node)
        c, d = make_node("c", copy=False), make_node("d", copy=False)
        await base_backup(c.data_dir, c.server.bin_dir, source_of(a), [{"checkpoint": "fast"}], deadline_s=30)
        (await caught_up(b, a)).close()
        postmaster.signal(signal.SIGKILL)
        await promote(b, 1, "the first")
        assert not (b.data_dir / "pg_wal" / "00000001.history").exists()
        await follow(c, b)
        (await caught_up(c, b)).close()
        adopt(b.data_dir).signal(signal.SIGKILL)
        await promote(c, 2, "the second")
        assert (c.data_dir / "pg_wal" / "00000002.history").read_bytes() == (b.data_dir / "pg_wal" / "00000002.history").read_bytes()
        await base_backup(d.data_dir, d.server.bin_dir, source_of(c), [{"checkpoint": "fast"}], deadline_s=30)
        for node, timeline, claims in ((b, 2, ["the first"]), (c, 2, ["the first"]), (c, 3, ["the first", "the second"]), (d, 3, ["the first", "the second"])):
            history = histories.read_history(node.data_dir, timeline)
            assert history is not None
            assert [row.claim for row in history.rows] == claims, (node.data_dir, timeline)
        assert not histories.blocked_timelines(c.data_dir)
    trio.run(main)


def test_a_block_keeps_a_standby_from_following_the_one_who_took_the_number(make_node):
    """Both ways: stuck with the block, streaming once it is removed."""
    async def main():
        a, postmaster, b = await pair(make_node)
        c = make_node("c", copy=False)
        await base_backup(c.data_dir, c.server.bin_dir, source_of(a), [{"checkpoint": "fast"}], deadline_s=30)
        await follow(c, a)
        (await caught_up(c, a)).close()
        conn = await caught_up(b, a)
        postmaster.signal(signal.SIGKILL)
        await b.server.promote(adopt(b.data_dir), conn, deadline_s=10)
        await conn.query("create table t ()", deadline_s=5)
        conn.close()
        histories.block_timeline(c.data_dir, 2, "claimed by b")
        c_postmaster = adopt(c.data_dir)
        files.write_postgresql_conf(c.data_dir, {}, {
            "primary_conninfo": files.conninfo_text(source_of(b)), "wal_retrieve_retry_interval": "100ms"})
        c.server.reload(c_postmaster)
        with trio.fail_after(10):
            while "not a child" not in c.server.log_path.read_text():  # noqa: ASYNC110
                await trio.sleep(0.02)
        assert histories.unblock_all(c.data_dir) == [2]
        conn = await caught_up(c, b)
        assert (await probe.read_row(conn, deadline_s=5)).timeline == 2
        conn.close()
    trio.run(main)


def test_slots(make_node):
    async def main():
        a = make_node()
        await a.start()
        conn = await a.connect()
        await slots.create_physical(conn, "node_2", deadline_s=5)
        with pytest.raises(QueryFailed) as e:
            await slots.create_physical(conn, "node_2", deadline_s=5)
        assert e.value.sqlstate == "42710"
        at = (await probe.read_row(conn, deadline_s=5)).slots[0].restart_lsn
        await conn.query("create table t as select generate_series(1, 1000)", deadline_s=5)
        end = (await probe.read_row(conn, deadline_s=5)).lsn
        assert await slots.advance(conn, "node_2", end, deadline_s=5) == end
        assert end > at
        assert await slots.advance(conn, "node_2", end + 10**9, deadline_s=5) >= end  # never past what there is
        with pytest.raises(QueryFailed):
            await slots.advance(conn, "node_2", at, deadline_s=5)
        await slots.drop(conn, "node_2", deadline_s=5)
        with pytest.raises(QueryFailed) as e:
            await slots.drop(conn, "node_2", deadline_s=5)
        assert e.value.sqlstate == "42704"
        conn.close()
    trio.run(main)


@pytest.mark.parametrize(("member", "slot"), [
    ("Node-1.a", "node_1_a"), ("n_2", "n_2"), ("é", "u0233"), ("a b", "au0032b"), ("x" * 70, "x" * 63), ("数", "u25968"),
])
def test_slot_name(member, slot):
    assert slot_name(member) == slot


def test_clone_tells_its_progress_and_replaces_a_directory(make_node):
    async def main():
        a = make_node()
        await a.start()
        await a.sql("create table t as select repeat('x', 1000) from generate_series(1, 20000)")
        seen = []
        b = make_node("b")
        target = clone_directory(b.data_dir)
        await base_backup(target, b.server.bin_dir, source_of(a), [{"checkpoint": "fast"}], deadline_s=30, on_progress=seen.append)
        assert seen[-1].done_bytes >= 20 * 2**20
        assert 0.9 < seen[-1].done_bytes / seen[-1].total_bytes <= 1.1
        assert [p.done_bytes for p in seen] == sorted(p.done_bytes for p in seen)
        with pytest.raises(PostgresError, match="not empty"):
            await base_backup(target, b.server.bin_dir, source_of(a), [], deadline_s=30)
        await complete_clone(b.data_dir, "7")
        assert swap_in_clone(b.data_dir).name == "b.old"
        await follow(b, a)
        conn = await caught_up(b, a)
        assert await conn.query("select count(*) from t", deadline_s=5) == [("20000",)]
        conn.close()
    trio.run(main)


def test_clone_that_fails_or_is_cancelled_leaves_no_process(make_node, base):
    async def main():
        a = make_node()
        await a.start()
        await a.sql("create table t as select repeat('x', 1000) from generate_series(1, 20000)")
        with pytest.raises(CommandFailed, match="does not exist"):
            await base_backup(base / "x", a.server.bin_dir, source_of(a, user="nobody"), [], deadline_s=10)
        children = _descendants()
        seen = trio.Event()
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                async def cancel():
                    await seen.wait()
                    scope.cancel()
                nursery.start_soon(cancel)
                await base_backup(base / "y", a.server.bin_dir, source_of(a), [{"max-rate": "1M"}, {"checkpoint": "fast"}],
                                  deadline_s=30, on_progress=lambda p: p.done_bytes and seen.set())
        assert scope.cancelled_caught
        with pytest.raises(PostgresTimeout):
            await base_backup(base / "z", a.server.bin_dir, source_of(a), [{"max-rate": "1M"}, {"checkpoint": "fast"}], deadline_s=0.5)
        with trio.fail_after(5):  # SIGKILL has been sent to all; the kernel takes a moment
            while _descendants() != children:  # noqa: ASYNC110
                await trio.sleep(0.01)
        assert content(base / "y") == "partial"
        with trio.fail_after(10):
            while await a.sql("select count(*) from pg_stat_replication") != [("0",)]:  # noqa: ASYNC110
                await trio.sleep(0.02)
    trio.run(main)


def _descendants():
    """Living children: also what they orphaned, since the test is a subreaper."""
    stats = {int(p): read_stat(int(p)) for p in os.listdir("/proc") if p.isdigit()}
    return {pid for pid, stat in stats.items() if stat and stat.parent == os.getpid() and stat.state != "Z"}


def test_backup_options():
    assert backup_arguments(["verbose", {"max-rate": "10M", "checkpoint": "fast"}]) == [
        "--verbose", "--max-rate=10M", "--checkpoint=fast"]
    with pytest.raises(ConfigError) as e:
        backup_arguments(["no-sync", {"pgdata": "x"}, {"wal-method": "none"}, "-R"])
    assert len(e.value.problems) == 4
    with pytest.raises(ConfigError, match="compress"):
        backup_arguments([{"compress": "gzip"}])
    assert backup_arguments([{"compress": "server-gzip"}]) == ["--compress=server-gzip"]


async def diverged(make_node):
    """a was primary, crashed, and has WAL that b, promoted, never saw."""
    a, postmaster, b = await pair(make_node)
    await a.sql("create table t (who text)")
    conn = await caught_up(b, a)
    await b.server.promote(adopt(b.data_dir), conn, deadline_s=10)
    conn.close()
    await a.sql("insert into t select 'a' from generate_series(1, 1000)")
    await b.sql("insert into t values ('b')")
    await b.sql("checkpoint")
    postmaster.signal(signal.SIGKILL)
    await postmaster.wait_exit()
    await wait_no_process(a.data_dir, deadline_s=10)
    return a, b


def test_a_crashed_old_primary_is_recovered_rewound_and_streams(make_node):
    async def main():
        a, b = await diverged(make_node)
        (a.data_dir / "patroni.dynamic.json").write_text("mine")
        bin_dir = a.server.bin_dir

        async def control():
            return await read_control(a.data_dir, bin_dir, deadline_s=5)

        with pytest.raises(PostgresError, match="in production"):
            await pg_rewind.rewind(a.data_dir, bin_dir, source_of(b), await control(), source_timeline=2, deadline_s=30)
        await a.server.single_user_recovery(a.parameters, deadline_s=30)
        files.create_standby_signal(a.data_dir)  # pg_rewind of a cleanly stopped target does not mind it
        seen = []
        done = await pg_rewind.rewind(
            a.data_dir, bin_dir, source_of(b), await control(), source_timeline=2, deadline_s=30, on_progress=seen.append)
        assert done.outcome == "rewound", done.output
        assert not pg_rewind.interrupted(a.data_dir)
        assert seen[-1].done_bytes == seen[-1].total_bytes > 0
        assert (a.data_dir / "patroni.dynamic.json").read_text() == "mine"
        await follow(a, b)
        conn = await caught_up(a, b)
        assert await conn.query("select who, count(*) from t group by 1", deadline_s=5) == [("b", "1")]
        assert (await probe.read_row(conn, deadline_s=5)).timeline == 2
        conn.close()
    trio.run(main)


def test_a_rewind_that_cannot_is_told_apart(make_node):
    async def main():
        a, b = await diverged(make_node)
        bin_dir = a.server.bin_dir
        await a.server.single_user_recovery(a.parameters, deadline_s=30)
        control = await read_control(a.data_dir, bin_dir, deadline_s=5)
        done = await pg_rewind.rewind(a.data_dir, bin_dir, source_of(b, port=1), control, source_timeline=2, deadline_s=30)
        assert (done.outcome, done.target_changed) == ("failed", False)
        assert not pg_rewind.interrupted(a.data_dir)
        for path in sorted((a.data_dir / "pg_wal").glob("0000000100000000*"))[:-1]:
            path.rename(a.data_dir.parent / path.name)
        done = await pg_rewind.rewind(a.data_dir, bin_dir, source_of(b), control, source_timeline=2, deadline_s=30)
        assert done.outcome == "missing_wal", done.output
        (a.data_dir.parent / done.missing_segment).rename(a.data_dir / "pg_wal" / done.missing_segment)
        assert not pg_rewind.interrupted(a.data_dir)
        # Interrupted in the middle: a marker says so.
        (a.data_dir / "big").write_bytes(b"")
        with pytest.raises(PostgresTimeout):
            await pg_rewind.rewind(a.data_dir, bin_dir, source_of(b), control, source_timeline=2, deadline_s=0.0005)
        assert pg_rewind.interrupted(a.data_dir)
        # It may be done again only from the same source on the same timeline; to have failed before that changes nothing.
        for port, timeline, outcome in ((1, 2, "hopeless"), (b.port, 3, "hopeless")):
            done = await pg_rewind.rewind(a.data_dir, bin_dir, source_of(b, port=port), control, source_timeline=timeline, deadline_s=30)
            assert (done.outcome, done.target_changed) == (outcome, True) and pg_rewind.interrupted(a.data_dir)
        with pytest.raises(ConfigError):
            await pg_rewind.rewind(a.data_dir, bin_dir, source_of(b), control, source_timeline=2, deadline_s=30, options=["dry-run"])
    trio.run(main)


@pytest.mark.parametrize("since", ["killed", "machine went down"])
def test_a_rewind_that_lacked_only_its_sync_is_finished(make_node, since):
    async def main():
        a, b = await diverged(make_node)
        bin_dir = a.server.bin_dir
        await a.server.single_user_recovery(a.parameters, deadline_s=30)
        before = await read_control(a.data_dir, bin_dir, deadline_s=5)
        with pytest.raises(PostgresTimeout):
            await pg_rewind.rewind(a.data_dir, bin_dir, source_of(b), before, source_timeline=2, deadline_s=0.0005)
        marker = pg_rewind.marker(a.data_dir).read_text()
        done = await pg_rewind.rewind(a.data_dir, bin_dir, source_of(b), before, source_timeline=2, deadline_s=30)
        assert done.outcome == "rewound", done.output
        # as kill -9 leaves it in the last sync
        if since == "machine went down":
            marker = "another boot\n" + marker.split("\n", 1)[1]
        pg_rewind.marker(a.data_dir).write_text(marker)
        after = await read_control(a.data_dir, bin_dir, deadline_s=5)
        assert after.state == "in archive recovery" and not after.clean
        done = await pg_rewind.rewind(a.data_dir, bin_dir, source_of(b), after, source_timeline=2, deadline_s=30)
        if since == "killed":
            assert done.outcome == "rewound" and not pg_rewind.interrupted(a.data_dir)
            await follow(a, b)
            (await caught_up(a, b)).close()
        else:
            assert done.outcome == "hopeless" and pg_rewind.interrupted(a.data_dir)
    trio.run(main)


def test_no_rewind_required(make_node):
    async def main():
        a, postmaster, b = await pair(make_node)
        conn = await caught_up(b, a)
        conn.close()
        standby = adopt(b.data_dir)
        b.server.stop(standby, "fast")
        await standby.wait_exit()
        control = await read_control(b.data_dir, b.server.bin_dir, deadline_s=5)
        assert control.state == "shut down in recovery"
        done = await pg_rewind.rewind(b.data_dir, b.server.bin_dir, source_of(a), control, source_timeline=2, deadline_s=30)
        assert done.outcome == "not_needed", done.output
    trio.run(main)


def test_what_a_killed_base_backup_leaves_is_found_and_killed(make_node, base):
    async def main():
        a = make_node()
        await a.start()
        target = base / "copy"
        backup = subprocess.Popen(
            [a.server.bin_dir / "pg_basebackup", f"--pgdata={target}", "-h", base, "-p", str(a.port), "-U", "postgres", "-X", "stream", "-c", "fast",
             "-r", "1M"], stderr=subprocess.DEVNULL)
        children = Path(f"/proc/{backup.pid}/task/{backup.pid}/children")
        with trio.fail_after(10):
            while not (receiver := children.read_text().split()):
                await trio.sleep(0.02)
        backup.kill()
        backup.wait()
        assert kill_leftovers(base / "cop") == []
        assert kill_leftovers(target) == [int(receiver[0])]
    trio.run(main)


def test_a_standby_that_has_not_replayed_what_lies_in_pg_wal_says_so(make_node):
    """Replay stands still for many reasons (a delay, a conflict, a slow disk); where WAL ends it shows by what it waits for."""
    async def restarted(b, **more):
        postmaster = adopt(b.data_dir)
        postmaster.signal(signal.SIGINT)
        with trio.fail_after(10):
            await postmaster.wait_exit()
        files.write_postgresql_conf(b.data_dir, {}, {"primary_conninfo": "", **more})
        files.create_standby_signal(b.data_dir)
        await b.start()
        return await b.connect()

    async def seen(conn):
        return await probe.read_row(conn, deadline_s=5)

    async def main():
        a, _, b = await pair(make_node)
        conn, primary = await caught_up(b, a), await a.connect()
        assert (await seen(conn)).startup_rests
        assert (await seen(primary)).startup_rests
        await b.sql("SELECT pg_wal_replay_pause()")
        await primary.query("CREATE TABLE t AS SELECT generate_series(1, 1000) AS n", deadline_s=5)
        end = (await seen(primary)).lsn
        with trio.fail_after(10):
            while (await seen(conn)).received_lsn < end:  # noqa: ASYNC110
                await trio.sleep(0.01)
        conn.close()
        conn = await restarted(b, recovery_min_apply_delay="1h")
        with trio.fail_after(10):
            while (row := await seen(conn)).startup_rests:  # noqa: ASYNC110
                await trio.sleep(0.01)
        assert (row.received_lsn, row.receiver) == (0, None)
        assert row.replayed_lsn < end
        conn.close()
        conn = await restarted(b)
        with trio.fail_after(10):
            while not (row := await seen(conn)).startup_rests:  # noqa: ASYNC110
                await trio.sleep(0.01)
        assert row.received_lsn == 0
        assert row.replayed_lsn >= end
        conn.close()
        primary.close()
    trio.run(main)
