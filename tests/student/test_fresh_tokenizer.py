"""A fresh tokenizer: what it is trained on, and what a byte tokenizer does not need."""

from __future__ import annotations

import pytest

from pst_dist.config.schema import FreshConfig, StudentConfig
from pst_dist.data.sample import ReasoningSample
from pst_dist.student import tokenizer as tokenizers_of_students
from pst_dist.student.tokenizer import build_tokenizer


def rows(count):
    words = [f"{chr(97 + n % 26)}{chr(97 + n // 26)}" * 3 for n in range(count)]
    return [
        ReasoningSample(id=str(n), question=f"{word} {word}", answer=word, rationales=(f"{word} it is",))
        for n, word in enumerate(words)
    ]


def student(kind):
    return StudentConfig(fresh=FreshConfig(tokenizer=kind, vocab_size=320))


def test_of_many_rows_every_kth_is_used(monkeypatch):
    many = rows(95)
    monkeypatch.setattr(tokenizers_of_students, "MOST_ROWS", 20)
    found = build_tokenizer(student("bpe"), many)
    assert found.get_vocab() == build_tokenizer(student("bpe"), many[::5]).get_vocab()
    assert found.get_vocab() != build_tokenizer(student("bpe"), many[:20]).get_vocab()
    monkeypatch.setattr(tokenizers_of_students, "MOST_ROWS", 95)
    assert found.get_vocab() != build_tokenizer(student("bpe"), many).get_vocab()


def test_a_byte_tokenizer_reads_no_rows():
    def unread():
        pytest.fail("a row was read")
        yield

    found = build_tokenizer(student("byte"), unread())
    assert found.get_vocab() == build_tokenizer(student("byte"), rows(40)).get_vocab()
    assert len(found("zß", add_special_tokens=False)["input_ids"]) == 3
