"""A systemd of its own: process 1 of a few namespaces on this machine, with the units that a test gives it and no others.

Root, util-linux, and a cgroup v2 hierarchy are needed. Nothing of the machine outside is touched: what the units write to is
tmpfs, their network is a loopback of their own, and all of it ends with the first process.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

#: Where a service of ours may write. Each is empty at first, and gone afterwards.
_PRIVATE = ("/run", "/tmp", "/var/lib/postgresql", "/var/cache", "/var/log")
_BOOT = """
set -eu
bed=$1
mount --make-rprivate /
mount -t tmpfs -o mode=755 tmpfs /run
mkdir /run/bed
mount --bind "$bed" /run/bed
for place in {private}; do
    [ -d "$place" ] || continue
    mount -t tmpfs -o mode=755 tmpfs "$place"
done
umount -R /sys/fs/cgroup
mount -t cgroup2 none /sys/fs/cgroup
ip link set lo up
install -m 755 /run/bed/pgha.pyz /run/pgha.pyz
export container=pgha-test SYSTEMD_UNIT_PATH=/run/bed/units
exec /lib/systemd/systemd --system --unit=bed.target --log-target=console --show-status=no
"""
#: In place of Debian's, which would set this machine's clock, kernel and devices.
_UNITS = {
    "bed.target": "[Unit]\nRequires=systemd-journald.service\nAfter=systemd-journald.service\n",
    **dict.fromkeys(("sysinit.target", "basic.target", "shutdown.target", "multi-user.target", "network-online.target", "remote-fs.target"),
                    "[Unit]\nDefaultDependencies=no\n"),
    "systemd-journald.socket": "[Unit]\nDefaultDependencies=no\n[Socket]\nListenStream=/run/systemd/journal/stdout\n"
                               "ListenDatagram=/run/systemd/journal/socket\nSocketMode=0666\nPassCredentials=yes\n",
    "systemd-journald.service": "[Unit]\nDefaultDependencies=no\nRequires=systemd-journald.socket\nAfter=systemd-journald.socket\n[Service]\nType=notify\n"
                                "ExecStart=/lib/systemd/systemd-journald\nStandardOutput=null\n",
}


#: The archive, inside. (A tmpfs over /usr/local/bin might hide etcd.)
PROGRAM = "/run/pgha.pyz"


class CannotBoot(Exception):
    """No systemd can be had here, and why."""


class Booted:
    """It runs from the constructor's return until `end`. CannotBoot."""

    def __init__(self, archive: Path, units: dict[str, str]) -> None:
        for program in ("unshare", "nsenter", "ip", "/lib/systemd/systemd", "/lib/systemd/systemd-journald"):
            if shutil.which(program) is None:
                raise CannotBoot(f"{program} is missing")
        if os.getuid() != 0:
            raise CannotBoot("namespaces take root")
        self.directory = Path(tempfile.mkdtemp(prefix="pgha-test-systemd-", dir="/dev/shm"))
        self.directory.chmod(0o755)
        (self.directory / "units").mkdir()
        shutil.copy(archive, self.directory / "pgha.pyz")
        for name, text in (_UNITS | units).items():
            path = self.directory / "units" / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
        self._group = self._own_group()
        with (self.directory / "console").open("wb") as console:
            self._unshare = subprocess.Popen(
                ["unshare", "--fork", "--pid", "--mount", "--uts", "--ipc", "--cgroup", "--net", "--mount-proc", "--kill-child=KILL",
                 "bash", "-c", _BOOT.replace("{private}", " ".join(_PRIVATE[1:])), "boot", self.directory],
                stdin=subprocess.DEVNULL, stdout=console, stderr=console, preexec_fn=self._enter_group)
        try:
            self._wait_booted()
        except CannotBoot:
            self.end()
            raise

    def _own_group(self) -> Path:
        """systemd makes its groups below this one, and we can find and remove them."""
        mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
        root = next((Path(m[1]) for m in mounts if m[2] == "cgroup2"), None)
        if root is None:
            raise CannotBoot("no cgroup v2 is mounted")
        group = root / self.directory.name
        try:
            group.mkdir()
        except OSError as error:
            raise CannotBoot(f"{group}: {error.strerror}") from error
        return group

    def _enter_group(self) -> None:
        (self._group / "cgroup.procs").write_text(str(os.getpid()))

    def _wait_booted(self) -> None:
        until_s = time.monotonic() + 30
        while time.monotonic() < until_s:
            if self._unshare.poll() is not None:
                break
            if self.first() and self.run("systemctl", "is-active", "bed.target", check=False) == "active":
                return
            time.sleep(0.1)
        raise CannotBoot("systemd did not come up: " + (self.directory / "console").read_text(errors="replace")[-2000:])

    def first(self) -> int:
        """systemd's pid, as seen from outside. 0: not there yet."""
        children = Path(f"/proc/{self._unshare.pid}/task/{self._unshare.pid}/children").read_text().split()
        return int(children[0]) if children else 0

    def run(self, *command: str, check: bool = True, within_s: float = 60) -> str:
        """Inside. Both outputs."""
        done = subprocess.run(["nsenter", "-t", str(self.first()), "-m", "-p", "-n", "-u", "-i", "-C", "--", *command], stdin=subprocess.DEVNULL,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=within_s, env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C.UTF-8"}, check=False)
        assert not check or done.returncode == 0, f"{command}: {done.stdout}"
        return done.stdout.strip()

    def shows(self, unit: str, name: str) -> str:
        return self.run("systemctl", "show", "--value", "-p", name, unit)

    def until(self, holds: Callable[[], bool], within_s: float, what: str) -> None:
        until_s = time.monotonic() + within_s
        while not holds():
            assert time.monotonic() < until_s, f"not within {within_s} s: {what}\n{self.journal()[-6000:]}"
            time.sleep(0.05)

    def journal(self, *options: str) -> str:
        return self.run("journalctl", "--no-pager", "-o", "cat", *options, check=False)

    def end(self) -> None:
        first = self.first() if self._unshare.poll() is None else 0
        if first:
            os.kill(first, signal.SIGKILL)
        self._unshare.wait(20)
        until_s = time.monotonic() + 10     # the kernel ends the others
        for group in sorted((p for p in [self._group, *self._group.rglob("*")] if p.is_dir()), key=lambda p: -len(p.parts)):
            while time.monotonic() < until_s:
                try:
                    group.rmdir()
                    break
                except OSError:
                    time.sleep(0.05)
        shutil.rmtree(self.directory)
