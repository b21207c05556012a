"""The operator's programs that are waited for: pre_promote, which may say no, and before_stop, which may take its time.

Rules of this file:
* Neither is in the way of what the licence asks for: renewer, fence and guard know nothing of them, and a stop begins when
  an orderly demotion is due, whether or not before_stop has ended, and whether or not it can be ended.
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


async def before_stop(ctx: Context, limit_s: float, progress: Progress) -> None:
    """Returns when it has ended, at `limit_s`, when an orderly demotion is due, or when the server has died; what still runs
    then is ended beside."""
    command = ctx.wanted.effective().postgresql.before_stop
    server = ctx.machine.adopt() if command and limit_s > 0 and ctx.beside is not None else None
    if server is None or ctx.beside is None:
        return
    progress("before_stop")
    log.info("before_stop begins", limit_s=limit_s)
    has_ended, scope = trio.Event(), trio.CancelScope()

    async def script() -> None:
        with scope:
            ended = await run_script("before_stop", command_of(command), run=ctx.machine.run, limit_s=limit_s)
            say = log.info if ended.ok else log.warning
            say("before_stop has ended", how=str(ended), took_s=ended.took_s)
        has_ended.set()

    ctx.beside(script)
    held = ctx.renewer.licence.state is LicenceState.HELD
    ends_at = trio.current_time() + limit_s
    try:
        while not has_ended.is_set() and trio.current_time() < ends_at:
            leaves_s = _licence_leaves_s(ctx) if held else limit_s
            if leaves_s <= 0 or not server.alive():
                log.warning("not waiting for before_stop any longer", why="the licence does not leave the time" if leaves_s <= 0 else "PostgreSQL has ended")
                return
            with trio.move_on_after(min(leaves_s, LOOK_S, max(0.0, ends_at - trio.current_time()))):
                await has_ended.wait()
        if not has_ended.is_set():
            log.warning("not waiting for before_stop any longer", why="its time is over", limit_s=limit_s)
    finally:
        scope.cancel()
        server.close()


def _licence_leaves_s(ctx: Context) -> float:
    """Until an orderly demotion would begin by itself (safety model 8); no time at all without a licence."""
    licence = ctx.renewer.licence
    if licence.state is not LicenceState.HELD or licence.valid_until is None or licence.since is None:
        return 0.0
    if licence.valid_until == NEVER:
        return float("inf")
    begin = demote_at(licence.valid_until, licence.ttl_s, since=licence.shortened_at or licence.since, loop_wait_s=ctx.wanted.effective().settings.loop_wait_s)
    return remaining_s(begin, ctx.clock.now())
