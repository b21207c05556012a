"""What a change of PostgreSQL's settings changes, and what the server's facts say against a value."""

from __future__ import annotations

import pytest

from pgha.config.judgement import changed_settings, in_our_words, refusal, refusals
from pgha.model.gucs import Guc, GucFacts
from pgha.model.rolling import plan

WORK_MEM = Guc(name="work_mem", vartype="integer", context="user", unit="kB", minimum="64", maximum="2147483647")
SHARED = Guc(name="shared_buffers", vartype="integer", context="postmaster", unit="8kB", minimum="16", maximum="1073741823")
CONNECTIONS = Guc(name="max_connections", vartype="integer", context="postmaster", minimum="1", maximum="262143")
SHARE = Guc(name="checkpoint_completion_target", vartype="real", context="sighup", minimum="0", maximum="1")
DELAY = Guc(name="vacuum_cost_delay", vartype="real", context="user", unit="ms", minimum="0", maximum="100")
LEVEL = Guc(name="wal_level", vartype="enum", context="postmaster", choices=("minimal", "replica", "logical"))
COMMIT = Guc(name="synchronous_commit", vartype="enum", context="user", choices=("local", "remote_write", "remote_apply", "on", "off"))
FLAG = Guc(name="autovacuum", vartype="bool", context="sighup")
MODE = Guc(name="log_file_mode", vartype="integer", context="sighup", minimum="0", maximum="511")
INTERNAL = Guc(name="server_version", vartype="string", context="internal")
TEXT = Guc(name="archive_command", vartype="string", context="sighup")
OF_EXTENSION = Guc(name="pg_stat_statements.max", vartype="integer", context="postmaster", minimum="100", maximum="1073741823")


@pytest.mark.parametrize(("guc", "text", "why"), [
    (WORK_MEM, "8MB", ""), (WORK_MEM, "64", ""), (WORK_MEM, "0x40", ""), (WORK_MEM, "1e3", ""), (WORK_MEM, "63.6", ""),
    (WORK_MEM, "63", 'is "63", out of range; allowed: a number from 64 to 2147483647, in kB or with a unit (B, kB, MB, GB, TB)'),
    (WORK_MEM, "3TB", 'is "3TB", out of range'), (WORK_MEM, "8 mb", 'is "8 mb", which is no number of this kind'), (WORK_MEM, "5min", 'is "5min", which is no number of this kind'),
    (WORK_MEM, "", 'is "", which is no number of this kind'),
    (SHARED, "128kB", ""), (SHARED, "64kB", 'is "64kB", out of range; allowed: a number from 16 to 1073741823, in 8kB or with a unit'),
    (CONNECTIONS, "262143", ""), (CONNECTIONS, "262144", 'is "262144", out of range; allowed: a number from 1 to 262143'), (CONNECTIONS, "many", 'is "many", which is no number of this kind'),
    (SHARE, "0.9", ""), (SHARE, "1.5", 'is "1.5", out of range; allowed: a number from 0 to 1'),
    (DELAY, "2ms", ""), (DELAY, "500us", ""), (DELAY, "1s", 'is "1s", out of range'),
    (LEVEL, "Logical", ""), (LEVEL, "logicall", 'is "logicall"; allowed: one of minimal, replica, logical'),
    (COMMIT, "yes", ""), (COMMIT, "remote", 'is "remote"; allowed: one of local, remote_write, remote_apply, on, off'),
    (FLAG, "tru", ""), (FLAG, "maybe", 'is "maybe"; allowed: on or off'),
    (MODE, "0640", ""), (MODE, "0777", ""), (MODE, "01000", 'is "01000", out of range'), (MODE, "640", 'is "640", out of range'),
    (INTERNAL, "15", "cannot be set: the server computes it"), (TEXT, "whatever", ""),
    (OF_EXTENSION, "10", 'is "10", out of range'), (OF_EXTENSION, "9" * 5000, 'is "9'),
])
def test_what_the_server_says_against_a_value(guc, text, why):
    said = refusal(text, guc)
    assert said.startswith(why) if why else said == ""


FACTS = GucFacts(of={g.name: g for g in (WORK_MEM, CONNECTIONS, OF_EXTENSION)}, version=15, running=True)


def test_only_what_is_known_is_judged():
    assert refusals({"work_mem": "1", "nonsense": "1", "other.extension": "1", "pg_stat_statements.max": "1"}, FACTS).keys() == {"work_mem", "pg_stat_statements.max"}
    assert in_our_words('unrecognized configuration parameter "wrok_mem"', "wrok_mem", FACTS) == "is no parameter of PostgreSQL 15; did you mean work_mem?"
    assert in_our_words('unrecognized configuration parameter "x"', "x", GucFacts(of={})) == "is no parameter of PostgreSQL"
    assert in_our_words('invalid value for parameter "TimeZone": "Mars"', "timezone", FACTS) == 'PostgreSQL 15 refuses it: invalid value for parameter "TimeZone": "Mars"'


def parameters(**values):
    return {"postgresql": {"parameters": values}}


@pytest.mark.parametrize(("old", "new", "changed"), [
    (None, parameters(work_mem="8MB"), {"work_mem"}),
    (parameters(work_mem="8MB"), parameters(work_mem="8MB", Max_Connections=5), {"max_connections"}),
    (parameters(work_mem=1), parameters(work_mem=True), {"work_mem"}),
    (parameters(work_mem=1), parameters(), set()),
    ({"postgresql": 5}, {"postgresql": {"recovery_conf": {"restore_command": "x"}}}, {"restore_command"}),
    ({}, {"postgresql": {"parameters": 5}}, set()),
    ({}, [], set()),
])
def test_what_a_change_changes(old, new, changed):
    assert changed_settings(old, new).keys() == changed


def test_the_order_of_restarts_without_a_primary_or_without_numbers():
    up = {"max_connections": {"old_value": "100", "new_value": "200"}}
    assert plan({"a": up, "b": up}, leader="c") == (("a", "b"), "")
    assert plan({"a": up}, leader="a") == (("a",), "")
    assert plan({"a": {"max_connections": {"old_value": "100", "new_value": "?"}}, "b": {"max_connections": 5}}, leader="a") == (("b", "a"), "")
    assert plan({}, leader="a") == ((), "")
