"""Settings that came later: older trainings keep their digest, and a run keeps what it began with."""

import json
import shutil

import pytest
import zoo
from small_run import small_config

from pst_dist.config.loading import dump_config, load_config
from pst_dist.config.locate import RESOLVED
from pst_dist.config.run_dir import run_dir
from pst_dist.errors import StaleError
from pst_dist.storage.json_files import read_json
from pst_dist.training.begun import begun_settings, settled, with_auto_of
from pst_dist.training.fingerprint import check_changes, settings_digest, training_settings
from pst_dist.training.result import complete_training
from pst_dist.training.trainer import train

OLD_DIGEST = "aaad60345f819a9a8c5c533ddc9fd6452ad9d8ea7d96dcc8d797f366345e5848"
"""Of these settings, as the code before the new keys computed it."""
OLD = {"layout.prompt": "{question} ###", "student.new_token_init": "mean"}
LATER = {"layout.separator": " ", "layout.turns": None}
"""What a training used before there was a choice."""


def settings(*overrides: str) -> dict:
    words = ["arm=answer_only", "student.model_name_or_path=some/model", "train.learning_rate=3e-4", *overrides]
    config = load_config(None, words)
    return training_settings(settled(config, OLD, lambda: None), "s" * 64, None, 32)


def test_an_older_training_has_the_digest_that_it_had():
    old = settings()
    assert settings_digest(old) == OLD_DIGEST
    later = {"student.new_token_init", "layout.system", "train.head_learning_rate", "train.embedding_learning_rate"}
    assert not {*later, *LATER} & old.keys()
    assert settings_digest(settings("student.new_token_init=eos")) != OLD_DIGEST
    assert check_changes(old, old | {"student.new_token_init": "mean"}, accept=False) == []


def test_a_later_setting_is_compared_with_what_older_trainings_did():
    with pytest.raises(StaleError, match=r"trained with student\.new_token_init=mean, this run has .*=eos"):
        check_changes(settings(), settings("student.new_token_init=eos"), accept=True)
    faster = settings("train.head_learning_rate=0.01")
    with pytest.raises(StaleError, match=r"trained with train\.head_learning_rate=null"):
        check_changes(settings(), faster, accept=False)
    assert check_changes(settings(), faster, accept=True) == ["train.head_learning_rate null -> 0.01"]


@pytest.mark.encoder
def test_a_run_keeps_what_it_began_with(small_data, tmp_path):
    base = zoo.make("gpt2", tmp_path / "base")
    changes = {
        "arm": "answer_only",
        "student__model_name_or_path": base,
        "layout__max_length": 128,
        "train__max_steps": 2,
    }
    config = small_config(small_data, tmp_path / "run", **changes)
    assert config.student.new_token_init == "auto"
    run = run_dir(config)
    assert begun_settings(run) is None
    older = small_config(small_data, tmp_path / "run", **changes, student__new_token_init="mean")
    result = train(older)
    newest = run.checkpoints / "checkpoint-2" / "run_state.json"
    assert "student.new_token_init" not in read_json(newest)["settings"], "as older versions wrote it"
    run.path.joinpath(RESOLVED).write_text(dump_config(config))
    assert train(config) == result, "the same training, complete"
    assert load_config(str(run.path)).student.new_token_init == "mean"
    assert complete_training(config, 1) == result
    auto = small_config(small_data, tmp_path / "run", **changes, layout__prompt="auto")
    assert complete_training(auto, 1) == result

    shutil.rmtree(run.checkpoints)
    assert begun_settings(run) == OLD | LATER
    assert train(auto) == result

    run.path.joinpath(RESOLVED).write_text(dump_config(config))  # as a second `pst run --rebuild` does
    other = train(config, rebuild=True)
    assert other.fingerprint != result.fingerprint
    assert begun_settings(run) == OLD | LATER | {"student.new_token_init": "newline"}
    saved = read_json(run.checkpoints / "checkpoint-2" / "run_state.json")
    assert saved["settings"]["student.new_token_init"] == "newline"
    assert load_config(str(run.path)).student.new_token_init == "newline"


def test_a_prompt_that_ends_in_white_space_keeps_the_space_that_a_training_began_with():
    for model in ("student.model_name_or_path=some/model", "student.fresh.num_layers=1"):
        asked = ["arm=answer_only", model, "student.new_token_init=mean", 'layout.prompt="{question}\\n"']
        config = load_config(None, asked)
        begun = {"layout.prompt": "{question}\n", "student.new_token_init": "mean"}
        assert settled(config, None, lambda: None).layout.separator == ""
        older = settled(config, begun, lambda: None)
        assert older.layout.separator == " "
        assert "layout.separator" not in training_settings(older, "s" * 64, None, 32)
        new = settled(config, begun | {"layout.separator": ""}, lambda: None)
        assert training_settings(new, "s" * 64, None, 32)["layout.separator"] == ""


def test_a_run_keeps_the_prompt_and_turns_that_auto_found():
    turns = {"reply": "\nA: ", "next": "\nQ: "}
    begun = {"layout.prompt": "Q: {question}\nA: ", "layout.separator": "", "layout.turns": turns}
    asked = ["arm=answer_only", "student.model_name_or_path=some/model", "layout.prompt=auto"]
    config = load_config(None, [*asked, "student.new_token_init=mean"])
    kept = settled(config, begun, lambda: None)
    assert (kept.layout.prompt, kept.layout.separator, kept.layout.turns) == tuple(begun.values())
    assert with_auto_of(kept, config) == config
    assert load_config(None, [f"layout.turns={json.dumps(turns)}"]).layout.turns == turns
