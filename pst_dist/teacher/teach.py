"""`pst teach`: rows in, rationales out, with a journal, a quarantine and a report beside them.

    read the rows -> ask the teacher (journal) -> judge the replies -> [new questions] -> rows, report

Everything after asking follows from the journal, so the same command on a finished job asks nothing and writes the
same files.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pst_dist.config.schema import Config
from pst_dist.data.sources.load import bad_budget
from pst_dist.data.sources.rows import write_rejects
from pst_dist.errors import ConfigError, DataError
from pst_dist.plain import has_scheme
from pst_dist.storage.json_files import canonical_json, json_text
from pst_dist.storage.outputs import check_output, write_output
from pst_dist.teacher.asking import Asking, Sampling, is_whole, samplings
from pst_dist.teacher.endpoint import Endpoint
from pst_dist.teacher.estimate import estimate
from pst_dist.teacher.examples import examples_for
from pst_dist.teacher.journal import Journal, open_journal, read_replies
from pst_dist.teacher.judging import Answered, Sample, judge_all
from pst_dist.teacher.ledger import Ledger
from pst_dist.teacher.messages import Reply, Teacher
from pst_dist.teacher.new_questions import Inventing, Proposals, judge_proposal, read_proposals
from pst_dist.teacher.prompts import Prompt, make_prompt
from pst_dist.teacher.questions import Question, Questions, read_questions, read_texts
from pst_dist.teacher.report import quality
from pst_dist.teacher.settings import TeachSettings

log = logging.getLogger(__name__)

REPORT, CUT, DROPPED, REJECTS = "report.json", "cut.jsonl", "dropped.jsonl", "rejects.jsonl"
MakeTeacher = Callable[[TeachSettings, Ledger], Teacher]


@dataclass(frozen=True)
class Outcome:
    """A finished or capped job."""

    report: dict[str, Any]
    """All of report.json."""
    rows: tuple[dict[str, Any], ...] = field(repr=False)
    """The rows as written."""
    cap: str | None
    """The cap that ended it early."""


@dataclass(frozen=True)
class _Job:
    """What is asked: everything but the teacher and the journal."""

    config: Config
    settings: TeachSettings
    questions: Questions
    prompts: tuple[Prompt, ...]
    chat: bool
    digest: str
    """Of all rows, also those beyond --limit: a trial with a few of them is the beginning of the whole."""
    avoid: tuple[str, ...]
    """Questions that no new one may be close to."""

    @property
    def works(self) -> list[Sampling]:
        return samplings(self.questions.rows, self.prompts, self.settings, self.chat)

    @property
    def inventions(self) -> list[Inventing]:
        if not self.settings.new_questions:
            return []
        return [Inventing(question, self.settings, self.chat) for question in self.questions.rows]

    def identity(self) -> dict[str, Any]:
        """What a journal belongs to, by the names of the options."""
        return {
            **self.settings.identity(),
            "--prompt": [prompt.identity() for prompt in self.prompts],
            "ROWS": self.digest,
            "task": self.questions.task.name,
        }


def plan(config: Config, settings: TeachSettings) -> dict[str, Any]:
    """The estimate of `--dry-run`; asks nothing and writes nothing. Raises as `teach` does before it asks."""
    job = _job(config, settings, _takes_chat(settings))
    replies = read_replies(settings.folder, job.identity())
    checked = sum(not prompt.shows_answer for prompt in job.prompts)
    return estimate(job.works, job.inventions, replies, settings, checked)


def teach(config: Config, settings: TeachSettings, make_teacher: MakeTeacher | None = None) -> Outcome:
    """Ask for everything that the journal lacks, then write the rows, the quarantine and the report.

    `make_teacher` makes another kind of teacher than the settings name. Raises ConfigError, InputError and DataError
    for the user's mistakes before anything is sent, EnvironmentFault for a teacher that does not answer or a full
    disk, StaleError for a journal of other settings and PreemptedError after a signal.
    """
    ledger = Ledger(settings)
    _check_places(config, settings)
    job = _job(config, settings, _takes_chat(settings))
    identity = job.identity()
    with open_journal(
        settings.folder, identity, in_flight=settings.concurrency, reply_tokens=_longest_reply(settings)
    ) as journal:
        for reply in journal.replies.values():
            ledger.add(reply, earlier=True)
        cap = None
        if not _is_done(job, journal.replies):  # a finished job needs no key, no server and no model
            teacher = (make_teacher or _teacher)(settings, ledger)
            cap = asyncio.run(_ask_all(job, teacher, journal, ledger))
        return _write(job, journal.replies, ledger, cap)


def _is_done(job: _Job, replies: Mapping[str, Reply]) -> bool:
    """Whether the journal has everything."""
    asked = [*job.works, *job.inventions]
    return is_whole(asked, replies) and is_whole(_checks(job, _proposals(job, replies)), replies)


async def _ask_all(job: _Job, teacher: Teacher, journal: Journal, ledger: Ledger) -> str | None:
    """All stages of requests; returns the cap that was reached."""
    asking = Asking(teacher, journal, ledger, job.settings)
    try:
        await asking.run("teach", job.works)
        await asking.run("new questions", job.inventions)
        await asking.run("check new questions", _checks(job, _proposals(job, journal.replies)))
        return asking.cap
    finally:
        await teacher.close()


def _proposals(job: _Job, replies: Mapping[str, Reply]) -> Proposals:
    given = [question.text for question in job.questions.rows]
    return read_proposals(job.inventions, replies, job.questions.task, job.settings, given, job.avoid)


def _checks(job: _Job, proposals: Proposals) -> list[Sampling]:
    """The samples that check the proposals, with prompts that do not show the proposed answer."""
    prompts = [prompt for prompt in job.prompts if not prompt.shows_answer]
    return samplings([one.question for one in proposals.kept], prompts, job.settings, job.chat)


def _job(config: Config, settings: TeachSettings, chat: bool) -> _Job:
    questions = read_questions(config)
    if len(questions.rejects) > bad_budget(config.data.max_bad, questions.counts["read"]):
        first = questions.rejects[0]
        raise DataError(
            f"{first.what} ({len(questions.rejects)} of {questions.counts['read']} rows are bad)",
            "fix them, or raise data.max_bad",
            path=first.path,
            line=first.line,
        )
    digest = questions.digest
    if settings.limit is not None:
        kept = questions.rows[: settings.limit]
        counts = questions.counts | {"asked": len(kept), "without_gold": sum(row.gold is None for row in kept)}
        questions = replace(questions, rows=kept, counts=counts)
    examples: tuple[Question, ...] = ()
    if "few_shot" in settings.prompts:
        examples = examples_for(config, questions, settings.examples, settings.seed)
    prompts = tuple(make_prompt(name, questions.task, examples, settings.shots) for name in settings.prompts)
    names = [prompt.name for prompt in prompts]
    if len(set(names)) < len(names):
        raise ConfigError(f"two prompts are called {max(names, key=names.count)}", "name each once")
    _check_gold(questions, prompts, settings)
    avoid = [text for spec in settings.avoid for text in read_texts(spec, config)]
    return _Job(config, settings, questions, prompts, chat, digest, (*questions.avoid, *avoid))


def _check_gold(questions: Questions, prompts: Sequence[Prompt], settings: TeachSettings) -> None:
    """Refuse a job none of whose samples could be kept."""
    bare = questions.counts["without_gold"]
    asking = [prompt for prompt in prompts if not prompt.shows_answer]
    if settings.new_questions and not asking:
        raise ConfigError("--new-questions needs a prompt that does not show the answer", "add --prompt zero_shot")
    if bare and not asking:
        raise ConfigError(
            f"{bare} rows have no answer, and --prompt {prompts[0].name} shows it", "add --prompt zero_shot"
        )
    if bare and settings.samples * len(asking) < 2:
        raise ConfigError(
            f"{bare} rows have no answer, so their samples must agree, and there is one",
            "use --samples 3 or more",
        )


def _takes_chat(settings: TeachSettings) -> bool:
    if settings.endpoint is not None:
        return settings.api == "chat"
    from pst_dist.teacher.local import takes_chat

    return takes_chat(settings)


def _teacher(settings: TeachSettings, ledger: Ledger) -> Teacher:
    if settings.endpoint is not None:
        return Endpoint(settings, ledger)
    from pst_dist.teacher.local import LocalTeacher

    return LocalTeacher(settings)


def _longest_reply(settings: TeachSettings) -> int:
    return settings.reply_tokens * max(1, settings.new_questions)


def _check_places(config: Config, settings: TeachSettings) -> None:
    """Refuse places that cannot be written before anything is paid for."""
    if has_scheme(str(settings.output)):
        raise ConfigError(f"-o {settings.output}: is a URL", "name a file of this machine")
    if settings.output.suffix != ".jsonl":
        raise ConfigError(f"-o {settings.output}: the rows are JSON Lines", "give the file a name ending in .jsonl")
    check_output(settings.output, is_taught, inputs=_inputs(config, settings))
    for name in (REPORT, CUT, DROPPED):
        check_output(settings.folder / name, _any_of_ours, inside=settings.folder)


def _inputs(config: Config, settings: TeachSettings) -> list[Path]:
    root = Path(config.data.root).expanduser() if config.data.root else Path()
    train = config.data.train
    words = [train] if isinstance(train, str) else list(train or [])
    return [root / Path(word).expanduser() for word in words] + [Path(word) for word in settings.avoid]


def is_taught(head: bytes) -> bool:
    """Whether a file begins with a row of `pst teach`."""
    return b'"taught_by":' in head.partition(b"\n")[0]


def _any_of_ours(head: bytes) -> bool:
    """The other files are in a folder of ours, where nobody else writes."""
    return True


# ---- what is written


def _write(job: _Job, replies: Mapping[str, Reply], ledger: Ledger, cap: str | None) -> Outcome:
    settings, task = job.settings, job.questions.task
    answered = judge_all(job.works, replies, task, settings)
    rows = [_row(one, settings) for one in answered if one.answer is not None and one.kept]
    report: dict[str, Any] = {
        "teacher": settings.teacher_name,
        "complete": cap is None and is_whole(job.works, replies),
        "rows": job.questions.counts,
        "quality": quality(answered, task),
        "ledger": ledger.to_json(),
    }
    everything = [sample for one in answered for sample in one.samples]
    if settings.new_questions:
        proposals = _proposals(job, replies)
        judged = _judge_proposals(job, proposals, replies)
        report["complete"] = report["complete"] and len(judged) == len(proposals.kept)
        taken = [(one, parent) for one, parent in judged if one.answer is not None and one.kept]
        rows += [_row(one, settings, parent) for one, parent in taken]
        everything += [sample for one, _ in judged for sample in one.samples]
        dropped = proposals.dropped + type(proposals.dropped)({"disagree": len(judged) - len(taken)})
        report["new_questions"] = {
            "proposed": len(proposals.kept) + sum(proposals.dropped.values()),
            "kept": len(taken),
            "dropped": {name: count for name, count in sorted(dropped.items()) if count},
        }
    folder = settings.folder
    cut = [sample for sample in everything if sample.verdict == "cut"]
    lost = [sample for sample in everything if sample.verdict not in ("kept", "cut")]
    _write_lines(folder / CUT, [_cut_row(sample, replies) for sample in cut], folder)
    _write_lines(folder / DROPPED, [_cut_row(sample, replies) for sample in lost], folder)
    if job.questions.rejects or (folder / REJECTS).is_file():
        write_rejects(folder / REJECTS, job.questions.rejects, inside=folder)
    content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_output(settings.output, content.encode("utf-8", "backslashreplace"), is_taught)
    write_output(folder / REPORT, json_text(report), _any_of_ours, inside=folder)
    return Outcome(report, tuple(rows), cap)


def _judge_proposals(job: _Job, proposals: Proposals, replies: Mapping[str, Reply]) -> list[tuple[Answered, str]]:
    """(judged, id of the given question) of every proposal whose samples are all answered."""
    works: dict[str, list[Sampling]] = {}
    for work in _checks(job, proposals):
        works.setdefault(work.question.id, []).append(work)
    return [
        (judge_proposal(one, own, replies, job.questions.task, job.settings), one.parent)
        for one in proposals.kept
        if is_whole(own := works[one.question.id], replies)
    ]


def _row(one: Answered, settings: TeachSettings, parent: str | None = None) -> dict[str, Any]:
    """A row of the output. `synthetic` marks a question that the teacher made; it stays with the row from here on."""
    question = one.question
    row: dict[str, Any] = {
        "id": question.id,
        "question": question.text,
        "answer": one.answer,
        "rationales": [sample.rationale for sample in one.kept],
        "taught_by": settings.teacher_name,
        "prompts": [sample.prompt for sample in one.kept],
    }
    if question.choices:
        row["choices"] = list(question.choices)
    if parent is not None:
        row |= {"synthetic": True, "like": parent}
    return row


def _cut_row(sample: Sample, replies: Mapping[str, Reply]) -> dict[str, Any]:
    key = f"{sample.question.id}/{sample.prompt}/{sample.number}"
    steps = [replies[f"{key}/{step}"] for step in (1, 2) if f"{key}/{step}" in replies]
    return {
        "id": sample.question.id,
        "prompt": sample.prompt,
        "sample": sample.number,
        "verdict": sample.verdict,
        "answer": sample.answer,
        "replies": [{"finish": reply.finish, "text": reply.text, "thought": reply.thought} for reply in steps],
        "question": sample.question.text,
    }


def _write_lines(path: Path, rows: Sequence[Mapping[str, Any]], folder: Path) -> None:
    text = "".join(canonical_json(row) + "\n" for row in rows)
    write_output(path, text.encode("utf-8", "backslashreplace"), _any_of_ours, inside=folder)
