"""The leader key as clients of etcd's version 2 read it: who leads, but nobody who is not known to."""

from __future__ import annotations

import json
from typing import Any

import pytest
import trio
from rest_world import NOW, app_for, ask, published, serving

from pgha.rest.published import nothing_yet

LEADER = "/v2/keys/service/bench/leader"
AS_VIP_MANAGER = f"{LEADER}?quorum=true&recursive=false&sorted=false"
ELSEWHERE = {"leader": b"n3"}


@pytest.mark.parametrize(("world", "path", "after_s", "says"), [
    pytest.param({}, AS_VIP_MANAGER, 0, "n1", id="the leader names itself"),
    pytest.param({"primary": False}, AS_VIP_MANAGER, 0, "n1", id="a replica names the leader"),
    pytest.param({"primary": False, **ELSEWHERE}, AS_VIP_MANAGER, 0, "n3", id="another leader"),
    pytest.param({"ttl_s": 5.0}, AS_VIP_MANAGER, 4.9, "n1", id="the licence's last moment"),
    pytest.param({"ttl_s": 5.0}, AS_VIP_MANAGER, 5.1, 404, id="the licence is over and nothing new is published"),
    pytest.param({"primary": False, "ttl_s": 5.0}, AS_VIP_MANAGER, 10.1, 503, id="a replica whose loop stands still"),
    pytest.param({"held": False}, AS_VIP_MANAGER, 0, 404, id="the key names this node, which does not hold the lock"),
    pytest.param({"primary": False, "leader": None}, AS_VIP_MANAGER, 0, 404, id="nobody leads"),
    pytest.param({"seen": False, "primary": False}, AS_VIP_MANAGER, 0, 503, id="the store has not been seen"),
    pytest.param({"ttl_s": 5.0, "by_failsafe": True}, AS_VIP_MANAGER, 0, "n1", id="the leader by failsafe, the store being away"),
    pytest.param({}, "/v2/keys/service/other/leader", 0, 404, id="another cluster"),
    pytest.param({}, "/v2/keys/service/bench/members/n1", 0, 404, id="another key"),
    pytest.param({}, "/v2/keys/", 0, 404, id="all keys"),
    pytest.param({}, "/v2/machines/service/bench/leader", 0, 404, id="not of keys"),
])
def test_who_leads_is_said_as_etcd_says_it(world: dict[str, Any], path: str, after_s: float, says: str | int) -> None:
    async def main() -> None:
        app, _, _, clock = app_for(published(**world))
        clock.go_on(after_s)
        async with serving(app) as address:
            status, body = await ask(address, "GET", path)
        got = json.loads(body)
        if isinstance(says, int):
            assert status == says
            assert got["errorCode"] == {404: 100, 503: 300}[says]
        else:
            assert status == 200
            assert got["action"] == "get"
            assert got["node"] == {"key": "/service/bench/leader", "value": says, "modifiedIndex": 9, "createdIndex": 9}

    trio.run(main)


def test_before_the_first_pass_nothing_is_known() -> None:
    async def main() -> None:
        app, *_ = app_for(nothing_yet(name="n1", scope="bench", at=NOW, wall_s=0.0))
        async with serving(app) as address:
            assert (await ask(address, "GET", LEADER))[0] == 503

    trio.run(main)
