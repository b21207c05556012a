"""Set a data directory aside that is nobody's: a bootstrap that another node has won. Nothing is removed."""

from __future__ import annotations

from typing import Any

from pgha.act.context import Context, Progress, log
from pgha.act.steps import kill_everything, on_disk
from pgha.model.action import AbandonDirectory
from pgha.postgres import directories


async def abandon(ctx: Context, action: AbandonDirectory, progress: Progress) -> dict[str, Any]:
    """Facts: kept_as, the numbered `.failed` name."""
    progress("setting the data directory aside")
    await kill_everything(ctx, action.why)
    await ctx.fence.offline(60.0)
    kept_as = await on_disk(directories.move_to_failed, ctx.data_dir)
    log.warning("data directory set aside", why=action.why, kept_as=str(kept_as))
    return {"kept_as": str(kept_as)}
