"""A terminal that shows a few lines, the same ones again and again: small writes, no flicker, and as it was before at the end.

Only rows that differ from what stands there are written, all in one piece. The last column is never written to, so that
no terminal begins a new line by itself; the alternate screen leaves the one before alone.

Rules of this file: whatever ends us but SIGKILL, the terminal is given back; a terminal that takes nothing (a dead ssh)
holds up nothing but itself.
"""

from __future__ import annotations

import os
import signal
import termios
import threading
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import trio

_ENTER = b"\x1b[?1049h\x1b[?25l\x1b[H\x1b[2J"
_LEAVE = b"\x1b[0m\x1b[?25h\x1b[?1049l"
#: the terminal has this long to take what gives it back
_LEAVE_S = 1.0
#: what ends us, after the terminal has been given back, as if we had not noticed it
DEADLY = (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
STYLES = {"": b"", "bold": b"\x1b[1m", "dim": b"\x1b[2m", "bad": b"\x1b[1;31m", "good": b"\x1b[32m", "note": b"\x1b[33m", "cyan": b"\x1b[36m", "blue": b"\x1b[34m", "magenta": b"\x1b[35m"}


class Part(NamedTuple):
    """Some text of a row, in one style."""

    text: str
    style: str = ""


Row = Sequence[Part]


class Terminal:
    """Standard output, if it is one. `colours` False: plain text all over."""

    def __init__(self, *, colours: bool) -> None:
        self._colours = colours
        self._shown: list[bytes] = []
        self._size = (0, 0)
        self._entered = False
        self._writing = threading.Lock()
        self._saved: list[int | list[bytes | int]] | None = None

    @contextmanager
    def taken(self) -> Iterator[None]:
        """From here to the end the terminal is ours."""
        self.enter()
        try:
            yield
        finally:
            self.leave()

    def enter(self) -> None:
        if not self._entered:
            self._entered = True
            if os.isatty(0):
                self._saved = termios.tcgetattr(0)
                own = termios.tcgetattr(0)
                own[3] &= ~(termios.ICANON | termios.ECHO)      # keys at once, and not on the screen; Ctrl-C stays what it is
                termios.tcsetattr(0, termios.TCSADRAIN, own)
            _write(_ENTER)
            self.forget()

    def leave(self) -> None:
        if not self._entered:
            return
        self._entered = False
        if self._saved is not None:
            try:
                termios.tcsetattr(0, termios.TCSANOW, self._saved)
            except termios.error:
                pass        # it is gone
        # A terminal that takes nothing must not keep us here: an alarm ends the wait, and us.
        before = signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, _LEAVE_S)
        try:
            with self._writing:
                _write(_LEAVE)
        except OSError:
            pass
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)

    def forget(self) -> None:
        """What stands there is not known any more: everything is written anew."""
        self._size = (0, 0)

    def size(self) -> tuple[int, int]:
        """Columns and rows."""
        try:
            columns, rows = os.get_terminal_size(1)
        except OSError:
            return 80, 24
        return max(columns, 2), max(rows, 1)

    async def show(self, rows: Sequence[Row]) -> None:
        """Let these be the screen, the first ones if there is no place for all."""
        columns, height = self.size()
        wanted = [self._painted(row, columns - 1) for row in rows[:height]]
        wanted += [b""] * (height - len(wanted))
        anew = self._size != (columns, height)
        changes = [b"\x1b[%d;1H\x1b[K%s" % (number + 1, row) for number, row in enumerate(wanted) if anew or row != self._shown[number]]
        if not changes:
            return
        # Never while the terminal is not ours, nor half: it may have been left in the meantime.
        self._shown, self._size = wanted, (columns, height)
        data = b"".join(changes)
        await trio.to_thread.run_sync(self._write_if_ours, data, abandon_on_cancel=True)

    def _write_if_ours(self, data: bytes) -> None:
        with self._writing:
            if self._entered:
                _write(data)

    def _painted(self, row: Row, columns: int) -> bytes:
        out, left = b"", columns
        for part in row:
            text = fitted(part.text, left)
            left -= width(text)
            style = STYLES[part.style] if self._colours else b""
            out += style + text.encode(errors="replace") + (b"\x1b[0m" if style else b"")
            if text != part.text:
                break
        return out


def _write(data: bytes) -> None:
    while data:
        data = data[os.write(1, data):]


def width(text: str) -> int:
    """How many columns it takes."""
    return len(text) if text.isascii() else sum(_cells(c) for c in text)


def _cells(character: str) -> int:
    if unicodedata.combining(character):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def fitted(text: str, columns: int) -> str:
    """As much as fits, with … where there is more."""
    if width(text) <= columns:
        return text
    cut, used = "", 0
    for character in text:
        used += _cells(character)
        if used > columns - 1:
            break
        cut += character
    return cut + "…" if columns > 0 else ""
