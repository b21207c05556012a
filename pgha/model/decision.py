"""What a pass decided, why, and what the next pass needs to remember."""

from __future__ import annotations

from typing import Literal

from msgspec import Struct

from pgha.clock import Deadline, Instant
from pgha.model.action import Action
from pgha.model.failsafe import FailsafeOrder
from pgha.model.request import Reinitialisation, ReinitialisationEnd, ScheduledRestart
from pgha.model.synchronous import Promise
from pgha.model.wal import HistoryRow


class Reason(Struct, frozen=True, kw_only=True):
    """One rule asked: its address (`promotion.caught_up` is `def caught_up` in decide/promotion.py), whether it held,
    and why, with both numbers."""

    rule: str
    holds: bool
    because: str


class Mandate(Struct, frozen=True, kw_only=True):
    """Until when the renewer may go on renewing without another word from the loop (safety model 10)."""

    kind: Literal["none", "running", "starting", "stopping", "operation", "paused"] = "none"
    until: Deadline | None = None
    why: str = ""


class Election(Struct, frozen=True, kw_only=True):
    """An election that this node takes part in."""

    epoch: int                      # the epoch that just ended: votes are for its succession
    lock_revision: int
    began_at: Instant
    frozen_at: Instant | None = None
    voted_at: Instant | None = None  # own position is final since then
    standing_lsn: int = 0           # own position while nothing is received any more, and since when it stands
    standing_since: Instant | None = None


class Replica(Struct, frozen=True, kw_only=True):
    """How a standby confirms: `target` is a position of the primary that it is to reach, set at `since`.

    `confirmed`: it has reached one. `streaming`: it was connected in the last pass; since `since` it is not, if false.
    """

    target: int = 0
    since: Instant
    confirmed: bool = False
    streaming: bool = True


class SyncBook(Struct, frozen=True, kw_only=True):
    """The leader's memory of its synchronous set.

    `sent`: promises sent to the store on top of /sync at revision `sent_on`; as long as that revision stands, any of
    them may still arrive. `names` is synchronous_standby_names as seen since `seen_at` in the server started at
    `started_at_s`; `mark`: a position of the primary when every process surely obeyed it (0: not yet).
    """

    epoch_revision: int = 0
    first_revision: int = 0          # /sync when the book was opened: once it has moved on, no write of a former agent can arrive
    sent: tuple[Promise, ...] = ()
    sent_on: int = -1
    sent_at: Instant | None = None
    names: str | None = None
    started_at_s: float = 0.0
    seen_at: Instant | None = None
    mark: int = 0
    set_at: Instant | None = None    # when synchronous_standby_names was last set
    replicas: dict[str, Replica] = {}


class FailsafeBook(Struct, frozen=True, kw_only=True):
    """The leader's memory of `/failsafe` in this epoch.

    `sent`: name → api_url of everybody in any list that was sent on top of the key at revision `sent_on`; as long as that
    revision stands, any of these lists may still arrive. `first_revision`: the key's when the book was opened.
    """

    epoch_revision: int = 0
    first_revision: int = -1         # once it has moved on, no list of a former agent can arrive
    sent: dict[str, str] = {}
    sent_on: int = -1


class Memory(Struct, frozen=True, kw_only=True):
    """What one pass hands to the next. Everything else is observed anew."""

    election: Election | None = None
    promotion_failed_at: Instant | None = None
    pre_promoted_epoch: int = -1               # the operator's program has agreed to a promotion under the lock of this epoch
    vetoed_until: Instant | None = None        # it has refused: this node does not lead before then
    veto_why: str = ""
    crash_seen_at: Instant | None = None       # PostgreSQL died while this node was leader
    start_failures: int = 0
    last_start_failed_at: Instant | None = None
    clone_failures: int = 0
    last_clone_failed_at: Instant | None = None
    rewind_failed: str = ""                     # why it can never succeed for this upstream and timeline …
    rewind_failed_for: str = ""                 # … which is this one
    rewind_failures: int = 0
    last_rewind_failed_at: Instant | None = None
    demoted_sequence: int = 0                   # demoted in order because this sequence's licence was ending
    holding_since: Instant | None = None        # the lock is held, and PostgreSQL is no primary yet
    not_streaming_since: Instant | None = None
    handed_over_revision: int = -1              # the failover key's revision for which this leader has stopped to hand over
    switchover_revision: int = 0                # the failover key's revision being carried out
    last_ended_id: int = 0                      # the last operation whose end was taken note of
    last_status_at: Instant | None = None
    bootstrap_identifier: str = ""              # this node made a new cluster's directory: its system identifier …
    bootstrap_revision: int = 0                 # … and the revision of its own claim on `initialize`
    switchover_asked_at: Instant | None = None
    upstream_asked_at: Instant | None = None
    handover_judged_at: Instant | None = None   # this crash: handing over was looked at and refused then
    compacted_revision: int = 0                 # the store was asked to forget what is older than this
    shutdown_done: bool = False
    left_running: bool = False                  # … and PostgreSQL goes on without the agent: pause
    paused: bool = False                        # pause was in force in the last pass
    ours_to_start: bool = False                 # PostgreSQL is down by this node's own doing: it starts it again, also in pause
    stand_back_until: Instant | None = None
    stand_back_why: str = ""
    sync: SyncBook = SyncBook()
    failsafe: FailsafeBook = FailsafeBook()
    expected_standbys: tuple[str, ...] = ()     # who answered as a standby when this node took the lock: they will follow
    leaving_since: Instant | None = None        # a synchronous standby that is to stop waits to be let go
    scheduled_restart: ScheduledRestart | None = None
    restart_within_s: float = 0.0               # the primary is being restarted, and is to be back within this time
    restart_overdue: bool = False               # … and was not
    reinit: Reinitialisation | None = None      # the data is to be replaced, as an operator asked
    reinit_ended: ReinitialisationEnd | None = None
    said: str = ""                              # the last word about what operators asked of this node


class PeerQuestion(Struct, frozen=True, kw_only=True):
    """Whom to ask for positions, and for the succession of which epoch. Empty names: nobody."""

    names: dict[str, str] = {}      # name → api_url
    epoch: int = -1
    every_s: float = 0.1


class Vote(Struct, frozen=True, kw_only=True):
    """What this node answers to peers: its position, and for which epoch it is final (-1: still moving).

    `candidate` false: it would not take the lock now (a tag, lag, a failed promotion, it has just handed over).
    """

    epoch: int = -1
    timeline: int = 0
    lsn: int = 0
    candidate: bool = True
    history: tuple[HistoryRow, ...] = ()    # of `timeline`: what it contains of the others' (safety model 6.3)


class Decision(Struct, frozen=True, kw_only=True):
    """The outcome of one pass."""

    situation: str                              # which rung of the ladder
    summary: str                                # one sentence for the log and for people
    reasons: tuple[Reason, ...] = ()
    actions: tuple[Action, ...] = ()
    memory: Memory = Memory()
    mandate: Mandate = Mandate()
    ask_peers: PeerQuestion = PeerQuestion()
    vote: Vote = Vote()
    failsafe: FailsafeOrder | None = None       # whom to ask if the store stays silent; None: nobody, the licence just ends
    state: str = ""                             # PostgreSQL's state for the member key and REST (compatibility spec 1.10)
    role: str = ""                              # spec 1.11
    leaves_sync: bool = False                   # published as tags: no synchronous standby, since it is about to stop
    paused: bool = False                        # pause is in force on this node
    wake_in_s: float = 10.0
