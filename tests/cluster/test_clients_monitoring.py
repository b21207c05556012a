"""What watches a cluster, unchanged: check_patroni from PyPI with every check it has, and promtool on /metrics.

Each check is seen to say OK where all is well, and to fail where it should: the cluster is brought into that state.
"""

import json
import os
import re
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
from patronictl import PatroniCtl

from pgha.demo.processes import CLEAN_ENVIRONMENT
from tests.clients.patroni_env import check_patroni

pytestmark = pytest.mark.cluster

OK, WARNING, CRITICAL, UNKNOWN = range(4)
PROMTOOL = shutil.which("promtool", path="/usr/bin:/usr/local/bin")
GOLDEN = Path(__file__).parents[1] / "golden"
#: All that check_patroni --help lists; `asked` notes which of them the tests have run.
CHECKS = ("cluster_config_has_changed", "cluster_has_leader", "cluster_has_replica", "cluster_has_scheduled_action", "cluster_is_in_maintenance",
          "cluster_node_count", "node_is_alive", "node_is_leader", "node_is_pending_restart", "node_is_primary", "node_is_replica",
          "node_patroni_version", "node_tl_has_changed")
COUNTERS = {"patroni_xlog_location", "patroni_xlog_received_location", "patroni_xlog_replayed_location"}


class Check:
    """check_patroni for this cluster: a check and its options in, exit code out. `at`: the node that is asked, else all."""

    def __init__(self, bed):
        self.bed = bed
        self.asked = set()

    def __call__(self, name, *options, at=None):
        endpoints = [word for node in ([at] if at else self.bed.nodes) for word in ("-e", f"http://{node.address}:{node.rest_port}")]
        done = subprocess.run([str(check_patroni()), *endpoints, name, *options], capture_output=True, text=True, timeout=30, check=False,
                              cwd=self.bed.directory, env=CLEAN_ENVIRONMENT)
        print(f"{name} {' '.join(options)} {at.name if at else ''} → {done.returncode} {done.stdout.strip()} {done.stderr.strip()}")
        self.asked.add((name, done.returncode))
        return done.returncode

    def becomes(self, wanted, name, *options, at=None):
        self.bed.wait(lambda: self(name, *options, at=at) == wanted, 20, f"{name} says {wanted}", every_s=0.3)


def run(node, command):
    with node.connect() as connection:
        connection.execute(command)


def set_tags(nodes, tags):
    for node in nodes:
        node.tags = tags
        node.write_configuration()
        node.signal_agent(signal.SIGHUP)


def test_every_check_of_check_patroni_says_ok_and_fails_where_it_should(cluster):
    leader = cluster.wait_healthy(30)
    check, patronictl = Check(cluster), PatroniCtl(cluster)
    replica, other = (node for node in cluster.nodes if node is not leader)
    state = str(cluster.directory / "check.state")

    # a healthy cluster
    assert check("cluster_has_leader") == OK
    check.becomes(OK, "cluster_has_replica", "--warning", "@1", "--critical", "@0", "--max-lag", "1MB")     # by member keys, a pass old
    assert check("cluster_has_scheduled_action") == OK
    assert check("cluster_is_in_maintenance") == OK
    assert check("cluster_node_count", "--warning", "@2", "--critical", "@1", "--healthy-warning", "@2", "--healthy-critical", "@1") == OK
    for node in cluster.nodes:
        assert check("node_is_alive", at=node) == OK
        assert check("node_is_leader", at=node) == check("node_is_primary", at=node) == (OK if node is leader else CRITICAL)
        assert check("node_is_replica", "--max-lag", "1MB", at=node) == (CRITICAL if node is leader else OK)
        assert check("node_is_pending_restart", at=node) == OK
    assert check("node_is_leader", "--is-standby-leader", at=leader) == CRITICAL
    assert check("node_is_replica", "--is-async", at=replica) == OK
    assert check("node_is_replica", "--is-sync", at=replica) == CRITICAL
    assert check("node_patroni_version", "--patroni-version", "4.1.4", at=leader) == OK
    assert check("node_patroni_version", "--patroni-version", "3.0.0", at=leader) == CRITICAL

    # the configuration: its hash, kept between calls
    assert check("cluster_config_has_changed", "--save", "--state-file", state) in (OK, CRITICAL), "there was none to compare with"
    assert check("cluster_config_has_changed", "--state-file", state) == OK
    patronictl("edit-config", "--force", "-q", "-p", "max_connections=120", "-s", "synchronous_mode=true")
    try:
        check.becomes(CRITICAL, "cluster_config_has_changed", "--state-file", state)
        for node in cluster.nodes:
            check.becomes(CRITICAL, "node_is_pending_restart", at=node)

        # one of two replicas is synchronous
        check.becomes(OK, "cluster_has_replica", "--sync-critical", "@0")
        assert check("cluster_has_replica", "--sync-warning", "@1", "--sync-type", "sync") == WARNING
        assert check("cluster_has_replica", "--sync-critical", "@0", "--sync-type", "quorum") == CRITICAL
        synchronous = cluster.wait(lambda: next((node for node in (replica, other) if check("node_is_replica", "--is-sync", "--sync-type", "sync", at=node) == OK), None),
                                   20, "one is a synchronous standby")
        asynchronous = other if synchronous is replica else replica
        assert check("node_is_replica", "--is-async", at=synchronous) == CRITICAL
        assert check("node_is_replica", "--is-async", at=asynchronous) == OK
    finally:
        patronictl("edit-config", "--force", "-q", "-p", "max_connections=100", "-s", "synchronous_mode=null")
    for node in cluster.nodes:
        check.becomes(OK, "node_is_pending_restart", at=node)
    check.becomes(OK, "cluster_config_has_changed", "--state-file", state)

    patronictl("pause", "--wait")
    try:
        check.becomes(CRITICAL, "cluster_is_in_maintenance")
    finally:
        patronictl("resume", "--wait")
    check.becomes(OK, "cluster_is_in_maintenance")

    # timelines
    timeline = str(leader.patroni()["timeline"])
    assert check("node_tl_has_changed", "--timeline", timeline, at=leader) == OK
    tl_state = str(cluster.directory / "timeline.state")
    check("node_tl_has_changed", "--save", "--state-file", tl_state, at=replica)
    assert check("node_tl_has_changed", "--state-file", tl_state, at=replica) == OK
    patronictl("switchover", "--force", "--candidate", replica.name)
    check.becomes(CRITICAL, "node_tl_has_changed", "--state-file", tl_state, at=replica)
    check.becomes(CRITICAL, "node_tl_has_changed", "--timeline", timeline, at=leader)
    check.becomes(OK, "node_is_leader", at=replica)
    check.becomes(OK, "node_is_replica", at=leader)
    assert check("node_is_primary", at=leader) == CRITICAL

    # a replica that lags, and one that is gone
    cluster.wait_healthy(30)
    leader = replica
    lagging, gone = (node for node in cluster.nodes if node is not leader)
    receiver = lagging.ask("SELECT pid FROM pg_stat_wal_receiver")
    os.kill(receiver, signal.SIGSTOP)       # paused replay would not do: what was received does not count as lag in /cluster
    try:
        run(leader, "CREATE TABLE ballast AS SELECT repeat('x', 100) FROM generate_series(1, 20000)")
        check.becomes(CRITICAL, "node_is_replica", "--max-lag", "1kB", at=lagging)
        check.becomes(CRITICAL, "cluster_has_replica", "--critical", "@1", "--max-lag", "1kB")
    finally:
        os.kill(receiver, signal.SIGCONT)
        run(leader, "DROP TABLE IF EXISTS ballast")
    gone.kill_agent()
    try:
        assert check("node_is_alive", at=gone) in (CRITICAL, UNKNOWN), "check_patroni gives either, by its version"
        check.becomes(WARNING, "cluster_node_count", "--warning", "@2", "--critical", "@1")
        check.becomes(CRITICAL, "cluster_has_replica", "--critical", "@1")
    finally:
        gone.start_agent()
    cluster.wait_healthy(30)

    # something is scheduled
    scheduled = {"leader": leader.name, "scheduled_at": "2099-01-01T00:00:00+00:00"}
    assert cluster.etcd.put(cluster.key("failover"), json.dumps(scheduled).encode())
    try:
        check.becomes(CRITICAL, "cluster_has_scheduled_action")
    finally:
        assert "scheduled switchover deleted" in patronictl("flush", cluster.settings.scope, "switchover")
    check.becomes(OK, "cluster_has_scheduled_action")

    # nobody leads, and nobody may
    tagged = [node for node in cluster.nodes if node is not leader]
    set_tags(tagged, {"nofailover": True})
    cluster.wait(lambda: all(node.patroni().get("tags") == {"nofailover": True} for node in tagged), 20, "both are tagged")
    try:
        assert leader.stop_agent() == 0
        check.becomes(CRITICAL, "cluster_has_leader")
        leader.start_agent()
        check.becomes(OK, "cluster_has_leader")
    finally:
        set_tags(tagged, {})
    cluster.wait_healthy(30)

    assert {name for name, _ in check.asked} == set(CHECKS)
    help_text = subprocess.run([str(check_patroni()), "--help"], capture_output=True, text=True, timeout=30, check=True).stdout
    assert re.findall(r"^  ((?:cluster|node)_\w+)", help_text, re.MULTILINE) == list(CHECKS)
    for name in CHECKS:
        results = {code for asked, code in check.asked if asked == name}
        assert OK in results, f"{name} has never said OK"
        assert results - {OK}, f"{name} has never failed"


# -- /metrics


def exposition(text):
    """name → type, and name → labels, of what begins with patroni_."""
    types = dict(re.findall(r"^# TYPE (patroni_\w+) (\w+)$", text, re.MULTILINE))
    labels = dict(re.findall(r"^(patroni_\w+)\{([^}]*)\} \S+$", text, re.MULTILINE))
    return types, labels


def judged(text):
    """What promtool has to say of it, line by line."""
    done = subprocess.run([PROMTOOL, "check", "metrics"], input=text, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode in (0, 3), done.stderr
    return done.stderr.splitlines()


def test_promtool_finds_nothing_in_the_metrics_but_names_that_the_reference_has(cluster):
    assert PROMTOOL, "promtool is missing: run build/setup"
    leader = cluster.wait_healthy(30)
    replica = next(node for node in cluster.nodes if node is not leader)
    for node, which in ((leader, "primary"), (replica, "replica")):
        text = node.get("/metrics").body
        recorded = next(answer["body"] for answer in json.loads((GOLDEN / "steady.json").read_text())[which] if answer["request"] == "GET /metrics")
        types, labels = exposition(text)
        assert types == exposition(recorded)[0]
        assert {name for name, kind in types.items() if kind == "counter"} == COUNTERS
        assert set(types.values()) == {"gauge", "counter"}
        assert labels == dict.fromkeys(types, f'scope="{cluster.settings.scope}",name="{node.name}"')
        assert set(judged(text)) == {f'{name} counter metrics should have "_total" suffix' for name in COUNTERS} == set(judged(recorded))
