"""LoRA students of the zoo's families, trained a few steps on four rows."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import zoo
from tiny import ROWS, TinyTeacher

from pst_dist.arms import ARMS
from pst_dist.config.schema import Config
from pst_dist.student.layout import layout_for
from pst_dist.student.pretrained import base_of
from pst_dist.student.saved import save_student
from pst_dist.student.tokenizer import build_tokenizer
from pst_dist.training.batching.batches import Collator
from pst_dist.training.loss import TermWeights
from pst_dist.training.module import Student, build_student


def lora_config(folder: Path, base: Path | str, arm: str = "post_thinking", **lora: Any) -> Config:
    """A LoRA student of `base` whose run directory is `folder`."""
    return Config.model_validate(
        {
            "arm": arm,
            "output_dir": str(folder),
            "layout": {"max_length": 96},
            "student": {"model_name_or_path": str(base), "lora": {"rank": 4, **lora}},
            "evaluate": {"max_new_tokens": 24},
            "train": {"bf16": lora.get("frozen_dtype") == "bfloat16"},
        }
    )


@dataclass
class Adapted:
    """A LoRA student with the batch that it is trained on."""

    config: Config
    tokenizer: Any
    student: Student
    layout: Any
    batch: Any
    scales: torch.Tensor

    @property
    def trained(self) -> dict[str, torch.Tensor]:
        """What an engine keeps of it."""
        return {name: p.detach().clone() for name, p in self.student.named_parameters() if p.requires_grad}

    @property
    def frozen(self) -> dict[str, torch.Tensor]:
        """The base's parameters."""
        return {name: p.detach().clone() for name, p in self.student.named_parameters() if not p.requires_grad}

    def gradients(self) -> dict[str, torch.Tensor]:
        """Gradients of all trained parameters on the batch, without dropout."""
        self.student.eval()
        self.student.zero_grad()
        self.student(self.batch, self.scales).loss.backward()
        found = {key: p.grad.clone() for key, p in self.student.named_parameters() if p.grad is not None}
        self.student.zero_grad()
        return found

    def fit(self, steps: int, rate: float = 1e-2) -> list[float]:
        """Train, and return the loss before each step."""
        optimizer = torch.optim.AdamW([p for p in self.student.parameters() if p.requires_grad], lr=rate)
        losses = []
        self.student.train()
        for _ in range(steps):
            output = self.student(self.batch, self.scales)
            output.loss.backward()
            losses.append(output.loss.item())
            torch.nn.utils.clip_grad_norm_(self.student.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        return losses

    def save(self) -> None:
        """Write it as the best student of its run."""
        save_student(
            self.student.model,
            self.trained,
            self.tokenizer,
            self.layout.format,
            Path(self.config.output_dir) / "best",
            fingerprint="f" * 64,
            extra={"step": 40, "arm": self.config.arm, "seed": 0, "base": base_of(self.config.student)},
        )


def adapted(config: Config) -> Adapted:
    """The student of a config, untrained."""
    tokenizer = build_tokenizer(config.student, ROWS)
    torch.manual_seed(0)
    teacher = TinyTeacher() if ARMS[config.arm].aligned else None
    student = build_student(config, tokenizer, teacher.dimension if teacher else None)
    layout = layout_for(config, tokenizer, is_encoder_decoder=student.is_encoder_decoder)
    collate = Collator(
        loss=config.loss, pad_id=tokenizer.pad_token_id, decoder_start_id=student.decoder_start_id, teacher=teacher
    )
    batch = collate([sequence for row in ROWS for sequence in layout.sequences(row)])
    return Adapted(
        config, tokenizer, student, layout, batch, TermWeights.of(config.loss, config.arm).scales(batch.counts).float()
    )


def family(name: str, folder: Path, arm: str = "post_thinking", **lora: Any) -> Adapted:
    """An untrained LoRA student of one of the zoo's families."""
    return adapted(lora_config(folder, zoo.make(name, folder / "base"), arm, **lora))
