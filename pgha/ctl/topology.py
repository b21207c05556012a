"""`ctl topology`: who follows whom? The table of `list` as a tree, by the tag replicatefrom. The reference's layout."""

from __future__ import annotations

import argparse
from typing import Any

from pgha.ctl.cluster import Cluster
from pgha.ctl.listing import member_rows, of_each, shown
from pgha.ctl.settings import Settings


def run(settings: Settings, given: argparse.Namespace) -> int:
    return of_each(settings, given, lambda seen: "\n".join(map(tree, seen)))


def tree(cluster: Cluster) -> str:
    """The whole output, without the last newline."""
    rows = {row["Member"]: row for row in member_rows(cluster)}
    below: dict[str, list[str]] = {}
    for name, upstream in upstreams(cluster).items():
        below.setdefault(upstream, []).append(name)
    ordered: list[dict[str, Any]] = []
    # Depth first, without recursion: nobody bounds how long a chain of tags is. No leader: the tree hangs from nothing.
    waiting = [(cluster.leader, 0)] if cluster.leader in rows else [(name, 0) for name in reversed(below.get("", []))]
    while waiting:
        name, depth = waiting.pop()
        ordered.append({**rows[name], "Member": f"{'  ' * (depth - 1)}+ {name}" if depth else name})
        waiting += [(follower, depth + 1) for follower in reversed(below.get(name, []))]
    assert len(ordered) == len(rows), (sorted(rows), below)
    return shown(cluster, rows=ordered)


def upstreams(cluster: Cluster) -> dict[str, str]:
    """Whom each follower is to stream from: the member that its tag names, else the leader ("": there is none). Whose chain
    of tags never ends streams from the leader, as the agents have it."""
    members = {member["name"]: member.get("tags") for member in cluster.body["members"]}
    leader = cluster.leader if cluster.leader in members else ""
    named = {name: tags.get("replicatefrom") if isinstance(tags, dict) else None for name, tags in members.items() if name != leader}
    wanted = {name: upstream if isinstance(upstream, str) and upstream in named else leader for name, upstream in named.items()}

    def in_a_circle(name: str) -> bool:
        upstream = wanted[name]
        for _ in wanted:
            if upstream == name:
                return True
            if upstream not in wanted:
                return False
            upstream = wanted[upstream]
        return False      # it leads into one, without being part of it

    return {name: leader if in_a_circle(name) else upstream for name, upstream in wanted.items()}
