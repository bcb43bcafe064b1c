"""Block sizes and warps of every Triton kernel, by width of the rows and architecture; nothing is tuned at run time.

An autotuner would time kernels in the middle of a training step, with different results on each rank, so runs would not
be bitwise reproducible. Entries were chosen from the compiler's reports (`benchmarks/kernel_compile.py`: registers, no
spills, 128-bit loads, occupancy), not from timings on a GPU.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field

import torch

SCORES_GRAIN = 16
"""Rows of scores begin at multiples of this many elements; otherwise matrix products and loads are slow."""


ANYTHING = 1 << 62


@dataclass(frozen=True, kw_only=True)
class Launch:
    """Launch settings of one kernel for rows up to some width."""

    up_to: int = ANYTHING
    """Widest rows (elements) of this entry; the first entry of a kernel that fits is used."""
    architectures: tuple[int, ...] = ()
    """Compute capabilities of this entry (90 is 9.0); empty for all."""
    blocks: dict[str, int] = field(default_factory=dict)
    """Constants of the kernel by name."""
    warps: int = 4
    stages: int | None = None
    """Pipeline stages of a loop with matrix products; None leaves it to the compiler."""
    registers: int | None = None
    """Maximum registers per thread; None leaves it to the compiler."""

    @property
    def options(self) -> dict[str, int]:
        """Keyword arguments of the launch."""
        asked = {"num_stages": self.stages, "maxnreg": self.registers}
        known = {option: value for option, value in asked.items() if value is not None}
        return {**self.blocks, "num_warps": self.warps, **known}


CHUNKS = {256: 64, 1024: 128, ANYTHING: 256}
"""Positions of a span that one program sums, by width. It fixes the order of summation, so it may depend only on the
width and not on an entry of TABLE."""

NARROW_SOFTMAX = (
    Launch(up_to=512, blocks={"BLOCK": 256}, warps=1),
    Launch(up_to=4096, blocks={"BLOCK": 1024}, warps=4),
    Launch(up_to=16384, blocks={"BLOCK": 2048}, warps=8),
    Launch(up_to=65536, blocks={"BLOCK": 4096}, warps=16),
)

TABLE: dict[str, tuple[Launch, ...]] = {
    # Two accumulators, because a block's width is a power of two. Tensor cores accumulate in registers on 9.0 and in
    # their own memory on 10.0. 64 rows of 512 spill on 10.0 and on 8.0; 32 rows do not.
    "contrastive_rows": (
        Launch(
            up_to=128, architectures=(90,), blocks={"WIDE": 128, "TAIL": 0, "ROWS": 128, "KEYS": 64}, warps=8, stages=2
        ),
        Launch(up_to=128, blocks={"WIDE": 128, "TAIL": 0, "ROWS": 64, "KEYS": 64}, warps=8, stages=3),
        Launch(up_to=256, blocks={"WIDE": 256, "TAIL": 0, "ROWS": 64, "KEYS": 64}, warps=8, stages=2),
        Launch(up_to=384, blocks={"WIDE": 256, "TAIL": 128, "ROWS": 64, "KEYS": 32}, warps=8, stages=2),
        Launch(
            up_to=512, architectures=(90,), blocks={"WIDE": 256, "TAIL": 256, "ROWS": 64, "KEYS": 32}, warps=8, stages=2
        ),
        Launch(up_to=512, blocks={"WIDE": 256, "TAIL": 256, "ROWS": 32, "KEYS": 32}, warps=8, stages=2),
    ),
    "chunk_sums": (
        Launch(up_to=64, blocks={"TILE": 32, "WIDTH": 64}, warps=4),
        Launch(up_to=128, blocks={"TILE": 16, "WIDTH": 128}, warps=4),
        Launch(blocks={"TILE": 16, "WIDTH": 256}, warps=4, registers=64),
    ),
    "span_means": (
        Launch(up_to=64, blocks={"TILE": 16, "WIDTH": 64}, warps=2),
        Launch(blocks={"TILE": 16, "WIDTH": 128}, warps=4),
    ),
    "hidden_gradient_rows": (
        Launch(up_to=64, blocks={"TILE": 32, "WIDTH": 64}, warps=4),
        Launch(up_to=128, blocks={"TILE": 16, "WIDTH": 128}, warps=4),
        Launch(blocks={"TILE": 8, "WIDTH": 256}, warps=4),
    ),
    "row_distances": (
        Launch(up_to=512, blocks={"BLOCK": 512}, warps=2),
        Launch(blocks={"BLOCK": 1024}, warps=4),
    ),
    "row_distance_gradients": (
        Launch(up_to=512, blocks={"BLOCK": 512}, warps=2),
        Launch(blocks={"BLOCK": 1024}, warps=4),
    ),
    # A wide row is read twice. One program of 32 warps with over 32 registers fills an SM, so few rows are in progress
    # and the second read hits the cache: 132 rows of 152k bfloat16 logits are 40 MB.
    "softmax_rows": (
        *NARROW_SOFTMAX,
        Launch(blocks={"BLOCK": 16384}, warps=32),
    ),
    # The classes' groups (64-bit) need registers, too.
    "softmax_rows with groups": (
        *NARROW_SOFTMAX,
        Launch(blocks={"BLOCK": 8192}, warps=32),
    ),
}


def launch_of(kernel: str, width: int, device: torch.device) -> Launch:
    """The entry of TABLE for rows of `width` elements on a device."""
    return _entry(kernel, width, architecture_of(device))


def chunk_of(width: int) -> int:
    """Positions of a span in one chunk, for hidden states of `width`; the same on every device."""
    return next(chunk for widest, chunk in CHUNKS.items() if width <= widest)


@functools.lru_cache(maxsize=64)
def architecture_of(device: torch.device) -> int:
    """90 for compute capability 9.0; 0 for a device other than CUDA (Triton's interpreter)."""
    if device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@functools.lru_cache(maxsize=1024)
def _entry(kernel: str, width: int, architecture: int) -> Launch:
    for entry in TABLE[kernel]:
        if width <= entry.up_to and (not entry.architectures or architecture in entry.architectures):
            return entry
    raise KeyError(f"no launch entry of {kernel} for width {width} on architecture {architecture}")
