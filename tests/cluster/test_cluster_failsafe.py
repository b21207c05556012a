"""etcd is away for long, and failsafe_mode is on: the primary goes on as long as all members say so, and nobody else begins."""

import signal

import pytest
from test_cluster_crashes import let_pass
from traffic import Traffic

pytestmark = pytest.mark.cluster

ON = {"failsafe_mode": True}


@pytest.fixture
def cluster(beds):
    """Three nodes, one etcd member, ttl 5, failsafe mode; its list is written."""
    bed = beds.whole(dynamic=ON)
    bed.wait(lambda: (bed.etcd.value(bed.key("failsafe")) or {}).keys() == {n.name for n in bed.nodes}, 20, "the key failsafe lists everybody")
    return bed


def standbys(cluster, leader):
    return [n for n in cluster.nodes if n is not leader]


def active(cluster):
    return {n.name for n in cluster.nodes if n.patroni().get("failsafe_mode_is_active")}


def new_lines(cluster):
    """What each agent logs from now on: a function that gives it, by node."""
    begins = {n.name: n.log_path.stat().st_size for n in cluster.nodes}

    def read():
        return {n.name: n.log_path.read_bytes()[begins[n.name]:].decode().splitlines() for n in cluster.nodes}
    return read


def back(cluster, traffic):
    cluster.etcd.start()
    cluster.wait(cluster.etcd.ready, 20, "etcd answers again")
    return traffic.fault("etcd back")


@pytest.mark.parametrize("seconds", [20, pytest.param(40, marks=pytest.mark.long)])
def test_etcd_away_and_nobody_notices(cluster, seconds):
    with Traffic(cluster) as traffic:
        leader = cluster.leader()
        postmaster = leader.postmaster()
        lines = new_lines(cluster)
        at_s = traffic.fault("etcd stopped")
        cluster.etcd.stop()
        cluster.wait(lambda: active(cluster) == {n.name for n in cluster.nodes}, 10, "failsafe is active on both sides")
        let_pass(at_s + seconds)
        assert cluster.leader() is leader
        assert [n.get("/replica").status for n in standbys(cluster, leader)] == [200, 200]
        assert leader.get("/readiness").status == 200
        back(cluster, traffic)
        cluster.wait(lambda: not active(cluster), 10, "failsafe is over")
        verdict = traffic.finish()
        assert leader.postmaster() == postmaster
        assert len(verdict.reigns) == 1
        assert verdict.gap.length_s < 1
        for name, said in lines().items():
            begins, ends = ([line for line in said if word in line] for word in ("the store does not answer", "the store answers again"))
            assert (len(begins), len(ends)) == (1, 1), (name, said)
            assert len(said) <= 8, (name, said)


def test_etcd_away_and_one_member_dead(cluster):
    """Who does not answer may be about to take over: the primary gives up in order, before its licence ends."""
    with Traffic(cluster) as traffic:
        leader = cluster.leader()
        dead = standbys(cluster, leader)[0]
        lines = new_lines(cluster)
        at_s = traffic.fault(f"etcd stopped, the agent of {dead.name} killed")
        cluster.etcd.stop()
        dead.kill_agent()
        cluster.wait(lambda: not any((a := n.get("/primary")) and a.status == 200 for n in cluster.nodes), cluster.profile.ttl + 5, "nobody leads")
        let_pass(at_s + 10)
        assert cluster.leader() is None
        assert not any("fenced" in line for line in lines()[leader.name]), "it was demoted in order, not killed"
        assert any("not every member agrees" in line for line in lines()[leader.name])
        back(cluster, traffic)
        dead.start_agent()
        traffic.finish(timeout_s=cluster.profile.ttl + 60)


def test_etcd_away_and_the_primary_dies(cluster):
    """Nobody may take over without the store. With it, somebody does."""
    with Traffic(cluster) as traffic:
        leader = cluster.leader()
        at_s = traffic.fault("etcd stopped")
        cluster.etcd.stop()
        cluster.wait(lambda: active(cluster) == {n.name for n in cluster.nodes}, 10, "failsafe is active on both sides")
        killed_s = traffic.fault(f"{leader.name} killed: agent, guard and PostgreSQL")
        leader.kill_agent()
        for guard in leader.guards():
            guard.send(signal.SIGKILL)
        leader.signal_postgres(signal.SIGKILL)
        let_pass(killed_s + 2 * cluster.profile.ttl + 3)
        assert not any(n.says_primary() for n in cluster.nodes)
        assert not any(n.patroni().get("role") == "primary" for n in cluster.nodes)
        back_s = back(cluster, traffic)
        new = cluster.wait_leader(timeout_s=cluster.profile.ttl + 10)
        assert new is not leader
        leader.start_agent()
        traffic.finish(lost_since_s=at_s, timeout_s=60)
        assert traffic.resumed_after_s(back_s) < cluster.profile.ttl + 5
