"""InfoNCE in chunks against cross-entropy over the full matrix of scores, in values, gradients, memory and tracing."""

import importlib.util
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pst_dist.kernels import contrastive
from pst_dist.kernels.contrastive import info_nce

TEMPERATURE = 0.07
# Rows, keys, width: in-batch, keys beyond the batch (a bank), one key, odd widths, no rows, no keys either.
SHAPES = [(7, 7, 5), (5, 33, 17), (40, 130, 31), (1, 1, 3), (6, 1, 4), (1, 50, 1), (0, 9, 8), (0, 0, 8)]


def problem(rows, keys, width, *, dtype=torch.float64, groups=4, seed=0) -> tuple[Tensor, ...]:
    """Unit vectors near their own keys; about `groups` keys a group; the same key may be several rows' own."""
    draw = torch.Generator().manual_seed(seed)
    keys_GE = F.normalize(torch.randn(keys, width, generator=draw, dtype=torch.float64), dim=-1)
    own = torch.randint(max(1, keys), (rows,), generator=draw)
    near = torch.randn(rows, width, generator=draw, dtype=torch.float64) + (keys_GE[own] if keys else 0)
    key_groups = torch.randint(max(1, keys // groups), (keys,), generator=draw)
    return F.normalize(near, dim=-1).to(dtype), keys_GE.to(dtype), own, key_groups[own] if keys else own, key_groups


def full_matrix(queries, keys, own, groups, key_groups, *, temperature=TEMPERATURE, valid=None) -> Tensor:
    """The definition: cross-entropy over all scores, the left out ones at minus infinity."""
    scores = queries @ keys.T / temperature
    columns = torch.arange(len(keys))
    left_out = (groups[:, None] == key_groups[None]) & (columns[None] != own[:, None])
    if valid is not None:
        left_out |= ~valid[None]
    return F.cross_entropy(scores.masked_fill(left_out, -math.inf), own, reduction="none")


def with_gradients(function, inputs, *, learning, upstream, **options) -> tuple[Tensor, ...]:
    """(losses, gradient of sum(upstream * losses) to each of the first `learning` inputs)."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs[:learning]]
    losses = function(*leaves, *inputs[learning:], **options)
    return losses.detach(), *torch.autograd.grad(losses, leaves, upstream.to(losses.dtype))


@pytest.fixture(params=[None, 3], ids=["one chunk", "three rows a chunk"])
def chunked(request, monkeypatch):
    """Chunks of the real size, and of three rows of up to 64 float64 keys."""
    if request.param:
        monkeypatch.setattr(contrastive, "CHUNK_BYTES", request.param * 64 * 8)


@pytest.mark.parametrize("learning", [1, 2], ids=["frozen keys", "keys learn"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_losses_and_gradients_are_those_of_the_full_matrix(shape, learning, chunked):
    inputs = problem(*shape)
    upstream = torch.linspace(-1, 2, shape[0], dtype=torch.float64)
    found = with_gradients(info_nce, inputs, learning=learning, upstream=upstream, temperature=TEMPERATURE)
    expected = with_gradients(full_matrix, inputs, learning=learning, upstream=upstream)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("learning", [1, 2], ids=["frozen keys", "keys learn"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_in_narrow_dtypes_errors_are_at_most_twice_those_of_torch(dtype, learning, chunked):
    inputs = problem(40, 130, 31, dtype=dtype)
    upstream = torch.linspace(-1, 2, 40)
    exact_inputs = [tensor.double() if tensor.is_floating_point() else tensor for tensor in inputs]
    exact = with_gradients(full_matrix, exact_inputs, learning=learning, upstream=upstream)
    found = with_gradients(info_nce, inputs, learning=learning, upstream=upstream, temperature=TEMPERATURE)
    torchs = with_gradients(full_matrix, inputs, learning=learning, upstream=upstream)
    assert found[0].dtype == torch.float32 and all(tensor.dtype == dtype for tensor in found[1:])
    for ours, theirs, truth in zip(found, torchs, exact, strict=True):
        error, allowed = ((tensor.double() - truth).norm() / truth.norm() for tensor in (ours, theirs))
        assert error <= 2 * allowed + 1e-7
    assert (found[0] - exact[0]).abs().max() < 1e-5, "the loss itself is added up in float32"


def test_gradcheck_with_groups_padding_and_keys_that_learn(chunked):
    queries, keys, own, groups, key_groups = problem(7, 12, 5)
    valid = torch.ones(12, dtype=torch.bool)
    valid[[column for column in range(12) if column not in own.tolist()][:2]] = False

    def losses(queries, keys):
        return info_nce(queries, keys, own, groups, key_groups, temperature=0.5, valid_G=valid)

    both = (queries.requires_grad_(), keys.requires_grad_())
    assert torch.autograd.gradcheck(losses, both)
    assert torch.autograd.gradcheck(losses, (queries, keys.detach()))
    assert torch.autograd.gradcheck(losses, (queries.detach(), keys))


def test_a_chunk_too_small_for_one_row_still_takes_one(monkeypatch):
    inputs = problem(5, 33, 17)
    whole = info_nce(*inputs, temperature=TEMPERATURE)
    monkeypatch.setattr(contrastive, "CHUNK_BYTES", 1)
    torch.testing.assert_close(info_nce(*inputs, temperature=TEMPERATURE), whole, rtol=1e-13, atol=1e-13)


def test_padding_is_nobodys_candidate_whatever_it_holds():
    queries, keys, own, groups, key_groups = problem(6, 10, 5)
    valid = torch.ones(13, dtype=torch.bool)
    valid[[0, 4, 11]] = False
    places = valid.nonzero()[:, 0]
    padded, padded_groups = torch.full((13, 5), 3.0, dtype=torch.float64), torch.full((13,), 999)
    padded[places], padded_groups[places] = keys, key_groups
    inputs = (queries, padded, places[own], groups, padded_groups)
    found = with_gradients(info_nce, inputs, learning=2, upstream=torch.ones(6), temperature=TEMPERATURE, valid_G=valid)
    expected = with_gradients(full_matrix, (queries, keys, own, groups, key_groups), learning=2, upstream=torch.ones(6))
    torch.testing.assert_close(found[0], expected[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found[1], expected[1], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found[2][valid], expected[2], rtol=1e-12, atol=1e-12)
    assert not found[2][~valid].any()
    frozen = info_nce(*inputs, temperature=TEMPERATURE, valid_G=valid)
    torch.testing.assert_close(frozen, expected[0], rtol=1e-12, atol=1e-12)


def test_a_row_left_with_its_own_key_alone_has_no_loss_and_no_gradient():
    queries, keys, own, _, _ = problem(4, 9, 5)
    one_group = torch.zeros(9, dtype=torch.int64)
    for learning in (1, 2):
        losses, *gradients = with_gradients(
            info_nce,
            (queries, keys, own, one_group[own], one_group),
            learning=learning,
            upstream=torch.ones(4),
            temperature=TEMPERATURE,
        )
        assert torch.equal(losses, torch.zeros(4, dtype=torch.float64))
        assert not any(gradient.abs().max() > 1e-15 for gradient in gradients)


def test_a_group_that_no_key_has_leaves_nothing_out_and_copies_of_the_own_key_count():
    """Four copies of one key, all candidates: each gets a quarter, and the loss is log 4."""
    key = F.normalize(torch.tensor([[1.0, 2.0]], dtype=torch.float64), dim=-1)
    keys, own = key.repeat(4, 1), torch.tensor([2])
    losses = info_nce(key, keys, own, torch.tensor([-1]), torch.arange(4), temperature=0.1)
    assert losses.item() == pytest.approx(math.log(4), abs=1e-12)
    losses = info_nce(key, keys, own, torch.tensor([0]), torch.tensor([0, 0, 0, 1]), temperature=0.1)
    assert losses.item() == pytest.approx(math.log(2), abs=1e-12), "the own key stays, though of the row's group"


def test_any_strides_give_the_same():
    queries, keys, own, groups, key_groups = problem(6, 20, 5)
    upstream = torch.ones(1, dtype=torch.float64).expand(6)
    dense = with_gradients(
        info_nce, (queries, keys, own, groups, key_groups), learning=2, upstream=upstream, temperature=TEMPERATURE
    )
    wide = torch.full((20, 2 * 5 + 1), 9.0, dtype=torch.float64)
    wide[:, 1::2] = keys
    for odd_queries, odd_keys in ((queries.T.contiguous().T, wide[:, 1::2]), (queries.repeat(2, 1)[6:], keys)):
        for leaf_queries, leaf_keys in ((True, False), (True, True)):
            left, right = odd_queries.detach(), odd_keys.detach()
            left, right = left.requires_grad_(leaf_queries), right.requires_grad_(leaf_keys)
            losses = info_nce(left, right, own, groups, key_groups, temperature=TEMPERATURE)
            torch.testing.assert_close(losses, dense[0], rtol=1e-13, atol=1e-13)
            gradients = torch.autograd.grad(losses, [left, right][: 1 + leaf_keys], upstream)
            for found, expected in zip(gradients, dense[1:], strict=False):
                torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_the_graph_can_be_kept_and_gradients_stay_the_same():
    for learning in (1, 2):
        inputs = problem(6, 20, 5)
        leaves = [tensor.clone().requires_grad_() for tensor in inputs[:learning]]
        losses = info_nce(*leaves, *inputs[learning:], temperature=TEMPERATURE)
        first = torch.autograd.grad(losses.sum(), leaves, retain_graph=True)
        twice = torch.autograd.grad(losses.sum() * 2, leaves)
        for once, double in zip(first, twice, strict=True):
            torch.testing.assert_close(2 * once, double, rtol=1e-14, atol=0)


def test_a_second_derivative_is_refused_not_wrong():
    for learning in (1, 2):
        inputs = problem(6, 20, 5)
        leaves = [tensor.clone().requires_grad_() for tensor in inputs[:learning]]
        upstream = torch.ones(6, dtype=torch.float64, requires_grad=True)
        losses = info_nce(*leaves, *inputs[learning:], temperature=TEMPERATURE)
        gradient = torch.autograd.grad(losses, leaves[0], upstream, create_graph=True)[0]
        with pytest.raises(RuntimeError, match=r"no autograd formula|does not require grad"):
            gradient.sum().backward()


class LargestStorage(TorchDispatchMode):
    """Remembers the operators that ran and the largest storage, in bytes, that one of them returned."""

    def __init__(self) -> None:
        super().__init__()
        self.nbytes, self.operators = 0, []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        results = operator(*args, **(kwargs or {}))
        self.operators.append(str(operator))
        for result in tree_leaves(results):
            if isinstance(result, Tensor):
                self.nbytes = max(self.nbytes, result.untyped_storage().nbytes())
        return results


def test_no_tensor_is_larger_than_a_chunk(monkeypatch):
    """300 rows of 500 keys are 1.2 MB of scores in float64; nothing beyond 64 KiB is made."""
    monkeypatch.setattr(contrastive, "CHUNK_BYTES", 64 << 10)
    tensors = (*problem(300, 500, 16), None)
    upstream = torch.ones(300, dtype=torch.float64)
    with LargestStorage() as full:
        full_matrix(*tensors[:5])
    assert full.nbytes == 300 * 500 * 8
    for operator, more in (
        (contrastive._info_nce_frozen, (1.0, True)),
        (contrastive._info_nce, (1.0,)),
        (contrastive._info_nce_gradients, (upstream, 1.0, True, True)),
    ):
        # The operator's own body: a dispatch mode sees the operator as a whole only.
        with LargestStorage() as ours:
            operator._init_fn(*tensors, *more)
        assert ours.nbytes <= 64 << 10, operator
        assert any("addmm" in name for name in ours.operators), "the mode must have seen inside"


def test_without_gradients_only_losses_are_computed():
    queries, *rest = problem(6, 20, 5)
    queries.requires_grad_()
    with torch.no_grad():
        assert not info_nce(queries, *rest, temperature=TEMPERATURE).requires_grad
    with LargestStorage() as seen:
        _, gradient = contrastive._info_nce_frozen._init_fn(queries.detach(), *rest, None, 1.0, False)
    assert gradient.numel() == 0 and not any("mm.out" in name and "addmm" not in name for name in seen.operators)


def test_autocast_changes_nothing():
    """Vectors that were normalised in float32 are not rounded to bfloat16 before they are compared."""
    inputs = problem(6, 20, 5, dtype=torch.float32)
    for learning in (1, 2):
        plain = with_gradients(info_nce, inputs, learning=learning, upstream=torch.ones(6), temperature=TEMPERATURE)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            cast = with_gradients(info_nce, inputs, learning=learning, upstream=torch.ones(6), temperature=TEMPERATURE)
        assert all(torch.equal(one, other) for one, other in zip(plain, cast, strict=True))


def test_queries_and_keys_of_two_dtypes_are_refused():
    queries, keys, *rest = problem(6, 20, 5)
    with pytest.raises(AssertionError, match=r"float64.*float32"):
        info_nce(queries, keys.float(), *rest, temperature=TEMPERATURE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(dtype):
    queries, keys, *rest = problem(6, 20, 5, dtype=dtype)
    valid = torch.ones(20, dtype=torch.bool)
    upstream = torch.rand(6)
    queries.requires_grad_()
    operators = torch.ops.pst
    torch.library.opcheck(operators.info_nce_frozen.default, (queries, keys, *rest, None, 2.0, True))
    torch.library.opcheck(operators.info_nce_frozen.default, (queries.detach(), keys, *rest, valid, 2.0, False))
    torch.library.opcheck(operators.scaled_rows.default, (queries.detach(), upstream))
    torch.library.opcheck(operators.info_nce.default, (queries, keys.clone().requires_grad_(), *rest, valid, 2.0))
    for learning in ((True, True), (False, True), (True, False)):
        arguments = (queries.detach(), keys, *rest, None, upstream, 2.0, *learning)
        torch.library.opcheck(operators.info_nce_gradients.default, arguments)


@pytest.mark.parametrize("learning", [1, 2], ids=["frozen keys", "keys learn"])
def test_after_one_recompilation_a_whole_graph_serves_any_number_of_rows(learning):
    torch._dynamo.reset()

    def loss(*inputs):
        return info_nce(*inputs, temperature=TEMPERATURE) * 3

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss, fullgraph=True, backend=counter)
    for rows in (6, 9, 13, 4):
        inputs = problem(rows, 20, 5)
        upstream = torch.rand(rows, dtype=torch.float64)
        eager = with_gradients(loss, inputs, learning=learning, upstream=upstream)
        traced = with_gradients(compiled, inputs, learning=learning, upstream=upstream)
        assert all(torch.equal(one, other) for one, other in zip(eager, traced, strict=True))
    assert counter.frame_count == 2


# (what stands in contrastive.py, what it becomes)
MUTATIONS = {
    "the upstream gradient of frozen keys is lost": ("rows_AE, factors_A[:, None]", "rows_AE, factors_A[:, None] ** 0"),
    "the upstream gradient of keys that learn is lost": ("= upstream_A * scale", "= upstream_A**0 * scale"),
    "the temperature is lost in the gradient": ("new_full(nll_A.shape, scale)", "new_full(nll_A.shape, 1.0)"),
    "the temperature is lost in the scores": ("keys_GE.T, alpha=scale, out", "keys_GE.T, out"),
    "padding is a candidate": ("masked_fill_(~valid_G,", "masked_fill_(valid_G != valid_G,"),
    "keys learn from the last chunk only": ("keys_gradient_GE.addmm_(", "keys_gradient_GE.zero_().addmm_("),
    "queries of the first chunk": (
        "torch.addmm(offset_G, queries_AE[here]",
        "torch.addmm(offset_G, queries_AE[: len(scores)]",
    ),
    "groups of the first chunk": (
        "groups_A[here], key_groups_G, asked",
        "groups_A[: len(scores_CG)], key_groups_G, asked",
    ),
    "the gradient of the queries goes nowhere": ("torch.ops.pst.scaled_rows(gradient_AE, upstream_A), *", "None, *"),
}


def is_right(module, monkeypatch) -> bool:
    """Whether a version of the module gives the full matrix's losses and gradients, in chunks and with padding."""
    monkeypatch.setattr(module, "CHUNK_BYTES", 3 * 32 * 8)
    inputs = problem(7, 20, 5)
    valid = torch.ones(20, dtype=torch.bool)
    valid[[key for key in range(20) if key not in inputs[2]][:3]] = False
    upstream = torch.linspace(-1, 2, 7, dtype=torch.float64)
    for learning in (1, 2):
        options = {"learning": learning, "upstream": upstream}
        expected = with_gradients(full_matrix, inputs, valid=valid, **options)
        try:
            found = with_gradients(module.info_nce, inputs, temperature=TEMPERATURE, valid_G=valid, **options)
        except RuntimeError:
            return False
        if not all(torch.allclose(ours, theirs, rtol=1e-9) for ours, theirs in zip(found, expected, strict=True)):
            return False
    return True


@pytest.mark.parametrize("mutation", [None, *MUTATIONS])
def test_a_broken_line_is_noticed(mutation, tmp_path, monkeypatch):
    source = Path(contrastive.__file__).read_text()
    before, after = MUTATIONS.get(mutation, ("return", "return"))
    assert source.count(before) == 1 or mutation is None, "the module has changed: mutate what it says now"
    # Its operators must not take the names of the real ones.
    names = f"broken_{list(MUTATIONS).index(mutation) if mutation else 'not'}"
    broken_source = source.replace(before, after).replace("pst::", f"{names}::").replace("ops.pst.", f"ops.{names}.")
    path = tmp_path / "broken.py"
    path.write_text(broken_source)
    spec = importlib.util.spec_from_file_location(names, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert is_right(module, monkeypatch) == (mutation is None)
