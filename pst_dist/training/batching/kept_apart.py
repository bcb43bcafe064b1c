"""Whether a model keeps concatenated rows apart when their position ids begin anew, as `train.padding_free` needs.

transformers' models do this in their attention masks, and in flash attention of variable length. A model with another
kind of memory, such as a convolution or a state, may not: its rows would read one another, and the loss would be wrong.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn

from pst_dist.errors import ConfigError

log = logging.getLogger(__name__)
_LONGEST = 16
"""Tokens of each of the two rows."""
_TOLERANCE = 0.05
"""How far the states of two equal rows may be apart, over the largest value: far above rounding in bfloat16, and below
what other positions change."""


def check_padding_free(*, is_encoder_decoder: bool) -> None:
    """Raise ConfigError for an encoder-decoder."""
    if is_encoder_decoder:
        what = "train.padding_free is for causal students, and this is an encoder-decoder"
        raise ConfigError(what, "set it to false")


def warn_of_slow_attention(model: Any) -> None:
    """Warn when attention is not computed for each row of its own."""
    if "flash" not in (getattr(model.config, "_attn_implementation", None) or ""):
        log.warning(
            "train.padding_free without flash attention: each token attends to all tokens of its pass, which takes "
            "longer than padding; set student.attn_implementation=flash_attention_2 on a GPU"
        )


@torch.no_grad()
def check_kept_apart(model: Any, input_ids_1T: Tensor) -> None:
    """Run the model on two rows of a batch's first tokens, concatenated.

    Other tokens in the first row must leave the states of the second row as they are, to the bit, and two equal rows
    must have the same states. Raises ConfigError otherwise.
    """
    row_1L = input_ids_1T[:, : min(_LONGEST, max(1, input_ids_1T.shape[1] // 2))]
    length, vocabulary = row_1L.shape[1], model.config.get_text_config().vocab_size
    other_1L = (row_1L + 1) % vocabulary
    positions = torch.arange(length, device=row_1L.device).repeat(2)[None]
    was_training = model.training
    model.eval()
    equal, changed = (_states(model, torch.cat([first, row_1L], 1), positions)[0] for first in (row_1L, other_1L))
    model.train(was_training)
    first, second = equal[:length].float(), equal[length:].float()
    same = (first - second).abs().max() <= _TOLERANCE * first.abs().max()
    if not torch.equal(equal[length:], changed[length:]) or not same:
        raise ConfigError(
            f"{type(model).__name__} does not keep concatenated rows apart, which train.padding_free needs",
            "set train.padding_free=false",
        )


def _states(model: Any, ids_1T: Tensor, positions_1T: Tensor) -> Tensor:
    """[1, T, D] hidden states that the language-model head receives."""
    head: nn.Module = model.get_output_embeddings()
    given: list[Tensor] = []
    handle = head.register_forward_pre_hook(lambda _, inputs: given.append(inputs[0]))
    try:
        model(input_ids=ids_1T, position_ids=positions_1T, use_cache=False)
    finally:
        handle.remove()
    return given[0]
