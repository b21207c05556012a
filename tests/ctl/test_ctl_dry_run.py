"""`--dry-run`: nothing is changed, in the store or by an agent; exit code 0 if it would be done, 3 with every obstacle if not."""

from __future__ import annotations

import json
from typing import Any

import pytest
from ctl_world import World
from rest_world import NOW as AT
from rest_world import Inbox, published

from pgha.clock import SystemClock
from pgha.model.observation import Peer
from pgha.rest.published import Board
from pgha.rest.routes import App

pytestmark = pytest.mark.etcd
LSN = 67837408


class Agent:
    """n1, which leads, as ctl sees it; n2 and n3 answer it as standbys."""

    def __init__(self, *, primary: bool = True, **changed: Any) -> None:
        self.inbox = Inbox()
        self.clock = SystemClock()
        self.lags: dict[str, int] = {}
        now = self.clock.now()
        value = published(primary=primary, **changed)
        assert value.observation is not None
        seen = _since(value.observation, now)
        self.board = Board(_since(value, now, observation=seen))
        self.app = App(self.board, self.inbox, clock=self.clock)

    def peers(self, **lsn: int) -> None:
        now = self.clock.now()
        self.inbox.peers = {name: Peer(name=name, asked_at=now.plus_s(60.0), answered=True, is_pgha=True, in_recovery=True, timeline=2, lsn=lsn.get(name, LSN), running=True)
                            for name in ("n2", "n3")}


def _since(value: Any, now: Any, **fields: Any) -> Any:
    """The recorded pass, as one of now."""
    from msgspec.structs import replace

    if hasattr(value, "licence"):
        return replace(value, now=now, licence=replace(value.licence, since=now, valid_until=now.plus_s(300.0)), postgres=replace(value.postgres, row_at=now, answered_at=now.plus_s(300.0)),
                       guard=replace(value.guard, reachable=True))
    return replace(value, at=now, licence_until=now.plus_s(300.0), alive_until=now.plus_s(300.0), **fields)


def keys(world: World) -> Any:
    import base64

    start = world.root.encode()
    end = start[:-1] + bytes([start[-1] + 1])
    found = world.etcd.post(world.etcd.members[0], "/v3/kv/range", {"key": base64.b64encode(start).decode(), "range_end": base64.b64encode(end).decode()})
    return [(kv["key"], kv["value"], kv["mod_revision"]) for kv in found["kvs"]]  # type: ignore[attr-defined]


def unchanged(world: World, agent: Agent, *arguments: str) -> tuple[int, str, str]:
    before = keys(world)
    ended = world.ctl(*arguments)
    assert keys(world) == before
    assert agent.inbox.asked == []
    return ended


@pytest.fixture
def agent(world: World, start_agent: Any) -> Agent:
    world.load("steady")
    made = Agent()
    made.peers()
    world.agent_at("n1", start_agent(made.app))
    return made


def test_a_switchover(world: World, agent: Agent) -> None:
    code, out, err = unchanged(world, agent, "switchover", "--candidate", "n2", "--dry-run")
    assert (code, err) == (0, ""), out
    said = out[out.index("switchover of cluster"):].splitlines()
    assert said[0] == "switchover of cluster bench from n1 to n2: would be done (dry run: nothing is changed)"
    assert said[1] == "  1. n1  checkpoint: checkpoint before the shutdown"
    assert any(line.startswith("  5. n1  release: releasing the lock") for line in said)
    assert any("n2  promote: promoting to a new timeline" in line for line in said)
    assert said[-1] == "  n2: can take over (lag 0 bytes, timeline 2, priority 1)"


def test_a_switchover_that_would_be_refused(world: World, agent: Agent) -> None:
    agent.peers(n2=LSN - (20 << 20))
    code, out, _ = unchanged(world, agent, "switchover", "--candidate", "n2", "--dry-run")
    assert code == 3
    assert "would be refused" in out
    assert "  switchover.has_good_candidate  n2: lag 20.0 MiB, limit 1.0 MiB" in out


@pytest.mark.parametrize(("arguments", "text"), [
    (("switchover", "--leader", "n2", "--dry-run"), "member n2 is not the leader of cluster bench; n1 is"),
    (("switchover", "--candidate", "n9", "--dry-run"), "member n9 does not exist in cluster bench or is tagged as nofailover"),
    (("failover", "--dry-run"), "failover could be performed only to a specific candidate"),
])
def test_what_ctl_itself_would_refuse(world: World, agent: Agent, arguments: tuple[str, ...], text: str) -> None:
    code, out, err = unchanged(world, agent, *arguments)
    assert code == 3, (out, err)
    assert text in out + err


def test_restart_and_reinit(world: World, agent: Agent) -> None:
    code, out, _ = unchanged(world, agent, "restart", "n1", "--dry-run")
    assert code == 0
    assert "restart of n1: would be done (dry run: nothing is changed)" in out
    assert "starting as primary" in out
    code, out, err = unchanged(world, agent, "reinit", "n2", "--dry-run")
    assert (code, "n2 cannot say what it would do" in err) == (5, True), "its agent does not run here"


def test_a_member_that_does_not_answer(world: World) -> None:
    world.load("steady")
    world.agent_at("n1", ("127.0.0.1", 1))
    code, _, err = world.ctl("switchover", "--candidate", "n2", "--dry-run")
    assert (code, "n1 cannot say what it would do" in err) == (5, True)


def test_an_agent_of_another_make(world: World, start_agent: Any) -> None:
    class Other:
        headers: dict[str, str] = {}

        def quick(self, _key: bytes, *, keep_alive: bool) -> None: ...

        def has_places(self, number: int) -> None: ...

        def refuses(self, _request: Any) -> None: ...

        async def handle(self, _request: Any) -> Any:
            from pgha.rest.wire import text_response

            return text_response(501, "unsupported method")

    world.load("steady")
    world.agent_at("n1", start_agent(Other()))
    code, _, err = world.ctl("switchover", "--candidate", "n2", "--dry-run")
    assert (code, "n1 does not say what it would do: status 501" in err) == (3, True), err


def test_remove(world: World, agent: Agent) -> None:
    code, out, _ = unchanged(world, agent, "remove", "--dry-run")
    assert code == 0
    assert "would be done, once three questions are answered" in out
    assert f"keys below {world.root} in one step, if n1 still leads then" in out


def test_edit_config(world: World, agent: Agent) -> None:
    code, out, _ = unchanged(world, agent, "edit-config", "-s", "ttl=40", "--dry-run")
    assert (code, "+ttl = 40" in out, "Configuration changed" in out) == (0, True, False)
    assert "nothing is changed" in out
    code, out, err = unchanged(world, agent, "edit-config", "-s", "ttl=1", "--dry-run")
    assert (code, "ttl" in err) == (2, True), "as it would end"


def test_the_recorded_pass_is_of_now() -> None:
    """(The helper above.)"""
    seen = Agent().board.current().observation
    assert seen is not None
    assert seen.now != AT
    assert json.dumps(seen.number)
