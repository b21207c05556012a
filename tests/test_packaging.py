"""Are the files that we hand to others accepted by the programs they are for?"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

from pgha.config.check import check

ROOT = Path(__file__).parents[1]


def test_haproxy_accepts_its_configuration_without_a_warning() -> None:
    haproxy = shutil.which("haproxy", path="/usr/local/sbin:/usr/sbin:/usr/bin")
    assert haproxy, "haproxy is missing: run build/setup"
    answer = subprocess.run([haproxy, "-c", "-f", ROOT / "packaging/haproxy.cfg"], capture_output=True, text=True, timeout=30, check=False)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert "WARNING" not in answer.stdout + answer.stderr


def test_the_configuration_in_the_readme_is_accepted(tmp_path: Path) -> None:
    example = re.search(r"```toml\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert example
    for user in ("superuser", "replication"):
        (tmp_path / f"{user}.password").write_text("not a real one\n")
        (tmp_path / f"{user}.password").chmod(0o600)
    file = tmp_path / "pgha.toml"
    file.write_text(example[1].replace("/etc/pgha/", f"{tmp_path}/"), encoding="utf-8")
    code, text = check(file, {})
    assert code == 0, text
