"""`pst teach`: rows in, rationales out, with a journal, a quarantine and a report beside them.

    read the rows -> ask the teacher (journal) -> judge the replies -> [new questions] -> rows, report

Everything after asking follows from the journal, so the same command on a finished job asks nothing and writes the
same files.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from pst_dist.config.schema import Config
from pst_dist.teacher.asking import Asking
from pst_dist.teacher.batch_api import take_replies, write_requests
from pst_dist.teacher.endpoint import Endpoint
from pst_dist.teacher.estimate import estimate
from pst_dist.teacher.job import Job, checks_of, due_requests, make_job, proposals_of, takes_chat
from pst_dist.teacher.journal import Journal, open_journal, read_replies
from pst_dist.teacher.ledger import Ledger
from pst_dist.teacher.messages import Teacher
from pst_dist.teacher.settings import TeachSettings
from pst_dist.teacher.written import Outcome, check_places, write_all

MakeTeacher = Callable[[TeachSettings, Ledger], Teacher]


def plan(config: Config, settings: TeachSettings) -> dict[str, Any]:
    """The estimate of `--dry-run`; asks nothing, and writes nothing but copies of rows in object storage. Raises as
    `teach` does before it asks."""
    job = make_job(config, settings, takes_chat(settings))
    replies = read_replies(settings.folder, job.identity())
    checked = sum(not prompt.shows_answer for prompt in job.prompts)
    return estimate(job.works, job.inventions, replies, settings, checked)


def teach(config: Config, settings: TeachSettings, make_teacher: MakeTeacher | None = None) -> Outcome:
    """Ask for everything that the journal lacks, then write the rows, the quarantine and the report.

    With `settings.batch` the requests are written instead of sent; `Outcome.waiting` is their number.
    `make_teacher` makes another kind of teacher than the settings name. Raises ConfigError, InputError and DataError
    for the user's mistakes before anything is sent, EnvironmentFault for a teacher that does not answer or a full
    disk, StaleError for a journal of other settings and PreemptedError after a signal.
    """
    ledger = Ledger(settings)
    check_places(config, settings)
    job = make_job(config, settings, takes_chat(settings))
    identity = job.identity()
    with open_journal(
        settings.folder, identity, in_flight=settings.concurrency, reply_tokens=_longest_reply(settings)
    ) as journal:
        for reply in journal.replies.values():
            ledger.add(reply, earlier=True)
        for path in settings.replies:
            take_replies(path, job, journal, ledger)
        cap, waiting = None, 0
        if settings.batch is not None:
            waiting, cap = write_requests(job, settings.batch, journal, ledger)
        elif due_requests(job, journal.replies):  # a finished job needs no key, no server and no model
            teacher = (make_teacher or _teacher)(settings, ledger)
            cap = asyncio.run(_ask_all(job, teacher, journal, ledger))
        return replace(write_all(job, journal.replies, ledger, cap), waiting=waiting)


async def _ask_all(job: Job, teacher: Teacher, journal: Journal, ledger: Ledger) -> str | None:
    """All stages of requests; returns the cap that was reached."""
    asking = Asking(teacher, journal, ledger, job.settings)
    try:
        await asking.run("teach", job.works)
        await asking.run("new questions", job.inventions)
        await asking.run("check new questions", checks_of(job, proposals_of(job, journal.replies)))
        return asking.cap
    finally:
        await teacher.close()


def _teacher(settings: TeachSettings, ledger: Ledger) -> Teacher:
    if settings.endpoint is not None:
        return Endpoint(settings, ledger)
    from pst_dist.teacher.local import LocalTeacher

    return LocalTeacher(settings)


def _longest_reply(settings: TeachSettings) -> int:
    return settings.reply_tokens * max(1, settings.new_questions)
