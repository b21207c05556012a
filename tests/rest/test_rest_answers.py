"""What the API says, compared with recordings of the reference; and that it stays true when the loop is stuck."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
import trio
import trio.testing
from rest_world import (
    NOW,
    app_for,
    ask,
    body_of,
    golden,
    golden_answer,
    published,
    replaced,
    replica_row,
    serving,
    shape,
    status_of,
    talk,
)

from pgha.clock import Instant
from pgha.events import EventLog
from pgha.model.decision import Memory, Reason, Vote
from pgha.model.lock import LockRecord
from pgha.model.request import Reinitialisation, ReinitialisationEnd, ScheduledRestart
from pgha.replay import Pass
from pgha.rest.access import Access, resolve_allowlist
from pgha.rest.published import Board, nothing_yet
from pgha.rest.redaction import redact
from pgha.rest.requests import Answer
from pgha.rest.stream import Readers
from pgha.rest.wire import Request


async def get(app: Any, path: str, **query: str) -> Any:
    return await app.handle(Request(method="GET", path=path, query=query))


def run(function: Any, *args: Any) -> Any:
    return trio.run(function, *args)


@pytest.mark.parametrize("which", ["primary", "replica"])
def test_every_recorded_get_has_the_same_status_and_shape(which: str) -> None:
    async def main() -> None:
        app, *_ = app_for(published(primary=which == "primary"))
        async with serving(app) as address:
            for recorded in golden("steady")[which]:
                method, _, target = recorded["request"].partition(" ")
                status, body = await ask(address, method, target)
                assert status == recorded["status"], recorded["request"]
                if isinstance(recorded["body"], (dict, list)):
                    got = json.loads(body)
                    if isinstance(got, dict):
                        got.pop("pgha", None)        # our own, last in the object
                    assert shape(got) == shape(recorded["body"]), recorded["request"]

    run(main)


def test_head_and_options_have_the_status_of_get_and_no_body() -> None:
    async def main() -> None:
        app, *_ = app_for(published())
        async with serving(app) as address:
            for recorded in golden("steady")["head"]:
                method, _, target = recorded["request"].partition(" ")
                answer = await talk(address, f"{method} {target} HTTP/1.0\r\n\r\n".encode())
                wanted = recorded["status"]
                if target in ("/liveness", "/readiness", "/patroni"):
                    wanted = 200             # the reference says 503 there whatever is so
                assert (status_of(answer), body_of(answer)) == (wanted, b""), recorded["request"]
            for target in ("/cluster", "/metrics", "/pgha/decision"):
                answer = await talk(address, f"HEAD {target} HTTP/1.0\r\n\r\n".encode())
                assert (status_of(answer), body_of(answer)) == (200, b"")

    run(main)


@pytest.mark.parametrize("when", ["synchronous", "quorum", "paused", "pending-restart", "scheduled-switchover", "failsafe-on"])
def test_cluster_and_patroni_have_the_recorded_shape_in_other_situations(when: str) -> None:
    async def main() -> None:
        etcd = golden(when)["etcd"]
        row = msgspec.structs.replace(replica_row(), pending_restart={"max_connections": ("60", "100")} if when != "scheduled-switchover" else {})
        app, *_ = app_for(published(primary=False, etcd=etcd, row=row, pause=when == "paused"))
        recorded = golden_answer(when, "replica", "GET /cluster")["body"]
        got = json.loads((await get(app, "/cluster")).body)
        assert shape(got) == shape(recorded)
        assert [(m["name"], m["role"], m["state"]) for m in got["members"]] == [(m["name"], m["role"], m["state"]) for m in recorded["members"]]
        assert {k: v for k, v in got.items() if k != "members"} == {k: v for k, v in recorded.items() if k != "members"}
        mine = json.loads((await get(app, "/patroni")).body)
        mine.pop("pgha")
        assert shape(mine) == shape(golden_answer(when, "replica", "GET /patroni")["body"])
        for path in ("/sync", "/quorum", "/async", "/read-only-sync", "/failsafe"):
            assert (await get(app, path)).status == golden_answer(when, "replica", f"GET {path}")["status"], path

    run(main)


def test_metrics_have_the_recorded_names_and_values() -> None:
    async def main() -> None:
        for which in ("primary", "replica"):
            app, *_ = app_for(published(primary=which == "primary"))
            text = (await get(app, "/metrics")).body.decode()
            recorded = golden_answer("steady", which, "GET /metrics")["body"]

            def samples(exposition: str) -> dict[str, float]:
                rows = (line.rsplit(" ", 1) for line in exposition.splitlines() if line and not line.startswith("#"))
                return {name: float(value) for name, value in rows if name.startswith("patroni_")}

            mine, theirs = samples(text), samples(recorded)
            assert list(mine) == list(theirs)
            differing = {name.partition("{")[0] for name in mine if abs(mine[name] - theirs[name]) > 1}
            # the recording is two passes later, and of the next release
            assert differing <= {"patroni_version", "patroni_xlog_replayed_timestamp"}, differing
            assert "# Values: 0=initdb, 1=initdb_failed" in text
            assert 'pgha_info{scope="bench",name=' in text

    run(main)


def test_the_primary_stops_being_one_when_its_licence_ends_though_nothing_is_published() -> None:
    async def main() -> None:
        app, _, _, clock = app_for(published(ttl_s=5.0))
        async with serving(app) as address:
            async def statuses() -> list[int]:
                # by the short way and, with a header that it does not take, by the long one
                short = [(await ask(address, "GET", path))[0] for path in ("/primary", "/leader", "/read-write", "/readiness", "/", "/read-only")]
                long = [(await ask(address, "GET", path, headers={"Upgrade": "x"}))[0] for path in ("/primary", "/leader", "/readiness")]
                return short + long

            assert set(await statuses()) == {200}
            clock.go_on(4.99)
            assert set(await statuses()) == {200}
            clock.go_on(0.02)
            assert set(await statuses()) == {503}
            assert (await ask(address, "GET", "/health"))[0] == 200
            assert (await ask(address, "GET", "/patroni"))[0] == 200

    run(main)


def test_liveness_ends_when_the_loop_has_been_silent_for_too_long() -> None:
    async def main() -> None:
        for primary, limit_s in ((True, 5.0), (False, 10.0)):
            app, board, _, clock = app_for(published(primary=primary, ttl_s=5.0))
            async with serving(app) as address:
                assert (await ask(address, "GET", "/liveness"))[0] == 200
                clock.go_on(limit_s - 0.01)
                assert (await ask(address, "GET", "/liveness"))[0] == 200
                clock.go_on(0.02)
                assert (await ask(address, "GET", "/liveness"))[0] == 503
                board.publish(replaced(published(primary=primary, ttl_s=5.0, number=2), alive_until=clock.now().plus_s(5)))
                assert (await ask(address, "GET", "/liveness"))[0] == 200

    run(main)


def test_a_server_that_does_not_answer_sql_shows_no_xlog_and_an_unknown_state() -> None:
    async def main() -> None:
        app, *_ = app_for(published(answer="silent"))
        body = json.loads((await get(app, "/patroni")).body)
        assert body["state"] == "unknown"
        assert body["role"] == "primary"
        assert "xlog" not in body
        assert (await get(app, "/health")).status == 503

    run(main)


def test_before_the_first_pass_everything_is_unavailable_and_nothing_fails() -> None:
    async def main() -> None:
        app, *_ = app_for(nothing_yet(name="n1", scope="bench", at=NOW, wall_s=0.0))
        wanted = {"/primary": 503, "/replica": 503, "/patroni": 200, "/cluster": 200, "/history": 200, "/config": 502, "/metrics": 200,
                  "/liveness": 200, "/readiness": 503, "/pgha/decision": 200, "/pgha/vote": 200, "/pgha/observation": 503, "/pgha/x": 404}
        for path, status in wanted.items():
            assert (await get(app, path)).status == status, path
        assert json.loads((await get(app, "/patroni")).body)["cluster_unlocked"] is True

    run(main)


def test_the_last_decision_with_its_reasons_is_shown() -> None:
    async def main() -> None:
        reasons = (Reason(rule="promotion.caught_up", holds=False, because="lag 46.7 MiB, limit 1.0 MiB"),)
        app, _, _, clock = app_for(published(primary=False, reasons=reasons))
        clock.go_on(3)
        body = json.loads((await get(app, "/pgha/decision")).content)
        assert body["node"] == "n2"
        assert body["age_s"] == 3.0
        assert body["reasons"] == [{"rule": "promotion.caught_up", "holds": False, "because": "lag 46.7 MiB, limit 1.0 MiB"}]
        assert body["ages_s"]["store_heard"] == 0.0

    run(main)


def test_an_unreadable_key_is_named_in_the_decision() -> None:
    async def main() -> None:
        app, *_ = app_for(published(members__n3=b"{broken", status=b"nonsense"))
        body = json.loads((await get(app, "/pgha/decision")).content)
        assert {p.partition(":")[0] for p in body["problems"]} == {"members/n3", "status"}
        cluster = json.loads((await get(app, "/cluster")).body)
        assert [m["name"] for m in cluster["members"]] == ["n1", "n2", "n3"]
        assert cluster["members"][1]["lag"] == "unknown"

    run(main)


def test_a_vote_is_awaited_up_to_the_wait_and_wakes_the_loop() -> None:
    async def main() -> None:
        app, board, inbox, _ = app_for(published(primary=False))
        got: list[Any] = []

        async def question() -> None:
            got.append(json.loads((await get(app, "/pgha/vote", epoch="7", wait="2")).body))

        with trio.fail_after(1.5):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(question)
                await trio.testing.wait_all_tasks_blocked()
                board.publish(published(primary=False, number=2))                     # not yet final
                await trio.testing.wait_all_tasks_blocked()
                assert not got
                board.publish(published(primary=False, number=3, vote=Vote(epoch=7, timeline=2, lsn=5)))
        assert inbox.woken == [("vote asked", 7)]
        assert (got[0]["epoch"], got[0]["timeline"], got[0]["lsn"], got[0]["name"]) == (7, 2, 5, "n2")
        assert (await get(app, "/pgha/vote", epoch="x")).status == 400
        assert json.loads((await get(app, "/pgha/vote", epoch="7", wait="2")).body)["epoch"] == 7
        assert len(inbox.woken) == 1          # a final vote needs no pass

    run(main)


def test_an_observation_serialises_without_secrets() -> None:
    async def main() -> None:
        row = msgspec.structs.replace(replica_row(), primary_conninfo="host=a user=r password=geheim application_name=n2")
        config = {"postgresql": {"authentication": {"superuser": {"password": "geheim"}}}, "ttl": 30}
        app, *_ = app_for(published(primary=False, row=row, config=config))
        response = await get(app, "/pgha/observation")
        assert response.status == 200
        assert b"geheim" not in response.content
        assert json.loads(response.content)["observation"]["dcs"]["view"]["config"]["ttl"] == 30
        assert redact({"api_token": "x", "a": ["postgres://u:pw@h/db"]}) == {"api_token": "***", "a": ["postgres://u:***@h/db"]}

    run(main)


def test_commands_are_shown_to_nobody_and_what_is_shown_can_be_replayed() -> None:
    async def main() -> None:
        row = msgspec.structs.replace(replica_row(), restore_command="KEY=geheim fetch %f %p", primary_conninfo="host=a password=geheim",
                                      pending_restart={"archive_command": ("KEY=geheim", "x"), "max_connections": ("100", "200")})
        config = {"postgresql": {"recovery_conf": {"restore_command": "geheim"}, "parameters": {"archive_command": "geheim"}}, "standby_cluster": {"restore_command": "geheim"}}
        reasons = (Reason(rule="x", holds=False, because="cannot connect with host=a password=geheim"),)
        app, *_ = app_for(published(primary=False, row=row, config=config, reasons=reasons))
        observation, decision = await get(app, "/pgha/observation"), await get(app, "/pgha/decision")
        for response in (observation, decision, await get(app, "/metrics"), await get(app, "/history"), await get(app, "/cluster")):
            assert b"geheim" not in response.content
        assert json.loads(decision.content)["reasons"][0]["because"] == "cannot connect with host=a password=***"
        shown = msgspec.json.decode(observation.content, type=Pass).observation.postgres.row
        assert shown is not None
        assert (shown.restore_command, shown.primary_conninfo) == ("***", "host=a password=***")       # that there is one decides something
        assert shown.pending_restart == {"archive_command": ("***", "***"), "max_connections": ("100", "200")}

    run(main)


@pytest.mark.parametrize(("lock", "seen_s_ago", "leader", "lease", "wanted"), [
    ({}, 0.0, b"n1", 0, "n1"),
    ({}, 5.0, b"n1", 0, "n1"),                 # a candidate waits a little longer than the ttl
    ({}, 5.1, b"n1", 0, ""),
    ({"mode": "released"}, 0.0, b"n1", 0, ""),
    ({"mode": "paused"}, 60.0, b"n1", 0, "n1"),
    ({}, 0.0, b"n3", 0, "n1"),                 # the record decides, not the plain key
    ({}, 0.0, None, 0, "n1"),
    (None, 0.0, b"n3", 0, ""),
    (None, 0.0, b"n3", 7, "n3"),               # no record, but a leased key: a cluster of another make
    ({"mode": "released"}, 0.0, b"n3", 7, "n3"),
    ({}, 60.0, b"n3", 7, "n3"),                # a mixed cluster: whoever has the leased key has taken over
])
def test_a_released_or_expired_lock_has_no_leader(lock: dict[str, Any] | None, seen_s_ago: float, leader: bytes | None, lease: int, wanted: str) -> None:
    async def main() -> None:
        record = LockRecord(**{"holder": "n1", "node_id": "a", "incarnation": "b", "sequence": 4, "ttl_s": 5.0, **(lock or {})})
        changed = {} if lock is None else {"pgha__lock": msgspec.to_builtins(record)}
        value = published(primary=False, seen_lock_s_ago=seen_s_ago, leader=None if leader is None else (leader, lease), **changed)
        app, *_ = app_for(value)
        members = json.loads((await get(app, "/cluster")).body)["members"]
        assert [m["name"] for m in members if m["role"] == "leader"] == ([wanted] if wanted else [])
        assert json.loads((await get(app, "/patroni")).body).get("cluster_unlocked", False) is (not wanted)

    run(main)


def test_what_is_published_of_a_pass_can_be_replayed() -> None:
    async def main() -> None:
        app, *_ = app_for(replaced(published(primary=False), memory=Memory(start_failures=2)))
        recorded = msgspec.json.decode((await get(app, "/pgha/observation")).content, type=Pass)
        assert recorded.memory.start_failures == 2
        assert recorded.observation == published(primary=False).observation

    run(main)


# --- requests that change something --------------------------------------------------------------------------------------

REFUSALS: list[tuple[str, str, Any, dict[str, Any], int, str]] = [
    ("POST", "/switchover", {}, {}, 400, ""),
    ("POST", "/switchover", [1], {}, 400, ""),
    ("POST", "/switchover", b"{", {}, 400, ""),
    ("POST", "/switchover", b"[" * 100_000, {}, 400, ""),
    ("POST", "/switchover", None, {}, 411, ""),
    ("POST", "/switchover", {"leader": 5}, {}, 400, ""),
    ("POST", "/switchover", {"candidate": "n2"}, {}, 400, "Switchover could be performed only from a specific leader"),
    ("POST", "/failover", {"x": 1}, {}, 400, "Failover could be performed only to a specific candidate"),
    ("POST", "/failover", {"candidate": "n2", "scheduled_at": "2099-01-01T00:00:00+00:00"}, {}, 400, "Failover can't be scheduled"),
    ("POST", "/switchover", {"leader": "n1", "scheduled_at": "2099-01-01T00:00:00"}, {}, 400, "Timezone information is mandatory for the scheduled switchover"),
    ("POST", "/switchover", {"leader": "n1", "scheduled_at": "2020-01-01T00:00:00Z"}, {}, 422, "Cannot schedule switchover in the past"),
    ("POST", "/switchover", {"leader": "n1", "scheduled_at": "tomorrow"}, {}, 422, "Unable to parse scheduled timestamp"),
    ("POST", "/switchover", {"leader": "n1", "scheduled_at": 4070908800}, {}, 422, "Unable to parse scheduled timestamp"),
    ("POST", "/switchover", {"leader": "n1", "candidate": "n1", "scheduled_at": "2099-01-01T00:00:00Z"}, {}, 400, "Switchover target and source are the same"),
    ("POST", "/switchover", {"candidate": "n1", "scheduled_at": "2099-01-01T00:00:00Z"}, {}, 400, "Switchover could be performed only from a specific leader"),
    ("POST", "/switchover", {"leader": "n1", "scheduled_at": "x"}, {"pause": True}, 400, "Can't schedule switchover in the paused state"),
    ("POST", "/switchover", {"leader": "n1"}, {"pause": True}, 400, "Switchover is possible only to a specific candidate in a paused state"),
    ("POST", "/restart", {"schedule": "2099-01-01T00:00:00+00:00"}, {"pause": True}, 500, "Can't schedule restart in the paused state"),
    ("POST", "/failover", {"candidate": "n2", "pgha": {"holder_is_down": True}},
     {"pgha__lock": {"holder": "n1", "node_id": "id", "incarnation": "r", "sequence": 7, "ttl_s": 30.0, "mode": "paused", "lsn": 1, "timeline": 2}}, 412, "n1 is not down: it answers this request"),
    ("POST", "/failover", {"candidate": "n2", "pgha": {"holder_is_down": True}},
     {"pgha__lock": {"holder": "n1", "node_id": "other", "incarnation": "r", "sequence": 7, "ttl_s": 30.0, "mode": "paused", "lsn": 1, "timeline": 2}, "seen_lock_s_ago": 20.0}, 412,
     "n1 does not look down: its lock was seen to be renewed 20.0 s ago, 30.3 s without are needed"),
    ("POST", "/failover", {"candidate": "n2", "pgha": {"holder_is_down": True}},
     {"pgha__lock": {"holder": "n1", "node_id": "other", "incarnation": "r", "sequence": 7, "ttl_s": 30.0, "mode": "paused", "lsn": 1, "timeline": 2}, "seen_lock_s_ago": 99.0, "primary": False},
     412, "n1 does not look down: its PostgreSQL sends WAL to n2"),
    ("POST", "/failover", {"candidate": "n2", "pgha": {"holder_is_down": True}}, {}, 412, "for a failover from a lock that was paused"),
    ("POST", "/switchover", {"leader": "n1", "candidate": "n1"}, {}, 400, "Switchover target and source are the same"),
    ("POST", "/switchover", {"leader": "nobody"}, {}, 412, "leader name does not match"),
    ("POST", "/failover", {"leader": "nobody", "candidate": "n2"}, {}, 412, "leader name does not match"),
    ("POST", "/switchover", {"leader": "n1", "candidate": "nobody"}, {}, 412, "candidate does not exists"),
    ("POST", "/failover", {"candidate": "nobody"}, {}, 412, "candidate does not exists"),
    ("POST", "/switchover", {"leader": "n1", "candidate": "n3"}, {"etcd": "synchronous"}, 412, "candidate name does not match with sync_standby"),
    ("POST", "/switchover", {"leader": "n1"}, {"etcd": "synchronous", "sync": {}}, 412, "switchover is not possible: can not find sync_standby"),
    ("POST", "/switchover", {"leader": "n1"}, {"members__n2": None, "members__n3": None}, 412,
     "switchover is not possible: cluster does not have members except leader"),
    ("POST", "/failover", {"candidate": "n2"}, {"members__n2": {"state": "stopped"}}, 412, "failover is not possible: no good candidates have been found"),
    ("POST", "/switchover", {"leader": "n1"}, {"members__n2": {"state": "running", "tags": {"nofailover": True}}, "members__n3": {}}, 412,
     "switchover is not possible: no good candidates have been found (n2: tagged nofailover; n3: state is unknown)"),
    ("POST", "/switchover", {"leader": "n1"}, {"seen": False}, 503, "the cluster has not been seen"),
    ("DELETE", "/switchover", None, {}, 404, "no switchover is scheduled"),
    ("POST", "/restart", {"role": "nonsense"}, {}, 400, "PostgreSQL role should be either primary, standby_leader, or replica"),
    ("POST", "/restart", {"postgres_version": "new"}, {}, 400, "postgres_version is no version of PostgreSQL"),
    ("POST", "/restart", {"postgres_version": [16]}, {}, 400, "postgres_version is no version of PostgreSQL"),
    ("POST", "/restart", {"schedule": "2000-01-01T00:00:00+00:00"}, {}, 422, "Cannot schedule restart in the past"),
    ("POST", "/restart", {"schedule": "2099-01-01T00:00:00"}, {}, 400, "Timezone information is mandatory for the scheduled restart"),
    ("POST", "/restart", {"schedule": "x"}, {}, 422, "Unable to parse scheduled timestamp"),
    ("POST", "/restart", {"schedule": None}, {}, 422, "Unable to parse scheduled timestamp"),
    ("POST", "/reinitialize", [1], {}, 400, ""),
    ("POST", "/sigterm", None, {}, 202, "nothing is done"),
    ("POST", "/citus", {"type": "before_demote"}, {}, 501, "does not support Citus"),
    ("POST", "/mpp", {"type": "before_demote"}, {}, 501, "does not support Citus"),
    ("POST", "/restart", {"other": 1}, {}, 400, "Unknown filter: other"),
    ("POST", "/restart", {"timeout": "soon"}, {}, 400, "timeout must be a positive number"),
    ("POST", "/restart", {"timeout": True}, {}, 400, "timeout must be a positive number"),
    ("PATCH", "/config", [1], {}, 400, ""),
    ("PATCH", "/config", {"ttl": 20}, {"config": None}, 503, ""),
    ("PUT", "/config", {}, {}, 400, ""),
    ("POST", "/nonsense", {}, {}, 501, ""),
    ("BREW", "/coffee", None, {}, 501, ""),
]


@pytest.mark.parametrize(("method", "path", "body", "world", "status", "text"), REFUSALS,
                         ids=[f"{r[0]} {r[1]} {str(r[2])[:60]} {r[3]}" for r in REFUSALS])
def test_what_is_known_to_be_wrong_is_refused_at_once(  # noqa: PLR0917  (the columns of the table)
    method: str, path: str, body: Any, world: dict[str, Any], status: int, text: str,
) -> None:
    async def main() -> None:
        given = dict(world)
        if isinstance(given.get("etcd"), str):
            given["etcd"] = golden(given["etcd"])["etcd"]
        app, _, inbox, _ = app_for(published(**given))
        async with serving(app) as address:
            got, answer = await ask(address, method, path, body)
        assert got == status
        assert text in answer.decode()
        assert inbox.asked == []

    run(main)


def test_a_switchover_is_handed_in_and_its_outcome_awaited() -> None:
    async def outcome(body: dict[str, Any], path: str, *after: Any) -> tuple[int, str, list[Any]]:
        app, board, inbox, _ = app_for(published())
        for kind in ("switchover", "failover"):
            inbox.answers[kind] = Answer(status=200, text="", revision=20)
        got: list[Any] = []

        async def question() -> None:
            got.append(await app.handle(Request(method="POST", path=path, headers={"content-length": "1"}, body=json.dumps(body).encode())))

        with trio.fail_after(2):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(question)
                await inbox.arrived.wait()
                await trio.testing.wait_all_tasks_blocked()
                for snapshot in after:
                    assert not got
                    board.publish(snapshot)
                    await trio.testing.wait_all_tasks_blocked()
        return got[0].status, got[0].body.decode(), inbox.asked

    def later(revision: int, **changed: Any) -> Any:
        snapshot = published(**changed)
        assert snapshot.view is not None
        return replaced(snapshot, view=msgspec.structs.replace(snapshot.view, revision=revision))

    asked = {"leader": "n1", "candidate": "n2"}
    pending = {"failover": {"leader": "n1", "member": "n2"}}
    moved = {"held": False, "leader": b"n2", **pending}
    wanted = [("switchover", {"leader": "n1", "member": "n2"})]
    assert run(lambda: outcome(asked, "/switchover", later(9), later(20, **pending), later(25, **moved))) == (200, 'Successfully switched over to "n2"', wanted)
    assert run(lambda: outcome(asked, "/switchover", later(25, held=False, leader=b"n3"))) == (200, 'Switched over to "n3" instead of "n2"', wanted)
    assert run(lambda: outcome(asked, "/switchover", later(20, **pending), later(25, refusal="n2: lag 2 MiB, limit 1 MiB"))) == (
        503, "Switchover failed: n2: lag 2 MiB, limit 1 MiB", wanted)
    assert run(lambda: outcome({"leader": "n1"}, "/switchover", later(25, **moved)))[1] == 'Successfully switched over to "n2"'
    assert run(lambda: outcome({"candidate": "n2"}, "/failover", later(25, **moved))) == (
        200, 'Successfully failed over to "n2"', [("failover", {"member": "n2"})])


def test_a_switchover_for_later_is_written_and_not_waited_for() -> None:
    async def main() -> None:
        app, _, inbox, _ = app_for(published())
        inbox.answers["switchover"] = Answer(status=200, text="", revision=20)
        async with serving(app) as address:
            # Who leads then, and who may take over, is seen then.
            answer = await ask(address, "POST", "/switchover", {"leader": "n9", "candidate": "n8", "scheduled_at": "2099-01-01T00:00:00Z"})
        assert answer == (202, b"Switchover scheduled")
        assert inbox.asked == [("switchover", {"leader": "n9", "member": "n8", "scheduled_at": "2099-01-01T00:00:00+00:00"})]

    run(main)


def test_what_is_scheduled_and_how_the_copy_goes_is_shown() -> None:
    async def main() -> None:
        restart = ScheduledRestart(schedule="2099-01-01T00:00:00+00:00", postmaster_start_time="then", conditions={"restart_pending": True})

        async def shown(memory: Memory, member: dict[str, Any]) -> tuple[Any, Any, Any]:
            app, *_ = app_for(published(primary=False, memory=memory, members__n2=member))
            own, cluster = json.loads((await get(app, "/patroni")).body), json.loads((await get(app, "/cluster")).body)
            return own.get("scheduled_restart"), own["pgha"].get("reinitialize"), next(m for m in cluster["members"] if m["name"] == "n2").get("scheduled_restart")

        wanted = {"schedule": "2099-01-01T00:00:00+00:00", "restart_pending": True}
        assert restart.published() == {**wanted, "postmaster_start_time": "then"}
        assert await shown(Memory(scheduled_restart=restart), {"scheduled_restart": restart.published()}) == (wanted, None, wanted)
        assert await shown(Memory(reinit=Reinitialisation(request=3, asked_at=NOW)), {}) == (None, {"request": 3, "state": "running"}, None)
        assert (await shown(Memory(reinit_ended=ReinitialisationEnd(request=3, ok=False, why="no room")), {}))[1] == {"request": 3, "state": "failed", "why": "no room"}
        assert (await shown(Memory(reinit_ended=ReinitialisationEnd(request=3, ok=True)), {"scheduled_restart": "nonsense"}))[1:] == ({"request": 3, "state": "done"}, "nonsense")

    run(main)


def test_an_outcome_that_does_not_come_is_called_unknown() -> None:
    app, _, inbox, _ = app_for(published())
    inbox.answers["switchover"] = Answer(status=200, text="", revision=20)

    async def main() -> None:
        before = trio.current_time()
        response = await app.handle(Request(method="POST", path="/switchover", headers={"content-length": "1"}, body=b'{"leader":"n1"}'))
        assert response.status == 503
        assert response.body.decode() == "Switchover status unknown after 20 seconds; operation may still be in progress"
        assert trio.current_time() - before == pytest.approx(20)

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


def test_answers_of_the_loop_are_passed_on() -> None:
    async def main() -> None:
        app, _, inbox, _ = app_for(published())
        inbox.answers = {
            "reload": Answer(status=202, text="reload scheduled"),
            "restart": Answer(status=200, text="restarted successfully"),
            "cancel_restart": Answer(status=404, text="no restarts are scheduled"),
            "reinitialize": Answer(status=200, text="reinitialize started"),
            "patch_config": Answer(status=200, text='{"ttl": 20}', json=True),
            "switchover": Answer(status=503, text="failed to write failover key into DCS"),
        }
        async with serving(app) as address:
            assert await ask(address, "POST", "/reload") == (202, b"reload scheduled")
            assert await ask(address, "POST", "/restart") == (200, b"restarted successfully")
            assert await ask(address, "POST", "/restart", {"timeout": "2min"}) == (200, b"restarted successfully")
            assert await ask(address, "POST", "/restart", {"role": "replica", "postgres_version": "16.4", "restart_pending": ""}) == (200, b"restarted successfully")
            assert (await ask(address, "POST", "/restart", {"schedule": "2099-01-01 01:00+01", "timeout": 5, "restart_pending": True}))[0] == 200
            assert await ask(address, "DELETE", "/restart") == (404, b"no restarts are scheduled")
            assert await ask(address, "POST", "/reinitialize") == (200, b"reinitialize started")
            assert await ask(address, "POST", "/reinitialize", {"force": True, "from-leader": True}) == (200, b"reinitialize started")
            assert await ask(address, "PATCH", "/config", {"ttl": 20}) == (200, b'{"ttl": 20}')
            assert await ask(address, "POST", "/switchover", {"leader": "n1"}) == (503, b"failed to write failover key into DCS")
        assert inbox.asked == [("reload", {}), ("restart", {}), ("restart", {"timeout_s": 120.0}),
                               ("restart", {"role": "replica", "postgres_version": "16.4", "restart_pending": ""}),
                               ("restart", {"schedule": "2099-01-01T01:00:00+01:00", "timeout": 5.0, "restart_pending": True}), ("cancel_restart", {}),
                               ("reinitialize", {"force": False, "from_leader": False}), ("reinitialize", {"force": True, "from_leader": True}), ("patch_config", {"ttl": 20}),
                               ("switchover", {"leader": "n1"})]

    run(main)


# --- access --------------------------------------------------------------------------------------------------------------

def test_changes_need_the_password_and_the_right_address_reading_does_not() -> None:
    async def main() -> None:
        app, _, inbox, _ = app_for(published(), access=Access(username="u", password="pä:ss"))
        inbox.answers["reload"] = Answer(status=202, text="reload scheduled")
        async with serving(app) as address:
            assert (await ask(address, "GET", "/config"))[0] == 200
            assert await ask(address, "POST", "/reload") == (401, b"no auth header received")
            for header in ("Basic", "Basic !!!", "Bearer dTpww6Q6c3M=", "Basic dTp4"):
                assert await ask(address, "POST", "/reload", headers={"Authorization": header}) == (401, b"not authenticated")
            assert (await ask(address, "POST", "/reload", headers={"Authorization": "Basic dTpww6Q6c3M="}))[0] == 202
            answer = await talk(address, b"POST /reload HTTP/1.0\r\n\r\n")
            assert b'WWW-Authenticate: Basic realm="Patroni"\r\n' in answer
            app.access = Access(networks=await resolve_allowlist(["10.0.0.0/8"]))
            assert await ask(address, "POST", "/reload") == (403, b"Access is denied")
            assert (await ask(address, "GET", "/cluster"))[0] == 200
            app.access = Access(networks=await resolve_allowlist(["10.0.0.0/8", "localhost"]))
            assert (await ask(address, "POST", "/reload"))[0] == 202
            app.access = Access(networks=await resolve_allowlist(["127.0.0.1"]))
            assert (await ask(address, "POST", "/reload"))[0] == 202
            app.access = Access(require_cert=True)
            assert await ask(address, "POST", "/reload") == (403, b"client certificate required")
        assert "pä:ss" not in repr(Access(password="pä:ss"))

    run(main)


def test_an_ipv4_client_on_an_ipv6_socket_is_recognised() -> None:
    networks = trio.run(resolve_allowlist, ["127.0.0.0/8"])
    assert Access(networks=networks).refuses(Request(method="POST", path="/reload", peer="::ffff:127.0.0.1")) is None
    assert Access(networks=networks).refuses(Request(method="POST", path="/reload", peer="::1")) is not None
    assert trio.run(resolve_allowlist, []) is None


def test_waiting_on_the_board_misses_nothing() -> None:
    async def main() -> None:
        first, second = published(number=1), published(number=2)
        board = Board(first)
        board.publish(second)
        assert await board.wait_changed(first) is second

    run(main)


def test_deadlines_are_points_on_both_clocks() -> None:
    value = published(ttl_s=5)
    assert value.health_at(Instant(NOW.boot_ns + 6_000_000_000, NOW.raw_ns)).lock_held is False     # suspended for 6 s
    assert value.health_at(NOW).lock_held is True


# --- what our own words quote ----------------------------------------------------------------------------------------------

_MARKUP = "<img src=x onerror=alert(1)>"


@pytest.mark.parametrize(("method", "path", "query", "body", "status"), [
    ("GET", f"/pgha/{_MARKUP}", {}, None, 404),
    ("POST", f"/{_MARKUP}", {}, {}, 501),
    (f"{_MARKUP}", "/", {}, {}, 501),
    ("POST", f"/pgha/{_MARKUP}", {}, {}, 404),
    ("POST", f"/pgha/dry-run/{_MARKUP}", {}, {}, 404),
    ("POST", "/restart", {}, {_MARKUP: 1}, 400),
    ("POST", "/pgha/dry-run/restart", {}, {_MARKUP: 1}, 400),
    ("GET", "/pgha/events", {"kinds": _MARKUP}, None, 400),
    ("GET", "/pgha/events", {"after": _MARKUP}, None, 400),
    ("PATCH", "/config", {}, {_MARKUP: 1}, 400),
    ("PUT", "/config", {}, {_MARKUP: 1}, 400),
    ("POST", "/pgha/config/why", {}, {"key": _MARKUP}, 404),
])
def test_what_quotes_the_request_is_no_page(method: str, path: str, query: dict[str, str], body: Any, status: int) -> None:
    async def main() -> None:
        app, _, inbox, clock = app_for(published())
        app.readers = Readers(EventLog(run="run", node="n1", scope="bench"), clock=clock, at_most=lambda: 9)
        for kind, refused in (("patch_config", 400), ("put_config", 400), ("why_config", 404)):
            inbox.answers[kind] = Answer(status=refused, text=f"{_MARKUP} is not known")
        data = b"" if body is None else json.dumps(body).encode()
        response = await app.handle(Request(method=method, path=path, query=query, body=data, headers={"content-length": str(len(data))}))
        assert response.status == status
        assert _MARKUP in response.body.decode(), "else the row shows nothing"
        assert response.content_type.startswith("text/plain")
        assert ("X-Content-Type-Options", "nosniff") in response.headers

    run(main)
