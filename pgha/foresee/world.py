"""What do the nodes' decisions bring about, and what do they decide then? A small model of effects around the real `decide`.

Time is in seconds since the question was asked, the same for all; each node reads it on its own clocks, as its observation
left them. What is modelled is what decides who leads: the lock and its renewal, reads, freezing, votes, promotion, demotion,
starts, `/sync`, failsafe rounds, members that vanish. WAL stands still unless `Supposed.most` says otherwise; a network is
whole, or (for a store that a node cannot reach already) as it is; rewinds and copies do not end.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from typing import Any

from msgspec import Struct
from msgspec.structs import replace

from pgha.clock import NEVER, Deadline, Instant, candidate_age_s, remaining_s
from pgha.dcs import Entry, Generation, Snapshot
from pgha.dcs.keys import Keys, parse
from pgha.decide import decide, promotion
from pgha.foresee.hypothesis import Hypothesis
from pgha.model.action import (
    AcquireLock,
    Action,
    AnswerRequest,
    ApplyConfiguration,
    CancelOperation,
    Demote,
    Follow,
    Freeze,
    InspectUpstream,
    LongAction,
    MaintainSlots,
    Promote,
    ReadCluster,
    ReleaseLock,
    Restart,
    RestoreStandbySignal,
    SetSynchronousNames,
    StandDown,
    StartPrimary,
    StartStandby,
    WriteInitialize,
    WriteKey,
)
from pgha.model.cluster import ClusterView, LockSeen
from pgha.model.decision import Decision, Memory, PeerQuestion, Reason
from pgha.model.failsafe import FailsafeOrder, Promise
from pgha.model.lock import Epoch, Licence, LicenceState, LockRecord, demote_at, licence_s, licensed_until
from pgha.model.node import PostgresFacts, Row, Slot, WalReceiver
from pgha.model.observation import Observation, Operation, Peer, Upstream, WrittenNames
from pgha.model.synchronous import parse_requirement
from pgha.model.wal import HistoryRow

#: A renewal, a read, an answer of a peer: so long, for lack of a better number.
SHORT_S = 0.01
#: How long operations take that are a matter of moments; any other does not end within a forecast.
TAKES_S = {"PrePromote": 0.2, "Promote": 0.1, "Demote": 0.3, "Stop": 0.3, "StartStandby": 0.3, "StartPrimary": 0.5, "Restart": 0.8, "InspectUpstream": 0.1,
           "InspectEndOfWal": 0.2, "Sweep": 0.05}
#: Those that do not end, where it is supposed that they do.
DONE_S = 1.0
#: A probe, and a pass.
LATE_S = 0.3
#: A run ends with so many passes, whatever is still to come.
PASSES_AT_MOST = 3000
_KEYS = Keys("foreseen", "cluster")
#: WAL that one standby is supposed to have got and the others not.
MORE_BYTES = 8192


class Seen(Struct, frozen=True, kw_only=True):
    """One node's last pass, as its agent tells it (GET /pgha/observation), `age_s` old."""

    observation: Observation
    memory: Memory = Memory()
    age_s: float = 0.0


class Supposed(Struct, frozen=True, kw_only=True):
    """One of the ways in which a future may go that is open. `first`: this node's clock runs as fast as it may, all others'
    as slow; `most`: of what was on its way, this node got it and no other did; `done`: the copy or rewind that this node is
    about ends well, in a moment; `vetoes`: this node's pre_promote refuses; `fails`: its PostgreSQL does not come back as
    primary; `quick`: it hears of everything before the others do; `late`: it decides nothing for a moment yet."""

    hypotheses: tuple[Hypothesis, ...] = ()
    first: str = ""
    most: str = ""
    done: str = ""
    vetoes: str = ""
    fails: str = ""
    quick: str = ""
    late: str = ""
    drift: float = 0.0


class Said(Struct, frozen=True, kw_only=True):
    """A node decided something else than before, `at_s` from now."""

    at_s: float
    node: str
    decision: Decision


class Node:
    """One node in the model: its next observation, and what it remembers."""

    def __init__(self, seen: Seen, rate: float) -> None:
        self.o = seen.observation
        self.memory = seen.memory
        self.name = self.o.me.name
        self._began, self._age_s, self._rate = self.o.now, seen.age_s, rate
        self.decision: Decision | None = None
        self.up = True
        self.hears = self.o.dcs.unreachable_since is None and self.o.dcs.view is not None     # the store
        self.next_s = float("inf")
        self.action: LongAction | None = None
        self.ends_s = float("inf")
        self.silent_since: dict[str, Instant] = {}
        self.epoch_asked = -1
        self.renews_s = float("inf")
        self.round_s = float("inf")
        self.said: tuple[object, ...] = ()

    def clock(self, at_s: float) -> Instant:
        return self._began.plus_s(self._age_s + at_s * self._rate)

    def moment_s(self, instant: Instant) -> float:
        """When that was or will be, in the model's time."""
        return (candidate_age_s(self._began, instant) - self._age_s) / self._rate

    def change(self, **fields: Any) -> None:
        self.o = replace(self.o, **fields)

    def postgres(self, **fields: Any) -> None:
        self.o = replace(self.o, postgres=replace(self.o.postgres, **fields))

    def row(self, **fields: Any) -> None:
        if self.o.postgres.row is not None:
            self.postgres(row=replace(self.o.postgres.row, **fields))

    def dcs(self, **fields: Any) -> None:
        self.o = replace(self.o, dcs=replace(self.o.dcs, **fields))

    @property
    def writes(self) -> bool:
        row = self.o.postgres.row
        return self.up and self.o.postgres.alive and row is not None and not row.in_recovery


class World:
    """All nodes and the store. `run` lets time pass; `said`, `taken` and the rest tell what came of it."""

    def __init__(self, seen: Mapping[str, Seen], supposed: Supposed) -> None:
        self.supposed = supposed
        self.at_s = 0.0
        self.said: list[Said] = []
        self.taken: list[tuple[float, str]] = []            # who acquired the lock, and when
        self.promoted: list[tuple[float, str]] = []
        self.demoted: list[tuple[float, str, str]] = []     # why, too
        self.refused: dict[str, tuple[Reason, ...]] = {}    # what last kept each from taking the lock, while it was free
        self.failsafe_rounds: list[tuple[float, str, dict[str, str]]] = []
        self.passes = 0
        self._sequence = 0
        self._queue: list[tuple[float, int, str, str]] = []
        self.nodes = {name: Node(one, self._rate(name)) for name, one in sorted(seen.items())}
        self.store_up = True
        self.view = self._newest_view()
        self._lock_since_s = self._last_renewal_s()
        for hypothesis in supposed.hypotheses:
            self._suppose(hypothesis)
        if supposed.most in self.nodes:
            self._got_more(self.nodes[supposed.most])
        self._show_lag()
        for node in self.nodes.values():
            self._settle_in(node)
        for node in self.nodes.values():        # what it answers to whoever asks before its first pass here
            node.decision = decide(node.o, node.memory) if node.up else None

    def _rate(self, name: str) -> float:
        drift = self.supposed.drift
        return 1.0 if not self.supposed.first else 1 + drift if name == self.supposed.first else 1 - drift

    # --- how it is now -----------------------------------------------------------------------------------------------------

    def _newest_view(self) -> ClusterView:
        """The store as the latest word of anybody has it."""
        views = [n.o.dcs.view for n in self.nodes.values() if n.o.dcs.view is not None]
        view = max(views, key=lambda v: v.revision, default=ClusterView())
        for node in self.nodes.values():
            licence = node.o.licence
            if licence.state is LicenceState.HELD and licence.revision > view.lock_revision and view.lock is not None and view.lock.node_id == node.o.me.node_id:
                # It has renewed since, which is no news that wakes a loop.
                record = replace(view.lock, sequence=licence.sequence, ttl_s=licence.ttl_s, mode=licence.mode)
                view = replace(view, lock=record, lock_revision=licence.revision, lock_value=b"renewed", revision=max(view.revision, licence.revision))
        return view

    def _last_renewal_s(self) -> float:
        """When the record that stands was written, or first seen by anybody."""
        known = []
        for node in self.nodes.values():
            seen, licence = node.o.dcs.lock_seen, node.o.licence
            if licence.state is LicenceState.HELD and licence.since is not None and licence.revision == self.view.lock_revision:
                known.append(node.moment_s(licence.since))
            if seen.revision == self.view.lock_revision and seen.since is not None:
                known.append(node.moment_s(seen.since))
        return min(known, default=0.0)

    def _settle_in(self, node: Node) -> None:
        """Everybody who reaches the store has the newest view; timers go on from when each first saw the record."""
        if not node.up:
            return
        seen, view = node.o.dcs.lock_seen, self.view
        if node.hears and self.store_up:
            since = seen.since if seen.revision == view.lock_revision else node.clock(self._lock_since_s)
            node.dcs(view=view, lock_seen=LockSeen(record=view.lock, revision=view.lock_revision, value=view.lock_value, since=since,
                                                   absent_since=seen.absent_since if view.lock is None else None))
        elif node.hears:
            node.dcs(unreachable_since=node.clock(0.0), why="it is supposed to be down")
        operation = node.o.operation
        if operation is not None and (operation.kind in TAKES_S or self.supposed.done == node.name):
            node.ends_s = TAKES_S.get(operation.kind, DONE_S)
            self._later(node.ends_s, "ends", node.name)
        licence = node.o.licence
        if licence.state is LicenceState.HELD and licence.since is not None:
            self._plan_renewal(node)
        self._wake(node, 0.0)

    # --- what is supposed --------------------------------------------------------------------------------------------------

    def _suppose(self, hypothesis: Hypothesis) -> None:
        if hypothesis.what == "lag":
            return          # _show_lag: all of them at once
        if not hypothesis.node:
            self.store_up = False
            return
        node = self.nodes.get(hypothesis.node)
        if node is not None:
            node.up = False
        for other in self.nodes.values():
            row = other.o.postgres.row
            if row is not None and row.replication:
                other.row(replication=tuple(line for line in row.replication if line.get("application_name") != hypothesis.node))
        member = self.view.members.get(hypothesis.node)
        if member is not None and member.lease:
            ttl_s = next((n.o.settings.ttl_s for n in self.nodes.values()), 30.0)
            self._later(ttl_s, "vanishes", hypothesis.node)
        if self.view.leader_lease and self.view.leader == hypothesis.node:
            # Of a member that does not tell when it renewed last: just now.
            renewed_s = self._lock_since_s if hypothesis.node in self.nodes else 0.0
            self._later(max(0.0, renewed_s + next((n.o.settings.ttl_s for n in self.nodes.values()), 30.0)), "lease", hypothesis.node)

    def holds(self, node: Node) -> bool:
        """A licence that has not run out."""
        licence = node.o.licence
        return licence.state is LicenceState.HELD and licence.valid_until is not None and remaining_s(licence.valid_until, node.clock(self.at_s)) > 0

    def outsider(self) -> str:
        """Who leads by the leased key alone, and does not tell what it sees: a member of another make. "" nobody."""
        view = self.view
        down = any(h.what == "down" and h.node == view.leader for h in self.supposed.hypotheses)
        return view.leader if view.leader_lease and view.leader not in self.nodes and not down else ""

    def leader(self) -> Node | None:
        """Who holds a licence now."""
        return next((n for n in self.nodes.values() if n.up and self.holds(n)), None)

    def holder(self) -> Node | None:
        """Whose record stands, down or not."""
        lock = self.view.lock
        return next((n for n in self.nodes.values() if lock is not None and n.o.me.node_id == lock.node_id), None)

    def _show_lag(self) -> None:
        """So much was written since, and everybody has it but those who are supposed to lag: they stay where they are, and
        nobody's position goes below a point where a timeline was left."""
        lags = {h.node: h.lag_bytes for h in self.supposed.hypotheses if h.what == "lag"}
        if not lags:
            return
        holder = self.holder()
        behind = {name: self._lag_of(name) for name in lags}
        more = max((lags[name] - behind[name] for name in lags), default=0)
        base = holder.o.postgres.row.position if holder is not None and holder.o.postgres.row is not None else self.view.published_position.lsn
        end = base + max(0, more)
        places = {name: end - lag for name, lag in lags.items()}
        for node in self.nodes.values():
            row = node.o.postgres.row
            if row is None:
                continue
            if node.name in places:
                node.row(received_lsn=places[node.name], replayed_lsn=min(row.replayed_lsn, places[node.name]))
            elif row.in_recovery:
                node.row(received_lsn=row.position + max(0, more), replayed_lsn=row.replayed_lsn + max(0, more))
            else:
                node.row(lsn=row.lsn + max(0, more), replication=tuple(
                    {**line, **{key: places.get(str(line.get("application_name")), int(line.get(key) or 0) + max(0, more)) for key in ("sent_lsn", "write_lsn", "flush_lsn", "replay_lsn")}}
                    for line in row.replication))
        members = {name: replace(m, xlog_location=places.get(name, m.lsn + max(0, more)), receive_lsn=0, replay_lsn=0) if m.lsn else m for name, m in self.view.members.items()}
        status = self.view.status
        self.view = replace(self.view, members=members, status=replace(status, optime=max(status.optime, end), raw={**status.raw, "optime": max(status.optime, end)}))

    def _lag_of(self, name: str) -> int:
        node, holder = self.nodes.get(name), self.holder()
        row = node.o.postgres.row if node is not None else None
        end = holder.o.postgres.row.position if holder is not None and holder.o.postgres.row is not None else self.view.published_position.lsn
        return max(0, end - row.position) if row is not None else 0

    def _got_more(self, node: Node) -> None:
        row, holder = node.o.postgres.row, self.holder()
        if row is None or not row.in_recovery:
            return
        last = holder.o.postgres.row.position if holder is not None and holder.o.postgres.row is not None else 0
        node.row(received_lsn=max(last, row.position) + MORE_BYTES)

    # --- time --------------------------------------------------------------------------------------------------------------

    def _later(self, at_s: float, what: str, name: str) -> None:
        self._sequence += 1
        heapq.heappush(self._queue, (at_s, self._sequence, what, name))

    def _wake(self, node: Node, at_s: float) -> None:
        if node.name == self.supposed.late:
            at_s = max(at_s, LATE_S)
        if node.up and (at_s < node.next_s or node.next_s <= self.at_s):
            node.next_s = max(at_s, self.at_s)
            self._later(node.next_s, "pass", node.name)

    def _wake_all(self) -> None:
        for node in self.nodes.values():
            self._wake(node, self.at_s + self._short_s(node))

    def _short_s(self, node: Node) -> float:
        return SHORT_S / 10 if node.name == self.supposed.quick else SHORT_S

    def run(self, until_s: float, *, stop: Any = None) -> None:
        """Up to that moment, or until `stop()` says that it is known what comes."""
        while self._queue and self.passes < PASSES_AT_MOST:
            if self._queue[0][0] > until_s or (stop is not None and stop()):
                break
            self.at_s, _, what, name = heapq.heappop(self._queue)
            if what == "vanishes":
                self._vanishes(name)
                continue
            if what == "lease":
                self._write(leader="", leader_lease=0, revisions={**self.view.revisions, "leader": 0})
                self._wake_all()
                continue
            node = self.nodes[name]
            if not node.up:
                continue
            if what == "pass" and node.next_s == self.at_s:
                self._pass(node)
            elif what == "ends" and node.ends_s == self.at_s:
                fails = self.supposed.fails == name and node.o.operation is not None and node.o.operation.kind == "StartPrimary"
                self._operation_ends(node, ok=not fails, why="it is supposed to fail" if fails else "")
            elif what == "renew" and node.renews_s == self.at_s:
                self._renew(node)
            elif what == "round" and node.round_s == self.at_s:
                self._round(node)

    def _vanishes(self, name: str) -> None:
        if self.store_up and name in self.view.members:
            self._write(members={n: m for n, m in self.view.members.items() if n != name})
            self._wake_all()

    # --- one pass ----------------------------------------------------------------------------------------------------------

    def _pass(self, node: Node) -> None:
        self.passes += 1
        node.next_s = float("inf")
        now = node.clock(self.at_s)
        self._look(node, now)
        decision = decide(node.o, node.memory)
        before, node.decision, node.memory = node.decision, decision, decision.memory
        if (what := _what_is_said(decision)) != node.said:
            node.said = what
            self.said.append(Said(at_s=self.at_s, node=node.name, decision=decision))
        if decision.situation == "leaderless":
            self.refused[node.name] = tuple(r for r in decision.reasons if not r.holds and r.rule not in PASSING)
        self._plan_round(node, decision.failsafe)
        if decision.ask_peers.names:
            self._ask(node, decision.ask_peers)
        else:
            node.silent_since.clear()
            if node.o.peers:
                node.change(peers={})
        for asker in self.nodes.values():       # whoever waits for this node's vote sees that it has changed
            if asker is not node and asker.up and asker.decision is not None and node.name in asker.decision.ask_peers.names and _vote_differs(before, decision):
                self._ask(asker, asker.decision.ask_peers)
        self._wake(node, self.at_s + min(3600.0, max(SHORT_S, decision.wake_in_s)))
        for action in decision.actions:
            if isinstance(action, LongAction):
                self._begin(node, action)
                break
            if not self._quick(node, action):
                self._wake(node, self.at_s + 0.1)
                break

    def _look(self, node: Node, now: Instant) -> None:
        """The facts are as new as a pass likes them."""
        o = node.o
        node.o = o = replace(o, now=now, number=o.number + 1, wall_s=o.wall_s + max(0.0, candidate_age_s(o.now, now)))
        if o.postgres.alive and o.postgres.answer == "sql" and o.postgres.row is not None:
            node.postgres(row_at=now, answered_at=now)
        if node.hears and self.store_up:
            node.dcs(heard_at=now)
        record, promise = o.dcs.lock_seen.record, o.failsafe.promise
        if promise is not None and promise.is_superseded_by(record):
            node.change(failsafe=replace(o.failsafe, promise=None))
        if node.decision is not None and node.decision.ask_peers.names:
            self._ask(node, node.decision.ask_peers, wake=False)

    def _ask(self, node: Node, question: PeerQuestion, *, wake: bool = True) -> None:
        now = node.clock(self.at_s)
        answers = {}
        for name in question.names:
            answer = self._answer(name, now, question.epoch)
            if answer.answered:
                node.silent_since.pop(name, None)
            else:
                answer = replace(answer, silent_since=node.silent_since.setdefault(name, now))
            answers[name] = answer
        changed = {n: _shape(p) for n, p in answers.items()} != {n: _shape(p) for n, p in node.o.peers.items()}
        node.change(peers=answers)
        if wake and changed:
            self._wake(node, self.at_s + self._short_s(node))

    def _answer(self, name: str, now: Instant, epoch: int) -> Peer:
        """GET /pgha/vote, as rest/routes.py answers it and observe/peers.py reads it."""
        node = self.nodes.get(name)
        if node is None or not node.up or node.decision is None:
            return Peer(name=name, asked_at=now, answered=False, why="it is down, or is taken to be")
        seen, decision = node.o, node.decision
        if epoch >= 0 and decision.vote.epoch < epoch and seen.dcs.view is not None and epoch >= seen.dcs.view.epoch.number and node.epoch_asked != epoch:
            node.epoch_asked = epoch
            self._wake(node, self.at_s + SHORT_S)
        return vote_as_told(name, now, seen, decision)

    # --- the store ---------------------------------------------------------------------------------------------------------

    def _reaches(self, node: Node) -> bool:
        return node.hears and self.store_up

    def _write(self, **fields: Any) -> int:
        """A new revision of the view, seen by everybody who reaches the store."""
        revision = self.view.revision + 1
        self.view = replace(self.view, revision=revision, **fields)
        for node in self.nodes.values():
            if node.up and self._reaches(node):
                seen = node.o.dcs.lock_seen
                if seen.revision != self.view.lock_revision:
                    seen = LockSeen(record=self.view.lock, revision=self.view.lock_revision, value=self.view.lock_value, since=node.clock(self.at_s))
                node.dcs(view=self.view, lock_seen=seen)
        return revision

    def _write_lock(self, record: LockRecord, **fields: Any) -> int:
        revision = self.view.revision + 1
        return self._write(lock=record, lock_revision=revision, lock_value=b"%d" % revision, **fields)

    def _plan_renewal(self, node: Node) -> None:
        since, settings = node.o.licence.since, node.o.settings
        assert since is not None
        node.renews_s = max(self.at_s, node.moment_s(since) + min(settings.loop_wait_s, settings.ttl_s / 3))
        self._later(node.renews_s, "renew", node.name)

    def _renew(self, node: Node) -> None:
        node.renews_s = float("inf")
        if not self.holds(node):
            return
        licence, now = node.o.licence, node.clock(self.at_s)
        mandate = node.decision.mandate.until if node.decision is not None else NEVER
        if not self._reaches(node):
            if licence.failing_since is None:
                node.change(licence=replace(licence, failing_since=now, failing_why="the store does not answer"))
                self._plan_round(node, node.decision.failsafe if node.decision is not None else None)
                self._wake(node, self.at_s)
            return
        if self.view.lock is None or self.view.lock.incarnation != node.o.me.incarnation or mandate is None or remaining_s(mandate, now) <= 0:
            return
        row = node.o.postgres.row
        record = replace(self.view.lock, sequence=licence.sequence + 1, ttl_s=node.o.settings.ttl_s,
                         lsn=row.position if row is not None else self.view.lock.lsn, timeline=row.timeline if row is not None else self.view.lock.timeline)
        revision = self._write_lock(record)
        node.change(licence=replace(licence, sequence=record.sequence, since=now, ttl_s=record.ttl_s, revision=revision, failing_since=None, failing_why="", by_failsafe=False,
                                    valid_until=NEVER if licence.endless else licensed_until(record, now)))
        self._plan_renewal(node)

    def _acquire(self, node: Node, action: AcquireLock) -> bool:
        if not self._reaches(node):
            return False
        now, view, promise = node.clock(self.at_s), self.view, node.o.failsafe.promise
        self._read(node)
        unchanged = all(view.revision_of(key) == revision for key, revision in action.also_unchanged.items())
        if view.lock_revision != action.lock_revision or view.revision_of("pgha/epoch") != action.epoch_revision or not unchanged:
            return False
        if promise is not None and promise.binds(view.lock, now):
            return False
        settings, me = node.o.settings, node.o.me
        record = LockRecord(holder=me.name, node_id=me.node_id, incarnation=me.incarnation, sequence=node.o.licence.sequence + 1, ttl_s=settings.ttl_s,
                            mode="paused" if action.paused else "held", mixed=action.mixed, lsn=action.lsn, timeline=action.timeline)
        number = action.epoch_number if action.readopt else action.epoch_number + 1
        epoch = view.epoch if action.readopt else Epoch(number=number, holder=me.name, incarnation=me.incarnation, timeline=action.claim_timeline, claims=action.claims)
        revisions = view.revisions if action.readopt else {**view.revisions, "pgha/epoch": view.revision + 1, "leader": view.revision + 1}
        initialize = action.initialize_value if action.initialize_revision is not None else view.initialize
        lease = 1 if action.mixed and not action.paused else 0
        revision = self._write_lock(record, epoch=epoch, revisions=revisions, leader=me.name, leader_lease=lease, initialize=initialize)
        node.change(licence=Licence(
            state=LicenceState.HELD, sequence=record.sequence, ttl_s=record.ttl_s, since=now, valid_until=licensed_until(record, now), mixed=action.mixed,
            leader_revision=revision if action.mixed else 0, revision=revision, epoch=number, epoch_revision=action.epoch_revision if action.readopt else revision, mode=record.mode, acquired_pass=node.o.number))
        self._plan_renewal(node)
        self.taken.append((self.at_s, node.name))
        self._note_losers(node)
        self._wake_all()
        return True

    def _note_losers(self, winner: Node) -> None:
        """What spoke against the others at this moment, by the votes that there are now."""
        for node in self.nodes.values():
            election = node.memory.election
            if node is winner or not node.up or election is None or node.decision is None:
                continue
            now = node.clock(self.at_s)
            o = replace(node.o, now=now, peers={name: self._answer(name, now, -1) for name in node.decision.ask_peers.names})
            asked = (*promotion.conditions(o, node.memory), *promotion.peer_conditions(o, election))
            self.refused[node.name] = tuple(r for r in asked if not r.holds and r.rule not in PASSING)

    def _release(self, node: Node, lsn: int, timeline: int) -> bool:
        licence = node.o.licence
        if licence.state is not LicenceState.HELD or self.view.lock is None:
            return False
        released = self._reaches(node) and self.view.lock.incarnation == node.o.me.incarnation
        if released:
            gone = {"leader": "", "leader_lease": 0, "revisions": {**self.view.revisions, "leader": 0}} if self.view.lock.mixed else {}
            self._write_lock(replace(self.view.lock, sequence=licence.sequence + 1, mode="released", lsn=lsn, timeline=timeline), **gone)
            self._wake_all()
        node.change(licence=replace(licence, state=LicenceState.RELEASING, valid_until=node.clock(self.at_s)))
        return released

    def _read(self, node: Node) -> None:
        now, seen = node.clock(self.at_s), node.o.dcs.lock_seen
        if self.view.lock is None and seen.absent_since is None:
            seen = replace(seen, absent_since=now)
        node.dcs(view=self.view, lock_seen=seen, read_at=now, heard_at=now)

    def _write_key(self, node: Node, action: WriteKey) -> bool:
        view = self.view
        if not self._reaches(node) or view.revision_of(action.key) != action.if_revision:
            return False
        if action.epoch_revision is not None and action.epoch_revision != view.revision_of("pgha/epoch"):
            return False
        revision = view.revision + 1
        path = _KEYS.path(action.key)
        entries = {} if action.value is None else {path: Entry(key=path, value=action.value, revision=revision)}
        read = parse(Snapshot(revision=revision, entries=entries, generation=Generation()), _KEYS)
        fields = {key: getattr(read, key) for key in ("config", "status", "failover", "sync", "history", "failsafe") if key == action.key}
        self._write(revisions={**view.revisions, action.key: revision if action.value is not None else 0}, **fields)
        if action.key == "sync":
            for other in self.nodes.values():       # what it said before the store went back counts until it is written again
                if self._reaches(other):
                    other.dcs(remembered_sync=None)
        if action.key != "status":
            self._wake_all()
        return True

    # --- quick actions -----------------------------------------------------------------------------------------------------

    def _quick(self, node: Node, action: Action) -> bool:
        """Whether it was possible."""
        row = node.o.postgres.row
        match action:
            case ReadCluster():
                if not self._reaches(node):
                    return False
                self._read(node)
                self._wake(node, self.at_s + self._short_s(node))
            case AcquireLock():
                return self._acquire(node, action)
            case WriteKey():
                return self._write_key(node, action)
            case WriteInitialize():
                if not self._reaches(node):
                    return False
                self._write(initialize=action.value, revisions={**self.view.revisions, "initialize": self.view.revision + 1})
            case ReleaseLock() | StandDown():
                self._release(node, action.lsn, action.timeline)
            case Freeze():
                node.row(primary_conninfo="", restore_command="", receiver=None)
                node.change(configured_upstream="")
                self._wake(node, self.at_s + 0.06)
            case Follow():
                self._follow(node, action)
            case MaintainSlots() if row is not None:
                kept = tuple(s for s in row.slots if s.name not in action.drop)
                node.row(slots=(*kept, *(Slot(name=name, restart_lsn=row.position) for name in action.create)))
            case RestoreStandbySignal():
                node.change(directory=replace(node.o.directory, standby_signal=True))
            case AnswerRequest():
                node.change(requests=tuple(r for r in node.o.requests if r.id != action.id))
            case ApplyConfiguration():
                node.change(settings=replace(node.o.settings, configuration_changed=False))
            case SetSynchronousNames():
                self._set_names(node, action.names)
            case CancelOperation():
                self._operation_ends(node, ok=False, why=action.why)
            case _:
                pass
        return True

    def _follow(self, node: Node, action: Follow) -> None:
        upstream, source = action.upstream, self.nodes.get(action.upstream.name) if action.upstream is not None else None
        receiver = None
        if upstream is not None and source is not None and source.up and source.o.postgres.row is not None:
            receiver = WalReceiver(status="streaming", sender_host=upstream.host, sender_port=upstream.port, slot_name=action.slot_name, timeline=source.o.postgres.row.timeline)
        conninfo = f"host={upstream.host} port={upstream.port}" if upstream is not None else ""
        node.row(primary_conninfo=conninfo, primary_slot_name=action.slot_name, receiver=receiver)
        node.change(configured_upstream=upstream.name if upstream is not None else "")
        self._wake(node, self.at_s + 0.05)

    def _set_names(self, node: Node, names: str | None) -> None:
        node.change(written_names=WrittenNames(told=True, names=names))
        row = node.o.postgres.row
        if row is not None:
            wanted = parse_requirement(names or "")
            lines = tuple({**line, "sync_priority": int(wanted.anybody or str(line.get("application_name") or "").lower() in wanted.names)} for line in row.replication)
            node.row(synchronous_standby_names=names or "", replication=lines)
        self._wake(node, self.at_s + 0.1)

    # --- operations --------------------------------------------------------------------------------------------------------

    def _begin(self, node: Node, action: LongAction) -> None:
        kind = type(action).__name__
        last = max((op.id for op in (node.o.operation, node.o.ended) if op is not None), default=0)
        node.change(operation=Operation(kind=kind, id=max(last, node.memory.last_ended_id) + 1, started_at=node.clock(self.at_s), detail=getattr(action, "why", "")))
        node.action = action
        if isinstance(action, Demote):
            self.demoted.append((self.at_s, node.name, action.why))
        node.ends_s = self.at_s + TAKES_S.get(kind, float("inf"))
        if node.ends_s < float("inf"):
            self._later(node.ends_s, "ends", node.name)
        self._wake(node, self.at_s + SHORT_S)

    def _operation_ends(self, node: Node, *, ok: bool = True, why: str = "") -> None:
        operation, action, now = node.o.operation, node.action, node.clock(self.at_s)
        node.action, node.ends_s = None, float("inf")
        if operation is None:
            return
        facts = self._effect(node, operation.kind, action, now) if ok else {}
        ended = replace(operation, ended_at=now, ok=ok, why=why, facts=facts)
        node.change(operation=None, ended=ended)
        self._wake(node, self.at_s)

    def _effect(self, node: Node, kind: str, action: LongAction | None, now: Instant) -> dict[str, Any]:
        """`action` None: it had begun before the question, and only its kind is known."""
        row = node.o.postgres.row
        match kind:
            case "Promote" if row is not None:
                timeline = action.timeline if isinstance(action, Promote) else self.view.epoch.timeline
                own = node.o.directory.history_on(row.timeline) or ()
                history = (*own, HistoryRow(timeline=row.timeline, switch_lsn=row.position))
                node.row(in_recovery=False, lsn=row.position, timeline=timeline, received_lsn=0, replayed_lsn=0, receiver=None, replication=())
                node.change(directory=replace(node.o.directory, history=history, history_of=timeline))
                self._tell_role(node, "primary", timeline)
                self.promoted.append((self.at_s, node.name))
                return {"timeline": timeline, "lsn": row.position}
            case "PrePromote":
                return {"agrees": self.supposed.vetoes != node.name, "epoch": self.view.epoch.number, "said": "it is supposed to refuse"}
            case "Demote" | "Stop":
                released = self._stopped(node, now, release=kind == "Demote" and (not isinstance(action, Demote) or action.release))
                return {"released": released}
            case "StartStandby" | "StartPrimary" | "Restart":
                primary = kind == "StartPrimary" or (kind == "Restart" and isinstance(action, Restart) and action.as_primary)
                self._started(node, now, primary=primary, upstream=action if isinstance(action, StartStandby | Restart) else None)
                if primary:
                    if isinstance(action, StartPrimary | Restart):
                        self._set_names(node, action.synchronous_names)
                    self.promoted.append((self.at_s, node.name))
            case "InspectUpstream" if isinstance(action, InspectUpstream):
                self._inspected(node, action, now)
            case "InspectEndOfWal":
                lsn, timeline = self._end_of(node)
                node.change(directory=replace(node.o.directory, end_of_wal=lsn, end_of_wal_timeline=timeline))
            case "Clone" | "Rewind" | "Bootstrap":
                self._copied(node)
            case _:
                node.postgres(orphans=False)
        return {}

    def _copied(self, node: Node) -> None:
        """It has what the leader had, or else anybody."""
        holder = self.holder()
        sources = [n for n in (holder, *self.nodes.values()) if n is not None and n is not node and n.o.postgres.row is not None and n.o.directory.control is not None]
        if not sources:
            return
        row, directory = sources[0].o.postgres.row, sources[0].o.directory
        assert row is not None
        assert directory.control is not None
        control = replace(directory.control, state="in archive recovery", timeline=row.timeline, checkpoint_lsn=row.position, min_recovery_lsn=row.position, min_recovery_timeline=row.timeline)
        node.change(directory=replace(directory, state="valid", control=control, standby_signal=True, end_of_wal=0, rewind_interrupted=False), upstream=None)

    def _end_of(self, node: Node) -> tuple[int, int]:
        control, lock = node.o.directory.control, self.view.lock
        if node.o.directory.end_of_wal:
            return node.o.directory.end_of_wal, node.o.directory.end_of_wal_timeline
        known = [(p.lsn, p.timeline) for p in [node.o.dcs.last_positions.get(node.name)] if p is not None]
        known += [(lock.lsn, lock.timeline)] if lock is not None and lock.node_id == node.o.me.node_id else []
        known += [(max(control.checkpoint_lsn, control.min_recovery_lsn), max(control.timeline, control.min_recovery_timeline))] if control is not None else []
        return max(known, default=(0, 0))

    def _stopped(self, node: Node, now: Instant, *, release: bool) -> bool:
        row, directory = node.o.postgres.row, node.o.directory
        lsn, timeline = (row.position, row.timeline) if row is not None else self._end_of(node)
        was = "shut down" if row is not None and not row.in_recovery else "shut down in recovery"
        control = replace(directory.control, state=was, timeline=timeline, checkpoint_lsn=lsn, min_recovery_lsn=lsn if "recovery" in was else 0,
                          min_recovery_timeline=timeline if "recovery" in was else 0) if directory.control is not None else None
        node.change(directory=replace(directory, control=control, standby_signal=True, end_of_wal=0), guard=replace(node.o.guard, state="standby"),
                    postgres=PostgresFacts(process="absent", since=now, ever_started=True))
        self._tell_role(node, "replica", timeline)
        return release and self._release(node, lsn, timeline)

    def _started(self, node: Node, now: Instant, *, primary: bool, upstream: StartStandby | Restart | None) -> None:
        lsn, timeline = self._end_of(node)
        old = node.o.postgres.row
        if old is not None:
            lsn, timeline = old.position, old.timeline
        control = node.o.directory.control
        row = Row(in_recovery=not primary, timeline=timeline, lsn=lsn if primary else 0, received_lsn=0 if primary else lsn, replayed_lsn=0 if primary else lsn,
                  system_identifier=control.system_identifier if control is not None else "", started_at_s=node.o.wall_s)
        node.change(postgres=PostgresFacts(process="running", since=now, ever_started=True, answer="sql", answered_at=now, row=row, row_at=now, pid=1))
        source = upstream.upstream if upstream is not None else None
        if source is not None and not primary:
            self._follow(node, Follow(upstream=source, slot_name=upstream.slot_name if upstream is not None else ""))
        self._tell_role(node, "primary" if primary else "replica", timeline)

    def _inspected(self, node: Node, action: InspectUpstream, now: Instant) -> None:
        source = self.nodes.get(action.source.name)
        row = source.o.postgres.row if source is not None and source.up else None
        if source is None or row is None:
            down = any(h.what == "down" and h.node == action.source.name for h in self.supposed.hypotheses)
            upstream = Upstream(name=action.source.name, asked_at=now, ok=False, unreached=down, why="does not answer")
        else:
            upstream = Upstream(name=source.name, asked_at=now, ok=True, system_identifier=row.system_identifier, timeline=row.timeline, lsn=row.position,
                                in_recovery=row.in_recovery, history=source.o.directory.history_on(row.timeline) or ())
        node.change(upstream=upstream)

    def _tell_role(self, node: Node, role: str, timeline: int) -> None:
        """Its member key, as the others read it."""
        member = self.view.members.get(node.name)
        if member is not None and self._reaches(node):
            self._write(members={**self.view.members, node.name: replace(member, role=role, timeline=timeline, state="running" if node.o.postgres.alive else "stopped")})

    # --- failsafe ----------------------------------------------------------------------------------------------------------

    def _plan_round(self, node: Node, order: FailsafeOrder | None) -> None:
        licence = node.o.licence
        if order is None or licence.failing_since is None or not self.holds(node) or licence.endless or node.round_s < float("inf"):
            return
        assert licence.since is not None
        assert licence.valid_until is not None
        limit: Deadline = demote_at(licence.valid_until, licence.ttl_s, since=licence.since, loop_wait_s=node.o.settings.loop_wait_s)
        node.round_s = max(self.at_s, node.moment_s(limit) - min(5.0, 0.3 * licence.ttl_s))
        self._later(node.round_s, "round", node.name)

    def _round(self, node: Node) -> None:
        """All who might take over are asked not to (lock/failsafe.py). Who did not answer the question that is asked here
        does not answer that one, either."""
        node.round_s = float("inf")
        order, licence, now = node.decision.failsafe if node.decision is not None else None, node.o.licence, node.clock(self.at_s)
        if order is None or not self.holds(node) or licence.failing_since is None:
            return
        missing = {name: why for name in order.members if (why := self._refuses_to_promise(name, node))}
        self.failsafe_rounds.append((self.at_s, node.name, missing))
        if missing:
            node.change(failsafe=replace(node.o.failsafe, missing=missing))
            return
        sequence = licence.sequence + 1
        for name in order.members:
            peer = self.nodes[name]
            promise = Promise(name=node.name, accepted_at=peer.clock(self.at_s), ttl_s=licence.ttl_s, incarnation=node.o.me.incarnation, epoch=licence.epoch, sequence=sequence)
            peer.change(failsafe=replace(peer.o.failsafe, promise=promise))
            self._wake(peer, self.at_s + SHORT_S)
        node.change(licence=replace(licence, sequence=sequence, since=now, valid_until=now.plus_s(licence_s(licence.ttl_s)), by_failsafe=True),
                    failsafe=replace(node.o.failsafe, missing={}))
        self._wake(node, self.at_s + SHORT_S)

    def _refuses_to_promise(self, name: str, leader: Node) -> str:
        node = self.nodes.get(name)
        if node is None or not node.up:
            return "no answer"
        if not node.o.settings.failsafe_mode:
            return "failsafe mode is off there"
        epoch = node.o.dcs.view.epoch.number if node.o.dcs.view is not None else 0
        if max(epoch, node.o.licence.epoch) > leader.o.licence.epoch or self.holds(node) or node.writes:
            return "it knows of a later leader"
        return ""


def _shape(peer: Peer) -> tuple[object, ...]:
    return (peer.answered, peer.in_recovery, peer.timeline, peer.lsn, peer.frozen_epoch, peer.running, peer.candidate, peer.watchdog_failed)


#: What fails for a moment in every election: no obstacle.
PASSING = frozenset({"restart.read_in_this_pass", "leaderless.position_is_final"})


def _what_is_said(decision: Decision) -> tuple[object, ...]:
    return (decision.situation, *(type(a).__name__ for a in decision.actions if isinstance(a, LongAction | AcquireLock | Freeze)),
            *(r.rule for r in decision.reasons if not r.holds and r.rule not in PASSING))


def _vote_differs(before: Decision | None, after: Decision) -> bool:
    return before is None or before.vote != after.vote or before.state != after.state or before.role != after.role


def vote_as_told(name: str, asked_at: Instant, seen: Observation, decision: Decision) -> Peer:
    """What a member that decided this says to GET /pgha/vote, as rest/routes.py answers it and observe/peers.py reads it."""
    row, control, vote = seen.postgres.row, seen.directory.control, decision.vote
    answered = row is not None and seen.postgres.answer == "sql"
    role = decision.role or "uninitialized"
    if answered and row is not None:
        role = "replica" if row.in_recovery else "primary"
    state = decision.state or ("running" if answered else "unknown")
    if state == "running" and not answered:
        state = "unknown"
    return Peer(name=name, asked_at=asked_at, answered=True, is_pgha=True,
                in_recovery=None if state not in ("running", "unknown") or role not in ("primary", "replica") else role == "replica",
                timeline=vote.timeline, lsn=vote.lsn, frozen_epoch=vote.epoch, running=state == "running", candidate=vote.candidate, tags=seen.settings.tags,
                watchdog_failed=seen.watchdog.failed, system_identifier=(row.system_identifier if row else "") or (control.system_identifier if control else ""),
                history=vote.history)
