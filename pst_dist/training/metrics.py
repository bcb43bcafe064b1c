"""The metrics of a training step, and where they go: metrics.jsonl, the trackers and a log line.

Each term is logged raw and weighted, with the norm of its gradient at the hidden state. A term that contributes under
1 % or over 99 % of the gradient gets a warning, because its weight then does nothing or everything. A term that is
already learnt gets none: its gradient is small whatever its weight. The alignment term also gets one when it stays
under 5 %, and when validation finds the students' vectors no nearer to their own targets than to those of other rows:
a run whose term does not act proves nothing about it.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from pst_dist.config.run_dir import RunDir
from pst_dist.config.schema import Config
from pst_dist.distributed.ranks import Ranks
from pst_dist.logs import progress
from pst_dist.storage.atomic import write_text
from pst_dist.storage.manifest import append_line, read_lines
from pst_dist.storage.outputs import refuse_link_out
from pst_dist.training.head_fit import HeadFit
from pst_dist.training.live import Live, RankSigns
from pst_dist.training.loss import TERMS
from pst_dist.training.prometheus import Prometheus
from pst_dist.training.trackers import PROMETHEUS, TrackedRun, Tracker, Trackers
from pst_dist.training.validation import SampleAnswer, ValidationScore

log = logging.getLogger(__name__)
_MOST_IDS = 8
_LEARNT = 0.05
"""Nats per token, or distance: a term below this counts as learnt."""
_INERT, _INERT_ROWS = 0.05, 5
"""Share of the gradient, and number of logged steps in a row under it, at which the alignment term counts as inert."""
_SHORT = {"answer": "answer", "rationale": "rationale", "alignment": "align"}


@dataclass(frozen=True)
class StepRecord:
    """One optimizer step over the global batch."""

    step: int
    """Steps done, including this one."""
    raw: dict[str, float]
    """Mean of each present term: nats per token, distance per sample."""
    weighted: dict[str, float]
    """Each present term's share of the loss; the shares sum to it."""
    cosine: float | None
    """Mean cosine to the teacher; None without alignment."""
    gradients: dict[str, float] | None
    """Norm of each present term's gradient at the hidden state; None when not measured."""
    grad_norm: float
    """Global gradient norm over all parameters, before clipping."""
    learning_rate: float
    tokens: int
    """Tokens of all sequences over all ranks, without padding."""
    padding: float
    """The share of the positions computed over all ranks that is padding, 0 … 1."""

    @classmethod
    def of(
        cls,
        *,
        step: int,
        sums: Tensor,
        counts: Tensor,
        scales: Tensor,
        cosine: float,
        gradients: Tensor | None,
        grad_norm: float,
        learning_rate: float,
        tokens: int,
        padding: float,
    ) -> StepRecord:
        """From [3] sums, counts, scales and gradient norms in the order of `loss.TERMS`."""
        present = [index for index, count in enumerate(counts.tolist()) if count > 0]
        return cls(
            step=step,
            raw={TERMS[k]: float(sums[k] / counts[k]) for k in present},
            weighted={TERMS[k]: float(sums[k] * scales[k]) for k in present},
            cosine=cosine / float(counts[2]) if counts[2] else None,
            gradients=None if gradients is None else {TERMS[k]: float(gradients[k]) for k in present},
            grad_norm=grad_norm,
            learning_rate=learning_rate,
            tokens=tokens,
            padding=padding,
        )

    @property
    def loss(self) -> float:
        """The weighted total."""
        return sum(self.weighted.values())

    @property
    def alignment_weight(self) -> float | None:
        """The weight of the alignment term in this step; None without the term."""
        raw = self.raw.get("alignment")
        return self.weighted["alignment"] / raw if raw else None

    def gradient_shares(self) -> dict[str, float]:
        """Each term's norm over the sum of norms, 0 … 1."""
        total = sum((self.gradients or {}).values())
        return {name: value / total for name, value in (self.gradients or {}).items()} if total > 0 else {}

    def unbalanced(self) -> dict[str, float]:
        """Shares of unlearnt terms that make under 1 % or over 99 % of the gradient; empty for a single such term."""
        to_learn = {name: share for name, share in self.gradient_shares().items() if self.raw[name] > _LEARNT}
        return {name: share for name, share in to_learn.items() if len(to_learn) > 1 and not 0.01 <= share <= 0.99}

    def row(self) -> dict[str, Any]:
        """The JSON line, without clock-dependent fields."""
        row: dict[str, Any] = {
            "step": self.step,
            "loss": self.loss,
            "grad_norm": self.grad_norm,
            "learning_rate": self.learning_rate,
            "tokens": self.tokens,
            "padding": self.padding,
        }
        names = {"answer": "answer_nll", "rationale": "rationale_nll", "alignment": "alignment"}
        row |= {names[name]: value for name, value in self.raw.items()}
        row |= {f"weighted_{name}": value for name, value in self.weighted.items()}
        if self.cosine is not None:
            row["cosine"] = self.cosine
        row |= {f"gradient_{name}": value for name, value in (self.gradients or {}).items()}
        row |= {f"gradient_share_{name}": value for name, value in self.gradient_shares().items()}
        return row


class MetricsLog:
    """Writes metrics on rank zero; a context manager that closes its writers."""

    def __init__(
        self,
        config: Config,
        run: RunDir,
        ranks: Ranks,
        *,
        first_step: int,
        total: int,
        own: Mapping[str, Tracker] | None = None,
    ) -> None:
        """`own` are trackers of the launcher, in addition to train.report_to."""
        self._own = dict(own or {})
        if config.train.metrics_port is not None:
            self._own[PROMETHEUS] = Prometheus(config.train.metrics_port)
        self._lengths: list[int] = []
        self.config, self.run, self.ranks = config, run, ranks
        self.first_step, self.total = first_step, total
        self.trackers: Trackers | None = None
        self._since = time.monotonic()
        self._tokens = 0
        self._warned: set[str] = set()
        self._inert_rows = 0

    def __enter__(self) -> MetricsLog:
        if not self.ranks.is_main:
            return self
        refuse_link_out(self.run.metrics, self.run.path)
        # Drop rows after the checkpoint we resume from: their steps are about to be repeated.
        found = read_lines(self.run.metrics)
        begun = self.first_step > 0  # a new training also repeats what precedes its first step
        kept = [row for row in found if isinstance(row.get("step"), int) and row["step"] <= self.first_step and begun]
        write_text(self.run.metrics, "".join(json.dumps(row, sort_keys=True) + "\n" for row in kept))
        tracked = TrackedRun(self.run.path, self.run.path.name, self.first_step)
        self._live = Live(self.run.path, self.config.arm, first_step=self.first_step, total=self.total)
        self._live.__enter__()
        self.trackers = Trackers(self.config.train.report_to, tracked, self.config, self._own)
        self._progress = progress(f"train {self.config.arm}", total=self.total, unit="steps")
        self._bar = self._progress.__enter__()
        self._bar.advance(self.first_step)
        self._bar.restart()  # earlier steps do not count towards the speed of this start
        return self

    def __exit__(self, *details: Any) -> None:
        if not self.ranks.is_main:
            return
        self._progress.__exit__(*details)
        self._live.__exit__(*details)
        assert self.trackers is not None
        self.trackers.finish(failed=details[0] is not None)

    def is_logged(self, step: int) -> bool:
        """Whether a step gets a row and a log line."""
        return step % self.config.train.logging_steps == 0 or step in (1, self.total)

    def step(
        self, record: StepRecord, *, epoch: int, signs: Sequence[RankSigns] = (), lengths: Sequence[int] = ()
    ) -> None:
        """Record a step; write a row and a log line every `train.logging_steps`.

        `signs` are those of all ranks at a logged step; `lengths` the tokens of this rank's sequences.
        """
        if not self.ranks.is_main:
            return
        self._tokens += record.tokens
        self._lengths += lengths
        self._bar.advance(1)
        if not self.is_logged(record.step):
            self._live.stepped(record.step)
            return
        now = time.monotonic()
        speed = self._tokens / max(now - self._since, 1e-9)
        self._since, self._tokens = now, 0
        row = record.row() | {"epoch": epoch, "tokens_per_second": speed}
        if self.config.loss.alignment_share is not None and record.alignment_weight is not None:
            row["alignment_weight"] = record.alignment_weight
        append_line(self.run.metrics, row)
        self._live.logged(row, signs)
        self._live.stepped(record.step)
        self._report(record.step, {name: value for name, value in row.items() if name != "step"})
        terms = "  ".join(f"{_SHORT[name]} {value:.4f}" for name, value in record.raw.items())
        log.info(
            "step %d/%d  loss %.4f  %s  %s tok/s/rank  padding %.0f %%",
            record.step,
            self.total,
            record.loss,
            terms,
            f"{speed / self.ranks.world_size:,.0f}",
            100 * record.padding,
        )
        self._warn_about_balance(record)
        self._warn_about_inert_term(record)

    def head_fit(self, fit: HeadFit | None) -> None:
        """Record how the alignment head was fitted before the first step; None where it was not."""
        if self.ranks.is_main and fit is not None:
            append_line(self.run.metrics, {"step": 0, "head_fit": fit.to_json()})
            self._report(0, {f"head_fit/{name}": value for name, value in fit.to_json().items()})

    def _report(self, step: int, values: Mapping[str, Any]) -> None:
        if self.trackers is not None:
            self.trackers.log(step, values)

    def _warn_about_balance(self, record: StepRecord) -> None:
        """Warn once about each term whose weight does nothing or everything."""
        if record.step == 1:
            return
        for name, share in record.unbalanced().items():
            if name not in self._warned:
                self._warned.add(name)
                log.warning(
                    "step %d: the %s term makes %.2f %% of the gradient at the hidden state; consider another value of "
                    "loss.%s_weight",
                    record.step,
                    name,
                    100 * share,
                    name,
                )

    def _warn_about_inert_term(self, record: StepRecord) -> None:
        """Warn once when the alignment term has had under 5 % of the gradient in several logged steps in a row."""
        share = record.gradient_shares().get("alignment")
        if share is None or record.step == 1 or len(record.raw) == 1:
            return
        is_inert = share < _INERT and record.raw["alignment"] > _LEARNT
        self._inert_rows = self._inert_rows + 1 if is_inert else 0
        enough = self._inert_rows >= _INERT_ROWS or (record.step == self.total and self._inert_rows > 1)
        if enough and "alignment" not in self._warned:
            self._warned.add("alignment")
            log.warning(
                "step %d: the alignment term stays under %.0f %% of the gradient at the hidden state (%.2f %% now), so "
                "it hardly acts; set loss.alignment_share (such as 0.2) and loss.head_init=ridge",
                record.step,
                100 * _INERT,
                100 * share,
            )

    def _warn_about_cosine(self, step: int, score: ValidationScore) -> None:
        """Warn once, from the middle of the training on, when validation rows are not told apart by their targets."""
        cosine, other, stderr = score.cosine, score.cosine_other, score.cosine_stderr
        is_control = self.config.loss.control == "shuffle_embeddings"
        if cosine is None or other is None or stderr is None or is_control or 2 * step < self.total:
            return
        if cosine - other < 2 * stderr and "cosine" not in self._warned:
            self._warned.add("cosine")
            log.warning(
                "step %d: on validation rows the cosine to a row's own target is %.3f +- %.3f, to those of other rows "
                "%.3f: the semantic term has learnt nothing of a row, as its shuffled control would; see "
                "loss.alignment_share, loss.head_init, loss.layer and embed.encoder",
                step,
                cosine,
                stderr,
                other,
            )

    def bad_step(self, step: int, outcome: str, fault: str, sample_ids: list[str]) -> None:
        """Record a step that moved no weight; `outcome` is the response to it."""
        if not self.ranks.is_main:
            return
        self._bar.advance(1)
        append_line(self.run.metrics, {"step": step, "bad_step": fault, "outcome": outcome, "samples": sample_ids})
        shown = ", ".join(sample_ids[:_MOST_IDS]) + (", …" if len(sample_ids) > _MOST_IDS else "")
        log.warning("step %d/%d  %s: %s; samples %s", step, self.total, fault, outcome, shown)

    def validation(self, step: int, score: ValidationScore, *, seconds: float = 0.0) -> None:
        """Record the scores of the validation rows, and the lengths of the sequences since the last validation."""
        if not self.ranks.is_main:
            return
        if self.trackers is not None:
            self.trackers.histogram(step, "lengths/sequence", self._lengths)
        self._lengths = []
        values = {name: value for name, value in score.to_json().items() if value is not None}
        if not values:
            return
        append_line(self.run.metrics, {"step": step, "validation": values})
        self._live.validated(step, values, seconds)
        self._report(step, {f"validation/{name}": value for name, value in values.items()})
        words = "  ".join(f"{name} {value:.4f}" for name, value in values.items())
        log.info("step %d/%d  validation  %s", step, self.total, words)
        self._warn_about_cosine(step, score)

    def answers(self, step: int, samples: Sequence[SampleAnswer]) -> None:
        """Record sample answers to validation questions."""
        if not self.ranks.is_main or not samples:
            return
        rows = [asdict(one) for one in samples]
        self._live.answered(rows)
        if self.trackers is not None:
            self.trackers.text(step, "validation/answers", rows)
            self.trackers.histogram(step, "lengths/answer", [one.tokens for one in samples])
