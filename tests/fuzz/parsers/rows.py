"""Parsers of rows: files in each format, the survey of `pst check`, splits, completions, replies, numbers."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

from pst_dist.data.sources.rows import RowError
from pst_dist.data.tasks.number_markup import NotANumber

from .registry import Read, parser, put

_ROW = {"question": "How many?", "answer": "#### 7", "rationale": "3 + 4", "choices": ["a", "b"], "id": 1}


def _rows(suffix: str) -> Read:
    def read(content: bytes, folder: Path) -> object:
        from pst_dist.data.sources.readers import read_file

        return list(read_file(put(folder, f"rows.{suffix}", content)).entries)

    return read


_LINES = json.dumps(_ROW) + "\n" + json.dumps({**_ROW, "id": 2, "answer": 3.5}) + "\n"
parser("rows.jsonl", _LINES)(_rows("jsonl"))
parser("rows.json", json.dumps([_ROW, _ROW]), {"data": [_ROW]}, {"question": ["a", "b"], "answer": ["c", "d"]})(
    _rows("json")
)
parser("rows.csv", 'question,answer\n"a, b",7\nc;d,8\n', "question;answer\na;7\n")(_rows("csv"))
parser("rows.tsv", "question\tanswer\na b\t7\n", weight=0.5)(_rows("tsv"))


@parser(
    "data survey",
    _LINES,
    '{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "7"}]}\n',
    weight=0.5,
)
def _survey(content: bytes, folder: Path) -> object:
    from pst_dist.config.loading import load_config
    from pst_dist.diagnostics.rows import check

    path = put(folder, "survey.jsonl", content)
    config = load_config(None, [f"data.train={path}", "data.validation_size=0", "data.max_bad=1000"])
    return check(config, folder / "rejects.jsonl").lines()


@parser("split file", {"train": [0, 1, 2], "test": [3], "validation": [4]}, weight=0.7)
def _split(content: bytes, folder: Path) -> object:
    from pst_dist.data.sources.splits import read_split_file

    return read_split_file(put(folder, "split.json", content), 5)


@parser(
    "completions",
    json.dumps(["so 7. The answer is 7", "8"]),
    {
        "data": {
            "0": [{"sample_index": 0, "reasoning_completion": "so", "completion": "7", "question": "q", "answer": "7"}]
        },
        "metadata": {},
    },
)
def _completions(content: bytes, folder: Path) -> object:
    from pst_dist.data.sources.completions import read_completions
    from pst_dist.data.sources.root import SourceRoot

    return read_completions(str(put(folder, "teacher.json", content)), SourceRoot("", folder))


@parser(
    "replies", "<think>3 + 4</think>\nso\n**Answer:** $\\boxed{7}$", "Reasoning. #### 7", "The answer is (C). Wait, D."
)
def _replies(content: bytes, folder: Path) -> object:
    from pst_dist.data.sources.replies import split_reply

    with contextlib.suppress(RowError):  # becomes a bad row
        return split_reply(content.decode("utf-8", "replace"))
    return None


@parser("numbers", "1,234.5", "$\\frac{1}{2}$", "-3 %", "1.5e3", "12 1/2", "$3 million", "\\boxed{7}")
def _numbers(content: bytes, folder: Path) -> object:
    from pst_dist.data.tasks.numbers import read_number

    with contextlib.suppress(NotANumber):
        return read_number(content.decode("utf-8", "replace"))
    return None
