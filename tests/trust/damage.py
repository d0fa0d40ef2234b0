"""Damage to bytes and to JSON, drawn from a random.Random: the same again from the same seed."""

from __future__ import annotations

import json
import random
from copy import deepcopy
from typing import Any

NUMBERS = (
    0,
    -1,
    1,
    2**31,
    2**63 - 1,
    2**63,
    2**64,
    10**40,
    10**400,
    -(10**400),
    65536,
    65537,
    1e308,
    1e-320,
    -0.0,
    0.5,
)
WORDS = (
    "",
    "\0",
    "..",
    "../x",
    "/etc/passwd",
    "a" * 100_000,
    "ä" * 200,
    "nan",
    "inf",
    "manifest.json",
    "\u202e",
    "\n\x1b[31m",
)
HOSTILE = (None, True, *NUMBERS, *WORDS, [], {}, [[[[]]]], [None] * 3, {"": {"": 0}}, [1, 2, 3], list(range(5000)))
LITERALS = (
    b"[" * 100_000, b'{"a":' * 100_000, b"9" * 100_000, b"1e" + b"9" * 5000, b"1e999", b"-1e999", b"NaN", b"Infinity",
    b"-Infinity", b'"\\ud800"', b'"\\udfff\\ud800"', b'"\xff\xfe"', b'"\xed\xa0\x80"', b'"\\u0000"',
    b'"' + b"a" * 3_000_000 + b'"',
    b"0x10", b"01", b"+1", b".5", b"1.", b"'a'", b"undefined", b"/**/1", b"\0", b"", b'""', b"null", b"true", b"[]",
    b"{}", b"[[[]]]", b"18446744073709551616", b"-9223372036854775809", b"0." + b"0" * 5000 + b"1",
)  # fmt: skip


def bytes_damaged(raw: bytes, rng: random.Random) -> bytes:
    """Other bytes: some flipped, put in or taken out, blocks swapped, doubled or zeroed, the end cut or grown."""
    while True:
        changed = _changed(bytearray(raw), rng)
        if changed != raw:
            return changed


def _changed(raw: bytearray, rng: random.Random) -> bytes:
    if not raw:
        return rng.randbytes(rng.randrange(1, 64))
    start, length = rng.randrange(len(raw)), rng.choice((1, 2, 4, 8, 16, 64, 256, 4096))
    end, block = min(len(raw), start + length), raw[start : start + length]
    match rng.randrange(9):
        case 0 | 1:
            for _ in range(rng.choice((1, 1, 2, 8))):
                raw[rng.randrange(len(raw))] ^= rng.randrange(1, 256)
        case 2:
            raw[start:start] = rng.randbytes(length)
        case 3:
            del raw[start:end]
        case 4:
            to = rng.randrange(len(raw) - len(block) + 1)
            raw[start:end], raw[to : to + len(block)] = raw[to : to + len(block)], block
        case 5:
            raw[start:start] = block
        case 6:
            raw[start:end] = rng.choice((b"\0", b"\xff", b"\x7f")) * (end - start)
        case 7:
            del raw[start:]
        case 8:
            raw += rng.randbytes(length)
    return bytes(raw)


def text_damaged(raw: bytes, rng: random.Random) -> bytes:
    """JSON that is hostile as a text: a literal in a value's place, a key twice, another encoding, a tail."""
    colons = [i for i, byte in enumerate(raw) if byte == 0x3A]
    match rng.randrange(8):
        case 0 | 1 | 2 | 3 if colons:
            at = rng.choice(colons) + 1
            return raw[:at] + rng.choice(LITERALS) + raw[_end_of_value(raw, at) :]
        case 4:
            at = raw.find(b"{") + 1
            first = raw[at : raw.find(b",", at)]
            return raw[:at] + (first + b",") * rng.choice((1, 2, 1000)) + raw[at:]
        case 5:
            return rng.choice((b"\xef\xbb\xbf", b"\xff\xfe", b" " * 100_000, b"// \n")) + raw
        case 6:
            return raw + rng.choice((b"}", b"{}", b"\0", b" " * 100_000, raw, b",\n"))
        case _:
            text = raw.decode("utf-8", "replace")
            return rng.choice((text.encode("utf-16"), text.encode("utf-32"), *LITERALS))


def _end_of_value(raw: bytes, at: int) -> int:
    """Where a number, a word or an opening bracket after `at` ends, roughly: what comes of it need be no JSON."""
    while at < len(raw) and raw[at] not in b",}]\n":
        at += 1
    return at


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of all values inside of a JSON value."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [p for key, each in inside for p in ((*path, key), *places(each, (*path, key)))]


def fields_damaged(value: Any, rng: random.Random) -> str:
    """Change a place or two of a JSON object, and say which and how."""
    return "; ".join(_field_damaged(value, rng) for _ in range(rng.choice((1, 1, 1, 2, 3))))


def _field_damaged(value: Any, rng: random.Random) -> str:
    every = places(value)
    if not every:
        return "nothing"
    *path, key = rng.choice(every)
    inside = value
    for step in path:
        inside = inside[step]
    old, what = inside[key], ".".join(map(str, (*path, key)))
    match rng.randrange(7):
        case 0:
            del inside[key]
            return f"{what} left out"
        case 1 if isinstance(inside, dict):
            inside[rng.choice(WORDS)] = deepcopy(old)  # or a later change would put it into itself
            return f"{what} also by another name"
        case 1 | 2 if isinstance(inside, list):
            inside.insert(rng.randrange(len(inside) + 1), deepcopy(old))
            return f"{what} twice"
        case 3:
            *others, last = rng.choice(every)
            new = value
            try:
                for step in (*others, last):
                    new = new[step]
            except (KeyError, IndexError, TypeError):  # below what was just taken away
                new = None
            inside[key] = json.loads(json.dumps(new))
            return f"{what} = what {'.'.join(map(str, (*others, last)))} is"
        case 4 | 5 if isinstance(old, (int, float)) and not isinstance(old, bool):
            inside[key] = rng.choice((old + 1, old - 1, -old, old * 2, old * 1000, old // 2, f"{old}"[:50]))
        case 4 | 5 if isinstance(old, str) and old:
            at = rng.randrange(len(old))
            inside[key] = old[:at] + rng.choice(("", "/", "\0", "x", "-", "ß", "..")) + old[at + 1 :]
        case _:
            inside[key] = deepcopy(rng.choice(HOSTILE))
    return f"{what} = {str(inside[key])[:60]!r}"
