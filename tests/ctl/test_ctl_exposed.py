"""What ctl reads: of its own files with passwords and keys it says so when everybody can read them."""

from __future__ import annotations

from pathlib import Path

import pytest

from pgha.ctl.settings import load

HEAD = 'scope = "s"\n[etcd3]\nhost = "x"\nusername = "u"\n'
KEY = "-----BEGIN PRIVATE KEY-----\n"


@pytest.mark.parametrize(("config", "files", "environ", "named"), [
    ('password_file = "{at}/a"', {"a": "geheim"}, {}, ["{at}/pgha.toml: etcd3.password_file: {at}/a is readable by everybody; allowed: chmod o= {at}/a"]),
    ("", {"a": "geheim"}, {"PGHA_ETCD3_PASSWORD_FILE": "{at}/a"}, ["PGHA_ETCD3_PASSWORD_FILE: etcd3.password_file: {at}/a is readable by everybody; allowed: chmod o= {at}/a"]),
    ('[ctl.authentication]\nusername = "u"\npassword_file = "{at}/a"', {"a": "geheim"}, {},
     ["{at}/pgha.toml: ctl.authentication.password_file: {at}/a is readable by everybody; allowed: chmod o= {at}/a"]),
    ('[ctl]\ncertfile = "{at}/c"\nkeyfile = "{at}/k"', {"c": "", "k": KEY}, {}, ["{at}/pgha.toml: ctl.keyfile: {at}/k is readable by everybody; allowed: chmod o= {at}/k"]),
    ('[ctl]\ncertfile = "{at}/c"', {"c": KEY}, {}, ["{at}/pgha.toml: ctl.keyfile: {at}/c is readable by everybody; allowed: chmod o= {at}/c"]),
    ('cert = "{at}/c"\nkey = "{at}/k"', {"c": "", "k": KEY}, {}, ["{at}/pgha.toml: etcd3.key: {at}/k is readable by everybody; allowed: chmod o= {at}/k"]),
    ('password = "geheim"\n[restapi.authentication]\nusername = "u"\npassword = "geheim"', {}, {},
     ["{at}/pgha.toml: is readable by everybody (mode 0644) and holds etcd3.password, restapi.authentication.password; allowed: chmod o= {at}/pgha.toml, or password_file"]),
    ('[restapi]\ncertfile = "{at}/c"', {"c": KEY}, {}, ["{at}/pgha.toml: restapi.keyfile: {at}/c is readable by everybody; allowed: chmod o= {at}/c"]),
    # A certificate, and a file that is not there: the one is for everybody, the other is named by whoever uses it.
    ('[ctl]\ncertfile = "{at}/c"\nkeyfile = "{at}/gone"', {"c": "-----BEGIN CERTIFICATE-----\n"}, {}, []),
    ('cert = "{at}/c"', {"c": "-----BEGIN CERTIFICATE-----\n"}, {}, []),
])
def test_what_everybody_can_read_is_named(tmp_path: Path, config: str, files: dict[str, str], environ: dict[str, str], named: list[str]) -> None:
    written = {"pgha.toml": HEAD + config.format(at=tmp_path), **files}
    for mode, wanted in ((0o644, [line.format(at=tmp_path) for line in named]), (0o640, [])):
        for name, content in written.items():
            (tmp_path / name).write_text(content)
            (tmp_path / name).chmod(mode)
        found = load(config_file=str(tmp_path / "pgha.toml"), scope=None, dcs_url=None, environ={name: value.format(at=tmp_path) for name, value in environ.items()})
        assert list(found.warnings) == wanted
        assert "geheim" not in "".join(found.warnings)
