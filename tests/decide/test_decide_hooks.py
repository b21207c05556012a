"""The operator's programs: when pre_promote and before_stop are asked for, what a no means, that no emergency waits for a
script; and by which method a copy is made, with a leader and without."""

from __future__ import annotations

import pytest
from decide_world import (
    BIRTH,
    CANDIDATE,
    CRASHED,
    EMPTY,
    HISTORY,
    LEADER,
    LSN,
    REPLICA,
    STOPPED,
    TIMELINE,
    TTL_S,
    WINNER,
    World,
    ago,
    ahead,
    check,
    only,
    peer,
    row,
    silent,
)
from msgspec.structs import replace

from pgha.clock import remaining_s
from pgha.model.action import Clone, Demote, PrePromote, Restart, StandDown, Stop
from pgha.model.cluster import FailoverKey, Sync, Tags
from pgha.model.lock import Licence, LicenceState
from pgha.model.node import DataDirectoryFacts, PostgresFacts
from pgha.model.observation import BEFORE_STOP, Operation, Request

HANG_S = LEADER.seen.settings.primary_hang_timeout_s

ASKED = WINNER.but(settings__pre_promote_s=20.0)
REFUSED = ASKED.but(memory__vetoed_until=ahead(12), memory__veto_why="pre_promote refused (exit code 1: old primary lives)")

PRE_PROMOTE = [
    row("there is none", settings__pre_promote_s=0.0, does="Promote"),
    row("not asked yet", does="PrePromote", refuses="", summary="asking pre_promote before the promotion"),
    row("asked under an earlier lock", memory__pre_promoted_epoch=5, does="PrePromote"),
    row("asked, and agreed", memory__pre_promoted_epoch=6, does="Promote", refuses="", summary="promoting to timeline 4"),
    row("nobody is asked before all else is right", guard__reachable=False, does="", refuses="leading.guard_answers"),
    row("nobody is asked in the pass that acquired the lock", licence__acquired_pass=60, does="", refuses="restart.lock_seen_held"),
    row("nobody is asked just before the fence", licence__valid_until=ahead(2.4), does="", refuses="leading.licence_lasts_long_enough"),
    row("agreed, and something else has changed since", memory__pre_promoted_epoch=6, watchdog__failed=True, does="", refuses="leading.watchdog_is_ready"),
]


@pytest.mark.parametrize("case", PRE_PROMOTE)
def test_pre_promote_is_asked_once_all_else_is_right(case):
    decision = check(ASKED, case)
    for action in decision.actions:
        if isinstance(action, PrePromote):
            assert (action.epoch, action.limit_s) == (6, 20.0)


def test_a_refusal_gives_the_lock_back_and_leaves_the_standby_running():
    decision = REFUSED.decide()
    down = only(decision, StandDown)
    assert (down.lsn, down.timeline) == (LSN, TIMELINE)
    assert "exit code 1: old primary lives" in decision.summary
    assert [r.rule for r in decision.reasons if not r.holds] == ["leading.pre_promote_agrees"]


RACE = [
    row("refused", does="", refuses="promotion.is_not_vetoed", says="old primary lives): out of the race for another 12.0 s", summary="not taking the lock"),
    row("a ttl later", memory__vetoed_until=ago(0), does="AcquireLock", refuses=""),
    row("nobody else is there", peers={}, dcs__remembered_members={}, dcs__view__members={}, does="", refuses="promotion.is_not_vetoed"),
    row("an operator asked for it", dcs__view__failover=FailoverKey(candidate="b"), does="", refuses="promotion.is_not_vetoed"),
]


@pytest.mark.parametrize("case", RACE)
def test_who_was_refused_stays_out_of_the_race(case):
    decision = check(CANDIDATE.but(memory__vetoed_until=ahead(12), memory__veto_why="pre_promote refused (exit code 1: old primary lives)"), case)
    assert decision.vote.candidate == (case.refuses == ())


def test_who_was_refused_says_so_to_a_leader_who_looks_for_a_successor():
    vetoed = REPLICA.but(memory__vetoed_until=ahead(12), memory__veto_why="pre_promote refused")
    assert REPLICA.decide().vote.candidate and not vetoed.decide().vote.candidate


def ended(world: World, *, ok: bool = True, **facts: object) -> World:
    operation = Operation(kind="PrePromote", id=7, started_at=ago(15), ended_at=ago(0), ok=ok, facts=facts)
    return world.but(ended=operation, memory__holding_since=ago(15))


def test_its_answer_is_remembered_for_this_lock():
    agreed = ended(ASKED, epoch=6, agrees=True, said="exit code 0").decide()
    assert [type(a).__name__ for a in agreed.actions] == ["Promote"]      # the time it took is not held against the holder
    refused = ended(ASKED, epoch=6, agrees=False, said="exit code 1").decide()
    assert [type(a).__name__ for a in refused.actions] == ["StandDown"]
    until = refused.memory.vetoed_until
    assert until is not None and remaining_s(until, ASKED.seen.now) == TTL_S
    cut = ended(ASKED, ok=False).decide()                                 # by the agent itself: nothing was said
    assert [type(a).__name__ for a in cut.actions] == ["PrePromote"]


ASKING = ASKED.but(operation=Operation(kind="PrePromote", id=7, started_at=ago(15)))


def test_while_it_is_asked_the_lock_is_kept():
    decision = ASKING.decide()
    assert decision.actions == () and decision.situation == "busy"
    assert decision.mandate.kind == "operation" and decision.mandate.until is not None and remaining_s(decision.mandate.until, ASKED.seen.now) > 29
    long = ASKING.but(settings__pre_promote_s=600.0, operation__started_at=ago(500)).decide()
    assert long.mandate.until is not None and remaining_s(long.mandate.until, ASKED.seen.now) > 29


@pytest.mark.parametrize("changes", [
    {"licence": Licence(state=LicenceState.LOST)}, {"licence__valid_until": ahead(1)}, {"shutting_down": True},
], ids=["the lock is lost", "the fence is due", "the agent stops"])
def test_it_is_ended_when_there_is_nothing_to_promote_for(changes):
    assert [type(a).__name__ for a in ASKING.but(**changes).decide().actions] == ["CancelOperation"]


# --- before_stop ---------------------------------------------------------------------------------------------------------

RESTART = (Request(id=1, kind="restart", at=ago(1)),)
PLANNED = [
    (LEADER.but(shutting_down=True), Demote), (REPLICA.but(shutting_down=True), Stop),
    (LEADER.but(requests=RESTART), Restart), (REPLICA.but(requests=RESTART), Restart),
    (LEADER.but(dcs__view__failover=FailoverKey(leader="a", candidate="b"), dcs__view__revisions={**LEADER.seen.dcs.view.revisions, "failover": 99}), Demote),
]


@pytest.mark.parametrize(("world", "kind"), PLANNED)
def test_before_a_planned_stop(world, kind):
    for limit_s in (0.0, 25.0):
        assert only(world.but(settings__before_stop_s=limit_s).decide(), kind).before_stop_s == limit_s


EMERGENCIES = [
    ("the licence ends", LEADER.but(licence__since=ago(20), licence__valid_until=ahead(6), licence__failing_since=ago(18))),
    ("the lock is lost", LEADER.but(licence=Licence(state=LicenceState.LOST), lock__holder="c", lock__node_id="id-c", lock__incarnation="run-c")),
    ("PostgreSQL hangs", LEADER.but(postgres__answered_at=ago(40), postgres__answer="silent")),
    ("the data is foreign", LEADER.but(dcs__view__initialize="7000000000000000000")),
    ("the promotion failed", WINNER.but(memory__promotion_failed_at=ago(3))),
    ("a crash is handed over", CRASHED.but(memory__crash_seen_at=ago(400), settings__primary_start_timeout_s=300.0)),
]


@pytest.mark.parametrize("world", [pytest.param(world, id=name) for name, world in EMERGENCIES])
def test_never_before_an_emergency(world):
    demote = only(world.but(settings__before_stop_s=25.0).decide(), Demote)
    assert demote.before_stop_s == 0.0


def test_the_mandate_allows_for_it():
    world = LEADER.but(settings__before_stop_s=100.0, settings__primary_stop_timeout_s=10.0, operation=Operation(kind="Demote", id=7, started_at=ago(90)))
    until = world.decide().mandate.until
    assert until is not None and remaining_s(until, world.seen.now) > 20
    assert replace(world.decide().mandate, until=None).kind == "stopping"


@pytest.mark.parametrize("kind", ["Demote", "Restart"])
def test_while_it_runs_the_mandate_is_that_of_a_primary_that_answers(kind):
    """Nobody has begun to stop it yet: a server that hangs meanwhile is not kept in the lock."""
    draining = LEADER.but(settings__before_stop_s=100.0, operation=Operation(kind=kind, id=7, started_at=ago(2), progress=BEFORE_STOP))
    for world, left_s in ((draining, HANG_S + 1.0), (draining.but(postgres__answered_at=ago(HANG_S)), 1.0)):
        mandate = world.decide().mandate
        assert mandate.kind == "running" and mandate.until is not None and remaining_s(mandate.until, world.seen.now) == pytest.approx(left_s, abs=1.0)
    stops = draining.but(operation__progress="stopping PostgreSQL", postgres__answered_at=ago(HANG_S)).decide().mandate
    assert stops.kind != "running" and stops.until is not None and remaining_s(stops.until, LEADER.seen.now) > HANG_S
    assert draining.but(postgres=PostgresFacts(process="absent", ever_started=True)).decide().mandate.kind != "running"


DRAINING = LEADER.but(settings__before_stop_s=100.0, dcs__view__failover=FailoverKey(leader="a", candidate="b"), memory__switchover_revision=99, memory__switchover_asked_at=ago(9),
                      dcs__view__revisions={**LEADER.seen.dcs.view.revisions, "failover": 99},
                      operation=Operation(kind="Demote", id=7, started_at=ago(9), detail="switchover to b", progress=BEFORE_STOP))

TAKEN_BACK = [
    row("nothing has changed", does="", refuses=""),
    row("the key is gone", dcs__view__failover=FailoverKey(), does="CancelOperation", refuses="switchover.is_still_asked_for", says="the request was taken back"),
    row("another candidate is asked for", dcs__view__revisions={**LEADER.seen.dcs.view.revisions, "failover": 100}, does="CancelOperation",
        refuses="switchover.is_still_asked_for", says="another request has come"),
    row("its answer is late", peers={"b": replace(silent("b"), silent_since=ago(1.9)), "c": peer("c")}, does="", refuses=""),
    row("nobody has been asked yet", peers={}, does="", refuses=""),
    row("it has not been asked for a while", peers={"b": replace(peer("b"), asked_at=ago(5)), "c": peer("c")}, does="", refuses=""),
    row("the candidate is gone", peers={"b": replace(silent("b"), silent_since=ago(2.1)), "c": peer("c")}, does="CancelOperation", refuses="switchover.is_still_asked_for", says="b: does not answer"),
    row("the candidate is not to lead any more", peers={"b": peer("b", tags=Tags(nofailover=True)), "c": peer("c")}, does="CancelOperation",
        refuses="switchover.is_still_asked_for", says="b: tag nofailover is set"),
    row("the stop has begun", operation__progress="stopping PostgreSQL", dcs__view__failover=FailoverKey(), does="", refuses=""),
    row("the agent stops", operation__detail="agent stops", dcs__view__failover=FailoverKey(), does="", refuses=""),
    row("it is being ended", operation__cancelling=True, dcs__view__failover=FailoverKey(), does="", refuses="switchover.is_still_asked_for"),
]


@pytest.mark.parametrize("case", TAKEN_BACK)
def test_a_switchover_can_be_taken_back_while_before_stop_runs(case):
    decision = check(DRAINING, case)
    assert bool(decision.ask_peers.names) == (case.name != "the agent stops")      # what they said must not be forgotten before it is judged
    assert all(action.while_in == BEFORE_STOP for action in decision.actions)      # not what has begun to stop in this very moment


def test_what_was_taken_back_before_the_stop_was_not_tried():
    """The candidate is judged anew; if it may take over after all, it does."""
    cancelled = DRAINING.but(operation=None, memory__handed_over_revision=99, ended=replace(DRAINING.seen.operation, ended_at=ago(0), why="it was ended"))
    only(cancelled.decide(), Demote)
    stopped = cancelled.but(postgres=PostgresFacts(process="absent", ever_started=True)).decide()
    assert stopped.memory.handed_over_revision == 99


# --- how a copy is made ---------------------------------------------------------------------------------------------------

BY_BACKUP = EMPTY.but(settings__replica_methods=("walg", "basebackup"))
NAMED = {"settings__synchronous_mode": "on", "dcs__view__sync": Sync(leader="a", members=("b",))}
#: a is gone, and so is all data but a backup.
ALL_LOST = CANDIDATE.but(postgres=PostgresFacts(), directory=DataDirectoryFacts(state="missing"), memory__election=None, settings__replica_methods=("walg", "basebackup"),
                         settings__leaderless_methods=("walg",), peers={"a": silent("a"), "c": peer("c", in_recovery=None, system_identifier="")})

COPIES = [
    (EMPTY, ("basebackup",), "bootstrap from leader 'a' with pg_basebackup"),
    (BY_BACKUP, ("walg", "basebackup"), "bootstrap from leader 'a' with walg, then pg_basebackup"),
    (BY_BACKUP.but(**NAMED), ("basebackup",), "bootstrap from leader 'a' with pg_basebackup"),
    (BY_BACKUP.but(**NAMED, settings__replica_methods=("walg",)), ("basebackup",), "bootstrap from leader 'a' with pg_basebackup"),
    (BY_BACKUP.but(settings__leaderless_methods=("walg",)), ("walg", "basebackup"), "bootstrap from leader 'a' with walg"),
    (BY_BACKUP.but(directory=DataDirectoryFacts(state="partial", unfinished_copy=True)), ("walg", "basebackup"), "bootstrap from leader"),
    (STOPPED.but(settings__replica_methods=("walg",), upstream__history=HISTORY[:1], upstream__timeline=4, settings__remove_data_directory_on_diverged_timelines=True,
                 directory__control__timeline=3), ("walg",), "copying anew from a with walg"),
]


@pytest.mark.parametrize(("world", "methods", "summary"), COPIES)
def test_how_a_copy_is_made(world, methods, summary):
    decision = world.decide()
    clone = only(decision, Clone)
    assert (clone.methods, clone.source is not None) == (methods, True)
    assert decision.summary.startswith(summary)


WITHOUT = [
    row("all are gone", does="Clone", refuses="empty.has_source", summary="bootstrap (without leader) with walg"),
    row("no method can", settings__leaderless_methods=(), does="", refuses="empty.has_source"),
    row("somebody leads", dcs__lock_seen__since=ago(2), dcs__view__members={}, does="", refuses="empty.has_source empty.nobody_leads"),
    row("somebody has data", peers__c=peer("c"), does="", refuses="empty.has_source empty.nobody_else_has_data", says="c answer with data, and may lead"),
    row("somebody has data who may not lead", peers__c=peer("c", tags=Tags.of({"nofailover": True})), does="Clone"),
    row("not all were asked", peers={}, does="", refuses="empty.has_source empty.peers_were_asked"),
    row("/sync names this node", **NAMED, does="", refuses="empty.has_source empty.a_backup_will_do", says="a backup may lack what it has confirmed"),
    row("/sync names another", settings__synchronous_mode="on", dcs__view__sync=Sync(leader="a", members=("c",)), does="Clone"),
    row("the last try has just failed", memory__clone_failures=3, memory__last_clone_failed_at=ago(1), does="", refuses="empty.has_source empty.clone_backoff"),
    row("half a copy is there", directory=DataDirectoryFacts(state="partial", unfinished_copy=True), does="Clone"),
    row("half of something else is there", directory=DataDirectoryFacts(state="partial"), does=""),
]


@pytest.mark.parametrize("case", WITHOUT)
def test_a_copy_without_a_leader(case):
    decision = check(ALL_LOST, case)
    for action in decision.actions:
        if isinstance(action, Clone):
            assert (action.source, action.methods) == (None, ("walg",))


def test_half_a_copy_is_no_place_for_a_new_cluster():
    half = BIRTH.but(directory=DataDirectoryFacts(state="partial", unfinished_copy=True))
    assert [type(a).__name__ for a in BIRTH.decide().actions] == ["Bootstrap"]
    assert half.decide().actions == ()
