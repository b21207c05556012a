"""Nodes that know something nobody else does come back: by pg_rewind, without a clone, on the one true timeline."""

import re
import signal
from pathlib import Path

import pytest
from traffic import Traffic

from pgha.demo.node import Node
from pgha.demo.processes import Process, signal_all

pytestmark = pytest.mark.cluster


def walsenders(node: Node) -> list[Process]:
    return [p for p in node.postgres() if b"walsender" in Path(f"/proc/{p.pid}/cmdline").read_bytes()]


def kill_node(node: Node) -> None:
    node.signal_agent(signal.SIGKILL)
    node.signal_postgres(signal.SIGKILL)
    node.kill_agent()


def clones(node: Node) -> list[str]:
    """Directories that a clone leaves behind, or is."""
    return [p.name for p in node.directory.iterdir() if re.match(r"data\.(clone|failed)", p.name)]


def test_an_old_primary_with_wal_of_its_own_is_rewound(cluster):
    with Traffic(cluster) as traffic:
        old = cluster.leader()
        inode = old.data_dir.stat().st_ino
        at_s = traffic.fault(f"{old.name} sends no more WAL")
        signal_all(walsenders(old), signal.SIGSTOP)
        traffic.wait_for_more(100)
        traffic.fault(f"kill -9 for agent and PostgreSQL of {old.name}")
        kill_node(old)
        cluster.wait_leader(other_than=old, timeout_s=30)
        traffic.wait_for_more(50)
        old.start_agent()
        verdict = traffic.finish(lost_since_s=at_s - 1)
        assert len(verdict.lost) >= 50, "the scenario needs rows that only the old primary had"
        assert old.data_dir.stat().st_ino == inode and not clones(old), "it was cloned"
        assert "outcome=rewound" in old.log_tail(400)


def test_two_promotions_unknown_to_each_other_have_different_timelines(cluster):
    """n-first dies, second takes over unseen by third, dies; third takes over. Then all come back."""
    with Traffic(cluster) as traffic:
        first = cluster.leader()
        second, third = (node for node in cluster.nodes if node is not first)
        kill_node(third)
        traffic.wait_for_more(20)
        at_s = traffic.fault(f"{first.name} dies, {third.name} is down already")
        kill_node(first)
        cluster.wait_leader(other_than=first, timeout_s=30)
        traffic.wait_for_more(50)
        traffic.fault(f"{second.name} dies, {third.name} is started")
        kill_node(second)
        third.start_agent()
        cluster.wait(lambda: cluster.leader() is third, 60, f"{third.name} leads")
        traffic.wait_for_more(50)
        first.start_agent()
        second.start_agent()
        verdict = traffic.finish(lost_since_s=at_s - 5)
        timelines = {reign.node: reign.timeline for reign in verdict.reigns}
        assert timelines[first.name] < timelines[second.name] < timelines[third.name], str(verdict)
        assert not clones(first) and not clones(second)
