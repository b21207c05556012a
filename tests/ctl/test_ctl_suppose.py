"""`explain --if`: every agent is asked for a pass of now; what is malformed, unknown or silent is said. (What is foretold: tests/foresee.)"""

from __future__ import annotations

import json
from typing import Any

import pytest
from ctl_world import World

from tests.foresee.test_forecast import Cluster

pytestmark = pytest.mark.etcd


@pytest.fixture(scope="module")
def observations() -> dict[str, bytes]:
    """What three agents of a healthy cluster would tell."""
    import msgspec

    made = Cluster(config={"ttl": 5, "loop_wait": 1, "retry_timeout": 2})
    made.stage.end()
    return {name: msgspec.json.encode(one) for name, one in made.seen().items()}


class Agent:
    """An agent that tells what it is given; `status` and `body` instead."""

    headers: dict[str, str] = {}

    def __init__(self, body: bytes, status: int = 200) -> None:
        self.asked: list[tuple[str, dict[str, str]]] = []
        self._body, self._status = body, status

    def quick(self, _key: bytes, *, keep_alive: bool) -> None: ...

    def has_places(self, number: int) -> None: ...

    def refuses(self, _request: Any) -> None: ...

    def upgrade(self, _request: Any) -> None: ...

    async def handle(self, request: Any) -> Any:
        from pgha.rest.wire import JSON, Response

        self.asked.append((request.path, dict(request.query)))
        return Response(status=self._status, body=self._body, content_type=JSON)


@pytest.fixture
def agents(world: World, start_agent: Any, observations: dict[str, bytes]) -> dict[str, Agent]:
    world.load("steady")
    made = {name: Agent(body) for name, body in observations.items()}
    for name, agent in made.items():
        world.agent_at(name, start_agent(agent))
    return made


def test_all_agents_are_asked_for_a_pass_of_now(world: World, agents: dict[str, Agent]) -> None:
    code, out, err = world.ctl("explain", "--if", "n1=down")
    assert (code, err) == (0, ""), out
    lines = out.splitlines()
    assert lines[:2] == ["if n1=down:", "  n1 leads now"]
    assert "  then n2 leads" in lines
    assert any(line.startswith("  writes are possible again in ") for line in lines)
    assert any(line.startswith("  n3  promotion.no_peer_is_ahead  own ") for line in lines)
    assert all(agent.asked == [("/pgha/observation", {"fresh": "1"})] for agent in agents.values())


def test_one_node_and_json(world: World, agents: dict[str, Agent]) -> None:
    code, out, _ = world.ctl("explain", "n3", "--if", "n1=down", "--if", "n2.lag=20MB")
    assert code == 0
    assert out.splitlines()[0] == "if n1=down and n2.lag=20MB:"
    assert "  n3   at once" in out
    assert "  n2   at once" not in out
    code, out, _ = world.ctl("explain", "--if", "n1=down", "--if", "n2.lag=20MB", "-f", "json")
    said = json.loads(out)
    assert (code, said["winners"], said["certain"], said["leader"]) == (0, ["n3"], True, "n1")
    assert "lag 20.0 MiB, limit 1.0 MiB" in [r["because"] for r in said["obstacles"]["n2"]]


@pytest.mark.parametrize(("arguments", "text"), [
    (("--if", "n1=up"), "'n1=up' is no hypothesis; allowed: NODE=down, dcs=down, NODE.lag=SIZE (as 20MB)"),
    (("--if", "n9=down"), "'n9=down': no such member: n9; there are n1, n2, n3"),
    (("--if", "n2.lag=lots"), "'lots' is no size; allowed: a whole number with B, kB, MB, GB or TB"),
    (("n9", "--if", "n1=down"), "no such member: n9"),
])
def test_what_cannot_be_supposed(world: World, agents: dict[str, Agent], arguments: tuple[str, ...], text: str) -> None:
    code, out, err = world.ctl("explain", *arguments)
    assert (code, out) == (2, "")
    assert text in err
    assert all(not agent.asked for agent in agents.values())


def test_who_does_not_tell_is_named(world: World, start_agent: Any, agents: dict[str, Agent]) -> None:
    world.agent_at("n3", ("127.0.0.1", 1))
    code, out, _ = world.ctl("explain", "--if", "n1=down")
    assert code == 0
    assert "  then n2 or n3 leads (open; most likely n2)" in out
    assert "n3 did not tell what it sees (http://127.0.0.1:1: Connection refused): it is taken to be down; if it is not, it may take over" in out


@pytest.mark.parametrize("answer", [
    (b"{}", 200, "its answer is no observation of this version"), (b"nonsense", 200, "its answer is no observation"), (b"no pass yet", 503, "status 503"),
])
def test_an_answer_that_is_none(world: World, start_agent: Any, agents: dict[str, Agent], answer: tuple[bytes, int, str]) -> None:
    body, status, why = answer
    world.agent_at("n3", start_agent(Agent(body, status)))
    code, out, _ = world.ctl("explain", "--if", "n1=down")
    assert code == 0
    assert f"n3 did not tell what it sees ({why}" in out


def test_another_members_agent_at_its_address(world: World, start_agent: Any, agents: dict[str, Agent], observations: dict[str, bytes]) -> None:
    world.agent_at("n3", start_agent(Agent(observations["n2"])))
    assert "n3 did not tell what it sees (n2 answers at its address)" in world.ctl("explain", "--if", "n1=down")[1]


def test_nobody_tells(world: World) -> None:
    world.load("steady")
    for name in ("n1", "n2", "n3"):
        world.agent_at(name, ("127.0.0.1", 1))
    code, out, err = world.ctl("explain", "--if", "n1=down")
    assert (code, out) == (5, "")
    assert "no agent tells what it sees: n1: http://127.0.0.1:1: Connection refused; n2: " in err
