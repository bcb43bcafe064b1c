"""Runs tests against broken copies of the package: `python mutate.py FOLDER`, see test_mutations.py.

FOLDER holds the package, its tests and mutations.json. Loading torch takes longer than a test: it is done once here,
and each mutation is tried in a fork, where nothing of the package is loaded yet.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path


def main() -> None:
    """Try every mutation in turn; the package is as it was after each."""
    folder = Path(sys.argv[1])
    import hypothesis  # noqa: F401
    import torch
    import torch._dynamo
    import transformers  # noqa: F401

    torch.set_num_threads(1)
    assert not any(name.startswith("pst_dist") for name in sys.modules)
    verdicts = {"unbroken": tried(folder, "tests/kernels/test_head.py", "unbroken")}
    for name, (file, line, broken, tests) in json.loads((folder / "mutations.json").read_text()).items():
        path = folder / "pst_dist" / file
        source = path.read_text()
        if source.count(line) != 1:
            verdicts[name] = [-1, f"{line!r} stands {source.count(line)} times in {file}: name another line"]
            continue
        path.write_text(source.replace(line, broken))
        verdicts[name] = tried(folder, tests, name)
        path.write_text(source)
    (folder / "verdicts.json").write_text(json.dumps(verdicts))


def tried(folder: Path, tests: str, name: str) -> list:
    """[exit code, end of the output] of pytest on the copy in `folder`."""
    output = folder / f"{name.replace(' ', '-')}.txt"
    child = os.fork()
    if child == 0:
        stream = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(stream, 1)
        os.dup2(stream, 2)
        sys.path.insert(0, str(folder))
        import pytest

        options = ["-x", "-q", "-p", "no:cacheprovider", "--no-header", "--tb=short", "--show-capture=no"]
        code = pytest.main([*options, str(folder / tests)])
        import pst_dist

        ours = str(Path(pst_dist.__file__).resolve()).startswith(str(folder.resolve()))
        sys.stdout.flush()
        os._exit(int(code) if ours else 99)
    _, status = os.waitpid(child, 0)
    return [os.waitstatus_to_exitcode(status), output.read_text()[-1500:]]


if __name__ == "__main__":
    main()
