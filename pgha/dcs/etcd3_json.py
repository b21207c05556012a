"""How does etcd's gRPC-gateway say things? Its JSON as Structs, and what each of its errors means for the caller.

Facts (measured on 3.4.23 and 3.5.16): keys and values are base64, 64-bit integers are strings, and a field that is
zero or false is left out. Errors come as {"error": text, "message", "code"} (3.4), {"code", "message"} (3.5) or,
from streaming calls and then also with status 200, as {"error": {"grpc_code" or "code", "message"}}.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from enum import Enum
from typing import Annotated, Any, Generic, NamedTuple, TypeVar

import msgspec
from msgspec import Meta, Struct, field

from pgha.dcs import Change, Compare, Delete, Entry, Put

#: Every number of etcd's that counts something. What does not fit is nobody's: it would be stored, compared and sent on.
Count = Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]
#: The store's own words, as far as they are repeated in errors and logs.
WORDS_CHARACTERS = 300


class Header(Struct, frozen=True, kw_only=True):
    """What every answer says of the member that gave it. An inner answer of a transaction has only the revision."""

    cluster_id: Annotated[str, Meta(max_length=64)] = ""
    revision: Count = 0
    raft_term: Count = 0


class KeyValue(Struct, frozen=True, kw_only=True):
    key: bytes = b""
    value: bytes = b""
    mod_revision: Count = 0
    lease: int = 0


class RangeAnswer(Struct, frozen=True, kw_only=True):
    header: Header = Header()
    kvs: list[KeyValue] = []


class OperationAnswer(Struct, frozen=True, kw_only=True):
    """One operation's part of a transaction's answer; only ranges are of interest."""

    response_range: RangeAnswer | None = None


class TransactionAnswer(Struct, frozen=True, kw_only=True):
    header: Header
    succeeded: bool = False
    responses: list[OperationAnswer] = []


class GrantAnswer(Struct, frozen=True, kw_only=True):
    header: Header
    id: int = field(name="ID", default=0)
    ttl_s: Count = field(name="TTL", default=0)
    error: str = ""


class PlainAnswer(Struct, frozen=True, kw_only=True):
    """An answer of which only the fact counts (revoke, compaction)."""

    header: Header


class KeepAlive(Struct, frozen=True, kw_only=True):
    """`ttl_s` 0: the store does not know the lease."""

    header: Header = Header()
    ttl_s: Annotated[int, Meta(ge=-(1 << 63), le=(1 << 63) - 1)] = field(name="TTL", default=0)


class KeepAliveAnswer(Struct, frozen=True, kw_only=True):
    result: KeepAlive

    @property
    def header(self) -> Header:
        return self.result.header


class StatusAnswer(Struct, frozen=True, kw_only=True):
    """One member of itself. `dbSize` is what the quota counts (free pages included), `dbSizeQuota` is new in 3.6."""

    header: Header
    version: str = ""
    db_size: Count = field(name="dbSize", default=0)
    db_size_quota: Count = field(name="dbSizeQuota", default=0)
    errors: list[str] = []


class Alarm(Struct, frozen=True, kw_only=True):
    alarm: str = ""


class AlarmAnswer(Struct, frozen=True, kw_only=True):
    header: Header = Header()  # the list of alarms comes without one
    alarms: list[Alarm] = []


class TokenAnswer(Struct, frozen=True, kw_only=True):
    """It goes into a header as it is; one that could not would be remembered, and fail every later request."""

    token: Annotated[str, Meta(pattern=r"^[!-~]{0,8192}$")]


class Event(Struct, frozen=True, kw_only=True):
    type: str = "PUT"
    kv: KeyValue


class WatchAnswer(Struct, frozen=True, kw_only=True):
    header: Header = Header()
    created: bool = False
    canceled: bool = False
    compact_revision: Count = 0
    cancel_reason: str = ""
    events: list[Event] = []


class StreamError(Struct, frozen=True, kw_only=True):
    grpc_code: int = 0
    code: int = 0
    message: str = ""


class WatchLine(Struct, frozen=True, kw_only=True):
    result: WatchAnswer | None = None
    error: StreamError | None = None


class _ErrorBody(Struct, frozen=True, kw_only=True):
    error: str | StreamError | None = None
    message: str = ""
    code: int = 0


class Meaning(Enum):
    """What may be done about an error."""

    NEXT = "try the next endpoint"
    LOGIN = "log in, then once more"
    FORBIDDEN = "the user may not do this (a watch says so, too, when its token has lapsed)"
    LOGIN_OFF = "the store has authentication switched off"
    LEASE_LOST = "the lease is unknown"
    COMPACTED = "that history is gone"
    NO_SPACE = "the store is full"
    REFUSED = "answered, will not do it"


class Fault(NamedTuple):
    """An error answer. `code` is gRPC's (0: none was said), `message` the store's own words."""

    meaning: Meaning
    code: int
    message: str


#: gRPC: cancelled, deadline exceeded, aborted, unavailable. Says nothing about whether a write happened.
_CODES_NEXT = frozenset({1, 4, 10, 14})
#: gateways and proxies that answered in etcd's place
_STATUS_NEXT = frozenset({408, 429, 502, 503, 504})
#: first match wins; texts are etcd's (api/v3rpc/rpctypes), matched in lower case
_TEXTS: tuple[tuple[str, Meaning], ...] = (
    ("database space exceeded", Meaning.NO_SPACE),
    ("no space", Meaning.NO_SPACE),
    ("no leader", Meaning.NEXT),
    ("request timed out", Meaning.NEXT),
    ("leader changed", Meaning.NEXT),
    ("leader failed", Meaning.NEXT),
    ("not a primary lessor", Meaning.NEXT),
    ("not leader", Meaning.NEXT),
    ("too many requests", Meaning.NEXT),
    ("server stopped", Meaning.NEXT),
    ("invalid auth token", Meaning.LOGIN),
    ("auth store is old", Meaning.LOGIN),
    ("user name is empty", Meaning.LOGIN),
    ("permission denied", Meaning.FORBIDDEN),
    ("authentication is not enabled", Meaning.LOGIN_OFF),
    ("lease not found", Meaning.LEASE_LOST),
    ("revision has been compacted", Meaning.COMPACTED),
)


def meaning_of(code: int, message: str, status: int = 200) -> Meaning:
    """What an error with this gRPC code, text and HTTP status means."""
    lower = message.lower()
    for text, meaning in _TEXTS:
        if text in lower:
            return meaning
    if code in _CODES_NEXT or (code == 0 and status in _STATUS_NEXT):
        return Meaning.NEXT
    if code == 16 or (code == 0 and status == 401):
        return Meaning.LOGIN
    if code == 7 or (code == 0 and status == 403):
        return Meaning.FORBIDDEN
    return Meaning.REFUSED


def fault_in(status: int, body: bytes) -> Fault | None:
    """The error that an HTTP answer carries; None if it carries none."""
    if status == 200 and not body.startswith(b'{"error"'):
        return None
    try:
        said = _errors.decode(body)
    except NotUnderstood:
        if status == 404:  # the gateway itself is not there
            return Fault(Meaning.REFUSED, 0, "no /v3 here: etcd 3.4 or newer with its gRPC gateway is needed")
        # Plain text: a proxy's, or etcd's own before the request reaches its gateway. It explains, it classifies nothing.
        words = " ".join(body[:WORDS_CHARACTERS].decode("utf-8", "replace").split())
        return Fault(meaning_of(0, "", status), 0, f"HTTP status {status}: {words}"[:WORDS_CHARACTERS] if words else f"HTTP status {status} without an explanation")
    if isinstance(said.error, StreamError):
        code, message = said.error.grpc_code or said.error.code, said.error.message
    else:
        code, message = said.code, said.message or said.error or f"HTTP status {status}"
    return fault(code, message, status)


def fault(code: int, message: str, status: int = 200) -> Fault:
    """The fault with this gRPC code and text; of a text without end the beginning."""
    words = message if len(message) <= WORDS_CHARACTERS else message[:WORDS_CHARACTERS] + "…"
    return Fault(meaning_of(code, words, status), code, words)


class NotUnderstood(Exception):
    """These bytes are no answer of etcd's; the text says why, in a few words."""


_K = TypeVar("_K")


class Decoder(Generic[_K]):
    """Bytes → `kind`, whatever they are: NotUnderstood and nothing else. Integers may be strings."""

    def __init__(self, kind: type[_K]) -> None:
        self._decoder = msgspec.json.Decoder(kind, strict=False)

    def decode(self, body: bytes) -> _K:
        try:
            return self._decoder.decode(body)
        except (ValueError, RecursionError) as error:   # msgspec's own errors, text that is no text, brackets without end
            raise NotUnderstood(f"not etcd's JSON: {str(error)[:WORDS_CHARACTERS]}") from error


_errors: Decoder[_ErrorBody] = Decoder(_ErrorBody)
encode = msgspec.json.Encoder().encode  # bytes become base64


def range_end(prefix: bytes) -> bytes:
    """The first key after all that start with `prefix`; a zero byte means "to the very end"."""
    trimmed = prefix.rstrip(b"\xff")
    return trimmed[:-1] + bytes([trimmed[-1] + 1]) if trimmed else b"\0"


def compare_parts(compare: Compare) -> list[dict[str, Any]]:
    """etcd takes an absent key as revision 0, and as unequal to every value."""
    common: dict[str, Any] = {"key": compare.key.encode(), "result": "EQUAL"}
    parts = []
    if compare.revision is not None:
        parts.append({**common, "target": "MOD", "mod_revision": str(compare.revision)})
    if compare.value is not None:
        parts.append({**common, "target": "VALUE", "value": compare.value})
    return parts


def operation(put: Put | Delete) -> dict[str, Any]:
    if isinstance(put, Delete):
        return {"requestDeleteRange": {"key": put.key.encode()}}
    return {"requestPut": {"key": put.key.encode(), "value": put.value, "lease": str(put.lease)}}


def entries(kvs: Sequence[KeyValue]) -> dict[str, Entry]:
    return {entry.key: entry for entry in map(_entry, kvs)}


def _entry(kv: KeyValue) -> Entry:
    return Entry(key=_text(kv.key), value=kv.value, revision=kv.mod_revision, lease=kv.lease)


def _text(key: bytes) -> str:
    return key.decode(errors="replace")  # a key that is not UTF-8 is nobody's of ours


def changes(events: Sequence[Event]) -> list[Change]:
    """One for each revision, in order."""
    return [
        Change(revision=revision, entries={
            _text(event.kv.key): None if event.type == "DELETE" else _entry(event.kv) for event in group})
        for revision, group in itertools.groupby(events, key=lambda event: event.kv.mod_revision)
    ]
