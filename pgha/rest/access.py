"""Who may ask for changes? Unsafe methods only: allowlist, then client certificate, then user and password (spec 3.1)."""

from __future__ import annotations

import base64
import binascii
import hmac
import ipaddress
import socket
from collections.abc import Sequence
from functools import partial

import trio
from msgspec import Struct

from pgha.log import Log
from pgha.rest.wire import Request, Response, text_response

log = Log(__name__)

SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})

Network = ipaddress.IPv4Network | ipaddress.IPv6Network


class Access(Struct, frozen=True, kw_only=True):
    """`networks` None: everybody. `username` empty: no password is asked. `require_cert`: TLS with verify_client."""

    username: str = ""
    password: str = ""
    networks: tuple[Network, ...] | None = None
    require_cert: bool = False

    def __repr__(self) -> str:
        return f"Access(username={self.username!r}, password=***, networks={self.networks!r}, require_cert={self.require_cert!r})"

    def refuses(self, request: Request) -> Response | None:
        """The refusal, or None if the request may go on."""
        if request.method in SAFE_METHODS:
            return None
        if self.networks is not None and not _contains(self.networks, request.peer):
            return text_response(403, "Access is denied")
        if self.require_cert and not request.client_cert:
            return text_response(403, "client certificate required")
        if self.username:
            return self._authenticate(request.headers.get("authorization"))
        return None

    def _authenticate(self, header: str | None) -> Response | None:
        if header is None:
            return _unauthorized("no auth header received")
        scheme, _, credentials = header.partition(" ")
        try:
            given = base64.b64decode(credentials.strip(), validate=True)
        except (binascii.Error, ValueError):
            given = b""
        wanted = f"{self.username}:{self.password}".encode()
        if scheme.lower() != "basic" or not hmac.compare_digest(given, wanted):
            return _unauthorized("not authenticated")
        return None


def _unauthorized(text: str) -> Response:
    return Response(status=401, body=text.encode(), headers=(("WWW-Authenticate", 'Basic realm="Patroni"'),))


def _contains(networks: tuple[Network, ...], peer: str) -> bool:
    try:
        address: ipaddress.IPv4Address | ipaddress.IPv6Address = ipaddress.ip_address(peer.partition("%")[0])
    except ValueError:
        return False
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        address = address.ipv4_mapped
    return any(address in network for network in networks)


class Names:
    """Addresses, networks and host names → networks. What a name meant last goes on counting while nobody answers for it.

    `what`: where they stand, for the log. `unresolved`: names without an answer when last asked.
    """

    def __init__(self, what: str) -> None:
        self._what = what
        self._known: dict[str, tuple[Network, ...]] = {}
        self.unresolved: frozenset[str] = frozenset()

    async def networks(self, items: Sequence[str], *, deadline_s: float = 5.0) -> tuple[Network, ...]:
        """All of them. Called beside the agent's work, never while a request waits. A name that nobody knows allows nobody."""
        found: list[Network] = []
        names = []
        for item in items:
            try:
                found.append(ipaddress.ip_network(item, strict=False))
            except ValueError:
                names.append(item)
        self._known = {name: known for name, known in self._known.items() if name in names}
        failed: set[str] = set()
        async with trio.open_nursery() as nursery:
            for name in names:
                nursery.start_soon(self._resolve, name, deadline_s, failed)
        for name in sorted(failed - self.unresolved):
            log.warning("a name cannot be resolved", of=self._what, name=name[:300], allows="what it meant last" if name in self._known else "nobody")
        self.unresolved = frozenset(failed)
        return (*found, *(network for name in names for network in self._known.get(name, ())))

    async def _resolve(self, name: str, deadline_s: float, failed: set[str]) -> None:
        failed.add(name)
        with trio.move_on_after(deadline_s):
            try:
                # Threads of their own: those that others share would be used up while the name server is silent.
                answers = await trio.to_thread.run_sync(partial(socket.getaddrinfo, name, None, type=socket.SOCK_STREAM), abandon_on_cancel=True, limiter=_RESOLVERS)
            except (OSError, UnicodeError):     # UnicodeError: no name at all, by Python's own codec
                return
            self._known[name] = tuple(ipaddress.ip_network(str(address[0]).partition("%")[0]) for *_, address in answers)
            failed.discard(name)


_RESOLVERS = trio.CapacityLimiter(8)


async def resolve_allowlist(items: Sequence[str]) -> tuple[Network, ...] | None:
    """`items` once; None, everybody, for an empty list."""
    return await Names("restapi.allowlist").networks(items) if items else None
