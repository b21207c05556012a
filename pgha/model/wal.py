"""Positions in the write-ahead log: LSNs as integers, timelines, and histories of timelines."""

from __future__ import annotations

import re

from msgspec import Struct

_HALF = re.compile(r"[0-9A-Fa-f]{1,8}", re.ASCII)
_TIMELINE = re.compile(r"[0-9]{1,10}", re.ASCII)


def format_lsn(lsn: int) -> str:
    """12345678 → '0/BC614E', PostgreSQL's own text form (chapter 8.20, pg_lsn)."""
    return f"{lsn >> 32:X}/{lsn & 0xFFFFFFFF:X}"


def parse_lsn(text: str) -> int:
    """'0/BC614E' → 12345678. ValueError if it is not an LSN."""
    high, _, low = text.strip().partition("/")
    if not _HALF.fullmatch(high) or not _HALF.fullmatch(low):       # int() alone would take signs, blanks and underscores
        raise ValueError(f"not an LSN: {text[:40]!r}")
    return (int(high, 16) << 32) + int(low, 16)


class Position(Struct, frozen=True, kw_only=True, order=False):
    """A place in the WAL: the LSN means something only together with its timeline."""

    timeline: int
    lsn: int

    def __str__(self) -> str:
        return f"{format_lsn(self.lsn)} on timeline {self.timeline}"


class HistoryRow(Struct, frozen=True, kw_only=True):
    """One ended timeline: it was left at `switch_lsn` for the next row's timeline (or the history's own)."""

    timeline: int
    switch_lsn: int
    reason: str = ""


def parse_history_file(text: str) -> tuple[HistoryRow, ...]:
    """Rows of a `<timeline>.history` file (chapter 26.3.6). Comment lines and empty lines are skipped.

    ValueError names the line that is not a row.
    """
    rows = []
    for line in text.splitlines():
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        parts = line.split("\t", 2) if "\t" in line else line.split(None, 2)
        if len(parts) < 2:
            raise ValueError(f"not a timeline history row: {line[:80]!r}")
        if not _TIMELINE.fullmatch(parts[0].strip()) or not 0 < int(parts[0]) < 1 << 32:
            raise ValueError(f"not a timeline: {parts[0][:40]!r}")
        rows.append(HistoryRow(timeline=int(parts[0]), switch_lsn=parse_lsn(parts[1]), reason=parts[2].strip() if len(parts) > 2 else ""))
    return tuple(rows)


def is_ancestor(position: Position, *, timeline: int, history: tuple[HistoryRow, ...]) -> bool:
    """Does a server on `timeline`, whose history is `history`, contain everything up to `position`?

    True on the same timeline; on an older one only if the position is not past the point where it was left.
    """
    if position.timeline == timeline:
        return True
    return any(row.timeline == position.timeline and position.lsn <= row.switch_lsn for row in history)
