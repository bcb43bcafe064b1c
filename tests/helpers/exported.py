"""An export of a student after a few optimizer steps on a few rows: its answers differ and stop by themselves."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from pst_dist.config.schema import Config
from pst_dist.data.sample import ReasoningSample, Turns
from pst_dist.publish.export import export
from pst_dist.student.generate import decode_answers
from pst_dist.student.layout import Layout, layout_for
from pst_dist.student.saved import load_student, save_student
from pst_dist.student.tokenizer import build_tokenizer
from pst_dist.training.batching.batches import Collator
from pst_dist.training.loss import TermWeights
from pst_dist.training.module import build_student


def exported(
    config: Config, rows: Sequence[ReasoningSample], questions: Sequence[str | Turns | ReasoningSample], steps: int = 40
) -> tuple[Path, list[str], Layout]:
    """The export below `config.output_dir`, the answers that we decode from it, and the layout of its training.

    A sample among the questions is asked as it is asked in training.
    """
    path = Path(config.output_dir)
    tokenizer = build_tokenizer(config.student, rows)
    torch.manual_seed(0)
    student = build_student(config, tokenizer, None)
    layout = layout_for(config, tokenizer, is_encoder_decoder=student.is_encoder_decoder)
    collate = Collator(
        loss=config.loss, pad_id=tokenizer.pad_token_id, decoder_start_id=student.decoder_start_id, teacher=None
    )
    batch = collate([sequence for row in rows for sequence in layout.sequences(row)])
    scales = TermWeights.of(config.loss, config.arm).scales(batch.counts).float()
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-2, weight_decay=0.0)
    student.train()
    for _ in range(steps):
        output = student(batch, scales)
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    save_student(
        student.model,
        {key: value.detach().clone() for key, value in student.state_dict().items()},
        tokenizer,
        layout.format,
        path / "best",
        fingerprint="f" * 64,
        extra={"step": steps, "arm": config.arm, "seed": 0},
    )
    folder = export(config)
    saved = load_student(path / "best", device="cpu")
    asked = [saved.format.asked(one) if isinstance(one, ReasoningSample) else one for one in questions]
    answers = decode_answers(
        saved.model,
        saved.tokenizer,
        saved.format,
        asked,
        batch_size=4,
        max_new_tokens=config.evaluate.max_new_tokens,
    )
    assert any(answer.complete for answer in answers), "the student has not learnt to stop"
    return folder, [answer.answer_text for answer in answers], layout
