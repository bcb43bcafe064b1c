"""What a job writes: the rows, the quarantine of cut replies, the other dropped replies, and the report."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pst_dist.config.schema import Config
from pst_dist.data.sources.conversations import as_messages
from pst_dist.data.sources.root import SourceRoot
from pst_dist.data.sources.rows import write_rejects
from pst_dist.errors import ConfigError
from pst_dist.storage.json_files import canonical_json, json_text
from pst_dist.storage.outputs import check_output, write_output
from pst_dist.teacher.asking import Sampling, is_whole
from pst_dist.teacher.batch_api import is_requests
from pst_dist.teacher.job import Job, checks_of, proposals_of
from pst_dist.teacher.judging import Answered, Sample, judge_all
from pst_dist.teacher.ledger import Ledger
from pst_dist.teacher.messages import Reply
from pst_dist.teacher.new_questions import Proposals, judge_proposal
from pst_dist.teacher.report import quality
from pst_dist.teacher.settings import TeachSettings
from pst_dist.text.urls import has_scheme

REPORT, CUT, DROPPED, REJECTS = "report.json", "cut.jsonl", "dropped.jsonl", "rejects.jsonl"


@dataclass(frozen=True)
class Outcome:
    """A finished or capped job."""

    report: dict[str, Any]
    """All of report.json."""
    rows: tuple[dict[str, Any], ...] = field(repr=False)
    """The rows as written."""
    cap: str | None
    """The cap that ended it early."""
    waiting: int = 0
    """Requests in the file of `--batch`."""


def check_places(config: Config, settings: TeachSettings) -> None:
    """Refuse places that cannot be written before anything is paid for."""
    if has_scheme(str(settings.output)):
        raise ConfigError(f"-o {settings.output}: is a URL", "name a file of this machine")
    if settings.output.suffix != ".jsonl":
        raise ConfigError(f"-o {settings.output}: the rows are JSON Lines", "give the file a name ending in .jsonl")
    check_output(settings.output, is_taught, inputs=[*_inputs(config, settings), *settings.replies])
    if settings.batch is not None:
        if settings.batch.suffix != ".jsonl":
            raise ConfigError(f"--batch {settings.batch}: the requests are JSON Lines", "name a file ending in .jsonl")
        if settings.batch.absolute() == settings.output.absolute():
            raise ConfigError(f"--batch {settings.batch}: is the output too", "name another file")
        check_output(settings.batch, is_requests, inputs=[*_inputs(config, settings), *settings.replies])
    for name in (REPORT, CUT, DROPPED):
        check_output(settings.folder / name, _any_of_ours, inside=settings.folder)


def _inputs(config: Config, settings: TeachSettings) -> list[Path]:
    root, train = SourceRoot.of(config), config.data.train
    words = [train] if isinstance(train, str) else list(train or [])
    places = [root.place(str(word)) for word in words] + [root.here.place(word) for word in settings.avoid]
    return [place for place in places if isinstance(place, Path)]


def is_taught(head: bytes) -> bool:
    """Whether a file begins with a row of `pst teach`."""
    return b'"taught_by":' in head.partition(b"\n")[0]


def _any_of_ours(head: bytes) -> bool:
    """The other files are in a folder of ours, where nobody else writes."""
    return True


def write_all(job: Job, replies: Mapping[str, Reply], ledger: Ledger, cap: str | None) -> Outcome:
    """The files of a job as far as it is answered, and its outcome. Raises EnvironmentFault for a full disk."""
    settings, task = job.settings, job.task
    answered = judge_all(job.works, replies, task, settings)
    rows = [row_of(one, settings) for one in answered if one.answer is not None and one.kept]
    report: dict[str, Any] = {
        "teacher": settings.teacher_name,
        "complete": cap is None and is_whole(job.works, replies),
        "rows": job.questions.counts,
        "quality": quality(answered, task) | {"task": job.questions.task.name},
        "ledger": ledger.to_json(),
    }
    everything = [sample for one in answered for sample in one.samples]
    if settings.new_questions:
        proposals = proposals_of(job, replies)
        judged = _judge_proposals(job, proposals, replies)
        report["complete"] = report["complete"] and len(judged) == len(proposals.kept)
        taken = [(one, parent) for one, parent in judged if one.answer is not None and one.kept]
        rows += [row_of(one, settings, parent) for one, parent in taken]
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


def _judge_proposals(job: Job, proposals: Proposals, replies: Mapping[str, Reply]) -> list[tuple[Answered, str]]:
    """(judged, id of the given question) of every proposal whose samples are all answered."""
    works: dict[str, list[Sampling]] = {}
    for work in checks_of(job, proposals):
        works.setdefault(work.question.id, []).append(work)
    return [
        (judge_proposal(one, own, replies, job.task, job.settings), one.parent)
        for one in proposals.kept
        if is_whole(own := works[one.question.id], replies)
    ]


def row_of(one: Answered, settings: TeachSettings, parent: str | None = None) -> dict[str, Any]:
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
    if question.turns:
        row["turns"] = as_messages(question.turns)
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
