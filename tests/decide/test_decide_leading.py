"""This node holds the lock (decide/leading.py): promote, hand over, keep the books."""

from __future__ import annotations

import json

import pytest
from decide_world import (
    LEADER,
    LSN,
    REPLICA,
    STATUS,
    SYSTEM,
    TIMELINE,
    WINNER,
    MiB,
    ago,
    ahead,
    check,
    names,
    only,
    peer,
    refused,
    row,
    slot,
)
from msgspec.structs import replace

from pgha.decide.leading import _timestamp
from pgha.model.action import Demote, Promote, Restart, WriteInitialize, WriteKey
from pgha.model.cluster import FailoverKey, HistoryEntry
from pgha.model.observation import StoreCapacity
from pgha.model.request import Request
from pgha.model.wal import HistoryRow

PROMOTION = [
    row("healthy", situation="leading", refuses="", does="Promote", summary="promoting to timeline 4 from 0/4000000"),
    row("acquired in this very pass", licence__acquired_pass=60, refuses="restart.lock_seen_held", says="acquired in pass 60, this is pass 60", does=""),
    row("0.9 s to the fence", licence__valid_until=ahead(2.4), refuses="leading.licence_lasts_long_enough", says=("0.90 s to the fence", "1.0 s needed"), does=""),
    row("1.0 s to the fence", licence__valid_until=ahead(2.5), refuses="", does="Promote"),
    row("guard silent", guard__reachable=False, guard__why="gone", refuses="leading.guard_answers", says="guard does not answer: gone", does=""),
    row("watchdog required, unusable", watchdog__failed=True, watchdog__why="no device", refuses="leading.watchdog_is_ready", says="no device", does=""),
    row("all at once", licence__acquired_pass=60, licence__valid_until=ahead(2), guard__reachable=False, watchdog__failed=True, does="",
        refuses="restart.lock_seen_held leading.licence_lasts_long_enough leading.guard_answers leading.watchdog_is_ready", summary="not promoting"),
    row("its promotion has failed", memory__promotion_failed_at=ago(3), does="Demote", summary="promotion failed: giving the lock back"),
    row("one failed long ago", memory__promotion_failed_at=ago(31), does="Promote"),
    row("the claim is another's", dcs__view__epoch__holder="c", does="Demote", summary="without a claimed timeline"),
    row("the claim is of another epoch", licence__epoch=7, does="Demote"),
    row("the claim was used up", postgres__row__timeline=4, does="Demote"),
    row("the claim is not in sight yet", licence__epoch=7, dcs__view__revision=99, does="ReadCluster", summary="reading the claim"),
    row("held for ten seconds without a primary", memory__holding_since=ago(10), guard__reachable=False, refuses="leading.lock_is_of_use", says="held for 10.0 s without a primary, limit 10 s",
        does="Demote", summary="giving the lock to those who can use it"),
    row("held for nearly ten seconds", memory__holding_since=ago(9.9), does="Promote"),
    row("it starts, and may take its time", memory__holding_since=ago(200), postgres__row=None, postgres__answer="starting", does="", refuses="leading.server_answers"),
    row("it starts for too long", memory__holding_since=ago(300), postgres__row=None, postgres__answer="starting", does="Demote", refuses="leading.lock_is_of_use", says="limit 300 s"),
    row("PostgreSQL does not answer", postgres__row=None, postgres__answer="silent", postgres__why="no answer in 2 s", refuses="leading.server_answers", says="no answer in 2 s", does=""),
]


@pytest.mark.parametrize("case", PROMOTION)
def test_promotion(case):
    check(WINNER, case)


def test_promotion_is_to_exactly_the_claimed_timeline_past_all_between():
    assert only(WINNER.but(dcs__view__epoch__timeline=7).decide(), Promote) == Promote(timeline=7, leaving=3, block=(4, 5, 6), epoch=6)
    assert only(WINNER.decide(), Promote) == Promote(timeline=4, leaving=3, block=(), epoch=6)


@pytest.mark.parametrize("changes", [{"memory__promotion_failed_at": ago(3)}, {"dcs__view__epoch__holder": "c"}])
def test_what_cannot_be_promoted_gives_the_lock_back(changes):
    demote = only(WINNER.but(**changes).decide(), Demote)
    assert (demote.mode, demote.release) == ("kill", True)


BOOKS = [
    row("nothing to do", refuses="", does="", situation="leading", summary="no action. I am (a), the leader with the lock"),
    row("standby.signal is missing", directory__standby_signal=False, does="RestoreStandbySignal"),
    row("… but the directory cannot be read", directory__standby_signal=False, directory__state="unreadable", does=""),
    row("initialize is missing", dcs__view__initialize=None, does="WriteInitialize"),
    row("… and it is not known what to write", dcs__view__initialize=None, postgres__row__system_identifier="", does=""),
    row("config is missing", dcs__view__config=None, settings__dynamic_config=b"{}", does="WriteKey"),
    row("config is missing and not known", dcs__view__config=None, does=""),
    row("status is old", memory__last_status_at=ago(10), postgres__row__lsn=LSN + 1, does="WriteKey"),
    row("status is old and says the same", memory__last_status_at=ago(10), does=""),
    row("status was written just now", memory__last_status_at=ago(9), postgres__row__lsn=LSN + 1, does=""),
    row("a slot is missing", postgres__row__slots=(slot("b"),), does="MaintainSlots"),
    row("configuration has changed", settings__configuration_changed=True, does="ApplyConfiguration"),
    row("the store fills", dcs__capacity=StoreCapacity(asked_at=ago(1), watched_since=ago(1), used_bytes=6 * MiB, quota_bytes=10 * MiB), refuses="capacity.store_has_room",
        says="6.0 MiB of 10.0 MiB used (60%)", does=""),
    row("the store has an alarm", dcs__capacity=StoreCapacity(asked_at=ago(1), watched_since=ago(1), used_bytes=1, quota_bytes=10 * MiB, alarms=("NOSPACE",)),
        refuses="capacity.store_has_room", says="alarms: NOSPACE"),
    row("there is room", dcs__capacity=StoreCapacity(asked_at=ago(1), watched_since=ago(1), used_bytes=MiB, quota_bytes=10 * MiB), refuses="", says="1.0 MiB of 10.0 MiB"),
    row("nobody compacts", does="CompactStore", dcs__capacity=StoreCapacity(asked_at=ago(1), watched_since=ago(90000), used_bytes=3 * MiB, quota_bytes=10 * MiB, day_old_revision=5)),
    row("nobody compacts, and pgha may not", does="", settings__may_compact_store=False,
        dcs__capacity=StoreCapacity(asked_at=ago(1), watched_since=ago(90000), used_bytes=3 * MiB, quota_bytes=10 * MiB, day_old_revision=5)),
    row("somebody compacts", does="", dcs__capacity=StoreCapacity(asked_at=ago(1), watched_since=ago(90000), compacted_at=ago(3600), used_bytes=3 * MiB, quota_bytes=10 * MiB, day_old_revision=5)),
    row("little is used", does="", dcs__capacity=StoreCapacity(asked_at=ago(1), watched_since=ago(90000), used_bytes=2 * MiB, quota_bytes=10 * MiB, day_old_revision=5)),
    row("it is compacted as far", does="", dcs__capacity=StoreCapacity(asked_at=ago(1), watched_since=ago(90000), used_bytes=3 * MiB, quota_bytes=10 * MiB, day_old_revision=5, compact_revision=5)),
]


@pytest.mark.parametrize("case", BOOKS)
def test_books(case):
    check(LEADER, case)


def test_without_a_view_a_leader_reads():
    """Only a standby: a primary's licence is lease's business first."""
    assert names(LEADER.but(dcs__view=None).decide()) == ()
    assert LEADER.but(dcs__view=None).decide().situation == "blind"


def test_since_when_the_lock_is_held_is_forgotten_with_it():
    assert WINNER.decide().memory.holding_since is not None
    assert REPLICA.but(memory__holding_since=ago(3600)).decide().memory.holding_since is None


def test_what_is_written_carries_epoch_and_revision():
    action = only(LEADER.but(memory__last_status_at=None, postgres__row__lsn=LSN + 1).decide(), WriteKey)
    assert (action.key, action.if_revision, action.epoch_revision) == ("status", 90, 50)
    assert json.loads(action.value) == {**STATUS, "optime": LSN + 1, "slots": {**STATUS["slots"], "a": LSN + 1}}
    assert only(LEADER.but(dcs__view__initialize=None).decide(), WriteInitialize) == WriteInitialize(value=SYSTEM, if_revision=2)


def test_what_is_not_known_of_status_is_kept():
    action = only(LEADER.but(memory__last_status_at=None, dcs__view__status__raw={"optime": 1, "failsafe": {"x": 1}}).decide(), WriteKey)
    assert json.loads(action.value)["failsafe"] == {"x": 1}


def _promoted(**changes):
    """To timeline 4, which nobody has written down yet."""
    return LEADER.but(postgres__row__timeline=4, directory__history=(*LEADER.seen.directory.history, HistoryRow(timeline=3, switch_lsn=LSN, reason="no recovery target specified")), **changes)


def test_history_is_written_after_a_promotion_and_old_rows_stay_as_they_are():
    known = (HistoryEntry(timeline=1, lsn=8 * MiB, reason="r", timestamp="t", leader="c"), HistoryEntry(timeline=2, lsn=16 * MiB))
    action = only(_promoted(dcs__view__history=known).decide(), WriteKey)
    assert (action.key, action.if_revision) == ("history", 51)
    assert json.loads(action.value) == [[1, 8 * MiB, "r", "t", "c"], [2, 16 * MiB],
                                        [3, LSN, "no recovery target specified", "2027-01-15T08:00:00.000000+00:00", "a"]]


def test_history_is_cut_to_what_the_operator_keeps():
    action = only(_promoted(settings__max_timelines_history=1).decide(), WriteKey)
    assert [r[0] for r in json.loads(action.value)] == [3]


@pytest.mark.parametrize("changes", [
    {"postgres__row__timeline": 4, "directory__history": ()},      # not looked at since the promotion
    {"postgres__row__timeline": 3},
    {"postgres__row__timeline": 1, "dcs__view__history": (), "directory__history": ()},
    {"postgres__row__timeline": TIMELINE + 4},      # numbers of others were left out, and it is told already
])
def test_history_is_left_alone(changes):
    assert "WriteKey" not in names(LEADER.but(**changes).decide())


@pytest.mark.parametrize("wall_s, text", [
    (0.0, "1970-01-01T00:00:00.000000+00:00"), (951_782_400.25, "2000-02-29T00:00:00.250000+00:00"), (4_107_542_399.0, "2100-02-28T23:59:59.000000+00:00"),
    (4_107_542_400.0, "2100-03-01T00:00:00.000000+00:00"), (1_735_689_599.5, "2024-12-31T23:59:59.500000+00:00"),
])
def test_timestamps(wall_s, text):
    assert _timestamp(wall_s) == text


def _request(number, kind, **options):
    return Request(id=number, kind=kind, at=ago(1), options=options)


def test_operators_requests_one_restart_a_pass():
    decision = LEADER.but(requests=(_request(2, "restart", timeout_s=7), _request(3, "restart"))).decide()
    assert names(decision) == ("Restart",)
    assert only(decision, Restart) == Restart(as_primary=True, timeout_s=7.0, request_id=2)
    assert only(LEADER.but(requests=(_request(2, "restart"),)).decide(), Restart).timeout_s == 300


# --- switchover ----------------------------------------------------------------------------------------------------------

ASKED = LEADER.but(dcs__view__failover=FailoverKey(leader="a", candidate="c"), dcs__view__revisions={**LEADER.seen.dcs.view.revisions, "failover": 99},
                   memory__switchover_revision=99, memory__switchover_asked_at=ago(2.1))

SWITCHOVER = [
    row("c can", refuses="", does="Demote", says="c can take over", summary="handing over: switchover to c"),
    row("anybody, b and c can", dcs__view__failover__candidate="", refuses="", does="Demote", says="b, c can take over", summary="to the best standby"),
    row("anybody, only b can", dcs__view__failover__candidate="", peers__c=peer("c", tags=replace(peer("c").tags, nofailover=True)), refuses="", does="Demote", says="b can take over"),
    row("c has nofailover", peers__c=peer("c", tags=replace(peer("c").tags, nofailover=True)), refuses="switchover.has_good_candidate", does="WriteKey", says="c: tag nofailover is set",
        summary="refused to hand over"),
    row("c is silent", peers={"c": replace(peer("c"), answered=False, why="timed out")}, refuses="switchover.has_good_candidate", says="c: does not answer (timed out)"),
    row("c was never asked", peers={}, refuses="switchover.has_good_candidate", says="c: does not answer"),
    row("c is behind", peers__c=peer("c", lsn=LSN - 2 * MiB), refuses="switchover.has_good_candidate", says="c: lag 2.0 MiB, limit 1.0 MiB"),
    row("c is as far behind as it may", peers__c=peer("c", lsn=LSN - MiB), refuses=""),
    row("c is on another timeline", peers__c=peer("c", timeline=2), refuses="switchover.has_good_candidate", says="c: timeline 2, the leader's is 3"),
    row("c is a primary", peers__c=peer("c", in_recovery=False), refuses="switchover.has_good_candidate", says="c: is no standby"),
    row("c would not lead now", peers__c=peer("c", candidate=False), refuses="switchover.has_good_candidate", says="c: would not take the lock now"),
    row("it was tried, and came to nothing", memory__handed_over_revision=99, refuses="switchover.was_not_tried", does="WriteKey", summary="refused to hand over", says="c has not become the leader"),
    row("another was tried", memory__handed_over_revision=98, refuses="", does="Demote"),
    row("c has no watchdog", peers__c=peer("c", watchdog_failed=True), refuses="switchover.has_good_candidate", says="c: its watchdog"),
    row("d is nobody", dcs__view__failover__candidate="d", refuses="switchover.has_good_candidate", says="d: is no member"),
    row("everything is wrong with c", peers__c=peer("c", in_recovery=False, lsn=0, timeline=2, watchdog_failed=True), refuses="switchover.has_good_candidate",
        says="c: is no standby, its watchdog is required and not usable, lag 64.0 MiB, limit 1.0 MiB, timeline 2, the leader's is 3"),
    row("c has not answered, and may still", peers={}, memory__switchover_asked_at=ago(1.9), refuses="switchover.has_good_candidate", does="", summary="asking the others"),
    row("asked anew", peers={}, memory__switchover_revision=98, refuses="switchover.has_good_candidate", does="", summary="asking the others"),
    row("meant for another leader", dcs__view__failover__leader="b", refuses="", says="it asks b to hand over, and a leads", does="WriteKey", summary="clearing"),
    row("carried out already: this is the candidate", dcs__view__failover=FailoverKey(leader="", candidate="a"), refuses="", says="a, which was asked for, leads",
        does="WriteKey", summary="clearing"),
    row("from anybody", dcs__view__failover__leader="", refuses="", does="Demote"),
    row("on a date", dcs__view__failover__scheduled_at="2030-01-01T00:00Z", refuses="", does="", summary="no action"),
    row("in two seconds", dcs__view__failover__scheduled_at="2027-01-15T08:00:02Z", refuses="", does="", summary="no action", says="in 2.0 s"),
    row("now", dcs__view__failover__scheduled_at="2027-01-15T09:00:00+01:00", refuses="", does="WriteKey", summary="the time of the switchover to c has come"),
    row("15 s ago", dcs__view__failover__scheduled_at="2027-01-15T07:59:45Z", refuses="", does="WriteKey", summary="has come", says="15.0 s ago, limit 15 s"),
    row("15.1 s ago", dcs__view__failover__scheduled_at="2027-01-15T07:59:44.9Z", refuses="switchover.is_in_time", does="WriteKey", summary="refused to hand over", says="15.1 s ago"),
    row("29 s ago, loop_wait 20", dcs__view__failover__scheduled_at="2027-01-15T07:59:31Z", settings__loop_wait_s=20.0, refuses="", says="limit 30 s", summary="has come"),
    row("now, in pause", dcs__view__failover__scheduled_at="2027-01-15T08:00:00Z", settings__pause=True, refuses="", does="", summary="no action"),
    row("stale, in pause", dcs__view__failover__scheduled_at="2027-01-15T07:00:00Z", settings__pause=True, refuses="switchover.is_in_time", does="WriteKey"),
    row("at no moment", dcs__view__failover__scheduled_at="soon", refuses="switchover.is_in_time", does="WriteKey", says="'soon' is no moment in time", summary="refused to hand over"),
    row("in no zone", dcs__view__failover__scheduled_at="2030-01-01T00:00", refuses="switchover.is_in_time", does="WriteKey", says="does not say in which time zone"),
    row("now, and nobody is named", dcs__view__failover=FailoverKey(scheduled_at="2027-01-15T08:00:00Z"), refuses="", does="WriteKey", summary="names neither leader nor candidate"),
    row("later, and nobody is named", dcs__view__failover=FailoverKey(scheduled_at="2027-01-15T09:00:00Z"), refuses="", does="", summary="no action"),
]


@pytest.mark.parametrize("case", SWITCHOVER)
def test_switchover(case):
    check(ASKED, case)


def test_a_switchover_stops_in_order_and_gives_the_lock_back():
    demote = only(ASKED.decide(), Demote)
    assert (demote.mode, demote.release, demote.checkpoint) == ("fast", True, True)
    assert ASKED.decide().memory.handed_over_revision == 99


def test_a_switchover_whose_time_has_come_becomes_one_for_now():
    """In the store, where everybody sees the same; with what else stood there; and only if it is still what was read."""
    raw = {"leader": "a", "member": "c", "scheduled_at": "2027-01-15T08:00:00Z", "other": [1]}
    action = only(ASKED.but(dcs__view__failover__scheduled_at=raw["scheduled_at"], dcs__view__failover__raw=raw).decide(), WriteKey)
    assert json.loads(action.value) == {"leader": "a", "member": "c", "other": [1]}
    assert (action.key, action.if_revision, action.epoch_revision) == ("failover", 99, 50)


def test_the_loop_wakes_at_the_very_moment():
    decision = ASKED.but(dcs__view__failover__scheduled_at="2027-01-15T08:00:02.5Z").decide()
    assert decision.wake_in_s == pytest.approx(2.5)
    assert ASKED.but(dcs__view__failover__scheduled_at="2027-01-15T08:01:00Z").decide().wake_in_s == 10.0


def test_the_others_are_waited_for_from_when_its_time_came():
    """The request of an hour ago had not asked anybody."""
    assert ASKED.but(peers={}, memory__switchover_asked_at=None).decide().memory.switchover_asked_at is not None


def test_a_cleared_failover_key_is_compared():
    action = only(ASKED.but(peers={}).decide(), WriteKey)
    assert (action.key, action.value, action.if_revision, action.epoch_revision) == ("failover", b"{}", 99, 50)


def test_the_only_node_has_nobody_to_hand_over_to():
    alone = ASKED.but(dcs__view__failover__candidate="", dcs__view__members={}, dcs__remembered_members={})
    assert refused(alone.decide()) == ("switchover.has_good_candidate",)
    assert "there is no other member" in alone.decide().summary


def test_a_request_that_was_carried_out_is_forgotten():
    assert LEADER.but(memory__switchover_asked_at=ago(9)).decide().memory.switchover_asked_at is None

