"""The command: `python -m tests.fuzz [PARSER…] [--count 50000] [--seed 0]`; exit code 1 when an input fails."""

from __future__ import annotations

import argparse
import sys

from .running import Count, run, table


def main() -> int:
    """Run the inputs, print what failed as it does, and the table."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=main.__doc__)
    parser.add_argument("parsers", nargs="*", help="names of parsers; all when none is given")
    parser.add_argument("--count", type=int, default=50_000, help="inputs, shared out among the parsers (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    def say(count: Count) -> None:
        ended = f"{count.parser}: {count.inputs} inputs, {len(count.failures)} failures"
        print("\n".join([ended, *count.failures[:20]]), file=sys.stderr, flush=True)

    counts = run(arguments.count, seed=arguments.seed, only=arguments.parsers, on_count=say)
    print(table(counts))
    return 1 if any(count.failures for count in counts) else 0


if __name__ == "__main__":
    sys.exit(main())
