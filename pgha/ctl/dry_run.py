"""`--dry-run`: what would happen, in which order, and what would refuse? Nothing is changed.

The agent that would do it judges, by the rules by which it would (POST /pgha/dry-run/…); what ctl itself would refuse is
added to that, and nothing is judged twice. Exit code 0: it would be done; 3: refused, with every obstacle.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from pgha.ctl import agents
from pgha.ctl.cluster import Cluster
from pgha.ctl.ends import DONE, REFUSED, UNREACHABLE, End, code_of
from pgha.ctl.exchange import NoAnswer
from pgha.ctl.output import plain
from pgha.ctl.settings import Settings

#: Peers are asked meanwhile.
_ANSWER_S = 10.0


def move(settings: Settings, cluster: Cluster, kind: str, *, leader: str, candidate: str, schedule: str, down: bool, known: Sequence[str]) -> int:
    """A switchover or failover. `known`: why ctl would ask nobody."""
    body: dict[str, Any] = {key: value for key, value in (("leader", leader), ("candidate", candidate), ("scheduled_at", schedule)) if value}
    if down:
        body["pgha"] = {"holder_is_down": True}
    who = candidate if down else cluster.leader or candidate
    what = f"{kind} of cluster {settings.scope}" + (f" from {leader}" if leader else "") + (f" to {candidate}" if candidate else "") + (f" at {schedule}" if schedule else "")
    if not who or not cluster.api_url(who):
        return shown(what, {}, known=[*known, "no agent can be asked that would judge this"])
    return one(settings, cluster, who, kind, body, what=what, known=known)


def one(settings: Settings, cluster: Cluster, name: str, command: str, body: Mapping[str, Any], *, what: str, known: Sequence[str] = ()) -> int:
    """What this member's agent says of it."""
    try:
        answer = agents.ask(settings, cluster.api_url(name), "POST", f"/pgha/dry-run/{command}", body=body, timeout_s=_ANSWER_S)
    except NoAnswer as failure:
        raise End(UNREACHABLE, f"{name} cannot say what it would do: {failure}") from None
    try:
        said = json.loads(answer.body)
    except ValueError:
        said = None
    if not isinstance(said, dict):
        text = answer.body.decode(errors="replace")
        if known:
            return shown(what, {}, known=[*known, f"{name}: {text[:300]}"])
        code = code_of(answer.status, text)
        raise End(REFUSED if code == DONE else code, f"{name} does not say what it would do: status {answer.status}, {text[:300]}")
    return shown(what, said, known=known)


def shown(what: str, said: Mapping[str, Any], *, known: Sequence[str] = ()) -> int:
    """Print it; the exit code."""
    obstacles = [(str(r.get("rule")), str(r.get("because"))) for r in said.get("refused_by") or () if isinstance(r, dict)]
    told = [text for text in known if not any(text == because for _, because in obstacles)]
    would = not obstacles and not told
    lines = [f"{what}: {'would be done' if would else 'would be refused'} (dry run: nothing is changed)"]
    if would:
        steps = [step for step in said.get("steps") or () if isinstance(step, dict)]
        width = max((len(str(step.get("who"))) for step in steps), default=0)
        lines += [f"  {number}. {step.get('who')!s:<{width}}  {step.get('step')}: {step.get('says')}" for number, step in enumerate(steps, 1)]
    width = max((len(rule) for rule, _ in obstacles), default=0)
    lines += [f"  {rule:<{width}}  {because}" for rule, because in obstacles]
    lines += [f"  {text}" for text in told]
    lines += _facts(said.get("facts"))
    print("\n".join(plain(line) for line in lines), flush=True)
    return DONE if would else REFUSED


def _facts(facts: Any) -> list[str]:
    """Of each candidate, what it was judged by."""
    if not isinstance(facts, dict):
        return []
    lines = []
    candidates = facts.get("candidates")
    for name, of in (candidates.items() if isinstance(candidates, dict) else ()):
        if isinstance(of, dict):
            obstacles = of.get("obstacles") or []
            lines.append(f"  {name}: " + (", ".join(map(str, obstacles)) if obstacles else f"can take over (lag {of.get('lag')}, timeline {of.get('timeline')}, priority {of.get('priority')})"))
    if facts.get("lock"):
        lines.append(f"  the lock: {facts['lock']}")
    return lines
