"""Live events of a real cluster: through a failover nobody who comes back misses anything, the terminal shows it, and a
thousand who never read are not noticed by the lock."""

import json
import resource
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
from event_readers import Crowd, Follower

from pgha.demo.processes import CLEAN_ENVIRONMENT, as_user, identify, run

sys.path.append(str(Path(__file__).parents[1] / "ctl"))

from terminal import OnTerminal  # noqa: E402  (after the path)

pytestmark = pytest.mark.cluster


def page(node, after="0", kinds=""):
    """All pages as one."""
    whole = None
    while after is not None:
        body = node.get(f"/pgha/events?after={after}{'&kinds=' + kinds if kinds else ''}").body
        after = body["more"]
        whole = body if whole is None else {**body, "gap": whole["gap"] or body["gap"], "events": whole["events"] + body["events"]}
    return whole


def numbers(events):
    """The events' numbers by the run of the agent that they are from, in the order in which they came."""
    found = {}
    for event in events:
        if event["kind"] != "gap":
            found.setdefault(event["id"].rpartition("-")[0], []).append(int(event["id"].rpartition("-")[2]))
    return found


def watch(bed, node, *arguments):
    program = bed.settings.program
    return [*program.argv, "ctl", "-c", str(node.config_path), "watch", *arguments], {**CLEAN_ENVIRONMENT, **program.environment}


def test_through_a_failover(cluster):
    """`ctl watch` on the leader that dies, and followers of every agent."""
    old = cluster.wait_healthy(30)
    followers = {node.name: Follower(node.address, node.rest_port) for node in cluster.nodes}
    begun = {node.name: page(node)["last"] for node in cluster.nodes}
    argv, environment = watch(cluster, old)
    for follower in followers.values():
        follower.start()
    with OnTerminal(argv, columns=100, rows=30, environment=environment, cwd="/", **as_user("postgres")) as terminal:
        terminal.until(lambda t: f"seen by {old.name}" in t and t.count("| Replica |") == 2, "the cluster before")
        assert f"| {old.name} " in terminal.model.text()
        old.signal_agent(signal.SIGKILL)
        old.signal_postgres(signal.SIGKILL)
        old.kill_agent()
        new = cluster.wait_leader(other_than=old, timeout_s=30)
        terminal.until(lambda t: f"{new.name} holds the lock" in t or f"{new.name} has taken the lock" in t, "the new leader")
        text = terminal.until(lambda t: f"| {new.name} " in t and any(f"| {new.name} " in row and "| Leader " in row for row in t.split("\n")), "the table with it")
        assert f"seen by {old.name}" not in text
        terminal.resize(100, 22)
        terminal.resize(100, 30)
        terminal.until(lambda t: f"{old.name} is gone" in t, "its member key has expired")
        old.start_agent()
        cluster.wait_healthy(60)
        text = terminal.until(lambda t: t.count("| Replica |") == 2 and f"{old.name} has joined" in t, "the old leader is back")
        print(text)
        rows = text.split("\n")
        assert len(rows) == 30
        assert rows[0].startswith(f"pgha watch   {cluster.settings.scope}   seen by n")
        assert [row.split("|")[1].strip() for row in rows if row.startswith("| n")] == ["n1", "n2", "n3"]
        seen = "\n".join(terminal.states)
        assert "nobody answers" in seen or f"{old.name} is gone" in seen or f"(before: {old.name})" in seen
        terminal.type(b"q")
        assert terminal.end() == 0
        assert terminal.is_given_back()
        assert [wrong for wrong in terminal.model.wrong if "longer" not in wrong] == [], "nothing is scrolled, nothing unknown is written; a resize may meet a line on its way"
        assert terminal.model.cleared == 1
    nodes = {node.name: node for node in cluster.nodes}
    last = {}
    for name, follower in followers.items():
        kept = page(nodes[name])
        last[name] = kept["events"]
        cluster.wait(lambda follower=follower, kept=kept: kept["last"] in {e["id"] for e in follower.events}, 20, f"{name}'s follower has all")
    for name, follower in followers.items():
        follower.stop()
        assert follower.came >= 4, "it came and went"
        gaps = [(event["reason"], event["after"].rpartition("-")[0]) for event in follower.events if event["kind"] == "gap"]
        found = numbers(follower.events)
        assert gaps == ([("restarted", begun[name].rpartition("-")[0])] if name == old.name else []), (name, gaps)
        assert len(found) == (2 if name == old.name else 1)
        for run_, got in found.items():
            assert got == list(range(got[0], got[-1] + 1)), f"{name} {run_}: nothing is missing, nothing comes twice, all is in order"
        for run_, kept in numbers(last[name]).items():      # (an event may have come since: nobody waited for that one)
            assert set(kept) <= set(found[run_]), "up to the last that there was"
    heard = [(e["kind"], e.get("what"), e.get("holder")) for e in followers[new.name].events]
    for wanted in (("lock", "taken", new.name), ("role", None, None), ("decision", None, None), ("member", "left", None), ("member", "joined", None), ("operation", "begin", None), ("operation", "end", None),
                   ("lock", "holder", new.name)):
        assert wanted in heard, wanted
    argv, environment = watch(cluster, new, "--once")
    once = run(argv, timeout_s=30, user="postgres", environment=environment)
    assert once.returncode == 0, once
    assert once.stdout.startswith("+ Cluster: ")
    assert f"{new.name} lock: {new.name} " in once.stdout or "agent" in once.stdout
    argv, environment = watch(cluster, new, "--once", "--format", "json", "--kinds", "lock")
    assert {json.loads(line)["kind"] for line in run(argv, timeout_s=30, user="postgres", environment=environment).stdout.splitlines()} == {"lock"}


def told(node, after, *wanted):
    """The first event of this node's after that id which has all of these, or None."""
    return next((event for event in page(node, after)["events"] if all(event.get(key) == value for key, value in dict(wanted).items())), None)


def test_lag_configuration_and_a_restart_are_told(cluster):
    leader = cluster.wait_healthy(30)
    slow, other = (node for node in cluster.nodes if node is not leader)
    after = {node.name: page(node)["last"] for node in cluster.nodes}
    with leader.connect() as sql:
        walsender = identify(sql.execute(f"SELECT pid FROM pg_stat_replication WHERE application_name = '{slow.name}'").fetchone()[0])
        assert walsender.send(signal.SIGSTOP)
        try:
            sql.execute("CREATE TABLE IF NOT EXISTS ballast (x text)")
            sql.execute("INSERT INTO ballast SELECT repeat(md5(random()::text), 30) FROM generate_series(1, 3000)")
            over = cluster.wait(lambda: told(leader, after[leader.name], ("kind", "lag"), ("member", slow.name)), 20, "the leader says who is behind")
            assert over["over"]
            assert over["lag_bytes"] > over["limit_bytes"] == 1048576
        finally:
            walsender.send(signal.SIGCONT)
        cluster.wait(lambda: told(leader, over["id"], ("kind", "lag"), ("member", slow.name), ("over", False)), 20, "and that it has caught up")
        assert told(leader, after[leader.name], ("kind", "lag"), ("member", other.name)) is None, "the other one was never behind"
        sql.execute("DROP TABLE ballast")
    assert leader.request("PATCH", "/config", {"maximum_lag_on_failover": 2097152, "postgresql": {"parameters": {"log_min_duration_statement": "5s"}}}).status == 200
    for node in cluster.nodes:
        changed = cluster.wait(lambda node=node: told(node, after[node.name], ("kind", "configuration")), 20, f"{node.name} tells it")
        assert {c["key"]: (c["was"], c["now"]) for c in changed["changed"]} == {
            "maximum_lag_on_failover": (1048576, 2097152), "postgresql.parameters.log_min_duration_statement": (None, "5s")}
    assert leader.request("PATCH", "/config", {"maximum_lag_on_failover": 1048576, "postgresql": {"parameters": {"log_min_duration_statement": None}}}).status == 200
    assert slow.request("POST", "/restart", {}, timeout_s=60).status == 200
    end = cluster.wait(lambda: told(slow, after[slow.name], ("kind", "operation"), ("what", "end"), ("operation", "Restart")), 20, "its end is told")
    assert end["ok"]
    assert told(slow, after[slow.name], ("kind", "operation"), ("what", "begin"), ("number", end["number"]))["operation"] == "Restart"
    cluster.wait(lambda: told(other, after[other.name], ("kind", "member"), ("member", slow.name)), 20, "others see it")
    cluster.wait_healthy(30)


def test_a_member_that_falls_silent_is_left_for_another(cluster):
    """Its agent is frozen: connections stay open and nothing comes."""
    leader = cluster.wait_healthy(30)
    silent = next(node for node in cluster.nodes if node is not leader)
    argv, environment = watch(cluster, silent)
    with OnTerminal(argv, columns=120, rows=20, environment=environment, cwd="/", **as_user("postgres")) as terminal:
        terminal.until(lambda t: f"seen by {silent.name}" in t and t.count("| Replica |") == 2, "the cluster")
        assert silent.signal_agent(signal.SIGSTOP)
        try:
            text = terminal.until(lambda t: "seen by" in t and f"seen by {silent.name}" not in t, "another member")
            assert f"| {leader.name} " in text
        finally:
            silent.signal_agent(signal.SIGCONT)
        terminal.type(b"\x03")
        assert terminal.end() == 0
        assert terminal.is_given_back()
    cluster.wait_healthy(30)


class Asking(threading.Thread):
    """/primary, again and again, a new connection each."""

    def __init__(self, node):
        super().__init__(daemon=True)
        self._node, self._end = node, threading.Event()
        self.took_s, self.failed = [], 0

    def run(self):
        while not self._end.is_set():
            began = time.monotonic()
            answer = self._node.get("/primary")
            self.took_s.append(time.monotonic() - began)
            self.failed += answer is None or answer.status != 200

    def stop(self):
        self._end.set()
        self.join(20)


def test_a_thousand_readers_that_never_read_are_not_noticed(cluster):
    """No renewal is late, nothing is fenced, every health check is answered, and the configuration changes all the while."""
    leader = cluster.wait_healthy(30)
    configuration = leader.configuration
    leader.configuration = lambda: {**configuration(), "pgha": {**configuration()["pgha"], "event_readers": 1000}}
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 16384), hard))      # the agent inherits it; packaging/pgha.service allows more
    try:
        leader.kill_agent()
        leader.start_agent()
        leader = cluster.wait_healthy(30)
        assert "event_readers" in leader.configuration()["pgha"], "it leads again: an agent may be started anew without an interruption"
        before, after = cluster.etcd.value(cluster.key("pgha/lock")), page(leader)["last"]
        with Crowd(leader.address, leader.rest_port, 1100) as crowd:
            assert crowd.served == 1000, "as many as may be"
            asking = Asking(leader)
            asking.start()
            began = time.monotonic()
            for number in range(40):
                assert leader.request("PATCH", "/config", {"maximum_lag_on_failover": 1048576 + number % 2}).status == 200
                time.sleep(0.1)     # the pace at which something happens
            cluster.wait(lambda: cluster.etcd.value(cluster.key("pgha/lock"))["sequence"] >= before["sequence"] + 4, 20, "renewals go on")
            asking.stop()
            assert crowd.leave() >= 1000 - 50 or time.monotonic() - began > 25, "they were there all the while"
        lock = cluster.etcd.value(cluster.key("pgha/lock"))
        assert (lock["holder"], lock["incarnation"]) == (before["holder"], before["incarnation"])
        happened = page(leader, after=after)
        assert happened["gap"] is None
        assert len([e for e in happened["events"] if e["kind"] == "configuration"]) >= 10
        assert [e for e in happened["events"] if e["kind"] == "lock"] == [], "never late, never lost"
        assert asking.failed == 0
        took_ms = sorted(1000 * s for s in asking.took_s)
        print(f"{len(took_ms)} health checks, median {took_ms[len(took_ms) // 2]:.1f} ms, longest {took_ms[-1]:.1f} ms")
        assert cluster.wait_healthy(30) is leader
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        leader.configuration = configuration
        leader.write_configuration()
        leader.signal_agent(signal.SIGHUP)
        leader.request("PATCH", "/config", {"maximum_lag_on_failover": 1048576})
