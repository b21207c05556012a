"""`pgha config check` and `pgha config sample`, and that both need nothing but msgspec and the standard library."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import tomli_w
from config_samples import GOOD, PASSWORDS, changed, write

from pgha.config.check import check
from pgha.config.cluster import validate_dynamic
from pgha.config.load import effective, load
from pgha.config.sample import SAMPLE

ROOT = Path(__file__).parents[2]


def test_a_good_file(tmp_path):
    (tmp_path / "data").mkdir()
    path = write(tmp_path / "pgha.toml", changed("postgresql.data_dir", str(tmp_path / "data"), changed("postgresql.bin_dir", "/usr/lib/postgresql/15/bin")))
    assert check(path, {}) == (0, f"{path}: good")


def test_what_this_machine_lacks_is_a_warning(tmp_path):
    path = write(tmp_path / "pgha.toml", changed("postgresql.bin_dir", str(tmp_path), changed("etcd3", {"host": "a", "protocol": "https", "cacert": "/no/ca"})))
    code, text = check(path, {})
    assert code == 0
    lines = text.splitlines()
    assert f"warning: {path}: postgresql.bin_dir: no initdb in {tmp_path} on this machine" in lines
    assert f"warning: {path}: etcd3.cacert: /no/ca cannot be read by this user on this machine" in lines
    assert lines[-1].startswith(f"{path}: good, ")


def test_programs_that_are_not_there_are_named(tmp_path):
    """A callback would be missed, and a pre_promote that cannot be run refuses every promotion."""
    raw = tomllib.loads(SAMPLE)
    raw["postgresql"] |= {"callbacks": {"on_start": "/no/vip.sh --fast", "on_stop": "true"}, "pre_promote": "'/no such/thing' x", "create_replica_methods": ["walg"],
                          "walg": {"command": "no-such-program-here"}}
    file = tmp_path / "pgha.toml"
    file.write_text(tomli_w.dumps(raw))
    code, said = check(file, {})
    assert code == 0
    for key, program in (("callbacks.on_start", "/no/vip.sh"), ("pre_promote", "/no such/thing"), ("walg.command", "no-such-program-here")):
        assert f"warning: {file}: postgresql.{key}: {program} cannot be run by this user on this machine" in said
    assert "on_stop" not in said


def test_files_of_tls_that_libpq_cannot_use_are_named(tmp_path):
    key = tmp_path / "key"
    key.touch()
    users = {"superuser": {"sslrootcert": "system"}, "replication": {"username": "r", "sslkey": str(key), "sslcert": "/no/cert", "sslrootcert": "/no/ca"}}
    file = write(tmp_path / "pgha.toml", changed("postgresql.authentication", users))
    at = f"warning: {file}: postgresql.authentication.replication"
    unread = [f"{at}.{name}: {path} cannot be read by this user on this machine" for name, path in (("sslcert", "/no/cert"), ("sslrootcert", "/no/ca"))]

    def said(mode):
        key.chmod(mode)
        return [line for line in check(file, {})[1].splitlines() if "postgresql.authentication" in line]

    assert said(0o600) == unread
    assert said(0o620) == [f"{at}.sslkey: {key} has mode 0620, with which libpq does not use it; allowed: 0600, or 0640 of root's", *unread]
    assert (said(0o640) == unread) == (os.getuid() == 0)


def test_every_mistake_is_counted(tmp_path):
    path = write(tmp_path / "pgha.toml", changed("restapi.listn", 1, changed("scope", None)))
    code, text = check(path, {"PGHA_NAEM": "x"})
    assert code == 2
    assert [line.split(":")[0] for line in text.splitlines()] == ["environment", str(path), str(path), "3 mistakes found"]
    assert not any(password in text for password in PASSWORDS.values())


def test_the_sample_is_the_packaged_example():
    assert (ROOT / "packaging/pgha.toml.example").read_text() == SAMPLE


def test_the_sample_is_good(tmp_path):
    path = tmp_path / "pgha.toml"
    path.write_text(SAMPLE)
    result = load(path, {})
    assert result.warnings == ()
    assert validate_dynamic(result.local.bootstrap.dcs) == []
    settings = effective(result.local, result.local.bootstrap.dcs).settings
    assert (settings.ttl_s, settings.loop_wait_s, settings.retry_timeout_s) == (5, 1, 1)


def test_what_the_sample_has_commented_out_is_good_too(tmp_path):
    path = tmp_path / "pgha.toml"
    uncommented = re.sub(r"(?m)^# (\[|\w+ = )", r"\1", SAMPLE)
    path.write_text(re.sub(r'password_file = "/etc/pgha/\w+.password"', 'password = "x"', uncommented))
    path.chmod(0o600)
    assert tomllib.loads(path.read_text())["pgha"]["runtime_dir"] == "/run/pgha/demo"
    local = load(path, {}).local
    assert local.tags.nofailover
    assert local.etcd3.endpoints[0] == "https://10.0.0.11:2379"
    assert local.restapi.authentication.username == "admin"


def test_only_msgspec_and_the_standard_library_are_needed(tmp_path):
    path = write(tmp_path / "pgha.toml", GOOD)
    script = ("import sys\n"
              "for name in ('trio', 'trio_websocket', 'httpx', 'h11', 'psycopg', 'tomli_w', 'yaml'): sys.modules[name] = None\n"
              "from pgha.config.check import check; import pgha.config.sample, pgha.config.directories, pgha.config.state\n"
              "print(check(sys.argv[1], {})[0])")
    done = subprocess.run([sys.executable, "-B", "-c", script, str(path)], capture_output=True, text=True, cwd=ROOT, timeout=30)
    assert (done.stdout, done.stderr) == ("0\n", "")


@pytest.mark.parametrize("where", ["/", "/dev/null", "/proc/self/mem"])
def test_odd_places(where):
    code, text = check(where, {})
    assert code == 2
    assert text.startswith(where)
