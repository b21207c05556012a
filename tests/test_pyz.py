"""Is dist/pgha.pyz one file that starts everywhere it promises to? Built here, run as its users will."""

from __future__ import annotations

import fcntl
import os
import select
import shutil
import subprocess
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from pgha import __version__

ROOT = Path(__file__).parents[1]
SYSTEM_PYTHON = "/usr/bin/python3"
AS_POSTGRES = {"user": "postgres", "group": "postgres", "extra_groups": []} if os.getuid() == 0 else {}
UNPACK = """
import sys, zipimport
sys.path[0] = sys.argv[1]
boot = {"__name__": "boot"}
exec(zipimport.zipimporter(sys.argv[1]).get_code("__main__"), boot)
home = boot["unpacked"]()
print(home, flush=True)
"""
IMPORT_EVERYTHING = UNPACK + """
import importlib, pkgutil
boot["_only_ours"]()
sys.path.insert(0, home)
for name in sorted(boot["BUNDLED"]):
    module = importlib.import_module(name)
    assert module.__file__.startswith(home + "/"), module.__file__
import psycopg.pq, msgspec
assert psycopg.pq.__impl__ == "binary", psycopg.pq.__impl__
assert msgspec.json.decode(b"[1]") == [1]
"""
HOLD = UNPACK + "sys.stdin.read()"


def copy_of_the_checkout(source: Path, target: Path) -> Path:
    """What the archive is made from: somebody may be editing the checkout while its tests run."""
    target.mkdir()
    for name in ("pgha", "build"):
        shutil.copytree(source / name, target / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(source / "LICENSE", target)
    (target / "var").symlink_to(ROOT / "var")
    (target / ".venv").symlink_to(ROOT / ".venv")  # only for downloading, when var/wheels has not got all
    return target


def build(checkout: Path, **environment: str) -> bytes:
    answer = subprocess.run([checkout / "build/pyz"], env={"PATH": os.defpath} | environment, capture_output=True, text=True, timeout=120, check=False)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    return (checkout / "dist/pgha.pyz").read_bytes()


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_of_the_checkout(ROOT, tmp_path_factory.mktemp("pyz") / "checkout")


@pytest.fixture(scope="module")
def folder(checkout: Path) -> Iterator[Path]:
    """A folder that user postgres can enter, with nothing but the archive in it."""
    path = Path(f"/tmp/pgha-test-pyz-{os.getpid()}")
    path.mkdir(mode=0o755)
    build(checkout)
    shutil.copy(checkout / "dist/pgha.pyz", path)
    yield path
    shutil.rmtree(path)


@pytest.fixture
def cache(folder: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A cache directory of user postgres, not made yet."""
    parent = folder / "caches"
    parent.mkdir(exist_ok=True)
    if AS_POSTGRES:
        shutil.chown(parent, "postgres", "postgres")
    path = parent / request.node.name.replace("/", "-")
    yield path
    shutil.rmtree(path, ignore_errors=True)


def run(folder: Path, *command: str | Path, python: tuple[str, ...] = (SYSTEM_PYTHON,), **environment: str) -> subprocess.CompletedProcess[str]:
    """The archive as postgres, with only this environment, in its folder."""
    return subprocess.run([*python, folder / "pgha.pyz", *command], cwd=folder, env=environment, capture_output=True, text=True, timeout=60, check=False, **AS_POSTGRES)


def script(folder: Path, text: str, *, python: str = SYSTEM_PYTHON, **environment: str) -> list[str]:
    return [python, "-IS", "-c", text, str(folder / "pgha.pyz")]


def unpack(folder: Path, cache: Path, text: str = UNPACK, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(script(folder, text), cwd=folder, env={"PGHA_CACHE": str(cache)} | environment, capture_output=True, text=True, timeout=60, check=False, **AS_POSTGRES)


def interpreters() -> list[str]:
    """Every CPython 3.11 to 3.14 of this machine, one a version."""
    found = {}
    places = [Path(SYSTEM_PYTHON), *sorted(Path("/root/.pyenv/versions").glob("3.1[1-4].*/bin/python3")), *(Path(f"/usr/{where}bin/python3.{minor}") for where in ("", "local/") for minor in range(11, 15))]
    for place in places:
        try:
            version = subprocess.run([place, "-IS", "-c", "import sys; print('%d.%d' % sys.version_info[:2])"], capture_output=True, text=True, timeout=20, check=True).stdout.strip()
        except (OSError, subprocess.SubprocessError):
            continue
        if version in ("3.11", "3.12", "3.13", "3.14"):
            found.setdefault(version, str(place))
    return [found[version] for version in sorted(found)]


def test_two_builds_give_the_same_bytes(checkout: Path, folder: Path, tmp_path: Path) -> None:
    """Also from another place, at another time, with another environment."""
    elsewhere = copy_of_the_checkout(checkout, tmp_path / "elsewhere")
    again = build(elsewhere, TZ="Asia/Kathmandu", PYTHONHASHSEED="7", LC_ALL="C", HOME="/nonexistent")
    assert again == (folder / "pgha.pyz").read_bytes()
    assert len(again) < 9_000_000, f"{len(again)} bytes: what came in?"


def test_it_contains_what_is_named_and_nothing_compiled(folder: Path) -> None:
    with zipfile.ZipFile(folder / "pgha.pyz") as archive:
        names = archive.namelist()
        assert {"__main__.py", "LICENSE", "lib/common.zip", "lib/cp311.zip", "lib/cp312.zip", "lib/cp313.zip", "lib/cp314.zip"} <= set(names)
        assert not [name for name in names if name.endswith(".pyc") or "test" in name]


@pytest.mark.parametrize("environment", [{}, {"HOME": "/nonexistent"}, {"HOME": "/proc"}], ids=["HOME unset", "HOME missing", "HOME read-only"])
@pytest.mark.parametrize("python", [(), (SYSTEM_PYTHON,), (SYSTEM_PYTHON, "-IS")], ids=["by its first line", "python3", "python3 -IS"])
def test_version_needs_nothing_and_leaves_nothing(folder: Path, python: tuple[str, ...], environment: dict[str, str]) -> None:
    before = sorted(folder.iterdir())
    answer = run(folder, "--version", python=python, **environment)
    assert (answer.returncode, answer.stdout, answer.stderr) == (0, f"pgha {__version__}\n", "")
    assert sorted(folder.iterdir()) == before


def test_commands_of_the_guard_and_of_help_unpack_nothing(folder: Path) -> None:
    for command in (["--help"], ["guard", "--help"], ["ctl", "--help"]):
        answer = run(folder, *command, PGHA_CACHE="/proc/nowhere")
        assert answer.returncode == 0, (command, answer.stderr)


@pytest.mark.parametrize("python", interpreters())
def test_all_bundled_packages_import(folder: Path, tmp_path: Path, python: str) -> None:
    """As root where the interpreter lies in root's home."""
    who = AS_POSTGRES if python.startswith("/usr/bin/") else {}
    cache = folder / "caches-of-interpreters" / Path(python).parts[-3]
    cache.parent.mkdir(exist_ok=True, mode=0o777)
    cache.parent.chmod(0o777)
    for attempt in ("cold", "warm"):
        answer = subprocess.run(script(folder, IMPORT_EVERYTHING, python=python), cwd=folder, env={"PGHA_CACHE": str(cache)}, capture_output=True, text=True, timeout=120, check=False, **who)
        assert answer.returncode == 0, (attempt, answer.stderr)


def test_four_first_starts_at_once_share_one_directory(folder: Path, cache: Path) -> None:
    starts = [
        subprocess.Popen(script(folder, IMPORT_EVERYTHING), cwd=folder, env={"PGHA_CACHE": str(cache)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **AS_POSTGRES)
        for _ in range(4)
    ]
    answers = [(*start.communicate(timeout=120), start.returncode) for start in starts]
    assert [code for _, _, code in answers] == [0] * 4, answers
    assert len({out for out, _, _ in answers}) == 1
    left = sorted(path.name for path in cache.iterdir())
    assert len(left) == 2, left
    assert left[0] == ".lock"


def test_what_was_removed_or_cut_off_is_unpacked_again(folder: Path, cache: Path) -> None:
    home = Path(unpack(folder, cache).stdout.strip())
    (home / "trio/__init__.py").unlink()
    assert unpack(folder, cache, IMPORT_EVERYTHING).returncode == 0
    (home / "httpx/__init__.py").write_bytes(b"")
    assert unpack(folder, cache, IMPORT_EVERYTHING).returncode == 0
    shutil.rmtree(home)
    assert unpack(folder, cache, IMPORT_EVERYTHING).returncode == 0
    assert {path.name for path in cache.iterdir()} == {".lock", home.name}


def test_other_builds_are_swept_unless_somebody_uses_them(folder: Path, cache: Path) -> None:
    cache.mkdir(mode=0o700)
    names = ["0123456789ab-cpython-311", "00000000aaaa-cpython-312", "0123456789ab-cpython-311.new"]
    for name in [*names, "of-somebody-else"]:
        (cache / name).mkdir()
    for path in (cache, *cache.iterdir()):
        if AS_POSTGRES:
            shutil.chown(path, "postgres", "postgres")
    used = os.open(cache / names[0], os.O_RDONLY)
    try:
        fcntl.flock(used, fcntl.LOCK_SH)
        answer = unpack(folder, cache)
        assert answer.returncode == 0, answer.stderr
        home = Path(answer.stdout.strip()).name
        assert {path.name for path in cache.iterdir()} == {".lock", home, names[0], "of-somebody-else"}
    finally:
        os.close(used)


def test_a_directory_in_use_is_held(folder: Path, cache: Path) -> None:
    """systemd-tmpfiles leaves alone what somebody holds by flock, and so does our own sweeping."""
    user = subprocess.Popen(script(folder, HOLD), cwd=folder, env={"PGHA_CACHE": str(cache)}, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, **AS_POSTGRES)
    assert user.stdout is not None
    assert select.select([user.stdout], [], [], 30)[0], "nothing was unpacked within 30 s"
    home = os.open(user.stdout.readline().strip(), os.O_RDONLY)
    try:
        with pytest.raises(BlockingIOError):
            fcntl.flock(home, fcntl.LOCK_EX | fcntl.LOCK_NB)
        user.communicate("", timeout=10)
        fcntl.flock(home, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        user.kill()
        user.wait()
        os.close(home)


@pytest.mark.skipif(not AS_POSTGRES, reason="needs two users")
def test_directories_that_others_could_change_are_refused(folder: Path, cache: Path) -> None:
    of_root = folder / "of-root"
    of_root.mkdir(exist_ok=True)
    answer = unpack(folder, of_root)
    assert answer.returncode == 1
    assert answer.stderr.splitlines()[1:] == [f"  {of_root}: belongs to another user", "set PGHA_CACHE to a directory that this user owns"]

    cache.mkdir()
    cache.chmod(0o777)
    shutil.chown(cache, "postgres", "postgres")
    assert "others may write to it" in unpack(folder, cache).stderr

    link = folder / "link"
    link.symlink_to(cache)
    assert "not a directory" in unpack(folder, link).stderr
    assert list(of_root.iterdir()) == list(cache.iterdir()) == []


def test_the_next_place_is_taken_where_one_cannot_be_used(folder: Path, cache: Path) -> None:
    environment = {"CACHE_DIRECTORY": "/proc/nowhere", "RUNTIME_DIRECTORY": "/nonexistent/a:/nonexistent/b", "XDG_CACHE_HOME": str(cache)}
    answer = subprocess.run(script(folder, UNPACK), cwd=folder, env=environment, capture_output=True, text=True, timeout=60, check=False, **AS_POSTGRES)
    assert Path(answer.stdout.strip()).parent == cache, answer.stderr


def test_nothing_foreign_is_imported(folder: Path, cache: Path) -> None:
    """Not from PYTHONPATH, not from the current folder: also where Python itself was not told to ignore them."""
    traps = folder / "traps"
    traps.mkdir()
    for name in ("msgspec", "trio", "json", "pgha"):
        (traps / f"{name}.py").write_text("raise SystemExit('a trap was imported')\n")
    answer = subprocess.run([SYSTEM_PYTHON, folder / "pgha.pyz", "config", "sample"], cwd=traps, env={"PGHA_CACHE": str(cache), "PYTHONPATH": str(traps)}, capture_output=True, text=True, timeout=60, check=False, **AS_POSTGRES)
    assert answer.returncode == 0, answer.stderr
    assert "scope" in answer.stdout


def test_a_sample_configuration_passes_its_own_check(folder: Path, cache: Path) -> None:
    sample = folder / "sample.toml"
    sample.write_text(run(folder, "config", "sample", PGHA_CACHE=str(cache)).stdout)
    answer = run(folder, "config", "check", sample.name, PGHA_CACHE=str(cache))
    assert answer.returncode == 0, answer.stderr
    sample.write_text(sample.read_text().replace("scope", "scoop", 1))
    answer = run(folder, "config", "check", sample.name, PGHA_CACHE=str(cache))
    assert answer.returncode == 2
    assert "scoop" in answer.stderr


def test_a_patroni_configuration_is_imported_without_yaml_on_the_machine(folder: Path, cache: Path) -> None:
    """PyYAML is in the archive (without its binding to libyaml), since nothing of the machine's packages is imported."""
    source = folder / "patroni.yml"
    source.write_text("scope: a\nname: b\nrestapi: {listen: '10.0.0.1:8008'}\netcd3: {host: '10.0.0.9:2379'}\n"
                      "postgresql: {listen: '10.0.0.1:5432', data_dir: /d, authentication: {replication: {username: r, password: hush}}}\n")
    made = cache.parent / "imported.toml"
    answer = run(folder, "config", "import", source.name, "--output", str(made), PGHA_CACHE=str(cache))
    assert (answer.returncode, answer.stderr) == (0, "")
    assert "hush" not in answer.stdout
    assert made.stat().st_mode & 0o777 == 0o600
    assert run(folder, "config", "check", str(made), PGHA_CACHE=str(cache)).returncode == 0


@pytest.mark.parametrize("command", [[], ["promote"], ["run"], ["guard", "x.toml"], ["config"], ["replay", "/nonexistent"], ["replay", "/etc/hostname"]], ids=" ".join)
def test_wrong_usage_is_two_and_no_traceback(folder: Path, cache: Path, command: list[str]) -> None:
    answer = run(folder, *command, PGHA_CACHE=str(cache))
    assert answer.returncode == 2, answer.stderr
    assert answer.stdout == ""
    assert answer.stderr != ""
    assert "Traceback" not in answer.stderr
