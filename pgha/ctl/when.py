"""When is it to be done? A moment as an operator types it. Only commands that were given one load this."""

from __future__ import annotations

from datetime import UTC, datetime

from pgha.ctl.ends import USAGE, End


def moment(text: str) -> str:
    """ISO 8601 with its distance from UTC; without one it is this machine's time, as the operator's clock shows it. End(USAGE) if it
    is none, or past."""
    try:
        at = datetime.fromisoformat(text.strip())
        at = at if at.tzinfo is not None else at.astimezone()
        past = at <= datetime.now(UTC)
    except (ValueError, OverflowError, OSError):
        raise End(USAGE, f"Unable to parse scheduled timestamp ({text}). It should be in an unambiguous format (e.g. ISO 8601: 2026-01-31T03:00:00+01:00)") from None
    if past:
        raise End(USAGE, f"{at.isoformat()} is past; allowed: now, or a moment to come")
    return at.isoformat()
