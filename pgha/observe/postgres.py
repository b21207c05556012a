"""How is PostgreSQL? One task keeps the answer in `facts`; a hung server makes the answer old, never the loop late.

Processes are watched through a pidfd, so a death is noticed in milliseconds; questions in SQL are asked over one kept
connection, each with a deadline, every `interval_s`, and faster for a while after `hurry`.

Rules of this file:
* nothing here raises: what goes wrong is a fact (`answer`, `why`);
* on the death of a postmaster what it left is killed before anybody is told (safety model 8): orphaned backends go on
  acknowledging commits;
* an SQL answer of one postmaster is never shown as another's.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import trio
from msgspec.structs import replace

from pgha.clock import Clock, Instant, remaining_s
from pgha.errors import PostgresError, PostgresTimeout, PostgresUnreachable, QueryFailed
from pgha.log import Log
from pgha.machine import Machine
from pgha.model.node import Answer, PostgresFacts, Process, Row
from pgha.model.observation import Settings
from pgha.postgres.connection import Connection, resolve
from pgha.postgres.gucs import (
    FILES_SQL,
    SETTINGS_SQL,
    FileEntry,
    file_entries,
    running_settings,
    settings_argument,
)
from pgha.postgres.parameters import overridden, pending_restart
from pgha.postgres.probe import OPTIONS, read_row
from pgha.postgres.processes import Postmaster, read_postmaster_pid

log = Log("pgha.postgres")

#: A probe's whole budget.
PROBE_DEADLINE_S = 1.0
#: Between looks while something is about to change; later, when it has taken longer than SOON_S, less often.
HURRY_S = 0.03
CALM_HURRY_S = 0.2
SOON_S = 5.0
#: A hurry that nobody ends must not cost the CPU for long.
MAX_HURRY_S = 10.0
#: Whoever asks for the position is told one that is no older than this, a moment later.
POSITION_AGE_S = 0.25
#: So many looks at least fit into the time after which a silent server counts as one that hangs.
LOOKS_BEFORE_HANGING = 2.5
#: A reload reaches the backends within this time.
RELOAD_S = 0.3
#: What waits for a restart could not be asked: so much later it is again.
SETTINGS_AGAIN_S = 5.0
#: While it gives no SQL answer, or a standby has an upstream and does not stream from it.
UNSETTLED_S = 0.5
#: While commits wait for standbys: one that has gone is noticed within this time.
SYNCHRONOUS_S = 2.0
#: A server that starts or stops is asked for a sign of life this often; its pid file tells the rest.
SIGN_OF_LIFE_S = 0.5
#: Processes without a postmaster are orphans once they have been seen for this long: a postmaster that has just been
#: started needs a few milliseconds to write its pid file.
ORPHAN_AGE_S = 0.5

_PROCESS: dict[str, Process] = {"starting": "starting", "stopping": "stopping", "ready": "running", "standby": "running"}
#: The server refuses a session because it starts, recovers or stops.
_CANNOT_CONNECT_NOW = "57P03"


class PostgresObserver:
    """`conninfo()`: how to connect as superuser. `interval_s()`: between probes of a healthy server. `wanted()`: the
    settings that the server should have, by lower-case name, for telling what waits for a restart.

    `wake` is called after `facts` was replaced by something that may matter for a decision.
    """

    def __init__(self, *, data_dir: Path, machine: Machine, conninfo: Callable[[], Mapping[str, str | int]],
                 clock: Clock, interval_s: Callable[[], float], wake: Callable[[], None],
                 wanted: Callable[[], Mapping[str, str]] = dict) -> None:
        self._data_dir = data_dir
        self._machine = machine
        self._conninfo = conninfo
        self._clock = clock
        self._interval_s = interval_s
        self._wake = wake
        self._wanted = wanted
        self._pending: dict[str, tuple[str, str]] = {}
        self._overridden: dict[str, str] = {}
        self._settings_due: Instant | None = None
        self._loaded_at = ""        # when the server last read its configuration, by itself or told by anybody
        self._kick = trio.Event()
        self._hurry_until: Instant | None = None
        self._position_asked = False
        self._postmaster: Postmaster | None = None
        self._connection: Connection | None = None
        self._probing: trio.CancelScope | None = None
        self._unowned: tuple[int, Instant] | None = None     # processes without a postmaster: start ticks' limit, since
        self._looked_for_orphans_at: Instant | None = None
        self._sign_of_life_at: Instant | None = None
        self._wal_written_ns = 0
        self.facts = PostgresFacts()

    # --- what others may say -------------------------------------------------------------------------------------------

    def kick(self) -> None:
        """Look now."""
        self._kick.set()

    def hurry(self, for_s: float) -> None:
        """Something is about to change: look every few milliseconds for the next `for_s` seconds."""
        until = self._clock.now().plus_s(min(for_s, MAX_HURRY_S))
        if self._hurry_until is None or remaining_s(until, self._hurry_until) > 0:
            self._hurry_until = until
        self._kick.set()

    def position_asked(self) -> None:
        """Somebody compares positions: look now, unless that was just done, and tell the loop even if nothing else has changed."""
        row_at = self.facts.row_at
        if self._position_asked or row_at is None or remaining_s(row_at.plus_s(POSITION_AGE_S), self._clock.now()) > 0:
            return
        self._position_asked = True
        self._kick.set()

    def configuration_changed(self) -> None:
        """A reload was sent: ask again what waits for a restart, once its effect is there."""
        self._settings_due = self._clock.now().plus_s(RELOAD_S)
        self.hurry(2 * RELOAD_S)

    # --- the task ------------------------------------------------------------------------------------------------------

    async def run(self, *, task_status: Any = trio.TASK_STATUS_IGNORED) -> None:
        """Keep `facts` true. Never returns; cancelling it leaves PostgreSQL alone."""
        try:
            async with trio.open_nursery() as nursery:
                task_status.started()
                while True:
                    self._kick = trio.Event()
                    try:
                        await self._once(nursery)
                    except OSError as error:     # the directory cannot be looked into; what was seen last grows old
                        self._set(replace(self.facts, why=f"{error.filename}: {error.strerror}"))
                    with trio.move_on_after(self._next_in_s()):
                        await self._kick.wait()
        finally:
            self._disconnect()

    async def _once(self, nursery: trio.Nursery) -> None:
        if self._postmaster is None and (found := self._machine.adopt()) is not None:
            self._appeared(found)
            nursery.start_soon(self._watch, found)
        if self._postmaster is None:
            self._look_for_orphans()
            return
        with trio.CancelScope() as self._probing:
            await self._look(self._postmaster)
        self._probing = None

    def _next_in_s(self) -> float:
        now, facts = self._clock.now(), self.facts
        wait_s = self._interval_s()
        if facts.process in ("starting", "stopping") and facts.since is not None:
            wait_s = min(wait_s, HURRY_S if remaining_s(facts.since.plus_s(SOON_S), now) > 0 else CALM_HURRY_S)
        elif facts.process == "running" and (facts.answer != "sql" or not _as_it_should_be(facts.row)):
            wait_s = min(wait_s, UNSETTLED_S)
        elif facts.row is not None and facts.row.synchronous_standby_names and not facts.row.in_recovery:
            wait_s = min(wait_s, SYNCHRONOUS_S)
        if self._hurry_until is not None and remaining_s(self._hurry_until, now) > 0:
            wait_s = min(wait_s, HURRY_S)
        return min(wait_s, ORPHAN_AGE_S) if self._unowned is not None else wait_s

    # --- processes -----------------------------------------------------------------------------------------------------

    def _appeared(self, postmaster: Postmaster) -> None:
        now = self._clock.now()
        self._postmaster = postmaster
        self._unowned = None
        self._sign_of_life_at = None
        self._pending, self._settings_due = {}, now
        log.info("postmaster found", pid=postmaster.pid, status=postmaster.status())
        self._set(PostgresFacts(process=_PROCESS.get(postmaster.status(), "starting"), pid=postmaster.pid, since=now, ever_started=True))

    async def _watch(self, postmaster: Postmaster) -> None:
        try:
            await postmaster.wait_exit()
            self._died(postmaster)
        finally:
            postmaster.close()

    def _died(self, postmaster: Postmaster) -> None:
        """First kill what it left, then tell."""
        seen = self._machine.ticks_now()
        file = read_postmaster_pid(self._data_dir)
        report = self._machine.directory.kill_orphans(seen_ticks=seen, keep=frozenset({file.pid} if file else ()))
        log.info("postmaster has ended", pid=postmaster.pid, orphans_killed=len(report.killed), took_s=report.took_s)
        self._postmaster = None
        self._disconnect()
        if self._probing is not None:
            self._probing.cancel()
        self._set(PostgresFacts(since=self._clock.now(), ever_started=True, why=f"postmaster {postmaster.pid} has ended"))
        self._kick.set()

    def _look_for_orphans(self) -> None:
        """No postmaster can be adopted: is there anything of one that died before we looked? (A search of all /proc.)"""
        now = self._clock.now()
        if self._looked_for_orphans_at is not None and remaining_s(self._looked_for_orphans_at.plus_s(ORPHAN_AGE_S), now) > 0:
            return
        self._looked_for_orphans_at = now
        file = read_postmaster_pid(self._data_dir)
        own = frozenset({file.pid} if file is not None and file.single_user else ())
        left = [p for p in self._machine.directory.processes() if p.pid not in own and p.ppid not in own]
        if not left:
            self._unowned = None
        elif self._unowned is None:
            self._unowned = (self._machine.ticks_now(), now)
        elif remaining_s(self._unowned[1].plus_s(ORPHAN_AGE_S), now) <= 0:
            report = self._machine.directory.kill_orphans(seen_ticks=self._unowned[0], keep=own)
            if report.killed:
                log.warning("killed processes that a dead postmaster had left", count=len(report.killed))
        if bool(left) != self.facts.orphans or self.facts.process != "absent":
            self._set(PostgresFacts(since=now, ever_started=self.facts.ever_started, orphans=bool(left), why=self.facts.why))

    # --- questions -----------------------------------------------------------------------------------------------------

    async def _look(self, postmaster: Postmaster) -> None:
        status = postmaster.status()
        process = _PROCESS.get(status, "starting")
        if process != self.facts.process:
            self._set(replace(self.facts, process=process, since=self._clock.now()))
        facts = await (self._asked(postmaster) if status == "ready" else self._sign_of_life())
        if self._postmaster is postmaster:      # else it died while it answered, and the answer with it
            self._set(facts)

    async def _asked(self, postmaster: Postmaster) -> PostgresFacts:
        """The facts after an SQL question."""
        asked_at = self._clock.now()
        try:
            with trio.fail_after(PROBE_DEADLINE_S):
                conn = await self._connected(postmaster)
                row = await read_row(conn, deadline_s=PROBE_DEADLINE_S)
                row = replace(row, pending_restart=await self._pending_restart(conn, row))
        except (PostgresTimeout, trio.TooSlowError):
            self._disconnect()
            # A startup answer, or WAL that is being written, still shows life.
            alive = await self._answers() or await self._wal_progress()
            return self._without_sql("silent", alive=alive, why=f"no answer to SQL within {PROBE_DEADLINE_S:g} s")
        except PostgresUnreachable as error:
            self._disconnect()
            starting = error.sqlstate == _CANNOT_CONNECT_NOW
            return self._without_sql("starting" if starting else "refused", alive=error.sqlstate is not None, why=str(error))
        except (PostgresError, ValueError) as error:   # it answered, but not what was asked: alive, and said so
            self._disconnect()
            return self._without_sql("refused", alive=True, why=str(error))
        self._wal_written_ns = 0
        return replace(self.facts, answer="sql", answered_at=asked_at, row=row, row_at=asked_at, why="")

    async def _connected(self, postmaster: Postmaster) -> Connection:
        """The kept connection, or a new one. PostgresUnreachable if it is not this postmaster that answers there."""
        if self._connection is not None and not self._connection.closed:
            return self._connection
        self._connection = await self._machine.connect({**await self._where(), "options": OPTIONS}, deadline_s=PROBE_DEADLINE_S)
        backend = self._machine.read_proc(self._connection.backend_pid)
        if backend is None or backend.ppid != postmaster.pid:
            raise PostgresUnreachable(f"another server answers in place of postmaster {postmaster.pid}")
        return self._connection

    async def _pending_restart(self, conn: Connection, row: Row) -> dict[str, tuple[str, str]]:
        """pg_settings costs the server more than all the rest: read once a postmaster and after each reload, whoever sent it."""
        if row.configuration_loaded_at != self._loaded_at:
            self._loaded_at, self._settings_due = row.configuration_loaded_at, self._settings_due or self._clock.now()
        if self._settings_due is not None and remaining_s(self._settings_due, self._clock.now()) <= 0:
            # Asked again after a while if there is no answer now: not in each probe, which it would end each time.
            self._settings_due = again = self._clock.now().plus_s(SETTINGS_AGAIN_S)
            wanted = self._wanted()
            running = running_settings(await conn.query(SETTINGS_SQL, settings_argument(wanted), deadline_s=PROBE_DEADLINE_S))
            files = await self._files(conn)
            try:
                self._pending, said = pending_restart(wanted, running, files), overridden(wanted, running, files)
            except (ArithmeticError, ValueError, RecursionError) as error:      # a report must not end the probe: the server is well
                log.error("what waits for a restart cannot be told", why=str(error) or type(error).__name__)
            else:
                self._tell_overridden(said)
            if self._settings_due == again:     # else there was another reload meanwhile
                self._settings_due = None
        return self._pending

    async def _files(self, conn: Connection) -> dict[str, FileEntry]:
        try:
            return file_entries(await conn.query(FILES_SQL, deadline_s=PROBE_DEADLINE_S))
        except QueryFailed as error:        # no superuser: what stands in the files is not known then
            log.debug("configuration files cannot be asked for", why=str(error))
            return {}

    def _tell_overridden(self, said: dict[str, str]) -> None:
        for name, what in said.items():
            if self._overridden.get(name) != what:
                log.warning("PostgreSQL setting changed behind the configuration's back", name=name, what=what)
        for name in self._overridden.keys() - said.keys():
            log.info("PostgreSQL setting is the configuration's again", name=name)
        self._overridden = said

    async def _sign_of_life(self) -> PostgresFacts:
        """It starts or stops: sessions are refused, and a refusal is the answer."""
        now = self._clock.now()
        if self._sign_of_life_at is not None and remaining_s(self._sign_of_life_at.plus_s(SIGN_OF_LIFE_S), now) > 0:
            return self.facts
        self._sign_of_life_at = now
        alive = await self._answers()
        return self._without_sql("starting" if alive else "silent", alive=alive, why="" if alive else "no answer to a startup packet")

    async def _answers(self) -> bool:
        try:
            where = await self._where()
        except PostgresError:
            return False
        return await self._machine.answers_startup(str(where.get("hostaddr") or where["host"]), int(where.get("port", 5432)), deadline_s=PROBE_DEADLINE_S)

    async def _wal_progress(self) -> bool:
        """Was a WAL segment written since the last time this was asked?"""
        newest = 0
        with trio.move_on_after(PROBE_DEADLINE_S):
            newest = await self._machine.in_thread(partial(_newest_segment_ns, self._data_dir / "pg_wal"), abandon_on_cancel=True)
        before, self._wal_written_ns = self._wal_written_ns, max(newest, self._wal_written_ns)
        return 0 < before < newest

    async def _where(self) -> dict[str, str | int]:
        """The connection's parameters with an address in place of a name."""
        where = dict(self._conninfo())
        if "hostaddr" not in where:
            where["host"] = (await resolve(str(where["host"]), deadline_s=PROBE_DEADLINE_S))[0]
        return where

    # --- odds and ends -------------------------------------------------------------------------------------------------

    def _without_sql(self, answer: Answer, *, alive: bool, why: str) -> PostgresFacts:
        return replace(self.facts, answer=answer, answered_at=self._clock.now() if alive else self.facts.answered_at, why=why)

    def _set(self, facts: PostgresFacts) -> None:
        before, self.facts = self.facts, facts
        told = self._position_asked and facts.row_at != before.row_at
        if told or facts.row_at is None:
            self._position_asked = False
        if told or _what_matters(before) != _what_matters(facts):
            self._wake()

    def _disconnect(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None


def _as_it_should_be(row: Row | None) -> bool:
    """Nothing is under way that the loop waits for."""
    return row is not None and (
        not row.in_recovery or not row.primary_conninfo or (row.receiver is not None and row.receiver.status == "streaming"))


def look_every_s(settings: Settings) -> float:
    """How often PostgreSQL is looked at in calm times."""
    return min(settings.loop_wait_s, settings.primary_hang_timeout_s / LOOKS_BEFORE_HANGING)


def not_looked_since(settings: Settings, before: tuple[PostgresFacts, float] | None, now: PostgresFacts) -> Settings:
    """A smaller hang timeout counts from the first look after it was set: until then a healthy server has only not been
    asked, at the pace of the former configuration. `before`: what was known then, and the limit until then."""
    if before is None or now.answer != "sql" or now.answered_at != before[0].answered_at:
        return settings
    return replace(settings, primary_hang_timeout_s=max(before[1], settings.primary_hang_timeout_s))


def _what_matters(facts: PostgresFacts) -> tuple[object, ...]:
    """A change of this wakes the loop; positions alone do not."""
    return facts.process, facts.pid, facts.answer, facts.orphans, _role_and_streams(facts.row)


def _role_and_streams(row: Row | None) -> tuple[object, ...]:
    if row is None:
        return ()
    receiver = row.receiver
    streams = frozenset((str(r.get("application_name")), str(r.get("state")), str(r.get("sync_state"))) for r in row.replication)
    return (row.in_recovery, row.timeline, row.replay_paused, row.primary_conninfo, row.restore_command, frozenset(row.pending_restart),
            row.synchronous_standby_names, row.checkpointer_rests,
            (receiver.status, receiver.sender_host, receiver.sender_port, receiver.timeline) if receiver is not None else None, streams)


def _newest_segment_ns(pg_wal: Path) -> int:
    """When a segment file was last written; 0 if that cannot be told. Our own history files do not count."""
    newest = 0
    try:
        with os.scandir(pg_wal) as entries:
            for entry in entries:
                if len(entry.name) == 24:  # a segment's name; all else is the archiver's or ours
                    newest = max(newest, entry.stat().st_mtime_ns)
    except OSError:
        return 0
    return newest
