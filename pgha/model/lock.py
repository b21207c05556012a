"""The lock record and the licence to write that follows from it (safety model 2 and 3)."""

from __future__ import annotations

from enum import StrEnum
from typing import Literal

from msgspec import Struct

from pgha.clock import DRIFT, NEVER, Deadline, Instant

LockMode = Literal["held", "paused", "released"]

#: Members of another make raise a lower ttl to this one, each for itself: what both sides count on is no less (safety model 14).
MIXED_TTL_S = 20.0
#: A keep-alive may have been acknowledged by a store's leader that was none any more, for so long (1.8 s, measured).
LEASE_DOUBT_S = 2.0


class LockRecord(Struct, frozen=True, kw_only=True, omit_defaults=False):
    """The value of `pgha/lock`. `sequence` counts the renewals of one incarnation from 1.

    `mixed`: members of another make take part. While the record is held, the key `leader` is then leased, so that they may
    take over; in pause it is not, since nobody is to (safety model 14). Whoever takes over goes on with that.

    Fields that a newer version adds are ignored when reading: whoever takes over writes its own record in any case.
    """

    holder: str
    node_id: str
    incarnation: str
    sequence: int
    ttl_s: float
    mode: LockMode = "held"
    lsn: int = 0
    timeline: int = 0
    mixed: bool = False


class Epoch(Struct, frozen=True, kw_only=True):
    """The value of `pgha/epoch`: how many takeovers there were, and the timeline claimed by the latest.

    `claims` are the claims of former epochs that nobody is known to have completed, newest last; a later promotion
    takes a number above all of them. `timeline` is 0 while the holder has not claimed one (it may never need to).
    """

    number: int
    holder: str
    incarnation: str
    timeline: int = 0
    claims: tuple[tuple[int, str], ...] = ()


class Identity(Struct, frozen=True, kw_only=True):
    """Who this agent is. `node_id` outlives restarts (state directory), `incarnation` is made at each start."""

    name: str
    node_id: str
    incarnation: str


class LicenceState(StrEnum):
    """What this process knows of its own lock."""

    NONE = "none"            # nothing of this incarnation is known to be committed
    ACQUIRING = "acquiring"  # a take-over or re-adoption was sent and is not settled
    HELD = "held"            # committed, and valid until `valid_until`
    RELEASING = "releasing"  # a release was sent: never renewed again
    LOST = "lost"            # another's record was seen in place of ours


class Licence(Struct, frozen=True, kw_only=True):
    """This incarnation's licence to let PostgreSQL accept writes, as the renewer knows it now."""

    state: LicenceState = LicenceState.NONE
    sequence: int = 0
    ttl_s: float = 0.0
    since: Instant | None = None        # first send of the last committed sequence; None: none was committed
    valid_until: Deadline | None = None
    shortened_at: Instant | None = None  # first send of a write that ends it earlier and is not settled
    revision: int = 0                   # of the committed record
    epoch: int = 0
    epoch_revision: int = 0
    mode: LockMode = "held"
    acquired_pass: int = 0              # the loop's pass in which it was acquired: promotion needs a later one
    failing_since: Instant | None = None  # renewals have failed since then
    failing_why: str = ""
    lost_to: str = ""                   # whose record replaced ours
    by_failsafe: bool = False           # `since` and `valid_until` come from a failsafe round: the store did not answer
    mixed: bool = False                 # of the committed record
    leader_revision: int = 0            # mixed: of `leader`, as this incarnation wrote it; 0: pure, or not written yet

    @property
    def endless(self) -> bool:
        """A record in mode `paused` is committed, and nothing was sent that may end it: pause is in force (safety model 11)."""
        return self.state is LicenceState.HELD and self.valid_until == NEVER


def licence_s(ttl_s: float) -> float:
    """How long a holder may rely on a record, from its first send: the ttl less what clocks may differ."""
    return ttl_s * (1 - DRIFT)


def licensed_until(record: LockRecord, since: Deadline) -> Deadline:
    """How long `record`, first sent at `since`, lets its holder write once it is committed: in pause without an end.

    In a mixed cluster the lease of `leader` was renewed after `since`, so this is the earlier of both ends.
    """
    if record.mode == "paused":
        return NEVER
    return since if record.mode == "released" else since.plus_s(licence_s(record.ttl_s) - (LEASE_DOUBT_S if record.mixed else 0.0))


def wait_s(ttl_s: float) -> float:
    """How long a candidate waits on its own clock before a record that it saw counts as expired."""
    return ttl_s * (1 + DRIFT)


def fence_budget_s(ttl_s: float) -> float:
    """How long before the licence's end the killing begins (safety model 15)."""
    return max(0.25, 0.05 * ttl_s)


def fence_at(licence_until: Deadline, ttl_s: float) -> Deadline:
    """The moment from which the guard kills every postmaster of this data directory."""
    return NEVER if licence_until == NEVER else licence_until.plus_s(-fence_budget_s(ttl_s))


def demote_at(licence_until: Deadline, ttl_s: float, *, since: Instant, loop_wait_s: float) -> Deadline:
    """When an orderly demotion begins if no renewal has been committed (safety model 8).

    Early enough for a fast shutdown, but not while an etcd election may still end well; in any case half a second
    before the fence. `since`: first send of what is not known to be committed after the last that is.
    """
    fence = fence_at(licence_until, ttl_s)
    wanted = fence.plus_s(-max(3.0, ttl_s / 3))
    not_before = since.plus_s(loop_wait_s + 3.0)
    latest = fence.plus_s(-0.5)
    begin = Instant(max(wanted.boot_ns, not_before.boot_ns), max(wanted.raw_ns, not_before.raw_ns))
    return Instant(min(begin.boot_ns, latest.boot_ns), min(begin.raw_ns, latest.raw_ns))
