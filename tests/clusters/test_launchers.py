"""Commands that a person types: the deepspeed launcher over the whole pipeline, torchrun, and what a wheel carries."""

import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
from small_run import small_config

from pst_dist.config.loading import dump_config
from pst_dist.config.locate import overlays, ready_made_configs
from pst_dist.storage.manifest import read_json, read_lines

ROOT = Path(__file__).resolve().parents[2]


SCRIPT = ROOT / "launchers" / "deepspeed.sh"
STOCK = {
    "fp16": {"enabled": "auto", "loss_scale": 0, "initial_scale_power": 16},
    "bf16": {"enabled": "auto"},
    "optimizer": {"type": "AdamW", "params": dict.fromkeys(("lr", "betas", "eps", "weight_decay"), "auto")},
    "scheduler": {"type": "WarmupLR", "params": dict.fromkeys(("warmup_min_lr", "warmup_num_steps"), "auto")},
    "zero_optimization": {"stage": 2, "overlap_comm": True, "reduce_bucket_size": "auto"},
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "steps_per_print": 2000,
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "wall_clock_breakdown": False,
}
"""What transformers' documentation gives its users."""


def on_two_ranks():
    return os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "NUM_GPUS": "2",
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "PYTHONWARNINGS": "ignore",
    }


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.encoder
def test_the_deepspeed_script_goes_from_rows_to_a_report_on_two_ranks(tmp_path):
    (tmp_path / "stock.json").write_text(json.dumps(STOCK))
    config = small_config(tmp_path / "data", tmp_path / "run", train__deepspeed=str(tmp_path / "stock.json"))
    path = tmp_path / "run.yaml"
    path.write_text(dump_config(config))
    done = subprocess.run(
        ["bash", str(SCRIPT), str(path)],
        env=on_two_ranks(),
        capture_output=True,
        text=True,
        timeout=500,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "on 2 rank(s), engine zero2" in done.stderr
    assert (tmp_path / "run" / "report.html").is_file()
    assert read_json(tmp_path / "run" / "eval" / "test" / "results.json")["rows"] == 12
    assert [row["step"] for row in read_lines(tmp_path / "run" / "metrics.jsonl") if "loss" in row] == list(range(1, 9))


@pytest.mark.distributed
@pytest.mark.encoder
def test_a_signal_to_the_deepspeed_script_reaches_the_ranks_which_save(small_data, tmp_path):
    endless = {"train__max_steps": 100_000, "train__eval_steps": 50_000, "train__deepspeed": "zero1"}
    path = tmp_path / "run.yaml"
    path.write_text(dump_config(small_config(small_data, tmp_path / "run", **endless)))
    started = subprocess.Popen(["bash", str(SCRIPT), str(path)], env=on_two_ranks(), stderr=subprocess.PIPE, text=True)
    metrics, until = tmp_path / "run" / "metrics.jsonl", time.monotonic() + 300
    try:
        while not metrics.is_file() or len(metrics.read_text().splitlines()) < 3:
            assert started.poll() is None and time.monotonic() < until
            time.sleep(0.2)
        started.send_signal(signal.SIGTERM)
        said = started.communicate(timeout=200)[1]
    finally:
        started.kill()
    assert started.returncode == 75, said[-3000:]
    steps = [row["step"] for row in read_lines(metrics) if "loss" in row]
    assert (tmp_path / "run" / "checkpoints" / f"checkpoint-{steps[-1]}" / "run_state.json").is_file()
    assert not (tmp_path / "run" / "report.html").exists(), "the stage after the training did not start"


@pytest.mark.encoder
def test_one_process_can_train_with_deepspeed_too(small_data, tmp_path):
    from pst_dist.training.trainer import train

    train(small_config(small_data, tmp_path / "plain"))
    train(small_config(small_data, tmp_path / "zero", train__deepspeed="zero1"))
    # A second process group in this process, which DeepSpeed must not take for the first.
    assert train(small_config(small_data, tmp_path / "again", train__deepspeed="zero2")).steps == 8
    losses = [
        [row["loss"] for row in read_lines(tmp_path / name / "metrics.jsonl") if "loss" in row]
        for name in ("plain", "zero")
    ]
    assert losses[1] == pytest.approx(losses[0], abs=1e-4) and len(losses[0]) == 8


@pytest.mark.distributed
@pytest.mark.encoder
def test_several_arms_train_one_after_the_other_with_deepspeed(small_data, tmp_path):
    """Ranks that made a second process group in torchrun's store were seen to hang there."""
    config = small_config(small_data, tmp_path / "run", arms="[pst,answer_only]", train__deepspeed="zero2")
    path = tmp_path / "run.yaml"
    path.write_text(dump_config(config))
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pst_dist.torchrun", "--standalone", "--nproc-per-node=2"),
            *("-m", "pst_dist.train", str(path)),
        ],
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for arm in ("pst", "answer_only"):
        assert read_json(tmp_path / "run" / arm / "train.json")["steps"] == 8


def test_a_wheel_carries_the_configs_the_deepspeed_profiles_and_the_cluster_scripts(tmp_path):
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", str(tmp_path), str(ROOT)]
    subprocess.run(command, check=True, timeout=300)
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    wanted = {f"pst_dist/config/presets/{name}.yaml" for name in ready_made_configs()}
    wanted |= {f"pst_dist/config/presets/overlays/{name}.yaml" for name in overlays()}
    wanted |= {f"pst_dist/ds_configs/{path.name}" for path in (ROOT / "ds_configs").glob("*.json")}
    wanted |= {f"pst_dist/cluster/{path.name}" for path in (ROOT / "cluster").iterdir()}
    assert wanted <= names
    assert not any(name.startswith(("tests/", "shared/")) for name in names)


@pytest.mark.distributed
@pytest.mark.parametrize(
    "script, code, said",
    [
        ("sys.exit(75)", 75, None),
        ("sys.exit(2)", 2, None),
        ("sys.exit(0)", 0, None),
        ("os.kill(os.getpid(), 9)", 137, "was ended by SIGKILL, which is mostly the kernel when memory runs out"),
        ("raise RuntimeError('broken')", 1, "ended with exit code 1; see its lines above"),
    ],
)
def test_torchrun_ends_with_the_exit_code_of_its_ranks_and_names_the_one_that_said_nothing(script, code, said):
    torchrun = [sys.executable, "-m", "pst_dist.torchrun", "--standalone", "--nproc-per-node=1", "--no-python"]
    done = subprocess.run(
        [*torchrun, sys.executable, "-c", f"import os, sys; {script}"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == code, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("pst: ")]
    assert len(lines) == (said is not None), done.stderr
    assert all(line.startswith("pst: rank 0 (process ") and said in line for line in lines)
