"""The member key: leased, renewed in time, true soon, and no more often written than needed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import trio
from agent_world import KEYS, CountingStore, TrioClock, run, until
from msgspec import structs

from pgha.announce import RENEWED_AFTER, Announcer, member_value
from pgha.clock import Instant
from pgha.dcs import Delete, Entry
from pgha.dcs.keys import encode, member_from
from pgha.dcs.memory import MemoryWorld
from pgha.model.cluster import Tags
from pgha.model.decision import Decision, Memory
from pgha.model.lock import Identity
from pgha.model.node import DataDirectoryFacts, PostgresFacts, Row, WalReceiver
from pgha.model.observation import Observation, Settings
from pgha.model.request import ScheduledRestart
from pgha.model.wal import HistoryRow

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
PATH = KEYS.member("a")


class Scene:
    def __init__(self) -> None:
        self.clock = TrioClock()
        self.world = MemoryWorld(self.clock)
        self.store = CountingStore(self.world)
        self.ttl_s, self.loop_wait_s = 30.0, 10.0
        self.announcer = Announcer(store=self.store, keys=KEYS, name="a", clock=self.clock, ttl_s=lambda: self.ttl_s, loop_wait_s=lambda: self.loop_wait_s)

    @property
    def entry(self) -> Entry | None:
        return self.world.read(PATH).entries.get(PATH)

    @property
    def value(self) -> Any:
        return json.loads(self.entry.value) if self.entry else None

    def say(self, **fields: Any) -> None:
        self.announcer.announce({"state": "running", "role": "replica", "xlog_location": 1, **fields})


def announced(main, *, ttl_s: float = 30.0) -> None:
    async def body() -> None:
        scene = Scene()
        scene.ttl_s = ttl_s
        async with trio.open_nursery() as nursery:
            await nursery.start(scene.announcer.run)
            await main(scene)
            nursery.cancel_scope.cancel()

    run(body)


def test_the_key_is_leased_and_goes_with_the_agent():
    async def main() -> None:
        scene = Scene()
        async with trio.open_nursery() as nursery:
            await nursery.start(scene.announcer.run)
            await trio.sleep(5)
            assert scene.entry is None, "nothing is known to say yet"
            scene.say()
            await until(lambda: scene.entry is not None, 0.1)
            assert scene.entry.lease
            assert scene.value == {"state": "running", "role": "replica", "xlog_location": 1}
            await trio.sleep(300)
            assert scene.entry is not None
            nursery.cancel_scope.cancel()
        await trio.sleep(19)
        assert scene.entry is not None
        await trio.sleep(12)
        assert scene.entry is None

    run(main)


@pytest.mark.parametrize("ttl_s", [3.0, 5.0, 20.0, 30.0])
def test_the_lease_is_renewed_in_time(ttl_s: float):
    async def main(scene: Scene) -> None:
        scene.say()
        await trio.sleep(10 * ttl_s + 0.5)
        renewed = scene.store.times("renew")
        gaps = [b - a for a, b in zip([0.0, *renewed], renewed, strict=False)]
        assert len(scene.store.times("grant")) == 1
        assert 23 <= len(renewed) <= 25      # ten times ttl, two and a half renewals each
        assert max(gaps) <= ttl_s * RENEWED_AFTER + 0.02
        assert len(scene.store.times("write")) == 1, "nothing changed"

    announced(main, ttl_s=ttl_s)


def test_positions_are_written_once_every_loop_wait_and_the_last_one_is_not_lost():
    async def main(scene: Scene) -> None:
        for n in range(200):
            scene.say(xlog_location=n, replay_lsn=n, receive_lsn=n)
            await trio.sleep(0.25)
        writes = scene.store.times("write")
        assert 5 <= len(writes) <= 7, writes
        assert min(b - a for a, b in zip(writes, writes[1:], strict=False)) >= 9.4
        await trio.sleep(10)
        assert scene.value["xlog_location"] == 199

    announced(main)


@pytest.mark.parametrize("change", [{"state": "stopped"}, {"role": "primary"}, {"timeline": 5}, {"tags": {"nofailover": True}}, {"pause": True},
                                    {"replication_state": "streaming"}, {"pending_restart": True}, {"api_url": "http://x/patroni"}])
def test_any_other_change_is_written_at_once(change: dict[str, Any]):
    async def main(scene: Scene) -> None:
        scene.say()
        await trio.sleep(0.5)
        scene.say(xlog_location=2)
        await trio.sleep(0.5)
        assert scene.value["xlog_location"] == 1
        scene.say(xlog_location=3, **change)
        await trio.sleep(0.05)
        assert scene.value == {"state": "running", "role": "replica", "xlog_location": 3, **change}
        scene.say(xlog_location=3)
        await trio.sleep(0.05)
        assert scene.value == {"state": "running", "role": "replica", "xlog_location": 3}, "also a field that goes"

    announced(main)


def test_a_lost_lease_is_replaced_and_the_key_written_again():
    async def main(scene: Scene) -> None:
        scene.say()
        await until(lambda: scene.entry is not None, 1)
        lease = scene.entry.lease
        scene.world.revoke(lease)
        assert scene.entry is None
        await until(lambda: scene.entry is not None, 30 * RENEWED_AFTER + 0.1)
        assert scene.entry.lease not in (0, lease)
        scene.world.revoke(scene.entry.lease)
        scene.say(state="stopped")                              # the write itself finds out
        await until(lambda: scene.entry is not None, 0.1)
        assert scene.value["state"] == "stopped"

    announced(main)


@pytest.mark.parametrize(("before_s", "after_s"), [(30.0, 5.0), (5.0, 30.0)])
def test_another_ttl_means_another_lease(before_s: float, after_s: float):
    async def main(scene: Scene) -> None:
        scene.say()
        await trio.sleep(1)
        first = scene.entry.lease
        scene.ttl_s = after_s
        await trio.sleep(before_s * RENEWED_AFTER + 0.1)
        assert scene.entry.lease != first
        assert len(scene.store.times("grant")) == 2
        scene.store.link(requests_pass=False)
        await trio.sleep(after_s + 0.1)
        assert scene.entry is None

    announced(main, ttl_s=before_s)


def test_a_key_out_of_sight_is_written_again_but_not_one_too_young_to_be_seen():
    async def main(scene: Scene) -> None:
        scene.say()
        await trio.sleep(1)
        revision = scene.entry.revision
        scene.announcer.gone()                                   # the watch is slow
        await trio.sleep(0.5)
        assert scene.entry.revision == revision
        await trio.sleep(3)
        scene.world.transact([], [Delete(key=PATH)])
        scene.announcer.gone()
        await until(lambda: scene.entry is not None, 0.1)
        assert scene.entry.lease
        assert len(scene.store.times("grant")) == 2
        before = len(scene.store.calls)
        for _ in range(20):
            scene.announcer.gone()
            await trio.sleep(0.1)
        assert len(scene.store.calls) == before

    announced(main)


def test_an_outage_is_outlived_and_told_once(caplog: pytest.LogCaptureFixture):
    caplog.set_level("INFO")

    async def main(scene: Scene) -> None:
        scene.say()
        await trio.sleep(1)
        scene.store.link(requests_pass=False)
        scene.say(state="stopped")
        await trio.sleep(120)
        assert scene.entry is None, "the lease has ended meanwhile"
        scene.store.link()
        await until(lambda: scene.entry is not None, 4)
        assert scene.value["state"] == "stopped"

    announced(main)
    assert [caplog.messages.count(text) for text in ("the store does not answer", "the store answers again")] == [1, 1]


def test_what_is_said_while_a_write_is_under_way_is_written_next():
    async def main(scene: Scene) -> None:
        scene.store.link(answers_pass=False)
        scene.say(state="starting")
        await trio.sleep(1)
        scene.say(state="running")
        scene.store.link()
        await until(lambda: scene.value and scene.value["state"] == "running", 4)

    announced(main)


# --- what the key says -----------------------------------------------------------------------------------------------


def recorded(name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(json.loads((GOLDEN / "steady.json").read_text())["etcd"][f"/service/bench/members/{name}"]["value"])
    return loaded


def seen(row: Row | None, **settings: Any) -> Observation:
    now = Instant(1, 1)
    return Observation(now=now, wall_s=1.0, number=1, me=Identity(name="n1", node_id="id-n1", incarnation="r"), settings=Settings(**settings),
                       postgres=PostgresFacts(process="running" if row else "absent", row=row))


def value_of(row: Row | None, role: str, *, state: str = "running", pending: bool = False, **settings: Any) -> dict[str, Any]:
    golden = recorded("n1" if role == "primary" else "n2")
    return member_value(seen(row, **settings), Decision(situation="x", summary="x", state=state, role=role, paused=settings.get("pause", False)), api_url=golden["api_url"],
                        conn_url=golden["conn_url"], checkpoint_pending=pending)


PRIMARY = Row(in_recovery=False, timeline=2, lsn=67785200)
STANDBY = Row(in_recovery=True, timeline=1, received_lsn=67785200, replayed_lsn=67785200, receiver=WalReceiver(status="streaming", timeline=2))


@pytest.mark.parametrize(("name", "role", "row"), [("n1", "primary", PRIMARY), ("n2", "replica", STANDBY)])
def test_a_member_key_reads_as_the_references_own(name: str, role: str, row: Row):
    value = value_of(row, role)
    own = value.pop("pgha")
    assert own["node_id"] == "id-n1"
    golden = recorded(name)
    assert encode({k: v for k, v in value.items() if k != "version"}) == encode({k: v for k, v in golden.items() if k != "version"}), "fields and their order"
    assert all(part.isdigit() for part in value["version"].split("."))
    assert member_from("n1", {**value, "pgha": own}).is_pgha


HISTORY = (HistoryRow(timeline=1, switch_lsn=5, claim="timeline 2 by n1"),)


@pytest.mark.parametrize(("row", "directory", "tells", "claim"), [
    (PRIMARY, {"history": HISTORY, "history_of": 2}, True, "timeline 2 by n1"),
    (STANDBY, {"history": HISTORY, "history_of": 2}, True, "timeline 2 by n1"),         # of the timeline that it receives, as is published
    (STANDBY, {"history": HISTORY, "history_of": 1}, False, None),
    (PRIMARY, {"history": (structs.replace(HISTORY[0], claim=""),), "history_of": 2}, True, ""),
    (PRIMARY, {"history_of": 2}, True, None),
    (PRIMARY, {"state": "unreadable"}, False, None),
    (PRIMARY, {"state": "unknown"}, False, None),
    (None, {"history": HISTORY, "history_of": 2}, False, None),
])
def test_the_key_says_whose_promotion_its_timeline_is(row: Row | None, directory: dict[str, Any], tells: bool, claim: str | None):
    observed = structs.replace(seen(row), directory=DataDirectoryFacts(**{"state": "valid", **directory}))
    role = "replica" if row is None or row.in_recovery else "primary"
    value = member_value(observed, Decision(situation="x", summary="x", state="running", role=role), api_url="u", conn_url="c", checkpoint_pending=False)
    member = member_from("n1", json.loads(encode(value)))
    assert (member.tells_claim, member.claim) == (tells, claim)
    assert tells == ("claim" in value["pgha"])


def test_a_scheduled_restart_is_told():
    scheduled = ScheduledRestart(schedule="2030-01-01T00:00:00+00:00", postmaster_start_time="then", conditions={"role": "replica"})
    decision = Decision(situation="following", summary="", state="running", role="replica", memory=Memory(scheduled_restart=scheduled))
    value = member_value(seen(STANDBY), decision, api_url="", conn_url="", checkpoint_pending=False)
    assert value["scheduled_restart"] == {"schedule": "2030-01-01T00:00:00+00:00", "role": "replica", "postmaster_start_time": "then"}


@pytest.mark.parametrize(("row", "role", "more", "expected"), [
    (PRIMARY, "primary", {"pending": True}, {"checkpoint_after_promote": False}),
    (STANDBY, "replica", {"pending": True}, {"checkpoint_after_promote": None}),
    (PRIMARY, "primary", {"pause": True}, {"pause": True}),
    (PRIMARY, "primary", {"tags": Tags.of({"nofailover": True, "own": "x"})}, {"tags": {"nofailover": True, "own": "x"}}),
    (Row(in_recovery=True, replayed_lsn=5, restore_command="x"), "replica", {}, {"replication_state": "in archive recovery", "xlog_location": 5, "receive_lsn": None}),
    (Row(in_recovery=True, replayed_lsn=5), "replica", {}, {"replication_state": None, "timeline": None}),
    (Row(in_recovery=True, received_lsn=9, replayed_lsn=5, receiver=WalReceiver(status="waiting")), "replica", {}, {"replication_state": None, "xlog_location": 9, "receive_lsn": 9}),
    (STANDBY, "replica", {"state": "stopping"}, {"xlog_location": None, "timeline": None, "replication_state": None}),
    (None, "replica", {"state": "stopped"}, {"xlog_location": None, "pending_restart": None}),
    (Row(in_recovery=False, lsn=1, pending_restart={"max_connections": ("100", "200")}), "primary", {},
     {"pending_restart": True, "pending_restart_reason": {"max_connections": {"old_value": "100", "new_value": "200"}}}),
])
def test_what_the_key_says(row: Row | None, role: str, more: dict[str, Any], expected: dict[str, Any]):
    value = value_of(row, role, **more)
    assert {k: value.get(k) for k in expected} == expected
