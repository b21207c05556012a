"""The real renewer on a store in memory, in virtual time: what it sends when, and what it believes of what comes back."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable

import pytest
import trio
from lock_world import Node, TrioClock, delete, epoch_of, others_record, run, write
from msgspec.structs import replace

from pgha.clock import remaining_s
from pgha.dcs.keys import EPOCH, LOCK
from pgha.dcs.memory import MemoryWorld
from pgha.errors import DcsRefused, DcsUnreachable, Refused
from pgha.lock.renewer import Timing
from pgha.model.decision import Mandate
from pgha.model.lock import Epoch, Licence, LicenceState, LockRecord

#: Enough for whatever is due at once.
SOON_S = 0.01


def left_s(node: Node) -> float:
    until = node.licence.valid_until
    return 0.0 if until is None else remaining_s(until, node.clock.now())


def story(steps: Callable[[Node], Awaitable[None]], *, ttl_s: float = 30.0, loop_wait_s: float = 10.0) -> None:
    """`steps` with a running renewer that has taken the lock of a fresh cluster and has a mandate without end."""
    async def main() -> None:
        async with alone(ttl_s=ttl_s, loop_wait_s=loop_wait_s) as node:
            await node.renewer.acquire(node.take(), deadline_s=2)
            node.mandate()
            await steps(node)
    run(main)


class alone:
    """A node whose renewer runs, on a store of its own."""

    def __init__(self, **options) -> None:
        self._options = options

    async def __aenter__(self) -> Node:
        self._nursery = trio.open_nursery()
        nursery = await self._nursery.__aenter__()
        self._scope = nursery.cancel_scope
        node = Node(MemoryWorld(TrioClock()), **self._options)
        await nursery.start(node.renewer.run)
        return node

    async def __aexit__(self, *error) -> bool | None:
        self._scope.cancel()
        return await self._nursery.__aexit__(*error)


# --- taking --------------------------------------------------------------------------------------------------------------

def test_a_take_over_writes_lock_epoch_and_leader_together():
    async def steps(node: Node) -> None:
        assert (node.licence.state, node.licence.sequence, node.licence.epoch) == (LicenceState.HELD, 1, 1)
        assert node.record == LockRecord(holder="a", node_id="id-a", incarnation="run-a-1", sequence=1, ttl_s=30.0, lsn=100, timeline=1)
        assert epoch_of(node.world) == Epoch(number=1, holder="a", incarnation="run-a-1", timeline=2)
        assert node.entry("leader").value == b"a"
        assert node.entry(LOCK).revision == node.entry(EPOCH).revision == node.licence.revision == node.licence.epoch_revision
        assert left_s(node) == pytest.approx(29.7)
    story(steps)


def test_a_readoption_leaves_the_epoch_and_needs_no_expiry():
    async def steps(node: Node) -> None:
        again = Node(node.world, run_of="2")
        epoch = node.entry(EPOCH)
        await again.renewer.acquire(again.take(readopt=True), deadline_s=2)
        assert node.entry(EPOCH) == epoch
        assert (again.licence.epoch, again.licence.epoch_revision) == (1, epoch.revision)
        assert node.record.incarnation == "run-a-2"
    story(steps)


def test_the_pass_of_the_acquisition_is_noted():
    async def main() -> None:
        async with alone() as node:
            node.mandate()
            node.mandate()
            await node.renewer.acquire(node.take(), deadline_s=2)
            assert node.licence.acquired_pass == 2
            await trio.sleep(25)
            assert (node.licence.sequence, node.licence.acquired_pass) == (3, 2)
    run(main)


@pytest.mark.parametrize("key", [LOCK, EPOCH, "sync", "failsafe", "config"])
def test_a_take_over_compares_all_that_it_was_judged_on(key):
    async def main() -> None:
        async with alone() as node:
            write(node.world, LOCK, others_record())
            action = replace(node.take(), also_unchanged={"sync": 0, "failsafe": 0, "config": 0})
            write(node.world, key, others_record("y") if key == LOCK else b"{}")
            with pytest.raises(Refused):
                await node.renewer.acquire(action, deadline_s=2)
            assert node.licence.state is LicenceState.NONE
            assert node.record.holder == ("y" if key == LOCK else "z")
    run(main)


def test_a_take_over_compares_the_value_too():
    """A restored store may show another record at the very revision that was judged."""
    async def main() -> None:
        async with alone() as node:
            write(node.world, LOCK, others_record())
            with pytest.raises(Refused):
                await node.renewer.acquire(replace(node.take(), lock_value=b"another"), deadline_s=2)
    run(main)


def test_the_last_write_of_a_bootstrap_is_one_transaction():
    async def main() -> None:
        async with alone() as node:
            write(node.world, "initialize", b"")
            action = replace(node.take(), initialize_revision=node.entry("initialize").revision, initialize_value="7" * 19)
            await node.renewer.acquire(action, deadline_s=2, config=b'{"ttl":30}')
            assert node.entry("initialize").value == b"7" * 19
            assert node.entry("config").value == b'{"ttl":30}'
            assert {node.entry(key).revision for key in (LOCK, EPOCH, "leader", "initialize", "config")} == {node.licence.revision}
    run(main)


@pytest.mark.parametrize("now", [b"", b"8" * 19])
def test_a_bootstrap_whose_claim_is_gone_ends_without_a_lock(now):
    """Its lease ran out, and another node bootstraps, or has."""
    async def main() -> None:
        async with alone() as node:
            write(node.world, "initialize", b"")
            action = replace(node.take(), initialize_revision=node.entry("initialize").revision, initialize_value="7" * 19)
            write(node.world, "initialize", now)
            with pytest.raises(Refused):
                await node.renewer.acquire(action, deadline_s=2, config=b"{}")
            assert (node.record, node.entry("initialize").value, node.entry("config")) == (None, now, None)
    run(main)


def test_who_holds_the_lock_takes_no_other():
    async def steps(node: Node) -> None:
        with pytest.raises(Refused):
            await node.renewer.acquire(node.take(), deadline_s=2)
        assert node.licence.state is LicenceState.HELD
    story(steps)


def test_a_take_over_whose_answer_is_lost_settles_as_won_from_its_first_send():
    async def main() -> None:
        async with alone() as node:
            write(node.world, LOCK, others_record())
            node.store.lose_answers = 1
            began = trio.current_time()
            with pytest.raises(DcsUnreachable):
                await node.renewer.acquire(node.take(), deadline_s=2)
            assert (node.licence.state, node.licence.valid_until) == (LicenceState.ACQUIRING, None)
            node.mandate()
            await trio.sleep(0.3)
            assert node.licence.state is LicenceState.HELD
            assert left_s(node) == pytest.approx(29.7 - (trio.current_time() - began))
            assert (node.licence.epoch, node.licence.epoch_revision) == (1, node.entry(EPOCH).revision)
            assert len(node.store.writes) == 1
    run(main)


def test_a_take_over_that_came_too_late_settles_as_not_won():
    async def main() -> None:
        async with alone() as node:
            write(node.world, LOCK, others_record())
            node.store.lose_requests = 1
            with pytest.raises(DcsUnreachable):
                await node.renewer.acquire(node.take(), deadline_s=2)
            write(node.world, LOCK, others_record("y"))
            node.mandate()
            await trio.sleep(0.3)
            assert node.licence.state is LicenceState.NONE
            assert node.record.holder == "y"
    run(main)


def test_a_take_over_is_not_believed_while_it_may_still_arrive():
    async def main() -> None:
        async with alone() as node:
            write(node.world, LOCK, others_record())
            node.store.lose_requests = 1
            with pytest.raises(DcsUnreachable):
                await node.renewer.acquire(node.take(), deadline_s=2)
            await trio.sleep(1)
            assert node.licence.valid_until is None
    run(main)


def test_a_take_over_that_arrives_late_is_not_given_up_before():
    """Given up at once, its record would stand for nobody, and this node would wait for its own."""
    async def main() -> None:
        async with alone() as node:
            node.store.lose_requests = 1
            begun = node.clock.now()
            with pytest.raises(DcsUnreachable):
                await node.renewer.acquire(node.take(), deadline_s=0.5)
            await trio.sleep(0.3)
            assert node.licence.state is LicenceState.ACQUIRING
            write(node.world, LOCK, node.store.writes[0][1])
            await trio.sleep(0.3)
            assert (node.licence.state, node.licence.valid_until) == (LicenceState.HELD, begun.plus_s(29.7))
    run(main)


def test_what_the_store_takes_to_answer_is_no_part_of_the_licence():
    """Validity counts from before the first byte."""
    async def main() -> None:
        async with alone() as node:
            node.store.delay_s = 0.3
            begun = node.clock.now()
            await node.renewer.acquire(node.take(), deadline_s=2)
            assert node.licence.valid_until == begun.plus_s(29.7)
            node.mandate()
            await trio.sleep(11)
            assert node.licence.sequence == 2
            assert left_s(node) == pytest.approx(29.7 - (trio.current_time() - node.store.writes[1][0]))
    run(main)


def test_a_take_over_whose_answer_is_lost_settles_at_once_without_another_word():
    async def main() -> None:
        async with alone() as node:
            write(node.world, LOCK, others_record())
            await trio.sleep(1)
            node.store.lose_answers = 1
            with pytest.raises(DcsUnreachable):
                await node.renewer.acquire(node.take(), deadline_s=2)
            await trio.sleep(1)
            assert node.licence.state is LicenceState.HELD
    run(main)


@pytest.mark.parametrize("why", ["lost", "no space"])
def test_a_take_over_that_never_arrived_is_given_up_or_sent_again(why):
    async def main() -> None:
        async with alone() as node:
            write(node.world, LOCK, others_record())
            if why == "lost":
                node.store.lose_requests = 1
            else:
                node.store.refuse = DcsRefused("mvcc: database space exceeded", no_space=True)
            with pytest.raises((DcsUnreachable, DcsRefused)):
                await node.renewer.acquire(node.take(), deadline_s=2)
            node.store.refuse = None
            node.mandate()
            await trio.sleep(60)
            assert node.licence.state is not LicenceState.ACQUIRING
    run(main)


@pytest.mark.parametrize("seed", range(40))
def test_of_two_candidates_on_one_expired_record_exactly_one_wins(seed):
    """With requests and answers late and lost in every combination."""
    async def main() -> None:
        chance = random.Random(seed)
        world = MemoryWorld(TrioClock())
        write(world, LOCK, others_record())
        nodes = [Node(world, name) for name in "ab"]

        async def stand(node: Node) -> None:
            node.store.delay_s = chance.choice([0.0, 0.0, 0.2, 0.5])
            node.store.lose_answers = chance.choice([0, 0, 1])
            node.store.lose_requests = chance.choice([0, 0, 0, 1])
            action = node.take()
            await trio.sleep(chance.random() * 0.3)
            try:
                await node.renewer.acquire(action, deadline_s=1)
            except (Refused, DcsUnreachable):
                pass
            node.mandate()

        async with trio.open_nursery() as nursery:
            for node in nodes:
                await nursery.start(node.renewer.run)
            async with trio.open_nursery() as race:
                for node in nodes:
                    race.start_soon(stand, node)
            await trio.sleep(2)
            holders = [node.renewer.me.name for node in nodes if node.licence.state is LicenceState.HELD]
            stored = node.record.holder
            assert holders == ([stored] if stored != "z" else []), (holders, stored)
            assert epoch_of(world).holder == ("" if stored == "z" else stored)
            nursery.cancel_scope.cancel()
    run(main)


# --- renewing ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("ttl_s, loop_wait_s, every_s", [(30.0, 10.0, 10.0), (30.0, 2.0, 2.0), (6.0, 10.0, 2.0)])
def test_renewals_go_out_every_loop_wait_or_third_of_the_ttl(ttl_s, loop_wait_s, every_s):
    async def steps(node: Node) -> None:
        await trio.sleep(5 * every_s + SOON_S)
        times = [when for when, _ in node.store.writes]
        assert [b - a for a, b in zip(times, times[1:], strict=False)] == pytest.approx([every_s] * 5, abs=0.01)
        assert [r.sequence for _, r in node.store.writes] == [1, 2, 3, 4, 5, 6]
        assert left_s(node) == pytest.approx(ttl_s * 0.99, abs=0.02)
    story(steps, ttl_s=ttl_s, loop_wait_s=loop_wait_s)


def test_what_was_taken_or_adopted_with_a_position_keeps_it_until_a_server_answers():
    async def steps(node: Node) -> None:
        await trio.sleep(11)
        assert (node.record.sequence, node.record.lsn, node.record.timeline) == (2, 100, 1)
    story(steps)


def test_the_position_goes_into_the_record():
    async def steps(node: Node) -> None:
        node.renewer.position = (12345, 7)
        await trio.sleep(10.1)
        assert (node.record.lsn, node.record.timeline) == (12345, 7)
    story(steps)


def test_a_renewal_whose_answer_was_lost_is_recognised_and_counts_from_its_first_send():
    async def steps(node: Node) -> None:
        await trio.sleep(9.9)
        node.store.lose_answers = 1
        await trio.sleep(0.2)
        first = node.store.writes[-1][0]
        await trio.sleep(5)
        assert [r.sequence for _, r in node.store.writes] == [1, 2, 2]
        assert (node.licence.state, node.licence.sequence) == (LicenceState.HELD, 2)
        assert left_s(node) == pytest.approx(29.7 - (trio.current_time() - first))
        assert node.licence.failing_since is None
    story(steps)


def test_a_silent_store_leaves_the_deadline_where_it_was_and_nothing_is_renewed_after_it():
    async def steps(node: Node) -> None:
        until = node.licence.valid_until
        node.store.link(up=False)
        await trio.sleep(29)
        assert (node.licence.state, node.licence.valid_until) == (LicenceState.HELD, until)
        assert node.licence.failing_since is not None
        await trio.sleep(1)
        sent = len(node.store.writes)
        node.store.link(up=True)
        await trio.sleep(30)
        assert len(node.store.writes) == sent
        assert left_s(node) < 0
    story(steps)


def test_a_store_that_answers_again_in_time_costs_nothing():
    async def steps(node: Node) -> None:
        node.store.link(up=False)
        await trio.sleep(25)
        node.store.link(up=True)
        await trio.sleep(2)
        assert left_s(node) > 14
        assert node.licence.failing_since is None
        await trio.sleep(60)
        assert left_s(node) > 19
    story(steps)


def test_no_space_is_unknown_not_lost():
    async def steps(node: Node) -> None:
        node.store.refuse = DcsRefused("mvcc: database space exceeded", code=8, no_space=True)
        await trio.sleep(15)
        assert node.licence.state is LicenceState.HELD
        assert "out of space" in node.licence.failing_why
        assert left_s(node) == pytest.approx(14.7, abs=0.01)
        assert len(node.store.writes) < 30, "tried again without a pause"
        node.store.refuse = None
        await trio.sleep(1)
        assert left_s(node) > 20
    story(steps)


def test_anothers_record_is_lost_at_once():
    async def steps(node: Node) -> None:
        write(node.world, LOCK, others_record())
        await trio.sleep(10 + SOON_S)
        assert (node.licence.state, node.licence.lost_to, node.licence.valid_until) == (LicenceState.LOST, "z", None)
        await trio.sleep(60)
        assert node.record.holder == "z"
    story(steps)


@pytest.mark.parametrize("who", [{"incarnation": "run-a-0"}, {"node_id": "id-x"}, {"sequence": 99}, {"lsn": 4}])
def test_a_record_under_the_own_name_that_was_not_sent_by_this_process_is_anothers(who):
    async def steps(node: Node) -> None:
        write(node.world, LOCK, replace(node.record, **who))
        await trio.sleep(10 + SOON_S)
        assert node.licence.state is LicenceState.LOST
    story(steps)


def test_garbage_in_place_of_the_record_is_lost():
    async def steps(node: Node) -> None:
        write(node.world, LOCK, b"\x00")
        await trio.sleep(10 + SOON_S)
        assert (node.licence.state, node.licence.lost_to) == (LicenceState.LOST, "unknown")
    story(steps)


def test_an_absent_record_is_created_again_while_the_licence_is_valid():
    async def steps(node: Node) -> None:
        await trio.sleep(1)
        delete(node.world, LOCK)
        await trio.sleep(10)
        assert node.record is not None
        assert (node.record.holder, node.record.sequence) == ("a", 2)
        assert node.licence.state is LicenceState.HELD
        await trio.sleep(60)
        assert left_s(node) > 19
    story(steps)


def test_an_epoch_that_somebody_deleted_is_written_again_by_a_renewal():
    """Without it no leader's write ever succeeds again (simulation: ten refused writes a second, for ever)."""
    async def steps(node: Node) -> None:
        await trio.sleep(1)
        delete(node.world, EPOCH)
        await trio.sleep(25)
        assert (epoch_of(node.world).number, epoch_of(node.world).holder) == (1, "a")
        assert node.licence.epoch_revision == node.entry(EPOCH).revision
        assert node.licence.state is LicenceState.HELD
    story(steps)


def test_a_leader_key_that_somebody_deleted_is_written_again_by_a_renewal():
    """No lease is on it, so nothing else would: tools would show no leader, and a member of another make find it free."""
    async def steps(node: Node) -> None:
        await trio.sleep(1)
        delete(node.world, "leader")
        await trio.sleep(25)
        assert (node.entry("leader").value, node.entry("leader").lease) == (b"a", 0)
        assert node.licence.state is LicenceState.HELD
    story(steps)


def test_a_leader_key_that_somebody_else_wrote_meanwhile_is_left_and_costs_no_licence():
    async def steps(node: Node) -> None:
        await trio.sleep(1)
        delete(node.world, "leader")
        await trio.sleep(12)        # one renewal has seen it

        async def write_it() -> None:
            node.store.before_write = None
            write(node.world, "leader", b"z")

        node.store.before_write = write_it
        await trio.sleep(25)
        assert node.entry("leader").value == b"z"
        assert (node.licence.state, node.licence.failing_since) == (LicenceState.HELD, None)
        assert left_s(node) > 15
    story(steps)


def test_a_lost_store_gets_lock_leader_and_epoch_again():
    async def steps(node: Node) -> None:
        await trio.sleep(1)
        node.world.restore(None, cluster_id="another")
        await trio.sleep(10)
        assert node.record.holder == "a"
        assert node.entry("leader").value == b"a"
        assert (epoch_of(node.world).number, epoch_of(node.world).holder) == (1, "a")
        assert node.licence.epoch_revision == node.entry(EPOCH).revision
        await trio.sleep(60)
        assert left_s(node) > 19
    story(steps)


def test_a_record_created_again_whose_answer_was_lost_is_recognised():
    async def steps(node: Node) -> None:
        await trio.sleep(9.9)
        node.world.restore(None)
        writes = 0

        async def lose_the_second() -> None:
            nonlocal writes
            writes += 1
            if writes == 2:      # the first is the renewal, the second creates
                node.store.lose_answers = 1

        node.store.before_write = lose_the_second
        await trio.sleep(5)
        assert (node.licence.state, node.licence.failing_since) == (LicenceState.HELD, None)
        assert node.licence.epoch_revision == node.entry(EPOCH).revision
        assert node.licence.revision == node.entry(LOCK).revision
    story(steps)


def test_an_absent_record_is_not_created_again_after_the_licence_has_ended():
    async def steps(node: Node) -> None:
        node.store.link(up=False)
        await trio.sleep(29.75)
        delete(node.world, LOCK)
        node.store.link(up=True)
        await trio.sleep(60)
        assert node.record is None
    story(steps)


def test_nothing_is_created_over_anothers_record_that_came_between():
    async def steps(node: Node) -> None:
        await trio.sleep(9.9)
        delete(node.world, LOCK)
        writes = 0

        async def be_faster() -> None:
            nonlocal writes
            writes += 1
            if writes == 2:
                write(node.world, LOCK, others_record())

        node.store.before_write = be_faster
        await trio.sleep(1)
        assert node.licence.state is LicenceState.LOST
        assert node.record.holder == "z"
    story(steps)


def test_nothing_is_created_again_under_a_higher_epoch():
    async def steps(node: Node) -> None:
        await trio.sleep(1)
        delete(node.world, LOCK)
        write(node.world, EPOCH, Epoch(number=2, holder="z", incarnation="run-z", timeline=3))
        await trio.sleep(10)
        assert epoch_of(node.world).number == 2
    story(steps)


def test_a_restored_own_past_is_neither_believed_nor_another():
    async def steps(node: Node) -> None:
        saved = node.world.save()
        await trio.sleep(25)
        node.world.restore(saved)
        await trio.sleep(8)
        assert node.licence.state is LicenceState.HELD
        assert "restored" in node.licence.failing_why
        assert left_s(node) == pytest.approx(29.7 - 13, abs=0.1)
    story(steps)


def test_another_cluster_restored_from_a_former_leaders_time_is_lost():
    async def steps(node: Node) -> None:
        write(node.world, "x", b"")
        saved = MemoryWorld(TrioClock())
        write(saved, LOCK, others_record())
        node.world.restore(saved.save())
        await trio.sleep(10.1)
        assert node.licence.state is LicenceState.LOST
    story(steps)


# --- the mandate ---------------------------------------------------------------------------------------------------------

def test_nothing_is_renewed_without_a_mandate():
    async def main() -> None:
        async with alone() as node:
            await node.renewer.acquire(node.take(), deadline_s=2)
            await trio.sleep(29)
            assert len(node.store.writes) == 1
            assert left_s(node) == pytest.approx(0.7, abs=0.01)
    run(main)


def test_nothing_is_renewed_after_the_mandate_and_again_with_a_new_one():
    async def steps(node: Node) -> None:
        node.mandate(5)
        await trio.sleep(15)
        assert len(node.store.writes) == 1
        node.mandate(100)
        await trio.sleep(SOON_S)
        assert len(node.store.writes) == 2
        node.renewer.give_mandate(Mandate(), number=9)
        await trio.sleep(12)
        assert len(node.store.writes) == 2
    story(steps)


# --- a change of the ttl -------------------------------------------------------------------------------------------------

def test_a_higher_ttl_is_written_at_the_next_turn_without_asking_the_guard():
    async def steps(node: Node) -> None:
        node.timing = Timing(ttl_s=60.0, loop_wait_s=10.0)
        await trio.sleep(10.1)
        assert node.record.ttl_s == 60
        assert left_s(node) > 58
        assert node.guard.asked == []
    story(steps)


def test_a_lower_ttl_is_confirmed_by_the_guard_before_its_first_byte():
    async def steps(node: Node) -> None:
        await trio.sleep(1)
        node.guard.takes_s = 0.4
        node.timing = Timing(ttl_s=5.0, loop_wait_s=10.0)
        node.mandate()
        await trio.sleep(10)
        (until, ttl_s, sequence), *more = node.guard.asked
        assert more == []
        assert (ttl_s, sequence) == (5.0, 1)
        assert node.guard.sent_before == [1], "the write went out before the guard knew"
        when, record = node.store.writes[1]
        assert (record.ttl_s, record.sequence) == (5.0, 2)
        assert remaining_s(until, TrioClock().now().plus_s(when - trio.current_time())) == pytest.approx(4.95 - 0.4)
        assert node.record.ttl_s == 5
    story(steps)


def test_a_lower_ttl_whose_answer_is_lost_counts_at_once():
    async def steps(node: Node) -> None:
        await trio.sleep(1)
        node.timing = Timing(ttl_s=5.0, loop_wait_s=10.0)
        node.store.link(up=False)
        node.mandate()
        await trio.sleep(9.5)       # the next turn is at ten seconds
        at_most_s = max(left_s(node), 0)
        assert at_most_s <= 30.0
        await trio.sleep(1)
        assert left_s(node) <= 4.95
    story(steps)


def test_without_the_guards_word_no_shorter_record_is_sent():
    async def steps(node: Node) -> None:
        await trio.sleep(9.5)
        node.guard.deaf, node.guard.takes_s = True, 0.1
        node.timing = Timing(ttl_s=5.0, loop_wait_s=10.0)
        await trio.sleep(3)
        assert node.guard.asked
        assert {record.ttl_s for _, record in node.store.writes} == {30.0}
        assert left_s(node) > 15
        node.guard.deaf = False
        await trio.sleep(1)
        assert node.record.ttl_s == 5
        assert left_s(node) > 3
    story(steps)


def test_a_deaf_guard_makes_nobody_write_as_fast_as_the_store_answers():
    async def steps(node: Node) -> None:
        await trio.sleep(9.5)
        node.guard.deaf, node.guard.takes_s = True, 0.01
        node.timing = Timing(ttl_s=5.0, loop_wait_s=10.0)
        await trio.sleep(3.5)
        assert len(node.guard.asked) < 100
        assert len(node.store.writes) < 20
    story(steps)


@pytest.mark.parametrize("shielded", [False, True])
def test_an_answer_about_a_licence_that_the_fence_has_forgotten_brings_nothing_back(shielded):
    """It killed before the end: an orderly stop hung, or a clock jump was not confirmed in time."""
    async def steps(node: Node) -> None:
        async def fence_kills() -> None:
            with trio.CancelScope(shield=shielded):
                await trio.sleep(0.2)
                node.renewer.forget_expired()

        await trio.sleep(9.5)
        node.store.before_write = fence_kills
        async with trio.open_nursery() as nursery:
            if not shielded:
                node.store.before_write, node.store.delay_s = None, 1.0
                await trio.sleep(0.9)
                nursery.start_soon(fence_kills)
        await trio.sleep(5)
        assert node.licence == Licence()
        assert [record.sequence for _, record in node.store.writes] == [1, 2]
    story(steps)


@pytest.mark.parametrize("released", [False, True])
def test_a_licence_that_is_given_up_while_the_guard_is_asked_is_not_renewed(released):
    async def steps(node: Node) -> None:
        await trio.sleep(1)
        node.guard.takes_s = 0.4
        node.timing = Timing(ttl_s=5.0, loop_wait_s=10.0)
        node.mandate()
        await trio.sleep(0.2)
        if released:
            await node.renewer.release(lsn=777, timeline=4, deadline_s=2)
        else:
            node.renewer.forget_expired()
        await trio.sleep(5)
        assert node.licence.state is LicenceState.NONE
        assert [record.mode for _, record in node.store.writes] == ["held", "released"][:1 + released]
    story(steps)


# --- giving back ---------------------------------------------------------------------------------------------------------

def test_a_release_carries_the_position_and_is_never_renewed():
    async def steps(node: Node) -> None:
        await trio.sleep(1)
        await node.renewer.release(lsn=777, timeline=4, deadline_s=2)
        assert (node.record.mode, node.record.lsn, node.record.timeline) == ("released", 777, 4)
        assert (node.licence.state, node.licence.valid_until) == (LicenceState.NONE, None)
        sent = len(node.store.writes)
        await trio.sleep(120)
        assert len(node.store.writes) == sent
    story(steps)


def test_after_a_release_whose_answer_was_lost_nothing_is_renewed_and_nothing_is_licensed():
    async def steps(node: Node) -> None:
        node.store.lose_answers = 1
        with pytest.raises((DcsUnreachable, trio.TooSlowError)):
            await node.renewer.release(lsn=1, timeline=1, deadline_s=2)
        assert node.licence.state is LicenceState.RELEASING
        assert left_s(node) <= 0
        await trio.sleep(120)
        assert node.record.mode == "released"
        assert node.licence.state is LicenceState.RELEASING
    story(steps)


def test_a_release_that_never_arrived_leaves_a_record_that_expires():
    async def steps(node: Node) -> None:
        node.store.lose_requests = 1
        with pytest.raises((DcsUnreachable, trio.TooSlowError)):
            await node.renewer.release(lsn=1, timeline=1, deadline_s=2)
        await trio.sleep(60)
        assert node.record.sequence == 1
        await node.renewer.acquire(node.take(), deadline_s=2)
        assert node.licence.state is LicenceState.HELD, "whoever gave it back may take it again once it has expired"
        node.mandate()
        await trio.sleep(25)
        assert left_s(node) > 19
    story(steps)


@pytest.mark.parametrize("ambiguous", ["lose_answers", "lose_requests"])
def test_a_release_over_an_ambiguous_renewal(ambiguous):
    async def steps(node: Node) -> None:
        await trio.sleep(9.9)
        setattr(node.store, ambiguous, 1)
        await trio.sleep(0.2)       # the renewal is on the way, its answer will not come
        await node.renewer.release(lsn=5, timeline=1, deadline_s=3)
        assert (node.record.mode, node.record.lsn) == ("released", 5)
        assert node.licence.state is LicenceState.NONE
    story(steps)


def test_a_release_finds_anothers_record():
    async def steps(node: Node) -> None:
        write(node.world, LOCK, others_record())
        await node.renewer.release(lsn=5, timeline=1, deadline_s=3)
        assert node.record.holder == "z"
        assert node.licence.state is LicenceState.LOST
    story(steps)


def test_who_holds_nothing_releases_nothing():
    async def main() -> None:
        async with alone() as node:
            write(node.world, LOCK, others_record())
            await node.renewer.release(lsn=5, timeline=1, deadline_s=3)
            assert node.store.writes == []
    run(main)


# --- clocks --------------------------------------------------------------------------------------------------------------

def test_a_jump_of_the_wall_clock_asks_for_a_confirming_renewal():
    async def steps(node: Node) -> None:
        await trio.sleep(1)
        node.clock.wall_offset_s += 60
        node.mandate()                  # anything that wakes it
        await trio.sleep(SOON_S)
        assert len(node.store.writes) == 2
        assert not node.renewer.confirm_failed()
        await trio.sleep(5)
        assert not node.renewer.confirm_failed()
        assert len(node.store.writes) == 2
    story(steps)


def test_a_confirming_renewal_that_fails_is_said_so_within_a_second():
    async def steps(node: Node) -> None:
        await trio.sleep(1)
        node.store.link(up=False)
        node.clock.wall_offset_s -= 60
        node.mandate(1e5)
        await trio.sleep(0.9)
        assert not node.renewer.confirm_failed()
        await trio.sleep(0.2)
        assert node.renewer.confirm_failed()
    story(steps)


def test_a_slow_drift_of_the_wall_clock_asks_for_nothing():
    async def steps(node: Node) -> None:
        for _ in range(9):
            await trio.sleep(1)
            node.clock.wall_offset_s += 0.5
            node.mandate(1e5 + node.number)
        assert len(node.store.writes) == 1
    story(steps)


def test_a_jump_of_the_wall_clock_is_noticed_within_a_second_or_two():
    async def steps(node: Node) -> None:
        await trio.sleep(1)
        node.clock.wall_offset_s += 60
        await trio.sleep(2)
        assert len(node.store.writes) == 2
    story(steps)


def test_a_new_licence_owes_no_confirmation():
    async def steps(node: Node) -> None:
        await trio.sleep(1)
        node.store.link(up=False)
        node.clock.wall_offset_s -= 60
        node.mandate(1e5)
        await trio.sleep(40)
        node.renewer.forget_expired()
        node.store.link(up=True)
        await node.renewer.acquire(node.take(readopt=True), deadline_s=2)
        assert node.licence.state is LicenceState.HELD
        assert not node.renewer.confirm_failed()
    story(steps)


def test_every_change_of_the_licence_is_announced():
    async def steps(node: Node) -> None:
        await trio.sleep(25)
        await node.renewer.release(lsn=1, timeline=1, deadline_s=1)
        told = [licence.state for _, licence in node.history]
        assert told[0] is LicenceState.ACQUIRING
        assert told.count(LicenceState.HELD) == 3
        assert told[-2:] == [LicenceState.RELEASING, LicenceState.NONE]
        assert node.history[-1][1] == node.licence
    story(steps)

