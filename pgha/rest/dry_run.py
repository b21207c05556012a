"""POST /pgha/dry-run/{switchover,failover,restart,reinitialize}: what would be done, and what would refuse it. Changes nothing.

Asked like the command itself, with its body, by whom may ask for that. 200 with the judgement (foresee.dry_run.DryRun), also
if it would be refused; what is no request at all is answered as the command answers it.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec
from msgspec.structs import replace

from pgha.clock import Instant
from pgha.foresee import dry_run
from pgha.foresee.dry_run import DryRun
from pgha.model.decision import Memory, Reason
from pgha.model.observation import Observation
from pgha.rest.published import Published
from pgha.rest.redaction import redact
from pgha.rest.requests import (
    Requests,
    Wrong,
    name_in,
    object_of,
    preconditions,
    reinitialize_options,
    restart_options,
    stated_down,
)
from pgha.rest.wire import Request, Response, json_response, quoting_response, text_response

PREFIX = "/pgha/dry-run/"
COMMANDS = ("switchover", "failover", "restart", "reinitialize")


def is_one(request: Request) -> bool:
    return request.method == "POST" and request.path.startswith(PREFIX)


async def answer(request: Request, published: Published, requests: Requests, *, now: Instant, wall_s: float) -> Response:
    try:
        return await _answer(request, published, requests, now=now, wall_s=wall_s)
    except Wrong as wrong:
        return quoting_response(wrong.status, wrong.text) if wrong.quotes else text_response(wrong.status, wrong.text)


async def _answer(request: Request, published: Published, requests: Requests, *, now: Instant, wall_s: float) -> Response:
    command: Any = request.path.removeprefix(PREFIX).strip("/")
    if command not in COMMANDS:
        raise Wrong(404, f"not known: {request.path[:100]}; allowed: {PREFIX} and one of {', '.join(COMMANDS)}", quotes=True)
    if published.observation is None:
        return text_response(503, "no pass yet")
    seen, memory = replace(published.observation, now=now), published.memory or Memory()
    match command:
        case "restart":
            options = _asked(command, published, lambda: restart_options(object_of(request, required=False), paused=published.health.paused, wall_s=wall_s))
            judged = options if isinstance(options, DryRun) else dry_run.restart(seen, memory, options)
        case "reinitialize":
            judged = dry_run.reinitialize(seen, memory, reinitialize_options(object_of(request, required=False)))
        case _:
            judged = await _move(command, request, published, requests, seen, wall_s=wall_s)
    return json_response(redact(msgspec.to_builtins(judged)))


def _asked(command: Any, published: Published, check: Any) -> Any:
    """What `check` returns; or the refusal that it raises, unless what was asked is no request at all."""
    try:
        return check()
    except Wrong as wrong:
        if wrong.status in (400, 411) and "paused state" not in wrong.text:
            raise
        return dry_run.refused(command, published.node.name, Reason(rule="request", holds=False, because=wrong.text))


async def _move(command: Literal["switchover", "failover"], request: Request, published: Published, requests: Requests, seen: Observation, *,
                wall_s: float) -> DryRun:
    """Also what is known to be impossible is judged by the rules, so that every obstacle is named."""
    body = object_of(request)
    leader, candidate = name_in(body, "leader"), name_in(body, "candidate") or name_in(body, "member")
    kind = "switchover" if leader else command
    known = _asked(kind, published, lambda: preconditions(kind, leader, candidate, body.get("scheduled_at"), published, wall_s=wall_s))
    if isinstance(known, str) and known:
        return dry_run.scheduled("switchover", published.node.name, known, published.leader or leader)
    key: dict[str, Any] = {name: value for name, value in (("leader", leader), ("member", candidate)) if value}
    own = body.get("pgha")
    if isinstance(own, dict) and own.get("holder_is_down"):
        stated = _asked(kind, published, lambda: stated_down(kind, published))
        known = stated if isinstance(stated, DryRun) else known
        key |= {} if isinstance(stated, DryRun) else {"pgha": {"holder_is_down": stated}}
    seen = replace(seen, peers=await requests.others())
    judged = dry_run.move("switchover" if kind == "switchover" else "failover", seen, published.memory or Memory(), leader=leader, candidate=candidate, key=key)
    if not isinstance(known, DryRun):
        return judged
    return replace(judged, would=False, refused_by=(*known.refused_by, *judged.refused_by), conditions=(*known.refused_by, *judged.conditions), steps=())
