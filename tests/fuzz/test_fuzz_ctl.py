"""Whatever answers to ctl in etcd's place: one of its exit codes, in time; and nothing of the store speaks to a terminal."""

from __future__ import annotations

from argparse import Namespace
from functools import partial
from typing import Any

import pytest
import trio
from hostile import SCALARS, dumped
from hostile_server import behaviours, by_chance, serving

from pgha.ctl.cluster import Cluster, understood
from pgha.ctl.ends import FAILED, UNKNOWN, UNREACHABLE, USAGE, End
from pgha.ctl.listing import shown
from pgha.ctl.member import meant
from pgha.ctl.output import Column, records, table
from pgha.ctl.settings import Etcd
from pgha.ctl.store import ENDPOINT_S, Key, Store
from pgha.ctl.topology import tree

RANGE = {"header": {"cluster_id": "1", "revision": "7"}, "kvs": [{"key": "L3NlcnZpY2UvZGVtby9sZWFkZXI=", "mod_revision": "7", "value": "YQ==", "lease": "5"}]}
TRANSACTION = {"header": {"cluster_id": "1", "revision": "8"}, "succeeded": True}
REMOVAL = {**TRANSACTION, "responses": [{"response_delete_range": {"header": {"revision": "8"}, "deleted": "3"}}]}


@pytest.mark.parametrize(("what_is_asked", "good"), [("read", RANGE), ("write", TRANSACTION), ("remove", REMOVAL)])
def test_no_behaviour_is_more_than_an_exit_code(what_is_asked: str, good: dict[str, Any], times: int) -> None:
    ends: dict[str, int] = {}

    async def main() -> None:
        limit, turn = trio.CapacityLimiter(100), trio.CapacityLimiter(100)

        async def one(what: str, behave: Any) -> None:
            async def answer(_path: bytes, _body: bytes, stream: trio.SocketStream) -> None:
                await behave(stream)

            async with serving(answer) as port:
                store = Store(Etcd(endpoints=(f"http://127.0.0.1:{port}",)))
                call: Any = {"read": partial(store.read, "/service/demo/"), "write": partial(store.write, "/service/demo/config", b"{}", if_revision=7),
                             "remove": partial(store.remove, "/service/demo/", unchanged="leader", value=b"a")}[what_is_asked]
                async with turn:        # the time until there is a thread is not the program's
                    began = trio.current_time()
                    try:
                        await trio.to_thread.run_sync(call, limiter=limit)
                    except End as end:
                        ends[what] = end.code
                    assert trio.current_time() - began < 3 * ENDPOINT_S + 10, what

        async with trio.open_nursery() as nursery:
            for what, behave in (behaviours(dumped(good)) | by_chance(f"ctl {what_is_asked} {times}", dumped(good), good, 40 * times)).items():
                nursery.start_soon(one, what, behave)

    trio.run(main)
    assert set(ends.values()) <= {UNREACHABLE, UNKNOWN, FAILED, USAGE}
    if what_is_asked != "read":
        for what in ("stays silent", "hangs up at once", "a page with status 200", "half an answer, then the end", "502 with a page"):
            assert ends[what] == UNKNOWN, (what, "it may have been written")


def test_nothing_of_the_store_speaks_to_a_terminal() -> None:
    rows = [{"name": str(value), "tags": {str(value): value}} for value in SCALARS] + [{"name": "a\x1b[2J\x1b]0;x\x07b", "tags": {"\x9b31m": "\u202e"}}]
    columns = (Column("name"), Column("tags"))
    for text in (table(columns, rows), records(columns, rows, "tsv")):
        assert all(c.isprintable() or c in "\n\t" for c in text)


ANYTHING = (*SCALARS, [], {}, [[]], {"at": "\x1b[2J\n", "from": [], "schedule": {}}, ["x", 1], {"a": {"b": None}})
ARGUMENTS = ({"role": "any"}, {"role": "replica"}, {"role": "primary"}, {"role": "standby-leader"}, {"member": "n2"}, {})


def looked_at(cluster: Cluster) -> None:
    """By the commands that show members or choose one: each prints something or says why not."""
    for text in (shown(cluster), tree(cluster)):
        assert all(c.isprintable() or c in "\n\t" for c in text)
    for given in ARGUMENTS:
        try:
            for member in meant(cluster, Namespace(**{"role": None, "member": None, "any": False, **given})):
                assert f"{member['host']} {member['port']}".isprintable()
        except End as end:
            assert end.code == FAILED


@pytest.mark.parametrize("field", ["conn_url", "tags", "role", "state", "replication_state", "timeline", "receive_lsn", "replay_lsn", "xlog_location",
                                   "pending_restart", "pending_restart_reason", "scheduled_restart", "replicatefrom"])
def test_members_may_say_anything_in_the_store(field: str) -> None:
    for value in ANYTHING:
        changed = {"tags": {"replicatefrom": value}} if field == "replicatefrom" else {field: value}
        raw = {"conn_url": "postgres://10.0.0.2:5432/postgres", "state": "running", "role": "replica", **changed}
        keys = {f"members/{name}": Key(dumped(raw), 7, 5) for name in ("n1", "n2", "n3")} | {"leader": Key(b"n1", 7, 5)}
        looked_at(understood("demo", keys, quiet=True))


@pytest.mark.parametrize("field", ["host", "port", "role", "state", "tags", "timeline", "receive_lsn", "replay_lag", "pending_restart_reason", "scheduled_restart"])
def test_an_agent_may_say_anything_of_members(field: str) -> None:
    """GET /cluster, which is shown while the store is down."""
    for value in ANYTHING:
        members = [{"name": name, "host": "10.0.0.2", "port": 5432, "role": "replica", "state": "running", field: value} for name in ("n1", "n2")]
        looked_at(Cluster("demo", "n1", {m["name"]: m for m in members}, {"members": members, "scheduled_switchover": value}, None, [], str(value), {}))
