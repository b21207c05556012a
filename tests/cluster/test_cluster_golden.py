"""Every answer of REST that was recorded of a real Patroni, asked of a real pgha cluster in the same situation: status, content type, shape.

Rules of this file: what differs on purpose is named, with the reason.
"""

import http.client
import json
import re
from pathlib import Path

import pytest

from tests.rest.rest_world import shape

pytestmark = pytest.mark.cluster

GOLDEN = Path(__file__).parents[1] / "golden"

FAR = "2099-01-01T00:00:00+00:00"
#: situation → the change of the configuration that makes it
SITUATIONS = {
    "steady": {},
    "scheduled-switchover": {},
    "synchronous": {"synchronous_mode": True},
    "quorum": {"synchronous_mode": "quorum"},
    "paused": {"pause": True},
    "pending-restart": {"postgresql": {"parameters": {"max_connections": 123}}},
    "failsafe-on": {"failsafe_mode": True},
    # the recording's failsafe mode was off again, and its key stays
    "permanent-slots": {"slots": {"perm_p": {"type": "physical"}}},
    "after-switchover": {},
}
MOMENT = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{6}\+00:00")
#: An error page of the reference's web server has no meaning beside its status.
PAGE = "text/html;charset=utf-8"
#: Answered otherwise, and why.
ON_PURPOSE = {
    'PATCH /config {"ttl": "x"}': (400, "ttl"),      # the reference writes it, and fails later
}


def asked(node, method, target, body=None):
    """(status, content type, body)."""
    connection = http.client.HTTPConnection(node.address, node.rest_port, timeout=10)
    try:
        connection.request(method, target, None if body is None else body.encode(), {"Content-Type": "application/json"})
        response = connection.getresponse()
        text = response.read().decode()
        kind = response.getheader("Content-Type")
        return response.status, kind, json.loads(text) if kind == "application/json" and text else text
    finally:
        connection.close()


def comparable(body, *, pending):
    """Without our own additions, and without what the recording has from an earlier situation; members by their role, not by name."""
    if not isinstance(body, dict):
        return body
    body = {key: value for key, value in body.items() if key != "pgha" and (pending or not key.startswith("pending_restart"))}
    for moments, moment in ((body, "postmaster_start_time"), (body.get("xlog", {}), "replayed_timestamp")):
        if moment in moments:
            assert moments[moment] is None or MOMENT.fullmatch(moments[moment]), moments
            moments[moment] = "a moment"       # or none, after a start
    if "members" in body:
        members = sorted(body["members"], key=lambda member: (member["role"], member["name"]))
        body["members"] = [comparable(member, pending=pending) | {"role": member["role"], "state": member["state"]} for member in members]
    return body


def differences(when, which, node):
    """What this node answers otherwise than the recorded one."""
    found = []
    for recorded in json.loads((GOLDEN / f"{when}.json").read_text())[which]:
        method, _, target = recorded["request"].partition(" ")
        status, kind, body = asked(node, method, target)
        wanted_kind = recorded["headers"].get("Content-Type")
        if status != recorded["status"]:
            found.append(f"{recorded['request']}: {status}, recorded {recorded['status']}")
        elif wanted_kind != PAGE:
            if kind != wanted_kind:
                found.append(f"{recorded['request']}: {kind}, recorded {wanted_kind}")
            pending = when == "pending-restart"
            mine, theirs = (comparable(each, pending=pending) for each in (body, recorded["body"]))
            if target == "/cluster":
                who = [[(member["role"], member["state"]) for member in each["members"]] for each in (mine, theirs)]
                if who[0] != who[1]:
                    found.append(f"{recorded['request']}: {who[0]}, recorded {who[1]}")
            if target == "/history":
                mine, theirs = mine[-1:], theirs[-1:]
            if target not in ("/config", "/metrics") and shape(mine) != shape(theirs):
                found.append(f"{recorded['request']}: {mine}, recorded {theirs}")
    return found


def wait_same(bed, when, which, node):
    last = []

    def same():
        last[:] = differences(when, which, node)
        return not last

    try:
        bed.wait(same, 20, f"{node.name} answers as the recorded {which}, {when}", every_s=0.3)
    except Exception:
        print("\n".join(last))
        raise


def undone(change):
    return {key: undone(value) if isinstance(value, dict) else None for key, value in change.items()}


def test_a_cluster_answers_as_the_recorded_one_in_each_situation(cluster):
    old = cluster.wait_healthy(30)
    assert old.request("POST", "/switchover", {"leader": old.name}, timeout_s=30).status == 200     # the recording has a history
    leader = cluster.wait_healthy(30)
    with leader.connect() as connection:
        connection.execute("CREATE TABLE IF NOT EXISTS written (n int)")    # something to replay: replayed_timestamp is known then
    for when, change in SITUATIONS.items():
        status, _, config = asked(leader, "PATCH", "/config", json.dumps(change or {"golden_test": None}))
        assert status == 200, config
        if when == "scheduled-switchover":
            assert asked(leader, "POST", "/switchover", json.dumps({"leader": leader.name, "candidate": old.name, "scheduled_at": FAR}))[::2] == (202, "Switchover scheduled")
        try:
            replica = cluster.wait(lambda when=when: next((node for node in cluster.nodes if node is not leader and (
                when not in ("synchronous", "quorum") or node.get(f"/{'sync' if when == 'synchronous' else 'quorum'}").status == 200)), None), 20, f"a replica, {when}")
            wait_same(cluster, when, "primary", leader)
            wait_same(cluster, when, "replica", replica)
            assert asked(replica, "GET", "/config")[2] == asked(leader, "GET", "/config")[2] == config
        finally:
            assert asked(leader, "PATCH", "/config", json.dumps(undone(change) or {"golden_test": None}))[0] == 200
            if when == "scheduled-switchover":
                assert asked(leader, "DELETE", "/switchover")[::2] == (200, "scheduled switchover deleted")
    assert cluster.wait_healthy(30) is leader


def test_what_the_recorded_one_refuses_is_refused_in_the_same_words(cluster):
    leader = cluster.wait_healthy(30)
    for recorded in json.loads((GOLDEN / "errors.json").read_text()):
        if "request" not in recorded:
            continue        # of patronictl: test_clients_patronictl.py
        method, target, *body = recorded["request"].split(" ", 2)
        status, kind, text = asked(leader, method, target, body[0] if body else None)
        wanted, wanted_text = ON_PURPOSE.get(recorded["request"], (recorded["status"], recorded["body"]))
        assert status == wanted, (recorded["request"], text)
        if recorded["request"] in ON_PURPOSE:
            assert wanted_text in text
        elif recorded["headers"]["Content-Type"] != PAGE:
            assert (kind, text) == (recorded["headers"]["Content-Type"], wanted_text), recorded["request"]
    assert cluster.wait_healthy(30) is leader


def test_head_options_and_a_whole_configuration(cluster):
    leader = cluster.wait_healthy(30)
    for recorded in json.loads((GOLDEN / "steady.json").read_text())["head"]:
        method, _, target = recorded["request"].partition(" ")
        if target in ("/primary", "/replica"):      # the reference says 503 to the others, whatever is so
            assert asked(leader, method, target)[::2] == (recorded["status"], ""), recorded["request"]
    config = asked(leader, "GET", "/config")[2]
    status, _, why = asked(leader, "PUT", "/config", json.dumps({**config, "maximum_lag_on_failovr": 1}))
    assert status == 400, "the reference takes what it does not know"
    assert "maximum_lag_on_failover" in why
    changed = {**config, "maximum_lag_on_failover": 2097152}
    assert asked(leader, "PUT", "/config", json.dumps(changed))[::2] == (200, changed)
    for node in cluster.nodes:
        cluster.wait(lambda node=node: asked(node, "GET", "/config")[2] == changed, 10, f"{node.name} shows it")
    assert asked(leader, "PUT", "/config", json.dumps(config))[::2] == (200, config)
