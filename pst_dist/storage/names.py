"""Which file names a manifest may contain.

Manifests come from other machines and from object storage, and each name in one becomes a path that is read, written
or removed. So on every system a name must mean a file below its directory, and no two names may mean the same file.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable

_LONGEST = 255
"""Byte limit of one path component on common file systems."""


def bad_name(name: str) -> str | None:
    """Why a manifest may not contain a name; None for a normalized relative path, such as `a.txt` or `sub/b.txt`."""
    if not name:
        return "is empty"
    if any(unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp") for character in name):
        return "contains a control character"
    if "\\" in name:
        return "contains a backslash"
    if name.startswith("/"):
        return "is an absolute path"
    if len(name) > 1 and name[1] == ":":
        return "begins with a drive letter"
    for part in name.split("/"):
        if part in ("", ".", ".."):
            return "has an empty, `.` or `..` part"
        if part.startswith("~"):
            return "has a part that begins with `~`"
        if len(part.encode()) > _LONGEST:
            return f"has a part of more than {_LONGEST} bytes"
    return None


def bad_names(names: Iterable[str], *, reserved: str) -> str | None:
    """Why one manifest may not contain these names together; None when it may.

    Each name must pass `bad_name`. None may be the `reserved` file or be below it, differ from another name only by
    case or Unicode form, or be a folder of another name.
    """
    seen: dict[str, str] = {_plain(reserved): reserved}
    folders: dict[str, str] = {}
    for name in names:
        problem = bad_name(name)
        if problem is None and (twin := seen.get(_plain(name))) is not None:
            problem = f"is the same file as {twin[:80]!r}"
        if problem is not None:
            return f"the file name {name[:80]!r} {problem}"
        seen[_plain(name)] = name
        parts = _plain(name).split("/")
        folders |= {"/".join(parts[:count]): name for count in range(1, len(parts))}
    both = sorted(seen.keys() & folders.keys())
    return f"{seen[both[0]][:80]!r} is both a file and the folder of {folders[both[0]][:80]!r}" if both else None


def _plain(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()
