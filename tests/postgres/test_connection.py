from __future__ import annotations

import os
import signal
import socket
import time

import pytest
import trio
import trio.testing

from pgha.errors import PostgresTimeout, PostgresUnreachable, QueryFailed
from pgha.postgres.connection import (
    Connection,
    answers_startup,
    identify_system,
    resolve,
    same_conninfo,
    timeline_history,
)

pytestmark = pytest.mark.postgres


def open_fds() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_values_errors_and_reuse(make_node):
    async def main():
        a = make_node()
        await a.start()
        conn = await a.connect()
        assert await conn.query("select 1, null, 'ä'", deadline_s=5) == [("1", None, "ä")]
        assert await conn.query("select $1::int + 1, $2::text", 41, None, deadline_s=5) == [("42", None)]
        with pytest.raises(QueryFailed) as e:
            await conn.query("select 1/0", deadline_s=5)
        assert e.value.sqlstate == "22012"
        assert not conn.closed
        assert await conn.query("select 1; select 2", deadline_s=5) == [("2",)]
        with pytest.raises(PostgresUnreachable) as e:
            await conn.query("select pg_terminate_backend(pg_backend_pid())", deadline_s=5)
        assert e.value.sqlstate == "57P01"
        assert conn.closed
        with pytest.raises(PostgresUnreachable):
            await conn.query("select 1", deadline_s=5)
        assert conn.server_version >= 130000
    trio.run(main)


def test_hung_servers_are_left_at_the_deadline_without_descriptors(make_node):
    async def main():
        a = make_node()
        postmaster = await a.start()
        conn = await a.connect()
        before = open_fds()
        for host in (str(a.socket_dir), "127.0.0.1"):
            hung = await a.connect(host=host)
            os.kill(hung.backend_pid, signal.SIGSTOP)
            began = time.monotonic()
            with pytest.raises(PostgresTimeout):
                await hung.query("select 1", deadline_s=0.2)
            assert time.monotonic() - began < 0.5
            assert hung.closed
        # A stopped postmaster: the kernel accepts, nobody answers.
        postmaster.signal(signal.SIGSTOP)
        for host in (str(a.socket_dir), "127.0.0.1"):
            began = time.monotonic()
            with pytest.raises(PostgresTimeout):
                await Connection.connect(a.conninfo | {"host": host}, deadline_s=0.2)
            assert not await answers_startup(host, a.port, deadline_s=0.2)
            assert time.monotonic() - began < 1
        assert open_fds() == before
        # Cancelled from outside: closed, too.
        with trio.move_on_after(0.1):
            await conn.query("select pg_sleep(60)", deadline_s=60)
        assert conn.closed
        assert open_fds() == before - 1
        postmaster.signal(signal.SIGCONT)
        assert await answers_startup("127.0.0.1", a.port, deadline_s=5)
    trio.run(main)


def test_close_in_the_moment_of_the_answer_touches_nothing_that_is_freed(make_node):
    """The server's socket and another task's are ready in one round of the loop, as when a server dies: whichever goes on first,
    psycopg's generator must not run on in a PGconn that the other has freed (that ended whole agents, by SIGABRT)."""
    async def main():
        a = make_node()
        await a.start()
        ended = []
        for _ in range(60):
            conn = await a.connect()
            ours, theirs = socket.socketpair()

            async def asks(conn=conn):
                try:
                    ended.append(await conn.query("select pg_sleep(0.01)", deadline_s=10))
                except PostgresUnreachable as error:
                    ended.append(str(error))

            async def closes(conn=conn, ours=ours):
                await trio.lowlevel.wait_readable(ours)
                conn.close()

            async with trio.open_nursery() as nursery:
                nursery.start_soon(asks)
                nursery.start_soon(closes)
                await trio.testing.wait_all_tasks_blocked()
                theirs.send(b"x")
                time.sleep(0.03)    # noqa: ASYNC251  (the loop stands still until both are ready)
            assert conn.closed
            ours.close()
            theirs.close()
        assert {e for e in ended if isinstance(e, str)} <= {"connection was closed"}
        assert len(ended) == 60
        assert any(isinstance(e, str) for e in ended), "the other task was first, now and then"
    trio.run(main)


def test_close_by_another_task_ends_the_waiting_query(make_node):
    async def main():
        a = make_node()
        await a.start()
        conn = await a.connect()
        async with trio.open_nursery() as nursery:
            async def wait():
                with pytest.raises(PostgresUnreachable):
                    await conn.query("select pg_sleep(60)", deadline_s=60)
            nursery.start_soon(wait)
            await trio.testing.wait_all_tasks_blocked()
            conn.close()
    trio.run(main)


def test_a_server_that_refuses_says_its_code(make_node):
    async def main():
        a = make_node()
        (a.data_dir / "standby.signal").touch()
        # A standby without hot_standby runs, and refuses everybody.
        postmaster = await a.server.start(a.parameters | {"hot_standby": "off"})
        await a.server.wait_ready(postmaster, deadline_s=10, hot=False)
        assert postmaster.status() == "standby"
        with pytest.raises(PostgresUnreachable) as e:
            await a.connect()
        assert e.value.sqlstate == "57P03"
        assert await answers_startup(str(a.socket_dir), a.port, deadline_s=5)
        a.server.stop(postmaster, "fast")
        await postmaster.wait_exit()
        with pytest.raises(PostgresUnreachable) as e:
            await a.connect()
        assert e.value.sqlstate is None
        assert not await answers_startup(str(a.socket_dir), a.port, deadline_s=5)
    trio.run(main)


def test_replication_commands(make_node):
    async def main():
        a = make_node()
        await a.start()
        conn = await a.connect(replication="true")
        system = await identify_system(conn, deadline_s=5)
        assert system.timeline == 1
        assert system.lsn > 0
        assert system.system_identifier.isdigit()
        assert await timeline_history(conn, 1, deadline_s=5) == ()
        with pytest.raises(QueryFailed):
            await timeline_history(conn, 7, deadline_s=5)
        conn.close()
    trio.run(main)


def test_names_are_never_resolved_by_libpq(make_node):
    async def main():
        with pytest.raises(PostgresUnreachable, match="nonsense"):
            await Connection.connect({"host": "127.0.0.1", "nonsense": "x"}, deadline_s=1)
        with pytest.raises(ValueError):
            await Connection.connect({"host": "localhost"}, deadline_s=1)
        assert await resolve("/tmp", deadline_s=1) == ["/tmp"]
        assert await resolve("::1", deadline_s=1) == ["::1"]
        assert set(await resolve("localhost", deadline_s=5)) <= {"127.0.0.1", "::1"}
        with pytest.raises((PostgresUnreachable, PostgresTimeout)):
            await resolve("no-such-host.invalid", deadline_s=2)
    trio.run(main)


def test_a_port_that_accepts_and_says_nothing_does_not_answer():
    async def main():
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            s.listen()
            assert not await answers_startup("127.0.0.1", s.getsockname()[1], deadline_s=0.1)
            with pytest.raises(PostgresTimeout):
                await Connection.connect({"host": "127.0.0.1", "port": s.getsockname()[1]}, deadline_s=0.1)
    trio.run(main)


def test_same_conninfo():
    assert same_conninfo("host=a port=1 user='x y'", "user='x y'   port=1 host='a'")
    assert not same_conninfo("host=a", "host=b")
    assert not same_conninfo("host=a", "nonsense")
    assert not same_conninfo("nonsense", "nonsense")
