"""A real etcd that runs out of space under a leader: unknown, not lost; told where people look; made room in by pgha itself."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import trio
from decide_world import LEADER, NOW
from etcd_server import EtcdCluster
from msgspec.structs import replace

from pgha.act import Actor, Context
from pgha.clock import Instant, SystemClock, remaining_s
from pgha.dcs import ABSENT, Put
from pgha.dcs.etcd3 import Etcd3Store
from pgha.dcs.keys import Keys
from pgha.decide import decide
from pgha.errors import Compacted, DcsRefused
from pgha.lock.renewer import OUT_OF_SPACE, Renewer, Timing
from pgha.model.action import AcquireLock, CompactStore
from pgha.model.decision import Decision, Mandate, Memory
from pgha.model.lock import Identity, LicenceState
from pgha.model.observation import Observation
from pgha.observe.cluster import ClusterObserver
from pgha.rest.metrics import metrics_text
from pgha.rest.published import publish_pass, store_gauges

pytestmark = pytest.mark.etcd

KEYS = Keys("service", "demo")
MiB = 1 << 20
QUOTA_BYTES = 2 * MiB
S = 5.0


class Shifted:
    """The machine's clocks, `ahead_s` later: a day need not be waited for."""

    def __init__(self) -> None:
        self.ahead_s = 0.0

    def now(self) -> Instant:
        return SystemClock().now().plus_s(self.ahead_s)

    def wall_s(self) -> float:
        return SystemClock().wall_s() + self.ahead_s


class Leader:
    """Of an agent: what renews, what watches the store, and what decides on it."""

    def __init__(self, urls: list[str], state_dir: Path) -> None:
        self.clock = Shifted()
        self.store, self.renewers = Etcd3Store(urls), Etcd3Store(urls)
        me = Identity(name="a", node_id="id-a", incarnation="run-a")
        self.renewer = Renewer(store=self.renewers, keys=KEYS, me=me, clock=SystemClock(), timing=lambda: Timing(ttl_s=6.0, loop_wait_s=0.2), changed=self._changed)
        self.observer = ClusterObserver(store=self.store, keys=KEYS, clock=self.clock, state_dir=state_dir, settings=lambda: (6.0, 1.0, 1.0, 60.0), wake=lambda: None, me="a")
        self.memory = Memory()

    def _changed(self) -> None:
        if self.renewer.licence.failing_why.startswith(OUT_OF_SPACE):
            self.observer.out_of_space()

    def observation(self) -> Observation:
        """A healthy leader's, but for what was seen of the store."""
        o, capacity = LEADER.seen, self.observer.facts.capacity
        shift_s = remaining_s(self.clock.now(), NOW)

        def at(moment: Instant | None) -> Instant | None:
            return None if moment is None else moment.plus_s(-shift_s)

        if capacity is not None:
            capacity = replace(capacity, asked_at=at(capacity.asked_at), watched_since=at(capacity.watched_since), compacted_at=at(capacity.compacted_at))
        return replace(o, dcs=replace(o.dcs, capacity=capacity))

    def decide(self) -> Decision:
        decision = decide(self.observation(), self.memory)
        self.memory = decision.memory
        return decision

    async def carry_out(self, action: CompactStore) -> None:
        await Actor(cast(Context, SimpleNamespace(store=self.store))).quick(action, S)

    async def later(self, seconds: float) -> None:
        """So much later, and asked again."""
        before, self.clock.ahead_s = self.observer.facts.capacity, self.clock.ahead_s + seconds
        self.observer.out_of_space()
        with trio.fail_after(20):
            while self.observer.facts.capacity is before:
                await trio.sleep(0.05)


def because(decision: Decision, rule: str) -> Any:
    return next(r for r in decision.reasons if r.rule == f"capacity.{rule}")


def with_leader(tmp_path: Path, main: Callable[[Leader, EtcdCluster], Awaitable[None]]) -> None:
    async def body() -> None:
        # Each write is committed at once: by default etcd's file grows up to 100 ms later, on a busy machine more, and
        # whoever fills it by its size fills too much.
        with EtcdCluster(1, "--quota-backend-bytes", str(QUOTA_BYTES), "--backend-batch-limit", "1") as cluster:
            leader = Leader(cluster.urls, tmp_path)
            async with aclosing(leader.store), aclosing(leader.renewers), trio.open_nursery() as nursery:
                await nursery.start(leader.renewer.run)
                await nursery.start(leader.observer.run)
                await leader.renewer.acquire(AcquireLock(lock_revision=ABSENT, lock_value=b"", epoch_revision=ABSENT, epoch_number=0), deadline_s=S)
                leader.renewer.give_mandate(Mandate(kind="running", until=SystemClock().now().plus_s(1000)), number=1)
                nursery.start_soon(leader.observer.keep_capacity, lambda: leader.renewer.licence.state is LicenceState.HELD, lambda: QUOTA_BYTES)
                with trio.fail_after(90):
                    await eventually(lambda: leader.observer.facts.capacity is not None)
                    await main(leader, cluster)
                nursery.cancel_scope.cancel()

    trio.run(body)


async def eventually(holds: Callable[[], Any], within_s: float = 20) -> None:
    with trio.fail_after(within_s):
        while not holds():
            await trio.sleep(0.02)


async def fill(leader: Leader, key: str, *, up_to: float) -> None:
    """History of one key, until etcd's file has this share of the quota."""
    while (await leader.store.capacity(deadline_s=S)).used_bytes < up_to * QUOTA_BYTES:
        for _ in range(4):
            await leader.store.transact(compares=[], puts=[Put(key=f"/other/{key}", value=bytes(40_000))], deadline_s=S)


def ask(cluster: EtcdCluster, path: str, body: dict[str, Any]) -> Any:
    return cluster.post(cluster.members[0], path, body)


def test_a_day_old_history_is_compacted_by_the_leader_itself(tmp_path: Path):
    async def main(leader: Leader, cluster: EtcdCluster) -> None:
        await fill(leader, "x", up_to=0.3)
        old = leader.observer.facts.view.revision
        await leader.later(3700)
        assert because(leader.decide(), "store_has_room").holds
        assert not [a for a in leader.decide().actions if isinstance(a, CompactStore)], "nothing is a day old yet"
        await fill(leader, "x", up_to=0.55)
        await leader.later(86400)
        decision = leader.decide()
        assert not because(decision, "store_has_room").holds, "half of it is used"
        assert "not compacted in the 25." in because(decision, "history_is_compacted").because
        (compact,) = [a for a in decision.actions if isinstance(a, CompactStore)]
        assert compact.revision >= old
        forbidden = replace(leader.observation(), settings=replace(LEADER.seen.settings, may_compact_store=False))
        assert not [a for a in decide(forbidden, Memory()).actions if isinstance(a, CompactStore)]
        in_use = int(ask(cluster, "/v3/maintenance/status", {})["dbSizeInUse"])
        await leader.carry_out(compact)
        assert not [a for a in leader.decide().actions if isinstance(a, CompactStore)], "once, not in every pass until it is asked again"
        with pytest.raises(Compacted):
            async with leader.store.watch("/other/", after_revision=2) as changes:
                await anext(aiter(changes))
        await eventually(lambda: int(ask(cluster, "/v3/maintenance/status", {})["dbSizeInUse"]) < in_use - 100_000)
        await leader.later(60)
        assert leader.observer.facts.capacity.compact_revision == compact.revision
        assert "last compacted 0.0 h ago" in because(leader.decide(), "history_is_compacted").because
        assert leader.renewer.licence.state is LicenceState.HELD, "nothing of the lock is history"

    with_leader(tmp_path, main)


def test_a_store_out_of_space_is_unknown_not_lost_and_told(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    async def main(leader: Leader, cluster: EtcdCluster) -> None:
        with pytest.raises(DcsRefused):
            await fill(leader, "x", up_to=9)
        await eventually(lambda: leader.renewer.licence.failing_why.startswith(OUT_OF_SPACE), 5)
        licence = leader.renewer.licence
        assert (licence.state, licence.lost_to) == (LicenceState.HELD, ""), "unknown, not lost: it goes on until its deadline"
        await eventually(lambda: leader.observer.facts.capacity.alarms == ("NOSPACE",), 8)
        decision = leader.decide()
        room = because(decision, "store_has_room")
        assert not room.holds
        assert "alarms: NOSPACE (it refuses every write; needed on each member: etcdctl defrag, then once: etcdctl alarm disarm)" in room.because
        page = publish_pass(leader.observation(), decision, scope="demo", gauges=store_gauges(leader.observation()))
        metrics = metrics_text(page, page.health, NOW)
        assert 'pgha_store_alarms{scope="demo",name="a"} 1' in metrics
        assert f'pgha_store_quota_bytes{{scope="demo",name="a"}} {QUOTA_BYTES}' in metrics
        assert [r for r in page.decision["reasons"] if r["rule"] == "capacity.store_has_room" and not r["holds"]], "explain says so"
        # Compaction frees history, but etcd takes neither the alarm back nor gives the file's room back by that.
        await leader.carry_out(CompactStore(revision=(await leader.store.read(KEYS.root, deadline_s=S)).revision))
        with pytest.raises(DcsRefused):
            await leader.store.transact(compares=[], puts=[Put(key="/other/y", value=b"small")], deadline_s=S)
        ask(cluster, "/v3/maintenance/defragment", {})
        alarm = ask(cluster, "/v3/maintenance/alarm", {"action": "GET"})["alarms"][0]
        ask(cluster, "/v3/maintenance/alarm", {"action": "DEACTIVATE", "memberID": alarm["memberID"], "alarm": "NOSPACE"})
        await leader.store.transact(compares=[], puts=[Put(key="/other/y", value=b"small")], deadline_s=S)
        await eventually(lambda: not leader.observer.facts.capacity.alarms, 30)

    caplog.set_level(logging.INFO)
    with_leader(tmp_path, main)
    assert "the store has raised an alarm" in caplog.messages
    assert "the store's alarm is over" in caplog.messages
