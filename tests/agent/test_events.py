"""The log of events: what is kept, what an id is worth later. And what the agent tells, pass by pass (chronicle.py)."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from random import Random
from typing import Any

import msgspec
import pytest
import trio
import trio.testing
from msgspec.structs import replace

sys.path[1:1] = [str(Path(__file__).parents[1] / "decide")]

import decide_world as w  # noqa: E402  (after the path)
from decide_anything import paused_or_promised, world  # noqa: E402  (after the path)

from pgha.chronicle import Chronicle  # noqa: E402  (after the path)
from pgha.events import EventLog, NoSuchId  # noqa: E402  (after the path)
from pgha.model.cluster import Member  # noqa: E402  (after the path)
from pgha.model.decision import Decision, Reason  # noqa: E402  (after the path)
from pgha.model.event import KINDS, RoleEvent  # noqa: E402  (after the path)
from pgha.model.lock import LicenceState  # noqa: E402  (after the path)
from pgha.model.observation import Operation  # noqa: E402  (after the path)
from pgha.rest.published import publish_pass  # noqa: E402  (after the path)


def a_log(**limits: int) -> EventLog:
    return EventLog(run="r1", node='n"1', scope="s", **limits)


def event(text: str = "x") -> RoleEvent:
    return RoleEvent(role="primary", state=text, timeline=1, was_role="", was_state="")


# --- the log ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kept", "kept_bytes", "size", "count", "numbers"), [
    (1000, 1 << 20, 1, 0, []),
    (1000, 1 << 20, 1, 3, [1, 2, 3]),
    (3, 1 << 20, 1, 3, [1, 2, 3]),
    (3, 1 << 20, 1, 8, [6, 7, 8]),
    (1000, 4000, 1000, 8, [6, 7, 8]),
    (1000, 100, 1000, 8, [8]),
])
def test_so_many_events_and_so_many_bytes_are_kept(kept: int, kept_bytes: int, size: int, count: int, numbers: list[int]) -> None:
    log = a_log(kept=kept, kept_bytes=kept_bytes)
    for _ in range(count):
        log.add(event("x" * size), wall_s=0.0)
    assert [entry.number for entry in log.after(0)] == numbers
    assert log.last == count
    assert log.forgotten == (numbers[0] - 1 if numbers else 0)
    for entry in log.after(0):
        assert json.loads(entry.text)["id"] == f"r1-{entry.number}"
        assert json.loads(entry.text)["node"] == 'n"1'
        assert entry.kind == "role"


@pytest.mark.parametrize(("after", "number", "gap"), [
    ("0", 5, None),
    ("r1-8", 8, None), ("r1-7", 7, None), ("r1-5", 5, None),
    ("r1-4", 5, ("dropped", 1)), ("r1-0", 5, ("dropped", 5)),
    ("r1-9", 5, ("restarted", None)), ("r2-7", 5, ("restarted", None)), ("r-0", 5, ("restarted", None)),
])
def test_an_id_of_before(after: str, number: int, gap: tuple[str, int | None] | None) -> None:
    log = a_log(kept=3)
    for _ in range(8):
        log.add(event(), wall_s=0.0)
    start = log.start(after)
    assert start.number == number
    assert (None if start.gap is None else (start.gap.reason, start.gap.missed)) == gap
    assert [entry.number for entry in log.after(start.number)] == list(range(number + 1, 9))


@pytest.mark.parametrize("after", ["", "x", "r1", "r1-", "-1", "r1-x", "r1--1", "r 1-1", "r1-" + "9" * 16, "r" * 65 + "-1", "r1-1 ", "r1-²"])
def test_what_is_no_id(after: str) -> None:
    with pytest.raises(NoSuchId):
        a_log().start(after)


def test_whoever_waits_is_woken_and_only_then_is_there_an_event_more() -> None:
    async def main() -> None:
        log, woken = a_log(), []

        async def wait(beyond: int) -> None:
            await log.wait_beyond(beyond)
            woken.append(beyond)

        async with trio.open_nursery() as nursery:
            for beyond in (0, 1, 2):
                nursery.start_soon(wait, beyond)
            await trio.testing.wait_all_tasks_blocked()
            for told in ([0], [0, 1], [0, 1, 2]):
                log.add(event(), wall_s=0.0)
                await trio.testing.wait_all_tasks_blocked()
                assert sorted(woken) == told

    trio.run(main)


# --- what is told ----------------------------------------------------------------------------------------------------------


class Told:
    """A chronicle, and what it has told since it was last asked."""

    def __init__(self) -> None:
        self.log = EventLog(run="r1", node="a", scope="s", kept=100_000, kept_bytes=1 << 30)
        self.chronicle = Chronicle(self.log)
        self._read = 0

    def of(self, scene: w.World, *, decision: Decision | None = None, news: bool = False) -> list[dict[str, Any]]:
        decision = decision or scene.decide()
        self.chronicle.tell(scene.seen, decision, publish_pass(scene.seen, decision, scope="s"), news=news)
        found = [json.loads(entry.text) for entry in self.log.after(self._read)]
        self._read = self.log.last
        return found


def short(events: list[dict[str, Any]]) -> list[str]:
    """What each says, in a line."""
    return [" ".join(str(e[k]) for k in ("kind", "what", "role", "state", "holder", "was", "member", "over", "operation", "progress", "ok", "why", "took_s", "age_s", "situation")
                     if e.get(k) not in (None, "")) for e in events]


LEADER, REPLICA = w.LEADER, w.REPLICA
ELSEWHERE: dict[str, Any] = {"role": "replica", "state": "running"}


def operation(**fields: Any) -> Operation:
    return Operation(**{"kind": "Clone", "id": 3, "started_at": w.ago(5), **fields})


@pytest.mark.parametrize(("before", "now", "told"), [
    (LEADER, LEADER, []),
    (LEADER, LEADER.but(licence=w.licence(state=LicenceState.LOST, lost_to="b")), ["lock lost b a"]),
    (LEADER, LEADER.but(licence=replace(LEADER.seen.licence, state=LicenceState.RELEASING)), ["lock released a"]),
    (LEADER, LEADER.but(licence=replace(LEADER.seen.licence, valid_until=w.ago(0.1))), ["lock lost a its time is over"]),
    (REPLICA, REPLICA.but(licence=LEADER.seen.licence), ["lock taken b"]),
], ids=["nothing", "lost", "released", "expired", "taken"])
def test_what_is_told_of_the_lock(before: w.World, now: w.World, told: list[str]) -> None:
    chronicle = Told()
    chronicle.of(before)
    assert [line for line in short(chronicle.of(now)) if line.startswith("lock")][:len(told) or None] == told


def renewed(at_s: float, *, seen_s: float, sequence: int) -> w.World:
    """The lock was last renewed at `at_s`; it is now `seen_s`."""
    since = w.ahead(at_s)
    return LEADER.but(now=w.ahead(seen_s), licence=w.licence(since=since, sequence=sequence, valid_until=since.plus_s(30)))


def test_a_late_renewal_is_told_when_it_is_late_and_when_it_has_come() -> None:
    """ttl 30, loop_wait 10: every 10 s, so late after 20.5 s."""
    chronicle = Told()
    for scene, told in ((renewed(0, seen_s=1, sequence=5), []),
                        (renewed(0, seen_s=20, sequence=5), []),
                        (renewed(0, seen_s=21, sequence=5), ["lock late a 21.0"]),
                        (renewed(0, seen_s=22, sequence=5), []),
                        (renewed(22, seen_s=22, sequence=6), ["lock renewed a 22.0"]),
                        (renewed(31, seen_s=32, sequence=7), []),
                        (renewed(53, seen_s=53, sequence=8), ["lock renewed a 22.0"]),      # nobody looked meanwhile
                        (renewed(113, seen_s=114, sequence=14), []),
                        (renewed(113, seen_s=150, sequence=14), ["lock lost a its time is over"])):
        lines = [line for line in short(chronicle.of(scene)) if line.startswith("lock") and not line.startswith(("lock taken", "lock holder"))]
        assert lines == told, scene.seen.licence


def test_another_holder_is_told_once() -> None:
    chronicle = Told()
    assert "lock holder a" in short(chronicle.of(REPLICA))
    locks = []
    for record in (w.record("a", mode="released"), w.record("c"), w.record("c", sequence=8), w.record("c", mode="paused")):
        locks += [(e["holder"], e["was"], e["why"]) for e in chronicle.of(w.with_lock(REPLICA, record, since=w.NOW)) if e["kind"] == "lock"]
    assert locks == [("", "a", ""), ("c", "", ""), ("c", "c", "paused")]


def test_the_story_of_an_operation() -> None:
    chronicle = Told()
    chronicle.of(w.EMPTY)
    lines = []
    for changes in ({"operation": operation()}, {"operation": operation()}, {"operation": operation(progress="1 of 9")}, {"operation": operation(progress="2 of 9")},
                    {"operation": operation(progress="3 of 9"), "now": w.ahead(1.5)}, {"operation": None, "ended": operation(ended_at=w.NOW, ok=False, why="no space")},
                    {"ended": operation(ended_at=w.NOW, ok=False, why="no space")}, {"operation": operation(id=4, kind="Stop"), "ended": operation(ended_at=w.NOW)},
                    {"ended": operation(id=4, kind="Stop", ended_at=w.NOW, ok=True)}, {"ended": operation(id=5, kind="StartStandby", ended_at=w.NOW, ok=True)}):
        lines += [line for line in short(chronicle.of(w.EMPTY.but(**changes))) if line.startswith("operation")]
    assert lines == ["operation begin Clone", "operation progress Clone 1 of 9", "operation progress Clone 3 of 9", "operation end Clone False no space 5.0",
                     "operation begin Stop", "operation end Stop True 5.0", "operation end StartStandby True 5.0"]


def configured(config: dict[str, Any], revision: int) -> w.World:
    view = REPLICA.seen.dcs.view
    assert view is not None
    return REPLICA.but(dcs__view=replace(view, config=config, revisions={**view.revisions, "config": revision}))


@pytest.mark.parametrize(("before", "now", "changed"), [
    ({"ttl": 30}, {"ttl": 30}, None),
    ({"ttl": 30}, {"ttl": 20, "pause": True}, {"pause": (None, True), "ttl": (30, 20)}),
    ({"postgresql": {"parameters": {"a": 1, "b": 2}}}, {"postgresql": {"parameters": {"a": 1}, "use_slots": True}},
     {"postgresql.parameters.b": (2, None), "postgresql.use_slots": (None, True)}),
    ({}, {"slots": {"x": {"type": "physical"}}, "list": [1, {"a": "b"}]}, {"slots.x.type": (None, "physical"), "list": (None, '[1, {"a": "b"}]')}),
    ({}, {"standby_cluster": {"password": "hush", "conn": "postgres://u:hush@h/d", "x": ["password=hush", {"token": "hush"}]}},
     {"standby_cluster.password": (None, "***"), "standby_cluster.conn": (None, "postgres://u:***@h/d"), "standby_cluster.x": (None, '["password=***", {"token": "***"}]')}),
    ({}, {"x": "y" * 10_000, "z": 1e300, "n": 10**400}, {"x": (None, "(10000 characters)"), "z": (None, "(a large number)"), "n": (None, "(a large number)")}),
])
def test_a_changed_configuration_is_told_by_key_without_secrets(before: dict[str, Any], now: dict[str, Any], changed: dict[str, Any] | None) -> None:
    chronicle = Told()
    chronicle.of(configured(before, 5), decision=Decision(situation="following", summary=""))
    told = [e for e in chronicle.of(configured(now, 6), decision=Decision(situation="following", summary="")) if e["kind"] == "configuration"]
    if changed is None:
        assert told == []
    else:
        (event_,) = told
        assert event_["revision"] == 6
        assert {c["key"]: (c["was"], c["now"]) for c in event_["changed"]} == changed
        assert "hush" not in json.dumps(told)


def test_a_thousand_changed_keys_are_counted() -> None:
    chronicle = Told()
    chronicle.of(configured({}, 5))
    (told,) = [e for e in chronicle.of(configured({f"k{n}": n for n in range(1000)}, 6)) if e["kind"] == "configuration"]
    assert (len(told["changed"]), told["more"]) == (50, 950)


def membered(*members: Member) -> w.World:
    view = REPLICA.seen.dcs.view
    assert view is not None
    return REPLICA.but(dcs__view=replace(view, members={m.name: m for m in members}))


def test_members_come_go_and_change() -> None:
    chronicle = Told()
    n1, n2 = Member(name="n1", role="primary", state="running", timeline=1), Member(name="n2", role="replica", state="running", replication_state="streaming", timeline=1)
    assert [line for line in short(chronicle.of(membered(n1, n2))) if line.startswith("member")] == [], "the first view is taken as it is"
    for scene, told in ((membered(n1, n2), []), (membered(n1), ["member left replica streaming n2"]), (membered(n1, n2), ["member joined replica streaming n2"]),
                        (membered(replace(n1, state="stopped", role="replica"), n2), ["member changed replica stopped n1"]),
                        (membered(replace(n1, state="stopped", role="replica"), replace(n2, xlog_location=5, timeline=2)), ["member changed replica streaming n2"])):
        assert [line for line in short(chronicle.of(scene)) if line.startswith("member")] == told


def behind(**lsn: int) -> w.World:
    """A leader whose standbys stream, so many bytes behind."""
    row = LEADER.seen.postgres.row
    assert row is not None
    lines = tuple({"application_name": name.upper(), "flush_lsn": row.lsn - lag, "state": "streaming"} for name, lag in lsn.items())
    return LEADER.but(postgres__row=replace(row, replication=lines))


def test_lag_is_told_over_the_limit_and_below_half_of_it() -> None:
    chronicle = Told()
    for scene, told in ((behind(b=0, c=0), []), (behind(b=w.MiB, c=0), []), (behind(b=w.MiB + 1, c=0), ["lag b True"]), (behind(b=3 * w.MiB, c=2 * w.MiB), ["lag c True"]),
                        (behind(b=w.MiB, c=w.MiB // 2), []), (behind(b=w.MiB // 2 - 1, c=0), ["lag b False", "lag c False"]), (behind(b=w.MiB, c=0), [])):
        assert [line for line in short(chronicle.of(scene)) if line.startswith("lag")] == told


def test_a_standby_tells_its_own_lag() -> None:
    row, view = REPLICA.seen.postgres.row, REPLICA.seen.dcs.view
    assert row is not None
    assert view is not None
    chronicle = Told()
    for lag, told in ((0, []), (2 * w.MiB, ["lag b True"]), (0, ["lag b False"])):
        lsn = view.published_position.lsn - lag
        receiver = None if row.receiver is None else replace(row.receiver, latest_end_lsn=0)
        scene = REPLICA.but(postgres__row=replace(row, received_lsn=lsn, replayed_lsn=lsn, receiver=receiver))
        assert [line for line in short(chronicle.of(scene)) if line.startswith("lag")] == told


def test_a_decision_is_told_with_its_reasons_when_it_is_news() -> None:
    chronicle = Told()
    decision = Decision(situation="leading", summary="no action, postgres://u:hush@h", paused=True, reasons=(Reason(rule="lease.fresh", holds=True, because="password=hush " + "x" * 600),) * 60)
    told = chronicle.of(LEADER, decision=decision, news=True)
    assert short(told)[:2] == ["agent started", "decision leading"]
    assert told[1]["summary"] == "no action, postgres://u:***@h"
    assert told[1]["paused"] is True
    assert len(told[1]["reasons"]) == 40
    assert len(told[1]["reasons"][0]["because"]) == 500
    assert "hush" not in json.dumps(told)
    assert chronicle.of(LEADER, decision=decision) == []
    assert short(chronicle.of(LEADER.but(shutting_down=True), decision=decision)) == ["agent stopping"]


def test_whatever_is_observed_is_told_in_bounded_words() -> None:
    """Also half a character, which a name of others' may hold; passes in any order."""
    for seed in range(8):
        chance, chronicle = Random(seed), Told()
        for _ in range(300):
            scene = world(chance) if chance.random() < 0.7 else paused_or_promised(chance)
            if chance.random() < 0.1:
                scene = scene.but(ended=operation(id=chance.randrange(9), why=chance.choice(("\ud800", "x" * 100_000, "\0\x1b[2J")), ended_at=w.NOW))
            for told in chronicle.of(scene, news=chance.random() < 0.5):
                assert told["kind"] in KINDS
                assert len(json.dumps(told)) < 64 << 10
                assert told["node"] == "a"
        assert {entry.kind for entry in chronicle.log.after(0)} >= {"agent", "decision", "lock", "role", "operation"}
        for entry in chronicle.log.after(0):
            msgspec.json.decode(entry.text)
