"""A pause that was seen outlives the record that said so: only a record written since ends it (safety model 4 and 11)."""

from __future__ import annotations

from pathlib import Path

import trio
from observe_world import Scene, record, until
from test_observe_cluster import observed

from pgha.config.state import load_remembered
from pgha.dcs.keys import LOCK
from pgha.model.cluster import PausedHolder

B = PausedHolder(name="b", node_id="id-b", incarnation="run-b")


def test_absence_does_not_end_a_pause_and_a_newer_record_does(tmp_path: Path):
    async def main(scene: Scene) -> None:
        scene.renew(1)
        await scene.seen()
        assert scene.facts.remembered_pause is None
        scene.renew(2, mode="paused")
        await scene.seen()
        assert scene.facts.remembered_pause == B
        scene.delete(LOCK)
        await scene.seen()
        assert scene.facts.remembered_pause == B
        await until(lambda: load_remembered(tmp_path)[0].paused == B, 25, every_s=1)
        scene.put(LOCK, b"nonsense")
        await scene.seen()
        assert scene.facts.remembered_pause == B, "what cannot be read ends nothing"
        assert Scene(tmp_path).facts.remembered_pause == B, "a restarted agent knows it"
        scene.renew(3)
        await scene.seen()
        assert scene.facts.remembered_pause is None

    observed(tmp_path, main, threads=True)


def test_a_restored_record_does_not_end_a_pause(tmp_path: Path):
    async def main(scene: Scene) -> None:
        scene.renew(1)
        await scene.seen()
        backup = scene.world.save()
        scene.renew(2, mode="paused")
        await scene.seen()
        await scene.observer.read()
        scene.world.restore(backup)
        await until(lambda: scene.facts.trusted_from is not None, 5)
        assert (scene.facts.view.lock.mode, scene.facts.remembered_pause) == ("held", B)
        await trio.sleep(60)
        await scene.observer.read()
        assert scene.facts.trusted_from is None
        scene.put("status", {"optime": 1})
        await scene.seen()
        assert scene.facts.remembered_pause == B, "nobody has written it since"
        scene.put(LOCK, record(7, holder="c"))
        await scene.seen()
        assert scene.facts.remembered_pause is None

    observed(tmp_path, main)


def test_distrust_of_a_restored_store_ends_also_while_only_the_watch_speaks(tmp_path: Path):
    """Simulation, seed 90004: with renewals coming by the watch nobody reads, so every record counted as restored for ever,
    and the one that ended a pause did not end it: after its holder's death nobody took over."""
    async def main(scene: Scene) -> None:
        scene.renew(1)
        await scene.seen()
        await scene.observer.read()
        scene.world.restore(scene.world.save(), cluster_id="another")
        await until(lambda: scene.facts.trusted_from is not None, 5)
        for sequence in range(2, 42):       # renewals are the stream's heartbeat: no read is needed
            scene.renew(sequence, mode="paused" if sequence < 40 else "held")
            await scene.seen()
            await trio.sleep(1)
        assert scene.facts.trusted_from is None
        assert scene.facts.remembered_pause is None

    observed(tmp_path, main)
