"""A server may accept writes (decide/lease.py): go on, adopt, or end it."""

from __future__ import annotations

import pytest
from decide_world import (
    LEADER,
    LSN,
    SYSTEM,
    ago,
    ahead,
    check,
    names,
    only,
    primary_row,
    record,
    refused,
    row,
    with_lock,
)

from pgha.model.action import AcquireLock, Demote, ReadCluster
from pgha.model.lock import Licence, LicenceState

HELD = [
    row("healthy", situation="leading", refuses="", does=""),
    row("renewed 16.9 s ago: demotion begins in a moment", licence__since=ago(16.9), licence__valid_until=ago(16.9).plus_s(29.7), situation="leading"),
    row("renewed 18.3 s ago: it has begun", licence__since=ago(18.3), licence__valid_until=ago(18.3).plus_s(29.7), situation="lease", refuses="lease.licence_lasts", does="Demote",
        says="11.4 s of the licence left, demotion was due 0.1 s ago", summary="demoting"),
    row("a smaller ttl was sent a moment ago: its answer is waited for", settings__loop_wait_s=1.0, licence__since=ago(6.2), licence__valid_until=ahead(4.95), licence__shortened_at=ago(0.0), situation="leading"),
    row("and has not come, half a second before the fence", settings__loop_wait_s=1.0, licence__since=ago(9.2), licence__valid_until=ahead(1.9), licence__shortened_at=ago(3.05), refuses="lease.licence_lasts", does="Demote"),
    row("the failure is told", licence__since=ago(20), licence__valid_until=ahead(9.7), licence__failing_since=ago(10), licence__failing_why="timed out", refuses="lease.licence_lasts",
        says="renewals have failed for 10.0 s (timed out)"),
    row("silent for just under the limit", postgres__answered_at=ago(28.9), situation="leading"),
    row("hangs", postgres__answered_at=ago(29.1), postgres__why="no answer in 2 s", situation="lease", refuses="lease.server_answers", does="Demote",
        says="last sign of life 29.1 s ago, limit 29 s (no answer in 2 s)", summary="hangs, handing over"),
    row("never answered since it is there", postgres__answered_at=None, postgres__since=ago(30), refuses="lease.server_answers"),
    row("hangs and the licence ends", postgres__answered_at=ago(40), licence__since=ago(20), licence__valid_until=ahead(9.7), refuses="lease.licence_lasts lease.server_answers", does="Demote"),
]


@pytest.mark.parametrize("case", HELD)
def test_with_a_licence(case):
    check(LEADER, case)


@pytest.mark.parametrize(("changes", "wake_in_s"), [
    ({}, 10.0),
    ({"licence__since": ago(15), "licence__valid_until": ago(15).plus_s(29.7)}, 3.2),       # 29.7 - 1.5 - 10 after the renewal
    ({"postgres__answered_at": ago(24), "licence__since": ago(1), "licence__valid_until": ago(1).plus_s(29.7)}, 5.0),
    ({"postgres__answered_at": ago(28.999), "licence__since": ago(1), "licence__valid_until": ago(1).plus_s(29.7)}, 0.01),
])
def test_the_loop_wakes_when_it_would_judge_otherwise(changes, wake_in_s):
    """Else a silent store or server is noticed up to a loop_wait late, and the fence comes first."""
    assert LEADER.but(**changes).decide().wake_in_s == pytest.approx(wake_in_s, abs=0.005)


def test_a_hanging_primary_is_killed_and_its_lock_given_back():
    demote = only(LEADER.but(postgres__answered_at=ago(29.1)).decide(), Demote)
    assert (demote.mode, demote.release) == ("kill", True)


def test_a_licence_that_ends_leaves_the_time_before_the_fence_for_an_orderly_end():
    demote = only(LEADER.but(licence__since=ago(20), licence__valid_until=ahead(9.7)).decide(), Demote)
    assert (demote.mode, demote.checkpoint, demote.release) == ("fast", False, False)
    assert demote.timeout_s == pytest.approx(9.7 - 1.5 - 0.2)


FORMER = record("a", incarnation="run-0")
UNLICENSED = LEADER.but(licence=Licence())



def test_anothers_live_record_ends_a_primary_at_once():
    decision = with_lock(UNLICENSED, record("b")).decide()
    assert decision.situation == "lease"
    assert refused(decision) == ("lease.licence_is_valid",)
    demote = only(decision, Demote)
    assert (demote.mode, demote.release) == ("kill", False)


@pytest.mark.parametrize("lock, since", [(record("b"), ago(31)), (record("b", mode="released"), ago(1)), (None, None)])
def test_without_a_leader_a_primary_is_ended_in_order(lock, since):
    decision = with_lock(UNLICENSED, lock, since=since, absent_since=ago(99)).decide()
    demote = only(decision, Demote)
    assert (demote.mode, demote.release, decision.situation) == ("fast", False, "lease")


@pytest.mark.parametrize("changes", [{"dcs__view": None}, {"licence": Licence(state=LicenceState.ACQUIRING)}])
def test_while_it_is_not_known_whose_the_lock_is_the_guards_deadline_stands(changes):
    decision = UNLICENSED.but(**changes).decide()
    assert (decision.situation, decision.actions) == ("lease", ())
    assert refused(decision) == ("lease.licence_is_valid",)


def test_an_expired_licence_is_none():
    decision = LEADER.but(licence__valid_until=ago(0.01), licence__since=ago(30)).decide()
    assert only(decision, Demote).mode == "kill"


ADOPT = [
    row("read just now", situation="lease", refuses="lease.licence_is_valid", does="AcquireLock", summary="adopting"),
    row("not read just now", dcs__read_at=ago(0.6), does="ReadCluster", summary="adopting"),
    row("never read", dcs__read_at=None, does="ReadCluster"),
    row("its position is not known", postgres__row=None, does="", summary="waiting for its position"),
    row("data behind the record", postgres__row=primary_row(lsn=LSN - 1), refuses="lease.licence_is_valid restart.data_is_not_behind_record", does="Demote",
        says="data at 0/3FFFFFF, the record says 0/4000000"),
    row("an older timeline", postgres__row=primary_row(timeline=2), refuses="lease.licence_is_valid restart.data_is_not_behind_record", does="Demote",
        says="data on timeline 2, the record says 3"),
    row("no guard", guard__reachable=False, guard__why="gone", refuses="lease.licence_is_valid restart.guard_answers", does="Demote", says="guard does not answer: gone"),
    row("everything against it", guard__reachable=False, postgres__row=primary_row(timeline=2), refuses="lease.licence_is_valid restart.guard_answers restart.data_is_not_behind_record"),
]


@pytest.mark.parametrize("case", ADOPT)
def test_the_own_former_record(case):
    check(with_lock(UNLICENSED, FORMER), case)


def test_the_record_is_adopted_as_it_was_read_and_the_epoch_stays():
    action = only(with_lock(UNLICENSED, FORMER).decide(), AcquireLock)
    assert action == AcquireLock(lock_revision=100, lock_value=b"record", epoch_revision=50, epoch_number=5, readopt=True, claim_timeline=3, lsn=LSN, timeline=3)


def test_a_server_that_does_not_say_counts_as_a_primary_where_the_guard_was_armed():
    unknown = with_lock(UNLICENSED.but(postgres__row=None, postgres__answer="silent"), record("b"))
    for state, situation in (("armed", "lease"), ("latched", "lease"), ("standby", "following"), ("idle", "following"), ("offline", "following")):
        assert unknown.but(guard__state=state).decide().situation == situation


def test_a_standby_needs_no_licence():
    assert LEADER.but(licence=Licence(), postgres__row__in_recovery=True).decide().situation != "lease"


def test_another_system_comes_before_the_licence():
    assert names(LEADER.but(dcs__view__initialize="7" * 19).decide()) == ("Demote",)
    assert SYSTEM != "7" * 19
    assert ReadCluster not in map(type, LEADER.decide().actions)
