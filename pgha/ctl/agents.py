"""Talking to the agents' REST API."""

from __future__ import annotations

import base64
import json
from functools import cache
from typing import TYPE_CHECKING, Any

from pgha.ctl.cluster import warn
from pgha.ctl.ends import FAILED, UNKNOWN, UNREACHABLE, End, code_of
from pgha.ctl.exchange import Answer, NoAnswer, request, tls_context
from pgha.ctl.settings import Rest, Settings

if TYPE_CHECKING:
    import ssl


def ask(settings: Settings, base_url: str, method: str, path: str, *, body: Any = None, timeout_s: float = 5.0) -> Answer:
    """One request to the agent at `base_url`. NoAnswer if it does not answer."""
    if not base_url:
        raise NoAnswer("the agent", "it publishes no API address", sent=False)
    rest = settings.rest
    headers = {}
    if rest.username and method != "GET":
        headers["Authorization"] = "Basic " + base64.b64encode(f"{rest.username}:{rest.password}".encode()).decode()
    tls = context(rest) if base_url.startswith("https") else None
    data = None
    if body is not None:
        data = json.dumps(body).encode()
        headers["Content-Type"] = "application/json"
    return request(method, base_url + path, body=data, headers=headers, timeout_s=timeout_s, tls=tls)


def context(rest: Rest) -> ssl.SSLContext:
    """For agents that are asked over https. Without ctl.certfile the certificate of the node's own API is shown, as agents do
    among themselves; whoever may not read its key goes on without. End(USAGE) names a file that does not work."""
    cert, key, password = rest.server
    if cert and not rest.certfile:
        try:
            return tls_context(cacert=rest.cacert, cert=cert, key=key, key_password=password, insecure=rest.insecure)
        except End as end:
            without = tls_context(cacert=rest.cacert, insecure=rest.insecure)
            _warn_once(f"{end.text}; agents are asked without a client certificate (ctl.certfile and ctl.keyfile: one that this user may read)")
            return without
    return tls_context(cacert=rest.cacert, cert=rest.certfile, key=rest.keyfile, key_password=rest.keyfile_password, insecure=rest.insecure)


@cache
def _warn_once(text: str) -> None:
    warn(text)


def unheard(what: str, failure: NoAnswer) -> int:
    """Says that `what` ("restart for member n1") got no answer; the exit code."""
    warn(f"Failed: {what}: {failure}")
    return UNKNOWN if failure.sent else UNREACHABLE


def refused(what: str, answer: Answer) -> int:
    """Says that the answer to `what` is no success, in the reference's words; the exit code."""
    text = answer.body.decode(errors="replace")
    warn(f"Failed: {what}, status code={answer.status}, ({text})")
    return code_of(answer.status, text)


def get_json(settings: Settings, base_url: str, path: str) -> dict[str, Any]:
    """A JSON object. End(UNREACHABLE) or End(FAILED)."""
    value: dict[str, Any] = _get(settings, base_url, path, dict)
    return value


def get_rows(settings: Settings, base_url: str, path: str) -> list[list[Any]]:
    """A JSON array of arrays; what else is in it is left out. End(UNREACHABLE) or End(FAILED)."""
    value: list[Any] = _get(settings, base_url, path, list)
    return [row for row in value if isinstance(row, list) and len(row) >= 2]


def _get(settings: Settings, base_url: str, path: str, kind: type[Any]) -> Any:
    try:
        answer = ask(settings, base_url, "GET", path)
    except NoAnswer as failure:
        raise End(UNREACHABLE, str(failure)) from None
    try:
        value = json.loads(answer.body)
    except (ValueError, RecursionError):
        value = None
    if answer.status != 200 or not isinstance(value, kind):
        raise End(FAILED, f"{base_url}{path}: status {answer.status}, {answer.body[:200].decode(errors='replace')}")
    return value
