"""sd_notify to a real socket, and to none, and never waiting."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path

import pytest

from pgha.systemd import notify


@pytest.fixture
def listener():
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.settimeout(1)
        yield sock


@pytest.mark.parametrize("abstract", [False, True])
def test_what_is_said_arrives(listener: socket.socket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, abstract: bool):
    name = f"pgha-test-{os.getpid()}" if abstract else str(tmp_path / "notify")
    listener.bind("\0" + name if abstract else name)
    monkeypatch.setenv("NOTIFY_SOCKET", "@" + name if abstract else name)
    assert notify("READY=1")
    assert notify("STATUS=größer")
    assert [listener.recv(100), listener.recv(100)] == [b"READY=1", "STATUS=größer".encode()]


@pytest.mark.parametrize("where", [None, "", "/nowhere/notify", "x" * 300, "@"])
def test_nobody_listens(monkeypatch: pytest.MonkeyPatch, where: str | None):
    if where is None:
        monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    else:
        monkeypatch.setenv("NOTIFY_SOCKET", where)
    assert notify("READY=1") is False


def test_a_full_queue_delays_nobody(listener: socket.socket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    listener.bind(str(tmp_path / "notify"))
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
    begun = time.monotonic()
    assert not all(notify("WATCHDOG=1") for _ in range(10_000))
    assert time.monotonic() - begun < 5
    assert listener.recv(100) == b"WATCHDOG=1"
    assert notify("WATCHDOG=1"), "as soon as there is room"
