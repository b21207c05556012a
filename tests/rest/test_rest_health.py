"""Every line of the table of health paths, from the reference's recordings and from rows of our own."""

from __future__ import annotations

from typing import Any

import pytest

from pgha.rest.health import HealthFacts, answer, liveness, parse_lag, readiness
from pgha.rest.wire import split_target

LEADER = {"role": "primary", "lock_held": True}
STREAMING = {"role": "replica", "replication_state": "streaming", "optime": 1000, "latest_end_lsn": 1000, "received_lsn": 1000, "replayed_lsn": 1000}


def facts(base: dict[str, Any], **changed: Any) -> HealthFacts:
    return HealthFacts(**{"state": "running", "dcs_seen": True, **base, **changed})


def status(target: str, seen: HealthFacts) -> int:
    path, query = split_target(target)
    return answer(path, query, seen).status


STANDBY_LEADER = {"role": "standby_leader", "lock_held": True, "standby_cluster": True}

ROWS: list[tuple[str, dict[str, Any], dict[str, Any], int]] = [
    # 1
    ("/standby_leader", STANDBY_LEADER, {}, 200),
    ("/standby-leader", STANDBY_LEADER, {}, 200),
    ("/standby-leader", STANDBY_LEADER, {"role": "replica"}, 200),
    ("/standby-leader", STANDBY_LEADER, {"role": "primary"}, 503),
    ("/standby-leader", STANDBY_LEADER, {"lock_held": False}, 503),
    ("/standby-leader", LEADER, {}, 503),
    # 2
    ("/leader", LEADER, {}, 200),
    ("/leader", STANDBY_LEADER, {}, 200),
    ("/leader", LEADER, {"lock_held": False}, 503),
    ("/leader", STREAMING, {}, 503),
    # 3
    ("/", LEADER, {}, 200),
    ("/", STREAMING, {}, 503),
    ("/primary", LEADER, {}, 200),
    ("/primary/x", LEADER, {}, 200),
    ("/master", LEADER, {}, 200),
    ("/read-write", LEADER, {}, 200),
    ("/primary", LEADER, {"lock_held": False}, 503),
    ("/primary", STANDBY_LEADER, {}, 503),
    ("/primary", LEADER, {"state": "starting"}, 200),
    # 4
    ("/replica", STREAMING, {}, 200),
    ("/replica", LEADER, {}, 503),
    ("/replica", STREAMING, {"tags": {"noloadbalance": True}}, 503),
    ("/replica", STREAMING, {"state": "starting"}, 503),
    ("/replica", STREAMING, {"state": "unknown"}, 503),
    ("/replica", {"role": "replica", "lock_held": True, "standby_cluster": True}, {}, 503),
    ("/replica?lag=0", STREAMING, {}, 200),
    ("/replica?lag=0", STREAMING, {"optime": 1001}, 503),
    ("/replica?lag=1", STREAMING, {"optime": 1001}, 200),
    ("/replica?lag=0", STREAMING, {"latest_end_lsn": 1001}, 503),
    ("/replica?lag=1kB", STREAMING, {"optime": 1000 + 1024}, 200),
    ("/replica?lag=1kB", STREAMING, {"optime": 1001 + 1024}, 503),
    ("/replica?lag=nonsense", STREAMING, {"optime": 1 << 50}, 200),
    ("/replica?lag=0", STREAMING, {"optime": None, "latest_end_lsn": None}, 200),
    ("/replica?replication_state=streaming", STREAMING, {}, 200),
    ("/replica?replication_state=streaming", STREAMING, {"replication_state": ""}, 503),
    ("/replica?tag_zone=a", STREAMING, {"tags": {"zone": "a"}}, 200),
    ("/replica?tag_zone=a", STREAMING, {"tags": {"zone": "b"}}, 503),
    ("/replica?tag_zone=a", STREAMING, {}, 503),
    ("/replica?tag_clonefrom=true", STREAMING, {"tags": {"clonefrom": True}}, 200),
    ("/replica?tag_clonefrom=True", STREAMING, {"tags": {"clonefrom": True}}, 503),
    ("/replica?tag_n=2&tag_zone=a", STREAMING, {"tags": {"n": 2, "zone": "a"}}, 200),
    ("/replica?tag_n=2&tag_zone=a", STREAMING, {"tags": {"n": 3, "zone": "a"}}, 503),
    ("/primary?tag_zone=a", LEADER, {}, 200),
    ("/leader?tag_zone=a", LEADER, {}, 200),
    # 5
    ("/read-only", STREAMING, {}, 200),
    ("/read-only", LEADER, {}, 200),
    ("/read-only", STANDBY_LEADER, {}, 200),
    ("/read-only", LEADER, {"lock_held": False}, 503),
    ("/read-only?lag=0", STREAMING, {"optime": 1001}, 503),
    ("/read-only?tag_zone=a", LEADER, {}, 503),
    # 6
    ("/health", LEADER, {}, 200),
    ("/health", STREAMING, {"state": "starting"}, 503),
    ("/health", STREAMING, {"state": "unknown"}, 503),
    # 7 to 11
    ("/sync", STREAMING, {"sync_standby": True}, 200),
    ("/synchronous", STREAMING, {"sync_standby": True}, 200),
    ("/sync", STREAMING, {}, 503),
    ("/sync", STREAMING, {"quorum_standby": True}, 503),
    ("/sync", STREAMING, {"sync_standby": True, "state": "stopping"}, 503),
    ("/sync", STREAMING, {"sync_standby": True, "dcs_seen": False}, 503),
    ("/sync/x", STREAMING, {"sync_standby": True}, 503),
    ("/quorum", STREAMING, {"quorum_standby": True}, 200),
    ("/quorum", STREAMING, {"sync_standby": True}, 503),
    ("/quorum", LEADER, {}, 503),
    ("/async", STREAMING, {}, 200),
    ("/asynchronous", STREAMING, {}, 200),
    ("/async", STREAMING, {"sync_standby": True}, 503),
    ("/async", STREAMING, {"quorum_standby": True}, 503),
    ("/async", LEADER, {}, 503),
    ("/async?lag=16kB", STREAMING, {"optime": 1000 + 16385}, 503),
    ("/async", STREAMING, {"dcs_seen": False}, 503),
    ("/read-only-quorum", LEADER, {}, 200),
    ("/read-only-quorum", STREAMING, {"quorum_standby": True}, 200),
    ("/read-only-quorum", STREAMING, {}, 503),
    ("/read-only-sync", LEADER, {}, 200),
    ("/read-only-sync", STANDBY_LEADER, {}, 200),
    ("/read-only-synchronous", STREAMING, {"sync_standby": True}, 200),
    ("/read-only-sync", STREAMING, {}, 503),
    # nothing
    ("/nonsense", LEADER, {}, 503),
    ("/%70rimary", LEADER, {}, 200),
    # paused without a view of the store: by role alone
    ("/primary", {"role": "primary"}, {"dcs_seen": False, "paused": True}, 200),
    ("/leader", {"role": "primary"}, {"dcs_seen": False, "paused": True}, 200),
    ("/primary", {"role": "replica"}, {"dcs_seen": False, "paused": True}, 503),
    ("/primary", {"role": "primary"}, {"dcs_seen": False}, 503),
    ("/standby-leader", {"role": "standby_leader", "standby_cluster": True}, {"dcs_seen": False, "paused": True}, 200),
]


@pytest.mark.parametrize(("target", "base", "changed", "wanted"), ROWS, ids=[f"{r[0]} {r[2]}" for r in ROWS])
def test_status(target: str, base: dict[str, Any], changed: dict[str, Any], wanted: int) -> None:
    assert status(target, facts(base, **changed)) == wanted


def test_a_refusal_names_every_obstacle_with_its_numbers() -> None:
    path, query = split_target("/replica?lag=10&replication_state=streaming")
    why = answer(path, query, facts(STREAMING, state="starting", optime=1050, replication_state="", tags={"noloadbalance": 1})).why
    assert why == ("tag noloadbalance is set; state is starting; replication state is none, wanted streaming; lag 50 bytes, limit 10 bytes")


@pytest.mark.parametrize(("text", "wanted"), [
    ("0", 0), ("1048576", 1 << 20), ("16kB", 16384), ("1.5MB", 1572864), ("2 GB", 2 << 30), ("1TB", 1 << 40), ("1mb", 1 << 20), ("5B", 5),
    ("-1", -1), ("", None), (None, None), ("x", None), ("1XB", None), ("1e3", None), ("\u0663", None),
])
def test_lag_is_read_with_units(text: str | None, wanted: int | None) -> None:
    assert parse_lag(text) == wanted


@pytest.mark.parametrize(("query", "changed", "wanted"), [
    ({}, {}, 200),
    ({}, {"optime": 1000 + (1 << 20)}, 200),
    ({}, {"optime": 1001 + (1 << 20)}, 503),
    ({"lag": "2MB"}, {"optime": 1001 + (1 << 20)}, 200),
    ({"lag": "1"}, {"latest_end_lsn": 1002}, 503),
    ({"lag": "1"}, {"replayed_lsn": 0}, 503),
    ({"lag": "1", "mode": "write"}, {"replayed_lsn": 0}, 200),
    ({"lag": "1", "mode": "apply"}, {"replayed_lsn": 0}, 503),
    ({}, {"state": "starting"}, 503),
    ({}, {"replication_state": "in archive recovery"}, 503),
    ({}, {"dcs_seen": False, "optime": None, "latest_end_lsn": None}, 503),
    ({}, {"dcs_seen": False, "optime": None, "latest_end_lsn": None, "failsafe_active": True}, 200),
    ({}, {"dcs_seen": False, "optime": None}, 200),
    ({}, {"lock_held": True, "state": "starting"}, 200),
])
def test_readiness(query: dict[str, str], changed: dict[str, Any], wanted: int) -> None:
    assert readiness(query, facts(STREAMING, **changed)).status == wanted


def test_liveness_follows_the_loop_except_in_pause() -> None:
    assert liveness(facts(LEADER)).status == 200
    assert liveness(facts(LEADER, loop_alive=False)).status == 503
    assert liveness(facts(LEADER, loop_alive=False, paused=True)).status == 200
