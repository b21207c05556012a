"""`-w SECONDS` and `-W`: the same again and again, until Ctrl-C.

What was once seen goes on being watched when the store, an agent or PostgreSQL is away: that is when somebody looks.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable

from pgha.ctl.ends import DONE, FAILED, UNKNOWN, UNREACHABLE, End
from pgha.ctl.output import plain

#: what -W means
EVERY_S = 2.0
_CLEAR = "\033[H\033[2J"


def options(parser: argparse.ArgumentParser) -> None:
    often = parser.add_mutually_exclusive_group()
    often.add_argument("-w", "--watch", type=_seconds, metavar="SECONDS", help="again every SECONDS, until Ctrl-C")
    often.add_argument("-W", dest="watch", action="store_const", const=EVERY_S, help="again every 2 seconds, until Ctrl-C")


def repeated(watch_s: float | None, look: Callable[[], str], *, clear: bool = True) -> int:
    """Print what `look` returns, once, or every `watch_s`. `clear`: on an empty screen each time, if there is a screen."""
    if watch_s is None:
        _show(look())
        return DONE
    from contextlib import redirect_stderr
    from io import StringIO

    on_screen = clear and sys.stdout.isatty()
    seen = False
    try:
        while True:
            with redirect_stderr(StringIO()) as notes:      # shown below the result: before it, the empty screen would take them
                try:
                    text: str | None = look()
                    seen = True
                except End as end:
                    if not seen or end.code not in (FAILED, UNKNOWN, UNREACHABLE):
                        raise
                    text = None
                    print(f"pgha: {time.strftime('%Y-%m-%d %H:%M:%S')} {plain(end.text)}", file=notes)
            if text is not None and on_screen:
                print(_CLEAR, end="")
            _show(text)
            print(notes.getvalue(), end="", file=sys.stderr, flush=True)
            time.sleep(watch_s)      # the interval that was asked for
    except KeyboardInterrupt:
        return DONE


def _show(text: str | None) -> None:
    if text:
        print(text, flush=True)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds <= 86400:
        raise argparse.ArgumentTypeError(f"{text!r} is no such number of seconds; allowed: more than 0, up to 86400, as 2 or 0.5")
    return seconds
