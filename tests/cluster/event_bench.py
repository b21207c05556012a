"""The figures of build/bench-events. Nothing is asserted: on a shared machine they say how busy it is, too."""

from __future__ import annotations

import os
import resource
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2])]

from event_readers import Crowd  # noqa: E402  (after the path)
from installed import USER, install  # noqa: E402  (after the path)

from pgha.demo.bed import Bed  # noqa: E402  (after the path)
from pgha.demo.node import FAST, Node  # noqa: E402  (after the path)
from pgha.demo.processes import Reaper  # noqa: E402  (after the path)
from pgha.demo.programs import find_etcd, find_postgres  # noqa: E402  (after the path)

#: how many, and whether something happens
PARTS = ((0, False), (0, True), (100, True), (1000, True))
_CHANGE_EVERY_S = 0.1
_TICK_S = 1 / os.sysconf("SC_CLK_TCK")


def used_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) * _TICK_S


def rss_mb(pid: int) -> float:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * resource.getpagesize() / 1e6


@contextmanager
def renewals(bed: Bed) -> Iterator[list[float]]:
    """When the lock record was seen to change."""
    end, seen = threading.Event(), []

    def look() -> None:
        last = None
        while not end.wait(0.01):
            value = bed.etcd.value(bed.key("pgha/lock"))
            if value and value != last:
                last = value
                seen.append(time.monotonic())

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield seen
    finally:
        end.set()
        thread.join()


@contextmanager
def changes(leader: Node) -> Iterator[None]:
    """Something happens all the while."""
    end = threading.Event()

    def change() -> None:
        number = 0
        while not end.wait(_CHANGE_EVERY_S):
            number += 1
            leader.request("PATCH", "/config", {"maximum_lag_on_failover": 1048576 + number % 2})

    thread = threading.Thread(target=change, daemon=True)
    thread.start()
    try:
        yield
    finally:
        end.set()
        thread.join()


def measure(bed: Bed, leader: Node, followers: int, for_s: float, *, busy: bool) -> list[Any]:
    assert leader.agent is not None
    pid = leader.agent.pid
    with Crowd(leader.address, leader.rest_port, followers) as crowd, changes(leader) if busy else nullcontext(), renewals(bed) as renewed:
        cpu_s, took_ms = used_s(pid), []
        until_s = time.monotonic() + for_s
        while time.monotonic() < until_s:
            began = time.monotonic()
            answer = leader.get("/primary")
            took_ms.append(1000 * (time.monotonic() - began) if answer is not None and answer.status == 200 else float("inf"))
            time.sleep(0.002)
        took_ms.sort()
        gaps = [b - a for a, b in zip(renewed, renewed[1:], strict=False)]
        return [crowd.served, len(took_ms), took_ms[len(took_ms) // 2], took_ms[len(took_ms) * 99 // 100], took_ms[-1], len(renewed), max(gaps, default=0.0),
                100 * (used_s(pid) - cpu_s) / for_s, rss_mb(pid)]


def main(for_s: float) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 16384), hard))
    directory = Path(tempfile.mkdtemp(prefix="pgha-bench-", dir="/dev/shm"))
    directory.chmod(0o755)
    try:
        with Reaper(), Bed(directory / "bed", install(directory / "program"), etcd_program=find_etcd(), bin_dir=find_postgres(), user=USER, profile=FAST) as bed:
            for node in bed.nodes:
                node.configuration = _with_readers(node.configuration)  # type: ignore[method-assign]
            bed.start()
            leader = bed.wait_healthy(90)
            time.sleep(25)      # the agent has settled and given memory back
            print("       followers  /primary asked  median ms   99 % ms  longest ms  renewals  longest gap s  agent's CPU %  RSS MB")
            for followers, busy in PARTS:
                row = ["busy" if busy else "quiet", *measure(bed, leader, followers, for_s, busy=busy)]
                print("{:5}  {:9d}  {:14d}  {:9.2f}  {:8.2f}  {:10.1f}  {:8d}  {:13.2f}  {:13.1f}  {:6.1f}".format(*row), flush=True)
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _with_readers(configuration: Any) -> Any:
    def changed() -> dict[str, Any]:
        given: dict[str, Any] = configuration()
        return {**given, "pgha": {**given["pgha"], "event_readers": max(many for many, _ in PARTS)}}

    return changed


if __name__ == "__main__":
    main(float(sys.argv[1]) if len(sys.argv) > 1 else 10.0)
