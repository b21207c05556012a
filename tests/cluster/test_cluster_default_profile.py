"""The three faults that hang on the lock's times, once more at the default profile (ttl 30, loop_wait 10)."""

import signal

import pytest
from test_cluster_crashes import let_pass
from test_cluster_store import etcd_away
from traffic import Traffic

from pgha.demo.node import DEFAULT

pytestmark = [pytest.mark.cluster, pytest.mark.long]


@pytest.fixture
def slow(beds):
    return beds.whole(profile=DEFAULT)


def test_a_frozen_agent(slow):
    with Traffic(slow) as traffic:
        old = slow.leader()
        at_s = traffic.fault(f"SIGSTOP for the agent of {old.name}")
        old.signal_agent(signal.SIGSTOP)
        slow.wait_leader(other_than=old, timeout_s=60)
        assert not old.postgres()
        let_pass(at_s + 60)
        assert old.signal_agent(signal.SIGCONT)
        traffic.finish(lost_since_s=at_s)


def test_an_agent_killed_and_started_at_once(slow):
    with Traffic(slow) as traffic:
        leader = slow.leader()
        postmaster = leader.postmaster()
        traffic.fault(f"kill -9 for the agent of {leader.name}, started again at once")
        leader.kill_agent()
        leader.start_agent()
        traffic.wait_for_more(35 * 150, timeout_s=120)
        verdict = traffic.finish()
        assert len(verdict.reigns) == 1 and leader.postmaster() == postmaster


def test_an_agent_killed_and_not_started_again(slow):
    with Traffic(slow) as traffic:
        old = slow.leader()
        at_s = traffic.fault(f"kill -9 for the agent of {old.name}")
        old.kill_agent()
        slow.wait(lambda: not old.postgres(), slow.profile.ttl + 1, f"the guard of {old.name} ends its PostgreSQL")
        slow.wait_leader(other_than=old, timeout_s=60)
        old.start_agent()
        traffic.finish(lost_since_s=at_s)


def test_etcd_away_for_40_seconds(slow):
    etcd_away(slow)
