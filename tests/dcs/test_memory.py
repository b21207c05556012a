"""What only the memory store has: a link that can be cut, a store that can be restored, time that is the test's."""

from __future__ import annotations

import random

import pytest
import trio
from trio.testing import MockClock

from pgha.clock import Instant
from pgha.dcs import ABSENT, Compare, Delete, Generation, Put
from pgha.dcs.memory import MemoryStore, MemoryWorld
from pgha.errors import Compacted, DcsRefused, DcsUnreachable, LeaseLost


class TrioClock:
    """The world's time is trio's."""

    def now(self) -> Instant:
        ns = round(trio.current_time() * 1e9)
        return Instant(ns, ns)

    def wall_s(self) -> float:
        return trio.current_time()


class HandClock:
    """Time passes when the test says so."""

    def __init__(self) -> None:
        self.ns = 0

    def now(self) -> Instant:
        return Instant(self.ns, self.ns)

    def wall_s(self) -> float:
        return self.ns / 1e9


def run(main) -> None:
    trio.run(main, clock=MockClock(autojump_threshold=0))


def write(world: MemoryWorld, key: str, value: bytes = b"v", lease: int = 0) -> int:
    return world.transact([], [Put(key=key, value=value, lease=lease)]).revision


def test_a_waiting_watch_wakes_up_when_a_lease_ends():
    async def main() -> None:
        world = MemoryWorld(TrioClock())
        store = MemoryStore(world)
        lease = await store.grant(30, deadline_s=1)
        revision = write(world, "/k", lease=lease)
        began = trio.current_time()
        async with store.watch("/", after_revision=revision) as watch:
            change = await anext(watch)
        assert change.entries == {"/k": None}
        assert trio.current_time() - began == pytest.approx(30, abs=0.01)

    run(main)


def test_leases_end_in_the_order_of_their_times():
    clock = HandClock()
    world = MemoryWorld(clock)
    for ttl_s, key in ((3, "/c"), (1, "/a"), (2, "/b")):
        lease = world.grant(ttl_s)
        write(world, key, lease=lease)
    start = world.revision
    assert world.next_expiry_s() == 1
    clock.ns = 10_000_000_000
    assert [list(change.entries) for change in world.changes("/", start)] == [["/a"], ["/b"], ["/c"]]
    assert world.next_expiry_s() is None
    with pytest.raises(LeaseLost):
        world.renew(lease)


@pytest.mark.parametrize("direction", ["requests", "answers"])
def test_a_cut_link_uses_up_the_deadline_and_only_lost_requests_are_not_done(direction):
    async def main() -> None:
        world = MemoryWorld(TrioClock())
        store = MemoryStore(world)
        store.link(requests_pass=direction != "requests", answers_pass=direction != "answers")
        began = trio.current_time()
        with pytest.raises(DcsUnreachable):
            await store.transact(compares=[Compare(key="/k", revision=ABSENT)], puts=[Put(key="/k", value=b"mine")], deadline_s=3)
        assert trio.current_time() - began == pytest.approx(3)
        assert ("/k" in world.read("/").entries) is (direction == "answers")
        assert store.generation == Generation()
        store.link()
        again = await store.transact(compares=[Compare(key="/k", revision=ABSENT)], puts=[Put(key="/k", value=b"mine")],
                                     read=["/k"], deadline_s=3)
        assert again.succeeded is (direction == "requests")
        assert again.found["/k"].value == b"mine"

    run(main)


def test_an_open_watch_is_silent_while_the_link_is_cut_and_then_goes_on():
    async def main() -> None:
        world = MemoryWorld(TrioClock())
        store = MemoryStore(world)
        async with store.watch("/", after_revision=world.revision) as watch:
            store.link(requests_pass=False)
            revision = write(world, "/k")
            with trio.move_on_after(100) as scope:
                await anext(watch)
            assert scope.cancelled_caught
            store.link()
            assert (await anext(watch)).revision == revision

    run(main)


@pytest.mark.parametrize("cluster_id", [None, "another"])
def test_a_restored_store_is_noticed(cluster_id):
    async def main() -> None:
        world = MemoryWorld(TrioClock())
        store = MemoryStore(world)
        lease = world.grant(30)
        write(world, "/kept", lease=lease)
        saved = world.save()
        write(world, "/lost")
        await store.read("/", deadline_s=1)
        async with store.watch("/", after_revision=world.revision) as watch:
            world.restore(saved, cluster_id=cluster_id)
            with pytest.raises(DcsUnreachable):
                await anext(watch)
        snapshot = await store.read("/", deadline_s=1)
        assert list(snapshot.entries) == ["/kept"]
        assert store.regressions == 1
        assert store.generation == snapshot.generation == Generation(cluster_id=cluster_id or "memory", revision=saved.revision)
        with pytest.raises(Compacted):
            async with store.watch("/", after_revision=0) as watch:
                await anext(watch)
        await trio.sleep(31)
        assert (await store.read("/", deadline_s=1)).entries == {}
        world.restore()
        assert (await store.read("/", deadline_s=1)).revision == 1
        assert store.regressions == 2

    run(main)


def test_a_full_store_refuses_puts_only_until_it_is_compacted():
    world = MemoryWorld(HandClock(), quota_bytes=1000)
    with pytest.raises(DcsRefused) as caught:
        for _ in range(100):
            write(world, "/k", bytes(100))
    assert caught.value.no_space
    assert world.capacity().alarms == ("NOSPACE",)
    lease = world.grant(5)
    assert world.renew(lease) == 5
    world.transact([], [Delete(key="/nothing")])
    world.compact(world.revision)
    write(world, "/k")
    assert world.capacity().alarms == ()
    with pytest.raises(DcsRefused):
        world.compact(world.revision + 1)


def test_the_same_calls_give_the_same_answers():
    def story(seed: int) -> list[object]:
        chance, clock = random.Random(seed), HandClock()
        world = MemoryWorld(clock)
        told: list[object] = []
        leases = [world.grant(chance.uniform(1, 9)) for _ in range(3)]
        for _ in range(500):
            clock.ns += chance.randrange(100_000_000)
            key = f"/{chance.randrange(5)}"
            try:
                told.append(world.transact(
                    [Compare(key=key, revision=chance.randrange(world.revision + 1))] * chance.randrange(2),
                    [chance.choice([Delete(key=key), Put(key=key, value=b"%d" % chance.randrange(9), lease=chance.choice([0, *leases]))])],
                    ["/0", "/1"]))
            except LeaseLost as error:
                told.append(str(error))
        return [*told, world.changes("/", 0), world.save()]

    assert story(1) == story(1)
    assert story(1) != story(2)
