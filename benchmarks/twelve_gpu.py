"""As much of the twelve tasks with a pretrained student as fits into a few minutes on one GPU.

    python benchmarks/twelve_gpu.py prepare --data-root FOLDER --work WORK   # on any machine: rows and embeddings
    python benchmarks/twelve_gpu.py run --work WORK --out OUT                # on the GPU machine, as often as needed
    pst experiment WORK/twelve_gpu.yaml --with OUT --collect --page docs/results/twelve

`prepare` makes what a GPU is not needed for, so that WORK (under 64 MiB) can be copied to a machine without a network.
`run` trains several runs side by side on the GPU, stops in time, and leaves the outcomes of all finished runs in OUT;
with `--with OUT` the next call skips those. Tasks whose probe says that the targets know more of the answer than the
question does come first, and seed by seed, so that a call which is cut short has whole comparisons.
"""

from __future__ import annotations

import argparse
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import yaml

from pst_dist.config.loading import load_config
from pst_dist.experiment.runs import make_data
from pst_dist.experiment.spec import load_experiment, runs_of
from pst_dist.storage.manifest import bytes_below

ORDER = (
    # What `pst probe` predicts for the MiniLM targets (docs/semantic_term.md): yes, unclear, no.
    *("last_letter_concatenation", "coin_flip", "tracking_shuffled_objects", "date_understanding"),
    *("svamp", "multiarith", "single_eq", "addsub", "gsm8k"),
    *("strategy_qa", "commonsense_qa", "aqua"),
)
VARIANTS = {
    "answer_only": {"arm": "answer_only"},
    "pre_thinking": {"arm": "pre_thinking"},
    "post_thinking": {"arm": "post_thinking"},
    "prefix": {"arm": "prefix"},
    "pst": {"arm": "pst"},
    "shuffled": {"arm": "pst", "loss.control": "shuffle_embeddings"},
    "no alignment": {"arm": "pst", "loss.alignment_weight": 0},
}
SETTINGS = {
    "student.model_name_or_path": "smollm2",
    "layout.prompt": "auto",
    "train.learning_rate": 1.0e-4,
    "train.lr_scheduler_type": "linear",
    "train.warmup_ratio": 0.1,
    "train.global_batch_size": 8,
    "train.per_device_train_batch_size": 8,
    "train.max_steps": 300,
    "train.eval_steps": 150,
    "train.report_to": "none",
    "data.max_rows": 1000,
    "evaluate.max_rows": 300,
    "evaluate.max_new_tokens": 160,
    "evaluate.batch_size": 150,
    "evaluate.explain_rows": 0,
    "evaluate.latency_rows": 0,
}
MARGIN_SECONDS = 45
"""How long before the end of the budget the runs are told to save."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("prepare", "run"))
    parser.add_argument("--work", type=Path, required=True, help="the experiment's folder")
    parser.add_argument("--data-root", help="prepare: the folder with the public files")
    parser.add_argument("--out", type=Path, help="run: where the page and outcomes.jsonl go")
    parser.add_argument("--with", dest="beside", type=Path, action="append", default=[], help="earlier outcomes")
    parser.add_argument("--budget-seconds", type=float, default=540.0)
    parser.add_argument("--jobs", type=int, default=8, help="runs side by side")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tasks", nargs="+", choices=ORDER, default=list(ORDER))
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="keys of every run, for a rehearsal")
    arguments = parser.parse_intermixed_args()
    if arguments.action == "prepare":
        prepare(arguments)
    else:
        sys.exit(run(arguments))


def prepare(arguments: argparse.Namespace) -> None:
    """Write the experiment and make its shards and embeddings, once for all variants and seeds."""
    if arguments.data_root is None:
        raise SystemExit("prepare needs --data-root")
    rows = arguments.work / "rows"
    for task in arguments.tasks:
        data = load_config(task, []).data
        for name in (data.train, data.validation, data.test, data.split_file, data.teacher_completions):
            if name is not None:
                (rows / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(Path(arguments.data_root) / name, rows / name)
    experiment = {
        "name": "twelve_gpu",
        "question": "The twelve tasks with a pretrained student (SmolLM2-135M-Instruct) on identical rows.",
        "output_dir": str(arguments.work),
        "settings": {**SETTINGS, "data.root": str(rows)},
        "tasks": {task: {"config": task} for task in arguments.tasks},
        "variants": {name: VARIANTS[name] for name in arguments.variants},
        "seeds": list(range(arguments.seeds)),
        "keep": "results",
        "baselines": [name for name in ("answer_only", "shuffled") if name in arguments.variants],
    }
    file = arguments.work / "twelve_gpu.yaml"
    file.write_text(yaml.safe_dump(experiment, sort_keys=False))
    make_data(runs_of(load_experiment(str(file), arguments.overrides)))
    print(f"{arguments.work}: {bytes_below(arguments.work) / 2**20:.1f} MiB to copy")


def run(arguments: argparse.Namespace) -> int:
    """Run until done or until the budget is nearly spent; 0 when all runs are finished, 75 when some are left."""
    if arguments.out is None:
        raise SystemExit("run needs --out")
    ends = time.monotonic() + arguments.budget_seconds - MARGIN_SECONDS
    beside = [*arguments.beside, *([arguments.out] if (arguments.out / "outcomes.jsonl").is_file() else [])]
    words = [str(arguments.work / "twelve_gpu.yaml"), f"output_dir={arguments.work}", f"jobs={arguments.jobs}"]
    words += arguments.overrides
    words += [word for folder in beside for word in ("--with", str(folder))]
    process = subprocess.Popen([sys.executable, "-m", "pst_dist", "experiment", *words])
    try:
        code = process.wait(timeout=max(1.0, ends - time.monotonic()))
    except subprocess.TimeoutExpired:
        print(f"the budget of {arguments.budget_seconds:.0f} s is nearly spent: saving", flush=True)
        process.send_signal(signal.SIGTERM)
        try:
            code = process.wait(timeout=MARGIN_SECONDS - 10)
        except subprocess.TimeoutExpired:
            process.kill()
            code = 75
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name in ("README.md", "accuracy.png", "cost.png", "results.csv", "results.json", "outcomes.jsonl"):
        if (arguments.work / name).is_file():
            shutil.copyfile(arguments.work / name, arguments.out / name)
    return code


if __name__ == "__main__":
    main()
