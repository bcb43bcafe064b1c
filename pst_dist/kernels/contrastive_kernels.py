"""InfoNCE against frozen, narrow keys as one Triton kernel: losses and the queries' gradient in one pass over the keys.

With frozen keys the gradient is attention whose values are the keys, so it is enough to keep a row's running maximum,
sum and weighted mean of keys. No scores are written, there are no atomic additions, and each row's bits depend only on
its own vector and the keys. Wider or float32 vectors use the chunks of `contrastive`.
"""

# Shapes in this file: A rows, G keys, E width (WIDE + TAIL columns, as a block's must be a power of two). In kernels
# tensors are pointers.

from __future__ import annotations

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor

from pst_dist.kernels import reference
from pst_dist.kernels.launch_table import SCORES_GRAIN, Launch, launch_of

LOG2_E = tl.constexpr(1.4426950408889634)
WIDEST = 512
"""Elements of the widest supported vectors; wider ones do not fit the registers. See `launch_table`."""


def serves(queries_AE: Tensor, keys_GE: Tensor) -> bool:
    """Whether the kernel supports these: half precision, rows aligned to 128 bits, narrow, and enough for the device.

    Unaligned rows would be loaded element by element, for which the registers do not suffice. A program takes one block
    of rows through all keys. Unless there are blocks for half of the processors, the chunks' matrix products, which
    also parallelise over the keys, are faster.
    """
    rows, width = queries_AE.shape
    if queries_AE.dtype not in (torch.float16, torch.bfloat16) or not 0 < width <= WIDEST or not rows:
        return False
    if any(
        width % SCORES_GRAIN or vectors.stride(0) % SCORES_GRAIN or vectors.data_ptr() % 16
        for vectors in (queries_AE, keys_GE)
    ):
        return False
    if not queries_AE.is_cuda:
        return True
    processors = torch.cuda.get_device_properties(queries_AE.device).multi_processor_count
    return rows >= _launch(queries_AE).blocks["ROWS"] * processors // 2


def contrastive_pass(
    queries_AE: Tensor, keys_GE: Tensor, own_A: Tensor, groups_A: Tensor, key_groups_G: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """(losses [A] float32, gradient of their sum to the queries [A, E] in the queries' dtype).

    Scores are scale * q . k; keys of a row's own group, except its own key, are excluded. Both results avoid
    cancellation: the loss is softplus(lse of the others - own score), and the gradient is its derivative times
    (mean of the others - own key), so a row close to its key keeps its precision. An out-of-range own key gives NaN.
    The last dimension is copied to be dense if it is not.
    """
    queries_AE, keys_GE = (rows if rows.stride(-1) == 1 else rows.contiguous() for rows in (queries_AE, keys_GE))
    rows, width = queries_AE.shape
    losses_A = torch.empty(rows, dtype=torch.float32, device=queries_AE.device)
    gradient_AE = torch.empty(rows, width, dtype=queries_AE.dtype, device=queries_AE.device)
    if not rows:
        return losses_A, gradient_AE
    launch = _launch(queries_AE)
    on_device = torch.cuda.device(queries_AE.device) if queries_AE.is_cuda else contextlib.nullcontext()
    with on_device:
        contrastive_rows[(-(-rows // launch.blocks["ROWS"]),)](
            queries_AE,
            keys_GE,
            own_A.contiguous(),
            groups_A.contiguous(),
            key_groups_G.contiguous(),
            losses_A,
            gradient_AE,
            rows,
            len(keys_GE),
            width,
            scale,
            queries_AE.stride(0),
            keys_GE.stride(0),
            gradient_AE.stride(0),
            # Triton's interpreter would multiply bfloat16 values as bit patterns.
            UPCAST=queries_AE.dtype == torch.bfloat16 and not isinstance(contrastive_rows, triton.JITFunction),
            **launch.options,
        )
    return losses_A, gradient_AE


def _launch(queries_AE: Tensor) -> Launch:
    return launch_of("contrastive_rows", queries_AE.shape[1], queries_AE.device)


@triton.jit(do_not_specialize=["rows", "key_rows"])
def contrastive_rows(
    queries_AE,
    keys_GE,
    own_A,
    groups_A,
    key_groups_G,
    losses_A,
    gradient_AE,
    rows,
    key_rows,
    width,
    scale,
    query_stride,
    key_stride,
    gradient_stride,
    UPCAST: tl.constexpr,
    WIDE: tl.constexpr,
    TAIL: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Losses and gradients of ROWS rows. Grid: blocks of rows. `others` are the keys outside the row's own group.

    A vector has WIDE + TAIL columns, padded with zeros. Scores are base-2 exponents. Their maximum starts at minus
    infinity and stays there for a row without others.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    here = row < rows
    own = tl.load(own_A + row, mask=here, other=0).to(tl.int32)
    group = tl.load(groups_A + row, mask=here, other=0)
    column = tl.arange(0, WIDE)
    filled = column < width
    query_at = queries_AE + row.to(tl.int64)[:, None] * query_stride
    query = _operand(query_at, column, here, filled, UPCAST)
    mean = tl.zeros([ROWS, WIDE], tl.float32)
    if TAIL:
        tail_column = WIDE + tl.arange(0, TAIL)
        tail_filled = tail_column < width
        tail_query = _operand(query_at, tail_column, here, tail_filled, UPCAST)
        tail_mean = tl.zeros([ROWS, TAIL], tl.float32)
    highest = tl.full([ROWS], float("-inf"), tl.float32)
    mass = tl.zeros([ROWS], tl.float32)
    own_score = tl.zeros([ROWS], tl.float32)

    for first in range(0, key_rows, KEYS):
        key = first + tl.arange(0, KEYS)
        there = key < key_rows
        key_at = keys_GE + key.to(tl.int64)[:, None] * key_stride
        vector = _operand(key_at, column, there, filled, UPCAST)
        scores = tl.dot(query, tl.trans(vector))
        if TAIL:
            tail_vector = _operand(key_at, tail_column, there, tail_filled, UPCAST)
            scores = tl.dot(tail_query, tl.trans(tail_vector), scores)
        scores *= scale * LOG2_E
        is_own = key[None, :] == own[:, None]
        own_score += tl.sum(tl.where(is_own, scores, 0.0), 1)
        key_group = tl.load(key_groups_G + key, mask=there, other=0)
        others = there[None, :] & (key_group[None, :] != group[:, None])
        scores = tl.where(others & (key[None, :] != own[:, None]), scores, float("-inf"))
        rising = tl.maximum(highest, tl.max(scores, 1))
        peak = tl.where(rising == float("-inf"), 0.0, rising)
        decay = tl.exp2(highest - peak)
        share = tl.exp2(scores - peak[:, None])
        mass = mass * decay + tl.sum(share, 1)
        share = share.to(vector.dtype)
        mean = tl.dot(share, vector, mean * decay[:, None])
        if TAIL:
            tail_mean = tl.dot(share, tail_vector, tail_mean * decay[:, None])
        highest = rising

    # Reloaded (volatile, or the compiler would keep it), so that the loop need not hold it for each row of a thread.
    own_row = tl.load(own_A + row, mask=here, other=0, volatile=True).to(tl.int64)
    inside = (own_row >= 0) & (own_row < key_rows)
    some = mass > 0
    mass = tl.where(some, mass, 1.0)
    margin = tl.where(some, (highest + tl.log2(mass) - own_score) / LOG2_E, float("-inf"))
    margin = tl.where(inside, margin, float("nan"))
    # log1p computed from the rounded value of 1 + odds, since Triton's interpreter has no log1p.
    odds = tl.exp(-tl.abs(margin))
    rounded = (1.0 + odds) - 1.0
    stretch = odds / tl.where(rounded == 0.0, 1.0, rounded)
    log1p = tl.where(rounded == 0.0, odds, tl.log(1.0 + odds) * stretch)
    tl.store(losses_A + row, tl.maximum(margin, 0.0) + log1p, mask=here)
    missed = scale / (1.0 + tl.exp(-margin))
    gradient_at = gradient_AE + row.to(tl.int64)[:, None] * gradient_stride
    own_at = keys_GE + own_row[:, None] * key_stride
    own_vector = _operand(own_at, column, here & inside, filled, False)
    change = (mean / mass[:, None] - own_vector.to(tl.float32)) * missed[:, None]
    _write(gradient_at, column, change, here, filled)
    if TAIL:
        own_vector = _operand(own_at, tail_column, here & inside, tail_filled, False)
        change = (tail_mean / mass[:, None] - own_vector.to(tl.float32)) * missed[:, None]
        _write(gradient_at, tail_column, change, here, tail_filled)


@triton.jit
def _operand(at, column, present, filled, UPCAST: tl.constexpr):
    """Rows of vectors, with zeros for missing rows and columns."""
    value = tl.load(at + column[None, :], mask=present[:, None] & filled[None, :], other=0.0)
    if UPCAST:
        value = value.to(tl.float32)
    return value


@triton.jit
def _write(at, column, value, present, filled):
    tl.store(at + column[None, :], value.to(at.dtype.element_ty), mask=present[:, None] & filled[None, :])


def disagreement(device: torch.device) -> str | None:
    """How the kernel differs from the reference on a device; None when it agrees. Synchronises with the device."""
    draw = torch.Generator("cpu").manual_seed(0)
    for width in (48, 384):
        vectors = torch.randn(220, width, generator=draw, device="cpu")
        queries, keys = torch.nn.functional.normalize(vectors, dim=-1).bfloat16().split([70, 150])
        own, groups = torch.randperm(150, generator=draw, device="cpu")[:70], torch.arange(150, device="cpu") // 2
        # Some rows share no group with any key: only being their own excludes their own key from the others.
        row_groups = torch.where(own < 50, -1, groups[own])
        scores, weights = 10 * queries.double() @ keys.double().T, torch.full((70,), 10.0, device="cpu").double()
        expected = reference.contrastive_nll(scores, own, row_groups, groups, weights)
        slope = scores @ keys.double()
        try:
            there = [tensor.to(device) for tensor in (queries, keys, own, row_groups, groups)]
            losses, gradient = contrastive_pass(there[0], there[1], there[2], there[3], there[4], 10.0)
            off = float((losses.cpu() - expected).norm() / expected.norm())
            bent = float((gradient.cpu() - slope).norm() / slope.norm())
        except Exception as error:  # after any error, chunks can be used instead
            reason = (str(error).strip() or "no message").splitlines()[0]
            return f"the fused InfoNCE kernel raised {type(error).__name__}: {reason}"
        # Negated, so that a NaN error fails the check.
        if not (off <= 1e-4 and bent <= 1e-2):
            return f"the fused InfoNCE kernel has relative errors of {off:.1e} and {bent:.1e} at width {width}"
    return None
