"""Compares what is installed in this Python's environment with launchers/constraints.txt, for setup.sh.

    python launchers/installed.py check EXTRAS CONSTRAINTS…   print what differs; exit code 1 if anything does
    python launchers/installed.py freeze EXTRAS               print constraints for what is installed now
    python launchers/installed.py moved REPORT CONSTRAINTS…   print how a report of `pip install --report` differs
    python launchers/installed.py oldest EXTRAS               exit code 1 unless the oldest versions are installed

It needs only the standard library and pip, because it runs before anything is installed.
"""

from __future__ import annotations

import importlib.metadata
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

try:
    import tomllib
except ImportError:  # Python 3.10
    from pip._vendor import tomli as tomllib  # type: ignore[no-redef]

try:  # the copy in an older pip takes three seconds to parse what all packages require, this one half a second
    from packaging.requirements import Requirement
    from packaging.specifiers import SpecifierSet
    from packaging.version import Version
except ImportError:
    from pip._vendor.packaging.requirements import Requirement
    from pip._vendor.packaging.specifiers import SpecifierSet
    from pip._vendor.packaging.version import Version

PROJECT = "pst-dist"
OF_CUDA = ("nvidia-", "cuda-")
"""What torch's CUDA build brings: it pins them itself, and the CPU build has none."""
PYPROJECT = Path(__file__).resolve().parents[1] / "pyproject.toml"


def normal(name: str) -> str:
    """A package's name as PEP 503 compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def read_constraints(paths: list[str]) -> dict[str, SpecifierSet]:
    """Package -> the versions that all the files together allow."""
    found: dict[str, SpecifierSet] = {}
    for path in paths:
        for line in Path(path).read_text().splitlines():
            if text := line.partition("#")[0].strip():
                requirement = Requirement(text)
                name = normal(requirement.name)
                found[name] = found.get(name, SpecifierSet()) & requirement.specifier
    return found


def requirements_of(name: str) -> list[Requirement]:
    """What a package requires, with markers: our own from pyproject.toml, which an installed copy may be older than."""
    if name != PROJECT:
        return [Requirement(text) for text in importlib.metadata.requires(name) or []]
    project: dict[str, Any] = tomllib.loads(PYPROJECT.read_text())["project"]
    found = [Requirement(text) for text in project["dependencies"]]
    for extra, texts in project["optional-dependencies"].items():
        for text in texts:
            text, _, marker = text.partition(";")
            condition = f"extra == '{extra}'" + (f" and ({marker.strip()})" if marker else "")
            found.append(Requirement(f"{text.strip()} ; {condition}"))
    return found


def tree(extras: str) -> Iterator[tuple[str, SpecifierSet, str | None]]:
    """(package, versions that its dependent allows, installed version) of everything below `pst-dist[extras]`."""
    todo, seen = [(PROJECT, frozenset(extras.split(",")))], set()
    while todo:
        name, wanted = todo.pop()
        for requirement in requirements_of(name):
            marker = requirement.marker
            if marker and not any(marker.evaluate({"extra": extra}) for extra in wanted | {""}):
                continue
            package, more = normal(requirement.name), frozenset(requirement.extras)
            try:
                version = PROJECT if package == PROJECT else importlib.metadata.version(package)
            except importlib.metadata.PackageNotFoundError:
                version = None
            if package != PROJECT:
                yield package, requirement.specifier, version
            if version and (package, more) not in seen:
                seen.add((package, more))
                todo.append((package, more))


def check(extras: str, constraints: dict[str, SpecifierSet]) -> int:
    """Print each package that is missing, or installed in a version that is not allowed."""
    wrong, unpinned = set(), set()
    pinned = constraints.keys() - {"torch"}  # the file of torch's build alone pins nothing else
    for name, allowed, version in tree(extras):
        allowed &= constraints.get(name, SpecifierSet())
        if version is None:
            wrong.add(f"{name} is not installed")
        elif not allowed.contains(version, prereleases=True):
            wrong.add(f"{name} {version} is installed, wanted: {allowed}")
        elif pinned and name not in constraints and not name.startswith(OF_CUDA):
            unpinned.add(f"{name}=={version}")
    for line in sorted(wrong):
        print(line)
    if unpinned:
        print(f"not pinned; add to launchers/constraints.txt: {' '.join(sorted(unpinned))}", file=sys.stderr)
    return 1 if wrong else 0


def freeze(extras: str) -> None:
    """Print a pin for each package below `pst-dist[extras]`; setup.sh chooses torch's build, so that is left open."""
    for name, version in sorted({(name, version) for name, _, version in tree(extras) if version}):
        print(f"{name}=={version.partition('+')[0]}")


def oldest(extras: str) -> int:
    """Print each direct requirement that is not installed in the oldest version that pyproject.toml allows.

    Torch is left out: only the CPU build of one release is on PyPI.
    """
    wanted, wrong = {*extras.split(","), ""}, []
    for requirement in requirements_of(PROJECT):
        name = normal(requirement.name)
        if name in (PROJECT, "torch") or not any(
            requirement.marker is None or requirement.marker.evaluate({"extra": extra}) for extra in wanted
        ):
            continue
        (floor,) = [Version(one.version) for one in requirement.specifier if one.operator == ">="]
        version = Version(importlib.metadata.version(name))
        if version != floor:
            wrong.append(f"{name}: pyproject.toml allows {floor}, {version} is installed; see constraints-oldest.txt")
    print(*wrong, sep="\n", end="\n" if wrong else "")
    return 1 if wrong else 0


def moved(report: str, constraints: dict[str, SpecifierSet]) -> None:
    """Print what a fresh resolution would install otherwise than the constraints say."""
    entries = [entry["metadata"] for entry in json.loads(Path(report).read_text())["install"]]
    fresh = {normal(entry["name"]): entry["version"] for entry in entries}
    fresh.pop(PROJECT, None)
    lines = [
        f"  {name} {str(constraints[name]).removeprefix('==') if name in constraints else '(new)'} -> {version}"
        for name, version in sorted(fresh.items())
        if name not in constraints or not constraints[name].contains(version, prereleases=True)
    ]
    gone = sorted(name for name in constraints if name not in fresh)
    print(
        f"fresh resolution: {len(lines)} of {len(fresh)} packages differ from launchers/constraints.txt",
        *lines,
        sep="\n",
    )
    if gone:
        print(f"  no longer needed: {', '.join(gone)}")


def main() -> int:
    """Do what the first argument says."""
    verb, what, *files = sys.argv[1:]
    if verb == "freeze":
        freeze(what)
    elif verb == "moved":
        moved(what, read_constraints(files))
    elif verb == "oldest":
        return oldest(what)
    else:
        return check(what, read_constraints(files))
    return 0


if __name__ == "__main__":
    sys.exit(main())
