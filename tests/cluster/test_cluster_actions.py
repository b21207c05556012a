"""What operators ask an agent to do: reinitialize, restart, and switch over, now or at a time. What it says is so."""

import json
import threading
import time
from datetime import UTC, datetime, timedelta

import pytest
from console import DONE, FAILED, REFUSED, ctl
from traffic import Traffic, ids

pytestmark = pytest.mark.cluster

FAR = "2099-01-01T00:00:00+00:00"


def soon(seconds):
    return (datetime.now(UTC) + timedelta(seconds=seconds)).isoformat()


def started(node):
    return node.patroni().get("postmaster_start_time")


def key(cluster, name):
    value = cluster.etcd.value(cluster.key(name))
    return value if isinstance(value, dict) else json.loads(value or "{}")


def beside(node):
    """What lies beside the data directory."""
    return {path.name for path in node.directory.iterdir() if path.name.startswith("data")} - {"data", "data.pgha"}


def mark(node, name):
    """A file that no copy has: whether this is the directory of before."""
    (node.data_dir / name).write_text("mine")
    return node.data_dir / name


def set_password(node, password):
    with node.connect() as connection:
        connection.execute(f"ALTER ROLE replicator PASSWORD '{password}'")


def reinit_state(node):
    return node.patroni().get("pgha", {}).get("reinitialize", {})


def test_replicas_are_reinitialised_under_writes(cluster):
    leader = cluster.wait_healthy(30)
    first, second = (node for node in cluster.nodes if node is not leader)
    with Traffic(cluster) as traffic:
        # Never on the leader: by the client, and by the agent itself.
        assert ctl(cluster, "reinit", leader.name, "--force")[0] == REFUSED
        answer = leader.request("POST", "/reinitialize", {"force": True})
        assert (answer.status, answer.body) == (503, "I am the leader, can not reinitialize")

        old = mark(first, "before")
        began = started(first)
        code, out, _ = ctl(cluster, "reinit", first.name, "--force", "--wait")
        assert code == DONE
        assert f"Reinitialize is completed on: {first.name}" in out
        assert not old.exists()
        assert started(first) != began
        assert reinit_state(first)["state"] == "done"

        # From the leader, in pause, and asked by the reference's client's words; a second one has to wait, or to be forced.
        ctl(cluster, "pause", "--wait")
        old = mark(second, "before")
        answer = second.request("POST", "/reinitialize", {"from_leader": True})
        assert (answer.status, answer.body) == (200, "reinitialize started")
        answer = second.request("POST", "/reinitialize")
        assert (answer.status, answer.body) == (503, "reinitialize already in progress")
        answer = second.request("POST", "/restart")
        assert (answer.status, answer.body) == (503, "reinitialize already in progress")
        answer = second.request("POST", "/reinitialize", {"force": True})
        assert (answer.status, answer.body) == (200, "reinitialize started")
        number = reinit_state(second)["request"]
        cluster.wait(lambda: reinit_state(second).get("state") == "done", 60, "the copy is in place")
        assert reinit_state(second)["request"] == number
        assert not old.exists()
        ctl(cluster, "resume", "--wait")
        verdict = traffic.finish()
        assert len(verdict.reigns) == 1, "nobody's writes were disturbed"
    cluster.wait(lambda: not any(beside(node) for node in (first, second)), 30, "what was replaced is deleted once the copies stream")
    assert ids(first) == ids(second) == ids(leader)
    assert "copying from" in first.log_path.read_text()


def test_what_cannot_be_copied_safely_stays_as_it_was(cluster):
    leader = cluster.wait_healthy(30)
    replica = next(node for node in cluster.nodes if node is not leader)
    kept = mark(replica, "kept")
    # The leader cannot be asked who it is: the role that copies has another password now.
    set_password(leader, "another")
    try:
        code, _, err = ctl(cluster, "reinit", replica.name, "--force", "--wait")
        assert code == FAILED
        assert f"{leader.name} does not answer" in err
        assert "its data is as before" in err
    finally:
        set_password(leader, cluster.settings.password)
    cluster.wait_healthy(60)
    assert kept.exists()
    # Nobody leads: nothing is thrown away.
    for node in cluster.nodes:
        if node is not replica:
            node.kill_agent()
            node.signal_postgres(9)
    cluster.wait(lambda: replica.patroni().get("cluster_unlocked") or replica.says_primary(), 30, "nobody leads, or the replica itself")
    answer = replica.request("POST", "/reinitialize", {"force": True})
    assert answer.status == 503
    assert answer.body in ("Cluster has no leader, can not reinitialize", "I am the leader, can not reinitialize")
    for node in cluster.nodes:
        if node is not replica:
            node.start_agent()
    cluster.wait_healthy(60)
    assert kept.exists()
    kept.unlink()


def test_a_switchover_at_its_time(cluster):
    leader = cluster.wait_healthy(30)
    candidate = next(node for node in reversed(cluster.nodes) if node is not leader)
    body = {"leader": leader.name, "candidate": candidate.name}
    refusals = [({**body, "scheduled_at": "2020-01-01T00:00:00Z"}, 422, "Cannot schedule switchover in the past"),
                ({**body, "scheduled_at": "2099-01-01T00:00:00"}, 400, "Timezone information is mandatory for the scheduled switchover")]
    for asked, status, text in refusals:
        answer = leader.request("POST", "/switchover", asked)
        assert (answer.status, answer.body) == (status, text)
    code, out, _ = ctl(cluster, "switchover", "--force", "--candidate", candidate.name, "--scheduled", FAR)
    assert code == DONE
    assert "Switchover scheduled" in out
    assert key(cluster, "failover") == {"leader": leader.name, "member": candidate.name, "scheduled_at": FAR}
    scheduled = {"at": FAR, "from": leader.name, "to": candidate.name}
    cluster.wait(lambda: leader.get("/cluster").body.get("scheduled_switchover") == scheduled, 10, "it is shown")
    assert f"Switchover scheduled at: {FAR}" in ctl(cluster, "list")[1]
    assert ctl(cluster, "flush", "switchover")[:2] == (DONE, "Success: scheduled switchover deleted\n")
    answer = leader.request("DELETE", "/switchover")
    assert (answer.status, answer.body) == (404, "no switchover is scheduled")
    # What somebody else has written to the store, and makes no sense, is removed, and nothing happens.
    for nonsense in ({"leader": leader.name, "scheduled_at": "soon"}, {"leader": leader.name, "scheduled_at": 1893456000}, {**body, "scheduled_at": "2020-01-01T00:00:00Z"}):
        cluster.etcd.put(cluster.key("failover"), json.dumps(nonsense).encode())
        cluster.wait(lambda: key(cluster, "failover") == {}, 10, f"{nonsense} is removed")
    assert cluster.leader() is leader
    with Traffic(cluster) as traffic:
        at_s = time.monotonic() + 4
        when = soon(4)
        assert leader.request("POST", "/switchover", {**body, "scheduled_at": when}).status == 202
        cluster.wait(lambda: cluster.leader() is candidate, 20, "the switchover happens")
        assert time.monotonic() >= at_s - 0.5, "not before its time"
        verdict = traffic.finish()
        assert [reign.node for reign in verdict.reigns] == [leader.name, candidate.name]
    assert key(cluster, "failover") == {}


def test_restarts_on_conditions_and_at_a_time(cluster):
    leader = cluster.wait_healthy(30)
    replica = next(node for node in cluster.nodes if node is not leader)
    before = {node.name: started(node) for node in cluster.nodes}
    for node, asked in ((replica, {"role": "primary"}), (leader, {"role": "replica"}), (replica, {"postgres_version": "13"}), (leader, {"restart_pending": True})):
        answer = node.request("POST", "/restart", asked)
        assert (answer.status, answer.body) == (503, "restart conditions are not satisfied"), asked
    assert {node.name: started(node) for node in cluster.nodes} == before

    # Kept, shown, refused a second time, taken back.
    answer = replica.request("DELETE", "/restart")
    assert (answer.status, answer.body) == (404, "no restarts are scheduled")
    code, out, _ = ctl(cluster, "restart", replica.name, "--force", "--scheduled", FAR, "--pg-version", "99")
    assert (code, f"Success: restart scheduled on member {replica.name}" in out) == (DONE, True)
    answer = replica.request("POST", "/restart", {"schedule": FAR})
    assert (answer.status, answer.body) == (409, "Another restart is already scheduled")
    shown = {"schedule": FAR, "postgres_version": "99"}
    assert replica.patroni()["scheduled_restart"] == shown
    cluster.wait(lambda: key(cluster, f"members/{replica.name}").get("scheduled_restart") == {**shown, "postmaster_start_time": before[replica.name]}, 10, "it is in the member key")
    cluster.wait(lambda: next(m for m in leader.get("/cluster").body["members"] if m["name"] == replica.name).get("scheduled_restart") == shown, 10, "and in /cluster")
    assert FAR in ctl(cluster, "list", "-e")[1]
    code, out, _ = ctl(cluster, "flush", replica.name, "restart", "--force")
    assert (code, f"Success: flush scheduled restart for member {replica.name}" in out) == (DONE, True)
    assert "scheduled_restart" not in replica.patroni()

    # Dropped, since PostgreSQL was restarted before its time.
    assert replica.request("POST", "/restart", {"schedule": FAR}).status == 202
    assert ctl(cluster, "restart", replica.name, "--force")[0] == DONE
    cluster.wait(lambda: "scheduled_restart" not in replica.patroni(), 10, "it is dropped")
    assert "dropped: PostgreSQL was started at" in replica.log_path.read_text()

    # Done at its time, and only where what was asked for is so then.
    cluster.wait_healthy(30)
    before = {node.name: started(node) for node in cluster.nodes}
    when = soon(3)
    for node in cluster.nodes:
        assert node.request("POST", "/restart", {"schedule": when, "role": "replica"}).status == 202
    replicas = [node for node in cluster.nodes if node is not leader]
    cluster.wait(lambda: all(started(node) not in (None, before[node.name]) for node in replicas), 30, "the replicas are restarted")
    cluster.wait(lambda: "scheduled_restart" not in leader.patroni(), 10, "the leader's is dropped")
    assert started(leader) == before[leader.name]
    assert cluster.wait_healthy(30) is leader

    # A primary that is not back in time is succeeded.
    answers = []
    with Traffic(cluster) as traffic:
        asker = threading.Thread(target=lambda: answers.append(leader.request("POST", "/restart", {"timeout": 0.001}, timeout_s=60)))
        asker.start()
        cluster.wait(lambda: cluster.leader() not in (None, leader), 30, "another leads")
        asker.join(30)
        traffic.finish()
    assert [answer.status for answer in answers] == [503]
    assert "restart failed" in answers[0].body


def test_what_else_is_asked_is_answered(cluster):
    leader = cluster.wait_healthy(30)
    assert (leader.request("POST", "/reload").status, leader.request("POST", "/sigterm").status) == (202, 202)
    for path in ("/citus", "/mpp"):
        assert leader.request("POST", path, {"type": "before_demote", "group": 0}).status == 501
    assert cluster.wait_healthy(10) is leader


def test_a_reload_reads_the_nodes_files_again_or_says_what_is_wrong_with_them(cluster):
    leader = cluster.wait_healthy(30)
    replica = next(node for node in cluster.nodes if node is not leader)
    before = replica.config_path.read_text()

    try:
        replica.config_path.write_text(f"{before}\n[tags]\nshelf = 7\n")
        code, out, _ = ctl(cluster, "reload", replica.name, "--force")
        assert (code, f"Reload request received for member {replica.name}" in out) == (DONE, True)
        cluster.wait(lambda: (replica.patroni().get("tags") or {}).get("shelf") == 7, 10, "the tag of the file is published")
        replica.config_path.write_text(f"{before}\nnonsense = 1\n")
        code, _, err = ctl(cluster, "reload", replica.name, "--force")
        assert (code, "nonsense" in err) == (REFUSED, True)
        assert replica.patroni()["tags"] == {"shelf": 7}, "nothing was changed"
    finally:
        replica.config_path.write_text(before)
    assert replica.request("POST", "/reload").status == 202
    cluster.wait(lambda: "tags" not in replica.patroni(), 10, "and taken back")
