"""Which file names a manifest may hold.

Manifests come from other machines and from object storage, and each name in one becomes a path that is read, written
or removed. So a name must lead to a file below its directory on every system, and two names never to the same file.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable

_LONGEST = 255
"""Bytes of one part of a path that the usual file systems allow."""


def bad_name(name: str) -> str | None:
    """Why a name may not be in a manifest; None for a relative path in plain form, such as `a.txt` or `sub/b.txt`."""
    if not name:
        return "is empty"
    if any(unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp") for character in name):
        return "holds a control character"
    if "\\" in name:
        return "holds a backslash"
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
    """Why some names may not be together in one manifest; None when they may.

    Besides `bad_name`, none may be the `reserved` file or lie below it, be another one in other letters (case, Unicode
    form), or be another one's folder.
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
