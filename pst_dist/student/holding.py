"""How the ranks hold a student's weights while it is built: here, whole on each rank.

ZeRO-3 divides each weight among the ranks as soon as it exists (`training.engines.dividing`), so that no rank ever
holds the whole model. Code that builds a student therefore asks a `Holding` before it reads, changes or measures a
weight.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from typing import Any


class Holding:
    """Every rank builds the whole student by itself. All methods are collective in subclasses."""

    divides = False
    """Whether a rank holds only a part of each weight."""

    def fresh(self, make: Callable[[], Any]) -> Any:
        """The model that `make` creates with random weights, drawn from the global generator."""
        return make()

    def read(self, load: Callable[[], Any]) -> Any:
        """The model that `load` reads with transformers' `from_pretrained` from a hub id or a folder."""
        return load()

    def whole(self, make: Callable[[], Any]) -> Any:
        """A model that can only be made whole, such as one merged with an adapter."""
        return make()

    def resize(self, model: Any, rows: int, multiple: int) -> None:
        """Give the model's embeddings at least `rows` rows, a multiple of `multiple`, as transformers does."""
        model.resize_token_embeddings(rows, pad_to_multiple_of=multiple)

    def gathered(self, weights: Iterable[Any]) -> contextlib.AbstractContextManager[Any]:
        """A block in which these weights are whole on every rank and may be changed alike on all."""
        return contextlib.nullcontext()

    def cast(self, weight: Any, dtype: Any) -> None:
        """Give a weight another dtype, in place."""
        weight.data = weight.data.to(dtype)

    def finish(self, student: Any) -> None:
        """Divide what is still whole, once the student is complete."""


WHOLE = Holding()


def shape_of_weight(weight: Any) -> tuple[int, ...]:
    """The shape of a weight, also of one that ZeRO-3 has divided."""
    return tuple(getattr(weight, "ds_shape", weight.shape))
