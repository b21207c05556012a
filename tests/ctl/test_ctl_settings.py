"""What ctl takes from the node's file: where the node's own API is."""

from __future__ import annotations

import pytest

from pgha.ctl import settings


@pytest.mark.parametrize(("restapi", "url"), [
    ('listen = "10.0.0.1:8009"', "http://10.0.0.1:8009"),
    ('listen = "10.0.0.1"', "http://10.0.0.1:8008"),
    ('listen = "*"', "http://127.0.0.1:8008"),
    ('listen = "[::1]"', "http://[::1]:8008"),
    ('listen = "[::1]:8009"', "http://[::1]:8009"),
    ('listen = "a,b:8008"\nconnect_address = "[fd00::1]"\ncertfile = "/c"', "https://[fd00::1]:8008"),
])
def test_where_the_nodes_own_api_is(restapi: str, url: str) -> None:
    text = f'scope = "s"\n[etcd3]\nhost = "a"\n[restapi]\n{restapi}\n'
    assert settings.load(config_file=None, scope=None, dcs_url=None, environ={"PGHA_CONFIGURATION": text}).rest.own_url == url
