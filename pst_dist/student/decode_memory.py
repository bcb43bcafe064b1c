"""Batches of generation that fit in memory: a part is halved when a GPU would not hold it, or does not.

Which questions are decoded together is planned without a device, so that any number of processes plans the same
batches. A batch is cut here, where it is decoded; its answers then differ only by rounding. The estimate was compared
with the peak of processes on a CPU, but not run on a GPU. Hence `SHARE`, and the halving of what does run out.
"""

# Letters in this file: B rows, P tokens of the longest prompt, T tokens in all, V vocabulary

from __future__ import annotations

import inspect
import logging
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from pst_dist.distributed import device_memory
from pst_dist.distributed.device_memory import GIB, in_halves
from pst_dist.errors import EnvironmentFault
from pst_dist.models.load import layers_of
from pst_dist.student.contexts import Context

log = logging.getLogger(__name__)
SHARE = 0.7
"""Share of the free memory that a batch may take. A cache that grows by a token at a time leaves fragments."""
_R = TypeVar("_R")
_learnt: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
"""Model -> most tokens of a batch, from the last one that ran out of memory."""


def in_parts(
    model: Any,
    rows: Sequence[int],
    contexts: Sequence[Context],
    new: int,
    run: Callable[[Sequence[int]], _R],
    *,
    estimate: bool,
) -> Iterator[tuple[Sequence[int], _R]]:
    """Yield (rows, `run(rows)`) for consecutive parts of a batch, each of which fits in memory.

    `rows` are places of `contexts`, `new` is the number of tokens generated for each. Without `estimate` only what
    really runs out of memory is halved. Raises EnvironmentFault for a question that does so by itself.
    """
    device = model.get_input_embeddings().weight.device
    memory = device_memory.read_memory(device) if estimate and len(rows) > 1 else None
    room = None if memory is None else SHARE * memory.free

    def sizes(part: Sequence[int]) -> tuple[int, int]:
        return max(len(contexts[row].prompt) for row in part), len(contexts[part[0]].decoder)

    def tokens(part: Sequence[int]) -> int:
        return len(part) * (sum(sizes(part)) + new)

    def fits(part: Sequence[int]) -> bool:
        if tokens(part) > _learnt.get(model, tokens(part)):
            return False
        a_row = None if room is None else row_bytes(model, *sizes(part), new)
        return room is None or a_row is None or len(part) * a_row <= room

    def warn(part: Sequence[int]) -> None:
        _learnt[model] = tokens(part) // 2
        log.warning(
            "%d questions of up to %d tokens, and %d generated, do not fit in memory together: continuing in halves",
            *(len(part), sum(sizes(part)), new),
        )

    def error_for(row: int) -> EnvironmentFault:
        free = f" of {device} ({memory.free / GIB:.3g} GiB free)" if memory is not None else ""
        return EnvironmentFault(
            f"a question of {sum(sizes([row]))} tokens, and up to {new} generated, does not fit in the memory{free}",
            "generate fewer tokens (evaluate.max_new_tokens), or decode in bfloat16 (evaluate.bf16=true)",
        )

    return in_halves(rows, run, error_for, fits=fits, on_halving=warn)


def row_bytes(model: Any, prompt: int, decoder: int, new: int) -> float | None:
    """Bytes that one row of a batch takes at most, besides the weights; None for an architecture of another kind.

    `prompt` tokens are read at once, by the encoder if there is one; then its decoder begins with `decoder` tokens.
    Counted are keys and values of all layers (those of one twice, while they grow), the activations of the layer that
    reads the prompt with its attention's scores or mask, and logits with their float32 copies: of the last position,
    or of the whole prompt where the model computes them all.
    """
    try:
        return _row_bytes(model, prompt, decoder, new)
    except (AttributeError, TypeError):  # its config has other names
        return None


def _row_bytes(model: Any, prompt: int, decoder: int, new: int) -> float | None:
    config = model.config
    shape = getattr(config, "decoder", None) or config.get_text_config()
    item = model.get_input_embeddings().weight.element_size()
    layers = layers_of(config)
    if layers is None:
        return None
    width, heads = shape.hidden_size, shape.num_attention_heads
    each = getattr(shape, "head_dim", None) or getattr(shape, "d_kv", None) or width // heads
    keys = each * (getattr(shape, "num_key_value_heads", None) or heads)
    inner = getattr(shape, "intermediate_size", None) or getattr(shape, "d_ff", None) or 4 * width
    seq2seq = bool(config.is_encoder_decoder)
    begins = decoder if seq2seq else prompt
    cached = begins + new + (prompt if seq2seq else 0)
    cache = 2.0 * (layers + 1) * keys * item * cached
    activations = float(prompt * (6 * width + 3 * inner + heads * each + 2 * keys) * item)
    scores = getattr(config, "_attn_implementation", "eager") == "eager" or hasattr(
        shape, "relative_attention_num_buckets"
    )
    attention = float(prompt * prompt * (heads * (4 + 2 * item) if scores else item))
    last = seq2seq or "logits_to_keep" in inspect.signature(type(model).forward).parameters
    vocabulary = shape.vocab_size
    logits = 4.0 * 4 * vocabulary + vocabulary * item * (1 if last else begins)
    return float(cache + activations + attention + logits)
