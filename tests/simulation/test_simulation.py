"""The simulation itself: the same seed is the same story, in another process too; what failed once is clean; a small budget."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from tests.simulation.corners import CORNERS
from tests.simulation.main import REGRESSIONS, Kept, failure, many, run_level
from tests.simulation.simulation import DRAWS, Options, run

#: The test command's share; build/simulate runs for longer.
SECONDS = float(os.environ.get("PGHA_SIMULATION_SECONDS", "45"))
ROOT = Path(__file__).parents[2]
SHORT = ["--nodes", "3", "--ttl", "20", "--faults", "12", "--for", "400"]


def transcript(seed: int, hash_seed: str) -> str:
    done = subprocess.run([sys.executable, "-m", "tests.simulation.main", "--seed", str(seed), "--trace", *SHORT], cwd=ROOT, capture_output=True, text=True, check=True,
                          env={**os.environ, "PYTHONHASHSEED": hash_seed})
    return done.stdout


def test_the_same_seed_is_the_same_transcript_in_another_process() -> None:
    first, second = transcript(7, "1"), transcript(7, "2")
    assert len(first.splitlines()) > 200
    assert first == second
    assert transcript(8, "1") != first


def test_the_transcript_does_not_depend_on_what_ran_before() -> None:
    options = Options(seed=7, nodes=3, ttl=20, faults=12, for_s=400)
    first = run(options)
    run(Options(seed=9, nodes=2, ttl=30, faults=5, for_s=200))
    assert run(options).digest == first.digest


@pytest.mark.parametrize("path", sorted(REGRESSIONS.glob("*.json")), ids=lambda p: p.stem)
def test_what_failed_once_is_clean(path: Path) -> None:
    kept = msgspec.json.decode(path.read_bytes(), type=Kept)
    outcome = run_level(kept.options)
    assert not outcome.violations, f"{kept.why}\n{failure(outcome, path=path)}"


@pytest.mark.parametrize("pair", CORNERS, ids=" ".join)
def test_a_corner_is_reached_and_clean(pair: tuple[str, str]) -> None:
    outcome = run(CORNERS[pair])
    assert pair in outcome.coverage
    assert not outcome.violations, failure(outcome)


@pytest.mark.parametrize(("seed", "patronis"), [(2, 1), (5, 2), (6, 1), (13, 2)])
def test_a_cluster_with_patroni_members_is_clean(seed: int, patronis: int) -> None:
    """No node of ours is a second writer, and everybody comes back."""
    outcome = run(Options(seed=seed, draws=DRAWS, patronis=patronis))
    assert not outcome.violations, failure(outcome)
    assert outcome.role_changes > 1


def test_a_budget_of_random_programs_is_clean() -> None:
    volume, failed = many(Options(seed=0, draws=DRAWS), hours=None, seconds=SECONDS, jobs=1, from_seed=1, keep_going=False)
    assert not failed, failure(failed[0])
    assert volume.runs
    assert volume.role_changes
