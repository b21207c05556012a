"""Tags, positions, histories and the derived words of the cluster, as tables."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from pgha.clock import Instant
from pgha.model.cluster import ClusterView, FailoverKey, HistoryEntry, Member, Status, Tags, is_system_identifier
from pgha.model.lock import Identity, LockRecord
from pgha.model.node import PostgresFacts, Row
from pgha.model.observation import Observation, Operation, Settings
from pgha.model.overview import host_port, is_paused, is_standby_cluster, overview, synchronous, synchronous_names
from pgha.model.wal import (
    HistoryRow,
    Position,
    claim_line,
    claim_of,
    format_lsn,
    is_ancestor,
    parse_history_file,
    parse_lsn,
)


@pytest.mark.parametrize(("raw", "expected"), [
    ({}, {"nofailover": False, "failover_priority": 1, "nosync": False, "sync_priority": 1, "noloadbalance": False, "clonefrom": False, "replicatefrom": None, "nostream": False}),
    ({"nofailover": True}, {"nofailover": True, "failover_priority": 0}),
    ({"nofailover": True, "failover_priority": 5}, {"nofailover": True, "failover_priority": 0}),
    ({"nofailover": False, "failover_priority": 0}, {"nofailover": False, "failover_priority": 0}),
    ({"failover_priority": 0}, {"nofailover": True, "failover_priority": 0}),
    ({"failover_priority": -1}, {"nofailover": True, "failover_priority": 0}),
    ({"failover_priority": "7"}, {"nofailover": False, "failover_priority": 7}),
    ({"failover_priority": "many"}, {"nofailover": False, "failover_priority": 1}),
    ({"failover_priority": None}, {"nofailover": False, "failover_priority": 1}),
    ({"nosync": "true"}, {"nosync": True, "sync_priority": 0}),
    ({"sync_priority": 0}, {"nosync": True, "sync_priority": 0}),
    ({"noloadbalance": 1, "clonefrom": "on", "nostream": "yes"}, {"noloadbalance": True, "clonefrom": True, "nostream": True}),
    ({"noloadbalance": "off", "clonefrom": "false", "nostream": 2}, {"noloadbalance": False, "clonefrom": False, "nostream": False}),
    ({"noloadbalance": [], "clonefrom": {}}, {"noloadbalance": False, "clonefrom": False}),
    ({"replicatefrom": "n2"}, {"replicatefrom": "n2"}), ({"replicatefrom": ""}, {"replicatefrom": None}), ({"replicatefrom": 5}, {"replicatefrom": None}),
])
def test_tags(raw: dict[str, Any], expected: dict[str, Any]):
    tags = Tags.of(raw)
    assert {k: getattr(tags, k) for k in expected} == expected
    assert tags.raw == raw


@pytest.mark.parametrize(("text", "lsn"), [("0/0", 0), ("0/BC614E", 12345678), ("1/0", 1 << 32), ("FFFFFFFF/FFFFFFFF", (1 << 64) - 1), (" 16/B374D848 \n", 0x16B374D848)])
def test_lsn(text: str, lsn: int):
    assert parse_lsn(text) == lsn
    assert format_lsn(lsn) == text.strip()


@pytest.mark.parametrize("text", ["", "0", "/", "0/", "/0", "G/0", "0/100000000", "0/0/0", "0x", "nothing"])
def test_what_is_no_lsn(text: str):
    with pytest.raises(ValueError):
        parse_lsn(text)


HISTORY = "1\t0/3000000\tno recovery target specified\n\n# a comment\n2\t0/5000060\tbefore 2026-01-01 10:00:00+00\n"
ROWS = (HistoryRow(timeline=1, switch_lsn=0x3000000, reason="no recovery target specified"),
        HistoryRow(timeline=2, switch_lsn=0x5000060, reason="before 2026-01-01 10:00:00+00"))


@pytest.mark.parametrize(("text", "rows"), [(HISTORY, ROWS), ("", ()), ("# only a comment: a blocked number\n", ()), ("1 0/10 two words\n", (HistoryRow(timeline=1, switch_lsn=16, reason="two words"),)),
                                            ("1\t0/10\n", (HistoryRow(timeline=1, switch_lsn=16),)),
                                            (claim_line("2 by a") + claim_line("3  by\tb\n") + "1\t0/10\n\n# no claim\n3\t0/20\n" + claim_line("given up"),
                                             (HistoryRow(timeline=1, switch_lsn=16, claim="3 by b"), HistoryRow(timeline=3, switch_lsn=32)))])
def test_history_files(text: str, rows: tuple[HistoryRow, ...]):
    assert parse_history_file(text) == rows


def test_whose_promotion_a_timeline_is():
    assert claim_of(()) is None
    assert claim_of(ROWS) == ""
    assert claim_of(parse_history_file("1\t0/10\n" + claim_line("3 by b" + "x" * 500) + "2\t0/20\n")) == ("3 by b" + "x" * 194)


@pytest.mark.parametrize("text", ["1\n", "x\t0/10\ty\n", "1\tnowhere\ty\n", "\x00"])
def test_what_is_no_history(text: str):
    with pytest.raises(ValueError):
        parse_history_file(text)


@pytest.mark.parametrize(("timeline", "lsn", "inside"), [
    (3, 0, True), (3, 1 << 60, True), (2, 0x5000060, True), (2, 0x5000061, False), (2, 0, True), (1, 0x3000000, True), (1, 0x3000001, False), (4, 0, False), (0, 0, False),
])
def test_ancestry(timeline: int, lsn: int, inside: bool):
    assert is_ancestor(Position(timeline=timeline, lsn=lsn), timeline=3, history=ROWS) is inside


@pytest.mark.parametrize(("history", "timeline"), [(None, 0), ((), 1), ((HistoryEntry(timeline=1, lsn=5),), 2), ((HistoryEntry(timeline=1, lsn=5), HistoryEntry(timeline=4, lsn=9)), 5)])
def test_the_clusters_timeline(history: tuple[HistoryEntry, ...] | None, timeline: int):
    assert ClusterView(history=history).timeline == timeline


@pytest.mark.parametrize(("lock_at", "optime", "position"), [
    (None, 0, (0, 0)), (None, 50, (0, 50)), ((100, 3), 50, (3, 100)), ((50, 3), 50, (3, 50)), ((50, 3), 100, (3, 100)), ((0, 0), 100, (0, 100)),
])
def test_the_position_that_a_leader_published(lock_at: tuple[int, int] | None, optime: int, position: tuple[int, int]):
    lock = LockRecord(holder="a", node_id="i", incarnation="r", sequence=1, ttl_s=30.0, lsn=lock_at[0], timeline=lock_at[1]) if lock_at else None
    published = ClusterView(lock=lock, status=Status(optime=optime)).published_position
    assert (published.timeline, published.lsn) == position


@pytest.mark.parametrize(("text", "is_one"), [(None, False), ("", False), ("123456789", False), ("1234567890", True), ("7711161683783831200", True), ("12345678901x", False), (" 1234567890", False)])
def test_system_identifiers(text: str | None, is_one: bool):
    assert is_system_identifier(text) is is_one


def test_small_words():
    assert FailoverKey().empty
    assert not FailoverKey(scheduled_at="2030").empty
    assert Member(name="a", xlog_location=1, receive_lsn=3, replay_lsn=2).lsn == 3
    assert Row(in_recovery=True, lsn=9, received_lsn=1, replayed_lsn=2).position == 2
    assert Row(in_recovery=False, lsn=9, received_lsn=1, replayed_lsn=20).position == 9
    row = Row(in_recovery=False)
    assert PostgresFacts(process="running", row=row).is_primary
    assert not PostgresFacts(process="absent", row=row).is_primary
    assert not PostgresFacts(process="running").is_primary
    assert str(Position(timeline=3, lsn=12345678)) == "0/BC614E on timeline 3"
    assert ClusterView(revisions={"sync": 4}).revision_of("sync") == 4
    assert ClusterView().revision_of("sync") == 0
    assert Operation(kind="x", id=1, started_at=Instant(1, 1)).running


def test_an_observation_can_be_written_down_and_read_again():
    seen = Observation(now=Instant(5, 6), wall_s=1.5, number=3, me=Identity(name="a", node_id="i", incarnation="r"), settings=Settings())
    assert msgspec.json.decode(msgspec.json.encode(seen), type=Observation) == seen
    with pytest.raises(AttributeError):
        seen.number = 4  # type: ignore[misc]


# --- the overview ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("url", "found"), [
    ("postgres://10.0.0.1:5433/postgres", ("10.0.0.1", 5433)), ("postgres://[fe80::1]:5432/x", ("fe80::1", 5432)), ("postgres://db/x", ("db", 5432)),
    ("postgres://u:p@db:1/x?a=b", ("db", 1)), ("postgres://db", ("db", 5432)), ("db:5432", ("", 0)), ("", ("", 0)), (None, ("", 0)), (5, ("", 0)),
])
def test_host_and_port(url: Any, found: tuple[str, int]):
    assert host_port(url) == found


@pytest.mark.parametrize(("config", "standby", "sync", "paused"), [
    ({}, False, False, False), ({"synchronous_mode": True}, False, True, False), ({"synchronous_mode": "quorum"}, False, True, False), ({"synchronous_mode": "off"}, False, False, False),
    ({"synchronous_mode": True, "standby_cluster": {"host": "x"}}, True, False, False), ({"standby_cluster": {}}, False, False, False), ({"standby_cluster": {"port": 5}}, True, False, False),
    ({"standby_cluster": "x", "pause": "yes"}, False, False, True), ({"pause": True}, False, False, True), ({"pause": "false"}, False, False, False), ({"pause": []}, False, False, False),
])
def test_what_the_configuration_makes_of_a_cluster(config: dict[str, Any], standby: bool, sync: bool, paused: bool):
    assert (is_standby_cluster(config), synchronous(config), is_paused(config)) == (standby, sync, paused)


def test_names_are_compared_without_regard_to_case():
    assert synchronous_names({"leader": "a", "sync_standby": "B, c ,,"}) == {"b", "c"}
    assert synchronous_names({"leader": None, "sync_standby": "b"}) == frozenset()
    assert synchronous_names({"leader": "a", "sync_standby": ["b"]}) == frozenset()


def test_an_overview_of_odd_members():
    shown = overview(scope="demo", leader="a", optime=100, sync={"leader": "a", "sync_standby": "B"}, failover={"leader": "a", "scheduled_at": "2030"}, config={"synchronous_mode": True, "pause": True},
                     members={"c": {}, "a": {"state": "running", "xlog_location": 100, "conn_url": "postgres://h:1/x"}, "b": {"xlog_location": 90, "replay_lsn": True, "receive_lsn": "x", "state": "running"}})
    assert [(m["name"], m["role"], m["state"]) for m in shown["members"]] == [("a", "leader", "running"), ("b", "sync_standby", "running"), ("c", "replica", "unknown")]
    a, b, c = shown["members"]
    assert (a["host"], a["port"], "lag" in a) == ("h", 1, False)
    assert (b["lag"], b["lsn"], b["replay_lag"], b["receive_lsn"]) == (10, "0/5A", "unknown", "unknown")
    assert "host" not in c
    assert (shown["pause"], shown["scope"], shown["scheduled_switchover"]) == (True, "demo", {"at": "2030", "from": "a"})
