"""May it be done? Asked on a terminal, answered by --force; never guessed."""

from __future__ import annotations

import sys

from pgha.ctl.ends import REFUSED, USAGE, End


def confirm(question: str, *, force: bool) -> None:
    """Return if the operator says yes. End otherwise."""
    if force:
        return
    _need_terminal()
    if not wanted(question):
        raise End(REFUSED, "aborted: nothing was changed")


def wanted(question: str) -> bool:
    """Yes or no, on a terminal; without one, no."""
    return sys.stdin.isatty() and input(f"{question} [y/N]: ").strip().lower() in ("y", "yes")


def choose(question: str, default: str = "") -> str:
    """A line of text from the operator."""
    _need_terminal()
    return input(f"{question} [{default}]: ").strip() or default


def typed(question: str) -> str:
    """A line that says exactly what is asked for. From a pipe, too: whoever writes it there has thought of it. The
    question goes to standard error, as it is no result."""
    print(f"{question}: ", end="", file=sys.stderr, flush=True)
    return input()


def secret(question: str, *, allowed: str) -> str:
    """A password, not shown while it is typed."""
    _need_terminal(f"there is no terminal to ask for the password on; allowed: {allowed}")
    from getpass import getpass

    return getpass(question)


def _need_terminal(otherwise: str = "this asks before it does anything, and there is no terminal to ask on; allowed: --force") -> None:
    if not sys.stdin.isatty():
        raise End(USAGE, otherwise)
