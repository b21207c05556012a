"""What changes under a prefix, as etcd tells it line by line?

A watch is one HTTP request whose answer does not end: a line that confirms it, then one line for each revision that
touches the prefix. etcd sends all events of one revision in one line, unless it is asked for fragments (it is not); a
line may hold several revisions while history is delivered. Facts (measured on 3.4.23 and 3.5.16):

* On a member that lost its quorum it stays open and silent for ever, unless it was opened with the header `hasleader`;
  then it ends after 3.3 s with "no leader". On a stopped server nothing helps: a silent watch is the caller's to notice.
* A lapsed token is told as "permission denied", in a line that confirms and cancels at once.
"""

from __future__ import annotations

import trio

from pgha.dcs import Change
from pgha.dcs import etcd3_json as wire
from pgha.dcs.endpoints import Endpoint, Lines, NoAnswer
from pgha.dcs.etcd3_client import Etcd3Client, authorization
from pgha.dcs.etcd3_json import Header, Meaning, encode
from pgha.errors import Compacted, DcsRefused, DcsUnreachable

#: for each endpoint, until it has confirmed a new watch
WATCH_OPEN_S = 1.0

_HAS_LEADER = (b"Grpc-Metadata-hasleader", b"true")
_watch_lines = wire.Decoder(wire.WatchLine)


class _LoginNeeded(Exception):
    def __init__(self, fault: wire.Fault) -> None:
        super().__init__(fault.message)
        self.fault = fault


class Watch:
    """The changes of one confirmed watch, in order; None for a line without a change. Close it with `aclose`."""

    def __init__(self, lines: Lines) -> None:
        self._lines = lines
        self._ready: list[Change | None] = []

    async def wait_created(self) -> Header:
        """Until the store has confirmed the watch."""
        if self._lines.status != 200:
            fault = wire.fault_in(self._lines.status, await self._lines.rest())
            assert fault is not None, self._lines.status
            raise _error(fault)
        while True:
            answer = await self._next_answer()
            if answer.created:
                return answer.header
            await trio.lowlevel.checkpoint()

    def __aiter__(self) -> Watch:
        return self

    async def __anext__(self) -> Change | None:
        # One line may hold ten thousand changes, and one packet a thousand lines: others get their turn between them.
        await trio.lowlevel.checkpoint()
        while not self._ready:
            try:
                answer = await self._next_answer()
            except (NoAnswer, _LoginNeeded) as error:
                raise DcsUnreachable(f"watch: {error}") from error
            self._ready.extend(wire.changes(answer.events) if answer.events else [None])
            self._ready.reverse()
        return self._ready.pop()

    async def _next_answer(self) -> wire.WatchAnswer:
        line = await self._lines.next()
        try:
            got: wire.WatchLine = _watch_lines.decode(line)
        except wire.NotUnderstood as error:
            raise NoAnswer(str(error)) from error
        if got.error is not None:
            raise _error(wire.fault(got.error.grpc_code or got.error.code, got.error.message))
        if got.result is None:
            raise NoAnswer("an empty answer")
        if got.result.compact_revision:
            raise Compacted(got.result.compact_revision)
        if got.result.canceled:
            why = got.result.cancel_reason or "cancelled without a reason"
            raise _error(wire.fault(0, why))
        return got.result

    async def aclose(self) -> None:
        await self._lines.aclose()


async def open_watch(client: Etcd3Client, key: bytes, end: bytes, start: int) -> Watch:
    """A confirmed watch on the keys from `key` to before `end` (empty: on that key), from revision `start`. Each
    endpoint is tried once. Raises DcsUnreachable, DcsRefused, Compacted."""
    create: dict[str, object] = {"key": key, "start_revision": max(start, 1), "progress_notify": True}
    if end:
        create["range_end"] = end
    body = encode({"create_request": create})
    failures = []
    for endpoint in client.in_order():
        try:
            return await _open_at(client, endpoint, body)
        except NoAnswer as no:
            failures.append(f"{endpoint.name}: {no}")
            client.mark(endpoint, str(no))
    raise DcsUnreachable(f"no watch could be opened: {'; '.join(failures)}")


async def _open_at(client: Etcd3Client, endpoint: Endpoint, body: bytes) -> Watch:
    again = False
    while True:
        token = await client.token_for(endpoint)
        try:
            return await _confirmed(client, endpoint, body, token)
        except _LoginNeeded as need:
            if again or not client.forget_token(token):
                raise DcsRefused(f"{endpoint.name}: {need}", code=need.fault.code) from None
        again = True


async def _confirmed(client: Etcd3Client, endpoint: Endpoint, body: bytes, token: str | None) -> Watch:
    with trio.move_on_after(WATCH_OPEN_S):
        watch = Watch(await endpoint.stream("/v3/watch", body, [_HAS_LEADER, *authorization(token)]))
        opened = False
        try:
            header = await watch.wait_created()
            if header.cluster_id != client.known.cluster_id != "":
                raise NoAnswer(f"belongs to cluster {header.cluster_id}, not {client.known.cluster_id}")
            opened = True
            return watch
        finally:
            if not opened:
                await watch.aclose()
    endpoint.went_silent()
    raise NoAnswer(f"silent for {WATCH_OPEN_S:g} s")


def _error(fault: wire.Fault) -> Exception:
    if fault.meaning in (Meaning.LOGIN, Meaning.FORBIDDEN):
        return _LoginNeeded(fault)
    if fault.meaning is Meaning.NEXT:
        return NoAnswer(fault.message)
    return DcsRefused(fault.message, code=fault.code)
