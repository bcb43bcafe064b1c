"""Parsers of settings: configs, overrides, experiments, DeepSpeed JSON, hostfiles, and words of `pst submit`."""

from __future__ import annotations

from pathlib import Path

from pst_dist.config.schema import TrainConfig

from .registry import as_arguments, parser, put


@parser(
    "config",
    "arm: pst\noutput_dir: runs/x\ndata:\n  train: rows.jsonl\n  columns: {question: q, answer: a}\ntrain:\n"
    "  learning_rate: 1.0e-3\n  max_steps: 10\nloss: {alignment_weight: 0.5}\narms: [pst, answer_only]\n",
    {"task": "svamp", "seed": 3, "train": {"bf16": True}, "evaluate": {"max_rows": 4}, "data": {"test_size": 0.1}},
    weight=2,
)
def _config(content: bytes, folder: Path) -> object:
    from pst_dist.config.loading import dump_config, load_config

    return dump_config(load_config(str(put(folder, "config.yaml", content))))


@parser(
    "override",
    "train.learning_rate=1e-3",
    "arms=[pst,answer_only]",
    "data.columns={question: q, answer: a}",
    "data.train=[a.jsonl, b.jsonl]",
    "layout.prompt=Q {question}",
    weight=2,
)
def _override(content: bytes, folder: Path) -> object:
    from pst_dist.config.loading import load_config

    return load_config(None, [as_arguments(content)])


@parser(
    "experiment",
    "name: mine\ntasks:\n  letters: {task: last_letter_concatenation, data.train: 'gen:letters'}\n"
    "variants: {a: {arm: answer_only}, b: {arm: pst, loss.centre: false}}\nvary: {train.max_steps: [1, 2]}\n"
    "seeds: [0, 1]\npairs: [[a, b]]\nsettings: {train: {max_steps: 3}}\n",
    {
        "name": "x",
        "tasks": {"t": {"config": "demo"}},
        "variants": {"v": {"arm": "pst"}},
        "overrides": {"train.max_steps": 1},
    },
    weight=0.5,
)
def _experiment(content: bytes, folder: Path) -> object:
    from pst_dist.experiment.spec import load_experiment, runs_of

    wanted = load_experiment(str(put(folder, "experiment.yaml", content)))
    return runs_of(wanted)


_DEEPSPEED = {
    "zero_optimization": {"stage": 2, "overlap_comm": True, "reduce_bucket_size": 5e8, "offload_optimizer": None},
    "comms_logger": {"enabled": False},
    "wall_clock_breakdown": False,
}


@parser(
    "deepspeed", _DEEPSPEED, {"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu", "pin_memory": True}}}
)
def _deepspeed(content: bytes, folder: Path) -> object:
    from pst_dist.config.zero import zero_stage
    from pst_dist.training.engines.deepspeed_config import deepspeed_settings
    from pst_dist.training.memory.training_memory import _bucket_elements

    path = str(put(folder, "ds.json", content))
    stage = zero_stage(path)
    return _bucket_elements(path, 1_000, stage or 0), deepspeed_settings(TrainConfig(deepspeed=path), 2)


@parser("hostfile", "one slots=8\ntwo slots=8\n# three\n10.0.0.1 slots=1\n")
def _hostfile(content: bytes, folder: Path) -> object:
    from pst_dist.distributed.hostfile import read_hostfile

    return read_hostfile(put(folder, "hostfile", content))


@parser("slurm words", "nodes=2 gpus=a100:8 time=04:00:00 arms=[pst] seeds=[0,1] sbatch.comment=x train.bf16=true")
def _slurm_words(content: bytes, folder: Path) -> object:
    from pst_dist.clusters.slurm.render import render
    from pst_dist.clusters.slurm.script import read_words
    from pst_dist.config.loading import load_config

    request, rest = read_words(as_arguments(content).split(" "))
    return render(request, load_config(None, rest), folder / "config.yaml")


@parser("ray words", "address=http://127.0.0.1:8265 verb=train env.A=b cpus=2 gpus=0.5 name=x exclude=[a,b]")
def _ray_words(content: bytes, folder: Path) -> object:
    from pst_dist.clusters.ray.submit import read_words

    return read_words(as_arguments(content).split(" "))
