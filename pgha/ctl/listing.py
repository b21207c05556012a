"""`ctl list`: who leads, who follows, how far behind? The reference's table. Lags in MiB, rounded, as it has them."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

from pgha.ctl import cluster as clusters
from pgha.ctl.cluster import Cluster
from pgha.ctl.ends import DONE, End, of_several
from pgha.ctl.output import Column, plain, records, table
from pgha.ctl.settings import Settings
from pgha.ctl.watch import repeated

COLUMNS = (
    Column("Member"), Column("Host"), Column("Role"), Column("State"), Column("TL", right=True), Column("Receive LSN", right=True),
    Column("Receive Lag", "Lag", right=True), Column("Replay LSN", right=True), Column("Replay Lag", "Lag", right=True),
)
#: shown if somebody has one, or with --extended
EXTRA = (Column("Pending restart"), Column("Pending restart reason"), Column("Scheduled restart"), Column("Tags"))


def run(settings: Settings, given: argparse.Namespace) -> int:
    return of_each(settings, given, lambda seen: _all(seen, given.format, extended=given.extended, timestamp=given.timestamp))


def of_each(settings: Settings, given: argparse.Namespace, look: Callable[[list[Cluster]], str]) -> int:
    """Print what `look` makes of the clusters that are named, as often as asked. One that cannot be read is named, and costs the
    others nothing."""
    names = list(dict.fromkeys(given.cluster)) or [settings.scope]
    code = DONE

    def looked() -> str:
        nonlocal code
        seen, failures = [], []
        for name in names:
            try:
                seen.append(clusters.read_or_ask(settings.of(name)))
            except End as end:
                failures.append(end)
        code = of_several([DONE] * len(seen) + [end.code for end in failures])
        text = "\n".join(dict.fromkeys(end.text for end in failures))
        if not seen:
            raise End(code, text)
        if text:
            clusters.warn(text)
        return look(seen)

    return max(repeated(given.watch, looked), code)


def _all(seen: list[Cluster], form: str, *, extended: bool, timestamp: bool) -> str:
    """A table each, or all rows together."""
    if form in ("table", "pretty"):
        return "\n".join(shown(cluster, form, extended=extended, timestamp=timestamp and cluster is seen[0]) for cluster in seen)
    rows = [{"Cluster": cluster.scope, **row} for cluster in seen for row in member_rows(cluster)]
    return records((Column("Cluster"), *_columns(rows, extended=extended)), rows, form)


def _columns(rows: list[dict[str, Any]], *, extended: bool) -> tuple[Column, ...]:
    return (*COLUMNS, *(c for c in EXTRA if extended or any(row.get(c.name) for row in rows)))


def shown(cluster: Cluster, form: str = "table", *, extended: bool = False, timestamp: bool = False,
          rows: list[dict[str, Any]] | None = None) -> str:
    """The whole output of `list`, without the last newline. `rows`: as member_rows gives them, in another order."""
    if form not in ("table", "pretty"):
        return _all([cluster], form, extended=extended, timestamp=False)
    rows = member_rows(cluster) if rows is None else rows
    # The reference's words for an empty key and for none. An agent that is asked in the store's place may just not know it.
    known = cluster.system_identifier or ("initializing" if "initialize" in cluster.keys else "uninitialized" if cluster.keys else "unknown")
    title = plain(f"Cluster: {cluster.scope} ({known})").replace("\n", "\\n")
    parts = [time.strftime("%Y-%m-%d %H:%M:%S")] if timestamp else []
    parts.append(table(_columns(rows, extended=extended), rows, title=title))
    parts += _footer(cluster.body)
    return "\n".join(parts)


def member_rows(cluster: Cluster) -> list[dict[str, Any]]:
    """One row a member, by column names."""
    members: list[dict[str, Any]] = cluster.body["members"]
    hosts = [str(m["host"]) for m in members if m.get("host")]
    with_port = len(set(hosts)) < len(hosts) or any(m.get("port", 5432) != 5432 for m in members)
    rows = []
    for member in members:
        host = member.get("host", "")
        row = {
            "Member": member["name"],
            "Host": f"{host}:{member.get('port', '')}" if host and with_port else host,
            "Role": str(member.get("role", "")).replace("_", " ").title(),
            "State": member.get("state"),
            "TL": member.get("timeline"),
            "Receive LSN": member.get("receive_lsn"), "Receive Lag": _mebibytes(member.get("receive_lag")),
            "Replay LSN": member.get("replay_lsn"), "Replay Lag": _mebibytes(member.get("replay_lag")),
            "Pending restart": "*" if member.get("pending_restart") else None,
            "Pending restart reason": _reasons(member.get("pending_restart_reason")),
            "Scheduled restart": _scheduled(member.get("scheduled_restart")),
            "Tags": member.get("tags") or None,
        }
        rows.append(row)
    return rows


def _mebibytes(lag: Any) -> int | None:
    return round(lag / (1 << 20)) if isinstance(lag, int) and abs(lag) < 1 << 64 else None


def _reasons(reasons: Any) -> str | None:
    if not isinstance(reasons, dict):
        return None
    return "\n".join(f"{name}: {r.get('old_value')}->{r.get('new_value')}" for name, r in sorted(reasons.items()) if isinstance(r, dict)) or None


def _scheduled(restart: Any) -> str | None:
    if not isinstance(restart, dict):
        return None
    filters = [f"if {key}: {json.dumps(value)}" for key, value in restart.items() if key in ("role", "postgres_version", "restart_pending")]
    return "\n".join([str(restart.get("schedule", "")), *filters])


def _footer(body: dict[str, Any]) -> list[str]:
    lines = [" Maintenance mode: on"] if body.get("pause") else []
    scheduled = body.get("scheduled_switchover")
    if isinstance(scheduled, dict):
        lines.append(f" Switchover scheduled at: {scheduled.get('at')}")
        lines += [f"{word:>24}: {scheduled[word]}" for word in ("from", "to") if word in scheduled]
    return [plain(line).replace("\n", "\\n") for line in lines]
