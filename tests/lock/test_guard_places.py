"""Where does a guard work that was told only its configuration, also when that has been broken since?"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from pgha.__main__ import _guard_places
from pgha.errors import ConfigError
from pgha.lock.guard_state import Held
from pgha.lock.guard_system import Memory


@pytest.fixture
def former(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A guard of /srv/data was here."""
    runtime = tmp_path / "run"
    runtime.mkdir(mode=0o700)
    Memory(str(runtime), "/srv/data").write(Held(), ())
    monkeypatch.setenv("RUNTIME_DIRECTORY", f"{runtime}:/run/other")
    (tmp_path / "broken.toml").write_text("broken =\n")
    return runtime


def test_where_the_guard_before_it_worked(former: Path, capfd: pytest.CaptureFixture[str]):
    assert _guard_places(str(former.parent / "broken.toml")) == ("/srv/data", str(former), f"{former}/agent.lock")
    said = capfd.readouterr().err
    assert "no valid TOML" in said
    assert "guarding /srv/data as before" in said


@pytest.mark.parametrize("case", ["another boot", "no file", "no JSON", "no object", "another's", "not under systemd"])
def test_nothing_says_where(former: Path, monkeypatch: pytest.MonkeyPatch, case: str):
    file = former / "guard.json"
    match case:
        case "another boot":
            file.write_text(json.dumps({**json.loads(file.read_text()), "boot_id": "0"}))
        case "no file":
            file.unlink()
        case "no JSON":
            file.write_bytes(b"\xff{")
        case "no object":
            file.write_text("[]")
        case "another's":
            if os.getuid() != 0:
                pytest.skip("to give a directory away takes root")
            os.chown(former, 1, 1)
        case "not under systemd":
            monkeypatch.delenv("RUNTIME_DIRECTORY")
    with pytest.raises(ConfigError):
        _guard_places(str(former.parent / "broken.toml"))
