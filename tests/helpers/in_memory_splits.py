"""The steps on whole splits as they are with all rows in memory: what `data.sources.arrange` does on disk."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from pst_dist.data.sample import ReasoningSample
from pst_dist.data.sources.arrange import no_teacher_answers
from pst_dist.data.sources.drafts import Draft
from pst_dist.data.sources.splits import cut_by_hash, rank_of, without
from pst_dist.errors import DataError


def merge_repeats(drafts: Sequence[Draft]) -> tuple[list[Draft], int, int]:
    """Merge rows with the same question and answer; new rationales of later rows are added to the first row.

    Returns the drafts, the number of rows that added a rationale, and the number of rows that added nothing.
    """
    first: dict[tuple[str, str], int] = {}
    kept: list[Draft] = []
    merged = dropped = 0
    for draft in drafts:
        place = first.setdefault((draft.question_key, draft.sample.answer), len(kept))
        if place == len(kept):
            kept.append(draft)
            continue
        earlier = kept[place].sample
        new = tuple(text for text in draft.sample.rationales if text not in earlier.rationales)
        if new:
            kept[place] = replace(kept[place], sample=replace(earlier, rationales=earlier.rationales + new))
            merged += 1
        else:
            dropped += 1
    return kept, merged, dropped


def conflicting_answers(drafts: Sequence[Draft]) -> list[tuple[Draft, Draft]]:
    """Pairs of rows with the same question and different answers, one pair per question."""
    first: dict[str, Draft] = {}
    found: dict[str, tuple[Draft, Draft]] = {}
    for draft in drafts:
        earlier = first.setdefault(draft.question_key, draft)
        if earlier.sample.answer != draft.sample.answer:
            found.setdefault(draft.question_key, (earlier, draft))
    return list(found.values())


def repeats(drafts: Sequence[Draft]) -> int:
    """Number of rows that repeat the question and answer of an earlier row."""
    return len(drafts) - len({(draft.question_key, draft.sample.answer) for draft in drafts})


def find_leaks(drafts: Sequence[Draft], held_out: Sequence[Draft]) -> list[tuple[Draft, Draft]]:
    """Rows of `drafts` whose question is also in `held_out`, each with the row it repeats."""
    there = {draft.question_key: draft for draft in reversed(held_out)}
    return [(draft, there[draft.question_key]) for draft in drafts if draft.question_key in there]


def with_wrong_rationales(drafts: Sequence[Draft], share: float) -> tuple[list[Draft], int]:
    """The same rows in order, a share of them with the rationales of another row, and the number of changed rows.

    Rows are ranked by the hash of their question, and the first ones get the rationales of the next row in rank. A
    larger share therefore changes the same rows and more. Raises DataError if there is only one row.
    """
    count = round(share * len(drafts))
    if not count:
        return list(drafts), 0
    if len(drafts) < 2:
        raise DataError("data.wrong_rationales needs at least two training rows, found one")
    ranks = sorted(
        range(len(drafts)), key=lambda k: hashlib.sha256(f"wrong/{drafts[k].question_key}".encode()).digest()
    )
    spoilt = list(drafts)
    for rank, place in enumerate(ranks[:count]):
        donor = drafts[ranks[(rank + 1) % len(ranks)]].sample
        spoilt[place] = replace(drafts[place], sample=replace(drafts[place].sample, rationales=donor.rationales))
    return spoilt, count


def first_by_hash(drafts: Sequence[Draft], count: int) -> list[Draft]:
    """The `count` rows with the smallest hashes, in the original order. A smaller count gives a subset."""
    chosen = sorted(drafts, key=lambda draft: rank_of(draft.sample.id, "rows"))[:count]
    return without(drafts, without(drafts, chosen))


def check_ids(drafts: Sequence[Draft]) -> None:
    """Raise DataError, naming both locations, if two different rows of a split have the same id."""
    seen: dict[str, Draft] = {}
    for draft in drafts:
        earlier = seen.setdefault(draft.sample.id, draft)
        if earlier is not draft and (earlier.question_key, earlier.sample.answer) != (
            draft.question_key,
            draft.sample.answer,
        ):
            raise DataError(
                f"duplicate id {draft.sample.id!r}, first used at {earlier.where}",
                "make ids unique, or remove them so that they are generated",
                path=draft.path,
                line=draft.line,
            )


def final_ids(splits: dict[str, list[Draft]]) -> dict[str, list[ReasoningSample]]:
    """Samples with ids that are unique over all splits.

    Ids often count from 0 in every file. An id that an earlier split uses gets the split's name as a prefix; one that
    its own split uses gets a number as a suffix.
    """
    taken: set[str] = set()
    samples: dict[str, list[ReasoningSample]] = {}
    for split, drafts in splits.items():
        samples[split] = []
        here: set[str] = set()
        for draft in drafts:
            name = draft.sample.id
            if name in taken and name not in here:
                name = f"{split}-{name}"[:120]
            base, number = name, 1
            while name in taken:
                number += 1
                name = f"{base[:110]}-{number}"
            taken.add(name)
            here.update((name, draft.sample.id))
            samples[split].append(draft.sample if name == draft.sample.id else replace(draft.sample, id=name))
    return samples


def arranged(splits: dict[str, list[Draft]], data: Any, report: dict[str, Any]) -> dict[str, list[Draft]]:
    """Cut, filter and merge; `data` has the settings, and `report` receives the counts."""
    train, validation, test = (splits[name] for name in ("train", "validation", "test"))
    if data.test is None and data.split_file is None:
        train, test = cut_by_hash(train, data.test_size, "test")
    have = [draft for draft in train if draft.sample.rationales]
    train = have or train
    if data.keep == "teacher_correct":
        if train and all(draft.teacher_correct is None for draft in train):
            raise no_teacher_answers()
        right = [draft for draft in train if draft.teacher_correct]
        kept = [draft for draft in validation if draft.teacher_correct is not False]
        report["teacher_wrong_dropped"] = len(train) - len(right) + len(validation) - len(kept)
        train, validation = right, kept
    report["duplicates_found"] = repeats(train)
    for name, drafts in (("validation", validation), ("test", test)):
        report[f"{name}_duplicates"] = repeats(drafts)
    if data.duplicates == "drop":
        train, report["rationales_merged"], report["duplicates_dropped"] = merge_repeats(train)
        # Scores and their standard errors count questions: a question with several rationales is one sample.
        validation, test = merge_repeats(validation)[0], merge_repeats(test)[0]
    train_leaks = find_leaks(train, [*validation, *test])
    validation_leaks = find_leaks(validation, test)
    report["leaks_found"] = len(train_leaks)
    report["validation_leaks_found"] = len(validation_leaks)
    if train_leaks:
        report["first_leak"] = " and ".join(draft.sample.source for draft in train_leaks[0])
    if data.leaks != "keep":
        train = without(train, [draft for draft, _ in train_leaks])
        validation = without(validation, [draft for draft, _ in validation_leaks])
        report["leaks_dropped"] = len(train_leaks)
    conflicts = conflicting_answers(train)
    report["conflicting_answers"] = len(conflicts)
    if conflicts:
        one, other = conflicts[0]
        report["first_conflict"] = (
            f"{one.sample.source} has {one.sample.answer}, {other.sample.source} has {other.sample.answer}"
        )
    if not validation and data.validation is None and data.validation_size:
        train, validation = cut_by_hash(train, data.validation_size, "validation")
    if data.max_rows is not None and len(train) > data.max_rows:
        report["rows_over_max_rows"] = len(train) - data.max_rows
        train = first_by_hash(train, data.max_rows)
    train, report["wrong_rationales"] = with_wrong_rationales(train, data.wrong_rationales)
    return {"train": train, "validation": validation, "test": test}
