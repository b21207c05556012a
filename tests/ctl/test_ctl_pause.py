"""`ctl pause`, `ctl resume`, and a failover from a paused lock whose holder is down."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Mapping
from typing import Any

import pytest
from ctl_world import World
from test_ctl_changing import Loop, app_of

from pgha.rest.requests import Answer

pytestmark = pytest.mark.etcd


class Agents(Loop):
    """Carries the configuration out in the store; every member says `pause` a moment after it was written, except `deaf`."""

    def __init__(self, world: World, *, deaf: str = "", answer: Answer | None = None) -> None:
        super().__init__(world)
        self.deaf, self.answer = deaf, answer
        self.members = {name: json.loads(world.get(f"members/{name}")) for name in ("n1", "n2", "n3")}

    async def submit(self, kind: str, payload: Mapping[str, Any], *, deadline_s: float) -> Answer:
        self.asked.append((kind, dict(payload)))
        if self.answer is not None:
            return self.answer
        config = {**json.loads(self.world.get("config")), **payload}
        self.world.put("config", {k: v for k, v in config.items() if v is not None})
        self.telling = threading.Timer(0.4, self.tell, [payload["pause"]])
        self.telling.start()
        return Answer(status=200, text="{}", json=True)

    def tell(self, pause: Any) -> None:
        for name in self.members:
            if name != self.deaf:
                value = json.loads(self.world.get(f"members/{name}")) | {"pause": True}
                self.world.put(f"members/{name}", value if pause else {k: v for k, v in value.items() if k != "pause"}, leased=True)


@pytest.mark.parametrize(("when", "command", "pause", "word"), [("steady", "pause", True, "paused"), ("paused", "resume", None, "resumed")])
@pytest.mark.parametrize("wait", [(), ("--wait",)])
def test_it_is_asked_of_the_leader_and_waited_for_if_wanted(  # noqa: PLR0917  (the columns of the table)
        world: World, start_agent: Any, when: str, command: str, pause: Any, word: str, wait: tuple[str, ...]) -> None:
    world.load(when)
    agents = Agents(world)
    world.agent_at("n1", start_agent(app_of(agents)))
    began_s = time.monotonic()
    code, out, _ = world.ctl(command, *wait)
    assert code == 0
    assert agents.asked == [("patch_config", {"pause": pause})]
    asked = f"'{command}' request sent, waiting until it is recognized by all nodes\n" if wait else ""
    assert out == f"{asked}Success: cluster management is {word}\n"
    assert (time.monotonic() - began_s > 0.4) is bool(wait)
    agents.telling.join()


@pytest.mark.parametrize(("when", "command", "text"), [("paused", "pause", "Cluster is already paused"), ("steady", "resume", "Cluster is not paused")])
def test_what_is_so_already_is_refused(world: World, when: str, command: str, text: str) -> None:
    world.load(when)
    assert world.ctl(command)[::2] == (3, f"pgha: {text}\n")


def test_an_agents_refusal_is_told(world: World, start_agent: Any) -> None:
    world.load("steady")
    world.agent_at("n1", start_agent(app_of(Agents(world, answer=Answer(status=503, text="the configuration could not be written")))))
    code, out, err = world.ctl("pause", "--wait")
    assert (code, out) == (1, "")
    assert "Failed: pause cluster management status code=503, (the configuration could not be written)" in err
    world.agent_at("n1", start_agent(app_of(Agents(world, answer=Answer(status=503, text="the configuration could not be written; it may still happen")))))
    assert world.ctl("pause")[0] == 4


def test_a_member_that_does_not_say_so_is_named(world: World, start_agent: Any) -> None:
    world.load("steady")
    world.put("config", {"ttl": 1, "loop_wait": 0.25})
    world.agent_at("n1", start_agent(app_of(Agents(world, deaf="n3"))))
    code, _, err = world.ctl("pause", "--wait")
    assert code == 4
    assert "not recognized within 2.5 s by n3;" in err


def test_without_an_agent_it_is_written_to_the_store(world: World) -> None:
    recorded = world.load("steady")
    before = json.loads(recorded["etcd"]["/service/bench/config"]["value"])
    for name in ("n1", "n2", "n3"):
        world.agent_at(name, ("127.0.0.1", 1))
    code, out, err = world.ctl("pause")
    assert (code, out) == (0, "Success: cluster management is paused\n")
    assert "writing the configuration to the store" in err
    assert json.loads(world.get("config")) == before | {"pause": True}
    assert world.ctl("resume")[0] == 0
    assert json.loads(world.get("config")) == before


LOCK = {"holder": "n1", "node_id": "i", "incarnation": "r", "sequence": 7, "ttl_s": 30.0, "mode": "paused", "lsn": 1, "timeline": 2}


def test_a_holder_that_is_down_is_stated_of_the_record_that_stands(world: World) -> None:
    """No agent answers, so it stands in the key; with one, the agent writes the same."""
    world.load("paused")
    world.put("pgha/lock", LOCK)
    world.put("leader", b"n1")      # without a lease, as pgha's holder has it in pause
    for name in ("n1", "n2", "n3"):
        world.agent_at(name, ("127.0.0.1", 1))
    written: list[Any] = []

    def carry_out() -> None:
        while not written:
            value = json.loads(world.get("failover"))
            if value:
                written.append(value)
        world.put("pgha/lock", LOCK | {"holder": "n2", "mode": "held"})

    thread = threading.Thread(target=carry_out)
    thread.start()
    code, out, _ = world.ctl("failover", "--candidate", "n2", "--holder-is-down", "--force")
    thread.join()
    assert code == 0, out
    assert written == [{"member": "n2", "pgha": {"holder_is_down": {"holder": "n1", "incarnation": "r", "sequence": 7}}}]


@pytest.mark.parametrize("lock", [None, LOCK | {"mode": "held"}, "nonsense"])
def test_a_lock_that_expires_by_itself_needs_no_statement(world: World, lock: Any) -> None:
    world.load("paused")
    if lock is not None:
        world.put("pgha/lock", lock)
    code, _, err = world.ctl("failover", "--candidate", "n2", "--holder-is-down", "--force")
    assert code == 3
    assert "any other expires by itself" in err
