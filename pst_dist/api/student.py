"""A trained student that answers questions: one, or many at a time."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from pst_dist.api.faults import our_errors
from pst_dist.errors import InputError
from pst_dist.logs import progress, shown_by_default
from pst_dist.student.answer import Answer

if TYPE_CHECKING:
    from pst_dist.data.sample import Turns
    from pst_dist.student.answer_format import AnswerFormat
    from pst_dist.student.saved import LoadedStudent

Conversation = Sequence[Mapping[str, Any]]
"""Turns as {"role": ..., "content": ...}: perhaps a system turn, then user and assistant turns, the question last."""


def load_student(folder: str | Path, *, device: str | None = None) -> Student:
    """The trained student of a run directory, or of a folder with a student or an export, ready to answer questions.

    `device` is a torch device name; it defaults to the best one available. Every file is first compared with its
    digest. Raises InputError when there is no student, or several (naming the arms), and IntegrityError for a damaged
    one.
    """
    with our_errors(), shown_by_default():
        from pst_dist.evaluation.asking import student_folder
        from pst_dist.student.saved import load_student

        if not isinstance(folder, str | Path):
            raise InputError(f"expected the path of a student's folder, got {type(folder).__name__}", "give its path")
        return Student(load_student(student_folder(Path(folder)), device))


class Student:
    """A trained student that answers questions. It may be shared between threads; calls are served one at a time."""

    def __init__(self, loaded: LoadedStudent) -> None:
        self._loaded, self._turn = loaded, threading.Lock()

    def __repr__(self) -> str:
        return f"<Student {self.arm} in {self.directory} on {self.device}>"

    @property
    def arm(self) -> str:
        """The arm it was trained with."""
        return self._loaded.format.arm

    @property
    def directory(self) -> Path:
        """The folder it was loaded from."""
        return self._loaded.directory

    @property
    def device(self) -> str:
        """The torch name of its device."""
        return str(self._loaded.model.device)

    @property
    def model(self) -> Any:
        """The Hugging Face model."""
        return self._loaded.model

    @property
    def tokenizer(self) -> Any:
        """The Hugging Face tokenizer."""
        return self._loaded.tokenizer

    def ask(
        self,
        question: str | Conversation,
        *,
        explain: bool = False,
        think_below: float | None = None,
        max_new_tokens: int = 256,
    ) -> Answer:
        """Answer one question greedily; with `explain` the student also writes its rationale.

        A conversation is passed to the student as in training: as turns of its chat template, or else as one text.
        An adaptive student thinks first when the probability of its answer is below `think_below` (0 never, 2 always;
        defaults to the threshold that the evaluation chose). Raises InputError for a question that is empty or too
        long for the model, for turns that the student cannot be asked, and for `think_below` with a student of another
        arm.
        """
        return self._ask([question], explain, think_below, max_new_tokens, None)[0]

    def ask_many(
        self,
        questions: Iterable[str | Conversation],
        *,
        explain: bool = False,
        think_below: float | None = None,
        max_new_tokens: int = 256,
        batch_size: int = 64,
    ) -> list[Answer]:
        """Answer many questions, `batch_size` at a time, showing progress; answers are in the order of `questions`.

        The arguments and errors are those of `ask`; an error names the question's number, and none is answered.
        """
        if isinstance(questions, str):
            raise InputError("questions is one string", "give a list of them, or use `ask`")
        questions = list(questions)
        if questions and all(isinstance(one, Mapping) for one in questions):
            raise InputError("questions is one conversation", "give a list of them, or use `ask`")
        if not isinstance(batch_size, int) or batch_size < 1:
            raise InputError(f"batch_size is {batch_size!r}", "give a whole number of at least 1")
        return self._ask(questions, explain, think_below, max_new_tokens, batch_size)

    def _ask(
        self,
        questions: list[str | Conversation],
        explain: bool,
        think_below: float | None,
        max_new_tokens: int,
        batch_size: int | None,
    ) -> list[Answer]:
        from pst_dist.evaluation.asking import threshold_of
        from pst_dist.student.ask import answer_question, answer_questions

        if not isinstance(max_new_tokens, int) or max_new_tokens < 1:
            raise InputError(f"max_new_tokens is {max_new_tokens!r}", "give a whole number of at least 1")
        fmt, count = self._loaded.format, len(questions)
        with self._turn, our_errors(), shown_by_default():
            asked = [
                _asked(fmt, one, f"question {n} of {count}" if count > 1 else "the question")
                for n, one in enumerate(questions, 1)
            ]
            settings: dict[str, Any] = {
                "explain": explain,
                "max_new_tokens": max_new_tokens,
                "think_below": threshold_of(self._loaded, think_below),
            }
            if batch_size is None:
                return [answer_question(self._loaded, asked[0], **settings)]
            if not asked:
                return []
            with progress(f"ask {self.arm}", total=len(asked), unit="questions") as bar:
                return answer_questions(self._loaded, asked, batch_size=batch_size, on_batch=bar.advance, **settings)


def _asked(fmt: AnswerFormat, question: Any, which: str) -> str | Turns:
    """A question as a student of this format is asked it; what is neither text nor turns is left to `student.ask`."""
    if isinstance(question, str) or not isinstance(question, Sequence) or not question:
        return cast("str", question)
    from pst_dist.data.sources.conversations import read_question
    from pst_dist.data.sources.rows import RowError

    try:
        read = read_question(list(question), which, {})
    except RowError as error:
        raise InputError(
            error.what, 'give text, or turns as {"role": …, "content": …} that end with a question'
        ) from None
    return fmt.put(cast("str", read.text), read.turns)
