"""Two engines behind one small interface: plain PyTorch in one process, DeepSpeed ZeRO 0-3 in any number.

The trainer passes each micro-batch's share of the *global* loss to `backward`; `step` then moves the weights by the
same gradient in both engines. `training.deepspeed_config` builds DeepSpeed's settings.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pst_dist.config.schema import TrainConfig
from pst_dist.distributed.ranks import Ranks, device_of
from pst_dist.errors import ConfigError
from pst_dist.storage.spool import Spool
from pst_dist.training.batches import PSTBatch
from pst_dist.training.deepspeed_config import MOST_BUCKET_ELEMENTS, deepspeed_settings, import_deepspeed
from pst_dist.training.fragments import (
    WEIGHT,
    Fragment,
    FragmentFiles,
    adam_steps,
    start_moments,
    trainable,
    whole_fragments,
    zero3_fragments,
    zero_fragments,
)
from pst_dist.training.loss import PSTLossOutput
from pst_dist.training.module import Student
from pst_dist.training.optimizer import adamw, build_optimizer, set_learning_rate

STATE_FILES = "state"
"""Name prefix of the files that contain an engine's state in a checkpoint."""
CPU_PASS_TOKENS = 64
"""What one more pass costs on a CPU, in tokens (benchmarks/padding.py)."""


class Engine(ABC):
    """The interface the trainer uses."""

    def __init__(self, student: Student, ranks: Ranks) -> None:
        self.student, self.ranks, self.device = student, ranks, device_of(ranks)
        self.busy_seconds = 0.0
        """Time of this rank's forward and backward passes so far."""

    @property
    @abstractmethod
    def name(self) -> str:
        """`single`, `zero0` … `zero3`."""

    @abstractmethod
    def forward(self, batch: PSTBatch, scales: Tensor) -> PSTLossOutput:
        """One micro-batch's share of the loss; `scales` [3] float32 are `TermWeights.scales` of the global batch."""

    @abstractmethod
    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add the gradient of this rank's part of the global loss; `last` marks a step's last micro-batch."""

    @abstractmethod
    def step(self, learning_rate: float) -> float:
        """Move the weights once; returns the global gradient norm before clipping, the same on every rank.

        When the norm is not finite, weights and moments stay as they are on every rank; gradients are always cleared.
        """

    @abstractmethod
    def discard(self) -> None:
        """Clear the gradients accumulated since the last step without moving the weights; collective."""

    @property
    def loss_scale(self) -> float:
        """The factor by which this engine multiplies our loss before its backward pass."""
        return 1.0

    @property
    def scaling(self) -> list[float] | None:
        """The scale of the losses of a training in float16, and the steps since it changed; None in any other."""
        return None

    @scaling.setter
    def scaling(self, value: list[float] | None) -> None:
        """Go on from an earlier start's scale; does nothing where losses are not scaled."""
        del value

    @property
    def pass_tokens(self) -> int | None:
        """The cost of one more pass in tokens (`passes.ByLength`); None where it is large and unknown.

        A GPU that is not full takes as long for a few tokens as for many, and ranks exchange tensors in each pass.
        """
        return None

    @property
    def repeats(self) -> bool:
        """Whether a step whose pass ran out of memory can be taken again: with DeepSpeed, other ranks would wait."""
        return False

    @property
    def state_file(self) -> str:
        """Name of the file that contains this rank's part of weights and optimizer in a checkpoint."""
        return f"{STATE_FILES}-{self.ranks.rank:05d}.safetensors"

    def state(self) -> tuple[list[Fragment], int]:
        """This rank's part of weights and optimizer, as views of the live tensors, and AdamW's step count."""
        steps = adam_steps(self.adamw)
        start_moments(self.adamw, self._places(), steps)
        fragments = self._fragments()
        if self.replicated:  # each rank writes its share
            fragments = fragments[self.ranks.rank :: self.ranks.world_size]
        return fragments, steps

    def load(self, directory: Path) -> None:
        """Load the state saved by any engine on any number of ranks; collective.

        Raises IntegrityError when the files lack values; weights and optimizer are then partly loaded and unusable.
        """
        files = FragmentFiles(directory.glob(f"{STATE_FILES}-*.safetensors"))
        start_moments(self.adamw, self._places(), files.adam_step)
        for fragment in self._fragments():
            files.fill(fragment)
        self._settle()

    def set_weight(self, name: str, value: Tensor) -> None:
        """Give a parameter the values of a tensor that is whole on every rank, before the first step; collective."""
        start_moments(self.adamw, self._places(), 0)
        for fragment in self._fragments():
            if fragment.name == name:
                fragment.slots[WEIGHT].copy_(value.flatten()[fragment.start : fragment.stop])
        self._settle()

    @property
    @abstractmethod
    def replicated(self) -> bool:
        """Whether every rank keeps all weights and moments."""

    @property
    @abstractmethod
    def adamw(self) -> torch.optim.Optimizer:
        """torch's optimizer, without any engine's wrapper."""

    @abstractmethod
    def _places(self) -> list[Tensor]:
        """The tensors that `adamw` moves on this rank."""

    @abstractmethod
    def _fragments(self) -> list[Fragment]:
        """The part of weights and moments that this rank keeps; the moments must exist."""

    @abstractmethod
    def _settle(self) -> None:
        """Update the engine's copies of the float32 weights (such as bf16 ones); collective."""

    @abstractmethod
    def full_weights(self, folder: Path) -> dict[str, Tensor]:
        """Every parameter of the student, float32 on the CPU, on rank zero (elsewhere empty); collective.

        Of a LoRA student only the trained ones: the others are those of its base. Weights that ranks divide are mapped
        from a nameless file below `folder`, so that rank zero never holds them all. Raises EnvironmentFault on rank
        zero, after the last collective, when the disk is full.
        """

    def _kept(self) -> Iterator[tuple[str, Any]]:
        """The parameters of `full_weights`."""
        return trainable(self.student) if self.student.is_adapted else self.student.named_parameters()


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


def build_engine(student: Student, train: TrainConfig, ranks: Ranks) -> Engine:
    """The engine the config selects; raises ConfigError for several ranks without `train.deepspeed`."""
    if train.deepspeed is None:
        if ranks.world_size > 1:
            raise ConfigError(
                f"{ranks.world_size} ranks but train.deepspeed is not set", "set it to zero1, zero2 or zero3"
            )
        return SingleProcessEngine(student, train, ranks)
    return DeepSpeedEngine(student, train, ranks)
