"""Processes die or hang, at ttl 5. In each: nobody writes beside the primary, and what may be lost is bounded."""

import signal
import threading
import time

import pytest
from traffic import Traffic

pytestmark = pytest.mark.cluster

#: Replication to streaming standbys takes milliseconds; a second covers a busy machine.
IN_FLIGHT_S = 1.0


def test_a_killed_postmaster_is_restarted_in_place_and_its_orphans_write_nothing_more(cluster):
    with Traffic(cluster) as traffic:
        old = cluster.leader()
        traffic.add("pipeline", old)
        traffic.add("procedure", old)
        traffic.wait_for_more(2000, kind="pipeline")
        traffic.wait_for_more(2000, kind="procedure")
        traffic.fault(f"kill -9 for the postmaster of {old.name}")
        assert old.postmaster().send(signal.SIGKILL)
        traffic.wait_for_more(2000, kind="pipeline")
        traffic.wait_for_more(2000, kind="procedure")
        verdict = traffic.finish()
        assert len(verdict.reigns) == 2
        assert {reign.timeline for reign in verdict.reigns} == {verdict.reigns[0].timeline}, "restarted in place: no new timeline"


def test_agent_and_postgres_killed(cluster):
    with Traffic(cluster) as traffic:
        old = cluster.leader()
        at_s = traffic.fault(f"kill -9 for agent and PostgreSQL of {old.name}")
        old.signal_agent(signal.SIGKILL)
        old.signal_postgres(signal.SIGKILL)
        old.kill_agent()
        cluster.wait_leader(other_than=old, timeout_s=30)
        traffic.wait_for_more(50)
        assert traffic.resumed_after_s(at_s) < cluster.profile.ttl + 3
        old.start_agent()
        traffic.finish(lost_since_s=at_s - IN_FLIGHT_S)


def test_an_agent_killed_and_started_at_once_is_not_noticed_by_any_client(cluster):
    with Traffic(cluster) as traffic:
        leader = cluster.leader()
        postmaster = leader.postmaster()
        failures = len(traffic.failures_of(leader))
        traffic.fault(f"kill -9 for the agent of {leader.name}, started again at once")
        leader.kill_agent()
        leader.start_agent()
        cluster.wait(lambda: (a := leader.get("/primary")) and a.status == 200, 20, "it leads again")
        traffic.wait_for_more(10 * 150)
        verdict = traffic.finish()
        assert len(verdict.reigns) == 1
        assert leader.postmaster() == postmaster
        assert traffic.failures_of(leader)[failures:] == []
        assert verdict.gap.length_s < 1


def test_an_agent_killed_and_not_started_again(cluster):
    """The guard ends its PostgreSQL before the lock can be taken."""
    with Traffic(cluster) as traffic:
        old = cluster.leader()
        at_s = traffic.fault(f"kill -9 for the agent of {old.name}")
        old.kill_agent()
        cluster.wait(lambda: not old.postgres(), cluster.profile.ttl + 1, f"the guard of {old.name} ends its PostgreSQL")
        assert cluster.etcd.value(cluster.key("pgha/lock"))["holder"] == old.name, "nobody has taken the lock yet"
        cluster.wait_leader(other_than=old, timeout_s=30)
        traffic.wait_for_more(50)
        assert traffic.resumed_after_s(at_s) < cluster.profile.ttl + 3
        old.start_agent()
        traffic.finish(lost_since_s=at_s)


@pytest.mark.parametrize("seconds", [15, pytest.param(60, marks=pytest.mark.long)])
def test_a_frozen_agent(cluster, seconds):
    with Traffic(cluster) as traffic:
        old = cluster.leader()
        at_s = traffic.fault(f"SIGSTOP for the agent of {old.name}")
        old.signal_agent(signal.SIGSTOP)
        cluster.wait_leader(other_than=old, timeout_s=30)
        assert not old.postgres()
        traffic.wait_for_more(50)
        assert traffic.resumed_after_s(at_s) < cluster.profile.ttl + 3
        let_pass(at_s + seconds)
        assert old.signal_agent(signal.SIGCONT)
        traffic.finish(lost_since_s=at_s)
        assert cluster.leader() is not old


@pytest.mark.parametrize("seconds", [15, pytest.param(60, marks=pytest.mark.long)])
def test_an_agent_frozen_in_the_middle_of_a_restart(cluster, seconds):
    """What it started before it froze must not come up as a primary after the fence."""
    with Traffic(cluster) as traffic:
        old = cluster.leader()
        before = old.postmaster()
        request = threading.Thread(target=old.request, args=("POST", "/restart", {}), kwargs={"timeout_s": 5})
        request.start()
        while old.postmaster() == before:
            assert request.is_alive(), "the restart ended unseen"
            time.sleep(0.001)
        at_s = traffic.fault(f"SIGSTOP for the agent of {old.name} while it restarts PostgreSQL")
        old.signal_agent(signal.SIGSTOP)
        request.join()
        cluster.wait_leader(other_than=old, timeout_s=30)
        traffic.wait_for_more(50)
        let_pass(at_s + seconds)
        assert old.signal_agent(signal.SIGCONT)
        traffic.finish(lost_since_s=at_s)


def test_a_frozen_postgres_is_killed_and_another_takes_over(cluster):
    with Traffic(cluster) as traffic:
        old = cluster.leader()
        frozen = old.postgres()
        at_s = traffic.fault(f"SIGSTOP for PostgreSQL of {old.name}")
        old.signal_postgres(signal.SIGSTOP)
        cluster.wait_leader(other_than=old, timeout_s=40)
        assert not any(process.alive for process in frozen), "it could have gone on when thawed"
        traffic.finish(lost_since_s=at_s - IN_FLIGHT_S)


def test_a_killed_guard_is_replaced_and_nobody_notices(cluster):
    with Traffic(cluster) as traffic:
        leader = cluster.leader()
        postmaster = leader.postmaster()
        (guard,) = leader.guards()
        traffic.fault(f"kill -9 for the guard of {leader.name}")
        assert guard.send(signal.SIGKILL)
        cluster.wait(lambda: [g for g in leader.guards() if g != guard], 10, "a new guard")
        traffic.wait_for_more(10 * 150)
        verdict = traffic.finish()
        assert len(leader.guards()) == 1
        assert leader.postmaster() == postmaster
        assert len(verdict.reigns) == 1 and verdict.gap.length_s < 1


def test_a_frozen_guard_is_replaced_and_nobody_notices(cluster):
    """Left alone it would protect nobody, and kill a licensed primary when it thaws."""
    with Traffic(cluster) as traffic:
        leader = cluster.leader()
        postmaster = leader.postmaster()
        (guard,) = leader.guards()
        traffic.fault(f"SIGSTOP for the guard of {leader.name}")
        assert guard.send(signal.SIGSTOP)
        cluster.wait(lambda: [g for g in leader.guards() if g != guard], cluster.profile.ttl, "a new guard, before the old one's deadline")
        assert not guard.alive
        traffic.wait_for_more(10 * 150)
        verdict = traffic.finish()
        assert len(leader.guards()) == 1
        assert leader.postmaster() == postmaster
        assert len(verdict.reigns) == 1 and verdict.gap.length_s < 1


def let_pass(until_s: float) -> None:
    """The fault lasts until then: its length is the subject, so here is no condition to wait for."""
    time.sleep(max(0.0, until_s - time.monotonic()))
