from __future__ import annotations

import os
import signal
import time

import pytest
import trio

from pgha.errors import CommandFailed, PostgresError, PostgresTimeout
from pgha.postgres import files, histories
from pgha.postgres.controldata import read_control
from pgha.postgres.processes import adopt, living_processes, wait_no_process

pytestmark = pytest.mark.postgres


async def stopped(postmaster, data_dir):
    await postmaster.wait_exit()
    await wait_no_process(data_dir, deadline_s=10)


def test_start_reload_stop(make_node):
    async def main():
        a = make_node()
        postmaster = await a.start()
        assert await a.sql("show restart_after_crash") == [("off",)]
        files.write_file(a.data_dir / "postgresql.auto.conf", "work_mem = '5MB'\n")
        assert a.server.reload(postmaster)
        with trio.fail_after(5):
            while await a.sql("show work_mem") != [("5MB",)]:  # noqa: ASYNC110
                await trio.sleep(0.01)
        for mode in ("fast", "immediate", "smart"):
            assert a.server.stop(postmaster, mode)
            with trio.fail_after(10):
                await stopped(postmaster, a.data_dir)
            state = (await read_control(a.data_dir, a.server.bin_dir, deadline_s=5)).state
            assert state == ("in production" if mode == "immediate" else "shut down")
            postmaster = await a.start()
    trio.run(main)


def test_a_start_that_fails_says_why(make_node):
    async def main():
        a = make_node()
        with pytest.raises(CommandFailed, match="no_such_setting"):
            await a.start(no_such_setting="1")
        (a.data_dir / "global/pg_control").unlink()
        with pytest.raises(CommandFailed):
            await a.start()
        assert living_processes(a.data_dir) == []
    trio.run(main)


def test_waiting_for_a_stopped_postmaster_ends_at_the_deadline(make_node):
    async def main():
        a = make_node()
        postmaster = await a.server.start(a.parameters)
        postmaster.signal(signal.SIGSTOP)
        began = time.monotonic()
        with pytest.raises(PostgresTimeout):
            await a.server.wait_ready(postmaster, deadline_s=0.2)
        assert time.monotonic() - began < 0.5
        postmaster.signal(signal.SIGCONT)
        await a.server.wait_ready(postmaster, deadline_s=10)
    trio.run(main)


def test_a_crashed_backend_ends_the_postmaster_which_does_not_come_back_as_a_standby(make_node):
    async def main():
        a = make_node()
        postmaster = await a.start()
        files.create_standby_signal(a.data_dir)  # as at rest
        conn = await a.connect()
        os.kill(conn.backend_pid, signal.SIGSEGV)
        with trio.fail_after(10):
            await stopped(postmaster, a.data_dir)
        conn.close()
        assert adopt(a.data_dir) is None
        # As a primary once more: without the file, no new timeline.
        assert files.remove_standby_signal(a.data_dir)
        await a.start()
        assert await a.sql("select pg_is_in_recovery(), (select timeline_id from pg_control_checkpoint())") == [("f", "1")]
    trio.run(main)


def test_promotion_is_quick_and_consumes_standby_signal(make_node):
    async def main():
        a = make_node()
        files.create_standby_signal(a.data_dir)
        postmaster = await a.start()
        conn = await a.connect()
        assert await conn.query("select pg_is_in_recovery()", deadline_s=5) == [("t",)]
        began = time.monotonic()
        await a.server.promote(postmaster, conn, deadline_s=10)
        await conn.query("create table t (a int)", deadline_s=5)
        took_s = time.monotonic() - began
        assert took_s < 1.5, took_s  # about 0.05 s on a quiet machine
        assert not files.is_standby(a.data_dir)
        assert histories.read_history(a.data_dir, 2).rows[0].timeline == 1
        conn.close()
    trio.run(main)


def test_promotion_skips_blocked_timelines_and_takes_the_first_gap(make_node):
    """Both ways: without a block it is 2, with 2 and 3 blocked it is 4, with only 3 blocked it is 2 again."""
    async def main():
        for name, blocked, expected in (("a", (), 2), ("b", (2, 3), 4), ("c", (3,), 2)):
            node = make_node(name)
            files.create_standby_signal(node.data_dir)
            postmaster = await node.start()
            for timeline in blocked:
                assert histories.block_timeline(node.data_dir, timeline, "claimed by n2\nepoch 7")
                assert not histories.block_timeline(node.data_dir, timeline, "again")
            assert histories.blocked_timelines(node.data_dir) == dict.fromkeys(blocked, "claimed by n2 epoch 7")
            assert histories.read_histories(node.data_dir) == {}
            conn = await node.connect()
            await node.server.promote(postmaster, conn, deadline_s=10)
            row = await conn.query("select pg_walfile_name(pg_current_wal_lsn())", deadline_s=5)
            assert int(row[0][0][:8], 16) == expected
            conn.close()
            for timeline in blocked:
                assert histories.unblock_timeline(node.data_dir, timeline)
                assert not histories.unblock_timeline(node.data_dir, timeline)
            assert not histories.unblock_timeline(node.data_dir, expected)  # a real history stays
            assert list(histories.read_histories(node.data_dir)) == [expected]
            node.server.stop(postmaster, "immediate")
            await stopped(postmaster, node.data_dir)
    trio.run(main)


def test_single_user_recovery_ends_cleanly_and_refuses_a_standby(make_node):
    async def main():
        a = make_node()
        postmaster = await a.start()
        await a.sql("create table t as select generate_series(1, 1000) as n")
        postmaster.signal(signal.SIGKILL)
        await stopped(postmaster, a.data_dir)
        files.create_standby_signal(a.data_dir)
        with pytest.raises(PostgresError, match=r"standby\.signal"):
            await a.server.single_user_recovery(a.parameters, deadline_s=20)
        files.remove_standby_signal(a.data_dir)
        await a.server.single_user_recovery(a.parameters, deadline_s=20)
        assert (await read_control(a.data_dir, a.server.bin_dir, deadline_s=5)).state == "shut down"
        await a.start()
        assert await a.sql("select count(*) from t") == [("1000",)]
    trio.run(main)


def test_configuration_errors_are_found_without_a_start(make_node):
    async def main():
        a = make_node()
        assert await a.server.configuration_errors(a.parameters, deadline_s=10) == ""
        postmaster = await a.start()
        assert await a.server.configuration_errors(a.parameters, deadline_s=10) == ""
        files.write_postgresql_conf(a.data_dir, {"work_men": "1MB", "my_extension.x": "1"}, {})
        said = await a.server.configuration_errors(a.parameters, deadline_s=10)
        assert 'unrecognized configuration parameter "work_men"' in said
        assert "my_extension" not in said
        files.write_postgresql_conf(a.data_dir, {"work_mem": "1XB"}, {})
        assert "work_mem" in await a.server.configuration_errors(a.parameters, deadline_s=10)
        assert postmaster.alive()
    trio.run(main)
