"""initdb and the users of a cluster."""

from __future__ import annotations

import os
import select
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import trio

from pgha.errors import CommandFailed, ConfigError, PostgresTimeout, PostgresUnreachable, QueryFailed
from pgha.postgres import files, programs, roles
from pgha.postgres.connection import Connection
from pgha.postgres.initdb import initdb

pytestmark = pytest.mark.postgres


def test_initdb_with_options_and_password(make_node, base):
    async def main():
        a = make_node("a", copy=False)
        with pytest.raises(ConfigError) as e:
            await initdb(a.data_dir, a.server.bin_dir, ["nosync", {"pwfile": "x"}, "a b"], superuser="boss", password=None, deadline_s=60)
        assert len(e.value.problems) == 3
        await initdb(a.data_dir, a.server.bin_dir, [{"encoding": "UTF8"}, {"locale": "C"}, "data-checksums", {"auth": "scram-sha-256"}],
                     superuser="boss", password="s'ecret", deadline_s=60)
        assert sorted(p.name for p in base.iterdir()) == ["a"]
        await a.start()
        with pytest.raises(PostgresUnreachable, match="password"):
            await Connection.connect(a.conninfo | {"user": "boss", "password": "wrong"}, deadline_s=5)
        conn = await Connection.connect(a.conninfo | {"user": "boss", "password": "s'ecret"}, deadline_s=5)
        assert await conn.query("show data_checksums", deadline_s=5) == [("on",)]
        conn.close()
        with pytest.raises(CommandFailed, match="not empty"):
            await initdb(a.data_dir, a.server.bin_dir, [], superuser="boss", password=None, deadline_s=60)
        with pytest.raises(PostgresTimeout):
            await initdb(base / "b", a.server.bin_dir, [], superuser="boss", password="x", deadline_s=0.05)
        assert [p.name for p in base.iterdir() if p.name.startswith(".pgha")] == []
    trio.run(main)


def test_users_have_their_rights_and_the_log_has_no_password(make_node):
    async def main():
        a = make_node()
        files.write_hba(a.data_dir, ["local all postgres trust", "local all all scram-sha-256", "local replication all scram-sha-256"])
        await a.start(log_statement="all", log_min_duration_statement="0", log_error_verbosity="verbose")
        conn = await a.connect()
        for _ in range(2):  # also when they exist already
            await roles.set_superuser(conn, "boss", "pw-\\boss'", deadline_s=5)
            await roles.set_replication_user(conn, 'repl"x', "pw-repl", deadline_s=5)
            await roles.set_rewind_user(conn, "rewind", "pw-rewind", deadline_s=5)
        await roles.set_rewind_user(conn, "rewind", None, deadline_s=5)

        async def as_user(user, password, **more):
            return await Connection.connect(a.conninfo | {"user": user, "password": password} | more, deadline_s=5)

        boss = await as_user("boss", "pw-\\boss'")
        assert await boss.query("select rolsuper from pg_roles where rolname = current_user", deadline_s=5) == [("t",)]
        (await as_user('repl"x', "pw-repl", replication="true")).close()
        rewind = await as_user("rewind", "pw-rewind")
        await rewind.query("select pg_ls_dir('.', true, false), pg_stat_file('PG_VERSION', true), "
                           "pg_read_binary_file('PG_VERSION'), pg_read_binary_file('PG_VERSION', 0, 1, true)", deadline_s=5)
        with pytest.raises(QueryFailed) as e:
            await rewind.query("select pg_read_file('PG_VERSION')", deadline_s=5)
        assert e.value.sqlstate == "42501"
        stored = await conn.query("select rolpassword from pg_authid where rolpassword is not null", deadline_s=5)
        assert len(stored) == 3
        assert all(row[0].startswith("SCRAM-SHA-256$") for row in stored)
        for c in (conn, boss, rewind):
            c.close()
        log = a.server.log_path.read_text()
        assert "pg_stat_file" in log
        assert "pw-" not in log
        assert "SCRAM-SHA-256$" not in log
    trio.run(main)


def test_a_program_is_ended_with_everything_that_it_started(base, bin_dir):
    async def main():
        script = base / "stubborn"
        script.write_text("#!/bin/sh\ntrap '' TERM\nsleep 60 &\necho $! > child\nwait\nwait\n")
        script.chmod(0o755)
        programs_grace, programs.GRACE_S = programs.GRACE_S, 0.2
        with pytest.raises(PostgresTimeout, match="stubborn"):
            await programs.run([script], deadline_s=0.5, cwd=base)
        programs.GRACE_S = programs_grace
        from pgha.postgres.processes import read_stat
        with trio.fail_after(5):
            while (stat := read_stat(int((base / "child").read_text()))) is not None and stat.state != "Z":  # noqa: ASYNC110
                await trio.sleep(0.01)
        assert await programs.major_version(bin_dir, deadline_s=5) >= 13
        done = await programs.run(["sh", "-c", "yes | head -c 1000000; echo end >&2; exit 3"], deadline_s=10)
        assert done.exit_code == 3
        assert len(done.stdout) == programs.TAIL_BYTES
        assert done.stderr == "end\n"
        with pytest.raises(PostgresUnreachable):
            await programs.run([base / "none"], deadline_s=1)
    trio.run(main)


def test_a_program_dies_with_the_agent_however_that_dies(base):
    code = """if True:
        import trio
        from pgha.postgres import programs
        async def main():
            await programs.run(["sh", "-c", "echo $$; exec sleep 60"], deadline_s=60, dies_with_us=True,
                               on_output=lambda b: print(b.decode().strip(), flush=True))
        trio.run(main)
    """
    agent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2])
    pid = int(agent.stdout.readline())
    pidfd = os.pidfd_open(pid)
    # trio ends a thread that was idle for 10 s: the one that has started the program must not be such a one
    assert not select.select([pidfd], [], [], 12)[0]
    agent.kill()
    agent.wait()
    assert select.select([pidfd], [], [], 2)[0]
    os.close(pidfd)
    agent.stdout.close()


def test_a_program_that_dies_with_us_is_run_as_any_other(base):
    async def main():
        done = await programs.run(["sh", "-c", "yes | head -n 1; echo $0 >&2; exit 3"], deadline_s=10, dies_with_us=True)
        assert (done.exit_code, done.stdout, done.stderr) == (3, "y\n", "sh\n")
        with pytest.raises(PostgresUnreachable, match="cannot start .*none"):
            await programs.run([base / "none"], deadline_s=1, dies_with_us=True)
        with pytest.raises(PostgresTimeout):
            await programs.run(["sleep", "60"], deadline_s=0.3, dies_with_us=True)
        for thread in threading.enumerate():
            if thread.name.startswith("holds"):
                thread.join(1)
                assert not thread.is_alive()
    trio.run(main)
