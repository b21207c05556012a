"""One connection to PostgreSQL, driven by trio: a query of a hung server ends at its deadline, exactly, leaving nothing.

psycopg's generators say what to wait for, trio waits. No thread, no DNS in here (libpq's resolver would block the
loop): the caller gives a socket directory or an address literal, `resolve` finds one. Measured (feasibility 1): cancel
about 1 ms late, no descriptor left.

Rules of this file:
* One task per connection. A query that was cancelled or failed half-way closes it: its protocol state is unknown.
* Values travel as text: parameters in, results out.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Callable, Generator, Mapping
from functools import partial
from typing import TypeVar

import psycopg
import trio
from msgspec import Struct
from psycopg import generators, pq
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from psycopg.waiting import Ready, Wait

from pgha.errors import PostgresTimeout, PostgresUnreachable, QueryFailed
from pgha.model.wal import HistoryRow, parse_history_file, parse_lsn
from pgha.postgres.startup import answers_startup, startup_sqlstate

__all__ = ["Connection", "System", "answers_startup", "identify_system", "resolve", "same_conninfo", "timeline_history"]

T = TypeVar("T")
Row = tuple[str | None, ...]

#: SQLSTATE class 08 and the three with which a server ends a session: the connection is gone, not only the query.
_ENDS_SESSION = re.compile(r"08...|57P0[123]")
#: A resolver that hangs keeps its thread until it gives up; no more than these at once.
_RESOLVER_THREADS = trio.CapacityLimiter(4)


async def _wait_fd(fd: int, wanted: Wait) -> Ready:
    if wanted == Wait.R:
        await trio.lowlevel.wait_readable(fd)
        return Ready.R
    if wanted == Wait.W:
        await trio.lowlevel.wait_writable(fd)
        return Ready.W
    ready = Ready.NONE

    async def one(which: Ready) -> None:
        nonlocal ready
        if which == Ready.R:
            await trio.lowlevel.wait_readable(fd)
        else:
            await trio.lowlevel.wait_writable(fd)
        ready = Ready(ready | which)
        nursery.cancel_scope.cancel()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(one, Ready.R)
        nursery.start_soon(one, Ready.W)
    return ready


async def _drive(steps: Generator[Wait, Ready, T], fd: int, is_closed: Callable[[], bool]) -> T:
    """Run one of psycopg's generators to its result. ClosedResourceError once `is_closed`: also when its descriptor had become
    ready before, and this task was only about to go on."""
    try:
        wanted = next(steps)
        while True:
            ready = await _wait_fd(fd, wanted)
            if is_closed():
                raise trio.ClosedResourceError
            wanted = steps.send(ready)
    except StopIteration as e:
        result: T = e.value
        return result
    finally:
        steps.close()


def _complete(conninfo: Mapping[str, str | int]) -> dict[str, str | int]:
    """`conninfo` with an address that needs no resolver. ValueError if it has none."""
    full = dict(conninfo)
    host = str(full.get("host", ""))
    if "hostaddr" not in full and not host.startswith(("/", "@")):
        ipaddress.ip_address(host)  # ValueError: a name; resolve() it first and pass hostaddr
        full["hostaddr"] = host
    # Kerberos encryption would look into the credential cache and possibly the network, synchronously.
    full.setdefault("gssencmode", "disable")
    full.setdefault("client_encoding", "UTF8")
    full.setdefault("application_name", "pgha")
    return full


class Connection:
    """A session. Made by `connect`, ended by `close` or by the first query that does not end well."""

    def __init__(self, pgconn: pq.abc.PGconn) -> None:
        self._pgconn = pgconn
        self._busy = False
        self._closed = False
        #: As in server_version_num: 150020.
        self.server_version = pgconn.server_version
        self.backend_pid = pgconn.backend_pid

    @classmethod
    async def connect(cls, conninfo: Mapping[str, str | int], *, deadline_s: float) -> Connection:
        """Connect to `host` (socket directory or address literal) or `hostaddr`, within `deadline_s` seconds.

        PostgresUnreachable (with the server's sqlstate if it said one), PostgresTimeout.
        """
        wanted = _complete(conninfo)
        with trio.move_on_after(max(0.0, deadline_s)) as scope:
            try:
                pgconn = pq.PGconn.connect_start(make_conninfo("", **wanted).encode())
            except psycopg.Error as e:  # a word that libpq does not know
                raise PostgresUnreachable(_first_line(str(e))) from e
            try:
                refused = await _establish(pgconn)
                if refused is None:
                    pgconn.nonblocking = 1
                    return cls(pgconn)
            except psycopg.Error as e:
                pgconn.finish()
                raise PostgresUnreachable(_first_line(str(e))) from e
            except BaseException:  # also trio.Cancelled: the descriptor goes now, not when someone collects it
                pgconn.finish()
                raise
            why, reached_server = refused
            pgconn.finish()
            # libpq keeps the code to itself and its text is in the server's language: ask again, for the code alone.
            sqlstate = await startup_sqlstate(wanted, deadline_s=deadline_s) if reached_server else None
            raise PostgresUnreachable(why, sqlstate=sqlstate)
        assert scope.cancelled_caught
        raise PostgresTimeout(f"no connection within {deadline_s:g} s to {_place(wanted)}")

    @property
    def closed(self) -> bool:
        return self._closed

    async def query(self, sql: str, *params: str | float | None, deadline_s: float) -> list[Row]:
        """Rows of the last statement of `sql`, each value as text or None.

        With `params` it is one statement with $1, $2, …; without, the simple protocol, which may hold several.
        QueryFailed leaves the connection usable; PostgresUnreachable and PostgresTimeout close it.
        """
        if self._closed:
            raise PostgresUnreachable("connection is closed")
        assert not self._busy, "a connection belongs to one task"
        self._busy = True
        whole = False
        try:
            with trio.move_on_after(max(0.0, deadline_s)) as scope:
                results = await self._execute(sql, params)
                whole = True
        except psycopg.Error as e:
            raise PostgresUnreachable(_first_line(str(e)) or "connection broke") from e
        except (OSError, trio.ClosedResourceError) as e:
            raise PostgresUnreachable("connection was closed") from e
        finally:
            self._busy = False
            if self._closed:
                self._pgconn.finish()       # asked for while this query waited, see close()
            elif not whole:
                self.close()
        if scope.cancelled_caught:
            raise PostgresTimeout(f"no answer within {deadline_s:g} s")
        return self._rows(results)

    async def _execute(self, sql: str, params: tuple[str | float | None, ...]) -> list[pq.abc.PGresult]:
        if params:
            self._pgconn.send_query_params(sql.encode(), [None if p is None else str(p).encode() for p in params])
        else:
            self._pgconn.send_query(sql.encode())
        return await _drive(generators.execute(self._pgconn), self._pgconn.socket, lambda: self._closed)

    def _rows(self, results: list[pq.abc.PGresult]) -> list[Row]:
        for result in results:
            if result.status == pq.ExecStatus.FATAL_ERROR:
                raise self._failure(result)
        if not results:
            raise PostgresUnreachable("empty answer")
        last = results[-1]
        return [
            tuple(None if (v := last.get_value(i, j)) is None else v.decode(errors="replace") for j in range(last.nfields))
            for i in range(last.ntuples)
        ]

    def _failure(self, result: pq.abc.PGresult) -> QueryFailed | PostgresUnreachable:
        sqlstate = (result.error_field(pq.DiagnosticField.SQLSTATE) or b"").decode()
        primary = (result.error_field(pq.DiagnosticField.MESSAGE_PRIMARY) or b"").decode(errors="replace")
        text = primary or _first_line(result.error_message.decode(errors="replace"))
        if self._pgconn.status != pq.ConnStatus.OK or not sqlstate or _ENDS_SESSION.fullmatch(sqlstate):
            self.close()
            return PostgresUnreachable(text or "connection broke", sqlstate=sqlstate or None)
        return QueryFailed(text, sqlstate=sqlstate)

    def encrypt_password(self, password: str, user: str) -> str:
        """`password` as the server would store it, so that the plain one never reaches it (or its log). No waiting."""
        return self._pgconn.encrypt_password(password.encode(), user.encode(), b"scram-sha-256").decode()

    def close(self) -> None:
        """Give the session and its descriptor back. May be called twice, and while a query waits: then that query does it, at
        once. (libpq's memory is not to be freed under psycopg's generator: its task may be about to go on already, since a server
        that dies makes its socket readable in the same moment, and would go on in what is freed.)"""
        if self._closed:
            return
        self._closed = True
        if not self._busy:
            self._pgconn.finish()
        elif self._pgconn.status == pq.ConnStatus.OK:
            trio.lowlevel.notify_closing(self._pgconn.socket)


async def _establish(pgconn: pq.abc.PGconn) -> tuple[str, bool] | None:
    """Poll until connected: None. Or (why not, did the server get as far as answering)."""
    reached_server = False
    while pgconn.status != pq.ConnStatus.BAD:
        answer = pgconn.connect_poll()
        if answer == pq.PollingStatus.OK:
            return None
        if answer == pq.PollingStatus.FAILED:
            break
        reached_server = reached_server or pgconn.status in (pq.ConnStatus.AWAITING_RESPONSE, pq.ConnStatus.AUTH_OK)
        await _wait_fd(pgconn.socket, Wait.R if answer == pq.PollingStatus.READING else Wait.W)
    return pgconn.get_error_message().strip().replace("\n", "; "), reached_server


def _place(conninfo: Mapping[str, str | int]) -> str:
    return f"{conninfo.get('host') or conninfo.get('hostaddr')}:{conninfo.get('port', 5432)}"


def _first_line(text: str) -> str:
    return text.strip().split("\n", 1)[0]


def same_conninfo(a: str, b: str) -> bool:
    """Do two connection strings say the same, in whatever order and quoting? One that cannot be read equals nothing."""
    try:
        return conninfo_to_dict(a) == conninfo_to_dict(b)
    except psycopg.Error:
        return False


class System(Struct, frozen=True, kw_only=True):
    """The answer to IDENTIFY_SYSTEM. On a standby `timeline` and `lsn` are those it replays (PostgreSQL 13+)."""

    system_identifier: str
    timeline: int
    lsn: int


async def identify_system(conn: Connection, *, deadline_s: float) -> System:
    """Who is there? `conn` needs `replication` in its conninfo."""
    rows = await conn.query("IDENTIFY_SYSTEM", deadline_s=deadline_s)
    identifier, timeline, lsn = rows[0][:3]
    return System(system_identifier=identifier or "", timeline=int(timeline or 0), lsn=parse_lsn(lsn or "0/0"))


async def timeline_history(conn: Connection, timeline: int, *, deadline_s: float) -> tuple[HistoryRow, ...]:
    """How `timeline` came to be, oldest first; timeline 1 has no history. `conn` needs `replication` in its conninfo."""
    if timeline <= 1:
        return ()
    rows = await conn.query(f"TIMELINE_HISTORY {timeline:d}", deadline_s=deadline_s)
    return parse_history_file(rows[0][1] or "")


async def resolve(host: str, *, deadline_s: float) -> list[str]:
    """Address literals of `host`, in the resolver's order. A literal or a socket directory is itself.

    PostgresUnreachable if the name has none, PostgresTimeout if the resolver does not answer. A resolver that hangs
    holds a thread until it gives up by itself, hence the limit.
    """
    if host.startswith(("/", "@")):
        return [host]
    try:
        return [str(ipaddress.ip_address(host))]
    except ValueError:
        pass  # a name
    with trio.move_on_after(max(0.0, deadline_s)):
        try:
            found = await trio.to_thread.run_sync(
                partial(socket.getaddrinfo, host, None, type=socket.SOCK_STREAM), abandon_on_cancel=True,
                limiter=_RESOLVER_THREADS)
        except OSError as e:
            raise PostgresUnreachable(f"cannot resolve {host}: {e.strerror}") from e
        except UnicodeError as e:       # a label that is empty, too long, or no name: Python's own codec says so, before any resolver
            raise PostgresUnreachable(f"cannot resolve {host}: it is no host name") from e
        return list(dict.fromkeys(str(entry[4][0]) for entry in found))
    raise PostgresTimeout(f"no answer from the resolver within {deadline_s:g} s for {host}")
