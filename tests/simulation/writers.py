"""Clients that commit, and what they were told. One on every node, and one that roams.

Where a commit was acknowledged, and when, is what promises are judged by: only an answer that reached its client counts.
They write often for a while after every fault, and seldom in calm times.
"""

from __future__ import annotations

from tests.simulation.postgres import Branch, Instance
from tests.simulation.world import World

OFTEN_S = 0.1
SELDOM_S = 5.0
BUSY_S = 20.0
CLIENT = "client"


class Writers:
    def __init__(self, world: World) -> None:
        self._world = world
        self._chance = world.scheduler.stream("writers")
        self._busy_until_ns = 0
        self.tried = self.acknowledged = 0
        self._next = world.scheduler.after(1.0, self._round)

    def hurry(self) -> None:
        """Something happens: write often."""
        self._busy_until_ns = self._world.scheduler.now_ns + round(BUSY_S * 1e9)
        self._next.cancel()
        self._next = self._world.scheduler.after(OFTEN_S, self._round)

    def _round(self) -> None:
        world = self._world
        for name in world.names:
            instance = world.instances[name]
            if instance.accepting:
                self._write(instance, name)
                if world.network.both_ways(CLIENT, name):
                    self._write(instance, CLIENT)
        busy = world.scheduler.now_ns < self._busy_until_ns
        self._next = world.scheduler.after((OFTEN_S if busy else SELDOM_S) * (0.8 + 0.4 * self._chance.random()), self._round)

    def _write(self, instance: Instance, client: str) -> None:
        self.tried += 1
        big = self._chance.random() < 0.02
        size = 200_000 if big else 100 + int(self._chance.random() * 400)
        instance.commit(size, _Answer(self, instance, client))

    def told(self, instance: Instance, branch: Branch, lsn: int) -> None:
        self.acknowledged += 1
        branch.acknowledged.append((lsn, self._world.scheduler.now_ns))
        self._world.truth.acknowledged(instance, branch, lsn)


class _Answer:
    """One commit on its way."""

    def __init__(self, writers: Writers, instance: Instance, client: str) -> None:
        self._writers, self._instance, self._client = writers, instance, client
        self.lsn = 0            # the commit's, once it is written

    def __call__(self, outcome: str) -> None:
        if outcome != "acked":
            return              # an error, or a WARNING that the wait was cancelled
        data = self._instance.dir
        assert data.branch is not None
        network = self._writers._world.network
        if self._client == self._instance.name or network.both_ways(self._instance.name, self._client):
            self._writers.told(self._instance, data.branch, self.lsn)
