"""synchronous_standby_names read and written; when a setting bears out a promise, and what a promise may become."""

from __future__ import annotations

from itertools import combinations

import pytest

from pgha.model.synchronous import (
    PLACEHOLDER,
    Promise,
    Requirement,
    covers,
    format_requirement,
    may_promise,
    parse_requirement,
)


def promise(voters: str, quorum: int = 0) -> Promise:
    return Promise(voters=frozenset(voters), quorum=quorum)


def any_of(count: int, names: str) -> Requirement:
    return Requirement(names=frozenset(names), count=count, by_priority=False)


def all_of(names: str) -> Requirement:
    return Requirement(names=frozenset(names), count=len(names))


@pytest.mark.parametrize(("text", "names", "count", "by_priority", "anybody"), [
    ("", (), 0, True, False),
    ("  ", (), 0, True, False),
    ("n1", ("n1",), 1, True, False),
    ("N1", ("n1",), 1, True, False),
    ('"n-1"', ("n-1",), 1, True, False),
    ('"say ""hi"""', ('say "hi"',), 1, True, False),
    ("a, b", ("a", "b"), 1, True, False),
    ("2 (a, b)", ("a", "b"), 2, True, False),
    ("FIRST 2 (a,b,c)", ("a", "b", "c"), 2, True, False),
    ("first 1 (a)", ("a",), 1, True, False),
    ("ANY 1 (a,b)", ("a", "b"), 1, False, False),
    ('any 2(a,"b")', ("a", "b"), 2, False, False),
    ("*", (), 1, True, True),
    ('"*"', (), 1, True, True),
    ("2 (*)", (), 2, True, True),
    ("a, *", ("a",), 1, True, True),
    (PLACEHOLDER, (PLACEHOLDER,), 1, True, False),
    ('"', (), 0, True, True),
    ("((", (), 0, True, True),
])
def test_reading(text, names, count, by_priority, anybody):
    found = parse_requirement(text)
    assert (found.names, found.count, found.by_priority, found.anybody) == (frozenset(names), count, by_priority, anybody)


@pytest.mark.parametrize(("names", "count", "by_priority", "text"), [
    ((), 0, True, ""), (("a",), 0, True, ""), (("a",), 1, True, "a"), (("b", "a"), 2, True, "2 (a,b)"), (("a",), 1, False, "ANY 1 (a)"), (("c", "n-1"), 1, False, 'ANY 1 (c,"n-1")'),
    (("any",), 1, True, '"any"'), (("1st",), 1, True, '"1st"'), (('x"y',), 1, True, '"x""y"'), (("é",), 1, True, "é"),
])
def test_writing_as_the_reference_does(names, count, by_priority, text):
    assert format_requirement(names, count, by_priority=by_priority) == text
    if text:
        assert parse_requirement(text) == Requirement(names=frozenset(names), count=count, by_priority=by_priority)


@pytest.mark.parametrize(("offered", "required", "holds"), [
    (promise(""), Requirement(), True),                 # only the leader may lead
    (promise(""), Requirement(anybody=True, count=1), True),
    (promise("b"), Requirement(), False),
    (promise("b"), all_of("b"), True),
    (promise("b"), all_of("bc"), True),
    (promise("bc"), all_of("b"), False),
    (promise("bc"), all_of("bc"), True),
    (promise("bc"), any_of(1, "bc"), False),            # the one that confirmed may be the other one
    (promise("bc", 1), any_of(1, "bc"), True),
    (promise("bc", 1), any_of(2, "bc"), True),
    (promise("bcd", 1), any_of(1, "bcd"), False),
    (promise("bcd", 2), any_of(1, "bcd"), True),
    (promise("bcd", 1), any_of(2, "bcd"), True),
    (promise("bcd", 2), any_of(1, "bc"), True),         # c joins: first the promise, with a larger quorum
    (promise("bc", 1), any_of(1, "bcd"), False),        # … since a commit might be on d only
    (promise("b"), Requirement(anybody=True, count=1), False),   # pg_receivewal confirms, too
    (promise("bc", 1), Requirement(names=frozenset("bc"), anybody=True, count=2), False),   # ANY 2 (b, c, *): two others
])
def test_what_a_setting_bears_out(offered, required, holds):
    assert covers(offered, required) is holds


@pytest.mark.parametrize(("old", "new", "required", "confirmed", "may"), [
    (promise("bc"), promise("b"), None, "", True),      # less of the same
    (promise("b"), promise(""), None, "", True),
    (promise("bc"), promise("bc", 1), None, "", True),
    (promise("b"), promise("bc", 1), None, "", True),   # one more voter, one more vote
    (promise("b"), promise("bc"), None, "", False),
    (promise(""), promise("b"), all_of("b"), "", False),
    (promise(""), promise("b"), None, "b", False),      # not every process may obey the setting yet
    (promise(""), promise("b"), all_of("b"), "b", True),
    (promise(""), promise("bc"), all_of("bc"), "b", False),
    (promise(""), promise("bc", 1), any_of(2, "bc"), "b", True),
    (promise(""), promise("bc", 1), any_of(1, "bc"), "b", True),
    (promise(""), promise("bc"), any_of(1, "bc"), "bc", False),
    (promise("bc", 1), promise("bc"), any_of(2, "bc"), "bc", True),
    (promise("bc", 1), promise("bc"), any_of(2, "bc"), "b", False),
    (promise("b"), promise("c"), all_of("bc"), "c", True),
    (promise("b"), promise("c"), all_of("b"), "c", False),
])
def test_what_a_promise_may_become(old, new, required, confirmed, may):
    assert may_promise(old, new, requirement=required, confirmed=frozenset(confirmed)) is may


def test_covers_is_exactly_that_some_voter_of_every_quorum_confirmed():
    """Against the definition, for everything that three names allow."""
    def subsets(names, size):
        return [frozenset(s) for s in combinations(sorted(names), size)]

    everybody = [s for n in range(4) for s in subsets("bcd", n)]
    for voters in everybody:
        for quorum in range(3):
            for names in everybody:
                for count in range(1 if names else 0, len(names) + 1):
                    truly = all(elected & acknowledged for elected in subsets(voters, quorum + 1) for acknowledged in subsets(names, count))
                    assert covers(Promise(voters=voters, quorum=quorum), Requirement(names=names, count=count)) == truly, (voters, quorum, names, count)
