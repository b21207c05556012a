from __future__ import annotations

from types import SimpleNamespace

import pytest
import trio

from pgha.postgres.parameters import (
    CONTROLLED,
    SETTINGS_SQL,
    RunningSetting,
    exists_in,
    needs_restart,
    parse_quantity,
    pending_restart,
    prepare,
    running_settings,
    same_value,
    settings_argument,
)

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
    p = prepare({}, forced=FORCED, major_version=15)
    assert p.command_line == FORCED | {name: rule.default for name, rule in CONTROLLED.items()}
    assert p.file["wal_keep_size"] == "128MB"
    assert p.notes == ()
    p = prepare({"max_connections": 10, "wal_level": "minimal", "hot_standby": "off", "max_wal_senders": "many",
                 "port": 1, "wal_keep_size": "1MB", "track_commit_timestamp": True, "data_directory": "/x",
                 "Max_Worker_Processes": 12, "work_mem": None}, forced=FORCED, major_version=15)
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
    p = prepare({"max_connections": 50}, forced=FORCED, major_version=15, control=control, standby=True)
    assert p.command_line["max_connections"] == "200"
    assert p.raised == {"max_connections": ("50", "200")}
    p = prepare({"max_connections": 50}, forced=FORCED, major_version=15, control=control)
    assert p.command_line["max_connections"] == "50"


def test_versions():
    assert prepare({"wal_keep_segments": 8}, forced=FORCED, major_version=15).file["wal_keep_size"] == "128MB"
    assert not exists_in("summarize_wal", 16)
    assert exists_in("summarize_wal", 17)
    assert exists_in("timescaledb.license", 13)
    dropped = prepare({"promote_trigger_file": "x", "io_method": "worker"}, forced=FORCED, major_version=16)
    assert {"promote_trigger_file", "io_method"}.isdisjoint(dropped.file)
    assert needs_restart("restore_command", "", 13)
    assert not needs_restart("restore_command", "", 14)
    assert not needs_restart("primary_conninfo", "", 13)
    assert needs_restart("max_connections", "", 15)
    assert needs_restart("anything", "postmaster", 15)


def setting(name, value, **more):
    return RunningSetting(**({"name": name, "value": value, "unit": None, "vartype": "integer", "context": "postmaster",
                              "pending": False, "shown": value} | more))


def test_pending_restart_as_golden():
    running = {s.name: s for s in (
        setting("max_connections", "60"), setting("max_wal_senders", "10"),
        setting("shared_buffers", "8192", unit="8kB", shown="64MB"), setting("work_mem", "4096", context="user", unit="kB"),
        setting("shared_preload_libraries", "", vartype="string", pending=True))}
    wanted = {"max_connections": "123", "max_wal_senders": "10", "shared_buffers": "64MB", "work_mem": "5MB"}
    assert pending_restart(wanted, running) == {"max_connections": ("60", "123"), "shared_preload_libraries": ("", "?")}
    assert pending_restart(wanted | {"shared_buffers": "128MB"}, running)["shared_buffers"] == ("64MB", "128MB")


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
                pending = pending_restart(wanted, running_settings(rows))
                if "shared_preload_libraries" in pending:
                    break
                await trio.sleep(0.01)
        assert pending == {"max_connections": ("60", "123"), "shared_preload_libraries": ("", "?"),
                           "max_locks_per_transaction": ("64", "?")}
        conn.close()
    trio.run(main)
