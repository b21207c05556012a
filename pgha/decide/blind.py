"""The store has not been read yet: nothing can be known of the cluster, so nothing is begun."""

from __future__ import annotations

from pgha.clock import candidate_age_s
from pgha.decide.common import reason
from pgha.model.action import Action, StartStandby
from pgha.model.decision import Decision, Memory
from pgha.model.observation import Observation

#: A standby is started without knowing the leader after this long a silence, so that it can serve reads.
START_ANYWAY_AFTER_S = 5.0


def decide(o: Observation, memory: Memory) -> Decision | None:
    if o.dcs.view is not None:
        return None
    since = o.dcs.unreachable_since
    silent_s = candidate_age_s(since, o.now) if since else 0.0
    reasons = (reason("blind.store_was_read", False, f"no answer for {silent_s:.1f} s: {o.dcs.why or 'just started'}"),)
    actions: tuple[Action, ...] = ()
    control = o.directory.control
    was_standby = control is not None and "recovery" in control.state
    startable = was_standby and not o.directory.rewind_interrupted
    if not o.postgres.alive and not o.postgres.orphans and startable and silent_s > START_ANYWAY_AFTER_S and not memory.start_failures:
        actions = (StartStandby(upstream=None),)
    return Decision(situation="blind", summary="waiting for the configuration store", reasons=reasons, actions=actions, memory=memory, wake_in_s=1.0)
