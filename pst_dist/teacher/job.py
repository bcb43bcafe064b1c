"""One job: the questions, the prompts, and every request that follows from them and from the replies so far."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pst_dist.config.schema import Config
from pst_dist.data.sources.loaded import bad_budget
from pst_dist.data.tasks import Task
from pst_dist.errors import ConfigError, DataError
from pst_dist.teacher.asking import Sampling, Work, samplings
from pst_dist.teacher.examples import examples_for
from pst_dist.teacher.judging import strict_task
from pst_dist.teacher.messages import Reply, Request
from pst_dist.teacher.new_questions import Inventing, Proposals, read_proposals
from pst_dist.teacher.prompts import Prompt, make_prompt
from pst_dist.teacher.questions import Question, Questions, read_questions, read_texts
from pst_dist.teacher.settings import TeachSettings


@dataclass(frozen=True)
class Job:
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
        """Every sample of the given questions."""
        return samplings(self.questions.rows, self.prompts, self.settings, self.chat)

    @property
    def inventions(self) -> list[Inventing]:
        """The requests for new questions."""
        if not self.settings.new_questions:
            return []
        return [Inventing(question, self.settings, self.chat) for question in self.questions.rows]

    @property
    def task(self) -> Task:
        """How the teacher's answers are read and compared."""
        return strict_task(self.questions.task)

    def identity(self) -> dict[str, Any]:
        """What a journal belongs to, by the names of the options."""
        return {
            **self.settings.identity(),
            "--prompt": [prompt.identity() for prompt in self.prompts],
            "ROWS": self.digest,
            "task": self.questions.task.name,
        }


def make_job(config: Config, settings: TeachSettings, chat: bool) -> Job:
    """The job that a command describes; raises ConfigError, InputError or DataError for one that could not be done."""
    # Copies of rows in object storage are kept beside the journal.
    reading = config if config.data_cache else config.model_copy(update={"data_cache": str(settings.folder)})
    questions = read_questions(reading)
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
        examples = examples_for(reading, questions, settings.examples, settings.seed)
    prompts = tuple(make_prompt(name, questions.task, examples, settings.shots) for name in settings.prompts)
    names = [prompt.name for prompt in prompts]
    if len(set(names)) < len(names):
        raise ConfigError(f"two prompts are called {max(names, key=names.count)}", "name each once")
    _check_gold(questions, prompts, settings)
    avoid = [text for spec in settings.avoid for text in read_texts(spec, reading)]
    return Job(config, settings, questions, prompts, chat, digest, (*questions.avoid, *avoid))


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
            f"{bare} rows have no answer, so their samples must agree, but only one is asked for",
            "use --samples 3 or more",
        )


def takes_chat(settings: TeachSettings) -> bool:
    """Whether the teacher takes a conversation, without loading or asking it."""
    if settings.is_remote:
        return settings.api == "chat"
    from pst_dist.teacher.local import takes_chat

    return takes_chat(settings)


def proposals_of(job: Job, replies: Mapping[str, Reply]) -> Proposals:
    """The new questions in the replies so far."""
    given = [question.text for question in job.questions.rows]
    return read_proposals(job.inventions, replies, job.task, job.settings, given, job.avoid)


def checks_of(job: Job, proposals: Proposals) -> list[Sampling]:
    """The samples that check the proposals, with prompts that do not show the proposed answer."""
    prompts = [prompt for prompt in job.prompts if not prompt.shows_answer]
    return samplings([one.question for one in proposals.kept], prompts, job.settings, job.chat)


def due_requests(job: Job, replies: Mapping[str, Reply]) -> list[Request]:
    """What can be asked now, empty for a finished job; new questions are checked once all of them are there."""
    works: list[Work] = [*job.works, *job.inventions]
    due = [request for work in works if (request := work.next_request(replies)) is not None]
    if due:
        return due
    checks = checks_of(job, proposals_of(job, replies))
    return [request for work in checks if (request := work.next_request(replies)) is not None]
