"""The text of `pst check` about rows: the first one, the splits, what was merged or dropped, and the bad ones."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from pst_dist.data.sample import SPLITS, ReasoningSample
from pst_dist.data.sources import LoadedData
from pst_dist.data.sources.rows import Reject, excerpt

_SHOWN = 10
_PERCENTILES = (5, 50, 95, 100)


def first_row_lines(loaded: LoadedData) -> list[str]:
    """The first row as it was read, so that a wrong column is noticed at once."""
    first = next((sample for split in SPLITS for sample in loaded.splits[split]), None)
    if first is None:
        return []
    more = f" (and {len(first.rationales) - 1:,} more)" if len(first.rationales) > 1 else ""
    rationale = _shown(first.rationales[0]) + more if first.rationales else "none"
    return [
        f"first row, {first.source}:",
        f"  question: {_shown(first.question)}",
        f"  answer: {_shown(first.answer)} ({first.answer_type})",
        f"  rationale: {rationale}",
    ]


def _shown(text: str) -> str:
    """The start of a text on one line, followed by its full length if it was cut."""
    return excerpt(text) if len(text) <= 80 else f"{excerpt(text)}… ({len(text):,} characters)"


def split_lines(loaded: LoadedData) -> list[str]:
    text = []
    for split in SPLITS:
        samples, report = loaded.splits[split], loaded.report
        if not samples and not report[f"{split}_read"]:
            continue
        read = f"{report[f'{split}_read']:,} rows read, " if report[f"{split}_read"] else ""
        lengths = _Lengths()
        for sample in samples:
            lengths.add(sample)
        named = ", ".join(f"{kind} {count:,}" for kind, count in lengths.kinds.most_common())
        text.append(f"{split}: {read}{len(samples):,} kept; answers: {named or 'none'}")
        text += lengths.lines()
        for name, part in report.get("parts", {}).items():
            rows = part[f"{split}_rows"]
            weight = f", weight {part['weight']:g}" if split == "train" else ""
            text.append(f"  {name}: {rows:,} rows of task {part['task']}{weight}")
        without = report[f"{split}_without_rationale"]
        if without:
            text.append(f"  {without:,} row{'s' * (without != 1)} without rationale")
    return text


class _Lengths:
    """Answer types, and words of questions, answers and rationales, counted by their number."""

    def __init__(self) -> None:
        self.kinds: Counter[str] = Counter()
        self._words: dict[str, Counter[int]] = {name: Counter() for name in ("question", "answer", "rationale")}

    def add(self, sample: ReasoningSample) -> None:
        """Count one row."""
        self.kinds[sample.answer_type] += 1
        self._words["question"][len(sample.question.split())] += 1
        self._words["answer"][len(sample.answer.split())] += 1
        for rationale in sample.rationales:
            self._words["rationale"][len(rationale.split())] += 1

    def lines(self) -> list[str]:
        """5th, 50th and 95th percentile, and the longest."""
        lines = []
        for name, counts in self._words.items():
            if counts:
                marks = [_nearest_rank(counts, p) for p in _PERCENTILES]
                lines.append(f"  {name} words: 5% {marks[0]}, median {marks[1]}, 95% {marks[2]}, longest {marks[3]}")
        return lines


def _nearest_rank(counts: Counter[int], percent: int) -> int:
    """The smallest value that so many percent of the values do not exceed; `counts` is how often each value occurs."""
    wanted, seen = max(1, -(-counts.total() * percent // 100)), 0
    for value in sorted(counts):
        seen += counts[value]
        if seen >= wanted:
            return value
    raise ValueError("no values")


def finding_lines(loaded: LoadedData) -> list[str]:
    report = loaded.report
    made_up = sum(sum(rows.synthetic().values()) for rows in loaded.splits.values())
    found = (
        (report["rows_unused"], "rows in no split of the split file"),
        (report["teacher_wrong_dropped"], "rows dropped because the teacher's answer is wrong"),
        (report["duplicates_found"], "training rows repeat the question and answer of an earlier one"),
        (report["rationales_merged"], "of these have another rationale, which was merged into the earlier row"),
        (report["test_duplicates"], "test rows repeat an earlier one"),
        (report["conflicting_answers"], f"questions have two answers, first: {report.get('first_conflict')}"),
        (report["leaks_found"], f"training questions are also held out, first: {report.get('first_leak')}"),
        (report["validation_leaks_found"], "validation questions are also in test"),
        (report.get("leaks_between_sources", 0), "training questions are held out by another source"),
        (made_up, "questions were made up by a model (synthetic)"),
    )
    return [f"{count:,} {what}" for count, what in found if count]


def reject_lines(rejects: Sequence[Reject], path: Path | None) -> list[str]:
    """Bad rows grouped by reason, largest group first, each with its first location."""
    if not rejects:
        return ["0 bad rows"]
    where = f", all in {path}" if path is not None else ""
    text = [f"{len(rejects):,} bad rows{where}:"]
    firsts: dict[tuple[str, str], Reject] = {}
    counts: Counter[tuple[str, str]] = Counter()
    for reject in rejects:
        reason = (reject.code, _reason(reject.what))
        firsts.setdefault(reason, reject)
        counts[reason] += 1
    ordered = sorted(firsts, key=lambda reason: counts[reason], reverse=True)
    for reason in ordered[:_SHOWN]:
        one = counts[reason] == 1
        text.append(f"  {firsts[reason]}" if one else f"  {counts[reason]:,} rows, the first {firsts[reason]}")
    if len(ordered) > _SHOWN:
        rest = sum(counts[reason] for reason in ordered[_SHOWN:])
        text.append(f"  … and {rest:,} more, for {len(ordered) - _SHOWN:,} other reasons")
    return text


def _reason(what: str) -> str:
    """A message without quoted texts and numbers, which differ from row to row."""
    return re.sub(r"\d+", "0", re.sub(r"'[^'\n]{0,80}'", "''", what[:400]))
