"""What LoRA saves against training all weights: CPU seconds per step, peak memory, bytes of a checkpoint.

    python benchmarks/lora_cost.py svamp +smollm2 data.root=FOLDER --steps 4 --ranks 1 2

Each case is a training in processes of its own, by `train` as `pst run` calls it, with full fine-tuning and LoRA one
after the other; several ranks use ZeRO-2. `--rates` trains LoRA with several learning rates instead, all weights with
the config's own, and prints the losses.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from pst_dist.config.loading import load_config
from pst_dist.config.schema import Config

LORA = "student.lora.rank=16"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="a ready-made config or a file")
    parser.add_argument("overrides", nargs="*", help="+overlay and key=value")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--kinds", nargs="+", default=["full", "lora"], choices=["full", "lora"])
    parser.add_argument("--rates", nargs="+", help="learning rates of LoRA to compare, in one process")
    parser.add_argument("--folder", type=Path, help="where the runs are kept; default: a temporary folder")
    parser.add_argument("--out", type=Path, help="write the numbers as JSON")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        return child(arguments.config, arguments.overrides, arguments.child)
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        common = [*arguments.overrides, f"train.max_steps={arguments.steps}", "train.logging_steps=1"]
        common += [f"data_dir={folder / 'data'}", "train.report_to=none", "train.num_threads=1"]
        prepare(load_config(arguments.config, [*common, f"output_dir={folder / 'prepared'}"]))
        if arguments.rates:
            cases = [("full", 1, [])] + [("lora", 1, [LORA, f"train.learning_rate={rate}"]) for rate in arguments.rates]
        else:
            cases = [
                (kind, ranks, [LORA] if kind == "lora" else []) for ranks in arguments.ranks for kind in arguments.kinds
            ]
        results = []
        for kind, ranks, words in cases:
            results.append(measure(arguments.config, [*common, *words], kind, ranks, folder / str(len(results))))
            print(json.dumps(results[-1]), flush=True)
    show(results)
    if arguments.out:
        arguments.out.write_text(json.dumps({"command": sys.argv[1:], "results": results}, indent=1) + "\n")


def prepare(config: Config) -> None:
    """Shards, and embeddings for an arm that needs them, which all cases share."""
    from pst_dist.embedding.targets import needs_embeddings
    from pst_dist.pipeline import make_embeddings, make_shards

    make_shards(config)
    if needs_embeddings(config):
        make_embeddings(config)


def measure(config: str, words: list[str], kind: str, ranks: int, run: Path) -> dict[str, Any]:
    """One training and what it cost."""
    words = [*words, f"output_dir={run}", *(["train.deepspeed=zero2"] if ranks > 1 else [])]
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
    command = [sys.executable, "-W", "ignore", *launcher, __file__, config, *words, "--child", str(run)]
    started = time.perf_counter()
    environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": os.environ.get("DS_ACCELERATOR", "cpu")}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"{kind} on {ranks} rank(s) failed:\n{done.stderr[-2000:]}")
    told = [json.loads(path.read_text()) for path in sorted(run.glob("cost-*.json"))]
    newest = max((run / "checkpoints").glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    return {
        "kind": kind,
        "ranks": ranks,
        "learning_rate": load_config(config, words).train.learning_rate,
        # The first step also makes the optimizer's moments.
        "cpu_seconds_a_step": round(sum(statistics.median(one["cpu"][1:] or one["cpu"]) for one in told), 2),
        "peak_MiB_a_rank": round(max(one["peak_MiB"] for one in told)),
        "checkpoint_MB": round(size(newest) / 1e6, 1),
        "best_MB": round(size(run / "best") / 1e6, 1),
        "losses": told[0]["losses"],
        "wall_seconds": round(time.perf_counter() - started, 1),
    }


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def child(config: str, words: list[str], run: Path) -> None:
    """One rank: train, and write what each step cost."""
    from pst_dist.distributed.ranks import Ranks, leave
    from pst_dist.training import loop
    from pst_dist.training.trainer import train

    resolved = load_config(config, words)
    ranks, seconds, losses = Ranks.from_environment(), [], []
    original = loop.take_step

    def timed(*given: Any, **named: Any) -> Any:
        begin = time.process_time()
        taken = original(*given, **named)
        seconds.append(time.process_time() - begin)
        losses.append(round(float(getattr(taken, "loss", float("nan"))), 4))
        return taken

    loop.take_step = timed
    train(resolved)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    (run / f"cost-{ranks.rank}.json").write_text(json.dumps({"cpu": seconds, "peak_MiB": peak, "losses": losses}))
    leave(0)


def show(results: list[dict[str, Any]]) -> None:
    print("\n| | ranks | learning rate | CPU s a step | peak MiB a rank | checkpoint MB | kept student MB | losses |")
    print("|---|---:|---:|---:|---:|---:|---:|---|")
    for one in results:
        losses = " ".join(f"{loss:.3f}" for loss in one["losses"])
        cells = [one["kind"], one["ranks"], f"{one['learning_rate']:g}", one["cpu_seconds_a_step"]]
        cells += [one["peak_MiB_a_rank"], one["checkpoint_MB"], one["best_MB"], losses]
        print(f"| {' | '.join(map(str, cells))} |")


if __name__ == "__main__":
    main()
