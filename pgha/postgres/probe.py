"""The one monitoring query: everything that a heart beat wants to know, in one round trip (about 1 ms of the server).

The same text serves PostgreSQL 13 to 18; rows that are lists come as JSON. It needs no more than pg_monitor, and as a
superuser sees the walreceiver's conninfo. Nothing in it can wait for a lock or for replication.
"""

from __future__ import annotations

from typing import Any

import msgspec
from msgspec import Struct

from pgha.model.node import Row, Slot, WalReceiver
from pgha.model.rolling import STANDBY_AT_LEAST
from pgha.model.wal import Position
from pgha.postgres.connection import Connection, identify_system

#: For the conninfo of the probe's connection: the server gives up by itself should we be gone, and no answer ever waits
#: for a synchronous standby. Planner settings keep the plan cheap.
OPTIONS = "-c statement_timeout=5000 -c lock_timeout=1000 -c synchronous_commit=local -c jit=off -c search_path=pg_catalog"

#: Moments are texts as the reference prints them, whatever DateStyle and TimeZone the operator has set.
_MOMENT = """'YYYY-MM-DD HH24:MI:SS.US"+00:00"'"""

# Whether the server is in recovery is asked once: it may leave recovery while the query runs, and what is asked of a
# standby is still answered then, but never the other way round. No function tells the timeline that a standby replays;
# what pg_control knows may be one behind after a switch. While a walreceiver lives it knows; without one, the newest
# timeline that there are segments of is the one that was received last.
_LIMITS = "json_build_object(" + ", ".join(f"'{name}', current_setting('{name}')::int" for name in STANDBY_AT_LEAST) + ")"
_SQL = f"""
WITH now AS MATERIALIZED (SELECT pg_is_in_recovery() AS standby)
SELECT standby,
  CASE WHEN standby
    THEN greatest((SELECT received_tli FROM pg_stat_get_wal_receiver()),
                  (SELECT min_recovery_end_timeline FROM pg_control_recovery()),
                  (SELECT timeline_id FROM pg_control_checkpoint()),
                  CASE WHEN NOT EXISTS (SELECT FROM pg_stat_get_wal_receiver() WHERE pid IS NOT NULL)
                    THEN (SELECT max(('x' || substr(name, 1, 8))::bit(32)::int) FROM pg_ls_waldir() WHERE name ~ '^[0-9A-F]{{24}}$') END)
    ELSE ('x' || substr(pg_walfile_name(pg_current_wal_insert_lsn()), 1, 8))::bit(32)::int END,
  CASE WHEN NOT standby THEN pg_current_wal_flush_lsn() - '0/0' END,
  CASE WHEN standby THEN greatest(pg_last_wal_receive_lsn(), (SELECT written_lsn FROM pg_stat_get_wal_receiver())) - '0/0' END,
  CASE WHEN standby THEN pg_last_wal_replay_lsn() - '0/0' END,
  CASE WHEN standby THEN to_char(pg_last_xact_replay_timestamp() AT TIME ZONE 'UTC', {_MOMENT}) END,
  standby AND pg_is_in_recovery() AND pg_is_wal_replay_paused(),
  to_char(pg_postmaster_start_time() AT TIME ZONE 'UTC', {_MOMENT}),
  to_char(pg_conf_load_time() AT TIME ZONE 'UTC', {_MOMENT}),
  extract(epoch FROM pg_postmaster_start_time()),
  current_setting('server_version_num'),
  (SELECT system_identifier FROM pg_control_system()),
  current_setting('synchronous_standby_names'),
  current_setting('synchronous_standby_names') = '' OR EXISTS (SELECT FROM pg_stat_get_activity(NULL)
      WHERE backend_type = 'checkpointer' AND wait_event IN ('CheckpointerMain', 'CheckpointWriteDelay')),
  NOT EXISTS (SELECT FROM pg_stat_get_activity(NULL) WHERE backend_type = 'startup'
      AND (wait_event IS NULL OR wait_event NOT IN ('RecoveryRetrieveRetryInterval', 'RecoveryWalStream'))),
  current_setting('primary_conninfo', true),
  current_setting('primary_slot_name', true),
  current_setting('restore_command', true),
  {_LIMITS},
  (SELECT row_to_json(w) FROM (SELECT status, sender_host, sender_port, slot_name, received_tli AS timeline,
      latest_end_lsn - '0/0' AS latest_end_lsn FROM pg_stat_get_wal_receiver() WHERE pid IS NOT NULL) w),
  (SELECT json_agg(r) FROM (SELECT pid, usename, application_name, host(client_addr) AS client_addr, state, sync_state,
      sync_priority, sent_lsn - '0/0' AS sent_lsn, write_lsn - '0/0' AS write_lsn, flush_lsn - '0/0' AS flush_lsn,
      replay_lsn - '0/0' AS replay_lsn FROM pg_stat_replication) r),
  (SELECT json_agg(s) FROM (SELECT slot_name AS name, slot_type AS type, active, restart_lsn - '0/0' AS restart_lsn,
      wal_status, plugin, datname AS database, temporary, xmin IS NOT NULL AS holds_back_vacuum FROM pg_get_replication_slots() LEFT JOIN pg_database ON oid = datoid) s)
FROM now
"""


class _Receiver(Struct, frozen=True, kw_only=True):
    status: str | None = None
    sender_host: str | None = None
    sender_port: int | None = None
    slot_name: str | None = None
    timeline: int | None = None
    latest_end_lsn: int | None = None


_receiver = msgspec.json.Decoder(_Receiver)
_limits = msgspec.json.Decoder(dict[str, int])
_rows = msgspec.json.Decoder(tuple[dict[str, Any], ...])


async def read_row(conn: Connection, *, deadline_s: float) -> Row:
    """Ask. PostgresTimeout and PostgresUnreachable close `conn`; QueryFailed tells of missing privileges."""
    (answer,) = await conn.query(_SQL, deadline_s=deadline_s)
    return _row(answer)


def _row(answer: tuple[str | None, ...]) -> Row:
    (standby, timeline, flushed, received, replayed, replayed_at, paused, started_at, loaded_at, started_at_s, version, identifier,
     sync_names, checkpointer_rests, startup_rests, conninfo, slot, restore, limits, receiver, replication, slots) = answer
    return Row(
        in_recovery=standby == "t",
        timeline=int(timeline or 0),
        lsn=int(flushed or 0),
        received_lsn=int(received or 0),
        replayed_lsn=int(replayed or 0),
        replayed_timestamp=replayed_at or "",
        replay_paused=paused == "t",
        receiver=_wal_receiver(receiver),
        replication=_rows.decode(replication) if replication else (),
        slots=tuple(_slot(s) for s in _rows.decode(slots)) if slots else (),
        started_at=started_at or "",
        configuration_loaded_at=loaded_at or "",
        started_at_s=float(started_at_s or 0),
        server_version=int(version or 0),
        system_identifier=identifier or "",
        synchronous_standby_names=sync_names or "",
        checkpointer_rests=checkpointer_rests == "t",
        startup_rests=startup_rests == "t",
        primary_conninfo=conninfo or "",
        primary_slot_name=slot or "",
        restore_command=restore or "",
        limits=_limits.decode(limits) if limits else {},
    )


def _wal_receiver(text: str | None) -> WalReceiver | None:
    if not text:
        return None
    seen = _receiver.decode(text)
    return WalReceiver(
        status=seen.status or "", sender_host=seen.sender_host or "", sender_port=seen.sender_port or 0,
        slot_name=seen.slot_name or "", timeline=seen.timeline or 0, latest_end_lsn=seen.latest_end_lsn or 0)


def _slot(seen: dict[str, Any]) -> Slot:
    return msgspec.convert({k: v for k, v in seen.items() if v is not None}, Slot)


async def receiver_conninfo(conn: Connection, *, deadline_s: float) -> str | None:
    """The conninfo with which the walreceiver is connected now (passwords starred out by the server); None without one.

    It may differ from primary_conninfo for a while after a reload.
    """
    rows = await conn.query("SELECT conninfo FROM pg_stat_get_wal_receiver() WHERE pid IS NOT NULL", deadline_s=deadline_s)
    return rows[0][0] if rows else None


async def own_position(conninfo: dict[str, str | int], *, deadline_s: float) -> Position:
    """Timeline and end of WAL as a walsender would tell: exact also on a standby whose walreceiver has ended.

    SQL has no function for the timeline being replayed; what pg_control knows may be one behind after a switch.
    """
    conn = await Connection.connect({**conninfo, "replication": "true"}, deadline_s=deadline_s)
    try:
        system = await identify_system(conn, deadline_s=deadline_s)
    finally:
        conn.close()
    return Position(timeline=system.timeline, lsn=system.lsn)
