"""Where to listen, within which limits: the configuration of the server, and its sockets."""

from __future__ import annotations

import socket
from collections.abc import Mapping, Sequence

import trio
from msgspec import Struct

from pgha.errors import ConfigError
from pgha.rest.tls import Tls


class Limits(Struct, frozen=True, kw_only=True):
    head_bytes: int = 16 << 10
    body_bytes: int = 1 << 20
    bodies_bytes: int = 16 << 20  # of all connections together
    head_s: float = 5.0          # from the first moment a head is due until it is complete
    body_s: float = 10.0
    idle_s: float = 15.0         # between two requests of one connection
    handshake_s: float = 5.0
    write_s: float = 10.0
    handler_s: float = 900.0     # the outermost bound; each route has its own, shorter one
    connections: int = 512       # and never more than half of the files that the process may open


class Listen(Struct, frozen=True, kw_only=True):
    """`addresses`: (host, port); host "*" or "" is every address. `headers`: of every answer. `tls` None: plain."""

    addresses: Sequence[tuple[str, int]]
    headers: Mapping[str, str] = {}
    tls: Tls | None = None
    backlog: int = 128
    limits: Limits = Limits()


async def open_sockets(listen: Listen) -> list[socket.socket]:
    """Bind every address. ConfigError names the one that cannot be had."""
    sockets: list[socket.socket] = []
    try:
        for host, port in listen.addresses:
            try:
                found = await trio.socket.getaddrinfo(None if host in ("*", "") else host, port, type=socket.SOCK_STREAM,
                                                      flags=socket.AI_PASSIVE)
                for family, kind, _, _, address in found:
                    sock = socket.socket(family, kind)
                    sockets.append(sock)
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                    if family == socket.AF_INET6:
                        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                    # Clients speak first, so the kernel may wait for their first bytes before it troubles us (tcp(7)): most
                    # requests are then complete when they are accepted, also while every place is taken. Whoever stays
                    # silent for a second is accepted all the same.
                    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT, 1)
                    sock.setblocking(False)
                    sock.bind(address)
                    sock.listen(listen.backlog)
            except (OSError, UnicodeError) as error:
                why = error.strerror if isinstance(error, OSError) and error.strerror else error
                raise ConfigError(f"restapi.listen: cannot listen on {host}:{port}: {why}") from error
    except BaseException:
        for sock in sockets:
            sock.close()
        raise
    return sockets
