"""The model by itself: what the checkers' judgements rest on."""

from __future__ import annotations

from tests.simulation.checkers import Truth
from tests.simulation.network import Network
from tests.simulation.postgres import START_LSN, SYSTEM, Branch, DataDir, Instance, common, contains, parse_synchronous
from tests.simulation.scheduler import SECOND, Scheduler
from tests.simulation.trace import Trace


class Seen(Truth):
    def __init__(self) -> None:
        super().__init__()
        self.log: list[str] = []

    def accepting(self, instance: Instance, now: bool) -> None:
        self.log.append(f"{instance.name} {'accepts' if now else 'ends'}")

    def forked(self, instance: Instance) -> None:
        self.log.append(f"{instance.name} forked")

    def mixed(self, instance: Instance, upstream: Instance) -> None:
        self.log.append(f"{instance.name} mixed with {upstream.name}")


def cluster(names: str = "ab") -> tuple[Scheduler, Network, dict[str, Instance], Seen]:
    scheduler = Scheduler(1)
    network, truth = Network(scheduler), Seen()
    nodes: dict[str, Instance] = {}
    trunk = Branch(1, None, START_LSN)
    for name in names:
        nodes[name] = Instance(name, scheduler, network, Trace(scheduler), nodes, truth)
        nodes[name].dir = DataDir(content="valid", system_identifier=SYSTEM, branch=trunk, lsn=START_LSN, standby_signal=name != names[0], state="shut down",
                                  control_timeline=1, checkpoint_lsn=START_LSN)
        nodes[name].conf_upstream = names[0] if name != names[0] else None
    return scheduler, network, nodes, truth


def test_branches_tell_exactly_who_has_what() -> None:
    trunk = Branch(1, None, 0)
    left, right = Branch(2, trunk, 100), Branch(2, trunk, 120)
    assert contains(left, 500, trunk, 100)
    assert not contains(left, 500, trunk, 101), "what came behind the fork is lost to it"
    assert not contains(left, 500, right, 121)
    assert common(left, 500, right, 400) == (trunk, 100)


def test_a_standby_streams_and_follows_a_promotion() -> None:
    scheduler, _, nodes, _ = cluster("abc")
    for node in nodes.values():
        node.start()
    scheduler.run_until(30 * SECOND)
    assert nodes["a"].accepting
    nodes["a"].commit(100, lambda _: None)
    scheduler.run_until(31 * SECOND)
    assert nodes["b"].dir.lsn == nodes["a"].dir.lsn
    nodes["a"].kill_all()
    nodes["b"].request_promotion()
    nodes["c"].conf_upstream = "b"
    nodes["c"].reload()
    scheduler.run_until(40 * SECOND)
    assert nodes["b"].accepting
    assert not nodes["b"].dir.standby_signal
    assert nodes["c"].dir.timeline == 2
    assert nodes["c"].dir.lsn == nodes["b"].dir.lsn


def test_orphans_go_on_acknowledging() -> None:
    scheduler, _, nodes, truth = cluster("a")
    nodes["a"].start()
    scheduler.run_until(20 * SECOND)
    nodes["a"].kill_postmaster()
    assert nodes["a"].accepting
    assert nodes["a"].commit(100, lambda _: None)
    nodes["a"].kill_all()
    assert truth.log == ["a accepts", "a ends"]


def test_synchronous_commit_waits_and_a_reload_to_nothing_acknowledges() -> None:
    scheduler, network, nodes, _ = cluster()
    nodes["a"].conf_synchronous = "b"
    for node in nodes.values():
        node.start()
    scheduler.run_until(30 * SECOND)
    answers: list[str] = []
    nodes["a"].commit(100, answers.append)
    assert answers == []
    scheduler.run_until(31 * SECOND)
    assert answers == ["acked"]
    network.cut(["a"], ["b"])
    nodes["a"].commit(100, answers.append)
    scheduler.run_until(32 * SECOND)
    assert answers == ["acked"]
    nodes["a"].conf_synchronous = ""
    nodes["a"].reload()
    scheduler.run_until(33 * SECOND)
    assert answers == ["acked", "acked"]


def test_two_that_write_one_timeline_are_told_apart() -> None:
    scheduler, network, nodes, truth = cluster()
    nodes["b"].dir.standby_signal = False
    for node in nodes.values():
        node.start()
    scheduler.run_until(30 * SECOND)
    nodes["a"].commit(100, lambda _: None)
    nodes["b"].commit(100, lambda _: None)
    assert "b forked" in truth.log or "a forked" in truth.log
    assert not contains(nodes["a"].dir.branch, nodes["a"].dir.lsn, nodes["b"].dir.branch, nodes["b"].dir.lsn)  # type: ignore[arg-type]


def test_a_stopped_postmaster_sees_signals_when_it_goes_on() -> None:
    scheduler, _, nodes, _ = cluster("a")
    nodes["a"].start()
    scheduler.run_until(20 * SECOND)
    nodes["a"].freeze(everything=False)
    nodes["a"].signal("INT")
    scheduler.run_until(30 * SECOND)
    assert nodes["a"].accepting, "its backends go on"
    nodes["a"].thaw()
    scheduler.run_until(31 * SECOND)
    assert not nodes["a"].lives


def test_synchronous_standby_names() -> None:
    assert parse_synchronous("FIRST 1 (a,b)") == ("FIRST", 1, ("a", "b"))
    assert parse_synchronous('ANY 2 ("a", b,c)') == ("ANY", 2, ("a", "b", "c"))
    assert parse_synchronous("*") == ("FIRST", 1, ("*",))
