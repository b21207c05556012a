"""Where does file work run? In a thread: the disk may take its time, and the renewer shares our loop.

Whoever does file work takes an `InThread` as a parameter; `in_thread` is the real one. (A simulation in virtual time
works inline: a thread would run beside its clock.)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeVar

import trio

T = TypeVar("T")


class InThread(Protocol):
    """Run `work` beside the loop, and return what it returns or raise what it raises."""

    async def __call__(self, work: Callable[[], T], *, abandon_on_cancel: bool = False) -> T:
        """`abandon_on_cancel`: a cancel leaves it behind; otherwise the cancel waits for its end."""
        ...


async def in_thread(work: Callable[[], T], *, abandon_on_cancel: bool = False) -> T:
    """See InThread."""
    return await trio.to_thread.run_sync(work, abandon_on_cancel=abandon_on_cancel)
