"""What the REST tests have in common: a published snapshot from a real Observation, an App, a server on a free port."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import trio

from pgha.clock import Instant
from pgha.dcs import Entry, Generation, Snapshot
from pgha.dcs.keys import Keys, parse
from pgha.model.cluster import LockSeen, Tags
from pgha.model.decision import Decision, Memory, Reason, Vote
from pgha.model.failsafe import FailsafeFacts, Ping, Promise
from pgha.model.lock import Identity, Licence, LicenceState
from pgha.model.node import Answer as Answered
from pgha.model.node import PostgresFacts, Row, WalReceiver
from pgha.model.observation import DcsFacts, Observation, Peer, Settings
from pgha.rest.published import Board, Published, publish_pass
from pgha.rest.requests import Answer
from pgha.rest.routes import App
from pgha.rest.server import Limits, Listen, serve
from pgha.rest.tls import Tls

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
NOW = Instant(1_000_000_000_000, 1_000_000_000_000)
WALL_S = 1795394808.5


class ClockAt:
    """A clock that stands where the test puts it."""

    def __init__(self) -> None:
        self.instant = NOW

    def now(self) -> Instant:
        return self.instant

    def wall_s(self) -> float:
        return WALL_S

    def go_on(self, seconds: float) -> None:
        self.instant = self.instant.plus_s(seconds)


class Inbox:
    """A `Requests` that keeps what was asked and answers what the test laid ready."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.woken: list[tuple[str, int]] = []
        self.pings: list[Ping] = []
        self.answers: dict[str, Answer] = {}
        self.peers: dict[str, Peer] = {}
        self.arrived = trio.Event()

    async def submit(self, kind: str, payload: Mapping[str, Any], *, deadline_s: float) -> Answer:
        self.asked.append((kind, dict(payload)))
        self.arrived.set()
        await trio.lowlevel.checkpoint()
        return self.answers[kind]

    async def others(self) -> dict[str, Peer]:
        await trio.lowlevel.checkpoint()
        return self.peers

    def failsafe(self, ping: Ping) -> tuple[Answer, int]:
        self.pings.append(ping)
        return self.answers["failsafe"], 67837408

    def wake(self, why: str, epoch: int) -> None:
        self.woken.append((why, epoch))


def golden(when: str) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((GOLDEN / f"{when}.json").read_text())
    return loaded


def golden_answer(when: str, which: str, request: str) -> dict[str, Any]:
    found: dict[str, Any] = next(answer for answer in golden(when)[which] if answer["request"] == request)
    return found


def view_of(etcd: Mapping[str, Mapping[str, Any]], **changed: Any) -> Any:
    """A ClusterView from a recording's keys. `changed`: values by short key with __ for /; None takes one away, a pair is
    value and lease."""
    values = {key: str(entry["value"]).encode() for key, entry in etcd.items()}
    leases = {key: 77 if entry["leased"] else 0 for key, entry in etcd.items()}
    for short, value in changed.items():
        key = "/service/bench/" + short.replace("__", "/")
        values.pop(key, None)
        if isinstance(value, tuple):
            value, leases[key] = value
        if value is not None:
            values[key] = value if isinstance(value, bytes) else json.dumps(value).encode()
    entries = {k: Entry(key=k, value=v, revision=9, lease=leases.get(k, 0)) for k, v in values.items()}
    return parse(Snapshot(revision=9, entries=entries, generation=Generation()), Keys("service", "bench"))


def primary_row() -> Row:
    replication = tuple({"usename": "replicator", "application_name": name, "client_addr": "127.0.0.1", "state": "streaming",
                         "sync_state": "async", "sync_priority": 0, "flush_lsn": 1} for name in ("n2", "n3"))
    return Row(in_recovery=False, timeline=2, lsn=67837408, replication=replication, server_version=150020,
               started_at="2026-11-23 00:45:40.926763+00:00", started_at_s=1795394740.926763, system_identifier="7711161683783831200")


def replica_row() -> Row:
    return Row(in_recovery=True, timeline=2, received_lsn=67837408, replayed_lsn=67837408, replayed_timestamp="2026-11-23 00:46:49.022191+00:00",
               receiver=WalReceiver(status="streaming", timeline=2, latest_end_lsn=67837408), server_version=150020,
               started_at="2026-11-23 00:45:40.945905+00:00", started_at_s=1795394740.945905, system_identifier="7711161683783831200")


def published(*, primary: bool = True, etcd: Mapping[str, Any] | None = None, row: Row | None = None, answer: Answered = "sql", ttl_s: float = 30.0,
              held: bool | None = None, tags: Mapping[str, Any] | None = None, pause: bool = False, state: str = "running",
              refusal: str = "", number: int = 1, vote: Vote | None = None, reasons: tuple[Reason, ...] = (), seen: bool = True, seen_lock_s_ago: float = 0.0,
              by_failsafe: bool = False, promise: Promise | None = None, memory: Memory | None = None, **changed: Any) -> Published:
    """A pass of n1 (primary, holding the lock) or n2 (replica) of the recorded cluster."""
    view = view_of(etcd or golden("steady")["etcd"], **changed) if seen else None
    held = primary if held is None else held
    licence = Licence(state=LicenceState.HELD, since=NOW, valid_until=NOW.plus_s(ttl_s), ttl_s=ttl_s, by_failsafe=by_failsafe) if held else Licence()
    observation = Observation(
        now=NOW, wall_s=WALL_S, number=number, me=Identity(name="n1" if primary else "n2", node_id="id", incarnation="i"),
        settings=Settings(ttl_s=ttl_s, pause=pause, tags=Tags.of(dict(tags or {}))), dcs=DcsFacts(view=view, heard_at=NOW if seen else None, lock_seen=LockSeen(since=NOW.plus_s(-seen_lock_s_ago))),
        licence=licence, postgres=PostgresFacts(process="running", answer=answer, row=row or (primary_row() if primary else replica_row())),
        failsafe=FailsafeFacts(promise=promise),
    )
    decision = Decision(situation="leading" if primary else "following", summary="no action", state=state, reasons=reasons, paused=pause,
                        role="primary" if primary else "replica", vote=vote or Vote(timeline=2, lsn=67837408), memory=memory or Memory())
    return publish_pass(observation, decision, scope="bench", failover_refusal=refusal)


def app_for(first: Published, *, access: Any = None) -> tuple[App, Board, Inbox, ClockAt]:
    board, inbox, clock = Board(first), Inbox(), ClockAt()
    return App(board, inbox, clock=clock, access=access, headers={"Server": "pgha/test"}), board, inbox, clock


@asynccontextmanager
async def serving(app: Any, *, limits: Limits | None = None, ssl_context: Any = None, headers: Mapping[str, str] | None = None) -> AsyncIterator[tuple[str, int]]:
    async with trio.open_nursery() as nursery:
        listen = Listen(addresses=[("127.0.0.1", 0)], limits=limits or Limits(), tls=Tls(ssl_context) if ssl_context else None, headers=headers or {"Server": "pgha/test"})
        bound: list[tuple[str, int]] = await nursery.start(serve, listen, app)
        yield bound[0]
        nursery.cancel_scope.cancel()


async def talk(address: tuple[str, int], *parts: bytes, timeout_s: float = 10.0) -> bytes:
    """Send the parts one after another, read until the server closes."""
    with trio.fail_after(timeout_s):
        stream = await trio.open_tcp_stream(*address)
        async with stream:
            for part in parts:
                try:
                    await stream.send_all(part)
                except trio.BrokenResourceError:
                    break      # it has answered already and closed
            return await until_closed(stream)


async def until_closed(stream: trio.abc.ReceiveStream) -> bytes:
    data = b""
    while True:
        try:
            more = await stream.receive_some(65536)
        except trio.BrokenResourceError:
            return data
        if not more:
            return data
        data += more


def status_of(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1])


def body_of(answer: bytes) -> bytes:
    return answer.partition(b"\r\n\r\n")[2]


async def ask(address: tuple[str, int], method: str, target: str, body: Any = None, headers: Mapping[str, str] | None = None) -> tuple[int, bytes]:
    """One request of HTTP/1.0, its status and body."""
    data = b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [f"{method} {target} HTTP/1.0", *[f"{k}: {v}" for k, v in (headers or {}).items()]]
    if body is not None:
        lines.append(f"Content-Length: {len(data)}")
    answer = await talk(address, "\r\n".join(lines).encode() + b"\r\n\r\n" + data)
    return status_of(answer), body_of(answer)


def shape(value: Any) -> Any:
    """Types and key order without the values: what a recording and an answer must have in common."""
    if isinstance(value, dict):
        return [(key, shape(item)) for key, item in value.items()]
    if isinstance(value, list):
        return [shape(item) for item in value]
    return type(value).__name__


def replaced(value: Published, **fields: Any) -> Published:
    return msgspec.structs.replace(value, **fields)
