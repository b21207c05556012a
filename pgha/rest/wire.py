"""What goes over the wire: requests and responses as values, their bytes, and the shape of an exact health request."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any, NamedTuple
from urllib.parse import parse_qsl, unquote

from msgspec import Struct

JSON = "application/json"
TEXT = "text/html"       # the reference sends its short texts under this type
METRICS = "text/plain"
PLAIN = "text/plain; charset=utf-8"

#: A whole request head without oddities: token names, one line each, CRLF. Linear: no two parts can match the same byte.
_EXACT = re.compile(
    rb"((?:GET|HEAD|OPTIONS) /[!-~]{0,255}) HTTP/1\.([01])\r\n"
    rb"((?:[!#$%&'*+.^_`|~0-9A-Za-z-]+:[\t !-~\x80-\xff]*\r\n){0,64})\r\n",
)
#: Headers that announce a body, another protocol or a wish for the connection: not for the short way unless understood.
_SPECIAL = re.compile(rb"^(content-length|transfer-encoding|upgrade|expect|connection):[ \t]*([^\r\n]*?)[ \t]*\r$", re.MULTILINE)
#: what may not stand in a header's value
_CONTROL = re.compile(r"[^ -~]")


class Request(Struct, frozen=True, kw_only=True):
    """One request. `path` is decoded, `query` has the first value of each parameter, header names are lower-case."""

    method: str
    path: str
    query: dict[str, str] = {}
    headers: dict[str, str] = {}
    body: bytes = b""
    peer: str = ""               # the client's address
    client_cert: bool = False    # it presented a certificate that was verified


class Response(Struct, frozen=True, kw_only=True):
    """`tail`: what follows `body`, so that a long body may be one object for all who are given it."""

    status: int
    body: bytes = b""
    tail: bytes = b""
    content_type: str = TEXT
    headers: tuple[tuple[str, str], ...] = ()

    @property
    def content(self) -> bytes:
        return self.body + self.tail


class ExactRequest(NamedTuple):
    """`key`: method and target (b"GET /primary"). `length`: of the head in bytes."""

    key: bytes
    keep_alive: bool
    length: int


def exact_request(data: bytes) -> ExactRequest | None:
    """The bodiless GET, HEAD or OPTIONS at the start of `data`, or None if it needs a real parser (or more bytes)."""
    match = _EXACT.match(data)
    if match is None:
        return None
    keep_alive = match[2] == b"1"
    for name, value in _SPECIAL.findall(match[3].lower()):
        if name == b"connection":
            if value == b"close":
                keep_alive = False
            elif value != b"keep-alive":
                return None
        elif name != b"content-length" or value != b"0":
            return None
    return ExactRequest(match[1], keep_alive, match.end())


def split_target(target: str) -> tuple[str, dict[str, str]]:
    """'/replica?lag=1MB&x=' → ('/replica', {'lag': '1MB', 'x': ''}). A fragment or host part is ignored."""
    raw, _, query = target.partition("#")[0].partition("?")
    if not raw.startswith("/"):
        raw = "/" + raw.partition("://")[2].partition("/")[2]
    found: dict[str, str] = {}
    for name, value in parse_qsl(query, keep_blank_values=True, max_num_fields=64):
        found.setdefault(name, value)
    return unquote(raw), found


def json_response(value: Any, status: int = 200) -> Response:
    """`value`: bytes that are JSON already, or plain values."""
    return Response(status=status, body=dump_json(value), content_type=JSON)


def dump_json(value: Any) -> bytes:
    """As the reference dumps it: with spaces, times as text."""
    return json.dumps(value, default=str).encode()


def text_response(status: int, text: str) -> Response:
    """A text of fixed words, or of names that the cluster has. What quotes the request: `quoting_response`."""
    return Response(status=status, body=text.encode())


def quoting_response(status: int, text: str) -> Response:
    """A text of our own that quotes the request: whoever makes somebody's browser ask must not have it read markup there."""
    return Response(status=status, body=text.encode(), content_type=PLAIN, headers=(("X-Content-Type-Options", "nosniff"),))


def reason(status: int) -> str:
    try:
        return HTTPStatus(status).phrase
    except ValueError:
        return "Unknown"


def head_bytes(response: Response, common: Mapping[str, str], *, keep_alive: bool) -> bytes:
    """Status line and headers. `common`: headers of every answer of this server (Server, configured extras)."""
    lines = [f"HTTP/1.1 {response.status} {reason(response.status)}"]
    lines += [f"{name}: {value}" for name, value in common.items()]
    # A value may quote the request: nothing in it may start a line of its own.
    lines += [f"{name}: {_CONTROL.sub(' ', value)[:300]}" for name, value in response.headers]
    if response.body or response.tail:
        lines.append(f"Content-Type: {response.content_type}")
    lines.append(f"Content-Length: {len(response.body) + len(response.tail)}")
    if not keep_alive:
        lines.append("Connection: close")
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1", "replace")
