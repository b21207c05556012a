"""All that a decision may know: one frozen value a pass. It serialises, so that any pass can be run again."""

from __future__ import annotations

from typing import Any, Literal

from msgspec import Struct

from pgha.clock import Instant
from pgha.model.cluster import ClusterView, LockSeen, Outsider, PausedHolder, Sync, Tags
from pgha.model.failsafe import FailsafeFacts
from pgha.model.lock import Identity, Licence
from pgha.model.node import DataDirectoryFacts, GuardFacts, PostgresFacts, WatchdogFacts
from pgha.model.request import Request
from pgha.model.wal import HistoryRow, Position


class SlotMatcher(Struct, frozen=True, kw_only=True):
    """An entry of `ignore_slots`: matches a slot that has all that is given here."""

    name: str = ""
    type: str = ""
    database: str = ""
    plugin: str = ""


class Settings(Struct, frozen=True, kw_only=True):
    """What of the configuration decisions depend on. Effective values; units in the names."""

    ttl_s: float = 30.0
    loop_wait_s: float = 10.0
    retry_timeout_s: float = 10.0
    maximum_lag_on_failover_bytes: int = 1048576
    check_timeline: bool = False
    primary_start_timeout_s: float = 300.0
    primary_stop_timeout_s: float = 0.0
    primary_hang_timeout_s: float = 29.0
    crash_handover_after_s: float = 3.0
    member_slots_ttl_s: float = 1800.0
    max_timelines_history: int = 0
    pause: bool = False
    failsafe_mode: bool = False
    synchronous_mode: Literal["off", "on", "quorum"] = "off"
    synchronous_mode_strict: bool = False
    synchronous_node_count: int = 1
    maximum_lag_on_syncnode_bytes: int = -1   # -1: no limit
    use_pg_rewind: bool = False
    use_slots: bool = True
    remove_data_directory_on_rewind_failure: bool = False
    remove_data_directory_on_diverged_timelines: bool = False
    replica_methods: tuple[str, ...] = ("basebackup",)     # how a copy is made: tried in order …
    leaderless_methods: tuple[str, ...] = ()               # … those of them that need no running server to copy from …
    overwriting_methods: tuple[str, ...] = ()              # … and those that work on the data that is there
    pre_promote_s: float = 0.0               # how long the program that is asked before a promotion may take; 0: there is none
    before_stop_s: float = 0.0               # how long the program before a planned stop may take; 0: there is none
    permanent_slots: tuple[str, ...] = ()    # physical slots that every node keeps (`slots`)
    ignored_slots: tuple[SlotMatcher, ...] = ()  # never touched (`ignore_slots`, and what of `slots` is not kept by this version)
    may_drop_slots: bool = True              # false: the configuration does not say for certain which ones are to be kept
    has_bootstrap_section: bool = True
    mixed: bool = False                      # members of another make take part (safety model 14)
    tags: Tags = Tags()
    watchdog_required: bool = False
    may_compact_store: bool = True
    store_quota_bytes: int = 0               # 0: as the store says
    configuration_changed: bool = False  # PostgreSQL's files do not hold the effective configuration yet
    dynamic_config: bytes = b""          # the shared configuration as last known, to restore a missing key
    postgres_host: str = ""              # how peers reach this PostgreSQL: connect_address
    postgres_port: int = 5432


class StoreCapacity(Struct, frozen=True, kw_only=True):
    """How full the store is, as the leader asked it last (safety model 16). 0 = unknown.

    `day_old_revision`: a revision that is at least a day old, as far as this process has been watching.
    `compacted_at`: when somebody last compacted, as seen here; None: not since this process watches.
    """

    asked_at: Instant
    watched_since: Instant
    used_bytes: int = 0
    quota_bytes: int = 0
    alarms: tuple[str, ...] = ()
    compact_revision: int = 0
    compacted_at: Instant | None = None
    day_old_revision: int = 0


class DcsFacts(Struct, frozen=True, kw_only=True):
    """The store, as this node sees it. `view` None: never read since the start.

    `trusted_from`: the store has changed its generation (restored, rebuilt); until then no release is believed, and
    no record is anybody's by right (safety model 4). None: nothing is wrong.
    """

    view: ClusterView | None = None
    lock_seen: LockSeen = LockSeen()
    heard_at: Instant | None = None       # last sign of life of the store (event, answered read or write)
    read_at: Instant | None = None        # when the last successful linearizable read was *begun*
    unreachable_since: Instant | None = None
    why: str = ""
    trusted_from: Instant | None = None
    generation_changed: str = ""
    capacity: StoreCapacity | None = None
    remembered_pause: PausedHolder | None = None  # persisted; None: the last record that can be believed was not paused
    remembered_sync: Sync | None = None   # persisted: /sync before the store went back, which shows another and that has not been written since
    outsider: Outsider | None = None      # the member of another make that leads, or led last
    remembered_ttl_s: float = 0.0         # largest ttl seen in a record, persisted
    remembered_identifier: str = ""       # the last system identifier that the store gave for the cluster, persisted
    remembered_members: dict[str, str] = {}   # name → api_url of members seen within member_slots_ttl
    remembered_slots: tuple[str, ...] = ()    # that the leader's status names and no member here has, first seen within member_slots_ttl
    last_positions: dict[str, Position] = {}  # last position that each member published, also if its key is gone


class Peer(Struct, frozen=True, kw_only=True):
    """What a member answered when asked, or that it did not (`answered` false, `why`)."""

    name: str
    asked_at: Instant
    answered: bool = False
    why: str = ""
    silent_since: Instant | None = None  # first of an unbroken row of questions without an answer
    is_pgha: bool = False
    in_recovery: bool | None = None
    timeline: int = 0
    lsn: int = 0
    frozen_epoch: int = -1               # the epoch for which it stopped streaming and gives this as its vote
    running: bool = False
    candidate: bool = True               # false: it says that it would not take the lock now
    tags: Tags = Tags()
    watchdog_failed: bool = False
    system_identifier: str = ""
    history: tuple[HistoryRow, ...] = ()  # of its timeline, if it says


class Upstream(Struct, frozen=True, kw_only=True):
    """What an inspection of the leader's PostgreSQL found (replication connection)."""

    name: str
    asked_at: Instant
    ok: bool = False
    why: str = ""
    system_identifier: str = ""
    timeline: int = 0
    lsn: int = 0
    in_recovery: bool = False
    unreached: bool = False              # not ok, since no server was there to answer
    history: tuple[HistoryRow, ...] = ()


class WrittenNames(Struct, frozen=True, kw_only=True):
    """What synchronous_standby_names PostgreSQL's files were last written with: `names`, None = the operator's own.

    `told` false: a former agent wrote them, and this one has not said yet what they are to be.
    """

    told: bool = True
    names: str | None = None


#: Operation.progress while the operator's program runs before a planned stop: PostgreSQL still serves.
BEFORE_STOP = "before_stop"


class Operation(Struct, frozen=True, kw_only=True):
    """A long operation: the one in flight, or the last that ended."""

    kind: str
    id: int
    started_at: Instant
    detail: str = ""
    progress: str = ""                   # "1.2 GiB of 3.4 GiB"
    ended_at: Instant | None = None
    ok: bool = False
    why: str = ""
    cancelling: bool = False
    facts: dict[str, Any] = {}

    @property
    def running(self) -> bool:
        return self.ended_at is None


class Observation(Struct, frozen=True, kw_only=True):
    """One pass's knowledge."""

    now: Instant
    wall_s: float
    number: int                          # of this pass
    me: Identity
    settings: Settings
    dcs: DcsFacts = DcsFacts()
    licence: Licence = Licence()
    postgres: PostgresFacts = PostgresFacts()
    directory: DataDirectoryFacts = DataDirectoryFacts()
    guard: GuardFacts = GuardFacts()
    watchdog: WatchdogFacts = WatchdogFacts()
    failsafe: FailsafeFacts = FailsafeFacts()
    peers: dict[str, Peer] = {}
    upstream: Upstream | None = None
    configured_upstream: str = ""        # whom PostgreSQL's files were last written to follow
    written_names: WrittenNames = WrittenNames()
    operation: Operation | None = None   # in flight
    ended: Operation | None = None       # the last one that ended
    requests: tuple[Request, ...] = ()
    shutting_down: bool = False
