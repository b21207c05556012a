"""How a command can end: the exit codes on one page (design 4), and the one exception that carries them."""

from __future__ import annotations

from collections.abc import Sequence

DONE, FAILED, USAGE, REFUSED, UNKNOWN, UNREACHABLE = range(6)


def of_several(codes: Sequence[int]) -> int:
    """The exit code where several members were asked: that of all, if they agree; else one that is true of them together (3 and 5
    say that nothing was changed)."""
    differing = set(codes)
    if len(differing) == 1:
        return codes[0]
    if UNKNOWN in differing:
        return UNKNOWN
    return REFUSED if differing <= {REFUSED, UNREACHABLE} else FAILED


class End(Exception):
    """The command is over. `text` goes to standard error; `code` is one of the above."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(text)
        self.code = code
        self.text = text


#: How a refusal with status 503 ends, which the reference has for everything that is not done.
_REFUSALS = ("can not reinitialize", "conditions are not satisfied", "already in progress", "still starting")


def code_of(status: int, text: str) -> int:
    """What an agent's HTTP answer means for the exit code."""
    if 200 <= status < 300:
        return DONE
    if "status unknown" in text or (status >= 500 and text.endswith("may still happen")) or status == 504:
        return UNKNOWN
    if status == 503 and (text.endswith(_REFUSALS) or text.startswith(_REFUSALS[0])):
        return REFUSED
    return FAILED if status >= 500 and status != 501 else REFUSED
