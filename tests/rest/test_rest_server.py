"""Whatever a client sends, or does not send: it gets 4xx or is cut off in time, and nobody else notices."""

from __future__ import annotations

import random
import ssl
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from rest_world import app_for, ask, body_of, published, serving, status_of, talk, until_closed

from pgha.errors import ConfigError
from pgha.rest.requests import Answer
from pgha.rest.server import Limits, Listen, open_sockets, serve
from pgha.rest.tls import Tls, make_context, server_headers
from pgha.rest.wire import Request, Response, exact_request, split_target

HEALTHY = b"GET /primary HTTP/1.0\r\n\r\n"


def run(function: Any) -> None:
    async def bounded() -> None:
        with trio.fail_after(30):
            await function()

    trio.run(bounded)


class Slow:
    """An application without a short way, whose answers the test controls."""

    def __init__(self) -> None:
        self.release = trio.Event()
        self.seen: list[Request] = []

    def quick(self, key: bytes, *, keep_alive: bool) -> bytes | None:
        return b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n" if key == b"GET /quick" else None

    def has_places(self, number: int) -> None: ...

    def refuses(self, request: Request) -> Response | None:
        return None

    async def handle(self, request: Request) -> Response:
        self.seen.append(request)
        if request.path == "/defect":
            raise KeyError("a defect")
        if request.path == "/wait":
            await self.release.wait()
        return Response(status=200, body=request.body or b"ok")


@pytest.mark.parametrize(("head", "wanted"), [
    (b"GET / HTTP/1.0\r\n\r\n", (b"GET /", False)),
    (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", (b"GET /", True)),
    (b"OPTIONS /primary HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", (b"OPTIONS /primary", False)),
    (b"HEAD /replica?lag=1MB HTTP/1.1\r\nhOsT: x\r\nCONNECTION: Keep-Alive\r\nContent-Length: 0\r\n\r\n", (b"HEAD /replica?lag=1MB", True)),
    (b"GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n", (b"GET /", False)),
    (b"GET / HTTP/1.1\r\nContent-Length: 5\r\n\r\nhello", None),
    (b"GET / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n", None),
    (b"GET / HTTP/1.1\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n", None),
    (b"GET / HTTP/1.1\r\nExpect: 100-continue\r\n\r\n", None),
    (b"POST / HTTP/1.1\r\n\r\n", None),
    (b"GET / HTTP/1.1\r\nBroken\r\n\r\n", None),
    (b"GET / HTTP/1.1\r\n folded: x\r\n\r\n", None),
    (b"GET / HTTP/1.1\nHost: x\n\n", None),
    (b"GET  / HTTP/1.1\r\n\r\n", None),
    (b"GET / HTTP/2.0\r\n\r\n", None),
    (b"GET /\x00 HTTP/1.1\r\n\r\n", None),
    (b"GET /" + b"a" * 256 + b" HTTP/1.1\r\n\r\n", None),
    (b"GET / HTTP/1.1\r\nHost: x\r\n", None),
    (b"", None),
])
def test_only_an_exact_health_request_takes_the_short_way(head: bytes, wanted: tuple[bytes, bool] | None) -> None:
    exact = exact_request(head)
    assert (None if exact is None else (exact.key, exact.keep_alive)) == wanted


def test_targets_are_split_and_decoded() -> None:
    assert split_target("/replica?lag=1MB&lag=2MB&x=&%74ag_a=b%20c#f") == ("/replica", {"lag": "1MB", "x": "", "tag_a": "b c"})
    assert split_target("http://host:8008/cluster?x=1") == ("/cluster", {"x": "1"})
    assert split_target("*") == ("/", {})


MALFORMED: list[tuple[str, bytes, int]] = [
    ("no HTTP at all", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400),
    ("text", b"hello\r\n\r\n", 400),
    ("only a line end and text", b"\r\n\r\nhello\r\n\r\n", 400),
    ("no version", b"GET /\r\n\r\n", 400),
    ("a version of the future", b"GET / HTTP/9.9\r\n\r\n", 505),
    ("header without colon", b"GET / HTTP/1.1\r\nHost: x\r\nbroken\r\n\r\n", 400),
    ("control byte in a header", b"GET / HTTP/1.1\r\nHost: x\r\nA: b\x00c\r\n\r\n", 400),
    ("control byte in the target", b"GET /\x01 HTTP/1.1\r\nHost: x\r\n\r\n", 400),
    ("length that is no number", b"POST /reload HTTP/1.1\r\nHost: x\r\nContent-Length: ten\r\n\r\n", 400),
    ("two lengths", b"POST /reload HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nx", 400),
    ("a length and chunks", b"POST /reload HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET /primary HTTP/1.1\r\nHost: x\r\n\r\n", 400),
    ("chunks and a length, of a question", b"GET /cluster HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\nContent-Length: 0\r\n\r\n0\r\n\r\n", 400),
    ("negative length", b"POST /reload HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n", 400),
    ("a length with 5000 digits", b"POST /reload HTTP/1.1\r\nHost: x\r\nContent-Length: " + b"9" * 5000 + b"\r\n\r\n", 400),
    ("unknown transfer encoding", b"POST /reload HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: gzip\r\n\r\n", 501),
    ("broken chunk", b"POST /reload HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", 400),
    ("body too long, announced", b"POST /reload HTTP/1.1\r\nHost: x\r\nContent-Length: 1048577\r\n\r\n", 413),
    ("body too long, in chunks", b"POST /reload HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n" + b"10000\r\n" + b"x" * 65536 + b"\r\n"
     + (b"10000\r\n" + b"x" * 65536 + b"\r\n") * 16 + b"0\r\n\r\n", 413),
    ("head too long", b"GET / HTTP/1.1\r\nHost: x\r\n" + b"A: b\r\n" * 4000 + b"\r\n", 431),
    ("one endless header", b"GET / HTTP/1.1\r\nHost: x\r\nA: " + b"b" * 20000, 431),
    ("one endless line", b"G" * 20000, 431),
    ("method too odd", b"G(T / HTTP/1.1\r\nHost: x\r\n\r\n", 400),
    ("HTTP/1.1 without Host, a change", b"POST /reload HTTP/1.1\r\n\r\n", 400),
    ("too many parameters", b"GET /x?" + b"a&" * 100 + b" HTTP/1.1\r\nHost: x\r\n\r\n", 400),
    ("CONNECT", b"CONNECT x:1 HTTP/1.1\r\nHost: x\r\n\r\n", 501),
]


@pytest.mark.parametrize(("data", "status"), [row[1:] for row in MALFORMED], ids=[row[0] for row in MALFORMED])
def test_a_malformed_request_gets_its_status_and_disturbs_nobody(data: bytes, status: int) -> None:
    async def main() -> None:
        app, _, inbox, _ = app_for(published())
        inbox.answers["reload"] = Answer(status=202, text="reload scheduled")
        async with serving(app, limits=Limits(head_s=1.0, body_s=1.0, idle_s=1.0)) as address:
            stream = await trio.open_tcp_stream(*address)
            async with stream:
                try:
                    await stream.send_all(data)
                except trio.BrokenResourceError:
                    pass    # refused before it was all sent
                answer = await until_closed(stream)
            assert status_of(answer) == status, answer[:300]
            assert b"Connection: close" in answer or status == 501
            assert status_of(await talk(address, HEALTHY)) == 200
        assert inbox.asked == []

    run(main)


def test_random_bytes_never_end_the_server() -> None:
    async def main() -> None:
        app, *_ = app_for(published())
        dice = random.Random(20261123)
        pieces = [b"GET ", b"POST ", b"/primary", b"/config", b" HTTP/1.1", b" HTTP/1.0", b"\r\n", b"\r\n\r\n", b"\n\n", b"Host: x", b"Content-Length: 7",
                  b"Transfer-Encoding: chunked", b"\x00", b"\xff\xfe", b"Expect: 100-continue", b"Connection: close", b"0\r\n\r\n", b"?a=%zz&tag_x=", b"{}"]
        async with serving(app, limits=Limits(head_s=0.3, body_s=0.3, idle_s=0.3)) as address:
            async def one(data: bytes) -> None:
                answer = await talk(address, data)
                assert answer == b"" or answer.startswith(b"HTTP/1.1 "), (data, answer[:100])
                assert b" 500 " not in answer[:20], (data, answer)

            for _ in range(15):
                async with trio.open_nursery() as nursery:
                    for _ in range(20):
                        nursery.start_soon(one, b"".join(dice.choice(pieces) for _ in range(dice.randrange(1, 14))))
            assert status_of(await talk(address, HEALTHY)) == 200

    run(main)


def test_requests_are_answered_in_order_on_one_connection_also_pipelined() -> None:
    async def main() -> None:
        app, *_ = app_for(published())
        async with serving(app) as address:
            short = b"GET /primary HTTP/1.1\r\nHost: x\r\n\r\n"
            long = b"GET /history HTTP/1.1\r\nHost: x\r\n\r\n"
            last = b"GET /replica HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
            for parts in ((short + long + short + long + last,), (short, long[:9], long[9:] + short, long + last[:5], last[5:])):
                answer = await talk(address, *parts)
                assert [int(part[:3]) for part in answer.split(b"HTTP/1.1 ")[1:]] == [200, 200, 200, 200, 503]

    run(main)


def test_garbage_after_a_good_request_spoils_only_itself() -> None:
    async def main() -> None:
        app, *_ = app_for(published())
        async with serving(app) as address:
            answer = await talk(address, b"GET /primary HTTP/1.1\r\nHost: x\r\n\r\nGARBAGE GARBAGE\r\n\r\nGET /primary HTTP/1.1\r\nHost: x\r\n\r\n")
            assert [int(part[:3]) for part in answer.split(b"HTTP/1.1 ")[1:]] == [200, 400]

    run(main)


def test_an_http_1_0_client_is_answered_once_and_the_connection_closed() -> None:
    async def main() -> None:
        app, *_ = app_for(published())
        async with serving(app) as address:
            for request in (b"OPTIONS / HTTP/1.0\r\n\r\n", b"GET /cluster HTTP/1.0\r\nConnection: keep-alive\r\n\r\n"):
                assert status_of(await talk(address, request)) == 200
            assert status_of(await talk(address, b"GET /primary HTTP/1.0\n\n")) == 200       # bare line feeds

    run(main)


def test_slow_clients_are_cut_off_at_each_stage_and_hold_nobody_up() -> None:
    async def main() -> None:
        app, *_ = app_for(published())
        async with serving(app, limits=Limits(head_s=0.3, body_s=0.4, idle_s=0.2)) as address:
            async def measure(data: bytes, limit_s: float, status: int | None, *, dribble: bool = False) -> None:
                stream = await trio.open_tcp_stream(*address)
                async with stream, trio.open_nursery() as nursery:
                    began = trio.current_time()
                    await stream.send_all(data)

                    async def drip() -> None:
                        try:
                            while True:
                                await stream.send_all(b"A")
                                await trio.sleep(0.05)      # the slowness is the subject
                        except (trio.BrokenResourceError, trio.ClosedResourceError):
                            pass

                    if dribble:
                        nursery.start_soon(drip)
                    answer = await until_closed(stream)
                    took_s = trio.current_time() - began
                    nursery.cancel_scope.cancel()
                assert took_s < limit_s + 1.5, (data, took_s)
                assert (status_of(answer.split(b"HTTP/1.1 100 Continue\r\n\r\n")[-1]) if answer else None) == status, data

            async with trio.open_nursery() as nursery:
                nursery.start_soon(measure, b"", 0.3, None)
                nursery.start_soon(measure, b"GET /prim", 0.3, 408)
                nursery.start_soon(lambda: measure(b"GET /", 0.3, 408, dribble=True))
                nursery.start_soon(lambda: measure(b"GET / HTTP/1.1\r\nHost: x\r\nA: ", 0.3, 408, dribble=True))
                nursery.start_soon(measure, b"PATCH /config HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n{", 0.4, 408)
                nursery.start_soon(measure, b"PATCH /config HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 10\r\n\r\n", 0.4, 408)
                nursery.start_soon(measure, b"GET /primary HTTP/1.1\r\nHost: x\r\n\r\n", 0.2, 200)       # idle afterwards
                nursery.start_soon(measure, b"GET /history HTTP/1.1\r\nHost: x\r\n\r\n", 0.2, 200)
                for _ in range(20):
                    assert status_of(await talk(address, HEALTHY)) == 200

    run(main)


def test_newcomers_take_the_place_of_the_longest_waiting_and_of_nobody_at_work() -> None:
    async def main() -> None:
        app = Slow()
        async with serving(app, limits=Limits(connections=4)) as address:
            async with trio.open_nursery() as nursery:
                at_work = [await trio.open_tcp_stream(*address) for _ in range(2)]
                for stream in at_work:
                    await stream.send_all(b"GET /wait HTTP/1.0\r\n\r\n")
                while len(app.seen) < 2:
                    await trio.testing.wait_all_tasks_blocked(0.01)
                silent = [await trio.open_tcp_stream(*address) for _ in range(6)]
                for stream in silent:
                    await stream.send_all(b"GE")
                ended: list[int] = []

                async def watch(index: int) -> None:
                    await until_closed(silent[index])
                    ended.append(index)

                for index in range(6):
                    nursery.start_soon(watch, index)
                while len(ended) < 4:
                    await trio.testing.wait_all_tasks_blocked(0.01)
                assert sorted(ended) == [0, 1, 2, 3]
                assert status_of(await talk(address, b"GET /quick HTTP/1.0\r\n\r\n")) == 200
                app.release.set()
                for stream in at_work:
                    assert body_of(await until_closed(stream)) == b"ok"
                nursery.cancel_scope.cancel()
            for stream in (*silent, *at_work):
                await stream.aclose()
            # every place is free again
            await trio.testing.wait_all_tasks_blocked(0.01)
            for _ in range(10):
                assert status_of(await talk(address, b"GET /x HTTP/1.0\r\n\r\n")) == 200

    run(main)


def test_when_everybody_is_at_work_a_newcomer_is_refused_but_health_checks_still_answered() -> None:
    async def main() -> None:
        app = Slow()
        async with serving(app, limits=Limits(connections=2)) as address:
            at_work = [await trio.open_tcp_stream(*address) for _ in range(2)]
            for stream in at_work:
                await stream.send_all(b"GET /wait HTTP/1.0\r\n\r\n")
            while len(app.seen) < 2:
                await trio.testing.wait_all_tasks_blocked(0.01)
            for _ in range(3):
                assert status_of(await talk(address)) == 503
            stream = await trio.open_tcp_stream(*address)
            # with its bytes there before the server looks, a health check needs no place at all
            await stream.send_all(b"GET /quick HTTP/1.0\r\n\r\n")
            assert status_of(await until_closed(stream)) == 200
            await stream.aclose()
            app.release.set()
            for stream in at_work:
                assert status_of(await until_closed(stream)) == 200
                await stream.aclose()

    run(main)


def test_a_defect_in_an_answer_is_a_500_and_no_more(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        app = Slow()
        async with serving(app) as address:
            assert await ask(address, "GET", "/defect") == (500, b"internal error, see the agent's log")
            assert await ask(address, "GET", "/fine") == (200, b"ok")
            app.seen.clear()

    run(main)
    assert "a REST request could not be answered" in caplog.text


def test_an_answer_that_takes_too_long_ends_with_504() -> None:
    async def main() -> None:
        app = Slow()
        async with serving(app, limits=Limits(handler_s=0.2)) as address:
            assert (await ask(address, "GET", "/wait"))[0] == 504

    run(main)


def test_bodies_arrive_whole_in_every_form() -> None:
    async def main() -> None:
        app = Slow()
        async with serving(app) as address:
            body = bytes(range(256)) * 4096                       # exactly the limit
            assert await ask(address, "POST", "/echo", body) == (200, body)
            chunked = b"POST /echo HTTP/1.1\r\nHost: x\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n6;x=y\r\n world\r\n0\r\n\r\n"
            assert body_of(await talk(address, chunked)) == b"hello world"
            parts = [b"POST /echo HTTP/1.1\r\nHost: x\r\nConnection: close\r\nExpect: 100-continue\r\nContent-Length: 2\r\n\r\n", b"{", b"}"]
            answer = await talk(address, *parts)
            assert answer.endswith(b"{}")

    run(main)


def test_an_answer_larger_than_the_socket_s_buffer_arrives_whole() -> None:
    class Large(Slow):
        answer = b"HTTP/1.1 200 OK\r\nContent-Length: 20000000\r\n\r\n" + b"x" * 20_000_000

        def quick(self, key: bytes, *, keep_alive: bool) -> bytes | None:
            return self.answer

    async def main() -> None:
        async with serving(Large()) as address:
            assert await talk(address, HEALTHY) == Large.answer

    run(main)


def test_a_client_that_resets_or_leaves_early_ends_only_its_connection() -> None:
    async def main() -> None:
        app = Slow()
        app.release.set()
        async with serving(app) as address:
            for data in (b"", b"GET /wait HT", b"GET /wait HTTP/1.0\r\n\r\n", b"POST /x HTTP/1.0\r\nContent-Length: 9\r\n\r\nab", b"GET /quick HTTP/1.0\r\n\r\n"):
                for reset in (True, False):
                    stream = await trio.open_tcp_stream(*address)
                    if reset:
                        stream.setsockopt(trio.socket.SOL_SOCKET, trio.socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")
                    await stream.send_all(data)
                    await stream.aclose()
            assert status_of(await talk(address, b"GET /quick HTTP/1.0\r\n\r\n")) == 200

    run(main)


def test_an_address_that_cannot_be_had_is_named() -> None:
    async def main() -> None:
        sockets = await open_sockets(Listen(addresses=[("127.0.0.1", 0)]))
        port = sockets[0].getsockname()[1]
        try:
            with pytest.raises(ConfigError, match=rf"restapi\.listen: cannot listen on 127\.0\.0\.1:{port}: Address already in use"):
                await open_sockets(Listen(addresses=[("127.0.0.1", 0), ("127.0.0.1", port)]))
        finally:
            for sock in sockets:
                sock.close()

    run(main)


def test_all_addresses_means_both_families() -> None:
    async def main() -> None:
        sockets = await open_sockets(Listen(addresses=[("*", 0)]))
        try:
            assert {sock.family.name for sock in sockets} <= {"AF_INET", "AF_INET6"}
            assert len(sockets) >= 1
        finally:
            for sock in sockets:
                sock.close()

    run(main)


def test_the_server_header_follows_server_tokens() -> None:
    assert [server_headers(t, version="0.1.0", compatible="4.1.4")["Server"] for t in ("original", "Minimal", "productonly")] == [
        "pgha/0.1.0", "Patroni/4.1.4", "Patroni"]


# --- TLS -----------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CA, a server certificate for 127.0.0.1 and a client certificate."""
    path = tmp_path_factory.mktemp("certificates")

    def openssl(*args: str) -> None:
        subprocess.run(["openssl", *args], cwd=path, check=True, capture_output=True, timeout=30)

    openssl("req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", "ca.key", "-out", "ca.crt", "-days", "2", "-subj", "/CN=test-ca")
    for name, extra in (("server", "subjectAltName=IP:127.0.0.1"), ("client", "extendedKeyUsage=clientAuth")):
        (path / f"{name}.ext").write_text(extra + "\n")
        openssl("req", "-newkey", "rsa:2048", "-nodes", "-keyout", f"{name}.key", "-out", f"{name}.csr", "-subj", f"/CN={name}")
        openssl("x509", "-req", "-in", f"{name}.csr", "-CA", "ca.crt", "-CAkey", "ca.key", "-CAcreateserial", "-days", "2", "-extfile", f"{name}.ext",
                "-out", f"{name}.crt")
    return path


async def talk_tls(address: tuple[str, int], certificates: Path, data: bytes, *, with_certificate: bool = False) -> bytes:
    context = ssl.create_default_context(cafile=str(certificates / "ca.crt"))
    if with_certificate:
        context.load_cert_chain(certificates / "client.crt", certificates / "client.key")
    with trio.fail_after(10):
        stream = await trio.open_ssl_over_tcp_stream(*address, ssl_context=context, https_compatible=True)
        async with stream:
            await stream.send_all(data)
            return await until_closed(stream)


def test_tls_with_optional_client_certificates(certificates: Path) -> None:
    from pgha.rest.access import Access

    async def main() -> None:
        app, _, inbox, _ = app_for(published(), access=Access(require_cert=True))
        inbox.answers["reload"] = Answer(status=202, text="reload scheduled")
        context = make_context(certfile=str(certificates / "server.crt"), keyfile=str(certificates / "server.key"), cafile=str(certificates / "ca.crt"),
                               verify_client="optional")
        change = b"POST /reload HTTP/1.0\r\n\r\n"
        async with serving(app, ssl_context=context, limits=Limits(handshake_s=0.5)) as address:
            assert status_of(await talk_tls(address, certificates, HEALTHY)) == 200
            assert status_of(await talk_tls(address, certificates, change)) == 403
            assert status_of(await talk_tls(address, certificates, change, with_certificate=True)) == 202
            pipelined = b"GET /primary HTTP/1.1\r\nHost: x\r\n\r\nGET /replica HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
            answer = await talk_tls(address, certificates, pipelined)
            assert [int(part[:3]) for part in answer.split(b"HTTP/1.1 ")[1:]] == [200, 503]
            assert not (await talk(address, HEALTHY)).startswith(b"HTTP")       # plain HTTP towards TLS: cut off
            began = trio.current_time()
            await talk(address, b"")                                                               # a handshake that never comes
            assert trio.current_time() - began < 2
            assert status_of(await talk_tls(address, certificates, HEALTHY)) == 200

    run(main)


def test_a_connection_from_before_a_reload_ends_after_its_next_request(certificates: Path) -> None:
    """Its client certificate was looked at by the authorities of then."""
    def context(verify_client: str) -> ssl.SSLContext:
        return make_context(certfile=str(certificates / "server.crt"), keyfile=str(certificates / "server.key"), cafile=str(certificates / "ca.crt"),
                            verify_client=verify_client)

    async def main() -> None:
        app, *_ = app_for(published())
        tls = Tls(context("none"))
        request = b"GET /primary HTTP/1.1\r\nHost: x\r\n\r\n"
        async with trio.open_nursery() as nursery:
            (address,) = await nursery.start(serve, Listen(addresses=[("127.0.0.1", 0)], tls=tls), app)
            stream = await trio.open_ssl_over_tcp_stream(*address, ssl_context=ssl.create_default_context(cafile=str(certificates / "ca.crt")), https_compatible=True)
            with trio.fail_after(10):
                for _ in range(2):
                    await stream.send_all(request)
                    assert status_of(bytes(await stream.receive_some())) == 200
                await trio.testing.wait_all_tasks_blocked(0.05)     # it waits for the next one
                tls.context = context("optional")
                await stream.send_all(request)
                assert [int(part[:3]) for part in (await until_closed(stream)).split(b"HTTP/1.1 ")[1:]] == [200]
            await trio.aclose_forcefully(stream)
            nursery.cancel_scope.cancel()

    run(main)


def test_tls_with_required_client_certificates(certificates: Path) -> None:
    async def main() -> None:
        app, *_ = app_for(published())
        context = make_context(certfile=str(certificates / "server.crt"), keyfile=str(certificates / "server.key"), cafile=str(certificates / "ca.crt"),
                               verify_client="required")
        async with serving(app, ssl_context=context) as address:
            assert status_of(await talk_tls(address, certificates, HEALTHY, with_certificate=True)) == 200
            assert await talk_tls(address, certificates, HEALTHY) == b""

    run(main)


@pytest.mark.parametrize(("options", "problem"), [
    ({"certfile": "/nonexistent.crt"}, "restapi.certfile: cannot use /nonexistent.crt"),
    ({"cafile": "/nonexistent.ca"}, "restapi.cafile: cannot use /nonexistent.ca"),
    ({"ciphers": "NONSENSE"}, "restapi.ciphers: OpenSSL knows none of 'NONSENSE'"),
    ({"verify_client": "optional"}, "restapi.verify_client: 'optional' needs restapi.cafile"),
    ({"verify_client": "perhaps", "cafile": "ca.crt"}, "restapi.verify_client: 'perhaps' is none of none, optional, required"),
])
def test_tls_mistakes_are_named(certificates: Path, options: dict[str, str], problem: str) -> None:
    given = {"certfile": str(certificates / "server.crt"), "keyfile": str(certificates / "server.key"), **options}
    if given.get("cafile") == "ca.crt":
        given["cafile"] = str(certificates / "ca.crt")
    with pytest.raises(ConfigError, match=problem.replace(".", r"\.")):
        make_context(**given)


_FEW_FILES = """
import resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
sys.path[:0] = sys.argv[1:3]
import trio
from rest_world import app_for, published
from pgha.rest.server import Listen, serve
async def main():
    app, *_ = app_for(published())
    async with trio.open_nursery() as nursery:
        bound = await nursery.start(serve, Listen(addresses=[("127.0.0.1", 0)]), app)
        kept = [open("/dev/null") for _ in range(int(sys.argv[3]))]
        print(bound[0][1], flush=True)
        await trio.to_thread.run_sync(sys.stdin.read, abandon_on_cancel=True)
        nursery.cancel_scope.cancel()
trio.run(main)
"""


@pytest.mark.parametrize("kept", [0, 40])
def test_many_silent_clients_use_up_neither_places_nor_files(kept: int) -> None:
    """With 64 files at most 32 clients have a place; with 40 of them used otherwise, accepting fails and recovers."""
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", _FEW_FILES, str(root), str(root / "tests/rest"), str(kept)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        address = ("127.0.0.1", int(server.stdout.readline()))

        async def main() -> None:
            clients = []
            for _ in range(150):
                stream = await trio.open_tcp_stream(*address)
                await stream.send_all(b"GET /primary HT")
                clients.append(stream)
            began = trio.current_time()
            assert status_of(await talk(address, HEALTHY)) == 200
            assert trio.current_time() - began < 4.0
            assert status_of(await talk(address, b"GET /cluster HTTP/1.0\r\n\r\n")) == 200
            for stream in clients:
                await stream.aclose()

        try:
            run(main)
            assert server.poll() is None
        finally:
            server.communicate("")
    assert server.returncode == 0
