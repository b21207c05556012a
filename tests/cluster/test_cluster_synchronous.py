"""The synchronous modes with real agents: what was acknowledged is never lost, whoever dies when, in priority mode and in
quorum mode, on the way from one to the other, and while the set grows and shrinks under load."""

from __future__ import annotations

import signal
import time

import pytest
from traffic import Traffic

pytestmark = pytest.mark.cluster

#: A synchronous standby that does not confirm is let go after primary_hang_timeout, which is ttl - 1 here, and a look.
HANGS_S = 8


@pytest.fixture
def synchronous(beds):
    """Three nodes, ttl 5; in the mode that the test asks for, whatever the former test left."""
    bed = beds.whole(dynamic={"synchronous_mode": "on"})
    configure(bed, synchronous_mode="on", synchronous_mode_strict=None, synchronous_node_count=None)
    return bed


def configure(bed, **keys):
    answer = bed.wait_leader().request("PATCH", "/config", keys, timeout_s=10)
    assert answer.status == 200, answer


def promised(bed):
    """(leader, names, quorum) of /sync."""
    value = bed.etcd.value(bed.key("sync")) or {}
    return value.get("leader"), tuple(sorted(filter(None, (value.get("sync_standby") or "").split(",")))), value.get("quorum")


def others(bed, *without):
    return tuple(sorted(node.name for node in bed.nodes if node not in without))


def wait_promised(bed, leader, count, quorum, *, among=None, timeout_s=30):
    """Until `/sync` names the leader and so many of these."""
    names = set(among if among is not None else others(bed, leader))

    def as_wanted():
        said = promised(bed)
        return said if said[0] == leader.name and len(said[1]) == count and set(said[1]) <= names and said[2] == quorum else None

    return bed.wait(as_wanted, timeout_s, f"/sync: {leader.name}, {count} of {sorted(names)}, quorum {quorum}")[1]


def setting(node):
    return node.ask("SHOW synchronous_standby_names")


def kill(node):
    """The whole node at once, as when its power goes."""
    node.signal_agent(signal.SIGKILL)
    node.signal_postgres(signal.SIGKILL)
    node.kill_agent()


def test_health_checks_and_roles(synchronous):
    leader = synchronous.wait_healthy()
    (name,) = wait_promised(synchronous, leader, 1, 0)
    standby, third = synchronous.node(name), next(n for n in synchronous.nodes if n is not leader and n.name != name)
    assert setting(leader) == name
    synchronous.wait(lambda: standby.get("/sync").status == 200, 10, "its agent knows")
    assert [n.get("/sync").status for n in (leader, standby, third)] == [503, 200, 503]
    assert [n.get("/async").status for n in (leader, standby, third)] == [503, 503, 200]
    assert [n.get("/quorum").status for n in (leader, standby, third)] == [503, 503, 503]
    assert [n.get("/read-only-sync").status for n in (leader, standby, third)] == [200, 200, 503]
    assert standby.patroni().get("sync_standby") is True
    roles = {m["name"]: m["role"] for m in leader.get("/cluster").body["members"]}
    assert roles == {leader.name: "leader", standby.name: "sync_standby", third.name: "replica"}
    (row,) = [r for r in leader.patroni()["replication"] if r["application_name"] == name]
    assert (row["sync_state"], row["sync_priority"]) == ("sync", 1)
    configure(synchronous, synchronous_mode="quorum")
    wait_promised(synchronous, leader, 2, 1)
    synchronous.wait(lambda: all(n.get("/quorum").status == 200 for n in (standby, third)), 10, "their agents know")
    assert [n.get("/sync").status for n in (standby, third)] == [503, 503]
    assert third.patroni().get("quorum_standby") is True
    assert sorted(m["role"] for m in leader.get("/cluster").body["members"]) == ["leader", "quorum_standby", "quorum_standby"]
    said = leader.get("/pgha/decision").body
    assert any(r["rule"] == "synchronous.set_is_as_wanted" and "ANY 1" in r["because"] for r in said["reasons"])


@pytest.mark.parametrize("mode", ["on", "quorum"])
def test_a_killed_primary_loses_nothing(synchronous, mode):
    configure(synchronous, synchronous_mode=mode)
    with Traffic(synchronous) as traffic:
        old = synchronous.leader()
        wait_promised(synchronous, old, *((2, 1) if mode == "quorum" else (1, 0)))
        traffic.add("pipeline", old)
        traffic.wait_for_more(1000, kind="pipeline")
        (*named,) = promised(synchronous)[1]
        at_s = traffic.fault(f"kill -9 for agent and PostgreSQL of {old.name}, {mode}")
        kill(old)
        new = synchronous.wait_leader(other_than=old, timeout_s=30)
        assert new.name in named
        traffic.wait_for_more(50)
        assert traffic.resumed_after_s(at_s) < synchronous.profile.ttl + 4
        old.start_agent()
        traffic.finish()


@pytest.mark.parametrize("mode", ["on", "quorum"])
def test_switchover_loses_nothing_and_is_short(synchronous, mode):
    configure(synchronous, synchronous_mode=mode)
    with Traffic(synchronous) as traffic:
        old = synchronous.leader()
        name = wait_promised(synchronous, old, *((2, 1) if mode == "quorum" else (1, 0)))[0]
        other = next(n.name for n in synchronous.nodes if n is not old and n.name != name)
        if mode == "on":
            refused = old.request("POST", "/switchover", {"leader": old.name, "candidate": other}, timeout_s=10)
            assert (refused.status, refused.body) == (412, "candidate name does not match with sync_standby")
        at_s = traffic.fault(f"switchover to {name}, {mode}")
        answer = old.request("POST", "/switchover", {"leader": old.name, "candidate": name}, timeout_s=30)
        assert (answer.status, answer.body) == (200, f'Successfully switched over to "{name}"')
        traffic.wait_for_more(50)
        assert traffic.resumed_after_s(at_s) < 4
        traffic.finish()
        wait_promised(synchronous, synchronous.node(name), *((2, 1) if mode == "quorum" else (1, 0)))


def test_from_priority_to_quorum_and_back_under_load(synchronous):
    with Traffic(synchronous) as traffic:
        leader = synchronous.leader()
        wait_promised(synchronous, leader, 1, 0)
        for _ in range(2):
            configure(synchronous, synchronous_mode="quorum")
            wait_promised(synchronous, leader, 2, 1)
            synchronous.wait(lambda: setting(leader).startswith("ANY 1 ("), 10, "commits wait for any one")
            configure(synchronous, synchronous_mode="on")
            (name,) = wait_promised(synchronous, leader, 1, 0)
            synchronous.wait(lambda name=name: setting(leader) == name, 10, "commits wait for that one")
        configure(synchronous, synchronous_mode=None)
        synchronous.wait(lambda: not synchronous.etcd.get(synchronous.key("sync")), 10, "/sync is deleted")
        synchronous.wait(lambda: setting(leader) == "", 10, "commits wait for nobody")
        configure(synchronous, synchronous_mode="on")
        wait_promised(synchronous, leader, 1, 0)
        verdict = traffic.finish()
        assert len(verdict.reigns) == 1
        assert verdict.gap.length_s < 1.5


def test_a_synchronous_standby_hangs_and_another_takes_its_place(synchronous):
    with Traffic(synchronous) as traffic:
        leader = synchronous.leader()
        (name,) = wait_promised(synchronous, leader, 1, 0)
        hung = synchronous.node(name)
        at_s = traffic.fault(f"SIGSTOP for PostgreSQL of {name}, the synchronous standby")
        hung.signal_postgres(signal.SIGSTOP)
        try:
            wait_promised(synchronous, leader, 1, 0, among=others(synchronous, leader, hung))
            traffic.wait_for_more(100)
            assert traffic.resumed_after_s(at_s) < HANGS_S
        finally:
            hung.signal_postgres(signal.SIGCONT)
        traffic.finish()


def test_without_any_standby_writes_go_on_unless_the_mode_is_strict(synchronous):
    with Traffic(synchronous) as traffic:
        leader = synchronous.leader()
        wait_promised(synchronous, leader, 1, 0)
        standbys = [n for n in synchronous.nodes if n is not leader]
        at_s = traffic.fault("kill -9 for both standbys")
        for node in standbys:
            kill(node)
        wait_promised(synchronous, leader, 0, 0)
        synchronous.wait(lambda: setting(leader) == "", 10, "nobody is waited for")
        traffic.wait_for_more(100)
        assert traffic.resumed_after_s(at_s) < 5
        configure(synchronous, synchronous_mode_strict=True)
        synchronous.wait(lambda: setting(leader) == "__patroni_strict_sync_replica_placeholder__", 10, "strict: nobody is waited for in vain")
        time.sleep(0.2)
        before = len(traffic.acks())
        time.sleep(2.0)     # how long nothing is acknowledged is the subject
        assert len(traffic.acks()) == before, "writes are blocked"
        only, other = standbys
        only.start_agent()
        wait_promised(synchronous, leader, 1, 0, among=[only.name])
        traffic.wait_for_more(100)
        # The leader has nobody else and does not let it go: its data is not replaced, for until then no commit would end.
        assert only.request("POST", "/reinitialize", {}).status == 200
        assert "synchronous_mode_strict" in reinitialized(synchronous, only, "failed")["why"]
        traffic.wait_for_more(100)
        other.start_agent()
        synchronous.wait_healthy(30)
        at_s = traffic.fault(f"reinitialize {only.name}, and {other.name} takes its place")
        assert only.request("POST", "/reinitialize", {}).status == 200
        reinitialized(synchronous, only, "done")
        assert traffic.resumed_after_s(at_s) < 5
        traffic.wait_for_more(100)
        traffic.finish()


def reinitialized(bed, node, state):
    """How the last request has ended, which must be so."""
    def end():
        said = (node.patroni().get("pgha") or {}).get("reinitialize") or {}
        return said if said.get("state") in ("done", "failed") else None

    said = bed.wait(end, 40, f"{node.name} is done with its request")
    assert said["state"] == state, said
    return said


def test_growing_and_shrinking_under_load(synchronous):
    with Traffic(synchronous) as traffic:
        leader = synchronous.leader()
        wait_promised(synchronous, leader, 1, 0)
        traffic.add("pipeline", leader)
        configure(synchronous, synchronous_node_count=2)
        wait_promised(synchronous, leader, 2, 0)
        configure(synchronous, synchronous_mode="quorum")
        wait_promised(synchronous, leader, 2, 0)
        configure(synchronous, synchronous_node_count=1)
        wait_promised(synchronous, leader, 2, 1)
        node = synchronous.add_node()
        try:
            node.start_agent()
            wait_promised(synchronous, leader, 3, 2, timeout_s=60)
            configure(synchronous, synchronous_node_count=2)
            wait_promised(synchronous, leader, 3, 1)
            assert node.stop_agent() == 0
            wait_promised(synchronous, leader, 2, 0)
        finally:
            kill(node)
            synchronous.nodes.remove(node)
        configure(synchronous, synchronous_mode="on", synchronous_node_count=None)
        wait_promised(synchronous, leader, 1, 0)
        assert len(traffic.finish().reigns) == 1


def test_a_synchronous_standby_that_stops_is_let_go_first(synchronous):
    with Traffic(synchronous) as traffic:
        leader = synchronous.leader()
        (name,) = wait_promised(synchronous, leader, 1, 0)
        node = synchronous.node(name)
        traffic.fault(f"SIGTERM for the agent of {name}, the synchronous standby")
        assert node.stop_agent(20) == 0
        assert promised(synchronous)[1] == others(synchronous, leader, node), "the other one has taken its place"
        node.start_agent()
        verdict = traffic.finish()
        assert verdict.gap.length_s < 1


def test_a_restarted_agent_keeps_what_commits_wait_for(synchronous):
    with Traffic(synchronous) as traffic:
        leader = synchronous.leader()
        named = wait_promised(synchronous, leader, 1, 0)
        traffic.fault(f"kill -9 for the agent of {leader.name}, started again at once")
        leader.kill_agent()
        leader.start_agent()
        synchronous.wait(lambda: (a := leader.get("/primary")) and a.status == 200, 20, "it leads again")
        assert setting(leader) == named[0]
        leader.signal_agent(signal.SIGHUP)
        traffic.wait_for_more(5 * 150)
        assert setting(leader) == named[0]
        verdict = traffic.finish()
        assert len(verdict.reigns) == 1 and verdict.gap.length_s < 1


def test_a_killed_postmaster_comes_back_with_what_commits_wait_for(synchronous):
    with Traffic(synchronous) as traffic:
        leader = synchronous.leader()
        wait_promised(synchronous, leader, 1, 0)
        traffic.add("pipeline", leader)
        traffic.wait_for_more(500, kind="pipeline")
        traffic.fault(f"kill -9 for the postmaster of {leader.name}")
        assert leader.postmaster().send(signal.SIGKILL)
        traffic.wait_for_more(500)
        traffic.finish()
        wait_promised(synchronous, synchronous.leader(), 1, 0)


def test_a_failover_to_an_asynchronous_standby_is_the_operators_to_ask_for(synchronous):
    leader = synchronous.wait_healthy()
    named = wait_promised(synchronous, leader, 1, 0)
    other = next(n for n in synchronous.nodes if n is not leader and n.name not in named)
    answer = leader.request("POST", "/failover", {"candidate": other.name}, timeout_s=30)
    assert (answer.status, answer.body) == (200, f'Successfully failed over to "{other.name}"')
    assert synchronous.wait_healthy() is other
    wait_promised(synchronous, other, 1, 0)
