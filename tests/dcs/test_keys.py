"""The keys of compatibility spec 1: what real ones say, and that no bytes in any of them are believed or fatal."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from pgha.dcs import Entry, Generation, Snapshot
from pgha.dcs.keys import EPOCH, LOCK, UNREADABLE_LOCK, Keys, encode, encode_history, member_from, parse, parse_lock
from pgha.model.cluster import ClusterView, FailoverKey, HistoryEntry, Status, Sync
from pgha.model.lock import Epoch, LockRecord

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
SITUATIONS = sorted(p.stem for p in GOLDEN.glob("*.json") if p.stem not in ("errors", "files"))
KEYS = Keys("service", "bench")


def golden(when: str) -> dict[str, dict[str, Any]]:
    keys: dict[str, dict[str, Any]] = json.loads((GOLDEN / f"{when}.json").read_text())["etcd"]
    return keys


def view_of(values: dict[str, Any], *, leases: dict[str, int] | None = None) -> ClusterView:
    """`values` by short key, bytes or what is to be JSON; key number n was written at revision 10 + n."""
    entries = {KEYS.path(k): Entry(key=KEYS.path(k), value=v if isinstance(v, bytes) else encode(v), revision=10 + n, lease=(leases or {}).get(k, 0))
               for n, (k, v) in enumerate(values.items())}
    return parse(Snapshot(revision=99, entries=entries, generation=Generation()), KEYS)


def recorded(when: str) -> ClusterView:
    kept = {k.removeprefix(KEYS.root): v for k, v in golden(when).items()}
    return view_of({k: v["value"].encode() for k, v in kept.items()}, leases={k: 7 for k, v in kept.items() if v["leased"]})


# --- real ones -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("when", SITUATIONS)
def test_every_recorded_key_is_understood(when: str):
    view = recorded(when)
    kept = {k.removeprefix(KEYS.root): json.loads(v["value"]) if v["value"][:1] in "[{" else v["value"] for k, v in golden(when).items()}
    assert view.problems == ()
    assert view.initialize == kept["initialize"]
    assert view.initialized
    assert view.config == kept["config"]
    assert (view.leader, view.leader_lease) == (kept["leader"], 7)
    assert view.status.optime == kept["status"]["optime"] > 0
    assert view.status.slots == kept["status"]["slots"]
    assert list(view.status.retain_slots) == kept["status"]["retain_slots"]
    assert view.status.raw == kept["status"]
    assert set(view.revisions) == set(kept)
    assert {k for k, lease in view.leases.items() if lease} == {"leader", *(k for k in kept if k.startswith("members/"))}
    assert view.lock is None
    assert view.lock_revision == 0
    assert view.epoch == Epoch(number=0, holder="", incarnation="")
    assert view.timeline == (kept["history"][-1][0] + 1 if kept["history"] else 1)
    for name, member in view.members.items():
        raw = kept[f"members/{name}"]
        assert member.raw == raw
        assert (member.conn_url, member.api_url, member.state, member.role, member.version) == tuple(
            raw[k] for k in ("conn_url", "api_url", "state", "role", "version"))
        assert (member.host, member.port) == (f"127.0.66.1{name[1]}", 5432)
        assert (member.xlog_location, member.receive_lsn, member.replay_lsn, member.timeline) == tuple(
            raw.get(k, 0) for k in ("xlog_location", "receive_lsn", "replay_lsn", "timeline"))
        assert member.lsn == max(member.xlog_location, member.receive_lsn, member.replay_lsn)
        assert member.replication_state == raw.get("replication_state", "")
        assert member.pause is raw.get("pause", False)
        assert member.tags.raw == raw.get("tags", {})
        assert (member.is_pgha, member.node_id, member.lease) == (False, "", 7)
        assert member.checkpoint_after_promote is None
        assert encode(member.raw) == golden(when)[f"/service/bench/members/{name}"]["value"].encode(), "written back as it was"


@pytest.mark.parametrize("when", SITUATIONS)
def test_a_recorded_history_is_written_back_byte_for_byte(when: str):
    view = recorded(when)
    assert view.history is not None
    assert encode_history(view.history) == golden(when)["/service/bench/history"]["value"].encode()


def test_recorded_synchronous_and_planned_states():
    for when in ("synchronous", "quorum"):
        raw = json.loads(golden(when)["/service/bench/sync"]["value"])
        sync = recorded(when).sync
        assert (sync.leader, sync.quorum, ",".join(sync.members)) == (raw["leader"], raw["quorum"], raw["sync_standby"])
    raw = json.loads(golden("scheduled-switchover")["/service/bench/failover"]["value"])
    asked = recorded("scheduled-switchover").failover
    assert (asked.leader, asked.candidate, asked.scheduled_at) == (raw["leader"], raw.get("member", ""), raw["scheduled_at"])
    assert asked.raw == raw
    assert recorded("steady").failover.empty
    assert recorded("failsafe-on").failsafe == json.loads(golden("failsafe-on")["/service/bench/failsafe"]["value"])
    assert any(m.raw.get("pending_restart") for m in recorded("pending-restart").members.values())
    assert recorded("paused").config["pause"] is True


# --- forms of their own ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("given", "wanted"), [(None, ""), ("", ""), (5, "5"), (False, "false"), ({"at": [1]}, '{"at": [1]}'), ("x" * 100, "x" * 100)])
def test_a_schedule_that_is_no_text_is_still_one(given: Any, wanted: str):
    """Else a switchover for later would be one for now."""
    assert view_of({"failover": {"leader": "n1", "scheduled_at": given}}).failover.scheduled_at == wanted


def test_an_empty_store():
    view = view_of({})
    assert view == ClusterView(revision=99)
    assert (view.timeline, view.initialized, view.initialize) == (0, False, None)


def test_the_references_older_forms():
    view = view_of({"optime/leader": b"12345", "failover": b"n1:n2",
                    "members/n1": b"postgres://10.0.0.1:5433/x?application_name=http://10.0.0.1:8008/patroni", "members/n2": {"role": "master"}})
    assert view.status.optime == 12345
    assert (view.failover.leader, view.failover.candidate) == ("n1", "n2")
    n1 = view.members["n1"]
    assert (n1.host, n1.port, n1.conn_url, n1.api_url) == ("10.0.0.1", 5433, "postgres://10.0.0.1:5433/x", "http://10.0.0.1:8008/patroni")
    assert view.members["n2"].role == "primary"
    assert view.problems == ()
    assert view_of({"status": b"{}", "optime/leader": b"12345"}).status.optime == 0, "read only where there is no status"
    assert view_of({"failover": b":n2"}).failover == FailoverKey(candidate="n2")


@pytest.mark.parametrize(("namespace", "scope", "root"), [
    ("service", "demo", "/service/demo/"), ("/service/", "demo", "/service/demo/"), ("//a//b/", "/c/", "/a/b/c/"), ("", "demo", "/demo/"),
    ("service", "demo/0", "/service/demo/0/"),
])
def test_paths(namespace: str, scope: str, root: str):
    keys = Keys(namespace, scope)
    assert (keys.root, keys.path("sync"), keys.member("n1")) == (root, root + "sync", root + "members/n1")


def test_another_clusters_keys_are_left_alone():
    foreign = {k: Entry(key=k, value=b"x", revision=5) for k in ("/service/bench2/leader", "/service/benchleader", "/service/bench")}
    assert parse(Snapshot(revision=9, entries=foreign, generation=Generation()), KEYS) == ClusterView(revision=9)


def test_own_records_survive_the_way_there_and_back():
    lock = LockRecord(holder="n1", node_id="i", incarnation="r", sequence=9, ttl_s=20.0, mode="paused", lsn=77, timeline=3)
    epoch = Epoch(number=4, holder="n1", incarnation="r", timeline=5, claims=((4, "n2"), (5, "n1")))
    view = view_of({LOCK: encode(lock), EPOCH: encode(epoch)})
    assert (view.lock, view.lock_revision, view.lock_value, view.epoch) == (lock, 10, encode(lock), epoch)
    newer = json.loads(encode(lock)) | {"a field of a later version": [1]}
    assert parse_lock(encode(newer)) == lock
    assert set(json.loads(encode(lock))) == {"holder", "node_id", "incarnation", "sequence", "ttl_s", "mode", "lsn", "timeline", "mixed"}, "written in full"


def test_unknown_fields_are_kept():
    view = view_of({"sync": {"leader": "n1", "quorum": 1, "sync_standby": "n2", "cross_site_mode": True}, "status": {"optime": 5, "more": [1]},
                    "failover": {"leader": "n1", "x": 1}, "config": {"ttl": 5, "pgha": {"a": 1}, "x": None}, "members/n1": {"site": "a", "tags": {"own": 1}}})
    assert view.sync.raw["cross_site_mode"] is True
    assert view.status.raw["more"] == [1]
    assert view.failover.raw["x"] == 1
    assert view.config == {"ttl": 5, "pgha": {"a": 1}, "x": None}
    assert view.members["n1"].raw == {"site": "a", "tags": {"own": 1}}
    assert view.members["n1"].tags.raw == {"own": 1}


@pytest.mark.parametrize(("value", "sync"), [
    ({"leader": "n1", "quorum": 1, "sync_standby": "n2,n3"}, Sync(leader="n1", quorum=1, members=("n2", "n3"))),
    ({"leader": "n1", "quorum": 0, "sync_standby": None}, Sync(leader="n1")),
    ({"leader": "n1", "quorum": "2", "sync_standby": " n2 , ,n3,"}, Sync(leader="n1", quorum=2, members=("n2", "n3"))),
    ({"leader": None, "quorum": 2, "sync_standby": "n2"}, Sync()),
    ({"leader": "n1", "quorum": True, "sync_standby": ["n2"]}, Sync(leader="n1")),
    ({"leader": "n1", "quorum": -3}, Sync(leader="n1")),
    ({}, Sync()),
    ({"leader": 1}, Sync(unreadable=True)),
    ({"leader": "n1", "sync_standby": "n2,x\x00y"}, Sync(unreadable=True)),
    ({"leader": "n\n1"}, Sync(unreadable=True)),
])
def test_sync(value: dict[str, Any], sync: Sync):
    assert view_of({"sync": value}).sync == msgspec.structs.replace(sync, raw={} if sync.unreadable else value)


@pytest.mark.parametrize(("value", "history", "timeline"), [
    (b"[]", (), 1),
    (b'[[1,5,"why"]]', (HistoryEntry(timeline=1, lsn=5, reason="why"),), 2),
    (b'[[1,5],[2,6,"why","2026","n1","later version"]]', (HistoryEntry(timeline=1, lsn=5), HistoryEntry(timeline=2, lsn=6, reason="why", timestamp="2026", leader="n1")), 3),
    (b"[[7,5,null,3]]", (HistoryEntry(timeline=7, lsn=5),), 8),
    (b"[[1]]", None, 0), (b"[1]", None, 0), (b"{}", None, 0), (b'[["1",5,"x"]]', None, 0), (b"garbage", None, 0), (b'[[1,5,"x"],null]', None, 0),
])
def test_history(value: bytes, history: Any, timeline: int):
    view = view_of({"history": value})
    assert (view.history, view.timeline) == (history, timeline)
    assert bool(view.problems) == (history is None)


@pytest.mark.parametrize(("value", "status"), [
    (b"5", Status(optime=5)), (b"-5", Status()), (b"true", None), (b"[5]", None), (b'"5"', None), (b"x", None), (b"", None),
    (b'{"optime":"7"}', Status(optime=7, raw={"optime": "7"})),
    (b'{"optime":-1,"slots":[1],"retain_slots":{"a":1}}', Status(raw={"optime": -1, "slots": [1], "retain_slots": {"a": 1}})),
    (b'{"slots":{"a":1,"b":"2"},"retain_slots":["x",3]}', Status(slots={"a": 1}, retain_slots=("x",), raw={"slots": {"a": 1, "b": "2"}, "retain_slots": ["x", 3]})),
])
def test_status(value: bytes, status: Status | None):
    view = view_of({"status": value})
    assert view.status == (status or Status())
    assert bool(view.problems) == (status is None)


@pytest.mark.parametrize("value", ["", "123456789", "12345678 0", "12345678a0", "-1234567890", "１２３４５６７８９０"])
def test_what_is_no_system_identifier(value: str):
    assert not view_of({"initialize": value.encode()}).initialized


@pytest.mark.parametrize(("conn_url", "host", "port"), [
    ("postgres://10.0.0.1:5433/postgres", "10.0.0.1", 5433), ("postgres://[fe80::1]:5432/postgres", "fe80::1", 5432), ("postgres://db/x", "db", 5432),
    ("postgres://u:p@db:1/x", "db", 1), ("", "", 5432), ("postgres://[fe80", "", 5432), ("postgres://db:99999/x", "", 5432), ("postgres://db:x/x", "", 5432),
    (["postgres"], "", 5432),
])
def test_a_members_address(conn_url: Any, host: str, port: int):
    member = member_from("n1", {"conn_url": conn_url})
    assert (member.host, member.port) == (host, port)


def test_the_marker_says_which_make_a_member_is():
    assert member_from("n1", {"pgha": {"version": "0.1.0", "node_id": "abc"}}).node_id == "abc"
    assert member_from("n1", {"pgha": {"version": "0.1.0", "node_id": 5}}).is_pgha
    assert not member_from("n1", {"pgha": "0.1.0"}).is_pgha


# --- garbage ---------------------------------------------------------------------------------------------------------

SAMPLES: dict[str, Any] = {
    "initialize": b"7711161683783831200", "config": {"ttl": 20, "postgresql": {"parameters": {"a": 1}}}, "leader": b"n1",
    "status": {"optime": 5, "slots": {"n1": 5}, "retain_slots": ["n1"]}, "optime/leader": b"5", "failover": {"leader": "n1", "member": "n2", "scheduled_at": "2026"},
    "sync": {"leader": "n1", "quorum": 1, "sync_standby": "n2"}, "history": [[1, 5, "why", "2026", "n1"]], "failsafe": {"n1": "http://h/patroni"},
    "members/n1": {"conn_url": "postgres://h:5432/x", "api_url": "http://h/patroni", "state": "running", "role": "replica", "xlog_location": 5, "tags":
                   {"nofailover": True, "failover_priority": 1, "sync_priority": 2}, "timeline": 1, "pgha": {"node_id": "x"}, "checkpoint_after_promote": False},
    LOCK: json.loads(encode(LockRecord(holder="n1", node_id="i", incarnation="r", sequence=9, ttl_s=20.0))),
    EPOCH: {"number": 4, "holder": "n1", "incarnation": "r", "timeline": 5, "claims": [[4, "n2"]]},
}
SCALARS: list[Any] = [None, True, False, 0, 1, -1, 2**31, 2**63, 2**64, 10**30, -10**30, 0.0, 1.5, -1e300, "", "x", "1", "-1", "\u00e9", "\x00", "n1,n2", "postgres://[", []]


def some_json(rng: random.Random, depth: int = 3) -> Any:
    kind = rng.randrange(4 if depth else 2)
    if kind == 2:
        return [some_json(rng, depth - 1) for _ in range(rng.randrange(4))]
    if kind == 3:
        words = ["leader", "member", "optime", "slots", "tags", "ttl_s", "holder", "conn_url", "pgha", "number", "claims", "x"]
        return {rng.choice(words): some_json(rng, depth - 1) for _ in range(rng.randrange(5))}
    return rng.choice(SCALARS)


def mutated(rng: random.Random, value: Any) -> Any:
    """One place in it replaced, taken away or wrapped."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(sorted(value))
        changed = dict(value)
        if rng.random() < 0.2:
            del changed[key]
        else:
            changed[key] = mutated(rng, value[key])
        return changed
    if isinstance(value, list) and value and rng.random() < 0.9:
        place = rng.randrange(len(value))
        return [*value[:place], mutated(rng, value[place]), *value[place + 1:]]
    return some_json(rng)


def garbage(rng: random.Random, sample: Any) -> bytes:
    good = sample if isinstance(sample, bytes) else encode(sample)
    kind = rng.randrange(6)
    if kind == 0:
        return rng.randbytes(rng.randrange(60))
    if kind == 1:
        return good[: rng.randrange(len(good))]
    if kind == 2:
        place = rng.randrange(len(good))
        return good[:place] + rng.randbytes(rng.randrange(3)) + good[place + rng.randrange(3):]
    if kind == 3 and not isinstance(sample, bytes):
        return encode(mutated(rng, sample))
    if kind == 4:
        return b" \n" + encode(some_json(rng)) + b"\n"
    return encode(some_json(rng))


def is_json(value: bytes) -> bool:
    try:
        json.loads(value)
    except ValueError:
        return False
    return True


def is_utf8(value: bytes) -> bool:
    try:
        value.decode()
    except UnicodeDecodeError:
        return False
    return True


def cases(key: str) -> Iterator[bytes]:
    rng = random.Random(f"keys {key}")
    for _ in range(1500):
        yield garbage(rng, SAMPLES[key])


@pytest.mark.parametrize("key", sorted(SAMPLES))
def test_no_bytes_are_fatal_and_what_is_not_json_is_named(key: str):
    others = {k: v for k, v in SAMPLES.items() if k != key}
    for value in cases(key):
        if key in (LOCK, EPOCH) and not is_utf8(value):
            continue      # test_text_that_is_no_text_is_not_fatal
        view = view_of(others | {key: value})
        assert msgspec.json.encode(view), "a pass can be written down"
        assert encode(view.members["n1"].raw) or key == "members/n1"
        named = [p for p in view.problems if p.startswith(key + ":")]
        assert len(view.problems) == len(named) <= 1, (value, view.problems)
        text = key in ("initialize", "leader", "optime/leader") or (key == "failover" and not value.lstrip().startswith(b"{")) \
            or (key == "members/n1" and value.startswith(b"postgres"))
        if not text and not is_json(value):
            assert named, value
        if key == LOCK:
            assert view.lock is not None, value
            assert (view.lock is UNREADABLE_LOCK) == bool(named), value
            assert view.lock is UNREADABLE_LOCK or 0 < view.lock.ttl_s <= 86400
        assert view.published_position.lsn >= 0 or key == LOCK
        assert view.sync.quorum >= 0
        assert view.status.optime >= 0
        assert all(m.lsn >= 0 and m.timeline >= 0 for m in view.members.values())


@pytest.mark.parametrize("ttl_s", [0, -1, 86401, 1e300, "20", None, True])
def test_a_lock_whose_ttl_makes_no_sense_is_held_by_somebody_unknown(ttl_s: Any):
    record = SAMPLES[LOCK] | {"ttl_s": ttl_s}
    view = view_of({LOCK: record})
    assert view.lock is UNREADABLE_LOCK
    assert (view.lock.holder, view.lock.ttl_s, view.lock.mode) == ("", 30.0, "held")
    assert view.lock_value == encode(record), "what a take-over compares"
    assert view.problems == ("pgha/lock: is no lock record; treated as held by somebody unknown until it expires",)


@pytest.mark.parametrize("missing", ["holder", "node_id", "incarnation", "sequence", "ttl_s"])
def test_a_lock_that_lacks_a_field_is_no_released_one(missing: str):
    assert parse_lock(encode({k: v for k, v in SAMPLES[LOCK].items() if k != missing} | {"mode": "released"})) is UNREADABLE_LOCK


def test_an_unknown_mode_is_not_believed():
    assert parse_lock(encode(SAMPLES[LOCK] | {"mode": "free for all"})) is UNREADABLE_LOCK


FATAL = {
    "brackets without end": b"[" * 100_000,
    "objects without end": b'{"a":' * 100_000,
}


@pytest.mark.parametrize("key", ["config", "status", "failsafe", "sync", "history", "members/n1"])
@pytest.mark.parametrize("how", sorted(FATAL))
def test_nesting_without_end_is_not_fatal(key: str, how: str):
    assert view_of({key: FATAL[how]}).problems


@pytest.mark.parametrize("key", ["failover", LOCK, EPOCH])
def test_nesting_without_end_is_not_fatal_elsewhere(key: str):
    assert view_of({key: FATAL["brackets without end"]}) is not None


@pytest.mark.parametrize(("key", "value"), [
    ("members/n1", b'{"tags":{"failover_priority":1e999}}'), ("members/n1", b'{"tags":{"sync_priority":Infinity}}'),
    ("members/n1", b'{"xlog_location":"' + b"9" * 5000 + b'"}'), ("status", b'{"optime":"' + b"9" * 5000 + b'"}'),
    ("sync", b'{"leader":"n1","quorum":"' + b"9" * 5000 + b'"}'),
])
def test_numbers_without_end_are_not_fatal(key: str, value: bytes):
    assert view_of({key: value}) is not None


@pytest.mark.parametrize(("key", "value"), [("config", b'{"x":"\\ud800"}'), ("members/n1", b'{"state":"\\ud800"}'), ("failover", b'{"leader":"\\ud800"}')])
def test_half_a_character_is_not_fatal(key: str, value: bytes):
    assert msgspec.json.encode(view_of({key: value}))


@pytest.mark.parametrize("value", [b"null", b"[]", b'"x"', b"5"])
def test_a_failover_key_that_is_json_but_no_object_asks_for_nothing(value: bytes):
    assert view_of({"failover": value}).failover.empty


@pytest.mark.parametrize(("key", "value"), [("status", {"slots": {"a": True}}), ("history", [[True, 5, "x"]])])
def test_true_is_no_number(key: str, value: Any):
    assert msgspec.json.decode(msgspec.json.encode(view_of({key: value})), type=ClusterView)


NO_TEXT = {LOCK: b'{"holder":"n\xff1","node_id":"i","incarnation":"r","sequence":9,"ttl_s":20.0}', EPOCH: b'{"number":4,"holder":"\xff","incarnation":"r"}'}


@pytest.mark.parametrize("key", sorted(NO_TEXT))
def test_text_that_is_no_text_is_not_fatal(key: str):
    assert view_of({key: NO_TEXT[key]}).problems
