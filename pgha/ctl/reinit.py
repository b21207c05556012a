"""`ctl reinit`: let members throw their data away and copy the leader's (or another member's) anew.

The members are named, or asked for: there is no "all". With --wait the end is the truth: pgha's agents say what became of the
request; of the reference's it is seen that PostgreSQL was started anew and runs.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

from pgha.ctl import agents
from pgha.ctl import cluster as clusters
from pgha.ctl.cluster import Cluster, chosen, known, without_scope
from pgha.ctl.ends import DONE, FAILED, REFUSED, UNKNOWN, USAGE, End, of_several
from pgha.ctl.exchange import NoAnswer
from pgha.ctl.listing import shown
from pgha.ctl.output import say
from pgha.ctl.prompt import choose, confirm, wanted
from pgha.ctl.settings import Settings

_POLL_S = 0.5
#: how long a member may neither copy, nor start, nor answer, before nobody knows what became of it
_QUIET_S = 120.0
_BUSY = "already in progress"


def run(settings: Settings, given: argparse.Namespace) -> int:
    cluster = clusters.read(settings)
    print(shown(cluster), flush=True)
    names = _meant(cluster, given)
    if given.dry_run:
        from pgha.ctl import dry_run

        body = {"force": given.force, **({"from_leader": True} if given.from_leader else {})}
        return max(dry_run.one(settings, cluster, name, "reinitialize", body, what=f"reinitialize of {name}") for name in names)
    confirm(f"Are you sure you want to reinitialize members {', '.join(names)}?", force=given.force)
    before = {name: _state(settings, cluster, name) for name in names}
    codes = {name: _ask(settings, cluster, name, force=given.force, from_leader=given.from_leader) for name in names}
    waiting = [name for name in names if codes[name] == DONE]
    if given.wait and waiting:
        codes |= wait_for(settings, cluster, waiting, before)
    return of_several(list(codes.values()))


def _meant(cluster: Cluster, given: argparse.Namespace) -> list[str]:
    asked_for = without_scope(cluster, given.members)
    replicas = chosen(cluster, [], role="replica")
    if not asked_for and replicas and not given.force:
        asked_for = [name for name in choose(f"Which member do you want to reinitialize {replicas}?").replace(",", " ").split() if name]
    if not asked_for:
        raise End(USAGE, f"which member? There are {', '.join(replicas) or 'no replicas'}")
    if not set(asked_for) & set(replicas):
        raise End(REFUSED, f"No replica among provided members; there are {', '.join(replicas) or 'none'}")
    names = known(cluster, asked_for, scope_named=given.members[:1] == [cluster.scope])
    if cluster.leader in names:
        clusters.warn(f"{cluster.leader} is the leader, and is left out")
    return [name for name in names if name in replicas]


class State(NamedTuple):
    """What a member says of its PostgreSQL; all empty if it does not answer. `started_at`: of the server. `asked`: what pgha's
    agent says of the last request to reinitialize."""

    state: str = ""
    started_at: str = ""
    is_pgha: bool = False
    asked: Mapping[str, Any] = {}

    def is_anew(self, before: State, *, copied: bool) -> bool:
        """Does another server run than before? If it is not known what ran before, only who was seen to copy counts."""
        known = before.started_at != "" or before.state not in ("", "unknown", "running")
        return self.state == "running" and self.started_at != "" and (copied or (known and self.started_at != before.started_at))


def _state(settings: Settings, cluster: Cluster, name: str) -> State:
    try:
        body: Any = json.loads(agents.ask(settings, cluster.api_url(name), "GET", "/patroni").body)
    except (NoAnswer, ValueError, RecursionError):
        return State()
    if not isinstance(body, dict):
        return State()
    own = body.get("pgha")
    asked = own.get("reinitialize") if isinstance(own, dict) else None
    return State(str(body.get("state", "")), str(body.get("postmaster_start_time", "")), isinstance(own, dict), asked if isinstance(asked, dict) else {})


def _ask(settings: Settings, cluster: Cluster, name: str, *, force: bool, from_leader: bool) -> int:
    what = f"reinitialize for member {name}"
    body: dict[str, Any] = {"force": force, **({"from_leader": True} if from_leader else {})}
    while True:
        try:
            answer = agents.ask(settings, cluster.api_url(name), "POST", "/reinitialize", body=body)
        except NoAnswer as failure:
            return agents.unheard(what, failure)
        if answer.status == 200:
            say(f"Success: {what}")
            return DONE
        code = agents.refused(what, answer)
        if not answer.body.decode(errors="replace").endswith(_BUSY) or body["force"] or not wanted("Do you want to cancel it and reinitialize anyway?"):
            return code
        body["force"] = True


def wait_for(settings: Settings, cluster: Cluster, names: list[str], before: Mapping[str, State], *, quiet_s: float = _QUIET_S) -> dict[str, int]:
    """Until PostgreSQL of all of them runs anew: as long as they copy, for that takes what it takes."""
    codes: dict[str, int] = {}
    copied: set[str] = set()
    heard_at = dict.fromkeys(names, time.monotonic())
    waiting, told = list(names), 0
    while waiting:
        if len(waiting) != told:
            say(f"Waiting for reinitialize to complete on: {', '.join(waiting)}")
            told = len(waiting)
        time.sleep(_POLL_S)      # a poll of the members
        for name in list(waiting):
            now = _state(settings, cluster, name)
            if now.state == "creating replica":
                copied.add(name)
            if (code := _told(name, now, before[name], copied=name in copied)) is not None:
                codes[name] = code
            elif now.asked.get("state") == "running" or now.state in ("creating replica", "starting"):
                heard_at[name] = time.monotonic()
            elif time.monotonic() - heard_at[name] > quiet_s:
                clusters.warn(f"{name}: for {quiet_s:g} s it {f'says that its PostgreSQL is {now.state}' if now.state else 'has not answered'}; what became of it: explain {name}")
                codes[name] = UNKNOWN
        waiting = [name for name in waiting if name not in codes]
    return codes


def _told(name: str, now: State, before: State, *, copied: bool) -> int | None:
    """What is known of the outcome; None: nothing yet."""
    if now.is_pgha and (not now.asked or now.asked.get("request") == before.asked.get("request")):
        clusters.warn(f"{name}: its agent was started again, and knows nothing of the request any more; what its data is: explain {name}")
        return UNKNOWN
    if now.asked.get("state") == "failed":
        clusters.warn(f"Failed: reinitialize for member {name}: {now.asked.get('why') or 'it does not say why'}; its data is as before")
        return FAILED
    done = now.asked.get("state") == "done" and now.state == "running" if now.is_pgha else now.is_anew(before, copied=copied)
    if done:
        say(f"Reinitialize is completed on: {name}")
    return DONE if done else None
