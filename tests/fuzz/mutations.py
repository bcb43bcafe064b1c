"""Malformed inputs made from valid ones: trees with wrong values, and bytes that are cut, repeated or replaced."""

from __future__ import annotations

import copy
import json
import random
from typing import Any

DEEP = 3_000
"""Levels of nesting: more than Python's own limit on recursion."""
_HUGE = (10**18, -(10**18), 2**63, 10**400, 1e308, -1e308, 5e-324)
_ODD = (
    *(
        None,
        True,
        False,
        0,
        -1,
        1,
        3.5,
        "",
        " ",
        "0",
        "7",
        "nan",
        "auto",
        [],
        {},
        [[]],
        [None],
        {"": None},
        "a" * 20_000,
    ),
    *("\x00", "\x1b[31m", "\n", "\u2028", "\u202e", "\ud800", "é", "x\ty", "../../x", "~/.x", "s3://b/x", "%j", "$(x)"),
    *(float("inf"), float("-inf"), float("nan"), "1e999", "2026-01-01", "!!int x", "[" * 50, '{"a":' * 50),
)
_BYTES = (
    *(
        b"\0",
        b"\xff",
        b"\xed\xa0\x80",
        b"\xef\xbb\xbf",
        b"\x1b[2J",
        b"\r",
        b"\n",
        b"\r\n",
        b"\x85",
        b"\x7f",
        b"\xc2\xa0",
    ),
    *(
        b"{",
        b"}",
        b"[",
        b"]",
        b'"',
        b"'",
        b",",
        b":",
        b": ",
        b"=",
        b"|",
        b"&a ",
        b"*a",
        b"!!int x",
        b"!!binary x",
        b"%",
    ),
    *(
        b"NaN",
        b"Infinity",
        b".inf",
        b".nan",
        b"1e999",
        b"9" * 5_000,
        b"0x" + b"f" * 5_000,
        b"null",
        b"~",
        b"-",
        b"<<: ",
    ),
    *(b"2026-13-45", b"2026-01-01T00:00:00Z", b"12:34:56", b"a" * 70_000, b" " * 20_000, b"\n" * 5_000, b"\\u0000"),
    *(b"\\ud800", b"# ", b"--- ", b"\t", b"!!python/object:os.system ", b"{a: 1, a: 2}", b'{"a": 1, "a": 2}'),
)


def mutated(rng: random.Random, valid: bytes) -> bytes:
    """One malformed input: mostly the tree of a JSON document or of JSON lines, sometimes only its bytes, or both."""
    kind = rng.random()
    content = _tree_mutated(rng, valid) if kind < 0.6 else valid
    if kind >= 0.45:
        for _ in range(rng.choice((1, 1, 1, 2, 4))):
            content = _bytes_mutated(rng, content)
    return content


def _tree_mutated(rng: random.Random, valid: bytes) -> bytes:
    """The same with one to three values of its JSON replaced, removed or nested; bytes that are no JSON as they are."""
    lines = valid.split(b"\n")
    try:
        whole = json.loads(valid)
    except ValueError:
        place = rng.randrange(len(lines))
        try:
            lines[place] = _dumped(_changed(rng, json.loads(lines[place])))
        except ValueError:
            return _bytes_mutated(rng, valid)
        return b"\n".join(lines)
    for _ in range(rng.choice((1, 1, 2, 3))):
        whole = _changed(rng, whole)
    text = _dumped(whole)
    if rng.random() < 0.1:  # a key twice
        at = text.find(b'": ')
        start = text.rfind(b'"', 0, at)
        text = text[:start] + text[start : at + 3] + b"1, " + text[start:] if at > 0 else text
    return text


def _dumped(value: Any) -> bytes:
    try:
        text = json.dumps(value, ensure_ascii=random.Random(len(str(value)[:99])).random() < 0.5)
    except (RecursionError, ValueError):
        text = '{"a":' * DEEP + "1" + "}" * DEEP
    return text.encode("utf-8", "surrogatepass")


def _places(value: Any, place: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [place]
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        found += _places(inner, (*place, key))
    return found


def _changed(rng: random.Random, value: Any) -> Any:
    value = copy.deepcopy(value)
    place = rng.choice(_places(value))
    if not place:
        return rng.choice((*_ODD, *_HUGE)) if rng.random() < 0.3 else value
    parent = value
    for key in place[:-1]:
        parent = parent[key]
    last, how = place[-1], rng.random()
    if how < 0.15:
        del parent[last]
    elif how < 0.25 and isinstance(parent, dict):
        parent[rng.choice(("", "x", "\ud800", "a.b", "\x00", "__class__", f"{last} "))] = parent.pop(last)
    elif how < 0.35:
        parent[last] = [parent[last]] if rng.random() < 0.5 else {"a": parent[last]}
    elif how < 0.45:
        parent[last] = str(parent[last])
    elif how < 0.6:
        parent[last] = rng.choice(_HUGE)
    else:
        parent[last] = rng.choice(_ODD)
    return value


def _bytes_mutated(rng: random.Random, content: bytes) -> bytes:
    if not content:
        return rng.choice(_BYTES)
    start = rng.randrange(len(content))
    stop = min(len(content), start + rng.choice((1, 1, 4, 20, 200)))
    how = rng.random()
    if how < 0.15:
        return content[:start]
    if how < 0.25:
        return content[:start] + content[stop:]
    if how < 0.35:
        return content[:stop] + content[start:]
    if how < 0.4:
        return content[:start] + bytes(rng.randrange(256) for _ in range(stop - start)) + content[stop:]
    if how < 0.45:
        opening = rng.choice((b"[", b'{"a":', b"{a: ", b"- ", b"("))
        return content[:start] + opening * DEEP + content[start:]
    if how < 0.5:
        lines = content.split(b"\n")
        rng.shuffle(lines)
        return b"\n".join(lines)
    if how < 0.55:
        separators = [place for place, byte in enumerate(content) if byte in b",:= \n|"]
        if separators:
            place = rng.choice(separators)
            return content[:place] + rng.choice(_BYTES) + content[place + 1 :]
    return content[:start] + rng.choice(_BYTES) + content[start if rng.random() < 0.5 else stop :]
