"""The command `build/simulate`.

    build/simulate --seed N [--trace] [--nodes N --ttl N --faults N]   one run; its transcript, or its outcome
    build/simulate --hours N [--level a|b] [--jobs N] [--from-seed N]  runs until so many cluster-hours are done
    build/simulate --seconds N                                         runs for so long (the test command's budget)
    build/simulate --seed N --minimise                                 the shortest program that still fails the same way
    build/simulate --explain [--level a|b] [--seconds N | --seed N]     forecasts of `explain --if` against what then happens
    build/simulate --replay FILE … [--trace|--minimise]                kept programs (tests/simulation/regressions/*.json)

A failure prints seed, options, the last lines of the transcript, and the command that replays it. Exit code 1 then.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any

import msgspec

from tests.simulation import coverage
from tests.simulation.corners import CORNERS
from tests.simulation.faults import Step
from tests.simulation.simulation import DRAWS, Options, Outcome, run

REGRESSIONS = Path(__file__).parent / "regressions"
LAST_LINES = 60
#: A cluster-hour counts only with so many faults in it.
FAULTS_AN_HOUR = 30
PROGRESS_EVERY_S = 300.0


class Kept(msgspec.Struct, frozen=True, kw_only=True):
    """A program that failed once, as it lies in regressions/."""

    why: str
    options: Options


def run_level(options: Options, *, out: Any = None) -> Outcome:
    try:
        if options.level == "b":
            from tests.simulation import level_b

            outcome: Outcome = level_b.run(options, out=out)
            return outcome
        return run(options, out=out)
    except Exception as error:
        error.add_note(f"the world itself failed; replay: {command_of(options)}")
        raise


class Volume:
    """What was done, over all runs."""

    def __init__(self) -> None:
        self.runs = self.passes = self.faults = self.role_changes = self.acknowledged = self.exposures = self.losses = self.events = 0
        self.hours = 0.0
        self.longest_settle_s = 0.0
        self.coverage: dict[tuple[str, str], int] = {}
        self.seed_of: dict[tuple[str, str], int] = {}       # the first that reached it, by random programs
        self.began_s = time.monotonic()

    def add(self, outcome: Outcome, *, drawn: bool = True) -> None:
        self.runs += 1
        self.passes += outcome.passes
        self.faults += outcome.faults
        self.role_changes += outcome.role_changes
        self.acknowledged += outcome.acknowledged
        self.exposures += len(outcome.exposures)
        self.losses += outcome.losses
        self.events += outcome.events
        self.longest_settle_s = max(self.longest_settle_s, outcome.settled_s)
        hours = outcome.virtual_s / 3600
        self.hours += min(hours, outcome.faults / FAULTS_AN_HOUR)
        for key, number in outcome.coverage.items():
            self.coverage[key] = self.coverage.get(key, 0) + number
            if drawn:
                self.seed_of.setdefault(key, outcome.options.seed)

    def report(self, level: str, jobs: int) -> str:
        took_s = max(0.001, time.monotonic() - self.began_s)
        return (f"level {level}: {self.runs} runs, {self.hours:.1f} cluster-hours (of at least {FAULTS_AN_HOUR} faults each), {self.faults} faults, "
                f"{self.role_changes} role changes, {self.passes} passes, {self.acknowledged} commits acknowledged, {self.losses} asynchronous losses within bounds, "
                f"{self.exposures} exposures, longest way back {self.longest_settle_s:.0f} s; {took_s:.0f} s with {jobs} "
                f"{'job' if jobs == 1 else 'jobs'}, {self.hours / took_s * 60:.1f} cluster-hours a minute")


def command_of(options: Options) -> str:
    extra = "".join(f" --{k} {getattr(options, k)}" for k in ("nodes", "ttl", "patronis") if getattr(options, k))
    return f"build/simulate --seed {options.seed} --level {options.level} --faults {options.faults} --for {options.for_s:g}{extra} --trace"


def failure(outcome: Outcome, *, path: Path | None = None) -> str:
    """`path`: of the kept program, which no seed draws again."""
    first = outcome.violations[0]
    command = command_of(outcome.options) if path is None else f"build/simulate --replay {path} --trace"
    lines = "\n".join(f"  {line}" for line in outcome.last_lines[-LAST_LINES:])
    return (f"\nVIOLATION of {first.checker} at {first.at_s:.3f} s: {first.text}\n\nseed {outcome.options.seed}, {outcome.options}\n\n{lines}\n\n"
            f"replay: {command}\nshrink: {command.replace(' --trace', ' --minimise')}\n")


def many(options: Options, *, hours: float | None, seconds: float | None, jobs: int, from_seed: int, keep_going: bool, until_s: float | None = None) -> tuple[Volume, list[Outcome]]:
    """Seed after seed, until the volume or the time is done, or something fails."""
    volume, failed = Volume(), []
    said_s = volume.began_s

    def progress() -> None:
        nonlocal said_s
        if time.monotonic() - said_s >= PROGRESS_EVERY_S:
            said_s = time.monotonic()
            print(volume.report(options.level, jobs), file=sys.stderr, flush=True)

    def enough() -> bool:
        took_s = time.monotonic() - volume.began_s
        return (hours is not None and volume.hours >= hours) or (seconds is not None and took_s >= seconds) or (bool(failed) and not keep_going)

    def seeds() -> Iterator[Options]:
        seed = from_seed
        while True:
            yield msgspec.structs.replace(options, seed=seed)
            seed += 1

    source = seeds()
    if jobs == 1:
        while not enough():
            now = next(source)
            try:
                outcome = run_level(now)
            except Exception:
                print(f"seed {now.seed} breaks the simulation itself", flush=True)
                raise
            volume.add(outcome)
            progress()
            if outcome.violations:
                failed.append(outcome)
                print(f"seed {outcome.options.seed}: {outcome.violations[0].checker}: {outcome.violations[0].text.splitlines()[0]}", flush=True)
        return volume, failed
    with ProcessPoolExecutor(jobs) as pool:
        running: set[Future[Outcome]] = {pool.submit(run_level, next(source)) for _ in range(jobs * 2)}
        while running:
            done, running = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                outcome = future.result()
                volume.add(outcome)
                progress()
                if outcome.violations:
                    failed.append(outcome)
                    print(f"seed {outcome.options.seed}: {outcome.violations[0].checker}: {outcome.violations[0].text.splitlines()[0]}", flush=True)
                if not enough():
                    running.add(pool.submit(run_level, next(source)))
    return volume, failed


def minimise(options: Options) -> tuple[Options, Outcome]:
    """Take steps out for as long as the same checker still fires; then shorten what is left."""
    outcome = run_level(options)
    assert outcome.violations, "this seed does not fail"
    checker = outcome.violations[0].checker
    program = [s for s in outcome.program if s.at_s <= outcome.violations[0].at_s]
    best = outcome

    def fails(candidate: list[Step]) -> bool:
        nonlocal best
        tried = run_level(msgspec.structs.replace(options, program=tuple(candidate)))
        if tried.violations and tried.violations[0].checker == checker:
            best = tried
            return True
        return False

    if not fails(program):      # everything is healed when the program ends: then it needs what came later
        program = list(outcome.program)
    size = max(1, len(program) // 2)
    while size:
        at = 0
        while at < len(program):
            shorter = program[:at] + program[at + size:]
            if fails(shorter):
                program = shorter
            else:
                at += size
        size //= 2
    for index, step in enumerate(program):
        for factor in (0.25, 0.5):
            if step.for_s:
                tried = [*program[:index], msgspec.structs.replace(step, for_s=round(step.for_s * factor, 2)), *program[index + 1:]]
                if fails(tried):
                    program = tried
                    break
    return msgspec.structs.replace(options, program=tuple(program)), best


def shortest_of(options: Options) -> str:
    """As it is kept in regressions/."""
    shortest, outcome = minimise(options)
    return msgspec.json.format(msgspec.json.encode(Kept(why=outcome.violations[0].text.splitlines()[0], options=shortest)), indent=1).decode()


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="build/simulate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--level", choices=("a", "b"), default="a")
    parser.add_argument("--trace", action="store_true")
    parser.add_argument("--minimise", action="store_true")
    parser.add_argument("--nodes", type=int, default=0)
    parser.add_argument("--ttl", type=int, default=0)
    parser.add_argument("--patronis", type=int, default=0, help="so many nodes are Patroni members (level a)")
    parser.add_argument("--faults", type=int, default=20)
    parser.add_argument("--for", type=float, default=1500.0, dest="for_s", metavar="SECONDS")
    parser.add_argument("--hours", type=float)
    parser.add_argument("--seconds", type=float)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--from-seed", type=int, default=1)
    parser.add_argument("--keep-going", action="store_true", help="do not stop at the first failure")
    parser.add_argument("--coverage", action="store_true", help="show which (rule, outcome) pairs were reached")
    parser.add_argument("--replay", nargs="+", type=Path)
    parser.add_argument("--explain", action="store_true", help="ask `explain --if` at a random instant, and see whether it comes true")
    given = parser.parse_args(argv)
    if given.explain:
        from tests.foresee import foretold

        seeds = itertools.count(given.from_seed) if given.seed is None else (given.seed,)
        return foretold.main(seeds, seconds=(given.seconds or 60.0) if given.seed is None else None, level=given.level, trace=sys.stdout if given.trace else None)
    options = Options(seed=given.seed or 0, level=given.level, nodes=given.nodes, ttl=given.ttl, patronis=given.patronis, faults=given.faults, for_s=given.for_s, draws=DRAWS)
    if given.replay:
        bad = 0
        for path in given.replay:
            kept = msgspec.json.decode(path.read_bytes(), type=Kept)
            if given.minimise:
                print(shortest_of(kept.options))
                return 1
            outcome = run_level(kept.options, out=sys.stdout if given.trace else None)
            print(failure(outcome, path=path) if outcome.violations else f"{path.name}: clean")
            bad += bool(outcome.violations)
        return int(bool(bad))
    if given.seed is not None and given.minimise:
        print(shortest_of(options))
        return 1
    if given.seed is not None:
        outcome = run_level(options, out=sys.stdout if given.trace else None)
        if outcome.violations:
            print(failure(outcome), file=sys.stderr if given.trace else sys.stdout)
        elif not given.trace:
            volume = Volume()
            volume.add(outcome)
            print(volume.report(given.level, 1))
            print(f"clean; sha256 of the transcript {outcome.digest}")
        return int(bool(outcome.violations))
    volume, failed = many(options, hours=given.hours, seconds=given.seconds if given.seconds or given.hours else 60.0, jobs=given.jobs, from_seed=given.from_seed,
                          keep_going=given.keep_going)
    if given.coverage:
        for corner in CORNERS.values() if given.level == "a" else ():
            volume.add(run_level(corner), drawn=False)
        print(coverage.table(volume.coverage, volume.seed_of))
    print(volume.report(given.level, given.jobs))
    for outcome in failed[:3]:
        print(failure(outcome))
    print("clean" if not failed else f"{len(failed)} of {volume.runs} runs failed: seeds {', '.join(str(o.options.seed) for o in failed[:40])}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
