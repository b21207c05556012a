"""`ctl restart`: restart PostgreSQL on members, one after the other, the leader last, unless what is pending wants it first.

Which members are meant is found here, when it is to be done at once; what is scheduled takes its conditions along.
"""

from __future__ import annotations

import argparse
import re
import time
from typing import Any

from pgha.ctl import agents
from pgha.ctl import cluster as clusters
from pgha.ctl.cluster import Cluster, chosen
from pgha.ctl.ends import DONE, FAILED, REFUSED, UNREACHABLE, USAGE, End, code_of, of_several
from pgha.ctl.exchange import NoAnswer
from pgha.ctl.listing import shown
from pgha.ctl.output import say
from pgha.ctl.prompt import confirm
from pgha.ctl.settings import Settings
from pgha.model import rolling
from pgha.model.overview import is_paused

#: longer than the agent's own longest wait, so that its answer arrives
_TIMEOUT_S = 890.0
#: a standby that streams has replayed its primary's start in a moment
_REPLAY_S, _LOOK_S = 30.0, 0.2


def run(settings: Settings, given: argparse.Namespace) -> int:
    lower_than = None if given.pg_version is None else _version(given.pg_version)
    schedule = None
    if given.scheduled not in (None, "now"):
        from pgha.ctl.when import moment

        schedule = moment(given.scheduled)
    cluster = clusters.read(settings)
    print(shown(cluster), flush=True)
    if schedule and is_paused(cluster.config or {}):
        raise End(REFUSED, "Can't schedule restart in the paused state")
    body: dict[str, Any] = {} if given.timeout is None else {"timeout": given.timeout}
    names = chosen(cluster, given.members, role=given.role)
    codes: list[int] = []
    if schedule:
        # What is so at that time only the agent will know.
        role = {"primary": "primary", "standby-leader": "standby_leader", "replica": "replica"}.get(given.role)
        body |= {"schedule": schedule, **({"role": role} if role else {}), **({"restart_pending": True} if given.pending else {}), **({"postgres_version": given.pg_version} if given.pg_version else {})}
    else:
        if given.pending:
            names = [name for name in names if cluster.members[name].get("pending_restart")]
        if lower_than is not None:
            names, codes = _older(settings, cluster, names, lower_than, given.pg_version)
    if given.any:
        names = names[:1]
    if not names:
        raise End(of_several(codes or [REFUSED]), "no member is left to restart")
    plan = rolling.plan({name: _pending(cluster, name) for name in names}, leader=cluster.leader)
    if not schedule and plan.because:
        names = list(plan.steps)
        say(f"In this order: {rolling.said(plan.steps, cluster.leader)} ({plan.because})")
    if given.dry_run:
        from pgha.ctl import dry_run

        return max([*codes, *(dry_run.one(settings, cluster, name, "restart", body, what=f"restart of {name}" + (f" at {schedule}" if schedule else "")) for name in names)])
    what = f"schedule restart of members {', '.join(names)} at {schedule}" if schedule else f"restart members {', '.join(names)}"
    confirm(f"Are you sure you want to {what}?", force=given.force)
    if not schedule and plan.because:
        return of_several([*codes, *_in_order(settings, cluster, names, body)])
    codes += [_restart(settings, cluster, name, body) for name in names]
    return of_several(codes)


def _pending(cluster: Cluster, name: str) -> dict[str, Any]:
    reason = cluster.members[name].get("pending_restart_reason")
    return reason if isinstance(reason, dict) else {}


def _in_order(settings: Settings, cluster: Cluster, names: list[str], body: dict[str, Any]) -> list[int]:
    """One after the other, and no further than the first that fails: who comes later would be left with too little."""
    codes = []
    for number, name in enumerate(names):
        if number and names[number - 1] == cluster.leader:
            _wait_replayed(settings, cluster, names[number:])
        codes.append(_restart(settings, cluster, name, body))
        if codes[-1] != DONE:
            if left := names[number + 1:]:
                clusters.warn(f"not restarted, since the order matters: {', '.join(left)}")
            break
    return codes


def _wait_replayed(settings: Settings, cluster: Cluster, standbys: list[str]) -> None:
    """A standby may have less only once it has replayed that its primary has."""
    until_s = time.monotonic() + _REPLAY_S
    left = list(dict.fromkeys(standbys))
    reached: int | None = None
    while left and time.monotonic() < until_s:
        reached = _position(settings, cluster, cluster.leader, "location") if reached is None else reached
        left = [name for name in left if reached is None or (_position(settings, cluster, name, "replayed_location") or 0) < reached]
        if left:
            time.sleep(_LOOK_S)
    if left:
        clusters.warn(f"{', '.join(left)}: has not replayed up to the restart of {cluster.leader} within {_REPLAY_S:g} s; it may have to be restarted once more")


def _position(settings: Settings, cluster: Cluster, name: str, key: str) -> int | None:
    """None if it does not say."""
    try:
        xlog = agents.get_json(settings, cluster.api_url(name), "/patroni").get("xlog")
    except End:
        return None
    value = xlog.get(key) if isinstance(xlog, dict) else None
    return value if isinstance(value, int) else None


def _version(text: str) -> int:
    """'15.6' → 150006, as the server counts; '16' is 16.0."""
    match = re.fullmatch(r"([1-9]\d)(?:\.(\d{1,3}))?", text.strip())
    if match is None:
        raise End(USAGE, f"--pg-version {text}: is no version of PostgreSQL, as 16 or 16.4")
    return int(match[1]) * 10000 + int(match[2] or 0)


def _older(settings: Settings, cluster: Cluster, names: list[str], lower_than: int, named: str) -> tuple[list[str], list[int]]:
    """Who runs a lower version than that, and the codes of those who cannot be asked."""
    older, codes = [], []
    for name in names:
        try:
            number = agents.get_json(settings, cluster.api_url(name), "/patroni").get("server_version")
        except End as end:
            clusters.warn(f"Failed: restart for member {name}: {end.text}")
            codes.append(end.code)
            continue
        if not isinstance(number, int):
            clusters.warn(f"Failed: restart for member {name}: it does not say which version it runs")
            codes.append(FAILED)
        elif number < lower_than:
            older.append(name)
        else:
            clusters.warn(f"{name} runs {number // 10000}.{number % 10000}, which is not below {named}, and is left out")
    return older, codes


def _restart(settings: Settings, cluster: Cluster, name: str, body: dict[str, Any]) -> int:
    url = cluster.api_url(name)
    if not url:
        clusters.warn(f"Failed: restart for member {name}: it publishes no API address")
        return UNREACHABLE
    try:
        answer = agents.ask(settings, url, "POST", "/restart", body=body, timeout_s=_TIMEOUT_S)
    except NoAnswer as failure:
        return agents.unheard(f"restart for member {name}", failure)
    if answer.status == 200:
        say(f"Success: restart on member {name}")
        return DONE
    if answer.status == 202:
        say(f"Success: restart scheduled on member {name}")
        return DONE
    if answer.status == 409:
        clusters.warn(f"Failed: another restart is already scheduled on member {name}")
        return code_of(answer.status, answer.body.decode(errors="replace"))
    return agents.refused(f"restart for member {name}", answer)
