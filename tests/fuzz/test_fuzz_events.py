"""Whoever asks to follow the events, whatever it says then, and however many never read: nobody else notices."""

from __future__ import annotations

import base64
import json
import logging
import random
import resource
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import trio
from hostile import BITS, corpus, inputs
from rest_world import WALL_S, ClockAt, Inbox, published, serving, status_of, talk, until_closed

from pgha.clock import SystemClock
from pgha.dcs.keys import Keys
from pgha.dcs.memory import MemoryStore, MemoryWorld
from pgha.events import EventLog
from pgha.lock.renewer import Renewer, Timing
from pgha.model.action import AcquireLock
from pgha.model.decision import Mandate
from pgha.model.event import KINDS, RoleEvent
from pgha.model.lock import Identity, LicenceState
from pgha.rest.published import Board
from pgha.rest.routes import App
from pgha.rest.server import Limits
from pgha.rest.stream import Readers
from pgha.rest.wire import Request

HEALTHY = b"GET /primary HTTP/1.0\r\n\r\n"
UPGRADE = b"GET /pgha/events?after=0&kinds=role HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: keep-alive, Upgrade\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: " \
    + base64.b64encode(b"k" * 16) + b"\r\n\r\n"
#: a ping, a pong, an unfinished text, its end, a close; the mask is 0
TALK = b"\x89\x84\0\0\0\0ping" b"\x8a\x80\0\0\0\0" b"\x01\x83\0\0\0\0abc" b"\x80\x83\0\0\0\0def" b"\x82\xfe\x01\0\0\0\0\0" + b"z" * 256 + b"\x88\x82\0\0\0\0\x03\xe8"


def a_node(at_most: int = 5000) -> tuple[App, EventLog, Readers]:
    events = EventLog(run="r1", node="n1", scope="bench")
    readers = Readers(events, clock=ClockAt(), at_most=lambda: at_most)
    return App(Board(published()), Inbox(), clock=ClockAt(), readers=readers), events, readers


def happens(events: EventLog) -> None:
    events.add(RoleEvent(role="primary", state="running", timeline=1, was_role="", was_state=""), wall_s=WALL_S)


async def said_to(address: tuple[str, int], data: bytes) -> bytes:
    """The whole answer to a client that says this and then nothing more."""
    with trio.fail_after(20):
        stream = await trio.open_tcp_stream(*address)
        async with stream:
            try:
                await stream.send_all(data)
                await stream.send_eof()
            except trio.BrokenResourceError:
                pass    # it has been closed already
            return await until_closed(stream)


def test_bytes_instead_of_an_upgrade_and_after_it(times: int, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        app, events, readers = a_node()
        async with serving(app, limits=Limits(head_s=0.3, body_s=0.3, idle_s=0.3)) as address:
            limit = trio.CapacityLimiter(20)
            answers = {b"101": 0, b"400": 0}

            async def one(data: bytes) -> None:
                async with limit:
                    answer = await said_to(address, data)
                assert answer == b"" or answer.startswith(b"HTTP/1.1 "), (data[:100], answer[:100])
                assert b" 500 " not in answer[:20], (data[:200], answer)
                answers[answer[9:12]] = answers.get(answer[9:12], 0) + 1
                happens(events)

            async with trio.open_nursery() as nursery:
                for _, data in corpus("events"):
                    nursery.start_soon(one, data)
                for n, good in enumerate((UPGRADE, UPGRADE + TALK)):
                    for data in list(inputs("events", good, count=150 * times, seed=(n, times)))[len(corpus("events")):]:
                        nursery.start_soon(one, data)
                for data in list(inputs("events", TALK, count=300 * times, seed=times))[len(corpus("events")):]:
                    nursery.start_soon(one, UPGRADE + data)
            assert answers[b"101"] > 300
            assert answers[b"400"] > 20
            with trio.fail_after(10):
                while len(readers):
                    await trio.sleep(0.01)
            assert status_of(await talk(address, HEALTHY)) == 200

    trio.run(main)
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == []


def test_every_page_that_is_asked_for(times: int) -> None:
    app, events, readers = a_node()
    for _ in range(50):
        happens(events)
    chance = random.Random(f"pages {times}")

    def text() -> str:
        return chance.choice((*KINDS, "", "0", "r1-3", "r1-99", "r2-1", "r1-", ",", *(bit.decode("latin-1") for bit in BITS)))

    for _ in range(3000 * times):
        query = {name: ",".join(text() for _ in range(chance.randrange(1, 4))) if name == "kinds" else text() for name in chance.sample(("after", "kinds", "x"), chance.randrange(4))}
        headers = {name: text() for name in chance.sample(("last-event-id", "sec-websocket-key", "sec-websocket-version", "connection", "origin", "host"), chance.randrange(7))}
        response = readers.page(Request(method="GET", path="/pgha/events", query=query, headers=headers))
        assert response.status in (200, 400), (query, response)
        assert len(response.body) < 20_000
        if response.status == 200:
            json.loads(response.body)
        upgraded: Any = app.upgrade(Request(method="GET", path="/pgha/events", query=query, headers=headers))
        assert getattr(upgraded, "status", 0) in (400, 403, 426), (query, headers)


# --- the renewer beside it -------------------------------------------------------------------------------------------------

_CROWD = """
import socket, sys, time
port, many, for_s = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
crowd = []
for n in range(many):
    s = socket.create_connection(("127.0.0.1", port), timeout=10)
    s.sendall(UPGRADE)
    crowd.append(s)
for s in crowd:
    assert s.recv(9, socket.MSG_PEEK | socket.MSG_WAITALL).startswith(b"HTTP/1.1"), "not served"
print("all are there", flush=True)
time.sleep(for_s)
"""


@pytest.fixture
def many_files() -> Iterator[None]:
    """As packaging/pgha.service has it; a quarter of them may be readers' (the crowd inherits it, too)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 16384), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.usefixtures("many_files")
def test_a_thousand_readers_that_never_read_delay_neither_the_lock_nor_a_health_check() -> None:
    """The real server and the real renewer in one process, the crowd in another, and something happens all the while. As in
    test_fuzz_rest.py: with ttl 3 the licence ends 1.9 s after a renewal that was missed."""
    async def main() -> None:
        clock = SystemClock()
        world = MemoryWorld(clock)
        renewer = Renewer(store=MemoryStore(world), keys=Keys("service", "bench"), me=Identity(name="n1", node_id="i", incarnation="r"), clock=clock,
                          timing=lambda: Timing(ttl_s=3.0, loop_wait_s=1.0), changed=lambda: None)
        app, events, readers = a_node()
        took: list[float] = []
        async with serving(app) as address, trio.open_nursery() as nursery:
            nursery.start_soon(renewer.run)
            renewer.give_mandate(Mandate(kind="running", until=clock.now().plus_s(1000)), number=1)
            await renewer.acquire(AcquireLock(lock_revision=0, lock_value=b"", epoch_revision=0, epoch_number=0), deadline_s=1.0)
            code = _CROWD.replace("UPGRADE", repr(UPGRADE))
            with subprocess.Popen([sys.executable, "-c", code, str(address[1]), "1000", "2.5"], stdout=subprocess.PIPE) as crowd:
                assert crowd.stdout is not None
                line = await trio.to_thread.run_sync(crowd.stdout.readline)
                assert line == b"all are there\n"
                assert len(readers) == 1000
                while crowd.poll() is None:
                    for _ in range(5):
                        happens(events)
                    for request in (HEALTHY, b"GET /primary HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"):
                        began = trio.current_time()
                        assert status_of(await talk(address, request)) == 200
                        took.append(trio.current_time() - began)
                    assert renewer.licence.state is LicenceState.HELD
                    await trio.sleep(0.05)
            assert crowd.returncode == 0
            assert renewer.licence.sequence >= 2, "it was renewed all the while"
            with trio.fail_after(10):
                while len(readers):
                    await trio.sleep(0.05)
            nursery.cancel_scope.cancel()
        assert took
        assert max(took) < 3.5, "a health check's own limits begin at this"

    trio.run(main)
