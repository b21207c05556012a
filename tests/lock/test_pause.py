"""Pause in the licence: without an end once its record is committed and not before, and over before the first byte that may end it."""

from __future__ import annotations

import pytest
import trio
from guard_world import CLOCK, GuardProcess, late_s, until
from guard_world import Node as Postgres
from lock_world import Node, others_record, run, write
from msgspec.structs import replace
from test_fence import Agent, found_running, frozen, told, with_agent
from test_fence import until as eventually
from test_licence import commit, ends_s, extended, holder, send
from test_renewer import SOON_S, alone, left_s, story

from pgha.clock import NEVER, remaining_s
from pgha.dcs.keys import LOCK
from pgha.errors import GuardError
from pgha.lock.renewer import Timing
from pgha.model.action import AcquireLock
from pgha.model.lock import LicenceState

PAUSED, RESUMED = Timing(ttl_s=30.0, loop_wait_s=10.0, paused=True), Timing(ttl_s=30.0, loop_wait_s=10.0)


# --- what may be believed ------------------------------------------------------------------------------------------------

def test_a_committed_pause_has_no_end():
    book = holder()
    sent = send(book, 10, onto=10, mode="paused")
    assert ends_s(book) == pytest.approx(29.7), "not before it is committed"
    assert not book.licence.endless
    commit(book, sent, 11)
    assert (book.licence.valid_until, book.licence.endless, book.licence.mode) == (NEVER, True, "paused")


def test_the_end_of_a_pause_counts_from_its_first_byte():
    book = holder()
    commit(book, send(book, 10, onto=10, mode="paused"), 11)
    sent = send(book, 100, onto=11)
    assert ends_s(book) == pytest.approx(129.7)
    assert not book.licence.endless, "it may have been committed"
    commit(book, sent, 12)
    assert ends_s(book) == pytest.approx(129.7)


def test_a_pause_that_is_wanted_again_waits_for_its_own_commit():
    book = holder()
    commit(book, send(book, 10, onto=10, mode="paused"), 11)
    send(book, 100, onto=11)
    again = send(book, 110, onto=11, mode="paused")
    assert ends_s(book) == pytest.approx(129.7), "the resume may have been committed meanwhile"
    commit(book, again, 12)
    assert book.licence.endless


def test_a_resume_that_had_committed_after_all_ends_when_it_said():
    book = holder()
    commit(book, send(book, 10, onto=10, mode="paused"), 11)
    resumed = send(book, 100, onto=11)
    send(book, 110, onto=11, mode="paused")
    assert book.recognise(resumed.record) == resumed
    commit(book, resumed, 12)
    assert ends_s(book) == pytest.approx(129.7)


def test_a_release_in_pause_ends_the_licence_before_its_first_byte():
    book = holder()
    commit(book, send(book, 10, onto=10, mode="paused"), 11)
    book.releasing()
    send(book, 50, onto=11, mode="released")
    assert ends_s(book) == 50


def test_a_pause_that_had_committed_before_a_round_has_no_end_only_by_the_next_record():
    """The guard was told of the round's end under a later sequence: only a later one still may tell it of the pause."""
    book = holder()
    paused = send(book, 10, onto=10, mode="paused")
    assert extended(book)
    commit(book, paused, 11)
    assert (ends_s(book), book.licence.sequence, book.licence.endless, book.licence.by_failsafe) == (pytest.approx(20 + 29.7), 3, False, True)
    commit(book, send(book, 22, onto=11, mode="paused"), 12)
    assert (book.licence.sequence, book.licence.endless, book.licence.by_failsafe) == (4, True, False)


# --- what is sent when ---------------------------------------------------------------------------------------------------

def test_a_pause_is_written_at_once_without_asking_the_guard():
    async def steps(node: Node) -> None:
        node.timing = PAUSED
        node.mandate()
        await trio.sleep(SOON_S)
        assert (node.record.mode, node.licence.endless, node.guard.asked) == ("paused", True, [])
    story(steps)


def test_a_pause_in_memory_only_is_none():
    """The store is away when it is wanted: the licence ends when it would have."""
    async def steps(node: Node) -> None:
        node.store.link(up=False)
        node.timing = PAUSED
        node.mandate()
        await trio.sleep(29)
        assert not node.licence.endless
        assert 0 < left_s(node) < 1
        await trio.sleep(10)
        assert left_s(node) < 0
        node.store.link(up=True)
        await trio.sleep(10)
        assert node.record.mode == "held", "what has ended is not revived"
    story(steps)


def test_a_store_that_is_away_in_pause_ends_nothing():
    async def steps(node: Node) -> None:
        node.timing = PAUSED
        node.mandate()
        await trio.sleep(1)
        node.store.link(up=False)
        await trio.sleep(3600)
        assert node.licence.endless
        node.store.link(up=True)
        sequence = node.record.sequence
        await trio.sleep(2)
        assert node.record.sequence > sequence, "renewed as ever, so that everybody sees that it lives"
        assert node.record.mode == "paused"
    story(steps)


def test_the_guard_knows_of_a_resume_before_its_first_byte():
    async def steps(node: Node) -> None:
        node.timing = PAUSED
        node.mandate()
        await trio.sleep(100)
        node.guard.takes_s = 0.4
        sent, sequence = len(node.store.writes), node.licence.sequence
        node.timing = RESUMED
        node.mandate()
        await trio.sleep(1)
        (end, ttl_s, narrowed), *more = node.guard.asked
        assert (more, ttl_s, narrowed) == ([], 30.0, sequence)
        assert node.guard.sent_before == [sent]
        assert node.record.mode == "held"
        assert remaining_s(end, node.clock.now()) == pytest.approx(29.7 - 1)
        assert left_s(node) == pytest.approx(29.7 - 1)
    story(steps)


def test_a_resume_whose_answer_is_lost_ends_the_pause_all_the_same():
    async def steps(node: Node) -> None:
        node.timing = PAUSED
        node.mandate()
        await trio.sleep(1)
        node.store.link(up=False)
        await trio.sleep(2)
        node.timing = RESUMED
        node.mandate()
        await trio.sleep(1.5)
        assert 25 < left_s(node) <= 29.7, "it may have been committed"
        await trio.sleep(30)
        assert left_s(node) < 0
    story(steps)


def test_without_the_guards_word_the_pause_goes_on():
    async def steps(node: Node) -> None:
        node.timing = PAUSED
        node.mandate()
        await trio.sleep(1)
        node.guard.deaf = True
        node.timing = RESUMED
        node.mandate()
        await trio.sleep(5)
        assert len(node.guard.asked) < 10
        assert (node.record.mode, node.licence.endless) == ("paused", True)
        node.guard.deaf = False
        await trio.sleep(2)
        assert (node.record.mode, node.licence.endless) == ("held", False)
    story(steps)


def test_a_release_in_pause_is_told_to_the_guard_first_or_not_sent():
    async def steps(node: Node) -> None:
        node.timing = PAUSED
        node.mandate()
        await trio.sleep(1)
        node.guard.deaf = True
        with pytest.raises(GuardError):
            await node.renewer.release(lsn=7, timeline=2, deadline_s=2)
        assert node.record.mode == "paused"
    story(steps)
    async def granted(node: Node) -> None:
        node.timing = PAUSED
        node.mandate()
        await trio.sleep(1)
        sent = len(node.store.writes)
        await node.renewer.release(lsn=7, timeline=2, deadline_s=2)
        assert (node.record.mode, node.record.lsn, node.guard.sent_before) == ("released", 7, [sent])
        assert node.licence.state is LicenceState.NONE
    story(granted)


def test_anothers_record_ends_a_pause():
    """An operator has stated that this node was down, and it was not."""
    async def steps(node: Node) -> None:
        node.timing = PAUSED
        node.mandate()
        await trio.sleep(1)
        write(node.world, LOCK, others_record())
        await trio.sleep(11)
        assert (node.licence.state, node.licence.valid_until) == (LicenceState.LOST, None)
    story(steps)


def test_a_paused_record_is_readopted_as_such():
    """So that its guard, which knows of a pause, is never behind the store; it is resumed by the next renewal, guard first."""
    async def steps(node: Node) -> None:
        node.timing = PAUSED
        node.mandate()
        await trio.sleep(1)
        again = Node(node.world, run_of="2")
        await again.renewer.acquire(replace(again.take(readopt=True), paused=True), deadline_s=2)
        assert (node.record.mode, node.record.incarnation, again.licence.endless) == ("paused", "run-a-2", True)
    story(steps)


def test_a_jump_of_the_wall_clock_in_pause_asks_for_nothing():
    async def main() -> None:
        async with alone() as node:
            await node.renewer.acquire(node.take(), deadline_s=2)
            node.timing = PAUSED
            node.mandate()
            await trio.sleep(1)
            node.store.link(up=False)
            node.clock.wall_offset_s += 1000
            await trio.sleep(10)
            assert not node.renewer.confirm_failed()
    run(main)


# --- the fence and a real guard ------------------------------------------------------------------------------------------

LONG_AGO = Timing(ttl_s=3.0, loop_wait_s=1.0)


@pytest.mark.postgres
def test_a_primary_in_pause_outlives_store_mandate_and_agent(node: Postgres, guard: GuardProcess):
    node.start()

    async def main(agent: Agent) -> None:
        await agent.acquire()
        await agent.fence.armed()
        assert (await told(agent)).state == "armed"
        agent.timing = replace(LONG_AGO, paused=True)
        agent.mandate(60)
        await eventually(lambda: agent.fence.facts.state == "paused", 3)
        agent.cut()
        agent.mandate(0.1)
        await trio.sleep(4.5)
        assert node.sql("select pg_is_in_recovery()") == [(False,)]

    with_agent(node, guard, main)
    guard.kill()        # the next one knows it from the file
    assert guard.start()["state"] == "paused"
    until(lambda: node.sql("select 1"), 2)

    async def restarted(agent: Agent) -> None:
        found_running(agent, await told(agent))
        await trio.sleep(1)
        assert agent.fence.adopted_until == NEVER
        await agent.renewer.acquire(AcquireLock(lock_revision=0, lock_value=b"", epoch_revision=0, epoch_number=0, readopt=True, paused=True), deadline_s=1)
        await eventually(lambda: agent.fence.facts.reachable and agent.renewer.licence.endless, 2)
        assert agent.record.mode == "paused"
        agent.timing = LONG_AGO                                  # resumed
        agent.mandate(60)
        await eventually(lambda: agent.record.mode == "held", 3)
        await trio.sleep(0.1)
        status = await told(agent)
        assert status.state == "armed"
        assert status.fence_at is not None
        deadline = agent.cut()
        frozen(guard)
        await eventually(lambda: not node.processes(), 5)
        assert late_s(deadline, CLOCK.now()) < 0.3, "and everything is as ever"

    with_agent(node, guard, restarted)


@pytest.mark.postgres
def test_a_pause_that_is_wanted_while_the_store_is_away_saves_nothing(node: Postgres, guard: GuardProcess):
    node.start()

    async def main(agent: Agent) -> None:
        await agent.acquire()
        await agent.fence.armed()
        deadline = agent.cut()
        agent.timing = replace(LONG_AGO, paused=True)
        agent.mandate(60)
        await eventually(lambda: not node.processes(), 5)
        assert late_s(deadline, CLOCK.now()) < 0.3

    with_agent(node, guard, main)


@pytest.mark.postgres
def test_an_operators_word_that_was_wrong_ends_the_primary_at_once(node: Postgres, guard: GuardProcess):
    node.start()

    async def main(agent: Agent) -> None:
        await agent.acquire()
        await agent.fence.armed()
        agent.timing = replace(LONG_AGO, paused=True)
        agent.mandate(60)
        await eventually(lambda: agent.fence.facts.state == "paused", 3)
        write(agent.world, LOCK, others_record())
        await eventually(lambda: not node.processes(), 3)

    with_agent(node, guard, main)


def test_a_guard_that_was_told_of_a_pause_hears_of_its_end_also_where_nothing_runs(node: Postgres, guard: GuardProcess):
    """Else a server that somebody starts there later, from a backup, could be a second primary."""
    async def main(agent: Agent) -> None:
        await agent.acquire()
        await agent.fence.armed()
        agent.timing = replace(LONG_AGO, paused=True)
        agent.mandate(60)
        await eventually(lambda: agent.fence.facts.state == "paused", 3)

    with_agent(node, guard, main)

    async def restarted(agent: Agent) -> None:
        agent.timing = replace(LONG_AGO, paused=True)
        agent.fence.adopt(await told(agent), primary=False)
        await agent.renewer.acquire(AcquireLock(lock_revision=0, lock_value=b"", epoch_revision=0, epoch_number=0, readopt=True, paused=True), deadline_s=1)
        assert (await told(agent)).state == "paused"
        await agent.renewer.release(lsn=1, timeline=1, deadline_s=2)
        assert agent.record.mode == "released"
        assert (await told(agent)).state == "latched"

    with_agent(node, guard, restarted)
