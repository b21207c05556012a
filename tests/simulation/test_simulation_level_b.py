"""Level (b): the agent as it ships. What `virtual` takes from trio is still there; stories repeat; a small budget is clean."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import trio
import trio._core._run as core

from pgha.postgres.files import read_dynamic_cache
from tests.simulation.level_b import ShippedWorld
from tests.simulation.main import failure, many
from tests.simulation.scheduler import Scheduler
from tests.simulation.simulation import Options
from tests.simulation.virtual import Dead, Process, Run, pause

#: The test command's share; build/simulate --level b runs for longer.
SECONDS = float(os.environ.get("PGHA_SIMULATION_SECONDS", "45"))
ROOT = Path(__file__).parents[2]
SHORT = ["--level", "b", "--nodes", "3", "--ttl", "20", "--faults", "12", "--for", "400"]


def test_what_trio_keeps_for_itself_is_still_there() -> None:
    """If this fails, a new trio needs another tests/simulation/virtual.py."""
    assert core._ALLOW_DETERMINISTIC_SCHEDULING in (True, False)
    assert core._r.random() < 1
    assert callable(core.setup_runner)
    assert callable(core.unrolled_run)
    assert {"runq", "deadlines", "tasks", "io_manager"} <= {a.name for a in core.Runner.__attrs_attrs__}  # type: ignore[attr-defined]


def steps(seed: int) -> list[str]:
    """Two processes, of which one is frozen for a while and one is killed."""
    scheduler = Scheduler(seed)
    run, log = Run(scheduler), []

    async def work(process: Process) -> None:
        try:
            async with trio.open_nursery() as nursery:
                for number in range(3):
                    nursery.start_soon(count, process, number)
        finally:
            process.check()
            log.append(f"{process.name} cleans up")

    async def count(process: Process, number: int) -> None:
        for turn in range(4):
            await trio.sleep(1.0) if turn % 2 else await pause(scheduler, 1.0)
            process.check()
            log.append(f"{scheduler.now_s:g} {process.name} {number}")

    frozen, killed = Process("frozen"), Process("killed")
    for process in (frozen, killed):
        async def main(process: Process = process) -> None:
            try:
                await work(process)
            except* Dead:
                pass
        run.spawn(process, main)
    scheduler.after(1.5, frozen.freeze)
    scheduler.after(7.5, frozen.thaw)
    scheduler.after(2.5, killed.kill)
    assert run.until(20.0, lambda: False)
    run.end()
    return log


def test_a_frozen_process_does_nothing_and_goes_on_later_and_a_killed_one_never_cleans_up() -> None:
    log = steps(1)
    assert [line for line in log if "frozen" in line and line[0] in "234567"] == [line for line in log if line.startswith("7.5 frozen")]
    assert len([line for line in log if " frozen " in line]) == 12
    assert len([line for line in log if " killed " in line]) == 6, "nothing after 2.5 s"
    assert "frozen cleans up" in log
    assert "killed cleans up" not in log


def test_order_follows_from_the_seed() -> None:
    assert steps(1) == steps(1)
    assert any(steps(1) != steps(seed) for seed in range(2, 6))


def test_a_copy_of_the_data_gets_the_configuration_of_the_cluster() -> None:
    """It was read from the store before there was a data directory to keep it in."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as root:       # short: sockets lie there
        world = ShippedWorld(Options(seed=1, level="b", nodes=3, ttl=30, program=()), Path(root))
        try:
            assert world.run.until(60.0, lambda: world.violations)
            assert not world.why_not_settled()
            kept = {h.name: read_dynamic_cache(h.disk.data_dir) for h in world.hosts.values()}
        finally:
            world.close()
    assert all(kept.values()), kept


def transcript(seed: int, hash_seed: str) -> str:
    done = subprocess.run([sys.executable, "-m", "tests.simulation.main", "--seed", str(seed), "--trace", *SHORT], cwd=ROOT, capture_output=True, text=True, check=True,
                          env={**os.environ, "PYTHONHASHSEED": hash_seed})
    return done.stdout


def test_the_same_seed_is_the_same_transcript_in_another_process() -> None:
    first = transcript(8, "1")
    assert len(first.splitlines()) > 100
    assert first == transcript(8, "2")


def test_a_budget_of_random_programs_is_clean() -> None:
    volume, failed = many(Options(seed=0, level="b"), hours=None, seconds=SECONDS, jobs=1, from_seed=1, keep_going=False)
    assert not failed, failure(failed[0])
    assert volume.runs
