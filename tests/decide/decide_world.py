"""Healthy three-node clusters as one of their nodes sees them, and small changes to them: plain values, nothing else.

Nodes `a`, `b` and `c`. The worlds: `LEADER` (a leads, seen by a), `REPLICA` (a leads, seen by b), `CANDIDATE` (a has
fallen silent, its record has expired, b is about to take over), `WINNER` (b has the lock and is still a standby),
`CRASHED` (a leads and its PostgreSQL died), `STOPPED` (b's standby is stopped), `EMPTY` (b has no data), `BIRTH` (b has
no data, and neither has anybody).

A change is a path of names: `world.but(dcs__view__status__optime=5)`; `memory__…` changes the memory, `lock__…` the
lock record wherever it is seen. A row of a table says only what differs: see `row` and `check`.
"""

from __future__ import annotations

from typing import Any

import pytest
from msgspec import Struct
from msgspec.structs import replace

from pgha.clock import Instant
from pgha.decide import decide
from pgha.model.cluster import ClusterView, HistoryEntry, LockSeen, Member, Status
from pgha.model.decision import Decision, Election, Memory
from pgha.model.lock import Epoch, Identity, Licence, LicenceState, LockRecord, licence_s
from pgha.model.node import (
    Control,
    DataDirectoryFacts,
    GuardFacts,
    PostgresFacts,
    Row,
    Slot,
    WalReceiver,
    WatchdogFacts,
)
from pgha.model.observation import DcsFacts, Observation, Peer, Settings, Upstream
from pgha.model.wal import HistoryRow, Position

KiB, MiB = 1024, 1024 * 1024
SYSTEM = "7123456789012345678"
LSN = 64 * MiB                       # where everybody stands
TIMELINE = 3
CLAIM = "timeline 3, epoch 5, run-a/1 by a"
HISTORY = (HistoryRow(timeline=1, switch_lsn=8 * MiB, claim="timeline 2, epoch 2, run-c/9 by c"), HistoryRow(timeline=2, switch_lsn=16 * MiB, claim=CLAIM))
NOW = Instant(1_000_000_000_000, 1_000_000_000_000)
TTL_S = 30.0
PASS = 60                            # this pass


def ago(seconds: float) -> Instant:
    return NOW.plus_s(-seconds)


def ahead(seconds: float) -> Instant:
    return NOW.plus_s(seconds)


def identity(name: str) -> Identity:
    return Identity(name=name, node_id=f"id-{name}", incarnation=f"run-{name}")


def record(name: str = "a", **changes: Any) -> LockRecord:
    return replace(LockRecord(holder=name, node_id=f"id-{name}", incarnation=f"run-{name}", sequence=7, ttl_s=TTL_S, lsn=LSN, timeline=TIMELINE), **changes)


def member(name: str, *, role: str = "replica", **changes: Any) -> Member:
    return replace(Member(name=name, revision=20, lease=1, api_url=f"http://{name}:8008", host=name, state="running", role=role, xlog_location=LSN,
                          timeline=TIMELINE, node_id=f"id-{name}", is_pgha=True, claim=CLAIM, tells_claim=True), **changes)


def peer(name: str, **changes: Any) -> Peer:
    """A healthy standby that answered a tenth of a second ago."""
    return replace(Peer(name=name, asked_at=ago(0.1), answered=True, is_pgha=True, in_recovery=True, timeline=TIMELINE, lsn=LSN, running=True,
                        system_identifier=SYSTEM, history=HISTORY), **changes)


def silent(name: str, *, for_s: float = 5.0) -> Peer:
    return Peer(name=name, asked_at=ago(0.1), why="timed out", silent_since=ago(for_s))


def licence(**changes: Any) -> Licence:
    """Renewed two seconds ago."""
    return replace(Licence(state=LicenceState.HELD, sequence=7, ttl_s=TTL_S, since=ago(2), valid_until=ago(2).plus_s(licence_s(TTL_S)), revision=100, epoch=5,
                           epoch_revision=50, acquired_pass=PASS - 20), **changes)


def slot(name: str, **changes: Any) -> Slot:
    return replace(Slot(name=name, active=True, restart_lsn=LSN - MiB), **changes)


def primary_row(**changes: Any) -> Row:
    return replace(Row(in_recovery=False, timeline=TIMELINE, lsn=LSN, slots=(slot("b"), slot("c")), system_identifier=SYSTEM), **changes)


def standby_row(**changes: Any) -> Row:
    return replace(Row(in_recovery=True, timeline=TIMELINE, received_lsn=LSN, replayed_lsn=LSN, receiver=WalReceiver(status="streaming", sender_host="a", sender_port=5432),
                       slots=(slot("a", active=False, restart_lsn=LSN), slot("c", active=False)), system_identifier=SYSTEM, primary_conninfo="user=r host=a port=5432",
                       primary_slot_name="b"), **changes)


STATUS = {"optime": LSN, "slots": {"a": LSN, "b": LSN - MiB, "c": LSN - MiB}, "retain_slots": ["a", "b", "c"]}

VIEW = ClusterView(
    revision=100, initialize=SYSTEM, config={}, leader="a", lock=record(), lock_revision=100, lock_value=b"record",
    epoch=Epoch(number=5, holder="a", incarnation="run-a", timeline=TIMELINE),
    members={"a": member("a", role="primary"), "b": member("b"), "c": member("c")},
    status=Status(optime=LSN, slots={"a": LSN, "b": LSN - MiB, "c": LSN - MiB}, retain_slots=("a", "b", "c"), raw=STATUS),
    history=tuple(HistoryEntry(timeline=r.timeline, lsn=r.switch_lsn) for r in HISTORY),
    revisions={"initialize": 2, "config": 3, "leader": 50, "pgha/epoch": 50, "pgha/lock": 100, "status": 90, "history": 51},
)

DIRECTORY = DataDirectoryFacts(
    state="valid", control=Control(state="in production", system_identifier=SYSTEM, timeline=TIMELINE, checkpoint_lsn=LSN - MiB, checksums=True),
    standby_signal=True, history=HISTORY, major_version=15,
)


class World(Struct, frozen=True, kw_only=True):
    """What a pass knows, and what the last one left it."""

    seen: Observation
    memory: Memory = Memory(last_status_at=ago(2))

    def but(self, **changes: Any) -> World:
        """The same world, with something else in one place or a few."""
        world = self
        for path, value in changes.items():
            head, _, rest = path.partition("__")
            if head == "memory":
                world = replace(world, memory=_changed(world.memory, rest.split("__"), value))
            elif head == "lock":
                view = world.seen.dcs.view
                assert view is not None and view.lock is not None, "no record to change"
                world = with_lock(world, _changed(view.lock, rest.split("__"), value))
            else:
                world = replace(world, seen=_changed(world.seen, path.split("__"), value))
        return world

    def decide(self) -> Decision:
        return decide(self.seen, self.memory)


def _changed(value: Any, path: list[str], new: Any) -> Any:
    head, rest = path[0], path[1:]
    if isinstance(value, dict):
        return {**value, head: _changed(value[head], rest, new) if rest else new}
    assert value is not None, f"nothing there to change {'.'.join(path)} of"
    return replace(value, **{head: _changed(getattr(value, head), rest, new) if rest else new})


def with_lock(world: World, lock: LockRecord | None, *, since: Instant | None = None, absent_since: Instant | None = None) -> World:
    """The record as it is seen; unless said otherwise since when the former was seen. None: there is none."""
    o = world.seen
    assert o.dcs.view is not None
    before = o.dcs.lock_seen
    seen = LockSeen(absent_since=absent_since) if lock is None else LockSeen(
        record=lock, revision=before.revision or 100, value=before.value or b"record", since=since or before.since)
    view = replace(o.dcs.view, lock=lock, lock_revision=seen.revision, lock_value=seen.value)
    return replace(world, seen=replace(o, dcs=replace(o.dcs, view=view, lock_seen=seen)))


def without(world: World, *names: str) -> World:
    """Members whose keys are gone and who are not remembered."""
    view = world.seen.dcs.view
    assert view is not None
    return world.but(dcs__view__members={n: m for n, m in view.members.items() if n not in names},
                     dcs__remembered_members={n: u for n, u in world.seen.dcs.remembered_members.items() if n not in names},
                     peers={n: p for n, p in world.seen.peers.items() if n not in names})


def _dcs(seen_s: float) -> DcsFacts:
    return DcsFacts(view=VIEW, lock_seen=LockSeen(record=record(), revision=100, value=b"record", since=ago(seen_s)), heard_at=ago(0.05), read_at=ago(0.1),
                    remembered_ttl_s=TTL_S, remembered_members={n: f"http://{n}:8008" for n in "abc"},
                    last_positions={n: Position(timeline=TIMELINE, lsn=LSN) for n in "abc"})


def _observation(name: str, *, seen_s: float, **changes: Any) -> Observation:
    return replace(Observation(now=NOW, wall_s=1_800_000_000.0, number=PASS, me=identity(name), settings=Settings(), dcs=_dcs(seen_s), directory=DIRECTORY,
                               watchdog=WatchdogFacts(), peers={n: peer(n) for n in "abc" if n != name}), **changes)


def _running(row: Row) -> PostgresFacts:
    return PostgresFacts(process="running", pid=4711, since=ago(1000), ever_started=True, answer="sql", answered_at=ago(0.2), row=row, row_at=ago(0.2))


_STANDBYS_DIRECTORY = replace(DIRECTORY, control=Control(state="in archive recovery", system_identifier=SYSTEM, timeline=TIMELINE, checkpoint_lsn=LSN - MiB,
                                                        min_recovery_lsn=LSN - KiB, min_recovery_timeline=TIMELINE, checksums=True))
_STANDING_BY = GuardFacts(reachable=True, state="standby")

LEADER = World(seen=_observation("a", seen_s=2, licence=licence(), postgres=_running(primary_row()), guard=GuardFacts(reachable=True, state="armed", fence_at=ahead(20))))

REPLICA = World(seen=_observation("b", seen_s=2, postgres=_running(standby_row()), directory=_STANDBYS_DIRECTORY, guard=_STANDING_BY)).but(
    peers__a=peer("a", in_recovery=False), configured_upstream="a")

CANDIDATE = World(
    seen=_observation("b", seen_s=31, postgres=_running(standby_row(receiver=None, primary_conninfo="")), directory=_STANDBYS_DIRECTORY, guard=_STANDING_BY,
                      peers={"a": silent("a"), "c": peer("c", frozen_epoch=5)}),
    memory=Memory(election=Election(epoch=5, lock_revision=100, began_at=ago(1), frozen_at=ago(0.9), voted_at=ago(0.5)), last_status_at=ago(2)),
)

WINNER = with_lock(replace(CANDIDATE, seen=replace(CANDIDATE.seen, licence=licence(since=ago(0.2), valid_until=ago(0.2).plus_s(licence_s(TTL_S)), epoch=6, epoch_revision=100,
                                                                                  acquired_pass=PASS - 1))), record("b"), since=ago(0.2)).but(
    dcs__view__epoch=Epoch(number=6, holder="b", incarnation="run-b", timeline=TIMELINE + 1), dcs__view__leader="b")

CRASHED = LEADER.but(postgres=PostgresFacts(since=ago(0.1), ever_started=True))

STOPPED = REPLICA.but(
    postgres=PostgresFacts(since=ago(5)), upstream=Upstream(name="a", asked_at=ago(0.1), ok=True, system_identifier=SYSTEM, timeline=TIMELINE, lsn=LSN, history=HISTORY),
    memory__upstream_asked_at=ago(0.2), directory__control__state="shut down in recovery")

EMPTY = REPLICA.but(postgres=PostgresFacts(), directory=DataDirectoryFacts(state="missing"))

BIRTH = with_lock(EMPTY.but(dcs__remembered_ttl_s=0.0, dcs__remembered_members={}, dcs__last_positions={}, peers={}), None).but(
    dcs__view=ClusterView(revision=1))


# --- tables ------------------------------------------------------------------------------------------------------------

class Case(Struct, frozen=True, kw_only=True):
    """One row of a table; empty: nothing is asked of that."""

    name: str
    refuses: tuple[str, ...] | None
    says: tuple[str, ...]
    situation: str
    does: tuple[str, ...] | None
    summary: str
    changes: dict[str, Any]


def row(name: str, *, refuses: str | tuple[str, ...] | None = None, says: str | tuple[str, ...] = (), situation: str = "", does: str | None = None,
        summary: str = "", **changes: Any) -> Any:
    """`refuses`: exactly these rules do not hold ("" = all hold); `says`: texts in these rules' becauses (or in anybody's, if all
    hold); `does`: the actions' names, in order; `summary`: in the decision's summary; the rest: what differs."""
    rules = None if refuses is None else tuple(refuses.split()) if isinstance(refuses, str) else refuses
    case = Case(name=name, refuses=rules, says=(says,) if isinstance(says, str) else says, situation=situation, does=None if does is None else tuple(does.split()),
                summary=summary, changes=changes)
    return pytest.param(case, id=name)


def names(decision: Decision) -> tuple[str, ...]:
    return tuple(type(action).__name__ for action in decision.actions)


def refused(decision: Decision) -> tuple[str, ...]:
    return tuple(reason.rule for reason in decision.reasons if not reason.holds)


def check(world: World, case: Case) -> Decision:
    """Decides in the changed world, and compares with the row."""
    decision = world.but(**case.changes).decide()
    seen = "\n".join(f"{'holds' if r.holds else 'FAILS'} {r.rule}: {r.because}" for r in decision.reasons) + f"\n→ {decision.situation}: {decision.summary}: {decision.actions}"
    if case.refuses is not None:
        assert sorted(refused(decision)) == sorted(case.refuses), seen
    becauses = [r.because for r in decision.reasons if not case.refuses or r.rule in case.refuses]
    for text in case.says:
        assert any(text in because for because in becauses), f"nobody says {text!r}:\n{seen}"
    if case.situation:
        assert decision.situation == case.situation, seen
    if case.does is not None:
        assert names(decision) == case.does, seen
    assert case.summary in decision.summary, seen
    return decision


def only(decision: Decision, kind: type[Any]) -> Any:
    """The one action of this kind."""
    found = [action for action in decision.actions if isinstance(action, kind)]
    assert len(found) == 1, decision.actions
    return found[0]
