"""How does one ask an HTTP server so that a slow or dead one costs only the time it was given?

An `Endpoint` is one configured URL. A request to it either gives an `Answer` (whatever its status), or raises
`NoAnswer` with the reason for people. Nothing here has a timeout of its own: whoever asks bounds it with a cancel
scope, and being cancelled closes that connection and nothing else (100 cancelled requests at a stopped server leave
no descriptor behind, tests/dcs/test_etcd3.py).

Names are looked up in a thread, at most one at a time for each host, and the result is kept: a name server that does
not answer costs its own endpoint its attempt, never the others (trio's own look-ups share 40 threads, and abandoned
ones would use them up), and addresses once known go on being used. IP literals never get there.

The httpx transport is used without a client around it: no redirects, cookies, proxies from the environment or
auth; that halves the CPU time of a request.
"""

from __future__ import annotations

import ipaddress
import math
import socket
import ssl
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import httpx
import trio

from pgha.errors import ConfigError

#: idle connections are kept for longer than the longest usual loop_wait
KEEPALIVE_EXPIRY_S = 90.0
#: No answer is longer, nor a line of a stream: a cluster's keys are a few kB, and etcd itself takes values up to 1.5 MB.
#: What is longer is not read to its end, since decoding it would hold up the renewer beside which it is decoded.
MAX_ANSWER_BYTES = 8 << 20

#: how long a request waits for a new look-up of a host whose former addresses are known
REFRESH_S = 0.1

LookUp = Callable[[str, int], Sequence[str]]


class NoAnswer(Exception):
    """This endpoint gave no usable answer. Whether it did what was asked is unknown."""


class Answer(NamedTuple):
    status: int
    body: bytes


def look_up_addresses(host: str, port: int) -> Sequence[str]:
    """The addresses of a host, as the system's resolver orders them. Blocks; raises OSError (socket.gaierror)."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(address[0]) for *_, address in found))


class HostAddresses:
    """The addresses of one host, looked up when they are first needed and again after `forget`."""

    def __init__(self, host: str, port: int, look_up: LookUp = look_up_addresses) -> None:
        self._host = host
        self._port = port
        self._look_up = look_up
        self._known: tuple[str, ...] = ()
        self._fresh = False
        self._one = trio.CapacityLimiter(1)
        try:
            self._known = (str(ipaddress.ip_address(host)),)
            self._literal = True
        except ValueError:
            self._literal = False

    async def get(self) -> tuple[str, ...]:
        """All addresses; raises NoAnswer. Cancelled, it leaves at most one thread behind, which still fills in."""
        if not (self._literal or self._fresh):
            with trio.move_on_after(REFRESH_S if self._known else math.inf):
                try:
                    await trio.to_thread.run_sync(self._refresh, abandon_on_cancel=True, limiter=self._one)
                except (OSError, UnicodeError) as error:
                    if not self._known:
                        why = error.strerror if isinstance(error, OSError) and error.strerror else error
                        raise NoAnswer(f"cannot resolve {self._host}: {why}") from error
        return self._known

    def doubt(self) -> None:
        """Nobody answers there: look it up anew at the next occasion, and use what is known if that takes long."""
        self._fresh = False

    def _refresh(self) -> None:  # in a thread
        if not self._fresh:  # the thread before this one may have brought it meanwhile
            self._known = tuple(self._look_up(self._host, self._port)) or self._known
            self._fresh = True


class Lines:
    """The body of an answer, whole or line by line as it comes. One task at a time."""

    def __init__(self, response: httpx.Response, connections: Connections) -> None:
        self.status = response.status_code
        self._response = response
        self._connections = connections
        self._is_over = False
        assert isinstance(response.stream, httpx.AsyncByteStream)
        self._chunks = response.stream.__aiter__()
        self._rest = bytearray()
        self._searched = 0

    async def next(self) -> bytes:
        """The next line without its end; raises NoAnswer when the stream is over."""
        while (end := self._rest.find(b"\n", self._searched)) < 0:
            self._searched = len(self._rest)
            if self._searched > MAX_ANSWER_BYTES:
                raise NoAnswer(f"a line of more than {MAX_ANSWER_BYTES} bytes")
            try:
                self._rest += await self._next_chunk()
            except NoAnswer:
                if not self._rest:
                    raise
                self._rest += b"\n"  # etcd's last words (an error) come without a line end
        line = bytes(self._rest[:end])
        del self._rest[: end + 1]
        self._searched = 0
        return line

    async def all(self) -> bytes:
        """The whole of an answer that does end; raises NoAnswer if it breaks, or does not end."""
        chunks: list[bytes] = []
        left = MAX_ANSWER_BYTES
        try:
            async for chunk in self._chunks:
                chunks.append(chunk)
                left -= len(chunk)
                if left < 0:
                    raise NoAnswer(f"an answer of more than {MAX_ANSWER_BYTES} bytes")
        except httpx.HTTPError as error:
            raise NoAnswer(reason(error)) from error
        return b"".join(chunks)

    async def rest(self) -> bytes:
        """All that is left, of an answer that ought to end."""
        try:
            while len(self._rest) <= MAX_ANSWER_BYTES:
                self._rest += await self._next_chunk()
        except NoAnswer:
            pass  # the end, or a broken end: what came is what there is
        return bytes(self._rest)

    async def _next_chunk(self) -> bytes:
        try:
            return await anext(self._chunks)
        except StopAsyncIteration:
            raise NoAnswer("the stream ended") from None
        except httpx.HTTPError as error:
            raise NoAnswer(f"the stream broke: {reason(error)}") from error

    async def aclose(self) -> None:
        """Close the connection. httpx reads through generators within generators, which only an exception at the
        innermost one winds up in order: so let one wait be cancelled."""
        with trio.CancelScope(shield=True) as scope:  # so that a cancel from outside ends here, too
            scope.cancel()
            try:
                while True:
                    await anext(self._chunks)
            except (StopAsyncIteration, httpx.HTTPError):
                pass  # it had ended before
        with trio.CancelScope(shield=True):  # closing a socket does not wait
            await self._response.aclose()
        if not self._is_over:
            self._is_over = True
            await self._connections.is_over()


class _Body(httpx.AsyncByteStream):
    """A request's body in one piece. httpx's own is an async generator, which a cancelled send would leave suspended,
    for trio to complain about when it is collected."""

    def __init__(self, content: bytes) -> None:
        self._left = [content]

    def __aiter__(self) -> _Body:
        return self

    async def __anext__(self) -> bytes:
        if not self._left:
            raise StopAsyncIteration
        return self._left.pop()


class _HandshakeCloser:
    """Follows one request (httpx's extension `trace`) and closes its socket if the TLS handshake does not succeed:
    when that is cancelled, httpcore leaves it open for the garbage collector (1.0.9)."""

    def __init__(self) -> None:
        self._stream: Any = None

    async def __call__(self, event: str, facts: dict[str, Any]) -> None:
        if event == "connection.connect_tcp.complete":
            self._stream = facts["return_value"]
        elif event == "connection.start_tls.failed" and self._stream is not None:
            with trio.CancelScope(shield=True):  # closing a socket does not wait
                await self._stream.aclose()


class Connections:
    """Those that are made with one TLS context. None: plain only (making the default context takes 20 ms).

    A reload brings another context, and no reason to interrupt anything: from then on these are closed with the last of
    the answers that are still open, such as a watch."""

    def __init__(self, ssl_context: ssl.SSLContext | None) -> None:
        self._transport = httpx.AsyncHTTPTransport(
            verify=ssl_context or ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), trust_env=False,
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=16, keepalive_expiry=KEEPALIVE_EXPIRY_S))
        self._open = 0
        self._retired = False
        self.closed = False

    async def send(self, request: httpx.Request) -> httpx.Response:
        """Whoever gets a response says `is_over` when it is closed."""
        self._open += 1
        response: httpx.Response | None = None
        try:
            response = await self._transport.handle_async_request(request)
        finally:
            if response is None:
                await self.is_over()
        return response

    async def is_over(self) -> None:
        """One answer less is open."""
        self._open -= 1
        await self._close_if_unused()

    async def retire(self) -> None:
        """No new request comes any more (but those that are just about to be sent)."""
        self._retired = True
        await self._close_if_unused()

    async def _close_if_unused(self) -> None:
        if self._retired and self._open == 0:
            await self.aclose()

    async def aclose(self) -> None:
        self.closed = True
        with trio.CancelScope(shield=True):  # closing sockets does not wait
            await self._transport.aclose()


class Endpoint:
    """One server of the store, by its configured URL. `name` is that URL without credentials or path."""

    def __init__(self, url: str, connections: Connections, *, look_up: LookUp = look_up_addresses) -> None:
        parts = urlsplit(url)
        if parts.username is not None or parts.password is not None:
            raise ConfigError("an endpoint's URL must not contain credentials: say username and password instead")
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.path.strip("/"):
            raise ConfigError(f"{url!r} is not an endpoint's URL: http://HOST:PORT or https://HOST:PORT is expected")
        self._scheme = parts.scheme
        self._host = parts.hostname
        self._port = parts.port or (443 if parts.scheme == "https" else 80)
        self.name = f"{self._scheme}://{parts.netloc}"
        self.failing: str = ""  # why, while it does
        self.told = False       # in the log
        self._addresses = HostAddresses(self._host, self._port, look_up)
        self._first = 0  # which of the addresses answered last
        self._host_header = (b"Host", parts.netloc.encode())
        self._connections = connections
        self._urls: dict[tuple[str, str], httpx.URL] = {}

    def connect_by(self, connections: Connections) -> None:
        """From the next request on. What comes over the former is theirs."""
        self._connections = connections

    async def post(self, path: str, body: bytes, headers: Sequence[tuple[bytes, bytes]] = ()) -> Answer:
        """POST and read the whole answer. Raises NoAnswer."""
        lines = await self._send(path, body, headers)
        try:
            return Answer(lines.status, await lines.all())
        finally:
            await lines.aclose()

    async def stream(self, path: str, body: bytes, headers: Sequence[tuple[bytes, bytes]] = ()) -> Lines:
        """POST and leave the answer open. Raises NoAnswer. The caller closes it."""
        return await self._send(path, body, headers)

    async def _send(self, path: str, body: bytes, headers: Sequence[tuple[bytes, bytes]]) -> Lines:
        try:
            addresses = await self._addresses.get()
            for n in range(len(addresses)):
                turn = (self._first + n) % len(addresses)
                request = httpx.Request(
                    "POST", self._url(addresses[turn], path), stream=_Body(body), extensions=self._extensions(),
                    headers=[self._host_header, (b"Content-Length", b"%d" % len(body)), *headers])
                connections = self._connections
                try:
                    response = await connections.send(request)
                except httpx.ConnectError:
                    if n + 1 == len(addresses):
                        raise
                else:
                    self._first = turn
                    return Lines(response, connections)
        except httpx.HTTPError as error:
            self._addresses.doubt()
            raise NoAnswer(reason(error)) from error
        raise NoAnswer(f"{self._host} has no address")

    def went_silent(self) -> None:
        """An attempt here was given up: perhaps the name means another machine by now, or another address answers."""
        self._addresses.doubt()
        self._first += 1

    def _extensions(self) -> dict[str, object]:
        return {"sni_hostname": self._host, "trace": _HandshakeCloser()} if self._scheme == "https" else {}

    def _url(self, address: str, path: str) -> httpx.URL:
        url = self._urls.get((address, path))
        if url is None:
            host = f"[{address}]" if ":" in address else address
            if len(self._urls) > 100:  # addresses that come and go
                self._urls.clear()
            url = self._urls[address, path] = httpx.URL(f"{self._scheme}://{host}:{self._port}{path}")
        return url


def reason(error: BaseException) -> str:
    """What went wrong, for people: the innermost error with a text (httpx often has none of its own)."""
    text = ""
    at: BaseException | None = error
    while at is not None:
        text = str(at) or text
        at = at.__cause__ or at.__context__
    return text[:300] or type(error).__name__      # a server's own words may be among it
