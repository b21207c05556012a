"""An operator asks to replace a node's data by a fresh copy (decide/reinit.py)."""

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
    STOPPED,
    SYSTEM,
    TIMELINE,
    WINNER,
    ago,
    ahead,
    check,
    member,
    names,
    only,
    record,
    refused,
    row,
    with_lock,
)
from msgspec.structs import replace

from pgha.model.action import AnswerRequest, CancelOperation, Clone, InspectUpstream, Stop
from pgha.model.cluster import Sync, Tags
from pgha.model.node import GuardFacts
from pgha.model.observation import Operation, Upstream
from pgha.model.request import Reinitialisation, ReinitialisationEnd, Request

ANSWERED = Upstream(name="a", asked_at=ago(1), ok=True, system_identifier=SYSTEM, timeline=TIMELINE, lsn=LSN)
NO_LEADER, LEADS = "Cluster has no leader, can not reinitialize", "I am the leader, can not reinitialize"


def asked(**options):
    return (Request(id=7, kind="reinitialize", at=NOW, options=options),)


def running(kind, **changes):
    return replace(Operation(kind=kind, id=9, started_at=ago(3)), **changes)


WANTED = Reinitialisation(request=7, asked_at=ago(5))

FOREIGN = {"directory__control__system_identifier": "7999999999999999999"}


@pytest.mark.parametrize(("world", "changes", "text"), [
    (REPLICA, {}, "reinitialize started"),
    (STOPPED, {}, "reinitialize started"),
    (EMPTY, {}, "reinitialize started"),
    (REPLICA, {"settings__pause": True}, "reinitialize started"),
    (LEADER, {}, LEADS),
    (CRASHED, {}, LEADS),
    (WINNER, {}, LEADS),
    (with_lock(WINNER, None), {}, LEADS),
    (with_lock(STOPPED, record("b", incarnation="before")), {}, LEADS),
    (with_lock(REPLICA, record("b")), {}, LEADS),
    # By the store another leads; but what runs here may accept writes.
    (REPLICA, {"postgres__row__in_recovery": False}, LEADS),
    (REPLICA, {"postgres__row": None, "guard": GuardFacts(reachable=True, state="armed")}, LEADS),
    (CANDIDATE, {}, NO_LEADER),
    (with_lock(REPLICA, None, absent_since=ago(1)), {}, NO_LEADER),
    (with_lock(REPLICA, record("a", mode="released")), {}, NO_LEADER),
    (REPLICA, {"dcs__view": None}, NO_LEADER),
    (REPLICA, {"dcs__unreachable_since": ago(1)}, NO_LEADER),
    (REPLICA, {"dcs__view__members": {"b": member("b")}}, NO_LEADER),
    (REPLICA, {"dcs__view__members__a": member("a", role="replica")}, NO_LEADER),
    (REPLICA, {"dcs__view__members__a": member("a", role="primary", state="stopping")}, NO_LEADER),
    (REPLICA, {"dcs__trusted_from": ahead(5), "dcs__generation_changed": "the store was restored"}, "can not reinitialize: the store was restored: who leads is not certain yet"),
    (REPLICA, {"dcs__remembered_sync": Sync(leader="a", members=("b",))}, "can not reinitialize: the store was restored to another /sync"),
    (STOPPED, FOREIGN, "can not reinitialize: own system identifier 7999999999999999999, the cluster's 7123456789012345678"),
    (STOPPED, {"directory__control": None}, "can not reinitialize: pg_control cannot be read"),
    (STOPPED, {"directory__state": "partial"}, "can not reinitialize: the data directory is partial"),
    (STOPPED, {"directory__state": "unreadable", "directory__why": "I/O error"}, "can not reinitialize: the data directory is unreadable: I/O error"),
    (EMPTY, {"operation": running("Clone")}, "copy of the data already in progress"),
    (STOPPED, {"operation": running("Rewind")}, "rewind already in progress"),
    (REPLICA, {"operation": running("Restart")}, "restart already in progress"),
    (REPLICA, {"operation": running("InspectUpstream")}, "reinitialize started"),
    (STOPPED, {"operation": running("Clone"), "memory__reinit": WANTED}, "reinitialize already in progress"),
])
def test_the_answer(world, changes, text):
    decision = world.but(requests=asked(), **changes).decide()
    answer = only(decision, AnswerRequest)
    assert (answer.id, answer.status) == (7, 200 if text == "reinitialize started" else 503)
    assert answer.text == text if text in (NO_LEADER, LEADS) or "already" in text or "started" in text else answer.text.startswith(text)
    wanted = decision.memory.reinit
    assert (wanted is not None and wanted.request == 7 and wanted.asked_at == NOW) == (answer.status == 200)
    assert not any(isinstance(a, Clone | Stop) for a in decision.actions) or answer.status == 200


@pytest.mark.parametrize(("world", "operation", "text"), [
    (STOPPED, "Clone", "reinitialize started"), (STOPPED, "Rewind", "reinitialize started"), (REPLICA, "Restart", "restart already in progress"),
    (EMPTY, "Bootstrap", "bootstrap already in progress"), (STOPPED, "Demote", "demote already in progress"), (REPLICA, "Promote", "promote already in progress"),
])
def test_force_ends_what_can_be_begun_again_and_nothing_else(world, operation, text):
    decision = world.but(requests=asked(force=True, from_leader=True), operation=running(operation)).decide()
    assert only(decision, AnswerRequest).text == text
    started = text == "reinitialize started"
    assert [a.id for a in decision.actions if isinstance(a, CancelOperation) and "operator" in a.why] == ([9] if started else [])
    assert (decision.memory.reinit is not None and decision.memory.reinit.from_leader) == started


def test_force_is_no_way_round_what_protects_the_data():
    for world in (LEADER, CANDIDATE, STOPPED.but(**FOREIGN)):
        assert only(world.but(requests=asked(force=True)).decide(), AnswerRequest).status == 503


def test_what_was_ended_for_it_does_not_count_as_its_own_failure():
    ended = replace(running("Clone"), id=9, ended_at=ago(0.1), ok=False, why="it was ended", started_at=ago(9))
    decision = STOPPED.but(memory__reinit=WANTED, ended=ended, upstream=ANSWERED).decide()
    only(decision, Clone)
    assert decision.memory.reinit == WANTED


def test_a_directory_that_is_being_looked_at_is_waited_for():
    decision = REPLICA.but(requests=asked(), directory__state="unknown").decide()
    assert not any(isinstance(a, AnswerRequest) for a in decision.actions)
    assert decision.memory.reinit is None


STEPS = [
    row("the leader is asked who it is", upstream=None, does="InspectUpstream", situation="reinitializing", summary="asking a who it is", refuses="reinit.leader_answers"),
    row("… also if it was asked before", upstream=replace(ANSWERED, asked_at=ago(5.1)), does="InspectUpstream"),
    row("… again if that was a while ago", upstream=replace(ANSWERED, asked_at=ago(11)), memory__reinit=replace(WANTED, asked_at=ago(12)), does="InspectUpstream"),
    row("then PostgreSQL is stopped", upstream=ANSWERED, does="Stop", refuses="", summary="stopping PostgreSQL"),
    row("also in pause", upstream=ANSWERED, settings__pause=True, does="Stop"),
    row("it does not answer", upstream=Upstream(name="a", asked_at=ago(1), why="refused"), memory__reinit=replace(WANTED, inspected=True), does="", refuses="reinit.leader_answers",
        summary="not reinitializing, the data is kept: a does not answer: refused"),
    row("it is another system", upstream=replace(ANSWERED, system_identifier="7999999999999999999"), memory__reinit=replace(WANTED, inspected=True), does="", refuses="reinit.leader_answers",
        summary="the data is kept"),
    row("it is in recovery", upstream=replace(ANSWERED, in_recovery=True), memory__reinit=replace(WANTED, inspected=True), does="", refuses="reinit.leader_answers", says="a is in recovery"),
    row("the store is away", upstream=ANSWERED, dcs__unreachable_since=ago(1), does="", refuses="reinit.has_leader", summary="the data is kept"),
    row("the store is not believed any more", upstream=ANSWERED, dcs__remembered_sync=Sync(leader="a", members=("b",)), does="", refuses="reinit.store_is_believed"),
]


@pytest.mark.parametrize("case", STEPS)
def test_while_postgresql_runs(case):
    decision = check(REPLICA.but(memory__reinit=WANTED), case)
    if "the data is kept" in decision.summary:
        assert decision.memory.reinit is None
        assert decision.memory.reinit_ended == ReinitialisationEnd(request=7, ok=False, why=next(r.because for r in decision.reasons if not r.holds))


DOWN = [
    row("the copy begins", upstream=ANSWERED, does="Clone", refuses="", summary="copying from a"),
    row("there is nothing to replace", upstream=ANSWERED, directory__state="missing", directory__control=None, does="Clone"),
    row("in pause", upstream=ANSWERED, settings__pause=True, does="Clone"),
    row("the stop took a while", upstream=replace(ANSWERED, asked_at=ago(30)), does="InspectUpstream"),
    row("nobody leads any more", upstream=ANSWERED, lock__mode="released", does="", refuses="reinit.has_leader", summary="the data is kept"),
    row("orphans are seen to first", upstream=ANSWERED, postgres__orphans=True, does="Sweep", situation="broken"),
]


@pytest.mark.parametrize("case", DOWN)
def test_while_postgresql_is_stopped(case):
    check(STOPPED.but(memory__reinit=WANTED), case)


def test_the_copy_keeps_what_is_there_and_comes_from_whom_it_may():
    """The leader if it was asked for, or where /sync counts on this name; else whoever is tagged for it."""
    tagged = STOPPED.but(memory__reinit=WANTED, upstream=ANSWERED, dcs__view__members__c=member("c", tags=Tags.of({"clonefrom": True})))
    clone = only(tagged.decide(), Clone)
    assert (clone.source.name, clone.replace, clone.system_identifier) == ("c", "keep_old_until_streaming", SYSTEM)
    assert only(tagged.but(memory__reinit__from_leader=True).decide(), Clone).source.name == "a"
    by_backup = tagged.but(settings__replica_methods=("backup", "walg", "basebackup"), settings__overwriting_methods=("walg",))
    assert only(by_backup.decide(), Clone).methods == ("backup", "basebackup")      # what is there stays until the copy is whole
    assert only(by_backup.but(settings__replica_methods=("walg",)).decide(), Clone).methods == ("basebackup",)
    assert only(by_backup.but(memory__reinit__from_leader=True).decide(), Clone).methods == ("basebackup",)
    voter = {"settings__synchronous_mode": "on", "dcs__view__config": {"synchronous_mode": True}, "dcs__view__sync": Sync(leader="a", members=("b",))}
    assert only(tagged.but(**voter).decide(), Clone).source.name == "a"


def test_the_copy_is_made_by_the_operators_methods_unless_the_leader_was_asked_for():
    by = STOPPED.but(memory__reinit=WANTED, upstream=ANSWERED, settings__replica_methods=("walg", "basebackup"))
    assert only(by.decide(), Clone).methods == ("walg", "basebackup")
    assert "with walg, then pg_basebackup" in by.decide().summary
    assert only(by.but(memory__reinit__from_leader=True).decide(), Clone).methods == ("basebackup",)
    voter = {"settings__synchronous_mode": "on", "dcs__view__config": {"synchronous_mode": True}, "dcs__view__sync": Sync(leader="a", members=("b",))}
    assert only(by.but(**voter).decide(), Clone).methods == ("basebackup",)


def test_a_synchronous_standby_leaves_first():
    voter = REPLICA.but(memory__reinit=WANTED, upstream=ANSWERED, settings__synchronous_mode="on", dcs__view__config={"synchronous_mode": True},
                        dcs__view__sync=Sync(leader="a", members=("b",)))
    waits = voter.decide()
    assert (names(waits), waits.leaves_sync) == ((), True)
    assert refused(waits) == ("synchronous.is_to_be_let_go",)
    assert names(voter.but(memory__leaving_since=ago(20)).decide()) == ("Stop",)
    assert names(voter.but(dcs__view__sync=Sync(leader="a", members=("c",))).decide()) == ("Stop",)


VOTER = REPLICA.but(memory__reinit=WANTED, upstream=ANSWERED, settings__synchronous_mode="on", dcs__view__config={"synchronous_mode": True}, dcs__view__sync=Sync(leader="a", members=("b",)))


def test_the_leader_is_asked_anew_while_a_standby_waits_to_be_let_go():
    """Its answer counts for 10 s, the wait may take 20: a request is not given up for that."""
    asks = VOTER.but(upstream=None).decide()
    waits = replace(VOTER, memory=asks.memory).decide()
    assert refused(waits) == ("synchronous.is_to_be_let_go",)
    old = replace(VOTER, memory=waits.memory).but(upstream__asked_at=ago(10.5), memory__reinit__asked_at=ago(11), memory__leaving_since=ago(10.5))
    again = old.decide()
    assert (names(again), again.leaves_sync) == (("InspectUpstream",), True)
    assert refused(replace(old, memory=again.memory).but(upstream=ANSWERED).decide()) == ("synchronous.is_to_be_let_go",)
    silent = replace(old, memory=again.memory).decide()
    assert (names(silent), silent.memory.reinit) == ((), None), "asked, and no answer came"


@pytest.mark.parametrize(("changes", "does"), [
    ({}, ()),
    ({"settings__synchronous_mode_strict": False}, ("Stop",)),
    ({"dcs__view__sync": Sync(leader="a", members=("c",))}, ("Stop",)),
    ({"settings__pause": True}, ("Stop",)),
    ({"settings__synchronous_mode": "off"}, ("Stop",)),
])
def test_in_the_strict_mode_no_commit_waits_for_a_copy(changes, does):
    """A leader that has no other standby goes on to count on this one, however long it is asked to let it go."""
    decision = VOTER.but(settings__synchronous_mode_strict=True, memory__leaving_since=ago(20)).but(**changes).decide()
    assert names(decision) == does
    if not does:
        assert refused(decision) == ("reinit.can_be_spared",)
        assert "synchronous_mode_strict" in decision.memory.reinit_ended.why
        assert (decision.memory.reinit, decision.memory.leaving_since, decision.leaves_sync) == (None, None, False)


@pytest.mark.parametrize(("kind", "ok", "ends"), [("Clone", True, True), ("Clone", False, True), ("Stop", False, True), ("Stop", True, None)])
def test_how_it_ends(kind, ok, ends):
    """One try: whoever fails goes on with the data that is there, and says so."""
    ended = replace(running(kind), ended_at=ago(0.1), ok=ok, why="" if ok else "no room")
    decision = STOPPED.but(memory__reinit=WANTED, ended=ended, upstream=ANSWERED).decide()
    if ends is None:
        assert decision.memory.reinit == WANTED
        return
    assert decision.memory.reinit is None
    assert decision.memory.reinit_ended == ReinitialisationEnd(request=7, ok=ok, why="" if ok else "no room")
    assert names(decision) == ("StartStandby",)
    assert decision.memory.clone_failures == 0


def test_the_copy_is_given_up_when_nobody_leads():
    free = CANDIDATE.but(operation=running("Clone"), memory__reinit=WANTED).decide()
    assert "nobody leads" in only(free, CancelOperation).why
    assert names(CANDIDATE.but(operation=running("Clone")).decide()) == ()
    assert names(STOPPED.but(operation=running("Clone"), memory__reinit=WANTED).decide()) == ()


def test_the_leader_is_asked_by_its_own_address():
    assert only(REPLICA.but(memory__reinit=WANTED, upstream=None).decide(), InspectUpstream).source.name == "a"
