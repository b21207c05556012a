"""Has this standby room for what its primary allows? PostgreSQL 14 and later stops replaying on one that has less of what it
must not have less of (max_connections and four more), and promotes it no more: only a restart helps, which raises what is
too small (compatibility spec 5.5). A primary that crashed under a raised configuration has it at once, its standbys have not.
"""

from __future__ import annotations

from pgha.decide.common import reason
from pgha.model.action import Restart
from pgha.model.decision import Reason
from pgha.model.observation import Observation


def has_room(o: Observation) -> Reason:
    """By pg_control, which says what the primary had whose WAL was replayed last."""
    rule, row, control = "cramped.has_room", o.postgres.row, o.directory.control
    if row is None or not row.in_recovery or not row.replay_paused or control is None or not o.postgres.alive:
        return reason(rule, True, "replay is not paused")
    small = [f"{name} {row.limits[name]}, the primary's {needed}" for name, needed in control.limits.items() if row.limits.get(name, needed) < needed]
    return reason(rule, not small, f"PostgreSQL has paused replay: {', '.join(small)}" if small else "replay is paused, not for want of room")


def restart(o: Observation) -> Restart:
    """As a standby of nobody: whom to follow is filled in where that is known."""
    return Restart(as_primary=False, timeout_s=o.settings.primary_start_timeout_s or 300.0)
