"""What does a DBA read of a story? What happened, what each node decided and why, who accepted writes, what was lost.

    seconds  who     what

`WORLD`: something was done to the cluster. `WRITES`: who accepts commits, and what clients noticed. A node's name: what
its agent decided, with its reasons below (`+` holds, `-` does not: rule, and the numbers), and what its PostgreSQL and
its guard did. A decision is told when it changes, as the log does; what repeats itself is told once.
"""

from __future__ import annotations

import re
import textwrap
from typing import Any

from pgha.agent import _what_is_said
from pgha.model.action import AcquireLock, Clone, Demote, Promote, ReadCluster, Rewind, StartPrimary, Stop
from pgha.model.wal import format_lsn
from tests.simulation.postgres import common

#: Decisions that change roles or data tell what holds, too; of these rules only where they do not.
WEIGHTY = (AcquireLock, Promote, Demote, StartPrimary, Rewind, Clone, Stop)
TAKEN_FOR_GRANTED = frozenset({
    "promotion.not_nofailover", "promotion.system_is_ours", "promotion.watchdog_is_usable", "promotion.has_not_just_failed", "promotion.in_recovery",
    "restart.guard_answers", "restart.read_in_this_pass", "leading.guard_answers", "leading.watchdog_is_ready", "foreign.name_is_ours",
    "promotion.is_not_asked_to_leave", "paused.may_stand",
})
OF_NO_MODE = re.compile(r"no synchronous mode|nobody is waited for|the operator's own|is no pause|no promise binds|lists nobody")
#: A decision that did nothing and was over sooner is not told.
TOO_SHORT_S = 0.25
#: Nothing follows from these.
UNTOLD = frozenset({"busy"})
#: Log lines that say again what a decision or an event has said, or that matter to nobody but pgha.
UNTOLD_LOG = re.compile(r"operation begins|operation has ended|slot created|watchdog|removed the pid file|started as|frozen for|following|promoted$"
                        r"|announc|configuration|demoted|agent starts|restored standby"
                        r"|ending operation|watch of the store|member key|member lease|^cloning|stopped PostgreSQL|deleted a replaced")


WIDTH = 140


def _wrapped(line: str) -> list[str]:
    indent = " " * (23 if line.startswith(" " * 19) else 17)
    return textwrap.wrap(line, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False) or [""]


class Transcript:
    """`world`: a Stage. `from_s`: its time that is 0 s of the story."""

    def __init__(self, world: Any, from_s: float) -> None:
        self._world = world
        self._from_s = from_s
        self._lines: list[str | None] = []
        self._said: dict[str, Any] = {}
        self._told: dict[str, str] = {}
        for name, agent in world.agents.items():
            self._said[name] = _what_is_said(agent.decision)
        self._passing: dict[str, tuple[float, list[int], str]] = {}     # node → when, and which lines, if what it said may have been too short
        self._accepting: set[str] = {n for n, i in world.instances.items() if i.accepting}
        self._nobody_since_s: float | None = None
        self._previous: Any = next((i.dir.branch for i in world.instances.values() if i.accepting), None)
        self._acknowledged: dict[str, int] = {}
        self._lost = 0
        self._again: dict[str, set[str]] = {}
        self._longest_s = 0.0
        self._last_ack_s: float | None = None

    # --- lines -------------------------------------------------------------------------------------------------------------

    @property
    def _now_s(self) -> float:
        now: float = self._world.scheduler.now_s - self._from_s
        return now

    def _line(self, who: str, what: str) -> None:
        self._lines.append(f"{self._now_s + 1e-6:7.1f}  {who:<6}  {what}")

    def _below(self, what: str) -> None:
        self._lines.append(f"{'':<19}{what}")

    def text(self) -> str:
        return "\n".join(part.rstrip() for line in self._lines if line is not None for part in _wrapped(line)) + "\n"

    def _once(self, who: str, key: str, what: str) -> None:
        """Once between two events of the world."""
        if key not in self._again.setdefault(who, set()):
            self._again[who].add(key)
            self._line(who, what)

    def happens(self, what: str) -> None:
        if self._lines:
            self._lines.append("")
        self._line("WORLD", what)
        self._told.clear()
        self._again.clear()

    # --- who is what ---------------------------------------------------------------------------------------------------------

    def scene(self) -> None:
        """Who is what, by the world's own truth."""
        parts = []
        for name, instance in self._world.instances.items():
            server = instance.server
            if not self._world.hosts[name].up:
                parts.append(f"{name} is off")
            elif server is None:
                parts.append(f"{name} is down")
            elif server.primary:
                names = f", synchronous_standby_names {server.synchronous_standby_names!r}" if server.synchronous_standby_names else ""
                parts.append(f"{name} is primary on timeline {instance.dir.timeline}{names}")
            elif server.stream is not None:
                parts.append(f"{name} streams from {server.stream.upstream.name}")
            else:
                parts.append(f"{name} is a standby that does not stream")
        self._line("WORLD", "; ".join(parts))

    def end(self) -> None:
        self._lines.append("")
        self.scene()
        told = ", ".join(f"{number} by {name}" for name, number in self._acknowledged.items()) or "none"
        self._line("WRITES", f"acknowledged: {told}; lost: {self._lost or 'none'}; longest time without an acknowledgement: {self._longest_s:.1f} s")
        for exposure in self._world.exposures:
            self._line("WRITES", f"exposure: {exposure.text}")

    # --- what pgha says --------------------------------------------------------------------------------------------------------

    def decided(self, name: str, seen: Any, decision: Any) -> None:
        said = _what_is_said(decision)
        if said == self._said.get(name) or (decision.situation in UNTOLD and not decision.actions):
            return
        self._said[name] = said
        self._forget_the_passing(name)
        text = f"[{decision.situation}] {'PAUSE: ' if decision.paused else ''}{decision.summary}"
        if self._told.get(name) == text or text in self._again.get(name, set()) or (decision.situation == "empty" and "being looked at" in text):
            return
        before, self._told[name] = self._told.get(name, ""), text
        first = len(self._lines)
        self._line(name, text)
        weighty = any(isinstance(a, WEIGHTY) for a in decision.actions)
        due = all(r.holds for r in decision.reasons if r.rule == "broken.handover_is_due")
        for reason in decision.reasons:
            if not due and reason.rule.startswith("broken.handover_"):
                continue
            if reason.because in decision.summary or (reason.holds and (not weighty or reason.rule in TAKEN_FOR_GRANTED or OF_NO_MODE.search(reason.because))):
                continue
            self._below(f"{'+' if reason.holds else '-'} {reason.rule}: {reason.because}")
        if not decision.actions or all(isinstance(a, ReadCluster) for a in decision.actions):
            self._passing[name] = (self._now_s, list(range(first, len(self._lines))), before)
        self._again.setdefault(name, set()).add(text)

    def _forget_the_passing(self, name: str) -> None:
        at_s, lines, before = self._passing.pop(name, (0.0, [], ""))
        if lines and self._now_s - at_s < TOO_SHORT_S:
            for number in lines:
                self._again.get(name, set()).discard((self._lines[number] or "")[17:])
                self._lines[number] = None
            self._told[name] = before

    def traced(self, where: str, what: str, facts: dict[str, Any]) -> None:
        name, _, guard = where.partition("/")
        if guard:
            if what in ("fenced", "licence is ending") or (what == "state" and facts["state"] == "latched"):
                said = facts["state"] if what == "state" else what
                self._line(name, f"guard: {said}: {facts.get('why') or facts.get('signal')}".replace("_", " "))
            return
        if name not in self._world.hosts or what.startswith("["):
            return
        match what:
            case "postgres starts" | "postgres ready" | "host down" | "host up" | "power off" | "postmaster killed" | "agent killed":
                return
            case "postgres stops":
                self._line(name, "PostgreSQL shuts down")
            case "postgres died":
                self._line(name, f"PostgreSQL ends: {facts['why']}")
            case "postgres promoted":
                self._line(name, f"PostgreSQL is promoted: timeline {facts['timeline']} begins at {format_lsn(facts['lsn'])}")
            case "streams":
                self._line(name, f"PostgreSQL streams from {facts['source']}, timeline {facts['timeline']}")
            case "lock acquired":
                self._line(name, f"holds the lock: epoch {facts['epoch']}, ttl {facts['ttl_s']:g} s")
            case "lock released":
                self._line(name, f"releases the lock: final position {facts['lsn']}, timeline {facts['timeline']}")
            case "synchronous_standby_names set":
                self._line(name, f"synchronous_standby_names becomes {facts['names']!r}")
            case "rewind has ended":
                self._line(name, f"pg_rewind: {facts['outcome']} from {facts['source']} in {facts['took_s']:.1f} s")
            case "cloned":
                self._line(name, f"copied from {facts['source']} in {facts['took_s']:.1f} s")
            case "operation failed":
                self._once(name, f"{what} {facts['kind']}", f"operation failed: {facts['kind']}: {facts['why']}".replace("_", " "))
            case "action failed":
                self._once(name, f"{what} {facts['action']}", f"action failed: {facts['action']}: {facts['why']}".replace("_", " "))
            case _:
                if not UNTOLD_LOG.search(what.replace("_", " ")):
                    said = ", ".join(f"{k} {round(v, 1) if isinstance(v, float) else v}" for k, v in facts.items() if v not in ("", None))
                    self._once(name, what, f"{what}: {said}" if said else what)

    # --- what clients notice (checkers' news) ------------------------------------------------------------------------------------

    def accepting(self, instance: Any, now: bool) -> None:  # noqa: FBT001  (checkers.Truth's own)
        before = set(self._accepting)
        (self._accepting.add if now else self._accepting.discard)(instance.name)
        if self._accepting == before:
            return
        if not self._accepting:
            self._nobody_since_s = self._now_s
            self._line("WRITES", "nobody accepts them any more")
            return
        who = " and ".join(sorted(self._accepting))
        after = f", for the first time in {self._now_s - self._nobody_since_s:.1f} s" if self._nobody_since_s is not None and not before else ""
        self._line("WRITES", f"{who} accepts them, timeline {instance.dir.timeline}{after}")
        self._nobody_since_s = None

    def becomes_primary(self, instance: Any, how: str) -> None:
        before, self._previous = self._previous, instance.dir.branch
        if before is None or before is instance.dir.branch:
            return
        at, lsn = common(instance.dir.branch, instance.dir.lsn, before, before.end)
        lost = [(n, t) for n, t in before.acknowledged if at is not before or n > lsn]
        if lost:
            self._lost += len(lost)
            first, last = (t / 1e9 - self._from_s for t in (lost[0][1], lost[-1][1]))
            self._line("WRITES", f"lost: {len(lost)} commits that were acknowledged between {first:.1f} and {last:.1f} s, "
                       f"{lost[-1][0] - lsn} bytes behind {format_lsn(lsn)}")

    def answered(self, name: str, outcome: str, sent_s: float) -> None:
        now_s = self._now_s
        if outcome == "acked":
            self._acknowledged[name] = self._acknowledged.get(name, 0) + 1
            self._longest_s = max(self._longest_s, now_s - (self._last_ack_s if self._last_ack_s is not None else now_s))
            self._last_ack_s = now_s
            waited_s = now_s + self._from_s - sent_s
            if waited_s >= 1.0 and self._told.get("WRITES") != name:
                self._told["WRITES"] = name
                self._line("WRITES", f"commits on {name} that waited for up to {waited_s:.1f} s are acknowledged")
