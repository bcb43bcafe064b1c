"""The three shapes of the GPU benchmark and, on tensors of such a shape, what is timed: our calls and theirs.

Hidden states come in as many copies as are needed to be larger than any cache, and calls take them in turn. "Marginal"
means what the alignment adds to a training step whose cross-entropy already writes a gradient of the hidden states:
for ours, the pass that writes both less the pass that writes one; for the others, their own forward and backward and
autograd's addition to the gradient that is there.
"""

# Shapes in this file: B sequences, T positions, D student width, E teacher width, N supervised rows, A = B spans

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from contenders import IGNORED, cross_entropy, eager_alignment
from torch import Tensor, nn

from pst_dist.kernels.dispatch import backend_for
from pst_dist.kernels.head import combined_head
from pst_dist.kernels.ops import row_distance
from pst_dist.kernels.spans import Spans, Supervised

CACHE_BYTES = 256 << 20
"""Copies of the hidden states are made until they are larger than this; an H200 has 50 MB of L2 cache."""

Run = Callable[[int], object]
"""A call of the number of the call."""


@dataclass(frozen=True)
class Shape:
    """A batch of answer-first rows: the answer's share and the rationale's, which is the span, of the positions."""

    name: str
    batch: int
    length: int
    width: int
    teacher: int
    vocabulary: int
    answer: float
    rationale: float

    @property
    def answer_tokens(self) -> int:
        """Of one row."""
        return max(1, round(self.answer * self.length))

    @property
    def span(self) -> int:
        """Positions of one row's rationale."""
        return round(self.rationale * self.length)

    @property
    def elements(self) -> int:
        """Of the hidden states."""
        return self.batch * self.length * self.width

    @property
    def head_flop(self) -> float:
        """Of the head's three matrix products, on supervised rows alone."""
        return 6.0 * self.batch * self.answer_tokens * self.width * self.vocabulary

    def tiny(self) -> Shape:
        """The same proportions at a size for a CPU and a few seconds."""
        return replace(self, batch=4, length=64, width=64, teacher=48, vocabulary=1000)


SHAPES = {
    "A": Shape("A", 64, 512, 768, 384, 50257, 0.06, 0.45),
    "B": Shape("B", 128, 512, 1536, 1024, 151936, 0.06, 0.60),
    "C": Shape("C", 64, 1024, 5120, 4096, 151936, 0.05, 0.65),
}
"""Students of about 0.1, 1.5 and 14 billion parameters."""


class Case:
    """Tensors of one shape."""

    def __init__(self, shape: Shape, device: torch.device, dtype: torch.dtype) -> None:
        self.shape, self.device, self.dtype = shape, device, dtype
        torch.manual_seed(0)
        size = (shape.batch, shape.length, shape.width)
        copies = max(1, min(8, CACHE_BYTES // (shape.elements * dtype.itemsize)))
        self.hidden = [torch.randn(size, device=device, dtype=dtype).requires_grad_() for _ in range(copies)]
        make: dict[str, Any] = {"bias": False, "device": device, "dtype": dtype}
        self.head = nn.Linear(shape.width, shape.vocabulary, **make)
        self.align = nn.Linear(shape.width, shape.teacher, **make)
        self.teacher = F.normalize(torch.randn(shape.batch, shape.teacher, device=device), dim=-1)
        first = shape.length - shape.span - shape.answer_tokens  # of the answer; the rationale follows it
        places = [(row, shape.length - shape.span, shape.span) for row in range(shape.batch)]
        self.spans = Spans.of(places, batch=shape.batch, length=shape.length).to(device)
        self.nothing = Spans.of([], batch=shape.batch, length=shape.length).to(device)
        targets = torch.randint(shape.vocabulary, (shape.batch, shape.answer_tokens))
        positions = range(first - 1, first - 1 + shape.answer_tokens)
        rows = [row * shape.length + position for row in range(shape.batch) for position in positions]
        self.supervised = Supervised.of(rows, targets.flatten().tolist(), positions=shape.batch * shape.length).to(
            device
        )
        self.labels = torch.full((shape.batch, shape.length), IGNORED, device=device)
        self.labels[:, first : first + shape.answer_tokens] = targets.to(device)
        self.mask = (self.spans.owner >= 0).view(shape.batch, shape.length)
        self.tokens = len(rows)
        self.weights = torch.full((self.tokens,), 1 / self.tokens, device=device)
        self.rows_gradient = torch.randn(self.tokens, shape.width, device=device, dtype=dtype)
        self.spans_gradient = torch.randn(shape.batch, shape.width, device=device)
        self.one = torch.ones((), device=device)

    def at(self, index: int) -> Tensor:
        """The hidden states of a call; all gradients are dropped, as at the start of a step."""
        self.forget()
        return self.hidden[index % len(self.hidden)]

    def forget(self) -> None:
        """Drop all gradients."""
        for leaf in (*self.hidden, self.head.weight, self.align.weight):
            leaf.grad = None

    def pool(self) -> Run:
        """Our means over spans."""
        backend, spans = backend_for(self.device), self.spans
        places = (spans.rows, spans.starts, spans.lengths, spans.longest)
        return lambda index: backend.span_mean(self.at(index).detach(), *places)

    def gradient(self, *, with_spans: bool) -> Run:
        """Our one pass over the gradient of the hidden states: rows of the head, and those of the spans."""
        spans = self.spans if with_spans else self.nothing
        rows = (self.rows_gradient, self.one, self.supervised.slots)
        arriving = self.spans_gradient if with_spans else None
        write = torch.ops.pst.hidden_gradient
        return lambda index: write(self.at(index).detach(), None, *rows, arriving, spans.lengths, spans.owner)

    def aligned(self) -> Run:
        """Our alignment's forward and backward with that pass; `gradient(with_spans=False)` is what CE needs anyway."""
        spans, pool = self.spans, self.pool()
        rows, write = (self.rows_gradient, self.one, self.supervised.slots), torch.ops.pst.hidden_gradient

        def run(index: int) -> Tensor:
            like = self.hidden[index % len(self.hidden)].detach()
            pooled = pool(index).requires_grad_()
            distance, _ = row_distance(self.align(pooled.to(self.dtype)), self.teacher, kind="cosine")
            (distance.sum() / len(spans)).backward()
            return write(like, None, *rows, pooled.grad, spans.lengths, spans.owner)

        return run

    def eager_pool(self, kind: str) -> Callable[[Tensor], Tensor]:
        """Means as one would write them: `naive` (masked sum), `loop` (a slice per row), `bmm` (eager torch's best)."""
        mask = self.mask
        if kind == "loop":
            first = self.shape.length - self.shape.span
            return lambda hidden: torch.stack([row[first:].float().mean(0) for row in hidden])
        if kind == "naive":
            return lambda hidden: (hidden.float() * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        shares = (mask.float() / mask.sum(1, keepdim=True)).to(self.dtype)
        return lambda hidden: torch.bmm(shares[:, None], hidden)[:, 0]

    def eager_aligned(self, kind: str, compile_with: str | None = None) -> Run:
        """Their alignment, forward and backward, its gradient added to one that is there; compiled if asked."""
        pool, arrived = self.eager_pool(kind), torch.randn_like(self.hidden[0])

        def loss(hidden: Tensor) -> Tensor:
            projected = self.align(pool(hidden).to(self.dtype))
            return (1 - F.cosine_similarity(projected.float(), self.teacher, dim=-1)).mean()

        compute = torch.compile(loss, backend=compile_with) if compile_with else loss

        def run(index: int) -> None:
            hidden = self.at(index)
            seen = hidden.view_as(hidden)
            torch.autograd.backward([compute(seen), seen], [None, arrived])

        return run

    def combined(self) -> Run:
        """Our whole loss path, forward and backward."""

        def run(index: int) -> Tensor:
            output = combined_head(self.at(index), self.head, self.supervised, self.weights, self.spans)
            distance, _ = row_distance(self.align(output.pooled.to(self.dtype)), self.teacher, kind="cosine")
            loss = output.loss + distance.mean()
            loss.backward()
            return loss

        return run

    def other(self, who: str, compile_with: str | None = None) -> Run:
        """Another library's cross-entropy with the alignment by a masked sum, forward and backward."""
        function = cross_entropy(who, self.device)

        def path(hidden: Tensor) -> Tensor:
            distance = eager_alignment(hidden, self.mask, self.align, self.teacher)
            return function(hidden, self.head, self.labels, self.tokens) + distance

        compute = torch.compile(path, backend=compile_with) if compile_with else path

        def run(index: int) -> Tensor:
            loss = compute(self.at(index))
            loss.backward()
            return loss

        return run

    @functools.cached_property
    @torch.no_grad()
    def exact_loss(self) -> float:
        """The combined loss of the first hidden states in float64, from the same rounded inputs."""
        hidden = self.hidden[0].detach()
        weight, total = self.head.weight.double(), 0.0
        picked = hidden.flatten(0, 1)[self.supervised.rows]
        for rows, targets in zip(picked.split(512), self.supervised.targets.split(512), strict=True):
            total += float(F.cross_entropy(rows.double() @ weight.T, targets, reduction="sum"))
        means = torch.stack([row[spot].double().mean(0) for row, spot in zip(hidden, self.mask, strict=True)])
        projected = means @ self.align.weight.double().T
        return total / self.tokens + float((1 - F.cosine_similarity(projected, self.teacher.double(), dim=-1)).mean())
