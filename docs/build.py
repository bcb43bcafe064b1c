"""Builds the documentation site: `python docs/build.py` writes build/site; a broken link is an error.

Needs the extra `docs`. The site has the pages of docs/ and those of other folders that `_ELSEWHERE` lists.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
_ELSEWHERE = {
    "cluster/README.md": "clusters.md",
    "ds_configs/README.md": "zero.md",
    "benchmarks/README.md": "benchmarks.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}
"""Page in the repository -> its name on the site."""
_LINK = re.compile(r"(\]\()([^)\s#:]+)(#[^)\s]*)?(\))")


def gather(folder: Path) -> None:
    """Copy all pages to `folder`, with links between them as they are on the site."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(ROOT / "docs", folder, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    for source, name in _ELSEWHERE.items():
        shutil.copyfile(ROOT / source, folder / name)
        _relink(folder / name, ROOT / source, folder)
    for page in (ROOT / "docs").rglob("*.md"):
        _relink(folder / page.relative_to(ROOT / "docs"), page, folder)


def _relink(copy: Path, original: Path, folder: Path) -> None:
    depth = len(copy.relative_to(folder).parts) - 1

    def on_the_site(match: re.Match[str]) -> str:
        target = (original.parent / match[2]).resolve()
        if not target.is_relative_to(ROOT):
            return match[0]
        path = target.relative_to(ROOT).as_posix()
        name = _ELSEWHERE.get(path) or (path.removeprefix("docs/") if path.startswith("docs/") else None)
        return match[0] if name is None else f"{match[1]}{'../' * depth}{name}{match[3] or ''}{match[4]}"

    copy.write_text(_LINK.sub(on_the_site, copy.read_text(encoding="utf-8")), encoding="utf-8")


def main() -> int:
    """Build the site; returns zensical's exit code."""
    gather(ROOT / "build" / "docs")
    command = [sys.executable, "-m", "zensical", "build", "--strict", "--clean", *sys.argv[1:]]
    return subprocess.run(command, cwd=ROOT, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
