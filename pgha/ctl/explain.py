"""`ctl explain`: what did a node decide in its last pass, by which rules, on which facts, how old?"""

from __future__ import annotations

import argparse
import json
from typing import Any

from pgha.ctl import agents
from pgha.ctl import cluster as clusters
from pgha.ctl.cluster import Cluster
from pgha.ctl.ends import DONE, FAILED, UNREACHABLE, USAGE, End
from pgha.ctl.output import plain
from pgha.ctl.settings import Settings


def run(settings: Settings, given: argparse.Namespace) -> int:
    as_json = given.json or given.format == "json"
    if given.suppose:
        from pgha.ctl import suppose

        return suppose.run(settings, given.node, given.suppose, as_json=as_json)
    decision = agents.get_json(settings, _url(settings, given.node), "/pgha/decision")
    print(json.dumps(decision, indent=2) if as_json else plain(words(decision)))
    return DONE


def _url(settings: Settings, node: str | None) -> str:
    """Where to ask: the node named, else the configured one, else the leader."""
    try:
        cluster = clusters.read(settings)
    except End as end:
        own = settings.own_agent if node in (None, settings.name) else ""
        if end.code != UNREACHABLE or not own:
            raise
        clusters.warn(end.text)
        return own
    name = node or (settings.name if settings.name in cluster.members else cluster.leader)
    if not name:
        raise End(USAGE, f"which node? there is no leader; allowed: explain {'|'.join(cluster.members) or 'NODE'}")
    return _member_url(cluster, name, settings)


def _member_url(cluster: Cluster, name: str, settings: Settings) -> str:
    if name not in cluster.members:
        if name == settings.name and settings.own_agent:
            return settings.own_agent
        raise End(USAGE, f"no such member: {name}; there are {', '.join(cluster.members) or 'none'}")
    url = cluster.api_url(name)
    if not url:
        raise End(FAILED, f"member {name} publishes no API address")
    return url


def words(decision: dict[str, Any]) -> str:
    """The decision for people."""
    node = f"role {decision.get('role') or 'none'}, PostgreSQL {decision.get('state') or 'unknown'}"
    when = f"decided {decision.get('age_s', '?')} s ago in pass {decision.get('pass', '?')}"
    lines = [f"{decision.get('node', '?')}: {decision.get('situation', '?')} ({node}), {when}", f"  {decision.get('summary', '')}"]
    reasons = [r for r in decision.get("reasons") or () if isinstance(r, dict)]
    if reasons:
        width = max(len(str(r.get("rule"))) for r in reasons)
        lines += ["", "conditions:"]
        lines += [f"  {'holds' if r.get('holds') else 'FAILS'}  {r.get('rule')!s:<{width}}  {r.get('because')}" for r in reasons]
    actions = [a for a in decision.get("actions") or () if isinstance(a, dict)]
    if actions:
        lines += ["", "actions:"]
        lines += [f"  {a.get('type', '?')} " + " ".join(f"{k}={json.dumps(v)}" for k, v in a.items() if k != "type" and v not in (None, "", [], {})) for a in actions]
    operation = decision.get("operation")
    if isinstance(operation, dict):
        lines += ["", f"in progress: {operation.get('kind')} for {operation.get('age_s')} s {operation.get('progress') or ''}".rstrip()]
    licence = decision.get("licence")
    if isinstance(licence, dict) and licence.get("state") not in (None, "none"):
        failing = f", renewals fail for {licence['failing_s']} s: {licence.get('failing_why')}" if licence.get("failing_s") is not None else ""
        lines += ["", f"licence: {licence['state']}{failing}"]
    ages = decision.get("ages_s")
    if isinstance(ages, dict):
        known = [f"{name.replace('_', ' ')} {age} s" for name, age in ages.items() if age is not None]
        lines += ["", "ages of the facts then: " + (", ".join(known) or "nothing was known")]
    problems = decision.get("problems") or ()
    if problems:
        lines += ["", "problems:", *(f"  {problem}" for problem in problems)]
    return "\n".join(lines)
