"""Wherever a copy in place, or its undoing, is cut off: is what was there before back under its own name and mark?"""

from __future__ import annotations

import pytest

from pgha.postgres import directories
from pgha.postgres.directories import REPLACED

pytestmark = pytest.mark.postgres


def only_named(data, old):
    """Cut off before the mark: nothing has happened."""
    (data / REPLACED).write_text("data.old\nwhy\n")


def marked(data, old):
    only_named(data, old)
    mark_of(data).write_text(f"copying\ndata.old\n{mark_of(data).read_text() if mark_of(data).exists() else ''}")


def moved(data, old):
    marked(data, old)
    data.rename(old)


def made(data, old):
    moved(data, old)
    data.mkdir()


def half(data, old):
    made(data, old)
    (data / "half").touch()
    (data / REPLACED).write_text("data.old.7\nfrom where it was copied\n")


def half_named(data, old):
    half(data, old)
    (data / REPLACED).write_text("data.removing\nhalf a copy\n")


def half_moved(data, old):
    half_named(data, old)
    data.rename(data.with_name("data.removing"))


def back(data, old):
    half_moved(data, old)
    old.rename(data)


def mark_of(data):
    return directories.bootstrap_marker(data)


@pytest.mark.parametrize("ours", [True, False])
@pytest.mark.parametrize("was", ["", "copying over", "made"])
@pytest.mark.parametrize("cut", [marked, moved, made, half, half_named, half_moved, back])
def test_what_was_there_comes_back(base, cut, was, ours):
    data, old = base / "data", base / "data.old"
    data.mkdir()
    (data / "of_the_old").touch()
    if was:
        directories.note_bootstrap(data, was)
    cut(data, old)
    assert directories.replaced_by_copy(data) == "data.old" and directories.bootstrapping(data) == "copying"
    aside = directories.bring_back(data, ours=ours)
    assert sorted(path.name for path in data.iterdir()) == ["of_the_old"] and not old.exists()
    assert directories.bootstrapping(data) == was and directories.replaced_by_copy(data) == ""
    assert (aside is not None) == (cut in (half, half_named))
    if aside is not None:
        assert aside.name == ("data.removing" if ours else "data.failed") and (aside / "half").exists()
        assert (aside in directories.replaced_directories(data, "removing")) == ours


@pytest.mark.parametrize("was", ["", "copying over"])
def test_making_way_says_first_what_it_does(base, was):
    """What is on disk at the rename is what the table above begins with."""
    data, old = base / "data", base / "data.old"
    data.mkdir()
    (data / "of_the_old").touch()
    if was:
        directories.note_bootstrap(data, was)
    assert directories.move_to_old(data, "why") == old
    assert mark_of(data).read_text().split("\n")[:3] == ["copying", "data.old", was]
    assert (old / REPLACED).read_text().startswith("data.old\n") and not data.exists()


def test_what_people_have_taken_does_not_come_back(base):
    """Its place is free for the next copy; what is there may be theirs."""
    data = base / "data"
    data.mkdir()
    half(data, base / "data.old")
    (base / "data.old").rename(base / "rescued")
    aside = directories.bring_back(data, ours=False)
    assert aside == base / "data.failed" and not data.exists() and directories.bootstrapping(data) == ""


@pytest.mark.parametrize("name", ["", "data", "other.old", "../data.old", "data.old/x", "data.older"])
def test_a_mark_names_only_what_we_name(base, name):
    directories.bootstrap_marker(base / "data").write_text(f"copying\n{name}\n\n")
    assert directories.replaced_by_copy(base / "data") == "" and directories.bootstrapping(base / "data") == "copying"
