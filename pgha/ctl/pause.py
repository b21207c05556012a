"""`ctl pause` and `ctl resume`: switch automatic failover off and on again, and wait until every member has seen it.

Any agent that answers writes it; if none does, it is written to the store, where the agents will find it.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

from pgha.ctl import agents
from pgha.ctl import cluster as clusters
from pgha.ctl.cluster import Cluster
from pgha.ctl.ends import DONE, FAILED, REFUSED, UNKNOWN, End, code_of
from pgha.ctl.exchange import NoAnswer
from pgha.ctl.settings import Settings
from pgha.ctl.store import Store
from pgha.model.overview import is_paused


def run(settings: Settings, given: argparse.Namespace) -> int:
    pause = given.command == "pause"
    cluster = clusters.read(settings)
    if is_paused(cluster.config or {}) == pause:
        raise End(REFUSED, f"Cluster is {'already' if pause else 'not'} paused")
    _write(settings, cluster, pause=pause)
    if given.wait:
        print(f"'{given.command}' request sent, waiting until it is recognized by all nodes", flush=True)
        _wait(settings, cluster, pause=pause)
    print(f"Success: cluster management is {'paused' if pause else 'resumed'}")
    return DONE


def _write(settings: Settings, cluster: Cluster, *, pause: bool) -> None:
    change = {"pause": True if pause else None}
    for name in sorted(cluster.members, key=lambda name: (name != cluster.leader, name)):
        try:
            answer = agents.ask(settings, cluster.api_url(name), "PATCH", "/config", body=change)
        except NoAnswer as failure:
            clusters.warn(str(failure))      # whether it arrived or not: asking another for the same does no harm
            continue
        if answer.status == 200:
            return
        text = answer.body.decode(errors="replace")
        raise End(code_of(answer.status, text), f"Failed: {'pause' if pause else 'resume'} cluster management status code={answer.status}, ({text})")
    clusters.warn("no agent can be asked; writing the configuration to the store")
    key = cluster.keys.get("config")
    if key is None or cluster.config is None:
        raise End(FAILED, "there is no configuration in the store (or it is not a JSON object)")
    new = {name: value for name, value in {**cluster.config, **change}.items() if value is not None}
    if not Store(settings.etcd).write(settings.root + "config", json.dumps(new, separators=(",", ":"), ensure_ascii=False).encode(), if_revision=key.revision):
        raise End(FAILED, "the configuration was changed by somebody else at the same time; look and try again")


def _wait(settings: Settings, before: Cluster, *, pause: bool) -> None:
    """Until every member says so. A member that is down loses its key within the ttl, and is then waited for no longer."""
    limit_s = 2 * _seconds(before, "ttl", 30.0) + 2 * _seconds(before, "loop_wait", 10.0)
    give_up_at = time.monotonic() + limit_s
    waiting = sorted(before.members)
    while waiting:
        if time.monotonic() >= give_up_at:
            raise End(UNKNOWN, f"written, but not recognized within {limit_s:g} s by {', '.join(waiting)}; it takes effect there as soon as the store is seen")
        time.sleep(0.25)      # a poll of the store
        now = clusters.understood(settings.scope, Store(settings.etcd).read(settings.root), quiet=True)
        waiting = sorted(name for name, raw in now.members.items() if (raw.get("pause") is True) != pause)


def _seconds(cluster: Cluster, key: str, default: float) -> float:
    value: Any = (cluster.config or {}).get(key, default)
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else default
