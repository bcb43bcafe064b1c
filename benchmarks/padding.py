"""What padding costs a training step, with the rows of a step as they are drawn and cut by length.

    python benchmarks/padding.py gsm8k arm=post_thinking data.root=FOLDER [--steps 4] [--rounds 5] [--threads 1]
                                 [--pass-tokens 0 64] [--limits 1024] [--padding-free 1024] [--output FILE]

Every contender takes the same optimizer steps over the same rows of the config, with the batches that training makes.
`drawn` is train.micro_batch_tokens=null; `pass P` adds passes as long as each saves more than P tokens of padding, and
64 is what `auto` does on a CPU; `limit L` is train.micro_batch_tokens=L where no further pass is added, as on a GPU;
`free L` is the same with train.padding_free=true.
Given are medians over rounds of CPU milliseconds per token and of the ratio to `drawn`, the share of padding, passes
per step, and the first loss, which says that all compute the same.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import torch
from measuring import CLOCKS, compared, machine, paired_rounds

from pst_dist.arms import ARMS
from pst_dist.config.loading import load_config
from pst_dist.config.schema import Config
from pst_dist.data.sources import load_data
from pst_dist.distributed.ranks import Ranks
from pst_dist.logs import quiet_libraries
from pst_dist.storage.manifest import write_json
from pst_dist.student.layout import layout_for
from pst_dist.student.tokenizer import build_tokenizer
from pst_dist.training.batching.batches import Collator, PSTBatch
from pst_dist.training.batching.order import OrderPlan
from pst_dist.training.batching.passes import ByLength
from pst_dist.training.batching.step_batches import step_batches
from pst_dist.training.engines.single_engine import SingleProcessEngine
from pst_dist.training.loss import TermWeights
from pst_dist.training.module import build_student
from pst_dist.training.result import global_batch_size

_DRAWN = "drawn"
_LOSS_TOLERANCE = 1e-4


class Steps:
    """The first steps of a config's training, with its batches cut in one way or another."""

    def __init__(self, config: Config, steps: int) -> None:
        self.config, self.steps = config, steps
        samples = load_data(config).splits["train"]
        tokenizer = build_tokenizer(config.student, samples)
        torch.manual_seed(config.seed)
        student = build_student(config, tokenizer, None)
        layout = layout_for(config, tokenizer, is_encoder_decoder=student.is_encoder_decoder)
        collate = Collator(
            loss=config.loss, pad_id=tokenizer.pad_token_id, decoder_start_id=student.decoder_start_id, teacher=None
        )
        self.weights = TermWeights.of(config.loss, config.arm)
        self.engine = SingleProcessEngine(student, config.train, Ranks())
        plan = OrderPlan(len(samples), global_batch_size(config.train, 1), config.seed)
        self._source = (plan, samples, layout, collate)

    def batches(self, cut: ByLength | None) -> list[list[PSTBatch]]:
        """Of each step its forward passes."""
        self._source[-1].padding_free = cut is not None and cut.padding_free
        size = self.config.train.per_device_train_batch_size
        place = {"first_step": 0, "last_step": self.steps, "rank": 0, "world_size": 1}
        return list(step_batches(*self._source, **place, micro_batch_size=size, by_length=cut))

    def loss(self, passes: list[PSTBatch], *, moves: bool) -> float:
        """One step's loss; `moves` the weights or leaves them."""
        scales = self.weights.scales(torch.stack([batch.counts for batch in passes]).sum(0)).float()
        total = 0.0
        for number, batch in enumerate(passes, 1):
            loss = self.engine.forward(batch, scales).loss
            self.engine.backward(loss, last=number == len(passes))
            total += float(loss.detach())
        if moves:
            self.engine.step(1e-6)
        else:
            self.engine.discard()
        return total


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="a ready-made config or a file")
    parser.add_argument("overrides", nargs="*", help="key=value")
    for name, default in (("steps", 4), ("rounds", 5), ("threads", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--pass-tokens", nargs="*", type=int, default=[64])
    parser.add_argument("--limits", nargs="*", type=int, default=[])
    parser.add_argument("--padding-free", nargs="*", type=int, default=[])
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    quiet_libraries()
    torch.set_num_threads(args.threads)
    config = load_config(args.config, args.overrides)
    if ARMS[config.arm].aligned:
        parser.error(f"arm={config.arm} needs embeddings: take answer_only, post_thinking, pre_thinking or prefix")
    cuts: dict[str, ByLength | None] = {_DRAWN: None}
    cuts |= {f"pass {price}": ByLength(None, price) for price in args.pass_tokens}
    cuts |= {f"limit {most}": ByLength(most, None) for most in args.limits}
    cuts |= {f"free {most}": ByLength(most, None, padding_free=True) for most in args.padding_free}
    report = measured(Steps(config, args.steps), cuts, args.rounds)
    print(f"{'':12} CPU ms a token   over {_DRAWN}            padding   passes a step   first loss")
    for name, row in report.items():
        low, high = row["over_drawn_min_max"]
        print(
            f"{name:12} {row['milliseconds_per_token']:14.3f}   {row['over_drawn']:5.2f} ({low:.2f}-{high:.2f})"
            f" {100 * row['padding']:11.1f} % {row['passes']:13.1f} {row['first_loss']:14.5f}"
        )
    if args.output:
        settings = vars(args) | {"output": None}
        write_json(args.output, {"settings": settings, "cuts": report, "machine": machine(torch.device("cpu"))})


def measured(steps: Steps, cuts: dict[str, ByLength | None], rounds: int) -> dict[str, dict[str, Any]]:
    """Of each cut its time, padding and loss."""
    made = {name: steps.batches(cut) for name, cut in cuts.items()}
    losses = {name: steps.loss(batches[0], moves=False) for name, batches in made.items()}
    for name, loss in losses.items():
        if not math.isclose(loss, losses[_DRAWN], rel_tol=_LOSS_TOLERANCE):
            raise SystemExit(f"{name}: first loss {loss:.6f}, {losses[_DRAWN]:.6f} with rows as drawn")
    contenders = {
        name: lambda batches=batches: [steps.loss(passes, moves=True) for passes in batches]
        for name, batches in made.items()
    }
    table = compared(paired_rounds(contenders, rounds, CLOCKS["cpu"]), _DRAWN, "over_drawn")
    for name, batches in made.items():
        every = [batch for passes in batches for batch in passes]
        positions = torch.stack([batch.positions for batch in every]).sum(0)
        table[name] |= {
            "milliseconds_per_token": 1000 * table[name]["seconds_median"] / sum(batch.tokens for batch in every),
            "padding": float(positions[1] / positions[0]),
            "passes": len(every) / len(batches),
            "first_loss": losses[name],
        }
    return table


if __name__ == "__main__":
    main()
