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
    """One ended timeline: it was left at `switch_lsn` for the next row's timeline (or the history's own).

    `claim`: by which claim that next timeline was begun, "" if pgha did not promote. Two promotions that took the same
    number at the same place differ in this alone (safety model 7).
    """

    timeline: int
    switch_lsn: int
    reason: str = ""
    claim: str = ""


#: A comment that ends with whose promotion the next row is; PostgreSQL copies a parent's file into its own as it is.
_CLAIM = "# pgha: claim: "
LONGEST_CLAIM = 200


def claim_line(claim: str) -> str:
    """The line of a history file that says by which claim the next row's timeline was left."""
    return f"{_CLAIM}{' '.join(claim.split())[:LONGEST_CLAIM]}\n"


def claim_of(history: tuple[HistoryRow, ...]) -> str | None:
    """By which claim the timeline began whose history this is; "" by none of pgha's, None: not known (or the first)."""
    return history[-1].claim if history else None


def parse_history_file(text: str) -> tuple[HistoryRow, ...]:
    """Rows of a `<timeline>.history` file (chapter 26.3.6). Other comments than claims and empty lines are skipped.

    ValueError names the line that is not a row.
    """
    rows = []
    claim = ""
    for line in text.splitlines():
        if line.startswith(_CLAIM):
            claim = line[len(_CLAIM):].strip()[:LONGEST_CLAIM]     # the last before a row counts: others were given up
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        parts = line.split("\t", 2) if "\t" in line else line.split(None, 2)
        if len(parts) < 2:
            raise ValueError(f"not a timeline history row: {line[:80]!r}")
        if not _TIMELINE.fullmatch(parts[0].strip()) or not 0 < int(parts[0]) < 1 << 32:
            raise ValueError(f"not a timeline: {parts[0][:40]!r}")
        rows.append(HistoryRow(timeline=int(parts[0]), switch_lsn=parse_lsn(parts[1]), reason=parts[2].strip() if len(parts) > 2 else "", claim=claim))
        claim = ""
    return tuple(rows)


def is_ancestor(position: Position, *, timeline: int, history: tuple[HistoryRow, ...]) -> bool:
    """Does a server on `timeline`, whose history is `history`, contain everything up to `position`?

    True on the same timeline; on an older one only if the position is not past the point where it was left.
    """
    if position.timeline == timeline:
        return True
    return any(row.timeline == position.timeline and position.lsn <= row.switch_lsn for row in history)
