"""This member's key in the store: who it is, where it is reached, how far it is. Leased, so that it goes when the agent does.

The lease carries the member key only, never the lock (safety model 2): a store that loses leases whose renewals it
acknowledges costs a line in `ctl list`, not the leader.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import trio

from pgha import COMPATIBLE_VERSION, __version__
from pgha.clock import Clock, Instant, candidate_age_s
from pgha.dcs import Put, Store
from pgha.dcs.keys import Keys, encode
from pgha.dcs.outage import Outage
from pgha.errors import DcsError, DcsUnreachable, LeaseLost
from pgha.log import Log
from pgha.model.decision import Decision
from pgha.model.observation import Observation
from pgha.model.wal import claim_of

log = Log("pgha.dcs")

#: A lease is renewed after this share of its time: another try fits in before it ends.
RENEWED_AFTER = 0.4
#: A write is seen by the watch long before this.
UNSEEN_S = 3.0
#: Fields that change with every write to the database: published once every loop_wait, not at once.
POSITIONS = ("xlog_location", "receive_lsn", "replay_lsn")


def member_value(seen: Observation, decision: Decision, *, api_url: str, conn_url: str, checkpoint_pending: bool, proxy_url: str = "") -> dict[str, Any]:
    """The object of compatibility spec 1.2, in the order of fields that it is written in. pgha.claim, of `timeline`, is there
    once the directory was read on it: others compare it with their own before they stream from here (decide/following.py)."""
    own: dict[str, Any] = {"version": __version__, "node_id": seen.me.node_id}
    row = seen.postgres.row if seen.postgres.alive else None
    value: dict[str, Any] = {"conn_url": conn_url, "api_url": api_url, "state": decision.state, "role": decision.role, "version": COMPATIBLE_VERSION}
    if proxy_url:
        value["proxy_url"] = proxy_url
    if checkpoint_pending and decision.role == "primary":
        value["checkpoint_after_promote"] = False
    tags = {**seen.settings.tags.raw, "nosync": True, "sync_priority": 0} if decision.leaves_sync else seen.settings.tags.raw
    if tags:
        value["tags"] = tags
    if row is not None and row.pending_restart:
        value["pending_restart"] = True
        value["pending_restart_reason"] = {k: {"old_value": old, "new_value": new} for k, (old, new) in row.pending_restart.items()}
    if row is not None and decision.state in ("running", "restarting", "starting"):
        value["xlog_location"] = row.position
        if row.in_recovery:
            if row.replayed_lsn:
                value["replay_lsn"] = row.replayed_lsn
            if row.received_lsn:
                value["receive_lsn"] = row.received_lsn
            if row.receiver is not None and row.receiver.status == "streaming":
                value["replication_state"] = "streaming"
            elif row.restore_command:
                value["replication_state"] = "in archive recovery"
        timeline = (row.receiver.timeline if row.in_recovery and row.receiver else 0) or row.timeline
        if timeline:
            value["timeline"] = timeline
            history = seen.directory.history_on(timeline)
            if history is not None:
                own["claim"] = claim_of(history)
    if decision.memory.scheduled_restart is not None:
        value["scheduled_restart"] = decision.memory.scheduled_restart.published()
    if decision.paused:
        value["pause"] = True
    value["pgha"] = own
    return value


class Announcer:
    """Keeps the key and its lease. `ttl_s()`, `loop_wait_s()`: as configured now."""

    def __init__(self, *, store: Store, keys: Keys, name: str, clock: Clock, ttl_s: Callable[[], float], loop_wait_s: Callable[[], float],
                 outage: Outage | None = None) -> None:
        self._store = store
        self._path = keys.member(name)
        self._clock = clock
        self._outage = outage or Outage(clock)
        self._ttl_s = ttl_s
        self._loop_wait_s = loop_wait_s
        self._wanted: dict[str, Any] | None = None
        self._written: dict[str, Any] | None = None
        self._written_at: Instant | None = None
        self._lease = 0
        self._lease_ttl_s = 0.0
        self._renewed_at: Instant | None = None
        self._news = trio.Event()

    def announce(self, value: dict[str, Any]) -> None:
        """What the key is to say from now on."""
        if value != self._wanted:
            self._wanted = value
            self._news.set()

    def gone(self) -> None:
        """The key is not in sight: write it again, unless it was written too recently to be seen."""
        if self._written is not None and self._written_at is not None and candidate_age_s(self._written_at, self._clock.now()) > UNSEEN_S:
            self._written = None
            self._lease = 0
            self._news.set()

    async def run(self, *, task_status: Any = trio.TASK_STATUS_IGNORED) -> None:
        """Keep the key as it is wanted. Never returns, never raises for the store's faults."""
        task_status.started()
        failing = losing = False
        while True:
            self._news = trio.Event()
            try:
                await self.settle()
                failing = losing = False
                self._outage.answered("member key")
            except LeaseLost:
                self._outage.answered("member key")
                self._lease, self._written = 0, None
                if not losing:
                    log.info("member lease is gone, asking for a new one")
                else:       # also the new one: a store in trouble is not hammered
                    await trio.sleep(1.0)
                losing = True
                continue
            except DcsError as error:
                if isinstance(error, DcsUnreachable):
                    self._outage.failing("member key", str(error))
                elif not failing:
                    log.warning("member key could not be written", why=str(error))
                failing = True
                await trio.sleep(1.0)
                continue
            with trio.move_on_after(self._next_in_s()):
                await self._news.wait()

    async def settle(self) -> None:
        """Lease and key as they ought to be now. DcsError."""
        deadline_s = 2.0
        now = self._clock.now()
        if self._lease and self._lease_ttl_s != self._ttl_s():
            self._lease = 0
        if not self._lease:
            self._lease_ttl_s = self._ttl_s()
            self._lease = await self._store.grant(self._lease_ttl_s, deadline_s=deadline_s)
            self._renewed_at, self._written = now, None
        elif self._renewed_at is None or candidate_age_s(self._renewed_at, now) >= self._lease_ttl_s * RENEWED_AFTER:
            await self._store.renew(self._lease, deadline_s=deadline_s)
            self._renewed_at = now
        if self._wanted is not None and self._due(now):
            wanted = self._wanted
            await self._store.transact(compares=[], puts=[Put(key=self._path, value=encode(wanted), lease=self._lease)], deadline_s=deadline_s)
            self._written, self._written_at = wanted, now

    def _due(self, now: Instant) -> bool:
        if self._wanted is None or self._wanted == self._written:
            return False
        if self._written is None or self._written_at is None or _still(self._wanted) != _still(self._written):
            return True
        return candidate_age_s(self._written_at, now) >= self._loop_wait_s() * 0.95

    def _next_in_s(self) -> float:
        now = self._clock.now()
        renewal = self._lease_ttl_s * RENEWED_AFTER - (candidate_age_s(self._renewed_at, now) if self._renewed_at else 0.0)
        if self._wanted != self._written and self._written_at is not None:
            return max(0.01, min(renewal, self._loop_wait_s() - candidate_age_s(self._written_at, now)))
        return max(0.01, renewal)


def _still(value: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in value.items() if k not in POSITIONS}
