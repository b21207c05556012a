"""On which line of a TOML file does a key get its value?

The parser tells no places. But the beginning of a file up to a line is TOML itself, unless the line is within a value of
several lines: so the key is set by the first line up to which the text can be parsed and has it.
"""

from __future__ import annotations

import tomllib
from typing import Any

from pgha.config.schema import Path

#: Longer files are not searched.
MOST_LINES = 20_000


def line_of(text: str, path: Path) -> int:
    """From 1 on; 0 if it is not there, or cannot be told."""
    lines = text.splitlines(keepends=True)
    if len(lines) > MOST_LINES or not _has(_parsed(text), path):
        return 0
    # What a beginning has it keeps, and a beginning that cannot be parsed only hides the end of its last value: so halve.
    low, high = 0, len(lines)
    while high - low > 1:
        middle = _parsable(lines, (low + high) // 2, low)
        if middle == low:
            low, high, middle = _next_parsable(lines, low, high)
            if middle == high:
                break
        if _has(_parsed("".join(lines[:middle])), path):
            high = middle
        else:
            low = middle
    return low + 1 + _blank(lines[low:high])


def _parsable(lines: list[str], at: int, least: int) -> int:
    """The last place up to `at` where the beginning is TOML; `least` is one."""
    while at > least and _parsed("".join(lines[:at])) is None:
        at -= 1
    return at


def _next_parsable(lines: list[str], low: int, high: int) -> tuple[int, int, int]:
    at = low + 1
    while at < high and _parsed("".join(lines[:at])) is None:
        at += 1
    return low, high, at


def _blank(lines: list[str]) -> int:
    """How many lines at the beginning say nothing."""
    count = 0
    while count < len(lines) - 1 and (not lines[count].strip() or lines[count].lstrip().startswith("#")):
        count += 1
    return count


def _parsed(text: str) -> dict[str, Any] | None:
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError):
        return None


def _has(table: Any, path: Path) -> bool:
    for part in path:
        if not isinstance(table, dict) or part not in table:
            return False
        table = table[part]
    return True
