"""Do the units do what they say? Read, verified, and carried out by a real systemd with real etcd and PostgreSQL.

The one with systemd: tests share one machine and go on from each other's end, in this file's order.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from pgha.demo.programs import find_etcd, find_postgres
from tests.cluster.installed import install
from tests.systemd.booted import PROGRAM, Booted, CannotBoot

ROOT = Path(__file__).parents[2]
UNITS = ("pgha.service", "pgha-guard.service")
CONFIG = "/etc/pgha.toml"
DATA = "/var/lib/postgresql/15/main"


class Unit:
    """A unit file's keys; each may be there several times."""

    def __init__(self, name: str) -> None:
        self.text = (ROOT / "packaging" / name).read_text(encoding="utf-8")
        self.values: dict[tuple[str, str], list[str]] = {}
        section = ""
        for line in self.text.splitlines():
            if line.startswith("["):
                section = line.strip("[]")
            elif line and line[0] not in "#;":
                key, _, value = line.partition("=")
                self.values.setdefault((section, key), []).append(value)

    def words(self, key: str, section: str = "Service") -> list[str]:
        return " ".join(self.values.get((section, key), [])).split()


def test_they_are_verified_without_a_warning(tmp_path: Path):
    analyze = shutil.which("systemd-analyze")
    assert analyze, "systemd is missing: run build/setup"
    for name in UNITS:      # whether /usr/local/bin/pgha is there, the machine that they are installed on must say
        text = (ROOT / "packaging" / name).read_text(encoding="utf-8")
        assert text.count("/usr/local/bin/pgha ") == 1
        (tmp_path / name).write_text(text.replace("/usr/local/bin/pgha ", "/bin/true "), encoding="utf-8")
    pages = tmp_path / "man"        # where `man` finds them, which systemd asks: the units name them
    for page in (ROOT / "man").iterdir():
        place = pages / f"man{page.suffix[1:]}" / page.name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(page)
    answer = subprocess.run([analyze, "verify", "--man=yes", *(tmp_path / name for name in UNITS)], capture_output=True, text=True, timeout=60, check=False,
                            env={"SYSTEMD_UNIT_PATH": f"{tmp_path}:", "PATH": os.defpath, "MANPATH": str(pages)})
    assert (answer.returncode, answer.stdout + answer.stderr) == (0, "")


@pytest.mark.parametrize("name", UNITS)
@pytest.mark.parametrize(("key", "why"), [
    ("StateDirectory", "an agent started by hand would not meet the lock of this one"), ("PrivateTmp", "clients find PostgreSQL's socket in /tmp"), ("PrivateIPC", "a second postmaster would not see the first one's shared memory"),
    ("PrivatePIDs", "nor its pid"), ("PrivateUsers", "the guard could not look at it"), ("RemoveIPC", "PostgreSQL outlives the unit"),
    ("AmbientCapabilities", "the guard could not look at whoever has them"), ("ProtectHome", "data directories may be there"), ("MemoryMax", "counts the page cache"),
    ("ProtectClock", "closes /dev/watchdog"), ("PrivateDevices", "closes /dev/watchdog"), ("MemoryDenyWriteExecute", "ends JIT and ctypes"),
    ("CPUSchedulingPolicy", "a kernel that refuses it would keep the guard from starting"), ("Requires", "a guard that is restarted would restart the agent"),
    ("BindsTo", "the same"), ("PartOf", "the same"), ("Conflicts", "a PostgreSQL started by mistake would stop the agent"),
])
def test_what_must_not_be_set(name: str, key: str, why: str):
    assert not [found for section, found in Unit(name).values if found == key], why


def test_what_both_must_agree_on():
    """The guard and the agent meet in one runtime directory, which neither's end may remove."""
    agent, guard = (Unit(name) for name in UNITS)
    for key in ("User", "Group", "RuntimeDirectory", "RuntimeDirectoryMode", "RuntimeDirectoryPreserve", "CacheDirectory", "EnvironmentFile", "UMask"):
        assert agent.words(key) == guard.words(key) != [], key
    assert agent.words("RuntimeDirectoryPreserve") == ["yes"]
    assert agent.words("KillMode") == ["process"]
    assert agent.words("OOMPolicy") == guard.words("OOMPolicy") == ["continue"]
    assert guard.words("OOMScoreAdjust") == ["-1000"]
    assert guard.words("Restart") == ["always"]
    assert "pgha-guard.service" in agent.words("Wants", "Unit")
    assert "pgha-guard.service" in agent.words("After", "Unit")


# --- the command lines, without systemd ------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def place() -> Iterator[Path]:
    """On tmpfs, for user postgres, with the archive under the name that the units use."""
    if os.getuid() != 0:
        pytest.skip("the units' user is postgres, which takes root")
    path = Path(tempfile.mkdtemp(prefix="pgha-test-units-", dir="/dev/shm"))
    path.chmod(0o755)
    try:
        install(path / "program")
        shutil.copy(path / "program/pgha.pyz", path / "pgha")
        (path / "pgha").chmod(0o755)
        for name in ("run", "cache"):
            (path / name).mkdir(mode=0o700)
            shutil.chown(path / name, "postgres", "postgres")
        yield path
    finally:
        shutil.rmtree(path)


CONFIGURATION = """\
scope = "demo"
name = "n1"
[restapi]
listen = "127.0.0.1:8008"
connect_address = "127.0.0.1:8008"
[etcd3]
hosts = ["127.0.0.1:2379"]
[bootstrap.dcs]
ttl = "5s"
loop_wait = "1s"
retry_timeout = "1s"
[postgresql]
listen = "127.0.0.1:5432"
connect_address = "127.0.0.1:5432"
data_dir = "{data}"
bin_dir = "{bin}"
[postgresql.authentication.superuser]
username = "postgres"
password = "not a real one"
[postgresql.authentication.replication]
username = "replicator"
password = "not a real one"
"""


def started(name: str, place: Path, configuration: Path, **more: str) -> subprocess.Popen[str]:
    """The unit's ExecStart as systemd would run it, but for the two paths."""
    unit = Unit(name)
    words = [word.replace("/usr/local/bin/pgha", str(place / "pgha")).replace(CONFIG, str(configuration)) for word in shlex.split(unit.values["Service", "ExecStart"][0])]
    environ = dict(pair.split("=", 1) for pair in unit.words("Environment"))
    environ |= {"PATH": os.defpath, "RUNTIME_DIRECTORY": str(place / "run"), "CACHE_DIRECTORY": str(place / "cache"), **more}
    return subprocess.Popen(words, env=environ, cwd="/", stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                            user="postgres", group="postgres", extra_groups=[], umask=0o077)


def written(place: Path, name: str, text: str) -> Path:
    path = place / name
    path.write_text(text)
    path.chmod(0o600)
    shutil.chown(path, "postgres", "postgres")
    return path


def status_of_guard(place: Path) -> str:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(5)
        sock.connect(str(place / "run/guard.sock"))
        sock.sendall(b'{"op": "status"}\n')
        return sock.recv(65536).decode()


def test_the_guards_command_line(place: Path):
    """It finds its places in the configuration, keeps none of it in memory, and comes back when the file has been broken since."""
    good = written(place, "guard.toml", CONFIGURATION.format(data=place / "data", bin=find_postgres()))
    for number, text in enumerate((None, "broken =\n")):
        if text is not None:
            good.write_text(text)
        guard = started("pgha-guard.service", place, good)
        assert guard.stderr is not None
        try:
            lines = []
            while not lines or "guard_runs" not in lines[-1]:
                lines.append(guard.stderr.readline())
                assert lines[-1], lines
            assert f"data_dir={place / 'data'}" in lines[-1]
            assert ("guarding" in "".join(lines)) == bool(number), lines
            assert '"ok":true' in status_of_guard(place)
            words = Path(f"/proc/{guard.pid}/cmdline").read_text().split("\0")
            assert "--alone-s" in words
            assert f"--runtime-dir={place / 'run'}" in words
            memory = Path(f"/proc/{guard.pid}/status").read_text()
            assert int(memory.split("VmRSS:")[1].split()[0]) < 20_000
            assert "msgspec" not in Path(f"/proc/{guard.pid}/maps").read_text()
        finally:
            guard.send_signal(signal.SIGTERM)
            assert guard.wait(10) == 0
            guard.stderr.close()
    (place / "run/guard.json").unlink()
    guard = started("pgha-guard.service", place, good)
    _, said = guard.communicate(timeout=30)
    assert guard.returncode == 2, "nothing says what to guard"
    assert "no valid TOML" in said


def test_the_agents_command_line(place: Path):
    """A wrong configuration is what the unit does not try again."""
    agent = started("pgha.service", place, written(place, "agent.toml", "nonsense = 1\n"))
    _, said = agent.communicate(timeout=30)
    assert agent.returncode == 2
    assert Unit("pgha.service").words("RestartPreventExitStatus") == ["2"]
    assert "nonsense" in said


# --- a real systemd --------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def machine(place: Path) -> Iterator[Booted]:
    etcd = f"{find_etcd()} --data-dir /run/etcd --listen-client-urls http://127.0.0.1:2379 --advertise-client-urls http://127.0.0.1:2379"
    units = {name: Unit(name).text.replace(CONFIG, "/run/bed/pgha.toml").replace("/usr/local/bin/pgha", PROGRAM) for name in UNITS}
    units["pgha.service.d/test.conf"] = "[Service]\nWatchdogSec=4s\n"      # a frozen agent is noticed sooner than an installation needs
    units["etcd.service"] = f"[Service]\nType=notify\nEnvironment=ETCD_UNSUPPORTED_ARCH=arm64\nExecStart={etcd}\n"
    try:
        booted = Booted(place / "program/pgha.pyz", units)
    except CannotBoot as why:
        pytest.skip(f"no systemd can be started here: {why}")
    written(booted.directory, "pgha.toml", CONFIGURATION.format(data=DATA, bin=find_postgres()))
    try:
        yield booted
    finally:
        booted.end()


def postmaster(machine: Booted) -> str:
    return machine.run("sed", "-n", "1p", f"{DATA}/postmaster.pid")


def leads(machine: Booted) -> bool:
    return machine.shows("pgha.service", "StatusText") == "no action. I am (n1), the leader with the lock"


def kill(machine: Booted, unit: str, number: int = signal.SIGKILL) -> str:
    """Its main process; which it was."""
    pid = machine.shows(unit, "MainPID")
    machine.run("kill", f"-{number}", pid)
    return pid


def replaced(machine: Booted, unit: str, before: str) -> None:
    machine.until(lambda: machine.shows(unit, "SubState") == "running" and machine.shows(unit, "MainPID") not in ("0", before), 30, f"another {unit}")


def test_it_starts(machine: Booted):
    machine.run("install", "-d", "-o", "postgres", "-g", "postgres", str(Path(DATA).parent), "/run/postgresql")
    machine.run("systemctl", "start", "etcd.service")
    machine.run("systemctl", "start", "pgha.service")
    assert machine.shows("pgha.service", "ActiveState") == "active", "READY=1 before there is a cluster"
    machine.until(lambda: leads(machine), 60, "a primary")
    agent, guard, server = machine.shows("pgha.service", "MainPID"), machine.shows("pgha-guard.service", "MainPID"), postmaster(machine)
    groups = [machine.run("sed", "-n", "s/^0:://p", f"/proc/{pid}/cgroup") for pid in (agent, guard, server)]
    assert groups == ["/system.slice/pgha.service", "/system.slice/pgha-guard.service", "/system.slice/pgha.service"]
    environment = machine.run("cat", f"/proc/{server}/environ")
    assert "PG_OOM_ADJUST_VALUE=0" in environment
    assert "NOTIFY_SOCKET" not in environment
    assert "WATCHDOG_USEC" not in environment
    assert machine.run("stat", "-c", "%U %a", "/run/pgha", f"{DATA}.pgha", "/var/cache/pgha").splitlines() == ["postgres 700"] * 3


def test_an_agent_by_hand_beside_it_is_refused(machine: Booted):
    said = machine.run("runuser", "-u", "postgres", "--", "env", "CACHE_DIRECTORY=/var/cache/pgha", PROGRAM, "run", "/run/bed/pgha.toml", check=False)
    assert f"another agent runs on {DATA}" in said
    assert leads(machine)


def test_who_is_spared_when_memory_is_out(machine: Booted):
    if subprocess.run(["bash", "-c", "echo -1 >/proc/self/oom_score_adj"], stderr=subprocess.DEVNULL, check=False).returncode != 0:
        pytest.skip("root may not lower oom_score_adj here (no CAP_SYS_RESOURCE)")
    server = postmaster(machine)
    backend = machine.run("pgrep", "-P", server, "-n")
    pids = (machine.shows("pgha-guard.service", "MainPID"), machine.shows("pgha.service", "MainPID"), server, backend)
    assert [machine.run("cat", f"/proc/{pid}/oom_score_adj") for pid in pids] == ["-1000", "-900", "-900", "0"]
    assert "spared_by_oom=True" in machine.journal("-u", "pgha-guard.service")
    assert "locked_in_memory=True" in machine.journal("-u", "pgha-guard.service")


def test_it_reloads(machine: Booted):
    machine.run("systemctl", "reload", "pgha.service")
    machine.until(lambda: "configuration reloaded" in machine.journal("-u", "pgha.service"), 10, "read again")
    machine.until(lambda: machine.shows("pgha.service", "SubState") == "running", 10, "ready again")


def test_the_agent_is_killed(machine: Booted):
    """PostgreSQL runs on, and the next agent takes it over."""
    server = postmaster(machine)
    replaced(machine, "pgha.service", kill(machine, "pgha.service"))
    machine.until(lambda: leads(machine), 20, "the next agent leads")
    assert postmaster(machine) == server
    assert machine.shows("pgha.service", "NRestarts") == "1"


def test_the_guard_is_killed_while_the_configuration_is_broken(machine: Booted):
    file = machine.directory / "pgha.toml"
    text = file.read_text()
    file.write_text(text + "broken =\n")
    server = postmaster(machine)
    replaced(machine, "pgha-guard.service", kill(machine, "pgha-guard.service"))
    machine.until(lambda: "guard_runs" in machine.journal("-u", "pgha-guard.service").rpartition(f"guarding {DATA} as before")[2], 10, "it knows what to guard")
    machine.run("systemctl", "reload", "pgha.service")
    machine.until(lambda: "configuration not reloaded" in machine.journal("-p", "err", "-u", "pgha.service"), 10, "said, with its priority")
    machine.until(lambda: machine.shows("pgha.service", "SubState") == "running", 10, "a reload that failed is over, too")
    file.write_text(text)
    machine.run("systemctl", "restart", "pgha-guard.service")      # 5 s: the old one ends by itself only without a server
    machine.until(lambda: leads(machine), 20, "still leading")
    assert postmaster(machine) == server


def test_the_agent_is_frozen(machine: Booted):
    """The guard ends PostgreSQL in time; systemd ends the agent, which says where it was, and the next one brings the node back."""
    frozen = kill(machine, "pgha.service", signal.SIGSTOP)
    replaced(machine, "pgha.service", frozen)
    machine.until(lambda: leads(machine), 60, "back")
    assert "Fatal Python error: Aborted" in machine.journal("-u", "pgha.service")


def test_another_version_is_installed_in_pause(machine: Booted):
    """The README's way: PostgreSQL runs on meanwhile."""
    server = postmaster(machine)
    machine.run(PROGRAM, "ctl", "-c", "/run/bed/pgha.toml", "pause", "--wait")
    machine.run("systemctl", "stop", "pgha.service")
    assert postmaster(machine) == server
    machine.run("kill", "-0", server)
    machine.run("systemctl", "start", "pgha.service")
    machine.until(lambda: machine.shows("pgha.service", "StatusText").startswith("PAUSE: no action. I am (n1), the leader"), 20, "adopted")
    machine.run(PROGRAM, "ctl", "-c", "/run/bed/pgha.toml", "resume", "--wait")
    machine.until(lambda: leads(machine), 20, "leads on")
    assert postmaster(machine) == server


def test_it_stops(machine: Booted):
    machine.run("systemctl", "stop", "pgha.service")
    assert machine.shows("pgha.service", "Result") == "success"
    assert machine.run("pgrep", "-x", "postgres", check=False) == ""
    assert machine.shows("pgha-guard.service", "ActiveState") == "active"
    assert "guard.json" in machine.run("ls", "/run/pgha")
    machine.run("systemctl", "stop", "pgha-guard.service")
    assert machine.shows("pgha-guard.service", "Result") == "success", "nothing to guard: it ends at once"


def test_a_wrong_configuration_is_not_tried_again(machine: Booted):
    (machine.directory / "pgha.toml").write_text("nonsense = 1\n")
    machine.run("systemctl", "start", "pgha.service", check=False)
    assert machine.shows("pgha.service", "ActiveState") == "failed"
    assert machine.shows("pgha.service", "ExecMainStatus") == "2"
    assert "nonsense" in machine.journal("-p", "err", "-u", "pgha.service")
