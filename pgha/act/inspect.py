"""Questions that take a while: what the leader's PostgreSQL is, and where our own WAL ends."""

from __future__ import annotations

from typing import Any

import msgspec

from pgha.act.context import Context, Progress
from pgha.act.steps import closing, control, end_position, nothing_lives, reachable
from pgha.model.action import InspectEndOfWal, InspectUpstream
from pgha.postgres.connection import identify_system, timeline_history

#: Not on the way of a failover: a slow disk may take its time.
END_OF_WAL_DEADLINE_S = 60.0


async def inspect_upstream(ctx: Context, action: InspectUpstream, progress: Progress) -> dict[str, Any]:
    """Facts as in model.observation.Upstream: system_identifier, timeline, lsn, in_recovery, history, checkpoint_timeline.

    `history`: [{"timeline", "switch_lsn", "reason"}, …], oldest first.
    """
    source = action.source
    progress(f"asking {source.name}")
    where = await reachable(ctx.wanted.source_conninfo(source, "replication"), deadline_s=action.deadline_s)
    with closing(await ctx.machine.connect(where, deadline_s=action.deadline_s)) as conn:
        system = await identify_system(conn, deadline_s=action.deadline_s)
        history = await timeline_history(conn, system.timeline, deadline_s=action.deadline_s)
    where = await reachable(ctx.wanted.source_conninfo(source, "rewind"), deadline_s=action.deadline_s)
    with closing(await ctx.machine.connect(where, deadline_s=action.deadline_s)) as conn:
        rows = await conn.query("SELECT pg_is_in_recovery(), (SELECT timeline_id FROM pg_control_checkpoint())", deadline_s=action.deadline_s)
    return {
        "name": source.name, "system_identifier": system.system_identifier, "timeline": system.timeline, "lsn": system.lsn,
        "in_recovery": rows[0][0] == "t", "checkpoint_timeline": int(rows[0][1] or 0), "history": msgspec.to_builtins(history),
    }


async def inspect_end_of_wal(ctx: Context, action: InspectEndOfWal, progress: Progress) -> dict[str, Any]:
    """Facts: end_of_wal, end_of_wal_timeline, state of pg_control. The server is stopped."""
    del action
    nothing_lives(ctx)
    progress("reading the end of WAL")
    said = await control(ctx)
    at = await end_position(ctx, said, deadline_s=END_OF_WAL_DEADLINE_S)
    return {"end_of_wal": at.lsn, "end_of_wal_timeline": at.timeline, "state": said.state}
