"""`pst plan --measure` and the table of GPUs: speeds that a plan turns into hours."""

from dataclasses import replace

import pytest
from small_run import small_config
from tiny import Tiny

from pst_dist.cli.main import run_verb
from pst_dist.diagnostics.cost import Machines, make_plan, split_words
from pst_dist.diagnostics.cost_page import plan_lines
from pst_dist.diagnostics.gpus import GPUS
from pst_dist.diagnostics.measure import Measured, _Measurement, measure, rows_of
from pst_dist.errors import ConfigError
from pst_dist.student.layout import layout_for


@pytest.mark.encoder
def test_a_plan_is_calibrated_on_this_machine_and_nothing_is_written(small_data, tmp_path):
    config = small_config(small_data, tmp_path / "run", train__deepspeed="zero2")
    measured = measure(config, Machines(gpus=2), seconds=0.5)
    assert not (tmp_path / "run").exists()
    tiny = Tiny("pst", layout={"max_length": config.layout.max_length})
    layout = layout_for(config, tiny.tokenizer, is_encoder_decoder=False)
    rows, validation_rows = rows_of(config)
    assert validation_rows == measured.validation_rows == 8
    lengths = [sum(len(one.prompt_ids) + len(one.target_ids) for one in layout.sequences(row)) for row in rows]
    # Step by step every row is drawn about equally often.
    assert measured.tokens_per_row == pytest.approx(sum(lengths) / len(rows), rel=0.1)
    assert measured.rows_per_rank == 4 and measured.passes >= 1 and measured.texts_per_second > 0
    assert 0 < measured.update_seconds < 5 and measured.peak_bytes is None
    assert measured.validation_tokens_per_second > measured.pass_tokens_per_second
    assert measured.tokens_per_second < measured.pass_tokens_per_second
    plan = make_plan(config, measured.applied(Machines(gpus=2)), tokens_per_row=measured.tokens_per_row)
    tokens = measured.tokens_per_row * 8 * plan.steps
    assert plan.training_hours == pytest.approx(tokens / (2 * measured.tokens_per_second) / 3600)
    assert "unknown" not in "\n".join(plan_lines(plan))


@pytest.mark.encoder
def test_every_update_that_is_timed_moves_every_weight(small_data, tmp_path):
    rows, count = rows_of(small_config(small_data, tmp_path / "run"))
    measurement = _Measurement(small_config(small_data, tmp_path / "run"), Machines(), rows, count)
    measurement.run(0.1)
    steps = {int(state["step"]) for state in measurement.engine.adamw.state.values()}
    assert steps == {3} and len(measurement.engine.adamw.state) > 10


FIXED = Measured("CPU", 3, 1000.0, 0.5, 2000.0, 50.0, 10.0, 400, None, None)


def test_a_step_is_its_passes_and_its_update_and_words_of_the_user_stay():
    assert FIXED.tokens_per_second == pytest.approx(500 / (0.5 + 0.5))
    assert FIXED.applied(Machines()).tokens_per_second == 500
    assert FIXED.applied(Machines(tokens_per_second=7)).tokens_per_second == 7
    assert FIXED.applied(Machines()).texts_per_second is None


def test_all_validations_are_counted(tmp_path):
    config = small_config(tmp_path / "data", tmp_path / "run", train__eval_steps=4)
    lines = FIXED.lines(config, 8, 2)
    assert lines[1] == "validation   2 times 400 rows: 10 s in all"
    assert replace(FIXED, validation_rows=0).lines(config, 8, 1) == lines[:1] and lines[0].startswith(
        "measured     CPU, 3 pass(es): 1,000 tok/s"
    )


def test_a_gpu_of_the_table_gives_memory_and_a_guess_of_the_hours(tmp_path):
    changes = {"arm": "answer_only", "train__bf16": True}
    config = small_config(tmp_path / "data", tmp_path / "run", **changes)
    _, machines = split_words(["gpu=H100"])
    plan = make_plan(config, machines)
    assert plan.machines.gpu_memory == 80
    assert plan.machines.tokens_per_second == pytest.approx(0.3 * 989e12 / (6 * plan.parameters))
    lines = "\n".join(plan_lines(plan))
    assert "is 30 % of the peak of h100" in lines and "one rank fits in 80 GiB" in lines
    exact = make_plan(small_config(tmp_path / "data", tmp_path / "run", arm="answer_only"), machines)
    assert exact.machines.tokens_per_second == pytest.approx(0.3 * 67e12 / (6 * plan.parameters))
    given = make_plan(config, split_words(["gpu=t4", "tokens_per_second=5"])[1])
    assert given.machines.tokens_per_second == 5 and "a guess" not in "\n".join(plan_lines(given))
    with pytest.raises(ConfigError, match=r"gpu='h10000'"):
        split_words(["gpu=h10000"])
    assert all(gpu.half >= gpu.single for gpu in GPUS.values())


@pytest.mark.encoder
def test_the_command_measures_when_it_is_asked_to(small_data, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("pst_dist.diagnostics.measure.SECONDS", 0.2)
    words = [
        "task=last_letter_concatenation",
        f"data_dir={small_data}",
        f"output_dir={tmp_path}/run",
        "arms=[]",
        "arm=answer_only",
    ]
    assert run_verb(["plan", "demo", *words, "train.max_steps=4"]) == 0
    assert "time         unknown: add --measure, or set tokens_per_second" in capsys.readouterr().out
    assert run_verb(["plan", "demo", *words, "train.max_steps=4", "--measure"]) == 0
    said = capsys.readouterr().out
    assert "measured     CPU, " in said and "unknown" not in said.partition("embeddings")[0]
