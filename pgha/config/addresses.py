"""Where something listens, and how others reach it: "a,b:5432", "*:5432", "[::1]:8008", "10.0.0.1".

An IPv6 address stands in brackets, because nothing else tells its last group from a port.
"""

from __future__ import annotations

import ipaddress
import re
from typing import Any
from urllib.parse import urlsplit

from msgspec import Struct

from pgha.config.lists import texts
from pgha.config.values import Kind, Wrong, shown, type_name

_ANY = {"*": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}
_HOST = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_.-]*[A-Za-z0-9_.])?")


class Address(Struct, frozen=True):
    """One host and port. `host` "" : not configured."""

    host: str = ""
    port: int = 0

    def __str__(self) -> str:
        return f"{bracketed(self.host)}:{self.port}"

    def __bool__(self) -> bool:
        return bool(self.host)


class Listen(Struct, frozen=True):
    """Hosts to listen on ("*": every address), and one port. No hosts: not configured."""

    hosts: tuple[str, ...] = ()
    port: int = 0

    def __str__(self) -> str:
        return f"{','.join(bracketed(h) for h in self.hosts)}:{self.port}"

    def __bool__(self) -> bool:
        return bool(self.hosts)

    @property
    def everywhere(self) -> bool:
        """Does it name no address that others could use?"""
        return any(h in _ANY for h in self.hosts)

    @property
    def local_host(self) -> str:
        """The host by which this very machine reaches it."""
        for preferred in ("*", "0.0.0.0", "127.0.0.1", "localhost", "::", "::1"):
            if preferred in self.hosts:
                return _ANY.get(preferred, preferred)
        return self.hosts[0] if self.hosts else ""


def bracketed(host: str) -> str:
    """`host` as it stands before ":port"."""
    return f"[{host}]" if ":" in host else host


def _is_name(text: str) -> bool:
    return bool(_HOST.fullmatch(text)) and all(0 < len(label) < 64 for label in text.removesuffix(".").split("."))


def _host(text: str, whole: str) -> str:
    if text.startswith("[") and text.endswith("]"):
        try:
            return str(ipaddress.IPv6Address(text[1:-1].partition("%")[0])) + text[1:-1][len(text[1:-1].partition("%")[0]):]
        except ValueError:
            raise Wrong(f"is {shown(whole)}, in which {shown(text)} is no IPv6 address") from None
    if ":" in text:
        raise Wrong(f"is {shown(whole)}, in which an IPv6 address lacks its brackets")
    if text != "*" and not _is_name(text):
        raise Wrong(f"is {shown(whole)}, in which {shown(text)} is no host")
    return text


def split(value: Any, default_port: int) -> tuple[tuple[str, ...], int]:
    """Hosts and port of "host[,host…][:port]". Raises Wrong."""
    if not isinstance(value, str):
        raise Wrong(f"is {type_name(value)}, not text")
    if "://" in value:
        raise Wrong(f"is {shown(value)}, a URL")
    *hosts, last = (part.strip() for part in value.split(","))
    port = default_port
    match = re.fullmatch(r"(\[[^\]]*\]|[^:\[\]]*):([^:\]]*)", last)
    if match:
        last = match[1]
        if not re.fullmatch(r"[0-9]{1,5}", match[2]) or not 0 < int(match[2]) < 65536:
            raise Wrong(f"is {shown(value)}, whose port is no number from 1 to 65535")
        port = int(match[2])
    return tuple(_host(h, value) for h in (*hosts, last)), port


def listen(default_port: int) -> Kind:
    def parse(value: Any) -> Listen:
        hosts, port = split(value, default_port)
        return Listen(hosts, port)
    return Kind(parse, f'host[,host…][:port] (port {default_port} if not given), IPv6 in brackets, "*" for every address')


def address(default_port: int) -> Kind:
    def parse(value: Any) -> Address:
        hosts, port = split(value, default_port)
        if len(hosts) != 1:
            raise Wrong(f"is {shown(value)}, several hosts")
        if hosts[0] in _ANY:
            raise Wrong(f"is {shown(value)}, which is no address that others can reach")
        return Address(hosts[0], port)
    return Kind(parse, f"one host[:port] that the other nodes can reach (port {default_port} if not given), IPv6 in brackets")


def addresses(default_port: int) -> Kind:
    """A list of host:port, or one text with commas; as tuple of Address."""
    def parse(value: Any) -> tuple[Address, ...]:
        items = value.split(",") if isinstance(value, str) else value
        if not isinstance(items, list) or not items:
            raise Wrong(f"is {type_name(value)}, not a list" if not isinstance(items, list) else "is empty")
        out = []
        for item in items:
            hosts, port = split(item.strip() if isinstance(item, str) else item, default_port)
            if len(hosts) != 1 or hosts[0] in _ANY:
                raise Wrong(f"has {shown(item)}, which is no single host")
            out.append(Address(hosts[0], port))
        return tuple(out)
    return Kind(parse, f'a list of host:port (port {default_port} if not given), as ["10.0.0.1:{default_port}"]', shape="list")


def networks() -> Kind:
    """Who may: addresses, networks (CIDR) and host names, as tuple. A mistyped network is no name that is looked up, in vain, for ever."""
    def parse(value: Any) -> tuple[str, ...]:
        found: tuple[str, ...] = texts().parse(value)
        for item in found:
            try:
                ipaddress.ip_network(item, strict=False)
            except ValueError:
                if not _is_name(item) or re.fullmatch(r"[0-9.]+", item):
                    raise Wrong(f"has {shown(item)}, which is no address, network or host name") from None
        return found
    return Kind(parse, "a list of addresses, networks (CIDR) and host names", shape="list")


def url(*schemes: str, default_port: int) -> Kind:
    """scheme://host[:port]; as "scheme://host:port". Credentials in it are refused: they have keys of their own."""
    def parse(value: Any) -> str:
        if not isinstance(value, str):
            raise Wrong(f"is {type_name(value)}, not text")
        try:
            parts = urlsplit(value)
            port = parts.port or default_port
        except ValueError:
            raise Wrong("is no URL") from None
        if parts.username is not None or parts.password is not None:
            raise Wrong("has credentials in it; they belong into username and password")
        if parts.scheme not in schemes or not parts.hostname or parts.path.strip("/") or parts.query:
            raise Wrong(f"is {shown(value)}")
        return f"{parts.scheme}://{bracketed(parts.hostname)}:{port}"
    return Kind(parse, " or ".join(f"{s}://host:port" for s in schemes))
