"""Timeline history files of a data directory: which timelines it knows, and numbers that it must not take.

A promotion takes the next number for which no history file exists. A file with a comment and no row therefore *blocks*
its number, while a standby that sees it does not follow it: the timeline it names descends from nothing (both measured,
safety model 7). Blocks must be contiguous from the own timeline on, or the number before the gap is taken.

By which claim a promotion took its number stands in the same files: PostgreSQL (writeTimeLineHistory) copies the file of
the timeline that it leaves into the new one, comments too, and a walreceiver, a backup, an archive and pg_rewind carry it on
byte by byte. So a comment that is appended to the old timeline's file before the promotion goes wherever the new one goes.
The old timeline may have no file (timeline 1 has none): one without rows does the same.

Whoever follows somebody else must have removed his blocks: a walreceiver does not fetch a history whose file is there,
so a standby with a block stays for ever behind the primary that really took the number (measured).
"""

from __future__ import annotations

import re
from pathlib import Path

from msgspec import Struct

from pgha.errors import PostgresError
from pgha.model.wal import HistoryRow, claim_line, parse_history_file
from pgha.postgres.files import read_beginning, remove_file, write_file

_NAME = re.compile(r"([0-9A-F]{8})\.history")
#: A block of ours begins so, and says nothing that is not a comment of ours.
_OURS = "# pgha: "
_BLOCK = f"{_OURS}number taken: "
#: A history is a few lines; anything longer is damage.
_LIMIT_BYTES = 1024 * 1024


class HistoryFile(Struct, frozen=True, kw_only=True):
    """`<timeline>.history` with rows. `modified_s`: epoch seconds; for the newest, about when the promotion happened."""

    timeline: int
    rows: tuple[HistoryRow, ...]
    modified_s: float


def _path(data_dir: Path, timeline: int) -> Path:
    return data_dir / "pg_wal" / f"{timeline:08X}.history"


def _files(data_dir: Path) -> list[tuple[int, Path]]:
    found = ((_NAME.fullmatch(path.name), path) for path in (data_dir / "pg_wal").iterdir())
    return sorted((int(match[1], 16), path) for match, path in found if match)


def _read(path: Path) -> str:
    return read_beginning(path, _LIMIT_BYTES).decode(errors="replace")


def read_histories(data_dir: Path) -> dict[int, HistoryFile]:
    """Every history in pg_wal that has rows, by timeline; blocks are not among them. PostgresError names a damaged one."""
    histories = {}
    for timeline, path in _files(data_dir):
        try:
            text, modified_s = _read(path), path.stat().st_mtime
            rows = parse_history_file(text)
        except FileNotFoundError:
            continue  # removed or archived away while we looked
        except ValueError as e:
            raise PostgresError(f"{path}: {e}") from None
        if rows:
            histories[timeline] = HistoryFile(timeline=timeline, rows=rows, modified_s=modified_s)
    return histories


def read_history(data_dir: Path, timeline: int) -> HistoryFile | None:
    """How `timeline` came to be; None on timeline 1, or if the file is not (or no longer) here."""
    return read_histories(data_dir).get(timeline) if timeline > 1 else None


def block_timeline(data_dir: Path, timeline: int, comment: str) -> bool:
    """Keep a promotion from taking `timeline`. False if a file of that number is there already (a history, or a block)."""
    assert timeline > 1, timeline  # nobody takes that
    path = _path(data_dir, timeline)
    if path.exists():
        return False
    write_file(path, f"{_BLOCK}{' '.join(comment.split())}\n")
    return True


def claim_timeline(data_dir: Path, leaving: int, timeline: int, claim: str, before: list[tuple[int, bytes | None]]) -> None:
    """The promotion from `leaving` to `timeline` will say, in the new timeline's history, that it was `claim`.

    PostgreSQL copies the file of the newest timeline that it knows a way to, which may be one above `leaving`: all real
    ones below `timeline` get the line. `before` gets what each of them was (None: was not there), for `unclaim`.
    """
    for number in range(leaving, timeline):
        path = _path(data_dir, number)
        try:
            content = read_beginning(path, _LIMIT_BYTES)
        except FileNotFoundError:
            content = None
        if len(content or b"") >= _LIMIT_BYTES:
            raise PostgresError(f"{path}: longer than any timeline history")
        if number != leaving and (content is None or _is_block(content.decode(errors="replace"))):
            continue
        before.append((number, content))
        text = f"{_BLOCK}its own history is not known here\n".encode() if content is None else content
        write_file(path, text + (b"" if text.endswith(b"\n") or not text else b"\n") + claim_line(claim).encode())


def unclaim(data_dir: Path, before: list[tuple[int, bytes | None]]) -> None:
    """The promotion has copied the claim, or was given up: every file as it was, which may be in an archive."""
    for number, content in before:
        if content is None:
            remove_file(_path(data_dir, number))
        else:
            write_file(_path(data_dir, number), content)


def unblock_timeline(data_dir: Path, timeline: int) -> bool:
    """Remove our block. False if there is none; a real history is never touched."""
    path = _path(data_dir, timeline)
    try:
        if not _is_block(_read(path)):
            return False
    except FileNotFoundError:
        return False
    return remove_file(path)


def blocked_timelines(data_dir: Path) -> dict[int, str]:
    """Our blocks: timeline → comment."""
    blocks = {}
    for timeline, path in _files(data_dir):
        try:
            text = _read(path)
        except FileNotFoundError:
            continue
        if _is_block(text):
            blocks[timeline] = text[len(_BLOCK):].strip()
    return blocks


def unblock_all(data_dir: Path) -> list[int]:
    """Remove all our blocks; their numbers."""
    return [timeline for timeline in blocked_timelines(data_dir) if unblock_timeline(data_dir, timeline)]


def _is_block(text: str) -> bool:
    return text.startswith(_BLOCK) and all(line.startswith(_OURS) for line in text.splitlines())
