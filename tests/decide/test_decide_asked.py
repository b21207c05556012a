"""What operators ask of a node (decide/asked.py): taken on, refused, kept for its time. `wall_s` is 2027-01-15T08:00:00Z."""

from __future__ import annotations

import pytest
from decide_world import CRASHED, LEADER, NOW, REPLICA, ago, check, only, refused, row, with_lock
from msgspec.structs import replace

from pgha.decide.ended import note_ended
from pgha.model.action import AnswerRequest, Demote, Restart, StartPrimary
from pgha.model.cluster import Sync
from pgha.model.observation import Operation
from pgha.model.request import Request, ScheduledRestart, moment, server_version

STARTED = "2027-01-01 00:00:00+00"
HERE = REPLICA.but(postgres__row__started_at=STARTED, postgres__row__server_version=150006)


def asked(**options):
    return Request(id=7, kind="restart", at=ago(1), options=options)


def scheduled(at, *, begun=False, **conditions):
    return ScheduledRestart(schedule=at, postmaster_start_time=STARTED, conditions=conditions, begun=begun)


RESTART = [
    row("at once", requests=(asked(),), does="Restart", refuses=""),
    row("of a replica", requests=(asked(role="replica"),), does="Restart"),
    row("of a primary", requests=(asked(role="primary"),), does="AnswerRequest", refuses="asked.has_role", says="asked of a primary, this is a replica"),
    row("of a standby leader", requests=(asked(role="standby_leader"),), does="AnswerRequest", refuses="asked.has_role"),
    row("of what is below 15.7", requests=(asked(postgres_version="15.7"),), does="Restart"),
    row("of what is below 15.6", requests=(asked(postgres_version="15.6"),), does="AnswerRequest", refuses="asked.version_is_lower", says="PostgreSQL is 150006, asked for below 150006"),
    row("of what is below nonsense", requests=(asked(postgres_version="new"),), does="AnswerRequest", refuses="asked.version_is_lower"),
    row("of what has changes pending", requests=(asked(restart_pending=False),), postgres__row__pending_restart={"max_connections": ("60", "100")}, does="Restart"),
    row("of what has none", requests=(asked(restart_pending=False),), does="AnswerRequest", refuses="asked.restart_is_pending"),
    row("all at once", requests=(asked(role="primary", postgres_version="9.6.3", restart_pending=True),), does="AnswerRequest",
        refuses="asked.has_role asked.version_is_lower asked.restart_is_pending"),
    row("while it starts", requests=(asked(),), postgres__row=None, postgres__answer="starting", does="AnswerRequest"),
    row("a restart runs", requests=(asked(),), operation=Operation(kind="Restart", id=1, started_at=ago(1)), does="AnswerRequest", situation="busy"),
    row("an inspection runs, which is over in a moment", requests=(asked(),), operation=Operation(kind="InspectUpstream", id=1, started_at=ago(1)), does="", situation="busy"),
]


@pytest.mark.parametrize("case", RESTART)
def test_restart(case):
    check(HERE, case)


@pytest.mark.parametrize(("changes", "status", "text"), [
    ({"requests": (asked(role="primary"),)}, 503, "restart conditions are not satisfied"),
    ({"requests": (asked(),), "postgres__row": None, "postgres__answer": "starting"}, 503, "postgres is still starting"),
    ({"requests": (asked(),), "operation": Operation(kind="Restart", id=1, started_at=ago(1))}, 503, "restart already in progress"),
    ({"requests": (asked(),), "operation": Operation(kind="Demote", id=1, started_at=ago(1))}, 503, "demote already in progress"),
    ({"requests": (asked(schedule="2030-01-01T00:00:00Z"),)}, 202, "Restart scheduled"),
    ({"requests": (asked(schedule="2030-01-01T00:00:00Z"),), "memory__scheduled_restart": scheduled("2031-01-01T00:00:00Z")}, 409, "Another restart is already scheduled"),
    ({"requests": (asked(schedule="2030-01-01T00:00:00Z"),), "settings__pause": True}, 500, "Can't schedule restart in the paused state"),
    ({"requests": (Request(id=7, kind="cancel_restart", at=NOW),), "memory__scheduled_restart": scheduled("2031-01-01T00:00:00Z")}, 200, "scheduled restart deleted"),
    ({"requests": (Request(id=7, kind="cancel_restart", at=NOW),)}, 404, "no restarts are scheduled"),
])
def test_answers(changes, status, text):
    assert only(HERE.but(**changes).decide(), AnswerRequest) == AnswerRequest(id=7, status=status, text=text)


def test_a_restart_is_kept_with_what_was_asked_of_it_and_forgotten_on_request():
    kept = HERE.but(requests=(asked(schedule="2030-01-01T00:00:00Z", role="replica", timeout=5.0, other=1),)).decide().memory
    assert kept.scheduled_restart == ScheduledRestart(schedule="2030-01-01T00:00:00Z", postmaster_start_time=STARTED, conditions={"role": "replica", "timeout": 5.0})
    assert "restart scheduled at 2030" in kept.said
    gone = replace(HERE, memory=kept).but(requests=(Request(id=8, kind="cancel_restart", at=NOW),)).decide().memory
    assert gone.scheduled_restart is None
    assert "deleted by an operator" in gone.said


DUE = [
    row("later", memory__scheduled_restart=scheduled("2027-01-15T08:00:01Z"), does="", refuses=""),
    row("now", memory__scheduled_restart=scheduled("2027-01-15T08:00:00Z"), does="Restart", refuses=""),
    row("14 s ago", memory__scheduled_restart=scheduled("2027-01-15T07:59:46Z"), does="Restart"),
    row("too long ago", memory__scheduled_restart=scheduled("2027-01-15T07:59:44Z"), does="", refuses="asked.is_in_time"),
    row("begun then", memory__scheduled_restart=scheduled("2027-01-15T07:59:44Z", begun=True), does="Restart"),
    row("begun then, and paused since", memory__scheduled_restart=scheduled("2027-01-15T07:59:44Z", begun=True), settings__pause=True, does="", refuses="asked.is_in_time"),
    row("now, in pause", memory__scheduled_restart=scheduled("2027-01-15T08:00:00Z"), settings__pause=True, does="", refuses=""),
    row("never", memory__scheduled_restart=scheduled("soon"), does="", refuses="asked.is_in_time"),
    row("now, of a primary", memory__scheduled_restart=scheduled("2027-01-15T08:00:00Z", role="primary"), does="", refuses="asked.has_role"),
    row("later, of a primary: it may be one then", memory__scheduled_restart=scheduled("2027-01-15T08:00:05Z", role="primary"), does="", refuses=""),
    row("now, and nothing waits for it any more", memory__scheduled_restart=scheduled("2027-01-15T08:00:00Z", restart_pending=True), does="", refuses="asked.restart_is_pending"),
    row("later, but it was restarted since", memory__scheduled_restart=scheduled("2030-01-01T00:00:00Z"), postgres__row__started_at="2027-01-15 07:59:00+00", does="",
        refuses="asked.is_the_one_meant", says="PostgreSQL was started at 2027-01-15 07:59:00+00"),
    row("now, while PostgreSQL does not answer", memory__scheduled_restart=scheduled("2027-01-15T08:00:00Z"), postgres__row=None, does=""),
]


@pytest.mark.parametrize("case", DUE)
def test_a_scheduled_restart(case):
    decision = check(HERE, case)
    kept = decision.memory.scheduled_restart
    dropped = any(rule.startswith("asked.") for rule in refused(decision))
    assert (kept is None) == dropped, decision.memory
    assert kept is None or kept.begun == ("Restart" in (case.does or ()))
    assert ("dropped" in decision.memory.said) == dropped


def test_a_scheduled_restart_is_carried_out_as_it_was_asked_for():
    decision = HERE.but(memory__scheduled_restart=scheduled("2027-01-15T08:00:00Z", timeout=5.0)).decide()
    restart = only(decision, Restart)
    assert (restart.request_id, restart.timeout_s, restart.as_primary) == (0, 5.0, False)
    assert decision.memory.said == ""
    leads = LEADER.but(memory__scheduled_restart=ScheduledRestart(schedule="2027-01-15T08:00:00Z")).decide()
    assert only(leads, Restart).as_primary


@pytest.mark.parametrize(("now", "gone"), [
    ({}, False),        # the pass that decided it did not come that far: it is decided again
    ({"operation": Operation(kind="Restart", id=9, started_at=ago(0.1))}, True),
    ({"operation": Operation(kind="InspectUpstream", id=9, started_at=ago(0.1))}, False),
    ({"ended": Operation(kind="Restart", id=9, started_at=ago(1), ended_at=ago(0.1), ok=True), "postgres__row__started_at": "2027-01-15 08:00:00+00"}, True),
    ({"ended": Operation(kind="Restart", id=9, started_at=ago(1), ended_at=ago(0.1), ok=True)}, True),      # … of which the row does not tell yet
    ({"ended": Operation(kind="Restart", id=9, started_at=ago(1), ended_at=ago(0.1), why="no")}, True),
    ({"ended": Operation(kind="Restart", id=8, started_at=ago(99), ended_at=ago(90), ok=True)}, False),
])
def test_a_scheduled_restart_is_begun_when_it_is_seen_to_be(now, gone):
    decided = HERE.but(memory__scheduled_restart=scheduled("2027-01-15T08:00:00Z"), memory__last_ended_id=8).decide()
    only(decided, Restart)
    after = replace(HERE, memory=decided.memory).but(**now).decide()
    assert (after.memory.scheduled_restart is None) == gone
    assert (after.memory.said == "restart scheduled at 2027-01-15T08:00:00Z: begun") == gone
    assert any(isinstance(a, Restart) for a in after.actions) == (not now or now.get("ended", Operation(kind="", id=0, started_at=NOW)).id == 8)


def test_the_loop_wakes_when_a_restart_is_due():
    assert HERE.but(memory__scheduled_restart=scheduled("2027-01-15T08:00:02Z")).decide().wake_in_s == pytest.approx(2.0)


def test_a_synchronous_standby_leaves_first_and_is_not_too_late_for_that():
    voter = HERE.but(settings__synchronous_mode="on", dcs__view__sync=Sync(leader="a", members=("b",)), dcs__view__config={"synchronous_mode": True},
                     memory__scheduled_restart=scheduled("2027-01-15T08:00:00Z"))
    first = voter.decide()
    assert (first.leaves_sync, first.memory.scheduled_restart.begun) == (True, True)
    assert not any(isinstance(a, Restart) for a in first.actions)
    later = replace(voter, memory=first.memory).but(wall_s=1_800_000_019.0).decide()
    assert later.memory.scheduled_restart == first.memory.scheduled_restart
    assert later.leaves_sync
    gone = replace(voter, memory=later.memory).but(wall_s=1_800_000_019.0, dcs__view__sync=Sync(leader="a", members=("c",))).decide()
    only(gone, Restart)


# --- the restart of a primary is given a time ----------------------------------------------------------------------------

def restarted(took_s=10.0, *, within_s=10.0, ok=False, overdue=True):
    ended = Operation(kind="Restart", id=9, started_at=ago(took_s + 0.1), ended_at=ago(0.1), ok=ok, why="" if ok else "too slow", facts={} if ok else {"overdue": overdue})
    return CRASHED.but(ended=ended, memory__restart_within_s=within_s, memory__last_ended_id=8)


@pytest.mark.parametrize(("world", "overdue"), [
    (restarted(), True), (restarted(1000.0, overdue=False), False), (restarted(ok=True), False), (restarted(within_s=0.0), False)])
def test_a_primary_that_is_not_back_in_time_is_overdue(world, overdue):
    memory = note_ended(world.seen, world.memory)
    assert (memory.restart_overdue, memory.restart_within_s) == (overdue, 0.0)


def test_then_somebody_else_is_to_lead_if_there_is_somebody():
    assert only(restarted(10.0).decide(), Demote).release
    alone = restarted(10.0).but(peers={}, memory__last_start_failed_at=ago(40)).but(ended__ended_at=ago(40), ended__started_at=ago(50)).decide()
    assert refused(alone) and only(alone, StartPrimary)


def test_how_long_it_may_take_is_remembered_only_of_a_primary():
    assert LEADER.but(requests=(asked(timeout_s=4.0),)).decide().memory.restart_within_s == 4.0
    assert HERE.but(requests=(asked(timeout_s=4.0),)).decide().memory.restart_within_s == 0.0
    assert LEADER.but(memory__restart_overdue=True).decide().memory.restart_overdue is False


# --- words ---------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("text", "number"), [("16", 160000), ("16.4", 160004), ("9.6.3", 90603), (" 15.6 ", 150006), ("9.6", 90600)])
def test_versions(text, number):
    assert server_version(text) == number


@pytest.mark.parametrize("text", ["", "x", "16.4.1", "160004", "16.", "-1", "1٦"])
def test_no_versions(text):
    with pytest.raises(ValueError, match="is no version"):
        server_version(text)


@pytest.mark.parametrize("text", ["", "x", "2030", "2030-13-01T00:00Z", "10000-01-01T00:00Z", "2030-01-01", "2030-01-01T00:00", "2030-01-01T00:00:00 Europe/Berlin"])
def test_no_moments(text):
    with pytest.raises(ValueError):
        moment(text)


def test_a_live_record_of_another_makes_no_difference_to_what_is_scheduled():
    free = with_lock(HERE, None, absent_since=ago(1)).but(memory__scheduled_restart=scheduled("2030-01-01T00:00:00Z"))
    assert free.decide().memory.scheduled_restart is not None
