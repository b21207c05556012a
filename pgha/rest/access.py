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
        self._turns = 0
        self.unresolved: frozenset[str] = frozenset()

    @property
    def has_names(self) -> bool:
        """Was there anything to look up? What is an address already needs nobody to tell."""
        return bool(self._known or self.unresolved)

    async def networks(self, items: Sequence[str], *, deadline_s: float = 5.0) -> tuple[Network, ...]:
        """All of them. Called beside the agent's work, never while a request waits. A name that nobody knows allows nobody."""
        found: list[Network] = []
        names = []
        for item in items:
            try:
                found.append(ipaddress.ip_network(item, strict=False))
            except ValueError:
                names.append(item)
        self._turns += 1
        turn, answers = self._turns, dict[str, tuple[Network, ...]]()
        async with trio.open_nursery() as nursery:
            for name in names:
                nursery.start_soon(self._resolve, name, deadline_s, answers)
        failed = frozenset(names) - answers.keys()
        for name in sorted(failed - self.unresolved):
            log.warning("a name cannot be resolved", of=self._what, name=name[:300], allows="what it meant last" if name in self._known else "nobody")
        known = {name: networks for name in names if (networks := answers.get(name) or self._known.get(name))}
        if turn == self._turns:     # else others have been asked for meanwhile, and these are of no interest any more
            self._known, self.unresolved = known, failed
        return (*found, *(network for networks in known.values() for network in networks))

    async def _resolve(self, name: str, deadline_s: float, answers: dict[str, tuple[Network, ...]]) -> None:
        with trio.move_on_after(deadline_s):
            try:
                # Threads of their own: those that others share would be used up while the name server is silent.
                found = await trio.to_thread.run_sync(partial(socket.getaddrinfo, name, None, type=socket.SOCK_STREAM), abandon_on_cancel=True, limiter=_RESOLVERS)
            except (OSError, UnicodeError):     # UnicodeError: no name at all, by Python's own codec
                return
            answers[name] = tuple(ipaddress.ip_network(str(address[0]).partition("%")[0]) for *_, address in found)


_RESOLVERS = trio.CapacityLimiter(8)


async def resolve_allowlist(items: Sequence[str]) -> tuple[Network, ...] | None:
    """`items` once; None, everybody, for an empty list."""
    return await Names("restapi.allowlist").networks(items) if items else None
