"""The operator's programs around a promotion and a stop, with real PostgreSQL: asked, waited for, never in the way."""

from __future__ import annotations

import os
import signal
from dataclasses import replace

import pytest
import trio
from act_bed import as_source
from msgspec.structs import replace as but

from pgha.act import Actor
from pgha.errors import OperationFailed
from pgha.model import action as a
from pgha.model.lock import LicenceState
from pgha.postgres.processes import read_postmaster_pid


def told(node):
    events, node.told.events = node.told.events, []
    return events


def test_what_callbacks_are_told_through_two_lives(bed):
    """Each step of a node's life, in order; and the promotion before writes are accepted."""
    async def main():
        async with bed.node("a") as one, bed.node("b") as two:
            await one.primary()
            assert told(one) == ["started primary"]
            await two.standby_of(one)
            assert told(two) == ["started replica"]
            await one.quick(a.ApplyConfiguration(force=True))
            await one.quick(a.ApplyConfiguration())         # nothing to read anew
            assert told(one) == ["reloaded"]
            await two.operate(a.Restart(as_primary=False, timeout_s=10, upstream=as_source(one)))
            assert told(two) == ["restarted replica"]
            await one.operate(a.Demote(mode="fast", release=True, checkpoint=True, why="test", timeout_s=20))
            assert told(one) == ["stopped"]
            await two.quick(a.Freeze(epoch=1))
            await two.take_lock(claim=2)
            recovering = []
            two.told.promoted = lambda: recovering.append(two.standby_signal)    # PostgreSQL removes it when it is promoted
            await two.operate(a.Promote(timeline=2, leaving=1, block=(), epoch=2))
            assert recovering == [True]
            await one.operate(a.StartStandby(upstream=as_source(two)))
            assert told(one) == ["started replica"]
            await two.operate(a.Restart(as_primary=True, timeout_s=10))
            await two.operate(a.Demote(mode="kill", release=True, checkpoint=False, why="test", timeout_s=0))
            await two.operate(a.Demote(mode="kill", release=False, checkpoint=False, why="nothing runs", timeout_s=0))
            await one.operate(a.Stop(why="test", timeout_s=10))
            await one.operate(a.Stop(why="nothing runs", timeout_s=10))
            assert told(two) == ["restarted primary", "stopped"] and told(one) == ["stopped"]
    trio.run(main)


@pytest.mark.parametrize(("command", "agrees", "said"), [
    ("/bin/true", True, "exit code 0"),
    ("/bin/sh -c 'echo the old primary answers; exit 7'", False, "exit code 7: the old primary answers"),
    ("/bin/sleep 1000", False, "had not ended after 0.2 s"),
    ("/no/such/program", False, "cannot start /no/such/program"),
])
def test_pre_promote_answers(bed, command, agrees, said):
    async def main():
        async with bed.node("a", postgresql={"pre_promote": command}) as node:
            facts = await node.operate(a.PrePromote(epoch=3, limit_s=0.2 if "sleep" in command else 30.0))
            assert (facts["epoch"], facts["agrees"]) == (3, agrees) and said in facts["said"]
    trio.run(main)


def test_before_stop_finds_the_server_running_and_its_end_is_waited_for(bed):
    async def main():
        script = "/bin/sh -c 'sleep 0.3; psql -qXAt -h \"$0\" -p \"$1\" -U postgres -c \"INSERT INTO seen VALUES (1)\"; exit 1' {dir} {port}"
        async with bed.node("a") as node:
            await node.primary()
            await node.sql("CREATE TABLE seen (n int)")
            node.local = but(node.local, postgresql=but(node.local.postgresql, before_stop=script.format(dir=node.directory, port=node.port)))
            for action in (a.Restart(as_primary=True, timeout_s=20, before_stop_s=10), a.Restart(as_primary=True, timeout_s=20),
                           a.Demote(mode="fast", release=True, checkpoint=True, why="test", timeout_s=20, before_stop_s=10)):
                await node.operate(action)
            await node.take_lock()
            await node.operate(a.StartPrimary(timeout_s=20))
            assert await node.sql("SELECT count(*) FROM seen") == [("2",)]       # not where none was asked for; its own failure means nothing
            # the emergency: neither asked for nor run, whatever the action says
            took = await node.operate(a.Demote(mode="kill", release=True, checkpoint=False, why="test", timeout_s=0, before_stop_s=10))
            assert "before_stop_s" not in took
            await node.take_lock()
            await node.operate(a.StartPrimary(timeout_s=20))
            assert await node.sql("SELECT count(*) FROM seen") == [("2",)]
    trio.run(main)


class _Renewer:
    """A renewer whose licence has become what it is told."""

    def __init__(self, renewer, licence):
        self._renewer, self._licence = renewer, licence

    def __getattr__(self, name):
        return getattr(self._renewer, name)

    @property
    def licence(self):
        return self._licence()


def test_before_stop_is_not_waited_for_when_there_is_nothing_to_stop_any_more(bed):
    """The postmaster dies meanwhile: the restart goes on at once, and brings it back."""
    async def main():
        async with bed.node("a", postgresql={"before_stop": "/bin/sh -c 'kill -9 $(head -1 \"$0\"); sleep 1000' " + str(bed.path / "a/data/postmaster.pid")}) as node:
            await node.primary()
            assert node.data_dir == bed.path / "a/data"
            with trio.fail_after(30):
                await node.operate(a.Restart(as_primary=True, timeout_s=20, before_stop_s=1000))
            assert await node.sql("SELECT pg_is_in_recovery()") == [("f",)]
    trio.run(main)


def test_before_stop_is_not_waited_for_while_a_primary_hangs(bed):
    """A restart ends there, for the next pass to hand over; a demotion goes on."""
    async def main():
        async with bed.node("a", postgresql={"before_stop": "/bin/sleep 1000"}) as node:
            await node.primary()
            limit_s = node.wanted.effective().settings.primary_hang_timeout_s
            hung = Actor(replace(node.ctx, silent_s=lambda: limit_s))
            with trio.fail_after(30):
                with pytest.raises(OperationFailed, match="no sign of life"):
                    await hung.operate(a.Restart(as_primary=True, timeout_s=20, before_stop_s=1000), node.progress.append)
                assert await node.sql("SELECT pg_is_in_recovery()") == [("f",)] and node.progress[-2:] == ["before_stop", "stopping PostgreSQL"]
                await hung.operate(a.Demote(mode="fast", release=True, checkpoint=True, why="test", timeout_s=20, before_stop_s=1000), node.progress.append)
            assert not node.living()
    trio.run(main)


@pytest.mark.parametrize("why", ["its limit", "the licence ends", "the lock is lost", "the server dies"])
def test_a_before_stop_that_hangs_delays_no_demotion(bed, why):
    """It ignores SIGTERM, too: the stop begins while it is being ended."""
    async def main():
        async with bed.node("a", postgresql={"before_stop": "/bin/sh -c 'trap : TERM; while :; do sleep 1000; done'"}) as node:
            await node.primary()
            began_s = trio.current_time()

            def licence():
                held = node.renewer.licence
                if trio.current_time() < began_s + 0.5 or why in ("its limit", "the server dies"):
                    return held
                if why == "the lock is lost":
                    return but(held, state=LicenceState.LOST)
                return but(held, since=node.clock.now().plus_s(-30), valid_until=node.clock.now().plus_s(10))     # less than what a demotion needs

            ctx = replace(node.ctx, renewer=_Renewer(node.renewer, licence))
            limit_s = 0.5 if why == "its limit" else 60

            async def server_dies():
                await trio.sleep(0.5)
                os.kill(read_postmaster_pid(node.data_dir).pid, signal.SIGKILL)

            async with trio.open_nursery() as nursery:
                if why == "the server dies":
                    nursery.start_soon(server_dies)
                took = await Actor(ctx).operate(a.Demote(mode="fast", release=False, checkpoint=True, why="test", timeout_s=20, before_stop_s=limit_s), node.progress.append)
            assert 0.4 < took["before_stop_s"] < 1.45, took      # its grace alone would be a second more
            assert not node.living()
    trio.run(main)
