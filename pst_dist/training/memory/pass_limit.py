"""How many tokens of a forward pass fit in a GPU: what `train.micro_batch_tokens=auto` chooses there.

Arithmetic with the memory model of `training.memory.training_memory`, without torch, so `pst plan` says the same number
for a GPU that is not here. A training takes what its ranks really have (`training.memory.pass_size`), the least of
them.

It was not tried on a GPU. The estimate of activations was compared with what autograd saves (within 15 %), not with the
peak of a GPU's allocator; hence `SHARE`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from pst_dist.config.schema import Config
from pst_dist.training.memory.model_size import ModelShape
from pst_dist.training.memory.training_memory import RankMemory, rank_memory

SHARE = 0.8
"""Share of a GPU's memory that passes, weights, gradients and optimizer may take together. The rest is for the error of
the estimate, torch's fragments, the workspaces of cuBLAS and the buffers of NCCL."""
_PROMPT_SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Shares of a row that an encoder may read; the limit holds for the one that takes most memory."""


@dataclass(frozen=True)
class PassLimit:
    """The limit of one rank, and why."""

    tokens: int
    """Most tokens of a forward pass, padding included; at least 1."""
    memory: float
    """Bytes that the rank can have on its device."""
    fixed: float
    """Bytes of them that weights, gradients, optimizer and buffers take, whatever the passes are."""


def cuts_by_memory(config: Config) -> bool:
    """Whether the limit of a pass is left to us: with `loss.symmetric` rows of a pass are one another's candidates."""
    return config.train.micro_batch_tokens == "auto" and not config.loss.symmetric


def pass_limit(
    config: Config,
    shape: ModelShape,
    parameters: int,
    *,
    trained: int,
    stage: int | None,
    ranks: int,
    memory: float,
) -> PassLimit:
    """The limit for a device on which a rank can have `memory` bytes; `stage` is None without DeepSpeed.

    Rows are taken to be as long as `layout.max_length`, where attention costs most. A limit beyond
    `train.per_device_train_batch_size` such rows would change nothing and is not looked for.
    """
    most = config.layout.max_length
    cap = 2 * most * config.train.per_device_train_batch_size * (2 if shape.encoder_layers else 1)

    def of(tokens: int) -> list[RankMemory]:
        found = []
        for share in _PROMPT_SHARES if shape.encoder_layers else (0.0,):
            one = rank_memory(
                config,
                shape,
                parameters,
                stage or 0,
                ranks,
                micro_tokens=tokens,
                trained=trained,
                longest=round(most / max(share, 1 - share)) if shape.encoder_layers else most,
                prompt_share=share,
                on_gpu=True,
            )
            found.append(one if stage is not None else replace(one, buffers=0.0))
        return found

    tokens = _largest(lambda tokens: max(one.total for one in of(tokens)) <= SHARE * memory, cap)
    least = of(1)[0]
    return PassLimit(tokens, memory, least.states + least.buffers)


def _largest(fits: Callable[[int], bool], cap: int) -> int:
    """The largest number from 1 to `cap` that fits, where all smaller ones fit too; 1 where none does."""
    low, high = 1, cap + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
