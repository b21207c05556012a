"""Nobody writes beside the primary, whatever is stopped, killed or cut off; shortly here, at length in build/chaos.

Rules of this file: the two scenarios without a mark take less than a minute together, since every test run has them.
"""

from __future__ import annotations

import random
import time

import pytest
from chaos_clients import Clients, Exposed, ids, judge, now_us
from chaos_faults import FAULTS

pytestmark = pytest.mark.cluster

TTL_S = 5


def happens(bed, kind, host, length_s, *, clients):
    """The fault on this host; all heal afterwards. (When it began, when it ended)."""
    began_us = now_us()
    with FAULTS[kind].make(bed, host, random.Random(1)):
        end = time.monotonic() + length_s
        while time.monotonic() < end:  # the fault's length is the subject: there is no condition to wait for
            bed.supervise()
            time.sleep(0.05)
    ended_us = now_us()
    bed.wait_healthy(60)
    clients.wait_for_more(50)
    return began_us, ended_us


def verdict(bed, clients, *, exposed=()):
    """No violation, and every node has the same rows."""
    clients.stop()
    leader = bed.wait_healthy(60)
    found = judge(clients.acks(), ids(leader), durable=False, ttl_s=TTL_S, exposed=exposed)
    for host in bed.hosts:
        bed.wait(lambda host=host: ids(host) == ids(leader), 30, f"{host.name} has the same rows as {leader.name}")
    assert not found.violations, found.violations
    return found


def test_an_agent_stopped_and_cut_off_from_all_and_the_next_primarys_guard_killed(hosts):
    with Clients(hosts) as clients:
        first = hosts.leader()
        happens(hosts, "agent stopped", first, TTL_S * 1.5, clients=clients)
        second = hosts.leader()
        assert second is not first
        happens(hosts, "cut off from everything", second, TTL_S * 1.5, clients=clients)
        third = hosts.leader()
        assert third is not second
        happens(hosts, "guard killed", third, 1, clients=clients)
        assert hosts.leader() is third
        assert verdict(hosts, clients).failovers == 2


def test_agent_and_guard_killed_together_with_a_watchdog_device(hosts_with_watchdog):
    """The device ends the whole node before its lock can pass to another."""
    bed = hosts_with_watchdog
    with Clients(bed) as clients:
        old = bed.leader()
        began_us, _ = happens(bed, "agent and guard killed", old, TTL_S * 1.5, clients=clients)
        assert bed.leader() is not old
        found = verdict(bed, clients)
        ((name, fired_us),) = bed.device.fired
        assert name == old.name
        assert 0 < fired_us - began_us < TTL_S * 1e6
        assert found.failovers == 1


# -- each of them again and again: nobody may ever write beside the primary

LENGTHS_S = (0.5, 4.0, 4.7, 5.0, 5.3, 6.0, 12.0)


@pytest.mark.long
@pytest.mark.parametrize("kind", ["agent stopped", "agent killed", "guard stopped", "guard killed"])
def test_of_agent_or_guard_alone_the_other_protects(hosts, kind):
    """Lengths around the moments at which guard and candidates act."""
    with Clients(hosts) as clients:
        for length_s in LENGTHS_S:
            happens(hosts, kind, hosts.leader(), length_s, clients=clients)
        verdict(hosts, clients)


@pytest.mark.long
def test_agent_and_guard_killed_together_with_a_watchdog_device_again_and_again(hosts_with_watchdog):
    bed = hosts_with_watchdog
    with Clients(bed) as clients:
        for length_s in (8, 12, 8, 12):
            happens(bed, "agent and guard killed", bed.leader(), length_s, clients=clients)
        verdict(bed, clients)
        assert len(bed.device.fired) == 4


@pytest.mark.long
def test_agent_and_guard_killed_together_without_a_device_is_measured(hosts):
    """What README promises not to prevent: shown here so that it is not forgotten when it becomes possible."""
    with Clients(hosts) as clients:
        old = hosts.leader()
        began_us, ended_us = happens(hosts, "agent and guard killed", old, TTL_S * 3, clients=clients)
        found = verdict(hosts, clients, exposed=[Exposed(old.name, began_us, ended_us + 5_000_000)])
        ((node, seconds, lost),) = found.exposures
        print(f"two writers for {seconds:.2f} s, {lost} rows lost")
        assert node == old.name
        assert seconds > 0
