"""The lock of a mixed cluster: the record as ever, and the key `leader` under a lease beside it (safety model 14)."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import pytest
import trio
from lock_world import KEYS, Node, TrioClock, delete, run, write
from msgspec.structs import replace

from pgha.act.keys import write_key
from pgha.clock import remaining_s
from pgha.dcs import ABSENT, Compare, Put
from pgha.dcs.keys import LOCK, parse
from pgha.dcs.memory import MemoryWorld
from pgha.errors import DcsUnreachable, Refused
from pgha.lock.renewer import Timing
from pgha.model.action import WriteKey
from pgha.model.lock import LEASE_DOUBT_S, LicenceState

SOON_S = 0.01
MIXED = Timing(ttl_s=30.0, loop_wait_s=10.0, mixed=True)


def left_s(node: Node) -> float:
    until = node.licence.valid_until
    return 0.0 if until is None else remaining_s(until, node.clock.now())


def story(steps: Callable[[Node], Awaitable[None]], *, mixed: bool = True) -> None:
    """`steps` with a running renewer that holds the lock, in a mixed cluster, or in one that is pure as yet."""
    async def main() -> None:
        async with trio.open_nursery() as nursery:
            node = Node(MemoryWorld(TrioClock()))
            node.timing = replace(MIXED, mixed=mixed)
            await nursery.start(node.renewer.run)
            node.mandate()
            await node.renewer.acquire(replace(node.take(), mixed=mixed, also_unchanged={"leader": 0}), deadline_s=2)
            await steps(node)
            nursery.cancel_scope.cancel()
    run(main)


def patroni_takes(world: MemoryWorld, name: str = "p", ttl_s: float = 20.0) -> bool:
    """What a Patroni member does when it sees no leader: creates the key under its lease."""
    path = KEYS.path("leader")
    return world.transact([Compare(key=path, revision=ABSENT)], [Put(key=path, value=name.encode(), lease=world.grant(ttl_s))]).succeeded


def seen(node: Node) -> None:
    """The watch has told the loop."""
    node.renewer.saw(parse(node.world.read(KEYS.root), KEYS))


# --- taking --------------------------------------------------------------------------------------------------------------

def test_a_take_over_writes_the_leader_key_under_a_lease_of_its_own():
    async def steps(node: Node) -> None:
        leader = node.entry("leader")
        assert (leader.value, leader.lease > 0, leader.revision) == (b"a", True, node.entry(LOCK).revision)
        assert node.record.mixed
        assert (node.licence.mixed, node.licence.leader_revision) == (True, leader.revision)
        assert left_s(node) == pytest.approx(30 * 0.99 - LEASE_DOUBT_S), "the earlier of both ends, and what a keep-alive may lie"
    story(steps)


def test_a_take_over_is_refused_while_another_has_the_leader_key():
    async def main() -> None:
        node = Node(MemoryWorld(TrioClock()))
        action = replace(node.take(), mixed=True, also_unchanged={"leader": 0})
        assert patroni_takes(node.world)
        with pytest.raises(Refused):
            await node.renewer.acquire(action, deadline_s=2)
        assert (node.record, node.entry("leader").value) == (None, b"p")
    run(main)


@pytest.mark.parametrize("ttl_s, written_s", [(5.0, 20.0), (25.0, 25.0)])
def test_no_record_of_a_mixed_cluster_is_shorter_than_patroni_counts(ttl_s, written_s):
    async def main() -> None:
        node = Node(MemoryWorld(TrioClock()), ttl_s=ttl_s)
        await node.renewer.acquire(replace(node.take(), mixed=True, also_unchanged={"leader": 0}), deadline_s=2)
        assert node.record.ttl_s == written_s
    run(main)


def test_a_take_over_whose_answer_was_lost_knows_its_leader_key():
    async def main() -> None:
        async with trio.open_nursery() as nursery:
            node = Node(MemoryWorld(TrioClock()))
            node.timing = MIXED
            await nursery.start(node.renewer.run)
            node.mandate()
            node.store.lose_answers = 1
            with pytest.raises(DcsUnreachable):
                await node.renewer.acquire(replace(node.take(), mixed=True, also_unchanged={"leader": 0}), deadline_s=0.3)
            await trio.sleep(SOON_S)
            assert (node.licence.state, node.licence.leader_revision) == (LicenceState.HELD, node.entry("leader").revision)
            await trio.sleep(65)
            assert node.licence.state is LicenceState.HELD
            nursery.cancel_scope.cancel()
    run(main)


# --- renewing ------------------------------------------------------------------------------------------------------------

def test_every_renewal_keeps_the_lease_and_leaves_the_key():
    async def steps(node: Node) -> None:
        before = node.entry("leader")
        await trio.sleep(200)
        assert node.entry("leader") == before
        assert node.record.sequence > 15
        assert node.licence.state is LicenceState.HELD
    story(steps)


def test_without_the_lease_the_record_is_not_renewed_either():
    """The licence is the earlier of both ends: one that counted on the record alone would outlive the key."""
    async def steps(node: Node) -> None:
        await trio.sleep(5)
        node.store.renew = unreachable      # type: ignore[method-assign]
        sequence = node.record.sequence
        await trio.sleep(20)
        assert node.record.sequence == sequence
        assert left_s(node) == pytest.approx(30 * 0.99 - LEASE_DOUBT_S - 25)
    story(steps)


async def unreachable(*_: object, **__: object) -> float:
    raise DcsUnreachable("no answer")


def test_the_licence_ends_before_the_key_does():
    async def steps(node: Node) -> None:
        await trio.sleep(11)
        node.store.link(up=False)
        while left_s(node) > 0:
            assert node.entry("leader") is not None
            await trio.sleep(0.1)
        assert not patroni_takes(node.world), "the key still stands when the licence has ended"
        await trio.sleep(LEASE_DOUBT_S + 1)
        assert patroni_takes(node.world), "and goes soon after"
    story(steps)


@pytest.mark.parametrize("taken", [False, True])
def test_a_renewal_finds_the_leader_key_deleted_or_taken(taken):
    async def steps(node: Node) -> None:
        await trio.sleep(3)
        delete(node.world, "leader")
        if taken:
            assert patroni_takes(node.world)
        await trio.sleep(7 + SOON_S)
        assert node.licence.state is LicenceState.LOST
        assert node.licence.lost_to == ("p" if taken else "nobody: the key leader was deleted")
        assert node.record.sequence == 1
    story(steps)


@pytest.mark.parametrize("taken", [False, True])
def test_what_the_watch_shows_counts_at_once(taken):
    async def steps(node: Node) -> None:
        await trio.sleep(3)
        seen(node)
        assert node.licence.state is LicenceState.HELD
        delete(node.world, "leader")
        if taken:
            assert patroni_takes(node.world)
        node.store.link(up=False)
        seen(node)
        assert node.licence.state is LicenceState.LOST, "no question to a store that may not answer"
    story(steps)


def test_an_older_view_ends_nothing():
    async def steps(node: Node) -> None:
        old = parse(node.world.read(KEYS.root), KEYS)
        old = replace(old, leader="", leader_lease=0, revision=node.licence.revision - 1)
        node.renewer.saw(old)
        assert node.licence.state is LicenceState.HELD
    story(steps)


def test_a_lease_that_the_store_has_lost_with_its_key_ends_the_licence():
    """etcd deletes leases whose renewals it acknowledges (#15247): others may have taken the key since."""
    async def steps(node: Node) -> None:
        node.world.revoke(node.entry("leader").lease)
        await trio.sleep(10 + SOON_S)
        assert node.licence.state is LicenceState.LOST
        assert node.entry("leader") is None
    story(steps)


def test_somebody_writes_the_key_under_this_name_without_a_lease():
    async def steps(node: Node) -> None:
        write(node.world, "leader", b"a")
        await trio.sleep(12)
        assert node.licence.state is LicenceState.HELD
        assert node.entry("leader").lease
    story(steps)


def test_another_agent_of_this_name_has_adopted_the_key():
    async def steps(node: Node) -> None:
        path = KEYS.path("leader")
        assert node.world.transact([Compare(key=path, value=b"a")], [Put(key=path, value=b"a", lease=node.world.grant(20.0))]).succeeded
        await trio.sleep(10 + SOON_S)
        assert node.licence.state is LicenceState.LOST
    story(steps)


def test_a_larger_ttl_comes_with_a_lease_of_its_length():
    async def steps(node: Node) -> None:
        lease = node.entry("leader").lease
        node.timing = replace(MIXED, ttl_s=60.0)
        await trio.sleep(12)
        assert node.record.ttl_s == 60.0
        assert node.entry("leader").lease not in (0, lease)
        node.store.link(up=False)
        while left_s(node) > 0:
            assert node.entry("leader") is not None
            await trio.sleep(0.2)
    story(steps)


# --- from pure to mixed, and back ----------------------------------------------------------------------------------------

def test_a_pure_cluster_becomes_mixed_in_two_steps():
    async def steps(node: Node) -> None:
        assert (node.entry("leader").lease, node.record.mixed) == (0, False)
        node.timing = replace(MIXED, ttl_s=20.0)
        await trio.sleep(1)
        assert [(r.ttl_s, r.mixed) for _, r in node.store.writes[1:]] == [(20.0, True)], "30 is enough already: both at once"
        assert node.entry("leader").lease
    story(steps, mixed=False)


def test_a_ttl_that_is_too_small_is_raised_and_confirmed_before_the_lease():
    async def main() -> None:
        async with trio.open_nursery() as nursery:
            node = Node(MemoryWorld(TrioClock()), ttl_s=5.0, loop_wait_s=1.0)
            await nursery.start(node.renewer.run)
            node.mandate()
            await node.renewer.acquire(node.take(), deadline_s=2)
            node.timing = Timing(ttl_s=20.0, loop_wait_s=1.0, mixed=True)
            await trio.sleep(3)
            said = [(r.ttl_s, r.mixed) for _, r in node.store.writes]
            assert said[:3] == [(5.0, False), (20.0, False), (20.0, True)]
            assert node.entry("leader").lease
            nursery.cancel_scope.cancel()
    run(main)


def test_a_pure_holder_ends_when_another_has_the_leader_key():
    """Somebody deleted the key, and a Patroni that had just joined found it free."""
    async def steps(node: Node) -> None:
        delete(node.world, "leader")
        assert patroni_takes(node.world)
        seen(node)
        assert (node.licence.state, node.licence.lost_to) == (LicenceState.LOST, "p")
    story(steps, mixed=False)


def test_an_absent_leader_key_is_created_where_the_cluster_becomes_mixed():
    async def steps(node: Node) -> None:
        delete(node.world, "leader")
        node.timing = MIXED
        await trio.sleep(2)
        assert node.licence.state is LicenceState.HELD
        assert (node.entry("leader").value, node.entry("leader").lease > 0) == (b"a", True)
    story(steps, mixed=False)


def test_an_operator_makes_it_pure_again():
    async def steps(node: Node) -> None:
        node.timing = replace(MIXED, mixed=False)
        node.renewer.confirm()
        await trio.sleep(1)
        assert (node.record.mixed, node.entry("leader").lease, node.licence.leader_revision) == (False, 0, 0)
        await trio.sleep(100)
        assert node.entry("leader").value == b"a"
        assert left_s(node) > 15
    story(steps)


# --- pause, and the end --------------------------------------------------------------------------------------------------

def test_in_pause_the_key_has_no_lease_since_the_record_does_not_expire():
    async def steps(node: Node) -> None:
        node.timing = replace(MIXED, paused=True)
        node.renewer.confirm()
        await trio.sleep(1)
        assert node.licence.endless
        assert node.entry("leader").lease == 0
        node.store.link(up=False)
        await trio.sleep(600)
        assert not patroni_takes(node.world), "nobody is to take over from a holder that may write without an end"
        node.store.link(up=True)
        node.timing = MIXED
        node.renewer.confirm()
        await trio.sleep(5)
        assert (node.record.mode, node.entry("leader").lease > 0) == ("held", True)
    story(steps)


def test_a_deleted_leader_key_ends_a_paused_licence_too():
    async def steps(node: Node) -> None:
        node.timing = replace(MIXED, paused=True)
        node.renewer.confirm()
        await trio.sleep(1)
        delete(node.world, "leader")
        seen(node)
        assert node.licence.state is LicenceState.LOST
    story(steps)


def test_a_release_deletes_the_key_with_it():
    async def steps(node: Node) -> None:
        await node.renewer.release(lsn=500, timeline=1, deadline_s=2)
        assert (node.record.mode, node.record.mixed, node.entry("leader")) == ("released", True, None)
        assert node.licence.state is LicenceState.NONE
    story(steps)


def test_a_release_leaves_the_key_to_whoever_has_it():
    async def steps(node: Node) -> None:
        delete(node.world, "leader")
        assert patroni_takes(node.world)
        await node.renewer.release(lsn=500, timeline=1, deadline_s=2)
        assert (node.record.mode, node.entry("leader").value) == ("released", b"p")
    story(steps)


def test_a_readoption_takes_the_key_under_a_lease_of_its_own():
    async def steps(node: Node) -> None:
        again = Node(node.world, run_of="2")
        before = node.entry("leader")
        await again.renewer.acquire(replace(again.take(readopt=True), mixed=True, also_unchanged={"leader": before.revision}), deadline_s=2)
        assert again.entry("leader").lease not in (0, before.lease)
        assert again.record.incarnation == "run-a-2"
    story(steps)


def test_a_record_that_was_deleted_is_created_again_only_beside_the_key():
    async def steps(node: Node) -> None:
        await trio.sleep(3)
        delete(node.world, LOCK)
        await trio.sleep(8)
        assert (node.record.holder, node.licence.state) == ("a", LicenceState.HELD)
        delete(node.world, LOCK)
        delete(node.world, "leader")
        assert patroni_takes(node.world)
        await trio.sleep(11)
        assert node.licence.state is LicenceState.LOST
    story(steps)


# --- failsafe ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("taken", [False, True])
def test_after_an_outage_that_the_others_bridged_the_key_is_created_again_unless_it_was_taken(taken):
    async def steps(node: Node) -> None:
        node.store.link(up=False)
        for _ in range(5):
            await trio.sleep(10)
            begun = node.renewer.begin_round()
            assert begun is not None and node.renewer.extend(begun)
        assert node.entry("leader") is None
        if taken:
            assert patroni_takes(node.world)
        node.store.link(up=True)
        await trio.sleep(3)
        assert node.licence.state is (LicenceState.LOST if taken else LicenceState.HELD)
        assert node.entry("leader").value == (b"p" if taken else b"a")
    story(steps)


# --- what else a leader writes -------------------------------------------------------------------------------------------

def test_a_delayed_write_of_a_leader_that_a_patroni_has_succeeded_changes_nothing():
    async def steps(node: Node) -> None:
        ctx: Any = SimpleNamespace(keys=KEYS, store=node.store, renewer=node.renewer)
        write_status = WriteKey(key="status", value=b"{}", if_revision=0, epoch_revision=node.licence.epoch_revision)
        delete(node.world, "leader")
        assert patroni_takes(node.world)
        with pytest.raises(Refused, match="status, leader or the epoch has changed"):
            await write_key(ctx, write_status, deadline_s=1.0)
        assert node.entry("status") is None
    story(steps)


def test_a_leader_writes_while_the_key_is_its_own():
    async def steps(node: Node) -> None:
        ctx: Any = SimpleNamespace(keys=KEYS, store=node.store, renewer=node.renewer)
        await write_key(ctx, WriteKey(key="status", value=b"{}", if_revision=0, epoch_revision=node.licence.epoch_revision), deadline_s=1.0)
        assert node.entry("status").value == b"{}"
    story(steps)
