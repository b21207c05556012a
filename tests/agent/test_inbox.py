"""Requests of operators on their way to the store or to the loop, and the truth of what they are told."""

from __future__ import annotations

import json
from typing import Any

import pytest
import trio
from agent_world import KEYS, CountingStore, TrioClock, run, until

from pgha.config.judgement import Judgement
from pgha.dcs import Put
from pgha.dcs.keys import encode, parse
from pgha.dcs.memory import MemoryWorld
from pgha.errors import DcsRefused
from pgha.inbox import WAITING_AT_MOST, Inbox
from pgha.model.cluster import ClusterView
from pgha.rest.requests import Answer

CONFIG = {"ttl": 30, "loop_wait": 10, "retry_timeout": 10, "postgresql": {"parameters": {"work_mem": "4MB"}}}


class Scene:
    """`view`: as last seen; None: never read."""

    def __init__(self) -> None:
        self.world = MemoryWorld(TrioClock())
        self.store = CountingStore(self.world)
        self.wakes = self.looks = 0
        self.view: ClusterView | None = None
        self.inbox = Inbox(store=self.store, keys=KEYS, clock=TrioClock(), view=lambda: self.view, wake=self._wake, look=self._look)

    def _look(self) -> None:
        self.looks += 1

    def _wake(self) -> None:
        self.wakes += 1

    def put(self, key: str, value: Any) -> None:
        self.world.transact([], [Put(key=KEYS.path(key), value=value if isinstance(value, bytes) else encode(value))])

    def look(self) -> None:
        self.view = parse(self.world.read(KEYS.root), KEYS)

    def stored(self, key: str) -> Any:
        entry = self.world.read(KEYS.path(key)).entries.get(KEYS.path(key))
        return None if entry is None else entry.value

    def revision(self, key: str) -> int:
        return self.world.read(KEYS.path(key)).entries[KEYS.path(key)].revision

    async def ask(self, kind: str, payload: dict[str, Any] | None = None, *, deadline_s: float = 5.0) -> Answer:
        return await self.inbox.submit(kind, payload or {}, deadline_s=deadline_s)


# --- the failover key ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("before", [None, b"{}", b"", encode({"leader": "old"})])
@pytest.mark.parametrize(("kind", "payload", "written"), [
    ("switchover", {"leader": "a", "member": "b"}, {"leader": "a", "member": "b"}), ("switchover", {"leader": "a", "member": None}, {"leader": "a"}),
    ("failover", {"leader": "", "member": "b"}, {"member": "b"}),
])
def test_a_switchover_is_one_compare_and_set(before: bytes | None, kind: str, payload: dict[str, Any], written: dict[str, Any]):
    async def main() -> None:
        scene = Scene()
        if before is not None:
            scene.put("failover", before)
        scene.look()
        answer = await scene.ask(kind, payload)
        assert (answer.status, json.loads(scene.stored("failover"))) == (200, written)
        assert answer.revision == scene.revision("failover")

    run(main)


@pytest.mark.parametrize("kind", ["switchover", "failover"])
def test_a_switchover_that_somebody_else_overtook_changes_nothing(kind: str):
    async def main() -> None:
        scene = Scene()
        scene.put("failover", b"{}")
        scene.look()
        scene.put("failover", {"leader": "a", "member": "c"})
        answer = await scene.ask(kind, {"leader": "a", "member": "b"})
        assert (answer.status, answer.text) == (503, "failed to write failover key into DCS (it was changed meanwhile)")
        assert json.loads(scene.stored("failover"))["member"] == "c"

    run(main)


@pytest.mark.parametrize(("kind", "payload"), [("switchover", {"leader": "a", "member": "b"}), ("cancel_switchover", {})])
def test_an_own_write_whose_answer_was_lost_is_recognised(kind: str, payload: dict[str, Any]):
    async def main() -> None:
        scene = Scene()
        scene.put("failover", {"leader": "a", "scheduled_at": "2030-01-01T00:00:00+00:00"})
        scene.look()
        scene.store.lose_answers = 1
        answer = await scene.ask(kind, payload)
        assert (answer.status, answer.revision) == (200, scene.revision("failover"))

    run(main)


def test_the_same_content_of_before_is_not_an_own_write():
    """Nobody has asked for it but a former operator: its revision is the one that was compared, or older."""
    async def main() -> None:
        scene = Scene()
        scene.put("failover", b"{}")
        scene.put("failover", {"member": "b"})
        scene.look()
        scene.view = parse(scene.world.read(KEYS.root), KEYS)
        revision = scene.revision("failover")
        answer = await scene.ask("failover", {"member": "b"})
        assert (answer.status, answer.revision) == (200, revision + 1)

    run(main)


def test_cancelling():
    async def main() -> None:
        scene = Scene()
        assert (await scene.ask("cancel_switchover")).status == 404
        scene.put("failover", b"{}")
        scene.look()
        assert (await scene.ask("cancel_switchover")).status == 404
        scene.put("failover", {"leader": "a", "scheduled_at": "2030-01-01T00:00:00+00:00"})
        scene.look()
        answer = await scene.ask("cancel_switchover")
        assert (answer.status, answer.text, scene.stored("failover")) == (200, "scheduled switchover deleted", b"{}")
        scene.put("failover", {"leader": "a", "member": "b"})
        scene.look()
        scene.put("failover", {"leader": "a", "member": "c"})
        assert (await scene.ask("cancel_switchover")).status == 409
        assert json.loads(scene.stored("failover"))["member"] == "c"

    run(main)


def test_without_a_view_nothing_is_written():
    async def main() -> None:
        scene = Scene()
        for kind, status in (("switchover", 503), ("failover", 503), ("cancel_switchover", 404)):
            assert (await scene.ask(kind, {"leader": "a"})).status == status
        assert scene.store.calls == []

    run(main)


@pytest.mark.parametrize("kind", ["switchover", "failover", "cancel_switchover", "patch_config", "put_config"])
def test_a_store_that_does_not_answer_is_said_in_time(kind: str):
    async def main() -> None:
        scene = Scene()
        scene.put("failover", {"leader": "a"})
        scene.put("config", CONFIG)
        scene.look()
        scene.store.link(requests_pass=False)
        begun = trio.current_time()
        answer = await scene.ask(kind, {"leader": "a", "ttl": 20}, deadline_s=2.0)
        assert answer.status == 503
        if kind in ("patch_config", "put_config"):
            assert answer.text == "the configuration could not be written", "it was not even read"
        else:
            assert answer.text.removesuffix("; it may still happen") in ("failed to write failover key into DCS", "the store does not answer", "the store does not answer in time")
            assert answer.text.endswith("; it may still happen")
        assert trio.current_time() - begun <= 2.001

    run(main)


@pytest.mark.parametrize("kind", ["patch_config", "put_config"])
def test_a_write_without_an_answer_is_not_called_failed(kind: str):
    async def main() -> None:
        scene = Scene()
        scene.put("config", CONFIG)
        scene.store.before_write = lambda: scene.store.link(requests_pass=False)
        answer = await scene.ask(kind, CONFIG | {"ttl": 60}, deadline_s=2.0)
        assert (answer.status, answer.text) == (503, "the configuration could not be written; it may still happen")

    run(main)


def test_a_write_that_the_store_refuses_does_not_happen():
    async def main() -> None:
        scene = Scene()
        scene.put("failover", b"{}")
        scene.look()

        def full() -> None:
            raise DcsRefused("etcd: database space exceeded", no_space=True)

        scene.store.before_write = full
        answer = await scene.ask("failover", {"member": "b"})
        assert (answer.status, answer.text) == (503, "failed to write failover key into DCS")

    run(main)


def test_what_is_not_known_is_not_supported():
    async def main() -> None:
        assert await Scene().ask("promote") == Answer(status=501, text="promote is not supported")

    run(main)


# --- configuration ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("patch", "changed"), [
    ({"ttl": 60}, {"ttl": 60}),
    ({"postgresql": {"parameters": {"work_mem": None, "wal_keep_size": "1GB"}}}, {"postgresql": {"parameters": {"wal_keep_size": "1GB"}}}),
    ({"unknown": None}, {"unknown": None}),
])
def test_a_patch_is_merged_and_what_is_not_known_kept(patch: dict[str, Any], changed: dict[str, Any]):
    async def main() -> None:
        scene = Scene()
        before = CONFIG | {"unknown": {"kept": 1}}
        scene.put("config", before)
        expected = {k: v for k, v in (before | changed).items() if v is not None}
        answer = await scene.ask("patch_config", patch)
        assert (answer.status, answer.json, json.loads(answer.text)) == (200, True, expected)
        assert json.loads(scene.stored("config")) == expected
        assert answer.revision == scene.revision("config")

    run(main)


@pytest.mark.parametrize("kind", ["patch_config", "put_config"])
@pytest.mark.parametrize("wrong", [{"ttl": "many"}, {"loop_wait": 0}, {"postgresql": {"parameters": [1]}}])
def test_a_wrong_configuration_is_refused_and_nothing_written(kind: str, wrong: dict[str, Any]):
    async def main() -> None:
        scene = Scene()
        scene.put("config", CONFIG)
        answer = await scene.ask(kind, wrong if kind == "patch_config" else CONFIG | wrong)
        assert answer.status == 400
        assert next(iter(wrong)) in answer.text
        assert scene.store.calls == []

    run(main)


@pytest.mark.parametrize(("kind", "status"), [("patch_config", 409), ("put_config", 502)])
def test_a_configuration_that_changes_meanwhile_is_not_overwritten(kind: str, status: int):
    async def main() -> None:
        scene = Scene()
        scene.put("config", CONFIG)
        scene.store.before_write = lambda: scene.put("config", CONFIG | {"ttl": 40})
        answer = await scene.ask(kind, CONFIG | {"ttl": 60})
        assert (answer.status, json.loads(scene.stored("config"))["ttl"]) == (status, 40)

    run(main)


def test_an_own_configuration_whose_answer_was_lost_is_recognised():
    async def main() -> None:
        scene = Scene()
        scene.put("config", CONFIG)
        scene.store.lose_answers = 1
        answer = await scene.ask("patch_config", {"ttl": 60})
        assert (answer.status, answer.revision) == (200, scene.revision("config"))

    run(main)


def test_nothing_new_writes_nothing():
    async def main() -> None:
        scene = Scene()
        scene.put("config", CONFIG)
        assert (await scene.ask("patch_config", {"ttl": 30})).status == 200
        assert scene.store.calls == []

    run(main)


@pytest.mark.parametrize("stored", [None, b"garbage", b"[1]", b"\xff"])
def test_a_missing_or_damaged_configuration_can_be_put(stored: bytes | None):
    async def main() -> None:
        scene = Scene()
        if stored is not None:
            scene.put("config", stored)
        else:
            answer = await scene.ask("patch_config", {"ttl": 20})
            assert (answer.status, answer.text) == (503, "there is no configuration in the store")
        assert (await scene.ask("put_config", CONFIG)).status == 200
        assert json.loads(scene.stored("config")) == CONFIG

    run(main)


# --- what the loop does ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["restart", "reinitialize"])
def test_a_request_waits_for_its_pass(kind: str):
    async def main() -> None:
        scene = Scene()
        answers: list[Answer] = []

        async def ask() -> None:
            answers.append(await scene.ask(kind, {"role": "replica"}, deadline_s=60))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask)
            await until(lambda: scene.inbox.requests, 1)
            (request,) = scene.inbox.requests
            assert (request.kind, request.options, scene.wakes) == (kind, {"role": "replica"}, 1)
            await trio.sleep(5)
            scene.inbox.taken(request.id)
            assert scene.inbox.requests == (), "no fact of the next observation"
            await trio.sleep(5)
            assert answers == []
            scene.inbox.answer(request.id, 200, "restarted successfully")
        assert answers == [Answer(status=200, text="restarted successfully")]

    run(main)


def test_a_reload_reads_the_files_first_and_says_what_is_wrong_with_them():
    async def main() -> None:
        scene = Scene()
        problems: tuple[str, ...] = ("pgha.toml: nonsense: unknown key", "pgha.toml: ttl: not a duration")

        async def reread() -> tuple[str, ...]:
            await trio.sleep(2)
            return problems

        scene.inbox.reread = reread
        wrong = "configuration not reloaded: pgha.toml: nonsense: unknown key\npgha.toml: ttl: not a duration"
        assert await scene.ask("reload") == Answer(status=400, text=wrong)
        assert scene.wakes == 0, "no pass has anything to do"
        assert await scene.ask("reload", deadline_s=1) == Answer(status=503, text="the configuration was not read within 1 seconds; it may still happen")
        problems = ()
        begun_s = trio.current_time()
        assert await scene.ask("reload", deadline_s=7) == Answer(status=202, text="reload scheduled")
        assert trio.current_time() - begun_s == pytest.approx(2, abs=0.01), "whatever the node is doing"
        assert scene.inbox.requests == ()

    run(main)


def test_a_pass_that_never_comes_is_admitted_and_its_request_withdrawn():
    async def main() -> None:
        scene = Scene()
        answer = await scene.ask("restart", deadline_s=7)
        assert (answer.status, answer.text) == (503, "no outcome of the restart within 7 seconds; it may still happen")
        assert trio.current_time() == pytest.approx(7, abs=0.01)
        assert scene.inbox.requests == ()
        scene.inbox.answer(1, 200, "too late")                   # nobody waits
        assert (await scene.ask("restart", deadline_s=1)).status == 503, "and is not taken for the next one's"

    run(main)


def test_whoever_hangs_up_leaves_no_request_behind():
    async def main() -> None:
        scene = Scene()
        with trio.move_on_after(1):
            await scene.ask("restart", deadline_s=60)
        assert scene.inbox.requests == ()

    run(main)


def test_two_restarts_are_one_too_many_and_the_queue_has_an_end():
    async def main() -> None:
        scene = Scene()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(lambda: scene.ask("restart", deadline_s=60))
            await until(lambda: scene.inbox.requests, 1)
            assert await scene.ask("restart") == Answer(status=503, text="restart already in progress")
            for _ in range(WAITING_AT_MOST - 1):
                nursery.start_soon(lambda: scene.ask("reinitialize", deadline_s=60))
            await until(lambda: len(scene.inbox.requests) == WAITING_AT_MOST, 1)
            assert [r.id for r in scene.inbox.requests] == list(range(1, WAITING_AT_MOST + 1))
            assert await scene.ask("reinitialize") == Answer(status=503, text="too many requests are waiting")
            for request in scene.inbox.requests:
                scene.inbox.answer(request.id, 200, "done")

    run(main)


@pytest.mark.parametrize(("epoch", "wakes"), [(3, 0), (4, 1), (5, 1)])
def test_only_a_question_about_this_election_or_a_later_one_wakes_the_loop(epoch: int, wakes: int):
    async def main() -> None:
        scene = Scene()
        scene.inbox.wake("vote asked", epoch)
        assert scene.wakes == 0, "nothing is known of the cluster yet"
        scene.put("pgha/epoch", {"number": 4, "holder": "a", "incarnation": "r"})
        scene.look()
        scene.inbox.wake("vote asked", epoch)
        assert scene.wakes == wakes

    run(main)


def test_whoever_asks_for_the_position_lets_it_be_looked_at():
    async def main() -> None:
        scene = Scene()
        scene.inbox.wake("position asked", -1)
        assert (scene.wakes, scene.looks) == (0, 1)

    run(main)


# --- PostgreSQL has a word in it, too ----------------------------------------------------------------------------------

def test_what_postgresql_refuses_is_not_written_and_a_question_writes_nothing() -> None:
    async def main() -> None:
        scene = Scene()
        scene.put("config", CONFIG)
        scene.look()
        judged: list[tuple[Any, Any]] = []

        async def judge(old: Any, new: Any) -> Judgement:
            judged.append((old, new))
            bad = new["postgresql"]["parameters"]["work_mem"] == "8 parsecs"
            return Judgement(problems=("no such unit",) if bad else (), warnings=("doubtful",), restart={"max_connections": ("100", "200")}, asked="server", version=15)

        scene.inbox.judge = judge
        before = scene.revision("config")
        assert await scene.ask("patch_config", {"postgresql": {"parameters": {"work_mem": "8 parsecs"}}}) == Answer(status=400, text="no such unit")
        question = {"config": {**CONFIG, "postgresql": {"parameters": {"work_mem": "8 parsecs"}}}}
        answer = await scene.ask("check_config", question)
        assert (answer.status, json.loads(answer.text)) == (200, {
            "problems": ["no such unit"], "warnings": ["doubtful"], "restart": {"max_connections": {"old_value": "100", "new_value": "200"}},
            "asked": "server", "postgres_version": 15})
        assert judged[-1] == (CONFIG, question["config"])
        assert json.loads((await scene.ask("check_config", {**question, "old": {"ttl": 20}})).text)["problems"] == ["no such unit"]
        assert judged[-1][0] == {"ttl": 20}
        assert scene.revision("config") == before
        assert (await scene.ask("patch_config", {"postgresql": {"parameters": {"work_mem": "8MB"}}})).status == 200
        assert scene.revision("config") > before
    run(main)


def test_what_reads_the_same_is_no_change_and_units_are_written_as_numbers() -> None:
    async def main() -> None:
        scene = Scene()
        scene.put("config", CONFIG)
        before = scene.revision("config")
        assert (await scene.ask("patch_config", {"ttl": "30", "loop_wait": 10})).status == 200
        assert scene.revision("config") == before
        assert json.loads((await scene.ask("patch_config", {"ttl": "1min"})).text)["ttl"] == 60
        assert json.loads(scene.stored("config"))["ttl"] == 60
    run(main)
