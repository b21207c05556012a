"""The listener: many short health checks, cheaply, and nobody may disturb them.

A health check that is exactly one bodiless GET, HEAD or OPTIONS is answered from prebuilt bytes, in the accept loop if
its bytes are already there: no task, no parser, one send. Everything else gets a task, a real parser (h11) and limits.

Rules of this file:
* Nothing a client does ends anything but its own connection.
* Every wait for a client has a deadline, and who is waited for can be evicted for a newcomer.
* Who is at work cannot; so an application that lets questions wait bounds how many (`has_places`; parked.py).
* Whatever blocks is not in the accept loop; whatever takes long lets others run in between: the renewer is one of them.
* What clients may make us keep is bounded for all of them together.
"""

from __future__ import annotations

import errno
import resource
import socket
import ssl
from typing import Protocol

import h11
import msgspec
import trio

from pgha.log import Log
from pgha.rest.listen import Limits, Listen, open_sockets
from pgha.rest.refusals import Refusals
from pgha.rest.stream import Upgraded
from pgha.rest.wire import Request, Response, exact_request, head_bytes, quoting_response, split_target, text_response

log = Log(__name__)

__all__ = ["Application", "Limits", "Listen", "open_sockets", "serve"]

#: accepted in one go before other tasks get their turn
_BATCH = 32
_RETRY_ACCEPT = {errno.ECONNABORTED, errno.EINTR, errno.EPROTO, errno.ENETDOWN, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EPERM}
_OUT_OF_RESOURCES = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}
#: of a body, in one go; and so many chunks of it before others get their turn
_PART_BYTES = 16 << 10
_CHUNKS = 32
_SAFE = frozenset({b"GET", b"HEAD", b"OPTIONS"})
#: a longer answer goes out beside its head, not copied behind it: many may be given the same one
SEPARATELY_BYTES = 16 << 10
#: … and a client is given so much of it at a time: the others get their turn, and TLS keeps no whole copy for each
_GIVEN_BYTES = 64 << 10
#: the same defect, with its traceback, is logged again after this time
_DEFECT_AGAIN_S = 60.0


class Application(Protocol):
    """What the server serves."""

    def has_places(self, number: int) -> None:
        """So many requests may be at work at once, those that wait in `handle` among them: told before the first."""
        ...

    def quick(self, key: bytes, *, keep_alive: bool) -> bytes | None:
        """The whole answer to an exact request (b"GET /primary"), or None if it must be handled. Never blocks."""
        ...

    def refuses(self, request: Request) -> Response | None:
        """The refusal that needs no body to be read (`request` has none yet), or None."""
        ...

    async def handle(self, request: Request) -> Response:
        """Answer any request, within bounds of its own."""
        ...

    def upgrade(self, request: Request) -> Response | Upgraded | None:
        """For a GET that asks for a WebSocket: what the connection goes on as (at once), the refusal, or None: an answer as always."""
        ...


class _Refused(Exception):
    """This request gets `status` and the connection ends."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status
        self.text = text


async def serve(
    listen: Listen, app: Application, *, task_status: trio.TaskStatus[list[tuple[str, int]]] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Listen and serve until cancelled. `task_status` gets the (host, port) that were bound. ConfigError if none can."""
    sockets = await open_sockets(listen)
    try:
        async with trio.open_nursery() as nursery:
            server = _Server(listen, app, nursery)
            for sock in sockets:
                nursery.start_soon(server.accept, sock)
            task_status.started([sock.getsockname()[:2] for sock in sockets])
    finally:
        for sock in sockets:
            sock.close()


class _Connection:
    """One client. In `_Server.waiting` while we wait for it (for a head, a body, or that it reads): then a newcomer may take
    its place."""

    def __init__(self, stream: trio.SocketStream, peer: str, sock: socket.socket) -> None:
        self.stream: trio.SocketStream | trio.SSLStream[trio.SocketStream] = stream
        self.sock = sock       # the same, for who may not wait
        self.peer = peer
        self.counted = True    # among those that share the places for requests
        self.scope = trio.CancelScope()
        self.buffer = b""
        self.unsent = b""      # of an answer that the accept loop began: all that is left to do
        self.client_cert = False


class _Server:
    def __init__(self, listen: Listen, app: Application, nursery: trio.Nursery) -> None:
        self.listen = listen
        self.limits = listen.limits
        # The renewer's connections and PostgreSQL's files come from the same allowance: clients must not use it up.
        files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        self.at_most = min(listen.limits.connections, max(8, files // 2)) if files != resource.RLIM_INFINITY else listen.limits.connections
        self.app = app
        app.has_places(self.at_most)
        self.nursery = nursery
        self.count = 0
        #: a dict keeps its order: the first has waited longest
        self.waiting: dict[_Connection, None] = {}
        self.bodies_bytes = 0
        self.defects: dict[str, float] = {}
        self.refusals = Refusals()

    # --- the accept loop ---------------------------------------------------------------------------------------------

    async def accept(self, listener: socket.socket) -> None:
        while True:
            await trio.lowlevel.wait_readable(listener)
            for _ in range(_BATCH):
                try:
                    sock, address = listener.accept()
                except BlockingIOError:
                    break
                except OSError as error:
                    if error.errno in _RETRY_ACCEPT:
                        continue
                    if error.errno not in _OUT_OF_RESOURCES:
                        raise
                    log.warning("cannot accept REST connections", why=error.strerror)
                    for _ in range(_BATCH):
                        self._evict_one()
                    # The pending connection keeps the listener readable: without a pause this would spin.
                    await trio.sleep(0.1)
                    break
                self._accepted(sock, address[0])
            # the batch may have been full: let others run before the next
            await trio.lowlevel.checkpoint()

    def _accepted(self, sock: socket.socket, peer: str) -> None:
        """Answer at once if all is there already, else start a task. Never blocks."""
        sock.setblocking(False)
        data = unsent = b""
        if self.listen.tls is None:
            try:
                data = sock.recv(self.limits.head_bytes)
                answer = self._answer_at_once(data) if data else b""
                unsent = b"" if answer is None else answer[sock.send(answer):] if answer else b""
                if answer is not None and not unsent:
                    sock.close()
                    return
            except BlockingIOError:
                pass
            except OSError:
                sock.close()
                return
        if self.count >= self.at_most and not self._evict_one():
            try:
                if not unsent:
                    # A health check needs no place, also one that would have kept its connection.
                    answer = self._answer_at_once(data, though_kept_alive=True) if data else None
                    sock.send(answer or self._bytes(text_response(503, "too many connections"), keep_alive=False))
            except OSError:
                pass   # it is refused either way
            sock.close()
            return
        try:
            stream = trio.SocketStream(trio.socket.from_stdlib_socket(sock))
        except OSError:
            sock.close()   # the client reset it in the meantime
            return
        connection = _Connection(stream, peer, sock)
        connection.buffer, connection.unsent = data, unsent
        self.count += 1
        self._waits_for(connection)
        self.nursery.start_soon(self._serve_connection, connection)

    def _answer_at_once(self, data: bytes, *, though_kept_alive: bool = False) -> bytes | None:
        """The answer, if `data` is one exact request after which the connection ends."""
        exact = exact_request(data)
        if exact is None or (exact.keep_alive and not though_kept_alive) or exact.length != len(data):
            return None
        return self._quick(exact.key, keep_alive=False)

    def _quick(self, key: bytes, *, keep_alive: bool) -> bytes | None:
        try:
            return self.app.quick(key, keep_alive=keep_alive)
        except Exception as defect:
            # The border, as in `_handled`: a defect in an answer must not stop the agent that holds the lock.
            if self._is_news(defect):
                log.exception("a health check could not be answered", request=key.decode("latin-1"))
            return None

    def _is_news(self, defect: Exception) -> bool:
        """Is it worth a traceback in the log? Whoever found it may send it again and again."""
        at = defect.__traceback__
        while at is not None and at.tb_next is not None:
            at = at.tb_next
        kind, now_s = f"{type(defect).__name__} {at.tb_frame.f_code.co_filename if at else ''}:{at.tb_lineno if at else 0}", trio.current_time()
        if now_s - self.defects.get(kind, -_DEFECT_AGAIN_S) < _DEFECT_AGAIN_S:
            return False
        self.defects[kind] = now_s
        return True

    def _waits_for(self, connection: _Connection) -> None:
        if not connection.scope.cancel_called:     # else it was evicted, and gives no second place away
            self.waiting.setdefault(connection)

    def _evict_one(self) -> bool:
        """Make room: end the connection that has waited longest without a request. False if all are at work."""
        for connection in self.waiting:
            del self.waiting[connection]
            connection.scope.cancel()
            self.count -= 1       # its place is free now; its own end will not count again
            return True
        return False

    # --- one connection ----------------------------------------------------------------------------------------------

    async def _serve_connection(self, connection: _Connection) -> None:
        try:
            with connection.scope:
                await self._talk(connection)
        except (trio.BrokenResourceError, OSError):
            pass   # the client went away, or never spoke our protocol
        finally:
            if connection.counted and not connection.scope.cancel_called:   # an evicted one has given its place away already
                self.count -= 1
            self.waiting.pop(connection, None)
            await trio.aclose_forcefully(connection.stream)

    async def _talk(self, connection: _Connection) -> None:
        if connection.unsent:
            await self._send(connection, connection.unsent)
            return
        context = self.listen.tls.context if self.listen.tls is not None else None
        if context is not None:
            assert isinstance(connection.stream, trio.SocketStream)
            tls = trio.SSLStream(connection.stream, context, server_side=True, https_compatible=True)
            connection.stream = tls
            with trio.move_on_after(self.limits.handshake_s) as bound:
                await self._handshake(tls, connection.peer)
            if bound.cancelled_caught:
                return
            connection.client_cert = bool(tls.getpeercert())
        wait_s = self.limits.head_s
        while await self._one_request(connection, wait_s):
            if self.listen.tls is not None and self.listen.tls.context is not context:
                return      # a reload: it shows its certificate anew, to the authorities of today
            wait_s = self.limits.idle_s
            self._waits_for(connection)

    async def _handshake(self, tls: trio.SSLStream[trio.SocketStream], peer: str) -> None:
        """BrokenResourceError as from trio; a certificate that is not accepted is worth a line in the log, noise is not."""
        try:
            await tls.do_handshake()
        except trio.BrokenResourceError as broken:
            error = broken.__cause__
            if isinstance(error, ssl.SSLCertVerificationError):
                self.refusals.note(peer, f"its client certificate is not accepted: {error.verify_message}")
            elif isinstance(error, ssl.SSLError) and error.reason == "PEER_DID_NOT_RETURN_A_CERTIFICATE":
                self.refusals.note(peer, "it shows no client certificate")
            raise

    async def _one_request(self, connection: _Connection, wait_s: float) -> bool:
        """Read, answer. False: the connection is done with."""
        try:
            if not await self._head(connection, wait_s):
                return False
            exact = exact_request(connection.buffer)
            answer = self._quick(exact.key, keep_alive=exact.keep_alive) if exact is not None else None
            if exact is not None and answer is not None:
                connection.buffer = connection.buffer[exact.length:]
                await self._send(connection, answer)
                return exact.keep_alive
            return await self._parsed(connection)
        except _Refused as refused:
            await self._send(connection, self._bytes(quoting_response(refused.status, refused.text), keep_alive=False))
            await self._linger(connection)
            return False

    async def _head(self, connection: _Connection, wait_s: float) -> bool:
        """Wait until a whole head is in the buffer. False if the client is gone or never began."""
        if not connection.buffer:
            with trio.move_on_after(wait_s) as bound:
                connection.buffer = bytes(await connection.stream.receive_some(self.limits.head_bytes))
            if bound.cancelled_caught or not connection.buffer:
                return False
        with trio.move_on_after(self.limits.head_s):
            while True:
                start = connection.buffer.lstrip(b"\r\n")[:1]
                if start and not b"!" <= start <= b"~":
                    raise _Refused(400, "this is not HTTP")     # TLS towards a plain port, for instance
                if b"\r\n\r\n" in connection.buffer or b"\n\n" in connection.buffer:
                    return True
                if len(connection.buffer) >= self.limits.head_bytes:
                    raise _Refused(431, f"the request's head is longer than {self.limits.head_bytes} bytes")
                more = await connection.stream.receive_some(self.limits.head_bytes)
                if not more:
                    return False
                connection.buffer += more
        raise _Refused(408, f"no complete request within {self.limits.head_s:g} s")

    async def _parsed(self, connection: _Connection) -> bool:
        """A request that is not an exact health check."""
        parser = h11.Connection(h11.SERVER, max_incomplete_event_size=self.limits.head_bytes)
        keep_alive = False
        try:
            parser.receive_data(connection.buffer)
            head = parser.next_event()
            if not isinstance(head, h11.Request):
                raise _Refused(400, "the request is not complete")
            if head.http_version not in (b"1.0", b"1.1"):
                raise _Refused(505, "this is not HTTP/1.0 or HTTP/1.1")
            if {b"content-length", b"transfer-encoding"} <= {name for name, _ in head.headers}:
                # Whoever passed it on may have taken the other of the two for its end (RFC 9112, 6.3).
                raise _Refused(400, "the request has both Content-Length and Transfer-Encoding")
            request = self._request(connection, head)
            refusal = self.app.refuses(request)
            if refusal is not None and _has_body(head):
                await self._send(connection, self._bytes(refusal, keep_alive=False))
                await self._linger(connection)
                return False
            body = await self._body(connection, parser, head)
            self.waiting.pop(connection, None)
            if refusal is None and _wants_websocket(head):
                upgraded = self.app.upgrade(request)
                if isinstance(upgraded, Response):
                    await self._send(connection, self._bytes(upgraded, keep_alive=False))
                    await self._linger(connection)
                    return False
                if upgraded is not None:
                    await self._go_on_as(connection, upgraded, parser.trailing_data[0])
                    return False
            response = refusal or await self._handled(msgspec.structs.replace(request, body=body))
            keep_alive = parser.our_state is h11.SEND_RESPONSE and parser.their_state is not h11.MUST_CLOSE and _wants_keep_alive(head)
            connection.buffer = parser.trailing_data[0]
            if head.method == b"HEAD":
                await self._send(connection, self._head_bytes(response, keep_alive=keep_alive))
            elif len(response.body) > SEPARATELY_BYTES:
                await self._send(connection, self._head_bytes(response, keep_alive=keep_alive))
                await self._send(connection, response.body)
                if response.tail:
                    await self._send(connection, response.tail)
            else:
                await self._send(connection, self._bytes(response, keep_alive=keep_alive))
        except h11.RemoteProtocolError as error:
            raise _Refused(error.error_status_hint or 400, str(error)[:200]) from None
        return keep_alive

    async def _go_on_as(self, connection: _Connection, upgraded: Upgraded, received: bytes) -> None:
        """No request any more: it has limits of its own, and takes no place from those who ask."""
        if not connection.scope.cancel_called:     # else it was evicted, and has given its place away
            connection.counted = False
            self.count -= 1
        sock = connection.sock if isinstance(connection.stream, trio.SocketStream) else None
        try:
            await upgraded.run(connection.stream, sock, received, self.nursery)
        except (trio.BrokenResourceError, trio.ClosedResourceError, OSError):
            pass        # it is gone
        except Exception as defect:
            # The border, as in `_handled`.
            if self._is_news(defect):
                log.exception("a connection is ended for a defect here", peer=connection.peer)

    async def _body(self, connection: _Connection, parser: h11.Connection, head: h11.Request) -> bytes:
        length = next((value for name, value in head.headers if name == b"content-length"), b"0")
        if int(length) > self.limits.body_bytes:
            raise _Refused(413, f"the body is longer than {self.limits.body_bytes} bytes")
        body, size, kept, chunks = bytearray(), 0, 0, 0
        try:
            with trio.move_on_after(self.limits.body_s):
                while True:
                    event = parser.next_event()
                    if isinstance(event, h11.Data):
                        size += len(event.data)
                        if size > self.limits.body_bytes:
                            raise _Refused(413, f"the body is longer than {self.limits.body_bytes} bytes")
                        if head.method not in _SAFE:       # nobody reads what comes with a question
                            if self.bodies_bytes + len(event.data) > self.limits.bodies_bytes:
                                raise _Refused(503, "too many bodies at once")
                            body += event.data
                            kept += len(event.data)
                            self.bodies_bytes += len(event.data)
                        chunks += 1
                        if chunks % _CHUNKS == 0:
                            await trio.lowlevel.checkpoint()
                    elif isinstance(event, h11.EndOfMessage):
                        return bytes(body)
                    elif event is h11.NEED_DATA:
                        if parser.they_are_waiting_for_100_continue:
                            parser.send(h11.InformationalResponse(status_code=100, headers=[]))
                            await connection.stream.send_all(b"HTTP/1.1 100 Continue\r\n\r\n")
                        parser.receive_data(bytes(await connection.stream.receive_some(_PART_BYTES)))
                    else:
                        raise _Refused(400, "the body is not complete")
        finally:
            self.bodies_bytes -= kept
        raise _Refused(408, f"no complete body within {self.limits.body_s:g} s")

    def _request(self, connection: _Connection, head: h11.Request) -> Request:
        """The request as far as its head tells."""
        try:
            path, query = split_target(head.target.decode("latin-1"))
        except ValueError as error:
            raise _Refused(400, f"the request's target cannot be read: {error}") from None
        return Request(
            method=head.method.decode("latin-1"), path=path, query=query, peer=connection.peer, client_cert=connection.client_cert,
            headers={name.decode("latin-1"): value.decode("latin-1") for name, value in head.headers},
        )

    async def _handled(self, request: Request) -> Response:
        with trio.move_on_after(self.limits.handler_s):
            try:
                return await self.app.handle(request)
            except Exception as defect:
                # The border: a defect in an answer must not stop the agent that holds the lock.
                if self._is_news(defect):
                    log.exception("a REST request could not be answered", method=request.method, path=request.path)
                return text_response(500, "internal error, see the agent's log")
        return text_response(504, f"no answer within {self.limits.handler_s:g} s")

    # --- writing -----------------------------------------------------------------------------------------------------

    def _head_bytes(self, response: Response, *, keep_alive: bool) -> bytes:
        return head_bytes(response, self.listen.headers, keep_alive=keep_alive)

    def _bytes(self, response: Response, *, keep_alive: bool) -> bytes:
        return self._head_bytes(response, keep_alive=keep_alive) + response.content

    async def _send(self, connection: _Connection, data: bytes) -> None:
        self._waits_for(connection)
        view = memoryview(data)
        with trio.move_on_after(self.limits.write_s) as bound:
            for start in range(0, len(view), _GIVEN_BYTES):
                await connection.stream.send_all(view[start:start + _GIVEN_BYTES])
        self.waiting.pop(connection, None)
        if bound.cancelled_caught:
            raise trio.BrokenResourceError("the client does not read")

    async def _linger(self, connection: _Connection) -> None:
        """Read away what the client still sends, for a moment: closing with unread bytes would reset the connection and
        take the answer with it (RFC 9112, 9.6)."""
        if not isinstance(connection.stream, trio.SocketStream):
            return
        await connection.stream.send_eof()
        left = 4 * self.limits.body_bytes
        with trio.move_on_after(1.0):
            while left > 0:
                more = await connection.stream.receive_some(65536)
                if not more:
                    return
                left -= len(more)


def _has_body(head: h11.Request) -> bool:
    return any((name == b"content-length" and value.strip(b"0")) or name == b"transfer-encoding" for name, value in head.headers)


def _wants_keep_alive(head: h11.Request) -> bool:
    tokens = {token.strip().lower() for name, value in head.headers if name == b"connection" for token in value.split(b",")}
    return head.http_version >= b"1.1" and b"close" not in tokens


def _wants_websocket(head: h11.Request) -> bool:
    return head.method == b"GET" and head.http_version == b"1.1" and any(name == b"upgrade" and b"websocket" in value.lower() for name, value in head.headers)
