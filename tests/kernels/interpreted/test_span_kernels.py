"""Means over ragged spans and the gradient of the hidden state: Triton's against the reference in float64."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from exactness import DTYPES, assert_agrees, exactly
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pst_dist.kernels import reference, triton_backend
from pst_dist.kernels.launch_table import chunk_of
from pst_dist.kernels.spans import NOWHERE, Spans, Supervised

WIDTHS = (1, 31, 64, 257, 768)
Places = Sequence[tuple[int, int, int]]


@st.composite
def ragged(draw: st.DrawFn) -> tuple[int, int, int, Places]:
    """(width, batch, length, places): empty, single, adjacent and full spans, lengths around a chunk, in any order."""
    width, batch = draw(st.sampled_from(WIDTHS)), draw(st.integers(1, 2))
    chunk = chunk_of(width)
    places, longest = [], 1
    for row in range(batch):
        end = 0
        for _ in range(draw(st.integers(0, 3))):
            start = end + draw(st.sampled_from((0, 0, 1, 5)))
            end = start + draw(st.sampled_from((0, 1, 2, chunk - 1, chunk, chunk + 1, 2 * chunk + 1)))
            places.append((row, start, end - start))
        longest = max(longest, end)
    return width, batch, longest + draw(st.sampled_from((0, 3))), draw(st.permutations(places))


def hidden_states(batch: int, length: int, width: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(batch, length, width, generator=torch.Generator().manual_seed(seed)).to(dtype)


def means(backend, hidden_BTD: Tensor, spans: Spans) -> Tensor:
    return backend.span_mean(hidden_BTD, spans.rows, spans.starts, spans.lengths, spans.longest)


def plain_means(hidden_BTD: Tensor, places: Places) -> Tensor:
    """Slices and their means, as one would write them."""
    empty = hidden_BTD.new_zeros(hidden_BTD.shape[-1])
    found = [hidden_BTD[b, start : start + count].mean(0) if count else empty for b, start, count in places]
    return torch.stack(found) if found else hidden_BTD.new_zeros(0, hidden_BTD.shape[-1])


@settings(max_examples=30, deadline=None, derandomize=True, database=None)
@given(ragged(), st.sampled_from(DTYPES), st.sampled_from((float("nan"), float("inf"))))
def test_means_over_ragged_spans_never_read_what_lies_outside(shape, dtype, poison) -> None:
    width, batch, length, places = shape
    spans, clean = Spans.of(places, batch=batch, length=length), hidden_states(batch, length, width, dtype)
    hidden = clean.clone()
    hidden.view(-1, width)[spans.owner == NOWHERE] = poison
    found = means(triton_backend, hidden, spans)
    assert found.dtype == torch.float32
    assert_agrees(found, plain_means(exactly(clean), places), plain_means(clean, places))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_means_at_the_edges_of_chunks_of_wide_hidden_states(dtype) -> None:
    assert chunk_of(1040) == 256
    places = [(0, 3, 255), (0, 258, 256), (1, 1, 257), (1, 300, 0), (1, 300, 1), (1, 301, 213)]
    spans, hidden = Spans.of(places, batch=2, length=514), hidden_states(2, 514, 1040, dtype)
    found = means(triton_backend, hidden, spans)
    assert_agrees(found, plain_means(exactly(hidden), places), plain_means(hidden, places))


def plain_gradient(hidden_BTD: Tensor, places: Places, parts: dict, rows: list[int]) -> Tensor:
    """The gradient by autograd through slices, in the dtype of the hidden states."""
    leaf, dtype = hidden_BTD.detach().clone().requires_grad_(), hidden_BTD.dtype
    total = (leaf * (0 if parts["base_BTD"] is None else parts["base_BTD"].to(dtype))).sum()
    if parts["spans_gradient_AD"] is not None and places:
        total = total + (plain_means(leaf, places) * parts["spans_gradient_AD"].to(dtype)).sum()
    if parts["rows_gradient_ND"] is not None:
        scale = 1 if parts["rows_upstream"] is None else parts["rows_upstream"].to(dtype)
        total = total + (leaf.reshape(-1, leaf.shape[-1])[rows] * parts["rows_gradient_ND"].to(dtype) * scale).sum()
    return torch.autograd.grad(total, leaf)[0]


@settings(max_examples=30, deadline=None, derandomize=True, database=None)
@given(ragged(), st.sampled_from(DTYPES), st.tuples(*[st.booleans()] * 4), st.randoms(use_true_random=False))
def test_the_gradient_of_the_hidden_state_is_the_sum_of_what_arrives(shape, dtype, present, random) -> None:
    width, batch, length, places = shape
    has_base, has_rows, has_upstream, has_spans = present
    spans, hidden = Spans.of(places, batch=batch, length=length), hidden_states(batch, length, width, dtype)
    rows = random.sample(range(batch * length), random.randint(0, min(9, batch * length)))
    supervised = Supervised.of(rows, rows, positions=batch * length)
    parts = {
        "base_BTD": hidden_states(batch, length, width, dtype, seed=1) if has_base else None,
        "rows_gradient_ND": hidden_states(1, len(rows), width, dtype, seed=2)[0] if has_rows else None,
        "rows_upstream": torch.tensor(-1.7) if has_upstream else None,
        "slots_R": supervised.slots if has_rows else None,
        "spans_gradient_AD": hidden_states(1, len(places), width, torch.float32, seed=3)[0] if has_spans else None,
    }
    maps = {"lengths_A": spans.lengths, "owner_R": spans.owner}
    found = triton_backend.hidden_gradient(hidden, **parts, **maps)
    assert found.dtype == dtype and found.is_contiguous()
    wide = {key: exactly(x) if x is not None and x.is_floating_point() else x for key, x in parts.items()}
    exact = reference.hidden_gradient(exactly(hidden), **wide, **maps)
    assert_agrees(exact, plain_gradient(exactly(hidden), places, wide, rows), exact, gradient=True)
    assert_agrees(found, exact, plain_gradient(hidden, places, parts, rows), gradient=True)


def test_an_infinite_upstream_gradient_stays_in_the_supervised_rows() -> None:
    spans, supervised = Spans.of([(0, 2, 2)], batch=1, length=5), Supervised.of([1, 2], [0, 0], positions=5)
    found = triton_backend.hidden_gradient(
        torch.zeros(1, 5, 3),
        base_BTD=None,
        rows_gradient_ND=torch.ones(2, 3),
        rows_upstream=torch.tensor(float("inf")),
        slots_R=supervised.slots,
        spans_gradient_AD=torch.ones(1, 3),
        lengths_A=spans.lengths,
        owner_R=spans.owner,
    )
    assert found[0, :, 0].tolist() == [0, float("inf"), float("inf"), 0.5, 0]


def strided_views(dense_BTD: Tensor) -> dict[str, Tensor]:
    """The same values in other places in memory."""
    batch, length, width = dense_BTD.shape
    longer = torch.cat([dense_BTD, torch.full((batch, 1, width), float("nan"))], 1)
    wider = torch.cat([dense_BTD, torch.full((batch, length, 3), float("nan"))], 2)
    shifted = torch.cat([torch.full((1,), float("nan")), dense_BTD.flatten()])
    return {
        "shifted by one label": longer[:, :-1],
        "position-major": dense_BTD.transpose(0, 1).contiguous().transpose(0, 1),
        "columns of something wider": wider[..., :width],
        "misaligned": shifted[1:].view(batch, length, width),
        "width-major": dense_BTD.permute(2, 0, 1).contiguous().permute(1, 2, 0),
    }


def test_strides_do_not_change_a_bit() -> None:
    places = [(1, 4, 70), (0, 0, 3), (0, 9, 65)]
    spans, dense = Spans.of(places, batch=2, length=75), hidden_states(2, 75, 48, torch.float32)
    gradient = hidden_states(1, 3, 48, torch.float32, seed=1)[0]
    empty = dict.fromkeys(("rows_gradient_ND", "rows_upstream", "slots_R"))
    maps = {"spans_gradient_AD": gradient, "lengths_A": spans.lengths, "owner_R": spans.owner, **empty}
    pooled, merged = means(triton_backend, dense, spans), triton_backend.hidden_gradient(dense, base_BTD=dense, **maps)
    for name, view in strided_views(dense).items():
        assert torch.equal(view, dense) and (name == "misaligned" or not view.is_contiguous())
        assert torch.equal(means(triton_backend, view, spans), pooled), name
        assert torch.equal(triton_backend.hidden_gradient(view, base_BTD=view, **maps), merged), name
    for view in (gradient.T.contiguous().T, torch.cat([gradient, gradient], 1)[:, :48]):
        assert not view.is_contiguous()
        found = triton_backend.hidden_gradient(dense, base_BTD=dense, **{**maps, "spans_gradient_AD": view})
        assert torch.equal(found, merged)


def test_an_expanded_batch_and_an_expanded_gradient_are_read_as_they_lie() -> None:
    spans = Spans.of([(0, 1, 4), (1, 1, 4)], batch=2, length=6)
    hidden = hidden_states(1, 6, 5, torch.float32).expand(2, 6, 5)
    found = means(triton_backend, hidden, spans)
    assert torch.equal(found[0], found[1])
    torch.testing.assert_close(found[0], hidden[0, 1:5].mean(0))
    rest = dict.fromkeys(("base_BTD", "rows_gradient_ND", "rows_upstream", "slots_R"))
    gradient = triton_backend.hidden_gradient(
        torch.zeros(1).expand(2, 6, 5),
        spans_gradient_AD=torch.full((1, 1), 8.0).expand(2, 5),
        lengths_A=spans.lengths,
        owner_R=spans.owner,
        **rest,
    )
    assert gradient[0].tolist() == [[value] * 5 for value in (0, 2, 2, 2, 2, 0)]
    assert torch.equal(gradient[0], gradient[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", (33, 300))
def test_means_are_bitwise_the_same_padded_packed_and_permuted(dtype, width) -> None:
    lengths = [130, 1, 64, 0, 257, 65]
    texts = [hidden_states(1, count, width, dtype, seed=count)[0] for count in lengths]
    padded, packed = torch.full((6, 260, width), float("nan"), dtype=dtype), torch.cat(texts)[None]
    for row, text in enumerate(texts):
        padded[row, 2 : 2 + len(text)] = text
    in_rows = Spans.of([(row, 2, count) for row, count in enumerate(lengths)], batch=6, length=260)
    starts = [sum(lengths[:index]) for index in range(6)]
    in_one = Spans.of([(0, s, n) for s, n in zip(starts, lengths, strict=True)], batch=1, length=packed.shape[1])
    order = [4, 0, 3, 5, 2, 1]
    mixed = Spans.of([(row, 2, lengths[order[row]]) for row in (3, 1, 5, 0, 2, 4)], batch=6, length=260)
    expected = means(triton_backend, padded, in_rows)
    assert torch.equal(means(triton_backend, padded, in_rows), expected)
    assert torch.equal(means(triton_backend, packed, in_one), expected)
    assert torch.equal(means(triton_backend, padded[order], mixed), expected[order][[3, 1, 5, 0, 2, 4]])
    # Alone, a short span takes the way of one kernel instead of two.
    for row in (1, 2):
        alone = Spans.of([(row, 2, lengths[row])], batch=6, length=260)
        assert torch.equal(means(triton_backend, padded, alone)[0], expected[row])


def test_huge_values_do_not_overflow_on_the_way() -> None:
    hidden = torch.full((1, 300, 31), 1e4).to(torch.bfloat16)
    found = means(triton_backend, hidden, Spans.of([(0, 0, 300)], batch=1, length=300))
    assert torch.equal(found, hidden[0, :1].float())
    small = torch.full((1, 300, 31), 60000.0).to(torch.float16)
    assert torch.equal(means(triton_backend, small, Spans.of([(0, 0, 300)], batch=1, length=300)), small[0, :1].float())


def test_nothing_to_pool_and_nothing_to_write_launch_nothing() -> None:
    none = Spans.of([], batch=2, length=4)
    assert means(triton_backend, torch.randn(2, 4, 3), none).shape == (0, 3)
    rest = dict.fromkeys(("base_BTD", "rows_gradient_ND", "rows_upstream", "slots_R", "spans_gradient_AD"))
    maps = {"lengths_A": none.lengths, "owner_R": none.owner, **rest}
    assert triton_backend.hidden_gradient(torch.zeros(0, 4, 3), **maps).shape == (0, 4, 3)
    assert not triton_backend.hidden_gradient(torch.full((2, 4, 3), float("nan")), **maps).any()


def test_float64_is_computed_in_float64() -> None:
    spans, hidden = Spans.of([(0, 0, 5)], batch=1, length=5), hidden_states(1, 5, 3, torch.float64)
    assert torch.equal(means(triton_backend, hidden, spans), means(reference, hidden, spans))


@pytest.mark.usefixtures("lazy_memory")
def test_spans_beyond_two_to_the_31_elements_are_found() -> None:
    width, length = 64, (1 << 25) + 40
    hidden = torch.empty(1, length, width, dtype=torch.bfloat16)
    text = hidden_states(1, 37, width, torch.bfloat16)
    hidden[:, -37:] = text
    spans = [torch.tensor([value]) for value in (0, length - 37, 37)]
    torch.testing.assert_close(triton_backend.span_mean(hidden, *spans, 37)[0], text[0].float().mean(0))


@pytest.mark.usefixtures("lazy_memory")
def test_gradients_are_read_and_written_beyond_two_to_the_31_elements(monkeypatch) -> None:
    """Only the last rows are computed: the interpreter is told program numbers that begin there."""
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    from pst_dist.kernels.launch_table import launch_of

    width, length = 64, (1 << 25) + 40
    tile = launch_of("hidden_gradient_rows", width, torch.device("cpu")).blocks["TILE"]
    skipped = (1 << 25) // tile
    plain = InterpreterBuilder.create_get_program_id

    def moved(self, axis: int) -> TensorHandle:
        handle = plain(self, axis)
        return TensorHandle(handle.data + (skipped if axis == 0 else 0), handle.dtype)

    class OnlyTheEnd:
        """The kernel, launched for the programs after the skipped ones."""

        def __getitem__(self, grid):
            return kernel[(grid[0] - skipped,)]

    kernel = triton_backend.hidden_gradient_rows
    monkeypatch.setattr(InterpreterBuilder, "create_get_program_id", moved)
    monkeypatch.setattr(triton_backend, "hidden_gradient_rows", OnlyTheEnd())
    base = torch.empty(1, length, width, dtype=torch.bfloat16)
    base[:, 1 << 25 :] = 1
    far = torch.as_strided(torch.empty((1 << 31) + 200, dtype=torch.bfloat16), (3, width), ((1 << 30) + 3, 1))
    far[2] = 4
    slots, owner = torch.empty(length, dtype=torch.int32), torch.empty(length, dtype=torch.int32)
    slots[1 << 25 :], owner[1 << 25 :] = NOWHERE, NOWHERE
    slots[-3], owner[-2] = 2, 2
    found = triton_backend.hidden_gradient(
        base,
        base_BTD=base,
        rows_gradient_ND=far,
        rows_upstream=torch.tensor(2.0),
        slots_R=slots,
        spans_gradient_AD=far,
        lengths_A=torch.tensor([1, 1, 2]),
        owner_R=owner,
    )
    assert found[0, 1 << 25 :, 0].tolist() == [1.0] * 37 + [9.0, 3.0, 1.0]
