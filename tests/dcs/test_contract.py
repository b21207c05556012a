"""What every driver of pgha.dcs.Store promises, run against each of them."""

from __future__ import annotations

from contextlib import aclosing

import pytest
import trio
from trio.testing import trio_test

from pgha.dcs import ABSENT, Change, Compare, Delete, Entry, Outcome, Put, Store
from pgha.errors import Compacted, DcsUnreachable, LeaseLost

S = 5.0  # ample for any call


async def put(store: Store, key: str, value: bytes, lease: int = 0) -> int:
    outcome = await store.transact(compares=[], puts=[Put(key=key, value=value, lease=lease)], deadline_s=S)
    assert outcome.succeeded
    return outcome.revision


async def attempt(store: Store, *compares: Compare, puts=(), read=()) -> Outcome:
    return await store.transact(compares=compares, puts=puts, read=read, deadline_s=S)


async def take(watch, count: int) -> list[Change]:
    """The next `count` changes, signs of life left out."""
    changes = []
    with trio.fail_after(S):
        async for change in watch:
            if change is not None:
                changes.append(change)
            if len(changes) == count:
                break
    return changes


# reading

@trio_test
async def test_an_empty_prefix_is_an_empty_snapshot_with_a_generation(lab):
    async with aclosing(lab.store()) as store:
        assert store.generation.cluster_id == ""
        snapshot = await store.read(lab.prefix, deadline_s=S)
        assert snapshot.entries == {}
        assert snapshot.revision >= 1
        assert snapshot.generation == store.generation
        assert snapshot.generation.cluster_id
        assert snapshot.generation.revision == snapshot.revision


@trio_test
async def test_read_gives_all_under_the_prefix_and_nothing_else(lab):
    async with aclosing(lab.store()) as store:
        values = {lab.prefix + "a": b"", lab.prefix + "b/c": bytes(range(256)), lab.prefix + "ü": "ö".encode()}
        for key, value in values.items():
            await put(store, key, value)
        await put(store, lab.prefix[:-1] + "0", b"the first key after the prefix")
        snapshot = await store.read(lab.prefix, deadline_s=S)
        assert {key: entry.value for key, entry in snapshot.entries.items()} == values
        assert all(key == entry.key and entry.lease == 0 for key, entry in snapshot.entries.items())
        whole = await store.read(lab.prefix + "b/c", deadline_s=S)
        assert list(whole.entries) == [lab.prefix + "b/c"]
        everything = await store.read("", deadline_s=S)
        assert set(values) <= set(everything.entries)


@trio_test
async def test_what_one_handle_wrote_the_other_reads_at_once(lab):
    async with aclosing(lab.store()) as one, aclosing(lab.store()) as other:
        for n in range(20):
            revision = await put(one, lab.prefix + "k", b"%d" % n)
            entry = (await other.read(lab.prefix, deadline_s=S)).entries[lab.prefix + "k"]
            assert (entry.value, entry.revision) == (b"%d" % n, revision)


# transactions

@trio_test
async def test_create_only(lab):
    key = lab.prefix + "k"
    async with aclosing(lab.store()) as store:
        first = await attempt(store, Compare(key=key, revision=ABSENT), puts=[Put(key=key, value=b"1")], read=[key])
        assert first.succeeded
        assert first.found == {key: Entry(key=key, value=b"1", revision=first.revision)}
        second = await attempt(store, Compare(key=key, revision=ABSENT), puts=[Put(key=key, value=b"2")], read=[key])
        assert not second.succeeded
        assert second.found == first.found
        assert second.revision >= first.revision


@pytest.mark.parametrize(("right_revision", "value", "holds"), [
    (True, None, True), (False, None, False),
    (None, b"v", True), (None, b"w", False), (None, b"", False),
    (True, b"v", True), (True, b"w", False), (False, b"v", False),
    (None, None, True),
])
@trio_test
async def test_compares_on_revision_and_value(lab, right_revision, value, holds):
    key = lab.prefix + "k"
    async with aclosing(lab.store()) as store:
        former = await put(store, key, b"v")
        revision = None if right_revision is None else former if right_revision else former - 1
        outcome = await attempt(store, Compare(key=key, revision=revision, value=value),
                                puts=[Put(key=key, value=b"new")], read=[key])
        assert outcome.succeeded is holds
        assert outcome.found[key].value == (b"new" if holds else b"v")
        assert (outcome.revision > former) is holds or outcome.revision == former


@trio_test
async def test_an_absent_key_has_no_value_not_even_the_empty_one(lab):
    key = lab.prefix + "k"
    async with aclosing(lab.store()) as store:
        for compare in (Compare(key=key, value=b""), Compare(key=key, revision=ABSENT, value=b""), Compare(key=key, revision=1)):
            outcome = await attempt(store, compare, puts=[Put(key=key, value=b"x")], read=[key])
            assert not outcome.succeeded
            assert outcome.found == {}


@trio_test
async def test_a_key_that_was_deleted_and_recreated_is_another(lab):
    key = lab.prefix + "k"
    async with aclosing(lab.store()) as store:
        former = await put(store, key, b"v")
        await attempt(store, puts=[Delete(key=key)])
        assert (await attempt(store, Compare(key=key, revision=ABSENT))).succeeded
        await put(store, key, b"v")
        assert not (await attempt(store, Compare(key=key, revision=former, value=b"v"))).succeeded


@trio_test
async def test_several_keys_change_together_or_not_at_all(lab):
    a, b, c = (lab.prefix + name for name in "abc")
    async with aclosing(lab.store()) as store:
        revision = await put(store, a, b"1")
        await put(store, c, b"1")
        steps = [Put(key=a, value=b"2"), Put(key=b, value=b"2"), Delete(key=c)]
        refused = await attempt(store, Compare(key=a, revision=revision), Compare(key=b, revision=1), puts=steps, read=[a, b, c])
        assert not refused.succeeded
        assert {key: entry.value for key, entry in refused.found.items()} == {a: b"1", c: b"1"}
        done = await attempt(store, Compare(key=a, revision=revision), Compare(key=b, revision=ABSENT), puts=steps, read=[a, b, c])
        assert done.succeeded
        assert done.found == {key: Entry(key=key, value=b"2", revision=done.revision) for key in (a, b)}
        snapshot = await store.read(lab.prefix, deadline_s=S)
        assert snapshot.entries == done.found
        assert snapshot.revision >= done.revision


@trio_test
async def test_a_transaction_that_only_reads(lab):
    key = lab.prefix + "k"
    async with aclosing(lab.store()) as store:
        revision = await put(store, key, b"v")
        outcome = await attempt(store, read=[key, lab.prefix + "absent"])
        assert outcome.succeeded
        assert outcome.found == {key: Entry(key=key, value=b"v", revision=revision)}


@trio_test
async def test_deleting_what_is_absent_changes_nothing(lab):
    async with aclosing(lab.store()) as store:
        before = (await store.read(lab.prefix, deadline_s=S)).revision
        outcome = await attempt(store, puts=[Delete(key=lab.prefix + "k")])
        assert outcome.succeeded
        assert outcome.revision == before


@trio_test
async def test_one_key_is_written_once_in_a_transaction(lab):
    key = lab.prefix + "k"
    async with aclosing(lab.store()) as store:
        with pytest.raises(AssertionError):
            await attempt(store, puts=[Put(key=key, value=b"1"), Delete(key=key)])


@trio_test
async def test_of_twenty_at_once_exactly_one_wins(lab):
    key = lab.prefix + "lock"
    async with aclosing(lab.store()) as one, aclosing(lab.store()) as other:
        revision = await put(one, key, b"free")
        outcomes: list[tuple[bytes, Outcome]] = []

        async def compete(store: Store, value: bytes) -> None:
            outcome = await attempt(store, Compare(key=key, revision=revision, value=b"free"),
                                    puts=[Put(key=key, value=value)], read=[key])
            outcomes.append((value, outcome))

        async with trio.open_nursery() as nursery:
            for n in range(20):
                nursery.start_soon(compete, (one, other)[n % 2], b"%d" % n)
        winners = [value for value, outcome in outcomes if outcome.succeeded]
        assert len(outcomes) == 20
        assert len(winners) == 1
        assert {outcome.found[key].value for _, outcome in outcomes} == set(winners)


@trio_test
async def test_the_generation_grows_with_the_answers(lab):
    async with aclosing(lab.store()) as store:
        seen = []
        for n in range(5):
            await put(store, lab.prefix + "k", b"%d" % n)
            seen.append(store.generation.revision)
        assert seen == sorted(set(seen))
        outcome = await attempt(store, Compare(key=lab.prefix + "k", revision=ABSENT))
        assert store.generation.revision == outcome.revision
        assert store.regressions == 0


# leases

@trio_test
async def test_a_lease_that_is_not_renewed_takes_its_keys_along(lab):
    key, stays = lab.prefix + "leased", lab.prefix + "plain"
    async with aclosing(lab.store()) as store:
        await put(store, stays, b"v")
        lease = await store.grant(1, deadline_s=S)
        assert lease != 0
        revision = await put(store, key, b"v", lease)
        assert (await store.read(key, deadline_s=S)).entries[key].lease == lease
        async with store.watch(lab.prefix, after_revision=revision) as watch:
            gone = await take(watch, 1)
        assert gone[0].entries == {key: None}
        assert gone[0].revision > revision
        assert list((await store.read(lab.prefix, deadline_s=S)).entries) == [stays]
        with pytest.raises(LeaseLost):
            await store.renew(lease, deadline_s=S)
        with pytest.raises(LeaseLost):
            await put(store, key, b"v", lease)


@trio_test
async def test_a_lease_that_is_renewed_lives(lab):
    async with aclosing(lab.store()) as store:
        lease = await store.grant(2, deadline_s=S)
        await put(store, lab.prefix + "k", b"v", lease)
        ended = trio.current_time() + 3.2
        while trio.current_time() < ended:
            assert 1.5 <= await store.renew(lease, deadline_s=S) <= 3
            await trio.sleep(0.4)
        assert lab.prefix + "k" in (await store.read(lab.prefix, deadline_s=S)).entries
        await store.revoke(lease, deadline_s=S)


@trio_test
async def test_revoking_ends_all_keys_at_one_revision(lab):
    keys = {lab.prefix + name for name in "abc"}
    async with aclosing(lab.store()) as store:
        lease = await store.grant(60, deadline_s=S)
        for key in keys:
            revision = await put(store, key, b"v", lease)
        async with store.watch(lab.prefix, after_revision=revision) as watch:
            await store.revoke(lease, deadline_s=S)
            assert (await take(watch, 1))[0].entries == dict.fromkeys(keys)
        await store.revoke(lease, deadline_s=S)
        with pytest.raises(LeaseLost):
            await store.renew(lease, deadline_s=S)


@trio_test
async def test_a_plain_put_takes_a_key_out_of_its_lease(lab):
    key = lab.prefix + "k"
    async with aclosing(lab.store()) as store:
        lease = await store.grant(60, deadline_s=S)
        await put(store, key, b"v", lease)
        await put(store, key, b"w")
        await store.revoke(lease, deadline_s=S)
        entry = (await store.read(key, deadline_s=S)).entries[key]
        assert (entry.value, entry.lease) == (b"w", 0)


# watching

@trio_test
async def test_a_watch_gives_every_change_in_order_and_none_of_others(lab):
    key = lab.prefix + "k"
    async with aclosing(lab.store()) as store, aclosing(lab.store()) as writer:
        start = (await store.read(lab.prefix, deadline_s=S)).revision
        async with store.watch(lab.prefix, after_revision=start) as watch:
            written = []
            for n in range(50):
                written.append(await put(writer, key, b"%d" % n))
                await put(writer, lab.prefix[:-1] + "0", b"elsewhere")
            changes = await take(watch, 50)
        assert [change.revision for change in changes] == written
        assert [change.entries[key].value for change in changes] == [b"%d" % n for n in range(50)]
        assert all(change.entries[key].revision == change.revision for change in changes)


@trio_test
async def test_a_watch_resumes_after_any_revision(lab):
    key = lab.prefix + "k"
    async with aclosing(lab.store()) as store:
        written = [await put(store, key, b"%d" % n) for n in range(30)]
        for after in (written[0] - 1, written[11], written[28]):
            expected = [revision for revision in written if revision > after]
            async with store.watch(lab.prefix, after_revision=after) as watch:
                assert [change.revision for change in await take(watch, len(expected))] == expected


@trio_test
async def test_one_transaction_is_one_change(lab):
    a, b, c = (lab.prefix + name for name in "abc")
    async with aclosing(lab.store()) as store:
        revision = await put(store, c, b"1")
        async with store.watch(lab.prefix, after_revision=revision) as watch:
            done = await attempt(store, puts=[Put(key=a, value=b"2"), Put(key=b, value=b"2"), Delete(key=c)])
            change, = await take(watch, 1)
        assert change == Change(revision=done.revision, entries={
            a: Entry(key=a, value=b"2", revision=done.revision),
            b: Entry(key=b, value=b"2", revision=done.revision),
            c: None})
        # the same from history
        async with store.watch(lab.prefix, after_revision=revision) as watch:
            assert await take(watch, 1) == [change]


@trio_test
async def test_reading_and_then_watching_misses_nothing(lab):
    key = lab.prefix + "counter"
    async with aclosing(lab.store()) as store, aclosing(lab.store()) as writer, trio.open_nursery() as nursery:
        async def count() -> None:
            for n in range(1, 101):
                await put(writer, key, b"%d" % n)

        nursery.start_soon(count)
        while not (snapshot := await store.read(lab.prefix, deadline_s=S)).entries:
            pass
        seen = [int(snapshot.entries[key].value)]
        async with store.watch(lab.prefix, after_revision=snapshot.revision) as watch:
            while seen[-1] < 100:
                seen.extend(int(change.entries[key].value) for change in await take(watch, 1))
        assert seen == list(range(seen[0], 101))


@trio_test
async def test_a_watch_into_compacted_history_says_where_it_begins(lab):
    key = lab.prefix + "k"
    async with aclosing(lab.store()) as store:
        written = [await put(store, key, b"%d" % n) for n in range(10)]
        await store.compact(written[5], deadline_s=S)
        await store.compact(written[5], deadline_s=S)  # done is done
        with pytest.raises(Compacted) as caught:
            async with store.watch(lab.prefix, after_revision=written[0]) as watch:
                await take(watch, 1)
        assert caught.value.revision == written[5]
        snapshot = await store.read(lab.prefix, deadline_s=S)
        assert snapshot.entries[key].value == b"9"
        async with store.watch(lab.prefix, after_revision=written[5]) as watch:
            assert [change.revision for change in await take(watch, 4)] == written[6:]
    async with aclosing(lab.store()) as other:
        capacity = await other.capacity(deadline_s=S)
        assert capacity.compact_revision == written[5]
        assert capacity.used_bytes > 0
        assert capacity.alarms == ()


@trio_test
async def test_a_silent_watch_and_a_call_end_when_they_are_cancelled_and_the_store_goes_on(lab):
    async with aclosing(lab.store()) as store:
        revision = await put(store, lab.prefix + "k", b"v")
        for _ in range(20):
            with trio.move_on_after(0.01) as scope:
                async with store.watch(lab.prefix, after_revision=revision) as watch:
                    await take(watch, 1)
            assert scope.cancelled_caught
            with trio.CancelScope() as scope:
                scope.cancel()
                await store.read(lab.prefix, deadline_s=S)
            assert scope.cancelled_caught
        assert (await store.read(lab.prefix, deadline_s=S)).entries[lab.prefix + "k"].value == b"v"
        assert (await attempt(store, Compare(key=lab.prefix + "k", revision=revision))).succeeded


@trio_test
async def test_no_time_is_unreachable(lab):
    async with aclosing(lab.store()) as store:
        with pytest.raises(DcsUnreachable):
            await store.read(lab.prefix, deadline_s=0)
