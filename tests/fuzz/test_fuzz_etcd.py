"""Whatever answers in etcd's place, or in its middle: a typed error in time, in bounded memory, and the next call works."""

from __future__ import annotations

import base64
import logging
import tracemalloc
from contextlib import aclosing
from functools import partial
from typing import Any

import pytest
import trio
from hostile import dumped, inputs
from hostile_server import CHUNKED, Behaviour, behaviours, by_chance, chunk, http, serving, without_end

from pgha.dcs import Compare, Put
from pgha.dcs import etcd3_json as wire
from pgha.dcs.endpoints import MAX_ANSWER_BYTES
from pgha.dcs.etcd3 import Etcd3Store
from pgha.errors import DcsError

DEADLINE_S = 0.4
KEY = base64.b64encode(b"/service/demo/pgha/lock").decode()
HEADER = {"cluster_id": "14841639068965178418", "member_id": "10276657743932975437", "revision": "7", "raft_term": "2"}
RANGE = {"header": HEADER, "kvs": [{"key": KEY, "create_revision": "5", "mod_revision": "7", "version": "2", "value": base64.b64encode(b'{"holder":"n1"}').decode(), "lease": "12"}], "count": "1"}
TRANSACTION = {"header": HEADER, "succeeded": True, "responses": [{"response_put": {"header": {"revision": "7"}}}, {"response_range": RANGE}]}
GOOD: dict[bytes, Any] = {
    b"/v3/kv/range": RANGE, b"/v3/kv/txn": TRANSACTION, b"/v3/lease/grant": {"header": HEADER, "ID": "5", "TTL": "30"},
    b"/v3/lease/keepalive": {"result": {"header": HEADER, "ID": "5", "TTL": "30"}}, b"/v3/lease/revoke": {"header": HEADER}, b"/v3/kv/compaction": {"header": HEADER},
    b"/v3/maintenance/alarm": {"header": HEADER, "alarms": [{"alarm": "NOSPACE"}]}, b"/v3/maintenance/status": {"header": HEADER, "version": "3.5.16", "dbSize": "20480"},
    b"/v3/auth/authenticate": {"header": HEADER, "token": "abc.5"},
}
EVENT = {"result": {"header": HEADER, "events": [{"kv": RANGE["kvs"][0]}]}}
CREATED = dumped({"result": {"header": HEADER, "created": True}}) + b"\n"


class Etcd:
    """A server that behaves badly until it is told to be good."""

    def __init__(self, behave: Behaviour) -> None:
        self.behave: Behaviour | None = behave

    async def answer(self, path: bytes, _body: bytes, stream: trio.SocketStream) -> None:
        if self.behave is not None:
            await self.behave(stream)
        elif path == b"/v3/watch":
            await stream.send_all(CHUNKED + chunk(CREATED) + chunk(dumped(EVENT) + b"\n"))
            await trio.sleep_forever()
        else:
            await stream.send_all(http(dumped(GOOD[path]), headers=b"Connection: close\r\n"))


async def watch_once(store: Etcd3Store) -> None:
    async with store.watch("/service/demo/", after_revision=5) as changes:
        with trio.move_on_after(DEADLINE_S):
            async for _ in changes:
                pass


def calls(store: Etcd3Store) -> dict[str, Any]:
    return {
        "read": partial(store.read, "/service/demo/", deadline_s=DEADLINE_S),
        "transact": partial(store.transact, compares=[Compare(key="/service/demo/x", revision=0, value=b"v")], puts=[Put(key="/service/demo/x", value=b"w")], read=["/service/demo/x"],
                            deadline_s=DEADLINE_S, attempt_s=0.2),
        "grant": partial(store.grant, 5.0, deadline_s=DEADLINE_S), "renew": partial(store.renew, 5, deadline_s=DEADLINE_S), "revoke": partial(store.revoke, 5, deadline_s=DEADLINE_S),
        "capacity": partial(store.capacity, deadline_s=DEADLINE_S), "compact": partial(store.compact, 5, deadline_s=DEADLINE_S), "watch": partial(watch_once, store),
    }


async def suffer(what: str, behave: Behaviour, names: tuple[str, ...], *, user: str | None = None) -> None:
    """Each call ends in time, with an answer or an error of the store's; then the server is good, and everything works."""
    etcd = Etcd(behave)
    async with serving(etcd.answer) as port:
        async with aclosing(Etcd3Store([f"http://127.0.0.1:{port}"], username=user, password="x" if user else None)) as store:
            for name in names:
                began = trio.current_time()
                try:
                    await calls(store)[name]()
                except DcsError as error:
                    assert len(str(error)) < 2000, (what, name, len(str(error)))
                took_s = trio.current_time() - began
                assert took_s < DEADLINE_S + 10, (what, name, took_s)
            etcd.behave = None
            known = store.generation
            assert 0 <= known.revision < 1 << 63, (what, known)
        # What was believed of the store is not forgotten, so a new client: what matters is that nothing of the old one is left.
        async with aclosing(Etcd3Store([f"http://127.0.0.1:{port}"], username=user, password="x" if user else None)) as store:
            assert (await store.read("/service/demo/", deadline_s=15.0)).revision == 7


def in_parallel(todo: dict[str, Any], at_once: int = 40) -> None:
    async def main() -> None:
        limit = trio.CapacityLimiter(at_once)

        async def one(function: Any) -> None:
            async with limit:
                await function()

        with trio.fail_after(600):
            async with trio.open_nursery() as nursery:
                for function in todo.values():
                    nursery.start_soon(one, function)

    trio.run(main)


QUICK, WATCH = ("read", "transact", "renew"), ("watch",)
BAD = behaviours(dumped(RANGE))


@pytest.mark.parametrize("names", [QUICK, ("grant", "revoke", "compact", "capacity"), WATCH], ids=lambda names: "+".join(names))
def test_no_behaviour_is_fatal_to_a_call(names: tuple[str, ...]) -> None:
    in_parallel({what: partial(suffer, what, behave, names) for what, behave in BAD.items()})


def test_no_behaviour_is_fatal_to_a_login() -> None:
    in_parallel({what: partial(suffer, what, behave, ("read", "watch"), user="u") for what, behave in BAD.items() if "end" not in what})


def test_no_answer_by_chance_is_fatal(times: int) -> None:
    todo: dict[str, Any] = {}
    for path, name in ((b"/v3/kv/range", "read"), (b"/v3/kv/txn", "transact"), (b"/v3/lease/keepalive", "renew"), (b"/v3/maintenance/status", "capacity")):
        todo |= {what: partial(suffer, what, behave, (name,)) for what, behave in by_chance(f"{name}{times}", dumped(GOOD[path]), GOOD[path], 12 * times).items()}
    in_parallel(todo)


@pytest.mark.parametrize("kind", [wire.RangeAnswer, wire.TransactionAnswer, wire.GrantAnswer, wire.KeepAliveAnswer, wire.StatusAnswer, wire.AlarmAnswer, wire.TokenAnswer, wire.WatchLine])
def test_bytes_are_an_answer_or_not_understood(kind: Any, times: int) -> None:
    decoder = wire.Decoder(kind)
    good = {wire.TransactionAnswer: TRANSACTION, wire.WatchLine: EVENT, wire.StatusAnswer: GOOD[b"/v3/maintenance/status"], wire.TokenAnswer: GOOD[b"/v3/auth/authenticate"]}.get(kind, RANGE)
    for data in inputs("etcd", dumped(good), good, count=800 * times, seed=(kind.__name__, times)):
        for status in (200, 500, 404):
            fault = wire.fault_in(status, data)
            assert fault is None or len(fault.message) <= wire.WORDS_CHARACTERS + 1
        try:
            answer = decoder.decode(data)
        except wire.NotUnderstood as error:
            assert len(str(error)) < 500
            continue
        if kind is wire.RangeAnswer:
            wire.entries(answer.kvs)
        elif kind is wire.WatchLine and answer.result is not None:
            wire.changes(answer.result.events)


@pytest.mark.parametrize("what", ["a body without end", "a body of a terabyte", "chunks without end", "a header without end", "trailers without end", "a gzip bomb", "empty lines without end"])
@pytest.mark.parametrize("name", ["transact", "watch"])
def test_what_has_no_end_is_not_kept(what: str, name: str) -> None:
    tracemalloc.start()
    try:
        in_parallel({what: partial(suffer, what, BAD[what], (name,))})
        assert tracemalloc.get_traced_memory()[1] < 6 * MAX_ANSWER_BYTES
    finally:
        tracemalloc.stop()


WATCHES: dict[str, bytes] = {
    "it ends before it has begun": b"", "only an empty line": b"\n", "garbage": b"garbage\n", "brackets without end": b'{"result":' + b"[" * 100_000 + b"\n",
    "text that is no text": b'{"result":{"created":true,"cancel_reason":"\xff"}}\n', "nothing in it": b"{}\n", "null": b"null\n",
    "confirmed, then garbage": CREATED + b"garbage\n", "confirmed, then half a line": CREATED + dumped(EVENT)[:40],
    "confirmed, then brackets": CREATED + b'{"x":' + b"[" * 100_000 + b"\n", "confirmed twice": CREATED + CREATED, "empty answers": CREATED + b'{"result":{}}\n' * 5000,
    "cancelled without a reason": b'{"result":{"canceled":true}}\n', "cancelled with a megabyte": b'{"result":{"canceled":true,"cancel_reason":"' + b"x" * 1_000_000 + b'"}}\n',
    "compacted at a revision without end": b'{"result":{"compact_revision":"' + b"9" * 30 + b'"}}\n', "an error of a megabyte": b'{"error":{"message":"' + b"x" * 1_000_000 + b'"}}\n',
    "an event without a key": CREATED + b'{"result":{"events":[{}]}}\n', "an event of an unknown kind": CREATED + b'{"result":{"events":[{"type":"BLESS","kv":{"key":"YQ=="}}]}}\n',
    "an event with a revision without end": CREATED + b'{"result":{"events":[{"kv":{"key":"YQ==","mod_revision":"' + b"9" * 30 + b'"}}]}}\n',
}


def test_no_line_is_fatal_to_a_watch(times: int) -> None:
    lines = dict(WATCHES)
    lines |= {f"by chance {n}": CREATED + data + b"\n" for n, data in enumerate(inputs("etcd", dumped(EVENT), EVENT, count=30 * times, seed=times))}
    in_parallel({what: partial(suffer, what, _stream(data), WATCH) for what, data in lines.items()})


def _stream(data: bytes) -> Behaviour:
    async def behave(stream: trio.SocketStream) -> None:
        for start in range(0, len(data), 50_000):
            await stream.send_all((CHUNKED if start == 0 else b"") + chunk(data[start:start + 50_000]))
        await stream.send_all(b"" if data else CHUNKED)
        await trio.sleep(0.05)
    return behave


def test_a_flood_of_changes_lets_others_run() -> None:
    """One line with five thousand changes, and lines without end: whoever reads them gives way after each."""
    async def main() -> None:
        event = {"kv": RANGE["kvs"][0]}
        line = dumped({"result": {"header": HEADER, "events": [event | {"kv": {**event["kv"], "mod_revision": str(8 + n)}} for n in range(5_000)]}}) + b"\n"
        etcd = Etcd(without_end(CHUNKED + chunk(CREATED) + chunk(line), chunk(b'{"result":{}}\n' * 4000)))
        seen = turns = 0

        async def beside() -> None:
            nonlocal turns
            while True:
                await trio.lowlevel.checkpoint()
                turns += 1

        async with (
            serving(etcd.answer) as port, aclosing(Etcd3Store([f"http://127.0.0.1:{port}"])) as store,
            store.watch("/service/demo/", after_revision=5) as changes, trio.open_nursery() as nursery,
        ):
            await anext(changes)
            nursery.start_soon(beside)
            with trio.fail_after(60):
                async for _ in changes:
                    seen += 1
                    if seen >= 10_000:
                        break
            nursery.cancel_scope.cancel()
        assert turns >= 9_000

    trio.run(main)


def test_the_store_s_words_do_not_fill_the_log(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        in_parallel({what: partial(suffer, what, BAD[what], QUICK * 2) for what in ("an error of a megabyte", "stays silent", "brackets without end", "a page with status 200")})
    assert sum(len(record.getMessage()) + len(str(getattr(record, "facts", ""))) for record in caplog.records if record.name.startswith("pgha")) < 40_000
