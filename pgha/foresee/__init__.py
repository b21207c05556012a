"""What would happen if …? The live observations, changed by a hypothesis, and the real `decide` run on them for every node.

    seen (each agent's last observation) → hypothesis → world (a small model of effects) → forecast

Nothing here decides: `pgha.decide` does, pass after pass, and `world` says what its actions would bring about and when the
clocks would move on. Where the future is open (two equal candidates, WAL that moves, clocks that differ by what they may),
the same world is run once for each way it may go, and the forecast is the set of what came out (`forecast`).

Rules of this package: pure, as decide/ is: no clock, no I/O, no chance. It may import model/, decide/, clock, and of dcs/
the reading of keys. What it does not know (a member that did not answer, one that Patroni runs, how long a copy takes) it
says in `Forecast.unknown`, and does not guess.
"""
