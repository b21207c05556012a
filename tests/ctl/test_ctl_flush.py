"""`ctl switchover --scheduled` and `ctl flush`: handed to an agent or not at all; taken back, and what was not there is no failure."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from ctl_world import World
from rest_world import Inbox, app_for, golden, published
from test_ctl_changing import Loop, app_of

from pgha.rest.requests import Answer
from pgha.rest.routes import App
from pgha.rest.wire import Request, Response, text_response

pytestmark = pytest.mark.etcd


class Scheduler(App):
    """An agent that has a restart scheduled, as the reference's answers; pgha's own has none yet."""

    def __init__(self, *, status: int, text: str) -> None:
        app, board, inbox, clock = app_for(published())
        super().__init__(board, inbox, clock=clock)
        self.answer = text_response(status, text)
        self.asked: list[str] = []

    async def handle(self, request: Request) -> Response:
        self.asked.append(f"{request.method} {request.path}")
        self.body = request.body
        return self.answer


def scheduled(world: World, *names: str) -> None:
    for name in names:
        raw = json.loads(world.get(f"members/{name}"))
        world.put(f"members/{name}", {**raw, "scheduled_restart": {"schedule": "2099-01-01T00:00:00+00:00"}}, leased=True)


def test_scheduled_restarts_are_flushed_where_there_are_any(world: World, start_agent: Any) -> None:
    world.load("steady")
    scheduled(world, "n1", "n3")
    agents = {name: Scheduler(status=200, text="scheduled restart deleted") for name in ("n1", "n2", "n3")}
    for name, agent in agents.items():
        world.agent_at(name, start_agent(agent))
    assert world.ctl("flush", "restart") == (2, "No scheduled restart for member n2\n",
                                             "pgha: this asks before it does anything, and there is no terminal to ask on; allowed: --force\n")
    code, out, err = world.ctl("flush", "bench", "restart", "--force")
    assert (code, err) == (0, "")
    assert out == ("No scheduled restart for member n2\nSuccess: flush scheduled restart for member n3\n"
                   "Success: flush scheduled restart for member n1\n")
    assert [agent.asked for agent in agents.values()] == [["DELETE /restart"], [], ["DELETE /restart"]]
    assert world.ctl("flush", "n2", "restart") == (0, "No scheduled restart for member n2\n", "")
    assert world.ctl("flush", "-r", "replica", "--force", "restart")[1].count("Success") == 1
    assert world.ctl("flush", "n9", "restart")[0] == 2
    assert world.ctl("flush", "-r", "leader", "n2", "restart")[0] == 3
    assert world.ctl("flush")[0] == 2


def test_a_restart_that_is_not_flushed_is_a_failure(world: World, start_agent: Any) -> None:
    world.load("steady")
    scheduled(world, "n2", "n3")
    loop = Loop(world)
    loop.answers["cancel_restart"] = Answer(status=404, text="no restarts are scheduled")
    world.agent_at("n2", start_agent(app_of(loop)))
    world.agent_at("n3", ("127.0.0.1", 1))
    code, out, err = world.ctl("flush", "n2", "n3", "restart", "--force")
    assert (code, out) == (3, "")
    assert "Failed: flush scheduled restart for member n2, status code=404, (no restarts are scheduled)" in err
    assert "Failed: flush scheduled restart for member n3: http://127.0.0.1:1: Connection refused" in err


def test_a_scheduled_switchover_is_flushed_by_an_agent(world: World, start_agent: Any) -> None:
    recording = world.load("scheduled-switchover")
    loop = Loop(world)
    loop.board.publish(published(etcd=recording["etcd"], number=2))
    loop.answers["cancel_switchover"] = Answer(status=200, text="scheduled switchover deleted")
    world.agent_at("n1", start_agent(app_of(loop)))
    assert world.ctl("flush", "switchover") == (0, "Success: scheduled switchover deleted\n", "")
    assert loop.asked == [("cancel_switchover", {})]


WHEN = "2099-01-01T00:00:00+00:00"


def test_a_schedule_is_handed_to_the_leaders_agent(world: World, start_agent: Any) -> None:
    world.load("steady")
    agent = Scheduler(status=202, text="Switchover scheduled")
    world.agent_at("n1", start_agent(agent))
    code, out, err = world.ctl("switchover", "--force", "--candidate", "n2", "--scheduled", WHEN)
    assert (code, err) == (0, "")
    assert re.search(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{5} Switchover scheduled$", out, re.MULTILINE)
    assert agent.asked == ["POST /switchover"]
    assert json.loads(agent.body) == {"leader": "n1", "candidate": "n2", "scheduled_at": WHEN}


def test_without_an_agent_nothing_is_scheduled(world: World) -> None:
    world.load("steady")
    world.agent_at("n1", ("127.0.0.1", 1))
    code, _, err = world.ctl("switchover", "--force", "--scheduled", WHEN)
    assert (code, err) == (5, "pgha: http://127.0.0.1:1: Connection refused: nothing was scheduled\n")
    assert world.get("failover") == b"{}"


@pytest.mark.parametrize(("when", "arguments", "code", "err"), [
    ("paused", ["--scheduled", WHEN], 3, "Can't schedule switchover in the paused state"),
    ("steady", ["--scheduled", "soon"], 2, "Unable to parse scheduled timestamp (soon)"),
    ("steady", ["--scheduled", "2001-01-01T00:00Z"], 2, "is past"),
])
def test_a_schedule_that_cannot_be_is_refused(world: World, when: str, arguments: list[str], code: int, err: str) -> None:
    world.load(when)
    got, _, errors = world.ctl("switchover", "--force", *arguments)
    assert got == code
    assert err in errors


def test_without_a_scheduled_switchover_there_is_nothing_to_do(world: World) -> None:
    world.load("steady")
    assert world.ctl("flush", "bench", "switchover") == (0, "No pending scheduled switchover\n", "")


def test_an_agent_that_knows_of_none_is_believed(world: World, start_agent: Any) -> None:
    world.load("scheduled-switchover")
    board = published(etcd=golden("steady")["etcd"])
    world.agent_at("n1", start_agent(App(app_for(board)[1], Inbox(), clock=app_for(board)[3])))
    assert world.ctl("flush", "switchover") == (3, "", "pgha: Failed: no switchover is scheduled\n")


def test_without_an_agent_it_is_flushed_in_the_store(world: World) -> None:
    world.load("scheduled-switchover")
    for name in ("n1", "n2", "n3"):
        world.agent_at(name, ("127.0.0.1", 1))
    code, out, err = world.ctl("flush", "switchover")
    assert (code, out) == (0, "Success: scheduled switchover deleted\n")
    assert "Could not find any accessible member of cluster bench; writing to the store" in err
    assert world.get("failover") == b"{}"
