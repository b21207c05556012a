"""One cluster of a real Patroni and of pgha: each follows the other, switches over to it and fails over to it.

With synchronous replication from the first failover on, so that nothing that was acknowledged may be lost on the way.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from mixed_bed import MixedBed, MixedNode, lent
from traffic import Traffic

from pgha.demo.bed import Bed
from pgha.demo.programs import Program, find_etcd, find_postgres
from pgha.model.cluster import slot_name


@pytest.fixture
def mixed(all_beds: object, program: Program, bench: Path, request: pytest.FixtureRequest) -> Iterator[MixedBed]:
    """n1 is Patroni's, n2 is pgha's; nothing is started."""
    bed = MixedBed(bench / "mixed", program, makes=("patroni", "pgha"), programs=bench / "program", etcd_program=find_etcd(), bin_dir=find_postgres(), user="postgres")
    yield from lent(bed, request)


def test_patroni_and_pgha_lead_one_cluster_in_turn(mixed: MixedBed) -> None:
    patroni, ours = mixed.nodes
    mixed.start_etcd()
    patroni.start_agent()
    mixed.wait_leader(timeout_s=60)
    ours.start_agent()
    assert mixed.wait_healthy(60) is patroni
    _replicates(patroni, ours)
    assert mixed.leased("leader")
    assert not mixed.text("pgha/lock"), "nobody of ours has led"
    with Traffic(mixed) as traffic:
        traffic.fault("switchover to pgha, by patronictl")
        assert 'Successfully switched over to "n2"' in mixed.patronictl("switchover", "demo", "--leader", "n1", "--candidate", "n2", "--force")
        assert mixed.wait_healthy(60) is ours
        _replicates(ours, patroni)
        lock = mixed.etcd.value(mixed.key("pgha/lock"))
        assert (lock["holder"], lock["mixed"], mixed.text("leader"), mixed.leased("leader")) == ("n2", True, "n2", True)
        assert lock["ttl_s"] == 20
        _tells_the_same(mixed, leader="n2")

        traffic.fault("switchover to Patroni, by pgha ctl")
        assert 'Successfully switched over to "n1"' in mixed.ctl("switchover", "--leader", "n2", "--candidate", "n1", "--force", node=ours)
        assert mixed.wait_healthy(60) is patroni
        assert mixed.etcd.value(mixed.key("pgha/lock"))["mode"] == "released"
        _tells_the_same(mixed, leader="n1")
        traffic.finish()

    mixed.patronictl("edit-config", "demo", "-s", "synchronous_mode=true", "--force", "-q")
    mixed.wait(lambda: _sync(mixed) == ("n1", "n2"), 30, "/sync names n2 beside n1")
    with Traffic(mixed) as traffic:
        _dies(traffic, patroni)
        assert mixed.wait_leader(other_than=patroni, timeout_s=60) is ours
        patroni.start_agent()
        assert mixed.wait_healthy(90) is ours
        mixed.wait(lambda: _sync(mixed) == ("n2", "n1"), 30, "/sync names n1 beside n2")

        _dies(traffic, ours)
        assert mixed.wait_leader(other_than=ours, timeout_s=60) is patroni
        ours.start_agent()
        assert mixed.wait_healthy(90) is patroni
        mixed.wait(lambda: _sync(mixed) == ("n1", "n2"), 30, "/sync names n2 beside n1 again")
        traffic.finish()
    assert [row[4] for row in mixed.etcd.value(mixed.key("history"))] == ["n2", "n1", "n2", "n1"]


def _sync(bed: Bed) -> tuple[str, str]:
    value = bed.etcd.value(bed.key("sync")) or {}
    return value.get("leader") or "", value.get("sync_standby") or ""


def _dies(traffic: Traffic, node: MixedNode) -> None:
    """Agent, guard and PostgreSQL at once."""
    traffic.fault(f"{node.name} ({node.make}) is killed")
    node.kill_agent()
    for guard in node.guards():
        guard.send(signal.SIGKILL)
    node.signal_postgres(signal.SIGKILL)


def _replicates(leader: MixedNode, standby: MixedNode) -> None:
    """By member name and slot, as each of both expects it of the other."""
    assert leader.ask("SELECT array_agg(application_name || ' ' || state) FROM pg_stat_replication") == [f"{standby.name} streaming"]
    assert leader.ask(f"SELECT active FROM pg_replication_slots WHERE slot_name = '{slot_name(standby.name)}'") is True
    conninfo = standby.ask("SELECT current_setting('primary_conninfo')")
    assert f"host={leader.address}" in conninfo
    assert "password=" not in conninfo, "it is in the passfile"


def _tells_the_same(bed: MixedBed, *, leader: str) -> None:
    """Both programs, and both agents, of one cluster."""
    ours = next(node for node in bed.nodes if node.make == "pgha")
    for said in (bed.patronictl("list", "demo"), bed.ctl("list", node=ours)):
        assert [line.split()[1] for line in said.splitlines() if " Leader " in line] == [leader], said
    for node in bed.nodes:
        answer = node.get("/cluster")
        assert answer is not None
        assert {m["name"]: m["role"] for m in answer.body["members"]} == {n.name: "leader" if n.name == leader else "replica" for n in bed.nodes}
    deadline = time.monotonic() + 10
    while any(node.get("/primary").status != (200 if node.name == leader else 503) for node in bed.nodes):      # type: ignore[union-attr]
        assert time.monotonic() < deadline
        time.sleep(0.1)
