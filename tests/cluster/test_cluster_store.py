"""The store loses members, keys, or all of itself."""

import signal

import pytest
from test_cluster_crashes import let_pass
from traffic import Traffic

pytestmark = pytest.mark.cluster


def untouched(cluster, traffic, leader, postmaster):
    """The same primary went on all the time."""
    verdict = traffic.finish()
    assert cluster.leader() is leader
    assert leader.postmaster() == postmaster
    assert len(verdict.reigns) == 1
    assert verdict.gap.length_s < 1


@pytest.mark.parametrize("which", ["a follower", "the leader"])
def test_one_of_three_etcd_members_dies(cluster3, which):
    with Traffic(cluster3) as traffic:
        leader = cluster3.leader()
        postmaster = leader.postmaster()
        etcd = cluster3.wait(cluster3.etcd.leader, 10, "etcd has a leader")
        dead = etcd if which == "the leader" else next(m for m in cluster3.etcd.members if m is not etcd)
        traffic.fault(f"kill -9 for {dead.name}, {which}")
        dead.stop(signal.SIGKILL)
        cluster3.wait(cluster3.etcd.ready, 20, "the other two answer")
        traffic.wait_for_more(8 * 150)
        cluster3.etcd.start(dead)
        cluster3.wait(lambda: dead.request("/v3/maintenance/status", {}), 20, f"{dead.name} answers again")
        untouched(cluster3, traffic, leader, postmaster)


def test_the_lock_deleted_by_hand_is_made_again_by_its_holder(cluster):
    with Traffic(cluster) as traffic:
        leader = cluster.leader()
        postmaster = leader.postmaster()
        traffic.fault("leader and pgha/lock deleted")
        assert cluster.etcd.delete(cluster.key("leader"))       # first: with the record its holder writes this one, too, at once
        assert cluster.etcd.delete(cluster.key("pgha/lock"))
        cluster.wait(lambda: (cluster.etcd.value(cluster.key("pgha/lock")) or {}).get("holder") == leader.name, 10, "the lock is back")
        traffic.wait_for_more(8 * 150)
        assert cluster.etcd.get(cluster.key("leader"))[0][1].decode() == leader.name
        traffic.fault("leader deleted")
        assert cluster.etcd.delete(cluster.key("leader"))
        cluster.wait(lambda: cluster.etcd.get(cluster.key("leader")), 10, "the key leader is back")
        assert cluster.etcd.get(cluster.key("leader"))[0][1].decode() == leader.name
        untouched(cluster, traffic, leader, postmaster)


def test_etcd_rebuilt_empty_under_a_running_cluster(beds):
    """Everything that the store knew is gone. The cluster must not be bootstrapped anew, nor get a second primary."""
    cluster = beds.whole()
    with Traffic(cluster) as traffic:
        before = {node.name: node.patroni()["database_system_identifier"] for node in cluster.nodes}
        inodes = {node.name: node.data_dir.stat().st_ino for node in cluster.nodes}
        traffic.fault("etcd rebuilt without data")
        cluster.etcd.rebuild_empty()
        cluster.wait(cluster.etcd.ready, 20, "the new etcd answers")
        cluster.wait(lambda: cluster.etcd.get(cluster.key("initialize")), 90, "initialize is written again")
        traffic.finish(timeout_s=90)
        assert {node.name: node.patroni()["database_system_identifier"] for node in cluster.nodes} == before
        assert {node.name: node.data_dir.stat().st_ino for node in cluster.nodes} == inodes, "nothing was cloned"
        assert cluster.etcd.get(cluster.key("initialize"))[0][1].decode() == before["n1"]
    beds.end()  # for half a minute nobody believes the new store's records: no cluster for the next test


@pytest.mark.long
def test_etcd_away_for_40_seconds(cluster):
    etcd_away(cluster)


def etcd_away(cluster):
    """Without failsafe mode the primary gives up before its lock could be taken; when etcd is back, so is a primary."""
    with Traffic(cluster) as traffic:
        at_s = traffic.fault("etcd stopped")
        cluster.etcd.stop()
        cluster.wait(lambda: not any((a := n.get("/primary")) and a.status == 200 for n in cluster.nodes), cluster.profile.ttl + 5, "nobody leads")
        let_pass(at_s + 40)
        cluster.etcd.start()
        cluster.wait(cluster.etcd.ready, 20, "etcd answers again")
        back_s = traffic.fault("etcd back")
        traffic.finish(timeout_s=cluster.profile.ttl + 60)
        assert traffic.resumed_after_s(back_s) < 5, "the lock had run out long before: nothing is left to wait for"
