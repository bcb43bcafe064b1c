"""Mixtures: each source is read and scored by its own rules; weights say how often an epoch uses its rows."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

import pst_dist
from pst_dist.cli.main import run_verb
from pst_dist.config.loading import load_config
from pst_dist.data.sources import load_data, survey
from pst_dist.errors import ConfigError, DataError, StaleError
from pst_dist.training.batching.order import OrderPlan, mixed_epoch, slots_of

NUMBERS = [
    {"question": f"What is {n} + 1?", "answer": n + 1, "rationale": f"{n} and one", "id": f"r{n}"} for n in range(12)
]
TRUTHS = [{"q": f"Is {n} odd?", "a": bool(n % 2), "why": f"{n} by two", "id": f"r{n}"} for n in range(8)]


def rows_file(path: Path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


HELD_OUT = [{"question": "What is 50 + 1?", "answer": 51}, {"question": "What is 3 + 1?", "answer": 4}]


def mixed(tmp_path: Path, *words: str, truths=TRUTHS, held_out=HELD_OUT, **second):
    columns = {"question": "q", "answer": "a", "rationale": "why"}
    numbers, tests = rows_file(tmp_path / "n.jsonl", NUMBERS), rows_file(tmp_path / "t.jsonl", held_out)
    bools = {"rows": rows_file(tmp_path / "b.jsonl", truths), "answer_type": "bool", "columns": columns}
    sources = [{"rows": numbers, "task": "svamp", "test": tests}, {**bools, "weight": 2.5, **second}]
    keys = {"data": {"train": sources, "validation_size": 2}, "output_dir": str(tmp_path / "run"), "arm": "answer_only"}
    return load_config(None, [*words], keys=keys)


@pytest.mark.parametrize(
    ("rows", "weight", "slots"), [(10, 1.0, 10), (10, 2.0, 20), (10, 0.25, 2), (3, 0.01, 1), (4, 1.5, 6)]
)
def test_weights_say_how_often_an_epoch_uses_each_row(rows, weight, slots):
    assert slots_of(rows, weight) == slots
    used: Counter[int] = Counter()
    for epoch in range(40):
        order = mixed_epoch(((rows, weight), (5, 1.0)), seed=3, epoch=epoch)
        own, other = order[order < rows], order[order >= rows]
        assert len(own) == slots and sorted(other) == list(range(rows, rows + 5))
        used.update(own.tolist())
        assert max(used.values()) - min(used.get(row, 0) for row in range(rows)) <= 1, "no row is ahead of the others"


def test_the_order_is_a_function_of_seed_epoch_and_position():
    plan = OrderPlan(15, 4, 7, ((10, 0.5), (5, 3.0)))
    assert (plan.slots, plan.steps_per_epoch) == (20, 5)
    steps = [plan.global_batch(step).tolist() for step in range(20)]
    for step in reversed(range(20)):
        assert OrderPlan(15, 4, 7, ((10, 0.5), (5, 3.0))).global_batch(step).tolist() == steps[step]
    first = Counter(np.concatenate(steps[:5]).tolist())
    assert sum(first[row] for row in range(10)) == 5 and all(first[row] == 3 for row in range(10, 15))
    assert steps[:5] != steps[5:10]
    assert [OrderPlan(15, 4, 8, plan.parts).global_batch(step).tolist() for step in range(5)] != steps[:5]
    # Without weights the order is the one of always.
    plain = OrderPlan(15, 4, 7)
    assert sorted(np.concatenate([plain.global_batch(step) for step in range(4)]).tolist()) == list(range(15))


def test_each_source_is_read_by_its_own_rules(tmp_path):
    loaded = load_data(mixed(tmp_path))
    train = loaded.splits["train"]
    assert [sample.part for sample in train] == sorted((s.part for s in train), key=["svamp", "bool"].index)
    assert {(s.part, s.task, s.answer_type) for s in train} == {("svamp", "svamp", "number"), ("bool", "bool", "bool")}
    assert {s.answer for s in train if s.part == "bool"} == {"yes", "no"}
    ids = [sample.id for rows in loaded.splits.values() for sample in rows]
    assert len(set(ids)) == len(ids), "both files have the ids r0, r1, ..."
    parts = loaded.report["parts"]
    assert parts["svamp"]["test_rows"] == 2 and parts["bool"]["weight"] == 2.5
    assert parts["svamp"]["train_rows"] == 12 - 1 - 2, "one leaks into its test rows, two are validation"
    assert loaded.report["train_rows"] == sum(part["train_rows"] for part in parts.values()) == len(train)


def test_a_question_that_another_source_tests_is_dropped(tmp_path):
    truths = [*TRUTHS, {"q": "what is 50 + 1", "a": True, "why": "x", "id": "leak"}]
    assert "leak" not in {sample.id for sample in load_data(mixed(tmp_path, truths=truths)).splits["train"]}
    assert survey(mixed(tmp_path, truths=truths)).report["leaks_between_sources"] == 1
    with pytest.raises(DataError, match="1 training questions are also in validation or test of another source"):
        load_data(mixed(tmp_path, "data.leaks=refuse", truths=truths, held_out=HELD_OUT[:1]))


def test_what_does_not_fit_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"data\.test belongs to one source of the mixture"):
        mixed(tmp_path, "data.test=x.jsonl")
    with pytest.raises(ConfigError, match=r"two sources of data\.train are named svamp.*give one of them a name"):
        load_data(mixed(tmp_path, name="svamp"))
    with pytest.raises(ConfigError, match=r"data\.train"):
        mixed(tmp_path, wight=2)
    with pytest.raises(DataError, match=r"b\.jsonl:1: answer"):
        load_data(mixed(tmp_path, answer_type="date"))
    without = mixed(tmp_path, columns={"question": "q", "answer": "a"}).model_copy(update={"arm": "pst"})
    with pytest.raises(DataError, match=r"b\.jsonl.*no training row has a rationale, and arm pst needs one"):
        load_data(without)


def test_a_mixture_is_trained_scored_and_shown_by_source(tmp_path, capsys):
    config = mixed(
        tmp_path,
        "student.fresh.hidden_size=32",
        "student.fresh.num_layers=1",
        "student.fresh.num_heads=2",
        "train.num_train_epochs=2",
        "train.global_batch_size=8",
        "train.report_to=none",
        "train.num_threads=1",
        "train.metric_for_best_model=accuracy",
        "evaluate.max_new_tokens=6",
        "evaluate.latency_rows=0",
        test=rows_file(tmp_path / "bt.jsonl", [{"q": "Is 21 odd?", "a": True}]),
    )
    result = pst_dist.run(config)
    (arm,) = result.arms
    counts = load_data(config).report["parts"]
    slots = counts["svamp"]["train_rows"] + round(2.5 * counts["bool"]["train_rows"])
    assert arm.training.steps == 2 * -(-slots // 8)
    details = arm.evaluation.details
    assert arm.evaluation.task == details["task"] == "mixture" and details["chance"] is None
    assert {name: (part["task"], part["rows"]) for name, part in details["sources"].items()} == {
        "svamp": ("svamp", 2),
        "bool": ("bool", 1),
    }
    assert [row.part for row in arm.evaluation.rows] == ["svamp", "svamp", "bool"]
    assert "accuracy on svamp" in (tmp_path / "run" / "report.html").read_text()
    card = (tmp_path / "run" / "export" / "README.md").read_text()
    assert "| svamp test | 2 |" in card and "| bool test | 1 |" in card
    again = pst_dist.run(config)
    assert again.arms[0].training.steps == arm.training.steps
    run = str(tmp_path / "run")
    capsys.readouterr()
    assert run_verb(["evaluate", run]) == 0
    said = capsys.readouterr().out
    assert "\n  svamp: " in said and "\n  bool: " in said
    assert run_verb(["check", run]) == 0 and "bool: " in capsys.readouterr().out
    heavier = config.data.model_copy(
        update={"train": [one.model_copy(update={"weight": 1.0}) for one in config.data.mixture]}
    )
    with pytest.raises(StaleError, match="different rows or settings"):
        pst_dist.run(config.model_copy(update={"data": heavier}))
