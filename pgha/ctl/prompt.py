"""May it be done? Asked on a terminal, answered by --force; never guessed."""

from __future__ import annotations

import sys

from pgha.ctl.ends import REFUSED, USAGE, End
from pgha.ctl.output import plain


def confirm(question: str, *, force: bool) -> None:
    """Return if the operator says yes. End otherwise."""
    if force:
        return
    _need_terminal()
    if not _yes(question):
        raise End(REFUSED, "aborted: nothing was changed")


def wanted(question: str) -> bool:
    """Yes or no, on a terminal; without one, or at its end (Ctrl-D), no: what went before it is done."""
    try:
        return sys.stdin.isatty() and _yes(question)
    except EOFError:
        print(file=sys.stderr)
        return False


def _yes(question: str) -> bool:
    return _answer(f"{question} [y/N]").lower() in ("y", "yes")


def choose(question: str, default: str = "") -> str:
    """A line of text from the operator."""
    _need_terminal()
    return _answer(f"{question} [{default}]") or default


def typed(question: str) -> str:
    """A line that says exactly what is asked for. From a pipe, too: whoever writes it there has thought of it."""
    return _answer(question, exactly=True)


def _answer(question: str, *, exactly: bool = False) -> str:
    """The question goes to standard error, as it is no result: whoever sends results to a file sees it all the same."""
    print(f"{plain(question)}: ", end="", file=sys.stderr, flush=True)
    line = input()
    return line if exactly else line.strip()


def secret(question: str, *, allowed: str) -> str:
    """A password, not shown while it is typed."""
    _need_terminal(f"there is no terminal to ask for the password on; allowed: {allowed}")
    from getpass import getpass

    return getpass(plain(question))


def _need_terminal(otherwise: str = "this asks before it does anything, and there is no terminal to ask on; allowed: --force") -> None:
    if not sys.stdin.isatty():
        raise End(USAGE, otherwise)
