"""What `explain --if` foretells is what then happens: random worlds of the simulation, at random instants, before and after faults.

Where the outcome is open the forecast names all who may lead, and the real one is among them. More seeds:
`build/simulate --explain --seconds N`, or PGHA_EXPLAIN_SEEDS.
"""

from __future__ import annotations

import os

import pytest

from tests.foresee.foretold import Tally, failure, tell

SEEDS = int(os.environ.get("PGHA_EXPLAIN_SEEDS", "12"))
#: What was once wrong, and why it is not any more.
ONCE_WRONG = {
    50: "everybody had the same position, but WAL was being written: who gets the next of it leads",
    60: "the leader held its lock, and accepted no writes yet",
    364: "two voters had their last vote in the same millisecond",
    372: "a store had gone back, and what /sync said before counted for ever",
    1259: "the store went while somebody was being promoted",
    1454: "a primary was being started, and was there in the next moment",
    418: "a leader whose PostgreSQL did not come up handed over",
    192: "a copy that had begun before its leader died came to its end, and the copy led",
}


def test_forecasts_come_true():
    tally = Tally()
    for seed in range(1, SEEDS + 1):
        tally.add(tell(seed))
    print(tally.report())
    assert not tally.wrong, "\n".join(failure(story) for story in tally.wrong)
    assert tally.interrupted >= SEEDS // 2
    assert tally.certain >= SEEDS // 2, "a forecast that names everybody is none"


@pytest.mark.parametrize("seed", ONCE_WRONG)
def test_what_was_once_wrong(seed):
    story = tell(seed)
    assert not story.mistakes, failure(story)
    assert not story.violations


@pytest.mark.parametrize("seed", [1, 3])
def test_forecasts_by_what_shipped_agents_tell_come_true(seed):
    """Level b: the agents as they are, asked and told through what REST uses. (In 3 the store goes, and failsafe mode goes on.)"""
    story = tell(seed, level="b")
    assert not story.mistakes, failure(story)
    assert not story.violations
    assert story.forecast.certain


@pytest.mark.parametrize("seed", [2, 4, 6, 10])
def test_forecasts_beside_members_of_another_make_say_what_they_do_not_know(seed):
    """A Patroni member does not tell what it sees, whether it leads or not: it is among those who may lead, and not foretold."""
    story = tell(seed, patronis=1)
    assert not story.mistakes, failure(story)
    assert not story.violations
    assert any("another program" in line for line in story.forecast.unknown) or any("members of another make" in line for line in story.forecast.unknown)


def test_the_same_seed_is_the_same_story():
    first, second = tell(5), tell(5)
    assert (first.forecast, first.leaders) == (second.forecast, second.leaders)
