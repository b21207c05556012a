"""Which decisions are told in the log: those that changed (agent.py)."""

from __future__ import annotations

import pytest

from pgha.agent import _what_is_said
from pgha.model.decision import Decision


def said(summary: str) -> tuple[str, ...]:
    return _what_is_said(Decision(situation="following", summary=summary))


@pytest.mark.parametrize(("one", "other"), [
    ("n1's record was seen unchanged for 30.51 s, ttl 30 s", "n1's record was seen unchanged for 31.02 s, ttl 30 s"),
    ("own 0/10A17E8 on timeline 1", "own 0/10D5FC0 on timeline 1"),
    ("lag 8.5 MiB, limit 1.0 MiB", "lag 9 MiB, limit 1.0 MiB"),
    ("-0.1 s to the fence", "-12.5 s to the fence"),
])
def test_other_numbers_are_no_change(one: str, other: str):
    assert said(one) == said(other)


@pytest.mark.parametrize(("one", "other"), [
    ("a secondary, and following a leader (n1)", "a secondary, and following a leader (n2)"),
    ("following a leader (pg-1)", "following a leader (pg-2)"),
    ("bootstrap from leader 'DB1'", "bootstrap from leader 'DB2'"),
])
def test_another_name_is_a_change(one: str, other: str):
    assert said(one) != said(other)


def test_the_beginning_and_end_of_pause_is_a_change():
    one, other = (_what_is_said(Decision(situation="leading", summary="no action. I am (n1), the leader with the lock", paused=paused)) for paused in (True, False))
    assert one != other
