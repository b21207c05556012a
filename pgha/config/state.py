"""What must outlive an agent: who this node is, and the few facts that keep it from believing a store that lost its own.

    <state directory>/node_id       made once (safety model 2); never in the data directory, since a clone would copy it
    <state directory>/memory.json   ttl last seen, the store's generation, members and their positions (safety model 4, 6)

Writes are atomic and fsynced: temporary file, fsync, rename, fsync of the directory. They may block on the disk, so they
are never called from the renewer, and rarely by anybody (every 10 s at most).
"""

from __future__ import annotations

import math
import os
import re
import uuid
from pathlib import Path

import msgspec
from msgspec import Struct

from pgha.errors import ConfigError
from pgha.model.cluster import Outsider, PausedHolder, Sync
from pgha.model.wal import HistoryRow

#: A few hundred bytes a member.
LARGEST_MEMORY_BYTES = 4 << 20
#: The longest ttl that a lock record may have.
LONGEST_TTL_S = 86400.0
_LARGEST = 1 << 63


class StoreGeneration(Struct, frozen=True, kw_only=True):
    """Which store was seen, and the highest revision that it told."""

    cluster_id: str = ""
    revision: int = 0


class RememberedMember(Struct, frozen=True, kw_only=True):
    """A member as last seen: `seen_at_wall_s` in seconds since the epoch, for member_slots_ttl."""

    api_url: str = ""
    seen_at_wall_s: float = 0.0
    timeline: int = 0
    lsn: int = 0


class Remembered(Struct, frozen=True, kw_only=True):
    """The facts of memory.json. `ttl_s`: the largest ttl seen in a lock record; 0 = none was seen. `sync`: what /sync said
    when it was last to be believed; `sync_restored`: the key's revision (0: absent) at which a store that went back showed
    it, None: it has been written since, or the store never went back."""

    ttl_s: float = 0.0
    paused: PausedHolder | None = None
    sync: Sync = Sync()
    sync_restored: int | None = None
    outsider: Outsider | None = None
    system_identifier: str = ""
    generation: StoreGeneration = StoreGeneration()
    members: dict[str, RememberedMember] = {}
    slots: dict[str, float] = {}    # that a leader's status names: when their members were last seen, else when the slot was first
    history: tuple[HistoryRow, ...] = ()


def write_atomically(path: Path, content: bytes) -> None:
    """`path` has either its old content or `content`, also after a power failure. OSError if it could not be written."""
    temporary = path.with_name(f".{path.name}.new")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        left = memoryview(content)
        while left:
            left = left[os.write(descriptor, left):]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    temporary.replace(path)
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def node_id(directory: Path) -> str:
    """This node's identity: 32 hexadecimal digits, made at the first call. ConfigError if the file is not ours to trust."""
    path = directory / "node_id"
    try:
        text = path.read_text(encoding="ascii").strip()
    except FileNotFoundError:
        text = uuid.uuid4().hex
        try:
            write_atomically(path, text.encode() + b"\n")
        except OSError as error:
            raise ConfigError(f"{path}: cannot be written ({error.strerror}); allowed: a state directory that this user may write") from None
        return text
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "not text"
        raise ConfigError(f"{path}: cannot be read ({why}); allowed: the file as pgha wrote it") from None
    if not re.fullmatch(r"[0-9a-f]{32}", text):
        raise ConfigError(f"{path}: is no node id; allowed: 32 hexadecimal digits; if it is damaged, remove it, and a new identity is made")
    return text


def load_remembered(directory: Path) -> tuple[Remembered, str]:
    """The facts, and what is wrong with the file ("" if nothing). A damaged or missing file means: nothing is remembered.

    Forgetting is safe: the wait for an absent record then has its floor of 30 s and the configured ttl.
    """
    path = directory / "memory.json"
    try:
        with path.open("rb") as file:
            text = file.read(LARGEST_MEMORY_BYTES + 1)
        if len(text) > LARGEST_MEMORY_BYTES:
            return Remembered(), f"{path}: is damaged (longer than {LARGEST_MEMORY_BYTES} bytes); nothing is remembered"
        facts = msgspec.json.decode(text, type=Remembered)
    except FileNotFoundError:
        return Remembered(), ""
    except OSError as error:
        return Remembered(), f"{path}: cannot be read ({error.strerror}); nothing is remembered"
    except (ValueError, RecursionError) as error:   # msgspec's own errors, text that is no text, brackets without end
        return Remembered(), f"{path}: is damaged ({error}); nothing is remembered"
    wrong = _makes_no_sense(facts)
    return (Remembered(), f"{path}: is damaged ({wrong}); nothing is remembered") if wrong else (facts, "")


def _makes_no_sense(facts: Remembered) -> str:
    """What cannot have been written by pgha; deadlines and comparisons are made of these numbers."""
    if not 0 <= facts.ttl_s <= LONGEST_TTL_S:
        return "ttl_s"
    if not 0 <= facts.generation.revision < _LARGEST:
        return "generation"
    if not all(math.isfinite(m.seen_at_wall_s) and 0 <= m.lsn < _LARGEST and 0 <= m.timeline < 1 << 32 for m in facts.members.values()):
        return "members"
    if not all(map(math.isfinite, facts.slots.values())):
        return "slots"
    if facts.outsider is not None and not 0 < facts.outsider.port < 1 << 16:
        return "outsider"
    if not 0 <= facts.sync.quorum < _LARGEST:
        return "sync"
    return "" if all(0 <= row.switch_lsn < 1 << 64 and 0 <= row.timeline < 1 << 32 for row in facts.history) else "history"


def save_remembered(directory: Path, facts: Remembered) -> None:
    """Write the facts. OSError if the disk would not take them."""
    write_atomically(directory / "memory.json", msgspec.json.encode(facts))
