"""The size of a training's forward passes: chosen from a GPU's memory, and halved when a pass does not fit after all.

The gradient of a step does not depend on how its rows are cut into passes, so the size may change between two steps,
and a resumed training may begin with another one. What happens when memory runs out elsewhere is said here too.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from pst_dist.config.schema import Config
from pst_dist.config.zero import zero_stage
from pst_dist.distributed import device_memory
from pst_dist.distributed.device_memory import GIB, DeviceMemory, give_back, is_out_of_memory
from pst_dist.distributed.progress import place
from pst_dist.distributed.ranks import Ranks, gathered
from pst_dist.errors import EnvironmentFault, PstError, first_line
from pst_dist.training.batching.batches import PSTBatch
from pst_dist.training.batching.passes import ByLength
from pst_dist.training.engines.engine import Engine
from pst_dist.training.memory.model_size import shape_of_config
from pst_dist.training.memory.pass_limit import SHARE, PassLimit, cuts_by_memory, pass_limit
from pst_dist.training.module import Student

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TooLarge:
    """A forward and backward pass of this rank that ran out of memory."""

    samples: int
    sequences: int
    tokens: int
    """Positions that the student computes, padding included."""
    said: str
    """The first line of torch's message."""

    @classmethod
    def of(cls, batch: PSTBatch, error: BaseException) -> TooLarge:
        """From the pass; keeps nothing of the error, whose traceback holds the tensors of the pass."""
        samples, tokens = len(set(batch.sample_ids)), int(batch.positions[0])
        return cls(samples, len(batch.sample_ids), tokens, first_line(error, 200))

    def __str__(self) -> str:
        return f"a pass of {self.samples} row(s) and {self.tokens:,} tokens"


class PassSize:
    """How this process cuts the rows of a step, and validation rows, into passes."""

    def __init__(self, config: Config, *, pass_tokens: int | None, repeats: bool, limit: int | None = None) -> None:
        """`pass_tokens` and `repeats` are those of the engine, `limit` is what `auto` stands for."""
        self._config, self._repeats = config, repeats
        self.rows = config.train.per_device_train_batch_size
        """Most samples of a pass."""
        self.by_length = ByLength.of(config, pass_tokens, limit)
        """How passes are cut by length; None for rows in the order in which they are drawn."""

    @classmethod
    def of(cls, config: Config, engine: Engine) -> PassSize:
        """What the config asks for; `auto` on GPUs is the limit of the rank with the least memory. Collective."""
        limit = _limit_of_all(config, engine) if cuts_by_memory(config) else None
        return cls(config, pass_tokens=engine.pass_tokens, repeats=engine.repeats, limit=limit)

    def halve(self, found: TooLarge, where: str, *, keeps_rows: bool = False) -> None:
        """Make all later passes at most half as large as one that did not fit, and give memory back.

        Raises EnvironmentFault, which says what to change, where the step cannot be taken again with smaller passes:
        with DeepSpeed, whose other ranks wait in a collective; for a pass of one row; and where the rows of a pass
        belong together, as `keeps_rows` says of a validation's.
        """
        key, value = self._smaller(found, keeps_rows)
        if value is None:
            raise EnvironmentFault(f"{where}: {found} does not fit in memory ({found.said})", _less(self._config))
        if key is None or not self._repeats:
            raise EnvironmentFault(
                f"{where}: {found} does not fit in memory ({found.said})",
                f"set {key or 'train.per_device_train_batch_size'}={value}; the same command then resumes",
            )
        if self.by_length is not None:
            self.by_length = replace(self.by_length, tokens=value)
        else:
            self.rows = value
        give_back()
        log.warning("%s: %s does not fit in memory; repeating with %s=%s", where, found, key, f"{value:,}")

    def _smaller(self, found: TooLarge, keeps_rows: bool) -> tuple[str | None, int | None]:
        """(the key that limits passes, half the size of this pass in its unit).

        No key where a smaller pass is another loss, no size where there is no smaller pass.
        """
        rows = "train.per_device_train_batch_size"
        if keeps_rows or self._config.loss.symmetric:
            return None, found.samples // 2 or None
        if self.by_length is not None:
            return "train.micro_batch_tokens", found.tokens // 2 if found.sequences > 1 else None
        return rows, found.samples // 2 or None


def _limit_of_all(config: Config, engine: Engine) -> int | None:
    """The smallest limit of any rank, the same on every rank; None where none has a GPU. Collective."""
    memory = device_memory.read_memory(engine.device)
    own = None if memory is None else limit_here(config, engine.student, memory, engine.ranks)
    told: list[tuple[PassLimit | None, str]] = gathered((own, memory.name if memory is not None else ""))
    found = [(limit, name, rank) for rank, (limit, name) in enumerate(told) if limit is not None]
    if not found:
        return None
    limit, name, rank = min(found, key=lambda one: one[0].tokens)
    if engine.ranks.is_main:
        which = f" of rank {rank}" if engine.ranks.world_size > 1 else ""
        log.info("train.micro_batch_tokens=auto: %s", reason_of(limit, name + which))
        if limit.fixed > SHARE * limit.memory:
            log.warning("that leaves no memory for passes, so each has one row; %s", _less(config))
    return limit.tokens


def reason_of(limit: PassLimit, where: str) -> str:
    """The limit and where it comes from, in words."""
    return (
        f"at most {limit.tokens:,} tokens a pass ({where}: {SHARE:.0%} of {limit.memory / GIB:.3g} GiB, less "
        f"{limit.fixed / GIB:.3g} GiB for weights, gradients and optimizer)"
    )


def limit_here(config: Config, student: Student, memory: DeviceMemory, ranks: Ranks) -> PassLimit | None:
    """This rank's limit for a student that is built; None when its architecture's shape is unknown."""
    try:
        shape = shape_of_config(student.model.config.to_dict(), None, "the student")
    except PstError as error:
        log.warning("train.micro_batch_tokens=auto sets no limit: %s", error.what)
        return None
    counts = [(getattr(one, "ds_numel", one.numel()), one.requires_grad) for one in student.parameters()]
    return pass_limit(
        config,
        shape,
        sum(count for count, _ in counts),
        trained=sum(count for count, is_trained in counts if is_trained),
        stage=zero_stage(config.train.deepspeed),
        ranks=ranks.world_size,
        memory=memory.own,
    )


@contextlib.contextmanager
def memory_errors(config: Config) -> Iterator[None]:
    """Turn an out-of-memory error outside of the passes, such as one of the optimizer, into EnvironmentFault."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        said = first_line(error, 200)
        remedy = _less(config, "a lower train.per_device_train_batch_size")
        raise EnvironmentFault(f"memory ran out in {place()} ({said})", remedy) from error


def _less(config: Config, first: str = "") -> str:
    """What makes a training need less memory, of what the config does not do yet."""
    train, student = config.train, config.student
    named: list[tuple[str, Any]] = [
        (first, first),
        ("a lower layout.max_length", True),
        ("student.gradient_checkpointing=true", not student.gradient_checkpointing),
        ("train.bf16=true", train.bf16 is not True and not train.fp16),
        ("LoRA (student.lora.rank=16)", not student.lora.rank and student.model_name_or_path),
        ("train.deepspeed=zero3_offload", train.deepspeed != "zero3_offload" and not student.lora.quantize),
    ]
    return "try " + ", ".join(words for words, helps in named if helps)
