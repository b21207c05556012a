"""What the configuration store says about the cluster: every key, parsed, with the revision it was read at."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from msgspec import Struct

from pgha.clock import Instant
from pgha.model.lock import Epoch, LockRecord
from pgha.model.wal import Position


class Tags(Struct, frozen=True, kw_only=True):
    """A member's tags as they count for decisions (compatibility spec 6); `raw` is what it published."""

    nofailover: bool = False
    failover_priority: int = 1
    nosync: bool = False
    sync_priority: int = 1
    noloadbalance: bool = False
    clonefrom: bool = False
    replicatefrom: str | None = None
    nostream: bool = False
    raw: dict[str, Any] = {}

    @staticmethod
    def of(raw: dict[str, Any]) -> Tags:
        """`nofailover` wins over a priority; a priority of 0 or less means nofailover. Nonsense counts as absent."""
        def flag(key: str) -> bool:
            return raw.get(key) in (True, 1, "true", "True", "on", "yes", "1")

        raw = {k: v for k, v in raw.items() if not isinstance(v, float) or abs(v) < 1e15}      # JSON has no infinity

        def number(key: str) -> int:
            value = raw.get(key, 1)
            try:
                priority = int(value)
            except (TypeError, ValueError, OverflowError):
                return 1
            return priority if abs(priority) < 1 << 31 else 1

        nofailover = flag("nofailover") if "nofailover" in raw else number("failover_priority") <= 0
        nosync = flag("nosync") if "nosync" in raw else number("sync_priority") <= 0
        upstream = raw.get("replicatefrom")
        return Tags(
            nofailover=nofailover, failover_priority=0 if nofailover else number("failover_priority"),
            nosync=nosync, sync_priority=0 if nosync else number("sync_priority"),
            noloadbalance=flag("noloadbalance"), clonefrom=flag("clonefrom"),
            replicatefrom=upstream if isinstance(upstream, str) and upstream else None, nostream=flag("nostream"), raw=raw,
        )


class Member(Struct, frozen=True, kw_only=True):
    """One `members/<name>` key. `raw` is the whole object, with what we do not know."""

    name: str
    revision: int = 0
    lease: int = 0
    conn_url: str = ""
    api_url: str = ""
    host: str = ""
    port: int = 5432
    state: str = ""
    role: str = ""
    version: str = ""
    tags: Tags = Tags()
    xlog_location: int = 0
    receive_lsn: int = 0
    replay_lsn: int = 0
    replication_state: str = ""
    timeline: int = 0
    pause: bool = False
    checkpoint_after_promote: bool | None = None
    node_id: str = ""           # pgha's own; empty for a member of another make
    is_pgha: bool = False
    claim: str | None = None    # by which claim `timeline` began (model.wal.claim_of), once it `tells_claim`
    tells_claim: bool = False
    raw: dict[str, Any] = {}

    @property
    def lsn(self) -> int:
        """The furthest position that it published."""
        return max(self.xlog_location, self.receive_lsn, self.replay_lsn)


class Status(Struct, frozen=True, kw_only=True):
    """`status`: the leader's last position and the slots' positions."""

    optime: int = 0
    slots: dict[str, int] = {}
    retain_slots: tuple[str, ...] = ()
    raw: dict[str, Any] = {}


class Sync(Struct, frozen=True, kw_only=True):
    """`sync`: who may be promoted in the synchronous modes. Empty leader: the mode is not active."""

    leader: str = ""
    quorum: int = 0
    members: tuple[str, ...] = ()
    unreadable: bool = False    # there is something, which says nothing
    raw: dict[str, Any] = {}


class FailoverKey(Struct, frozen=True, kw_only=True):
    """`failover`: a switchover (with `leader`) or failover (without) that was asked for.

    `down_…`: an operator states that the holder of a paused lock is down; of which record, so that it is void as soon as
    that holder renews it (`pgha.holder_is_down` in the key).
    """

    leader: str = ""
    candidate: str = ""
    scheduled_at: str = ""
    down_incarnation: str = ""
    down_sequence: int = 0
    raw: dict[str, Any] = {}

    @property
    def empty(self) -> bool:
        return not (self.leader or self.candidate or self.scheduled_at)


class HistoryEntry(Struct, frozen=True, kw_only=True):
    """One row of `history`; `timestamp` and `leader` may be empty."""

    timeline: int
    lsn: int
    reason: str = ""
    timestamp: str = ""
    leader: str = ""


class LockSeen(Struct, frozen=True, kw_only=True):
    """The lock record as this node sees it. `record` None: the key is absent (or does not parse: then `foreign`).

    `since`: when this very revision was first seen here (a candidate's timer starts then; safety model 4).
    `absent_since`: first linearizable read of an unbroken row of reads that found no key.
    """

    record: LockRecord | None = None
    revision: int = 0
    value: bytes = b""
    since: Instant | None = None
    absent_since: Instant | None = None


class Outsider(Struct, frozen=True, kw_only=True):
    """The member of another make that led last, as far as this process saw, by the leased key `leader`, and where its PostgreSQL is.

    `alone`: no lock record stood beside it, nor has since: nobody of ours led, so nobody of ours is to be waited for.
    """

    name: str
    host: str = ""
    port: int = 5432
    alone: bool = False


class PausedHolder(Struct, frozen=True, kw_only=True):
    """Who held the lock in pause when a record that can be believed was last seen: its server may write without an end."""

    name: str
    node_id: str
    incarnation: str


class ClusterView(Struct, frozen=True, kw_only=True):
    """All keys, as of one revision of the store. `revisions` has each key's own (0 = absent), by short name."""

    revision: int = 0
    initialize: str | None = None
    config: dict[str, Any] | None = None
    leader: str = ""
    leader_lease: int = 0
    lock: LockRecord | None = None
    lock_revision: int = 0
    lock_value: bytes = b""
    epoch: Epoch = Epoch(number=0, holder="", incarnation="")
    members: dict[str, Member] = {}
    status: Status = Status()
    failover: FailoverKey = FailoverKey()
    sync: Sync = Sync()
    history: tuple[HistoryEntry, ...] | None = None
    failsafe: dict[str, str] = {}
    revisions: dict[str, int] = {}
    leases: dict[str, int] = {}
    problems: tuple[str, ...] = ()

    @property
    def timeline(self) -> int:
        """The cluster's timeline as `history` tells it; 0 if unknown (compatibility spec 1.5)."""
        if self.history is None:
            return 0
        return self.history[-1].timeline + 1 if self.history else 1

    @property
    def is_mixed(self) -> bool:
        """Do members of another make take part, or have they since pgha's holder first saw one? The record says so for as long as
        no operator says otherwise: absent keys prove nothing (safety model 14)."""
        return bool(self.leader_lease or (self.lock is not None and self.lock.mixed) or any(m.version and not m.is_pgha for m in self.members.values()))

    @property
    def initialized(self) -> bool:
        """Does `initialize` hold a system identifier?"""
        return is_system_identifier(self.initialize)

    def revision_of(self, key: str) -> int:
        return self.revisions.get(key, 0)

    @property
    def published_position(self) -> Position:
        """The last position that a leader is known to have reached."""
        lock = self.lock
        if lock is not None and lock.lsn >= self.status.optime:
            return Position(timeline=lock.timeline, lsn=lock.lsn)
        return Position(timeline=lock.timeline if lock else 0, lsn=self.status.optime)


def is_system_identifier(text: str | None) -> bool:
    """At least ten characters, all digits: anything else counts as "not initialised" (compatibility spec 1.1)."""
    return text is not None and len(text) >= 10 and text.isascii() and text.isdigit()


#: NAMEDATALEN - 1, which PostgreSQL cuts a slot's name to.
_LIMIT = 63
_PLAIN = frozenset("abcdefghijklmnopqrstuvwxyz0123456789_")


def is_slot_name(text: str) -> bool:
    """Would PostgreSQL take it?"""
    return 0 < len(text) <= _LIMIT and _PLAIN.issuperset(text)


@lru_cache(maxsize=64)
def slot_name(member_name: str) -> str:
    """The slot of a member (compatibility spec 2.4; every agent of a cluster must map alike).

    "Node-1.a" → "node_1_a", "é" → "u0233". Two names may map to one slot: the caller looks out for that.
    """
    def plain(character: str) -> str:
        if character in _PLAIN:
            return character
        return "_" if character in "-." else f"u{ord(character):04d}"

    return "".join(plain(c) for c in member_name.lower())[:_LIMIT]
