"""`ctl version`: of this program, and of agents and their PostgreSQL if members are named."""

from __future__ import annotations

import argparse

from pgha import __version__
from pgha.ctl import agents
from pgha.ctl import cluster as clusters
from pgha.ctl.cluster import members_named
from pgha.ctl.ends import DONE, End, of_several
from pgha.ctl.output import say
from pgha.ctl.settings import Settings


def run(settings: Settings | None, given: argparse.Namespace) -> int:
    print(f"pgha ctl version {__version__}")
    if settings is None:
        return DONE
    cluster = clusters.read(settings)
    codes = []
    for name in members_named(cluster, given.members):
        try:
            body = agents.get_json(settings, cluster.api_url(name), "/patroni")
        except End as end:
            clusters.warn(f"{name}: {end.text}")
            codes.append(end.code)
            continue
        codes.append(DONE)
        number = body.get("server_version")
        postgres = f" PostgreSQL {number // 10000}.{number % 10000}" if isinstance(number, int) and number >= 100000 else ""
        own = body.get("pgha")
        if isinstance(own, dict):
            product = f"pgha {own.get('version')}"
        else:
            theirs = body.get("patroni")
            product = f"Patroni {theirs.get('version')}" if isinstance(theirs, dict) else "a program that does not say which it is"
        say(f"{name}: {product}{postgres}")
    return of_several(codes)
