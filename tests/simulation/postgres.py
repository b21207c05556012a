"""A PostgreSQL of one node: data directory, postmaster, backends, WAL, replication. What it does, not what pgha believes of it.

The truth about WAL is a tree of `Branch`es: a promotion begins a new one; so does a server that writes where another has
written already, even if PostgreSQL gives it the same timeline number. A position is (branch, lsn), and whether one position
contains another can be told exactly. PostgreSQL itself, and with it this model's streaming, goes by numbers alone.

`Instance` is one node's. Its calls take effect at once or by events of the scheduler; whoever wants to know is told
through `on_change` (processes and files) and `exited` of each server.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal

from pgha.model.node import Row, Slot, WalReceiver
from pgha.model.wal import HistoryRow
from tests.simulation.network import Network
from tests.simulation.scheduler import Event, Scheduler
from tests.simulation.trace import Trace

SYSTEM = "7300000000000000001"
START_LSN = 16 << 20
CHECKPOINT_RECORD = 120
#: A walreceiver or walsender that hears nothing for so long ends.
WAL_TIMEOUT_S = 60.0
#: A standby without its upstream tries again this often (wal_retrieve_retry_interval as pgha sets it).
RETRY_S = 0.5


class Branch:
    """One line of WAL, written by one server after the other."""

    def __init__(self, number: int, parent: Branch | None, fork_lsn: int, claim: str = "") -> None:
        self.number = number            # PostgreSQL's timeline
        self.claim = claim              # what the history of the timeline before said last when it was copied
        self.parent = parent
        self.fork_lsn = fork_lsn
        self.end = fork_lsn             # how far it was ever written
        self.unseen = False             # begun by a server to which nobody could connect, under a number that was in use
        self.promised = 0               # highest LSN acknowledged that no later primary may lack
        self.acknowledged: list[tuple[int, int]] = []   # (lsn, ns), what clients were told, ascending

    @property
    def root(self) -> Branch:
        """The first line of this cluster."""
        return self if self.parent is None else self.parent.root

    def history(self) -> tuple[HistoryRow, ...]:
        rows: list[HistoryRow] = []
        at: Branch | None = self
        while at is not None and at.parent is not None:
            if at.number != at.parent.number:
                rows.append(HistoryRow(timeline=at.parent.number, switch_lsn=at.fork_lsn, reason="no recovery target specified", claim=at.claim))
            at = at.parent
        return tuple(reversed(rows))


def contains(branch: Branch, lsn: int, other: Branch, other_lsn: int) -> bool:
    """Does (branch, lsn) have everything up to (other, other_lsn)?"""
    at: Branch | None = branch
    limit = lsn
    while at is not None:
        if at is other:
            return other_lsn <= limit
        limit = min(limit, at.fork_lsn)
        at = at.parent
    return False


def common(branch: Branch, lsn: int, other: Branch, other_lsn: int) -> tuple[Branch, int]:
    """The last position that both have."""
    limits: dict[int, int] = {}
    at: Branch | None = branch
    limit = lsn
    while at is not None:
        limits[id(at)] = limit
        limit, at = min(limit, at.fork_lsn), at.parent
    at, limit = other, other_lsn
    while at is not None:
        if id(at) in limits:
            return at, min(limit, limits[id(at)])
        limit, at = min(limit, at.fork_lsn), at.parent
    raise AssertionError("no common root")


Content = Literal["missing", "empty", "partial", "valid"]
BLOCK: tuple[HistoryRow, ...] = ()


@dataclass(eq=False)
class DataDir:
    """Files. `lsn` is the end of WAL on disk; `histories` holds rows by number, `BLOCK` for a comment-only file."""

    content: Content = "missing"
    system_identifier: str = ""
    branch: Branch | None = None
    lsn: int = 0
    standby_signal: bool = False
    state: str = "shut down"
    control_timeline: int = 0
    checkpoint_lsn: int = 0
    min_recovery_lsn: int = 0
    min_recovery_timeline: int = 0
    histories: dict[int, tuple[HistoryRow, ...]] = field(default_factory=dict)
    claims: dict[int, str] = field(default_factory=dict)     # the comment at the end of a timeline's history
    pid_file: bool = False
    rewind_marker: str = ""             # from whom; a rewind was begun and not ended
    bootstrap_mark: str = ""            # "", "making", "made"
    wal_log_hints: bool = True
    mixed: bool = False                 # holds rows of two branches: what PostgreSQL would serve is nobody's history
    written: int = 0                    # counts writes of pg_control
    slots: dict[str, int] = field(default_factory=dict)     # name → position; no copy has them, and pg_rewind removes them
    slots_begin: dict[str, int] = field(default_factory=dict)   # … where each was made

    @property
    def timeline(self) -> int:
        return self.branch.number if self.branch is not None else 0

    def copy(self) -> DataDir:
        return DataDir(content=self.content, system_identifier=self.system_identifier, branch=self.branch, lsn=self.lsn, state=self.state,
                       control_timeline=self.control_timeline, checkpoint_lsn=self.checkpoint_lsn, min_recovery_lsn=self.min_recovery_lsn,
                       min_recovery_timeline=self.min_recovery_timeline, histories=dict(self.histories), wal_log_hints=self.wal_log_hints, mixed=self.mixed)


Phase = Literal["starting", "ready", "stopping"]


class Server:
    """One run of a postmaster and its children."""

    def __init__(self, pid: int, start_ticks: int, *, primary: bool) -> None:
        self.pid = pid
        self.start_ticks = start_ticks
        self.primary = primary              # out of recovery
        self.phase: Phase = "starting"
        self.postmaster_alive = True
        self.children_alive = True
        self.postmaster_frozen = False
        self.all_frozen = False
        self.hung = False                   # accepts connections, and answers nothing
        self.clients = True                 # its client backends live
        self.promoting = False
        self.stop_mode = ""
        self.pending_signals: list[str] = []    # of a stopped postmaster
        self.upstream: str | None = None        # as loaded; None: nobody
        self.slot_name = ""
        self.synchronous_standby_names = ""
        self.restore_command = ""
        self.stream: Stream | None = None       # to the upstream
        self.received = 0
        self.replayed = 0
        self.downstream: dict[str, Stream] = {}
        self.waiting: list[tuple[int, Callable[[str], None]]] = []   # commits that wait for standbys
        self.confirmed: dict[str, int] = {}
        self.exit_listeners: list[Callable[[], None]] = []
        self.retry: Event | None = None
        self.started_s = 0.0


class Stream:
    """A connection of a standby to its upstream."""

    def __init__(self, upstream: Instance, up: Server, downstream: Instance, down: Server) -> None:
        self.upstream, self.up, self.downstream, self.down = upstream, up, downstream, down
        self.open = True
        self.under_way = False
        self.broken_since_ns: int | None = None
        self.timer: Event | None = None


class Instance:
    """The PostgreSQL of one node. `name` is the node's, and its address."""

    def __init__(self, name: str, scheduler: Scheduler, network: Network, trace: Trace, peers: dict[str, Instance], truth: Any) -> None:
        self.name = name
        self._scheduler = scheduler
        self._network = network
        self._trace = trace
        self._peers = peers
        self._truth = truth                 # told of what counts: see checkers.Truth
        self._chance = scheduler.stream(f"postgres/{name}")
        self._pids = 0
        self.dir = DataDir()
        self.aside: list[DataDir] = []      # what was put away under another name
        self.replaced: list[DataDir] = []   # of those: by a clone, to be deleted once it streams
        self.removing: list[DataDir] = []   # of those: being deleted
        self.clone: DataDir | None = None   # <data_dir>.clone
        self.clone_whole = False
        self.server: Server | None = None
        self.single_user = False
        # postgresql.conf as it is on disk
        self.conf_upstream: str | None = None
        self.conf_slot = ""
        self.conf_restore_command = ""
        self.conf_synchronous = ""
        self.on_change: list[Callable[[str], None]] = []     # "started", "exited", "signal_removed", "role", "files"
        # faults
        self.host_up = True
        self.slow_start_s = 0.0
        self.slow_stop_s = 0.0
        self.disk_full = False
        self.disk_hung = False
        self.no_room = False                # for a second copy
        self.fail_programs = False          # rewinds and clones end half way
        self.work_s = 0.0                   # how much longer rewind and clone take
        self.accepting = False
        network.on_change.append(self._links_changed)

    # --- what is so --------------------------------------------------------------------------------------------------------

    @property
    def slots(self) -> dict[str, int]:
        return self.dir.slots

    def make_slot(self, name: str) -> None:
        self.dir.slots[name] = self.dir.slots_begin[name] = self.dir.lsn

    def drop_slot(self, name: str) -> None:
        del self.dir.slots[name]
        self._truth.slot_dropped(self, name)

    def advance_slot(self, name: str, lsn: int) -> int:
        self.dir.slots[name] = max(self.dir.slots[name], min(lsn, self.dir.lsn))
        return self.dir.slots[name]

    @property
    def lives(self) -> bool:
        """Some process of the directory lives."""
        return self.server is not None or self.single_user

    @property
    def postmaster(self) -> Server | None:
        return self.server if self.server is not None and self.server.postmaster_alive else None

    def _changed(self, what: str) -> None:
        self._update_accepting()
        for listener in list(self.on_change):
            listener(what)

    def _update_accepting(self) -> None:
        server = self.server
        now = (server is not None and server.primary and server.clients and server.children_alive and not server.all_frozen
               and server.phase == "ready")
        if now != self.accepting:
            self.accepting = now
            self._truth.accepting(self, now)

    def status(self) -> str:
        """The eighth line of postmaster.pid."""
        server = self.server
        return "" if server is None else "starting" if server.phase == "starting" else "stopping" if server.phase == "stopping" else "ready"

    def answers(self) -> bool:
        """Does a new session get SQL answers?"""
        server = self.server
        return (server is not None and server.postmaster_alive and server.phase == "ready" and not server.postmaster_frozen
                and not server.all_frozen and not server.hung and self.host_up)

    def refuses(self) -> bool:
        """Is a startup packet answered, if only by a refusal?"""
        server = self.server
        return server is not None and server.postmaster_alive and not server.postmaster_frozen and not server.all_frozen and self.host_up

    def row(self) -> Row:
        """The probe's answer."""
        server, data = self.server, self.dir
        assert server is not None
        assert data.branch is not None
        receiver = None
        stream = server.stream
        if stream is not None:
            receiver = WalReceiver(status="streaming", sender_host=stream.upstream.name, sender_port=5432, slot_name=server.slot_name,
                                   timeline=data.timeline, latest_end_lsn=data.lsn)
        if server.primary:
            replication = tuple(
                {"application_name": name, "usename": "replicator", "client_addr": name, "state": "streaming", "sync_state": self.sync_state(server, name),
                 "sync_priority": int(self.sync_state(server, name) != "async"), "pid": 1000 + i, "sent_lsn": data.lsn, "write_lsn": s.downstream.dir.lsn, "flush_lsn": s.downstream.dir.lsn,
                 "replay_lsn": s.downstream.dir.lsn}
                for i, (name, s) in enumerate(server.downstream.items()) if s.open)
        else:
            replication = ()
        active = {n for n, s in server.downstream.items() if s.open}
        slots = tuple(Slot(name=n, active=n in active, restart_lsn=lsn) for n, lsn in self.slots.items())
        conninfo = f"user=r host={server.upstream} port=5432 application_name={self.name}" if server.upstream else ""
        return Row(in_recovery=not server.primary, timeline=data.timeline, lsn=data.lsn if server.primary else 0,
                   received_lsn=0 if server.primary else server.received, replayed_lsn=0 if server.primary else server.replayed, receiver=receiver,
                   replication=replication, slots=slots, started_at=str(server.started_s), started_at_s=server.started_s, server_version=150000, system_identifier=data.system_identifier,
                   synchronous_standby_names=server.synchronous_standby_names, primary_conninfo=conninfo, primary_slot_name=server.slot_name,
                   restore_command=server.restore_command)

    # --- start and stop ----------------------------------------------------------------------------------------------------

    def start(self) -> Server | None:
        """Exec of the postmaster; None if it ends at once."""
        data = self.dir
        if not self.host_up or self.server is not None or data.content != "valid" or data.branch is None or self.disk_full:
            return None
        self._pids += 1
        server = self.server = Server(1000 + self._pids, self._pids, primary=not data.standby_signal)
        server.started_s = self._scheduler.now_s
        data.pid_file = True
        self._load(server)
        crash = data.state not in ("shut down", "shut down in recovery")
        took = 0.03 + 0.1 * self._chance.random() + self.slow_start_s
        if crash:
            took += self._chance.choice((0.05, 0.2, 1.0, 4.0, 8.0)) * self._chance.random()
        was_primary = not data.standby_signal
        data.state = "in crash recovery" if was_primary and crash else "starting up" if was_primary else "in archive recovery"
        data.written += 1
        self._trace(self.name, "postgres starts", primary=was_primary, timeline=data.timeline, lsn=data.lsn, pid=server.pid)
        if data.rewind_marker:
            self._truth.started_half_rewound(self)
        self._scheduler.after(took, self._started, server)
        self._changed("started")
        return server

    def _started(self, server: Server) -> None:
        if self.server is not server or server.phase != "starting" or not server.postmaster_alive:
            return
        if server.postmaster_frozen or server.all_frozen:
            server.pending_signals.append("started")
            return
        data = self.dir
        server.phase = "ready"
        if server.primary:
            data.state = "in production"
            data.written += 1
            self._truth.becomes_primary(self, "start")
            self._append(CHECKPOINT_RECORD)
            data.control_timeline, data.checkpoint_lsn = data.timeline, data.lsn - CHECKPOINT_RECORD
            data.min_recovery_lsn = data.min_recovery_timeline = 0
        else:
            server.replayed = data.lsn
            self._connect_soon(server, 0.01)
        self._trace(self.name, "postgres ready", primary=server.primary, timeline=data.timeline, lsn=data.lsn)
        self._changed("role")

    def _load(self, server: Server) -> None:
        server.upstream, server.slot_name = self.conf_upstream, self.conf_slot
        server.restore_command = self.conf_restore_command
        server.synchronous_standby_names = self.conf_synchronous

    def reload(self) -> None:
        """SIGHUP: takes effect in a few milliseconds."""
        self.signal("HUP")

    def signal(self, name: str) -> bool:
        """To the postmaster: HUP, INT, QUIT, TERM. A stopped one sees it when it goes on."""
        server = self.server
        if server is None or not server.postmaster_alive:
            return False
        if server.postmaster_frozen or server.all_frozen:
            server.pending_signals.append(name)
            return True
        if name == "HUP":
            self._scheduler.after(0.002 + 0.02 * self._chance.random(), self._reloaded, server)
        elif name in ("INT", "TERM"):
            self._stop_fast(server)
        elif name == "QUIT":
            self._scheduler.after(0.003, self._immediate, server)
        return True

    def _immediate(self, server: Server) -> None:
        if self.server is server and not server.postmaster_frozen and not server.all_frozen:
            self._die(server, "immediate shutdown")

    def _reloaded(self, server: Server) -> None:
        if self.server is not server or server.postmaster_frozen or server.all_frozen:
            return
        before = server.upstream
        self._load(server)
        if not server.primary:
            if before != server.upstream and server.stream is not None:
                self._close(server.stream)
            if server.upstream is not None and server.stream is None and server.phase == "ready":
                self._connect_soon(server, 0.005)
        self._release_waiting(server)

    def _stop_fast(self, server: Server) -> None:
        if server.phase == "stopping":
            return
        was_ready = server.phase == "ready"
        server.phase = "stopping"
        server.clients = False
        for _, answered in server.waiting:
            answered("warned")              # the wait is cancelled: WARNING, or the connection ends
        server.waiting.clear()
        if server.stream is not None:
            self._close(server.stream)
        self.dir.state = "shutting down" if server.primary else self.dir.state
        self._trace(self.name, "postgres stops", primary=server.primary)
        took = 0.03 + 0.15 * self._chance.random() + self.slow_stop_s
        self._scheduler.after(took, self._shut_down, server, was_ready)
        self._changed("stopping")

    def _shut_down(self, server: Server, was_ready: bool) -> None:
        """The shutdown checkpoint is written; walsenders then drain."""
        if self.server is not server or server.phase != "stopping" or not server.postmaster_alive:
            return
        if server.postmaster_frozen or server.all_frozen:
            self._scheduler.after(0.2, self._shut_down, server, was_ready)
            return
        if self.disk_full and server.primary:
            self._die(server, "PANIC: no space for WAL")
            return
        data = self.dir
        if server.primary and was_ready:
            self._append(CHECKPOINT_RECORD)
            data.state, data.control_timeline, data.checkpoint_lsn = "shut down", data.timeline, data.lsn - CHECKPOINT_RECORD
            data.min_recovery_lsn = data.min_recovery_timeline = 0
        elif not server.primary:
            data.state = "shut down in recovery"
            data.min_recovery_lsn, data.min_recovery_timeline = data.lsn, data.timeline
        data.written += 1
        self._drain(server, self._scheduler.now_ns)

    def _drain(self, server: Server, since_ns: int) -> None:
        if self.server is not server:
            return
        behind = [s for s in server.downstream.values() if s.open and s.downstream.dir.lsn < self.dir.lsn]
        if behind and self._scheduler.now_ns - since_ns < WAL_TIMEOUT_S * 1e9 and not server.all_frozen:
            self._scheduler.after(0.005, self._drain, server, since_ns)
            return
        self._exit(server, "stopped")

    def end_walsender(self, name: str) -> None:
        server = self.server
        if server is not None and name in server.downstream:
            self._close(server.downstream[name])

    def kill_all(self) -> int:
        """SIGKILL to everything of the directory; how many there were."""
        if self.single_user:
            self.single_user = False
            self._changed("exited")
            return 1
        server = self.server
        if server is None:
            return 0
        self._die(server, "killed")
        return 5

    def kill_postmaster(self) -> None:
        """SIGKILL to the postmaster alone: its backends do not know it, and go on."""
        server = self.server
        if server is None or not server.postmaster_alive:
            return
        server.postmaster_alive = False
        self._trace(self.name, "postmaster killed", orphans=server.children_alive)
        self._tell_exit(server)
        self._scheduler.after(1.0 + 8.0 * self._chance.random(), self._orphans_end, server)
        self._changed("exited")

    def _orphans_end(self, server: Server) -> None:
        if self.server is server:
            self._die(server, "orphans have ended")

    def crash(self) -> None:
        """One backend crashed: with restart_after_crash off everything ends."""
        server = self.server
        if server is not None and server.postmaster_alive and not server.postmaster_frozen:
            self._die(server, "crashed")

    def _die(self, server: Server, why: str) -> None:
        self._trace(self.name, "postgres died", why=why)
        self._exit(server, why)

    def _exit(self, server: Server, why: str) -> None:
        if self.server is not server:
            return
        told = not server.postmaster_alive
        server.postmaster_alive = server.children_alive = server.clients = False
        for _, answered in server.waiting:
            answered("lost")
        server.waiting.clear()
        if server.stream is not None:
            self._close(server.stream)
        for stream in list(server.downstream.values()):
            self._close(stream)
        if server.retry is not None:
            server.retry.cancel()
        self.server = None
        if why == "stopped":
            self.dir.pid_file = False
        if not told:
            self._tell_exit(server)
        self._changed("exited")

    def _tell_exit(self, server: Server) -> None:
        listeners, server.exit_listeners = server.exit_listeners, []
        for listener in listeners:
            listener()

    def freeze(self, *, everything: bool) -> None:
        server = self.server
        if server is not None:
            server.postmaster_frozen = True
            server.all_frozen = server.all_frozen or everything
            self._changed("frozen")

    def thaw(self) -> None:
        server = self.server
        if server is None or not (server.postmaster_frozen or server.all_frozen):
            return
        server.postmaster_frozen = server.all_frozen = False
        pending, server.pending_signals = server.pending_signals, []
        for name in pending:
            if name == "started":
                self._scheduler.after(0.001, self._started, server)
            else:
                self.signal(name)
        for stream in server.downstream.values():
            self._flow(stream)
        if server.stream is not None:
            server.stream.upstream._flow(server.stream)  # noqa: SLF001
        self._changed("thawed")

    # --- promotion ---------------------------------------------------------------------------------------------------------

    def request_promotion(self) -> None:
        """SIGUSR1 with a file `promote`."""
        server = self.server
        if server is None or server.primary or server.promoting:
            return
        server.promoting = True
        self._scheduler.after(0.02 + 0.06 * self._chance.random() + (self.slow_start_s if self._chance.random() < 0.3 else 0.0), self._signal_removed, server)

    def _signal_removed(self, server: Server) -> None:
        if self.server is not server or server.phase != "ready" or not server.postmaster_alive:
            return
        if server.postmaster_frozen or server.all_frozen:
            self._scheduler.after(0.05, self._signal_removed, server)
            return
        if server.stream is not None:
            self._close(server.stream)
        self.dir.standby_signal = False
        self._changed("signal_removed")
        self._scheduler.after(0.005 + 0.02 * self._chance.random(), self._promoted, server)

    def _promoted(self, server: Server) -> None:
        if self.server is not server or server.phase != "ready" or not server.postmaster_alive:
            return
        if server.all_frozen:
            self._scheduler.after(0.05, self._promoted, server)
            return
        data = self.dir
        assert data.branch is not None
        number = data.timeline + 1
        while number in data.histories:
            number += 1
        data.branch = Branch(number, data.branch, data.lsn, data.claims.get(data.timeline, ""))
        data.histories[number] = data.branch.history()
        data.min_recovery_timeline, data.min_recovery_lsn = number, data.lsn
        data.state = "in production"
        data.written += 1
        server.primary, server.promoting = True, False
        server.upstream = None
        self._trace(self.name, "postgres promoted", timeline=number, lsn=data.lsn)
        self._truth.becomes_primary(self, "promotion")
        self._append(CHECKPOINT_RECORD)
        self._changed("role")

    def checkpoint(self) -> None:
        data = self.dir
        if self.server is not None and self.server.primary:
            self._append(CHECKPOINT_RECORD)
            data.control_timeline, data.checkpoint_lsn = data.timeline, data.lsn - CHECKPOINT_RECORD
            data.min_recovery_lsn = data.min_recovery_timeline = 0
            data.written += 1

    # --- writing -----------------------------------------------------------------------------------------------------------

    def commit(self, size: int, answered: Callable[[str], None]) -> bool:
        """A client's commit: `answered("acked" | "warned" | "lost")` unless nothing is ever heard. False: not accepted."""
        server = self.server
        if not self.accepting or server is None or server.hung:
            return False
        if self.disk_full:
            self._die(server, "PANIC: no space for WAL")
            return False
        self._append(size)
        if hasattr(answered, "lsn"):
            answered.lsn = self.dir.lsn
        if server.synchronous_standby_names:
            server.waiting.append((self.dir.lsn, answered))
            self._release_waiting(server)
        else:
            answered("acked")
        return True

    def _append(self, size: int, *, serves: bool = True) -> None:
        """`serves` False: nobody can connect. What such a server writes (its last checkpoint) harms only if the data
        follows or serves afterwards without a rewind: `mixed` and the checker of timelines tell that."""
        data = self.dir
        branch = data.branch
        assert branch is not None
        if branch.end != data.lsn:
            # Somebody else has written here already: from now on there are two lines with one number.
            data.branch = branch = Branch(branch.number, branch, data.lsn)
            branch.unseen = not serves
            if serves:
                self._truth.forked(self)
        data.lsn += size
        branch.end = data.lsn
        server = self.server
        if server is not None:
            for stream in server.downstream.values():
                self._flow(stream)

    def confirmed(self, name: str, lsn: int, server: Server) -> None:
        if self.server is server and not server.all_frozen:
            server.confirmed[name] = lsn
            self._release_waiting(server)

    def _release_waiting(self, server: Server) -> None:
        if not server.waiting:
            return
        if not server.synchronous_standby_names:
            released, server.waiting = server.waiting, []
        else:
            upto = self.synchronous_lsn(server)
            released = [w for w in server.waiting if w[0] <= upto]
            server.waiting = [w for w in server.waiting if w[0] > upto]
        for _, answered in released:
            answered("acked")

    def synchronous_lsn(self, server: Server) -> int:
        """Up to where synchronous_standby_names is satisfied."""
        mode, number, names = parse_synchronous(server.synchronous_standby_names)
        connected = {n: server.confirmed.get(n, 0) for n, s in server.downstream.items() if s.open}
        chosen = sorted(connected) if names == ("*",) else [n for n in names if n in connected]
        if mode == "FIRST":
            chosen = chosen[:number]
        lsns = sorted((connected[n] for n in chosen), reverse=True)
        return lsns[number - 1] if len(lsns) >= number else 0

    def sync_state(self, server: Server, name: str) -> str:
        if not server.synchronous_standby_names:
            return "async"
        mode, number, names = parse_synchronous(server.synchronous_standby_names)
        connected = [n for n, s in server.downstream.items() if s.open]
        listed = sorted(connected) if names == ("*",) else [n for n in names if n in connected]
        if name not in listed:
            return "async"
        return "quorum" if mode == "ANY" else "sync" if listed.index(name) < number else "potential"

    # --- streaming ---------------------------------------------------------------------------------------------------------

    def _connect_soon(self, server: Server, after_s: float) -> None:
        if server.retry is not None:
            server.retry.cancel()
        server.retry = self._scheduler.after(after_s, self._connect, server)

    def _connect(self, server: Server) -> None:
        server.retry = None
        if self.server is not server or server.primary or server.phase != "ready" or server.stream is not None or not server.upstream:
            return
        if server.promoting:
            return
        if not self._try_to_stream(server):
            self._connect_soon(server, RETRY_S)

    def _try_to_stream(self, server: Server) -> bool:
        if server.all_frozen or server.postmaster_frozen or self.disk_full:
            return False
        source = self._peers.get(server.upstream or "")
        if source is None or source is self or not self._network.both_ways(self.name, source.name) or not source.answers():
            return False
        up, theirs, ours = source.server, source.dir, self.dir
        assert up is not None
        assert theirs.branch is not None
        assert ours.branch is not None
        if theirs.system_identifier != ours.system_identifier:
            return False
        if theirs.timeline == ours.timeline:
            if ours.lsn > theirs.lsn:
                return False
        else:
            rows = theirs.histories.get(theirs.timeline) or theirs.branch.history()
            switch = next((r.switch_lsn for r in rows if r.timeline == ours.timeline), None)
            if switch is None or ours.lsn > switch:
                return False
            if not self._fetch_histories(theirs, theirs.timeline):
                return False
        stream = server.stream = Stream(source, up, self, server)
        old = up.downstream.get(self.name)
        if old is not None:
            source._close(old)  # noqa: SLF001
        up.downstream[self.name] = stream
        self._trace(self.name, "streams", source=source.name, timeline=theirs.timeline, lsn=ours.lsn)
        source._flow(stream)  # noqa: SLF001
        self._changed("role")
        source._changed("role")  # noqa: SLF001
        return True

    def _fetch_histories(self, theirs: DataDir, timeline: int) -> bool:
        """What a walreceiver does before it streams another timeline. A history file that is there already is not fetched: a
        block of ours in its place hides it for ever."""
        ours = self.dir
        for number in range(ours.timeline + 1, timeline + 1):
            if number not in ours.histories:
                if number not in theirs.histories:
                    return False
                ours.histories[number] = theirs.histories[number]
        return ours.histories.get(timeline) != BLOCK

    def _flow(self, stream: Stream) -> None:
        """Send what the downstream lacks, one message under way at a time."""
        if not stream.open or stream.under_way or stream.up.all_frozen or stream.down.all_frozen:
            return
        if stream.downstream.dir.lsn >= self.dir.lsn and stream.downstream.dir.branch is self.dir.branch:
            return
        delay = self._network.delay_ns(self.name, stream.downstream.name)
        if delay is None:
            if self._network.both_ways(self.name, stream.downstream.name):
                self._scheduler.after(0.2, self._flow, stream)      # TCP sends again
            return
        stream.under_way = True
        self._scheduler.at(self._scheduler.now_ns + delay, self._arrived, stream, self.dir.branch, self.dir.lsn)

    def _arrived(self, stream: Stream, branch: Branch, lsn: int) -> None:
        stream.under_way = False
        if not stream.open or stream.down.all_frozen or stream.downstream.server is not stream.down:
            return
        stream.downstream._received(stream, branch, lsn)  # noqa: SLF001
        self._flow(stream)

    def _received(self, stream: Stream, branch: Branch, lsn: int) -> None:
        server, data = stream.down, self.dir
        if self.disk_full:
            self._die(server, "PANIC: no space for WAL")
            return
        assert data.branch is not None
        before = data.timeline
        if branch.number > before and not self._fetch_histories(stream.upstream.dir, branch.number):
            self._close(stream)         # its upstream was promoted, or follows one that was
            return
        if not contains(branch, lsn, data.branch, data.lsn) and not data.mixed:
            data.mixed = True
            self._truth.mixed(self, stream.upstream)
        data.branch, data.lsn = branch, max(lsn, data.lsn)
        server.received = server.replayed = data.lsn
        if data.timeline != before:
            data.min_recovery_timeline, data.min_recovery_lsn = data.timeline, data.lsn
            self._changed("role")
        for further in server.downstream.values():
            self._flow(further)
        up = stream.up
        if up.synchronous_standby_names or up.waiting:
            self._network.send(self.name, stream.upstream.name, stream.upstream.confirmed, self.name, data.lsn, up)
        else:
            up.confirmed[self.name] = data.lsn

    def _close(self, stream: Stream) -> None:
        if not stream.open:
            return
        stream.open = False
        if stream.timer is not None:
            stream.timer.cancel()
        if stream.up.downstream.get(stream.downstream.name) is stream:
            del stream.up.downstream[stream.downstream.name]
        down = stream.down
        if down.stream is stream:
            down.stream = None
            if stream.downstream.server is down and down.phase == "ready" and not down.primary:
                stream.downstream._connect_soon(down, RETRY_S)  # noqa: SLF001
        stream.downstream._changed("role")  # noqa: SLF001
        if stream.upstream.server is stream.up:
            stream.upstream._changed("role")  # noqa: SLF001

    def _links_changed(self) -> None:
        server = self.server
        if server is None:
            return
        for stream in list(server.downstream.values()):
            broken = not self._network.both_ways(self.name, stream.downstream.name)
            if broken and stream.timer is None:
                stream.timer = self._scheduler.after(WAL_TIMEOUT_S, self._close, stream)
            elif not broken and stream.timer is not None:
                stream.timer.cancel()
                stream.timer = None
            if not broken:
                self._flow(stream)

    # --- the host, and people --------------------------------------------------------------------------------------------------

    def power_off(self) -> None:
        self.host_up = False
        if self.server is not None:
            # Nobody is told: connections are silent until they time out.
            server = self.server
            self._trace(self.name, "power off")
            self._exit(server, "power off")
        self.single_user = False

    def power_on(self) -> None:
        self.host_up = True


@cache
def parse_synchronous(text: str) -> tuple[str, int, tuple[str, ...]]:
    """"FIRST 1 (a,b)", "ANY 2 (a,b,c)", "2 (a,b)", "a,b", "*" → (FIRST | ANY, number, names)."""
    mode, number, names = "FIRST", 1, text
    head, bracket, rest = text.partition("(")
    if bracket:
        words = head.split()
        mode = "ANY" if words and words[0].upper() == "ANY" else "FIRST"
        number = int(words[-1]) if words else 1
        names = rest.rstrip().rstrip(")")
    return mode, number, tuple(n.strip().strip('"') for n in names.split(",") if n.strip())
