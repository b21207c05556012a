"""Would PostgreSQL take the configuration? Asked before it is written, so that no value keeps it from starting.

What somebody has written unchecked (patronictl does not check, nor does etcdctl) is left out and named; the rest counts.
Whoever cannot ask goes on: a reload passes over what it does not understand, and a start says so itself.
"""

from __future__ import annotations

from pgha.act.context import Context, log
from pgha.errors import PostgresError
from pgha.postgres import gucs

#: 10 ms on a machine that has time.
VET_DEADLINE_S = 2.0


async def vet(ctx: Context) -> None:
    """Leave out of the configuration what PostgreSQL's program refuses. Only asks if something has changed."""
    looked_at = ctx.wanted.to_vet()
    if looked_at == ctx.wanted.vetted:
        return
    try:
        refused = await refused_of(ctx, looked_at)
    except (PostgresError, OSError) as error:
        log.warning("PostgreSQL's settings could not be checked before they are written", why=str(error))
        return
    ctx.wanted.leave_out(looked_at, refused)


async def refused_of(ctx: Context, settings: dict[str, str]) -> dict[str, str]:
    """Name → why. PostgresError, OSError."""
    return await gucs.refused(settings, bin_dir=ctx.server.bin_dir, scratch=ctx.private_dir, in_thread=ctx.machine.in_thread,
                              deadline_s=VET_DEADLINE_S, run=ctx.machine.run)
