"""The keys of one cluster, straight from etcd: its JSON gateway over plain HTTP (compatibility spec 2.1).

Reads are linearizable; writes compare the revision that was read. One endpoint after the other until one answers.
"""

from __future__ import annotations

import base64
import json
from typing import TYPE_CHECKING, Any, NamedTuple

from pgha.ctl.ends import FAILED, UNKNOWN, UNREACHABLE, USAGE, End
from pgha.ctl.exchange import NoAnswer, request, tls_context
from pgha.ctl.settings import Etcd

if TYPE_CHECKING:
    import ssl

#: how long one endpoint may take
ENDPOINT_S = 3.0


class Key(NamedTuple):
    """`lease`: 0 if it has none."""

    value: bytes
    revision: int
    lease: int


class Store:
    """A client for one command; nothing is kept open."""

    def __init__(self, etcd: Etcd) -> None:
        self._etcd = etcd
        self._token = ""
        self._api = "/v3"
        self._tls: ssl.SSLContext | None = None
        if any(endpoint.startswith("https") for endpoint in etcd.endpoints):
            self._tls = tls_context(cacert=etcd.cacert, cert=etcd.cert, key=etcd.key)

    def read(self, prefix: str) -> dict[str, Key]:
        """All keys below `prefix`, whose name is cut off. End(UNREACHABLE) if no endpoint answers."""
        start = prefix.encode()
        answer = self._ask("/kv/range", {"key": _b64(start), "range_end": _b64(start[:-1] + bytes([start[-1] + 1]))}, write=False)
        found = {}
        try:
            for entry in answer.get("kvs", ()):
                name = base64.b64decode(entry["key"]).decode(errors="replace").removeprefix(prefix)
                found[name] = Key(base64.b64decode(entry.get("value", "")), int(entry.get("mod_revision", 0)), int(entry.get("lease", 0)))
        except (KeyError, TypeError, ValueError, AttributeError):
            raise End(UNREACHABLE, "what answers in etcd's place does not answer as etcd does") from None
        return found

    def write(self, key: str, value: bytes, *, if_revision: int) -> bool:
        """Write `key` (its full path) if it is still at that revision (0: absent). False if it is not.

        End(UNKNOWN) if the answer got lost; End(UNREACHABLE) if no endpoint took it.
        """
        name = _b64(key.encode())
        compare = {"key": name, "target": "MOD", "result": "EQUAL", "mod_revision": str(if_revision)}
        answer = self._ask("/kv/txn", {"compare": [compare], "success": [{"request_put": {"key": name, "value": _b64(value)}}]}, write=True)
        return bool(answer.get("succeeded", False))

    def remove(self, prefix: str, *, unchanged: str, value: bytes | None) -> int | None:
        """Remove all keys below `prefix` if the key `unchanged` of them still has this value (None: is absent). How many it
        were; None if it has another.

        End(UNKNOWN) if the answer got lost; End(UNREACHABLE) if no endpoint took it.
        """
        assert prefix.strip("/"), "never the whole store"
        start = prefix.encode()
        guard = {"key": _b64((prefix + unchanged).encode()), "result": "EQUAL"}
        guard |= {"target": "VERSION", "version": "0"} if value is None else {"target": "VALUE", "value": _b64(value)}
        everything = {"key": _b64(start), "range_end": _b64(start[:-1] + bytes([start[-1] + 1]))}
        answer = self._ask("/kv/txn", {"compare": [guard], "success": [{"request_delete_range": everything}]}, write=True)
        if not answer.get("succeeded", False):
            return None
        try:
            return int(answer["responses"][0]["response_delete_range"].get("deleted", 0))
        except (KeyError, IndexError, TypeError, ValueError, AttributeError):
            raise End(UNKNOWN, "what answers in etcd's place does not answer as etcd does; look before you try again") from None

    def _ask(self, path: str, body: dict[str, Any], *, write: bool) -> dict[str, Any]:
        failures = []
        for endpoint in self._etcd.endpoints:
            try:
                return self._ask_one(endpoint, path, body)
            except NoAnswer as failure:
                if write and failure.sent:
                    raise End(UNKNOWN, f"{failure}: whether it was written is not known; look before you try again") from None
                failures.append(str(failure))
        raise End(UNREACHABLE, "no etcd endpoint answers:\n  " + "\n  ".join(failures))

    def _ask_one(self, endpoint: str, path: str, body: dict[str, Any]) -> dict[str, Any]:
        for _ in range(3):
            if self._etcd.username and not self._token:
                self._token = self._log_in(endpoint)
            status, answer = self._post(endpoint, path, body)
            if status == 200:
                return answer
            why = str(answer.get("error") or answer.get("message") or f"HTTP status {status}")[:300]
            if status == 404 and self._api == "/v3":
                self._api = "/v3beta"                 # before etcd 3.4
            elif self._token and "token" in why:
                self._token = ""                      # expired: once more with a new one
            elif status in (401, 403) or "permission denied" in why or "authentication" in why or "user name is empty" in why:
                raise End(FAILED, f"etcd {endpoint} refuses: {why}")
            else:
                # "sent" False: etcd has said that it did not do it.
                raise NoAnswer(endpoint, why, sent=False)
        raise NoAnswer(endpoint, "does not speak etcd's v3 API", sent=False)

    def _log_in(self, endpoint: str) -> str:
        status, answer = self._post(endpoint, "/auth/authenticate", {"name": self._etcd.username, "password": self._etcd.password})
        if status != 200 or not isinstance(answer.get("token"), str):
            raise End(USAGE, f"etcd {endpoint} does not accept the user {self._etcd.username!r}: {answer.get('error') or status}")
        token: str = answer["token"]
        if not (token.isascii() and token.isprintable()):
            raise End(UNREACHABLE, f"etcd {endpoint} gives a token that cannot be sent")
        return token

    def _post(self, endpoint: str, path: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        headers = {"Content-Type": "application/json", **({"Authorization": self._token} if self._token else {})}
        answer = request("POST", endpoint + self._api + path, body=json.dumps(body).encode(), headers=headers, timeout_s=ENDPOINT_S, tls=self._tls)
        try:
            decoded = json.loads(answer.body)
        except (ValueError, RecursionError):
            decoded = None
        if not isinstance(decoded, dict):
            if answer.status == 404:
                return 404, {}
            # Something between us and etcd may have spoilt the answer to what was done.
            raise NoAnswer(endpoint, f"answers something that is not etcd's ({answer.status})", sent=True)
        return answer.status, decoded


def _b64(data: bytes) -> str:
    return base64.b64encode(data).decode()
