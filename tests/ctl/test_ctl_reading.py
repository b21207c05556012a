"""What the reading commands print, compared with recordings of the reference, and with keys that nobody can read."""

from __future__ import annotations

import argparse
import json
import os
import pty
import re
import resource
import signal
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ctl_world import World
from rest_world import app_for, published

from pgha.ctl import main, parser
from pgha.ctl.ends import UNREACHABLE, End
from pgha.ctl.output import to_toml
from pgha.ctl.watch import repeated
from pgha.model.decision import Reason

SITUATIONS = ["steady", "scheduled-switchover", "pending-restart", "paused", "synchronous", "quorum", "after-switchover"]


def comparable(text: str) -> str:
    """Positions and the time differ between the moments of the recording; their width does not."""
    return re.sub(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d$", "TIME", re.sub(r"0/[0-9A-F]{7}", "0/XXXXXXX", text), flags=re.MULTILINE).strip("\n")


def recorded(recording: Any, command: str) -> str:
    return comparable(next(x["stdout"] for x in recording["ctl"] if x["command"] == f"patronictl {command}"))


@pytest.mark.etcd
@pytest.mark.parametrize("when", SITUATIONS)
@pytest.mark.parametrize("command", ["list", "list -e -t", "list -f tsv", "topology", "history", "dsn", "dsn -r replica"])
def test_output_is_the_reference_s_to_the_letter(world: World, when: str, command: str) -> None:
    recording = world.load(when)
    code, out, err = world.ctl(*command.split())
    assert (code, err) == (0, "")
    assert comparable(out) == recorded(recording, command)


@pytest.mark.etcd
@pytest.mark.parametrize("when", SITUATIONS)
def test_json_is_the_reference_s(world: World, when: str) -> None:
    recording = world.load(when)
    for command in ("list -f json", "history -f json"):
        code, out, _ = world.ctl(*command.split())
        assert code == 0
        assert json.loads(comparable(out)) == json.loads(recorded(recording, command))


@pytest.mark.etcd
def test_toml_holds_what_json_does(world: World) -> None:
    world.load("paused")
    for command, name in (("list", "members"), ("history", "history")):
        as_toml = tomllib.loads(world.ctl(command, "-f", "toml")[1])
        assert as_toml[name] == json.loads(world.ctl(command, "-f", "json")[1])
    config = json.loads(world.get("config"))
    assert tomllib.loads(world.ctl("show-config")[1]) == config
    assert json.loads(world.ctl("show-config", "-f", "json")[1]) == config


@pytest.mark.etcd
@pytest.mark.parametrize(("identifier", "shown"), [(None, "uninitialized"), (b"", "initializing"), (b"7000000000000000001", "7000000000000000001")])
def test_the_title_says_whether_the_cluster_is_initialised(world: World, identifier: bytes | None, shown: str) -> None:
    world.load("steady")
    world.delete("initialize")
    if identifier is not None:
        world.put("initialize", identifier)
    for command in ("list", "topology"):
        assert world.ctl(command)[1].startswith(f"+ Cluster: bench ({shown}) ")


@pytest.fixture
def two(world: World, monkeypatch: pytest.MonkeyPatch) -> World:
    """A second cluster, beta, next to bench in its namespace; its one member carries a tag."""
    world.load("steady")
    raw = json.loads(world.get("members/n3"))
    with monkeypatch.context() as other:
        other.setattr(world, "root", f"/{world.namespace}/beta/")
        world.put("initialize", b"7000000000000000001")
        world.put("members/x1", {**raw, "tags": {"zone": "b"}}, leased=True)
    return world


@pytest.mark.etcd
def test_several_clusters_have_a_table_each_and_their_rows_together(two: World) -> None:
    single = two.ctl("list")[1]
    code, out, err = two.ctl("list", "bench", "beta", "-t")
    assert (code, err) == (0, "")
    assert re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\n", out)
    assert out[20:].startswith(single + "+ Cluster: beta (7000000000000000001) ")
    assert out.count("| x1 ") == out.count("Tags") == 1
    code, out, err = two.ctl("topology", "beta", "-k", "bench", "beta")
    assert (code, err) == (0, "")
    assert [line.split("(")[0].strip() for line in out.splitlines() if "Cluster:" in line] == ["+ Cluster: beta", "+ Cluster: bench"]
    rows = json.loads(two.ctl("list", "-f", "json", "bench", "beta")[1])
    assert [(row["Cluster"], row["Member"]) for row in rows] == [("bench", "n1"), ("bench", "n2"), ("bench", "n3"), ("beta", "x1")]
    assert rows[:3] == json.loads(two.ctl("list", "-f", "json")[1])
    assert rows[3:] == json.loads(two.ctl("list", "-f", "json", "beta")[1])
    assert tomllib.loads(two.ctl("list", "-f", "toml", "bench", "beta")[1])["members"] == rows
    tsv = two.ctl("list", "-f", "tsv", "bench", "beta")[1].splitlines()
    assert len(tsv) == 5
    assert len({line.count("\t") for line in tsv}) == 1


@pytest.mark.etcd
def test_a_cluster_that_is_not_there_costs_the_others_nothing(two: World) -> None:
    code, out, err = two.ctl("list", "gone", "beta", "-f", "json")
    assert (code, err) == (1, "pgha: there is no cluster 'gone' in the store\n")
    assert [row["Member"] for row in json.loads(out)] == ["x1"]
    code, out, err = two.ctl("topology", "gone", "lost")
    assert (code, out, err) == (1, "", "pgha: there is no cluster 'gone' in the store\npgha: there is no cluster 'lost' in the store\n")


@pytest.mark.etcd
def test_history_has_a_row_for_each_timeline_that_ended(world: World) -> None:
    world.load("steady")
    world.put("history", [[1, 67108864, "no recovery target specified", "2026-01-01T10:00:00+00:00", "n2"], [2, 67109000, "x\ty"], [3, 7]])
    rows = [{"TL": 1, "LSN": 67108864, "Reason": "no recovery target specified", "Timestamp": "2026-01-01T10:00:00+00:00", "New Leader": "n2"},
            {"TL": 2, "LSN": 67109000, "Reason": "x\ty"}, {"TL": 3, "LSN": 7}]
    assert json.loads(world.ctl("history", "-f", "json")[1]) == rows
    assert tomllib.loads(world.ctl("history", "-f", "toml")[1]) == {"history": rows}
    assert world.ctl("history", "-f", "tsv")[1].splitlines()[2:] == ["2\t67109000\tx\\ty\t\t", "3\t7\t\t\t"]
    assert world.ctl("history", "-f", "pretty") == world.ctl("history")
    world.put("history", [])
    assert world.ctl("history", "-f", "json") == (0, "[]\n", "")


@pytest.mark.parametrize("value", [
    {}, {"a": 1, "b": {"c": {"d": [1, "x", True, 1.5]}}, "e": [{"f": 1, "g": {"h": "i"}}, {"f": 2}]}, {"quoted key.x": {'ü "y"': "line\nbreak\t\\ \x7f \u2028"}},
    {"list": [], "mixed": [{"a": 1}, 2], "nested": [[1], [2, 3]]},
])
def test_toml_is_read_back_as_it_was(value: dict[str, Any]) -> None:
    assert tomllib.loads(to_toml(value)) == value


def test_null_is_a_comment_in_toml() -> None:
    assert to_toml({"slots": {"a": None}}) == "[slots]\n# a is null"


@pytest.mark.etcd
def test_broken_keys_are_named_and_the_rest_is_shown(world: World) -> None:
    world.load("steady")
    world.put("members/n3", b"{broken")
    world.put("members/n4", b"[1, 2]", leased=True)
    world.put("members/old", b"postgres://10.0.0.9:5433/postgres?application_name=http://10.0.0.9:8008/patroni")
    world.put("status", b"\xff\xfe")
    world.put("history", {"not": "rows"})
    world.put("sync", b"nonsense")
    world.put("failover", b"n1:n2")
    code, out, err = world.ctl("list")
    assert code == 0
    assert [line.split(":")[1].strip() for line in err.splitlines()] == ["members/n3", "members/n4", "status", "history", "sync"]
    rows = {line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]] for line in out.splitlines() if line.startswith("| ")}
    assert rows["n3"][:3] == ["", "Replica", "unknown"]
    assert rows["old"][0] == "10.0.0.9:5433"
    assert rows["n1"][0] == "127.0.66.11:5432"
    assert world.ctl("history")[:2][0] == 0
    world.put("config", b"{")
    code, out, err = world.ctl("show-config")
    assert (code, out) == (1, "")
    assert "config: is not JSON" in err


@pytest.mark.etcd
def test_an_older_integer_status_and_wrong_types_are_survived(world: World) -> None:
    world.load("steady")
    world.put("status", b"67785300")
    world.put("members/n2", {"conn_url": 5, "api_url": [], "state": None, "tags": "x", "timeline": "y", "receive_lsn": "z", "replay_lsn": True,
                             "pending_restart_reason": 4, "scheduled_restart": [], "role": {}})
    code, out, err = world.ctl("list", "-e")
    assert (code, err) == (0, "")
    assert "| n2 " in out


@pytest.mark.etcd
@pytest.mark.parametrize(("lock", "leased", "leader", "note"), [
    ({"holder": "n2", "mode": "held"}, False, "n2", ""),
    ({"holder": "n1", "mode": "released"}, False, None, "nobody holds the lock; n1 has released it"),
    ({"holder": "gone", "mode": "held"}, False, None, "the lock was last held by gone, which has no member key any more"),
    (None, False, None, "nobody holds the lock; it was last held by n1"),
    (None, True, "n1", ""),
    (b"{broken", False, "n1", "pgha/lock: is not JSON"),
])
def test_the_lock_record_decides_who_is_shown_as_leader(world: World, lock: Any, leased: bool, leader: str | None, note: str) -> None:
    world.load("steady")
    world.put("leader", b"n1", leased=leased)
    if lock is not None:
        world.put("pgha/lock", lock)
    code, out, err = world.ctl("list", "-f", "json")
    assert code == 0
    assert [m["Member"] for m in json.loads(out) if m["Role"] == "Leader"] == ([leader] if leader else [])
    assert note in err


@pytest.mark.etcd
def test_the_cluster_may_be_named_after_the_command_too(world: World) -> None:
    recording = world.load("steady")
    assert comparable(world.ctl("list", "bench")[1]) == recorded(recording, "list")
    assert world.ctl("history", "bench", "-f", "json")[0] == 0
    assert world.ctl("list", "other")[::2] == (1, "pgha: there is no cluster 'other' in the store\n")
    assert world.ctl("--scope", "bench", "list", "other")[::2] == (2, "pgha: which cluster: other or --scope bench?\n")


def test_watching_goes_on_when_nothing_can_be_seen_for_a_while(capsys: pytest.CaptureFixture[str]) -> None:
    looks: list[str | BaseException] = ["first", End(UNREACHABLE, "no etcd endpoint answers"), "third", KeyboardInterrupt()]

    def look() -> str:
        outcome = looks.pop(0)
        if isinstance(outcome, BaseException):
            raise outcome
        print("a note", file=sys.stderr)
        return outcome

    assert repeated(0.001, look) == 0
    out, err = capsys.readouterr()
    assert out == "first\nthird\n"
    assert re.sub(r"\d", "0", err) == "a note\npgha: 0000-00-00 00:00:00 no etcd endpoint answers\na note\n"


def test_watching_what_was_never_seen_ends(capsys: pytest.CaptureFixture[str]) -> None:
    def look() -> str:
        raise End(UNREACHABLE, "nothing")

    with pytest.raises(End):
        repeated(0.001, look)
    assert capsys.readouterr() == ("", "")


@pytest.mark.etcd
def test_on_a_terminal_the_screen_is_cleared_each_time_and_ctrl_c_is_no_failure(world: World) -> None:
    world.load("steady")
    world.put("history", b"{")
    world.write_config()
    program = f"import sys; sys.path.insert(0, {str(Path(__file__).parents[2])!r}); from pgha.ctl import main; sys.exit(main(sys.argv[1:]))"
    ours, theirs = pty.openpty()
    try:
        with subprocess.Popen([sys.executable, "-c", program, "-c", str(world.config), "list", "-w", "0.01"], stdin=theirs, stdout=theirs, stderr=theirs,
                              preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)) as process:     # a shell's background job ignores it
            shown = b""
            while shown.count(b"\033[H\033[2J") < 3:
                shown += os.read(ours, 65536)
            process.send_signal(signal.SIGINT)
            assert process.wait(20) == 0
    finally:
        os.close(ours)
        os.close(theirs)
    screen = shown.split(b"\033[H\033[2J")[1]
    assert screen.startswith(b"+ Cluster: bench ")
    assert b"pgha: history: is not JSON" in screen      # below the table, where the next screen does not hide it at once


@pytest.mark.etcd
@pytest.mark.parametrize(("leader", "tags", "tree"), [
    ("n1", {}, ["n1", "+ n2", "+ n3", "+ n4"]),
    ("n1", {"n2": "n3", "n4": "n2"}, ["n1", "+ n3", "  + n2", "    + n4"]),
    ("n1", {"n2": "gone", "n3": "n1", "n4": 5}, ["n1", "+ n2", "+ n3", "+ n4"]),
    ("n1", {"n1": "n2"}, ["n1", "+ n2", "+ n3", "+ n4"]),                   # a leader streams from nobody
    ("n1", {"n2": "n2", "n3": "n2"}, ["n1", "+ n2", "  + n3", "+ n4"]),
    ("n1", {"n2": "n3", "n3": "n2", "n4": "n3"}, ["n1", "+ n2", "+ n3", "  + n4"]),
    ("n3", {"n2": "n1"}, ["n3", "+ n1", "  + n2", "+ n4"]),
    ("", {"n2": "n1"}, ["n1", "+ n2", "n3", "n4"]),
    ("gone", {"n2": "n1"}, ["n1", "+ n2", "n3", "n4"]),
])
def test_the_tree_follows_the_tags(world: World, leader: str, tags: dict[str, Any], tree: list[str]) -> None:
    world.load("steady")
    raw = json.loads(world.get("members/n3"))
    for name in ("n1", "n2", "n3", "n4"):
        world.put(f"members/{name}", {**raw, "tags": {"replicatefrom": tags[name]}} if name in tags else raw, leased=True)
    world.delete("leader")
    if leader:
        world.put("leader", leader.encode(), leased=True)
    code, out, _ = world.ctl("topology")
    assert code == 0
    assert [line.split("|")[1].rstrip()[1:] for line in out.splitlines()[3:7]] == tree


@pytest.mark.etcd
@pytest.mark.parametrize(("change", "arguments", "code", "out", "err"), [
    ({}, ["-r", "leader"], 0, "host=127.0.66.11 port=5432", ""),
    ({}, ["-r", "primary"], 0, "host=127.0.66.11 port=5432", ""),
    ({}, ["-m", "n3"], 0, "host=127.0.66.13 port=5432", ""),
    ({}, ["--any"], 0, "host=127.0.66.11 port=5432", ""),
    ({}, ["-r", "any", "--any"], 0, "host=127.0.66.11 port=5432", ""),
    ({"n1": {"state": "stopped"}}, ["--any"], 0, "host=127.0.66.12 port=5432", ""),             # who runs comes first
    ({"n2": {"state": "starting", "replication_state": None}}, ["-r", "replica"], 0, "host=127.0.66.13 port=5432", ""),
    ({"n2": {"conn_url": "postgres://[fd00::2]:5433/postgres"}}, ["-m", "n2"], 0, "host=fd00::2 port=5433", ""),
    ({"n2": {"conn_url": 5}}, ["-m", "n2"], 1, "", "Can not find a suitable member: n2 publishes no address"),
    ({"n2": {"conn_url": "postgres://10.0.0.1 user=x:5432/postgres"}}, ["-m", "n2"], 1, "", "Can not find a suitable member: n2 publishes no address"),
    ({"n1": {"conn_url": None}}, [], 1, "", "Can not find a suitable member: nobody with an address is leader"),
    ({}, ["-r", "standby-leader"], 1, "", "Can not find a suitable member: nobody with an address is standby-leader"),
    ({}, ["-m", "n9"], 1, "", "Can not find a suitable member: no such member: n9; there are n1, n2, n3"),
    ({}, ["-m", "n1", "-r", "any"], 2, "", "--role and --member are mutually exclusive options"),
    ({}, ["-m", "n1", "--any"], 2, "", "--any and --member are mutually exclusive options"),
    ({}, ["-r", "replica", "--any"], 2, "", "--any and --role are mutually exclusive options"),
])
def test_dsn_of_a_role_or_a_name(world: World, change: dict[str, Any], arguments: list[str], code: int, out: str, err: str) -> None:  # noqa: PLR0917  (the columns of the table)
    world.load("steady")
    for name, changed in change.items():
        world.put(f"members/{name}", {**json.loads(world.get(f"members/{name}")), **changed}, leased=True)
    got = world.ctl("dsn", *arguments)
    assert got == (code, out and out + "\n", err and f"pgha: {err}\n")


@pytest.mark.etcd
def test_tags_and_lags_are_shown(world: World) -> None:
    world.load("steady")
    raw = json.loads(world.get("members/n3"))
    world.put("members/n3", {**raw, "tags": {"clonefrom": True, "zone": "a"}, "replay_lsn": 67785200 - (5 << 20)}, leased=True)
    _, out, _ = world.ctl("list")
    assert re.search(r"\| n3 .*\|   0 \|  0/3BA51F0 \|   5 \| clonefrom: true \|\n\| +\|.*\| zone: a         \|", out)
    assert json.loads(world.ctl("list", "-f", "json")[1])[2]["Tags"] == {"clonefrom": True, "zone": "a"}


@pytest.mark.etcd
def test_options_may_stand_on_both_sides_and_the_environment_fills_in(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.load("steady")
    world.write_config()
    url = "etcd3://" + world.etcd.urls[0].removeprefix("http://")
    assert main(["list", "-c", str(world.config)]) == 0
    assert main(["list", "-c", str(world.config), "--scope", "other"]) == 1
    assert "there is no cluster 'other'" in world.capsys.readouterr().err
    monkeypatch.setenv("PGHA_NAMESPACE", world.namespace)
    assert main(["-d", url, "list", "--scope", "bench"]) == 0
    monkeypatch.setenv("PGHA_SCOPE", "bench")
    monkeypatch.setenv("PGHA_ETCD3_HOSTS", f'["127.0.0.1:1", "{world.etcd.urls[0].removeprefix("http://")}"]')
    assert main(["list"]) == 0
    monkeypatch.setenv("PGHACTL_CONFIG_FILE", str(world.config))
    monkeypatch.setenv("PGHA_ETCD3_HOSTS", "127.0.0.1:1")
    assert main(["list"]) == 5


@pytest.mark.parametrize(("config", "arguments", "wanted"), [
    ("", ["list"], "no store is configured"),
    ("scope = 1.5\n[etcd3]\nhost='x'", ["list"], "scope: is not text"),
    ("[etcd3]\nhost='x'", ["list"], "scope is not set"),
    ("scope = 'a'\n[consul]\nhost='x'", ["list"], "the store [consul] is not supported by this version"),
    ("scope = 'a'\netcd3 = 5", ["list"], "etcd3: is not a table"),
    ("scope = 'a'\n[etcd3]\nhosts = [1]", ["list"], "etcd3.hosts: is not a list of HOST:PORT"),
    ("scope = 'a'\n[etcd3]\nhost = 'x'\npassword_file = '/nonexistent'", ["list"], "etcd3.password_file: /nonexistent cannot be read"),
    ("scope = 'a'\n[etcd3]\nhost = 'x'\n[ctl]\ninsecure = 'perhaps'", ["list"], "ctl.insecure: is not true or false"),
    ("scope = 'a'\n[etcd3]\nurl = 'https://x:1'\ncacert = '/nonexistent'", ["list"], "TLS: cannot use /nonexistent"),
    ("scope =", ["list"], "is not TOML"),
    ("scope = 'a'", ["-d", "zk://x:1", "list"], "the store 'zk' is not supported by this version"),
    ("scope = 'a'", ["nonsense"], "invalid choice"),
    ("scope = 'a'", [], "required"),
    ("scope = 'a'", ["list", "-f", "yaml"], "invalid choice"),
    ("scope = 'a'", ["history", "-f", "yaml"], "invalid choice"),
    ("scope = 'a'", ["show-config", "-f", "table"], "invalid choice: 'table' (choose from 'toml', 'json')"),
    ("scope = 'a'", ["list", "-w", "soon"], "argument -w/--watch: 'soon' is no such number of seconds; allowed: more than 0, up to 86400, as 2 or 0.5"),
    ("scope = 'a'", ["list", "-w", "0"], "argument -w/--watch: '0' is no such number of seconds; allowed: more than 0"),
    ("scope = 'a'", ["topology", "-w", "nan"], "argument -w/--watch: 'nan' is no such number of seconds"),
    ("scope = 'a'", ["list", "a", "b", "--scope", "a"], "which cluster: a b or --scope a?"),
    ("scope = 'a'", ["list", "-W", "-w", "5"], "not allowed with argument"),
    ("scope = 'a'", ["lis"], "invalid choice"),
])
def test_mistakes_in_configuration_and_usage_exit_with_2(tmp_path: Path, capsys: pytest.CaptureFixture[str], config: str, arguments: list[str], wanted: str) -> None:
    file = tmp_path / "pgha.toml"
    file.write_text(config)
    assert main(["-c", str(file), *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert wanted in err
    assert "Traceback" not in err


def test_every_option_is_explained_in_help() -> None:
    def actions(parser: argparse.ArgumentParser) -> Iterator[tuple[str, argparse.Action]]:
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                for inner in action.choices.values():
                    yield from actions(inner)
            else:
                yield parser.prog, action

    found = list(actions(parser()))
    assert len(found) > 100
    assert [(where, action.dest) for where, action in found if not action.help] == []


def test_a_configuration_that_cannot_be_read_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["-c", str(tmp_path / "nothing.toml"), "list"]) == 2
    assert "nothing.toml: cannot be read: No such file or directory" in capsys.readouterr().err


@pytest.mark.etcd
def test_a_directory_of_files_is_laid_together(world: World, tmp_path: Path) -> None:
    world.load("steady")
    world.write_config()
    directory = tmp_path / "conf.d"
    directory.mkdir()
    (directory / "10.toml").write_text('scope = "wrong"\n[etcd3]\nusername = ""\n')
    (directory / "20.toml").write_text(world.config.read_text())
    assert main(["-c", str(directory), "list"]) == 0


@pytest.mark.etcd
def test_when_the_store_is_down_the_agent_s_view_is_shown_and_said_so(world: World, start_agent: Any) -> None:
    recording = world.load("scheduled-switchover")
    app, *_ = app_for(published(etcd=recording["etcd"]))
    host, port = start_agent(app)
    down = '[etcd3]\nhosts = ["127.0.0.1:1"]\n'
    world.write_config()
    world.config.write_text(f'scope = "bench"\nname = "n1"\n{down}[restapi]\nconnect_address = "{host}:{port}"\n')
    world.capsys.readouterr()
    assert main(["-c", str(world.config), "list"]) == 0
    out, err = world.capsys.readouterr()
    assert comparable(out) == recorded(recording, "list")
    assert "no etcd endpoint answers" in err
    assert f"showing what the agent at http://{host}:{port} last saw" in err
    # Never as if it were another cluster, or of another store.
    for arguments, environ in ((("--scope", "other"), {}), (("-d", "etcd3://127.0.0.1:1"), {}), ((), {"DCS_URL": "etcd3://127.0.0.1:1"}), ((), {"PGHA_SCOPE": "other"})):
        with pytest.MonkeyPatch.context() as patch:
            for name, value in environ.items():
                patch.setenv(name, value)
            for command in ("list", "topology", "dsn", "history", "show-config", "explain"):
                code = main(["-c", str(world.config), *arguments, command])
                out, err = world.capsys.readouterr()
                if command == "explain" and "PGHA_SCOPE" in environ:
                    continue       # the configured node, whatever its agent calls its cluster: no name of one is shown
                assert (code, out) == (5, ""), (arguments, environ, command, out)
                assert "no etcd endpoint answers" in err
                assert "last saw" not in err
    assert main(["-c", str(world.config), "show-config", "-f", "json"]) == 0
    assert json.loads(world.capsys.readouterr().out) == json.loads(recording["etcd"]["/service/bench/config"]["value"])
    assert main(["-c", str(world.config), "history", "-f", "json"]) == 0
    assert [row["TL"] for row in json.loads(world.capsys.readouterr().out)] == [row[0] for row in json.loads(recording["etcd"]["/service/bench/history"]["value"])]
    world.config.write_text(f'scope = "bench"\n{down}[restapi]\nconnect_address = "127.0.0.1:1"\n')
    assert main(["-c", str(world.config), "list"]) == 5
    assert "and no agent either" in world.capsys.readouterr().err
    world.config.write_text(f'scope = "bench"\n{down}')
    assert main(["-c", str(world.config), "list"]) == 5


@pytest.mark.etcd
def test_explain_names_each_condition_with_its_numbers(world: World, start_agent: Any) -> None:
    world.load("steady")
    reasons = (Reason(rule="promotion.caught_up", holds=False, because="lag 46.7 MiB, limit 1.0 MiB"),
               Reason(rule="promotion.allowed", holds=True, because="no tag forbids it"))
    app, *_ = app_for(published(primary=False, reasons=reasons))
    world.agent_at("n2", start_agent(app))
    code, out, _ = world.ctl("explain", "n2")
    assert code == 0
    assert "n2: following (role replica, PostgreSQL running), decided 0.0 s ago in pass 1" in out
    assert "  FAILS  promotion.caught_up  lag 46.7 MiB, limit 1.0 MiB\n  holds  promotion.allowed    no tag forbids it\n" in out
    assert "store heard 0.0 s" in out
    assert json.loads(world.ctl("explain", "n2", "--json")[1])["reasons"][0]["rule"] == "promotion.caught_up"
    assert world.ctl("explain", "nobody")[0] == 2
    assert world.ctl("explain", "n3")[0] == 5
    assert world.ctl("explain")[0] == 5          # n1, the configured one, whose agent is not there


@pytest.mark.etcd
def test_version_of_members(world: World, start_agent: Any) -> None:
    world.load("steady")
    app, *_ = app_for(published(primary=False))
    world.agent_at("n2", start_agent(app))
    assert world.ctl("version") == (0, "pgha ctl version 0.1.0\n", "")
    assert world.ctl("version", "n2")[1] == "pgha ctl version 0.1.0\nn2: pgha 0.1.0 PostgreSQL 15.20\n"
    assert world.ctl("version", "n3")[0] == 5


@pytest.mark.etcd
def test_ctl_loads_nothing_but_the_standard_library_and_starts_at_once(world: World) -> None:
    world.load("steady")
    world.write_config()
    root = str(Path(__file__).parents[2])
    program = (f"import sys; sys.path.insert(0, {root!r}); from pgha.ctl import main; code = main(sys.argv[1:]); "
               "heavy = {'trio', 'httpx', 'msgspec', 'h11', 'psycopg', 'asyncio'} & set(sys.modules); assert not heavy, heavy; sys.exit(code)")
    cpu_s = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run([sys.executable, "-I", "-c", program, "-c", str(world.config), "list"], capture_output=True, text=True, timeout=30, check=False)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu_s.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        assert done.returncode == 0, done.stderr
    # The target is 0.10 s on a quiet machine, which the benchmark watches; here the work counts, not the wait for a CPU.
    assert min(cpu_s) < 0.5, cpu_s


@pytest.mark.etcd
def test_a_login_is_used_and_a_wrong_password_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from etcd_server import EtcdCluster

    with EtcdCluster() as cluster:
        member = cluster.members[0]
        for path, body in (("/v3/auth/user/add", {"name": "root", "password": "geheim"}), ("/v3/auth/user/grant", {"user": "root", "role": "root"}),
                           ("/v3/auth/role/add", {"name": "root"}), ("/v3/auth/user/grant", {"user": "root", "role": "root"}), ("/v3/auth/enable", {})):
            try:
                cluster.post(member, path, body)
            except OSError:
                assert path == "/v3/auth/user/grant"      # before the role is there
        file = tmp_path / "pgha.toml"
        secret = tmp_path / "password"
        secret.write_text("geheim\n")
        head = f'scope = "bench"\n[etcd3]\nhosts = "{member.url.removeprefix("http://")}"\nusername = "root"\n'
        file.write_text(f'{head}password_file = "{secret}"\n')
        secret.chmod(0o644)
        assert main(["-c", str(file), "list"]) == 1
        err = capsys.readouterr().err
        assert "there is no cluster 'bench'" in err
        assert err.startswith(f"pgha: warning: {file}: etcd3.password_file: {secret} is readable by everybody")
        file.write_text(f'{head}password = "wrong-secret"\n')
        assert main(["-c", str(file), "list"]) == 2
        err = capsys.readouterr().err
        assert "does not accept the user 'root'" in err
        assert "wrong-secret" not in err
        file.write_text(head.replace('username = "root"\n', ""))
        assert main(["-c", str(file), "list"]) == 1
        assert "refuses" in capsys.readouterr().err
