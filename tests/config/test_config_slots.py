"""`slots` and `ignore_slots` in the shared configuration: what is kept, what is left alone, what is refused (config/slots.py)."""

from __future__ import annotations

import pytest

from pgha.config.cluster import ClusterConfig, validate_change, validate_dynamic
from pgha.config.load import effective
from pgha.config.local import LocalConfig
from pgha.config.slots import Slots, slots_of
from pgha.model.observation import SlotMatcher

NOT_KEPT = "is a logical slot, which this version does not keep: it is neither made nor carried over a failover, and what exists is left alone"
LOGICAL = {"type": "logical", "database": "orders", "plugin": "pgoutput"}

READ = [
    ({}, Slots()),
    (None, Slots()),
    ({"slots": {"a": None, "b": {}, "c": {"type": "physical"}}}, Slots(permanent=("a", "b", "c"))),
    ({"slots": {"a": {"cluster_type": "primary"}, "b": {"cluster_type": "standby"}}}, Slots(permanent=("a",), left_alone=(SlotMatcher(name="b"),))),
    ({"permanent_slots": {"a": None}}, Slots(permanent=("a",))),
    ({"permanent_replication_slots": {"a": None}, "slots": {"b": None}}, Slots(permanent=("a", "b"))),
    ({"slots": {"l": LOGICAL, "m": {"database": "x", "plugin": "y"}}}, Slots(logical=("l", "m"), left_alone=(SlotMatcher(name="l"), SlotMatcher(name="m")))),
    ({"slots": {"a": "physical", "B": None, "d": {"type": "both"}, "e": {"type": "logical"}}},
     Slots(left_alone=tuple(SlotMatcher(name=name) for name in ("B", "a", "d", "e")))),
    ({"ignore_slots": [{"name": "a"}, {"type": "logical", "plugin": "x", "database": "y"}, {}]},
     Slots(left_alone=(SlotMatcher(name="a"), SlotMatcher(type="logical", plugin="x", database="y"), SlotMatcher()))),
    ({"slots": None, "ignore_slots": None}, Slots()),
    # what cannot be read may keep any slot there is
    ({"slots": ["a"]}, Slots(readable=False)),
    ({"ignore_slots": {"name": "a"}}, Slots(readable=False)),
    ({"ignore_slots": ["a"]}, Slots(readable=False)),
    ({"ignore_slots": [{"nme": "a"}, {"name": "b"}]}, Slots(left_alone=(SlotMatcher(name="b"),), readable=False)),
    ({"ignore_slots": [{"name": 5}]}, Slots(readable=False)),
    ([], Slots(readable=False)),
]


@pytest.mark.parametrize(("raw", "expected"), READ, ids=[str(raw) for raw, _ in READ])
def test_what_is_kept_and_what_is_left_alone(raw, expected):
    assert slots_of(raw) == expected


def test_decisions_are_told_of_it():
    settings = effective(LocalConfig(), {"slots": {"p": None, "l": LOGICAL}, "ignore_slots": [{"name": "x"}]}).settings
    assert (settings.permanent_slots, settings.ignored_slots, settings.may_drop_slots) == (("p",), (SlotMatcher(name="l"), SlotMatcher(name="x")), True)
    assert not effective(LocalConfig(), {"slots": []}).settings.may_drop_slots


REFUSED = [
    ({"slots": {"l": LOGICAL}}, f"/config: slots.l: {NOT_KEPT}; allowed: leave it out"),
    ({"permanent_slots": {"l": LOGICAL}}, "/config: permanent_slots.l: is a logical slot"),
    ({"slots": {"Node-1": None}}, "/config: slots.Node-1: is no slot's name; allowed: 1 to 63 of a-z, 0-9 and _"),
    ({"slots": {"x" * 64: None}}, f"/config: slots.{'x' * 64}: is no slot's name"),
    ({"slots": {"a": 5}}, "/config: slots.a: is a number; allowed: a table with type, database, plugin, cluster_type"),
    ({"slots": {"a": {"type": "fysical"}}}, '/config: slots.a: has type "fysical"; allowed: physical or logical'),
    ({"slots": {"a": {"cluster_type": "both"}}}, '/config: slots.a: has cluster_type "both"; allowed: primary or standby'),
    ({"slots": {"a": {"typ": "physical"}}}, '/config: slots.a: has "typ", which is unknown; did you mean type?'),
    ({"slots": {"a": {"type": "logical", "plugin": "x"}}}, "/config: slots.a: is logical without database and plugin; allowed: both"),
    ({"slots": {"a": {"database": 5}}}, "/config: slots.a: has database 5; allowed: a name"),
    ({"ignore_slots": [{}, {"name": ""}]}, '/config: ignore_slots.1: has name ""; allowed: text'),
    ({"ignore_slots": [{"type": "x"}]}, '/config: ignore_slots.0: has type "x"; allowed: physical or logical'),
    ({"ignore_slots": [{"slot": "x"}]}, '/config: ignore_slots.0: has "slot", which is unknown'),
    ({"ignore_slots": ["x"]}, "/config: ignore_slots: has an item that is no table"),
]


@pytest.mark.parametrize(("raw", "problem"), REFUSED, ids=[str(raw)[:60] for raw, _ in REFUSED])
def test_our_own_writes_are_refused_by_name(raw, problem):
    (found,) = validate_dynamic(raw)
    assert found.startswith(problem)


def test_what_others_have_written_is_named_and_nothing_else_is_refused_for_it():
    old = {"slots": {"l": LOGICAL, "odd": 5}}
    assert validate_change(old, {**old, "slots": {**old["slots"], "p": {"type": "physical"}}}) == []
    assert ClusterConfig.from_json(old, patroni_member_present=False)[1] == (
        f"/config: slots.l: {NOT_KEPT}",
        "/config: slots.odd: is a number; allowed: a table with type, database, plugin, cluster_type; no slot of this name is made or dropped",
    )
    assert ClusterConfig.from_json({"ignore_slots": [{"x": 1}]}, patroni_member_present=False)[1] == (
        '/config: ignore_slots.0: has "x", which is unknown; allowed: name, type, database, plugin; no slot is dropped until this is put right',)


def test_a_table_full_of_faults_is_told_of_in_a_few_lines():
    assert len(validate_dynamic({"slots": {f"S{n}": None for n in range(1000)}})) == 20
