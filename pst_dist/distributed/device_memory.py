"""The memory of a device: how much of it this process can have, and what to do with work that does not fit.

This module recognises torch's out-of-memory errors. Code that computes independent rows (decoding, embedding) runs them
through `in_halves`; training cuts a step into smaller passes (`training.memory.pass_size`).
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from pst_dist.errors import PstError, first_line

log = logging.getLogger(__name__)
GIB = 2**30
_T = TypeVar("_T")
_R = TypeVar("_R")
_SAID = ("CUBLAS_STATUS_ALLOC_FAILED", "DefaultCPUAllocator: can't allocate memory")
"""What torch says in a plain RuntimeError when cuBLAS or the CPU has no memory left."""


@dataclass(frozen=True)
class DeviceMemory:
    """Memory of a GPU as this process sees it, in bytes."""

    name: str
    """The GPU's name."""
    free: int
    """What new tensors can take: what no process holds, and what torch's allocator keeps for this one unused."""
    held: int
    """Tensors of this process."""

    @property
    def own(self) -> int:
        """The most that tensors of this process can take together."""
        return self.free + self.held


def read_memory(device: Any) -> DeviceMemory | None:
    """The memory of a `torch.device` now; None for a CPU, which shares its memory, and where CUDA does not tell."""
    if device.type != "cuda":
        return None
    import torch

    try:
        unheld, _ = torch.cuda.mem_get_info(device)
    except RuntimeError as error:
        log.warning("cannot read the memory of %s: %s", device, first_line(error, 200))
        return None
    reserved, held = torch.cuda.memory_reserved(device), torch.cuda.memory_allocated(device)
    return DeviceMemory(torch.cuda.get_device_name(device), unheld + reserved - held, held)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that a device, or the CPU, has no memory left for a tensor."""
    import torch

    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(said in str(error) for said in _SAID)
    )


def give_back() -> None:
    """Return what torch's allocator holds unused to the device.

    The exception must be gone by then: its traceback keeps the tensors of the work that did not fit.
    """
    import torch

    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def in_halves(
    items: Sequence[_T],
    run: Callable[[Sequence[_T]], _R],
    error_for: Callable[[_T], PstError],
    *,
    fits: Callable[[Sequence[_T]], bool] = lambda part: True,
    on_halving: Callable[[Sequence[_T]], None] = lambda part: None,
) -> Iterator[tuple[Sequence[_T], _R]]:
    """Yield (part, `run(part)`) for consecutive parts of `items`: all of them, or halves where memory runs out.

    A part that does not fit by the estimate `fits` is halved before it is tried. After a part has run out of memory,
    `on_halving(part)` is called and the part is halved. Raises `error_for(item)` if a single item runs out of memory.
    """
    waiting = [items]
    while waiting:
        part = waiting.pop()
        middle = (len(part) + 1) // 2
        halves = [part[middle:], part[:middle]]
        if len(part) > 1 and not fits(part):
            waiting += halves
            continue
        try:
            yield part, run(part)
            continue
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            if len(part) == 1:
                raise error_for(part[0]) from error
        give_back()
        on_halving(part)
        waiting += halves
