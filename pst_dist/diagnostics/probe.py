"""`pst probe`: how well do the teacher's embeddings predict the answer? Measured before training, with standard errors.

The alignment term can only teach a student what its target contains. If the target says no more about the answer than
the question does, `pst` can hardly beat its control with shuffled embeddings. So a linear probe predicts the gold
answer from the question's embedding, from the rationale's, and from the remainder: the rationale's embedding without
the part that the question's embedding predicts. A linear probe on a few hundred rows finds only part of the
information, so its result is a prediction.
`diagnostics.linear_probe` has the regressions, `probe_labels` what is predicted, and `probe_report` the text.
"""

# Shapes in this file: n rows, E encoder width

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from pst_dist.config.loading import load_config
from pst_dist.config.run_dir import fetch_data, run_dir
from pst_dist.config.schema import Config, EmbedConfig
from pst_dist.data.sample import ReasoningSample
from pst_dist.data.shards import ShardSet
from pst_dist.data.sources import load_data
from pst_dist.diagnostics.linear_probe import Share, fold_of_rows, majority_rows, remainder, right_rows
from pst_dist.diagnostics.probe_labels import Label, labels_of
from pst_dist.diagnostics.probe_report import Probed, ProbeReport, Reading
from pst_dist.errors import ConfigError, DataError, PstError
from pst_dist.logs import progress

if TYPE_CHECKING:
    from pst_dist.embedding.encoder import TextEncoder

log = logging.getLogger(__name__)
_LEAST_ROWS = 50
_SPLITS = ("train", "validation")
_OWN = ("layer", "pooling", "revision", "max_seq_length")
"""Settings that belong to one encoder and are not used for another one."""


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
