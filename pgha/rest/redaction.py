"""What may everybody see who may ask? Plain values, without what is or may hold a secret."""

from __future__ import annotations

from typing import Any

import msgspec

from pgha.log import scrub
from pgha.model.gucs import may_hold_secrets

_SECRET_KEYS = ("passw", "secret", "token", "private")


def is_secret(key: str) -> bool:
    """Does what stands under this key look like a secret? Commands count: a restore_command may have a key of an archive in
    it. Connection strings do not: `scrub` knows what in them is secret, and the rest is needed to follow what happens."""
    return any(word in key.lower() for word in _SECRET_KEYS) or (may_hold_secrets(key) and not key.lower().endswith("conninfo"))


def redact(value: Any) -> Any:
    """Plain values without anything that looks like a secret: by key, and inside connection strings."""
    if isinstance(value, dict):
        return {str(k): _masked(v) if is_secret(str(k)) and v else redact(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [redact(item) for item in value]
    return scrub(value) if isinstance(value, str) else value


def _masked(value: Any) -> Any:
    """A list stays one: what is told of a changed archive_command, old and new, is read again as a pair."""
    return [_masked(item) for item in value] if isinstance(value, (list, tuple)) else "***"


def redacted_json(text: bytes) -> bytes:
    """JSON that travels as bytes, which `redact` cannot look into."""
    try:
        return msgspec.json.encode(redact(msgspec.json.decode(text))) if text else b""
    except (ValueError, RecursionError):
        return b""
