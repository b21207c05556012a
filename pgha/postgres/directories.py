"""Whole data directories: what is there, how big, put aside, swapped in, deleted. The only copy is never removed here
by accident: deletion is its own call, with the path spelt out.

Names beside `<data_dir>`: `.clone` (being filled; the file `.clone.whole` says that it is whole and on disk), `.old`,
`.old.1`, … (replaced by a clone; the caller deletes it once the new one streams), `.removing`, … (being deleted),
`.failed`, `.failed.1`, … (kept for people, never removed), the file `.bootstrapping` (a cluster is being made there, or a
copy by a program that writes to the data directory itself).

A name alone gives nobody the right to delete: people move directories to `.old`, too. What may go carries the file
`pgha.replaced`, which was written before the rename and names the directory that it was to become.

Rules of this file:
* Renames happen within one parent directory and are fsynced.
* What takes long runs in a thread in small pieces, between which a cancel works.
* Deleting never leaves the tree: a symbolic link is removed, what it points to only if the caller names it.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Literal

import trio

from pgha.errors import PostgresError
from pgha.postgres.files import remove_file, sync_directory, write_file
from pgha.postgres.processes import living_processes
from pgha.postgres.threads import InThread, in_thread

#: How many entries a thread handles before the loop may cancel.
_PIECE_ENTRIES = 500

#: In a directory that may be deleted: its first line is the name which we gave the directory, its second says why.
REPLACED = "pgha.replaced"

Content = Literal["missing", "empty", "valid", "partial"]
#: How far a bootstrap came that was not seen through to the first start: "" is no bootstrap. Or a copy that is made in
#: place: "copying" from nothing, "copying over" what was there.
Bootstrapping = Literal["", "making", "made", "copying", "copying over"]


def clone_directory(data_dir: Path) -> Path:
    """Where a clone is filled, until it is whole."""
    return data_dir.with_name(data_dir.name + ".clone")


def whole_marker(data_dir: Path) -> Path:
    """A file beside the clone, since what is in the clone comes with the copy: it is whole, and on disk."""
    return data_dir.with_name(data_dir.name + ".clone.whole")


def bootstrap_marker(data_dir: Path) -> Path:
    """A file beside the data directory (initdb wants an empty one), from before initdb until the first start."""
    return data_dir.with_name(data_dir.name + ".bootstrapping")


def note_bootstrap(data_dir: Path, stage: Bootstrapping, *, replaces: str = "", which_was: Bootstrapping = "") -> None:
    """"making", "copying": what is there is nobody's if we die. "made": whole, but the store has not been told of it.

    `replaces`: where what was there before a copy is now, or about to be, and the mark that it had: `bring_back`.
    """
    write_file(bootstrap_marker(data_dir), f"{stage}\n" + (f"{replaces}\n{which_was}\n" if replaces else ""), mode=0o600)


def bootstrapping(data_dir: Path) -> Bootstrapping:
    """How far a bootstrap of this directory came. What cannot be read counts as "making"."""
    try:
        return _stage_of(_mark(data_dir)[0])
    except FileNotFoundError:
        return ""


def replaced_by_copy(data_dir: Path) -> str:
    """The name beside the data directory of what a copy in place, which has not ended, is to replace; "": of nothing."""
    try:
        stage, name, _ = _mark(data_dir)
    except FileNotFoundError:
        return ""
    return name if stage == "copying" and re.fullmatch(rf"{re.escape(data_dir.name)}\.old(\.\d+)?", name) else ""


def _mark(data_dir: Path) -> tuple[str, str, str]:
    lines = [line.strip() for line in bootstrap_marker(data_dir).read_text(errors="replace").splitlines()]
    stage, replaces, which_was = (*lines, "", "", "")[:3]
    return stage, replaces, which_was


def _stage_of(text: str) -> Bootstrapping:
    known: dict[str, Bootstrapping] = {"made": "made", "copying": "copying", "copying over": "copying over"}
    return known.get(text, "making")


def end_bootstrap(data_dir: Path) -> None:
    """The directory is in use now, or is gone."""
    remove_file(bootstrap_marker(data_dir))


def content(data_dir: Path) -> Content:
    """"valid" has what a server needs to begin to start; "partial" has something else. OSError: it cannot be said.

    `lost+found`, and empty pg_wal and tablespace mount points do not count as content.
    """
    try:
        names = {entry.name for entry in os.scandir(data_dir) if entry.name != "lost+found"}
    except FileNotFoundError:
        return "missing"
    if not names:
        return "empty"
    # pg_control is written last by initdb and by pg_basebackup, so that it stands for the rest.
    whole = (data_dir / "PG_VERSION").is_file() and (data_dir / "global" / "pg_control").is_file()
    return "valid" if whole else "partial"


def major_version(data_dir: Path) -> int:
    """15; 0 if there is no PG_VERSION or it says nothing of use."""
    try:
        return int((data_dir / "PG_VERSION").read_text().split(".")[0])
    except (OSError, ValueError):
        return 0


def _free_name(data_dir: Path, suffix: str) -> Path:
    """data_dir.failed, data_dir.failed.1, …: the first that is not taken."""
    candidate = data_dir.with_name(f"{data_dir.name}.{suffix}")
    number = 0
    while os.path.lexists(candidate):
        number += 1
        candidate = data_dir.with_name(f"{data_dir.name}.{suffix}.{number}")
    return candidate


def _put_aside(data_dir: Path, suffix: str, *, to_be_deleted: str = "", before: Callable[[Path], None] | None = None) -> Path:
    """Rename within the parent, durably. `to_be_deleted`: why it may be, later (the mark is on disk before the rename).

    `before`: what is to be on disk when the rename is, given the new name.
    """
    if living := living_processes(data_dir):
        raise PostgresError(f"{data_dir} is in use by processes {living}")
    if data_dir.is_mount():
        raise PostgresError(f"{data_dir} is a mount point and cannot be renamed: use a directory inside it")
    if data_dir.is_symlink() and to_be_deleted:
        raise PostgresError(f"{data_dir} is a symbolic link: name the directory itself")
    aside = _free_name(data_dir, suffix)
    if to_be_deleted:
        write_file(data_dir / REPLACED, f"{aside.name}\n{to_be_deleted}\n")
    else:
        remove_file(data_dir / REPLACED)    # of a swap that was cut off before its rename
    if before is not None:
        before(aside)
    data_dir.rename(aside)
    sync_directory(data_dir.parent)
    return aside


def move_to_failed(data_dir: Path) -> Path:
    """Put the directory aside for people to look at; its new name. PostgresError while a server runs in it.

    Symbolic links inside (pg_wal, tablespaces) go on pointing to where they did.
    """
    return _put_aside(data_dir, "failed")


def move_to_removing(data_dir: Path, why: str) -> Path:
    """The first step of deleting a data directory: from here on it is never taken for one. Its new name."""
    return _put_aside(data_dir, "removing", to_be_deleted=why)


def move_to_old(data_dir: Path, why: str) -> Path:
    """Out of the way of a copy that is made in its place; deleted once that streams, or brought back. Its new name.

    The mark says so before it is done: `bring_back` knows what there is to be brought back, wherever this is cut off.
    """
    was = bootstrapping(data_dir)
    return _put_aside(data_dir, "old", to_be_deleted=why,
                      before=lambda aside: note_bootstrap(data_dir, "copying", replaces=aside.name, which_was=was))


def bring_back(data_dir: Path, *, ours: bool) -> Path | None:
    """What a copy in place was to replace is in place again, under the mark that it had; where what the copy has made is now.

    `ours`: nobody else can have put it there: it may be deleted. Else it is kept as `.failed`.
    Nothing is deleted here, and wherever it is cut off it can be called again: what carries REPLACED with the name that the
    mark gives is what was there before, under either name. PostgresError while a server runs in it.
    """
    old = data_dir.with_name(replaced_by_copy(data_dir))
    was = _stage_of(_mark(data_dir)[2]) if _mark(data_dir)[2] else ""
    half: Path | None = None
    is_in_place = not os.path.lexists(old) and _replaced_name(data_dir) == old.name     # again, or still
    if not is_in_place and content(data_dir) not in ("missing", "empty"):
        half = move_to_removing(data_dir, "half a copy") if ours and not data_dir.is_symlink() else move_to_failed(data_dir)
    if not is_in_place and _may_be_deleted(old):
        old.rename(data_dir)      # only over an empty directory
        sync_directory(data_dir.parent)
        is_in_place = True
    if is_in_place and was:
        note_bootstrap(data_dir, was)
    else:
        end_bootstrap(data_dir)
    remove_file(data_dir / REPLACED)
    return half


async def complete_clone(data_dir: Path, identity: str, *, in_thread: InThread = in_thread) -> None:
    """The clone is filled: bring all of it to disk, then say so. `identity` is its system identifier."""
    clone = clone_directory(data_dir)
    if content(clone) != "valid":
        raise PostgresError(f"{clone} is {content(clone)}, not a whole data directory")
    await sync_tree(clone, in_thread=in_thread)
    write_file(whole_marker(data_dir), identity + "\n", mode=0o600)


async def delete_clone(data_dir: Path, *, in_thread: InThread = in_thread) -> None:
    """Whatever an earlier clone left that is not in place: first the word that it is whole, then itself."""
    remove_file(whole_marker(data_dir))
    await delete_tree(clone_directory(data_dir), in_thread=in_thread)


def completed_clone(data_dir: Path) -> str:
    """The system identifier of a whole clone that was not swapped in; "" if there is none."""
    try:
        identity = whole_marker(data_dir).read_text(errors="replace").strip()
    except FileNotFoundError:
        return ""
    return identity if content(clone_directory(data_dir)) == "valid" else ""


def swap_in_clone(data_dir: Path) -> Path | None:
    """`<data_dir>.clone`, completed, becomes the data directory; where the old one is now, or None if there was none.

    Between the two renames there is no data directory: whoever starts then finds the clone, whole, under its own name
    (`unfinished_swap`).
    """
    clone = clone_directory(data_dir)
    if not (identity := completed_clone(data_dir)):
        raise PostgresError(f"{clone} is not a whole data directory")
    old = None
    if content(data_dir) in ("valid", "partial"):
        why = "" if data_dir.is_symlink() else f"replaced by a clone of system {identity}"     # only the link moves: keep it
        old = _put_aside(data_dir, "old", to_be_deleted=why)
    clone.rename(data_dir)  # also over an empty directory
    sync_directory(data_dir.parent)
    remove_file(whole_marker(data_dir))
    return old


def unfinished_swap(data_dir: Path) -> bool:
    """Was a swap interrupted before its last rename, with nothing in place? Then `swap_in_clone` finishes it."""
    return content(data_dir) == "missing" and bool(completed_clone(data_dir))


def _may_be_deleted(path: Path) -> bool:
    """Is it a directory that we put aside under this very name, to be deleted?"""
    return not path.is_symlink() and _replaced_name(path) == path.name


def _replaced_name(path: Path) -> str:
    """The name that it was given when it was put aside, or about to be; "" if it was not."""
    try:
        return (path / REPLACED).read_text(errors="replace").split("\n")[0]
    except (FileNotFoundError, NotADirectoryError):
        return ""


def replaced_directories(data_dir: Path, *suffixes: Literal["old", "removing"]) -> list[Path]:
    """What we put aside under these suffixes, and nobody has deleted yet. Never what others moved there."""
    names = re.compile(rf"{re.escape(data_dir.name)}\.(?:{'|'.join(suffixes)})(?:\.\d+)?")
    try:
        found = [data_dir.with_name(entry.name) for entry in os.scandir(data_dir.parent) if names.fullmatch(entry.name)]
    except FileNotFoundError:
        return []
    return sorted(path for path in found if _may_be_deleted(path))


def _walk(top: Path) -> Iterator[os.DirEntry[str]]:
    """Every entry below `top`, directories after what is in them; symbolic links are entries, never followed."""
    try:
        entries = list(os.scandir(top))
    except FileNotFoundError:
        return
    for entry in entries:
        if entry.is_dir(follow_symlinks=False):
            yield from _walk(Path(entry.path))
        yield entry


async def _in_pieces(steps: Iterator[int], in_thread: InThread) -> int:
    """Add up what `steps` yields, in a thread, cancellable between pieces."""
    total = 0

    def piece() -> bool:
        nonlocal total
        for count, amount in enumerate(steps, 1):
            total += amount
            if count == _PIECE_ENTRIES:
                return True
        return False

    while await in_thread(piece):
        await trio.lowlevel.checkpoint()
    return total


def linked_directories(data_dir: Path) -> list[Path]:
    """Where pg_wal and the tablespaces really are, if outside the tree."""
    links = [data_dir / "pg_wal"]
    if (data_dir / "pg_tblspc").is_dir():
        links += sorted((data_dir / "pg_tblspc").iterdir())
    return [path.resolve() for path in links if path.is_symlink()]


async def size_bytes(data_dir: Path, *, linked: bool = True, in_thread: InThread = in_thread) -> int:
    """Bytes used by the directory and, if `linked`, its WAL and tablespaces elsewhere. Files that vanish count as nothing."""
    def sizes() -> Iterator[int]:
        for top in (data_dir, *(linked_directories(data_dir) if linked else ())):
            for entry in _walk(top):
                try:
                    yield entry.stat(follow_symlinks=False).st_blocks * 512
                except FileNotFoundError:
                    yield 0
    return await _in_pieces(sizes(), in_thread)


def free_bytes(path: Path) -> int:
    """Space that we may still use on the file system of `path` or of its nearest parent that exists."""
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


async def sync_tree(top: Path, *, in_thread: InThread = in_thread) -> None:
    """fsync every file and directory of a tree, its WAL and its tablespaces."""
    def steps() -> Iterator[int]:
        for root in (top, *linked_directories(top)):
            for entry in _walk(root):
                if entry.is_file(follow_symlinks=False):
                    fd = os.open(entry.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
                    try:
                        os.fsync(fd)
                    finally:
                        os.close(fd)
                elif entry.is_dir(follow_symlinks=False):
                    sync_directory(Path(entry.path))
                yield 1
            sync_directory(root)
            yield 1
    await _in_pieces(steps(), in_thread)
    sync_directory(top.parent)


async def empty_out(data_dir: Path, *, in_thread: InThread = in_thread) -> None:
    """Delete what is in the data directory, not itself: only for what a copy in place has just made there out of nothing,
    where the directory cannot be renamed."""
    if living := living_processes(data_dir):
        raise PostgresError(f"{data_dir} is in use by processes {living}")

    await _in_pieces(_deletions(data_dir, spare=data_dir / "lost+found"), in_thread)


def _deletions(root: Path, *, spare: Path) -> Iterator[int]:
    """Delete what is below `root`, except `spare` itself; one step for each entry."""
    spared = str(spare)
    for entry in _walk(root):
        if entry.path == spared:
            continue
        if entry.is_dir(follow_symlinks=False):
            os.rmdir(entry.path)  # noqa: PTH106  (entry.path is a str)
        else:
            os.unlink(entry.path)  # noqa: PTH108  (entry.path is a str)
        yield 1


async def delete_tree(top: Path, *, also: Iterable[Path] = (), in_thread: InThread = in_thread) -> None:
    """Delete a directory tree. PostgresError while a server runs in it; OSError if something cannot be removed.

    `also`: targets of its links (from `linked_directories`) whose *content* is deleted, too; other link targets stay.
    The mark that says it may be deleted goes last: what was cut off can be finished.
    """
    if top.is_symlink():
        raise PostgresError(f"{top} is a symbolic link: name the directory itself")
    if living := living_processes(top):
        raise PostgresError(f"{top} is in use by processes {living}")
    outside = list(also)
    assert all(path in linked_directories(top) for path in outside), outside

    for root in (*outside, top):
        await _in_pieces(_deletions(root, spare=top / REPLACED), in_thread)
    if top.exists():
        remove_file(top / REPLACED)
        top.rmdir()
        sync_directory(top.parent)
