"""Wire JSON: which keys there are below `/<namespace>/<scope>/`, and how each is read and written.

Reading never fails: a value that does not parse is named in `ClusterView.problems` and counts as absent where that is
safe. An unreadable lock record is *not* absent: it is foreign, and held until it changes or expires by the longest ttl.
Unknown fields are kept in `raw`, so that what is written back still holds them.

Values are parsed beside the renewer and at every change, so what is too large or too deeply nested to be one of ours is
not parsed at all, and numbers that are out of range for what they count make a value unreadable.
"""

from __future__ import annotations

import json
import math
import re
from functools import lru_cache
from typing import Any
from urllib.parse import urlsplit

import msgspec
from msgspec.structs import replace

from pgha.dcs import Entry, Snapshot
from pgha.model.cluster import (
    ClusterView,
    FailoverKey,
    HistoryEntry,
    Member,
    Status,
    Sync,
    Tags,
    is_slot_name,
)
from pgha.model.lock import Epoch, LockRecord
from pgha.model.wal import LONGEST_CLAIM

LOCK = "pgha/lock"
EPOCH = "pgha/epoch"

#: No value of ours is longer; `/config` has what a REST body may have, a member key a few hundred bytes.
LARGEST_VALUE_BYTES = 1 << 20
LARGEST_MEMBER_BYTES = 64 << 10
LARGEST_TEXT_BYTES = 1 << 10
#: A value up to this size is parsed once and remembered: at every renewal the view is made anew, of the same values.
SMALL_BYTES = 4 << 10
#: Deeper than anything that means something here, and far from where comparing, copying or encoding it would exhaust the stack.
DEEPEST = 64
#: What may be counted: positions, epochs and sequences; a timeline has 32 bits.
_LARGEST = 1 << 63
_LARGEST_TIMELINE = (1 << 32) - 1
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")

_KNOWN = frozenset({"initialize", "config", "leader", LOCK, EPOCH, "status", "optime/leader", "failover", "sync", "history", "failsafe"})

#: Stands in for a lock record that does not parse: nobody's, and believed to be held for as long as any may be.
UNREADABLE_LOCK = LockRecord(holder="", node_id="", incarnation="", sequence=0, ttl_s=30.0)


class Keys:
    """Full paths of one cluster."""

    def __init__(self, namespace: str, scope: str) -> None:
        parts = [p for p in (*namespace.split("/"), *scope.split("/")) if p]
        self.root = "/" + "/".join(parts) + "/"

    def path(self, key: str) -> str:
        return self.root + key

    def member(self, name: str) -> str:
        return f"{self.root}members/{name}"

    def worth_keeping(self, entry: Entry) -> Entry | None:
        """What a view needs of `entry`: None of a key that nobody reads, and of a value without end its beginning (but of
        the lock all, since a take-over compares it)."""
        short = entry.key.removeprefix(self.root)
        if short not in _KNOWN and not short.startswith("members/"):
            return None
        limit = _limit_bytes(short)
        return entry if len(entry.value) <= limit or short == LOCK else replace(entry, value=entry.value[:limit + 1])


def _limit_bytes(short: str) -> int:
    return LARGEST_MEMBER_BYTES if short.startswith("members/") else LARGEST_VALUE_BYTES


def too_deep(value: Any) -> bool:
    """Is anything nested more than DEEPEST deep? Level by level, without recursion."""
    level = [value]
    for _ in range(DEEPEST + 1):
        level = [inner for outer in level if isinstance(outer, (dict, list))
                 for inner in (outer.values() if isinstance(outer, dict) else outer) if isinstance(inner, (dict, list))]
        if not level:
            return False
    return True


def loads(text: bytes | bytearray) -> Any:
    """The JSON that others wrote, as a value that can be compared, copied, logged and written again. ValueError says in a
    few words what is wrong. A number without end is null: there is no JSON for it, and it is no reason to forget the rest."""
    try:
        value = json.loads(text, parse_float=_finite, parse_constant=_finite)
        json.dumps(value, ensure_ascii=False).encode()      # half a character could be neither logged nor served
    except (ValueError, RecursionError):
        raise ValueError("is not JSON") from None
    if too_deep(value):
        raise ValueError(f"is nested more than {DEEPEST} deep")
    return value


#: Shared by all views that hold the value: nobody changes what it returns.
_loads_once = lru_cache(maxsize=64)(loads)


def _finite(text: str) -> float | None:
    number = float(text)
    return number if math.isfinite(number) else None


def encode(value: Any) -> bytes:
    """Compact JSON, as all keys have it."""
    if isinstance(value, msgspec.Struct):
        return msgspec.json.encode(value)
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode()


def parse(snapshot: Snapshot, keys: Keys) -> ClusterView:
    """One consistent view of all keys."""
    reader = _Reader({k.removeprefix(keys.root): e for k, e in snapshot.entries.items() if k.startswith(keys.root)})
    lock_entry = reader.entries.get(LOCK)
    leader = reader.entries.get("leader")
    members = {name.removeprefix("members/"): reader.known_member(name) for name in reader.entries if name.startswith("members/")}
    return ClusterView(
        revision=snapshot.revision,
        initialize=reader.text("initialize"),
        config=reader.object("config"),
        leader=reader.text("leader") or "",
        leader_lease=leader.lease if leader else 0,
        lock=reader.lock(),
        lock_revision=lock_entry.revision if lock_entry else 0,
        lock_value=lock_entry.value if lock_entry else b"",
        epoch=reader.epoch(),
        members=members,
        status=reader.status(),
        failover=reader.failover(),
        sync=reader.sync(),
        history=reader.history(),
        failsafe={k: v for k, v in (reader.object("failsafe") or {}).items() if isinstance(v, str)},
        revisions={k: e.revision for k, e in reader.entries.items()},
        leases={k: e.lease for k, e in reader.entries.items() if e.lease},
        problems=tuple(reader.problems),
    )


def parse_lock(value: bytes) -> LockRecord:
    """UNREADABLE_LOCK if it does not parse or makes no sense."""
    if len(value) > LARGEST_VALUE_BYTES:
        return UNREADABLE_LOCK
    try:
        record = msgspec.json.decode(value, type=LockRecord)
    except (msgspec.DecodeError, ValueError, RecursionError):
        return UNREADABLE_LOCK
    sensible = 0 < record.ttl_s <= 86400 and all(0 <= n < _LARGEST for n in (record.sequence, record.lsn)) and 0 <= record.timeline <= _LARGEST_TIMELINE
    return record if sensible else UNREADABLE_LOCK


def parse_epoch(value: bytes) -> Epoch | None:
    """None if it does not parse or makes no sense: what it says is counted on, and written back."""
    if len(value) > LARGEST_VALUE_BYTES:
        return None
    try:
        epoch = msgspec.json.decode(value, type=Epoch)
    except (msgspec.DecodeError, ValueError, RecursionError):
        return None
    sensible = 0 <= epoch.number < _LARGEST - 1 and all(0 <= n <= _LARGEST_TIMELINE for n in (epoch.timeline, *(n for n, _ in epoch.claims)))
    return epoch if sensible else None


class _Reader:
    """Parses entries by short key, collecting what it could not read."""

    def __init__(self, entries: dict[str, Entry]) -> None:
        self.entries = entries
        self.problems: list[str] = []

    def _problem(self, key: str, why: str) -> None:
        self.problems.append(f"{key}: {why}; {'what it said before counts, until a leader writes it again' if key == 'sync' else 'treated as absent'}")

    def text(self, key: str) -> str | None:
        """Never absent when it is there: an `initialize` that makes no sense is no invitation to bootstrap."""
        entry = self.entries.get(key)
        if entry is None:
            return None
        if len(entry.value) > LARGEST_TEXT_BYTES:
            self.problems.append(f"{key}: is longer than {LARGEST_TEXT_BYTES} bytes; its beginning counts")
        return entry.value[:LARGEST_TEXT_BYTES].decode(errors="replace")

    def json(self, key: str) -> Any:
        """The decoded value; None if the key is absent or is not JSON."""
        entry = self.entries.get(key)
        if entry is None or self._too_long(key, entry):
            return None
        try:
            return _loads_once(entry.value) if len(entry.value) <= SMALL_BYTES else loads(entry.value)
        except ValueError as error:
            self._problem(key, str(error))
            return None

    def _too_long(self, key: str, entry: Entry) -> bool:
        if len(entry.value) <= _limit_bytes(key):
            return False
        self._problem(key, f"is longer than {_limit_bytes(key)} bytes")
        return True

    def object(self, key: str) -> dict[str, Any] | None:
        value = self.json(key)
        if value is None or isinstance(value, dict):
            return value
        self._problem(key, "is not a JSON object")
        return None

    def lock(self) -> LockRecord | None:
        entry = self.entries.get(LOCK)
        if entry is None:
            return None
        record = parse_lock(entry.value)
        if record is UNREADABLE_LOCK:
            self.problems.append(f"{LOCK}: is no lock record; treated as held by somebody unknown until it expires")
        return record

    def epoch(self) -> Epoch:
        none = Epoch(number=0, holder="", incarnation="")
        entry = self.entries.get(EPOCH)
        if entry is None:
            return none
        epoch = parse_epoch(entry.value)
        if epoch is None:
            self._problem(EPOCH, "does not parse, or makes no sense")
        return epoch or none

    def known_member(self, key: str) -> Member:
        entry = self.entries[key]
        member, problems = _member(key, entry) if len(entry.value) <= SMALL_BYTES else _parse_member(key, entry)
        self.problems += problems
        return member

    def member(self, key: str) -> Member:
        entry = self.entries[key]
        name = key.removeprefix("members/")
        raw: dict[str, Any] = {}
        if entry.value.startswith(b"postgres") and len(entry.value) <= LARGEST_MEMBER_BYTES:      # the reference's form before JSON
            raw = {"conn_url": entry.value.decode(errors="replace").partition("?application_name=")[0]}
            raw["api_url"] = entry.value.decode(errors="replace").partition("?application_name=")[2]
        else:
            raw = self.object(key) or {}
        return member_from(name, raw, revision=entry.revision, lease=entry.lease)

    def status(self) -> Status:
        value = self.json("status")
        if value is None and "optime/leader" in self.entries:
            value = self.json("optime/leader")
        if _is_integer(value):
            return Status(optime=max(0, value))
        if not isinstance(value, dict):
            if value is not None:
                self._problem("status", "is neither an object nor a number")
            return Status()
        slots = value.get("slots")
        retain = value.get("retain_slots")
        return Status(
            optime=_integer(value.get("optime")),
            slots={k: v for k, v in slots.items() if _is_integer(v)} if isinstance(slots, dict) else {},
            retain_slots=tuple(x for x in retain if isinstance(x, str) and is_slot_name(x)) if isinstance(retain, list) else (),
            raw=value,
        )

    def failover(self) -> FailoverKey:
        entry = self.entries.get("failover")
        if entry is None or not entry.value:
            return FailoverKey()
        if len(entry.value) < 1024 and re.fullmatch(rb"[^\s{}\[\]\",]*:[^\s{}\[\]\",:]*", entry.value):      # the reference's form before JSON: leader:candidate
            leader, _, candidate = entry.value.decode(errors="replace").partition(":")
            return FailoverKey(leader=leader.strip(), candidate=candidate.strip())
        value = self.object("failover") or {}
        own = value.get("pgha")
        down = own.get("holder_is_down") if isinstance(own, dict) else None
        down = down if isinstance(down, dict) else {}
        return FailoverKey(leader=_string(value.get("leader")), candidate=_string(value.get("member")),
                           scheduled_at=_scheduled(value.get("scheduled_at")), down_incarnation=_string(down.get("incarnation")),
                           down_sequence=_integer(down.get("sequence")), raw=value)

    def sync(self) -> Sync:
        value = self.object("sync")
        if value is None:
            entry = self.entries.get("sync")
            return Sync(unreadable=entry is not None and entry.value.strip() not in (b"", b"null"))
        leader, standbys = value.get("leader"), _string(value.get("sync_standby"))
        if not _is_text(leader) or not _is_text(standbys):
            self._problem("sync", "leader and sync_standby are texts without control characters")
            return Sync(unreadable=True)
        leader = leader or ""
        names = tuple(n.strip() for n in standbys.split(",") if n.strip())
        return Sync(leader=leader, quorum=_integer(value.get("quorum")) if leader else 0, members=names if leader else (), raw=value)

    def history(self) -> tuple[HistoryEntry, ...] | None:
        value = self.json("history")
        if value is None:
            return None
        rows = []
        for row in value if isinstance(value, list) else [None]:
            if not isinstance(row, list) or len(row) < 2 or not all(_is_integer(x) for x in row[:2]):
                self._problem("history", "is not a list of [timeline, lsn, reason, timestamp, leader]")
                return None
            rest = [x if isinstance(x, str) else "" for x in (*row[2:5], "", "", "")]
            rows.append(HistoryEntry(timeline=row[0], lsn=row[1], reason=rest[0], timestamp=rest[1], leader=rest[2]))
        return tuple(rows)


def _parse_member(key: str, entry: Entry) -> tuple[Member, tuple[str, ...]]:
    reader = _Reader({key: entry})
    return reader.member(key), tuple(reader.problems)


#: Most changes are another key's: a member is parsed when it has changed.
_member = lru_cache(maxsize=64)(_parse_member)


def member_from(name: str, raw: dict[str, Any], *, revision: int = 0, lease: int = 0) -> Member:
    """A member from its JSON object, whoever wrote it."""
    host, port = _host_port(_string(raw.get("conn_url")))
    own = raw.get("pgha")
    tags = raw.get("tags")
    checkpoint = raw.get("checkpoint_after_promote")
    return Member(
        name=name, revision=revision, lease=lease, conn_url=_string(raw.get("conn_url")), api_url=_string(raw.get("api_url")),
        host=host, port=port, state=_string(raw.get("state")),
        role="primary" if raw.get("role") == "master" else _string(raw.get("role")), version=_string(raw.get("version")),
        tags=Tags.of(tags if isinstance(tags, dict) else {}),
        xlog_location=_integer(raw.get("xlog_location")), receive_lsn=_integer(raw.get("receive_lsn")),
        replay_lsn=_integer(raw.get("replay_lsn")), replication_state=_string(raw.get("replication_state")),
        timeline=_integer(raw.get("timeline")), pause=raw.get("pause") is True,
        checkpoint_after_promote=checkpoint if isinstance(checkpoint, bool) else None,
        node_id=_string(own.get("node_id")) if isinstance(own, dict) else "", is_pgha=isinstance(own, dict),
        claim=_claim(own.get("claim")) if isinstance(own, dict) else None, tells_claim=isinstance(own, dict) and "claim" in own, raw=raw,
    )


def encode_history(rows: tuple[HistoryEntry, ...]) -> bytes:
    """Rows of two to five items, trailing empty ones left out, as the reference writes them."""
    out = []
    for row in rows:
        item: list[Any] = [row.timeline, row.lsn, row.reason, row.timestamp, row.leader]
        while item and item[-1] == "":
            item.pop()
        out.append(item)
    return encode(out)


def _string(value: Any) -> str:
    return value if isinstance(value, str) else ""


def _scheduled(value: Any) -> str:
    """What is no text is no moment either, and must not turn a switchover for later into one for now."""
    return value if isinstance(value, str) else "" if value is None else json.dumps(value)[:60]


def _claim(value: Any) -> str | None:
    """As long as parse_history_file takes it."""
    return value[:LONGEST_CLAIM] if isinstance(value, str) else None


def _is_text(value: Any) -> bool:
    """A name, or none. PostgreSQL's configuration takes no NUL, and nobody's name has control characters."""
    return value is None or (isinstance(value, str) and _CONTROL.search(value) is None)


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and -_LARGEST < value < _LARGEST


def _integer(value: Any) -> int:
    if _is_integer(value):
        return max(0, int(value))
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 19:
        return int(value)
    return 0


def _host_port(conn_url: str) -> tuple[str, int]:
    try:
        parts = urlsplit(conn_url)
        if not _is_text(parts.hostname):
            return "", 5432
        return parts.hostname or "", parts.port or 5432
    except ValueError:
        return "", 5432
