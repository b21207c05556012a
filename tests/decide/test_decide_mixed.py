"""Mixed clusters (decide/mixed.py, standing): the key `leader` under a lease is a lock of its own (safety model 14)."""

from __future__ import annotations

import pytest
from decide_world import (
    CANDIDATE,
    LEADER,
    LSN,
    REPLICA,
    TIMELINE,
    KiB,
    World,
    ago,
    ahead,
    check,
    names,
    only,
    peer,
    record,
    row,
    silent,
    with_lock,
)
from msgspec.structs import replace

from pgha.decide.standing import Whose, standing
from pgha.model.action import AcquireLock, Demote, InspectUpstream, WriteKey
from pgha.model.cluster import ClusterView, FailoverKey, Member, Outsider
from pgha.model.lock import Licence
from pgha.model.node import GuardFacts
from pgha.model.observation import Operation, Upstream


def mixed(world: World, **changes) -> World:
    """The same, with members of another make: a Patroni "p" leads by the key `leader`, or has led."""
    view = world.seen.dcs.view
    members = {**view.members, "p": Member(name="p", host="p", port=5432, api_url="http://p:8008/patroni", state="running", role="primary", version="4.1.5", timeline=TIMELINE)}
    return world.but(settings__mixed=True, dcs__view__members=members, dcs__view__leader="", dcs__view__leader_lease=0,
                     dcs__outsider=Outsider(name="p", host="p"), peers__p=peer("p", is_pgha=False, lsn=LSN - KiB)).but(**changes)


LED_BY_PATRONI = mixed(CANDIDATE, dcs__view__leader="p", dcs__view__leader_lease=7)
FREE = mixed(CANDIDATE, memory__election__began_at=ago(20))

WHOSE = [
    row("record expired, and p has the key", whose=Whose.LIVE, holder="p"),
    row("record expired, and nobody has the key", dcs__view__leader_lease=0, dcs__view__leader="", whose=Whose.FREE, holder="a"),
    row("the key without a lease is the last holder's name", dcs__view__leader_lease=0, dcs__view__leader="a", whose=Whose.FREE, holder="a"),
    row("record released, and p has the key", lock__mode="released", whose=Whose.LIVE, holder="p"),
    row("record live, and p has taken the key over", dcs__lock_seen__since=ago(1), whose=Whose.LIVE, holder="p"),
    row("record expired, and its holder still has the key", dcs__view__leader="a", whose=Whose.LIVE, holder="a"),
    row("no record, and p has the key", lock=None, whose=Whose.LIVE, holder="p"),
    row("no record, p has just lost the key, and led alone", lock=None, dcs__view__leader_lease=0, dcs__view__leader="", dcs__outsider__alone=True, whose=Whose.FREE, holder=""),
    row("the same, but the store was restored", lock=None, dcs__view__leader_lease=0, dcs__view__leader="", dcs__outsider__alone=True, dcs__trusted_from=ahead(5), whose=Whose.ABSENT, holder=""),
    row("no record, and p did not lead alone", lock=None, dcs__view__leader_lease=0, dcs__view__leader="", whose=Whose.ABSENT, holder=""),
    row("own record, and p has the key", lock__node_id="id-b", lock__holder="b", whose=Whose.LIVE, holder="p"),
    row("own mixed record of a former incarnation, and the key with it", lock__node_id="id-b", lock__holder="b", lock__incarnation="run-0", lock__mixed=True, dcs__view__leader="b",
        whose=Whose.OWN_FORMER, holder="b"),
    row("own mixed record, its key is gone: another may have led since", lock__node_id="id-b", lock__holder="b", lock__incarnation="run-0", lock__mixed=True, dcs__view__leader="",
        dcs__view__leader_lease=0, whose=Whose.FREE, holder="b"),
    row("the same in pause", lock__node_id="id-b", lock__holder="b", lock__incarnation="run-0", lock__mixed=True, lock__mode="paused", dcs__view__leader="", dcs__view__leader_lease=0,
        whose=Whose.FREE, holder="b"),
    row("a paused record of ours", lock__mode="paused", dcs__view__leader="a", dcs__view__leader_lease=0, whose=Whose.LIVE, holder="a"),
    row("a paused record, and its node was left to a Patroni, which leads", lock__mode="paused", dcs__view__leader="a", dcs__outsider=Outsider(name="a", host="a"), whose=Whose.LIVE, holder="a"),
    row("and that has lost the key", lock__mode="paused", dcs__view__leader="", dcs__view__leader_lease=0, dcs__outsider=Outsider(name="a", host="a"), whose=Whose.FREE, holder="a"),
    row("a paused record, and another Patroni has led since", lock__mode="paused", dcs__view__leader="", dcs__view__leader_lease=0, whose=Whose.LIVE, holder="a"),
    row("the same in a store that was restored", lock__mode="paused", dcs__view__leader="", dcs__view__leader_lease=0, dcs__outsider=Outsider(name="a", host="a"), dcs__trusted_from=ahead(5),
        whose=Whose.LIVE, holder="a"),
    row("the key has this node's name, from another agent", dcs__view__leader="b", whose=Whose.LIVE, holder="b"),
    row("another node under this name", lock__node_id="id-x", lock__holder="b", dcs__lock_seen__since=ago(1), whose=Whose.IMPOSTOR, holder="b"),
]


@pytest.mark.parametrize("case", WHOSE)
def test_whose_the_lock_is(case):
    changes = dict(case.changes)
    whose, holder = changes.pop("whose"), changes.pop("holder")
    lock = {k.removeprefix("lock__"): changes.pop(k) for k in list(changes) if k.startswith("lock__")}
    world = LED_BY_PATRONI
    if "lock" in changes:
        world = with_lock(world, changes.pop("lock"), absent_since=ago(3))
    elif lock:
        world = with_lock(world, replace(world.seen.dcs.view.lock, **lock))
    now = standing(world.but(**changes).seen)
    assert (now.whose, now.holder) == (whose, holder), now


def test_a_patroni_leader_is_followed():
    decision = mixed(REPLICA, dcs__view__leader="p", dcs__view__leader_lease=7, lock__mode="released").decide()
    assert decision.situation == "following"
    assert "following a leader (p)" in decision.summary
    assert names(decision) == ("Follow",)


def test_what_is_taken_is_taken_together_with_the_key():
    action = only(FREE.but(dcs__view__revisions={**FREE.seen.dcs.view.revisions, "leader": 0}).decide(), AcquireLock)
    assert (action.mixed, action.also_unchanged.get("leader")) == (True, 0)
    pure = only(CANDIDATE.decide(), AcquireLock)
    assert pure.mixed is False


ELECTION = [
    row("p is a standby by now", refuses="", does="AcquireLock"),
    row("p still is a primary", peers__p=peer("p", is_pgha=False, in_recovery=False), refuses="promotion.no_primary_is_alive mixed.former_primary_has_ended", does=""),
    row("p has more", peers__p=peer("p", is_pgha=False, lsn=LSN + KiB), refuses="promotion.no_peer_is_ahead promotion.peers_were_waited_for", does=""),
    row("p has as much: whoever is first", peers__p=peer("p", is_pgha=False), refuses="", does="AcquireLock"),
    row("p's agent is silent", peers__p=silent("p"), refuses="mixed.former_primary_has_ended", says="has not been asked yet", does="InspectUpstream"),
    row("p's PostgreSQL is not reached either", peers__p=silent("p"), upstream=Upstream(name="p", asked_at=ago(1), unreached=True, why="refused"), refuses="", does="AcquireLock"),
    row("that was long ago", peers__p=silent("p"), upstream=Upstream(name="p", asked_at=ago(2.1), unreached=True, why="refused"), refuses="mixed.former_primary_has_ended", does="InspectUpstream"),
    row("p's PostgreSQL accepts writes without an agent", peers__p=silent("p"), upstream=Upstream(name="p", asked_at=ago(1), ok=True), refuses="mixed.former_primary_has_ended",
        says="accepts writes without an agent", does=""),
    row("it said so while it led", peers__p=silent("p"), memory__election__began_at=ago(0.9), upstream=Upstream(name="p", asked_at=ago(1), ok=True),
        refuses="mixed.former_primary_has_ended", says="has not been asked yet", does="InspectUpstream"),
    row("and is asked again after a while", peers__p=silent("p"), upstream=Upstream(name="p", asked_at=ago(10.1), ok=True), refuses="mixed.former_primary_has_ended", does="InspectUpstream"),
    row("p's PostgreSQL is in recovery", peers__p=silent("p"), upstream=Upstream(name="p", asked_at=ago(1), ok=True, in_recovery=True), refuses="", does="AcquireLock"),
    row("p's PostgreSQL lives and says nothing", peers__p=silent("p"), upstream=Upstream(name="p", asked_at=ago(0.4), why="too many clients"),
        refuses="mixed.former_primary_has_ended", says="has not said what it is"),
    row("an operator asks for this node all the same", peers__p=silent("p"), upstream=Upstream(name="p", asked_at=ago(1), ok=True), dcs__view__failover=FailoverKey(candidate="b"),
        refuses="", does="AcquireLock"),
    row("somebody else was asked", peers__p=silent("p"), upstream=Upstream(name="a", asked_at=ago(1)), refuses="mixed.former_primary_has_ended", does="InspectUpstream"),
    row("nobody of another make has led", dcs__outsider=None, peers__p=silent("p"), refuses="", does="AcquireLock"),
    row("its address is not known", dcs__outsider=Outsider(name="p"), peers__p=silent("p"), refuses="", does="AcquireLock"),
]


@pytest.mark.parametrize("case", ELECTION)
def test_election_after_a_patroni(case):
    decision = check(FREE, case)
    for action in decision.actions:
        if isinstance(action, InspectUpstream):
            assert (action.source.name, action.source.host, action.deadline_s) == ("p", "p", 1.0)
            busy = FREE.but(**case.changes, operation=Operation(kind="InspectUpstream", id=9, started_at=ago(0.1), detail=action.why)).decide()
            assert busy.actions == (), "it is not ended for want of a leader: there is none, which is why it is asked"


def test_a_named_candidate_that_cannot_take_over_says_so():
    """Patroni members leave it the field for as long as it answers."""
    asked = FREE.but(memory__election__began_at=ago(1), dcs__view__failover=FailoverKey(leader="a", candidate="b"), dcs__view__revisions={**FREE.seen.dcs.view.revisions, "failover": 9},
                     peers__p=peer("p", is_pgha=False, lsn=LSN + KiB))
    assert names(asked.decide()) == ()
    late = asked.but(memory__election__began_at=ago(6)).decide()
    assert only(late, WriteKey) == WriteKey(key="failover", value=b"{}", if_revision=9, epoch_revision=None)
    assert "declining to take over" in late.summary
    assert names(asked.but(memory__election__began_at=ago(6), settings__mixed=False).decide()) == ()


# --- another agent of this node has left its primary ---------------------------------------------------------------------

LEFT = with_lock(mixed(LEADER, dcs__view__leader="a", dcs__view__leader_lease=7, dcs__outsider=None), None, absent_since=ago(1)).but(
    licence=Licence(), dcs__view__epoch__number=0, dcs__view__epoch__holder="", guard=GuardFacts(reachable=True, state="armed", fence_at=ahead(1.5)))

ADOPTION = [
    row("no record ever", does="AcquireLock", situation="paused", summary="adopting the primary that another agent has left"),
    row("not read just now", dcs__read_at=ago(0.6), does="ReadCluster"),
    row("no answer from PostgreSQL yet", postgres__row=None, does="ReadCluster"),
    row("the guard is silent", guard__reachable=False, does=""),
    row("a record may have been lost", dcs__view__epoch__number=3, does="Demote"),
    row("the store was restored", dcs__trusted_from=ahead(3), does="Demote"),
    row("the key is another's", dcs__view__leader="p", does="Demote"),
    row("the key has no lease", dcs__view__leader_lease=0, does="Demote"),
]


@pytest.mark.parametrize("case", ADOPTION)
def test_a_primary_that_another_agent_of_this_node_has_left(case):
    decision = check(LEFT, case)
    for action in decision.actions:
        if isinstance(action, AcquireLock):
            assert (action.readopt, action.paused, action.mixed, action.lock_revision) == (False, False, True, 0)
            assert action.claim_timeline == TIMELINE, "it is not promoted: nothing new is claimed"
            assert "leader" in action.also_unchanged


def test_a_former_record_of_ours_that_has_expired_is_taken_with_the_key():
    found = with_lock(LEFT, record("c"), since=ago(31)).but(dcs__view__epoch__number=5)
    assert only(found.decide(), AcquireLock).lock_revision == 100
    live = with_lock(found, record("c"), since=ago(2))
    assert isinstance(only(live.decide(), Demote), Demote)


# --- its name at another place -------------------------------------------------------------------------------------------

HERE = mixed(REPLICA, settings__postgres_host="b", settings__postgres_port=5432)


@pytest.mark.parametrize("case", [
    row("its own key", dcs__view__members__b__is_pgha=True, situation="following"),
    row("a Patroni that was here before", dcs__view__members__b=Member(name="b", host="b", port=5432, version="4.1.5"), situation="following"),
    row("a Patroni at another port", dcs__view__members__b=Member(name="b", host="b", port=6543, version="4.1.5"), situation="foreign", refuses="foreign.member_is_ours", does="",
        says="b at b:6543, this node is at b:5432: stop it, or give each node its own `name`"),
    row("a Patroni on another host", dcs__view__members__b=Member(name="b", host="x", port=5432, version="4.1.5"), situation="foreign", does=""),
    row("a key that says nothing", dcs__view__members__b=Member(name="b"), situation="following"),
])
def test_a_patroni_of_this_name(case):
    check(HERE, case)


# --- words ---------------------------------------------------------------------------------------------------------------

PATRONI = Member(name="p", version="4.1.5")
OURS = Member(name="a", version="4.1.4", is_pgha=True)


@pytest.mark.parametrize("view, is_mixed", [
    (ClusterView(members={"a": OURS}, leader="a"), False),
    (ClusterView(members={"a": OURS, "p": PATRONI}), True),
    (ClusterView(members={"a": OURS, "p": Member(name="p")}), False),      # a key that says nothing
    (ClusterView(members={"a": OURS}, lock=record("a")), False),
    (ClusterView(members={"a": OURS}, lock=replace(record("a"), mixed=True)), True),     # their keys may have run out
    (ClusterView(members={"a": OURS}, leader="p", leader_lease=3), True),
], ids=range(6))
def test_is_mixed(view, is_mixed):
    assert view.is_mixed is is_mixed

