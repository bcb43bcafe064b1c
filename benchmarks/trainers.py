"""Training steps of this package, of transformers.Trainer and of TRL's SFTTrainer: CPU time per token and memory.

    python benchmarks/trainers.py gsm8k arm=post_thinking data.root=FOLDER [student.model_name_or_path=...]
                                  [--steps 2] [--rounds 5] [--threads 1] [--no-memory] [--output FILE]

All train the same weights on the same rows, step by step, with the same loss: the mean over the supervised tokens of a
step (loss.denominator=per_token). `drawn` is ours with train.micro_batch_tokens=null. The trainers run as they are,
through `train()`, in float32; TRL's default of recomputing activations is off in `trl` and on in `trl_defaults`.
Given are medians over rounds of CPU milliseconds per token and of the ratio to ours, and each first loss, which says
that all compute the same. Peak memory is measured in a process of its own for each. A trainer that is not installed is
left out by name.
"""

from __future__ import annotations

import argparse
import copy
import gc
import importlib.util
import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measuring import CLOCKS, compared, in_a_process_of_its_own, machine, paired_rounds, resident_megabytes

from pst_dist.arms import ARMS, Segment
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
from pst_dist.training.module import Student, build_student
from pst_dist.training.result import global_batch_size

OURS, DRAWN, TRAINER, TRL, TRL_DEFAULTS = "pst_dist", "drawn", "trainer", "trl", "trl_defaults"
_RATE = 1e-12
"""So small that no weight moves: every contender computes the same steps in every round."""
_LOSS_TOLERANCE = 1e-4
_IGNORED = -100


class Problem:
    """Some steps of a config: the student, its rows as tokens and labels, and our batches of them."""

    def __init__(self, config: Config, steps: int) -> None:
        self.config, self.steps = config, steps
        samples = load_data(config).splits["train"]
        self.tokenizer = build_tokenizer(config.student, samples)
        torch.manual_seed(config.seed)
        self.student = build_student(config, self.tokenizer, None)
        layout = layout_for(config, self.tokenizer, is_encoder_decoder=self.student.is_encoder_decoder)
        collate = Collator(loss=config.loss, pad_id=self.tokenizer.pad_token_id, teacher=None)
        plan = OrderPlan(len(samples), global_batch_size(config.train, 1), config.seed)
        self.rows = []
        for step in range(steps):
            for index in plan.global_batch(step).tolist():
                (sequence,) = layout.sequences(samples[index])
                scored = [one in (Segment.ANSWER, Segment.RATIONALE) for one in sequence.segments]
                labels = [token if on else _IGNORED for token, on in zip(sequence.target_ids, scored, strict=True)]
                ids = [*sequence.prompt_ids, *sequence.target_ids]
                self.rows.append({"input_ids": ids, "labels": [_IGNORED] * len(sequence.prompt_ids) + labels})
        size = config.train.per_device_train_batch_size
        place = {"first_step": 0, "last_step": steps, "rank": 0, "world_size": 1, "micro_batch_size": size}
        self._batches: Callable[[ByLength | None], list[list[PSTBatch]]] = lambda cut: list(
            step_batches(plan, samples, layout, collate, **place, by_length=cut)
        )
        self.tokens = sum(len(row["input_ids"]) for row in self.rows)

    def model(self) -> Any:
        """A copy of the model with the same parameters: a trainer may change methods of its modules."""
        return copy.deepcopy(self.student.model, {id(value): value for value in self.student.model.parameters()})

    def ours(self, *, by_length: bool) -> Callable[[], float]:
        """Our steps; the function returns the mean loss."""
        weights = TermWeights.of(self.config.loss, self.config.arm)
        engine = SingleProcessEngine(Student(self.model(), self.config.loss, None), self.config.train, Ranks())
        batches = self._batches(ByLength.of(self.config, engine.pass_tokens) if by_length else None)

        def run() -> float:
            engine.student.train()
            losses = []
            for passes in batches:
                scales = weights.scales(torch.stack([batch.counts for batch in passes]).sum(0)).float()
                for number, batch in enumerate(passes, 1):
                    loss = engine.forward(batch, scales).loss
                    engine.backward(loss, last=number == len(passes))
                    losses.append(float(loss.detach()))
                engine.step(_RATE)
            return sum(losses) / len(batches)

        return run

    def theirs(self, name: str, folder: Path) -> Callable[[], float]:
        """The steps of a trainer; raises ImportError where it is not installed."""
        from datasets import Dataset

        arguments: dict[str, Any] = {
            "output_dir": str(folder / name),
            "per_device_train_batch_size": global_batch_size(self.config.train, 1),
            "max_steps": self.steps,
            "learning_rate": _RATE,
            "lr_scheduler_type": "constant",
            "max_grad_norm": self.config.train.max_grad_norm,
            "weight_decay": self.config.train.weight_decay,
            "train_sampling_strategy": "sequential",
            "save_strategy": "no",
            "logging_strategy": "no",
            "report_to": "none",
            "use_cpu": True,
            "bf16": False,
            "disable_tqdm": True,
        }
        model, rows = self.model(), Dataset.from_list(self.rows)
        if name == TRAINER:
            from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

            trainer: Any = Trainer(
                model,
                TrainingArguments(**arguments),
                train_dataset=rows,
                data_collator=DataCollatorForSeq2Seq(self.tokenizer),
            )
        else:
            from trl import SFTConfig, SFTTrainer

            more = {} if name == TRL_DEFAULTS else {"gradient_checkpointing": False}
            options = SFTConfig(**arguments, **more, max_length=None)
            trainer = SFTTrainer(model, options, train_dataset=rows, processing_class=self.tokenizer)

        def run() -> float:
            trainer.optimizer = trainer.lr_scheduler = None  # so that no moments stay between rounds
            loss = trainer.train().training_loss
            trainer.optimizer = trainer.lr_scheduler = None
            for value in model.parameters():
                value.grad = None
            return loss

        return run

    def contender(self, name: str, folder: Path) -> Callable[[], float]:
        """Any of them, by name."""
        if name in (OURS, DRAWN):
            return self.ours(by_length=name == OURS)
        return self.theirs(name, folder)


def peak(config: Config, name: str, folder: Path) -> dict[str, float]:
    """Peak resident MiB of a process that takes the steps of one contender."""
    Problem(config, 2).contender(name, folder)()
    return {"peak_MiB": round(resident_megabytes()[1])}


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="a ready-made config or a file")
    parser.add_argument("overrides", nargs="*", help="key=value")
    for name, default in (("steps", 2), ("rounds", 5), ("threads", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--contenders", nargs="+", default=[OURS, DRAWN, TRAINER, TRL, TRL_DEFAULTS])
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    quiet_libraries()
    config = load_config(args.config, [*args.overrides, "loss.denominator=per_token"])
    if ARMS[config.arm].aligned or len(ARMS[config.arm].asked) > 1:
        parser.error(f"arm={config.arm} has a loss or sequences that the others do not: take post_thinking")
    names = []
    for name in args.contenders:
        if name.startswith(TRL) and importlib.util.find_spec("trl") is None:
            print(f"{name}: not run, trl is not installed")
        else:
            names.append(name)
    with tempfile.TemporaryDirectory() as folder:
        memory = {}
        if not args.no_memory:  # forks, so before this process computes anything
            memory = {name: in_a_process_of_its_own(peak, config, name, Path(folder)) for name in names}
        torch.set_num_threads(args.threads)
        problem = Problem(config, args.steps)
        contenders = {name: problem.contender(name, Path(folder)) for name in names}
        table = measured(contenders, problem.tokens, args.rounds)
    print(f"{'':12} CPU ms a token   over {OURS}          loss   peak MiB")
    for name, row in table.items():
        low, high = row["over_ours_min_max"]
        row |= memory.get(name, {})
        print(
            f"{name:12} {row['milliseconds_per_token']:14.3f}   {row['over_ours']:5.2f} ({low:.2f}-{high:.2f})"
            f" {row['loss']:10.5f} {row.get('peak_MiB', row.get('failed', ''))!s:>10}"
        )
    if args.output:
        report = {"settings": vars(args) | {"output": None}, "tokens": problem.tokens, "contenders": table}
        packages = ("transformers", "trl", "accelerate")
        write_json(args.output, report | {"machine": machine(torch.device("cpu"), packages)})


def measured(contenders: dict[str, Callable[[], float]], tokens: int, rounds: int) -> dict[str, dict[str, Any]]:
    """Time and loss of each; exits when a loss is another one."""
    losses = {}
    for name, run in contenders.items():
        losses[name] = run()
        gc.collect()
    for name, loss in losses.items():
        if not math.isclose(loss, losses[OURS], rel_tol=_LOSS_TOLERANCE):
            raise SystemExit(f"{name} has loss {loss:.6f}, {OURS} {losses[OURS]:.6f}")
    table = compared(paired_rounds(contenders, rounds, CLOCKS["cpu"]), OURS)
    for name, row in table.items():
        row |= {"milliseconds_per_token": 1000 * row["seconds_median"] / tokens, "loss": losses[name]}
    return table


if __name__ == "__main__":
    main()
