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
from pgha.model.observation import Peer
from pgha.model.overview import by_quorum, is_true, synchronous, synchronous_names
from pgha.model.request import NoZone, epoch_s, moment, server_version
from pgha.rest.published import Board, Published
from pgha.rest.wire import JSON, Request, Response, quoting_response, text_response

#: for a request that is only a write to the store
WRITE_S = 10.0
#: of a configuration's key
LONGEST_KEY = 500
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

        switchover, failover: {"leader"?, "member"?, "scheduled_at"?, "pgha"?}: write /failover, answer 200 and the revision, or 503 and the text
        "failed to write failover key into DCS" (any write: then "; it may still happen" where the store has not said that it will not). cancel_switchover: {}: empty /failover. restart: {"timeout_s"?} and
        its conditions: waits for its end, with "schedule": 202. cancel_restart: {}. reinitialize: {"force", "from_leader"}: 200 once it
        is begun. reload: {}: 202. patch_config, put_config: the object: a guarded write after validation; 200 and the
        new configuration as JSON, 400 and the problems, 409, 503. check_config: {"config": …, "old"?: …}: the same judgement,
        and what it would do to PostgreSQL on this node, as JSON; nothing is written. why_config: {"key"}: where its value comes from, as JSON; 404 and the nearest.
        """
        ...

    async def others(self) -> dict[str, Peer]:
        """What all other members say of themselves just now; within a second."""
        ...

    def failsafe(self, ping: Ping) -> tuple[Answer, int]:
        """Answer a leader that cannot reach the store, and this node's last known position. Never blocks, never awaits:
        what is checked and what is promised are one step (safety model 12)."""
        ...

    def wake(self, why: str, epoch: int) -> None:
        """Let the loop know at once that somebody asks for a vote in the election after `epoch`, or, -1, for the position
        as it is ("observation asked": for a pass of now as well). Never blocks."""
        ...


class Wrong(Exception):
    """A request that is refused at once. `quotes`: the text has something of the request in it."""

    def __init__(self, status: int, text: str, *, quotes: bool = False) -> None:
        super().__init__(text)
        self.quotes = quotes
        self.status = status
        self.text = text


class Changes:
    """The unsafe endpoints."""

    def __init__(self, board: Board, requests: Requests, *, wall_s: Callable[[], float]) -> None:
        self._board = board
        self._requests = requests
        self._wall_s = wall_s
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
            ("POST", "reinitialize"): self._reinitialize,
            ("POST", "sigterm"): self._sigterm,
            ("POST", "citus"): self._citus,
            ("POST", "mpp"): self._citus,
            ("POST", "pgha"): self._own,
        }

    def knows(self, method: str, name: str) -> bool:
        return (method, name) in self._routes

    async def handle(self, request: Request, name: str) -> Response:
        try:
            return await self._routes[request.method, name](request)
        except Wrong as wrong:
            return quoting_response(wrong.status, wrong.text) if wrong.quotes else text_response(wrong.status, wrong.text)

    # --- configuration -----------------------------------------------------------------------------------------------

    async def _patch_config(self, request: Request) -> Response:
        body = object_of(request)
        published = self._board.current()
        if published.view is None or published.view.config is None:
            return text_response(503, "there is no configuration in the store")
        return _response(await self._requests.submit("patch_config", body, deadline_s=WRITE_S), quotes=True)

    async def _put_config(self, request: Request) -> Response:
        return _response(await self._requests.submit("put_config", object_of(request), deadline_s=WRITE_S), quotes=True)

    async def _own(self, request: Request) -> Response:
        """POST /pgha/…: questions that need a body, or an operator's credentials. None changes anything."""
        parts = [part for part in request.path.split("/") if part]
        match parts[1:]:
            case ["config", "check"]:
                body = object_of(request)
                if not isinstance(body.get("config"), dict) or not isinstance(body.get("old", {}), dict):
                    raise Wrong(400, "config is to be the whole configuration to check, a JSON object; old, if given, the one that it replaces")
                return _response(await self._requests.submit("check_config", body, deadline_s=WRITE_S), quotes=True)
            case ["config", "why"]:
                key = object_of(request).get("key")
                if not isinstance(key, str) or len(key) > LONGEST_KEY:
                    raise Wrong(400, "key is to be the name of a key, as postgresql.parameters.work_mem")
                return _response(await self._requests.submit("why_config", {"key": key}, deadline_s=WRITE_S), quotes=True)
            case _:
                return quoting_response(404, "not known: " + request.path)

    # --- this node ---------------------------------------------------------------------------------------------------

    async def _reload(self, _request: Request) -> Response:
        return _response(await self._requests.submit("reload", {}, deadline_s=WRITE_S))

    async def _restart(self, request: Request) -> Response:
        published = self._board.current()
        options = restart_options(object_of(request, required=False), paused=published.health.paused, wall_s=self._wall_s())
        if "schedule" in options:
            return _response(await self._requests.submit("restart", options, deadline_s=WRITE_S))
        start_s = options.get("timeout_s", published.primary_start_timeout_s)
        # stopping, starting, and a little for the loop itself
        deadline_s = min(RESTART_AT_MOST_S, 2 * start_s + 60.0)
        return _response(await self._requests.submit("restart", options, deadline_s=deadline_s))

    async def _no_restart(self, _request: Request) -> Response:
        return _response(await self._requests.submit("cancel_restart", {}, deadline_s=WRITE_S))

    async def _reinitialize(self, request: Request) -> Response:
        options = reinitialize_options(object_of(request, required=False))
        return _response(await self._requests.submit("reinitialize", options, deadline_s=WRITE_S))

    async def _sigterm(self, _request: Request) -> Response:
        """There is for tests of the reference on Windows; nobody's agent is stopped through the network."""
        return text_response(202, "nothing is done: an agent is stopped by its service manager")

    async def _citus(self, _request: Request) -> Response:
        """A worker group's leader tells its coordinator of a change, and waits for it to be taken note of: which must not be
        claimed by who does not."""
        return text_response(501, "this is no Citus coordinator: pgha does not support Citus, and nothing was done")

    # --- failsafe ----------------------------------------------------------------------------------------------------

    async def _failsafe(self, request: Request) -> Response:
        ping = _ping(object_of(request))
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
        body = object_of(request)
        leader, candidate = name_in(body, "leader"), name_in(body, "candidate") or name_in(body, "member")
        if kind == "failover" and leader:
            kind = "switchover"
        before = self._board.current()
        scheduled_at = preconditions(kind, leader, candidate, body.get("scheduled_at"), before, wall_s=self._wall_s())
        payload: dict[str, Any] = {key: value for key, value in (("leader", leader), ("member", candidate)) if value}
        own = body.get("pgha")
        if isinstance(own, dict) and own.get("holder_is_down"):
            payload["pgha"] = {"holder_is_down": stated_down(kind, before)}
        if scheduled_at:
            payload["scheduled_at"] = scheduled_at
        answer = await self._requests.submit(kind, payload, deadline_s=WRITE_S)
        if answer.status != 200:
            return _response(answer)
        if scheduled_at:
            return text_response(202, "Switchover scheduled")
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


def reinitialize_options(body: Mapping[str, Any]) -> dict[str, Any]:
    # The reference's documentation spells it with a hyphen, its agents read it with the other.
    return {"force": is_true(body.get("force")), "from_leader": is_true(body.get("from_leader", body.get("from-leader")))}


def restart_options(body: Mapping[str, Any], *, paused: bool, wall_s: float) -> dict[str, Any]:
    """What a request for a restart asks, checked: `timeout_s`, the conditions, and `schedule` if it is for later (then with
    `timeout`, as it is published). Whether the conditions hold is decided in the pass. Wrong."""
    options: dict[str, Any] = {}
    for key, value in body.items():
        match key:
            case "role":
                if value not in ("primary", "standby_leader", "replica"):
                    raise Wrong(400, "PostgreSQL role should be either primary, standby_leader, or replica")
                options[key] = value
            case "postgres_version":
                options[key] = _version(value)
            case "restart_pending":
                options[key] = value        # that it is there counts
            case "timeout":
                options["timeout_s"] = _seconds(value)
            case "schedule":
                if paused:
                    raise Wrong(500, "Can't schedule restart in the paused state")
                options[key] = _moment("restart", value, wall_s=wall_s)
            case _:
                raise Wrong(400, f"Unknown filter: {key[:100]}", quotes=True)
    if "schedule" in options and "timeout_s" in options:
        options["timeout"] = options.pop("timeout_s")
    return options


def preconditions(kind: str, leader: str, candidate: str, scheduled_at: Any, published: Published, *, wall_s: float) -> str:
    """What is known to be impossible before anybody is asked: Wrong says which. When it is to be done, "" = now."""
    view = published.view
    if kind == "failover" and not candidate:
        raise Wrong(400, "Failover could be performed only to a specific candidate")
    if kind == "switchover" and not leader:
        raise Wrong(400, "Switchover could be performed only from a specific leader")
    if scheduled_at is not None:
        if kind == "failover":
            raise Wrong(400, "Failover can't be scheduled")
        if published.health.paused:
            raise Wrong(400, "Can't schedule switchover in the paused state")
    if published.health.paused and not candidate:
        raise Wrong(400, "Switchover is possible only to a specific candidate in a paused state")
    if leader and leader == candidate:
        raise Wrong(400, "Switchover target and source are the same")
    if view is None:
        raise Wrong(503, "the cluster has not been seen in the store")
    if scheduled_at is not None:
        return _moment("switchover", scheduled_at, wall_s=wall_s)       # who leads then, and who can take over, only then is known
    if leader and leader != published.leader:
        raise Wrong(412, "leader name does not match")
    config = view.config or {}
    by_priority = synchronous(config) and not by_quorum(config)
    names = synchronous_names(view.sync.raw)
    if candidate:
        if kind == "switchover" and by_priority and candidate.lower() not in names:
            raise Wrong(412, "candidate name does not match with sync_standby")
        if candidate not in view.members:
            raise Wrong(412, "candidate does not exists")
    elif by_priority and not names:
        raise Wrong(412, f"{kind} is not possible: can not find sync_standby")
    others = [m for m in view.members.values() if m.name != published.leader and candidate in ("", m.name)
              and (candidate or not by_priority or m.name.lower() in names)]
    if not others:
        raise Wrong(412, f"{kind} is not possible: cluster does not have members except leader")
    obstacles = [f"{m.name}: {'tagged nofailover' if m.tags.nofailover else 'state is ' + (m.state or 'unknown')}"
                 for m in others if m.tags.nofailover or m.state != "running"]
    if len(obstacles) == len(others):
        raise Wrong(412, f"{kind} is not possible: no good candidates have been found ({'; '.join(obstacles)})")
    return ""


def stated_down(kind: str, published: Published) -> dict[str, Any]:
    """An operator states that the holder of a paused lock is down: of exactly the record that stands, if it looks so at all."""
    lock = published.view.lock if published.view is not None else None
    before = published.observation.dcs.remembered_pause if published.observation is not None else None
    if kind == "failover" and before is not None and (lock is None or lock.mode != "paused"):
        return {"holder": before.name, "incarnation": before.incarnation, "sequence": 0}    # the record is lost, or a restored one
    if kind != "failover" or lock is None or lock.mode != "paused":
        raise Wrong(412, "holder_is_down is for a failover from a lock that was paused: any other expires by itself")
    seen = published.observation.dcs.lock_seen.since if published.observation is not None else None
    age_s = candidate_age_s(seen, published.at) if seen is not None else 0.0
    if published.observation is not None and published.observation.me.node_id == lock.node_id:
        raise Wrong(412, f"{lock.holder} is not down: it answers this request")
    if age_s < wait_s(lock.ttl_s):
        raise Wrong(412, f"{lock.holder} does not look down: its lock was seen to be renewed {age_s:.1f} s ago, {wait_s(lock.ttl_s):.1f} s without are needed")
    if published.observation is not None and still_sends(published.observation, lock.holder):
        raise Wrong(412, f"{lock.holder} does not look down: its PostgreSQL sends WAL to {published.observation.me.name} (a connection that is dead is "
                          "noticed after wal_receiver_timeout)")
    return {"holder": lock.holder, "incarnation": lock.incarnation, "sequence": lock.sequence}


def object_of(request: Request, *, required: bool = True) -> dict[str, Any]:
    """The body as a JSON object; empty only if it is not required."""
    if required and "content-length" not in request.headers and "transfer-encoding" not in request.headers:
        raise Wrong(411, "the request has no body")
    if not request.body.strip() and not required:
        return {}
    try:
        value = json.loads(request.body)
        # What could be neither written to the store nor answered: half a character, and "not a number".
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, RecursionError):
        raise Wrong(400, "the body is not JSON") from None
    if not isinstance(value, dict) or (required and not value):
        raise Wrong(400, "the body must be a JSON object that is not empty")
    return value


def name_in(body: Mapping[str, Any], key: str) -> str:
    value = body.get(key)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise Wrong(400, f"{key} must be a member's name")
    return value


def _ping(body: Mapping[str, Any]) -> Ping:
    """The reference's four fields and pgha's own. What is there must be sound: half a ping would be half a promise."""
    own = body.get("pgha", {})
    slots = body.get("slots") or {}
    name = name_in(body, "name")
    if not name or not isinstance(own, dict) or not isinstance(slots, dict):
        raise Wrong(400, "a failsafe ping has name, conn_url, api_url, slots")
    epoch, ttl_s, sequence = own.get("epoch"), own.get("ttl_s"), own.get("sequence", 0)
    if not (_is_number(epoch, int) or epoch is None) or not (_is_number(ttl_s, float) or ttl_s is None) or not _is_number(sequence, int):
        raise Wrong(400, "pgha.epoch, pgha.sequence and pgha.ttl_s are numbers")
    return Ping(name=name, conn_url=name_in(body, "conn_url"), api_url=name_in(body, "api_url"), to=name_in(own, "to"), incarnation=name_in(own, "incarnation"),
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
        raise Wrong(400, "timeout must be a positive number of seconds")
    return seconds


def _moment(what: str, value: Any, *, wall_s: float) -> str:
    """When a restart or switchover is to be done, as ISO 8601. Wrong, in the reference's words."""
    try:
        at = moment(value if isinstance(value, str) else "")
    except NoZone:
        raise Wrong(400, f"Timezone information is mandatory for the scheduled {what}") from None
    except ValueError:
        raise Wrong(422, "Unable to parse scheduled timestamp. It should be in an unambiguous format, e.g. ISO 8601") from None
    if epoch_s(at) <= wall_s:
        raise Wrong(422, f"Cannot schedule {what} in the past")
    return at.isoformat()


def _version(value: Any) -> str:
    try:
        server_version(str(value) if isinstance(value, (str, int, float)) and not isinstance(value, bool) else "")
    except ValueError as error:
        raise Wrong(400, f"postgres_version {error}") from None
    return str(value)


def _response(answer: Answer, *, quotes: bool = False) -> Response:
    """`quotes`: what is wrong about the request is said with its keys and values."""
    if answer.json:
        return Response(status=answer.status, body=answer.text.encode(), content_type=JSON)
    if quotes:
        return quoting_response(answer.status, answer.text)
    return text_response(answer.status, answer.text)
