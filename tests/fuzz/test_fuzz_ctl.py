"""Whatever answers to ctl in etcd's place: one of its exit codes, in time; and nothing of the store speaks to a terminal."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import trio
from hostile import SCALARS, dumped
from hostile_server import behaviours, by_chance, serving

from pgha.ctl.ends import FAILED, UNKNOWN, UNREACHABLE, USAGE, End
from pgha.ctl.output import Column, records, table
from pgha.ctl.settings import Etcd
from pgha.ctl.store import ENDPOINT_S, Store

RANGE = {"header": {"cluster_id": "1", "revision": "7"}, "kvs": [{"key": "L3NlcnZpY2UvZGVtby9sZWFkZXI=", "mod_revision": "7", "value": "YQ==", "lease": "5"}]}
TRANSACTION = {"header": {"cluster_id": "1", "revision": "8"}, "succeeded": True}


@pytest.mark.parametrize("write", [False, True], ids=["read", "write"])
def test_no_behaviour_is_more_than_an_exit_code(write: bool, times: int) -> None:
    good = TRANSACTION if write else RANGE
    ends: dict[str, int] = {}

    async def main() -> None:
        limit = trio.CapacityLimiter(100)

        async def one(what: str, behave: Any) -> None:
            async def answer(_path: bytes, _body: bytes, stream: trio.SocketStream) -> None:
                await behave(stream)

            async with serving(answer) as port:
                store = Store(Etcd(endpoints=(f"http://127.0.0.1:{port}",)))
                call = partial(store.write, "/service/demo/config", b"{}", if_revision=7) if write else partial(store.read, "/service/demo/")
                began = trio.current_time()
                try:
                    await trio.to_thread.run_sync(call, limiter=limit)
                except End as end:
                    ends[what] = end.code
                assert trio.current_time() - began < 3 * ENDPOINT_S + 10, what

        async with trio.open_nursery() as nursery:
            for what, behave in (behaviours(dumped(good)) | by_chance(f"ctl {write} {times}", dumped(good), good, 40 * times)).items():
                nursery.start_soon(one, what, behave)

    trio.run(main)
    assert set(ends.values()) <= {UNREACHABLE, UNKNOWN, FAILED, USAGE}
    if write:
        for what in ("stays silent", "hangs up at once", "a page with status 200", "half an answer, then the end", "502 with a page"):
            assert ends[what] == UNKNOWN, (what, "it may have been written")


def test_nothing_of_the_store_speaks_to_a_terminal() -> None:
    rows = [{"name": str(value), "tags": {str(value): value}} for value in SCALARS] + [{"name": "a\x1b[2J\x1b]0;x\x07b", "tags": {"\x9b31m": "\u202e"}}]
    columns = (Column("name"), Column("tags"))
    for text in (table(columns, rows), records(columns, rows, "tsv")):
        assert all(c.isprintable() or c in "\n\t" for c in text)
