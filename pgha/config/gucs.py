"""Which PostgreSQL parameters pgha controls, and what the cluster's configuration may say about them (spec 5.5).

Only names and bounds, for checking what people write; postgres/ decides what goes where.
"""

from __future__ import annotations

import re
from typing import Any

from pgha.config.values import Wrong, boolean, integer, shown, size, type_name

#: taken from the cluster's configuration only, with their minimum; a local value is ignored
MINIMUM = {
    "max_connections": 25, "max_wal_senders": 3, "wal_keep_segments": 1, "max_prepared_transactions": 0,
    "max_locks_per_transaction": 32, "max_replication_slots": 4, "max_worker_processes": 2,
}
#: the same, but not plain numbers
OTHERS = ("wal_level", "wal_keep_size", "track_commit_timestamp", "wal_log_hints", "hot_standby")
#: set by pgha, nobody else
FORCED = ("listen_addresses", "port", "cluster_name", "restart_after_crash", "data_directory", "config_file", "external_pid_file", "primary_conninfo", "primary_slot_name")
CONTROLLED = frozenset((*MINIMUM, *OTHERS, *FORCED))

#: of one table, that are told
MOST_FAULTS = 5

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_$]*(\.[A-Za-z_][A-Za-z0-9_$]*)?")


def parameters(value: Any) -> dict[str, Any]:
    """A table of parameters: names as PostgreSQL has them, values text, number or boolean. Raises Wrong, and says what is good of it."""
    if not isinstance(value, dict):
        raise Wrong(f"is {type_name(value)}, not a table")
    faults = {name: fault for name, item in value.items() if (fault := _fault(name, item))}
    if faults:
        raise Wrong("; ".join(list(faults.values())[:MOST_FAULTS]), repaired={name: item for name, item in value.items() if name not in faults})
    return dict(value)


def _fault(name: str, item: Any) -> str:
    if not _NAME.fullmatch(name):
        return f"has {shown(name)}, which is no parameter's name"
    if type(item) not in (str, int, float, bool):
        return f"has {type_name(item)} for {_short(name)}; a parameter's value is text, number or boolean"
    if isinstance(item, str) and ("\n" in item or "\0" in item):
        return f"has a line break or a NUL in {_short(name)}"
    return ""


def _short(name: str) -> str:
    return name if len(name) <= 64 else shown(name)


def problem(name: str, value: Any) -> str:
    """What is wrong with a controlled parameter's value in the cluster's configuration, with what is allowed; or ""."""
    lower = name.lower()
    if lower in FORCED:
        return "is set by pgha itself; allowed: leave it out"
    try:
        if lower in MINIMUM:
            allowed = f"a whole number, at least {MINIMUM[lower]}"
            integer(MINIMUM[lower]).parse(value)
        elif lower == "wal_keep_size":
            allowed = "at least 16MB"
            # without a unit PostgreSQL counts megabytes
            size(16 << 20).parse(f"{value}MB" if str(value).strip().isdigit() else value)
        elif lower == "wal_level":
            allowed = "replica or logical"
            if not isinstance(value, str) or value.lower() not in ("replica", "logical"):      # as PostgreSQL reads it
                raise Wrong(f"is {shown(value)}")
        elif lower == "hot_standby":
            allowed = "on, or leave it out"
            if not boolean(value):
                raise Wrong(f"is {shown(value)}")
        elif lower in OTHERS:
            allowed = "on or off"
            boolean(value)
        else:
            return ""
    except Wrong as wrong:
        return f"{wrong.what}; allowed: {allowed}"
    return ""
