"""GET /pgha/events: who follows what happens here, as it happens (WebSocket), or as one page (anybody else).

    EventLog ──► Readers.deliver: one task for all readers, a few at a time, each write without waiting
                      │ what the kernel did not take
                      ▼
                 Reader._write: a task of its own, for as long as that reader owes us something

A reader's buffer is the log itself: a reader keeps a number, and what it has been given in one go. So a reader that does
not read costs nothing, and is dropped when the log has forgotten what it has not got yet, or when it has taken nothing
for a while, or answers no ping.

Rules of this file: whoever reads, or does not, delays nobody; a reader is told why it is dropped (close code and reason);
wsproto is loaded when the first reader says something.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import resource
import socket
import struct
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol
from urllib.parse import urlsplit

import trio

from pgha import __version__
from pgha.clock import Clock
from pgha.events import Entry, EventLog, NoSuchId
from pgha.log import Log
from pgha.model.event import KINDS, Event, Hello
from pgha.rest.wire import JSON, Request, Response, json_response, quoting_response, text_response

if TYPE_CHECKING:
    from wsproto.connection import Connection

log = Log(__name__)

#: readers served in one go before other tasks get their turn
BATCH = 16
#: what one reader is given in one go
GIVEN_BYTES = 16 << 10
#: what one page has; a client that does not read it keeps so much of our memory
PAGE_BYTES = 64 << 10
PAGE_EVENTS = 200
#: pages that are kept for whoever asks the same, until the next event
PAGES_KEPT = 8
#: of the kernel, for each reader (it takes twice as much)
SEND_BUFFER_BYTES = 64 << 10
#: a reader that has taken nothing for so long is dropped; so much later, whether or not it has taken notice
WRITE_S = 10.0
CLOSE_S = 3.0
#: asked for a sign of life after so much silence, dropped if there is none within the second
PING_EVERY_S = 15.0
PONG_S = 15.0
#: how often these times are looked at, while there are readers
LOOK_EVERY_S = 1.0
#: frames that a reader may send between two looks: pings and pongs, since nothing else is expected
MOST_FRAMES = 50

_GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
#: close codes (RFC 6455, 7.4.1)
GOING_AWAY, UNSUPPORTED, POLICY, UNHEARD, AGAIN_LATER = 1001, 1003, 1008, 1011, 1013
#: read away after a close, so that our last word is not lost with a reset
_LINGER_BYTES = 256 << 10


class Upgraded(Protocol):
    """A connection that goes on as something else than HTTP."""

    async def run(self, stream: trio.abc.Stream, sock: socket.socket | None, received: bytes, nursery: trio.Nursery) -> None:
        """Until its end; the caller closes it, and takes what a broken connection raises. `sock`: of a plain connection, for
        writing without waiting. `received`: what has been read already. `nursery`: of the listener."""
        ...


def frame(opcode: int, payload: bytes) -> bytes:
    """One whole frame from a server (RFC 6455, 5.2)."""
    length = len(payload)
    if length < 126:
        return bytes((0x80 | opcode, length)) + payload
    return (struct.pack("!BBH", 0x80 | opcode, 126, length) if length < 1 << 16 else struct.pack("!BBQ", 0x80 | opcode, 127, length)) + payload


TEXT, CLOSE, PING, PONG = 1, 8, 9, 10


def _close_frame(code: int, reason: str) -> bytes:
    return frame(CLOSE, code.to_bytes(2, "big") + reason.encode()[:123].decode(errors="ignore").encode())


class Readers:
    """All readers of one log. `at_most`: how many there may be, asked at each newcomer."""

    def __init__(self, events: EventLog, *, clock: Clock, at_most: Callable[[], int]) -> None:
        self.events = events
        self.clock = clock
        self._at_most = at_most
        self._readers: dict[Reader, None] = {}
        self._delivering = False
        self._pages: dict[tuple[int, int, frozenset[str] | None, bool], bytes] = {}     # last, from where, kinds, the newest

    def __len__(self) -> int:
        return len(self._readers)

    # --- the answer to a request ---------------------------------------------------------------------------------------

    def page(self, request: Request) -> Response:
        """For those who ask once: the newest events, or those that came after an id ("0": the oldest kept) and `more`, where the
        next page begins. Who asks the same gets the same bytes: many that ask and do not read cost little more than one."""
        wanted = _wanted(request)
        if isinstance(wanted, Response):
            return wanted
        after, kinds = wanted
        try:
            start = self.events.start(after or "0")
        except NoSuchId as why:
            return quoting_response(400, f"after: {why}")
        events = self.events
        if start.gap is not None:       # its words are of this question
            gap = events.message(start.gap, number=start.number, wall_s=self.clock.wall_s())
            return Response(status=200, content_type=JSON, body=self._page(start.number, kinds, newest=False, gap=gap))
        key = (events.last, start.number, kinds, not after)
        if (body := self._pages.get(key)) is None:
            body = self._page(start.number, kinds, newest=not after, gap=b"null")
            if len(self._pages) >= PAGES_KEPT or any(kept[0] != events.last for kept in self._pages):
                self._pages.clear()
            self._pages[key] = body
        return Response(status=200, content_type=JSON, body=body)

    def _page(self, number: int, kinds: frozenset[str] | None, *, newest: bool, gap: bytes) -> bytes:
        """The events after that number: the first, or the newest of them, as many as a page has."""
        events = self.events
        told: list[Entry] = []
        size, more = 0, None
        entries = events.after(number, kinds)
        for entry in reversed(list(entries)) if newest else entries:
            if told and (len(told) >= PAGE_EVENTS or size + len(entry.text) > PAGE_BYTES):
                more = None if newest else events.id_of(told[-1].number)
                break
            told.append(entry)
            size += len(entry.text)
        if newest:
            told.reverse()
        head = json_response({"node": events.node, "scope": events.scope, "last": events.id_of(events.last), "oldest": events.id_of(events.forgotten), "more": more}).body
        return b'%s, "gap": %s, "events": [\n%s\n]}' % (head[:-1], gap, b",\n".join(entry.text for entry in told))

    def upgrade(self, request: Request) -> Response | Upgraded:
        """For a request with `Upgrade: websocket`: the refusal, or the reader."""
        wanted = _wanted(request)
        if isinstance(wanted, Response):
            return wanted
        after, kinds = wanted
        key = request.headers.get("sec-websocket-key", "")
        if request.headers.get("sec-websocket-version", "").strip() != "13":
            return Response(status=426, body=b"WebSocket version 13 only", headers=(("Sec-WebSocket-Version", "13"), ("Upgrade", "websocket")))
        if not _is_key(key) or "upgrade" not in _tokens(request.headers.get("connection", "")):
            return text_response(400, "this is not the beginning of a WebSocket")
        origin = request.headers.get("origin")
        if origin is not None and not _same_host(origin, request.headers.get("host", "")):
            return text_response(403, "a page of another origin may not read this")     # a browser would let it, other than with GET
        at_most = self._allowed()
        if len(self._readers) >= at_most:
            return text_response(503, f"there are {len(self._readers)} readers of events, as many as may be (pgha.event_readers)")
        events = self.events
        try:
            start = events.start(after) if after else None
        except NoSuchId as why:
            return quoting_response(400, f"after: {why}")
        number = events.last if start is None else start.number
        first: list[Event] = [Hello(scope=events.scope, version=__version__, oldest=events.id_of(events.forgotten))]
        if start is not None and start.gap is not None:
            first.append(start.gap)
        told = b"".join(frame(TEXT, events.message(event, number=number, wall_s=self.clock.wall_s())) for event in first)
        accept = base64.b64encode(hashlib.sha1(key.strip().encode() + _GUID).digest())  # noqa: S324  (the protocol's, no secret)
        answer = b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Accept: %s\r\n\r\n" % accept
        reader = Reader(self, given=number, kinds=kinds, first=answer + told)
        self._readers[reader] = None        # its place is taken from now on
        return reader

    def _allowed(self) -> int:
        """The renewer's connections and PostgreSQL's files come from the same allowance."""
        files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        return self._at_most() if files == resource.RLIM_INFINITY else min(self._at_most(), files // 4)

    # --- delivering ----------------------------------------------------------------------------------------------------

    def entered(self, nursery: trio.Nursery) -> None:
        """Somebody reads: deliver, until nobody does."""
        if not self._delivering:
            self._delivering = True
            nursery.start_soon(self._deliver)

    def left(self, reader: Reader) -> None:
        self._readers.pop(reader, None)

    async def _deliver(self) -> None:
        look_at = trio.current_time() + LOOK_EVERY_S
        try:
            while self._readers:
                told = self.events.last
                await self._in_batches(Reader.push)
                with trio.move_on_at(look_at):
                    await self.events.wait_beyond(told)
                if trio.current_time() >= look_at:
                    await self._in_batches(Reader.look)
                    look_at = trio.current_time() + LOOK_EVERY_S
        except Exception:
            # The border, as in server.py: a defect here must not stop the agent that holds the lock.
            log.exception("events cannot be delivered")
            for reader in list(self._readers):
                reader.abort()
        finally:
            self._delivering = False

    async def _in_batches(self, step: Callable[[Reader], None]) -> None:
        for number, reader in enumerate(list(self._readers)):
            if number % BATCH == BATCH - 1:
                await trio.lowlevel.checkpoint()
            step(reader)


class Reader:
    """One client. Everything that is sent to it goes through `push`, and through `_write` while the kernel takes no more."""

    __slots__ = ("_closing_at", "_control", "_ended", "_first", "_frames", "_given", "_heard_at", "_kinds", "_nursery", "_pinged", "_protocol", "_readers", "_reason", "_scope", "_sock",
                 "_stream", "_writing_since")

    def __init__(self, readers: Readers, *, given: int, kinds: frozenset[str] | None, first: bytes) -> None:
        self._readers = readers
        self._given = given             # number of the last event that it was given, or that it did not want
        self._kinds = kinds
        self._first = first
        self._control = b""             # a ping or pong, before anything else
        self._frames = 0
        self._pinged = False
        self._reason = b""              # the close frame, last of all
        self._closing_at: float | None = None
        self._writing_since: float | None = None
        self._heard_at = 0.0
        self._ended = False
        self._protocol: Connection | None = None
        self._scope = trio.CancelScope()
        self._stream: trio.abc.Stream | None = None
        self._sock: socket.socket | None = None
        self._nursery: trio.Nursery | None = None

    async def run(self, stream: trio.abc.Stream, sock: socket.socket | None, received: bytes, nursery: trio.Nursery) -> None:
        """See Upgraded."""
        self._stream, self._sock, self._nursery = stream, sock, nursery
        self._heard_at = trio.current_time()
        try:
            transport = stream.transport_stream if isinstance(stream, trio.SSLStream) else stream
            if isinstance(transport, trio.SocketStream):
                transport.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
            self._readers.entered(nursery)
            self.push()
            with self._scope:
                while self._hear(received):
                    received = bytes(await stream.receive_some(4096))
                    if not received:
                        return
                await self._part()
        finally:
            self._close(GOING_AWAY, "the agent stops")      # no effect on one that is closing anyway
            self._ended = True
            self._readers.left(self)

    async def _part(self) -> None:
        """All is said. Whoever closes a connection with unread bytes resets it, and takes the close frame with it."""
        assert self._stream is not None
        left = _LINGER_BYTES
        with trio.move_on_after(CLOSE_S):
            while left > 0 and (more := await self._stream.receive_some(4096)):
                left -= len(more)

    def abort(self) -> None:
        """It ends now, whatever it has or has not read."""
        self._scope.cancel()

    # --- what it says --------------------------------------------------------------------------------------------------

    def _hear(self, received: bytes) -> bool:
        """Take in what came. False: it is over, nothing more is read."""
        if not received:
            return True
        self._heard_at = trio.current_time()
        self._pinged = False
        if self._protocol is None:
            from wsproto.connection import Connection, ConnectionType  # noqa: PLC0415  (when it is first needed)

            self._protocol = Connection(ConnectionType.SERVER)
        from wsproto import events as said  # noqa: PLC0415  (loaded by now)

        self._protocol.receive_data(received)
        for event in self._protocol.events():
            self._frames += 1
            match event:
                case said.CloseConnection(code=code, reason=reason):
                    # Its own close is answered with its code; what was no WebSocket, with what was wrong about it.
                    garbage = self._protocol.state.name == "OPEN"
                    self._close(code, (reason or "") if garbage else "")
                    return False
                case said.Ping(payload=payload):
                    self._control = frame(PONG, bytes(payload))     # the latest is enough (RFC 6455, 5.5.3)
                    self.push()
                case said.Pong():
                    pass
                case _:
                    self._close(UNSUPPORTED, "events are read here, nothing is taken")
                    return False
            if self._frames > MOST_FRAMES:
                self._close(POLICY, "too many frames")
                return False
        return True

    # --- what it is told -----------------------------------------------------------------------------------------------

    def push(self) -> None:
        """Give it what it has not got yet, as far as the kernel takes it without waiting."""
        if self._writing_since is not None or self._ended or self._stream is None:
            return
        data = self._next()
        if not data:
            return
        sent = 0
        if self._sock is not None:
            try:
                sent = self._sock.send(data)
            except BlockingIOError:
                pass
            except OSError:
                self.abort()
                return
        if sent < len(data) or (self._closing_at is None and self._given < self._readers.events.last):
            assert self._nursery is not None
            self._writing_since = trio.current_time()
            self._nursery.start_soon(self._write, data[sent:])
        elif self._closing_at is not None:
            self._said_all()

    async def _write(self, data: bytes) -> None:
        """What was too much to be given at once, and whatever has come up by then."""
        assert self._stream is not None
        try:
            while not self._ended and (data := data or self._next()):
                await self._stream.send_all(data)
                self._writing_since = trio.current_time()
                data = b""
            if self._closing_at is not None:
                self._said_all()
        except (trio.BrokenResourceError, trio.ClosedResourceError, OSError):
            self.abort()
        except Exception:
            log.exception("a reader of events is dropped for a defect here")     # the border, as in `_deliver`
            self.abort()
        finally:
            self._writing_since = None

    def _said_all(self) -> None:
        """The close frame is on its way, and nothing follows it: no reader need wait for a time limit to see the end."""
        if self._sock is not None:
            try:
                self._sock.shutdown(socket.SHUT_WR)
            except OSError:
                pass        # it is gone

    def _next(self) -> bytes:
        """What is to be sent next: whole frames, so many bytes at most."""
        events = self._readers.events
        data, self._first = self._first + self._control, b""
        self._control = b""
        if self._closing_at is None and self._given < events.forgotten:
            # `first` may say that the log has forgotten more; what it forgot since then, this reader was too slow for.
            self._close_later(AGAIN_LATER, f"too slow: {events.forgotten - self._given} events were dropped; go on with after={events.id_of(self._given)}")
        if self._closing_at is None:
            frames = [data]
            size = len(data)
            for entry in events.after(self._given):
                if size >= GIVEN_BYTES:
                    break
                self._given = entry.number
                if self._kinds is None or entry.kind in self._kinds:
                    frames.append(frame(TEXT, entry.text))
                    size += len(frames[-1])
            return b"".join(frames)
        data, self._reason = data + self._reason, b""
        return data

    # --- its end -------------------------------------------------------------------------------------------------------

    def look(self) -> None:
        """Is it time to ask for a sign of life, or to let it go?"""
        now = trio.current_time()
        self._frames = 0
        if self._closing_at is not None:
            if now >= self._closing_at + CLOSE_S:
                self.abort()
        elif self._writing_since is not None and now >= self._writing_since + WRITE_S:
            self._close(AGAIN_LATER, f"too slow: nothing was taken for {WRITE_S:g} s; go on with after={self._readers.events.id_of(self._given)}")
        elif self._pinged and now >= self._heard_at + PING_EVERY_S + PONG_S:
            self._close(UNHEARD, f"no answer to a ping within {PONG_S:g} s")
        elif not self._pinged and now >= self._heard_at + PING_EVERY_S:
            self._pinged = True
            self._control = frame(PING, b"pgha")
            self.push()

    def _close_later(self, code: int, reason: str) -> None:
        self._closing_at = trio.current_time()
        self._reason = _close_frame(code, reason)

    def _close(self, code: int, reason: str) -> None:
        """Say why, if the kernel takes it or the writer gets that far; nothing else is sent any more."""
        if self._closing_at is None:
            self._close_later(code if 1000 <= code < 5000 and code not in (1004, 1005, 1006, 1015) else 1000, reason)
            self.push()


def _wanted(request: Request) -> tuple[str, frozenset[str] | None] | Response:
    """After which id, and of which kinds (None: all)."""
    after = request.query.get("after") or request.headers.get("last-event-id", "").strip()
    if "kinds" not in request.query:
        return after, None
    kinds = frozenset(kind.strip() for kind in request.query["kinds"].split(",") if kind.strip())
    unknown = kinds - set(KINDS)
    if unknown or not kinds:
        return quoting_response(400, f"kinds: {', '.join(sorted(unknown))[:200] or 'none is named'}; there are {', '.join(KINDS)}")
    return after, kinds


def _is_key(key: str) -> bool:
    try:
        return len(base64.b64decode(key.strip(), validate=True)) == 16
    except (binascii.Error, ValueError):
        return False


def _tokens(header: str) -> set[str]:
    return {token.strip().lower() for token in header.split(",")}


def _same_host(origin: str, host: str) -> bool:
    try:
        return bool(host) and urlsplit(origin).netloc.lower() == host.strip().lower()
    except ValueError:
        return False
