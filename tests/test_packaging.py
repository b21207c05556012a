"""Are the files that we hand to others accepted by the programs they are for?"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_haproxy_accepts_its_configuration_without_a_warning() -> None:
    haproxy = shutil.which("haproxy", path="/usr/local/sbin:/usr/sbin:/usr/bin")
    assert haproxy, "haproxy is missing: run build/setup"
    answer = subprocess.run([haproxy, "-c", "-f", ROOT / "packaging/haproxy.cfg"], capture_output=True, text=True, timeout=30, check=False)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert "WARNING" not in answer.stdout + answer.stderr
