"""`pgha config why` as a command: from the agent if it answers, else from the file and the store; never a secret."""

from __future__ import annotations

import json
import os
from typing import Any

import pytest
from ctl_world import World
from rest_world import app_for, published

from pgha.__main__ import main
from pgha.rest.routes import App
from pgha.rest.wire import Request, Response, json_response, text_response

pytestmark = pytest.mark.etcd


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("PGHA")]:
        monkeypatch.delenv(name)


def run(world: World, *arguments: str) -> tuple[int, str, str]:
    world.capsys.readouterr()
    code = main(["config", "why", "-c", str(world.config), *arguments])
    out, err = world.capsys.readouterr()
    return code, out, err


class Agent(App):
    def __init__(self, answer: Response) -> None:
        _, board, inbox, clock = app_for(published())
        super().__init__(board, inbox, clock=clock)
        self.answer = answer
        self.asked: list[Any] = []

    async def handle(self, request: Request) -> Response:
        assert (request.method, request.path) == ("POST", "/pgha/config/why")
        self.asked.append(json.loads(request.body))
        return self.answer


def test_without_an_agent_the_file_and_the_store_say(world: World) -> None:
    world.load("pending-restart")
    world.extra = '[restapi]\nlisten = "127.0.0.1:1"\nauthentication.username = "op"\nauthentication.password = "geheim"\n[postgresql]\nuse_pg_rewind = false\n[postgresql.parameters]\nwork_mem = "8MB"\n'
    world.write_config()
    code, out, err = run(world, "ttl", "postgresql.parameters.work_mem", "postgresql.use_pg_rewind", "restapi.authentication.password")
    assert code == 0, err
    lines = out.splitlines()
    assert lines[0] == "ttl = 20"
    assert lines[1].startswith("  from  /config in the store (revision ")
    assert lines[2] == "  over  the default: 30"
    assert lines[3] == 'postgresql.parameters.work_mem = "8MB"'
    assert lines[4].startswith(f"  from  {world.config} line 13 (file changed 20")
    assert lines[5] == "postgresql.use_pg_rewind = false"
    assert lines[7:9] == ["  over  /config in the store: true", "  over  the default: false"]
    assert lines[9] == 'restapi.authentication.password = "***"'
    assert "geheim" not in out + err
    assert err.startswith("pgha: the agent does not answer (http://127.0.0.1:1: Connection refused): as the files and the store say it")
    code, out, _ = run(world, "--json", "ttl")
    assert (code, json.loads(out)["value"], json.loads(out)["layers"][0]["layer"]) == (0, 20, "store")
    assert run(world, "tll")[::2] == (2, "pgha: tll: unknown key; did you mean ttl?\n")


def test_the_agent_is_asked_and_an_edited_file_noticed(world: World, start_agent: Any) -> None:
    world.load("steady")
    agent = Agent(json_response({
        "member": "n1", "key": "postgresql.parameters.work_mem", "value": "4MB", "notes": ["whatever"], "left_out": "",
        "layers": [{"layer": "store", "value": "4MB", "where": "/config", "path": ["postgresql", "parameters", "work_mem"]}],
        "store": {"revision": 9, "watched_since": "x", "changed": {"revision": 9, "seen_at": "2026-01-01T00:00:00+00:00"}},
        "running": {"value": "4MB", "source": "configuration file", "file": "/data/postgresql.conf", "line": 9, "context": "postmaster", "pending_restart": True}}))
    host, port = start_agent(agent)
    world.extra = f'[restapi]\nlisten = "{host}:{port}"\n[postgresql.parameters]\nwork_mem = "8MB"\n'
    world.write_config()
    code, out, err = run(world, "postgresql.parameters.work_mem")
    assert agent.asked == [{"key": "postgresql.parameters.work_mem"}]
    assert (code, out) == (0, """\
postgresql.parameters.work_mem = "4MB"
  from  /config in the store (changed at revision 9, seen by n1 at 2026-01-01T00:00:00+00:00)
  PostgreSQL on n1 has "4MB" (configuration file of /data/postgresql.conf line 9; changed by a restart only, and one is pending)
  note  whatever
""")
    assert err == 'pgha: postgresql.parameters.work_mem: the file says "8MB" now, which the agent has not read; allowed: pgha ctl reload n1\n'
    agent.answer = text_response(404, "postgresql.parameters.x: is no parameter of PostgreSQL 15")
    assert run(world, "postgresql.parameters.x") == (2, "", "pgha: postgresql.parameters.x: is no parameter of PostgreSQL 15\n")
    agent.answer = text_response(401, "not authenticated")
    assert run(world, "ttl")[0] == 3
