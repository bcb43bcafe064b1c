"""What a row says about its own reply: that it is wrong, or that it was cut off.

Such a reply must not become a gold answer, however clearly it is marked. Also tells the settings of a model
(`reasoning: on`) from the reasoning itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from decimal import Decimal
from typing import Any

from pst_dist.data.sources.rows import RowError, plain_name
from pst_dist.data.tasks.scoring import snippet

_VERDICTS = ("correct", "iscorrect", "correctness", "passed", "ispassed")
"""Columns that say whether a reply is right. One that is not `verified` or `accepted` may be right all the same."""
_REWARDS = ("reward", "accuracyreward", "correctnessreward")
"""Columns with a reward. A verifier gives 0 or -1 to a wrong reply; the score of a reward model is hardly ever that."""
_WRONG = ("false", "incorrect", "wrong", "fail", "failed", "reject", "rejected", "ignore")
_RIGHT = ("true", "correct", "right", "pass", "passed", "accept", "accepted")
_REPLIES = ("output", "response", "completion", "generation", "reply", "prediction", "modelanswer", "text", "content")
"""Columns with what a model replied, if they have the answer."""
_FINISHED = ("finishreason", "stopreason", "finishreasons")
_CUT = ("length", "maxtokens", "maxlength", "truncated")
_SETTINGS = (
    *("on", "off", "true", "false", "yes", "no", "enabled", "disabled", "enable", "disable", "auto", "default"),
    *("none", "minimal", "low", "medium", "high", "xhigh", "max"),
)


def refuse_bad_reply(row: Mapping[str, Any], *, is_gold: bool) -> str:
    """Raise RowError if the row says that its reply was cut off or, where the reply gives the gold answer (`is_gold`),
    that it is wrong: `is_correct: false`, or `label: false` as in KTO's rows.

    Returns why a reply beside a gold answer is wrong; empty if nothing says so.
    """
    wrong = ""
    for column, value in row.items():
        name = plain_name(column)
        if name in _FINISHED and is_cut(value):
            raise RowError("cut", f"{column} is {snippet(str(value))}: the reply is cut off")
        # A `label` may be the answer to something, unless it is a truth value.
        if is_gold and (_calls_wrong(name, value) or (name == "label" and value is False)):
            raise RowError("answer", f"{column} is {snippet(str(value))}, so the reply is not the gold answer")
        if not is_gold and _calls_wrong(name, value):
            wrong = wrong or known_wrong(column, value)
    return wrong


def known_wrong(column: str, value: object) -> str:
    """The reason for refusing a row with a column that calls its reasoning wrong."""
    said = f"{column} is {snippet(str(value))}, so the rationale is wrong"
    return f"{said}; leave the row out, or the column if it says something else"


def refuse_known_wrong(row: Mapping[str, Any], answered: str, *, explained: bool, judged: bool) -> str:
    """Raise RowError if other columns say that the answer in column `answered` is wrong, or, of a row that is
    `explained`, that its rationale was cut off.

    Returns why the rationale is wrong; empty if nothing says so. A row that is `judged` has the answer of its rationale
    in a column, which `data.keep` compares with the gold one.
    """
    name = plain_name(answered)
    if explained or name in _REPLIES:
        refuse_bad_reply(row, is_gold=name in _REPLIES)
    # Prodigy writes `label: WET, answer: reject`, or `accept: [B], answer: ignore` beside options.
    if name.startswith(("label", "accept")) and row.get("answer") in ("reject", "ignore"):
        raise RowError("answer", f"answer is {row['answer']!r}: the label of this row is rejected")
    for column, value in row.items() if explained and not judged else ():
        plain = plain_name(column)
        # The score of a row with a gold answer may be anything: of toxicity, or the logarithm of a probability.
        if plain != "score" and _calls_wrong(plain, value):
            return known_wrong(column, value)
    return ""


def _calls_wrong(name: str, value: object) -> bool:
    return _says_wrong(name, value) or _is_no_reward(name, value) or _is_invalid(name, value)


def _says_wrong(name: str, value: object) -> bool:
    return name in _VERDICTS and str(value).strip().lower() in _WRONG


def _is_no_reward(name: str, value: object) -> bool:
    if (
        name not in (*_REWARDS, "score")
        or isinstance(value, bool)
        or not isinstance(value, int | float | str | Decimal)
    ):
        return False
    # A score of 0 is mostly a number of votes, 0.0 that of a verifier (SYNTHETIC-1). CSV has both as text.
    bad = {"0.0"} if name == "score" else {"0", "0.0", "-1", "-1.0"}
    return str(value).strip() in bad


def _is_invalid(name: str, value: object) -> bool:
    """NuminaMath-1.5 says whether a problem and its solution are complete: `solution_is_valid: Incomplete`."""
    told = name in ("problemisvalid", "solutionisvalid") and isinstance(value, str | bool) and str(value).strip()
    return bool(told) and str(value).strip().lower() not in ("yes", "y", *_RIGHT, "valid")


def are_right(row: Mapping[str, Any], count: int) -> list[bool]:
    """Which of a row's replies are not known to be wrong, by its lists of verdicts: `correctness_llama`, `is_correct`.

    A reply is right if any verifier accepts it, and is kept if none checked it. Raises RowError for a `correctness_*`
    with another number of verdicts.
    """
    verdicts = []
    for column, value in ((str(name), value) for name, value in row.items()):
        told = [_verdict(one) for one in value] if isinstance(value, list) else None
        if told is not None and column.startswith("correctness_") and len(told) != count:
            raise RowError("type", f"{column} does not have one value for each of the {count} generations")
        named = column.startswith("correctness_") or plain_name(column) in _VERDICTS
        if told is not None and named and len(told) == count:
            verdicts.append(told)
    found = [[told[place] for told in verdicts] for place in range(count)]
    return [True in one or False not in one for one in found]


def _verdict(value: object) -> bool | None:
    word = str(value).strip().lower()
    return True if word in (*_RIGHT, "yes") else False if word in (*_WRONG, "no") else None


def is_cut(finish_reason: object) -> bool:
    """Whether a reason for the end of a reply is that it became too long."""
    return isinstance(finish_reason, str) and plain_name(finish_reason) in _CUT


def are_verdicts(column: str, values: Iterable[object]) -> bool:
    """Whether the values of a column `correct`, `result` or `answer` only say that something is right or wrong.

    An annotation program writes `accept` and `reject` into `answer`, where `yes`, `true` and `correct` are answers.
    """
    words = {str(value).strip().lower() for value in values if value is not None}
    if plain_name(column) == "answer":
        return words <= {"accept", "reject", "ignore"}
    return plain_name(column) in ("correct", "result", "finalresult") and words <= {*_WRONG, *_RIGHT}


def is_setting(text: str) -> bool:
    """Whether a text in the place of reasoning is a setting of the model: `on`, `high`."""
    return text.strip().lower() in _SETTINGS
