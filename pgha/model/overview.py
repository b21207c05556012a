"""How do a cluster's keys read as one overview: who leads, who follows, how far behind? The JSON of GET /cluster.

Plain JSON values in and out, standard library only: `ctl list` makes the same overview straight from the store and has
no time to load anything. Shape and words are the reference's (compatibility spec 3.4; golden answers).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

UNKNOWN = "unknown"
#: scheme, perhaps credentials, host (IPv6 in brackets), perhaps a port
_CONN_URL = re.compile(r"\w+://(?:[^@/?#]*@)?(\[[^\]/]+\]|[^:/?#]+)(?::(\d{1,5}))?(?:[/?#].*)?", re.ASCII)


def overview(*, scope: str, leader: str, members: Mapping[str, Mapping[str, Any]], optime: int,
             sync: Mapping[str, Any], failover: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """`members`: the objects of the member keys by name; `leader`: who holds the lock ("" = nobody); `optime`: the
    leader's last known position (0 = unknown); `sync`, `failover`, `config`: those keys' objects, {} if absent."""
    standby_cluster = is_standby_cluster(config)
    voters = synchronous_names(sync)
    quorum = by_quorum(config)
    body: dict[str, Any] = {"members": []}
    for name in sorted(members):
        raw = members[name]
        if name == leader:
            role = "standby_leader" if standby_cluster or raw.get("role") == "standby_leader" else "leader"
        elif name.lower() in voters and synchronous(config):
            role = "quorum_standby" if quorum else "sync_standby"
        else:
            role = "replica"
        body["members"].append(_member(name, raw, role=role, optime=optime))
    if is_paused(config):
        body["pause"] = True
    if failover.get("scheduled_at"):
        scheduled = {"at": str(failover["scheduled_at"])}
        if failover.get("leader"):
            scheduled["from"] = str(failover["leader"])
        if failover.get("member"):
            scheduled["to"] = str(failover["member"])
        body["scheduled_switchover"] = scheduled
    body["scope"] = scope
    return body


def _member(name: str, raw: Mapping[str, Any], *, role: str, optime: int) -> dict[str, Any]:
    streaming = raw.get("replication_state") if role != "leader" else None
    out: dict[str, Any] = {"name": name, "role": role, "state": streaming or raw.get("state") or UNKNOWN, "api_url": raw.get("api_url")}
    host, port = host_port(raw.get("conn_url"))
    if host:
        out["host"], out["port"] = host, port
    for key in ("timeline", "tags", "pending_restart", "pending_restart_reason"):
        if key in raw:
            out[key] = raw[key]
    if "scheduled_restart" in raw:
        out["scheduled_restart"] = shown_restart(raw["scheduled_restart"])
    if role != "leader":
        for prefix, key in (("receive_", "receive_lsn"), ("replay_", "replay_lsn"), ("", "xlog_location")):
            value = raw.get(key)
            lsn = value if isinstance(value, int) and not isinstance(value, bool) else 0
            out[prefix + "lag"] = max(0, optime - lsn) if lsn > 0 and optime else UNKNOWN
            out[prefix + "lsn"] = f"{lsn >> 32:X}/{lsn & 0xFFFFFFFF:X}" if lsn > 0 else UNKNOWN
    return out


def shown_restart(scheduled: Any) -> Any:
    """A member key's scheduled_restart without what only its agent needs."""
    return {k: v for k, v in scheduled.items() if k != "postmaster_start_time"} if isinstance(scheduled, dict) else scheduled


def host_port(conn_url: Any) -> tuple[str, int]:
    """('10.0.0.1', 5432) from a member's conn_url; ('', 0) if there is none to read."""
    match = _CONN_URL.fullmatch(conn_url) if isinstance(conn_url, str) else None
    return (match[1].strip("[]"), int(match[2] or 5432)) if match else ("", 0)


def is_standby_cluster(config: Mapping[str, Any]) -> bool:
    """Active if it says where to replicate from (compatibility spec 5.4)."""
    section = config.get("standby_cluster")
    return isinstance(section, dict) and any(section.get(key) for key in ("host", "port", "restore_command"))


def synchronous(config: Mapping[str, Any]) -> bool:
    """Is a synchronous mode on? A standby cluster has none."""
    return (is_true(config.get("synchronous_mode")) or by_quorum(config)) and not is_standby_cluster(config)


def by_quorum(config: Mapping[str, Any]) -> bool:
    """Is the synchronous mode that is wanted the one with votes?"""
    mode = config.get("synchronous_mode")
    return isinstance(mode, str) and mode.lower() == "quorum"


def synchronous_names(sync: Mapping[str, Any]) -> frozenset[str]:
    """The names in /sync, lower-case: they are compared without regard to case. Empty without a leader in it."""
    standbys = sync.get("sync_standby")
    if not sync.get("leader") or not isinstance(standbys, str):
        return frozenset()
    return frozenset(part.strip().lower() for part in standbys.split(",") if part.strip())


def is_paused(config: Mapping[str, Any]) -> bool:
    return is_true(config.get("pause"))


def is_true(value: Any) -> bool:
    """In all spellings that the configuration takes (config/values.py); what others wrote is as they wrote it."""
    return value is True or (isinstance(value, str) and value.lower() in ("on", "true", "yes", "1"))
