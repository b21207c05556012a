"""Pause (decide/paused.py): what is left alone, what goes on, and what is as ever because the record does not say so."""

from __future__ import annotations

import pytest
from decide_world import (
    CANDIDATE,
    CRASHED,
    EMPTY,
    LEADER,
    LSN,
    REPLICA,
    STOPPED,
    World,
    ago,
    ahead,
    check,
    licence,
    only,
    peer,
    primary_row,
    record,
    refused,
    row,
    slot,
    standby_row,
    with_lock,
    without,
)
from msgspec.structs import replace

from pgha.clock import NEVER
from pgha.decide import decide
from pgha.decide.standing import Whose, standing
from pgha.model.action import AcquireLock, Demote, MaintainSlots, Restart, StandDown
from pgha.model.cluster import FailoverKey, PausedHolder
from pgha.model.lock import Epoch, Licence, LicenceState
from pgha.model.node import DataDirectoryFacts, GuardFacts, PostgresFacts, WalReceiver
from pgha.model.observation import Operation, Upstream
from pgha.model.request import Request

ENDLESS = licence(mode="paused", valid_until=NEVER)
GUARD = GuardFacts(reachable=True, state="paused")


def paused(world: World, **changes: object) -> World:
    """Pause is wanted, and the record says so."""
    return world.but(settings__pause=True, lock__mode="paused", **changes)


HOLDER = paused(LEADER, licence=ENDLESS, guard=GUARD)
FOLLOWER = paused(REPLICA)
DOWN = paused(CRASHED, licence=ENDLESS, guard=GUARD)
RELEASED = with_lock(FOLLOWER, record("a", mode="released"), since=ago(3)).but(postgres__row=standby_row(receiver=None))
FOUND = HOLDER.but(licence=Licence(), lock__incarnation="run-0")        # a restarted agent

TABLE = [
    (HOLDER, row("the holder keeps its books", situation="leading", refuses="", does="", says="licence without an end: pause")),
    (HOLDER, row("the store is silent: nothing ends", licence__since=ago(4000), licence__failing_since=ago(3990), situation="leading", does="")),
    (HOLDER, row("PostgreSQL hangs: nothing ends", postgres__answered_at=ago(400), situation="leading")),
    (HOLDER, row("no answer yet", postgres__row=None, postgres__answer="starting", postgres__answered_at=ago(400), situation="paused", does="")),
    (HOLDER, row("the view is not read yet", dcs__view=None, situation="blind", does="")),
    (DOWN, row("the holder's server was stopped: it stays so, and the lock goes", situation="paused", does="StandDown", summary="removed leader lock because postgres is not running")),
    (DOWN, row("its disk is gone: the lock goes all the same, and the guard is latched by the release", directory=DataDirectoryFacts(state="missing"), situation="paused", does="ReleaseLock")),
    (DOWN, row("its disk does not answer", directory=DataDirectoryFacts(state="unreadable"), situation="paused", does="ReleaseLock")),
    (DOWN, row("an agent that stops without data gives it back, too", shutting_down=True, directory=DataDirectoryFacts(state="missing"), situation="stopping", does="ReleaseLock")),
    (DOWN, row("what is left of it is killed first", postgres__orphans=True, situation="broken", does="Sweep")),
    (DOWN, row("stopped by ourselves: it goes on", memory__ours_to_start=True, situation="broken", does="StartPrimary")),
    (DOWN, row("also without a view", dcs__view=None, situation="paused", does="StandDown")),
    (HOLDER, row("started by hand, in recovery", postgres__row=standby_row(receiver=None), situation="paused", does="StandDown")),
    (HOLDER, row("named by an operator, about to be promoted", postgres__row=standby_row(receiver=None), situation="leading", does="Promote",
                 dcs__view__epoch=Epoch(number=5, holder="a", incarnation="run-a", timeline=4))),
    (FOUND, row("a restarted agent goes on with its paused record", situation="lease", does="AcquireLock")),
    (FOUND, row("also if the store is away", dcs__view=None, situation="lease", does="", summary="waiting to learn")),
    (FOLLOWER, row("a standby follows", situation="following", does="")),
    (FOLLOWER, row("its guard knows of a pause of its own, which another's record has ended", guard__state="paused", situation="following", does="StandDown")),
    (RELEASED, row("the same, and nobody leads", guard__state="paused", situation="paused", does="StandDown", refuses="paused.may_stand")),
    (paused(STOPPED), row("the same, stopped", guard__state="paused", situation="paused", does="StandDown")),
    (paused(STOPPED), row("the same, its own record", guard__state="paused", lock__node_id="id-b", lock__holder="b", lock__mode="paused", situation="paused", does="AcquireLock")),
    (FOLLOWER, row("however long the holder is silent", dcs__lock_seen__since=ago(9999), situation="following", does="")),
    (RELEASED, row("nobody leads, nobody was named", situation="paused", does="", refuses="paused.may_stand", summary="only when it is named", says="nobody was named")),
    (RELEASED, row("another was named", dcs__view__failover=FailoverKey(candidate="c"), situation="paused", does="", says="an operator named c")),
    (RELEASED, row("a candidate for later", dcs__view__failover=FailoverKey(candidate="b", scheduled_at="2030-01-01T00:00:00Z"), situation="paused", does="")),
    (RELEASED, row("this node was named", dcs__view__failover=FailoverKey(candidate="b"), situation="leaderless", does="Freeze")),
    (paused(STOPPED), row("a standby that was stopped stays so", situation="paused", does="", summary="postgres is not running", says="restart MEMBER or resume")),
    (paused(STOPPED), row("the guard has ended it", guard__state="latched", situation="paused", does="", says="never by hand")),
    (paused(STOPPED), row("stopped by ourselves: it comes back", memory__ours_to_start=True, situation="broken", does="StartStandby")),
    (paused(STOPPED), row("restart", requests=(Request(id=1, kind="restart", at=ago(0.1)),), situation="paused", does="Restart")),
    (paused(STOPPED), row("no store, just started", dcs__view=None, situation="paused", does="")),
    (paused(EMPTY), row("no data", situation="paused", does="", summary="running with empty data directory")),
    (FOLLOWER, row("diverged: told, and left alone", situation="following", does="", summary="left alone in pause", postgres__row=standby_row(receiver=None, received_lsn=LSN + 99, replayed_lsn=LSN + 99),
                   upstream=Upstream(name="a", asked_at=ago(0.1), ok=True, timeline=4, lsn=LSN + 999, history=(*REPLICA.seen.directory.history,)))),
    (FOLLOWER, row("another cluster's data is left alone", dcs__view__initialize="7000000000000000000", situation="foreign", does="")),
    (HOLDER, row("also the holder's", dcs__view__initialize="7000000000000000000", situation="foreign", does="")),
]


@pytest.mark.parametrize(("world", "case"), [pytest.param(world, *case.values, id=case.id) for world, case in TABLE])
def test_in_pause(world, case):
    assert check(world, case).paused


NOT_COMMITTED = LEADER.but(settings__pause=True)


@pytest.mark.parametrize("case", [
    row("healthy", situation="leading", refuses="", does=""),
    row("the store is silent: demoted in time as ever", licence__since=ago(20), licence__valid_until=ahead(9.7), situation="lease", does="Demote", refuses="lease.licence_lasts"),
    row("PostgreSQL hangs: handed over as ever", postgres__answered_at=ago(29.1), situation="lease", does="Demote"),
    row("PostgreSQL died: started again as ever", postgres=PostgresFacts(since=ago(0.1), ever_started=True), situation="broken", does="StartPrimary"),
    row("stopped with the agent as ever", shutting_down=True, situation="stopping", does="Demote"),
    row("being resumed", lock__mode="paused", licence=licence(mode="paused", since=ago(20), valid_until=ahead(9.7)), situation="lease", does="Demote"),
])
def test_a_pause_that_the_record_does_not_say_is_none(case):
    decision = check(NOT_COMMITTED, case)
    assert not decision.paused
    assert decision.mandate.kind != "paused"


def test_after_a_resume_a_standby_tells_its_guard_that_its_own_pause_is_over():
    assert [type(a) for a in REPLICA.but(guard__state="paused").decide().actions] == [StandDown]
    assert REPLICA.but(guard__state="standby").decide().actions == ()


def test_after_a_resume_the_holder_is_a_leader_as_ever():
    """Its record still says paused until the renewer has written another."""
    world = HOLDER.but(settings__pause=False)
    decision = world.decide()
    assert (decision.paused, decision.mandate.kind) == (False, "running")
    assert world.but(postgres=PostgresFacts(since=ago(0.1), ever_started=True)).decide().situation == "broken"


def test_the_mandate_does_not_lapse_in_pause():
    mandate = HOLDER.decide().mandate
    assert (mandate.kind, mandate.until) == ("paused", NEVER)


def test_a_cluster_that_is_being_made_is_not_paused():
    assert EMPTY.but(settings__pause=True, dcs__view__initialize=None, dcs__view__config=None).decide().paused is False


@pytest.mark.parametrize(("world", "goes_on"), [
    (HOLDER, True), (FOLLOWER, True), (FOUND, True), (FOUND.but(dcs__view=None), True), (with_lock(FOUND, None, absent_since=ago(5)), True),
    (FOLLOWER.but(postgres__row=None), True),
    (with_lock(FOUND, record("b")), False),                       # another leads: not a second primary
    (NOT_COMMITTED, False), (HOLDER.but(settings__pause=False), False), (REPLICA, False),
])
def test_what_goes_on_without_its_agent(world, goes_on):
    decision = world.but(shutting_down=True).decide()
    assert (decision.situation, decision.memory.left_running, decision.actions == ()) == ("stopping", goes_on, goes_on)


def test_an_agent_that_ends_after_its_server_gives_the_lock_back_guard_first():
    decision = DOWN.but(shutting_down=True).decide()
    only(decision, StandDown)
    assert decision.memory.shutdown_done


def test_a_restart_in_pause_is_begun_alone_and_last():
    asked = Request(id=1, kind="restart", at=ago(1), options={})
    decision = HOLDER.but(postgres__row=standby_row(receiver=None), requests=(asked,)).decide()
    assert [type(action) for action in decision.actions] == [Restart]


def test_a_lock_that_is_given_back_says_how_far_the_data_went():
    down = DOWN.but(directory__control__checkpoint_lsn=LSN + 50)
    assert only(down.decide(), StandDown).lsn == LSN + 50
    assert only(DOWN.decide(), StandDown).lsn == LSN


def test_a_restarted_agent_adopts_as_paused_what_stands_as_paused():
    acquire = only(FOUND.decide(), AcquireLock)
    assert (acquire.readopt, acquire.paused) == (True, True)
    resumed = only(FOUND.but(settings__pause=False).decide(), AcquireLock)
    assert (resumed.readopt, resumed.paused) == (True, True), "the renewer resumes it, guard first"
    assert only(FOUND.but(lock__mode="held").decide(), AcquireLock).paused is False


@pytest.mark.parametrize("server", [PostgresFacts(since=ago(5)), REPLICA.seen.postgres])
def test_a_paused_record_of_a_server_that_is_no_primary_is_adopted_to_be_given_back(server):
    decision = FOUND.but(postgres=server, guard__state="standby").decide()
    assert (decision.situation, only(decision, AcquireLock).readopt, only(decision, AcquireLock).paused) == ("paused", True, True)
    assert only(decision, AcquireLock).lsn == LSN, "what was published, until a server or the end of WAL says more"


def test_a_release_that_got_lost_is_done_again():
    decision = DOWN.but(licence=Licence(state=LicenceState.RELEASING)).decide()
    assert only(decision, AcquireLock).readopt, "a paused record would stand for ever"


def test_who_led_last_leads_again_once_its_server_was_started():
    """Data at rest is a standby: the DBA's own start of the former primary comes up in recovery."""
    world = with_lock(HOLDER.but(licence=Licence(), postgres__row=standby_row(receiver=None), guard__state="standby"), record("a", mode="released"), since=ago(1))
    assert world.decide().situation == "leaderless"
    assert with_lock(world, record("c", mode="released"), since=ago(1)).decide().situation == "paused"


def test_no_second_primary_in_pause():
    """Another's record: taken on an operator's word, which was wrong about this node."""
    demote = only(with_lock(FOUND, record("b")).decide(), Demote)
    assert (demote.mode, demote.release) == ("kill", False)
    assert only(with_lock(FOUND, record("b", mode="paused")).decide(), Demote).mode == "kill"


@pytest.mark.parametrize(("absent_s", "read_s", "acquires"), [(5, 0.1, False), (31, 0.1, True), (31, 3, False)])
def test_a_record_that_vanished_is_taken_by_the_primary_that_runs_on(absent_s, read_s, acquires):
    world = with_lock(FOUND, None, absent_since=ago(absent_s)).but(dcs__read_at=ago(read_s))
    decision = world.decide()
    assert decision.situation == "paused"
    assert "continue to run as primary without lock" in decision.summary
    assert [type(a) for a in decision.actions].count(AcquireLock) == acquires
    if acquires:
        acquire = only(decision, AcquireLock)
        assert (acquire.readopt, acquire.paused, acquire.claim_timeline, acquire.lock_revision) == (False, True, 3, 0)
    assert world.but(guard__state="armed").decide().situation == "lease", "a guard that counts down is not for this"
    assert only(world.but(settings__pause=False).decide(), Demote)


# --- requests ------------------------------------------------------------------------------------------------------------

def test_a_request_without_a_candidate_is_refused_in_pause():
    world = HOLDER.but(dcs__view__failover=FailoverKey(leader="a"), dcs__view__revisions={**LEADER.seen.dcs.view.revisions, "failover": 95})
    world = world.but(memory__switchover_revision=95, memory__switchover_asked_at=ago(9))
    decision = world.decide()
    assert "switchover.names_somebody_in_pause" in refused(decision)
    assert "refused to hand over" in decision.summary
    named = world.but(dcs__view__failover=FailoverKey(leader="a", candidate="b"))
    assert only(named.decide(), Demote).release


def test_slots_are_not_dropped_in_pause():
    world = without(HOLDER, "c").but(dcs__view__status__retain_slots=(), postgres__row=primary_row(slots=(slot("b"), slot("x", active=False))))
    assert not [a for a in world.decide().actions if isinstance(a, MaintainSlots)]
    assert only(world.but(settings__pause=False).decide(), MaintainSlots).drop == ("x",)


def test_a_standby_is_restarted_with_its_upstream():
    restart = only(paused(STOPPED).but(requests=(Request(id=1, kind="restart", at=ago(0.1)),)).decide(), Restart)
    assert (restart.as_primary, restart.upstream.name, restart.slot_name) == (False, "a", "b")


@pytest.mark.parametrize(("key", "since_s", "free"), [
    (FailoverKey(candidate="b"), 99, False),
    (FailoverKey(candidate="b", down_incarnation="run-a", down_sequence=7), 99, True),
    (FailoverKey(candidate="b", down_incarnation="run-a", down_sequence=7), 29, False),     # it might renew yet
    (FailoverKey(candidate="b", down_incarnation="run-a", down_sequence=6), 99, False),     # it has renewed since
    (FailoverKey(candidate="b", down_incarnation="run-z", down_sequence=7), 99, False),
    (FailoverKey(candidate="c", down_incarnation="run-a", down_sequence=7), 99, False),     # said to another
])
@pytest.mark.parametrize("pause", [True, False])
def test_a_paused_record_is_taken_on_an_operators_word_about_this_very_record(key, since_s, free, pause):
    world = CANDIDATE.but(settings__pause=pause, lock__mode="paused", dcs__view__failover=key, dcs__lock_seen__since=ago(since_s))
    decision = world.decide()
    assert ([type(a) for a in decision.actions] == [AcquireLock]) is free, decision
    if free:
        streams = WalReceiver(status="streaming", sender_host="a", sender_port=5432)
        sends = world.but(postgres__row__receiver=streams).decide()
        assert sends.situation == "following"
        assert "still sends WAL" in sends.reasons[0].because
        cascades = world.but(postgres__row__receiver=replace(streams, sender_host="c"), memory__election=None).decide()
        assert cascades.situation == "leaderless", "that another standby sends says nothing"
        assert only(decision, AcquireLock).paused is False, "a new licence begins with an end"
        alive = world.but(peers={"a": peer("a", in_recovery=False), "c": peer("c", frozen_epoch=5)}).decide()
        assert "promotion.no_primary_is_alive" in refused(alive)


PAUSED_A = PausedHolder(name="a", node_id="id-a", incarnation="run-a")
SAID = FailoverKey(candidate="b", down_incarnation="run-a", down_sequence=0)


@pytest.mark.parametrize(("lock", "remembered", "key", "takes"), [
    (None, None, FailoverKey(), True),
    (None, PAUSED_A, FailoverKey(), False),
    (None, PAUSED_A, FailoverKey(candidate="b"), False),
    (None, PAUSED_A, SAID, True),
    (None, PAUSED_A, FailoverKey(candidate="c", down_incarnation="run-a"), False),
    (None, PausedHolder(name="b", node_id="id-b", incarnation="run-0"), FailoverKey(), True),     # this node itself
    (record("a"), PAUSED_A, FailoverKey(), False),                                                # a restored store's
    (record("c", mode="released"), PAUSED_A, FailoverKey(), False),
    (record("c", mode="released"), PAUSED_A, SAID, True),
])
def test_neither_absence_nor_a_restored_record_ends_anothers_pause(lock, remembered, key, takes):
    """Whoever paused may be writing, cut off from the store, without an end: also after a resume."""
    world = with_lock(CANDIDATE, lock, since=ago(99) if lock else None, absent_since=ago(99)).but(dcs__remembered_pause=remembered, dcs__view__failover=key)
    if lock is None:
        world = world.but(memory__election=replace(CANDIDATE.memory.election, lock_revision=0))
    decision = world.decide()
    assert ([type(a) for a in decision.actions] == [AcquireLock]) is takes, decision


# --- memory --------------------------------------------------------------------------------------------------------------

def test_an_operators_word_is_to_the_member_that_he_named():
    key = FailoverKey(candidate="c", down_incarnation="run-a", down_sequence=7)
    world = CANDIDATE.but(lock__mode="paused", dcs__view__failover=key, dcs__lock_seen__since=ago(99))
    assert standing(world.seen).whose is Whose.LIVE
    assert standing(world.but(dcs__view__failover__candidate="b").seen).whose is Whose.FREE


def test_what_this_node_stops_itself_it_starts_again():
    handing = HOLDER.but(dcs__view__failover=FailoverKey(leader="a", candidate="b")).decide()
    assert only(handing, Demote)
    assert handing.memory.ours_to_start
    busy = decide(HOLDER.but(operation=Operation(kind="Demote", id=1, started_at=ago(0.1))).seen, handing.memory)
    assert busy.memory.ours_to_start
    assert not decide(HOLDER.seen, handing.memory).memory.ours_to_start, "it runs again"


def test_the_guards_and_the_operators_stop_is_not_ours():
    assert not DOWN.decide().memory.ours_to_start


def test_after_a_resume_a_rewind_is_tried_again():
    world = REPLICA.but(memory__paused=True, memory__rewind_failed="no", memory__rewind_failed_for="a/3", memory__rewind_failures=3)
    assert world.decide().memory.rewind_failures == 0
    assert world.but(settings__pause=True).decide().memory.rewind_failures == 3


def test_members_say_pause_only_once_it_is_in_force():
    assert (HOLDER.decide().paused, NOT_COMMITTED.decide().paused, FOLLOWER.decide().paused) == (True, False, True)
