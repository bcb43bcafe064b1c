"""The common layouts: chat messages, prompt and completion, alpaca, sharegpt, GSM8K's ####, <think>.

Each is a function from a row to `Fields`. `conversations` reads turns; `replies` splits a reply that contains both
reasoning and answer.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from pst_dist.data.sources.columns import Fields, Layout
from pst_dist.data.sources.context import PASSAGE_COLUMNS, columns_named, refuse_unread, with_passage
from pst_dist.data.sources.conversations import THOUGHT_KEYS, Question, is_turns, read_conversation, with_context
from pst_dist.data.sources.no_answers import refuse_no_answer
from pst_dist.data.sources.options import Options, option_columns, read_options, with_choices
from pst_dist.data.sources.paths import options_at
from pst_dist.data.sources.replies import has_mark, split_reply
from pst_dist.data.sources.rows import RowError
from pst_dist.data.sources.thoughts import has_thought_tag, rationale_of
from pst_dist.data.sources.values import as_answer, as_id, as_rationales, as_text
from pst_dist.data.sources.verdicts import are_right, is_cut, is_setting, refuse_bad_reply
from pst_dist.data.tasks.scoring import kind_of

_PROMPTS = ("question", "prompt", "problem", "instruction", "query", "input")
_REPLIES = ("response", "completion", "output", "answer", "generation", "reply", "solution", "target", "targets")
_ANSWERS = (
    *("answer", "final_answer", "gold_answer", "expected_answer", "ground_truth", "gold"),
    *("reference_answer", "ground_truth_answer"),
)


def _from_reply(question: Question, reply: Any, *, row: Mapping[str, Any], name: str, thought: Any = None) -> Fields:
    """Fields of a row whose reply is in column `name`. A clean answer in a separate column is the gold answer."""
    text = as_text(reply, "answer")
    separate = thought.strip() if isinstance(thought, str) and thought.strip() else None
    gold = _clean_answer(row, name)
    wrong = refuse_bad_reply(row, is_gold=gold is None)
    try:
        rationale, replied = split_reply(text, separate)
    except RowError as error:
        if gold is None or error.code == "cut":
            raise
        told = rationale_of(re.sub(r"</?(?:final[_ ]?)?answer>", "", text, flags=re.IGNORECASE))
        rationale = "\n\n".join(part.strip() for part in (separate, told) if part)
        replied = None
    return replied_fields(question, rationale, replied, gold, row, wrong)


def replied_fields(
    question: Question,
    rationale: str | None,
    replied: str | None,
    gold: object | None,
    row: Mapping[str, Any],
    wrong: str = "",
) -> Fields:
    """Fields of a row with a reply that contains a rationale and an answer, `replied`.

    `gold` is the gold answer if the row has one beside the reply; else the reply's answer is the gold answer. `wrong`
    is why the reply is known to be wrong.
    """
    return Fields(
        question=as_text(question.text, "question"),
        turns=question.turns,
        answer=as_text(replied, "answer") if gold is None else gold,
        rationales=as_rationales(rationale),
        id=as_id(row.get("id")),
        teacher_answer=None if gold is None else replied,
        known_wrong=wrong if rationale else "",
    )


_FEW_WORDS = 5


def _clean_answer(row: Mapping[str, Any], reply: str) -> object | None:
    """The value of an answer column that contains only an answer; None if there is none."""
    for name in _ANSWERS:
        value = row.get(name)
        if name == reply or value is None or isinstance(value, list | Mapping):
            continue
        if not isinstance(value, str):
            return as_answer(value)
        if value.strip() and "\n" not in value.strip() and not has_mark(value):
            if name == "reference_answer" and len(value.split()) > _FEW_WORDS:
                continue  # a whole sentence, as in many rows of MegaScience
            refuse_no_answer(value.strip(), "", row, name)
            return as_answer(value)
    return None


def _row_thought(row: Mapping[str, Any]) -> Any:
    """Reasoning in a separate column."""
    told = (row[key] for key in THOUGHT_KEYS if isinstance(row.get(key), str))
    return next((text for text in told if not is_setting(text)), None)


def _conversation(turns: Any, name: str, row: Mapping[str, Any]) -> Fields:
    exchange = read_conversation(turns, name, row)
    passages = {column: row[column] for column in columns_named(row, PASSAGE_COLUMNS)}
    refuse_unread(passages, (), exchange.question.text)
    return _from_reply(
        exchange.question, exchange.reply, row=row, name=name, thought=exchange.thought or _row_thought(row)
    )


def _messages(row: Mapping[str, Any]) -> Fields:
    return _conversation(row.get("messages"), "messages", row)


def _sharegpt(row: Mapping[str, Any]) -> Fields:
    return _conversation(row.get("conversations"), "conversations", row)


def _one_conversation(row: Mapping[str, Any]) -> Fields:
    return _conversation(row.get("conversation"), "conversation", row)


def _contents(row: Mapping[str, Any]) -> Fields:
    return _conversation(row.get("contents"), "contents", row)


def _prompt_completion(row: Mapping[str, Any]) -> Fields:
    prompt, completion = row.get("prompt"), row.get("completion")
    if isinstance(prompt, list) and isinstance(completion, list):
        return _conversation([*prompt, *completion], "prompt and completion", row)
    question = as_text(prompt, "question").removesuffix("###").rstrip()  # the end of Fine-tune-CoT's prompts
    question = with_passage(question, row, ("prompt", "completion"))
    return _from_reply(with_context(question, row), completion, row=row, name="completion", thought=_row_thought(row))


def _alpaca(row: Mapping[str, Any]) -> Fields:
    question = with_passage(_instruction(row), row, ("instruction", "input", "output"))
    return _from_reply(
        with_context(question, row), row.get("output"), row=row, name="output", thought=_row_thought(row)
    )


def _instruction(row: Mapping[str, Any]) -> str:
    """An instruction, and below it its input, which may be empty."""
    instruction, extra = as_text(row.get("instruction"), "question"), row.get("input")
    return f"{instruction}\n{extra.strip()}" if isinstance(extra, str) and extra.strip() else instruction


def _gsm8k(row: Mapping[str, Any]) -> Fields:
    # Remove calculator annotations such as <<48/2=24>>.
    text = re.sub(r"<<[^<>\n]{0,200}>>", "", as_text(row.get("answer"), "answer"))
    if "####" not in text:
        raise RowError("answer", "answer has no ####")
    question = with_passage(as_text(row.get("question"), "question"), row, ("question", "answer"))
    return _from_reply(with_context(question, row), text, row=row, name="answer")


def _generations(row: Mapping[str, Any]) -> Fields:
    """OpenR1's rows: a clean answer and several generations, some of them cut off or wrong."""
    prompt = next((name for name in _PROMPTS if isinstance(row.get(name), str)), None)
    if prompt is None:
        raise RowError("missing", f"question is missing: none of {', '.join(_PROMPTS)} contains text")
    texts = row.get("generations")
    if not isinstance(texts, list):
        raise RowError("type", f"generations is {kind_of(texts)}, expected a list")
    keep = _usable_generations(row, len(texts))
    # A generation that was cut off in its thought is skipped, like an incomplete one.
    rationales = [rationale_of(as_text(text, "a generation")) for text, good in zip(texts, keep, strict=True) if good]
    question = with_context(with_passage(row[prompt], row, (prompt, "generations")), row)
    return Fields(
        question=as_text(question.text, "question"),
        turns=question.turns,
        answer=_checked(as_answer(row.get("answer")), row),
        rationales=tuple(dict.fromkeys(as_rationales(rationales))),
        id=as_id(row.get("id", row.get("uuid"))),
    )


def _checked(answer: object, row: Mapping[str, Any]) -> object:
    refuse_no_answer(answer, "", row, "answer")
    return answer


def _usable_generations(row: Mapping[str, Any], count: int) -> list[bool]:
    """Which generations are complete and not known to be wrong.

    (https://huggingface.co/datasets/open-r1/OpenR1-Math-220k)
    """
    complete = _flags(row, "is_reasoning_complete", count)
    finished = _flags(row, "finish_reasons", count)
    whole = [one is not False and not is_cut(reason) for one, reason in zip(complete, finished, strict=True)]
    return [one and right for one, right in zip(whole, are_right(row, count), strict=True)]


def _flags(row: Mapping[str, Any], name: str, count: int) -> Sequence[Any]:
    value = row.get(name)
    if value is None:
        return [None] * count
    if not isinstance(value, list) or len(value) != count:
        raise RowError("type", f"{name} does not have one value for each of the {count} generations")
    return value


def _reply_columns(row: Mapping[str, Any], holds: Callable[[str], bool]) -> tuple[str | None, str | None]:
    """The first prompt column, and the first reply column whose text satisfies `holds`."""
    reply = next((name for name in _REPLIES if isinstance(row.get(name), str) and holds(row[name])), None)
    prompt = next((name for name in _PROMPTS if name != reply and isinstance(row.get(name), str)), None)
    return prompt, reply


def _think(row: Mapping[str, Any]) -> Fields:
    """A prompt column and a reply column. A reply with a thought is preferred, then one with an answer mark."""
    prompt, reply = _reply_columns(row, has_thought_tag)
    if reply is None:
        prompt, reply = _reply_columns(row, has_mark)
    if reply is None:
        prompt, reply = _reply_columns(row, lambda text: True)
    if prompt is None:
        raise RowError("missing", f"question is missing: none of {', '.join(_PROMPTS)} contains text")
    if reply is None:
        raise RowError("missing", f"answer is missing: none of {', '.join(_REPLIES)} contains text")
    question, read = row[prompt], [prompt, reply]
    if prompt == "instruction" and reply != "input":
        question, read = _instruction(row), [*read, "input"]
    question = with_passage(question, row, read)
    return _from_reply(with_context(question, row), row[reply], row=row, name=reply, thought=_row_thought(row))


def _texts(*names: str) -> Callable[[Mapping[str, Any]], bool]:
    return lambda row: all(isinstance(row.get(name), str) for name in names)


def _marked_answer(row: Mapping[str, Any]) -> bool:
    return isinstance(row.get("question"), str) and isinstance(row.get("answer"), str) and "####" in row["answer"]


def _has_think(row: Mapping[str, Any]) -> bool:
    return None not in _reply_columns(row, has_thought_tag)


def _has_marked_reply(row: Mapping[str, Any]) -> bool:
    return None not in _reply_columns(row, has_mark)


def _has_generations(row: Mapping[str, Any]) -> bool:
    answered = isinstance(row.get("answer"), str | int | float)
    return answered and isinstance(row.get("generations"), list) and any(name in row for name in _PROMPTS)


def _fits_prompt_completion(row: Mapping[str, Any]) -> bool:
    return _texts("prompt", "completion")(row) or all(isinstance(row.get(n), list) for n in ("prompt", "completion"))


_OPTIONS = ("choices", "options", "answer_choices", "endings")


def _with_options(read: Callable[[Mapping[str, Any]], Fields]) -> Callable[[Mapping[str, Any]], Fields]:
    """A reader that also reads the options of a row, and appends them to its question if it does not list them."""

    def fields(row: Mapping[str, Any]) -> Fields:
        found, options = read(row), _options_of(row)
        if options is None:
            return found
        turns = found.turns
        if turns:
            turns = (*turns[:-1], (turns[-1][0], with_choices(turns[-1][1], options.texts)))
        return replace(found, question=with_choices(found.question, options.texts), turns=turns, options=options)

    return fields


def has_options(row: Mapping[str, Any]) -> bool:
    """Whether a row has columns that may hold options."""
    return bool(columns_named(row, _OPTIONS) or option_columns(tuple(row)))


def _options_of(row: Mapping[str, Any]) -> Options | None:
    named = columns_named(row, _OPTIONS)
    if not named:
        path = option_columns(tuple(row))
        return read_options(options_at(row, path)) if path and options_at(row, path) is not None else None
    try:
        return read_options(row[named[0]])
    except RowError:
        if isinstance(row[named[0]], Mapping):
            return None  # the options of a program
        raise


LAYOUTS: dict[str, Layout] = {
    layout.name: replace(layout, read=_with_options(layout.read), has_options=True)
    for layout in (
        Layout("gsm8k", _gsm8k, ("question", "answer"), _marked_answer, by_marks=True),
        Layout("generations", _generations, ("answer", "generations"), _has_generations),
        Layout("think", _think, (), _has_think, by_marks=True),
        Layout("messages", _messages, ("messages",), lambda row: isinstance(row.get("messages"), list)),
        Layout("sharegpt", _sharegpt, ("conversations",), lambda row: isinstance(row.get("conversations"), list)),
        Layout(
            "conversation",
            _one_conversation,
            ("conversation",),
            lambda row: is_turns(row.get("conversation")) and "question" not in row,
        ),
        Layout("contents", _contents, ("contents",), lambda row: is_turns(row.get("contents"))),
        Layout("prompt_completion", _prompt_completion, ("prompt", "completion"), _fits_prompt_completion),
        Layout("alpaca", _alpaca, ("instruction", "output"), _texts("instruction", "output")),
        Layout("reply", _think, (), _has_marked_reply, by_marks=True),
    )
}
"""Layouts by name, in the order in which guessing tries them."""
