"""Whatever stands in a file, in the environment or in the store: a configuration or a ConfigError, and no secret shown."""

from __future__ import annotations

import datetime as dt

import pytest
from config_samples import GOOD, PASSWORDS, changed, write

from pgha.config.cluster import ClusterConfig, merge_patch, normalised, validate_change
from pgha.config.environment import variables
from pgha.config.load import effective, load
from pgha.config.local import LocalConfig
from pgha.config.schema import every_key
from pgha.errors import ConfigError

HUSH = "hush-everywhere-hush"
ODD = [
    0, -1, 1, 10**18, 1.5, float("nan"), float("inf"), True, False, "", " ", "on", "quorum", "1e9", "5 parsec", "[::1]:x", ":::", "*", "a,b", "\x1b[31m", "ä", "a\nb",
    "x" * 10_000, "/", "/tmp/../x", [], [[]], [{}], [1], ["a", 1], {}, {"a": 1}, {"": {}}, {"a\nb": {"c": []}}, dt.date(2026, 1, 1), dt.time(1),
]


def judged(path, environ=None):
    """What was printed, or would be."""
    try:
        loaded = load(path, environ or {})
    except ConfigError as error:
        for line in error.problems:
            assert "\n" not in line
            assert "\x1b" not in line
            assert ": " in line
        return "\n".join(error.problems)
    effective(loaded.local, loaded.local.bootstrap.dcs)
    return repr(loaded)


@pytest.mark.parametrize("path", [".".join(path) for path, _key, _section in every_key(LocalConfig)] + ["postgresql", "postgresql.authentication", "restapi.authentication", "pgha", "nonsense"])
def test_any_value_under_any_key_of_a_file(tmp_path, path):
    for value in ODD:
        text = judged(write(tmp_path / "pgha.toml", changed(path, value)))
        assert not any(password in text for password in PASSWORDS.values()), text


@pytest.mark.parametrize("content", [b"a = " + b"[" * 5000, b"a = " + b"{b=" * 5000, b"\x1b", b"a = '\x1b[31m'", b"[[postgresql]]\n", b"\xef\xbb\xbfscope = 1", b"", b"=", b"a.b.c = 1\na = 2"])
def test_any_bytes_in_a_file(tmp_path, content):
    (tmp_path / "pgha.toml").write_bytes(content)
    with pytest.raises(ConfigError):
        load(tmp_path / "pgha.toml", {})
    judged(tmp_path / "pgha.toml")


@pytest.mark.parametrize("name", sorted(variables()))
def test_any_text_in_any_variable(tmp_path, name):
    path = write(tmp_path / "pgha.toml", GOOD)
    for text in ("", " ", "[", "{", "[1, {}]", '{"a": {}}', "a,b=c,,", "0", "on", "\x1b", "\udcff", "x" * 10_000, "[" * 3000, "{a=" * 3000):
        judged(path, {name: text})


@pytest.mark.parametrize("path", [".".join(path) for path, _key, _section in every_key(ClusterConfig)] + ["", "postgresql", "pgha", "postgresql.parameters.max_connections", "nonsense"])
def test_any_value_under_any_key_of_the_store(path):
    for value in (*ODD, None, {"a": None}):
        raw = value
        for part in reversed(path.split(".") if path else []):
            raw = {part: raw}
        config, problems = ClusterConfig.from_json(raw, patroni_member_present=False)
        assert config.loop_wait_s + 2 * config.retry_timeout_s <= config.ttl_s
        assert not any("\n" in problem for problem in problems)
        if isinstance(raw, dict):
            assert isinstance(validate_change({}, merge_patch({}, raw)), list)
            assert set(normalised(raw)) == set(raw)
            assert normalised(normalised(raw)) == normalised(raw) or "nan" in repr(raw)


@pytest.mark.parametrize("path", [".".join(path) for path, key, _section in every_key(LocalConfig) if key.kind.secret])
def test_a_secret_under_its_key_or_beside_it_is_not_shown(tmp_path, path):
    parent, _, last = path.rpartition(".")
    for value in (HUSH, [HUSH], {"x": HUSH}, {HUSH: 1}, f"{HUSH}\n"):
        for key in (path, f"{parent}.{last}x", parent):
            text = judged(write(tmp_path / "pgha.toml", changed(key, value)))
            assert HUSH not in text or value == {HUSH: 1}, text
    assert HUSH not in judged(write(tmp_path / "pgha.toml", GOOD), {next(n for n, v in variables().items() if ".".join(v.path) == path): HUSH})
