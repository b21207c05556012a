"""A long operation is in flight (decide/busy.py), or has ended (decide/ended.py)."""

from __future__ import annotations

import pytest
from decide_world import (
    CANDIDATE,
    CRASHED,
    EMPTY,
    LEADER,
    LSN,
    NOW,
    REPLICA,
    WINNER,
    ago,
    ahead,
    check,
    names,
    only,
    peer,
    row,
)
from msgspec.structs import replace

from pgha.decide.ended import note_ended
from pgha.model.action import CancelOperation
from pgha.model.cluster import Tags
from pgha.model.decision import Election, Memory
from pgha.model.lock import Licence
from pgha.model.observation import Operation


def operation(kind, **changes):
    return replace(Operation(kind=kind, id=9, started_at=ago(12), progress="half"), **changes)


@pytest.mark.parametrize("kind", ["Bootstrap", "Clone", "StartStandby", "Demote", "Stop", "Restart", "InspectUpstream", "InspectEndOfWal", "Rewind", "Sweep", "AbandonDirectory"])
def test_operations_go_on(kind):
    decision = REPLICA.but(operation=operation(kind)).decide()
    assert (decision.situation, decision.actions) == ("busy", ())
    assert decision.reasons[0].because == f"{kind} for 12.0 s half"
    assert all(r.holds for r in decision.reasons)


PROMOTING = [
    row("with a licence", refuses="", does="", summary="promote in progress"),
    row("the fence is near", licence__valid_until=ahead(1.6), refuses="", says="0.1 s to the fence"),
    row("the fence has passed", licence__valid_until=ahead(1.4), refuses="busy.licence_suffices", does="CancelOperation", says="-0.1 s to the fence", summary="ending it"),
    row("the licence is gone", licence=Licence(), refuses="busy.licence_suffices", does="CancelOperation"),
    row("it is being ended already", licence=Licence(), operation__cancelling=True, refuses="busy.licence_suffices", does="", summary="ending it"),
]


@pytest.mark.parametrize("kind", ["Promote", "StartPrimary"])
@pytest.mark.parametrize("case", PROMOTING)
def test_what_makes_a_primary_ends_with_the_licence(case, kind):
    check(WINNER.but(operation=operation(kind)), replace(case, summary=case.summary.replace("promote", kind.lower())))


def test_the_one_in_flight_is_ended_and_told_why():
    action = only(WINNER.but(operation=operation("Promote"), licence=Licence()).decide(), CancelOperation)
    assert (action.id, action.why) == (9, "-1.0 s to the fence")


@pytest.mark.parametrize("kind, ends", [("Bootstrap", True), ("Clone", True), ("InspectUpstream", True), ("InspectEndOfWal", True), ("Rewind", False), ("StartStandby", False), ("Stop", False)])
def test_an_agent_that_stops_ends_what_can_be_begun_again(kind, ends):
    decision = EMPTY.but(operation=operation(kind), shutting_down=True).decide()
    assert decision.situation == "busy"
    assert (names(decision) == ("CancelOperation",)) == ends
    assert [r.because for r in decision.reasons if r.rule == "busy.still_wanted"] == ["the agent is stopping" if ends else "nothing speaks against it"]


@pytest.mark.parametrize("kind, ends", [("Clone", True), ("Rewind", True), ("StartStandby", False)])
def test_who_holds_the_lock_copies_from_nobody(kind, ends):
    decision = LEADER.but(operation=operation(kind)).decide()
    assert (names(decision) == ("CancelOperation",)) == ends
    assert [r.holds for r in decision.reasons if r.rule == "busy.still_wanted"] == [not ends]


@pytest.mark.parametrize(("kind", "ends"), [("InspectUpstream", True), ("InspectEndOfWal", False), ("StartStandby", False), ("Clone", False)])
def test_a_question_to_a_leader_ends_as_soon_as_its_lock_is_free(kind, ends):
    """A host that is gone may leave it without an answer for seconds, in which this member could neither vote nor lead."""
    decision = CANDIDATE.but(operation=operation(kind)).decide()
    assert (names(decision) == ("CancelOperation",)) == ends
    assert decision.memory.election == CANDIDATE.memory.election
    live = REPLICA.but(operation=operation(kind), dcs__lock_seen__since=ago(30.0)).decide()
    assert names(live) == ()
    assert live.wake_in_s == pytest.approx(0.3 if kind == "InspectUpstream" else 1.0), "no news wakes the loop when a record expires"


@pytest.mark.parametrize("kind", ["StartPrimary", "InspectEndOfWal"])
def test_the_others_are_asked_while_a_hand_over_may_be_judged(kind):
    """A hand-over is judged right after the end of WAL was found: who was asked before must not have to answer anew."""
    asked = CRASHED.but(operation=operation(kind)).decide().ask_peers
    assert asked == CRASHED.decide().ask_peers
    assert set(asked.names) == {"b", "c"}


STARTING = CRASHED.but(operation=operation("StartPrimary"), memory__crash_seen_at=ago(3.5))

HAND_OVERS = [
    row("b and c have what was published", refuses="busy.crash_is_not_handed_over", says=("writes away for 3.5 s (limit 3 s)", "b, c may take over"), does="CancelOperation"),
    row("not long enough", memory__crash_seen_at=ago(2.9), refuses="", says="writes away for 2.9 s, handed over after 3 s", does=""),
    row("looked at before", memory__handover_judged_at=ago(1), refuses="", does=""),
    row("no crash", memory__crash_seen_at=None, refuses="", does=""),
    row("nobody has it all", peers={"c": peer("c", lsn=LSN - 1)}, refuses="", says="no peer has what was published", does=""),
    row("nobody may lead", peers={"c": peer("c", tags=Tags(nofailover=True))}, refuses="", does=""),
    row("nobody answers", peers={"c": peer("c", asked_at=ago(2))}, refuses="", does=""),
    row("c is a primary", peers={"c": peer("c", in_recovery=False)}, refuses="", does=""),
    row("nothing was published", dcs__view__status__optime=0, lock__lsn=0, refuses="", does=""),
    row("/status is ahead of the record", dcs__view__status__optime=LSN + 1, refuses="", does=""),
    row("the record is ahead of /status", lock__lsn=LSN + 1, refuses="", does=""),
    row("the store was never read", dcs__view=None, refuses="", does=""),
]


@pytest.mark.parametrize("case", HAND_OVERS)
def test_a_start_in_place_that_takes_long(case):
    check(STARTING, case)


def test_peers_are_asked_during_a_start_in_place():
    assert set(STARTING.decide().ask_peers.names) == {"b", "c"}
    assert REPLICA.but(operation=operation("StartStandby")).decide().ask_peers.names == {}


# --- ended ---------------------------------------------------------------------------------------------------------------

def noted(kind, *, ok, why="x", facts=None, **memory):
    ended = Operation(kind=kind, id=4, started_at=ago(9), ended_at=ago(1), ok=ok, why=why, facts=facts or {})
    world = REPLICA.but(ended=ended, postgres__answer="none")
    return note_ended(world.seen, Memory(**memory))


@pytest.mark.parametrize("kind, ok, before, after", [
    ("StartStandby", False, {"start_failures": 2}, {"start_failures": 3, "last_start_failed_at": ago(1)}),
    ("StartPrimary", False, {}, {"start_failures": 1, "last_start_failed_at": ago(1)}),
    ("Restart", False, {}, {"start_failures": 1, "last_start_failed_at": ago(1)}),
    ("StartStandby", True, {"start_failures": 2, "last_start_failed_at": ago(9)}, {}),
    ("Clone", False, {"clone_failures": 1}, {"clone_failures": 2, "last_clone_failed_at": ago(1)}),
    ("Clone", True, {"clone_failures": 2, "last_clone_failed_at": ago(9), "rewind_failed": "y", "start_failures": 3}, {}),
    ("Bootstrap", False, {}, {"clone_failures": 1, "last_clone_failed_at": ago(1)}),
    ("Promote", True, {"election": Election(epoch=1, lock_revision=1, began_at=NOW), "promotion_failed_at": NOW}, {}),
    ("Promote", False, {}, {"promotion_failed_at": ago(1), "stand_back_until": ahead(10), "stand_back_why": "its promotion failed: x"}),
    ("Demote", True, {"election": Election(epoch=1, lock_revision=1, began_at=NOW), "promotion_failed_at": NOW, "holding_since": NOW}, {}),
    ("Rewind", False, {"upstream_asked_at": NOW}, {"rewind_failures": 1, "last_rewind_failed_at": ago(1)}),
    ("Rewind", True, {"rewind_failed": "y", "rewind_failed_for": "a/3", "rewind_failures": 3, "last_rewind_failed_at": ago(9), "upstream_asked_at": NOW}, {}),
    ("Sweep", True, {}, {}),
])
def test_what_is_remembered_of_an_operation(kind, ok, before, after):
    assert noted(kind, ok=ok, **before) == Memory(last_ended_id=4, **after)


def test_a_rewind_that_failed_without_a_word_has_failed_all_the_same():
    assert noted("Rewind", ok=False, why="", facts={"final": True}).rewind_failed == "unknown"
    assert noted("Rewind", ok=False, facts={"final": True}).rewind_failed == "x"


def test_a_demotion_that_gave_the_lock_back_leaves_the_field_to_others():
    assert noted("Demote", ok=True, facts={"released": True}, crash_seen_at=NOW, promotion_failed_at=NOW) == Memory(
        last_ended_id=4, stand_back_until=ahead(10), stand_back_why="it has just handed the lock over")


def test_a_bootstrap_leaves_its_claim():
    memory = noted("Bootstrap", ok=True, facts={"system_identifier": "7", "initialize_revision": 12}, clone_failures=2)
    assert memory == Memory(last_ended_id=4, bootstrap_identifier="7", bootstrap_revision=12)


def test_each_end_is_noted_once_and_none_in_flight():
    assert noted("StartStandby", ok=False, last_ended_id=4) == Memory(last_ended_id=4)
    running = REPLICA.but(ended=operation("StartStandby"), postgres__answer="none")
    assert note_ended(running.seen, Memory()) == Memory()


def test_a_server_that_answers_ends_crash_and_failures():
    memory = Memory(crash_seen_at=NOW, handover_judged_at=NOW, start_failures=2, last_start_failed_at=NOW)
    assert note_ended(LEADER.seen, memory) == Memory()
    assert note_ended(LEADER.but(postgres__answer="starting").seen, memory) == memory


def test_since_when_a_standby_does_not_stream():
    still = REPLICA.but(postgres__row__receiver=None)
    assert note_ended(still.seen, Memory()).not_streaming_since == NOW
    assert note_ended(still.seen, Memory(not_streaming_since=ago(5))).not_streaming_since == ago(5)
    assert note_ended(REPLICA.seen, Memory(not_streaming_since=ago(5))).not_streaming_since is None
    assert note_ended(LEADER.seen, Memory(not_streaming_since=ago(5))).not_streaming_since is None
