"""Parse and compare mathematical expressions with math-verify, in a process of its own.

Simplifying can take forever or all memory, so `math_answers` starts this script, sends one JSON line for each question,
and ends the process when an answer takes too long. It imports nothing from the package, so that it starts fast.
"""

from __future__ import annotations

import json
import sys

_MOST_BYTES = 4 << 30
_MOST_CHARACTERS = 2000


def _expressions(text: str) -> list[object]:
    """What the whole text means; empty when it is not an expression."""
    from math_verify import LatexExtractionConfig, parse

    if len(text) > _MOST_CHARACTERS or "$" in text:
        return []
    found = parse(f"${text}$", [LatexExtractionConfig()], fallback_mode="no_fallback", parsing_timeout=None)
    return [one for one in found if not isinstance(one, str)]


def _answer(question: dict[str, str]) -> bool:
    if "text" in question:
        return bool(_expressions(question["text"]))
    from math_verify import verify

    gold, prediction = _expressions(question["gold"]), _expressions(question["prediction"])
    return bool(gold and prediction and verify(gold, prediction, timeout_seconds=None))


def _main() -> None:
    import contextlib
    import logging
    import warnings

    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (_MOST_BYTES, resource.RLIM_INFINITY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    import math_verify  # noqa: F401  # before the first question, whose time is limited

    answers = sys.stdout
    sys.stdout = sys.stderr  # a library that prints must not answer
    answers.write("ready\n")
    answers.flush()
    for line in sys.stdin:
        try:
            found = _answer(json.loads(line))
        except Exception:  # a parser or sympy gave up: no expression, not equal
            found = False
        answers.write(json.dumps(found) + "\n")
        answers.flush()


if __name__ == "__main__":
    _main()
