"""`ctl remove`: take all of a cluster's keys out of the store. Never data: no directory of any node is touched.

It asks for words that nobody types by accident (the reference's), and there is no --force; a pipe may answer. The keys are
removed in one step, and only if the leader is still the one that was asked about.
"""

from __future__ import annotations

import argparse

from pgha.ctl import cluster as clusters
from pgha.ctl.ends import DONE, FAILED, REFUSED, USAGE, End
from pgha.ctl.listing import shown
from pgha.ctl.prompt import typed
from pgha.ctl.settings import Settings
from pgha.ctl.store import Store

_AWARE = "Yes I am aware"


def run(settings: Settings, given: argparse.Namespace) -> int:
    if not settings.scope.strip("/"):
        raise End(USAGE, f"{settings.scope!r} is no cluster's name: its keys would be those of all clusters")
    store = Store(settings.etcd)
    keys = store.read(settings.root)
    if not keys:
        raise End(FAILED, f"there is no cluster {settings.scope!r} in the store")
    cluster = clusters.understood(settings.scope, keys, whatever=True)
    print(shown(cluster, given.format), flush=True)
    running = [name for name in cluster.members if keys[f"members/{name}"].lease]
    if running:
        clusters.warn(f"agents run on {', '.join(running)}: stop them first, or they write their keys again")
    if typed("Please confirm the cluster name to remove") != settings.scope:
        raise End(REFUSED, "Cluster names specified do not match")
    if typed(f'You are about to remove all information in DCS for {settings.scope}, please type: "{_AWARE}"') != _AWARE:
        raise End(REFUSED, f'You did not exactly type "{_AWARE}"')
    if cluster.leader and typed("This cluster currently is healthy. Please specify the leader name to continue") != cluster.leader:
        raise End(REFUSED, "You did not specify the current leader of the cluster")
    removed = store.remove(settings.root, unchanged="leader", value=keys["leader"].value if "leader" in keys else None)
    if removed is None:
        raise End(FAILED, "another leader was elected meanwhile: nothing was removed; look and try again")
    print(f"Success: {removed} keys of cluster {settings.scope} removed; no data was touched")
    return DONE
