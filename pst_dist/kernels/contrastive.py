"""InfoNCE at scale: each row's own key against any number of keys, without a matrix of all their scores.

Rows are processed in chunks whose scores fit a GPU's L2 cache. With frozen keys (the teacher's) the gradient is one
more product of the same chunk, softmax(S) K - k_own, so the forward pass computes it and the backward pass only scales
it. For trainable keys the backward pass recomputes the chunks. Narrow half-precision keys use the fused kernel of
`contrastive_kernels`. `gather` defines the candidates, also across ranks.
"""

# Shapes in this file: A rows, C rows of a chunk, G keys, E width

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from pst_dist.kernels.dispatch import backend_for
from pst_dist.kernels.launch_table import SCORES_GRAIN
from pst_dist.kernels.reference import wide

log = logging.getLogger(__name__)

CHUNK_BYTES = 32 << 20
"""Bytes for the scores of a chunk: 128 rows of 65536 keys in float32. An A100 has 40 MB of L2 cache, an H100 50."""


def info_nce(
    queries_AE: Tensor,
    keys_GE: Tensor,
    own_A: Tensor,
    groups_A: Tensor,
    key_groups_G: Tensor,
    *,
    temperature: float,
    valid_G: Tensor | None = None,
) -> Tensor:
    """[A] cross-entropies in nats of each row's own key among the keys; float32 (float64 for float64).

    loss_i = log sum_j exp(q_i . k_j / temperature) - q_i . k_own(i) / temperature (van den Oord et al., arXiv
    1807.03748). Keys of a row's own group, except its own key, are excluded from its sum: they are paraphrases, not
    negatives. A row with only its own key has loss 0. Keys that are not `valid` (padding) are excluded for all rows.

    Vectors are not normalised: pass unit vectors for cosines. Both must have the same dtype. float16 and bfloat16 are
    multiplied in that dtype on CUDA (torch >= 2.8; elsewhere in float32), and everything is summed in float32.
    Differentiable once, with respect to the queries and to keys that require a gradient.

    own_A: int64 in 0 … G - 1, a valid key; groups_A, key_groups_G: int64, any numbers. On CUDA an out-of-range own key
    is not reported.
    """
    assert queries_AE.dtype == keys_GE.dtype, f"queries are {queries_AE.dtype}, keys {keys_GE.dtype}"
    tensors = (queries_AE, keys_GE, own_A, groups_A, key_groups_G, valid_G)
    if torch.is_grad_enabled() and keys_GE.requires_grad:
        return torch.ops.pst.info_nce(*tensors, 1 / temperature)
    learns = torch.is_grad_enabled() and queries_AE.requires_grad
    nll_A, _ = torch.ops.pst.info_nce_frozen(*tensors, 1 / temperature, learns)
    return nll_A


@torch.library.custom_op("pst::info_nce_frozen", mutates_args=())
def _info_nce_frozen(
    queries_AE: Tensor,
    keys_GE: Tensor,
    own_A: Tensor,
    groups_A: Tensor,
    key_groups_G: Tensor,
    valid_G: Tensor | None,
    scale: float,
    learns: bool,
) -> tuple[Tensor, Tensor]:
    """(losses [A], gradient of their sum to the queries [A, E]); the gradient is empty when none is required."""
    if learns and valid_G is None and _takes_fused(queries_AE, keys_GE):
        from pst_dist.kernels.contrastive_kernels import contrastive_pass

        return contrastive_pass(queries_AE, keys_GE, own_A, groups_A, key_groups_G, scale)
    backend = backend_for(queries_AE.device)
    nll_A = queries_AE.new_empty(len(queries_AE), dtype=wide(queries_AE.dtype))
    left_AE, right_GE = _operands(queries_AE, keys_GE)
    gradient_AE = left_AE.new_empty(left_AE.shape if learns else (0,))
    weights_A = nll_A.new_full(nll_A.shape, scale)
    for here, scores_CG, factor_CG in _chunks(left_AE, right_GE, valid_G, scale):
        asked = weights_A[here] if learns else None
        nll_A[here] = backend.contrastive_nll(scores_CG, own_A[here], groups_A[here], key_groups_G, asked)
        if learns:
            torch.mm(_copied(scores_CG, factor_CG), right_GE, out=gradient_AE[here])
    return nll_A, gradient_AE.to(queries_AE.dtype)


@_info_nce_frozen.register_fake
def _(
    queries_AE: Tensor,
    keys_GE: Tensor,
    own_A: Tensor,
    groups_A: Tensor,
    key_groups_G: Tensor,
    valid_G: Tensor | None,
    scale: float,
    learns: bool,
) -> tuple[Tensor, Tensor]:
    nll_A = queries_AE.new_empty(queries_AE.shape[0], dtype=wide(queries_AE.dtype))
    return nll_A, queries_AE.new_empty(queries_AE.shape if learns else (0,))


@torch.library.custom_op("pst::scaled_rows", mutates_args=())
def _scaled_rows(rows_AE: Tensor, factors_A: Tensor) -> Tensor:
    """rows * factors, rounded once. It has no gradient, so that a second derivative is refused instead of wrong."""
    return torch.mul(rows_AE, factors_A[:, None], out=torch.empty_like(rows_AE))


@_scaled_rows.register_fake
def _(
    rows_AE: Tensor,
    factors_A: Tensor,
) -> Tensor:
    return torch.empty_like(rows_AE)


def _frozen_setup(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1])


def _frozen_backward(ctx: Any, upstream_A: Tensor | None, _gradient: Any) -> tuple[Any, ...]:
    (gradient_AE,) = ctx.saved_tensors
    return None if upstream_A is None else torch.ops.pst.scaled_rows(gradient_AE, upstream_A), *[None] * 7


_info_nce_frozen.register_autograd(_frozen_backward, setup_context=_frozen_setup)


@torch.library.custom_op("pst::info_nce", mutates_args=())
def _info_nce(
    queries_AE: Tensor,
    keys_GE: Tensor,
    own_A: Tensor,
    groups_A: Tensor,
    key_groups_G: Tensor,
    valid_G: Tensor | None,
    scale: float,
) -> Tensor:
    """[A] losses; the backward pass recomputes what the gradient of trainable keys needs."""
    backend = backend_for(queries_AE.device)
    nll_A = queries_AE.new_empty(len(queries_AE), dtype=wide(queries_AE.dtype))
    for here, scores_CG, _ in _chunks(*_operands(queries_AE, keys_GE), valid_G, scale):
        nll_A[here] = backend.contrastive_nll(scores_CG, own_A[here], groups_A[here], key_groups_G, None)
    return nll_A


@_info_nce.register_fake
def _(
    queries_AE: Tensor,
    keys_GE: Tensor,
    own_A: Tensor,
    groups_A: Tensor,
    key_groups_G: Tensor,
    valid_G: Tensor | None,
    scale: float,
) -> Tensor:
    return queries_AE.new_empty(queries_AE.shape[0], dtype=wide(queries_AE.dtype))


@torch.library.custom_op("pst::info_nce_gradients", mutates_args=())
def _info_nce_gradients(
    queries_AE: Tensor,
    keys_GE: Tensor,
    own_A: Tensor,
    groups_A: Tensor,
    key_groups_G: Tensor,
    valid_G: Tensor | None,
    upstream_A: Tensor,
    scale: float,
    queries_learn: bool,
    keys_learn: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of sum(upstream * loss) to queries [A, E] and keys [G, E]; empty where none is required."""
    backend = backend_for(queries_AE.device)
    left_AE, right_GE = _operands(queries_AE, keys_GE)
    queries_gradient_AE = left_AE.new_empty(left_AE.shape if queries_learn else (0,))
    keys_gradient_GE = right_GE.new_zeros(right_GE.shape if keys_learn else (0,), dtype=wide(right_GE.dtype))
    weights_A = upstream_A * scale
    for here, scores_CG, factor_CG in _chunks(left_AE, right_GE, valid_G, scale):
        backend.contrastive_nll(scores_CG, own_A[here], groups_A[here], key_groups_G, weights_A[here])
        factor_CG = _copied(scores_CG, factor_CG)
        if queries_learn:
            torch.mm(factor_CG, right_GE, out=queries_gradient_AE[here])
        if keys_learn and factor_CG is scores_CG:
            keys_gradient_GE.addmm_(factor_CG.T, left_AE[here])
        elif keys_learn:
            keys_gradient_GE += torch.mm(factor_CG.T, left_AE[here], out_dtype=keys_gradient_GE.dtype)
    return queries_gradient_AE.to(queries_AE.dtype), keys_gradient_GE.to(keys_GE.dtype)


@_info_nce_gradients.register_fake
def _(
    queries_AE: Tensor,
    keys_GE: Tensor,
    own_A: Tensor,
    groups_A: Tensor,
    key_groups_G: Tensor,
    valid_G: Tensor | None,
    upstream_A: Tensor,
    scale: float,
    queries_learn: bool,
    keys_learn: bool,
) -> tuple[Tensor, Tensor]:
    queries_gradient = queries_AE.new_empty(queries_AE.shape if queries_learn else (0,))
    return queries_gradient, keys_GE.new_empty(keys_GE.shape if keys_learn else (0,))


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs[:6])
    ctx.scale = inputs[6]


def _backward(ctx: Any, upstream_A: Tensor) -> tuple[Any, ...]:
    learning = ctx.needs_input_grad[:2]
    gradients = torch.ops.pst.info_nce_gradients(*ctx.saved_tensors, upstream_A, ctx.scale, *learning)
    return *(found if asked else None for found, asked in zip(gradients, learning, strict=True)), *[None] * 5


_info_nce.register_autograd(_backward, setup_context=_setup)


def _operands(queries_AE: Tensor, keys_GE: Tensor) -> tuple[Tensor, Tensor]:
    """Queries and keys in the dtype of the product: their own if it can return the wide dtype."""
    if queries_AE.dtype == wide(queries_AE.dtype) or (queries_AE.is_cuda and hasattr(torch.ops.aten.mm, "dtype_out")):
        return queries_AE, keys_GE
    return queries_AE.float(), keys_GE.float()


def _chunks(
    queries_AE: Tensor, keys_GE: Tensor, valid_G: Tensor | None, scale: float
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """(rows, their scores [C, G] in the wide dtype, a buffer for those scores in the queries' dtype), reusing memory.

    When the dtypes are equal, the buffer is the scores tensor itself.
    """
    rows, keys, dtype = len(queries_AE), len(keys_GE), wide(queries_AE.dtype)
    stride = -(-keys // SCORES_GRAIN) * SCORES_GRAIN
    size = min(rows, max(1, CHUNK_BYTES // max(1, stride * dtype.itemsize)))
    scores_CG = queries_AE.new_empty(size, stride, dtype=dtype)[:, :keys]
    mixed = queries_AE.dtype != dtype
    factor_CG = queries_AE.new_empty(size, stride)[:, :keys] if mixed else scores_CG
    offset_G = queries_AE.new_zeros(keys, dtype=dtype)
    if valid_G is not None:
        offset_G.masked_fill_(~valid_G, float("-inf"))
    for start in range(0, rows, max(1, size)):
        here = slice(start, min(start + size, rows))
        scores, factor = scores_CG[: here.stop - start], factor_CG[: here.stop - start]
        if mixed:
            torch.ops.aten.mm.dtype_out(queries_AE[here], keys_GE.T, dtype, out=scores)
            torch.add(offset_G, scores, alpha=scale, out=scores)
        else:
            torch.addmm(offset_G, queries_AE[here], keys_GE.T, alpha=scale, out=scores)
        yield here, scores, factor if mixed else scores


def _copied(scores_CG: Tensor, factor_CG: Tensor) -> Tensor:
    return scores_CG if factor_CG is scores_CG else factor_CG.copy_(scores_CG)


def _takes_fused(queries_AE: Tensor, keys_GE: Tensor) -> bool:
    """Whether to use the fused kernel: Triton runs here, the kernel supports the inputs, and it passed its check."""
    if backend_for(queries_AE.device).name != "triton":
        return False
    from pst_dist.kernels.contrastive_kernels import serves

    return serves(queries_AE, keys_GE) and _fused_agrees(queries_AE.device)


@functools.lru_cache(maxsize=64)
def _fused_agrees(device: torch.device) -> bool:
    """Whether the fused kernel agrees with the reference on this device; checked once."""
    from pst_dist.kernels.contrastive_kernels import disagreement

    obstacle = disagreement(device)
    if obstacle is None:
        log.info("InfoNCE on %s: fused kernel for half-precision keys (it agrees with the reference)", device)
    else:
        log.warning("InfoNCE on %s: %s; using chunks instead", device, obstacle)
    return obstacle is None
