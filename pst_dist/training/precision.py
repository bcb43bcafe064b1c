"""What `train.bf16: auto` means: on a CPU, forward and backward passes of the student are timed in both precisions.

Which is faster depends on the processor's instructions (AMX, avx512_bf16), the student's shapes and its attention, and
no rule that was tried is right for all. So the choice is measured once, when a training begins. Its checkpoints and its
student record it, and a training that resumes keeps it.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pst_dist.config.run_dir import RunDir
from pst_dist.config.schema import Config, TrainConfig
from pst_dist.data.sample import ReasoningSample
from pst_dist.distributed.progress import alive
from pst_dist.distributed.ranks import Ranks, device_of
from pst_dist.errors import ConfigError, IntegrityError
from pst_dist.storage.manifest import read_json, read_manifest
from pst_dist.student.layout import layout_for
from pst_dist.student.tokenizer import build_tokenizer
from pst_dist.training.batching.batches import Collator, PSTBatch
from pst_dist.training.engines.deepspeed_config import deepspeed_settings
from pst_dist.training.loss import TermWeights
from pst_dist.training.module import Student, build_student

log = logging.getLogger(__name__)
_TOKENS = 512
"""Tokens of the passes that are timed: enough that the casting of the weights does not decide."""
_ROUNDS = 3
_SECONDS = 1.0
"""Passes of small students are timed for at least so long."""
_GAIN = 0.9
"""bfloat16 must take less than this share of float32's time: it is the less exact of the two."""


def check_fp16(train: TrainConfig, device: torch.device) -> None:
    """Raise ConfigError for `train.fp16` on a CPU, where it is slower than float32 and no more exact than bf16."""
    if train.fp16 and device.type == "cpu":
        raise ConfigError(
            "train.fp16 needs a GPU, and this rank computes on a CPU", "set train.fp16=false, or train.bf16"
        )


def with_precision(config: Config, run: RunDir, choose: Callable[[], bool] | None = None) -> Config:
    """The config with `train.bf16: auto` replaced by the choice of the training in its run directory, else by `choose`.

    Without either it stays.
    """
    if config.train.bf16 != "auto":
        return config
    value = begun_bf16(run)
    if value is None and choose is not None:
        value = choose()
    if value is None:
        return config
    return config.model_copy(update={"train": config.train.model_copy(update={"bf16": value})})


def begun_bf16(run: RunDir) -> bool | None:
    """Whether the training in a run directory computes in bfloat16; None when there is none, or no readable record."""
    steps = (path for path in run.checkpoints.glob("checkpoint-*") if path.name[11:].isdigit())
    for path in sorted(steps, key=lambda path: int(path.name[11:]), reverse=True):
        with contextlib.suppress(IntegrityError, OSError):
            value = read_json(path / "run_state.json").get("settings", {}).get("train.bf16")
            if isinstance(value, bool):
                return value
    if run.training.is_file():
        with contextlib.suppress(IntegrityError, OSError):
            student = read_manifest(run.best, "student")
            value = student.extra.get("bf16") if student is not None else None
            return value if isinstance(value, bool) else None
    return None


@dataclass(frozen=True)
class Timing:
    """CPU seconds of one forward and backward pass, the least of some."""

    float32: float
    bfloat16: float

    @property
    def bf16(self) -> bool:
        """Whether bfloat16 is clearly faster."""
        return self.bfloat16 < _GAIN * self.float32


def suits_bf16(config: Config, samples: Sequence[ReasoningSample]) -> bool:
    """What `train.bf16: auto` means for this student on this machine; on rank zero, before the student is built."""
    device = device_of(Ranks.from_environment())
    if device.type == "cuda":
        native = torch.cuda.get_device_capability(device)[0] >= 8
        log.info("train.bf16=auto: %s (%s)", native, torch.cuda.get_device_name(device))
        return native
    if _divides_weights(config.train):
        log.info("train.bf16=auto: False (timing it needs the whole student in one process, which ZeRO-3 avoids)")
        return False
    log.info("train.bf16=auto: timing forward and backward passes in float32 and bfloat16")
    timing = timed_precisions(*_problem(config, samples))
    log.info(
        "train.bf16=auto: %s (a pass of about %d tokens takes %.3f CPU seconds in float32, %.3f in bfloat16)",
        timing.bf16,
        _TOKENS,
        timing.float32,
        timing.bfloat16,
    )
    return timing.bf16


def _divides_weights(train: TrainConfig) -> bool:
    world_size = Ranks.from_environment().world_size
    return train.deepspeed is not None and deepspeed_settings(train, world_size)["zero_optimization"]["stage"] == 3


def _problem(config: Config, samples: Sequence[ReasoningSample]) -> tuple[Student, PSTBatch]:
    """The student, without an alignment head, and the first training rows of about `_TOKENS` tokens as one pass."""
    tokenizer = build_tokenizer(config.student, samples)
    student = build_student(config, tokenizer, None)
    layout = layout_for(config, tokenizer, is_encoder_decoder=student.is_encoder_decoder)
    collate = Collator(
        loss=config.loss, pad_id=tokenizer.pad_token_id, decoder_start_id=student.decoder_start_id, teacher=None
    )
    sequences: list[Any] = []
    for sample in samples:
        sequences += layout.sequences(sample)
        if sum(sum(collate.size_of(sequence)) for sequence in sequences) >= _TOKENS:
            break
    return student, collate(sequences)


def timed_precisions(student: Student, batch: PSTBatch) -> Timing:
    """Time passes of a batch in both precisions, in turn, as the single-process engine makes them."""
    scales = TermWeights((1.0, 1.0, 0.0)).scales(batch.counts).float()
    student.train()
    least = {False: float("inf"), True: float("inf")}
    begin, rounds = time.monotonic(), 0
    while rounds < _ROUNDS or time.monotonic() - begin < _SECONDS:
        for bf16 in least:
            alive()
            started = time.process_time()
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
                loss = student(batch, scales).loss
            loss.backward()
            least[bf16] = min(least[bf16], time.process_time() - started)
            student.zero_grad()
        rounds += 1
    return Timing(least[False], least[True])
