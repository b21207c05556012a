"""The users that a cluster needs, by SQL: superuser's password, replication, rewind with its four functions.

A password reaches the server only as a SCRAM verifier computed here, so neither its log nor pg_stat_statements can
show it; logging of these statements is off besides.
"""

from __future__ import annotations

from pgha.errors import QueryFailed
from pgha.postgres.connection import Connection

#: What pg_rewind calls on its source (chapter "pg_rewind", Notes).
_REWIND_FUNCTIONS = (
    "pg_ls_dir(text, boolean, boolean)",
    "pg_stat_file(text, boolean)",
    "pg_read_binary_file(text)",
    "pg_read_binary_file(text, bigint, bigint, boolean)",
)


def quote_identifier(name: str) -> str:
    if "\0" in name:
        raise ValueError("an identifier cannot contain a NUL")
    return '"' + name.replace('"', '""') + '"'


def _quote_literal(text: str) -> str:
    quoted = "'" + text.replace("'", "''") + "'"
    return " E" + quoted.replace("\\", "\\\\") if "\\" in text else quoted


async def set_role(conn: Connection, name: str, *, password: str | None, attributes: str, deadline_s: float) -> None:
    """Create role `name` with `attributes` ("LOGIN REPLICATION"), or bring it to them; `password` None leaves it as is.

    Nothing of it waits for a standby: the cluster has none yet, or they follow anyway.
    """
    words = attributes
    if password is not None:
        words += f" PASSWORD {_quote_literal(conn.encrypt_password(password, name))}"
    role = quote_identifier(name)
    exists = await conn.query("SELECT FROM pg_roles WHERE rolname = $1", name, deadline_s=deadline_s)
    verb = "ALTER" if exists else "CREATE"
    # Apart, since a string of several statements is logged whole before its first one has any effect.
    await conn.query(
        "BEGIN; SET LOCAL log_statement = none; SET LOCAL log_min_duration_statement = -1; "
        "SET LOCAL log_min_duration_sample = -1; SET LOCAL log_transaction_sample_rate = 0; "
        "SET LOCAL log_min_error_statement = panic; SET LOCAL synchronous_commit = local", deadline_s=deadline_s)
    try:
        await conn.query(f"{verb} ROLE {role} WITH {words}", deadline_s=deadline_s)
    except QueryFailed:
        await conn.query("ROLLBACK", deadline_s=deadline_s)
        raise
    await conn.query("COMMIT", deadline_s=deadline_s)


async def set_superuser(conn: Connection, name: str, password: str | None, *, deadline_s: float) -> None:
    await set_role(conn, name, password=password, attributes="LOGIN SUPERUSER", deadline_s=deadline_s)


async def set_replication_user(conn: Connection, name: str, password: str | None, *, deadline_s: float) -> None:
    await set_role(conn, name, password=password, attributes="LOGIN REPLICATION", deadline_s=deadline_s)


async def set_rewind_user(conn: Connection, name: str, password: str | None, *, deadline_s: float) -> None:
    """A user with no more than pg_rewind needs, in the database of `conn`, which is the one pg_rewind must connect to."""
    await set_role(conn, name, password=password, attributes="LOGIN", deadline_s=deadline_s)
    role = quote_identifier(name)
    grants = "; ".join(f"GRANT EXECUTE ON FUNCTION pg_catalog.{f} TO {role}" for f in _REWIND_FUNCTIONS)
    await conn.query(grants, deadline_s=deadline_s)
