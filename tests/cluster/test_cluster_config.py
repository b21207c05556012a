"""Configuration changes on a real cluster that a DBA can trust: what is refused changes nothing, what needs restarts is rolled
in order under writes, and what somebody writes past all checks does no harm."""

import json
import signal
import subprocess

import psycopg
import pytest
from console import DONE, REFUSED, USAGE, ctl
from traffic import Traffic

from pgha.demo.processes import CLEAN_ENVIRONMENT, as_user

pytestmark = pytest.mark.cluster

WHERE = "/config: postgresql.parameters."


def stored(cluster):
    ((_, value, revision),) = cluster.etcd.get(cluster.key("config"))
    return json.loads(value), revision


def parameter(node, name):
    return node.ask(f"SELECT current_setting('{name}')")


def has(node, name, value):
    """Also while PostgreSQL is restarted."""
    try:
        return parameter(node, name) == value
    except psycopg.OperationalError:
        return False


def pending(node):
    return node.patroni().get("pending_restart_reason")


def test_what_is_refused_changes_nothing(cluster):
    leader = cluster.wait_healthy(30)
    before = stored(cluster)
    for arguments, err in (
        (("-p", "wrok_mem=8MB"), f"{WHERE}wrok_mem: is no parameter of PostgreSQL 15; did you mean work_mem?"),
        (("-p", "work_mem=8 parsecs"), f'{WHERE}work_mem: is "8 parsecs", which is no number of this kind; allowed: a number from 64 to 2147483647, in kB'),
        (("-p", "max_connections=9999999"), f'{WHERE}max_connections: is "9999999", out of range; allowed: a number from 1 to 262143'),
        (("-p", "timezone=Mars"), f'{WHERE}timezone: PostgreSQL 15 refuses it: invalid value for parameter "TimeZone": "Mars"'),
        (("-p", "port=5433"), f"{WHERE}port: is set by pgha itself"),
        (("-s", "tll=20"), "/config: tll: unknown key; did you mean ttl?"),
        (("-s", "ttl=5", "-s", "retry_timeout=10"), "/config: ttl: loop_wait + 2 x retry_timeout"),
        (("-s", "postgresql.recovery_conf.recovery_min_apply_delay=soon"), '/config: postgresql.recovery_conf.recovery_min_apply_delay: is "soon"'),
    ):
        code, out, errors = ctl(cluster, "edit-config", "--force", *arguments)
        assert (code, out) == (USAGE, "")
        assert f"pgha: {err}" in errors
    answer = leader.request("PATCH", "/config", {"postgresql": {"parameters": {"wal_level": "logicall", "vacuum_defer_cleanup_age": "x"}}})
    assert answer.status == 400
    assert answer.body.splitlines() == [f'{WHERE}wal_level: is "logicall"; allowed: replica or logical',
                                        f'{WHERE}vacuum_defer_cleanup_age: is "x", which is no number of this kind; allowed: a number from 0 to 1000000']
    assert leader.request("PUT", "/config", {"ttl": 20, "loop_wait": 20}).status == 400
    replica = next(node for node in cluster.nodes if node is not leader)
    question = {"config": {**before[0], "postgresql": {"parameters": {"shared_buffers": "64MB", "wrok_mem": 1}}}}
    answer = replica.request("POST", "/pgha/config/check", question)
    assert answer.status == 200
    assert (answer.body["problems"], answer.body["asked"]) == ([f"{WHERE}wrok_mem: is no parameter of PostgreSQL 15; did you mean work_mem?"], "server")
    assert stored(cluster) == before
    assert cluster.wait_healthy(10) is leader


def test_a_limit_is_raised_and_lowered_in_order_under_writes(cluster):
    leader = cluster.wait_healthy(30)
    replicas = sorted(node.name for node in cluster.nodes if node is not leader)
    had = int(parameter(leader, "max_connections"))
    try:
        for new, order in ((had + 60, f"{', '.join(replicas)}, {leader.name} (primary)"), (had, f"{leader.name} (primary), {', '.join(replicas)}")):
            old = int(parameter(leader, "max_connections"))
            code, out, _ = ctl(cluster, "edit-config", "--force", "-p", f"max_connections={new}")
            assert code == DONE
            assert out.count(f": max_connections {old} → {new}") == 3
            assert f"in this order: {order} (max_connections is " in out
            reason = {"max_connections": {"old_value": str(old), "new_value": str(new)}}
            cluster.wait(lambda reason=reason: all(pending(node) == reason for node in cluster.nodes), 20, "every member waits for a restart")
            cluster.wait(lambda reason=reason: all(cluster.etcd.value(cluster.key(f"members/{node.name}")).get("pending_restart_reason") == reason for node in cluster.nodes),
                         10, "the member keys say so")
            cluster.wait(lambda reason=reason: all(member.get("pending_restart_reason") == reason for member in leader.get("/cluster").body["members"]), 10, "GET /cluster says so")
            rows = json.loads(ctl(cluster, "list", "-f", "json")[1])
            assert [row["Pending restart reason"] for row in rows] == [f"max_connections: {old}->{new}"] * 3
            with Traffic(cluster) as traffic:
                at_s = traffic.fault(f"max_connections {old} → {new}")
                code, out, err = ctl(cluster, "restart", "--force", "--pending")
                assert (code, err) == (DONE, "")
                assert f"In this order: {order}" in out
                assert [line for line in out.splitlines() if line.startswith("Success")] == [f"Success: restart on member {name.removesuffix(' (primary)')}" for name in order.split(", ")]
                verdict = traffic.finish()
                assert len(verdict.reigns) <= 2, "nobody else has led"
                assert traffic.resumed_after_s(at_s) < 10
            assert cluster.leader() is leader
            assert {parameter(node, "max_connections") for node in cluster.nodes} == {str(new)}
            cluster.wait(lambda: all(pending(node) is None for node in cluster.nodes), 20, "nobody waits for a restart any more")
        # taken back before any restart: nothing waits
        assert ctl(cluster, "edit-config", "-q", "--force", "-p", f"max_connections={had + 10}")[0] == DONE
        cluster.wait(lambda: all(pending(node) for node in cluster.nodes), 20, "every member waits for a restart")
        assert ctl(cluster, "edit-config", "-q", "--force", "-p", f"max_connections={had}")[0] == DONE
        cluster.wait(lambda: all(pending(node) is None for node in cluster.nodes), 20, "nobody waits for a restart any more")
        assert ctl(cluster, "restart", "--force", "--pending")[0] == REFUSED
    finally:
        ctl(cluster, "edit-config", "-q", "--force", "-p", f"max_connections={had}")


def test_a_primary_that_is_restarted_first_leaves_no_standby_behind(cluster):
    """In the wrong order, or after a crash under a raised configuration: PostgreSQL stops replaying on the standbys, which restart by themselves."""
    leader = cluster.wait_healthy(30)
    had = int(parameter(leader, "max_connections"))
    new = had + 70
    try:
        assert ctl(cluster, "edit-config", "-q", "--force", "-p", f"max_connections={new}")[0] == DONE
        cluster.wait(lambda: all(pending(node) for node in cluster.nodes), 20, "every member waits for a restart")
        leader.signal_postgres(signal.SIGKILL)      # started in place, it has what is configured at once
        cluster.wait(lambda: all(has(node, "max_connections", str(new)) for node in cluster.nodes), 60, "the standbys have followed")
        leader = cluster.wait_healthy(30)
        with leader.connect() as connection:
            connection.execute("CREATE TABLE room ()")
        cluster.wait(lambda: all(node.ask("SELECT to_regclass('room')") for node in cluster.nodes), 20, "everybody replays")
        with leader.connect() as connection:
            connection.execute("DROP TABLE room")
    finally:
        assert ctl(cluster, "edit-config", "-q", "--force", "-p", f"max_connections={had}")[0] == DONE
        cluster.wait(lambda: all(pending(node) for node in cluster.nodes), 20, "every member waits for a restart")
        assert ctl(cluster, "restart", "--force", "--pending")[0] == DONE
    cluster.wait_healthy(30)


def test_what_is_written_past_all_checks_does_no_harm(cluster):
    leader = cluster.wait_healthy(30)
    good, _ = stored(cluster)
    bad = json.loads(json.dumps(good))
    bad |= {"ttl": "for ever", "synchronous_node_count": -3, "unheard_of": {"x": 1}}
    bad.setdefault("postgresql", {}).setdefault("parameters", {}).update({
        "work_mem": "8 parsecs", "wrok_mem": 1, "max_connections": 9999999, "shared_preload_libraries": 5, "timezone": "Mars", "maintenance_work_mem": "9MB", "wal_buffers": "1e999999999GB",
        "log_line_prefix": "it's 100% \\ %m "})
    bad["postgresql"]["parameters"].pop("shared_preload_libraries")
    assert cluster.etcd.put(cluster.key("config"), json.dumps(bad).encode())
    try:
        cluster.wait(lambda: all(parameter(node, "maintenance_work_mem") == "9MB" for node in cluster.nodes), 30, "what is good of it counts")
        replica = next(node for node in cluster.nodes if node is not leader)
        for node in (replica, leader):
            answer = node.request("POST", "/restart", {}, timeout_s=60)
            assert (answer.status, answer.body) == (200, "restarted successfully"), answer
        assert cluster.wait_healthy(30) is leader
        assert parameter(leader, "work_mem") == "4MB"
        assert "PostgreSQL does not take a setting: it is left out" in replica.log_path.read_text()
        problems = replica.get("/pgha/decision").body["problems"]
        assert any(problem.startswith('/config: ttl: is "for ever", not a number') for problem in problems), problems
        assert 'PostgreSQL setting left out: wrok_mem: unrecognized configuration parameter "wrok_mem"' in problems
        count = sum(problem.startswith(("/config: ", "PostgreSQL setting left out")) for problem in problems)
        assert f'pgha_configuration_problems{{scope="{cluster.settings.scope}",name="{replica.name}"}} {count}\n' in replica.get("/metrics").body
        # an agent that begins beside a running server has been told nothing by a start, and asks itself
        for node in (replica, leader):
            node.kill_agent()
            node.start_agent()
        cluster.wait(lambda: all(node.patroni().get("state") == "running" for node in cluster.nodes), 30, "every agent runs and has seen its server")
        assert cluster.wait_healthy(30) is leader
        cluster.wait(lambda: not any("wal_buffers" in (pending(node) or {}) for node in (replica, leader)), 10, "nothing waits for a restart that would not apply it")
        # and an operator can change something else, is told of the rest, and can mend it
        code, _, err = ctl(cluster, "edit-config", "--force", "-p", "work_mem=5MB")
        assert code == DONE
        assert f"warning: {WHERE}wrok_mem: is no parameter of PostgreSQL 15; did you mean work_mem?; it is left out, as before" in err
        cluster.wait(lambda: all(parameter(node, "work_mem") == "5MB" for node in cluster.nodes), 30, "the change is there")
    finally:
        assert cluster.etcd.put(cluster.key("config"), json.dumps(good).encode())
    assert cluster.wait_healthy(30) is leader


def why(node, *arguments):
    """`pgha config why` with this node's configuration."""
    program = node.settings.program
    done = subprocess.run([*program.argv, "config", "why", "-c", str(node.config_path), *arguments], capture_output=True, text=True, timeout=60, check=False, cwd="/",
                          env={**CLEAN_ENVIRONMENT, **program.environment}, **as_user("postgres"))
    print(f"config why {' '.join(arguments)} → {done.returncode}\n{done.stdout}{done.stderr}")
    assert node.settings.password not in done.stdout + done.stderr
    return done.returncode, done.stdout, done.stderr


def test_why_a_key_has_its_value(cluster):
    leader = cluster.wait_healthy(30)
    assert ctl(cluster, "edit-config", "-q", "--force", "-p", "work_mem=6MB")[0] == DONE
    try:
        cluster.wait(lambda: parameter(leader, "work_mem") == "6MB", 30, "PostgreSQL has it")
        _, revision = stored(cluster)
        code, out, err = why(leader, "postgresql.parameters.work_mem", "ttl", "postgresql.data_dir", "postgresql.authentication.superuser.password")
        assert (code, err) == (DONE, "")
        lines = out.splitlines()
        assert lines[0] == 'postgresql.parameters.work_mem = "6MB"'
        assert lines[1].startswith(f"  from  /config in the store (changed at revision {revision}, seen by {leader.name} at 20")
        assert lines[2].startswith(f'  PostgreSQL on {leader.name} has "6MB" (configuration file of {leader.data_dir}/postgresql.conf line ')
        assert lines[3] == "ttl = 5"
        data_dir = next(line for line in lines if line.startswith("  from  ") and str(leader.config_path) in line)
        number = leader.config_path.read_text().splitlines().index(f'data_dir = "{leader.data_dir}"') + 1
        assert f"{leader.config_path} line {number} (file changed 20" in data_dir
        assert 'postgresql.authentication.superuser.password = "***"' in lines
        assert why(leader, "postgresql.parameters.wrok_mem")[::2] == (USAGE, "pgha: postgresql.parameters.wrok_mem: is no parameter of PostgreSQL 15; did you mean work_mem?\n")
        code, out, _ = why(leader, "--json", "postgresql.parameters.max_connections")
        answer = json.loads(out)
        assert (code, answer["layers"][0]["layer"], answer["running"]["source"]) == (DONE, "store", "command line")
    finally:
        ctl(cluster, "edit-config", "-q", "--force", "-p", "work_mem=null")
