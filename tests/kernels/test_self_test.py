"""The start-up self-test against backends that are wrong in one function."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from pst_dist.kernels import reference
from pst_dist.kernels.self_test import CHECKS, disagreement

CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def backend_with(function: str, broken) -> SimpleNamespace:
    """The reference, but `function` is `broken(the true one)`."""
    return SimpleNamespace(**{**vars(reference), "name": "wrong", function: broken(getattr(reference, function))})


def changed(change):
    """Every result of a function goes through `change`."""

    def broken(function):
        def run(*arguments, **parts):
            found = function(*arguments, **parts)
            return change(found) if isinstance(found, Tensor) else tuple(change(result) for result in found)

        return run

    return broken


def test_the_reference_agrees_with_itself_in_every_dtype() -> None:
    assert disagreement(reference, reference, CPU, DTYPES) is None


@pytest.mark.parametrize("function", CHECKS)
def test_a_slightly_wrong_function_is_named_with_its_error(function) -> None:
    candidate = backend_with(function, changed(lambda result: result * 1.001))
    sentence = disagreement(candidate, reference, CPU)
    assert sentence == f"wrong's {function} in float32 has a relative error of 1.0e-03, 1e-05 are allowed"


@pytest.mark.parametrize("function", CHECKS)
def test_a_result_that_is_no_number_is_found(function) -> None:
    candidate = backend_with(function, changed(lambda result: torch.full_like(result, float("nan"))))
    assert f"{function} in float32 has a relative error of nan" in str(disagreement(candidate, reference, CPU))


@pytest.mark.parametrize("function", CHECKS)
def test_a_result_of_another_dtype_or_shape_is_found(function) -> None:
    doubled = backend_with(function, changed(Tensor.double))
    assert f"{function} in float32 gave" in str(disagreement(doubled, reference, CPU))
    longer = backend_with(function, changed(lambda result: torch.cat([result, result])))
    assert f"{function} in float32 gave" in str(disagreement(longer, reference, CPU))


@pytest.mark.parametrize("function", CHECKS)
def test_an_exception_is_told_in_one_line(function) -> None:
    def broken(_):
        def run(*_arguments, **_parts):
            raise RuntimeError("no such instruction\nand a long explanation")

        return run

    sentence = disagreement(backend_with(function, broken), reference, CPU)
    assert sentence == f"wrong's {function} in float32 raised RuntimeError: no such instruction"


@pytest.mark.parametrize("function", ("softmax_nll", "contrastive_nll"))
def test_logits_that_were_not_overwritten_are_found(function) -> None:
    def broken(true):
        return lambda logits, *arguments: true(logits.clone(), *arguments)

    assert f"{function} in float32 has a relative error" in str(
        disagreement(backend_with(function, broken), reference, CPU)
    )


def test_logits_that_were_overwritten_without_being_asked_are_found() -> None:
    def broken(true):
        def run(logits, targets, weights):
            nll = true(logits, targets, weights)
            return nll if weights is not None else true(logits, targets, torch.ones(len(logits), dtype=nll.dtype))

        return run

    assert "softmax_nll in float32" in str(disagreement(backend_with("softmax_nll", broken), reference, CPU))


def test_a_fault_of_one_dtype_is_found_in_that_dtype() -> None:
    def broken(true):
        def run(hidden, *arguments):
            return true(hidden, *arguments) * (1.5 if hidden.dtype == torch.bfloat16 else 1)

        return run

    assert "span_mean in bfloat16" in str(disagreement(backend_with("span_mean", broken), reference, CPU))


def test_random_numbers_of_training_are_left_alone() -> None:
    before = torch.get_rng_state()
    assert disagreement(reference, reference, CPU) is None
    assert torch.equal(torch.get_rng_state(), before)


def test_it_runs_inside_autocast_and_autograd_as_outside() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.enable_grad():
        assert disagreement(reference, reference, CPU, DTYPES) is None
