"""Which slots a server has, and where they stand (decide/slots.py): for members, for those that went away, permanent ones."""

from __future__ import annotations

import pytest
from decide_world import (
    LEADER,
    LSN,
    REPLICA,
    STATUS,
    KiB,
    MiB,
    ago,
    ahead,
    member,
    names,
    only,
    primary_row,
    slot,
    standby_row,
)
from msgspec.structs import replace

from pgha.decide.slots import maintenance, obstacles, published_slots, retained_names
from pgha.model.action import MaintainSlots
from pgha.model.cluster import Status, Tags, slot_name
from pgha.model.observation import Request, SlotMatcher


@pytest.mark.parametrize("member, slot_of", [("b", "b"), ("Node-1.db", "node_1_db"), ("ü", "u0252"), ("x" * 70, "x" * 63), ("a b", "au0032b")])
def test_slot_names(member, slot_of):
    assert slot_name(member) == slot_of


HERE = standby_row().slots                     # for a, which leads, and for c: nobody reads from a standby
AT_A = slot("a", active=False, restart_lsn=LSN)
IDLE = slot("x", active=False)                 # nobody's
NOFAILOVER = Tags(nofailover=True)


def _status(**slots):
    return Status(optime=LSN, slots=slots, retain_slots=("a", "b", "c"))


ON_A_STANDBY = [
    ("as they are", {}, None),
    ("one is missing", {"postgres__row__slots": (slot("c", active=False),)}, MaintainSlots(create=("a",))),
    ("a logical one has its name", {"postgres__row__slots": (slot("a", type="logical"), slot("c"))}, None),
    ("a temporary one has its name", {"postgres__row__slots": (slot("a", temporary=True), slot("c"))}, None),
    ("one too many", {"postgres__row__slots": (*HERE, IDLE)}, MaintainSlots(drop=("x",))),
    ("one too many, in use", {"postgres__row__slots": (*HERE, slot("x"))}, None),
    ("one too many, logical", {"postgres__row__slots": (*HERE, slot("x", active=False, type="logical"))}, None),
    ("one too many, in pause", {"postgres__row__slots": (*HERE, IDLE), "settings__pause": True}, None),
    ("one too many, and the configuration is gone", {"postgres__row__slots": (*HERE, IDLE), "dcs__view__config": None}, None),
    ("one too many, and what is to be kept cannot be read", {"postgres__row__slots": (*HERE, IDLE), "settings__may_drop_slots": False}, None),
    ("one too many, and the store has just been restored", {"postgres__row__slots": (*HERE, IDLE), "dcs__trusted_from": ahead(20)}, None),
    ("one too many, and the store was restored a while ago", {"postgres__row__slots": (*HERE, IDLE), "dcs__trusted_from": ago(1)}, MaintainSlots(drop=("x",))),
    ("its own name", {"postgres__row__slots": (*HERE, slot("b", active=False))}, MaintainSlots(drop=("b",))),
    ("its own name, in use", {"postgres__row__slots": (*HERE, slot("b"))}, None),
    ("its own name, retained", {"postgres__row__slots": (*HERE, slot("b", active=False)), "dcs__remembered_slots": ("b",), "dcs__remembered_members": {"b": "x"}}, MaintainSlots(drop=("b",))),
    ("its own name, permanent: not on this node", {"postgres__row__slots": (*HERE, slot("b", active=False)), "settings__permanent_slots": ("b",)}, MaintainSlots(drop=("b",))),
    ("no slots are used", {"settings__use_slots": False, "postgres__row__slots": ()}, None),
    ("no slots are used any more", {"settings__use_slots": False, "postgres__row__slots": (*HERE, IDLE, slot("b"))}, MaintainSlots(drop=("a", "c"))),
    ("no slots are used any more, and some are kept", {"settings__use_slots": False, "settings__permanent_slots": ("c",), "settings__ignored_slots": (SlotMatcher(name="a"),)}, None),
    ("no slots are used any more, in pause", {"settings__use_slots": False, "settings__pause": True}, None),
    ("PostgreSQL does not say", {"postgres__row": None}, None),
    # ignore_slots: everything that is given has to match
    ("ignored", {"postgres__row__slots": (*HERE, IDLE), "settings__ignored_slots": (SlotMatcher(name="x"),)}, None),
    ("ignored, as every physical one", {"postgres__row__slots": (*HERE, IDLE), "settings__ignored_slots": (SlotMatcher(type="physical"),)}, None),
    ("ignored, as every one", {"postgres__row__slots": (*HERE, IDLE), "settings__ignored_slots": (SlotMatcher(),)}, None),
    ("of another name", {"postgres__row__slots": (*HERE, IDLE), "settings__ignored_slots": (SlotMatcher(name="y"),)}, MaintainSlots(drop=("x",))),
    ("of another type", {"postgres__row__slots": (*HERE, IDLE), "settings__ignored_slots": (SlotMatcher(name="x", type="logical"),)}, MaintainSlots(drop=("x",))),
    ("of another database", {"postgres__row__slots": (*HERE, IDLE), "settings__ignored_slots": (SlotMatcher(name="x", database="d"),)}, MaintainSlots(drop=("x",))),
    ("of another plugin", {"postgres__row__slots": (*HERE, IDLE), "settings__ignored_slots": (SlotMatcher(name="x", plugin="p"),)}, MaintainSlots(drop=("x",))),
    ("the second matches", {"postgres__row__slots": (*HERE, IDLE), "settings__ignored_slots": (SlotMatcher(name="y"), SlotMatcher(name="x"))}, None),
    ("its own name, ignored", {"postgres__row__slots": (*HERE, slot("b", active=False)), "settings__ignored_slots": (SlotMatcher(name="b"),)}, None),
    # permanent ones
    ("permanent, missing", {"settings__permanent_slots": ("p", "b")}, MaintainSlots(create=("p",))),
    ("permanent, there", {"settings__permanent_slots": ("x",), "postgres__row__slots": (*HERE, IDLE)}, None),
    ("permanent, of a member that is gone", {"settings__permanent_slots": ("d",), "postgres__row__slots": (*HERE, slot("d", active=False))}, None),
    ("permanent, moved by the leader", {"settings__permanent_slots": ("x",), "postgres__row__slots": (*HERE, IDLE), "dcs__view__status": _status(x=LSN - KiB)},
     MaintainSlots(advance=(("x", LSN - KiB),))),
    ("permanent, and begins later here", {"settings__permanent_slots": ("x",), "postgres__row__slots": (*HERE, IDLE), "dcs__view__status": _status(x=MiB)}, None),
    ("permanent, and holds back vacuum", {"settings__permanent_slots": ("x",), "postgres__row__slots": (*HERE, slot("x", active=False, holds_back_vacuum=True))}, None),
    ("permanent, and invalid", {"settings__permanent_slots": ("x",), "postgres__row__slots": (*HERE, slot("x", active=False, wal_status="lost", restart_lsn=0))},
     MaintainSlots(create=("x",), drop=("x",))),
    ("permanent, on a node that never leads", {"settings__permanent_slots": ("p",), "settings__tags": NOFAILOVER, "postgres__row__slots": ()}, None),
    ("permanent, there, on a node that never leads", {"settings__permanent_slots": ("x",), "settings__tags": NOFAILOVER, "postgres__row__slots": (IDLE,)}, None),
    # members that went away
    ("of a member that went away", {"postgres__row__slots": (*HERE, slot("d", active=False)), "dcs__remembered_members": {"d": "x"}}, None),
    ("of a member that went away before this node came", {"postgres__row__slots": (*HERE, slot("d", active=False)), "dcs__remembered_slots": ("d",)}, None),
    ("retained by the leader", {"postgres__row__slots": (*HERE, slot("e", active=False)), "dcs__view__status__retain_slots": ("e",)}, None),
    ("retained by the leader, missing", {"dcs__view__status__retain_slots": ("a", "b", "c", "e")}, MaintainSlots(create=("e",))),
    ("retained, and nothing is to be", {"postgres__row__slots": (*HERE, slot("e", active=False)), "dcs__view__status__retain_slots": ("e",), "dcs__remembered_members": {"e": "x"},
                                        "settings__member_slots_ttl_s": 0.0}, MaintainSlots(drop=("a", "c", "e"))),
    # tags of members
    ("a member that does not stream", {"dcs__view__members__c__tags": Tags(nostream=True), "postgres__row__slots": (AT_A,)}, None),
    ("a member that does not stream, its old one", {"dcs__view__members__c__tags": Tags(nostream=True)}, MaintainSlots(drop=("c",))),
    ("a node that never leads", {"settings__tags": NOFAILOVER, "postgres__row__slots": ()}, None),
    ("a node that never leads, upstream of c", {"settings__tags": NOFAILOVER, "postgres__row__slots": (), "dcs__view__members__c__tags": Tags(replicatefrom="b")}, MaintainSlots(create=("c",))),
    ("no time for members that go away", {"settings__member_slots_ttl_s": 0.0}, MaintainSlots(drop=("a", "c"))),
    ("no time for members that go away, upstream of c", {"settings__member_slots_ttl_s": 0.0, "dcs__view__members__c__tags": Tags(replicatefrom="b")}, MaintainSlots(drop=("a",))),
    # where they stand
    ("behind the leader's", {"postgres__row__slots": (AT_A, slot("c", active=False, restart_lsn=MiB))}, MaintainSlots(advance=(("c", LSN - MiB),))),
    ("behind, but in use", {"postgres__row__slots": (AT_A, slot("c", restart_lsn=MiB))}, None),
    ("behind, and c is to stream from here", {"postgres__row__slots": (AT_A, slot("c", active=False, restart_lsn=MiB)), "dcs__view__members__c__tags": Tags(replicatefrom="b")}, None),
    ("behind, not replayed so far", {"postgres__row__slots": (AT_A, slot("c", active=False, restart_lsn=MiB)), "postgres__row__replayed_lsn": 2 * MiB},
     MaintainSlots(advance=(("c", 2 * MiB),))),
    ("behind, and a former leader has written that", {"postgres__row__slots": (AT_A, slot("c", active=False, restart_lsn=MiB)),
                                                     "dcs__view__revisions": {"status": 50, "pgha/epoch": 50, "config": 3}}, None),
    ("keeps nothing", {"postgres__row__slots": (AT_A, slot("c", active=False, restart_lsn=0))}, MaintainSlots(create=("c",), drop=("c",))),
    ("keeps nothing, in pause", {"postgres__row__slots": (AT_A, slot("c", active=False, restart_lsn=0)), "settings__pause": True}, None),
    ("invalid", {"postgres__row__slots": (AT_A, slot("c", active=False, wal_status="lost"))}, MaintainSlots(create=("c",), drop=("c",))),
    ("invalid, ignored", {"postgres__row__slots": (AT_A, slot("c", active=False, wal_status="lost", restart_lsn=0)), "settings__ignored_slots": (SlotMatcher(name="c"),)}, None),
    # an old reader's xmin
    ("holds back vacuum for the leader", {"postgres__row__slots": (slot("a", active=False, holds_back_vacuum=True), slot("c", active=False))}, MaintainSlots(create=("a",), drop=("a",), advance=())),
    ("holds back vacuum for c, which streams elsewhere", {"postgres__row__slots": (AT_A, slot("c", active=False, holds_back_vacuum=True)), "dcs__view__members__c__replication_state": "streaming"},
     MaintainSlots(create=("c",), drop=("c",))),
    ("holds back vacuum for c, which streams elsewhere, and is permanent", {"postgres__row__slots": (AT_A, slot("c", active=False, holds_back_vacuum=True)),
        "dcs__view__members__c__replication_state": "streaming", "settings__permanent_slots": ("c",)}, None),
    ("holds back vacuum for c, which may need it", {"postgres__row__slots": (AT_A, slot("c", active=False, holds_back_vacuum=True))}, None),
    ("holds back vacuum for c, which streams from here", {"postgres__row__slots": (AT_A, slot("c", active=False, holds_back_vacuum=True)), "dcs__view__members__c__replication_state": "streaming",
                                                          "dcs__view__members__c__tags": Tags(replicatefrom="b")}, None),
]


@pytest.mark.parametrize("name, changes, wanted", ON_A_STANDBY, ids=[r[0] for r in ON_A_STANDBY])
def test_on_a_standby(name, changes, wanted):
    assert maintenance(REPLICA.but(**changes).seen) == wanted


CASCADES = {"dcs__view__members__c": member("c", tags=Tags(replicatefrom="b"), receive_lsn=LSN - KiB)}
GONE = (slot("b"), slot("c", active=False, restart_lsn=MiB))

ON_THE_LEADER = [
    ("as they are", {}, None),
    ("one is missing", {"postgres__row__slots": (slot("b"),)}, MaintainSlots(create=("c",))),
    ("one does not move: its reader is down", {"postgres__row__slots": GONE}, None),
    ("c cascades", {"postgres__row__slots": GONE, **CASCADES}, MaintainSlots(advance=(("c", LSN - KiB),))),
    ("c cascades, and has replayed from its archive", {"postgres__row__slots": GONE, "dcs__view__members__c": member("c", tags=Tags(replicatefrom="b"), replay_lsn=2 * MiB)},
     MaintainSlots(advance=(("c", 2 * MiB),))),
    ("c cascades, and says nothing", {"postgres__row__slots": GONE, "dcs__view__members__c": member("c", tags=Tags(replicatefrom="b"))}, None),
    ("c cascades, on another timeline", {"postgres__row__slots": GONE, **CASCADES, "dcs__view__members__c__timeline": 2}, None),
    ("c cascades, and streams from here still", {"postgres__row__slots": (slot("b"), slot("c", restart_lsn=MiB)), **CASCADES}, None),
    ("c cascades from whom is stopped", {"postgres__row__slots": GONE, **CASCADES, "dcs__view__members__b__state": "stopped"}, None),
    ("c cascades, no time for members that go away", {**CASCADES, "postgres__row__slots": GONE, "settings__member_slots_ttl_s": 0.0}, MaintainSlots(drop=("c",))),
    ("c would cascade, its upstream is stopped, no time", {**CASCADES, "postgres__row__slots": (slot("b"),), "dcs__view__members__b__state": "stopped", "settings__member_slots_ttl_s": 0.0},
     MaintainSlots(create=("c",))),
    ("c does not stream", {"dcs__view__members__c__tags": Tags(nostream=True), "postgres__row__slots": (slot("b"),)}, None),
    ("a permanent one is missing", {"settings__permanent_slots": ("p",)}, MaintainSlots(create=("p",))),
    ("a permanent one waits for its reader", {"settings__permanent_slots": ("x",), "postgres__row__slots": (*primary_row().slots, slot("x", active=False, restart_lsn=MiB))}, None),
    ("nobody's", {"postgres__row__slots": (*primary_row().slots, IDLE)}, MaintainSlots(drop=("x",))),
    ("nofailover hinders nobody who leads", {"settings__tags": NOFAILOVER, "settings__permanent_slots": ("p",), "postgres__row__slots": ()}, MaintainSlots(create=("b", "c", "p"))),
    ("its own list retains nobody", {"postgres__row__slots": (*primary_row().slots, IDLE), "dcs__view__status__retain_slots": ("a", "b", "c", "x")}, MaintainSlots(drop=("x",))),
    ("of a member that went away before this node came", {"postgres__row__slots": (*primary_row().slots, IDLE), "dcs__remembered_slots": ("x",)}, None),
    ("a standby's xmin is its reader's", {"postgres__row__slots": (slot("b"), slot("c", active=False, holds_back_vacuum=True)), "dcs__view__members__c__replication_state": "streaming"}, None),
]


@pytest.mark.parametrize("name, changes, wanted", ON_THE_LEADER, ids=[r[0] for r in ON_THE_LEADER])
def test_on_the_leader(name, changes, wanted):
    assert maintenance(LEADER.but(**changes).seen) == wanted


def test_both_situations_ask_for_it():
    assert only(LEADER.but(postgres__row__slots=(slot("b"),)).decide(), MaintainSlots) == MaintainSlots(create=("c",))
    assert names(REPLICA.but(postgres__row__slots=()).decide()) == ("MaintainSlots",)
    assert names(REPLICA.but(postgres__row__slots=(), configured_upstream="").decide()) == ("Follow",), "first whom to follow"


@pytest.mark.parametrize("world", [LEADER, REPLICA], ids=["leader", "standby"])
def test_slots_for_which_there_may_be_no_room_hold_up_nothing_that_would_make_room(world):
    world = world.but(postgres__row__slots=())
    assert names(world.but(settings__configuration_changed=True).decide()) == ("ApplyConfiguration",)
    assert names(world.but(requests=(Request(id=1, kind="restart", at=ago(1)),)).decide()) == ("Restart",)
    assert names(world.decide()) == ("MaintainSlots",)


def test_what_is_published_of_slots():
    """Members' and permanent ones, and the leader's own name: whose else they are, nobody is to move theirs after them."""
    found = (slot("b"), slot("c", restart_lsn=0), slot("p", active=False), slot("x"), slot("d", active=False), slot("l", type="logical"), slot("t", temporary=True))
    world = LEADER.but(postgres__row__slots=found, settings__permanent_slots=("p", "l", "t"), dcs__remembered_members={"d": "u"})
    assert published_slots(world.seen) == {"a": LSN, "b": LSN - MiB, "p": LSN - MiB, "d": LSN - MiB}
    assert retained_names(world.seen) == ["a", "b", "c", "d"]
    assert retained_names(world.but(dcs__view__members__c__tags=Tags(nostream=True)).seen) == ["a", "b", "d"]
    assert retained_names(world.but(settings__member_slots_ttl_s=0.0).seen) == ["a", "b", "c"]
    assert published_slots(world.but(settings__use_slots=False).seen) == {}
    assert published_slots(world.but(postgres__row=None).seen) == {}
    assert STATUS["retain_slots"] == retained_names(LEADER.seen)


def test_what_stands_in_the_way_is_told():
    def told(world):
        return [(found.rule, found.because) for found in obstacles(world.seen)]

    assert told(LEADER) == told(REPLICA) == []
    twins = {**LEADER.seen.dcs.view.members, "C": member("C")}
    assert told(LEADER.but(dcs__view__members=twins)) == [("slots.names_differ", "members C and c have one slot, c: rename all but one of them")]
    for world in (LEADER, REPLICA):
        assert world.but(dcs__view__members=twins).decide().summary.endswith("; members C and c have one slot, c: rename all but one of them"), "so the log has it"
    assert told(LEADER.but(postgres__row__slots=(slot("b"), slot("c", type="logical"), slot("p", temporary=True)), settings__permanent_slots=("p",))) == [
        ("slots.name_is_free", "a physical slot c is wanted, and a logical one has its name"),
        ("slots.name_is_free", "a physical slot p is wanted, and a temporary one has its name")]
    left = REPLICA.but(postgres__row__slots=(*HERE, slot("l", type="logical", active=False, restart_lsn=MiB)), postgres__row__replayed_lsn=66 * MiB)
    assert told(left) == [("slots.logical_move_along", "the logical slot l keeps 65.0 MiB of WAL on this standby, and nobody moves it: drop it if it is not to be read from here again")]
    assert told(left.but(postgres__row__replayed_lsn=65 * MiB)) == told(left.but(postgres__row__in_recovery=False, postgres__row__lsn=LSN)) == []
    late = REPLICA.but(settings__permanent_slots=("x",), postgres__row__slots=(*HERE, IDLE), dcs__view__status=_status(x=MiB))
    assert told(late) == [("slots.kept_from_the_readers_position", "x keeps WAL from 0/3F00000 here, its reader is at 0/100000: until it is past, it could not go on here")]
    assert "slots.kept_from_the_readers_position" in {found.rule for found in late.decide().reasons}
    assert told(replace(late, seen=replace(late.seen, settings=replace(late.seen.settings, use_slots=False)))) == []
