"""A server on a real socket that says what it likes, when it likes: the other side of every HTTP client in here."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from random import Random

import trio
from hostile import BITS, broken

Behaviour = Callable[[trio.SocketStream], Awaitable[None]]


@asynccontextmanager
async def serving(answer: Callable[[bytes, bytes, trio.SocketStream], Awaitable[None]]) -> AsyncIterator[int]:
    """`answer(path, body, stream)` for each request; returning closes the connection unless it was cancelled. The port."""
    async def connection(stream: trio.SocketStream) -> None:
        async with stream:
            try:
                data = b""
                while b"\r\n\r\n" not in data:
                    more = await stream.receive_some(65536)
                    if not more:
                        return
                    data += more
                head, _, body = data.partition(b"\r\n\r\n")
                length = next((int(line.split(b":")[1]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:")), 0)
                while len(body) < length:
                    more = await stream.receive_some(65536)
                    if not more:
                        return
                    body += more
                await answer(head.split(b" ")[1], body, stream)
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                pass

    async with trio.open_nursery() as nursery:
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        nursery.start_soon(trio.serve_listeners, connection, listeners)
        yield listeners[0].socket.getsockname()[1]
        nursery.cancel_scope.cancel()


def http(body: bytes, *, status: bytes = b"200 OK", headers: bytes = b"Content-Type: application/json\r\n", length: bytes | None = None) -> bytes:
    return b"HTTP/1.1 " + status + b"\r\n" + headers + b"Content-Length: " + (length if length is not None else b"%d" % len(body)) + b"\r\n\r\n" + body


def says(data: bytes) -> Behaviour:
    async def behave(stream: trio.SocketStream) -> None:
        await stream.send_all(data)
    return behave


def says_and_stays(data: bytes) -> Behaviour:
    async def behave(stream: trio.SocketStream) -> None:
        await stream.send_all(data)
        await trio.sleep_forever()
    return behave


def without_end(head: bytes, piece: bytes) -> Behaviour:
    async def behave(stream: trio.SocketStream) -> None:
        await stream.send_all(head)
        while True:
            await stream.send_all(piece)
    return behave


def dripping(data: bytes, every_s: float = 0.02) -> Behaviour:
    async def behave(stream: trio.SocketStream) -> None:
        while True:
            for n in range(len(data)):
                await stream.send_all(data[n:n + 1])
                await trio.sleep(every_s)       # the slowness is the subject
    return behave


CHUNKED = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


def behaviours(good: bytes) -> dict[str, Behaviour]:
    """`good`: a body that would be right."""
    half = good[:len(good) // 2]
    return {
        "hangs up at once": says(b""),
        "stays silent": says_and_stays(b""),
        "no HTTP": says(b"hello, this is not HTTP\r\n\r\n"),
        "half a status line": says_and_stays(b"HTTP/1.1 2"),
        "a status that is none": says(http(good, status=b"9999 ?")),
        "status 42": says(http(good, status=b"042 ?")),
        "status 101": says(http(good, status=b"101 Switching Protocols", headers=b"Upgrade: x\r\nConnection: Upgrade\r\n")),
        "100 without end": without_end(b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 100),
        "204": says(http(b"", status=b"204 No Content")),
        "a redirect to itself": says(http(b"", status=b"307 Temporary Redirect", headers=b"Location: /v3/kv/range\r\n")),
        "a redirect to elsewhere": says(http(good, status=b"302 Found", headers=b"Location: http://169.254.1.1/\r\n")),
        "500 without a body": says(http(b"", status=b"500 Internal Server Error")),
        "502 with a page": says(http(b"<html>Bad Gateway</html>", status=b"502 Bad Gateway", headers=b"Content-Type: text/html\r\n")),
        "404 with a page": says(http(b"<html>not here</html>", status=b"404 Not Found", headers=b"Content-Type: text/html\r\n")),
        "401": says(http(b"", status=b"401 Unauthorized", headers=b"WWW-Authenticate: Basic\r\n")),
        "a page with status 200": says(http(b"<html>Welcome to the hotel's network</html>", headers=b"Content-Type: text/html\r\n")),
        "an empty body": says(http(b"")),
        "half an answer, then the end": says(http(half, length=b"%d" % len(good))),
        "half an answer, then silence": says_and_stays(http(half, length=b"%d" % len(good))),
        "less than was announced": says(http(good, length=b"5")),
        "a length that is none": says(http(good, length=b"ten")),
        "a negative length": says(http(good, length=b"-1")),
        "a length of 5000 digits": says(http(good, length=b"9" * 5000)),
        "two lengths": says(http(good, headers=b"Content-Length: 3\r\n")),
        "both a length and chunks": says(http(chunk(good) + b"0\r\n\r\n", headers=b"Transfer-Encoding: chunked\r\n")),
        "garbage in place of chunks": says(CHUNKED + b"zzzz\r\n" + good),
        "a chunk longer than announced": says(CHUNKED + b"3\r\n" + good + b"\r\n0\r\n\r\n"),
        "a chunk of 2^64 bytes": says_and_stays(CHUNKED + b"ffffffffffffffff\r\n" + good),
        "chunks of one byte, without end": without_end(CHUNKED, chunk(b" ") * 500),
        "empty lines without end": without_end(CHUNKED, chunk(b"\n") * 500),
        "a chunk's extension without end": without_end(CHUNKED + b"5;", b"x" * 10_000),
        "trailers without end": without_end(CHUNKED + chunk(good) + b"0\r\n", b"X: y\r\n" * 1000),
        "a header without end": without_end(b"HTTP/1.1 200 OK\r\nX: ", b"y" * 10_000),
        "headers without end": without_end(b"HTTP/1.1 200 OK\r\n", b"X: y\r\n" * 1000),
        "a body without end": without_end(b"HTTP/1.1 200 OK\r\n\r\n", b"x" * 65536),
        "a body of a terabyte": without_end(http(b"", length=b"%d" % (1 << 40)), b"[" * 65536),
        "chunks without end": without_end(CHUNKED, chunk(b"[" * 65536)),
        "a gzip bomb": without_end(b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\n\r\n", b"\x1f\x8b\x08" + b"\0" * 65536),
        "gzip that is none": says(http(good, headers=b"Content-Encoding: gzip\r\n")),
        "a head byte by byte": dripping(b"HTTP/1.1 200 OK\r\nX: " + b"y" * 10_000),
        "a body byte by byte": dripping(http(b"", length=b"100000") + b" " * 1000),
        "control characters in headers": says(http(good, headers=b"X: a\x00b\x1b[31m\r\n")),
        "headers without names": says(http(good, headers=b": x\r\n   folded\r\n")),
        "a header twice, of two minds": says(http(good, headers=b"Content-Type: application/json\r\nContent-Type: text/html\r\n")),
        "brackets without end": says(http(b"[" * 200_000)),
        "objects without end": says(http(b'{"x":' * 200_000)),
        "an unknown field with brackets without end": says(http(b'{"x":' + b"[" * 200_000)),
        "text that is no text": says(http(b'{"header":{"cluster_id":"\xff\xfe"}}')),
        "half a character": says(http(b'{"header":{"cluster_id":"\\ud800"}}')),
        "a byte order mark": says(http(b"\xef\xbb\xbf" + good)),
        "utf-16": says(http(good.decode().encode("utf-16"))),
        "null": says(http(b"null")),
        "a list": says(http(b"[1,2]")),
        "text": says(http(b'"x"')),
        "an object of nothing": says(http(b"{}")),
        "wrong types": says(http(b'{"header":[],"kvs":{},"succeeded":"yes","responses":5}')),
        "fields that are null": says(http(b'{"header":null,"kvs":null,"responses":null,"result":null}')),
        "numbers without end": says(http(b'{"header":{"cluster_id":"1","revision":"' + b"9" * 5000 + b'"}}')),
        "a number of 30 digits": says(http(b'{"header":{"cluster_id":"1","revision":"' + b"9" * 30 + b'","raft_term":' + b"9" * 30 + b"}}")),
        "a revision below zero": says(http(b'{"header":{"cluster_id":"1","revision":"-5"}}')),
        "base64 that is none": says(http(b'{"header":{"cluster_id":"1"},"kvs":[{"key":"!!!","value":"*"}]}')),
        "an error of a megabyte": says(http(b'{"error":"' + b"x" * 1_000_000 + b'","code":2}', status=b"500 x")),
        "an error that is a list": says(http(b'{"error":[1]}', status=b"500 x")),
        "compacted, whatever is asked": says(http(b'{"error":"etcdserver: mvcc: required revision has been compacted","code":11}', status=b"400 x")),
        "lease not found, whatever is asked": says(http(b'{"error":"etcdserver: requested lease not found","code":5}', status=b"404 x")),
        "invalid auth token, whatever is asked": says(http(b'{"error":"etcdserver: invalid auth token","code":16}', status=b"401 x")),
        "no space": says(http(b'{"error":"etcdserver: mvcc: database space exceeded","code":8}', status=b"500 x")),
        "a token that is no header": says(http(b'{"header":{"cluster_id":"1"},"token":"a\\r\\nX: y"}')),
    }


def by_chance(seed: object, good: bytes, value: object, count: int) -> dict[str, Behaviour]:
    """Broken bodies in whole answers, and broken answers."""
    chance = Random(f"server {seed}")
    made: dict[str, Behaviour] = {}
    for n in range(count):
        data = http(broken(chance, good, value)) if n % 2 else broken(chance, http(good))
        made[f"by chance {seed}/{n}"] = says(data) if n % 3 else says_and_stays(data)
    assert BITS
    return made
