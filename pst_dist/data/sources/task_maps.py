"""Layouts of individual public datasets: AQuA, its human rationales in instruction form, CommonsenseQA with PaLM's,
s1K, BIG-bench, and those that have each wrong answer in a column.

All produce questions in Fine-tune-CoT's form, followed by `Answer choices: (A) …, (B) ….`
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from pst_dist.data.sources.columns import Fields, Layout
from pst_dist.data.sources.common_maps import has_options, replied_fields
from pst_dist.data.sources.context import columns_named, with_passage
from pst_dist.data.sources.conversations import Question
from pst_dist.data.sources.marks import last_mark
from pst_dist.data.sources.options import LETTERS, Options, printed_texts, read_options, with_choices
from pst_dist.data.sources.replies import Split, has_mark, split_reply
from pst_dist.data.sources.rows import RowError, plain_name
from pst_dist.data.sources.values import as_id, as_rationales, as_text
from pst_dist.data.sources.verdicts import known_wrong
from pst_dist.storage.manifest import digest_of

_PREAMBLE = re.compile(r"^Let's (?:think about|reason about|solve) the multi-choice question(?: step by step)?\.\s*")
# Human rationales end in "The answer is B", "Answer C", "Choice E is correct" or "The answer is 30. i.e C": take the
# last such word, and after it the first single capital from A to E.
_CLOSING = re.compile(
    r"(?:\b(?:hence|therefore|thus|so)\b,?\s*)?\b(?:the )?(?:correct )?(?:answer|choice|option)\b", re.I
)
_SENTENCE_END = re.compile(r"[.!?]\s")
_LETTER = re.compile(r"(?<![A-Za-z])([A-E])(?![A-Za-z])")


def _aqua(row: Mapping[str, Any]) -> Fields:
    """AQuA's original format: question, options `A)…`, rationale, correct."""
    options = read_options(row.get("options"))
    return Fields(
        question=with_choices(as_text(row.get("question"), "question"), options.texts),
        answer=as_text(row.get("correct"), "answer"),
        rationales=as_rationales(row.get("rationale")),
        options=options,
    )


def _aqua_human(row: Mapping[str, Any]) -> Fields:
    """AQuA's human rationales as {instruction, output}: a preamble, the steps, "The answer is X"."""
    question, found, listed = as_text(row.get("instruction"), "question").rpartition("Answer Choices:")
    if not found:
        raise RowError("missing", "question has no `Answer Choices:`")
    options = read_options([part.strip() for part in re.split(r"\([A-E]\)", listed)[1:]])
    output = _PREAMBLE.sub("", as_text(row.get("output"), "answer"))
    rationale, answer = _split_answer(output, options.texts)
    return Fields(
        question=with_choices(question.strip(), options.texts),
        answer=answer,
        rationales=as_rationales(rationale),
        options=options,
    )


def _split_answer(output: str, choices: tuple[str, ...]) -> tuple[str, str]:
    """Steps and letter. If the ending gives the text of a choice instead of its letter, the letter of that choice."""
    closings = list(_CLOSING.finditer(output))
    # "The answer is option B" has two such words; the rationale ends before the first one in the last sentence.
    for last in reversed(closings):
        first = next(mark for mark in closings if not _SENTENCE_END.search(output, mark.start(), last.start()))
        ending = output[last.end() :]
        if len(ending) > 60:
            break  # a word in the middle of the steps
        letter = _LETTER.search(ending)
        if letter:
            return output[: first.start()], letter.group(1)
        text = re.sub(r"^\s*is\b\W*", "", ending).strip().rstrip(".")
        named = [letter for letter, choice in zip("ABCDE", choices, strict=False) if choice == text]
        if len(named) == 1:
            return output[: first.start()], named[0]
    raise RowError("answer", "the reply does not end in an answer")


def _csqa_palm(row: Mapping[str, Any]) -> Fields:
    """CommonsenseQA with CoS-E's explanations, as in the Distilling step-by-step release, whose PaLM rationales are in
    data.teacher_completions and replace these. (https://huggingface.co/datasets/Salesforce/cos_e)"""
    options = read_options(row.get("choices"))
    answer = as_text(row.get("answer"), "answer")
    if answer not in options.texts:
        raise RowError("answer", "answer is not one of the choices")
    # In 48 of the 10,962 rows two options have the answer's text, and the release does not say which one is meant. The
    # published 9,741 and 1,221 rows include them, so we take the first; it is CommonsenseQA's own key in 29 of the 48.
    return Fields(
        question=with_choices(as_text(row.get("question"), "question"), options.texts),
        answer=LETTERS[options.texts.index(answer)],
        rationales=as_rationales(row.get("abstractive_explanation")),
        options=options,
        id=as_id(row.get("id")),
    )


def _big_bench(row: Mapping[str, Any]) -> Fields:
    """BIG-bench's examples: an input, and a score for each option."""
    scores = row.get("target_scores")
    assert isinstance(scores, Mapping)
    options = read_options(list(scores))
    best = [place for place, score in enumerate(scores.values()) if score == max(scores.values())]
    if len(best) != 1:
        raise RowError("answer", f"{len(best)} options have the best of the target_scores")
    return Fields(
        question=with_choices(as_text(row.get("input"), "question"), options.texts),
        answer=LETTERS[best[0]],
        options=options,
        id=as_id(row.get("id")),
    )


def _s1k(row: Mapping[str, Any]) -> Fields:
    """s1K: a thought and an attempt of Gemini; s1K-1.1 also has those of DeepSeek R1, which are then used.

    An attempt that is graded "no", or that has no certain answer, is used only if no other is there. The gold answer is
    a short `solution`; else the answer of an attempt graded "yes", the box at the end of the solution, or the answer of
    an attempt that is not graded "no". (https://huggingface.co/datasets/simplescaling/s1K-1.1)
    """
    grade, split = _best_attempt(row)
    solution = row.get("solution")
    gold = solution.strip() if isinstance(solution, str) and _is_short_answer(solution) else None
    if gold is None and not _is_graded(row, grade, "yes"):
        gold = _last_box(solution)
    wrong = ""
    if _is_graded(row, grade, "no"):
        if gold is None:
            raise RowError("answer", f"{grade} says that the attempt is wrong, and solution has no certain answer")
        wrong = known_wrong(grade, row[grade])
    return replied_fields(Question(row.get("question")), split.rationale, split.answer, gold, row, wrong)


def _best_attempt(row: Mapping[str, Any]) -> tuple[str, Split]:
    """The column with the grade of the attempt to use, and its rationale and answer; raises RowError."""
    made = [names for names in _ATTEMPTS if row.get(names[1]) is not None]
    failed: RowError | None = None
    for names in sorted(made, key=lambda names: _is_graded(row, names[2], "no")):
        try:
            return names[2], split_reply(as_text(row[names[1]], "answer"), _joined(row.get(names[0])))
        except RowError as error:
            failed = failed or error
    raise failed or RowError("missing", "answer is missing")


def _is_graded(row: Mapping[str, Any], grade: str, word: str) -> bool:
    return str(row.get(grade)).strip().lower() == word


def _last_box(solution: Any) -> str | None:
    """The content of the box with which a reference solution ends; None if it does not end with one."""
    mark = last_mark(solution) if isinstance(solution, str) else None
    if mark is None or mark.kind != "box" or mark.end is None or not _AFTER_BOX.fullmatch(solution, mark.end):
        return None
    try:
        return split_reply(solution).answer
    except RowError:  # one of several boxes
        return None


_AFTER_BOX = re.compile(r"(?:[\s$.}\])]|\\[\])]|\\end\{[a-z]{1,12}\*?\}){0,40}")
_ATTEMPTS = (
    ("deepseek_thinking_trajectory", "deepseek_attempt", "deepseek_grade"),
    ("gemini_thinking_trajectory", "gemini_attempt", "gemini_grade"),
    ("thinking_trajectories", "attempt", "grade"),
)


def _joined(thought: Any) -> str:
    """A thought in one text, or in several that continue each other."""
    parts = thought if isinstance(thought, list) else [thought]
    return "\n\n".join(as_text(part, "rationale").strip() for part in parts)


def _is_short_answer(text: str) -> bool:
    return 0 < len(text.split()) <= 5 and "\n" not in text.strip() and not has_mark(text)


def _is_s1k(row: Mapping[str, Any]) -> bool:
    pairs = [isinstance(row.get(reply), str) and isinstance(row.get(kept), str | list) for kept, reply, _ in _ATTEMPTS]
    return isinstance(row.get("question"), str) and any(pairs)


def _distractors(row: Mapping[str, Any]) -> Fields:
    """The correct answer and the wrong ones in columns of their own: GPQA, SciQ, Open Trivia DB, TruthfulQA.

    Options are in the order of their digests, which tells nothing about which one is correct and never changes. SciQ's
    `support` says why the answer is correct. (https://huggingface.co/datasets/allenai/sciq)
    """
    asked, correct = (_first_of(row, names, field) for names, field in ((_ASKED, "question"), (_CORRECT, "answer")))
    question = as_text(row[asked], "question")
    answer = as_text(row[correct], "answer").strip()
    texts = [answer, *(as_text(text, "choices").strip() for text in _wrong_answers(row))]
    if len(set(texts)) < len(texts):
        raise RowError("choices", "two options are the same")
    options = read_options(sorted(texts, key=lambda text: digest_of([question, text])))
    read = (asked, correct, *columns_named(row, ("correct_answers",)), *_wrong_columns(row))
    return _chosen(row, question, options, answer, read)


def _chosen(row: Mapping[str, Any], question: str, options: Options, answer: str, read: tuple[str, ...]) -> Fields:
    """The fields of a row with an answer out of its options; `read` are the columns that were read for them."""
    explained = columns_named(row, _EXPLAINED)
    return Fields(
        question=with_choices(with_passage(question, row, (*read, *explained)), options.texts),
        answer=answer,
        rationales=as_rationales(row[explained[0]]) if explained else (),
        options=options,
        id=as_id(row.get("id")),
    )


_ASKED = ("question", "prompt", "problem")
_CORRECT = ("correct_answer", "best_answer")
_EXPLAINED = ("explanation", "rationale", "support")
_WRONG = re.compile(r"(?:distractor|(?:incorrect|wrong)answer)s?\d{0,2}")


def _first_of(row: Mapping[str, Any], names: tuple[str, ...], field: str) -> str:
    found = columns_named(row, names)
    if not found:
        raise RowError("missing", f"{field} is missing")
    return found[0]


def _wrong_columns(row: Mapping[str, Any]) -> list[str]:
    return [name for name in row if _WRONG.fullmatch(plain_name(name))]


def _wrong_answers(row: Mapping[str, Any]) -> list[Any]:
    """The wrong answers, each in a column or in a list; columns that are empty in this row are left out."""
    found: list[Any] = []
    for name in _wrong_columns(row):
        value = row[name]
        if isinstance(value, str):
            found += printed_texts(value) or ([value] if value.strip() else [])
        elif value is not None:
            found += value if isinstance(value, list) else [value]
    return found


def _has_distractors(row: Mapping[str, Any]) -> bool:
    named = all(columns_named(row, names) for names in (_ASKED, _CORRECT))
    return named and not has_options(row) and bool(_wrong_answers(row))


def _flagged_options(row: Mapping[str, Any]) -> Fields:
    """Options that say themselves whether they are correct: `{"text": "Paris", "is_correct": true}`."""
    asked, listed = _first_of(row, _ASKED, "question"), _first_of(row, _OPTIONS, "choices")
    flags = _flags(row[listed])
    if sum(flags) != 1:
        raise RowError("answer", f"{sum(flags)} options are marked as correct")
    options, question = read_options(row[listed]), as_text(row[asked], "question")
    return _chosen(row, question, options, LETTERS[flags.index(True)], (asked, listed))


_OPTIONS = ("choices", "options", "answer_choices", "answer_options")  # `answers` may be judged replies
_FLAGS = ("correct", "iscorrect", "isanswer", "isright", "iscorrectanswer")


def _flags(options: Any) -> list[bool]:
    """Whether each option is marked as correct; empty for options that do not all say so."""
    items = options if isinstance(options, list) and all(isinstance(item, Mapping) for item in options) else []
    flags = [[value for name, value in item.items() if plain_name(name) in _FLAGS] for item in items]
    told = all(len(found) == 1 and found[0] in (0, 1) and isinstance(found[0], int) for found in flags)
    return [bool(found[0]) for found in flags] if told else []


def _has_flags(row: Mapping[str, Any]) -> bool:
    listed = columns_named(row, _OPTIONS)
    return bool(columns_named(row, _ASKED) and listed and _flags(row[listed[0]]))


def _has_scores(row: Mapping[str, Any]) -> bool:
    scores = row.get("target_scores")
    return isinstance(scores, Mapping) and all(isinstance(score, int | float) for score in scores.values())


def _is_aqua_human(row: Mapping[str, Any]) -> bool:
    return all(isinstance(row.get(name), str) for name in ("instruction", "output")) and (
        "Answer Choices:" in row["instruction"] and _PREAMBLE.match(row["output"]) is not None
    )


TASK_LAYOUTS: dict[str, Layout] = {
    layout.name: layout
    for layout in (
        Layout(
            "aqua",
            _aqua,
            ("question", "options", "correct"),
            lambda row: isinstance(row.get("options"), list) and isinstance(row.get("correct"), str),
            has_options=True,
        ),
        Layout("aqua_human", _aqua_human, ("instruction", "output"), _is_aqua_human, has_options=True),
        Layout(
            "csqa_palm",
            _csqa_palm,
            ("question", "choices", "answer"),
            lambda row: "abstractive_explanation" in row and isinstance(row.get("choices"), list),
            has_options=True,
        ),
        Layout("s1k", _s1k, ("question",), _is_s1k),
        Layout("flagged_options", _flagged_options, (), _has_flags, by_marks=True, has_options=True),
        Layout("distractors", _distractors, (), _has_distractors, by_marks=True, has_options=True),
        Layout("big_bench", _big_bench, ("input", "target_scores"), _has_scores, has_options=True),
    )
}
"""Layouts by name. Guessing tries them before the general layouts, because they are more specific."""
