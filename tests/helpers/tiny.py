"""Tiny students for tests: built as a run builds them, and trained in seconds when they must really answer."""

from __future__ import annotations

import functools
from pathlib import Path

import torch

from pst_dist.config.schema import Config
from pst_dist.data.sample import ReasoningSample
from pst_dist.storage.manifest import Manifest
from pst_dist.student.answer_format import AnswerFormat
from pst_dist.student.layout import Layout
from pst_dist.student.saved import save_student
from pst_dist.student.tokenizer import build_tokenizer
from pst_dist.training.batching.batches import Collator, PSTBatch
from pst_dist.training.loss import TermWeights
from pst_dist.training.module import Student, build_student

ROWS = (
    ReasoningSample(id="r-0", question="2 + 3?", answer="5", rationales=("two and three",), answer_type="number"),
    ReasoningSample(
        id="r-1", question="What is 10 + 7?", answer="17", rationales=("ten, seven",), answer_type="number"
    ),
    ReasoningSample(id="r-2", question="Say 140", answer="140", rationales=("it is said",), answer_type="number"),
    ReasoningSample(id="r-3", question="9 - 9 in all?", answer="0", rationales=("nine is gone",), answer_type="number"),
)


class TinyTeacher:
    """Unit vectors that depend on the sample alone, in place of embeddings."""

    dimension = 8

    def vector(self, sample_id: str, rationale: int):
        generator = torch.Generator().manual_seed(sum(sample_id.encode()) + rationale)
        return torch.nn.functional.normalize(torch.randn(self.dimension, generator=generator), dim=0).numpy()


class Tiny:
    """A student over ROWS with its tokenizer and format; `fit()` trains it until it has learnt them."""

    def __init__(
        self,
        arm: str = "pst",
        architecture: str = "gpt2",
        *,
        layout: dict | None = None,
        loss: dict | None = None,
        max_length: int = 96,
        rows: tuple[ReasoningSample, ...] = ROWS,
        seed: int = 0,
        **config: object,
    ) -> None:
        self.config = Config.model_validate(
            {
                "arm": arm,
                "seed": seed,
                "layout": {"max_length": max_length, **(layout or {})},
                "loss": loss or {},
                "student": {
                    "fresh": {"architecture": architecture, "hidden_size": 32, "num_layers": 2, "num_heads": 2}
                },
                **config,
            }
        )
        self.rows = rows
        self.tokenizer = build_tokenizer(self.config.student, rows)
        torch.manual_seed(seed)
        self.student: Student = build_student(self.config, self.tokenizer, TinyTeacher.dimension)
        self.model = self.student.model
        self.format = AnswerFormat.of(self.config, self.tokenizer)
        self.layout = Layout(
            self.tokenizer,
            self.format,
            is_encoder_decoder=self.student.is_encoder_decoder,
            keep_rationale=self.config.loss.rationale_weight > 0,
        )

    def batch(self) -> PSTBatch:
        """All rows as one training batch."""
        collate = Collator(
            loss=self.config.loss,
            pad_id=self.tokenizer.pad_token_id,
            decoder_start_id=self.student.decoder_start_id,
            teacher=TinyTeacher() if self.config.arm in ("pst", "adaptive") else None,
        )
        return collate([sequence for row in self.rows for sequence in self.layout.sequences(row)])

    def validation_nll(self) -> list[float]:
        """The three loss sums over the rows, as training computes them."""
        with torch.no_grad():
            return self.student(self.batch(), torch.ones(3)).sums.tolist()

    def fit(self, *, steps: int = 400, learning_rate: float = 1e-2, enough: float = 0.03) -> Tiny:
        """Train on the rows with the student's own loss until the answers' and rationales' NLL is under `enough`."""
        batch = self.batch()
        scales = TermWeights.of(self.config.loss, self.config.arm).scales(batch.counts).float()
        optimizer = torch.optim.AdamW(self.student.parameters(), lr=learning_rate, weight_decay=0.0)
        self.student.train()
        for _ in range(steps):
            output = self.student(batch, scales)
            nll = output.sums[:2] / batch.counts[:2].clamp(min=1)
            if nll.max() < enough:
                break
            output.loss.backward()
            torch.nn.utils.clip_grad_norm_(self.student.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        assert nll.max() < 0.1, f"the tiny student did not learn its rows: {nll.tolist()}"
        return self

    def save(self, directory: Path, **extra: object) -> Manifest:
        """Write it as a finished training leaves it."""
        weights = {name: value.detach().clone() for name, value in self.student.state_dict().items()}
        return save_student(
            self.student.model,
            weights,
            self.tokenizer,
            self.format,
            directory,
            fingerprint="f" * 64,
            extra={"step": 7, "arm": self.config.arm, "seed": self.config.seed, **extra},
        )


@functools.cache
def fitted(arm: str = "pst", architecture: str = "gpt2", **layout: object) -> Tiny:
    """A trained tiny student; made once in a test session, so do not change it."""
    return Tiny(arm, architecture, layout=layout).fit()
