"""The answers that grow with the cluster, the history or the configuration: made once a publication, and one at a time.

Rules of this file: whoever asks for one waits for its turn, also if it is made already, so that of hundreds who ask at the
same moment one is served between two looks at everything else (the renewer is one of those); a body is the same object for
all who are given it, since many may be slow to take it; what is different for each (how old it is) is the answer's tail.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import msgspec
import trio

from pgha.clock import Instant, holder_age_s
from pgha.rest.bodies import cluster_body, history_body
from pgha.rest.published import Board, Published
from pgha.rest.redaction import redact, redacted_json
from pgha.rest.wire import JSON, Response, dump_json, json_response, text_response


class Pages:
    def __init__(self, board: Board) -> None:
        self._board = board
        self._turn = trio.Lock()
        self._of: Published | None = None
        self._made: dict[str, Response] = {}

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[Published]:
        """One at a time, and what is published when it comes. A lock of trio's wakes the next in line one round later."""
        async with self._turn:
            yield self._board.current()

    async def page(self, name: str) -> Response:
        async with self.turn() as published:
            return self._page(name, published)

    async def aged(self, name: str, now: Callable[[], Instant]) -> Response:
        """A JSON object, and how old it is."""
        async with self.turn() as published:
            page = self._page(name, published)
            if page.status != 200:
                return page
            return msgspec.structs.replace(page, tail=b', "age_s": %s}' % dump_json(round(holder_age_s(published.at, now()), 3)))

    def _page(self, name: str, published: Published) -> Response:
        if self._of is not published:
            self._of, self._made = published, {}
        page = self._made.get(name)
        if page is None:
            page = self._made[name] = _MADE_BY[name](published)
        return page


def _cluster(published: Published) -> Response:
    return json_response(cluster_body(published))


def _history(published: Published) -> Response:
    return json_response(history_body(published))


def _config(published: Published) -> Response:
    config = published.view.config if published.view else None
    return json_response(config) if config is not None else text_response(502, "there is no configuration in the store")


def _failsafe(published: Published) -> Response:
    members = published.view.failsafe if published.view else {}
    return json_response(members) if members else text_response(502, "failsafe mode is off")


def _decision(published: Published) -> Response:
    return _open({"node": published.node.name, "scope": published.node.scope, **redact(published.decision)})


def _observation(published: Published) -> Response:
    """The last pass, as `pgha replay` and `ctl explain --if` run it again."""
    seen = published.observation
    if seen is None:
        return text_response(503, "no pass yet")
    shown = msgspec.structs.replace(seen, settings=msgspec.structs.replace(seen.settings, dynamic_config=redacted_json(seen.settings.dynamic_config)))
    recorded = {"observation": shown, **({"memory": published.memory} if published.memory is not None else {})}
    return _open(redact(msgspec.to_builtins(recorded)))


def _open(value: dict[str, object]) -> Response:
    """An object without its closing brace: `aged` ends it."""
    return Response(status=200, body=dump_json(value)[:-1], content_type=JSON)


_MADE_BY: dict[str, Callable[[Published], Response]] = {
    "cluster": _cluster, "history": _history, "config": _config, "failsafe": _failsafe, "decision": _decision, "observation": _observation,
}
