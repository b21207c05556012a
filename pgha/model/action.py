"""What a decision asks for. An action carries all it needs; every write carries the revision it was decided on.

Three sorts: quick writes and questions, done in order within the pass (the first failure ends it); one long
`Operation` at most, which runs beside the loop; and `CancelOperation`.
"""

from __future__ import annotations

from typing import Literal

from msgspec import Struct


class Source(Struct, frozen=True, kw_only=True):
    """A PostgreSQL to connect to for replication, rewind or a clone."""

    name: str
    host: str
    port: int


# --- quick -----------------------------------------------------------------------------------------------------------

class ReadCluster(Struct, frozen=True, kw_only=True, tag=True):
    """A linearizable read of all keys; the next pass sees it."""


class AcquireLock(Struct, frozen=True, kw_only=True, tag=True):
    """Take the lock over (`readopt` false) or renew one's own record under this incarnation (`readopt` true).

    Compares the lock at `lock_revision` and `lock_value` (0: absent), the epoch at `epoch_revision`, and `sync`,
    `failsafe`, `config`, `leader` at theirs. `mixed`: write `leader` under a lease, too. `claim_timeline`: the number claimed for the coming promotion (0 with readopt).
    """

    lock_revision: int
    lock_value: bytes
    epoch_revision: int
    epoch_number: int
    also_unchanged: dict[str, int] = {}
    readopt: bool = False
    mixed: bool = False
    paused: bool = False                     # the new record is in mode `paused`: so was the one re-adopted, and the guard knows
    claim_timeline: int = 0
    claims: tuple[tuple[int, str], ...] = ()
    lsn: int = 0
    timeline: int = 0
    initialize_revision: int | None = None   # bootstrap's last write: `initialize` at this revision becomes …
    initialize_value: str = ""               # … this system identifier, and `config` is written, in the same transaction


class ReleaseLock(Struct, frozen=True, kw_only=True, tag=True):
    """Give the lock back. Only when no process of the data directory can write; the executor checks that again."""

    lsn: int
    timeline: int
    why: str


class StandDown(Struct, frozen=True, kw_only=True, tag=True):
    """In pause, PostgreSQL was stopped by hand or runs in recovery: have the guard hold it to that, then give the lock back,
    if this node has it."""

    lsn: int
    timeline: int
    why: str


class WriteKey(Struct, frozen=True, kw_only=True, tag=True):
    """A leader's guarded write: compares `pgha/epoch` and the key's own revision (0: absent). None deletes."""

    key: str
    value: bytes | None
    if_revision: int
    epoch_revision: int | None           # None: not a leader's write (an operator's key cleared by whoever may)


class WriteInitialize(Struct, frozen=True, kw_only=True, tag=True):
    """A member with a valid system identifier writes a missing `initialize` (create-only or from "")."""

    value: str
    if_revision: int


class Freeze(Struct, frozen=True, kw_only=True, tag=True):
    """Stop streaming for the election of `epoch`: empty primary_conninfo and restore_command, by reload."""

    epoch: int


class Follow(Struct, frozen=True, kw_only=True, tag=True):
    """Set the upstream (None: none) of the running standby by reload."""

    upstream: Source | None
    slot_name: str = ""


class MaintainSlots(Struct, frozen=True, kw_only=True, tag=True):
    """Drop, create and advance physical slots on this server, in this order."""

    create: tuple[str, ...] = ()
    advance: tuple[tuple[str, int], ...] = ()
    drop: tuple[str, ...] = ()


class RestoreStandbySignal(Struct, frozen=True, kw_only=True, tag=True):
    """At rest every data directory is a standby: write standby.signal again (safety model 7)."""


class AnswerRequest(Struct, frozen=True, kw_only=True, tag=True):
    """Tell an operator's request its outcome: HTTP status and text."""

    id: int
    status: int
    text: str


class ApplyConfiguration(Struct, frozen=True, kw_only=True, tag=True):
    """Write PostgreSQL's configuration files from the effective configuration and reload it."""

    force: bool = False


class SetSynchronousNames(Struct, frozen=True, kw_only=True, tag=True):
    """Write synchronous_standby_names and reload. None: what the operator's own parameters say (the modes are off)."""

    names: str | None


class CompactStore(Struct, frozen=True, kw_only=True, tag=True):
    """Forget the store's history before `revision` (safety model 16)."""

    revision: int


# --- long: operations ------------------------------------------------------------------------------------------------

class Bootstrap(Struct, frozen=True, kw_only=True, tag=True):
    """Win `initialize` (create-only), make a new cluster's data directory with its users, leave it stopped, a standby."""


class Clone(Struct, frozen=True, kw_only=True, tag=True):
    """Copy `source` into `<data_dir>.clone` and swap it in. `replace`: what to do with a data directory that is there.

    remove_first: keep the old one until the new one streams, if there is room for both; else remove it first. Only where
    the operator allows it, and a running primary of the same system identifier was verified just before.
    `methods`: names in `create_replica_methods`, tried in order; without a `source` only those that need none.
    """

    source: Source | None
    system_identifier: str
    methods: tuple[str, ...] = ("basebackup",)
    replace: Literal["nothing_there", "keep_old_until_streaming", "remove_first"] = "nothing_there"
    why: str = ""


class StartStandby(Struct, frozen=True, kw_only=True, tag=True):
    """Start PostgreSQL as a standby of `upstream` (None: of nobody)."""

    upstream: Source | None
    slot_name: str = ""


class StartPrimary(Struct, frozen=True, kw_only=True, tag=True):
    """Start PostgreSQL as primary, in place, without a new timeline. Needs the licence and an armed guard.

    `synchronous_names`: synchronous_standby_names before the first commit; None: the operator's own.
    """

    timeout_s: float
    first_start: bool = False
    synchronous_names: str | None = None


class Promote(Struct, frozen=True, kw_only=True, tag=True):
    """Promote from the timeline `leaving` to exactly `timeline`; `block` are the numbers between that are to be made unusable first.

    `synchronous_names`: what synchronous_standby_names must be when it begins; None: the operator's own.
    """

    timeline: int
    leaving: int
    block: tuple[int, ...]
    epoch: int
    synchronous_names: str | None = None


class PrePromote(Struct, frozen=True, kw_only=True, tag=True):
    """Ask the operator's program whether this node is to become primary, under the lock of `epoch`; silence is a no."""

    epoch: int
    limit_s: float


class Demote(Struct, frozen=True, kw_only=True, tag=True):
    """Stop accepting writes. `release`: then give the lock back with the final LSN.

    fast: checkpoint first (`checkpoint`), clients ended, walsenders drained. kill: the recipe, at once.
    `before_stop_s`: so long may the operator's program take first, if the licence leaves so much; 0: it is not run.
    """

    mode: Literal["fast", "kill"]
    release: bool
    checkpoint: bool
    why: str
    timeout_s: float
    before_stop_s: float = 0.0


class Stop(Struct, frozen=True, kw_only=True, tag=True):
    """Stop a standby (for a rewind, a clone, or because its data is foreign). `before_stop_s`: see Demote."""

    why: str
    timeout_s: float
    before_stop_s: float = 0.0


class Restart(Struct, frozen=True, kw_only=True, tag=True):
    """Stop and start again in the same role, because an operator asked or configuration needs it. `before_stop_s`: see Demote."""

    as_primary: bool
    timeout_s: float
    before_stop_s: float = 0.0
    request_id: int = 0
    upstream: Source | None = None
    slot_name: str = ""
    synchronous_names: str | None = None     # as primary: see StartPrimary


class InspectUpstream(Struct, frozen=True, kw_only=True, tag=True):
    """Ask the leader's PostgreSQL for its system identifier, timeline and history."""

    source: Source
    deadline_s: float = 5.0
    why: str = ""


class InspectEndOfWal(Struct, frozen=True, kw_only=True, tag=True):
    """Read the end of valid WAL of the stopped server."""


class Rewind(Struct, frozen=True, kw_only=True, tag=True):
    """pg_rewind from `source`."""

    source: Source
    why: str


class Sweep(Struct, frozen=True, kw_only=True, tag=True):
    """Kill what is left of a dead postmaster's processes."""


class AbandonDirectory(Struct, frozen=True, kw_only=True, tag=True):
    """Set the data directory aside under a numbered `.failed` name, or bring back what a copy there was to replace; nothing is removed."""

    why: str


class CancelOperation(Struct, frozen=True, kw_only=True, tag=True):
    """End the operation in flight. `while_in`: only if its progress is still this."""

    id: int
    why: str
    while_in: str = ""


QuickAction = (
    ReadCluster | AcquireLock | ReleaseLock | StandDown | WriteKey | WriteInitialize | Freeze | Follow | MaintainSlots
    | RestoreStandbySignal | AnswerRequest | ApplyConfiguration | SetSynchronousNames | CompactStore | CancelOperation
)
LongAction = (
    Bootstrap | Clone | StartStandby | StartPrimary | PrePromote | Promote | Demote | Stop | Restart | InspectUpstream
    | InspectEndOfWal | Rewind | Sweep | AbandonDirectory
)
Action = QuickAction | LongAction

