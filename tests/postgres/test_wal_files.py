from __future__ import annotations

import signal

import pytest
import trio

from pgha.errors import CommandFailed, PostgresError
from pgha.model.wal import parse_lsn
from pgha.postgres.controldata import parse_control, read_control
from pgha.postgres.processes import wait_no_process
from pgha.postgres.wal_files import WalRecord, end_of_wal, record_end, shutdown_positions

pytestmark = pytest.mark.postgres


async def ended(node, postmaster, number):
    postmaster.signal(number)
    await postmaster.wait_exit()
    await wait_no_process(node.data_dir, deadline_s=10)


def control_of(node):
    return read_control(node.data_dir, node.server.bin_dir, deadline_s=5)


def test_pg_control_in_its_states(make_node, bin_dir):
    async def main():
        a = make_node()
        assert (await control_of(a)).state == "shut down"
        postmaster = await a.start()
        control = await control_of(a)
        assert control.state == "in production"
        assert not control.clean
        assert control.wal_log_hints
        assert not control.checksums
        assert (control.timeline, control.wal_segment_bytes, control.max_connections) == (1, 16 * 2**20, 100)
        assert await a.sql("select system_identifier from pg_control_system()") == [(control.system_identifier,)]
        await ended(a, postmaster, signal.SIGINT)
        (a.data_dir / "standby.signal").touch()
        postmaster = await a.start()
        assert (await control_of(a)).state == "in archive recovery"
        await ended(a, postmaster, signal.SIGINT)
        control = await control_of(a)
        assert control.state == "shut down in recovery"
        assert control.clean
        assert control.was_standby
        with pytest.raises(CommandFailed):
            await read_control(a.data_dir / "base", bin_dir, deadline_s=5)
        damaged = bytearray((a.data_dir / "global/pg_control").read_bytes())
        damaged[40] ^= 0xFF
        (a.data_dir / "global/pg_control").write_bytes(damaged)
        with pytest.raises(PostgresError, match="damaged"):
            await control_of(a)
    trio.run(main)


def test_labels_that_are_missing_are_named():
    with pytest.raises(PostgresError, match="Database cluster state"):
        parse_control("pg_control version number: 1300\n")


def test_end_of_wal_is_where_crash_recovery_ends(make_node):
    async def main():
        a = make_node()
        postmaster = await a.start()
        # Records of many sizes, over page and segment borders.
        await a.sql("create table t (a text); alter table t alter a set storage plain;"
                    "insert into t select repeat('x', n % 1900) from generate_series(1, 12000) n")
        for _ in range(3):
            await a.sql("select pg_switch_wal(); insert into t values ('y')")
            conn = await a.connect()
            flushed = await conn.query("insert into t select repeat('z', 1500); select pg_current_wal_flush_lsn()", deadline_s=5)
            conn.close()
        flushed = await a.sql("select pg_current_wal_flush_lsn()")
        inserted = await a.sql("select pg_current_wal_insert_lsn()")
        await ended(a, postmaster, signal.SIGKILL)
        control = await control_of(a)
        assert control.state == "in production"
        end = await end_of_wal(control, a.data_dir, a.server.bin_dir, timeline=1, from_lsn=control.redo_lsn, deadline_s=20)
        assert parse_lsn(flushed[0][0]) <= end <= parse_lsn(inserted[0][0]) + 4096
        # What recovery itself says.
        await a.server.single_user_recovery(a.parameters, deadline_s=20)
        after = await control_of(a)
        assert after.prev_timeline == 1
        first = end if end % 8192 else end + 24
        # The end-of-recovery checkpoint is the first record after it.
        from pgha.postgres.wal_files import read_record
        record = await read_record(a.data_dir, a.server.bin_dir, timeline=1, lsn=first, segment_bytes=2**24, deadline_s=5)
        assert record.desc.startswith("CHECKPOINT_SHUTDOWN")
    trio.run(main)


def test_end_of_wal_at_a_segments_end_and_of_a_clean_server(make_node):
    async def main():
        a = make_node()
        postmaster = await a.start()
        await a.sql("create table t (a int); select pg_switch_wal()")
        await ended(a, postmaster, signal.SIGKILL)
        control = await control_of(a)
        for path in sorted((a.data_dir / "pg_wal").glob("0" * 7 + "1" + "*"))[1:]:
            path.unlink()  # the next segment was never written
        end = await end_of_wal(control, a.data_dir, a.server.bin_dir, timeline=1, from_lsn=control.redo_lsn, deadline_s=20)
        assert end % control.wal_segment_bytes == 0
        with pytest.raises(PostgresError, match="timeline 1"):  # at once, not after pg_waldump's patience
            await end_of_wal(control, a.data_dir, a.server.bin_dir, timeline=1, from_lsn=end + 2**30, deadline_s=1)
        assert end > control.redo_lsn

        b = make_node("b")
        control = await control_of(b)
        positions = await shutdown_positions(control, b.data_dir, b.server.bin_dir, deadline_s=10)
        assert positions.published_lsn == positions.checkpoint_lsn == control.checkpoint_lsn
        assert positions.end_lsn == await end_of_wal(
            control, b.data_dir, b.server.bin_dir, timeline=1, from_lsn=control.redo_lsn, deadline_s=10)
    trio.run(main)


def test_end_of_wal_soon_after_a_promotion(make_node):
    """pg_control may still name a checkpoint of the old timeline, in a segment that the new one does not have."""
    async def main():
        a = make_node()
        old = await control_of(a)
        postmaster = await a.start()
        await a.sql("create table t (a int); select pg_switch_wal()")
        await a.sql("insert into t values (1); select pg_switch_wal()")
        await ended(a, postmaster, signal.SIGINT)
        (a.data_dir / "standby.signal").touch()
        postmaster = await a.start()
        conn = await a.connect()
        await a.server.promote(postmaster, conn, deadline_s=10)
        await conn.query("insert into t values (2)", deadline_s=5)
        flushed = parse_lsn((await conn.query("select pg_current_wal_flush_lsn()", deadline_s=5))[0][0])
        conn.close()
        await ended(a, postmaster, signal.SIGKILL)
        end = await end_of_wal(old, a.data_dir, a.server.bin_dir, timeline=2, from_lsn=old.redo_lsn, deadline_s=20)
        assert flushed <= end < flushed + 8192
    trio.run(main)


def test_with_archiving_the_switch_before_the_shutdown_checkpoint_is_published(make_node):
    async def main():
        a = make_node()
        postmaster = await a.start(archive_mode="on", archive_command="true")
        await a.sql("create table t (a int)")
        with pytest.raises(PostgresError, match="in production"):
            await shutdown_positions(await control_of(a), a.data_dir, a.server.bin_dir, deadline_s=10)
        await ended(a, postmaster, signal.SIGINT)
        positions = await shutdown_positions(await control_of(a), a.data_dir, a.server.bin_dir, deadline_s=10)
        assert positions.published_lsn < positions.checkpoint_lsn < positions.end_lsn
        assert positions.checkpoint_lsn % (16 * 2**20) == 40  # first record of a fresh segment
    trio.run(main)


def record(lsn, length, desc="INSERT", rmgr="Heap"):
    return WalRecord(lsn=lsn, prev_lsn=0, length_bytes=length, rmgr=rmgr, desc=desc)


@pytest.mark.parametrize(("lsn", "length", "end"), [
    (0x1000040, 100, 0x10000A8),                    # aligned to 8
    (0x1000040, 96, 0x10000A0),
    (0x1001FF8, 8, 0x1002000),                      # ends with its page: the border itself
    (0x1001FF8, 24, 0x1002000 + 24 + 16),           # goes on after a short header
    (0x1FFFFF8, 24, 0x2000000 + 40 + 16),           # into a new segment: long header
    (0x1001F00, 3 * 8192, 0x1006000 + 24 + 3 * 8192 - 256 - 2 * 8168),  # two whole pages of 8168 between
])
def test_record_end(lsn, length, end):
    assert record_end(record(lsn, length), segment_bytes=16 * 2**20) == end


def test_switch_ends_with_its_segment():
    assert record_end(record(0x1000040, 24, "SWITCH ", "XLOG"), segment_bytes=16 * 2**20) == 0x2000000
