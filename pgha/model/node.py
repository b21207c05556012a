"""What is so on this node: PostgreSQL, its data directory, the guard, the watchdog device."""

from __future__ import annotations

from typing import Any, Literal

from msgspec import Struct

from pgha.clock import Deadline, Instant
from pgha.model.wal import HistoryRow

#: How the postmaster stands, as far as processes and its pid file tell, without asking it.
Process = Literal["absent", "starting", "running", "stopping"]
#: What the latest probe got: an SQL answer; a refusal because it starts, recovers or stops; no answer by the deadline;
#: no connection at all; nothing was asked yet.
Answer = Literal["sql", "starting", "silent", "refused", "none"]


class WalReceiver(Struct, frozen=True, kw_only=True):
    """The standby's connection to its upstream, if there is one."""

    status: str = ""
    sender_host: str = ""
    sender_port: int = 0
    slot_name: str = ""
    timeline: int = 0
    latest_end_lsn: int = 0


class Slot(Struct, frozen=True, kw_only=True):
    """One replication slot of this server."""

    name: str
    type: str = "physical"
    active: bool = False
    restart_lsn: int = 0
    wal_status: str = ""
    plugin: str = ""
    database: str = ""
    temporary: bool = False
    holds_back_vacuum: bool = False     # its reader's feedback (xmin) is kept in it, also when it has gone


class Row(Struct, frozen=True, kw_only=True):
    """The probe's SQL answer. LSNs in bytes; 0 = not applicable or unknown."""

    in_recovery: bool
    timeline: int = 0
    lsn: int = 0                    # primary: flushed
    received_lsn: int = 0           # standby: written or received
    replayed_lsn: int = 0
    replayed_timestamp: str = ""
    replay_paused: bool = False
    receiver: WalReceiver | None = None
    replication: tuple[dict[str, Any], ...] = ()   # rows of pg_stat_replication, as REST shows them plus LSNs
    slots: tuple[Slot, ...] = ()
    started_at: str = ""            # pg_postmaster_start_time(), text
    started_at_s: float = 0.0       # the same, epoch seconds
    configuration_loaded_at: str = ""   # pg_conf_load_time(), text
    server_version: int = 0
    system_identifier: str = ""
    synchronous_standby_names: str = ""
    checkpointer_rests: bool = True # so it has read the settings; until it has, backends do not know that they are to wait
    startup_rests: bool = True      # a standby's startup process has replayed what it has, and waits for more
    primary_conninfo: str = ""
    primary_slot_name: str = ""
    restore_command: str = ""
    limits: dict[str, int] = {}     # of model/rolling.STANDBY_AT_LEAST: as this server runs
    pending_restart: dict[str, tuple[str, str]] = {}   # parameter → (running value, wanted value)

    @property
    def position(self) -> int:
        """The end of what this server has: a primary's flushed LSN, a standby's received or replayed, whichever is further."""
        return max(self.received_lsn, self.replayed_lsn) if self.in_recovery else self.lsn


class PostgresFacts(Struct, frozen=True, kw_only=True):
    """PostgreSQL as last observed. `row` is the last SQL answer of *this* postmaster, `row_at` when it was asked for."""

    process: Process = "absent"
    pid: int = 0
    since: Instant | None = None         # since when `process` has been so
    ever_started: bool = False           # this agent has seen a postmaster here
    answer: Answer = "none"
    answered_at: Instant | None = None   # last sign of life: SQL, a refusal with a startup answer, WAL progress
    row: Row | None = None
    row_at: Instant | None = None
    orphans: bool = False                # server processes live without a postmaster
    why: str = ""                        # the latest failure to get an answer

    @property
    def alive(self) -> bool:
        return self.process != "absent"

    @property
    def is_primary(self) -> bool:
        """Out of recovery by the last answer of this postmaster (unknown counts as no: see `may_write`)."""
        return self.row is not None and not self.row.in_recovery and self.alive


class Control(Struct, frozen=True, kw_only=True):
    """What pg_control says (pg_controldata)."""

    state: str
    system_identifier: str
    timeline: int
    checkpoint_lsn: int
    redo_lsn: int = 0
    min_recovery_lsn: int = 0
    min_recovery_timeline: int = 0
    checksums: bool = False
    wal_log_hints: bool = False
    limits: dict[str, int] = {}     # of model/rolling.STANDBY_AT_LEAST: of the primary whose WAL was replayed last


class DataDirectoryFacts(Struct, frozen=True, kw_only=True):
    """The data directory as last looked at. `state` "unreadable" must never be taken for "empty"."""

    state: Literal["unknown", "missing", "empty", "valid", "partial", "unreadable"] = "unknown"
    why: str = ""
    control: Control | None = None
    standby_signal: bool = False
    end_of_wal: int = 0                  # of a stopped server, once asked for; 0 = not known
    end_of_wal_timeline: int = 0
    history: tuple[HistoryRow, ...] = ()  # of timeline `history_of`, the own one when the directory was read
    history_of: int = 0                  # 0: not told
    major_version: int = 0
    rewind_interrupted: bool = False     # a rewind was begun and not ended: rewound again, or cloned; never started
    unfinished_copy: bool = False        # half a copy, made in place: unless one runs now, the next goes on from it or clears it away
    #: A bootstrap was begun and not ended, or (unfinished_copy) a copy that replaces what waits beside: unless one runs now,
    #: what is there is nobody's, and what waits comes back.
    abandoned_bootstrap: bool = False
    bootstrap_unregistered: bool = False  # a bootstrap ended, and nothing was started since: the cluster's only if `initialize` says so

    def history_on(self, timeline: int) -> tuple[HistoryRow, ...] | None:
        """The history of the own `timeline`; None if the directory cannot be read, or was last read on another one: a standby goes over to its
        upstream's new timeline at any moment, and the old history, compared with the new one, looks like another promotion."""
        return self.history if self.state == "valid" and self.history_of in (0, timeline) else None


class GuardFacts(Struct, frozen=True, kw_only=True):
    """The guard's last acknowledgement."""

    reachable: bool = False
    state: str = ""                      # idle, armed, paused, latched, standby, offline
    fence_at: Deadline | None = None
    pid: int = 0
    why: str = ""


class WatchdogFacts(Struct, frozen=True, kw_only=True):
    """The watchdog device. `failed`: required, but not usable."""

    mode: str = "off"
    active: bool = False
    failed: bool = False
    timeout_s: float = 0.0
    why: str = ""
