"""`ctl remove`: take all of a cluster's keys out of the store. Never data: no directory of any node is touched.

It asks for words that nobody types by accident (the reference's), and there is no --force; a pipe may answer. The keys are
removed in one step, and only if the leader is still the one that was asked about.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping

from pgha.ctl import cluster as clusters
from pgha.ctl.cluster import Cluster
from pgha.ctl.ends import DONE, FAILED, REFUSED, USAGE, End
from pgha.ctl.listing import shown
from pgha.ctl.output import say
from pgha.ctl.prompt import typed
from pgha.ctl.settings import Settings
from pgha.ctl.store import Key, Store

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
    tell = say if given.format in ("table", "pretty") else clusters.warn      # what a program reads stays whole
    running = [name for name in cluster.members if keys[f"members/{name}"].lease]
    if running:
        clusters.warn(f"agents run on {', '.join(running)}: stop them first, or they write their keys again")
    if given.dry_run:
        tell(_dry_run(settings, cluster, keys))
        return DONE
    if typed("Please confirm the cluster name to remove") != settings.scope:
        raise End(REFUSED, "Cluster names specified do not match")
    if typed(f'You are about to remove all information in DCS for {settings.scope}, please type: "{_AWARE}"') != _AWARE:
        raise End(REFUSED, f'You did not exactly type "{_AWARE}"')
    if cluster.leader and typed("This cluster currently is healthy. Please specify the leader name to continue") != cluster.leader:
        raise End(REFUSED, "You did not specify the current leader of the cluster")
    removed = store.remove(settings.root, unchanged="leader", value=keys["leader"].value if "leader" in keys else None)
    if removed is None:
        raise End(FAILED, "another leader was elected meanwhile: nothing was removed; look and try again")
    tell(f"Success: {removed} keys of cluster {settings.scope} removed; no data was touched")
    return DONE


def _dry_run(settings: Settings, cluster: Cluster, keys: Mapping[str, Key]) -> str:
    """What is asked, and what goes."""
    lines = [f"remove of cluster {settings.scope}: would be done, once three questions are answered (dry run: nothing is changed)"]
    leader = f", and for its leader, {cluster.leader}" if cluster.leader else "; there is no leader to ask for"
    lines.append(f"  1. ctl  ask for the cluster's name, for \"{_AWARE}\"{leader}")
    unchanged = f"{cluster.leader} still leads then" if cluster.leader else "nobody leads then either"
    lines.append(f"  2. ctl  remove {len(keys)} keys below {settings.root} in one step, if {unchanged}")
    return "\n".join([*lines, "  data stays: no directory of any node is touched"])
