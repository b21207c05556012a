"""Whatever stands in a file, a variable or `/config`: a configuration or a ConfigError of bounded length, and no secret shown."""

from __future__ import annotations

import time
from pathlib import Path
from random import Random
from typing import Any

import pytest
import tomli_w
from config_samples import GOOD, PASSWORDS
from hostile import BITS, broken, corpus, dumped, inputs, mutated

from pgha.config.cluster import ClusterConfig, merge_patch, normalised, validate_change
from pgha.config.environment import variables
from pgha.config.judgement import changed_settings
from pgha.config.load import effective, load
from pgha.config.local import LocalConfig
from pgha.config.why import why
from pgha.errors import ConfigError

SHARED: dict[str, Any] = {
    "ttl": 30, "loop_wait": 10, "retry_timeout": 10, "maximum_lag_on_failover": "1MB", "synchronous_mode": "quorum", "member_slots_ttl": "30min", "slots": {"a": {"type": "physical"}},
    "ignore_slots": [{"name": "x", "type": "logical"}], "standby_cluster": {"host": "h", "port": 5432}, "pgha": {"crash_handover_after": 3},
    "postgresql": {"use_slots": True, "parameters": {"max_connections": 100, "wal_level": "logical"}, "pg_hba": ["local all all trust"], "recovery_conf": {"restore_command": "cp"}},
}


KEYS = ("ttl", "loop_wait", "slots", "postgresql.use_slots", "postgresql.pg_hba", "postgresql.parameters", "postgresql.parameters.max_connections",
        "postgresql.parameters.wal_level", "postgresql.recovery_conf.restore_command", "pgha.crash_handover_after", "standby_cluster.host")


def judged(path: Path, environ: dict[str, str], *, moved: frozenset[str] = frozenset()) -> None:
    """`moved`: passwords that damage has made part of something else, a user's name: who is to know?"""
    try:
        loaded = load(path, environ)
    except ConfigError as error:
        text = "\n".join(error.problems)
        assert len(text) < 200_000
        assert all("\n" not in problem and "\x1b" not in problem for problem in error.problems)
    else:
        effective(loaded.local, loaded.local.bootstrap.dcs)
        text = repr(loaded)
    assert not any(password in text for password in set(PASSWORDS.values()) - moved), text


def test_a_file(tmp_path: Path, times: int) -> None:
    path = tmp_path / "pgha.toml"
    for content in inputs("config", tomli_w.dumps(GOOD).encode(), count=1200 * times, seed=("file", times)):
        path.write_bytes(content)
        path.chmod(0o600)
        began = time.process_time()
        judged(path, {}, moved=frozenset(p for p in PASSWORDS.values() if content.count(p.encode()) != content.count(f'password = "{p}"'.encode())))
        assert time.process_time() - began < 5, "also a slow machine reads any file in this time"


def test_a_file_that_is_toml_and_says_something_else(tmp_path: Path, times: int) -> None:
    path = tmp_path / "pgha.toml"
    chance = Random(f"toml {times}")
    for _ in range(1500 * times):
        value: Any = GOOD
        for _ in range(chance.randrange(1, 4)):
            value = mutated(chance, value)
        try:
            path.write_text(tomli_w.dumps(value), encoding="utf-8")
        except (TypeError, AttributeError, UnicodeEncodeError):
            continue        # TOML has no null, and a table at its top
        path.chmod(0o600)
        judged(path, {})


def test_variables(tmp_path: Path, times: int) -> None:
    path = tmp_path / "pgha.toml"
    path.write_text(tomli_w.dumps(GOOD))
    path.chmod(0o600)
    chance = Random(f"variables {times}")
    names = sorted(variables())
    for _ in range(1500 * times):
        environ = {}
        for _ in range(chance.randrange(1, 4)):
            name = chance.choice(names) if chance.random() < 0.9 else "PGHA_" + chance.choice(BITS).decode("latin-1")[:50].replace("\0", "")
            text = chance.choice((dumped(SHARED), b"[a, b]", b'["a", "b"]', b"{a = 1}", b"10.0.0.1:5432", b"30s", b"on"))
            environ[name] = broken(chance, text).decode("utf-8", "surrogateescape").replace("\0", "")[:20_000]
        judged(path, environ)
    for _, content in corpus("config"):
        judged(path, {"PGHA_CONFIGURATION": content.decode("utf-8", "surrogateescape")[:1_000_000], "PGHA_TAGS": content.decode("utf-8", "surrogateescape")[4:]})


def test_the_store_s(times: int) -> None:
    chance = Random(f"shared {times}")
    for _ in range(4000 * times):
        value: Any = SHARED
        for _ in range(chance.randrange(1, 5)):
            value = mutated(chance, value)
        config, problems = ClusterConfig.from_json(value, patroni_member_present=chance.random() < 0.3)
        assert config.loop_wait_s + 2 * config.retry_timeout_s <= config.ttl_s <= 86400
        assert len("\n".join(problems)) < 100_000
        assert not any("\n" in problem for problem in problems)
        assert all(len(where) == 2 for where in changed_settings(SHARED, value).values())
        assert len(repr(why(chance.choice(KEYS), local=LocalConfig(), sources={}, dynamic=value))) < 1_000_000
        if isinstance(value, dict):
            normalised(value)
            merged = merge_patch(SHARED, value)
            assert len("\n".join(validate_change(SHARED, merged))) < 100_000


@pytest.mark.parametrize("depth", [30, 40, 900, 100_000])
def test_nesting(depth: int) -> None:
    value: Any = 1
    for n in range(depth):
        value = {"a": value} if n % 2 else [value]
    for where in ({"slots": {"x": value}}, {"standby_cluster": {"host": value}}, {"postgresql": {"parameters": {"x": value}}}, {"x": value}):
        if depth <= 900:    # what JSON can bring
            ClusterConfig.from_json(where, patroni_member_present=False)
        assert validate_change({}, merge_patch({}, where))
