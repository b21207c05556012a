"""Rules of decide/promotion.py: every obstacle on the way to the lock, each alone, with both numbers."""

from __future__ import annotations

import pytest
from decide_world import (
    CANDIDATE,
    LSN,
    SYSTEM,
    TIMELINE,
    KiB,
    MiB,
    ago,
    ahead,
    check,
    names,
    only,
    peer,
    record,
    refused,
    row,
    silent,
    with_lock,
    without,
)

from pgha.model.action import AcquireLock
from pgha.model.cluster import FailoverKey, HistoryEntry, Status, Tags
from pgha.model.wal import HistoryRow, Position

AHEAD_OF_US = {"c": 80 * MiB}

CONDITIONS = [
    row("healthy", refuses="", does="AcquireLock", summary="taking the lock: a's record was seen unchanged for 31.00 s, ttl 30 s"),
    row("8 MiB behind, limit 1 MiB", postgres__row__received_lsn=LSN - 8 * MiB, postgres__row__replayed_lsn=LSN - 8 * MiB, peers={"a": silent("a"), "c": peer("c", lsn=0, frozen_epoch=5)},
        refuses="promotion.caught_up", says=("lag 8.0 MiB", "limit 1.0 MiB"), does=""),
    row("just at the limit", postgres__row__received_lsn=LSN - MiB, postgres__row__replayed_lsn=0, peers={"a": silent("a"), "c": peer("c", lsn=0, frozen_epoch=5)},
        refuses="", says="lag 1.0 MiB, limit 1.0 MiB"),
    row("a byte behind the limit", postgres__row__received_lsn=LSN - MiB - 1, postgres__row__replayed_lsn=0, peers={"a": silent("a"), "c": peer("c", lsn=0, frozen_epoch=5)},
        refuses="promotion.caught_up"),
    row("behind what /status says, not what the record says", dcs__view__status=Status(optime=LSN + 2 * MiB), refuses="promotion.caught_up", says="lag 2.0 MiB"),
    row("behind what the record says, not what /status says", lock__lsn=LSN + 3 * MiB, refuses="promotion.caught_up", says="lag 3.0 MiB"),
    row("replay is further than what was received", postgres__row__received_lsn=LSN - MiB, postgres__row__replayed_lsn=LSN, refuses=""),
    row("a failover to this node was asked for", dcs__view__status=Status(optime=LSN + 8 * MiB), dcs__view__failover=FailoverKey(candidate="b"), refuses="",
        says="lag 8.0 MiB, limit 1.0 MiB, chosen by an operator"),
    row("a scheduled one does not count", dcs__view__status=Status(optime=LSN + 8 * MiB), dcs__view__failover=FailoverKey(candidate="b", scheduled_at="2030-01-01T00:00Z"),
        refuses="promotion.caught_up"),
    row("a switchover to this node does not excuse lag", dcs__view__status=Status(optime=LSN + 8 * MiB), dcs__view__failover=FailoverKey(leader="a", candidate="b"),
        refuses="promotion.caught_up"),
    row("nofailover", settings__tags=Tags.of({"nofailover": True}), refuses="promotion.not_nofailover promotion.no_peer_is_ahead", says="tag nofailover is set", does=""),
    row("failover_priority 0", settings__tags=Tags.of({"failover_priority": 0}), refuses="promotion.not_nofailover promotion.no_peer_is_ahead", says="priority 0"),
    row("low priority, nobody else as far", settings__tags=Tags.of({"failover_priority": 1}), refuses="", says="failover_priority is 1"),
    row("older timeline, check_timeline off", dcs__view__history=(HistoryEntry(timeline=TIMELINE, lsn=LSN),), refuses="", says="own timeline 3, the cluster's 4, check_timeline off"),
    row("older timeline, check_timeline on", dcs__view__history=(HistoryEntry(timeline=TIMELINE, lsn=LSN),), settings__check_timeline=True,
        refuses="promotion.timeline_is_known", says="own timeline 3, the cluster's 4"),
    row("newest timeline, check_timeline on", settings__check_timeline=True, refuses="", says="own timeline 3, the cluster's 3"),
    row("timeline unknown", postgres__row__timeline=0, refuses="promotion.timeline_is_known", says="own timeline 0"),
    row("another system", postgres__row__system_identifier="7000000000000000001", refuses="promotion.system_is_ours", says=("own 7000000000000000001", SYSTEM)),
    row("the store was emptied, and another system is remembered", dcs__view__initialize=None, dcs__remembered_identifier="7000000000000000001",
        refuses="promotion.system_is_ours", says=(f"own {SYSTEM}", "as far as this node remembers, 7000000000000000001")),
    row("the store was emptied, this system is remembered", dcs__view__initialize=None, dcs__remembered_identifier=SYSTEM, refuses="", says="as far as this node remembers"),
    row("another one is remembered, but the store says ours", dcs__remembered_identifier="7000000000000000001", refuses="", says="the cluster's 7"),
    row("another one is remembered, and an operator chose this node", dcs__view__initialize=None, dcs__remembered_identifier="7000000000000000001",
        dcs__view__failover=FailoverKey(candidate="b"), refuses=""),
    row("system not known yet", postgres__row__system_identifier="", refuses="", says="own unknown"),
    row("guard silent", guard__reachable=False, guard__why="connection refused", refuses="restart.guard_answers", says="guard does not answer: connection refused"),
    row("watchdog required, unusable", watchdog__failed=True, watchdog__why="/dev/watchdog: permission denied", refuses="promotion.watchdog_is_usable", says="permission denied"),
    row("PostgreSQL silent", postgres__answer="silent", refuses="promotion.in_recovery", says="PostgreSQL is running, answers: silent"),
    row("handed over just now, another can", memory__stand_back_until=ahead(7), memory__stand_back_why="it has just handed the lock over",
        refuses="promotion.has_not_just_failed", says=("it has just handed the lock over", "another 7.0 s", "in favour of c")),
    row("handed over just now, the others would not", memory__stand_back_until=ahead(7), peers={"a": silent("a"), "c": peer("c", frozen_epoch=5, candidate=False)}, refuses="",
        says="no other member could take over"),
    row("handed over just now, the other has nofailover", memory__stand_back_until=ahead(7), peers={"a": silent("a"), "c": peer("c", frozen_epoch=5, tags=Tags(nofailover=True))},
        refuses=""),
    row("handed over just now, somebody not asked yet", memory__stand_back_until=ahead(7), peers={"c": peer("c", frozen_epoch=5, candidate=False)},
        refuses="promotion.has_not_just_failed", says="in favour of others"),
    row("stood back long enough", memory__stand_back_until=ago(0.1), refuses="", says="nothing to stand back for"),
    row("asked for c, which can", dcs__view__failover=FailoverKey(leader="a", candidate="c"), refuses="promotion.is_not_asked_to_leave", says=("c", "1.0 s of 5 s")),
    row("asked for c, which cannot", dcs__view__failover=FailoverKey(leader="a", candidate="c"), peers={"a": silent("a"), "c": peer("c", frozen_epoch=5, candidate=False)}, refuses="",
        says="c, which does not answer as a standby"),
    row("asked for c, which had its time", dcs__view__failover=FailoverKey(leader="a", candidate="c"), memory__election__began_at=ago(5), refuses="",
        says="c, which has not taken the lock in time"),
    row("asked for c, which is silent", dcs__view__failover=FailoverKey(leader="a", candidate="c"), peers={"a": silent("a"), "c": silent("c")}, refuses=""),
    row("asked for c, which is silent so far", dcs__view__failover=FailoverKey(leader="a", candidate="c"), peers={"a": silent("a"), "c": silent("c")},
        memory__election__began_at=ago(0.2), refuses="promotion.is_not_asked_to_leave", says="0.2 s of 5 s"),
    row("asked for c on a date", dcs__view__failover=FailoverKey(leader="a", candidate="c", scheduled_at="2030-01-01T00:00Z"), refuses="", says="no other candidate"),
    row("asked for this node", dcs__view__failover=FailoverKey(leader="a", candidate="b"), refuses="", says="no other candidate"),
]


@pytest.mark.parametrize("case", CONDITIONS)
def test_conditions_of_this_node(case):
    check(CANDIDATE, case)


NEWER = HistoryRow(timeline=TIMELINE, switch_lsn=LSN)

PEERS = [
    row("a is still a primary", peers__a=peer("a", in_recovery=False, frozen_epoch=5), refuses="promotion.no_primary_is_alive", says="a still a primary", does=""),
    row("a answered as a primary two seconds ago", peers__a=peer("a", in_recovery=False, asked_at=ago(2), frozen_epoch=5), refuses="", does="AcquireLock"),
    row("c has more", peers__c=peer("c", lsn=LSN + KiB, frozen_epoch=5), refuses="promotion.no_peer_is_ahead", says=("c at 0/4000400 on timeline 3", "own 0/4000000 on timeline 3"), does=""),
    row("c has more, but nofailover", peers__c=peer("c", lsn=LSN + KiB, frozen_epoch=5, tags=Tags(nofailover=True)), refuses=""),
    row("c has more, but no watchdog", peers__c=peer("c", lsn=LSN + KiB, frozen_epoch=5, watchdog_failed=True), refuses=""),
    row("c has more, but would not", peers__c=peer("c", lsn=LSN + KiB, frozen_epoch=5, candidate=False), refuses=""),
    row("c has more, but it is not known as what", peers__c=peer("c", lsn=LSN + KiB, frozen_epoch=5, in_recovery=None), refuses=""),
    row("c had more, two seconds ago", peers__c=peer("c", lsn=LSN + KiB, asked_at=ago(1.5), frozen_epoch=5), refuses="promotion.peers_were_waited_for", says="c last known ahead"),
    row("c has more, an operator asked for this node", peers__c=peer("c", lsn=LSN + KiB, frozen_epoch=5), dcs__view__failover=FailoverKey(candidate="b"), refuses=""),
    row("c has less", peers__c=peer("c", lsn=LSN - KiB, frozen_epoch=5), refuses="", does="AcquireLock"),
    row("equal, c has the higher priority", peers__c=peer("c", frozen_epoch=5, tags=Tags(failover_priority=5)), refuses="promotion.no_peer_is_ahead", says=("priority 5", "priority 1")),
    row("equal, c has the lower priority", peers__c=peer("c", frozen_epoch=5), settings__tags=Tags(failover_priority=5), refuses=""),
    row("more beats priority", peers__c=peer("c", lsn=LSN - 1, frozen_epoch=5, tags=Tags(failover_priority=5)), refuses=""),
    row("equal, a comes before b by name", peers__a=peer("a", frozen_epoch=5), refuses="promotion.no_peer_is_ahead", says="a at 0/4000000"),
    row("equal, moving, name does not count yet", peers__a=peer("a"), refuses="", says="a without a final position"),
    row("equal, of another make, which knows no order of names", peers__a=peer("a", is_pgha=False), refuses="", does="AcquireLock"),
    row("of another make, with a higher priority", peers__a=peer("a", is_pgha=False, tags=Tags(failover_priority=2)), refuses="promotion.no_peer_is_ahead"),
    row("c is on a newer timeline that ours ends in", peers__c=peer("c", frozen_epoch=5, timeline=4, lsn=LSN, history=(NEWER,)), refuses="promotion.no_peer_is_ahead",
        says="c at 0/4000000 on timeline 4"),
    row("c is on a newer timeline that ends behind us, and has less", peers__c=peer("c", frozen_epoch=5, timeline=4, lsn=LSN - KiB, history=(HistoryRow(timeline=3, switch_lsn=LSN - MiB),)),
        refuses=""),
    row("c is on a newer timeline that ends behind us, and has more", peers__c=peer("c", frozen_epoch=5, timeline=4, lsn=LSN + KiB, history=(HistoryRow(timeline=3, switch_lsn=LSN - MiB),)),
        refuses="promotion.no_peer_is_ahead"),
    row("c is on a newer timeline, it does not say whence", peers__c=peer("c", frozen_epoch=5, timeline=4, lsn=0, history=()), refuses="promotion.no_peer_is_ahead"),
    row("c is on an older timeline with more", peers__c=peer("c", frozen_epoch=5, timeline=2, lsn=LSN + MiB), refuses="", does="AcquireLock"),
    row("all gave their votes", peers__a=peer("a", frozen_epoch=5, lsn=LSN - 1), refuses="", says="all 2 other members gave their position"),
    row("a vote of a former election", peers__c=peer("c", frozen_epoch=4), memory__election__voted_at=ago(0.2), peers__a=peer("a", frozen_epoch=5, lsn=0),
        refuses="promotion.peers_were_waited_for", says="c without a final position, none known ahead, waited 0.20 s of 0.3 s"),
    row("the same, waited for", peers__c=peer("c", frozen_epoch=4), memory__election__voted_at=ago(0.35), peers__a=peer("a", frozen_epoch=5, lsn=0), refuses=""),
    row("nobody who may not lead is waited for", peers__c=peer("c", tags=Tags(nofailover=True)), memory__election__voted_at=ago(0.1), peers__a=peer("a", frozen_epoch=5, lsn=0), refuses=""),
    row("a silent for half a second", peers__a=silent("a", for_s=0.2), memory__election__voted_at=ago(0.1), refuses="promotion.peers_were_waited_for", says="waited 0.20 s of 0.3 s"),
    row("a silent since before the vote", peers__a=silent("a", for_s=3), memory__election__voted_at=ago(0.01), refuses=""),
    row("a silent, last published ahead", dcs__last_positions={"a": Position(timeline=3, lsn=LSN + KiB)}, peers__a=silent("a", for_s=1.5), refuses="promotion.peers_were_waited_for",
        says=("a last known ahead of 0/4000000", "waited 1.50 s of 2.0 s")),
    row("a silent, its key says ahead", dcs__view__members__a__xlog_location=LSN + KiB, peers__a=silent("a", for_s=1.5), refuses="promotion.peers_were_waited_for"),
    row("c moving and ahead by its answer", peers__c=peer("c", lsn=LSN + KiB, candidate=False), refuses="promotion.peers_were_waited_for", says="c last known ahead"),
    row("a silent and ahead for two seconds", dcs__last_positions={"a": Position(timeline=3, lsn=LSN + KiB)}, peers__a=silent("a", for_s=2), refuses="", does="AcquireLock"),
    row("ahead, an operator asked for this node", dcs__last_positions={"a": Position(timeline=3, lsn=LSN + KiB)}, peers__a=silent("a", for_s=0), dcs__view__failover=FailoverKey(candidate="b"),
        refuses="", says="a not waited for: this node was chosen"),
    row("released with a position to this very node", lock__mode="released", dcs__view__failover=FailoverKey(leader="a", candidate="b"), peers={},
        memory__election__voted_at=ago(0.01), refuses="", says="not waited for: this node was chosen"),
    row("released with a position that this node lacks", lock__mode="released", lock__lsn=LSN + 1, dcs__view__failover=FailoverKey(leader="a", candidate="b"), peers={},
        memory__election__voted_at=ago(0.01), refuses="promotion.peers_were_waited_for"),
    row("released with a timeline that this node lacks", lock__mode="released", lock__timeline=4, dcs__view__failover=FailoverKey(leader="a", candidate="b"), peers={},
        memory__election__voted_at=ago(0.01), refuses="promotion.peers_were_waited_for"),
    row("released without a position", lock__mode="released", lock__lsn=0, dcs__view__failover=FailoverKey(leader="a", candidate="b"), peers={},
        memory__election__voted_at=ago(0.01), refuses="promotion.peers_were_waited_for"),
    row("released to anybody", lock__mode="released", dcs__view__failover=FailoverKey(leader="a"), peers={}, memory__election__voted_at=ago(0.01),
        refuses="promotion.peers_were_waited_for"),
    row("expired, not released", dcs__view__failover=FailoverKey(leader="a", candidate="b"), peers={}, memory__election__voted_at=ago(0.01), refuses="promotion.peers_were_waited_for"),
]


@pytest.mark.parametrize("case", PEERS)
def test_conditions_about_peers(case):
    check(CANDIDATE, case)


def test_members_whose_keys_are_gone_are_waited_for():
    """After an outage longer than the ttl of member keys a lagging node would else see only itself."""
    world = CANDIDATE.but(dcs__view__members={}, peers={}, memory__election__voted_at=ago(0.1), dcs__last_positions={"c": Position(timeline=3, lsn=LSN + MiB)})
    assert refused(world.decide()) == ("promotion.peers_were_waited_for",)


def test_the_last_one_left_waits_for_nobody():
    assert names(without(CANDIDATE, "a", "c").but(memory__election__voted_at=ago(0.01)).decide()) == ("AcquireLock",)


def test_every_obstacle_is_reported_at_once():
    decision = CANDIDATE.but(
        settings__tags=Tags.of({"nofailover": True}), dcs__view__status=Status(optime=LSN + 8 * MiB), guard__reachable=False, watchdog__failed=True, settings__check_timeline=True,
        dcs__view__history=(HistoryEntry(timeline=9, lsn=1),), postgres__row__system_identifier="1", peers__a=peer("a", in_recovery=False),
        peers__c=peer("c", lsn=LSN + MiB), memory__election__voted_at=ago(0.1), memory__stand_back_until=ahead(3), dcs__view__failover=FailoverKey(leader="a", candidate="c")).decide()
    assert set(refused(decision)) == {
        "promotion.caught_up", "promotion.not_nofailover", "restart.guard_answers", "promotion.watchdog_is_usable", "promotion.timeline_is_known", "promotion.system_is_ours",
        "promotion.no_primary_is_alive", "promotion.no_peer_is_ahead", "promotion.peers_were_waited_for", "promotion.has_not_just_failed", "promotion.is_not_asked_to_leave"}
    assert decision.actions == ()
    for reason in decision.reasons:
        assert reason.holds or reason.because in decision.summary


def test_of_two_frozen_standbys_exactly_one_goes_first():
    """Whatever their positions on the same timeline, priorities and names: the other one says that it does not."""
    for mine, theirs in ((LSN, LSN), (LSN, LSN - 8), (LSN - 8, LSN)):
        for my_priority, their_priority in ((1, 1), (1, 2), (2, 1)):
            b = without(CANDIDATE, "a").but(postgres__row__received_lsn=mine, postgres__row__replayed_lsn=mine, settings__tags=Tags(failover_priority=my_priority),
                                            peers__c=peer("c", lsn=theirs, frozen_epoch=5, tags=Tags(failover_priority=their_priority)))
            c = without(CANDIDATE, "a").but(postgres__row__received_lsn=theirs, postgres__row__replayed_lsn=theirs, settings__tags=Tags(failover_priority=their_priority),
                                            me__name="c", me__node_id="id-c", me__incarnation="run-c", peers={"b": peer("b", lsn=mine, frozen_epoch=5, tags=Tags(failover_priority=my_priority))})
            assert sorted((names(b.decide()), names(c.decide()))) == [(), ("AcquireLock",)], (mine, theirs, my_priority, their_priority)


# --- what is taken -----------------------------------------------------------------------------------------------------

def test_exactly_the_record_that_was_judged_is_taken_with_what_it_was_judged_on():
    action = only(CANDIDATE.decide(), AcquireLock)
    assert action == AcquireLock(lock_revision=100, lock_value=b"record", epoch_revision=50, epoch_number=5, also_unchanged={"sync": 0, "failsafe": 0, "config": 3, "leader": 50},
                                 readopt=False, claim_timeline=4, claims=(), lsn=LSN, timeline=TIMELINE)


@pytest.mark.parametrize("changes, claim", [
    ({"dcs__view__epoch__timeline": 6}, 7),
    ({"dcs__view__epoch__claims": ((9, "c"),)}, 10),
    ({"dcs__view__history": (HistoryEntry(timeline=7, lsn=1),)}, 9),
    ({"postgres__row__timeline": 5}, 6),
])
def test_a_timeline_is_claimed_above_all_that_anybody_knows_of(changes, claim):
    assert only(CANDIDATE.but(**changes).decide(), AcquireLock).claim_timeline == claim


def test_a_claim_that_is_not_known_to_be_used_is_kept():
    action = only(CANDIDATE.but(dcs__view__epoch__timeline=4, dcs__view__epoch__claims=((3, "c"),)).decide(), AcquireLock)
    assert action.claims == ((3, "c"), (4, "a"))


def test_claims_are_bounded():
    action = only(CANDIDATE.but(dcs__view__epoch__timeline=99, dcs__view__epoch__claims=tuple((n, "c") for n in range(50))).decide(), AcquireLock)
    assert len(action.claims) == 20
    assert action.claims[-1] == (99, "a")


def test_a_released_record_may_be_taken_at_once():
    world = with_lock(CANDIDATE, record("a", mode="released"), since=ago(0.01))
    assert names(world.decide()) == ("AcquireLock",)
