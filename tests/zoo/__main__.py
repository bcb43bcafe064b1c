"""The command: `python -m tests.zoo [FAMILY...] [--python PATH]`; exit code 1 when an export breaks a promise."""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS), str(TESTS / "helpers"), str(TESTS.parent)]


def main() -> int:
    """Train, export and ask a tiny student of each family; print how often each claim of its model card fails."""
    from pst_dist.logs import quiet_libraries

    from .exports import QUESTIONS, matrix
    from .families import FAMILIES

    parser = argparse.ArgumentParser(prog="python -m tests.zoo", description=main.__doc__)
    parser.add_argument("families", nargs="*", metavar="FAMILY", help=f"of {', '.join(FAMILIES)}; all by default")
    parser.add_argument(
        "--python",
        default=sys.executable,
        help="interpreter that loads the exports, for example one with another transformers (%(default)s)",
    )
    arguments = parser.parse_args()
    unknown = sorted(set(arguments.families) - set(FAMILIES))
    if unknown:
        parser.error(f"no family {', '.join(unknown)}")
    quiet_libraries()
    failed, first = False, True
    for name in arguments.families or FAMILIES:
        with tempfile.TemporaryDirectory(prefix="pst-zoo-") as folder:
            told = matrix(Path(folder), (name,), python=arguments.python)[name]
        faults = told.faults(name)
        failed = failed or any(faults.values())
        if first:
            print("  ".join(("family".ljust(8), "questions", *faults)))
            first = False
        cells = (str(count).rjust(len(claim)) for claim, count in faults.items())
        print("  ".join((name.ljust(8), str(len(QUESTIONS)).rjust(9), *cells)), flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
