"""Answers in mathematics: numbers by value, times, words, and expressions by symbolic equality through math-verify.

`math_answer` finds the canonical text of an answer or nothing, `same_math` compares two of them. Numbers, times and
words are handled here; only expressions go to the worker process, with a time limit. math-verify on its own takes the
last number of "3 apples or 4" as the answer; here a text must be one expression from end to end.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import importlib.util
import json
import logging
import os
import re
import select
import subprocess
import sys
import threading
import time
from fractions import Fraction
from pathlib import Path

from pst_dist.data.tasks.number_answers import boxed_contents, find_number
from pst_dist.data.tasks.number_markup import NotANumber
from pst_dist.data.tasks.numbers import is_unit, read_number, write_number
from pst_dist.errors import EnvironmentFault

log = logging.getLogger(__name__)
SECONDS = 5.0
"""Time limit of one expression or comparison."""
_START_SECONDS = 120.0

_LEAD = re.compile(r"(?:so,? )?(?:(?:the )?(?:final )?answer (?:is|=)|(?:final )?answer ?:)[ :]*", re.IGNORECASE)
_TIME = re.compile(r"(\d{1,2}):([0-5]\d)(?::([0-5]\d))?(?: ?([ap])\.? ?m\.?)?", re.IGNORECASE | re.ASCII)
_RATIO = re.compile(r"\d{1,9}(?: ?: ?\d{1,9})+", re.ASCII)
_TEXT = re.compile(r"\\(?:text|textbf|textrm|mathrm|mbox)\{([^{}\\]+)\}")
_UNIT = re.compile(rf"{_TEXT.pattern}$")
_WORD = re.compile(r"[^\W\d_]{2,}")
_WRAPPERS = (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"), ("**", "**"))
_COMMAND = re.compile(r"\\[A-Za-z]+")
_FUNCTIONS = re.compile(r"(?<![\\A-Za-z])(sin|cos|tan|log|ln|exp|pi)(?![A-Za-z])")
_ROOT = re.compile(r"(?<![\\A-Za-z])sqrt ?\(")
_JOINING = frozenset(("or", "and"))
_ENVIRONMENTS = re.compile(r"\\(?:begin|end)\{[a-z]*matrix\}")


def math_answer(text: str) -> str | None:
    """The canonical text of an answer; None where there is none, several, or one that is not completely understood.

    The content of `\\boxed{}` counts if there is one; otherwise the whole text, without "The answer is" before it, or a
    number in a sentence as `find_number` finds it. Raises EnvironmentFault where an expression must be understood and
    math-verify is not installed.
    """
    boxed = boxed_contents(text)
    if boxed:
        found = {None if group is None else _whole(group) for group in boxed}
        return found.pop() if len(found) == 1 else None
    plain = " ".join(text.split())
    lead = _LEAD.match(plain)
    whole = _whole(plain[lead.end() :] if lead else plain)
    if whole is not None:
        return whole
    number = find_number(text)
    return None if number is None else write_number(number)


def same_math(prediction: str, gold: str) -> bool:
    """Whether two canonical answers are equal. What cannot be decided within `SECONDS` is not, with a warning."""
    if prediction == gold:
        return True
    left, right = _value(prediction), _value(gold)
    if left is not None and right is not None:
        return left == right
    if any(_is_literal(text) for text in (prediction, gold)):
        return False
    found = _ask(gold=gold, prediction=prediction)
    if found is None:
        log.warning("whether %s equals %s was not decided in %g s: counted as wrong", prediction, gold, SECONDS)
    return bool(found)


def _whole(text: str) -> str | None:
    """The canonical text of a text that is an answer from end to end."""
    text = _unwrapped(" ".join(text.split()))
    if not text:
        return None
    value = _value(text)
    if value is not None:
        return write_number(value)
    if clock := _TIME.fullmatch(text):
        hours, minutes, seconds, half = clock.groups()
        return f"{int(hours)}:{minutes}" + (f":{seconds}" if seconds else "") + (f" {half.lower()}m" if half else "")
    if _RATIO.fullmatch(text):
        return ":".join(str(int(part)) for part in text.split(":"))
    word = _TEXT.fullmatch(text)
    if word or _WORD.fullmatch(text):
        return " ".join((word[1] if word else text).casefold().split())
    expression = _as_latex(text)
    return expression if expression is not None and _ask(text=expression) else None


def _value(text: str) -> Fraction | None:
    try:
        return read_number(text)
    except NotANumber:
        return None


def _is_literal(text: str) -> bool:
    """Whether a canonical answer is a time, a ratio or words, which only equal themselves."""
    if _TIME.fullmatch(text) or _RATIO.fullmatch(text):
        return True
    return "\\" not in text and not re.search(r"\d", text) and bool(_WORD.match(text))


def _unwrapped(text: str) -> str:
    """Without a final full stop and the delimiters around the whole."""
    for _ in range(3):
        if text.endswith(".") and not text.endswith(".."):
            text = text[:-1].rstrip()
        for start, end in _WRAPPERS:
            inner = text[len(start) : len(text) - len(end)].strip()
            if text.startswith(start) and text.endswith(end) and len(text) > len(start + end) and start not in inner:
                text = inner
                break
    return text


def _as_latex(text: str) -> str | None:
    """An expression as LaTeX, a unit at its end left out; None where it has words, which would be read as products."""
    unit = _UNIT.search(text)
    if unit and all(is_unit(word) for word in unit[1].split()):
        text = text[: unit.start()].strip()
    rooted = _with_roots(text)
    if rooted is None or ":" in rooted:  # a colon would be read as a division
        return None
    text = _FUNCTIONS.sub(r"\\\1 ", rooted.replace("**", "^").replace("\u2212", "-"))
    if _TEXT.search(text):
        return None
    left = _COMMAND.sub(" ", _ENVIRONMENTS.sub(" ", text))
    if any(word.lower() not in _JOINING for word in _WORD.findall(left)):
        return None
    return text


def _with_roots(text: str) -> str | None:
    """`sqrt(2)` as `\\sqrt{2}`; None for a bracket that is not closed."""
    while found := _ROOT.search(text):
        depth, place = 1, found.end()
        while place < len(text) and depth:
            depth += (text[place] == "(") - (text[place] == ")")
            place += 1
        if depth:
            return None
        text = f"{text[: found.start()]}\\sqrt{{{text[found.end() : place - 1]}}}{text[place:]}"
    return text


@functools.lru_cache(maxsize=100_000)
def _ask_cached(question: str) -> bool | None:
    return _worker().ask(question)


def _ask(**question: str) -> bool | None:
    """The worker's answer to a question; None when it took too long."""
    return _ask_cached(json.dumps(question, sort_keys=True))


class _Worker:
    """The child process; started when it is needed, and again after one that was ended."""

    def __init__(self) -> None:
        self._turn = threading.Lock()
        self._child: subprocess.Popen[bytes] | None = None
        self.process = os.getpid()
        atexit.register(self.end)

    def ask(self, question: str) -> bool | None:
        with self._turn:
            child = self._started()
            assert child.stdin is not None
            with contextlib.suppress(BrokenPipeError):
                child.stdin.write(question.encode() + b"\n")
                child.stdin.flush()
            line = _line(child, SECONDS)
            if line is None:
                self.end()
                return None
            return bool(json.loads(line))

    def _started(self) -> subprocess.Popen[bytes]:
        if self._child is not None and self._child.poll() is None:
            return self._child
        if importlib.util.find_spec("math_verify") is None:
            raise EnvironmentFault("comparing mathematical answers needs math-verify", "pip install 'pst-dist[math]'")
        environment = {
            **os.environ,
            "PYTHONSAFEPATH": "1",  # the modules next to the script must not shadow others
            "PYTHONPATH": os.pathsep.join(word for word in sys.path if word),
        }
        script = str(Path(__file__).with_name("math_worker.py"))
        self._child = subprocess.Popen(
            [sys.executable, script],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
        )
        if _line(self._child, _START_SECONDS) is None:
            self.end()
            raise EnvironmentFault("math-verify cannot be started", "run `python -c 'import math_verify'`")
        return self._child

    def end(self) -> None:
        """Kill the child, unless this is a fork of the process that started it."""
        child, self._child = self._child, None
        if child is not None and self.process == os.getpid():
            child.kill()
            child.wait()
            for stream in (child.stdin, child.stdout):
                with contextlib.suppress(OSError):
                    if stream is not None:
                        stream.close()


def _line(child: subprocess.Popen[bytes], seconds: float) -> bytes | None:
    """The next line of a child; None when it ends, or takes longer than `seconds`."""
    assert child.stdout is not None
    until, found = time.monotonic() + seconds, b""
    while not found.endswith(b"\n"):
        ready, _, _ = select.select([child.stdout], [], [], max(0.0, until - time.monotonic()))
        piece = os.read(child.stdout.fileno(), 4096) if ready else b""
        if not piece:
            return None
        found += piece
    return found


_workers: list[_Worker] = []


def _worker() -> _Worker:
    """This process's worker; a fork starts its own."""
    if not _workers or _workers[-1].process != os.getpid():
        _workers[:] = [_Worker()]
    return _workers[-1]
