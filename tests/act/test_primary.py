"""Becoming, being and ceasing to be primary: never without the licence, never half-way."""

from __future__ import annotations

import os
import signal
from dataclasses import replace

import pytest
import trio
from act_bed import as_source
from test_bootstrap_clone import cancelled_at

from pgha.act import Actor
from pgha.clock import remaining_s
from pgha.errors import CommandFailed, GuardError, OperationFailed, PostgresError, Refused
from pgha.lock import recipe
from pgha.model import action as a
from pgha.model.lock import LicenceState
from pgha.postgres import histories
from pgha.postgres.processes import read_postmaster_pid


def postmaster_pid(node):
    return read_postmaster_pid(node.data_dir).pid


async def writer(node, acknowledged, *, task_status=trio.TASK_STATUS_IGNORED):
    """Insert rows one by one; the last number acknowledged is in `acknowledged[0]`."""
    from pgha.postgres.connection import Connection
    try:
        conn = await Connection.connect({"host": str(node.directory), "port": node.port, "user": "postgres", "dbname": "postgres"}, deadline_s=5)
        task_status.started()
        while True:
            await conn.query(f"INSERT INTO w VALUES ({acknowledged[0] + 1})", deadline_s=5)
            acknowledged[0] += 1
    except PostgresError:
        pass


def test_no_start_as_primary_without_the_lock(bed):
    async def main():
        async with bed.node("a") as node:
            await node.operate(a.Bootstrap())
            with pytest.raises(GuardError, match="no licence"):
                await node.operate(a.StartPrimary(timeout_s=10))
            assert not node.living() and node.standby_signal and await node.guard_state() == "standby"
    trio.run(main)


class _ArmsOnce:
    """A fence whose licence ends between the first question and the second, as when the disk hangs in between."""

    def __init__(self, fence):
        self._fence = fence
        self._asked = 0

    def __getattr__(self, name):
        return getattr(self._fence, name)

    async def armed(self):
        self._asked += 1
        if self._asked > 1:
            raise GuardError("the licence ends too soon")
        await self._fence.armed()


def test_no_start_as_primary_under_what_was_armed_before_the_disk_took_its_time(bed):
    async def main():
        async with bed.node("a") as node:
            made = await node.operate(a.Bootstrap())
            await node.take_lock(initialize_revision=made["initialize_revision"], initialize_value=made["system_identifier"])
            slow = Actor(replace(node.ctx, fence=_ArmsOnce(node.fence)))
            with pytest.raises(GuardError, match="too soon"):
                await slow.operate(a.StartPrimary(timeout_s=10), node.progress.append)
            assert not node.living() and node.standby_signal
    trio.run(main)


@pytest.mark.parametrize("word", ["starting as primary"])
def test_cancelled_start_as_primary_leaves_a_standby_at_rest(bed, word):
    async def main():
        async with bed.node("a") as node:
            made = await node.operate(a.Bootstrap())
            await node.take_lock(initialize_revision=made["initialize_revision"], initialize_value=made["system_identifier"])
            await cancelled_at(node, a.StartPrimary(timeout_s=10), word)
            assert not node.living() and node.standby_signal
            await node.operate(a.StartPrimary(timeout_s=10))
            await node.until(lambda: node.observer.facts.is_primary)
    trio.run(main)


def test_start_that_cannot_succeed_says_why_and_leaves_a_standby_at_rest(bed):
    async def main():
        async with bed.node("a") as node:
            made = await node.operate(a.Bootstrap())
            await node.take_lock(initialize_revision=made["initialize_revision"], initialize_value=made["system_identifier"])
            with (node.data_dir / "postgresql.base.conf").open("a") as f:
                f.write("no_such_setting_at_all = 1\n")
            with pytest.raises(CommandFailed, match="no_such_setting_at_all"):
                await node.operate(a.StartPrimary(timeout_s=10))
            assert not node.living() and node.standby_signal
    trio.run(main)


def test_promotion_needs_the_claimed_timeline(bed):
    async def main():
        async with bed.node("a") as one, bed.node("b") as two:
            await one.primary()
            await two.standby_of(one)
            await one.operate(a.Demote(mode="fast", release=True, checkpoint=True, why="test", timeout_s=20))
            await two.quick(a.Freeze(epoch=1))
            with pytest.raises(GuardError, match="no licence"):
                await two.operate(a.Promote(timeline=2, leaving=1, block=(), epoch=2))
            assert (await two.sql("SELECT pg_is_in_recovery()")) == [("t",)]
            await two.take_lock(claim=3)
            with pytest.raises(OperationFailed, match="promoted to timeline 2, but 3 was claimed"):
                await two.operate(a.Promote(timeline=3, leaving=1, block=(), epoch=2))
            assert not two.living() and two.standby_signal
    trio.run(main)


def test_cancelled_promotion_is_given_up_whole(bed):
    async def main():
        async with bed.node("a") as one, bed.node("b") as two:
            await one.primary()
            await two.standby_of(one)
            await one.operate(a.Demote(mode="fast", release=True, checkpoint=False, why="test", timeout_s=20))
            histories.block_timeline(two.data_dir, 2, "of an earlier claim")
            with pytest.raises(GuardError, match="no licence"):
                await two.operate(a.Promote(timeline=4, leaving=1, block=(2, 3), epoch=2))
            assert list(histories.blocked_timelines(two.data_dir)) == [2], "not its own to free"
            histories.unblock_all(two.data_dir)
            await two.take_lock(claim=4)
            await cancelled_at(two, a.Promote(timeline=4, leaving=1, block=(2, 3), epoch=2), "blocking")
            assert (await two.sql("SELECT pg_is_in_recovery()")) == [("t",)] and two.standby_signal
            assert not histories.blocked_timelines(two.data_dir)
            await cancelled_at(two, a.Promote(timeline=4, leaving=1, block=(2, 3), epoch=2), "promoting")
            assert not two.living() and two.standby_signal and not histories.blocked_timelines(two.data_dir)
    trio.run(main)


@pytest.mark.parametrize("mode", ["fast", "kill"])
def test_demotion_ends_writes_and_releases_what_was_reached(bed, mode):
    async def main():
        async with bed.node("a") as node:
            await node.primary()
            await node.sql("CREATE TABLE w (n int)")
            acknowledged = [0]
            async with trio.open_nursery() as nursery:
                await nursery.start(writer, node, acknowledged)
                while acknowledged[0] < 100:
                    await trio.sleep(0.005)
                facts = await node.operate(a.Demote(mode=mode, release=True, checkpoint=mode == "fast", why="test", timeout_s=20))
            assert facts["released"] and facts["clean"] == (mode == "fast")
            assert not node.living() and node.standby_signal and await node.guard_state() == "standby"
            assert node.renewer.licence.state is LicenceState.NONE
            lock = (await node.view()).lock
            assert (lock.mode, lock.lsn, lock.timeline) == ("released", facts["lsn"], 1)
            if mode == "kill":
                inspected = await node.operate(a.InspectEndOfWal())
                assert inspected["end_of_wal"] == facts["lsn"] and inspected["state"] == "in production"
            await node.take_lock(claim=2)
            await node.operate(a.StartPrimary(timeout_s=20))
            assert int((await node.sql("SELECT count(*) FROM w"))[0][0]) >= acknowledged[0] >= 100
    trio.run(main)


def test_release_is_refused_while_anything_lives(bed):
    async def main():
        async with bed.node("a") as node:
            await node.primary()
            with pytest.raises(OperationFailed, match="not released while"):
                await node.quick(a.ReleaseLock(lsn=1, timeline=1, why="test"))
            assert node.renewer.licence.state is LicenceState.HELD
    trio.run(main)


def test_a_lock_is_given_back_without_a_demotion_only_after_the_guard_was_told(bed):
    """In pause: the guard sees for itself that nothing writes here."""
    async def main():
        async with bed.node("a") as node:
            await node.primary()
            with pytest.raises(GuardError):
                await node.quick(a.StandDown(lsn=1, timeline=1, why="test"))
            assert node.renewer.licence.state is LicenceState.HELD and (await node.view()).lock.mode == "held"
            recipe.wait_gone(recipe.kill_all(node.procs), 5)
            await node.quick(a.StandDown(lsn=1, timeline=1, why="test"))
            assert (await node.view()).lock.mode == "released" and await node.guard_state() == "standby"
    trio.run(main)


def test_nothing_is_started_beside_what_lives(bed):
    async def main():
        async with bed.node("a") as node:
            await node.primary()
            before = postmaster_pid(node)
            for action in (a.StartStandby(upstream=None), a.StartPrimary(timeout_s=5)):
                with pytest.raises(OperationFailed, match=f"processes of .* live: .*{before}"):
                    await node.operate(action)
            assert postmaster_pid(node) == before and await node.guard_state() == "armed"
    trio.run(main)


def test_killed_postmaster_is_noticed_and_its_orphans_with_it_and_started_in_place(bed):
    async def main():
        async with bed.node("a") as node:
            await node.primary()
            await node.sql("CREATE TABLE w (n int)")
            await node.until(lambda: node.observer.facts.is_primary)
            acknowledged = [0]
            async with trio.open_nursery() as nursery:
                await nursery.start(writer, node, acknowledged)
                while acknowledged[0] < 50:
                    await trio.sleep(0.005)
                pid, began_s = postmaster_pid(node), trio.current_time()
                os.kill(pid, signal.SIGKILL)
                with trio.fail_after(2):
                    while node.observer.facts.process != "absent":
                        await trio.sleep(0.001)
                noticed_s = trio.current_time() - began_s
            at_death = acknowledged[0]
            assert noticed_s < 0.2
            await node.operate(a.Sweep())
            assert not node.living()
            facts = await node.operate(a.StartPrimary(timeout_s=20))
            print("noticed", noticed_s, "start", facts)
            rows = await node.sql("SELECT count(*), substr(pg_walfile_name(pg_current_wal_lsn()), 1, 8) FROM w")
            assert int(rows[0][0]) >= at_death and rows[0][1] == "00000001"
            await node.until(lambda: node.observer.facts.is_primary and node.observer.facts.pid == postmaster_pid(node))
            with pytest.raises(OperationFailed, match="nothing to sweep"):
                await node.operate(a.Sweep())
    trio.run(main)


def test_restart_keeps_role_lock_and_timeline(bed):
    async def main():
        async with bed.node("a") as one, bed.node("b") as two:
            await one.primary()
            await two.standby_of(one)
            for node, action in ((one, a.Restart(as_primary=True, timeout_s=20)),
                                 (two, a.Restart(as_primary=False, timeout_s=20, upstream=as_source(one)))):
                before = postmaster_pid(node)
                await node.operate(action)
                assert postmaster_pid(node) != before and node.standby_signal
            await two.until(two.streaming)
            assert one.renewer.licence.state is LicenceState.HELD
            assert await one.guard_state() == "armed" and await two.guard_state() == "standby"
    trio.run(main)


def test_hung_postgres_is_killed_at_the_end_of_its_time(bed):
    async def main():
        async with bed.node("a") as node:
            await node.primary()
            os.kill(postmaster_pid(node), signal.SIGSTOP)
            began_s = trio.current_time()
            facts = await node.operate(a.Demote(mode="fast", release=True, checkpoint=True, why="test", timeout_s=0.5))
            assert facts["killed"] and not facts["clean"] and facts["released"] and not node.living()
            assert trio.current_time() - began_s < 8     # 4 s for a connection to checkpoint by, 0.5 s for the stop; the rest is the machine's
    trio.run(main)


def test_guarded_writes_say_when_they_were_decided_on_an_old_view(bed):
    async def main():
        async with bed.node("a") as node:
            await node.primary()
            view = await node.view()
            epoch = view.revision_of("pgha/epoch")
            await node.quick(a.WriteKey(key="status", value=b'{"optime":1}', if_revision=0, epoch_revision=epoch))
            with pytest.raises(Refused, match="status"):
                await node.quick(a.WriteKey(key="status", value=b'{"optime":2}', if_revision=0, epoch_revision=epoch))
            revision = (await node.view()).revision_of("status")
            with pytest.raises(Refused):
                await node.quick(a.WriteKey(key="status", value=b'{"optime":2}', if_revision=revision, epoch_revision=epoch + 99))
            with pytest.raises(Refused):        # it says so already, but from before: no write of ours whose answer was lost
                await node.quick(a.WriteKey(key="status", value=b'{"optime":1}', if_revision=revision, epoch_revision=epoch + 99))
            await node.quick(a.WriteKey(key="status", value=None, if_revision=revision, epoch_revision=epoch))
            assert (await node.view()).revision_of("status") == 0
            with pytest.raises(Refused):
                await node.quick(a.WriteInitialize(value="7711477732947946758", if_revision=0))
    trio.run(main)


def test_the_armed_port_is_asked_with_what_is_left_of_the_licence(bed):
    """The guard's own state is what counts: after the fence a start is impossible until a newer licence."""
    async def main():
        async with bed.node("a") as node:
            await node.primary()
            assert remaining_s((await node.guard.status()).fence_at, node.clock.now()) > 20
            await node.guard.fence_now()
            with trio.fail_after(5):
                while node.living():
                    await trio.sleep(0.01)
            assert await node.guard_state() == "latched"
            with pytest.raises(GuardError):
                await node.operate(a.StartPrimary(timeout_s=5))
            assert not node.living() and node.standby_signal
            assert not recipe.processes_of(node.procs)
    trio.run(main)


def test_shutdown_does_not_wait_for_an_archive_that_hangs(bed):
    async def main():
        async with bed.node("a", parameters={"archive_mode": "on", "archive_command": "sleep 60"}) as node:
            await node.primary()
            await node.sql("SELECT pg_switch_wal()")
            facts = await node.operate(a.Demote(mode="fast", release=True, checkpoint=True, why="test", timeout_s=30))
            assert facts["clean"] and facts["released"] and facts["stop_s"] < 6
            # the published position is that of the switch before the shutdown checkpoint (compatibility spec 1.4)
            assert facts["lsn"] < (await node.control()).checkpoint_lsn
    trio.run(main)
