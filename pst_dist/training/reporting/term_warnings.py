"""Warnings about loss terms that have no effect or dominate, each at most once per training.

There is a warning when a term contributes under 1 % or over 99 % of the gradient, because its weight is then too small
or too large; but not for a term that is already learnt, because its gradient is small whatever its weight. For the
alignment term there is also a warning when it stays under 5 %, and when validation finds the student's vectors no
nearer to their own targets than to those of other rows: a run in which the term has no effect proves nothing about the
term.
"""

from __future__ import annotations

import logging

from pst_dist.config.schema import Config
from pst_dist.training.reporting.step_record import LEARNT, StepRecord
from pst_dist.training.validation import ValidationScore

log = logging.getLogger(__name__)
_INERT, _INERT_ROWS = 0.05, 5
"""Share of the gradient, and number of logged steps in a row under it, at which the alignment term counts as inert."""


class TermWarnings:
    """Logs the warnings of one training of `total` steps."""

    def __init__(self, config: Config, total: int) -> None:
        self._config, self._total = config, total
        self._warned: set[str] = set()
        self._inert_rows = 0

    def after_step(self, record: StepRecord) -> None:
        """Look at a logged step."""
        self._balance(record)
        self._inert(record)

    def _balance(self, record: StepRecord) -> None:
        """Warn once about each term whose weight does nothing or everything."""
        if record.step == 1:
            return
        for name, share in record.unbalanced().items():
            if name not in self._warned:
                self._warned.add(name)
                log.warning(
                    "step %d: the %s term contributes %.2f %% of the gradient at the hidden state; consider another "
                    "value of loss.%s_weight",
                    record.step,
                    name,
                    100 * share,
                    name,
                )

    def _inert(self, record: StepRecord) -> None:
        """Warn once when the alignment term has had under 5 % of the gradient in several logged steps in a row."""
        share = record.gradient_shares().get("alignment")
        if share is None or record.step == 1 or len(record.raw) == 1:
            return
        is_inert = share < _INERT and record.raw["alignment"] > LEARNT
        self._inert_rows = self._inert_rows + 1 if is_inert else 0
        enough = self._inert_rows >= _INERT_ROWS or (record.step == self._total and self._inert_rows > 1)
        if enough and "alignment" not in self._warned:
            self._warned.add("alignment")
            log.warning(
                "step %d: the alignment term stays under %.0f %% of the gradient at the hidden state (%.2f %% now), so "
                "it has almost no effect; set loss.alignment_share (such as 0.2) and loss.head_init=ridge",
                record.step,
                100 * _INERT,
                100 * share,
            )

    def after_validation(self, step: int, score: ValidationScore) -> None:
        """Warn once, in the second half of the training, when validation rows are not nearer to their own targets."""
        cosine, other, stderr = score.cosine, score.cosine_other, score.cosine_stderr
        is_control = self._config.loss.control == "shuffle_embeddings"
        if cosine is None or other is None or stderr is None or is_control or 2 * step < self._total:
            return
        if cosine - other < 2 * stderr and "cosine" not in self._warned:
            self._warned.add("cosine")
            log.warning(
                "step %d: on validation rows the cosine to a row's own target is %.3f +- %.3f, and to those of other "
                "rows %.3f: the semantic term has learnt nothing specific to a row, like its shuffled control; see "
                "loss.alignment_share, loss.head_init, loss.layer and embed.encoder",
                step,
                cosine,
                stderr,
                other,
            )
