"""Rows with a system text and earlier turns from the file to scores, on a student whose chat template holds them."""

from __future__ import annotations

import json

import chats
import pytest
import zoo

from pst_dist.config.loading import load_config
from pst_dist.config.run_dir import run_dir
from pst_dist.data.sample import ReasoningSample
from pst_dist.data.shards import ShardSet
from pst_dist.data.sources import load_data
from pst_dist.diagnostics.rows import check
from pst_dist.errors import DataError, StaleError
from pst_dist.evaluation.evaluate import evaluate
from pst_dist.pipeline import make_shards
from pst_dist.student.saved import load_student
from pst_dist.student.unreadable import unreadable_rows
from pst_dist.training.trainer import train


def message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def rows(count: int) -> list[dict]:
    """Every third row is a plain question, every third has an earlier turn, and every third a system text too."""
    made = []
    for number in range(count):
        turns = [message("user", f"What is {number} + 1?"), message("assistant", f"<think>So.</think>{number + 1}")]
        if number % 3:
            turns = [message("user", f"Count to {number}."), message("assistant", "Yes."), *turns]
        if number % 3 == 2:
            turns = [message("system", "Answer with a number."), *turns]
        made.append({"messages": turns})
    return made


def config_of(tmp_path, family: str, *overrides: str):
    base = tmp_path / family
    if not base.is_dir():
        zoo.make(family, base)
        (base / "chat_template.jinja").write_text(chats.TEMPLATES[family])
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(24)))
    settings = {
        "arm": "answer_only",
        "output_dir": tmp_path / "run",
        "data.root": tmp_path,
        "data.train": "rows.jsonl",
        "data.test_size": 4,
        "data.validation_size": 4,
        "student.model_name_or_path": base,
        "layout.prompt": "auto",
        "layout.max_length": 200,
        "train.max_steps": 2,
        "train.global_batch_size": 4,
        "train.per_device_train_batch_size": 4,
        "train.report_to": "none",
        "evaluate.max_new_tokens": 4,
        "evaluate.latency_rows": 1,
    }
    return load_config(None, [f"{key}={value}" for key, value in settings.items()] + list(overrides))


def test_a_conversation_is_asked_as_turns_from_the_file_to_the_scores(tmp_path, monkeypatch):
    config = config_of(tmp_path, "qwen")
    make_shards(config)
    train(config)
    saved = load_config(str(tmp_path / "run")) if (tmp_path / "run" / "config.resolved.yaml").is_file() else None
    assert saved is None or saved.layout.turns is not None
    student = load_student(run_dir(config).best, device="cpu")
    asked = []
    seen = student.model.generate.__func__
    monkeypatch.setattr(
        type(student.model), "generate", lambda self, **inputs: asked.append(inputs) or seen(self, **inputs)
    )
    evaluate(config)
    tests = list(ShardSet.open(run_dir(config).shards).split("test"))
    assert any(sample.turns for sample in tests) and len(tests) == 4
    student.tokenizer.chat_template = chats.TEMPLATES["qwen"]
    wanted = []
    for sample in tests:
        turns = sample.turns or (("user", sample.question),)
        given = student.tokenizer.apply_chat_template(
            [message(*turn) for turn in turns], add_generation_prompt=True, return_dict=True
        )
        wanted.append(list(given["input_ids"]))
    batch = asked[0]
    decoded = [ids[mask.bool()].tolist() for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
    assert sorted(decoded) == sorted(wanted)


def test_check_counts_and_names_the_rows_that_the_template_cannot_hold(tmp_path):
    config = config_of(tmp_path, "gemma")
    report = check(config)
    assert not report.ok
    text = "\n".join(report.lines())
    assert "8 bad rows" in text and "the row has a system text, and the student's chat template takes none" in text
    assert "rows.jsonl:3:" in text, "the third row is the first with a system text"
    with pytest.raises(DataError, match=r"rows\.jsonl:3: the row has a system text.*8 of 24 rows are bad"):
        make_shards(config)
    tolerant = config_of(tmp_path, "gemma", "data.max_bad=8")
    assert check(tolerant).ok
    loaded = load_data(tolerant, unreadable_rows(tolerant))
    kept = [sample for split in loaded.splits.values() for sample in split]
    assert len(kept) == 16 and any(sample.turns for sample in kept)
    assert all(role != "system" for sample in kept for role, _ in sample.turns)
    assert check(config_of(tmp_path, "gemma", 'layout.prompt="{question}:"')).ok, "there it is one text"


def test_shards_of_older_versions_are_kept_where_turns_are_not_needed(tmp_path, monkeypatch):
    plain = config_of(tmp_path, "qwen", 'layout.prompt="{question}:"')
    with monkeypatch.context() as patch:  # as older versions wrote them
        whole = ReasoningSample.to_json
        without = lambda sample: {key: value for key, value in whole(sample).items() if key != "turns"}  # noqa: E731
        patch.setattr(ReasoningSample, "to_json", without)
        older = make_shards(plain)
    assert make_shards(plain) == older
    assert not any(sample.turns for sample in ShardSet.open(run_dir(plain).shards).split("train"))
    with pytest.raises(StaleError, match="different rows or settings"):
        make_shards(config_of(tmp_path, "qwen"))
    newer = make_shards(config_of(tmp_path, "qwen"), rebuild=True)
    assert make_shards(plain) == newer, "turns that are there do not disturb"
    assert any(sample.turns for sample in ShardSet.open(run_dir(plain).shards).split("train"))
