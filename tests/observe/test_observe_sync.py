"""What /sync said is remembered, and counts again beside what a store that went back shows, until somebody writes the key."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio
from observe_world import KEYS, Scene, until
from test_observe_cluster import observed

from pgha.config.state import load_remembered
from pgha.dcs import Delete, Put
from pgha.model.cluster import Sync

OLD, NEW = {"leader": "a", "quorum": 0, "sync_standby": "c"}, {"leader": "b", "quorum": 0, "sync_standby": "A,d"}
FORMER = Sync(leader="b", members=("A", "d"))


async def saved_between(scene: Scene) -> object:
    """/sync is written, the store is saved, /sync is written anew; all of it was seen."""
    scene.put("sync", OLD)
    await scene.seen()
    saved = scene.world.save()
    scene.put("sync", NEW)
    await scene.seen()
    return saved


async def went_back(scene: Scene, saved: object) -> None:
    """The observer has noticed it."""
    await scene.observer.read()
    scene.world.restore(saved)
    await until(lambda: scene.facts.trusted_from is not None, 5)
    await scene.observer.read()


def test_what_it_said_before_the_store_went_back_counts_until_it_is_written_again(tmp_path: Path):
    async def main(scene: Scene) -> None:
        scene.renew(1)
        saved = await saved_between(scene)
        assert scene.facts.remembered_sync is None
        await went_back(scene, saved)
        assert (scene.facts.view.sync.leader, scene.facts.remembered_sync) == ("a", FORMER)
        await until(lambda: load_remembered(tmp_path)[0].sync_restored is not None, 25, every_s=1)
        await trio.sleep(60)
        await scene.observer.read()
        scene.put("status", {"optime": 1})
        await scene.seen()
        assert (scene.facts.trusted_from, scene.facts.remembered_sync) == (None, FORMER), "trusted, and still nobody has written it"
        await until(lambda: load_remembered(tmp_path)[0].generation.revision, 25, every_s=1)
        again = Scene(tmp_path, world=scene.world)
        await again.observer.read()
        assert again.facts.remembered_sync == FORMER, "a restarted agent knows it"
        scene.put("sync", {"leader": "c", "quorum": 0, "sync_standby": "a"})
        await scene.seen()
        assert scene.facts.remembered_sync is None
        await again.observer.read()
        assert again.facts.remembered_sync is None

    observed(tmp_path, main, threads=True)


def test_a_write_during_the_distrust_is_a_living_leaders(tmp_path: Path):
    async def main(scene: Scene) -> None:
        saved = await saved_between(scene)
        await went_back(scene, saved)
        scene.put("sync", OLD)
        await scene.seen()
        assert scene.facts.trusted_from is not None
        assert scene.facts.remembered_sync is None, "the same words, but written since"

    observed(tmp_path, main)


def test_an_empty_store_and_a_second_restore_forget_nothing(tmp_path: Path):
    async def main(scene: Scene) -> None:
        saved = await saved_between(scene)
        await went_back(scene, None)
        assert (scene.facts.view.sync.leader, scene.facts.remembered_sync) == ("", FORMER)
        scene.put("status", {"optime": 1})
        await scene.seen()
        scene.world.restore(saved, cluster_id="third")
        await until(lambda: scene.facts.view.sync.leader == "a", 10)
        assert scene.facts.remembered_sync == FORMER

    observed(tmp_path, main)


def test_a_store_that_shows_the_same_is_not_doubted(tmp_path: Path):
    async def main(scene: Scene) -> None:
        scene.put("sync", NEW)
        await scene.seen()
        saved = scene.world.save()
        scene.put("status", {"optime": 1})
        await scene.seen()
        await went_back(scene, saved)
        assert scene.facts.remembered_sync is None

    observed(tmp_path, main)


@pytest.mark.parametrize("damage", [b"garbage", b"[]", b'{"leader": 1}', b'{"leader": "b", "sync_standby": "d,x\\u0000y"}', None])
def test_a_key_that_cannot_be_read_or_was_deleted_under_the_mode_does_not_let_anybody_lead(tmp_path: Path, damage: bytes | None):
    async def main(scene: Scene) -> None:
        scene.put("config", {"synchronous_mode": "ON"})
        scene.put("sync", NEW)
        await scene.seen()
        if damage is None:
            scene.world.transact([], [Delete(key=KEYS.path("sync"))])
        else:
            scene.world.transact([], [Put(key=KEYS.path("sync"), value=damage)])
        await until(lambda: scene.facts.view.sync.leader == "", 5)
        assert scene.facts.remembered_sync == FORMER
        scene.put("sync", OLD)
        await scene.seen()
        assert scene.facts.remembered_sync is None, "a leader has written it again"

    observed(tmp_path, main)


def test_a_leader_that_deletes_the_key_when_the_mode_is_off_is_believed(tmp_path: Path):
    async def main(scene: Scene) -> None:
        scene.put("config", {"synchronous_mode": "on"})
        scene.put("sync", NEW)
        await scene.seen()
        scene.put("config", {"synchronous_mode": "off"})
        scene.world.transact([], [Delete(key=KEYS.path("sync"))])
        await until(lambda: scene.facts.view.sync.leader == "", 5)
        assert scene.facts.remembered_sync is None
        scene.put("config", {"synchronous_mode": "on"})
        await scene.seen()
        assert scene.facts.remembered_sync is None, "nothing was promised since"

    observed(tmp_path, main)
