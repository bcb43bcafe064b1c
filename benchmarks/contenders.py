"""Cross-entropies that a user could choose instead of ours, and the alignment as one would write it by hand.

Each takes the same hidden states, head and labels and gives the same number: the sum over labelled tokens of their
negative log likelihood, divided by `tokens`. What is not installed, or cannot run on a device, is left out by name
and reason. Nothing here is used by training.
"""

# Shapes in this file: B sequences, T positions, D student width, E teacher width

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IGNORED = -100
"""The label of a position without a loss, in every library below."""

CrossEntropy = Callable[[Tensor, nn.Linear, Tensor, int], Tensor]
"""(hidden [B, T, D], head, labels [B, T], tokens) -> []; position t of the labels is predicted by position t - 1."""


def cross_entropies(device: torch.device, names: Iterable[str]) -> tuple[list[str], dict[str, str]]:
    """Of some contenders those that can run on a device, and for each of the others why it cannot."""
    found, absent = [], {}
    for name in names:
        try:
            cross_entropy(name, device)
            found.append(name)
        except NotHere as reason:
            absent[name] = str(reason)
    return found, absent


def cross_entropy(name: str, device: torch.device) -> CrossEntropy:
    """One contender by name; raises NotHere when it is not installed or does not run on the device."""
    try:
        return MAKERS[name](device)
    except (ImportError, AttributeError) as error:
        raise NotHere(f"{type(error).__name__}: {error}") from error


class NotHere(Exception):
    """A contender cannot run here, and why."""


def compacted(hidden_BTD: Tensor, head: nn.Linear, labels_BT: Tensor, tokens: int) -> Tensor:
    """What a careful user writes in plain torch: pick the labelled rows, one head, one cross-entropy."""
    targets = labels_BT[:, 1:]
    labelled = targets != IGNORED
    logits = head(hidden_BTD[:, :-1][labelled])
    return F.cross_entropy(logits.float(), targets[labelled], reduction="sum") / tokens


def eager_alignment(hidden_BTD: Tensor, mask_BT: Tensor, align: nn.Linear, teacher_BE: Tensor) -> Tensor:
    """[] mean of 1 - cosine between the projected mean under a mask and the teacher: pooling by a masked sum."""
    mask = mask_BT[..., None].to(hidden_BTD.dtype)
    pooled = (hidden_BTD * mask).sum(1) / mask.sum(1)
    return (1 - F.cosine_similarity(align(pooled).float(), teacher_BE.float(), dim=-1)).mean()


def _cuda_only(device: torch.device) -> None:
    if device.type != "cuda":
        raise NotHere(f"runs on CUDA only, not on {device.type}")


def _trainer(_: torch.device) -> CrossEntropy:
    """transformers.Trainer: the model's own loss from labels, logits of every position in float32."""
    from transformers.loss.loss_utils import ForCausalLMLoss

    def loss(hidden_BTD: Tensor, head: nn.Linear, labels_BT: Tensor, tokens: int) -> Tensor:
        logits = head(hidden_BTD)
        return ForCausalLMLoss(logits, labels_BT, vocab_size=logits.shape[-1], num_items_in_batch=tokens)

    return loss


def _trl(device: torch.device) -> CrossEntropy:
    """TRL: what SFTTrainer's default loss calls, with the arguments that it gives on this kind of device."""
    trainer: Any = None
    try:
        kernels: Any = importlib.import_module("trl.kernels")
    except ImportError:
        # The loss type `chunked_nll` of releases before trl.kernels; 256 rows is SFTTrainer's chunk.
        trainer = importlib.import_module("trl.trainer.sft_trainer")
        chunked = trainer._chunked_cross_entropy_loss
        return lambda hidden, head, labels, tokens: chunked(
            hidden, head.weight, 256, labels=labels, num_items_in_batch=tokens
        )[0]
    utilities: Any = importlib.import_module("trl.trainer.utils")
    function, columns = kernels.ChunkedLogProbFunction, utilities._CHUNKED_LOGPROB_CHUNK_SIZE
    # As in its fused head: where there is no Triton, every position is scored.
    compact = utilities._use_triton(device)

    def loss(hidden_BTD: Tensor, head: nn.Linear, labels_BT: Tensor, tokens: int) -> Tensor:
        hidden, targets = hidden_BTD[:, :-1], labels_BT[:, 1:]
        labelled = targets != IGNORED
        likelihoods = function.apply(
            hidden[labelled] if compact else hidden.reshape(-1, hidden.shape[-1]),
            head.weight,
            head.bias,
            targets[labelled] if compact else targets.clamp(min=0).reshape(-1),
            1.0,
            columns,
            None,
            1.0,
            ("log_probs", "entropy", "is_top1"),
        )[0]
        if not compact:
            likelihoods = likelihoods.view(labelled.shape).masked_fill(~labelled, 0)
        return -likelihoods.sum() / tokens

    return loss


def _torch_chunked(_: torch.device) -> CrossEntropy:
    """torch's own chunked head, with the chunks that it chooses itself; ignored positions go through it too."""
    function, options = F.linear_cross_entropy, nn.LinearCrossEntropyOptions()

    def loss(hidden_BTD: Tensor, head: nn.Linear, labels_BT: Tensor, tokens: int) -> Tensor:
        rows = hidden_BTD[:, :-1].flatten(0, 1)
        targets = labels_BT[:, 1:].flatten()
        return function(rows, head.weight, targets, reduction="sum", options=options) / tokens

    return loss


def _liger(device: torch.device) -> CrossEntropy:
    """Liger's fused linear cross-entropy, as its patched models call it: every position, ignored ones too."""
    _cuda_only(device)
    function: Any = importlib.import_module("liger_kernel.transformers.functional").liger_fused_linear_cross_entropy

    def loss(hidden_BTD: Tensor, head: nn.Linear, labels_BT: Tensor, tokens: int) -> Tensor:
        rows = hidden_BTD[:, :-1].flatten(0, 1)
        return function(rows, head.weight, labels_BT[:, 1:].flatten(), reduction="sum") / tokens

    return loss


def _cut_cross_entropy(device: torch.device) -> CrossEntropy:
    """Apple's cut cross-entropy; `shift=1` is its own way of predicting the next token."""
    _cuda_only(device)
    function: Any = importlib.import_module("cut_cross_entropy").linear_cross_entropy
    return lambda hidden, head, labels, tokens: (
        function(hidden, head.weight.to(hidden.dtype), labels, shift=1, reduction="sum") / tokens
    )


def _quack(device: torch.device) -> CrossEntropy:
    """quack's chunked linear cross-entropy: rows and vocabulary must be multiples of 8."""
    _cuda_only(device)
    function: Any = importlib.import_module("quack.linear_cross_entropy").chunked_linear_cross_entropy

    def loss(hidden_BTD: Tensor, head: nn.Linear, labels_BT: Tensor, tokens: int) -> Tensor:
        # Shifting the labels instead of the rows keeps the number of rows as it is.
        targets = F.pad(labels_BT[:, 1:], (0, 1), value=IGNORED).flatten()
        return function(hidden_BTD.flatten(0, 1), head.weight, targets, ignore_index=IGNORED, reduction="sum") / tokens

    return loss


MAKERS: dict[str, Callable[[torch.device], CrossEntropy]] = {
    "trainer": _trainer,
    "trl": _trl,
    "torch_chunked": _torch_chunked,
    "compacted": lambda _: compacted,
    "liger": _liger,
    "cce": _cut_cross_entropy,
    "quack": _quack,
}
"""The contenders by name."""
