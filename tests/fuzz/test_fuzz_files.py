"""Whatever stands in a file that pgha reads: an answer or a typed error, never more, and a damaged one is never believed."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import msgspec
import observe_world
import pytest
import trio
from hostile import broken, corpus, dumped, inputs

from pgha.agent import _cached_config
from pgha.clock import SystemClock, boot_id
from pgha.config.load import effective
from pgha.config.local import LocalConfig
from pgha.config.state import Remembered, RememberedMember, StoreGeneration, load_remembered, node_id, save_remembered
from pgha.errors import ConfigError, PghaError, PostgresError
from pgha.lock import recipe
from pgha.lock.guard_look import _control_state, _postmaster_pid
from pgha.lock.guard_state import Facts, Held, Look, answer, judge, lapse
from pgha.lock.guard_system import Memory
from pgha.lock.protocol import (
    MAX_BYTES,
    Agent,
    Answer,
    Op,
    ProtocolError,
    Request,
    State,
    encode_answer,
    encode_request,
    parse_answer,
    parse_request,
)
from pgha.model.lock import wait_s
from pgha.model.wal import LONGEST_CLAIM, parse_history_file
from pgha.observe.data_directory import DataDirectoryReader
from pgha.postgres.controldata import parse_control
from pgha.postgres.histories import blocked_timelines, read_histories
from pgha.postgres.processes import adopt, read_postmaster_pid, remove_dead_pid_file

PID = b"12345\n/srv/pg/data\n1764100000\n5432\n/run/postgresql\n*\n  5432001    163840\nready   \n"
HISTORY = b"# pgha: claim: timeline 2 by a, 1f/3, epoch 2\n1\t0/3000000\tno recovery target specified\n\n2\t0/5000060\tbefore 2026-11-25\n# a comment\n"
CONTROL = observe_world.CONTROL.encode()


def contents(good: bytes, value: Any = None, *, count: int, seed: object) -> Iterator[bytes]:
    yield good
    yield from inputs("files", good, value, count=count, seed=seed)


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    path = tmp_path / "data"
    (path / "global").mkdir(parents=True)
    (path / "pg_wal").mkdir()
    return path


def test_postmaster_pid(data_dir: Path, times: int) -> None:
    file = data_dir / "postmaster.pid"
    for content in contents(PID.replace(b"12345", str(os.getpid()).encode()), count=200 * times, seed=("pid", times)):
        file.write_bytes(content)
        found = read_postmaster_pid(data_dir)
        assert found is None or 0 < found.pid < 1 << 31
        assert adopt(data_dir) is None, "no number makes anything but PostgreSQL a postmaster"
        pid, status = _postmaster_pid(str(data_dir))
        assert 0 <= pid < 1 << 31
        assert recipe.read_proc(pid) is None or pid > 0
        judge(Look(exists=True, postmaster_pid=pid, status_before=status, control_state=_control_state(str(data_dir)), status_after=status, standby_signal=True))
        assert remove_dead_pid_file(data_dir)
        assert not file.exists()


def test_what_is_no_file_is_not_waited_for(data_dir: Path) -> None:
    """A pipe that nobody writes to, in place of a file: reading it would never end."""
    for name in ("postmaster.pid", "patroni.dynamic.json", "PG_VERSION"):
        os.mkfifo(data_dir / name)
    assert read_postmaster_pid(data_dir) is None
    assert _cached_config(data_dir) is None

    async def main() -> None:
        with trio.fail_after(5):
            facts = await DataDirectoryReader(data_dir, "/nonexistent").read_facts(running=False)
        assert facts.state != "empty"

    trio.run(main)


def test_the_data_directory_is_never_taken_for_an_empty_one(data_dir: Path, tmp_path: Path, times: int) -> None:
    """PG_VERSION, pg_control, history and pg_controldata's output: by a program that says what it likes."""
    program = tmp_path / "bin" / "pg_controldata"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\ncat {tmp_path}/says\n")
    program.chmod(0o755)
    chance = Random(f"data directory {times}")

    async def main() -> None:
        reader = DataDirectoryReader(data_dir, program.parent)
        for n in range(30 * times):
            (data_dir / "PG_VERSION").write_bytes(b"15\n" if n % 3 else broken(chance, b"15\n"))
            (data_dir / "global" / "pg_control").write_bytes(broken(chance, b"x" * 300))
            (data_dir / "pg_wal" / "00000002.history").write_bytes(broken(chance, HISTORY))
            (tmp_path / "says").write_bytes(broken(chance, CONTROL) if n % 2 else CONTROL)
            facts = await reader.read_facts(running=False, fresh=True)
            assert facts.state in ("partial", "valid", "unreadable"), facts
            assert len(facts.why) < 3000

    trio.run(main)


def test_pg_controldata(times: int) -> None:
    for content in contents(CONTROL, count=3000 * times, seed=("control", times)):
        try:
            control = parse_control(content[:100_000].decode(errors="replace"))
        except PostgresError as error:
            assert len(str(error)) < 300
            continue
        assert 1 << 20 <= control.wal_segment_bytes <= 1 << 30
        assert 2**32 % control.wal_segment_bytes == 0
        assert 1 << 10 <= control.wal_block_bytes <= 1 << 16
        assert all(type(n) is int and 0 <= n < 1 << 32 for n in (control.timeline, control.prev_timeline, control.min_recovery_timeline, control.max_connections))
        assert all(type(n) is int and 0 <= n < 1 << 64 for n in (control.checkpoint_lsn, control.redo_lsn, control.min_recovery_end_lsn))
        assert type(control.checksums) is type(control.wal_log_hints) is bool


@pytest.mark.parametrize("line", [line for line in CONTROL.decode().splitlines() if "modified" not in line])
def test_every_line_of_pg_controldata_counts(line: str) -> None:
    label = line.partition(":")[0]
    for value in ("", "on", "-1", "99999999999999999999", "9" * 5000, "0/0/0", "x", "1_0", " 0x10", "²", "-1/1", "0/-1"):
        try:
            parse_control(CONTROL.decode().replace(line, f"{label}: {value}"))
        except PostgresError as error:
            assert label in str(error)
            continue
        assert label in ("Database cluster state", "Database system identifier", "wal_level setting") or (value == "on" and ("hints" in label or "required" in label or "timestamp" in label)), (label, value)


def test_timeline_histories(data_dir: Path, times: int) -> None:
    file = data_dir / "pg_wal" / "00000003.history"
    for content in contents(HISTORY, count=2000 * times, seed=("history", times)):
        file.write_bytes(content)
        blocked_timelines(data_dir)
        try:
            rows = parse_history_file(content.decode(errors="replace"))
        except ValueError as error:
            assert len(str(error)) < 500
            with pytest.raises(PostgresError) if len(content) < 1 << 20 else pytest.raises((PostgresError, AssertionError)):
                read_histories(data_dir)
                assert len(content) >= 1 << 20
            continue
        assert all(0 < row.timeline < 1 << 32 and 0 <= row.switch_lsn < 1 << 64 and len(row.claim) <= LONGEST_CLAIM for row in rows)
        read_histories(data_dir)


def test_what_was_remembered(tmp_path: Path, times: int) -> None:
    """Forgetting is safe; remembering nonsense is not: deadlines are made of it."""
    save_remembered(tmp_path, Remembered(ttl_s=30.0, system_identifier="7", generation=StoreGeneration(cluster_id="c", revision=7), members={"a": RememberedMember(api_url="http://a", seen_at_wall_s=5.0, lsn=9)}))
    good = (tmp_path / "memory.json").read_bytes()
    for content in contents(good, json.loads(good), count=2500 * times, seed=("memory", times)):
        (tmp_path / "memory.json").write_bytes(content)
        facts, problem = load_remembered(tmp_path)
        assert not problem or facts == Remembered()
        assert 0 <= facts.ttl_s <= 86400
        SystemClock().now().plus_s(wait_s(facts.ttl_s))
        assert msgspec.json.decode(msgspec.json.encode(facts), type=Remembered) == facts


def test_who_this_node_is(tmp_path: Path, times: int) -> None:
    for content in contents(b"0123456789abcdef" * 2 + b"\n", count=500 * times, seed=("node id", times)):
        (tmp_path / "node_id").write_bytes(content)
        try:
            assert len(node_id(tmp_path)) == 32
        except ConfigError as error:
            assert len(str(error)) < 500


def test_the_cached_configuration(data_dir: Path, times: int) -> None:
    good = {"ttl": 30, "loop_wait": 10, "postgresql": {"parameters": {"max_connections": 100}}}
    for content in contents(dumped(good), good, count=1500 * times, seed=("cache", times)):
        (data_dir / "patroni.dynamic.json").write_bytes(content)
        effective(LocalConfig(), _cached_config(data_dir))


# --- the guard -------------------------------------------------------------------------------------------------------------

def test_the_guard_s_file(tmp_path: Path, times: int) -> None:
    """Believed or not: what comes of it is a state that can be told, and one that ends."""
    memory = Memory(str(tmp_path), "/srv/pg/data")
    now = SystemClock().now()
    memory.write(Held(State.ARMED, Agent(5, "run"), 7, now.plus_s(20), None, "armed"), ((8, 1, 99),))
    good = (tmp_path / "guard.json").read_bytes()
    believed = 0
    for content in contents(good, json.loads(good), count=1000 * times, seed=("guard", times)):
        (tmp_path / "guard.json").write_bytes(content)
        was = memory.read()
        if was is None:
            continue
        believed += 1
        held, identities = was
        assert (held.state is State.ARMED) == (held.fence_at is not None)
        lapse(held, now)
        line = encode_answer(Answer(True, held.state, held.fence_at, held.until, held.agent, held.sequence, "", {"why": held.why}))
        assert len(line) <= MAX_BYTES
        assert parse_answer(line).state is held.state
        memory.write(held, identities)
    assert believed, "the good one, at least"
    assert boot_id()


def test_what_agent_and_guard_say(times: int) -> None:
    now = SystemClock().now()
    held = Held(State.ARMED, Agent(5, "run"), 7, now.plus_s(20), None, "armed")
    requests = [Request(op, Agent(6, "run2"), 8 if op in (Op.ARM, Op.NARROW) else 0, now.plus_s(30) if op in (Op.ARM, Op.NARROW, Op.OFFLINE) else None) for op in Op if op is not Op.STATUS]
    for request in requests:
        good = encode_request(request)
        for line in inputs("files", good, json.loads(good), count=500 * times, seed=(request.op, times)):
            try:
                asked = parse_request(line)
            except ProtocolError as error:
                assert len(str(error)) < 500
                continue
            verdict = answer(held, asked, Facts(), now)
            assert verdict.held.state is not State.IDLE
            assert verdict.held.fence_at is None or verdict.held.fence_at.boot_ns < now.plus_s(90_000).boot_ns
    good = encode_answer(Answer(True, State.ARMED, now.plus_s(20), None, Agent(5, "run"), 7, "", {"pid": 5, "data_dir": "/d", "why": "x"}))
    for line in inputs("files", good, json.loads(good), count=2000 * times, seed=("answer", times)):
        try:
            parse_answer(line)
        except ProtocolError as error:
            assert len(str(error)) < 5000


def test_the_corpus_is_read() -> None:
    assert len(corpus("files")) >= 12
    assert issubclass(PostgresError, PghaError)
