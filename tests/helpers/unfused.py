"""A training loop as anyone would write it: full logits, one cross-entropy over them, pooling by slices, one process.

It shares the data order, the model and AdamW's settings with `train`, and nothing of its loss path.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F

from pst_dist.config.run_dir import RunDir
from pst_dist.config.schema import Config
from pst_dist.data.shards import ShardSet
from pst_dist.distributed.ranks import Ranks
from pst_dist.training.batching.batches import PSTBatch
from pst_dist.training.engines.optimizer import learning_rate_at, parameter_groups
from pst_dist.training.memory.pass_size import PassSize
from pst_dist.training.module import Student
from pst_dist.training.parts import Parts


def unfused_sums(student: Student, batch: PSTBatch) -> torch.Tensor:
    """[3] sums of the terms with gradient, from the logits of every position; cosine alignment only."""
    if batch.encoder_input_ids is None:
        output = student.model(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, output_hidden_states=True
        )
        hidden = output.hidden_states[-1]
    else:
        output = student.model(
            input_ids=batch.encoder_input_ids,
            attention_mask=batch.encoder_attention_mask,
            decoder_input_ids=batch.input_ids,
            decoder_attention_mask=batch.attention_mask,
            output_hidden_states=True,
        )
        hidden = output.decoder_hidden_states[-1]
    vocabulary = output.logits.shape[-1]
    labels, is_answer = (torch.full((batch.input_ids.numel(),), value) for value in (-100, False))
    labels[batch.supervised.rows], is_answer[batch.supervised.rows] = batch.supervised.targets, batch.is_answer
    nll = F.cross_entropy(output.logits.view(-1, vocabulary), labels, reduction="none")
    distance = nll.new_zeros(())
    spans = batch.spans
    for row, start, count, teacher in zip(spans.rows, spans.starts, spans.lengths, batch.teacher_emb, strict=True):
        student_vector = student.head(hidden[row, start : start + count].mean(0))
        distance = distance + 1 - F.cosine_similarity(student_vector, teacher, dim=0)
    return torch.stack([nll[is_answer].sum(), nll[~is_answer].sum(), distance])


def unfused_curve(config: Config, output: Path) -> list[dict[str, float]]:
    """Loss and gradient norm of each step, and at the end the three means over the validation rows."""
    run = RunDir(output, data=Path(config.data_dir))
    parts = Parts(config, run, ShardSet.open(run.shards), Ranks(), None)
    parts.make_student()
    student, train = parts.student, config.train
    optimizer = torch.optim.AdamW(
        parameter_groups(student, train.weight_decay),
        betas=(train.adam_beta1, train.adam_beta2),
        eps=train.adam_epsilon,
    )
    curve = []
    size = PassSize(config, pass_tokens=None, repeats=True)
    for step, batches in enumerate(iter(parts.batches_from(0, size).take, None)):
        student.train()
        scales = parts.weights.scales(sum(batch.counts for batch in batches)).float()
        total = sum((unfused_sums(student, batch) * scales).sum() for batch in batches)
        total.backward()
        norm = torch.nn.utils.clip_grad_norm_(student.parameters(), train.max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step, parts.total, train)
        optimizer.step()
        optimizer.zero_grad()
        curve.append({"loss": total.item(), "grad_norm": norm.item()})
    student.eval()
    with torch.no_grad():
        sequences = [sequence for row in parts.validator.samples for sequence in parts.layout.sequences(row)]
        batch = parts.collate(sequences)
        means = unfused_sums(student, batch).double() / batch.counts
    curve.append(dict(zip(("answer_nll", "rationale_nll", "alignment"), means.tolist(), strict=True)))
    return curve
