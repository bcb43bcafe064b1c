"""Distances of rows to their teachers and their gradients: Triton's against the reference in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from exactness import DTYPES, assert_agrees, exactly
from torch import Tensor

from pst_dist.kernels import reference, triton_backend

KINDS = ("cosine", "smooth_l1")
WIDTHS = (1, 7, 33, 513, 1025)
EPS = 1e-8


def pairs(rows: int, width: int, dtype: torch.dtype, *, scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """(students of `dtype`, teachers and upstream gradients of float32); the first two pairs are equal and opposite."""
    generator = torch.Generator().manual_seed(width)
    student_AE = (torch.randn(rows, width, generator=generator) * scale).to(dtype)
    teacher_AE = torch.randn(rows, width, generator=generator)
    student_AE[:2, 0] = 30 * scale
    teacher_AE[0], teacher_AE[1] = student_AE[0].float(), -student_AE[1].float()
    return student_AE, teacher_AE, torch.randn(rows, generator=generator)


def plain_distance(student_AE: Tensor, teacher_AE: Tensor, kind: str, eps: float = EPS) -> tuple[Tensor, Tensor]:
    """(distances, cosines) by operators of torch, in the dtype of the students."""
    student, teacher = F.normalize(student_AE, dim=-1, eps=eps), F.normalize(teacher_AE, dim=-1, eps=eps)
    cosine = (student * teacher).sum(-1)
    if kind == "cosine":
        return 1 - cosine, cosine
    return F.smooth_l1_loss(student, teacher, reduction="none").sum(-1), cosine


def plain_gradient(student_AE: Tensor, teacher_AE: Tensor, upstream_A: Tensor, kind: str, eps: float = EPS) -> Tensor:
    leaf = student_AE.detach().clone().requires_grad_()
    distance, _ = plain_distance(leaf, teacher_AE, kind, eps)
    return torch.autograd.grad(distance, leaf, upstream_A.to(distance.dtype))[0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
def test_distances_and_gradients_of_rows(width, dtype, kind) -> None:
    student, teacher, upstream = pairs(6, width, dtype)
    distance, cosine, statistics = triton_backend.row_distance(student, teacher, kind, EPS)
    exact, own = (
        plain_distance(exactly(student), exactly(teacher), kind),
        plain_distance(student, teacher.to(dtype), kind),
    )
    assert distance.dtype == cosine.dtype == statistics.dtype == torch.float32
    assert_agrees(distance, exact[0], own[0])
    assert_agrees(cosine, exact[1], own[1])
    found = triton_backend.row_distance_gradient(student, teacher, statistics, upstream, kind, EPS)
    assert found.dtype == dtype
    by_autograd = plain_gradient(exactly(student), exactly(teacher), exactly(upstream), kind)
    if width > 1:  # a vector of one number has no direction to learn: the gradient is a difference of roundings
        assert_agrees(found, by_autograd, plain_gradient(student, teacher.to(dtype), upstream, kind), gradient=True)
    else:
        assert float((found.double() - by_autograd).abs().max()) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_rows_shorter_than_eps_have_no_gradient_along_themselves(kind) -> None:
    eps = 1e-3
    student, teacher, upstream = pairs(4, 33, torch.float32)
    # Rows one after the other: the gradient of a short one drowns the others in a common norm.
    student[2] *= 1e-3 * eps
    student[3] = 0
    _, _, statistics = triton_backend.row_distance(student, teacher, kind, eps)
    found = triton_backend.row_distance_gradient(student, teacher, statistics, upstream, kind, eps)
    exact = plain_gradient(exactly(student), exactly(teacher), exactly(upstream), kind, eps)
    *_, plain_statistics = reference.row_distance(student, teacher, kind, eps)
    slow = reference.row_distance_gradient(student, teacher, plain_statistics, upstream, kind, eps)
    own = plain_gradient(student, teacher, upstream, kind, eps)
    for row in (2, 3):
        for result in (found, slow):
            assert_agrees(result[row], exact[row], own[row], gradient=True)


@pytest.mark.parametrize("kind", KINDS)
def test_zero_students_and_zero_teachers_give_numbers(kind) -> None:
    student, teacher = torch.zeros(3, 9), torch.zeros(3, 9)
    student[1, 2], teacher[2, 4] = 3.0, 5.0
    distance, cosine, statistics = triton_backend.row_distance(student, teacher, kind, EPS)
    assert cosine.tolist() == [0, 0, 0]
    # Of a unit vector and nothing, or of nothing and nothing.
    assert distance.tolist() == ([1, 1, 1] if kind == "cosine" else [0, 0.5, 0.5])
    found = triton_backend.row_distance_gradient(student, teacher, statistics, torch.ones(3), kind, EPS)
    exact = plain_gradient(exactly(student), exactly(teacher), torch.ones(3), kind)
    torch.testing.assert_close(found.double(), exact, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_huge_students_do_not_overflow_on_the_way(dtype, kind) -> None:
    student, teacher, upstream = pairs(4, 129, dtype, scale=1e3)
    assert float(student.abs().max()) > 1e4
    distance, cosine, statistics = triton_backend.row_distance(student, teacher, kind, EPS)
    exact = plain_distance(exactly(student), exactly(teacher), kind)
    wide = plain_distance(student.float(), teacher, kind)
    assert_agrees(distance, exact[0], wide[0])
    assert_agrees(cosine, exact[1], wide[1])
    found = triton_backend.row_distance_gradient(student, teacher, statistics, upstream * 100, kind, EPS)
    by_autograd = plain_gradient(exactly(student), exactly(teacher), exactly(upstream * 100), kind)
    if dtype == torch.bfloat16:  # in float16 a gradient of 1e-4 is rounded to few bits, whoever computes it
        own = plain_gradient(student, teacher.to(dtype), upstream * 100, kind)
        assert_agrees(found, by_autograd, own, gradient=True)
    assert bool(found.isfinite().all())


@pytest.mark.parametrize("kind", KINDS)
def test_strides_do_not_change_a_bit(kind) -> None:
    student, teacher, _ = pairs(4, 48, torch.float32)
    upstream = torch.tensor([2.0]).expand(4)
    assert upstream.stride() == (0,)
    expected = triton_backend.row_distance(student, teacher, kind, EPS)
    gradient = triton_backend.row_distance_gradient(student, teacher, expected[2], upstream, kind, EPS)
    nan = torch.full((4, 5), float("nan"))
    shifted = torch.cat([nan.flatten()[:1], student.flatten()])[1:].view(4, 48)
    for view in (torch.cat([student, nan], 1)[:, :48], student.T.contiguous().T, shifted):
        other = torch.cat([teacher, nan], 1)[:, :48]
        found = triton_backend.row_distance(view, other, kind, EPS)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        every_third = expected[2].repeat(1, 2)[:, :3]
        again = triton_backend.row_distance_gradient(view, other, every_third, upstream.clone(), kind, EPS)
        assert torch.equal(again, gradient) and again.is_contiguous()


def test_no_rows_launch_nothing() -> None:
    empty = torch.zeros(0, 7, dtype=torch.bfloat16)
    distance, cosine, statistics = triton_backend.row_distance(empty, empty, "cosine", EPS)
    assert distance.shape == cosine.shape == (0,) and statistics.shape == (0, 3)
    found = triton_backend.row_distance_gradient(empty, empty, statistics, distance, "cosine", EPS)
    assert found.shape == (0, 7) and found.dtype == torch.bfloat16


@pytest.mark.usefixtures("lazy_memory")
def test_rows_beyond_two_to_the_31_elements_are_found() -> None:
    far = torch.as_strided(torch.empty((1 << 31) + 100, dtype=torch.bfloat16), (3, 33), ((1 << 30) + 3, 1))
    student, teacher, upstream = pairs(3, 33, torch.bfloat16)
    far[:] = student
    expected = triton_backend.row_distance(student, teacher, "smooth_l1", EPS)
    found = triton_backend.row_distance(far, teacher, "smooth_l1", EPS)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    gradients = [
        triton_backend.row_distance_gradient(view, teacher, expected[2], upstream, "smooth_l1", EPS)
        for view in (far, student)
    ]
    assert torch.equal(*gradients)


def test_an_unknown_distance_raises_before_anything_is_launched() -> None:
    student_AE, teacher_AE, upstream_A = pairs(3, 7, torch.float32)
    with pytest.raises(ValueError, match="unknown row distance 'l2'"):
        triton_backend.row_distance(student_AE, teacher_AE, "l2", EPS)
    with pytest.raises(ValueError, match="unknown row distance 'l2'"):
        triton_backend.row_distance_gradient(student_AE, teacher_AE, torch.ones(3, 3), upstream_A, "l2", EPS)
