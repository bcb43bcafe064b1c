"""The order plan and the collator."""

import itertools

import numpy as np
import pytest
import torch
from tiny import ROWS, Tiny, TinyTeacher

from pst_dist.arms import Segment
from pst_dist.config.schema import LossConfig
from pst_dist.data.sample import ReasoningSample, question_group
from pst_dist.training.batching.batches import Collator
from pst_dist.training.batching.order import OrderPlan, epoch_order, rationale_of
from pst_dist.training.batching.step_batches import step_batches


def test_every_sample_comes_once_an_epoch_whatever_the_world_size():
    plan = OrderPlan(samples=997, global_batch_size=64, seed=3)
    for world in (1, 2, 3, 4):
        seen = []
        for step in range(plan.steps_per_epoch):
            parts = [plan.micro_batches(step, rank=r, world_size=world, size=5) for r in range(world)]
            assert len({len(part) for part in parts}) == 1, "every rank runs equally many forward passes"
            flat = [int(index) for part in parts for micro in part for index in micro]
            assert sorted(flat) == sorted(plan.global_batch(step).tolist())
            seen += flat
        assert sorted(seen) == list(range(997))


def test_epochs_and_seeds_differ_and_repeat():
    orders = {(seed, epoch): tuple(epoch_order(50, seed=seed, epoch=epoch)) for seed in (0, 1) for epoch in (0, 1)}
    assert len(set(orders.values())) == 4
    epoch_order.cache_clear()
    assert tuple(epoch_order(50, seed=1, epoch=1)) == orders[1, 1]


def test_rationales_of_one_question_take_turns_over_epochs():
    sample = ReasoningSample(id="x", question="q", answer="a", rationales=("one", "two", "three"))
    used = [rationale_of(sample, seed=0, epoch=epoch) for epoch in range(6)]
    assert sorted(used[:3]) == [0, 1, 2] and used[:3] == used[3:]


def test_questions_that_differ_only_in_spacing_and_case_are_one_group():
    assert question_group("What is  2+2?") == question_group("what is 2 + 2")
    assert question_group("What is 2+2?") != question_group("What is 2+3?")


def collated(arm="pst", architecture="gpt2", **loss):
    tiny = Tiny(arm, architecture, loss=loss)
    collate = Collator(
        loss=tiny.config.loss,
        pad_id=tiny.tokenizer.pad_token_id,
        decoder_start_id=tiny.student.decoder_start_id,
        teacher=TinyTeacher(),
    )
    sequences = [sequence for row in ROWS for sequence in tiny.layout.sequences(row)]
    keys = [(row.id, 0) for row in ROWS]
    return tiny, sequences, collate(sequences, keys=keys, key_groups=[5, 5, 6, 7])


@pytest.mark.parametrize("architecture", ["gpt2", "t5"])
def test_a_supervised_row_stands_one_place_before_its_token(architecture):
    _, sequences, batch = collated(architecture=architecture)
    length = batch.input_ids.shape[1]
    expected = []
    for index, sequence in enumerate(sequences):
        start = 1 if architecture == "t5" else len(sequence.prompt_ids)
        for offset, (token, owner) in enumerate(zip(sequence.target_ids, sequence.segments, strict=True)):
            if owner in (Segment.ANSWER, Segment.RATIONALE):
                expected.append((index * length + start + offset - 1, token, owner is Segment.ANSWER))
    assert (
        list(
            zip(
                batch.supervised.rows.tolist(), batch.supervised.targets.tolist(), batch.is_answer.tolist(), strict=True
            )
        )
        == expected
    )


def test_the_aligned_span_is_the_semantic_token_itself():
    tiny, _, batch = collated()
    picked = batch.input_ids[batch.spans.rows, batch.spans.starts]
    assert picked.tolist() == [tiny.layout.semantic_id] * len(ROWS)
    assert batch.spans.lengths.tolist() == [1] * len(ROWS)
    expected = np.stack([TinyTeacher().vector(row.id, 0) for row in ROWS])
    np.testing.assert_allclose(batch.teacher_emb.numpy(), expected, rtol=1e-6)


def test_span_pooling_covers_the_rationale():
    _, _, batch = collated(pooling="span")
    for row, start, length in zip(batch.spans.rows, batch.spans.starts, batch.spans.lengths, strict=True):
        owners = batch.segment_ids[row, start : start + length]
        assert (owners == Segment.RATIONALE).all()
        assert (batch.segment_ids[row] == Segment.RATIONALE).sum() == length


def test_a_muted_batch_counts_nothing():
    _, sequences, _ = collated()
    collate = Collator(loss=LossConfig(), pad_id=0, teacher=TinyTeacher())
    assert collate(sequences[:1], muted=True).counts.tolist() == [0, 0, 0]


def test_the_loader_starts_at_any_step_with_the_batches_of_an_undisturbed_run():
    tiny = Tiny()
    collate = Collator(loss=LossConfig(), pad_id=0)
    plan = OrderPlan(len(ROWS), 3, seed=0)

    def ids(first, workers):
        batches = step_batches(
            plan,
            ROWS,
            tiny.layout,
            collate,
            first_step=first,
            last_step=6,
            rank=0,
            world_size=1,
            micro_batch_size=2,
            workers=workers,
        )
        return [[batch.sample_ids for batch in step] for step in batches]

    whole = ids(0, 0)
    assert ids(4, 0) == whole[4:] and ids(2, 2) == whole[2:]
    flat = list(itertools.chain.from_iterable(batch for step in whole[:2] for batch in step))
    assert sorted(flat) == [row.id for row in ROWS]


@pytest.mark.parametrize("arm, kinds", [("prefix", [{Segment.ANSWER}, {Segment.RATIONALE}]), ("adaptive", None)])
def test_answers_alone_and_rationales_do_not_pad_one_another(arm, kinds):
    layout = Tiny(arm).layout
    cut = {"first_step": 0, "last_step": 1, "rank": 0, "world_size": 1, "micro_batch_size": 3}
    plan, collate = OrderPlan(len(ROWS), 3, seed=0), Collator(loss=LossConfig(), pad_id=0)
    (step,) = step_batches(plan, ROWS, layout, collate, **cut)
    produced = [set(batch.segment_ids.unique().tolist()) & {Segment.ANSWER, Segment.RATIONALE} for batch in step]
    assert produced == (kinds or [{Segment.ANSWER, Segment.RATIONALE}])
    every = [sequence for index in plan.global_batch(0) for sequence in layout.sequences(ROWS[index])]
    tokens = sum(len(sequence.prompt_ids) + len(sequence.target_ids) for sequence in every)
    assert sum(int(batch.attention_mask.sum()) for batch in step) == tokens


def test_info_nce_keys_are_the_global_batch_and_each_span_finds_its_own():
    _, _, batch = collated(alignment="info_nce")
    assert batch.keys.shape == (4, 8) and batch.key_groups.tolist() == [5, 5, 6, 7]
    torch.testing.assert_close(batch.keys[batch.key_index], batch.teacher_emb)


def test_further_negatives_are_other_rows_drawn_anew_each_step():
    plan = OrderPlan(samples=50, global_batch_size=8, seed=3)
    drawn = [plan.others(step, 10) for step in range(6)]
    for step, others in enumerate(drawn):
        assert len(set(others.tolist())) == 10 and not set(others) & set(plan.global_batch(step))
    assert len({tuple(others) for others in drawn}) == 6
    assert plan.others(2, 10).tolist() == drawn[2].tolist(), "a resumed run draws them again"
    assert sorted([*plan.others(0, 1000), *plan.global_batch(0)]) == list(range(50)), "no more than there are"
