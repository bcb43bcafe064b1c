"""Likelihoods of rows and the gradient that replaces their logits: Triton's against the reference in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from exactness import DTYPES, assert_agrees, exactly
from torch import Tensor

from pst_dist.kernels import reference, triton_backend

# Around the 16 elements to which blocks are aligned, around blocks, and over several of them.
CLASSES = (1, 2, 15, 16, 17, 511, 512, 513, 2500, 4097)
WEIGHTS = (1.0, 0.0, 0.5, -2.0, 3e-3)


def problem(classes: int, dtype: torch.dtype, *, scale: float = 3.0) -> tuple[Tensor, Tensor, Tensor]:
    """(logits [5, V], targets, weights), the first and the last class among the targets."""
    generator = torch.Generator().manual_seed(classes)
    logits = (torch.randn(5, classes, generator=generator) * scale).to(dtype)
    targets = torch.randint(classes, (5,), generator=generator)
    targets[0], targets[1] = 0, classes - 1
    return logits, targets, torch.tensor(WEIGHTS)


def plain_nll(logits_CV: Tensor, targets_C: Tensor, weights_C: Tensor) -> tuple[Tensor, Tensor]:
    """(likelihoods, gradient of their weighted sum) by operators of torch, in the logits' dtype."""
    leaf = logits_CV.detach().clone().requires_grad_()
    nll = F.cross_entropy(leaf, targets_C, reduction="none")
    return nll.detach(), torch.autograd.grad(nll, leaf, weights_C.to(nll.dtype))[0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("classes", CLASSES)
def test_likelihoods_and_gradients_of_rows(classes, dtype) -> None:
    logits, targets, weights = problem(classes, dtype)
    (exact_nll, exact), (own_nll, own) = (
        plain_nll(exactly(logits), targets, exactly(weights)),
        plain_nll(logits, targets, weights),
    )
    before = logits.clone()
    alone = triton_backend.softmax_nll(logits, targets, None)
    assert torch.equal(logits, before), "without weights the logits are not written"
    nll = triton_backend.softmax_nll(logits, targets, weights)
    assert nll.dtype == torch.float32 and torch.equal(nll, alone)
    assert_agrees(nll, exact_nll, own_nll)
    assert_agrees(logits, exact, own, gradient=True)
    assert not logits[1].any(), "a weight of 0 leaves no gradient"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("classes", (1, 17, 512, 2500))
def test_keys_of_the_own_group_are_left_out(classes, dtype) -> None:
    scores, own_key, weights = problem(classes, dtype)
    key_groups = torch.arange(classes) % 3
    groups = key_groups[own_key]
    exact_scores = exactly(scores)
    exact = reference.contrastive_nll(exact_scores, own_key, groups, key_groups, exactly(weights))
    others = (key_groups[None] == groups[:, None]) & (torch.arange(classes)[None] != own_key[:, None])
    by_torch = plain_nll(exactly(scores).masked_fill(others, float("-inf")), own_key, exactly(weights))
    assert_agrees(exact, by_torch[0], exact)
    plain = plain_nll(scores.masked_fill(others, float("-inf")), own_key, weights)
    alone = triton_backend.contrastive_nll(scores, own_key, groups, key_groups, None)
    found = triton_backend.contrastive_nll(scores, own_key, groups, key_groups, weights)
    assert torch.equal(found, alone)
    assert_agrees(found, exact, plain[0])
    assert_agrees(scores, by_torch[1], plain[1], gradient=True)
    assert not scores[others].any()


def test_a_row_whose_keys_are_all_paraphrases_has_nothing_to_learn() -> None:
    scores = torch.randn(1, 40)
    found = triton_backend.contrastive_nll(
        scores, torch.tensor([7]), torch.tensor([5]), torch.full((40,), 5), torch.tensor([2.0])
    )
    assert found.tolist() == [0] and not scores.any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_huge_and_infinitely_small_logits_give_numbers(dtype) -> None:
    logits = torch.zeros(3, 20, dtype=dtype)
    logits[0, 3], logits[1, 3] = 1e4, -1e4
    logits[2, 5:] = float("-inf")
    targets, weights = torch.tensor([4, 4, 4]), torch.ones(3)
    exact_nll, exact = plain_nll(exactly(logits), targets, weights)
    nll = triton_backend.softmax_nll(logits, targets, weights)
    torch.testing.assert_close(nll.double(), exact_nll, rtol=1e-6, atol=0)
    torch.testing.assert_close(logits.double(), exact, rtol=1e-2 if dtype == torch.bfloat16 else 1e-3, atol=1e-30)


def test_what_is_not_a_number_is_not_hidden() -> None:
    logits = torch.zeros(3, 20)
    logits[0, 11], logits[1, 11], logits[2, 11] = float("nan"), float("inf"), 1.0
    nll = triton_backend.softmax_nll(logits, torch.zeros(3, dtype=torch.int64), torch.ones(3))
    assert not bool(nll[:2].isfinite().any()) and bool(nll[2].isfinite())
    assert bool(logits[:2].isnan().any(1).all()) and bool(logits[2].isfinite().all())


@pytest.mark.parametrize("classes", (17, 512, 2500))
@pytest.mark.parametrize("beside", (0, 1, 12))
def test_only_the_rows_themselves_are_written(classes, beside) -> None:
    logits, targets, weights = problem(classes, torch.float32)
    buffer = torch.full((5, classes + beside + 3), float("nan"))
    rows = buffer[:, 3 : 3 + classes]
    rows.copy_(logits)
    nll, expected = triton_backend.softmax_nll(logits, targets, weights), logits
    # Where blocks begin differs with the stride, and so does the order of the sum.
    torch.testing.assert_close(triton_backend.softmax_nll(rows, targets, weights), nll, rtol=1e-6, atol=0)
    torch.testing.assert_close(rows, expected, rtol=1e-5, atol=1e-9)
    assert bool(buffer[:, :3].isnan().all()) and bool(buffer[:, 3 + classes :].isnan().all())
    transposed = problem(classes, torch.float32)[0].T.contiguous().T
    assert torch.equal(triton_backend.softmax_nll(transposed, targets, weights), nll)
    assert torch.equal(transposed, expected)


def test_two_runs_agree_in_every_bit() -> None:
    runs = []
    for _ in range(2):
        logits, targets, weights = problem(4097, torch.bfloat16)
        runs.append((triton_backend.softmax_nll(logits, targets, weights), logits))
    assert all(torch.equal(first, second) for first, second in zip(*runs, strict=True))


def test_no_rows_launch_nothing() -> None:
    none = torch.zeros(0, dtype=torch.int64)
    assert triton_backend.softmax_nll(torch.zeros(0, 9), none, None).shape == (0,)
    assert triton_backend.contrastive_nll(torch.zeros(0, 9), none, none, torch.zeros(9), torch.zeros(0)).shape == (0,)


@pytest.mark.usefixtures("lazy_memory")
@pytest.mark.parametrize("stride", ((1 << 30) + 3, (1 << 30) + 16))
def test_rows_beyond_two_to_the_31_elements_are_found(stride) -> None:
    dense, targets, weights = problem(700, torch.bfloat16)
    dense, targets, weights = dense[:3], targets[:3], torch.ones(3)
    far = torch.as_strided(torch.empty(2 * stride + 700, dtype=torch.bfloat16), (3, 700), (stride, 1))
    far[:] = dense
    nll = triton_backend.softmax_nll(dense, targets, weights)
    torch.testing.assert_close(triton_backend.softmax_nll(far, targets, weights), nll, rtol=1e-6, atol=0)
    torch.testing.assert_close(far, dense)
