"""One HTTP request, with a deadline for each step, and whether it can have arrived when it fails.

HTTP/1.0: one answer, the end of the connection is its end. Written by hand because the standard library's client takes
30 ms to load, a third of what `ctl list` may take; TLS is loaded where it is used.
"""

from __future__ import annotations

import re
import socket
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

from pgha.ctl.ends import USAGE, End

if TYPE_CHECKING:
    import ssl

#: no answer that ctl asks for is longer
LONGEST_ANSWER_BYTES = 64 << 20

_URL = re.compile(r"(https?)://(?:[^@/?#]*@)?(\[[^\]/\s]+\]|[^:/?#\s]+)(?::(\d{1,5}))?(/[^#\s]*)?")


class Answer(NamedTuple):
    status: int
    body: bytes


class NoAnswer(Exception):
    """`sent` False: the request certainly did not arrive."""

    def __init__(self, url: str, why: str, *, sent: bool) -> None:
        super().__init__(f"{url}: {why}")
        self.sent = sent


def request(method: str, url: str, *, body: bytes | None = None, headers: Mapping[str, str] | None = None, timeout_s: float,
            connect_s: float = 2.0, tls: ssl.SSLContext | None = None) -> Answer:
    """Send one request. `timeout_s`: for the whole answer, once connected. NoAnswer if there is none."""
    match = _URL.fullmatch(url)
    if match is None:
        raise NoAnswer(url, "is not an address", sent=False)
    scheme, host, port, path = match[1], match[2].strip("[]"), int(match[3] or (443 if match[1] == "https" else 80)), match[4] or "/"
    shown = f"{scheme}://{match[2]}:{port}"
    lines = [f"{method} {path} HTTP/1.0", f"Host: {match[2]}:{port}", *(f"{k}: {v}" for k, v in (headers or {}).items())]
    if body is not None or method != "GET":
        lines.append(f"Content-Length: {len(body or b'')}")
    try:
        data = ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1") + (body or b"")
    except UnicodeEncodeError:      # addresses come from the store, where anybody may have written them
        raise NoAnswer(url, "is not an address", sent=False) from None
    try:
        sock = socket.create_connection((host, port), timeout=connect_s)
    except (OSError, UnicodeError) as error:
        raise NoAnswer(shown, _why(error), sent=False) from None
    with sock:
        try:
            if scheme == "https":
                assert tls is not None
                sock = tls.wrap_socket(sock, server_hostname=host)
        except OSError as error:
            raise NoAnswer(shown, _why(error), sent=False) from None
        with sock:
            try:
                answer = _exchange(sock, data, time.monotonic() + timeout_s)
            except OSError as error:
                raise NoAnswer(shown, _why(error), sent=True) from None
    parsed = _parsed(answer)
    if parsed is None:
        raise NoAnswer(shown, "the answer is not whole, or not HTTP" if answer else "hung up without an answer", sent=True)
    return parsed


def _exchange(sock: socket.socket, data: bytes, until_s: float) -> bytes:
    sock.settimeout(max(0.01, until_s - time.monotonic()))
    sock.sendall(data)
    chunks: list[bytes] = []
    size = 0
    while size < LONGEST_ANSWER_BYTES:
        left_s = until_s - time.monotonic()
        if left_s <= 0:
            raise TimeoutError      # also when bytes go on dripping in
        sock.settimeout(left_s)
        chunk = sock.recv(1 << 18)
        if not chunk:
            break
        chunks.append(chunk)
        size += len(chunk)
    return b"".join(chunks)


def _parsed(answer: bytes) -> Answer | None:
    """None if it is not a whole answer."""
    head, _, body = answer.partition(b"\r\n\r\n")
    status = re.match(rb"HTTP/1\.[01] (\d{3})\b", head)
    length = re.search(rb"\r\ncontent-length:[ \t]*(\d{1,12})[ \t]*(?:\r|$)", head, re.IGNORECASE)
    if status is None or (length is not None and len(body) < int(length[1])):
        return None
    return Answer(int(status[1]), body)


def tls_context(*, cacert: str = "", cert: str = "", key: str = "", key_password: str = "", insecure: bool = False) -> ssl.SSLContext:
    """A client's context. End(USAGE) names a file that does not work."""
    import ssl

    try:
        context = ssl.create_default_context(cafile=cacert or None)
        if cert:
            context.load_cert_chain(cert, key or None, password=key_password)
    except (OSError, ValueError) as error:      # ValueError: a password that is too long for OpenSSL
        raise End(USAGE, f"TLS: cannot use {', '.join(f for f in (cacert, cert, key) if f)}: {getattr(error, 'strerror', '') or error}") from None
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
