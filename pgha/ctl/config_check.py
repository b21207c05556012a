"""What do the agents, and their PostgreSQL, say of a configuration before it is written? Each is asked; nothing changes.

`pgha ctl edit-config` writes to the store itself, as the reference does, and can judge all but PostgreSQL's parameters.
"""

from __future__ import annotations

import json
from typing import Any, NamedTuple

from pgha.ctl import agents
from pgha.ctl.cluster import Cluster
from pgha.ctl.exchange import NoAnswer
from pgha.ctl.settings import Settings
from pgha.model.rolling import Plan, plan

#: the agent's own limit is 10 s
_TIMEOUT_S = 12.0


class Checked(NamedTuple):
    """`asked`: the members whose agents answered. `restart`: member → parameter → {"old_value", "new_value"}: what waits for
    a restart there once this is written. `unheard`: "n3: why"."""

    problems: list[str]
    warnings: list[str]
    restart: dict[str, dict[str, Any]]
    asked: list[str]
    unheard: list[str]


def check(settings: Settings, cluster: Cluster, old: dict[str, Any], new: dict[str, Any]) -> Checked:
    """Ask every member's agent, the leader's first."""
    found = Checked([], [], {}, [], [])
    said: dict[str, dict[str, list[str]]] = {"problems": {}, "warnings": {}}
    for name in sorted(cluster.members, key=lambda name: (name != cluster.leader, name)):
        answer = _ask(settings, cluster, name, {"config": new, "old": old})
        if isinstance(answer, str):
            found.unheard.append(f"{name}: {answer}")
            continue
        found.asked.append(name)
        for kind, lines in said.items():
            for line in answer.get(kind) or ():
                lines.setdefault(str(line), []).append(name)
        restart = answer.get("restart")
        if isinstance(restart, dict) and restart:
            found.restart[name] = restart
    for kind, into in (("problems", found.problems), ("warnings", found.warnings)):
        # What all say is the configuration's; what one says is that member's.
        into += [line if len(names) == len(found.asked) else f"{', '.join(names)}: {line}" for line, names in said[kind].items()]
    return found


def _ask(settings: Settings, cluster: Cluster, name: str, body: dict[str, Any]) -> dict[str, Any] | str:
    """The answer, or why there is none."""
    try:
        answer = agents.ask(settings, cluster.api_url(name), "POST", "/pgha/config/check", body=body, timeout_s=_TIMEOUT_S)
    except NoAnswer as failure:
        return str(failure)
    try:
        value = json.loads(answer.body) if answer.status == 200 else None
    except ValueError:
        value = None
    return value if isinstance(value, dict) else f"status {answer.status}"


def restart_plan(cluster: Cluster, checked: Checked) -> Plan:
    """Who will have to be restarted, and in which order."""
    return plan(checked.restart, leader=cluster.leader)


def shown_restarts(restart: dict[str, dict[str, Any]]) -> list[str]:
    """"n1: max_connections 100 → 200", one line a member."""
    lines = []
    for name, pending in sorted(restart.items()):
        changes = ", ".join(f"{parameter} {change.get('old_value')} → {change.get('new_value')}" for parameter, change in sorted(pending.items()) if isinstance(change, dict))
        lines.append(f"{name}: {changes}")
    return lines
