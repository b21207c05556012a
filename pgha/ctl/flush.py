"""`ctl flush restart` and `ctl flush switchover`: take back what was scheduled and has not begun.

What is not there needs no taking back: that is said, and no failure.
"""

from __future__ import annotations

import argparse

from pgha.ctl import agents
from pgha.ctl import cluster as clusters
from pgha.ctl.cluster import Cluster, chosen
from pgha.ctl.ends import DONE, FAILED, REFUSED, End, of_several
from pgha.ctl.exchange import NoAnswer
from pgha.ctl.output import say
from pgha.ctl.prompt import confirm
from pgha.ctl.settings import Settings
from pgha.ctl.store import Store


def run(settings: Settings, given: argparse.Namespace) -> int:
    cluster = clusters.read(settings)
    names = chosen(cluster, given.members, role=given.role)
    return _restarts(settings, cluster, names, force=given.force) if given.target == "restart" else _switchover(settings, cluster)


def _restarts(settings: Settings, cluster: Cluster, names: list[str], *, force: bool) -> int:
    if not names:
        raise End(REFUSED, "no member is left to flush scheduled restarts of")
    scheduled = []
    for name in names:
        if cluster.members[name].get("scheduled_restart"):
            scheduled.append(name)
        else:
            say(f"No scheduled restart for member {name}")
    if not scheduled:
        return DONE
    confirm(f"Are you sure you want to flush members {', '.join(scheduled)}?", force=force)
    return of_several([_flush(settings, cluster, name) for name in scheduled])


def _flush(settings: Settings, cluster: Cluster, name: str) -> int:
    what = f"flush scheduled restart for member {name}"
    try:
        answer = agents.ask(settings, cluster.api_url(name), "DELETE", "/restart")
    except NoAnswer as failure:
        return agents.unheard(what, failure)
    if answer.status == 200:
        say(f"Success: {what}")
        return DONE
    return agents.refused(what, answer)


def _switchover(settings: Settings, cluster: Cluster) -> int:
    if not cluster.body.get("scheduled_switchover"):
        print("No pending scheduled switchover")
        return DONE
    for name in sorted(cluster.members, key=lambda name: (name != cluster.leader, name)):
        try:
            answer = agents.ask(settings, cluster.api_url(name), "DELETE", "/switchover")
        except NoAnswer as failure:
            clusters.warn(f"{name}: {failure}")      # whether it arrived or not: asking another for the same does no harm
            continue
        text = answer.body.decode(errors="replace")
        if answer.status == 200:
            say(f"Success: {text}")
            return DONE
        if answer.status == 404:
            raise End(REFUSED, f"Failed: {text}")
        clusters.warn(f"Failed: member={name}, status_code={answer.status}, ({text})")
    clusters.warn(f"Could not find any accessible member of cluster {settings.scope}; writing to the store")
    if not Store(settings.etcd).write(settings.root + "failover", b"{}", if_revision=cluster.keys["failover"].revision):
        raise End(FAILED, "the request was changed at the same time; look and try again")
    print("Success: scheduled switchover deleted")
    return DONE
