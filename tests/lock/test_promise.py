"""Accepting a failsafe ping is a promise: when it is given, how long it binds, that a restart does not undo it, and that
no take-over and no promise can ever pass each other."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import trio
from lock_world import Node, TrioClock, others_record, run, write
from msgspec.structs import replace

from pgha.clock import Instant
from pgha.dcs.keys import LOCK
from pgha.dcs.memory import MemoryWorld
from pgha.errors import DcsUnreachable, Refused
from pgha.lock.promise import FILE, Promises, Receiver, judge
from pgha.model.failsafe import Ping, Promise
from pgha.model.lock import Licence, LicenceState

NOW = Instant(1_000_000_000_000, 1_000_000_000_000)
PING = Ping(name="z", conn_url="postgres://z/postgres", api_url="http://z:8008/patroni", slots={"a": 5}, to="a", incarnation="run-z", sequence=9, epoch=4, ttl_s=30.0)
HERE = Receiver(name="a", failsafe_mode=True, leads=False, licence=Licence(), epoch=4, epoch_holder="z", ttl_s=30.0)
VALID = Licence(state=LicenceState.HELD, valid_until=NOW.plus_s(1), epoch=3)
GIVEN = Promise(name="z", accepted_at=NOW.plus_s(-10), ttl_s=30.0, incarnation="run-z", epoch=4, sequence=7)


@pytest.mark.parametrize(("why", "ping", "here", "before", "status"), [
    ("healthy", {}, {}, None, 200),
    ("the mode is off", {}, {"failsafe_mode": False}, None, 502),
    ("meant for another, whose address this was", {"to": "b"}, {}, None, 409),
    ("a Patroni says not for whom", {"to": ""}, {}, None, 200),
    ("from this very name", {"name": "a"}, {}, None, 409),
    ("a primary runs here", {}, {"leads": True}, None, 500),
    ("the lock is held here", {}, {"licence": VALID}, None, 500),
    ("it was held, and has ended", {}, {"licence": replace(VALID, valid_until=NOW)}, None, 200),
    ("it is being given back", {}, {"licence": replace(VALID, state=LicenceState.RELEASING)}, None, 500),
    ("it was given back, without an answer, and has ended", {}, {"licence": replace(VALID, state=LicenceState.RELEASING, valid_until=NOW)}, None, 200),
    ("it was lost", {}, {"licence": Licence(state=LicenceState.LOST)}, None, 200),
    ("a take-over is under way", {}, {"licence": Licence(state=LicenceState.ACQUIRING)}, None, 409),
    ("an epoch that is over", {"epoch": 3}, {}, None, 409),
    ("an epoch that is over by an earlier ping", {}, {}, replace(GIVEN, epoch=5), 409),
    ("an epoch that is over by an earlier ping, whose promise is over, too", {}, {}, replace(GIVEN, epoch=5, accepted_at=NOW.plus_s(-31)), 200),
    ("an epoch that this node has not seen yet", {"epoch": 5}, {}, None, 200),
    ("another's epoch", {"name": "y"}, {}, None, 409),
    ("a Patroni says no epoch", {"epoch": None, "name": "y"}, {}, None, 200),
    ("nobody's epoch yet", {}, {"epoch_holder": ""}, None, 200),
    ("no time", {"ttl_s": 0.0}, {}, None, 400),
    ("so long that there would be no failover", {"ttl_s": 86400.0}, {}, None, 400),
    ("a ttl that was raised, and is not known here yet", {"ttl_s": 90.0}, {}, None, 200),
    ("a little more than that", {"ttl_s": 90.1}, {}, None, 400),
    ("the ttl of this cluster is long", {"ttl_s": 300.0}, {"ttl_s": 300.0}, None, 200),
    ("so long by this node's own word of before", {"ttl_s": 90.1}, {}, replace(GIVEN, ttl_s=90.0), 400),
    ("no number", {"ttl_s": float("nan")}, {}, None, 400),
], ids=lambda value: value if isinstance(value, str) else "")
def test_when_it_is_given(why, ping, here, before, status):
    verdict = judge(replace(PING, **ping), replace(HERE, **here), before, NOW)
    assert (verdict.status, verdict.promise is not None) == (status, status == 200), (why, verdict)


def test_it_binds_for_the_pings_ttl_and_drift_on_a_candidates_clock():
    promise = judge(PING, HERE, None, NOW).promise
    assert promise == Promise(name="z", accepted_at=NOW, ttl_s=30.0, incarnation="run-z", epoch=4, sequence=9, conn_url="postgres://z/postgres",
                              api_url="http://z:8008/patroni", slots={"a": 5})
    assert promise.left_s(NOW) == pytest.approx(30.3)
    suspended = Instant(NOW.boot_ns + 10**12, NOW.raw_ns + 10**9)
    assert promise.left_s(suspended) == pytest.approx(29.3), "a suspend must not shorten it"


def test_a_patronis_ping_binds_for_the_longest_ttl_that_it_may_mean():
    promise = judge(replace(PING, ttl_s=None, epoch=None), replace(HERE, ttl_s=40.0), None, NOW).promise
    assert (promise.ttl_s, promise.epoch) == (40.0, 4)


def test_a_later_promise_never_shortens_an_earlier_one():
    promise = judge(replace(PING, ttl_s=5.0), HERE, GIVEN, NOW).promise
    assert promise.left_s(NOW) == pytest.approx(GIVEN.left_s(NOW)) == pytest.approx(20.3)


@pytest.mark.parametrize(("record", "binds"), [
    (None, True),
    (replace(others_record(), sequence=7), True),           # written before it asked, or the one whose answer was lost
    (replace(others_record(), sequence=8), False),          # written after it had asked: the record says when it ends
    (replace(others_record(), sequence=8, incarnation="run-z-again"), True),
    (replace(others_record("y"), sequence=99), True),
])
def test_only_a_later_record_of_the_same_process_supersedes_it(record, binds):
    assert GIVEN.binds(record, NOW) is binds
    assert not GIVEN.binds(record, NOW.plus_s(20.31))


def test_a_patronis_promise_is_superseded_by_no_record():
    assert replace(GIVEN, incarnation="").binds(replace(others_record(), sequence=99, incarnation=""), NOW)


# --- the renewer and the promise ---------------------------------------------------------------------------------------

class Candidate(Node):
    """A node whose renewer knows its promises."""

    def __init__(self, world: MemoryWorld, directory: Path, **options) -> None:
        super().__init__(world, **options)
        self.directory = directory
        self.promises = self.renewer.promises = Promises(directory, self.clock, boot_id="boot", unknown_ttl_s=0.0)

    def ping(self, **changes):
        """As the agent does: with the licence as it is at this very moment."""
        return self.promises.accept(replace(PING, epoch=9, **changes), replace(HERE, licence=self.licence, epoch_holder=""))


def candidate(tmp_path: Path, steps) -> None:
    async def main() -> None:
        world = MemoryWorld(TrioClock())
        write(world, LOCK, others_record())
        node = Candidate(world, tmp_path)
        async with trio.open_nursery() as nursery:
            await nursery.start(node.renewer.run)
            await steps(node, nursery)
            nursery.cancel_scope.cancel()
    run(main)


def test_who_has_promised_sends_nothing(tmp_path):
    async def steps(node: Candidate, _nursery) -> None:
        assert node.ping(ttl_s=5.0).status == 200
        await trio.sleep(5.04)
        with pytest.raises(Refused, match="promised to z"):
            await node.renewer.acquire(node.take(), deadline_s=2)
        assert (node.store.writes, node.licence.state) == ([], LicenceState.NONE)
        await trio.sleep(0.02)
        await node.renewer.acquire(node.take(), deadline_s=2)
        assert node.licence.state is LicenceState.HELD
    candidate(tmp_path, steps)


def test_a_readoption_is_refused_as_well(tmp_path):
    async def steps(node: Candidate, _nursery) -> None:
        assert node.ping().status == 200
        with pytest.raises(Refused, match="promised"):
            await node.renewer.acquire(node.take(readopt=True), deadline_s=2)
    candidate(tmp_path, steps)


def test_a_new_clusters_birth_takes_nothing_from_anybody(tmp_path):
    async def steps(node: Candidate, _nursery) -> None:
        node.promises.promise = Promise(name="", accepted_at=node.clock.now(), ttl_s=30.0)
        await node.renewer.acquire(replace(node.take(), initialize_revision=0, initialize_value="7123456789012345678"), deadline_s=2)
        assert node.licence.state is LicenceState.HELD
    candidate(tmp_path, steps)


def test_a_promise_that_is_over_does_not_bind_beside_the_next_leaders_record(tmp_path):
    """The store is back, its leader has renewed and hands over at once: to this node, or to another that it is to follow."""
    async def steps(node: Candidate, _nursery) -> None:
        assert node.ping().status == 200
        released = replace(others_record(), sequence=10, mode="released")
        write(node.world, LOCK, released)
        await node.renewer.acquire(node.take(), deadline_s=2)
        assert node.promises.binding(node.record) is None
        assert Promises(node.directory, node.clock, boot_id="boot", unknown_ttl_s=0.0).promise is None, "nor after a restart"
    candidate(tmp_path, steps)


def test_no_cluster_is_born_beside_a_leader_that_asked(tmp_path):
    """The store was emptied; its leader leads on by the others' word, this node's too."""
    async def steps(node: Candidate, _nursery) -> None:
        assert node.ping().status == 200
        with pytest.raises(Refused, match="promised to z"):
            await node.renewer.acquire(replace(node.take(), initialize_revision=0, initialize_value="7123456789012345678"), deadline_s=2)
    candidate(tmp_path, steps)


def test_what_its_leader_has_released_since_is_free(tmp_path):
    async def steps(node: Candidate, _nursery) -> None:
        assert node.ping().status == 200
        write(node.world, LOCK, replace(others_record(), sequence=10, mode="released"))
        await node.renewer.acquire(node.take(), deadline_s=2)
        assert node.licence.state is LicenceState.HELD
    candidate(tmp_path, steps)


@pytest.mark.parametrize("arrives", [True, False])
def test_nothing_is_promised_while_a_take_over_is_under_way(tmp_path, arrives):
    """At every moment between its decision and its being settled, whether it arrives or not."""
    async def steps(node: Candidate, nursery) -> None:
        node.store.delay_s = 0.5
        if not arrives:
            node.store.lose_requests = 1
        answers = []

        async def take() -> None:
            try:
                await node.renewer.acquire(node.take(), deadline_s=2)
            except DcsUnreachable:
                pass
        nursery.start_soon(take)
        await trio.sleep(0.01)
        while node.licence.state is LicenceState.ACQUIRING:
            answers.append(node.ping().status)
            await trio.sleep(0.05)
        assert answers
        assert set(answers) == {409}
        assert node.licence.state is (LicenceState.HELD if arrives else LicenceState.NONE)
        assert node.ping().status == (500 if arrives else 200)
    candidate(tmp_path, steps)


def test_what_was_given_up_and_arrives_after_the_promise_licenses_nobody(tmp_path):
    """The record is this node's then; it has no licence by it, and may not adopt it before the promise ends."""
    async def steps(node: Candidate, nursery) -> None:
        late = node.take()
        node.store.lose_requests = 1
        with pytest.raises(DcsUnreachable):
            await node.renewer.acquire(late, deadline_s=2)
        while node.licence.state is LicenceState.ACQUIRING:
            await trio.sleep(0.1)
        sent = node.store.writes[0][1]
        assert node.ping().status == 200
        write(node.world, LOCK, sent)
        await trio.sleep(1)
        assert node.licence.state is LicenceState.NONE
        with pytest.raises(Refused, match="promised"):
            await node.renewer.acquire(node.take(readopt=True), deadline_s=2)
        again = Candidate(node.world, node.directory, run_of="2")
        with pytest.raises(Refused, match="promised"):
            await again.renewer.acquire(again.take(readopt=True), deadline_s=2)
    candidate(tmp_path, steps)


# --- restarts ----------------------------------------------------------------------------------------------------------

class Standing:
    def __init__(self, at: Instant) -> None:
        self.at = at

    def now(self) -> Instant:
        return self.at

    def wall_s(self) -> float:
        return 0.0


def test_a_restarted_agent_is_bound_by_it(tmp_path):
    Promises(tmp_path, Standing(NOW), boot_id="boot", unknown_ttl_s=0.0).accept(PING, HERE)
    again = Promises(tmp_path, Standing(NOW.plus_s(30.2)), boot_id="boot", unknown_ttl_s=30.0)
    assert again.binding(others_record()).name == "z"
    assert Promises(tmp_path, Standing(NOW.plus_s(30.4)), boot_id="boot", unknown_ttl_s=30.0).binding(others_record()) is None


def test_after_a_boot_it_counts_in_full(tmp_path):
    Promises(tmp_path, Standing(NOW), boot_id="boot", unknown_ttl_s=0.0).accept(PING, HERE)
    booted = Standing(Instant(10**9, 10**9))
    again = Promises(tmp_path, booted, boot_id="another", unknown_ttl_s=0.0)
    assert again.promise.left_s(booted.at) == pytest.approx(30.3)


def test_after_a_boot_that_took_it_away_one_is_assumed_once(tmp_path):
    booted = Standing(NOW)
    first = Promises(tmp_path, booted, boot_id="boot", unknown_ttl_s=30.0)
    assert (first.promise.name, first.promise.left_s(NOW)) == ("", pytest.approx(30.3))
    booted.at = NOW.plus_s(25)
    assert Promises(tmp_path, booted, boot_id="boot", unknown_ttl_s=30.0).promise.left_s(booted.at) == pytest.approx(5.3)


def test_an_agent_that_is_only_restarted_assumes_nothing(tmp_path):
    assert Promises(tmp_path, Standing(NOW), boot_id="boot", unknown_ttl_s=0.0).promise is None
    assert Promises(tmp_path, Standing(NOW), boot_id="boot", unknown_ttl_s=30.0).promise is None


@pytest.mark.parametrize("text", [b"", b"{", b'{"boot_id":"boot","promise":{"name":"z"}}', b"\xff"])
def test_a_damaged_file_is_no_freedom(tmp_path, text):
    (tmp_path / FILE).write_bytes(text)
    assert Promises(tmp_path, Standing(NOW), boot_id="boot", unknown_ttl_s=0.0).promise.left_s(NOW) == pytest.approx(30.3)


def test_what_cannot_be_written_down_is_not_promised(tmp_path):
    promises = Promises(tmp_path, Standing(NOW), boot_id="boot", unknown_ttl_s=0.0)
    gone = Promises(tmp_path / "gone", Standing(NOW), boot_id="boot", unknown_ttl_s=0.0)
    assert promises.accept(PING, HERE).status == 200
    assert (gone.accept(PING, HERE).status, gone.promise) == (503, None)


def test_the_file_is_private(tmp_path):
    Promises(tmp_path, Standing(NOW), boot_id="boot", unknown_ttl_s=0.0).accept(PING, HERE)
    assert (tmp_path / FILE).stat().st_mode & 0o777 == 0o600
    assert json.loads((tmp_path / FILE).read_text())["promise"]["name"] == "z"
