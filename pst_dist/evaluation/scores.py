"""Scores of decoded rows: which rows are scored, whether an answer is correct, means and their standard errors.

Pure functions over rows; `evaluate` generates the answers and stores the results.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pst_dist.data.sample import ReasoningSample
from pst_dist.data.sources.options import listed_options
from pst_dist.data.tasks import Task
from pst_dist.errors import InputError
from pst_dist.student.answer_format import AnswerFormat
from pst_dist.student.contexts import Decoded


def rows_to_score(samples: Sequence[ReasoningSample], most: int | None) -> list[ReasoningSample]:
    """All rows, or the first `most` ordered by the sha256 of their id: the same rows for every arm."""
    rows = list(samples)
    if most is None or most >= len(rows):
        return rows
    chosen = sorted(range(len(rows)), key=lambda k: hashlib.sha256(rows[k].id.encode()).digest())[:most]
    return [rows[k] for k in sorted(chosen)]


def given_rationales(samples: Sequence[ReasoningSample], *, wrong: bool) -> list[str]:
    """Each row's first rationale, or with `wrong` that of the next row in the order of the ids' sha256.

    Raises InputError for a row without a rationale, and with `wrong` for a single row.
    """
    lacking = next((sample for sample in samples if not sample.rationales), None)
    if lacking is not None:
        raise InputError(
            f"row {lacking.id} has no rationale to supply", "use evaluate.rationale=own", path=lacking.source
        )
    texts = [sample.rationales[0] for sample in samples]
    if not wrong:
        return texts
    if len(samples) < 2:
        raise InputError("a wrong rationale needs at least two rows, there is one", "use evaluate.rationale=own")
    ranks = sorted(range(len(samples)), key=lambda k: hashlib.sha256(samples[k].id.encode()).digest())
    donors = dict(zip(ranks, [*ranks[1:], ranks[0]], strict=True))
    return [texts[donors[k]] for k in range(len(samples))]


def sample_row(
    sample: ReasoningSample, answer: Decoded, prediction: str | None, task: Task, fmt: AnswerFormat
) -> dict[str, Any]:
    """One line of samples.jsonl; `turns` is there where the student was asked a conversation, as (role, text)."""
    asked = fmt.asked(sample)
    return {
        "id": sample.id,
        "question": sample.question,
        **({} if isinstance(asked, str) else {"turns": [list(turn) for turn in asked]}),
        "gold": sample.answer,
        "prediction": prediction,
        "answer_text": answer.answer_text,
        "correct": task.is_correct(prediction, sample.answer),
        "answer_tokens": answer.answer_tokens,
        "complete": answer.complete,
    }


def score_of(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Counts, accuracy (0 to 1) with its binomial standard error sqrt(p (1 - p) / n), and tokens to the answer.

    Needs at least one row. The standard error of the mean tokens is s / sqrt(n), s with n - 1; 0 for a single row.
    """
    correct = sum(row["correct"] for row in rows)
    share = correct / len(rows)
    tokens = np.array([row["answer_tokens"] for row in rows])
    return {
        "rows": len(rows),
        "correct": correct,
        "accuracy": share,
        "accuracy_stderr": math.sqrt(share * (1 - share) / len(rows)),
        "unparsed": sum(row["prediction"] is None for row in rows),
        "incomplete": sum(not row["complete"] for row in rows),
        "tokens_to_answer": {
            "mean": float(tokens.mean()),
            "median": float(np.median(tokens)),
            "p95": float(np.percentile(tokens, 95)),
            "stderr": float(tokens.std(ddof=1) / math.sqrt(len(tokens))) if len(tokens) > 1 else 0.0,
        },
    }


def scores_of_sources(samples: Sequence[ReasoningSample], rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Name -> the task and the scores of each source of a mixture, in the order of the rows; {} without a mixture.

    Marks each row with its source.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    tasks: dict[str, str] = {}
    for sample, row in zip(samples, rows, strict=True):
        if sample.part:
            row["part"] = sample.part
            found.setdefault(sample.part, []).append(row)
            tasks[sample.part] = sample.task
    return {name: {"task": tasks[name], **score_of(own)} for name, own in found.items()}


def with_current_names(results: dict[str, Any]) -> dict[str, Any]:
    """Results with current names: `unparsed` used to be called `parse_failures`."""
    if "parse_failures" not in results:
        return results
    return {"unparsed" if name == "parse_failures" else name: value for name, value in results.items()}


def chance_of(task: Task, samples: Sequence[ReasoningSample]) -> float | None:
    """Expected accuracy of blind guessing among each row's own options; None when they cannot be counted."""
    if task.rule == "yes_no":
        return 0.5
    if not task.choice_letters:
        return None
    counts = [len(sample.choices) or listed_options(sample.question) for sample in samples]
    if task.rule == "fine_tune_cot_letters":
        # These tasks have a known number of options, for questions that do not list their own.
        counts = [count or len(task.choice_letters) for count in counts]
    return sum(1 / count for count in counts) / len(counts) if all(counts) else None


def contains_answer(task: Task, text: str, gold: str) -> bool:
    """Whether the gold answer occurs anywhere in the generated text, as a candidate or (free text) as a substring."""
    if any(task.is_correct(candidate, gold) for candidate in task.candidates(text)):
        return True
    return task.answer_type == "text" and gold.casefold() in text.casefold()


def per_correct(results: Mapping[str, Any]) -> tuple[str, str]:
    """(mean tokens, median milliseconds) to the answer, each divided by the accuracy, as text; "" if not measured."""
    accuracy, latency = results["accuracy"], results["milliseconds_to_answer"]
    if not accuracy:
        return "none correct", "none correct"
    milliseconds = f"{latency['median'] / accuracy:.1f}" if latency else ""
    return f"{results['tokens_to_answer']['mean'] / accuracy:.1f}", milliseconds
