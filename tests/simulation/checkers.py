"""What is promised, judged from the model's own truth: one class a promise (safety model 1).

`Truth` is what the world tells: who accepts commits, who became primary from where, what was acknowledged, which data
directories went. Checkers listen to it, and say what was broken with the facts. They know nothing of pgha's beliefs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Violation:
    """`at_s`: virtual time."""

    checker: str
    at_s: float
    text: str


class Truth:
    """The world's news, for those who judge. Each checker may have a method of the same name."""

    def __init__(self) -> None:
        self.checkers: list[Any] = []

    def _tell(self, method: str, *arguments: Any) -> None:
        for checker in self.checkers:
            listener = getattr(checker, method, None)
            if listener is not None:
                listener(*arguments)

    def accepting(self, instance: Any, now: bool) -> None:
        self._tell("accepting", instance, now)

    def becomes_primary(self, instance: Any, how: str) -> None:
        self._tell("becomes_primary", instance, how)

    def forked(self, instance: Any) -> None:
        self._tell("forked", instance)

    def mixed(self, instance: Any, upstream: Any) -> None:
        self._tell("mixed", instance, upstream)

    def started_half_rewound(self, instance: Any) -> None:
        self._tell("started_half_rewound", instance)

    def acknowledged(self, instance: Any, branch: Any, lsn: int) -> None:
        self._tell("acknowledged", instance, branch, lsn)

    def removed(self, instance: Any, data: Any) -> None:
        self._tell("removed", instance, data)
