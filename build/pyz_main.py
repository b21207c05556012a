"""How does pgha.pyz start? This file is `__main__.py` in the archive.

pgha itself runs straight from the archive. The bundled packages cannot (some are C extensions, which the system loads
only from files), so they are unpacked once per build and Python version into a cache directory, and only when somebody
needs them: `guard`, `--version`, `--help` never do; `ctl` uses what is there and unpacks only if it imports one of
them; everything else has them, and its own copy of pgha, unpacked before it starts, so that an archive replaced under
a running agent disturbs nothing.

Rules of this file:
* the standard library only, and little of it: the guard and `ctl` pay for every import here.
* nothing of the machine's site-packages, PYTHONPATH or current folder is ever imported: `sys.path` is rebuilt.
* a cache directory is used only if it is ours, closed to others, and on a file system that may execute. Its files are
  checked by size at every start (a cleaner of /tmp, a full disk or a power cut may have taken some), and it is held by
  a shared flock while it is in use, which systemd-tmpfiles and our own sweeping of old builds respect.
"""

from __future__ import annotations

import fcntl
import os
import stat
import sys

#: Written by build/pyz: hash of the contents, and the top-level names of the bundled packages.
BUILD = "@BUILD@"
BUNDLED = frozenset("@BUNDLED@".split())  # noqa: SIM905  (a text to replace)

#: Absolute, because programs change their directory.
ARCHIVE = os.path.abspath(sys.path[0])

#: Commands that never need the bundled packages (the empty one prints the usage).
_LEAN = frozenset(("", "guard", "--version", "--help", "-h"))

_LOCK_WAIT_S = 30
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_held: list[int] = []


class _OnDemand:
    """First on `sys.meta_path`: unpacks when the first bundled package is imported, then steps aside."""

    def find_spec(self, name: str, _path: object = None, _target: object = None) -> None:
        if name.partition(".")[0] in BUNDLED:
            sys.meta_path.remove(self)
            sys.path.insert(0, unpacked())


def candidates() -> list[str]:
    """Where the cache may lie, best first. Of a list (RUNTIME_DIRECTORY may be one), the first."""
    if os.environ.get("PGHA_CACHE"):
        return [os.environ["PGHA_CACHE"]]  # said by the operator: this or nothing
    named = [os.environ.get(key, "").split(":")[0] for key in ("CACHE_DIRECTORY", "RUNTIME_DIRECTORY", "XDG_CACHE_HOME")]
    return [path for path in named if path.startswith("/")] + [f"/tmp/pgha-{os.getuid()}"]


def unpacked() -> str:
    """The directory with pgha and the packages for this Python, made if it is not there. Exits if there can be none."""
    refused = []
    for base in candidates():
        try:
            return _make(base)
        except OSError as error:
            refused.append(f"  {base}: {error.strerror or error}")
    sys.stderr.write("pgha: no directory to unpack the bundled packages into:\n" + "\n".join(refused)
                     + "\nset PGHA_CACHE to a directory that this user owns\n")
    raise SystemExit(1)


def ready() -> str | None:
    """The same directory if it is complete already; changes nothing."""
    for base in candidates():
        try:
            _must_be_safe(base)
        except OSError:
            continue
        if _take(_home(base)):
            return _home(base)
    return None


def _home(base: str) -> str:
    return f"{base}/{BUILD}-{sys.implementation.cache_tag}"


def _must_be_safe(base: str) -> None:
    found = os.lstat(base)
    if not stat.S_ISDIR(found.st_mode):
        raise OSError(0, "not a directory")
    if found.st_uid != os.getuid():
        raise OSError(0, "belongs to another user")
    if found.st_mode & 0o022:
        raise OSError(0, "others may write to it")
    if os.statvfs(base).f_flag & os.ST_NOEXEC:
        raise OSError(0, "on a file system mounted noexec")


def _take(home: str) -> bool:
    """True if `home` is complete, and then it is held until this process ends."""
    try:
        fd = os.open(home, _DIRECTORY)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)  # taken exclusively: being swept
        with open(f"{home}/.complete", encoding="utf-8") as manifest:
            for line in manifest:
                size, _, path = line.rstrip("\n").partition(" ")
                if os.lstat(f"{home}/{path}").st_size != int(size):
                    raise FileNotFoundError(path)
    except OSError:
        os.close(fd)
        return False
    _held.append(fd)
    return True


def _make(base: str) -> str:
    os.makedirs(base, mode=0o700, exist_ok=True)
    _must_be_safe(base)
    home = _home(base)
    if not _take(home):
        lock = os.open(f"{base}/.lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            _lock_exclusively(lock)
            if not _take(home):  # nobody else made it meanwhile
                _unpack_into(base, home)
                if not _take(home):
                    raise OSError(0, "unpacked files vanished at once")
        finally:
            os.close(lock)
    sys.dont_write_bytecode = False  # the cache is ours: compiled once, whatever the environment says
    return home


def _lock_exclusively(fd: int) -> None:
    import time

    give_up_at = time.monotonic() + _LOCK_WAIT_S
    while True:
        try:
            return fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:  # flock has no timeout, and an alarm would be the whole process's
            if time.monotonic() > give_up_at:
                raise OSError(0, f"another process has been unpacking for {_LOCK_WAIT_S} s") from None
            time.sleep(0.02)


def _unpack_into(base: str, home: str) -> None:
    """Make `home`, aside first. The lock is held."""
    import shutil

    _sweep(base)
    aside = f"{home}.new"
    os.mkdir(aside, 0o700)
    try:
        _extract(aside)
        if os.path.lexists(home):  # incomplete: somebody cleaned in it
            os.rename(home, f"{home}.old")
        os.rename(aside, home)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        shutil.rmtree(f"{home}.old", ignore_errors=True)


def _extract(target: str) -> None:
    import io
    import zipfile

    manifest: list[str] = []

    def put(path: str, content: bytes) -> None:
        place = f"{target}/{path}"
        os.makedirs(os.path.dirname(place), mode=0o700, exist_ok=True)
        with open(os.open(place, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb") as file:
            file.write(content)
        manifest.append(f"{len(content)} {path}\n")

    tag = f"cp{sys.version_info[0]}{sys.version_info[1]}"
    with zipfile.ZipFile(ARCHIVE) as archive:
        names = archive.namelist()
        if f"lib/{tag}.zip" not in names:
            supported = sorted(name[4:-4] for name in names if name.startswith("lib/cp"))
            raise SystemExit(f"pgha: made for {', '.join(supported)}, this Python is {tag}")
        for part in ("lib/common.zip", f"lib/{tag}.zip"):
            with zipfile.ZipFile(io.BytesIO(archive.read(part))) as packages:
                for name in packages.namelist():
                    put(name, packages.read(name))
        for name in names:
            if name.startswith("pgha/"):
                put(name, archive.read(name))
    put(".complete", "".join(manifest).encode())


def _sweep(base: str) -> None:
    """Remove what other builds and broken attempts left, except what a process still uses. The lock is held."""
    import re
    import shutil

    for name in os.listdir(base):
        if not re.fullmatch(r"[0-9a-f]{12}-[a-z]+-[0-9]+(\.new|\.old)?", name):
            continue
        if name.startswith(BUILD) and not name.endswith((".new", ".old")):
            continue
        fd = os.open(f"{base}/{name}", _DIRECTORY)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(f"{base}/{name}")
        except BlockingIOError:
            pass  # in use: whoever comes after it sweeps
        finally:
            os.close(fd)


def _only_ours() -> None:
    """`sys.path`: this archive and the standard library."""
    library = os.path.dirname(os.__file__)
    sys.path[:] = [ARCHIVE] + [
        path for path in sys.path[1:] if path == library or path.endswith(("/lib-dynload", f"/python{sys.version_info[0]}{sys.version_info[1]}.zip"))
    ]


def main() -> int:
    if sys.version_info < (3, 11) or not sys.platform.startswith("linux"):
        raise SystemExit("pgha: needs CPython 3.11 or later on Linux")
    _only_ours()
    command = sys.argv[1] if len(sys.argv) > 1 else ""
    if command not in _LEAN:
        home = ready() if command == "ctl" else unpacked()
        if home:
            sys.path.insert(0, home)
    if command in _LEAN or not home:
        sys.meta_path.insert(0, _OnDemand())
    from pgha.__main__ import main as run

    return run(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
