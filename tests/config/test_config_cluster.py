"""The shared configuration: others' nonsense is repaired and named, our own writes are judged strictly."""

from __future__ import annotations

import random

import pytest

from pgha.config.cluster import DEEPEST, ClusterConfig, merge_patch, normalised, validate_change, validate_dynamic


def timing(config):
    return config.ttl_s, config.loop_wait_s, config.retry_timeout_s


def read(raw, *, patroni=False):
    return ClusterConfig.from_json(raw, patroni_member_present=patroni)


def test_defaults():
    config, problems = read(None)
    assert problems == ()
    assert timing(config) == (30, 10, 10)
    assert (config.maximum_lag_on_failover_bytes, config.maximum_lag_on_syncnode_bytes, config.max_timelines_history) == (1048576, -1, 0)
    assert (config.primary_start_timeout_s, config.primary_stop_timeout_s, config.member_slots_ttl_s) == (300, 0, 1800)
    assert (config.synchronous_mode, config.synchronous_node_count, config.failsafe_mode, config.pause, config.check_timeline) == ("off", 1, False, False, False)
    assert (config.postgresql.use_slots, config.postgresql.use_pg_rewind) == (True, False)
    assert (config.pgha.crash_handover_after_s, config.primary_hang_timeout_s, config.pgha.compaction) == (3, 29, True)


@pytest.mark.parametrize(("raw", "patroni", "expected", "named"), [
    ({"ttl": 5, "loop_wait": 1, "retry_timeout": 1}, False, (5, 1, 1), ""),
    ({"ttl": 3, "loop_wait": 1, "retry_timeout": 1}, False, (3, 1, 1), ""),
    ({"ttl": 5, "loop_wait": 1, "retry_timeout": 2}, False, (5, 1, 2), ""),
    ({"ttl": "1min", "loop_wait": "10s"}, False, (60, 10, 10), ""),
    # 1 + 2 x retry_timeout > ttl: loop_wait 1, retry_timeout (ttl - 1) // 2
    ({"ttl": 20, "loop_wait": 10, "retry_timeout": 10}, False, (20, 1, 9), "ttl: loop_wait + 2 x retry_timeout is 10 + 2 x 10 = 30 s, more than ttl 20 s; used instead: loop_wait 1 s, retry_timeout 9 s"),
    ({"ttl": 3, "retry_timeout": 10}, False, (3, 1, 1), "used instead: loop_wait 1 s, retry_timeout 1 s"),
    # else loop_wait = ttl - 2 x retry_timeout
    ({"ttl": 25, "loop_wait": 10, "retry_timeout": 10}, False, (25, 5, 10), "used instead: loop_wait 5 s, retry_timeout 10 s"),
    # below the minimum: the minimum
    ({"ttl": 1, "loop_wait": 1, "retry_timeout": 1}, False, (3, 1, 1), "ttl: is 1 s, below the minimum; allowed: whole seconds from 3 s to 86400 s"),
    ({"loop_wait": 0}, False, (30, 1, 10), "loop_wait: is 0 s, below the minimum"),
    ({"retry_timeout": -5}, False, (30, 10, 1), "retry_timeout: is -5 s, below the minimum"),
    ({"ttl": 30.9}, False, (30, 10, 10), "ttl: is 30.9, not whole seconds"),
    ({"ttl": 10**30}, False, (30, 10, 10), "ttl: is far too large"),
    ({"ttl": 100_000}, False, (86400, 10, 10), "ttl: is 100000 s, above the maximum"),
    # no number at all: the default
    ({"ttl": "long"}, False, (30, 10, 10), 'ttl: is "long", not a number'),
    ({"ttl": None}, False, (30, 10, 10), "ttl: is null"),
    ({"ttl": True}, False, (30, 10, 10), "ttl: is true, not a number"),
    # a Patroni raises lower values by itself, so both sides must count alike
    ({"ttl": 5, "loop_wait": 1, "retry_timeout": 1}, True, (20, 1, 3), "ttl: is 5 s, raised to 20 s because a Patroni member is present"),
    ({"ttl": 20, "loop_wait": 1, "retry_timeout": 3}, True, (20, 1, 3), ""),
])
def test_timing_written_by_others(raw, patroni, expected, named):
    config, problems = read(raw, patroni=patroni)
    assert timing(config) == expected
    assert any(named in problem for problem in problems) if named else problems == ()
    assert all(problem.startswith("/config: ") for problem in problems)


@pytest.mark.parametrize("raw", [[], "x", 5, {"postgresql": []}, {"postgresql": {"parameters": 5}}, {"slots": []}, {"pgha": "x"}, {"ignore_slots": [1]},
                                 {"synchronous_mode": []}, {"synchronous_node_count": "many"}, {"standby_cluster": "x"}, {"postgresql": {"pg_hba": [1]}}])
def test_nonsense_of_others_is_named_and_survived(raw):
    config, problems = read(raw)
    assert timing(config) == (30, 10, 10)
    assert len(problems) == 1


def test_one_bad_value_of_others_costs_only_itself():
    config, problems = read({"postgresql": {"parameters": {"work_mem": "8MB", "x": [1], "a b": 1, "max_connections": 200, "log_line_prefix": "a\nb", "y": None},
                                            "recovery_conf": {"restore_command": "cp", "recovery_target_time": "x", "Primary_Conninfo": "x", "archive_cleanup_command": {}}}})
    assert config.postgresql.parameters == {"work_mem": "8MB", "max_connections": 200}
    assert config.postgresql.recovery_conf == {"restore_command": "cp"}
    assert len(problems) == 2
    assert problems[0].startswith("/config: postgresql.parameters: has a list for x; a parameter's value is text, number or boolean; has \"a b\", which is no parameter's name")
    assert all(problem.endswith("; the rest of it counts") for problem in problems)


def test_unknown_keys_of_others_are_their_business():
    assert read({"site": "north", "postgresql": {"callbacks_of_mine": {}}, "pgha": {"future": 1}})[1] == ()


def test_older_names_count():
    config, problems = read({"master_start_timeout": 60, "master_stop_timeout": "1min", "pgha": {"crash_handover_after_s": 5, "primary_hang_timeout": "10s"}})
    assert problems == ()
    assert (config.primary_start_timeout_s, config.primary_stop_timeout_s, config.pgha.crash_handover_after_s, config.primary_hang_timeout_s) == (60, 60, 5, 10)


@pytest.mark.parametrize(("value", "means"), [(True, "on"), ("on", "on"), (False, "off"), ("quorum", "quorum"), ("yes", "on")])
def test_synchronous_mode(value, means):
    assert read({"synchronous_mode": value})[0].synchronous_mode == means


@pytest.mark.parametrize(("key", "value"), [("standby_cluster", {"host": "a"}), ("primary_race_backoff", 3)])
def test_what_is_not_carried_out_yet_is_said_not_pretended(key, value):
    assert read({key: value})[1] == (f"/config: {key}: not supported yet by this version; it has no effect",)
    assert validate_dynamic({key: value}) == [f"/config: {key}: not supported yet by this version; allowed: leave it out or off"]


def test_parameters_that_cannot_be_are_named():
    _, problems = read({"postgresql": {"parameters": {"max_connections": 5, "port": 1, "hot_standby": "on", "work_mem": "4MB"}}})
    assert problems == (
        "/config: postgresql.parameters.max_connections: is 5, below the minimum; allowed: a whole number, at least 25; not used",
        "/config: postgresql.parameters.port: is set by pgha itself; allowed: leave it out; not used",
    )


@pytest.mark.parametrize(("raw", "problem"), [
    ({"tll": 5}, "/config: tll: unknown key; did you mean ttl?"),
    ({"postgresql": {"use_slot": True}}, "/config: postgresql.use_slot: unknown key; did you mean use_slots?"),
    ({"pgha": {"crash_handover": 1}}, "/config: pgha.crash_handover: unknown key; did you mean crash_handover_after?"),
    ({"ttl": 5}, "/config: ttl: loop_wait + 2 x retry_timeout is 10 + 2 x 10 = 30 s, more than ttl 5 s; allowed: a larger ttl, or smaller loop_wait and retry_timeout"),
    ({"ttl": 30.5}, "/config: ttl: is 30.5, not whole seconds"),
    ({"primary_start_timeout": 1, "master_start_timeout": 2}, "/config: primary_start_timeout: is given together with master_start_timeout, another name of it"),
    ({"postgresql": {"data_dir": "/x"}}, "/config: postgresql.data_dir: is known only to the node itself"),
    ({"postgresql": {"parameters": {"wal_level": "minimal"}}}, '/config: postgresql.parameters.wal_level: is "minimal"; allowed: replica or logical'),
    ({"postgresql": {"parameters": {"wal_keep_size": 8}}}, "/config: postgresql.parameters.wal_keep_size: is 8388608 bytes, below the minimum; allowed: at least 16MB"),
    ({"postgresql": {"parameters": {"hot_standby": False}}}, "/config: postgresql.parameters.hot_standby: is false; allowed: on, or leave it out"),
    ({"postgresql": {"parameters": {"wal_log_hints": "perhaps"}}}, '/config: postgresql.parameters.wal_log_hints: is "perhaps"; allowed: on or off'),
    ([], "/config: is a list; allowed: a table"),
])
def test_our_own_writes_are_judged_strictly(raw, problem):
    (found,) = validate_dynamic(raw)
    assert found.startswith(problem)


def test_only_what_a_change_changes_is_judged():
    old = {"ttl": "soon", "mystery": 1, "postgresql": {"parameters": {"max_connections": 5}}}
    assert validate_change(old, {**old, "maximum_lag_on_failover": "2MB"}) == []
    assert validate_change(old, {**old, "mistery": 2}) == ["/config: mistery: unknown key; allowed: " + validate_dynamic({"mistery": 2})[0].partition("allowed: ")[2]]
    assert len(validate_change(old, {**old, "ttl": "later"})) == 1
    assert validate_change(old, {"mystery": 1}) == []
    assert validate_change(None, {"ttl": 30}) == []
    assert len(validate_change({"ttl": 30}, {"ttl": 30, "retry_timeout": 14})) == 1


@pytest.mark.parametrize(("old", "patch", "new"), [
    ({"a": 1}, {"b": 2}, {"a": 1, "b": 2}),
    ({"a": 1, "b": 2}, {"a": None}, {"b": 2}),
    ({"a": {"x": 1, "y": 2}}, {"a": {"x": None, "z": 3}}, {"a": {"y": 2, "z": 3}}),
    ({"a": 1}, {"a": {"x": None, "y": 1}}, {"a": {"y": 1}}),
    ({"a": {"x": 1}}, {"a": [1]}, {"a": [1]}),
    ({}, {"gone": None}, {}),
    (None, {"a": 1}, {"a": 1}),
])
def test_merge_patch(old, patch, new):
    before = repr(old)
    assert merge_patch(old, patch) == new
    assert repr(old) == before


@pytest.mark.parametrize("depth", [DEEPEST + 1, 100_000])
@pytest.mark.parametrize("kind", [lambda inner: {"a": inner}, lambda inner: [inner]])
def test_a_patch_without_bottom_is_refused(depth, kind):
    patch = {}
    for _ in range(depth):
        patch = kind(patch)
    new = merge_patch({"slots": {}}, {"slots": patch})
    assert validate_change({}, new) == ["/config: is nested more than 32 deep"]
    while patch:  # taken apart by hand: freeing 100,000 levels at once is deep, too
        patch = patch.popitem()[1] if isinstance(patch, dict) else patch.pop()


def test_what_bootstrap_writes_has_no_units_that_a_reader_might_not_know():
    raw = {"ttl": "5s", "maximum_lag_on_failover": "1MB", "synchronous_mode": "off", "failsafe_mode": "no", "member_slots_ttl": "1.5s", "postgresql": {"parameters": {"a": "1MB"}}, "x": "1s"}
    assert normalised(raw) == {**raw, "ttl": 5, "maximum_lag_on_failover": 1048576, "synchronous_mode": False, "failsafe_mode": False, "member_slots_ttl": 1.5}
    assert normalised({"synchronous_mode": "quorum", "ttl": "soon"}) == {"synchronous_mode": "quorum", "ttl": "soon"}


def test_whatever_others_write_the_timing_rule_holds():
    """2,000 random tables: never an exception, always a usable timing, and what is usable as written is left alone."""
    rng = random.Random(7)
    values = [*range(-2, 40), 2.5, "5s", "1min", "x", None, True, [], {}, 10**20, float("inf")]
    for _ in range(2000):
        raw = {key: rng.choice(values) for key in ("ttl", "loop_wait", "retry_timeout") if rng.random() < 0.8}
        patroni = rng.random() < 0.3
        config, problems = read(raw, patroni=patroni)
        ttl, loop_wait, retry = timing(config)
        assert ttl >= (20 if patroni else 3), raw
        assert loop_wait >= 1, raw
        assert retry >= (3 if patroni else 1), raw
        assert loop_wait + 2 * retry <= ttl, raw
        if not problems:
            assert validate_dynamic(raw) == [], raw
