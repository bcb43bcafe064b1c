"""Forward passes of like length: the cut against a search of every cut, on every rank, and the loss that stays."""

import itertools
import random

import numpy as np
import pytest
import torch
from ranks import launch
from run_files import curve
from small_run import small_config
from tiny import ROWS, Tiny

from pst_dist.arms import ARMS, Segment
from pst_dist.config.loading import load_config
from pst_dist.config.schema import Config, LossConfig
from pst_dist.data.sample import ReasoningSample
from pst_dist.errors import ConfigError
from pst_dist.storage.manifest import read_lines
from pst_dist.training.batching.batches import Collator
from pst_dist.training.batching.order import OrderPlan
from pst_dist.training.batching.passes import ByLength, cut_by_length, length_passes
from pst_dist.training.batching.step_batches import step_batches
from pst_dist.training.trainer import train


def causal(*lengths: int) -> np.ndarray:
    return np.array([[0, length] for length in lengths])


def test_a_cut_that_was_worked_out_by_hand():
    # 9 | 3 3 | 2 costs 9 + 6 + 2; 9 | 3 3 2 costs 9 + 9, and one pass less.
    lengths = causal(3, 9, 2, 3)
    assert cut_by_length(lengths, ByLength(None, 0), world_size=1, rows=8) == [[[1]], [[0, 3]], [[2]]]
    assert cut_by_length(lengths, ByLength(None, 2), world_size=1, rows=8) == [[[1]], [[0, 3, 2]]]
    assert cut_by_length(lengths, ByLength(None, 19), world_size=1, rows=8) == [[[1, 0, 3, 2]]]
    assert cut_by_length(lengths, ByLength(None, None), world_size=1, rows=8) == [[[1, 0, 3, 2]]]
    # Two passes are needed: 9 | 3 3 2 pads one token, 9 3 | 3 2 seven.
    assert cut_by_length(lengths, ByLength(None, None), world_size=1, rows=3) == [[[1]], [[0, 3, 2]]]
    # 9 is over the limit of 8 and goes alone; 3 3 2 would be 9 tokens, and 3 | 3 2 pads one more than 3 3 | 2.
    assert cut_by_length(lengths, ByLength(8, None), world_size=1, rows=8) == [[[1]], [[0, 3]], [[2]]]


def test_ranks_get_like_lengths_and_equally_many_passes():
    lengths = causal(8, 7, 6, 5, 4, 3, 2)
    # Groups of two, dealt out in turn from the first rank and from the last: (8, 7), (5, 6), (4, 3), (-, 2). Two groups
    # in each pass pad them to 2 x 8 + 2 x 4, one and three to 8 + 3 x 6.
    passes = cut_by_length(lengths, ByLength(18, None), world_size=2, rows=8)
    assert passes == [[[0, 3], [1, 2]], [[4], [5, 6]]]


def cost(passes: list, lengths: np.ndarray, tokens: int | None, price: int | None) -> int | None:
    """What a cut costs, or None when it breaks a limit: 4 rows, and `tokens` unless a rank has one row."""
    total = 0
    for ranks in passes:
        rows = [index for own in ranks for index in own]
        most = max(len(own) for own in ranks)
        padded = most * int(lengths[rows].max(0).sum())
        if most > 4 or (tokens is not None and padded > tokens and most > 1):
            return None
        total += padded + (10**6 if price is None else price)
    return total


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("tokens", [None, 40])
@pytest.mark.parametrize("price", [None, 0, 7])
def test_no_other_cut_of_the_sorted_sequences_is_cheaper(world_size, tokens, price):
    chance = random.Random(f"{world_size}/{tokens}/{price}")
    for _ in range(20):
        count = chance.randint(1, 9)
        lengths = np.array([[chance.choice((0, 5, 9)), chance.randint(1, 30)] for _ in range(count)])
        passes = cut_by_length(lengths, ByLength(tokens, price), world_size=world_size, rows=4)
        assert sorted(index for ranks in passes for own in ranks for index in own) == list(range(count))

        order = sorted(range(count), key=lambda index: -lengths[index].sum())
        groups = [order[first : first + world_size] for first in range(0, count, world_size)]
        best = None
        for cuts in itertools.product((False, True), repeat=len(groups) - 1):
            ends = [place + 1 for place, one in enumerate(cuts) if one]
            pieces = [groups[a:b] for a, b in itertools.pairwise([0, *ends, len(groups)])]
            dealt = [
                [[group[rank] for group in piece if rank < len(group)] for rank in range(world_size)]
                for piece in pieces
            ]
            found = cost(dealt, lengths, tokens, price)
            best = found if best is None or (found is not None and found < best) else best
        assert cost(passes, lengths, tokens, price) == best


@pytest.mark.parametrize("arm", ["pst", "prefix", "adaptive"])
@pytest.mark.parametrize("architecture", ["gpt2", "t5"])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_every_sequence_comes_once_in_a_pass_of_its_kind_on_some_rank(arm, architecture, world_size):
    lengths = [(1 + number % 7, 1 + number) for number in range(11)]
    rows = [
        ReasoningSample(id=f"r-{number}", question="q" * asked, answer="1", rationales=("w" * written,))
        for number, (asked, written) in enumerate(lengths)
    ]
    tiny = Tiny(arm, architecture)
    collate = Collator(loss=LossConfig(), pad_id=0, decoder_start_id=tiny.student.decoder_start_id)
    plan = OrderPlan(len(rows), 10, seed=1)
    for cut in (ByLength(None, 16), ByLength(200, None), ByLength(1, None)):
        ranks = []
        for rank in range(world_size):
            place = {"first_step": 0, "last_step": 1, "rank": rank, "world_size": world_size}
            steps = step_batches(plan, rows, tiny.layout, collate, **place, micro_batch_size=4, by_length=cut)
            ranks.append(next(steps))
        assert len({len(batches) for batches in ranks}) == 1, "every rank runs equally many passes"
        seen, kinds = [], []
        for batches in ranks:
            for batch in batches:
                held = {Segment(int(one)) for one in batch.segment_ids.unique()} & {Segment.ANSWER, Segment.RATIONALE}
                kinds.append(frozenset(held))
                if batch.counts.any():
                    seen += batch.sample_ids
                    most = int(batch.positions[0])
                    assert cut.tokens is None or most <= cut.tokens or len(batch.sample_ids) == 1
                    assert len(batch.sample_ids) <= 4 * (2 if arm == "adaptive" else 1)
                else:
                    assert batch.tokens == 0 and batch.positions[0] == batch.positions[1] > 0
        wanted = [rows[index].id for index in plan.global_batch(0) for _ in ARMS[arm].asked]
        assert sorted(seen) == sorted(wanted)
        together, apart = {Segment.ANSWER, Segment.RATIONALE}, ({Segment.ANSWER}, {Segment.RATIONALE})
        assert set(kinds) == ({frozenset(one) for one in apart} if arm == "prefix" else {frozenset(together)})


def test_padding_counts_the_encoders_positions_too():
    tiny = Tiny("pst", "t5")
    batch = tiny.batch()
    prompts = [len(tiny.layout.prompt_ids(row.question)) for row in ROWS]
    targets = [1 + len(tiny.layout.sequences(row)[0].target_ids) for row in ROWS]
    computed = 4 * max(prompts) + 4 * max(targets)
    assert batch.positions.tolist() == [computed, computed - sum(prompts) - sum(targets)]
    assert batch.tokens == sum(targets)


@pytest.mark.parametrize("arm", ["pst", "prefix", "adaptive", "pre_thinking"])
@pytest.mark.parametrize("architecture", ["gpt2", "llama", "t5"])
def test_the_gradient_of_a_step_does_not_depend_on_the_cut(arm, architecture):
    from tiny import TinyTeacher

    from pst_dist.training.loss import TermWeights

    tiny = Tiny(arm, architecture)
    teacher = TinyTeacher() if ARMS[arm].aligned else None
    collate = Collator(
        loss=tiny.config.loss,
        pad_id=tiny.tokenizer.pad_token_id,
        decoder_start_id=tiny.student.decoder_start_id,
        teacher=teacher,
    )
    tiny.student.eval()  # no dropout: T5 has it

    def gradient(cut):
        tiny.student.zero_grad()
        place = {"first_step": 0, "last_step": 1, "rank": 0, "world_size": 1}
        (batches,) = step_batches(
            OrderPlan(4, 4, 0), ROWS, tiny.layout, collate, **place, micro_batch_size=4, by_length=cut
        )
        counts = torch.stack([batch.counts for batch in batches]).sum(0)
        scales = TermWeights.of(tiny.config.loss, arm).scales(counts).float()
        losses = [tiny.student(batch, scales).loss for batch in batches]
        sum(losses).backward()
        grads = torch.cat([p.grad.flatten() for p in tiny.student.parameters() if p.grad is not None])
        return float(sum(losses).detach()), grads, len(batches)

    loss, whole, few = gradient(None)
    assert few == (2 if arm == "prefix" else 1)
    for cut in (ByLength(None, 0), ByLength(1, None)):
        other, cut_up, many = gradient(cut)
        assert many > few
        assert other == pytest.approx(loss, rel=1e-5)
        torch.testing.assert_close(cut_up, whole, rtol=1e-3, atol=1e-6)


def test_a_limit_and_a_loss_over_the_rows_of_a_pass_are_refused_together():
    nce = ["loss.alignment=info_nce", "loss.symmetric=true"]
    with pytest.raises(ConfigError, match=r"micro_batch_tokens.*loss\.symmetric"):
        load_config(None, [*nce, "train.micro_batch_tokens=512"])
    assert ByLength.of(load_config(None, nce), 64) is None
    assert ByLength.of(load_config(None, ["train.micro_batch_tokens=null"]), 64) is None
    assert ByLength.of(Config(), 64) == ByLength(None, 64)
    assert ByLength.of(load_config(None, ["train.micro_batch_tokens=512"]), None) == ByLength(512, None)


@pytest.mark.parametrize("value", ["0", "-1", "1.5", "some"])
def test_a_limit_that_is_no_number_of_tokens_is_refused(value):
    with pytest.raises(ConfigError, match="micro_batch_tokens"):
        load_config(None, [f"train.micro_batch_tokens={value}"])


ARMS_TRAINED = ("pst", "prefix", "adaptive")


@pytest.fixture(scope="module")
def runs(small_data, tmp_path_factory):
    """Each arm in this process without a cut by length and with several, and on two ranks."""
    folder = tmp_path_factory.mktemp("passes")
    cases = []
    # Seven rows a step do not divide over two ranks, and 32 rows leave a rest.
    base = {"train__global_batch_size": 7, "train__eval_steps": 8}
    for name in (*ARMS_TRAINED, "t5"):
        changes = base | ({"student__fresh__architecture": "t5"} if name == "t5" else {"arm": name})
        for cut in ("null", "auto", "150"):
            output = folder / f"{name}-{cut}"
            train(small_config(small_data, output, **changes, train__micro_batch_tokens=cut))
        stage = {"pst": "zero2", "prefix": "zero3", "adaptive": "zero1", "t5": "zero2"}[name]
        cases.append(
            small_config(
                small_data, folder / f"{name}-zero", **changes, train__micro_batch_tokens=150, train__deepspeed=stage
            )
        )
    launch(cases, folder)
    return folder


@pytest.mark.encoder
@pytest.mark.distributed
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("name", [*ARMS_TRAINED, "t5"])
def test_the_loss_curve_is_that_of_rows_as_drawn_in_one_process_and_on_two_ranks(runs, name):
    drawn = curve(runs / f"{name}-null")
    assert len(drawn) == 8 and drawn[-1]["loss"] < drawn[0]["loss"] - 1
    for cut in ("auto", "150", "zero"):
        other = curve(runs / f"{name}-{cut}")
        for one, two in zip(drawn, other, strict=True):
            assert two["loss"] == pytest.approx(one["loss"], abs=2e-5), f"{cut}, step {one['step']}"
            assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-3)
            assert two["tokens"] == one["tokens"]
        scores = [read_lines(runs / f"{name}-{which}" / "metrics.jsonl")[-1]["validation"] for which in ("null", cut)]
        assert scores[1] == pytest.approx(scores[0], abs=2e-5)
    padding = {cut: sum(row["padding"] for row in curve(runs / f"{name}-{cut}")) / 8 for cut in ("null", "auto", "150")}
    assert 0 <= padding["auto"] <= padding["null"] < 0.5
    assert padding["150"] < padding["null"]


def test_length_passes_keep_what_belongs_to_a_sample_apart_by_kind():
    sizes = [[(0, 5), (0, 30)], [(0, 6), (0, 20)]]
    passes = list(length_passes(ARMS["prefix"], sizes, ByLength(None, None), world_size=1, rows=2))
    assert passes == [[[(1, 0), (0, 0)]], [[(0, 1), (1, 1)]]]
