"""What would be decided on a recorded pass? The very observation, the very memory, today's rules.

The file is one JSON object, `{"observation": …, "memory": …}`, as msgspec writes `model.observation.Observation` and
`model.decision.Memory`; without `memory` the pass is decided as an agent's first.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from pgha.decide import decide
from pgha.errors import ConfigError
from pgha.model.decision import Memory
from pgha.model.observation import Observation


class Pass(msgspec.Struct, frozen=True, kw_only=True):
    """What went into one decision."""

    observation: Observation
    memory: Memory = Memory()


def replay(path: str) -> str:
    """The decision as indented JSON. Raises ConfigError if the file is not a recorded pass."""
    try:
        recorded = msgspec.json.decode(Path(path).read_bytes(), type=Pass)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except msgspec.DecodeError as error:  # ValidationError is one
        raise ConfigError(f"{path}: not a recorded pass: {error}") from error
    decision = decide(recorded.observation, recorded.memory)
    return msgspec.json.format(msgspec.json.encode(decision), indent=2).decode()
