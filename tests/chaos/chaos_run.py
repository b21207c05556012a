"""Faults at random on a real cluster until the time is up, and a table of what came of them.

    build/chaos --minutes 10 --seed 7 [--ttl 5|30] [--mode async|sync|strict|quorum,failsafe] [--watchdog] [--only TEXT]

In rounds: one to three faults at random moments, on the primary more often than on others; all heal; then there must be
one primary with every member streaming, and every node must have the same rows. Which faults, when, on whom (as a role)
and how long follows from the seed alone; what the cluster makes of it does not.

Ends with exit code 1 at the first violation. Everything is kept in var/chaos/<run>/: logs, histories, what each node
decided around each fault (explain.jsonl), faults.jsonl. Exit code 0: no violation was found.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests/cluster"), str(ROOT / "tests/chaos")]

from chaos_bed import ChaosBed, Host, chaos_bed, why_not  # noqa: E402
from chaos_clients import ROAMING, Clients, Exposed, Verdict, ids, ids_or_none, judge, longest_gap, now_us  # noqa: E402
from chaos_faults import FAULTS, Fault, together  # noqa: E402

from pgha.demo.bed import BedTimeout  # noqa: E402
from pgha.demo.node import DEFAULT, FAST, Profile  # noqa: E402
from pgha.demo.processes import Reaper  # noqa: E402
from pgha.demo.screen import table  # noqa: E402

MODES: dict[str, dict[str, Any]] = {
    "async": {},
    "sync": {"synchronous_mode": True},
    "strict": {"synchronous_mode": True, "synchronous_mode_strict": True},
    "quorum": {"synchronous_mode": "quorum"},
    "failsafe": {"failsafe_mode": True},
}
#: In these, an acknowledged row is never lost.
DURABLE = {"sync", "strict", "quorum"}
#: So many of the faults are the primary's.
PRIMARY_SHARE = 0.75
#: After the last fault has healed, all is well again within so many ttl and so many seconds more.
RECOVERY_TTLS, RECOVERY_S = 3, 60
#: A restarted agent needs so long until its guard has put an end to what was exposed.
AGENT_START_S = 5
_INTERRUPTED = 130
_SAME_ROWS_S = 30
_TICK_S = 0.05
_QUIET_S = (1.0, 4.0)


class Planned(NamedTuple):
    """One fault of a round; `at_s` counts from the round's begin."""

    kind: str
    role: str
    at_s: float
    length_s: float
    chance: int


class Happened(NamedTuple):
    """What a fault was in the end; times are monotonic microseconds."""

    planned: Planned
    what: str
    began_us: int
    ended_us: int


class Row(NamedTuple):
    """What is known about one kind after a round."""

    kind: str
    alone: bool
    failovers: int
    roaming_gap_s: float
    any_gap_s: float
    recovery_s: float


def plan(seed: int, ttl_s: float, kinds: Sequence[Fault]) -> Iterator[list[Planned]]:
    """Rounds without end. Every kind once, then by weight."""
    chance = random.Random(f"pgha-chaos-{seed}")  # noqa: S311  (reproducible is what it has to be)
    bag: list[Fault] = []
    first = True
    while True:
        wanted = chance.choices((1, 2, 3), (60, 30, 10))[0]
        chosen: list[Fault] = []
        while len(chosen) < wanted:
            if not bag:
                bag = [fault for fault in kinds for _ in range(1 if first else fault.weight)]
                chance.shuffle(bag)
                first = False
            fitting = next((f for f in bag if all(together(f, other) for other in chosen)), None)
            if fitting is None:
                break
            bag.remove(fitting)
            chosen.append(fitting)
        spread_s = ttl_s if len(chosen) > 1 else 0.0
        yield [Planned(f.kind, "primary" if chance.random() < PRIMARY_SHARE or f.primary_only else "replica", round(chance.uniform(0, spread_s), 2),
                       round(ttl_s * chance.choice((0.1, 0.5, 1.0, 1.5, f.longest_ttl)) * min(1.0, f.longest_ttl / 1.5), 2), chance.randrange(2**32))
               for f in chosen]


class Violation(Exception):
    """A promise was broken; the text says which."""


class Run:
    """One run on one bed. `say` prints a line, now."""

    def __init__(self, bed: ChaosBed, clients: Clients, kept: Path, *, durable: bool, say: Callable[[str], None]) -> None:
        self.bed = bed
        self.clients = clients
        self.kept = kept
        self.durable = durable
        self.say = say
        self.happened: list[Happened] = []
        self.rows: list[Row] = []
        self.exposed: list[Exposed] = []
        self.verdict = Verdict((), (), (), 0)
        self._last_leader: Host = bed.hosts[0]
        self.recovery_limit_s = RECOVERY_TTLS * bed.profile.ttl + RECOVERY_S

    def round(self, number: int, planned: Sequence[Planned]) -> None:
        """Raises Violation."""
        began = time.monotonic()
        began_us = now_us()
        done = self._faults(began, planned)
        healed = time.monotonic()
        self._note("healed", {})
        while self.bed.after_healing:
            self.bed.after_healing.pop()()
        try:
            self.bed.wait_healthy(self.recovery_limit_s)
            recovery_s = time.monotonic() - healed
            self.clients.wait_for_more(40)
        except BedTimeout as why:
            raise Violation(f"{self.recovery_limit_s:g} s after the last fault had healed: {why}") from None
        self._judge()
        rows = self._rows(done, began_us, recovery_s)
        self.rows += rows
        self.say(f"{number:3}  {' + '.join(f'{h.planned.kind} ({h.what}, {(h.ended_us - h.began_us) / 1e6:.1f} s)' for h in done)}: "
                 f"{rows[0].failovers} failovers, no writes for {rows[0].roaming_gap_s:.1f} s, whole again after {recovery_s:.1f} s")

    def _faults(self, began: float, planned: Sequence[Planned]) -> list[Happened]:
        done: list[Happened] = []
        todo = sorted(planned, key=lambda p: p.at_s)
        going: list[tuple[float, Planned, Host, contextlib.ExitStack, str, int]] = []
        try:
            while todo or going:
                now = time.monotonic()
                while todo and now >= began + todo[0].at_s:
                    going.append(self._begin(todo.pop(0)))
                for each in [g for g in going if now >= g[0]]:
                    going.remove(each)
                    done.append(self._end(each))
                self.bed.supervise()
                time.sleep(_TICK_S)
        finally:
            done += [self._end(each) for each in going]
        self.happened += done
        return done

    def _begin(self, planned: Planned) -> tuple[float, Planned, Host, contextlib.ExitStack, str, int]:
        chance = random.Random(planned.chance)  # noqa: S311
        leader = self.bed.leader()
        if isinstance(leader, Host):
            self._last_leader = leader
        host = self._last_leader if planned.role == "primary" else chance.choice([h for h in self.bed.hosts if h is not self._last_leader])
        stack = contextlib.ExitStack()
        at_us = now_us()
        what = stack.enter_context(FAULTS[planned.kind].make(self.bed, host, chance))
        self._note("begun", {"kind": planned.kind, "role": planned.role, "what": what, "length_s": planned.length_s})
        return time.monotonic() + planned.length_s, planned, host, stack, what, at_us

    def _end(self, going: tuple[float, Planned, Host, contextlib.ExitStack, str, int]) -> Happened:
        _, planned, host, stack, what, began_us = going
        self._note("ends", {"kind": planned.kind, "what": what})
        stack.close()
        ended_us = now_us()
        if FAULTS[planned.kind].exposes and self.bed.device is None:
            self.exposed.append(Exposed(host.name, began_us, ended_us + AGENT_START_S * 1_000_000))
        return Happened(planned, what, began_us, ended_us)

    def _judge(self) -> None:
        leader = self.bed.wait_healthy(self.recovery_limit_s)
        assert isinstance(leader, Host)
        acks = self.clients.acks()  # before the table is read: what is acknowledged later may be missing there
        present = ids(leader)
        self.verdict = judge(acks, present, durable=self.durable, ttl_s=self.bed.profile.ttl, exposed=self.exposed)
        if self.verdict.violations:
            raise Violation("\n".join(self.verdict.violations))
        for host in self.bed.hosts:
            if host is not leader:
                try:
                    self.bed.wait(lambda host=host: present <= ids_or_none(host), _SAME_ROWS_S, f"{host.name} has every row that {leader.name} has")
                except BedTimeout as why:
                    raise Violation(str(why)) from None

    def finish(self) -> None:
        """Once more with nobody writing: all have the same rows, no more and no less."""
        self.clients.stop()
        self._judge()
        leader = self.bed.wait_healthy(self.recovery_limit_s)
        for host in self.bed.hosts:
            try:
                self.bed.wait(lambda host=host: ids_or_none(host) == ids(leader), _SAME_ROWS_S, f"{host.name} has the same rows as {leader.name}")  # type: ignore[arg-type]
            except BedTimeout as why:
                raise Violation(str(why)) from None

    def _rows(self, done: Sequence[Happened], began_us: int, recovery_s: float) -> list[Row]:
        acks = [a for a in self.clients.acks() if a.ack_us >= began_us - 60_000_000]
        failovers = judge([a for a in acks if a.ack_us >= began_us - 1_000_000], set(), durable=False, ttl_s=1e9, exposed=self.exposed).failovers
        roaming = longest_gap([a.ack_us for a in self.clients.acks(ROAMING)], began_us, now_us())
        anybody = longest_gap([a.ack_us for a in acks], began_us, now_us())
        return [Row(h.planned.kind, len(done) == 1, failovers, roaming, anybody, recovery_s) for h in done]

    def _note(self, event: str, facts: dict[str, Any]) -> None:
        line = {"at_us": now_us(), "utc": time.strftime("%H:%M:%S", time.gmtime()), "event": event, **facts}
        with (self.kept / "faults.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        self.explain(event)

    def explain(self, when: str) -> None:
        """What each node decided last, by which rules, on which facts."""
        with (self.kept / "explain.jsonl").open("a", encoding="utf-8") as file:
            for host in self.bed.hosts:
                answer = host.get("/pgha/decision", timeout_s=0.5)
                file.write(json.dumps({"at_us": now_us(), "when": when, "node": host.name, "decision": answer.body if answer else None}) + "\n")

    # -- the end

    def report(self, violation: str) -> list[str]:
        lines = []
        kinds = dict.fromkeys(row.kind for row in self.rows)
        cells = []
        for kind in kinds:
            mine = [row for row in self.rows if row.kind == kind]
            alone = [row for row in mine if row.alone]
            cells.append((kind, str(len(mine)), str(len(alone)), str(sum(r.failovers for r in alone)),
                          *(f"{max(map(value, alone)):.1f}" if alone else f"({max(map(value, mine)):.1f})" for value in
                            (lambda r: r.roaming_gap_s, lambda r: r.any_gap_s, lambda r: r.recovery_s))))
        both = [row for row in self.rows if not row.alone]
        if both:
            cells.append(("(several at a time)", str(len(both)), "", str(self.verdict.failovers - sum(r.failovers for r in self.rows if r.alone)),
                          f"{max(r.roaming_gap_s for r in both):.1f}", f"{max(r.any_gap_s for r in both):.1f}", f"{max(r.recovery_s for r in both):.1f}"))
        lines += table(("Fault", "times", "alone", "failovers", "no writes s", "of anybody s", "whole again s"), cells)
        lines += ["", "Failovers and the longest times are those of rounds with that fault alone (in brackets: only with others so far). No writes: for the client that roams among all nodes;",
                  "of anybody: nobody's row was acknowledged. Whole again: from healing until one primary has every member streaming.", ""]
        for node, seconds, lost in self.verdict.exposures:
            lines.append(f"exposure: agent and guard of {node} killed together, no watchdog device: two writers for {seconds:.2f} s, {lost} of those rows lost")
        if self.bed.device is not None:
            lines.append(f"watchdog devices fired: {len(self.bed.device.fired)}")
        if self.bed.ended:
            lines.append(f"agents that ended by themselves and were started again: {', '.join(f'{n} (exit {c})' for n, c, _ in self.bed.ended)}")
        lines.append(f"{len(self.happened)} faults, {self.verdict.failovers} failovers, {len(self.clients.acks())} rows acknowledged, "
                     f"{len(self.verdict.lost)} lost within the bounds of the mode, {1 if violation else 0} violations")
        if violation:
            lines += ["", f"VIOLATION: {violation}"]
        return lines

    def keep_everything(self) -> None:
        for host in self.bed.hosts:
            (self.kept / host.name).mkdir(exist_ok=True)
            for path in (*host.directory.glob("*.log"), host.config_path, *host.runtime.glob("*.log"), *host.disk.glob("state/*"),
                         *host.data_dir.glob("pg_wal/*.history"), *host.data_dir.glob("*.conf")):
                with contextlib.suppress(OSError):
                    shutil.copy(path, self.kept / host.name)
        for path in (*self.bed.directory.glob("acks-*"), *self.bed.directory.glob("etcd*.log")):
            shutil.copy(path, self.kept)
        (self.kept / "state.txt").write_text(self.bed.describe() + "\n", encoding="utf-8")


def arguments() -> argparse.Namespace:
    options = argparse.ArgumentParser(prog="build/chaos", description="Faults at random on a real cluster; exit code 1 if a promise is broken.")
    options.add_argument("--minutes", type=float, default=10)
    options.add_argument("--seed", type=int, default=1)
    options.add_argument("--ttl", type=int, choices=(5, 30), default=5, help="5: loop_wait 1, retry_timeout 1; 30: the defaults, 10 and 10")
    options.add_argument("--mode", default="async", help=f"of {', '.join(MODES)}; several with commas")
    options.add_argument("--watchdog", action="store_true", help="each node has a simulated watchdog device, which is required")
    options.add_argument("--only", metavar="TEXT", action="append", help="only kinds that contain this (again for more)")
    options.add_argument("--sources", action="store_true", help="agents from the sources instead of dist/pgha.pyz")
    options.add_argument("--list", action="store_true", help="the kinds of faults, and end")
    options.add_argument("--plan", type=int, metavar="N", help="the first N rounds of this seed, and end")
    return options.parse_args()


def main() -> int:
    given = arguments()
    words = given.mode.split(",")
    if set(words) - MODES.keys():
        print(f"build/chaos: --mode is of {', '.join(MODES)}", file=sys.stderr)
        return 2
    kinds = [f for f in FAULTS.values() if not given.only or any(text in f.kind for text in given.only)]
    profile = FAST if given.ttl == 5 else DEFAULT
    if given.list:
        print("\n".join(f.kind for f in FAULTS.values()))
        return 0
    rounds = plan(given.seed, profile.ttl, kinds)
    if given.plan:
        for number in range(given.plan):
            print(number + 1, *next(rounds), sep="\n    ")
        return 0
    if missing := why_not():
        print(f"build/chaos: skipped: {missing}")
        return 0
    for number in (signal.SIGINT, signal.SIGTERM):  # a shell's background job ignores the first
        signal.signal(number, signal.default_int_handler)
    tag = f"{given.seed}-{os.getpid()}"
    kept = ROOT / "var/chaos" / f"{time.strftime('%m%d-%H%M%S', time.gmtime())}-seed{given.seed}-ttl{given.ttl}-{'-'.join(words)}"
    kept.mkdir(parents=True)
    dynamic = {key: value for word in words for key, value in MODES[word].items()}
    with Reaper(), chaos_bed(tag, sources=given.sources, profile=profile, dynamic=dynamic, watchdog=given.watchdog, clocks=True) as bed:
        return run(bed, given, rounds, kept, durable=bool(DURABLE & set(words)), profile=profile)


def run(bed: ChaosBed, given: argparse.Namespace, rounds: Iterator[list[Planned]], kept: Path, *, durable: bool, profile: Profile) -> int:
    def say(line: str) -> None:
        print(line, flush=True)
        with (kept / "report.txt").open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    say(f"build/chaos --minutes {given.minutes:g} --seed {given.seed} --ttl {given.ttl} --mode {given.mode}"
        f"{' --watchdog' if given.watchdog else ''}{''.join(f' --only {text!r}' for text in given.only or ())}    # {kept}")
    bed.start()
    violation, interrupted = "", False
    chance = random.Random(given.seed)  # noqa: S311
    with Clients(bed) as clients:
        this = Run(bed, clients, kept, durable=durable, say=say)
        end = time.monotonic() + given.minutes * 60
        number = 0
        try:
            while time.monotonic() < end:
                number += 1
                this.round(number, next(rounds))
                time.sleep(chance.uniform(*_QUIET_S))  # faults that end and begin at once would be one
            this.finish()
        except Violation as broken:
            violation = str(broken)
        except KeyboardInterrupt:
            interrupted = True
            say("interrupted")
        finally:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            this.explain("the end")
            this.keep_everything()
        say("")
        for line in this.report(violation):
            say(line)
    return 1 if violation else _INTERRUPTED if interrupted else 0


if __name__ == "__main__":
    sys.exit(main())
