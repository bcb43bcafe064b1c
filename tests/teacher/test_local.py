"""A teacher in this process: real transformers models, tiny and with random weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import zoo
from refusing import Refusing

import pst_dist
from pst_dist.errors import ConfigError, EnvironmentFault, InputError
from pst_dist.models.load import load_language_model, load_tokenizer
from pst_dist.models.locate import locate_model
from pst_dist.teacher.local import LocalTeacher
from pst_dist.teacher.messages import Request, as_text
from pst_dist.teacher.settings import TeachSettings


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return zoo.make("llama3", tmp_path_factory.mktemp("local") / "llama3")


def teacher(folder: Path, **more) -> LocalTeacher:
    return LocalTeacher(TeachSettings(output=Path("o.jsonl"), teacher_model=str(folder), **more))


def request(key: str, text: str, *, temperature: float = 0.0, seed: int = 1, most: int = 12) -> Request:
    return Request(key=key, turns=(("user", text),), most_tokens=most, temperature=temperature, seed=seed)


def test_a_greedy_reply_is_what_the_model_itself_would_write(folder):
    """Against a loop over the model's own logits, one question at a time, although the teacher pads a batch."""
    asked = teacher(folder)
    texts = ["2 + 2?", "What is the sum of 3 and 14 and 15?", "Q"]
    replies = asked.answer([request(text, text) for text in texts])
    model, tokenizer = load_language_model(locate_model(str(folder))), load_tokenizer(locate_model(str(folder)))
    for text, reply in zip(texts, replies, strict=True):
        ids = list(tokenizer(as_text((("user", text),))).input_ids)
        prompt, ends = len(ids), {1, 2}
        for _ in range(12):
            with torch.no_grad():
                ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] in ends:
                break
        assert reply.text == tokenizer.decode(ids[prompt:], skip_special_tokens=True).partition("\nQ:")[0]
        assert reply.usage.prompt == prompt and reply.usage.completion == len(ids) - prompt
        assert reply.finish == ("stop" if ids[-1] in ends else "length")


def test_a_sample_depends_on_its_seed_and_not_on_its_batch(folder):
    asked = teacher(folder)
    one = request("a", "2 + 2?", temperature=1.0, seed=5)
    others = [request(f"{n}", "a longer question " * n, temperature=1.0, seed=n) for n in range(1, 4)]
    alone = asked.answer([one])[0]
    assert asked.answer([*others, one])[-1].text == alone.text
    assert asked.answer([one])[0] == alone
    texts = {asked.answer([request("a", "2 + 2?", temperature=1.0, seed=seed)])[0].text for seed in range(5)}
    assert len(texts) == 5


def test_requests_that_do_not_fit_in_memory_together_are_answered_in_halves(folder):
    requests = [request(f"{n}", "a longer question " * n, temperature=1.0, seed=n) for n in range(1, 5)]
    asked, refusing = teacher(folder), Refusing(10**9)
    refusing.watch(asked._model)
    wanted = asked.answer(requests)
    refusing.tokens = max(refusing.seen) // 2
    assert [reply.text for reply in asked.answer(requests)] == [reply.text for reply in wanted]
    assert refusing.refused >= 1
    refusing.tokens = 5
    with pytest.raises(EnvironmentFault, match=r"a prompt of \d+ tokens, and up to 12 generated, does not fit"):
        asked.answer(requests)


def test_sampling_has_the_models_probabilities(folder):
    """The first token of many samples against the softmax of the logits, by total variation."""
    asked = teacher(folder)
    model, tokenizer = load_language_model(locate_model(str(folder))), load_tokenizer(locate_model(str(folder)))
    ids = list(tokenizer(as_text((("user", "2?"),))).input_ids)
    with torch.no_grad():
        wanted = torch.softmax(model(input_ids=torch.tensor([ids])).logits[0, -1] / 0.5, -1)
    counts = torch.zeros_like(wanted)
    requests = [request(f"{seed}", "2?", temperature=0.5, seed=seed, most=1) for seed in range(2000)]
    for start in range(0, 2000, 500):
        written = asked._generate([(one, ids, 1) for one in requests[start : start + 500]])
        for row in written:
            counts[row[0]] += 1
    # The expected distance of 2000 true samples from a distribution over V tokens is below sqrt(V / 2000) / 2.
    distance = 0.5 * (counts / 2000 - wanted).abs().sum()
    assert distance < 0.5 * (len(wanted) / 2000) ** 0.5 + 0.03


def test_a_prompt_that_is_too_long_is_refused_alone(folder):
    first, long, last = teacher(folder).answer([request("a", "2?"), request("b", "word " * 400), request("c", "3?")])
    assert long.finish == "refused" and "tokens" in long.text
    assert first.finish != "refused" and last.finish != "refused"


def test_the_python_interface_and_its_journal(folder, tmp_path, monkeypatch):
    rows = [{"question": f"What is {n} + 1?", "answer": n + 1} for n in range(5)]
    template = tmp_path / "short.txt"
    template.write_text("{question}")
    out = tmp_path / "out.jsonl"
    more = {"prompts": [str(template)], "reply_tokens": 6, "concurrency": 3}
    result = pst_dist.teach(rows, out, "data.answer_type=number", teacher_model=str(folder), **more)
    assert isinstance(result, pst_dist.TeachResult) and result.path == out and result.cap is None
    assert result.report["quality"]["samples"] == 5 and result.report["complete"]
    lines = (tmp_path / "out.teach" / "journal.jsonl").read_text().splitlines()
    assert len(lines) == 6 and json.loads(lines[0])["settings"]["--api"] == "in this process"
    # A second call finds every reply, so it needs no model at all.
    monkeypatch.setattr(LocalTeacher, "__init__", lambda self, settings: 1 / 0)
    again = pst_dist.teach(rows, out, "data.answer_type=number", teacher_model=str(folder), **more)
    assert again.report["quality"] == result.report["quality"]


def test_wrong_settings_of_the_python_interface_are_named(tmp_path, folder):
    rows = [{"question": "1 + 1?", "answer": 2}]
    with pytest.raises(ConfigError, match="temprature"):
        pst_dist.teach(rows, tmp_path / "o.jsonl", teacher_model=str(folder), temprature=1)
    with pytest.raises(ConfigError, match="name one teacher"):
        pst_dist.teach(rows, tmp_path / "o.jsonl")
    with pytest.raises(InputError):
        pst_dist.teach(rows, tmp_path / "o.jsonl", teacher_model=str(tmp_path / "nothing"))


def test_an_encoder_decoder_can_be_the_teacher(tmp_path):
    folder = zoo.make("t5", tmp_path / "t5")
    replies = teacher(folder).answer([request("a", "2 + 2?", most=5), request("b", "What is that?", most=5)])
    assert len(replies) == 2 and all(reply.usage.completion <= 5 for reply in replies)
