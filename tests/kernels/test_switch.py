"""Kernels on and off: the choice, its reasons, and that a training run does not notice it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small_run import small_config

from pst_dist.errors import ConfigError, EnvironmentFault
from pst_dist.kernels import dispatch
from pst_dist.kernels.dispatch import backend_for
from pst_dist.storage.manifest import read_lines
from pst_dist.training.trainer import train

TRAIN = """
import json, logging, sys
from pst_dist.config.schema import Config
from pst_dist.training.trainer import train
logging.basicConfig(level="INFO")
for config in json.load(open(sys.argv[1])):
    train(Config.model_validate(config))
"""
CASES = {
    "huber-span": {"loss__alignment": "smooth_l1", "loss__pooling": "span"},
    "nce-t5": {"loss__alignment": "info_nce", "loss__negatives": 5, "student__fresh__architecture": "t5"},
}


@pytest.fixture
def fresh_choice(monkeypatch):
    """No choice is remembered from before, and none remains."""
    dispatch._backend.cache_clear()
    yield monkeypatch
    dispatch._backend.cache_clear()


def test_a_cpu_runs_the_reference_and_the_log_says_why(fresh_choice, caplog):
    fresh_choice.delenv("PST_KERNELS", raising=False)
    with caplog.at_level("INFO", logger="pst_dist"):
        assert backend_for(torch.device("cpu")).name == backend_for(torch.device("cpu")).name == "reference"
    assert [record.getMessage() for record in caplog.records] == [
        "kernels on cpu: reference (Triton does not support cpu tensors)"
    ]


def test_what_cannot_run_here_is_refused_when_forced(fresh_choice):
    fresh_choice.setenv("PST_KERNELS", "triton")
    with pytest.raises(EnvironmentFault, match="Triton does not support cpu tensors"):
        backend_for(torch.device("cpu"))
    fresh_choice.setenv("PST_KERNELS", "fast")
    with pytest.raises(ConfigError, match="use one of auto, triton, reference, interpret"):
        backend_for(torch.device("cpu"))


def test_kernels_that_disagree_are_replaced_with_one_line(fresh_choice, caplog):
    """As on a GPU whose compiler or driver miscomputes: the self-test's verdict decides."""
    pytest.importorskip("triton", reason="needs triton")
    fresh_choice.setattr(dispatch, "_obstacle", lambda *_: None)
    fresh_choice.setattr("pst_dist.kernels.self_test.disagreement", lambda *_: "span_mean in bfloat16 is off by 0.3")
    with caplog.at_level("WARNING", logger="pst_dist"):
        assert backend_for(torch.device("cpu")).name == "reference"
    assert "span_mean in bfloat16 is off by 0.3; using the slower reference instead" in caplog.text


@pytest.mark.encoder
def test_training_with_triton_kernels_follows_the_reference(small_data, tmp_path):
    """Triton's interpreter stands in for a GPU: the same kernels, launched by the same trainer."""
    pytest.importorskip("triton", reason="needs triton")
    fixed = {"train__max_steps": 3, "train__global_batch_size": 4, "train__eval_steps": 3}
    configs = {name: small_config(small_data, tmp_path / name, **fixed, **case) for name, case in CASES.items()}
    listed = tmp_path / "configs.json"
    listed.write_text(json.dumps([config.model_dump(mode="json") for config in configs.values()]))
    environment = os.environ | {"PST_KERNELS": "interpret", "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-c", TRAIN, str(listed)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "kernels on cpu: triton (PST_KERNELS=interpret)" in done.stderr
    for name, case in CASES.items():
        train(small_config(small_data, tmp_path / f"{name}-reference", **fixed, **case))
        on, off = (list(read_lines(Path(tmp_path / run) / "metrics.jsonl")) for run in (name, f"{name}-reference"))
        for one, two in zip(on, off, strict=True):
            if "loss" in one:
                assert one["loss"] == pytest.approx(two["loss"], abs=1e-5)
                assert one["grad_norm"] == pytest.approx(two["grad_norm"], rel=1e-4)
            else:
                assert one["validation"]["loss"] == pytest.approx(two["validation"]["loss"], abs=1e-5)
