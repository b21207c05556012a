"""The checker itself: histories that a correct cluster cannot produce are found out."""

import history
import pytest

S = 1_000_000


def ack(node, at_s, *, timeline=1, life_s=0, stamp_s=None, id=None, late_s=0.0):
    at_us = round(at_s * S)
    stamp_us = at_us - 500 if stamp_s is None else round(stamp_s * S)
    done_us = at_us + round(late_s * S)
    return history.Ack("plain", node, at_us if id is None else id, timeline, at_us, life_s * S, stamp_us, at_us - 1000, done_us, done_us)


def row(what, acks, *expected):
    return pytest.param(acks, expected, id=what)


@pytest.mark.parametrize(("acks", "expected"), [
    row("one primary", [ack("a", 1), ack("a", 2)]),
    row("fail-over", [ack("a", 1), ack("a", 2), ack("b", 3, timeline=2), ack("b", 4, timeline=2)]),
    row("there and back", [ack("a", 1), ack("b", 3, timeline=2), ack("a", 5, timeline=3, life_s=4)]),
    row("restart in place", [ack("a", 1), ack("a", 5, life_s=4)]),
    row("an acknowledgement that only arrived late", [ack("a", 1), ack("a", 2, late_s=5), ack("b", 3, timeline=2)]),
    row("two write at the same time", [ack("a", 1), ack("b", 3, timeline=2), ack("a", 3.5)], "0.499 s after the first"),
    row("the old one goes on for a moment", [ack("a", 1), ack("a", 3.010), ack("b", 3, timeline=2)], "0.009 s after the first"),
    row("two nodes write one timeline", [ack("a", 1), ack("b", 3)], "timeline 1 was written by a and b"),
    row("back to an older timeline", [ack("a", 1, timeline=2), ack("b", 3, timeline=1)], "on an older timeline"),
    row("orphans of the killed postmaster write beside the new one", [ack("a", 1), ack("a", 4.5), ack("a", 6, life_s=4)],
        "after its successor"),
    row("orphans write after the successor's first row", [ack("a", 1), ack("a", 7), ack("a", 6, life_s=4)], "after the first"),
])
def test_violations(acks, expected):
    found = history.judge(acks, {a.id for a in acks}).violations
    assert len(found) == len(expected), found
    for text in expected:
        assert any(text in violation for violation in found), found


def test_lost_rows_are_those_that_the_final_primary_lacks():
    acks = [ack("a", 1, id=1), ack("a", 2, id=2), ack("b", 3, id=3, timeline=2)]
    assert [a.id for a in history.judge(acks, {1, 3, 99}).lost] == [2]


def test_longest_gap_is_over_all_clients():
    acks = [ack("a", 1), ack("b", 4), ack("a", 2), ack("b", 4.5)]
    assert history.judge(acks, set()).gap == history.Gap(2.0, 2 * S)


def test_nothing_acknowledged_is_no_crash():
    assert history.judge([], set()).gap == history.Gap(0.0, 0)


def test_a_line_cut_off_by_a_kill_is_left_out(tmp_path):
    file = tmp_path / "acks"
    file.write_text("plain n1 7 1 99 10 20 30 40 50\nplain n1 8 1 99 10 2")
    assert history.read(file) == [history.Ack("plain", "n1", 7, 1, 99, 10, 20, 30, 40, 50)]
