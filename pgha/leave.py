"""`pgha leave CONFIG`: the running PostgreSQL of this node is another agent's from now on (the way back to Patroni).

In pause the agent leaves PostgreSQL running when it stops, and the guard stays with it: it would kill a server that another
agent promotes, and so would the next guard that goes on from its file. Here both go. Refused while an agent of pgha runs, and
where the guard watches over a licence that has an end: that is no pause, and what it protects is still to be protected.
"""

from __future__ import annotations

import signal
from collections.abc import Mapping
from pathlib import Path

import trio

from pgha.config.directories import (
    agent_lock,
    data_directory_lock,
    prepare_runtime_dir,
    prepare_state_dir,
)
from pgha.config.load import load
from pgha.config.local import LocalConfig
from pgha.errors import GuardError, OperationFailed, Refused
from pgha.lock import recipe
from pgha.lock.guard_client import GuardClient, GuardStatus, agent_flock
from pgha.lock.protocol import FILE_NAME

#: What a guard may have been told last by an agent that stopped in pause, or that had nothing to guard.
MAY_GO = ("paused", "standby", "idle")
EXIT_S = 2.0


def leave(path: str, environ: Mapping[str, str]) -> str:
    """What was done, in words. Raises Refused, ConfigError, OperationFailed."""
    local = load(path, environ).local
    prepare_state_dir(local, environ)
    runtime_dir = prepare_runtime_dir(local, environ)
    with agent_flock(agent_lock(local, environ)) as ours, agent_flock(data_directory_lock(local, environ)) as alone:
        if not (ours and alone):
            raise Refused(f"an agent of pgha runs on {local.postgresql.data_dir}: say pause, then stop it, which leaves PostgreSQL running")
        return trio.run(_let_go, local, runtime_dir)


async def _let_go(local: LocalConfig, runtime_dir: Path) -> str:
    guard = GuardClient(runtime_dir, data_dir=local.postgresql.data_dir)
    try:
        status = await guard.status()
    except GuardError as error:
        if guard.listener:
            raise OperationFailed(f"the guard does not answer: {error}") from error
        status = None
    finally:
        await guard.aclose()
    if status is not None:
        await _end(local, status)
    file = runtime_dir / FILE_NAME
    known = file.exists()
    file.unlink(missing_ok=True)
    said = f"the guard of {local.postgresql.data_dir} has ended ({status.state})" if status is not None else "there was no guard"
    return f"{said}; {'what it knew is forgotten' if known else 'nothing was known'}; another agent may be started"


async def _end(local: LocalConfig, status: GuardStatus) -> None:
    if status.state not in MAY_GO:
        raise Refused(f"the guard is {status.state}{f' ({status.why})' if status.why else ''}: only in pause is PostgreSQL left to another agent")
    if local.pgha.guard == "service":
        raise Refused("the guard is a service: stop it first (systemctl stop pgha-guard), then say this again")
    process = recipe.read_proc(status.pid)
    if process is None:
        return
    recipe.send(process, signal.SIGKILL)
    with trio.move_on_after(EXIT_S):
        while recipe.alive(process):  # noqa: ASYNC110  (processes send no events)
            await trio.sleep(0.01)
        return
    raise OperationFailed(f"the guard (pid {status.pid}) has not ended within {EXIT_S:g} s")
