"""`pgha config import`: nothing is left out without a line, the result passes the check, and no password is shown."""

from __future__ import annotations

import copy
import datetime as dt
import os
import random
import stat
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import tomli_w
import yaml
from patroni_samples import ALL, GROWN, HUSH, OLD, SUPPORTED

from pgha.__main__ import DONE, REFUSED, USAGE, main
from pgha.config import gucs
from pgha.config.check import check
from pgha.config.cluster import ClusterConfig
from pgha.config.convert import DROPPED, PARAMETER_DEFAULTS, Fate, convert
from pgha.config.load import load
from pgha.config.local import LocalConfig
from pgha.config.patroni_file import PatroniFile, parse, read_patroni, variable_path
from pgha.config.programs import ReplicaMethod
from pgha.config.schema import every_key
from pgha.errors import ConfigError


def keys(value, *path):
    """What a reader of the YAML would call its keys, in dots. (Not the code's own function, on purpose.)"""
    if not isinstance(value, dict) or not value:
        return [".".join(path)]
    return [key for name, inner in value.items() for key in keys(inner, *path, name)]


def converted(raw):
    return convert(PatroniFile(raw=copy.deepcopy(raw), variables={}, replaced={}, unknown=()))


def fates(text):
    """Key → its line without the key."""
    return {line.key: str(line).replace(f" {line.key}", "").split(" → ")[0].split(":")[0].strip() for line in converted(yaml.safe_load(text)).lines}


def line(text, key):
    """The one line about a key."""
    (found,) = [str(line) for line in converted(yaml.safe_load(text)).lines if line.key == key]
    return " ".join(found.split())


class Run:
    """One run of the command, and all that can be seen of it."""

    def __init__(self, capfd, tmp_path, text, *options):
        self.target = tmp_path / "pgha.toml"
        source = tmp_path / "patroni.yml"
        source.write_text(text)
        self.code = main(["config", "import", str(source), "--output", str(self.target), *options])
        self.out, self.err = capfd.readouterr()


# --- whole files -----------------------------------------------------------------------------------------------------

def test_a_file_that_is_supported_whole(capfd, tmp_path):
    run = Run(capfd, tmp_path, SUPPORTED)
    assert (run.code, run.err) == (DONE, "")
    assert "0 changed, 0 dropped, 0 missing" in run.out
    assert stat.S_IMODE(run.target.stat().st_mode) == 0o600
    assert tomllib.loads(run.target.read_text()) == yaml.safe_load(SUPPORTED)
    assert check(run.target, {})[0] == 0
    local = load(run.target, {}).local
    assert local.postgresql.authentication.replication.password.reveal() == "hush-replication 'quoted'"
    assert local.restapi.authentication.password.reveal() == "hush-rest: #1"
    assert (local.tags.noloadbalance, local.tags.clonefrom, local.tags.replicatefrom, local.tags.raw["rack"]) == (True, True, "pg2", 7)


@pytest.mark.parametrize("name", ALL)
def test_every_key_is_mentioned_exactly_once(name):
    raw = yaml.safe_load(ALL[name])
    assert sorted(line.key for line in converted(raw).lines) == sorted(keys(raw))


def test_a_file_that_has_grown(capfd, tmp_path):
    run = Run(capfd, tmp_path, GROWN)
    assert run.code == REFUSED
    assert not run.target.exists()
    got = fates(GROWN)
    missing = {key for key, fate in got.items() if fate == "missing"}
    supported = {".".join(path) for path, _, _ in every_key(LocalConfig)} | {"bootstrap.pgbackrest", "postgresql.pgbackrest"}
    assert missing == {key for key in keys(yaml.safe_load(GROWN)) if key not in supported and key.startswith((
        "log.dir", "log.file_", "log.format", "bootstrap.dcs.slots.debezium", "postgresql.bin_name"))}
    for key in missing:
        assert f"missing  {key}: " in run.out
        assert key in run.err     # named again, where it cannot be overlooked
    assert {key for key, fate in got.items() if fate == "dropped"} == {
        "log.deduplicate_heartbeat_logs", "log.loggers.patroni.postmaster", "bootstrap.dcs.postgresql.parameters.listen_addresses",
        "bootstrap.dcs.postgresql.recovery_conf.recovery_target_timeline", "postgresql.use_unix_socket_repl", "postgresql.parameters.max_connections",
        "watchdog.driver", "tags.replicatefrom", "postgresql.callbacks.on_stop"}
    assert {key for key, fate in got.items() if fate == "changed"} == {"bootstrap.dcs.master_start_timeout", "bootstrap.dcs.slots.barman", "postgresql.parameters.log_line_prefix"}


def test_what_is_missing_can_be_accepted(capfd, tmp_path):
    run = Run(capfd, tmp_path, GROWN, "--accept-missing")
    assert run.code == DONE
    text = run.target.read_text()
    for key, fate in fates(GROWN).items():
        if fate == "missing":
            assert key in run.err
            assert f"#   {key}: " in text   # whoever reads the file later sees it, too
    assert check(run.target, {})[0] == 0
    local = load(run.target, {}).local
    assert local.postgresql.create_replica_methods == ("pgbackrest", "basebackup")
    assert local.postgresql.methods == {"pgbackrest": ReplicaMethod(command="/usr/bin/pgbackrest --stanza=orders restore --type=none", keep_data=True, no_params=True, no_leader=True)}
    assert local.bootstrap.method == "pgbackrest" and local.bootstrap.methods["pgbackrest"].keep_existing_recovery_conf
    assert local.postgresql.callbacks.on_start == "/etc/patroni/vip.sh"
    assert local.postgresql.parameters == {"work_mem": "64MB", "log_line_prefix": "%m [%p]"}
    assert local.restapi.http_extra_headers == {"X-Cluster": "orders"}
    assert local.postgresql.pg_hba == ("local all all peer", "hostssl all all 192.168.7.0/24 scram-sha-256")
    assert local.bootstrap.dcs["primary_start_timeout"] == 300
    assert local.bootstrap.dcs["slots"] == {"barman": {"type": "physical"}, "warehouse": {"type": "physical", "cluster_type": "primary"}}
    assert local.bootstrap.dcs["ignore_slots"] == [{"name": "by_hand", "type": "logical"}]
    assert local.watchdog.mode == "off"


def test_an_old_file(capfd, tmp_path):
    run = Run(capfd, tmp_path, OLD, "--accept-missing")
    assert run.code == USAGE                        # its data directory is a relative path, which nothing can be put for
    assert not run.target.exists()
    assert f"{run.target}: postgresql.data_dir: is missing" in run.err
    run = Run(capfd, tmp_path, OLD.replace("data/pg0", "/data/pg0"), "--accept-missing")
    assert run.code == DONE
    assert check(run.target, {})[0] == 0
    assert "etcd's v2 API" in run.out
    local = load(run.target, {}).local
    assert local.etcd3.endpoints == ("http://127.0.0.1:2379",)
    assert local.postgresql.authentication.replication.password.reveal() == "20190101"
    assert {key: local.bootstrap.dcs[key] for key in ("ttl", "loop_wait", "retry_timeout")} == {"ttl": 20, "loop_wait": 1, "retry_timeout": 9}
    assert local.bootstrap.dcs["postgresql"]["parameters"] == {"wal_level": "replica", "max_connections": 100, "max_replication_slots": 10}
    assert local.bootstrap.pg_hba[0].startswith("host replication")
    for key in ("thread_pool_size", "bootstrap.users.admin.password", "bootstrap.users.admin.options", "etcd.cacert", "postgresql.parameters.port", "ttl"):
        assert f"dropped  {key}: " in run.out


@pytest.mark.parametrize("options", [[], ["--accept-missing"], ["--accept-missing", "--dry-run"], ["--accept-missing", "--force"]], ids=" ".join)
@pytest.mark.parametrize("name", ALL)
def test_no_password_is_shown(capfd, tmp_path, name, options):
    run = Run(capfd, tmp_path, ALL[name], *options)
    assert HUSH not in run.out + run.err
    assert "20190101" not in run.out + run.err
    if run.target.exists():
        comments = [text for text in run.target.read_text().splitlines() if text.startswith("#")]
        assert HUSH not in "".join(comments)


# --- one key ---------------------------------------------------------------------------------------------------------

def test_methods():
    """A method's table has a name of the operator's own: it is known by its command."""
    def lines(at, table):
        raw = changed(at, table)
        raw["postgresql"]["create_replica_methods"] = ["walg"]
        return {line.key.removeprefix(f"{at}."): str(line).split(":")[0].split()[0] for line in converted(raw).lines if line.key.startswith(f"{at}.")}

    assert lines("postgresql.walg", {"command": "/x", "no_leader": 1, "level": 3, "env": None}) == {"command": "carried", "no_leader": "carried", "level": "carried", "env": "dropped"}
    assert lines("postgresql.walg", {"command": "/x 'hush-1", "level": 3}) == {"command": "missing", "level": "missing"}
    assert lines("postgresql.walg", {"envdir": "/x"}) == {"envdir": "missing"}      # there the name is the command; here it is said
    assert lines("postgresql.other", {"threshold": "/x"}) == {"threshold": "missing"}
    assert lines("bootstrap.dcs.postgresql.walg", {"command": "/x"}) == {"command": "carried"}
    assert lines("bootstrap.walg", {"command": "/x", "recovery_conf": {"recovery_target_time": "2026-01-01"}}) == {"command": "carried", "recovery_conf.recovery_target_time": "carried"}
    assert lines("bootstrap.walg", {"command": "/x", "recovery_conf": {"recovery_target_action": "pause"}}) == {"command": "missing", "recovery_conf.recovery_target_action": "missing"}


LOADED = {text: yaml.safe_load(text) for text in ALL.values()}


def changed(path, value, base=SUPPORTED):
    """The keys of `base` with one set."""
    raw = copy.deepcopy(LOADED.get(base) or yaml.safe_load(base))
    table = raw
    *parents, last = path.split(".")
    for part in parents:
        table = table.setdefault(part, {})
    table[last] = value
    return raw


def at(path, value, base=SUPPORTED):
    return yaml.safe_dump(changed(path, value, base))


KEYS = [
    # key, its value, its line
    ("scope", 12, "changed scope: a number to YAML, perhaps not as it was typed (0123 is 83); Patroni, too, takes the number's digits for the text"),
    ("postgresql.authentication.rewind.password", 12, "changed postgresql.authentication.rewind.password: a number to YAML, perhaps not as it was typed (0123 is 83); Patroni, too, takes the number's digits for the text"),
    ("postgresql.authentication.rewind.password", True, "missing postgresql.authentication.rewind.password: is a boolean, not text; allowed: text"),
    ("postgresql.authentication.rewind.password", "hush-a\n", "missing postgresql.authentication.rewind.password: contains a line break or a NUL; allowed: text"),
    ("postgresql.authentication.superuser.sslpassword", "hush-1", "carried postgresql.authentication.superuser.sslpassword"),
    ("postgresql.authentication.replication.sslpassword", "hush-1", ("missing postgresql.authentication.replication.sslpassword: is not supported, since pg_basebackup, pg_rewind and the walreceiver "
     "cannot be given it secretly; allowed: an sslkey without a passphrase that only the agent's user can read")),
    ("postgresql.authentication.rewind.sslpassword", "hush-1", None),
    ("restapi.http_extra_headers.X-A", "1", "carried restapi.http_extra_headers.X-A"),
    ("restapi.http_extra_headers", {"Content-Length": "hush-1"}, None),
    ("restapi.https_extra_headers", {"X-A": "hush-1\r\nX-B: 2"}, None),
    ("postgresql.krbsrvname", None, "dropped postgresql.krbsrvname: is empty"),
    ("postgresql.callbacks", {}, "carried postgresql.callbacks"),
    ("postgresql.callbacks.on_start", None, "dropped postgresql.callbacks.on_start: is empty"),
    ("postgresql.callbacks.on_stop", "/x --password 'hush-1 2", "missing postgresql.callbacks.on_stop: has a quote that is not closed; allowed: a command: a program and its arguments"),
    ("postgresql.before_stop", "/x y", "carried postgresql.before_stop"),
    ("postgresql.create_replica_methods", [], "missing postgresql.create_replica_methods: names no method; allowed: a list of basebackup and names of tables beside it that have a command, in the order in which they are tried"),
    ("postgresql.create_replica_methods", ["walg", "basebackup"], "missing postgresql.create_replica_methods: names a method (number 1) that has no table with a command in it; allowed: names of such tables, and what pgha itself can"),
    ("bootstrap.method", "walg", "missing bootstrap.method: names a method that has no table with a command in it; allowed: names of such tables, and what pgha itself can"),
    ("bootstrap.method", "initdb", "carried bootstrap.method"),
    ("bootstrap.dcs.postgresql.create_replica_methods", ["basebackup"], "carried bootstrap.dcs.postgresql.create_replica_methods"),
    ("postgresql.custom_conf", "/x", "carried postgresql.custom_conf"),
    ("postgresql.use_unix_socket_repl", False, "dropped postgresql.use_unix_socket_repl: off is what pgha does"),
    ("postgresql.use_unix_socket_repl", True, "missing postgresql.use_unix_socket_repl: not supported yet by this version"),
    ("postgresql.data_dirr", "/x", "missing postgresql.data_dirr: unknown key; did you mean data_dir?"),
    ("postgresql.use_slots", True, "dropped postgresql.use_slots: Patroni reads it only from the cluster's configuration, and so does pgha"),
    ("postgresql.parameters.data_directory", "/x", "dropped postgresql.parameters.data_directory: pgha sets it itself"),
    ("postgresql.parameters.work_mem", dt.date(2026, 1, 1), "missing postgresql.parameters.work_mem: is a date to YAML; put it into quotes; allowed: a table of PostgreSQL's parameters"),
    ("synchronous_mode", True, "dropped synchronous_mode: Patroni reads it only from the cluster's configuration, and so does pgha"),
    ("member_slots_ttl", 1, "dropped member_slots_ttl: Patroni reads it only from the cluster's configuration, and so does pgha"),
    ("citus.group", 0, "missing citus.group: not supported yet by this version"),
    ("consul.token", "hush-consul", "missing consul.token: not supported yet by this version; allowed: etcd3"),
    ("etcd.hosts", "a,b", "missing etcd.hosts: etcd3 is given, too; allowed: the one that is used"),
    ("etcd3.srv", "example.org", "missing etcd3.srv: not supported yet by this version; allowed: host, hosts or url"),
    ("etcd3.use_proxies", "off", "dropped etcd3.use_proxies: off is what pgha does"),
    ("etcd3.url", "https://u:hush-url@h:1", "missing etcd3.url: is given together with hosts; allowed: one of them"),
    ("bootstrap.dcs.ttl", 10, "changed bootstrap.dcs.ttl → 20: "),
    ("bootstrap.dcs.ttl", "30", "changed bootstrap.dcs.ttl → 30: as Patroni takes it (plain seconds)"),
    ("bootstrap.dcs.ttl", "40s", "missing bootstrap.dcs.ttl: is no whole number of seconds, so that Patroni takes neither the timings nor postgresql of this table; allowed: a number"),
    ("bootstrap.dcs.loop_wait", "${HUSH}", "missing bootstrap.dcs.loop_wait: is no whole number of seconds, so that Patroni takes neither the timings nor postgresql of this table; allowed: a number"),
    ("bootstrap.dcs.loop_wait", 0, "changed bootstrap.dcs.loop_wait → 1: "),
    ("bootstrap.dcs.maximum_lag_on_failover", "16MB", "changed bootstrap.dcs.maximum_lag_on_failover → 1048576: has a unit, with which Patroni takes its default instead"),
    ("bootstrap.dcs.master_stop_timeout", "30s", "changed bootstrap.dcs.master_stop_timeout → bootstrap.dcs.primary_stop_timeout = 0: has a unit, with which Patroni takes its default instead; its present name"),
    ("bootstrap.dcs.primary_start_timeout", "600", "carried bootstrap.dcs.primary_start_timeout"),
    ("bootstrap.dcs.member_slots_ttl", "30min", "carried bootstrap.dcs.member_slots_ttl"),
    ("bootstrap.dcs.postgresql.use_pg_rewind", "off", "changed bootstrap.dcs.postgresql.use_pg_rewind → true: is text, which Patroni takes for true whatever it says"),
    ("bootstrap.dcs.postgresql.use_slots", "off", "carried bootstrap.dcs.postgresql.use_slots"),
    ("tags.nofailover", "false", "changed tags.nofailover → true: is text, which Patroni takes for true whatever it says"),
    ("tags.nofailover", "true", "carried tags.nofailover"),
    ("tags.noloadbalance", False, "carried tags.noloadbalance"),
    ("tags.nostream", "false", "carried tags.nostream"),
    ("bootstrap.dcs.postgresql.parameters.wal_level", "LOGICAL", "carried bootstrap.dcs.postgresql.parameters.wal_level"),
    ("bootstrap.dcs.postgresql.create_replica_methods", ["wal_g"], "missing bootstrap.dcs.postgresql.create_replica_methods: names a method (number 1) that has no table with a command in it; allowed: names of such tables, and what pgha itself can"),
    ("etcd3.host", "a", "dropped etcd3.host: is given together with hosts, which Patroni takes in its place"),
    ("restapi.listen", ":8008", 'changed restapi.listen → "*:8008": no host is every address'),
    ("postgresql.listen", ":5432", 'missing postgresql.listen: is "…", in which "…" is no host; allowed: '),
    ("postgresql.listen", "*, ::1:5432", 'changed postgresql.listen → "*,[::1]:5432": an IPv6 address stands in brackets'),
    ("postgresql.connect_address", "fd00::7:5432", 'changed postgresql.connect_address → "[fd00::7]:5432": an IPv6 address stands in brackets'),
    ("postgresql.name", "hush-1", "dropped postgresql.name: name is given at the top, which Patroni takes in its place"),
    ("etcd3.hosts", ["${HUSH}:2379"], 'missing etcd3.hosts: is "…", in which "…" is no host; allowed: a list of host:port (port 2379 if not given), as ["10.0.0.1:2379"]'),
    ("etcd3.hosts", ["http://hush:2379"], 'missing etcd3.hosts: is "…", a URL; allowed: a list of host:port (port 2379 if not given), as ["10.0.0.1:2379"]'),
    ("etcd3.protocol", 'hush "quoted" \\" hush', 'missing etcd3.protocol: is "…"; allowed: one of http, https'),
    ("postgresql.callbacks.on_start", "", "dropped postgresql.callbacks.on_start: is empty"),
    ("postgresql.bin_dir", "", "dropped postgresql.bin_dir: is empty"),
    ("log.dateformat", "", "dropped log.dateformat: is empty"),
    ("log.level", "warn", 'changed log.level → "WARNING": the same level'),
    ("log.loggers.urllib3", "FATAL", 'changed log.loggers.urllib3 → "CRITICAL": the same level'),
    ("bootstrap.dcs.standby_cluster", {"host": "h"}, None),
    ("bootstrap.dcs.slots", {}, "carried bootstrap.dcs.slots"),
    ("bootstrap.dcs.slots.a", None, "changed bootstrap.dcs.slots.a → a table: an empty slot is a physical one"),
    ("bootstrap.dcs.slots.a.type", "physical", "carried bootstrap.dcs.slots.a.type"),
    ("bootstrap.dcs.slots.a.type", "hush", 'missing bootstrap.dcs.slots.a.type: has type "…"; allowed: physical or logical'),
    ("bootstrap.dcs.slots.A-b", None, "missing bootstrap.dcs.slots.A-b: is no slot's name; allowed: 1 to 63 of a-z, 0-9 and _"),
    ("bootstrap.dcs.permanent_slots.a.cluster_type", "standby", "carried bootstrap.dcs.permanent_slots.a.cluster_type → bootstrap.dcs.slots.a.cluster_type"),
    ("bootstrap.dcs.ignore_slots", [{"name": "a", "type": "logical"}], "carried bootstrap.dcs.ignore_slots"),
    ("bootstrap.dcs.ignore_slots", [{"nme": "a"}], 'missing bootstrap.dcs.ignore_slots: has an entry that has "…", which is unknown; did you mean name?'),
    ("bootstrap.dcs.postgresql.authentication", {"superuser": {"password": "hush-x"}}, None),
    ("bootstrap.dcs.postgresql.parameters.wal_level", "minimal", 'changed bootstrap.dcs.postgresql.parameters.wal_level → "replica": is "…"; allowed: replica or logical; Patroni uses this instead'),
    ("bootstrap.dcs.retry_timout", 1, "missing bootstrap.dcs.retry_timout: unknown key; did you mean retry_timeout?"),
    ("bootstrap.initdb", [{"pwfile": "/x"}], None),
    ("watchdog.mode", False, "carried watchdog.mode"),
    ("tags.weights", [1], None),
    ("etcd3.protocol", "hush-misplaced", 'missing etcd3.protocol: is "…"; allowed: one of http, https'),
    ("postgresql.listen", "a:b:hush", None),
    ("postgresql.bin_dir", "hush-misplaced/x", 'missing postgresql.bin_dir: is "…", a relative path; allowed: an absolute path'),
    ("postgresql.parameters.restore_command", "KEY=hush-key wal-g wal-fetch\n", "changed postgresql.parameters.restore_command: without the line's end"),
    ("restapi", 5, "missing restapi: is a number; allowed: a table"),
]


@pytest.mark.parametrize(("path", "value", "expected"), KEYS, ids=[f"{path}={value}" for path, value, _ in KEYS])
def test_one_key(path, value, expected):
    text = at(path, value)
    if expected is None:
        got = fates(text)
        assert {got[key] for key in keys(value, path)} <= {"missing", "dropped"}
    else:
        assert line(text, path).startswith(expected)
        if not expected.endswith(" "):
            assert line(text, path) == expected


def test_the_node_s_and_the_cluster_s_tables_of_methods_are_one():
    raw = changed("bootstrap.dcs.postgresql.pgbackrest", {"command": "/x"})
    raw["postgresql"]["create_replica_methods"] = ["pgbackrest", "basebackup"]
    result = converted(raw)
    assert "carried  postgresql.create_replica_methods" in [str(line) for line in result.lines]
    load("-", {"PGHA_CONFIGURATION": tomli_w.dumps(result.raw)})


def test_a_name_beside_postgresql_s_own_keys():
    raw = changed("postgresql.name", "n7")
    del raw["name"]
    result = converted(raw)
    assert (result.raw["name"], [str(line) for line in result.lines if line.key == "postgresql.name"]) == ("n7", ["carried  postgresql.name → name"])


def test_of_hosts_and_host_the_one_counts_that_patroni_takes():
    raw = changed("etcd3", {"host": "10.0.0.9:2379", "hosts": "10.0.0.1,10.0.0.2"})
    assert converted(raw).raw["etcd3"] == {"hosts": "10.0.0.1,10.0.0.2"}


def test_the_sslpassword_of_a_superuser_who_rewinds():
    raw = changed("postgresql.authentication.rewind", {})
    (found,) = [line for line in converted(raw).lines if line.key == "postgresql.authentication.superuser.sslpassword"]
    assert found.fate is Fate.MISSING and found.why.startswith("is given, but without a rewind user it is the superuser who rewinds")
    assert "hush" not in str(found)


def test_cluster_wide_keys_that_patroni_ignores_are_no_slots():
    """Slots at the wrong place may have worked in some version: nobody is to lose them by a line that says dropped."""
    assert {("slots",), ("permanent_slots",), ("permanent_replication_slots",), ("ignore_slots",), ("pause",)}.isdisjoint(DROPPED)
    assert {("ttl",), ("failsafe_mode",), ("standby_cluster",)} <= DROPPED.keys()
    assert fates(at("slots", {"a": None}))["slots.a"] == "missing"


def test_every_parameter_that_is_controlled_has_patronis_default():
    assert PARAMETER_DEFAULTS.keys() == {*gucs.MINIMUM, *gucs.OTHERS}
    assert [gucs.problem(name, value) for name, value in PARAMETER_DEFAULTS.items() if gucs.problem(name, value)] == []


@pytest.mark.parametrize(("key", "value", "needs"), [
    ("etcd3.cacert", "/ca", {"protocol": "http"}), ("etcd3.cert", "/c", {"protocol": None}), ("restapi.keyfile", "/k", {}), ("restapi.keyfile_password", "hush-1", {}), ("ctl.keyfile", "/k", {}), ("ctl.keyfile_password", "hush-1", {}), ("restapi.verify_client", "required", {}),
])
def test_what_had_no_effect_there_is_dropped(key, value, needs):
    raw = changed(key, value)
    raw["etcd3"].update(needs)
    (found,) = [line for line in converted(raw).lines if line.key == key]
    assert (found.fate, found.why.partition("without")[0]) == (Fate.DROPPED, "has no effect ")


def test_two_names_of_one_key():
    text = at("bootstrap.dcs.primary_start_timeout", 100, at("bootstrap.dcs.master_start_timeout", 300))
    got = fates(text)
    assert sorted((got["bootstrap.dcs.primary_start_timeout"], got["bootstrap.dcs.master_start_timeout"])) == ["changed", "missing"]


ODD = [0, -1, 1, 10**18, 1.5, float("nan"), float("inf"), True, False, "", " ", "on", "1e9", "::1", "*", "a,b", "\x1b[31m", "ä", "a\nb", "a\n", "\udcff", "x" * 10_000, "/", None,
       [], [[]], [{}], [None], ["a", 1], {}, {"a": 1}, {"a": None}, {"": {}}, {"a\nb": {"c": []}}, {"\x1b": 1}, dt.date(2026, 1, 1), b"bytes"]
EVERY = sorted({
    *(".".join(path) for path, _, _ in every_key(LocalConfig)),
    *(".".join(("bootstrap", "dcs", *path)) for path, _, _ in every_key(ClusterConfig)),
    *(".".join(path) for path in DROPPED), *LocalConfig.REFUSED,
    "etcd.hosts", "etcd.srv", "postgresql.callbacks", "postgresql.parameters.max_connections", "bootstrap.dcs.postgresql.parameters.max_connections", "nonsense", "postgresql", "bootstrap.dcs",
    "postgresql.authentication", "bootstrap.dcs.slots.a", "tags.x", "log.loggers.x", "postgresql.create_replica_method", "bootstrap.pgbackrest",
})


#: What only several keys together, or this machine's files, have wrong: the command says so, and writes nothing.
BETWEEN_KEYS = (" is missing", "etcd3.protocol: ", "is given, but protocol is http", "etcd3.key: is given without cert", 'data_dir: is "/"', "_file: / cannot be read")


@pytest.mark.parametrize("path", EVERY)
def test_any_value_under_any_key(path):
    """Each key once, no secret, one printable line each, and what comes out is a configuration but for what is missing in it."""
    for value in ODD:
        raw = changed(path, value)
        result = converted(raw)
        assert sum(len(keys(value, "")) for value in raw.values()) == len(result.lines)
        said = [str(line) for line in result.lines]
        assert all(line.isprintable() for line in said), said
        assert HUSH not in "".join(said)
        try:
            load("-", {"PGHA_CONFIGURATION": tomli_w.dumps(result.raw)})
        except ConfigError as error:
            odd = [problem for problem in error.problems if not any(text in problem for text in BETWEEN_KEYS)]
            assert not odd, (value, odd)


# --- YAML ------------------------------------------------------------------------------------------------------------

def test_yaml_means_what_it_means_to_patroni():
    raw = parse(b"a: off\nb: 0700\nc: &x {d: 1, e: 2}\nf: {<<: *x, e: 3}\ng: |\n  two\n  lines\nh: >-\n  one\n  line\n", "x")
    assert raw == {"a": False, "b": 448, "c": {"d": 1, "e": 2}, "f": {"d": 1, "e": 3}, "g": "two\nlines\n", "h": "one line"}


def test_an_alias_may_be_used_twice():
    assert parse(b"a: &x {b: &y {c: 1}, <<: {d: 2}}\ne: *x\nf: *x\ng: [*y, *y]\n", "x") == {
        "a": {"b": {"c": 1}, "d": 2}, "e": {"b": {"c": 1}, "d": 2}, "f": {"b": {"c": 1}, "d": 2}, "g": [{"c": 1}, {"c": 1}]}


BAD = [
    (b"a: 1\nb: {c: 2}\na: 3\n", "x: line 3: gives a key again that line 1 has"),
    (b"tags:\n  on: 1\n", "x: line 2: has a key that is no text"),
    (b"1: a\n", "x: line 1: has a key that is no text"),
    (b"? [a]\n: b\n", "x: line 1: has a key that is no text"),
    (b"a: *hush-alias\n", "x: line 1, column 4: is no valid YAML"),
    (b"a: !hush-tag b\n", "x: line 1, column 4: is no valid YAML"),
    (b"a: !!python/object/apply:os.system ['hush-']\n", "x: "),
    (b"a: !!set {hush-}\n", "x: line 1: has a tag that Patroni's files do not have"),
    (b"password: %hush-\n", "x: line 1, column 11: is no valid YAML"),
    (b"password: hush-: a\n", "x: line 1, column 16: is no valid YAML"),
    (b"a: 'hush-\n", "x: line 2, column 1: is no valid YAML"),
    (b"a: 1\n---\nb: 2\n", "x: line 2, column 1: is no valid YAML"),
    (b"a: 2026-99-99\n", "x: line 1: is no value that YAML knows"),
    (b"a: !!bool hush-\n", "x: line 1: is no value that YAML knows"),
    (b"a: !!int ''\n", "x: line 1: is no value that YAML knows"),
    (b"a: !!timestamp hush-\n", "x: line 1: is no value that YAML knows"),
    (b"a: !!binary \xc3\xa4\n", "x: line 1, column 4: is no valid YAML"),
    (b"a: %s\n" % (b"9" * 5000), "x: line 1: is no value that YAML knows"),
    (b"- hush-\n", "x: is no table"),
    (b"hush-", "x: is no table"),
    (b"a: \x01hush-", "x: holds a character that YAML does not allow"),
    (b"\xff", "x: is not UTF-8 (byte 0)"),
    (b"[" * 5000, "x: is nested too deeply"),
    (b"{a: " * 40, "x: "),
    (b"a: &a [*a]\n", "x: line 1: is nested too deeply, or its aliases unfold to too much"),
    (b"a: &a [1,1,1,1,1,1,1,1,1,1]\n" + b"".join(b"%c: &%c [%s]\n" % (n, n, b",".join([b"*%c" % (n - 1)] * 10)) for n in range(98, 106)), "x: line "),
]


@pytest.mark.parametrize(("content", "expected"), BAD, ids=[content[:20].decode("latin-1") for content, _ in BAD])
def test_bad_yaml_is_named_by_its_place_and_never_shown(content, expected):
    with pytest.raises(ConfigError) as caught:
        parse(content, "x")
    (problem,) = caught.value.problems
    assert problem.startswith(expected)
    assert HUSH not in problem
    assert problem.isprintable()


def test_damaged_files_are_read_or_refused_and_never_shown():
    """Pieces of a file cut out, doubled, exchanged for what YAML has a meaning for."""
    chance = random.Random(4)
    for _ in range(150):
        text = chance.choice(list(ALL.values()))
        for _ in range(chance.randint(1, 4)):
            start = chance.randrange(len(text))
            end = min(len(text), start + chance.choice((1, 3, 30)))
            text = text[:start] + chance.choice(("", text[start:end] * 2, "*", "&x ", "!", "\n", "- ", "{", "}", ": ", "'", '"', "\t", "#", "<<: ", "? ", "%", "|", "---\n", "\x00")) + text[end:]
        try:
            result = converted(parse(text.encode(), "x"))
        except ConfigError as error:
            said = str(error)
        else:
            tomli_w.dumps(result.raw)
            # What lost its place may have become a key, and keys are named.
            said = "" if any(HUSH in line.key for line in result.lines) else "".join(map(str, result.lines))
        assert HUSH not in said, text


def test_a_directory(tmp_path):
    (tmp_path / "20.yml").write_text("postgresql: {listen: 'b:1'}\nname: b\n")
    (tmp_path / "10.yaml").write_text("postgresql: {listen: 'a:1', data_dir: /d}\nscope: a\n")
    (tmp_path / "README").write_text("[")
    assert read_patroni(tmp_path, {}).raw == {"postgresql": {"listen": "b:1", "data_dir": "/d"}, "scope": "a", "name": "b"}
    (tmp_path / "empty").mkdir()
    for where in (tmp_path / "empty", tmp_path / "none.yml"):
        with pytest.raises(ConfigError):
            read_patroni(where, {})


# --- PATRONI_… -------------------------------------------------------------------------------------------------------

ENVIRONMENT = {
    "PATRONI_SCOPE": "orders", "PATRONI_NAME": "n1", "PATRONI_RESTAPI_LISTEN": "0.0.0.0:8008", "PATRONI_RESTAPI_CONNECT_ADDRESS": "10.0.0.1:8008",
    "PATRONI_RESTAPI_USERNAME": "admin", "PATRONI_RESTAPI_PASSWORD": "hush-rest", "PATRONI_RESTAPI_ALLOWLIST": "10.0.0.0/8, 127.0.0.1",
    "PATRONI_ETCD3_HOSTS": "'10.0.0.1:2379','10.0.0.2:2379'", "PATRONI_LOG_LOGGERS": "urllib3: DEBUG, etcd: INFO", "PATRONI_POSTGRESQL_LISTEN": "0.0.0.0:5432",
    "PATRONI_POSTGRESQL_CONNECT_ADDRESS": "10.0.0.1:5432", "PATRONI_POSTGRESQL_DATA_DIR": "/data", "PATRONI_REPLICATION_USERNAME": "replicator",
    "PATRONI_REPLICATION_PASSWORD": "hush-replication", "PATRONI_SUPERUSER_PASSWORD": "hush-superuser", "PATRONI_SUPERUSER_SSLMODE": "require", "PGHA_SCOPE": "not meant", "HOME": "/",
}


def test_variables_alone(tmp_path, monkeypatch, capfd):
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    run = Run(capfd, tmp_path, "")
    assert (run.code, run.err) == (DONE, "")
    assert HUSH not in run.out
    for name in ENVIRONMENT:
        assert run.out.count(f"({name})") == (0 if not name.startswith("PATRONI_") else 2 if name == "PATRONI_LOG_LOGGERS" else 1)
    assert "carried  postgresql.authentication.replication.password (PATRONI_REPLICATION_PASSWORD)\n" in run.out
    local = load(run.target, {}).local
    assert (local.scope, local.etcd3.endpoints) == ("orders", ("http://10.0.0.1:2379", "http://10.0.0.2:2379"))
    assert local.log.loggers == {"urllib3": "DEBUG", "etcd": "INFO"}
    assert local.restapi.allowlist == ("10.0.0.0/8", "127.0.0.1")
    assert local.postgresql.authentication.superuser.password.reveal() == "hush-superuser"


def test_an_empty_variable_says_what_it_says_to_patroni():
    """Nothing; but of a store's keys it takes away what stands in the file, and its line says so."""
    file = read_patroni_text("scope: a\npostgresql: {authentication: {superuser: {password: hush-1}}}\netcd3: {host: h, protocol: https, cacert: /ca, password: hush-2}\n",
                             PATRONI_SCOPE="", PATRONI_SUPERUSER_PASSWORD="", PATRONI_ETCD3_CACERT="", PATRONI_ETCD3_PASSWORD="", PATRONI_NAEM="")
    assert file.raw == {"scope": "a", "postgresql": {"authentication": {"superuser": {"password": "hush-1"}}},
                        "etcd3": {"host": "h", "protocol": "https", "cacert": "", "password": "hush-2"}}
    assert file.unknown == ()
    assert "dropped  etcd3.cacert (PATRONI_ETCD3_CACERT): is empty" in [str(line) for line in convert(file).lines]


def test_variables_win_over_the_file():
    file = read_patroni_text("scope: a\nlog: {loggers: {x: INFO, y: INFO}}\nrestapi: 5\netcd3: {hosts: {a: 1}}\n",
                             PATRONI_SCOPE="b", PATRONI_LOG_LOGGERS="{y: DEBUG}", PATRONI_RESTAPI_LISTEN="a:1", PATRONI_ETCD3_HOSTS="h:1", PATRONI_NAEM="x")
    assert file.raw == {"scope": "b", "log": {"loggers": {"x": "INFO", "y": "DEBUG"}}, "restapi": {"listen": "a:1"}, "etcd3": {"hosts": ["h:1"]}}
    said = [" ".join(str(line).split()) for line in convert(file).lines]
    assert said.count("carried scope (PATRONI_SCOPE)") == 1
    assert "carried log.loggers.x" in said
    assert "carried log.loggers.y (PATRONI_LOG_LOGGERS)" in said
    assert "dropped restapi: PATRONI_RESTAPI_LISTEN replaces what stands in the file" in said
    assert "dropped etcd3.hosts.a: PATRONI_ETCD3_HOSTS replaces what stands in the file" in said
    assert "missing PATRONI_NAEM: no variable that is known" in said


def read_patroni_text(text, **environ):
    """A file's text by the variable that stands for it, with others laid over it."""
    return read_patroni(None, {"PATRONI_CONFIGURATION": text, **environ})


@pytest.mark.parametrize("name", ["PATRONI_RESTAPI_ALLOWLIST", "PATRONI_LOG_LOGGERS", "PATRONI_ETCD3_HOSTS"])
@pytest.mark.parametrize("text", ["[hush-", "{hush-", "]hush-", "*hush-"])
def test_an_unreadable_variable_is_named_and_not_shown(name, text):
    with pytest.raises(ConfigError) as caught:
        read_patroni_text("", **{name: text})
    assert name in str(caught.value)
    assert HUSH not in str(caught.value)


def test_file_and_variable_with_a_whole_configuration(tmp_path):
    (tmp_path / "patroni.yml").write_text("scope: a")
    with pytest.raises(ConfigError, match="one of them"):
        read_patroni(tmp_path / "patroni.yml", {"PATRONI_CONFIGURATION": "scope: b"})
    with pytest.raises(ConfigError, match="no file is given"):
        read_patroni(None, {})


def test_where_variables_belong():
    assert variable_path("PATRONI_ETCD3_USE_PROXIES") == ("etcd3", "use_proxies")
    assert variable_path("PATRONI_ETCD_HOST") == ("etcd", "host")
    assert variable_path("PATRONI_POSTGRESQL_BIN_DIR") == ("postgresql", "bin_dir")
    assert variable_path("PATRONI_POSTGRESQL_BIN_PG_CTL") == ("postgresql", "bin_name", "pg_ctl")
    assert variable_path("PATRONI_REWIND_SSLCRLDIR") == ("postgresql", "authentication", "rewind", "sslcrldir")
    assert variable_path("PATRONI_POSTGRESQL_LISTN") is None


# --- writing ---------------------------------------------------------------------------------------------------------

def test_a_file_that_is_there_is_kept(capfd, tmp_path):
    (tmp_path / "pgha.toml").write_text("mine")
    run = Run(capfd, tmp_path, SUPPORTED)
    assert run.code == REFUSED
    assert "is there already" in run.err
    assert run.target.read_text() == "mine"
    run.target.chmod(0o644)
    run = Run(capfd, tmp_path, SUPPORTED, "--force")
    assert run.code == DONE
    assert stat.S_IMODE(run.target.stat().st_mode) == 0o600
    assert sorted(path.name for path in tmp_path.iterdir()) == ["patroni.yml", "pgha.toml"]


def test_a_dangling_link_is_not_written_through(capfd, tmp_path):
    (tmp_path / "pgha.toml").symlink_to(tmp_path / "elsewhere")
    assert Run(capfd, tmp_path, SUPPORTED).code == REFUSED
    assert not (tmp_path / "elsewhere").exists()


def test_a_dry_run_writes_nothing(capfd, tmp_path):
    run = Run(capfd, tmp_path, SUPPORTED, "--dry-run")
    assert (run.code, run.target.exists()) == (DONE, False)
    assert "not written, as asked" in run.out
    assert Run(capfd, tmp_path, GROWN, "--dry-run").code == REFUSED


def test_a_place_that_cannot_be_written(capfd, tmp_path):
    (tmp_path / "patroni.yml").write_text(SUPPORTED)
    assert main(["config", "import", str(tmp_path / "patroni.yml"), "-o", str(tmp_path / "none/pgha.toml")]) == USAGE
    assert "cannot be written (No such file or directory)" in capfd.readouterr().err


def test_another_store_cannot_be_accepted_away(capfd, tmp_path):
    run = Run(capfd, tmp_path, SUPPORTED.replace("etcd3:", "consul:"), "--accept-missing")
    assert (run.code, run.target.exists()) == (USAGE, False)
    assert "etcd3: is missing" in run.err


def test_standard_output_is_no_place_for_passwords(capfd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "patroni.yml").write_text(SUPPORTED)
    assert main(["config", "import", "patroni.yml", "-o", "-"]) == USAGE
    assert HUSH not in "".join(capfd.readouterr())
    assert not (tmp_path / "-").exists()
    assert main(["config", "import", "patroni.yml"]) == DONE
    assert (tmp_path / "pgha.toml").exists()


def test_without_pyyaml_it_says_what_to_install(tmp_path):
    (tmp_path / "patroni.yml").write_text(SUPPORTED)
    script = "import sys; sys.modules['yaml'] = None\nfrom pgha.__main__ import main\nsys.exit(main(['config', 'import', *sys.argv[1:]]))"
    done = subprocess.run([sys.executable, "-B", "-c", script, str(tmp_path / "patroni.yml"), "-o", str(tmp_path / "pgha.toml")],
                          capture_output=True, text=True, cwd=Path(__file__).parents[2], timeout=30)
    assert (done.returncode, done.stdout) == (USAGE, "")
    assert "pip install" in done.stderr
    assert "Traceback" not in done.stderr


def test_pgha_variables_have_no_say(capfd, tmp_path, monkeypatch):
    monkeypatch.setenv("PGHA_SCOPE", "elsewhere")
    monkeypatch.setenv("PGHA_CONFIGURATION", "scope = 1")
    run = Run(capfd, tmp_path, SUPPORTED)
    assert run.code == DONE
    assert load(run.target, {}).local.scope == "billing"
    assert os.environ["PGHA_SCOPE"] == "elsewhere"


def test_fates_are_counted():
    counts = [len(converted(yaml.safe_load(GROWN)).of(fate)) for fate in Fate]
    assert sum(counts) == len(keys(yaml.safe_load(GROWN)))
    assert all(counts)
