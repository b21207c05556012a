"""In which order are members restarted, when parameters change that standbys must not have less of than their primary?

PostgreSQL 14 and later stops replaying on a standby that has less (13 ends it). So what is raised is raised on the standbys
first, what is lowered is lowered on the primary first (compatibility spec 5.5). Standard library only: ctl uses it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

STANDBY_AT_LEAST = ("max_connections", "max_prepared_transactions", "max_locks_per_transaction", "max_worker_processes", "max_wal_senders")


class Plan(NamedTuple):
    """`steps`: who is restarted, one after the other; a standby may come twice. `because`: what the order depends on, "" if on nothing."""

    steps: tuple[str, ...]
    because: str


def plan(members: Mapping[str, Mapping[str, Any]], *, leader: str) -> Plan:
    """`members`: those to restart, each with its pending_restart_reason, {parameter: {"old_value": …, "new_value": …}}."""
    raised, lowered = _moved(members, up=True), _moved(members, up=False)
    primary = (leader,) if leader in members else ()
    standbys = tuple(sorted(name for name in members if name != leader))
    if lowered and raised:
        again = tuple(name for name in standbys if any(p in members[name] for p in lowered))
        steps = (*standbys, *primary, *(again if primary else ()))
    else:
        steps = (*primary, *standbys) if lowered else (*standbys, *primary)
    said = [f"{', '.join(raised)} {'are' if len(raised) > 1 else 'is'} raised: standbys before the primary"] if raised else []
    said += [f"{', '.join(lowered)} {'are' if len(lowered) > 1 else 'is'} lowered: the primary before the standbys"] if lowered else []
    return Plan(steps, "; ".join(said) if primary and standbys else "")


def _moved(members: Mapping[str, Mapping[str, Any]], *, up: bool) -> list[str]:
    return [name for name in STANDBY_AT_LEAST if any(_direction(pending.get(name)) == (1 if up else -1) for pending in members.values())]


def _direction(change: Any) -> int:
    """1: raised, -1: lowered, 0: neither, or not known."""
    try:
        before, after = int(change["old_value"]), int(change["new_value"])
    except (KeyError, TypeError, ValueError):
        return 0
    return (after > before) - (after < before)


def said(steps: tuple[str, ...], leader: str) -> str:
    """"n2, n3, n1 (primary)"."""
    return ", ".join(f"{name} (primary)" if name == leader else name for name in steps)
