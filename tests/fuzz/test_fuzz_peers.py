"""Whatever answers in a member's place, or at the guard's socket: an answer that counts for nothing, in time."""

from __future__ import annotations

import gzip
import json
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio
from hostile import dumped, inputs
from hostile_server import Behaviour, behaviours, by_chance, http, says, serving

from pgha.clock import SystemClock
from pgha.errors import GuardError
from pgha.lock.guard_client import GuardClient
from pgha.machine import http as client_of
from pgha.model.decision import PeerQuestion
from pgha.observe.peers import ANSWER_S, PeersObserver, _from_patroni, _from_vote

VOTE = {"name": "b", "epoch": 5, "timeline": 3, "lsn": 67108864, "candidate": True, "history": [{"timeline": 1, "switch_lsn": 5, "reason": "x"}], "state": "running", "role": "replica",
        "tags": {"failover_priority": 2}, "watchdog_failed": False, "system_identifier": "7123456789012345678", "node_id": "id-b"}
PATRONI = {"state": "running", "role": "replica", "server_version": 150020, "xlog": {"received_location": 67108864, "replayed_location": 67108864, "paused": False}, "timeline": 3,
           "database_system_identifier": "7123456789012345678", "tags": {"nofailover": True}, "patroni": {"version": "4.1.4", "scope": "demo", "name": "b"}}


def observe(all_of: dict[str, Behaviour]) -> dict[str, Any]:
    """All side by side, as members of one question."""
    facts: dict[str, Any] = {}

    async def main() -> None:
        async def answer(behave: Behaviour, _path: bytes, _body: bytes, stream: trio.SocketStream) -> None:
            await behave(stream)

        observer = PeersObserver(clock=SystemClock(), wake=lambda: None, http=lambda: client_of(False))
        async with trio.open_nursery() as nursery:
            await nursery.start(observer.run)
            names: dict[str, str] = {}

            async def serve(name: str, behave: Behaviour, *, task_status: Any = trio.TASK_STATUS_IGNORED) -> None:
                async with serving(partial(answer, behave)) as port:
                    names[name] = f"http://127.0.0.1:{port}/patroni"
                    task_status.started()
                    await trio.sleep_forever()

            for name, behave in all_of.items():
                await nursery.start(serve, name, behave)
            observer.ask(PeerQuestion(names=names, epoch=5, every_s=10.0))
            with trio.fail_after(60):
                while len(observer.facts) < len(names):
                    await trio.sleep(0.05)
            facts.update(observer.facts)
            nursery.cancel_scope.cancel()

    trio.run(main)
    return facts


def whole(peer: Any) -> bool:
    """What decisions are made of, and what is written down, served and logged."""
    assert len(peer.why) < 500, peer.why[:600]
    assert 0 <= peer.lsn < 1 << 63
    assert 0 <= peer.timeline < 1 << 63
    assert -1 <= peer.frozen_epoch < 1 << 63
    assert len(peer.system_identifier) <= 64
    json.dumps(msgspec.to_builtins(peer), ensure_ascii=False).encode()
    return True


def test_no_behaviour_is_an_answer() -> None:
    bad = behaviours(dumped({"x": 1}))
    for peers in (dict(list(bad.items())[:35]), dict(list(bad.items())[35:])):
        for what, peer in observe(peers).items():
            assert whole(peer)
            assert not peer.answered, what
    assert ANSWER_S < 1


def test_what_an_answer_is_not_read_for_is_quoted_in_part() -> None:
    (peer,) = observe({"a status line without end": says(b"9" * 2000 + b" 200 OK\r\n\r\n")}).values()
    assert whole(peer)
    assert "status line" in peer.why


def test_what_is_packed_is_not_unpacked() -> None:
    bomb = gzip.compress(b" " * 50_000_000)
    peers = observe({"a bomb": says(http(bomb, headers=b"Content-Encoding: gzip\r\n")), "a packed vote": says(http(gzip.compress(dumped(VOTE)), headers=b"Content-Encoding: gzip\r\n"))})
    assert not any(peer.answered for peer in peers.values())


def test_no_answer_by_chance_is_fatal(times: int) -> None:
    for n in range(times):
        for what, peer in observe(by_chance(f"votes {times} {n}", dumped(VOTE), VOTE, 40)).items():
            assert whole(peer), what


def test_no_object_is_fatal(times: int) -> None:
    for good, reader in ((VOTE, _from_vote), (PATRONI, _from_patroni)):
        for body in inputs("keys", dumped(good), good, count=3000 * times, seed=(reader.__name__, times)):
            try:
                value = json.loads(body)
            except (ValueError, RecursionError):
                continue
            if isinstance(value, dict):
                try:
                    peer = reader("b", value, SystemClock().now())
                except (ValueError, TypeError, OverflowError, RecursionError):
                    continue      # said as "does not parse"
                assert 0 <= peer.lsn < 1 << 63


GUARDS: dict[str, bytes] = {
    "nothing": b"", "an empty line": b"\n", "no JSON": b"hello\n", "a list": b"[]\n", "a line without end": b"x" * 100_000, "brackets": b"[" * 4000 + b"\n", "not text": b'{"ok":"\xff"}\n',
    "an answer of other types": b'{"ok":1,"state":"armed","started_ns":"x","sequence":[],"incarnation":5}\n', "a state that is none": b'{"ok":true,"state":"happy","started_ns":1,"sequence":1,"incarnation":"x"}\n',
    "a deadline that is none": b'{"ok":true,"state":"armed","started_ns":1,"sequence":1,"incarnation":"x","fence_at":[1e999,1]}\n',
    "a deadline without end": b'{"ok":true,"state":"armed","started_ns":1,"sequence":1,"incarnation":"x","fence_at":[' + b"9" * 30 + b",1]}\n", "digits": b'{"ok":' + b"9" * 4000 + b"}\n",
    "two answers at once": b'{"ok":false,"state":"idle","started_ns":1,"sequence":1,"incarnation":"x","error":"no"}\n' * 2,
}


@pytest.mark.parametrize("what", sorted(GUARDS))
def test_whatever_sits_at_the_guard_s_socket(tmp_path: Path, what: str) -> None:
    async def main() -> None:
        async def behave(stream: trio.SocketStream) -> None:
            async with stream:
                await stream.receive_some(4096)
                try:
                    await stream.send_all(GUARDS[what])
                    if what != "nothing":
                        await trio.sleep(5)
                except trio.BrokenResourceError:
                    pass

        sock = trio.socket.socket(trio.socket.AF_UNIX)
        await sock.bind(str(tmp_path / "guard.sock"))
        sock.listen(5)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.serve_listeners, behave, [trio.SocketListener(sock)])
            client = GuardClient(tmp_path, incarnation="run", started_ns=5)
            now = SystemClock().now()
            for ask in (client.status, client.standby, partial(client.arm, sequence=1, fence_at=now.plus_s(5)), partial(client.narrow, now.plus_s(5))):
                began = trio.current_time()
                with pytest.raises(GuardError) as caught:
                    await ask(deadline_s=0.3)
                assert trio.current_time() - began < 5
                assert len(str(caught.value)) < 5000
            await client.aclose()
            nursery.cancel_scope.cancel()

    trio.run(main)
