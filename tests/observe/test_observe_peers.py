"""What the other members answer: real servers on loopback that answer, are silent, slow, or talk nonsense."""

from __future__ import annotations

import json
import os
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio

from pgha.clock import SystemClock
from pgha.machine import http
from pgha.model.decision import PeerQuestion
from pgha.model.observation import Peer
from pgha.observe.peers import ANSWER_S, PeersObserver

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
Handler = Callable[[str, trio.SocketStream], Awaitable[None]]

VOTE = {"name": "b", "epoch": 4, "timeline": 3, "lsn": 1000, "candidate": True, "state": "running", "role": "replica", "tags": {"nofailover": True},
        "watchdog_failed": False, "system_identifier": "7711161683783831200", "node_id": "id-b"}


def recorded(which: str) -> dict[str, Any]:
    answers = json.loads((GOLDEN / "steady.json").read_text())[which]
    body: dict[str, Any] = next(a["body"] for a in answers if a["request"] in ("GET /patroni", "GET /"))
    return body


class Server:
    """A member's REST port. `handler(path, stream)` says what it does; the rest is counted."""

    def __init__(self, handler: Handler) -> None:
        self.handler = handler
        self.paths: list[str] = []
        self.open = 0
        self.url = ""

    async def run(self, *, task_status: Any = trio.TASK_STATUS_IGNORED) -> None:
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        self.url = f"http://127.0.0.1:{listener.socket.getsockname()[1]}/patroni"
        async with trio.open_nursery() as nursery:
            task_status.started()
            await trio.serve_listeners(self._serve, [listener], handler_nursery=nursery)

    async def _serve(self, stream: trio.SocketStream) -> None:
        self.open += 1
        try:
            received = b""
            while chunk := await stream.receive_some(65536):
                received += chunk
                while b"\r\n\r\n" in received:
                    head, _, received = received.partition(b"\r\n\r\n")
                    path = head.split(b" ")[1].decode()
                    self.paths.append(path)
                    await self.handler(path, stream)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass
        finally:
            self.open -= 1
            await trio.aclose_forcefully(stream)


def response(body: bytes, *, status: int = 200) -> bytes:
    return b"HTTP/1.1 %d x\r\nContent-Length: %d\r\nContent-Type: application/json\r\n\r\n" % (status, len(body)) + body


def answering(body: Any, *, status: int = 200) -> Handler:
    async def handle(path: str, stream: trio.SocketStream) -> None:
        await stream.send_all(response(body if isinstance(body, bytes) else json.dumps(body).encode(), status=status))

    return handle


def of_another_make(body: Any) -> Handler:
    """Patroni, under the name that it is asked by: an unknown path gets the same body with 503."""
    body = {**body, "patroni": {**body["patroni"], "name": "b"}}

    async def handle(path: str, stream: trio.SocketStream) -> None:
        await answering(body, status=200 if path == "/patroni" else 503)(path, stream)

    return handle


async def member_of_ours(path: str, stream: trio.SocketStream) -> None:
    """pgha answers both: `/patroni` as the reference does, and votes."""
    await answering(VOTE if path.startswith("/pgha/vote") else recorded("replica"))(path, stream)


async def silent(path: str, stream: trio.SocketStream) -> None:
    while await stream.receive_some(4096):
        pass


async def hanging_up(path: str, stream: trio.SocketStream) -> None:
    await stream.aclose()


async def babbling(path: str, stream: trio.SocketStream) -> None:
    await stream.send_all(b"SSH-2.0-OpenSSH_9.2\r\n")


async def endless(path: str, stream: trio.SocketStream) -> None:
    await stream.send_all(b"HTTP/1.1 200 x\r\nTransfer-Encoding: chunked\r\n\r\n")
    while True:
        await stream.send_all(b"10000\r\n" + b" " * 0x10000 + b"\r\n")


async def trickling(path: str, stream: trio.SocketStream) -> None:
    await stream.send_all(b"HTTP/1.1 200 x\r\nContent-Length: 1000\r\n\r\n")
    for _ in range(100):
        await stream.send_all(b" ")
        await trio.sleep(0.05)


class Scene:
    def __init__(self) -> None:
        self.wakes = 0
        self.observer = PeersObserver(clock=SystemClock(), wake=self._wake, http=partial(http, False))

    def _wake(self) -> None:
        self.wakes += 1

    async def peer(self, name: str, holds: Callable[[Peer], Any] = lambda _p: True, within_s: float = 3) -> Peer:
        await until(lambda: name in self.observer.facts and holds(self.observer.facts[name]), within_s)
        return self.observer.facts[name]


async def until(holds: Callable[[], Any], within_s: float) -> float:
    begun = trio.current_time()
    with trio.fail_after(within_s):
        while not holds():
            await trio.sleep(0.005)
    return trio.current_time() - begun


def with_servers(main: Callable[..., Awaitable[None]], **handlers: Handler) -> None:
    """`main(scene, **servers)` beside a running observer."""
    async def body() -> None:
        scene = Scene()
        servers = {name: Server(handler) for name, handler in handlers.items()}
        async with trio.open_nursery() as nursery:
            for server in servers.values():
                await nursery.start(server.run)
            await nursery.start(scene.observer.run)
            await main(scene, **servers)
            nursery.cancel_scope.cancel()

    trio.run(body)


def question(epoch: int = 4, every_s: float = 0.05, **servers: Server) -> PeerQuestion:
    return PeerQuestion(names={n: s.url for n, s in servers.items()}, epoch=epoch, every_s=every_s)


# --- answers ---------------------------------------------------------------------------------------------------------


def test_a_members_vote():
    async def main(scene: Scene, b: Server) -> None:
        scene.observer.ask(question(b=b))
        peer = await scene.peer("b")
        assert b.paths[0] == "/pgha/vote?epoch=4&wait=0.25"
        assert (peer.answered, peer.is_pgha, peer.in_recovery, peer.running, peer.silent_since, peer.why) == (True, True, True, True, None, "")
        assert (peer.timeline, peer.lsn, peer.frozen_epoch, peer.candidate) == (3, 1000, 4, True)
        assert peer.tags.nofailover
        assert (peer.watchdog_failed, peer.system_identifier) == (False, "7711161683783831200")

    with_servers(main, b=answering(VOTE))


@pytest.mark.parametrize(("changed", "expected"), [
    ({"role": "primary"}, {"in_recovery": False}),
    ({"role": "demoted"}, {"in_recovery": None}),
    ({"state": "stopped"}, {"in_recovery": None, "running": False}),
    ({"state": "unknown"}, {"in_recovery": True, "running": False}),
    ({"candidate": False}, {"candidate": False}),
    ({"epoch": -1}, {"frozen_epoch": -1}),
    ({"watchdog_failed": True}, {"watchdog_failed": True}),
    ({"tags": ["x"]}, {"answered": True}),
])
def test_what_a_vote_says(changed: dict[str, Any], expected: dict[str, Any]):
    async def main(scene: Scene, b: Server) -> None:
        scene.observer.ask(question(b=b))
        peer = await scene.peer("b")
        assert {k: getattr(peer, k) for k in expected} == expected

    with_servers(main, b=answering(VOTE | changed))


def test_without_an_election_nobody_is_made_to_wait():
    async def main(scene: Scene, b: Server) -> None:
        scene.observer.ask(question(epoch=-1, b=b))
        await scene.peer("b")
        assert b.paths[0] == "/pgha/vote?epoch=-1"

    with_servers(main, b=answering(VOTE))


@pytest.mark.parametrize(("which", "in_recovery"), [("primary", False), ("replica", True)])
def test_a_member_of_another_make_is_asked_its_way(which: str, in_recovery: bool):
    body = recorded(which)

    async def main(scene: Scene, b: Server) -> None:
        scene.observer.ask(question(b=b))
        peer = await scene.peer("b")
        assert (peer.answered, peer.is_pgha, peer.in_recovery, peer.frozen_epoch) == (True, False, in_recovery, -1)
        assert peer.timeline == body["timeline"]
        assert peer.lsn == max(v for v in body["xlog"].values() if isinstance(v, int) and not isinstance(v, bool))
        assert peer.system_identifier == "7711161683783831200"
        await until(lambda: len(b.paths) >= 4, 2)
        assert b.paths[:2] == ["/pgha/vote?epoch=4&wait=0.25", "/patroni"]
        assert set(b.paths[2:]) == {"/patroni"}, "it is not asked for votes again"

    with_servers(main, b=of_another_make(body))


def test_a_vote_counts_only_for_who_gives_it():
    """With a wrong connect_address one node's vote would count for two, and a quorum of one be reached."""
    async def main(scene: Scene, b: Server, c: Server) -> None:
        scene.observer.ask(PeerQuestion(names={"b": b.url, "c": b.url, "d": c.url}, epoch=4))
        assert (await scene.peer("b")).answered
        for name in ("c", "d"):
            peer = await scene.peer(name)
            assert not peer.answered
            assert "another member answers at its address: 'b'" in peer.why

    with_servers(main, b=answering(VOTE), c=of_another_make(recorded("replica")))


def test_a_member_that_changes_its_make_is_asked_for_votes_again():
    async def main(scene: Scene, b: Server) -> None:
        scene.observer.ask(question(b=b))
        assert not (await scene.peer("b")).is_pgha
        scene.observer.ask(PeerQuestion())
        await until(lambda: not b.open, 1)
        b.handler = member_of_ours
        scene.observer.ask(question(epoch=5, b=b))               # another election, perhaps days later
        await scene.peer("b")
        await scene.peer("b", lambda p: p.is_pgha, within_s=1)

    with_servers(main, b=of_another_make(recorded("replica")))


def test_a_member_of_another_make_whose_sql_does_not_answer_says_nothing_but_who_it_is():
    body = {k: v for k, v in recorded("replica").items() if k not in ("xlog", "timeline")}

    async def main(scene: Scene, b: Server) -> None:
        scene.observer.ask(question(b=b))
        peer = await scene.peer("b")
        assert (peer.answered, peer.why, peer.lsn, peer.running, peer.in_recovery) == (True, "its PostgreSQL does not answer", 0, False, None)
        assert peer.system_identifier == "7711161683783831200"

    with_servers(main, b=of_another_make(body))


@pytest.mark.parametrize(("state", "in_recovery"), [("running", False), ("starting", False), ("stopping", False), ("crashed", None), ("stopped", None), ("start failed", None)])
def test_a_member_of_another_make_that_calls_itself_a_primary_is_one_also_if_its_sql_does_not_answer(state: str, in_recovery: bool | None):
    body = {**{k: v for k, v in recorded("primary").items() if k not in ("xlog", "timeline")}, "state": state}

    async def main(scene: Scene, b: Server) -> None:
        scene.observer.ask(question(b=b))
        peer = await scene.peer("b")
        assert (peer.answered, peer.in_recovery, peer.running) == (True, in_recovery, False)

    with_servers(main, b=of_another_make(body))


# --- no answers ------------------------------------------------------------------------------------------------------


# An answer that is cut off leaves generators inside httpx to the garbage collector; ours is closed, and so are the sockets.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(("handler", "why", "within_s"), [
    (silent, f"no answer within {ANSWER_S} s", ANSWER_S + 0.4), (trickling, f"no answer within {ANSWER_S} s", ANSWER_S + 0.4), (hanging_up, "disconnected", 0.4),
    (babbling, "", ANSWER_S + 0.4), (endless, "longer than 1 MiB", 0.6), (answering(VOTE | {"lsn": None}), "does not parse", 0.4),
    (answering(VOTE | {"lsn": "many"}), "does not parse", 0.4), (answering(VOTE | {"timeline": [1]}), "does not parse", 0.4),
    (answering(b" " * (1 << 21)), "longer than 1 MiB", 0.6),
], ids=["silent", "trickling", "hanging up", "not http", "endless", "null", "a word", "a list", "oversized"])
def test_what_is_no_answer(handler: Handler, why: str, within_s: float):
    async def main(scene: Scene, b: Server) -> None:
        begun = trio.current_time()
        scene.observer.ask(question(b=b))
        peer = await scene.peer("b")
        assert trio.current_time() - begun < within_s
        assert not peer.answered
        assert why in peer.why
        assert peer.why
        assert (peer.silent_since, peer.lsn, peer.timeline) == (peer.asked_at, 0, 0)
        later = await scene.peer("b", lambda p: p.asked_at > peer.asked_at)
        assert later.silent_since == peer.silent_since, "since the first of an unbroken row"

    with_servers(main, b=handler)


@pytest.mark.parametrize("body", [b"", b"[]", b"null", b"<html>", b"\xff\xfe", b"{" * 50], ids=["empty", "list", "null", "html", "no text", "broken"])
def test_a_proxys_page_is_no_vote(body: bytes):
    async def main(scene: Scene, b: Server) -> None:
        scene.observer.ask(question(b=b))
        peer = await scene.peer("b")
        assert (peer.answered, peer.system_identifier, peer.lsn, peer.in_recovery, peer.frozen_epoch) == (False, "", 0, None, -1)

    with_servers(main, b=answering(body, status=502))


@pytest.mark.parametrize("body", [b"{}", b"null", b"<html>", b'{"status": "ok"}'])
def test_a_page_with_status_200_is_no_vote(body: bytes):
    async def main(scene: Scene, b: Server) -> None:
        scene.observer.ask(question(b=b))
        assert not (await scene.peer("b")).answered

    with_servers(main, b=answering(body))


def test_a_port_where_nobody_listens_is_known_at_once():
    async def main(scene: Scene, b: Server, gone: Server) -> None:
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        port = listener.socket.getsockname()[1]
        await listener.aclose()
        scene.observer.ask(PeerQuestion(names={"b": b.url, "gone": f"http://127.0.0.1:{port}/patroni", "out of range": "http://127.0.0.1:99999/patroni", "nonsense": "patroni", "ipv6": "http://[::1/patroni"}, epoch=4))
        for name in ("gone", "out of range", "nonsense", "ipv6"):
            peer = await scene.peer(name, within_s=0.5)
            assert not peer.answered
            assert peer.why
        assert (await scene.peer("b")).answered

    with_servers(main, b=answering(VOTE), gone=silent)


def test_a_silent_member_delays_nobodys_answer():
    async def main(scene: Scene, b: Server, c: Server) -> None:
        begun = trio.current_time()
        scene.observer.ask(question(b=b, c=c))
        await scene.peer("c")
        assert trio.current_time() - begun < ANSWER_S / 2
        assert "b" not in scene.observer.facts
        await until(lambda: len(c.paths) > 5, 1)

    with_servers(main, b=silent, c=answering(VOTE | {"name": "c"}))


def test_a_member_that_falls_silent_and_comes_back():
    async def main(scene: Scene, b: Server) -> None:
        scene.observer.ask(question(b=b))
        answered = await scene.peer("b", lambda p: p.answered)
        b.handler = hanging_up
        first = await scene.peer("b", lambda p: not p.answered)
        assert answered.asked_at < first.silent_since
        b.handler = answering(VOTE | {"lsn": 2000})
        back = await scene.peer("b", lambda p: p.answered)
        assert (back.silent_since, back.lsn, back.why) == (None, 2000, "")
        b.handler = hanging_up
        again = await scene.peer("b", lambda p: not p.answered)
        assert again.silent_since > first.silent_since
        scene.observer.ask(question(epoch=5, b=b))
        await until(lambda: scene.observer.facts["b"].asked_at > again.asked_at, 1)
        assert scene.observer.facts["b"].silent_since == again.silent_since, "another question, the same silence"

    with_servers(main, b=answering(VOTE))


HOSTILE = {
    "an endless number": json.dumps(VOTE).replace("1000", "1e999").encode(),
    "an endless priority": json.dumps(VOTE | {"tags": {"failover_priority": 5}}).replace("5}", "1e999}").encode(),
    "brackets without end": b"[" * 200_000,
}


@pytest.mark.parametrize("how", [*HOSTILE, "a character that is none"])
def test_no_answer_and_no_address_is_fatal(how: str):
    async def main(scene: Scene, b: Server, c: Server) -> None:
        urls = {"a character that is none": "http://127.0.0.1\x01/patroni"}
        scene.observer.ask(PeerQuestion(names={"b": urls.get(how, b.url), "c": c.url}, epoch=4))
        peer = await scene.peer("b")
        assert peer.answered == (how == "an endless priority")
        assert (peer.lsn, peer.tags.failover_priority) == ((1000, 1) if peer.answered else (0, 1))
        assert (await scene.peer("c")).answered

    with_servers(main, b=answering(HOSTILE.get(how, b"")), c=answering(VOTE | {"name": "c"}))


# --- when is the loop told? ------------------------------------------------------------------------------------------


def test_only_news_wakes_the_loop():
    async def main(scene: Scene, b: Server) -> None:
        scene.observer.ask(question(every_s=0.01, b=b))
        await until(lambda: len(b.paths) >= 10, 3)
        assert scene.wakes == 1
        b.handler = answering(VOTE | {"lsn": 1001})
        await scene.peer("b", lambda p: p.lsn == 1001)
        count = len(b.paths)
        await until(lambda: len(b.paths) > count + 5, 3)
        assert scene.wakes == 2

    with_servers(main, b=answering(VOTE))


# --- no question -----------------------------------------------------------------------------------------------------


def sockets() -> int:
    return sum(1 for fd in os.listdir("/proc/self/fd") if _is_socket(fd))


def _is_socket(fd: str) -> bool:
    try:
        return os.readlink(f"/proc/self/fd/{fd}").startswith("socket:")
    except OSError:
        return False


# As above: what a cancelled answer leaves inside httpx is no open socket, which is what is asked here.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("handler", [answering(VOTE), silent, trickling, endless], ids=["answering", "silent", "trickling", "endless"])
def test_an_empty_question_ends_the_asking_and_leaves_nothing_open(handler: Handler):
    async def main(scene: Scene, b: Server, c: Server) -> None:
        before = sockets()
        for _ in range(3):
            scene.observer.ask(question(b=b, c=c))
            await until(lambda: b.open and c.open and "c" in scene.observer.facts, 2)
            scene.observer.ask(PeerQuestion())
            assert scene.observer.facts == {}
            await until(lambda: not b.open and not c.open, 1)
            await until(lambda: sockets() == before, 1)
            asked = (len(b.paths), len(c.paths))
            await trio.sleep(0.15)
            assert (len(b.paths), len(c.paths)) == asked
            assert scene.observer.facts == {}

    with_servers(main, b=handler, c=answering(VOTE | {"name": "c"}))


def test_who_is_not_asked_any_more_is_forgotten():
    async def main(scene: Scene, b: Server, c: Server) -> None:
        scene.observer.ask(question(b=b, c=c))
        await scene.peer("b")
        await scene.peer("c")
        scene.observer.ask(question(b=b))
        assert set(scene.observer.facts) == {"b"}
        await until(lambda: not c.open, 1)
        count = len(b.paths)
        scene.observer.ask(question(b=b))                       # the same question: nothing begins anew
        await until(lambda: len(b.paths) > count, 1)
        assert b.open == 1

    with_servers(main, b=answering(VOTE), c=answering(VOTE))
