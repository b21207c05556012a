"""Whatever stands in the store: a view, a decision, and answers to everybody; and the lock is never taken for absent."""

from __future__ import annotations

import json
import logging
import random
from pathlib import Path
from typing import Any

import decide_world as w
import msgspec
import pytest
import trio
from decide_anything import world
from hostile import corpus, dumped, inputs
from msgspec.structs import replace
from observe_world import KEYS as SCENE_KEYS
from observe_world import Scene
from observe_world import run as run_in_virtual_time
from rest_world import ClockAt, Inbox

from pgha.agent import _what_is_said
from pgha.announce import member_value
from pgha.config.load import effective
from pgha.config.local import LocalConfig
from pgha.dcs import Change, Entry, Generation, Snapshot
from pgha.dcs.keys import EPOCH, LARGEST_MEMBER_BYTES, LOCK, UNREADABLE_LOCK, Keys, encode, parse, parse_lock
from pgha.errors import Compacted, DcsUnreachable
from pgha.model.action import Promote
from pgha.model.cluster import ClusterView
from pgha.model.lock import LockRecord
from pgha.rest.published import Board, publish_pass
from pgha.rest.routes import App
from pgha.rest.wire import Request

KEYS = Keys("service", "demo")
MEMBER = {"conn_url": "postgres://b:5432/x", "api_url": "http://b:8008/patroni", "state": "running", "role": "replica", "version": "4.1.4", "xlog_location": w.LSN, "timeline": 3,
          "tags": {"nofailover": False, "failover_priority": 1}, "pgha": {"node_id": "id-b", "version": "0.1.0"}}
SAMPLES: dict[str, Any] = {
    "initialize": w.SYSTEM.encode(), "config": {"ttl": 20, "loop_wait": 5, "retry_timeout": 5, "postgresql": {"parameters": {"max_connections": 100}, "use_slots": True}, "slots": {"a": {}}},
    "leader": b"a", "status": {"optime": w.LSN, "slots": {"b": w.LSN, "c": 5}, "retain_slots": ["b"]}, "optime/leader": b"5", "failover": {"leader": "a", "member": "b"},
    "sync": {"leader": "a", "quorum": 1, "sync_standby": "b,c"}, "history": [[1, 5, "why", "2026", "a"], [2, 6, "why"]], "failsafe": {"a": "http://a:8008/patroni"}, "members/b": MEMBER,
    "members/a": MEMBER | {"role": "primary"},
    LOCK: json.loads(encode(LockRecord(holder="a", node_id="id-a", incarnation="run-a", sequence=9, ttl_s=20.0, lsn=w.LSN, timeline=3))),
    EPOCH: {"number": 5, "holder": "a", "incarnation": "run-a", "timeline": 3, "claims": [[4, "b"]]},
}


def good(key: str) -> bytes:
    sample = SAMPLES[key]
    return sample if isinstance(sample, bytes) else dumped(sample)


def view_of(values: dict[str, bytes]) -> ClusterView:
    entries = {KEYS.path(k): Entry(key=KEYS.path(k), value=v, revision=10 + n) for n, (k, v) in enumerate(values.items())}
    return parse(Snapshot(revision=99, entries=entries, generation=Generation()), KEYS)


PATHS = ("/", "/primary", "/replica?lag=1MB", "/read-only-sync", "/quorum", "/patroni", "/cluster", "/history", "/config", "/failsafe", "/metrics", "/pgha/decision", "/pgha/observation", "/pgha/vote")


async def _all_answers(board: Board) -> None:
    app = App(board, Inbox(), clock=ClockAt())
    for target in PATHS:
        path, _, query = target.partition("?")
        app.quick(b"GET " + target.encode(), keep_alive=True)
        response = await app.handle(Request(method="GET", path=path, query=dict(part.split("=") for part in query.split("&") if part)))
        assert response.status in (200, 502, 503), (target, response)
        if response.content_type == "application/json" and response.body:
            json.loads(response.content, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


@pytest.mark.parametrize("key", sorted(SAMPLES))
def test_no_value_is_fatal_to_a_pass(key: str, times: int) -> None:
    """Through the whole of a pass: view, settings, decision, what is said of it, member key, every answer of REST."""
    others = {k: good(k) for k in SAMPLES if k != key}
    chance = random.Random(f"worlds {key} {times}")
    for value in inputs("keys", good(key), None if isinstance(SAMPLES[key], bytes) else SAMPLES[key], count=150 * times, seed=(key, times)):
        view = view_of(others | {key: value})
        assert view.lock is not None, "an unreadable record is foreign and held, never absent"
        assert view.initialize is not None, "present is present"
        for problem in view.problems:
            assert len(problem) < 500, problem
        settings = effective(LocalConfig(), view.config, patroni_member_present=chance.random() < 0.2).settings
        scene = world(chance)
        scene = replace(scene, seen=replace(scene.seen, settings=settings, dcs=replace(
            scene.seen.dcs, view=view, lock_seen=replace(scene.seen.dcs.lock_seen, record=view.lock, revision=view.lock_revision, value=view.lock_value, since=w.ago(chance.choice((0.0, 25.0, 1e6))), absent_since=None))))
        decision = scene.decide()
        for action in decision.actions:
            assert not isinstance(action, Promote) or len(action.block) <= 1001
        _what_is_said(decision)
        encode(member_value(scene.seen, decision, api_url="http://x", conn_url="postgres://x", checkpoint_pending=True))
        published = publish_pass(scene.seen, decision, scope="demo")
        assert msgspec.json.decode(msgspec.json.encode(scene.seen), type=type(scene.seen)) is not None, "a pass can be written down and read back"
        trio.run(_all_answers, Board(published))


def test_no_lock_record_that_is_not_whole_is_believed(times: int) -> None:
    """Whoever reads it: it is somebody's, for some time, and never this node's."""
    for value in inputs("keys", good(LOCK), SAMPLES[LOCK], count=4000 * times, seed=times):
        record = parse_lock(value)
        assert 0 < record.ttl_s <= 86400
        assert record.mode in ("held", "paused", "released")
        assert 0 <= record.sequence < 1 << 63
        assert 0 <= record.lsn < 1 << 63
        assert 0 <= record.timeline < 1 << 32
        if record is UNREADABLE_LOCK:
            assert (record.mode, record.holder) == ("held", "")
        else:
            assert record.holder.encode() in value or b"\\" in value, "what is believed was said"


def test_an_unreadable_lock_is_waited_for_and_not_taken_at_once() -> None:
    for _, value in corpus("keys"):
        view = view_of({k: good(k) for k in SAMPLES} | {LOCK: value})
        scene = w.CANDIDATE
        scene = replace(scene, seen=replace(scene.seen, dcs=replace(scene.seen.dcs, view=view, lock_seen=replace(
            scene.seen.dcs.lock_seen, record=view.lock, revision=view.lock_revision, value=view.lock_value, since=w.ago(0.1), absent_since=None))))
        assert not any(type(action).__name__ == "AcquireLock" for action in scene.decide().actions)


# --- the observer --------------------------------------------------------------------------------------------------------

def observing(tmp_path: Path, main: Any) -> None:
    async def body() -> None:
        scene = Scene(tmp_path)
        async with trio.open_nursery() as nursery:
            await nursery.start(scene.observer.run)
            await main(scene)
            nursery.cancel_scope.cancel()

    run_in_virtual_time(body)


def test_the_observer_outlives_whatever_is_written(tmp_path: Path, times: int, caplog: pytest.LogCaptureFixture) -> None:
    async def main(scene: Scene) -> None:
        chance = random.Random(times)
        streams = {key: inputs("keys", good(key), None if isinstance(SAMPLES[key], bytes) else SAMPLES[key], count=10_000, seed=(key, "observer", times)) for key in SAMPLES}
        for n in range(600 * times):
            key = chance.choice(sorted(SAMPLES))
            if chance.random() < 0.1:
                scene.delete(key)
            else:
                scene.put(key, next(streams[key])[:2_000_000])
            if chance.random() < 0.05:
                scene.put(chance.choice(("members/" + "x" * 500, "members/\x1b[31m", "unknown/key", "members/", "config/", "pgha/")), b"\xff{")
            if n % 7 == 0:
                await scene.seen()
            if n % 50 == 0:
                await scene.observer.read()
        await scene.seen()
        lock = scene.world.read(SCENE_KEYS.path(LOCK)).entries.get(SCENE_KEYS.path(LOCK))
        assert (scene.facts.view.lock is None) == (lock is None)
        if lock is not None:
            assert scene.facts.view.lock_value == lock.value, "what a take-over compares is the whole of it"

    observing(tmp_path, main)


def test_a_large_value_is_neither_kept_nor_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def main(scene: Scene) -> None:
        scene.renew(1)
        scene.put("members/b", b'{"state":"' + b"x" * 10_000_000 + b'"}')
        scene.put("nobody/reads/this", b"x" * 10_000_000)
        scene.put("config", b'{"ttl":30}')
        await trio.sleep(1)
        kept = scene.observer._entries
        assert {len(e.value) for k, e in kept.items() if "members" in k} == {LARGEST_MEMBER_BYTES + 1}
        assert not any("nobody" in key for key in kept)
        assert "members/b" in scene.facts.view.problems[0]
        for sequence in range(2, 30):
            scene.renew(sequence)
            await scene.seen()

    with caplog.at_level(logging.INFO):
        observing(tmp_path, main)
    assert len(caplog.text) < 10_000
    assert caplog.text.count("store holds what cannot be read") == 1


class _BadWatch:
    """A store whose reads are good and whose watches all end in the same way."""

    def __init__(self, inner: Any, error: Exception | None) -> None:
        self._inner, self._error = inner, error
        self.reads = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    async def read(self, prefix: str, *, deadline_s: float) -> Snapshot:
        self.reads += 1
        return await self._inner.read(prefix, deadline_s=deadline_s)

    def watch(self, prefix: str, *, after_revision: int) -> Any:
        error = self._error

        class _Watch:
            async def __aenter__(self) -> Any:
                return self

            async def __aexit__(self, *_: object) -> None:
                return None

            def __aiter__(self) -> Any:
                return self

            async def __anext__(self) -> Change | None:
                await trio.lowlevel.checkpoint()
                assert error is not None
                raise error

        return _Watch()


@pytest.mark.parametrize("error", [Compacted(5), Compacted(1 << 62), DcsUnreachable("watch: the stream ended"), DcsUnreachable("x" * 100_000)], ids=lambda error: str(error)[:40])
def test_a_watch_that_never_works_is_said_once_and_replaced_by_reading(tmp_path: Path, error: Exception, caplog: pytest.LogCaptureFixture) -> None:
    async def body() -> None:
        scene = Scene(tmp_path)
        store = _BadWatch(scene.link, error)
        scene.observer._store = store
        async with trio.open_nursery() as nursery:
            await nursery.start(scene.observer.run)
            for sequence in range(60):
                scene.renew(sequence)
                await trio.sleep(3.0)
                assert scene.facts.view.lock.sequence == sequence, "reads stand in for it"
                assert scene.facts.unreachable_since is None, "the store answers"
            assert store.reads < 200
            nursery.cancel_scope.cancel()

    with caplog.at_level(logging.INFO):
        run_in_virtual_time(body)
    assert len([r for r in caplog.records if r.name.startswith("pgha")]) < 6
