"""Trains single rows of frozen embeddings: those of the tokens that a LoRA student adds to its base.

The rows are one small parameter beside each matrix. Before a module uses its matrix, the rows are copied into it; so
embedding, head and the fused cross-entropy read one matrix, and only the gradient needs work: it is computed for these
rows alone, never for the whole matrix. Where the input and output embeddings share a matrix, they share the rows. All
of this happens inside the modules' own forward, where ZeRO-3 has gathered matrix and rows.

peft's `trainable_token_indices` builds the whole matrix anew in every forward and its whole gradient in every backward
pass, and gathers rows on CUDA only; `models.adapters` writes the rows in its format.
"""

# Shapes in this file: K trained rows, D width, V vocabulary, N supervised tokens

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pst_dist.errors import ConfigError

TRAINED_ROWS = "trained_rows"
"""End of the name of the parameter that such rows are."""
_STATE = "_trained_rows_state"


@dataclass(frozen=True)
class _State:
    ids_K: Tensor
    scale: float
    """The factor that the module puts on its matrix: 1, or an embedding's own (BART, Gemma 3)."""


def train_rows(model: Any, ids: list[int]) -> None:
    """Make rows `ids` of the input and output embeddings trainable, in place; call it before an engine takes the model.

    Raises ConfigError for a model whose embeddings are not an `nn.Embedding` and its head not an `nn.Linear`.
    """
    inputs, head = model.get_input_embeddings(), _base_of(model.get_output_embeddings())
    rows: dict[int, nn.Parameter] = {}
    for matrix in (inputs.weight, head.weight):
        if id(matrix) not in rows:
            rows[id(matrix)] = nn.Parameter(matrix.detach()[ids].to(torch.float32, copy=True))
    if not isinstance(inputs, nn.Embedding) or not isinstance(head, nn.Linear):
        raise ConfigError(
            f"student.lora cannot train the added tokens of {type(model).__name__}: its embeddings are "
            f"{type(inputs).__name__} and its head is {type(head).__name__}",
            "train all weights (student.lora.rank=0)",
        )
    for module in list(model.modules()):
        matrix = getattr(module, "weight", None)
        if id(matrix) not in rows:
            continue
        if isinstance(module, nn.Embedding):
            _attach(module, ids, rows[id(matrix)], _scale_of(module, ids), _embed)
        elif isinstance(module, nn.Linear):
            _attach(module, ids, rows[id(matrix)], 1.0, _project)


def row_parameters(model: Any) -> dict[str, tuple[str, list[int]]]:
    """Parameter name of trained rows -> (path of their module in the base, ids); shared rows have one name."""
    found = {}
    for name, _ in model.named_parameters():
        path, _, last = name.rpartition(".")
        if last == TRAINED_ROWS:
            found[name] = (path.removesuffix(".base_layer"), model.get_submodule(path).__dict__[_STATE].ids_K.tolist())
    return found


def head_rows(head: nn.Module) -> nn.Parameter | None:
    """The trained rows [K, D] of a plain head, copied into its matrix; None for a head without any.

    For code that reads the matrix instead of calling the module. Under ZeRO-3 call it inside the head's forward.
    """
    rows = getattr(head, TRAINED_ROWS, None)
    if rows is not None:
        _write(head)
    return rows


@torch.no_grad()
def rows_gradient(head: Any, picked_ND: Tensor, nll_N: Tensor, targets_N: Tensor, weights_N: Tensor) -> Tensor:
    """[K, D] float32 gradient of sum(weights * nll) with respect to a plain head's trained rows.

    It follows from the likelihoods that the fused head has computed: the log-sum-exp of a token is its `nll` plus the
    logit of its target. Logits are rounded to the dtype that the fused head computes them in.
    """
    ids = _ids(head)
    device = picked_ND.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else head.weight.dtype
    with torch.autocast(device, enabled=False):
        hidden_ND = picked_ND.to(dtype).float()
        wanted_ND, rows_KD = head.weight[targets_N].to(dtype).float(), head.weight[ids].to(dtype).float()
        target_N, logits_NK = (hidden_ND * wanted_ND).sum(-1), hidden_ND @ rows_KD.T
        if head.bias is not None:
            target_N, logits_NK = target_N + head.bias[targets_N], logits_NK + head.bias[ids]
        sums_N = nll_N.float() + target_N.to(dtype).float()
        error_NK = (logits_NK.to(dtype).float() - sums_N[:, None]).exp() - (targets_N[:, None] == ids).float()
        return (error_NK * weights_N.float()[:, None]).T @ hidden_ND


def _base_of(module: Any) -> Any:
    """The module inside an adapter."""
    return getattr(module, "base_layer", module)


def _attach(module: Any, ids: list[int], rows: nn.Parameter, scale: float, forward: Any) -> None:
    module.register_parameter(TRAINED_ROWS, rows)
    # Not a buffer: a model's buffers are part of what is saved of it.
    module.__dict__[_STATE] = _State(torch.tensor(ids, device=rows.device), scale)
    module.forward = functools.partial(forward, module)


def _scale_of(module: nn.Embedding, ids: list[int]) -> float:
    """The module's output over its matrix; raises ConfigError when that is not one number."""
    with torch.no_grad():
        index = torch.tensor(ids, device=module.weight.device)
        rows, made = module.weight[index].double(), module(index).double()
        scale = float((made * rows).sum() / rows.square().sum().clamp(min=1e-30)) if rows.any() else 1.0
        if not torch.allclose(made, rows * scale, rtol=1e-3, atol=1e-6):
            raise ConfigError(
                f"student.lora cannot train the added tokens: {type(module).__name__} changes its rows",
                "train all weights (student.lora.rank=0)",
            )
    return scale


def _ids(module: nn.Module) -> Tensor:
    state: _State = module.__dict__[_STATE]
    weight: Any = module.weight
    if state.ids_K.device != weight.device:
        module.__dict__[_STATE] = state = _State(state.ids_K.to(weight.device), state.scale)
    return state.ids_K


def _write(module: Any) -> None:
    """Copy the trained rows into the module's matrix."""
    module.weight.data[_ids(module)] = module.trained_rows.detach().to(module.weight.dtype)


def _embed(module: Any, ids: Tensor) -> Tensor:
    """The forward of an embedding whose rows are trained."""
    _write(module)
    rows_KD = module.trained_rows
    made = type(module).forward(module, ids).to(rows_KD.dtype)
    if not torch.is_grad_enabled():
        return made
    with torch.autocast(made.device.type, enabled=False):
        slots_K = (ids.unsqueeze(-1) == _ids(module)).to(rows_KD.dtype)
        # Adds zero; its gradient is that of the rows.
        return made + slots_K @ ((rows_KD - rows_KD.detach()) * module.__dict__[_STATE].scale)


def _project(module: Any, hidden: Tensor) -> Tensor:
    """The forward of a head whose rows are trained, where it is not replaced by the fused head."""
    _write(module)
    logits = type(module).forward(module, hidden)
    if not torch.is_grad_enabled():
        return logits
    rows_KD = module.trained_rows
    nothing = nn.functional.linear(hidden, (rows_KD - rows_KD.detach()).to(hidden.dtype))
    return logits.index_add(-1, _ids(module), nothing.to(logits.dtype))
