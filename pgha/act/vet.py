"""Would PostgreSQL take the configuration? Asked before it is written, so that no value keeps it from starting.

* `vet`: before our own files are written. What somebody has put into the store unchecked (patronictl does not check, nor does
  etcdctl) is left out and named; the rest counts. Whoever cannot ask goes on: a reload passes over what it does not
  understand, and a start says so itself.
* `judge`: before an operator's change is written to the store. Changes nothing.
"""

from __future__ import annotations

from typing import Any

from msgspec.structs import replace

from pgha.act.context import Context, log
from pgha.act.steps import closing, connect
from pgha.config.cluster import validate_change
from pgha.config.judgement import Judgement, changed_settings, in_our_words, line, refusals
from pgha.config.load import Effective, effective
from pgha.config.values import shown
from pgha.errors import OperationFailed, PostgresError
from pgha.model.gucs import GucFacts, is_plain
from pgha.postgres import directories, gucs
from pgha.postgres.parameters import overridden, pending_restart

#: 10 ms on a machine that has time. Within a pass of the loop there is less than before a start.
VET_DEADLINE_S = 2.0
QUICK_VET_DEADLINE_S = 0.6
ASK_DEADLINE_S = 2.0


async def vet(ctx: Context, *, deadline_s: float = VET_DEADLINE_S) -> None:
    """Leave out of the configuration what PostgreSQL's program refuses. Only asks if something has changed; what it could not
    ask in time is asked again before the next start."""
    looked_at = ctx.wanted.to_vet()
    if looked_at == ctx.wanted.vetted:
        return
    try:
        refused = await _refused(ctx, looked_at, deadline_s=deadline_s)
    except (PostgresError, OSError) as error:
        log.warning("PostgreSQL's settings could not be checked before they are written", why=str(error))
        return
    ctx.wanted.leave_out(looked_at, refused)


async def _refused(ctx: Context, settings: dict[str, str], *, deadline_s: float = VET_DEADLINE_S) -> dict[str, str]:
    """Name → why. PostgresError, OSError."""
    return await gucs.refused(settings, bin_dir=ctx.server.bin_dir, scratch=ctx.private_dir, in_thread=ctx.machine.in_thread,
                              deadline_s=deadline_s, run=ctx.machine.run)


async def facts(ctx: Context) -> tuple[GucFacts, dict[str, gucs.FileEntry]]:
    """What the running server says of every parameter and of its files; without one, what its program says. PostgresError, OSError."""
    try:
        with closing(await connect(ctx, deadline_s=ASK_DEADLINE_S)) as conn:
            settings = gucs.running_settings(await conn.query(gucs.SETTINGS_SQL, gucs.settings_argument(()), deadline_s=ASK_DEADLINE_S))
            entries = gucs.file_entries(await conn.query(gucs.FILES_SQL, deadline_s=ASK_DEADLINE_S))
        version = settings.get("server_version_num")
        return GucFacts(of=settings, version=int(version.value) // 10000 if version else 0, running=True), entries
    except (PostgresError, OperationFailed, OSError):
        described = await gucs.described(ctx.server.bin_dir, deadline_s=ASK_DEADLINE_S, run=ctx.machine.run)
        return GucFacts(of=described, version=await ctx.on_disk(directories.major_version, ctx.data_dir)), {}


async def judge(ctx: Context, old: dict[str, Any] | None, new: Any) -> Judgement:
    """What is wrong with replacing the shared configuration `old` by `new`, and what it would do here."""
    schema = validate_change(old, new)
    if not isinstance(new, dict) or new.get("postgresql") == (old or {}).get("postgresql"):
        return Judgement(problems=tuple(schema))        # a pause does not wait for a PostgreSQL that hangs
    would = effective(ctx.wanted.effective().local, new)
    changed = changed_settings(old, new)
    shared = ctx.wanted.to_vet(_without_own(would))
    try:
        known, entries = await facts(ctx)
        here = ctx.wanted.to_vet(would)
        own = refusals(shared, known)
        told = await _refused(ctx, {name: value for name, value in shared.items() if name not in own})
    except (PostgresError, OSError) as error:
        unchecked = (f"PostgreSQL's parameters could not be checked on {ctx.me.name}: {error}",) if changed else ()
        return Judgement(problems=tuple(schema), warnings=unchecked)
    refused = own | {name: in_our_words(why, changed.get(name, ("", name))[1], known) for name, why in told.items()}
    named = {problem.split(": ")[1] for problem in schema if problem.count(": ") > 1}
    problems = [line(changed[name], why) for name, why in sorted(refused.items()) if name in changed and f"postgresql.{'.'.join(changed[name])}" not in named]
    # The value only where it cannot hold a secret: the node's own file is not for everybody who may send a change.
    warnings = [line(where, f"{ctx.me.name}'s own file sets it{f' to {shown(here[name])}' if is_plain(known.of.get(name)) else ''}, which wins there") for name, where in changed.items()
                if name in shared and here.get(name, shared[name]) != shared[name]]
    warnings += [line(changed[name], what) for name, what in overridden(here, known.of, entries).items() if name in changed]
    warnings += [f"{line(('parameters', name), why)}; it is left out, as before" for name, why in sorted(refused.items()) if name not in changed and name in shared]
    here = {name: value for name, value in here.items() if name not in refused}
    restart = pending_restart(here, known.of, entries) if known.running else {}
    return Judgement(problems=(*schema, *problems), warnings=tuple(warnings), restart=restart, asked="server" if known.running else "program", version=known.version)


def _without_own(would: Effective) -> Effective:
    """What the shared configuration alone says: this node's own file is not what is changed."""
    shared = would.cluster.postgresql
    return replace(would, postgresql=replace(would.postgresql, parameters=dict(shared.parameters), recovery_conf=dict(shared.recovery_conf)))
