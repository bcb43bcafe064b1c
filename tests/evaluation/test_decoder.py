"""Evaluation in batches: a killed one continues, and ranks give the scores of one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from evaluated import make_run
from ports import free_port

from pst_dist.config.schema import Config
from pst_dist.errors import InputError
from pst_dist.evaluation.decoder import InProcess
from pst_dist.evaluation.evaluate import DECODING, evaluate
from pst_dist.pipeline import make_scores
from pst_dist.student.saved import FORMAT_FILE

SETTINGS = {"batch_size": 2, "latency_rows": 0}


class Counting(InProcess):
    """Decodes here; is killed before the batch of number `stop`."""

    def __init__(self, stop: int = 1000) -> None:
        self.stop, self.sizes = stop, list[int]()

    def run(self, config, student, todo, done, bar):
        for k, outcome in super().run(config, student, todo, done, bar):
            self.sizes.append(len(todo[k].questions))
            yield k, outcome
            if len(self.sizes) == self.stop:
                raise KeyboardInterrupt


def samples_of(config: Config) -> list[dict]:
    path = Path(config.output_dir) / "eval" / "test" / "samples.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Config:
    """An evaluation in one go."""
    config = make_run(tmp_path_factory.mktemp("whole"), **SETTINGS)
    evaluate(config)
    return config


@pytest.mark.parametrize("stop", [1, 2, 4])
def test_a_killed_evaluation_decodes_only_what_is_missing(whole, tmp_path, stop, caplog):
    config = make_run(tmp_path, **SETTINGS)
    with pytest.raises(KeyboardInterrupt):
        evaluate(config, executor=Counting(stop))
    kept = sorted((tmp_path / DECODING).rglob("*.json"))
    assert len(kept) == stop
    second = Counting()
    with caplog.at_level("INFO", logger="pst_dist"):
        evaluate(config, executor=second)
    # Six answers in three batches, then as many rationales, and those after another row's answer.
    everything = Counting()
    evaluate(config, executor=everything, rebuild=True)
    assert len(second.sizes) == len(everything.sizes) - stop
    assert samples_of(config) == samples_of(whole)
    assert not (tmp_path / DECODING).exists()
    (tmp_path / DECODING / "test" / "0").mkdir(parents=True)
    (tmp_path / DECODING / "validation").mkdir()
    evaluate(config)
    assert [path.name for path in (tmp_path / DECODING).iterdir()] == ["validation"], "what a kill left is removed"
    assert f"{min(2 * stop, 6)} of 6 rows were decoded earlier" in caplog.text


def test_a_damaged_batch_and_those_of_other_settings_are_decoded_again(whole, tmp_path):
    config = make_run(tmp_path, **SETTINGS)
    with pytest.raises(KeyboardInterrupt):
        evaluate(config, executor=Counting(2))
    first, _ = sorted((tmp_path / DECODING).rglob("*.json"))
    first.write_bytes(first.read_bytes()[:50])
    again, everything = Counting(), Counting()
    results = evaluate(config, executor=again)
    assert samples_of(config) == samples_of(whole) and results["rows_per_second"] > 0
    evaluate(config, executor=everything, rebuild=True)
    assert len(again.sizes) == len(everything.sizes) - 1
    with pytest.raises(KeyboardInterrupt):
        evaluate(config, executor=Counting(2), rebuild=True)
    shorter = config.model_copy(update={"evaluate": config.evaluate.model_copy(update={"max_new_tokens": 39})})
    other = Counting()
    evaluate(shorter, executor=other)
    assert len(other.sizes) == len(everything.sizes)


def launched(words: list[str], *, deepspeed: bool = False) -> subprocess.CompletedProcess:
    """`pst` on two ranks, by torchrun or the deepspeed launcher."""
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        environment.pop(name, None)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m"]
    if deepspeed:
        program = str(Path(sys.executable).with_name("deepspeed"))
        command = [program, "--num_gpus", "2", "--master_port", str(free_port()), "--module"]
    return subprocess.run(
        [*command, "pst_dist", *words], env=environment, capture_output=True, text=True, timeout=300, check=False
    )


@pytest.mark.slow
def test_two_ranks_write_what_one_process_writes(whole, tmp_path):
    config = make_run(tmp_path, **SETTINGS)
    with pytest.raises(KeyboardInterrupt):
        evaluate(config, executor=Counting(1))
    (tmp_path / "config.yaml").write_text(json.dumps(config.model_dump(mode="json")))
    done = launched(["evaluate", str(tmp_path / "config.yaml")])
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("accuracy 66.67 %") == 1, "rank zero alone reports"
    assert "2 of 6 rows were decoded earlier, continuing" in done.stderr and "2 batches on 2 ranks" in done.stderr
    assert samples_of(config) == samples_of(whole) and not (tmp_path / DECODING).exists()


@pytest.mark.slow
def test_what_a_rank_cannot_do_ends_all_of_them_with_its_error(tmp_path):
    config = make_run(tmp_path, **SETTINGS)
    (tmp_path / "config.yaml").write_text(json.dumps(config.model_dump(mode="json")))
    (tmp_path / "best" / FORMAT_FILE).write_text("{}")
    done = launched(["evaluate", str(tmp_path / "config.yaml")], deepspeed=True)
    assert done.returncode != 0 and (done.stdout + done.stderr).count("error[INTEGRITY]") == 2, done.stderr[-2000:]


def test_without_a_student_the_error_is_that_of_one_process(tmp_path):
    config = make_run(tmp_path, **SETTINGS)
    for path in (tmp_path / "best").iterdir():
        path.unlink()
    with pytest.raises(InputError, match="no trained student here"):
        make_scores(config)
