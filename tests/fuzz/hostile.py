"""Hostile input, made by chance from a seed, and what once did harm (corpus/): the same bytes in every run.

`broken(chance, good)` is the one to use: bytes that began as something good and were cut, spliced, filled with what
parsers choke on, or replaced. A file of the corpus is a list of {"what", "parts"}; parts are texts (latin-1, so any
byte) with a count: [["[", 100000]] is a hundred thousand brackets.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

CORPUS = Path(__file__).parent / "corpus"

#: what parsers choke on, as text inside JSON or anything else
BITS: tuple[bytes, ...] = (
    b"", b"\0", b"\n", b"\r\n", b"\xff", b"\xc3", b"\xed\xa0\x80", b"\xef\xbb\xbf", b"\\ud800", b"\\u0000", b'"', b"'", b"\\", b"{", b"}", b"[", b"]", b",", b":", b"=", b"#",
    b"null", b"true", b"NaN", b"Infinity", b"-Infinity", b"1e999", b"-1", b"-0", b"0x10", b"1_0", b"9" * 25, b"9" * 400, b"9" * 5000, b"1.5", b"1e5", b"[" * 2000, b'{"a":' * 2000,
    b'"' + b"x" * 5000 + b'"', b" " * 3000, b"\xe2\x80\xae", b"\x1b[31m", b"%s%n", b"${x}", b"../../x", b"://a:" * 300, b"a." * 500,
)
SCALARS: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64, 10**30, 10**400, -(10**30), 0.5, -1.5, 1e308, "", " ", "x", "a\nb", "\0", "\x1b[2J", "ä", "\u202e",
    "5", "-5", "9" * 30, "9" * 4000, "1e999", "true", "off", "null", "x" * 5000, "a,b,,c", "http://[", "http://a:b@c:99999/", "postgres://u:p@h:5432/d", "n1", "n2", "primary", "running",
)
NAMES = ("", "a", "leader", "ttl", "ttl_s", "optime", "slots", "tags", "nofailover", "failover_priority", "conn_url", "api_url", "xlog_location", "sync_standby", "pgha", "postgresql",
         "parameters", "mode", "holder", "ä", "x" * 300, "\0", "a\nb")


def some_json(chance: Random, depth: int = 0) -> Any:
    kind = chance.random()
    if depth < 5 and kind < 0.2:
        return [some_json(chance, depth + 1) for _ in range(chance.randrange(4))]
    if depth < 5 and kind < 0.45:
        return {chance.choice(NAMES): some_json(chance, depth + 1) for _ in range(chance.randrange(5))}
    return chance.choice(SCALARS)


def mutated(chance: Random, value: Any) -> Any:
    """One place in it replaced, taken away, repeated or wrapped."""
    if isinstance(value, dict) and value and chance.random() < 0.9:
        changed = dict(value)
        key = chance.choice(sorted(value, key=str))
        what = chance.random()
        if what < 0.15:
            del changed[key]
        elif what < 0.25:
            changed[chance.choice(NAMES)] = some_json(chance)
        else:
            changed[key] = mutated(chance, value[key])
        return changed
    if isinstance(value, list) and value and chance.random() < 0.9:
        place = chance.randrange(len(value))
        return [*value[:place], mutated(chance, value[place]), *value[place + 1:]]
    return some_json(chance) if chance.random() < 0.8 else [value, value]


def dumped(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def broken(chance: Random, good: bytes, value: Any = None) -> bytes:
    """`value`: what `good` says, if it is JSON: then half of the results are JSON that says something else."""
    if value is not None and chance.random() < 0.5:
        for _ in range(chance.randrange(1, 4)):
            value = mutated(chance, value)
        return dumped(value)
    out = good
    for _ in range(chance.randrange(1, 4)):
        place, what = chance.randrange(len(out) + 1), chance.randrange(7)
        if what == 0:
            out = out[:place]
        elif what == 1:
            out = out[:place] + chance.choice(BITS) + out[place:]
        elif what == 2:
            out = out[:place] + chance.choice(BITS) + out[place + chance.randrange(20):]
        elif what == 3:
            out = out[:place] + chance.randbytes(chance.randrange(6)) + out[place + chance.randrange(3):]
        elif what == 4:
            out = out[:place] + out[place // 2:]
        elif what == 5:
            out = out[place:] + out[:place]
        else:
            out = chance.choice(BITS) if chance.random() < 0.2 else out.replace(chance.choice((b"1", b":", b'"', b"\n", b"e")), chance.choice(BITS[:30]), 1)
    return out[:200_000]


def corpus(name: str) -> list[tuple[str, bytes]]:
    """What once did harm: (what it was, the bytes)."""
    return [(str(entry["what"]), b"".join(text.encode("latin-1") * count for text, count in entry["parts"])) for entry in json.loads((CORPUS / f"{name}.json").read_text())]


def inputs(name: str, good: bytes, value: Any = None, *, count: int, seed: object = 0) -> Iterator[bytes]:
    """The corpus first, then `count` by chance."""
    for _, data in corpus(name):
        yield data
    chance = Random(f"{name} {seed}")
    for _ in range(count):
        yield broken(chance, good, value)
