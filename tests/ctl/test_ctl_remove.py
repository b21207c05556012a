"""`ctl remove`: only what was asked for, only after exactly the right words, and all of it or nothing."""

from __future__ import annotations

import io
import json
import threading

import pytest
from ctl_world import World

from pgha.ctl.settings import Etcd
from pgha.ctl.store import Store

pytestmark = pytest.mark.etcd

NAME, AWARE = "Please confirm the cluster name to remove: ", 'You are about to remove all information in DCS for bench, please type: "Yes I am aware": '
LEADER = "This cluster currently is healthy. Please specify the leader name to continue: "


def remove(world: World, monkeypatch: pytest.MonkeyPatch, answers: str, *arguments: str) -> tuple[int, str, str]:
    monkeypatch.setattr("sys.stdin", io.StringIO(answers))
    return world.ctl("remove", *arguments)


def keys(world: World) -> set[str]:
    return set(Store(Etcd(tuple(world.etcd.urls))).read(world.root))


def neighbours(world: World) -> set[str]:
    """Clusters whose names begin alike."""
    return {key for key in Store(Etcd(tuple(world.etcd.urls))).read(f"/{world.namespace}/") if not key.startswith("bench/")}


def test_the_right_words_remove_every_key_of_this_cluster_and_no_other(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.load("steady")
    world.put("pgha/lock", {"holder": "n1", "mode": "held"})
    world.root, root = f"/{world.namespace}/bench2/", world.root
    world.put("leader", b"n1")
    world.root = root
    before, count = neighbours(world), len(keys(world))
    code, out, err = remove(world, monkeypatch, "bench\nYes I am aware\nn1\n")
    assert code == 0
    assert out.startswith("+ Cluster: bench (7711161683783831200) ")
    assert out.endswith(f"\nSuccess: {count} keys of cluster bench removed; no data was touched\n")
    assert err == f"pgha: agents run on n1, n2, n3: stop them first, or they write their keys again\n{NAME}{AWARE}{LEADER}"
    assert keys(world) == set()
    assert neighbours(world) == before == {"bench2/leader"}
    assert remove(world, monkeypatch, "bench\nYes I am aware\nn1\n")[::2] == (1, "pgha: there is no cluster 'bench' in the store\n")


@pytest.mark.parametrize(("answers", "code", "err"), [
    ("Bench\n", 3, "Cluster names specified do not match"),
    ("\n", 3, "Cluster names specified do not match"),
    ("bench\nyes i am aware\n", 3, 'You did not exactly type "Yes I am aware"'),
    ("bench\nYes I am aware \n", 3, 'You did not exactly type "Yes I am aware"'),
    ("bench\nYes I am aware\nn2\n", 3, "You did not specify the current leader of the cluster"),
    ("bench\nYes I am aware\n", 2, "aborted: nothing was changed"),
    ("", 2, "aborted: nothing was changed"),
])
def test_any_other_word_removes_nothing(world: World, monkeypatch: pytest.MonkeyPatch, answers: str, code: int, err: str) -> None:
    world.load("steady")
    before = keys(world)
    got = remove(world, monkeypatch, answers)
    assert (got[0], got[2].rpartition("pgha: ")[2]) == (code, f"{err}\n")
    assert keys(world) == before


def test_without_a_leader_two_questions_are_asked(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.load("steady")
    world.delete("leader")
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    code, out, err = world.ctl("remove", "--dry-run", "-f", "json")
    assert (code, [row["Member"] for row in json.loads(out)]) == (0, ["n1", "n2", "n3"])
    assert "pgha: remove of cluster bench: would be done, once three questions are answered" in err
    code, out, err = remove(world, monkeypatch, "bench\nYes I am aware\n", "-f", "json")
    assert (code, [row["Member"] for row in json.loads(out)]) == (0, ["n1", "n2", "n3"])      # nothing but JSON
    assert "keys of cluster bench removed; no data was touched\n" in err
    assert keys(world) == set()


def test_what_is_left_of_a_cluster_can_be_removed_too(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.put("pgha/epoch", {"number": 3})
    assert remove(world, monkeypatch, "bench\nYes I am aware\n")[0] == 0
    assert keys(world) == set()


class Slowly(io.StringIO):
    """Somebody else becomes leader while the last answer is typed."""

    def __init__(self, world: World, text: str) -> None:
        super().__init__(text)
        self.world = world

    def readline(self, size: int | None = -1, /) -> str:
        line = super().readline(-1 if size is None else size)
        if line == "n1\n":
            writer = threading.Thread(target=self.world.put, args=("leader", b"n2"))
            writer.start()
            writer.join()
        return line


def test_a_new_leader_meanwhile_and_nothing_is_removed(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.load("steady")
    before = keys(world)
    monkeypatch.setattr("sys.stdin", Slowly(world, "bench\nYes I am aware\nn1\n"))
    code, out, err = world.ctl("remove")
    assert (code, "Success" in out) == (1, False)
    assert "another leader was elected meanwhile: nothing was removed" in err
    assert keys(world) == before


def test_never_the_keys_of_all_clusters(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.load("steady")
    before = keys(world)
    assert remove(world, monkeypatch, "/\nYes I am aware\nn1\n", "/")[::2] == (2, "pgha: '/' is no cluster's name: its keys would be those of all clusters\n")
    with pytest.raises(AssertionError):
        Store(Etcd(tuple(world.etcd.urls))).remove("/", unchanged="leader", value=None)
    assert keys(world) == before
