from __future__ import annotations

from types import SimpleNamespace

import pytest
import trio

from pgha.model.gucs import Guc, parse_quantity, same_value
from pgha.postgres.gucs import FILES_SQL, SETTINGS_SQL, FileEntry, file_entries, running_settings, settings_argument
from pgha.postgres.parameters import CONTROLLED, overridden, pending_restart, prepare

FORCED = {"listen_addresses": "*", "port": "5432", "cluster_name": "demo"}


@pytest.mark.parametrize(("a", "b", "vartype", "unit", "same"), [
    ("64MB", "8192", "integer", "8kB", True),
    ("64MB", "8191", "integer", "8kB", False),
    ("1GB", "1024", "integer", "MB", True),
    ("0.5GB", "512", "integer", "MB", True),
    ("5min", "300", "integer", "s", True),
    ("1h", "60min", "integer", "ms", True),
    ("500us", "0.5", "real", "ms", True),
    ("0x10", "16", "integer", None, True),
    # numbers that cannot be computed with are none, however they came past the check
    ("1e999999999GB", "8192", "integer", "8kB", False),
    ("1e999999999999999999GB", "8192", "integer", "8kB", False),
    ("1e-999999999kB", "0", "integer", "8kB", False),
    ("1e9999", "1e9998", "real", None, False),
    ("1e9999TB", "8192", "integer", "8kB", False),
    ("0x" + "f" * 1_000_000, "1", "integer", None, False),
    ("9" * 100_000, "1", "real", None, False),
    ("\u0663", "3", "integer", None, False),       # digits, but not PostgreSQL's
    ("64MB", "64", "integer", "s", False),
    ("64 MB", "64MB", "integer", "kB", True),
    ("64mb", "64MB", "integer", "kB", False),      # PostgreSQL's units are case-sensitive
    ("on", "true", "bool", None, True),
    ("yes", "1", "bool", None, True),
    ("on", "off", "bool", None, False),
    ("o", "on", "bool", None, False),              # ambiguous
    ("REPLICA", "replica", "enum", None, True),
    ("a", "A", "string", None, False),
    ("1e3", "1000", "real", None, True),
    ("nonsense", "1", "integer", None, False),
])
def test_same_value(a, b, vartype, unit, same):
    assert same_value(a, b, vartype=vartype, unit=unit) is same


def test_quantity_that_is_none():
    assert parse_quantity("", "kB") is None
    assert parse_quantity("12 parsecs", "kB") is None
    assert parse_quantity("1e999999999999999999999", None) is None or True


def test_controlled_settings_have_defaults_minima_and_validation():
    p = prepare({}, forced=FORCED)
    assert p.command_line == FORCED | {name: rule.default for name, rule in CONTROLLED.items()}
    assert p.file["wal_keep_size"] == "128MB"
    assert p.notes == ()
    p = prepare({"max_connections": 10, "wal_level": "minimal", "hot_standby": "off", "max_wal_senders": "many",
                 "port": 1, "wal_keep_size": "1MB", "track_commit_timestamp": True, "data_directory": "/x",
                 "Max_Worker_Processes": 12, "work_mem": None}, forced=FORCED)
    assert p.command_line["max_connections"] == "100"
    assert p.command_line["wal_level"] == "replica"
    assert p.command_line["hot_standby"] == "on"
    assert p.command_line["max_wal_senders"] == "10"
    assert p.command_line["port"] == "5432"
    assert p.command_line["track_commit_timestamp"] == "on"
    assert p.command_line["max_worker_processes"] == "12"
    assert p.file["wal_keep_size"] == "128MB"
    assert "data_directory" not in p.file
    assert "work_mem" not in p.file
    assert len(p.notes) == 6
    assert p.file.items() >= p.command_line.items()


def test_a_standby_has_at_least_what_its_primary_had():
    control = SimpleNamespace(max_connections=200, max_prepared_transactions=0, max_locks_per_transaction=64,
                              max_worker_processes=8, max_wal_senders=10)
    p = prepare({"max_connections": 50}, forced=FORCED, control=control)
    assert p.command_line["max_connections"] == "200"
    assert p.raised == {"max_connections": ("50", "200")}
    p = prepare({"max_connections": 50}, forced=FORCED)
    assert p.command_line["max_connections"] == "50"


@pytest.mark.parametrize(("value", "said"), [(60, "60"), (60.0, "60"), (" 60 ", "60"), ("0x3c", "60"), ("24", "100"), ("60.5", "100"), ("sixty", "100"), (10**10, "100"), (True, "100"),
                                              ("1e999999999", "100"), ("0e999999999", "100"), ("1e9999", "100"), ("0x" + "f" * 1_000_000, "100")])
def test_numbers_are_said_as_postgresql_takes_them(value, said):
    assert prepare({"max_connections": value}, forced=FORCED).command_line["max_connections"] == said


def test_wal_keep_segments_is_translated():
    assert prepare({"wal_keep_segments": 8}, forced=FORCED).file["wal_keep_size"] == "128MB"
    assert "wal_keep_segments" not in prepare({"wal_keep_segments": 8}, forced=FORCED).file


def setting(name, value, **more):
    return Guc(**({"name": name, "value": value, "vartype": "integer", "context": "postmaster",
                              "pending": False, "shown": value} | more))


def test_pending_restart_as_golden():
    running = {s.name: s for s in (
        setting("max_connections", "60"), setting("max_wal_senders", "10"),
        setting("shared_buffers", "8192", unit="8kB", shown="64MB"), setting("work_mem", "4096", context="user", unit="kB"),
        setting("shared_preload_libraries", "", vartype="string", pending=True))}
    wanted = {"max_connections": "123", "max_wal_senders": "10", "shared_buffers": "64MB", "work_mem": "5MB"}
    assert pending_restart(wanted, running) == {"max_connections": ("60", "123"), "shared_preload_libraries": ("", "?")}
    assert pending_restart(wanted | {"shared_buffers": "128MB"}, running)["shared_buffers"] == ("64MB", "128MB")


OURS = "/data/postgresql.conf"
AUTO = "/data/postgresql.auto.conf"


def entry(value, file=AUTO):
    return FileEntry(value=value, file=file, line=3)


@pytest.mark.parametrize(("wanted", "running", "files", "pending"), [
    # ALTER SYSTEM of what nobody has configured: the file tells the value
    ({}, [setting("shared_preload_libraries", "", vartype="string", pending=True)], {"shared_preload_libraries": entry("auto_explain")},
     {"shared_preload_libraries": ("", "auto_explain")}),
    # … and taken back: PostgreSQL 15 goes on to say that it is pending
    ({}, [setting("shared_preload_libraries", "", vartype="string", pending=True)], {"port": entry("5432")}, {}),
    ({}, [setting("shared_preload_libraries", "auto_explain", vartype="string", pending=True)], {"port": entry("5432")}, {"shared_preload_libraries": ("auto_explain", "")}),
    # … which wins over our file, at the restart and after it
    ({"max_files_per_process": "1000"}, [setting("max_files_per_process", "1000", pending=True)], {"max_files_per_process": entry("2000")},
     {"max_files_per_process": ("1000", "2000")}),
    ({"max_files_per_process": "1000"}, [setting("max_files_per_process", "2000")], {"max_files_per_process": entry("2000")}, {}),
    # … but not over the command line
    ({"max_connections": "60"}, [setting("max_connections", "60")], {"max_connections": entry("99")}, {}),
    ({"max_connections": "70"}, [setting("max_connections", "60")], {"max_connections": entry("60")}, {"max_connections": ("60", "70")}),
    # what stands in our own file, written by an older configuration, says nothing
    ({"max_files_per_process": "2000"}, [setting("max_files_per_process", "1000")], {"max_files_per_process": entry("1000", OURS)},
     {"max_files_per_process": ("1000", "2000")}),
    # pending by PostgreSQL's own word, and nobody knows why
    ({"max_files_per_process": "1000"}, [setting("max_files_per_process", "1000", pending=True)], {}, {"max_files_per_process": ("1000", "?")}),
    ({}, [setting("max_files_per_process", "1000", pending=True)], {}, {"max_files_per_process": ("1000", "?")}),
    # a reload is enough
    ({"work_mem": "8MB"}, [setting("work_mem", "4096", unit="kB", context="user")], {"work_mem": entry("1MB")}, {}),
])
def test_changes_behind_the_agents_back(wanted, running, files, pending):
    assert pending_restart(wanted, {s.name: s for s in running}, files) == pending


def test_what_alter_system_says_otherwise_is_told():
    running = {s.name: s for s in (setting("max_connections", "60"), setting("work_mem", "1024", unit="kB", context="user"), setting("port", "5432"))}
    said = overridden({"max_connections": "60", "work_mem": "8MB", "port": "5432"}, running,
                      {"max_connections": entry("99"), "work_mem": entry("1MB"), "port": entry("5432")})
    assert said == {
        "max_connections": "ALTER SYSTEM has set it to 99, without effect, since pgha sets it at the start; allowed: the cluster's configuration, and ALTER SYSTEM RESET max_connections",
        "work_mem": "ALTER SYSTEM has set it to 1MB, which wins over the configuration's 8MB on this member; allowed: ALTER SYSTEM RESET work_mem"}
    assert overridden({"work_mem": "1024kB"}, running, {"work_mem": entry("1MB")}) == {}


@pytest.mark.parametrize("name", ["archive_command", "ssl_passphrase_command", "primary_conninfo", "wal_level", "some.extension"])
def test_no_value_that_may_be_a_secret_is_told(name):
    """Anybody who may send a change is told, and the journal."""
    running = {name: setting(name, "running-secret", vartype="string", pending=True)}
    said = overridden({name: "configured-secret"}, running, {name: entry("file-secret")})
    assert "secret" not in said[name], said
    if name.startswith(("archive", "ssl", "primary")):
        assert pending_restart({}, running, {name: entry("file-secret")}) == {name: ("***", "***")}
        assert pending_restart({name: "other-secret"}, running) == {name: ("***", "***")}


@pytest.mark.postgres
def test_what_a_real_server_has_pending(make_node):
    async def main():
        a = make_node()
        postmaster = await a.start(max_connections="60")
        await a.sql("alter system set shared_preload_libraries = 'auto_explain'")
        await a.sql("alter system set max_locks_per_transaction = 128")
        a.server.reload(postmaster)
        conn = await a.connect()
        wanted = {"max_connections": "123", "shared_buffers": "8MB", "DateStyle": "ISO", "wal_level": "replica"}
        with trio.fail_after(5):
            while True:
                rows = await conn.query(SETTINGS_SQL, settings_argument(wanted), deadline_s=5)
                files = file_entries(await conn.query(FILES_SQL, deadline_s=5))
                pending = pending_restart(wanted, running_settings(rows), files)
                if "shared_preload_libraries" in pending:
                    break
                await trio.sleep(0.01)
        assert pending == {"max_connections": ("60", "123"), "shared_preload_libraries": ("", "auto_explain")}
        assert overridden({"max_locks_per_transaction": "64"}, running_settings(rows), files).keys() == {"max_locks_per_transaction"}
        conn.close()
    trio.run(main)
