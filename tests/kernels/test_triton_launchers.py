"""How Triton's kernels are launched: grids, the table of launches, and that no launch asks the device for a number."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from pst_dist.kernels import launch_table, triton_backend
from pst_dist.kernels.launch_table import ANYTHING, TABLE, chunk_of, launch_of

CPU = torch.device("cpu")
OURS = (
    "chunk_sums",
    "span_means",
    "hidden_gradient_rows",
    "row_distances",
    "row_distance_gradients",
    "softmax_rows",
    "softmax_rows with groups",
)


@pytest.fixture
def launches(monkeypatch) -> list[tuple[str, tuple[int, ...]]]:
    """(kernel, grid) of every launch; nothing runs."""
    found: list[tuple[str, tuple[int, ...]]] = []

    class Noted:
        def __init__(self, name: str) -> None:
            self.name = name

        def __getitem__(self, grid):
            return lambda *_arguments, **_options: found.append((self.name, grid))

    for name in vars(triton_backend).copy():
        if name in TABLE:
            monkeypatch.setattr(triton_backend, name, Noted(name))
    return found


def run_everything(device: str) -> None:
    """Each launcher once, on tensors of a device."""
    index, map_R = torch.zeros(3, dtype=torch.int64, device=device), torch.zeros(80, dtype=torch.int32, device=device)
    hidden, wide = torch.zeros(2, 40, 768, dtype=torch.bfloat16, device=device), torch.zeros(3, 768, device=device)
    one = torch.ones((), device=device)
    triton_backend.span_mean(hidden, index, index, index, 1000)
    triton_backend.span_mean(hidden, index, index, index, 128)
    parts = {"base_BTD": hidden, "rows_gradient_ND": wide, "rows_upstream": one, "spans_gradient_AD": wide}
    triton_backend.hidden_gradient(hidden, slots_R=map_R, lengths_A=index, owner_R=map_R, **parts)
    distance, _, statistics = triton_backend.row_distance(wide, wide, "smooth_l1", 1e-8)
    triton_backend.row_distance_gradient(wide, wide, statistics, distance, "smooth_l1", 1e-8)
    for weights in (None, distance):
        triton_backend.softmax_nll(wide, index, weights)
        triton_backend.contrastive_nll(wide, index, index, torch.zeros(768, dtype=torch.int64, device=device), weights)


def test_no_launch_asks_the_device_for_a_number(launches) -> None:
    """Tensors of the meta device have no numbers: whatever needs one raises."""
    with pytest.raises((RuntimeError, NotImplementedError)):
        torch.ones((), device="meta").item()
    run_everything("meta")
    assert len(launches) == 10


def test_grids_cover_rows_and_columns(launches) -> None:
    run_everything("cpu")
    assert launches[:4] == [
        ("chunk_sums", (3 * 3, 8)),  # three blocks of 256 columns; 1000 positions in chunks of 128
        ("span_means", (3 * 6,)),
        ("chunk_sums", (3 * 3, 1)),  # one chunk: the mean is written at once
        ("hidden_gradient_rows", (10 * 3,)),  # 80 rows, 8 at a time
    ]
    assert launches[4:] == [(name, (3,)) for name in ("row_distances", "row_distance_gradients", *["softmax_rows"] * 4)]


@pytest.mark.parametrize("kernel", TABLE)
def test_blocks_are_powers_of_two_and_the_order_of_a_sum_is_not_a_choice(kernel) -> None:
    for entry in TABLE[kernel]:
        assert all(size & (size - 1) == 0 for size in (*entry.blocks.values(), entry.warps))
        assert "CHUNK" not in entry.blocks, "it would let the device decide the order of summation"
    assert [entry.up_to for entry in TABLE[kernel]] == sorted(entry.up_to for entry in TABLE[kernel])


@pytest.mark.parametrize("width", (1, 64, 65, 768, 5120, 152064, 1 << 20))
def test_every_width_has_a_launch_for_every_kernel_of_the_backend(width) -> None:
    for kernel in OURS:
        assert launch_of(kernel, width, CPU).up_to >= width
        assert TABLE[kernel][-1].up_to == ANYTHING


def test_chunks_grow_with_the_width_alone() -> None:
    assert [chunk_of(width) for width in (1, 256, 257, 1024, 1025, 8192)] == [64, 64, 128, 128, 256, 256]


def test_an_entry_of_another_architecture_is_passed_over(monkeypatch) -> None:
    special = launch_table.Launch(architectures=(90,), warps=1)
    monkeypatch.setitem(TABLE, "row_distances", (special, *TABLE["row_distances"]))
    plain = launch_table._entry.__wrapped__
    assert plain("row_distances", 100, 90) is special
    assert plain("row_distances", 100, 80) is TABLE["row_distances"][1]
