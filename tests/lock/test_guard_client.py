"""The agent's line to a real guard: acknowledged in time, or an error."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import threading
import time
from pathlib import Path

import pytest
import trio
from guard_world import CLOCK, GuardProcess, Node, until

from pgha.errors import GuardError, GuardSilent
from pgha.lock.guard_client import GuardClient, agent_flock, ensure_running
from pgha.lock.guard_look import flock_held

pytestmark = pytest.mark.postgres


def client_of(guard: GuardProcess, **more) -> GuardClient:
    return GuardClient(guard.runtime, incarnation="one", started_ns=guard.started_ns, **more)


def test_every_request(node: Node, guard: GuardProcess):
    guard.start()
    node.signal_file()

    async def main():
        client = client_of(guard, data_dir=node.data)
        assert (await client.status()).state == "idle"
        fence_at = CLOCK.now().plus_s(20)
        status = await client.arm(sequence=1, fence_at=fence_at)
        assert (status.state, status.fence_at, status.sequence, status.incarnation) == ("armed", fence_at, 1, "one")
        assert (status.pid, status.data_dir) == (guard.process.pid, str(node.data))
        near = CLOCK.now().plus_s(10)
        assert (await client.narrow(near)).fence_at == near
        assert (await client.fence_now()).state == "latched"
        assert (await client.standby()).state == "standby"
        until_at = CLOCK.now().plus_s(10)
        assert (await client.offline(until_at)).until == until_at
        with pytest.raises(GuardError, match="bye refused: latched"):
            await client.fence_now()
            await client.bye()
        await client.standby()
        await client.bye()
        with pytest.raises(GuardError):
            await client.status()

    trio.run(main)
    assert guard.process.wait(5) == 0


def test_a_restarted_guard_is_found_again(node: Node, guard: GuardProcess):
    guard.start()

    async def main():
        client = client_of(guard)
        await client.arm(sequence=1, fence_at=CLOCK.now().plus_s(20))
        guard.kill()
        with pytest.raises(GuardError):
            await client.status()
        guard.start()
        assert (await client.status()).sequence == 1
        guard.kill()
        guard.start()
        assert (await client.arm(sequence=2, fence_at=CLOCK.now().plus_s(20))).sequence == 2  # on a connection that broke
        await client.aclose()

    trio.run(main)


def test_a_frozen_guard_is_an_error_in_time_and_its_late_answer_nobodys(node: Node, guard: GuardProcess):
    guard.start()

    async def main():
        client = client_of(guard)
        await client.status()
        os.kill(guard.process.pid, signal.SIGSTOP)
        begun = trio.current_time()
        with pytest.raises(GuardError, match="no acknowledgement within 0.3 s"):
            await client.arm(sequence=1, fence_at=CLOCK.now().plus_s(20))
        assert trio.current_time() - begun < 1
        stranger = client_of(guard)
        with pytest.raises(GuardSilent):
            await stranger.status()
        assert stranger.listener == guard.process.pid, "a restarted agent knows whom to end"
        os.kill(guard.process.pid, signal.SIGCONT)
        fence_at = CLOCK.now().plus_s(30)
        assert (await client.arm(sequence=2, fence_at=fence_at, deadline_s=2)).fence_at == fence_at
        await client.aclose()

    trio.run(main)


def test_tasks_share_a_connection(node: Node, guard: GuardProcess):
    guard.start()

    async def main():
        client = client_of(guard)
        seen = []

        async def ask(n):
            seen.append((await client.status(deadline_s=3)).pid)

        async with trio.open_nursery() as nursery:
            for n in range(20):
                nursery.start_soon(ask, n)
        assert seen == [guard.process.pid] * 20
        await client.aclose()

    trio.run(main)


@pytest.mark.parametrize("said", [b"", b"nonsense\n", b"{}\n", b"x" * 9000, b'{"ok":true'])
def test_an_impostor_is_an_error(tmp_path: Path, said: bytes):
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "guard.sock"))
        listener.listen()

        def serve():
            for _ in range(2):
                try:
                    sock, _ = listener.accept()
                    sock.recv(4096)
                    sock.sendall(said)
                    sock.close()
                except OSError:
                    return  # the client has seen enough

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()

        async def main():
            with pytest.raises(GuardError):
                await GuardClient(tmp_path).status(deadline_s=1)

        trio.run(main)
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(5)


def test_without_a_guard_and_without_a_name(tmp_path: Path):
    async def main():
        with pytest.raises(GuardError):
            await GuardClient(tmp_path).status()
        with pytest.raises(GuardError, match="has no incarnation"):
            await GuardClient(tmp_path).standby()

    trio.run(main)


def test_another_directorys_guard_is_an_error(node: Node, guard: GuardProcess):
    guard.start()

    async def main():
        client = client_of(guard, data_dir="/elsewhere")
        with pytest.raises(GuardError, match=r"not of /elsewhere"):
            await client.status()
        await client.aclose()

    trio.run(main)


def test_starts_a_guard_outside_its_own_process_tree(tmp_path: Path):
    base = Path("/dev/shm") / f"pgha-client-{os.getpid()}"
    base.mkdir(mode=0o700)
    (base / "data").mkdir()
    guard = GuardProcess(base / "data", base)
    inherited = os.open(base, os.O_RDONLY)
    os.set_inheritable(inherited, True)

    async def main():
        client = client_of(guard)
        status = await ensure_running(client, guard.argv(), log=str(base / "log"))
        again = await ensure_running(client, guard.argv())
        await client.aclose()
        assert again.pid == status.pid
        return status.pid

    try:
        pid = trio.run(main)
        stat = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        assert int(stat[3]) not in (os.getsid(0), pid), "its own session, and not its leader: no terminal can be gained"
        assert os.readlink(f"/proc/{pid}/cwd") == "/"
        assert not [fd for fd in os.listdir(f"/proc/{pid}/fd") if os.readlink(f"/proc/{pid}/fd/{fd}") == str(base)]
        assert "guard_runs" in (base / "log").read_text()
        os.kill(pid, signal.SIGTERM)
        until(lambda: not flock_held(str(base / "run" / "guard.lock")), 5)
    finally:
        os.close(inherited)
        shutil.rmtree(base)


def test_a_guard_that_cannot_start_is_an_error(tmp_path: Path):
    async def main():
        with pytest.raises(GuardError, match=r"no guard within 0\.4 s"):
            await ensure_running(GuardClient(tmp_path), ["/bin/false"], deadline_s=0.4)

    trio.run(main)


def test_one_agent_a_directory(tmp_path: Path):
    path = tmp_path / "agent.lock"
    assert flock_held(str(path)) is False
    with agent_flock(path) as mine:
        assert mine
        assert flock_held(str(path)) is True
        begun = time.monotonic()
        with agent_flock(path) as second:
            assert not second
        assert time.monotonic() - begun < 2
    assert flock_held(str(path)) is False


def test_the_guards_question_keeps_no_agent_out(tmp_path: Path):
    path = tmp_path / "agent.lock"
    path.touch()
    stop = threading.Event()

    def ask():
        while not stop.is_set():
            flock_held(str(path))

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        for _ in range(20):
            with agent_flock(path) as mine:
                assert mine
    finally:
        stop.set()
        thread.join()
