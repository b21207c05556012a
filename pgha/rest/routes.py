"""Which answer does which request get? Reading only: everything comes from the last `Published`.

Health checks and /patroni, /liveness, /readiness have a short way: their whole answer is built once for each
publication and kept, together with the moment from which it is no longer true (the licence's end, the loop's silence)
and the answer from then on. So /primary says 503 in time whatever the loop does.

HEAD and OPTIONS are answered with the status that GET has. (The reference runs its health logic for every path there,
so that HEAD /liveness is always 503; nobody can rely on that.)

What changes something is in requests.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import msgspec

from pgha.clock import Clock, Deadline, Instant, remaining_s
from pgha.rest import dry_run, etcd_v2, health
from pgha.rest.access import SAFE_METHODS, Access
from pgha.rest.bodies import patroni_body
from pgha.rest.health import HealthFacts, Verdict
from pgha.rest.metrics import metrics_text
from pgha.rest.pages import Pages
from pgha.rest.parked import Parked
from pgha.rest.published import Board, Published
from pgha.rest.refusals import Refusals
from pgha.rest.requests import Changes, Requests
from pgha.rest.stream import Readers, Upgraded
from pgha.rest.wire import (
    JSON,
    METRICS,
    Request,
    Response,
    dump_json,
    head_bytes,
    json_response,
    quoting_response,
    split_target,
    text_response,
)

#: how many different health targets (with their parameters) are kept ready; others are answered all the same
_KEPT = 128
#: the longest that GET /pgha/vote?wait=… waits
VOTE_WAIT_S = 2.0
#: … and GET /pgha/observation?fresh, for a pass after the question
FRESH_S = 1.0
#: a position that is no older than this when it is asked for is not looked at anew (observe/postgres.py: POSITION_AGE_S)
_POSITION_AGE_S = 0.25


class _Kept(NamedTuple):
    """An answer in all its forms. `until` None: true for as long as nothing new is published."""

    until: Deadline | None
    keep_alive: bytes
    close: bytes
    keep_alive_after: bytes
    close_after: bytes


class App:
    """The REST API. `headers` are those of every answer (the listener needs the same)."""

    def __init__(self, board: Board, requests: Requests, *, clock: Clock, access: Access | None = None,
                 headers: Mapping[str, str] | None = None, readers: Readers | None = None) -> None:
        self.board = board
        self.readers = readers
        self.requests = requests
        self.clock = clock
        self.access = access or Access()      # replaced on reload
        self.headers = dict(headers or {})
        self.refusals = Refusals()
        self.changes = Changes(board, requests, wall_s=clock.wall_s)
        self.pages = Pages(board)
        # Strangers who wait for the one take nothing from those who wait for the other.
        self._votes, self._looks, self._rehearsals = Parked(board), Parked(board), Parked(board)
        self._kept: dict[bytes, _Kept] = {}
        self._kept_of: Published | None = None
        self._body = b""

    # --- the short way -----------------------------------------------------------------------------------------------

    def quick(self, key: bytes, *, keep_alive: bool) -> bytes | None:
        """See server.Application."""
        published = self.board.current()
        if self._kept_of is not published:
            self._kept_of = published
            self._kept = {}
            self._body = b""
        kept = self._kept.get(key)
        if kept is None:
            kept = self._build(key, published)
            if kept is None:
                return None
            if len(self._kept) < _KEPT:
                self._kept[key] = kept
        if kept.until is not None and remaining_s(kept.until, self.clock.now()) <= 0:
            return kept.keep_alive_after if keep_alive else kept.close_after
        return kept.keep_alive if keep_alive else kept.close

    def _build(self, key: bytes, published: Published) -> _Kept | None:
        method, _, target = key.partition(b" ")
        try:
            path, query = split_target(target.decode("ascii"))
        except ValueError:
            return None
        name = _first(path)
        if name in _GET and (name != "patroni" or _is_mixed(published)):
            return None
        facts = published.health
        held = msgspec.structs.replace(facts, lock_held=published.licence_until is not None, loop_alive=True)
        until = published.alive_until if name == "liveness" else published.licence_until
        now = self._health_response(path, name, query, held, published)
        after = self._health_response(path, name, query, msgspec.structs.replace(held, lock_held=False, loop_alive=False), published)
        forms = []
        for form in (now, after):
            response = _without_body(form) if method == b"OPTIONS" else form
            for alive in (True, False):
                head = head_bytes(response, self.headers, keep_alive=alive)
                forms.append(head if method == b"HEAD" else head + response.body)
        return _Kept(until if now.status != after.status else None, *forms)

    def _health_response(self, path: str, name: str, query: Mapping[str, str], facts: HealthFacts, published: Published) -> Response:
        if name in ("liveness", "readiness"):
            verdict = health.liveness(facts) if name == "liveness" else health.readiness(query, facts)
            return Response(status=verdict.status, headers=_because(verdict))
        if not self._body:
            # No body depends on the two facts that change between publications.
            self._body = dump_json(patroni_body(published, facts))
        if name == "patroni":
            return Response(status=200, body=self._body, content_type=JSON)
        verdict = health.answer(path, query, facts)
        return Response(status=verdict.status, body=self._body, content_type=JSON, headers=_because(verdict))

    # --- everything --------------------------------------------------------------------------------------------------

    def has_places(self, number: int) -> None:
        """See server.Application. A quarter of them is for those who wait here, half of it for votes: they decide elections."""
        self._votes.at_most = max(1, number // 8)
        self._looks.at_most = self._rehearsals.at_most = max(1, number // 16)

    def refuses(self, request: Request) -> Response | None:
        """See server.Application."""
        if request.method in SAFE_METHODS:
            return None
        if not self.changes.knows(request.method, _first(request.path)) and not dry_run.is_one(request):
            return quoting_response(501, f"{request.method} {request.path} is not supported")
        refusal = self.access.refuses(request)
        if refusal is not None:
            self.refusals.note(request.peer, refusal.body.decode(), method=request.method, path=request.path[:200], status=refusal.status)
        return refusal

    async def handle(self, request: Request) -> Response:
        """See server.Application."""
        refusal = self.refuses(request)
        if refusal is not None:
            return refusal
        name = _first(request.path)
        if request.method in SAFE_METHODS:
            response = await self._read(request, name)
            return _without_body(response) if request.method == "OPTIONS" else response
        if dry_run.is_one(request):
            return await dry_run.answer(request, await self._fresh(self._rehearsals), self.requests, now=self.clock.now(), wall_s=self.clock.wall_s())
        return await self.changes.handle(request, name)

    async def _fresh(self, parked: Parked) -> Published:
        """A pass that was begun after the question, and that knows PostgreSQL's position, if the loop makes one within a moment."""
        asked = self.clock.now()
        self.requests.wake("observation asked", -1)
        return await parked.until(lambda published: _is_fresh(published, asked), at_most_s=FRESH_S)

    def upgrade(self, request: Request) -> Response | Upgraded | None:
        """See server.Application."""
        if self.readers is None or [part for part in request.path.split("/") if part] != ["pgha", "events"]:
            return None
        return self.readers.upgrade(request)

    async def _read(self, request: Request, name: str) -> Response:
        published = self.board.current()
        facts = published.health_at(self.clock.now())
        match name:
            case "cluster" | "history" | "config" | "failsafe":
                return await self.pages.page(name)
            case "metrics":
                async with self.pages.turn() as published:
                    now = self.clock.now()
                    return Response(status=200, body=metrics_text(published, published.health_at(now), now).encode(), content_type=METRICS)
            case "pgha":
                return await self._own(request)
            case "v2":
                return etcd_v2.answer(request, published, facts)
            case "patroni" if _is_mixed(published):
                # A Patroni leader judges by this answer whether it may switch over to this node: a position of its last look, up
                # to a loop_wait ago, is a lag that there is not.
                published = await self._fresh(self._looks)
                return json_response(patroni_body(published, published.health_at(self.clock.now())))
            case _:
                self.quick(b"GET /", keep_alive=False)      # makes the body of this publication
                return self._health_response(request.path, name, request.query, facts, published)

    async def _own(self, request: Request) -> Response:
        parts = [part for part in request.path.split("/") if part]
        match parts[1:2]:
            case ["decision"]:
                return await self.pages.aged("decision", self.clock.now)
            case ["events"] if self.readers is not None and len(parts) == 2:
                async with self.pages.turn():
                    return self.readers.page(request)
            case ["vote"]:
                return await self._vote(request)
            case ["observation"]:
                if "fresh" in request.query:        # of a pass that was begun after the question
                    await self._fresh(self._looks)
                return await self.pages.aged("observation", self.clock.now)
            case _:
                return quoting_response(404, "not known: " + request.path)

    async def _vote(self, request: Request) -> Response:
        """This node's position for the election after `epoch`. `wait` (seconds, at most 2): how long to wait for one
        that is final for this epoch; whoever waits saves a question. Never behind the long answers."""
        published = self.board.current()
        try:
            epoch = int(request.query.get("epoch", "-1")[:24])
            wait_s = min(float(request.query.get("wait", "0")), VOTE_WAIT_S)
        except ValueError:
            return text_response(400, "epoch and wait are numbers")
        if epoch < 0:
            self.requests.wake("position asked", epoch)
        elif published.vote.epoch < epoch:
            self.requests.wake("vote asked", epoch)
        if wait_s > 0:
            published = await self._votes.until(lambda published: published.vote.epoch >= epoch, at_most_s=wait_s)
        health_now = published.health
        return json_response({
            "name": published.node.name, **msgspec.to_builtins(published.vote), "state": health_now.state, "role": health_now.role,
            "tags": published.node.tags, "watchdog_failed": published.node.watchdog_failed,
            "system_identifier": published.node.system_identifier, "node_id": published.node.node_id,
        })


_GET = frozenset({"cluster", "history", "config", "failsafe", "metrics", "pgha", "patroni", "v2"})


def _first(path: str) -> str:
    """'/cluster/x' → 'cluster'."""
    return path.lstrip("/").partition("/")[0]


def _without_body(response: Response) -> Response:
    """OPTIONS has the status and nothing else, as load balancers use it."""
    return msgspec.structs.replace(response, body=b"", tail=b"")


def _because(verdict: Verdict) -> tuple[tuple[str, str], ...]:
    """The reason travels in a header: the body and the status are the reference's."""
    return (("X-Pgha-Because", verdict.why),) if verdict.why else ()


def _is_mixed(published: Published) -> bool:
    return published.view is not None and published.view.is_mixed


def _is_fresh(published: Published, asked: Instant) -> bool:
    """A pass after the question, with a position as new as whoever asks for positions is given."""
    seen = published.observation
    if seen is None or remaining_s(published.at, asked) < 0:
        return False
    row_at = seen.postgres.row_at
    return row_at is None or seen.postgres.answer != "sql" or remaining_s(row_at.plus_s(_POSITION_AGE_S), asked) >= 0
