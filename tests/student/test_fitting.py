"""Rows that are checked many at once are refused and warned of exactly as when each is laid out on its own."""

from __future__ import annotations

import pytest

from pst_dist.arms import ARMS, STOP_TOKEN
from pst_dist.config.schema import Config
from pst_dist.data.sample import ReasoningSample
from pst_dist.data.tasks import get_task
from pst_dist.errors import DataError
from pst_dist.student.fitting import check_rows
from pst_dist.student.layout import layout_for
from pst_dist.student.tokenizer import build_tokenizer, unwritable_answers

MAX_LENGTH = 64
TASK = get_task(None, "text")


def sample(number: int, question: str = "2+2?", **fields) -> ReasoningSample:
    values = {"answer": "4", "rationales": ("two and two", "a pair"), **fields}
    return ReasoningSample(id=f"row-{number}", question=question, source=f"r.jsonl:{number}", **values)


def rows() -> list[ReasoningSample]:
    """Questions and answers around every length limit, control tokens as text, turns, missing and long rationales."""
    found = [sample(length, "7" * length) for length in range(1, MAX_LENGTH + 9)]
    found += [sample(100 + length, answer="5" * length) for length in range(1, MAX_LENGTH + 9, 3)]
    found += [
        sample(300, f"What is {STOP_TOKEN}?"),
        sample(301, answer="<|endoftext|>"),
        sample(302, answer="é½ \u2028x"),
    ]
    found += [sample(303, rationales=()), sample(304, rationales=("9" * 500,)), sample(305, rationales=(STOP_TOKEN,))]
    found += [sample(306, "User: a\nUser: b", turns=(("system", "s"), ("user", "b")))]
    return found


def outcome(call) -> object:
    try:
        return call()
    except DataError as error:
        return str(error)


@pytest.mark.parametrize("arm", ARMS)
@pytest.mark.parametrize("seq2seq", [False, True])
def test_many_at_once_give_what_each_gives_on_its_own(arm, seq2seq):
    config = Config.model_validate({"arm": arm, "layout": {"max_length": MAX_LENGTH, "semantic_tokens": 2}})
    layout = layout_for(config, build_tokenizer(config.student, rows()[:40]), is_encoder_decoder=seq2seq)
    refused = []
    for one in rows():

        def alone(one=one):
            layout.sequences(one)
            return unwritable_answers(layout.text_ids, [one], TASK)

        wanted = outcome(alone)
        refused += [one] if isinstance(wanted, str) else []
        assert outcome(lambda one=one: check_rows(layout, [one], lambda _: TASK)) == wanted, one
    assert len(refused) > 5
    fine = [one for one in rows() if one not in refused]
    assert check_rows(layout, fine, lambda _: TASK) == unwritable_answers(layout.text_ids, fine, TASK)
    told = outcome(lambda: check_rows(layout, [*fine, refused[1], refused[0]], lambda _: TASK))
    assert told == outcome(lambda: layout.sequences(refused[1]))


def test_rows_that_fit_with_room_to_spare_are_not_laid_out(monkeypatch):
    config = Config.model_validate({"arm": "pst"})
    layout = layout_for(config, build_tokenizer(config.student, [sample(1)]), is_encoder_decoder=False)
    monkeypatch.setattr(layout, "sequences", None)
    assert check_rows(layout, [sample(number) for number in range(50)], lambda _: TASK) == []
