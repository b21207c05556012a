"""Does a postmaster answer at all? Asked below libpq, because libpq tells text in the server's language and no code.

`answers_startup` sends only the request to negotiate TLS (chapter 55.2.10): the answer is one byte by a freshly forked
backend, so postmaster and scheduler work; nothing is authenticated, and nothing is written to the server's log.
`startup_sqlstate` sends a startup packet and reads the first message.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from pathlib import Path

import trio

_TLS_REQUEST = struct.pack("!ii", 8, 80877103)
_PROTOCOL_3_0 = 196608
#: The first message is an authentication request or an error: a longer one is not PostgreSQL.
_MESSAGE_LIMIT_BYTES = 16 * 1024


async def _open(host: str, port: int) -> trio.SocketStream:
    if host.startswith(("/", "@")):
        return await trio.open_unix_socket(str(Path(host) / f".s.PGSQL.{port}"))
    return await trio.open_tcp_stream(host, port)


async def answers_startup(host: str, port: int, *, deadline_s: float) -> bool:
    """Did the server at `host` (socket directory or address literal) say anything within `deadline_s`?

    A server that is starting, recovering, shutting down or full answers, too.
    """
    with trio.move_on_after(max(0.0, deadline_s)):
        try:
            stream = await _open(host, port)
            async with stream:
                await stream.send_all(_TLS_REQUEST)
                return bool(await stream.receive_some(1))
        except (OSError, trio.BrokenResourceError):
            return False
    return False


async def startup_sqlstate(conninfo: Mapping[str, str | int], *, deadline_s: float) -> str | None:
    """The code with which the server refuses a session of this user and database; None if it does not refuse at once.

    57P03: starting up, shutting down or in recovery; 53300: no room; 28000: pg_hba.conf; 3D000 needs authentication first.
    """
    words = {"user": conninfo.get("user", "postgres"), "database": conninfo.get("dbname") or conninfo.get("user", "postgres")}
    if "replication" in conninfo:
        words["replication"] = conninfo["replication"]
    body = b"".join(f"{k}\0{v}\0".encode() for k, v in words.items()) + b"\0"
    packet = struct.pack("!ii", 8 + len(body), _PROTOCOL_3_0) + body
    with trio.move_on_after(max(0.0, deadline_s)):
        try:
            stream = await _open(str(conninfo.get("hostaddr") or conninfo["host"]), int(conninfo.get("port", 5432)))
            async with stream:
                await stream.send_all(packet)
                return await _first_error(stream)
        except (OSError, trio.BrokenResourceError):
            return None
    return None


async def _first_error(stream: trio.SocketStream) -> str | None:
    data = b""
    while len(data) < 5 or len(data) < 1 + int.from_bytes(data[1:5], "big"):
        chunk = await stream.receive_some(4096)
        if not chunk or len(data) > _MESSAGE_LIMIT_BYTES:
            return None
        data += chunk
        if data[:1] != b"E":
            return None
    fields = data[5:].split(b"\0")
    return next((f[1:].decode(errors="replace") for f in fields if f[:1] == b"C"), None)
