"""The fused head against plain autograd in float64: values, gradients, and all that a caller may do to them."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from pst_dist.errors import EnvironmentFault, InputError
from pst_dist.kernels import head as head_module
from pst_dist.kernels import ops
from pst_dist.kernels.head import combined_head, span_tap
from pst_dist.kernels.ops import row_distance, span_mean
from pst_dist.kernels.spans import Spans, Supervised

B, T, D, V = 3, 12, 8, 23
PLACES = [(0, 2, 5), (1, 3, 0), (2, 1, 11), (0, 8, 3)]
ROWS = [1, 2, 6, 15, 30, 35]


class LowRank(nn.Module):
    """A head with an adapter beside frozen weights, as LoRA makes it."""

    def __init__(self, dtype):
        super().__init__()
        self.base = nn.Linear(D, V, bias=False, dtype=dtype).requires_grad_(False)
        self.down, self.up = (nn.Linear(*shape, bias=False, dtype=dtype) for shape in ((D, 2), (2, V)))

    def forward(self, hidden):
        return self.base(hidden) + self.up(torch.tanh(self.down(hidden)))


def make(kind, dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    head = LowRank(dtype) if kind == "adapter" else nn.Linear(D, V, bias=kind == "bias", dtype=dtype)
    return head, torch.randn(B, T, D, dtype=dtype)


def problem(rows=ROWS, places=PLACES, seed=1):
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(0, V, (len(rows),), generator=generator).tolist()
    weights = torch.rand(len(rows), generator=generator, dtype=torch.float64)
    return Supervised.of(rows, targets, positions=B * T), weights, Spans.of(places, batch=B, length=T)


def plain(hidden, head, supervised, weights, places):
    """(loss, pooled) the way anyone would write them down."""
    nll = F.cross_entropy(head(hidden.flatten(0, 1)[supervised.rows]), supervised.targets, reduction="none")
    pooled = [hidden[row, start : start + count].mean(0) if count else hidden[0, 0] * 0 for row, start, count in places]
    return (nll * weights).sum(), torch.stack(pooled) if pooled else hidden.new_zeros(0, hidden.shape[-1])


def total(loss, pooled):
    """A scalar in which every output counts differently."""
    return 3 * loss + (pooled * torch.linspace(-1, 2, pooled.numel(), dtype=pooled.dtype).view_as(pooled)).sum()


@pytest.mark.parametrize("chunk", [1, 4, 64])
@pytest.mark.parametrize("kind", ["linear", "bias", "adapter"])
def test_loss_and_every_gradient_equal_plain_autograd(kind, chunk, monkeypatch):
    monkeypatch.setattr(ops, "chunk_rows", lambda *_: chunk)
    monkeypatch.setattr(head_module, "chunk_rows", lambda *_: chunk)
    head, hidden = make(kind)
    supervised, weights, spans = problem()
    mine, theirs = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    parameters = [p for p in head.parameters() if p.requires_grad]
    output = combined_head(mine, head, supervised, weights, spans)
    expected = plain(theirs, head, supervised, weights, PLACES)
    torch.testing.assert_close((output.loss, output.pooled), expected, rtol=1e-12, atol=1e-12)
    found = torch.autograd.grad(total(output.loss, output.pooled), [mine, *parameters])
    wanted = torch.autograd.grad(total(*expected), [theirs, *parameters])
    torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("kind", ["linear", "bias", "adapter"])
def test_gradcheck(kind):
    head, hidden = make(kind)
    supervised, weights, spans = problem()
    parameters = [p for p in head.parameters() if p.requires_grad]

    def run(hidden, *_):
        output = combined_head(hidden, head, supervised, weights, spans)
        return output.loss, output.pooled

    assert torch.autograd.gradcheck(run, (hidden.requires_grad_(), *parameters))


def test_gradcheck_of_pooling_the_tap_and_the_distances():
    _, hidden = make("linear")
    spans = problem()[2]
    hidden.requires_grad_()
    assert torch.autograd.gradcheck(lambda h: span_mean(h, spans), hidden)
    assert torch.autograd.gradcheck(lambda h: span_tap(h * 1.0, spans), hidden)
    student = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(5, 7, dtype=torch.float64)
    for kind in ("cosine", "smooth_l1"):
        assert torch.autograd.gradcheck(lambda s, kind=kind: row_distance(s, teacher, kind=kind)[0], student)


def test_a_second_derivative_is_refused_rather_than_wrong():
    head, hidden = make("linear")
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)
    for factor, words in ((1.0, "does not require grad"), (scale, "once_differentiable")):
        output = combined_head(hidden.requires_grad_(), head, *problem())
        (first,) = torch.autograd.grad(output.loss * factor, hidden, create_graph=True)
        with pytest.raises(RuntimeError, match=words):
            first.sum().backward()


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_ragged_spans_and_rows_of_any_kind(data):
    lengths = data.draw(st.lists(st.integers(0, T), min_size=0, max_size=B), label="one span a sequence")
    places = [(row, data.draw(st.integers(0, T - count)), count) for row, count in enumerate(lengths)]
    places = data.draw(st.permutations(places))
    rows = data.draw(st.lists(st.integers(0, B * T - 1), unique=True, max_size=9), label="supervised")
    head, hidden = make("bias")
    supervised, weights, spans = problem(rows, places)
    mine, theirs = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    output = combined_head(mine, head, supervised, weights, spans)
    expected = plain(theirs, head, supervised, weights, places)
    found = torch.autograd.grad(total(output.loss, output.pooled), [mine, *head.parameters()])
    wanted = torch.autograd.grad(
        total(*expected), [theirs, *head.parameters()], allow_unused=True, materialize_grads=True
    )
    torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("kind", ["linear", "adapter"])
def test_nothing_outside_rows_and_spans_is_read(kind):
    head, hidden = make(kind)
    supervised, weights, spans = problem()
    used = torch.zeros(B * T, dtype=torch.bool)
    used[supervised.rows] = True
    used |= spans.owner >= 0
    poisoned = hidden.clone()
    poisoned.view(B * T, D)[~used] = float("nan")
    results = []
    for tensor in (hidden, poisoned):
        tensor.requires_grad_()
        output = combined_head(tensor, head, supervised, weights, spans)
        results.append((output.loss, *torch.autograd.grad(total(output.loss, output.pooled), tensor)))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])
    assert not results[1][1].view(B * T, D)[~used].any()


@pytest.mark.parametrize("kind", ["linear", "bias", "adapter"])
def test_backward_twice_gives_twice_the_gradient(kind):
    head, hidden = make(kind)
    hidden.requires_grad_()
    parameters = [p for p in head.parameters() if p.requires_grad]
    output = combined_head(hidden, head, *problem())
    once = torch.autograd.grad(output.loss * 0.25, [hidden, *parameters], retain_graph=True)
    output.loss.backward(retain_graph=True)
    output.loss.backward()
    for parameter, quarter in zip([hidden, *parameters], once, strict=True):
        torch.testing.assert_close(parameter.grad, 8 * quarter)


def test_the_gradient_of_a_head_accumulates_over_micro_batches():
    """The first pass may hand its buffer over: the second must add to it, not to a buffer that it shares."""
    head, hidden = make("linear")
    wanted = torch.zeros_like(head.weight)
    for seed, factor in ((1, 1.0), (2, 0.5), (3, 1.0)):
        supervised, weights, spans = problem(seed=seed)
        reference = plain(hidden, head, supervised, weights, PLACES)[0] * factor
        wanted += torch.autograd.grad(reference, head.weight)[0]
        (combined_head(hidden, head, supervised, weights, spans).loss * factor).backward()
    torch.testing.assert_close(head.weight.grad, wanted)


def test_only_the_loss_or_only_the_spans_may_be_used():
    head, hidden = make("linear")
    supervised, weights, spans = problem()
    for pick in (0, 1):
        mine, theirs = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
        output = combined_head(mine, head, supervised, weights, spans)
        (found,) = torch.autograd.grad((output.loss, output.pooled.sum())[pick], mine)
        expected = plain(theirs, head, supervised, weights, PLACES)
        (wanted,) = torch.autograd.grad((expected[0], expected[1].sum())[pick], theirs)
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("what", ["hidden", "head"])
def test_a_frozen_side_gets_no_gradient_and_the_other_its_own(what):
    head, hidden = make("linear")
    supervised, weights, spans = problem()
    head.requires_grad_(what == "hidden")
    hidden.requires_grad_(what == "head")
    moving = hidden if what == "head" else head.weight
    (found,) = torch.autograd.grad(combined_head(hidden, head, supervised, weights, spans).loss, moving)
    (wanted,) = torch.autograd.grad(plain(hidden, head, supervised, weights, PLACES)[0], moving)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def test_without_gradients_only_the_values_are_made():
    head, hidden = make("linear")
    supervised, weights, spans = problem()
    with torch.no_grad():
        output = combined_head(hidden, head, supervised, weights, spans)
    assert not output.loss.requires_grad
    torch.testing.assert_close(output.loss, plain(hidden, head, supervised, weights, PLACES)[0].detach())


@pytest.mark.parametrize("kind", ["linear", "bias", "adapter"])
def test_nothing_supervised_gives_a_zero_connected_to_everything(kind):
    head, hidden = make(kind)
    hidden = torch.full_like(hidden, float("nan"), requires_grad=True)
    supervised, weights, spans = problem([], [])
    output = combined_head(hidden, head, supervised, weights, spans)
    (output.loss + output.pooled.sum()).backward()
    assert output.loss.item() == 0
    assert all(not p.grad.any() for p in [hidden, *head.parameters()] if p.requires_grad)


@pytest.mark.parametrize("shape", ["shifted", "transposed", "expanded"])
def test_hidden_states_need_not_be_contiguous(shape):
    head, hidden = make("linear")
    views = {
        "shifted": lambda x: torch.cat([x, x[:, :1] * float("nan")], 1)[:, :-1],
        "transposed": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
        "expanded": lambda x: x[:1].expand(B, T, D),
    }
    supervised, weights, spans = problem()
    mine, theirs = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    output = combined_head(views[shape](mine), head, supervised, weights, spans)
    expected = plain(theirs if shape != "expanded" else views[shape](theirs), head, supervised, weights, PLACES)
    (found,) = torch.autograd.grad(total(output.loss, output.pooled), mine)
    (wanted,) = torch.autograd.grad(total(*expected), theirs)
    torch.testing.assert_close(found.nan_to_num(), wanted, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_low_precision_is_no_worse_than_twice_torchs_own_error(dtype):
    head, hidden = make("bias", torch.float64, seed=5)
    supervised, weights, spans = problem()
    exact = hidden.to(dtype).double().requires_grad_()
    low_head = nn.Linear(D, V, dtype=dtype)
    low_head.load_state_dict({name: value.to(dtype) for name, value in head.state_dict().items()})
    head.load_state_dict({name: value.double() for name, value in low_head.state_dict().items()})
    truth = plain(exact, head, supervised, weights, PLACES)
    truth = (truth[0], *torch.autograd.grad(total(*truth), [exact, *head.parameters()]))

    def errors(run):
        leaf = hidden.to(dtype).requires_grad_()
        loss, pooled = run(leaf)
        found = (loss, *torch.autograd.grad(total(loss, pooled), [leaf, *low_head.parameters()]))
        return [((a.double() - b).norm() / b.norm()).item() for a, b in zip(found, truth, strict=True)]

    def fused(leaf):
        output = combined_head(leaf, low_head, supervised, weights.float(), spans)
        return output.loss, output.pooled

    mine = errors(fused)
    torchs = errors(lambda leaf: plain(leaf, low_head, supervised, weights.to(dtype), PLACES))
    tiny = 4 * torch.finfo(dtype).eps
    assert all(a <= 2 * b + tiny for a, b in zip(mine, torchs, strict=True)), (mine, torchs)


def test_the_loss_is_float32_and_does_not_drift_over_chunks(monkeypatch):
    """torch 2.13's own chunked loss adds bfloat16 chunks up in bfloat16 and is off by percents at 64 chunks."""
    monkeypatch.setattr(head_module, "chunk_rows", lambda *_: 4)
    torch.manual_seed(0)
    hidden = torch.randn(1, 256, 16, dtype=torch.bfloat16)
    head = nn.Linear(16, 997, bias=False, dtype=torch.bfloat16)
    rows = list(range(256))
    supervised = Supervised.of(rows, [row % 997 for row in rows], positions=256)
    nothing = Spans.of([], batch=1, length=256)
    output = combined_head(hidden, head, supervised, torch.full((256,), 1 / 256), nothing)
    exact = F.cross_entropy(hidden[0].double() @ head.weight.double().T, supervised.targets, reduction="none")
    assert output.loss.dtype == output.nll.dtype == torch.float32
    assert output.loss.item() == pytest.approx(exact.mean().item(), rel=1e-3)
    assert (output.nll - exact).abs().max() < 0.01, "a likelihood of 7 nats rounded to bfloat16 is off by 0.016"


def test_a_long_span_is_summed_in_float32():
    """A running sum in bfloat16 stops growing at 256."""
    hidden = torch.ones(1, 4000, 2, dtype=torch.bfloat16)
    pooled = span_mean(hidden, Spans.of([(0, 0, 4000)], batch=1, length=4000))
    assert pooled.dtype == torch.float32 and pooled.tolist() == [[1.0, 1.0]]


def test_autocast_is_honoured():
    head, hidden = make("linear", torch.float32)
    supervised, weights, spans = problem()
    seen = []
    real = ops.backend_for(hidden.device).softmax_nll
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = combined_head(hidden.requires_grad_(), head, supervised, weights.float(), spans)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                ops.backend_for(hidden.device),
                "softmax_nll",
                lambda logits, *rest: (seen.append(logits.dtype), real(logits, *rest))[1],
            )
            combined_head(hidden, head, supervised, weights.float(), spans)
    output.loss.backward()
    assert seen == [torch.bfloat16] and output.loss.dtype == torch.float32
    assert head.weight.grad.dtype == torch.float32 and hidden.grad.dtype == torch.float32


def test_logits_in_memory_do_not_grow_with_the_tokens():
    """The largest tensor made is a chunk of logits or the head's own gradient, however many rows are supervised."""
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            made = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
            self.numel = max([self.numel, *made])
            return result

    positions, vocabulary = 8192, 3000
    head = nn.Linear(4, vocabulary, bias=False)
    hidden = torch.randn(1, positions, 4, requires_grad=True)
    rows = list(range(positions))
    supervised = Supervised.of(rows, [0] * positions, positions=positions)
    spans = Spans.of([], batch=1, length=positions)
    chunk = ops.chunk_rows(vocabulary, 4, 4, hidden.device)
    with Largest() as seen:
        combined_head(hidden, head, supervised, torch.ones(positions), spans).loss.backward()
    assert chunk < positions and seen.numel <= max(chunk * vocabulary, positions * 4)


def test_the_squares_are_those_of_the_gradient_at_each_row():
    head, hidden = make("bias")
    supervised, weights, spans = problem()
    output = combined_head(hidden.requires_grad_(), head, supervised, weights, spans, with_squares=True)
    (gradient,) = torch.autograd.grad(output.loss, hidden)
    torch.testing.assert_close(output.squares, gradient.view(B * T, D)[supervised.rows].square().sum(-1))


def test_an_empty_weight_is_named():
    head, hidden = make("linear")
    head.weight = nn.Parameter(torch.empty(0, dtype=torch.float64))
    with pytest.raises(EnvironmentFault, match="ZeRO-3"):
        combined_head(hidden, head, *problem())


def test_overlapping_spans_and_duplicate_rows_are_refused():
    with pytest.raises(InputError, match="spans 0 and 1 of sequence 1 overlap"):
        Spans.of([(1, 2, 3), (1, 4, 2)], batch=B, length=T)
    with pytest.raises(InputError, match="outside"):
        Spans.of([(1, 2, T)], batch=B, length=T)
    with pytest.raises(InputError, match="duplicate supervised row"):
        Supervised.of([3, 4, 3], [0, 0, 0], positions=B * T)
    with pytest.raises(InputError, match="are outside a batch"):
        Supervised.of([B * T], [0], positions=B * T)


def test_the_bits_of_a_span_do_not_depend_on_its_neighbours():
    torch.manual_seed(3)
    values = torch.randn(700, 33)
    alone = torch.zeros(1, 700, 33)
    alone[0] = values
    packed = torch.randn(3, 1500, 33)
    packed[2, 650:1350] = values
    first = span_mean(alone, Spans.of([(0, 0, 700)], batch=1, length=700))
    second = span_mean(packed, Spans.of([(0, 0, 31), (2, 650, 700), (1, 7, 1400)], batch=3, length=1500))
    assert torch.equal(first[0], second[1])
