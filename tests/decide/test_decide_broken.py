"""Data without a server (decide/broken.py, rejoin.py, restart.py): start, rewind, copy anew, hand over, or stay down."""

from __future__ import annotations

import pytest
from decide_world import (
    CLAIM,
    CRASHED,
    HISTORY,
    LSN,
    STOPPED,
    SYSTEM,
    TIMELINE,
    MiB,
    ago,
    ahead,
    check,
    names,
    only,
    peer,
    record,
    row,
    silent,
    with_lock,
)
from msgspec import structs

from pgha.decide.rejoin import Verdict, judge
from pgha.model.action import AcquireLock, Clone, Demote, Rewind, StartPrimary, StartStandby
from pgha.model.cluster import HistoryEntry, Tags
from pgha.model.lock import Licence, LicenceState
from pgha.model.node import Control
from pgha.model.observation import Operation, Upstream
from pgha.model.wal import HistoryRow, Position, format_lsn

FINE = "broken.handover_is_due broken.handover_loses_nothing"     # a crash a moment ago is not handed over: that is no obstacle
END = {"directory__end_of_wal": LSN, "directory__end_of_wal_timeline": TIMELINE}
LATE = {"memory__crash_seen_at": ago(3.5)}

LEADERS = [
    row("crashed a moment ago", situation="broken", refuses=FINE, does="StartPrimary", says="writes away for 0.0 s, handed over after 3 s", summary="starting primary after failure"),
    row("never started by this agent", postgres__ever_started=False, does="StartPrimary", summary="starting primary"),
    row("orphans live", postgres__orphans=True, refuses="broken.no_orphans", says="server processes live without a postmaster", does="Sweep"),
    row("a standby's data", directory__control__state="in archive recovery", does="StartStandby", refuses="restart.was_primary", says="pg_control says: in archive recovery"),
    row("shut down in recovery", directory__control__state="shut down in recovery", does="StartStandby", refuses="restart.was_primary"),
    row("crashed in crash recovery", directory__control__state="in crash recovery", does="StartPrimary"),
    row("pg_control cannot be read", directory__control=None, does="StartStandby", refuses="restart.was_primary restart.timeline_is_current", says="unknown"),
    row("an older timeline than the cluster's", dcs__view__history=(HistoryEntry(timeline=3, lsn=LSN),), does="Demote", says="own timeline 3, the cluster's 4", summary="giving the lock back"),
    row("start failed a moment ago", memory__start_failures=2, memory__last_start_failed_at=ago(0.5), does="", summary="start failed 2 times, next try in 1.5 s"),
    row("start failed two seconds ago", memory__start_failures=2, memory__last_start_failed_at=ago(2), does="StartPrimary"),
    row("start failed often: five seconds at most", memory__start_failures=9, memory__last_start_failed_at=ago(0), does="", summary="next try in 5.0 s"),
    row("away too long, the end of WAL not known", **LATE, refuses="broken.handover_loses_nothing", says="no eligible peer is known to have everything up to the end of WAL, not read yet",
        does="InspectEndOfWal", summary="looking for the end of WAL"),
    row("away too long, b and c have everything", **LATE, **END, refuses="", says=("b, c have everything up to 0/4000000", "writes away for 3.5 s, handed over after 3 s"), does="Demote",
        summary="handing over after a crash"),
    row("away too long, looked at before", **LATE, **END, memory__handover_judged_at=ago(14), does="StartPrimary"),
    row("away too long, looked at long before", **LATE, **END, memory__handover_judged_at=ago(15), does="Demote"),
    row("away for as long as a start may take", memory__crash_seen_at=ago(300), memory__handover_judged_at=ago(1), refuses="broken.start_is_overdue broken.handover_loses_nothing",
        says=("no primary for 300 s, primary_start_timeout 300 s", "b, c"), does="Demote", summary="giving the lock to those who can use it"),
    row("… and nobody could take over", memory__crash_seen_at=ago(300), memory__handover_judged_at=ago(1), peers={"c": peer("c", candidate=False)}, does="StartPrimary"),
    row("demoted because its licence was ending", memory__demoted_sequence=7, refuses="broken.licence_was_renewed_since", says="demoted under sequence 7, now 7", does=""),
    row("a rewind of it was interrupted", directory__rewind_interrupted=True, does="Demote", says="a rewind of this data was begun and not ended"),
    row("demoted under a former licence", memory__demoted_sequence=6, does="StartPrimary"),
    row("the end of WAL cannot be read", **LATE, does="", summary="cannot be read: not handing over",
        ended=Operation(kind="InspectEndOfWal", id=1, started_at=ago(2), ended_at=ago(1), why="x")),
    row("not yet long enough", memory__crash_seen_at=ago(2.9), **END, refuses="broken.handover_is_due", does="StartPrimary"),
    row("no start is to be waited for", settings__primary_start_timeout_s=0.0, **END, refuses="", does="Demote", says="handed over after 0 s"),
    row("never started by this agent, away too long", **LATE, **END, postgres__ever_started=False, refuses="", does="Demote"),
]


@pytest.mark.parametrize("case", LEADERS)
def test_a_leaders_server_died(case):
    check(CRASHED, case)


@pytest.mark.parametrize("changes", [{"lsn": LSN - 1}, {"running": False}, {"in_recovery": False}, {"timeline": 2}, {"tags": Tags(nofailover=True)}, {"asked_at": ago(2)}, {"answered": False}])
def test_nothing_is_handed_over_to_a_peer_who_would_lose_something_or_cannot_lead(changes):
    decision = CRASHED.but(**LATE, **END, peers={"c": peer("c", **changes)}).decide()
    assert decision.actions == ()
    assert decision.summary.startswith("not handing over, starting in place: no eligible peer is known to have everything")
    assert decision.memory.handover_judged_at == ago(0)


def test_a_hand_over_kills_and_gives_back():
    demote = only(CRASHED.but(**LATE, **END).decide(), Demote)
    assert (demote.mode, demote.release) == ("kill", True)


def test_the_crash_is_remembered_from_when_it_was_seen():
    assert CRASHED.decide().memory.crash_seen_at == ago(0)
    assert CRASHED.but(**LATE).decide().memory.crash_seen_at == ago(3.5)


def test_the_time_to_start_is_bounded():
    assert only(CRASHED.decide(), StartPrimary).timeout_s == 300
    assert only(CRASHED.but(settings__primary_start_timeout_s=7.0).decide(), StartPrimary).timeout_s == 7


# --- the own former record -----------------------------------------------------------------------------------------------

FORMER = with_lock(CRASHED.but(licence=Licence(), **END), record("a", incarnation="run-0"))

OWN = [
    row("fits", refuses="", does="AcquireLock", summary="adopting"),
    row("not read in this pass", dcs__read_at=ago(1), does="ReadCluster"),
    row("read half a second ago", dcs__read_at=ago(0.5), does="AcquireLock"),
    row("the data is older than the record", directory__control__timeline=2, does="StartStandby", refuses="restart.data_is_not_behind_record restart.timeline_is_current",
        says=("data on timeline 2, the record says 3", "own timeline 2, the cluster's 3")),
    row("no pg_control", directory__control=None, does="StartStandby", refuses="restart.data_is_not_behind_record restart.timeline_is_current", says="no readable pg_control"),
    row("the cluster went on", dcs__view__history=(HistoryEntry(timeline=3, lsn=LSN),), does="StartStandby", refuses="restart.timeline_is_current"),
    row("a rewind of it was interrupted", directory__rewind_interrupted=True, refuses="restart.is_whole broken.is_whole", does="", summary="waits for a leader to be rewound from"),
    row("no guard", guard__reachable=False, does="StartStandby", refuses="restart.guard_answers"),
    row("the end of WAL is not known", directory__end_of_wal=0, does="InspectEndOfWal", refuses="restart.own_wal_reaches_record", says="own WAL goes at least to"),
    row("… and cannot be read", directory__end_of_wal=0, does="StartStandby", refuses="restart.own_wal_reaches_record",
        ended=Operation(kind="InspectEndOfWal", id=1, started_at=ago(2), ended_at=ago(1), why="x")),
    row("data from a backup of the same timeline", directory__end_of_wal=LSN - 8, does="StartStandby", refuses="restart.own_wal_reaches_record",
        says=f"own WAL goes to {format_lsn(LSN - 8)}, the record says {format_lsn(LSN)}"),
    row("the outcome of adopting is not known", licence=Licence(state=LicenceState.ACQUIRING), does="", summary="not known yet"),
]


@pytest.mark.parametrize("case", OWN)
def test_the_own_former_record(case):
    check(FORMER, case)


def test_adopting_says_where_the_data_stands():
    """The position that was published stays until a server answers: others judge their lag against it."""
    action = only(FORMER.decide(), AcquireLock)
    assert (action.readopt, action.lsn, action.timeline, action.claim_timeline) == (True, LSN, TIMELINE, TIMELINE)
    further = only(FORMER.but(directory__end_of_wal=LSN + 500).decide(), AcquireLock)
    assert (further.lsn, further.timeline) == (LSN + 500, TIMELINE)


# --- somebody else leads -------------------------------------------------------------------------------------------------

def upstream(**changes):
    return Upstream(**{"name": "a", "asked_at": ago(0.1), "ok": True, "system_identifier": SYSTEM, "timeline": TIMELINE, "lsn": LSN, "history": HISTORY, **changes})


#: a was promoted to timeline 4 at LSN
WENT_ON = upstream(timeline=4, history=(*HISTORY, HistoryRow(timeline=3, switch_lsn=LSN)))
REWINDABLE = {"upstream": WENT_ON, "directory__end_of_wal": LSN + 1, "directory__end_of_wal_timeline": 3, "settings__use_pg_rewind": True}

#: b has a byte more than the primary from which alone it can have it
AHEAD = {"upstream": upstream(lsn=LSN), "directory__end_of_wal": LSN + 1, "directory__end_of_wal_timeline": 3, "postgres__since": ago(2)}

STANDBYS = [
    row("follows", refuses="", does="StartStandby", summary="starting as a secondary of a", says="both on timeline 3"),
    row("the leader has no key", dcs__view__members={}, refuses="broken.leader_is_known", says="a has no member key yet", does=""),
    row("the leader has no address", dcs__view__members__a__host="", refuses="broken.leader_is_known", does=""),
    row("the leader was not asked", upstream=None, refuses="broken.leader_is_primary", says="a: not asked yet", does=""),
    row("not asked, time to", upstream=None, memory__upstream_asked_at=ago(0.3), refuses="broken.leader_is_primary", does="InspectUpstream", summary="asking a for its timeline"),
    row("not asked, it is no primary yet", upstream=None, memory__upstream_asked_at=None, dcs__view__members__a__role="replica", refuses="broken.leader_is_primary", does=""),
    row("asked long ago", upstream=upstream(asked_at=ago(11)), refuses="broken.leader_is_primary", says="not asked yet", does=""),
    row("somebody else was asked", upstream=upstream(name="c"), refuses="broken.leader_is_primary", does=""),
    row("asked in vain", upstream=upstream(ok=False, why="timed out"), refuses="broken.leader_is_primary", says="a: timed out", does=""),
    row("still recovering", upstream=upstream(in_recovery=True), refuses="broken.leader_is_primary", says="still in recovery", does=""),
    row("pg_control cannot be read", directory__control=None, directory__why="bad CRC", refuses="broken.control_is_readable", says="bad CRC", does=""),
    row("another system", upstream=upstream(system_identifier="9" * 19), refuses="broken.same_system", says=("own " + SYSTEM, "a's " + "9" * 19), does=""),
    row("start failed a moment ago", memory__start_failures=3, memory__last_start_failed_at=ago(1), does="", summary="start failed 3 times, next try in 3.0 s"),
    row("the leader went on, end of WAL not known", upstream=WENT_ON, refuses="rejoin.judge", does="InspectEndOfWal", says="own WAL goes at least to 0/3FFFC00"),
    row("the leader went on, nothing of ours is left over", upstream=WENT_ON, directory__end_of_wal=LSN, directory__end_of_wal_timeline=3, refuses="", does="StartStandby"),
    row("ahead of a primary on the same timeline, which was asked after the end", **AHEAD, memory__upstream_asked_at=ago(1), refuses="rejoin.judge rejoin.rewind_is_enabled rejoin.clone_is_allowed",
        says="both on timeline 3, but own WAL ends at 0/4000001 and a's, a primary's, at 0/4000000", does=""),
    row("… a copy is allowed", **AHEAD, memory__upstream_asked_at=ago(1), settings__remove_data_directory_on_diverged_timelines=True, refuses="rejoin.judge rejoin.rewind_is_enabled", does="Clone"),
    row("… and was asked before it", **AHEAD, memory__upstream_asked_at=ago(3), refuses="broken.upstream_was_asked_later", does="InspectUpstream"),
    row("a byte is left over", **REWINDABLE, refuses="rejoin.judge rejoin.clone_is_allowed", does="Rewind", says="own WAL ends at 0/4000001 on timeline 3, a left that timeline at 0/4000000",
        summary="rewinding from a"),
    row("… rewind is off", **{**REWINDABLE, "settings__use_pg_rewind": False}, refuses="rejoin.judge rejoin.rewind_is_enabled rejoin.clone_is_allowed", says="use_pg_rewind is false", does="",
        summary="stays down"),
    row("… and was not prepared for", **REWINDABLE, directory__control__checksums=False, refuses="rejoin.judge rejoin.rewind_is_possible rejoin.clone_is_allowed", says="neither wal_log_hints", does=""),
    row("… prepared for by wal_log_hints", **REWINDABLE, directory__control__checksums=False, directory__control__wal_log_hints=True, does="Rewind"),
    row("… and has failed", **REWINDABLE, memory__rewind_failed="no common ancestor", memory__rewind_failed_for="a/4", refuses="rejoin.judge rejoin.rewind_has_not_failed rejoin.clone_is_allowed", says="no common ancestor", does=""),
    row("… and has failed, a copy is allowed then", **REWINDABLE, memory__rewind_failed="x", memory__rewind_failed_for="a/4", settings__remove_data_directory_on_rewind_failure=True,
        refuses="rejoin.judge rejoin.rewind_has_not_failed", does="Clone"),
    row("… has failed for another leader", **REWINDABLE, memory__rewind_failed="x", memory__rewind_failed_for="c/4", does="Rewind"),
    row("… could not connect a moment ago", **REWINDABLE, memory__rewind_failures=2, memory__last_rewind_failed_at=ago(1.5), does="", summary="pg_rewind failed 2 times, next try in 0.5 s"),
    row("… could not connect, tried again", **REWINDABLE, memory__rewind_failures=2, memory__last_rewind_failed_at=ago(2), does="Rewind"),
    row("… has not failed, a copy would be allowed then", **REWINDABLE, settings__remove_data_directory_on_rewind_failure=True, refuses="rejoin.judge rejoin.clone_is_allowed",
        says="remove_data_directory_on_diverged_timelines is off", does="Rewind"),
    row("… has not failed, a copy is allowed anyway", **REWINDABLE, settings__remove_data_directory_on_diverged_timelines=True, refuses="rejoin.judge", does="Rewind"),
    row("… is off, a copy is allowed", **{**REWINDABLE, "settings__use_pg_rewind": False}, settings__remove_data_directory_on_diverged_timelines=True,
        refuses="rejoin.judge rejoin.rewind_is_enabled", does="Clone", summary="copying anew from a"),
    row("… copying has failed a moment ago", **{**REWINDABLE, "settings__use_pg_rewind": False}, settings__remove_data_directory_on_diverged_timelines=True,
        memory__clone_failures=2, memory__last_clone_failed_at=ago(1), does="", summary="copying anew failed, next try in 1.0 s"),
    row("two promotions to the same number", upstream=upstream(history=(HISTORY[0], HistoryRow(timeline=2, switch_lsn=1))), settings__use_pg_rewind=True,
        refuses="rejoin.judge rejoin.clone_is_allowed", says="one number, but it branched at 0/1000000 of timeline 2 here and at 0/1 of timeline 2 there", does=""),
    row("two promotions to the same number at the same place", upstream=upstream(history=(HISTORY[0], structs.replace(HISTORY[1], claim="another"))), settings__use_pg_rewind=True,
        refuses="rejoin.judge rejoin.clone_is_allowed", says=f"two promotions took one number at 0/1000000 of timeline 2: '{CLAIM}' here, 'another' there", does=""),
    row("a rewind was interrupted", directory__rewind_interrupted=True, settings__use_pg_rewind=True, refuses="rejoin.judge rejoin.clone_is_allowed", does="Rewind",
        says="a rewind of this data was begun and not ended"),
    row("a rewind was interrupted, and nobody leads", directory__rewind_interrupted=True, lock__mode="released", refuses="broken.is_whole", does=""),
    row("nobody leads", lock__mode="released", does="StartStandby", summary="of nobody", refuses=""),
    row("its record has expired", dcs__lock_seen__since=ago(31), does="StartStandby", summary="of nobody"),
    row("the record is not to be believed yet", dcs__trusted_from=ahead(9), does="StartStandby", summary="starting as a secondary of a"),
]


@pytest.mark.parametrize("case", STANDBYS)
def test_a_standbys_server_is_stopped(case):
    check(STOPPED, case)


def test_what_is_started_rewound_and_copied_comes_from_the_leader():
    start = only(STOPPED.decide(), StartStandby)
    assert (start.upstream.host, start.slot_name) == ("a", "b")
    assert only(STOPPED.but(settings__use_slots=False).decide(), StartStandby).slot_name == ""
    assert only(STOPPED.but(**REWINDABLE).decide(), Rewind).source.name == "a"
    clone = only(STOPPED.but(**{**REWINDABLE, "settings__use_pg_rewind": False}, settings__remove_data_directory_on_diverged_timelines=True).decide(), Clone)
    assert (clone.source.name, clone.system_identifier, clone.replace) == ("a", SYSTEM, "remove_first")


@pytest.mark.parametrize("control, end, says", [
    (Control(state="shut down", system_identifier=SYSTEM, timeline=3, checkpoint_lsn=LSN + 5), 0, "0/4000005 on timeline 3"),
    (Control(state="shut down in recovery", system_identifier=SYSTEM, timeline=3, checkpoint_lsn=1, min_recovery_lsn=LSN + 6, min_recovery_timeline=3), 0, "0/4000006 on timeline 3"),
    (Control(state="shut down in recovery", system_identifier=SYSTEM, timeline=3, checkpoint_lsn=1, redo_lsn=LSN + 7, min_recovery_lsn=1, min_recovery_timeline=3), 0, "0/4000007 on timeline 3"),
    (Control(state="shut down", system_identifier=SYSTEM, timeline=3, checkpoint_lsn=1, min_recovery_lsn=LSN, min_recovery_timeline=3), LSN + 8, "0/4000008 on timeline 3"),
    (Control(state="shut down", system_identifier=SYSTEM, timeline=3, checkpoint_lsn=LSN + 9, min_recovery_lsn=1, min_recovery_timeline=2), 0, "0/4000009 on timeline 3"),
])
def test_the_end_of_own_wal_is_the_furthest_that_is_known(control, end, says):
    decision = STOPPED.but(upstream=WENT_ON, directory__control=control, directory__end_of_wal=end).decide()
    assert any(says in reason.because for reason in decision.reasons), decision.reasons


def own(timeline: int, lsn: int) -> Position:
    return Position(timeline=timeline, lsn=lsn)


@pytest.mark.parametrize("position, history, other, end_is_known, verdict", [
    (own(3, LSN), HISTORY, upstream(), False, Verdict.FOLLOW),
    (own(3, LSN), (), upstream(), True, Verdict.FOLLOW),
    (own(3, LSN), HISTORY, upstream(history=()), True, Verdict.FOLLOW),
    (own(3, LSN), (HistoryRow(timeline=2, switch_lsn=5),), upstream(), True, Verdict.CLONE),
    (own(3, LSN), (HISTORY[0], structs.replace(HISTORY[1], claim="")), upstream(), True, Verdict.CLONE),      # promoted by nobody of pgha's
    (own(3, LSN), HISTORY[1:], upstream(), True, Verdict.FOLLOW),               # the beginning was never known here
    (own(3, LSN), HISTORY, upstream(history=HISTORY[1:]), True, Verdict.FOLLOW),
    (own(3, LSN), (HISTORY[0], HistoryRow(timeline=2, switch_lsn=5)), WENT_ON, True, Verdict.REWIND),      # pg_rewind finds it
    (own(3, LSN), (HISTORY[0], structs.replace(HISTORY[1], claim="another")), WENT_ON, True, Verdict.CLONE),     # it would not
    (own(3, LSN), (structs.replace(HISTORY[0], claim="another"), HISTORY[1]), WENT_ON, True, Verdict.CLONE),
    (own(3, LSN), (structs.replace(HISTORY[0], switch_lsn=5), structs.replace(HISTORY[1], claim="another")), WENT_ON, True, Verdict.REWIND),   # the oldest tells
    (own(3, LSN), HISTORY, WENT_ON, True, Verdict.FOLLOW),
    (own(3, LSN), HISTORY, WENT_ON, False, Verdict.UNKNOWN),
    (own(3, LSN + 1), HISTORY, WENT_ON, False, Verdict.REWIND),
    (own(3, LSN + 1), HISTORY, WENT_ON, True, Verdict.REWIND),
    (own(2, 8 * MiB), HISTORY[:1], WENT_ON, True, Verdict.FOLLOW),
    (own(2, 17 * MiB), HISTORY[:1], WENT_ON, True, Verdict.REWIND),
    (own(5, 1), HISTORY, WENT_ON, True, Verdict.REWIND),       # a timeline that the leader never had
    (own(4, 1), HISTORY, upstream(), False, Verdict.REWIND),   # ours is newer than the leader's
])
def test_judging(position, history, other, end_is_known, verdict):
    judged = judge(position, history, other, end_is_known=end_is_known)
    assert judged.verdict is verdict, judged.because
    assert judged.because.holds == (verdict is Verdict.FOLLOW)


def test_orphans_come_first_for_standbys_too():
    assert names(STOPPED.but(postgres__orphans=True).decide()) == ("Sweep",)
    assert names(STOPPED.but(postgres__orphans=True, peers={"a": silent("a")}).decide()) == ("Sweep",)
