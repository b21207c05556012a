from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable, Iterator

import pytest
from etcd_server import EtcdCluster

from pgha.dcs import Store
from pgha.dcs.etcd3 import Etcd3Store
from pgha.dcs.memory import MemoryStore, MemoryWorld

_numbers = itertools.count(1)


class Lab:
    """Where a contract test works: handles to one store, and a prefix that is its own."""

    def __init__(self, kind: str, new_store: Callable[[], Store]) -> None:
        self.kind = kind
        self.store = new_store
        self.prefix = f"/contract/{next(_numbers)}/"


@pytest.fixture(scope="session")
def etcd() -> Iterator[EtcdCluster]:
    """One etcd for the whole session."""
    if shutil.which("etcd") is None:
        pytest.fail("these tests need the etcd server (apt install etcd-server; build/setup does it)")
    with EtcdCluster() as cluster:
        yield cluster


@pytest.fixture(params=["memory", pytest.param("etcd3", marks=pytest.mark.etcd)])
def lab(request: pytest.FixtureRequest) -> Lab:
    if request.param == "memory":
        world = MemoryWorld()
        return Lab("memory", lambda: MemoryStore(world))
    urls = request.getfixturevalue("etcd").urls
    return Lab("etcd3", lambda: Etcd3Store(urls))
