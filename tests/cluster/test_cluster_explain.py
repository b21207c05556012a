"""After a failover that was refused, `ctl explain NODE` names each obstacle with its numbers; `explain --if` foretells what
then really happens."""

import json
import re
import signal
import time

import pytest
from console import ctl

from pgha.ctl.explain import words
from pgha.demo.processes import identify, run

pytestmark = pytest.mark.cluster

UNREACHABLE = 5
BALLAST = "INSERT INTO ballast SELECT repeat(md5(random()::text), 30) FROM generate_series(1, 3000)"  # about 3 MiB


def explain(bed, node):
    """What `pgha ctl explain` prints about this node, asked with its own configuration; empty while its agent starts."""
    program = bed.settings.program
    answer = run([*program.argv, "ctl", "-c", str(node.config_path), "explain", node.name], timeout_s=20, user="postgres",
                 environment=program.environment)
    assert answer.returncode in {0, UNREACHABLE}, answer
    return answer.stdout


def until_explained(bed, node, *patterns, timeout_s=30):
    """Wait until all of these are in one explanation."""

    def found():
        text = explain(bed, node)
        return text if all(re.search(p, text) for p in patterns) else None

    try:
        print(bed.wait(found, timeout_s, f"explain {node.name} says {patterns}"))
    finally:
        print(explain(bed, node))


def stop_walsender_of(leader, node):
    """From now on this node receives nothing."""
    walsender = identify(leader.ask(f"SELECT pid FROM pg_stat_replication WHERE application_name = '{node.name}'"))
    assert walsender.send(signal.SIGSTOP)
    return walsender


def kill_node(node):
    node.signal_agent(signal.SIGKILL)
    node.signal_postgres(signal.SIGKILL)
    node.kill_agent()


def test_lag_and_tag(cluster):
    old = cluster.leader()
    behind, ahead = (node for node in cluster.nodes if node is not old)
    try:
        behind.tags = {"nofailover": True}
        behind.write_configuration()
        assert behind.signal_agent(signal.SIGHUP)
        cluster.wait(lambda: (cluster.etcd.value(cluster.key(f"members/{behind.name}")) or {}).get("tags"), 20, "the tag is published")
        with old.connect() as sql:
            sql.execute("CREATE TABLE IF NOT EXISTS ballast (x text)")
            stop_walsender_of(old, behind)
            sql.execute(BALLAST)
            received = f"SELECT flush_lsn >= pg_current_wal_lsn() FROM pg_stat_replication WHERE application_name = '{ahead.name}'"
            cluster.wait(lambda: sql.execute(received).fetchone()[0], 20, f"{ahead.name} has received it")
            stop_walsender_of(old, ahead)
            sql.execute(BALLAST)
            position = sql.execute("SELECT (pg_current_wal_lsn() - '0/0')::bigint").fetchone()[0]
        cluster.wait(lambda: cluster.etcd.value(cluster.key("status"))["optime"] >= position, 20, "the leader has published its position")
        kill_node(old)
        until_explained(cluster, ahead, r"promotion\.caught_up.*lag [2-9]\.\d MiB, limit 1\.0 MiB")
        until_explained(cluster, behind, r"promotion\.caught_up.*lag ([5-9]|1\d)\.\d MiB, limit 1\.0 MiB", r"promotion\.not_nofailover.*nofailover is set")
        assert cluster.leader() is None
    finally:
        behind.tags = {}
        behind.write_configuration()
        behind.signal_agent(signal.SIGHUP)
    old.start_agent()
    assert cluster.wait_healthy(60) is old, "only it has everything"


def test_timeline(cluster):
    """A node that missed a promotion does not lead when timelines are checked."""
    first = cluster.leader()
    missing, second = (node for node in cluster.nodes if node is not first)
    before = first.patroni()["timeline"]
    assert first.request("PATCH", "/config", {"check_timeline": True}).status == 200
    try:
        kill_node(missing)
        kill_node(first)
        assert cluster.wait_leader(other_than=first, timeout_s=30) is second
        timeline = cluster.wait(lambda: (t := second.patroni().get("timeline", 0)) > before and t, 20, "a new timeline")
        cluster.wait(lambda: any(row[0] == before for row in cluster.etcd.value(cluster.key("history")) or []), 20, "the promotion is in /history")
        kill_node(second)
        missing.start_agent()
        until_explained(cluster, missing, rf"promotion\.timeline_is_known.*own timeline {before}, the cluster's {timeline}", timeout_s=60)
        assert cluster.leader() is None
        second.start_agent()
        first.start_agent()
        assert cluster.wait_healthy(90) is second
    finally:
        cluster.wait(lambda: any((a := n.request("PATCH", "/config", {"check_timeline": None})) and a.status == 200 for n in cluster.nodes), 20, "reset")


def test_a_peer_ahead(cluster):
    """The node that is not chosen says which one is ahead.

    The old primary had more than both, so the one ahead waits for it for a moment, and for that long the other one's
    decision says so. It is asked for as quickly as possible and put into words as `ctl explain` does.
    """
    old = cluster.leader()
    behind, ahead = (node for node in cluster.nodes if node is not old)
    few = "INSERT INTO ballast SELECT repeat('x', 100) FROM generate_series(1, 1000)"
    with old.connect() as sql:
        sql.execute("CREATE TABLE IF NOT EXISTS ballast (x text)")
        stop_walsender_of(old, behind)
        sql.execute(few)
        received = f"SELECT flush_lsn >= pg_current_wal_lsn() FROM pg_stat_replication WHERE application_name = '{ahead.name}'"
        cluster.wait(lambda: sql.execute(received).fetchone()[0], 20, f"{ahead.name} has received it")
        stop_walsender_of(old, ahead)
        sql.execute(few)
        position = sql.execute("SELECT (pg_current_wal_lsn() - '0/0')::bigint").fetchone()[0]
    cluster.wait(lambda: cluster.etcd.value(cluster.key("status"))["optime"] >= position, 20, "the leader has published its position")
    kill_node(old)

    def refused():
        answer = behind.get("/pgha/decision")
        failed = {r["rule"] for r in answer.body["reasons"] if not r["holds"]}
        return words(answer.body) if "promotion.no_peer_is_ahead" in failed else None

    text = cluster.wait(refused, 30, f"{behind.name} says that {ahead.name} is ahead", every_s=0.002)
    assert re.search(rf"FAILS  promotion\.no_peer_is_ahead .*own \S+ on timeline \d+.*{ahead.name} at [0-9A-F]+/[0-9A-F]+ on timeline \d+", text), text
    assert cluster.wait_leader(other_than=old, timeout_s=30) is ahead
    old.start_agent()
    cluster.wait_healthy(60)


def foretold(bed, *what):
    """What `explain --if` says."""
    code, out, err = ctl(bed, "explain", *(word for one in what for word in ("--if", one)), "--format", "json")
    assert code == 0, err
    return json.loads(out)


def test_what_was_foretold_of_a_leader_that_dies(cluster):
    old = cluster.leader()
    others = sorted(node.name for node in cluster.nodes if node is not old)
    cluster.wait(lambda: foretold(cluster, f"{old.name}=down")["certain"], 20, "nothing is written, and nothing is open")
    whole = foretold(cluster, f"{others[0]}=down")
    assert (whole["leader"], whole["winners"], whole["writes_stop"]) == (old.name, [old.name], False), whole
    behind = foretold(cluster, f"{old.name}=down", f"{others[0]}.lag=20MB")
    assert behind["winners"] == [others[1]], behind
    assert any(reason["rule"] == "promotion.caught_up" and "lag 20.0 MiB, limit 1.0 MiB" in reason["because"] for reason in behind["obstacles"][others[0]]), behind
    away = foretold(cluster, "dcs=down")
    assert away["winners"] == []
    assert 0 < away["demotes"][old.name][0] < 5, away
    text = ctl(cluster, "explain", "--if", f"{old.name}=down")[1]
    print(text)
    assert f"{old.name} leads now" in text
    for wrong in (f"{old.name}=up", "nobody=down", f"{old.name}.lag=much"):
        assert ctl(cluster, "explain", "--if", wrong)[:2] == (2, ""), wrong

    said = foretold(cluster, f"{old.name}=down")
    killed_s = time.monotonic()
    kill_node(old)
    new = cluster.wait_leader(other_than=old, timeout_s=30)
    took_s = time.monotonic() - killed_s
    print(f"foretold: {said['winners']} after {said['writes_back_s']} s; {new.name} led after {took_s:.2f} s")
    assert said["winners"] == [new.name], said
    assert said["writes_back_s"][0] - 0.5 <= took_s <= said["writes_back_s"][1] + 1.0, (said, took_s)
    old.start_agent()
    cluster.wait_healthy(60)


#: What a calm cluster writes all the time.
REGULAR = ("pgha/lock", "status", "members/")


def kept(bed):
    """Every key of the cluster with its revision, but what is written regularly; and when each PostgreSQL was started."""
    keys = {key: (value, revision) for key, value, revision in bed.etcd.get(bed.key("")) if not key.removeprefix(bed.key("")).startswith(REGULAR)}
    return keys, [node.patroni()["postmaster_start_time"] for node in bed.nodes], bed.leader().name


def test_dry_runs_change_nothing_and_come_true(cluster):
    old = cluster.leader()
    new, third = (node for node in cluster.nodes if node is not old)
    before = kept(cluster)

    def dry(*arguments):
        code, out, err = ctl(cluster, *arguments, "--dry-run")
        print(out, err)
        assert kept(cluster) == before, arguments
        return code, out + err

    code, said = dry("switchover", "--candidate", new.name)
    assert code == 0
    order = [said.index(word) for word in ("checkpoint:", "demote:", "wait:", "release:", "acquire:", "promote:", "rejoin:")]
    assert order == sorted(order)
    assert f"{new.name}: can take over (lag" in said
    assert dry("failover", "--candidate", third.name)[0] == 0
    code, said = dry("switchover", "--candidate", "nobody")
    assert (code, "switchover.has_good_candidate" in said) == (3, True)
    code, said = dry("restart", third.name)
    assert (code, f"starting as a standby of {old.name}" in said) == (0, True)
    code, said = dry("restart", old.name)
    assert (code, "starting as primary" in said) == (0, True)
    code, said = dry("reinit", third.name)
    assert (code, f"copying from {old.name} with pg_basebackup" in said) == (0, True)
    assert dry("reinit", old.name)[0] == 3
    code, said = dry("remove")
    assert (code, f"if {old.name} still leads then" in said) == (0, True)
    code, said = dry("edit-config", "-s", "maximum_lag_on_failover=2MB")
    assert (code, "maximum_lag_on_failover" in said) == (0, True)
    assert dry("edit-config", "-s", "ttl=0")[0] == 2

    with old.connect() as sql:      # a standby that lags would be refused, and is
        walsender = stop_walsender_of(old, third)
        sql.execute("CREATE TABLE IF NOT EXISTS ballast (x text)")
        sql.execute(BALLAST)
        sql.execute(BALLAST)
    code, said = dry("switchover", "--candidate", third.name)
    assert (code, re.search(r"lag [5-9]\.\d MiB, limit 1\.0 MiB", said) is not None) == (3, True), said
    assert ctl(cluster, "switchover", "--candidate", third.name, "--force")[0] != 0
    assert cluster.leader() is old
    assert walsender.send(signal.SIGCONT)

    assert ctl(cluster, "switchover", "--candidate", new.name, "--force")[0] == 0
    cluster.wait(lambda: cluster.leader() is new, 20, "it leads")
    cluster.wait_healthy(60)
