"""The kill recipe on real servers, and on what must survive it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from guard_world import AS_POSTGRES, ROOT, Node, Writer, reap, until

from pgha.lock import recipe
from pgha.lock.recipe import Belongs, DataDirectory

pytestmark = pytest.mark.postgres


def test_finds_the_postmaster_and_its_children(node: Node):
    pid = node.start()
    found = node.processes()
    assert [p.pid for p in recipe.postmasters_of(found)] == [pid]
    assert {p.comm for p in found} == {"postgres"}
    assert {p.ppid for p in found if p.pid != pid} == {pid}
    assert {p.pid for p in recipe.children_of(pid)} == {p.pid for p in found} - {pid}
    assert recipe.processes_of(node.base) == []  # its parent directory is another


def test_kills_everything_under_load(node: Node):
    node.start()
    writers = [Writer(node) for _ in range(4)]
    report = recipe.kill_all(node.data)
    assert len(report.killed) >= 4 + 4
    assert not report.denied
    assert report.took_s < 0.25  # the fence budget; 1 to 20 ms when the machine is quiet
    assert recipe.wait_gone(report, 5) == ()
    assert node.processes() == []
    for writer in writers:
        writer.join()


def test_kills_a_stopped_postmaster_whose_backends_go_on(node: Node):
    pid = node.start()
    writer = Writer(node)
    os.kill(pid, signal.SIGSTOP)
    before = writer.acknowledged
    until(lambda: writer.acknowledged > before + 20, 5, "a stopped postmaster stops nobody")
    recipe.wait_gone(recipe.kill_all(node.data), 5)
    assert node.processes() == []
    writer.join()


def test_the_known_postmaster_goes_first_and_its_tree_with_it(node: Node):
    (postmaster,) = recipe.postmasters_of([recipe.read_proc(node.start())])
    directory = DataDirectory(node.data)
    directory._identities = ()  # nothing is known of the directory: only parentage finds them
    report = recipe.kill_all(directory, known=(postmaster,))
    assert len(report.killed) > 4
    recipe.wait_gone(report, 5)
    assert node.processes() == []


def test_orphans_are_found_by_their_directory(node: Node):
    pid = node.start()
    node.sql("create table t (n int)")
    node.sql("create procedure p() language plpgsql as $$ begin loop insert into t values (1); commit; end loop; end $$")
    client = subprocess.Popen(["psql", "-h", node.base, "-U", "postgres", "-qc", "call p()"], stderr=subprocess.DEVNULL)
    until(lambda: node.sql("select count(*) > 100 from t")[0][0], 5, "the procedure commits")
    dead = recipe.read_proc(pid)
    os.kill(pid, signal.SIGKILL)
    node.server.wait(5)
    time.sleep(0.3)  # long enough for all who notice their postmaster's death to be gone
    left = node.processes()
    assert left, "a backend that is busy does not notice: without this the test shows nothing"
    assert dead.key not in {p.key for p in left}
    report = recipe.kill_orphans(node.data, seen_ticks=recipe.ticks_now())
    assert {p.pid for p in report.killed} >= {p.pid for p in left}
    assert recipe.wait_gone(report, 5) == ()
    assert client.wait(5) != 0


def test_a_successor_is_no_orphan(node: Node):
    node.start()
    report = recipe.kill_orphans(node.data, seen_ticks=recipe.ticks_now() + 1)
    assert report.killed == ()  # it has children, so it is a postmaster, and they have a parent
    assert node.sql("select 1") == [(1,)]


def test_what_named_itself_postmaster_or_came_later_is_no_orphan(base: Path, stand_in):
    now = recipe.ticks_now()
    named = stand_in("postgres", base)
    assert recipe.kill_orphans(base, seen_ticks=recipe.ticks_now(), keep=frozenset({named.pid})).killed == ()
    assert recipe.kill_orphans(base, seen_ticks=now - 1).killed == ()
    assert named.poll() is None
    assert [p.pid for p in recipe.kill_orphans(base, seen_ticks=recipe.ticks_now()).killed] == [named.pid]


def test_spares_the_shell_that_stands_there_and_the_stranger_of_the_same_name(base: Path, stand_in):
    data, other = base / "data", base / "other"
    data.mkdir()
    other.mkdir()
    ours = stand_in("postgres", data)
    through_link = stand_in("postmaster", data)
    shell = stand_in("bash", data)
    stranger = stand_in("postgres", other)
    below = data / "base"
    below.mkdir()
    deeper = stand_in("postgres", below)
    report = recipe.kill_all(data)
    assert {p.pid for p in report.killed} == {ours.pid, through_link.pid}
    assert ours.wait(5) == -signal.SIGKILL
    assert [p.poll() for p in (shell, stranger, deeper)] == [None, None, None]


def test_a_zombie_is_dead(base: Path, stand_in):
    process = stand_in("postgres", base)
    process.kill()
    until(lambda: recipe.read_proc(process.pid).state == "Z", 5)  # not reaped: we have not waited
    assert recipe.processes_of(base) == []
    assert not recipe.alive(recipe.read_proc(process.pid))
    assert recipe.kill_all(base).killed == ()


def test_a_recycled_pid_is_not_signalled(base: Path, stand_in):
    process = stand_in("postgres", base)
    real = recipe.read_proc(process.pid)
    former = real._replace(start_ticks=real.start_ticks - 1)
    assert recipe.send(former, signal.SIGKILL) is True  # as good as done: that one is gone
    assert not recipe.alive(former)
    assert recipe.open_pidfd(former) is None
    directory = DataDirectory(base, identities=())
    assert recipe.kill_all(directory, known=(former,)).killed == ()
    assert process.poll() is None


def test_follows_the_directory_and_not_its_name(base: Path, stand_in):
    data = base / "data"
    data.mkdir()
    directory = DataDirectory(data)
    former = stand_in("postgres", data)
    data.rename(base / "data.failed.1")
    data.mkdir()
    assert directory.refresh()
    current = stand_in("postgres", data)
    assert len(directory.identities) == 2
    assert {p.pid for p in recipe.processes_of(directory)} == {former.pid, current.pid}
    recipe.wait_gone(recipe.kill_all(directory), 5)
    (base / "data.failed.1").rename(base / "gone")
    data.rename(base / "data.failed.2")
    data.mkdir()
    directory.refresh()
    assert len(directory.identities) == 1  # nobody lives in the former ones: they are forgotten


def test_a_missing_directory_holds_nobody(base: Path):
    directory = DataDirectory(base / "nowhere")
    assert directory.identities == ()
    assert not directory.refresh()
    assert directory.holds(os.getpid()) is Belongs.NO
    assert recipe.processes_of(directory) == []


def test_an_unreadable_directory_is_reported_and_left_alone(base: Path, stand_in):
    """Run as postgres: root reads every link."""
    process = stand_in("postgres", base, undumpable=True)
    out = subprocess.run(
        [sys.executable, "-c", (f"import sys; sys.path.insert(0, {str(ROOT)!r}); from pgha.lock import recipe; "
         f"r = recipe.kill_all({str(base)!r}); print([p.pid for p in r.killed], [p.pid for p in r.unreadable])")],
        capture_output=True, text=True, check=True, cwd="/", **AS_POSTGRES)
    assert out.stdout.split() == ["[]", f"[{process.pid}]"]
    assert process.poll() is None


def test_says_whom_it_may_not_kill(base: Path, stand_in):
    root = subprocess.Popen([sys.executable, "-IS", "-c", ("import ctypes, time; ctypes.CDLL(None).prctl(15, b'postgres'); "
                             "print('x', flush=True); time.sleep(60)")], cwd=base, stdout=subprocess.PIPE)
    try:
        root.stdout.readline()
        out = subprocess.run(
            [sys.executable, "-c", (f"import sys; sys.path.insert(0, {str(ROOT)!r}); from pgha.lock import recipe; "
             f"r = recipe.kill_all({str(base)!r}, known=(recipe.read_proc({root.pid}),)); "
             "print([p.pid for p in r.denied], [p.pid for p in r.killed])")],
            capture_output=True, text=True, check=True, cwd="/", **AS_POSTGRES)
        assert out.stdout.split() == [f"[{root.pid}]", "[]"]
    finally:
        root.kill()
        root.wait()
        root.stdout.close()


def test_signals_the_postmaster_alone(node: Node):
    pid = node.start()
    assert recipe.signal_postmaster(node.data, signal.SIGINT) == (pid,)
    assert node.server.wait(5) == 0
    assert recipe.signal_postmaster(node.data, signal.SIGINT) == ()


def test_a_cgroup_is_killed_as_a_whole(base: Path, stand_in):
    mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    root = next((Path(m[1]) for m in mounts if m[2] == "cgroup2"), None)
    group = root / f"pgha-test-{os.getpid()}" if root else None
    try:
        group.mkdir()
    except (OSError, AttributeError):
        pytest.skip("no cgroup v2 that this user may write to")
    try:
        process = stand_in("whatever", base)
        (group / "cgroup.procs").write_text(str(process.pid))
        assert recipe.kill_cgroup(str(group))
        assert process.wait(5) == -signal.SIGKILL
    finally:
        until(lambda: "populated 0" in (group / "cgroup.events").read_text(), 5)
        group.rmdir()


def test_a_cgroup_that_cannot_be_killed_is_no_obstacle(base: Path, stand_in):
    process = stand_in("postgres", base)
    assert [p.pid for p in recipe.kill_all(base, cgroup="/nowhere").killed] == [process.pid]
    reap()
