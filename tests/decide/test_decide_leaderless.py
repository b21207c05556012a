"""Nobody holds the lock (decide/leaderless.py): waiting, freezing, voting, taking."""

from __future__ import annotations

import pytest
from decide_world import (
    BIRTH,
    CANDIDATE,
    DIRECTORY,
    LSN,
    NOW,
    REPLICA,
    TIMELINE,
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
    standby_row,
    with_lock,
)

from pgha.decide.standing import Whose, standing
from pgha.model.action import AcquireLock, Freeze, Restart
from pgha.model.cluster import ClusterView
from pgha.model.decision import Election
from pgha.model.lock import Licence, LicenceState
from pgha.model.node import WalReceiver
from pgha.model.wal import Position

ELECTION = [
    row("all is well", situation="leaderless", refuses="", does="AcquireLock"),
    row("not read just now", dcs__read_at=ago(0.6), refuses="restart.read_in_this_pass", says="last read 0.60 s ago, limit 0.5 s", does="ReadCluster", summary="as soon as it is read to be free"),
    row("not read just now, and an obstacle", dcs__read_at=ago(0.6), guard__reachable=False, does="ReadCluster", summary="not taking the lock: guard does not answer"),
    row("not read just now, not in this election yet", dcs__read_at=ago(0.6), memory__election=None, does="ReadCluster", summary="reading the cluster"),
    row("not frozen", memory__election=None, does="Freeze", summary="stopped streaming, so that the position is final"),
    row("frozen in another epoch", memory__election__epoch=4, does="Freeze"),
    row("frozen for this epoch's former record", memory__election__lock_revision=99, refuses="", does="AcquireLock"),
    row("the walreceiver still lives", postgres__row__receiver=WalReceiver(status="streaming"), refuses="leaderless.position_is_final", says="walreceiver is streaming", does=""),
    row("the settings are not empty yet", postgres__row__primary_conninfo="host=a", refuses="leaderless.position_is_final", says="primary_conninfo is still set", does=""),
    row("nothing was received since it started, replay stands", postgres__row__received_lsn=0, memory__election__standing_lsn=LSN, memory__election__standing_since=ago(0.75), refuses="", does="AcquireLock"),
    row("nothing was received since it started, replay stands, but not at the end", postgres__row__received_lsn=0, postgres__row__startup_rests=False, memory__election__standing_lsn=LSN,
        memory__election__standing_since=ago(9), refuses="leaderless.position_is_final", says="what lies in pg_wal is not replayed yet", does=""),
    row("nothing was received since it started, replay goes on", postgres__row__received_lsn=0, memory__election__standing_lsn=LSN - 1, memory__election__standing_since=ago(9),
        refuses="leaderless.position_is_final", says="for 0.00 s, 0.5 s needed"),
    row("an upstream is set a second after the freeze", postgres__row__primary_conninfo="host=a", memory__election__frozen_at=ago(1.2), refuses="leaderless.position_is_final", does="Freeze",
        summary="freezing again"),
    row("a restore command is set a second after the freeze", postgres__row__restore_command="cp", memory__election__frozen_at=ago(1.2), does="Freeze"),
    row("asked before the freeze", postgres__row_at=ago(1), refuses="leaderless.position_is_final", says=("-0.100 s after the freeze", "0.05 s needed"), does=""),
    row("asked too soon after it", memory__election__frozen_at=ago(0.24), refuses="leaderless.position_is_final", says="0.040 s after the freeze", does=""),
    row("asked just after it", memory__election__frozen_at=ago(0.26), refuses=""),
    row("it is not known when", postgres__row_at=None, refuses="leaderless.position_is_final", says="not frozen yet"),
    row("it does not answer", postgres__row=None, postgres__answer="silent", refuses="leaderless.position_is_final promotion.in_recovery promotion.timeline_is_known promotion.no_peer_is_ahead "
        "promotion.caught_up", does=""),
]


@pytest.mark.parametrize("case", ELECTION)
def test_election(case):
    check(CANDIDATE, case)


def test_the_freeze_is_for_this_epoch_and_remembered():
    decision = CANDIDATE.but(memory__election=None).decide()
    assert only(decision, Freeze).epoch == 5
    election = decision.memory.election
    assert (election.epoch, election.lock_revision, election.began_at, election.frozen_at, election.voted_at) == (5, 100, NOW, NOW, None)
    assert decision.vote.epoch == -1


def test_a_vote_is_given_once_the_position_is_final_and_not_before():
    final = CANDIDATE.but(memory__election__voted_at=None).decide()
    assert (final.vote.epoch, final.vote.timeline, final.vote.lsn, final.vote.candidate) == (5, TIMELINE, LSN, True)
    assert final.memory.election.voted_at == NOW
    moving = CANDIDATE.but(memory__election__voted_at=None, postgres__row__receiver=WalReceiver(status="streaming")).decide()
    assert (moving.vote.epoch, moving.memory.election.voted_at) == (-1, None)


@pytest.mark.parametrize("world", [CANDIDATE.but(dcs__read_at=ago(0.6), memory__election=None), with_lock(CANDIDATE, None, absent_since=ago(1))], ids=["not read", "absent"])
def test_whoever_is_asked_before_it_takes_part_tells_where_it_is(world):
    """A position of 0 would look as if it had nothing: whoever has less would take the lock before it."""
    decision = world.decide()
    assert (decision.situation, decision.vote.epoch, decision.vote.timeline, decision.vote.lsn) == ("leaderless", -1, TIMELINE, LSN)


def test_a_vote_says_if_its_node_would_not_take_the_lock():
    assert CANDIDATE.but(guard__reachable=False).decide().vote.candidate is False


def test_the_others_are_asked_for_this_epoch():
    decision = CANDIDATE.decide()
    assert (decision.ask_peers.names, decision.ask_peers.epoch) == ({"a": "http://a:8008", "c": "http://c:8008"}, 5)


def test_a_new_record_is_a_new_election_of_the_same_freeze():
    election = CANDIDATE.but(memory__election__lock_revision=99).decide().memory.election
    assert (election.lock_revision, election.began_at, election.frozen_at, election.voted_at) == (100, NOW, ago(0.9), NOW)


WAITING = [
    row("absent, not long enough", situation="leaderless", does="", summary="waiting: no record for 5.0 s, 30.3 s needed"),
    row("absent, read long ago", dcs__read_at=ago(1.1), does="ReadCluster"),
    row("absent, never read", dcs__read_at=None, does="ReadCluster"),
    row("the store was rebuilt", dcs__trusted_from=ahead(40), dcs__lock_seen__absent_since=ago(99), does="", summary="waiting: no record"),
    row("a take-over is on the way", licence=Licence(state=LicenceState.ACQUIRING), does="", summary="waiting: a take-over was sent"),
    row("absent, long enough", dcs__lock_seen__absent_since=ago(31), does="AcquireLock", memory__election__lock_revision=0, dcs__view__revisions={}),
]


@pytest.mark.parametrize("case", WAITING)
def test_absence(case):
    check(with_lock(CANDIDATE, None, absent_since=ago(5)).but(dcs__view__lock_revision=0), case)


def test_an_absent_record_is_taken_by_creating_it():
    world = with_lock(CANDIDATE, None, absent_since=ago(31)).but(memory__election__lock_revision=0)
    assert (only(world.decide(), AcquireLock).lock_revision, only(world.decide(), AcquireLock).lock_value) == (0, b"")


def test_data_in_a_cluster_that_never_was():
    """Data is somebody's, and may be being served: only absence for long enough makes the lock free."""
    world = with_lock(CANDIDATE, None).but(dcs__remembered_ttl_s=0.0, dcs__remembered_members={}, dcs__view=ClusterView(revision=1), peers={}, dcs__last_positions={},
                                           memory__election=Election(epoch=0, lock_revision=0, began_at=ago(1), frozen_at=ago(0.9), voted_at=ago(0.5)))
    assert (names(world.decide()), standing(world.seen).whose) == ((), Whose.ABSENT)
    waits = world.but(dcs__view=ClusterView(revision=2, initialize="")).decide()
    assert (waits.actions, waits.situation) == ((), "leaderless")
    assert BIRTH.but(directory=DIRECTORY).decide().situation == "broken"


def test_anothers_live_record_is_followed():
    assert with_lock(CANDIDATE, record("a"), since=ago(1)).decide().situation == "following"


def test_the_own_former_record_is_taken_over_by_a_standby_as_by_any():
    action = only(with_lock(CANDIDATE, record("b", incarnation="run-0"), since=ago(1)).decide(), AcquireLock)
    assert (action.readopt, action.claim_timeline) == (False, TIMELINE + 1)


@pytest.mark.parametrize("known", [{"dcs__last_positions": {"c": Position(timeline=TIMELINE + 2, lsn=LSN)}},
                                   {"peers": {"a": silent("a"), "c": peer("c", timeline=TIMELINE + 2, candidate=False, frozen_epoch=5)}}])
def test_a_number_that_a_member_is_known_to_be_on_is_not_taken_again(known):
    """A store that was rebuilt has lost the claims (simulation: two promotions to one number at one point)."""
    assert only(CANDIDATE.but(**known).decide(), AcquireLock).claim_timeline == TIMELINE + 3


def test_a_refusal_names_every_obstacle():
    decision = CANDIDATE.but(guard__reachable=False, watchdog__failed=True, peers={"a": silent("a"), "c": peer("c", lsn=LSN + 9, frozen_epoch=5)}).decide()
    assert refused(decision) == ("restart.guard_answers", "promotion.watchdog_is_usable", "promotion.no_peer_is_ahead")
    assert all(r.because in decision.summary for r in decision.reasons if not r.holds)


def test_who_streams_again_has_left_the_election():
    assert REPLICA.but(memory__election=CANDIDATE.memory.election).decide().memory.election is None
    assert standby_row().receiver is not None


def test_a_standby_whose_replay_has_stopped_for_want_of_room_restarts_before_it_takes_part():
    cramped = CANDIDATE.but(postgres__row__replay_paused=True, postgres__row__limits={"max_connections": 100}, directory__control__limits={"max_connections": 200})
    decision = cramped.decide()
    assert only(decision, Restart) == Restart(as_primary=False, timeout_s=300.0)
    assert decision.summary == "restarting to take part in the election: PostgreSQL has paused replay: max_connections 100, the primary's 200"
    assert decision.vote.epoch == -1, "it does not vote"
    assert not [a for a in CANDIDATE.but(postgres__row__replay_paused=True).decide().actions if isinstance(a, Restart)]
