"""New questions in the manner of the given ones: asked for, parsed, filtered, and checked by independent samples.

One request asks for K new questions with reasoning and answer. A question is dropped if it is close to a given one, to
one already taken, or, whatever its numbers, to a question to stay away from. The rest is asked again without the
proposed answer; a question is kept if more than the share `--agree` of these samples give that answer.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from pst_dist.data.sources.replies import has_mark
from pst_dist.data.tasks import Task
from pst_dist.teacher.asking import Sampling, make_request
from pst_dist.teacher.judging import Answered, Sample, answer_in, judge_question
from pst_dist.teacher.messages import Reply, Request, Turn
from pst_dist.teacher.near import NearIndex
from pst_dist.teacher.prompts import told_answer
from pst_dist.teacher.questions import Question
from pst_dist.teacher.settings import TeachSettings
from pst_dist.teacher.visible import visible

_FORM = "Question: ...\nReasoning: ...\nAnswer: ..."
_FIELD = re.compile(
    r"^[ \t>*_#-]{0,12}(?:\d{1,3}[.)][ \t]{0,4})?[*_]{0,3}(Question|Reasoning|Rationale|Answer)[ \t]{0,4}"
    r"(?:\d{1,3})?[*_]{0,3}[ \t]{0,4}:[*_]{0,3}[ \t]{0,4}",
    re.IGNORECASE | re.MULTILINE,
)
_MOST_CHARACTERS = 4000
"""A longer question is a reply that lost its form."""


@dataclass(frozen=True)
class Inventing:
    """The request for new questions in the manner of one."""

    question: Question
    settings: TeachSettings
    chat: bool

    @property
    def key(self) -> str:
        """Its key in the journal."""
        return f"{self.question.id}/new/{self.settings.new_questions}"

    def next_request(self, replies: Mapping[str, Reply]) -> Request | None:
        """The only request."""
        if self.key in replies:
            return None
        many = self.settings.new_questions
        return make_request(
            self.settings, self.key, self._turns(), self.settings.heat, self.settings.reply_tokens * many
        )

    def _turns(self) -> tuple[Turn, ...]:
        many = self.settings.new_questions
        shown = f"Question: {self.question.text}"
        if self.question.rationales:
            shown += f"\nReasoning: {self.question.rationales[0]}"
        if self.question.gold is not None:
            shown += f"\nAnswer: {told_answer(self.question)}"
        number = "a new question" if many == 1 else f"{many} new questions, all different,"
        ask = (
            f"Here is a question:\n\n{shown}\n\nWrite {number} in the manner of this one: about other people and "
            "things, with other numbers, and with the same kind of answer. Solve each step by step. "
            f"Use this form:\n\n{_FORM}"
        )
        return (("user", ask),)


@dataclass(frozen=True)
class Proposal:
    """A new question as the teacher proposed it."""

    question: Question
    """With the proposed answer as gold."""
    reasoning: str
    parent: str
    """Id of the question in whose manner it is."""


@dataclass
class Proposals:
    """The proposals that may be checked, and what became of the others."""

    kept: list[Proposal] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)
    """By reason: `cut`, `unparsed`, `near_given`, `near_new`, `near_avoided`."""


def read_proposals(
    works: Sequence[Inventing],
    replies: Mapping[str, Reply],
    task: Task,
    settings: TeachSettings,
    given: Sequence[str],
    avoid: Sequence[str],
) -> Proposals:
    """The new questions in the replies that are close to none of `given`, `avoid` and each other, in order."""
    found = Proposals()
    near_given, near_new = NearIndex(settings.near), NearIndex(settings.near)
    near_avoided = NearIndex(settings.near, ignore_numbers=True)
    for text in given:
        near_given.add(text)
    for text in avoid:
        near_avoided.add(text)
    for work in works:
        reply = replies.get(work.key)
        if reply is None:
            continue
        for number, (text, reasoning, answer) in enumerate(_blocks(reply, found.dropped)):
            proposal = _proposal(work.question, number, text, reasoning, answer, task)
            if proposal is None:
                found.dropped["unparsed"] += 1
            elif near_avoided.closest(text):
                found.dropped["near_avoided"] += 1
            elif near_given.closest(text):
                found.dropped["near_given"] += 1
            elif near_new.closest(text):
                found.dropped["near_new"] += 1
            else:
                near_new.add(text)
                found.kept.append(proposal)
    return found


def judge_proposal(
    proposal: Proposal, works: Sequence[Sampling], replies: Mapping[str, Reply], task: Task, settings: TeachSettings
) -> Answered:
    """The proposal with its samples; `answer` is None if too few of them give the proposed answer.

    The proposed reasoning comes first among the rationales of a kept question.
    """
    judged = judge_question(works, replies, task, settings)
    agreeing = sum(
        one.answer is not None and task.is_correct(one.answer, judged.answer or "") for one in judged.samples
    )
    if agreeing < 2 or agreeing <= settings.agree * len(judged.samples):
        return Answered(question=proposal.question, answer=None, samples=judged.samples)
    own = Sample(
        question=proposal.question,
        prompt="new",
        number=0,
        verdict="kept" if proposal.reasoning else "no_rationale",
        answer=judged.answer,
        rationale=proposal.reasoning,
    )
    others = tuple(one for one in judged.samples if one.rationale.split() != proposal.reasoning.split())
    return Answered(question=proposal.question, answer=judged.answer, samples=(own, *others))


def _blocks(reply: Reply, dropped: Counter[str]) -> list[tuple[str, str, str]]:
    """(question, reasoning, answer) of each complete block of a reply; the last block of a cut reply is incomplete."""
    seen = visible(reply)
    if seen is None or reply.finish == "refused":
        dropped["cut" if seen is None else "refused"] += 1
        return []
    text = seen.text
    fields = [(match.group(1).lower(), match.start(), match.end()) for match in _FIELD.finditer(text)]
    ends = [*(start for _, start, _ in fields[1:]), len(text)][: len(fields)]
    blocks: list[dict[str, str]] = []
    for (name, _, start), end in zip(fields, ends, strict=True):
        if name == "question":
            blocks.append({})
        if blocks:
            blocks[-1].setdefault("reasoning" if name == "rationale" else name, text[start:end].strip())
    if reply.is_cut and blocks:
        blocks.pop()
        dropped["cut"] += 1
    whole = [block for block in blocks if block.get("question") and block.get("answer")]
    dropped["unparsed"] += max(len(blocks), not reply.is_cut) - len(whole)
    # A model that goes on after its answer does so on another line.
    return [(block["question"], block.get("reasoning", ""), block["answer"].splitlines()[0].strip()) for block in whole]


def _proposal(parent: Question, number: int, text: str, reasoning: str, answer: str, task: Task) -> Proposal | None:
    if len(text) > _MOST_CHARACTERS:
        return None
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:8]
    asked = Question(
        id=f"new-{parent.id[:90]}-{number}-{digest}", text=text, gold=None, source=f"new, like {parent.id}"
    )
    read = answer_in(answer, task, asked, whole=True)
    stated = answer_in(reasoning, task, asked, whole=False) if has_mark(reasoning) else read
    try:
        gold = task.gold(read) if read is not None else None
    except ValueError:
        return None
    if gold is None or not task.is_correct(stated, gold):
        return None
    question = Question(id=asked.id, text=text, gold=gold, source=asked.source)
    return Proposal(question, reasoning, parent.id)
