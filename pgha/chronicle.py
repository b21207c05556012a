"""What has happened between this pass and the one before? The one place where events come from.

Compared is what the loop knows anyway: the observation, the decision, what was published. Nothing is asked, nothing waits.
At the first pass the members are taken as they are; everything else is told from the beginning.

Rules of this file: what others wrote (names, configuration, reasons) goes out bounded and without secrets.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from pgha import __version__
from pgha.clock import Instant, candidate_age_s, holder_age_s, remaining_s
from pgha.events import EventLog
from pgha.log import scrub
from pgha.model.cluster import ClusterView
from pgha.model.decision import Decision
from pgha.model.event import (
    AgentEvent,
    Changed,
    ConfigurationEvent,
    DecisionEvent,
    Event,
    LagEvent,
    LockEvent,
    MemberEvent,
    OperationEvent,
    RoleEvent,
)
from pgha.model.lock import LicenceState
from pgha.model.observation import Observation, Operation
from pgha.rest.health import leader_position
from pgha.rest.published import Published
from pgha.rest.redaction import is_secret, redact

#: of a text, a list of reasons, changed keys, members: no more is told
LONGEST_TEXT = 500
LONGEST_READ = 8192
MOST_REASONS = 40
MOST_KEYS = 50
MOST_MEMBERS = 200
LONGEST_VALUE = 200
#: between two events of one operation's progress
PROGRESS_EVERY_S = 1.0
#: a limit smaller than this would be crossed by every write
SMALLEST_LAG_LIMIT_BYTES = 64 << 10
#: no renewal for two intervals and this: it is late
LATE_S = 0.5


class Chronicle:
    """Remembers what it needs of the last pass."""

    def __init__(self, log: EventLog) -> None:
        self._log = log
        self._begun = False
        self._stopping = False
        self._role = ("", "")
        self._held = False
        self._renewed: tuple[int, Instant] | None = None    # sequence and beginning of the last renewal
        self._late = False
        self._holder: tuple[str, str] | None = None
        self._over: set[str] = set()
        self._operation: Operation | None = None
        self._progress_at: Instant | None = None
        self._ended_id = 0
        self._config_revision: int | None = None
        self._config: dict[str, Any] = {}
        self._view: ClusterView | None = None
        self._members: dict[str, tuple[str, str, int]] | None = None

    def tell(self, seen: Observation, decision: Decision, published: Published, *, news: bool) -> None:
        """`news`: this decision is another than the last that was told."""
        for event in self._events(seen, decision, published, news=news):
            self._log.add(event, wall_s=seen.wall_s)

    def _events(self, seen: Observation, decision: Decision, published: Published, *, news: bool) -> Iterator[Event]:
        if not self._begun:
            self._begun = True
            yield AgentEvent(what="started", version=__version__)
        if seen.shutting_down and not self._stopping:
            self._stopping = True
            yield AgentEvent(what="stopping", version=__version__)
        if news:
            reasons = tuple(type(r)(rule=r.rule, holds=r.holds, because=_text(r.because)) for r in decision.reasons[:MOST_REASONS])
            yield DecisionEvent(situation=decision.situation, summary=_text(decision.summary), paused=decision.paused, reasons=reasons)
        yield from self._operations(seen)
        yield from self._own_lock(seen)
        yield from self._holders(seen, published)
        yield from self._roles(published)
        view = seen.dcs.view
        if view is not None and view is not self._view:
            self._view = view
            yield from self._configuration(view)
            yield from self._membership(view)
        yield from self._lags(seen, published)

    def _roles(self, published: Published) -> Iterator[Event]:
        role = (_text(published.health.role), _text(published.health.state))
        if role != self._role:
            was, self._role = self._role, role
            yield RoleEvent(role=role[0], state=role[1], timeline=published.node.timeline, was_role=was[0], was_state=was[1])

    # --- the lock ------------------------------------------------------------------------------------------------------

    def _own_lock(self, seen: Observation) -> Iterator[Event]:
        licence, me = seen.licence, seen.me.name
        held = licence.state is LicenceState.HELD and licence.valid_until is not None and remaining_s(licence.valid_until, seen.now) > 0
        if held != self._held:
            self._held = held
            if held:
                yield LockEvent(what="taken", holder=me, epoch=licence.epoch)
            elif licence.state is LicenceState.RELEASING:
                yield LockEvent(what="released", holder=me, epoch=licence.epoch)
            else:
                why = licence.failing_why or ("its time is over" if licence.state is LicenceState.HELD else "")
                yield LockEvent(what="lost", holder=_text(licence.lost_to), was=me, epoch=licence.epoch, why=_text(why))
        if not held or licence.since is None or licence.endless:
            self._renewed, self._late = None, False
            return
        late_s = 2 * min(seen.settings.loop_wait_s, licence.ttl_s / 3) + LATE_S
        was, self._renewed = self._renewed, (licence.sequence, licence.since)
        if was is not None and licence.since > was[1]:
            took_s = holder_age_s(was[1], licence.since) / max(1, licence.sequence - was[0])
            if self._late or took_s > late_s:
                yield LockEvent(what="renewed", holder=me, epoch=licence.epoch, age_s=round(took_s, 3))
            self._late = False
        age_s = holder_age_s(licence.since, seen.now)
        if age_s > late_s and not self._late:
            self._late = True
            yield LockEvent(what="late", holder=me, epoch=licence.epoch, age_s=round(age_s, 3), why=_text(licence.failing_why))

    def _holders(self, seen: Observation, published: Published) -> Iterator[Event]:
        view = seen.dcs.view
        if view is None:
            return
        holder = (published.leader, view.lock.mode if view.lock is not None and published.leader else "")
        if holder != self._holder:
            was, self._holder = self._holder, holder
            why = "paused" if holder[1] == "paused" else ""
            yield LockEvent(what="holder", holder=_text(holder[0]), was=_text(was[0]) if was else "", epoch=view.epoch.number, why=why)

    # --- operations ----------------------------------------------------------------------------------------------------

    def _operations(self, seen: Observation) -> Iterator[Event]:
        ended, running, known = seen.ended, seen.operation, self._operation
        if ended is not None and ended.id != self._ended_id:
            self._ended_id = ended.id
            self._operation = known = None if known is not None and known.id <= ended.id else known
            took_s = candidate_age_s(ended.started_at, ended.ended_at or seen.now)
            yield OperationEvent(what="end", operation=ended.kind, number=ended.id, detail=_text(ended.detail), ok=ended.ok, why=_text(ended.why), took_s=round(took_s, 3))
        if running is None or running.id == self._ended_id:
            return
        if known is None or known.id != running.id:
            self._operation, self._progress_at = running, None
            yield OperationEvent(what="begin", operation=running.kind, number=running.id, detail=_text(running.detail))
        elif running.progress != known.progress and (self._progress_at is None or candidate_age_s(self._progress_at, seen.now) >= PROGRESS_EVERY_S):
            self._operation, self._progress_at = running, seen.now
            yield OperationEvent(what="progress", operation=running.kind, number=running.id, detail=_text(running.detail), progress=_text(running.progress))

    # --- what the store says -------------------------------------------------------------------------------------------

    def _configuration(self, view: ClusterView) -> Iterator[Event]:
        revision = view.revision_of("config")
        if revision == self._config_revision:
            return
        first, self._config_revision = self._config_revision is None, revision
        was, self._config = self._config, _flat(view.config or {})
        if first:
            return
        keys = sorted(key for key in was.keys() | self._config.keys() if was.get(key) != self._config.get(key))
        if keys:
            changed = tuple(Changed(key=_text(key), was=_value(key, was.get(key)), now=_value(key, self._config.get(key))) for key in keys[:MOST_KEYS])
            yield ConfigurationEvent(revision=revision, changed=changed, more=max(0, len(keys) - MOST_KEYS))

    def _membership(self, view: ClusterView) -> Iterator[Event]:
        now = {name: (_text(m.role), _text(m.replication_state or m.state), m.timeline) for name, m in list(view.members.items())[:MOST_MEMBERS]}
        was, self._members = self._members, now
        if was is None:
            return
        for name in sorted(was.keys() - now.keys()):
            role, state, timeline = was[name]
            yield MemberEvent(what="left", member=_text(name), role=role, state=state, timeline=timeline, was_role=role, was_state=state)
        for name, (role, state, timeline) in now.items():
            before = was.get(name)
            if before is None:
                yield MemberEvent(what="joined", member=_text(name), role=role, state=state, timeline=timeline)
            elif before != (role, state, timeline):
                yield MemberEvent(what="changed", member=_text(name), role=role, state=state, timeline=timeline, was_role=before[0], was_state=before[1])

    def _lags(self, seen: Observation, published: Published) -> Iterator[Event]:
        limit = max(seen.settings.maximum_lag_on_failover_bytes, SMALLEST_LAG_LIMIT_BYTES)
        lags = _lags(seen, published)
        self._over &= lags.keys()
        for name, lag in lags.items():
            over = name in self._over
            if lag > limit and not over:
                self._over.add(name)
            elif lag < limit // 2 and over:
                self._over.discard(name)
            else:
                continue
            yield LagEvent(member=_text(name), over=not over, lag_bytes=lag, limit_bytes=limit)


def _lags(seen: Observation, published: Published) -> dict[str, int]:
    """How far behind the leader's WAL a standby's own is; on the leader, every member's."""
    row, view, me = seen.postgres.row, seen.dcs.view, seen.me.name
    if row is None or seen.postgres.answer != "sql":
        return {}
    if row.in_recovery:
        leader = leader_position(published.health)
        return {me: max(0, leader - row.position)} if leader is not None and row.position else {}
    if view is None or seen.licence.state is not LicenceState.HELD:
        return {}
    # What PostgreSQL says is of the same moment as the own position; a member's key may be a loop_wait old.
    streams = {str(line.get("application_name")).lower(): line.get("flush_lsn") for line in row.replication}
    found = {}
    for name, member in list(view.members.items())[:MOST_MEMBERS]:
        if name == me:
            continue
        streamed = streams.get(name.lower())
        if isinstance(streamed, int) and streamed:
            found[name] = max(0, row.lsn - streamed)
        elif member.lsn:
            found[name] = max(0, view.published_position.lsn - member.lsn)
    return found


def _text(text: str, longest: int = LONGEST_TEXT) -> str:
    """Bounded, without credentials, and such that it can be encoded."""
    if len(text) > LONGEST_READ:
        return f"({len(text)} characters)"      # cut before it is scrubbed, half a URL would not be recognised as one with a password
    clean = scrub(text)
    if not clean.isascii():
        clean = clean.encode(errors="replace").decode()
    return clean if len(clean) <= longest else clean[:longest - 1] + "…"


def _flat(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"postgresql": {"parameters": {"x": 1}}} → {"postgresql.parameters.x": 1}."""
    flat: dict[str, Any] = {}
    for key, value in table.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and value and prefix.count(".") < 4:
            flat.update(_flat(value, f"{name}."))
        else:
            flat[name] = value
    return flat


def _value(key: str, value: Any) -> Any:
    """As it may be shown: numbers and flags as they are, texts and the rest (as JSON) bounded and without secrets."""
    if value is None or isinstance(value, bool):
        return value
    if is_secret(key):
        return "***"
    if isinstance(value, int | float):
        return value if abs(value) < 1 << 53 else "(a large number)"
    text = _text(value, LONGEST_VALUE) if isinstance(value, str) else json.dumps(redact(value), default=str)
    return text if len(text) <= LONGEST_VALUE else text[:LONGEST_VALUE - 1] + "…"
