"""What is foretold of a healthy cluster of three (ttl 30, loop_wait 10; n1 leads), in all that can be supposed.

That it is what then happens, test_foretold.py shows; here is what is said.
"""

from __future__ import annotations

import msgspec
import pytest
from msgspec.structs import replace

from pgha.clock import candidate_age_s
from pgha.foresee.forecast import Forecast, foresee
from pgha.foresee.hypothesis import parse_all
from pgha.foresee.world import Seen
from pgha.model.action import AcquireLock, Promote
from tests.scenarios.stage import Stage

LEADER_DOWN = ["n1=down"]


class Cluster:
    def __init__(self, *, story=None, busy=False, **stage):
        self.stage = Stage(**stage)
        if not busy:
            self.stage.clients._round = lambda: None        # nothing is written any more
        self.stage.until(12.0)
        if story is not None:
            story(self.stage)
        for host in self.stage.hosts.values():
            if host.agent.process.alive:
                host.agent.postgres.position_asked()
                host.agent.wake()
        self.stage._run_until_ns(self.stage.scheduler.now_s + 0.1)

    def seen(self):
        hosts = {name: host for name, host in self.stage.hosts.items() if host.up and host.agent.process.alive}
        return {n: Seen(observation=h.agent.seen, memory=h.agent.memory, age_s=candidate_age_s(h.agent.seen.now, h.clock.now())) for n, h in hosts.items()}

    def foresee(self, *texts, **more) -> Forecast:
        seen = self.seen()
        return foresee(seen, parse_all(texts, self.stage.hosts), **more)


def cluster(**stage):
    made = Cluster(**stage)
    made.stage.end()
    return made


@pytest.fixture(scope="module")
def healthy():
    return cluster()


def rules(forecast, name):
    return {r.rule: r.because for r in forecast.obstacles[name]}


def test_the_leader_dies(healthy):
    said = healthy.foresee("n1=down")
    assert (said.leader, said.writes_now, said.likely, said.nobody_possible) == ("n1", True, "n2", False)
    assert rules(said, "n3")["promotion.no_peer_is_ahead"].endswith("goes first")
    low, high = said.lock_free_s
    assert 0 < low < high < 31, "its record expires within a ttl of its last renewal"
    assert low < said.writes_back_s[0] < said.writes_back_s[1] < high + 3
    won = [then for then in said.nodes["n2"] if AcquireLock.__name__ in then.actions]
    promoted = [then for then in said.nodes["n2"] if Promote.__name__ in then.actions]
    assert won[0].at_s < promoted[0].at_s, "two passes"
    assert "n1" not in said.nodes, "it decides nothing any more"


def test_clocks_may_differ_by_so_much_that_it_is_open(healthy):
    """At ttl 30 the promised 1 % is longer than others are waited for: whose clock is fastest may lead."""
    said = healthy.foresee("n1=down")
    assert set(said.winners) == {"n2", "n3"}
    assert not said.certain


def test_at_a_short_ttl_they_may_not():
    said = cluster(config={"ttl": 5, "loop_wait": 1, "retry_timeout": 2}).foresee("n1=down")
    assert said.winners == ("n2",)
    assert said.certain


def test_wal_that_is_being_written_is_open():
    said = cluster(config={"ttl": 5, "loop_wait": 1, "retry_timeout": 2}, busy=True).foresee("n1=down")
    assert said.winners == ("n2", "n3")


def test_a_replica_dies(healthy):
    said = healthy.foresee("n3=down")
    assert (said.winners, said.writes_stop, said.writes_back_s, said.certain) == (("n1",), False, None, True)


def test_two_of_three_die(healthy):
    said = healthy.foresee("n1=down", "n2=down")
    assert (said.winners, said.certain) == (("n3",), True)


def test_all_die(healthy):
    said = healthy.foresee("n1=down", "n2=down", "n3=down")
    assert (said.winners, said.nobody_possible, said.nodes) == ((), True, {})


def test_the_store_goes(healthy):
    said = healthy.foresee("dcs=down")
    assert (said.winners, said.nobody_possible, said.certain) == ((), True, True)
    low, high = said.demotes["n1"]
    assert 5 < low <= high < 30, "after loop_wait and an election, before the licence ends"
    assert "demotion" in said.why_demoted["n1"]
    assert said.writes_back_s is None


def test_the_store_goes_and_failsafe_mode_is_on():
    whole = cluster(config={"failsafe_mode": True})
    said = whole.foresee("dcs=down")
    assert (said.winners, said.writes_stop, said.demotes) == (("n1",), False, {})
    assert said.failsafe.startswith("n1 leads on by the others' word")
    said = whole.foresee("dcs=down", "n3=down")
    assert (said.winners, said.nobody_possible) == ((), True)
    assert "n3 does not (no answer)" in said.failsafe


def test_a_lagging_node_drops_out_of_the_race(healthy):
    said = healthy.foresee("n1=down", "n2.lag=20MB")
    assert said.winners == ("n3",)
    assert rules(said, "n2")["promotion.caught_up"] == "lag 20.0 MiB, limit 1.0 MiB"
    within = healthy.foresee("n1=down", "n2.lag=1kB")
    assert within.winners == ("n3",), "n3 has more"
    assert "promotion.caught_up" not in rules(within, "n2")
    both = healthy.foresee("n1=down", "n2.lag=20MB", "n3.lag=30MB")
    assert (both.winners, both.nobody_possible) == ((), True)
    assert rules(both, "n3")["promotion.caught_up"] == "lag 30.0 MiB, limit 1.0 MiB"


SYNC = {"synchronous_mode": True}


def test_only_a_synchronous_standby_may_lead():
    whole = cluster(config=SYNC)
    named = whole.seen()["n1"].observation.dcs.view.sync.members
    other = ({"n2", "n3"} - set(named)).pop()
    said = whole.foresee("n1=down")
    assert said.winners == named
    assert f"not {other}" in rules(said, other)["promotion.is_synchronous"]
    lost = whole.foresee("n1=down", f"{named[0]}=down")
    assert (lost.winners, lost.nobody_possible) == ((), True)


def test_a_lagging_node_drops_out_of_the_synchronous_set():
    whole = cluster(config={**SYNC, "maximum_lag_on_syncnode": 1 << 20})
    named, = whole.seen()["n1"].observation.dcs.view.sync.members
    other, = {"n2", "n3"} - {named}
    said = whole.foresee(f"{named}.lag=20MB")
    assert (said.winners, said.sync_leader, said.sync) == (("n1",), "n1", (other,))
    assert whole.foresee(f"{named}=down").sync == (other,)
    assert whole.foresee(f"{other}=down").sync == (named,)


def test_in_pause_nobody_takes_over():
    said = cluster(story=lambda stage: (stage.configure(pause=True), stage._run_until_ns(stage.scheduler.now_s + 12.0))).foresee("n1=down")
    assert (said.winners, said.nobody_possible) == ((), True)
    assert any("pause" in because for because in rules(said, "n2").values())


def test_a_program_that_is_asked_before_the_promotion_may_refuse():
    whole = cluster(config={"ttl": 5, "loop_wait": 1, "retry_timeout": 2})
    seen = {n: replace(one, observation=replace(one.observation, settings=replace(one.observation.settings, pre_promote_s=60.0 if n == "n2" else 0.0))) for n, one in whole.seen().items()}
    said = foresee(seen, parse_all(LEADER_DOWN, whole.stage.hosts))
    assert (said.likely, said.winners) == ("n2", ("n2", "n3"))
    assert said.unknown == ("n2: its pre_promote may refuse, or take up to 60 s",)


def test_what_is_not_known_is_said(healthy):
    seen = healthy.seen()
    del seen["n3"]
    said = foresee(seen, parse_all(["n1=down"], healthy.stage.hosts), unheard={"n3": "no answer in time"})
    assert said.winners == ("n2", "n3")
    assert said.unknown == ("n3 did not tell what it sees (no answer in time): it is taken to be down; if it is not, it may take over",)


def test_a_member_of_another_make_is_not_foretold(healthy):
    seen = {}
    for name, one in healthy.seen().items():
        dcs = one.observation.dcs
        other = replace(dcs.view.members["n3"], is_pgha=False, version="4.1.5")
        seen[name] = replace(one, observation=replace(one.observation, dcs=replace(dcs, view=replace(dcs.view, members={**dcs.view.members, "n3": other}))))
    del seen["n3"]
    said = foresee(seen, parse_all(["n1=down"], healthy.stage.hosts), unheard={})
    assert "n3" in said.winners
    assert "another program (version 4.1.5)" in said.unknown[0]
    assert "is not foretold" in said.unknown[1]


def test_a_stale_observation_makes_the_bounds_wider(healthy):
    old = {name: replace(one, age_s=one.age_s + 8.0) for name, one in healthy.seen().items()}
    fresh, stale = healthy.foresee("n1=down"), foresee(old, parse_all(["n1=down"], healthy.stage.hosts))
    assert stale.writes_back_s[1] - stale.writes_back_s[0] > fresh.writes_back_s[1] - fresh.writes_back_s[0] + 7.0


def test_a_forecast_travels_as_json(healthy):
    said = healthy.foresee("n1=down", "n2.lag=20MB")
    assert msgspec.json.decode(msgspec.json.encode(said), type=Forecast) == said


def test_observations_travel_as_json(healthy):
    """What an agent tells is all that is needed."""
    seen = {name: msgspec.json.decode(msgspec.json.encode(one), type=Seen) for name, one in healthy.seen().items()}
    assert foresee(seen, parse_all(LEADER_DOWN, healthy.stage.hosts)) == healthy.foresee("n1=down")
