"""Many cheap rows from their file to the first training step and to the next start: peak memory and time of each stage.

    python benchmarks/scale.py [--rows 200000] [--rationales 1] [--negatives 4096] [--workers N] [--folder DIR]
                               [--output FILE] [--only STAGE ...]

Everything is the real control path but the encoder, which hashes words and takes no time. Each stage runs in a process
of its own, whose peak resident memory, CPU seconds and wall seconds are read when it ends. `all MiB` is the largest sum
over it and the processes that it starts, looked up every fifth of a second; CPU seconds are of all of them. `base` is a
process that only imports what training imports. `again` repeats a stage whose inputs have not changed. `start` makes
one training step of a tiny student, `resume` starts again from its checkpoint and makes one more. `negatives` is the
time that InfoNCE's further rows add to preparing a step. Compare the lines of two versions measured on one machine:
`PYTHONPATH=OTHER/CHECKOUT python benchmarks/scale.py`. Prints a table and writes JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil

STAGES = ("base", "check", "shard", "shard again", "embed", "embed again", "start", "resume", "negatives")
_WIDTH = 64


class HashingEncoder:
    """Stands in for `TextEncoder`: the vector of a text is drawn by its hash."""

    dimension = _WIDTH

    def __init__(self, config: Any, *, device: str | None = None) -> None:
        self.identity = {"encoder": config.encoder, "dimension": _WIDTH, "dtype": "float32", "max_seq_length": 512}

    def encode(self, texts: list[str], *, advance: Any = None) -> np.ndarray:
        """[n, 64] float32, unit length."""
        found = b"".join(hashlib.blake2b(text.encode(), digest_size=_WIDTH).digest() for text in texts)
        vectors = np.frombuffer(found, np.uint8).reshape(-1, _WIDTH).astype(np.float32) - 127.5
        if advance is not None:
            advance(len(texts))
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    def count_truncated(self, texts: list[str]) -> int:
        """None is too long."""
        return 0


def write_rows(path: Path, rows: int, rationales: int) -> None:
    """Sums, each with so many rationales; a hundredth of the questions occurs twice."""
    with path.open("w") as stream:
        for row in range(rows):
            number = row - 50 if row % 100 == 99 else row
            left, right = number * 7919 % 1_000_003, number * 104_729 % 1_000_033
            reasons = [f"Way {way}: {left} and {right} make {left + right}, row {row}." for way in range(rationales)]
            value = {"question": f"Row {number}: {left} plus {right}?", "answer": left + right, "rationales": reasons}
            stream.write(json.dumps(value) + "\n")


def config_of(folder: Path, workers: int | None = None, **changes: Any) -> Any:
    """The run that is measured."""
    from pst_dist.config.schema import Config

    train = {"max_steps": 1, "global_batch_size": 64, "per_device_train_batch_size": 16, "report_to": "none"}
    return Config.model_validate(
        {
            "arm": "pst",
            "output_dir": str(folder / "run"),
            "data": {"train": str(folder / "rows.jsonl"), "answer_type": "number", "validation_size": 200},
            "shards": {"workers": workers},
            "embed": {"encoder": "bench/hashing", "device": "cpu"},
            "student": {"fresh": {"hidden_size": 32, "num_layers": 1, "num_heads": 2, "tokenizer": "bpe"}},
            "train": {**train, "num_threads": 1, "bf16": False, **changes.get("train", {})},
            "loss": changes.get("loss", {}),
        }
    )


def run_stage(name: str, folder: Path, negatives: int, workers: int | None = None) -> dict[str, float]:
    """Run one stage in this process; what it measured itself, beside memory and time."""
    import pst_dist.embedding.embed as embed
    import pst_dist.training.trainer as trainer
    from pst_dist import pipeline
    from pst_dist.diagnostics.rows import check

    embed.TextEncoder = HashingEncoder  # type: ignore[misc,assignment]
    if name == "check":
        assert check(config_of(folder, workers)).lines()[-1] == "ok"
    elif name.startswith("shard"):
        pipeline.make_shards(config_of(folder, workers))
    elif name.startswith("embed"):
        pipeline.make_embeddings(config_of(folder))
    elif name == "start":
        trainer.train(config_of(folder))
    elif name == "resume":
        assert trainer.train(config_of(folder, train={"max_steps": 2, "accept_changes": True})).steps == 2
    elif name == "negatives":
        return {"seconds a step": _negatives(folder, negatives)}
    return {}


def _negatives(folder: Path, count: int) -> float:
    """Median seconds that a step's preparation takes longer with `count` further rows."""
    from pst_dist.config.run_dir import run_dir
    from pst_dist.data.shards import ShardSet
    from pst_dist.embedding.targets import open_teacher
    from pst_dist.student.layout import layout_for
    from pst_dist.student.tokenizer import build_tokenizer
    from pst_dist.training.batching.batches import Collator
    from pst_dist.training.batching.order import OrderPlan
    from pst_dist.training.batching.step_batches import step_batches

    spent: dict[int, list[float]] = {0: [], count: []}
    config = config_of(folder, loss={"alignment": "info_nce"})
    shards = ShardSet.open(run_dir(config).shards)
    samples, teacher = shards.split("train"), open_teacher(config, run_dir(config), shards)
    tokenizer = build_tokenizer(config.student, samples[:1000])
    layout = layout_for(config, tokenizer, is_encoder_decoder=False)
    plan = OrderPlan(len(samples), 64, 0)
    for further in spent:
        loss = config_of(folder, loss={"alignment": "info_nce", "negatives": further}).loss
        collate = Collator(loss=loss, pad_id=0, teacher=teacher)
        cut: dict[str, Any] = {"rank": 0, "world_size": 1, "micro_batch_size": 16}
        steps = step_batches(plan, samples, layout, collate, first_step=0, last_step=8, **cut)
        for _ in range(8):
            begun = time.perf_counter()
            next(steps)
            spent[further].append(time.perf_counter() - begun)
    return statistics.median(spent[count][2:]) - statistics.median(spent[0][2:])


def measure(name: str, folder: Path, negatives: int, workers: int | None) -> dict[str, Any]:
    """One stage in a process of its own."""
    command = [sys.executable, __file__, "--stage", name, "--folder", str(folder), "--negatives", str(negatives)]
    command += ["--workers", str(workers)] if workers else []
    begun, most = time.perf_counter(), 0
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as stage:
        while stage.poll() is None:
            most = max(most, _resident(stage.pid))
            time.sleep(0.2)
        assert stage.stdout is not None
        text = stage.stdout.read()
    assert stage.returncode == 0, name
    wall = time.perf_counter() - begun
    return {"stage": name, "wall": wall, "all_mib": most / 2**20, **json.loads(text.splitlines()[-1])}


def _resident(process: int) -> int:
    """Bytes of memory of a process and of all that it started; pages that they share are counted for each."""
    total = 0
    with contextlib.suppress(psutil.Error):
        parent = psutil.Process(process)
        for one in (parent, *parent.children(recursive=True)):
            with contextlib.suppress(psutil.Error):
                total += one.memory_info().rss
    return total


def main() -> None:
    """Measure all stages in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--rationales", type=int, default=1)
    parser.add_argument("--negatives", type=int, default=4096)
    parser.add_argument("--workers", type=int)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--only", nargs="+", choices=STAGES, default=STAGES)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--stage", choices=STAGES, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.stage:
        found: dict[str, float] = run_stage(given.stage, given.folder, given.negatives, given.workers)
        used, others = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu = sum(one.ru_utime + one.ru_stime for one in (used, others))
        print(json.dumps({"cpu": cpu, "peak_mib": used.ru_maxrss / 1024, **found}))
        return
    with tempfile.TemporaryDirectory(prefix="pst-scale-") as temporary:
        folder = given.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "rows.jsonl").is_file():
            write_rows(folder / "rows.jsonl", given.rows, given.rationales)
        print(f"{given.rows:,} rows with {given.rationales} rationales each")
        print("| stage | peak MiB | all MiB | CPU s | wall s | seconds a step |\n|---|---:|---:|---:|---:|---:|")
        lines = []
        for name in given.only:
            line = measure(name, folder, given.negatives, given.workers)
            lines.append(line)
            step = f"{line['seconds a step']:.3f}" if "seconds a step" in line else ""
            memory = f"{line['peak_mib']:,.0f} | {line['all_mib']:,.0f}"
            print(f"| {name} | {memory} | {line['cpu']:.1f} | {line['wall']:.1f} | {step} |", flush=True)
    if given.output:
        given.output.write_text(json.dumps({"rows": given.rows, "stages": lines}, indent=2) + "\n")


if __name__ == "__main__":
    main()
