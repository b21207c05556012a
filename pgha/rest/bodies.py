"""The JSON bodies that other tools read: GET /patroni and every health check, /cluster, /history."""

from __future__ import annotations

from typing import Any

from pgha import COMPATIBLE_VERSION, __version__
from pgha.model.overview import overview
from pgha.rest.health import HealthFacts
from pgha.rest.published import Published


def patroni_body(published: Published, health: HealthFacts) -> dict[str, Any]:
    """GET /patroni, in the reference's order (compatibility spec 3.3; golden answers). `xlog` is in it exactly when SQL
    answered: peers take a body without it for a node that cannot be reached. Flags are there only when true."""
    node = published.node
    body: dict[str, Any] = {"state": health.state}
    if node.xlog is not None:
        body["postmaster_start_time"] = node.postmaster_start_time
    body["role"] = health.role
    if node.xlog is not None:
        body["server_version"] = node.server_version
        body["xlog"] = node.xlog
        if health.sync_standby:
            body["sync_standby"] = True
        if health.quorum_standby:
            body["quorum_standby"] = True
        body["timeline"] = node.timeline
        if health.replication_state:
            body["replication_state"] = health.replication_state
        if node.replication:
            body["replication"] = list(node.replication)
    if health.paused:
        body["pause"] = True
    if node.cluster_unlocked:
        body["cluster_unlocked"] = True
    if health.failsafe_active:
        body["failsafe_mode_is_active"] = True
    if node.dcs_last_seen_s:
        body["dcs_last_seen"] = node.dcs_last_seen_s
    if node.tags:
        body["tags"] = node.tags
    if node.system_identifier:
        body["database_system_identifier"] = node.system_identifier
    if node.pending_restart:
        body["pending_restart"] = True
        body["pending_restart_reason"] = node.pending_restart
    body["patroni"] = {"version": COMPATIBLE_VERSION, "scope": node.scope, "name": node.name}
    if node.scheduled_restart:
        body["scheduled_restart"] = node.scheduled_restart
    if node.watchdog_failed:
        body["watchdog_failed"] = True
    body["pgha"] = {"version": __version__, "node_id": node.node_id, **({"reinitialize": node.reinitialize} if node.reinitialize else {})}
    return body


def cluster_body(published: Published) -> dict[str, Any]:
    """GET /cluster, from the last view of the store."""
    view = published.view
    if view is None:
        return {"members": [], "scope": published.node.scope}
    failover = {"leader": view.failover.leader, "member": view.failover.candidate, "scheduled_at": view.failover.scheduled_at}
    return overview(scope=published.node.scope, leader=published.leader, members={name: m.raw for name, m in view.members.items()},
                    optime=view.published_position.lsn, sync=view.sync.raw, failover=failover, config=view.config or {})


def history_body(published: Published) -> list[list[Any]]:
    """GET /history: rows of two to five items."""
    rows: list[list[Any]] = []
    for entry in (published.view.history if published.view else None) or ():
        row: list[Any] = [entry.timeline, entry.lsn, entry.reason, entry.timestamp, entry.leader]
        while len(row) > 2 and row[-1] == "":
            row.pop()
        rows.append(row)
    return rows
