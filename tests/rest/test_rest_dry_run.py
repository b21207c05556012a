"""POST /pgha/dry-run/…: the judgement of the very rules, asked by whom may ask for the command itself; nothing is handed to the loop."""

from __future__ import annotations

import json
from typing import Any

import pytest
import trio
import trio.testing
from rest_world import NOW, ClockAt, Inbox, app_for, published, replaced

from pgha.model.observation import Peer
from pgha.rest.access import Access
from pgha.rest.routes import App
from pgha.rest.wire import Request


def run(function: Any, *args: Any) -> Any:
    return trio.run(function, *args)


async def post(app: Any, command: str, body: Any = None) -> tuple[int, Any]:
    data = b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {} if body is None else {"content-length": str(len(data))}
    response = await app.handle(Request(method="POST", path=f"/pgha/dry-run/{command}", body=data, headers=headers))
    try:
        return response.status, json.loads(response.body)
    except ValueError:
        return response.status, response.body.decode()


def app_and_inbox(value: Any, **peers: dict[str, Any]) -> tuple[App, Inbox]:
    app, _, inbox, _ = app_for(value)
    inbox.peers = {name: Peer(**{"name": name, "asked_at": NOW, "answered": True, "is_pgha": True, "in_recovery": True, "timeline": 2, "lsn": 67837408, "running": True, **facts})
                   for name, facts in {"n2": {}, "n3": {}, **peers}.items()}
    return app, inbox


def test_a_switchover_that_would_be_done() -> None:
    async def main() -> None:
        app, inbox = app_and_inbox(published())
        status, said = await post(app, "switchover", {"leader": "n1", "candidate": "n2"})
        assert (status, said["would"], said["refused_by"], said["node"]) == (200, True, [], "n1")
        assert [step["step"] for step in said["steps"]][:2] == ["checkpoint", "demote"]
        assert inbox.asked == [], "nothing was handed to the loop"
        assert inbox.woken == [("observation asked", -1)], "judged by a pass of now"

    run(main)


REFUSED = [
    ("it lags", "switchover", {"leader": "n1", "candidate": "n2"}, {"n2": {"lsn": 1}}, {}, "switchover.has_good_candidate", "lag 64.7 MiB, limit 1.0 MiB"),
    ("unknown, by all that know it", "switchover", {"leader": "n1", "candidate": "n9"}, {}, {}, "request", "candidate does not exists"),
    ("unknown, by the rules, too", "switchover", {"leader": "n1", "candidate": "n9"}, {}, {}, "switchover.has_good_candidate", "is no member"),
    ("another leads", "switchover", {"leader": "n3", "candidate": "n2"}, {}, {}, "request", "leader name does not match"),
    ("pause", "switchover", {"leader": "n1", "scheduled_at": "2099-01-01T00:00:00+00:00"}, {}, {"pause": True}, "request", "Can't schedule switchover in the paused state"),
    ("the holder is not down", "failover", {"candidate": "n2", "pgha": {"holder_is_down": True}}, {}, {}, "request", "any other expires by itself"),
    ("a restart's conditions", "restart", {"role": "replica"}, {}, {}, "asked.has_role", "asked of a replica, this is a primary"),
    ("a leader", "reinitialize", {}, {}, {}, "reinit.is_not_leader", "n1 holds the lock"),
]


@pytest.mark.parametrize("row", REFUSED, ids=lambda row: row[0])
def test_what_would_be_refused_is_a_judgement(row: Any) -> None:
    async def main() -> None:
        _, command, body, peers, changed, rule, because = row
        app, inbox = app_and_inbox(published(**changed), **peers)
        status, said = await post(app, command, body)
        assert (status, said["would"], said["steps"]) == (200, False, [])
        assert any(r["rule"] == rule and because in r["because"] for r in said["refused_by"]), said["refused_by"]
        assert inbox.asked == []

    run(main)


NO_REQUESTS: list[tuple[str, Any, int, str]] = [
    ("switchover", {"candidate": "n2"}, 400, "only from a specific leader"),
    ("switchover", b"{", 400, "not JSON"),
    ("switchover", None, 411, "no body"),
    ("failover", {"leader": ""}, 400, "only to a specific candidate"),
    ("restart", {"when": "now"}, 400, "Unknown filter: when"),
    ("remove", {}, 404, "allowed: /pgha/dry-run/ and one of switchover"),
    ("", {}, 404, "not known"),
]


@pytest.mark.parametrize(("command", "body", "status", "text"), NO_REQUESTS)
def test_what_is_no_request_is_answered_as_the_command_answers_it(command: str, body: Any, status: int, text: str) -> None:
    async def main() -> None:
        app, inbox = app_and_inbox(published())
        assert (await post(app, command, body))[0] == status
        assert text in str((await post(app, command, body))[1])
        assert inbox.asked == []

    run(main)


def test_a_restart_and_a_scheduled_one() -> None:
    async def main() -> None:
        app, inbox = app_and_inbox(published())
        status, said = await post(app, "restart", {})
        assert (status, said["would"], said["steps"][-1]["step"]) == (200, True, "start")
        status, said = await post(app, "restart", {"schedule": "2099-01-01T00:00:00+00:00"})
        assert (status, said["would"], [step["step"] for step in said["steps"]]) == (200, True, ["schedule"])
        status, said = await post(app, "switchover", {"leader": "n1", "scheduled_at": "2099-01-01T00:00:00+00:00"})
        assert (status, said["would"], said["steps"][0]["who"]) == (200, True, "n1")
        assert inbox.asked == []

    run(main)


def test_only_whoever_may_change_something_may_ask() -> None:
    async def main() -> None:
        value = published()
        app, inbox = app_and_inbox(value)
        app.access = Access(username="u", password="p")
        status, _ = await post(app, "switchover", {"leader": "n1", "candidate": "n2"})
        assert status == 401
        assert inbox.woken == []

    run(main)


def test_a_get_is_none_and_before_the_first_pass_nothing_is_known() -> None:
    async def main() -> None:
        app, _ = app_and_inbox(published())
        assert (await app.handle(Request(method="GET", path="/pgha/dry-run/switchover"))).status == 404
        app, _ = app_and_inbox(replaced(published(), observation=None))
        with trio.move_on_after(5):
            assert (await post(app, "restart", {}))[0] == 503

    run(main)


def test_a_fresh_observation_waits_for_a_pass_of_now() -> None:
    async def main() -> None:
        value = published()
        app, inbox = app_and_inbox(value)
        clock = app.clock
        assert isinstance(clock, ClockAt)
        clock.go_on(8.0)
        answers: list[Any] = []

        async def ask() -> None:
            answers.append(json.loads((await app.handle(Request(method="GET", path="/pgha/observation", query={"fresh": "1"}))).content))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask)
            await trio.testing.wait_all_tasks_blocked()
            assert (answers, inbox.woken) == ([], [("observation asked", -1)])
            seen = replaced(value.observation, now=clock.now(), number=7, postgres=replaced(value.observation.postgres, row_at=clock.now()))
            app.board.publish(replaced(value, at=clock.now(), observation=seen))
        assert (answers[0]["observation"]["number"], answers[0]["age_s"]) == (7, 0.0)
        stale = json.loads((await app.handle(Request(method="GET", path="/pgha/observation"))).content)
        assert stale["observation"]["number"] == 7

    run(main)


def test_an_observation_shows_no_secret_of_the_shared_configuration() -> None:
    async def main() -> None:
        value = published()
        settings = replaced(value.observation.settings, dynamic_config=b'{"ttl":30,"standby_cluster":{"password":"geheim"}}')
        app, _ = app_and_inbox(replaced(value, observation=replaced(value.observation, settings=settings)))
        body = (await app.handle(Request(method="GET", path="/pgha/observation"))).content
        import base64

        shown = base64.b64decode(json.loads(body)["observation"]["settings"]["dynamic_config"])
        assert json.loads(shown) == {"ttl": 30, "standby_cluster": {"password": "***"}}

    run(main)
