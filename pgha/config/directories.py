"""Where does this node keep what must not be in its data directory, and is that place safe?

    state directory    node id, remembered facts; outlives a boot. Configured, else $STATE_DIRECTORY, else <data_dir>.pgha
    runtime directory  the guard's file and socket; must be on tmpfs, since a write to a hung disk would hang the guard.
                       Configured, else $RUNTIME_DIRECTORY, else /dev/shm/pgha-<uid>/<hash of scope, name, data_dir>

Both are 0700, owned by this user, and no symbolic links (safety model 8): /dev/shm is everybody's, and whoever could
put a directory of their own there could speak for the guard. All problems are ConfigErrors.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from pgha.config.load import load
from pgha.config.local import LocalConfig
from pgha.errors import ConfigError

#: sizeof(sun_path) less the terminating NUL (unix(7))
SOCKET_PATH_LIMIT_BYTES = 107
#: The default runtime directory's parent: tmpfs on every Linux that PostgreSQL itself runs on (dynamic shared memory).
SHARED_MEMORY = Path("/dev/shm")  # noqa: S108  (private directories are made below it, and checked)
AGENT_LOCK = "agent.lock"


def state_dir(local: LocalConfig, environ: Mapping[str, str]) -> Path:
    """Where the state directory is to be; nothing is made."""
    return Path(local.pgha.state_dir or _of_systemd(environ, "STATE_DIRECTORY") or f"{local.postgresql.data_dir}.pgha")


def runtime_dir(local: LocalConfig, environ: Mapping[str, str]) -> Path:
    """Where the runtime directory is to be; nothing is made."""
    given = local.pgha.runtime_dir or _of_systemd(environ, "RUNTIME_DIRECTORY")
    if given:
        return Path(given)
    identity = f"{local.scope}\0{local.name}\0{local.postgresql.data_dir}"
    return SHARED_MEMORY / f"pgha-{os.geteuid()}" / hashlib.sha256(identity.encode()).hexdigest()[:16]


def _of_systemd(environ: Mapping[str, str], variable: str) -> str:
    """systemd gives a list separated by colons; the first is ours."""
    return environ.get(variable, "").split(":")[0]


def agent_lock(local: LocalConfig, environ: Mapping[str, str]) -> Path:
    """The file that a living agent holds locked (flock), by which the guard sees it; on tmpfs, like all that it reads."""
    return runtime_dir(local, environ) / AGENT_LOCK


def data_directory_lock(local: LocalConfig, environ: Mapping[str, str]) -> Path:
    """The file that keeps a second agent from one data directory, also one of another name (safety model 3)."""
    return state_dir(local, environ) / AGENT_LOCK


class GuardPlaces(NamedTuple):
    """What a guard works on."""

    data_dir: str
    runtime_dir: str
    agent_lock: str


def guard_places(where: str | os.PathLike[str], environ: Mapping[str, str]) -> GuardPlaces:
    """For a guard that was not told all of it: as the configuration says."""
    local = load(where, environ).local
    return GuardPlaces(local.postgresql.data_dir, str(runtime_dir(local, environ)), str(agent_lock(local, environ)))


def pgpass(local: LocalConfig, environ: Mapping[str, str]) -> Path:
    """libpq's password file for PostgreSQL's own connections; HOME may be unset, so it has a place of its own."""
    return Path(local.postgresql.pgpass) if local.postgresql.pgpass else state_dir(local, environ) / "pgpass"


def prepare_state_dir(local: LocalConfig, environ: Mapping[str, str]) -> Path:
    """Make the state directory if it is missing, and make sure of it."""
    directory = state_dir(local, environ)
    data_dir = Path(local.postgresql.data_dir)
    if data_dir.name and directory.resolve().is_relative_to(data_dir.resolve()):
        raise ConfigError(f"pgha.state_dir: {directory} lies in postgresql.data_dir, from where a clone would copy it; allowed: a directory outside")
    _private(directory, "pgha.state_dir")
    return directory


def prepare_runtime_dir(local: LocalConfig, environ: Mapping[str, str], *, must_be_tmpfs: bool = True) -> Path:
    """Make the runtime directory if it is missing, and make sure of it."""
    directory = runtime_dir(local, environ)
    if directory.parent.parent == SHARED_MEMORY and directory.parent.name == f"pgha-{os.geteuid()}":
        _private(directory.parent, "pgha.runtime_dir")
    _private(directory, "pgha.runtime_dir")
    if must_be_tmpfs and (kind := filesystem(directory)) not in {"tmpfs", "ramfs"}:
        raise ConfigError(f"pgha.runtime_dir: {directory} is on {kind or 'an unknown file system'}; allowed: a directory on tmpfs, as below /run or /dev/shm")
    return directory


def socket_path(directory: Path, name: str) -> Path:
    """`directory`/`name`, if a unix socket can have that path."""
    path = directory / name
    length = len(os.fsencode(path))
    if length > SOCKET_PATH_LIMIT_BYTES:
        raise ConfigError(f"pgha.runtime_dir: {path} has {length} bytes; allowed: {SOCKET_PATH_LIMIT_BYTES}, the most that a unix socket's path may have")
    return path


def _private(directory: Path, key: str) -> None:
    """Make `directory` (its parent must exist) and check it through one descriptor, so that nobody can swap it between."""
    remedy = f"allowed: a directory of user {os.geteuid()}'s own, or a parent that this user may write"
    try:
        directory.mkdir(mode=0o700)
    except FileExistsError:
        pass
    except OSError as error:
        raise ConfigError(f"{key}: {directory} cannot be made ({error.strerror}); {remedy}") from None
    try:
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        what = "is a symbolic link" if directory.is_symlink() else f"cannot be opened ({error.strerror})"
        raise ConfigError(f"{key}: {directory} {what}; {remedy}") from None
    try:
        found = os.fstat(descriptor)
        if found.st_uid != os.geteuid():
            raise ConfigError(f"{key}: {directory} belongs to user {found.st_uid}; {remedy}")
        if stat.S_IMODE(found.st_mode) != 0o700:
            os.fchmod(descriptor, 0o700)  # systemd makes its directories 0755
    finally:
        os.close(descriptor)


def filesystem(path: Path) -> str:
    """The type of the file system that `path` is on, as /proc/self/mountinfo names it (proc(5)); "" if it is not told."""
    real = path.resolve()
    best, kind = -1, ""
    for line in Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="surrogateescape").splitlines():
        fields, _, rest = line.partition(" - ")
        mount = Path(fields.split(" ")[4].encode("utf-8", "surrogateescape").decode("unicode_escape", "surrogateescape"))
        # A later mount on the same point hides the earlier one.
        if real.is_relative_to(mount) and len(mount.parts) >= best:
            best, kind = len(mount.parts), rest.split(" ")[0]
    return kind
