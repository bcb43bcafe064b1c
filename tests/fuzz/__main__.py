"""The command: `python -m tests.fuzz [PARSER…] [--count 50000] [--seed 0]`; exit code 1 when an input fails."""

from __future__ import annotations

import argparse
import sys

from .running import run, table


def main() -> int:
    """Run the inputs, print what failed and the table."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=main.__doc__)
    parser.add_argument("parsers", nargs="*", help="names of parsers; all when none is given")
    parser.add_argument("--count", type=int, default=50_000, help="inputs, shared out among the parsers (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    counts = run(arguments.count, seed=arguments.seed, only=arguments.parsers)
    failures = [line for count in counts for line in count.failures]
    print("\n".join(failures[:200]))
    print(table(counts))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
