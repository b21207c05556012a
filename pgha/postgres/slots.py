"""Replication slots: the name of a member's, and making, moving and dropping them by SQL."""

from __future__ import annotations

from pgha.model.wal import format_lsn, parse_lsn
from pgha.postgres.connection import Connection

#: NAMEDATALEN - 1.
_LIMIT = 63
_PLAIN = frozenset("abcdefghijklmnopqrstuvwxyz0123456789_")


def slot_name(member_name: str) -> str:
    """The slot of a member (compatibility spec 2.4; every agent of a cluster must map alike).

    "Node-1.a" → "node_1_a", "é" → "u0233". Two names may map to one slot: the caller looks out for that.
    """
    def plain(character: str) -> str:
        if character in _PLAIN:
            return character
        return "_" if character in "-." else f"u{ord(character):04d}"

    return "".join(plain(c) for c in member_name.lower())[:_LIMIT]


async def create_physical(conn: Connection, name: str, *, deadline_s: float) -> None:
    """Make a slot that keeps WAL from now on. QueryFailed 42710: there is one of that name; 53400: no room."""
    await conn.query("SELECT pg_create_physical_replication_slot($1, true)", name, deadline_s=deadline_s)


async def drop(conn: Connection, name: str, *, deadline_s: float) -> None:
    """QueryFailed 55006 while it is in use, 42704 if there is none."""
    await conn.query("SELECT pg_drop_replication_slot($1)", name, deadline_s=deadline_s)


async def advance(conn: Connection, name: str, lsn: int, *, deadline_s: float) -> int:
    """Move an inactive slot forward, no further than the server has WAL; where it is now.

    PostgreSQL refuses to move one back (22023), or one that never kept any WAL (55000).
    """
    rows = await conn.query(
        "SELECT end_lsn FROM pg_replication_slot_advance($1, least($2::pg_lsn, CASE WHEN pg_is_in_recovery() "
        "THEN pg_last_wal_replay_lsn() ELSE pg_current_wal_flush_lsn() END))", name, format_lsn(lsn),
        deadline_s=deadline_s)
    return parse_lsn(rows[0][0] or "0/0")
