"""Failsafe mode in decisions (decide/failsafe.py): whom a leader asks, what it writes down, and how a promise holds a candidate."""

from __future__ import annotations

import json

import pytest
from decide_world import (
    CANDIDATE,
    CRASHED,
    LEADER,
    LSN,
    NOW,
    PASS,
    REPLICA,
    World,
    ago,
    check,
    licence,
    names,
    only,
    primary_row,
    record,
    refused,
    row,
    slot,
    standby_row,
    with_lock,
)
from msgspec.structs import replace

from pgha.decide import failsafe, lease
from pgha.decide.standing import Whose, standing
from pgha.model.action import AcquireLock, MaintainSlots, WriteKey
from pgha.model.decision import Decision
from pgha.model.failsafe import FailsafeOrder, Promise
from pgha.model.lock import Licence, LicenceState, demote_at
from pgha.model.observation import Operation

LISTED = {n: f"http://{n}:8008" for n in "abc"}
ON = LEADER.but(settings__failsafe_mode=True, dcs__view__failsafe=LISTED)
#: The store has been silent for 12 s, and a round has succeeded 2 s ago.
CARRIED = ON.but(licence=licence(sequence=9, by_failsafe=True, failing_since=ago(12)), dcs__unreachable_since=ago(12), dcs__heard_at=ago(12), dcs__read_at=ago(12))
#: b has promised to a, 10 s ago, by the round after the record that it sees.
GIVEN = Promise(name="a", accepted_at=ago(10), ttl_s=30.0, incarnation="run-a", epoch=5, sequence=9, slots={"c": LSN})
PROMISED = CANDIDATE.but(settings__failsafe_mode=True, dcs__view__failsafe=LISTED, failsafe__promise=GIVEN)


# --- whom to ask -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("why", "changes", "refuses"), [
    ("healthy", {}, ()),
    ("off", {"settings__failsafe_mode": False}, ("failsafe.mode_is_on",)),
    ("pause is wanted, and not in the record yet", {"settings__pause": True}, ()),
    ("not listed", {"dcs__view__failsafe": {"b": "u"}}, ("failsafe.leader_is_listed",)),
    ("no list", {"dcs__view__failsafe": {}}, ("failsafe.leader_is_listed",)),
    ("no licence", {"licence": Licence()}, ("failsafe.is_licensed",)),
    ("paused in the record", {"licence__mode": "paused"}, ("failsafe.is_licensed",)),
    ("giving it back", {"licence__state": LicenceState.RELEASING}, ("failsafe.is_licensed",)),
    ("it has ended", {"licence__valid_until": ago(1)}, ("failsafe.is_licensed",)),
    ("stopping", {"shutting_down": True}, ("failsafe.nothing_ends_it",)),
    ("being demoted", {"operation": Operation(kind="Demote", id=1, started_at=ago(1))}, ("failsafe.nothing_ends_it",)),
    ("starting again in place", {"operation": Operation(kind="StartPrimary", id=1, started_at=ago(1))}, ()),
], ids=lambda value: value if isinstance(value, str) else "")
def test_when_the_others_are_asked(why, changes, refuses):
    world = ON.but(**changes)
    assert tuple(r.rule for r in failsafe.conditions(world.seen, world.memory) if not r.holds) == refuses, why
    assert (world.decide().failsafe is None) is bool(refuses), why


def test_all_who_are_listed_or_members_are_asked():
    world = ON.but(dcs__view__failsafe={**LISTED, "d": "http://d:8008"}, dcs__view__members__c=replace(ON.seen.dcs.view.members["c"], api_url="http://c-moved:8008"))
    members = world.decide().failsafe.members
    assert members == {"b": "http://b:8008", "c": "http://c-moved:8008", "d": "http://d:8008"}
    unlisted = ON.but(dcs__view__failsafe={n: LISTED[n] for n in "ab"}).decide().failsafe.members
    assert set(unlisted) == {"b", "c"}, "a list with c may be on its way"
    remembered = ON.but(dcs__remembered_members={**LISTED, "old": "http://old:8008"}).decide().failsafe.members
    assert set(remembered) == {"b", "c"}, "who is not listed may not take over"


def test_a_nofailover_member_is_asked_too():
    """It may be told otherwise while this leader cannot hear of it."""
    member = ON.seen.dcs.view.members["b"]
    assert "b" in ON.but(dcs__view__members__b=replace(member, tags=replace(member.tags, nofailover=True))).decide().failsafe.members


def test_they_are_told_where_the_slots_are():
    assert ON.decide().failsafe.slots == {"a": LSN, "b": LSN - 1024 * 1024, "c": LSN - 1024 * 1024}


def test_a_member_alone_asks_nobody():
    world = ON.but(dcs__view__failsafe={"a": LISTED["a"]}, dcs__view__members={"a": ON.seen.dcs.view.members["a"]})
    assert world.decide().failsafe == FailsafeOrder(members={}, slots=ON.decide().failsafe.slots)


def test_a_crashed_primary_may_be_started_in_place_under_it():
    assert CRASHED.but(settings__failsafe_mode=True, dcs__view__failsafe=LISTED).decide().failsafe is not None


# --- the leader --------------------------------------------------------------------------------------------------------

CARRIES = [
    row("a round was accepted 2 s ago", situation="leading", does="", summary="continue to run as a leader because failsafe mode is enabled and all members are accessible"),
    row("accepted so long ago that the demotion begins", licence__since=ago(18.3), licence__valid_until=ago(18.3).plus_s(29.7), failsafe__missing={"c": "no answer in time"},
        situation="lease", refuses="lease.licence_lasts", does="Demote", says="failsafe: not accepted by c (no answer in time)"),
    row("the status is not due to be written to a store that is away", memory__last_status_at=ago(60), dcs__view__status__raw={}, does=""),
    row("the list is not changed while it counts", dcs__view__failsafe={"a": LISTED["a"]}, dcs__unreachable_since=None, memory__last_status_at=ago(1), does=""),
]


@pytest.mark.parametrize("case", CARRIES)
def test_a_leader_without_the_store(case):
    check(CARRIED, case)


def test_demotion_still_begins_in_time():
    seen = CARRIED.but(licence__since=ago(18.3), licence__valid_until=ago(18.3).plus_s(29.7)).seen
    begin = demote_at(seen.licence.valid_until, seen.licence.ttl_s, since=seen.licence.since, loop_wait_s=seen.settings.loop_wait_s)
    assert begin <= NOW
    assert not lease.licence_lasts(seen).holds


@pytest.mark.parametrize(("why", "changes", "members"), [
    ("nothing written yet", {"dcs__view__failsafe": {}}, "abc"),
    ("as it is", {}, None),
    ("off, and nothing there", {"settings__failsafe_mode": False, "dcs__view__failsafe": {}}, None),
    ("off, and a list that must not go stale", {"settings__failsafe_mode": False, "dcs__view__failsafe": {"a": "x"}}, "abc"),
    ("somebody came", {"dcs__view__failsafe": {n: LISTED[n] for n in "ab"}}, "abc"),
    ("somebody is at another address", {"dcs__view__failsafe": {**LISTED, "b": "http://old:8008"}}, "abc"),
    ("somebody went", {"dcs__view__members": {n: m for n, m in ON.seen.dcs.view.members.items() if n != "c"}}, "ab"),
    ("its key went, and it streams from here", {
        "dcs__view__members": {n: m for n, m in ON.seen.dcs.view.members.items() if n != "c"},
        "postgres__row": primary_row(replication=({"application_name": "c", "state": "streaming"},))}, None),
    ("only this leader's own key went", {"dcs__view__members": {n: m for n, m in ON.seen.dcs.view.members.items() if n != "a"}}, None),
    ("this leader has no key yet", {"dcs__view__failsafe": {}, "dcs__view__members": {n: m for n, m in ON.seen.dcs.view.members.items() if n != "a"}}, None),
    ("the store does not answer", {"dcs__view__failsafe": {}, "dcs__unreachable_since": ago(1)}, None),
    ("the licence is the others' word", {"dcs__view__failsafe": {}, "licence__by_failsafe": True}, None),
], ids=lambda value: value if isinstance(value, str) else "")
def test_the_list_is_kept_true(why, changes, members):
    actions = [a for a in ON.but(**changes).decide().actions if isinstance(a, WriteKey) and a.key == "failsafe"]
    if members is None:
        assert actions == [], why
    else:
        assert [json.loads(a.value) for a in actions] == [{n: LISTED[n] for n in members}], why
        assert (actions[0].epoch_revision, actions[0].if_revision) == (50, 0), "guarded by the epoch"


# --- lists that may still arrive ---------------------------------------------------------------------------------------

D = "http://d:8008"
MEMBERS = ON.seen.dcs.view.members
#: d is a member, and the key has revision 70 without it.
CAME = ON.but(dcs__view__members={**MEMBERS, "d": replace(MEMBERS["b"], name="d", api_url=D)}, dcs__view__revisions={**ON.seen.dcs.view.revisions, "failsafe": 70})


def passes(world: World, *changes: dict[str, object]) -> list[Decision]:
    """One pass after the other, each with what has changed before it."""
    decisions = []
    for change in changes:
        world = world.but(**change)
        decisions.append(world.decide())
        world = replace(world, memory=decisions[-1].memory)
    return decisions


def listed(decision: Decision) -> list[str]:
    return ["".join(sorted(json.loads(a.value))) for a in decision.actions if isinstance(a, WriteKey) and a.key == "failsafe"]


def test_who_stands_in_a_list_that_may_still_arrive_is_asked_though_its_key_has_vanished():
    gone, silent = {"dcs__view__members": MEMBERS}, {"dcs__unreachable_since": ago(1)}
    came, vanished, away, back, moved = passes(CAME, {}, gone, silent, {"dcs__unreachable_since": None}, {"dcs__view__revisions__failsafe": 71})
    assert (listed(came), set(came.failsafe.members)) == (["abcd"], set("bcd"))
    assert vanished.failsafe.members == {"b": LISTED["b"], "c": LISTED["c"], "d": D}
    assert listed(vanished) == ["abc"], "as the key says already: what was sent before cannot arrive after it"
    assert (set(away.failsafe.members), listed(away)) == (set("bcd"), [])
    assert set(back.failsafe.members) == set("bcd")
    assert (set(moved.failsafe.members), listed(moved)) == (set("bc"), [])


def test_all_lists_that_were_sent_count():
    other = {"dcs__view__members": {**MEMBERS, "e": replace(MEMBERS["b"], name="e", api_url="http://e:8008")}}
    *_, last = passes(CAME, {}, other, {"dcs__view__members": MEMBERS})
    assert set(last.failsafe.members) == set("bcde")


def test_what_was_sent_in_a_former_reign_cannot_arrive_in_this_one():
    *_, last = passes(CAME, {}, {"dcs__view__members": MEMBERS, "licence__epoch_revision": 80})
    assert (set(last.failsafe.members), listed(last)) == (set("bc"), [])


def test_a_restarted_agent_asks_nobody_before_a_list_of_its_own_is_written():
    readopted = CAME.but(dcs__view__members=MEMBERS, dcs__view__epoch__incarnation="run-a-before")
    first, second, moved = passes(readopted, {}, {}, {"dcs__view__revisions__failsafe": 71})
    for early in (first, second):
        assert (early.failsafe, listed(early)) == (None, ["abc"]), "the former one may have listed d"
    assert (set(moved.failsafe.members), listed(moved)) == (set("bc"), [])
    off, = passes(readopted, {"settings__failsafe_mode": False})
    assert listed(off) == [], "nobody relies on it"


# --- who has promised --------------------------------------------------------------------------------------------------

def test_without_a_promise_the_candidate_takes_the_lock():
    assert names(PROMISED.but(failsafe__promise=None).decide()) == ("AcquireLock",)


HOLDS = [
    row("promised 10 s ago", situation="following", summary="following a leader (a)", says="a leads by failsafe mode: promised not to take over for another 20.3 s"),
    row("promised 30.2 s ago", failsafe__promise__accepted_at=ago(30.2), situation="following"),
    row("promised 30.4 s ago", failsafe__promise__accepted_at=ago(30.4), situation="leaderless", does="AcquireLock"),
    row("the mode was switched off since", settings__failsafe_mode=False, situation="following"),
    row("its record was released before it asked", lock__mode="released", situation="following"),
    row("its record was released after it had asked", lock__mode="released", lock__sequence=10, situation="leaderless", does="AcquireLock"),
    row("another's record", lock__holder="c", lock__node_id="id-c", lock__incarnation="run-c", situation="following", summary="following a leader (a)"),
    row("assumed, of before this boot", failsafe__promise=replace(GIVEN, name="", incarnation=""), situation="leaderless", refuses="failsafe.nothing_is_promised",
        says="promised to a leader of before this boot"),
]


@pytest.mark.parametrize("case", HOLDS)
def test_a_promise_holds_a_candidate(case):
    decision = check(PROMISED, case)
    assert (AcquireLock in map(type, decision.actions)) is (case.does == ("AcquireLock",))


def test_an_absent_record_is_not_free_either():
    world = with_lock(PROMISED, None, absent_since=ago(99))
    assert standing(world.seen).whose is Whose.LIVE
    assert standing(world.but(failsafe__promise=None).seen).whose is Whose.FREE


def test_its_own_former_record_is_not_adopted():
    """A take-over that was given up may arrive after the promise."""
    world = with_lock(PROMISED, record("b", incarnation="run-0"))
    decision = world.decide()
    assert "failsafe.nothing_is_promised" in refused(decision)
    assert AcquireLock not in map(type, decision.actions)
    stopped = world.but(postgres__process="absent", postgres__row=None, directory__control__state="in production")
    assert "failsafe.nothing_is_promised" in refused(stopped.decide())
    assert AcquireLock not in map(type, stopped.decide().actions)


LISTS = [
    row("listed", does="AcquireLock"),
    row("nobody is", dcs__view__failsafe={}, does="AcquireLock"),
    row("others are", dcs__view__failsafe={n: LISTED[n] for n in "ac"}, refuses="failsafe.is_listed", does="", says="the key failsafe lists a, c, not b: if its leader is certainly down, delete that key"),
    row("others are, and the mode is off now", dcs__view__failsafe={n: LISTED[n] for n in "ac"}, settings__failsafe_mode=False, refuses="failsafe.is_listed", does=""),
    row("who is only listed is waited for", dcs__view__failsafe={**LISTED, "d": "http://d:8008"}, refuses="promotion.peers_were_waited_for", memory__election__voted_at=ago(0.1), does="",
        says="d without a final position"),
]


@pytest.mark.parametrize("case", LISTS)
def test_who_is_not_listed_may_not_race(case):
    check(PROMISED.but(failsafe__promise=None), case)


def test_who_is_only_listed_is_asked_for_its_position():
    world = PROMISED.but(failsafe__promise=None, dcs__view__failsafe={**LISTED, "d": "http://d:8008"})
    assert "d" in world.decide().ask_peers.names


def test_the_list_that_was_judged_is_compared():
    assert only(PROMISED.but(failsafe__promise=None, dcs__view__revisions={**PROMISED.seen.dcs.view.revisions, "failsafe": 77}).decide(), AcquireLock).also_unchanged["failsafe"] == 77


def test_slots_advance_to_what_the_ping_says():
    slots = (slot("a", active=False, restart_lsn=LSN), slot("c", active=False, restart_lsn=LSN - 5))
    world = REPLICA.but(postgres__row=standby_row(slots=slots), dcs__view__status__slots={}, failsafe__promise=GIVEN)
    assert only(world.decide(), MaintainSlots).advance == (("c", LSN),)
    assert MaintainSlots not in map(type, world.but(failsafe__promise=None).decide().actions)
    over = world.but(failsafe__promise__accepted_at=ago(31))
    assert MaintainSlots not in map(type, over.decide().actions)


# --- for others to see -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("why", "world", "active"), [
    ("a leader by its record", ON, False),
    ("a leader by the others' word", CARRIED, True),
    ("whose time is over", CARRIED.but(licence__valid_until=ago(1)), False),
    ("who has promised", PROMISED, True),
    ("whose promise is over", PROMISED.but(failsafe__promise__accepted_at=ago(31)), False),
    ("whose leader has renewed since", PROMISED.but(lock__sequence=10), False),
    ("who only assumes to have promised", PROMISED.but(failsafe__promise__name=""), False),
], ids=lambda value: value if isinstance(value, str) else "")
def test_when_it_counts_as_active(why, world, active):
    assert failsafe.is_active(world.seen) is active, why
    assert world.seen.number == PASS
