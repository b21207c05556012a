"""One HTTP request, with a deadline for each step, and whether it can have arrived when it fails."""

from __future__ import annotations

import http.client
import socket
import ssl
from collections.abc import Mapping
from typing import NamedTuple
from urllib.parse import urlsplit

from pgha.ctl.ends import USAGE, End


class Answer(NamedTuple):
    status: int
    body: bytes


class NoAnswer(Exception):  # noqa: N818  (a fact about the other side)
    """`sent` False: the request certainly did not arrive."""

    def __init__(self, url: str, why: str, *, sent: bool) -> None:
        super().__init__(f"{url}: {why}")
        self.sent = sent


def request(method: str, url: str, *, body: bytes | None = None, headers: Mapping[str, str] | None = None, timeout_s: float,
            connect_s: float = 2.0, tls: ssl.SSLContext | None = None) -> Answer:
    """Send one request. `timeout_s`: how long to wait for the answer. NoAnswer if there is none."""
    parts = urlsplit(url)
    shown = f"{parts.scheme}://{parts.netloc}"
    try:
        host, port = parts.hostname or "", parts.port
    except ValueError:
        raise NoAnswer(shown, "is not an address", sent=False) from None
    connection: http.client.HTTPConnection
    if parts.scheme == "https":
        connection = http.client.HTTPSConnection(host, port, timeout=connect_s, context=tls)
    else:
        connection = http.client.HTTPConnection(host, port, timeout=connect_s)
    try:
        try:
            connection.connect()
        except OSError as error:
            raise NoAnswer(shown, _why(error), sent=False) from None
        sock: socket.socket = connection.sock
        sock.settimeout(timeout_s)
        try:
            connection.request(method, parts.path + (f"?{parts.query}" if parts.query else ""), body=body, headers=dict(headers or {}))
            response = connection.getresponse()
            return Answer(response.status, response.read())
        except (OSError, http.client.HTTPException) as error:
            raise NoAnswer(shown, _why(error), sent=True) from None
    finally:
        connection.close()


def tls_context(*, cacert: str = "", cert: str = "", key: str = "", key_password: str = "", insecure: bool = False) -> ssl.SSLContext:
    """A client's context. End(USAGE) names a file that does not work."""
    try:
        context = ssl.create_default_context(cafile=cacert or None)
        if cert:
            context.load_cert_chain(cert, key or None, password=key_password)
    except OSError as error:
        raise End(USAGE, f"TLS: cannot use {', '.join(f for f in (cacert, cert, key) if f)}: {error.strerror or error}") from None
    if insecure:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


def _why(error: Exception) -> str:
    if isinstance(error, TimeoutError):
        return "no answer in time"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) or type(error).__name__
