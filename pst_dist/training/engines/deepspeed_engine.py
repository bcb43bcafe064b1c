"""DeepSpeed's ZeRO 0-3 as an engine, in any number of processes.

`training.engines.deepspeed_config` builds DeepSpeed's settings, and `training.engines.fragments` reads its partitions.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pst_dist.config.schema import TrainConfig
from pst_dist.distributed.ranks import Ranks
from pst_dist.storage.spool import Spool
from pst_dist.training.batching.batches import PSTBatch
from pst_dist.training.engines.deepspeed_config import MOST_BUCKET_ELEMENTS, deepspeed_settings, import_deepspeed
from pst_dist.training.engines.engine import Engine
from pst_dist.training.engines.fragments import (
    Fragment,
    trainable,
    whole_fragments,
    zero3_fragments,
    zero_fragments,
)
from pst_dist.training.engines.optimizer import adamw, set_learning_rate
from pst_dist.training.loss import PSTLossOutput
from pst_dist.training.module import Student


class DeepSpeedEngine(Engine):
    """DeepSpeed ZeRO on CUDA (NCCL) or CPU (gloo) ranks."""

    def __init__(self, student: Student, train: TrainConfig, ranks: Ranks) -> None:
        super().__init__(student, ranks)
        deepspeed = import_deepspeed()
        settings = deepspeed_settings(train, ranks.world_size)
        self.stage = settings["zero_optimization"]["stage"]
        elements = sum(getattr(parameter, "ds_numel", parameter.numel()) for _, parameter in trainable(student))
        # DeepSpeed's default is 500 million elements: gigabytes of buffer that a small student never fills.
        settings["zero_optimization"].setdefault("reduce_bucket_size", min(MOST_BUCKET_ELEMENTS, max(1, elements)))
        if self.stage == 3 and "leaf_module" not in settings["zero_optimization"]:
            gather_by_block(student)
        self.max_grad_norm = train.max_grad_norm
        # torch's optimizer needs no compiler; DeepSpeed's CPU optimizer builds a C++ extension for minutes.
        self.engine, self.optimizer, _, _ = deepspeed.initialize(
            model=student, optimizer=adamw(student, train), config=settings
        )

    @property
    def name(self) -> str:
        return f"zero{self.stage}"

    def forward(self, batch: PSTBatch, scales: Tensor) -> PSTLossOutput:
        return self.engine(batch, scales)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        self.engine.set_gradient_accumulation_boundary(last)
        # DeepSpeed averages over ranks; our losses are shares to be summed.
        self.engine.backward(loss * self.ranks.world_size)

    def step(self, learning_rate: float) -> float:
        set_learning_rate(self.engine.optimizer.param_groups, learning_rate)
        if self.stage == 0:
            # In float32 without ZeRO, DeepSpeed neither reports the norm nor skips a step with NaN gradients.
            grads = [p.grad.detach().float() for p in self.student.parameters() if p.grad is not None]
            norm = float(torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in grads])))
            if math.isfinite(norm):
                self.engine.step()
            else:
                self.discard()
            return norm
        self.engine.step()
        # ZeRO skips the update itself when the norm is not finite, so the weights are unchanged.
        return float(self.engine.get_global_grad_norm())

    def discard(self) -> None:
        if self.stage == 0:
            self.engine.zero_grad()
            return
        # ZeRO keeps gradients in its own buckets and flat partitions. Its step clears them all and moves nothing when
        # their norm is infinite, so this one step is made to see an infinite norm.
        name = "_get_norm_groups" if self.stage == 3 else "scaled_global_norm"
        infinite = torch.tensor(math.inf, device=self.device)
        setattr(self._zero, name, lambda: [infinite] if self.stage == 3 else infinite)
        try:
            self.engine.step()
        finally:
            delattr(self._zero, name)

    @property
    def loss_scale(self) -> float:
        return float(self.ranks.world_size)

    @property
    def replicated(self) -> bool:
        return self.stage == 0

    @property
    def adamw(self) -> torch.optim.Optimizer:
        return self.engine.basic_optimizer

    def _places(self) -> list[Tensor]:
        if self.stage == 0:
            return [parameter for _, parameter in trainable(self.student)]
        zero = self._zero
        return list(zero.fp32_partitioned_groups_flat if self.stage == 3 else zero.single_partition_of_fp32_groups)

    @property
    def _zero(self) -> Any:
        """DeepSpeed's ZeRO optimizer around `adamw`; stage 0 has none."""
        return self.engine.optimizer

    def _fragments(self) -> list[Fragment]:
        if self.stage == 0:
            return whole_fragments(self.student, self.adamw)
        if self.stage == 3:
            return zero3_fragments(self.student, self._zero, self.ranks.rank)
        return zero_fragments(self.student, self._zero)

    def _settle(self) -> None:
        if self.stage == 3:
            self._zero.checkpoint_event_prologue()
            for group in range(len(self._zero.fp32_partitioned_groups_flat)):
                self._zero._reassign_or_swap_out_partitioned_parameters(group)
            self._zero.checkpoint_event_epilogue()
        elif self.stage:
            self._zero.update_lp_params()

    def full_weights(self, folder: Path) -> dict[str, Tensor]:
        if self.stage == 3:
            return self._spooled_weights(folder)
        from deepspeed.utils import safe_get_full_fp32_param

        weights = {}
        for name, parameter in self._kept():
            value = parameter if self.stage == 0 else safe_get_full_fp32_param(parameter)
            if self.ranks.is_main:
                weights[name] = value.detach().float().cpu().clone()
        return weights

    def _spooled_weights(self, folder: Path) -> dict[str, Tensor]:
        from deepspeed.utils import safe_get_full_fp32_param

        spool: Spool | None = None
        failure: Exception | None = None
        for name, parameter in self._kept():
            value = safe_get_full_fp32_param(parameter)
            if not self.ranks.is_main or failure is not None:
                continue  # the other ranks still expect this one in each gathering
            try:
                spool = Spool(folder) if spool is None else spool
                spool.add(name, value.detach().float().cpu().numpy())
            except Exception as error:
                failure = error
        if failure is not None:
            raise failure
        return {name: torch.from_numpy(values) for name, values in (spool.arrays() if spool else {}).items()}


def gather_by_block(student: nn.Module) -> None:
    """Let stage 3 gather and free the weights of a transformer block at once.

    DeepSpeed otherwise runs hooks around each of a block's dozen modules, in every forward and backward pass.
    """
    from deepspeed.utils import set_z3_leaf_modules

    names = {name for module in student.modules() for name in getattr(module, "_no_split_modules", None) or ()}
    blocks = sorted({type(module) for module in student.modules() if type(module).__name__ in names}, key=repr)
    if blocks:
        set_z3_leaf_modules(student, blocks)
