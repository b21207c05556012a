"""`ctl reinit`: asked of replicas only, by name; with --wait until PostgreSQL runs on the copy."""

from __future__ import annotations

import json
from typing import Any

import pytest
from ctl_world import World
from rest_world import app_for, published
from test_ctl_changing import on_a_terminal

from pgha.ctl.cluster import read
from pgha.ctl.ends import UNKNOWN
from pgha.ctl.reinit import State, wait_for
from pgha.ctl.settings import load
from pgha.rest.routes import App
from pgha.rest.wire import Request, Response, json_response, text_response

pytestmark = pytest.mark.etcd

BEFORE, AFTER = "2026-01-01 10:00:00.000000+00:00", "2026-01-01 10:05:00.000000+00:00"


class Agent(App):
    """An agent as the reference's for what reinit asks. `answers`: to POST /reinitialize, the last one again and again;
    `states`: what GET /patroni says, likewise."""

    def __init__(self, *answers: tuple[int, str], states: tuple[tuple[Any, ...], ...] = (("running", BEFORE),)) -> None:
        app, board, inbox, clock = app_for(published(primary=False))
        del app
        super().__init__(board, inbox, clock=clock)
        self.answers, self.states = list(answers), list(states)
        self.asked: list[Any] = []

    def quick(self, key: bytes, *, keep_alive: bool) -> bytes | None:
        del key, keep_alive
        return None

    def has_places(self, number: int) -> None: ...

    def refuses(self, request: Request) -> Response | None:
        del request
        return None

    async def handle(self, request: Request) -> Response:
        if request.method == "GET":
            state, started_at, *own = self.states.pop(0) if len(self.states) > 1 else self.states[0]
            told = {"pgha": {"reinitialize": own[0]} if own[0] else {}} if own else {}
            return json_response({"state": state, **({"postmaster_start_time": started_at} if started_at else {}), **told})
        self.asked.append((request.path, json.loads(request.body)))
        return text_response(*(self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]))


STARTED = (200, "reinitialize started")


def test_a_replica_is_reinitialised(world: World, start_agent: Any) -> None:
    world.load("steady")
    agent = Agent(STARTED)
    world.agent_at("n2", start_agent(agent))
    code, out, err = world.ctl("reinit", "bench", "n2", "--force")
    assert (code, err) == (0, "")
    assert out.startswith("+ Cluster: bench ")
    assert out.endswith("+\nSuccess: reinitialize for member n2\n")
    assert agent.asked == [("/reinitialize", {"force": True})]
    assert world.ctl("reinit", "n2", "--force", "--from-leader")[0] == 0
    assert agent.asked[1:] == [("/reinitialize", {"force": True, "from_leader": True})]
    code, out, _ = world.ctl("reinit", "n2", "n3", "n2", "--force")
    assert (code, out.count("Success: ")) == (1, 1), "n2 once, and n3 cannot be reached"
    assert len(agent.asked) == 3


def test_waiting_ends_when_postgresql_runs_on_the_copy(world: World, start_agent: Any) -> None:
    """Also when the agent has not begun yet, and the old server is what runs."""
    world.load("steady")
    for name, states in (("n2", (("running", BEFORE), ("running", BEFORE), ("stopping", ""), ("creating replica", ""), ("starting", ""), ("running", AFTER))),
                         ("n3", (("running", BEFORE), ("creating replica", ""), ("running", AFTER)))):
        world.agent_at(name, start_agent(Agent(STARTED, states=states)))
    code, out, err = world.ctl("reinit", "n2", "n3", "--force", "--wait")
    assert (code, err) == (0, "")
    assert out.partition("+\nSuccess")[2] == (": reinitialize for member n2\nSuccess: reinitialize for member n3\n"
                                              "Waiting for reinitialize to complete on: n2, n3\nReinitialize is completed on: n3\n"
                                              "Waiting for reinitialize to complete on: n2\nReinitialize is completed on: n2\n")


NOTHING: dict[str, Any] = {}
LAST, BEGUN = {"request": 3, "state": "done"}, {"request": 4, "state": "running"}


@pytest.mark.parametrize(("states", "code", "says"), [
    # What the server does says nothing: before it is stopped, and when the copy has failed, the old one runs.
    ([("running", BEFORE, LAST), ("running", BEFORE, BEGUN), ("stopped", "", BEGUN), ("stopped", "", {**BEGUN, "state": "done"}), ("running", AFTER, {**BEGUN, "state": "done"})], 0,
     "Reinitialize is completed on: n2"),
    ([("running", BEFORE, NOTHING), ("creating replica", "", BEGUN), ("running", AFTER, {**BEGUN, "state": "failed", "why": "not enough space"})], 1,
     "Failed: reinitialize for member n2: not enough space; its data is as before"),
    ([("running", BEFORE, NOTHING), ("creating replica", "", BEGUN), ("", ""), ("running", AFTER, NOTHING)], 4, "its agent was started again"),
    ([("running", BEFORE, LAST), ("running", AFTER, LAST)], 4, "its agent was started again"),
])
def test_an_agent_of_pgha_says_itself_what_became_of_it(world: World, start_agent: Any, states: list[tuple[Any, ...]], code: int, says: str) -> None:
    world.load("steady")
    world.agent_at("n2", start_agent(Agent(STARTED, states=tuple(states))))
    got, out, err = world.ctl("reinit", "n2", "--force", "--wait")
    assert got == code
    assert says in (out if code == 0 else err)


@pytest.mark.parametrize(("before", "now", "copied", "anew"), [
    (State("running", BEFORE), State("running", AFTER), False, True),
    (State("running", BEFORE), State("running", BEFORE), False, False),
    (State("running", BEFORE), State("starting", AFTER), True, False),
    (State("start failed"), State("running", AFTER), False, True),
    (State(), State("running", AFTER), False, False),                # nobody knows what ran before
    (State("unknown"), State("running", AFTER), False, False),
    (State(), State("running", AFTER), True, True),
    (State(), State("running"), True, False),                        # it does not answer SQL
])
def test_what_is_a_server_anew(before: State, now: State, copied: bool, anew: bool) -> None:  # noqa: FBT001  (the columns of the table)
    assert now.is_anew(before, copied=copied) is anew


@pytest.mark.parametrize("states", [("running", BEFORE), ("stopped", ""), ("", "")])
def test_when_nothing_happens_any_more_the_outcome_is_unknown(world: World, start_agent: Any, states: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    world.load("steady")
    world.agent_at("n2", start_agent(Agent(STARTED, states=(states,))))
    world.write_config()
    settings = load(config_file=str(world.config), scope=None, dcs_url=None, environ={})
    assert wait_for(settings, read(settings), ["n2"], {"n2": State("running", BEFORE)}, quiet_s=0.7) == {"n2": UNKNOWN}
    assert "n2: for 0.7 s it " in capsys.readouterr().err


def test_an_action_in_progress_is_cancelled_only_if_somebody_says_so(world: World, start_agent: Any) -> None:
    world.load("steady")
    agent = Agent((503, "reinitialize already in progress"), STARTED)
    world.agent_at("n2", start_agent(agent))
    assert world.ctl("reinit", "n2")[::2] == (2, "pgha: this asks before it does anything, and there is no terminal to ask on; allowed: --force\n")
    code, _, err = world.ctl("reinit", "n2", "--force")
    assert (code, err) == (3, "pgha: Failed: reinitialize for member n2, status code=503, (reinitialize already in progress)\n")
    assert agent.asked == [("/reinitialize", {"force": True})]


def test_the_end_of_the_terminal_is_no_and_not_that_nothing_was_changed(world: World, start_agent: Any) -> None:
    """Ctrl-D at a question that comes when the member before was told already."""
    world.load("steady")
    done, busy = Agent(STARTED), Agent((503, "reinitialize already in progress"))
    world.agent_at("n2", start_agent(done))
    world.agent_at("n3", start_agent(busy))
    code, out, err = on_a_terminal(world, b"y\n\x04", "reinit", "n2", "n3")
    assert code == 1, err
    assert "Success: reinitialize for member n2" in out
    assert "Do you want to cancel it and reinitialize anyway? [y/N]: " in err
    assert "nothing was changed" not in err
    assert busy.asked == [("/reinitialize", {"force": False})]


@pytest.mark.parametrize(("arguments", "code", "err"), [
    (["nobody", "--force"], 3, "No replica among provided members; there are n2, n3"),
    (["n1", "--force"], 3, "No replica among provided members; there are n2, n3"),
    (["n2", "nobody", "--force"], 2, "no such member: nobody"),
    (["--force"], 2, "which member? There are n2, n3"),
    ([], 2, "there is no terminal to ask on"),
    (["n2", "--force"], 5, "Failed: reinitialize for member n2: http://127.0.0.1:1: Connection refused"),
    (["n3", "--force"], 3, "Failed: reinitialize for member n3, status code=503, (can not reinitialize: pg_control cannot be read)"),
    (["n3", "n2", "n1", "--force"], 3, "n1 is the leader, and is left out"),
])
def test_what_is_not_done_is_said(world: World, start_agent: Any, arguments: list[str], code: int, err: str) -> None:
    world.load("steady")
    world.agent_at("n2", ("127.0.0.1", 1))
    world.agent_at("n3", start_agent(Agent((503, "can not reinitialize: pg_control cannot be read"))))
    got, _, errors = world.ctl("reinit", *arguments)
    assert got == code
    assert err in errors
