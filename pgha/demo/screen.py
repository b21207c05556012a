"""How the demo looks: on a terminal a table that is redrawn in place, elsewhere lines, a table only when it changed."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Sequence
from typing import Self

from pgha.demo.watchers import MembersWatcher, Writer

_REDRAW_S = 0.25
_PRINT_S = 1.5  # between two tables as plain lines
_HEAD = ("Member", "Address", "Role", "State", "TL", "Lag", "Rows written")
_RIGHT = {"TL", "Lag", "Rows written", "Seconds"}


class Screen:
    """`say` adds a line for good; below all lines stands the table, as the members are now."""

    def __init__(self, *, in_place: bool) -> None:
        self._in_place = in_place
        self._members: MembersWatcher | None = None
        self._writer: Writer | None = None
        self._drawn = 0
        self._last: Sequence[object] = ()
        self._printed_s = time.monotonic()
        self._lock = threading.Lock()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._work, name="screen", daemon=True)

    def show(self, members: MembersWatcher, writer: Writer) -> None:
        """From now on there is something to draw."""
        self._members, self._writer = members, writer

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()

    def say(self, text: str = "") -> None:
        with self._lock:
            self._erase()
            print(text, flush=True)
            if self._in_place:
                self._draw()

    def final_table(self) -> None:
        """The table once more, to stay."""
        assert self._members is not None
        with self._lock:
            self._erase()
            self._members.look()
            print("\n".join(self._table()), flush=True)
            self._members = None

    def _work(self) -> None:
        while not self._end.wait(_REDRAW_S):
            with self._lock:
                if self._in_place:
                    self._erase()
                    self._draw()
                elif self._members is not None:
                    now = [(m.name, m.role, m.state, m.timeline) for m in self._members.members]
                    if now != self._last and time.monotonic() - self._printed_s > _PRINT_S:
                        self._last = now
                        self._printed_s = time.monotonic()
                        print("\n".join(self._table()), flush=True)

    def _erase(self) -> None:
        if self._drawn:
            sys.stdout.write(f"\x1b[{self._drawn}A\x1b[J")
            self._drawn = 0

    def _draw(self) -> None:
        if self._members is None:
            return
        lines = self._table()
        sys.stdout.write("\n".join(lines) + "\n")
        sys.stdout.flush()
        self._drawn = len(lines)

    def _table(self) -> list[str]:
        assert self._members is not None
        rows = [
            (m.name, m.address, m.role, m.state, "" if m.timeline is None else str(m.timeline), _size(m.lag),
             str(self._writer.rows[m.name]) if self._writer else "")
            for m in self._members.members
        ]
        return table(_HEAD, rows)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table; numbers stand right."""
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    rule = "+" + "+".join("-" * (w + 2) for w in widths) + "+"

    def line(row: Sequence[str]) -> str:
        cells = (cell.rjust(w) if name in _RIGHT else cell.ljust(w) for cell, w, name in zip(row, widths, head, strict=True))
        return "| " + " | ".join(cells) + " |"

    return [rule, line(head), rule, *(line(row) for row in rows), rule]


def _size(lag: int | None) -> str:
    if lag is None:
        return ""
    if lag < 10 * 1024:
        return f"{lag} B"
    return f"{lag / 1024:.0f} KiB" if lag < 1024 * 1024 else f"{lag / 1048576:.1f} MiB"
