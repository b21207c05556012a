"""POST /failsafe and what failsafe mode shows: the reference's answers (compatibility spec 3.3 to 3.5, 13; golden)."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
import trio
from rest_world import NOW, Inbox, app_for, ask, golden, golden_answer, published, serving

from pgha.model.failsafe import Ping, Promise
from pgha.rest.access import Access, resolve_allowlist
from pgha.rest.requests import Answer
from pgha.rest.wire import Request

PATRONIS = {"name": "n1", "conn_url": "postgres://127.0.66.11:5432/postgres", "api_url": "http://127.0.66.11:8008/patroni", "slots": {"n2": 67837640, "n3": None}}
OURS = {**PATRONIS, "pgha": {"to": "n2", "epoch": 4, "incarnation": "run", "sequence": 9, "ttl_s": 5.0}}
GIVEN = Promise(name="n1", accepted_at=NOW, ttl_s=30.0)
FAILSAFE = golden("failsafe-on")["etcd"]


def request(body: Any, **changes: Any) -> Request:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return msgspec.structs.replace(Request(method="POST", path="/failsafe", query={}, headers={"content-length": str(len(data))}, body=data, peer="127.0.0.1"), **changes)


def asked(body: Any, answer: Answer, *, access: Access | None = None, **changes: Any) -> tuple[Any, Inbox]:
    async def main() -> tuple[Any, Inbox]:
        app, _, inbox, _ = app_for(published(primary=False), access=access)
        inbox.answers["failsafe"] = answer
        return await app.handle(request(body, **changes)), inbox
    return trio.run(main)


ACCEPTED = Answer(status=200, text="Accepted")


@pytest.mark.parametrize(("body", "ping"), [
    (PATRONIS, Ping(name="n1", conn_url=PATRONIS["conn_url"], api_url=PATRONIS["api_url"], slots={"n2": 67837640})),
    (OURS, Ping(name="n1", conn_url=PATRONIS["conn_url"], api_url=PATRONIS["api_url"], slots={"n2": 67837640}, to="n2", epoch=4, incarnation="run", sequence=9, ttl_s=5.0)),
    ({"name": "n1", "slots": None}, Ping(name="n1")),
    ({**PATRONIS, "more": 1, "pgha": {"more": 1}}, Ping(name="n1", conn_url=PATRONIS["conn_url"], api_url=PATRONIS["api_url"], slots={"n2": 67837640})),
])
def test_a_ping_is_handed_on_whole_and_answered_with_the_position(body: Any, ping: Ping) -> None:
    response, inbox = asked(body, ACCEPTED)
    assert (response.status, response.body, dict(response.headers)["lsn"]) == (200, b"Accepted", "67837408")
    assert inbox.pings == [ping]


@pytest.mark.parametrize("answer", [Answer(status=500, text="Running as a leader"), Answer(status=502, text="failsafe mode is off"), Answer(status=409, text="no")])
def test_a_refusal_says_no_position(answer: Answer) -> None:
    response, _ = asked(OURS, answer)
    assert (response.status, response.body.decode(), "lsn" in dict(response.headers)) == (answer.status, answer.text, False)


@pytest.mark.parametrize(("body", "status"), [
    ({}, 400), ([], 400), (b"nonsense", 400), ({"conn_url": "x"}, 400), ({"name": 5}, 400), ({"name": "n1", "slots": [1]}, 400), ({"name": "n1", "pgha": 5}, 400),
    *[({**PATRONIS, "pgha": {**OURS["pgha"], key: value}}, 400) for key, value in (
        ("epoch", "4"), ("epoch", 4.5), ("epoch", True), ("ttl_s", "5"), ("sequence", None), ("sequence", 1 << 70), ("to", 5), ("incarnation", [1]))],
    (b'{"name": "n1", "pgha": {"ttl_s": NaN}}', 400), (b'{"name": "n1", "pgha": {"ttl_s": Infinity}}', 400), (b'{"name": "n1", "pgha": {"ttl_s": 1e999}}', 400),
])
def test_half_a_ping_is_none(body: Any, status: int) -> None:
    response, inbox = asked(body, ACCEPTED)
    assert (response.status, inbox.pings) == (status, [])


def test_a_ping_without_a_body() -> None:
    assert asked(b"", ACCEPTED, headers={})[0].status == 411


def test_the_allowlist_holds_for_it_and_members_are_not_in_it_by_themselves() -> None:
    async def networks() -> Any:
        return await resolve_allowlist(["10.0.0.0/8"])
    access = Access(networks=trio.run(networks))
    assert asked(OURS, ACCEPTED, access=access)[0].status == 403
    assert asked(OURS, ACCEPTED, access=access, peer="10.1.2.3")[0].status == 200
    response, inbox = asked(OURS, ACCEPTED, access=Access(username="u", password="p"))
    assert (response.status, inbox.pings) == (401, [])


def test_it_is_served() -> None:
    async def main() -> None:
        app, _, inbox, _ = app_for(published(primary=False))
        inbox.answers["failsafe"] = ACCEPTED
        async with serving(app) as address:
            assert await ask(address, "POST", "/failsafe", OURS) == (200, b"Accepted")
            assert (await ask(address, "PUT", "/failsafe", OURS))[0] == 501
    trio.run(main)


@pytest.mark.parametrize(("primary", "how"), [(True, {"by_failsafe": True}), (False, {"promise": GIVEN})])
def test_both_sides_show_it(primary: bool, how: dict[str, Any]) -> None:
    async def main() -> None:
        for active in (True, False):
            app, *_ = app_for(published(primary=primary, etcd=FAILSAFE, seen_lock_s_ago=100, **(how if active else {})))
            body = json.loads((await app.handle(_get("/patroni"))).body)
            assert body.get("failsafe_mode_is_active", False) is active
            metrics = (await app.handle(_get("/metrics"))).body.decode()
            assert f'patroni_failsafe_mode_is_active{{scope="bench",name="{"n1" if primary else "n2"}"}} {int(active)}' in metrics
            recorded = golden_answer("failsafe-on", "primary" if primary else "replica", "GET /failsafe")
            response = await app.handle(_get("/failsafe"))
            assert (response.status, json.loads(response.body)) == (recorded["status"], recorded["body"])
    trio.run(main)


def test_a_cluster_that_is_led_by_failsafe_is_not_unlocked() -> None:
    async def main() -> None:
        for promise in (GIVEN, None):
            app, *_ = app_for(published(primary=False, promise=promise, seen=False))
            body = json.loads((await app.handle(_get("/patroni"))).body)
            assert body.get("cluster_unlocked", False) is (promise is None)
    trio.run(main)


def _get(path: str) -> Request:
    return Request(method="GET", path=path, query={}, headers={}, body=b"", peer="127.0.0.1")
