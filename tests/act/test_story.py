"""A cluster's life, operation by operation: made, cloned, handed over, taken back."""

from __future__ import annotations

import trio
from act_bed import as_source

from pgha.model import action as a
from pgha.postgres import histories


def test_from_nothing_to_a_switchover_and_back(bed):
    async def story():
        async with bed.node("a") as one, bed.node("b") as two:
            identifier = await one.primary()
            view = await one.view()
            assert view.initialize == identifier and view.config == one.dynamic and view.lock.holder == "a"
            assert one.standby_signal and await one.guard_state() == "armed"
            await one.sql("CREATE TABLE t (n int); INSERT INTO t SELECT generate_series(1, 1000)")
            await two.standby_of(one)
            assert await two.guard_state() == "standby" and two.standby_signal
            assert any("of" in p for p in two.progress)

            facts = await one.operate(a.Demote(mode="fast", release=True, checkpoint=True, why="switchover", timeout_s=30))
            print("demote", facts)
            assert facts["clean"] and facts["released"] and not one.living() and one.standby_signal
            lock = (await one.view()).lock
            assert lock.mode == "released" and lock.lsn == facts["lsn"] and lock.timeline == 1
            assert await one.guard_state() == "standby"

            await two.quick(a.Freeze(epoch=1))
            await two.until(lambda: two.observer.facts.row.receiver is None)
            assert two.observer.facts.row.position >= facts["lsn"]
            await two.take_lock(claim=5)
            facts = await two.operate(a.Promote(timeline=5, leaving=1, block=(2, 3, 4), epoch=2))
            print("promote", facts)
            assert facts["timeline"] == 5 and two.standby_signal and await two.guard_state() == "armed"
            assert set(histories.blocked_timelines(two.data_dir)) == {2, 3, 4}
            claim = histories.read_history(two.data_dir, 5).rows[-1].claim
            assert claim.startswith("timeline 5, epoch 2, ") and claim.endswith(" by b"), claim
            assert not (two.data_dir / "pg_wal" / "00000001.history").exists()
            await two.sql("INSERT INTO t VALUES (0)")
            assert await two.actor.checkpoint()

            histories.block_timeline(one.data_dir, 5, "of a promotion that was killed")      # it would hide the real one
            await one.operate(a.StartStandby(upstream=as_source(two)))
            await one.until(one.streaming)
            await one.until(lambda: one.observer.facts.row.timeline == 5)
            assert set(histories.blocked_timelines(one.data_dir)) == {2, 3, 4}     # fetched from the new primary
            assert histories.read_history(one.data_dir, 5).rows[-1].claim == claim
            assert await one.guard_state() == "standby"
            with trio.fail_after(5):
                while (await one.sql("SELECT count(*) FROM t"))[0][0] != "1001":
                    await trio.sleep(0.02)

    trio.run(story)
