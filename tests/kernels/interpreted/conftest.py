"""Two things these tests rely on: fresh memory holds NaN, and float32 becomes bfloat16 as on a GPU.

The first shows a kernel that leaves a place unwritten. The second mends Triton's interpreter, which cuts the last 16
bits off where every GPU rounds to the nearest even.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

pytest.importorskip("triton")

import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


@pytest.fixture(autouse=True)
def bfloat16_is_rounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter's cast from float32 to bfloat16 rounds to the nearest even."""
    plain = InterpreterBuilder.cast_impl

    def cast(self, source, target):
        if source.dtype.scalar == tl.float32 and target.scalar == tl.bfloat16:
            rounded = torch.from_numpy(source.data.copy()).to(torch.bfloat16).view(torch.int16)
            return TensorHandle(rounded.numpy().view("uint16"), tl.bfloat16)
        return plain(self, source, target)

    monkeypatch.setattr(InterpreterBuilder, "cast_impl", cast)


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """torch.empty gives NaN (the largest integer for integers) while a test runs."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def lazy_memory(poisoned_memory: None) -> None:
    """torch.empty writes nothing, so a tensor of many gigabytes takes only the pages that are touched."""
    torch.use_deterministic_algorithms(False)
