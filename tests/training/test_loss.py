"""The loss terms against formulas written out by hand, and the one division."""

import math

import pytest
import torch

from pst_dist.config.schema import LossConfig
from pst_dist.training.loss import TermWeights, alignment_distance, token_nll

NO_KEYS = {
    "keys_GE": torch.zeros(0, 3),
    "key_groups_G": torch.zeros(0, dtype=torch.int64),
    "key_index_A": torch.zeros(0, dtype=torch.int64),
    "capacity": 3,
}


def test_token_nll_is_minus_the_log_probability():
    logits = torch.tensor([[0.0, math.log(3.0)]])
    assert token_nll(logits, torch.tensor([0])).item() == pytest.approx(math.log(4))


def test_cosine_distance_does_not_depend_on_lengths():
    student = torch.tensor([[2.0, 0.0, 0.0], [0.0, 5.0, 0.0], [0.0, 0.0, -3.0]])
    teacher = torch.tensor([[1.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    distance, cosine = alignment_distance(student, teacher, loss=LossConfig(), **NO_KEYS)
    assert distance.tolist() == pytest.approx([0, 1, 2])
    assert cosine.tolist() == pytest.approx([1, 0, -1])


def test_smooth_l1_is_half_the_squared_distance_of_near_unit_vectors():
    student, teacher = torch.tensor([[3.0, 4.0, 0.0]]), torch.tensor([[1.0, 0.0, 0.0]])
    distance, _ = alignment_distance(student, teacher, loss=LossConfig(alignment="smooth_l1"), **NO_KEYS)
    assert distance.item() == pytest.approx(0.5 * (0.4**2 + 0.8**2))


def test_info_nce_masks_other_rows_of_the_same_question():
    keys = torch.eye(3)
    arguments = {
        "keys_GE": keys,
        "key_groups_G": torch.tensor([1, 1, 2]),
        "key_index_A": torch.tensor([0]),
        "capacity": 3,
    }
    loss = LossConfig(alignment="info_nce", temperature=0.5)
    distance, _ = alignment_distance(torch.tensor([[1.0, 0.0, 0.0]]), keys[:1], loss=loss, **arguments)
    # The second key has the first one's question: only the own key and the third remain.
    assert distance.item() == pytest.approx(-math.log(math.exp(2) / (math.exp(2) + 1)))


def test_symmetric_info_nce_is_half_of_each_direction():
    students = torch.nn.functional.normalize(torch.randn(3, 4, generator=torch.Generator().manual_seed(0)), dim=-1)
    keys = torch.eye(4)[:3]
    loss = LossConfig(alignment="info_nce", temperature=0.5, symmetric=True)
    arguments = {"key_groups_G": torch.arange(3), "key_index_A": torch.arange(3), "capacity": 3}
    distance, _ = alignment_distance(students, keys, keys_GE=keys, loss=loss, **arguments)
    scores = students @ keys.T / 0.5
    own = scores.diagonal()
    expected = (scores.logsumexp(1) - own + scores.logsumexp(0) - own) / 2
    torch.testing.assert_close(distance, expected)


def test_terms_are_divided_by_their_own_counts_or_by_all_tokens():
    counts = torch.tensor([4.0, 16.0, 2.0])
    weights = (1.0, 0.5, 3.0)
    assert TermWeights(weights).scales(counts).tolist() == pytest.approx([1 / 4, 0.5 / 16, 3 / 2])
    assert TermWeights(weights, "per_token").scales(counts).tolist() == pytest.approx([1 / 20, 0.5 / 20, 3 / 2])


def test_a_term_that_a_batch_does_not_hold_counts_zero():
    assert TermWeights((1.0, 1.0, 1.0)).scales(torch.tensor([2.0, 0.0, 0.0])).tolist() == [0.5, 0, 0]


@pytest.mark.parametrize(
    ("arm", "weights"),
    [("pst", (2.0, 0.5, 0.25)), ("post_thinking", (2.0, 0.5, 0.0)), ("prefix", (0.3, 0.7, 0.0))],
)
def test_an_arm_takes_its_weights_from_the_config(arm, weights):
    loss = LossConfig(answer_weight=2.0, rationale_weight=0.5, alignment_weight=0.25, alpha=0.3)
    assert TermWeights.of(loss, arm).weights == pytest.approx(weights)


def test_an_unknown_distance_or_denominator_raises():
    from types import SimpleNamespace

    loss = SimpleNamespace(alignment="l2", symmetric=False, temperature=0.1)  # pydantic would refuse it
    vectors, index = torch.randn(2, 4), torch.arange(2)
    with pytest.raises(ValueError, match="unknown row distance 'l2'"):
        alignment_distance(
            vectors, vectors, keys_GE=vectors, key_groups_G=index, key_index_A=index, capacity=2, loss=loss
        )
    with pytest.raises(ValueError, match="unknown denominator 'per_row'"):
        TermWeights((1.0, 1.0, 1.0), "per_row").scales(torch.ones(3))
