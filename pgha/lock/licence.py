"""What may this process believe about its own lock record? No I/O: sends are announced, answers are handed in.

Rules of this file (safety model 3):
* validity counts from the *first* send of a sequence, never from the attempt that was answered;
* a record is mine only if incarnation and sequence match one that this process sent and has not superseded;
* a write that may shorten the licence (smaller ttl, end of a pause, release) counts as committed before its first byte;
* a record in mode `paused` has no end, once it is committed and not before;
* only another's record means lost; everything else is unknown, and the deadline stands;
* a failsafe round widens a licence that is held and has not come to its fence, under a sequence of its own: it never
  revives one, and it never outlives another's record (safety model 12).
"""

from __future__ import annotations

from msgspec import Struct
from msgspec.structs import replace

from pgha.clock import Deadline, Instant, earlier, remaining_s
from pgha.model.lock import (
    LEASE_DOUBT_S,
    Identity,
    Licence,
    LicenceState,
    LockMode,
    LockRecord,
    fence_at,
    licence_s,
    licensed_until,
)


class Sent(Struct, frozen=True, kw_only=True):
    """A record that was sent, and when its first byte may have left."""

    record: LockRecord
    at: Instant
    onto_revision: int      # the revision that its transaction compares


class LicenceBook:
    """Keeps `licence` true. Every method is synchronous and total."""

    def __init__(self, me: Identity) -> None:
        self.me = me
        self.licence = Licence()
        self.value = b""                       # of the committed record, for the next compare
        self._sent: dict[int, Sent] = {}       # by sequence: committed last one, and those not settled
        self._sequence = 0                     # the last that was given to a send or to a failsafe round
        self._composed = 0                     # the last that was given to a send
        self._committed = 0
        self._cap: Deadline | None = None      # a shortening write that is not settled …
        self._cap_at: Instant | None = None    # … and when it was first sent
        self._cap_sequence = 0

    # --- what to send --------------------------------------------------------------------------------------------------

    def compose(self, now: Instant, *, ttl_s: float, mode: LockMode, lsn: int, timeline: int, onto_revision: int, mixed: bool = False) -> Sent:
        """The record to send next; call immediately before sending.

        An unsettled record for the same compare is sent again as it is, so that its validity goes on counting from
        its first send whichever attempt is answered. Otherwise it is a new sequence.
        """
        last = self._sent.get(self._composed)
        if (
            last is not None and last.onto_revision == onto_revision and self._composed != self._committed
            and last.record.mode == mode and last.record.ttl_s == ttl_s and last.record.mixed == mixed
        ):
            return last
        self._sequence += 1
        self._composed = self._sequence
        record = LockRecord(
            holder=self.me.name, node_id=self.me.node_id, incarnation=self.me.incarnation, sequence=self._sequence,
            ttl_s=ttl_s, mode=mode, lsn=lsn, timeline=timeline, mixed=mixed,
        )
        sent = Sent(record=record, at=now, onto_revision=onto_revision)
        self._sent[self._sequence] = sent
        return sent

    def shortened(self, sent: Sent) -> Deadline | None:
        """The earlier end that a send brings with it from its first byte on; None if it shortens nothing.

        The caller has the guard confirm it, then calls `shorten`, then sends.
        """
        now_valid = self.licence.valid_until
        if now_valid is None or sent.record.sequence < self.licence.sequence:
            return None     # sent again, and older than the round that has given more: it takes nothing back
        end = licensed_until(sent.record, sent.at)
        return end if remaining_s(end, now_valid) < 0 else None

    def shorten(self, sent: Sent, end: Deadline) -> None:
        """From now on the licence ends at `end` at the latest, until this send is settled."""
        if self._cap is None:
            self._cap_at = sent.at
        self._cap = end if self._cap is None else earlier(self._cap, end)
        self._cap_sequence = max(self._cap_sequence, sent.record.sequence)
        self._apply_cap()

    # --- what came back ------------------------------------------------------------------------------------------------

    def committed(self, sent: Sent, *, revision: int, value: bytes, epoch: int, epoch_revision: int, acquired_pass: int, leader_revision: int = 0) -> None:
        """`sent` is known to be in the store at `revision`."""
        record = sent.record
        self._sent = {n: s for n, s in self._sent.items() if n >= record.sequence}
        self.value = value
        self._committed = record.sequence
        if self._cap is not None and record.sequence >= self._cap_sequence:
            self._cap = None
        released = record.mode == "released"
        before = self.licence
        self.licence = replace(
            before,
            state=LicenceState.NONE if released else
            LicenceState.RELEASING if self.licence.state is LicenceState.RELEASING else LicenceState.HELD,
            sequence=record.sequence, ttl_s=record.ttl_s, mode=record.mode, since=None if released else sent.at,
            valid_until=None if released else licensed_until(record, sent.at),
            revision=revision, epoch=epoch, epoch_revision=epoch_revision, acquired_pass=acquired_pass,
            failing_since=None, failing_why="", lost_to="", by_failsafe=False, shortened_at=None,
            mixed=record.mixed, leader_revision=leader_revision if record.mixed else 0,
        )
        if before.by_failsafe and record.sequence < before.sequence and not released:
            # A send of before the round has arrived at last. What all members promised since stands beside it.
            self.licence = replace(self.licence, sequence=before.sequence, since=before.since, valid_until=before.valid_until, by_failsafe=True)
        self._apply_cap()

    # --- failsafe ------------------------------------------------------------------------------------------------------

    def round_begins(self) -> int:
        """The sequence of the licence that a round is to give: later than every send of before it, so that the guard takes it."""
        self._sequence += 1
        return self._sequence

    def extend(self, began: Instant, now: Instant, *, sequence: int, epoch: int, ttl_s: float) -> bool:
        """All who might take over have promised not to, after `began`, for `ttl_s`. Whether that widens the licence.

        A renewal of before the round may have been answered during it: what it changed of the ttl was asked of nobody.
        And one of after its beginning may have been committed: the promise is void beside it (Promise.is_superseded_by).
        """
        licence = self.licence
        if licence.state is not LicenceState.HELD or licence.valid_until is None or licence.mode != "held" or licence.epoch != epoch:
            return False
        if self._cap is not None or remaining_s(fence_at(licence.valid_until, licence.ttl_s), now) <= 0:
            return False        # a shorter one may have been committed; or the killing has begun, and nothing is revived
        end = began.plus_s(licence_s(min(ttl_s, licence.ttl_s)) - (LEASE_DOUBT_S if licence.mixed else 0.0))     # as a renewal's would be
        for number, sent in self._sent.items():
            end = earlier(end, licensed_until(sent.record, sent.at)) if number > sequence else end
        if sequence <= licence.sequence or remaining_s(end, licence.valid_until) <= 0:
            return False        # a later send was committed meanwhile: that counts for more
        self.licence = replace(licence, sequence=sequence, since=began, valid_until=end, by_failsafe=True)
        return True

    def recognise(self, record: LockRecord | None) -> Sent | None:
        """The send that `record` is, if this process sent it and has not superseded it."""
        if record is None or record.incarnation != self.me.incarnation or record.node_id != self.me.node_id:
            return None
        sent = self._sent.get(record.sequence)
        return sent if sent is not None and sent.record == record else None

    def may_still_commit(self, revision: int) -> bool:
        """May an unsettled send still take effect, if the record's revision in the store is `revision`?"""
        return any(sent.onto_revision == revision for sent in self._sent.values())

    def is_own_past(self, record: LockRecord) -> bool:
        """A record of this incarnation that was superseded: a store restored from a backup shows such."""
        return record.incarnation == self.me.incarnation and record.sequence < self.licence.sequence

    def lost(self, record: LockRecord) -> None:
        """Another's record stands in place of ours."""
        self._sent.clear()
        self._cap = None
        self.licence = Licence(state=LicenceState.LOST, lost_to=record.holder or "unknown", sequence=self.licence.sequence)

    def never_acquired(self) -> None:
        """A take-over cannot commit any more (its compare can no longer hold): back to nothing."""
        if self.licence.state is LicenceState.ACQUIRING:
            self._sent.clear()
            self.licence = Licence()

    def acquiring(self) -> None:
        """A take-over is about to be sent. It grants nothing until it is known to be committed.

        It is a new sequence: a renewal that was never answered would bring its old first send with it.
        """
        if self.licence.state is not LicenceState.ACQUIRING:
            self._sent.pop(self._composed, None)
        self.licence = Licence(state=LicenceState.ACQUIRING)
        self._cap = None

    def releasing(self) -> None:
        """A release is about to be sent: this record is never renewed again."""
        self.licence = replace(self.licence, state=LicenceState.RELEASING)

    def expired(self) -> None:
        """The licence has ended by the clock and everything of the data directory is dead: it is not ours any more."""
        self._sent.clear()
        self._cap = None
        self.licence = Licence()

    def failing(self, now: Instant, why: str) -> None:
        """A renewal was not answered usefully: unknown. The deadline stands."""
        if self.licence.failing_since is None:
            self.licence = replace(self.licence, failing_since=now, failing_why=why)
        elif self.licence.failing_why != why:
            self.licence = replace(self.licence, failing_why=why)

    def _apply_cap(self) -> None:
        valid = self.licence.valid_until
        if self._cap is not None and valid is not None:
            self.licence = replace(self.licence, valid_until=earlier(valid, self._cap), shortened_at=self._cap_at)
