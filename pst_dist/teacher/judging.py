"""Decides which replies become rationales, by the task's own scoring of the teacher's answers.

A sample is kept if its answer is right. A row without a gold answer takes the one that most of its samples give, if
more than the share `--agree` of all its samples give it. Nothing is guessed: a reply whose answer cannot be read is
dropped as unparsed. This module asks nobody; its results follow from the journal alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from pst_dist.data.sources.replies import has_mark, split_reply
from pst_dist.data.sources.rows import RowError
from pst_dist.data.tasks import Task, get_task
from pst_dist.teacher.asking import Sampling
from pst_dist.teacher.messages import Reply
from pst_dist.teacher.questions import Question
from pst_dist.teacher.settings import TeachSettings
from pst_dist.teacher.visible import visible

VERDICTS = ("kept", "wrong", "unparsed", "disagrees", "duplicate", "no_rationale", "cut", "empty", "refused")
"""What can become of a sample: wrong, its answer differs from the gold answer; unparsed, its answer cannot be read;
disagrees, there is no gold answer and too few samples give this one; duplicate, an earlier rationale of the question
has the same words; no_rationale, it has only an answer; cut, the length limit ended it; empty; refused, the server did
not accept the request."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One judged sample."""

    question: Question
    prompt: str
    number: int
    verdict: str
    answer: str | None
    """The teacher's answer in canonical form; None if there is none, or if the prompt told it the answer."""
    rationale: str = ""
    tokens: int = 0
    """Generated tokens of all its steps."""
    told: bool = False
    """Whether the prompt told it the answer."""
    thought: bool = False
    """Whether a thought came with its first reply."""


@dataclass(frozen=True, kw_only=True)
class Answered:
    """One question with its samples and the answer that it has, or that they agree on."""

    question: Question
    answer: str | None
    samples: tuple[Sample, ...]

    @property
    def kept(self) -> tuple[Sample, ...]:
        """The samples whose rationales are used."""
        return tuple(one for one in self.samples if one.verdict == "kept")


def strict_task(task: Task) -> Task:
    """The task as a teacher is scored: numbers by value, and never guessed.

    Fine-tune-CoT's rule, which published accuracies of students need, would read "2 + 2 = 4" as 2.
    """
    return get_task(None, "number") if task.rule == "fine_tune_cot_numbers" else task


def judge_all(
    works: Sequence[Sampling], replies: Mapping[str, Reply], task: Task, settings: TeachSettings
) -> list[Answered]:
    """Every question of which all samples are answered, in order; others are left out."""
    by_question: dict[str, list[Sampling]] = {}
    for work in works:
        by_question.setdefault(work.question.id, []).append(work)
    whole = [group for group in by_question.values() if all(work.next_request(replies) is None for work in group)]
    return [judge_question(group, replies, task, settings) for group in whole]


def judge_question(
    works: Sequence[Sampling], replies: Mapping[str, Reply], task: Task, settings: TeachSettings
) -> Answered:
    """The verdicts on all samples of one question."""
    question = works[0].question
    samples = [_read(work, replies, task, settings) for work in works]
    gold = question.gold if question.gold is not None else majority(samples, task, settings.agree)
    seen: set[str] = set()
    judged = []
    for sample in samples:
        verdict = sample.verdict
        if verdict == "kept" and not sample.told and not (gold is not None and task.is_correct(sample.answer, gold)):
            verdict = "disagrees" if question.gold is None else "wrong"
        if verdict == "kept" and not sample.rationale:
            verdict = "no_rationale"
        words = " ".join(sample.rationale.casefold().split())
        if verdict == "kept" and words in seen:
            verdict = "duplicate"
        if verdict == "kept":
            seen.add(words)
        judged.append(replace(sample, verdict=verdict))
    return Answered(question=question, answer=gold, samples=tuple(judged))


def majority(samples: Sequence[Sample], task: Task, agree: float) -> str | None:
    """The answer of more than the share `agree` of the samples, at least two; None if no answer has that many."""
    groups = group_answers(samples, task)
    most = max(groups, key=len, default=[])
    asked = sum(not sample.told for sample in samples)
    if len(most) < 2 or len(most) <= agree * asked or sum(len(group) == len(most) for group in groups) > 1:
        return None
    try:
        return task.gold(most[0].answer)
    except ValueError:
        return None


def group_answers(samples: Sequence[Sample], task: Task) -> list[list[Sample]]:
    """Samples with equal answers together, in order of their first; those without an answer are left out."""
    groups: list[list[Sample]] = []
    for sample in samples:
        if sample.answer is None:
            continue
        home = next((group for group in groups if task.is_correct(sample.answer, group[0].answer or "")), None)
        if home is None:
            groups.append([sample])
        else:
            home.append(sample)
    return groups


def _read(work: Sampling, replies: Mapping[str, Reply], task: Task, settings: TeachSettings) -> Sample:
    """A sample as its replies say; `kept` stands for: not yet compared with the gold answer."""
    steps = [replies[key] for key in (f"{work.key}/1", f"{work.key}/2") if key in replies]
    question, told = work.question, work.prompt.shows_answer
    sample = Sample(
        question=question,
        prompt=work.prompt.name,
        number=work.number,
        verdict="kept",
        answer=None,
        tokens=sum(reply.usage.completion for reply in steps),
        told=told,
    )
    parts = [visible(reply) for reply in steps]
    if any(reply.finish == "refused" for reply in steps):
        return replace(sample, verdict="refused")
    if any(reply.is_cut for reply in steps) or None in parts:
        return replace(sample, verdict="cut")
    first, last = parts[0], parts[-1]
    assert first is not None and last is not None
    sample = replace(sample, thought=bool(first.thought))
    if not first.text:
        return replace(sample, verdict="empty")
    rationale = _rationale(first.text, whole=told or len(steps) > 1)
    if settings.thoughts == "keep" and first.thought:
        rationale = "\n\n".join(part for part in (first.thought, rationale) if part)
    sample = replace(sample, rationale=rationale)
    stated = answer_in(first.text, task, question, whole=False) if has_mark(first.text) else None
    contradicts = stated is not None and question.gold is not None and not task.is_correct(stated, question.gold)
    if told:
        return replace(sample, verdict="wrong" if contradicts else "kept")
    answer = answer_in(last.text, task, question, whole=len(steps) > 1)
    if answer is None:
        return replace(sample, verdict="unparsed")
    if stated is not None and not task.is_correct(answer, stated):
        return replace(sample, verdict="wrong" if question.gold is not None else "disagrees")
    return replace(sample, answer=answer)


def _rationale(text: str, *, whole: bool) -> str:
    """The working of a reply: what is before its answer. `whole`: all of a reply without a mark is working."""
    if whole and not has_mark(text):
        return text
    try:
        return split_reply(text).rationale or ""
    except RowError:
        return text


def answer_in(text: str, task: Task, question: Question, *, whole: bool) -> str | None:
    """The answer in a reply, in canonical form; None if it cannot be read.

    `whole`: all of the reply is the answer, as after "Therefore, the answer is". Otherwise it must be marked.
    """
    try:
        found = split_reply(text).answer if has_mark(text) or not whole else text
    except RowError:
        return None
    if not task.choice_letters:
        return task.cleanse(found)
    same = [place for place, option in enumerate(question.choices) if option.casefold() == found.strip(" .").casefold()]
    if len(same) == 1:
        return task.choice_letters[same[0]] if same[0] < len(task.choice_letters) else None
    # Fine-tune-CoT's rule takes the first capital of the range, which may be the first letter of a word.
    letter = get_task(None, "choice").cleanse(found)
    return letter if letter is not None and letter in task.choice_letters else None
