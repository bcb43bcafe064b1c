"""The operators as torch.library sees them: opcheck, and torch.compile without a graph break."""

import pytest
import torch
from torch import nn

from pst_dist.kernels import ops, reference
from pst_dist.kernels.head import combined_head, span_tap
from pst_dist.kernels.ops import row_distance, span_mean
from pst_dist.kernels.spans import Spans, Supervised


def setup(batch=2, length=16, width=6, vocabulary=11):
    torch.manual_seed(batch)
    hidden = torch.randn(batch, length, width)
    places = [(row, 1 + row, 3 + row) for row in range(batch)]
    rows = [row * length for row in range(batch)]
    spans = Spans.of(places, batch=batch, length=length)
    supervised = Supervised.of(rows, [row % vocabulary for row in rows], positions=batch * length)
    return hidden, spans, supervised, nn.Linear(width, vocabulary)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype):
    hidden, spans, supervised, head = setup()
    hidden = hidden.to(dtype)
    maps = (spans.rows, spans.starts, spans.lengths, spans.owner, spans.longest)
    torch.library.opcheck(torch.ops.pst.span_mean.default, (hidden.requires_grad_(), *maps))
    student, teacher = torch.randn(4, 7, dtype=dtype, requires_grad=True), torch.randn(4, 7)
    for kind in ("cosine", "smooth_l1"):
        torch.library.opcheck(torch.ops.pst.row_distance.default, (student, teacher, kind, 1e-8))
        statistics = torch.rand(4, 3)
        arguments = (student.detach(), teacher, statistics, torch.rand(4), kind, 1e-8)
        torch.library.opcheck(torch.ops.pst.row_distance_gradient.default, arguments)
    rows, upstream = torch.randn(2, 6).to(dtype), torch.tensor(2.0)
    pooled = torch.randn(2, 6)
    hidden = hidden.detach()
    for base, row_part, span_part in ((None, True, True), (hidden, False, True), (None, True, False)):
        arguments = (rows, upstream, supervised.slots) if row_part else (None, None, None)
        torch.library.opcheck(
            ops.hidden_gradient,
            (hidden, base, *arguments, pooled if span_part else None, spans.lengths, spans.owner),
        )
    weight, bias = (parameter.detach().to(dtype) for parameter in (head.weight, head.bias))
    for with_bias, weights, moves in ((bias, torch.rand(2), True), (None, torch.rand(2), False), (bias, None, False)):
        arguments = (rows, weight, with_bias, supervised.targets, weights, 1, moves)
        torch.library.opcheck(ops.linear_nll, arguments)


def loss_path(hidden, head, project, teacher, supervised, weights, spans):
    """What a training step does between the last layer and the scalar loss."""
    output = combined_head(hidden, head, supervised, weights, spans)
    distance, cosine = row_distance(project(output.pooled), teacher, kind="cosine")
    return output.loss + distance.sum(), cosine


def test_the_whole_loss_path_compiles_without_a_break_and_gives_the_same_bits():
    torch._dynamo.reset()
    compiled = torch.compile(loss_path, fullgraph=True, backend="aot_eager")
    for batch in (2, 3, 5):
        hidden, spans, supervised, head = setup(batch)
        project, teacher, weights = nn.Linear(6, 4, bias=False), torch.randn(batch, 4), torch.rand(batch)
        results = []
        for run in (loss_path, compiled):
            leaf = hidden.clone().requires_grad_()
            loss, cosine = run(leaf, head, project, teacher, supervised, weights, spans)
            sources = [leaf, *head.parameters(), *project.parameters()]
            results.append((loss.detach(), cosine, *torch.autograd.grad(loss * 3, sources)))
        for eager, traced in zip(*results, strict=True):
            assert torch.equal(eager, traced)


def test_the_tap_compiles_without_a_break():
    torch._dynamo.reset()
    hidden, spans, _, _ = setup()

    def run(leaf):
        onward, pooled = span_tap(torch.tanh(leaf), spans)
        return onward.square().sum() + pooled.sum()

    leaf = hidden.requires_grad_()
    (eager,) = torch.autograd.grad(run(leaf), leaf)
    (traced,) = torch.autograd.grad(torch.compile(run, fullgraph=True, backend="aot_eager")(leaf), leaf)
    torch.testing.assert_close(eager, traced)
    pooled = span_mean(leaf, spans)
    assert pooled.shape == (2, 6)


@pytest.mark.parametrize("kind", ["", "l2", "COSINE", "smooth-l1", "huber"])
def test_an_unknown_distance_raises_instead_of_being_another_one(kind):
    student, teacher = torch.randn(3, 4, requires_grad=True), torch.randn(3, 4)
    statistics, upstream = torch.ones(3, 3), torch.ones(3)
    with pytest.raises(ValueError, match="unknown row distance"):
        ops.row_distance(student, teacher, kind=kind)
    with pytest.raises(ValueError, match="unknown row distance"):
        reference.row_distance(student, teacher, kind, 1e-8)
    with pytest.raises(ValueError, match="unknown row distance"):
        reference.row_distance_gradient(student, teacher, statistics, upstream, kind, 1e-8)
