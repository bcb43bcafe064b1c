"""A LoRA student on two Ray workers follows the losses of one process, and keeps the same adapter."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import zoo
from run_files import losses
from safetensors.torch import load_file
from small_run import small_config

from pst_dist.config.loading import dump_config
from pst_dist.training.trainer import train

pytest.importorskip("ray", reason="needs ray")
pytest.importorskip("peft")
pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.encoder, pytest.mark.timeout(900)]
ROOT = Path(__file__).resolve().parents[2]


def test_a_lora_student_trains_on_ray_as_in_one_process(small_data, tmp_path):
    base = zoo.make("llama3", tmp_path / "base")
    student = {"student__model_name_or_path": base, "student__lora__rank": 3, "layout__max_length": 200}
    train(small_config(small_data, tmp_path / "single", **student))
    cluster = {"train__backend": "ray", "train__ray__num_workers": 2, "train__deepspeed": "zero2"}
    file = tmp_path / "ray.yaml"
    file.write_text(dump_config(small_config(small_data, tmp_path / "ray", **student, **cluster)))
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    done = subprocess.run(
        [sys.executable, "-m", "pst_dist.cli", "train", str(file)],
        env=environment | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert losses(tmp_path / "ray") == pytest.approx(losses(tmp_path / "single"), abs=2e-5)
    one, two = (load_file(tmp_path / run / "best" / "adapter_model.safetensors") for run in ("single", "ray"))
    assert one.keys() == two.keys() and all(torch.allclose(one[key], two[key], atol=5e-4) for key in one)
