"""Who may ask for changes? Unsafe methods only: allowlist, then client certificate, then user and password (spec 3.1)."""

from __future__ import annotations

import base64
import binascii
import hmac
import ipaddress
from collections.abc import Sequence

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


async def resolve_allowlist(items: Sequence[str], *, deadline_s: float = 5.0, what: str = "restapi.allowlist") -> tuple[Network, ...] | None:
    """Addresses, networks and host names → networks; None for an empty list. Called at start and reload, never while a
    request waits. A name that cannot be resolved in time is logged and allows nobody. `what`: where the names stand."""
    if not items:
        return None
    found: list[Network] = []
    names = []
    for item in items:
        try:
            found.append(ipaddress.ip_network(item, strict=False))
        except ValueError:
            names.append(item)

    async def resolve(name: str) -> None:
        why = f"no answer in {deadline_s:g} s"
        with trio.move_on_after(deadline_s):
            try:
                answers = await trio.socket.getaddrinfo(name, None, type=trio.socket.SOCK_STREAM)
                found.extend(ipaddress.ip_network(str(address[0]).partition("%")[0]) for *_, address in answers)
                return
            except OSError as error:
                why = str(error)
        log.warning("a name cannot be resolved and allows nobody", of=what, name=name, why=why)

    async with trio.open_nursery() as nursery:
        for name in names:
            nursery.start_soon(resolve, name)
    return tuple(found)
