"""The command: `python -m tests.chaos [GOAL…] [--full] [--table FILE]`; with no goal, all of them.

A line is printed for each result as it comes, and one table at the end. The exit code is 1 when anything failed. Home,
caches and temporary files are the command's own, and it ends only processes that it started.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

# The children are forked from a process that has used torch, and would deadlock on its pool of threads.
os.environ.setdefault("OMP_NUM_THREADS", "1")
TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS), str(TESTS / "helpers"), str(TESTS.parent)]

from chaos.goal import Result, stop_after, table  # noqa: E402 - found by the line above, also when started as tests.chaos


def goals() -> dict[str, tuple[Callable[..., Iterator[Result]], str]]:
    """Goal -> (function of a folder and of whether the counts are full, one line of help)."""
    from chaos.damage import damage
    from chaos.disk import full_disk, places, refused_calls
    from chaos.kills import kills
    from chaos.order import order
    from chaos.starts import starts
    from chaos.storm import storm
    from chaos.told import told

    return {
        "order": (order, "each sample once an epoch, across world sizes, workers and resumes"),
        "kills": (kills, "killed at every system call that changes a file, and at random moments"),
        "damage": (damage, "bits flipped, files cut, swapped, stale: found before use and named"),
        "told": (told, "SIGTERM, SIGINT and SIGUSR1 at random moments of a training, and twice"),
        "full_disk": (full_disk, "stages on disks of many sizes, all too small"),
        "refused_calls": (refused_calls, "ENOSPC, EDQUOT and EIO at each system call"),
        "places": (places, "read-only and size-limited places, links and mounts of other file systems"),
        "starts": (starts, "two starts in one directory, again and again"),
        "storm": (storm, "the pipeline under kills, pauses, signals and a filling disk, for minutes"),
    }


def main() -> int:
    """Run the goals of the command line."""
    known = goals()
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__.split("\n")[0])
    parser.epilog = "goals: " + "; ".join(f"{name}: {text}" for name, (_, text) in known.items())
    parser.add_argument("goals", nargs="*", metavar="GOAL", help="which ones (default all); kills:NAME for one stage")
    parser.add_argument("--full", action="store_true", help="all counts, which take hours, instead of a sample")
    parser.add_argument("--table", metavar="FILE", help="write the table here, in markdown")
    parser.add_argument("--json", metavar="FILE", help="append each result here, one JSON line each")
    parser.add_argument("--minutes", type=float, metavar="N", help="end after so long, and say what was left")
    parser.add_argument("--folder", metavar="DIR", help="work below this directory instead of the temporary one")
    arguments = parser.parse_args()
    wanted = [word.partition(":") for word in arguments.goals or known]
    if unknown := [name for name, _, _ in wanted if name not in known]:
        parser.error(f"no goal {unknown[0]!r}; there are {', '.join(known)}")
    if arguments.minutes:
        stop_after(arguments.minutes)
    if arguments.folder:
        Path(arguments.folder).mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix="chaos-", dir=arguments.folder))
    _private(work / "home")
    results = []
    try:
        for name, _, part in wanted:
            only = {"only": tuple(part.split(","))} if part else {}
            for result in known[name][0](work / name, arguments.full, **only):
                results.append(result)
                state = f"{len(result.failures)} failures" if result.failures else "ok"
                words = f"{result.trials:,} trials, {state}, {result.seconds:.0f} s"
                print(f"{name}: {result.goal}: {words}{', ' if result.note else ''}{result.note}", flush=True)
                for line in result.failures[:20]:
                    print(f"    FAILED {line}", flush=True)
                if arguments.json:
                    with open(arguments.json, "a") as stream:
                        stream.write(json.dumps(asdict(result)) + "\n")
    finally:
        shutil.rmtree(work, ignore_errors=True)
    print("\n" + table(results))
    if arguments.table:
        Path(arguments.table).write_text(table(results))
    return 1 if any(result.failures for result in results) else 0


def _private(home: Path) -> None:
    """Home, caches and temporary files of this command alone; nothing is fetched."""
    home.mkdir(parents=True)
    for name in ("HOME", "XDG_CACHE_HOME", "HF_HOME", "MPLCONFIGDIR", "TORCHINDUCTOR_CACHE_DIR", "RAY_TMPDIR"):
        os.environ[name] = str(home / name.lower())
        (home / name.lower()).mkdir()
    os.environ["TMPDIR"] = str(home)
    tempfile.tempdir = None
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    os.environ |= {"DS_ACCELERATOR": "cpu", "PYTHONWARNINGS": "ignore", "PYTHONPATH": str(TESTS.parent)}


if __name__ == "__main__":
    sys.exit(main())
