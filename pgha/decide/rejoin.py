"""Can this data follow that primary as it is, must it be rewound, or is it lost to it?

Positions on different timelines compare only through the upstream's history: what lies behind the point where it left
our timeline exists nowhere else any more, and must go before this data can follow.
"""

from __future__ import annotations

from enum import StrEnum

from msgspec import Struct

from pgha.decide.common import reason
from pgha.decide.ended import rewind_target
from pgha.model.decision import Memory, Reason
from pgha.model.observation import Observation, Upstream
from pgha.model.wal import HistoryRow, Position, format_lsn


class Verdict(StrEnum):
    """`UNKNOWN`: the end of our WAL is not known yet, and it matters."""

    FOLLOW = "follow"
    REWIND = "rewind"
    CLONE = "clone"
    UNKNOWN = "unknown"


class Judgement(Struct, frozen=True, kw_only=True):
    verdict: Verdict
    because: Reason


def judge(own: Position, own_history: tuple[HistoryRow, ...], upstream: Upstream, *, end_is_known: bool, asked_later: bool = False) -> Judgement:
    """`own`: the end of what this node has, `end_is_known` whether that is really the end (a stopped server's WAL may
    go on behind what pg_control says). `asked_later`: the upstream was asked when this node had received all of it."""
    def verdict(what: Verdict, text: str) -> Judgement:
        return Judgement(verdict=what, because=reason("rejoin.judge", what is Verdict.FOLLOW, text))

    two = _two_promotions(own_history, _until(own.timeline, upstream), same_timeline=own.timeline == upstream.timeline)
    if two is not None:
        return verdict(*two)
    if own.timeline == upstream.timeline:
        if asked_later and not upstream.in_recovery and own.lsn > upstream.lsn > 0:
            # Nobody has more than the primary that he had it from: two promotions took the same number at the same point, or it lost its own.
            return verdict(Verdict.CLONE, f"both on timeline {own.timeline}, but own WAL ends at {format_lsn(own.lsn)} and {upstream.name}'s, a primary's, at {format_lsn(upstream.lsn)}")
        return verdict(Verdict.FOLLOW, f"both on timeline {own.timeline}")
    switch = next((row.switch_lsn for row in upstream.history if row.timeline == own.timeline), None)
    if switch is None:
        return verdict(Verdict.REWIND, f"{upstream.name} is on timeline {upstream.timeline}, whose history does not know timeline {own.timeline}")
    if own.lsn > switch:
        return verdict(Verdict.REWIND, f"own WAL ends at {own}, {upstream.name} left that timeline at {format_lsn(switch)}")
    if not end_is_known:
        return verdict(Verdict.UNKNOWN, f"own WAL goes at least to {own}, {upstream.name} left that timeline at {format_lsn(switch)}")
    return verdict(Verdict.FOLLOW, f"own WAL ends at {own}, {upstream.name} left that timeline at {format_lsn(switch)}")


def interrupted() -> Judgement:
    """What a rewind has left half done is neither the one nor the other: only another rewind, or a copy, makes it whole."""
    return Judgement(verdict=Verdict.REWIND, because=reason("rejoin.judge", False, "a rewind of this data was begun and not ended"))


def _until(timeline: int, upstream: Upstream) -> tuple[HistoryRow, ...]:
    """How the upstream's `timeline` came to be: what its history says of those before; () if it never was on it, or does not say."""
    if timeline == upstream.timeline:
        return upstream.history
    numbers = [row.timeline for row in upstream.history]
    return upstream.history[:numbers.index(timeline)] if timeline in numbers else ()


def _two_promotions(ours: tuple[HistoryRow, ...], theirs: tuple[HistoryRow, ...], *, same_timeline: bool) -> tuple[Verdict, str] | None:
    """Do two histories of one timeline tell of different promotions, by which it or an earlier one came to its number?

    The files are copied byte by byte from node to node; who lacks the beginning (a clone's first) has the same end.
    """
    for mine, its in reversed(list(zip(reversed(ours), reversed(theirs), strict=False))):
        if (mine.timeline, mine.switch_lsn) != (its.timeline, its.switch_lsn):
            # pg_rewind finds where that was, unless it sees one number at both ends: then it sees nothing to do.
            return (Verdict.CLONE if same_timeline else Verdict.REWIND), (
                f"one number, but it branched at {_left(mine)} here and at {_left(its)} there")
        if mine.claim != its.claim:
            # Number and place say the same, so pg_rewind would see nothing to do (measured; safety model 7).
            return Verdict.CLONE, f"two promotions took one number at {_left(mine)}: '{mine.claim}' here, '{its.claim}' there"
    return None


def _left(row: HistoryRow) -> str:
    return f"{format_lsn(row.switch_lsn)} of timeline {row.timeline}"


def rewind_conditions(o: Observation, memory: Memory) -> tuple[Reason, ...]:
    """Why pg_rewind may not be possible; every obstacle at once."""
    control = o.directory.control
    hints = control is not None and (control.wal_log_hints or control.checksums)
    return (
        reason("rejoin.rewind_is_enabled", o.settings.use_pg_rewind, f"postgresql.use_pg_rewind is {str(o.settings.use_pg_rewind).lower()}"),
        reason("rejoin.rewind_is_possible", hints, "wal_log_hints or data checksums are on" if hints else "neither wal_log_hints nor data checksums are on"),
        rewind_has_not_failed(o, memory),
    )


def rewind_has_not_failed(o: Observation, memory: Memory) -> Reason:
    failed = bool(memory.rewind_failed) and memory.rewind_failed_for == rewind_target(o)
    tried = f"{memory.rewind_failures} passing failures" if memory.rewind_failures else "not tried yet"
    return reason("rejoin.rewind_has_not_failed", not failed, memory.rewind_failed if failed else tried)


def clone_permission(o: Observation, memory: Memory) -> Reason:
    """Replacing a data directory that diverged is the operator's to allow."""
    rule = "rejoin.clone_is_allowed"
    settings = o.settings
    failed = not rewind_has_not_failed(o, memory).holds
    if failed and settings.remove_data_directory_on_rewind_failure:
        return reason(rule, True, "postgresql.remove_data_directory_on_rewind_failure is on")
    if settings.remove_data_directory_on_diverged_timelines:
        return reason(rule, True, "postgresql.remove_data_directory_on_diverged_timelines is on")
    wanted = "remove_data_directory_on_rewind_failure" if failed else "remove_data_directory_on_diverged_timelines"
    return reason(rule, False, f"postgresql.{wanted} is off; the data is kept: switch it on, or move the data directory away")
