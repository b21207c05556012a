"""`ctl restart`: restart PostgreSQL on members, one after the other, the leader last."""

from __future__ import annotations

import argparse

from pgha.ctl import agents
from pgha.ctl import cluster as clusters
from pgha.ctl.cluster import Cluster, chosen
from pgha.ctl.ends import DONE, REFUSED, UNKNOWN, UNREACHABLE, End, code_of
from pgha.ctl.exchange import NoAnswer
from pgha.ctl.listing import shown
from pgha.ctl.prompt import confirm
from pgha.ctl.settings import Settings

#: longer than the agent's own longest wait, so that its answer arrives
_TIMEOUT_S = 890.0


def run(settings: Settings, given: argparse.Namespace) -> int:
    cluster = clusters.read(settings)
    print(shown(cluster), flush=True)
    names = chosen(cluster, given.members, role=given.role)
    if given.pending:
        names = [name for name in names if cluster.members[name].get("pending_restart")]
    if given.any:
        names = names[:1]
    if not names:
        raise End(REFUSED, "no member is left to restart")
    confirm(f"Are you sure you want to restart members {', '.join(names)}?", force=given.force)
    body = {} if given.timeout is None else {"timeout": given.timeout}
    codes = [_restart(settings, cluster, name, body) for name in names]
    return max(codes)


def _restart(settings: Settings, cluster: Cluster, name: str, body: dict[str, str]) -> int:
    url = cluster.api_url(name)
    if not url:
        clusters.warn(f"Failed: restart for member {name}: it publishes no API address")
        return UNREACHABLE
    try:
        answer = agents.ask(settings, url, "POST", "/restart", body=body, timeout_s=_TIMEOUT_S)
    except NoAnswer as failure:
        clusters.warn(f"Failed: restart for member {name}: {failure}")
        return UNKNOWN if failure.sent else UNREACHABLE
    text = answer.body.decode(errors="replace")
    if answer.status == 200:
        print(f"Success: restart on member {name}", flush=True)
        return DONE
    clusters.warn(f"Failed: restart for member {name}, status code={answer.status}, ({text})")
    return code_of(answer.status, text)
