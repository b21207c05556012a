"""What can be supposed, and what is said of everything else."""

from __future__ import annotations

import pytest

from pgha.foresee.hypothesis import Hypothesis, NotAHypothesis, UnknownNode, parse, parse_all

MEMBERS = ("n1", "n2", "db.example")


@pytest.mark.parametrize(("text", "wanted"), [
    ("n1=down", Hypothesis(what="down", node="n1")),
    (" n1 = down ", Hypothesis(what="down", node="n1")),
    ("dcs=down", Hypothesis(what="down")),
    ("db.example=down", Hypothesis(what="down", node="db.example")),
    ("n2.lag=20MB", Hypothesis(what="lag", node="n2", lag_bytes=20 << 20)),
    ("n2.lag=20 MiB", Hypothesis(what="lag", node="n2", lag_bytes=20 << 20)),
    ("n2.lag=512", Hypothesis(what="lag", node="n2", lag_bytes=512)),
    ("db.example.lag=1kB", Hypothesis(what="lag", node="db.example", lag_bytes=1024)),
])
def test_what_can_be_supposed(text, wanted):
    assert parse(text) == wanted
    assert parse(str(wanted)) == wanted


@pytest.mark.parametrize("text", ["", "n1", "=down", "n1=", "n1=up", "n1.lag", "n1.lag=", "n1.lag=much", "n1.lag=-1", "n1.lag=1PB", "n1.lag=1.5MB", "n1.delay=1", ".lag=1MB",
                                  "n1.lag=999999999TB", "n1.lag=" + "9" * 4000])
def test_what_cannot(text):
    with pytest.raises(NotAHypothesis, match="allowed"):
        parse(text)


def test_unknown_members_are_named():
    with pytest.raises(UnknownNode, match="no such member: n3; there are db.example, n1, n2"):
        parse_all(["n1=down", "n3=down"], MEMBERS)
    with pytest.raises(UnknownNode, match="no such member: x"):
        parse_all(["x.lag=1MB"], MEMBERS)


def test_several_at_once():
    assert [str(h) for h in parse_all(["n1=down", "n1=down", "dcs=down", "n2.lag=1kB"], MEMBERS)] == ["n1=down", "dcs=down", "n2.lag=1kB"]
    assert [str(h) for h in parse_all(["n1=down", "n1.lag=1kB"], MEMBERS)] == ["n1=down"]
    with pytest.raises(NotAHypothesis, match="supposed already"):
        parse_all(["n2.lag=1kB", "n2.lag=2kB"], MEMBERS)
