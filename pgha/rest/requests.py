"""Requests that change something: POST, PATCH, PUT, DELETE. REST never acts.

It checks what can be known to be wrong at once (the reference's texts, compatibility spec 11.1), hands the rest to the
loop through `Requests`, and waits for what the loop publishes. The loop decides in a pass like any other.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Protocol

import trio
from msgspec import Struct
from msgspec.structs import replace

from pgha.clock import candidate_age_s
from pgha.decide.standing import still_sends
from pgha.model.failsafe import Ping
from pgha.model.lock import wait_s
from pgha.model.overview import by_quorum, synchronous, synchronous_names
from pgha.rest.published import Board, Published
from pgha.rest.wire import JSON, Request, Response, text_response

#: for a request that is only a write to the store
WRITE_S = 10.0
#: at most this long for a restart, whatever timeouts say; below the server's own bound
RESTART_AT_MOST_S = 880.0


class Answer(Struct, frozen=True, kw_only=True):
    """What became of a request. `revision`: of the store after the write, if it was one: outcomes are read only from
    views at least as new. `json`: the text is JSON."""

    status: int
    text: str
    revision: int = 0
    json: bool = False


class Requests(Protocol):
    """The way from REST to the loop."""

    async def submit(self, kind: str, payload: Mapping[str, Any], *, deadline_s: float) -> Answer:
        """Hand in a request and wait for its answer, at most `deadline_s` (then an Answer 503 that says so).

        switchover, failover: {"leader"?, "member"?, "pgha"?}: write /failover, answer 200 and the revision, or 503 and the text
        "failed to write failover key into DCS". cancel_switchover: {}: empty /failover. restart: {"timeout_s"?}: waits
        for its end. reload: {}: 202. patch_config, put_config: the object: a guarded write after validation; 200 and the
        new configuration as JSON, 400 and the problems, 409, 503. check_config: {"config": …, "old"?: …}: the same judgement,
        and what it would do to PostgreSQL on this node, as JSON; nothing is written.
        """
        ...

    def failsafe(self, ping: Ping) -> tuple[Answer, int]:
        """Answer a leader that cannot reach the store, and this node's last known position. Never blocks, never awaits:
        what is checked and what is promised are one step (safety model 12)."""
        ...

    def wake(self, why: str, epoch: int) -> None:
        """Let the loop know at once that somebody asks for a vote in the election after `epoch`, or, -1, for the position
        as it is ("observation asked": for a pass of now as well). Never blocks."""
        ...


class _Wrong(Exception):
    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status
        self.text = text


class Changes:
    """The unsafe endpoints."""

    def __init__(self, board: Board, requests: Requests) -> None:
        self._board = board
        self._requests = requests
        self._routes: dict[tuple[str, str], Callable[[Request], Awaitable[Response]]] = {
            ("PATCH", "config"): self._patch_config,
            ("PUT", "config"): self._put_config,
            ("POST", "reload"): self._reload,
            ("POST", "restart"): self._restart,
            ("DELETE", "restart"): self._no_restart,
            ("POST", "switchover"): self._switchover,
            ("DELETE", "switchover"): self._cancel_switchover,
            ("POST", "failover"): self._failover,
            ("POST", "failsafe"): self._failsafe,
            ("POST", "pgha"): self._own,
        }

    def knows(self, method: str, name: str) -> bool:
        return (method, name) in self._routes

    async def handle(self, request: Request, name: str) -> Response:
        try:
            return await self._routes[request.method, name](request)
        except _Wrong as wrong:
            return text_response(wrong.status, wrong.text)

    # --- configuration -----------------------------------------------------------------------------------------------

    async def _patch_config(self, request: Request) -> Response:
        body = _object(request)
        published = self._board.current()
        if published.view is None or published.view.config is None:
            return text_response(503, "there is no configuration in the store")
        return _response(await self._requests.submit("patch_config", body, deadline_s=WRITE_S))

    async def _put_config(self, request: Request) -> Response:
        return _response(await self._requests.submit("put_config", _object(request), deadline_s=WRITE_S))

    async def _own(self, request: Request) -> Response:
        """POST /pgha/…: questions that need a body, or an operator's credentials. None changes anything."""
        parts = [part for part in request.path.split("/") if part]
        match parts[1:]:
            case ["config", "check"]:
                body = _object(request)
                if not isinstance(body.get("config"), dict) or not isinstance(body.get("old", {}), dict):
                    raise _Wrong(400, "config is to be the whole configuration to check, a JSON object; old, if given, the one that it replaces")
                return _response(await self._requests.submit("check_config", body, deadline_s=WRITE_S))
            case _:
                return text_response(404, "not known: " + request.path)

    # --- this node ---------------------------------------------------------------------------------------------------

    async def _reload(self, _request: Request) -> Response:
        return _response(await self._requests.submit("reload", {}, deadline_s=WRITE_S))

    async def _restart(self, request: Request) -> Response:
        body = _object(request, required=False)
        for key, value in body.items():
            if key == "role" and value not in ("primary", "standby_leader", "replica"):
                raise _Wrong(400, "PostgreSQL role should be either primary, standby_leader, or replica")
            if key == "schedule" and self._board.current().health.paused:
                raise _Wrong(500, "Can't schedule restart in the paused state")
            if key in ("schedule", "role", "postgres_version", "restart_pending"):
                raise _Wrong(400, f"{key} is not supported yet by this version of pgha: only an immediate restart is")
            if key != "timeout":
                raise _Wrong(400, f"Unknown filter: {key[:100]}")
        options: dict[str, Any] = {}
        published = self._board.current()
        start_s = published.primary_start_timeout_s
        if "timeout" in body:
            start_s = options["timeout_s"] = _seconds(body["timeout"])
        # stopping, starting, and a little for the loop itself
        deadline_s = min(RESTART_AT_MOST_S, 2 * start_s + 60.0)
        return _response(await self._requests.submit("restart", options, deadline_s=deadline_s))

    async def _no_restart(self, _request: Request) -> Response:
        return text_response(404, "no restarts are scheduled")

    # --- failsafe ----------------------------------------------------------------------------------------------------

    async def _failsafe(self, request: Request) -> Response:
        ping = _ping(_object(request))
        answer, lsn = self._requests.failsafe(ping)
        response = text_response(answer.status, answer.text)
        return replace(response, headers=(*response.headers, ("lsn", str(lsn)))) if answer.status == 200 else response

    # --- who leads ---------------------------------------------------------------------------------------------------

    async def _switchover(self, request: Request) -> Response:
        return await self._move("switchover", request)

    async def _failover(self, request: Request) -> Response:
        return await self._move("failover", request)

    async def _cancel_switchover(self, _request: Request) -> Response:
        view = self._board.current().view
        if view is None or not view.failover.scheduled_at:
            return text_response(404, "no switchover is scheduled")
        return _response(await self._requests.submit("cancel_switchover", {}, deadline_s=WRITE_S))

    async def _move(self, kind: str, request: Request) -> Response:
        body = _object(request)
        leader, candidate = _name(body, "leader"), _name(body, "candidate") or _name(body, "member")
        if kind == "failover" and leader:
            kind = "switchover"
        before = self._board.current()
        _preconditions(kind, leader, candidate, body.get("scheduled_at"), before)
        payload: dict[str, Any] = {key: value for key, value in (("leader", leader), ("member", candidate)) if value}
        own = body.get("pgha")
        if isinstance(own, dict) and own.get("holder_is_down"):
            payload["pgha"] = {"holder_is_down": _stated_down(kind, before)}
        answer = await self._requests.submit(kind, payload, deadline_s=WRITE_S)
        if answer.status != 200:
            return _response(answer)
        return await self._outcome(kind, candidate, before, answer.revision)

    async def _outcome(self, kind: str, candidate: str, before: Published, revision: int) -> Response:
        """Wait for what the loop publishes: another leader, or the key gone without one (compatibility spec 11.2)."""
        past = "switched" if kind == "switchover" else "failed"
        limit_s = 2 * max(10.0, before.loop_wait_s)
        published = before
        with trio.move_on_after(limit_s):
            while True:
                published = await self._board.wait_changed(published)
                view = published.view
                if view is None or view.revision < revision:
                    continue
                if published.leader and published.leader != before.leader:
                    if candidate in ("", published.leader):
                        return text_response(200, f'Successfully {past} over to "{published.leader}"')
                    return text_response(200, f'{past.capitalize()} over to "{published.leader}" instead of "{candidate}"')
                if view.failover.empty and (published.leader or not before.leader):
                    why = f": {published.failover_refusal}" if published.failover_refusal else ""
                    return text_response(503, f"{kind.capitalize()} failed{why}")
        return text_response(503, f"{kind.capitalize()} status unknown after {limit_s:g} seconds; operation may still be in progress")


def _preconditions(kind: str, leader: str, candidate: str, scheduled_at: Any, published: Published) -> None:
    """What is known to be impossible before anybody is asked. _Wrong says which."""
    view = published.view
    if kind == "failover" and not candidate:
        raise _Wrong(400, "Failover could be performed only to a specific candidate")
    if kind == "switchover" and not leader:
        raise _Wrong(400, "Switchover could be performed only from a specific leader")
    if scheduled_at is not None:
        if kind == "failover":
            raise _Wrong(400, "Failover can't be scheduled")
        if published.health.paused:
            raise _Wrong(400, "Can't schedule switchover in the paused state")
        raise _Wrong(400, "scheduled_at is not supported yet by this version of pgha: only an immediate switchover is")
    if published.health.paused and not candidate:
        raise _Wrong(400, "Switchover is possible only to a specific candidate in a paused state")
    if leader and leader == candidate:
        raise _Wrong(400, "Switchover target and source are the same")
    if view is None:
        raise _Wrong(503, "the cluster has not been seen in the store")
    if leader and leader != published.leader:
        raise _Wrong(412, "leader name does not match")
    config = view.config or {}
    by_priority = synchronous(config) and not by_quorum(config)
    names = synchronous_names(view.sync.raw)
    if candidate:
        if kind == "switchover" and by_priority and candidate.lower() not in names:
            raise _Wrong(412, "candidate name does not match with sync_standby")
        if candidate not in view.members:
            raise _Wrong(412, "candidate does not exists")
    elif by_priority and not names:
        raise _Wrong(412, f"{kind} is not possible: can not find sync_standby")
    others = [m for m in view.members.values() if m.name != published.leader and candidate in ("", m.name)
              and (candidate or not by_priority or m.name.lower() in names)]
    if not others:
        raise _Wrong(412, f"{kind} is not possible: cluster does not have members except leader")
    obstacles = [f"{m.name}: {'tagged nofailover' if m.tags.nofailover else 'state is ' + (m.state or 'unknown')}"
                 for m in others if m.tags.nofailover or m.state != "running"]
    if len(obstacles) == len(others):
        raise _Wrong(412, f"{kind} is not possible: no good candidates have been found ({'; '.join(obstacles)})")


def _stated_down(kind: str, published: Published) -> dict[str, Any]:
    """An operator states that the holder of a paused lock is down: of exactly the record that stands, if it looks so at all."""
    lock = published.view.lock if published.view is not None else None
    before = published.observation.dcs.remembered_pause if published.observation is not None else None
    if kind == "failover" and before is not None and (lock is None or lock.mode != "paused"):
        return {"holder": before.name, "incarnation": before.incarnation, "sequence": 0}    # the record is lost, or a restored one
    if kind != "failover" or lock is None or lock.mode != "paused":
        raise _Wrong(412, "holder_is_down is for a failover from a lock that was paused: any other expires by itself")
    seen = published.observation.dcs.lock_seen.since if published.observation is not None else None
    age_s = candidate_age_s(seen, published.at) if seen is not None else 0.0
    if published.observation is not None and published.observation.me.node_id == lock.node_id:
        raise _Wrong(412, f"{lock.holder} is not down: it answers this request")
    if age_s < wait_s(lock.ttl_s):
        raise _Wrong(412, f"{lock.holder} does not look down: its lock was seen to be renewed {age_s:.1f} s ago, {wait_s(lock.ttl_s):.1f} s without are needed")
    if published.observation is not None and still_sends(published.observation, lock.holder):
        raise _Wrong(412, f"{lock.holder} does not look down: its PostgreSQL sends WAL to {published.observation.me.name} (a connection that is dead is "
                          "noticed after wal_receiver_timeout)")
    return {"holder": lock.holder, "incarnation": lock.incarnation, "sequence": lock.sequence}


def _object(request: Request, *, required: bool = True) -> dict[str, Any]:
    """The body as a JSON object; empty only if it is not required."""
    if required and "content-length" not in request.headers and "transfer-encoding" not in request.headers:
        raise _Wrong(411, "the request has no body")
    if not request.body.strip() and not required:
        return {}
    try:
        value = json.loads(request.body)
        # What could be neither written to the store nor answered: half a character, and "not a number".
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, RecursionError):
        raise _Wrong(400, "the body is not JSON") from None
    if not isinstance(value, dict) or (required and not value):
        raise _Wrong(400, "the body must be a JSON object that is not empty")
    return value


def _name(body: Mapping[str, Any], key: str) -> str:
    value = body.get(key)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise _Wrong(400, f"{key} must be a member's name")
    return value


def _ping(body: Mapping[str, Any]) -> Ping:
    """The reference's four fields and pgha's own. What is there must be sound: half a ping would be half a promise."""
    own = body.get("pgha", {})
    slots = body.get("slots") or {}
    name = _name(body, "name")
    if not name or not isinstance(own, dict) or not isinstance(slots, dict):
        raise _Wrong(400, "a failsafe ping has name, conn_url, api_url, slots")
    epoch, ttl_s, sequence = own.get("epoch"), own.get("ttl_s"), own.get("sequence", 0)
    if not (_is_number(epoch, int) or epoch is None) or not (_is_number(ttl_s, float) or ttl_s is None) or not _is_number(sequence, int):
        raise _Wrong(400, "pgha.epoch, pgha.sequence and pgha.ttl_s are numbers")
    return Ping(name=name, conn_url=_name(body, "conn_url"), api_url=_name(body, "api_url"), to=_name(own, "to"), incarnation=_name(own, "incarnation"),
                slots={str(k): v for k, v in slots.items() if _is_number(v, int)}, epoch=epoch, ttl_s=ttl_s, sequence=sequence)


def _is_number(value: Any, kind: type[int | float]) -> bool:
    """A whole number of 64 bits, or any but NaN and the infinities."""
    if isinstance(value, bool) or not isinstance(value, (int, kind)):
        return False
    return bool(-(1 << 63) <= value < 1 << 63)


def _seconds(value: Any) -> float:
    """A positive number, also as text with a unit of PostgreSQL's (ms, s, min, h, d)."""
    units = {"ms": 0.001, "s": 1.0, "min": 60.0, "h": 3600.0, "d": 86400.0, "": 1.0}
    text = str(value).strip()[:40] if isinstance(value, (str, int, float)) else ""
    number = text.rstrip("abcdefghijklmnopqrstuvwxyz")
    try:
        seconds = float(number) * units[text[len(number):].strip()]
    except (ValueError, KeyError):
        seconds = 0.0
    if isinstance(value, bool) or not 0 < seconds < 1e6:
        raise _Wrong(400, "timeout must be a positive number of seconds")
    return seconds


def _response(answer: Answer) -> Response:
    if answer.json:
        return Response(status=answer.status, body=answer.text.encode(), content_type=JSON)
    return text_response(answer.status, answer.text)
