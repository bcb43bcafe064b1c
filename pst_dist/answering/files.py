"""Answer every question of a file into a JSON Lines file. The same command resumes, and does nothing when it is done.

First all rows are read and checked, without keeping them. Then they are read again and answered window by window. The
answers are appended to `OUTPUT.partial`, which is renamed to OUTPUT when it is complete. `OUTPUT.manifest.json` is
written before the first answer and says from what the answers are made.
"""

from __future__ import annotations

import itertools
import json
import logging
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from pst_dist.answering.windows import OUR_COLUMNS, Answerer, AnswerSettings, columns_of, cut, in_this_process
from pst_dist.data.sample import Turns
from pst_dist.data.sources.questions import Question, QuestionMap, read_questions
from pst_dist.data.sources.root import SourceRoot
from pst_dist.data.sources.rows import Entry, Reject
from pst_dist.data.sources.specs import stream_specs
from pst_dist.data.sources.strict_json import json_lines
from pst_dist.errors import DataError, InputError, IntegrityError, StaleError
from pst_dist.logs import progress
from pst_dist.storage.growing import GrowingFile
from pst_dist.storage.json_files import json_text, parse_json, read_object
from pst_dist.storage.locks import directory_lock
from pst_dist.storage.manifest import digest_of, sha256_file
from pst_dist.storage.outputs import check_output, is_answer_list, is_answer_manifest, write_output
from pst_dist.text.redaction import redact
from pst_dist.text.urls import is_whole_url

if TYPE_CHECKING:
    from pst_dist.student.saved import LoadedStudent

log = logging.getLogger(__name__)
STREAM = "-"
_VERSION = 1
_SHOWN = 5


@dataclass(frozen=True)
class AnswerJob:
    """Which questions, and where their answers go."""

    input: str
    """A spec as in data.test, or `-` for JSON Lines on standard input."""
    output: str
    """A file, or `-` for standard output."""
    question: str | None = None
    """The column, path or template of the question; guessed when not given."""
    skip_bad: bool = False
    """Leave out rows without a usable question instead of refusing all."""
    settings: AnswerSettings = field(default_factory=AnswerSettings)


@dataclass
class _Survey:
    """What the first reading found."""

    found: QuestionMap | None = None
    rows: int = 0
    """Rows with a usable question."""
    rejects: int = 0
    first: list[Reject] = field(default_factory=list)
    digest: str = ""
    conversations: bool = False
    """Whether a row is asked as turns."""


@dataclass(frozen=True)
class AnswerSummary:
    """A finished job."""

    output: str
    rows: int
    skipped: int
    resumed: int
    """Rows whose answers were there already."""


def answer_file(
    job: AnswerJob,
    student: LoadedStudent,
    *,
    answerer: Answerer | None = None,
    rebuild: bool = False,
    stdin: Callable[[int], bytes] | None = None,
    stdout: TextIO | None = None,
) -> AnswerSummary:
    """Answer all questions of `job.input`, in order; `answerer` decodes in this process when not given.

    Raises InputError for a file that may not be written, DataError naming the first bad row (or, with skip_bad, when no
    row is left), StaleError when the output was made from other questions, another student or other settings and
    `rebuild` is false, LockedError when another command writes it, and EnvironmentFault for a full disk.
    """
    answerer = answerer or in_this_process(student, job.settings)
    # Questions in object storage are copied for this command alone, because it may write nothing but its output.
    is_remote = is_whole_url(job.input)
    with tempfile.TemporaryDirectory(prefix="pst-") if is_remote else nullcontext("") as copies:
        rows = _Rows(job, student, stdin or sys.stdin.buffer.readline, Path(copies))
        if job.output == STREAM:
            return _to_stream(job, rows, answerer, stdout or sys.stdout)
        return _to_file(job, student, rows, answerer, rebuild)


def _to_stream(job: AnswerJob, rows: _Rows, answerer: Answerer, out: TextIO) -> AnswerSummary:
    survey = rows.survey()
    for lines in _answered(job, rows, survey, answerer, 0):
        out.writelines(lines)
        out.flush()
    return AnswerSummary(job.output, survey.rows, survey.rejects, 0)


def _to_file(job: AnswerJob, student: LoadedStudent, rows: _Rows, answerer: Answerer, rebuild: bool) -> AnswerSummary:
    from pst_dist.storage.atomic import disk_errors

    output = Path(job.output)
    manifest = output.with_name(f"{output.name}.manifest.json")
    _check_paths(job, output, manifest)
    survey = rows.survey()
    lock = f".{output.name}.lock"
    with directory_lock(output.parent, name=lock):
        resumed = _write(job, student, rows, survey, answerer, output, manifest, rebuild)
        with disk_errors(output):
            (output.parent / lock).unlink(missing_ok=True)
    return AnswerSummary(job.output, survey.rows, survey.rejects, resumed)


def _check_paths(job: AnswerJob, output: Path, manifest: Path) -> None:
    inputs = [Path(job.input)] if job.input != STREAM else []
    check_output(output, is_answer_list, inputs=inputs)
    check_output(GrowingFile(output).partial, lambda head: b"\n" not in head or is_answer_list(head), inputs=inputs)
    check_output(manifest, is_answer_manifest, inputs=inputs)


class _Rows:
    """The questions of a job, read again each time they are needed; standard input is kept in memory."""

    def __init__(self, job: AnswerJob, student: LoadedStudent, stdin: Callable[[int], bytes], copies: Path) -> None:
        self._job, self._student, self._copies = job, student, copies
        self._kept: list[Entry] | None = None
        if job.input == STREAM:
            self._kept = list(json_lines(Path("<stdin>"), stdin))
            if not self._kept:
                raise DataError("no rows", "write one JSON object per line", path="<stdin>")

    def _entries(self, digests: list[str]) -> Iterator[Entry]:
        if self._kept is not None:
            plain = [asdict(entry) for entry in self._kept]
            digests.append(digest_of(plain))
            return iter(self._kept)
        return stream_specs(self._job.input, "test", SourceRoot("", self._copies), digests)

    def _questions(self, digests: list[str]) -> tuple[QuestionMap, Iterator[Question | Reject]]:
        found, rows = read_questions(self._entries(digests), self._job.question, self._job.input)
        return found, (self._usable(row) for row in rows)

    def _usable(self, row: Question | Reject) -> Question | Reject:
        """The row, or a reject for one that the student cannot be asked or whose columns would be replaced."""
        if isinstance(row, Reject):
            return row
        taken = OUR_COLUMNS & row.row.keys()
        if taken:
            return row.reject("column", f"has the column {min(taken)!r}, which the answers have too; rename it")
        asked = self.asked(row)
        problem = self._student.format.conversation_problem(asked)
        if problem is not None:
            return row.reject("turns", problem)
        if self._fills_all_positions(asked):
            return row.reject("too_long", "the question fills all positions of the student")
        return row

    def asked(self, row: Question) -> str | Turns:
        """What the student is asked: the turns where its prompt holds them, else all of it as one text."""
        return self._student.format.put(row.text, row.turns)

    def _fills_all_positions(self, question: str | Turns) -> bool:
        from pst_dist.student.contexts import max_positions, without_room

        positions = max_positions(self._student.model)
        text = self._student.format.render(question)
        # No tokenizer gives more tokens than bytes, but for a few at the edges.
        if positions is None or 2 * len(text.encode("utf-8", "replace")) + 64 < positions:
            return False
        return bool(without_room(self._student.model, self._student.tokenizer, self._student.format, [question]))

    def survey(self) -> _Survey:
        """Read everything once; raises DataError for a bad row that may not be skipped, and when none is left."""
        survey, digests = _Survey(), list[str]()
        with progress("read", unit="rows") as bar:
            survey.found, rows = self._questions(digests)
            for row in rows:
                bar.advance()
                if isinstance(row, Reject):
                    survey.rejects += 1
                    survey.first += [row] if len(survey.first) < _SHOWN else []
                else:
                    survey.rows += 1
                    survey.conversations |= not isinstance(self.asked(row), str)
        survey.digest = digest_of(digests)
        _report_rejects(self._job, survey)
        return survey

    def __iter__(self) -> Iterator[Question]:
        _, rows = self._questions([])
        return (row for row in rows if isinstance(row, Question))


def _report_rejects(job: AnswerJob, survey: _Survey) -> None:
    if not survey.first:
        return
    first = survey.first[0]
    if not job.skip_bad or not survey.rows:
        total = survey.rows + survey.rejects
        raise DataError(
            f"{first.what} ({survey.rejects} of {total} rows cannot be asked)",
            "fix them, or leave them out with --skip-bad" if survey.rows else "name the question: --question COLUMN",
            path=first.path,
            line=first.line,
        )
    for reject in survey.first:
        log.warning("skipped %s", reject)
    if survey.rejects > len(survey.first):
        log.warning("skipped %d more rows", survey.rejects - len(survey.first))


def _write(
    job: AnswerJob,
    student: LoadedStudent,
    rows: _Rows,
    survey: _Survey,
    answerer: Answerer,
    output: Path,
    manifest: Path,
    rebuild: bool,
) -> int:
    """Write what is missing; returns the number of answers that were there."""
    grown, record = GrowingFile(output), _record(job, student, survey)
    earlier = read_object(manifest) if manifest.is_file() else {}
    same = earlier.get("fingerprint") == record["fingerprint"] and not rebuild
    if same and earlier.get("sha256") is not None:
        if output.is_file() and sha256_file(output) == earlier["sha256"]:
            log.info("answers: %s is complete, nothing to do", output)
            return survey.rows
        if grown.partial.is_file() and sha256_file(grown.partial) == earlier["sha256"]:
            grown.finish()  # killed between the manifest and the new name
            return survey.rows
        raise IntegrityError("was changed after it was written", "answer again with --rebuild", path=output)
    if not (same or rebuild) and (earlier or output.is_file() or grown.partial.is_file()):
        raise StaleError(
            "was made from other questions, another student or other settings",
            "name another file, or replace it with --rebuild",
            path=output,
        )
    done, size = _done(grown, job.settings.window) if same else (0, 0)
    write_output(manifest, json_text(record), is_answer_manifest)
    grown.cut(size)
    if done:
        log.info("answers: %d of %d exist already, continuing", done, survey.rows)
    for lines in _answered(job, rows, survey, answerer, done):
        grown.append("".join(lines).encode("utf-8"))
    record |= {"sha256": sha256_file(grown.partial), "bytes": grown.partial.stat().st_size}
    write_output(manifest, json_text(record), is_answer_manifest)
    grown.finish()
    return done


def _record(job: AnswerJob, student: LoadedStudent, survey: _Survey) -> dict[str, Any]:
    """The manifest of answers that are not finished."""
    made_from = {
        "version": _VERSION,
        "input": survey.digest,
        "question": survey.found.describe() if survey.found else None,
        "student": student.manifest.digest,
        "settings": asdict(job.settings),
        "skip_bad": job.skip_bad and bool(survey.rejects),
    }
    if survey.conversations:
        made_from["asked"] = "turns"
    facts = {"kind": "answers", "input_path": redact(job.input), "rows": survey.rows, "skipped": survey.rejects}
    return {**facts, **made_from, "fingerprint": digest_of(made_from), "sha256": None, "bytes": None}


def _done(grown: GrowingFile, window: int) -> tuple[int, int]:
    """(answers in whole windows, their bytes) that an earlier command wrote; ends at the first damaged line."""
    rows = size = whole = whole_size = 0
    for line in grown.lines():
        try:
            row = parse_json(line, grown.partial)
        except IntegrityError:
            break
        if not isinstance(row, dict) or "student_answer" not in row:
            break
        rows, size = rows + 1, size + len(line) + 1
        if rows % window == 0:
            whole, whole_size = rows, size
    return whole, whole_size


def _answered(job: AnswerJob, rows: _Rows, survey: _Survey, answerer: Answerer, done: int) -> Iterator[list[str]]:
    """The lines of each window after the first `done` rows."""
    window = job.settings.window
    left = cut(itertools.islice(rows, done, None), window)
    asked = ([rows.asked(row) for row in found] for found in cut(itertools.islice(rows, done, None), window))
    shown = progress("answer", total=survey.rows, unit="questions") if survey.rows > done else nullcontext()
    with shown as bar:
        if bar is None:
            return
        bar.skip(done)
        count = done
        for found, answers in zip(left, answerer(asked, bar), strict=True):
            count += len(found)
            yield [
                json.dumps({**row.row, **columns_of(answer, job.settings)}, ensure_ascii=False, allow_nan=False) + "\n"
                for row, answer in zip(found, answers, strict=True)
            ]
        if count != survey.rows:
            raise InputError(
                f"has {count} questions, and had {survey.rows} before", "run again when it is complete", path=job.input
            )
