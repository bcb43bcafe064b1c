"""The columns of a row on which its question depends: system texts, passages, and what text cannot represent.

A column that may be context is put before the question or refused by name, because without it the same question could
have different answers.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from pst_dist.data.sources.rows import RowError, plain_name

SYSTEM_COLUMNS = ("system", "system_prompt", "system_message", "system_instruction")
"""Columns whose text is put before the question."""
PASSAGE_COLUMNS = (
    *("context", "passage", "background", "article", "paragraph", "story", "document"),
    *("body", "narrative", "theory", "puzzle"),
)
"""Columns with a text that the question is about."""
HISTORY_COLUMNS = ("history",)
"""Columns with earlier turns: question-reply pairs, or turns with roles."""
ATTACHED_COLUMNS = (
    *("image", "images", "audio", "audios", "video", "videos", "tools", "functions", "tool_calls"),
    *("image_path", "image_paths", "image_file", "image_url", "image_urls", "img", "img_path", "image_1", "picture"),
    *("audio_path", "audio_url", "video_path", "video_url"),
)
"""Columns that a text prompt cannot represent. A row is refused if one of them is not empty."""
_MAYBE_CONTEXT = (
    *("input", "text", "prompt", "instruction", "premise", "hypothesis", "sentence", "table", "dialogue", "dialog"),
    *("hint", "lecture", "scenario", "situation", "contexts", "documents", "passages", "paragraphs", "para"),
    *("pre_text", "post_text", "premises", "excerpt", "transcript", "query", "problem", "question", "code", "schema"),
    *("definition", "instructions", "task_description"),
)
"""Columns with texts that a question beside them may depend on, unless they contain the question or are part of it."""
_CONTEXT_COLUMNS = (*SYSTEM_COLUMNS, *PASSAGE_COLUMNS, *HISTORY_COLUMNS, *ATTACHED_COLUMNS)
ADD_COLUMN = "add it to data.columns.question, or set data.columns without it"
"""What to do about a column that is not read."""


def with_passage(question: Any, row: Mapping[str, Any], read: Collection[str]) -> Any:
    """The question preceded by the passages of the row that it does not contain yet; `read` are the columns that were
    read already.

    Raises RowError for another column on which the question may depend.
    """
    if not isinstance(question, str):
        return question  # as_text reports the error
    told = [row[column] for column in columns_named(row, PASSAGE_COLUMNS) if column not in read]
    passages = [text.strip() for text in told if isinstance(text, str) and text.strip() not in question]
    known = {*read, *columns_named(row, (*SYSTEM_COLUMNS, *HISTORY_COLUMNS))}
    if any(not isinstance(text, str) for text in told) or not passages:
        refuse_unread(row, known, question)
    else:
        refuse_unread(row, {*known, *columns_named(row, PASSAGE_COLUMNS)}, question)
    return "\n\n".join([*passages, question.strip()])


_SLOT = re.compile(r"(?<![A-Za-z0-9_])(?:number|N_|NUM_?|temp_)\d{1,2}(?![A-Za-z0-9_])")
"""The place of a number in a question, `number0` or `N_00`, as in MAWPS (https://huggingface.co/datasets/mwpt5/MAWPS)."""


def refuse_slots(row: Mapping[str, Any], question: object) -> None:
    """Raise RowError for a question whose numbers are in a column of their own."""
    held = columns_named(row, ("numbers", "num_list", "nums"))
    slot = _SLOT.search(question) if held and isinstance(question, str) else None
    numbers = [text.removesuffix(".0") for text in re.findall(r"\d+(?:\.\d+)?", str(row[held[0]]))] if slot else []
    if slot is not None and not all(re.search(rf"(?<!\d){re.escape(text)}(?!\d)", str(question)) for text in numbers):
        what = f"question has {slot.group()} in the place of a number, which is in column {held[0]!r}"
        raise RowError("context", f"{what}; write the numbers into the question")


def refuse_unread(row: Mapping[str, Any], read: Collection[str], question: object, remedy: str = ADD_COLUMN) -> None:
    """Raise RowError for a column that is not `read` although the question may depend on it."""
    unread = unread_columns(row, read, question)
    if unread and is_attached(unread[0]):
        what = f"column {unread[0]!r} is not empty, but a text prompt cannot contain it"
        raise RowError("unread", f"{what}; leave such rows out, or set data.columns to read them without it")
    if unread:
        what = f"column {unread[0]!r} would not be read, but the question may depend on it"
        raise RowError("unread", f"{what}; {remedy}")


def unread_columns(row: Mapping[str, Any], read: Collection[str], question: object) -> list[str]:
    """The columns that are not `read` although the question may depend on them."""
    unread = [column for column in columns_named(row, _CONTEXT_COLUMNS) if column not in read]
    for column in columns_named(row, (*PASSAGE_COLUMNS, *_MAYBE_CONTEXT)):
        value = row[column]
        if isinstance(value, int | float):  # the number of a document
            unread = [name for name in unread if name != column]
        if column in read or not isinstance(value, str | list | Mapping) or not isinstance(question, str):
            continue
        texts = texts_in(value)
        # A whole may be read by its parts: `{document.text}`, `{turns[0].content}`.
        asked = question.strip()
        repeats = any(asked in text for text in texts) or (
            plain_name(column) in _PROMPTS and isinstance(value, str) and _has_lines(value, asked)
        )
        if repeats or all(text in question for text in texts):
            unread = [name for name in unread if name != column]
        elif column not in unread and (len(texts) > 1 or len(texts[0].split()) > 2):  # not a name such as "zero_shot"
            unread.append(column)
    return unread


_PROMPTS = ("text", "prompt")
"""Columns with a prompt that is made of an instruction and its input, as Alpaca's `text`."""


def _has_lines(text: str, question: str) -> bool:
    """Whether a text has the lines of a question in their order."""
    place = 0
    for line in question.splitlines():
        place = text.find(line.strip(), place)
        if place < 0:
            return False
        place += len(line.strip())
    return True


def is_attached(column: str) -> bool:
    """Whether a column has what a text prompt cannot represent, or the path to it."""
    return bool(_with_names((column,), ATTACHED_COLUMNS))


def texts_in(value: Any, depth: int = 8) -> list[str]:
    """All texts and numbers inside a value, as texts without white space around them."""
    if isinstance(value, str | int | float) and not isinstance(value, bool):
        return [str(value).strip()] if str(value).strip() else []
    if depth == 0 or not isinstance(value, list | Mapping):
        return []
    inside = value.values() if isinstance(value, Mapping) else value
    return [text for one in inside for text in texts_in(one, depth - 1)]


def columns_named(row: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    """The columns of a row that are not blank and have one of the names, in the order of the names.

    Neither case nor separators count: `System Prompt` is `system_prompt`.
    """
    return [column for column in _with_names(tuple(row), tuple(names)) if not is_blank(row[column])]


@functools.lru_cache(maxsize=256)
def _with_names(columns: tuple[str, ...], names: tuple[str, ...]) -> tuple[str, ...]:
    """The columns with one of the names; the rows of a file mostly have the same columns."""
    plain = [plain_name(name) for name in names]
    return tuple(column for name in plain for column in columns if plain_name(column) == name)


def is_blank(value: Any) -> bool:
    """Whether a column has nothing in it, also as text."""
    return (
        value is None or value in ([], {}, (), False) or (isinstance(value, str) and value.strip() in ("", "[]", "{}"))
    )
