"""The interface of an engine, which holds the weights and the optimizer and computes the steps of a training.

The trainer passes each micro-batch's share of the *global* loss to `backward`; `step` then moves the weights by the
same gradient in every engine. `training.engines.single_engine` is plain PyTorch in one process,
`training.engines.deepspeed_engine` is DeepSpeed ZeRO 0-3 in any number, and `training.engines.engine_choice` chooses.
All save the same state, in the fragments of `training.engines.fragments`, so a checkpoint of one engine can be loaded
by another.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pst_dist.distributed.ranks import Ranks, device_of
from pst_dist.training.batching.batches import PSTBatch
from pst_dist.training.engines.fragments import (
    WEIGHT,
    Fragment,
    FragmentFiles,
    adam_steps,
    start_moments,
    trainable,
)
from pst_dist.training.loss import PSTLossOutput
from pst_dist.training.module import Student

STATE_FILES = "state"
"""Name prefix of the files that contain an engine's state in a checkpoint."""


class Engine(ABC):
    """The student, its optimizer and how this rank computes them."""

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
        """The factor by which the engine multiplies the loss before its backward pass."""
        return 1.0

    @property
    def scaling(self) -> list[float] | None:
        """The loss scale of a training in float16, and the steps since it changed; None in other precisions."""
        return None

    @scaling.setter
    def scaling(self, value: list[float] | None) -> None:
        """Continue with the scale of an earlier start; does nothing where losses are not scaled."""
        del value

    @property
    def pass_tokens(self) -> int | None:
        """The cost of one more pass in tokens (`passes.ByLength`); None where it is large and unknown.

        A GPU that is not full takes as long for a few tokens as for many, and ranks exchange tensors in each pass.
        """
        return None

    @property
    def repeats(self) -> bool:
        """Whether a step can be taken again after a pass ran out of memory.

        Not with DeepSpeed, where the other ranks wait in a collective.
        """
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
        """Set a parameter to a tensor that is whole on every rank, before the first step; collective."""
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

        For a LoRA student these are only the trained ones; the base has the others. With ZeRO-3, rank zero maps the
        weights from an unnamed file in `folder`, so that it never holds them all in memory. Raises EnvironmentFault on
        rank zero, after the last collective, when the disk is full.
        """

    def _kept(self) -> Iterator[tuple[str, Any]]:
        """The parameters of `full_weights`."""
        return trainable(self.student) if self.student.is_adapted else self.student.named_parameters()
