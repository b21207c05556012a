"""Tests on a real PostgreSQL, which refuses to run as root.

When pytest runs as root, each test of this directory (its fixtures included) runs in a forked child that has become
user postgres; the child sends its reports back. One data directory is made by initdb for the whole run and copied.
"""

from __future__ import annotations

import ctypes
import os
import pickle
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
import warnings
from pathlib import Path

import pytest
from _pytest.reports import TestReport
from _pytest.runner import SetupState, runtestprotocol
from free_ports import free_port

BIN = Path(os.environ.get("PGHA_TEST_PG_BIN", "/usr/lib/postgresql/15/bin"))
PR_SET_CHILD_SUBREAPER = 36
_base: Path | None = None


def workspace(config: pytest.Config) -> Path:
    """A directory of user postgres, for the whole run."""
    global _base
    if _base is None:
        _base = Path(tempfile.mkdtemp(prefix="pgha-postgres-", dir="/dev/shm"))
        if os.getuid() == 0:
            user = pwd.getpwnam("postgres")
            os.chown(_base, user.pw_uid, user.pw_gid)
        config.add_cleanup(lambda: shutil.rmtree(_base, ignore_errors=True))
    return _base


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item, nextitem):
    if Path(__file__).parent not in Path(item.fspath).parents:
        return None
    workspace(item.config)
    if os.getuid() != 0:
        return None
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    for report in _in_child(item):
        item.ihook.pytest_runtest_logreport(report=report)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    return True


def _in_child(item):
    read_fd, write_fd = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Python 3.12 warns of fork beside idle threads, which the child never needs
        pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.close(read_fd)
            ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)  # what a test orphans is ours to reap
            user = pwd.getpwnam("postgres")
            os.setgroups([])
            os.setgid(user.pw_gid)
            os.setuid(user.pw_uid)
            os.chdir(_base)
            os.environ |= {"HOME": str(_base), "USER": "postgres", "TMPDIR": str(_base)}
            # What was set up so far is the parent's: the child must not tear it down (it ends with everything torn down).
            item.session._setupstate = SetupState()
            reports = runtestprotocol(item, log=False)
            data = [item.config.hook.pytest_report_to_serializable(config=item.config, report=r) for r in reports]
            with os.fdopen(write_fd, "wb") as f:
                pickle.dump(data, f)
            code = 0
        finally:
            os._exit(code)
    os.close(write_fd)
    with os.fdopen(read_fd, "rb") as f:
        data = f.read()
    os.waitpid(pid, 0)
    if not data:
        return [TestReport(item.nodeid, item.location, {}, "failed", "the child died without a report", "call")]
    return [item.config.hook.pytest_report_from_serializable(config=item.config, data=d) for d in pickle.loads(data)]


@pytest.fixture
def base(request, tmp_path_factory):
    """A fresh directory for one test; every PostgreSQL process under it is ended at its end."""
    path = Path(tempfile.mkdtemp(dir=workspace(request.config)))
    yield path
    _end_servers(path)
    shutil.rmtree(path)


def _processes_under(path: Path) -> list[int]:
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                if os.readlink(f"/proc/{name}/cwd").startswith(str(path)):
                    found.append(int(name))
            except (FileNotFoundError, ProcessLookupError, PermissionError):
                pass
    return found


def _end_servers(path: Path):
    """First as PostgreSQL would end, so that it removes its shared memory; then by force, and the segment by hand."""
    from pgha.postgres.processes import adopt
    for file in path.glob("*/postmaster.pid"):
        if postmaster := adopt(file.parent):
            postmaster.signal(signal.SIGQUIT)
            postmaster.close()
    for pid in _processes_under(path):
        try:
            os.kill(pid, signal.SIGCONT)
        except ProcessLookupError:
            pass
    until = time.monotonic() + 3
    while _processes_under(path) and time.monotonic() < until:
        _reap()
        time.sleep(0.01)
    for pid in _processes_under(path):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
    while _processes_under(path):
        _reap()
        time.sleep(0.005)
    for file in path.glob("*/postmaster.pid"):  # of one that was killed
        lines = file.read_text().splitlines()
        if len(lines) > 6 and lines[6].split():
            subprocess.run(["ipcrm", "-m", lines[6].split()[1]], check=False, stderr=subprocess.DEVNULL)
    _reap()


def _reap():
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        pass


@pytest.fixture
def bin_dir():
    return BIN


def template(config) -> Path:
    path = workspace(config) / "template"
    if not path.exists():
        making = workspace(config) / f"template.{os.getpid()}"
        subprocess.run([BIN / "initdb", "-D", making, "-U", "postgres", "-A", "trust", "--no-sync", "-E", "UTF8",
                        "--locale=C", "--no-instructions"], check=True, stdout=subprocess.DEVNULL)
        with (making / "postgresql.conf").open("a") as f:
            f.write("\nfsync = off\nshared_buffers = 8MB\nmax_wal_size = 64MB\ndynamic_shared_memory_type = mmap\nwal_log_hints = on\n"
                    "wal_keep_size = 64MB\n")
        making.rename(path)
    return path


class Node:
    """A data directory with its port and socket directory, and the words to start it and connect to it."""

    def __init__(self, directory: Path, name: str):
        from pgha.postgres.server import Server
        self.name = name
        self.data_dir = directory / name
        self.socket_dir = directory
        self.port = free_port()
        self.server = Server(self.data_dir, BIN, log_path=directory / f"{name}.log")
        self.parameters = {"port": str(self.port), "listen_addresses": "127.0.0.1",
                           "unix_socket_directories": str(self.socket_dir)}
        self.conninfo = {"host": str(self.socket_dir), "port": self.port, "user": "postgres", "dbname": "postgres"}

    async def start(self, **parameters: str):
        postmaster = await self.server.start(self.parameters | parameters)
        await self.server.wait_ready(postmaster, deadline_s=20)
        return postmaster

    async def connect(self, **more):
        from pgha.postgres.connection import Connection
        return await Connection.connect(self.conninfo | more, deadline_s=5)

    async def sql(self, text: str):
        conn = await self.connect()
        try:
            return await conn.query(text, deadline_s=10)
        finally:
            conn.close()


@pytest.fixture
def make_node(base, request):
    """make_node("a"): a fresh primary's data directory, not started. make_node("b", copy=False): nothing yet."""
    def make(name: str = "a", *, copy: bool = True) -> Node:
        if copy:
            shutil.copytree(template(request.config), base / name)
            (base / name).chmod(0o700)
        return Node(base, name)
    return make
