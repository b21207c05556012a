"""Somebody outside who reads WAL by a permanent slot, at the primary, wherever that is, and not always when it could.

It is what `ReaderGoesOn` judges by: what the reader has not got, no server may have let go of that may become primary.
"""

from __future__ import annotations

from tests.simulation.postgres import Branch, Instance, common
from tests.simulation.world import World

SLOT = "keep"
#: Between two visits; the longer ones are backups that failed in the night.
SOON_S, LATE_S = 1.0, 60.0


class Reader:
    """`branch`, `lsn`: how far it has read."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._chance = world.scheduler.stream("reader")
        self.branch: Branch | None = None
        self.lsn = 0
        self.visits = 0
        world.scheduler.after(SOON_S, self._visit)

    def _visit(self) -> None:
        accepting = [i for i in self._world.instances.values() if i.accepting]
        if len(accepting) == 1 and SLOT in accepting[0].slots:
            self._read(accepting[0])
        self._world.scheduler.after(SOON_S + (LATE_S if self._chance.random() < 0.2 else SOON_S) * self._chance.random(), self._visit)

    def _read(self, instance: Instance) -> None:
        data = instance.dir
        assert data.branch is not None
        if self.branch is None or self.branch.root is not data.branch.root:
            self.lsn = data.slots[SLOT]
        else:   # what only a former primary had is on no history any more
            self.lsn = common(data.branch, data.lsn, self.branch, self.lsn)[1]
        self.branch = data.branch
        self.visits += 1
        self._world.truth.reads(instance, self.lsn)
        self.lsn += round((data.lsn - self.lsn) * self._chance.choice((0.5, 1.0, 1.0)))
        data.slots[SLOT] = max(data.slots[SLOT], self.lsn)
