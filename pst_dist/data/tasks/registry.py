"""The tasks by name: Fine-tune-CoT's twelve, those of the demo, and a generic one for each answer type."""

from __future__ import annotations

import difflib

from pst_dist.data.sample import ANSWER_TYPES, ReasoningSample
from pst_dist.data.tasks.scoring import Task
from pst_dist.errors import ConfigError, IntegrityError


def _numbers(name: str, summary: str, *, numeric: bool) -> Task:
    return Task(name=name, answer_type="number", rule="fine_tune_cot_numbers", numeric=numeric, summary=summary)


def _choice(name: str, letters: str, summary: str) -> Task:
    return Task(name=name, answer_type="choice", rule="fine_tune_cot_letters", choice_letters=letters, summary=summary)


def _yes_no(name: str, summary: str) -> Task:
    return Task(name=name, answer_type="bool", rule="yes_no", summary=summary)


_ALL = (
    _numbers("single_eq", "arithmetic word problems with one equation", numeric=True),
    _numbers("addsub", "word problems of addition and subtraction", numeric=True),
    _numbers("multiarith", "word problems of several steps", numeric=False),
    _numbers("gsm8k", "grade-school mathematics", numeric=False),
    _choice("aqua", "ABCDE", "algebra with five choices"),
    _numbers("svamp", "word problems varied to mislead", numeric=True),
    _choice("date_understanding", "ABCDEF", "which date is meant, of up to six"),
    _choice("tracking_shuffled_objects", "ABC", "who holds what after swaps"),
    Task(
        name="last_letter_concatenation",
        answer_type="text",
        rule="joined_letters",
        summary="the last letters of four words, joined",
    ),
    _yes_no("coin_flip", "is the coin still heads up after some flips"),
    _choice("commonsense_qa", "ABCDE", "everyday knowledge with five choices"),
    _yes_no("strategy_qa", "questions that need several implied steps"),
    # Scored like svamp, as in all published results of this repository.
    _numbers("arithmetic", "the demo's word problems of several steps", numeric=True),
    Task(
        name="proportion",
        answer_type="number",
        rule="number",
        percent_is_hundredths=True,
        summary="a proportion or probability: 1/2, 0.5 and 50 % are equal",
    ),
)

TASKS: dict[str, Task] = {task.name: task for task in _ALL}
"""The 12 tasks in the order of the published tables, then the demo's task and `proportion`."""

_GENERIC: dict[str, Task] = {
    "text": Task(name="text", answer_type="text", rule="whole_text", summary="free text, compared without case"),
    "number": Task(name="number", answer_type="number", rule="number", summary="any number, compared by value"),
    "choice": Task(
        name="choice",
        answer_type="choice",
        rule="marked_letters",
        choice_letters="ABCDEFGHIJKLMNOPQRSTUVWXYZ",
        summary="one of up to 26 choices",
    ),
    "bool": _yes_no("bool", "yes or no"),
    "date": Task(name="date", answer_type="date", rule="dates", summary="a calendar date"),
    "math": Task(
        name="math", answer_type="math", rule="math", summary="a number, time or expression, compared by what it means"
    ),
}


def task_of(sample: ReasoningSample, usual: Task | None) -> Task:
    """The task by which a sample is scored: its own in a mixture, else the usual one."""
    if sample.task:
        return TASKS.get(sample.task) or get_task(None, sample.task)
    if usual is None:
        raise IntegrityError(f"sample {sample.id} of a mixture has no task", "run `pst shard --rebuild`")
    return usual


def get_task(name: str | None, answer_type: str | None = None) -> Task:
    """The task `name`, or without a name the generic task of an answer type (default text).

    Raises ConfigError for an unknown name, with the closest known one, and for an answer type that differs from the
    named task's.
    """
    if name is None:
        if answer_type is not None and answer_type not in _GENERIC:
            raise ConfigError(f"answer type {answer_type!r} is not one of {', '.join(ANSWER_TYPES)}")
        return _GENERIC[answer_type or "text"]
    task = TASKS.get(name)
    if task is None:
        near = difflib.get_close_matches(name, TASKS, n=1, cutoff=0.5)
        raise ConfigError(
            f"no task {name!r}", f"did you mean {near[0]!r}?" if near else "known tasks: " + ", ".join(TASKS)
        )
    if answer_type is not None and answer_type != task.answer_type:
        raise ConfigError(
            f"task {name} has {task.answer_type} answers, but data.answer_type is {answer_type}",
            "leave one of them out, or set it to null",
        )
    return task
