"""Does the list of mutants (*.toml beside this) fit the sources? `build/mutants` asks whether anything notices them.

Whoever changes a line that a mutant changes brings its entry along: the promise stands, the mistake is to be made anew
where the rule is now.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "build"))

import mutation  # noqa: E402

MUTANTS = mutation.mutants(ROOT)


@pytest.mark.parametrize("mutant", MUTANTS, ids=[m.name for m in MUTANTS])
def test_a_mutant_changes_exactly_one_place_and_names_tests_that_are_there(mutant: mutation.Mutant):
    assert mutant.texts(ROOT)
    assert mutant.missing_tests(ROOT) == []


def test_there_are_as_many_as_the_safety_model_wants():
    assert len(MUTANTS) >= 50
    sections = {section for mutant in MUTANTS for section in mutant.breaks.split(",")}
    wanted = {str(number) for number in (2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 15, 16)}
    assert wanted <= sections
