"""`ctl edit-config` from a file and in an editor: validated, shown in colours only on a terminal, never half done."""

from __future__ import annotations

import base64
import json
import os
import pty
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ctl_world import World
from rest_world import app_for, published

from pgha.ctl.edit_config import coloured
from pgha.rest.routes import App
from pgha.rest.wire import Request, Response, json_response

pytestmark = pytest.mark.etcd

ROOT = Path(__file__).parents[2]


def config(world: World) -> Any:
    return json.loads(world.get("config"))


def test_a_file_is_laid_over_the_configuration(world: World, tmp_path: Path) -> None:
    world.load("steady")
    before = config(world)
    file = tmp_path / "change.toml"
    file.write_text('ttl = 21\n[postgresql.parameters]\nwork_mem = "8MB"\n')
    code, out, err = world.ctl("edit-config", "--force", "--apply", str(file))
    assert code == 0
    assert err.startswith("pgha: no agent answers, so that PostgreSQL has not checked its parameters; what it does not take, each member will leave out and log\n")
    assert err.count("\npgha: not asked: n") == 3
    assert "-ttl = 20\n+ttl = 21\n" in out
    assert "\033[" not in out
    parameters = {**before["postgresql"]["parameters"], "work_mem": "8MB"}
    assert config(world) == {**before, "ttl": 21, "postgresql": {**before["postgresql"], "parameters": parameters}}
    file.write_text('{"postgresql": {"parameters": {"work_mem": null}}, "ttl": 20}')
    assert world.ctl("edit-config", "-q", "--force", "--apply", str(file))[:2] == (0, "Configuration changed\n")
    assert config(world) == before
    assert world.ctl("edit-config", "bench", "--force", "--apply", str(file)) == (0, "Not changed\n", "")


def test_a_file_replaces_the_configuration_and_options_come_last(world: World, tmp_path: Path) -> None:
    world.load("steady")
    whole, over = tmp_path / "whole.json", tmp_path / "over.toml"
    whole.write_text('{"ttl": 30, "loop_wait": 10, "retry_timeout": 10, "pause": null}')
    over.write_text("loop_wait = 9\nretry_timeout = 9\n")
    assert world.ctl("edit-config", "--force", "--replace", str(whole), "--apply", str(over), "-s", "retry_timeout=8")[0] == 0
    assert config(world) == {"ttl": 30, "loop_wait": 9, "retry_timeout": 8}
    world.put("config", b"{broken")
    assert world.ctl("edit-config", "--force", "--apply", str(over))[0] == 1
    assert world.ctl("edit-config", "--force", "--replace", str(whole))[0] == 0
    assert config(world) == {"ttl": 30, "loop_wait": 10, "retry_timeout": 10}


@pytest.mark.parametrize(("content", "err"), [
    ("ttl: 20", "is neither TOML nor a JSON object that can be stored"),
    ("{", "is neither TOML nor a JSON object that can be stored"),
    ("[1", "is neither TOML nor a JSON object that can be stored"),
    ("slots = { a = 2026-01-01 }", "is neither TOML nor a JSON object that can be stored"),
    ("ttl = inf", "is neither TOML nor a JSON object that can be stored"),
    ("\udcff", "is not UTF-8"),
    ("", "holds nothing"),
    ("{}", "holds nothing"),
    ("tttl = 20", "tttl"),
    ("ttl = 0", "ttl"),
])
def test_a_file_that_is_wrong_changes_nothing(world: World, tmp_path: Path, content: str, err: str) -> None:
    world.load("steady")
    before = config(world)
    file = tmp_path / "change"
    file.write_text(content, errors="surrogateescape")
    for option in ("--apply", "--replace"):
        code, out, errors = world.ctl("edit-config", "--force", option, str(file))
        assert (code, out) == (2, "")
        assert err in errors
    assert config(world) == before
    assert world.ctl("edit-config", "--force", "--apply", str(tmp_path / "nothing"))[0] == 2


class Agent(App):
    """An agent that judges every configuration in the same way."""

    def __init__(self, **judgement: Any) -> None:
        _, board, inbox, clock = app_for(published())
        super().__init__(board, inbox, clock=clock)
        self.judgement = {"problems": [], "warnings": [], "restart": {}, **judgement}
        self.asked: list[Any] = []

    async def handle(self, request: Request) -> Response:
        assert (request.method, request.path) == ("POST", "/pgha/config/check"), request
        self.asked.append(json.loads(request.body))
        return json_response(self.judgement)


def change_of(parameter: str, old: int, new: int) -> dict[str, Any]:
    return {parameter: {"old_value": str(old), "new_value": str(new)}}


def test_the_agents_are_asked_and_what_one_refuses_is_not_written(world: World, start_agent: Any) -> None:
    world.load("steady")
    before = config(world)
    everybody = "/config: postgresql.parameters.work_mem: is no parameter"
    of = {"n1": Agent(problems=[everybody], warnings=["the same"]), "n2": Agent(problems=[everybody, "/config: only here"], warnings=["the same", "my own"])}
    for name, agent in of.items():
        world.agent_at(name, start_agent(agent))
    code, out, err = world.ctl("edit-config", "--force", "-p", "work_mem=8MB", "-s", "ttl=21")
    assert (code, out) == (2, "")
    assert err == f"pgha: {everybody}\npgha: n2: /config: only here\n"
    assert config(world) == before
    (asked,) = of["n2"].asked
    assert asked["old"] == before
    assert asked["config"]["postgresql"]["parameters"]["work_mem"] == "8MB"
    # what has nothing to do with PostgreSQL is not asked for
    assert world.ctl("edit-config", "-q", "--force", "-s", "ttl=21") == (0, "Configuration changed\n", "")
    assert len(of["n2"].asked) == 1


@pytest.mark.parametrize(("old", "new", "order"), [
    (100, 200, "n2, n3, n1 (primary) (max_connections is raised: standbys before the primary)"),
    (100, 50, "n1 (primary), n2, n3 (max_connections is lowered: the primary before the standbys)"),
])
def test_what_will_need_a_restart_is_said_with_the_order(world: World, start_agent: Any, old: int, new: int, order: str) -> None:
    world.load("steady")
    for name in ("n1", "n2", "n3"):
        world.agent_at(name, start_agent(Agent(restart=change_of("max_connections", old, new), warnings=["doubtful"] if name == "n3" else [])))
    code, out, err = world.ctl("edit-config", "--force", "-p", f"max_connections={new}")
    assert (code, err) == (0, "pgha: warning: n3: doubtful\n")
    assert out.endswith(f"Configuration changed\nWaiting for a restart:\n  n1: max_connections {old} → {new}\n  n2: max_connections {old} → {new}\n"
                        f"  n3: max_connections {old} → {new}\n`pgha ctl restart --pending` does that, in this order: {order}\n")


def on_a_terminal(world: World, editor: Path, typed: bytes, *arguments: str) -> tuple[int, str]:
    world.write_config()
    program = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from pgha.ctl import main; sys.exit(main(sys.argv[1:]))"
    ours, theirs = pty.openpty()
    shown = b""
    with subprocess.Popen([sys.executable, "-c", program, "-c", str(world.config), "edit-config", *arguments], stdin=theirs, stdout=theirs, stderr=theirs,
                          env={**os.environ, "EDITOR": str(editor), "VISUAL": "", "NO_COLOR": "", "TMPDIR": str(editor.parent)}) as process:
        os.close(theirs)
        os.write(ours, typed)
        try:
            while block := os.read(ours, 65536):
                shown += block
        except OSError:
            pass      # the other side has ended
        os.close(ours)
        code = process.wait(30)
    return code, shown.decode().replace("\r\n", "\n")


def editor(directory: Path, *scripts: str) -> Path:
    """A program that does the first of these to the file, then the second, and so on."""
    path = directory / "editor"
    path.write_text(f"#!/bin/sh\nn=$(cat {directory}/n 2>/dev/null || echo 1); echo $((n + 1)) > {directory}/n\ncase $n in\n"
                    + "".join(f"{number}) {script};;\n" for number, script in enumerate(scripts, start=1)) + "esac\n")
    path.chmod(0o755)
    return path


CHANGE, SPOIL, BREAK = "sed -i 's/^ttl = .*/ttl = 21/' \"$1\"", "sed -i 's/^ttl = .*/tttl = 21/' \"$1\"", "echo '[' >> \"$1\""


def test_an_editor_changes_it_and_the_difference_is_coloured(world: World, tmp_path: Path) -> None:
    world.load("steady")
    code, shown = on_a_terminal(world, editor(tmp_path, CHANGE), b"y\n")
    assert code == 0, shown
    assert "\033[31m-ttl = 20\033[0m\n\033[32m+ttl = 21\033[0m\n" in shown
    assert config(world)["ttl"] == 21
    assert not list(tmp_path.glob("pgha-config-*")), "the text is gone"


def test_what_is_wrong_can_be_edited_again(world: World, tmp_path: Path) -> None:
    world.load("steady")
    code, shown = on_a_terminal(world, editor(tmp_path, SPOIL, "sed -i 's/^tttl = .*/ttl = 22/' \"$1\""), b"y\ny\n")
    assert code == 0, shown
    assert "tttl" in shown
    assert config(world)["ttl"] == 22


@pytest.mark.parametrize(("script", "typed", "code"), [(SPOIL, b"n\n", 2), (BREAK, b"n\n", 2), ("exit 3", b"", 1)])
def test_what_is_given_up_is_kept_as_a_file_and_not_stored(world: World, tmp_path: Path, script: str, typed: bytes, code: int) -> None:
    world.load("steady")
    before = config(world)
    got, shown = on_a_terminal(world, editor(tmp_path, script), typed)
    assert got == code, shown
    kept = list(tmp_path.glob("pgha-config-*"))
    assert len(kept) == 1
    assert f"nothing was changed; the text is in {kept[0]}" in shown
    assert kept[0].stat().st_mode & 0o777 == 0o600
    assert config(world) == before


@pytest.mark.parametrize("row", [
    (b"n\n", (), 3, "aborted: nothing was changed"),
    (b"\x04", (), 2, "aborted: nothing was changed"),
    (b"", ("--dry-run",), 0, "nothing is changed"),
])
def test_an_edit_that_is_not_stored_is_kept_as_a_file(world: World, tmp_path: Path, row: tuple[bytes, tuple[str, ...], int, str]) -> None:
    typed, arguments, code, says = row
    world.load("steady")
    got, shown = on_a_terminal(world, editor(tmp_path, CHANGE), typed, *arguments)
    assert got == code, shown
    assert says in shown
    assert config(world)["ttl"] == 20
    (kept,) = tmp_path.glob("pgha-config-*")
    assert f"pgha: the text is in {kept}\n" in shown
    assert "ttl = 21" in kept.read_text()
    assert kept.stat().st_mode & 0o777 == 0o600


def test_an_edit_that_somebody_else_overtook_is_kept_as_a_file(world: World, tmp_path: Path) -> None:
    """The editor is the somebody else."""
    world.load("steady")
    body = json.dumps({name: base64.b64encode(text.encode()).decode() for name, text in (("key", world.root + "config"), ("value", '{"ttl":40}'))})
    (tmp_path / "overtake.py").write_text(f"import urllib.request; urllib.request.urlopen({world.etcd.urls[0] + '/v3/kv/put'!r}, {body.encode()!r})")
    overtake = f"{sys.executable} {tmp_path}/overtake.py"
    code, shown = on_a_terminal(world, editor(tmp_path, f"{CHANGE} && {overtake}"), b"", "--force")
    assert code == 1, shown
    assert "Config modification aborted due to concurrent changes" in shown
    assert config(world) == {"ttl": 40}
    (kept,) = tmp_path.glob("pgha-config-*")
    assert f"the text is in {kept}\n" in shown


def test_at_the_end_of_a_terminal_what_is_wrong_is_kept_and_named(world: World, tmp_path: Path) -> None:
    world.load("steady")
    code, shown = on_a_terminal(world, editor(tmp_path, SPOIL), b"\x04")
    (kept,) = tmp_path.glob("pgha-config-*")
    assert (code, f"nothing was changed; the text is in {kept}" in shown) == (2, True), shown


def test_unchanged_or_without_an_editor(world: World, tmp_path: Path) -> None:
    world.load("steady")
    assert on_a_terminal(world, editor(tmp_path, "true"), b"") == (0, "Not changed\n")
    code, shown = on_a_terminal(world, tmp_path / "no-such-editor", b"")
    assert code == 2
    assert "does not start" in shown
    assert world.ctl("edit-config")[::2] == (2, ("pgha: nothing to change, and there is no terminal for an editor; allowed: -s KEY=VALUE, -p PARAMETER=VALUE "
                                                 "(null takes a key away), --apply FILE, --replace FILE\n"))


def test_colours_leave_the_header_alone() -> None:
    lines = ["--- ", "+++ ", "@@ -1 +1 @@", " a", "-b\x1b[2J", "+c", ""]
    assert coloured(lines, colours=False) == ["--- ", "+++ ", "@@ -1 +1 @@", " a", "-b\\x1b[2J", "+c", ""]
    assert coloured(lines, colours=True) == ["--- ", "+++ ", "\033[36m@@ -1 +1 @@\033[0m", " a", "\033[31m-b\\x1b[2J\033[0m", "\033[32m+c\033[0m", ""]
