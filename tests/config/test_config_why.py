"""Which layer a value comes from, what lies under it, on which line of a file; never a secret."""

from __future__ import annotations

import random

import pytest

from pgha.config.load import load
from pgha.config.places import line_of
from pgha.config.why import UnknownKey, why

FILE = """\
# This node.
scope = "demo"
name = "n1"
[etcd3]
hosts = ["10.0.0.1:2379"]
[restapi]
listen = "10.0.0.1:8008"

[restapi.authentication]
username = "op"
password = "geheim"
[bootstrap.dcs]
ttl = 30
[postgresql]
# where clients come
listen = "10.0.0.1:5432"
data_dir = "/x"
use_pg_rewind = false
pg_hba = [
  "local all all trust",
  "host all all 10.0.0.0/8 md5",
]
authentication.superuser = {username = "postgres", password = "geheim"}
authentication.replication.username = "rep"
authentication.replication.password = "geheim"
[postgresql.parameters]
work_mem = "8MB"
"pg_stat_statements.max" = 500
max_connections = 5
primary_conninfo = "host=x password=geheim"
archive_command = "KEY=geheim wal-g wal-push %p"
restore_command = "KEY=geheim wal-g wal-fetch %f"
[postgresql.recovery_conf]
archive_cleanup_command = "KEY=geheim clean"
[tags]
nofailover = true
zone = "north"
"""
STORE = {"ttl": 5, "loop_wait": 10, "master_start_timeout": 60, "postgresql": {"use_pg_rewind": True, "parameters": {
    "work_mem": "4MB", "maintenance_work_mem": "9MB", "max_connections": 200, "port": 1, "wal_level": "logicall", "archive_command": "true", "ssl_passphrase_command": "cat /key", "wal_log_hints": "on"}}}
ENVIRONMENT = {"PGHA_LOG_LEVEL": "DEBUG", "PGHA_SUPERUSER_PASSWORD": "geheim"}


@pytest.fixture
def loaded(tmp_path):
    file = tmp_path / "pgha.toml"
    file.write_text(FILE)
    return load(file, ENVIRONMENT)


def asked(loaded, key, dynamic=None):
    return why(key, local=loaded.local, sources=loaded.sources, dynamic=STORE if dynamic is None else dynamic, defaults={"max_connections": "100", "wal_level": "replica"})


@pytest.mark.parametrize(("key", "value", "layers", "note"), [
    ("ttl", 5, "store default", "used instead: loop_wait 1 s, retry_timeout 2 s"),
    ("loop_wait", 1, "store default", "used instead: loop_wait 1 s"),
    ("retry_timeout", 2, "default", "used instead: loop_wait 1 s"),
    ("primary_start_timeout", 60, "store default", ""),
    ("synchronous_mode", "off", "default", ""),
    ("postgresql.use_pg_rewind", False, "file store default", ""),
    ("postgresql.use_slots", True, "default", ""),
    ("postgresql.pg_hba", ["local all all trust", "host all all 10.0.0.0/8 md5"], "file", ""),
    ("postgresql.parameters.work_mem", "8MB", "file store", ""),
    ("postgresql.parameters.WORK_MEM", "8MB", "file store", ""),
    ("postgresql.parameters.maintenance_work_mem", "9MB", "store", ""),
    ("postgresql.parameters.pg_stat_statements.max", 500, "file", ""),
    ("postgresql.parameters.max_connections", 200, "store default", "sets it, too, which is ignored"),
    ("postgresql.parameters.wal_level", "replica", "default", "logicall"),
    ("postgresql.parameters.port", None, "pgha", "pgha sets it itself"),
    ("postgresql.parameters.shared_buffers", None, "default", "PostgreSQL's own default counts"),
    # a command of the file's own may hold a secret; what the store says, GET /config answers anyway
    ("postgresql.parameters.archive_command", "***", "file store", ""),
    ("postgresql.parameters.ssl_passphrase_command", "cat /key", "store", ""),
    ("postgresql.recovery_conf.archive_cleanup_command", "***", "file", ""),
    ("log.level", "DEBUG", "environment default", ""),
    ("restapi.listen", "10.0.0.1:8008", "file", ""),
    ("restapi.connect_address", "10.0.0.1:8008", "default", "it follows from other keys"),
    ("restapi.authentication.username", "op", "file", ""),
    ("restapi.authentication.password", "***", "file", ""),
    ("postgresql.authentication.superuser.password", "***", "environment", ""),
    ("postgresql.authentication.replication.password", "***", "file", ""),
    ("tags.nofailover", True, "file", ""), ("tags.zone", "north", "file", ""),
    ("pgha.compaction", True, "default", ""), ("pgha.guard", "agent", "default", ""),
    ("scope", "demo", "file", ""), ("namespace", "service", "default", ""),
])
def test_which_layer_counts(loaded, key, value, layers, note):
    found = asked(loaded, key)
    assert found.value == value
    assert [layer.layer for layer in found.layers] == layers.split()
    assert any(note in line for line in found.notes) if note else not [n for n in found.notes if "bootstrap.dcs" not in n and "command line" not in n]
    assert "geheim" not in repr(found)


def test_what_the_cluster_was_made_with_counted_once(loaded, tmp_path):
    assert f"bootstrap.dcs in {tmp_path}/pgha.toml says 30: that counted once, when the cluster was made" in asked(loaded, "ttl").notes


@pytest.mark.parametrize(("key", "said"), [
    ("tll", "tll: unknown key; did you mean ttl?"), ("postgresql.use_slot", "did you mean postgresql.use_slots?"), ("postgresql.paramters.work_mem", "unknown key"),
    ("postgresql", "postgresql is a table; allowed: one of its keys, postgresql.… with authentication, "), ("xyzzyqq", "xyzzyqq: unknown key"), ("", "is no key"), ("a..b", "is no key"),
    ("ttl.x", "ttl.x: unknown key"), ("zone", "unknown key"),
])
def test_an_unknown_key_and_the_nearest(loaded, key, said):
    with pytest.raises(UnknownKey, match=said.replace("?", r"\?").replace(".", r"\.")):
        asked(loaded, key)


@pytest.mark.parametrize("dynamic", [[], "x", {"postgresql": 5}, {"postgresql": {"parameters": []}}, {"ttl": {}}, {"postgresql": {"parameters": {"work_mem": None}}}])
def test_nonsense_in_the_store_is_survived(loaded, dynamic):
    for key in ("ttl", "postgresql.parameters.work_mem", "postgresql.use_slots", "postgresql.parameters", "slots"):
        asked(loaded, key, dynamic)


def test_secrets_are_found_nowhere(loaded):
    for key in ("postgresql.parameters.primary_conninfo", "postgresql.parameters.archive_command", "postgresql.parameters.restore_command", "postgresql.parameters", "postgresql.recovery_conf",
                "postgresql.recovery_conf.archive_cleanup_command", "bootstrap.dcs", "etcd3.password", "ctl.authentication.password"):
        assert "geheim" not in repr(asked(loaded, key))


@pytest.mark.parametrize(("path", "line"), [
    ("scope", 2), ("etcd3", 4), ("etcd3.hosts", 5), ("restapi.listen", 7), ("restapi.authentication.password", 11), ("postgresql.listen", 16), ("postgresql.pg_hba", 19),
    ("postgresql.authentication.superuser.username", 23), ("postgresql.authentication.replication.password", 25), ("postgresql.parameters.work_mem", 27),
    ("postgresql.parameters", 26), ("tags.zone", 37), ("tags.nothing", 0), ("nothing", 0),
])
def test_the_line_of_a_key(path, line):
    assert line_of(FILE, tuple(path.split("."))) == line


def test_lines_of_what_is_no_toml_or_odd():
    assert line_of("a = [", ("a",)) == 0
    assert line_of("", ("a",)) == 0
    assert line_of('x = """\n[a]\nb = 1\n"""\n[a]\nb = 2\n', ("a", "b")) == 6
    assert line_of("a.b.c = 1\n\n\n# x\na.b.d = 2", ("a", "b", "d")) == 5
    rng = random.Random(3)
    for _ in range(50):
        names = [f"k{n}" for n in range(rng.randint(1, 30))]
        text, lines = "", {}
        for name in names:
            text += "\n" * rng.randint(0, 2) + "# c\n" * rng.randint(0, 1)
            lines[name] = text.count("\n") + 1
            text += rng.choice([f"{name} = 1\n", f"{name} = [\n1,\n2\n]\n", f'{name} = """\nk0 = 1\n"""\n'])
        for name in names:
            assert line_of(text, (name,)) == lines[name], (text, name)
