"""Somebody else holds the lock (decide/following.py, cascade.py): stream from the right server."""

from __future__ import annotations

import pytest
from decide_world import (
    CLAIM,
    HISTORY,
    LSN,
    REPLICA,
    SYSTEM,
    TIMELINE,
    ago,
    ahead,
    check,
    only,
    record,
    row,
    with_lock,
)
from msgspec import structs

from pgha.model.action import Follow, Restart, Source, Stop, WriteInitialize
from pgha.model.cluster import Tags
from pgha.model.node import WalReceiver
from pgha.model.observation import Upstream
from pgha.model.request import Request
from pgha.model.wal import HistoryRow

CRAMPED = {"postgres__row__replay_paused": True, "postgres__row__limits": {"max_connections": 100, "max_wal_senders": 10},
           "directory__control__limits": {"max_connections": 200, "max_wal_senders": 10}}
ROWS = [
    row("streams", situation="following", refuses="", does="", says="wanted a:5432, set a:5432, slot b", summary="following a leader (a)"),
    row("a restored store says so", dcs__trusted_from=ahead(20), dcs__generation_changed="the store is another one", refuses="", does="",
        summary="following a leader (a); the store is another one: no record is believed for another 20.0 s"),
    row("a restored store shows this node's own record", lock__holder="b", lock__node_id="id-b", dcs__trusted_from=ahead(20), dcs__generation_changed="the store is another one",
        summary="a secondary, and this node's own record is not believed"),
    row("of another host", postgres__row__primary_conninfo="host=c port=5432", refuses="following.follows_wanted", says="wanted a:5432, set c:5432", does="Follow"),
    row("of another port", postgres__row__primary_conninfo="host=a port=5433", refuses="following.follows_wanted", does="Follow"),
    row("without its slot", postgres__row__primary_slot_name="", refuses="following.follows_wanted", says="slot none", does="Follow"),
    row("of nobody", postgres__row__primary_conninfo="", refuses="following.follows_wanted", does="Follow"),
    row("the files are a former agent's", configured_upstream="", refuses="following.follows_wanted", does="Follow"),
    row("quoted", postgres__row__primary_conninfo="user='r' host='a' port='5432'", refuses=""),
    row("the leader has no key: left as it is", dcs__view__members={}, postgres__row__primary_conninfo="host=x port=1", refuses="", says="the leader's address is not known", does=""),
    row("no slots, none is set", settings__use_slots=False, postgres__row__primary_slot_name="", postgres__row__slots=(), refuses="", does=""),
    row("nostream", settings__tags=Tags(nostream=True), refuses="following.follows_wanted", does="Follow"),
    row("nostream, and streams of nobody", settings__tags=Tags(nostream=True), postgres__row__primary_conninfo="", postgres__row__primary_slot_name="", configured_upstream="", refuses="", does=""),
    row("of c by its tag", settings__tags=Tags(replicatefrom="c"), refuses="following.follows_wanted", says="wanted c:5432", does="Follow"),
    row("of c, which does not run", settings__tags=Tags(replicatefrom="c"), dcs__view__members__c__state="stopped", refuses=""),
    row("of somebody unknown", settings__tags=Tags(replicatefrom="x"), refuses=""),
    row("of itself", settings__tags=Tags(replicatefrom="b"), refuses=""),
    row("of c, which is to stream from here", settings__tags=Tags(replicatefrom="c"), dcs__view__members__c__tags=Tags(replicatefrom="b"), refuses=""),
    row("of c, which is to stream from itself", settings__tags=Tags(replicatefrom="c"), dcs__view__members__c__tags=Tags(replicatefrom="c"), refuses="following.follows_wanted",
        says="wanted c:5432", does="Follow"),
    row("of c, which is to stream from here and is stopped", settings__tags=Tags(replicatefrom="c"), dcs__view__members__c__tags=Tags(replicatefrom="b"),
        dcs__view__members__c__state="stopped", refuses=""),
    row("of c, which is to stream from the leader, who is to stream from here", settings__tags=Tags(replicatefrom="c"), dcs__view__members__c__tags=Tags(replicatefrom="a"),
        dcs__view__members__a__tags=Tags(replicatefrom="b"), refuses="following.follows_wanted", says="wanted c:5432", does="Follow"),
    row("PostgreSQL starts", postgres__row=None, postgres__process="starting", postgres__answer="starting", does="", summary="PostgreSQL is starting (starting)"),
    row("initialize is missing", dcs__view__initialize=None, does="WriteInitialize"),
    row("initialize is missing, this does not stream, nothing is remembered", dcs__view__initialize=None, postgres__row__receiver=None, does=""),
    row("initialize is missing, this does not stream, another system is remembered", dcs__view__initialize=None, postgres__row__receiver=None,
        dcs__remembered_identifier="7000000000000000001", does=""),
    row("initialize is missing, this does not stream, and remembers the same", dcs__view__initialize=None, postgres__row__receiver=None, dcs__remembered_identifier=SYSTEM,
        does="WriteInitialize"),
    row("initialize is missing, and not known", dcs__view__initialize=None, postgres__row__system_identifier="", does=""),
    row("somebody is initialising", dcs__view__initialize="", does=""),
    row("configuration has changed", settings__configuration_changed=True, does="ApplyConfiguration"),
    row("a restart was asked for", requests=(Request(id=3, kind="restart", at=ago(1)),), does="Restart"),
    row("the primary allows more than this standby can", **CRAMPED, refuses="cramped.has_room", says="PostgreSQL has paused replay: max_connections 100, the primary's 200", does="Restart"),
    row("replay is paused by hand", postgres__row__replay_paused=True, does=""),
    row("it has less, and replays", **CRAMPED | {"postgres__row__replay_paused": False}, does=""),
    row("paused with more than the primary has", **CRAMPED | {"postgres__row__limits": {"max_connections": 300}}, does=""),
    row("a primary's limits are not known", **CRAMPED | {"directory__control": None}, does=""),
    row("in pause nothing is restarted", **CRAMPED, settings__pause=True, memory__paused=True, does=""),
    row("a restart is asked for anyway", **CRAMPED, requests=(Request(id=3, kind="restart", at=ago(1)),), does="Restart"),
]


@pytest.mark.parametrize("case", ROWS)
def test_following(case):
    check(REPLICA, case)


def test_whom_to_follow_and_by_which_slot():
    assert only(REPLICA.but(configured_upstream="").decide(), Follow) == Follow(upstream=Source(name="a", host="a", port=5432), slot_name="b")
    assert only(REPLICA.but(settings__tags=Tags(nostream=True)).decide(), Follow) == Follow(upstream=None, slot_name="")
    assert only(REPLICA.but(dcs__view__initialize=None).decide(), WriteInitialize) == WriteInitialize(value=SYSTEM, if_revision=2)


def test_a_standbys_restart_is_a_standbys():
    action = only(REPLICA.but(requests=(Request(id=3, kind="restart", at=ago(1), options={"timeout_s": 9.0}),)).decide(), Restart)
    assert action == Restart(as_primary=False, timeout_s=9.0, request_id=3, upstream=Source(name="a", host="a", port=5432), slot_name="b")
    assert only(REPLICA.but(settings__tags=Tags(nostream=True), requests=(Request(id=3, kind="restart", at=ago(1)),)).decide(), Restart).slot_name == ""


def test_peers_are_asked_from_two_seconds_before_the_expiry():
    assert REPLICA.decide().ask_peers.names == {}
    assert set(with_lock(REPLICA, record(), since=ago(28.4)).decide().ask_peers.names) == {"a", "c"}
    assert with_lock(REPLICA, record(), since=ago(25)).decide().wake_in_s == pytest.approx(3.3)
    assert with_lock(REPLICA, record(), since=ago(29)).decide().wake_in_s == pytest.approx(1.3)


def test_a_moving_position_is_no_vote():
    vote = REPLICA.decide().vote
    assert (vote.epoch, vote.timeline, vote.lsn) == (-1, TIMELINE, LSN)


# --- a standby that does not stream ---------------------------------------------------------------------------------------

ARCHIVE_ONLY = {"settings__tags": Tags(nostream=True), "postgres__row__primary_conninfo": "", "postgres__row__primary_slot_name": "", "configured_upstream": ""}
LOST = REPLICA.but(postgres__row__receiver=None, memory__not_streaming_since=ago(1.5), memory__upstream_asked_at=ago(3))
WENT_ON = Upstream(name="a", asked_at=ago(1), ok=True, system_identifier=SYSTEM, timeline=4, lsn=LSN, history=(*HISTORY, HistoryRow(timeline=3, switch_lsn=LSN - 1)))

AHEAD = Upstream(name="a", asked_at=ago(1), ok=True, timeline=3, lsn=LSN - 1, history=HISTORY)

LOOKS = [
    row("nor is it to, by its tag", **ARCHIVE_ONLY, does="", summary="following a leader (a)"),
    row("… and looks now and then whether it could", **ARCHIVE_ONLY, memory__upstream_asked_at=ago(30), does="InspectUpstream"),
    row("it looks why", does="InspectUpstream", summary="not streaming, asking a for its timeline"),
    row("not for long", memory__not_streaming_since=ago(0.9), does=""),
    row("asked a moment ago", memory__upstream_asked_at=ago(1.9), does=""),
    row("the leader is no primary yet", dcs__view__members__a__role="replica", does=""),
    row("the leader's timeline left ours behind us", upstream=WENT_ON, refuses="rejoin.judge", does="Stop", says="own WAL ends at 0/4000000 on timeline 3, a left that timeline at 0/3FFFFFF",
        summary="cannot follow a as it is"),
    row("… by an answer of some time ago", upstream=Upstream(name="a", asked_at=ago(5), ok=True, timeline=4), does="InspectUpstream"),
    row("… of somebody else", upstream=Upstream(name="c", asked_at=ago(1), ok=True, timeline=4), does="InspectUpstream"),
    row("… which was not given", upstream=Upstream(name="a", asked_at=ago(1), why="timed out", timeline=4), does="InspectUpstream"),
    row("… still in recovery", upstream=Upstream(name="a", asked_at=ago(1), ok=True, in_recovery=True, timeline=4), does="InspectUpstream"),
    row("it has gone over to the leader's timeline, the directory was read before that", postgres__row__timeline=4, directory__history_of=3,
        upstream=Upstream(name="a", asked_at=ago(1), ok=True, timeline=4, history=WENT_ON.history), memory__upstream_asked_at=ago(1), does="", refuses="following.one_history"),
    row("it has gone over to a timeline of the same number, which branched elsewhere", postgres__row__timeline=4, directory__history_of=4, dcs__view__members__a__timeline=4,
        upstream=Upstream(name="a", asked_at=ago(1), ok=True, timeline=4, history=WENT_ON.history), refuses="rejoin.judge", does="Stop", says="one number, but it branched at"),
    row("it has more than the leader had when it was asked", upstream=AHEAD, memory__upstream_asked_at=ago(1), refuses="rejoin.judge", does="Stop"),
    row("… out of an archive", upstream=AHEAD, memory__upstream_asked_at=ago(1), postgres__row__restore_command="cp x", refuses="", does=""),
    row("it can follow", upstream=Upstream(name="a", asked_at=ago(1), ok=True, timeline=3, history=HISTORY), memory__upstream_asked_at=ago(1), does="", refuses=""),
]


#: Wants to go over to the new leader a, which it has not streamed from yet.
GOES_OVER = REPLICA.but(postgres__row__primary_conninfo="host=x port=5432")
SILENT = {"dcs__view__members__a__claim": None, "dcs__view__members__a__tells_claim": False}
ANSWER = Upstream(name="a", asked_at=ago(1), ok=True, system_identifier=SYSTEM, timeline=3, lsn=LSN, history=HISTORY)
NUMBERS = [
    row("the same promotion", does="Follow", refuses="following.follows_wanted"),
    row("the leader goes on to a new timeline", dcs__view__members__a__timeline=4, dcs__view__members__a__claim="a later one", does="Follow", refuses="following.follows_wanted"),
    row("the leader has yet to promote, to whatever number", dcs__view__members__a__timeline=2, does="", refuses="following.follows_wanted following.one_history",
        says="own timeline is 3, a's 2"),
    row("another promotion took this number", dcs__view__members__a__claim="another", does="Stop", refuses="following.one_history",
        says=f"both on timeline 3, but it began as '{CLAIM}' here and as 'another' at a", summary="cannot follow a as it is: both on timeline 3"),
    row("one of nobody's claims", dcs__view__members__a__claim="", does="Stop", refuses="following.one_history"),
    row("another promotion took this number, in pause", dcs__view__members__a__claim="another", settings__pause=True, lock__mode="paused", does="",
        refuses="following.one_history", summary="left alone in pause"),
    row("it streams already, and the claim is another", postgres__row__primary_conninfo="host=a port=5432", dcs__view__members__a__claim="another", does="Stop",
        refuses="following.one_history"),
    row("the leader has not said yet", **SILENT, does="", refuses="following.follows_wanted following.one_history", says="own timeline is 3, a's 3, and not yet by which promotion"),
    row("… but has answered a question", **SILENT, upstream=ANSWER, does="Follow", refuses="following.follows_wanted"),
    row("… some time ago", **SILENT, upstream=structs.replace(ANSWER, asked_at=ago(4.1)), does="", refuses="following.follows_wanted following.one_history"),
    row("… still in recovery", **SILENT, upstream=structs.replace(ANSWER, in_recovery=True), does="", refuses="following.follows_wanted following.one_history"),
    row("… in vain", **SILENT, upstream=structs.replace(ANSWER, ok=False), does="", refuses="following.follows_wanted following.one_history"),
    row("… which was another's answer", **SILENT, upstream=structs.replace(ANSWER, name="c"), does="", refuses="following.follows_wanted following.one_history"),
    row("… that it is another promotion", **SILENT, upstream=structs.replace(ANSWER, history=(HISTORY[0], structs.replace(HISTORY[1], claim="another"))), does="Stop",
        refuses="following.follows_wanted following.one_history rejoin.judge", says="asked a: two promotions took one number"),
    row("the leader does not run yet", dcs__view__members__a__timeline=0, does="", refuses="following.follows_wanted following.one_history", says="a has not said which it is on"),
    row("the leader does not know", dcs__view__members__a__claim=None, does="Follow", refuses="following.follows_wanted"),
    row("nor do we", directory__history=(), **SILENT, does="Follow", refuses="following.follows_wanted"),
    row("the directory was read on an earlier timeline", directory__history_of=2, dcs__view__members__a__claim="another", does="", refuses="following.follows_wanted following.one_history",
        says="how timeline 3 began has not been read yet"),
    row("the directory is being looked at", directory__state="unknown", directory__why="being looked at", dcs__view__members__a__claim="another", does="",
        refuses="following.follows_wanted following.one_history", says="how timeline 3 began has not been read yet: being looked at"),
    row("the first timeline", postgres__row__timeline=1, directory__history=(), dcs__view__members__a__timeline=1, does="Follow", refuses="following.follows_wanted"),
    row("a Patroni tells nothing", dcs__view__members__a__is_pgha=False, dcs__view__members__a__claim=None, dcs__view__members__a__tells_claim=False, does="Follow",
        refuses="following.follows_wanted"),
    row("of c by its tag", settings__tags=Tags(replicatefrom="c"), does="Follow", refuses="following.follows_wanted", says="wanted c:5432, set x:5432"),
    row("of c by its tag, which is of another promotion: of the leader", settings__tags=Tags(replicatefrom="c"), dcs__view__members__c__claim="another", does="Follow",
        refuses="following.follows_wanted", says="wanted a:5432, set x:5432"),
    row("of c by its tag, which is behind: of the leader", settings__tags=Tags(replicatefrom="c"), dcs__view__members__c__timeline=2, does="Follow",
        refuses="following.follows_wanted", says="wanted a:5432, set x:5432"),
    row("… which has been streamed from until now", settings__tags=Tags(replicatefrom="c"), dcs__view__members__c__timeline=2, configured_upstream="c",
        postgres__row__primary_conninfo="host=c port=5432", does="", refuses="following.one_history", says="own timeline is 3, c's 2"),
    row("of c by its tag, and another promotion's is the leader", settings__tags=Tags(replicatefrom="c"), dcs__view__members__a__claim="another", does="Stop",
        refuses="following.one_history", says="as 'another' at a"),
]


@pytest.mark.parametrize("case", NUMBERS)
def test_one_number_may_stand_for_two_promotions(case):
    check(GOES_OVER, case)


@pytest.mark.parametrize("case", LOOKS)
def test_a_standby_that_does_not_stream(case):
    check(LOST, case)


def test_it_stops_for_what_it_found():
    assert "0/3FFFFFF" in only(LOST.but(upstream=WENT_ON).decide(), Stop).why


def test_streaming_again_is_noted():
    assert LOST.decide().memory.not_streaming_since == ago(1.5)
    assert LOST.but(postgres__row__receiver=WalReceiver(status="streaming")).decide().memory.not_streaming_since is None
