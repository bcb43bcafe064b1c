"""The fused pass of InfoNCE against float64, and when it is taken; chunks on Triton's softmax kernel too."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from exactness import DTYPES, assert_agrees, exactly, relative_error
from torch import Tensor
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from pst_dist.kernels import contrastive, contrastive_kernels, launch_table
from pst_dist.kernels.contrastive import info_nce
from pst_dist.kernels.contrastive_kernels import WIDEST, contrastive_pass, disagreement, serves

# Rows, keys, width: one of each; around blocks of 32 and 64 rows and keys; every launch, whole and with odd columns.
SHAPES = [
    (1, 1, 1),
    (3, 2, 33),
    (64, 64, 128),
    (65, 129, 48),
    (63, 65, 256),
    (31, 70, 257),
    (33, 97, 384),
    (70, 33, 512),
]
SCALE = 5.0


def problem(rows: int, keys: int, width: int, dtype: torch.dtype, *, nearness: float = 1.0) -> tuple[Tensor, ...]:
    """Unit vectors, the queries near their own keys; three keys a group, spread over the keys."""
    draw = torch.Generator().manual_seed(rows + keys + width)
    keys_GE = F.normalize(torch.randn(keys, width, generator=draw), dim=-1).to(dtype)
    own = torch.randint(keys, (rows,), generator=draw)
    noise = F.normalize(torch.randn(rows, width, generator=draw), dim=-1)
    key_groups = torch.randint(max(1, keys // 3), (keys,), generator=draw)
    return F.normalize(noise + nearness * keys_GE[own], dim=-1).to(dtype), keys_GE, own, key_groups[own], key_groups


def full_matrix(queries, keys, own, groups, key_groups, scale=SCALE) -> tuple[Tensor, Tensor]:
    """(losses, gradient of their sum) by operators of torch in the dtype of the inputs."""
    queries = queries.detach().clone().requires_grad_()
    left_out = groups[:, None] == key_groups[None]
    left_out.scatter_(1, own[:, None], False)
    scores = (scale * queries @ keys.T).masked_fill(left_out, -math.inf)
    losses = F.cross_entropy(scores.float() if scores.dtype != torch.float64 else scores, own, reduction="none")
    return losses.detach(), torch.autograd.grad(losses.sum(), queries)[0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_losses_and_gradients(shape, dtype) -> None:
    inputs = problem(*shape, dtype)
    exact = full_matrix(exactly(inputs[0]), exactly(inputs[1]), *inputs[2:])
    own = full_matrix(*inputs)
    losses, gradient = contrastive_pass(*inputs, SCALE)
    assert losses.dtype == torch.float32 and gradient.dtype == dtype
    assert_agrees(losses, exact[0], own[0])
    assert_agrees(gradient, exact[1], own[1], gradient=True)


def test_a_row_that_has_nearly_found_its_key_keeps_its_digits() -> None:
    """Losses of 1e-6: log of the sum less the own score, or a mean less the own key, would leave nothing of them."""
    inputs = problem(40, 70, 64, torch.bfloat16, nearness=3.0)
    exact, exact_gradient = full_matrix(exactly(inputs[0]), exactly(inputs[1]), *inputs[2:], scale=25.0)
    own, own_gradient = full_matrix(*inputs, scale=25.0)
    losses, gradient = contrastive_pass(*inputs, 25.0)
    assert exact.median() < 1e-6
    assert relative_error(losses, exact) < 1e-5 < 0.01 < relative_error(own, exact)
    assert relative_error(gradient, exact_gradient) < 0.01 < relative_error(own_gradient, exact_gradient)


def test_a_row_left_with_its_own_key_alone_has_no_loss_and_no_gradient() -> None:
    queries, keys, own, _, _ = problem(5, 70, 48, torch.float16)
    one_group = torch.zeros(70, dtype=torch.int64)
    losses, gradient = contrastive_pass(queries, keys, own, one_group[:5], one_group, SCALE)
    assert torch.equal(losses, torch.zeros(5)) and not gradient.any()


def test_no_rows() -> None:
    queries, *rest = problem(1, 9, 48, torch.float16)
    losses, gradient = contrastive_pass(queries[:0], rest[0], rest[1][:0], rest[2][:0], rest[3], SCALE)
    assert losses.shape == (0,) and gradient.shape == (0, 48)


def test_groups_are_compared_in_all_64_bits() -> None:
    queries, keys, own, _, _ = problem(5, 70, 48, torch.float16)
    apart = torch.arange(70) << 32
    expected, _ = contrastive_pass(queries, keys, own, torch.arange(70)[own], torch.arange(70), SCALE)
    losses, _ = contrastive_pass(queries, keys, own, apart[own], apart, SCALE)
    assert torch.equal(losses, expected)


def test_an_own_key_outside_the_keys_gives_nan_and_only_there() -> None:
    queries, keys, own, groups, key_groups = problem(5, 70, 48, torch.float16)
    expected, expected_gradient = contrastive_pass(queries, keys, own, groups, key_groups, SCALE)
    own[1], own[3] = 70, -1
    losses, gradient = contrastive_pass(queries, keys, own, groups, key_groups, SCALE)
    wrong, right = [1, 3], [0, 2, 4]
    assert losses[wrong].isnan().all() and gradient[wrong].isnan().all()
    assert torch.equal(losses[right], expected[right]) and torch.equal(gradient[right], expected_gradient[right])


@pytest.mark.parametrize("width", (48, 300))
def test_any_strides_and_nothing_beside_the_vectors_is_read(width) -> None:
    inputs = problem(20, 70, width, torch.float16)
    expected = contrastive_pass(*inputs, SCALE)
    queries, keys, own, groups, key_groups = inputs
    framed = []
    for rows in (queries, keys):
        frame = torch.full((len(rows) + 3, width + 16), torch.nan, dtype=rows.dtype)
        frame[1:-2, 8:-8] = rows
        framed.append(frame[1:-2, 8:-8])
    columns = [rows.T.contiguous().T for rows in (queries, keys)]
    spread = [numbers.repeat_interleave(2)[::2] for numbers in (own, groups, key_groups)]
    for vectors in (framed, columns):
        found = contrastive_pass(*vectors, *spread, SCALE)
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_a_rows_bits_depend_on_nothing_but_the_row_and_the_keys(monkeypatch) -> None:
    def dot(self, left, right, total, *precision):
        """Rounded once: numpy's own product of a row depends on where in the block the row stands."""
        product = np.matmul(left.data, right.data, dtype=np.float64)
        return TensorHandle((product + total.data).astype(np.float32), total.dtype.scalar)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", dot)
    queries, keys, own, groups, key_groups = problem(70, 97, 48, torch.float16)
    losses, gradient = contrastive_pass(queries, keys, own, groups, key_groups, SCALE)
    order = torch.randperm(70, generator=torch.Generator().manual_seed(0))
    for picked in (order, order[:1], torch.arange(70)):
        again = contrastive_pass(queries[picked], keys, own[picked], groups[picked], key_groups, SCALE)
        assert torch.equal(again[0], losses[picked]) and torch.equal(again[1], gradient[picked])


def test_offsets_beyond_31_bits(lazy_memory) -> None:
    queries, keys, own, groups, key_groups = problem(3, 3, 32, torch.float16)
    expected = contrastive_pass(queries, keys, own, groups, key_groups, SCALE)
    stride = (1 << 30) + 16
    far = torch.empty(2 * stride + 32, dtype=torch.float16).as_strided((3, 32), (stride, 1))
    far.copy_(keys)
    found = contrastive_pass(queries, far, own, groups, key_groups, SCALE)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.fixture
def passes(monkeypatch) -> list[tuple[int, ...]]:
    """Shapes of the queries that the fused pass was called with."""
    seen, whole = [], contrastive_pass

    def watched(queries, *rest):
        seen.append(tuple(queries.shape))
        return whole(queries, *rest)

    assert contrastive._fused_agrees(torch.device("cpu")), "its look at the kernel comes before we count"
    monkeypatch.setattr(contrastive_kernels, "contrastive_pass", watched)
    return seen


@pytest.mark.parametrize("width", (48, 50, WIDEST + 16))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_half_precision_against_narrow_frozen_keys_is_fused_and_the_rest_goes_in_chunks(passes, dtype, width) -> None:
    inputs = problem(9, 40, width, dtype)
    exact, exact_gradient = full_matrix(exactly(inputs[0]), exactly(inputs[1]), *inputs[2:])
    leaf, upstream = inputs[0].clone().requires_grad_(), torch.linspace(-1, 2, 9)
    losses = info_nce(leaf, *inputs[1:], temperature=1 / SCALE)
    (gradient,) = torch.autograd.grad(losses, leaf, upstream)
    assert passes == ([(9, width)] if dtype != torch.float32 and width == 48 else [])
    assert relative_error(losses.detach(), exact) < 1e-6
    limit = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 6e-3}[dtype]
    assert relative_error(gradient, exact_gradient * upstream[:, None]) < limit


def test_padding_keys_that_learn_and_evaluation_are_not_fused(passes) -> None:
    queries, keys, *rest = problem(9, 40, 48, torch.bfloat16)
    exact, _ = full_matrix(exactly(queries), exactly(keys), *rest)
    valid = torch.ones(47, dtype=torch.bool)
    valid[40:] = False
    padded = torch.cat([keys, torch.ones(7, 48, dtype=keys.dtype)])
    padded_groups = torch.cat([rest[2], torch.full((7,), -5)])
    leaf = queries.clone().requires_grad_()
    found = [
        info_nce(leaf, padded, *rest[:2], padded_groups, temperature=1 / SCALE, valid_G=valid),
        info_nce(leaf, keys.clone().requires_grad_(), *rest, temperature=1 / SCALE),
        info_nce(queries, keys, *rest, temperature=1 / SCALE),
    ]
    assert not passes and all(relative_error(losses.detach(), exact) < 1e-6 for losses in found)


def test_a_kernel_that_disagrees_is_not_taken(monkeypatch, caplog) -> None:
    assert disagreement(torch.device("cpu")) is None
    inputs = problem(9, 40, 48, torch.bfloat16)
    expected, _ = full_matrix(exactly(inputs[0]), exactly(inputs[1]), *inputs[2:])

    def wrong(*arguments):
        losses, gradient = contrastive_pass(*arguments)
        return losses, gradient * 1.05

    def broken(*arguments):
        raise RuntimeError("no such instruction")

    for stand_in, words in ((wrong, "relative errors"), (broken, "RuntimeError: no such instruction")):
        monkeypatch.setattr(contrastive_kernels, "contrastive_pass", stand_in)
        contrastive._fused_agrees.cache_clear()
        caplog.clear()
        for _ in range(2):
            leaf = inputs[0].clone().requires_grad_()
            losses = info_nce(leaf, *inputs[1:], temperature=1 / SCALE)
            assert relative_error(losses.detach(), expected) < 1e-6
        warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
        assert len(warnings) == 1 and words in warnings[0]
    contrastive._fused_agrees.cache_clear()


# (what stands in the kernel, what it becomes)
MUTATIONS = {
    "paraphrases are negatives": ("(key_group[None, :] != group[:, None])", "(key >= 0)[None, :]"),
    "the own key is its own negative": ("others & (key[None, :] != own[:, None])", "others"),
    "keys beyond the last": ("others = there[None, :] &", "others ="),
    "a sum that does not decay": ("mass * decay +", "mass +"),
    "a mean that does not decay": ("mean * decay[:, None])\n        if", "mean)\n        if"),
    "a tail that does not decay": ("tail_mean * decay[:, None]", "tail_mean"),
    "the wrong columns": ("WIDE + tl.arange(0, TAIL)", "tl.arange(0, TAIL)"),
    "scores of the first columns": ("scores = tl.dot(tail_query", "tl.dot(tail_query"),
    "a sum for the mean": ("(mean / mass[:, None]", "(mean"),
    "the scale is lost": ("missed = scale /", "missed = 1.0 /"),
    "the own key does not pull": (
        " - own_vector.to(tl.float32)) * missed[:, None]\n    _write(",
        ") * missed[:, None]\n    _write(",
    ),
    "losses in powers of two": ("- own_score) / LOG2_E", "- own_score)"),
    "the loss of the better rows": ("tl.maximum(margin, 0.0) + log1p", "log1p"),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_broken_kernel_is_noticed_before_it_is_used(mutation, tmp_path) -> None:
    before, after = MUTATIONS[mutation]
    source = Path(contrastive_kernels.__file__).read_text()
    assert source.count(before) == 1, "the kernel has changed: mutate what it says now"
    path = tmp_path / "broken_kernels.py"
    path.write_text(source.replace(before, after))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    broken = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(broken)
    sentence = broken.disagreement(torch.device("cpu"))
    assert sentence is not None and "relative errors" in sentence, sentence


@pytest.mark.parametrize("architecture", (80, 86, 89, 90, 100, 120))
def test_on_a_gpu_few_rows_go_in_chunks(monkeypatch, architecture) -> None:
    """132 processors with blocks of 64 rows: 66 blocks are 4224 rows."""
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(multi_processor_count=132))
    monkeypatch.setattr(launch_table, "architecture_of", lambda _: architecture)

    def taken(rows: int, width: int, dtype: torch.dtype = torch.bfloat16, *, stride: int = 0, address: int = 0) -> bool:
        vectors = {"dtype": dtype, "is_cuda": True, "device": None, "shape": (rows, width)}
        places = {"stride": lambda _: stride or width, "data_ptr": lambda: address}
        return serves(*[SimpleNamespace(**vectors, **places)] * 2)

    assert launch_table.launch_of("contrastive_rows", 384, None).blocks["ROWS"] == 64
    assert taken(4224, 384) and not taken(4223, 384)
    assert not taken(100_000, 384, torch.float32) and not taken(100_000, 528) and not taken(100_000, 0)
    assert taken(100_000, 48, stride=64) and not taken(100_000, 48, stride=65) and not taken(100_000, 40)
    assert not taken(100_000, 48, address=2)
