"""patronictl 4.1 from PyPI, unchanged, on a cluster of pgha: what it shows is so, what it asks is done, and it says what it says of Patroni.

Rules of this file: every command is checked by its effect, seen from somewhere else, and by the text that people and
scripts know. Nobody tells patronictl that these are not Patroni's agents.
"""

import itertools
import json
import subprocess
from datetime import UTC, datetime, timedelta

import pytest
from patronictl import PatroniCtl, write_file

pytestmark = pytest.mark.cluster

LSN = r"[0-9A-F]+/[0-9A-F]+"
COLUMNS = ["Cluster", "Member", "Host", "Role", "State", "TL", "Receive LSN", "Receive Lag", "Replay LSN", "Replay Lag"]
FAR = "2099-01-01T00:00:00+00:00"


@pytest.fixture
def patronictl(cluster):
    return PatroniCtl(cluster)


def others(cluster, leader):
    return [node for node in cluster.nodes if node is not leader]


def table(text):
    """The cells of a table, by lines; the lines without cells are what stands below it."""
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("| ")]


def system(cluster):
    return cluster.nodes[0].patroni()["database_system_identifier"]


def test_what_patronictl_shows_is_so(cluster, patronictl):
    leader = cluster.wait_healthy(30)
    first, second = others(cluster, leader)
    timeline = leader.patroni()["timeline"]
    cluster.wait(lambda: all(row.get("Replay Lag") == row.get("Receive Lag") == 0 for row in patronictl.rows() if row["Member"] != leader.name), 15,
                 "what the members publish of a new cluster has caught up")
    rows = patronictl.rows()
    assert [row["Member"] for row in rows] == [node.name for node in cluster.nodes]
    for row in rows:
        node = cluster.node(row["Member"])
        assert (row["Cluster"], row["Host"], row["TL"]) == (cluster.settings.scope, node.address, timeline)
        assert (row["Role"], row["State"]) == (("Leader", "running") if node is leader else ("Replica", "streaming"))
        assert list(row) == COLUMNS if node is not leader else COLUMNS[:6]
        assert node is leader or (row["Receive Lag"], row["Replay Lag"]) == (0, 0)

    first_line, *_ = patronictl("list").splitlines()
    assert first_line.startswith(f"+ Cluster: {cluster.settings.scope} ({system(cluster)}) -")
    assert table(patronictl("list"))[0] == ["Member", "Host", "Role", "State", "TL", "Receive LSN", "Lag", "Replay LSN", "Lag"]
    stamp, *extended = patronictl("list", "-e", "-t").splitlines()
    assert abs(datetime.strptime(stamp, "%Y-%m-%d %H:%M:%S").replace(tzinfo=UTC) - datetime.now(UTC)) < timedelta(seconds=30)
    assert table("\n".join(extended))[0][9:] == ["Pending restart", "Pending restart reason", "Scheduled restart", "Tags"]
    tsv = [line.split("\t") for line in patronictl("list", "-f", "tsv").splitlines()]
    assert tsv[0] == COLUMNS
    assert [line[1] for line in tsv[1:]] == [node.name for node in cluster.nodes]
    assert f"  Member: {leader.name}\n  Role: Leader\n  State: running\n" in patronictl("list", "-f", "yaml")
    assert patronictl("list", cluster.settings.scope, "-f", "pretty").splitlines()[0] == first_line
    by_url = subprocess.run([patronictl.command()[0], "-d", f"etcd3://{cluster.etcd.endpoints[0]}", "list", cluster.settings.scope, "-f", "tsv"],
                            capture_output=True, text=True, timeout=30, check=True, env=patronictl.environment, cwd=cluster.directory)
    assert by_url.stdout.splitlines()[0].split("\t") == COLUMNS, "without a configuration file"
    watch = subprocess.Popen(patronictl.command("list", "-W"), stdout=subprocess.PIPE, text=True, env=patronictl.environment)
    try:
        assert sum(f"| {leader.name} " in line for line in itertools.islice(watch.stdout, 16)) == 2, "it looks again and again"
    finally:
        watch.kill()
        watch.communicate(timeout=10)

    assert patronictl("dsn") == f"host={leader.address} port={leader.port}\n"
    assert patronictl("dsn", "-r", "replica") in {f"host={node.address} port={node.port}\n" for node in (first, second)}
    assert patronictl("dsn", "-m", second.name) == f"host={second.address} port={second.port}\n"
    assert patronictl("version", cluster.settings.scope).splitlines()[2:] == [
        f"{node.name}: Patroni 4.1.4 PostgreSQL {node.ask('SHOW server_version').split()[0]}" for node in cluster.nodes]
    assert patronictl("version", cluster.settings.scope, second.name).splitlines()[2:] == [
        f"{second.name}: Patroni 4.1.4 PostgreSQL {second.ask('SHOW server_version').split()[0]}"]

    where = ("query", "-U", "postgres", "--format", "json", "-c", "SELECT host(inet_server_addr()) AS address, pg_is_in_recovery() AS standby")
    assert json.loads(patronictl(*where)) == [{"address": leader.address, "standby": False}]
    assert json.loads(patronictl(*where, "-r", "replica"))[0]["standby"] is True
    assert json.loads(patronictl(*where, "-m", second.name)) == [{"address": second.address, "standby": True}]
    script = write_file(cluster, "script.sql", "SELECT 41 + 1 AS answer")
    assert patronictl("query", "-U", "postgres", "-f", str(script)).split() == ["answer", "42"]

    second.tags = {"replicatefrom": first.name}
    second.write_configuration()
    second.signal_agent(1)
    try:
        cluster.wait(lambda: f"|   + {second.name} " in patronictl("topology"), 30, f"{second.name} stands below {first.name}")
        assert [line.split("|")[1].rstrip()[1:] for line in patronictl("topology").splitlines() if line.startswith("| ")][1:] == [
            leader.name, f"+ {first.name}", f"  + {second.name}"]
        assert table(patronictl("list", "-e"))[1 + cluster.nodes.index(second)][-1] == f"replicatefrom: {first.name}"
    finally:
        second.tags = {}
        second.write_configuration()
        second.signal_agent(1)
    cluster.wait_healthy(30)


def test_switchover_and_failover_by_patronictl(cluster, patronictl):
    old = cluster.wait_healthy(30)
    scope = cluster.settings.scope
    first, second = others(cluster, old)
    before = json.loads(patronictl("history", "-f", "json"))

    refusals = [
        (("switchover", "--force", "--candidate", "nobody"), f"Error: Member nobody does not exist in cluster {scope} or is tagged as nofailover\n"),
        (("switchover", "--force", "--candidate", old.name), f"Error: Member {old.name} is already the leader of cluster {scope}\n"),
        (("switchover", "--force", "--leader", first.name), f"Error: Member {first.name} is not the leader of cluster {scope}\n"),
        (("failover", "--force"), "Error: Failover could be performed only to a specific candidate\n"),
        (("failover", "--force", "--candidate", "nobody"), f"Error: Member nobody does not exist in cluster {scope} or is tagged as nofailover\n"),
    ]
    for arguments, why in refusals:
        assert patronictl.ask(*arguments)[::2] == (1, why)
    assert patronictl.ask("switchover", "--candidate", first.name, answers="\n\nn\n")[::2] == (1, "Error: Aborting switchover\n")
    assert cluster.leader() is old

    out = patronictl("switchover", "--candidate", first.name, answers=f"{old.name}\nnow\ny\n")
    assert f'Successfully switched over to "{first.name}"' in out
    assert cluster.wait_healthy(30) is first
    out = patronictl("switchover", "--force", "--leader", first.name)
    assert "Successfully switched over to" in out
    third = cluster.wait_healthy(30)
    assert third is not first
    goal = next(node for node in cluster.nodes if node not in (third, first))
    assert f'Successfully failed over to "{goal.name}"' in patronictl("failover", "--force", "--candidate", goal.name)
    assert cluster.wait_healthy(30) is goal

    rows = cluster.wait(lambda: (found := json.loads(patronictl("history", "-f", "json"))) and len(found) == len(before) + 3 and found, 10, "three more rows")
    assert [row["New Leader"] for row in rows[-3:]] == [first.name, third.name, goal.name]
    assert [row["TL"] for row in rows[-3:]] == list(range(rows[-1]["TL"] - 2, rows[-1]["TL"] + 1))
    for row in rows[-3:]:
        assert row["Reason"] == "no recovery target specified"
        assert abs(datetime.fromisoformat(row["Timestamp"]) - datetime.now(UTC)) < timedelta(minutes=2)
    assert table(patronictl("history"))[0] == ["TL", "LSN", "Reason", "Timestamp", "New Leader"]


def test_pause_and_resume_by_patronictl(cluster, patronictl):
    leader = cluster.wait_healthy(30)
    assert patronictl("pause", "--wait").splitlines() == [
        "'pause' request sent, waiting until it is recognized by all nodes", "Success: cluster management is paused"]
    try:
        assert all(node.patroni().get("pause") for node in cluster.nodes)
        assert " Maintenance mode: on" in patronictl("list").splitlines()
        assert patronictl.ask("pause")[::2] == (1, "Error: Cluster is already paused\n")
        assert "Switchover failed, details: 400, Switchover is possible only to a specific candidate in a paused state\n" in patronictl("switchover", "--force")
        said = patronictl.ask("switchover", "--force", "--candidate", others(cluster, leader)[0].name, "--scheduled", FAR)
        assert said[::2] == (1, "Error: Can't schedule switchover in the paused state\n")
        assert cluster.leader() is leader
    finally:
        assert patronictl("resume", "--wait").splitlines() == [
            "'resume' request sent, waiting until it is recognized by all nodes", "Success: cluster management is resumed"]
    assert patronictl.ask("resume")[::2] == (1, "Error: Cluster is not paused\n")
    assert "Maintenance" not in patronictl("list")
    assert not any(node.patroni().get("pause") for node in cluster.nodes)
    assert patronictl("pause").splitlines() == ["Success: cluster management is paused"]
    assert patronictl("resume").splitlines() == ["Success: cluster management is resumed"]
    assert cluster.wait_healthy(30) is leader


def test_configuration_by_patronictl(cluster, patronictl):
    leader = cluster.wait_healthy(30)
    original = patronictl("show-config")
    assert f"ttl: {cluster.profile.ttl}\n" in original

    def setting(name, node=leader):
        return node.ask(f"SELECT current_setting('{name}')")

    out = patronictl("edit-config", "--force", "-s", "maximum_lag_on_failover=2097152", "-p", "work_mem=5MB")
    assert "-maximum_lag_on_failover: 1048576\n+maximum_lag_on_failover: 2097152\n" in out
    assert out.endswith("Configuration changed\n")
    cluster.wait(lambda: setting("work_mem") == "5MB", 20, "PostgreSQL has it")
    assert leader.get("/config").body["maximum_lag_on_failover"] == 2097152
    assert patronictl("edit-config", "--force", "-q", "-s", "maximum_lag_on_failover=null", "-s", "postgresql.parameters.work_mem=null") == "Configuration changed\n"
    assert patronictl("edit-config", "--force", "--apply", "-", answers="postgresql: {parameters: {work_mem: 6MB}}\n").endswith("Configuration changed\n")
    cluster.wait(lambda: setting("work_mem") == "6MB", 20, "PostgreSQL has it")
    assert patronictl("edit-config", "--force", "--apply", str(write_file(cluster, "patch.yml", "postgresql: {parameters: {work_mem: 6MB}}\n"))) == "Not changed\n"
    editor = write_file(cluster, "editor", "#!/bin/sh\nsed -i 's/work_mem: 6MB/work_mem: 7MB/' \"$1\"\n")
    editor.chmod(0o755)
    assert patronictl.ask("edit-config", "--force", environment={"EDITOR": str(editor), "TERM": "dumb"}).code == 0
    cluster.wait(lambda: setting("work_mem") == "7MB", 20, "PostgreSQL has it")
    assert patronictl("edit-config", "--force", "--replace", str(write_file(cluster, "config.yml", original))).endswith("Configuration changed\n")
    assert patronictl("show-config") == original
    cluster.wait(lambda: setting("work_mem") == "4MB", 20, "PostgreSQL has its default again")
    assert "ttl" in patronictl("edit-config", "-s", "ttl=7", answers="n\n")
    assert patronictl("show-config") == original
    assert cluster.leader() is leader


def started(cluster):
    return {node.name: node.patroni().get("postmaster_start_time") for node in cluster.nodes}


def restarted(cluster, before):
    after = started(cluster)
    return {name for name in after if after[name] != before[name]}


def test_restart_and_reload_by_patronictl(cluster, patronictl):
    leader = cluster.wait_healthy(30)
    scope = cluster.settings.scope
    first, second = others(cluster, leader)
    before = started(cluster)
    assert patronictl("restart", scope, first.name, "--force").splitlines()[-1] == f"Success: restart on member {first.name}"
    cluster.wait_healthy(30)
    assert restarted(cluster, before) == {first.name}
    before = started(cluster)
    assert f"Success: restart on member {second.name}" in patronictl("restart", scope, second.name, answers="now\ny\n\n")
    cluster.wait_healthy(30)
    assert restarted(cluster, before) == {second.name}
    assert patronictl.ask("restart", scope, leader.name, "-r", "replica", "--force")[::2] == (1, "Error: No 'replica' among provided members\n")

    before = started(cluster)
    assert patronictl("restart", scope, "--role", "replica", "--any", "--force").count("Success: restart on member") == 1
    cluster.wait_healthy(30)
    assert len(restarted(cluster, before) & {first.name, second.name}) == len(restarted(cluster, before)) == 1

    # only where it is needed, only on an older version
    before = started(cluster)
    patronictl("edit-config", "--force", "-q", "-p", "max_connections=110")
    try:
        cluster.wait(lambda: all(row.get("Pending restart") == "*" for row in patronictl.members().values()), 20, "all need a restart")
        assert {row["Pending restart reason"] for row in patronictl.rows()} == {"max_connections: 100->110"}
        out = patronictl("restart", scope, "--force", "--pg-version", "13.0")
        assert out.count("status code=503, (restart conditions are not satisfied)") == 3
        # The standbys first: behind a primary that allows more their replay stops, and they restart by themselves.
        out = patronictl("restart", scope, first.name, "--force", "--pending", "--timeout", "60")
        assert f"Success: restart on member {first.name}" in out
        assert cluster.wait_healthy(30) is leader
        out = patronictl("restart", scope, "--role", "replica", "--force", "--pending")
        assert {name for name in before if f"Success: restart on member {name}" in out} == {second.name}
        assert cluster.wait_healthy(30) is leader
        out = patronictl("restart", scope, "--force", "--pending")
        assert {name for name in before if f"Success: restart on member {name}" in out} == {leader.name}
        cluster.wait_healthy(30)
        assert restarted(cluster, before) == set(before)
        assert {node.ask("SHOW max_connections") for node in cluster.nodes} == {"110"}
    finally:
        patronictl("edit-config", "--force", "-q", "-p", "max_connections=100")
    patronictl("restart", scope, leader.name, "--force")
    cluster.wait_healthy(30)
    patronictl("restart", scope, "--force")
    assert cluster.wait_healthy(30) is leader

    out = patronictl("reload", scope, "--force")
    for node in cluster.nodes:
        assert f"Reload request received for member {node.name} and will be processed within {cluster.profile.loop_wait} seconds" in out
    assert cluster.wait_healthy(30) is leader


def shown_schedule(patronictl):
    return {name: row["Scheduled restart"] for name, row in patronictl.members().items() if "Scheduled restart" in row}


def soon():
    """A moment that a schedule may name, as patronictl's users write it, and as it is shown."""
    moment = datetime.now(UTC) + timedelta(seconds=4)
    return moment.isoformat(timespec="seconds")


def test_schedules_by_patronictl(cluster, patronictl):
    leader = cluster.wait_healthy(30)
    scope = cluster.settings.scope
    first, second = others(cluster, leader)
    before = started(cluster)

    # restarts: shown, taken back, done when due
    assert f"Success: restart scheduled on member {first.name}" in patronictl("restart", scope, first.name, "--force", "--scheduled", FAR)
    assert first.request("POST", "/restart", {"schedule": FAR}) == (409, "Another restart is already scheduled")    # --force takes the old one back
    assert cluster.wait(lambda: shown_schedule(patronictl), 20, "the schedule is shown") == {first.name: FAR}
    assert f"Success: flush scheduled restart for member {first.name}" in (out := patronictl("flush", scope, "restart", "--force"))
    assert {f"No scheduled restart for member {node.name}" for node in (leader, second)} <= set(out.splitlines())
    cluster.wait(lambda: not shown_schedule(patronictl), 20, "nothing is scheduled any more")
    assert "status code=422, (Cannot schedule restart in the past)" in patronictl("restart", scope, first.name, "--force", "--scheduled", "2000-01-01T00:00:00+00:00")
    assert started(cluster) == before
    assert "Success: restart scheduled" in patronictl("restart", scope, second.name, "--force", "--scheduled", soon())
    cluster.wait(lambda: restarted(cluster, before) == {second.name}, 20, f"{second.name} is restarted when it is due")
    assert cluster.wait_healthy(30) is leader

    # switchovers: shown, taken back, done when due
    assert "Switchover scheduled" in (out := patronictl("switchover", "--force", "--candidate", first.name, "--scheduled", FAR))
    footer = [line.strip() for line in out.splitlines()[-3:]]
    assert footer == [f"Switchover scheduled at: {FAR}", f"from: {leader.name}", f"to: {first.name}"]
    assert [line.strip() for line in patronictl("list").splitlines()[-3:]] == footer
    assert leader.get("/cluster").body["scheduled_switchover"] == {"at": FAR, "from": leader.name, "to": first.name}
    assert patronictl("flush", scope, "switchover") == "Success: scheduled switchover deleted\n"
    assert patronictl("flush", scope, "switchover") == "No pending scheduled switchover\n"
    assert "Switchover scheduled" in patronictl("switchover", "--force", "--candidate", first.name, "--scheduled", soon())
    cluster.wait(lambda: cluster.leader() is first, 30, f"{first.name} leads when it is due")
    assert cluster.wait_healthy(30) is first
    assert "scheduled_switchover" not in first.get("/cluster").body


def test_reinit_by_patronictl(cluster, patronictl):
    leader = cluster.wait_healthy(30)
    scope = cluster.settings.scope
    first, second = others(cluster, leader)
    assert patronictl.ask("reinit", scope, leader.name, "--force")[::2] == (1, "Error: No replica among provided members\n")
    assert patronictl.ask("reinit", scope, "nobody", "--force")[::2] == (1, "Error: No replica among provided members\n")
    for node, options in ((first, ("--wait",)), (second, ("--from-leader", "--wait"))):
        before = (node.data_dir / "global/pg_control").stat().st_ino
        (node.data_dir / "left-over").touch()
        lines = patronictl("reinit", scope, node.name, "--force", *options).splitlines()
        assert lines[-3:] == [f"Success: reinitialize for member {node.name}", f"Waiting for reinitialize to complete on: {node.name}",
                              f"Reinitialize is completed on: {node.name}"]
        assert cluster.wait_healthy(60) is leader
        assert not (node.data_dir / "left-over").exists()
        assert (node.data_dir / "global/pg_control").stat().st_ino != before


def test_patronictl_removes_a_cluster_for_the_right_answers_only(beds, cluster, patronictl):
    leader = cluster.wait_healthy(30)
    scope = cluster.settings.scope
    for answers, why in (("other\n", "Cluster names specified do not match"), (f"{scope}\nno\n", 'You did not exactly type "Yes I am aware"'),
                         (f"{scope}\nYes I am aware\nnobody\n", "You did not specify the current leader of the cluster")):
        said = patronictl.ask("remove", scope, answers=answers)
        assert said.code == 1
        assert why in said.err
    assert cluster.wait_healthy(30) is leader
    cluster.stop()
    # `leader` names who led last until somebody else does: it has no lease (safety model 2)
    patronictl("remove", scope, answers=f"{scope}\nYes I am aware\n{leader.name}\n")
    assert cluster.etcd.get(cluster.key("")) == []
    assert all((node.data_dir / "PG_VERSION").exists() for node in cluster.nodes), "no data was touched"
    beds.end()
