"""Chooses the kernels: Triton on CUDA devices that support it, the plain reference elsewhere; decided and logged once.

`PST_KERNELS` forces the choice: `auto` (default), `triton`, `reference`, or `interpret` (Triton's interpreter on CPU
tensors: slow, for debugging without a GPU).
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
import sys
from types import ModuleType

import torch

from pst_dist.errors import ConfigError, EnvironmentFault

log = logging.getLogger(__name__)

VARIABLE = "PST_KERNELS"
CHOICES = ("auto", "triton", "reference", "interpret")
OLDEST_CAPABILITY = (8, 0)
"""The first with bfloat16 and asynchronous copies; the kernels are not compiled for older ones."""


def backend_for(device: torch.device) -> ModuleType:
    """The module whose kernels run on tensors of a device: `reference` or `triton_backend`.

    Raises ConfigError for an unknown PST_KERNELS and EnvironmentFault when it forces kernels that cannot run here.
    """
    return _backend(device.type, device.index, os.environ.get(VARIABLE, "auto"))


@functools.lru_cache(maxsize=64)
def _backend(kind: str, index: int | None, choice: str) -> ModuleType:
    from pst_dist.kernels import reference

    if choice not in CHOICES:
        raise ConfigError(f"{VARIABLE}={choice!r} is unknown", f"use one of {', '.join(CHOICES)}")
    if choice == "reference":
        return _chosen(reference, kind, f"{VARIABLE}=reference")
    if choice == "interpret":
        return _chosen(_interpreted(), kind, f"{VARIABLE}=interpret")
    obstacle = _obstacle(kind, index)
    if obstacle is None:
        from pst_dist.kernels import triton_backend
        from pst_dist.kernels.self_test import disagreement

        obstacle = disagreement(triton_backend, reference, torch.device(kind, index or 0))
        if obstacle is None:
            return _chosen(triton_backend, kind, "they agree with the reference on this device")
        if choice == "auto":
            log.warning("kernels: %s; using the slower reference instead", obstacle)
            return reference
    if choice == "triton":
        raise EnvironmentFault(f"{VARIABLE}=triton, but {obstacle}", f"unset {VARIABLE}, or use reference")
    return _chosen(reference, kind, obstacle)


def _chosen(backend: ModuleType, kind: str, reason: str) -> ModuleType:
    log.info("kernels on %s: %s (%s)", kind, backend.name, reason)
    return backend


def _obstacle(kind: str, index: int | None) -> str | None:
    """Why Triton's kernels cannot run on a device; None when they can."""
    if kind != "cuda":
        return f"Triton does not support {kind} tensors"
    capability = torch.cuda.get_device_capability(index)
    if capability < OLDEST_CAPABILITY:
        return f"compute capability {capability[0]}.{capability[1]} is below {'.'.join(map(str, OLDEST_CAPABILITY))}"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    return None


def _interpreted() -> ModuleType:
    if importlib.util.find_spec("triton") is None:
        raise EnvironmentFault(f"{VARIABLE}=interpret, but triton is not installed", "pip install triton")
    if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
        # Triton decides when it is imported whether its functions are compiled or interpreted.
        raise EnvironmentFault(f"{VARIABLE}=interpret was set too late", "set TRITON_INTERPRET=1 before Python starts")
    os.environ["TRITON_INTERPRET"] = "1"
    from pst_dist.kernels import triton_backend

    return triton_backend
