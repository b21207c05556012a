"""What a process may believe about its own record: every way in which answers are late, lost or another's."""

from __future__ import annotations

import random

import pytest
from msgspec.structs import replace

from pgha.clock import Instant, remaining_s
from pgha.lock.licence import LicenceBook, Sent
from pgha.model.lock import Identity, Licence, LicenceState, LockMode, LockRecord, licence_s

ME = Identity(name="a", node_id="id-a", incarnation="run-a")
TTL_S = 30.0


def at(seconds: float) -> Instant:
    return Instant(0, 0).plus_s(1000 + seconds)


def compose(book: LicenceBook, seconds: float, *, onto: int, ttl_s: float = TTL_S, mode: LockMode = "held", lsn: int = 0) -> Sent:
    return book.compose(at(seconds), ttl_s=ttl_s, mode=mode, lsn=lsn, timeline=1, onto_revision=onto)


def commit(book: LicenceBook, sent: Sent, revision: int) -> None:
    book.committed(sent, revision=revision, value=b"v%d" % revision, epoch=1, epoch_revision=5, acquired_pass=3)


def send(book: LicenceBook, seconds: float, *, onto: int, ttl_s: float = TTL_S, mode: LockMode = "held") -> Sent:
    """As the renewer does: a write that shortens counts from its first byte."""
    sent = compose(book, seconds, onto=onto, ttl_s=ttl_s, mode=mode)
    end = book.shortened(sent)
    if end is not None:
        book.shorten(sent, end)
    return sent


def holder() -> LicenceBook:
    """Took the lock at 0 s: sequence 1, at revision 10."""
    book = LicenceBook(ME)
    book.acquiring()
    commit(book, compose(book, 0, onto=0), 10)
    return book


def ends_s(book: LicenceBook) -> float:
    assert book.licence.valid_until is not None
    return remaining_s(book.licence.valid_until, at(0))


def test_nothing_is_licensed_at_first():
    assert LicenceBook(ME).licence == Licence()


def test_acquiring_grants_nothing():
    book = LicenceBook(ME)
    book.acquiring()
    compose(book, 0, onto=0)
    assert (book.licence.state, book.licence.valid_until, book.licence.since) == (LicenceState.ACQUIRING, None, None)


def test_acquiring_ends_what_was_licensed_before():
    book = holder()
    book.acquiring()
    assert book.licence.valid_until is None


def test_validity_counts_from_the_send_less_the_drift():
    assert ends_s(holder()) == pytest.approx(29.7)


def test_the_first_send_of_a_sequence_counts_whichever_attempt_was_answered():
    book = holder()
    first = compose(book, 10, onto=10)
    again = compose(book, 17, onto=10, lsn=999)
    assert again is first
    commit(book, again, 11)
    assert ends_s(book) == pytest.approx(10 + 29.7)
    assert book.licence.since == at(10)


def test_a_settled_sequence_is_not_sent_again():
    book = holder()
    commit(book, compose(book, 10, onto=10), 11)
    assert compose(book, 20, onto=11).record.sequence == 3


@pytest.mark.parametrize("other", [{"onto": 11}, {"ttl_s": 20.0}, {"mode": "released"}])
def test_another_write_is_another_sequence(other):
    book = holder()
    first = compose(book, 10, onto=10)
    assert compose(book, 11, **{"onto": 10, **other}).record.sequence == first.record.sequence + 1


@pytest.mark.parametrize("other", [{"incarnation": "run-x"}, {"node_id": "id-x"}, {"sequence": 3}, {"sequence": 0}, {"ttl_s": 31.0}, {"mode": "released"}, {"lsn": 1},
                                   {"timeline": 9}, {"holder": "b"}])
def test_a_record_is_recognised_by_all_that_is_in_it(other):
    book = holder()
    sent = compose(book, 10, onto=10)
    assert book.recognise(sent.record) is sent
    assert book.recognise(replace(sent.record, **other)) is None


def test_no_record_is_not_ours():
    assert holder().recognise(None) is None


def test_superseded_records_are_our_past_and_not_recognised():
    book = holder()
    first = compose(book, 10, onto=10)
    commit(book, first, 11)
    second = compose(book, 20, onto=11)
    commit(book, second, 12)
    assert book.recognise(first.record) is None
    assert book.is_own_past(first.record)
    assert book.recognise(second.record) is second
    assert not book.is_own_past(second.record)
    assert not book.is_own_past(replace(first.record, incarnation="run-x"))


def test_any_of_several_unsettled_sends_is_recognised():
    book = holder()
    long, short, long_again = (compose(book, s, onto=10, ttl_s=t) for s, t in ((10, 30.0), (11, 5.0), (12, 30.0)))
    assert [book.recognise(s.record) for s in (long, short, long_again)] == [long, short, long_again]


def test_a_shorter_ttl_counts_before_it_is_answered():
    book = holder()
    sent = compose(book, 10, onto=10, ttl_s=5.0)
    end = book.shortened(sent)
    assert end is not None
    assert ends_s(book) == pytest.approx(29.7), "not before the guard has confirmed it"
    book.shorten(sent, end)
    assert ends_s(book) == pytest.approx(10 + 4.95)
    assert book.licence.shortened_at == sent.at
    commit(book, sent, 11)
    assert book.licence.shortened_at is None


def test_a_renewal_that_does_not_shorten_shortens_nothing():
    book = holder()
    assert book.shortened(compose(book, 10, onto=10)) is None
    assert book.shortened(compose(book, 26, onto=10, ttl_s=5.0)) is None, "ends later than what is licensed"


def test_without_a_licence_there_is_nothing_to_shorten():
    book = LicenceBook(ME)
    book.acquiring()
    assert book.shortened(compose(book, 0, onto=0, ttl_s=1.0)) is None


def test_the_shorter_one_stands_while_its_answer_is_lost_and_an_older_longer_one_settles_later():
    """ttl 30 → 5: without this rule an older renewal that settles would bring back 24 s in which another may lead."""
    book = holder()
    older = send(book, 10, onto=10)
    send(book, 11, onto=10, ttl_s=5.0)
    commit(book, older, 11)
    assert ends_s(book) == pytest.approx(11 + 4.95)


def test_the_cap_ends_with_the_shorter_write():
    book = holder()
    short = send(book, 10, onto=10, ttl_s=5.0)
    commit(book, short, 11)
    commit(book, send(book, 12, onto=11), 12)
    assert ends_s(book) == pytest.approx(12 + 29.7)


def test_the_cap_ends_with_a_later_write_over_the_same_record():
    """It compared the same revision, so the shorter one can never commit any more."""
    book = holder()
    send(book, 10, onto=10, ttl_s=5.0)
    longer = send(book, 11, onto=10)
    assert ends_s(book) == pytest.approx(10 + 4.95)
    commit(book, longer, 11)
    assert ends_s(book) == pytest.approx(11 + 29.7)


def test_two_shortenings_leave_the_earlier_end():
    book = holder()
    send(book, 10, onto=10, ttl_s=5.0)
    send(book, 11, onto=10, ttl_s=6.0)
    assert ends_s(book) == pytest.approx(10 + 4.95)


def test_a_release_ends_the_licence_at_its_first_byte():
    book = holder()
    book.releasing()
    send(book, 10, onto=10, mode="released")
    assert book.licence.state is LicenceState.RELEASING
    assert ends_s(book) == pytest.approx(10)


def test_a_committed_release_leaves_nothing():
    book = holder()
    book.releasing()
    commit(book, send(book, 10, onto=10, mode="released"), 11)
    assert (book.licence.state, book.licence.valid_until, book.licence.since) == (LicenceState.NONE, None, None)


def test_a_renewal_that_settles_while_releasing_gives_nothing_back():
    book = holder()
    renewal = send(book, 10, onto=10)
    book.releasing()
    send(book, 11, onto=10, mode="released")
    commit(book, renewal, 11)
    assert book.licence.state is LicenceState.RELEASING
    assert ends_s(book) <= 11 + 1e-6


def test_lost_only_by_anothers_record_and_then_nothing_is_left():
    book = holder()
    sent = compose(book, 10, onto=10)
    book.lost(LockRecord(holder="b", node_id="id-b", incarnation="run-b", sequence=1, ttl_s=30.0))
    assert (book.licence.state, book.licence.lost_to, book.licence.valid_until) == (LicenceState.LOST, "b", None)
    assert book.recognise(sent.record) is None


def test_failures_leave_the_deadline_and_say_since_when():
    book = holder()
    book.failing(at(10), "timed out")
    book.failing(at(12), "no leader")
    assert (book.licence.failing_since, book.licence.failing_why, book.licence.state) == (at(10), "no leader", LicenceState.HELD)
    assert ends_s(book) == pytest.approx(29.7)
    commit(book, compose(book, 13, onto=10), 11)
    assert (book.licence.failing_since, book.licence.failing_why) == (None, "")


def test_an_acquire_may_commit_for_as_long_as_its_compare_can_hold():
    book = LicenceBook(ME)
    book.acquiring()
    compose(book, 0, onto=7)
    assert book.may_still_commit(7)
    assert not book.may_still_commit(8)
    book.never_acquired()
    assert book.licence == Licence()
    assert not book.may_still_commit(7)


def test_never_acquired_takes_nothing_from_a_holder():
    book = holder()
    book.never_acquired()
    assert book.licence.state is LicenceState.HELD


def test_an_expired_licence_is_forgotten():
    book = holder()
    sent = compose(book, 10, onto=10)
    book.expired()
    assert book.licence == Licence()
    assert book.recognise(sent.record) is None


@pytest.mark.parametrize("seed", range(200))
def test_no_history_of_answers_licenses_longer_than_the_store_does(seed):
    """A model of the store beside the book: whatever is sent, lost, late or recognised, at no moment is the licence longer
    than what a candidate would wait for who had seen the stored record at the moment when it was first sent."""
    chance = random.Random(seed)
    book, now = holder(), 0.0
    stored, revision = book.recognise(LockRecord(holder="a", node_id="id-a", incarnation="run-a", sequence=1, ttl_s=TTL_S, timeline=1)), 10
    on_the_way: list[Sent] = []
    first_sent: dict[int, float] = {1: 0.0}
    for _ in range(40):
        now += chance.uniform(0.01, 3.0)
        what = chance.random()
        if what < 0.5 and book.licence.state is LicenceState.HELD:
            sent = send(book, now, onto=book.licence.revision, ttl_s=chance.choice([30.0, 30.0, 5.0, 10.0]))
            first_sent.setdefault(sent.record.sequence, now)
            on_the_way.append(sent)
        elif what < 0.8 and on_the_way:
            sent = on_the_way.pop(chance.randrange(len(on_the_way)))
            succeeded = sent.onto_revision == revision
            if succeeded:
                stored, revision = sent, revision + 1
            if chance.random() < 0.6:     # answered
                assert stored is not None
                mine = book.recognise(stored.record)
                assert mine is stored, "the holder's own record is always recognised"
                commit(book, mine, revision)
        assert stored is not None
        # Any candidate sees the stored record at its first send at the earliest.
        assert ends_s(book) <= first_sent[stored.record.sequence] + licence_s(stored.record.ttl_s) + 1e-6 or ends_s(book) <= now
        pending = [s for s in on_the_way if s.onto_revision == revision]
        for sent in pending:     # each may commit at any moment from its first send on
            assert ends_s(book) <= max(now, first_sent[sent.record.sequence] + licence_s(sent.record.ttl_s)) + 1e-6, (seed, sent)


# --- failsafe rounds -----------------------------------------------------------------------------------------------------

def extended(book: LicenceBook, *, began_s: float = 20, done_s: float = 21, epoch: int = 1) -> bool:
    return book.extend(at(began_s), at(done_s), sequence=book.round_begins(), epoch=epoch, ttl_s=TTL_S)


def test_a_round_widens_the_licence_from_its_first_post_under_a_sequence_of_its_own():
    book = holder()
    assert extended(book)
    assert (ends_s(book), book.licence.sequence, book.licence.since, book.licence.by_failsafe) == (pytest.approx(20 + 29.7), 2, at(20), True)
    assert extended(book, began_s=40, done_s=41)
    assert (ends_s(book), book.licence.sequence) == (pytest.approx(40 + 29.7), 3)


@pytest.mark.parametrize("state", [LicenceState.LOST, LicenceState.RELEASING, LicenceState.ACQUIRING, LicenceState.NONE])
def test_a_round_revives_nothing(state):
    book = holder()
    {LicenceState.LOST: lambda: book.lost(LockRecord(holder="z", node_id="z", incarnation="z", sequence=1, ttl_s=30.0)), LicenceState.RELEASING: book.releasing,
     LicenceState.ACQUIRING: book.acquiring, LicenceState.NONE: book.expired}[state]()
    before = book.licence
    assert not extended(book)
    assert book.licence == before
    assert before.state is state


@pytest.mark.parametrize("done_s, gives", [(28.1, True), (28.3, False), (31.0, False)])
def test_a_round_that_ends_after_the_fence_gives_nothing(done_s, gives):
    book = holder()
    assert extended(book, done_s=done_s) is gives
    assert ends_s(book) == pytest.approx(20 + 29.7 if gives else 29.7)


def test_a_round_of_another_epoch_gives_nothing():
    assert not extended(holder(), epoch=2)


def test_a_round_that_began_before_a_renewal_was_sent_gives_nothing():
    book = holder()
    number = book.round_begins()
    commit(book, compose(book, 21, onto=10), 11)
    assert not book.extend(at(20), at(22), sequence=number, epoch=1, ttl_s=TTL_S)
    assert (ends_s(book), book.licence.by_failsafe) == (pytest.approx(21 + 29.7), False)


@pytest.mark.parametrize("before_s, after_s, gives_s", [(10.0, 30.0, None), (30.0, 10.0, 21 + 9.9), (30.0, 30.0, 21 + 29.7)])
def test_a_round_gives_no_more_than_was_asked_for(before_s, after_s, gives_s):
    """A renewal with another ttl, sent before the round, is answered during it: the others promised for the former ttl."""
    book = LicenceBook(ME)
    book.acquiring()
    commit(book, compose(book, 12, onto=0, ttl_s=before_s), 10)
    changed = send(book, 20, onto=10, ttl_s=after_s)
    number, asked_s = book.round_begins(), book.licence.ttl_s
    commit(book, changed, 11)
    assert book.extend(at(21), at(21.5), sequence=number, epoch=1, ttl_s=asked_s) is (gives_s is not None)
    assert ends_s(book) == pytest.approx(gives_s or 20 + 29.7)


def test_a_round_gives_no_more_than_a_shorter_record_that_was_sent_meanwhile():
    """It shortened nothing when it was sent, but it frees the others from what they promised before, if it has arrived."""
    book = holder()
    number = book.round_begins()
    sent = send(book, 22, onto=10, ttl_s=10.0)
    assert (book.shortened(sent), ends_s(book)) == (None, pytest.approx(29.7))
    assert book.extend(at(20), at(23), sequence=number, epoch=1, ttl_s=TTL_S)
    assert ends_s(book) == pytest.approx(22 + 9.9)


def test_a_round_in_pause_gives_nothing():
    book = holder()
    book.licence = replace(book.licence, mode="paused")
    assert not extended(book)


def test_a_round_gives_nothing_while_a_shorter_licence_may_have_been_committed():
    book = holder()
    send(book, 10, onto=10, ttl_s=15.0)
    assert not extended(book, began_s=15, done_s=16)
    assert ends_s(book) == pytest.approx(10 + 14.85)


def test_a_renewal_of_before_the_round_that_arrives_late_takes_nothing_back():
    book = holder()
    late = compose(book, 10, onto=10)
    assert extended(book)
    again = compose(book, 22, onto=10)
    assert again is late, "one unsettled record however long the store is away"
    assert book.shortened(again) is None
    commit(book, again, 11)
    assert (ends_s(book), book.licence.sequence, book.licence.revision, book.licence.by_failsafe) == (pytest.approx(20 + 29.7), 3, 11, True)


def test_a_renewal_after_the_round_ends_failsafe():
    book = holder()
    compose(book, 10, onto=10)
    assert extended(book)
    commit(book, compose(book, 22, onto=10), 11)
    fresh = compose(book, 23, onto=11)
    assert fresh.record.sequence == 4
    commit(book, fresh, 12)
    assert (ends_s(book), book.licence.sequence, book.licence.by_failsafe) == (pytest.approx(23 + 29.7), 4, False)


def test_anothers_record_ends_what_the_others_gave():
    book = holder()
    assert extended(book)
    book.lost(LockRecord(holder="z", node_id="z", incarnation="z", sequence=1, ttl_s=30.0))
    assert (book.licence.state, book.licence.valid_until, book.licence.by_failsafe) == (LicenceState.LOST, None, False)


def test_a_release_ends_what_the_others_gave():
    book = holder()
    assert extended(book)
    book.releasing()
    sent = send(book, 22, onto=10, mode="released")
    assert ends_s(book) == pytest.approx(22)
    commit(book, sent, 11)
    assert book.licence.valid_until is None


@pytest.mark.parametrize("seed", range(300))
def test_no_history_of_answers_and_rounds_licenses_longer_than_record_or_promise(seed):
    """The model of above, with a candidate that also keeps its promise: given at a round's first post at the earliest, for
    the ttl that was asked for, and void for a record that the same holder wrote afterwards."""
    chance = random.Random(seed)
    book, now, revision = holder(), 0.0, 10
    stored = Sent(record=LockRecord(holder="a", node_id="id-a", incarnation="run-a", sequence=1, ttl_s=TTL_S, timeline=1), at=at(0), onto_revision=0)
    first_sent: dict[int, float] = {1: 0.0}
    on_the_way: list[Sent] = []
    begun: tuple[float, int, float] | None = None             # began, sequence, ttl
    promised: tuple[float, int, float] | None = None
    ttl_s = TTL_S

    def may_be_taken_s(sent: Sent) -> float:
        at_s = first_sent[sent.record.sequence] + licence_s(sent.record.ttl_s)
        if promised is not None and sent.record.sequence <= promised[1]:
            at_s = max(at_s, promised[0] + licence_s(promised[2]))
        return at_s

    for _ in range(60):
        now += chance.uniform(0.01, 2.0)
        what = chance.random()
        if book.licence.state is not LicenceState.HELD or ends_s(book) <= now:
            return
        if what < 0.1:
            ttl_s = chance.choice([5.0, 10.0, 30.0])
        elif what < 0.4:
            sent = send(book, now, onto=book.licence.revision, ttl_s=ttl_s)
            first_sent.setdefault(sent.record.sequence, now)
            on_the_way.append(sent)
        elif what < 0.65 and on_the_way:
            sent = on_the_way.pop(chance.randrange(len(on_the_way)))
            if sent.onto_revision == revision:
                stored, revision = sent, revision + 1
            mine = book.recognise(stored.record)
            if chance.random() < 0.6 and mine is not None:     # answered
                commit(book, mine, revision)
        elif what < 0.8:
            begun = now, book.round_begins(), book.licence.ttl_s
        elif begun is not None:
            left_s = promised[0] + promised[2] - begun[0] if promised is not None else 0.0
            promised = begun[0], begun[1], max(begun[2], left_s)
            if chance.random() < 0.8:
                book.extend(at(begun[0]), at(now), sequence=begun[1], epoch=1, ttl_s=begun[2])
            begun = None
        for sent in [stored, *(s for s in on_the_way if s.onto_revision == revision)]:
            assert ends_s(book) <= max(now, may_be_taken_s(sent)) + 1e-6, (seed, sent, promised)
