"""What do agent and guard say to each other, and what must a message look like to be believed?

A unix stream socket `guard.sock` in the runtime directory; one JSON object a line, at most 4096 bytes, each answered
by one line. Requests (`incarnation` and `started_ns` say whose; an older agent is refused, see `Agent`):

    {"op": "arm",       …, "sequence": 7, "fence_at": [boot_ns, raw_ns]}   a committed licence: anything may run until then
    {"op": "pause",     …, "sequence": 7}  a licence without an end is committed (a lock record in mode paused): anything may run
    {"op": "narrow",    …, "sequence": 7, "fence_at": […]}   before a write that may shorten it: no later than that, and
                                                            no `arm` or `pause` of a sequence up to this one (0: up to
                                                            the last one told) may widen it again
    {"op": "standby",   …}                 from now on only a server in recovery, with standby.signal in place
    {"op": "offline",   …, "until": […]}   pg_rewind, single-user recovery, initdb, swapping or removing the directory:
                                           no look at the directory until then, at most MAX_OFFLINE_S ahead, renewable
    {"op": "fence_now", …}                 kill everything and stay latched
    {"op": "bye",       …}                 clean stop: the guard ends if no process of the directory lives
    {"op": "status"}                       anybody of our user or root

Answer: {"ok", "state", "fence_at", "until", "incarnation", "started_ns", "sequence", "error"?, …facts}. `ok` false: the
request was not granted and `error` says why; `state` and the rest are what holds now. The guard has kept its state in
its file before it answers.
"""

from __future__ import annotations

import json
from enum import StrEnum
from typing import Any, NamedTuple

from pgha.clock import Deadline, Instant

SOCKET_NAME = "guard.sock"
FILE_NAME = "guard.json"
LOCK_NAME = "guard.lock"
#: Longest line in either direction, with its newline.
MAX_BYTES = 4096
#: How far ahead `offline` may reach; the agent renews it while its operation goes on.
MAX_OFFLINE_S = 3600.0
#: A licence reaches no further than its ttl; an `arm` beyond this is a mistake of units, and refused.
MAX_ARM_S = 86400.0
_MAX_NS = 1 << 63


class State(StrEnum):
    """What the guard lets this data directory do."""

    IDLE = "idle"          # nothing known yet, and no server runs
    STANDBY = "standby"    # a server in recovery only
    ARMED = "armed"        # anything, until fence_at
    PAUSED = "paused"      # anything, until a word of a newer licence
    OFFLINE = "offline"    # anything that is no postmaster of ours to judge, until `until`
    LATCHED = "latched"    # nothing: every process of the directory is killed when it appears


class Op(StrEnum):
    """What may be asked."""

    ARM = "arm"
    PAUSE = "pause"
    NARROW = "narrow"
    STANDBY = "standby"
    OFFLINE = "offline"
    FENCE_NOW = "fence_now"
    BYE = "bye"
    STATUS = "status"


class Agent(NamedTuple):
    """One agent process. Incarnations are random, so `started_ns` (CLOCK_BOOTTIME at its start) says who is newer."""

    started_ns: int
    incarnation: str


#: Before any agent has spoken: older than everybody.
NOBODY = Agent(0, "")


class Request(NamedTuple):
    """A request as understood. `deadline` is `fence_at` or `until`, None for ops that carry none."""

    op: Op
    agent: Agent = NOBODY
    sequence: int = 0
    deadline: Deadline | None = None


class Answer(NamedTuple):
    """What the guard answered; `facts` holds what else it told."""

    ok: bool
    state: State
    fence_at: Deadline | None
    until: Deadline | None
    agent: Agent
    sequence: int
    error: str
    facts: dict[str, Any]


class ProtocolError(ValueError):
    """A line is no message; the text says which part."""


_WITH_SEQUENCE = (Op.ARM, Op.PAUSE, Op.NARROW)
_DEADLINE_FIELD = {Op.ARM: "fence_at", Op.NARROW: "fence_at", Op.OFFLINE: "until"}


def encode_request(request: Request) -> bytes:
    """The line to send, newline included."""
    out: dict[str, Any] = {"op": request.op.value}
    if request.op is not Op.STATUS:
        out |= {"incarnation": request.agent.incarnation, "started_ns": request.agent.started_ns}
    if request.op in _WITH_SEQUENCE:
        out["sequence"] = request.sequence
    if (field := _DEADLINE_FIELD.get(request.op)) is not None:
        out[field] = request.deadline
    return _line(out)


def parse_request(line: bytes) -> Request:
    """Raises ProtocolError, whatever the bytes are."""
    message = _object(line)
    try:
        op = Op(str(message.get("op")))
    except ValueError:
        raise ProtocolError(f"op must be one of {', '.join(Op)}") from None
    if op is Op.STATUS:
        return Request(op)
    incarnation = message.get("incarnation")
    if not isinstance(incarnation, str) or not 0 < len(incarnation) <= 128 or not incarnation.isprintable() \
            or not incarnation.isascii():
        raise ProtocolError("incarnation must be a printable ASCII text of 1 to 128 characters")
    agent = Agent(_number(message, "started_ns", least=1), incarnation)
    sequence = 0
    if op in _WITH_SEQUENCE:
        sequence = _number(message, "sequence", least=0 if op is Op.NARROW else 1)
    field = _DEADLINE_FIELD.get(op)
    return Request(op, agent, sequence, _instant(message, field) if field is not None else None)


def encode_answer(answer: Answer) -> bytes:
    """The line to send, newline included."""
    out: dict[str, Any] = {
        "ok": answer.ok, "state": answer.state.value, "fence_at": answer.fence_at,
        "until": answer.until, "incarnation": answer.agent.incarnation, "started_ns": answer.agent.started_ns,
        "sequence": answer.sequence,
    }
    facts = {k: v for k, v in answer.facts.items() if k not in out}
    for error, more in ((answer.error, facts), (answer.error[:300], {})):
        line = _json(more | out | ({"error": error} if error else {}))
        if len(line) <= MAX_BYTES:  # a path may be as long as a whole line; the answer counts more than the facts
            return line
    raise AssertionError(len(line))


def parse_answer(line: bytes) -> Answer:
    """Raises ProtocolError if it is none; fields that a newer guard adds end up in `facts`."""
    message = _object(line)
    try:
        ok, state, error = message.pop("ok"), State(message.pop("state")), message.pop("error", "")
        agent = Agent(_number(message, "started_ns", least=0), message.pop("incarnation"))
        sequence = _number(message, "sequence", least=0)
    except (KeyError, ValueError) as exc:
        raise ProtocolError(f"not an answer: {exc}") from exc
    if not isinstance(ok, bool) or not isinstance(error, str) or not isinstance(agent.incarnation, str):
        raise ProtocolError("not an answer: a field has the wrong type")
    fence_at, until = (_instant(message, f) if message.get(f) is not None else None for f in ("fence_at", "until"))
    rest = ("fence_at", "until", "started_ns", "sequence")
    return Answer(ok, state, fence_at, until, agent, sequence, error,
                  {k: v for k, v in message.items() if k not in rest})


def instant_of(value: object) -> Instant:
    """[boot_ns, raw_ns] as it stands in a message or in the guard's file. Raises ProtocolError."""
    if not isinstance(value, list) or len(value) != 2 or not all(type(v) is int and 0 < v < _MAX_NS for v in value):
        raise ProtocolError("a moment must be [boot_ns, raw_ns], two positive integers")
    return Instant(value[0], value[1])


def _instant(message: dict[str, Any], field: str) -> Instant:
    try:
        return instant_of(message.get(field))
    except ProtocolError as exc:
        raise ProtocolError(f"{field}: {exc}") from None


def _number(message: dict[str, Any], field: str, *, least: int) -> int:
    value = message.get(field)
    if type(value) is not int or not least <= value < _MAX_NS:  # bool is an int to isinstance
        raise ProtocolError(f"{field} must be an integer of at least {least}")
    return value


def _object(line: bytes) -> dict[str, Any]:
    if len(line) > MAX_BYTES:
        raise ProtocolError(f"longer than {MAX_BYTES} bytes")
    try:
        message = json.loads(line)
    except (ValueError, RecursionError) as exc:  # not UTF-8, not JSON, digits without end, brackets without end
        raise ProtocolError(f"not JSON: {type(exc).__name__}") from None
    if not isinstance(message, dict):
        raise ProtocolError("not a JSON object")
    return message


def _line(out: dict[str, Any]) -> bytes:
    line = _json(out)
    assert len(line) <= MAX_BYTES, len(line)
    return line


def _json(out: dict[str, Any]) -> bytes:
    return json.dumps(out, separators=(",", ":")).encode() + b"\n"
