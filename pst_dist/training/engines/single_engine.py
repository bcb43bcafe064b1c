"""The engine of a single process: plain PyTorch on one device, with autocast for bf16 and fp16."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor, nn

from pst_dist.config.schema import TrainConfig
from pst_dist.distributed.ranks import Ranks
from pst_dist.training.batching.batches import PSTBatch
from pst_dist.training.engines.engine import Engine
from pst_dist.training.engines.fragments import (
    Fragment,
    trainable,
    whole_fragments,
)
from pst_dist.training.engines.optimizer import build_optimizer, set_learning_rate
from pst_dist.training.loss import PSTLossOutput
from pst_dist.training.module import Student

CPU_PASS_TOKENS = 64
"""What one more pass costs on a CPU, in tokens (benchmarks/padding.py)."""


class SingleProcessEngine(Engine):
    """`train.optim` on float32 weights in this process; bf16 and fp16 through autocast."""

    name = "single"
    replicated = True

    def __init__(self, student: Student, train: TrainConfig, ranks: Ranks) -> None:
        super().__init__(student, ranks)
        student.to(self.device)
        self.train_config = train
        self.optimizer = build_optimizer(student, train, self.device)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=train.fp16)
        self.scaler.scale(torch.zeros((), device=self.device))  # creates the scale, which it otherwise delays

    def forward(self, batch: PSTBatch, scales: Tensor) -> PSTLossOutput:
        fp16, bf16 = self.train_config.fp16, self.train_config.bf16 is True
        with torch.autocast(self.device.type, dtype=torch.float16 if fp16 else torch.bfloat16, enabled=fp16 or bf16):
            # Scaled here and not at the backward pass: the head computes its gradients in the forward pass.
            return self.student(batch, scales * self.loss_scale if fp16 else scales)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        loss.backward()

    def step(self, learning_rate: float) -> float:
        limit = self.train_config.max_grad_norm or math.inf
        if self.train_config.fp16:
            self.scaler.unscale_(self.optimizer)
        norm = float(nn.utils.clip_grad_norm_(self.student.parameters(), limit))
        set_learning_rate(self.optimizer.param_groups, learning_rate)
        if math.isfinite(norm):
            self.optimizer.step()
        if self.train_config.fp16:
            self.scaler.update()
        self.discard()
        return norm

    def discard(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    @property
    def loss_scale(self) -> float:
        return float(self.scaler.get_scale())

    @property
    def scaling(self) -> list[float] | None:
        if not self.train_config.fp16:
            return None
        found = self.scaler.state_dict()
        return [float(found["scale"]), float(found["_growth_tracker"])]

    @scaling.setter
    def scaling(self, value: list[float] | None) -> None:
        if value is not None and self.train_config.fp16:
            scale, tracker = value
            self.scaler.load_state_dict(self.scaler.state_dict() | {"scale": scale, "_growth_tracker": int(tracker)})

    @property
    def adamw(self) -> torch.optim.Optimizer:
        return self.optimizer

    @property
    def pass_tokens(self) -> int | None:
        return CPU_PASS_TOKENS if self.device.type == "cpu" else None

    @property
    def repeats(self) -> bool:
        return True

    def _places(self) -> list[Tensor]:
        return [parameter for _, parameter in trainable(self.student)]

    def _fragments(self) -> list[Fragment]:
        return whole_fragments(self.student, self.optimizer)

    def _settle(self) -> None:
        return  # the optimizer moves the weights themselves

    def full_weights(self, folder: Path) -> dict[str, Tensor]:
        return {name: value.detach().float().cpu() for name, value in self._kept()}
