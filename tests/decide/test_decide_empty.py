"""There is no data here (decide/empty.py): make a new cluster, copy one, or touch nothing."""

from __future__ import annotations

import pytest
from decide_world import (
    BIRTH,
    DIRECTORY,
    EMPTY,
    LSN,
    SYSTEM,
    TIMELINE,
    MiB,
    ago,
    check,
    identity,
    licence,
    member,
    names,
    only,
    peer,
    record,
    row,
    silent,
    with_lock,
)

from pgha.model.action import AcquireLock, Clone, ReleaseLock
from pgha.model.cluster import ClusterView, Sync, Tags
from pgha.model.node import DataDirectoryFacts, PostgresFacts
from pgha.model.observation import Operation

REMEMBERED = {"dcs__remembered_members": {"a": "http://a:8008", "b": "http://b:8008"}}

BIRTHS = [
    row("nobody has anything", situation="empty", refuses="", does="Bootstrap", summary="bootstrapping a new cluster"),
    row("an empty directory is there", directory__state="empty", does="Bootstrap"),
    row("no [bootstrap] section", settings__has_bootstrap_section=False, refuses="empty.has_bootstrap_section", says="the configuration has no [bootstrap] section", does="", summary="waiting to bootstrap"),
    row("nofailover", settings__tags=Tags(nofailover=True), refuses="empty.may_lead", says="tag nofailover is set", does=""),
    row("a peer was not asked yet", **REMEMBERED, refuses="empty.peers_were_asked", says="0 of 1 peers asked", does=""),
    row("a peer was asked, and is silent", **REMEMBERED, peers={"a": silent("a")}, refuses="", does="Bootstrap"),
    row("a peer answers, without data", **REMEMBERED, peers={"a": peer("a", system_identifier="")}, refuses="", does="Bootstrap"),
    row("failed a moment ago", memory__clone_failures=3, memory__last_clone_failed_at=ago(1), refuses="", does="", summary="waiting to bootstrap"),
    row("failed four seconds ago", memory__clone_failures=3, memory__last_clone_failed_at=ago(4), does="Bootstrap"),
    row("the cluster was not read just now", dcs__read_at=ago(0.6), refuses="restart.read_in_this_pass", does="ReadCluster"),
    row("somebody is at it", dcs__view=ClusterView(revision=2, initialize=""), does="", refuses="empty.cluster_is_initialised empty.has_source empty.initialize_is_free",
        says="somebody else is bootstrapping", summary="waiting for leader to bootstrap"),
    row("everything against it", **REMEMBERED, settings__has_bootstrap_section=False, settings__tags=Tags(nofailover=True), does="",
        refuses="empty.has_bootstrap_section empty.may_lead empty.peers_were_asked"),
]


@pytest.mark.parametrize("case", BIRTHS)
def test_a_new_cluster(case):
    check(BIRTH, case)


def test_nobody_bootstraps_beside_data():
    """Not even when the store is empty: a peer that answers with a system identifier has a cluster (safety model 4)."""
    decision = BIRTH.but(**REMEMBERED, peers={"a": peer("a")}).decide()
    assert decision.actions == ()
    gone = with_lock(BIRTH.but(**REMEMBERED, dcs__remembered_ttl_s=30.0, peers={"a": peer("a")}), None, absent_since=ago(99)).decide()
    assert gone.actions == ()
    assert [r.rule for r in gone.reasons if not r.holds] == ["empty.no_peer_has_data"]
    assert any("a answer with a system identifier" in r.because for r in gone.reasons)


COPIES = [
    row("of the leader", refuses="", does="Clone", summary="bootstrap from leader 'a'"),
    row("of a member that offers itself", dcs__view__members__c__tags=Tags(clonefrom=True), does="Clone", says="copying from c (clonefrom)", summary="bootstrap from replica 'c'"),
    row("… whose copy may lack what this name has confirmed: /sync says that it may lead (strict: nobody else is fit)", dcs__view__members__c__tags=Tags(clonefrom=True),
        settings__synchronous_mode="on", dcs__view__sync=Sync(leader="a", members=("B",)), does="Clone", says="copying from a, the leader, since /sync names b"),
    row("… the same, /sync names another", dcs__view__members__c__tags=Tags(clonefrom=True), settings__synchronous_mode="on", dcs__view__sync=Sync(leader="a", members=("c",)),
        does="Clone", says="copying from c (clonefrom)"),
    row("… which does not run", dcs__view__members__c__tags=Tags(clonefrom=True), dcs__view__members__c__state="stopped", says="copying from a, the leader"),
    row("… whose address is not known", dcs__view__members__c__tags=Tags(clonefrom=True), dcs__view__members__c__host="", says="copying from a, the leader"),
    row("… which is on another timeline", dcs__view__members__c__tags=Tags(clonefrom=True), dcs__view__members__c__timeline=2, says="copying from a, the leader"),
    row("… which has failed", dcs__view__members__c__tags=Tags(clonefrom=True), memory__clone_failures=1, says="copying from a, the leader"),
    row("… which has failed, and the leader has", dcs__view__members__c__tags=Tags(clonefrom=True), memory__clone_failures=2, says="copying from c (clonefrom)"),
    row("this node's own tag", dcs__view__members__b__tags=Tags(clonefrom=True), says="copying from a, the leader"),
    row("the leader is not primary yet", dcs__view__members__a__role="replica", refuses="empty.has_source", says="leader a is not running as primary yet", does=""),
    row("the leader does not run", dcs__view__members__a__state="starting", refuses="empty.has_source", does=""),
    row("the leader has no key", dcs__view__members={}, refuses="empty.has_source", does=""),
    row("nobody leads", lock__mode="released", refuses="empty.has_source", says="no leader to copy from: released by a", does="", summary="waiting for leader to bootstrap"),
    row("the system is not known", dcs__view__initialize="x", refuses="empty.cluster_is_initialised empty.initialize_is_free empty.no_peer_has_data", says="initialize is 'x'", does=""),
    row("failed a moment ago", memory__clone_failures=2, memory__last_clone_failed_at=ago(0.5), refuses="empty.clone_backoff", says="2 failures, next try in 1.5 s", does="", summary="the copy failed 2 times, next try in 1.5 s"),
    row("failed often", memory__clone_failures=40, memory__last_clone_failed_at=ago(1), refuses="empty.clone_backoff", says="40 failures, next try in 29.0 s", does=""),
    row("a server still runs there, in pause", postgres=PostgresFacts(process="running"), settings__pause=True, situation="following", does=""),
    row("a server still runs there", postgres=PostgresFacts(process="running"), does="Stop", summary="whose data directory is gone"),
]


@pytest.mark.parametrize("case", COPIES)
def test_a_copy(case):
    check(EMPTY, case)


def test_copies_are_taken_of_all_who_offer_themselves_and_last_of_the_leader():
    members = {"a": member("a", role="primary"), "d": member("d", tags=Tags(clonefrom=True)), "e": member("e", tags=Tags(clonefrom=True))}
    for name, expected in {"b": ["d", "e", "a", "d"], "c": ["e", "d", "a", "e"]}.items():
        world = EMPTY.but(me=identity(name), dcs__view__members=members)
        assert [only(world.but(memory__clone_failures=n).decide(), Clone).source.name for n in range(4)] == expected, name


def test_a_copy_is_of_the_clusters_system_and_replaces_nothing():
    clone = only(EMPTY.decide(), Clone)
    assert (clone.source.name, clone.source.host, clone.system_identifier, clone.replace) == ("a", "a", SYSTEM, "nothing_there")


def test_half_a_cluster_is_set_aside():
    decision = BIRTH.but(directory=DIRECTORY, directory__abandoned_bootstrap=True).decide()
    assert names(decision) == ("AbandonDirectory",)
    assert [(r.rule, r.holds) for r in decision.reasons] == [("empty.bootstrap_was_ended", False)]


@pytest.mark.parametrize("state", ["missing", "empty", "partial"])
def test_what_an_unfinished_copy_was_to_replace_comes_back(state):
    for world in (BIRTH, EMPTY):
        decision = world.but(directory=DataDirectoryFacts(state=state, abandoned_bootstrap=True, unfinished_copy=True)).decide()
        assert names(decision) == ("AbandonDirectory",) and decision.summary == "bringing back what a copy was to replace: it was never ended"


@pytest.mark.parametrize("state", ["unknown", "unreadable", "partial"])
def test_what_cannot_be_read_is_never_taken_for_empty(state):
    for world in (BIRTH, EMPTY):
        decision = world.but(directory__state=state, directory__why="I/O error").decide()
        assert (decision.situation, decision.actions) == ("empty", ())
        assert [(r.rule, r.holds, r.because) for r in decision.reasons] == [("empty.readable", False, f"the data directory is {state}: I/O error")]


def test_a_server_that_runs_on_an_unreadable_disk_goes_on():
    assert EMPTY.but(directory__state="unreadable", postgres=PostgresFacts(process="running", row=None)).decide().situation == "following"


# --- a holder without data -----------------------------------------------------------------------------------------------

HOLDER = with_lock(EMPTY.but(licence=licence()), record("b"))


def test_a_lock_without_data_is_given_back_with_what_was_published():
    action = only(HOLDER.decide(), ReleaseLock)
    assert (action.lsn, action.timeline) == (LSN, TIMELINE)


@pytest.mark.parametrize("state", ["unreadable", "partial"])
def test_a_lock_without_a_disk_that_answers_is_given_back_after_a_while(state):
    waits = HOLDER.but(directory__state=state, directory__why="I/O error").decide()
    assert (waits.actions, waits.memory.holding_since) == ((), ago(0))
    assert HOLDER.but(directory__state=state, memory__holding_since=ago(9.9)).decide().actions == ()
    assert names(HOLDER.but(directory__state=state, memory__holding_since=ago(10)).decide()) == ("ReleaseLock",)


def test_the_own_paused_record_is_adopted_after_the_pause_to_be_given_back():
    """It does not expire, and nobody but its own node can end it."""
    action = only(with_lock(EMPTY, record("b", incarnation="run-0", mode="paused"), since=ago(1)).decide(), AcquireLock)
    assert action.readopt
    assert "AcquireLock" not in names(with_lock(EMPTY, record("a", mode="paused"), since=ago(1)).decide())


# --- the last write of a bootstrap ---------------------------------------------------------------------------------------

MADE = BIRTH.but(directory=DIRECTORY, memory__bootstrap_revision=7, memory__bootstrap_identifier=SYSTEM, dcs__view=ClusterView(revision=7, initialize="", revisions={"initialize": 7}))


def test_lock_identifier_and_configuration_are_one_transaction_over_the_own_claim():
    decision = MADE.decide()
    assert names(decision) == ("ReadCluster", "AcquireLock")
    assert only(decision, AcquireLock) == AcquireLock(lock_revision=0, lock_value=b"", epoch_revision=0, epoch_number=0, initialize_revision=7, initialize_value=SYSTEM,
                                                     lsn=LSN - MiB, timeline=TIMELINE, claim_timeline=TIMELINE, also_unchanged={"leader": 0})


def test_a_completed_bootstrap_is_forgotten():
    decision = MADE.but(dcs__view__initialize=SYSTEM).decide()
    assert (decision.actions, decision.memory.bootstrap_revision, decision.memory.bootstrap_identifier) == ((), 0, "")


@pytest.mark.parametrize("changed", [MADE.but(dcs__view__initialize="9" * 19), with_lock(MADE, record("a"))])
def test_whoever_was_slower_sets_its_directory_aside(changed):
    decision = changed.but(directory__control=None).decide()
    assert names(decision) == ("AbandonDirectory",)
    assert decision.memory.bootstrap_revision == 0


def test_a_claim_whose_lease_ran_out_is_won_in_the_same_transaction_once_nobody_speaks_up():
    """The store may also have been emptied under a living cluster: absence is waited for as ever."""
    gone = MADE.but(dcs__view=ClusterView(revision=9))
    for absent_s in (0, 30):
        assert with_lock(gone, None, absent_since=ago(absent_s)).decide().actions == ()
    assert only(with_lock(gone, None, absent_since=ago(31)).decide(), AcquireLock).initialize_revision == 0
    assert names(gone.but(dcs__read_at=ago(1)).decide()) == ("ReadCluster",)


def test_a_bootstrap_that_has_just_ended_is_completed_in_the_same_pass():
    ended = Operation(kind="Bootstrap", id=3, started_at=ago(9), ended_at=ago(0), ok=True, facts={"system_identifier": SYSTEM, "initialize_revision": 7})
    assert "AcquireLock" in names(MADE.but(memory__bootstrap_revision=0, memory__bootstrap_identifier="", ended=ended).decide())
