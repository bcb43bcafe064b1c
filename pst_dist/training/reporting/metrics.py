"""Where the metrics of a training go: metrics.jsonl, `live.json`, the trackers and a log line.

Each term is logged raw and weighted, with the norm of its gradient at the hidden state
(`training.reporting.step_record`). `training.reporting.term_warnings` warns when a term has no effect or dominates.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from pst_dist.config.run_dir import RunDir
from pst_dist.config.schema import Config
from pst_dist.distributed.ranks import Ranks
from pst_dist.logs import progress
from pst_dist.storage.atomic import write_text
from pst_dist.storage.manifest import append_line, read_lines
from pst_dist.storage.outputs import refuse_link_out
from pst_dist.training.head_fit import HeadFit
from pst_dist.training.reporting.all_trackers import PROMETHEUS, Trackers
from pst_dist.training.reporting.live import Live, RankSigns
from pst_dist.training.reporting.prometheus import Prometheus
from pst_dist.training.reporting.step_record import StepRecord
from pst_dist.training.reporting.term_warnings import TermWarnings
from pst_dist.training.reporting.trackers import TrackedRun, Tracker
from pst_dist.training.validation import SampleAnswer, ValidationScore

log = logging.getLogger(__name__)
_MOST_IDS = 8
_MOST_LENGTHS = 100_000
"""Of the sequences between two validations, for their histogram."""
_SHORT = {"answer": "answer", "rationale": "rationale", "alignment": "align"}


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
        self._waited = self._took = 0.0
        self._warnings = TermWarnings(config, total)

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
        self,
        record: StepRecord,
        *,
        epoch: int,
        waited_and_took: tuple[float, float] = (0.0, 0.0),
        signs: Sequence[RankSigns] = (),
        lengths: Sequence[int] = (),
    ) -> None:
        """Record a step; write a row and a log line every `train.logging_steps`.

        `waited_and_took` are the seconds for which this rank waited for its batches, and those of the step itself.
        `signs` are those of all ranks at a logged step; `lengths` the tokens of this rank's sequences.
        """
        if not self.ranks.is_main:
            return
        self._tokens += record.tokens
        self._waited, self._took = self._waited + waited_and_took[0], self._took + waited_and_took[1]
        self._lengths += lengths[: max(0, _MOST_LENGTHS - len(self._lengths))]
        self._bar.advance(1)
        if not self.is_logged(record.step):
            self._live.stepped(record.step)
            return
        now = time.monotonic()
        speed = self._tokens / max(now - self._since, 1e-9)
        row = record.row() | {"epoch": epoch, "tokens_per_second": speed}
        if self._took:
            row["data_wait"] = self._waited / (self._waited + self._took)
        self._since, self._tokens, self._waited, self._took = now, 0, 0.0, 0.0
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
        self._warnings.after_step(record)

    def head_fit(self, fit: HeadFit | None) -> None:
        """Record how the alignment head was fitted before the first step; None where it was not."""
        if self.ranks.is_main and fit is not None:
            append_line(self.run.metrics, {"step": 0, "head_fit": fit.to_json()})
            self._report(0, {f"head_fit/{name}": value for name, value in fit.to_json().items()})

    def _report(self, step: int, values: Mapping[str, Any]) -> None:
        if self.trackers is not None:
            self.trackers.log(step, values)

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
        self._warnings.after_validation(step, score)

    def answers(self, step: int, samples: Sequence[SampleAnswer]) -> None:
        """Record sample answers to validation questions."""
        if not self.ranks.is_main or not samples:
            return
        rows = [asdict(one) for one in samples]
        self._live.answered(rows)
        if self.trackers is not None:
            self.trackers.text(step, "validation/answers", rows)
            self.trackers.histogram(step, "lengths/answer", [one.tokens for one in samples])
