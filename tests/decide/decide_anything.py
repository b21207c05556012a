"""Observations by chance: from a healthy world, a few things changed to anything that their types allow.

Kept true, since observe/ and lock/ guarantee it: what is seen of the lock is what the view says, and a licence that is
held has its two instants.
"""

from __future__ import annotations

from random import Random
from typing import Any

import decide_world as w
from msgspec.structs import replace

from pgha.clock import NEVER, Instant
from pgha.decide.standing import Whose
from pgha.model import failsafe
from pgha.model.cluster import ClusterView, FailoverKey, HistoryEntry, Outsider, PausedHolder, Status, Sync, Tags
from pgha.model.decision import Election, Replica, SyncBook
from pgha.model.lock import Epoch, Licence, LicenceState, licence_s
from pgha.model.node import DataDirectoryFacts, WalReceiver
from pgha.model.observation import Operation, SlotMatcher, Upstream, WrittenNames
from pgha.model.request import Reinitialisation, Request, ScheduledRestart
from pgha.model.synchronous import Promise
from pgha.model.wal import HistoryRow, Position

WORLDS = (w.LEADER, w.REPLICA, w.CANDIDATE, w.CANDIDATE, w.WINNER, w.CRASHED, w.STOPPED, w.EMPTY, w.BIRTH)
KINDS = ("Bootstrap", "Clone", "StartStandby", "StartPrimary", "PrePromote", "Promote", "Demote", "Stop", "Restart", "InspectUpstream", "InspectEndOfWal", "Rewind", "Sweep", "AbandonDirectory", "?")
TAGS: tuple[dict[str, Any], ...] = (
    {}, {"nofailover": True}, {"nofailover": "yes"}, {"failover_priority": "x"}, {"failover_priority": [1]}, {"failover_priority": -3}, {"failover_priority": 7}, {"nofailover": {}},
    {"replicatefrom": "c"}, {"replicatefrom": "nobody"}, {"replicatefrom": 7}, {"nostream": 1}, {"clonefrom": True}, {"nosync": None, "sync_priority": 2.5}, {"": ""},
)


def world(chance: Random) -> w.World:
    """One of the healthy worlds, with up to eight changes."""
    found = chance.choice(WORLDS)
    if chance.random() < 0.6:
        found = _lock(chance, found)
    if chance.random() < 0.5:
        found = found.but(licence=_licence(chance))
    for _ in range(chance.randrange(7)):
        path, values = chance.choice(CHANGES)
        try:
            found = found.but(**{path: values(chance)})
        except (AssertionError, KeyError):
            continue        # nothing there to change
    view, seen = found.seen.dcs.view, found.seen.dcs.lock_seen
    return found if view is None or view.lock == seen.record else found.but(dcs__lock_seen=w.LockSeen(absent_since=_sometime(chance)))


def paused_or_promised(chance: Random) -> w.World:
    """A world in which pause or failsafe mode has a say."""
    found = world(chance)
    for _ in range(chance.randrange(1, 6)):
        path, values = chance.choice(MODES)
        if not path.startswith("dcs__view") or found.seen.dcs.view is not None:
            found = found.but(**{path: values(chance)})
    return found


def mixed(chance: Random) -> w.World:
    """A world in which members of another make take part."""
    found = world(chance)
    for _ in range(chance.randrange(1, 6)):
        path, values = chance.choice(MIXED)
        if not path.startswith("dcs__view") or found.seen.dcs.view is not None:
            found = found.but(**{path: values(chance)})
    view = found.seen.dcs.view
    if view is not None and view.lock is not None and chance.random() < 0.5:
        found = w.with_lock(found, replace(view.lock, mixed=True))
    return found


def _instant(chance: Random) -> Instant:
    boot, raw = w.ago(chance.choice((0, 0.01, 0.3, 0.6, 1, 3, 9, 29, 31, 99, 1e5, -5)))
    return Instant(boot - chance.choice((0, 0, 0, 5_000_000_000)), raw)


def _sometime(chance: Random) -> Instant | None:
    return chance.choice((None, _instant(chance), _instant(chance)))


def _soon(chance: Random) -> Instant | None:
    return chance.choice((None, w.ahead(chance.choice((-5, 0.1, 5, 30)))))


def _lsn(chance: Random) -> int:
    return chance.choice((0, 1, w.LSN - 1, w.LSN, w.LSN + 1, w.LSN + 8 * w.MiB, 2**63))


def _timeline(chance: Random) -> int:
    return chance.choice((0, 1, 2, 3, 3, 4, 9))


def _name(chance: Random) -> str:
    return chance.choice(("", "a", "b", "c", "d", "B", "ü-1"))


def _bool(chance: Random) -> bool:
    return chance.random() < 0.5


def _history(chance: Random) -> tuple[HistoryRow, ...]:
    return tuple(HistoryRow(timeline=n, switch_lsn=_lsn(chance)) for n in range(1, chance.randrange(1, 6)))


def _tags(chance: Random) -> Tags:
    return Tags.of(chance.choice(TAGS))


def _lock(chance: Random, found: w.World) -> w.World:
    if found.seen.dcs.view is None:
        return found
    lock = w.record(chance.choice("aabc"), mode=chance.choice(("held", "held", "held", "paused", "released")), ttl_s=chance.choice((0.001, 5.0, 30.0, 30.0, 86400.0)),
                    lsn=_lsn(chance), timeline=_timeline(chance), sequence=chance.choice((0, 1, 7)))
    if chance.random() < 0.3:
        lock = replace(lock, node_id=chance.choice(("", "id-x")))
    if chance.random() < 0.2:
        lock = replace(lock, incarnation="run-0")
    return w.with_lock(found, chance.choice((lock, lock, lock, None)), since=_instant(chance), absent_since=_sometime(chance))


def _licence(chance: Random) -> Licence:
    state = chance.choice(tuple(LicenceState))
    if state in (LicenceState.NONE, LicenceState.ACQUIRING, LicenceState.LOST):
        return Licence(state=state, failing_since=_sometime(chance))
    ttl_s = chance.choice((1.0, 5.0, 30.0))
    since = w.ago(chance.choice((0.0, 1.0, 4.0, 20.0, 31.0)))
    return w.licence(state=state, ttl_s=ttl_s, since=since, valid_until=since.plus_s(licence_s(ttl_s)), acquired_pass=chance.choice((0, w.PASS - 1)), failing_since=_sometime(chance),
                     epoch=chance.choice((0, 5, 6)), revision=chance.choice((100, 101)))


def _peer(chance: Random) -> Any:
    return w.peer(_name(chance), asked_at=_instant(chance), answered=_bool(chance), in_recovery=chance.choice((None, True, False)), timeline=_timeline(chance), lsn=_lsn(chance),
                  frozen_epoch=chance.choice((-1, 5, 6)), running=_bool(chance), candidate=_bool(chance), tags=_tags(chance), watchdog_failed=_bool(chance),
                  system_identifier=chance.choice(("", w.SYSTEM, "x")), history=_history(chance), is_pgha=_bool(chance), silent_since=_sometime(chance))


def _member(chance: Random) -> Any:
    return w.member(_name(chance), role=chance.choice(("", "primary", "replica", "?")), host=chance.choice(("", "a", "b")), state=chance.choice(("", "running", "stopped")),
                    api_url=chance.choice(("", "http://x")), tags=_tags(chance), xlog_location=_lsn(chance))


def _operation(chance: Random) -> Operation | None:
    running = Operation(kind=chance.choice(KINDS), id=chance.randrange(5), started_at=_instant(chance), cancelling=_bool(chance))
    return chance.choice((None, running))


def _ended(chance: Random) -> Operation | None:
    facts = chance.choice(({}, {"released": True}, {"system_identifier": w.SYSTEM, "initialize_revision": 7}))
    return Operation(kind=chance.choice(KINDS), id=chance.randrange(5), started_at=_instant(chance), ended_at=_sometime(chance), ok=_bool(chance), why=chance.choice(("", "x")), facts=facts)


def _election(chance: Random) -> Election | None:
    return chance.choice((None, Election(epoch=chance.choice((0, 5, 6)), lock_revision=chance.choice((0, 100, 99)), began_at=_instant(chance), frozen_at=_sometime(chance), voted_at=_sometime(chance))))


#: 2027-01-15T08:00:00Z is the wall clock's moment in every world.
MOMENTS = ("x", "2030-01-01", "2030-01-01T00:00:00Z", "2027-01-15T07:59:59.5+00:00", "2027-01-15T08:00:00.5+00:00", "2001-01-01T00:00:00+01:00")


def _requests(chance: Random) -> tuple[Request, ...]:
    options = ({}, {"timeout_s": 5.0}, {"timeout_s": None}, {"role": "replica"}, {"postgres_version": "x"}, {"restart_pending": True}, {"schedule": "x"}, {"force": True})
    return tuple(Request(id=n, kind=chance.choice(("restart", "cancel_restart", "reinitialize", "switchover", "failover")), at=_instant(chance), options=chance.choice(options))
                 for n in range(chance.randrange(1, 3)))


def _upstream(chance: Random) -> Upstream | None:
    return chance.choice((None, Upstream(name=_name(chance), asked_at=_instant(chance), ok=_bool(chance), system_identifier=chance.choice(("", w.SYSTEM, "9" * 19)), timeline=_timeline(chance),
                                         lsn=_lsn(chance), in_recovery=_bool(chance), history=_history(chance))))


def _sync(chance: Random) -> Sync:
    names = tuple(chance.sample(("a", "b", "c", "d", "B", "ü-1"), chance.randrange(4)))
    return Sync(leader=chance.choice(("", "a", "a", "b", "A", "?")), quorum=chance.choice((0, 0, 1, 2, 9)), members=names, raw=chance.choice(({}, {"x": 1, "leader": "a"})))


def _setting(chance: Random) -> str:
    return chance.choice(("", "b", "c", "a", "2 (b,c)", "ANY 1 (b,c)", "ANY 2 (b,c,d)", "FIRST 1 (b,c)", "*", "((", '"ü-1"', "__patroni_strict_sync_replica_placeholder__"))


def _replication(chance: Random) -> tuple[dict[str, Any], ...]:
    return tuple({"application_name": chance.choice(("b", "c", "B", "d", None, 7)), "state": chance.choice(("streaming", "streaming", "streaming", "catchup", "backup", None)),
                  "flush_lsn": chance.choice((None, _lsn(chance), "x")), "sync_priority": chance.choice((0, 1, None))} for _ in range(chance.randrange(5)))


def _sync_book(chance: Random) -> SyncBook:
    sent = tuple(Promise(voters=frozenset(chance.sample("bcd", chance.randrange(4))), quorum=chance.randrange(3)) for _ in range(chance.randrange(3)))
    replicas = {name: Replica(target=_lsn(chance), since=_instant(chance), confirmed=_bool(chance), streaming=_bool(chance)) for name in chance.sample("bcd", chance.randrange(4))}
    return SyncBook(epoch_revision=chance.choice((0, 50, 50, 100)), first_revision=chance.choice((0, 3)), sent=sent, sent_on=chance.choice((0, 0, 3)), sent_at=_sometime(chance),
                    names=chance.choice((None, _setting(chance))), seen_at=_sometime(chance), mark=chance.choice((0, 1, w.LSN)), set_at=_sometime(chance), replicas=replicas)


def one_of(*values: Any) -> Any:
    return lambda chance: chance.choice(values)


#: What the synchronous modes go by.
SYNCHRONOUS: tuple[tuple[str, Any], ...] = (
    ("dcs__view__sync", _sync),
    ("dcs__view__sync", _sync),
    ("settings__synchronous_mode", one_of("on", "on", "quorum", "quorum", "off")),
    ("settings__synchronous_mode", one_of("on", "quorum")),
    ("settings__synchronous_mode_strict", _bool),
    ("settings__synchronous_node_count", one_of(1, 2, 7)),
    ("settings__maximum_lag_on_syncnode_bytes", one_of(-1, 0, 1, 2**40)),
    ("postgres__row__synchronous_standby_names", _setting),
    ("postgres__row__checkpointer_rests", _bool),
    ("postgres__row__startup_rests", _bool),
    ("postgres__row__replication", _replication),
    ("postgres__row__replay_paused", _bool),
    ("postgres__row__limits", one_of({}, {"max_connections": 100}, {"max_connections": 10, "max_wal_senders": 5})),
    ("directory__control__limits", one_of({}, {"max_connections": 100}, {"max_connections": 200, "max_worker_processes": 8})),
    ("postgres__row__started_at_s", one_of(0.0, 5.0)),
    ("written_names", lambda chance: WrittenNames(told=_bool(chance), names=chance.choice((None, _setting(chance))))),
    ("memory__sync", _sync_book),
    ("memory__expected_standbys", one_of((), ("b", "C"))),
    ("memory__leaving_since", _sometime),
)

def _endless(chance: Random) -> Licence:
    """Of a lock record in mode `paused`, or of one that is being given back."""
    return w.licence(state=chance.choice((LicenceState.HELD, LicenceState.HELD, LicenceState.RELEASING)), mode="paused", since=w.ago(chance.choice((0.0, 4.0, 100.0))), valid_until=NEVER,
                     acquired_pass=chance.choice((0, w.PASS - 1)), failing_since=_sometime(chance), epoch=chance.choice((0, 5, 6)), revision=chance.choice((100, 101)))


def _failsafe(chance: Random) -> failsafe.FailsafeFacts:
    promise = failsafe.Promise(name=chance.choice(("", "a", "c", "d")), accepted_at=w.ago(chance.choice((0.0, 1.0, 20.0, 31.0))), ttl_s=chance.choice((5.0, 30.0)),
                      incarnation=chance.choice(("", "run-a", "run-0")), epoch=chance.choice((0, 5, 6)), sequence=chance.choice((0, 6, 7, 9)), slots=chance.choice(({}, {"c": 5, "?": 2**62})))
    return failsafe.FailsafeFacts(promise=chance.choice((None, promise, promise)), missing=chance.choice(({}, {"c": "no answer"})))


#: What mixed clusters go by.
MIXED: tuple[tuple[str, Any], ...] = (
    ("settings__mixed", one_of(True)),
    ("settings__mixed", one_of(True)),
    ("dcs__view__leader", lambda chance: chance.choice(("", "a", "b", "c", "p", "p"))),
    ("dcs__view__leader_lease", one_of(0, 7, 7)),
    ("dcs__outsider", one_of(None, Outsider(name="p", host="p"), Outsider(name="p", alone=True), Outsider(name="c", host="c", alone=True), Outsider(name="b", host="b"))),
    ("peers", lambda chance: {p.name: replace(p, is_pgha=_bool(chance)) for p in (_peer(chance) for _ in range(chance.randrange(4)))}),
    ("upstream", lambda chance: Upstream(name=chance.choice(("p", "c")), asked_at=_instant(chance), ok=_bool(chance), in_recovery=_bool(chance), unreached=_bool(chance))),
    ("dcs__view__epoch__number", one_of(0, 0, 5)),
    ("dcs__view__failover", lambda chance: FailoverKey(leader=_name(chance), candidate=_name(chance))),
)

#: What pause and failsafe mode go by.
MODES: tuple[tuple[str, Any], ...] = (
    ("settings__pause", one_of(True)),
    ("settings__pause", one_of(True)),
    ("licence", _endless),
    ("guard__state", one_of("paused", "paused", "armed", "standby")),
    ("dcs__remembered_sync", one_of(None, Sync(leader="a", members=("c",)), Sync(leader="b", quorum=1, members=("a", "c")))),
    ("dcs__remembered_pause", one_of(None, PausedHolder(name="c", node_id="id-c", incarnation="run-c"), PausedHolder(name="b", node_id="id-b", incarnation="run-0"))),
    ("dcs__view__failover", lambda chance: FailoverKey(leader=_name(chance), candidate=_name(chance), down_incarnation=chance.choice(("", "run-a", "run-c")), down_sequence=chance.choice((0, 1, 7)))),
    ("memory__paused", _bool),
    ("memory__ours_to_start", _bool),
    ("settings__failsafe_mode", _bool),
    ("failsafe", _failsafe),
    ("failsafe", _failsafe),
    ("licence__by_failsafe", _bool),
    ("dcs__view__failsafe", one_of({}, {"a": "http://a", "b": "http://b"}, {"x": "http://x", "a": "http://a"})),
    ("memory__leaving_since", _sometime),
)

CHANGES: tuple[tuple[str, Any], ...] = (
    ("shutting_down", one_of(True)),
    ("number", one_of(1, w.PASS)),
    ("wall_s", one_of(0.0, 4e9, -1.5)),
    ("postgres__process", one_of("absent", "starting", "running", "stopping")),
    ("postgres__answer", one_of("sql", "starting", "silent", "refused", "none")),
    ("postgres__answered_at", _sometime),
    ("postgres__since", _sometime),
    ("postgres__orphans", _bool),
    ("postgres__ever_started", _bool),
    ("postgres__row", one_of(None, w.primary_row(), w.standby_row(), w.standby_row(receiver=None, primary_conninfo=""), w.standby_row(receiver=WalReceiver(status="stopping")))),
    ("postgres__row_at", _sometime),
    ("postgres__row__timeline", _timeline),
    ("postgres__row__received_lsn", _lsn),
    ("postgres__row__lsn", _lsn),
    ("postgres__row__system_identifier", one_of("", "x", "9" * 19)),
    ("postgres__row__primary_conninfo", one_of("", "host", "host=", "host='a b' port=x", "= = ==", "host=c port=99999999999")),
    ("postgres__row__slots", one_of((), (w.slot("b"), w.slot("x", active=False), w.slot("a", type="logical"), w.slot("c", temporary=True)),
                                    (w.slot("a", active=False, holds_back_vacuum=True), w.slot("c", active=False, restart_lsn=0, wal_status="lost"), w.slot("p", active=False)))),
    ("directory", one_of(DataDirectoryFacts(), DataDirectoryFacts(state="missing"), DataDirectoryFacts(state="valid"))),
    ("directory__state", one_of("unknown", "missing", "empty", "valid", "partial", "unreadable")),
    ("directory__control", one_of(None)),
    ("directory__control__state", one_of("in production", "shut down", "shut down in recovery", "in archive recovery", "in crash recovery", "?")),
    ("directory__control__timeline", _timeline),
    ("directory__control__system_identifier", one_of("", "9" * 19)),
    ("directory__end_of_wal", _lsn),
    ("directory__end_of_wal_timeline", _timeline),
    ("directory__rewind_interrupted", _bool),
    ("directory__abandoned_bootstrap", _bool),
    ("directory__unfinished_copy", _bool),
    ("settings__overwriting_methods", lambda chance: chance.choice(((), ("walg",)))),
    ("settings__leaderless_methods", lambda chance: chance.choice(((), ("walg",)))),
    ("settings__replica_methods", lambda chance: chance.choice((("basebackup",), ("walg", "basebackup"), ("walg",)))),
    ("settings__pre_promote_s", lambda chance: chance.choice((0.0, 20.0))),
    ("settings__before_stop_s", lambda chance: chance.choice((0.0, 20.0))),
    ("memory__vetoed_until", _soon),
    ("memory__pre_promoted_epoch", lambda chance: chance.choice((-1, 5, 6))),
    ("directory__bootstrap_unregistered", _bool),
    ("directory__history", _history),
    ("directory__standby_signal", _bool),
    ("guard__state", one_of("", "idle", "armed", "latched", "standby", "offline")),
    ("guard__reachable", _bool),
    ("watchdog__failed", _bool),
    ("dcs__view", one_of(None, ClusterView())),
    ("dcs__view__members", lambda chance: {m.name: m for m in (_member(chance) for _ in range(chance.randrange(4)))}),
    ("dcs__view__initialize", one_of(None, "", "short", w.SYSTEM, "9" * 19)),
    ("dcs__view__config", one_of(None, {}, {"ttl": "x"})),
    ("dcs__view__history", one_of(None, (), (HistoryEntry(timeline=9, lsn=1),))),
    ("dcs__view__status", lambda chance: Status(optime=_lsn(chance), slots={"c": _lsn(chance), "?": 0}, retain_slots=("x",), raw={"x": [1]})),
    *SYNCHRONOUS,
    ("dcs__view__failover", lambda chance: FailoverKey(leader=_name(chance), candidate=_name(chance), scheduled_at=chance.choice(("", "", *MOMENTS)))),
    ("dcs__view__epoch", lambda chance: Epoch(number=chance.choice((0, 5, 6)), holder=_name(chance), incarnation="x", timeline=_timeline(chance), claims=chance.choice(((), ((7, "c"),))))),
    ("dcs__view__revisions", one_of({})),
    ("dcs__view__revision", one_of(0, 99, 101)),
    ("dcs__read_at", _sometime),
    ("dcs__unreachable_since", _sometime),
    ("dcs__trusted_from", _soon),
    ("dcs__remembered_ttl_s", one_of(0.0, 5.0, 60.0)),
    ("dcs__remembered_members", one_of({}, {"d": ""}, {"b": "http://b", "d": "http://d"})),
    ("dcs__last_positions", lambda chance: {_name(chance): Position(timeline=_timeline(chance), lsn=_lsn(chance))}),
    ("peers", lambda chance: {p.name: p for p in (_peer(chance) for _ in range(chance.randrange(4)))}),
    ("operation", _operation),
    ("ended", _ended),
    ("requests", _requests),
    ("upstream", _upstream),
    ("settings__tags", _tags),
    ("settings__ttl_s", one_of(1.0, 5.0, 60.0)),
    ("settings__loop_wait_s", one_of(0.1, 1.0, 60.0)),
    ("settings__primary_start_timeout_s", one_of(0.0, 1.0)),
    ("settings__maximum_lag_on_failover_bytes", one_of(0, 2**62)),
    ("settings__check_timeline", _bool),
    ("settings__use_slots", _bool),
    ("settings__permanent_slots", one_of((), ("p", "b"), ("c",))),
    ("settings__ignored_slots", one_of((), (SlotMatcher(),), (SlotMatcher(name="x", type="physical"),))),
    ("settings__may_drop_slots", _bool),
    ("settings__member_slots_ttl_s", one_of(0.0, 1.0)),
    ("dcs__remembered_slots", one_of(("x",), ("a", "b", "p"))),
    ("settings__use_pg_rewind", _bool),
    ("settings__remove_data_directory_on_diverged_timelines", _bool),
    ("settings__remove_data_directory_on_rewind_failure", _bool),
    ("settings__has_bootstrap_section", _bool),
    ("settings__dynamic_config", one_of(b"{}")),
    ("settings__configuration_changed", _bool),
    ("memory__election", _election),
    ("memory__promotion_failed_at", _sometime),
    ("memory__crash_seen_at", _sometime),
    ("memory__start_failures", one_of(0, 1, 40)),
    ("memory__last_start_failed_at", _sometime),
    ("memory__clone_failures", one_of(0, 1, 40)),
    ("memory__last_clone_failed_at", _sometime),
    ("memory__rewind_failed", one_of("", "x")),
    ("memory__not_streaming_since", _sometime),
    ("memory__switchover_asked_at", _sometime),
    ("memory__switchover_revision", one_of(0, 7)),
    ("memory__handed_over_revision", one_of(0, 7)),
    ("memory__bootstrap_revision", one_of(7)),
    ("memory__stand_back_until", _soon),
    ("memory__upstream_asked_at", _sometime),
    ("memory__handover_judged_at", _sometime),
    ("memory__holding_since", _sometime),
    ("memory__demoted_sequence", one_of(0, 6, 7)),
    ("memory__rewind_failures", one_of(0, 1, 40)),
    ("memory__last_rewind_failed_at", _sometime),
    ("memory__rewind_failed_for", one_of("", "a/3")),
    ("memory__last_status_at", _sometime),
    ("memory__scheduled_restart", lambda chance: ScheduledRestart(schedule=chance.choice(MOMENTS), begun=_bool(chance), conditions=chance.choice(({}, {"role": "primary"}, {"timeout": 3.0})))),
    ("memory__reinit", lambda chance: Reinitialisation(request=3, asked_at=_instant(chance), from_leader=_bool(chance), inspected=_bool(chance))),
    ("memory__restart_within_s", one_of(0.0, 1.0)),
    ("memory__restart_overdue", _bool),
    ("memory__last_ended_id", one_of(0, 1, 2, 3, 4)),
)

TAKEN = (Whose.LIVE, Whose.IMPOSTOR, Whose.UNKNOWN, Whose.SETTLING, Whose.MINE)
