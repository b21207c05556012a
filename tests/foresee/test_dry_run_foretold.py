"""What `switchover --dry-run` says is what a switchover then does: random worlds of the simulation, at random instants."""

from __future__ import annotations

import json
import os

from msgspec.structs import replace

from pgha.foresee import dry_run
from pgha.model.decision import Memory
from tests.foresee.foretold import World
from tests.simulation import kernel

SEEDS = int(os.environ.get("PGHA_EXPLAIN_SEEDS", "16"))


def tell(seed: int) -> tuple[str, bool]:
    """What was wrong ('' nothing), and whether it was said that it would be done."""
    world = World(seed)
    try:
        return _tell(world)
    finally:
        kernel.throw_away([agent.process for host in world.hosts.values() for agent in host.all_agents])


def _tell(world: World) -> tuple[str, bool]:
    world.live()
    lags = world.random.random() < 0.3
    leader = world.leader()
    candidate = world.random.choice([*world.names, ""])
    if leader is None:
        return "", False
    if lags and candidate not in ("", leader):
        stream = world.instances[candidate].server.stream if world.instances[candidate].server is not None else None
        if stream is not None:
            stream.under_way = True
        world.instances[leader].commit(20 << 20, lambda _outcome: None)
    seen = world.observe()
    if world.leader() != leader or not seen[leader].observation.postgres.is_primary:
        return "", False
    # The agent remembers what it remembered before that pass; what it has learned in it, a dry run may know.
    answers = {name: replace(world.agents[name]._vote(), name=name, asked_at=seen[leader].observation.now) for name in seen if name != leader}
    said = dry_run.move("switchover", replace(seen[leader].observation, peers=answers), seen[leader].memory or Memory(), leader=leader, candidate=candidate,
                        key={"leader": leader, "member": candidate})
    begun_s = world.scheduler.now_s
    world.operator_asks_failover(json.dumps({k: v for k, v in (("leader", leader), ("member", candidate)) if v}).encode(), manual=False)
    new = ""
    while world.scheduler.now_s < begun_s + 60.0 and not new:
        world.for_s(0.25)
        now = world.leader()
        new = now if now is not None and now != leader else ""
        if world.view().failover.empty and now == leader:
            break
    what = f"seed {world.options.seed}: from {leader} to {candidate or 'any'}: "
    if said.would and (not new or new != said.facts["candidate"]):
        what += f"it was to be done, to {said.facts['candidate']}; {new or 'nobody'} leads"
    elif not said.would and new:
        what += f"{new} leads, it was to be refused: {'; '.join(r.because for r in said.refused_by)}"
    else:
        what = ""
    return what, said.would


def test_dry_runs_come_true():
    told = [tell(seed) for seed in range(1, SEEDS + 1)]
    assert not [what for what, _ in told if what]
    done = sum(would for _, would in told)
    print(f"{len(told)} dry runs, {done} of which would be done")
    assert 3 <= done <= SEEDS - 2
