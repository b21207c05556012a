"""What PostgreSQL says of its parameters is understood, and what it would refuse is found before it is written."""

from __future__ import annotations

from functools import partial

import pytest
import trio

from pgha.config.check import check
from pgha.postgres.gucs import (
    SETTINGS_SQL,
    described,
    parse_described,
    refused,
    refused_here,
    running_settings,
    settings_argument,
    told,
)

SAID = """\
2026-11-26 05:18:25.546 GMT [10461] LOG:  skipping missing configuration file "/x/postgresql.auto.conf"
2026-11-26 05:18:25.546 GMT [10461] LOG:  invalid value for parameter "work_mem": "12foo"
2026-11-26 05:18:25.546 GMT [10461] HINT:  Valid units for this parameter are "B", "kB", "MB", "GB", and "TB".
2026-11-26 05:18:25.546 GMT [10461] LOG:  9999999 is outside the valid range for parameter "max_connections" (1 .. 262143)
LOG:  invalid value for parameter "TimeZone": "Mars"
2026-11-26 05:18:25.546 GMT [10461] FATAL:  configuration file "/x/postgresql.conf" contains errors
"""


def test_messages_are_understood():
    assert told(SAID, {"work_mem": "", "max_connections": "", "timezone": "", "other": ""}) == {
        "work_mem": 'invalid value for parameter "work_mem": "12foo" (Valid units for this parameter are "B", "kB", "MB", "GB", and "TB")',
        "max_connections": '9999999 is outside the valid range for parameter "max_connections" (1 .. 262143)',
        "timezone": 'invalid value for parameter "TimeZone": "Mars"'}
    assert told('LOG:  unrecognized configuration parameter "x" in file "/x/postgresql.conf" line 4\nHINT: x', {"x": ""}) == {"x": 'unrecognized configuration parameter "x"'}
    assert told("nonsense\nHINT:  x\n", {"x": ""}) == {}


def test_lines_of_describe_config():
    gucs = parse_described("DateStyle\tuser\tgroup\tSTRING\tISO, MDY\t\t\tSets.\t\nwork_mem\tuser\tg\tINTEGER\t0\t64\t2147483647\tSets\tMore\nnonsense\n")
    assert (gucs["datestyle"].name, gucs["datestyle"].vartype) == ("DateStyle", "string")
    assert (gucs["work_mem"].minimum, gucs["work_mem"].maximum, gucs["work_mem"].context) == ("64", "2147483647", "user")
    assert len(gucs) == 2


@pytest.mark.postgres
def test_the_program_and_the_server_tell_the_same(make_node):
    async def main():
        a = make_node()
        await a.start()
        conn = await a.connect()
        server = running_settings(await conn.query(SETTINGS_SQL, settings_argument(()), deadline_s=5))
        conn.close()
        program = await described(a.server.bin_dir, deadline_s=5)
        assert len(program) > 250
        assert program.keys() - server.keys() == set()
        for name, guc in program.items():
            there = server[name]
            assert (guc.name, guc.vartype, guc.context, guc.minimum, guc.maximum) == (there.name, there.vartype, there.context, there.minimum, there.maximum)
        assert server["wal_level"].choices == ("minimal", "replica", "logical")
        assert (server["shared_buffers"].unit, server["shared_buffers"].minimum) == ("8kB", "16")
    trio.run(main)


@pytest.mark.postgres
def test_what_the_program_refuses(make_node):
    async def main():
        a = make_node()
        check = partial(refused, bin_dir=a.server.bin_dir, scratch=a.data_dir.parent, in_thread=trio.to_thread.run_sync, deadline_s=5)
        good = {"work_mem": "8MB", "timezone": "UTC", "my.extension": "x", "log_line_prefix": "it's %m", "log_min_messages": "panic", "wal_level": "logical",
                "shared_preload_libraries": "not_there", "restore_command": "cp /x/%f %p"}
        assert await check(good) == {}
        bad = {"nonsense": "1", "nonsens2": "1", "work_mem": "12foo", "max_connections": "9999999", "timezone": "Mars", "autovacuum": "maybe", "server_version": "12",
               "checkpoint_completion_target": "7", "recovery_min_apply_delay": "5 parsecs", "log_destination": "paper", "lc_messages": "xx_YY", "log_min_messages": "all"}
        found = await check(good | bad)
        assert found.keys() == bad.keys()
        assert found["nonsense"] == 'unrecognized configuration parameter "nonsense"'
        assert found["work_mem"].startswith('invalid value for parameter "work_mem": "12foo" (Valid units')
        assert found["max_connections"] == '9999999 is outside the valid range for parameter "max_connections" (1 .. 262143)'
        assert not list(a.data_dir.parent.glob("check-*"))
    trio.run(main)


@pytest.mark.postgres
def test_config_check_asks_this_machines_postgresql(make_node):
    a = make_node()
    file = a.data_dir.parent / "pgha.toml"
    text = f"""
scope = "demo"
name = "n1"
restapi.listen = "127.0.0.1:8008"
etcd3.hosts = ["127.0.0.1:2379"]
[postgresql]
listen = "127.0.0.1:5432"
data_dir = "{a.data_dir}"
bin_dir = "{a.server.bin_dir}"
recovery_conf.recovery_min_apply_delay = "soon"
authentication.superuser = {{username = "postgres"}}
authentication.replication = {{username = "rep"}}
[postgresql.parameters]
work_mem = "8MB"
wrok_mem = 1
[bootstrap.dcs.postgresql.parameters]
work_mem = "8 parsecs"
"my.extension" = "x"
"""
    file.write_text(text)
    code, said = check(file, {}, ask=refused_here)
    lines = [line for line in said.splitlines() if "left out" in line]
    units = 'invalid value for parameter "work_mem": "8 parsecs" (Valid units for this parameter are "B", "kB", "MB", "GB", and "TB")'
    assert code == 0
    assert lines == [
        f"warning: {file}: postgresql.parameters.wrok_mem: is no parameter of PostgreSQL 15; did you mean work_mem?; it would be left out",
        f'warning: {file}: postgresql.recovery_conf.recovery_min_apply_delay: PostgreSQL 15 refuses it: invalid value for parameter "recovery_min_apply_delay": "soon"; it would be left out',
        f"warning: {file}: bootstrap.dcs.postgresql.parameters.work_mem: PostgreSQL 15 refuses it: {units}; it would be left out"]
    file.write_text(text.replace(str(a.server.bin_dir), "/nowhere"))
    assert "PostgreSQL could not be asked: cannot start /nowhere/postgres" in check(file, {}, ask=refused_here)[1]
