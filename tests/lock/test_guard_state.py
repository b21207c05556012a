"""The guard's rules as tables. A deadline is written in seconds from now; now is 1000 s after boot."""

from __future__ import annotations

import pytest

from pgha.clock import Instant
from pgha.lock.guard_state import Facts, Held, Look, Role, after_look, answer, judge, lapse
from pgha.lock.protocol import (
    MAX_ARM_S,
    MAX_BYTES,
    MAX_OFFLINE_S,
    Agent,
    Answer,
    Op,
    ProtocolError,
    Request,
    State,
    encode_answer,
    encode_request,
    parse_answer,
    parse_request,
)

NOW = Instant(1_000_000_000_000, 990_000_000_000)
ME, OLDER, NEWER, TWIN = Agent(50, "me"), Agent(49, "older"), Agent(51, "newer"), Agent(50, "twin")
STANDBY_LOOK = Look(exists=True, postmaster_pid=7, status_before="ready", status_after="ready", control_state=5, standby_signal=True)
PRIMARY_LOOK = STANDBY_LOOK._replace(control_state=6)
EMPTY_LOOK = Look(exists=True, standby_signal=True)


def armed(in_s=10.0, sequence=5, agent=ME):
    return Held(State.ARMED, agent, sequence, NOW.plus_s(in_s))


def held(state, sequence=5, agent=ME):
    return Held(state, agent, sequence, until=NOW.plus_s(100) if state is State.OFFLINE else None)


def ask(op, agent=ME, sequence=0, in_s=None):
    return Request(op, agent, sequence, None if in_s is None else NOW.plus_s(in_s))


LATCHED, STANDBY, OFFLINE, IDLE = (held(s) for s in (State.LATCHED, State.STANDBY, State.OFFLINE, State.IDLE))
PAUSED = held(State.PAUSED)


@pytest.mark.parametrize(("before", "request_", "state", "in_s"), [
    # a newer licence widens from every state
    *[(h, ask(Op.ARM, sequence=6, in_s=20), State.ARMED, 20) for h in (armed(), LATCHED, STANDBY, OFFLINE, IDLE)],
    (armed(), ask(Op.ARM, sequence=6, in_s=3), State.ARMED, 3),            # a shorter ttl
    (armed(), ask(Op.ARM, sequence=5, in_s=10), State.ARMED, 10),          # repeated
    (armed(), ask(Op.ARM, sequence=5, in_s=20), State.ARMED, 10),          # repeated, never wider
    (armed(), ask(Op.ARM, NEWER, 1, 20), State.ARMED, 20),                 # a restarted agent with a licence of its own
    (LATCHED, ask(Op.ARM, NEWER, 1, 20), State.ARMED, 20),
    (armed(), ask(Op.NARROW, sequence=5, in_s=4), State.ARMED, 4),
    (armed(), ask(Op.NARROW, sequence=5, in_s=40), State.ARMED, 10),
    (armed(), ask(Op.NARROW, sequence=5, in_s=0), State.LATCHED, None),
    *[(h, ask(Op.NARROW, sequence=9, in_s=4), h.state, None) for h in (LATCHED, STANDBY, IDLE)],
    *[(h, ask(Op.FENCE_NOW), State.LATCHED, None) for h in (armed(), LATCHED, STANDBY, OFFLINE, IDLE)],
    (armed(), ask(Op.FENCE_NOW, NEWER), State.LATCHED, None),
    (armed(), Request(Op.STATUS), State.ARMED, 10),
    # a committed pause: no deadline, from every state, by a newer licence
    *[(h, ask(Op.PAUSE, sequence=6), State.PAUSED, None) for h in (armed(), LATCHED, STANDBY, OFFLINE, IDLE, PAUSED)],
    (PAUSED, ask(Op.PAUSE, sequence=5), State.PAUSED, None),               # repeated
    (PAUSED, ask(Op.PAUSE, NEWER, 1), State.PAUSED, None),                 # a restarted agent that has re-adopted
    (armed(), ask(Op.PAUSE, NEWER, 1), State.PAUSED, None),
    (PAUSED, ask(Op.ARM, sequence=6, in_s=20), State.ARMED, 20),           # resumed
    (PAUSED, ask(Op.NARROW, sequence=5, in_s=4), State.ARMED, 4),          # about to be resumed
    (PAUSED, ask(Op.NARROW, NEWER, 0, 4), State.ARMED, 4),
    (PAUSED, ask(Op.NARROW, sequence=5, in_s=0), State.LATCHED, None),     # about to be released
    (PAUSED, ask(Op.FENCE_NOW), State.LATCHED, None),
    (PAUSED, Request(Op.STATUS), State.PAUSED, None),
])
def test_granted(before, request_, state, in_s):
    verdict = answer(before, request_, Facts(), NOW)
    assert verdict.error == ""
    assert verdict.held.state is state
    assert verdict.held.fence_at == (None if in_s is None else NOW.plus_s(in_s))
    assert verdict.fence == (state is State.LATCHED and request_.op in (Op.FENCE_NOW, Op.NARROW) and before.state is not State.LATCHED
                             or request_.op is Op.FENCE_NOW)


@pytest.mark.parametrize(("before", "request_", "error"), [
    *[(armed(), ask(op, OLDER, 9, 5), "an agent that started later") for op in Op if op is not Op.STATUS],
    *[(armed(), ask(op, TWIN, 9, 5), "another agent that started at the same moment") for op in Op if op is not Op.STATUS],
    (armed(), ask(Op.ARM, sequence=4, in_s=20), "sequence 4 is older"),
    (armed(), ask(Op.ARM, sequence=6, in_s=0), "fence_at passed"),
    (armed(), ask(Op.ARM, sequence=6, in_s=-3), "fence_at passed 3.000 s ago"),
    (armed(), ask(Op.ARM, sequence=6, in_s=MAX_ARM_S + 1), "are believed"),
    *[(h, ask(Op.ARM, sequence=5, in_s=20), "was used up") for h in (LATCHED, STANDBY, OFFLINE)],
    *[(h, ask(Op.ARM, sequence=4, in_s=20), "is older") for h in (LATCHED, STANDBY, OFFLINE)],
    (STANDBY, ask(Op.OFFLINE, in_s=MAX_OFFLINE_S + 1), "must be within"),
    (STANDBY, ask(Op.OFFLINE, in_s=0), "must be within"),
    (LATCHED, ask(Op.BYE), "latched"),
    *[(h, ask(Op.PAUSE, sequence=5), "was used up") for h in (armed(), LATCHED, STANDBY, OFFLINE)],
    *[(h, ask(Op.PAUSE, sequence=4), "is older") for h in (armed(), LATCHED, STANDBY, OFFLINE, PAUSED)],
    (PAUSED, ask(Op.ARM, sequence=5, in_s=20), "was used up"),
    (PAUSED, ask(Op.ARM, sequence=6, in_s=-1), "fence_at passed"),
    (PAUSED, ask(Op.PAUSE, OLDER, 9), "an agent that started later"),
])
def test_refused_and_nothing_changed(before, request_, error):
    verdict = answer(before, request_, Facts(look=EMPTY_LOOK), NOW)
    assert error in verdict.error
    assert verdict.held == before
    assert (verdict.fence, verdict.end) == (False, False)


def test_an_arm_that_narrowing_made_old_stays_old():
    """narrow names the last sequence sent under the longer licence: its late acknowledgement widens nothing."""
    narrowed = answer(armed(20), ask(Op.NARROW, sequence=7, in_s=4), Facts(), NOW).held
    assert answer(narrowed, ask(Op.ARM, sequence=6, in_s=20), Facts(), NOW).error
    assert answer(narrowed, ask(Op.ARM, sequence=7, in_s=20), Facts(), NOW).held.fence_at == NOW.plus_s(4)
    assert answer(narrowed, ask(Op.ARM, sequence=8, in_s=5), Facts(), NOW).held.fence_at == NOW.plus_s(5)


def test_a_pause_that_narrowing_made_old_stays_old():
    """What comes late, or twice, never takes away a deadline that was told after it."""
    narrowed = answer(PAUSED, ask(Op.NARROW, sequence=7, in_s=4), Facts(), NOW).held
    assert answer(narrowed, ask(Op.PAUSE, sequence=6), Facts(), NOW).held == narrowed
    assert answer(narrowed, ask(Op.PAUSE, sequence=7), Facts(), NOW).held == narrowed
    assert answer(narrowed, ask(Op.PAUSE, sequence=8), Facts(), NOW).held.state is State.PAUSED
    assert lapse(narrowed, NOW.plus_s(4)).state is State.LATCHED


def test_a_refused_newcomer_does_not_take_over():
    verdict = answer(armed(), ask(Op.ARM, NEWER, 1, -1), Facts(), NOW)
    assert verdict.held.agent == ME
    assert answer(verdict.held, ask(Op.ARM, sequence=6, in_s=20), Facts(), NOW).error == ""


@pytest.mark.parametrize(("before", "processes", "look", "granted"), [
    *[(h, 0, EMPTY_LOOK, True) for h in (armed(), LATCHED, STANDBY, OFFLINE, IDLE)],
    *[(h, 0, EMPTY_LOOK._replace(standby_signal=False), False) for h in (armed(), LATCHED, STANDBY, OFFLINE, IDLE)],
    *[(h, 0, None, False) for h in (armed(), LATCHED, STANDBY, OFFLINE, IDLE)],
    (STANDBY, 6, STANDBY_LOOK, True),
    (armed(), 6, STANDBY_LOOK, True),       # a promotion that was given up
    (PAUSED, 0, EMPTY_LOOK, True),          # stopped by hand
    (PAUSED, 6, STANDBY_LOOK, True),        # stopped and started by hand
    (PAUSED, 6, PRIMARY_LOOK, False),
    (PAUSED, 6, STANDBY_LOOK._replace(status_before="starting", status_after="starting"), False),
    (IDLE, 6, STANDBY_LOOK, True),
    (LATCHED, 6, STANDBY_LOOK, False),      # it was signalled: wait for its exit
    (OFFLINE, 1, STANDBY_LOOK, False),
    *[(h, 6, PRIMARY_LOOK, False) for h in (armed(), LATCHED, STANDBY, OFFLINE, IDLE)],
    (armed(), 6, STANDBY_LOOK._replace(status_before="starting", status_after="starting"), False),  # may come up as primary
    (STANDBY, 6, STANDBY_LOOK._replace(status_before="starting", status_after="starting"), True),
])
def test_standby(before, processes, look, granted):
    verdict = answer(before, ask(Op.STANDBY), Facts(processes, look), NOW)
    assert (verdict.error == "") is granted, verdict
    assert verdict.held == (before._replace(state=State.STANDBY, fence_at=None, until=None, why="asked for") if granted else before)


@pytest.mark.parametrize(("before", "processes", "granted"), [
    *[(h, 0, True) for h in (armed(), LATCHED, STANDBY, OFFLINE, IDLE)],
    *[(h, 1, False) for h in (armed(), LATCHED, STANDBY, IDLE)],
    (OFFLINE, 1, True),
])
def test_offline(before, processes, granted):
    verdict = answer(before, ask(Op.OFFLINE, in_s=50), Facts(processes, EMPTY_LOOK), NOW)
    assert (verdict.error == "") is granted
    assert verdict.held.until == (NOW.plus_s(50) if granted else before.until)


@pytest.mark.parametrize(("before", "processes", "ends"), [
    *[(h, 0, True) for h in (armed(), STANDBY, OFFLINE, IDLE)],
    *[(h, 1, False) for h in (armed(), LATCHED, STANDBY, OFFLINE, IDLE)],
    (LATCHED, 0, False),
])
def test_bye(before, processes, ends):
    assert answer(before, ask(Op.BYE), Facts(processes, EMPTY_LOOK), NOW).end is ends


@pytest.mark.parametrize(("before", "boot_s", "raw_s", "state"), [
    (armed(10), 9.999, 9.999, State.ARMED),
    (armed(10), 10, 0, State.LATCHED),      # a suspend: only one clock has passed it
    (armed(10), 0, 10, State.LATCHED),
    (armed(10), 600, 600, State.LATCHED),   # however late it is looked at: the guard itself was frozen
    (OFFLINE, 99.9, 99.9, State.OFFLINE),
    (OFFLINE, 100, 100, State.LATCHED),
    *[(h, 1e6, 1e6, h.state) for h in (LATCHED, STANDBY, IDLE, PAUSED)],
])
def test_time(before, boot_s, raw_s, state):
    now = Instant(NOW.boot_ns + round(boot_s * 1e9), NOW.raw_ns + round(raw_s * 1e9))
    after = lapse(before, now)
    assert after.state is state
    assert after.agent == before.agent
    assert after.sequence == before.sequence


@pytest.mark.parametrize(("before", "after", "control", "signal", "role"), [
    ("ready", "ready", 5, True, Role.RECOVERING),
    ("standby", "standby", 5, True, Role.RECOVERING),   # hot_standby = off
    ("ready", "ready", 6, True, Role.PRIMARY),
    ("ready", "ready", 1, True, Role.PRIMARY),
    ("ready", "ready", -1, True, Role.PRIMARY),         # unreadable: nothing vouches for it
    ("ready", "ready", 5, False, Role.PRIMARY),         # being promoted
    ("starting", "ready", 1, True, Role.STARTING),      # the control file was read before recovery began
    ("ready", "stopping", 2, True, Role.STARTING),
    ("starting", "starting", 6, True, Role.STARTING),   # a crashed primary comes up as a standby
    ("", "", 6, True, Role.STARTING),
    ("starting", "starting", 1, False, Role.PRIMARY),
])
def test_what_a_server_is(before, after, control, signal, role):
    look = Look(exists=True, status_before=before, status_after=after, control_state=control, standby_signal=signal)
    assert judge(look) is role


@pytest.mark.parametrize(("before", "look", "server", "state"), [
    (STANDBY, STANDBY_LOOK, True, State.STANDBY),
    (STANDBY, PRIMARY_LOOK, True, State.LATCHED),
    (STANDBY, PRIMARY_LOOK, False, State.STANDBY),      # what a dead server left behind says nothing
    (STANDBY, STANDBY_LOOK._replace(standby_signal=False), False, State.LATCHED),
    (STANDBY, Look(), False, State.STANDBY),            # no directory, no server
    (IDLE, STANDBY_LOOK, True, State.STANDBY),
    (IDLE, PRIMARY_LOOK, True, State.ARMED),
    (IDLE, PRIMARY_LOOK, False, State.IDLE),
    *[(h, PRIMARY_LOOK, True, h.state) for h in (armed(), LATCHED, OFFLINE, PAUSED)],
    (PAUSED, STANDBY_LOOK._replace(standby_signal=False), True, State.PAUSED),
])
def test_what_a_look_makes_of_it(before, look, server, state):
    after = after_look(before, look, server=server, now=NOW)
    assert after.state is state
    if before.state is State.IDLE and state is State.ARMED:
        assert after.fence_at == NOW.plus_s(2)


# --- the words ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("request_", [
    ask(Op.ARM, sequence=3, in_s=1), ask(Op.NARROW, sequence=0, in_s=1), ask(Op.OFFLINE, in_s=1), ask(Op.STANDBY),
    ask(Op.FENCE_NOW), ask(Op.BYE), Request(Op.STATUS), ask(Op.PAUSE, sequence=3),
])
def test_a_request_survives_the_line(request_):
    assert parse_request(encode_request(request_)) == request_


def test_an_answer_survives_the_line_and_never_exceeds_it():
    said = Answer(False, State.ARMED, NOW, None, ME, 7, "no", {"data_dir": "/x", "new": [1]})
    assert parse_answer(encode_answer(said)) == said
    long = said._replace(error="e" * 9000, facts={"data_dir": "/x" * 5000})
    assert len(encode_answer(long)) <= MAX_BYTES
    assert parse_answer(encode_answer(long)).fence_at == NOW
    worst = said._replace(error="ü" * 600, agent=Agent(1 << 62, "x" * 128), facts={"data_dir": "ü" * 400})
    assert len(encode_answer(worst)) <= MAX_BYTES


GOOD = '"op":"arm","incarnation":"a","started_ns":1,"sequence":1,"fence_at":[1,1]'


@pytest.mark.parametrize("line", [
    "", "{", "null", "7", '"arm"', "{}", '{"op":null}', '{"op":["arm"]}', '{"op":"kill"}', '{"op":"standby"}',
    "{" + GOOD.replace('"a"', '""') + "}", "{" + GOOD.replace('"a"', "1") + "}", "{" + GOOD.replace('"a"', '"\\u0007"') + "}",
    "{" + GOOD.replace('"a"', '"' + "a" * 129 + '"') + "}", "{" + GOOD.replace('"started_ns":1', '"started_ns":true') + "}",
    "{" + GOOD.replace('"started_ns":1', '"started_ns":0') + "}", "{" + GOOD.replace('"sequence":1', '"sequence":1.0') + "}",
    "{" + GOOD.replace('"sequence":1', '"sequence":0') + "}", "{" + GOOD.replace("[1,1]", "[1]") + "}",
    "{" + GOOD.replace("[1,1]", "[1,NaN]") + "}", "{" + GOOD.replace("[1,1]", f"[1,{1 << 63}]") + "}",
    "{" + GOOD.replace("[1,1]", "[-1,1]") + "}", "{" + GOOD.replace("[1,1]", "[true,1]") + "}", "{" + GOOD.replace("[1,1]", "null") + "}",
    "{" + GOOD + "}" + " " * MAX_BYTES, "9" * 4090, '{"a":' * 800 + "}" * 800,
])
def test_no_message(line):
    parse_request(b"{" + GOOD.encode() + b',"later":1}')
    with pytest.raises(ProtocolError):
        parse_request(line.encode())


@pytest.mark.parametrize("line", ["{}", "[]", '{"ok":1,"state":"armed","incarnation":"","started_ns":0,"sequence":0}',
                                  '{"ok":true,"state":"fine","incarnation":"","started_ns":0,"sequence":0}'])
def test_no_answer(line):
    with pytest.raises(ProtocolError):
        parse_answer(line.encode())
