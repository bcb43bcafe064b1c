"""The alignment head fitted in closed form before step 1 (`loss.head_init: ridge`).

A linear map from the untrained student's hidden states to the teacher's vectors explains much of them already: on
SmolLM2-135M its cosine on held-out rows was above 0.5, which a random head does not reach in hundreds of steps at the
body's learning rate. So gradient descent need not find the map, and the term acts on the body from the first step.

Rows are cut into blocks and each block into a forward pass, wherever it runs, so any number of ranks sees the same
batches. Each rank keeps the states of its own rows and adds its normal equations to those of the others; the
regularisation is that with the best mean cosine over five folds, each predicted from the other four.
"""

# Shapes in this file: n rows of this rank, F folds, D student width, E teacher width

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor

from pst_dist.arms import Segment
from pst_dist.config.schema import Config
from pst_dist.data.sample import ReasoningSample
from pst_dist.distributed.progress import alive, at
from pst_dist.distributed.ranks import from_main, sums_over_ranks
from pst_dist.errors import DivergedError
from pst_dist.logs import progress
from pst_dist.student.layout import Layout, forward_passes
from pst_dist.student.layout import Sequence as TokenSequence
from pst_dist.training.batching.batches import Collator, PSTBatch
from pst_dist.training.batching.order import epoch_order, rationale_of
from pst_dist.training.engines.engine import Engine

log = logging.getLogger(__name__)
MOST_ROWS = 4096
"""Rows that the head is fitted to. States and vectors of all of them take about 20 kB a row for a width of 4,096."""
FOLDS = 5
STRENGTHS = (1e-4, 1e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)
"""Candidates for the regularisation, over the mean squared norm of the states without their common direction."""
_HEAD = "head.weight"


@dataclass(frozen=True)
class HeadFit:
    """What the fit found; the cosines are those of rows that it did not see."""

    rows: int
    strength: float
    """Chosen regularisation, one of `STRENGTHS`."""
    cosine: float
    """Mean cosine between a row's predicted and its own teacher vector."""
    cosine_stderr: float
    cosine_other: float
    """The same with the vectors of all other rows."""

    def to_json(self) -> dict[str, float | int]:
        """Plain dict."""
        return asdict(self)


def fit_head(
    engine: Engine, samples: Sequence[ReasoningSample], layout: Layout, collate: Collator, config: Config
) -> HeadFit | None:
    """Give the head of a new student its fitted weights and return the account; None for too few rows. Collective.

    The head gets the norm of the random one that it replaces, so its learning rate means the same. Raises
    DivergedError when a hidden state is not finite.
    """
    at("fitting the head")
    states, targets, folds = _observed(engine, samples, layout, collate, config)
    gram, cross, total = _normal_equations(states, targets, folds)
    rows = int(sums_over_ranks(torch.tensor([float(len(states))]))[0])
    if not bool(torch.isfinite(gram).all()):
        raise DivergedError(
            "the untrained student has hidden states that are not finite, so no head can be fitted to them",
            "choose another model, train.bf16=false, or loss.head_init=random",
        )
    if rows < 2 * FOLDS:
        log.warning(
            "loss.head_init=ridge needs %d rows, there are %d: the head starts from random weights", 2 * FOLDS, rows
        )
        return None
    found = []
    for strength in STRENGTHS:
        predicted = torch.zeros_like(targets)
        for fold in range(FOLDS):
            alive()
            rest = [k for k in range(FOLDS) if k != fold]
            head = _solve(gram[rest].sum(0), cross[rest].sum(0), total[rest].sum(0), strength)
            predicted[folds == fold] = states[folds == fold] @ head
        found.append(_account(predicted, targets, rows, strength))
    best = _strongest_of_the_best(found)
    head_ED = _solve(gram.sum(0), cross.sum(0), total.sum(0), best.strength).T
    norm = math.sqrt(len(head_ED) / 3)  # of nn.Linear's start, uniform within 1 / sqrt(D)
    head_ED *= norm / head_ED.norm().clamp(min=1e-30)
    engine.set_weight(_HEAD, from_main(head_ED.float() if engine.ranks.is_main else None))
    log.info(
        "alignment head: ridge on %d rows (regularisation %g), held-out cosine %.3f +- %.3f, other rows %.3f",
        best.rows,
        best.strength,
        best.cosine,
        best.cosine_stderr,
        best.cosine_other,
    )
    return best


def _strongest_of_the_best(found: Sequence[HeadFit]) -> HeadFit:
    """The strongest regularisation whose cosine is within one standard error of the best.

    With fewer rows than directions a weaker one may be a little better on held-out rows, but it fits the rows that it
    saw exactly: nothing is then left for the term to teach, and the least change of the body undoes the fit. The rule
    is that of Breiman et al., Classification and Regression Trees (1984), section 3.4.3.
    """
    best = max(found, key=lambda fit: fit.cosine)
    return max((fit for fit in found if fit.cosine >= best.cosine - best.cosine_stderr), key=lambda fit: fit.strength)


def _observed(
    engine: Engine, samples: Sequence[ReasoningSample], layout: Layout, collate: Collator, config: Config
) -> tuple[Tensor, Tensor, Tensor]:
    """This rank's states [n, D] and targets [n, E], both float64, and their folds [n]; collective."""
    student, states, targets, folds = engine.student, [], [], []
    student.eval()
    student.watch_gradients = False
    unscaled = torch.ones(3, device=engine.device)
    with torch.no_grad(), progress("fit head", total=min(len(samples), MOST_ROWS), unit="rows") as bar:
        for first, batch in _blocks(engine, samples, layout, collate, config):
            seen: list[Tensor] = []
            student.observer = seen.append
            try:
                engine.forward(batch.to(engine.device), unscaled)
            finally:
                student.observer = None
            alive()
            if seen and len(batch.spans):
                states.append(seen[0].double().cpu())
                targets.append(batch.teacher_emb.double())
                folds.append((first + torch.arange(len(batch.spans))) % FOLDS)
            bar.advance(min(len(batch.sample_ids) * engine.ranks.world_size, len(samples)))
    if not states:
        width, teacher = engine.student.widths
        return torch.zeros(0, width).double(), torch.zeros(0, teacher).double(), torch.zeros(0).long()
    return torch.cat(states), torch.cat(targets), torch.cat(folds)


def _blocks(
    engine: Engine, samples: Sequence[ReasoningSample], layout: Layout, collate: Collator, config: Config
) -> Iterator[tuple[int, PSTBatch]]:
    """This rank's passes, each with the number of its first row; every rank gets the same number."""
    order = epoch_order(len(samples), seed=config.seed, epoch=0)[:MOST_ROWS].tolist()
    size, world = config.train.per_device_train_batch_size, engine.ranks.world_size
    starts = range(0, len(order), size)
    for turn in range(0, len(starts), world):
        mine = turn + engine.ranks.rank
        muted = mine >= len(starts)
        first = 0 if muted else starts[mine]
        laid_out = []
        for index in order[first : first + 1] if muted else order[first : first + size]:
            chosen = rationale_of(samples[index], seed=config.seed, epoch=0)
            laid_out.append(layout.sequences(samples[index], chosen))
        for whole in forward_passes(layout.arm, laid_out):
            sequences = [_up_to_the_span(sequence, config.loss.pooling) for sequence in whole]
            keys = list(dict.fromkeys((sequence.sample_id, sequence.rationale) for sequence in sequences))
            yield first, collate(sequences, keys=keys, key_groups=range(len(keys)), muted=muted)


def _up_to_the_span(sequence: TokenSequence, pooling: str) -> TokenSequence:
    """The sequence without the tokens after the semantic ones, which these cannot see; spares half of the work."""
    places = [k for k, segment in enumerate(sequence.segments) if segment is Segment.SEMANTIC]
    if pooling == "span" or not places:
        return sequence
    end = places[-1] + 1
    return replace(sequence, target_ids=sequence.target_ids[:end], segments=sequence.segments[:end])


def _normal_equations(states_nD: Tensor, targets_nE: Tensor, folds_n: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[F, D, D], [F, D, E] and [F, D] float64, summed over ranks: states' states, states' targets, and states."""
    parts = [(states_nD[folds_n == fold], targets_nE[folds_n == fold]) for fold in range(FOLDS)]
    gram = torch.stack([states.T @ states for states, _ in parts])
    cross = torch.stack([states.T @ targets for states, targets in parts])
    total = torch.stack([states.sum(0) for states, _ in parts])
    return sums_over_ranks(gram), sums_over_ranks(cross), sums_over_ranks(total)


def _solve(gram_DD: Tensor, cross_DE: Tensor, total_D: Tensor, strength: float) -> Tensor:
    """[D, E] float64: the ridge solution that does not see the direction of the mean state.

    The final states of a language model are nearly parallel (mean cosine 0.99 on SmolLM2). Without a bias, that
    direction would only add a constant vector to every prediction, and its power would hide that of all others from
    the regularisation. What is left of the states has a mean of zero, as centred targets have.
    """
    common_D = total_D / total_D.norm().clamp(min=1e-30)
    along_D = gram_DD @ common_D
    gram = gram_DD - torch.outer(common_D, along_D) - torch.outer(along_D, common_D)
    gram += (common_D @ along_D) * torch.outer(common_D, common_D)
    # States that are all alike leave nothing but rounding errors, from which no head is fitted.
    ridge = max(strength * float(gram.trace()), 1e-12 * float(gram_DD.trace()), 1e-30)
    factor = torch.linalg.cholesky(gram + ridge * torch.eye(len(gram), dtype=gram.dtype))
    return torch.cholesky_solve(cross_DE - torch.outer(common_D, common_D @ cross_DE), factor)


def _account(predicted_nE: Tensor, targets_nE: Tensor, rows: int, strength: float) -> HeadFit:
    """The cosines over the rows of all ranks; collective."""
    units = torch.nn.functional.normalize(predicted_nE, dim=-1)
    own = (units * targets_nE).sum(-1)
    parts = [own.sum()[None], own.square().sum()[None], units.sum(0), targets_nE.sum(0)]
    sums = sums_over_ranks(torch.cat(parts))
    width = targets_nE.shape[1]
    mean = float(sums[0]) / rows
    spread = max(0.0, float(sums[1]) / rows - mean * mean) / (rows - 1)
    # The sum over all pairs of rows is a product of two sums; the pairs of a row with itself are taken out.
    other = (float(sums[2 : 2 + width] @ sums[2 + width :]) - float(sums[0])) / (rows * (rows - 1))
    return HeadFit(rows, strength, mean, math.sqrt(spread), other)
