"""A Patroni cluster of three nodes is taken over by pgha, node by node, and handed back, while pgbench writes to it.

What is counted: transactions that failed in each phase. Nodes that are replicas change hands without one, and without a
restart of their PostgreSQL; the leader's takes one switchover, at which each client may lose the one that it is in.
"""

from __future__ import annotations

import re
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

import pytest
from mixed_bed import MixedBed, MixedNode, lent

from pgha.demo.processes import run, spawn
from pgha.demo.programs import Program, find_etcd, find_postgres

pytestmark = pytest.mark.long
CLIENTS = 4
ROUND_S = 2


@pytest.fixture
def mixed(all_beds: object, program: Program, bench: Path, request: pytest.FixtureRequest) -> Iterator[MixedBed]:
    bed = MixedBed(bench / "takeover", program, makes=("patroni",) * 3, programs=bench / "program", etcd_program=find_etcd(), bin_dir=find_postgres(), user="postgres")
    yield from lent(bed, request)


class Load:
    """pgbench in rounds of two seconds, at whichever node takes writes; what it did and what failed, by phase."""

    def __init__(self, bed: MixedBed) -> None:
        self._bed = bed
        self._end = threading.Event()
        self._phase = "before"
        self.counts: dict[str, list[int]] = {}      # phase → [transactions done, failed ones, rounds]
        self.nobody: dict[str, int] = {}            # phase → rounds that could not begin, since nobody took writes
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._pgbench = str(bed.settings.bin_dir / "pgbench")
        hosts = ",".join(node.address for node in bed.nodes)
        self._url = f"host={hosts} port={bed.nodes[0].port} user=postgres dbname=postgres target_session_attrs=read-write connect_timeout=2 sslmode=disable gssencmode=disable"
        self._environment = {"PGPASSWORD": bed.settings.password}

    def __enter__(self) -> Self:
        done = run([self._pgbench, "-i", "-q", "-s", "2", self._url], timeout_s=60, environment=self._environment)
        assert done.returncode == 0, done.stderr
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._end.set()
        self._thread.join(30)
        for name, (done, failed, rounds) in self.counts.items():
            print(f"{name}: {done} transactions, {failed} failed ({rounds} rounds of pgbench with {CLIENTS} clients, {self.nobody.get(name, 0)} could not begin)")

    def phase(self, name: str) -> None:
        """What begins from now on belongs to it; the round that is under way has ended when this returns, and it has written."""
        before, self._phase = self._phase, name
        self.wait_for_rounds(2, name)
        assert before != name

    def wait_for_rounds(self, rounds: int, name: str) -> None:
        goal = self.counts.get(name, [0, 0, 0])[2] + rounds
        deadline = time.monotonic() + 40
        while self.counts.get(name, [0, 0, 0])[2] < goal:
            assert time.monotonic() < deadline, f"pgbench does not get through any more: {self.counts}"
            time.sleep(0.05)

    @property
    def done(self) -> int:
        return sum(done for done, _, _ in self.counts.values())

    @property
    def failed(self) -> int:
        return sum(failed for _, failed, _ in self.counts.values())

    def _work(self) -> None:
        log = self._bed.directory / "pgbench.log"
        while not self._end.is_set():
            name = self._phase
            began = log.stat().st_size if log.exists() else 0
            child = spawn([self._pgbench, "-n", "-c", str(CLIENTS), "-j", "1", "-T", str(ROUND_S), self._url], log=log, directory=self._bed.directory,
                          environment=self._environment)
            try:
                child.wait(30)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait(10)
            with log.open(encoding="utf-8", errors="replace") as text:
                text.seek(began)
                said = text.read()
            if "could not connect" in said or "connection to server" in said:
                self.nobody[name] = self.nobody.get(name, 0) + 1
                time.sleep(0.1)
                continue
            count = self.counts.setdefault(name, [0, 0, 0])
            count[0] += sum(map(int, re.findall(r"transactions actually processed: (\d+)", said)))
            count[1] += len(re.findall(r"client \d+ (?:aborted|script \d+ aborted)", said)) + sum(map(int, re.findall(r"number of failed transactions: (\d+)", said)))
            count[2] += 1


def test_takeover_of_a_patroni_cluster_node_by_node_and_back(mixed: MixedBed) -> None:
    mixed.start_etcd()
    first, second, third = mixed.nodes
    first.start_agent()
    mixed.wait_leader(timeout_s=60)
    second.start_agent()
    third.start_agent()
    assert mixed.wait_healthy(90) is first
    layout = {node.name: sorted(path.name for path in node.data_dir.glob("postgresql*.conf")) for node in mixed.nodes}
    for node in mixed.nodes:
        assert "0 missing" in node.import_configuration()
    with Load(mixed) as load:
        load.phase("Patroni alone")

        load.phase("two replicas, Patroni to pgha")
        for node in (second, third):
            _swap(mixed, node, to="pgha")
        assert mixed.wait_healthy(60) is first
        load.phase("switchover from Patroni to pgha")
        assert 'Successfully switched over to "n2"' in mixed.patronictl("switchover", "demo", "--leader", "n1", "--candidate", "n2", "--force")
        assert mixed.wait_healthy(60) is second
        load.phase("the last node, Patroni to pgha")
        _swap(mixed, first, to="pgha")
        assert mixed.wait_healthy(60) is second

        load.phase("pgha alone")
        assert [node.patroni().get("pending_restart") for node in mixed.nodes] == [None] * 3
        assert {node.name: sorted(path.name for path in node.data_dir.glob("postgresql*.conf")) for node in mixed.nodes} == layout
        assert all((node.data_dir / "patroni.dynamic.json").exists() for node in mixed.nodes)

        # Not what the README says first, but it has to work: the leader itself, in pause, within a ttl.
        load.phase("the leader in pause, pgha to Patroni")
        _swap(mixed, second, to="patroni")
        assert mixed.wait_healthy(60) is second
        load.phase("the leader in pause, Patroni to pgha")
        _swap(mixed, second, to="pgha")
        assert mixed.wait_healthy(60) is second

        load.phase("two replicas, pgha to Patroni")
        for node in (first, third):
            _swap(mixed, node, to="patroni")
        assert mixed.wait_healthy(60) is second
        load.phase("switchover from pgha to Patroni")
        assert 'Successfully switched over to "n1"' in mixed.ctl("switchover", "--leader", "n2", "--candidate", "n1", "--force", node=second)
        assert mixed.wait_healthy(60) is first
        load.phase("the last node, pgha to Patroni")
        _swap(mixed, second, to="patroni")
        assert mixed.wait_healthy(60) is first
        load.phase("Patroni alone again")
    switchovers = [name for name in load.counts if name.startswith("switchover")]
    assert len(switchovers) == 2
    for name, (done, failed, _) in load.counts.items():
        assert done > 0, name
        assert failed <= (CLIENTS if name in switchovers else 0), (name, failed)
        assert name in switchovers or name not in load.nobody, (name, load.nobody)
    rows = first.ask("SELECT count(*) FROM pgbench_history")
    print(f"{load.done} transactions were acknowledged, {load.failed} failed, {rows} are there")
    assert load.done <= rows <= load.done + load.failed + CLIENTS * 2


def _swap(bed: MixedBed, node: MixedNode, *, to: str) -> None:
    """As the README says it, in pause: the agent stops, PostgreSQL goes on, the other agent adopts it."""
    before = (node.postmaster(), node.ask("SELECT pg_postmaster_start_time()::text"))
    leads = node.says_primary()
    bed.ctl("pause", "--wait", node=node)
    node.stop_agent()
    if to == "patroni":
        assert "another agent may be started" in _leave(bed, node)
        assert not node.guards()
    node.make = to      # type: ignore[assignment]
    node.start_agent()
    bed.wait(lambda: ("pgha" in node.patroni()) is (to == "pgha") and _does_its_part(node, leads=leads), 30, f"{node.name} under {to}")
    bed.ctl("resume", "--wait", node=node)
    bed.wait(lambda: _does_its_part(node, leads=leads), 20, f"{node.name} is what it was")
    assert (node.postmaster(), node.ask("SELECT pg_postmaster_start_time()::text")) == before, "PostgreSQL was restarted"


def _does_its_part(node: MixedNode, *, leads: bool) -> bool:
    answer = node.get("/primary" if leads else "/replica")
    return answer is not None and answer.status == 200 and (leads or node.patroni().get("replication_state") == "streaming")


def _leave(bed: MixedBed, node: MixedNode) -> str:
    program = bed.settings.program
    said = run([*program.argv, "leave", str(node.config_path)], timeout_s=20, user=bed.settings.user, environment={**program.environment, "RUNTIME_DIRECTORY": str(node.runtime)})
    assert said.returncode == 0, said.stdout + said.stderr
    return said.stdout
