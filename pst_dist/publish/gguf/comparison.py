"""Asks a GGUF file in llama.cpp and transformers the same questions, and counts how many answers differ.

transformers' answers are those of `pst evaluate`, in the precision of the student's weights (float32). llama.cpp is
asked with the plain prompt, greedily, several at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

from pst_dist.arms import ARMS
from pst_dist.data.sample import Turns
from pst_dist.data.tasks import Task
from pst_dist.publish.gguf.engine import Engine
from pst_dist.student.answer_format import AnswerFormat

SLOTS = 4


@dataclass(frozen=True)
class Comparison:
    """How a GGUF file answered the rows that transformers answered."""

    rows: int
    different: int
    """Rows whose answer is another text."""
    correct: int
    correct_in_transformers: int
    unfinished: int
    """Rows that reached the limit on tokens instead of stopping by themselves."""

    @property
    def share(self) -> float:
        """The share of rows that are answered differently, 0 to 1."""
        return self.different / self.rows

    def line(self) -> str:
        """The result in one sentence."""
        return (
            f"{self.different} of {self.rows} test rows ({100 * self.share:.1f} %) answered differently than by "
            f"transformers; accuracy {100 * self.correct / self.rows:.1f} % instead of "
            f"{100 * self.correct_in_transformers / self.rows:.1f} %"
        )

    def to_json(self) -> dict[str, int]:
        """Plain dict for the manifest."""
        return asdict(self)


def asked_in(row: Mapping[str, Any]) -> str | Turns:
    """What the student was asked in a row of an evaluation: its question, or the turns that it was asked as."""
    turns = row.get("turns")
    return tuple((role, text) for role, text in turns) if turns else row["question"]


def server_prompt(fmt: AnswerFormat, question: str | Turns) -> str:
    """The text before a causal student's answer, as a server's completions endpoint takes it."""
    return fmt.render(question) + (fmt.semantic_token * fmt.semantic_tokens if fmt.semantic_before else "")


def compare_answers(
    engine: Engine,
    fmt: AnswerFormat,
    task: Task,
    rows: Sequence[dict[str, Any]],
    *,
    max_new_tokens: int,
    on_row: Callable[[int], None] = lambda _: None,
) -> Comparison:
    """Ask the engine every row of an evaluation (see `sample_row`) and count; needs at least one row."""
    marker = None if ARMS[fmt.arm].answers_first else fmt.answer_marker.strip()

    def ask(row: dict[str, Any]) -> tuple[bool, bool, bool]:
        reply = engine.answer(server_prompt(fmt, asked_in(row)), max_new_tokens)
        text = reply.text if marker is None else reply.text.partition(marker)[2]
        right = task.is_correct(task.extract(reply.text, marker), row["gold"])
        on_row(1)
        return text.strip() != row["answer_text"].strip(), right, not reply.stopped

    with ThreadPoolExecutor(SLOTS) as pool:
        different, correct, unfinished = (sum(column) for column in zip(*pool.map(ask, rows), strict=True))
    return Comparison(len(rows), different, correct, sum(row["correct"] for row in rows), unfinished)
