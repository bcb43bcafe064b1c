"""Students that really refuse large passes: a hook raises torch's own out-of-memory error in their forward or backward.

The rest of a training, a decoding or an embedding is as always.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

SAID = "CUDA out of memory. Tried to allocate 2.00 GiB."


class Refusing:
    """Counts the passes of a model, and refuses those of more than `tokens` positions, cached ones included."""

    def __init__(self, tokens: int, *, after: int = 0, backward: bool = False) -> None:
        """`after` passes are let through first; with `backward` it is the backward pass that fails."""
        self.tokens, self.after, self.backward = tokens, after, backward
        self.seen: list[int] = []
        """Positions of each pass that was asked for."""
        self.refused = 0

    def watch(self, model: Any) -> Any:
        """Attach to a transformers model; returns it."""
        model.register_forward_pre_hook(self._before, with_kwargs=True)
        model.get_output_embeddings().register_forward_pre_hook(self._at_the_head)
        return model

    def watch_encoder(self, model: Any) -> None:
        """Attach to the model of a SentenceTransformer, which calls its `forward` past all hooks."""
        model.get_input_embeddings().register_forward_pre_hook(lambda module, args: self._judge(args[0].numel()))

    def _before(self, model: Any, args: Any, kwargs: dict[str, Any]) -> None:
        ids, mask, target = (kwargs.get(name) for name in ("input_ids", "attention_mask", "decoder_input_ids"))
        cache = kwargs.get("cache") or kwargs.get("past_key_values")  # transformers renamed it in version 5
        if mask is None and ids is not None:  # `generate` leaves out a mask of ones
            positions = ids.numel() + len(ids) * (int(cache.get_seq_length()) if cache is not None else 0)
        else:
            positions = sum(one.numel() for one in (mask, target) if one is not None)
        self._judge(positions)

    def _judge(self, positions: int) -> None:
        self.seen.append(positions)
        self._too_large = positions > self.tokens and len(self.seen) > self.after
        if self._too_large and not self.backward:
            self.refuse()

    def _at_the_head(self, head: Any, args: Any) -> None:
        if self._too_large and self.backward and args[0].requires_grad:
            args[0].register_hook(lambda gradient: self.refuse())

    def refuse(self) -> None:
        """Run out of memory."""
        self.refused += 1
        raise torch.OutOfMemoryError(SAID)


@contextlib.contextmanager
def refusing_students(refusing: Refusing, dropout: float = 0.0) -> Iterator[Refusing]:
    """Let every student that a training builds in this block refuse large passes, and drop out."""
    from pst_dist.training import parts

    build = parts.build_student

    def built(*args: Any, **kwargs: Any) -> Any:
        student = build(*args, **kwargs)
        refusing.watch(student.model)
        for module in student.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = dropout
        return student

    parts.build_student = built
    try:
        yield refusing
    finally:
        parts.build_student = build
