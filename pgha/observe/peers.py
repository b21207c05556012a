"""What do the other members say of themselves? Asked over REST, side by side, only while a decision needs it.

A pgha member is asked for its vote (`/pgha/vote`), which it may hold back for a moment until its position is final;
one of another make for `/patroni`. Each has its own deadline, so that a silent one delays nobody's answer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractAsyncContextManager
from typing import Any
from urllib.parse import urlsplit

import msgspec
import trio
from msgspec.structs import replace

from pgha.clock import Clock
from pgha.dcs.keys import loads
from pgha.machine import HttpClient
from pgha.model.cluster import Tags
from pgha.model.decision import PeerQuestion
from pgha.model.observation import Peer
from pgha.model.wal import HistoryRow

#: A member that answers at all does so in this time; what it holds back waits WAIT_S of it.
ANSWER_S = 0.6
WAIT_S = 0.25
LARGEST_ANSWER_BYTES = 1 << 20


class PeersObserver:
    """`facts`: the latest answer of each member that was asked. `http()`: see machine.Machine."""

    def __init__(self, *, clock: Clock, wake: Callable[[], None], http: Callable[[], AbstractAsyncContextManager[HttpClient]]) -> None:
        self._clock = clock
        self._wake = wake
        self._http = http
        self._question = PeerQuestion()
        self._changed = trio.Event()
        self._plain: set[str] = set()        # members of another make
        self.facts: dict[str, Peer] = {}

    def ask(self, question: PeerQuestion) -> None:
        """Whom to ask from now on; an empty question ends the asking and forgets the answers."""
        if question != self._question:
            self._question = question
            self._plain.clear()     # a member of another make may have been converted since
            if not question.names:
                self.facts = {}
            else:
                self.facts = {n: p for n, p in self.facts.items() if n in question.names}
            self._changed.set()

    async def ask_once(self, names: Mapping[str, str]) -> dict[str, Peer]:
        """Of these (name → api_url), now, beside whatever is being asked; nothing of it is kept."""
        answers: dict[str, Peer] = {}

        async def one(client: HttpClient, name: str, url: str) -> None:
            answers[name] = await self._answer(client, name, url, -1)

        async with self._http() as client, trio.open_nursery() as nursery:
            for name, url in names.items():
                nursery.start_soon(one, client, name, url)
        return answers

    async def run(self, *, task_status: Any = trio.TASK_STATUS_IGNORED) -> None:
        """Ask for as long as there is a question. Never returns, never raises for a peer's faults."""
        task_status.started()
        while True:
            question = self._question
            self._changed = trio.Event()
            if not question.names:
                await self._changed.wait()
                continue
            # A client for the time of the question: nothing of it is kept while nobody is asked.
            async with self._http() as client, trio.open_nursery() as nursery:
                for name, url in question.names.items():
                    nursery.start_soon(self._ask_one, client, name, url, question)
                await self._changed.wait()
                nursery.cancel_scope.cancel()

    async def _ask_one(self, client: HttpClient, name: str, url: str, question: PeerQuestion) -> None:
        while True:
            began = self._clock.now()
            before = self.facts.get(name)
            peer = await self._answer(client, name, url, question.epoch)
            if self._question != question:      # asked anew meanwhile, and not yet cancelled: this answers nobody's question
                return
            if not peer.answered:
                silent_since = before.silent_since if before is not None and before.silent_since is not None else peer.asked_at
                peer = replace(peer, silent_since=silent_since)
            self.facts[name] = peer
            if before is None or _shape(before) != _shape(peer):
                self._wake()
            elapsed_s = (self._clock.now().raw_ns - began.raw_ns) / 1e9
            await trio.sleep(max(0.01, question.every_s - elapsed_s))

    async def _answer(self, client: HttpClient, name: str, url: str, epoch: int) -> Peer:
        asked_at = self._clock.now()
        why = f"no answer within {ANSWER_S} s"
        with trio.move_on_after(ANSWER_S):
            try:
                if name not in self._plain:
                    status, body = await self._get(client, f"{_base(url)}/pgha/vote?epoch={epoch}" + (f"&wait={WAIT_S}" if epoch >= 0 else ""))
                    if status == 200 and isinstance(body.get("name"), str) and "lsn" in body:
                        return _from_vote(name, _of_whom_was_asked(name, body.get("name"), body), asked_at)
                    if "role" in body:
                        self._plain.add(name)      # it answers, but knows no votes: a member of another make
                status, body = await self._get(client, url)
                own = body.get("patroni")
                return _from_patroni(name, _of_whom_was_asked(name, own.get("name", name) if isinstance(own, dict) else name, body), asked_at)
            except OSError as error:
                why = str(error)[:200] or type(error).__name__      # an HTTP library's may quote the answer
            except (ValueError, TypeError, OverflowError, RecursionError) as error:     # msgspec's own are ValueErrors
                why = f"its answer does not parse: {str(error)[:200]}"
        return Peer(name=name, asked_at=asked_at, answered=False, why=why)

    async def _get(self, client: HttpClient, url: str) -> tuple[int, dict[str, Any]]:
        status, body = await client.request("GET", url, largest_bytes=LARGEST_ANSWER_BYTES)
        try:
            value = loads(body)
        except ValueError:
            value = {}
        return status, value if isinstance(value, dict) else {}


def _base(api_url: str) -> str:
    parts = urlsplit(api_url)
    return f"{parts.scheme}://{parts.netloc}"


def _of_whom_was_asked(name: str, says: object, body: dict[str, Any]) -> dict[str, Any]:
    """The body, if it is this member's own: with a wrong connect_address one node's vote would count for two."""
    if says != name:
        raise ValueError(f"another member answers at its address: {str(says)[:100]!r}, wrong connect_address?")
    return body


def _from_vote(name: str, body: dict[str, Any], asked_at: Any) -> Peer:
    tags = body.get("tags")
    role, state = str(body.get("role", "")), str(body.get("state", ""))
    return Peer(
        name=name, asked_at=asked_at, answered=True, is_pgha=True, in_recovery=None if state not in ("running", "unknown") or role not in ("primary", "replica") else role == "replica",
        timeline=_number(body.get("timeline", 0)), lsn=_number(body.get("lsn", 0)), frozen_epoch=_number(body.get("epoch", -1), least=-1), running=state == "running",
        candidate=body.get("candidate") is not False,
        tags=Tags.of(tags if isinstance(tags, dict) else {}), watchdog_failed=body.get("watchdog_failed") is True,
        system_identifier=_identifier(body.get("system_identifier", "")), history=_history(body.get("history", [])),
    )


def _from_patroni(name: str, body: dict[str, Any], asked_at: Any) -> Peer:
    """A reply without `xlog` says that its SQL does not answer: then nothing of it counts (compatibility spec 3.3), but that it
    calls itself a primary: that refuses, as it does among its own kind."""
    xlog = body.get("xlog")
    tags = body.get("tags")
    identifier = _identifier(body.get("database_system_identifier", ""))
    if not isinstance(xlog, dict):
        primary = body.get("role") in ("primary", "master") and body.get("state") not in ("stopped", "crashed", "start failed")
        return Peer(name=name, asked_at=asked_at, answered=bool(identifier) or primary, why="its PostgreSQL does not answer", system_identifier=identifier,
                    in_recovery=False if primary else None)
    in_recovery = "location" not in xlog
    lsn = max(_number(xlog.get(key) or 0) for key in ("location", "received_location", "replayed_location"))
    return Peer(name=name, asked_at=asked_at, answered=True, in_recovery=in_recovery, timeline=_number(body.get("timeline") or 0), lsn=lsn, running=True,
                tags=Tags.of(tags if isinstance(tags, dict) else {}), watchdog_failed=body.get("watchdog_failed") is True, system_identifier=identifier)


def _number(value: Any, *, least: int = 0) -> int:
    """A count as it may be compared, published and written to the store. ValueError if it is none."""
    number = int(value)
    if not least <= number < 1 << 63:
        raise ValueError("a number is out of range")
    return number


def _identifier(value: Any) -> str:
    text = value if isinstance(value, (str, int)) else ""
    if len(str(text)) > 64:
        raise ValueError("a system identifier is too long")
    return str(text)


def _history(value: Any) -> tuple[HistoryRow, ...]:
    rows = msgspec.convert(value, tuple[HistoryRow, ...])
    if not all(0 <= row.timeline < 1 << 32 and 0 <= row.switch_lsn < 1 << 64 for row in rows):
        raise ValueError("a timeline history is out of range")
    return rows


def _shape(peer: Peer) -> tuple[object, ...]:
    return (peer.answered, peer.in_recovery, peer.timeline, peer.lsn, peer.frozen_epoch, peer.running, peer.candidate, peer.watchdog_failed)
