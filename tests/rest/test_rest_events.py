"""GET /pgha/events: what followers get, in which order, how they resume, and why they are dropped. Nobody is delayed by them."""

from __future__ import annotations

import base64
import json
import socket
import ssl
import struct
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
from rest_world import WALL_S, ClockAt, Inbox, ask, published, serving, status_of, talk, until_closed
from trio_websocket import open_websocket_url

from pgha.events import EventLog
from pgha.model.event import RoleEvent
from pgha.rest import stream as streams
from pgha.rest.published import Board
from pgha.rest.routes import App
from pgha.rest.stream import Readers
from pgha.rest.tls import make_context
from pgha.rest.wire import Request

HEALTHY = b"GET /primary HTTP/1.0\r\n\r\n"
UPGRADE = b"GET /pgha/events%s HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: " + base64.b64encode(b"k" * 16) + b"\r\n\r\n"


def run(function: Any, timeout_s: float = 60) -> None:
    async def bounded() -> None:
        with trio.fail_after(timeout_s):
            await function()

    trio.run(bounded)


class Node:
    """A node's log and application; `happens` adds an event."""

    def __init__(self, *, at_most: int = 1000, run: str = "r1", **log: Any) -> None:
        self.events = EventLog(run=run, node="n1", scope="bench", **log)
        self.readers = Readers(self.events, clock=ClockAt(), at_most=lambda: at_most)
        self.app = App(Board(published()), Inbox(), clock=ClockAt(), readers=self.readers)

    def happens(self, text: str = "", *, count: int = 1) -> None:
        for _ in range(count):
            self.events.add(RoleEvent(role="primary", state=text or f"s{self.events.last + 1}", timeline=1, was_role="", was_state=""), wall_s=WALL_S)


def url(address: tuple[str, int], query: str = "") -> str:
    return f"ws://{address[0]}:{address[1]}/pgha/events{query}"


async def said(follower: Any) -> dict[str, Any]:
    with trio.fail_after(10):
        message: dict[str, Any] = json.loads(await follower.get_message())
        return message


async def none_left(node: Node) -> None:
    with trio.fail_after(10):
        while len(node.readers):
            await trio.sleep(0.01)


def test_a_follower_gets_what_happens_from_now_on() -> None:
    async def main() -> None:
        node = Node()
        node.happens()
        async with serving(node.app) as address:
            async with open_websocket_url(url(address)) as follower:
                hello = await said(follower)
                assert hello == {"id": "r1-1", "at": "2026-11-23T00:46:48.500Z", "node": "n1", "kind": "hello", "scope": "bench", "version": hello["version"], "oldest": "r1-0"}
                node.happens("stopped")
                assert await said(follower) == {"id": "r1-2", "at": "2026-11-23T00:46:48.500Z", "node": "n1", "kind": "role", "role": "primary", "state": "stopped", "timeline": 1,
                                               "was_role": "", "was_state": ""}
                node.happens(count=3)
                assert [(await said(follower))["id"] for _ in range(3)] == ["r1-3", "r1-4", "r1-5"]
            await none_left(node)

    run(main)


@pytest.mark.parametrize(("after", "messages"), [
    ("r1-3", ["hello r1-3", "r1-4", "r1-5"]),
    ("r1-5", ["hello r1-5"]),
    ("0", ["hello r1-2", "r1-3", "r1-4", "r1-5"]),
    ("r1-2", ["hello r1-2", "r1-3", "r1-4", "r1-5"]),
    ("r1-1", ["hello r1-2", "gap dropped r1-1 1", "r1-3", "r1-4", "r1-5"]),
    ("r1-0", ["hello r1-2", "gap dropped r1-0 2", "r1-3", "r1-4", "r1-5"]),
    ("r0-4", ["hello r1-2", "gap restarted r0-4 None", "r1-3", "r1-4", "r1-5"]),
    ("r1-6", ["hello r1-2", "gap restarted r1-6 None", "r1-3", "r1-4", "r1-5"]),
])
@pytest.mark.parametrize("by", ["query", "header"])
def test_a_follower_resumes_or_is_told_why_not(after: str, messages: list[str], by: str) -> None:
    async def main() -> None:
        node = Node(kept=3)
        node.happens(count=5)
        headers = [("Last-Event-ID", after)] if by == "header" else []
        async with serving(node.app) as address, open_websocket_url(url(address, f"?after={after}" if by == "query" else ""), extra_headers=headers) as follower:
            node.happens()
            found = []
            while not found or found[-1] != "r1-6":
                message = await said(follower)
                found.append({"hello": f"hello {message['id']}", "gap": f"gap {message.get('reason')} {message.get('after')} {message.get('missed')}"}.get(message["kind"], message["id"]))
            assert found == [*messages, "r1-6"]

    run(main)


def test_a_page_for_who_asks_once() -> None:
    async def main() -> None:
        node = Node(kept=3)
        async with serving(node.app) as address:
            assert json.loads((await ask(address, "GET", "/pgha/events"))[1]) == {"node": "n1", "scope": "bench", "last": "r1-0", "oldest": "r1-0", "more": None, "gap": None, "events": []}
            node.happens(count=5)
            page = json.loads((await ask(address, "GET", "/pgha/events"))[1])
            assert [event["id"] for event in page["events"]] == ["r1-3", "r1-4", "r1-5"]
            assert (page["last"], page["oldest"], page["gap"]) == ("r1-5", "r1-2", None)
            page = json.loads((await ask(address, "GET", "/pgha/events?after=r1-1&kinds=lock,role"))[1])
            assert page["gap"]["missed"] == 1
            assert len(page["events"]) == 3
            assert json.loads((await ask(address, "GET", "/pgha/events?kinds=lock"))[1])["events"] == []
            assert json.loads((await ask(address, "GET", "/pgha/events?after=r1-4", headers={"Last-Event-ID": "r1-0"}))[1])["events"][0]["id"] == "r1-5"
            for wrong in ("?after=x", "?after=%00-1", "?kinds=", "?kinds=role,nonsense", "?after=r1-" + "9" * 40):
                status, text = await ask(address, "GET", "/pgha/events" + wrong)
                assert status == 400, text
            assert "nonsense; there are agent, decision" in (await ask(address, "GET", "/pgha/events?kinds=nonsense"))[1].decode()
            assert (await ask(address, "OPTIONS", "/pgha/events"))[1] == b""
            assert (await ask(address, "POST", "/pgha/events"))[0] == 404
            assert (await ask(address, "GET", "/pgha/events/x"))[0] == 404

    run(main)


def test_kinds_are_chosen() -> None:
    async def main() -> None:
        node = Node()
        async with serving(node.app) as address, open_websocket_url(url(address, "?kinds=lock")) as locks, open_websocket_url(url(address, "?kinds=lock,role")) as both:
            await said(locks)
            await said(both)
            node.happens(count=100)
            assert (await said(both))["kind"] == "role"
            with trio.move_on_after(0.1) as silent:
                await locks.get_message()
            assert silent.cancelled_caught

    run(main)


def with_headers(**changed: str) -> bytes:
    headers = {"Host": "x", "Upgrade": "websocket", "Connection": "Upgrade", "Sec-WebSocket-Version": "13", "Sec-WebSocket-Key": base64.b64encode(b"k" * 16).decode(), **changed}
    return ("GET /pgha/events HTTP/1.1\r\n" + "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items() if value) + "\r\n").encode()


@pytest.mark.parametrize(("request_", "status"), [
    (with_headers(Sec_WebSocket_Version="8", Connection="keep-alive, Upgrade"), 426),
    (UPGRADE.replace(b"Version: 13", b"Version: 8") % b"", 426),
    (UPGRADE.replace(b"Sec-WebSocket-Version: 13\r\n", b"") % b"", 426),
    (UPGRADE.replace(b"Connection: Upgrade", b"Connection: close") % b"", 400),
    (UPGRADE.replace(base64.b64encode(b"k" * 16), b"short") % b"", 400),
    (UPGRADE.replace(base64.b64encode(b"k" * 16), b"?" * 24) % b"", 400),
    (UPGRADE % b"?after=nonsense", 400),
    (UPGRADE % b"?kinds=nonsense", 400),
    (with_headers(Origin="https://evil.example"), 403),
    (with_headers(Origin="http://x"), 101),
    (with_headers(Connection="keep-alive, Upgrade"), 101),
    (UPGRADE.replace(b"websocket", b"h2c, WebSocket") % b"", 101),
    ((UPGRADE % b"").replace(b"HTTP/1.1", b"HTTP/1.0"), 200),
    ((UPGRADE % b"").replace(b"/pgha/events", b"/primary"), 200),
    ((UPGRADE % b"").replace(b"/pgha/events", b"/pgha/nothing"), 404),
    ((UPGRADE % b"").replace(b"GET", b"POST"), 404),
    ((UPGRADE % b"").replace(b"GET", b"HEAD"), 200),
])
def test_who_is_let_in(request_: bytes, status: int) -> None:
    async def main() -> None:
        node = Node()
        async with serving(node.app) as address:
            async with await trio.open_tcp_stream(*address) as client:
                await client.send_all(request_)
                assert status_of(bytes(await client.receive_some(1000))) == status
            await none_left(node)

    run(main)


def test_there_is_a_limit_and_a_place_is_free_again() -> None:
    async def main() -> None:
        node = Node(at_most=2)
        async with serving(node.app) as address:
            async with open_websocket_url(url(address)), open_websocket_url(url(address)):
                answer = await talk(address, UPGRADE % b"")
                assert status_of(answer) == 503
                assert b"2 readers of events, as many as may be (pgha.event_readers)" in answer
                assert (await ask(address, "GET", "/pgha/events"))[0] == 200, "the page is for everybody"
            await none_left(node)
            async with open_websocket_url(url(address)) as follower:
                assert (await said(follower))["kind"] == "hello"

    run(main)


def masked(opcode: int, payload: bytes, *, final: bool = True, mask: bool = True, length: bytes | None = None) -> bytes:
    """A client's frame."""
    head = bytes(((0x80 if final else 0) | opcode,))
    key = b"\x01\x02\x03\x04"
    size = length if length is not None else bytes(((0x80 if mask else 0) | len(payload),)) if len(payload) < 126 else struct.pack("!BH", (0x80 if mask else 0) | 126, len(payload))
    return head + size + ((key + bytes(b ^ key[n % 4] for n, b in enumerate(payload))) if mask else payload)


def frames(data: bytes) -> list[tuple[int, bytes]]:
    """What a server sent, after the head of its answer."""
    found, data = [], data.partition(b"\r\n\r\n")[2]
    while data:
        opcode, length, at = data[0] & 15, data[1], 2
        assert data[0] & 0x80
        assert not length & 0x80, "a server's frames are not masked"
        if length == 126:
            length, at = int.from_bytes(data[2:4], "big"), 4
        found.append((opcode, data[at:at + length]))
        data = data[at + length:]
    return found


@pytest.mark.parametrize(("what", "sent", "code"), [
    ("its own close", masked(8, b"\x03\xe8bye"), 1000),
    ("a close of its own kind", masked(8, b"\x0f\xa0"), 4000),
    ("a close without a code", masked(8, b""), 1000),
    ("a close with half a code", masked(8, b"\x03"), 1002),
    ("a close with a code that nobody may send", masked(8, b"\x03\xed"), 1002),
    ("a close with a reason that is no text", masked(8, b"\x03\xe8\xff\xfe"), 1007),
    ("text", masked(1, b"hello"), 1003),
    ("text that is none", masked(1, b"\xff\xff"), 1007),
    ("bytes", masked(2, b"\0\1\2"), 1003),
    ("the beginning of an endless message", masked(2, b"abc", final=False), 1003),
    ("the beginning of a huge frame", masked(2, b"x" * 3, length=struct.pack("!BQ", 0x80 | 127, 1 << 40)), 1003),
    ("a huge text", masked(1, b"x" * 60_000), 1003),
    ("no mask", masked(1, b"hello", mask=False), 1002),
    ("a continuation of nothing", masked(0, b"hello"), 1002),
    ("an unknown opcode", masked(3, b"hello"), 1002),
    ("a reserved bit", b"\xf1" + masked(1, b"hello")[1:], 1002),
    ("a ping in two parts", masked(9, b"x", final=False), 1002),
    ("a ping that is too long", masked(9, b"x" * 200), 1002),
    ("another request", b"GET /primary HTTP/1.1\r\nHost: x\r\n\r\n", 1002),
    ("too many pings", masked(9, b"x") * 60, 1008),
])
def test_whatever_a_client_says_it_is_closed_properly(what: str, sent: bytes, code: int) -> None:
    async def main() -> None:
        node = Node()
        async with serving(node.app) as address:
            for apart in (False, True):
                async with await trio.open_tcp_stream(*address) as client:
                    if apart:
                        await client.send_all(UPGRADE % b"")
                        for n in range(0, len(sent), max(1, len(sent) // 7)):
                            await client.send_all(sent[n:n + max(1, len(sent) // 7)])
                    else:
                        await client.send_all(UPGRADE % b"" + sent)
                    with trio.fail_after(2 * streams.CLOSE_S):
                        *_, (opcode, payload) = frames(await until_closed(client))
                    assert opcode == 8
                    assert int.from_bytes(payload[:2], "big") == code, (what, payload)
            await none_left(node)
            assert status_of(await talk(address, HEALTHY)) == 200

    run(main)


def test_pings_are_answered_and_what_comes_with_the_request_counts() -> None:
    async def main() -> None:
        node = Node()
        async with serving(node.app) as address, await trio.open_tcp_stream(*address) as client:
            await client.send_all(UPGRADE % b"" + masked(9, b"a") + masked(10, b"unasked") + masked(9, b"last"))
            await trio.sleep(0.1)
            await client.send_all(masked(8, b"\x03\xe8"))
            told = frames(await until_closed(client))
            assert [opcode for opcode, _ in told] in ([1, 10, 8], [1, 10, 10, 8])
            assert told[-2] == (10, b"last")

    run(main)


def test_a_client_that_just_goes_leaves_nothing_behind() -> None:
    async def main() -> None:
        node = Node()
        async with serving(node.app) as address:
            clients = [await trio.open_tcp_stream(*address) for _ in range(6)]
            for number, client in enumerate(clients):
                await client.send_all(UPGRADE % b"" if number % 2 else (UPGRADE % b"")[:-2])
                if number % 3 == 0:
                    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))    # a reset
            for client in clients:
                await client.aclose()
            node.happens(count=50)
            await none_left(node)
            assert status_of(await talk(address, HEALTHY)) == 200

    run(main)


class Deaf:
    """A client that asks for events and reads none, with a small buffer of its own."""

    def __init__(self, address: tuple[str, int], query: bytes = b"", wrap: Callable[[socket.socket], socket.socket] = lambda sock: sock) -> None:
        self.sock = socket.socket()
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16384)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, 1400)      # loopback's own would not fit: every window of it is waited for
        self.sock.settimeout(20)
        self.sock.connect(address)
        self.sock = wrap(self.sock)
        self.sock.sendall(UPGRADE % query)

    def rest(self) -> list[tuple[int, bytes]]:
        data = b""
        while True:
            try:
                more = self.sock.recv(1 << 16)
            except ConnectionResetError:
                break
            if not more:
                break
            data += more
        self.sock.close()
        return frames(data)


def test_who_reads_too_slowly_is_dropped_with_a_reason_and_goes_on_where_it_was() -> None:
    """Because the log has forgotten what it has not got yet. It costs one number, however much it owes."""
    async def main() -> None:
        node = Node(kept=200)
        async with serving(node.app) as address, open_websocket_url(url(address), message_queue_size=20_000) as quick:
            deaf = await trio.to_thread.run_sync(Deaf, address)
            while len(node.readers) < 2:
                await trio.sleep(0.01)
            assert (await said(quick))["id"] == "r1-0"
            for n in range(1, 5000, 50):
                node.happens("x" * 1000, count=50)
                assert [(await said(quick))["id"] for _ in range(50)] == [f"r1-{n + i}" for i in range(50)], "a quick one misses nothing"
                assert status_of(await talk(address, HEALTHY)) == 200
            told = await trio.to_thread.run_sync(deaf.rest)
            *events, (opcode, payload) = told
            assert opcode == 8
            assert int.from_bytes(payload[:2], "big") == streams.AGAIN_LATER
            assert b"too slow" in payload
            numbers = [int(json.loads(text)["id"].partition("-")[2]) for _, text in events]
            assert numbers == list(range(len(numbers))), "what it got is whole, as far as it goes"
            assert payload[2:].decode().endswith(f"after=r1-{numbers[-1]}")
            page = json.loads((await ask(address, "GET", f"/pgha/events?after=r1-{numbers[-1]}"))[1])
            assert page["gap"]["reason"] == "dropped"
            assert page["gap"]["missed"] == 4800 - numbers[-1]

    run(main)


def test_pages_are_small_and_shared() -> None:
    """A client that asks and does not read keeps what it was given: a page, not a megabyte, and the same one as the others'."""
    async def main() -> None:
        node = Node()
        node.happens("x" * 900, count=1000)

        def page(query: str = "") -> Any:
            return node.readers.page(Request(method="GET", path="/pgha/events", query=dict(part.split("=") for part in query.split("&") if part)))

        newest = page()
        assert len(newest.body) < streams.PAGE_BYTES + 1000
        assert page().body is newest.body
        assert page("after=0").body is page("after=0").body
        ids = [event["id"] for event in json.loads(newest.body)["events"]]
        assert ids == [f"r1-{n}" for n in range(1001 - len(ids), 1001)], "the newest, oldest first"
        assert json.loads(newest.body)["more"] is None
        for query, found in (("kinds=role&", 1000), ("kinds=lock&", 0), ("", 1000)):
            events, more, pages = [], "0", 0
            while more is not None:
                body = json.loads(page(f"{query}after={more}").body)
                events, more, pages = events + body["events"], body["more"], pages + 1
                assert len(body["events"]) <= streams.PAGE_EVENTS
            assert [event["id"] for event in events] == [f"r1-{n}" for n in range(1, found + 1)]
            assert pages == (1 if found == 0 else 1000 // len(ids) + 1)
        assert len(node.readers._pages) <= streams.PAGES_KEPT
        node.happens("y" * 100_000)
        assert page().body is not newest.body
        assert [event["id"] for event in json.loads(page(f"after=r1-{node.events.last - 1}").body)["events"]] == [f"r1-{node.events.last}"], "one at least, however long"
        node.happens(count=500)
        assert len(json.loads(page().body)["events"]) == streams.PAGE_EVENTS
        gap = json.loads(page("after=r0-1").body)
        assert (gap["gap"]["reason"], gap["more"] is not None) == ("restarted", True)
        async with serving(node.app) as address:     # in two parts
            status, text = await ask(address, "GET", "/pgha/events?after=0")
            assert (status, json.loads(text)["oldest"]) == (200, node.events.id_of(node.events.forgotten))

    run(main)


def test_who_answers_no_ping_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"PING_EVERY_S": 0.3, "PONG_S": 0.3, "LOOK_EVERY_S": 0.05}.items():
        monkeypatch.setattr(streams, name, value)

    async def main() -> None:
        node = Node()
        async with serving(node.app) as address, open_websocket_url(url(address)) as alive:
            silent = await trio.to_thread.run_sync(Deaf, address)
            told = await trio.to_thread.run_sync(silent.rest)
            assert [opcode for opcode, _ in told] == [1, 9, 8]
            assert int.from_bytes(told[-1][1][:2], "big") == streams.UNHEARD
            assert (await said(alive))["kind"] == "hello"
            node.happens()
            assert (await said(alive))["id"] == "r1-1", "it answers, so it stays"

    run(main)


@pytest.mark.parametrize("reads_at_last", [True, False])
def test_who_takes_nothing_is_dropped_and_told_if_it_reads_after_all(monkeypatch: pytest.MonkeyPatch, reads_at_last: bool) -> None:
    for name, value in {"WRITE_S": 0.2, "CLOSE_S": 5.0 if reads_at_last else 0.2, "LOOK_EVERY_S": 0.05}.items():
        monkeypatch.setattr(streams, name, value)

    async def main() -> None:
        node = Node()
        async with serving(node.app) as address:
            deaf = await trio.to_thread.run_sync(Deaf, address)
            while not len(node.readers):
                await trio.sleep(0.01)
            (reader,) = node.readers._readers
            node.happens("x" * 1000, count=600)
            while reader._closing_at is None:
                await trio.sleep(0.01)
            if not reads_at_last:
                await none_left(node)
                deaf.sock.close()
                return
            *events, (opcode, payload) = await trio.to_thread.run_sync(deaf.rest)
            assert (opcode, int.from_bytes(payload[:2], "big")) == (8, streams.AGAIN_LATER)
            assert b"too slow: nothing was taken" in payload
            assert payload[2:].decode().endswith(f"after={json.loads(events[-1][1])['id']}")
            await none_left(node)

    run(main)


def test_the_agents_end_is_told() -> None:
    async def main() -> None:
        node = Node()
        async with serving(node.app) as address:
            follower = await trio.open_tcp_stream(*address)
            await follower.send_all(UPGRADE % b"")
            assert await follower.receive_some(1000)
        assert frames(b"\r\n\r\n" + await until_closed(follower)) == [(8, (1001).to_bytes(2, "big") + b"the agent stops")]
        await follower.aclose()

    run(main)


@asynccontextmanager
async def over_tls(node: Node, tmp_path: Path, *, verify_client: str = "none") -> AsyncIterator[tuple[tuple[str, int], Callable[..., ssl.SSLContext]]]:
    """A server with a certificate; what makes a client's context."""
    subprocess.run(["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-keyout", tmp_path / "key.pem", "-out", tmp_path / "cert.pem",
                    "-days", "2", "-subj", "/CN=n1", "-addext", "subjectAltName=IP:127.0.0.1"], check=True, capture_output=True)

    def client(*, certificate: bool = False) -> ssl.SSLContext:
        context = ssl.create_default_context(cafile=str(tmp_path / "cert.pem"))
        if certificate:
            context.load_cert_chain(tmp_path / "cert.pem", tmp_path / "key.pem")
        return context

    context = make_context(certfile=str(tmp_path / "cert.pem"), keyfile=str(tmp_path / "key.pem"), cafile=str(tmp_path / "cert.pem"), verify_client=verify_client)
    async with serving(node.app, ssl_context=context) as address:
        yield address, client


@pytest.mark.parametrize(("verify_client", "certificate", "served"), [("none", False, True), ("optional", False, True), ("required", False, False), ("required", True, True)])
def test_over_tls_as_configured(tmp_path: Path, verify_client: str, certificate: bool, served: bool) -> None:
    async def main() -> None:
        node = Node()
        async with over_tls(node, tmp_path, verify_client=verify_client) as (address, client):
            if not served:
                stream = trio.SSLStream(await trio.open_tcp_stream(*address), client(), server_hostname="127.0.0.1")
                with pytest.raises((trio.BrokenResourceError, AssertionError)):       # TLS 1.3: the client learns it when it reads
                    await stream.send_all(UPGRADE % b"")
                    assert await stream.receive_some(100)
                await trio.aclose_forcefully(stream)
                return
            async with open_websocket_url(f"wss://{address[0]}:{address[1]}/pgha/events?after=0", ssl_context=client(certificate=certificate)) as follower:
                await said(follower)
                node.happens("y" * 900, count=300)
                assert [(await said(follower))["id"] for _ in range(300)] == [f"r1-{n + 1}" for n in range(300)]
            await none_left(node)

    run(main)


def test_who_does_not_read_over_tls_is_dropped_too(tmp_path: Path) -> None:
    async def main() -> None:
        node = Node(kept=100)
        async with over_tls(node, tmp_path) as (address, client):
            context = client()
            deaf = await trio.to_thread.run_sync(lambda: Deaf(address, wrap=lambda sock: context.wrap_socket(sock, server_hostname="127.0.0.1")))
            while len(node.readers) < 1:
                await trio.sleep(0.01)
            for _ in range(100):
                node.happens("x" * 1000, count=50)
                await trio.lowlevel.checkpoint()
            *events, (opcode, payload) = await trio.to_thread.run_sync(deaf.rest)
            assert (opcode, int.from_bytes(payload[:2], "big")) == (8, streams.AGAIN_LATER)
            assert payload[2:].decode().endswith(f"after={json.loads(events[-1][1])['id']}")
            await none_left(node)

    run(main)


def test_wsproto_is_loaded_by_the_first_reader_that_speaks() -> None:
    """An agent that nobody follows has no use for it."""
    code = "import sys, pgha.agent; print(sorted(m for m in sys.modules if m.split('.')[0] in ('wsproto', 'trio_websocket')))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
