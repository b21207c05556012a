"""What the store says: how old a record is, since when there is none, whether the store is the same, what wakes the loop."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import trio
from observe_world import KEYS, Scene, member, record, run, until

from pgha.clock import Instant
from pgha.config.state import Remembered, RememberedMember, StoreGeneration, load_remembered, save_remembered
from pgha.dcs import Put
from pgha.dcs.keys import LOCK, UNREADABLE_LOCK, encode
from pgha.errors import DcsUnreachable


def at(seconds: float) -> Instant:
    return Instant(round(seconds * 1e9), round(seconds * 1e9))


def observed(tmp_path: Path, main, *, threads: bool = False, **facts) -> None:
    """Run `main(scene)` beside a running observer; `facts`: what its state directory holds."""
    if facts:
        save_remembered(tmp_path, Remembered(**facts))

    async def body() -> None:
        scene = Scene(tmp_path)
        async with trio.open_nursery() as nursery:
            await nursery.start(scene.observer.run)
            await main(scene)
            nursery.cancel_scope.cancel()

    run(body, threads=threads)


# --- how old is the lock record? -------------------------------------------------------------------------------------


def test_a_record_found_at_the_start_is_as_old_as_our_first_look(tmp_path: Path):
    async def main() -> None:
        scene = Scene(tmp_path)
        revision = scene.renew()
        await trio.sleep(100)      # it has stood there for long, but who knows
        scene.link.late_s = 0.5
        await scene.observer.read()
        seen = scene.facts.lock_seen
        assert (seen.revision, seen.record, seen.value) == (revision, record(), encode(record()))
        assert seen.since == at(trio.current_time()), "from when the answer was here, not from when it was asked for"
        assert seen.absent_since is None

    run(main)


def test_every_renewal_begins_a_new_age_by_watch_and_by_read(tmp_path: Path):
    async def main(scene: Scene) -> None:
        await until(lambda: scene.facts.view is not None, 1)
        await trio.sleep(1)
        for sequence in range(1, 5):
            begun = trio.current_time()
            revision = scene.renew(sequence)
            await scene.seen()
            seen = scene.facts.lock_seen
            assert seen.revision == revision
            assert at(begun) <= seen.since <= at(begun + 0.01)
            await trio.sleep(1.5)
            scene.put("status", {"optime": sequence})          # another key's news
            await scene.seen()
            await scene.observer.read()                          # the same record read again
            assert scene.facts.lock_seen == seen
        scene.link.mute = True
        scene.renew(5)
        await trio.sleep(0.5)
        assert scene.facts.lock_seen.record.sequence == 4
        await scene.observer.read()
        assert (scene.facts.lock_seen.record.sequence, scene.facts.lock_seen.since) == (5, at(trio.current_time()))

    observed(tmp_path, main)


def test_an_unreadable_record_is_somebodys(tmp_path: Path):
    async def main(scene: Scene) -> None:
        scene.put(LOCK, b"\xff garbage")
        await until(lambda: scene.facts.view is not None, 1)
        await scene.seen()
        first = scene.facts.lock_seen
        assert first.record is UNREADABLE_LOCK
        assert first.absent_since is None
        await scene.observer.read()
        assert scene.facts.lock_seen == first, "its age counts as any other's"
        assert scene.facts.remembered_ttl_s == 0.0, "what does not parse has no ttl to remember"

    observed(tmp_path, main)


def test_absence_counts_only_by_linearizable_reads_and_from_the_first_ones_answer(tmp_path: Path):
    async def main(scene: Scene) -> None:
        await until(lambda: scene.facts.view is not None, 1)
        assert scene.facts.lock_seen.absent_since == at(0)
        await trio.sleep(3)
        await scene.observer.read()
        assert scene.facts.lock_seen.absent_since == at(0), "an unbroken row"
        scene.renew()
        await scene.seen()
        assert scene.facts.lock_seen.absent_since is None
        scene.delete(LOCK)
        await scene.seen()
        assert scene.facts.lock_seen.record is None
        assert scene.facts.lock_seen.absent_since is None, "the watch alone proves no absence"
        scene.link.late_s = 0.5
        begun = trio.current_time()
        await scene.observer.read()
        assert scene.facts.read_at == at(begun)
        assert scene.facts.lock_seen.absent_since == at(begun + 0.5), "until then it may have been renewed"
        await scene.observer.read()
        assert scene.facts.lock_seen.absent_since == at(begun + 0.5)
        scene.renew(7)
        scene.delete(LOCK)                                       # gone again before anybody could read it
        await scene.seen()
        begun = trio.current_time()
        await scene.observer.read()
        assert scene.facts.lock_seen.absent_since == at(begun + 0.5), "it was there in between, as the watch has told"

    observed(tmp_path, main)


def test_a_read_that_the_watch_overtook_proves_no_absence(tmp_path: Path):
    """It found the lock; that the lock is gone is the watch's news, so the row begins with the next read."""
    async def main(scene: Scene) -> None:
        scene.renew()
        await until(lambda: scene.facts.view is not None, 1)
        await scene.seen()
        before = scene.facts.read_at
        scene.link.late_s = 1.0
        async with trio.open_nursery() as nursery:
            nursery.start_soon(scene.observer.read)
            await trio.sleep(0.5)
            scene.delete(LOCK)
        assert scene.facts.lock_seen.record is None
        assert (scene.facts.lock_seen.absent_since, scene.facts.read_at) == (None, before)

    observed(tmp_path, main)


def test_a_read_that_the_watch_overtook_is_no_older_store(tmp_path: Path):
    async def main(scene: Scene) -> None:
        scene.renew(1)
        await until(lambda: scene.facts.view is not None, 1)
        await scene.seen()
        scene.link.late_s = 1.0
        async with trio.open_nursery() as nursery:
            nursery.start_soon(scene.observer.read)
            await trio.sleep(0.5)
            scene.renew(2)
        assert (scene.facts.trusted_from, scene.facts.generation_changed) == (None, "")
        assert scene.facts.view.lock.sequence == 2

    observed(tmp_path, main)


# --- is it still the same store? -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("remembered_ttl_s", "configured_ttl_s", "for_s"), [(20, 20, 30 * 1.01), (60, 20, 60 * 1.01), (20, 45, 45 * 1.01)])
@pytest.mark.parametrize("how", ["another cluster", "a backup"])
def test_a_rebuilt_or_restored_store_is_untrusted_for_the_longest_ttl(tmp_path: Path, how: str, remembered_ttl_s: float, configured_ttl_s: float, for_s: float):
    async def main(scene: Scene) -> None:
        scene.ttl_s = configured_ttl_s
        await until(lambda: scene.facts.view is not None, 1)
        backup = scene.world.save()
        scene.renew(ttl_s=float(remembered_ttl_s))
        await scene.seen()
        await scene.observer.read()
        assert scene.facts.trusted_from is None
        if how == "a backup":
            scene.world.restore(backup)
        else:
            scene.world.restore(scene.world.save(), cluster_id="another")
        await until(lambda: scene.facts.trusted_from is not None, 2)
        now_s = trio.current_time()
        assert scene.facts.trusted_from[1] / 1e9 - now_s == pytest.approx(for_s, abs=0.02)
        assert ("another one" if how == "another cluster" else "went back") in scene.facts.generation_changed
        assert (scene.facts.view.lock is None) == (how == "a backup"), "what the store says now is seen all the same"
        await trio.sleep(for_s - 1)
        await scene.observer.read()
        assert scene.facts.trusted_from is not None
        await trio.sleep(1.1)
        await scene.observer.read()
        assert (scene.facts.trusted_from, scene.facts.generation_changed) == (None, "")

    observed(tmp_path, main)


def test_what_the_driver_noticed_between_two_answers_counts(tmp_path: Path):
    """A restored store that has caught up by the next read shows neither another id nor a lower revision."""
    async def main(scene: Scene) -> None:
        await until(lambda: scene.facts.view is not None, 1)
        await scene.observer.read()
        assert scene.facts.trusted_from is None
        scene.link.noticed += 1
        await scene.observer.read()
        assert scene.facts.trusted_from is not None
        assert "another or an older one" in scene.facts.generation_changed

    observed(tmp_path, main)


@pytest.mark.parametrize(("known", "trusted"), [
    (StoreGeneration(cluster_id="memory", revision=1), True),
    (StoreGeneration(cluster_id="", revision=0), True),
    (StoreGeneration(cluster_id="before", revision=1), False),
    (StoreGeneration(cluster_id="memory", revision=1000), False),
])
def test_the_store_is_compared_with_the_one_that_a_former_agent_knew(tmp_path: Path, known: StoreGeneration, trusted: bool):
    async def main(scene: Scene) -> None:
        await until(lambda: scene.facts.view is not None, 1)
        assert (scene.facts.trusted_from is None) == trusted, scene.facts.generation_changed
        if not trusted:
            assert scene.facts.trusted_from == at(40 * 1.01), "the ttl that was remembered is the longest here"

    observed(tmp_path, main, generation=known, ttl_s=40.0)


def test_a_backup_newer_than_the_last_read_but_older_than_the_watch_is_noticed(tmp_path: Path):
    """The watch has told of higher revisions than any read: those count, too (safety model 4)."""
    async def main(scene: Scene) -> None:
        await until(lambda: scene.facts.view is not None, 1)
        scene.renew(1)
        await scene.seen()
        backup = scene.world.save()
        for sequence in range(2, 10):
            scene.renew(sequence)
            await scene.seen()
            await trio.sleep(1)
        scene.world.restore(backup)
        await until(lambda: scene.facts.trusted_from is not None, 10)
        assert scene.facts.view.lock.sequence == 1

    observed(tmp_path, main)


def test_an_agent_that_is_restarted_meanwhile_finds_the_change_again(tmp_path: Path):
    async def first(scene: Scene) -> None:
        scene.renew(1)
        await until(lambda: scene.facts.view is not None, 1)
        await trio.sleep(15)
        assert load_remembered(tmp_path)[0].generation.cluster_id == "memory"
        scene.world.restore(scene.world.save(), cluster_id="another")
        await until(lambda: scene.facts.trusted_from is not None, 2)
        await trio.sleep(20)                                     # untrusted still: what is written down is the former store
        assert load_remembered(tmp_path)[0].generation.cluster_id == "memory"

    observed(tmp_path, first, threads=True)

    async def second() -> None:
        scene = Scene(tmp_path)
        scene.world.cluster_id = "another"
        await scene.observer.read()
        assert scene.facts.trusted_from is not None
        await trio.sleep(31)
        await scene.observer.read()
        assert scene.facts.trusted_from is None

    run(second)


def test_absence_is_not_continuous_over_an_outage(tmp_path: Path):
    async def main(scene: Scene) -> None:
        await until(lambda: scene.facts.view is not None, 1)
        assert scene.facts.lock_seen.absent_since == at(0)
        scene.client.link(requests_pass=False)
        with pytest.raises(DcsUnreachable):
            await scene.observer.read()
        assert scene.facts.lock_seen.absent_since is None, "who knows what stood there meanwhile"
        scene.client.link()
        begun = trio.current_time()
        await scene.observer.read()
        assert scene.facts.lock_seen.absent_since == at(begun)

    observed(tmp_path, main)


def test_a_record_recreated_at_the_same_revision_is_another_record(tmp_path: Path):
    async def main(scene: Scene) -> None:
        await until(lambda: scene.facts.view is not None, 1)
        backup = scene.world.save()
        scene.renew(1)
        await scene.seen()
        await scene.observer.read()
        await trio.sleep(5)
        scene.world.restore(backup)
        scene.renew(1, holder="c")
        await until(lambda: scene.facts.view.lock.holder == "c", 10)
        seen = scene.facts.lock_seen
        assert (seen.record.holder, seen.value) == ("c", encode(record(holder="c")))
        assert seen.since[1] / 1e9 >= 5

    observed(tmp_path, main)


# --- the watch comes back --------------------------------------------------------------------------------------------


def test_the_watch_goes_on_where_history_was_compacted_away(tmp_path: Path):
    async def main(scene: Scene) -> None:
        scene.renew(1)
        await until(lambda: scene.facts.view is not None, 1)
        scene.client.link(requests_pass=False, answers_pass=False)
        for sequence in range(2, 6):
            scene.renew(sequence)
        scene.world.compact(scene.world.revision)
        scene.client.link()
        await until(lambda: scene.facts.view.lock.sequence == 5, 1)
        scene.renew(6)
        await scene.seen()
        assert scene.facts.view.lock.sequence == 6

    observed(tmp_path, main)


def test_the_watch_goes_on_after_the_stream_ended(tmp_path: Path):
    async def main(scene: Scene) -> None:
        scene.renew(1)
        await until(lambda: scene.facts.view is not None, 1)
        await scene.seen()
        await scene.observer.read()
        scene.world.restore(scene.world.save())                  # the same content: only the streams end
        await until(lambda: scene.link.watches == 2, 2)
        assert scene.facts.trusted_from is None
        assert scene.facts.unreachable_since is None, "a read that is answered says so"
        scene.renew(2)
        await scene.seen()

    observed(tmp_path, main)


def test_a_silent_stream_is_compared_with_a_read(tmp_path: Path):
    async def main(scene: Scene) -> None:
        scene.renew(1)
        await until(lambda: scene.facts.view is not None, 1)
        await scene.seen()
        scene.link.mute = True
        scene.renew(2)
        silence_s = 2.5 * scene.loop_wait_s + 1
        await until(lambda: scene.facts.view.lock.sequence == 2, silence_s + 0.5)
        scene.link.mute = False
        scene.renew(3)
        await until(lambda: scene.facts.view.lock.sequence == 3, 0.5)

    observed(tmp_path, main)


def test_an_outage_is_known_with_its_beginning_and_its_end(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    async def main(scene: Scene) -> None:
        assert scene.facts.unreachable_since == at(0), "nothing was heard yet"
        await until(lambda: scene.facts.view is not None, 1)
        assert scene.facts.unreachable_since is None
        await trio.sleep(1)
        scene.client.link(requests_pass=False)
        wakes = scene.wakes
        with pytest.raises(DcsUnreachable):
            await scene.observer.read()
        since = scene.facts.unreachable_since
        assert since == at(trio.current_time())
        assert scene.wakes == wakes + 1, "the loop is told at once"
        assert scene.facts.view is not None
        assert "no answer within 1.5 s" in scene.facts.why
        heard_at, read_at = scene.facts.heard_at, scene.facts.read_at
        await trio.sleep(60)
        assert (scene.facts.unreachable_since, scene.facts.heard_at, scene.facts.read_at) == (since, heard_at, read_at)
        assert scene.wakes == wakes + 1
        scene.client.link()
        await until(lambda: scene.facts.unreachable_since is None, 2)
        assert scene.facts.why == ""

    with caplog.at_level("INFO", logger="pgha.dcs"):
        observed(tmp_path, main)
    assert caplog.messages.count("the store does not answer") == 1
    assert caplog.messages.count("the store answers again") == 1


# --- what outlives the agent -----------------------------------------------------------------------------------------


def test_members_ttl_and_generation_are_kept_but_not_more_often_than_every_ten_seconds(tmp_path: Path):
    file = tmp_path / "memory.json"

    async def main(scene: Scene) -> None:
        scene.put("initialize", b"7711161683783831200")
        scene.put("members/b", member("b"))
        inodes = []
        for second in range(35):
            scene.renew(second + 1, ttl_s=25.0)
            scene.put("members/b", member("b", xlog_location=100 + second))
            await trio.sleep(1)
            if file.exists() and (not inodes or inodes[-1] != file.stat().st_ino):
                inodes.append(file.stat().st_ino)
        assert 2 <= len(inodes) <= 4, inodes                    # each write is a new file
        await until(lambda: load_remembered(tmp_path)[0].members["b"].lsn == 134, 15, every_s=1)
        kept, problem = load_remembered(tmp_path)
        assert problem == ""
        assert (kept.ttl_s, kept.system_identifier, kept.generation.cluster_id) == (25.0, "7711161683783831200", "memory")
        assert kept.members["b"].api_url == "http://b:8008/patroni"
        assert kept.members["b"].timeline == 2

    observed(tmp_path, main, threads=True)

    async def later() -> None:
        scene = Scene(tmp_path)
        assert scene.facts.remembered_ttl_s == 25.0
        assert scene.facts.remembered_members == {"b": "http://b:8008/patroni"}
        assert (scene.facts.last_positions["b"].lsn, scene.facts.last_positions["b"].timeline) == (134, 2)
        assert scene.facts.view is None, "what is remembered is no view"

    run(later)


def test_a_member_that_stopped_is_remembered_with_what_it_had(tmp_path: Path):
    """Its key says no position any more, and then goes: a candidate that lags waits for it all the same (safety model 6)."""
    async def main(scene: Scene) -> None:
        scene.put("members/b", member("b", xlog_location=500))
        await until(lambda: scene.facts.view is not None, 1)
        await trio.sleep(61)
        scene.put("members/b", member("b", state="stopped", xlog_location=None, timeline=None))
        await scene.seen()
        scene.delete("members/b")
        await scene.seen()
        assert scene.facts.last_positions["b"].lsn == 500
        await until(lambda: load_remembered(tmp_path)[0].members["b"].seen_at_wall_s > 1_000_060, 15, every_s=1)
        kept = load_remembered(tmp_path)[0].members["b"]
        assert (kept.lsn, kept.timeline) == (500, 2)

    observed(tmp_path, main, threads=True)


def test_an_idle_store_has_nothing_written_down(tmp_path: Path):
    async def main(scene: Scene) -> None:
        scene.put("members/b", member("b"))
        await trio.sleep(15)
        file = (tmp_path / "memory.json").stat().st_ino
        for _ in range(10):
            await scene.observer.read()
            await trio.sleep(2)
        assert load_remembered(tmp_path)[0].members["b"].lsn == 100
        assert (tmp_path / "memory.json").stat().st_ino == file

    observed(tmp_path, main, threads=True)


def test_a_members_slot_is_remembered_as_long_as_the_member_and_by_who_came_later_from_then_on(tmp_path: Path):
    """Status naming a slot is the leader's word, and may be the own one of a moment ago: it begins no new time."""
    async def main(scene: Scene) -> None:
        scene.slots_ttl_s = 100.0
        scene.put("members/b", member("b"))
        await until(lambda: "b" in scene.facts.remembered_members, 1)
        await trio.sleep(8)
        scene.put("status", {"optime": 1, "slots": {}, "retain_slots": ["b", "gone", "No slot"]})
        await until(lambda: scene.facts.remembered_slots == ("b", "gone"), 1)
        scene.delete("members/b")
        await trio.sleep(95)
        await scene.observer.read()
        assert scene.facts.remembered_slots == ("gone",), "b was last seen before this node saw the other"
        await trio.sleep(10)
        await scene.observer.read()
        assert scene.facts.remembered_slots == ()
        await trio.sleep(150)
        await scene.observer.read()
        assert scene.facts.remembered_slots == (), "status still names them"
        scene.put("status", {"optime": 1, "slots": {}, "retain_slots": []})
        await scene.observer.read()
        scene.put("status", {"optime": 2, "slots": {}, "retain_slots": ["gone"]})
        await until(lambda: scene.facts.remembered_slots == ("gone",), 1)

    observed(tmp_path, main)


def test_members_are_forgotten_after_member_slots_ttl(tmp_path: Path):
    async def main(scene: Scene) -> None:
        scene.slots_ttl_s = 100.0
        scene.put("members/b", member("b"))
        await until(lambda: "b" in scene.facts.remembered_members, 1)
        assert set(scene.facts.remembered_members) == {"b", "fresh"}
        scene.delete("members/b")
        await trio.sleep(60)
        await scene.observer.read()
        assert "b" in scene.facts.remembered_members, "its key is gone, the member is silent"
        await trio.sleep(60)
        await scene.observer.read()
        assert set(scene.facts.remembered_members) == set()
        assert scene.facts.last_positions["b"].lsn == 100

    observed(tmp_path, main, members={"old": RememberedMember(api_url="http://old/", seen_at_wall_s=999_000.0),
                                       "fresh": RememberedMember(api_url="http://fresh/", seen_at_wall_s=999_990.0)})


def test_a_damaged_memory_means_nothing_is_remembered(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    (tmp_path / "memory.json").write_bytes(b'{"ttl_s": "x"')

    async def main(scene: Scene) -> None:
        await until(lambda: scene.facts.view is not None, 1)
        assert scene.facts.remembered_ttl_s == 0.0

    observed(tmp_path, main)
    assert "remembered facts could not be read" in caplog.messages


def test_a_disk_that_hangs_holds_up_the_saving_and_nothing_else(tmp_path: Path):
    """Opening a pipe that nobody reads blocks, as a hung disk does."""
    blocked = tmp_path / ".memory.json.new"
    os.mkfifo(blocked)

    async def main(scene: Scene) -> None:
        scene.put("members/b", member("b"))
        for sequence in range(1, 40):
            scene.renew(sequence)
            await scene.seen()
            assert scene.facts.lock_seen.record.sequence == sequence
            await trio.sleep(1)
        assert not (tmp_path / "memory.json").exists()
        reader = os.open(blocked, os.O_RDONLY | os.O_NONBLOCK)   # the hung write ends: with an error, it is a pipe
        blocked.unlink()
        await until((tmp_path / "memory.json").exists, 30, every_s=1)
        os.close(reader)
        assert "b" in load_remembered(tmp_path)[0].members

    observed(tmp_path, main, threads=True)


def test_a_disk_that_refuses_is_reported_and_nothing_else(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    (tmp_path / ".memory.json.new").mkdir()

    async def main(scene: Scene) -> None:
        scene.put("members/b", member("b"))
        await trio.sleep(5)
        scene.renew(1)
        await scene.seen()

    observed(tmp_path, main, threads=True)
    assert "remembered facts could not be written" in caplog.messages


# --- what wakes the loop ---------------------------------------------------------------------------------------------

WAKING = [
    ("another holder", LOCK, record(2, holder="c"), True),
    ("another incarnation", LOCK, record(2, incarnation="run-b-2"), True),
    ("released", LOCK, record(2, mode="released"), True),
    ("another ttl", LOCK, record(2, ttl_s=10.0), True),
    ("a renewal", LOCK, record(2), False),
    ("a renewal with a position", LOCK, record(2, lsn=500, timeline=3), False),
    ("unreadable", LOCK, b"x", True),
    ("absent", LOCK, None, True),
    ("config", "config", {"ttl": 30}, True),
    ("failover", "failover", {"member": "b"}, True),
    ("sync", "sync", {"leader": "b"}, True),
    ("history", "history", [], True),
    ("failsafe", "failsafe", {}, True),
    ("initialize", "initialize", b"7711161683783831200", True),
    ("leader", "leader", b"c", True),
    ("epoch", "pgha/epoch", {"number": 3, "holder": "b", "incarnation": "x"}, True),
    ("status", "status", {"optime": 5}, False),
    ("an unknown key", "pgha/other", b"x", False),
    ("a new member", "members/c", member("c"), True),
    ("a member gone", "members/b", None, True),
    ("a member's position", "members/b", member("b", xlog_location=999), False),
    ("a member's state", "members/b", member("b", state="stopped"), True),
    ("a member's role", "members/b", member("b", role="primary"), True),
    ("a member's tags", "members/b", member("b", tags={"nofailover": True}), True),
    ("a member's timeline", "members/b", member("b", timeline=3), True),
    ("a member's address", "members/b", member("b", api_url="http://elsewhere:8008/patroni"), True),
    ("a member has seen the pause", "members/b", member("b", pause=True), True),
    ("my own key", "members/a", member("a", state="stopped"), False),
]


@pytest.mark.parametrize(("key", "value", "wakes"), [row[1:] for row in WAKING], ids=[row[0] for row in WAKING])
def test_only_what_matters_wakes_the_loop(tmp_path: Path, key: str, value, wakes: bool):
    async def main(scene: Scene) -> None:
        scene.renew(1)
        scene.put("members/a", member("a"))
        scene.put("members/b", member("b"))
        await until(lambda: scene.facts.view is not None, 1)
        await scene.seen()
        before = scene.wakes
        if value is None:
            scene.delete(key)
        else:
            scene.put(key, value)
        await scene.seen()
        assert scene.wakes - before == (1 if wakes else 0)

    observed(tmp_path, main)


def test_other_clusters_keys_are_none_of_ours(tmp_path: Path):
    async def main(scene: Scene) -> None:
        await until(lambda: scene.facts.view is not None, 1)
        before = scene.wakes
        scene.world.transact([], [Put(key="/service/demo2/leader", value=b"x")])
        await trio.sleep(1)
        await scene.observer.read()
        assert scene.facts.view.leader == ""
        assert set(scene.facts.view.revisions) == set()
        assert scene.wakes == before + 1

    observed(tmp_path, main)


# --- garbage, and the store's capacity -------------------------------------------------------------------------------


def test_what_cannot_be_read_is_named_once(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    async def main(scene: Scene) -> None:
        scene.put("config", b"{not json")
        await until(lambda: scene.facts.view is not None, 1)
        for sequence in range(1, 4):
            scene.renew(sequence)
            await scene.seen()
        assert scene.facts.view.config is None
        assert scene.facts.view.problems == ("config: is not JSON; treated as absent",)

    observed(tmp_path, main)
    assert caplog.messages.count("store holds what cannot be read") == 1


def test_garbage_in_any_key_does_not_end_the_observer(tmp_path: Path):
    hostile = [b"", b"\xff", b"null", b"[", b"[1,2", b'"x"', b"-1", json.dumps({"leader": 5, "members": [1]}).encode()]

    async def main(scene: Scene) -> None:
        await until(lambda: scene.facts.view is not None, 1)
        for value in hostile:
            for key in ("initialize", "config", "leader", "status", "failover", "sync", "history", "failsafe", "members/b", LOCK, "pgha/epoch"):
                scene.put(key, value)
                await scene.seen()

    observed(tmp_path, main)


def test_the_leader_asks_how_full_the_store_is(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    async def main(scene: Scene) -> None:
        leads = False
        async with trio.open_nursery() as nursery:
            nursery.start_soon(scene.observer.keep_capacity, lambda: leads)
            await trio.sleep(30)
            assert scene.facts.capacity is None, "only the leader asks"
            leads = True
            scene.world.quota_bytes = 150_000
            scene.put("big", b"x" * 60_000)
            await until(lambda: scene.facts.capacity is not None, 6)
            told = scene.facts.capacity
            assert told.quota_bytes == 150_000
            assert told.used_bytes >= 60_000
            assert (told.alarms, told.day_old_revision, told.compacted_at) == ((), 0, None)
            scene.put("big", b"x" * 60_000)                      # history counts
            scene.world.compact(2)
            await trio.sleep(301)
            assert scene.facts.capacity.alarms == ("NOSPACE",)
            assert scene.facts.capacity.compacted_at is not None
            scene.client.link(answers_pass=False)
            before = scene.facts.capacity
            await trio.sleep(400)
            assert scene.facts.capacity == before
            scene.client.link()
            await trio.sleep(86_000)
            await trio.sleep(4_000)
            assert 0 < scene.facts.capacity.day_old_revision <= scene.world.revision
            nursery.cancel_scope.cancel()

    observed(tmp_path, main)
    assert caplog.messages.count("the store fills up: let it compact itself (etcd: --auto-compaction-retention=1h) and defragment it") == 2
    assert caplog.messages.count("the store has raised an alarm") == 1


def test_the_whole_observer_uses_the_clusters_prefix() -> None:
    assert KEYS.path(LOCK) == "/service/demo/pgha/lock"
