"""The synchronous modes as one pass sees them: the leader's step (decide/synchronous.py), who is fit (standbys.py), what
must hold before a promotion or a start, and what elections, hand-overs and switchovers ask of /sync (eligible.py)."""

from __future__ import annotations

import json

import pytest
from decide_world import (
    CANDIDATE,
    CRASHED,
    LEADER,
    LSN,
    NOW,
    REPLICA,
    WINNER,
    KiB,
    MiB,
    ago,
    check,
    member,
    names,
    only,
    peer,
    refused,
    row,
    silent,
)
from msgspec.structs import replace

from pgha.model.action import Demote, Promote, Restart, SetSynchronousNames, StartPrimary, WriteKey
from pgha.model.cluster import FailoverKey, Sync, Tags
from pgha.model.decision import Replica, SyncBook
from pgha.model.observation import WrittenNames
from pgha.model.request import Request
from pgha.model.synchronous import PLACEHOLDER, Promise


def sync(leader: str = "a", names: str = "", quorum: int = 0, **known) -> Sync:
    members = tuple(names)
    return Sync(leader=leader, quorum=quorum, members=members, raw={"leader": leader, "quorum": quorum, "sync_standby": ",".join(members) or None, **known})


def line(name: str, *, lsn: int = LSN, listed: bool = False, state: str = "streaming", **more) -> dict:
    return {"application_name": name, "state": state, "flush_lsn": lsn, "sync_priority": int(listed), "sync_state": "sync" if listed else "async", **more}


def confirmed(**targets: int) -> dict[str, Replica]:
    """Both standbys have reached a target before, and are set the present position."""
    return {name: Replica(target=targets.get(name, LSN), since=ago(0.2), confirmed=True) for name in ("b", "c")}


def settled(setting: str, *, mark: int = LSN - MiB, **changes) -> SyncBook:
    """The leader's memory of a setting that has surely reached every process."""
    return replace(SyncBook(epoch_revision=50, first_revision=70, sent_on=80, names=setting, seen_at=ago(100), mark=mark, replicas=confirmed()), **changes)


def leading(setting: str, promised: Sync, *, listed: str = "", mode: str = "on", **changes):
    """a leads in a synchronous mode, as it has for a while."""
    lines = tuple(line(name, listed=name in listed) for name in "bc")
    return LEADER.but(settings__synchronous_mode=mode, dcs__view__sync=promised, dcs__view__revisions={**LEADER.seen.dcs.view.revisions, "sync": 80},
                      postgres__row__synchronous_standby_names=setting, postgres__row__replication=lines, written_names=WrittenNames(names=setting),
                      memory__sync=settled(setting)).but(**changes)


IDLE = leading("b", sync(names="b"), listed="b")
QUORUM = leading("ANY 1 (b,c)", sync(names="bc", quorum=1), listed="bc", mode="quorum")
MODES = [row("priority, arrived", situation="leading", refuses="", does="", says="mode on: commits wait for b, /sync promises b")]
NOSYNC = Tags.of({"nosync": True})
GONE = (line("c"),)
AFTER_NOTHING = {"refuses": "synchronous.set_is_as_wanted"}

PRIORITY = [
    row("arrived", refuses="", does="", says=("mode on: commits wait for b, /sync promises b", "b: fit; c: fit")),
    row("b has gone this moment", postgres__row__replication=GONE, refuses="synchronous.commits_go_on", does="", summary="commits wait: 0 standbys confirm, 1 needed", says="b: does not stream from here, may come back for another 1.8 s"),
    row("b has been gone for two seconds", postgres__row__replication=GONE, memory__sync__replicas={**confirmed(), "b": Replica(since=ago(2), streaming=False)},
        refuses="synchronous.set_is_as_wanted synchronous.commits_go_on", does="WriteKey", says="wanted c and c"),
    row("b is gone and c cannot be", postgres__row__replication=GONE, memory__sync__replicas={**confirmed(), "b": Replica(since=ago(2), streaming=False)},
        dcs__view__members__c=member("c", tags=NOSYNC), does="WriteKey", says=("wanted nobody and nobody", "c: tag nosync is set")),
    row("the same, strict", settings__synchronous_mode_strict=True, postgres__row__replication=GONE, dcs__view__members__c=member("c", tags=NOSYNC),
        memory__sync__replicas={**confirmed(), "b": Replica(since=ago(2), streaming=False)}, refuses="synchronous.somebody_is_fit synchronous.commits_go_on", does=""),
    row("b confirms nothing for half a minute", memory__sync__replicas={**confirmed(), "b": Replica(target=LSN + 1, since=ago(29), confirmed=True)}, does="WriteKey",
        says="b: has not confirmed 0/4000001 for 29.0 s, limit 29 s"),
    row("b confirms nothing for nearly half a minute", memory__sync__replicas={**confirmed(), "b": Replica(target=LSN + 1, since=ago(28), confirmed=True)}, refuses="", does=""),
    row("b is to be let go, it still streams", dcs__view__members__b=member("b", tags=NOSYNC), does="SetSynchronousNames", says="commits are to wait for '2 (b,c)'"),
    row("b's key is gone", dcs__view__members={"a": member("a", role="primary"), "c": member("c")}, dcs__remembered_members={}, does="WriteKey", says="b: has no member key"),
    row("b's key says that it starts", dcs__view__members__b=member("b", state="starting"), says="b: state is starting"),
    row("c has the higher priority", dcs__view__members__c=member("c", tags=Tags(sync_priority=5)), does="SetSynchronousNames", says="wanted c and c"),
    row("two are wanted", settings__synchronous_node_count=2, does="SetSynchronousNames", says="commits are to wait for '2 (b,c)'"),
    row("two are wanted, c is new", settings__synchronous_node_count=2, memory__sync__replicas={"b": confirmed()["b"]}, refuses="", does="", says="c: catches up: at 0/4000000 of 0/4000000"),
    row("two are wanted, c lags", settings__synchronous_node_count=2, settings__maximum_lag_on_syncnode_bytes=MiB, postgres__row__replication=(line("b", listed=True), line("c", lsn=LSN - 2 * MiB)),
        refuses="", does="", says="c: lag 2.0 MiB, maximum_lag_on_syncnode 1.0 MiB"),
    row("two are wanted, c is to cascade from b", settings__synchronous_node_count=2, dcs__view__members__c=member("c", tags=Tags(replicatefrom="b")), refuses="", does="", says="c: is to stream from b"),
    row("two are wanted, c is only for reserve", settings__synchronous_node_count=2, dcs__view__members__c=member("c", tags=Tags(nofailover=True)), does="SetSynchronousNames"),
    row("b would be in reserve, c is better", dcs__view__members__b=member("b", tags=Tags(nofailover=True)), does="SetSynchronousNames", says="wanted c and c"),
    row("a second walsender of its name", postgres__row__replication=(line("b", listed=True), line("b", lsn=LSN - MiB, listed=True), line("c")), refuses="", does=""),
    row("its backup's stream does not count", postgres__row__replication=(line("b", state="backup"), line("c")), refuses="synchronous.commits_go_on", says="b: does not stream from here"),
    row("quorum is wanted instead", settings__synchronous_mode="quorum", does="WriteKey", says="b becomes b, c with quorum 1"),
    row("off is wanted instead", settings__synchronous_mode="off", refuses="synchronous.switched_off", does="WriteKey", says="deleted first"),
    row("off, /sync is gone", settings__synchronous_mode="off", dcs__view__sync=Sync(), refuses="synchronous.switched_off", does="SetSynchronousNames", says="the operator's own"),
    row("off, and all done", settings__synchronous_mode="off", dcs__view__sync=Sync(), written_names=WrittenNames(), refuses="", does=""),
    row("/sync names nobody yet", dcs__view__sync=Sync(), refuses="synchronous.sync_names_me", does="WriteKey", says="/sync names nobody"),
    row("/sync names another leader", dcs__view__sync=sync("b", "a"), refuses="synchronous.sync_names_me", does="WriteKey"),
    row("somebody has reset the setting by ALTER SYSTEM", postgres__row__synchronous_standby_names="", refuses="synchronous.promise_is_covered synchronous.set_is_as_wanted", does="WriteKey",
        says="nobody else may lead until it is made good"),
    row("/sync is of a backup: it promises another", dcs__view__sync=sync(names="c"), refuses="synchronous.promise_is_covered synchronous.set_is_as_wanted", does="WriteKey"),
    row("the reload is not seen yet", written_names=WrittenNames(names="2 (b,c)"), memory__sync__set_at=ago(0.3), refuses="synchronous.names_are_seen", does="", says="'2 (b,c)' was written"),
    row("the reload seems to be lost", written_names=WrittenNames(names="2 (b,c)"), memory__sync__set_at=ago(1), refuses="synchronous.names_are_seen", does="SetSynchronousNames"),
    row("a restarted agent", written_names=WrittenNames(told=False, names="b"), dcs__view__epoch__incarnation="run-before", memory__sync=SyncBook(), refuses="synchronous.opened", does="WriteKey"),
    row("a restarted agent, /sync written", written_names=WrittenNames(told=False, names="b"), dcs__view__epoch__incarnation="run-before", refuses="synchronous.names_are_seen", does="SetSynchronousNames",
        says="a former agent's file is to say the same"),
    row("a restarted agent, all said", dcs__view__epoch__incarnation="run-before", refuses="", does=""),
]


@pytest.mark.parametrize("case", PRIORITY)
def test_priority_mode(case):
    check(IDLE, case)


QUORUMS = [
    row("arrived", refuses="", does="", says="mode quorum: commits wait for ANY 1 (b,c), /sync promises b, c with quorum 1"),
    row("b is gone", postgres__row__replication=(line("c", listed=True),), memory__sync__replicas={**confirmed(), "b": Replica(since=ago(2), streaming=False)}, does="SetSynchronousNames",
        says="commits are to wait for 'ANY 1 (c)'"),
    row("both are wanted", settings__synchronous_node_count=2, does="SetSynchronousNames", says="commits are to wait for 'ANY 2 (b,c)'"),
    row("c only for reserve", dcs__view__members__c=member("c", tags=Tags(nofailover=True)), does="SetSynchronousNames", says="wanted ANY 1 (b) and b"),
    row("priority is wanted instead", settings__synchronous_mode="on", does="SetSynchronousNames", says="commits are to wait for 'b'"),
]


@pytest.mark.parametrize("case", QUORUMS)
def test_quorum_mode(case):
    check(QUORUM, case)


# --- what is written ---------------------------------------------------------------------------------------------------------

def test_sync_is_written_as_the_reference_does_under_epoch_and_revision_and_what_is_not_known_is_kept():
    world = IDLE.but(settings__synchronous_mode="quorum", dcs__view__sync=sync(names="b", cross_site_mode="x"))
    action = only(world.decide(), WriteKey)
    assert (action.key, action.if_revision, action.epoch_revision) == ("sync", 80, 50)
    assert list(json.loads(action.value).items()) == [("leader", "a"), ("quorum", 1), ("sync_standby", "b,c"), ("cross_site_mode", "x")]
    nobody = only(IDLE.but(dcs__view__sync=Sync()).decide(), WriteKey)
    assert nobody.value == b'{"leader":"a","quorum":0,"sync_standby":null}'
    assert only(IDLE.but(settings__synchronous_mode="off").decide(), WriteKey).value is None


def test_names_are_written_as_their_owners_write_them():
    members = {"a": member("a", role="primary"), "N-2": member("N-2")}
    book = settled("b", replicas={"n-2": Replica(target=LSN, since=ago(0.2), confirmed=True)})
    world = leading("", sync(), dcs__view__members=members, postgres__row__replication=(line("n-2"),), memory__sync=replace(book, names=""))
    assert only(world.decide(), SetSynchronousNames).names == '"N-2"'
    after = world.but(postgres__row__synchronous_standby_names='"N-2"', written_names=WrittenNames(names='"N-2"'), postgres__row__replication=(line("n-2", listed=True),),
                      memory__sync=replace(book, names='"N-2"'))
    assert json.loads(only(after.decide(), WriteKey).value)["sync_standby"] == "N-2"


# --- seen, settled, confirmed --------------------------------------------------------------------------------------------------

GROWING = leading("2 (b,c)", sync(names="b"), listed="bc", settings__synchronous_node_count=2, memory__sync__mark=0)

CONFIRMING = [
    row("seen just now", memory__sync__seen_at=ago(0.4), does="", refuses="synchronous.confirmed synchronous.set_is_as_wanted", says="the new setting was seen 0.20 s ago, 0.3 s needed"),
    row("seen long enough", memory__sync__seen_at=ago(0.6), does="WriteKey", says="b becomes b, c"),
    row("… the checkpointer may not have read it", memory__sync__seen_at=ago(9), postgres__row__checkpointer_rests=False, does="", refuses="synchronous.confirmed synchronous.set_is_as_wanted"),
    row("… a walsender goes by the former one", memory__sync__seen_at=ago(9), postgres__row__replication=(line("b", listed=True), line("c")), does=""),
    row("… a walsender that has nothing to do with it does not matter", memory__sync__seen_at=ago(9),
        postgres__row__replication=(line("b", listed=True), line("c", listed=True), line("x"), line("y", state="backup")), does="WriteKey"),
    row("marked, c has not reached it", memory__sync__mark=LSN, postgres__row__replication=(line("b", listed=True), line("c", lsn=LSN - 1, listed=True)), does="",
        refuses="synchronous.confirmed synchronous.set_is_as_wanted", says="waiting to promise b, c: c not yet at 0/4000000"),
    row("marked, both have", memory__sync__mark=LSN, does="WriteKey"),
    row("written a moment ago", memory__sync__mark=LSN, memory__sync__sent=(Promise(voters=frozenset("bc")),), memory__sync__sent_at=ago(0.5), does="", refuses="synchronous.set_is_as_wanted"),
    row("written, and nothing is seen of it", memory__sync__mark=LSN, memory__sync__sent=(Promise(voters=frozenset("bc")),), memory__sync__sent_at=ago(1), does="WriteKey"),
    row("the server was started again", memory__sync__mark=LSN, postgres__row__started_at_s=5.0, does="", refuses="synchronous.confirmed synchronous.set_is_as_wanted"),
]


@pytest.mark.parametrize("case", CONFIRMING)
def test_a_promise_waits_until_it_is_true(case):
    check(GROWING, case)


def test_a_mark_is_a_position_read_after_the_setting_settled():
    memory = GROWING.but(memory__sync__seen_at=ago(0.6)).decide().memory
    assert memory.sync.mark == LSN
    assert GROWING.but(memory__sync__seen_at=ago(0.4)).decide().memory.sync.mark == 0


def test_what_may_still_arrive_keeps_the_setting_as_strong_as_it_asks():
    """b, c was promised and no answer came; c goes: only once the key is seen to have moved on may the setting lose it."""
    sent = (Promise(voters=frozenset("bc")),)
    world = leading("2 (b,c)", sync(names="b"), listed="bc", postgres__row__replication=(line("b", listed=True),), memory__sync__sent=sent, memory__sync__sent_at=ago(0.5),
                    memory__sync__replicas={**confirmed(), "c": Replica(since=ago(2), streaming=False)})
    decision = world.decide()
    assert "synchronous.nothing_is_under_way" in refused(decision)
    assert json.loads(only(decision, WriteKey).value)["sync_standby"] == "b"
    assert only(world.but(memory__sync__sent_on=79).decide(), SetSynchronousNames).names == "b"


def test_a_write_is_remembered_until_the_key_has_moved_on():
    memory = IDLE.but(settings__synchronous_mode="quorum").decide().memory
    assert (memory.sync.sent, memory.sync.sent_on) == ((Promise(voters=frozenset("bc"), quorum=1),), 80)
    again = IDLE.but(dcs__view__revisions={**IDLE.seen.dcs.view.revisions, "sync": 81}, memory__sync=memory.sync)
    assert again.decide().memory.sync.sent == ()


def test_targets_move_on_with_whoever_reaches_them():
    world = IDLE.but(postgres__row__lsn=LSN + KiB, postgres__row__replication=(line("b", listed=True), line("c", lsn=LSN - 1)))
    replicas = world.decide().memory.sync.replicas
    assert replicas["b"] == Replica(target=LSN + KiB, since=ago(0.2), confirmed=True)
    assert replicas["c"] == confirmed()["c"]


# --- before there is a primary ---------------------------------------------------------------------------------------------------

def winner(promised: Sync, *, mode: str = "on", setting: str = "", written: str | None = None, **changes):
    return WINNER.but(settings__synchronous_mode=mode, dcs__view__sync=promised, dcs__view__revisions={**WINNER.seen.dcs.view.revisions, "sync": 80},
                      postgres__row__synchronous_standby_names=setting, written_names=WrittenNames(names=written),
                      memory__sync=SyncBook(epoch_revision=100, first_revision=80, sent_on=80, names=setting, seen_at=ago(5))).but(**changes)


TAKEN = winner(sync("b", "a"), setting="a", written="a")

TAKING_OVER = [
    row("all is prepared", refuses="", does="Promote"),
    row("/sync names the former leader", dcs__view__sync=sync("a", "b"), refuses="synchronous.sync_names_me", does="WriteKey", says="/sync names a, with a"),
    row("the setting is another", postgres__row__synchronous_standby_names="", written_names=WrittenNames(names=""), refuses="synchronous.names_are_set synchronous.backends_will_wait",
        does="SetSynchronousNames"),
    row("neither is prepared", dcs__view__sync=sync("a", "b"), postgres__row__synchronous_standby_names="", written_names=WrittenNames(names=""), does="WriteKey SetSynchronousNames"),
    row("the setting is seen for the first time", memory__sync__names="", refuses="synchronous.backends_will_wait", does=""),
    row("the checkpointer has not read it", postgres__row__checkpointer_rests=False, refuses="synchronous.backends_will_wait", does=""),
    row("the checkpointer takes too long: nobody else may lead then", postgres__row__checkpointer_rests=False, memory__holding_since=ago(3), refuses="synchronous.backends_will_wait", does="WriteKey"),
    row("nobody is promised: nobody is waited for", dcs__view__sync=sync("b"), postgres__row__synchronous_standby_names="", written_names=WrittenNames(names=""), refuses="", does="Promote"),
    row("nobody is promised, strict", dcs__view__sync=sync("b"), settings__synchronous_mode_strict=True, does="SetSynchronousNames"),
    row("no synchronous mode was active", dcs__view__sync=Sync(), postgres__row__synchronous_standby_names="", written_names=WrittenNames(names=""), refuses="", does="Promote"),
    row("the mode was switched off", settings__synchronous_mode="off", dcs__view__sync=sync("a", "b"), refuses="synchronous.sync_names_me synchronous.names_are_set",
        does="WriteKey SetSynchronousNames"),
    row("acquired in this very pass", licence__acquired_pass=60, dcs__view__sync=sync("a", "b"), does=""),
]


@pytest.mark.parametrize("case", TAKING_OVER)
def test_before_a_promotion(case):
    check(TAKEN, case)


def test_a_taker_over_keeps_everybody_and_puts_the_old_leader_in_its_own_place():
    for before, after, setting in (
        (sync("a", "b"), ("b", 0, "a"), "a"),
        (sync("a", "bc"), ("b", 0, "a,c"), "2 (a,c)"),
        (sync("a", "bc", 1), ("b", 1, "a,c"), "ANY 1 (a,c)"),
        (sync("a", "cd", 1), ("b", 1, "c,d"), "ANY 1 (c,d)"),       # elected with one vote more
        (sync("a", "c"), ("b", 0, "c"), "c"),                       # a failover that an operator asked for
    ):
        decision = winner(before, mode="quorum" if before.quorum else "on", dcs__view__members={n: member(n) for n in "abcd"}).decide()
        value = json.loads(only(decision, WriteKey).value)
        assert (value["leader"], value["quorum"], value["sync_standby"]) == after
        assert only(decision, SetSynchronousNames).names == setting
    assert names(winner(sync("b", "ac"), setting="2 (a,c)", written="2 (a,c)").decide()) == ("Promote",), "who led before keeps what it promised"


def test_a_promotion_carries_what_the_first_commit_waits_for():
    assert only(TAKEN.decide(), Promote).synchronous_names == "a"
    assert only(WINNER.decide(), Promote).synchronous_names is None


STARTS = [
    (CRASHED.but(settings__synchronous_mode="on", dcs__view__sync=sync(names="b")), "b"),
    (CRASHED.but(settings__synchronous_mode="quorum", dcs__view__sync=sync(names="bc", quorum=1)), "ANY 1 (b,c)"),
    (CRASHED.but(settings__synchronous_mode="on", dcs__view__sync=sync(names="bc", quorum=1)), "ANY 1 (b,c)"),      # on the way from quorum
    (CRASHED.but(settings__synchronous_mode="on", dcs__view__sync=sync()), ""),
    (CRASHED.but(settings__synchronous_mode="on", settings__synchronous_mode_strict=True, dcs__view__sync=sync()), PLACEHOLDER),
    (CRASHED.but(settings__synchronous_mode="on", dcs__view__sync=sync(names="b"), written_names=WrittenNames(names="2 (b,c)")), "2 (b,c)"),
    (CRASHED.but(settings__synchronous_mode="on", dcs__view__sync=sync(names="bc"), written_names=WrittenNames(names="c")), "2 (b,c)"),
    (CRASHED.but(settings__synchronous_mode="off", dcs__view__sync=sync(names="b")), "b"),                          # switched off, not carried out yet
    (CRASHED.but(settings__synchronous_mode="off"), None),
]


@pytest.mark.parametrize(("world", "setting"), STARTS)
def test_a_start_as_primary_carries_what_sync_promises(world, setting):
    assert only(world.decide(), StartPrimary).synchronous_names == setting


def test_a_start_carries_also_what_may_have_been_promised_last():
    world = CRASHED.but(settings__synchronous_mode="on", dcs__view__sync=sync(names="b"), dcs__view__revisions={"sync": 80},
                        memory__sync=settled("2 (b,c)", sent=(Promise(voters=frozenset("bc")),)))
    assert only(world.decide(), StartPrimary).synchronous_names == "2 (b,c)"


def test_a_restarted_agent_writes_sync_once_before_it_starts_a_primary():
    world = CRASHED.but(settings__synchronous_mode="on", dcs__view__sync=sync(names="b"), dcs__view__revisions={**CRASHED.seen.dcs.view.revisions, "sync": 80},
                        dcs__view__epoch__incarnation="run-before")
    decision = world.decide()
    assert names(decision) == ("WriteKey",)
    later = world.but(dcs__view__revisions={"sync": 81}).but(memory__sync=decision.memory.sync)
    assert names(later.decide()) == ("StartPrimary",)


def test_a_restart_as_primary_carries_it_too():
    asked = (Request(id=2, kind="restart", at=ago(1)),)
    assert only(IDLE.but(requests=asked).decide(), Restart).synchronous_names == "b"
    assert only(LEADER.but(requests=asked).decide(), Restart).synchronous_names is None


# --- elections -------------------------------------------------------------------------------------------------------------------

IN_SYNC = CANDIDATE.but(settings__synchronous_mode="on", dcs__view__sync=sync(names="b"))
VOTING = CANDIDATE.but(settings__synchronous_mode="quorum", dcs__view__sync=sync(names="bc", quorum=1))

ELECTION = [
    row("b is named", refuses="", does="AcquireLock", says="/sync names a and b"),
    row("b is not named", dcs__view__sync=sync(names="c"), refuses="promotion.is_synchronous", says="/sync names a and c, not b", does=""),
    row("names compare without regard to case", dcs__view__sync=Sync(leader="A", members=("B",)), refuses="", does="AcquireLock"),
    row("b led last", dcs__view__sync=sync("b", "c"), refuses="", does="AcquireLock", says="it has everything"),
    row("no mode was active", dcs__view__sync=Sync(), refuses="", does="AcquireLock", says="no synchronous mode is active"),
    row("the mode was switched off: anybody", settings__synchronous_mode="off", dcs__view__sync=sync(names="c"), refuses="", does="AcquireLock"),
    row("b is not named, an operator asked for it", dcs__view__sync=sync(names="c"), dcs__view__failover=FailoverKey(candidate="b"), refuses="", does="AcquireLock", says="an operator asked for this node"),
    row("b is not named, a switchover to it", dcs__view__sync=sync(names="c"), dcs__view__failover=FailoverKey(leader="a", candidate="b"), refuses="promotion.is_synchronous"),
    row("c has more and is not named", peers__c=peer("c", lsn=LSN + KiB, frozen_epoch=5), refuses="", does="AcquireLock"),
    row("c has more and is named, too", dcs__view__sync=sync(names="bc"), peers__c=peer("c", lsn=LSN + KiB, frozen_epoch=5), refuses="promotion.no_peer_is_ahead", does=""),
    row("c is named and silent: nobody is waited for", dcs__view__sync=sync(names="bc"), peers={}, memory__election__voted_at=ago(0.01), refuses="", does="AcquireLock",
        says="not waited for: a synchronous mode is active"),
    row("a is still a primary", peers__a=peer("a", in_recovery=False, frozen_epoch=5), refuses="promotion.no_primary_is_alive", does=""),
    row("on the way from quorum: votes count in priority mode, too", dcs__view__sync=sync(names="bc", quorum=1), peers={}, refuses="promotion.quorum_is_reached", says="0 votes (nobody), 1 needed"),
    row("the store went back to when b was named, and c was since", dcs__remembered_sync=sync(names="c"), refuses="promotion.is_synchronous", does="",
        says="/sync names a and b (before the store went back: a and c), not b"),
    row("b was named since, or c is by now", dcs__view__sync=sync(names="c"), dcs__remembered_sync=sync(names="b"), refuses="promotion.is_synchronous", does=""),
    row("b is named by both", dcs__remembered_sync=sync(names="bc"), refuses="", does="AcquireLock"),
    row("b led when it was saved, and c since, with b", dcs__view__sync=sync("b", "c"), dcs__remembered_sync=sync("c", "b"), refuses="", does="AcquireLock"),
    row("the store was rebuilt empty, and b was named", dcs__view__sync=Sync(), dcs__remembered_sync=sync(names="b"), refuses="", does="AcquireLock"),
    row("the store was rebuilt empty, and c was named", dcs__view__sync=Sync(), dcs__remembered_sync=sync(names="c"), refuses="promotion.is_synchronous", does="",
        says="/sync names nobody (before the store went back: a and c), not b"),
    row("it asked for votes before it went back", dcs__remembered_sync=sync(names="bc", quorum=1), peers={}, refuses="promotion.quorum_is_reached", says="0 votes (nobody), 1 needed", does=""),
    row("an operator asked for b, whatever is said", dcs__remembered_sync=sync(names="c"), dcs__view__failover=FailoverKey(candidate="b"), refuses="", does="AcquireLock"),
    row("the mode is off", settings__synchronous_mode="off", dcs__remembered_sync=sync(names="c"), refuses="", does="AcquireLock"),
]


@pytest.mark.parametrize(("why", "world"), [
    ("a new leader, before its promotion", WINNER.but(settings__synchronous_mode="on", dcs__view__sync=sync(names="b"))),
    ("one whom the old store happens to name", WINNER.but(settings__synchronous_mode="on", dcs__view__sync=sync("b", "c"))),
    ("one whom the empty store does not name", WINNER.but(settings__synchronous_mode="on", dcs__view__sync=Sync())),
    ("a leader that has lived through it", leading("b", sync(names="c"), listed="b")),
    ("one whose PostgreSQL is to be started in place", CRASHED.but(settings__synchronous_mode="on", dcs__view__sync=sync(names="b"), dcs__view__revisions__sync=80)),
], ids=lambda value: value if isinstance(value, str) else "")
def test_a_leader_writes_sync_anew_after_the_store_went_back_and_counts_on_nobody(why, world):
    """Before anything can be committed by a new start; who has everything shows as the standbys confirm."""
    decision = world.but(dcs__remembered_sync=sync("c", "b")).decide()
    assert not {"Promote", "StartPrimary"} & set(names(decision)), why
    written = [json.loads(a.value) for a in decision.actions if isinstance(a, WriteKey) and a.key == "sync"]
    assert [(w["leader"], w["sync_standby"]) for w in written] == [(world.seen.me.name, None)], why


@pytest.mark.parametrize("case", ELECTION)
def test_election_in_priority_mode(case):
    check(IN_SYNC, case)


VOTES = [
    row("c's vote", refuses="", does="AcquireLock", says="1 votes (c), 1 needed"),
    row("c is silent", peers={"a": silent("a"), "c": silent("c")}, refuses="promotion.quorum_is_reached", says="0 votes (nobody), 1 needed", does=""),
    row("c moves yet", peers__c=peer("c"), refuses="promotion.quorum_is_reached", does=""),
    row("c votes in another election", peers__c=peer("c", frozen_epoch=4), refuses="promotion.quorum_is_reached"),
    row("c has more", peers__c=peer("c", lsn=LSN + 1, frozen_epoch=5), refuses="promotion.quorum_is_reached promotion.no_peer_is_ahead", does=""),
    row("c has more on an older timeline", peers__c=peer("c", timeline=2, lsn=LSN + 1, frozen_epoch=5), refuses="", does="AcquireLock"),
    row("c is on a newer timeline", peers__c=peer("c", timeline=4, lsn=LSN - 1, frozen_epoch=5), refuses="promotion.quorum_is_reached"),
    row("c may not lead, but vote", peers__c=peer("c", frozen_epoch=5, tags=Tags(nofailover=True)), refuses="", does="AcquireLock"),
    row("c is of another make and cannot freeze", peers__c=peer("c", is_pgha=False), refuses="", says="1 votes (c)"),
    row("a's word is no vote", peers={"a": peer("a", frozen_epoch=5, lsn=0), "c": silent("c")}, refuses="promotion.quorum_is_reached"),
    row("two votes are needed", dcs__view__sync=sync(names="bcd", quorum=2), refuses="promotion.quorum_is_reached", says="1 votes (c), 2 needed"),
    row("both are there", dcs__view__sync=sync(names="bcd", quorum=2), peers={"a": silent("a"), "c": peer("c", frozen_epoch=5), "d": peer("d", frozen_epoch=5, lsn=0)}, refuses="", does="AcquireLock"),
    row("b is not named: one vote more", dcs__view__sync=sync(names="cd", quorum=1), refuses="promotion.quorum_is_reached", says="1 votes (c), 2 needed"),
    row("b is not named and has both votes", dcs__view__sync=sync(names="cd", quorum=1), peers={"a": silent("a"), "c": peer("c", frozen_epoch=5), "d": peer("d", frozen_epoch=5, lsn=0)}, refuses="",
        does="AcquireLock", says="without being named, one vote more is needed"),
    row("an operator asked for b", peers={}, dcs__view__failover=FailoverKey(candidate="b"), refuses="", does="AcquireLock"),
    row("nobody is promised: b may not", dcs__view__sync=sync(), refuses="promotion.quorum_is_reached", says="0 votes (nobody), 1 needed"),
]


@pytest.mark.parametrize("case", VOTES)
def test_election_in_quorum_mode(case):
    check(VOTING, case)


def test_who_takes_over_remembers_who_will_follow():
    assert VOTING.decide().memory.expected_standbys == ("c",)


# --- handing over ----------------------------------------------------------------------------------------------------------------

AFTER_CRASH = CRASHED.but(memory__crash_seen_at=ago(4), settings__synchronous_mode="on", dcs__view__sync=sync(names="b"))

HANDING_OVER = [
    row("b may lead", does="Demote", says="b may lead by /sync"),
    row("b may lead, wherever it stands", peers__b=peer("b", lsn=1), does="Demote"),
    row("b is silent", peers={"b": silent("b"), "c": peer("c")}, refuses="broken.handover_loses_nothing", does="", says="nobody who answers may lead by /sync"),
    row("only c may lead", dcs__view__sync=sync(names="c"), does="Demote", says="c may lead"),
    row("quorum: the other's vote is there", settings__synchronous_mode="quorum", dcs__view__sync=sync(names="bc", quorum=1), does="Demote", says="b, c may lead"),
    row("quorum: not both answer", settings__synchronous_mode="quorum", dcs__view__sync=sync(names="bc", quorum=1), peers={"b": peer("b")}, refuses="broken.handover_loses_nothing", does=""),
    row("quorum: the further one", settings__synchronous_mode="quorum", dcs__view__sync=sync(names="bc", quorum=1), peers__b=peer("b", lsn=LSN - 1), does="Demote", says="c may lead"),
]


@pytest.mark.parametrize("case", HANDING_OVER)
def test_handing_over_after_a_crash(case):
    check(AFTER_CRASH, case)


ASKED = IDLE.but(dcs__view__failover=FailoverKey(leader="a", candidate="b"), memory__switchover_asked_at=ago(2.1))

SWITCHOVER = [
    row("to the synchronous standby", refuses="", does="Demote"),
    row("to anybody: to it", dcs__view__failover__candidate="", refuses="", does="Demote", says="b can take over"),
    row("to the other", dcs__view__failover__candidate="c", refuses="switchover.has_good_candidate", does="WriteKey", says="c: is not among the synchronous standbys (b)"),
    row("a failover to the other", dcs__view__failover=FailoverKey(candidate="c"), refuses="", does="Demote"),
    row("quorum: its voter answers", settings__synchronous_mode="quorum", dcs__view__sync=sync(names="bc", quorum=1), refuses="", does="Demote"),
    row("quorum: nobody would vote for it", settings__synchronous_mode="quorum", dcs__view__sync=sync(names="bc", quorum=1), peers={"b": peer("b")}, refuses="switchover.has_good_candidate",
        says="b: 0 other voters answer, 1 needed"),
]


@pytest.mark.parametrize("case", SWITCHOVER)
def test_switchover(case):
    check(ASKED, case)


def test_nothing_is_set_on_the_way_down():
    """The setting stays as it is until every process has ended: a reload to less would acknowledge what waits."""
    for world in (ASKED, AFTER_CRASH, IDLE.but(shutting_down=True)):
        decision = world.decide()
        assert names(decision)[-1] == "Demote", decision
        assert not any(isinstance(action, SetSynchronousNames) for action in decision.actions)


# --- leaving -----------------------------------------------------------------------------------------------------------------------

FOLLOWER = REPLICA.but(settings__synchronous_mode="on", dcs__view__sync=sync(names="b"))
RESTART = (Request(id=2, kind="restart", at=ago(1)),)

LEAVING = [
    row("told to stop", shutting_down=True, refuses="synchronous.is_to_be_let_go", does="", says="named in /sync by a, waited 0.0 s of 20 s"),
    row("told to stop, waited long enough", shutting_down=True, memory__leaving_since=ago(20), does="Stop"),
    row("told to stop, let go", shutting_down=True, memory__leaving_since=ago(1), dcs__view__sync=sync(names="c"), does="Stop"),
    row("told to stop, the mode is off", shutting_down=True, settings__synchronous_mode="off", does="Stop"),
    row("asked to restart", requests=RESTART, refuses="synchronous.is_to_be_let_go", does="", summary="asked to restart"),
    row("asked to restart, let go", requests=RESTART, memory__leaving_since=ago(1), dcs__view__sync=sync(names="c"), does="Restart"),
    row("asked to restart, asynchronous", requests=RESTART, dcs__view__sync=sync(names="c"), does="Restart"),
]


@pytest.mark.parametrize("case", LEAVING)
def test_a_synchronous_standby_waits_to_be_let_go(case):
    decision = check(FOLLOWER, case)
    assert decision.leaves_sync == (decision.memory.leaving_since is not None)


def test_what_a_leaving_standby_says_of_itself_is_over_once_it_was_restarted():
    assert FOLLOWER.but(memory__leaving_since=ago(3), requests=RESTART).decide().leaves_sync
    assert not FOLLOWER.but(memory__leaving_since=ago(3)).decide().leaves_sync


def test_a_demotion_keeps_its_kind():
    assert only(ASKED.decide(), Demote).checkpoint
    assert ASKED.seen.now == NOW
