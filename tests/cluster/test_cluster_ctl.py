"""`pgha ctl` on a real cluster: what it shows is so, what it changes is changed, what it refuses has not happened."""

import json

import pytest
from console import DONE, FAILED, REFUSED, ctl

pytestmark = pytest.mark.cluster


def address(node):
    return f"host={node.address} port={node.port}\n"


def test_list_topology_and_dsn_show_what_is_so(cluster):
    leader = cluster.wait_healthy(30)
    first, second = (node for node in cluster.nodes if node is not leader)
    code, out, _ = ctl(cluster, "list", "-f", "json")
    assert code == DONE
    assert {row["Member"]: (row["Role"], row["State"]) for row in json.loads(out)} == {
        leader.name: ("Leader", "running"), first.name: ("Replica", "streaming"), second.name: ("Replica", "streaming")}
    assert ctl(cluster, "dsn")[:2] == (DONE, address(leader))
    assert ctl(cluster, "dsn", "-r", "replica")[:2] == (DONE, address(first))
    assert ctl(cluster, "dsn", "-m", second.name)[:2] == (DONE, address(second))
    second.tags = {"replicatefrom": first.name}
    second.write_configuration()
    second.signal_agent(1)
    try:
        received = f"SELECT count(*) FROM pg_stat_replication WHERE application_name = '{second.name}'"
        cluster.wait(lambda: first.ask(received), 30, f"{second.name} streams from {first.name}")
        code, out, _ = ctl(cluster, "topology", cluster.settings.scope)
        assert code == DONE
        assert [line.split("|")[1].rstrip()[1:] for line in out.splitlines() if line.startswith("| ")][1:] == [
            leader.name, f"+ {first.name}", f"  + {second.name}"]
    finally:
        second.tags = {}
        second.write_configuration()
        second.signal_agent(1)
    cluster.wait_healthy(30)


def test_query_follows_the_leader(cluster):
    leader = cluster.wait_healthy(30)
    other = next(node for node in cluster.nodes if node is not leader)
    where = ("query", "--format", "json", "-c", "SELECT host(inet_server_addr()) AS address, pg_is_in_recovery() AS standby")
    assert json.loads(ctl(cluster, *where)[1]) == [{"address": leader.address, "standby": False}]
    assert json.loads(ctl(cluster, *where, "-r", "replica")[1])[0]["standby"] is True
    assert json.loads(ctl(cluster, *where, "-m", other.name)[1]) == [{"address": other.address, "standby": True}]
    assert ctl(cluster, "query", "-f", "-", answers="CREATE TABLE asked (x int); INSERT INTO asked VALUES (1);") == (DONE, "", "CREATE TABLE\nINSERT 0 1\n")
    code, out, err = ctl(cluster, "query", "-r", "replica", "-c", "INSERT INTO asked VALUES (2)")
    assert (code, out) == (FAILED, "")
    assert "ERROR, SQLSTATE: 25006" in err
    assert ctl(cluster, "switchover", "--force", "--candidate", other.name)[0] == DONE
    cluster.wait(lambda: cluster.leader() is other, 20, "it leads")
    assert json.loads(ctl(cluster, *where)[1]) == [{"address": other.address, "standby": False}]
    assert ctl(cluster, "query", "-c", "SELECT x FROM asked; DROP TABLE asked")[:2] == (DONE, "x\n1\n")
    cluster.wait_healthy(30)


def test_a_scheduled_switchover_is_flushed(cluster):
    leader = cluster.wait_healthy(30)
    scheduled = {"leader": leader.name, "scheduled_at": "2099-01-01T00:00:00+00:00"}
    assert cluster.etcd.put(cluster.key("failover"), json.dumps(scheduled).encode())
    cluster.wait(lambda: (leader.get("/cluster").body or {}).get("scheduled_switchover"), 20, "the leader has seen it")
    assert "Switchover scheduled at: 2099-01-01T00:00:00+00:00" in ctl(cluster, "list")[1]
    assert ctl(cluster, "flush", "switchover")[:2] == (DONE, "Success: scheduled switchover deleted\n")
    assert not cluster.etcd.value(cluster.key("failover"))
    assert ctl(cluster, "flush", "switchover")[:2] == (DONE, "No pending scheduled switchover\n")
    assert ctl(cluster, "flush", "restart")[0] == DONE
    assert cluster.wait_healthy(10) is leader


def started(cluster):
    return {node.name: node.patroni().get("postmaster_start_time") for node in cluster.nodes}


def test_restart_and_reinit_touch_only_who_is_meant(cluster):
    leader = cluster.wait_healthy(30)
    replicas = [node for node in cluster.nodes if node is not leader]
    before = started(cluster)
    assert ctl(cluster, "restart", "--force", "--pg-version", "13.0")[0] == REFUSED
    assert ctl(cluster, "reinit", leader.name, "--force")[0] == REFUSED
    assert started(cluster) == before
    code, out, _ = ctl(cluster, "restart", "--force", "--pg-version", "99.0", "-r", "replica")
    assert code == DONE
    assert out.count("Success: restart on member") == 2
    cluster.wait_healthy(30)
    after = started(cluster)
    assert {name for name in after if after[name] != before[name]} == {node.name for node in replicas}


def test_edit_config_reaches_the_agents(cluster):
    leader = cluster.wait_healthy(30)
    change = '{"maximum_lag_on_failover": 2097152, "postgresql": {"parameters": {"log_min_duration_statement": "5s"}}}'
    assert ctl(cluster, "edit-config", "--force", "--apply", "-", answers=change)[0] == DONE
    try:
        cluster.wait(lambda: leader.ask("SELECT current_setting('log_min_duration_statement')") == "5s", 30, "PostgreSQL has it")
        assert json.loads(ctl(cluster, "show-config", "-f", "json")[1])["maximum_lag_on_failover"] == 2097152
    finally:
        undo = '{"maximum_lag_on_failover": 1048576, "postgresql": {"parameters": {"log_min_duration_statement": null}}}'
        assert ctl(cluster, "edit-config", "-q", "--force", "--apply", "-", answers=undo)[:2] == (DONE, "Configuration changed\n")


def test_remove_takes_the_keys_and_leaves_the_data(beds):
    bed = beds.fresh()
    bed.start()
    leader = bed.wait_healthy(90)
    bed.stop()
    versions = [node.data_dir / "PG_VERSION" for node in bed.nodes]
    assert ctl(bed, "remove", answers=f"{bed.settings.scope}\nNo\n")[0] == REFUSED
    kept = {key for key, _, _ in bed.etcd.get(bed.key(""))}
    assert bed.key("initialize") in kept
    code, out, _ = ctl(bed, "remove", answers=f"{bed.settings.scope}\nYes I am aware\n{leader.name}\n")
    assert code == DONE
    assert f"Success: {len(kept)} keys of cluster {bed.settings.scope} removed; no data was touched\n" in out
    assert bed.etcd.get(bed.key("")) == []
    assert all(file.exists() for file in versions)
    assert ctl(bed, "list")[0] == FAILED
