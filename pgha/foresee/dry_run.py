"""What would an agent do if it were asked to, in which order, and what would refuse? The request as a fact of its own live
observation, and the very decision that it would make on it. Nothing is done.

Steps are named as agents log them; who does each is said. What comes after this node's own part (the candidate's, the
others') is what their rules say of a cluster that stays as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from msgspec import Struct
from msgspec.structs import replace

from pgha.decide import decide, promotion, reinit, switchover
from pgha.decide.common import fresh_peers, mib, others
from pgha.decide.empty import clone_source
from pgha.decide.standing import left_s, licensed, standing
from pgha.model.action import AnswerRequest, CancelOperation, Demote, Restart
from pgha.model.cluster import FailoverKey
from pgha.model.decision import Decision, Memory, Reason
from pgha.model.observation import Observation
from pgha.model.request import Request

Command = Literal["switchover", "failover", "restart", "reinitialize"]
#: Longer than any record lives: it does not expire.
ENDLESS_S = 1e6


class Step(Struct, frozen=True, kw_only=True):
    """`step`: its name; `says`: what the agent that does it logs, or how it comes about."""

    step: str
    who: str
    says: str


class DryRun(Struct, frozen=True, kw_only=True):
    """`would`: it would be done. `refused_by`: every obstacle; `conditions`: all that was asked. `facts`: with their numbers."""

    dry_run: Command
    node: str
    would: bool
    refused_by: tuple[Reason, ...] = ()
    conditions: tuple[Reason, ...] = ()
    steps: tuple[Step, ...] = ()
    facts: dict[str, Any] = {}


def refused(command: Command, node: str, *reasons: Reason) -> DryRun:
    """Before any rule is asked."""
    return DryRun(dry_run=command, node=node, would=False, refused_by=reasons, conditions=reasons)


# --- who leads -------------------------------------------------------------------------------------------------------------

def move(command: Literal["switchover", "failover"], o: Observation, memory: Memory, *, leader: str, candidate: str, key: Mapping[str, Any]) -> DryRun:
    """`key`: as it would stand in /failover. `o`: with the answers of the others of just now (switchover.conditions asks for them)."""
    view = o.dcs.view
    if view is None:
        return refused(command, o.me.name, _refusal("store_was_read", "the store has not been read yet"))
    down = key.get("pgha", {}).get("holder_is_down", {}) if isinstance(key.get("pgha"), Mapping) else {}
    asked = FailoverKey(leader=leader, candidate=candidate, down_incarnation=down.get("incarnation", ""), down_sequence=down.get("sequence", 0), raw=dict(key))
    o = replace(o, dcs=replace(o.dcs, view=replace(view, failover=asked, revisions={**view.revisions, "failover": view.revision + 1})))
    if licensed(o):
        return _hand_over(command, o, memory, candidate)
    if candidate == o.me.name:
        return _take_over(command, o, memory)
    now = standing(o)
    return refused(command, o.me.name, _refusal("is_the_one_to_ask", f"{now.because}: who leads judges this, and without a leader the candidate"))


def _refusal(rule: str, because: str) -> Reason:
    return Reason(rule=f"dry_run.{rule}", holds=False, because=because)


def _hand_over(command: Command, o: Observation, memory: Memory, candidate: str) -> DryRun:
    decision = decide(o, memory)
    demote = next((a for a in decision.actions if isinstance(a, Demote)), None)
    conditions = switchover.conditions(o)
    obstacles = [r for r in conditions if not r.holds]
    if demote is None and not obstacles:
        obstacles = [r for r in decision.reasons if not r.holds] or [_refusal("is_its_turn", f"{decision.situation}: {decision.summary}")]
    names = [candidate] if candidate else sorted(others(o))
    able = [name for name in names if not switchover.obstacles(o, name)]
    winner = candidate or _best(o, able)
    facts = {"leader": o.me.name, "candidate": winner, "candidates": {name: _candidate(o, name) for name in names}, "licence_left_s": round(left_s(o), 1), "paused": o.settings.pause}
    steps = _hand_over_steps(o, demote, winner) if demote is not None else ()
    return DryRun(dry_run=command, node=o.me.name, would=not obstacles, refused_by=tuple(obstacles), conditions=conditions, steps=steps if not obstacles else (), facts=facts)


def _best(o: Observation, able: list[str]) -> str:
    """Who comes first by position, priority and name, if nothing is written any more."""
    peers = fresh_peers(o)
    return min(able, key=lambda name: (-peers[name].timeline, -peers[name].lsn, -peers[name].tags.failover_priority, name), default="")


def _candidate(o: Observation, name: str) -> dict[str, Any]:
    row, peer = o.postgres.row, fresh_peers(o).get(name)
    said: dict[str, Any] = {"obstacles": switchover.obstacles(o, name)}
    if peer is not None and row is not None:
        lag = max(0, row.lsn - peer.lsn)
        said |= {"lag_bytes": lag, "lag": mib(lag), "timeline": peer.timeline, "priority": peer.tags.failover_priority}
    return said


def _hand_over_steps(o: Observation, demote: Demote, candidate: str) -> tuple[Step, ...]:
    me, steps = o.me.name, []
    if demote.before_stop_s:
        steps.append(Step(step="before_stop", who=me, says=f"before_stop, at most {demote.before_stop_s:g} s"))
    if demote.checkpoint:
        steps.append(Step(step="checkpoint", who=me, says="checkpoint before the shutdown"))
    steps += [
        Step(step="demote", who=me, says="stopping PostgreSQL: clients are disconnected, writes end"),
        Step(step="wait", who=me, says=f"the shutdown waits until {candidate} and every other standby that answers has the shutdown checkpoint, at most {demote.timeout_s:g} s"),
        Step(step="sweep", who=me, says="making sure that nothing lives"),
        Step(step="release", who=me, says="releasing the lock"),
        *_take_over_steps(candidate),
    ]
    rest = [name for name in sorted(others(o)) if name != candidate]
    steps += [Step(step="follow", who=name, says=f"following a leader ({candidate})") for name in rest]
    steps.append(Step(step="rejoin", who=me, says=f"starting as a secondary of {candidate}"))
    return tuple(steps)


def _take_over_steps(candidate: str, *, pre_promote: bool = False) -> list[Step]:
    steps = [
        Step(step="freeze", who=candidate, says="election: stopped streaming, so that the position is final"),
        Step(step="acquire", who=candidate, says="taking the lock"),
    ]
    if pre_promote:
        steps.append(Step(step="pre_promote", who=candidate, says="asking pre_promote before the promotion"))
    return [*steps, Step(step="promote", who=candidate, says="promoting to a new timeline: writes are possible again")]


def _take_over(command: Command, o: Observation, memory: Memory) -> DryRun:
    """Without a leader (or one that is said to be down): the candidate judges for itself."""
    conditions = promotion.conditions(o, memory)
    now = standing(o)
    obstacles = [r for r in conditions if not r.holds]
    if now.left_s >= ENDLESS_S:
        obstacles.append(Reason(rule=f"standing.{now.whose}", holds=False, because=now.because))
    facts = {"candidate": o.me.name, "lock": now.because, "lock_free_in_s": round(now.left_s, 1) if now.left_s < ENDLESS_S else None, "paused": o.settings.pause}
    steps: list[Step] = []
    if not obstacles:
        steps = [Step(step="wait", who=o.me.name, says=f"{now.because}")] if now.left_s > 0 else []
        steps += _take_over_steps(o.me.name, pre_promote=o.settings.pre_promote_s > 0)
    return DryRun(dry_run=command, node=o.me.name, would=not obstacles, refused_by=tuple(obstacles), conditions=conditions, steps=tuple(steps), facts=facts)


# --- one node --------------------------------------------------------------------------------------------------------------

def restart(o: Observation, memory: Memory, options: Mapping[str, Any]) -> DryRun:
    """`options`: as a request for a restart carries them."""
    decision, number = _decided(o, memory, Request(id=_number(o), kind="restart", at=o.now, options=dict(options)))
    answer = _answer(decision, number)
    action = next((a for a in decision.actions if isinstance(a, Restart)), None)
    facts = {"role": decision.role, "state": decision.state, "pending_restart": sorted(o.postgres.row.pending_restart) if o.postgres.row is not None else []}
    if answer is not None and answer.status >= 400:
        return _answered("restart", o, decision, answer, facts)
    if answer is not None:
        when = str(options.get("schedule", "later"))
        return DryRun(dry_run="restart", node=o.me.name, would=True, conditions=decision.reasons, facts={**facts, "schedule": when},
                      steps=(Step(step="schedule", who=o.me.name, says=f"restart scheduled at {when}; its conditions count then"),))
    waits = [r for r in decision.reasons if r.rule == "synchronous.is_to_be_let_go" and not r.holds]
    if action is None and not waits:
        obstacles = tuple(r for r in decision.reasons if not r.holds) or (_refusal("is_its_turn", f"{decision.situation}: {decision.summary}; it is done after that"),)
        return DryRun(dry_run="restart", node=o.me.name, would=False, refused_by=obstacles, conditions=decision.reasons, facts=facts)
    return DryRun(dry_run="restart", node=o.me.name, would=True, conditions=decision.reasons, facts=facts, steps=_restart_steps(o, action, waits))


def _restart_steps(o: Observation, action: Restart | None, waits: list[Reason]) -> tuple[Step, ...]:
    me, row = o.me.name, o.postgres.row
    primary = action.as_primary if action is not None else False
    steps = [Step(step="leave_sync", who=me, says=f"asked to restart: {r.because}") for r in waits]
    if o.settings.before_stop_s:
        steps.append(Step(step="before_stop", who=me, says=f"before_stop, at most {o.settings.before_stop_s:g} s"))
    if row is not None:
        steps.append(Step(step="checkpoint", who=me, says="checkpoint before the restart"))
        steps.append(Step(step="stop", who=me, says="stopping PostgreSQL: clients are disconnected" + (", writes end" if primary else "")))
    if primary:
        return (*steps, Step(step="start", who=me, says="starting as primary, under the lock that it keeps: writes are possible again"))
    upstream = action.upstream.name if action is not None and action.upstream is not None else ""
    return (*steps, Step(step="start", who=me, says=f"starting as a standby of {upstream or 'the leader'}"))


def reinitialize(o: Observation, memory: Memory, options: Mapping[str, Any]) -> DryRun:
    """`options`: force, from_leader. What the leader's PostgreSQL answers is asked only when it is done, and may still refuse it."""
    decision, number = _decided(o, memory, Request(id=_number(o), kind="reinitialize", at=o.now, options=dict(options)))
    answer = _answer(decision, number)
    facts: dict[str, Any] = {"role": decision.role, "data_directory": o.directory.state}
    if answer is None:
        looking = _refusal("is_its_turn", f"the data directory is {o.directory.state}: ask again in a moment")
        conditions = reinit.conditions(o)
        obstacles = (*(r for r in conditions if not r.holds), looking)
        return DryRun(dry_run="reinitialize", node=o.me.name, would=False, refused_by=obstacles, conditions=conditions, facts=facts)
    if answer.status >= 400:
        return _answered("reinitialize", o, decision, answer, facts)
    source, why = clone_source(o, leader_only=bool(options.get("from_leader")))
    leader = standing(o).holder
    me, copied_from = o.me.name, source.name if source is not None else leader
    steps = [Step(step="end", who=me, says=f"ending operation: {a.why}") for a in decision.actions if isinstance(a, CancelOperation)]
    steps.append(Step(step="ask", who=me, says=f"reinitialize: asking {leader} who it is; unless it is a primary of this cluster, nothing is done"))
    if o.postgres.alive:
        steps.append(Step(step="leave_sync", who=me, says="if /sync names this node, it waits to be let go"))
        if o.settings.before_stop_s:
            steps.append(Step(step="before_stop", who=me, says=f"before_stop, at most {o.settings.before_stop_s:g} s"))
        steps.append(Step(step="stop", who=me, says="reinitialize: stopping PostgreSQL"))
    steps += [
        Step(step="copy", who=me, says=f"reinitialize: copying from {copied_from} with pg_basebackup; the data is kept beside it"),
        Step(step="rejoin", who=me, says=f"starting as a secondary of {leader}"),
        Step(step="delete", who=me, says="deleted the data directory that a clone has replaced, once the copy streams"),
    ]
    return DryRun(dry_run="reinitialize", node=me, would=True, conditions=(*decision.reasons, why), steps=tuple(steps), facts={**facts, "source": copied_from})


def scheduled(command: Command, node: str, at: str, who: str) -> DryRun:
    """For later: who leads then, and who can take over, only then is known."""
    return DryRun(dry_run=command, node=node, would=True, facts={"schedule": at},
                  steps=(Step(step="schedule", who=who, says=f"{command} scheduled at {at}; everything is judged then"),))


def _number(o: Observation) -> int:
    return max((r.id for r in o.requests), default=0) + 1


def _decided(o: Observation, memory: Memory, request: Request) -> tuple[Decision, int]:
    """What a pass would decide that finds this request, and no other."""
    return decide(replace(o, requests=(request,)), memory), request.id


def _answer(decision: Decision, number: int) -> AnswerRequest | None:
    return next((a for a in decision.actions if isinstance(a, AnswerRequest) and a.id == number), None)


def _answered(command: Command, o: Observation, decision: Decision, answer: AnswerRequest, facts: dict[str, Any]) -> DryRun:
    """A refusal, with the rules that failed; without any the answer itself is the reason."""
    obstacles = tuple(r for r in decision.reasons if not r.holds and not r.rule.startswith(("standing.", "following.", "synchronous."))) or (_refusal("answer", answer.text),)
    return DryRun(dry_run=command, node=o.me.name, would=False, refused_by=obstacles, conditions=decision.reasons, facts={**facts, "answer": answer.text})
