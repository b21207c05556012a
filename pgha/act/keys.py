"""Writes to the store that are decided on what was seen: each compares the revisions it was decided on."""

from __future__ import annotations

from pgha.act.context import Context
from pgha.act.steps import be_standby_at_rest
from pgha.dcs import Compare, Delete, Put
from pgha.dcs.keys import EPOCH
from pgha.errors import OperationFailed, Refused
from pgha.model.action import ReleaseLock, StandDown, WriteInitialize, WriteKey


async def write_key(ctx: Context, action: WriteKey, *, deadline_s: float) -> None:
    """Refused if the epoch or the key has changed since (safety model 5): decided on an old view."""
    path = ctx.keys.path(action.key)
    compares = [Compare(key=path, revision=action.if_revision)]
    if action.epoch_revision is not None:
        compares.append(Compare(key=ctx.keys.path(EPOCH), revision=action.epoch_revision))
    leader = ctx.renewer.licence.leader_revision if action.epoch_revision is not None else 0
    if leader:      # a member of another make takes over without the epoch
        compares.append(Compare(key=ctx.keys.path("leader"), revision=leader))
    change: Put | Delete = Delete(key=path) if action.value is None else Put(key=path, value=action.value)
    outcome = await ctx.store.transact(compares=compares, puts=[change], read=[path], deadline_s=deadline_s)
    if outcome.succeeded:
        return
    found = outcome.found.get(path)
    # An attempt whose answer was lost may have committed: then the key says what was to be said.
    if (found.value if found is not None else None) == action.value and (found is None or found.revision > action.if_revision):
        return
    raise Refused(f"{action.key}{', leader' if leader else ''} or the epoch has changed since it was read: decided on an old view")


async def write_initialize(ctx: Context, action: WriteInitialize, *, deadline_s: float) -> None:
    """Create-only, or over exactly the value that was seen."""
    path = ctx.keys.path("initialize")
    outcome = await ctx.store.transact(
        compares=[Compare(key=path, revision=action.if_revision)], puts=[Put(key=path, value=action.value.encode())], read=[path],
        deadline_s=deadline_s)
    found = outcome.found.get(path)
    if not outcome.succeeded and (found is None or found.value != action.value.encode()):
        raise Refused("initialize has changed since it was read: decided on an old view")


async def release_lock(ctx: Context, action: ReleaseLock, *, deadline_s: float) -> None:
    """Only when no process of the data directory can write: asked again here, of the processes themselves."""
    if left := ctx.directory.processes():
        raise OperationFailed(f"the lock is not released while processes of the data directory live: {[p.pid for p in left[:8]]}")
    await ctx.renewer.release(lsn=action.lsn, timeline=action.timeline, deadline_s=deadline_s)


async def stand_down(ctx: Context, action: StandDown, *, deadline_s: float) -> None:
    """The guard first, which sees for itself that no process lives, or that the server is in recovery: after the release
    nothing else holds this data directory to that."""
    await be_standby_at_rest(ctx)
    await ctx.fence.standby()
    await ctx.renewer.release(lsn=action.lsn, timeline=action.timeline, deadline_s=deadline_s)
