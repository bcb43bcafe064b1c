"""Rows that are arranged on disk end up as rows that are arranged in memory, with the same counts."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from in_memory_splits import arranged, check_ids, final_ids

from pst_dist.config.schema import Config
from pst_dist.data.sample import SPLITS, ReasoningSample
from pst_dist.data.sources.arrange import arrange
from pst_dist.data.sources.choices import Convention
from pst_dist.data.sources.drafts import Draft
from pst_dist.data.sources.load import _Survey
from pst_dist.data.sources.row_work import RowWork, row_of
from pst_dist.data.tasks import get_task
from pst_dist.errors import ConfigError, DataError

COUNTS = ("duplicates_found", "validation_duplicates", "test_duplicates", "rationales_merged", "duplicates_dropped")
COUNTS += ("leaks_found", "validation_leaks_found", "first_leak", "leaks_dropped", "conflicting_answers")
COUNTS += ("first_conflict", "rows_over_max_rows", "wrong_rationales", "teacher_wrong_dropped")


def drawn(chance: random.Random, split: str) -> list[Draft]:
    """A few rows about few questions, so that everything repeats, leaks and contradicts."""
    rows, questions = chance.choice([0, 1, 3, 12]), chance.choice([2, 6, 40])
    ids = chance.choice([3, 20, 1000])
    drafts = []
    for place in range(rows):
        texts = tuple(f"Because {k}." for k in chance.sample(range(4), chance.choice([0, 1, 1, 2])))
        sample = ReasoningSample(
            id=f"row-{chance.randrange(ids)}{chance.choice(['', '', '-2'])}",
            question=f"{chance.choice(['How', 'how '])} many, {chance.randrange(questions)}?",
            answer=f"{chance.randrange(3)}",
            rationales=texts,
            source=f"{split}.jsonl:{place + 1}",
        )
        drafts.append(Draft(sample, f"{split}.jsonl", place + 1, chance.choice([None, True, True, False])))
    return drafts


def settings(chance: random.Random) -> Config:
    data = {
        "train": "rows.jsonl",
        "test_size": chance.choice([0, 0, 0.3, 1, 3]),
        "validation_size": chance.choice([0, 0.1, 0.5, 2]),
        "duplicates": chance.choice(["drop", "keep"]),
        "leaks": chance.choice(["drop", "keep"]),
        "keep": chance.choice(["all", "all", "teacher_correct"]),
        "max_rows": chance.choice([None, None, 1, 5]),
        "wrong_rationales": chance.choice([0, 0, 0.4, 0.99]),
        "test": chance.choice([None, "test.jsonl"]),
        "validation": chance.choice([None, "validation.jsonl"]),
    }
    return Config.model_validate({"data": data, "arm": "answer_only"})


def on_disk(config: Config, drafts: dict[str, list[Draft]]):
    survey = _Survey(config)
    task, place = get_task(None, None), 0
    for number, split in enumerate(SPLITS):
        survey.rows.paths.append(str(Path(f"{split}.jsonl")))
        told, cuts = Convention(), survey._cuts()
        work = RowWork(task, None, told, split, split=number, path=number, part="", wrong="refuse", ranked=cuts)
        for draft in drafts[split]:
            survey.rows.store.add(*row_of(draft, place, work))
            place += 1
        survey._check_ids(number)
    arrange(survey.rows, config.data)
    return {split: list(survey.rows.store.rows_of(split)) for split in SPLITS}, survey.rows.report


def in_memory(config: Config, drafts: dict[str, list[Draft]]):
    for rows in drafts.values():
        check_ids(rows)
    report: dict = {}
    return final_ids(arranged(drafts, config.data, report)), report


def outcome(call, *arguments):
    try:
        return call(*arguments)
    except (ConfigError, DataError) as error:
        return str(error)


@pytest.mark.parametrize("part", range(4))
def test_the_same_rows_splits_ids_and_counts_as_in_memory(part):
    refused = 0
    for number in range(60 * part, 60 * (part + 1)):
        chance = random.Random(f"arrange/{number}")
        config = settings(chance)
        named = {"train", *(split for split in ("validation", "test") if getattr(config.data, split))}
        drafts = {split: drawn(chance, split) if split in named else [] for split in SPLITS}
        found, wanted = outcome(on_disk, config, drafts), outcome(in_memory, config, drafts)
        if isinstance(found, str) or isinstance(wanted, str):
            assert found == wanted, number
            refused += 1
            continue
        assert found[0] == wanted[0], number
        for name in COUNTS:
            assert found[1].get(name, 0) == wanted[1].get(name, 0), (number, name)
    assert refused < 40, "most cases are to be arranged"
