"""What follows from what is so: a ladder of situations, the first that matches decides. Pure and total.

    decide(observation, memory) -> Decision

Rules of this package: no clock, no I/O, no log, no random, no global state. Each situation is a file (`busy`,
`stopping`, `foreign`, `lease`, `paused`, `blind`, `empty`, `broken`, `leading`, `leaderless`, `following`), each judgement too
(`promotion`, `rejoin`, `restart`, `switchover`, `standing`, `slots`). A rule returns a `Reason`: its address, whether
it holds, and why, with both numbers. All conditions are asked, so that a refusal lists every obstacle.
"""

from pgha.decide.ladder import LADDER, decide

__all__ = ["LADDER", "decide"]
