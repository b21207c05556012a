"""What operators ask of one agent, and what it has taken on for later. How a moment and a version are written.

Pure: a moment is text with its distance from UTC, or epoch seconds; no zone of this machine plays a part.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime
from typing import Any, Literal

from msgspec import Struct

from pgha.clock import Instant

Kind = Literal["restart", "cancel_restart", "reinitialize", "switchover", "failover"]

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class Request(Struct, frozen=True, kw_only=True):
    """What an operator asked this agent for through REST. Switchovers travel in the DCS key.

    restart: `timeout_s`, and the conditions of a ScheduledRestart; with `schedule` it is for later. reinitialize: `force`
    (end what runs), `from_leader`.
    """

    id: int
    kind: Kind
    at: Instant
    options: dict[str, Any] = {}


class ScheduledRestart(Struct, frozen=True, kw_only=True):
    """A restart for later. `conditions`: restart_pending, role, postgres_version, timeout, as they were given, and still are to
    hold then. `postmaster_start_time`: of the server that is meant; another one has been restarted since. `begun`: its time
    has come, and it waits for nothing but its turn."""

    schedule: str
    postmaster_start_time: str = ""
    conditions: dict[str, Any] = {}
    begun: bool = False

    def published(self) -> dict[str, Any]:
        """As the member key has it (compatibility spec 1.2)."""
        started = {"postmaster_start_time": self.postmaster_start_time} if self.postmaster_start_time else {}
        return {"schedule": self.schedule, **self.conditions, **started}


class Reinitialisation(Struct, frozen=True, kw_only=True):
    """This node's data is to be replaced by a fresh copy, as request number `request` asked."""

    request: int
    asked_at: Instant
    from_leader: bool = False
    inspected: bool = False      # the leader was asked who it is; its answer is judged next


class ReinitialisationEnd(Struct, frozen=True, kw_only=True):
    """What became of the last one. `why`: it failed, and the data is as before."""

    request: int
    ok: bool
    why: str = ""


class NoZone(ValueError):
    """A moment without its distance from UTC: it would mean another one on each machine."""


def moment(text: str) -> datetime:
    """An ISO 8601 moment. NoZone, ValueError."""
    try:
        at = datetime.fromisoformat(text.strip())
        zoned = at.utcoffset() is not None
    except (ValueError, OverflowError):
        raise ValueError("is no moment in ISO 8601") from None
    if not zoned:
        raise NoZone("has no distance from UTC")
    return at


def epoch_s(at: datetime) -> float:
    """Seconds since 1970 in UTC."""
    return (at - _EPOCH).total_seconds()


def server_version(text: str) -> int:
    """'16.4' → 160004, as the server counts; '16' is 16.0, '9.6.3' is 90603. ValueError."""
    match = re.fullmatch(r"(\d{1,2})(?:\.(\d{1,3}))?(?:\.(\d{1,3}))?", text.strip(), re.ASCII)
    if match is None:
        raise ValueError("is no version of PostgreSQL, as 16 or 16.4")
    major, minor, patch = int(match[1]), int(match[2] or 0), match[3]
    if major < 10:
        return major * 10000 + minor * 100 + int(patch or 0)
    if patch is not None:
        raise ValueError("is no version of PostgreSQL, as 16 or 16.4")
    return major * 10000 + minor
