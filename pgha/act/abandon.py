"""Set a data directory aside that is nobody's: a bootstrap that another node has won, or that was cut off; or a copy in
place that was cut off, if there is something that it was to replace, which comes back. Nothing is removed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pgha.act.clone import forget_markers
from pgha.act.context import Context, Progress, log
from pgha.act.methods import give_back
from pgha.act.steps import kill_everything, while_offline
from pgha.model.action import AbandonDirectory
from pgha.postgres import directories


async def abandon(ctx: Context, action: AbandonDirectory, progress: Progress) -> dict[str, Any]:
    """Facts: kept_as, the numbered `.failed` name ("" if there was no directory)."""
    progress("setting the data directory aside")
    await kill_everything(ctx, action.why)

    async def move() -> Path | None:
        if await ctx.on_disk(directories.bootstrapping, ctx.data_dir) == "copying" and await give_back(ctx, ours=False):
            return None
        if await ctx.on_disk(directories.content, ctx.data_dir) == "missing":
            return None
        aside = await ctx.on_disk(directories.move_to_failed, ctx.data_dir)
        await ctx.on_disk(forget_markers, ctx.data_dir)
        return aside

    kept_as = await while_offline(ctx, move)
    if kept_as:
        log.warning("data directory set aside", why=action.why, kept_as=kept_as)
    return {"kept_as": str(kept_as) if kept_as else ""}
