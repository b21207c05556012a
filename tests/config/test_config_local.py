"""One node's file: every mistake in one run, each with file, key, what is wrong, what is allowed."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
from config_samples import GOOD, PASSWORDS, changed, loaded, problems, write

from pgha.config.addresses import Address
from pgha.config.load import load, needs_new_agent
from pgha.errors import ConfigError

SHARED = Path(__file__).parents[3] / "shared"
MISSING = object()


def test_a_good_file_says_what_it_says(tmp_path):
    result = loaded(tmp_path, GOOD)
    local = result.local
    assert result.warnings == ()
    assert (local.scope, local.namespace, local.name, local.prefix) == ("demo", "service", "n1", "/service/demo/")
    assert local.etcd3.endpoints == ("http://10.0.0.9:2379",)
    assert local.postgresql.connect_address == Address("10.0.0.1", 5432)
    assert local.restapi.base_url == "http://10.0.0.1:8008"
    assert local.postgresql.config_dir == "/srv/pg/data"
    users = local.postgresql.authentication
    assert users.rewind == users.superuser
    assert users.replication.password.reveal() == PASSWORDS["replication"]
    assert local.watchdog.mode == "automatic"
    assert local.postgresql.pg_ctl_timeout_s == 60.0


@pytest.mark.parametrize(("key", "value", "attribute", "means"), [
    ("namespace", "//db//prod/", "prefix", "/db/prod/demo/"),
    ("etcd3", {"host": "[::1]"}, "etcd3.endpoints", ("http://[::1]:2379",)),
    ("etcd3", {"url": "https://e:1", "cacert": "/ca"}, "etcd3.endpoints", ("https://e:1",)),
    ("etcd3", {"hosts": "a:1,b:2", "protocol": "https"}, "etcd3.endpoints", ("https://a:1", "https://b:2")),
    ("watchdog", {"mode": False, "safety_margin": -1}, "watchdog.safety_margin_s", -1),
    ("postgresql.use_pg_rewind", "on", "postgresql.use_pg_rewind", True),
    ("postgresql.pg_ctl_timeout", "2min", "postgresql.pg_ctl_timeout_s", 120.0),
    ("tags", {"nofailover": "yes", "site": "north", "clonefrom": False}, "tags.raw", {"nofailover": True, "site": "north"}),
    ("tags", {"nofailover": False, "failover_priority": 1}, "tags.raw", {"nofailover": False, "failover_priority": 1}),
    ("log", {"type": "json", "level": "debug", "loggers": {"pgha.dcs": "warning"}}, "log.loggers", {"pgha.dcs": "WARNING"}),
    ("restapi.listen", "[::1]:8008", "restapi.base_url", "http://[::1]:8008"),
    ("restapi.http_extra_headers", {"X-Frame-Options": "DENY", "Content-Security-Policy": "default-src 'self'; x", "X-Empty": "", "X-On": True}, "restapi.http_extra_headers",
     {"X-Frame-Options": "DENY", "Content-Security-Policy": "default-src 'self'; x", "X-Empty": "", "X-On": "true"}),
    ("postgresql.authentication.superuser.sslmode", "verify-full", "postgresql.authentication.rewind.sslmode", "verify-full"),
])
def test_means(tmp_path, key, value, attribute, means):
    got = loaded(tmp_path, changed(key, value)).local
    for part in attribute.split("."):
        got = getattr(got, part)
    assert got == means


@pytest.mark.parametrize(("key", "value", "line"), [
    # misspelt
    ("restapi.listn", "x", "FILE: restapi.listn: unknown key; did you mean listen?"),
    ("postgresql.authentication.superuser.user", "x", "FILE: postgresql.authentication.superuser.user: unknown key; did you mean username?"),
    ("postgres", {"listen": "x"}, "FILE: postgres: unknown key; did you mean postgresql?"),
    ("watchdog.quux", 1, "FILE: watchdog.quux: unknown key; allowed: device, mode, safety_margin"),
    ("bootstrap.dcs.postgresql.use_slot", True, "FILE: bootstrap.dcs.postgresql.use_slot: unknown key; did you mean use_slots?"),
    # missing
    ("scope", MISSING, "FILE: scope: is missing; allowed: text without slashes and spaces"),
    ("postgresql.data_dir", MISSING, "FILE: postgresql.data_dir: is missing; allowed: an absolute path"),
    ("postgresql.authentication.replication.username", MISSING, "FILE: postgresql.authentication.replication.username: is missing; allowed: the user for streaming, as replicator"),
    ("etcd3", MISSING, "FILE: etcd3: is missing; allowed: a table with host, hosts or url"),
    ("etcd3", {"username": "a", "password": "hush"}, "FILE: etcd3.hosts: is missing; allowed: host, hosts or url"),
    ("postgresql.listen", "*:5432", "FILE: postgresql.connect_address: is missing, and listen (*:5432) does not tell it; allowed: one host:port that the other nodes can reach"),
    ("restapi.listen", "a,b", "FILE: restapi.connect_address: is missing, and listen (a,b:8008) does not tell it"),
    ("restapi.authentication", {"username": "a"}, "FILE: restapi.authentication.password: is missing; allowed: username and password, or neither"),
    ("etcd3.password", "hush", "FILE: etcd3.username: is missing; allowed: username and password, or neither"),
    ("postgresql.authentication.rewind", {"password": "hush"}, "FILE: postgresql.authentication.rewind.username: is missing, but other keys are there"),
    # wrong value
    ("name", "a/b", 'FILE: name: is "a/b"; allowed: text without slashes and spaces, unique in the cluster'),
    ("name", "__patroni_strict_sync_replica_placeholder__", 'FILE: name: is "__patroni_strict_sync_replica_placeholder__"; allowed: text without slashes and spaces, unique in the cluster'),
    ("restapi", "x", "FILE: restapi: is text; allowed: a table"),
    ("postgresql.data_dir", "data", 'FILE: postgresql.data_dir: is "data", a relative path; allowed: an absolute path'),
    ("postgresql.data_dir", "/", 'FILE: postgresql.data_dir: is "/"; allowed: a directory of its own'),
    ("postgresql.connect_address", "*", 'FILE: postgresql.connect_address: is "*", which is no address that others can reach; allowed: one host[:port]'),
    ("postgresql.authentication.superuser.password", 5, "FILE: postgresql.authentication.superuser.password: is a number, not text; allowed: text"),
    ("postgresql.authentication.superuser.sslmode", "maybe", 'FILE: postgresql.authentication.superuser.sslmode: is "maybe"; allowed: one of disable, allow, prefer'),
    ("restapi.request_queue_size", 5000, "FILE: restapi.request_queue_size: is 5000, above the maximum; allowed: a whole number from 0 to 4096"),
    ("restapi.verify_client", "required", "FILE: restapi.verify_client: is required, which needs certfile and cafile"),
    ("restapi.keyfile", "/k", "FILE: restapi.keyfile: is given without certfile; allowed: both or none"),
    ("restapi.keyfile_password", "hush", "FILE: restapi.keyfile_password: is given without certfile; allowed: both or none"),
    ("ctl.keyfile", "/k", "FILE: ctl.keyfile: is given without certfile; allowed: both or none"),
    ("ctl.keyfile_password", "hush", "FILE: ctl.keyfile_password: is given without certfile; allowed: both or none"),
    ("log.static_fields", {"app": "x", "level": "y"}, "FILE: log.static_fields: has level, which pgha sets itself; allowed: a table of texts; not time, level, event, traceback"),
    ("etcd3.cacert", "/ca", 'FILE: etcd3.cacert: is given, but protocol is http; allowed: protocol = "https"'),
    ("etcd3.host", "a", "FILE: etcd3.host: is given together with hosts; allowed: one of them"),
    ("etcd3", {"url": "http://me:hush@e:1"}, "FILE: etcd3.url: has credentials in it; they belong into username and password; allowed: http://host:port or https://host:port"),
    ("tags.nofailover", "perhaps", 'FILE: tags: has nofailover, which is "perhaps"; allowed: true or false for flags'),
    ("tags.when", __import__("datetime").date(2026, 1, 1), "FILE: tags: has a date for when, which has no place in JSON"),
    ("postgresql.parameters", {"a b": 1}, 'FILE: postgresql.parameters: has "a b", which is no parameter\'s name'),
    ("postgresql.parameters", {"work_mem": [1]}, "FILE: postgresql.parameters: has a list for work_mem"),
    ("postgresql.parameters.data_directory", "/x", "FILE: postgresql.parameters.data_directory: is set by pgha itself; allowed: postgresql.data_dir"),
    ("postgresql.recovery_conf", {"recovery_target_xid": "1"}, "FILE: postgresql.recovery_conf: has recovery_target_xid, which pgha sets itself"),
    ("bootstrap.initdb", [{"pgdata": "/x"}], "FILE: bootstrap.initdb: has pgdata, which pgha sets itself; allowed: long options of initdb"),
    ("pgha.state_dir", "/srv/pg/data/state", "FILE: pgha.state_dir: lies in postgresql.data_dir, from where a clone would copy it"),
    ("postgresql.authentication.superuser.password_file", "/nowhere", "FILE: postgresql.authentication.superuser.password: is given together with password_file; allowed: one of them"),
    ("postgresql.authentication.replication.sslpassword", "hush", "FILE: postgresql.authentication.replication.sslpassword: is not supported, since pg_basebackup, pg_rewind and the walreceiver cannot be given it secretly; allowed: an sslkey without a passphrase"),
    ("postgresql.authentication.rewind", {"username": "u", "sslpassword": "hush"}, "FILE: postgresql.authentication.rewind.sslpassword: is not supported, since"),
    ("postgresql.authentication.superuser.sslpassword", "hush", "FILE: postgresql.authentication.superuser.sslpassword: is given, but without a rewind user it is the superuser who rewinds, and pg_rewind cannot be given it secretly; allowed: rewind.username, or an sslkey"),
    *((f"restapi.{key}", {name: value}, f"FILE: restapi.{key}: has {why}; allowed: a table of headers") for key in ("http_extra_headers", "https_extra_headers")
      for name, value, why in (
          ("X-A", "hush\r\nX-Injected: 1", "a character in X-A that is no printable ASCII"), ("X-A", "caf\u00e9", "a character in X-A that is no printable ASCII"),
          ("Bad Name", "x", '"Bad Name", which is no header\'s name'), ("X:", "x", '"X:", which is no header\'s name'), ("", "x", '"", which is no header\'s name'),
          ("Content-Length", "5", "Content-Length, which pgha sets itself"), ("content-type", "x", "content-type, which pgha sets itself"),
          ("Connection", "close", "Connection, which pgha sets itself"), ("Transfer-Encoding", "chunked", "Transfer-Encoding, which pgha sets itself"),
          ("X-A", [1], "a list for X-A"))),
    # the cluster's, in bootstrap.dcs
    ("bootstrap.dcs.ttl", 2, "FILE: bootstrap.dcs.ttl: is 2 s, below the minimum; allowed: whole seconds from 3 s to 86400 s"),
    ("bootstrap.dcs", {"ttl": 5, "loop_wait": 2, "retry_timeout": 2}, "FILE: bootstrap.dcs.ttl: loop_wait + 2 x retry_timeout is 2 + 2 x 2 = 6 s, more than ttl 5 s; allowed: a larger ttl"),
    ("bootstrap.dcs.postgresql", {"parameters": {"max_connections": 5}}, "FILE: bootstrap.dcs.postgresql.parameters.max_connections: is 5, below the minimum; allowed: a whole number, at least 25"),
    ("bootstrap.dcs.postgresql", {"listen": "a"}, "FILE: bootstrap.dcs.postgresql.listen: is known only to the node itself; allowed: in the node's own file"),
    ("bootstrap.dcs", [1], "FILE: bootstrap.dcs: is a list, not a table"),
    # belongs elsewhere
    ("ttl", 30, "FILE: ttl: belongs to the whole cluster, not to this file; allowed: bootstrap.dcs before the first start, `pgha ctl edit-config` after it"),
    ("postgresql.use_slots", True, "FILE: postgresql.use_slots: belongs to the whole cluster"),
    ("thread_pool_size", 5, "FILE: thread_pool_size: has no meaning"),
    # later
    ("consul", {"host": "a"}, "FILE: consul: not supported yet by this version; allowed: etcd3"),
    ("etcd3.srv", "a", "FILE: etcd3.srv: not supported yet by this version; allowed: host, hosts or url"),
    ("postgresql.callbacks", {"on_begin": "x"}, "FILE: postgresql.callbacks.on_begin: unknown key; allowed: on_reload, on_restart, on_role_change, on_start, on_stop"),
    ("postgresql.callbacks", {"on_start": "/bin/vip 'a"}, "FILE: postgresql.callbacks.on_start: has a quote that is not closed; allowed: a command: a program and its arguments"),
    ("postgresql.callbacks", "x", "FILE: postgresql.callbacks: is text; allowed: a table"),
    ("postgresql.before_stop", "  ", "FILE: postgresql.before_stop: is empty; allowed: a command"),
    ("pgha.callback_timeout", 0, "FILE: pgha.callback_timeout: is 0 s, below the minimum"),
    ("postgresql.bin_name", {"pg_ctl": "x"}, "FILE: postgresql.bin_name: not supported yet by this version; allowed: leave it out"),
    ("postgresql.pre_promote", ["x"], "FILE: postgresql.pre_promote: is a list, not text; allowed: a command"),
    ("postgresql.create_replica_methods", ["walg", "basebackup"], 'FILE: postgresql.create_replica_methods: names "walg"; allowed: basebackup, and names that have a table with a command, here [postgresql.walg]'),
    ("postgresql.walg", {"comand": "/x"}, "FILE: postgresql.walg: unknown key"),
    ("postgresql.walg", {"command": ""}, "FILE: postgresql.walg: has a command that is empty; allowed: a table with command, and no_params"),
    ("postgresql.walg", {"command": "/x", "no_leader": "maybe"}, 'FILE: postgresql.walg: has no_leader, which is "maybe"; allowed: a table with command'),
    ("postgresql.walg", {"command": "/x", "env": ["a"]}, "FILE: postgresql.walg: has a list for env; allowed: a table with command"),
    ("postgresql.walg", {"command": "/x", "a=b": 1}, 'FILE: postgresql.walg: has "a=b", which is no argument'),
    ("bootstrap.dcs.postgresql.walg", {"command": 1}, "FILE: bootstrap.dcs.postgresql.walg: has a command that is a number, not text"),
    ("bootstrap.method", "walg", 'FILE: bootstrap.method: is "walg"; allowed: initdb, or a name that has a table with a command, here [bootstrap.walg]'),
    ("bootstrap.walg", {"command": "/x", "recovery_conf": {"recovery_target_action": "pause"}}, "FILE: bootstrap.walg: has a recovery_target_action that does not make a primary of it; allowed: promote"),
    ("bootstrap.walg", {"command": "/x", "recovery_conf": {"hot_standby": "on"}}, "FILE: bootstrap.walg: has hot_standby in recovery_conf, which pgha sets itself"),
    ("bootstrap.walg", {"command": "/x", "recovery_conf": 1}, "FILE: bootstrap.walg: has recovery_conf, which is a number, not a table"),
    ("name", "__patroni_strict_sync_replica_placeholder__", 'FILE: name: is "__patroni_strict_sync_replica_placeholder__"; allowed: text without slashes and spaces, unique in the cluster'),
    *((f"log.{key}", value, f"FILE: log.{key}: not supported yet by this version") for key, value in
      (("traceback_level", "DEBUG"), ("format", "%(message)s"), ("dateformat", "%H"))),
    *((f"log.{key}", value, f"FILE: log.{key}: is not supported, since pgha writes to standard error") for key, value in
      (("dir", "/var/log"), ("mode", "0600"), ("file_num", 4), ("file_size", 1))),
    ("log.deduplicate_heartbeat_logs", True, "FILE: log.deduplicate_heartbeat_logs: has no meaning"),
])
def test_is_refused(tmp_path, key, value, line):
    found = problems(tmp_path, changed(key, None if value is MISSING else value))
    assert [problem for problem in found if problem.startswith(line)], found
    assert len(found) == 1, found


def test_every_mistake_in_one_run(tmp_path):
    raw = changed("restapi.listn", "x", changed("scope", 5, changed("bootstrap.dcs.ttl", "soon", changed("etcd3.hosts", []))))
    assert problems(tmp_path, raw, {"PGHA_NANE": "n1"}) == [
        "environment: PGHA_NANE: unknown variable; did you mean PGHA_NAME?",
        "FILE: scope: is a number, not text; allowed: text without slashes and spaces",
        "FILE: restapi.listn: unknown key; did you mean listen?",
        'FILE: etcd3.hosts: is empty; allowed: a list of host:port (port 2379 if not given), as ["10.0.0.1:2379"]',
        'FILE: bootstrap.dcs.ttl: is "soon", not a number; allowed: whole seconds from 3 s to 86400 s, or with a unit (ms, s, min, h, d), as "30s"',
    ]


@pytest.mark.parametrize(("name", "content", "line"), [
    ("pgha.toml", b"scope = ", "is no valid TOML: Invalid value"),
    ("pgha.toml", b"scope = '\xff'", "is not UTF-8 (byte 9)"),
    ("pgha.toml", b"a = 1\na = 2\n", "is no valid TOML: Cannot overwrite a value"),
])
def test_unreadable_text(tmp_path, name, content, line):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load(tmp_path / name, {})
    assert [str(tmp_path / name) in p and line in p for p in caught.value.problems] == [True]


def test_missing_file_and_empty_directory(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere: cannot be read \(No such file or directory\); allowed: a TOML file, or a directory with \*.toml"):
        load(tmp_path / "nowhere", {})
    with pytest.raises(ConfigError, match=r"holds no \*.toml"):
        load(tmp_path, {})


def test_a_directory_is_laid_together_in_the_order_of_names(tmp_path):
    write(tmp_path / "10-base.toml", changed("postgresql.parameters", {"work_mem": "4MB", "jit": False}))
    write(tmp_path / "20-node.toml", {"name": "n2", "postgresql": {"parameters": {"work_mem": "8MB"}}})
    (tmp_path / "30-off.toml.bak").write_text("nonsense")
    local = load(tmp_path, {}).local
    assert local.name == "n2"
    assert local.postgresql.parameters == {"work_mem": "8MB", "jit": False}
    write(tmp_path / "40-bad.toml", {"postgresql": {"pg_ctl_timeout": "never"}, "restapi": {"listen": 1}})
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, {})
    assert [p.split(": ")[:2] for p in caught.value.problems] == [
        [str(tmp_path / "40-bad.toml"), "restapi.listen"], [str(tmp_path / "40-bad.toml"), "postgresql.pg_ctl_timeout"]]


def test_a_file_that_cannot_be_parsed_does_not_make_others_look_incomplete(tmp_path):
    write(tmp_path / "a.toml", {"scop": "demo"})
    (tmp_path / "b.toml").write_text("name =")
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, {})
    assert [p.partition(": ")[2].split(";")[0].split(":")[0] for p in caught.value.problems] == ["is no valid TOML", "scop"]


def test_passwords_come_from_files_too(tmp_path):
    secret = tmp_path / "superuser.password"
    secret.write_text("hush from file\n")
    secret.chmod(0o640)
    raw = changed("postgresql.authentication.superuser", {"username": "postgres", "password_file": str(secret)})
    assert loaded(tmp_path, raw).local.postgresql.authentication.superuser.password.reveal() == "hush from file"
    secret.chmod(0o644)
    assert loaded(tmp_path, raw).warnings == (
        f"{tmp_path}/pgha.toml: postgresql.authentication.superuser.password_file: {secret} is readable by everybody; allowed: chmod o= {secret}",)
    for content, what in ((b"", "is empty, or holds more than one line"), (b"a\nb\n", "is empty, or holds more"), (b"\xff", "is not UTF-8"), (b"x" * 5000, "holds more than one line")):
        secret.write_bytes(content)
        assert what in problems(tmp_path, raw)[0]
    secret.unlink()
    assert "cannot be read (No such file or directory)" in problems(tmp_path, raw)[0]


def test_a_file_with_passwords_that_everybody_may_read_is_warned_of(tmp_path):
    path = write(tmp_path / "pgha.toml", GOOD)
    path.chmod(0o644)
    (warning,) = load(path, {}).warnings
    assert warning.startswith(f"{path}: is readable by everybody (mode 0644) and holds restapi.authentication.password, postgresql.authentication.superuser.password,")
    write(path, {**GOOD, "restapi": {"listen": "a"}, "postgresql": {**GOOD["postgresql"], "authentication": {"replication": {"username": "r"}}}}).chmod(0o644)
    assert load(path, {}).warnings == ()


@pytest.mark.parametrize(("text", "passphrase"), [
    ("-----BEGIN ENCRYPTED PRIVATE KEY-----\nx\n", True), ("-----BEGIN RSA PRIVATE KEY-----\nProc-Type: 4,ENCRYPTED\nDEK-Info: x\n", True),
    ("-----BEGIN PRIVATE KEY-----\nx\n", False), ("", False),
])
def test_a_key_with_a_passphrase_that_nobody_gives_is_warned_of(tmp_path, text, passphrase):
    key = tmp_path / "key"
    key.write_text(text)
    key.chmod(0o600)
    for user in ("superuser", "replication"):
        raw = changed(f"postgresql.authentication.{user}.sslkey", str(key))
        said = f"{tmp_path}/pgha.toml: postgresql.authentication.{user}.sslkey: {key} has a passphrase, which nobody will give; allowed: a key without one"
        assert [warning.startswith(said) for warning in loaded(tmp_path, raw).warnings] == [True] * passphrase
    raw = changed("postgresql.authentication.superuser", {"sslkey": str(key), "sslpassword": PASSWORDS["sslpassword"]}, changed("postgresql.authentication.rewind.username", "r"))
    assert loaded(tmp_path, raw).warnings == ()
    key.unlink()
    assert loaded(tmp_path, raw).warnings == ()


def test_parameters_of_the_cluster_are_ignored_in_a_nodes_file_and_said_so(tmp_path):
    result = loaded(tmp_path, changed("postgresql.parameters", {"Max_Connections": 200, "shared_buffers": "1GB"}))
    (warning,) = result.warnings
    assert "postgresql.parameters.Max_Connections: is the same on all nodes, so it is ignored here; allowed: bootstrap.dcs.postgresql.parameters" in warning


def test_contradicting_tags_are_warned_of(tmp_path):
    (warning,) = loaded(tmp_path, changed("tags", {"nofailover": True, "failover_priority": 3})).warnings
    assert "tags.nofailover: contradicts failover_priority = 3, and wins" in warning


def test_ctl_needs_less(tmp_path):
    local = loaded(tmp_path, {"scope": "demo", "etcd3": {"host": "a"}}, purpose="ctl").local
    assert (local.prefix, local.etcd3.endpoints) == ("/service/demo/", ("http://a:2379",))
    with pytest.raises(ConfigError, match="restapi.lisen: unknown key"):
        loaded(tmp_path, {"etcd3": {"host": "a"}, "restapi": {"lisen": "b"}}, purpose="ctl")


def test_no_password_is_ever_shown(tmp_path):
    """Neither by a good configuration, nor by any mistake around a password."""
    everywhere = changed("etcd3", {"hosts": "a", "username": "u", "password": PASSWORDS["etcd"]}, changed(
        "ctl", {"authentication": {"username": "u", "password": PASSWORDS["ctl"]}, "certfile": "/c", "keyfile_password": PASSWORDS["keyfile"]}, changed(
            "postgresql.authentication.rewind", {"username": "u", "password": PASSWORDS["rewind"]}, changed(
                "postgresql.authentication.superuser.sslpassword", PASSWORDS["sslpassword"]))))
    result = loaded(tmp_path, everywhere)
    texts = [repr(result), str(result), repr(result.local.postgresql)]
    for key, password in (("restapi.authentication", PASSWORDS["rest"]), ("postgresql.authentication.superuser", PASSWORDS["superuser"])):
        for wrong in (password, [password], {"passwrd": password}, {"password": [password]}, {"password": {"x": password}}, {"password": password + "\n"},
                      {"username": [password], "password": password}, {"password": password, "password_file": "/nowhere"}):
            texts += problems(tmp_path, changed(key, wrong))
    for hosts in (f"u:{PASSWORDS['etcd']}@h:2379", [f"http://u:{PASSWORDS['etcd']}@h:2379"]):
        texts += problems(tmp_path, changed("etcd3.hosts", hosts))
    texts += problems(tmp_path, GOOD, {"PGHA_SUPERUSER_PASWORD": PASSWORDS["superuser"], "PGHA_POSTGRESQL_AUTHENTICATION_SUPERUSER": PASSWORDS["superuser"],
                                       "PGHA_TAGS": PASSWORDS["superuser"]})
    for text in texts:
        for password in PASSWORDS.values():
            assert password not in text


def test_the_references_own_configuration_is_good(tmp_path):
    """patroni.yml as recorded from a live cluster, written as the bench writes it, loads without error or warning."""
    if not SHARED.is_dir():
        pytest.skip("the recorded files are not on this machine")
    spec = importlib.util.spec_from_file_location("failover_bench", SHARED / "bench/failover_bench.py")
    bench = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bench)
    raw = json.loads((SHARED / "golden/files.json").read_text())["files"]["n1/patroni.yml"]
    raw = json.loads(raw) if isinstance(raw, str) else raw
    path = tmp_path / "n1.toml"
    path.write_text(bench.to_toml(raw))
    path.chmod(0o600)
    result = load(path, {})
    assert result.warnings == ()
    assert result.local.bootstrap.dcs == raw["bootstrap"]["dcs"]
    assert result.local.bootstrap.initdb == (("encoding", "UTF8"), ("locale", "C"), ("data-checksums", None))
    assert result.local.namespace == "service"


def test_what_a_reload_cannot_change_is_named(tmp_path):
    before = loaded(tmp_path, GOOD).local
    after = loaded(tmp_path, changed("name", "n2", changed("postgresql.data_dir", "/elsewhere", changed("log.level", "DEBUG")))).local
    assert needs_new_agent(before, after) == ("name", "postgresql.data_dir")
    assert needs_new_agent(before, before) == ()
