"""`ctl restart` with conditions and a time: who is meant, what is asked, what its answer means."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from ctl_world import World
from rest_world import app_for, published

from pgha.ctl.ends import End, of_several
from pgha.ctl.when import moment
from pgha.rest.routes import App
from pgha.rest.wire import Request, Response, json_response, text_response

pytestmark = pytest.mark.etcd


class Agent(App):
    """An agent that says which version its PostgreSQL has, and answers POST /restart as laid ready."""

    def __init__(self, *, version: int | None = 150006, status: int = 200, text: str = "restarted successfully") -> None:
        _, board, inbox, clock = app_for(published())
        super().__init__(board, inbox, clock=clock)
        self.version, self.answer = version, text_response(status, text)
        self.asked: list[Any] = []

    def quick(self, key: bytes, *, keep_alive: bool) -> bytes | None:
        del key, keep_alive
        return None

    async def handle(self, request: Request) -> Response:
        if request.method == "GET":
            return json_response({"state": "running"} if self.version is None else {"state": "running", "server_version": self.version})
        self.asked.append(json.loads(request.body))
        return self.answer


def agents(world: World, start_agent: Any, **by_name: Agent) -> dict[str, Agent]:
    for name, agent in by_name.items():
        world.agent_at(name, start_agent(agent))
    return by_name


@pytest.mark.parametrize(("version", "restarted", "code"), [
    ("15.6", ["n2"], 0), ("15.7", ["n2", "n1"], 0), ("16", ["n2", "n1"], 0), ("15.5", [], 3),
])
def test_only_who_runs_a_lower_version(world: World, start_agent: Any, version: str, restarted: list[str], code: int) -> None:
    world.load("steady")
    of = agents(world, start_agent, n1=Agent(version=150006), n2=Agent(version=150005), n3=Agent(version=160000))
    got, _, err = world.ctl("restart", "--force", "--pg-version", version)
    assert got == code
    assert sorted(name for name, agent in of.items() if agent.asked) == sorted(restarted)
    assert f"n3 runs 16.0, which is not below {version}, and is left out" in err
    assert all(agent.asked in ([], [{}]) for agent in of.values())


def test_who_does_not_say_its_version_is_not_restarted(world: World, start_agent: Any) -> None:
    world.load("steady")
    of = agents(world, start_agent, n1=Agent(version=None), n2=Agent(version=140000))
    world.agent_at("n3", ("127.0.0.1", 1))
    code, out, err = world.ctl("restart", "--force", "--pg-version", "15")
    assert code == 1, "n2 was restarted"
    assert out.endswith("Success: restart on member n2\n")
    assert of["n1"].asked == []
    assert "restart for member n1: it does not say which version it runs" in err
    assert "restart for member n3: http://127.0.0.1:1: Connection refused" in err


def test_a_schedule_takes_its_conditions_along(world: World, start_agent: Any) -> None:
    world.load("steady")
    of = agents(world, start_agent, n2=Agent(status=202, text="Restart scheduled"), n3=Agent(status=409, text="Another restart is already scheduled"))
    code, out, err = world.ctl("restart", "n2", "n3", "--force", "--scheduled", "2099-01-31T03:00:00+01:00", "--pending", "--pg-version", "16.4", "--timeout", "60")
    assert code == 1, "on n2 it is scheduled"
    assert out.endswith("Success: restart scheduled on member n2\n")
    assert err == "pgha: Failed: another restart is already scheduled on member n3\n"
    asked = {"schedule": "2099-01-31T03:00:00+01:00", "restart_pending": True, "postgres_version": "16.4", "timeout": "60"}
    assert (of["n2"].asked, of["n3"].asked) == ([asked], [asked])
    assert world.ctl("restart", "n2", "--force", "--scheduled", "now")[0] == 0
    assert of["n2"].asked[1:] == [{}]


@pytest.mark.parametrize(("codes", "code"), [
    ((0, 0), 0), ((3, 3), 3), ((5,), 5), ((5, 5), 5), ((1, 1), 1), ((4, 4), 4),
    ((0, 3), 1), ((0, 5), 1), ((0, 1), 1), ((0, 4), 4), ((3, 4, 0), 4), ((5, 4), 4),
    ((3, 5), 3), ((1, 5), 1), ((3, 1), 1),
])
def test_the_exit_code_of_several_members_is_true_of_all(codes: tuple[int, ...], code: int) -> None:
    assert of_several(codes) == of_several(codes[::-1]) == code


def test_a_member_that_is_named_twice_is_restarted_once(world: World, start_agent: Any) -> None:
    world.load("steady")
    of = agents(world, start_agent, n2=Agent())
    assert world.ctl("restart", "bench", "n2", "n2", "--force")[0] == 0
    assert of["n2"].asked == [{}]


def test_what_was_done_on_one_member_is_not_called_refused_or_unreachable(world: World, start_agent: Any) -> None:
    world.load("steady")
    agents(world, start_agent, n2=Agent(), n3=Agent(status=503, text="restart already in progress"))
    assert world.ctl("restart", "n2", "n3", "--force")[0] == 1
    world.agent_at("n3", ("127.0.0.1", 1))
    for command in ("restart", "reload"):
        assert world.ctl(command, "n2", "n3", "--force")[0] == 1
        assert world.ctl(command, "n3", "n3", "--force")[0] == 5


@pytest.mark.parametrize(("text", "code"), [("restart conditions are not satisfied", 3), ("restart already in progress", 3), ("restart failed: too slow", 1),
                                            ("no outcome of the restart within 7 seconds; it may still happen", 4)])
def test_what_an_agent_refuses_is_no_failure(world: World, start_agent: Any, text: str, code: int) -> None:
    world.load("steady")
    world.agent_at("n2", start_agent(Agent(status=503, text=text)))
    assert world.ctl("restart", "n2", "--force")[::2] == (code, f"pgha: Failed: restart for member n2, status code=503, ({text})\n")


def test_the_role_is_judged_again_when_it_is_time(world: World, start_agent: Any) -> None:
    world.load("steady")
    agent = Agent(status=202, text="Restart scheduled")
    world.agent_at("n2", start_agent(agent))
    assert world.ctl("restart", "n2", "-r", "replica", "--force", "--scheduled", "2099-01-31T03:00:00+01:00")[0] == 0
    assert agent.asked == [{"schedule": "2099-01-31T03:00:00+01:00", "role": "replica"}]


@pytest.mark.parametrize(("when", "arguments", "code", "err"), [
    ("steady", ["--pg-version", "9.6"], 2, "--pg-version 9.6: is no version of PostgreSQL, as 16 or 16.4"),
    ("steady", ["--scheduled", "tomorrow"], 2, "Unable to parse scheduled timestamp (tomorrow). It should be in an unambiguous format (e.g. ISO 8601"),
    ("steady", ["--scheduled", "2001-01-01T00:00:00Z"], 2, "2001-01-01T00:00:00+00:00 is past"),
    ("paused", ["--scheduled", "2099-01-01"], 3, "Can't schedule restart in the paused state"),
    ("steady", ["--pending"], 3, "no member is left to restart"),
    ("steady", ["--role", "standby-leader"], 3, "no member is left to restart"),
])
def test_what_cannot_be_is_refused_before_anybody_is_asked(world: World, when: str, arguments: list[str], code: int, err: str) -> None:
    world.load(when)
    got, _, errors = world.ctl("restart", "--force", *arguments)
    assert got == code
    assert err in errors


def test_a_moment_without_its_distance_from_utc_is_this_machines_time() -> None:
    assert moment("2099-01-31 03:00+05:30") == "2099-01-31T03:00:00+05:30"
    assert moment("2099-01-31T03:00Z") == "2099-01-31T03:00:00+00:00"
    assert re.fullmatch(r"2099-01-31T03:00:00[+-]\d\d:\d\d", moment("2099-01-31T03:00"))
    with pytest.raises(End):
        moment("0001-01-01T00:00")


class Member(Agent):
    """One whose restarts are remembered in `order`, and that answers where its WAL is."""

    def __init__(self, name: str, order: list[str], *, replayed: int = 100, **more: Any) -> None:
        super().__init__(**more)
        self.name, self.order, self.replayed = name, order, replayed

    async def handle(self, request: Request) -> Response:
        if request.method == "GET":
            self.replayed += 50
            return json_response({"state": "running", "xlog": {"location": 200} if self.name == "n1" else {"replayed_location": self.replayed}})
        self.order.append(self.name)
        return self.answer


@pytest.mark.parametrize("row", [
    ({"max_connections": (100, 200)}, "", "n2 n3 n1", "n2, n3, n1 (primary) (max_connections is raised: standbys before the primary)"),
    ({"max_connections": (200, 100)}, "", "n1 n2 n3", "n1 (primary), n2, n3 (max_connections is lowered: the primary before the standbys)"),
    ({"max_connections": (100, 200), "max_wal_senders": (10, 5)}, "", "n2 n3 n1 n2 n3",
     "n2, n3, n1 (primary), n2, n3 (max_connections is raised: standbys before the primary; max_wal_senders is lowered: the primary before the standbys)"),
    ({"shared_buffers": (100, 200)}, "", "n2 n3 n1", ""),
    ({"max_connections": (100, 200)}, "n3", "n2 n3", "n2, n3, n1 (primary) (max_connections is raised: standbys before the primary)"),
    ({"max_connections": (200, 100)}, "n1", "n1", "n1 (primary), n2, n3 (max_connections is lowered: the primary before the standbys)"),
    ({"shared_buffers": (100, 200)}, "n3", "n2 n3 n1", ""),
])
def test_what_standbys_must_not_have_less_of_is_restarted_in_order(world: World, start_agent: Any, row: tuple[dict[str, tuple[int, int]], str, str, str]) -> None:
    changes, failing, restarted, said = row
    world.load("steady")
    order: list[str] = []
    for name in ("n1", "n2", "n3"):
        broken = {"status": 503, "text": "restart failed"} if name == failing else {}
        world.agent_at(name, start_agent(Member(name, order, **broken)))
        raw = json.loads(world.get(f"members/{name}"))
        reason = {parameter: {"old_value": str(old), "new_value": str(new)} for parameter, (old, new) in changes.items()}
        world.put(f"members/{name}", {**raw, "pending_restart": True, "pending_restart_reason": reason}, leased=True)
    code, out, err = world.ctl("restart", "--force", "--pending")
    assert order == restarted.split()
    assert code == (1 if failing else 0)
    assert (f"In this order: {said}\n" in out) == bool(said)
    left = [name for name in said.split(" (max", maxsplit=1)[0].replace(" (primary)", "").split(", ")[len(order):] if name]
    assert (f"not restarted, since the order matters: {', '.join(left)}\n" in err) == bool(failing and left)
