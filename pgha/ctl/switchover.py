"""`ctl switchover` and `ctl failover`: ask the leader's agent (without a leader: the candidate's), wait for the outcome.

If the agent cannot be reached, the request is written to /failover directly, where the agents look for it anyway. If
it was reached and its answer got lost, nothing is sent twice: the store shows the outcome.
"""

from __future__ import annotations

import argparse
import json
import time
from datetime import datetime
from typing import Any

from pgha.ctl import agents
from pgha.ctl import cluster as clusters
from pgha.ctl.cluster import Cluster
from pgha.ctl.ends import DONE, FAILED, REFUSED, UNKNOWN, UNREACHABLE, End, code_of
from pgha.ctl.exchange import NoAnswer
from pgha.ctl.listing import shown
from pgha.ctl.output import say
from pgha.ctl.prompt import choose, confirm
from pgha.ctl.settings import Settings
from pgha.ctl.store import Store
from pgha.model.overview import is_paused, synchronous, synchronous_names


def run(settings: Settings, given: argparse.Namespace) -> int:
    kind: str = given.command
    schedule = ""
    if getattr(given, "scheduled", None) not in (None, "now"):
        from pgha.ctl.when import moment

        schedule = moment(given.scheduled)
    cluster = clusters.read(settings)
    print("Current cluster topology")
    print(shown(cluster), flush=True)
    leader = (getattr(given, "leader", None) or cluster.leader) if kind == "switchover" else ""
    candidate = given.candidate or ""
    down = bool(getattr(given, "holder_is_down", False))
    candidates = [name for name, raw in cluster.members.items() if name != cluster.leader and not _nofailover(raw)]
    if given.dry_run:
        from pgha.ctl import dry_run

        if kind == "failover" and _is_asynchronous(cluster, candidate):
            _warn_of_loss(candidate)
        known = [*_about_leader(settings, cluster, kind, leader, schedule), *_about_candidate(settings, cluster, kind, candidate, candidates)]
        return dry_run.move(settings, cluster, kind, leader=leader, candidate=candidate, schedule=schedule, down=down, known=known)
    _refuse(_about_leader(settings, cluster, kind, leader, schedule))
    if not candidate and not given.force:
        candidate = choose(f"Candidate {candidates}")
    _refuse(_about_candidate(settings, cluster, kind, candidate, candidates))
    if kind == "failover" and _is_asynchronous(cluster, candidate):
        if given.force:
            _warn_of_loss(candidate)
        confirm(f"Are you sure you want to failover to the asynchronous node {candidate}?", force=given.force)
    demoting = f", demoting current leader {cluster.leader}" if cluster.leader else ""
    if down:
        confirm(f"Are you sure that {cluster.leader or 'whoever led last'} is down and that nobody can write to its PostgreSQL any more?", force=given.force)
    what = f"schedule {kind} of cluster {settings.scope} at {schedule}" if schedule else f"{kind} cluster {settings.scope}"
    confirm(f"Are you sure you want to {what}{demoting}?", force=given.force)
    body: dict[str, Any] = {key: value for key, value in (("leader", leader), ("candidate", candidate), ("scheduled_at", schedule)) if value}
    status, text = _schedule(settings, cluster, body) if schedule else _ask(settings, cluster, kind, body, down=down)
    code = code_of(status, text)
    if code != DONE:
        raise End(code, f"{kind.capitalize()} failed, details: {status}, {text}" if code != UNKNOWN else text)
    say(f"{datetime.now().strftime('%Y-%m-%d %H:%M:%S.%f')[:25]} {text}")
    try:
        print(shown(clusters.read(settings)))
    except End as end:
        clusters.warn(end.text)      # it is done all the same
    return DONE


def _refuse(known: list[str]) -> None:
    if known:
        raise End(REFUSED, known[0])


def _about_leader(settings: Settings, cluster: Cluster, kind: str, leader: str, schedule: str) -> list[str]:
    """Why nobody need be asked, before a candidate is chosen."""
    said = []
    if kind == "switchover" and not cluster.leader:
        said.append("this cluster has no leader; allowed: failover --candidate NAME")
    elif kind == "switchover" and leader != cluster.leader:
        said.append(f"member {leader} is not the leader of cluster {settings.scope}; {cluster.leader} is")
    if schedule and is_paused(cluster.config or {}):
        said.append("Can't schedule switchover in the paused state")
    return said


def _about_candidate(settings: Settings, cluster: Cluster, kind: str, candidate: str, candidates: list[str]) -> list[str]:
    if kind == "failover" and not candidate:
        return ["failover could be performed only to a specific candidate; allowed: --candidate NAME"]
    if candidate and candidate == cluster.leader:
        return [f"member {candidate} is already the leader of cluster {settings.scope}"]
    if candidate and candidate not in candidates:
        return [f"member {candidate} does not exist in cluster {settings.scope} or is tagged as nofailover"]
    return [] if candidates else [f"no candidates found to {kind} to"]


def _nofailover(raw: dict[str, Any]) -> bool:
    tags = raw.get("tags")
    return isinstance(tags, dict) and (tags.get("nofailover") is True or tags.get("failover_priority", 1) == 0)


def _is_asynchronous(cluster: Cluster, name: str) -> bool:
    """Can commits that a client saw be missing there? As far as /sync tells: what an empty one means, the agents judge."""
    try:
        sync = json.loads(cluster.keys["sync"].value)
    except (KeyError, ValueError, RecursionError):
        return False
    if not isinstance(sync, dict) or not sync.get("leader") or not synchronous(cluster.config or {}):
        return False
    return name in cluster.members and name.lower() not in {str(sync["leader"]).lower(), *synchronous_names(sync)}


def _warn_of_loss(candidate: str) -> None:
    clusters.warn(f"warning: {candidate} is an asynchronous node: a failover to it may lose commits")


def _stated_down(cluster: Cluster) -> dict[str, Any]:
    """Of which record it is said that its holder is down: void as soon as that holder renews it."""
    try:
        lock = json.loads(cluster.keys["pgha/lock"].value)
        if lock["mode"] == "paused":
            return {"holder": lock["holder"], "incarnation": lock["incarnation"], "sequence": lock["sequence"]}
    except (KeyError, TypeError, ValueError, RecursionError):
        pass
    raise End(REFUSED, "--holder-is-down is for a lock that was paused: any other expires by itself")


def _schedule(settings: Settings, cluster: Cluster, body: dict[str, Any]) -> tuple[int, str]:
    """HTTP status and text. Only an agent can promise to think of it: what is written to the store without one may find
    nobody who does it."""
    try:
        answer = agents.ask(settings, cluster.api_url(cluster.leader), "POST", "/switchover", body=body)
    except NoAnswer as failure:
        why = "whether it is scheduled, list shows" if failure.sent else "nothing was scheduled"
        raise End(UNKNOWN if failure.sent else UNREACHABLE, f"{failure}: {why}") from None
    return answer.status, answer.body.decode(errors="replace")


def _ask(settings: Settings, cluster: Cluster, kind: str, body: dict[str, Any], *, down: bool) -> tuple[int, str]:
    """HTTP status and text, by whichever way it went."""
    limit_s = 2 * max(10.0, _loop_wait_s(cluster)) + 5.0
    candidate_url = cluster.api_url(body.get("candidate", ""))
    url = candidate_url if down else cluster.api_url(cluster.leader) or candidate_url
    if url:
        try:
            asked = {**body, "pgha": {"holder_is_down": True}} if down else body
            answer = agents.ask(settings, url, "POST", f"/{kind}", body=asked, timeout_s=limit_s)
            return answer.status, answer.body.decode(errors="replace")
        except NoAnswer as failure:
            clusters.warn(str(failure))
            if failure.sent:
                return outcome(settings, cluster, kind, body.get("candidate", ""), limit_s, written=False)
    clusters.warn("no agent can be asked; writing the request to the store")
    value = {"leader": body.get("leader"), "member": body.get("candidate"), "pgha": {"holder_is_down": _stated_down(cluster)} if down else None}
    key = cluster.keys.get("failover")
    written = Store(settings.etcd).write(settings.root + "failover", json.dumps({k: v for k, v in value.items() if v}, separators=(",", ":")).encode(),
                                         if_revision=key.revision if key else 0)
    if not written:
        raise End(FAILED, "another request was written at the same time; look and try again")
    return outcome(settings, cluster, kind, body.get("candidate", ""), limit_s, written=True)


def outcome(settings: Settings, before: Cluster, kind: str, candidate: str, limit_s: float, *, written: bool) -> tuple[int, str]:
    """What the store shows within the time: another leader, or the request gone without one. Not `written`: whether it is in
    the store is not known, so that a key as it was before says nothing; only one that was changed since has had it."""
    revision = before.keys["failover"].revision if "failover" in before.keys else 0
    past = "switched" if kind == "switchover" else "failed"
    give_up_at = time.monotonic() + limit_s
    while time.monotonic() < give_up_at:
        time.sleep(0.5)      # a poll of the store, twice a second
        try:
            keys = Store(settings.etcd).read(settings.root)
        except End as end:
            if end.code != UNREACHABLE:
                raise
            continue             # no word is no outcome
        now = clusters.understood(settings.scope, keys, quiet=True)
        if now.leader and now.leader != before.leader:
            return 200, f'Successfully {past} over to "{now.leader}"' if candidate in ("", now.leader) else f'{past.capitalize()} over to "{now.leader}" instead of "{candidate}"'
        key = keys.get("failover")
        if now.leader and (key is None or key.value == b"{}") and (written or (key.revision if key else 0) != revision):
            return 503, f"{kind.capitalize()} failed"
    return 503, f"{kind.capitalize()} status unknown after {limit_s:g} seconds; operation may still be in progress"


def _loop_wait_s(cluster: Cluster) -> float:
    value = (cluster.config or {}).get("loop_wait", 10)
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else 10.0
