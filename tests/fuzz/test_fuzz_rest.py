"""Whatever a client sends: an answer with a reason, 5xx only where the reference has it, and nothing kept or logged without end."""

from __future__ import annotations

import json
import logging
import random
import subprocess
import sys
import time
import tracemalloc
from typing import Any
from urllib.parse import quote

import pytest
import trio
import trio.lowlevel
from hostile import BITS, SCALARS, broken, corpus, dumped, inputs, some_json
from rest_world import ClockAt, app_for, published, serving, status_of, talk, until_closed

from pgha.clock import SystemClock
from pgha.config.cluster import validate_change
from pgha.dcs import Put
from pgha.dcs.keys import Keys, encode
from pgha.dcs.memory import MemoryStore, MemoryWorld
from pgha.inbox import Inbox
from pgha.lock.renewer import Renewer, Timing
from pgha.log import scrub
from pgha.model.action import AcquireLock
from pgha.model.decision import Mandate
from pgha.model.lock import Identity, LicenceState
from pgha.rest.access import Access
from pgha.rest.health import parse_lag
from pgha.rest.requests import Answer
from pgha.rest.routes import App
from pgha.rest.server import Limits
from pgha.rest.wire import Request, exact_request, split_target

HEALTHY = b"GET /primary HTTP/1.0\r\n\r\n"
KEYS = Keys("service", "bench")
READS = ("/", "/primary", "/replica", "/read-only", "/leader", "/standby-leader", "/health", "/sync", "/quorum", "/async", "/read-only-sync", "/read-only-quorum", "/liveness", "/readiness", "/patroni",
         "/cluster", "/history", "/config", "/failsafe", "/metrics", "/pgha/decision", "/pgha/observation", "/pgha/vote", "/pgha", "/nonsense")
CHANGES = (*(("PATCH", "/config"), ("PUT", "/config")) * 5, ("POST", "/reload"), ("POST", "/restart"), ("DELETE", "/restart"), ("POST", "/switchover"), ("DELETE", "/switchover"), ("POST", "/failover"),
           ("POST", "/reinitialize"), ("POST", "/sigterm"), ("POST", "/citus"), *(("POST", f"/pgha/dry-run/{c}") for c in ("switchover", "failover", "restart", "reinitialize")), ("DELETE", "/config"), ("TRACE", "/"), ("", "/config"))
PARAMETERS = ("lag", "replication_state", "tag_a", "tag_", "mode", "epoch", "wait", "x", "")
BODIES = {"/config": {"ttl": 30, "loop_wait": 5, "postgresql": {"parameters": {"max_connections": "100"}}, "slots": {"a": {"type": "physical"}}}, "/restart": {"timeout": "10s", "role": "primary", "postgres_version": "16.4", "restart_pending": True, "schedule": "2099-01-01T00:00:00Z"},
          "/switchover": {"leader": "n1", "candidate": "n2", "scheduled_at": "2099-01-01T00:00:00Z"}, "/failover": {"candidate": "n2"}, "/reinitialize": {"force": True, "from_leader": False}}


BODIES |= {f"/pgha/dry-run{path}": BODIES[path] for path in ("/switchover", "/failover", "/restart")} | {"/pgha/dry-run/reinitialize": {"force": True, "from_leader": False}}


def text_of(chance: random.Random) -> str:
    return chance.choice(BITS).decode("latin-1") if chance.random() < 0.5 else str(chance.choice(SCALARS))[:6000]


def a_question(chance: random.Random) -> Request:
    path = chance.choice(READS)
    if chance.random() < 0.3:
        path = path[:chance.randrange(len(path) + 1)] + text_of(chance)[:200] + path
    query = {chance.choice(PARAMETERS) + (text_of(chance)[:20] if chance.random() < 0.1 else ""): text_of(chance) for _ in range(chance.randrange(4))}
    if path == "/pgha/vote" and query.get("wait") and chance.random() < 0.9:
        query["wait"] = "0"
    return Request(method=chance.choice(("GET", "GET", "HEAD", "OPTIONS")), path=path, query=query, headers={"host": text_of(chance)[:50]}, peer="127.0.0.1")


def a_change(chance: random.Random) -> Request:
    method, path = chance.choice(CHANGES)
    good = BODIES.get(path, {})
    body = broken(chance, dumped(good), good) if chance.random() < 0.8 else dumped({"x": some_json(chance)} | good)
    headers = {"content-length": str(len(body))} if chance.random() < 0.9 else {}
    if chance.random() < 0.3:
        headers["authorization"] = chance.choice(("", "Basic", "Basic ", "Basic " + text_of(chance)[:300], "Bearer x", text_of(chance)[:300]))
    return Request(method=method, path=path + (text_of(chance)[:30] if chance.random() < 0.05 else ""), body=body, headers=headers, peer=chance.choice(("127.0.0.1", "", "::1%eth0", "nonsense")))


def allowed(response: Any) -> bool:
    return response.status in (200, 202, 400, 401, 403, 404, 409, 411, 412, 422, 501, 502, 503)


def a_node() -> tuple[App, Any, MemoryWorld]:
    """The real inbox on a store in memory, with the recorded cluster's configuration in it."""
    first = published()
    world = MemoryWorld(ClockAt())
    world.transact([], [Put(key=KEYS.path("config"), value=encode(BODIES["/config"]))])
    inbox = Inbox(store=MemoryStore(world), keys=KEYS, clock=ClockAt(), view=lambda: first.view, wake=lambda: None)
    app, *_ = app_for(first)
    app.requests = inbox
    app.changes._requests = inbox
    return app, inbox, world


def test_every_question_has_an_answer(times: int) -> None:
    async def main() -> None:
        app, *_ = a_node()
        chance = random.Random(f"questions {times}")
        for _ in range(4000 * times):
            request = a_question(chance)
            with trio.fail_after(10):
                response = await app.handle(request)
            assert allowed(response) or response.status == 404, (request, response)
            assert len(response.body) < 1 << 20
            key = f"{request.method} {quote(request.path)}?{'&'.join(f'{quote(k)}={quote(v)}' for k, v in request.query.items())}".encode()
            if exact_request(key + b" HTTP/1.0\r\n\r\n") is not None:
                app.quick(key, keep_alive=False)

    trio.run(main)


@pytest.mark.parametrize("password", ["", "hush"])
def test_every_change_has_an_answer_and_only_what_is_allowed_is_written(password: str, times: int) -> None:
    """Also as a whole pass would see it afterwards: JSON, and within the rules."""
    async def main() -> None:
        app, inbox, world = a_node()
        app.access = Access(username="u" if password else "", password=password)
        chance = random.Random(f"changes {password} {times}")
        written = 0

        async def settle_requests() -> None:
            while True:
                await trio.lowlevel.checkpoint()
                for request in inbox.requests:
                    inbox.answer(request.id, 200, "done")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(settle_requests)
            for _ in range(2500 * times):
                request = a_change(chance)
                before = world.revision
                with trio.fail_after(60), trio.move_on_after(0.5 if request.path.startswith(("/switchover", "/failover")) else 30) as waited:
                    response = await app.handle(request)
                    assert allowed(response), (request, response)
                    assert len(response.body) < 64 << 10
                if world.revision != before:
                    assert not password
                    assert not waited.cancelled_caught or "over" in request.path
                    config = world.read(KEYS.path("config")).entries[KEYS.path("config")].value
                    value = json.loads(config, parse_constant=lambda name: pytest.fail(f"{name} was written"))
                    assert isinstance(value, dict)
                    written += 1
                    assert validate_change(BODIES["/config"], value) == [], config
            nursery.cancel_scope.cancel()
        assert bool(written) == (not password)

    trio.run(main)


def test_bytes_on_the_wire(times: int, caplog: pytest.LogCaptureFixture) -> None:
    good = [b"GET /replica?lag=1MB HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", b'PATCH /config HTTP/1.1\r\nHost: x\r\nContent-Length: 12\r\nConnection: close\r\n\r\n{"ttl":  30}',
            b"POST /switchover HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n5\r\nhello\r\n0\r\n\r\n"]

    async def main() -> None:
        app, *_ = a_node()
        async with serving(app, limits=Limits(head_s=0.3, body_s=0.3, idle_s=0.3)) as address:
            limit = trio.CapacityLimiter(20)

            async def one(what: str, data: bytes) -> None:
                async with limit:
                    answer = await talk(address, data)
                assert answer == b"" or answer.startswith(b"HTTP/1.1 "), (what, data[:100], answer[:100])
                assert b" 500 " not in answer[:20], (what, data[:200], answer)

            async with trio.open_nursery() as nursery:
                for what, data in corpus("rest"):
                    nursery.start_soon(one, what, data)
                for n, request in enumerate(good):
                    for data in list(inputs("rest", request, count=100 * times, seed=(n, times)))[len(corpus("rest")):]:
                        nursery.start_soon(one, "by chance", data)
            assert status_of(await talk(address, HEALTHY)) == 200

    trio.run(main)
    assert "could not be answered" not in caplog.text


def test_a_defect_in_a_health_check_ends_nothing_and_fills_no_log(caplog: pytest.LogCaptureFixture) -> None:
    """Found by reading: `quick` runs in the accept loop, where an exception would have ended the agent."""
    class Defective:
        def quick(self, key: bytes, *, keep_alive: bool) -> bytes | None:
            raise ZeroDivisionError(key)

        def has_places(self, number: int) -> None: ...

        def refuses(self, request: Request) -> None:
            return None

        async def handle(self, request: Request) -> Any:
            raise KeyError(request.path)

    async def main() -> None:
        async with serving(Defective()) as address:
            for n in range(50):
                assert status_of(await talk(address, b"GET /%d HTTP/1.0\r\n\r\n" % n)) == 500
                assert status_of(await talk(address, b"GET /%d HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n" % n)) == 500

    with caplog.at_level(logging.INFO):
        trio.run(main)
    assert 1 <= len([r for r in caplog.records if r.name.startswith("pgha")]) <= 4


# --- time and memory -------------------------------------------------------------------------------------------------------

SLOW: dict[str, Any] = {
    "lag with blanks": lambda: parse_lag("1" + " " * 16_000 + "!"), "lag with digits": lambda: parse_lag("1" * 16_000 + "!"),
    "a target of escapes": lambda: split_target("/x?" + "%41" * 5000), "a target of parameters": lambda: pytest.raises(ValueError, split_target, "/x?" + "a&" * 8000),
    "a head of blanks": lambda: exact_request(b"GET / HTTP/1.1\r\nA:" + b" \t" * 8000 + b"\x00\r\n\r\n"), "a head of colons": lambda: exact_request(b"GET / HTTP/1.1\r\n" + b"a:" * 8000),
    "a text of URLs": lambda: scrub("://a:" * 200_000), "a text of passwords": lambda: scrub("password='" * 100_000), "a text of quotes": lambda: scrub("password='" + "''" * 200_000),
    "a text of headers": lambda: scrub("authorization: " * 70_000), "a text of blanks": lambda: scrub("passwd" + " " * 1_000_000),
    "keys that are nearly known": lambda: validate_change({}, {f"loop_wai{n}": 1 for n in range(60_000)}), "one key of a megabyte": lambda: validate_change({}, {"l" * 1_000_000: 1}),
    "unknown keys in a table": lambda: validate_change({}, {"postgresql": {f"parameter{n}": 1 for n in range(60_000)}}),
    "parameters with odd values": lambda: validate_change({}, {"postgresql": {"parameters": {f"p{n}": [] for n in range(60_000)}}}),
}


@pytest.mark.parametrize("what", sorted(SLOW))
def test_nothing_takes_quadratic_time(what: str) -> None:
    """Each took seconds to hours, or would have, in the thread in which the lock is renewed. (The bound is for slow machines.)"""
    began = time.process_time()
    SLOW[what]()
    assert time.process_time() - began < 1.5


def test_problems_are_told_in_bounded_length() -> None:
    for change in ({f"nonsense{n}": 1 for n in range(60_000)}, {"x" * 1_000_000: 1}, {"postgresql": {f"nonsense{n}": 1 for n in range(60_000)}}, {"postgresql": {"parameters": {"x" * 1_000_000: []}}}):
        problems = validate_change({}, change)
        assert problems
        assert len("\n".join(problems)) < 30_000


MUCH = b"PATCH /config HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n" + b" " * 900_000


def test_bodies_of_all_connections_together_are_bounded() -> None:
    async def main() -> None:
        app, _, inbox, _ = app_for(published())
        inbox.answers["patch_config"] = Answer(status=200, text="{}", json=True)
        limits = Limits(body_s=300.0, bodies_bytes=2 << 20)
        statuses: list[int] = []

        async def send(address: tuple[str, int]) -> None:
            stream = await trio.open_tcp_stream(*address)
            async with stream:
                try:
                    await stream.send_all(MUCH)
                except trio.BrokenResourceError:
                    pass        # refused before it was all there
                answer = await until_closed(stream)
                if answer:
                    statuses.append(status_of(answer))

        tracemalloc.start()
        async with serving(app, limits=limits) as address:
            with trio.fail_after(120):
                async with trio.open_nursery() as nursery:
                    for _ in range(80):
                        nursery.start_soon(send, address)
                    while len(statuses) < 60:
                        await trio.sleep(0.05)
                    nursery.cancel_scope.cancel()
                assert set(statuses) == {503}
                assert tracemalloc.get_traced_memory()[1] < 32 << 20, "of 72 MB that were sent"
                while status_of(await talk(address, b'PATCH /config HTTP/1.0\r\nContent-Length: 10\r\n\r\n{"ttl":20}')) != 200:
                    await trio.sleep(0.05)      # what they held is free as soon as their end is noticed

    try:
        trio.run(main)
    finally:
        tracemalloc.stop()


def test_who_may_not_change_anything_is_refused_before_the_body() -> None:
    async def main() -> None:
        app, *_ = app_for(published(), access=Access(username="u", password="p"))
        async with serving(app, limits=Limits(body_s=30.0)) as address:
            assert status_of(await talk(address, b"PATCH /config HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n", timeout_s=5)) == 401
            assert status_of(await talk(address, b"POST /nonsense HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n", timeout_s=5)) == 501
            assert status_of(await talk(address, b"POST /reload HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")) == 401

    trio.run(main)


def test_clients_that_owe_a_body_or_do_not_read_give_way_to_others() -> None:
    async def main() -> None:
        app, *_ = app_for(published())
        async with serving(app, limits=Limits(connections=8, body_s=30.0, write_s=30.0)) as address:
            streams = []
            for n in range(24):
                stream = await trio.open_tcp_stream(*address)
                streams.append(stream)
                await stream.send_all(b"PATCH /config HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n{" if n % 2 else b"GET /pgha/observation HTTP/1.1\r\nHost: x\r\n\r\n" * 200)
            await trio.sleep(0.2)
            for request in (HEALTHY, b"GET /cluster HTTP/1.0\r\n\r\n", b"GET /history HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"):
                assert status_of(await talk(address, request)) == 200
            for stream in streams:
                await stream.aclose()

    trio.run(main)


# --- the renewer beside it -------------------------------------------------------------------------------------------------

_CROWD = """
import resource, selectors, socket, sys, time
soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
port, kind, many = int(sys.argv[1]), sys.argv[2], int(sys.argv[3])
first = {"idle": b"", "loris": b"GET /primary HTTP/1.1\\r\\nHost: x\\r\\nA: ", "bodies": b"PATCH /config HTTP/1.1\\r\\nHost: x\\r\\nContent-Length: 1000\\r\\n\\r\\n",
         "chunks": b"PATCH /config HTTP/1.1\\r\\nHost: x\\r\\nTransfer-Encoding: chunked\\r\\n\\r\\n", "deaf": b"GET /pgha/observation HTTP/1.1\\r\\nHost: x\\r\\n\\r\\n" * 50}[kind]
more = {"idle": b"", "loris": b"b", "bodies": b"{", "chunks": b"1\\r\\n \\r\\n" * 2000, "deaf": b"GET /pgha/observation HTTP/1.1\\r\\nHost: x\\r\\n\\r\\n"}[kind]

def connect():
    s = socket.socket()
    s.settimeout(2)
    s.connect(("127.0.0.1", port))
    s.setblocking(False)
    try:
        s.send(first)
    except OSError:
        pass
    return s

crowd = []
until = time.monotonic() + float(sys.argv[4])
print("begun", flush=True)
while time.monotonic() < until:
    if len(crowd) < many:
        for _ in range(50):
            try:
                crowd.append(connect())
            except OSError:
                break
    else:
        time.sleep(0.05)
    for s in list(crowd):
        try:
            if more:
                s.send(more)
            elif s.recv(1, socket.MSG_PEEK) == b"":
                raise ConnectionResetError
        except BlockingIOError:
            pass
        except OSError:
            crowd.remove(s)
            s.close()
"""


@pytest.mark.parametrize(("kind", "many"), [("idle", 1000), ("loris", 300), ("bodies", 600), ("chunks", 40), ("deaf", 100)])
def test_a_crowd_delays_neither_the_lock_nor_a_health_check(kind: str, many: int) -> None:
    """The real server and the real renewer in one process, the crowd in another. With ttl 3 the licence ends 1.9 s after a
    renewal that was missed; generous for a machine that does other things, and nothing would survive being held up."""
    async def main() -> None:
        clock = SystemClock()
        world = MemoryWorld(clock)
        renewer = Renewer(store=MemoryStore(world), keys=KEYS, me=Identity(name="n1", node_id="i", incarnation="r"), clock=clock,
                          timing=lambda: Timing(ttl_s=3.0, loop_wait_s=1.0), changed=lambda: None)
        app, board, *_ = app_for(published())
        app.clock = ClockAt()
        took: list[float] = []
        async with serving(app) as address, trio.open_nursery() as nursery:
            nursery.start_soon(renewer.run)
            renewer.give_mandate(Mandate(kind="running", until=clock.now().plus_s(1000)), number=1)
            await renewer.acquire(AcquireLock(lock_revision=0, lock_value=b"", epoch_revision=0, epoch_number=0), deadline_s=1.0)
            with subprocess.Popen([sys.executable, "-c", _CROWD, str(address[1]), kind, str(many), "2.0"], stdout=subprocess.PIPE) as crowd:
                assert crowd.stdout is not None
                await trio.to_thread.run_sync(crowd.stdout.readline)
                while crowd.poll() is None:
                    for request in (HEALTHY, b"GET /primary HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"):
                        began = trio.current_time()
                        assert status_of(await talk(address, request)) == 200
                        took.append(trio.current_time() - began)
                    assert renewer.licence.state is LicenceState.HELD
                    assert renewer.licence.valid_until is not None
                    await trio.sleep(0.05)
            assert renewer.licence.sequence >= 2, "it was renewed all the while"
            nursery.cancel_scope.cancel()
        assert took
        assert max(took) < 3.5, "a health check's own limits begin at this"

    trio.run(main)


