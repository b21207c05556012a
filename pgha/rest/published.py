"""What does REST know? One frozen value a pass, made by the loop, replaced at once: `Published`, on a `Board`.

REST answers from it and from nothing else, so that it never waits for SQL, the store or the loop. What depends on the
moment of the request (is the lock still mine? does the loop still decide?) is kept as a deadline beside the facts.
"""

from __future__ import annotations

from typing import Any

import msgspec
import trio
from msgspec import Struct

from pgha.clock import Deadline, Instant, candidate_age_s, holder_age_s, remaining_s
from pgha.decide import failsafe
from pgha.model.cluster import ClusterView
from pgha.model.decision import Decision, Memory, Vote
from pgha.model.lock import LicenceState, wait_s
from pgha.model.observation import Observation
from pgha.model.overview import by_quorum, is_standby_cluster, shown_restart, synchronous, synchronous_names
from pgha.rest.health import HealthFacts


class NodeFacts(Struct, frozen=True, kw_only=True):
    """What GET /patroni and /metrics show beside the health facts. `xlog` None: SQL did not answer.

    Times are texts as PostgreSQL prints them; `*_s` epoch seconds, 0 = unknown.
    """

    name: str
    scope: str
    xlog: dict[str, Any] | None = None
    postmaster_start_time: str = ""
    postmaster_start_s: float = 0.0
    server_version: int = 0
    timeline: int = 0
    replication: tuple[dict[str, Any], ...] = ()
    cluster_unlocked: bool = True
    dcs_last_seen_s: int = 0
    tags: dict[str, Any] = {}
    system_identifier: str = ""
    pending_restart: dict[str, Any] = {}     # parameter → {"old_value": …, "new_value": …}
    watchdog_failed: bool = False
    node_id: str = ""
    scheduled_restart: dict[str, Any] = {}
    reinitialize: dict[str, Any] = {}        # what became of the last request: {"request", "state": running, done, failed, "why"?}


class Published(Struct, frozen=True, kw_only=True):
    """One pass, as REST sees it.

    `licence_until` None: the lock is not held. `alive_until` None: the loop has not decided yet, which is no fault
    before the first pass. `failover_refusal`: why the last request for a switchover or failover was turned down.
    """

    at: Instant
    wall_s: float
    health: HealthFacts
    node: NodeFacts
    number: int = 0
    licence_until: Deadline | None = None
    alive_until: Deadline | None = None
    loop_wait_s: float = 10.0
    primary_start_timeout_s: float = 300.0
    view: ClusterView | None = None
    decision: dict[str, Any] = {}
    vote: Vote = Vote()
    observation: Observation | None = None
    memory: Memory | None = None             # that the pass began with: with the observation, all that `replay` needs
    failover_refusal: str = ""
    gauges: dict[str, float] = {}            # own metrics, by name without the prefix "pgha_"

    def health_at(self, now: Instant) -> HealthFacts:
        """The health facts as of this moment."""
        return msgspec.structs.replace(
            self.health,
            lock_held=self.licence_until is not None and remaining_s(self.licence_until, now) > 0,
            loop_alive=self.alive_until is None or remaining_s(self.alive_until, now) > 0,
        )

    @property
    def leader(self) -> str:
        """Who leads by this view of the store; "" = nobody. The lock record decides, if there is one that says."""
        view = self.view
        if view is None or self.node.cluster_unlocked:
            return ""
        if view.leader_lease:
            return view.leader      # a member of another make may hold it, whatever pgha's last record says
        return (view.lock.holder if view.lock is not None else "") or view.leader


class Board:
    """Where the loop puts the latest `Published` and everybody else reads it; readers can wait for the next."""

    def __init__(self, first: Published) -> None:
        self._current = first
        self._changed = trio.Event()

    def current(self) -> Published:
        return self._current

    def publish(self, published: Published) -> None:
        """Replace the value and wake whoever waits. Never blocks."""
        self._current = published
        changed, self._changed = self._changed, trio.Event()
        changed.set()

    async def wait_changed(self, seen: Published) -> Published:
        """Return the current value once it is another than `seen`. The caller bounds the wait."""
        while self._current is seen:
            await self._changed.wait()
        return self._current


def nothing_yet(*, name: str, scope: str, at: Instant, wall_s: float) -> Published:
    """What is published before the first pass: everything is 503, nothing is known."""
    return Published(at=at, wall_s=wall_s, health=HealthFacts(), node=NodeFacts(name=name, scope=scope),
                     decision={"situation": "starting", "summary": "no pass yet"})


def publish_pass(seen: Observation, decision: Decision, *, scope: str, memory: Memory | None = None, gauges: dict[str, float] | None = None,
                 failover_refusal: str = "", problems: tuple[str, ...] = ()) -> Published:
    """What one pass shows to the outside. `memory`: that the pass began with. `problems`: of the configuration."""
    view, row = seen.dcs.view, seen.postgres.row
    answered = row is not None and seen.postgres.answer == "sql"
    config = (view.config if view else None) or {}
    role = decision.role or "uninitialized"
    if answered and row is not None:
        role = "replica" if row.in_recovery else "primary"
    standby_cluster = is_standby_cluster(config)
    held = seen.licence.state is LicenceState.HELD
    if standby_cluster and held and role == "replica":
        role = "standby_leader"
    state = decision.state or ("running" if answered else "unknown")
    if state == "running" and not answered:
        state = "unknown"       # the reference's word for a server that should run and does not answer
    in_sync = view is not None and synchronous(config) and role == "replica" and seen.me.name.lower() in synchronous_names(view.sync.raw)
    receiver = row.receiver if row is not None and answered else None
    streams = receiver is not None and receiver.status == "streaming"
    health = HealthFacts(
        state=state, role=role, standby_cluster=standby_cluster, dcs_seen=view is not None and seen.dcs.unreachable_since is None,
        paused=decision.paused, sync_standby=in_sync and not by_quorum(config),
        quorum_standby=in_sync and by_quorum(config),
        replication_state="streaming" if streams else "in archive recovery" if answered and row is not None and row.in_recovery and row.restore_command else "",
        tags=seen.settings.tags.raw, optime=view.published_position.lsn or None if view else None,
        latest_end_lsn=receiver.latest_end_lsn or None if receiver else None,
        received_lsn=row.received_lsn or row.replayed_lsn if row and answered and row.in_recovery else None,
        replayed_lsn=row.replayed_lsn if row and answered and row.in_recovery else None,
        maximum_lag_bytes=seen.settings.maximum_lag_on_failover_bytes, failsafe_active=failsafe.is_active(seen),
    )
    running_primary = role == "primary" and state == "running"
    return Published(
        at=seen.now, wall_s=seen.wall_s, number=seen.number, health=health, node=_node(seen, decision.memory, scope=scope, answered=answered),
        licence_until=seen.licence.valid_until if held else None,
        alive_until=seen.now.plus_s(seen.settings.ttl_s * (1 if running_primary else 2)),
        loop_wait_s=seen.settings.loop_wait_s, primary_start_timeout_s=seen.settings.primary_start_timeout_s,
        view=view, decision=_decision(seen, decision, problems), vote=decision.vote, observation=seen, memory=memory,
        failover_refusal=failover_refusal, gauges=gauges or {},
    )


def store_gauges(seen: Observation) -> dict[str, float]:
    """How full the store is, where this node watches it (the leader does; safety model 16)."""
    capacity = seen.dcs.capacity
    if capacity is None:
        return {}
    return {"store_used_bytes": float(capacity.used_bytes), "store_quota_bytes": float(capacity.quota_bytes), "store_alarms": float(len(capacity.alarms)),
            "store_uncompacted_seconds": candidate_age_s(capacity.compacted_at or capacity.watched_since, seen.now)}


def _reinitialize(memory: Memory) -> dict[str, Any]:
    if memory.reinit is not None:
        return {"request": memory.reinit.request, "state": "running"}
    if (end := memory.reinit_ended) is not None:
        return {"request": end.request, "state": "done" if end.ok else "failed", **({"why": end.why} if end.why else {})}
    return {}


def _node(seen: Observation, memory: Memory, *, scope: str, answered: bool) -> NodeFacts:
    row, control = seen.postgres.row, seen.directory.control
    last_seen_s = 0
    if seen.dcs.heard_at is not None:
        last_seen_s = int(seen.wall_s - holder_age_s(seen.dcs.heard_at, seen.now))
    base = NodeFacts(
        name=seen.me.name, scope=scope, cluster_unlocked=is_unlocked(seen), dcs_last_seen_s=last_seen_s, tags=seen.settings.tags.raw,
        system_identifier=(row.system_identifier if row else "") or (control.system_identifier if control else ""),
        watchdog_failed=seen.watchdog.failed, node_id=seen.me.node_id,
        scheduled_restart=shown_restart(memory.scheduled_restart.published()) if memory.scheduled_restart is not None else {}, reinitialize=_reinitialize(memory),
    )
    if row is None or not answered:
        return base
    timeline = row.timeline
    if row.in_recovery:
        xlog = {"received_location": row.received_lsn or row.replayed_lsn, "replayed_location": row.replayed_lsn,
                "replayed_timestamp": row.replayed_timestamp or None, "paused": row.replay_paused}
        timeline = (row.receiver.timeline if row.receiver else 0) or timeline
    else:
        xlog = {"location": row.lsn}
    shown = ("usename", "application_name", "client_addr", "state", "sync_state", "sync_priority")
    return msgspec.structs.replace(
        base, xlog=xlog, postmaster_start_time=row.started_at, postmaster_start_s=row.started_at_s, server_version=row.server_version,
        timeline=timeline, replication=tuple({k: line.get(k) for k in shown} for line in row.replication),
        pending_restart={k: {"old_value": old, "new_value": new} for k, (old, new) in row.pending_restart.items()},
    )


def is_unlocked(seen: Observation) -> bool:
    """True also when the cluster has not been seen: nobody is known to lead."""
    view = seen.dcs.view
    if seen.licence.state is LicenceState.HELD:
        return False
    if failsafe.pinging_leader(seen) is not None:
        return False
    if view is None:
        return True
    if view.leader and view.leader_lease:
        return False        # held by a member of another make, or by one of ours beside its record
    if view.lock is None:
        return True
    if view.lock.mode == "released":
        return True
    since = seen.dcs.lock_seen.since
    return view.lock.mode == "held" and since is not None and candidate_age_s(since, seen.now) > wait_s(view.lock.ttl_s)


def _decision(seen: Observation, decision: Decision, problems: tuple[str, ...]) -> dict[str, Any]:
    """GET /pgha/decision: the pass in words, with its reasons and how old each fact was when it was made."""
    def age(instant: Instant | None) -> float | None:
        return None if instant is None else round(holder_age_s(instant, seen.now), 3)

    operation = seen.operation
    return {
        "pass": seen.number,
        "situation": decision.situation,
        "summary": decision.summary,
        "reasons": msgspec.to_builtins(decision.reasons),
        "actions": [msgspec.to_builtins(action) for action in decision.actions],
        "state": decision.state,
        "role": decision.role,
        "mandate": {"kind": decision.mandate.kind, "why": decision.mandate.why},
        "operation": None if operation is None else {"kind": operation.kind, "detail": operation.detail, "progress": operation.progress,
                                                     "age_s": age(operation.started_at)},
        "licence": {"state": str(seen.licence.state), "failing_s": age(seen.licence.failing_since), "failing_why": seen.licence.failing_why,
                    "lost_to": seen.licence.lost_to},
        "ages_s": {"store_heard": age(seen.dcs.heard_at), "store_read": age(seen.dcs.read_at), "postgres_row": age(seen.postgres.row_at),
                   "postgres_sign_of_life": age(seen.postgres.answered_at),
                   **{f"peer_{peer.name}": age(peer.asked_at) for peer in seen.peers.values()}},
        "problems": [*problems, *(seen.dcs.view.problems if seen.dcs.view else ()), *([f"store: {seen.dcs.why}"] if seen.dcs.why else []),
                     *([f"postgres: {seen.postgres.why}"] if seen.postgres.why else []),
                     *([f"guard: {seen.guard.why}"] if seen.guard.why else []), *([f"watchdog: {seen.watchdog.why}"] if seen.watchdog.why else [])],
    }
