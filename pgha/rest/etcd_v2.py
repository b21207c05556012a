"""Who leads, asked as etcd was asked before its version 3: GET /v2/keys/<namespace>/<scope>/leader.

Debian 12's vip-manager (1.0.2) speaks that and nothing else, and the keys that pgha writes by etcd's version 3 are not
there for it. So the agent answers in the store's place, and more carefully than it could: its own name only for as
long as it holds the lock, another's only for as long as it has seen that one's lock renewed. Nothing else can be read.

404 (etcd's "Key not found") is said of a leader that there is not, 503 by an agent that does not know: a client that
was given the addresses of several agents asks the next one then.
"""

from __future__ import annotations

from pgha.rest.health import HealthFacts
from pgha.rest.published import Published
from pgha.rest.wire import Request, Response, json_response


def answer(request: Request, published: Published, facts: HealthFacts) -> Response:
    """etcd's answer for the leader key, of the moment that `facts` are of."""
    key = request.path.removeprefix("/v2/keys")
    index = published.view.revision if published.view else 0
    leader = published.leader
    if not (request.path.startswith("/v2/keys/") and key.endswith(f"/{published.node.scope}/leader")):
        return _not_found(key, index)
    if leader == published.node.name and not facts.lock_held:
        return _not_found(key, index)       # nobody knows better that it does not lead
    if not facts.lock_held and not (facts.loop_alive and facts.dcs_seen):
        return json_response({"errorCode": 300, "message": "Raft Internal Error", "cause": "the store is not seen", "index": index}, status=503)
    if not leader:
        return _not_found(key, index)
    return json_response({"action": "get", "node": {"key": key, "value": leader, "modifiedIndex": index, "createdIndex": index}})


def _not_found(key: str, index: int) -> Response:
    return json_response({"errorCode": 100, "message": "Key not found", "cause": key, "index": index}, status=404)
