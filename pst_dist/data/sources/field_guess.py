"""Guess which column is what from the names of the columns and the types of their values.

`column_guess` first tries the ready-made maps, and decides what a guess is used for.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Iterable, Mapping, Sequence
from decimal import Decimal
from typing import Any

from pst_dist.data.sources.column_names import GOLD, SYNONYMS, columns_of
from pst_dist.data.sources.columns import TURNS
from pst_dist.data.sources.context import PASSAGE_COLUMNS, SYSTEM_COLUMNS, is_blank
from pst_dist.data.sources.conversations import TURN_COLUMNS, is_turns
from pst_dist.data.sources.options import option_columns, read_options
from pst_dist.data.sources.paths import options_at, texts_at
from pst_dist.data.sources.rows import RowError, plain_name
from pst_dist.data.sources.verdicts import are_verdicts, is_setting


def fields_by_name(rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Our fields for which a column with a common name is plausible."""
    columns = columns_of(rows)
    plain = {plain_name(column): column for column in reversed(columns)}
    found: dict[str, str] = {}
    if {"Body", "Question"} <= set(columns) and not all(_contains(row, "Question", "Body") for row in rows):
        found["question"] = "{Body} {Question}"  # SVAMP's original format
    elif pair := _claim_about(plain, rows):
        found["question"] = pair
        if "reason" in plain and _usable("rationale", plain["reason"], rows):  # ANLI's; elsewhere why a reply ended
            found["rationale"] = plain["reason"]
    if rows and all(_holds_stem(row.get("question")) for row in rows):
        found |= {"question": "question.stem", "choices": "question.choices"}  # CommonsenseQA's original format
    for field, synonyms in SYNONYMS.items():
        named = [plain[synonym] for synonym in synonyms if synonym in plain]
        usable = [column for column in named if column not in found.values() and _usable(field, column, rows)]
        if usable and field not in found:
            # Whether a model was right is no answer, if another column can be one.
            found[field] = min(usable, key=lambda column: field == "answer" and _are_verdicts(column, rows))
    if plain_name(found.get("answer", "")) not in GOLD and any(map(_holds_ground_truth, rows)):
        found["answer"] = "reward_model.ground_truth"
    if "choices" not in found and (options := option_columns(tuple(columns)) or _answers_to_choose(found, plain, rows)):
        found["choices"] = options
    if "choices" in found:
        found |= _letter_of_option(found, plain, rows)
    else:
        found |= _label_as_text(found, plain, rows)
    if {"chosen", "rejected"} <= plain.keys() and "answer" not in found:
        found.pop("rationale", None)  # it compares two replies, as in distilabel's preference data
    if "question" not in found and (other := _other_question(found, plain, rows)):
        found["question"] = other
    if "question" in found:
        found["question"] = _with_context_columns(found["question"], columns, rows)
    # In a column with a singular name, a list may have several rationales or the steps of one: `columns` refuses it.
    if "rationale" in found and plain_name(found["rationale"]).endswith("s"):
        values = [row.get(found["rationale"]) for row in rows]
        if any(isinstance(value, list) or (isinstance(value, str) and value.startswith("[")) for value in values):
            found["rationales"] = found.pop("rationale")
    if "rationale" not in found and "rationales" not in found and (several := _numbered_rationales(columns, rows)):
        found["rationales"] = several
    return found


def _contains(row: Mapping[str, Any], whole: str, part: str) -> bool:
    """Whether the text of one column has that of another one and more in it."""
    texts = [row.get(name) for name in (whole, part)]
    one, other = (text.strip() if isinstance(text, str) else "" for text in texts)
    return "" != other != one and other in one


_ASKING = {*SYNONYMS["question"], *SYNONYMS["choices"]}
_CLAIMS = (("premise", "hypothesis"), ("premises", "conclusion"), ("context", "hypothesis"))
"""What a claim is about, and the claim, in rows of inference: e-SNLI, ANLI, RTE, FOLIO."""


def _claim_about(plain: Mapping[str, str], rows: Sequence[Mapping[str, Any]]) -> str:
    """A template with a claim after what it is about; "" if there are no such columns, or another may ask something."""
    if _ASKING & plain.keys():
        return ""
    for about, claim in _CLAIMS:
        if about in plain and claim in plain and all(isinstance(row.get(plain[claim]), str) for row in rows):
            template = with_columns(plain[claim], [plain[about]], rows)
            if template != plain[claim]:
                return template
    return ""


def _letter_of_option(
    found: Mapping[str, str], plain: Mapping[str, str], rows: Sequence[Mapping[str, Any]]
) -> dict[str, str]:
    """The column with the letter of the answer's option instead of one with its text, if some text is a number or a
    letter and might name another option. Both must agree in all rows."""
    answer = found.get("answer")
    if answer is None or not any(re.fullmatch(r"\s*(?:\d{1,2}|[A-Za-z])\s*", str(row.get(answer))) for row in rows):
        return {}
    for name in (plain[name] for name in _LETTER_COLUMNS if name in plain):
        if name != answer and all(_agree(row, row.get(name), found) for row in rows):
            return {"answer": name}
    return {}


_LETTER_COLUMNS = ("answeridx", "answerindex", "answerletter", "answerkey", "correctoption", "correctletter")


def _agree(row: Mapping[str, Any], letter: Any, found: Mapping[str, str]) -> bool:
    """Whether a letter names the option that has the text of the answer."""
    try:
        texts = read_options(options_at(row, found["choices"])).texts
    except RowError:
        return False
    named = isinstance(letter, str) and re.fullmatch(r"[A-Z]", letter.strip())
    place = ord(letter.strip()) - ord("A") if named else len(texts)
    return place < len(texts) and texts[place] == str(row.get(found["answer"])).strip()


def _holds_ground_truth(row: Mapping[str, Any]) -> bool:
    """Whether a row is one of verl's, which RLVR data mostly come in."""
    reward = row.get("reward_model")
    return isinstance(reward, Mapping) and isinstance(reward.get("ground_truth"), str | int | float)


def _numbered_rationales(columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> str:
    """Columns with one rationale each, `explanation_1, explanation_2` (e-SNLI); "" if there are not two of them."""
    by_stem: dict[str, list[str]] = {}
    for column in columns:
        named = re.fullmatch(r"(rationale|explanation|cot|chainofthought|r1solution)\d{1,2}", plain_name(column))
        if named and _usable("rationale", column, rows):
            by_stem.setdefault(named.group(1), []).append(column)
    return next((", ".join(found) for found in by_stem.values() if len(found) > 1), "")


def _other_question(
    found: Mapping[str, str], plain: Mapping[str, str], rows: Sequence[Mapping[str, Any]]
) -> str | None:
    """A column that is the question if no other is.

    It has turns; or certain others keep it company: HellaSwag's `ctx`, PIQA's `goal` and WinoGrande's `sentence` with
    options, CREAK's `sentence` with an explanation, or CoT Collection's `source` with a `target` (elsewhere, the place
    where a row is from).
    """
    for name in TURN_COLUMNS:
        if name in plain and any(is_turns(row.get(plain[name])) for row in rows):
            return plain[name]
    names: tuple[str, ...] = ()
    if "answer" in found and "choices" in found:
        names = ("ctx", "goal", "sentence")
    elif {"answer", "rationale"} <= found.keys() and "entity" in plain:
        names = ("sentence",)
    if plain_name(found.get("answer", "")) in ("target", "targets"):
        names = (*names, "source")
    fitting = (plain[name] for name in names if name in plain)
    return next((column for column in fitting if all(isinstance(row.get(column), str) for row in rows)), None)


def _label_as_text(
    found: Mapping[str, str], plain: Mapping[str, str], rows: Sequence[Mapping[str, Any]]
) -> dict[str, str]:
    """The column with the name of a class, `label_text` or `target_text`, instead of the one with its number."""
    column = found.get("answer", "")
    if plain_name(column) not in ("label", "target") or not all(isinstance(row.get(column), int) for row in rows):
        return {}
    named = [plain[name] for end in ("text", "name") if (name := plain_name(column) + end) in plain]
    return next(({"answer": name} for name in named if all(isinstance(row.get(name), str) for row in rows)), {})


def _answers_to_choose(
    found: Mapping[str, str], plain: Mapping[str, str], rows: Sequence[Mapping[str, Any]]
) -> str | None:
    """A column `answers` whose texts are the options, because another column chooses one by number or letter
    (ReClor)."""
    column, chosen = plain.get("answers"), found.get("answer")
    if column is None or chosen in (None, column):
        return None
    for row in rows:
        texts, choice = row.get(column), row.get(chosen)
        listed = isinstance(texts, list) and len(texts) > 1 and all(isinstance(text, str) for text in texts)
        if not listed or not re.fullmatch(r"\d|[A-Za-z]", str(choice).strip()):
            return None
    return column


def _with_context_columns(question: str, columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> str:
    """A template that puts system texts and passages before the question, in the rows that have them, and an input
    after an instruction."""
    if "{" in question:
        return question
    asked = [row.get(question) for row in rows]
    if any(map(is_turns, asked)):  # a system text belongs before them; of a passage that is not certain
        wanted = {plain_name(name) for name in SYSTEM_COLUMNS}
        return with_columns(question, [name for name in columns if plain_name(name) in wanted], rows)
    if not all(isinstance(text, str | None) for text in asked):
        return question
    extra = next((column for column in columns if plain_name(column) == "input"), None)
    if plain_name(question) == "instruction" and extra and all(isinstance(row.get(extra), str) for row in rows):
        return f"{{{question}}}\n{{{extra}}}"
    wanted = {plain_name(name) for name in (*SYSTEM_COLUMNS, *PASSAGE_COLUMNS)}
    before = [name for name in columns if plain_name(name) in wanted and name != question]
    passages = {plain_name(name) for name in PASSAGE_COLUMNS}
    before = [
        name
        for name in before
        if plain_name(name) not in passages or not all(_contains(row, question, name) for row in rows)
    ]
    return with_columns(question, before, rows)


def with_columns(question: str, columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> str:
    """A template that puts columns before the question. One that is blank in some rows is marked `{context?}`, and of a
    list it takes all texts: `{passages[*]}`. A column whose texts are not certain is left out."""
    before = []
    for column in columns:
        values = [row.get(column) for row in rows]
        told = [value for value in values if not is_blank(value)]
        places = {texts_at(value, column) for value in told}
        if len(places) != 1 or None in places:
            continue
        before.append(f"{{{places.pop()}{'?' if len(told) < len(values) else ''}}}")
    last = question if "{" in question else f"{{{question}}}"
    return "\n\n".join((*before, last)) if before else question


def _usable(field: str, column: str, rows: Iterable[Mapping[str, Any]]) -> bool:
    """Whether some row of a column has a value of the right type for the field."""
    values = [row.get(column) for row in rows]
    if field in ("question", TURNS) and any(is_turns(value) for value in values):
        return True
    kinds: dict[str, tuple[type, ...]] = {
        "question": (str,),
        "answer": (str, int, float, bool, list, Decimal, datetime.date),
        "rationale": (str, list),
        "choices": (list, dict),
        "id": (str, int),
        TURNS: (),
    }
    # Also a text in which no options are recognised: passed over, an index into them would be read as a number.
    if field == "choices" and any(isinstance(value, str) and value.strip() for value in values):
        return True
    if field == "rationale":  # `reasoning: on` is a setting
        values = [value for value in values if not (isinstance(value, str) and is_setting(value))]
    return any(isinstance(value, kinds[field]) for value in values)


def _are_verdicts(column: str, rows: Sequence[Mapping[str, Any]]) -> bool:
    return are_verdicts(column, (row.get(column) for row in rows))


def _holds_stem(question: Any) -> bool:
    return isinstance(question, Mapping) and {"stem", "choices"} <= set(question)
