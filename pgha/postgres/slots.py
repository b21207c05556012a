"""Replication slots: making, moving and dropping them by SQL. (A member's slot name: pgha.model.cluster.slot_name.)"""

from __future__ import annotations

from pgha.model.wal import format_lsn, parse_lsn
from pgha.postgres.connection import Connection


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
