"""One strange value in the store, or in an agent's answer: it is named or escaped, and the rest of the command goes on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from ctl_world import World
from rest_world import app_for, published

from pgha.rest.routes import App
from pgha.rest.wire import Request, Response, json_response, text_response

pytestmark = pytest.mark.etcd

#: sets the window's title, and clears the screen; the second in the form of one byte in Latin-1
ESCAPES = "\x1b]0;owned\x07 \x9b2J"


class Agent(App):
    """Answers every GET with one object, and everything else with one text."""

    def __init__(self, body: dict[str, Any], *, status: int = 200, text: str = "done") -> None:
        _, board, inbox, clock = app_for(published(primary=False))
        super().__init__(board, inbox, clock=clock)
        self.body, self.answer = body, text_response(status, text)

    def quick(self, key: bytes, *, keep_alive: bool) -> bytes | None:
        del key, keep_alive
        return None

    def refuses(self, request: Request) -> Response | None:
        del request
        return None

    async def handle(self, request: Request) -> Response:
        return json_response(self.body) if request.method == "GET" else self.answer


def with_member(world: World, name: str, **values: Any) -> None:
    world.put(f"members/{name}", {**json.loads(world.get("members/n3")), **values}, leased=True)


@pytest.mark.parametrize(("arguments", "code"), [
    (["restart", "n2", "n3", "--force"], 1), (["reload", "n2", "n3", "--force"], 1), (["reinit", "n2", "n3", "--force"], 1), (["version", "n2", "n3"], 1),
    (["restart", "n2", "--force"], 5), (["reload", "n2", "--force"], 5), (["reinit", "n2", "--force"], 5), (["version", "n2"], 5),
    (["explain", "n2"], 5), (["pause"], 0), (["watch", "--once"], 5),
])
@pytest.mark.parametrize("address", ["http://☃:8008/patroni", "http://127.0.0.1:1/☃", "http://\ud800:8008/patroni", "http://a\r\nX: y:8008/patroni"])
def test_an_address_that_is_none_costs_only_its_member(world: World, start_agent: Any, address: str, arguments: list[str], code: int) -> None:
    world.load("steady")
    with_member(world, "n1", api_url=address)
    with_member(world, "n2", api_url=address)
    world.agent_at("n3", start_agent(Agent({"server_version": 150020, "pgha": {"version": "0.1.0"}}, text="went on")))
    got, out, err = world.ctl(*arguments)
    assert "is not an address" in err
    if arguments[0] != "watch":     # it takes n3
        assert got == code
    if "n3" in arguments:
        assert "n3" in out.splitlines()[-1]


def test_the_store_s_address_too(world: World) -> None:
    code, _, err = world.ctl("-d", "http://☃:2379", "list")
    assert code == 5
    assert "is not an address" in err


@pytest.mark.parametrize(("arguments", "encoding"), [
    (["list", "-f", "toml"], "utf-8"), (["show-config"], "utf-8"), (["list"], "ascii"), (["show-config"], "ascii"), (["topology"], "ascii"), (["history"], "ascii"),
    (["restart", "--dry-run", "nobody\u00e4"], "ascii"),
])
def test_what_cannot_be_written_is_escaped(world: World, arguments: list[str], encoding: str) -> None:
    world.load("steady")
    world.put("config", {"ttl": 30, "a": "\ud800", "b": "ä"})
    with_member(world, "nä", state="\ud800", tags={"zone": "\ud800"})
    world.put("history", [[1, 5, "ä\ud800"]])
    world.write_config()
    program = f"import sys; sys.path.insert(0, {str(Path(__file__).parents[2])!r}); from pgha.ctl import main; sys.exit(main(sys.argv[1:]))"
    done = subprocess.run([sys.executable, "-c", program, "-c", world.config, *arguments], capture_output=True, timeout=60, check=False,
                          env={**os.environ, "PYTHONIOENCODING": encoding})
    assert b"Traceback" not in done.stderr
    assert done.returncode == (2 if "restart" in arguments else 0), done.stderr
    assert b"\\ud800" in done.stdout or arguments[0] == "topology" or encoding == "ascii"


@pytest.mark.parametrize("theirs", ["x", [], 5, None])
def test_a_product_that_does_not_say_which_it_is(world: World, start_agent: Any, theirs: Any) -> None:
    world.load("steady")
    world.agent_at("n2", start_agent(Agent({"patroni": theirs, "server_version": 150020})))
    world.agent_at("n3", start_agent(Agent({"patroni": {"version": "4.1.5"}})))
    code, out, err = world.ctl("version", "n2", "n3")
    assert (code, err) == (0, "")
    assert out.splitlines()[1:] == ["n2: a program that does not say which it is PostgreSQL 15.20", "n3: Patroni 4.1.5"]


@pytest.mark.parametrize("upstream", ["n2", "", "n1"])
def test_a_member_without_a_name_is_none(world: World, upstream: str) -> None:
    world.load("steady")
    with_member(world, "", tags={})
    with_member(world, "n3", tags={"replicatefrom": upstream})
    code, out, _ = world.ctl("topology")
    assert code == 0
    assert sum(line.startswith("| ") for line in out.splitlines()) == 4     # the heading, and three members
    assert [row["Member"] for row in json.loads(world.ctl("list", "-f", "json")[1])] == ["n1", "n2", "n3"]


def test_nothing_speaks_to_the_terminal(world: World, start_agent: Any) -> None:
    world.load("steady")
    name = f"n{ESCAPES}"
    world.put(f"members/{name}", b"{", leased=True)
    world.put("config", {"ttl": 30, "a": ESCAPES})
    decision = {"node": ESCAPES, "summary": ESCAPES, "reasons": [{"rule": ESCAPES, "because": ESCAPES}], "problems": [ESCAPES]}
    for refusing in ("n1", "n2"):
        world.agent_at(refusing, start_agent(Agent(decision, status=503, text=ESCAPES)))
    world.agent_at("n3", start_agent(Agent({"pgha": {"version": ESCAPES}}, text=ESCAPES)))
    said = []
    for arguments in (["list"], ["restart", "n2", "--force"], ["restart", name, "--force"], ["restart", ESCAPES], ["reload", "n2", "--force"], ["explain", "n2"],
                      ["version", "n3"], ["switchover", "--leader", "n1", "--candidate", "n2", "--force"], ["dsn", "-m", ESCAPES], ["show-config"], ["pause"]):
        _, out, err = world.ctl(*arguments)
        said.append(out + err)
        assert not set(out + err) & {"\x1b", "\x07", "\x9b"}, arguments
    assert sum(r"\x1b]0;owned" in text for text in said) >= 6
    config: Any = tomllib.loads(world.ctl("show-config")[1])
    assert config["a"] == ESCAPES
