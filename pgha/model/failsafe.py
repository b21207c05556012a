"""The words of the DCS failsafe mode (safety model 12): what a leader asks of the others while the store is away, and
what one of them has promised."""

from __future__ import annotations

from msgspec import Struct

from pgha.clock import Instant, candidate_age_s
from pgha.model.lock import LockRecord, wait_s


class Ping(Struct, frozen=True, kw_only=True):
    """POST /failsafe: a leader asks this node not to take over for another `ttl_s`.

    The first four are the reference's; the others stand in the field "pgha", and are None or empty in a Patroni's ping.
    `to`: the member that it was meant for; `sequence`: of the licence that the round is to give.
    """

    name: str
    conn_url: str = ""
    api_url: str = ""
    slots: dict[str, int] = {}
    to: str = ""
    incarnation: str = ""
    sequence: int = 0
    epoch: int | None = None
    ttl_s: float | None = None


class Promise(Struct, frozen=True, kw_only=True):
    """Accepted: this node sends no take-over before `accepted_at` + `ttl_s` and drift, on its own clock.

    `name` empty: made by nobody's ping, but by the doubt whether one was accepted before this machine was booted.
    """

    name: str
    accepted_at: Instant
    ttl_s: float
    incarnation: str = ""
    epoch: int = 0
    sequence: int = 0
    conn_url: str = ""
    api_url: str = ""
    slots: dict[str, int] = {}

    def left_s(self, now: Instant) -> float:
        """Seconds for which it still binds; 0 or less: it does not any more."""
        return wait_s(self.ttl_s) - candidate_age_s(self.accepted_at, now)

    def is_superseded_by(self, record: LockRecord | None) -> bool:
        """A record that the same process wrote after it had asked: from then on the record alone says when it ends."""
        return record is not None and bool(self.incarnation) and record.incarnation == self.incarnation and record.sequence > self.sequence

    def binds(self, record: LockRecord | None, now: Instant) -> bool:
        """Does it forbid a take-over of `record` now?"""
        return self.left_s(now) > 0 and not self.is_superseded_by(record)


class FailsafeOrder(Struct, frozen=True, kw_only=True):
    """The loop's word to the rounds: whom all to ask (name → api_url; empty: nobody but this node counts), and the
    positions of this node's slots, which the others advance theirs to."""

    members: dict[str, str] = {}
    slots: dict[str, int] = {}


class FailsafeFacts(Struct, frozen=True, kw_only=True):
    """`promise`: the last one given. `missing`: who did not accept in the last round of this node, and why."""

    promise: Promise | None = None
    missing: dict[str, str] = {}
