"""What does the leader of a synchronous mode remember, and what may `/sync` say by now?

Rules of this file:
* a write to `/sync` that was sent counts as done and as not done until the key's revision has moved on (`SyncBook.sent`):
  its answer may be lost, and it may still arrive. The same holds for what a former agent of this epoch may have sent, so
  a restarted one first writes the key once (`opened`);
* a new setting counts only from a position (`SyncBook.mark`) that was read when every process surely obeyed it: a moment
  after it was seen, all walsenders show their places in it, and the checkpointer, which tells the backends whether
  anybody is to be waited for at all, is at rest.
"""

from __future__ import annotations

import json

from msgspec.structs import replace

from pgha.clock import candidate_age_s
from pgha.decide.common import view_of
from pgha.model.action import WriteKey
from pgha.model.cluster import Sync
from pgha.model.decision import Memory, SyncBook
from pgha.model.node import Row
from pgha.model.observation import Observation
from pgha.model.synchronous import PLACEHOLDER, Promise, Requirement, covers, format_requirement, parse_requirement

SYNC = "sync"
#: From when a new setting was first seen until a position is taken for its mark.
SETTLES_S = 0.3
#: What was sent and is not seen after this long is sent again.
AGAIN_S = 1.0


def is_on(o: Observation) -> bool:
    return o.settings.synchronous_mode != "off"


def leads_sync(o: Observation) -> bool:
    """By its own writing: what a store that went back shows is to be written anew, whomever it names."""
    return o.dcs.remembered_sync is None and view_of(o).sync.leader.lower() == o.me.name.lower()


def voters_of(sync: Sync) -> frozenset[str]:
    return frozenset(name.lower() for name in sync.members)


# --- promises -----------------------------------------------------------------------------------------------------------

def taken_over(o: Observation) -> Promise:
    """`/sync` as it stands, with this node for its leader: the old leader takes this one's place among the voters.

    The old leader has every commit, and of the others as many as before, so the quorum stays what it was.
    """
    sync, me = view_of(o).sync, o.me.name.lower()
    voters, leader = frozenset(name.lower() for name in sync.members), sync.leader.lower()
    if not leader or o.dcs.remembered_sync is not None:
        return Promise()        # it has everything by both words of the store; who else does, shows when they confirm
    if me in voters and leader != me:
        voters |= {leader}
    voters -= {me}
    return Promise(voters=voters, quorum=min(sync.quorum, len(voters)) if voters else 0)


def promises(o: Observation, book: SyncBook) -> tuple[Promise, ...]:
    """Everything that `/sync` may say by now, the view's own word first."""
    sent = book.sent if book.sent_on == view_of(o).revision_of(SYNC) else ()
    return tuple(dict.fromkeys((taken_over(o), *sent)))


def demanded(o: Observation, book: SyncBook) -> Requirement:
    """What a primary of this node must demand of its first commit, whatever of `promises` holds."""
    offered = promises(o, book)
    voters = frozenset(name for promise in offered for name in promise.voters)
    number = len(voters) - offered[0].quorum if len(offered) == 1 else len(voters)
    if not voters or number <= 0:
        strict = is_on(o) and o.settings.synchronous_mode_strict
        return Requirement(names=frozenset({PLACEHOLDER}), count=1) if strict else Requirement()
    wanted = Requirement(names=voters, count=number, by_priority=number == len(voters) and o.settings.synchronous_mode != "quorum")
    assert all(covers(promise, wanted) for promise in offered), (offered, wanted)
    return wanted


def primary_names(o: Observation, memory: Memory) -> str | None:
    """synchronous_standby_names for a start of this node's primary: what it has if that bears out what was promised,
    else what does. None: the operator's own."""
    book = book_of(o, memory)
    if not is_on(o) and not view_of(o).sync.leader:
        return None
    written = o.written_names
    if written.told and written.names and all(covers(promise, parse_requirement(written.names)) for promise in promises(o, book)):
        return written.names
    return text_of(o, demanded(o, book))


def opened(o: Observation, book: SyncBook) -> bool:
    """Can no write to `/sync` of a former agent of this epoch arrive any more?"""
    view = view_of(o)
    readopted = view.epoch.incarnation != o.me.incarnation
    return not readopted or not book.first_revision or view.revision_of(SYNC) != book.first_revision


# --- the book -----------------------------------------------------------------------------------------------------------

def book_of(o: Observation, memory: Memory) -> SyncBook:
    """The memory of this reign; what was sent is forgotten once the key has moved on."""
    book, revision = memory.sync, view_of(o).revision_of(SYNC)
    if book.epoch_revision != o.licence.epoch_revision or book.sent_on < 0:
        book = SyncBook(epoch_revision=o.licence.epoch_revision, first_revision=revision, sent_on=revision)
    if book.sent and book.sent_on != revision:
        book = replace(book, sent=(), sent_at=None)
    return _note_setting(o, book)


def _note_setting(o: Observation, book: SyncBook) -> SyncBook:
    row = o.postgres.row
    if row is None or (row.synchronous_standby_names == book.names and row.started_at_s == book.started_at_s):
        return book
    return replace(book, names=row.synchronous_standby_names, started_at_s=row.started_at_s, seen_at=o.postgres.row_at, mark=0)


def setting_age_s(o: Observation, book: SyncBook) -> float:
    return candidate_age_s(book.seen_at, o.postgres.row_at) if book.seen_at and o.postgres.row_at else 0.0


def write_sync(o: Observation, book: SyncBook, promise: Promise) -> tuple[WriteKey, SyncBook]:
    """The guarded write, and the book that knows of it."""
    view, revision = view_of(o), view_of(o).revision_of(SYNC)
    known = {k: v for k, v in view.sync.raw.items() if k not in ("leader", "quorum", "sync_standby")}
    names = ",".join(_spelled(o, promise.voters)) or None
    value = {"leader": o.me.name, "quorum": promise.quorum, "sync_standby": names, **known}
    before = book.sent if book.sent_on == revision else ()
    sent = before if promise in before else (*before, promise)
    action = WriteKey(key=SYNC, value=json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode(), if_revision=revision,
                      epoch_revision=o.licence.epoch_revision)
    return action, replace(book, sent=sent, sent_on=revision, sent_at=o.now)


def _spelled(o: Observation, names: frozenset[str]) -> list[str]:
    """The names as their owners write them."""
    view = view_of(o)
    spelling = {name.lower(): name for name in (*o.dcs.remembered_members, view.sync.leader, *view.sync.members, *view.members)}
    return sorted(spelling.get(name, name) for name in names)


def text_of(o: Observation, requirement: Requirement) -> str:
    return format_requirement(_spelled(o, requirement.names), requirement.count, by_priority=requirement.by_priority)


def may_send(o: Observation, book: SyncBook) -> bool:
    return not book.sent or book.sent_at is None or candidate_age_s(book.sent_at, o.now) >= AGAIN_S


def may_set(o: Observation, book: SyncBook) -> bool:
    return book.set_at is None or candidate_age_s(book.set_at, o.now) >= AGAIN_S


def flushed(row: Row) -> dict[str, int]:
    """Standbys that stream: name in lower case → what they have on disk. The least, should two have one name."""
    found: dict[str, int] = {}
    for line in row.replication:
        name, lsn = str(line.get("application_name") or "").lower(), line.get("flush_lsn")
        if name and line.get("state") == "streaming" and isinstance(lsn, int):
            found[name] = min(lsn, found.get(name, lsn))
    return found


def confirmed(row: Row, book: SyncBook) -> frozenset[str]:
    """Who has everything that was committed before the setting surely held."""
    return frozenset(name for name, lsn in flushed(row).items() if book.mark and lsn >= book.mark)


def note_mark(o: Observation, book: SyncBook, row: Row) -> SyncBook:
    if book.mark or setting_age_s(o, book) < SETTLES_S or not row.checkpointer_rests:
        return book
    wanted = parse_requirement(row.synchronous_standby_names)
    for line in row.replication:
        listed = wanted.anybody or str(line.get("application_name") or "").lower() in wanted.names
        if line.get("state") in ("streaming", "catchup") and bool(line.get("sync_priority")) != listed:
            return book      # this walsender still goes by another setting
    return replace(book, mark=max(1, row.lsn))
