"""What must hold when nothing else does: the lock's renewal, the fence, the guard process, the watchdog device.

licence.py  what may this process believe about its own record (no I/O)
renewer.py  keeps the record renewed, takes it, gives it back: its own task, store and deadline
fence.py    this agent's side of the fence: tells the guard, and acts itself at the deadline
guard.py    the process that fences when the agent cannot; recipe.py how killing is done; protocol.py their words
"""
