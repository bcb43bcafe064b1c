"""What the first steps of a pretrained student cost with each start of its added tokens and with each prompt, paired.

    python benchmarks/new_tokens.py svamp +smollm2 data.root=FOLDER arm=answer_only --steps 0 10 50 200
    python benchmarks/new_tokens.py svamp +smollm2 data.root=FOLDER arm=answer_only --prompts auto '{question} ###'

Every combination trains the same rows in the same order from the same weights, at a constant learning rate. The loss is
the mean negative log likelihood of an answer's token on the validation rows, its stop included.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

import torch

from pst_dist.arms import ARMS
from pst_dist.config.loading import load_config
from pst_dist.config.schema import Config
from pst_dist.data.sample import ReasoningSample
from pst_dist.data.sources import load_data
from pst_dist.distributed.ranks import Ranks
from pst_dist.logs import quiet_libraries
from pst_dist.student.layout import layout_for
from pst_dist.student.new_tokens import token_start
from pst_dist.student.tokenizer import build_tokenizer
from pst_dist.training.batching.batches import Collator
from pst_dist.training.batching.order import OrderPlan
from pst_dist.training.engines.single_engine import SingleProcessEngine
from pst_dist.training.loss import TermWeights
from pst_dist.training.module import build_student


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="a ready-made config or a file")
    parser.add_argument("overrides", nargs="*", help="key=value")
    parser.add_argument("--starts", nargs="+", default=["mean", "auto"], help="values of student.new_token_init")
    parser.add_argument("--prompts", nargs="+", help="values of layout.prompt; default: the config's")
    parser.add_argument("--rates", nargs="+", type=float, help="values of train.learning_rate; default: the config's")
    parser.add_argument("--steps", nargs="+", type=int, default=[0, 10, 50, 200], help="when to measure")
    parser.add_argument("--validation-rows", type=int, default=24)
    parser.add_argument("--out", type=Path, help="write the numbers as JSON")
    arguments = parser.parse_args()
    quiet_libraries()
    base = load_config(arguments.config, arguments.overrides)
    if ARMS[base.arm].aligned:
        parser.error(f"arm={base.arm} needs embeddings: take answer_only, post_thinking or pre_thinking")
    if base.train.num_threads:
        torch.set_num_threads(base.train.num_threads)
    splits = load_data(base).splits
    train, validation = list(splits["train"]), list(splits["validation"])[: arguments.validation_rows]
    combinations = itertools.product(
        arguments.rates or [base.train.learning_rate], arguments.starts, arguments.prompts or [base.layout.prompt]
    )
    steps = sorted(set(arguments.steps))
    results: list[dict[str, Any]] = []
    print(f"| rate | start | prompt | {' | '.join(f'step {step}' for step in steps)} | CPU s a step |")
    print("|---|---|---|" + "---:|" * (len(steps) + 1), flush=True)
    for rate, start, prompt in combinations:
        changed = {
            "student": base.student.model_copy(update={"new_token_init": start}),
            "layout": base.layout.model_copy(update={"prompt": prompt}),
            "train": base.train.model_copy(update={"learning_rate": rate}),
        }
        result = measure(base.model_copy(update=changed), train, validation, steps)
        cells = " | ".join(f"{loss:.2f}" for loss in result["losses"].values())
        print(f"| {rate:g} | {result['start']} | `{prompt!r}` | {cells} | {result['seconds']:.1f} |", flush=True)
        results.append({"rate": rate, "start": start, "prompt": prompt, **result})
        if arguments.out:
            machine = {"threads": torch.get_num_threads(), "load": os.getloadavg(), "processor": platform.processor()}
            record = {"results": results, "torch": torch.__version__, "config": base.model_dump(mode="json"), **machine}
            arguments.out.write_text(json.dumps(record, indent=1))


def measure(
    config: Config, train: list[ReasoningSample], validation: list[ReasoningSample], steps: list[int]
) -> dict[str, Any]:
    """Validation losses by step, the start that `auto` stands for, and CPU seconds of one step."""
    tokenizer = build_tokenizer(config.student, train)
    torch.manual_seed(config.seed)
    student = build_student(config, tokenizer, None)
    layout = layout_for(config, tokenizer, is_encoder_decoder=student.is_encoder_decoder)
    collate = Collator(
        loss=config.loss, pad_id=tokenizer.pad_token_id, decoder_start_id=student.decoder_start_id, teacher=None
    )
    engine = SingleProcessEngine(student, config.train, Ranks.from_environment())
    weights = TermWeights.of(config.loss, config.arm)

    def batches(samples: list[ReasoningSample]) -> list[Any]:
        size = config.train.per_device_train_batch_size
        cut = [samples[first : first + size] for first in range(0, len(samples), size)]
        return [collate([row for sample in part for row in layout.sequences(sample)]) for part in cut]

    def validate() -> float:
        student.eval()
        sums = tokens = 0.0
        with torch.no_grad():
            for batch in batches(validation):
                output = engine.forward(batch.to(engine.device), weights.scales(batch.counts).float().to(engine.device))
                sums, tokens = sums + float(output.sums[0]), tokens + float(batch.counts[0])
        return sums / tokens

    order = OrderPlan(
        len(train), config.train.global_batch_size or config.train.per_device_train_batch_size, config.seed
    )
    losses, seconds = {}, 0.0
    for step in range(max(steps) + 1):
        if step in steps:
            losses[step] = validate()
            print(f"step {step}: {losses[step]:.3f}", file=sys.stderr, flush=True)
        if step < max(steps):
            started = time.process_time()
            student.train()
            parts = batches([train[index] for index in order.global_batch(step)])
            scales = weights.scales(torch.stack([part.counts for part in parts]).sum(0)).float()
            for index, part in enumerate(parts):
                output = engine.forward(part.to(engine.device), scales.to(engine.device))
                engine.backward(output.loss, last=index == len(parts) - 1)
            engine.step(config.train.learning_rate)
            seconds += time.process_time() - started
    return {"losses": losses, "start": token_start(config, tokenizer), "seconds": seconds / max(1, max(steps))}


if __name__ == "__main__":
    main()
