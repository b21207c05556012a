"""The processes of the data directory, as fence, observer and operations ask for them.

A port: `recipe.DataDirectory` is the real one. Nothing here waits, and nothing here touches the disk, but `refresh`.
"""

from __future__ import annotations

import signal
from typing import Protocol

from pgha.lock.recipe import Proc, Report


class Processes(Protocol):
    """See recipe.py for what belongs to a data directory, and how it is killed."""

    def processes(self) -> list[Proc]:
        """The living ones; no zombies."""
        ...

    def kill_all(self) -> Report:
        """Kill every one of them; returns when a new search finds none that was not signalled."""
        ...

    def kill_orphans(self, *, seen_ticks: int, keep: frozenset[int] = frozenset()) -> Report:
        """Kill what a dead postmaster has left, but no postmaster started since `seen_ticks`."""
        ...

    def signal_postmaster(self, signum: signal.Signals) -> tuple[int, ...]:
        """Send it to every postmaster of the directory; the pids that it was sent to."""
        ...

    def refresh(self) -> bool:
        """Look at the path again: another directory may be there now. Touches the file system, so it may block."""
        ...
