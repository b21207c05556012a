"""The guard process beside a real PostgreSQL: nobody commits after the deadline, whatever has become of the agent."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psycopg
import pytest
from guard_world import AS_POSTGRES, CLOCK, ROOT, GuardProcess, Node, Writer, late_s, own, postgres_bin, until

from pgha.clock import Instant, remaining_s
from pgha.lock import recipe
from pgha.lock.guard import main
from pgha.lock.protocol import MAX_BYTES
from pgha.model.lock import fence_budget_s

pytestmark = pytest.mark.postgres

#: No commit may be acknowledged later than this after fence_at: then the licence itself ends.
BUDGET_S = fence_budget_s(5)


def gone(node: Node):
    return lambda: node.processes() == []


def control(node: Node, *command: str) -> None:
    subprocess.run([postgres_bin() / "pg_ctl", "-D", node.data, *command], check=True, stdout=subprocess.DEVNULL,
                   cwd="/", **AS_POSTGRES)


# --- the deadline ------------------------------------------------------------------------------------------------


def test_a_primary_whose_agent_is_frozen_is_shut_down_in_time(node: Node, guard: GuardProcess):
    guard.start()
    guard.arm(5)
    node.start()
    writer = Writer(node)
    fence_at = guard.arm(1.2, sequence=2)
    last = writer.join()
    assert late_s(fence_at, last) < 0, "SIGINT half a second before ends the clients first"
    assert node.server.wait(5) == 0, "an orderly shutdown"
    until(lambda: guard.state == "latched", 3)
    assert "signal=SIGINT" in guard.log.read_text()


def test_a_stopped_postmaster_is_killed_at_the_deadline(node: Node, guard: GuardProcess):
    """SIGINT and SIGQUIT wait for ever in a stopped process; its backends go on until the recipe ends them."""
    guard.start()
    guard.arm(5)
    postmaster = node.start()
    writers = [Writer(node) for _ in range(3)]
    os.kill(postmaster, signal.SIGSTOP)
    fence_at = guard.arm(1.0, sequence=2)
    late = [late_s(fence_at, w.join()) for w in writers]
    assert max(late) < BUDGET_S
    assert max(late) > -0.3, "they wrote until the deadline: otherwise this shows nothing"
    until(gone(node), 2)
    assert guard.state == "latched"


def test_renewals_move_the_deadline(node: Node, guard: GuardProcess):
    guard.start()
    guard.arm(5)
    node.start()
    writer = Writer(node)
    for sequence in range(2, 12):
        guard.arm(0.8, sequence=sequence)
        time.sleep(0.1)
    before = writer.acknowledged
    until(lambda: writer.acknowledged > before, 1, "nobody was disturbed")
    assert guard.state == "armed"
    writer.stop()


def test_narrowing_holds_against_a_repeated_arm(node: Node, guard: GuardProcess):
    guard.start()
    guard.arm(30, sequence=5)
    node.start()
    near = CLOCK.now().plus_s(0.8)
    assert guard.ask(op="narrow", sequence=6, fence_at=near)["fence_at"] == list(near)
    for sequence in (5, 6):
        answer = guard.ask(op="arm", sequence=sequence, fence_at=CLOCK.now().plus_s(30))
        assert answer["fence_at"] == list(near), answer
    until(lambda: guard.state == "latched", 3)
    until(gone(node), 2)


def test_fence_now_has_sent_its_signals_when_it_answers(node: Node, guard: GuardProcess):
    guard.start()
    guard.arm(30)
    node.start()
    writer = Writer(node)
    assert guard.ask(op="fence_now")["state"] == "latched"
    answered = CLOCK.now()
    assert late_s(answered, writer.join()) < 0.05  # an answer may have been in the socket already
    until(gone(node), 2)


# --- the latch ---------------------------------------------------------------------------------------------------


def written_or_absent(pid_file: Path) -> bool:
    try:
        return pid_file.stat().st_size > 0
    except FileNotFoundError:       # it was killed before it had made one
        return True


def test_what_is_started_after_the_fence_is_killed_until_a_newer_licence(node: Node, guard: GuardProcess):
    guard.start()
    guard.arm(0.7, sequence=3)
    until(lambda: guard.state == "latched", 3)
    for _ in range(3):
        server = node.launch()
        assert server.wait(5) == -signal.SIGKILL, (node.base / "log").read_text()[-1500:]
        assert not node_accepts(node)
        assert "ready to accept" not in (node.base / "log").read_text(), "killed, but only after it could be used"
        assert written_or_absent(node.data / "postmaster.pid"), "an empty one forbids every later start"
        until(gone(node), 5)  # else the next one refuses by itself: shared memory still in use
    assert guard.ask(op="arm", sequence=3, fence_at=CLOCK.now().plus_s(9))["error"].startswith("sequence 3 was used up")
    assert not guard.ask(op="bye")["ok"]
    guard.arm(30, sequence=4)
    node.start()
    assert guard.state == "armed"


def test_without_inotify_the_latch_looks_for_itself(node: Node, guard: GuardProcess):
    """The user has used up fs.inotify.max_user_instances."""
    hog = subprocess.Popen([sys.executable, "-IS", "-c", (
        "import ctypes, select, sys\nlibc = ctypes.CDLL(None)\nwhile libc.inotify_init1(0) >= 0: pass\nprint('x', flush=True)\n"
        "while not select.select([sys.stdin], [], [], 0.001)[0]: libc.inotify_init1(0)      # also what another test frees")],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd="/", **AS_POSTGRES)
    try:
        hog.stdout.readline()
        assert guard.start()["watched"] is False
        node.signal_file()
        guard.ask(op="standby")
        node.start()
        control(node, "-W", "promote")
        until(gone(node), 3)
        assert guard.state == "latched"
        node.server.wait(5)
        for _ in range(2):
            assert node.launch().wait(5) == -signal.SIGKILL
            until(gone(node), 5)
    finally:
        hog.communicate(b"\n")


def test_initdb_runs_while_offline(node: Node, guard: GuardProcess):
    guard.data = node.base / "new"
    guard.start()
    guard.ask(op="offline", until=CLOCK.now().plus_s(60))
    subprocess.run([postgres_bin() / "initdb", "-D", guard.data, "-A", "trust", "--no-sync"], check=True,
                   stdout=subprocess.DEVNULL, cwd="/", **AS_POSTGRES)
    (guard.data / "standby.signal").touch()
    assert guard.ask(op="standby")["ok"]


def node_accepts(node: Node) -> bool:
    try:
        node.connect().close()
        return True
    except psycopg.OperationalError:
        return False


def test_a_start_frozen_before_the_fence_is_killed_when_it_thaws_or_earlier(node: Node, guard: GuardProcess):
    guard.start()
    guard.arm(1.0)
    server = node.launch()
    os.kill(server.pid, signal.SIGSTOP)  # perhaps before it is called postgres
    until(lambda: guard.state == "latched", 3)
    os.kill(server.pid, signal.SIGCONT)
    assert server.wait(5) == -signal.SIGKILL


def test_the_latch_survives_the_guard(node: Node, guard: GuardProcess):
    guard.start()
    guard.arm(0.6, sequence=3)
    until(lambda: guard.state == "latched", 3)
    guard.kill()
    server = node.launch()
    until(node_accepts_or_dead(node), 5)
    guard.start()
    assert server.wait(5) == -signal.SIGKILL
    assert guard.state == "latched"


def node_accepts_or_dead(node: Node):
    return lambda: node.server.poll() is not None or node_accepts(node)


def test_after_the_fence_standby_needs_the_exits_and_standby_signal(node: Node, guard: GuardProcess):
    guard.start()
    guard.arm(0.6)
    until(lambda: guard.state == "latched", 3)
    assert guard.ask(op="standby")["error"] == "standby.signal does not exist"
    node.signal_file()
    assert guard.ask(op="standby")["state"] == "standby"
    node.start()
    assert node.sql("select pg_is_in_recovery()") == [(True,)]
    assert guard.state == "standby"


# --- the guard's own death ---------------------------------------------------------------------------------------


def test_a_restarted_guard_keeps_the_deadline(node: Node, guard: GuardProcess):
    guard.start()
    guard.arm(9)
    node.start()
    writer = Writer(node)
    fence_at = guard.arm(1.5, sequence=7)
    guard.kill()
    status = guard.start()
    assert (status["state"], status["fence_at"], status["sequence"]) == ("armed", list(fence_at), 7)
    assert status["postmaster"] == node.server.pid
    assert late_s(fence_at, writer.join()) < BUDGET_S


def test_a_deadline_that_passed_without_a_guard_is_kept_at_once(node: Node, guard: GuardProcess):
    guard.start()
    guard.arm(9)
    node.start()
    fence_at = guard.arm(0.9, sequence=2)
    guard.kill()
    until(lambda: remaining_s(fence_at, CLOCK.now()) < -0.1, 3)
    assert node_accepts(node)
    guard.launch()
    until(gone(node), 3)


def test_without_a_file_a_running_primary_has_two_seconds(node: Node, guard: GuardProcess):
    node.start()
    writer = Writer(node)
    begun = CLOCK.now()
    status = guard.start()
    assert status["state"] == "armed"
    assert 0 < remaining_s(Instant(*status["fence_at"]), CLOCK.now()) <= 2
    last = writer.join()
    assert 0.8 < late_s(begun, last) < 2 + 1 + BUDGET_S  # 1 s for the guard's own start on a busy machine
    until(gone(node), 3)


def test_without_a_file_an_agent_that_speaks_in_time_saves_the_primary(node: Node, guard: GuardProcess):
    node.start()
    writer = Writer(node)
    guard.start()
    guard.arm(30)
    time.sleep(2.2)
    before = writer.acknowledged
    until(lambda: writer.acknowledged > before, 1)
    writer.stop()


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"boot_id": 1}', b"\xff"])
def test_a_broken_file_counts_as_none(node: Node, guard: GuardProcess, content: bytes):
    guard.runtime.mkdir(mode=0o700)
    own(guard.runtime)
    (guard.runtime / "guard.json").write_bytes(content)
    assert guard.start()["state"] == "idle"


def test_a_file_of_another_boot_or_directory_counts_as_none(node: Node, guard: GuardProcess):
    guard.start()
    guard.ask(op="fence_now")
    guard.kill()
    path = guard.runtime / "guard.json"
    kept = json.loads(path.read_text())
    for key in ("boot_id", "data_dir"):
        path.write_text(json.dumps(kept | {key: "another"}))
        assert guard.start()["state"] == "idle"
        guard.kill()
    path.write_text(json.dumps(kept))
    assert guard.start()["state"] == "latched"


def test_one_guard_only(node: Node, guard: GuardProcess):
    guard.start()
    first = guard.process
    assert guard.launch().wait(5) == 3
    assert "already running" in guard.log.read_text()
    guard.process = first
    assert guard.state == "idle"


# --- a postmaster dies -------------------------------------------------------------------------------------------


def test_orphans_of_a_killed_postmaster_die_at_once_and_it_may_be_restarted(node: Node, guard: GuardProcess):
    guard.start()
    guard.arm(30)
    postmaster = node.start()
    node.sql("create table p (n int)")
    node.sql("create procedure p() language plpgsql as $$ begin loop insert into p values (1); commit; end loop; end $$")
    client = subprocess.Popen(["psql", "-h", node.base, "-U", "postgres", "-qc", "call p()"], stderr=subprocess.DEVNULL)
    until(lambda: node.sql("select count(*) > 100 from p")[0][0], 5)
    until(lambda: guard.ask(op="status")["postmaster"] == postmaster, 2)
    os.kill(postmaster, signal.SIGKILL)
    assert until(gone(node), 2) < 0.5  # 10 ms on a quiet machine; alone it would go on for ever
    assert client.wait(5) != 0
    assert guard.state == "armed"
    node.server.wait(5)
    for _ in range(3):  # in place, as often as it takes, and never mistaken for an orphan
        again = node.start()
        until(lambda: guard.ask(op="status")["postmaster"] == again, 2)  # noqa: B023
        os.kill(again, signal.SIGKILL)
        node.server.wait(5)
        until(gone(node), 2)
    node.start()
    assert node.sql("select 1") == [(1,)]


def test_orphans_that_were_left_while_no_guard_lived_are_found(node: Node, guard: GuardProcess):
    guard.start()
    guard.arm(30)
    postmaster = node.start()
    guard.kill()
    node.sql("create procedure p() language plpgsql as $$ begin loop commit; end loop; end $$")
    client = subprocess.Popen(["psql", "-h", node.base, "-U", "postgres", "-qc", "call p()"], stderr=subprocess.DEVNULL)
    until(lambda: node.sql("select count(*) from pg_stat_activity where query like 'call%'")[0][0] == 1, 5)
    os.kill(postmaster, signal.SIGKILL)
    node.server.wait(5)
    time.sleep(1.0)  # older than a second: no start under way
    assert node.processes()
    guard.start()
    until(gone(node), 7)
    client.wait(5)


# --- standby and offline -----------------------------------------------------------------------------------------


def test_a_standby_promoted_behind_the_agents_back_is_killed(node: Node, guard: GuardProcess):
    guard.start()
    node.signal_file()
    assert guard.ask(op="standby")["ok"]
    node.start()
    time.sleep(0.3)
    assert guard.state == "standby"
    subprocess.run([postgres_bin() / "pg_ctl", "-D", node.data, "-W", "promote"], check=True,
                   stdout=subprocess.DEVNULL, cwd="/", **AS_POSTGRES)
    until(gone(node), 3)
    assert guard.state == "latched"
    assert "the file promote was made" in guard.ask(op="status")["why"]


def test_a_standby_whose_signal_file_is_removed_is_killed(node: Node, guard: GuardProcess):
    guard.start()
    node.signal_file()
    assert guard.ask(op="standby")["ok"]
    node.start()
    until(lambda: guard.state == "standby", 3)
    (node.data / "standby.signal").unlink()
    until(gone(node), 3)
    assert guard.state == "latched"
    assert "standby.signal" in guard.ask(op="status")["why"]


def test_a_primary_started_where_only_a_standby_may_run_is_killed(node: Node, guard: GuardProcess):
    guard.start()
    node.signal_file()
    assert guard.ask(op="standby")["ok"]
    node.signal_file(there=False)
    until(lambda: guard.state == "latched", 2)
    assert node.launch().wait(5) == -signal.SIGKILL


def test_a_server_that_read_no_standby_signal_is_found_out_by_its_control_file(node: Node, guard: GuardProcess):
    """The file is there, the server is a primary all the same: it was made after the start."""
    node.start()
    node.signal_file()
    guard.start()
    status = guard.ask(op="status")
    assert (status["state"], status["why"]) == ("armed", "no file of this boot")
    answer = guard.ask(op="standby")
    assert "processes of the data directory live" in answer["error"]


def test_a_running_standby_is_recognised_without_a_file(node: Node, guard: GuardProcess):
    node.signal_file()
    node.start()
    assert guard.start()["state"] == "standby"
    guard.arm(30)  # for a promotion
    control(node, "-w", "promote")
    assert guard.state == "armed"
    assert node.sql("select pg_is_in_recovery()") == [(False,)]
    node.signal_file()  # at rest every data directory is a standby
    assert not guard.ask(op="standby")["ok"]


def test_a_promotion_that_was_given_up_goes_back_to_standby(node: Node, guard: GuardProcess):
    guard.start()
    node.signal_file()
    guard.ask(op="standby")
    node.start()
    guard.arm(30)
    assert guard.ask(op="standby")["state"] == "standby"
    assert guard.ask(op="arm", sequence=1, fence_at=CLOCK.now().plus_s(9))["ok"] is False


def test_idle_turns_into_what_appears(node: Node, guard: GuardProcess):
    assert guard.start()["state"] == "idle"
    node.signal_file()
    node.start()
    until(lambda: guard.state == "standby", 2)


def test_an_idle_guard_gives_an_unannounced_primary_two_seconds(node: Node, guard: GuardProcess):
    guard.start()
    node.launch()
    until(lambda: guard.state == "armed", 2)
    until(lambda: guard.state == "latched", 4)
    until(gone(node), 2)


def test_standby_and_offline_are_refused_while_a_primary_lives(node: Node, guard: GuardProcess):
    guard.start()
    guard.arm(30)
    node.start()
    node.signal_file()
    for op, fields in (("standby", {}), ("offline", {"until": CLOCK.now().plus_s(10)}), ("bye", {})):
        answer = guard.ask(op=op, **fields)
        assert not answer["ok"]
        assert "processes of the data directory live" in answer["error"]
        assert answer["state"] == "armed"


def test_offline_leaves_the_directory_alone_until_it_is_over(node: Node, guard: GuardProcess):
    guard.start()
    until_at = CLOCK.now().plus_s(1.5)
    assert guard.ask(op="offline", until=until_at)["until"] == list(until_at)
    single = subprocess.Popen([postgres_bin() / "postgres", "--single", "-D", node.data, "postgres"],
                              stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                              cwd="/", **AS_POSTGRES)
    until(lambda: len(node.processes()) == 1, 3)
    assert guard.ask(op="offline", until=CLOCK.now().plus_s(1.0))["ok"], "renewable while it goes on"
    assert single.poll() is None
    assert single.wait(5) == -signal.SIGKILL
    single.stdin.close()
    assert guard.state == "latched"
    assert not guard.ask(op="offline", until=CLOCK.now().plus_s(4000))["ok"]


def test_while_offline_the_end_of_one_program_ends_no_other(node: Node, guard: GuardProcess, stand_in):
    """initdb starts one single-user server after the other: the next must not be taken for an orphan of the last."""
    guard.start()
    guard.ask(op="offline", until=CLOCK.now().plus_s(60))
    single = subprocess.Popen([postgres_bin() / "postgres", "--single", "-D", node.data, "postgres"],
                              stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                              cwd="/", **AS_POSTGRES)
    until(lambda: guard.ask(op="status")["postmaster"] == single.pid, 3)
    following = stand_in("postgres", node.data)
    single.communicate(b"", timeout=5)
    until(lambda: guard.ask(op="status")["postmaster"] == 0, 3)
    assert following.poll() is None


def test_a_directory_swapped_in_while_offline_is_guarded(node: Node, guard: GuardProcess):
    guard.start()
    guard.ask(op="offline", until=CLOCK.now().plus_s(30))
    subprocess.run(["cp", "-a", node.data, node.base / "data.clone"], check=True)
    node.data.rename(node.base / "data.failed.1")
    (node.base / "data.clone").rename(node.data)
    node.signal_file()
    assert guard.ask(op="standby")["ok"]
    node.start()
    control(node, "-W", "promote")
    until(gone(node), 3)
    assert guard.state == "latched"


def test_a_directory_that_does_not_exist_yet(node: Node, guard: GuardProcess):
    away = node.base / "away"
    node.data.rename(away)
    assert guard.start()["state"] == "idle"
    assert not guard.ask(op="standby")["ok"]
    guard.ask(op="fence_now")
    away.rename(node.data)
    assert node.launch().wait(5) == -signal.SIGKILL


# --- who may speak, and how --------------------------------------------------------------------------------------


def test_an_older_agent_is_refused(node: Node, guard: GuardProcess):
    guard.start()
    guard.arm(30)
    newer = {"incarnation": "two", "started_ns": guard.started_ns + 1}
    guard.arm(20, **newer)
    for op, fields in (("arm", {"sequence": 9, "fence_at": CLOCK.now().plus_s(50)}), ("fence_now", {}), ("bye", {})):
        answer = guard.ask(op=op, **fields)
        assert answer["error"] == "an agent that started later is in charge"
        assert answer["incarnation"] == "two"
    assert guard.ask(op="arm", sequence=2, fence_at=CLOCK.now().plus_s(30), **newer)["ok"]


@pytest.mark.parametrize(("line", "error"), [
    (b"\n", "not JSON"), (b"{}\n", "op must be one of"), (b"[1]\n", "not a JSON object"), (b"\xff\xfe\n", "not JSON"),
    (b"[" * 4000 + b"\n", "not JSON"), (b'{"op":"arm"}\n', "incarnation"), (b"9" * 4095 + b"\n", "not a JSON object"),
    (b'{"op":"arm","incarnation":"a","started_ns":1,"sequence":1,"fence_at":[1e99,1]}\n', "fence_at: a moment must be"),
    (b'{"op":"arm","incarnation":"a","started_ns":1,"sequence":1,"fence_at":[1,1]}\n', "fence_at passed"),
])
def test_a_malformed_message_is_answered_and_disturbs_nobody(node: Node, guard: GuardProcess, line, error):
    guard.start()
    answer = guard.send(line)
    assert not answer["ok"]
    assert error in answer["error"]
    assert guard.state == "idle"


def test_a_line_without_end_is_answered_and_closed(node: Node, guard: GuardProcess):
    guard.start()
    with guard.connect() as sock:
        sock.sendall(b"x" * (MAX_BYTES + 100))
        received = b"".join(iter(lambda: sock.recv(4096), b""))
    assert f"a line may have {MAX_BYTES} bytes" in json.loads(received)["error"]
    assert guard.state == "idle"


def test_many_and_slow_clients_delay_nobody(node: Node, guard: GuardProcess):
    guard.start()
    slow = [guard.connect() for _ in range(40)]
    for sock in slow:
        sock.setblocking(False)
        try:
            while sock.send(b'{"op":"status"}\n' * 100):
                pass  # and never reads an answer
        except OSError:
            pass
    begun = time.monotonic()
    guard.hang_up()
    assert guard.ask(op="status")["ok"]
    assert time.monotonic() - begun < 1
    fence_at = guard.arm(0.6)
    until(lambda: guard.state == "latched", 3)
    assert late_s(fence_at, CLOCK.now()) < 1
    for sock in slow:
        sock.close()


def test_another_user_is_refused(node: Node, guard: GuardProcess):
    guard.start()
    os.chmod(node.base.parent, 0o711)
    os.chmod(node.base, 0o755)
    os.chmod(guard.runtime, 0o755)
    os.chmod(guard.runtime / "guard.sock", 0o666)
    out = subprocess.run([sys.executable, "-c", ("import socket, sys; s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1]);\n"
                          "try:\n  s.sendall(b'{\"op\":\"status\"}\\n'); print(s.recv(99))\nexcept OSError: print(b'')"),
                          guard.runtime / "guard.sock"],
                         user="nobody", group="nogroup", extra_groups=[], capture_output=True, text=True, cwd="/")
    assert out.stdout == "b''\n", out
    until(lambda: "stranger_refused" in guard.log.read_text(), 2)  # the log is a thread of its own


@pytest.mark.parametrize("wrong", ["mode", "owner", "link", "disk", "long"])
def test_an_unsafe_runtime_directory_is_refused(node: Node, guard: GuardProcess, wrong: str):
    path = guard.runtime
    if wrong == "disk":
        if os.statvfs("/var/tmp").f_fsid == os.statvfs("/dev/shm").f_fsid:
            pytest.skip("everything is tmpfs")
        path = Path(f"/var/tmp/pgha-test-{os.getpid()}")
    elif wrong == "long":
        path = node.base / ("x" * 100)
    elif wrong == "link":
        (node.base / "real").mkdir(mode=0o700)
        own(node.base / "real")
        path.symlink_to("real")
    if wrong in ("mode", "owner", "disk"):
        path.mkdir(mode=0o755 if wrong == "mode" else 0o700)
    if wrong in ("mode", "disk"):
        own(path)
    guard.runtime = path
    try:
        assert guard.launch().wait(5) == 4
    finally:
        if wrong == "disk":
            path.rmdir()
    assert str(path) in guard.log.read_text()


def test_a_file_that_cannot_be_written_grants_nothing(node: Node, guard: GuardProcess):
    guard.start()
    guard.arm(30)
    (guard.runtime / "guard.json.new").mkdir()
    answer = guard.ask(op="arm", sequence=2, fence_at=CLOCK.now().plus_s(60))
    assert "cannot write its file" in answer["error"]
    assert answer["sequence"] == 1
    near = CLOCK.now().plus_s(5)
    assert guard.ask(op="narrow", sequence=2, fence_at=near)["ok"] is False
    assert guard.ask(op="status")["fence_at"] == list(near), "narrowing holds all the same"


# --- its own life ------------------------------------------------------------------------------------------------


def test_it_is_small(node: Node, guard: GuardProcess):
    guard.start()
    guard.arm(30)
    node.start()
    for sequence in range(2, 50):
        guard.arm(30, sequence=sequence)
    status = Path(f"/proc/{guard.process.pid}/status").read_text()
    rss_kb = int(status.split("VmRSS:")[1].split()[0])
    print(f"guard: {rss_kb / 1024:.1f} MiB")
    assert rss_kb < 20_000


def test_with_all_privileges(node: Node, guard: GuardProcess):
    """As root, for want of a unit file with CPUSchedulingPolicy, LimitMEMLOCK and OOMScoreAdjust."""
    AS_ROOT = {"user": 0, "group": 0}
    with guard.log.open("ab") as log:
        guard.process = subprocess.Popen(guard.argv(), stdout=log, stderr=log, cwd="/", start_new_session=True, **AS_ROOT)
    until(guard._answers, 5)
    status = guard.ask(op="status")
    if os.sched_getscheduler(guard.process.pid) == os.SCHED_FIFO:
        assert status["realtime"] is True
    assert status["locked_in_memory"] is True
    guard.arm(5)
    pid = node.start()
    writer = Writer(node)
    os.kill(pid, signal.SIGSTOP)
    fence_at = guard.arm(0.8, sequence=2)
    assert late_s(fence_at, writer.join()) < BUDGET_S
    until(gone(node), 2)
    memory = Path(f"/proc/{guard.process.pid}/status").read_text()
    print(status, [line for line in memory.splitlines() if line.startswith(("VmRSS", "VmLck"))])
    assert int(memory.split("VmRSS:")[1].split()[0]) < 20_000


@pytest.mark.parametrize(("given", "code"), [("infinity", 4), ("60", 4), ("0.5", 2), ("never", 2), ("nan", 2), ("-1", 2)])
def test_how_long_it_stays_alone_is_said_in_whole_seconds(tmp_path: Path, given: str, code: int):
    """4: it went on, and found the runtime directory not to be on tmpfs, or another's."""
    (tmp_path / "file").touch()
    assert main(["--data-dir", "/nowhere", "--runtime-dir", str(tmp_path / "file"), "--agent-lock", "/nowhere", "--alone-s", given]) == code


def test_it_ends_after_bye(node: Node, guard: GuardProcess):
    guard.start()
    node.signal_file()
    guard.ask(op="standby")
    assert guard.ask(op="bye")["ok"]
    assert guard.process.wait(5) == 0
    assert guard.start()["state"] == "standby", "and the next one knows where things stand"


def test_sigterm_waits_for_the_server(node: Node, guard: GuardProcess):
    guard.start()
    guard.arm(30)
    node.start()
    guard.process.terminate()
    time.sleep(0.5)
    assert guard.state == "armed"
    control(node, "-m", "fast", "stop")
    assert guard.process.wait(5) == 0


def test_it_ends_when_nobody_needs_it(node: Node, guard: GuardProcess):
    code = (f"import sys; sys.path.insert(0, {str(ROOT)!r}); from pgha.lock.guard import run; "
            f"sys.exit(run(data_dir={str(node.data)!r}, runtime_dir={str(guard.runtime)!r}, "
            f"agent_lock={str(guard.agent_lock)!r}, alone_s=0.6))")
    guard.argv = lambda: [sys.executable, "-c", code]
    guard.agent_lock.touch()
    own(guard.agent_lock)
    with guard.agent_lock.open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        guard.start()
        time.sleep(1.2)
        assert guard.process.poll() is None, "an agent lives"
        assert guard.ask(op="status")["agent_alive"] is True
        node.signal_file()
        guard.ask(op="standby")
        node.start()
    time.sleep(1.2)
    assert guard.process.poll() is None, "a server lives"
    assert guard.ask(op="status")["agent_alive"] is False
    control(node, "-m", "fast", "stop")
    assert guard.process.wait(5) == 0


def test_a_full_log_pipe_stops_nothing(node: Node, guard: GuardProcess):
    reader, writer = os.pipe()
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)
    guard.runtime.mkdir(mode=0o700)
    own(guard.runtime)
    guard.process = subprocess.Popen(guard.argv(), stdout=writer, stderr=writer, cwd="/", start_new_session=True, **AS_POSTGRES)
    guard.log.touch()
    until(guard._answers, 5)
    for n in range(200):
        guard.arm(30, incarnation=f"agent {n}", started_ns=guard.started_ns + n)  # each is logged
    fence_at = CLOCK.now().plus_s(0.6)
    last = {"incarnation": "agent 199", "started_ns": guard.started_ns + 199}
    guard.ask(op="arm", sequence=2, fence_at=fence_at, **last)
    until(lambda: guard.state == "latched", 3)
    os.close(reader)
    os.close(writer)


def test_wrong_usage(node: Node, guard: GuardProcess):
    argv = guard.argv()
    for arguments in ([], ["--data-dir"], ["--nonsense", "x"], ["--data-dir", "/x"]):
        assert subprocess.run([*argv[:3], *arguments], stderr=subprocess.DEVNULL, cwd="/", **AS_POSTGRES).returncode == 2


def test_the_socket_is_private(node: Node, guard: GuardProcess):
    guard.start()
    assert (guard.runtime / "guard.sock").stat().st_mode & 0o777 == 0o600
    assert (guard.runtime / "guard.json").stat().st_mode & 0o777 == 0o600
    assert recipe.read_proc(guard.process.pid).comm not in recipe.COMMS
