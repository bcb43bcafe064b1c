"""What a teacher is asked: zero-shot in two steps, few-shot, an explanation of the gold answer, or a template.

A prompt turns a question into the conversation of its first request, and, if it has two steps, the reply to it into
that of the second. Where a model continues plain text (`chat` is false), zero_shot is word for word Fine-tune-CoT's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import yaml

from pst_dist.data.sample import AnswerType
from pst_dist.data.tasks import Task
from pst_dist.errors import ConfigError
from pst_dist.storage.manifest import digest_of
from pst_dist.storage.regular_files import read_regular_text
from pst_dist.teacher.examples import draw
from pst_dist.teacher.messages import Turn
from pst_dist.teacher.questions import Question
from pst_dist.teacher.settings import PROMPTS

_STEP_BY_STEP = "Let's think step by step."
_THEREFORE = "\nTherefore, the answer is"
_VERSION = 1
"""Counts changes of the wording below, so that a journal of an older one is refused."""
_FORMS: dict[AnswerType, str] = {
    "number": "only the number",
    "choice": "only the letter",
    "bool": "only yes or no",
    "text": "only the answer",
    "date": "only the date as MM/DD/YYYY",
}


class Prompt(Protocol):
    """One way of asking."""

    @property
    def name(self) -> str:
        """For keys, rows and the report."""

    @property
    def shows_answer(self) -> bool:
        """Whether the gold answer is in it; such a reply cannot be scored by its answer."""

    def first(self, question: Question, chat: bool) -> tuple[Turn, ...]:
        """The conversation of the first request."""

    def second(self, question: Question, reply: str, chat: bool) -> tuple[Turn, ...] | None:
        """The conversation that asks for the answer after the reasoning `reply`; None for a prompt of one step."""

    def identity(self) -> Any:
        """Everything of it that shapes a reply."""


@dataclass(frozen=True)
class ZeroShot:
    """Fine-tune-CoT's: think step by step; then the answer alone."""

    task: Task
    name: str = "zero_shot"
    shows_answer: bool = False

    def first(self, question: Question, chat: bool) -> tuple[Turn, ...]:
        if chat:
            return (("user", f"{question.text}\n\n{_STEP_BY_STEP}"),)
        return (("user", question.text), ("assistant", _STEP_BY_STEP))

    def second(self, question: Question, reply: str, chat: bool) -> tuple[Turn, ...] | None:
        if chat:
            form = _FORMS[self.task.answer_type]
            ask = f"Therefore, the answer is what? Write {form}."
            return (*self.first(question, chat), ("assistant", reply.strip()), ("user", ask))
        return (("user", question.text), ("assistant", f"{_STEP_BY_STEP} {reply.strip()}{_THEREFORE}"))

    def identity(self) -> Any:
        return [self.name, _VERSION, self.task.answer_type]


@dataclass(frozen=True)
class FewShot:
    """Worked examples, then the question."""

    task: Task
    examples: Sequence[Question]
    shots: int
    name: str = "few_shot"
    shows_answer: bool = False

    def first(self, question: Question, chat: bool) -> tuple[Turn, ...]:
        turns: list[Turn] = []
        if chat:
            turns.append(("system", 'Reason in a few short steps, then end with "The answer is ...".'))
        for one in draw(self.examples, self.shots, question):
            turns += [("user", one.text), ("assistant", f"{one.rationales[0]} The answer is {one.gold}.")]
        return (*turns, ("user", question.text))

    def second(self, question: Question, reply: str, chat: bool) -> tuple[Turn, ...] | None:
        return None

    def identity(self) -> Any:
        shown = [[one.text, one.rationales[0], one.gold] for one in self.examples]
        return [self.name, _VERSION, self.shots, digest_of(shown)]


@dataclass(frozen=True)
class Explain:
    """The gold answer is told, and why it is right is asked. Suits students that answer first."""

    name: str = "explain"
    shows_answer: bool = True

    def first(self, question: Question, chat: bool) -> tuple[Turn, ...]:
        answer = told_answer(question)
        if not chat:
            return (("user", question.text), ("assistant", f"The answer is {answer}. Here is why, step by step."))
        ask = (
            f"The answer is {answer}. Explain step by step why the answer is {answer}, in a few short sentences. "
            "Do not repeat the question."
        )
        return (("user", f"{question.text}\n\n{ask}"),)

    def second(self, question: Question, reply: str, chat: bool) -> tuple[Turn, ...] | None:
        return None

    def identity(self) -> Any:
        return [self.name, _VERSION]


@dataclass(frozen=True)
class Template:
    """A user's own. `{question}` and `{answer}` are replaced; nothing else is."""

    name: str
    prompt: str
    system: str | None = None
    answer_prompt: str | None = None

    @property
    def shows_answer(self) -> bool:
        return "{answer}" in self.prompt + (self.system or "")

    def first(self, question: Question, chat: bool) -> tuple[Turn, ...]:
        system: tuple[Turn, ...] = (("system", self._filled(self.system, question)),) if self.system else ()
        return (*system, ("user", self._filled(self.prompt, question)))

    def second(self, question: Question, reply: str, chat: bool) -> tuple[Turn, ...] | None:
        if self.answer_prompt is None:
            return None
        before = self.first(question, chat)
        if chat:
            return (*before, ("assistant", reply.strip()), ("user", self.answer_prompt))
        return (*before, ("assistant", f"{reply.strip()}\n{self.answer_prompt}"))

    def identity(self) -> Any:
        return [self.name, digest_of([self.system, self.prompt, self.answer_prompt])]

    @staticmethod
    def _filled(text: str, question: Question) -> str:
        # The question last, so that nothing in its text is replaced.
        return text.replace("{answer}", told_answer(question)).replace("{question}", question.text)


def told_answer(question: Question) -> str:
    """The gold answer as a person would say it: a letter with the text of its option."""
    answer = question.gold or ""
    place = "ABCDEFGHIJKLMNOPQRSTUVWXYZ".find(answer) if len(answer) == 1 else -1
    return f"({answer}) {question.choices[place]}" if 0 <= place < len(question.choices) else answer


def make_prompt(name: str, task: Task, examples: Sequence[Question], shots: int) -> Prompt:
    """The prompt of a name, or the template in a file; raises ConfigError for anything else."""
    if name == "zero_shot":
        return ZeroShot(task)
    if name == "few_shot":
        return FewShot(task, tuple(examples), shots)
    if name == "explain":
        return Explain()
    if not Path(name).suffix and not Path(name).exists():
        raise ConfigError(f"no prompt {name!r}", f"choose from {', '.join(PROMPTS)}, or name a template file")
    return read_template(Path(name))


def read_template(path: Path) -> Template:
    """A template file: YAML with `prompt` and, if wanted, `system` and `answer_prompt`; or .txt, the prompt alone.

    Raises InputError for a file that cannot be read and ConfigError for one that is no template.
    """
    text = read_regular_text(path, remedy="name a template file")
    if path.suffix.lower() not in (".yaml", ".yml"):
        return _checked(Template(path.stem, text.strip()), path)
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"is not YAML: {' '.join(str(error).split())[:160]}", "fix it", path=path) from error
    known = ("prompt", "system", "answer_prompt")
    if not isinstance(value, dict) or not isinstance(value.get("prompt"), str):
        raise ConfigError("has no text under `prompt`", f"a template has {', '.join(known)}", path=path)
    wrong = [name for name, part in value.items() if name not in known or not isinstance(part, str | None)]
    if wrong:
        raise ConfigError(f"{wrong[0]!r} is not a text of a template", f"a template has {', '.join(known)}", path=path)
    template = Template(path.stem, value["prompt"].strip(), value.get("system"), value.get("answer_prompt"))
    return _checked(template, path)


def _checked(template: Template, path: Path) -> Template:
    if "{question}" not in template.prompt:
        raise ConfigError("the prompt has no {question}", "write {question} where the question goes", path=path)
    if template.name in PROMPTS:
        raise ConfigError(f"a template cannot be called {template.name}", "give the file another name", path=path)
    return template
