"""Calibrates a plan on this machine: some real passes and updates of the student, and some texts of the encoder.

The student, its rows, the cut into passes and the optimizer are those of the training; the teacher's vectors are
placeholders, which cost the same. Nothing is written. DeepSpeed and other ranks are left out, so communication is not
counted.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pst_dist.arms import ARMS
from pst_dist.config.run_dir import run_dir
from pst_dist.config.schema import Config
from pst_dist.data.sample import ReasoningSample
from pst_dist.diagnostics.cost import Machines, teacher_width
from pst_dist.errors import InputError
from pst_dist.logs import duration

if TYPE_CHECKING:
    import numpy as np

log = logging.getLogger(__name__)
SECONDS = 15.0
"""How long passes are measured, at most (the pass in progress is finished)."""
_STEPS = 10
_UPDATES = 2
_TEXTS = 128


@dataclass(frozen=True)
class Measured:
    """What was measured on this machine, by one process."""

    device: str
    passes: int
    pass_tokens_per_second: float
    """Tokens without padding per second of forward and backward passes."""
    update_seconds: float
    """Of one optimizer step."""
    validation_tokens_per_second: float
    tokens_per_row: float
    """Mean tokens of a row's sequences, without padding."""
    rows_per_rank: float
    """Rows of a step on one rank."""
    validation_rows: int
    texts_per_second: float | None
    """Of the encoder of rationales; None where the run needs none."""
    peak_bytes: int | None
    """Most memory that torch had in use on a GPU; None on a CPU."""

    @property
    def tokens_per_second(self) -> float:
        """Of whole steps, updates included."""
        tokens = self.tokens_per_row * self.rows_per_rank
        return tokens / (tokens / self.pass_tokens_per_second + self.update_seconds)

    def applied(self, machines: Machines) -> Machines:
        """The machines with these speeds; what was given by hand stays."""
        return machines.model_copy(
            update={
                "tokens_per_second": machines.tokens_per_second or self.tokens_per_second,
                "texts_per_second": machines.texts_per_second or self.texts_per_second,
            }
        )

    def lines(self, config: Config, steps: int, ranks: int) -> list[str]:
        """What was measured, in words; the time of all validations with it."""
        parts = [
            f"{self.pass_tokens_per_second:,.0f} tok/s in passes",
            f"{self.update_seconds:.3g} s an update",
            f"{self.tokens_per_row:.0f} tokens a row",
        ]
        if self.texts_per_second is not None:
            parts.append(f"{self.texts_per_second:,.0f} texts/s")
        if self.peak_bytes is not None:
            parts.append(f"{self.peak_bytes / 2**30:.2f} GiB at most")
        lines = [f"measured     {self.device}, {self.passes} pass(es): {', '.join(parts)}"]
        if self.validation_rows:
            every = config.train.eval_steps or max(1, round(steps / config.train.num_train_epochs))
            times = max(1, steps // every)
            tokens = times * self.validation_rows * self.tokens_per_row
            seconds = tokens / (self.validation_tokens_per_second * ranks)
            lines.append(f"validation   {times} times {self.validation_rows:,} rows: {duration(seconds)} in all")
        return lines


class _AnyVectors:
    """Unit vectors of the teacher's width in place of embeddings that do not exist yet."""

    def __init__(self, width: int) -> None:
        import numpy as np

        self.dimension = width
        self._vector: np.ndarray = np.full(width, width**-0.5, dtype="float32")

    def vector(self, sample_id: str, rationale: int) -> np.ndarray:
        """The same vector for every row."""
        return self._vector


def rows_of(config: Config) -> tuple[Sequence[ReasoningSample], int]:
    """The training rows and the number of validation rows, from the shards, or from the sources if none are packed."""
    from pst_dist.data.shards import ShardSet

    run = run_dir(config)
    if (run.shards / "manifest.json").is_file():
        shards = ShardSet.open(run.shards, verify=False)
        return shards.split("train"), len(shards.split("validation"))
    from pst_dist.data.sources import load_data

    splits = load_data(config).splits
    return splits.get("train", []), len(splits.get("validation", []))


def measure(config: Config, machines: Machines, *, seconds: float | None = None) -> Measured:
    """Measure the student of a config on this machine for about `seconds` (SECONDS); raises what building it raises.

    Raises EnvironmentFault when memory runs out.
    """
    seconds = SECONDS if seconds is None else seconds
    from pst_dist.logs import quiet_libraries

    quiet_libraries()
    samples, validation_rows = rows_of(config)
    if not len(samples):
        raise InputError("there are no training rows to measure with", "set data.train")
    log.info("measuring passes of the student for about %.0f s", seconds)
    from pst_dist.training.memory.pass_size import memory_errors

    with memory_errors(config):
        return _Measurement(config, machines, samples, validation_rows).run(seconds)


class _Measurement:
    """The objects of a training on rank zero, without its files."""

    def __init__(
        self, config: Config, machines: Machines, samples: Sequence[ReasoningSample], validation_rows: int
    ) -> None:
        import torch

        from pst_dist.distributed.ranks import Ranks
        from pst_dist.student.layout import layout_for
        from pst_dist.student.tokenizer import build_tokenizer
        from pst_dist.training.batching.batches import Collator
        from pst_dist.training.begun import settled
        from pst_dist.training.engines.engine_choice import build_engine
        from pst_dist.training.loss import TermWeights
        from pst_dist.training.module import build_student
        from pst_dist.training.precision import check_fp16, suits_bf16, with_precision

        train = config.train.model_copy(update={"deepspeed": None})
        config = config.model_copy(update={"train": train})
        config = settled(config, None, lambda: build_tokenizer(config.student, samples))
        config = with_precision(config, run_dir(config), lambda: suits_bf16(config, samples))
        if config.train.num_threads:
            torch.set_num_threads(config.train.num_threads)
        self.config, self.machines, self.samples = config, machines, samples
        self.validation_rows = validation_rows
        tokenizer = build_tokenizer(config.student, samples)
        torch.manual_seed(config.seed)
        aligned = ARMS[config.arm].aligned and config.loss.alignment_weight > 0
        teacher: Any = _AnyVectors(teacher_width(config)) if aligned else None
        student = build_student(config, tokenizer, teacher.dimension if teacher else None)
        self.engine = build_engine(student, config.train, Ranks())
        check_fp16(config.train, self.engine.device)
        self.layout = layout_for(config, tokenizer, is_encoder_decoder=student.is_encoder_decoder)
        self.collate = Collator(
            loss=config.loss, pad_id=tokenizer.pad_token_id, decoder_start_id=student.decoder_start_id, teacher=teacher
        )
        self.weights = TermWeights.of(config.loss, config.arm)

    def run(self, seconds: float) -> Measured:
        import torch

        from pst_dist.training.batching.order import OrderPlan
        from pst_dist.training.batching.step_batches import step_batches
        from pst_dist.training.memory.pass_size import PassSize

        train, device = self.config.train, self.engine.device
        size = PassSize.of(self.config, self.engine)
        ranks = self.machines.nodes * self.machines.gpus
        batch = train.global_batch_size or (
            train.per_device_train_batch_size * (train.gradient_accumulation_steps or 1) * ranks
        )
        steps = step_batches(
            OrderPlan(len(self.samples), batch, self.config.seed, ()),
            self.samples,
            self.layout,
            self.collate,
            first_step=0,
            last_step=_STEPS,
            rank=0,
            world_size=ranks,
            micro_batch_size=size.rows,
            by_length=size.by_length,
        )
        batches = list(steps)
        passes = [one for step in batches for one in step]
        self.engine.student.train()
        self._pass(passes[0])  # memory is allocated, kernels are chosen
        trained, tokens, count = self._timed(passes, seconds, self._pass)
        updates = [self._update(passes[0]) for _ in range(1 + _UPDATES)][1:]
        self.engine.student.eval()
        scored, scored_tokens, _ = self._timed(passes, seconds / 4, self._score)
        # An arm may make several sequences of a row, in passes of their own.
        rows = sum(len({name for one in step for name in one.sample_ids}) for step in batches)
        return Measured(
            device=torch.cuda.get_device_name(device)
            if device.type == "cuda"
            else f"CPU, {torch.get_num_threads()} thread(s)",
            passes=count,
            pass_tokens_per_second=tokens / trained,
            update_seconds=sum(updates) / len(updates),
            validation_tokens_per_second=scored_tokens / scored,
            tokens_per_row=sum(one.tokens for one in passes) / max(1, rows),
            rows_per_rank=batch / ranks,
            validation_rows=self.validation_rows,
            texts_per_second=self._texts_per_second(),
            peak_bytes=int(torch.cuda.max_memory_allocated(device)) if device.type == "cuda" else None,
        )

    def _timed(self, passes: Sequence[Any], seconds: float, do: Callable[[Any], None]) -> tuple[float, int, int]:
        """(seconds, tokens, passes) of passes in turn, until the time is over; at least one."""
        tokens = count = 0
        self._wait()
        started = time.monotonic()
        while (spent := time.monotonic() - started) < seconds or not count:
            one = passes[count % len(passes)]
            do(one)
            self._wait()
            tokens, count = tokens + one.tokens, count + 1
        return spent, tokens, count

    def _pass(self, batch: Any) -> None:
        scales = self.weights.scales(batch.counts).float().to(self.engine.device)
        self.engine.backward(self.engine.forward(batch.to(self.engine.device), scales).loss, last=True)

    def _score(self, batch: Any) -> None:
        import torch

        with torch.no_grad():
            self.engine.forward(batch.to(self.engine.device), torch.ones(3, device=self.engine.device))

    def _update(self, batch: Any) -> float:
        self._pass(batch)  # an optimizer passes over weights without a gradient
        self._wait()
        started = time.monotonic()
        self.engine.step(0.0)
        self._wait()
        return time.monotonic() - started

    def _wait(self) -> None:
        import torch

        if self.engine.device.type == "cuda":
            torch.cuda.synchronize(self.engine.device)

    def _texts_per_second(self) -> float | None:
        from pst_dist.embedding.targets import needs_embeddings

        if not needs_embeddings(self.config):
            return None
        from pst_dist.embedding.encoder import TextEncoder

        texts: list[str] = []
        for sample in self.samples:
            texts += sample.rationales
            if len(texts) >= _TEXTS:
                break
        if not texts:
            return None
        encoder = TextEncoder(self.config.embed)
        encoder.encode(texts[:2])
        started = time.monotonic()
        encoder.encode(texts[:_TEXTS])
        return min(len(texts), _TEXTS) / (time.monotonic() - started)
