"""Each checker fires on a violation made by hand, and on nothing less: one that cannot fail proves nothing."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from pgha.dcs import Put
from pgha.dcs.keys import encode
from pgha.model.lock import LockRecord
from tests.simulation.postgres import START_LSN, SYSTEM, Branch, DataDir
from tests.simulation.reader import SLOT
from tests.simulation.scheduler import SECOND
from tests.simulation.simulation import KEYS, Options, Simulation


def world(**changes: Any) -> Simulation:
    """Three nodes with data, each with a licence, an agent and a guard that could act; nothing happens by itself."""
    sim = Simulation(Options(seed=1, nodes=3, ttl=30, program=()))
    trunk = Branch(1, None, START_LSN)
    alive = SimpleNamespace(alive=True, frozen=False)
    for host in sim.hosts.values():
        host.instance.dir = DataDir(content="valid", system_identifier=SYSTEM, branch=trunk, lsn=START_LSN + 1000)
        host.agent = host.guard = SimpleNamespace(process=alive)
        host.bare = False
        host.valid_until = host.clock.now().plus_s(20)
    trunk.end = START_LSN + 1000
    sim.config |= {"maximum_lag_on_failover": 100, **changes}
    return sim


def holds_lock(sim: Simulation, name: str, *, lsn: int = START_LSN) -> None:
    record = LockRecord(holder=name, node_id=f"id-{name}", incarnation="x", sequence=1, ttl_s=30.0, lsn=lsn, timeline=1)
    sim.store.world.transact([], [Put(key=KEYS.path("pgha/lock"), value=encode(record))])
    sim._notice_publication()


def promoted(sim: Simulation, name: str, *, number: int = 2, at: int = START_LSN + 1000) -> None:
    instance = sim.instances[name]
    instance.dir.branch = Branch(number, instance.dir.branch, at)
    instance.dir.lsn = at
    holds_lock(sim, name, lsn=at)
    sim.truth.becomes_primary(instance, "promotion")


def two_primaries(sim: Simulation) -> None:
    sim.truth.accepting(sim.instances["n1"], True)
    sim.truth.accepting(sim.instances["n2"], True)


def a_promise_is_lost(sim: Simulation) -> None:
    sim.store.world.transact([], [Put(key=KEYS.path("sync"), value=b'{"leader":"n1","sync_standby":"n2"}'),
                                  Put(key=KEYS.path("config"), value=b'{"synchronous_mode":true}')])
    one = sim.instances["n1"]
    sim.truth.acknowledged(one, one.dir.branch, START_LSN + 900)
    promoted(sim, "n3", at=START_LSN + 800)


def too_much_is_lost(sim: Simulation) -> None:
    one = sim.instances["n1"]
    sim.truth.becomes_primary(one, "start")
    one.dir.branch.acknowledged.append((START_LSN + 900, 1))        # type: ignore[union-attr]
    holds_lock(sim, "n1", lsn=START_LSN + 900)
    promoted(sim, "n3", at=START_LSN + 700)


def written_for_too_long(sim: Simulation) -> None:
    """n1 is cut off, and nobody there ends its primary."""
    one = sim.instances["n1"]
    sim.truth.becomes_primary(one, "start")
    sim.config["failsafe_mode"] = False
    sim.scheduler.now_ns = SECOND
    holds_lock(sim, "n1", lsn=START_LSN + 100)
    sim.scheduler.now_ns += 2 * round(sim.longest_ttl_s) * SECOND
    sim.hosts["n3"].valid_until = sim.hosts["n3"].clock.now().plus_s(20)
    one.dir.branch.acknowledged.append((START_LSN + 900, sim.scheduler.now_ns))        # type: ignore[union-attr]
    sim.truth.acknowledged(one, one.dir.branch, START_LSN + 900)
    promoted(sim, "n3", at=START_LSN + 700)


def promotion_without_licence(sim: Simulation) -> None:
    sim.hosts["n2"].valid_until = None
    promoted(sim, "n2")


def promotion_beside_the_lock(sim: Simulation) -> None:
    holds_lock(sim, "n1")
    sim.truth.becomes_primary(sim.instances["n2"], "promotion")


def one_number_twice(sim: Simulation) -> None:
    promoted(sim, "n2", number=2)
    promoted(sim, "n3", number=2)


def two_write_one_timeline(sim: Simulation) -> None:
    sim.truth.forked(sim.instances["n2"])


def rows_of_two_branches(sim: Simulation) -> None:
    sim.truth.mixed(sim.instances["n2"], sim.instances["n1"])


def half_rewound(sim: Simulation) -> None:
    sim.truth.started_half_rewound(sim.instances["n2"])


def history_lies(sim: Simulation) -> None:
    promoted(sim, "n2", number=2)
    sim.store.world.transact([], [Put(key=KEYS.path("history"), value=b'[[1,5,"no reason"]]')])
    sim.checkers["TimelinesAreTold"].settled(sim.instances["n2"])


def history_is_missing(sim: Simulation) -> None:
    promoted(sim, "n2", number=2)
    sim.checkers["TimelinesAreTold"].settled(sim.instances["n2"])


def the_newest_copy_goes(sim: Simulation) -> None:
    one = sim.instances["n1"]
    one.dir.lsn = START_LSN + 2000
    sim.truth.acknowledged(one, one.dir.branch, START_LSN + 2000)
    gone, one.dir = one.dir, DataDir()
    sim.truth.removed(one, gone)


def _with_slot(sim: Simulation, *, begin: int) -> Any:
    sim.config["slots"] = {SLOT: {"type": "physical"}}
    one = sim.instances["n1"]
    one.dir.slots_begin[SLOT], one.dir.slots[SLOT] = begin, START_LSN + 500
    return one


def a_slot_moves_past_its_reader(sim: Simulation) -> None:
    sim.truth.reads(_with_slot(sim, begin=START_LSN + 100), START_LSN + 499)


def a_permanent_slot_is_dropped(sim: Simulation) -> None:
    _with_slot(sim, begin=START_LSN).drop_slot(SLOT)


def changes_without_faults(sim: Simulation) -> None:
    promoted(sim, "n2", number=2)
    promoted(sim, "n3", number=3)
    sim.checkers["NoFlapping"].judge(0)


def too_many_requests(sim: Simulation) -> None:
    sim.checkers["TrafficIsBounded"].judge(200, 60.0, 3, 30.0, 10.0)


def nobody_leads(sim: Simulation) -> None:
    sim.checkers["ComesBack"].judge(sim.why_not_settled(), 60.0)


VIOLATIONS: list[tuple[str, Callable[[Simulation], None]]] = [
    ("OnePrimary", two_primaries), ("NothingPromisedIsLost", a_promise_is_lost), ("LossIsBounded", too_much_is_lost), ("LossIsBounded", written_for_too_long),
    ("PromotesUnderTheLock", promotion_without_licence), ("PromotesUnderTheLock", promotion_beside_the_lock), ("TimelinesAreTold", one_number_twice),
    ("TimelinesAreTold", two_write_one_timeline), ("TimelinesAreTold", rows_of_two_branches), ("TimelinesAreTold", half_rewound),
    ("TimelinesAreTold", history_lies), ("TimelinesAreTold", history_is_missing), ("NewestCopyStays", the_newest_copy_goes),
    ("ReaderGoesOn", a_slot_moves_past_its_reader), ("ReaderGoesOn", a_permanent_slot_is_dropped),
    ("NoFlapping", changes_without_faults), ("TrafficIsBounded", too_many_requests), ("ComesBack", nobody_leads),
]


@pytest.mark.parametrize(("checker", "make"), VIOLATIONS, ids=[v[1].__name__ for v in VIOLATIONS])
def test_a_violation_is_found_by_its_checker_alone(checker: str, make: Callable[[Simulation], None]) -> None:
    sim = world()
    make(sim)
    assert {v.checker for v in sim.violations} == {checker}, sim.violations


def test_an_orderly_promotion_is_none() -> None:
    sim = world()
    sim.truth.accepting(sim.instances["n1"], True)
    sim.truth.accepting(sim.instances["n1"], False)
    promoted(sim, "n2")
    sim.truth.accepting(sim.instances["n2"], True)
    assert sim.violations == []


@pytest.mark.parametrize("make", [two_primaries, written_for_too_long], ids=lambda f: f.__name__)
def test_agent_and_guard_both_gone_is_an_exposure(make: Callable[[Simulation], None]) -> None:
    sim = world()
    dead = SimpleNamespace(alive=False, frozen=False)
    sim.hosts["n1"].agent = sim.hosts["n1"].guard = SimpleNamespace(process=dead)
    make(sim)
    assert sim.violations == []
    assert len(sim.exposures) == 1


def test_a_slot_that_was_made_after_its_reader_had_passed_promises_nothing() -> None:
    sim = world()
    one = _with_slot(sim, begin=START_LSN + 450)
    sim.truth.reads(one, START_LSN + 400)
    sim.truth.reads(one, START_LSN + 500)
    one.make_slot("another")
    one.drop_slot("another")
    assert sim.violations == []
