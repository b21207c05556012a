"""GET /metrics: the reference's names and labels (compatibility spec 4), and a few of our own under pgha_."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime

from pgha import COMPATIBLE_VERSION, __version__
from pgha.clock import NEVER, Instant, holder_age_s, remaining_s
from pgha.rest.health import HealthFacts
from pgha.rest.published import Published

#: PostgreSQL's states by number (compatibility spec 1.10): state text, name in the comment line.
STATES = (
    ("initializing new cluster", "initdb"), ("initdb failed", "initdb_failed"), ("running custom bootstrap script", "custom_bootstrap"),
    ("custom bootstrap failed", "custom_bootstrap_failed"), ("creating replica", "creating_replica"), ("running", "running"),
    ("starting", "starting"), ("starting after custom bootstrap", "bootstrap_starting"), ("start failed", "start_failed"),
    ("restarting", "restarting"), ("restart failed", "restart_failed"), ("stopping", "stopping"), ("stopped", "stopped"),
    ("stop failed", "stop_failed"), ("crashed", "crashed"),
)
_NUMBER = {text: number for number, (text, _) in enumerate(STATES)}
_VALUES = "Values: " + ", ".join(f"{number}={name}" for number, (_, name) in enumerate(STATES))

#: What the gauges of published.store_gauges are.
_GAUGES = {
    "configuration_problems": "Keys of the configuration that are repaired, ignored or left out.",
    "store_alarms": "Alarms that the configuration store has raised, as of the leader's last look.",
    "store_quota_bytes": "Size at which the configuration store refuses every write.",
    "store_uncompacted_seconds": "Seconds for which nobody is known to have compacted the configuration store.",
    "store_used_bytes": "Size of the configuration store's data.",
}


def metrics_text(published: Published, health: HealthFacts, now: Instant) -> str:
    """The exposition text, with a newline at its end."""
    labels = f'{{scope="{_escape(published.node.scope)}",name="{_escape(published.node.name)}"}}'
    lines: list[str] = []
    for name, kind, text, value in (*_reference(published, health), *_own(published, now)):
        lines.append(f"# HELP {name} {text}")
        if name == "patroni_postgres_state":
            lines.append(f"# {_VALUES}")
        lines += [f"# TYPE {name} {kind}", f"{name}{labels} {value}"]
    lines += ["# HELP pgha_info pgha's own version, always 1.", "# TYPE pgha_info gauge",
              f'pgha_info{labels[:-1]},version="{__version__}"}} 1']
    return "\n".join(lines) + "\n"


def _reference(published: Published, health: HealthFacts) -> Iterator[tuple[str, str, str, str]]:
    node = published.node
    xlog = node.xlog or {}
    answered = node.xlog is not None
    standby_leader = health.role == "standby_leader"
    yield "patroni_version", "gauge", "Version of the wire behaviour, two digits a part.", "".join(f"{int(p):02d}" for p in COMPATIBLE_VERSION.split("."))
    yield "patroni_postgres_running", "gauge", "1 if PostgreSQL is running.", _flag(health.state == "running")
    yield "patroni_postmaster_start_time", "gauge", "Epoch seconds when PostgreSQL was started.", _number(node.postmaster_start_s if answered else 0)
    yield "patroni_primary", "gauge", "1 if PostgreSQL is not in recovery.", _flag(answered and health.role == "primary")
    yield "patroni_xlog_location", "counter", "Position of a primary in bytes, else 0.", _number(xlog.get("location"))
    yield "patroni_standby_leader", "gauge", "1 if this node leads a standby cluster.", _flag(answered and standby_leader)
    yield "patroni_replica", "gauge", "1 if this node is a replica.", _flag(answered and health.role == "replica")
    yield "patroni_sync_standby", "gauge", "1 if this node is a synchronous standby.", _flag(health.sync_standby)
    yield "patroni_quorum_standby", "gauge", "1 if this node is a quorum standby.", _flag(health.quorum_standby)
    yield "patroni_xlog_received_location", "counter", "Position received by a replica in bytes, else 0.", _number(xlog.get("received_location"))
    yield "patroni_xlog_replayed_location", "counter", "Position replayed by a replica in bytes, else 0.", _number(xlog.get("replayed_location"))
    yield "patroni_xlog_replayed_timestamp", "gauge", "Epoch seconds of the last replayed transaction, 0 if none.", _number(_epoch_s(xlog.get("replayed_timestamp")))
    yield "patroni_xlog_paused", "gauge", "1 if replay is paused.", _flag(bool(xlog.get("paused")))
    yield "patroni_postgres_streaming", "gauge", "1 if PostgreSQL streams from its upstream.", _flag(health.replication_state == "streaming")
    yield "patroni_postgres_in_archive_recovery", "gauge", "1 if PostgreSQL replays from an archive.", _flag(health.replication_state == "in archive recovery")
    yield "patroni_postgres_server_version", "gauge", "PostgreSQL's version number, 0 if it does not answer.", _number(node.server_version)
    yield "patroni_cluster_unlocked", "gauge", "1 if nobody is known to hold the leader lock.", _flag(node.cluster_unlocked)
    yield "patroni_failsafe_mode_is_active", "gauge", "1 if the leader stays one by failsafe.", _flag(health.failsafe_active)
    yield "patroni_postgres_timeline", "gauge", "PostgreSQL's timeline, 0 if it does not answer.", _number(node.timeline)
    yield "patroni_dcs_last_seen", "gauge", "Epoch seconds of the configuration store's last sign of life.", _number(node.dcs_last_seen_s)
    yield "patroni_pending_restart", "gauge", "1 if PostgreSQL needs a restart.", _flag(bool(node.pending_restart))
    yield "patroni_is_paused", "gauge", "1 if automatic failover is off.", _flag(health.paused)
    yield "patroni_postgres_state", "gauge", "PostgreSQL's state as a number.", str(_NUMBER.get(health.state, -1))


def _own(published: Published, now: Instant) -> Iterator[tuple[str, str, str, str]]:
    remaining = 0.0 if published.licence_until is None else max(0.0, remaining_s(published.licence_until, now))
    lasts = "+Inf" if published.licence_until == NEVER else _number(round(remaining, 3))
    yield "pgha_licence_remaining_seconds", "gauge", "Seconds for which the lock is still known to be held, 0 if it is not, +Inf in pause.", lasts
    yield "pgha_last_pass_age_seconds", "gauge", "Seconds since the loop last decided.", _number(round(holder_age_s(published.at, now), 3))
    yield "pgha_passes_total", "counter", "Passes of the loop since the agent's start.", _number(published.number)
    for name, value in sorted(published.gauges.items()):
        yield f"pgha_{name}", "gauge", _GAUGES.get(name, f"The agent's {name.replace('_', ' ')}."), _number(value)


def _flag(value: bool) -> str:  # noqa: FBT001  (a value to print)
    return "1" if value else "0"


def _number(value: float | None) -> str:
    if value is None or not value:
        return "0"
    return str(int(value)) if value == int(value) else f"{value:.6f}".rstrip("0")


def _epoch_s(text: str | None) -> float:
    if not text:
        return 0.0
    try:
        return datetime.fromisoformat(text).timestamp()
    except ValueError:
        return 0.0


def _escape(label: str) -> str:
    return label.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
