"""The operator's programs that are waited for: pre_promote, which may say no, and before_stop, which may take its time.

Rules of this file:
* Neither is in the way of what the licence asks for: renewer, fence and guard know nothing of them, and a stop begins when
  an orderly demotion is due, whether or not before_stop has ended, and whether or not it can be ended.
* Nor does either hide what PostgreSQL does meanwhile: before_stop is waited for only while there is something to stop, and
  while a primary gives a sign of life.
* What they need not do in time they have not done: a pre_promote that does not end has refused.
"""

from __future__ import annotations

from typing import Any

import trio

from pgha.act.context import Context, Progress, log
from pgha.act.scripts import Ended, command_of, run_script
from pgha.clock import NEVER, remaining_s
from pgha.model.action import PrePromote
from pgha.model.lock import LicenceState, demote_at
from pgha.model.observation import BEFORE_STOP
from pgha.postgres.processes import Postmaster

#: The licence is looked at this often while a program runs before a stop: it may be lost, or prolonged.
LOOK_S = 0.1


async def pre_promote(ctx: Context, action: PrePromote, progress: Progress) -> dict[str, Any]:
    """Facts: epoch, agrees, said. Nothing has been done to PostgreSQL yet."""
    progress("pre_promote")
    command = ctx.wanted.effective().postgresql.pre_promote
    ended = Ended(exit_code=0)      # it was taken out of the configuration since
    if command:
        log.info("pre_promote begins", limit_s=action.limit_s)
        ended = await run_script("pre_promote", command_of(command), run=ctx.machine.run, limit_s=action.limit_s)
        say = log.info if ended.ok else log.warning
        say("pre_promote has ended", agrees=ended.ok, how=str(ended), took_s=ended.took_s)
    return {"epoch": action.epoch, "agrees": ended.ok, "said": str(ended)}


async def before_stop(ctx: Context, limit_s: float, progress: Progress) -> bool:
    """Returns when it has ended, at `limit_s`, when an orderly demotion is due, or when the postmaster has exited; what still
    runs then is ended beside. False: a primary has given no sign of life for primary_hang_timeout."""
    command = ctx.wanted.effective().postgresql.before_stop
    if not command or limit_s <= 0 or ctx.beside is None:
        return True
    server = ctx.machine.adopt()
    if server is None:
        return True
    try:
        progress(BEFORE_STOP)
        return await _wait_for_before_stop(ctx, command, server, limit_s)
    finally:
        server.close()
        progress("stopping PostgreSQL")     # from here on it is not expected to answer


async def _wait_for_before_stop(ctx: Context, command: str, server: Postmaster, limit_s: float) -> bool:
    assert ctx.beside is not None
    log.info("before_stop begins", limit_s=limit_s)
    has_ended, scope = trio.Event(), trio.CancelScope()

    async def script() -> None:
        with scope:
            ended = await run_script("before_stop", command_of(command), run=ctx.machine.run, limit_s=limit_s)
            say = log.info if ended.ok else log.warning
            say("before_stop has ended", how=str(ended), took_s=ended.took_s)
        has_ended.set()

    async def watch(watching: trio.CancelScope) -> None:
        await server.wait_exit()
        log.warning("not waiting for before_stop any longer", why="PostgreSQL has ended")
        watching.cancel()

    ctx.beside(script)
    held = ctx.renewer.licence.state is LicenceState.HELD
    ends_at = trio.current_time() + limit_s
    why, lives = "", True
    try:
        async with trio.open_nursery() as nursery:      # for as long as PostgreSQL lives
            nursery.start_soon(watch, nursery.cancel_scope)
            while not has_ended.is_set() and not why:
                leaves_s = _licence_leaves_s(ctx) if held else limit_s
                silent_s = ctx.silent_s() if held else 0.0
                left_s = ends_at - trio.current_time()
                lives = silent_s < ctx.wanted.effective().settings.primary_hang_timeout_s
                if leaves_s <= 0:
                    why = "the licence does not leave the time"
                elif not lives:
                    why = f"PostgreSQL has given no sign of life for {silent_s:.1f} s"
                elif left_s <= 0:
                    why = f"its {limit_s:g} s are over"
                else:
                    with trio.move_on_after(min(leaves_s, LOOK_S, left_s)):
                        await has_ended.wait()
            nursery.cancel_scope.cancel()
        if why:
            log.warning("not waiting for before_stop any longer", why=why)
    finally:
        scope.cancel()
    return lives


def _licence_leaves_s(ctx: Context) -> float:
    """Until an orderly demotion would begin by itself (safety model 8); no time at all without a licence."""
    licence = ctx.renewer.licence
    if licence.state is not LicenceState.HELD or licence.valid_until is None or licence.since is None:
        return 0.0
    if licence.valid_until == NEVER:
        return float("inf")
    begin = demote_at(licence.valid_until, licence.ttl_s, since=licence.shortened_at or licence.since, loop_wait_s=ctx.wanted.effective().settings.loop_wait_s)
    return remaining_s(begin, ctx.clock.now())
