"""The operator's programs, real ones: what they get to see, what becomes of their words, and how they are ended."""

from __future__ import annotations

import logging
import os
import resource
import select
import signal
import subprocess
from pathlib import Path

import pytest
import trio

from pgha.act.scripts import LONGEST_LINE, MOST_LINES, run_script
from pgha.postgres import programs


def script(text, *, limit_s=10.0, **more):
    async def main():
        return await run_script("on_start", ["/bin/sh", "-c", text, "sh", "on_start", "primary", "demo"], run=programs.run, limit_s=limit_s, **more)
    return trio.run(main)


def said(caplog):
    return [record.facts["line"] for record in caplog.records if record.getMessage() == "script says"]


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def dies(pid):
    """A signal is sent before its target is dies: the kernel takes its moment on a busy machine."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([pidfd], [], [], 5.0)[0])
    finally:
        os.close(pidfd)


def children():
    """Of this process, the dead that nobody has reaped among them."""
    return {int(pid) for path in Path("/proc/self/task").glob("*/children") for pid in path.read_text().split()}


@pytest.fixture(autouse=True)
def _logs(caplog):
    caplog.set_level(logging.INFO, "pgha")


def test_its_words_are_in_the_log_line_by_line(caplog):
    ended = script('echo "$1 $2 $3"; printf "no end" >&2; exit 3')
    assert (ended.exit_code, ended.ok) == (3, False)
    assert set(said(caplog)) == {"on_start primary demo", "no end"}
    assert str(ended) in ("exit code 3: no end", "exit code 3: on_start primary demo")


def test_a_secret_that_it_says_is_not_logged(caplog):
    script("echo connecting to postgres://rep:hush-hush@db/x")
    from pgha.log import PlainFormatter
    assert "hush-hush" not in "".join(PlainFormatter().format(record) for record in caplog.records)


def test_endless_words_are_bounded(caplog):
    ended = script(f"i=0; while [ $i -lt {MOST_LINES * 3} ]; do echo line $i; i=$((i+1)); done; head -c 1000000 /dev/zero | tr '\\0' x; echo; echo the last")
    assert len(said(caplog)) == MOST_LINES
    assert max(map(len, said(caplog))) <= LONGEST_LINE + 1
    assert "script said more than is logged" in caplog.text
    assert ended.ok and ended.last_line == "the last"


def test_its_environment_has_nothing_of_ours(caplog, monkeypatch):
    for name in ("PGHA_SUPERUSER_PASSWORD", "PATRONI_SUPERUSER_PASSWORD", "NOTIFY_SOCKET", "WATCHDOG_USEC", "PGPASSWORD"):
        monkeypatch.setenv(name, "hush-hush")
    monkeypatch.setenv("OF_THE_OPERATOR", "yes")
    script('env; [ "$OF_THE_OPERATOR" = yes ] || exit 1; if read line; then echo "there is input"; fi')
    assert not [line for line in said(caplog) if "hush-hush" in line or "input" in line]
    assert "OF_THE_OPERATOR=yes" in said(caplog)


@pytest.mark.parametrize("deaf", [False, True])
def test_at_its_limit_the_whole_group_is_ended(caplog, deaf):
    ended = script(f"{'trap : TERM; ' if deaf else ''}sleep 1000 & echo $!; echo $$; while :; do wait; sleep 0.1; done", limit_s=1.0)     # time enough to begin
    assert ended.exit_code is None and "had not ended after 1 s" in str(ended)
    assert ended.took_s >= 1.0 + (programs.GRACE_S if deaf else 0.0)
    pids = [int(line) for line in said(caplog) if line.isdigit()]
    assert len(pids) == 2 and all(map(dies, pids))


def test_a_program_that_cannot_be_begun_for_whatever_reason_is_not_waited_for():
    async def main():
        with pytest.raises(ValueError, match="null byte"):
            await programs.run(["/bin/echo", "a\0b"], deadline_s=30)
    trio.run(main)


def test_its_end_is_seen_without_a_descriptor_to_see_it_by():
    """Others have taken the last one meanwhile: neither is it left as it is, nor does anything else end."""
    async def main():
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        with subprocess.Popen(["/bin/sleep", "0.2"]) as child:
            resource.setrlimit(resource.RLIMIT_NOFILE, (0, limits[1]))
            try:
                with trio.fail_after(20):
                    await programs._exited(child.pid)
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, limits)
            assert child.wait(0) == 0
    trio.run(main)


@pytest.mark.parametrize("spare", [0, 4, 7])
def test_without_descriptors_it_has_failed_or_ended_but_nothing_else_does(spare):
    """However many are left when it is begun: it is an answer, and no child stays."""
    answers, before = [], children()

    async def main():
        _, hard = limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        await trio.to_thread.run_sync(int)      # trio has what it needs for a thread
        resource.setrlimit(resource.RLIMIT_NOFILE, (1 + max(int(name) for name in os.listdir("/proc/self/fd")) + spare, hard))
        try:
            with trio.fail_after(20):
                answers.append(await run_script("test", ["/bin/sh", "-c", "exit 7"], run=programs.run, limit_s=5))
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    trio.run(main)
    assert answers[0].exit_code == 7 or "descriptors" in str(answers[0]) or "Too many open files" in str(answers[0])
    assert children() <= before


def test_it_may_clear_up_and_say_so_when_it_is_ended(caplog):
    ended = script('trap "echo clearing up; exit 0" TERM; sleep 1000 & wait', limit_s=1.0)     # time enough to begin
    assert ended.last_line == "clearing up" and "had not ended" in str(ended)


def test_who_takes_its_output_along_holds_nobody_up(caplog):
    ended = script("echo $$; setsid sleep 1000 & echo $!; exit 4", limit_s=30)
    try:
        assert ended.exit_code == 4 and ended.took_s < 30
    finally:
        os.kill(int(said(caplog)[-1]), signal.SIGKILL)


def test_what_it_leaves_in_the_background_goes_on_if_it_is_spared(caplog):
    ended = script("sleep 1000 & echo $!", spare_background=True)
    pid = int(said(caplog)[0])
    try:
        assert ended.ok and ended.took_s < 30 and alive(pid)
    finally:
        os.kill(pid, signal.SIGKILL)
    caplog.clear()
    ended = script("sleep 1000 & echo $!")
    assert ended.ok and dies(int(said(caplog)[0]))


def test_one_that_is_not_there():
    async def main():
        return await run_script("on_stop", ["/no/such/program"], run=programs.run, limit_s=1)
    ended = trio.run(main)
    assert ended.exit_code is None and "cannot start /no/such/program" in str(ended)


def test_killed_by_somebody():
    assert str(script("kill -9 $$")) == "killed by signal 9"
