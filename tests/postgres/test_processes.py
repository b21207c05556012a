from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import trio

from pgha.errors import PostgresError, PostgresTimeout
from pgha.postgres import processes
from pgha.postgres.processes import adopt, living_processes, read_postmaster_pid, remove_dead_pid_file

pytestmark = pytest.mark.postgres


def test_adopted_by_whoever_comes_later_and_its_death_is_noticed(make_node):
    async def main():
        a = make_node()
        assert adopt(a.data_dir) is None
        assert read_postmaster_pid(a.data_dir) is None
        started = await a.start()
        adopted = adopt(a.data_dir)
        assert adopted is not None
        assert (adopted.pid, adopted.start_ticks) == (started.pid, started.start_ticks)
        file = read_postmaster_pid(a.data_dir)
        assert (file.pid, file.port, file.socket_dir, file.status) == (started.pid, a.port, str(a.socket_dir), "ready")
        assert started.pid in living_processes(a.data_dir)
        assert len(living_processes(a.data_dir)) > 3
        # A backend is a postgres process of the directory, too, but no postmaster.
        backend = next(p for p in living_processes(a.data_dir) if p != started.pid)
        assert processes.handle_of(backend, a.data_dir) is None
        with trio.fail_after(5):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(adopted.wait_exit)
                await trio.testing.wait_all_tasks_blocked()
                adopted.signal(signal.SIGKILL)
        assert not adopted.alive()
        assert not started.alive()
        assert not adopted.signal(signal.SIGTERM)
        assert adopt(a.data_dir) is None
        await processes.wait_no_process(a.data_dir, deadline_s=5)
        assert not processes._children
        adopted.close()
        started.close()
    import trio.testing
    trio.run(main)


def test_a_child_is_the_postmaster_before_it_has_its_name(base):
    """Popen returns a moment before Linux renames the process, and lets its links be read: a start that looked for
    "postgres" then took one that had just begun for one that had ended with 0."""
    not_yet = subprocess.Popen(["sleep", "60"])
    started = processes.handle_of_child(not_yet, base)
    assert isinstance(started, processes.Postmaster)
    assert started.pid == not_yet.pid
    started.signal(signal.SIGKILL)
    trio.run(started.wait_exit)
    assert started.exit_code == -signal.SIGKILL
    started.close()
    ended = subprocess.Popen(["sh", "-c", "exit 3"])
    os.waitid(os.P_PID, ended.pid, os.WEXITED | os.WNOWAIT)
    assert processes.handle_of_child(ended, base) == 3


def test_a_recycled_pid_is_never_taken_for_the_postmaster(make_node):
    async def main():
        a, b = make_node("a"), make_node("b")
        other = await b.start()
        mine = (b.data_dir / "postmaster.pid").read_text()
        for pid in (os.getpid(), 1, other.pid, 99999999):
            (a.data_dir / "postmaster.pid").write_text(mine.replace(str(other.pid), str(pid), 1))
            assert adopt(a.data_dir) is None, pid
        # Called postgres and of our user, but standing elsewhere; and standing there, but called otherwise.
        sleeper = subprocess.Popen(["sleep", "60"], cwd=a.data_dir)
        try:
            (a.data_dir / "postmaster.pid").write_text(f"{sleeper.pid}\n{a.data_dir}\n1\n")
            assert adopt(a.data_dir) is None
            assert living_processes(a.data_dir) == []
            # PostgreSQL itself would refuse to start: the number is in use by our user.
            assert remove_dead_pid_file(a.data_dir)
            assert not remove_dead_pid_file(a.data_dir)
        finally:
            sleeper.kill()
            sleeper.wait()
        (a.data_dir / "postmaster.pid").write_text("nonsense\n")
        assert adopt(a.data_dir) is None
    trio.run(main)


def test_orphans_keep_the_pid_file(make_node):
    async def main():
        a = make_node()
        postmaster = await a.start()
        conn = await a.connect()
        os.kill(conn.backend_pid, signal.SIGSTOP)  # an orphan that does not notice
        postmaster.signal(signal.SIGKILL)
        await postmaster.wait_exit()
        assert adopt(a.data_dir) is None
        with pytest.raises(PostgresError, match=str(conn.backend_pid)):
            remove_dead_pid_file(a.data_dir)
        with pytest.raises(PostgresTimeout):
            await processes.wait_no_process(a.data_dir, deadline_s=0.1)
        os.kill(conn.backend_pid, signal.SIGKILL)
        await processes.wait_no_process(a.data_dir, deadline_s=5)
        # The postmaster is reaped, its file is stale: PostgreSQL removes it itself, so may we.
        assert remove_dead_pid_file(a.data_dir)
        conn.close()
    trio.run(main)


def test_a_zombie_is_dead_and_does_not_block_a_start(make_node, base):
    """Its parent does not reap it, as a slow PID 1 would not: PostgreSQL refuses to start until the file is gone."""
    async def main():
        a = make_node()
        script = base / "parent.py"
        script.write_text(
            "import os, sys, time\n"
            "pid = os.fork()\n"
            "if pid == 0:\n"
            f"    os.chdir({str(a.data_dir)!r})\n"
            "    os.execv(sys.argv[1], sys.argv[1:])\n"
            "print(pid, flush=True)\n"
            "time.sleep(60)\n")
        parent = subprocess.Popen([sys.executable, script, *a.server.command_line(a.parameters)],
                                  stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        try:
            pid = int(parent.stdout.readline())
            with trio.fail_after(10):
                while (handle := adopt(a.data_dir)) is None or handle.status() != "ready":  # noqa: ASYNC110
                    await trio.sleep(0.01)
            assert handle.pid == pid
            handle.signal(signal.SIGKILL)
            await handle.wait_exit()
            assert processes.read_stat(pid).state == "Z"
            assert not handle.alive()
            assert adopt(a.data_dir) is None
            await processes.wait_no_process(a.data_dir, deadline_s=5)
            assert remove_dead_pid_file(a.data_dir)
            again = await a.start()
            assert again.pid != pid
        finally:
            parent.kill()
            parent.wait()
            parent.stdout.close()
    trio.run(main)


def test_the_server_outlives_the_agent(make_node, base):
    a = make_node()
    script = (
        "import trio, sys; from pathlib import Path; from pgha.postgres.server import Server\n"
        "async def main():\n"
        f"    s = Server(Path({str(a.data_dir)!r}), {str(a.server.bin_dir)!r})\n"
        f"    p = await s.start({a.parameters!r}); await s.wait_ready(p, deadline_s=20); print(p.pid, flush=True)\n"
        "    await trio.sleep(60)\n"
        "trio.run(main)\n")
    agent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, start_new_session=True,
                             env={**os.environ, "PYTHONPATH": os.path.dirname(os.path.dirname(processes.__file__)) + "/..",
                                  "PGHA_RESTAPI_PASSWORD": "secret", "NOTIFY_SOCKET": "/nowhere", "WATCHDOG_USEC": "1", "PGPASSWORD": "secret",
                                  "PGBACKREST_STANZA": "kept"})
    pid = int(agent.stdout.readline())
    environment = Path(f"/proc/{pid}/environ").read_text()
    assert "secret" not in environment
    assert "NOTIFY_SOCKET" not in environment
    assert "WATCHDOG_USEC" not in environment
    assert "PGBACKREST_STANZA=kept" in environment
    os.killpg(agent.pid, signal.SIGKILL)  # the agent with its whole group, as a terminal or systemd might
    agent.wait()
    agent.stdout.close()
    time.sleep(0.05)
    postmaster = adopt(a.data_dir)
    assert postmaster is not None
    assert postmaster.pid == pid
    assert trio.run(a.sql, "select 1") == [("1",)]


def test_an_empty_pid_file_of_a_postmaster_killed_while_it_wrote_it_is_removed():
    with tempfile.TemporaryDirectory() as name:      # pytest's own belongs to root
        data_dir = Path(name)
        (data_dir / "postmaster.pid").touch()
        assert remove_dead_pid_file(data_dir)
        assert not (data_dir / "postmaster.pid").exists()
        assert not remove_dead_pid_file(data_dir)
