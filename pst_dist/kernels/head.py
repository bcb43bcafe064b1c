"""The fused head: cross-entropy on supervised rows and pooled spans of one hidden state, gradients in the forward pass.

The language-model head processes only supervised rows, chunk by chunk, and computes loss and gradients together. The
backward pass scales the gradients and writes that of the hidden state once, including the pooled spans' part. The
parameters come from the caller, inside the head module's own forward, where ZeRO-3 and FSDP have gathered them. A head
that is not a plain `nn.Linear` (LoRA, quantised) runs as a module.
"""

# Shapes in this file: B sequences, T positions, D student width, N supervised rows, V vocabulary, A spans

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from pst_dist.errors import EnvironmentFault
from pst_dist.kernels.dispatch import backend_for
from pst_dist.kernels.ops import chunk_rows
from pst_dist.kernels.reference import wide
from pst_dist.kernels.spans import Spans, Supervised


@dataclass(frozen=True)
class HeadOutput:
    """Output of the fused head."""

    loss: Tensor
    """[] float32 (float64 for float64) with gradient: sum over N of weight * nll."""
    nll: Tensor
    """[N] float32 nats without gradient."""
    pooled: Tensor
    """[A, D] float32 means over the spans, with gradient."""
    squares: Tensor
    """[N] float32: squared norm of the loss's gradient at each supervised row; empty unless requested."""
    anchor: Tensor
    """[] zero in the same graph. A replaced forward builds its dummy logits from it, so that hooks on the module's
    output (ZeRO-3's) still run before the head's backward pass."""


def combined_head(
    hidden_BTD: Tensor,
    head: nn.Module,
    supervised: Supervised,
    weights_N: Tensor,
    spans: Spans,
    *,
    forward: Callable[[Tensor], Tensor] | None = None,
    with_squares: bool = False,
) -> HeadOutput:
    """Cross-entropy of `head` on supervised rows and means over spans, from one [B, T, D] hidden state.

    Call it inside the head's own forward, passing the original `forward` if that was replaced. A plain `nn.Linear` runs
    fused; any other module is called on chunks of rows. Only the supervised rows and the spans are read. The weights
    are those of the loss, including denominators; the upstream gradient handles any later scaling. Raises
    EnvironmentFault when the head's weight is not in memory (ZeRO-3 outside the head's forward).
    """
    parameters = [parameter for parameter in head.parameters() if parameter.requires_grad]
    if any(parameter.numel() == 0 for parameter in head.parameters()):
        raise EnvironmentFault(
            "the language-model head's weight is empty here", "under ZeRO-3, call this inside the head's forward"
        )
    learns = torch.is_grad_enabled() and (hidden_BTD.requires_grad or bool(parameters))
    settings = _Settings(learns, with_squares, spans.longest)
    tensors = (supervised.rows, supervised.slots, supervised.targets, weights_N)
    places = (spans.rows, spans.starts, spans.lengths, spans.owner)
    if is_plain(head):
        made = _Combined.apply(hidden_BTD, None, settings, *tensors, *places, head.weight, head.bias)
    else:
        run = forward or head.forward
        made = _Combined.apply(hidden_BTD, run, settings, *tensors, *places, *parameters)
    return HeadOutput(*made)


def is_plain(head: nn.Module) -> bool:
    """Whether a head is plain x @ W^T + b, which runs fused."""
    return type(head) is nn.Linear and not nn.utils.parametrize.is_parametrized(head)


@dataclass(frozen=True)
class _Settings:
    learns: bool
    with_squares: bool
    longest: int


class _Combined(torch.autograd.Function):
    """(hidden, forward or None, settings, rows, slots, targets, weights, span maps, parameters) -> HeadOutput."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        run: Callable[[Tensor], Tensor] | None,
        settings: _Settings,
        rows: Tensor,
        slots: Tensor,
        targets: Tensor,
        weights: Tensor,
        span_rows: Tensor,
        starts: Tensor,
        lengths: Tensor,
        owner: Tensor,
        *parameters: Tensor | None,
    ) -> tuple[Tensor, ...]:
        picked = hidden[rows // hidden.shape[1], rows % hidden.shape[1]]
        asked = weights if settings.learns else None
        with torch.no_grad():
            if run is None:
                nll, rows_gradient, *gradients = _through_linear(picked, parameters, targets, asked, ctx)
            else:
                nll, rows_gradient, gradients = _through_module(picked, run, parameters, targets, asked)
            pooled, _ = torch.ops.pst.span_mean(hidden, span_rows, starts, lengths, owner, settings.longest)
            loss = (nll * weights).sum()
            watched = settings.with_squares and settings.learns
            squares = rows_gradient.to(wide(hidden.dtype)).square().sum(-1) if watched else nll.new_empty(0)
        ctx.mark_non_differentiable(nll, squares)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(rows_gradient, slots, lengths, owner, hidden.new_empty(1))
        ctx.shape, ctx.inputs = hidden.shape, 11 + len(parameters)
        # Not saved tensors, so that a backward pass that keeps no graph can pass them on without a copy.
        ctx.gradients = [
            (gradient, parameter.dtype) if parameter is not None and gradient.numel() else None
            for gradient, parameter in zip(gradients, parameters, strict=True)
        ]
        return loss, nll, pooled, squares, loss.new_zeros(())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor | None, _nll: Any, pooled_gradient: Tensor | None, *_: Any) -> Any:
        rows_gradient, slots, lengths, owner, kind = ctx.saved_tensors
        hidden_gradient = None
        if ctx.needs_input_grad[0]:
            like = kind.expand(ctx.shape)
            rows = (rows_gradient, upstream, slots) if upstream is not None else (None, None, None)
            hidden_gradient = torch.ops.pst.hidden_gradient(like, None, *rows, pooled_gradient, lengths, owner)
        return hidden_gradient, *[None] * 10, *_hand_over(ctx, upstream)


def _through_linear(
    picked_ND: Tensor, parameters: Sequence[Tensor | None], targets: Tensor, weights: Tensor | None, ctx: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    weight, bias = parameters
    assert weight is not None
    device = picked_ND.device
    dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else weight.dtype
    chunk = chunk_rows(len(weight), picked_ND.shape[1], dtype.itemsize, device)
    with torch.autocast(device.type, enabled=False):
        return torch.ops.pst.linear_nll(
            picked_ND.to(dtype),
            weight.to(dtype),
            None if bias is None else bias.to(dtype),
            targets,
            weights,
            chunk,
            any(ctx.needs_input_grad[11:]),
        )


def _through_module(
    picked_ND: Tensor,
    run: Callable[[Tensor], Tensor],
    parameters: Sequence[Tensor | None],
    targets: Tensor,
    weights: Tensor | None,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """(nll, rows' gradient, parameters' gradients) of a head that can only be called on hidden states."""
    backend, dtype = backend_for(picked_ND.device), wide(picked_ND.dtype)
    # The vocabulary is unknown before the first call; start with 256 rows, a usual size.
    chunk = 256
    likelihoods, rows_gradient = picked_ND.new_empty(len(picked_ND), dtype=dtype), torch.empty_like(picked_ND)
    totals = [torch.zeros_like(parameter, dtype=dtype) for parameter in parameters if parameter is not None]
    for start in range(0, len(picked_ND), chunk):
        here = slice(start, start + chunk)
        with torch.set_grad_enabled(weights is not None):
            rows = picked_ND[here].detach().requires_grad_(weights is not None)
            logits = run(rows)
        values = logits.detach().clone() if weights is not None else logits
        likelihoods[here] = backend.softmax_nll(values, targets[here], None if weights is None else weights[here])
        if weights is None:
            continue
        sources = [rows, *(parameter for parameter in parameters if parameter is not None)]
        found = torch.autograd.grad(logits, sources, grad_outputs=values, allow_unused=True)
        if found[0] is not None:
            rows_gradient[here] = found[0]
        for total, gradient in zip(totals, found[1:], strict=True):
            if gradient is not None:
                total += gradient
    return likelihoods, rows_gradient, totals


def _hand_over(ctx: Any, upstream: Tensor | None) -> list[Tensor | None]:
    """The parameters' gradients times the upstream gradient, in each parameter's dtype.

    They are as large as the head. When this backward pass keeps no graph, they are scaled in place to avoid a second
    copy; otherwise a second backward pass needs them unscaled.
    """
    if upstream is None:
        return [None] * len(ctx.gradients)
    last = not torch.compiler.is_compiling() and not _keeps_graph()
    # Reading the value is free on a CPU; on a GPU it would sync with the device.
    unscaled = last and upstream.device.type == "cpu" and upstream.item() == 1
    handed: list[Tensor | None] = []
    for index, item in enumerate(ctx.gradients):
        if item is None:
            handed.append(None)
            continue
        gradient, dtype = item
        if last:
            ctx.gradients[index] = None
        if unscaled:
            handed.append(gradient.to(dtype))
        elif last and gradient.dtype == dtype:
            handed.append(gradient.mul_(upstream))
        else:
            # Scaled and rounded in one pass, since the gradient is as large as the head.
            handed.append(torch.mul(gradient, upstream, out=gradient.new_empty(gradient.shape, dtype=dtype)))
        del gradient, item
    return handed


def _keeps_graph() -> bool:
    """Whether the running backward pass was called with retain_graph; true when torch does not report it."""
    ask = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return ask is None or ask()


def span_tap(hidden_BTD: Tensor, spans: Spans) -> tuple[Tensor, Tensor]:
    """(hidden, pooled [A, D]): means over spans of a hidden state that another head also reads.

    Use the returned hidden state from here on. Its gradient and that of the means are then added in one pass; autograd
    would first build a dense gradient of the means and then add two full tensors.
    """
    return _Tap.apply(hidden_BTD, spans.rows, spans.starts, spans.lengths, spans.owner, spans.longest)


class _Tap(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, rows: Tensor, starts: Tensor, lengths: Tensor, owner: Tensor, longest: int
    ) -> tuple[Tensor, Tensor]:
        pooled, _ = torch.ops.pst.span_mean(hidden, rows, starts, lengths, owner, longest)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(lengths, owner, hidden.new_empty(1))
        ctx.shape = hidden.shape
        return hidden.view_as(hidden), pooled

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor | None, pooled_gradient: Tensor | None) -> Any:
        lengths, owner, kind = ctx.saved_tensors
        if pooled_gradient is None:
            return gradient, *[None] * 5
        like = kind.expand(ctx.shape)
        merged = torch.ops.pst.hidden_gradient(like, gradient, None, None, None, pooled_gradient, lengths, owner)
        return merged, *[None] * 5
