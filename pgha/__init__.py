"""pgha: automatic failover for PostgreSQL that a DBA can trust while asleep.

The flow goes in one direction:

    observe/ (what is so)  →  decide/ (what follows)  →  act/ (make it so)

`agent.py` is the only file that knows all three; `lock/` holds what must work when nothing else does.

Who may import whom (kept by tests/test_architecture.py):

    model/     imports nothing of pgha but clock and model itself: values without policy
    decide/    model only: no clock, I/O, log, random, global
    foresee/   model, clock, decide, dcs (the reading of keys): as pure as decide
    config/    model, errors
    dcs/       model, errors, clock
    postgres/  model, errors, clock
    lock/      model, dcs (interface), errors, clock; `guard` and all it reaches: standard library, clock and systemd only
    machine.py lock, postgres, rest, systemd: this machine as the agent uses it, the seam for the simulation
    observe/   machine, dcs, postgres, lock, model, and config.state (what outlives the agent)
    act/       machine, dcs, postgres, lock, model, and config's values (how PostgreSQL is to be configured)
    rest/      model, decide (for pure health answers), foresee, observe's values, events.py; never act
    events.py  model; chronicle.py (what has happened, from pass to pass): model, rest, events
    ctl/       model, config, dcs, foresee; never the agent
"""

__version__ = "0.1.0"

#: The level of the reference's wire behaviour that this version speaks; peers parse it as dotted integers.
COMPATIBLE_VERSION = "4.1.4"
