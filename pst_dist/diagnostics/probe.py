"""`pst probe`: how well do the teacher's embeddings predict the answer? Measured before training, with standard errors.

The alignment term can only teach a student what its target contains. If the target says no more about the answer than
the question does, `pst` can hardly beat its control with shuffled embeddings. So a linear probe predicts the gold
answer from the question's embedding, from the rationale's, and from the remainder: the rationale's embedding without
the part that the question's embedding predicts. A linear probe on a few hundred rows finds only part of the
information, so its result is a prediction.
`diagnostics.linear_probe` has the regressions.
"""

# Shapes in this file: n rows, E encoder width

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from pst_dist.config.loading import load_config
from pst_dist.config.run_dir import fetch_data, run_dir
from pst_dist.config.schema import Config, EmbedConfig
from pst_dist.data.sample import ReasoningSample
from pst_dist.data.shards import ShardSet
from pst_dist.data.sources import load_data
from pst_dist.diagnostics.linear_probe import Share, fold_of_rows, majority_rows, remainder, right_rows
from pst_dist.errors import ConfigError, DataError, PstError
from pst_dist.logs import progress

if TYPE_CHECKING:
    from pst_dist.embedding.encoder import TextEncoder

log = logging.getLogger(__name__)
_LEAST_ROWS = 50
_SPLITS = ("train", "validation")
_LEAST_PER_CLASS = 5
"""Rows per class on average, below which a probe cannot learn the classes."""
_POSITIONS = ("first", "second", "third", "fourth")
_OWN = ("layer", "pooling", "revision", "max_seq_length")
"""Settings that belong to one encoder: another one starts without them."""


@dataclass(frozen=True)
class Label:
    """Something about the answer that a probe may read."""

    name: str
    classes: np.ndarray
    """[n] int, 0 … C - 1."""


@dataclass(frozen=True)
class Reading:
    """How well one label is read, as shares of rows."""

    label: str
    classes: int
    majority: Share
    """The most frequent class."""
    question: Share
    """From the question's embedding."""
    rationale: Share
    """From the rationale's."""
    remainder: Share
    """From what remains of the rationale's."""
    over_question: Share
    """Rationale minus question, paired."""
    over_majority: Share
    """Remainder minus majority, paired."""
    question_over_majority: Share
    """Question minus majority, paired."""

    @property
    def verdict(self) -> str:
        """`yes`, `no` or `unclear`: do the targets know more of the answer than the question's own embedding?

        Regularised regression removes the question's part not quite, so the remainder says little where the question
        knows the answer itself.
        """
        if self.over_question.is_positive:
            return "yes" if self.over_majority.is_positive else "unclear"
        alone = self.over_majority.is_positive and not self.question_over_majority.is_positive
        return "unclear" if alone else "no"


@dataclass(frozen=True)
class Probed:
    """The account of one encoder."""

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
    widths = [max(len(row[k]) for row in rows) for k in range(len(header))]
    text = [
        "  ".join(c.ljust(w) if k == 0 else c.rjust(w) for k, (c, w) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    ]
    topic = f"{100 * max(0.0, one.topic):.0f} % of the targets' variance follows from the question"
    cosine = f"cosine of its prediction {one.topic_cosine.mean:.2f} ± {one.topic_cosine.stderr:.2f}"
    return [f"encoder {one.encoder}, width {one.width}: {topic} ({cosine})", *(text if len(text) > 1 else [])]


def probe(
    config: Config,
    encoders: Sequence[str] = (),
    *,
    most_rows: int = 1000,
    from_run: bool = False,
    split: str | None = None,
) -> ProbeReport:
    """Probe the config's encoder and those given (`NAME,layer=N,pooling=last`) on training and validation rows.

    `split` takes the rows of one of the two: an encoder that was trained on the training rows is judged on the others.
    `from_run` takes the rows from the run's shards, else they are read from their sources. Vectors of rationales come
    from the run's embeddings where these were made by the same encoder; the others are computed. Raises DataError for
    too few rows with a rationale, and what reading the rows or loading an encoder raises.
    """
    wanted = [(config.embed, _name(config.embed)), *(_other_encoder(config, word) for word in encoders)]
    samples = _rows(config, most_rows, (split,) if split else _SPLITS, from_run=from_run)
    labels, skipped = labels_of(samples)
    folds = fold_of_rows(len(samples))
    probed = []
    for embed, name in wanted:
        questions, rationales = _vectors(config, embed, samples)
        probed.append(_probe_encoder(name, questions, rationales, labels, folds))
    return ProbeReport(len(samples), tuple(probed), skipped)


def _probe_encoder(
    name: str, questions_nE: np.ndarray, rationales_nE: np.ndarray, labels: Sequence[Label], folds_n: np.ndarray
) -> Probed:
    left = remainder(rationales_nE, questions_nE, folds_n)
    readings = []
    for label in labels:
        majority = majority_rows(label.classes)
        places = (questions_nE, rationales_nE, left.vectors)
        question, rationale, rest = (right_rows(vectors, label.classes, folds_n).astype(float) for vectors in places)
        readings.append(
            Reading(
                label.name,
                int(label.classes.max()) + 1,
                majority=Share.of(majority),
                question=Share.of(question),
                rationale=Share.of(rationale),
                remainder=Share.of(rest),
                over_question=Share.of(rationale - question),
                over_majority=Share.of(rest - majority),
                question_over_majority=Share.of(question - majority),
            )
        )
    return Probed(name, rationales_nE.shape[1], left.explained, left.cosine, tuple(readings))


def labels_of(samples: Sequence[ReasoningSample]) -> tuple[list[Label], str]:
    """What can be asked about these answers, and why nothing can ("" if something can)."""
    answers = [sample.answer for sample in samples]
    if all(sample.answer_type == "number" for sample in samples):
        return _number_label(answers)
    found = _label("answer", answers)
    if found is not None:
        return [found], ""
    letters = [_label(f"{_POSITIONS[k]} character", [answer[k] for answer in answers]) for k in _places(answers)]
    labels = [label for label in letters if label is not None]
    if labels:
        return labels, ""
    kinds = Counter(answers)
    if len(kinds) == 1:
        return [], f"every row has the same answer, {answers[0][:40]!r}"
    return [], f"{len(kinds):,} different answers in {len(answers):,} rows are too many classes"


def _places(answers: Sequence[str]) -> range:
    """Positions of the characters that every answer has, at most four."""
    return range(min(len(_POSITIONS), min(map(len, answers))))


def _label(name: str, values: Sequence[str]) -> Label | None:
    """The classes of some values; None when there is one only, or too few rows for each."""
    kinds, classes = np.unique(np.array(values), return_inverse=True)
    if len(kinds) < 2 or len(values) < _LEAST_PER_CLASS * len(kinds):
        return None
    return Label(name, classes.reshape(-1).astype(np.int64))


def _number_label(answers: Sequence[str]) -> tuple[list[Label], str]:
    """Whether a number is above the median; few different numbers are classes of their own."""
    try:
        numbers = np.array([float(answer) for answer in answers])
    except ValueError as error:
        return [], f"a number could not be read ({error})"
    middle = float(np.median(numbers))
    label = _label(f"answer above {middle:g}", [str(number > middle) for number in numbers])
    return ([label], "") if label is not None else ([], "the answers have no upper half: one number is too frequent")


def _rows(config: Config, most: int, wanted: Sequence[str], *, from_run: bool) -> list[ReasoningSample]:
    """Rows of the wanted splits with a rationale, spread evenly when there are more than `most`."""
    if from_run:
        fetch_data(config)
        shards = ShardSet.open(run_dir(config).shards, verify=False)
        found = [sample for split in wanted for sample in shards.split(split)]
    else:
        splits = load_data(config).splits
        found = [sample for split in wanted for sample in splits[split]]
    samples = [sample for sample in found if sample.rationales]
    if len(samples) < _LEAST_ROWS:
        raise DataError(
            f"{len(samples)} rows have a rationale; a probe needs at least {_LEAST_ROWS}", "add rows with rationales"
        )
    chosen = np.linspace(0, len(samples) - 1, min(most, len(samples))).round().astype(int)
    return [samples[k] for k in chosen]


def _name(embed: EmbedConfig) -> str:
    """An encoder with the settings that tell it from others of the same name."""
    from pst_dist.models.locate import encoder_name

    more = [f"{key}={value}" for key in ("layer", "pooling", "prefix") if (value := getattr(embed, key))]
    return ",".join([encoder_name(embed.encoder), *more])


def _other_encoder(config: Config, word: str) -> tuple[EmbedConfig, str]:
    """The encoder that `NAME,key=value…` names; raises ConfigError for a key that is none of `embed`."""
    name, *pairs = word.split(",")
    bad = next((pair for pair in pairs if "=" not in pair), None)
    if bad is not None:
        raise ConfigError(f"--encoder {word}: {bad!r} is not key=value", "for example smollm2,layer=15,pooling=last")
    changes = [f"embed.encoder={name}", *(f"embed.{key}=null" for key in _OWN), *(f"embed.{pair}" for pair in pairs)]
    embed = load_config(None, changes, base=config).embed
    return embed, _name(embed)


def _vectors(config: Config, embed: EmbedConfig, samples: Sequence[ReasoningSample]) -> tuple[np.ndarray, np.ndarray]:
    """[n, E] float32 unit vectors of the questions and of each row's first rationale."""
    from pst_dist.embedding.encoder import TextEncoder

    encoder = TextEncoder(embed)
    stored = _stored(config, encoder)
    texts = [sample.rationales[0] for sample in samples]
    known = [stored(sample) for sample in samples] if stored is not None else [None] * len(samples)
    missing = [k for k, vector in enumerate(known) if vector is None]
    with progress(f"embed {_name(embed)}", total=len(samples) + len(missing), unit="texts") as bar:
        questions = encoder.encode([sample.question for sample in samples], advance=bar.advance)
        made = encoder.encode([texts[k] for k in missing], advance=bar.advance)
    rationales = np.zeros_like(questions)
    rationales[missing] = made
    for k, vector in enumerate(known):
        if vector is not None:
            rationales[k] = vector
    log.info("probe: %d of %d rationales were embedded before", len(samples) - len(missing), len(samples))
    return questions, rationales


def _stored(config: Config, encoder: TextEncoder) -> Callable[[ReasoningSample], np.ndarray | None] | None:
    """Looks up the vector of a row's first rationale in the run's embeddings, if this encoder made them."""
    from pst_dist.embedding.store import EmbeddingStore

    run = run_dir(config)
    try:
        shards = ShardSet.open(run.shards, verify=False)
        store = EmbeddingStore.open(run.embeddings, shards, verify=False)
    except PstError:
        return None
    if store.identity != encoder.identity:
        return None
    texts = {sample.id: sample.rationales[:1] for split in store.splits for sample in shards.split(split)}

    def look_up(sample: ReasoningSample) -> np.ndarray | None:
        same = texts.get(sample.id) == sample.rationales[:1]
        return store.vector(sample.id, 0) if same else None

    return look_up
