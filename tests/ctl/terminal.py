"""A terminal of our own: a program runs on a real pty, and a small model interprets what it writes, as a VT would.

The model knows what `ctl watch` uses and no more: anything else, and whatever would scroll the screen, is a failure of
the program, and is kept as one.
"""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import termios
import time
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

_SEQUENCE = re.compile(rb"\x1b\[(\??)([\d;]*)([A-Za-z])")
#: the beginning of one that is not whole yet
_PART = re.compile(rb"\x1b(?:\[[\d;?]*)?")


class Model:
    """What stands on the screen. `wrong`: what a program must not do here."""

    def __init__(self, columns: int, rows: int) -> None:
        self.columns, self.rows = columns, rows
        self.main = Screen(columns, rows)
        self.alternate: Screen | None = None
        self.cursor_hidden = False
        self.wrong: list[str] = []
        self.cleared = 0
        self.colours = False
        self._rest = b""

    @property
    def screen(self) -> Screen:
        return self.alternate or self.main

    def resize(self, columns: int, rows: int) -> None:
        """As terminals do: what no longer fits is cut off, what is new is empty."""
        self.columns, self.rows = columns, rows
        self.main.resize(columns, rows)
        if self.alternate is not None:
            self.alternate.resize(columns, rows)

    def feed(self, data: bytes) -> None:
        data = self._rest + data
        self._rest = b""
        while data:
            if data[:1] == b"\x1b":
                found = _SEQUENCE.match(data)
                if found is None:
                    if _PART.fullmatch(data):
                        self._rest = data
                        return
                    self.wrong.append(f"unknown sequence {data[:10]!r}")
                    return
                self._control(found[1].decode(), found[2].decode(), found[3].decode())
                data = data[found.end():]
                continue
            end = data.find(b"\x1b")
            text, data = (data, b"") if end < 0 else (data[:end], data[end:])
            try:
                decoded = text.decode()
            except UnicodeDecodeError as error:
                if error.end < len(text) or len(text) - error.start > 3:
                    self.wrong.append(f"no UTF-8: {text[error.start:error.start + 5]!r}")
                    decoded = text.decode(errors="replace")
                else:
                    decoded, self._rest = text[:error.start].decode(), text[error.start:]
            for character in decoded:
                self.screen.put(character, self.wrong, may_scroll=self.alternate is None)

    def _control(self, private: str, numbers: str, letter: str) -> None:
        screen = self.screen
        given = [int(n or 0) for n in numbers.split(";")]
        match private, letter:
            case "?", "h" | "l" if given == [1049]:
                self.alternate = Screen(self.columns, self.rows) if letter == "h" else None
            case "?", "h" | "l" if given == [25]:
                self.cursor_hidden = letter == "l"
            case "", "H":
                row, column = (given + [0])[:2] if numbers else (1, 1)
                screen.row, screen.column = min(max(row, 1), self.rows) - 1, min(max(column, 1), self.columns) - 1
            case "", "K" if given == [0]:
                del screen.lines[screen.row][screen.column:]
            case "", "J" if given == [2]:
                self.cleared += 1
                screen.lines = [[] for _ in range(self.rows)]
            case "", "m":
                self.colours = self.colours or given != [0]
            case _:
                self.wrong.append(f"unknown sequence {private}{numbers}{letter}")

    def text(self) -> str:
        """The screen as lines without blanks at their ends."""
        return "\n".join("".join(line).rstrip() for line in self.screen.lines)


class Screen:
    def __init__(self, columns: int, rows: int) -> None:
        self.columns, self.rows = columns, rows
        self.lines: list[list[str]] = [[] for _ in range(rows)]
        self.row = self.column = 0

    def resize(self, columns: int, rows: int) -> None:
        self.columns, self.rows = columns, rows
        self.lines = [line[:columns] for line in self.lines[:rows]] + [[] for _ in range(rows - len(self.lines))]
        self.row, self.column = min(self.row, rows - 1), min(self.column, columns - 1)

    def put(self, character: str, wrong: list[str], *, may_scroll: bool) -> None:
        if character == "\r":
            self.column = 0
        elif character == "\n":
            self.row += 1
            if self.row == self.rows:
                self.row -= 1
                self.lines = [*self.lines[1:], []]
                if not may_scroll:
                    wrong.append("the screen was scrolled")
        elif not character.isprintable():
            wrong.append(f"control character {character!r}")
        else:
            cells = 2 if unicodedata.east_asian_width(character) in "WF" else 1
            if self.column + cells > self.columns:
                wrong.append(f"a line is longer than the screen at {''.join(self.lines[self.row])[-20:]!r}")
                return
            line = self.lines[self.row]
            line += [" "] * (self.column - len(line))
            line[self.column:self.column + cells] = [character, ""][:cells]
            self.column += cells


class OnTerminal:
    """A program on a pty of this size. Its screen is `model`; every state of it that was seen is in `states`."""

    def __init__(self, argv: Sequence[str], *, columns: int = 100, rows: int = 30, environment: Mapping[str, str] | None = None, **options: Any) -> None:
        self.model = Model(columns, rows)
        self.states: list[str] = []
        self.written: list[bytes] = []
        self._leader, follower = pty.openpty()
        self._size(columns, rows)
        self.before = termios.tcgetattr(follower)
        self._follower = follower       # kept open: its settings are looked at when the program has ended

        def controlling() -> None:
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)

        self.process = subprocess.Popen(argv, stdin=follower, stdout=follower, stderr=follower, start_new_session=True, preexec_fn=controlling,
                                        env={**(os.environ if environment is None else environment), "TERM": "xterm-256color"}, **options)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(10)
        self.hang_up()

    def hang_up(self) -> None:
        """As when the window is closed, or the line is cut."""
        for fd in {self._leader, self._follower} - {-1}:
            os.close(fd)
        self._leader = self._follower = -1

    @property
    def settings(self) -> list[Any]:
        """The terminal's own, as `stty` shows them."""
        return termios.tcgetattr(self._follower)

    def resize(self, columns: int, rows: int) -> None:
        self.read(0.0)
        self.model.resize(columns, rows)
        self._size(columns, rows)       # the kernel sends SIGWINCH

    def _size(self, columns: int, rows: int) -> None:
        fcntl.ioctl(self._leader, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def type(self, keys: bytes) -> None:
        os.write(self._leader, keys)

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def read(self, for_s: float) -> bool:
        """Take in what is written, waiting for it so long; False if nothing came."""
        if not select.select([self._leader], [], [], for_s)[0]:
            return False
        data = os.read(self._leader, 1 << 16)
        self.written.append(data)
        self.model.feed(data)
        text = self.model.text()
        if not self.states or self.states[-1] != text:
            self.states.append(text)
        return True

    def until(self, holds: Callable[[str], Any], what: str, *, timeout_s: float = 20.0) -> str:
        """Read until the screen is so."""
        until_s = time.monotonic() + timeout_s
        while not holds(self.model.text()):
            left_s = until_s - time.monotonic()
            assert left_s > 0, f"not within {timeout_s:g} s: {what}\n{self.model.text()}\n{self.model.wrong}"
            if not self.read(min(0.1, left_s)) and self.process.poll() is not None:
                raise AssertionError(f"it has ended ({self.process.returncode}), and not: {what}\n{self.model.text()}")
        while self.read(0.05):      # a screen is whole when nothing more comes
            pass
        return self.model.text()

    def end(self, *, timeout_s: float = 10.0) -> int:
        """Its exit code, once it has ended; all that it wrote is read."""
        until_s = time.monotonic() + timeout_s
        while self.process.poll() is None:
            assert time.monotonic() < until_s, f"it goes on\n{self.model.text()}"
            self.read(0.05)
        while self.read(0.05):
            pass
        return int(self.process.returncode)

    def is_given_back(self) -> bool:
        """The terminal is as it was before: its settings, the cursor, the screen."""
        return self.settings == self.before and not self.model.cursor_hidden and self.model.alternate is None
