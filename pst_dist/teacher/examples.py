"""Worked examples for few-shot prompts: ours for the twelve tasks, those of a file, or some of the given rows."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from importlib import resources

import yaml

from pst_dist.config.schema import Config
from pst_dist.data.tasks import Task
from pst_dist.errors import ConfigError, DataError
from pst_dist.teacher.questions import Question, Questions, read_examples

FROM_ROWS = "rows"
_BY_ANSWER = {"number": "multiarith", "bool": "strategy_qa", "choice": "commonsense_qa"}
"""Whose examples show a task that has none of its own."""


def examples_for(config: Config, questions: Questions, spec: str | None, seed: int) -> tuple[Question, ...]:
    """All examples that may be used, in the order in which they are drawn.

    `spec` is a file, `rows` for the questions themselves, or None for ours. Raises ConfigError when we have none for
    the task, DataError when no row has an answer and a rationale.
    """
    if spec is None:
        return own_examples(questions.task)
    if spec == FROM_ROWS:
        found = [row for row in questions.rows if row.gold is not None and row.rationales]
        if not found:
            raise DataError("--examples rows: no row has an answer and a rationale", "name a file with some")
    else:
        found = read_examples(spec, config)
    return tuple(sorted(found, key=lambda row: hashlib.sha256(f"{seed}/{row.id}".encode()).digest()))


def draw(examples: Sequence[Question], shots: int, question: Question) -> list[Question]:
    """The first examples, without the question itself."""
    return [one for one in examples if one.key != question.key][:shots]


@functools.cache
def own_examples(task: Task) -> tuple[Question, ...]:
    """Our examples for a task, or for one with the same kind of answer; raises ConfigError when there are none."""
    text = (resources.files("pst_dist") / "teacher" / "examples.yaml").read_text(encoding="utf-8")
    table = yaml.safe_load(text)
    name = task.name if task.name in table else _BY_ANSWER.get(task.answer_type)
    if name is None:
        raise ConfigError(
            f"few_shot has no examples for {task.answer_type} answers without a named task",
            "set task=NAME, or give your own with --examples FILE",
        )
    return tuple(
        Question(
            id=f"{name}-{number}",
            text=row["question"],
            gold=row["answer"],
            rationales=(row["rationale"],),
            source=f"examples.yaml#{name}",
        )
        for number, row in enumerate(table[name])
    )
