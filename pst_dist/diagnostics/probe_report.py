"""What `pst probe` found, and its text: the shares of rows on which each label is read, and a verdict per encoder."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from pst_dist.diagnostics.linear_probe import Share
from pst_dist.text.tables import aligned


@dataclass(frozen=True)
class Reading:
    """How well one label is predicted, as shares of rows."""

    label: str
    classes: int
    majority: Share
    """The most frequent class."""
    question: Share
    """From the question's embedding."""
    rationale: Share
    """From the rationale's."""
    remainder: Share
    """From the rationale's without what the question's predicts."""
    over_question: Share
    """Rationale minus question, paired."""
    over_majority: Share
    """Remainder minus majority, paired."""
    question_over_majority: Share
    """Question minus majority, paired."""

    @property
    def verdict(self) -> str:
        """`yes`, `no` or `unclear`: do the targets predict the answer better than the question's embedding?

        Regularised regression leaves some of the question's part in the remainder. So the remainder says little if the
        question alone already predicts the answer.
        """
        if self.over_question.is_positive:
            return "yes" if self.over_majority.is_positive else "unclear"
        alone = self.over_majority.is_positive and not self.question_over_majority.is_positive
        return "unclear" if alone else "no"


@dataclass(frozen=True)
class Probed:
    """The findings about one encoder."""

    encoder: str
    width: int
    topic: float
    """Share of the targets' variance that the question's embedding predicts."""
    topic_cosine: Share
    readings: tuple[Reading, ...]

    @property
    def verdict(self) -> str:
        """The best of its readings' verdicts."""
        found = {reading.verdict for reading in self.readings}
        return next((word for word in ("yes", "unclear") if word in found), "no")


@dataclass(frozen=True)
class ProbeReport:
    """What `pst probe` found; `lines()` is the text."""

    rows: int
    probed: tuple[Probed, ...]
    skipped: str = ""
    """Why no label could be made of the answers; empty otherwise."""

    def to_json(self) -> dict[str, Any]:
        """Plain dict."""
        found = []
        for one in self.probed:
            readings = [asdict(reading) | {"verdict": reading.verdict} for reading in one.readings]
            found.append(asdict(one) | {"readings": readings, "verdict": one.verdict})
        return {"rows": self.rows, "skipped": self.skipped or None, "encoders": found}

    def lines(self) -> list[str]:
        """The tables and the verdict."""
        text = [f"{self.rows:,} rows; a probe is fitted to four fifths of them and scored on the rest"]
        if self.skipped:
            text.append(f"the answers were not probed: {self.skipped}")
        for one in self.probed:
            text += ["", *_encoder_lines(one)]
        return [*text, "", *self._verdict_lines()]

    def _verdict_lines(self) -> list[str]:
        if self.skipped:
            return ["verdict: none, because the answers could not be probed"]
        text = []
        for one in self.probed:
            text.append(f"verdict for {one.encoder}: {_VERDICTS[one.verdict]}")
        widest = max(reading.over_majority.stderr for one in self.probed for reading in one.readings)
        text.append(
            f"A linear probe on {self.rows:,} rows is a lower bound, and misses gains under about {200 * widest:.0f} "
            "points: take this as a prediction to test, not as a result."
        )
        return text


_VERDICTS = {
    "yes": "the targets predict the answer better than the question does; pst should beat its shuffled control",
    "unclear": "the targets may predict the answer a little better than the question does; pst may or may not beat "
    "its shuffled control",
    "no": "the targets do not predict the answer better than the question does; do not expect pst to beat its "
    "shuffled control, and try another encoder",
}


def _encoder_lines(one: Probed) -> list[str]:
    header = ["predicted", "majority", "question", "rationale", "remainder", "rationale - question", ""]
    rows = [header]
    for reading in one.readings:
        shares = (reading.majority, reading.question, reading.rationale, reading.remainder)
        gain = f"{100 * reading.over_question.mean:+.1f} ± {100 * reading.over_question.stderr:.1f}"
        cells = [f"{100 * share.mean:.1f} ± {100 * share.stderr:.1f}" for share in shares]
        rows.append([reading.label, *cells, gain, reading.verdict])
    text = aligned(rows)
    topic = f"{100 * max(0.0, one.topic):.0f} % of the targets' variance follows from the question"
    cosine = f"cosine of its prediction {one.topic_cosine.mean:.2f} ± {one.topic_cosine.stderr:.2f}"
    return [f"encoder {one.encoder}, width {one.width}: {topic} ({cosine})", *(text if len(text) > 1 else [])]
