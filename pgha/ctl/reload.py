"""`ctl reload`: let agents read their configuration again."""

from __future__ import annotations

import argparse

from pgha.ctl import agents
from pgha.ctl import cluster as clusters
from pgha.ctl.cluster import chosen
from pgha.ctl.ends import DONE, REFUSED, End, of_several
from pgha.ctl.exchange import NoAnswer
from pgha.ctl.listing import shown
from pgha.ctl.output import say
from pgha.ctl.prompt import confirm
from pgha.ctl.settings import Settings

#: The agent takes up to 10 s: it reads its files, and the next pass applies them.
AGENT_S = 12.0


def run(settings: Settings, given: argparse.Namespace) -> int:
    cluster = clusters.read(settings)
    print(shown(cluster), flush=True)
    names = chosen(cluster, given.members, role=given.role)
    if not names:
        raise End(REFUSED, "no member is left to reload")
    confirm(f"Are you sure you want to reload members {', '.join(names)}?", force=given.force)
    loop_wait = (cluster.config or {}).get("loop_wait", 10)
    codes = []
    for name in names:
        try:
            answer = agents.ask(settings, cluster.api_url(name), "POST", "/reload", timeout_s=AGENT_S)
        except NoAnswer as failure:
            codes.append(agents.unheard(f"reload for member {name}", failure))
            continue
        if answer.status in (200, 202):
            codes.append(DONE)
            say(f"Reload request received for member {name} and will be processed within {loop_wait} seconds")
        else:
            codes.append(agents.refused(f"reload for member {name}", answer))
    return of_several(codes)
