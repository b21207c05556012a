"""What operators do on purpose: start a cluster, add a replica, switch over, stop a node. Nothing may be lost."""

import signal

import pytest
from traffic import Traffic, ids

pytestmark = pytest.mark.cluster


def test_three_nodes_bootstrap_one_cluster(beds):
    bed = beds.fresh()
    bed.start()
    leader = bed.wait_healthy(90)
    system = {node.patroni()["database_system_identifier"] for node in bed.nodes}
    assert len(system) == 1
    keys = {key.removeprefix(bed.key("")): value for key, value, _ in bed.etcd.get(bed.key(""))}
    assert keys["initialize"].decode() in system
    assert keys["leader"].decode() == leader.name
    assert {"config", "status", "pgha/lock", "pgha/epoch", "members/n1", "members/n2", "members/n3"} <= keys.keys()
    assert bed.etcd.value(bed.key("pgha/lock"))["holder"] == leader.name
    for node in bed.nodes:
        assert len(node.guards()) == 1, "each node has its guard"
        assert node.get("/primary").status == (200 if node is leader else 503)
        assert node.get("/replica").status == (503 if node is leader else 200)
    with Traffic(bed) as traffic:
        traffic.wait_for_more(300)
        assert len(traffic.finish().reigns) == 1


def test_a_node_added_later_becomes_a_replica(cluster):
    with Traffic(cluster) as traffic:
        leader = cluster.leader()
        node = cluster.add_node()
        try:
            node.start_agent()
            assert cluster.wait_healthy(60) is leader
            assert node.patroni()["role"] == "replica"
            assert len(traffic.finish().reigns) == 1, "cloning disturbed nobody"
            assert ids(node) == ids(leader)
            assert node.stop_agent() == 0
            assert not node.postgres()
        finally:
            node.kill_agent()
            node.signal_postgres(signal.SIGKILL)
            cluster.nodes.remove(node)
    cluster.wait(lambda: not cluster.etcd.get(cluster.key(f"members/{node.name}")), 20, "its member key is gone")


def test_switchover_to_a_named_candidate(cluster):
    with Traffic(cluster) as traffic:
        old = cluster.leader()
        candidate = next(node for node in reversed(cluster.nodes) if node is not old)
        at_s = traffic.fault(f"switchover from {old.name} to {candidate.name}")
        answer = old.request("POST", "/switchover", {"leader": old.name, "candidate": candidate.name}, timeout_s=30)
        assert (answer.status, answer.body) == (200, f'Successfully switched over to "{candidate.name}"')
        verdict = traffic.finish()
        assert cluster.leader() is candidate
        assert [reign.node for reign in verdict.reigns] == [old.name, candidate.name]
        assert traffic.resumed_after_s(at_s) < 3


def test_sigterm_of_the_primarys_agent_hands_over(cluster):
    with Traffic(cluster) as traffic:
        old = cluster.leader()
        at_s = traffic.fault(f"SIGTERM for the agent of {old.name}")
        assert old.stop_agent(30) == 0
        assert not old.postgres(), "its PostgreSQL is stopped, too"
        cluster.wait_leader(other_than=old, timeout_s=10)
        traffic.wait_for_more(50)
        assert traffic.resumed_after_s(at_s) < 3, "no waiting for the lock to expire"
        old.start_agent()
        traffic.finish()
        assert cluster.leader() is not old
