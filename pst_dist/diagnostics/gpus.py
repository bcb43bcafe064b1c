"""GPUs by name: memory and peak rates from their makers' data sheets, and the training speed that follows.

A speed from this table is only an estimate: it assumes the share of the peak rate that training reaches with a fully
used GPU, and small students do not use a large GPU fully. `pst plan --measure` measures instead.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pst_dist.config.schema import Config

GpuName = Literal["b200", "h200", "h100", "a100-80", "a100-40", "l40s", "l4", "a10", "rtx4090", "v100", "t4"]
UTILISATION = 0.3
"""Share of the peak rate: between the 38 to 43 % of Llama 3 405B (arXiv 2407.21783, table 4) and what models of under a
billion parameters reach."""


@dataclass(frozen=True)
class Gpu:
    """One GPU, dense rates without sparsity."""

    memory_gib: float
    half: float
    """Peak of bfloat16, or of float16 where the GPU has no bfloat16, with float32 sums: TFLOP/s."""
    single: float
    """Peak of float32 outside tensor cores: TFLOP/s."""


GPUS: dict[str, Gpu] = {
    "b200": Gpu(180, 2250, 75),
    "h200": Gpu(141, 989, 67),
    "h100": Gpu(80, 989, 67),
    "a100-80": Gpu(80, 312, 19.5),
    "a100-40": Gpu(40, 312, 19.5),
    "l40s": Gpu(48, 362, 91.6),
    "l4": Gpu(24, 121, 30.3),
    "a10": Gpu(24, 125, 31.2),
    "rtx4090": Gpu(24, 165, 82.6),
    "v100": Gpu(32, 125, 15.7),
    "t4": Gpu(16, 65, 8.1),
}
"""NVIDIA's data sheets of each product (B200, H200, H100 and A100: SXM; RTX 4090: Ada architecture whitepaper)."""


def table_speed(name: str, config: Config, parameters: int, trained: int) -> float:
    """Tokens per second of one GPU of the table in training."""
    gpu = GPUS[name]
    half = config.train.bf16 is True or config.train.fp16
    # Forward 2 operations a weight and token, backward 2 to the activations and 2 to the weights that are trained.
    each = 4.0 * parameters + 2.0 * trained
    return UTILISATION * 1e12 * (gpu.half if half else gpu.single) / each
