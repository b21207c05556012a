"""Pause: what an operator has in hand is left alone, by a cluster that has lost its store, its agents or its primary."""

import signal
import subprocess
import time

import pytest
from test_cluster_crashes import let_pass
from traffic import Traffic

pytestmark = pytest.mark.cluster
USER = "postgres"


@pytest.fixture
def paused(cluster):
    """A healthy cluster in pause; resumed afterwards."""
    pause(cluster)
    yield cluster
    for node in cluster.nodes:
        if node.agent_process is None:
            node.start_agent()
    resume(cluster)


def pause(cluster):
    config(cluster, True)
    cluster.wait(lambda: record(cluster).get("mode") == "paused" and all(member(cluster, n).get("pause") for n in cluster.nodes), 10, "pause is in force everywhere")
    assert cluster.leader().guards()


def resume(cluster):
    config(cluster, None)
    cluster.wait(lambda: record(cluster).get("mode") != "paused" and not any(member(cluster, n).get("pause") for n in cluster.nodes), 15, "pause is over everywhere")


def config(cluster, value):
    answer = cluster.wait(lambda: next((a for n in cluster.nodes if (a := n.request("PATCH", "/config", {"pause": value})) and a.status == 200), None), 10, "somebody writes it")
    assert answer.status == 200


def record(cluster):
    return cluster.etcd.value(cluster.key("pgha/lock")) or {}


def member(cluster, node):
    return cluster.etcd.value(cluster.key(f"members/{node.name}")) or {}


def pg_ctl(node, *command):
    """As the DBA would, as user postgres; a start with the options of the last one."""
    if command[0] == "start":
        options = (node.data_dir / "postmaster.opts").read_text().split(" ", 1)[1].strip()
        command = (*command, "-o", options, "-l", str(node.directory / "by-hand.log"))
    return subprocess.run([node.settings.bin_dir / "pg_ctl", "-D", node.data_dir, "-w", "-t", "20", *command], stdin=subprocess.DEVNULL,
                          stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=60, cwd="/", user=USER, group=USER, extra_groups=[], check=False).returncode


def alone(cluster, leader):
    """Nobody else accepts writes."""
    assert not [n.name for n in cluster.nodes if n is not leader and n.postgres() and n.ask("SELECT pg_is_in_recovery()") is False]


def test_the_store_away_for_longer_than_the_ttl_changes_nothing(paused):
    with Traffic(paused) as traffic:
        leader = paused.leader()
        postmaster = leader.postmaster()
        at_s = traffic.fault("etcd stopped in pause")
        paused.etcd.stop()
        let_pass(at_s + 3 * paused.profile.ttl)
        traffic.wait_for_more(200)
        alone(paused, leader)
        assert leader.get("/primary").status == 200
        assert leader.get("/liveness").status == 200
        paused.etcd.start()
        paused.wait(paused.etcd.ready, 20, "etcd answers again")
        resume(paused)
        verdict = traffic.finish()
        assert leader.postmaster() == postmaster
        assert len(verdict.reigns) == 1
        assert verdict.gap.length_s < 1


def test_a_killed_agents_primary_goes_on_and_is_adopted(paused):
    with Traffic(paused) as traffic:
        leader = paused.leader()
        postmaster = leader.postmaster()
        at_s = traffic.fault("agent of the primary killed in pause")
        leader.kill_agent()
        let_pass(at_s + 3 * paused.profile.ttl)
        traffic.wait_for_more(200)
        alone(paused, leader)
        assert record(paused)["holder"] == leader.name
        other = next(n for n in paused.nodes if n is not leader)
        answer = other.request("POST", "/failover", {"candidate": other.name, "pgha": {"holder_is_down": True}}, timeout_s=10)
        assert answer.status == 412, "nobody renews and no agent answers, but it is not down"
        assert "its PostgreSQL sends WAL" in answer.body
        before = record(paused)["incarnation"]
        leader.start_agent()
        paused.wait(lambda: record(paused)["incarnation"] != before, 15, "adopted")
        assert (record(paused)["mode"], record(paused)["holder"]) == ("paused", leader.name)
        resume(paused)
        paused.wait(lambda: record(paused)["mode"] == "held", 10, "held again")
        verdict = traffic.finish()
        assert leader.postmaster() == postmaster
        assert len(verdict.reigns) == 1
        assert verdict.gap.length_s < 1


def test_after_a_resume_a_failover_works_as_ever(cluster):
    pause(cluster)
    resume(cluster)
    with Traffic(cluster) as traffic:
        old = cluster.leader()
        at_s = traffic.fault("agent and PostgreSQL killed after a resume")
        old.kill_agent()
        old.signal_postgres(signal.SIGKILL)
        cluster.wait_leader(other_than=old, timeout_s=20)
        old.start_agent()
        traffic.finish(lost_since_s=at_s - 1)


def test_an_agent_that_is_stopped_leaves_everything_running(paused):
    with Traffic(paused) as traffic:
        leader = paused.leader()
        follower = next(n for n in paused.nodes if n is not leader)
        kept = {n.name: n.postmaster() for n in (leader, follower)}
        at_s = traffic.fault("agents stopped in pause")
        assert leader.stop_agent(20) == 0
        assert follower.stop_agent(20) == 0
        let_pass(at_s + 2 * paused.profile.ttl)
        traffic.wait_for_more(200)
        assert record(paused)["mode"] == "paused"
        assert {n.name: n.postmaster() for n in (leader, follower)} == kept
        leader.start_agent()
        follower.start_agent()
        resume(paused)
        verdict = traffic.finish()
        assert {n.name: n.postmaster() for n in (leader, follower)} == kept
        assert len(verdict.reigns) == 1


def test_a_primary_that_is_stopped_by_hand_stays_so_and_leads_again_when_it_is_started(paused):
    leader = paused.leader()
    assert pg_ctl(leader, "stop", "-m", "fast") == 0
    paused.wait(lambda: record(paused)["mode"] == "released", 10, "the lock is given back")
    let_pass(time.monotonic() + 2 * paused.profile.ttl)
    assert not leader.postgres(), "it stays as it is"
    assert paused.leader() is None
    for node in paused.nodes:
        if node is not leader:
            assert node.ask("SELECT pg_is_in_recovery()") is True
    assert "only when it is named" in next(n for n in paused.nodes if n is not leader).get("/pgha/decision").body["summary"]
    assert pg_ctl(leader, "start") == 0
    paused.wait(lambda: paused.leader() is leader and leader.get("/primary").status == 200, 20, "it leads again")
    paused.wait(lambda: record(paused)["mode"] == "paused", 10, "in pause")


def test_a_restart_by_hand_costs_an_interruption_and_no_more(paused):
    """Data at rest is a standby: the server comes back in recovery, and its node, which led last, promotes it again."""
    with Traffic(paused) as traffic:
        leader = paused.leader()
        at_s = traffic.fault("pg_ctl restart by hand in pause")
        assert pg_ctl(leader, "restart", "-m", "fast") == 0
        paused.wait(lambda: paused.leader() is leader and leader.get("/primary").status == 200, 20, "it leads again")
        traffic.wait_for_more(100)
        assert traffic.resumed_after_s(at_s) < 10
        resume(paused)
        traffic.finish()
        pause(paused)


def test_a_standby_that_is_stopped_by_hand_stays_so_until_the_resume(paused):
    leader = paused.leader()
    standby = next(n for n in paused.nodes if n is not leader)
    assert pg_ctl(standby, "stop", "-m", "fast") == 0
    let_pass(time.monotonic() + paused.profile.ttl)
    assert not standby.postgres()
    assert standby.patroni()["state"] == "stopped"
    resume(paused)
    paused.wait_healthy(30)
    pause(paused)


def test_a_switchover_and_a_failover_to_a_named_member_work_in_pause(paused):
    with Traffic(paused) as traffic:
        old = paused.leader()
        new, third = (n for n in paused.nodes if n is not old)
        answer = old.request("POST", "/switchover", {"leader": old.name}, timeout_s=10)
        assert (answer.status, answer.body) == (400, "Switchover is possible only to a specific candidate in a paused state")
        at_s = traffic.fault("switchover in pause")
        answer = old.request("POST", "/switchover", {"leader": old.name, "candidate": new.name}, timeout_s=30)
        assert (answer.status, answer.body) == (200, f'Successfully switched over to "{new.name}"')
        assert traffic.resumed_after_s(at_s) < 4
        paused.wait_healthy(30)
        assert paused.leader() is new
        paused.wait(lambda: record(paused)["mode"] == "paused", 10, "the new leader's pause")
        assert pg_ctl(new, "stop", "-m", "fast") == 0
        paused.wait(lambda: record(paused)["mode"] == "released", 10, "given back")
        answer = third.request("POST", "/failover", {"candidate": third.name}, timeout_s=30)
        assert (answer.status, answer.body) == (200, f'Successfully failed over to "{third.name}"')
        resume(paused)
        traffic.finish()
        pause(paused)


def test_a_paused_holder_that_is_down_is_succeeded_on_an_operators_word(paused):
    with Traffic(paused) as traffic:
        old = paused.leader()
        new = next(n for n in paused.nodes if n is not old)
        asked = {"candidate": new.name, "pgha": {"holder_is_down": True}}
        answer = new.request("POST", "/failover", asked, timeout_s=30)
        assert answer.status == 412, "it lives"
        assert "does not look down" in answer.body
        at_s = traffic.fault("the paused primary's node dies")
        old.kill_agent()
        for guard in old.guards():
            guard.send(signal.SIGKILL)
        old.signal_postgres(signal.SIGKILL)
        let_pass(at_s + 2 * paused.profile.ttl)
        assert record(paused)["mode"] == "paused", "it does not expire"
        assert all(n.ask("SELECT pg_is_in_recovery()") for n in paused.nodes if n is not old)
        answer = new.request("POST", "/failover", asked, timeout_s=40)
        assert (answer.status, answer.body) == (200, f'Successfully failed over to "{new.name}"')
        old.start_agent()
        resume(paused)
        traffic.finish(lost_since_s=at_s - 1)
        pause(paused)


def test_a_standby_promoted_by_hand_is_ended_not_left_as_a_second_primary(paused):
    with Traffic(paused) as traffic:
        leader = paused.leader()
        standby = next(n for n in paused.nodes if n is not leader)
        traffic.fault("pg_ctl promote by hand in pause")
        pg_ctl(standby, "promote")
        paused.wait(lambda: not standby.postgres(), 10, "its guard has ended it")
        paused.wait(lambda: "never by hand" in str(standby.get("/pgha/decision").body), 10, "explained")
        resume(paused)
        verdict = traffic.finish()
        assert len(verdict.reigns) == 1
        pause(paused)
