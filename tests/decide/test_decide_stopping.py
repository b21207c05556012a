"""The first rungs: stopping, foreign, blind; and what every decision carries (finish)."""

from __future__ import annotations

import pytest
from decide_world import (
    BIRTH,
    CANDIDATE,
    CRASHED,
    EMPTY,
    LEADER,
    LSN,
    REPLICA,
    STOPPED,
    SYSTEM,
    TIMELINE,
    MiB,
    ago,
    check,
    names,
    only,
    record,
    row,
    with_lock,
)
from msgspec.structs import replace

from pgha.clock import remaining_s
from pgha.model.action import Demote, ReleaseLock, StartStandby, Stop
from pgha.model.lock import Licence
from pgha.model.node import PostgresFacts
from pgha.model.observation import Operation

# --- stopping ------------------------------------------------------------------------------------------------------------

STOPS = [
    (LEADER, "Demote", "stopping PostgreSQL"),
    (REPLICA, "Stop", "stopping PostgreSQL"),
    (LEADER.but(licence=Licence()), "Demote", "stopping PostgreSQL"),
    (CRASHED, "ReleaseLock", "giving the lock back"),
    (STOPPED, "", "stopped"),
    (BIRTH, "", "stopped"),
    (EMPTY.but(dcs__view=None), "", "stopped"),
]


@pytest.mark.parametrize("world, does, summary", STOPS)
def test_an_agent_that_was_told_to_stop(world, does, summary):
    decision = world.but(shutting_down=True).decide()
    assert (decision.situation, names(decision), decision.summary) == ("stopping", tuple(does.split()), summary)
    assert decision.memory.shutdown_done == (does in ("", "ReleaseLock"))


def test_a_leader_stops_in_order_and_gives_back_with_its_last_position():
    demote = only(LEADER.but(shutting_down=True).decide(), Demote)
    assert (demote.mode, demote.release, demote.checkpoint, demote.timeout_s) == ("fast", True, True, 300)
    release = only(CRASHED.but(shutting_down=True).decide(), ReleaseLock)
    assert (release.lsn, release.timeline) == (LSN - MiB, TIMELINE)
    assert only(CRASHED.but(shutting_down=True, directory__control=None).decide(), ReleaseLock).lsn == 0


@pytest.mark.parametrize("licence", [CRASHED.seen.licence, Licence()])
def test_orphans_are_killed_before_an_agent_stops(licence):
    assert names(CRASHED.but(shutting_down=True, postgres__orphans=True, licence=licence).decide()) == ("Sweep",)


# --- foreign -------------------------------------------------------------------------------------------------------------

IMPOSTOR = with_lock(REPLICA, record("b", node_id="id-x"), since=ago(1))

FOREIGN = [
    row("another system", dcs__view__initialize="9" * 19, situation="foreign", refuses="foreign.system_identifier_matches",
        says=(f"the data directory's system identifier is {SYSTEM}", "the cluster's is " + "9" * 19), does="Stop", summary="not taking part"),
    row("another system, nothing runs", dcs__view__initialize="9" * 19, postgres=PostgresFacts(), refuses="foreign.system_identifier_matches", does=""),
    row("no system yet", dcs__view__initialize=None, situation="following"),
    row("initialize is nonsense", dcs__view__initialize="x", situation="following"),
    row("pg_control cannot be read", dcs__view__initialize="9" * 19, directory__control=None, situation="following"),
    row("the store was not read yet", dcs__view=None, situation="blind"),
    row("its own", situation="following"),
]


@pytest.mark.parametrize("case", FOREIGN)
def test_foreign_data(case):
    check(REPLICA, case)


NAMES = [
    row("fresh", situation="foreign", refuses="foreign.name_is_ours", says=("another node (id id-x) holds the lock under the name b", "give each node its own `name`"), does="Stop"),
    row("and another system", dcs__view__initialize="9" * 19, refuses="foreign.name_is_ours foreign.system_identifier_matches", does="Stop"),
    row("nothing runs", postgres=PostgresFacts(), does=""),
    row("expired", dcs__lock_seen__since=ago(31), situation="leaderless"),
]


@pytest.mark.parametrize("case", NAMES)
def test_a_foreign_name(case):
    check(IMPOSTOR, case)


def test_a_foreign_primary_is_killed():
    demote = only(LEADER.but(dcs__view__initialize="9" * 19).decide(), Demote)
    assert (demote.mode, demote.release) == ("kill", True)
    assert only(LEADER.but(dcs__view__initialize="9" * 19, licence=Licence()).decide(), Demote).release is False
    assert only(IMPOSTOR.decide(), Stop).why == "foreign data or name"


# --- blind ---------------------------------------------------------------------------------------------------------------

BLIND = STOPPED.but(dcs__view=None, dcs__unreachable_since=ago(6), dcs__why="connection refused", memory__upstream_asked_at=None)

WITHOUT_A_STORE = [
    row("a standby is started after a while", situation="blind", refuses="blind.store_was_read", says="no answer for 6.0 s: connection refused", does="StartStandby"),
    row("not yet", dcs__unreachable_since=ago(4.9), refuses="blind.store_was_read", does=""),
    row("just started", dcs__unreachable_since=None, dcs__why="", says="just started", does=""),
    row("it was a primary", directory__control__state="in production", does=""),
    row("nothing is known of it", directory__control=None, does=""),
    row("orphans live", postgres__orphans=True, does=""),
    row("it failed to start", memory__start_failures=1, does=""),
    row("it runs", postgres=REPLICA.seen.postgres, situation="blind", does=""),
]


@pytest.mark.parametrize("case", WITHOUT_A_STORE)
def test_without_a_store(case):
    check(BLIND, case)


def test_what_a_rewind_left_half_done_is_not_started_without_a_store():
    assert BLIND.but(directory__rewind_interrupted=True).decide().actions == ()


def test_who_is_not_known_is_not_followed():
    assert only(BLIND.decide(), StartStandby).upstream is None


# --- finish --------------------------------------------------------------------------------------------------------------

def in_flight(kind, *, for_s=1.0):
    return Operation(kind=kind, id=1, started_at=ago(for_s))


MANDATES = [
    ("a standby", REPLICA, "none", None),
    ("an expired licence", LEADER.but(licence__valid_until=ago(1)), "none", None),
    ("a primary that answers", LEADER, "running", 29.8),
    ("a primary that has been silent", LEADER.but(postgres__answered_at=ago(20)), "running", 10),
    ("a loop that is to decide soon", LEADER.but(settings__loop_wait_s=2.0), "running", 6),
    ("starting in place", CRASHED, "starting", 30),
    ("starting", CRASHED.but(operation=in_flight("StartPrimary")), "starting", 30),
    ("starting, nearly too long", CRASHED.but(operation=in_flight("StartPrimary", for_s=598)), "starting", 2),
    ("restarting", CRASHED.but(operation=in_flight("Restart", for_s=595)), "starting", 5),
    ("stopping", LEADER.but(operation=in_flight("Demote", for_s=303)), "stopping", 2),
    ("stopping with a limit", LEADER.but(operation=in_flight("Stop", for_s=9), settings__primary_stop_timeout_s=10.0), "stopping", 6),
    ("promoting", LEADER.but(operation=in_flight("Promote", for_s=595)), "starting", 5),
    ("copying", LEADER.but(operation=in_flight("Clone", for_s=55)), "operation", 5),
    ("a standby with the lock", LEADER.but(postgres__row__in_recovery=True), "starting", 30),
]


@pytest.mark.parametrize("name, world, kind, until_s", MANDATES, ids=[m[0] for m in MANDATES])
def test_the_renewers_mandate(name, world, kind, until_s):
    mandate = world.decide().mandate
    assert mandate.kind == kind
    assert (None if mandate.until is None else remaining_s(mandate.until, world.seen.now)) == (until_s if until_s is None else pytest.approx(until_s))


STATES = [
    (LEADER, "running", "primary"),
    (REPLICA, "running", "replica"),
    (LEADER.but(postgres__row=None, postgres__process="starting"), "starting", "replica"),
    (LEADER.but(postgres__process="stopping"), "stopping", "primary"),
    (replace(CRASHED, seen=replace(CRASHED.seen, shutting_down=True)), "stopped", "replica"),
    (CRASHED.but(postgres__orphans=True), "crashed", "replica"),
    (REPLICA.but(operation=in_flight("Clone")), "creating replica", "replica"),
    (BIRTH.but(operation=in_flight("Bootstrap")), "initializing new cluster", "uninitialized"),
    (LEADER.but(operation=in_flight("Restart")), "restarting", "primary"),
    (LEADER.but(operation=in_flight("Demote")), "stopping", "demoted"),
    (LEADER.but(operation=in_flight("Rewind")), "running", "primary"),
    (CRASHED, "starting", "primary"),
    (CANDIDATE, "running", "replica"),
    (STOPPED.but(directory__state="unreadable"), "stopped", "replica"),
]


@pytest.mark.parametrize("world, state, role", STATES)
def test_the_state_that_others_see(world, state, role):
    decision = world.decide()
    assert (decision.state, decision.role) == (state, role)


