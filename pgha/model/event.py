"""What has happened on a node, one struct a kind: the words of GET /pgha/events and `pgha ctl watch`.

On the wire each is one JSON object: `id`, `at` (UTC), `node`, `kind`, then these fields, all of them always. Fields may be
added in later versions, never taken away or renamed.
"""

from __future__ import annotations

from typing import Any, Literal

from msgspec import Struct

from pgha.model.decision import Reason


class Event(Struct, frozen=True, kw_only=True, tag_field="kind", tag="event"):
    """The common part. `kind` is the struct's tag."""


class AgentEvent(Event, frozen=True, kw_only=True, tag="agent"):
    """The agent itself."""

    what: Literal["started", "stopping"]
    version: str


class DecisionEvent(Event, frozen=True, kw_only=True, tag="decision"):
    """The loop decides something else than before; as in the log, not when only numbers in it change."""

    situation: str
    summary: str
    paused: bool
    reasons: tuple[Reason, ...]


class RoleEvent(Event, frozen=True, kw_only=True, tag="role"):
    """This node's role or PostgreSQL's state is another. Words as GET /patroni has them."""

    role: str
    state: str
    timeline: int
    was_role: str
    was_state: str


class LockEvent(Event, frozen=True, kw_only=True, tag="lock"):
    """The leader lock.

    Of this node's own: `taken`, `lost` (also when its time is over), `released`, `late` (not renewed for `age_s`, longer than
    two intervals and a half second) and `renewed` (late, but in time: after `age_s`). As this node sees the cluster: `holder`,
    another holds it ("" = nobody).
    """

    what: Literal["taken", "lost", "released", "late", "renewed", "holder"]
    holder: str
    was: str = ""
    epoch: int = 0
    age_s: float | None = None
    why: str = ""


class LagEvent(Event, frozen=True, kw_only=True, tag="lag"):
    """A member's received WAL is behind the leader's by more than `limit_bytes` (`over`), or by less than half of it again."""

    member: str
    over: bool
    lag_bytes: int
    limit_bytes: int


class OperationEvent(Event, frozen=True, kw_only=True, tag="operation"):
    """A long operation of this node. `ok` only when it ends."""

    what: Literal["begin", "progress", "end"]
    operation: str
    number: int
    detail: str = ""
    progress: str = ""
    ok: bool | None = None
    why: str = ""
    took_s: float | None = None


class Changed(Struct, frozen=True, kw_only=True):
    """One key; None: it was not there, or is not there any more. Secrets are `***`."""

    key: str
    was: Any
    now: Any


class ConfigurationEvent(Event, frozen=True, kw_only=True, tag="configuration"):
    """The shared configuration in the store is another. `more`: changed keys beyond those that are listed."""

    revision: int
    changed: tuple[Changed, ...]
    more: int = 0


class MemberEvent(Event, frozen=True, kw_only=True, tag="member"):
    """A member's key in the store, as this node sees it. `left`: it has expired or was removed."""

    what: Literal["joined", "left", "changed"]
    member: str
    role: str
    state: str
    timeline: int
    was_role: str = ""
    was_state: str = ""


class Hello(Event, frozen=True, kw_only=True, tag="hello"):
    """The first message to every reader. Its `id` is where the reader begins: what follows that."""

    scope: str
    version: str
    oldest: str


class Gap(Event, frozen=True, kw_only=True, tag="gap"):
    """Not everything after the id that the reader gave can be told.

    `restarted`: that id is of another run of an agent, or of another member; `missed` is unknown then. `dropped`: as many
    events (of all kinds) were forgotten meanwhile. What is kept follows.
    """

    reason: Literal["restarted", "dropped"]
    after: str
    missed: int | None


#: what has happened, as a reader may ask for it (`?kinds=`)
KINDS = ("agent", "decision", "role", "lock", "lag", "operation", "configuration", "member")
