"""InfoNCE on real gloo ranks against one process with the whole batch, in float64; and two customs that differ."""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from gather_ranks import TEMPERATURE, problem, students
from gather_ranks import __file__ as RANKS
from torch import Tensor

from pst_dist.kernels.gather import gather_rows, symmetric_info_nce

EVEN = ("5,5", "4,4,4")
UNEVEN = ("7,2", "0,4", "5,1,3", "0,4,2")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], tuple[Tensor, Tensor]]:
    """What two and three ranks computed, started by torchrun: {(rows of each rank, way): (losses, gradient)}."""
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        environment.pop(name, None)
    results = {}
    for ranks in (2, 3):
        output = tmp_path_factory.mktemp("gather") / "results.pt"
        cases = [case for case in EVEN + UNEVEN if case.count(",") == ranks - 1]
        command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
        done = subprocess.run(
            [sys.executable, *command, RANKS, str(output), *cases],
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        results |= torch.load(output)
    return results


def one_process(case: str, *, symmetric: bool, bank: bool) -> tuple[Tensor, Tensor]:
    """(losses of all rows, gradient of their sum), by cross-entropy over full matrices."""
    inputs, keys, groups, weight = problem(sum(map(int, case.split(","))))
    rows = len(inputs)
    weight.requires_grad_()
    vectors, own = students(inputs, weight), torch.arange(rows)

    def direction(queries: Tensor, candidates: Tensor) -> Tensor:
        scores = queries @ candidates.T / TEMPERATURE
        same = groups[:rows, None] == groups[None, : len(candidates)]
        same.fill_diagonal_(False)
        return F.cross_entropy(scores.masked_fill(same, float("-inf")), own, reduction="none")

    losses = direction(vectors, keys if bank else keys[:rows])
    if symmetric:
        losses = 0.5 * (losses + direction(keys[:rows], vectors))
    return losses.detach(), torch.autograd.grad(losses.sum(), weight)[0]


@pytest.mark.distributed
@pytest.mark.parametrize("case", EVEN + UNEVEN)
@pytest.mark.parametrize("way", ["to_teachers", "symmetric", "averaged_by_ddp"])
def test_losses_and_gradients_of_ranks_add_up_to_those_of_one_process(found, case, way):
    losses, gradient = found[case, way]
    both = way != "to_teachers"
    expected_losses, expected = one_process(case, symmetric=both, bank=both)
    torch.testing.assert_close(losses, expected_losses, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.distributed
@pytest.mark.parametrize("case", EVEN)
def test_gathering_without_a_gradient_points_elsewhere(found, case):
    """Why it is not offered: the losses are right, so nothing shows, but what other ranks' losses say is missing."""
    losses, gradient = found[case, "without_gradient"]
    expected_losses, expected = one_process(case, symmetric=True, bank=True)
    torch.testing.assert_close(losses, expected_losses, rtol=1e-12, atol=1e-12)
    cosine = F.cosine_similarity(gradient.flatten(), expected.flatten(), dim=0)
    assert cosine < 0.995
    assert (gradient - expected).norm() > 0.1 * expected.norm()


@pytest.mark.distributed
@pytest.mark.parametrize("case", EVEN)
def test_splicing_local_rows_into_a_gathered_batch_divides_the_gradient_by_the_ranks(found, case):
    """Why it is not offered: averaged over ranks the loss is right and the gradient 1 / ranks of what it should be."""
    losses, gradient = found[case, "spliced"]
    expected_losses, expected = one_process(case, symmetric=True, bank=True)
    ranks = case.count(",") + 1
    assert losses.sum().item() == pytest.approx(expected_losses.sum().item(), rel=1e-12)
    torch.testing.assert_close(gradient * ranks, expected, rtol=1e-12, atol=1e-12)


def test_without_a_process_group_rows_come_back_as_they_are():
    rows = torch.randn(3, 4, requires_grad=True)
    everyone, valid = gather_rows(rows, capacity=5)
    assert everyone is rows and valid.tolist() == [True] * 3


def test_more_rows_than_capacity_are_refused():
    with pytest.raises(ValueError, match="4 rows exceed the capacity of 3"):
        gather_rows(torch.zeros(4, 2), capacity=3)


def test_the_symmetric_loss_of_one_process_is_half_the_sum_of_both_directions():
    inputs, keys, groups, weight = problem(6)
    weight.requires_grad_()
    options = {"temperature": TEMPERATURE, "capacity": 6}
    losses = symmetric_info_nce(students(inputs, weight), keys, torch.arange(6), groups[:6], groups, **options)
    expected_losses, expected = one_process("6", symmetric=True, bank=True)
    torch.testing.assert_close(losses, expected_losses, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(torch.autograd.grad(losses.sum(), weight)[0], expected, rtol=1e-12, atol=1e-12)
