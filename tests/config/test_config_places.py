"""State and runtime directories, and what is kept in them: private, on the right kind of disk, whole after a crash."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from config_samples import changed, loaded, write

from pgha.config import directories, state
from pgha.errors import ConfigError
from pgha.model.wal import HistoryRow


@pytest.fixture
def on_tmpfs():
    with tempfile.TemporaryDirectory(dir="/dev/shm") as path:
        yield Path(path)


def local_with(tmp_path, **own):
    return loaded(tmp_path, changed("pgha", own, changed("postgresql.data_dir", str(tmp_path / "data")))).local


def test_where_they_are(tmp_path):
    local = local_with(tmp_path)
    assert directories.state_dir(local, {}) == tmp_path / "data.pgha"
    assert directories.state_dir(local, {"STATE_DIRECTORY": "/var/lib/a:/var/lib/b"}) == Path("/var/lib/a")
    default = directories.runtime_dir(local, {})
    assert default.parent == Path(f"/dev/shm/pgha-{os.geteuid()}")
    assert len(default.name) == 16
    assert directories.runtime_dir(loaded(tmp_path, changed("name", "n2")).local, {}) != default
    assert directories.runtime_dir(local, {"RUNTIME_DIRECTORY": "/run/a"}) == Path("/run/a")
    configured = local_with(tmp_path, state_dir="/s", runtime_dir="/r")
    environ = {"STATE_DIRECTORY": "/x", "RUNTIME_DIRECTORY": "/y"}
    assert (directories.state_dir(configured, environ), directories.runtime_dir(configured, environ)) == (Path("/s"), Path("/r"))
    assert directories.agent_lock(configured, {}) == Path("/r/agent.lock")
    assert directories.data_directory_lock(configured, {}) == Path("/s/agent.lock")
    assert directories.pgpass(configured, {}) == Path("/s/pgpass")
    assert directories.guard_places(write(tmp_path / "g.toml", changed("pgha.runtime_dir", "/r")), {}) == ("/srv/pg/data", "/r", "/r/agent.lock")


def test_they_are_made_private_and_found_again(tmp_path, on_tmpfs):
    local = local_with(tmp_path, state_dir=str(tmp_path / "state"), runtime_dir=str(on_tmpfs / "run"))
    for _ in range(2):
        for path in (directories.prepare_state_dir(local, {}), directories.prepare_runtime_dir(local, {})):
            assert stat.S_IMODE(path.stat().st_mode) == 0o700
    (on_tmpfs / "run").chmod(0o755)
    assert stat.S_IMODE(directories.prepare_runtime_dir(local, {}).stat().st_mode) == 0o700


def test_the_default_runtime_directory_is_usable():
    with tempfile.TemporaryDirectory() as where:
        path = directories.prepare_runtime_dir(local_with(Path(where)), {})
        assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(path.parent.stat().st_mode) == 0o700
        path.rmdir()


@pytest.mark.parametrize(("make", "what"), [
    (lambda p: p.symlink_to("/tmp"), "is a symbolic link"),
    (lambda p: p.write_text(""), "cannot be opened"),
    (lambda p: (p.mkdir(), os.chown(p, 12345, 12345)), "belongs to user 12345"),
    (lambda p: None, "cannot be made (No such file or directory)"),
])
def test_somebody_elses_directory_is_refused(tmp_path, make, what):
    where = tmp_path / "run" if "made" not in what else tmp_path / "missing" / "run"
    make(where)
    with pytest.raises(ConfigError) as caught:
        directories.prepare_runtime_dir(local_with(tmp_path, runtime_dir=str(where)), {})
    (problem,) = caught.value.problems
    assert problem.startswith(f"pgha.runtime_dir: {where} {what}")
    assert "allowed: " in problem


def test_a_disk_is_no_place_for_the_guard(tmp_path, on_tmpfs):
    assert directories.filesystem(on_tmpfs) == "tmpfs"
    assert directories.filesystem(Path("/proc/self")) == "proc"
    if directories.filesystem(tmp_path) == "tmpfs":
        pytest.skip("the temporary directory is on tmpfs here")
    local = local_with(tmp_path, runtime_dir=str(tmp_path / "run"))
    with pytest.raises(ConfigError, match="allowed: a directory on tmpfs, as below /run or /dev/shm"):
        directories.prepare_runtime_dir(local, {})
    assert directories.prepare_runtime_dir(local, {}, must_be_tmpfs=False) == tmp_path / "run"


def test_a_link_does_not_lead_state_into_the_data_directory(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "data")
    local = local_with(tmp_path, state_dir=str(tmp_path / "link" / "state"))
    with pytest.raises(ConfigError, match="lies in postgresql.data_dir"):
        directories.prepare_state_dir(local, {})
    assert list((tmp_path / "data").iterdir()) == []


def test_a_sockets_path_has_its_limit():
    longest = Path("/" + "x" * (107 - len("/") - len("/guard.sock")))
    assert len(str(directories.socket_path(longest, "guard.sock"))) == 107
    with pytest.raises(ConfigError, match="has 108 bytes; allowed: 107"):
        directories.socket_path(Path(f"{longest}y"), "guard.sock")


# --- what is kept ----------------------------------------------------------------------------------------------------

def test_the_node_id_is_made_once(tmp_path):
    first = state.node_id(tmp_path)
    assert len(first) == 32
    assert state.node_id(tmp_path) == first
    assert stat.S_IMODE((tmp_path / "node_id").stat().st_mode) == 0o600
    (tmp_path / "node_id").write_text("nonsense")
    with pytest.raises(ConfigError, match="is no node id; allowed: 32 hexadecimal digits; if it is damaged, remove it"):
        state.node_id(tmp_path)
    (tmp_path / "node_id").write_bytes(b"\xff")
    with pytest.raises(ConfigError, match="cannot be read"):
        state.node_id(tmp_path)
    with pytest.raises(ConfigError, match="cannot be written"):
        state.node_id(tmp_path / "missing")


def test_facts_are_remembered(tmp_path):
    assert state.load_remembered(tmp_path) == (state.Remembered(), "")
    facts = state.Remembered(
        ttl_s=30, system_identifier="7", generation=state.StoreGeneration(cluster_id="c", revision=5),
        members={"n1": state.RememberedMember(api_url="http://a:8008/patroni", seen_at_wall_s=1.5, timeline=2, lsn=7)},
        history=(HistoryRow(timeline=1, switch_lsn=5, reason="x"),))
    state.save_remembered(tmp_path, facts)
    assert state.load_remembered(tmp_path) == (facts, "")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["memory.json"]


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"ttl_s": "x"}', b"\xff"])
def test_damaged_facts_are_forgotten_and_said_so(tmp_path, content):
    (tmp_path / "memory.json").write_bytes(content)
    facts, why = state.load_remembered(tmp_path)
    assert facts == state.Remembered()
    assert why.startswith(f"{tmp_path}/memory.json: is damaged")


def test_facts_of_a_newer_version_are_read(tmp_path):
    (tmp_path / "memory.json").write_text(json.dumps({"ttl_s": 5, "later": {"x": 1}}))
    assert state.load_remembered(tmp_path)[0].ttl_s == 5


def test_a_write_that_fails_leaves_the_old_content(tmp_path):
    """A writer that may not write more than a few bytes (RLIMIT_FSIZE) stands for a full disk."""
    path = tmp_path / "memory.json"
    state.write_atomically(path, b"old")
    script = ("import resource, signal, sys; from pathlib import Path; from pgha.config.state import write_atomically\n"
              "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (10, 10))\n"
              "write_atomically(Path(sys.argv[1]), b'x' * 100)")
    done = subprocess.run([sys.executable, "-B", "-c", script, str(path)], capture_output=True, text=True, cwd=Path(__file__).parents[2], timeout=30)
    assert "OSError: [Errno 27]" in done.stderr
    assert path.read_bytes() == b"old"
